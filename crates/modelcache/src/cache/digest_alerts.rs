//! Alerts for a version that has two different digests.
//!
//! A version is immutable, so a changed digest is a mistake or an attack. Each alert is one log line at error level,
//! with both digests and the remedy. The origin takes precedence over the remote, and the remote over the digest
//! recorded in a tag. Local files that contradict their authority are not leased.

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Tier};
use crate::key::{ArtifactKey, Version};
use crate::option_name::call::FORCE;

/// Logs that a version has other content than when it was tagged. The content on the remote takes precedence, so the
/// get continues with it.
pub(super) fn changed_after_tagging(key: &ArtifactKey, tag: &Version, tagged: Digest, found: Digest) {
    tracing::error!(
        %key, %tag, %tagged, %found,
        "the content of a version changed after it was tagged: it was replaced (put with {FORCE}) or tampered with; \
         `modelcache tag {key} {tag}` accepts the present content, tagging another version rolls back"
    );
}

/// Logs that the content of a version on disk differs from the content that was tagged, and from the content on the
/// remote. Returns the error of the get.
pub(super) fn outdated_on_disk(key: &ArtifactKey, tag: &Version, tagged: Digest, found: Digest) -> Error {
    let hint = format!("`modelcache evict {key} --tier disk` removes this disk's copy; then get it again");
    tracing::error!(
        %key, %tag, %tagged, %found, hint,
        "the content of a version on this disk is not the content that was tagged: it was replaced or tampered with"
    );
    Error::corrupt(format!("this disk has sha256 {found}, but the tag {tag} was set on sha256 {tagged}"))
        .tier(Tier::Disk)
        .hint(hint)
}

/// Logs that the disk contradicts the origin. `contradiction` describes the difference. Returns the error of the get.
pub(super) fn disk_contradicts_origin(key: &ArtifactKey, contradiction: &Error) -> Error {
    let hint = format!(
        "`modelcache verify {key}` checks the local files; `modelcache evict {key} --tier disk` removes them, then get \
         the artifact again"
    );
    let what = contradiction.message();
    tracing::error!(%key, what, hint, "the files of a version on this disk contradict its origin and are not used");
    Error::new(ErrorKind::Corrupt, format!("the files on this disk contradict the origin: {what}"))
        .tier(Tier::Disk)
        .hint(hint)
}

/// Logs that the remote contradicts the origin or the files on this disk. The get continues without the remote.
pub(super) fn remote_contradicts(key: &ArtifactKey, contradiction: &Error) {
    let hint = format!(
        "find out which writer put this content there; `modelcache evict {key} --tier remote --yes` removes it, and \
         the next get uploads the artifact again"
    );
    tracing::error!(
        %key, what = contradiction.message(), hint,
        "the remote contradicts the origin (or this disk) and is not used: it may have been tampered with"
    );
}
