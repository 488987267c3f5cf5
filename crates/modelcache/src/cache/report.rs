//! Options and reports of the operations of [`Cache`](super::Cache).
//!
//! Sizes are in bytes, and digests are SHA-256.

use crate::disk::{Holder, LeasedArtifact, Link, Pin, Purpose};
use crate::error::Tier;
use crate::format::Format;
use crate::key::{ArtifactKey, FilePath, Version};
use crate::manifest::{Files, Shape};
use crate::progress::Phase;
use crate::selection::Selection;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Options of [`Cache::get`](super::Cache::get): which files to get, and from which tiers.
#[derive(Debug, Clone)]
pub struct GetOptions {
    /// The files to get. If the reference names one file, this must select all files.
    pub selection: Selection,
    /// Resolve a revision or tag again, even if the last answer is still fresh. If its authority (the origin of a
    /// revision, the remote for a tag) cannot be reached, the get fails.
    pub refresh: bool,
    /// The farthest tier that may be contacted. [`Tier::Remote`] excludes origins, and [`Tier::Disk`] excludes the
    /// remote as well. An origin that is a folder on this machine is read in either case.
    pub max_tier: Tier,
    /// Read files that are on disk already in full, and compare them with their digests, before they are leased.
    pub verify: bool,
    /// The intended use of downloaded files: read on this machine right after the get, or only kept. Determines whether
    /// they are written through the page cache.
    pub purpose: Purpose,
    /// Wait until the files are on stable storage, so that they survive a power cut.
    pub durable: bool,
}

impl Default for GetOptions {
    fn default() -> Self {
        let (purpose, durable) = (Purpose::default(), false);
        Self {
            selection: Selection::default(),
            refresh: false,
            max_tier: Tier::Origin,
            verify: false,
            purpose,
            durable,
        }
    }
}

/// A leased artifact. Its files are not evicted, and `path` stays valid, until this value is dropped.
#[derive(Debug)]
#[must_use = "the artifact is leased only while this value lives"]
pub struct Artifact {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The path of the file, if the artifact or the selection is a single file; otherwise the path of the folder.
    pub path: PathBuf,
    /// The sources of the bytes, and the time spent.
    pub report: GetReport,
    /// The files that were requested.
    pub(super) selection: Selection,
    /// The lease on the local files.
    pub(super) lease: Arc<LeasedArtifact>,
}

/// Report of [`Cache::get`](super::Cache::get).
#[derive(Debug, Clone, Serialize)]
pub struct GetReport {
    /// The farthest tier that supplied bytes; [`Tier::Disk`] for a hit.
    pub from: Tier,
    /// Bytes by tier: reused from disk, received from the remote, received from an origin.
    pub bytes: BytesByTier,
    /// Bytes uploaded to the remote before the get returned.
    pub backfilled_bytes: u64,
    /// Bytes that the object store copied from other versions, so that they needed no upload.
    pub copied_bytes: u64,
    /// Number of selected files.
    pub files: usize,
    /// Total size of the selected files in bytes.
    pub selected_bytes: u64,
    /// How the files share disk space with the blobs of the cache; if files differ, the most expensive way. `None` for
    /// a hit.
    pub link: Option<Link>,
    /// Time spent in each phase.
    pub phases: BTreeMap<Phase, Duration>,
}

/// Number of bytes by the tier that supplied them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BytesByTier {
    /// Bytes that were in a local directory already.
    pub disk: u64,
    /// Bytes received from the remote.
    pub remote: u64,
    /// Bytes received from an origin.
    pub origin: u64,
}

/// Result of [`Cache::plan`](super::Cache::plan): the files that a get would lease, and their sources.
#[derive(Debug, Clone, Serialize)]
pub struct GetPlan {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The selected files.
    pub files: Vec<PlannedFile>,
}

/// One file of a [`GetPlan`].
#[derive(Debug, Clone, Serialize)]
pub struct PlannedFile {
    /// The path of the file in the artifact.
    pub path: FilePath,
    /// The size of the file in bytes.
    pub size: u64,
    /// The tier that would supply it.
    pub from: Tier,
}

/// Result of [`Cache::plan_prewarm`](super::Cache::plan_prewarm).
#[derive(Debug)]
pub struct PrewarmPlan {
    /// One entry for each reference, in the order of the references: the planned artifact, or the reason why it cannot
    /// be fetched.
    pub artifacts: Vec<crate::Result<PlannedPrewarm>>,
    /// Bytes on disk of all artifacts together. Files with equal content count once.
    pub list_bytes: u64,
    /// The part of `list_bytes` that is not on disk yet.
    pub missing_bytes: u64,
}

