//! Staging: the private folder of one fill. It contains the files being downloaded, and links to blobs that are reused.
//!
//! The fill that owns the folder holds the lock of the journal in it. If another process can take that lock, the fill
//! is dead. The next fill of the same key adopts the folder, and resumes those files whose names contain a digest.
//! Other processes remove the folder of a dead fill before they evict an artifact. The folder is created and its bytes
//! are reserved in one critical section (under the budget lock). The steps are those under *Fill* and *Resume* in
//! `docs/disk-format.md`.

use super::Disk;
use super::acquire::was_withdrawn;
use super::budget::{BudgetGuard, allocated_for};
use super::files;
use super::io_error::IoContext;
use super::layout::staged_name;
use super::link;
use super::lock::FileLock;
use super::parts_journal::{journal_bytes, journal_of};
use super::rooted::{Metadata, RootedPath};
use super::writer::StagedWriter;
use super::{hashing, modes};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::human;
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::part_size;
use crate::manifest::{FileEntry, FileIdentity};
use crate::option_name::call::{INCLUDE, TIER};
use crate::option_name::setting::MAX_BYTES;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// Minimum size in bytes of a blob that is hashed before the budget lock is taken. Hashing a smaller one takes
/// milliseconds and may be done under the lock.
const PREHASH_BYTES_MIN: u64 = 16 << 20;
/// Age of a temporary file after which its writer is presumed dead, if this cannot be found out by a lock.
const TEMPORARY_AGE_MAX: Duration = Duration::from_secs(3600);
/// Age after which a sweep removes a resumable staging folder.
const RESUME_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Maximum wait for room that leases or other fills may release.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(5);
/// Maximum wait for running writes before the folder is removed.
const WRITES_WAIT_MAX: Duration = Duration::from_secs(10);
/// Maximum number of attempts to create a staging folder and to lock its journal.
const CREATE_ATTEMPTS_MAX: usize = 16;
/// Time between two attempts to make room.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Name of the journal in each staging folder.
const JOURNAL: &str = "journal";

/// The content of a staging folder's journal.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    /// The artifact being filled, for messages.
    key: String,
    pid: u32,
    /// Bytes that the folder will take when the fill is done.
    reserved: u64,
}

/// The staging folder of a running fill. When this value is dropped without [`discard`](Self::discard), a folder that
/// can be resumed stays on disk.
#[derive(Debug)]
pub(crate) struct Staging {
    disk: Disk,
    dir: RootedPath,
    /// True if the folder was made by an earlier fill, which may have left files in it.
    is_adopted: bool,
    /// The lock of the journal.
    owner: Arc<FileLock>,
    /// The hard links and reflinks to local files, by staged name, with the identity under which the bytes are right.
    reused: BTreeMap<String, FileIdentity>,
    /// The bytes that each of the reflinks takes, by staged name. Unlike hard links, they count separately.
    reflinked: BTreeMap<String, u64>,
}

/// The space that one staging folder takes, and the state of its fill.
#[derive(Debug)]
pub(crate) struct StagingUse {
    pub(crate) dir: RootedPath,
    /// True while the fill that owns the folder is running.
    pub(crate) live: bool,
    /// Bytes allocated by files that are not links to blobs.
    pub(crate) allocated: u64,
    /// Bytes that the journal reserves.
    reserved: u64,
    /// The key of the artifact, according to the journal.
    pub(super) key: String,
    /// The process that fills it, according to the journal.
    pub(super) pid: u32,
}

impl StagingUse {
    /// Returns the bytes that a running fill has reserved and not yet written.
    pub(crate) fn outstanding(&self) -> u64 {
        if self.live { self.reserved.saturating_sub(self.allocated) } else { 0 }
    }

    pub(crate) fn journal(&self) -> RootedPath {
        self.dir.join(JOURNAL)
    }

    /// Returns the hash of the key of the artifact.
    pub(super) fn key_hash(&self) -> &str {
        self.dir.name().split('-').next().unwrap_or_default()
    }

    pub(crate) fn is_of(&self, key: &ArtifactKey) -> bool {
        self.key_hash() == key.hash()
    }

    /// Returns a description of a running fill, for messages.
    pub(crate) fn description(&self) -> String {
        format!("a fill of {} by process {} ({} bytes)", self.key, self.pid, self.reserved.max(self.allocated))
    }

