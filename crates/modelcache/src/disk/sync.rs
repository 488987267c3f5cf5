//! Durability: brings published files to stable storage, and clears `unsynced` in their manifests.
//!
//! A power cut before the end leaves `unsynced` entries of another boot; the process that finds them hashes the files.
//! If the sync of a file fails, the file counts as wrong and is quarantined, even if reads still succeed. No sync is
//! tried twice. Files of a dead writer are hashed by the process that wants to lease them, and then synced as usual.
//!
//! The numbered steps are those under *Durability* in `docs/disk-format.md`.

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
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// Maximum number of files that are synced one by one; each costs a flush of the device. For more, `syncfs` is called.
const FILE_SYNCS_MAX: usize = 64;
/// Maximum wait for another process that verifies the same files. After that, both verify them.
const CHECK_WAIT_MAX: Duration = Duration::from_secs(120);
/// Time between two attempts.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum rounds of [`Disk::sync_selected`] while the artifact is published again.
const ROUNDS_MAX: usize = 1500;

/// A file that failed to sync, with the descriptor that reported the error.
type Refused = (FilePath, FileEntry, File, std::io::Error);

/// A file, and the identity under which its bytes are right and are to be recorded as durable.
pub(super) type SyncedFile = (FilePath, FileEntry, FileIdentity);

impl Disk {
    /// Syncs every artifact that this process published. A failure does not stop the others; returns the first error.
    pub(crate) fn sync_dirty(&self) -> Result<()> {
        let mut outcome = Ok(());
        for key in self.dirty() {
            let synced = self.sync_artifact(&key);
            if let Err(error) = &synced {
                tracing::warn!(artifact = %key, %error, "the files of a published artifact could not be synced to disk");
            }
            outcome = outcome.and(synced);
        }
        outcome
    }

