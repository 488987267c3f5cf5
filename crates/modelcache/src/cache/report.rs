//! What callers ask for and what they are told: options and reports of every verb.

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

/// What `get` shall fetch.
#[derive(Debug, Clone)]
pub struct GetOptions {
    /// Which files. A reference that names one file overrules it.
    pub selection: Selection,
    /// Ask what a revision or tag means, however fresh the last answer is; not being able to ask is then a failure.
    pub refresh: bool,
    /// The farthest tier that may be asked: `Remote` asks no origin, `Disk` nobody at all. An origin that is a folder
    /// of this machine is read all the same.
    pub max_tier: Tier,
    /// Whether what is here already is read in full and compared with its digests before it is lent.
    pub verify: bool,
    /// What for, if it has to be fetched: to be read here right after, or to be kept.
    pub purpose: Purpose,
    /// Whether to wait until what is lent survives a power cut.
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

/// A lent artifact: its path stays valid while this value lives.
#[derive(Debug)]
pub struct Artifact {
    /// What it is.
    pub key: ArtifactKey,
    /// The file, or the folder of the tree.
    pub path: PathBuf,
    /// How it came here.
    pub report: GetReport,
    /// Which of its files were got.
    pub(super) selection: Selection,
    /// Keeps the lease.
    pub(super) _lent: Arc<LeasedArtifact>,
}

/// How an artifact came here.
#[derive(Debug, Clone, Serialize)]
pub struct GetReport {
    /// The farthest tier that bytes came from; `disk` for a hit.
    pub from: Tier,
    /// Bytes by tier: reused from disk, received from the remote, received from an origin.
    pub bytes: BytesByTier,
    /// Bytes sent to the remote.
    pub backfilled_bytes: u64,
    /// Bytes that the remote's server copied from other versions instead.
    pub copied_bytes: u64,
    /// Files selected.
    pub files: usize,
    /// Bytes selected.
    pub selected_bytes: u64,
    /// How the files share their bytes with other artifacts, of several ways the one that costs most; `None` for a hit.
    pub link: Option<Link>,
    /// Time by phase.
    pub phases: BTreeMap<Phase, Duration>,
}

/// Bytes by the tier they came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BytesByTier {
    /// Already in the local directory.
    pub disk: u64,
    /// Received from the remote.
    pub remote: u64,
    /// Received from an origin.
    pub origin: u64,
}

/// What a get would do (`--dry-run`).
#[derive(Debug, Clone, Serialize)]
pub struct GetPlan {
    /// What it is.
    pub key: ArtifactKey,
    /// Every selected file: its size, and the tier it would come from.
    pub files: Vec<PlannedFile>,
}

/// One file of a [`GetPlan`].
#[derive(Debug, Clone, Serialize)]
pub struct PlannedFile {
    /// Which file.
    pub path: FilePath,
    /// Bytes.
    pub size: u64,
    /// Where it would come from.
    pub from: Tier,
}

/// What a prewarm would do.
#[derive(Debug)]
pub struct PrewarmPlan {
    /// Every reference's artifact, in the order given, or why there is none.
    pub artifacts: Vec<crate::Result<PlannedPrewarm>>,
    /// Bytes on disk of the whole list; equal files count once.
    pub list_bytes: u64,
    /// Those that are not there yet.
    pub missing_bytes: u64,
}

/// One artifact of a [`PrewarmPlan`].
#[derive(Debug, Clone)]
pub struct PlannedPrewarm {
    /// What it is.
    pub key: ArtifactKey,
    /// Whether everything wanted of it is on disk.
    pub is_local: bool,
    /// Whether it shares missing files with one before it, and is to be filled after that one: they come once then.
    pub shares: bool,
}

/// Where `put` shall publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PutTier {
    /// Disk and, where there is one, the remote.
    #[default]
    All,
    /// The remote only: nothing is copied to disk.
    Remote,
}

/// How `put` shall publish.
#[derive(Debug, Clone, Default)]
pub struct PutOptions {
    /// Replace other content under the same key; write equal content to the remote anew.
    pub force: bool,
    /// Where.
    pub tier: PutTier,
    /// Refuse what is of another format.
    pub expect: Option<Format>,
    /// Write `<file>.sha256` beside every object on the remote.
    pub sidecars: bool,
}

/// What `put` did.
#[derive(Debug, Clone, Serialize)]
pub struct PutReport {
    /// What it is.
    pub key: ArtifactKey,
    /// The file or folder in the local directory; `None` if it went to the remote only.
    pub path: Option<PathBuf>,
    /// Files published.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes sent to the remote; 0 if it already held them or there is none.
    pub uploaded_bytes: u64,
    /// Bytes that the remote's server copied from other versions of the name.
    pub copied_bytes: u64,
    /// Whether there is a remote that now holds it.
    pub on_remote: bool,
    /// Digest of the file, or of the file list of a tree.
    pub sha256: crate::digest::Digest,
    /// Time by phase.
    pub phases: BTreeMap<Phase, Duration>,
}

/// What still has to reach a remote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PendingBackfill {
    /// What it is.
    pub key: ArtifactKey,
    /// The remote's address.
    pub remote: String,
    /// Files.
    pub files: usize,
    /// Their bytes, as far as they are on disk.
    pub bytes: u64,
}

/// What became of what still had to reach the remote.
#[derive(Debug, Default)]
pub struct BackfillReport {
    /// Artifacts that the remote has now.
    pub done: Vec<ArtifactKey>,
    /// Bytes sent.
    pub uploaded_bytes: u64,
    /// Bytes that the remote's server copied.
    pub copied_bytes: u64,
    /// Artifacts that another process is uploading, or still filling.
    pub busy: Vec<ArtifactKey>,
    /// Artifacts that are not tried again, and why.
    pub dropped: Vec<(ArtifactKey, crate::Error)>,
    /// Artifacts that stay for a later run, and why.
    pub failed: Vec<(ArtifactKey, crate::Error)>,
}