    /// Returns true if a later fill may resume from this folder: it has files that can be resumed, and the last change
    /// is less than a day old.
    pub(crate) fn may_be_resumed(&self) -> bool {
        let modified = |path: &RootedPath| path.metadata().ok().map(|metadata| metadata.modified());
        let latest = files::entries(&self.dir).unwrap_or_default().iter().filter_map(modified).max();
        let age = latest.and_then(|latest| SystemTime::now().duration_since(latest).ok());
        is_resumable(&self.dir) && self.journal().metadata().is_ok() && age.is_some_and(|age| age < RESUME_AGE_MAX)
    }

    /// Returns true if the files called `names` make up at least half of the bytes in this folder. A fill that needs
    /// fewer of them leaves the folder to a larger fill.
    fn is_mostly(&self, names: &BTreeSet<String>) -> bool {
        let (mut wanted_bytes, mut all_bytes) = (0, 0);
        for path in files::entries(&self.dir).unwrap_or_default().iter().filter(|path| is_named_by_content(path)) {
            let bytes = path.metadata().map_or(0, |metadata| metadata.len());
            all_bytes += bytes;
            wanted_bytes += if names.contains(staged_file_name(path)) { bytes } else { 0 };
        }
        2 * wanted_bytes >= all_bytes
    }

    /// Removes the folder.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_staging(&self.dir)
    }
}

/// Calls `attempt` until it no longer fails because of leases or other fills that may release room, for up to
/// [`ROOM_WAIT_MAX`]. Each attempt is one critical section; between attempts the budget lock is free.
fn wait_for_room<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::Full && error.is_transient() => {
                if started.elapsed() > ROOM_WAIT_MAX {
                    return Err(error.transient(false));
                }
                thread::sleep(POLL_INTERVAL);
            }
            ended => return ended,
        }
    }
}

/// Removes a staging folder, its journal last.
fn remove_staging(dir: &RootedPath) -> Result<()> {
    let journal = dir.join(JOURNAL);
    // While the journal exists, its lock shows other processes that the folder is in use.
    for path in files::entries(dir)?.into_iter().filter(|path| *path != journal) {
        files::remove(&path)?;
    }
    files::remove(dir)
}

/// Returns the staged names of `wanted`.
fn names_of(wanted: &[(FilePath, FileEntry)]) -> BTreeSet<String> {
    wanted.iter().map(|(path, entry)| staged_name(path, entry)).collect()
}

/// Returns the name of the staged file at `path`; for a parts journal, the name of the staged file that it describes.
fn staged_file_name(path: &RootedPath) -> &str {
    path.name().strip_suffix(".parts").unwrap_or(path.name())
}

/// Returns true if the name of a staged file contains a digest of its content, so that another fill can verify it.
fn is_named_by_content(path: &RootedPath) -> bool {
    staged_file_name(path).starts_with("sha256-") || staged_file_name(path).starts_with("git-")
}

/// Returns true if the folder has a file that a later fill can resume: the name contains a digest, and the file has no
/// other link.
fn is_resumable(dir: &RootedPath) -> bool {
    let has_bytes = |path: &RootedPath| files::stat(path).is_ok_and(|found| found.is_some_and(|m| m.nlink() == 1));
    files::entries(dir).unwrap_or_default().iter().any(|path| is_named_by_content(path) && has_bytes(path))
}

