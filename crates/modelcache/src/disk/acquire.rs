//! Lending: a shared lease, the manifest, one `stat` per file, and the last use touched.
//!
//! Nothing is hashed while every file has the identity recorded for it. A file that differs is hashed then and there:
//! right bytes get their new identity recorded, wrong ones are quarantined and uncommitted in every artifact that
//! recorded them. On a read-only directory hits are still served, without the lease or the touch if need be.

use super::Disk;
use super::files;
use super::hashing;
use super::io_error::{IoContext, errno};
use super::layout::ArtifactDir;
use super::link::Link;
use super::lock::FileLock;
use super::modes;
use super::rooted::{Folders, Metadata, NOW, RootedPath};
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

/// The last change of a file that was withdrawn, by which it differs from every record of it.
fn withdrawn_mtime() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1)
}

/// How often lending starts again after it found and mended something.
const ROUNDS_MAX: usize = 1000;

/// An artifact's files, held against eviction while this value lives.
#[derive(Debug)]
pub(crate) struct LeasedArtifact {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) dir: ArtifactDir,
    /// How the files share their bytes, if they were published just now.
    pub(crate) link: Option<Link>,
    /// Whether it lies in the lower directory, which is only read.
    pub(crate) is_lower: bool,
    pub(crate) _lease: Option<Arc<FileLock>>,
}

/// Whether a file could not be opened for want of descriptors or memory, which says nothing about the file.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// What lending found.
#[derive(Debug)]
pub(crate) enum AcquireOutcome {
    /// Everything selected is here.
    Leased(Box<LeasedArtifact>),
    /// Something selected is not.
    Absent,
    /// An eviction is at work on it; try again in a moment.
    Evicting,
}

/// How one view differs from what its manifest says.
pub(super) enum Mismatch {
    Missing,
    Right(FileIdentity),
    Wrong(File),
}

impl LeasedArtifact {
    /// What a caller gets: the one file selected or the artifact's only file, else the folder.
    pub(crate) fn path(&self, selection: &Selection) -> PathBuf {
        match (selection.one_file(), self.manifest.shape, self.manifest.files.keys().next()) {
            (Some(file), _, _) | (None, Shape::File, Some(file)) => self.dir.view(file),
            _ => self.dir.files(),
        }
        .full()
    }
}

impl Disk {
    /// Lends what `selection` chooses of `key`, if all of it is here and right.
    pub(crate) fn acquire(&self, key: &ArtifactKey, selection: &Selection) -> Result<AcquireOutcome> {
        let dir = self.layout().artifact(key);
        if files::stat(&dir.manifest())?.is_none() {
            return Ok(AcquireOutcome::Absent);
        }
        let lease = match FileLock::try_shared(&self.layout().lease(&dir)) {
            Ok(Some(lease)) => Some(lease),
            Ok(None) => return Ok(AcquireOutcome::Evicting),
            Err(_) if self.is_read_only() => None,
            Err(error) => return Err(error),
        };
        for _ in 0..ROUNDS_MAX {
            let Some(manifest) = self.shared_manifest(&dir)? else { return Ok(AcquireOutcome::Absent) };
            if !manifest.holds(selection) {
                return Ok(AcquireOutcome::Absent);
            }
            if !self.is_read_only() && self.is_doubtful(&manifest, selection) {
                self.recheck(key, &dir, selection)?;
                continue;
            }
            match self.first_mismatch(&dir, &manifest, selection)? {
                None => {
                    let _ = self.touch_last_used(&dir, false);
                    return Ok(AcquireOutcome::Leased(Box::new(LeasedArtifact {
                        manifest,
                        dir,
                        link: None,
                        is_lower: false,
                        _lease: lease.map(Arc::new),
                    })));
                }
                Some((path, _, _)) if self.is_read_only() => {
                    tracing::warn!(artifact = %key, file = %path, "this copy is missing or was changed, and cannot be mended where nothing can be written");
                    return Ok(AcquireOutcome::Absent);
                }
                Some((path, entry, mismatch)) => drop(self.record_mismatch(&dir, &path, &entry, mismatch)?),
            }
        }
        Ok(AcquireOutcome::Absent)
    }

