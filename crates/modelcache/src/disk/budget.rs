//! The byte budget: a short lock, a record of the counted bytes, and making room before anything is written.
//!
//! - Counted are the allocated bytes of blobs, quarantine, staging, temporary files and views without a blob, plus the
//!   bytes that running fills have reserved beyond those they have written.
//! - The record is marked dirty before a change and written after it. A record that is dirty or of another boot is not
//!   used: the holder of the lock counts again.
//! - The holder of the budget lock waits for nothing. It tries other locks once.
//! - A manifest changes only under the budget lock, after a line in the change log. A process that read the directory
//!   once learns of later changes from the log, so making room reads the evicted artifacts and not the whole directory.

use super::change_log::Position;
use super::files;
use super::index::{Index, LastUseOrder, below_artifacts};
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::pin::InTheWay;
use super::rooted::{Metadata, RootedPath};
use super::staging::StagingUse;
use super::{Disk, ScannedArtifact};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::human::bytes;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, Manifest};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// How long to wait for the budget lock. It is normally held for milliseconds.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(30);
/// Bytes of the record. It is padded to this size, so that a shorter one overwrites a longer one completely.
const RECORD_BYTES: usize = 256;
/// Minimum time without a change before an artifact or a leftover may be removed where locks do not exclude.
const IDLE_MIN: Duration = Duration::from_secs(3600);
/// Interval at which a process that is short of room sweeps the whole directory for leftovers.
const SWEEP_INTERVAL: Duration = Duration::from_secs(6 * 3600);
/// Assumed size of a filesystem block; the allocated bytes of a file are a multiple of it.
const BLOCK_BYTES: u64 = 4096;

/// The budget record. It is stored in the lock file as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Allocated bytes of blobs, quarantine, and views without a blob.
    total: u64,
    /// True while a change is under way, and until a holder counts again if the total is not known.
    dirty: bool,
    boot_id: String,
    /// The last holder of the lock, for messages.
    pid: u32,
    /// End of the change log.
    changes: Position,
}

/// State of the sweeps by this process.
#[derive(Debug, Default)]
pub(super) struct Maintenance {
    /// Time of the last sweep of the whole directory; `None` if the next one is due at once.
    swept: Option<Instant>,
    /// Blobs that may have lost their last link from outside `blobs/` since then.
    orphans: BTreeSet<Digest>,
}

/// The budget lock, held. After a change, call [`release`](Self::release); otherwise the next holder counts again.
#[derive(Debug)]
pub(crate) struct BudgetHold<'disk> {
    disk: &'disk Disk,
    lock: FileLock,
    /// Allocated bytes of blobs, quarantine, and views without a blob.
    total: u64,
    /// True if the record on disk is marked dirty.
    dirty: bool,
    /// True if the total is not known. The next sweep of this hold counts again; else the next holder does.
    distrusted: bool,
    /// End of the change log when the hold began.
    began_at: Position,
    /// End of the change log now.
    at: Position,
    /// True if the index includes all changes up to `began_at`.
    index_is_current: bool,
    /// Artifacts that this hold is changing. The index reads their manifests again at each use.
    announced: Vec<ArtifactDir>,
    /// Number of links from staging and quarantine by inode; counted at the first use.
    private_links: Option<HashMap<u64, u64>>,
    /// Files that were hashed before this hold began, and have the bytes of the digest under this identity.
    pub(super) found_right: Vec<(Digest, FileIdentity)>,
}

/// Bytes that count against the budget, by kind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Blobs, quarantine, and views without a blob.
    pub(crate) published: u64,
    /// Staging folders.
    pub(crate) staging: u64,
    /// Bytes that running fills have reserved and not yet written.
    pub(crate) reserved: u64,
    /// Temporary files directly in `staging/`, of running and dead writers.
    pub(crate) temporary: u64,
}

impl Usage {
    /// Returns the sum, which is compared with the budget.
    pub(crate) fn counted(&self) -> u64 {
        self.published + self.staging + self.reserved + self.temporary
    }
}

/// Returns the bytes that a file of `size` bytes is expected to take on disk.
pub(crate) fn allocated_for(size: u64) -> u64 {
    size.next_multiple_of(BLOCK_BYTES)
}

