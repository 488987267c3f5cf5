//! Durability: brings published files to stable storage, and clears their marks in the manifests.
//!
//! A process syncs what it published in the background, or before it returns. Files that nobody has synced are synced
//! by a use that comes after write-back. Files of another boot are hashed first, and then synced. If the sync of a file
//! fails, the file counts as wrong and is quarantined, even if reads still succeed. No sync is tried twice.
//!
//! The numbered steps are those under *Durability* in `docs/disk-format.md`.

use super::acquire::{AcquireOutcome, Mismatch};
use super::files;
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::lock::{FileLock, LOCK_WAIT_MAX};
use super::rooted::{Metadata, RootedPath};
use super::unsynced::MarkState::{self, Foreign, Old, Recent};
use super::{Disk, fault};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, HeldIdentity};
use crate::selection::Selection;
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// Maximum number of files that are synced one by one; each costs a flush of the device. For more, `syncfs` is called.
const FILE_SYNCS_MAX: usize = 64;
/// Maximum wait for another process that syncs or hashes the same files. After that, both do.
const CHECK_WAIT_MAX: Duration = Duration::from_secs(120);
/// Time between two attempts to take the check lock.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum rounds of [`Disk::sync_selected`] while the artifact is published again.
const ROUNDS_MAX: usize = 1500;

/// A file that failed to sync, with the descriptor that reported the error.
type FailedSync = (FilePath, FileEntry, File, std::io::Error);

/// A file, and the identity under which its bytes are right and are to be recorded as durable.
pub(super) type SyncedFile = (FilePath, FileEntry, FileIdentity);

impl Disk {
    /// Syncs every artifact that this process published. A failure does not stop the others; returns the first error.
    pub(crate) fn sync_published(&self) -> Result<()> {
        let mut outcome = Ok(());
        for key in self.take_pending_syncs() {
            let synced = self.sync_trusted(&self.layout().artifact(&key), &Selection::all());
            if let Err(error) = &synced {
                tracing::warn!(artifact = %key, %error, "the files of a published artifact could not be synced to disk");
                // The budget lock could not be taken, so try again. A failed sync is not tried again.
                if error.kind() == ErrorKind::Unavailable {
                    self.add_pending_sync(&key);
                }
            }
            outcome = outcome.and(synced);
        }
        outcome
    }

    /// Syncs the selected files of `key`. On return they are durable, or not all of them are here any more.
    ///
    /// # Errors
    /// `Directory` if the sync of a file failed. That file is quarantined, and the next get downloads it again.
    pub(crate) fn sync_selected(&self, key: &ArtifactKey, selection: &Selection) -> Result<()> {
        let dir = self.layout().artifact(key);
        for _ in 0..ROUNDS_MAX {
            let Some(manifest) = self.shared_manifest(&dir)? else { return Ok(()) };
            let is_unsynced = manifest.selected(selection).any(|(_, entry)| entry.unsynced().is_some());
            if self.is_read_only() || !is_unsynced {
                return Ok(());
            }
            self.sync_trusted(&dir, selection)?;
            // Acquiring a lease hashes files of another boot and syncs them, and finds files that were changed.
            if !matches!(self.acquire(key, selection)?, AcquireOutcome::Leased(_)) {
                return Ok(());
            }
        }
        Err(Error::unavailable("the artifact is published again each time its files have been synced to disk"))
    }

    /// Syncs the selected files that were marked in this boot. Their bytes need not be hashed.
    fn sync_trusted(&self, dir: &ArtifactDir, selection: &Selection) -> Result<()> {
        let _turn = self.turn_to_check(dir, selection, &[Recent, Old])?;
        let found = self.trusted_files(dir, selection, &[Recent, Old])?;
        self.make_durable(dir, &found)?.map_or(Ok(()), Err)
    }

