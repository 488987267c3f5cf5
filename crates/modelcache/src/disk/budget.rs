//! The byte budget: the budget lock, a record of the counted bytes, and making room before anything is written.
//!
//! - These bytes count: the allocated bytes of blobs, quarantine, staging, temporary files and views without a blob,
//!   and the bytes that running fills have reserved and not yet written.
//! - The record is marked dirty before a change and written after it. A record that is dirty or from another boot is
//!   not used: the process that takes the lock counts again.
//! - A process that holds the budget lock does not wait. It tries each other lock once.
//! - A manifest is changed only under the budget lock, after a line was written to the change log. A process that has
//!   read the directory once learns of later changes from the log. Making room therefore reads only the evicted
//!   artifacts.

use super::change_log::Position;
use super::files;
use super::index::{Index, LastUseOrder, below_artifacts};
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::lock::{FileLock, LOCK_WAIT_MAX};
use super::pin::KeepReason;
use super::rooted::{Metadata, RootedPath};
use super::staging::StagingUse;
use super::{Disk, ScannedArtifact};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::human::bytes;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, Manifest};
use crate::option_name::setting::{DIR, MAX_BYTES, MIN_FREE_BYTES, REMOTE};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::sync::{MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime};

/// Size of the budget record in bytes. A record is padded to it, so that a shorter one overwrites a longer one
/// completely.
const RECORD_BYTES: usize = 256;
/// Minimum time without a change before an artifact or a leftover is removed, if locks do not exclude other processes.
const IDLE_MIN: Duration = Duration::from_secs(3600);
/// Minimum time between two sweeps of the whole directory by a process that makes room.
const SWEEP_INTERVAL: Duration = Duration::from_secs(6 * 3600);
/// Assumed size of a filesystem block in bytes. The allocated bytes of a file are a multiple of it.
const BLOCK_BYTES: u64 = 4096;

/// The budget record. It is stored in the lock file as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct BudgetRecord {
    /// Allocated bytes of blobs, quarantine, views without a blob, and temporary files beside manifests.
    total: u64,
    /// True while a change is in progress. Also true if the total is unknown, until a holder of the lock counts again.
    dirty: bool,
    boot_id: String,
    /// The process that wrote the record, for messages. A holder of the lock that has changed nothing has not written
    /// it.
    pid: u32,
    /// The end of the change log.
    changes: Position,
}

/// What this process knows about leftovers.
#[derive(Debug, Default)]
pub(super) struct Maintenance {
    /// Time of the last sweep of the whole directory; `None` if a sweep is due now.
    swept: Option<Instant>,
    /// Blobs that may have lost their last link from outside `blobs/` since that sweep.
    orphans: BTreeSet<Digest>,
}

/// Holds the budget lock. After a change, call [`release`](Self::release). If it is dropped instead, the record stays
/// dirty, and the next holder of the lock counts again.
#[derive(Debug)]
pub(crate) struct BudgetGuard<'disk> {
    disk: &'disk Disk,
    lock: FileLock,
    /// Allocated bytes of blobs, quarantine, views without a blob, and temporary files beside manifests.
    total: u64,
    /// True if the record on disk is marked dirty.
    dirty: bool,
    /// True if the total is unknown. The next sweep under this lock counts again; without one, the next holder does.
    total_is_unknown: bool,
    /// The end of the change log when the lock was taken.
    log_end_at_start: Position,
    /// The end of the change log now.
    log_end: Position,
    /// True if the index includes all changes before the lock was taken.
    index_is_current: bool,
    /// Artifacts that are being changed under this lock. The index reads their manifests again at each use.
    changing: Vec<ArtifactDir>,
    /// Number of links from staging and quarantine, by inode; `None` until they are counted at the first use.
    private_links: Option<HashMap<u64, u64>>,
    /// The key hashes of the artifacts with a pending upload; `None` until they are listed at the first use.
    pending_hashes: Option<HashSet<String>>,
    /// Blobs that were hashed before the lock was taken and had the right bytes, with their identity at that time.
    pub(super) verified_before: Vec<(Digest, FileIdentity)>,
}

/// The bytes that count against the budget, by kind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Blobs, quarantine, views without a blob, and temporary files beside manifests.
    pub(crate) published: u64,
    /// Files in staging folders.
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

/// Returns the number of bytes that a file of `size` bytes is expected to take on disk.
pub(crate) fn allocated_for(size: u64) -> u64 {
    size.next_multiple_of(BLOCK_BYTES)
}

