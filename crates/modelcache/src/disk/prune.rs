//! Pruning on request: what crashes left, what was not used for long, and the least recently used down to a size.
//!
//! Each step is a short budget hold of its own, so that fills go on in between; every victim is looked at again under
//! its lease. A rehearsal follows the same rules over a count of links, and changes nothing: what has a link outside the
//! cache frees nothing there either.

use super::budget::Evicted;
use super::files;
use super::pin::InTheWay;
use super::rooted::RootedPath;
use super::{ArtifactDir, Disk, Misplaced, ScannedArtifact};
use crate::config::ByteBound;
use crate::error::Result;
use crate::key::ArtifactKey;
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What `prune` shall remove. Without a bound: only what nobody can use any more.
#[derive(Debug, Clone, Default)]
pub struct PruneOptions {
    /// Artifacts that were not used for so long.
    pub older_than: Option<Duration>,
    /// The least recently used artifacts, until so many bytes are used (a share is one of the filesystem).
    pub to: Option<ByteBound>,
    /// Only tell.
    pub dry_run: bool,
}

/// What `prune` removed, or would remove.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PruneReport {
    /// What counted against the budget before, counted anew.
    pub used_before_bytes: u64,
    /// What counts now.
    pub used_bytes: u64,
    /// What was removed, leftovers and artifacts; what others did meanwhile is not in it.
    pub freed_bytes: u64,
    /// The size that was asked for.
    pub to_bytes: Option<u64>,
    /// What nobody could use any more.
    pub leftovers: Leftovers,
    /// Artifacts that went, least recently used first.
    pub evicted: Vec<PrunedArtifact>,
    /// Artifacts that would have gone, and why they stayed.
    pub kept: Vec<KeptArtifact>,
    /// Entries of the wrong type that were moved to `quarantine/`.
    pub set_aside: Vec<Misplaced>,
}

impl PruneReport {
    /// Whether no more is used than was asked for.
    pub fn reached(&self) -> bool {
        self.to_bytes.is_none_or(|to| self.used_bytes <= to)
    }
}

/// What nobody can use any more, in bytes freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Leftovers {
    /// Fills that ended halfway.
    pub fills: usize,
    /// What they had written.
    pub fill_bytes: u64,
    /// Temporary files whose writers died.
    pub temporary_bytes: u64,
    /// Blobs that belong to no artifact.
    pub blob_bytes: u64,
    /// What failed a check.
    pub quarantine_bytes: u64,
}

impl Leftovers {
    /// All of it.
    pub fn bytes(&self) -> u64 {
        self.fill_bytes + self.temporary_bytes + self.blob_bytes + self.quarantine_bytes
    }
}

/// An artifact that went.
#[derive(Debug, Clone, Serialize)]
pub struct PrunedArtifact {
    /// The reference that leads to it.
    pub reference: String,
    /// When it was last used.
    pub last_used: Option<SystemTime>,
    /// Bytes freed: what it alone held.
    pub freed_bytes: u64,
}

/// An artifact that stayed.
#[derive(Debug, Clone)]
pub struct KeptArtifact {
    /// The reference that leads to it.
    pub reference: String,
    /// Why.
    pub why: InTheWay,
}

impl Serialize for KeptArtifact {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut fields = serializer.serialize_struct("KeptArtifact", 3)?;
        fields.serialize_field("reference", &self.reference)?;
        fields.serialize_field("why", self.why.name())?;
        fields.serialize_field("detail", &self.why.to_string())?;
        fields.end()
    }
}

/// Removes, or rehearses it.
trait PruneActions {
    /// What counts against the budget, every file looked at.
    fn count(&mut self) -> Result<u64>;
    /// What counts against the budget, as the record has it.
    fn used(&mut self) -> Result<u64>;
    /// Removes what nobody can use any more.
    fn sweep(&mut self) -> Result<Leftovers>;
    /// Removes one artifact, unless something is in the way; `for_space`: also unless no byte would become free.
    fn evict(&mut self, artifact: &ScannedArtifact, for_space: bool) -> Result<Evicted>;
}

