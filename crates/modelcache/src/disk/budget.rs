//! The byte budget: one short lock, one record, room made before anything is written.
//!
//! Counted are the allocated bytes of blobs, quarantine and staging, and what live fills have reserved beyond that. The
//! record keeps the total of blobs, quarantine and views that no blob stands behind; it is marked dirty before a change
//! and written after it, so that whoever finds it dirty (or from another boot) counts again instead of trusting it.
//! Whoever holds the budget waits for nothing: other locks are tried once.
//!
//! Manifests change within budget holds, and each change is announced in the change log first, so that a process that has
//! read the directory once keeps up with what others do. Making room then costs what goes, not what is there: victims are
//! sought from the least recently used on, and only as many are looked at as are needed. The directory is looked through
//! as a whole the first time that a process is short of room, rarely after that, and always before room is refused.

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
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long to wait for the budget lock, which is held for moments.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(30);
/// Bytes of the record; it is padded, so that a shorter one leaves nothing of a longer one.
const RECORD_BYTES: usize = 256;
/// How long something must have been left alone before it is evicted or swept where locks do not tell who uses it.
const IDLE_MIN: Duration = Duration::from_secs(3600);
/// How long after a release was last seen that announces no change one of its changes may still be under way.
const MIXED_MAX: Duration = Duration::from_secs(600);
/// How often a process that is short of room looks through the whole directory for what nobody can use any more.
const SWEEP_EVERY: Duration = Duration::from_secs(6 * 3600);
/// What a file's last block may waste.
const BLOCK_BYTES: u64 = 4096;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    total: u64,
    dirty: bool,
    boot_id: String,
    pid: u32,
    /// How far the change log goes; older releases leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    changes: Option<Position>,
    /// When such a release was last seen to write this, in seconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mixed_unix: Option<u64>,
}

/// What this process tidied up in the directory, and what it knows to be left.
#[derive(Debug, Default)]
pub(super) struct Maintenance {
    /// When all of it was last looked through.
    swept: Option<Instant>,
    /// Blobs that may have lost their last link beside their own since.
    orphans: BTreeSet<Digest>,
}

/// The budget lock, held. Changes must end with [`release`](Self::release); otherwise the next holder counts again.
#[derive(Debug)]
pub(crate) struct BudgetHold<'disk> {
    disk: &'disk Disk,
    lock: FileLock,
    /// Allocated bytes of blobs, quarantine, and views without a blob.
    total: u64,
    dirty: bool,
    /// The total is no longer known: count again at the next sweep, or let the next holder do it.
    distrusted: bool,
    /// How far the change log went when the hold began, and goes now.
    began_at: Position,
    at: Position,
    /// When a release that announces no change was last seen, unless that is long ago.
    mixed_unix: Option<u64>,
    /// Whether the index has been brought up to the beginning of this hold.
    is_synced: bool,
    /// Artifacts whose manifests this hold is changing.
    announced: Vec<ArtifactDir>,
    /// Links from staging and quarantine to each inode, counted when first asked for.
    private_links: Option<HashMap<u64, u64>>,
    /// Files whose bytes were found right before this hold began.
    pub(super) found_right: Vec<(Digest, FileIdentity)>,
}

/// What counts, by kind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Blobs, quarantine, and views without a blob.
    pub(crate) published: u64,
    /// What fills have written.
    pub(crate) staging: u64,
    /// What live fills have reserved beyond what they have written.
    pub(crate) reserved: u64,
    /// Temporary files in the staging folder, of living and dead writers.
    pub(crate) temporary: u64,
}

impl Usage {
    pub(crate) fn counted(&self) -> u64 {
        self.published + self.staging + self.reserved + self.temporary
    }
}

/// Bytes that a file of `size` bytes will take.
pub(crate) fn allocated_for(size: u64) -> u64 {
    size.next_multiple_of(BLOCK_BYTES)
}

impl Disk {
    /// Takes the budget lock, within a bounded time.
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
        let (at, mixed_unix) = standing_of(record.as_ref());
        let mut hold = BudgetHold {
            disk: self,
            lock,
            total: 0,
            dirty: false,
            distrusted: false,
            began_at: at,
            at,
            mixed_unix,
            is_synced: false,
            announced: Vec::new(),
            private_links: None,
            found_right: Vec::new(),
        };
        match record {
            // Two may hold it at once, and each overwrites what the other counted.
            Some(_) if !self.locks_are_honest() => hold.total = self.published_bytes()?,
            Some(record) if !record.dirty && record.boot_id == boot_id() => hold.total = record.total,
            _ => hold.recount()?,
        }
        Ok(hold)
    }
}

