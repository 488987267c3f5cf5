//! The disk tier: a local directory, shared by any number of processes without a daemon.
//!
//! - All state is in the directory. A process that dies loses nothing.
//! - A reader sees the old manifest or the new one. A file that a manifest lists as held exists and has the right
//!   bytes. If it does not, acquiring a lease detects that. Blobs are immutable; nothing is truncated or overwritten in
//!   place.
//! - The bytes that count against the budget stay within it: room is made before anything is written.
//! - Locks save bandwidth and protect leases. If a filesystem grants one lock to two processes, no bytes become wrong.
//!
//! All functions block on disk work; async callers use `spawn_blocking`. `docs/disk-format.md` describes the layout and
//! the numbered steps of each operation.

mod acquire;
mod budget;
mod capacity;
mod change_log;
mod doctor;
mod fast_acquire;
mod files;
mod hashing;
mod holders;
mod hub_layout;
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
mod optional;
mod ownership;
mod parts_journal;
mod pending_upload;
mod pin;
mod prune;
mod publish;
mod refs;
mod request_limits;
mod rooted;
mod running_fills;
mod source;
mod staging;
mod streamed_fill;
mod sync;
mod unsynced;
mod verify;
mod write_mode;
mod writer;

pub(crate) use acquire::{AcquireOutcome, LeasedArtifact};
pub(crate) use budget::{EvictOutcome, Usage};
pub(crate) use capacity::content_name;
pub(crate) use doctor::examine;
pub(crate) use files::identity;
pub use hub_layout::HubLayout;
pub(crate) use input::{
    InputFile, InputHasher, InputReader, copy_input, format_name, format_of, hash_input, list_input, open_input,
};
pub(crate) use io_error::fault;
pub(crate) use layout::{ArtifactDir, Layout, staged_name};
pub(crate) use leader::{HEARTBEAT_INTERVAL, HeartbeatWatch, Leader, Leadership};
pub use link::Link;
pub(crate) use link::is_refusal as link_is_refused;
pub(crate) use lock::{FileLock, LOCK_WAIT_MAX};
pub(crate) use lower::Lower;
pub(crate) use materialize::Tree;
pub use materialize::{CACHE_IN_MOUNT, Destination, LinkMode, Materialized, is_mount_point};
pub(crate) use memory::free_bytes as free_memory;
pub use misplaced::Misplaced;
pub use open_file::LocalFile;
pub(crate) use open_file::{open_staged, restore_readahead};
pub(crate) use optional::sync_folder;
pub(crate) use pending_upload::{MissingFiles, NO_REMOTE, PendingUpload};
pub use pin::{Holder, KeepReason, Pin};
pub use prune::{KeptArtifact, Leftovers, PruneOptions, PruneReport, PrunedArtifact};
pub(crate) use publish::StagedFile;
pub(crate) use refs::RememberedRef;
pub(crate) use request_limits::FoundLimit;
pub(crate) use rooted::RootedPath;
pub use running_fills::RunningFill;
pub(crate) use source::DiskSource;
pub(crate) use staging::Staging;
pub(crate) use streamed_fill::StreamedFill;
pub(crate) use verify::{VerifyItem, VerifyRun};
pub use write_mode::Purpose;
pub(crate) use write_mode::goes_direct;
pub(crate) use writer::{ALIGNMENT, Cursor, FileDigests, StagedFileSpec, StagedWriter, WHOLE_BYTES_MAX};

use crate::config::{ByteBound, Sharing};
use crate::digest::{Digest, GitOid};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName};
use crate::limits;
use crate::manifest::Manifest;
use crate::metrics::Metrics;
use crate::mutex::Mutex;
use crate::option_name::setting::DIR;
use budget::Maintenance;
use fast_acquire::Leases;
use index::Index;
use io_error::IoContext;
use manifest_cache::ManifestCache;
use modes::Removal;
use rooted::Metadata;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use unsynced::PendingSyncs;

/// Content of the `FORMAT` file, with the format number. A directory with a higher number is refused.
const FORMAT: &str = "modelcache 1\n";
/// Content of `CACHEDIR.TAG`. Backup tools skip a directory that has this file (bford.info/cachedir).
const CACHE_TAG: &str =
    "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of model artifacts; it can be filled again.\n";

