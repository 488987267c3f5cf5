//! Options and reports of the operations of [`Cache`](super::Cache).
//!
//! Sizes are in bytes, and digests are SHA-256. The serialized form of a report is what `modelcache --json` prints
//! and what the Python package parses. `docs/json.md` is generated from the field names, types and comments here.

use crate::config::Extract;
use crate::digest::{Digest, GitOid, Provenance};
use crate::disk::{Destination, Holder, HubLayout, LeasedArtifact, Link, Materialized, Pin, Purpose, RunningFill};
use crate::error::Tier;
use crate::format::Format;
use crate::json;
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::manifest::Shape;
use crate::progress::Phase;
use crate::reference::Reference;
use crate::selection::Selection;
use serde::{Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Options of [`Cache::get`](super::Cache::get): which files to get, and from which tiers.
#[derive(Debug, Clone)]
pub struct GetOptions {
    /// The files to get. If the reference names one file, this must select all files.
    pub selection: Selection,
    /// Resolve a revision or tag again, even if the cached version is still fresh. If the authority (the origin of a
    /// revision, the remote for a tag) cannot be reached, the get fails.
    pub refresh: bool,
    /// The farthest tier that may be contacted. [`Tier::Remote`] excludes origins, and [`Tier::Disk`] excludes the
    /// remote as well. An origin that is a folder on this machine is read in either case.
    pub max_tier: Tier,
    /// Read files that are on disk already in full, and compare them with their digests, before they are leased.
    pub verify: bool,
    /// The intended use of downloaded files: to be read on this machine right after the get, or only to be kept.
    /// Determines whether they are written through the page cache.
    pub purpose: Purpose,
    /// Wait until the files are on stable storage, so that they survive a power cut.
    pub durable: bool,
    /// Whether an archive is extracted; `None` for the configured value.
    pub extract: Option<Extract>,
    /// The folder into which the artifact will be materialized. If that folder has no room, the get fails before it
    /// downloads anything.
    pub destination: Option<Destination>,
}

impl Default for GetOptions {
    fn default() -> Self {
        Self {
            selection: Selection::default(),
            refresh: false,
            max_tier: Tier::Origin,
            verify: false,
            purpose: Purpose::default(),
            durable: false,
            extract: None,
            destination: None,
        }
    }
}

/// A leased artifact. Its files are not evicted, and `path` stays valid, until this value is dropped.
#[derive(Debug)]
#[must_use = "the artifact is leased only while this value exists"]
pub struct Artifact {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The path of the file, if the artifact or the selection is a single file; otherwise the path of the folder.
    pub path: PathBuf,
    /// The Hugging Face cache with the files, if they were requested in that layout. `path` is in it.
    pub hub: Option<HubLayout>,
    /// The sources of the bytes, and the time spent.
    pub report: GetReport,
    /// The files that were requested.
    pub(super) selection: Selection,
    /// The lease on the local files.
    pub(super) lease: Arc<LeasedArtifact>,
}

impl Artifact {
    /// Returns the report with the key and the path of the artifact, to be serialized.
    pub fn answer(&self) -> GetAnswer<'_> {
        GetAnswer { key: &self.key, path: &self.path, hub: self.hub.as_ref(), report: &self.report, into: None }
    }
}

/// The serialized form of a completed get.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetAnswer<'a> {
    /// The key of the artifact.
    #[serde(flatten)]
    pub key: &'a ArtifactKey,
    /// The path of the file, if the artifact or the selection is a single file; otherwise the path of the folder.
    #[serde(serialize_with = "json::path")]
    pub path: &'a Path,
    /// The Hugging Face cache with the files. Absent unless the files were requested in that layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hub: Option<&'a HubLayout>,
    /// The sources of the bytes, and the time spent.
    #[serde(flatten)]
    pub report: &'a GetReport,
    /// The folder that the files were also put into. Absent if none was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub into: Option<&'a Materialized>,
}

