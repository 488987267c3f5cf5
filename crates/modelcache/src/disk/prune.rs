//! `prune`: removes leftovers, artifacts that were not used for some time, and the least recently used artifacts until
//! a size is reached.
//!
//! Each step takes the budget lock separately, so that fills can continue in between. Each artifact is checked again
//! under its exclusive lease before it is removed. A dry run changes nothing: it applies the same rules to a table of
//! link counts in memory. A file with a link outside the cache frees no bytes.

use super::budget::{BudgetGuard, EvictOutcome};
use super::files;
use super::pin::KeepReason;
use super::rooted::RootedPath;
use super::{ArtifactDir, Disk, Misplaced, ScannedArtifact};
use crate::config::ByteBound;
use crate::error::Result;
use crate::json;
use crate::key::ArtifactKey;
use serde::Serialize;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Options of `prune`. By default, only leftovers are removed.
#[derive(Debug, Clone, Default)]
pub struct PruneOptions {
    /// Removes artifacts that were not used for this long.
    pub older_than: Option<Duration>,
    /// Removes the least recently used artifacts until at most this much is used. A percentage refers to the size of
    /// the filesystem.
    pub to: Option<ByteBound>,
    /// Also removes artifacts that no other tier is known to have: those without an origin that keeps old versions, if
    /// they were put without a remote or their upload is pending.
    pub only_copies: bool,
    /// Changes nothing, and only reports what would be removed.
    pub dry_run: bool,
}

/// The result of `prune`: the removals made, or those that a dry run would make.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PruneReport {
    /// True if nothing was removed, and the report states what would be removed.
    pub dry_run: bool,
    /// Bytes that counted against the budget before, according to a scan of all files.
    pub used_before_bytes: u64,
    /// Bytes that count against the budget afterwards.
    pub used_bytes: u64,
    /// Bytes of the leftovers and artifacts removed. Changes by other processes at the same time are not included.
    pub freed_bytes: u64,
    /// The requested size in bytes.
    pub to_bytes: Option<u64>,
    /// True if at most the requested size is used, or if no size was requested.
    pub reached: bool,
    /// The leftovers removed.
    pub leftovers: Leftovers,
    /// The artifacts removed, least recently used first.
    pub evicted: Vec<PrunedArtifact>,
    /// The artifacts that were to be removed and were kept, with the reason.
    pub kept: Vec<KeptArtifact>,
    /// The entries of the wrong type that were moved to `quarantine/`.
    pub set_aside: Vec<Misplaced>,
}

/// Files that neither an artifact nor a running fill uses. Each number of bytes is what their removal frees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Leftovers {
    /// Number of staging folders of dead fills.
    pub fills: usize,
    /// Bytes in those folders.
    pub fill_bytes: u64,
    /// Bytes of temporary files of dead writers.
    pub temporary_bytes: u64,
    /// Bytes of blobs to which no artifact has a link.
    pub blob_bytes: u64,
    /// Bytes of files that failed verification.
    pub quarantine_bytes: u64,
}

impl Leftovers {
    /// Returns the sum of all kinds, in bytes.
    pub fn bytes(&self) -> u64 {
        self.fill_bytes + self.temporary_bytes + self.blob_bytes + self.quarantine_bytes
    }
}

/// An artifact that was removed.
#[derive(Debug, Clone, Serialize)]
pub struct PrunedArtifact {
    /// The reference of the artifact.
    pub reference: String,
    /// When the artifact was last used.
    #[serde(serialize_with = "json::time")]
    pub last_used: Option<SystemTime>,
    /// Bytes freed. A file that another artifact shares frees no bytes.
    pub freed_bytes: u64,
}

/// An artifact that was to be removed and was kept.
#[derive(Debug, Clone, Serialize)]
#[serde(into = "KeptArtifactJson")]
pub struct KeptArtifact {
    /// The reference of the artifact.
    pub reference: String,
    /// The reason why it was kept.
    pub why: KeepReason,
}

/// The serialized form of a [`KeptArtifact`].
#[derive(Serialize)]
struct KeptArtifactJson {
    /// The reference of the artifact.
    reference: String,
    /// The kind of reason.
    why: &'static str,
    /// The reason in words.
    detail: String,
}

impl From<KeptArtifact> for KeptArtifactJson {
    fn from(kept: KeptArtifact) -> Self {
        Self { why: kept.why.name(), detail: kept.why.to_string(), reference: kept.reference }
    }
}