/// Where `evict` shall remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EvictTier {
    /// Disk and remote.
    #[default]
    All,
    /// The local directory only.
    Disk,
    /// The remote only.
    Remote,
}

/// What `evict` removed, or would remove.
#[derive(Debug, Clone, Serialize)]
pub struct EvictReport {
    /// What it is.
    pub key: ArtifactKey,
    /// Bytes freed on disk; `None` if it was not there or not asked for.
    pub disk_bytes: Option<u64>,
    /// Bytes removed from the remote; `None` if it was not there or not asked for.
    pub remote_bytes: Option<u64>,
    /// Whether an origin could give it back.
    pub origin_can_give_back: bool,
    /// Tags on the remote that point to it and go with it; none where only disk is asked for.
    pub tags: Vec<String>,
}

/// What a reference means now (`resolve`).
#[derive(Debug, Clone)]
pub struct Pinned {
    /// The reference that means this, and nothing else, from now on.
    pub reference: crate::Reference,
    /// The artifact that it leads to.
    pub key: ArtifactKey,
    /// The revision or tag that was resolved, if it was one.
    pub revision: Option<String>,
    /// Digest of the file, or of the file list of a tree, as far as disk or remote know it.
    pub sha256: Option<crate::digest::Digest>,
    /// The tier that gave the answer; `None` where the reference itself decides.
    pub from: Option<Tier>,
    /// How old the answer is; `None` where it cannot grow old.
    pub age: Option<Duration>,
}

/// What `tag` did.
#[derive(Debug, Clone, Serialize)]
pub struct TagReport {
    /// Whose tag.
    pub name: crate::key::ArtifactName,
    /// The tag.
    pub tag: Version,
    /// What it meant before, if there was one.
    pub from: Option<Version>,
    /// What it means now; `None`: it is gone.
    pub to: Option<Version>,
    /// Digest of the file, or of the file list, that it means now, if it is known.
    pub sha256: Option<crate::digest::Digest>,
}

/// What `pin` set, or what `unpin` took off.
#[derive(Debug, Clone, Serialize)]
pub struct PinReport {
    /// What it is.
    pub key: ArtifactKey,
    /// The pin; `None` if there was none to take off.
    pub pin: Option<Pin>,
}

/// One artifact as `ls` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// What it is.
    pub key: ArtifactKey,
    /// The reference that leads to it.
    pub reference: String,
    /// One file or a tree.
    pub shape: Shape,
    /// Files held, of all files.
    pub held_files: usize,
    /// All files.
    pub files: usize,
    /// Bytes held, of all bytes.
    pub held_bytes: u64,
    /// All bytes.
    pub bytes: u64,
    /// The formats of its files, as far as they were told.
    pub formats: BTreeSet<String>,
    /// When it was last used (disk only).
    pub last_used: Option<SystemTime>,
    /// Whether somebody holds it (disk only).
    pub leased: bool,
    /// The pin on it (disk only).
    pub pin: Option<Pin>,
    /// The tags that point to it (remote only).
    pub tags: Vec<String>,
}

/// Everything known of one artifact (`inspect`).
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// What it is.
    pub key: ArtifactKey,
    /// One file or a tree.
    pub shape: Shape,
    /// The path that `get` would lend; `None` if it is not on disk.
    pub path: Option<PathBuf>,
    /// Digest of the file, or of the file list, once every digest is known.
    pub sha256: Option<crate::digest::Digest>,
    /// Files as disk knows them; `None` if disk does not know the artifact.
    pub disk: Option<Files>,
    /// Files as the remote knows them; `None` if it does not, or was not reachable.
    pub remote: Option<Files>,
    /// Why the remote could not be asked, if it could not.
    pub remote_error: Option<String>,
    /// Files as the lower directory knows them; `None` if it does not know the artifact, or there is none.
    pub lower: Option<Files>,
    /// When it was last used.
    pub last_used: Option<SystemTime>,
    /// Whether somebody holds it.
    pub leased: bool,
    /// Who, as far as this process can see.
    pub holders: Vec<Holder>,
    /// The pin on it.
    pub pin: Option<Pin>,
}

/// The state of the local directory (`stats`).
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// The local directory.
    pub dir: PathBuf,
    /// The directory underneath that is only read, if there is one.
    pub lower_dir: Option<PathBuf>,
    /// Artifacts in that one; 0 without one.
    pub lower_artifacts: usize,
    /// Artifacts on disk.
    pub artifacts: usize,
    /// Files they hold.
    pub files: usize,
    /// Artifacts that somebody holds now.
    pub leases: usize,
    /// Artifacts that are pinned.
    pub pins: usize,
    /// The budget, in bytes.
    pub budget_bytes: u64,
    /// What counts against it: blobs, staging, quarantine, reservations.
    pub used_bytes: u64,
    /// Of those: fills in progress or abandoned.
    pub staging_bytes: u64,
    /// Of those: what failed a check.
    pub quarantine_bytes: u64,
    /// Free on the filesystem.
    pub filesystem_free_bytes: u64,
    /// Bytes that are always left free.
    pub min_free_bytes: u64,
    /// Artifacts that still have to reach a remote.
    pub pending_backfills: usize,
    /// Their bytes.
    pub pending_backfill_bytes: u64,
    /// The remote's address, if there is one.
    pub remote: Option<String>,
}