    /// Syncs the selected files that the kernel should have written back by now, and clears their marks. The sync
    /// reports a write-back that failed. The caller then reads the manifest again.
    ///
    /// Waits for no other process. If the marks cannot be cleared now, they stay, and the next use tries again.
    pub(super) fn sync_old(&self, dir: &ArtifactDir, selection: &Selection) -> Result<()> {
        // Another process is syncing them, or the lock cannot be taken.
        let Ok(Some(_turn)) = FileLock::try_exclusive(&self.layout().check_lock(dir)) else { return Ok(()) };
        let found = self.trusted_files(dir, selection, &[Old])?;
        let (synced, _) = self.sync_bytes(dir, &found)?;
        if let Err(error) = self.clear_marks(dir, &synced, Duration::ZERO) {
            tracing::debug!(artifact = %dir.path(), %error, "the marks of synced files cannot be cleared; the next use tries again");
        }
        Ok(())
    }

    /// Returns the selected files whose marks are in one of `states`, with their recorded identities. `states` must not
    /// contain `Foreign`, because the recorded identity is trusted in this boot only.
    fn trusted_files(&self, dir: &ArtifactDir, selection: &Selection, states: &[MarkState]) -> Result<Vec<SyncedFile>> {
        // No manifest: the artifact was evicted, and needs no sync.
        let Some(manifest) = self.read_manifest(dir)? else { return Ok(Vec::new()) };
        let mount = self.current_mount();
        let marked = mount.marked(&manifest, selection, states);
        Ok(marked.filter_map(|(path, entry)| Some((path.clone(), entry.clone(), entry.recorded_on_disk()?))).collect())
    }

    /// Hashes the selected files that were marked in another boot. Syncs the right ones, and quarantines the others.
    pub(super) fn recheck(&self, key: &ArtifactKey, dir: &ArtifactDir, selection: &Selection) -> Result<()> {
        let _turn = self.turn_to_check(dir, selection, &[Foreign])?;
        let Some(manifest) = self.read_manifest(dir)? else { return Ok(()) };
        let mut found = Vec::new();
        for (path, entry) in self.current_mount().marked(&manifest, selection, &[Foreign]) {
            // Wrong and missing files are recorded one by one, the right ones together in one change of the manifest.
            match self.check_file(&dir.view(path), entry)? {
                Mismatch::Right(identity) => found.push((path.clone(), entry.clone(), identity)),
                mismatch => drop(self.record_mismatch(dir, path, entry, mismatch)?),
            }
        }
        if !found.is_empty() {
            tracing::info!(artifact = %key, files = found.len(), "files that were not synced to disk before a reboot were read in full and are right");
        }
        // If the sync of a file fails, the file is quarantined. It is missing then, and is downloaded again.
        self.make_durable(dir, &found).map(|_| ())
    }