/// An open cache directory. Clones share its state.
#[derive(Debug, Clone)]
pub(crate) struct Disk(Arc<DiskState>);

#[derive(Debug)]
struct DiskState {
    layout: Layout,
    max_bytes: ByteBound,
    min_free_bytes: ByteBound,
    /// The error that makes the directory read-only for this process, if any.
    unwritable: Option<Error>,
    /// True if file locks exclude other processes on this filesystem.
    locks_are_honest: bool,
    /// True if the filesystem is on this machine, not on a server.
    is_local: bool,
    /// Parsed manifests.
    manifests: ManifestCache,
    /// Artifacts that this process published and has not synced yet.
    pending_syncs: PendingSyncs,
    /// Leases held by this process.
    leases: Leases,
    /// The held files of all artifacts. Built on first use, and used only while the budget lock is held.
    index: Mutex<Index>,
    /// When this process last swept the directory, and the blobs that it has still to remove.
    maintenance: Mutex<Maintenance>,
    /// Counters of this process since it opened the directory.
    metrics: Metrics,
    /// Digests of the files that were found corrupt and are not replaced yet.
    corrupt: Mutex<BTreeSet<Digest>>,
}

impl DiskState {
    /// Returns the state of a directory. Assumes that its file locks exclude other processes, and that it may be on a
    /// server.
    fn new(layout: Layout, max_bytes: ByteBound, min_free_bytes: ByteBound, unwritable: Option<Error>) -> Self {
        Self {
            layout,
            max_bytes,
            min_free_bytes,
            unwritable,
            locks_are_honest: true,
            is_local: false,
            manifests: ManifestCache::default(),
            pending_syncs: PendingSyncs::default(),
            leases: Leases::default(),
            index: Mutex::default(),
            maintenance: Mutex::default(),
            metrics: Metrics::default(),
            corrupt: Mutex::default(),
        }
    }
}

/// One artifact's folder, as found by a scan.
#[derive(Debug)]
pub(crate) struct ScannedArtifact {
    pub(crate) dir: ArtifactDir,
    /// `None` if the manifest is missing or damaged.
    pub(crate) manifest: Option<Manifest>,
    /// `None` if there is no `last-used` file.
    pub(crate) last_used: Option<SystemTime>,
}

impl ScannedArtifact {
    /// Returns the display name: the key, or the path of the folder if there is no readable manifest.
    pub(crate) fn name(&self) -> String {
        self.manifest.as_ref().map_or_else(|| self.dir.path().to_string(), |m| m.key.to_string())
    }
}

/// The configured bounds and the free space, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Space {
    pub(crate) budget: u64,
    pub(crate) min_free: u64,
    pub(crate) free: u64,
}

impl Disk {
    /// Opens the directory, and creates it if it is missing. An existing cache directory that cannot be written is
    /// served read-only.
    pub(crate) fn open(root: &Path, max_bytes: ByteBound, min_free_bytes: ByteBound, sharing: Sharing) -> Result<Self> {
        // A relative path must not change its meaning with the working directory.
        let root = std::path::absolute(root).at("resolve", root)?;
        ownership::check(&root, sharing)?;
        // Check the format before anything is created, so that the directory of a newer release is not touched.
        check_format(&Layout::new(&root))?;
        let made = make_root(&root, sharing);
        // `Layout::new` resolves the symbolic links that lead to the root once, so the root must exist by now.
        let layout = Layout::new(&root);
        if made.is_ok() {
            // Another user may have created or replaced the root since the first check.
            ownership::check(&root, sharing)?;
            ownership::check_same(&root, layout.root())?;
        }
        let unwritable = match made.and_then(|()| prepare(&layout, sharing)) {
            Ok(()) => None,
            // An existing cache directory that cannot be written is served read-only.
            Err(error) if files::stat(&layout.format()).is_ok_and(|metadata| metadata.is_some()) => Some(error),
            Err(error) => return Err(error),
        };
        // Check both again: another user, or a newer release, may have created the directory in the meantime.
        ownership::check(&root, sharing)?;
        check_format(&layout)?;
        let probe = || lock::are_honest(&layout.probe_lock());
        let locks_are_honest = unwritable.is_some()
            || match probe() {
                // Something that is not a file may be at the path of the lock file. Move it away and probe again.
                Err(_) if misplaced::set_aside_unless_file(&layout, &layout.probe_lock())? => probe()?,
                probed => probed?,
            };
        if !locks_are_honest {
            tracing::warn!(path = %layout.root(), "file locks have no effect on this filesystem: bytes may be downloaded twice, and only artifacts that have long been idle are evicted for space");
        }
        let is_local = fast_acquire::is_local(&root);
        let state = DiskState::new(layout, max_bytes, min_free_bytes, unwritable);
        Ok(Self(Arc::new(DiskState { locks_are_honest, is_local, ..state })))
    }

