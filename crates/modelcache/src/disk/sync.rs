//! Making what is published durable, after the fact.
//!
//! First the bytes of every file that bears a mark, then the names that lead to them, then the manifest without the
//! marks: a power cut in between leaves marks of another boot, and whoever finds them hashes. A file that the kernel
//! could not write down is wrong from then on, whatever a read says: it is withdrawn as a wrong one is, and no sync is
//! tried twice.
//!
//! What a dead writer left is hashed whole first, by the one who wants to lend it, and then made durable the same way.

use super::acquire::{AcquireOutcome, Mismatch};
use super::files;
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::rooted::{Metadata, RootedPath};
use super::{Disk, fault};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, Held, Manifest};
use crate::selection::Selection;
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// From so many files on the whole filesystem is synced at once: each file alone costs the medium a flush.
const ALL_AT_ONCE: usize = 64;
/// How long another process that checks the same is waited for; then both do.
const CHECK_WAIT_MAX: Duration = Duration::from_secs(120);
/// Time between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How often lending for good starts again.
const ROUNDS_MAX: usize = 1500;

/// A file that the medium did not take, with the descriptor that was told so.
type Refused = (FilePath, FileEntry, File, std::io::Error);

/// A file that is to be durable under an identity, and found right under it.
pub(super) type SyncedFile = (FilePath, FileEntry, FileIdentity);

impl Disk {
    /// Makes everything durable that this process published. What fails is told, and does not stop the others.
    pub(crate) fn sync_dirty(&self) -> Result<()> {
        let mut outcome = Ok(());
        for key in self.dirty() {
            let synced = self.sync_artifact(&key);
            if let Err(error) = &synced {
                tracing::warn!(artifact = %key, %error, "what was published is not made durable");
            }
            outcome = outcome.and(synced);
        }
        outcome
    }