impl Disk {
    /// Takes the budget lock.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if another process holds it for longer than [`LOCK_WAIT_MAX`].
    pub(crate) fn hold_budget(&self) -> Result<BudgetHold<'_>> {
        let path = self.layout().budget_lock();
        let started = Instant::now();
        let lock = loop {
            match FileLock::try_exclusive(&path)? {
                Some(lock) => break lock,
                None if started.elapsed() > LOCK_WAIT_MAX => return Err(held_too_long(&path)),
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        let record = read_record(lock.file());
        // Without a record, changes may have been missed: start a new log.
        let at = record.as_ref().map_or_else(Position::fresh, |record| record.changes);
        let mut hold = BudgetHold {
            disk: self,
            lock,
            total: 0,
            dirty: false,
            distrusted: false,
            began_at: at,
            at,
            index_is_current: false,
            announced: Vec::new(),
            private_links: None,
            found_right: Vec::new(),
        };
        match record {
            // Two processes may hold the lock at once and overwrite each other's total, so count.
            Some(_) if !self.locks_are_honest() => hold.total = self.published_bytes()?,
            Some(record) if !record.dirty && record.boot_id == boot_id() => hold.total = record.total,
            // The record is new, damaged, dirty, or from before a reboot that may have lost changes.
            _ => hold.recount()?,
        }
        Ok(hold)
    }
}

impl Disk {
    /// Counts the allocated bytes of blobs, quarantine, views without a blob, and temporary files beside manifests.
    pub(crate) fn published_bytes(&self) -> Result<u64> {
        let (mut total, mut counted) = (0, HashSet::new());
        let layout = self.layout();
        for dir in [layout.blobs(), layout.quarantine()] {
            files::walk(&dir, &mut |_, metadata| {
                counted.insert(metadata.ino());
                total += metadata.allocated();
                Ok(())
            })?;
        }
        for name_dir in files::entries(&layout.artifacts())? {
            for version_dir in files::entries_below(&name_dir)? {
                total += self.temporaries(&version_dir)?.iter().map(|file| file.allocated()).sum::<u64>();
                // A view that is a link to a blob was counted with the blob.
                let views = ArtifactDir(version_dir).files();
                let counted = files::walk(&views, &mut |_, metadata| {
                    if counted.insert(metadata.ino()) {
                        total += metadata.allocated();
                    }
                    Ok(())
                });
                files::unless_barred(counted, &views)?;
            }
        }
        Ok(total)
    }

    /// Returns true if the artifact or staging folder `dir` was not changed for [`IDLE_MIN`].
    ///
    /// Always returns true where locks exclude: there, a lock shows whether `dir` is in use.
    pub(crate) fn is_idle(&self, dir: &RootedPath) -> Result<bool> {
        if self.locks_are_honest() {
            return Ok(true);
        }
        let mut latest = files::stat(dir)?.map(|metadata| metadata.modified());
        for path in files::entries(dir)? {
            latest = latest.max(files::stat(&path)?.map(|metadata| metadata.modified()));
        }
        Ok(latest.is_none_or(|latest| SystemTime::now().duration_since(latest).is_ok_and(|age| age >= IDLE_MIN)))
    }
}

impl BudgetHold<'_> {
    /// Returns the directory that this budget lock belongs to.
    pub(crate) fn disk(&self) -> Disk {
        self.disk.clone()
    }

    /// Marks the record dirty. Call this before each change of counted files.
    pub(crate) fn begin_change(&mut self) -> Result<()> {
        if !self.dirty {
            self.dirty = true;
            self.write_record()?;
        }
        Ok(())
    }

    /// Adds the artifact in `dir` to the change log, and marks the record dirty. Call this before its manifest is
    /// changed or removed.
    pub(crate) fn begin_change_of(&mut self, dir: &ArtifactDir) -> Result<()> {
        // First the line, then the record with the new length. A line that the record does not cover is overwritten.
        let folder = below_artifacts(self.disk, dir);
        self.at = folder.map_or_else(Position::fresh, |folder| self.at.append(&self.disk.layout().changes(), &folder));
        self.announced.push(dir.clone());
        self.dirty = true;
        self.write_record()
    }

    /// Updates the index after a change of the artifact in `dir`.
    fn end_change_of(&mut self, dir: &ArtifactDir) -> Result<()> {
        self.announced.retain(|announced| announced != dir);
        if self.index_is_current { lock(&self.disk.0.index).refresh(self.disk, dir) } else { Ok(()) }
    }