    /// Syncs the files of `key` that are unsynced by a writer that lives: this process, or another one.
    ///
    /// # Errors
    /// `Directory` if the sync of a file failed. That file is quarantined, and the next get downloads it again.
    pub(crate) fn sync_artifact(&self, key: &ArtifactKey) -> Result<()> {
        let _turn = self.pending_syncs().turn.lock();
        // The number is read first: a publication that starts during the sync has a higher one, and stays dirty.
        let (dir, number) = (self.layout().artifact(key), self.dirty_number(key));
        let synced = self.sync_unsynced(&dir);
        // If the budget lock could not be taken (`Unavailable`), the artifact stays dirty and is tried again. A failed
        // sync is not tried again.
        if let Some(number) = number
            && !synced.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unavailable)
        {
            self.mark_synced(key, number);
        }
        synced
    }

    fn sync_unsynced(&self, dir: &ArtifactDir) -> Result<()> {
        // No manifest: the artifact was evicted, and needs no sync.
        let Some(manifest) = self.read_manifest(dir)? else { return Ok(()) };
        let mut writer_liveness = self.writer_liveness();
        let unsynced = manifest.files.iter().filter(|(_, entry)| entry.unsynced().is_some());
        // Files of a dead writer are left out: their bytes must be hashed first, see `recheck`.
        let found =
            unsynced.filter_map(|(path, entry)| Some((path.clone(), entry.clone(), writer_liveness.identity(entry)?)));
        self.make_durable(dir, &found.collect::<Vec<_>>())?.map_or(Ok(()), Err)
    }

    /// Syncs the selected files of `key`. On return they are durable, or not all of them are here any more.
    pub(crate) fn sync_selected(&self, key: &ArtifactKey, selection: &Selection) -> Result<()> {
        let dir = self.layout().artifact(key);
        for _ in 0..ROUNDS_MAX {
            let Some(manifest) = self.shared_manifest(&dir)? else { return Ok(()) };
            let is_unsynced = manifest.selected(selection).any(|(_, entry)| entry.unsynced().is_some());
            if self.is_read_only() || (!is_unsynced && !self.is_dirty(key)) {
                return Ok(());
            }
            self.sync_artifact(key)?;
            // If the writer has just died, acquiring a lease hashes its files and syncs them.
            if is_unsynced && !matches!(self.acquire(key, selection)?, AcquireOutcome::Leased(_)) {
                return Ok(());
            }
            // Another task of this process may be publishing more files of the artifact at this moment.
            if self.is_dirty(key) {
                thread::sleep(POLL_INTERVAL);
            }
        }
        Err(Error::unavailable("the artifact is published again each time its files have been synced to disk"))
    }

    /// Hashes the selected files of dead writers. Syncs the right ones, and quarantines the others.
    pub(super) fn recheck(&self, key: &ArtifactKey, dir: &ArtifactDir, selection: &Selection) -> Result<()> {
        let _turn = self.turn_to_check(dir, selection)?;
        let Some(manifest) = self.read_manifest(dir)? else { return Ok(()) };
        let mut found = Vec::new();
        for (path, entry) in self.doubtful(&manifest, selection) {
            // Wrong and missing files are recorded one by one, the right ones together in one change of the manifest.
            match self.check_file(&dir.view(&path), &entry)? {
                Mismatch::Right(identity) => found.push((path, entry, identity)),
                mismatch => drop(self.record_mismatch(dir, &path, &entry, mismatch)?),
            }
        }
        if !found.is_empty() {
            tracing::info!(artifact = %key, files = found.len(), "files left unsynced by a terminated process were read in full and are right");
        }
        // If the sync of a file fails, the file is quarantined. It is missing then, and is downloaded again.
        self.make_durable(dir, &found).map(|_| ())
    }

    /// Returns true if a selected file is unsynced by a dead writer.
    pub(super) fn is_doubtful(&self, manifest: &Manifest, selection: &Selection) -> bool {
        let mut writer_liveness = self.writer_liveness();
        manifest
            .selected(selection)
            .any(|(_, entry)| entry.unsynced().is_some() && writer_liveness.identity(entry).is_none())
    }

    /// Returns the selected files that are unsynced by a dead writer.
    fn doubtful(&self, manifest: &Manifest, selection: &Selection) -> Vec<(FilePath, FileEntry)> {
        let mut writer_liveness = self.writer_liveness();
        let selected = manifest.selected(selection).filter(|(_, entry)| entry.unsynced().is_some());
        let doubtful = selected.filter(|(_, entry)| writer_liveness.identity(entry).is_none());
        doubtful.map(|(path, entry)| (path.clone(), entry.clone())).collect()
    }

    /// Waits for the check lock, so that one of many processes that find the same files, for instance after a reboot,
    /// hashes them. Returns `None` if another process has done so, or still holds the lock after [`CHECK_WAIT_MAX`].
    ///
    /// The lock only saves work: without it, the caller hashes the files that are still left.
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

    /// Syncs the files of `found`, and records them as durable in the manifest of `dir`. Quarantines each file
    /// that fails to sync, and returns the first such error.
    pub(super) fn make_durable(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<Option<Error>> {
        if found.is_empty() {
            return Ok(None);
        }
        let (mut failed, mut refusal) = (BTreeSet::new(), None);
        // Step 1: sync the bytes. For many files, one `syncfs` per filesystem syncs the bytes and the folders.
        if found.len() <= FILE_SYNCS_MAX || !self.sync_filesystems(dir)? {
            let (refused, changed) = self.sync_files(dir, found)?;
            failed.extend(changed);
            for (path, entry, file, cause) in refused {
                let error = fault("make durable", &dir.view(&path), cause);
                tracing::warn!(artifact = %dir.path(), file = %path, %error, "the file could not be synced to disk; it is quarantined, and the next get downloads it again");
                // The page cache may still serve the bytes that the device did not store, so a read proves nothing.
                self.record_mismatch(dir, &path, &entry, Mismatch::Wrong(file))?;
                failed.insert(path);
                refusal.get_or_insert(error);
            }
            // Step 2: sync the names that lead to the bytes.
            self.sync_folders(dir, found)?;
        }
        // Step 3: clear `unsynced` in the manifest, in a critical section. The new manifest is synced before its
        // rename, and its folder after it.
        self.edit_manifest(dir, |manifest| {
            let mut is_changed = false;
            for (path, _, identity) in found.iter().filter(|(path, ..)| !failed.contains(path)) {
                let entry = manifest.files.get_mut(path).filter(|entry| entry.held.is_some());
                if let Some(entry) = entry.filter(|entry| self.is_current(dir, path, entry, *identity)) {
                    is_changed |= entry.on_disk() != Some(*identity);
                    entry.held = Some(Held::Disk(*identity));
                }
            }
            is_changed
        })?;
        Ok(refusal)
    }

    /// Returns true if the synced file is the one that the manifest records or, if that is another one, the file that
    /// is at `path` now.
    fn is_current(&self, dir: &ArtifactDir, path: &FilePath, entry: &FileEntry, synced: FileIdentity) -> bool {
        let present = || files::stat(&dir.view(path)).ok().flatten().map(|metadata| metadata.identity());
        entry.recorded_on_disk() == Some(synced) || present() == Some(synced)
    }

    /// Calls `syncfs` on the filesystems that hold the artifact. Returns false if it failed, or if the kernel does not
    /// report failures.
    fn sync_filesystems(&self, dir: &ArtifactDir) -> Result<bool> {
        if !syncfs_reports_errors() {
            return Ok(false);
        }
        let mut done = BTreeSet::new();
        let has_failed = &self.pending_syncs().filesystem_failed;
        // `syncfs` reports a failed write once, for any file of the filesystem. After a failure, sync each file alone.
        if has_failed.load(Ordering::Relaxed) {
            return Ok(false);
        }
        for folder in [dir.files(), self.layout().blobs()] {
            let Some(open) = files::absent(folder.open_dir()).at("open", &folder)? else { continue };
            let device = Metadata::of(&open).at("examine", &folder)?.dev();
            // `files/` and `blobs/` may be on one filesystem or on two.
            if done.insert(device) && rustix::fs::syncfs(&open).is_err() {
                has_failed.store(true, Ordering::Relaxed);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Syncs each file once. Returns the files that failed to sync, and the files with a changed identity, which stay
    /// unsynced.
    fn sync_files(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<(Vec<Refused>, Vec<FilePath>)> {
        let (mut refused, mut changed, mut done) = (Vec::new(), Vec::new(), BTreeSet::new());
        for (path, entry, known) in found {
            let view = dir.view(path);
            let file = files::absent(view.open(false)).at("open", &view)?;
            let Some(file) = file.filter(|file| Metadata::of(file).is_ok_and(|found| found.identity() == *known))
            else {
                changed.push(path.clone());
                continue;
            };
            // Several paths may link one file. A second sync would not report the error again.
            if done.insert(known.inode)
                && let Err(cause) = file.sync_data()
            {
                refused.push((path.clone(), entry.clone(), file, cause));
            }
        }
        Ok((refused, changed))
    }

    /// Syncs the folders of the views and blobs of `found`, up to the root; each once.
    fn sync_folders(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<()> {
        let (mut folders, files_root) = (BTreeSet::new(), dir.files());
        for (path, entry, _) in found {
            let view = dir.view(path);
            folders.extend(view.ancestors().skip(1).take_while(|at| at.below(&files_root).is_some()));
            let blob = entry.sha256.map(|digest| self.layout().blob(&digest));
            folders.extend(blob.and_then(|blob| blob.parent()));
        }
        // Lower folders first: an entry must not become durable before the folder that it names.
        let above: Vec<RootedPath> = dir.path().ancestors().take(4).collect();
        let folders = folders.into_iter().rev().chain([self.layout().blobs()]).chain(above);
        folders.into_iter().try_for_each(|folder| match files::sync_dir(&folder) {
            // The folder was removed by an eviction.
            Err(_) if files::stat(&folder)?.is_none() => Ok(()),
            synced => synced,
        })
    }
}

/// Returns true if `syncfs` reports failed writes: since Linux 5.8.
fn syncfs_reports_errors() -> bool {
    static REPORTS: OnceLock<bool> = OnceLock::new();
    *REPORTS.get_or_init(|| {
        let name = rustix::system::uname();
        let release = name.release().to_string_lossy();
        let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
        (numbers.next(), numbers.next()) >= (Some(5), Some(8))
    })
}