    /// Waits for the check lock, so that one of many processes that find the same marks, for instance after a reboot,
    /// hashes or syncs the files. Returns `None` if another process has done so, or still holds the lock after
    /// [`CHECK_WAIT_MAX`].
    ///
    /// The lock only saves work: without it, the caller handles the files that are still left.
    fn turn_to_check(
        &self,
        dir: &ArtifactDir,
        selection: &Selection,
        states: &[MarkState],
    ) -> Result<Option<FileLock>> {
        let (path, started) = (self.layout().check_lock(dir), Instant::now());
        loop {
            if let Some(turn) = FileLock::try_exclusive(&path)? {
                return Ok(Some(turn));
            }
            let (manifest, mount) = (self.shared_manifest(dir)?, self.current_mount());
            let is_done = manifest.is_none_or(|manifest| mount.marked(&manifest, selection, states).next().is_none());
            if is_done || started.elapsed() > CHECK_WAIT_MAX {
                return Ok(None);
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Syncs the files of `found`, and records them as durable in the manifest of `dir`. Quarantines each file
    /// that fails to sync, and returns the first such error.
    pub(super) fn make_durable(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<Option<Error>> {
        let (synced, first_error) = self.sync_bytes(dir, found)?;
        self.clear_marks(dir, &synced, LOCK_WAIT_MAX)?;
        Ok(first_error)
    }

    /// Syncs the files of `found` and their names. Quarantines each file that fails to sync. Returns the others, and
    /// the first failure. A file that was changed meanwhile is in neither.
    fn sync_bytes<'a>(
        &self,
        dir: &ArtifactDir,
        found: &'a [SyncedFile],
    ) -> Result<(Vec<&'a SyncedFile>, Option<Error>)> {
        // Step 1: sync the bytes. For many files, one `syncfs` per filesystem syncs the bytes and the folders. Old
        // files are synced one by one: an earlier `syncfs` may have received the report of a failed write, and `syncfs`
        // would wait for the writes of all processes.
        let mount = self.current_mount();
        let is_old = |entry: &FileEntry| entry.unsynced().is_some_and(|file| mount.state(file) == Old);
        let is_by_filesystem = found.len() > FILE_SYNCS_MAX && !found.iter().any(|(_, entry, _)| is_old(entry));
        if found.is_empty() || (is_by_filesystem && self.sync_filesystems(dir)?) {
            return Ok((found.iter().collect(), None));
        }
        let (mut first_error, (failed, mut unsynced)) = (None, self.sync_files(dir, found)?);
        for (path, entry, file, cause) in failed {
            let error = fault("make durable", &dir.view(&path), cause);
            tracing::warn!(artifact = %dir.path(), file = %path, %error, "the file could not be synced to disk; it is quarantined, and the next get downloads it again");
            // The page cache may still serve the bytes that the device did not store, so a read proves nothing.
            self.record_mismatch(dir, &path, &entry, Mismatch::Wrong(file))?;
            unsynced.insert(path);
            first_error.get_or_insert(error);
        }
        // Step 2: sync the names that lead to the bytes.
        self.sync_folders(dir, found)?;
        Ok((found.iter().filter(|(path, ..)| !unsynced.contains(path)).collect(), first_error))
    }

    /// Records the synced files as durable in the manifest of `dir`. Waits for the budget lock for `wait_max`.
    fn clear_marks(&self, dir: &ArtifactDir, synced: &[&SyncedFile], wait_max: Duration) -> Result<()> {
        if synced.is_empty() {
            return Ok(());
        }
        // Step 3: change the manifest in a critical section. The new manifest is synced before its rename, and its
        // folder after it.
        self.edit_manifest_within(wait_max, dir, |manifest| {
            let mut is_changed = false;
            for (path, _, identity) in synced {
                let entry = manifest.files.get_mut(path).filter(|entry| entry.held.is_some());
                if let Some(entry) = entry.filter(|entry| self.is_current(dir, path, entry, *identity)) {
                    is_changed |= entry.on_disk() != Some(*identity);
                    entry.held = Some(HeldIdentity::Disk(*identity));
                }
            }
            is_changed
        })
    }

    /// Returns true if `synced` is the identity that the manifest records, or the identity of the file that is at
    /// `path` now.
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
    fn sync_files(&self, dir: &ArtifactDir, found: &[SyncedFile]) -> Result<(Vec<FailedSync>, BTreeSet<FilePath>)> {
        let (mut failed, mut changed, mut done) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        for (path, entry, known) in found {
            let view = dir.view(path);
            let file = files::absent(view.open(false)).at("open", &view)?;
            let Some(file) = file.filter(|file| Metadata::of(file).is_ok_and(|found| found.identity() == *known))
            else {
                changed.insert(path.clone());
                continue;
            };
            // Several paths may link one file. A second sync would not report the error again.
            if done.insert(known.inode)
                && let Err(cause) = file.sync_data()
            {
                failed.push((path.clone(), entry.clone(), file, cause));
            }
        }
        Ok((failed, changed))
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