/// The steps of a prune: [`Apply`] performs them, [`DryRun`] computes their effect.
trait PruneActions {
    /// Counts the bytes against the budget by a scan of all files.
    fn count(&mut self) -> Result<u64>;
    /// Returns the bytes that count against the budget, according to the budget record.
    fn used(&mut self) -> Result<u64>;
    /// Removes leftovers.
    fn sweep(&mut self) -> Result<Leftovers>;
    /// Evicts one artifact, unless it is leased or pinned. If `only_copies` is false, also keeps it if it is the only
    /// copy. If `for_space` is true, also keeps it if no byte would become free.
    fn evict(&mut self, artifact: &ScannedArtifact, for_space: bool, only_copies: bool) -> Result<EvictOutcome>;
}

impl Disk {
    /// Removes leftovers, and artifacts according to `options`. Returns what was removed and kept.
    pub(crate) fn prune(&self, options: &PruneOptions) -> Result<PruneReport> {
        if files::stat(self.layout().root())?.is_none() {
            return Ok(PruneReport { dry_run: options.dry_run, reached: true, ..PruneReport::default() });
        }
        self.ensure_writable()?;
        // Step 1: move entries of the wrong type to `quarantine/`. This comes first, because such an entry may be at
        // the path of the budget lock.
        let misplaced = self.misplaced()?;
        let set_aside = if options.dry_run { misplaced } else { self.set_aside(misplaced) };
        let mut actions: Box<dyn PruneActions> =
            if options.dry_run { Box::new(DryRun::new(self)?) } else { Box::new(Apply(self)) };
        let cutoff = options.older_than.map(|age| SystemTime::now().checked_sub(age).unwrap_or(UNIX_EPOCH));
        let to_bytes = options.to.map(|to| self.bound_bytes(to)).transpose()?;
        // Step 2: count the bytes in use.
        let used_before_bytes = actions.count()?;
        let dry_run = options.dry_run;
        let mut report = PruneReport { dry_run, to_bytes, used_before_bytes, set_aside, ..PruneReport::default() };
        // Step 3: remove leftovers.
        report.leftovers = actions.sweep()?;
        // Step 4: evict artifacts, least recently used first. Stop at the first artifact that is neither old nor needed
        // to reach the requested size, because all later ones were used more recently.
        for artifact in self.scan_by_last_use()? {
            let is_old = cutoff.is_some_and(|cutoff| artifact.last_used.is_none_or(|last| last <= cutoff));
            if !is_old && !to_bytes.is_some_and(|to| actions.used().is_ok_and(|used| used > to)) {
                break;
            }
            let reference = artifact.name();
            // An old artifact is evicted even if that frees no bytes.
            match actions.evict(&artifact, !is_old, options.only_copies)? {
                EvictOutcome::Freed(freed_bytes) => {
                    report.evicted.push(PrunedArtifact { reference, last_used: artifact.last_used, freed_bytes });
                }
                EvictOutcome::Kept(why) => report.kept.push(KeptArtifact { reference, why }),
            }
        }
        // Step 5: count again, because other processes may have added or removed files in the meantime.
        report.used_bytes = actions.count()?;
        report.reached = to_bytes.is_none_or(|to| report.used_bytes <= to);
        report.freed_bytes =
            report.leftovers.bytes() + report.evicted.iter().map(|evicted| evicted.freed_bytes).sum::<u64>();
        Ok(report)
    }

    /// Returns the lease or the pin that protects the artifact from eviction at this moment; `None` if there is
    /// neither.
    pub(super) fn lease_or_pin(&self, dir: &ArtifactDir) -> Result<Option<KeepReason>> {
        if self.is_leased(dir) {
            return Ok(Some(KeepReason::Leased(self.lease_holders(dir))));
        }
        Ok(self.pin_in(dir)?.map(KeepReason::Pinned))
    }