impl Disk {
    /// Takes the budget lock.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if another process holds the lock for longer than [`LOCK_WAIT_MAX`].
    pub(crate) fn lock_budget(&self) -> Result<BudgetGuard<'_>> {
        self.lock_budget_within(LOCK_WAIT_MAX)
    }

    /// Takes the budget lock like [`lock_budget`](Self::lock_budget). Waits for at most `wait_max`.
    pub(super) fn lock_budget_within(&self, wait_max: Duration) -> Result<BudgetGuard<'_>> {
        let path = self.layout().budget_lock();
        let lock = FileLock::wait_exclusive(&path, wait_max)?.ok_or_else(|| held_too_long(&path, wait_max))?;
        let record = read_record(lock.file());
        // Without a record, the end of the log is unknown: start a new log.
        let log_end = record.as_ref().map_or_else(Position::fresh, |record| record.changes);
        let mut guard = BudgetGuard {
            disk: self,
            lock,
            total: 0,
            dirty: false,
            total_is_unknown: false,
            log_end_at_start: log_end,
            log_end,
            index_is_current: false,
            changing: Vec::new(),
            private_links: None,
            pending_hashes: None,
            verified_before: Vec::new(),
        };
        match record {
            // Two processes may hold the lock at the same time and overwrite each other's total, so count.
            Some(_) if !self.locks_are_honest() => guard.total = self.published_bytes()?,
            Some(record) if !record.dirty && record.boot_id == boot_id() => guard.total = record.total,
            // The record is new, damaged, dirty, or from before a reboot that may have lost changes.
            _ => guard.rebuild_record()?,
        }
        Ok(guard)
    }

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
            for version_dir in files::entries_if_accessible(&name_dir)? {
                total += self.temporaries(&version_dir)?.iter().map(|file| file.allocated()).sum::<u64>();
                // A view that is a link to a blob was already counted as the blob.
                let views = ArtifactDir(version_dir).files();
                let walked = files::walk(&views, &mut |_, metadata| {
                    if counted.insert(metadata.ino()) {
                        total += metadata.allocated();
                    }
                    Ok(())
                });
                files::unless_inaccessible(walked, &views)?;
            }
        }
        Ok(total)
    }

    /// Returns true if the artifact folder or staging folder `dir` was not changed for [`IDLE_MIN`].
    ///
    /// Always returns true if locks exclude other processes: then a lock shows whether `dir` is in use.
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