impl Disk {
    /// Counts blobs, quarantine, and views that no blob stands behind.
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
            for version_dir in files::entries(&name_dir)? {
                total += self.temporaries(&version_dir)?.iter().map(|file| file.allocated()).sum::<u64>();
                files::walk(&ArtifactDir(version_dir).files(), &mut |_, metadata| {
                    if counted.insert(metadata.ino()) {
                        total += metadata.allocated();
                    }
                    Ok(())
                })?;
            }
        }
        Ok(total)
    }

    /// Whether nobody has been at work on the artifact or staging in `dir` for long: of two signs that it is not in use
    /// the one that needs no locks. Always, where locks tell.
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
    /// The directory whose budget is held.
    pub(crate) fn disk(&self) -> Disk {
        self.disk.clone()
    }

    /// Marks the record dirty, before the first change.
    pub(crate) fn begin_change(&mut self) -> Result<()> {
        if !self.dirty {
            self.dirty = true;
            self.write_record()?;
        }
        Ok(())
    }

    /// Announces that the manifest of the artifact in `dir` is about to change, or to go.
    pub(crate) fn begin_change_of(&mut self, dir: &ArtifactDir) -> Result<()> {
        let folder = below_artifacts(self.disk, dir);
        self.at = folder.map_or_else(Position::fresh, |folder| self.at.note(&self.disk.layout().changes(), &folder));
        self.announced.push(dir.clone());
        self.dirty = true;
        self.write_record()
    }

    /// The change of the artifact in `dir` is made.
    fn end_change_of(&mut self, dir: &ArtifactDir) -> Result<()> {
        self.announced.retain(|announced| announced != dir);
        if self.is_synced { lock(&self.disk.0.index).refresh(self.disk, dir) } else { Ok(()) }
    }

    /// What the artifacts hold, as of now. Keep it for no longer than a question takes.
    pub(super) fn index(&mut self) -> Result<MutexGuard<'_, Index>> {
        let mut index = lock(&self.disk.0.index);
        // What was changed without a word, or by two at once, is seen by reading everything only.
        let is_told = self.disk.locks_are_honest() && self.mixed_unix.is_none();
        let is_current = self.is_synced || is_told && index.catch_up(self.disk, self.began_at)?;
        if !is_current {
            *index = Index::read(self.disk, self.began_at)?;
        }
        self.is_synced = true;
        for dir in &self.announced {
            index.refresh(self.disk, dir)?;
        }
        Ok(index)
    }

    /// Counts bytes that became a blob or went into quarantine.
    pub(crate) fn add(&mut self, bytes: u64) {
        debug_assert!(self.dirty, "a change is announced before it is made");
        self.total += bytes;
    }

    /// Takes off bytes that were removed.
    pub(crate) fn subtract(&mut self, bytes: u64) {
        debug_assert!(self.dirty, "a change is announced before it is made");
        self.total = self.total.saturating_sub(bytes);
    }

    /// The total can no longer be told from what was added and taken off.
    pub(crate) fn distrust(&mut self) -> Result<()> {
        self.distrusted = true;
        self.begin_change()
    }

    /// Writes the total and lets go of the lock.
    pub(crate) fn release(mut self) -> Result<()> {
        if self.dirty && !self.distrusted {
            self.dirty = false;
            self.write_record()?;
        }
        Ok(())
    }

    fn write_record(&self) -> Result<()> {
        // Where two may hold it at once no total is worth trusting: whoever comes next counts.
        let dirty = self.dirty || !self.disk.locks_are_honest();
        let (changes, mixed_unix) = (Some(self.at), self.mixed_unix);
        let record =
            Record { total: self.total, dirty, boot_id: boot_id(), pid: std::process::id(), changes, mixed_unix };
        let mut bytes = with_checksum(&serde_json::to_string(&record).unwrap_or_default()).into_bytes();
        bytes.resize(RECORD_BYTES, b' ');
        self.lock.file().write_all_at(&bytes, 0).at("write", &self.disk.layout().budget_lock())
    }

    /// Sweeps what crashes left and counts what is published anew.
    fn recount(&mut self) -> Result<()> {
        self.distrust()?;
        self.sweep()?;
        self.dirty = false;
        self.write_record()
    }

    /// Counts what is published anew.
    pub(super) fn count(&mut self) -> Result<()> {
        self.begin_change()?;
        self.total = self.disk.published_bytes()?;
        self.distrusted = false;
        Ok(())
    }

    /// What counts now.
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

    /// Bytes by which `extra` more would break a bound; 0 if there is room.
    fn shortfall(&self, extra: u64) -> Result<u64> {
        let (usage, space) = (self.usage()?, self.disk.space()?);
        let over_budget = (usage.counted() + extra).saturating_sub(space.budget);
        let below_min_free = (space.min_free + usage.reserved + extra).saturating_sub(space.free);
        Ok(over_budget.max(below_min_free))
    }

    /// Makes room for `extra` bytes that a fill of `key` will write, or refuses and says what is in the way.
    ///
    /// Order: what dead fills and writers left, views that no manifest holds and blobs that nothing links, quarantine,
    /// least recently used artifacts. `key`'s own artifact is no victim; where all victims together would not do, none goes.
    ///
    /// # Errors
    /// [`ErrorKind::Full`]; transient where what is in the way may go by itself.
    pub(crate) fn make_space(&mut self, extra: u64, key: &ArtifactKey) -> Result<()> {
        if self.shortfall(extra)? == 0 {
            return Ok(());
        }
        self.drop_dead_stagings(|_| true)?;
        self.drop_dead_temporaries(&self.disk.layout().stagings())?;
        let is_due = lock(&self.disk.0.maintenance).swept.is_none_or(|swept| swept.elapsed() > SWEEP_EVERY);
        if is_due { self.sweep() } else { self.drop_orphans() }?;
        if self.shortfall(extra)? > 0 {
            self.drop_quarantine()?;
        }
        match self.evict_for(extra, key)? {
            Some(_) if !is_due => {
                // Not before all was looked through: others may have left something, or changed it without a word.
                self.sweep()?;
                self.drop_quarantine()?;
                self.evict_for(extra, key)?.map_or(Ok(()), Err)
            }
            refusal => refusal.map_or(Ok(()), Err),
        }
    }

    /// Evicts until there is room for `extra` bytes that a fill of `key` will write; the refusal where that cannot be.
    fn evict_for(&mut self, extra: u64, key: &ArtifactKey) -> Result<Option<Error>> {
        let own = self.disk.layout().artifact(key);
        let mut search = Search { own, turn: None, obstacles: Obstacles::default() };
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
                if self.shortfall(extra)? == 0 {
                    return Ok(None);
                }
                if let Evicted::Kept(why) = self.evict(victim)? {
                    search.obstacles.add(format!("{} is {why}", victim.name()), why.is_for_now());
                }
            }
        }
    }

    /// The next artifacts that may go, least recently used first, as many as free `bytes`; `None` where not even all that
    /// are left would.
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

    /// The next artifact in the order of last use. One that was used since that order was made up comes later.
    fn next_by_use(&mut self, search: &mut Search) -> Result<Option<ScannedArtifact>> {
        loop {
            let Some(turn) = self.index()?.next(search.turn.as_ref()) else { return Ok(None) };
            let dir = ArtifactDir(self.disk.layout().artifacts().join(&turn.1));
            let last_used = self.disk.last_used(&dir)?;
            if last_used != turn.0 {
                self.index()?.set_last_used(&turn.1, last_used);
            }
            let was_used = last_used > turn.0;
            search.turn = Some(turn);
            if !was_used && let Some(artifact) = self.disk.scan_one(&dir)? {
                return Ok(Some(artifact));
            }
        }
    }

    /// Bytes that go with an artifact's views, where the links in `gone` have gone before.
    fn freed_with(&self, artifact: &ScannedArtifact, gone: &mut HashMap<u64, u64>) -> Result<u64> {
        let mut freed = 0;
        files::walk(&artifact.dir.files(), &mut |view, metadata| {
            let links = gone.entry(metadata.ino()).or_default();
            *links += 1;
            let blob = self.is_blob(metadata.ino(), artifact.entry_of(view).and_then(|entry| entry.sha256))?;
            if *links + u64::from(blob) == metadata.nlink() {
                freed += metadata.allocated();
            }
            Ok(())
        })?;
        Ok(freed)
    }

    /// Whether `inode` is the blob of `digest`.
    fn is_blob(&self, inode: u64, digest: Option<Digest>) -> Result<bool> {
        let blob = digest.map(|digest| files::stat(&self.disk.layout().blob(&digest))).transpose()?.flatten();
        Ok(blob.is_some_and(|blob| blob.ino() == inode))
    }

    fn no_space(&self, extra: u64, short: u64, obstacles: &Obstacles) -> Error {
        let counted = self.usage().map(|usage| usage.counted()).unwrap_or(self.total);
        let mut message = format!("no room for {} more: {} are missing", bytes(extra), bytes(short));
        if let Ok(space) = self.disk.space() {
            message.push_str(&format!(
                " (budget {} with {} in use; filesystem {} free, {} of them to stay free)",
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
            true => "raise MODEL_CACHE_MAX_BYTES, or let go of what is in the way",
            false => {
                "free space on this filesystem, lower MODEL_CACHE_MIN_FREE_BYTES, or point MODEL_CACHE_DIR to a larger one"
            }
        };
        Error::new(ErrorKind::Full, message).tier(Tier::Disk).transient(obstacles.for_now).hint(hint)
    }

    /// Evicts one artifact unless somebody holds it, it is pinned, or it was used since it was scanned.
    pub(crate) fn evict(&mut self, artifact: &ScannedArtifact) -> Result<Evicted> {
        let Some(_lease) = FileLock::try_exclusive(&self.disk.layout().lease(&artifact.dir))? else {
            return Ok(Evicted::Kept(InTheWay::Leased(self.disk.lease_holders(&artifact.dir))));
        };
        if let Some(pin) = self.disk.pin_in(&artifact.dir)? {
            return Ok(Evicted::Kept(InTheWay::Pinned(pin)));
        }
        if self.disk.last_used(&artifact.dir)? != artifact.last_used {
            return Ok(Evicted::Kept(InTheWay::JustUsed));
        }
        tracing::debug!(artifact = artifact.name(), "evicting");
        let freed = self.remove_artifact(&artifact.dir)?;
        tracing::info!(artifact = artifact.name(), freed_bytes = freed, "evicted");
        self.disk.metrics().evicted(freed);
        Ok(Evicted::Freed(freed))
    }

    /// Why evicting this artifact would not help, if it would not: it may be in use where locks do not tell, or every
    /// one of its files has a link outside the cache, so that no byte would become free.
    pub(super) fn pointless_victim(&mut self, artifact: &ScannedArtifact) -> Result<Option<InTheWay>> {
        let Some(manifest) = &artifact.manifest else { return Ok(None) };
        if !self.disk.is_idle(artifact.dir.path())? {
            return Ok(Some(InTheWay::UsedLately));
        }
        let mut held = false;
        for (path, entry) in manifest.files.iter().filter(|(_, entry)| entry.held.is_some()) {
            let Some(view) = files::stat(&artifact.dir.view(path))? else { return Ok(None) };
            if view.nlink() <= self.own_links(view.ino(), entry.sha256)? {
                return Ok(None);
            }
            held = true;
        }
        Ok(held.then_some(InTheWay::LinkedOutside))
    }

    /// Links to `inode` that are the cache's own: its blob, by the `digest` that a manifest has for it, staged files, views
    /// that manifests hold.
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

    /// Removes manifest, views, then blobs that nothing links any more; bytes freed. The caller holds the exclusive lease.
    pub(crate) fn remove_artifact(&mut self, dir: &ArtifactDir) -> Result<u64> {
        self.begin_change_of(dir)?;
        if !dir.is_ours()? {
            return Ok(0);
        }
        let manifest = self.disk.read_manifest(dir).unwrap_or(None);
        let mut freed = self.take_off_copies(dir, manifest.as_ref())?;
        files::remove_file(&dir.manifest())?;
        self.disk.remove_pending_upload(&dir.hash())?;
        files::remove(&dir.files())?;
        files::remove(dir.path())?;
        if let Some(name_dir) = dir.path().parent() {
            let _ = name_dir.remove_dir();
        }
        self.end_change_of(dir)?;
        for digest in manifest.iter().flat_map(|manifest| manifest.files.values()).filter_map(|entry| entry.sha256) {
            freed += self.drop_if_unlinked(&self.disk.layout().blob(&digest))?;
        }
        Ok(freed)
    }

    /// Takes off the views of `dir` that no blob stands behind, which are about to go; the bytes that this frees. Where
    /// they are not as recorded nobody knows whether they were counted.
    fn take_off_copies(&mut self, dir: &ArtifactDir, manifest: Option<&Manifest>) -> Result<u64> {
        let entries = || manifest.iter().flat_map(|manifest| manifest.files.values());
        let recorded: HashSet<FileIdentity> = entries().filter_map(FileEntry::recorded_on_disk).collect();
        let mut blobs = HashSet::new();
        for digest in entries().filter_map(|entry| entry.sha256) {
            blobs.extend(files::stat(&self.disk.layout().blob(&digest))?.map(|metadata| metadata.ino()));
        }
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
                self.distrust()?;
            }
            if metadata.nlink() == links {
                freed += metadata.allocated();
            }
        }
        Ok(freed)
    }

    /// Removes the blob or quarantined file at `path` if this is its last link; bytes freed.
    pub(super) fn drop_if_unlinked(&mut self, path: &RootedPath) -> Result<u64> {
        match files::stat(path)? {
            Some(metadata) if metadata.is_file() && metadata.nlink() == 1 => {
                self.begin_change()?;
                files::remove_file(path)?;
                self.subtract(metadata.allocated());
                Ok(metadata.allocated())
            }
            _ => Ok(0),
        }
    }

    /// Removes what crashes left: stagings that nobody will resume, views that no manifest holds, blobs that nothing
    /// links.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        self.drop_dead_stagings(|staging| !staging.may_be_resumed())?;
        for folder in [self.disk.layout().stagings(), self.disk.layout().locks(), self.disk.layout().blobs()] {
            self.drop_dead_temporaries(&folder)?;
        }
        self.disk.drop_dead_writers()?;
        let (disk, mut index) = (self.disk, Index::as_of(self.began_at));
        disk.scan_each(&mut |artifact| {
            if self.drop_dead_temporaries(artifact.dir.path())? > 0 {
                // A count may have found them here.
                self.distrust()?;
            }
            self.sweep_views(&artifact)?;
            if artifact.manifest.is_some() || files::stat(artifact.dir.path())?.is_some() {
                index.insert(disk, &artifact);
            }
            Ok(())
        })?;
        *lock(&disk.0.index) = index;
        self.is_synced = true;
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

    /// Removes what ended fills left, as far as `unwanted` says.
    pub(crate) fn drop_dead_stagings(&mut self, unwanted: impl Fn(&StagingUse) -> bool) -> Result<()> {
        for staging in self.disk.stagings()?.into_iter().filter(|staging| !staging.live && unwanted(staging)) {
            let owner = FileLock::try_existing(&staging.journal())?;
            if matches!(owner, Some(None)) {
                continue;
            }
            tracing::debug!(staging = %staging.dir, bytes = staging.allocated, "removing what an ended fill left");
            self.note_orphans(&staging.dir)?;
            if let Err(error) = staging.remove() {
                tracing::warn!(%error, "what an ended fill left cannot be removed; it is left alone");
            }
        }
        Ok(())
    }

    /// Removes the temporary files in `folder` whose writers died; bytes freed.
    ///
    /// A writer holds the lock of its temporary file from before the first byte until the file has its name, or writes it
    /// within a budget hold. Empty ones, and all where locks do not tell, go when they are old: their writers may be about
    /// to lock them.
    fn drop_dead_temporaries(&mut self, folder: &RootedPath) -> Result<u64> {
        let mut freed = 0;
        for file in self.disk.temporaries(folder)? {
            if !self.disk.is_dead_temporary(&file) {
                file.remove_if_old();
                continue;
            }
            match files::remove_file(&file.path) {
                Ok(()) => freed += file.allocated(),
                Err(error) => tracing::warn!(%error, "a temporary file of a writer that died cannot be removed"),
            }
        }
        Ok(freed)
    }

    /// Remembers the blobs that lose a link with this staging folder. Of one that its name does not tell, only a sweep can
    /// tell whether it has another.
    fn note_orphans(&self, staging: &RootedPath) -> Result<()> {
        for path in files::entries(staging)? {
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

    /// Removes the blobs that lost their last link with what ended fills had left.
    fn drop_orphans(&mut self) -> Result<()> {
        let orphans = std::mem::take(&mut lock(&self.disk.0.maintenance).orphans);
        orphans.iter().try_for_each(|digest| self.drop_if_unlinked(&self.disk.layout().blob(digest)).map(drop))
    }

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
        // One that no blob stands behind may or may not have been counted.
        if loose.iter().any(|path| files::stat(path).is_ok_and(|found| found.is_some_and(|m| m.nlink() == 1))) {
            self.distrust()?;
        }
        if artifact.manifest.is_none() {
            self.remove_artifact(dir)?;
        }
        loose.iter().try_for_each(files::remove_file)
    }

    /// Removes what failed a check.
    pub(super) fn drop_quarantine(&mut self) -> Result<()> {
        for path in files::entries(&self.disk.layout().quarantine())? {
            self.drop_if_unlinked(&path)?;
        }
        Ok(())
    }
}

