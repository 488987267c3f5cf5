//! The error type of the library.
//!
//! An error has a kind that a caller can act on ([`ErrorKind`]), a message, the artifact and the tier, a hint for the
//! user, and a cause. Front ends map the kind to exit codes or HTTP statuses; no code matches on messages. Every text
//! of an error is a single line without control characters and secrets (see [`crate::printable`]). Inside the library,
//! absence is not an error: look-ups return `Option`, and only the outermost call returns [`ErrorKind::NotFound`].

use crate::option_name::setting::{READ_TIMEOUT, RETRY_DEADLINE};
use crate::printable;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The result of every fallible library call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Hint for `EFBIG`, which a write beyond `ulimit -f` returns if SIGXFSZ does not end the process.
pub(crate) const FILE_SIZE_HINT: &str =
    "raise the limit on the size of files that this process writes (ulimit -f, RLIMIT_FSIZE)";

type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The kind of a failure. Kinds differ in the action that a caller can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The artifact, revision or file does not exist on any tier that was consulted.
    NotFound,
    /// Credentials are missing, wrong, expired or lack a permission, or the repository is gated.
    Unauthorized,
    /// Bytes did not match their digest, or a stored record is damaged.
    Corrupt,
    /// The budget or the filesystem has no space left.
    Full,
    /// A service did not answer, answered with an error, or was too slow.
    Unavailable,
    /// The request is invalid, for example a name, a reference or a setting.
    Invalid,
    /// The key already has other content, or another writer is publishing it.
    Conflict,
    /// The cache directory cannot be used.
    Directory,
    /// The limits of this process allow too few threads or too little memory.
    Limits,
    /// Any other failure, for example an I/O error in a file of the caller.
    Other,
}

impl ErrorKind {
    /// All kinds.
    pub(crate) const ALL: [Self; 10] = [
        Self::NotFound,
        Self::Unauthorized,
        Self::Corrupt,
        Self::Full,
        Self::Unavailable,
        Self::Invalid,
        Self::Conflict,
        Self::Directory,
        Self::Limits,
        Self::Other,
    ];

    /// Returns the stable name of the kind, for machine-readable output.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Unauthorized => "unauthorized",
            Self::Corrupt => "corrupt",
            Self::Full => "full",
            Self::Unavailable => "unavailable",
            Self::Invalid => "invalid",
            Self::Conflict => "conflict",
            Self::Directory => "directory",
            Self::Limits => "limits",
            Self::Other => "other",
        }
    }

    /// Returns the hint for an error that has no hint of its own.
    fn default_hint(self) -> Option<String> {
        match self {
            Self::Unavailable => Some(format!(
                "try again later; {RETRY_DEADLINE} sets how long failed requests are retried, {READ_TIMEOUT} how long \
                 to wait for a silent server"
            )),
            Self::Corrupt => Some(
                "the data is damaged or invalid, or a proxy or the network changes it in transit; try again, and if \
                 the error persists, replace the data or check the proxy"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// A storage tier, from the nearest to the farthest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The local directory.
    Disk,
    /// The object store.
    Remote,
    /// The authoritative source, for example the Hugging Face Hub.
    Origin,
}

impl Tier {
    /// Returns the name that messages and metrics use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Remote => "remote",
            Self::Origin => "origin",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An error with its kind, message, artifact, tier, hint and cause. Clones share the cause, so that all callers that
/// wait for one fill get the same error.
#[derive(Debug, Clone)]
pub struct Error(Box<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    artifact: Option<String>,
    tier: Option<Tier>,
    hint: Option<String>,
    /// False while `hint` is the default of the kind.
    has_own_hint: bool,
    retry_after: Option<Duration>,
    transient: bool,
    retry_within: Option<Duration>,
    superseded: bool,
    /// The host that throttled the request.
    throttled_by: Option<String>,
    cause: Option<Arc<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// Creates an error. `message` is one line without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: printable::line(&message.into()).into_owned(),
            artifact: None,
            tier: None,
            hint: kind.default_hint(),
            has_own_hint: false,
            retry_after: None,
            transient: false,
            retry_within: None,
            superseded: false,
            throttled_by: None,
            cause: None,
        }))
    }

    /// Creates an error of kind [`ErrorKind::Invalid`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// Creates an error of kind [`ErrorKind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// Creates an error of kind [`ErrorKind::Corrupt`].
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// Creates a transient error of kind [`ErrorKind::Unavailable`].
    pub fn unavailable(message: impl Into<String>) -> Self {
        let mut error = Self::new(ErrorKind::Unavailable, message);
        error.0.transient = true;
        error
    }

    /// Sets the artifact, unless an inner call has set it.
    #[must_use]
    pub fn artifact(mut self, artifact: impl fmt::Display) -> Self {
        self.0.artifact.get_or_insert_with(|| printable::line(&artifact.to_string()).into_owned());
        self
    }

    /// Sets the tier, unless an inner call has set it.
    #[must_use]
    pub fn tier(mut self, tier: Tier) -> Self {
        self.0.tier.get_or_insert(tier);
        self
    }

    /// Sets the tier, even if an inner call has set it. An origin may be a bucket, and code for buckets sets the remote
    /// tier.
    #[must_use]
    pub(crate) fn replace_tier(mut self, tier: Tier) -> Self {
        self.0.tier = Some(tier);
        self
    }

    /// Sets the hint for the user, unless an inner call has set it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if !self.0.has_own_hint {
            self.0.hint = Some(printable::line(&hint.into()).into_owned());
            self.0.has_own_hint = true;
        }
        self
    }

    /// Sets the underlying error.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<Cause>) -> Self {
        self.0.cause = Some(Arc::from(cause.into()));
        self
    }

    /// Sets whether a retry may succeed.
    #[must_use]
    pub fn transient(mut self, transient: bool) -> Self {
        self.0.transient = transient;
        self
    }

    /// Sets the time that the server asked to wait before a retry, appends it to the message, and marks the error as
    /// transient.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.0.message.push_str(&format!("; it asks to wait {} s", wait.as_secs()));
        self.0.retry_after = Some(wait);
        self.0.transient = true;
        self
    }

    /// Limits the time in which retries are worth while, counted from the first failure.
    #[must_use]
    pub(crate) fn retry_within(mut self, limit: Duration) -> Self {
        self.0.retry_within = Some(limit);
        self
    }

    /// Returns the time in which retries are worth while, if it is limited.
    pub(crate) fn retry_limit(&self) -> Option<Duration> {
        self.0.retry_within
    }

    /// Marks the error as throttling by `host`.
    #[must_use]
    pub(crate) fn throttled(mut self, host: impl Into<String>) -> Self {
        self.0.throttled_by = Some(host.into());
        self
    }

    /// Returns the host that throttled the request. Fewer concurrent requests to it would help.
    pub(crate) fn throttled_by(&self) -> Option<&str> {
        self.0.throttled_by.as_deref()
    }

    /// Marks the error as caused by changed content at the source. Resolving the reference again may help; retrying the
    /// request does not.
    #[must_use]
    pub fn superseded(mut self) -> Self {
        (self.0.superseded, self.0.transient) = (true, false);
        self
    }

    /// Returns true if the content at the source was replaced while it was being read.
    pub fn is_superseded(&self) -> bool {
        self.0.superseded
    }

    /// Returns the kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the message: one line without artifact, tier and hint.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the message and the chain of causes, in one line. A cause that the text already contains is not
    /// repeated.
    pub fn message_with_causes(&self) -> String {
        let mut text = self.message().to_owned();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            let more = printable::line(&inner.to_string()).into_owned();
            if !text.contains(&more) {
                text.push_str(&format!(": {more}"));
            }
            cause = inner.source();
        }
        text
    }

    /// Returns the hint of this error, or the default hint of its kind.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Returns the artifact, if it is known.
    pub fn artifact_name(&self) -> Option<&str> {
        self.0.artifact.as_deref()
    }

    /// Returns the tier that failed, if it is known.
    pub fn failed_tier(&self) -> Option<Tier> {
        self.0.tier
    }

    /// Returns the time that the server asked to wait before a retry.
    pub fn wait(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Returns true if the same request may succeed when it is retried.
    pub fn is_transient(&self) -> bool {
        self.0.transient
    }
}

