//! Staging: the private folder of one fill, made and reserved in one budget hold.
//!
//! The journal in it is locked by the fill that owns the folder; a folder whose lock can be gained is a dead fill's. The
//! next fill of the same key adopts it and goes on with files that are named by a digest; others may remove it, and do
//! so before anything that is published goes. Blobs that the fill reuses are linked into staging first, so that they
//! cannot be evicted from under it.

use super::Disk;
use super::budget::{BudgetHold, allocated_for};
use super::files;
use super::io_error::IoContext;
use super::layout::staged_name;
use super::link;
use super::lock::FileLock;
use super::parts_journal::{journal_bytes, journal_of};
use super::rooted::{Metadata, RootedPath};
use super::{hashing, modes};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::human;
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::part_size;
use crate::manifest::{FileEntry, FileIdentity};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// Smaller files are hashed in moments, whoever waits.
const JUDGED_AHEAD_BYTES_MIN: u64 = 16 << 20;
/// Age after which a temporary file in staging is nobody's.
const TEMPORARY_AGE_MAX: Duration = Duration::from_secs(3600);
/// Age after which a sweep removes what a fill left to be resumed.
const RESUME_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// How long a fill waits for room that readers or other fills may give back.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long writes that are still under way are waited for.
const WRITES_WAIT_MAX: Duration = Duration::from_secs(10);
/// How often a staging folder is made anew.
const MAKES_MAX: usize = 16;
/// Time between two looks for room.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The name of the journal in each folder.
const JOURNAL: &str = "journal";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    /// Which artifact is being filled, for people.
    key: String,
    pid: u32,
    /// Bytes that the folder will hold when the fill is done.
    reserved: u64,
}

/// A fill's own folder. Dropped before it is [discarded](Self::discard), it stays if its fill can be resumed.
#[derive(Debug)]
pub(crate) struct Staging {
    disk: Disk,
    dir: RootedPath,
    owner: Arc<FileLock>,
    /// Staged names that are links to blobs, and the identity under which their bytes are known to be right.
    reused: BTreeMap<String, FileIdentity>,
    /// Those of them that are reflinks, which count by themselves, and the bytes that they take.
    reflinked: BTreeMap<String, u64>,
}

/// What one staging folder takes.
#[derive(Debug)]
pub(crate) struct StagingUse {
    pub(crate) dir: RootedPath,
    pub(crate) live: bool,
    pub(crate) allocated: u64,
    reserved: u64,
    /// The artifact, as its journal tells it.
    key: String,
    pid: u32,
}

impl StagingUse {
    /// Reserved and not yet written.
    pub(crate) fn outstanding(&self) -> u64 {
        if self.live { self.reserved.saturating_sub(self.allocated) } else { 0 }
    }

    pub(crate) fn journal(&self) -> RootedPath {
        self.dir.join(JOURNAL)
    }

    pub(crate) fn is_of(&self, key: &ArtifactKey) -> bool {
        self.dir.name().starts_with(&key.hash())
    }

    /// A live fill, for people.
    pub(crate) fn described(&self) -> String {
        format!("a fill of {} by process {} ({} bytes)", self.key, self.pid, self.reserved.max(self.allocated))
    }

    /// Whether the next fill of its key may want what is left here.
    pub(crate) fn may_be_resumed(&self) -> bool {
        let modified = |path: &RootedPath| path.metadata().ok().map(|metadata| metadata.modified());
        let latest = files::entries(&self.dir).unwrap_or_default().iter().filter_map(modified).max();
        let age = latest.and_then(|latest| SystemTime::now().duration_since(latest).ok());
        is_resumable(&self.dir) && self.journal().metadata().is_ok() && age.is_some_and(|age| age < RESUME_AGE_MAX)
    }

    /// Whether a fill that wants the files called `names` may take over what is here: they are most of it. A fill of
    /// less leaves it to one of more.
    fn is_for(&self, names: &BTreeSet<String>) -> bool {
        let (mut wanted, mut all) = (0, 0);
        for path in files::entries(&self.dir).unwrap_or_default().iter().filter(|path| by_content(path)) {
            let bytes = path.metadata().map_or(0, |metadata| metadata.len());
            all += bytes;
            wanted += if names.contains(staged_part(path)) { bytes } else { 0 };
        }
        2 * wanted >= all
    }