impl BudgetGuard<'_> {
    /// Returns the directory that this budget lock belongs to.
    pub(crate) fn disk(&self) -> Disk {
        self.disk.clone()
    }

    /// Marks the record dirty. Call this before files that count are changed.
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
        // First write the line, then the record with the new length. A line beyond that length is overwritten later.
        let folder = below_artifacts(self.disk, dir);
        self.log_end =
            folder.map_or_else(Position::fresh, |folder| self.log_end.append(&self.disk.layout().changes(), &folder));
        self.changing.push(dir.clone());
        self.dirty = true;
        self.write_record()
    }

    /// Updates the index after a change of the artifact in `dir`.
    fn end_change_of(&mut self, dir: &ArtifactDir) -> Result<()> {
        self.changing.retain(|changing| changing != dir);
        if self.index_is_current { self.disk.0.index.lock().refresh(self.disk, dir) } else { Ok(()) }
    }

    /// Returns the index as of now. Drop the returned guard before the next call of a method, which may lock the index.
    pub(super) fn index(&mut self) -> Result<MutexGuard<'_, Index>> {
        let mut index = self.disk.0.index.lock();
        // If two processes may hold the lock at the same time, the log is incomplete.
        let is_current = self.index_is_current
            || self.disk.locks_are_honest() && index.catch_up(self.disk, self.log_end_at_start)?;
        if !is_current {
            *index = Index::read(self.disk, self.log_end_at_start)?;
        }
        self.index_is_current = true;
        // A line is written to the log before the change that it names, so the index may lack the outcome of the
        // change.
        for dir in &self.changing {
            index.refresh(self.disk, dir)?;
        }
        Ok(index)
    }

    /// Adds the bytes of a new blob, or of a new view without a blob.
    pub(crate) fn add(&mut self, bytes: u64) {
        debug_assert!(self.dirty, "`begin_change` must be called before counted files are changed");
        self.total += bytes;
    }

    /// Subtracts the bytes of a removed file.
    pub(crate) fn subtract(&mut self, bytes: u64) {
        debug_assert!(self.dirty, "`begin_change` must be called before counted files are changed");
        self.total = self.total.saturating_sub(bytes);
    }

    /// Marks the total as unknown. The next sweep under this lock counts again. Without a sweep, the record stays
    /// dirty, and the next holder of the lock counts.
    pub(crate) fn mark_total_unknown(&mut self) -> Result<()> {
        self.total_is_unknown = true;
        self.begin_change()
    }

    /// Writes the record and releases the lock.
    pub(crate) fn release(mut self) -> Result<()> {
        if self.dirty && !self.total_is_unknown {
            self.dirty = false;
            self.write_record()?;
        }
        Ok(())
    }

    /// Writes the record, padded to [`RECORD_BYTES`]. It is not synced: after a reboot the bytes are counted again.
    fn write_record(&self) -> Result<()> {
        // If two processes may hold the lock at the same time, the total is not reliable: the next holder counts.
        let dirty = self.dirty || !self.disk.locks_are_honest();
        let record = BudgetRecord {
            total: self.total,
            dirty,
            boot_id: boot_id(),
            pid: std::process::id(),
            changes: self.log_end,
        };
        let mut bytes = with_checksum(&serde_json::to_string(&record).unwrap_or_default()).into_bytes();
        bytes.resize(RECORD_BYTES, b' ');
        self.lock.file().write_all_at(&bytes, 0).at("write", &self.disk.layout().budget_lock())
    }

    /// Sweeps the directory, counts the published bytes, and writes a clean record.
    fn rebuild_record(&mut self) -> Result<()> {
        self.mark_total_unknown()?;
        self.sweep()?;
        self.dirty = false;
        self.write_record()
    }

    /// Counts the published bytes by a scan of all files, and sets the total.
    pub(super) fn recount(&mut self) -> Result<()> {
        self.begin_change()?;
        self.total = self.disk.published_bytes()?;
        self.total_is_unknown = false;
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

    /// Returns the bytes to free before `extra` more bytes fit into the budget and leave the minimum of free space on
    /// the filesystem; 0 if they fit.
    fn shortfall(&self, extra: u64) -> Result<u64> {
        let (usage, space) = (self.usage()?, self.disk.space()?);
        let over_budget = (usage.counted() + extra).saturating_sub(space.budget);
        // Reserved bytes are not written yet. The filesystem still reports them as free.
        let below_min_free = (space.min_free + usage.reserved + extra).saturating_sub(space.free);
        Ok(over_budget.max(below_min_free))
    }

    /// Makes room for `extra` bytes that a fill of `key` will write.
    ///
    /// The artifact `key` is not evicted. If evicting all other candidates would not make enough room, none is evicted.
    ///
    /// # Errors
    /// [`ErrorKind::Full`], with the names of the obstacles. The error is transient if an obstacle may go away by
    /// itself.
    pub(crate) fn make_space(&mut self, extra: u64, key: &ArtifactKey) -> Result<()> {
        if self.shortfall(extra)? == 0 {
            return Ok(());
        }
        // Step 1: remove leftovers of dead fills and dead writers.
        self.remove_dead_stagings(|_| true)?;
        self.remove_dead_temporaries(&self.disk.layout().stagings())?;
        // Step 2: remove views that no manifest lists as held, and blobs without a further link. Finding all of them
        // reads the whole directory, so between two sweeps remove only the recorded orphans.
        let is_sweep_due = self.disk.0.maintenance.lock().swept.is_none_or(|swept| swept.elapsed() > SWEEP_INTERVAL);
        if is_sweep_due { self.sweep() } else { self.remove_orphans() }?;
        // Step 3: remove quarantined files.
        if self.shortfall(extra)? > 0 {
            self.remove_quarantined()?;
        }
        // Step 4: evict artifacts, least recently used first.
        match self.evict_for(extra, key)? {
            Some(_) if !is_sweep_due => {
                // Sweep and try again before refusing: another process may have left files behind, or may have changed
                // a manifest without a line in the change log.
                self.sweep()?;
                self.remove_quarantined()?;
                self.evict_for(extra, key)?.map_or(Ok(()), Err)
            }
            refusal => refusal.map_or(Ok(()), Err),
        }
    }

    /// Evicts artifacts until there is room for `extra` bytes that a fill of `key` will write. Returns the error if
    /// there cannot be enough room.
    fn evict_for(&mut self, extra: u64, key: &ArtifactKey) -> Result<Option<Error>> {
        let own = self.disk.layout().artifact(key);
        let mut search = VictimSearch { own, cursor: None, obstacles: Obstacles::default() };
        // The bytes of another running fill cannot be freed before the fill ends. It is a transient obstacle.
        let fills = self.disk.stagings()?;
        let others = fills.iter().filter(|staging| staging.live && !staging.is_of(key));
        others.for_each(|staging| search.obstacles.add(staging.description(), true));
        loop {
            let shortfall = self.shortfall(extra)?;
            if shortfall == 0 {
                return Ok(None);
            }
            let Some(victims) = self.victims(shortfall, &mut search)? else {
                return Ok(Some(self.no_space_error(extra, shortfall, &search.obstacles)));
            };
            for victim in &victims {
                // The previous eviction may have freed more than expected.
                if self.shortfall(extra)? == 0 {
                    return Ok(None);
                }
                // The artifact may have been leased or pinned since it was chosen. Then the outer loop chooses others.
                if let EvictOutcome::Kept(reason) = self.evict(victim)? {
                    search.obstacles.add(format!("{} is {reason}", victim.name()), reason.is_transient());
                }
            }
        }
    }

    /// Returns the next candidates for eviction, least recently used first, as many as are needed to free `bytes`.
    /// Returns `None` if all remaining candidates would free less.
    fn victims(&mut self, bytes: u64, search: &mut VictimSearch) -> Result<Option<Vec<ScannedArtifact>>> {
        let (mut victims, mut removed_links, mut freed) = (Vec::new(), HashMap::new(), 0);
        while freed < bytes {
            let Some(artifact) = self.next_by_use(search)? else { return Ok(None) };
            if artifact.dir == search.own {
                continue;
            }
            let obstacle = match self.disk.lease_or_pin(&artifact.dir)? {
                Some(reason) => Some(reason),
                None if self.is_only_copy(&artifact)? => Some(KeepReason::OnlyCopy),
                None => self.reason_to_spare(&artifact)?,
            };
            match obstacle {
                Some(reason) => {
                    search.obstacles.only_copies |= reason == KeepReason::OnlyCopy;
                    search.obstacles.add(format!("{} is {reason}", artifact.name()), reason.is_transient());
                }
                None => {
                    freed += self.bytes_freed_by(&artifact, &mut removed_links)?;
                    victims.push(artifact);
                }
            }
        }
        Ok(Some(victims))
    }

    /// Returns the next artifact in the order of last use. An artifact that was used since it was indexed is returned
    /// later.
    fn next_by_use(&mut self, search: &mut VictimSearch) -> Result<Option<ScannedArtifact>> {
        loop {
            let Some(cursor) = self.index()?.next(search.cursor.as_ref()) else { return Ok(None) };
            let dir = ArtifactDir(self.disk.layout().artifacts().join(&cursor.1));
            // `last-used` is touched without a line in the change log, so examine the file.
            let last_used = self.disk.last_used(&dir)?;
            if last_used != cursor.0 {
                self.index()?.set_last_used(&cursor.1, last_used);
            }
            let was_used = last_used > cursor.0;
            search.cursor = Some(cursor);
            // An artifact that was used is skipped: the search finds it again at its new place in the order.
            if !was_used && let Some(artifact) = self.disk.scan_one(&dir)? {
                return Ok(Some(artifact));
            }
        }
    }

    /// Returns the bytes that removing an artifact would free, if the links counted in `removed_links` (number by
    /// inode) were removed before. Adds the artifact's own links to `removed_links`.
    fn bytes_freed_by(&self, artifact: &ScannedArtifact, removed_links: &mut HashMap<u64, u64>) -> Result<u64> {
        let mut freed = 0;
        self.disk.hub_links(&artifact.dir, &mut |_, metadata| {
            *removed_links.entry(metadata.ino()).or_default() += 1;
            Ok(())
        })?;
        files::walk(&artifact.dir.files(), &mut |view, metadata| {
            let links = removed_links.entry(metadata.ino()).or_default();
            *links += 1;
            // The blob is removed with its last view, so the link in `blobs/` does not keep the bytes allocated.
            let is_blob = self.is_blob(metadata.ino(), artifact.entry_of(view).and_then(|entry| entry.sha256))?;
            if *links + u64::from(is_blob) == metadata.nlink() {
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

    /// Returns the error for a fill that does not fit. It states the bytes needed, the bounds and the obstacles.
    fn no_space_error(&self, extra: u64, shortfall: u64, obstacles: &Obstacles) -> Error {
        let counted = self.usage().map(|usage| usage.counted()).unwrap_or(self.total);
        let mut message = format!("no room for {} more: {} must be freed", bytes(extra), bytes(shortfall));
        if let Ok(space) = self.disk.space() {
            message.push_str(&format!(
                " (budget {} with {} in use; filesystem {} free, of which {} must stay free)",
                bytes(space.budget),
                bytes(counted),
                bytes(space.free),
                bytes(space.min_free)
            ));
        }
        if !obstacles.descriptions.is_empty() {
            message.push_str(&format!("; in the way: {}", obstacles.descriptions.join("; ")));
        }
        let over_budget = self.disk.space().is_ok_and(|space| counted + extra > space.budget);
        let hint = match over_budget {
            true => format!("raise {MAX_BYTES}, or release or unpin the artifacts in the way"),
            false => {
                format!("free space on this filesystem, lower {MIN_FREE_BYTES}, or point {DIR} to a larger one")
            }
        };
        let only_copies = match obstacles.only_copies {
            true => {
                format!(
                    "; an artifact that is the only copy: upload it (set {REMOTE}, then `modelcache backfill`), or \
                     remove it (`modelcache evict NAME@VERSION --tier disk --yes`)"
                )
            }
            false => String::new(),
        };
        let error = Error::new(ErrorKind::Full, message).tier(Tier::Disk).transient(obstacles.transient);
        error.hint(format!("{hint}{only_copies}"))
    }

    /// Evicts one artifact, unless it is leased or pinned, or was used since it was scanned.
    pub(crate) fn evict(&mut self, artifact: &ScannedArtifact) -> Result<EvictOutcome> {
        // Try once: a process that holds the budget lock does not wait.
        let Some(_lease) = FileLock::try_exclusive(&self.disk.layout().lease_lock(&artifact.dir))? else {
            return Ok(EvictOutcome::Kept(KeepReason::Leased(self.disk.lease_holders(&artifact.dir))));
        };
        // Check again under the exclusive lease: pins and the time of last use change only under the shared lease.
        if let Some(pin) = self.disk.pin_in(&artifact.dir)? {
            return Ok(EvictOutcome::Kept(KeepReason::Pinned(pin)));
        }
        if self.disk.last_used(&artifact.dir)? != artifact.last_used {
            return Ok(EvictOutcome::Kept(KeepReason::JustUsed));
        }
        tracing::debug!(artifact = artifact.name(), "evicting");
        let removed = self.remove_artifact(&artifact.dir);
        let Some(freed) = files::unless_inaccessible(removed, artifact.dir.path())? else {
            // A part of the artifact may have been removed.
            self.mark_total_unknown()?;
            return Ok(EvictOutcome::Kept(KeepReason::NotRemovable));
        };
        tracing::info!(artifact = artifact.name(), freed_bytes = freed, "evicted");
        self.disk.metrics().record_eviction(freed);
        Ok(EvictOutcome::Freed(freed))
    }

    /// Returns true if no other tier is known to have the artifact: it has no origin that keeps old versions, and an
    /// upload of it is pending or was never begun, because it was put without a remote.
    pub(super) fn is_only_copy(&mut self, artifact: &ScannedArtifact) -> Result<bool> {
        let pending = match self.pending_hashes.take() {
            Some(hashes) => hashes,
            None => self.disk.pending_hashes()?,
        };
        Ok(artifact.is_only_copy(self.pending_hashes.insert(pending)))
    }

    /// Returns the reason not to evict this artifact when room is made; `None` if it may be evicted.
    ///
    /// There are two reasons. The artifact was changed lately and locks do not exclude other processes, so it may be in
    /// use. Or each of its files has a link outside the cache, so evicting it would free no bytes.
    pub(super) fn reason_to_spare(&mut self, artifact: &ScannedArtifact) -> Result<Option<KeepReason>> {
        let Some(manifest) = &artifact.manifest else { return Ok(None) };
        if !self.disk.is_idle(artifact.dir.path())? {
            return Ok(Some(KeepReason::UsedLately));
        }
        let mut held = false;
        for (path, entry) in manifest.files.iter().filter(|(_, entry)| entry.held.is_some()) {
            let Some(view) = files::stat(&artifact.dir.view(path))? else { return Ok(None) };
            // All links to this file are inside the cache, so its bytes can be freed.
            if view.nlink() <= self.links_inside(view.ino(), entry.sha256)? {
                return Ok(None);
            }
            held = true;
        }
        Ok(held.then_some(KeepReason::LinkedOutside))
    }

    /// Returns the number of links to `inode` inside the cache: the blob of `digest`, staged and quarantined files, the
    /// views that manifests record, and the links below `hub/`.
    fn links_inside(&mut self, inode: u64, digest: Option<Digest>) -> Result<u64> {
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
        // If a symbolic link is in the place of a folder, remove nothing through it.
        if !dir.is_real_folder()? {
            return Ok(0);
        }
        let manifest = self.disk.read_manifest(dir).unwrap_or(None);
        // Remove the links below `hub/` while the manifest exists: after a crash at this point, the artifact is
        // complete and lacks only these links.
        self.remove_hub_layout(dir, manifest.as_ref())?;
        let mut freed = self.subtract_copies(dir, manifest.as_ref())?;
        // Remove the manifest before the files: after a crash at this point, a sweep removes the rest as a leftover.
        files::remove_file(&dir.manifest())?;
        self.disk.remove_pending_upload(&dir.hash())?;
        files::remove_unless_open(&dir.files())?;
        if !files::remove_unless_open(dir.path())? {
            // Without a manifest, the next sweep finds the rest of the folder. It is unknown which bytes stay.
            tracing::warn!(folder = %dir.path(), "a removed artifact leaves a folder, because a file in it is still open; the next clean-up removes it");
            self.mark_total_unknown()?;
        }
        // This fails while the folder contains another version.
        if let Some(name_dir) = dir.path().parent() {
            let _ = name_dir.remove_dir();
        }
        self.end_change_of(dir)?;
        // Remove the blobs last, when the views no longer link to them.
        for digest in manifest.iter().flat_map(|manifest| manifest.files.values()).filter_map(|entry| entry.sha256) {
            freed += self.remove_if_last_link(&self.disk.layout().blob(&digest))?;
        }
        Ok(freed)
    }

    /// Subtracts from the total the bytes of the views of `dir` that have no blob, because the caller removes them
    /// next. Returns the bytes that their removal frees.
    fn subtract_copies(&mut self, dir: &ArtifactDir, manifest: Option<&Manifest>) -> Result<u64> {
        let entries = || manifest.iter().flat_map(|manifest| manifest.files.values());
        let recorded: HashSet<FileIdentity> = entries().filter_map(FileEntry::recorded_on_disk).collect();
        let mut blobs = HashSet::new();
        for digest in entries().filter_map(|entry| entry.sha256) {
            blobs.extend(files::stat(&self.disk.layout().blob(&digest))?.map(|metadata| metadata.ino()));
        }
        // The number of views and the metadata, by inode.
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
                // The file was changed, or was created after the last count. It is unknown whether the total includes
                // it.
                self.mark_total_unknown()?;
            }
            if metadata.nlink() == links {
                freed += metadata.allocated();
            }
        }
        Ok(freed)
    }

    /// Removes the blob or quarantined file at `path` if no other link to it exists. Returns the bytes freed.
    pub(super) fn remove_if_last_link(&mut self, path: &RootedPath) -> Result<u64> {
        match files::stat(path)? {
            Some(metadata) if metadata.is_file() && metadata.nlink() == 1 => {
                self.begin_change()?;
                if files::unless_inaccessible(files::remove_file(path), path)?.is_none() {
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
    /// Leftovers are staging folders that cannot be resumed, temporary files, views that no manifest lists as held, and
    /// blobs without a further link.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        // Step 1: remove staging folders that cannot be resumed.
        self.remove_dead_stagings(|staging| !staging.may_be_resumed())?;
        // Step 2: remove temporary files of dead writers.
        for folder in [self.disk.layout().stagings(), self.disk.layout().locks(), self.disk.layout().blobs()] {
            self.remove_dead_temporaries(&folder)?;
        }
        // Step 3: in each artifact, remove temporary files and the views that are not held. Build the index in the same
        // pass.
        let (disk, mut index) = (self.disk, Index::as_of(self.log_end_at_start));
        disk.scan_each(&mut |artifact| {
            if self.remove_dead_temporaries(artifact.dir.path())? > 0 {
                // The last count may have included these files.
                self.mark_total_unknown()?;
            }
            let swept = self.sweep_views(&artifact);
            if files::unless_inaccessible(swept, artifact.dir.path())?.is_none() {
                self.mark_total_unknown()?;
            }
            if artifact.manifest.is_some() || files::stat(artifact.dir.path())?.is_some() {
                index.insert(disk, &artifact);
            }
            Ok(())
        })?;
        *disk.0.index.lock() = index;
        self.index_is_current = true;
        // Step 4: remove the blobs without a further link. This comes after the views, which are links to blobs.
        let mut unlinked = Vec::new();
        files::walk(&self.disk.layout().blobs(), &mut |path, metadata| {
            if metadata.nlink() == 1 {
                unlinked.push(path.to_owned());
            }
            Ok(())
        })?;
        for blob in unlinked {
            self.remove_if_last_link(&blob)?;
        }
        // Step 5: record the time of the sweep, and count again if the total is unknown.
        *self.disk.0.maintenance.lock() = Maintenance { swept: Some(Instant::now()), orphans: BTreeSet::new() };
        if self.total_is_unknown {
            self.total = self.disk.published_bytes()?;
            self.total_is_unknown = false;
        }
        Ok(())
    }

    /// Removes those staging folders of dead fills for which `unwanted` returns true.
    pub(crate) fn remove_dead_stagings(&mut self, unwanted: impl Fn(&StagingUse) -> bool) -> Result<()> {
        for staging in self.disk.stagings()?.into_iter().filter(|staging| !staging.live && unwanted(staging)) {
            // Hold the owner lock during the removal, so that no other fill adopts the folder.
            let owner = FileLock::try_existing(&staging.journal())?;
            if matches!(owner, Some(None)) {
                continue;
            }
            tracing::debug!(staging = %staging.dir, bytes = staging.allocated, "removing the staging folder of a dead fill");
            self.record_orphans(&staging.dir)?;
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
    fn remove_dead_temporaries(&mut self, folder: &RootedPath) -> Result<u64> {
        let mut freed = 0;
        for file in self.disk.temporaries(folder)? {
            if !self.disk.is_dead_temporary(&file) {
                // The writer may be alive: it may be about to lock an empty file, or locks may not exclude other
                // processes. Remove such a file only if it is old.
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

    /// Records the blobs that lose a link when the staging folder `staging` is removed. If the name of a staged file
    /// does not contain its digest, only a sweep can find the blob. Then a sweep becomes due.
    fn record_orphans(&self, staging: &RootedPath) -> Result<()> {
        for path in files::entries_if_accessible(staging)? {
            if files::stat(&path)?.is_some_and(|metadata| metadata.is_file() && metadata.nlink() > 1) {
                let name = path.name().split_once('.').map_or(path.name(), |(stem, _)| stem);
                let digest = name.strip_prefix("sha256-").and_then(|digest| digest.parse().ok());
                let mut maintenance = self.disk.0.maintenance.lock();
                match digest {
                    Some(digest) => drop(maintenance.orphans.insert(digest)),
                    None => maintenance.swept = None,
                }
            }
        }
        Ok(())
    }

    /// Removes the recorded blobs that have no further link.
    fn remove_orphans(&mut self) -> Result<()> {
        let orphans = std::mem::take(&mut self.disk.0.maintenance.lock().orphans);
        orphans.iter().try_for_each(|digest| self.remove_if_last_link(&self.disk.layout().blob(digest)).map(drop))
    }

    /// Removes the views that the manifest of `artifact` does not list as held, or the whole artifact if it has no
    /// readable manifest. Does nothing if the artifact is in use.
    fn sweep_views(&mut self, artifact: &ScannedArtifact) -> Result<()> {
        let (dir, unheld) = (&artifact.dir, artifact.unheld_views()?);
        if unheld.is_empty() && artifact.manifest.is_some() {
            return Ok(());
        }
        if !dir.is_real_folder()? || !self.disk.is_idle(dir.path())? {
            return Ok(());
        }
        let Some(_lease) = FileLock::try_exclusive(&self.disk.layout().lease_lock(dir))? else { return Ok(()) };
        self.begin_change()?;
        // It is unknown whether the total includes a view without a blob.
        if unheld.iter().any(|path| files::stat(path).is_ok_and(|found| found.is_some_and(|m| m.nlink() == 1))) {
            self.mark_total_unknown()?;
        }
        if artifact.manifest.is_none() {
            self.remove_artifact(dir)?;
        }
        unheld.iter().try_for_each(files::remove_file)
    }

    /// Removes the quarantined files that have no other link.
    pub(super) fn remove_quarantined(&mut self) -> Result<()> {
        for path in files::entries(&self.disk.layout().quarantine())? {
            self.remove_if_last_link(&path)?;
        }
        Ok(())
    }
}

impl ScannedArtifact {
    /// Returns true if no other tier is known to have the artifact. `pending` is the result of
    /// [`Disk::pending_hashes`].
    pub(super) fn is_only_copy(&self, pending: &HashSet<String>) -> bool {
        let is_at_origin = self.manifest.as_ref().is_some_and(|m| m.key.name.origin_keeps_versions());
        !is_at_origin && pending.contains(&self.dir.hash())
    }

    /// Returns the manifest entry of the file at `view`.
    fn entry_of(&self, view: &RootedPath) -> Option<&FileEntry> {
        let path = FilePath::new(view.below(&self.dir.files())?.to_str()?).ok()?;
        self.manifest.as_ref()?.files.get(&path)
    }

    /// Returns the views that the manifest does not list as held.
    pub(super) fn unheld_views(&self) -> Result<Vec<RootedPath>> {
        let is_held = |path: &RootedPath| self.entry_of(path).is_some_and(|entry| entry.held.is_some());
        let mut unheld = Vec::new();
        files::walk(&self.dir.files(), &mut |path, _| {
            if !is_held(path) {
                unheld.push(path.to_owned());
            }
            Ok(())
        })?;
        Ok(unheld)
    }
}

/// Outcome of an eviction.
#[derive(Debug)]
pub(crate) enum EvictOutcome {
    /// The artifact was removed. Carries the number of bytes freed.
    Freed(u64),
    /// The artifact was not removed. Carries the reason.
    Kept(KeepReason),
}

/// The artifacts and fills that prevent making room, for the error message.
#[derive(Debug, Default)]
struct Obstacles {
    descriptions: Vec<String>,
    /// True if at least one of them may go away by itself.
    transient: bool,
    /// True if at least one of them is the only copy of an artifact.
    only_copies: bool,
}

impl Obstacles {
    fn add(&mut self, description: String, transient: bool) {
        self.descriptions.push(description);
        self.transient |= transient;
    }
}

/// State of a search for candidates for eviction.
#[derive(Debug)]
struct VictimSearch {
    /// The artifact for which room is made. It is not evicted.
    own: ArtifactDir,
    /// The last artifact that was examined.
    cursor: Option<LastUseOrder>,
    obstacles: Obstacles,
}

/// Returns the record in `file`, or `None` if it cannot be read or its checksum is wrong.
fn read_record(file: &std::fs::File) -> Option<BudgetRecord> {
    let mut bytes = [0; RECORD_BYTES];
    let read = file.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(&bytes[..read]).ok()?.trim_end_matches(' ');
    let is_intact = text.rsplit_once(CHECKSUM).is_some_and(|(record, _)| with_checksum(&format!("{record}}}")) == text);
    if is_intact { serde_json::from_str(text).ok() } else { None }
}

/// The text before the checksum. The checksum is the last field of the record.
const CHECKSUM: &str = r#","check":""#;

/// Returns the record with its checksum: the first eight hex digits of the SHA-256 of the text before it.
fn with_checksum(record: &str) -> String {
    let fields = record.strip_suffix('}').unwrap_or(record);
    let digest = Digest::of(fields.as_bytes()).to_string();
    format!("{fields}{CHECKSUM}{}\"}}", &digest[..8])
}

/// Reads the recorded total without taking the lock; `None` if the record is dirty or from another boot.
pub(super) fn recorded_total(layout: &super::Layout) -> Option<u64> {
    let file = layout.budget_lock().open(false).ok()?;
    read_record(&file).filter(|record| !record.dirty && record.boot_id == boot_id()).map(|record| record.total)
}

/// Returns the error for a budget lock that another process has held for `waited`.
fn held_too_long(path: &RootedPath, waited: Duration) -> Error {
    let writer = path.open(false).ok().and_then(|file| read_record(&file)).map(|record| record.pid);
    let writer = writer.map_or_else(String::new, |pid| format!("; its record was last written by process {pid}"));
    Error::new(ErrorKind::Unavailable, format!("the budget lock has been held for {} s{writer}", waited.as_secs()))
        .tier(Tier::Disk)
        .hint(
            "check whether a process that uses this directory hangs or is suspended; the lock is released when that \
             process ends",
        )
}

/// Returns the kernel's identifier of this boot, or an empty text if the kernel reports none.
pub(super) fn boot_id() -> String {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    let read = || std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()); // not below the root
    BOOT_ID.get_or_init(|| read().unwrap_or_default()).clone()
}

#[cfg(test)]
pub(super) mod tests;
