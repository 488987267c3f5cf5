//! The byte budget: one short lock, one record, room made before anything is written.
//!
//! Counted are the allocated bytes of blobs, quarantine and staging, and what live fills have reserved beyond that. The
//! record keeps the total of blobs and quarantine; it is marked dirty before a change and written after it, so that
//! whoever finds it dirty (or from another boot) counts again instead of trusting it. Whoever holds the budget waits
//! for nothing: other locks are tried once.

use super::fault::At;
use super::files::{self, allocated};
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::pin::InTheWay;
use super::staging::StagingUse;
use super::{Disk, ScannedArtifact};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::ArtifactKey;
use crate::manifest::FileIdentity;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait for the budget lock, which is held for moments.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(30);
/// Bytes of the record; it is padded, so that a shorter one leaves nothing of a longer one.
const RECORD_BYTES: usize = 256;
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
    /// Allocated bytes of blobs and quarantine.
    total: u64,
    dirty: bool,
    /// Identities that manifests record, read when first asked for.
    pub(super) vouchers: Option<HashMap<Digest, Vec<FileIdentity>>>,
}

/// What counts, by kind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Blobs and quarantine.
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
        let mut hold = BudgetHold { disk: self, lock, total: 0, dirty: false, vouchers: None };
        match read_record(hold.lock.file()) {
            Some(record) if !record.dirty && record.boot_id == boot_id() => hold.total = record.total,
            _ => hold.recount()?,
        }
        Ok(hold)
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

    /// Writes the total and lets go of the lock.
    pub(crate) fn release(mut self) -> Result<()> {
        if self.dirty {
            self.dirty = false;
            self.write_record()?;
        }
        Ok(())
    }

    fn write_record(&self) -> Result<()> {
        let record = Record { total: self.total, dirty: self.dirty, boot_id: boot_id(), pid: std::process::id() };
        let mut bytes = serde_json::to_vec(&record).unwrap_or_default();
        bytes.resize(RECORD_BYTES, b' ');
        self.lock.file().write_all_at(&bytes, 0).at("write", &self.disk.layout().budget_lock())
    }

    /// Counts blobs and quarantine anew, and sweeps what crashes left.
    fn recount(&mut self) -> Result<()> {
        self.count()?;
        self.sweep()?;
        self.dirty = false;
        self.write_record()
    }

    /// Counts blobs and quarantine anew.
    pub(super) fn count(&mut self) -> Result<()> {
        self.dirty = true;
        self.write_record()?;
        self.total = 0;
        let layout = self.disk.layout();
        for dir in [layout.blobs(), layout.quarantine()] {
            files::walk(&dir, &mut |_, metadata| {
                self.total += allocated(metadata);
                Ok(())
            })?;
        }
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
    /// Order: what dead fills left, views that no manifest holds, quarantine, least recently used artifacts, blobs that
    /// nothing links. `key`'s own artifact is no victim.
    pub(crate) fn make_room(&mut self, extra: u64, key: &ArtifactKey) -> Result<()> {
        if self.shortfall(extra)? == 0 {
            return Ok(());
        }
        self.sweep()?;
        let mut kept = Vec::new();
        if self.shortfall(extra)? > 0 {
            self.drop_quarantine()?;
            for artifact in self.disk.scan_by_last_use()? {
                if self.shortfall(extra)? == 0 {
                    return Ok(());
                }
                if artifact.dir == self.disk.layout().artifact(key) {
                    continue;
                }
                if let Evicted::Kept(why) = self.evict(&artifact)? {
                    kept.push(format!("{} is {why}", artifact.name()));
                }
            }
        }
        match self.shortfall(extra)? {
            0 => Ok(()),
            short => Err(self.no_room(extra, short, &kept)),
        }
    }

    fn no_room(&self, extra: u64, short: u64, kept: &[String]) -> Error {
        let counted = self.usage().map(|usage| usage.counted()).unwrap_or(self.total);
        let mut message = format!("no room for {extra} more bytes: {short} are missing");
        if let Ok(space) = self.disk.space() {
            message.push_str(&format!(
                " (budget {} with {counted} in use; filesystem {} free, {} of them to stay free)",
                space.budget, space.free, space.min_free
            ));
        }
        if !kept.is_empty() {
            message.push_str(&format!("; in the way: {}", kept.join("; ")));
        }
        Error::new(ErrorKind::Full, message)
            .tier(Tier::Disk)
            .hint("raise MODEL_CACHE_MAX_BYTES or lower MODEL_CACHE_MIN_FREE_BYTES, or let go of what is in the way")
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
        let freed = self.remove_artifact(&artifact.dir)?;
        tracing::info!(artifact = artifact.name(), freed_bytes = freed, "evicted");
        Ok(Evicted::Freed(freed))
    }

    /// Removes manifest, views, then blobs that nothing links any more; bytes freed. The caller holds the exclusive lease.
    pub(crate) fn remove_artifact(&mut self, dir: &ArtifactDir) -> Result<u64> {
        self.begin_change()?;
        let manifest = self.disk.read_manifest(dir).unwrap_or(None);
        files::remove_file(&dir.manifest())?;
        files::remove_tree(&dir.files())?;
        files::remove_tree(dir.path())?;
        if let Some(name_dir) = dir.path().parent() {
            let _ = std::fs::remove_dir(name_dir);
        }
        let mut freed = 0;
        for digest in manifest.iter().flat_map(|manifest| manifest.files.values()).filter_map(|entry| entry.sha256) {
            freed += self.drop_if_unlinked(&self.disk.layout().blob(&digest))?;
        }
        Ok(freed)
    }

    /// Removes the blob or quarantined file at `path` if this is its last link; bytes freed.
    fn drop_if_unlinked(&mut self, path: &Path) -> Result<u64> {
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

    /// Removes what crashes left: stagings without an owner, views that no manifest holds, blobs that nothing links.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        self.drop_dead_stagings(None)?;
        self.disk.drop_old_temporaries()?;
        for artifact in self.disk.scan()? {
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
        Ok(())
    }

    /// Removes what ended fills left, of one key or of all.
    pub(crate) fn drop_dead_stagings(&mut self, key: Option<&ArtifactKey>) -> Result<()> {
        let of_key = |staging: &StagingUse| key.is_none_or(|key| staging.is_of(key));
        for staging in self.disk.stagings()?.into_iter().filter(|staging| !staging.live && of_key(staging)) {
            let journal = staging.journal();
            let owner = files::stat(&journal)?.map(|_| FileLock::try_exclusive(&journal)).transpose()?;
            if matches!(owner, Some(None)) {
                continue;
            }
            tracing::debug!(staging = %staging.dir.display(), bytes = staging.allocated, "removing what an ended fill left");
            staging.remove()?;
        }
        Ok(())
    }

    fn sweep_views(&mut self, artifact: &ScannedArtifact) -> Result<()> {
        let (dir, loose) = (&artifact.dir, artifact.loose_views()?);
        if loose.is_empty() && artifact.manifest.is_some() {
            return Ok(());
        }
        let Some(_lease) = FileLock::try_exclusive(&self.disk.layout().lease(dir))? else { return Ok(()) };
        self.begin_change()?;
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
            let entry = relative.zip(self.manifest.as_ref()).and_then(|(path, manifest)| {
                manifest.files.iter().find(|(listed, _)| listed.as_str() == path).map(|(_, entry)| entry)
            });
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

fn read_record(file: &std::fs::File) -> Option<Record> {
    let mut bytes = [0; RECORD_BYTES];
    let read = file.read_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(&bytes[..read]).ok()
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