    /// Removes the folder, its journal last.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_staging(&self.dir)
    }
}

fn remove_staging(dir: &RootedPath) -> Result<()> {
    let journal = dir.join(JOURNAL);
    for path in files::entries(dir)?.into_iter().filter(|path| *path != journal) {
        files::remove(&path)?;
    }
    files::remove(dir)
}

fn names_of(wanted: &[(FilePath, FileEntry)]) -> BTreeSet<String> {
    wanted.iter().map(|(path, entry)| staged_name(path, entry)).collect()
}

/// The name of the staged file at `path`, or of the one whose parts the journal at `path` names.
fn staged_part(path: &RootedPath) -> &str {
    path.name().strip_suffix(".parts").unwrap_or(path.name())
}

/// Whether a staged file is named by its content.
fn by_content(path: &RootedPath) -> bool {
    staged_part(path).starts_with("sha256-") || staged_part(path).starts_with("git-")
}

/// Whether anything in the folder has bytes that are nowhere else, and is named by its content, so that whoever goes on
/// with it can check it.
fn is_resumable(dir: &RootedPath) -> bool {
    let has_bytes = |path: &RootedPath| files::stat(path).is_ok_and(|found| found.is_some_and(|m| m.nlink() == 1));
    files::entries(dir).unwrap_or_default().iter().any(|path| by_content(path) && has_bytes(path))
}