/// Report of [`Cache::get`](super::Cache::get).
#[derive(Debug, Clone, Serialize)]
pub struct GetReport {
    /// The farthest tier that supplied bytes; `disk` for a hit.
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
    #[serde(rename = "size")]
    pub selected_bytes: u64,
    /// How the files share disk space with the blobs of the cache. If files differ, the way that takes the most space
    /// or time: `copy`, else `symlink`, else `reflink`, else `hard`. `None` for a hit.
    pub link: Option<Link>,
    /// Time spent in each phase.
    #[serde(rename = "seconds", serialize_with = "phases")]
    pub phases: BTreeMap<Phase, Duration>,
    /// The duration of the whole get.
    #[serde(rename = "total_seconds", serialize_with = "json::seconds")]
    pub took: Duration,
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
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// The selected files.
    pub files: Vec<PlannedFile>,
    /// Bytes of the selected files by the tier that would supply them.
    pub bytes: BytesByTier,
}

impl GetPlan {
    /// Returns a plan with the sum of the sizes by tier.
    pub fn new(key: ArtifactKey, files: Vec<PlannedFile>) -> Self {
        let mut bytes = BytesByTier::default();
        for file in &files {
            *match file.from {
                Tier::Disk => &mut bytes.disk,
                Tier::Remote => &mut bytes.remote,
                Tier::Origin => &mut bytes.origin,
            } += file.size;
        }
        Self { key, files, bytes }
    }
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
    /// True if an artifact earlier in the list has some of the same missing files. If this one is filled after it, the
    /// shared files are downloaded once.
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
    /// Leave out files of a folder that match one of these patterns, which are those of
    /// [`Selection`](crate::Selection).
    pub exclude: Vec<String>,
    /// Publish what symbolic links to files and folders outside the folder point to, instead of refusing such links.
    pub follow_links: bool,
    /// Point this tag to the version after it is published, as [`Cache::tag`](super::Cache::tag) does. A tag that
    /// cannot be set is refused before anything is published.
    pub tag: Option<Version>,
}

/// Report of [`Cache::put`](super::Cache::put).
#[derive(Debug, Clone, Serialize)]
pub struct PutReport {
    /// The key of the artifact.
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// The file or folder in the local directory; `None` if it was published on the remote only.
    #[serde(serialize_with = "json::optional_path")]
    pub path: Option<PathBuf>,
    /// Number of published files.
    pub files: usize,
    /// Total size of the published files in bytes.
    #[serde(rename = "size")]
    pub bytes: u64,
    /// Bytes uploaded to the remote. 0 if it already had them, or if no remote is configured.
    pub uploaded_bytes: u64,
    /// Bytes that the object store copied from other versions of the name, so that they needed no upload.
    pub copied_bytes: u64,
    /// True if a remote is configured, which now has the artifact.
    pub on_remote: bool,
    /// SHA-256 of the file, or of the file list of a tree.
    pub sha256: Digest,
    /// Time spent in each phase.
    #[serde(rename = "seconds", serialize_with = "phases")]
    pub phases: BTreeMap<Phase, Duration>,
    /// The duration of the whole put.
    #[serde(rename = "total_seconds", serialize_with = "json::seconds")]
    pub took: Duration,
    /// The tag that was set, if one was requested.
    #[serde(serialize_with = "tag_name")]
    pub tag: Option<TagReport>,
}

/// A pending upload: files of one artifact that one remote still lacks, or that are kept on this disk only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PendingBackfill {
    /// The key of the artifact.
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// The reference to the artifact.
    pub reference: String,
    /// The address of the remote; `None` if the artifact was put while no remote was configured.
    pub remote: Option<String>,
    /// Number of missing files.
    pub files: usize,
    /// Total size in bytes of those that are on this disk.
    #[serde(rename = "size")]
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

