//! The doctor: looks at everything a cache needs and says what is wrong, each thing with its fix.
//!
//! # Contract
//! - Needs no open cache: it is wanted when opening fails. A configuration that cannot be read is the door's to tell; the
//!   rest is then examined with what is left of it.
//! - Looks before it tries, and leaves nothing of what it tried: one temporary folder below the cache directory, and,
//!   unless told to write nothing, one small object below the remote's prefix under a name of its own.
//! - Every question over the network has an end, and they are asked at the same time.
//! - Tells where credentials come from and how a key's id begins; never a secret.
//!
//! What is to be looked at in a tier stands in that tier's own folder (`disk/doctor.rs`, `remote/doctor.rs`,
//! `origin/doctor.rs`); here it is put together.

mod clock;
mod network;

pub(crate) use clock::Clock;

use crate::config::{Config, Environment, RemoteMode};
use crate::error::{Error, ErrorKind};
use crate::printable;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// Longest that one question over the network may take.
pub(crate) const QUESTION_MAX: Duration = Duration::from_secs(10);

/// What a check is about, in the order in which they are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// Files, variables and flags.
    Configuration,
    /// The local directory.
    Directory,
    /// The directory underneath.
    Lower,
    /// Where the keys for the remote come from.
    Credentials,
    /// The object store.
    Remote,
    /// Where artifacts first come from.
    Origin,
    /// This machine's clock against the servers'.
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

/// How grave what was found is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Gravity {
    /// As it should be.
    Ok,
    /// It works, and could be better, or will not work for long.
    Warning,
    /// Something will fail.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What it is about.
    pub area: Area,
    /// How grave it is.
    pub gravity: Gravity,
    /// What was found, in one line.
    pub says: String,
    /// How to mend it, unless it is as it should be.
    pub fix: Option<String>,
    /// The kind of failure that a problem will be; from it follows the exit code.
    #[serde(skip)]
    pub kind: Option<ErrorKind>,
}

impl Check {
    /// It is as it should be.
    pub fn ok(area: Area, says: impl Into<String>) -> Self {
        Self { area, gravity: Gravity::Ok, says: printable::line(&says.into()).into_owned(), fix: None, kind: None }
    }

    /// It works, but.
    pub fn warning(area: Area, says: impl Into<String>, fix: impl Into<String>) -> Self {
        let [says, fix] = [says.into(), fix.into()].map(|text| printable::line(&text).into_owned());
        Self { area, gravity: Gravity::Warning, says, fix: Some(fix), kind: None }
    }

    /// A failure that has to be mended.
    pub fn problem(area: Area, error: &Error) -> Self {
        let fix = error.hint_text().unwrap_or("see the rest of this report").to_owned();
        Self {
            area,
            gravity: Gravity::Problem,
            says: error.message_with_causes(),
            fix: Some(fix),
            kind: Some(error.kind()),
        }
    }

    /// A failure that one can live with.
    pub(crate) fn warning_of(area: Area, error: &Error) -> Self {
        Self { gravity: Gravity::Warning, kind: None, ..Self::problem(area, error) }
    }

    /// The same with more to say.
    pub(crate) fn with_detail(mut self, detail: &str) -> Self {
        self.says.push_str(&format!(" ({})", printable::line(detail)));
        self
    }

    /// The kind of failure, of a problem.
    pub(crate) fn error_kind(&self) -> Option<ErrorKind> {
        self.kind
    }
}

/// What the doctor may do.
#[derive(Debug, Clone, Copy, Default)]
pub struct DoctorOptions {
    /// Write nothing to the remote, not even for a moment.
    pub read_only: bool,
}

/// Looks at everything, and tells it area by area.
pub async fn examine(config: &Config, environment: &Environment, options: DoctorOptions) -> Vec<Check> {
    let options = DoctorOptions { read_only: options.read_only || config.remote_mode == RemoteMode::ReadOnly };
    let for_disk = config.clone();
    let disk = async move {
        let looked = tokio::task::spawn_blocking(move || crate::disk::examine(&for_disk)).await;
        looked.unwrap_or_else(|_| Vec::new())
    };
    let clock = Clock::default();
    let (disk, remote, origin) = futures::join!(
        disk,
        crate::remote::examine(config, options, &clock),
        crate::origin::examine(config, environment, &clock)
    );
    let mut checks = [disk, remote, origin, network::examine(environment)].concat();
    checks.extend(clock.check());
    checks.sort_by_key(|check| check.area);
    checks
}

/// The answer of a question over the network, or that it came too late.
pub(crate) async fn in_time<T>(question: impl Future<Output = crate::Result<T>>) -> crate::Result<T> {
    let too_late = || Error::unavailable(format!("no answer within {} s", QUESTION_MAX.as_secs()));
    tokio::time::timeout(QUESTION_MAX, question).await.unwrap_or_else(|_| Err(too_late()))
}