impl Disk {
    /// Removes what `options` say, and tells what went and what stayed.
    pub(crate) fn prune(&self, options: &PruneOptions) -> Result<PruneReport> {
        self.ensure_writable()?;
        // First, as they may lie in the place of the budget lock.
        let misplaced = self.misplaced()?;
        let set_aside = if options.dry_run { misplaced } else { self.set_aside(misplaced) };
        let mut actions: Box<dyn PruneActions> =
            if options.dry_run { Box::new(DryRun::new(self)?) } else { Box::new(Apply(self)) };
        let cutoff = options.older_than.map(|age| SystemTime::now().checked_sub(age).unwrap_or(UNIX_EPOCH));
        let to_bytes = options.to.map(|to| self.bound_bytes(to)).transpose()?;
        let used_before_bytes = actions.count()?;
        let mut report = PruneReport { to_bytes, used_before_bytes, set_aside, ..PruneReport::default() };
        report.leftovers = actions.sweep()?;
        for artifact in self.scan_by_last_use()? {
            let old = cutoff.is_some_and(|cutoff| artifact.last_used.is_none_or(|last| last <= cutoff));
            if !old && !to_bytes.is_some_and(|to| actions.used().is_ok_and(|used| used > to)) {
                break;
            }
            let reference = artifact.name();
            match actions.evict(&artifact, !old)? {
                Evicted::Freed(freed_bytes) => {
                    report.evicted.push(PrunedArtifact { reference, last_used: artifact.last_used, freed_bytes });
                }
                Evicted::Kept(why) => report.kept.push(KeptArtifact { reference, why }),
            }
        }
        report.used_bytes = actions.count()?;
        report.freed_bytes = report.leftovers.bytes() + report.evicted.iter().map(|gone| gone.freed_bytes).sum::<u64>();
        Ok(report)
    }

    /// What keeps an artifact from being evicted as things stand, if anything does.
    pub(super) fn keeps(&self, dir: &ArtifactDir) -> Result<Option<InTheWay>> {
        if self.is_leased(dir) {
            return Ok(Some(InTheWay::Leased(self.lease_holders(dir))));
        }
        Ok(self.pin_in(dir)?.map(InTheWay::Pinned))
    }

    /// How many bytes could be freed by evicting all but `kept`, and the blobs with these inodes, as things stand.
    pub(super) fn evictable_bytes(&self, kept: &BTreeSet<ArtifactKey>, inodes: &[u64]) -> Result<u64> {
        let mut rehearsal = DryRun::new(self)?;
        inodes.iter().for_each(|inode| rehearsal.keep(*inode));
        let mut bytes = rehearsal.sweep()?.bytes();
        let others = |artifact: &&ScannedArtifact| artifact.manifest.as_ref().is_none_or(|m| !kept.contains(&m.key));
        for artifact in self.scan()?.iter().filter(others) {
            if let Evicted::Freed(freed) = rehearsal.evict(artifact, false)? {
                bytes += freed;
            }
        }
        Ok(bytes)
    }
}

struct Apply<'disk>(&'disk Disk);

impl PruneActions for Apply<'_> {
    fn count(&mut self) -> Result<u64> {
        let mut hold = self.0.hold_budget()?;
        hold.count()?;
        let used = hold.usage()?.counted();
        hold.release()?;
        Ok(used)
    }

    fn used(&mut self) -> Result<u64> {
        Ok(self.0.usage()?.0.counted())
    }

    fn sweep(&mut self) -> Result<Leftovers> {
        let mut hold = self.0.hold_budget()?;
        let (before, dead) = (hold.usage()?, dead_stagings(self.0)?);
        hold.drop_dead_stagings(|_| true)?;
        hold.sweep()?;
        let swept = hold.usage()?;
        hold.drop_quarantine()?;
        let after = hold.usage()?;
        hold.release()?;
        let left = dead_stagings(self.0)?;
        Ok(Leftovers {
            fills: dead.fills.saturating_sub(left.fills),
            fill_bytes: dead.fill_bytes.saturating_sub(left.fill_bytes),
            temporary_bytes: before.temporary.saturating_sub(after.temporary),
            blob_bytes: before.published.saturating_sub(swept.published),
            quarantine_bytes: swept.published.saturating_sub(after.published),
        })
    }

    fn evict(&mut self, artifact: &ScannedArtifact, for_space: bool) -> Result<Evicted> {
        let mut hold = self.0.hold_budget()?;
        let pointless = if for_space { hold.pointless_victim(artifact)? } else { None };
        let evicted = match pointless {
            Some(why) => Evicted::Kept(why),
            None => hold.evict(artifact)?,
        };
        hold.release()?;
        Ok(evicted)
    }
}

/// Fills that ended halfway, and what they wrote.
fn dead_stagings(disk: &Disk) -> Result<Leftovers> {
    let stagings = disk.stagings()?;
    let dead = stagings.iter().filter(|staging| !staging.live);
    Ok(dead.fold(Leftovers::default(), |sum, staging| Leftovers {
        fills: sum.fills + 1,
        fill_bytes: sum.fill_bytes + staging.allocated,
        ..sum
    }))
}

/// Removes in mind only: every blob by its inode, with its bytes and the links that still hold it.
struct DryRun<'disk> {
    disk: &'disk Disk,
    used: u64,
    blobs: HashMap<u64, Blob>,
}