/// Report of [`Cache::evict`](super::Cache::evict).
#[derive(Debug, Clone, Serialize)]
pub struct EvictReport {
    /// The key of the artifact.
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// True if nothing was removed, and the report states what would be removed.
    pub dry_run: bool,
    /// Bytes freed on the disk; `None` if the artifact was not there or the disk was not selected.
    pub disk_bytes: Option<u64>,
    /// Bytes of its files on disk that stay, because other artifacts, or links outside the cache, use them.
    pub shared_bytes: u64,
    /// Bytes removed from the remote; `None` if the artifact was not there or the remote was not selected.
    pub remote_bytes: Option<u64>,
    /// The address of the remote from which it was removed; `None` if nothing was removed there.
    pub remote: Option<String>,
    /// True if the copy on disk is removed and no other tier is known to have the artifact. This is the case if it was
    /// put without a remote, or if its upload is pending and its origin does not keep old versions.
    pub only_copy: bool,
    /// True if a later get can fetch the artifact again, from an origin or from unmanaged objects that stay on the
    /// remote.
    pub can_be_fetched_again: bool,
    /// The tags that point to the artifact and are removed with it. Empty if only the disk was selected.
    pub tags: Vec<String>,
}

/// Result of [`Cache::resolve_reference`](super::Cache::resolve_reference): a reference resolved to an immutable
/// version.
#[derive(Debug, Clone, Serialize)]
#[serde(into = "ResolvedReferenceJson")]
pub struct ResolvedReference {
    /// A reference that always resolves to this version.
    pub reference: Reference,
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The revision or tag that was resolved; `None` if the reference names a version.
    pub revision: Option<String>,
    /// SHA-256 of the file, or of the file list of a tree, if the disk or the remote knows it.
    pub sha256: Option<Digest>,
    /// The tier that resolved the reference; `None` if no tier had to be consulted.
    pub from: Option<Tier>,
    /// The time since the revision or tag was resolved; `None` if the reference names a version.
    pub age: Option<Duration>,
}

impl ResolvedReference {
    /// Returns the reference with its digest, if that is known.
    pub fn with_digest(&self) -> Option<Reference> {
        self.sha256.map(|sha256| Reference { digest: Some(sha256), ..self.reference.clone() })
    }
}

/// The serialized form of [`ResolvedReference`].
#[derive(Serialize)]
struct ResolvedReferenceJson {
    /// The key of the artifact.
    #[serde(flatten)]
    artifact: ArtifactKey,
    /// `NAME@VERSION` of the artifact.
    key: String,
    /// A reference that always resolves to this version.
    pinned: String,
    /// `pinned` with `#sha256=…` appended; `None` if the digest is unknown.
    pinned_with_digest: Option<String>,
    /// The revision or tag that was resolved; `None` if the reference names a version.
    revision: Option<String>,
    /// SHA-256 of the file, or of the file list of a tree, if the disk or the remote knows it.
    sha256: Option<Digest>,
    /// The tier that resolved the reference; `None` if no tier had to be consulted.
    from: Option<Tier>,
    /// The time since the revision or tag was resolved, in whole seconds; `None` if it is unknown or the reference
    /// names a version.
    age_seconds: Option<u64>,
}

impl From<ResolvedReference> for ResolvedReferenceJson {
    fn from(pinned: ResolvedReference) -> Self {
        Self {
            key: pinned.key.to_string(),
            pinned: pinned.reference.to_string(),
            pinned_with_digest: pinned.with_digest().map(|reference| reference.to_string()),
            revision: pinned.revision,
            sha256: pinned.sha256,
            from: pinned.from,
            // `Duration::MAX` stands for an unknown time.
            age_seconds: pinned.age.filter(|age| *age < Duration::MAX).map(|age| age.as_secs()),
            artifact: pinned.key,
        }
    }
}

/// Report of [`Cache::tag`](super::Cache::tag) and [`Cache::untag`](super::Cache::untag).
#[derive(Debug, Clone, Serialize)]
pub struct TagReport {
    /// The artifact name that the tag belongs to.
    pub name: ArtifactName,
    /// The tag.
    pub tag: Version,
    /// The version that the tag pointed to before; `None` if the tag is new.
    pub from: Option<Version>,
    /// The version that the tag points to now; `None` if the tag was removed.
    pub to: Option<Version>,
    /// SHA-256 of the file, or of the file list of a tree, in version `to`, if it is known.
    pub sha256: Option<Digest>,
}

