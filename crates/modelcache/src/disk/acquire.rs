//! Acquiring a lease on a local artifact: shared lock, manifest, one `stat` per selected file, time of last use.
//!
//! A file is hashed only if its identity is not the one that the manifest records. If its bytes are right, the new
//! identity is recorded. If they are wrong, the file is quarantined, and `held` is cleared in every manifest that
//! records it.
//!
//! A read-only directory is still served: the time of last use is not updated, and without a lock file there is no
//! lease. The numbered steps are those of `docs/disk-format.md`.

use super::Disk;
use super::files;
use super::hashing;
use super::io_error::{IoContext, errno};
use super::layout::ArtifactDir;
use super::link::Link;
use super::lock::{FileLock, LOCK_WAIT_MAX};
use super::modes;
use super::optional::OptionalCall;
use super::rooted::{Folders, Metadata, NOW, RootedPath};
use super::unsynced::MarkState::{Foreign, Old, Recent};
use crate::digest::Digest;
use crate::error::Result;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, Manifest, Shape};
use crate::selection::Selection;
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Returns the mtime that is set on a file with wrong bytes. No manifest records this time, so the file differs from
/// every recorded identity.
fn withdrawn_mtime() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1)
}

/// Returns true if the file was withdrawn, perhaps after a failed sync: the page cache may have bytes that the disk
/// does not have.
pub(super) fn was_withdrawn(metadata: &Metadata) -> bool {
    metadata.modified() == withdrawn_mtime()
}

/// Maximum number of corrections of manifests in one [`Disk::acquire`].
const ROUNDS_MAX: usize = 1000;

/// An artifact on this disk, protected from eviction while this value exists.
#[derive(Debug)]
pub(crate) struct LeasedArtifact {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) dir: ArtifactDir,
    /// How the views were linked, if this process has just published them.
    pub(crate) link: Option<Link>,
    /// True if the artifact is in the lower directory, which is only read.
    pub(crate) is_lower: bool,
    /// The shared lock; `None` in the lower directory, and in a read-only directory without a lock file.
    pub(crate) lease: Option<Arc<FileLock>>,
}

/// Returns true if a file could not be opened because descriptors or memory ran out. The file itself may be intact.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// Result of [`Disk::acquire`].
#[derive(Debug)]
pub(crate) enum AcquireOutcome {
    /// All selected files are on this disk, and leased.
    Leased(Box<LeasedArtifact>),
    /// A selected file is missing or has wrong bytes.
    Absent,
    /// An eviction holds the lease exclusively. Try again after a moment.
    Evicting,
}

/// Result of hashing a view that has another identity than the recorded one.
pub(super) enum Mismatch {
    /// There is no regular file at the path.
    Missing,
    /// The bytes are right. Carries the present identity.
    Right(FileIdentity),
    /// The bytes are wrong. Carries the descriptor that was hashed.
    Wrong(File),
}

impl LeasedArtifact {
    /// Returns the path of the file if the selection or the artifact is a single file, otherwise the path of `files/`.
    pub(crate) fn path(&self, selection: &Selection) -> PathBuf {
        match (selection.one_file(), self.manifest.shape, self.manifest.files.keys().next()) {
            (Some(file), _, _) | (None, Shape::File, Some(file)) => self.dir.view(file),
            _ => self.dir.files(),
        }
        .full()
    }
}

impl Disk {
    /// Acquires a lease on the selected files of `key`, if all of them are on this disk with the right bytes.
    pub(crate) fn acquire(&self, key: &ArtifactKey, selection: &Selection) -> Result<AcquireOutcome> {
        let dir = self.layout().artifact(key);
        // Check for a manifest before locking, so that a miss creates no lock file.
        if files::stat(&dir.manifest())?.is_none() {
            return Ok(AcquireOutcome::Absent);
        }
        // Step 1: take the shared lease.
        let lease = match FileLock::try_shared(&self.layout().lease_lock(&dir)) {
            Ok(Some(lease)) => Some(lease),
            Ok(None) => return Ok(AcquireOutcome::Evicting),
            // No lock file can be opened. Serve the files without a lease.
            Err(_) if self.is_read_only() => None,
            Err(error) => return Err(error),
        };
        let (mount, mut tried_sync) = (self.current_mount(), false);
        // Each correction below changes a manifest. After it, start again at step 2.
        for _ in 0..ROUNDS_MAX {
            // Step 2: read the manifest.
            let Some(manifest) = self.shared_manifest(&dir)? else { return Ok(AcquireOutcome::Absent) };
            if !manifest.holds(selection) {
                return Ok(AcquireOutcome::Absent);
            }
            // Step 3: settle the marks of unsynced files. A read-only directory cannot record the result. It does not
            // sync either: the kernel reports a failed write once, and the report would be lost.
            match mount.greatest_state(&manifest, selection).filter(|_| !self.is_read_only()) {
                Some(Foreign) => {
                    self.recheck(key, &dir, selection)?;
                    continue;
                }
                Some(Old) if !tried_sync => {
                    tried_sync = true;
                    self.sync_old(&dir, selection)?;
                    continue;
                }
                Some(Old | Recent) | None => {}
            }
            // Step 4: compare the identities.
            match self.first_mismatch(&dir, &manifest, selection)? {
                None => {
                    // Step 5: touch `last-used`. If this fails, the artifact may be evicted too early.
                    let _ = self.touch_last_used(&dir, false);
                    return Ok(AcquireOutcome::Leased(Box::new(LeasedArtifact {
                        manifest,
                        dir,
                        link: None,
                        is_lower: false,
                        lease: lease.map(Arc::new),
                    })));
                }
                Some((path, _, _)) if self.is_read_only() => {
                    tracing::warn!(artifact = %key, file = %path, "a cached file is missing or was changed; it cannot be repaired, because the directory is read-only");
                    return Ok(AcquireOutcome::Absent);
                }
                Some((path, entry, mismatch)) => drop(self.record_mismatch(&dir, &path, &entry, mismatch)?),
            }
        }
        // Another program keeps changing the files. Let a fill replace them.
        Ok(AcquireOutcome::Absent)
    }