    /// Returns the index as of now. Drop the guard before the next call of this hold, which may lock the index again.
    pub(super) fn index(&mut self) -> Result<MutexGuard<'_, Index>> {
        let mut index = lock(&self.disk.0.index);
        // The log is incomplete where two processes may hold the lock at once.
        let is_current =
            self.index_is_current || self.disk.locks_are_honest() && index.catch_up(self.disk, self.began_at)?;
        if !is_current {
            *index = Index::read(self.disk, self.began_at)?;
        }
        self.index_is_current = true;
        // The lines of this hold come before its changes, so the index may not have their outcome yet.
        for dir in &self.announced {
            index.refresh(self.disk, dir)?;
        }
        Ok(index)
    }

    /// Adds the bytes of a new blob, or of a new view without a blob.
    pub(crate) fn add(&mut self, bytes: u64) {
        debug_assert!(self.dirty, "a change is announced before it is made");
        self.total += bytes;
    }

    /// Subtracts the bytes of a file that is removed.
    pub(crate) fn subtract(&mut self, bytes: u64) {
        debug_assert!(self.dirty, "a change is announced before it is made");
        self.total = self.total.saturating_sub(bytes);
    }

    /// Marks the total as not known. The next sweep of this hold counts again. Without one, the record stays dirty, and
    /// the next holder counts.
    pub(crate) fn distrust(&mut self) -> Result<()> {
        self.distrusted = true;
        self.begin_change()
    }

    /// Writes the record and releases the lock.
    pub(crate) fn release(mut self) -> Result<()> {
        if self.dirty && !self.distrusted {
            self.dirty = false;
            self.write_record()?;
        }
        Ok(())
    }

    /// Writes the record, padded to [`RECORD_BYTES`]. It is not synced: after a reboot the next holder counts again.
    fn write_record(&self) -> Result<()> {
        // Where two processes may hold the lock at once, the total is not reliable: the next holder counts.
        let dirty = self.dirty || !self.disk.locks_are_honest();
        let record = Record { total: self.total, dirty, boot_id: boot_id(), pid: std::process::id(), changes: self.at };
        let mut bytes = with_checksum(&serde_json::to_string(&record).unwrap_or_default()).into_bytes();
        bytes.resize(RECORD_BYTES, b' ');
        self.lock.file().write_all_at(&bytes, 0).at("write", &self.disk.layout().budget_lock())
    }

    /// Sweeps the directory, counts the published bytes again, and writes a clean record.
    fn recount(&mut self) -> Result<()> {
        self.distrust()?;
        self.sweep()?;
        self.dirty = false;
        self.write_record()
    }

    /// Counts the published bytes again.
    pub(super) fn count(&mut self) -> Result<()> {
        self.begin_change()?;
        self.total = self.disk.published_bytes()?;
        self.distrusted = false;
        Ok(())
    }

    /// Returns the counted bytes as of now.
    pub(crate) fn usage(&self) -> Result<Usage> {
        let mut usage = Usage { published: self.total, ..Usage::default() };
        for staging in self.disk.stagings()? {
            usage.staging += staging.allocated;
            usage.reserved += staging.outstanding();
        }
        usage.temporary =
            self.disk.temporaries(&self.disk.layout().stagings())?.iter().map(|file| file.allocated()).sum();
        Ok(usage)
    }

    /// Returns the bytes that must be freed before `extra` more bytes fit into the budget and leave the minimum free
    /// space of the filesystem; 0 if they fit.
    fn shortfall(&self, extra: u64) -> Result<u64> {
        let (usage, space) = (self.usage()?, self.disk.space()?);
        let over_budget = (usage.counted() + extra).saturating_sub(space.budget);
        // Reserved bytes are not written yet, so the filesystem still reports them as free.
        let below_min_free = (space.min_free + usage.reserved + extra).saturating_sub(space.free);
        Ok(over_budget.max(below_min_free))
    }

    /// Makes room for `extra` bytes that a fill of `key` will write.
    ///
    /// The artifact of `key` is not a candidate for eviction. If evicting all candidates would not make enough room,
    /// none is evicted.
    ///
    /// # Errors
    /// [`ErrorKind::Full`], which names the obstacles. Transient if an obstacle may go away by itself.
    pub(crate) fn make_space(&mut self, extra: u64, key: &ArtifactKey) -> Result<()> {
        if self.shortfall(extra)? == 0 {
            return Ok(());
        }
        // Step 1: leftovers of dead fills and dead writers.
        self.drop_dead_stagings(|_| true)?;
        self.drop_dead_temporaries(&self.disk.layout().stagings())?;
        // Step 2: views that no manifest lists as held, and blobs without a further link. Finding all of them reads the
        // whole directory, so between two sweeps only known orphans are removed.
        let is_due = lock(&self.disk.0.maintenance).swept.is_none_or(|swept| swept.elapsed() > SWEEP_INTERVAL);
        if is_due { self.sweep() } else { self.drop_orphans() }?;
        // Step 3: quarantined files.
        if self.shortfall(extra)? > 0 {
            self.drop_quarantine()?;
        }
        // Step 4: artifacts, least recently used first.
        match self.evict_for(extra, key)? {
            Some(_) if !is_due => {
                // Sweep before refusing: another process may have left something, or changed a manifest without a line
                // in the change log.
                self.sweep()?;
                self.drop_quarantine()?;
                self.evict_for(extra, key)?.map_or(Ok(()), Err)
            }
            refusal => refusal.map_or(Ok(()), Err),
        }
    }

    /// Evicts artifacts until there is room for `extra` bytes that a fill of `key` will write. Returns the error if
    /// there cannot be enough room.
    fn evict_for(&mut self, extra: u64, key: &ArtifactKey) -> Result<Option<Error>> {
        let own = self.disk.layout().artifact(key);
        let mut search = Search { own, cursor: None, obstacles: Obstacles::default() };
        // The bytes of another running fill cannot be freed before it ends. It is an obstacle, but not a lasting one.
        let fills = self.disk.stagings()?;
        let others = fills.iter().filter(|staging| staging.live && !staging.is_of(key));
        others.for_each(|staging| search.obstacles.add(staging.described(), true));
        loop {
            let short = self.shortfall(extra)?;
            if short == 0 {
                return Ok(None);
            }
            let Some(victims) = self.victims(short, &mut search)? else {
                return Ok(Some(self.no_space(extra, short, &search.obstacles)));
            };
            for victim in &victims {
                // An eviction may free more than was expected of it.
                if self.shortfall(extra)? == 0 {
                    return Ok(None);
                }
                // Acquired or pinned since it was chosen. The outer loop then chooses further victims.
                if let Evicted::Kept(why) = self.evict(victim)? {
                    search.obstacles.add(format!("{} is {why}", victim.name()), why.is_for_now());
                }
            }
        }
    }

    /// Returns the next candidates for eviction, least recently used first, as many as are needed to free `bytes`.
    /// Returns `None` if all remaining candidates would free less.
    fn victims(&mut self, bytes: u64, search: &mut Search) -> Result<Option<Vec<ScannedArtifact>>> {
        let (mut victims, mut gone, mut freed) = (Vec::new(), HashMap::new(), 0);
        while freed < bytes {
            let Some(artifact) = self.next_by_use(search)? else { return Ok(None) };
            if artifact.dir == search.own {
                continue;
            }
            let kept = match self.disk.keeps(&artifact.dir)? {
                Some(why) => Some(why),
                None => self.pointless_victim(&artifact)?,
            };
            match kept {
                Some(why) => search.obstacles.add(format!("{} is {why}", artifact.name()), why.is_for_now()),
                None => {
                    freed += self.freed_with(&artifact, &mut gone)?;
                    victims.push(artifact);
                }
            }
        }
        Ok(Some(victims))
    }

    /// Returns the next artifact in the order of last use. An artifact that was used since it was indexed comes later.
    fn next_by_use(&mut self, search: &mut Search) -> Result<Option<ScannedArtifact>> {
        loop {
            let Some(cursor) = self.index()?.next(search.cursor.as_ref()) else { return Ok(None) };
            let dir = ArtifactDir(self.disk.layout().artifacts().join(&cursor.1));
            // `last-used` is touched without a line in the change log, so look at the file.
            let last_used = self.disk.last_used(&dir)?;
            if last_used != cursor.0 {
                self.index()?.set_last_used(&cursor.1, last_used);
            }
            let was_used = last_used > cursor.0;
            search.cursor = Some(cursor);
            // Not `was_used`: otherwise the search meets the artifact again at its new place in the order.
            if !was_used && let Some(artifact) = self.disk.scan_one(&dir)? {
                return Ok(Some(artifact));
            }
        }
    }

    /// Returns the bytes that removing an artifact frees after the links in `gone` (number by inode) were removed. Adds
    /// the artifact's own links to `gone`.
    fn freed_with(&self, artifact: &ScannedArtifact, gone: &mut HashMap<u64, u64>) -> Result<u64> {
        let mut freed = 0;
        files::walk(&artifact.dir.files(), &mut |view, metadata| {
            let links = gone.entry(metadata.ino()).or_default();
            *links += 1;
            // The blob is removed with its last view, so its link does not keep the bytes.
            let blob = self.is_blob(metadata.ino(), artifact.entry_of(view).and_then(|entry| entry.sha256))?;
            if *links + u64::from(blob) == metadata.nlink() {
                freed += metadata.allocated();
            }
            Ok(())
        })?;
        Ok(freed)
    }

    /// Returns true if `inode` is the blob of `digest`.
    fn is_blob(&self, inode: u64, digest: Option<Digest>) -> Result<bool> {
        let blob = digest.map(|digest| files::stat(&self.disk.layout().blob(&digest))).transpose()?.flatten();
        Ok(blob.is_some_and(|blob| blob.ino() == inode))
    }

    /// Returns the error for a fill that does not fit: bytes needed, bounds and obstacles.
    fn no_space(&self, extra: u64, short: u64, obstacles: &Obstacles) -> Error {
        let counted = self.usage().map(|usage| usage.counted()).unwrap_or(self.total);
        let mut message = format!("no room for {} more: {} must be freed", bytes(extra), bytes(short));
        if let Ok(space) = self.disk.space() {
            message.push_str(&format!(
                " (budget {} with {} in use; filesystem {} free, of which {} must stay free)",
                bytes(space.budget),
                bytes(counted),
                bytes(space.free),
                bytes(space.min_free)
            ));
        }
        if !obstacles.names.is_empty() {
            message.push_str(&format!("; in the way: {}", obstacles.names.join("; ")));
        }
        let over_budget = self.disk.space().is_ok_and(|space| counted + extra > space.budget);
        let hint = match over_budget {
            true => "raise MODEL_CACHE_MAX_BYTES, or release or unpin the artifacts in the way",
            false => {
                "free space on this filesystem, lower MODEL_CACHE_MIN_FREE_BYTES, or point MODEL_CACHE_DIR to a larger one"
            }
        };
        Error::new(ErrorKind::Full, message).tier(Tier::Disk).transient(obstacles.for_now).hint(hint)
    }

    /// Evicts one artifact, unless it is leased or pinned, or was used since it was scanned.
    pub(crate) fn evict(&mut self, artifact: &ScannedArtifact) -> Result<Evicted> {
        // One try: the holder of the budget lock waits for nothing.
        let Some(_lease) = FileLock::try_exclusive(&self.disk.layout().lease(&artifact.dir))? else {
            return Ok(Evicted::Kept(InTheWay::Leased(self.disk.lease_holders(&artifact.dir))));
        };
        // Look again under the lease: pins and last use change under the shared lease.
        if let Some(pin) = self.disk.pin_in(&artifact.dir)? {
            return Ok(Evicted::Kept(InTheWay::Pinned(pin)));
        }
        if self.disk.last_used(&artifact.dir)? != artifact.last_used {
            return Ok(Evicted::Kept(InTheWay::JustUsed));
        }
        tracing::debug!(artifact = artifact.name(), "evicting");
        let removed = self.remove_artifact(&artifact.dir);
        let Some(freed) = files::unless_barred(removed, artifact.dir.path())? else {
            // A part of it may be gone.
            self.distrust()?;
            return Ok(Evicted::Kept(InTheWay::NotRemovable));
        };
        tracing::info!(artifact = artifact.name(), freed_bytes = freed, "evicted");
        self.disk.metrics().evicted(freed);
        Ok(Evicted::Freed(freed))
    }

    /// Returns the reason not to evict this artifact to make room, if there is one.
    ///
    /// Either it was changed lately and locks do not exclude, so it may be in use. Or each of its files has a link
    /// outside the cache, so evicting it would free no byte.
    pub(super) fn pointless_victim(&mut self, artifact: &ScannedArtifact) -> Result<Option<InTheWay>> {
        let Some(manifest) = &artifact.manifest else { return Ok(None) };
        if !self.disk.is_idle(artifact.dir.path())? {
            return Ok(Some(InTheWay::UsedLately));
        }
        let mut held = false;
        for (path, entry) in manifest.files.iter().filter(|(_, entry)| entry.held.is_some()) {
            let Some(view) = files::stat(&artifact.dir.view(path))? else { return Ok(None) };
            // All links of this file belong to the cache, so its bytes can be freed.
            if view.nlink() <= self.own_links(view.ino(), entry.sha256)? {
                return Ok(None);
            }
            held = true;
        }
        Ok(held.then_some(InTheWay::LinkedOutside))
    }

    /// Returns the number of links to `inode` inside the cache: the blob of `digest`, staged and quarantined files, and
    /// the views that manifests record.
    fn own_links(&mut self, inode: u64, digest: Option<Digest>) -> Result<u64> {
        if self.private_links.is_none() {
            let mut links: HashMap<u64, u64> = HashMap::new();
            for dir in [self.disk.layout().quarantine(), self.disk.layout().stagings()] {
                files::walk(&dir, &mut |_, metadata| {
                    *links.entry(metadata.ino()).or_default() += 1;
                    Ok(())
                })?;
            }
            self.private_links = Some(links);
        }
        let private = self.private_links.as_ref().and_then(|links| links.get(&inode)).copied().unwrap_or_default();
        Ok(private + u64::from(self.is_blob(inode, digest)?) + self.index()?.views(inode))
    }

    /// Removes the artifact in `dir`, and the blobs that lose their last view. Returns the bytes freed.
    ///
    /// The caller holds the exclusive lease.
    pub(crate) fn remove_artifact(&mut self, dir: &ArtifactDir) -> Result<u64> {
        self.begin_change_of(dir)?;
        // Something else is in the place of the folder, for instance a symbolic link. Remove nothing through it.
        if !dir.is_ours()? {
            return Ok(0);
        }
        let manifest = self.disk.read_manifest(dir).unwrap_or(None);
        let mut freed = self.subtract_copies(dir, manifest.as_ref())?;
        // The manifest first: after a crash, the rest is a leftover that a sweep removes.
        files::remove_file(&dir.manifest())?;
        self.disk.remove_pending_upload(&dir.hash())?;
        files::remove(&dir.files())?;
        files::remove(dir.path())?;
        // Fails while the folder holds another version.
        if let Some(name_dir) = dir.path().parent() {
            let _ = name_dir.remove_dir();
        }
        self.end_change_of(dir)?;
        // The blobs last, when the views no longer link to them.
        for digest in manifest.iter().flat_map(|manifest| manifest.files.values()).filter_map(|entry| entry.sha256) {
            freed += self.drop_if_unlinked(&self.disk.layout().blob(&digest))?;
        }
        Ok(freed)
    }

    /// Subtracts from the total the views of `dir` without a blob, which the caller removes next. Returns the bytes
    /// that this frees.
    fn subtract_copies(&mut self, dir: &ArtifactDir, manifest: Option<&Manifest>) -> Result<u64> {
        let entries = || manifest.iter().flat_map(|manifest| manifest.files.values());
        let recorded: HashSet<FileIdentity> = entries().filter_map(FileEntry::recorded_on_disk).collect();
        let mut blobs = HashSet::new();
        for digest in entries().filter_map(|entry| entry.sha256) {
            blobs.extend(files::stat(&self.disk.layout().blob(&digest))?.map(|metadata| metadata.ino()));
        }
        // By inode: the number of views, and the metadata.
        let mut copies: HashMap<u64, (u64, Metadata)> = HashMap::new();
        files::walk(&dir.files(), &mut |_, metadata| {
            if !blobs.contains(&metadata.ino()) {
                copies.entry(metadata.ino()).or_insert_with(|| (0, *metadata)).0 += 1;
            }
            Ok(())
        })?;
        let mut freed = 0;
        for (links, metadata) in copies.into_values() {
            if recorded.contains(&metadata.identity()) {
                self.subtract(metadata.allocated());
            } else {
                // The file was changed, or appeared after the last count: it may or may not be in the total.
                self.distrust()?;
            }
            if metadata.nlink() == links {
                freed += metadata.allocated();
            }
        }
        Ok(freed)
    }

    /// Removes the blob or quarantined file at `path` if this is its last link. Returns the bytes freed.
    pub(super) fn drop_if_unlinked(&mut self, path: &RootedPath) -> Result<u64> {
        match files::stat(path)? {
            Some(metadata) if metadata.is_file() && metadata.nlink() == 1 => {
                self.begin_change()?;
                if files::unless_barred(files::remove_file(path), path)?.is_none() {
                    return Ok(0);
                }
                self.subtract(metadata.allocated());
                Ok(metadata.allocated())
            }
            _ => Ok(0),
        }
    }

    /// Removes the leftovers of dead processes in the whole directory, and rebuilds the index.
    ///
    /// Leftovers are staging folders that cannot be resumed, temporary files, files in `unsynced/`, views that no
    /// manifest lists as held, and blobs without a further link.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        self.drop_dead_stagings(|staging| !staging.may_be_resumed())?;
        for folder in [self.disk.layout().stagings(), self.disk.layout().locks(), self.disk.layout().blobs()] {
            self.drop_dead_temporaries(&folder)?;
        }
        self.disk.drop_dead_writers()?;
        let (disk, mut index) = (self.disk, Index::as_of(self.began_at));
        disk.scan_each(&mut |artifact| {
            if self.drop_dead_temporaries(artifact.dir.path())? > 0 {
                // The last count may have included them.
                self.distrust()?;
            }
            let swept = self.sweep_views(&artifact);
            if files::unless_barred(swept, artifact.dir.path())?.is_none() {
                self.distrust()?;
            }
            if artifact.manifest.is_some() || files::stat(artifact.dir.path())?.is_some() {
                index.insert(disk, &artifact);
            }
            Ok(())
        })?;
        *lock(&disk.0.index) = index;
        self.index_is_current = true;
        // Blobs come last: with a view, a blob may have lost its last further link.
        let mut unlinked = Vec::new();
        files::walk(&self.disk.layout().blobs(), &mut |path, metadata| {
            if metadata.nlink() == 1 {
                unlinked.push(path.to_owned());
            }
            Ok(())
        })?;
        for blob in unlinked {
            self.drop_if_unlinked(&blob)?;
        }
        *lock(&self.disk.0.maintenance) = Maintenance { swept: Some(Instant::now()), orphans: BTreeSet::new() };
        if self.distrusted {
            self.total = self.disk.published_bytes()?;
            self.distrusted = false;
        }
        Ok(())
    }

    /// Removes the staging folders of dead fills for which `unwanted` returns true.
    pub(crate) fn drop_dead_stagings(&mut self, unwanted: impl Fn(&StagingUse) -> bool) -> Result<()> {
        for staging in self.disk.stagings()?.into_iter().filter(|staging| !staging.live && unwanted(staging)) {
            // Hold the owner lock during the removal, so that no fill adopts the folder.
            let owner = FileLock::try_existing(&staging.journal())?;
            if matches!(owner, Some(None)) {
                continue;
            }
            tracing::debug!(staging = %staging.dir, bytes = staging.allocated, "removing the staging folder of a dead fill");
            self.note_orphans(&staging.dir)?;
            if let Err(error) = staging.remove() {
                tracing::warn!(%error, "the staging folder of a dead fill cannot be removed");
            }
        }
        Ok(())
    }

    /// Removes the temporary files of dead writers in `folder`. Returns the bytes freed.
    ///
    /// A writer holds the lock of its temporary file from before the first byte until the rename, or writes the file
    /// under the budget lock.
    fn drop_dead_temporaries(&mut self, folder: &RootedPath) -> Result<u64> {
        let mut freed = 0;
        for file in self.disk.temporaries(folder)? {
            if !self.disk.is_dead_temporary(&file) {
                // The writer of an empty file may be about to lock it. Where locks do not exclude, no lock shows that a
                // writer is alive. Both kinds are removed by age.
                file.remove_if_old();
                continue;
            }
            match files::remove_file(&file.path) {
                Ok(()) => freed += file.allocated(),
                Err(error) => tracing::warn!(%error, "a temporary file of a dead writer cannot be removed"),
            }
        }
        Ok(freed)
    }

    /// Records the blobs that lose a link when the folder `staging` is removed. If the name of a staged file does not
    /// contain its digest, only a sweep can find the blob, so a sweep becomes due.
    fn note_orphans(&self, staging: &RootedPath) -> Result<()> {
        for path in files::entries_below(staging)? {
            if files::stat(&path)?.is_some_and(|metadata| metadata.is_file() && metadata.nlink() > 1) {
                let name = path.name().split_once('.').map_or(path.name(), |(stem, _)| stem);
                let digest = name.strip_prefix("sha256-").and_then(|digest| digest.parse().ok());
                let mut maintenance = lock(&self.disk.0.maintenance);
                match digest {
                    Some(digest) => drop(maintenance.orphans.insert(digest)),
                    None => maintenance.swept = None,
                }
            }
        }
        Ok(())
    }

    /// Removes the recorded blobs that have no further link.
    fn drop_orphans(&mut self) -> Result<()> {
        let orphans = std::mem::take(&mut lock(&self.disk.0.maintenance).orphans);
        orphans.iter().try_for_each(|digest| self.drop_if_unlinked(&self.disk.layout().blob(digest)).map(drop))
    }

    /// Removes the views that the manifest of `artifact` does not list as held, or the whole artifact if it has no
    /// readable manifest. Does nothing if the artifact is in use.
    fn sweep_views(&mut self, artifact: &ScannedArtifact) -> Result<()> {
        let (dir, loose) = (&artifact.dir, artifact.loose_views()?);
        if loose.is_empty() && artifact.manifest.is_some() {
            return Ok(());
        }
        if !dir.is_ours()? || !self.disk.is_idle(dir.path())? {
            return Ok(());
        }
        let Some(_lease) = FileLock::try_exclusive(&self.disk.layout().lease(dir))? else { return Ok(()) };
        self.begin_change()?;
        // A view without a blob may or may not have been counted.
        if loose.iter().any(|path| files::stat(path).is_ok_and(|found| found.is_some_and(|m| m.nlink() == 1))) {
            self.distrust()?;
        }
        if artifact.manifest.is_none() {
            self.remove_artifact(dir)?;
        }
        loose.iter().try_for_each(files::remove_file)
    }

    /// Removes the quarantined files that have no other link.
    pub(super) fn drop_quarantine(&mut self) -> Result<()> {
        for path in files::entries(&self.disk.layout().quarantine())? {
            self.drop_if_unlinked(&path)?;
        }
        Ok(())
    }
}

