//! The near tier: a local directory, shared by any number of processes without a daemon.
//!
//! # Contract
//! - The directory is the index: everything known is read from it, and losing this process loses nothing.
//! - A reader sees an artifact's old manifest or its new one; what a manifest calls held exists and is right, or lending
//!   finds out. Blobs are immutable; nothing is truncated or overwritten in place.
//! - Counted bytes stay within the budget: room is made before anything is written.
//! - Locks save bandwidth and protect leases; wrong bytes never come from a lock that failed.
//!
//! All functions here block on disk work; async callers use `spawn_blocking`. The layout and the order of steps are
//! written down in `docs/disk-format.md`.

mod acquire;
mod budget;
mod capacity;
mod change_log;
mod doctor;
mod fast_acquire;
mod files;
mod hashing;
mod holders;
mod index;
mod input;
mod io_error;
mod layout;
mod leader;
mod lease;
mod link;
mod lock;
mod lower;
mod manifest_cache;
mod materialize;
mod memory;
mod misplaced;
mod modes;
mod open_file;
mod ownership;
mod parts_journal;
mod pending_sync;
mod pending_upload;
mod pin;
mod prune;
mod publish;
mod refs;
mod rooted;
mod source;
mod staging;
mod sync;
mod verify;
mod write_mode;
mod writer;

pub(crate) use acquire::{AcquireOutcome, LeasedArtifact};
pub(crate) use budget::{Evicted, Usage};
pub(crate) use capacity::content_name;
pub(crate) use doctor::examine;
pub(crate) use files::identity;
pub(crate) use input::{Copying, InputFile, copy_input, format_named, format_of, hash_input, list_input};
pub(crate) use io_error::fault;
pub(crate) use layout::{ArtifactDir, Layout, staged_name};
pub(crate) use leader::{HEARTBEAT_INTERVAL, Leader, Leadership, Watch};
pub use link::Link;
pub(crate) use lock::FileLock;
pub(crate) use lower::Lower;
pub(crate) use materialize::Tree;
pub use materialize::{Destination, LinkMode, Materialized};
pub use misplaced::Misplaced;
pub use open_file::LocalFile;
pub(crate) use open_file::{open_staged, read_ahead_again};
pub use pending_sync::SyncHandoff;
pub(crate) use pending_upload::{Missing, PendingUpload};
pub use pin::{Holder, InTheWay, Pin};
pub use prune::{KeptArtifact, Leftovers, PruneOptions, PruneReport, PrunedArtifact};
pub(crate) use publish::StagedFile;
pub(crate) use refs::RememberedRef;
pub(crate) use rooted::RootedPath;
pub(crate) use source::DiskSource;
pub(crate) use staging::Staging;
pub(crate) use verify::{VerifyItem, VerifyRun};
pub use write_mode::Purpose;
pub(crate) use write_mode::goes_direct;
pub(crate) use writer::{ALIGNMENT, Cursor, Hashed, StagedFileSpec, StagedWriter};

use crate::config::{ByteBound, Sharing};
use crate::digest::{Digest, GitOid};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName};
use crate::limits;
use crate::manifest::Manifest;
use crate::metrics::Metrics;
use budget::Maintenance;
use fast_acquire::Leases;
use index::Index;
use io_error::IoContext;
use manifest_cache::ManifestCache;
use modes::Removal;
use pending_sync::PendingSyncs;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

/// What the `FORMAT` file says; a higher number is refused.
const FORMAT: &str = "modelcache 1\n";
/// Content of `CACHEDIR.TAG`, which tells backup tools to leave the directory out (bford.info/cachedir).
const CACHE_TAG: &str =
    "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of model artifacts; it can be filled again.\n";