impl Disk {
    /// Creates or adopts a staging folder for `key`, links the files of `wanted` that are already on disk, makes room
    /// for the others, and reserves it. Waits up to [`ROOM_WAIT_MAX`] for room that leases or other fills may release.
    pub(crate) fn begin_fill(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<Staging> {
        self.ensure_writable()?;
        self.refuse_beyond_budget(key, wanted)?;
        wait_for_room(|| {
            let verified_before = self.hash_unvouched(wanted)?;
            self.try_begin_fill(key, wanted, verified_before).map_err(|error| error.artifact(key))
        })
    }

    /// Hashes the wanted blobs for which no manifest vouches, for instance because they were not synced before a
    /// reboot. Returns the blobs with the right bytes, with the identity that each had when it was hashed.
    ///
    /// Call this before taking the budget lock: hashing under that lock would block all other processes.
    fn hash_unvouched(&self, wanted: &[(FilePath, FileEntry)]) -> Result<Vec<(Digest, FileIdentity)>> {
        let mut present: BTreeMap<Digest, (&FileEntry, FileIdentity)> = BTreeMap::new();
        for (_, entry) in wanted.iter().filter(|(_, entry)| entry.size >= PREHASH_BYTES_MIN) {
            let Some(digest) = entry.sha256 else { continue };
            let blob = files::stat(&self.layout().blob(&digest))?;
            let blob = blob.filter(|blob| blob.is_file() && blob.len() == entry.size && !was_withdrawn(blob));
            if let Some(blob) = blob {
                present.insert(digest, (entry, blob.identity()));
            }
        }
        if present.is_empty() {
            return Ok(Vec::new());
        }
        // A short critical section to look up the records, then hash without the lock.
        let mut guard = self.lock_budget()?;
        let mut unvouched = Vec::new();
        for (digest, (entry, identity)) in present {
            if !guard.is_vouched(&digest, identity)? {
                unvouched.push((digest, entry, identity));
            }
        }
        guard.release()?;
        let is_right = |(digest, entry, known): &(Digest, &FileEntry, FileIdentity)| {
            let path = self.layout().blob(digest);
            let Ok(file) = path.open(false) else { return false };
            let is_known = || Metadata::of(&file).is_ok_and(|found| found.identity() == *known);
            // The file must have the identity before and after it is hashed. Otherwise the digest may be that of other
            // bytes.
            is_known() && hashing::has_digest(&file, *digest, entry.ladder.as_ref()).unwrap_or(false) && is_known()
        };
        Ok(unvouched.into_iter().filter(is_right).map(|(digest, _, identity)| (digest, identity)).collect())
    }

    /// Makes one attempt of [`begin_fill`](Self::begin_fill), in one critical section. `verified_before` lists the
    /// blobs that were hashed before and have the right bytes.
    pub(super) fn try_begin_fill(
        &self,
        key: &ArtifactKey,
        wanted: &[(FilePath, FileEntry)],
        verified_before: Vec<(Digest, FileIdentity)>,
    ) -> Result<Staging> {
        let mut guard = self.lock_budget()?;
        guard.verified_before = verified_before;
        // Adopt the staging folder of a dead fill of this key, or create one.
        let mut staging = match self.adopt_staging(key, wanted)? {
            Some(adopted) => adopted,
            None => self.make_staging(key)?,
        };
        let names = names_of(wanted);
        // Remove the other dead folders of this key, except those that a larger fill may resume.
        guard.remove_dead_stagings(|staging| {
            staging.is_of(key) && (!staging.may_be_resumed() || staging.is_mostly(&names))
        })?;
        // Link the files that are already on disk. From now on, no eviction can free their bytes.
        for (path, entry) in wanted {
            staging.reuse(&mut guard, key, path, entry)?;
        }
        // Make room for the other files, less the bytes that the adopted folder already takes.
        let missing = wanted.iter().map(|(path, entry)| (staged_name(path, entry), space_to_stage(entry.size)));
        let missing: BTreeMap<String, u64> = missing.filter(|(name, _)| !staging.reused.contains_key(name)).collect();
        let reserved = missing.values().chain(staging.reflinked.values()).sum::<u64>();
        let extra = reserved.saturating_sub(staged_bytes(&staging.dir)?);
        guard.make_space(extra, key)?;
        // Reserve the room before the lock is released, so that another fill does not take it.
        staging.write_journal(key, reserved)?;
        guard.release()?;
        Ok(staging)
    }

    /// Refuses a fill that is larger than the whole budget, before anything is evicted for it.
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
        .hint(format!(
            "raise {MAX_BYTES}; a get may choose fewer files ({INCLUDE}), a put may leave this disk out ({})",
            TIER.set_to("remote")
        )))
    }

    /// Creates a staging folder for `key`.
    fn make_staging(&self, key: &ArtifactKey) -> Result<Staging> {
        for _ in 0..CREATE_ATTEMPTS_MAX {
            if let Some(staging) = self.try_make_staging(key)? {
                return Ok(staging);
            }
        }
        Err(Error::new(ErrorKind::Other, "every new staging folder was locked by another process").tier(Tier::Disk))
    }

    /// Creates a staging folder and locks its journal; `None` if another process locked the journal first, to test it.
    fn try_make_staging(&self, key: &ArtifactKey) -> Result<Option<Staging>> {
        let dir = self.layout().stagings().join(format!("{}-{}", key.hash(), files::random_name()));
        modes::make_new_dir(&dir).at("make", &dir)?;
        let journal = dir.join(JOURNAL);
        let file = modes::create_shared(&journal).at("make", &journal)?;
        let Some(owner) = FileLock::of_new(file, &journal)? else {
            files::remove(&dir)?;
            return Ok(None);
        };
        let staging = Staging::owned(self, dir, false, owner);
        staging.write_journal(key, 0)?;
        Ok(Some(staging))
    }

    /// Adopts the largest staging folder of a dead fill of `key` in which the wanted files make up at least half of the
    /// bytes, and removes all other files from it.
    ///
    /// The caller holds the budget lock, so that no other process removes the folder meanwhile.
    fn adopt_staging(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<Option<Staging>> {
        // If locks do not exclude other processes, a lock that can be taken does not prove that the fill is dead.
        if !self.locks_are_honest() {
            return Ok(None);
        }
        let mut dead: Vec<StagingUse> =
            self.stagings()?.into_iter().filter(|staging| !staging.live && staging.is_of(key)).collect();
        dead.sort_by_key(|staging| std::cmp::Reverse(staging.allocated));
        let names = names_of(wanted);
        // Adopt only folders of this user, because other users cannot read files that are being filled (mode 0600).
        let this_user = rustix::process::geteuid().as_raw();
        dead.retain(|staging| {
            staging.is_mostly(&names) && staging.dir.metadata().is_ok_and(|metadata| metadata.uid() == this_user)
        });
        for StagingUse { dir, .. } in dead {
            // A process that holds the lock of the journal owns the folder. After locking, `try_existing` checks that
            // the path still leads to the locked file.
            let Some(Some(owner)) = FileLock::try_existing(&dir.join(JOURNAL))? else { continue };
            let staging = Staging::owned(self, dir, true, owner);
            // End the reservation of the dead fill.
            staging.write_journal(key, 0)?;
            if staging.keep_only(&names)? {
                match resumable_bytes(&staging.dir)? {
                    0 => tracing::info!(%key, "an interrupted fill is repeated; no part of its files was complete"),
                    bytes => tracing::info!(%key, bytes, "resuming the files of an interrupted fill"),
                }
                return Ok(Some(staging));
            }
        }
        Ok(None)
    }

    /// Returns every staging folder with the space that it takes. Links to blobs are left out, because they count as
    /// blobs.
    pub(crate) fn stagings(&self) -> Result<Vec<StagingUse>> {
        let mut uses = Vec::new();
        for dir in files::entries(&self.layout().stagings())? {
            if files::is_folder(&dir)? {
                uses.extend(files::unless_inaccessible(self.staging_use(dir.clone()), &dir)?);
            }
        }
        Ok(uses)
    }

    /// Returns the bytes of complete parts in the staging folders of dead fills.
    pub(crate) fn resumable_bytes(&self) -> Result<u64> {
        let dead = self.stagings()?.into_iter().filter(|staging| !staging.live);
        dead.map(|staging| resumable_bytes(&staging.dir)).sum()
    }

    fn staging_use(&self, dir: RootedPath) -> Result<StagingUse> {
        let path = dir.join(JOURNAL);
        // The fill is running if the owner holds its lock. If locks do not exclude other processes, it counts as
        // running if the folder was changed within the last hour.
        let live = !self.is_idle(&dir)? || matches!(FileLock::try_existing(&path)?, Some(None));
        let journal = files::read_small(&path, 4096)?;
        let journal = journal.and_then(|bytes| serde_json::from_slice::<Journal>(&bytes).ok()).unwrap_or_default();
        let Journal { key, pid, reserved } = journal;
        Ok(StagingUse { allocated: staged_bytes(&dir)?, dir, live, reserved, key, pid })
    }

    /// Returns the temporary files and folders directly in `folder` that their writers have not renamed yet.
    pub(super) fn temporaries(&self, folder: &RootedPath) -> Result<Vec<Temporary>> {
        let mut found = Vec::new();
        for path in files::entries_if_accessible(folder)?.into_iter().filter(is_temporary) {
            found.extend(files::stat(&path)?.map(|metadata| Temporary { path, metadata }));
        }
        Ok(found)
    }

    /// Returns true if the writer of a non-empty temporary file is dead: its lock can be taken.
    ///
    /// The caller holds the budget lock. A temporary file without a lock of its own is written only under the budget
    /// lock, so it is not in use now.
    pub(super) fn is_dead_temporary(&self, file: &Temporary) -> bool {
        self.locks_are_honest() && file.takes_bytes() && matches!(FileLock::try_existing(&file.path), Ok(Some(Some(_))))
    }
}