    /// Returns an empty read-only directory in place of the missing one at `root`. Creates nothing.
    pub(crate) fn open_absent(root: &Path, max_bytes: ByteBound, min_free_bytes: ByteBound) -> Result<Self> {
        let root = std::path::absolute(root).at("resolve", root)?;
        let message = format!("there is no cache directory at {}", root.display());
        let absent = Error::new(ErrorKind::NotFound, message).hint("`modelcache get` and `modelcache put` create it");
        let layout = Layout::new(&root);
        Ok(Self(Arc::new(DiskState::new(layout, max_bytes, min_free_bytes, Some(absent)))))
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// Returns the counters of this process since it opened the directory.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Counts a file of `bytes` bytes with wrong content, unless it was counted before and has not been replaced since
    /// then. `expected` is the digest that it should have.
    fn count_corrupt(&self, expected: Option<Digest>, bytes: u64) {
        if expected.is_none_or(|digest| self.0.corrupt.lock().insert(digest)) {
            self.metrics().record_corrupt(Tier::Disk, 1, bytes);
        }
    }

    /// Counts the corrupt files that the published files with these digests replace.
    fn count_repaired(&self, published: impl Iterator<Item = Digest>) {
        let mut corrupt = self.0.corrupt.lock();
        if !corrupt.is_empty() {
            let repaired = published.filter(|digest| corrupt.remove(digest)).count();
            self.metrics().update(|counts| counts.repaired_files.add(Tier::Disk, repaired as u64));
        }
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.0.unwritable.is_some()
    }

    /// Returns true if file locks exclude other processes on this filesystem.
    ///
    /// If they do not, files of a running process cannot be distinguished from leftovers of a dead one. Such files are
    /// not resumed, and are removed only after an hour without a change.
    pub(crate) fn locks_are_honest(&self) -> bool {
        self.0.locks_are_honest
    }

    /// Returns an error if the directory cannot be written.
    pub(crate) fn ensure_writable(&self) -> Result<()> {
        match &self.0.unwritable {
            None => Ok(()),
            Some(cause) => {
                let read_only = format!(
                    "its artifacts are still served; to download more, mount it writable or point {DIR} elsewhere"
                );
                let hint = cause.hint_text().filter(|_| cause.kind() != ErrorKind::Directory).unwrap_or(&read_only);
                Err(Error::new(cause.kind(), format!("the cache directory cannot be written: {cause}"))
                    .tier(Tier::Disk)
                    .hint(hint))
            }
        }
    }

    /// Returns the bounds and the free space, in bytes.
    pub(crate) fn space(&self) -> Result<Space> {
        let stat = self.filesystem()?;
        let filesystem = stat.f_blocks * stat.f_frsize;
        Ok(Space {
            budget: self.0.max_bytes.bytes(filesystem),
            min_free: self.0.min_free_bytes.bytes(filesystem),
            free: stat.f_bavail * stat.f_frsize,
        })
    }

    /// Returns `bound` in bytes. A percentage refers to the size of this filesystem.
    pub(crate) fn bound_bytes(&self, bound: ByteBound) -> Result<u64> {
        let stat = self.filesystem()?;
        Ok(bound.bytes(stat.f_blocks * stat.f_frsize))
    }

    /// Returns the size and the free space of the filesystem of the root. If the root is missing, this is the
    /// filesystem on which it would be created.
    fn filesystem(&self) -> Result<rustix::fs::StatVfs> {
        let root = self.layout().root();
        match (root.filesystem(), doctor::nearest_existing(&root.full())) {
            (Err(_), Some(parent)) => RootedPath::root(&parent).filesystem().at("examine the filesystem of", root),
            (filesystem, _) => filesystem.at("examine the filesystem of", root),
        }
    }

    /// Returns the manifest of `key`, whether its files are held or not.
    pub(crate) fn manifest(&self, key: &ArtifactKey) -> Result<Option<Manifest>> {
        self.read_manifest(&self.layout().artifact(key))
    }

    /// Returns the manifest in `dir`. A damaged manifest counts as absent; the next fill finds its blobs by digest.
    ///
    /// # Errors
    /// `Invalid` if a newer release wrote the manifest.
    pub(crate) fn read_manifest(&self, dir: &ArtifactDir) -> Result<Option<Manifest>> {
        let path = dir.manifest();
        let Some(bytes) = files::read_small(&path, limits::MANIFEST_BYTES_MAX)? else { return Ok(None) };
        #[cfg(test)]
        self.0.manifests.parsed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let belongs_here = |manifest: &Manifest| self.layout().artifact(&manifest.key) == *dir;
        match Manifest::from_bytes(&bytes) {
            Ok(manifest) if belongs_here(&manifest) => Ok(Some(manifest)),
            Err(error) if error.kind() == ErrorKind::Invalid => Err(error),
            unusable => {
                let error = unusable.err().map(|error| error.to_string());
                let error = error.as_deref().unwrap_or("it is the manifest of another artifact");
                tracing::warn!(path = %path, error, "a manifest is damaged; it is ignored and will be rewritten");
                Ok(None)
            }
        }
    }

    /// Returns the manifest in `dir`. Reads the file only if it is not in the in-memory cache, or has changed since it
    /// was read.
    pub(crate) fn shared_manifest(&self, dir: &ArtifactDir) -> Result<Option<Arc<Manifest>>> {
        let Some(before) = files::stat(&dir.manifest())?.map(|metadata| metadata.identity()) else { return Ok(None) };
        let hash = dir.hash();
        if let Some(manifest) = self.0.manifests.get(&hash, before) {
            return Ok(Some(manifest));
        }
        let Some(manifest) = self.read_manifest(dir)?.map(Arc::new) else { return Ok(None) };
        // Cache it only if the file was not replaced while it was read.
        if files::stat(&dir.manifest())?.map(|metadata| metadata.identity()) == Some(before) {
            self.0.manifests.insert(&hash, before, &manifest);
        }
        Ok(Some(manifest))
    }

    /// Returns the folder of every artifact with its manifest.
    pub(crate) fn scan(&self) -> Result<Vec<ScannedArtifact>> {
        let mut found = Vec::new();
        self.scan_each(&mut |artifact| {
            found.push(artifact);
            Ok(())
        })?;
        Ok(found)
    }

    /// Calls `visit` with the folder of every artifact.
    fn scan_each(&self, visit: &mut dyn FnMut(ScannedArtifact) -> Result<()>) -> Result<()> {
        for name_dir in files::entries(&self.layout().artifacts())? {
            for version_dir in files::entries_if_accessible(&name_dir)? {
                self.scan_folder(ArtifactDir(version_dir))?.map_or(Ok(()), &mut *visit)?;
            }
        }
        Ok(())
    }

    /// Scans the folder of one artifact; `None` if it is missing, or if [`scan_folder`](Self::scan_folder) returns
    /// `None`.
    fn scan_one(&self, dir: &ArtifactDir) -> Result<Option<ScannedArtifact>> {
        // If the parent is a symbolic link, the folder counts as missing.
        let has_parent = dir.path().parent().map_or(Ok(false), |parent| files::is_folder(&parent))?;
        if has_parent && files::stat(dir.path())?.is_some() { self.scan_folder(dir.clone()) } else { Ok(None) }
    }

    /// Scans an existing folder; `None` if a newer release wrote the manifest, or if it cannot be read.
    fn scan_folder(&self, dir: ArtifactDir) -> Result<Option<ScannedArtifact>> {
        // An artifact that the scan leaves out is neither evicted nor swept.
        let Ok(manifest) = self.read_manifest(&dir) else { return Ok(None) };
        let last_used = self.last_used(&dir)?;
        Ok(Some(ScannedArtifact { dir, manifest, last_used }))
    }

    /// Returns the artifacts of a [`scan`](Self::scan), least recently used first.
    pub(crate) fn scan_by_last_use(&self) -> Result<Vec<ScannedArtifact>> {
        let mut artifacts = self.scan()?;
        artifacts.sort_by(|a, b| (a.last_used, a.dir.path()).cmp(&(b.last_used, b.dir.path())));
        Ok(artifacts)
    }

    /// Returns the time of last use; `None` if there is no `last-used` file.
    pub(crate) fn last_used(&self, dir: &ArtifactDir) -> Result<Option<SystemTime>> {
        Ok(files::stat(&dir.last_used())?.map(|metadata| metadata.modified()))
    }

    /// Returns true if a process holds a lease on the artifact at this moment.
    pub(crate) fn is_leased(&self, dir: &ArtifactDir) -> bool {
        // The exclusive lock is refused while a shared lock is held. If it is granted, it is released at once.
        matches!(FileLock::try_exclusive(&self.layout().lease_lock(dir)), Ok(None))
    }

    /// Fails if [`evict`](Self::evict) would refuse `key` at this moment. Changes nothing.
    pub(crate) fn ensure_evictable(&self, key: &ArtifactKey) -> Result<()> {
        self.lease_or_pin(&self.layout().artifact(key))?.map_or(Ok(()), |reason| Err(not_evicted(key, &reason)))
    }

    /// Returns the bytes that evicting `key` would free, and the bytes of its files that have other links; `None` if it
    /// is not on this disk.
    pub(crate) fn bytes_of_eviction(&self, key: &ArtifactKey) -> Result<Option<(u64, u64)>> {
        let dir = self.layout().artifact(key);
        let Some(manifest) = self.read_manifest(&dir)? else { return Ok(None) };
        // By inode: the number of links that an eviction removes (views, links below `hub/`, the blob), and the
        // metadata.
        let mut views: BTreeMap<u64, (u64, Metadata)> = BTreeMap::new();
        files::walk(&dir.files(), &mut |_, metadata| {
            views.entry(metadata.ino()).or_insert((0, *metadata)).0 += 1;
            Ok(())
        })?;
        self.hub_links(&dir, &mut |_, metadata| {
            if let Some((links, _)) = views.get_mut(&metadata.ino()) {
                *links += 1;
            }
            Ok(())
        })?;
        // The blob of a file is removed with its last view.
        let digests: BTreeSet<Digest> = manifest.files.values().filter_map(|entry| entry.sha256).collect();
        for digest in digests {
            let blob = files::stat(&self.layout().blob(&digest))?.map(|blob| blob.ino());
            if let Some((links, metadata)) = blob.and_then(|inode| views.get_mut(&inode))
                && *links < metadata.nlink()
            {
                *links += 1;
            }
        }
        let (mut freed, mut shared) = (0, 0);
        for (links, metadata) in views.into_values() {
            if links == metadata.nlink() { freed += metadata.len() } else { shared += metadata.len() }
        }
        Ok(Some((freed, shared)))
    }

    /// Evicts one artifact on request, and returns the bytes freed; `None` if it is not on this disk. Refuses a leased
    /// or pinned artifact.
    pub(crate) fn evict(&self, key: &ArtifactKey) -> Result<Option<u64>> {
        let dir = self.layout().artifact(key);
        if files::stat(dir.path())?.is_none() {
            return Ok(None);
        }
        self.ensure_writable()?;
        let mut guard = self.lock_budget()?;
        // A process that died between publishing and removing its staging folder left links to the blobs in it. Remove
        // them, because they would keep the bytes allocated.
        guard.remove_dead_stagings(|staging| staging.is_of(key))?;
        let (manifest, last_used) = (self.read_manifest(&dir)?, self.last_used(&dir)?);
        let evicted = guard.evict(&ScannedArtifact { dir, manifest, last_used })?;
        guard.release()?;
        match evicted {
            EvictOutcome::Freed(bytes) => Ok(Some(bytes)),
            EvictOutcome::Kept(reason) => Err(not_evicted(key, &reason)),
        }
    }

    /// Returns the SHA-256 digests that manifests of all versions of `name` record, keyed by git object id and size.
    pub(crate) fn digests_of_git_oids(&self, name: &ArtifactName) -> Result<BTreeMap<(GitOid, u64), Digest>> {
        let mut digests = BTreeMap::new();
        for version_dir in files::entries_if_accessible(&self.layout().artifact_versions(name))? {
            let Ok(Some(manifest)) = self.read_manifest(&ArtifactDir(version_dir)) else { continue };
            let entries = manifest.files.values();
            digests.extend(entries.filter_map(|entry| Some(((entry.git_oid?, entry.size), entry.sha256?))));
        }
        Ok(digests)
    }

    /// Returns the bytes that count against the budget, and the part of them that is in quarantine.
    pub(crate) fn usage(&self) -> Result<(Usage, u64)> {
        let mut quarantined = 0;
        files::walk(&self.layout().quarantine(), &mut |_, metadata| {
            quarantined += metadata.allocated();
            Ok(())
        })?;
        // Without write access the budget lock cannot be taken: count the files instead of reading the record.
        if self.is_read_only() {
            let published = self.published_bytes()?;
            return Ok((Usage { published, ..Usage::default() }, quarantined));
        }
        let guard = self.lock_budget()?;
        let usage = guard.usage()?;
        guard.release()?;
        Ok((usage, quarantined))
    }
}

/// Creates the cache directory and its missing parents.
fn make_root(root: &Path, sharing: Sharing) -> Result<()> {
    let (Some(parent), Some(name)) = (root.parent(), root.file_name()) else { return Ok(()) };
    if root.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(parent).at("make the cache directory", root)?; // not below the root
    modes::make_top_dir(&RootedPath::root(parent).join(name), sharing, Removal::ByOwner)
}

/// Creates the top folders, `CACHEDIR.TAG` and `FORMAT`, and checks that the directory can be written.
fn prepare(layout: &Layout, sharing: Sharing) -> Result<()> {
    for folder in [layout.blobs(), layout.artifacts(), layout.locks(), layout.refs()] {
        modes::make_top_dir(&folder, sharing, Removal::ByOwner)?;
    }
    let removable_by_any = [layout.stagings(), layout.quarantine(), layout.lower_records(), layout.pending_uploads()];
    for folder in removable_by_any {
        modes::make_top_dir(&folder, sharing, Removal::ByAny)?;
    }
    write_new(layout, &layout.cache_tag(), CACHE_TAG)?;
    write_new(layout, &layout.format(), FORMAT)?;
    // On a read-only mount the calls above succeed if everything exists, so check write access explicitly.
    layout.stagings().check_writable().at("write to", layout.root())
}

/// Writes a file if it is missing or empty.
///
/// The content is durable before the file gets its name: after a power cut, a torn `FORMAT` file would make the
/// directory look like that of another program.
fn write_new(layout: &Layout, path: &RootedPath, content: &str) -> Result<()> {
    match files::stat(path)? {
        Some(metadata) if metadata.len() > 0 => Ok(()),
        // The file is empty: a process of an older release was killed between creating the file and writing it.
        Some(_) => files::replace(path, content.as_bytes(), &layout.stagings()),
        None => files::create(path, content.as_bytes(), &layout.stagings()).map(drop),
    }
}

/// Refuses a directory of a newer format, and a folder whose `FORMAT` file has other content.
fn check_format(layout: &Layout) -> Result<()> {
    let path = layout.format();
    let text = files::read_small(&path, 64)?.unwrap_or_default();
    let number =
        String::from_utf8_lossy(&text).trim().strip_prefix("modelcache ").and_then(|number| number.parse::<u32>().ok());
    let refused =
        |message: String, hint: String| Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint(hint));
    match number {
        Some(1) => Ok(()),
        Some(newer) => refused(
            format!("{} has format {newer}; this release knows 1", layout.root()),
            format!("update modelcache, or point {DIR} to another directory; nothing was touched"),
        ),
        // The file does not exist yet, or another process has created it and not yet written it.
        None if text.is_empty() => Ok(()),
        None => refused(
            format!("{} is not a cache directory: its FORMAT file has other content", layout.root()),
            format!("point {DIR} to another directory"),
        ),
    }
}

/// Returns the error for an artifact that was not evicted for `reason`.
fn not_evicted(key: &ArtifactKey, reason: &KeepReason) -> Error {
    let remedy = match reason {
        KeepReason::Pinned(_) => format!("remove the pin first: modelcache unpin '{key}'"),
        _ => "try again when its readers have ended".to_owned(),
    };
    let refusal = Error::new(ErrorKind::Conflict, format!("not evicted: it is {reason}"));
    refusal.artifact(key).tier(Tier::Disk).hint(remedy)
}