    /// Returns the bytes that a sweep and the eviction of all artifacts would free at this moment. Leased and pinned
    /// artifacts, only copies, the artifacts in `kept` and the blobs with the inodes `kept_inodes` stay.
    pub(super) fn evictable_bytes(&self, kept: &BTreeSet<ArtifactKey>, kept_inodes: &[u64]) -> Result<u64> {
        let (mut dry_run, pending) = (DryRun::new(self)?, self.pending_hashes()?);
        kept_inodes.iter().for_each(|inode| dry_run.keep(*inode));
        let mut bytes = dry_run.sweep()?.bytes();
        let others = |artifact: &&ScannedArtifact| artifact.manifest.as_ref().is_none_or(|m| !kept.contains(&m.key));
        for artifact in self.scan()?.iter().filter(others).filter(|artifact| !artifact.is_only_copy(&pending)) {
            // Only copies are filtered out above, and are not looked up again.
            if let EvictOutcome::Freed(freed) = dry_run.evict(artifact, false, true)? {
                bytes += freed;
            }
        }
        Ok(bytes)
    }
}

impl BudgetGuard<'_> {
    /// Returns the reason why `prune` keeps an artifact that is neither leased nor pinned; `None` if it removes it.
    fn reason_not_to_prune(
        &mut self,
        artifact: &ScannedArtifact,
        for_space: bool,
        only_copies: bool,
    ) -> Result<Option<KeepReason>> {
        if !only_copies && self.is_only_copy(artifact)? {
            return Ok(Some(KeepReason::OnlyCopy));
        }
        // Evicting for space is useless if no byte would become free. An artifact that is evicted by age goes in any
        // case.
        if for_space { self.reason_to_spare(artifact) } else { Ok(None) }
    }
}

/// Performs the steps on disk.
struct Apply<'disk>(&'disk Disk);

impl PruneActions for Apply<'_> {
    fn count(&mut self) -> Result<u64> {
        let mut guard = self.0.lock_budget()?;
        guard.recount()?;
        let used = guard.usage()?.counted();
        guard.release()?;
        Ok(used)
    }

    fn used(&mut self) -> Result<u64> {
        Ok(self.0.usage()?.0.counted())
    }

    fn sweep(&mut self) -> Result<Leftovers> {
        let mut guard = self.0.lock_budget()?;
        let (before, dead) = (guard.usage()?, dead_stagings(self.0)?);
        let beside_manifests = dead_temporaries_of_artifacts(self.0)?;
        // Unlike a sweep, a prune also removes the staging folders that could be resumed.
        guard.remove_dead_stagings(|_| true)?;
        guard.sweep()?;
        let swept = guard.usage()?;
        guard.remove_quarantined()?;
        let after = guard.usage()?;
        guard.release()?;
        // A folder that could not be removed still exists and does not count as freed.
        let remaining = dead_stagings(self.0)?;
        Ok(Leftovers {
            fills: dead.fills.saturating_sub(remaining.fills),
            fill_bytes: dead.fill_bytes.saturating_sub(remaining.fill_bytes),
            temporary_bytes: before.temporary.saturating_sub(after.temporary) + beside_manifests,
            // Temporary files beside manifests count as published bytes.
            blob_bytes: before.published.saturating_sub(swept.published).saturating_sub(beside_manifests),
            quarantine_bytes: swept.published.saturating_sub(after.published),
        })
    }

    fn evict(&mut self, artifact: &ScannedArtifact, for_space: bool, only_copies: bool) -> Result<EvictOutcome> {
        let mut guard = self.0.lock_budget()?;
        let spared = guard.reason_not_to_prune(artifact, for_space, only_copies)?;
        let evicted = match spared {
            Some(why) => EvictOutcome::Kept(why),
            None => guard.evict(artifact)?,
        };
        guard.release()?;
        Ok(evicted)
    }
}

/// Counts the staging folders of dead fills and their bytes.
fn dead_stagings(disk: &Disk) -> Result<Leftovers> {
    let stagings = disk.stagings()?;
    let dead = stagings.iter().filter(|staging| !staging.live);
    Ok(dead.fold(Leftovers::default(), |sum, staging| Leftovers {
        fills: sum.fills + 1,
        fill_bytes: sum.fill_bytes + staging.allocated,
        ..sum
    }))
}

/// Returns the bytes of the temporary files of dead writers in the folders of artifacts, beside the manifests.
fn dead_temporaries_of_artifacts(disk: &Disk) -> Result<u64> {
    let mut bytes = 0;
    for artifact in disk.scan()? {
        let files = disk.temporaries(artifact.dir.path())?;
        bytes += files.iter().filter(|file| disk.is_dead_temporary(file)).map(|file| file.allocated()).sum::<u64>();
    }
    Ok(bytes)
}

