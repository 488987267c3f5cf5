//! The byte budget: one short lock, one record, room made before anything is written.
//!
//! Counted are the allocated bytes of blobs, quarantine and staging, and what live fills have reserved beyond that. The
//! record keeps the total of blobs, quarantine and views that no blob stands behind; it is marked dirty before a change
//! and written after it, so that whoever finds it dirty (or from another boot) counts again instead of trusting it.
//! Whoever holds the budget waits for nothing: other locks are tried once.

use super::fault::At;
use super::files::{self, allocated};
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::pin::InTheWay;
use super::staging::StagingUse;
use super::{Disk, ScannedArtifact};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::human::bytes;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, Manifest};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// How long to wait for the budget lock, which is held for moments.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(30);
/// Bytes of the record; it is padded, so that a shorter one leaves nothing of a longer one.
const RECORD_BYTES: usize = 256;
/// How long something must have been left alone before it is evicted or swept where locks do not tell who uses it.
const IDLE_MIN: Duration = Duration::from_secs(3600);
/// What a file's last block may waste.
const BLOCK_BYTES: u64 = 4096;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    total: u64,
    dirty: bool,
    boot_id: String,
    pid: u32,
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
    /// Links that the cache itself has to each inode, counted when first asked for.
    own_links: Option<HashMap<u64, u64>>,
    /// Identities that manifests record, read when first asked for.
    pub(super) vouchers: Option<HashMap<Digest, Vec<FileIdentity>>>,
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
}

impl Usage {
    pub(crate) fn counted(&self) -> u64 {
        self.published + self.staging + self.reserved
    }
}

