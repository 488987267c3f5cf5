//! The one error type of the library.
//!
//! Every failure says what a caller can do about it ([`ErrorKind`]), what was being done, to which artifact,
//! in which tier, and how to mend it. Doors translate kinds once (exit codes, HTTP statuses); nobody matches
//! on text. Every text of an error is one line that is fit for a terminal and has no secret in it (see
//! [`crate::printable`]), whatever a caller puts into it. Absence is not an error inside the library: look-ups return `Option`, and only the outermost call
//! turns "nowhere" into [`ErrorKind::NotFound`].

use crate::printable;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The result of every fallible library call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Hint for a file that may not grow any more: `EFBIG`, once SIGXFSZ does not end the process.
pub(crate) const FILE_SIZE_HINT: &str =
    "raise the limit on the size of files that this process writes (ulimit -f, RLIMIT_FSIZE)";

type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What kind of failure this is, chosen by what the caller can do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The artifact, revision or file exists in none of the places asked.
    NotFound,
    /// Credentials are missing, wrong, expired, or lack the right; or the repository is gated.
    Unauthorized,
    /// Bytes did not match their digest, or a stored record is damaged.
    Corrupt,
    /// The budget or the filesystem has no room.
    Full,
    /// A service did not answer, answered with an error, or was too slow.
    Unavailable,
    /// The request itself is wrong: a name, a reference, a setting.
    Invalid,
    /// The key is taken by other content, or by another writer.
    Conflict,
    /// The cache directory cannot be used.
    Directory,
    /// The limits of this process leave it too few threads or too little memory.
    Limits,
    /// Anything else, an input/output error in a caller's own file for instance.
    Other,
}

impl ErrorKind {
    /// The stable name of the kind, as machine-readable output carries it.
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

    fn usual_remedy(self) -> Option<&'static str> {
        match self {
            Self::Unavailable => Some(
                "try again later; MODEL_CACHE_RETRY_DEADLINE says for how long a failing service is tried, \
                 MODEL_CACHE_READ_TIMEOUT for how long a silent one is waited for",
            ),
            Self::Corrupt => Some("a copy is damaged, or something on the way alters it; nothing of it was kept"),
            _ => None,
        }
    }
}

/// A place that was being asked when something failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The local directory.
    Disk,
    /// The object store.
    Remote,
    /// The authority an artifact first came from.
    Origin,
}

impl Tier {
    /// Its name, as messages and metrics have it.
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

/// A failure: its kind, what failed, where, and what to do about it. Clones share the cause: everybody who waited for
/// the same fill gets the same failure.
#[derive(Debug, Clone)]
pub struct Error(Box<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    artifact: Option<String>,
    tier: Option<Tier>,
    hint: Option<String>,
    retry_after: Option<Duration>,
    transient: bool,
    superseded: bool,
    throttled: bool,
    cause: Option<Arc<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// A failure of `kind`, described in one line without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: printable::line(&message.into()).into_owned(),
            artifact: None,
            tier: None,
            hint: None,
            retry_after: None,
            transient: false,
            superseded: false,
            throttled: false,
            cause: None,
        }))
    }

    /// [`ErrorKind::Invalid`] with `message`.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// [`ErrorKind::NotFound`] with `message`.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// [`ErrorKind::Corrupt`] with `message`.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// [`ErrorKind::Unavailable`] with `message`, worth trying again.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let mut error = Self::new(ErrorKind::Unavailable, message);
        error.0.transient = true;
        error
    }

    /// Names the artifact, unless an inner call already did.
    #[must_use]
    pub fn artifact(mut self, artifact: impl fmt::Display) -> Self {
        self.0.artifact.get_or_insert_with(|| printable::line(&artifact.to_string()).into_owned());
        self
    }

    /// Names the tier, unless an inner call already did.
    #[must_use]
    pub fn tier(mut self, tier: Tier) -> Self {
        self.0.tier.get_or_insert(tier);
        self
    }

    /// Names the tier, whatever an inner call said: the origin may be a bucket, too.
    #[must_use]
    pub(crate) fn of_tier(mut self, tier: Tier) -> Self {
        self.0.tier = Some(tier);
        self
    }

    /// Says what to do about it, unless an inner call already did.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| printable::line(&hint.into()).into_owned());
        self
    }

    /// Keeps the underlying failure.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<Cause>) -> Self {
        self.0.cause = Some(Arc::from(cause.into()));
        self
    }

    /// Marks the failure as worth (or not worth) trying again.
    #[must_use]
    pub fn transient(mut self, transient: bool) -> Self {
        self.0.transient = transient;
        self
    }

    /// The server asked to wait this long before the next attempt; implies that one makes sense.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after = Some(wait);
        self.0.transient = true;
        self
    }

    /// Marks the failure as one of a server that is asked too much.
    #[must_use]
    pub(crate) fn throttled(mut self) -> Self {
        self.0.throttled = true;
        self
    }

    /// Whether the server is asked too much: fewer requests at once would help.
    pub(crate) fn is_throttled(&self) -> bool {
        self.0.throttled
    }

    /// Marks the failure as one of a source whose place holds something else by now: resolving again may help, the
    /// same request never does.
    #[must_use]
    pub fn superseded(mut self) -> Self {
        (self.0.superseded, self.0.transient) = (true, false);
        self
    }

    /// Whether what was being read was replaced by something else at its place.
    pub fn is_superseded(&self) -> bool {
        self.0.superseded
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What failed, in one line, without artifact, tier and hint.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The message and the underlying failures, in one line.
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

    /// How to mend it, if anybody knows; where no inner call said so, what usually helps.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref().or_else(|| self.0.kind.usual_remedy())
    }

    /// The artifact it concerns, if one is known.
    pub fn artifact_name(&self) -> Option<&str> {
        self.0.artifact.as_deref()
    }

    /// The tier that failed, if one did.
    pub fn failed_tier(&self) -> Option<Tier> {
        self.0.tier
    }

    /// How long the server asked to wait.
    pub fn wait(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Whether the same request may succeed when sent again.
    pub fn is_transient(&self) -> bool {
        self.0.transient
    }
}

/// `what failed (artifact, tier): the underlying failure`; the hint is left to the door.
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

/// Names the artifact and tier on the way up: `disk.acquire(key).context(key, Tier::Disk)?`.
pub(crate) trait Context<T> {
    /// Adds whichever of artifact and tier is not named yet.
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
    fn the_innermost_context_wins() {
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
    fn what_usually_helps_never_hides_a_hint() {
        let bare = Error::unavailable("x");
        assert!(bare.hint_text().is_some_and(|hint| hint.contains("MODEL_CACHE_RETRY_DEADLINE")));
        assert_eq!(bare.hint("exact").hint_text(), Some("exact"));
        assert_eq!(Error::not_found("x").hint_text(), None);
    }
}