impl Staging {
    /// Returns the staging folder `dir`, whose journal is locked by `owner`.
    fn owned(disk: &Disk, dir: RootedPath, is_adopted: bool, owner: FileLock) -> Self {
        let (reused, reflinked) = (BTreeMap::new(), BTreeMap::new());
        Self { disk: disk.clone(), dir: dir.opened(), is_adopted, owner: Arc::new(owner), reused, reflinked }
    }

    /// Returns true if an earlier fill may have left files in the folder.
    pub(crate) fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// Returns the path at which the file called `name` is staged.
    pub(crate) fn file(&self, name: &str) -> RootedPath {
        self.dir.join(name)
    }

    /// Returns the identity of the staged file `name` if it is a hard link or reflink of a local file with the right
    /// bytes.
    pub(crate) fn reused(&self, name: &str) -> Option<FileIdentity> {
        self.reused.get(name).copied()
    }

    /// Returns the owner lock. Each task that writes into this folder keeps a clone, so that the lock is held until its
    /// last write ends.
    pub(crate) fn owner(&self) -> Arc<FileLock> {
        self.owner.clone()
    }

    /// Leaves the folder on disk, as a killed process does.
    #[cfg(test)]
    pub(super) fn abandon(mut self) {
        // Dropping `self` then finds no folder to remove.
        self.dir = self.dir.join("absent");
    }