/// Formats as `artifact: tier: message: cause`. Front ends print the hint.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        match (&inner.artifact, inner.tier) {
            (Some(artifact), Some(tier)) => write!(f, "{artifact}: {tier}: {}", inner.message)?,
            (Some(artifact), None) => write!(f, "{artifact}: {}", inner.message)?,
            (None, Some(tier)) => write!(f, "{tier}: {}", inner.message)?,
            (None, None) => f.write_str(&inner.message)?,
        }
        if let Some(cause) = &inner.cause {
            write!(f, ": {}", printable::line(&cause.to_string()))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.cause.as_deref().map(|cause| cause as _)
    }
}

/// Adds artifact and tier to an error: `disk.acquire(key).context(key, Tier::Disk)?`.
pub(crate) trait Context<T> {
    /// Sets artifact and tier, unless they are set.
    fn context(self, artifact: impl fmt::Display, tier: Tier) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, artifact: impl fmt::Display, tier: Tier) -> Result<T> {
        self.map_err(|error| error.artifact(artifact).tier(tier))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_artifact_tier_message_and_cause() {
        let error = Error::corrupt("sha256 mismatch")
            .artifact("org/model@3")
            .tier(Tier::Remote)
            .cause(std::io::Error::other("short"));
        assert_eq!(error.to_string(), "org/model@3: remote: sha256 mismatch: short");
    }

    #[test]
    fn the_innermost_context_is_kept() {
        let error = Error::not_found("x").artifact("inner").artifact("outer").hint("first").hint("second");
        assert_eq!(error.artifact_name(), Some("inner"));
        assert_eq!(error.hint_text(), Some("first"));
    }

    #[test]
    fn no_part_of_an_error_has_a_line_end_an_escape_or_a_secret() {
        let hostile = "\x1b[2J\nerror: false \u{202e} s3://u:canary@b/x ?sig=canary";
        let error = Error::invalid(hostile).artifact(hostile).hint(hostile).cause(std::io::Error::other(hostile));
        let parts = [error.to_string(), error.message_with_causes(), error.message().to_owned()];
        let more = [error.artifact_name(), error.hint_text()].map(|text| text.unwrap_or_default().to_owned());
        for text in parts.into_iter().chain(more) {
            assert!(!text.contains(['\n', '\x1b', '\u{202e}']) && !text.contains("canary"), "{text}");
            assert!(text.contains("\\u{1b}[2J error: false"), "{text}");
        }
    }

    #[test]
    fn the_default_hint_never_replaces_a_specific_one() {
        let bare = Error::unavailable("x");
        assert!(bare.hint_text().is_some_and(|hint| hint.contains("retry_deadline")));
        assert_eq!(bare.hint("exact").hint_text(), Some("exact"));
        let corrupt = Error::corrupt("the listing does not end");
        assert!(corrupt.hint_text().is_some_and(|hint| hint.contains("try again") && !hint.contains("discarded")));
        assert_eq!(Error::not_found("x").hint_text(), None);
    }
}