/// The local directory.
#[derive(Debug, Clone)]
pub(crate) struct Disk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    layout: Layout,
    max_bytes: ByteBound,
    min_free_bytes: ByteBound,
    /// Why nothing can be written here, if nothing can.
    unwritable: Option<Error>,
    /// Whether locks exclude on this filesystem.
    locks_are_honest: bool,
    /// Whether its filesystem is one of this machine.
    is_local: bool,
    /// Manifests read before.
    memo: ManifestCache,
    /// What this process has still to make durable.
    pending_syncs: PendingSyncs,
    /// Leases held.
    leases: Leases,
    /// What the artifacts hold, once it was needed; looked at within budget holds only.
    index: Mutex<Index>,
    /// What was tidied up, and what is left to be.
    maintenance: Mutex<Maintenance>,
    /// What was done in it since it was opened.
    metrics: Metrics,
}

/// One artifact's folder, as a scan found it.
#[derive(Debug)]
pub(crate) struct ScannedArtifact {
    pub(crate) dir: ArtifactDir,
    /// `None` if there is none or it is damaged.
    pub(crate) manifest: Option<Manifest>,
    pub(crate) last_used: Option<SystemTime>,
}

impl ScannedArtifact {
    /// How people know it: its key, or its folder while no manifest tells.
    pub(crate) fn name(&self) -> String {
        self.manifest.as_ref().map_or_else(|| self.dir.path().to_string(), |m| m.key.to_string())
    }
}

/// The bounds and the free space, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Space {
    pub(crate) budget: u64,
    pub(crate) min_free: u64,
    pub(crate) free: u64,
}

impl Disk {
    /// Opens the directory, making it if need be. A directory that cannot be written still serves what it holds.
    pub(crate) fn open(root: &Path, max_bytes: ByteBound, min_free_bytes: ByteBound, sharing: Sharing) -> Result<Self> {
        let root = std::path::absolute(root).at("resolve", root)?;
        ownership::check(&root, sharing)?;
        check_format(&Layout::new(&root))?;
        let made = make_root(&root, sharing);
        // Links that lead to the root are resolved here, so it must be there.
        let layout = Layout::new(&root);
        if made.is_ok() {
            ownership::check(&root, sharing)?;
            ownership::check_same(&root, layout.root())?;
        }
        let unwritable = match made.and_then(|()| prepare(&layout, sharing)) {
            Ok(()) => None,
            Err(error) if files::stat(&layout.format()).is_ok_and(|metadata| metadata.is_some()) => Some(error),
            Err(error) => return Err(error),
        };
        // Again: another release, or a stranger, may have made it in between.
        ownership::check(&root, sharing)?;
        check_format(&layout)?;
        let probe = || lock::are_honest(&layout.probe_lock());
        let locks_are_honest = unwritable.is_some()
            || match probe() {
                Err(_) if misplaced::set_aside_no_file(&layout, &layout.probe_lock())? => probe()?,
                found => found?,
            };
        if !locks_are_honest {
            tracing::warn!(path = %layout.root(), "file locks do not exclude on this filesystem: bytes may be fetched twice, and only what has long been idle is evicted for space");
        }
        let is_local = fast_acquire::is_local(&root);
        Ok(Self(Arc::new(Inner {
            layout,
            max_bytes,
            min_free_bytes,
            unwritable,
            locks_are_honest,
            is_local,
            memo: ManifestCache::default(),
            pending_syncs: PendingSyncs::default(),
            leases: Leases::default(),
            index: Mutex::default(),
            maintenance: Mutex::default(),
            metrics: Metrics::default(),
        })))
    }

    /// Opens a directory that is there already, to change what it holds and to fetch nothing.
    pub(crate) fn open_present(root: &Path) -> Result<Self> {
        if files::stat(&Layout::new(root).format())?.is_none() {
            return Err(Error::new(ErrorKind::Directory, format!("{} is no cache directory", root.display()))
                .tier(Tier::Disk)
                .hint("point MODEL_CACHE_DIR to one"));
        }
        Self::open(root, ByteBound::Percent(100), ByteBound::Bytes(0), Sharing::Off)
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// What was done in it since it was opened.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.0.unwritable.is_some()
    }