/// One artifact of a [`PrewarmPlan`].
#[derive(Debug, Clone)]
pub struct PlannedPrewarm {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// True if all selected files are on disk.
    pub is_local: bool,
    /// True if an artifact earlier in the list has some of the same missing files. Fill this one after it: the shared
    /// files are then downloaded once.
    pub shares: bool,
}

/// The tiers on which [`Cache::put`](super::Cache::put) publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PutTier {
    /// The disk and, if one is configured, the remote.
    #[default]
    All,
    /// The remote only. Nothing is copied to the local directory.
    Remote,
}

/// Options of [`Cache::put`](super::Cache::put).
#[derive(Debug, Clone, Default)]
pub struct PutOptions {
    /// Replace other content under the same key, and upload equal content again.
    pub force: bool,
    /// The tiers to publish on.
    pub tier: PutTier,
    /// Refuse files of any other format.
    pub expect: Option<Format>,
    /// Write `<file>.sha256` beside every object on the remote.
    pub sidecars: bool,
}

/// Report of [`Cache::put`](super::Cache::put).
#[derive(Debug, Clone, Serialize)]
pub struct PutReport {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The file or folder in the local directory; `None` if it was published on the remote only.
    pub path: Option<PathBuf>,
    /// Number of published files.
    pub files: usize,
    /// Total size of the published files in bytes.
    pub bytes: u64,
    /// Bytes uploaded to the remote. 0 if it already had them, or if no remote is configured.
    pub uploaded_bytes: u64,
    /// Bytes that the object store copied from other versions of the name, so that they needed no upload.
    pub copied_bytes: u64,
    /// True if a remote is configured, which now has the artifact.
    pub on_remote: bool,
    /// SHA-256 of the file, or of the file list of a tree.
    pub sha256: crate::digest::Digest,
    /// Time spent in each phase.
    pub phases: BTreeMap<Phase, Duration>,
}

/// A pending upload: files of one artifact that one remote still lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PendingBackfill {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The address of the remote.
    pub remote: String,
    /// Number of missing files.
    pub files: usize,
    /// Total size in bytes of those that are on this disk.
    pub bytes: u64,
}

/// Report of [`Cache::backfill_pending`](super::Cache::backfill_pending) and
/// [`Cache::finish_backfills`](super::Cache::finish_backfills).
#[derive(Debug, Default)]
pub struct BackfillReport {
    /// Artifacts that the remote now has.
    pub done: Vec<ArtifactKey>,
    /// Bytes uploaded.
    pub uploaded_bytes: u64,
    /// Bytes that the object store copied from other versions.
    pub copied_bytes: u64,
    /// Artifacts that another process is uploading or still filling.
    pub busy: Vec<ArtifactKey>,
    /// Artifacts that can never be uploaded, with the reason. Their pending uploads were removed.
    pub dropped: Vec<(ArtifactKey, crate::Error)>,
    /// Artifacts that could not be uploaded this time, with the reason. A later run tries again.
    pub failed: Vec<(ArtifactKey, crate::Error)>,
}

/// The tiers from which [`Cache::evict`](super::Cache::evict) removes an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EvictTier {
    /// The disk and the remote.
    #[default]
    All,
    /// The local directory only.
    Disk,
    /// The remote only.
    Remote,
}

/// Report of [`Cache::evict`](super::Cache::evict). Of a dry run, it states what would be removed.
#[derive(Debug, Clone, Serialize)]
pub struct EvictReport {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// Bytes removed from the disk; `None` if the artifact was not there or the disk was not selected.
    pub disk_bytes: Option<u64>,
    /// Bytes removed from the remote; `None` if the artifact was not there or the remote was not selected.
    pub remote_bytes: Option<u64>,
    /// True if a later get can fetch the artifact again, from an origin or from unmanaged objects that stay on the
    /// remote.
    pub origin_can_give_back: bool,
    /// The tags that point to the artifact and are removed with it. Empty if only the disk was selected.
    pub tags: Vec<String>,
}

/// Result of [`Cache::pinned`](super::Cache::pinned): a reference resolved to an immutable version.
#[derive(Debug, Clone)]
pub struct Pinned {
    /// The reference to exactly this version. It does not change its meaning.
    pub reference: crate::Reference,
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The revision or tag that was resolved; `None` if the reference names a version.
    pub revision: Option<String>,
    /// SHA-256 of the file, or of the file list of a tree, if the disk or the remote knows it.
    pub sha256: Option<crate::digest::Digest>,
    /// The tier that resolved the reference; `None` if no tier had to be consulted.
    pub from: Option<Tier>,
    /// The age of the answer; `None` if it cannot become outdated.
    pub age: Option<Duration>,
}