    /// Returns the first selected file, with its entry, that is missing or has another identity than the recorded one.
    fn first_mismatch(
        &self,
        dir: &ArtifactDir,
        manifest: &Manifest,
        selection: &Selection,
    ) -> Result<Option<(FilePath, FileEntry, Mismatch)>> {
        let (mount, mut views) = (self.current_mount(), Folders::default());
        for (path, entry) in manifest.selected(selection) {
            let view = dir.view(path);
            let Some(metadata) = views.metadata(&view).at("examine", &view)? else {
                return Ok(Some((path.clone(), entry.clone(), Mismatch::Missing)));
            };
            // In a read-only directory, an unsynced file of another boot is hashed at each use.
            if mount.trusted_identity(entry) != Some(metadata.identity()) {
                match self.check_file(&view, entry)? {
                    // The new identity cannot be recorded here. Serve the file: its bytes are right.
                    Mismatch::Right(_) if self.is_read_only() => {}
                    mismatch => return Ok(Some((path.clone(), entry.clone(), mismatch))),
                }
            }
        }
        Ok(None)
    }

    /// Hashes a view that has another identity than the recorded one.
    pub(super) fn check_file(&self, view: &RootedPath, entry: &FileEntry) -> Result<Mismatch> {
        let file = match view.open(false) {
            Ok(file) => file,
            // The file may be intact, so return the error instead of `Missing`.
            Err(error) if is_shortage(&error) || error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(error).at("open", view);
            }
            Err(_) => return Ok(Mismatch::Missing),
        };
        let before = Metadata::of(&file).at("examine", view)?;
        if !before.is_file() {
            return Ok(Mismatch::Missing);
        }
        let is_right = match entry.sha256 {
            // The page cache may have bytes that the disk does not have, so do not trust a read.
            _ if was_withdrawn(&before) => false,
            Some(digest) => hashing::has_digest(&file, digest, entry.ladder.as_ref()).at("read", view)?,
            None => false,
        };
        // If the file changed meanwhile, the hash proves nothing.
        let after = Metadata::of(&file).at("examine", view)?.identity();
        if is_right && after == before.identity() { Ok(Mismatch::Right(after)) } else { Ok(Mismatch::Wrong(file)) }
    }

    /// Corrects the manifests after a mismatch. Returns the files, of any artifact, that are no longer held.
    pub(super) fn record_mismatch(
        &self,
        dir: &ArtifactDir,
        path: &FilePath,
        entry: &FileEntry,
        mismatch: Mismatch,
    ) -> Result<Vec<(ArtifactKey, FilePath)>> {
        if let Mismatch::Wrong(file) = &mismatch {
            // Quarantine, step 1: change the mtime through the descriptor that was hashed. By this one call, all hard
            // links of the inode differ from every recorded identity.
            let _ = file.set_times(fs::FileTimes::new().set_modified(withdrawn_mtime()));
        }
        let present = files::stat(&dir.view(path))?;
        let size_differs = present.as_ref().is_some_and(|metadata| metadata.len() != entry.size);
        let inode = present.map(|metadata| metadata.ino()).or(entry.recorded_on_disk().map(|held| held.inode));
        let blob = entry.sha256.map(|digest| files::stat(&self.layout().blob(&digest))).transpose()?.flatten();
        if size_differs || inode != blob.map(|metadata| metadata.ino()) {
            // The view was not a link to its blob, so its bytes counted separately, or its size changed. Either way the
            // recorded total may be wrong. Leave the record dirty, so that the next holder of the lock counts again.
            let mut guard = self.lock_budget()?;
            guard.mark_total_unknown()?;
            guard.release()?;
        }
        match mismatch {
            Mismatch::Missing => self.edit_manifest(dir, |manifest| {
                // Check again under the budget lock: a fill may have published the view meanwhile.
                let missing = files::stat(&dir.view(path)).is_ok_and(|metadata| !metadata.is_some_and(|m| m.is_file()));
                manifest.files.get_mut(path).filter(|_| missing).map(|entry| entry.held = None).is_some()
            })?,
            // Sync the file, then record its identity. If the sync fails, `make_durable` logs the error and withdraws
            // the file, so the caller no longer finds it held.
            Mismatch::Right(identity) => drop(self.make_durable(dir, &[(path.clone(), entry.clone(), identity)])?),
            Mismatch::Wrong(file) => return self.withdraw(dir, path, entry, &file),
        }
        Ok(Vec::new())
    }

    /// Quarantines a file with wrong bytes, and clears `held` in every manifest that records its inode. Returns the
    /// files that are no longer held.
    fn withdraw(
        &self,
        dir: &ArtifactDir,
        path: &FilePath,
        entry: &FileEntry,
        file: &File,
    ) -> Result<Vec<(ArtifactKey, FilePath)>> {
        tracing::warn!(artifact = %dir.path(), file = %path, "a cached file was changed or damaged; it is withdrawn, and the next get downloads it again");
        let metadata = Metadata::of(file).at("examine", &dir.view(path))?;
        self.count_corrupt(entry.sha256, metadata.len());
        let inode = metadata.ino();
        // Step 2: move the blob to quarantine.
        if let Some(digest) = entry.sha256 {
            self.quarantine_inode(&digest, inode)?;
        }
        // Step 3: clear `held` in every manifest that records the inode.
        let mut withdrawn = Vec::new();
        for artifact in self.scan()? {
            let records = |entry: &FileEntry| entry.recorded_on_disk().is_some_and(|held| held.inode == inode);
            let Some(manifest) = artifact.manifest else { continue };
            let recording = manifest.files.iter().filter(|(_, entry)| records(entry));
            let recording: Vec<_> = recording.map(|(path, _)| (manifest.key.clone(), path.clone())).collect();
            if !recording.is_empty() {
                withdrawn.extend(recording.clone());
                self.edit_manifest(&artifact.dir, |manifest| {
                    manifest.files.values_mut().filter(|entry| records(entry)).map(|entry| entry.held = None).count()
                        > 0
                })?;
                // Remove the links only now: while the manifest records the file, another call may link it again.
                recording.iter().for_each(|(_, path)| self.remove_hub_link(&artifact.dir, path, inode));
            }
        }
        // The manifest of `dir` may record another inode than the one that was hashed. Clear that entry as well.
        self.edit_manifest(dir, |manifest| {
            let present = files::stat(&dir.view(path)).ok().flatten().map(|metadata| metadata.identity());
            let entry = manifest.files.get_mut(path).filter(|e| e.held.is_some() && e.recorded_on_disk() != present);
            entry.map(|entry| entry.held = None).is_some()
        })?;
        Ok(withdrawn)
    }

    /// Moves the blob of `digest` to quarantine if it is `inode`.
    pub(super) fn quarantine_inode(&self, digest: &Digest, inode: u64) -> Result<()> {
        let blob = self.layout().blob(digest);
        let mut guard = self.lock_budget()?;
        if files::stat(&blob)?.is_some_and(|metadata| metadata.ino() == inode) {
            guard.begin_change()?;
            guard.quarantine(&blob, digest)?;
        }
        guard.release()
    }

    /// Changes the manifest of `dir` in one critical section. `edit` returns true if it changed anything.
    pub(super) fn edit_manifest(&self, dir: &ArtifactDir, edit: impl FnOnce(&mut Manifest) -> bool) -> Result<()> {
        self.edit_manifest_within(LOCK_WAIT_MAX, dir, edit)
    }

    /// Changes the manifest of `dir` like [`edit_manifest`](Self::edit_manifest). Waits for the budget lock for at most
    /// `wait_max`.
    pub(super) fn edit_manifest_within(
        &self,
        wait_max: Duration,
        dir: &ArtifactDir,
        edit: impl FnOnce(&mut Manifest) -> bool,
    ) -> Result<()> {
        let mut guard = self.lock_budget_within(wait_max)?;
        if let Some(mut manifest) = self.read_manifest(dir)?
            && edit(&mut manifest)
        {
            // Write the change log first, so that other processes read this manifest again.
            guard.begin_change_of(dir)?;
            files::replace(&dir.manifest(), &manifest.to_bytes()?, &self.layout().stagings())?;
        }
        guard.release()
    }

    /// Sets the mtime of `last-used` to now. With `create`, creates the file if it is missing.
    ///
    /// Setting the time to "now" needs write access only. Setting any other time needs ownership of the file.
    pub(crate) fn touch_last_used(&self, dir: &ArtifactDir, create: bool) -> Result<()> {
        let path = dir.last_used();
        // The usual case takes one system call. A symbolic link is touched itself, not its target.
        let touched = path.touch();
        if touched.is_ok() || !create {
            return touched.at("touch", &path);
        }
        let open = || modes::open_shared(&path);
        let file = match open() {
            // Another user created the file before the directory was shared. Write access to the folder is enough to
            // replace it.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                files::remove_file(&path)?;
                open()
            }
            opened => opened,
        }
        .at("open", &path)?;
        OptionalCall::SetTime.accept_refusal(rustix::fs::futimens(&file, &NOW).map_err(Into::into)).at("touch", &path)
    }
}