    /// Whether locks exclude here. Where they do not, what another process is at work on cannot be told from what it
    /// left: it is neither taken over nor removed before it has long been idle.
    pub(crate) fn locks_are_honest(&self) -> bool {
        self.0.locks_are_honest
    }

    /// Refuses what would write into a directory that cannot be written.
    pub(crate) fn ensure_writable(&self) -> Result<()> {
        match &self.0.unwritable {
            None => Ok(()),
            Some(why) => {
                let read_only = "what it holds is still served; to fetch more, mount it writable or point MODEL_CACHE_DIR elsewhere";
                let hint = why.hint_text().filter(|_| why.kind() != ErrorKind::Directory).unwrap_or(read_only);
                Err(Error::new(why.kind(), format!("the cache directory cannot be written: {why}"))
                    .tier(Tier::Disk)
                    .hint(hint))
            }
        }
    }

    /// The bounds in bytes and what is free.
    pub(crate) fn space(&self) -> Result<Space> {
        let stat = self.filesystem()?;
        let filesystem = stat.f_blocks * stat.f_frsize;
        Ok(Space {
            budget: self.0.max_bytes.bytes(filesystem),
            min_free: self.0.min_free_bytes.bytes(filesystem),
            free: stat.f_bavail * stat.f_frsize,
        })
    }

    /// A bound in bytes, on this filesystem.
    pub(crate) fn bound_bytes(&self, bound: ByteBound) -> Result<u64> {
        let stat = self.filesystem()?;
        Ok(bound.bytes(stat.f_blocks * stat.f_frsize))
    }

    fn filesystem(&self) -> Result<rustix::fs::StatVfs> {
        let root = self.layout().root();
        root.filesystem().at("look at the filesystem of", root)
    }

    /// What disk knows of `key`, held or not.
    pub(crate) fn manifest(&self, key: &ArtifactKey) -> Result<Option<Manifest>> {
        self.read_manifest(&self.layout().artifact(key))
    }

    /// The manifest in `dir`. A damaged one is moved aside and counts as absent: its blobs are found again by digest.
    pub(crate) fn read_manifest(&self, dir: &ArtifactDir) -> Result<Option<Manifest>> {
        let path = dir.manifest();
        let Some(bytes) = files::read_small(&path, limits::MANIFEST_BYTES_MAX)? else { return Ok(None) };
        #[cfg(test)]
        self.0.memo.parsed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let belongs_here = |manifest: &Manifest| self.layout().artifact(&manifest.key) == *dir;
        match Manifest::from_bytes(&bytes) {
            Ok(manifest) if belongs_here(&manifest) => Ok(Some(manifest)),
            Err(error) if error.kind() == ErrorKind::Invalid => Err(error),
            damaged => {
                let error = damaged.err().map(|error| error.to_string());
                let error = error.as_deref().unwrap_or("it is another artifact's");
                tracing::warn!(path = %path, error, "a manifest is damaged; it is ignored and will be written anew");
                Ok(None)
            }
        }
    }

    /// The same, for those who only look: not read again while it is the file that was read before.
    pub(crate) fn shared_manifest(&self, dir: &ArtifactDir) -> Result<Option<Arc<Manifest>>> {
        let Some(before) = files::stat(&dir.manifest())?.map(|metadata| metadata.identity()) else { return Ok(None) };
        let hash = dir.hash();
        if let Some(manifest) = self.0.memo.recall(&hash, before) {
            return Ok(Some(manifest));
        }
        let Some(manifest) = self.read_manifest(dir)?.map(Arc::new) else { return Ok(None) };
        if files::stat(&dir.manifest())?.map(|metadata| metadata.identity()) == Some(before) {
            self.0.memo.remember(&hash, before, &manifest);
        }
        Ok(Some(manifest))
    }

    /// Every artifact's folder with its manifest.
    pub(crate) fn scan(&self) -> Result<Vec<ScannedArtifact>> {
        let mut found = Vec::new();
        self.scan_each(&mut |artifact| {
            found.push(artifact);
            Ok(())
        })?;
        Ok(found)
    }