/// Report of [`Cache::tag`](super::Cache::tag) and [`Cache::untag`](super::Cache::untag).
#[derive(Debug, Clone, Serialize)]
pub struct TagReport {
    /// The artifact name that the tag belongs to.
    pub name: crate::key::ArtifactName,
    /// The tag.
    pub tag: Version,
    /// The version that the tag pointed to before; `None` if the tag is new.
    pub from: Option<Version>,
    /// The version that the tag points to now; `None` if the tag was removed.
    pub to: Option<Version>,
    /// SHA-256 of the file, or of the file list of a tree, in version `to`, if it is known.
    pub sha256: Option<crate::digest::Digest>,
}

/// Report of [`Cache::pin`](super::Cache::pin) and [`Cache::unpin`](super::Cache::unpin).
#[derive(Debug, Clone, Serialize)]
pub struct PinReport {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The pin that was set or removed; `None` if there was none to remove.
    pub pin: Option<Pin>,
}

/// One artifact in a list of [`Cache::list`](super::Cache::list) or [`Cache::list_remote`](super::Cache::list_remote).
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The reference to the artifact.
    pub reference: String,
    /// Whether the artifact is one file or a tree.
    pub shape: Shape,
    /// Number of files that the listed tier holds.
    pub held_files: usize,
    /// Number of all files of the artifact.
    pub files: usize,
    /// Total size in bytes of the files that the listed tier holds.
    pub held_bytes: u64,
    /// Total size in bytes of all files of the artifact.
    pub bytes: u64,
    /// The detected formats of the files.
    pub formats: BTreeSet<String>,
    /// Time of last use (disk only).
    pub last_used: Option<SystemTime>,
    /// True if a process holds a lease on the artifact (disk only).
    pub leased: bool,
    /// The pin on the artifact (disk only).
    pub pin: Option<Pin>,
    /// The tags that point to the artifact (remote only).
    pub tags: Vec<String>,
}

/// Result of [`Cache::inspect`](super::Cache::inspect): one artifact as the disk, the lower directory and the remote
/// record it.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// Whether the artifact is one file or a tree.
    pub shape: Shape,
    /// The path that a get would return; `None` if no file of the artifact is on disk.
    pub path: Option<PathBuf>,
    /// SHA-256 of the file, or of the file list of a tree; `None` until all digests are known.
    pub sha256: Option<crate::digest::Digest>,
    /// The files in the manifest on disk; `None` if there is no manifest.
    pub disk: Option<Files>,
    /// The files in the manifest on the remote; `None` if there is no manifest, or if it could not be read.
    pub remote: Option<Files>,
    /// The reason why the manifest on the remote could not be read; `None` if it could.
    pub remote_error: Option<String>,
    /// The files in the manifest in the lower directory; `None` if there is no manifest or no lower directory.
    pub lower: Option<Files>,
    /// Time of last use.
    pub last_used: Option<SystemTime>,
    /// True if a process holds a lease on the artifact.
    pub leased: bool,
    /// The processes that hold a lease, as far as this process can see them.
    pub holders: Vec<Holder>,
    /// The pin on the artifact.
    pub pin: Option<Pin>,
}

/// Result of [`Cache::stats`](super::Cache::stats): content and disk usage of the local directory.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// The local directory.
    pub dir: PathBuf,
    /// The read-only lower directory, if one is configured.
    pub lower_dir: Option<PathBuf>,
    /// Number of artifacts in the lower directory; 0 without one.
    pub lower_artifacts: usize,
    /// Number of artifacts on disk.
    pub artifacts: usize,
    /// Number of files on disk that belong to these artifacts.
    pub files: usize,
    /// Number of artifacts with a lease.
    pub leases: usize,
    /// Number of artifacts with a pin.
    pub pins: usize,
    /// The budget in bytes.
    pub budget_bytes: u64,
    /// Bytes that count against the budget: blobs, staging, quarantine, reservations.
    pub used_bytes: u64,
    /// The part of `used_bytes` that belongs to fills, running or abandoned.
    pub staging_bytes: u64,
    /// The part of `used_bytes` that failed verification and is in quarantine.
    pub quarantine_bytes: u64,
    /// Free bytes on the filesystem.
    pub filesystem_free_bytes: u64,
    /// Bytes on the filesystem that the cache leaves free.
    pub min_free_bytes: u64,
    /// Number of pending uploads.
    pub pending_backfills: usize,
    /// Total size in bytes of the files of pending uploads that are on this disk.
    pub pending_backfill_bytes: u64,
    /// The address of the remote, if one is configured.
    pub remote: Option<String>,
}