/// Computes the effect of a prune in a table of blobs and their link counts. Changes nothing on disk.
struct DryRun<'disk> {
    disk: &'disk Disk,
    /// Bytes that would count against the budget.
    used: u64,
    /// Every blob, and every view without a blob, keyed by inode.
    blobs: HashMap<u64, Blob>,
}

struct Blob {
    bytes: u64,
    /// Number of remaining links, without the one in `blobs/`.
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
        let mut quarantined = HashSet::new();
        files::walk(&disk.layout().quarantine(), &mut |_, metadata| {
            used += metadata.allocated();
            quarantined.insert(metadata.ino());
            Ok(())
        })?;
        for artifact in disk.scan()? {
            used += disk.temporaries(artifact.dir.path())?.iter().map(|file| file.allocated()).sum::<u64>();
            // A view that is neither a blob nor quarantined counts, too: once for all its links, even if some are
            // outside the cache.
            files::walk(&artifact.dir.files(), &mut |_, metadata| {
                if let Entry::Vacant(vacant) = blobs.entry(metadata.ino())
                    && !quarantined.contains(&metadata.ino())
                {
                    let view = vacant.insert(Blob { bytes: metadata.allocated(), links: metadata.nlink() });
                    used += view.bytes;
                }
                Ok(())
            })?;
        }
        used += disk.stagings()?.iter().map(|staging| staging.allocated + staging.outstanding()).sum::<u64>();
        used += disk.temporaries(&disk.layout().stagings())?.iter().map(|file| file.allocated()).sum::<u64>();
        Ok(Self { disk, used, blobs })
    }

    /// Adds a link to a blob, so that evicting all artifacts that use it does not free it.
    fn keep(&mut self, inode: u64) {
        if let Some(blob) = self.blobs.get_mut(&inode) {
            blob.links += 1;
        }
    }

    /// Removes one link to a blob. Returns the bytes freed: the size of the blob if only the link in `blobs/` is left.
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

    /// Removes the links of all files below `dir`, and returns the bytes freed.
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
        leftovers.temporary_bytes += dead_temporaries_of_artifacts(self.disk)?;
        let orphans: Vec<u64> =
            self.blobs.iter().filter(|(_, blob)| blob.links == 0).map(|(inode, _)| *inode).collect();
        leftovers.blob_bytes += orphans.into_iter().map(|inode| self.unlink(inode)).sum::<u64>();
        for staging in self.disk.stagings()?.iter().filter(|staging| !staging.live) {
            leftovers.blob_bytes += self.unlink_below(&staging.dir)?;
        }
        for artifact in self.disk.scan()?.iter().filter(|artifact| !self.disk.is_leased(&artifact.dir)) {
            for view in artifact.unheld_views()? {
                if let Some(metadata) = files::stat(&view)? {
                    leftovers.blob_bytes += self.unlink(metadata.ino());
                }
            }
        }
        // Count files only: a folder in quarantine is a misplaced entry, which is removed only by hand.
        for path in files::entries(&self.disk.layout().quarantine())? {
            if let Some(metadata) = files::stat(&path)?.filter(|found| found.is_file() && found.nlink() == 1) {
                leftovers.quarantine_bytes += metadata.allocated();
            }
        }
        self.used = self.used.saturating_sub(leftovers.bytes());
        Ok(leftovers)
    }

    fn evict(&mut self, artifact: &ScannedArtifact, for_space: bool, only_copies: bool) -> Result<EvictOutcome> {
        if let Some(why) = self.disk.lease_or_pin(&artifact.dir)? {
            return Ok(EvictOutcome::Kept(why));
        }
        if for_space || !only_copies {
            let mut guard = self.disk.lock_budget()?;
            let spared = guard.reason_not_to_prune(artifact, for_space, only_copies)?;
            guard.release()?;
            if let Some(why) = spared {
                return Ok(EvictOutcome::Kept(why));
            }
        }
        let (disk, mut freed) = (self.disk, self.unlink_below(&artifact.dir.files())?);
        disk.hub_links(&artifact.dir, &mut |_, metadata| {
            freed += self.unlink(metadata.ino());
            Ok(())
        })?;
        self.used = self.used.saturating_sub(freed);
        Ok(EvictOutcome::Freed(freed))
    }
}
