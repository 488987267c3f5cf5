//! Alarms: one version, two digests.
//!
//! A version never changes, so a digest that does is a mistake or an attack, and never passes in silence. Each alarm is
//! one log line at error level that names both digests and what to do. The origin is believed before the remote, the
//! remote before a tag that was set earlier; what disk has and its authority contradicts is not lent.

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Tier};
use crate::key::{ArtifactKey, Version};

/// The content of a tag's version is not that which was tagged. It is what the remote has now, so it is used.
pub(super) fn retagged(key: &ArtifactKey, tag: &Version, tag_record: Digest, found: Digest) {
    tracing::error!(
        %key, %tag, %tag_record, %found,
        "the content of a version changed after it was tagged: somebody replaced it (put --force), or tampered with it; \
         `modelcache tag {key} {tag}` accepts what is there now, another version rolls back"
    );
}

/// Disk has other content under the key than `tagged`, which is what the remote has.
pub(super) fn outdated_here(key: &ArtifactKey, tag: &Version, tag_record: Digest, found: Digest) -> Error {
    let hint = format!("`modelcache evict {key} --tier disk` removes this disk's copy; then get it again");
    tracing::error!(
        %key, %tag, %tag_record, %found, hint,
        "this disk has other content under a version than the tag means: the version was replaced, or tampered with"
    );
    Error::corrupt(format!("this disk has sha256 {found}, but the tag {tag} means {tag_record}"))
        .tier(Tier::Disk)
        .hint(hint)
}

/// Disk and the origin contradict each other about one version; `contradiction` says how.
pub(super) fn disk_contradicts_origin(key: &ArtifactKey, contradiction: &Error) -> Error {
    let hint = format!(
        "`modelcache verify {key}` says what is on disk; `modelcache evict {key} --tier disk` removes it, then get it again"
    );
    let what = contradiction.message();
    tracing::error!(%key, what, hint, "what this disk has of a version contradicts its origin; it is not used");
    Error::new(ErrorKind::Corrupt, format!("what this disk has contradicts the origin: {what}"))
        .tier(Tier::Disk)
        .hint(hint)
}

/// The remote contradicts the origin, or what disk has from there: it is left out.
pub(super) fn remote_contradicts(key: &ArtifactKey, contradiction: &Error) {
    let hint = format!(
        "find out who wrote it; `modelcache evict {key} --tier remote --yes` removes it, and the next get writes it anew"
    );
    tracing::error!(
        %key, what = contradiction.message(), hint,
        "the remote contradicts the origin (or this disk) and is not used: it may have been tampered with"
    );
}