    /// Makes durable what is published of `key` and in the hands of a writer that lives, this process first of all.
    ///
    /// # Errors
    /// `Directory` where the medium failed: the file is withdrawn then, and the next get fetches it again.
    pub(crate) fn sync_artifact(&self, key: &ArtifactKey) -> Result<()> {
        let _turn = self.pending_syncs().turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (dir, number) = (self.layout().artifact(key), self.dirty_number(key));
        let synced = self.sync_marked(&dir);
        // A budget that is held for too long is a reason to try again. That a sync failed is none.
        if let Some(number) = number
            && !synced.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unavailable)
        {
            self.mark_synced(key, number);
        }
        synced
    }

    fn sync_marked(&self, dir: &ArtifactDir) -> Result<()> {
        // It may have been evicted since.
        let Some(manifest) = self.read_manifest(dir)? else { return Ok(()) };
        let mut writer_liveness = self.writer_liveness();
        let marked = manifest.files.iter().filter(|(_, entry)| entry.unsynced().is_some());
        let found =
            marked.filter_map(|(path, entry)| Some((path.clone(), entry.clone(), writer_liveness.identity(entry)?)));
        self.make_durable(dir, &found.collect::<Vec<_>>())?.map_or(Ok(()), Err)
    }

    /// Lends for good: what `selection` chooses of `key` is durable when this returns, if it is here.
    pub(crate) fn sync_selected(&self, key: &ArtifactKey, selection: &Selection) -> Result<()> {
        let dir = self.layout().artifact(key);
        for _ in 0..ROUNDS_MAX {
            let Some(manifest) = self.shared_manifest(&dir)? else { return Ok(()) };
            let is_marked = manifest.selected(selection).any(|(_, entry)| entry.unsynced().is_some());
            if self.is_read_only() || (!is_marked && !self.is_dirty(key)) {
                return Ok(());
            }
            self.sync_artifact(key)?;
            // A writer that has just died leaves what must be hashed.
            if is_marked && !matches!(self.acquire(key, selection)?, AcquireOutcome::Leased(_)) {
                return Ok(());
            }
            // Somebody may be publishing more of it just now.
            if self.is_dirty(key) {
                thread::sleep(POLL_INTERVAL);
            }
        }
        Err(Error::unavailable("it is published again and again while it is made durable"))
    }

    /// Hashes what a writer left that died before it was durable: what is right is made durable, what is wrong withdrawn.
    pub(super) fn recheck(&self, key: &ArtifactKey, dir: &ArtifactDir, selection: &Selection) -> Result<()> {
        let _turn = self.turn_to_check(dir, selection)?;
        let Some(manifest) = self.read_manifest(dir)? else { return Ok(()) };
        let mut found = Vec::new();
        for (path, entry) in self.doubtful(&manifest, selection) {
            match self.check_file(&dir.view(&path), &entry)? {
                Mismatch::Right(identity) => found.push((path, entry, identity)),
                mismatch => drop(self.record_mismatch(dir, &path, &entry, mismatch)?),
            }
        }
        if !found.is_empty() {
            tracing::info!(artifact = %key, files = found.len(), "what a process left that ended before it was durable was read in full, and is right");
        }
        // What the medium refuses is missing then, and fetched again.
        self.make_durable(dir, &found).map(|_| ())
    }

    /// Whether anything selected was left by a writer that died.
    pub(super) fn is_doubtful(&self, manifest: &Manifest, selection: &Selection) -> bool {
        let mut writer_liveness = self.writer_liveness();
        manifest
            .selected(selection)
            .any(|(_, entry)| entry.unsynced().is_some() && writer_liveness.identity(entry).is_none())
    }

    fn doubtful(&self, manifest: &Manifest, selection: &Selection) -> Vec<(FilePath, FileEntry)> {
        let mut writer_liveness = self.writer_liveness();
        let selected = manifest.selected(selection).filter(|(_, entry)| entry.unsynced().is_some());
        let doubtful = selected.filter(|(_, entry)| writer_liveness.identity(entry).is_none());
        doubtful.map(|(path, entry)| (path.clone(), entry.clone())).collect()
    }

    /// Of many who find the same doubtful files at once, after a reboot for instance, one hashes. The lock saves work,
    /// nothing else: who has waited for too long does it, too.
    fn turn_to_check(&self, dir: &ArtifactDir, selection: &Selection) -> Result<Option<FileLock>> {
        let (path, started) = (self.layout().check_lock(dir), Instant::now());
        loop {
            if let Some(turn) = FileLock::try_exclusive(&path)? {
                return Ok(Some(turn));
            }
            let manifest = self.shared_manifest(dir)?;
            let is_done = manifest.is_none_or(|manifest| !self.is_doubtful(&manifest, selection));
            if is_done || started.elapsed() > CHECK_WAIT_MAX {
                return Ok(None);
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Makes `found` durable, and says so in the manifest of `dir`. What the medium refuses is withdrawn; the first such
    /// refusal.
    pub(super) fn make_durable(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<Option<Error>> {
        if found.is_empty() {
            return Ok(None);
        }
        let (mut failed, mut refusal) = (BTreeSet::new(), None);
        if found.len() <= ALL_AT_ONCE || !self.sync_filesystems(dir)? {
            let (refused, passed_over) = self.sync_files(dir, found)?;
            failed.extend(passed_over);
            for (path, entry, file, cause) in refused {
                let error = fault("make durable", &dir.view(&path), cause);
                tracing::warn!(artifact = %dir.path(), file = %path, %error, "the medium did not take it; it is withdrawn, and the next get fetches it again");
                self.record_mismatch(dir, &path, &entry, Mismatch::Wrong(file))?;
                failed.insert(path);
                refusal.get_or_insert(error);
            }
            self.sync_folders(dir, found)?;
        }
        self.edit_manifest(dir, |manifest| {
            let mut is_changed = false;
            for (path, _, identity) in found.iter().filter(|(path, ..)| !failed.contains(path)) {
                let entry = manifest.files.get_mut(path).filter(|entry| entry.held.is_some());
                if let Some(entry) = entry.filter(|entry| self.is_still(dir, path, entry, *identity)) {
                    is_changed |= entry.on_disk() != Some(*identity);
                    entry.held = Some(Held::Disk(*identity));
                }
            }
            is_changed
        })?;
        Ok(refusal)
    }

    /// Whether what was made durable is what is recorded, or what lies there though another file was recorded.
    fn is_still(&self, dir: &ArtifactDir, path: &FilePath, entry: &FileEntry, synced: FileIdentity) -> bool {
        let lies_there = || files::stat(&dir.view(path)).ok().flatten().map(|metadata| metadata.identity());
        entry.recorded_on_disk() == Some(synced) || lies_there() == Some(synced)
    }

    /// Everything on the filesystems that hold the artifact, at once; `false` where that would not tell of a failure, or
    /// failed.
    fn sync_filesystems(&self, dir: &ArtifactDir) -> Result<bool> {
        if !tells_of_failed_syncs() {
            return Ok(false);
        }
        let mut done = BTreeSet::new();
        let has_failed = &self.pending_syncs().filesystem_failed;
        // A failure is told once, and may have been of any file there.
        if has_failed.load(Ordering::Relaxed) {
            return Ok(false);
        }
        for folder in [dir.files(), self.layout().blobs()] {
            let Some(open) = files::absent(folder.open_dir()).at("open", &folder)? else { continue };
            let device = Metadata::of(&open).at("look at", &folder)?.dev();
            if done.insert(device) && rustix::fs::syncfs(&open).is_err() {
                has_failed.store(true, Ordering::Relaxed);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Syncs each file once; those that the medium refused, and those that are not what was found any more: they keep
    /// their marks.
    fn sync_files(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<(Vec<Refused>, Vec<FilePath>)> {
        let (mut refused, mut passed_over, mut done) = (Vec::new(), Vec::new(), BTreeSet::new());
        for (path, entry, known) in found {
            let view = dir.view(path);
            let file = files::absent(view.open(false)).at("open", &view)?;
            let Some(file) = file.filter(|file| Metadata::of(file).is_ok_and(|found| found.identity() == *known))
            else {
                passed_over.push(path.clone());
                continue;
            };
            if done.insert(known.inode)
                && let Err(cause) = file.sync_data()
            {
                refused.push((path.clone(), entry.clone(), file, cause));
            }
        }
        Ok((refused, passed_over))
    }

    /// Syncs the folders that lead to the files, as blobs and as views; each once.
    fn sync_folders(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<()> {
        let (mut folders, files_root) = (BTreeSet::new(), dir.files());
        for (path, entry, _) in found {
            let view = dir.view(path);
            folders.extend(view.ancestors().skip(1).take_while(|at| at.below(&files_root).is_some()));
            let blob = entry.sha256.map(|digest| self.layout().blob(&digest));
            folders.extend(blob.and_then(|blob| blob.parent()));
        }
        // From below: a name is worth what the folder above it is.
        let above: Vec<RootedPath> = dir.path().ancestors().take(4).collect();
        let folders = folders.into_iter().rev().chain([self.layout().blobs()]).chain(above);
        folders.into_iter().try_for_each(|folder| match files::sync_dir(&folder) {
            Err(_) if files::stat(&folder)?.is_none() => Ok(()),
            synced => synced,
        })
    }
}

/// Whether `syncfs` says that something could not be written: since Linux 5.8.
fn tells_of_failed_syncs() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    *TELLS.get_or_init(|| {
        let name = rustix::system::uname();
        let release = name.release().to_string_lossy();
        let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
        (numbers.next(), numbers.next()) >= (Some(5), Some(8))
    })
}