    /// The same, one after the other.
    fn scan_each(&self, visit: &mut dyn FnMut(ScannedArtifact) -> Result<()>) -> Result<()> {
        for name_dir in files::entries(&self.layout().artifacts())? {
            for version_dir in files::entries(&name_dir)? {
                self.scan_folder(ArtifactDir(version_dir))?.map_or(Ok(()), &mut *visit)?;
            }
        }
        Ok(())
    }

    /// What a scan would find of one artifact.
    fn scan_one(&self, dir: &ArtifactDir) -> Result<Option<ScannedArtifact>> {
        let above = dir.path().parent().map_or(Ok(false), |above| files::is_folder(&above))?;
        if above && files::stat(dir.path())?.is_some() { self.scan_folder(dir.clone()) } else { Ok(None) }
    }

    fn scan_folder(&self, dir: ArtifactDir) -> Result<Option<ScannedArtifact>> {
        // A manifest of a newer release is left alone: neither evicted nor swept.
        let Ok(manifest) = self.read_manifest(&dir) else { return Ok(None) };
        let last_used = self.last_used(&dir)?;
        Ok(Some(ScannedArtifact { dir, manifest, last_used }))
    }

    /// The same as [`scan`](Self::scan), least recently used first.
    pub(crate) fn scan_by_last_use(&self) -> Result<Vec<ScannedArtifact>> {
        let mut artifacts = self.scan()?;
        artifacts.sort_by(|a, b| (a.last_used, a.dir.path()).cmp(&(b.last_used, b.dir.path())));
        Ok(artifacts)
    }

    pub(crate) fn last_used(&self, dir: &ArtifactDir) -> Result<Option<SystemTime>> {
        Ok(files::stat(&dir.last_used())?.map(|metadata| metadata.modified()))
    }

    /// Whether anybody holds a lease on the artifact now.
    pub(crate) fn is_leased(&self, dir: &ArtifactDir) -> bool {
        matches!(FileLock::try_exclusive(&self.layout().lease(dir)), Ok(None))
    }

    /// Refuses where [`evict`](Self::evict) would now, and changes nothing.
    pub(crate) fn refuse_kept(&self, key: &ArtifactKey) -> Result<()> {
        self.keeps(&self.layout().artifact(key))?.map_or(Ok(()), |why| Err(kept(key, &why)))
    }

    /// Evicts one artifact on request; `None` if it is not here. Held or pinned artifacts are refused.
    pub(crate) fn evict(&self, key: &ArtifactKey) -> Result<Option<u64>> {
        let dir = self.layout().artifact(key);
        if files::stat(dir.path())?.is_none() {
            return Ok(None);
        }
        self.ensure_writable()?;
        let mut hold = self.hold_budget()?;
        // Whoever died between publishing and tidying up left links that would keep the bytes.
        hold.drop_dead_stagings(|staging| staging.is_of(key))?;
        let (manifest, last_used) = (self.read_manifest(&dir)?, self.last_used(&dir)?);
        let evicted = hold.evict(&ScannedArtifact { dir, manifest, last_used })?;
        hold.release()?;
        match evicted {
            Evicted::Freed(bytes) => Ok(Some(bytes)),
            Evicted::Kept(why) => Err(kept(key, &why)),
        }
    }

    /// The SHA-256 that any version of `name` learnt for a file, by its git identity and size.
    pub(crate) fn digests_of_git_oids(&self, name: &ArtifactName) -> Result<BTreeMap<(GitOid, u64), Digest>> {
        let mut known = BTreeMap::new();
        for version_dir in files::entries(&self.layout().artifact_versions(name))? {
            let Ok(Some(manifest)) = self.read_manifest(&ArtifactDir(version_dir)) else { continue };
            let entries = manifest.files.values();
            known.extend(entries.filter_map(|entry| Some(((entry.git_oid?, entry.size), entry.sha256?))));
        }
        Ok(known)
    }