impl ScannedArtifact {
    /// Returns the manifest entry of the file at `view`.
    fn entry_of(&self, view: &RootedPath) -> Option<&FileEntry> {
        let path = FilePath::new(view.below(&self.dir.files())?.to_str()?).ok()?;
        self.manifest.as_ref()?.files.get(&path)
    }

    /// Returns the views that the manifest does not list as held.
    pub(super) fn loose_views(&self) -> Result<Vec<RootedPath>> {
        let held = |path: &RootedPath| self.entry_of(path).is_some_and(|entry| entry.held.is_some());
        let mut loose = Vec::new();
        files::walk(&self.dir.files(), &mut |path, _| {
            if !held(path) {
                loose.push(path.to_owned());
            }
            Ok(())
        })?;
        Ok(loose)
    }
}

/// Outcome of an eviction.
#[derive(Debug)]
pub(crate) enum Evicted {
    /// The artifact was removed. The bytes freed.
    Freed(u64),
    /// The artifact was kept, for this reason.
    Kept(InTheWay),
}

/// Artifacts and fills that keep room from being made, for the error.
#[derive(Debug, Default)]
struct Obstacles {
    names: Vec<String>,
    /// True if at least one of them may go away by itself.
    for_now: bool,
}

impl Obstacles {
    fn add(&mut self, name: String, for_now: bool) {
        self.names.push(name);
        self.for_now |= for_now;
    }
}