    /// Removes the folder. Its files are published or no longer needed.
    pub(crate) fn discard(self) -> Result<()> {
        let started = Instant::now();
        // A write may still be running after its caller was cancelled. Wait for it, so that it leaves no file behind.
        while Arc::strong_count(&self.owner) > 1 && started.elapsed() < WRITES_WAIT_MAX {
            thread::sleep(Duration::from_millis(2));
        }
        remove_staging(&self.dir)
    }

    /// Removes all files except those called `names` that can be resumed. Returns true if any file is left.
    fn keep_only(&self, names: &BTreeSet<String>) -> Result<bool> {
        let mut kept = false;
        for path in files::entries(&self.dir)? {
            // A file with more than one link is a reused blob. `reuse` checks the blob and links it again.
            let is_sole_link = files::stat(&path)?.is_some_and(|metadata| metadata.is_file() && metadata.nlink() == 1);
            if is_sole_link && names.contains(staged_file_name(&path)) && is_named_by_content(&path) {
                kept = true;
            } else if path.name() != JOURNAL {
                files::remove(&path)?;
            }
        }
        Ok(kept)
    }

    /// Makes room for `extra` bytes more than the journal reserves, and reserves `reserved` bytes in all.
    pub(super) fn try_extend_reservation(&self, key: &ArtifactKey, extra: u64, reserved: u64) -> Result<()> {
        let mut guard = self.disk.lock_budget()?;
        guard.make_space(extra, key).map_err(|error| error.artifact(key))?;
        self.write_journal(key, reserved)?;
        guard.release()
    }

    /// Like [`try_extend_reservation`](Self::try_extend_reservation), but waits up to [`ROOM_WAIT_MAX`] for room that
    /// leases or other fills may release.
    pub(super) fn extend_reservation(&self, key: &ArtifactKey, extra: u64, reserved: u64) -> Result<()> {
        wait_for_room(|| self.try_extend_reservation(key, extra, reserved))
    }

    /// Ends the reservation, when all bytes are written. From then on, only the allocated bytes of the folder count.
    pub(crate) fn end_reservation(&self, key: &ArtifactKey) -> Result<()> {
        self.write_journal(key, 0)
    }