/// Report of [`Cache::pin`](super::Cache::pin) and [`Cache::unpin`](super::Cache::unpin).
#[derive(Debug, Clone, Serialize)]
pub struct PinReport {
    /// The key of the artifact.
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// The pin that was set or removed; `None` if there was none to remove.
    #[serde(serialize_with = "pin")]
    pub pin: Option<Pin>,
}

/// Result of [`Cache::survey_remote`](super::Cache::survey_remote).
#[derive(Debug, Clone, Default)]
pub struct RemoteSurvey {
    /// The published artifacts, sorted by key.
    pub artifacts: Vec<ListedArtifact>,
    /// The number of artifacts that were published under a longer prefix than that of the remote's address, keyed by
    /// the part of the prefix that the address lacks.
    pub longer_prefixes: BTreeMap<String, usize>,
    /// The folders, directly below the remote's prefix, in which other tools put objects.
    pub unmanaged_folders: BTreeSet<String>,
}

/// One artifact in a list of [`Cache::list`](super::Cache::list) or [`Cache::list_remote`](super::Cache::list_remote).
#[derive(Debug, Clone, Serialize)]
pub struct ListedArtifact {
    /// The key of the artifact.
    #[serde(flatten)]
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
    #[serde(rename = "size")]
    pub bytes: u64,
    /// The detected formats of the files.
    pub formats: BTreeSet<String>,
    /// Time of last use (disk only).
    #[serde(serialize_with = "json::time")]
    pub last_used: Option<SystemTime>,
    /// True if a process holds a lease on the artifact (disk only).
    pub leased: bool,
    /// The pin on the artifact (disk only).
    #[serde(serialize_with = "pin")]
    pub pin: Option<Pin>,
    /// The tags that point to the artifact (remote only).
    pub tags: Vec<String>,
}

/// Result of [`Cache::inspect`](super::Cache::inspect): one artifact as the disk, the lower directory and the remote
/// record it.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The key of the artifact.
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// The reference to the artifact.
    pub reference: String,
    /// Whether the artifact is one file or a tree.
    pub shape: Shape,
    /// The path that a get would return; `None` if no file of the artifact is on disk.
    #[serde(serialize_with = "json::optional_path")]
    pub path: Option<PathBuf>,
    /// SHA-256 of the file, or of the file list of a tree; `None` until all digests are known.
    pub sha256: Option<Digest>,
    /// True if there is a manifest on disk.
    pub known_on_disk: bool,
    /// True if there is a manifest in the lower directory.
    pub known_in_lower: bool,
    /// True if there is a manifest on the remote, and it could be read.
    pub known_on_remote: bool,
    /// The reason why the manifest on the remote could not be read; `None` if it could.
    pub remote_error: Option<String>,
    /// Time of last use.
    #[serde(serialize_with = "json::time")]
    pub last_used: Option<SystemTime>,
    /// True if a process holds a lease on the artifact.
    pub leased: bool,
    /// The processes that hold a lease, as far as this process can see them.
    pub holders: Vec<Holder>,
    /// The pin on the artifact.
    #[serde(serialize_with = "pin")]
    pub pin: Option<Pin>,
    /// The files that any of the manifests lists, by path.
    pub files: Vec<InspectedFile>,
}

/// One file of an [`Inspection`]: what the manifests on disk, in the lower directory and on the remote, in this order,
/// know about it.
#[derive(Debug, Clone, Serialize)]
pub struct InspectedFile {
    /// The path of the file in the artifact.
    pub path: FilePath,
    /// The size of the file in bytes.
    pub size: u64,
    /// SHA-256 of the file, if it is known.
    pub sha256: Option<Digest>,
    /// The git object id of the file, which the Hub publishes for small files.
    pub git_oid: Option<GitOid>,
    /// The source of the digest.
    pub provenance: Option<Provenance>,
    /// The format, if it was detected.
    pub format: Option<String>,
    /// True if the file is on disk.
    pub on_disk: bool,
    /// True if the file is in the lower directory.
    pub in_lower: bool,
    /// True if the file is on the remote.
    pub on_remote: bool,
}