/// Bytes that a file of `size` bytes will take.
pub(crate) fn room_for(size: u64) -> u64 {
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
        let mut hold =
            BudgetHold { disk: self, lock, total: 0, dirty: false, distrusted: false, own_links: None, vouchers: None };
        match read_record(hold.lock.file()) {
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
                total += allocated(metadata);
                Ok(())
            })?;
        }
        for name_dir in files::entries(&layout.artifacts())? {
            for version_dir in files::entries(&name_dir)? {
                files::walk(&ArtifactDir(version_dir).files(), &mut |_, metadata| {
                    if counted.insert(metadata.ino()) {
                        total += allocated(metadata);
                    }
                    Ok(())
                })?;
            }
        }
        Ok(total)
    }

    /// Whether nobody has been at work on the artifact or staging in `dir` for long: of two signs that it is not in use
    /// the one that needs no locks. Always, where locks tell.
    pub(crate) fn is_idle(&self, dir: &Path) -> Result<bool> {
        if self.locks_are_honest() {
            return Ok(true);
        }
        let mut latest = files::stat(dir)?.and_then(|metadata| metadata.modified().ok());
        for path in files::entries(dir)? {
            latest = latest.max(files::stat(&path)?.and_then(|metadata| metadata.modified().ok()));
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
        let record = Record { total: self.total, dirty, boot_id: boot_id(), pid: std::process::id() };
        let mut bytes = serde_json::to_vec(&record).unwrap_or_default();
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
    /// Order: what dead fills left, views that no manifest holds and blobs that nothing links, quarantine, least recently
    /// used artifacts. `key`'s own artifact is no victim; where all victims together would not do, none goes.
    ///
    /// # Errors
    /// [`ErrorKind::Full`]; transient where what is in the way may go by itself.
    pub(crate) fn make_room(&mut self, extra: u64, key: &ArtifactKey) -> Result<()> {
        if self.shortfall(extra)? == 0 {
            return Ok(());
        }
        self.drop_dead_stagings(|_| true)?;
        self.sweep()?;
        if self.shortfall(extra)? > 0 {
            self.drop_quarantine()?;
        }
        let short = self.shortfall(extra)?;
        if short == 0 {
            return Ok(());
        }
        let (victims, mut obstacles) = self.victims(key)?;
        // Not even with all of them gone: then none goes.
        if short > self.disk.freed_by(&victims)? {
            return Err(self.no_room(extra, short, &obstacles));
        }
        for victim in &victims {
            if self.shortfall(extra)? == 0 {
                return Ok(());
            }
            if let Evicted::Kept(why) = self.evict(victim)? {
                obstacles.add(format!("{} is {why}", victim.name()), why.is_for_now());
            }
        }
        match self.shortfall(extra)? {
            0 => Ok(()),
            short => Err(self.no_room(extra, short, &obstacles)),
        }
    }

    /// The artifacts that may go for a fill of `key`, least recently used first, and what is in the way of more.
    fn victims(&mut self, key: &ArtifactKey) -> Result<(Vec<ScannedArtifact>, Obstacles)> {
        let (mut victims, mut obstacles) = (Vec::new(), Obstacles::default());
        let fills = self.disk.stagings()?;
        let others = fills.iter().filter(|staging| staging.live && !staging.is_of(key));
        others.for_each(|staging| obstacles.add(staging.described(), true));
        let own = self.disk.layout().artifact(key);
        for artifact in self.disk.scan_by_last_use()?.into_iter().filter(|artifact| artifact.dir != own) {
            let kept = match self.disk.keeps(&artifact.dir)? {
                Some(why) => Some(why),
                None => self.pointless_victim(&artifact)?,
            };
            match kept {
                Some(why) => obstacles.add(format!("{} is {why}", artifact.name()), why.is_for_now()),
                None => victims.push(artifact),
            }
        }
        Ok((victims, obstacles))
    }

    fn no_room(&self, extra: u64, short: u64, obstacles: &Obstacles) -> Error {
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
        let held: Vec<&FilePath> =
            manifest.files.iter().filter(|(_, entry)| entry.held.is_some()).map(|(path, _)| path).collect();
        for path in &held {
            let Some(view) = files::stat(&artifact.dir.view(path))? else { return Ok(None) };
            if view.nlink() <= self.own_links(view.ino())? {
                return Ok(None);
            }
        }
        Ok((!held.is_empty()).then_some(InTheWay::LinkedOutside))
    }

    /// Links to `inode` that are the cache's own: its blob, staged files, views that manifests hold.
    fn own_links(&mut self, inode: u64) -> Result<u64> {
        if self.own_links.is_none() {
            let mut links: HashMap<u64, u64> = HashMap::new();
            let layout = self.disk.layout();
            for dir in [layout.blobs(), layout.quarantine(), layout.stagings()] {
                files::walk(&dir, &mut |_, metadata| {
                    *links.entry(metadata.ino()).or_default() += 1;
                    Ok(())
                })?;
            }
            let manifests = self.disk.scan()?.into_iter().filter_map(|artifact| artifact.manifest);
            for identity in manifests.flat_map(|manifest| manifest.files.into_values()).filter_map(|e| e.on_disk()) {
                *links.entry(identity.inode).or_default() += 1;
            }
            self.own_links = Some(links);
        }
        Ok(self.own_links.as_ref().and_then(|links| links.get(&inode)).copied().unwrap_or_default())
    }

    /// Removes manifest, views, then blobs that nothing links any more; bytes freed. The caller holds the exclusive lease.
    pub(crate) fn remove_artifact(&mut self, dir: &ArtifactDir) -> Result<u64> {
        self.begin_change()?;
        if !dir.is_ours()? {
            return Ok(0);
        }
        let manifest = self.disk.read_manifest(dir).unwrap_or(None);
        let mut freed = self.take_off_copies(dir, manifest.as_ref())?;
        files::remove_file(&dir.manifest())?;
        self.disk.forget_intent(&dir.hash())?;
        files::remove_tree(&dir.files())?;
        files::remove_tree(dir.path())?;
        if let Some(name_dir) = dir.path().parent() {
            let _ = std::fs::remove_dir(name_dir);
        }
        for digest in manifest.iter().flat_map(|manifest| manifest.files.values()).filter_map(|entry| entry.sha256) {
            freed += self.drop_if_unlinked(&self.disk.layout().blob(&digest))?;
        }
        Ok(freed)
    }

    /// Takes off the views of `dir` that no blob stands behind, which are about to go; the bytes that this frees. Where
    /// they are not as recorded nobody knows whether they were counted.
    fn take_off_copies(&mut self, dir: &ArtifactDir, manifest: Option<&Manifest>) -> Result<u64> {
        let entries = || manifest.iter().flat_map(|manifest| manifest.files.values());
        let recorded: HashSet<FileIdentity> = entries().filter_map(FileEntry::on_disk).collect();
        let mut blobs = HashSet::new();
        for digest in entries().filter_map(|entry| entry.sha256) {
            blobs.extend(files::stat(&self.disk.layout().blob(&digest))?.map(|metadata| metadata.ino()));
        }
        let mut copies: HashMap<u64, (u64, std::fs::Metadata)> = HashMap::new();
        files::walk(&dir.files(), &mut |_, metadata| {
            if !blobs.contains(&metadata.ino()) {
                copies.entry(metadata.ino()).or_insert_with(|| (0, metadata.clone())).0 += 1;
            }
            Ok(())
        })?;
        let mut freed = 0;
        for (links, metadata) in copies.into_values() {
            if recorded.contains(&files::identity(&metadata)) {
                self.subtract(allocated(&metadata));
            } else {
                self.distrust()?;
            }
            if metadata.nlink() == links {
                freed += allocated(&metadata);
            }
        }
        Ok(freed)
    }

    /// Removes the blob or quarantined file at `path` if this is its last link; bytes freed.
    pub(super) fn drop_if_unlinked(&mut self, path: &Path) -> Result<u64> {
        match files::stat(path)? {
            Some(metadata) if metadata.is_file() && metadata.nlink() == 1 => {
                self.begin_change()?;
                files::remove_file(path)?;
                self.subtract(allocated(&metadata));
                Ok(allocated(&metadata))
            }
            _ => Ok(0),
        }
    }

    /// Removes what crashes left: stagings that nobody will resume, views that no manifest holds, blobs that nothing
    /// links.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        self.drop_dead_stagings(|staging| !staging.may_be_resumed())?;
        for folder in [self.disk.layout().stagings(), self.disk.layout().locks(), self.disk.layout().blobs()] {
            self.disk.drop_old_temporaries(&folder)?;
        }
        for artifact in self.disk.scan()? {
            self.disk.drop_old_temporaries(artifact.dir.path())?;
            self.sweep_views(&artifact)?;
        }
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
            tracing::debug!(staging = %staging.dir.display(), bytes = staging.allocated, "removing what an ended fill left");
            if let Err(error) = staging.remove() {
                tracing::warn!(%error, "what an ended fill left cannot be removed; it is left alone");
            }
        }
        Ok(())
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
        loose.iter().try_for_each(|path| files::remove_file(path))
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
    /// Views that its manifest does not hold.
    pub(super) fn loose_views(&self) -> Result<Vec<PathBuf>> {
        let held = |path: &Path| {
            let relative = path.strip_prefix(self.dir.files()).ok().and_then(Path::to_str);
            let relative = relative.and_then(|path| FilePath::new(path).ok());
            let entry = relative.zip(self.manifest.as_ref()).and_then(|(path, manifest)| manifest.files.get(&path));
            entry.is_some_and(|entry| entry.held.is_some())
        };
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

fn read_record(file: &std::fs::File) -> Option<Record> {
    let mut bytes = [0; RECORD_BYTES];
    let read = file.read_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(&bytes[..read]).ok()
}

/// The recorded total of a directory that is not open, if it is to be trusted.
pub(super) fn recorded_total(layout: &super::Layout) -> Option<u64> {
    let file = std::fs::File::open(layout.budget_lock()).ok()?;
    read_record(&file).filter(|record| !record.dirty && record.boot_id == boot_id()).map(|record| record.total)
}

fn held_too_long(path: &Path) -> Error {
    let holder = std::fs::File::open(path).ok().and_then(|file| read_record(&file)).map(|record| record.pid);
    let who = holder.map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
    Error::new(
        ErrorKind::Unavailable,
        format!("the budget lock has been held for {} s by {who}", LOCK_WAIT_MAX.as_secs()),
    )
    .tier(Tier::Disk)
    .hint("see whether that process is stopped; the lock falls when it ends")
}

/// The kernel's name for this boot; the record of another boot is not trusted.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}