impl Disk {
    /// Makes a staging folder for `key`, or adopts what a dead fill left; links what disk already has of `wanted`, makes
    /// room for the rest, reserves it. Waits a little for room that is only held for now.
    pub(crate) fn begin_fill(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<Staging> {
        self.ensure_writable()?;
        self.refuse_beyond_budget(key, wanted)?;
        let started = Instant::now();
        loop {
            let found_right = self.hash_unsynced(wanted)?;
            match self.try_begin_fill(key, wanted, found_right).map_err(|error| error.artifact(key)) {
                Err(error) if error.kind() == ErrorKind::Full && error.is_transient() => {
                    if started.elapsed() > ROOM_WAIT_MAX {
                        return Err(error.transient(false));
                    }
                    thread::sleep(POLL_INTERVAL);
                }
                begun => return begun,
            }
        }
    }

    /// Hashes what is wanted, is here, and has nobody to vouch for it, such as what a writer left that died before it was
    /// durable: in a budget hold that would keep everybody waiting. Those that are right, as they were then.
    fn hash_unsynced(&self, wanted: &[(FilePath, FileEntry)]) -> Result<Vec<(Digest, FileIdentity)>> {
        let mut doubtful: BTreeMap<Digest, (&FileEntry, FileIdentity)> = BTreeMap::new();
        for (_, entry) in wanted.iter().filter(|(_, entry)| entry.size >= JUDGED_AHEAD_BYTES_MIN) {
            let Some(digest) = entry.sha256 else { continue };
            let blob =
                files::stat(&self.layout().blob(&digest))?.filter(|blob| blob.is_file() && blob.len() == entry.size);
            if let Some(blob) = blob {
                doubtful.insert(digest, (entry, blob.identity()));
            }
        }
        if doubtful.is_empty() {
            return Ok(Vec::new());
        }
        let mut hold = self.hold_budget()?;
        let mut unvouched = Vec::new();
        for (digest, (entry, identity)) in doubtful {
            if !hold.is_vouched(&digest, identity)? {
                unvouched.push((digest, entry, identity));
            }
        }
        hold.release()?;
        let is_right = |(digest, entry, known): &(Digest, &FileEntry, FileIdentity)| {
            let path = self.layout().blob(digest);
            let Ok(file) = path.open(false) else { return false };
            let is_known = || Metadata::of(&file).is_ok_and(|found| found.identity() == *known);
            is_known() && hashing::has_digest(&file, *digest, entry.ladder.as_ref()).unwrap_or(false) && is_known()
        };
        Ok(unvouched.into_iter().filter(is_right).map(|(digest, _, identity)| (digest, identity)).collect())
    }

    pub(super) fn try_begin_fill(
        &self,
        key: &ArtifactKey,
        wanted: &[(FilePath, FileEntry)],
        found_right: Vec<(Digest, FileIdentity)>,
    ) -> Result<Staging> {
        let mut hold = self.hold_budget()?;
        hold.found_right = found_right;
        let mut staging = match self.adopt_staging(key, wanted)? {
            Some(adopted) => adopted,
            None => self.make_staging(key)?,
        };
        let names = names_of(wanted);
        hold.drop_dead_stagings(|staging| staging.is_of(key) && (!staging.may_be_resumed() || staging.is_for(&names)))?;
        for (path, entry) in wanted {
            staging.reuse(&mut hold, key, path, entry)?;
        }
        let missing = wanted.iter().map(|(path, entry)| (staged_name(path, entry), space_to_stage(entry.size)));
        let missing: BTreeMap<String, u64> = missing.filter(|(name, _)| !staging.reused.contains_key(name)).collect();
        let reserved = missing.values().chain(staging.reflinked.values()).sum::<u64>();
        let extra = reserved.saturating_sub(staged_bytes(&staging.dir)?);
        hold.make_space(extra, key)?;
        staging.write_journal(key, reserved)?;
        hold.release()?;
        Ok(staging)
    }

    /// Refuses, before anything is evicted, what could never fit.
    fn refuse_beyond_budget(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<()> {
        let distinct: BTreeMap<String, u64> =
            wanted.iter().map(|(path, entry)| (staged_name(path, entry), space_to_stage(entry.size))).collect();
        let (needed, budget) = (distinct.values().sum::<u64>(), self.space()?.budget);
        if needed <= budget {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Full,
            format!("needs {} on disk, and the whole budget is {}", human::bytes(needed), human::bytes(budget)),
        )
        .artifact(key)
        .tier(Tier::Disk)
        .hint("raise MODEL_CACHE_MAX_BYTES; a get may choose fewer files (--include), a put may leave this disk out (--tier remote)"))
    }

    fn make_staging(&self, key: &ArtifactKey) -> Result<Staging> {
        for _ in 0..MAKES_MAX {
            if let Some(staging) = self.try_make_staging(key)? {
                return Ok(staging);
            }
        }
        Err(Error::new(ErrorKind::Other, "each new staging folder is locked by somebody else").tier(Tier::Disk))
    }

    /// `None` where somebody who was only looking had locked the new journal first.
    fn try_make_staging(&self, key: &ArtifactKey) -> Result<Option<Staging>> {
        let dir = self.layout().stagings().join(format!("{}-{}", key.hash(), files::random_name()));
        modes::make_new_dir(&dir).at("make", &dir)?;
        let journal = dir.join(JOURNAL);
        let file = modes::create_shared(&journal).at("make", &journal)?;
        let Some(owner) = FileLock::of_new(file, &journal)? else {
            files::remove(&dir)?;
            return Ok(None);
        };
        let staging = Staging::owned(self, dir, owner);
        staging.write_journal(key, 0)?;
        Ok(Some(staging))
    }

    /// Takes over the dead staging of `key` that holds most of what is wanted, and removes from it what is not wanted
    /// or cannot be told by its name. Within a budget hold, so that nobody removes it meanwhile.
    fn adopt_staging(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<Option<Staging>> {
        if !self.locks_are_honest() {
            return Ok(None);
        }
        let mut dead: Vec<StagingUse> =
            self.stagings()?.into_iter().filter(|staging| !staging.live && staging.is_of(key)).collect();
        dead.sort_by_key(|staging| std::cmp::Reverse(staging.allocated));
        let names = names_of(wanted);
        let us = rustix::process::geteuid().as_raw();
        dead.retain(|staging| {
            staging.is_for(&names) && staging.dir.metadata().is_ok_and(|metadata| metadata.uid() == us)
        });
        for StagingUse { dir, .. } in dead {
            let Some(Some(owner)) = FileLock::try_existing(&dir.join(JOURNAL))? else { continue };
            let staging = Staging::owned(self, dir, owner);
            // What the ended fill had reserved is nobody's any more.
            staging.write_journal(key, 0)?;
            if staging.keep_only(&names)? {
                tracing::info!(%key, bytes = staged_bytes(&staging.dir)?, "going on with what an ended fill left");
                return Ok(Some(staging));
            }
        }
        Ok(None)
    }

    /// Every staging folder and what it takes. Files that are links to blobs count there, not here.
    pub(crate) fn stagings(&self) -> Result<Vec<StagingUse>> {
        let mut uses = Vec::new();
        for dir in files::entries(&self.layout().stagings())? {
            if !files::is_folder(&dir)? {
                continue;
            }
            let path = dir.join(JOURNAL);
            let live = !self.is_idle(&dir)? || matches!(FileLock::try_existing(&path)?, Some(None));
            let journal = files::read_small(&path, 4096)?;
            let journal = journal.and_then(|bytes| serde_json::from_slice::<Journal>(&bytes).ok()).unwrap_or_default();
            let Journal { key, pid, reserved } = journal;
            uses.push(StagingUse { allocated: staged_bytes(&dir)?, dir, live, reserved, key, pid });
        }
        Ok(uses)
    }

    /// What writers have not given its name yet, directly in `folder`.
    pub(super) fn temporaries(&self, folder: &RootedPath) -> Result<Vec<Temporary>> {
        let mut found = Vec::new();
        for path in files::entries(folder)?.into_iter().filter(is_temporary) {
            found.extend(files::stat(&path)?.map(|metadata| Temporary { path, metadata }));
        }
        Ok(found)
    }

    /// Whether the writer of a temporary file with bytes in it died, as far as its lock tells. The caller holds the budget,
    /// so that nobody is about to write or rename it within a budget hold.
    pub(super) fn is_dead_temporary(&self, file: &Temporary) -> bool {
        self.locks_are_honest() && file.takes_bytes() && matches!(FileLock::try_existing(&file.path), Ok(Some(Some(_))))
    }
}

impl Staging {
    fn owned(disk: &Disk, dir: RootedPath, owner: FileLock) -> Self {
        let (reused, reflinked) = (BTreeMap::new(), BTreeMap::new());
        Self { disk: disk.clone(), dir, owner: Arc::new(owner), reused, reflinked }
    }

    /// Where the file called `name` is (to be) staged.
    pub(crate) fn file(&self, name: &str) -> RootedPath {
        self.dir.join(name)
    }

    /// The identity of `name`, if it is a link to a blob whose bytes are known to be right.
    pub(crate) fn reused(&self, name: &str) -> Option<FileIdentity> {
        self.reused.get(name).copied()
    }

    /// The lock that says that this folder is somebody's, for those who write into it.
    pub(crate) fn owner(&self) -> Arc<FileLock> {
        self.owner.clone()
    }

    /// Leaves the folder behind, as whoever is killed does.
    #[cfg(test)]
    pub(super) fn abandon(mut self) {
        self.dir = self.dir.join("left to the next sweep");
    }

    /// Removes the folder: what it held is published, or of no use to anybody. A write that is still under way, whose
    /// caller has given up, is waited for, so that it leaves nothing behind.
    pub(crate) fn discard(self) -> Result<()> {
        let started = Instant::now();
        while Arc::strong_count(&self.owner) > 1 && started.elapsed() < WRITES_WAIT_MAX {
            thread::sleep(Duration::from_millis(2));
        }
        remove_staging(&self.dir)
    }

    /// Removes what is not called by one of `names`, and what is linked elsewhere: the blob is linked anew. Whether
    /// anything is left.
    fn keep_only(&self, names: &BTreeSet<String>) -> Result<bool> {
        let mut kept = false;
        for path in files::entries(&self.dir)? {
            let own = files::stat(&path)?.is_some_and(|metadata| metadata.is_file() && metadata.nlink() == 1);
            if own && names.contains(staged_part(&path)) && by_content(&path) {
                kept = true;
            } else if path.name() != JOURNAL {
                files::remove(&path)?;
            }
        }
        Ok(kept)
    }

    /// Everything is written: from here on the folder counts by what it holds.
    pub(crate) fn end_reservation(&self, key: &ArtifactKey) -> Result<()> {
        self.write_journal(key, 0)
    }

    fn write_journal(&self, key: &ArtifactKey, reserved: u64) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let journal = Journal { key: key.to_string(), pid: std::process::id(), reserved };
        let mut bytes = serde_json::to_vec(&journal).unwrap_or_default();
        bytes.push(b'\n');
        let file = self.owner.file();
        let write = file.set_len(0).and_then(|()| file.write_all_at(&bytes, 0));
        write.at("write", &self.dir.join(JOURNAL))
    }

    /// Whether `name` is a reflink of a blob.
    pub(crate) fn is_reflink(&self, name: &str) -> bool {
        self.reflinked.contains_key(name)
    }

    /// Links (or reflinks) the bytes of `entry`, if disk has them and they are known, or found, to be right: the blob,
    /// or where there is none behind it, this artifact's own view. What can only be copied is left to the pour.
    fn reuse(
        &mut self,
        hold: &mut BudgetHold<'_>,
        key: &ArtifactKey,
        path: &FilePath,
        entry: &FileEntry,
    ) -> Result<()> {
        let Some(digest) = entry.sha256 else { return Ok(()) };
        let name = staged_name(path, entry);
        if self.reused.contains_key(&name) {
            return Ok(());
        }
        let (blob, view) = (self.disk.layout().blob(&digest), self.disk.layout().artifact(key).view(path));
        let known = match self.disk.checked_blob(hold, &digest)? {
            Some(known) => Some((blob, known)),
            None => hold.vouched_file(&view, &digest)?.map(|known| (view, known)),
        };
        let Some((from, known)) = known.filter(|(_, known)| known.bytes == entry.size) else { return Ok(()) };
        let target = self.file(&name);
        files::remove_file(&target)?;
        files::remove_file(&journal_of(&target))?;
        match files::absent(link::hard_link(&from, &target)).at("link", &target)? {
            Some(true) => match self.disk.linked(&target, &digest, known)? {
                Some(linked) => drop(self.reused.insert(name, linked)),
                None => files::remove_file(&target)?,
            },
            Some(false) => {
                if let Some(cloned) = link::reflink(&from, &target, known)? {
                    self.reflinked.insert(name.clone(), allocated_for(entry.size));
                    self.reused.insert(name, cloned);
                }
            }
            None => {}
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.dir.metadata().is_ok()
            && !is_resumable(&self.dir)
            && let Err(error) = remove_staging(&self.dir)
        {
            tracing::debug!(%error, "staging stays until the next sweep");
        }
    }
}

/// A file or folder that a writer has not given its name yet.
#[derive(Debug)]
pub(super) struct Temporary {
    pub(super) path: RootedPath,
    metadata: Metadata,
}

impl Temporary {
    /// Whether it is a file with bytes of its own. One that is a link to a blob counts there.
    fn takes_bytes(&self) -> bool {
        self.metadata.is_file() && self.metadata.nlink() == 1 && self.metadata.len() > 0
    }

    /// Bytes on the filesystem that count here.
    pub(super) fn allocated(&self) -> u64 {
        if self.takes_bytes() { self.metadata.allocated() } else { 0 }
    }

    /// Removes it if it was left alone for so long that its writer must have ended. In a sticky folder only its owner can.
    pub(super) fn remove_if_old(&self) {
        let age = SystemTime::now().duration_since(self.metadata.modified()).ok();
        if age > Some(TEMPORARY_AGE_MAX) {
            let _ = match self.metadata {
                found if found.is_file() => self.path.unlink(),
                found if found.is_dir() => self.path.remove_dir(),
                _ => Ok(()),
            };
        }
    }
}

fn is_temporary(path: &RootedPath) -> bool {
    path.name().starts_with(files::TEMPORARY)
}

/// Bytes that a staged file of `size` bytes takes, its journal included.
fn space_to_stage(size: u64) -> u64 {
    allocated_for(size) + allocated_for(journal_bytes(size, part_size(size)))
}

/// Bytes that the folder takes. Files that are links to blobs count there; the journal does not count.
fn staged_bytes(dir: &RootedPath) -> Result<u64> {
    let mut bytes = 0;
    files::walk(dir, &mut |path, metadata| {
        if metadata.nlink() == 1 && path.name() != JOURNAL {
            bytes += metadata.allocated();
        }
        Ok(())
    })?;
    Ok(bytes)
}