    /// What counts against the budget, and the bytes in quarantine among it.
    pub(crate) fn usage(&self) -> Result<(Usage, u64)> {
        let mut quarantined = 0;
        files::walk(&self.layout().quarantine(), &mut |_, metadata| {
            quarantined += metadata.allocated();
            Ok(())
        })?;
        if self.is_read_only() {
            let published = self.published_bytes()?;
            return Ok((Usage { published, ..Usage::default() }, quarantined));
        }
        let hold = self.hold_budget()?;
        let usage = hold.usage()?;
        hold.release()?;
        Ok((usage, quarantined))
    }
}

/// Makes the directory itself, and the folders above it that are missing.
fn make_root(root: &Path, sharing: Sharing) -> Result<()> {
    let (Some(above), Some(name)) = (root.parent(), root.file_name()) else { return Ok(()) };
    if root.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(above).at("make the cache directory", root)?; // outside the root
    modes::make_top_dir(&RootedPath::root(above).join(name), sharing, Removal::ByOwner)
}

/// Makes the folders and marks the directory as ours.
fn prepare(layout: &Layout, sharing: Sharing) -> Result<()> {
    for folder in [layout.blobs(), layout.artifacts(), layout.locks(), layout.refs()] {
        modes::make_top_dir(&folder, sharing, Removal::ByOwner)?;
    }
    let emptied_by_any =
        [layout.stagings(), layout.quarantine(), layout.lower_records(), layout.pending_uploads(), layout.unsynced()];
    for folder in emptied_by_any {
        modes::make_top_dir(&folder, sharing, Removal::ByAny)?;
    }
    write_new(layout, &layout.cache_tag(), CACHE_TAG)?;
    write_new(layout, &layout.format(), FORMAT)?;
    // A mount that turned read-only still lets existing folders be "made": ask whether it can be written.
    layout.stagings().check_writable().at("write to", layout.root())
}

/// Writes a file unless there is one. It is durable before it has its name: torn by a power cut it would be somebody
/// else's directory. An empty one is what a process of an older release left that was killed before it wrote.
fn write_new(layout: &Layout, path: &RootedPath, content: &str) -> Result<()> {
    match files::stat(path)? {
        Some(metadata) if metadata.len() > 0 => Ok(()),
        Some(_) => files::replace(path, content.as_bytes(), &layout.stagings()),
        None => files::create(path, content.as_bytes(), &layout.stagings()).map(drop),
    }
}

/// Refuses a directory that a newer release made.
fn check_format(layout: &Layout) -> Result<()> {
    let path = layout.format();
    let text = files::read_small(&path, 64)?.unwrap_or_default();
    let number =
        String::from_utf8_lossy(&text).trim().strip_prefix("modelcache ").and_then(|number| number.parse::<u32>().ok());
    let refuse =
        |message: String, hint: &str| Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint(hint));
    match number {
        Some(1) => Ok(()),
        Some(newer) => refuse(
            format!("{} has format {newer}; this release knows 1", layout.root()),
            "update modelcache, or point MODEL_CACHE_DIR to another directory; nothing was touched",
        ),
        // There is none yet, or another process has made it and not yet written it.
        None if text.is_empty() => Ok(()),
        None => refuse(
            format!("{} is not a cache directory: its FORMAT file says something else", layout.root()),
            "point MODEL_CACHE_DIR to another directory",
        ),
    }
}
/// The refusal to evict what somebody holds.
fn kept(key: &ArtifactKey, why: &InTheWay) -> Error {
    let remedy = match why {
        InTheWay::Pinned(_) => format!("take the pin off first: modelcache unpin '{key}'"),
        _ => "try again when its readers have ended".to_owned(),
    };
    let refusal = Error::new(ErrorKind::Conflict, format!("not evicted: it is {why}"));
    refusal.artifact(key).tier(Tier::Disk).hint(remedy)
}