    fn first_mismatch(
        &self,
        dir: &ArtifactDir,
        manifest: &Manifest,
        selection: &Selection,
    ) -> Result<Option<(FilePath, FileEntry, Mismatch)>> {
        let (mut writer_liveness, mut views) = (self.writer_liveness(), Folders::default());
        for (path, entry) in manifest.selected(selection) {
            let view = dir.view(path);
            let Some(metadata) = views.metadata(&view).at("look at", &view)? else {
                return Ok(Some((path.clone(), entry.clone(), Mismatch::Missing)));
            };
            if writer_liveness.identity(entry) != Some(metadata.identity()) {
                match self.check_file(&view, entry)? {
                    // It cannot be recorded there; it is right all the same.
                    Mismatch::Right(_) if self.is_read_only() => {}
                    mismatch => return Ok(Some((path.clone(), entry.clone(), mismatch))),
                }
            }
        }
        Ok(None)
    }

    /// Hashes a view that is not the file its manifest recorded.
    pub(super) fn check_file(&self, view: &RootedPath, entry: &FileEntry) -> Result<Mismatch> {
        let file = match view.open(false) {
            Ok(file) => file,
            Err(error) if is_shortage(&error) || error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(error).at("open", view);
            }
            Err(_) => return Ok(Mismatch::Missing),
        };
        let before = Metadata::of(&file).at("look at", view)?;
        if !before.is_file() {
            return Ok(Mismatch::Missing);
        }
        let is_right = match entry.sha256 {
            // It was withdrawn once: the medium may not have what a read still finds in memory.
            _ if before.modified() == withdrawn_mtime() => false,
            Some(digest) => hashing::has_digest(&file, digest, entry.ladder.as_ref()).at("read", view)?,
            None => false,
        };
        let after = Metadata::of(&file).at("look at", view)?.identity();
        if is_right && after == before.identity() { Ok(Mismatch::Right(after)) } else { Ok(Mismatch::Wrong(file)) }
    }

    /// Records what was found of a view. Tells which files of which artifacts are held no more because of it.
    pub(super) fn record_mismatch(
        &self,
        dir: &ArtifactDir,
        path: &FilePath,
        entry: &FileEntry,
        mismatch: Mismatch,
    ) -> Result<Vec<(ArtifactKey, FilePath)>> {
        let lies_there = files::stat(&dir.view(path))?;
        let was_resized = lies_there.as_ref().is_some_and(|metadata| metadata.len() != entry.size);
        let inode = lies_there.map(|metadata| metadata.ino()).or(entry.recorded_on_disk().map(|held| held.inode));
        let blob = entry.sha256.map(|digest| files::stat(&self.layout().blob(&digest))).transpose()?.flatten();
        if was_resized || inode != blob.map(|metadata| metadata.ino()) {
            // Bytes of its own, which counted by themselves, came or went; or what was counted takes other room by now.
            let mut hold = self.hold_budget()?;
            hold.distrust()?;
            hold.release()?;
        }
        match mismatch {
            Mismatch::Missing => self.edit_manifest(dir, |manifest| {
                let missing = files::stat(&dir.view(path)).is_ok_and(|metadata| !metadata.is_some_and(|m| m.is_file()));
                manifest.files.get_mut(path).filter(|_| missing).map(|entry| entry.held = None).is_some()
            })?,
            // What is recorded is durable. That the medium refuses it is told, and found again as a missing file.
            Mismatch::Right(identity) => drop(self.make_durable(dir, &[(path.clone(), entry.clone(), identity)])?),
            Mismatch::Wrong(file) => return self.withdraw(dir, path, entry, &file),
        }
        Ok(Vec::new())
    }

    /// A file's bytes are wrong: no artifact may go on claiming to hold them.
    ///
    /// The inode's mtime is spoilt first, through the descriptor that was hashed: one call makes every link of it,
    /// recorded anywhere, differ from its record.
    fn withdraw(
        &self,
        dir: &ArtifactDir,
        path: &FilePath,
        entry: &FileEntry,
        file: &File,
    ) -> Result<Vec<(ArtifactKey, FilePath)>> {
        tracing::warn!(artifact = %dir.path(), file = %path, "a cached file is not what it was; it is withdrawn, and the next get fetches it again");
        let _ = file.set_times(fs::FileTimes::new().set_modified(withdrawn_mtime()));
        let inode = Metadata::of(file).at("look at", &dir.view(path))?.ino();
        if let Some(digest) = entry.sha256 {
            self.quarantine_inode(&digest, inode)?;
        }
        let mut uncommitted = Vec::new();
        for artifact in self.scan()? {
            let records = |entry: &FileEntry| entry.recorded_on_disk().is_some_and(|held| held.inode == inode);
            let Some(manifest) = artifact.manifest else { continue };
            let recording = manifest.files.iter().filter(|(_, entry)| records(entry));
            let recording: Vec<_> = recording.map(|(path, _)| (manifest.key.clone(), path.clone())).collect();
            if !recording.is_empty() {
                uncommitted.extend(recording);
                self.edit_manifest(&artifact.dir, |manifest| {
                    manifest.files.values_mut().filter(|entry| records(entry)).map(|entry| entry.held = None).count()
                        > 0
                })?;
            }
        }
        // The record may name another inode than the one that lies there now.
        self.edit_manifest(dir, |manifest| {
            let lies_there = files::stat(&dir.view(path)).ok().flatten().map(|metadata| metadata.identity());
            let entry = manifest.files.get_mut(path).filter(|e| e.held.is_some() && e.recorded_on_disk() != lies_there);
            entry.map(|entry| entry.held = None).is_some()
        })?;
        Ok(uncommitted)
    }

    pub(super) fn quarantine_inode(&self, digest: &Digest, inode: u64) -> Result<()> {
        let blob = self.layout().blob(digest);
        let mut hold = self.hold_budget()?;
        if files::stat(&blob)?.is_some_and(|metadata| metadata.ino() == inode) {
            hold.begin_change()?;
            hold.quarantine(&blob, digest)?;
        }
        hold.release()
    }

    /// Changes a manifest in one budget hold; `edit` tells whether it changed anything.
    pub(super) fn edit_manifest(&self, dir: &ArtifactDir, edit: impl FnOnce(&mut Manifest) -> bool) -> Result<()> {
        let mut hold = self.hold_budget()?;
        if let Some(mut manifest) = self.read_manifest(dir)?
            && edit(&mut manifest)
        {
            hold.begin_change_of(dir)?;
            files::replace(&dir.manifest(), &manifest.to_bytes()?, &self.layout().stagings())?;
        }
        hold.release()
    }

    /// Sets the last use to now; with `create`, makes the file if it is missing. Whoever may write the file may do this:
    /// "now" needs no ownership, as any other time would.
    pub(crate) fn touch_last_used(&self, dir: &ArtifactDir, create: bool) -> Result<()> {
        let path = dir.last_used();
        // The usual case, in one call. A link is touched itself, not what it points to.
        let touched = path.touch();
        if touched.is_ok() || !create {
            return touched.at("touch", &path);
        }
        let open = || modes::open_shared(&path);
        let file = match open() {
            // Made by another user before the directory was shared; its folder lets us replace it.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                files::remove_file(&path)?;
                open()
            }
            opened => opened,
        }
        .at("open", &path)?;
        rustix::fs::futimens(&file, &NOW).at("touch", &path)
    }
}