    /// Overwrites the journal in place, because its lock is bound to the inode. A torn journal counts as empty.
    fn write_journal(&self, key: &ArtifactKey, reserved: u64) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let journal = Journal { key: key.to_string(), pid: std::process::id(), reserved };
        let mut bytes = serde_json::to_vec(&journal).unwrap_or_default();
        bytes.push(b'\n');
        let file = self.owner.file();
        let write = file.set_len(0).and_then(|()| file.write_all_at(&bytes, 0));
        write.at("write", &self.dir.join(JOURNAL))
    }

    /// Returns true if the staged file `name` is a reflink of a local file.
    pub(crate) fn is_reflink(&self, name: &str) -> bool {
        self.reflinked.contains_key(name)
    }

    /// Links a local file with the bytes of `entry` into the staging folder, if there is one: the blob, otherwise the
    /// view of this artifact.
    ///
    /// If the hard link is refused, makes a reflink. If that fails as well, nothing is staged: the download then uses
    /// the local file as its first source.
    fn reuse(
        &mut self,
        guard: &mut BudgetGuard<'_>,
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
        let known = match self.disk.checked_blob(guard, &blob, &digest)? {
            Some(known) => Some((blob, known)),
            None => match files::stat(&view)? {
                // A view without a blob may be executable, and then has another mode than a plain file.
                Some(found) if found.mode() & 0o111 != 0 && !entry.executable => None,
                Some(found) if found.is_file() && guard.is_vouched(&digest, found.identity())? => {
                    Some((view, found.identity()))
                }
                _ => None,
            },
        };
        let Some((from, known)) = known.filter(|(_, known)| known.bytes == entry.size) else { return Ok(()) };
        // The local file is complete, so remove a partial download that an adopted folder may contain.
        let target = self.file(&name);
        files::remove_file(&target)?;
        files::remove_file(&journal_of(&target))?;
        match files::absent(link::hard_link(&from, &target)).at("link", &target)? {
            // Check the new link: the file may have been replaced between the check and the link.
            Some(true) => match self.disk.check_link(&target, &digest, known)? {
                Some(linked) => drop(self.reused.insert(name, linked)),
                None => files::remove_file(&target)?,
            },
            // The hard link is refused. A reflink is a separate file, whose bytes count in full.
            Some(false) => {
                if let Some(cloned) = link::reflink(&from, &target, known)? {
                    self.reflinked.insert(name.clone(), allocated_for(entry.size));
                    self.reused.insert(name, cloned);
                }
            }
            // The file was removed after the check: download it.
            None => {}
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A folder that can be resumed stays for the next fill of the key.
        if self.dir.metadata().is_ok()
            && !is_resumable(&self.dir)
            && let Err(error) = remove_staging(&self.dir)
        {
            tracing::debug!(%error, "the staging folder cannot be removed; it stays until the next sweep");
        }
    }
}

/// A temporary file or folder (`new-…`) that its writer has not renamed yet.
#[derive(Debug)]
pub(super) struct Temporary {
    pub(super) path: RootedPath,
    metadata: Metadata,
}

impl Temporary {
    /// Returns true if it is a non-empty file with one link. A further link to a blob takes no bytes.
    fn takes_bytes(&self) -> bool {
        self.metadata.is_file() && self.metadata.nlink() == 1 && self.metadata.len() > 0
    }

    /// Returns the allocated bytes that count against the budget as a temporary file.
    pub(super) fn allocated(&self) -> u64 {
        if self.takes_bytes() { self.metadata.allocated() } else { 0 }
    }

    /// Removes the file or the empty folder if it was not changed for [`TEMPORARY_AGE_MAX`].
    pub(super) fn remove_if_old(&self) {
        let age = SystemTime::now().duration_since(self.metadata.modified()).ok();
        if age > Some(TEMPORARY_AGE_MAX) {
            // Errors are ignored: in a sticky folder only the owner of the entry can remove it.
            let _ = match self.metadata {
                found if found.is_file() => self.path.unlink(),
                found if found.is_dir() => self.path.remove_dir(),
                _ => Ok(()),
            };
        }
    }
}

fn is_temporary(path: &RootedPath) -> bool {
    path.name().starts_with(files::TEMPORARY_PREFIX)
}

/// Returns the bytes that a staged file of `size` bytes and its parts journal take.
pub(super) fn space_to_stage(size: u64) -> u64 {
    allocated_for(size) + allocated_for(journal_bytes(size, part_size(size)))
}

/// Returns the bytes of complete parts in the folder, from which a later fill can resume. A file of several slices is
/// allocated in full before its first byte is written, so [`staged_bytes`] may be larger.
fn resumable_bytes(dir: &RootedPath) -> Result<u64> {
    let mut bytes = 0;
    for path in files::entries_if_accessible(dir)? {
        let staged = files::stat(&path)?.filter(|found| found.is_file() && found.nlink() == 1);
        if let Some(metadata) = staged
            && staged_file_name(&path) == path.name()
            && is_named_by_content(&path)
        {
            bytes += StagedWriter::resumable_bytes(&path, &metadata);
        }
    }
    Ok(bytes)
}

/// Returns the allocated bytes of the folder, without its journal and without links to blobs, which count as blobs.
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