struct Blob {
    bytes: u64,
    /// Links besides the one in `blobs/`.
    links: u64,
}

impl<'disk> DryRun<'disk> {
    fn new(disk: &'disk Disk) -> Result<Self> {
        let (mut used, mut blobs) = (0, HashMap::new());
        files::walk(&disk.layout().blobs(), &mut |_, metadata| {
            let blob = Blob { bytes: metadata.allocated(), links: metadata.nlink().saturating_sub(1) };
            used += blob.bytes;
            blobs.insert(metadata.ino(), blob);
            Ok(())
        })?;
        files::walk(&disk.layout().quarantine(), &mut |_, metadata| {
            used += metadata.allocated();
            Ok(())
        })?;
        // Views that no blob stands behind have bytes of their own.
        for artifact in disk.scan()? {
            files::walk(&artifact.dir.files(), &mut |_, metadata| {
                if metadata.nlink() == 1 {
                    let own = Blob { bytes: metadata.allocated(), links: 1 };
                    used += own.bytes;
                    blobs.insert(metadata.ino(), own);
                }
                Ok(())
            })?;
        }
        used += disk.stagings()?.iter().map(|staging| staging.allocated + staging.outstanding()).sum::<u64>();
        used += disk.temporaries(&disk.layout().stagings())?.iter().map(|file| file.allocated()).sum::<u64>();
        Ok(Self { disk, used, blobs })
    }

    /// Keeps a blob, whatever becomes of its artifacts.
    fn keep(&mut self, inode: u64) {
        if let Some(blob) = self.blobs.get_mut(&inode) {
            blob.links += 1;
        }
    }

    /// The bytes that go with a link, if it was the last besides the blob itself.
    fn unlink(&mut self, inode: u64) -> u64 {
        match self.blobs.get_mut(&inode) {
            Some(blob) if blob.links > 1 => {
                blob.links -= 1;
                0
            }
            Some(_) => self.blobs.remove(&inode).map_or(0, |blob| blob.bytes),
            None => 0,
        }
    }

    fn unlink_below(&mut self, dir: &RootedPath) -> Result<u64> {
        let mut freed = 0;
        files::walk(dir, &mut |_, metadata| {
            freed += self.unlink(metadata.ino());
            Ok(())
        })?;
        Ok(freed)
    }
}

impl PruneActions for DryRun<'_> {
    fn count(&mut self) -> Result<u64> {
        self.used()
    }

    fn used(&mut self) -> Result<u64> {
        Ok(self.used)
    }

    fn sweep(&mut self) -> Result<Leftovers> {
        let mut leftovers = dead_stagings(self.disk)?;
        for file in self.disk.temporaries(&self.disk.layout().stagings())? {
            leftovers.temporary_bytes += if self.disk.is_dead_temporary(&file) { file.allocated() } else { 0 };
        }
        let orphans: Vec<u64> =
            self.blobs.iter().filter(|(_, blob)| blob.links == 0).map(|(inode, _)| *inode).collect();
        leftovers.blob_bytes += orphans.into_iter().map(|inode| self.unlink(inode)).sum::<u64>();
        for staging in self.disk.stagings()?.iter().filter(|staging| !staging.live) {
            leftovers.blob_bytes += self.unlink_below(&staging.dir)?;
        }
        for artifact in self.disk.scan()?.iter().filter(|artifact| !self.disk.is_leased(&artifact.dir)) {
            for view in artifact.loose_views()? {
                if let Some(metadata) = files::stat(&view)? {
                    leftovers.blob_bytes += self.unlink(metadata.ino());
                }
            }
        }
        // Only files: a folder there was set aside, and stays.
        for path in files::entries(&self.disk.layout().quarantine())? {
            if let Some(metadata) = files::stat(&path)?.filter(|found| found.is_file() && found.nlink() == 1) {
                leftovers.quarantine_bytes += metadata.allocated();
            }
        }
        self.used = self.used.saturating_sub(leftovers.bytes());
        Ok(leftovers)
    }

    fn evict(&mut self, artifact: &ScannedArtifact, for_space: bool) -> Result<Evicted> {
        if let Some(why) = self.disk.keeps(&artifact.dir)? {
            return Ok(Evicted::Kept(why));
        }
        if for_space {
            let mut hold = self.disk.hold_budget()?;
            let pointless = hold.pointless_victim(artifact)?;
            hold.release()?;
            if let Some(why) = pointless {
                return Ok(Evicted::Kept(why));
            }
        }
        let freed = self.unlink_below(&artifact.dir.files())?;
        self.used = self.used.saturating_sub(freed);
        Ok(Evicted::Freed(freed))
    }
}