/// One in-flight fill, as [`Cache::fills`](super::Cache::fills) returns it.
#[derive(Debug, Clone, Serialize)]
pub struct FillStatus {
    /// The key of the artifact.
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// The reference to the artifact.
    pub reference: String,
    /// The present phase.
    pub phase: Phase,
    /// Bytes of this phase that are done.
    pub done_bytes: u64,
    /// Total bytes of this phase; `None` while they are unknown.
    pub total_bytes: Option<u64>,
    /// Bytes received from the remote so far.
    pub remote_bytes: u64,
    /// Bytes received from origins so far.
    pub origin_bytes: u64,
    /// Time since the fill started.
    #[serde(rename = "seconds", serialize_with = "json::seconds")]
    pub running_for: Duration,
    /// Number of requests that failed and were sent again.
    pub retries: u64,
    /// The error of the last failed request; `None` if bytes have arrived since.
    pub last_error: Option<String>,
}

/// Result of [`Cache::stats`](super::Cache::stats): content and disk usage of the local directory.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// The local directory.
    #[serde(serialize_with = "json::path")]
    pub dir: PathBuf,
    /// The read-only lower directory, if one is configured.
    #[serde(serialize_with = "json::optional_path")]
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
    /// Bytes of complete parts of abandoned fills, from which a later get resumes. The files of a fill take their full
    /// size from the beginning, so `staging_bytes` is larger.
    pub resumable_bytes: u64,
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

/// Result of [`Cache::activity`](super::Cache::activity): the local directory, and what all processes do with it at the
/// moment.
#[derive(Debug, Clone)]
pub struct Activity {
    /// Content and disk usage.
    pub stats: Stats,
    /// The running fills, sorted by reference.
    pub fills: Vec<RunningFill>,
    /// The artifacts with a lease, sorted by reference.
    pub leased: Vec<LeasedReference>,
}

/// An artifact with a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeasedReference {
    /// The reference to the artifact.
    pub reference: String,
    /// The processes that hold a lease, as far as this process can see them.
    pub holders: Vec<Holder>,
}

/// The serialized form of a [`Pin`].
#[derive(Serialize)]
struct PinJson<'a> {
    /// When the pin was set, if that was recorded.
    #[serde(serialize_with = "json::time")]
    since: Option<SystemTime>,
    /// When the pin expires; `None` if it does not expire.
    #[serde(serialize_with = "json::time")]
    until: Option<SystemTime>,
    /// The user and host that set the pin, if they were recorded.
    by: Option<&'a str>,
    /// The reason, in free text.
    reason: Option<&'a str>,
}

/// Serializes a pin with its times as RFC 3339. The derived form of [`Pin`] is that of the pin file.
fn pin<S: Serializer>(pin: &Option<Pin>, serializer: S) -> Result<S::Ok, S::Error> {
    let form = pin.as_ref().map(|pin| PinJson {
        since: pin.since(),
        until: pin.until(),
        by: pin.by.as_deref(),
        reason: pin.reason.as_deref(),
    });
    form.serialize(serializer)
}

/// Serializes the time of each phase as a number of seconds.
fn phases<S: Serializer>(phases: &BTreeMap<Phase, Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(phases.iter().map(|(phase, spent)| (phase.name(), spent.as_secs_f64())))
}

/// Serializes the name of the tag.
fn tag_name<S: Serializer>(tagged: &Option<TagReport>, serializer: S) -> Result<S::Ok, S::Error> {
    tagged.as_ref().map(|tagged| &tagged.tag).serialize(serializer)
}
