//! The result of a doctor check, and helpers that the checks of all tiers share.

mod clock;

pub use clock::Clock;
pub(crate) use clock::http_date;

use crate::error::{Error, ErrorKind};
use crate::printable;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// Timeout of a single network request of the doctor.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The subject of a check, in the order of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// Files, variables and flags.
    Configuration,
    /// The local directory.
    Directory,
    /// The lower directory, a second, read-only cache.
    Lower,
    /// The credentials for the remote, and their source.
    Credentials,
    /// The object store.
    Remote,
    /// The origins.
    Origin,
    /// The local clock, compared with the servers' clocks.
    Clock,
    /// Proxies and certificates.
    Network,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configuration => "configuration",
            Self::Directory => "directory",
            Self::Lower => "lower directory",
            Self::Credentials => "credentials",
            Self::Remote => "remote",
            Self::Origin => "origin",
            Self::Clock => "clock",
            Self::Network => "network",
        })
    }
}

/// The severity of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The check passed.
    Ok,
    /// The cache works, but is badly configured or may fail soon.
    Warning,
    /// A command will fail.
    Problem,
}

/// The result of one check.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// The subject.
    pub area: Area,
    /// The severity.
    pub severity: Severity,
    /// The result in words, in one line.
    pub message: String,
    /// The fix, unless the check passed.
    pub fix: Option<String>,
    /// The kind of error that a problem causes; `None` unless this is a problem. It determines the exit code.
    #[serde(skip)]
    pub kind: Option<ErrorKind>,
}

impl Check {
    /// Creates a check that passed.
    pub fn ok(area: Area, message: impl Into<String>) -> Self {
        Self {
            area,
            severity: Severity::Ok,
            message: printable::line(&message.into()).into_owned(),
            fix: None,
            kind: None,
        }
    }

    /// Creates a warning.
    pub fn warning(area: Area, message: impl Into<String>, fix: impl Into<String>) -> Self {
        let [message, fix] = [message.into(), fix.into()].map(|text| printable::line(&text).into_owned());
        Self { area, severity: Severity::Warning, message, fix: Some(fix), kind: None }
    }

    /// Creates a problem from an error.
    pub fn problem(area: Area, error: &Error) -> Self {
        let fix = error.hint_text().unwrap_or("see the rest of this report").to_owned();
        Self {
            area,
            severity: Severity::Problem,
            message: error.message_with_causes(),
            fix: Some(fix),
            kind: Some(error.kind()),
        }
    }

    /// Creates a warning from an error.
    pub(crate) fn warning_of(area: Area, error: &Error) -> Self {
        Self { severity: Severity::Warning, kind: None, ..Self::problem(area, error) }
    }

    /// Appends a detail in parentheses.
    pub(crate) fn with_detail(mut self, detail: &str) -> Self {
        self.message.push_str(&format!(" ({})", printable::line(detail)));
        self
    }
}

/// Options of the doctor.
#[derive(Debug, Clone, Copy, Default)]
pub struct DoctorOptions {
    /// Write nothing to the remote, not even a temporary object.
    pub read_only: bool,
}

/// Runs a network request. Fails if it takes longer than [`REQUEST_TIMEOUT`].
pub(crate) async fn with_timeout<T>(request: impl Future<Output = crate::Result<T>>) -> crate::Result<T> {
    let timed_out = || Error::unavailable(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()));
    tokio::time::timeout(REQUEST_TIMEOUT, request).await.unwrap_or_else(|_| Err(timed_out()))
}