/// State of a search for candidates for eviction.
#[derive(Debug)]
struct Search {
    /// The artifact that room is made for.
    own: ArtifactDir,
    /// The last artifact that was examined.
    cursor: Option<LastUseOrder>,
    obstacles: Obstacles,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the record in `file`, or `None` if it cannot be read or its checksum is wrong.
fn read_record(file: &std::fs::File) -> Option<Record> {
    let mut bytes = [0; RECORD_BYTES];
    let read = file.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(&bytes[..read]).ok()?.trim_end_matches(' ');
    let is_right = text.rsplit_once(CHECKSUM).is_some_and(|(record, _)| with_checksum(&format!("{record}}}")) == text);
    if is_right { serde_json::from_str(text).ok() } else { None }
}

/// Text before the checksum, which is the last field of the record.
const CHECKSUM: &str = r#","check":""#;

/// Returns the record with its checksum: the first eight hex digits of the SHA-256 of the text before it.
fn with_checksum(record: &str) -> String {
    let fields = record.strip_suffix('}').unwrap_or(record);
    let digest = Digest::of(fields.as_bytes()).to_string();
    format!("{fields}{CHECKSUM}{}\"}}", &digest[..8])
}

/// Returns the recorded total of a directory that is not open, if the record is clean and from this boot.
pub(super) fn recorded_total(layout: &super::Layout) -> Option<u64> {
    let file = layout.budget_lock().open(false).ok()?;
    read_record(&file).filter(|record| !record.dirty && record.boot_id == boot_id()).map(|record| record.total)
}

/// Returns the error for a budget lock that another process holds for too long.
fn held_too_long(path: &RootedPath) -> Error {
    let holder = path.open(false).ok().and_then(|file| read_record(&file)).map(|record| record.pid);
    let holder = holder.map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
    Error::new(
        ErrorKind::Unavailable,
        format!("the budget lock has been held for {} s by {holder}", LOCK_WAIT_MAX.as_secs()),
    )
    .tier(Tier::Disk)
    .hint("check whether that process is stopped; the lock is released when it ends")
}

/// Returns the kernel's identifier of this boot, or an empty text if the kernel reports none.
pub(super) fn boot_id() -> String {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    let read = || std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()); // outside the root
    BOOT_ID.get_or_init(|| read().unwrap_or_default()).clone()
}

#[cfg(test)]
pub(super) mod tests;