impl ScannedArtifact {
    /// What its manifest says of the file at `view`.
    fn entry_of(&self, view: &RootedPath) -> Option<&FileEntry> {
        let path = FilePath::new(view.below(&self.dir.files())?.to_str()?).ok()?;
        self.manifest.as_ref()?.files.get(&path)
    }

    /// Views that its manifest does not hold.
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

/// What became of a victim.
#[derive(Debug)]
pub(crate) enum Evicted {
    /// It is gone; so many bytes became free.
    Freed(u64),
    /// It stays, for this reason.
    Kept(InTheWay),
}

/// What keeps room from being made.
#[derive(Debug, Default)]
struct Obstacles {
    names: Vec<String>,
    /// Whether any of it may go by itself.
    for_now: bool,
}

impl Obstacles {
    fn add(&mut self, name: String, for_now: bool) {
        self.names.push(name);
        self.for_now |= for_now;
    }
}

/// How far a search for victims has come.
#[derive(Debug)]
struct Search {
    /// The artifact that room is made for.
    own: ArtifactDir,
    turn: Option<LastUseOrder>,
    obstacles: Obstacles,
}

/// How far the change log goes by the record, and when a release was last seen that writes none.
fn standing_of(record: Option<&Record>) -> (Position, Option<u64>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match record {
        // A new directory, or nobody knows what happened.
        None => (Position::fresh(), None),
        Some(Record { changes: None, .. }) => (Position::fresh(), Some(now)),
        Some(Record { changes: Some(at), mixed_unix, .. }) => match mixed_unix {
            None => (*at, None),
            Some(seen) if now.abs_diff(*seen) <= MIXED_MAX.as_secs() => (*at, Some(*seen)),
            // What anybody read meanwhile may be incomplete.
            Some(_) => (Position::fresh(), None),
        },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The record in `file`; `None` if it cannot be read or its checksum differs. Older releases write none.
fn read_record(file: &std::fs::File) -> Option<Record> {
    let mut bytes = [0; RECORD_BYTES];
    let read = file.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(&bytes[..read]).ok()?.trim_end_matches(' ');
    let is_right = text.rsplit_once(CHECKSUM).is_none_or(|(record, _)| with_checksum(&format!("{record}}}")) == text);
    if is_right { serde_json::from_str(text).ok() } else { None }
}

/// What stands before the checksum, which is the last field of the record.
const CHECKSUM: &str = r#","check":""#;

/// The record with the first eight hex digits of the SHA-256 of what stands before the checksum.
fn with_checksum(record: &str) -> String {
    let fields = record.strip_suffix('}').unwrap_or(record);
    let digest = Digest::of(fields.as_bytes()).to_string();
    format!("{fields}{CHECKSUM}{}\"}}", &digest[..8])
}

/// The recorded total of a directory that is not open, if it is to be trusted.
pub(super) fn recorded_total(layout: &super::Layout) -> Option<u64> {
    let file = layout.budget_lock().open(false).ok()?;
    read_record(&file).filter(|record| !record.dirty && record.boot_id == boot_id()).map(|record| record.total)
}

fn held_too_long(path: &RootedPath) -> Error {
    let holder = path.open(false).ok().and_then(|file| read_record(&file)).map(|record| record.pid);
    let who = holder.map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
    Error::new(
        ErrorKind::Unavailable,
        format!("the budget lock has been held for {} s by {who}", LOCK_WAIT_MAX.as_secs()),
    )
    .tier(Tier::Disk)
    .hint("see whether that process is stopped; the lock falls when it ends")
}

/// The kernel's name for this boot; the record of another boot is not trusted. Empty where it does not tell.
pub(super) fn boot_id() -> String {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    let read = || std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()); // outside the root
    BOOT_ID.get_or_init(|| read().unwrap_or_default()).clone()
}

#[cfg(test)]
pub(super) mod tests;
