//! The artifacts that this process published and has not synced yet, and the liveness test for such writers.
//!
//! A process that publishes without waiting for the disk (a *writer*) holds one file in `unsynced/` locked exclusively
//! until everything is synced. Each file that it publishes names that file as its `writer` in the manifest. The lock
//! proves that the writer lives: it ends with the last descriptor and at a reboot, and after an unmount a new mount
//! does not show it. While the writer lives, the kernel has the bytes, and the file can be leased at once. Otherwise it
//! is unknown whether the bytes reached the disk.
//!
//! The lock is released only by closing its last descriptor. A process that inherits the descriptor therefore takes
//! over the pending syncs without a gap.

use super::Disk;
use super::budget::boot_id;
use super::files;
use super::io_error::IoContext;
use super::modes;
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::ArtifactKey;
use crate::manifest::{FileEntry, FileIdentity};
use crate::mutex::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

/// Hexadecimal digits of a [`mount_id`].
const MOUNT_DIGITS: usize = 16;
/// Attempts to sync the artifacts that another process handed over. One fails if the budget lock stays taken for long.
const TRIES_MAX: usize = 10;
/// Attempts to create and lock a file in `unsynced/`.
const MAKES_MAX: usize = 16;
/// Maximum length in bytes of the list in a file of `unsynced/`.
const LIST_BYTES_MAX: u64 = 64 << 20;

/// The artifacts that this process has still to sync.
#[derive(Debug, Default)]
pub(super) struct PendingSyncs {
    state: Mutex<State>,
    /// Held during a sync. Other threads that want to sync wait, and then find it done.
    pub(super) turn: Mutex<()>,
    /// True once a `syncfs` of this process has failed.
    pub(super) filesystem_failed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// The locked file in `unsynced/`; `None` while nothing is dirty.
    writer: Option<Writer>,
    dirty: BTreeMap<ArtifactKey, Dirty>,
    /// Number of the last publication. A sync clears only publications up to the number that it started with.
    published: u64,
}

/// The publications of one artifact that are not synced yet.
#[derive(Debug, Clone, Copy, Default)]
struct Dirty {
    /// Number of the last of them.
    number: u64,
    bytes: u64,
    /// Publications in progress. The artifact cannot be synced before they end.
    running: usize,
}

/// The locked file in `unsynced/` that stands for this process.
#[derive(Debug)]
struct Writer {
    name: String,
    path: RootedPath,
    file: File,
}

/// One line of the writer's file: an artifact to sync, for people and for the process that takes over.
#[derive(Debug, Serialize, Deserialize)]
struct DirtyEntry {
    #[serde(flatten)]
    key: ArtifactKey,
    bytes: u64,
}

/// A publication in progress. Its artifact cannot be synced until it is dropped.
#[derive(Debug)]
pub(super) struct UnsyncedPublication<'disk> {
    disk: &'disk Disk,
    key: ArtifactKey,
    /// The `writer` that the manifest records for its files.
    pub(super) writer: String,
}

/// The pending syncs that a process hands over to another one, with the lock that proves that a writer lives.
#[derive(Debug)]
pub struct SyncHandoff {
    /// The local directory.
    pub dir: PathBuf,
    /// The name of the locked file.
    pub writer: String,
    /// The locked file.
    pub lock: File,
}

/// Liveness of writers; the lock of each writer is tested once.
pub(super) struct WriterLiveness<'disk> {
    disk: &'disk Disk,
    known: HashMap<String, bool>,
}

impl WriterLiveness<'_> {
    /// Returns the identity under which the bytes of `entry` are known to be right: the file is durable, or unsynced by
    /// a writer that lives.
    pub(super) fn identity(&mut self, entry: &FileEntry) -> Option<FileIdentity> {
        entry.on_disk().or_else(|| {
            let file = entry.unsynced()?;
            self.has(file.writer()).then(|| file.identity())
        })
    }

    /// Returns true if `writer` lives.
    pub(super) fn has(&mut self, writer: &str) -> bool {
        if let Some(is_alive) = self.known.get(writer) {
            return *is_alive;
        }
        let is_alive = self.disk.is_alive(writer);
        self.known.insert(writer.to_owned(), is_alive);
        is_alive
    }
}

impl Disk {
    pub(super) fn writer_liveness(&self) -> WriterLiveness<'_> {
        WriterLiveness { disk: self, known: HashMap::new() }
    }

    /// Returns true if other processes can test whether this writer lives. If not, every get waits until its files are
    /// durable.
    pub(crate) fn may_defer_sync(&self) -> bool {
        self.locks_are_honest() && mount_id(self).is_some()
    }

    /// Returns true if `writer` lives, and so is still going to sync its files.
    fn is_alive(&self, writer: &str) -> bool {
        let is_name = writer.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        // On a local filesystem the lock alone proves that the writer lives. If a server keeps the locks, the mount id
        // excludes writers of another boot or machine.
        if !is_name || writer.split('-').next() != mount_id(self).as_deref() {
            return false;
        }
        // This process is the writer.
        if self.pending_syncs().state.lock().writer.as_ref().is_some_and(|ours| ours.name == writer) {
            return true;
        }
        is_locked(&self.layout().unsynced().join(writer))
    }

    /// Registers a publication of `bytes` bytes of `key`. On return this process holds the lock of a writer.
    pub(super) fn mark_dirty(&self, key: &ArtifactKey, bytes: u64) -> Result<UnsyncedPublication<'_>> {
        let mut state = self.pending_syncs().state.lock();
        let state = &mut *state;
        let writer = match &mut state.writer {
            Some(writer) => writer,
            none => none.insert(Writer::new(self)?),
        };
        // The list in the file is complete before anything is published, so that a hand-over misses no artifact.
        writer.append(&DirtyEntry { key: key.clone(), bytes })?;
        state.published += 1;
        let dirty = state.dirty.entry(key.clone()).or_default();
        (dirty.number, dirty.bytes, dirty.running) = (state.published, dirty.bytes + bytes, dirty.running + 1);
        Ok(UnsyncedPublication { disk: self, key: key.clone(), writer: writer.name.clone() })
    }

    /// Returns the artifacts that this process has still to sync.
    pub(super) fn dirty(&self) -> Vec<ArtifactKey> {
        self.pending_syncs().state.lock().dirty.keys().cloned().collect()
    }

    /// Returns the bytes that this process published and has not synced yet.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.pending_syncs().state.lock().dirty.values().map(|dirty| dirty.bytes).sum()
    }

    /// Returns true if this process has still to sync files of `key`.
    pub(crate) fn is_dirty(&self, key: &ArtifactKey) -> bool {
        self.pending_syncs().state.lock().dirty.contains_key(key)
    }

    /// Returns the number of the last unsynced publication of `key`; `None` if there is none or one is in progress.
    pub(super) fn dirty_number(&self, key: &ArtifactKey) -> Option<u64> {
        self.pending_syncs().state.lock().dirty.get(key).filter(|dirty| dirty.running == 0).map(|dirty| dirty.number)
    }

    /// Records that the publications of `key` up to `number` are synced. Later ones stay dirty.
    pub(super) fn mark_synced(&self, key: &ArtifactKey, number: u64) {
        self.pending_syncs().state.lock().forget(|of, dirty| of == key && dirty.number <= number && dirty.running == 0);
    }

    /// Returns the pending syncs for another process, with a duplicate of the descriptor that holds the lock. This
    /// process keeps them until [`handed_off`](Self::handed_off).
    pub(crate) fn hand_off(&self) -> Result<Option<SyncHandoff>> {
        let state = self.pending_syncs().state.lock();
        let Some(writer) = &state.writer else { return Ok(None) };
        let lock = writer.file.try_clone().at("hand over", &writer.path)?;
        Ok(Some(SyncHandoff { dir: self.layout().root().full(), writer: writer.name.clone(), lock }))
    }

    /// Drops the pending syncs after another process has taken over them and the lock.
    pub(crate) fn handed_off(&self) {
        let mut state = self.pending_syncs().state.lock();
        state.dirty.clear();
        // Closes this descriptor. The lock stays, because the other process holds a duplicate of it.
        state.writer = None;
    }

    /// Drops the pending syncs in a forked child: they, and the lock, belong to the parent.
    pub(crate) fn forked(&self) {
        // A thread of the parent may have held the mutex at the fork; it is never released in the child. The descriptor
        // then stays open.
        if let Some(mut state) = self.pending_syncs().state.try_lock() {
            state.dirty.clear();
            state.writer = None;
        }
    }

    /// Syncs the artifacts that another process handed over: `writer` is its file in `unsynced/`, `lock` the locked
    /// descriptor of that file.
    pub(crate) fn sync_for(&self, writer: &str, lock: File) -> Result<()> {
        self.take_over(writer, lock)?;
        let mut outcome = self.sync_dirty();
        for _ in 1..TRIES_MAX {
            if self.dirty().is_empty() {
                break;
            }
            outcome = self.sync_dirty();
        }
        outcome
    }

    /// Reads the list in the file of `writer`, and becomes that writer.
    fn take_over(&self, writer: &str, lock: File) -> Result<()> {
        let path = self.layout().unsynced().join(writer);
        let gone = || Error::new(ErrorKind::Directory, format!("{} is not the file that was handed over", path));
        // The descriptor must be that of the file under this name, because other processes test the lock of that file.
        let ours = Metadata::of(&lock).at("examine", &path)?.device_and_inode();
        if files::stat(&path)?.map(|there| there.device_and_inode()) != Some(ours) {
            return Err(gone().tier(Tier::Disk));
        }
        let list = files::read_small(&path, LIST_BYTES_MAX)?.unwrap_or_default();
        let mut state = self.pending_syncs().state.lock();
        state.writer = Some(Writer { name: writer.to_owned(), path, file: lock });
        for DirtyEntry { key, bytes } in
            list.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok())
        {
            state.published += 1;
            let dirty = Dirty { number: state.published, bytes, running: 0 };
            state.dirty.insert(key, dirty);
        }
        Ok(())
    }

    /// Removes the files of dead writers from `unsynced/`.
    pub(super) fn drop_dead_writers(&self) -> Result<()> {
        if !self.locks_are_honest() {
            return Ok(());
        }
        for path in files::entries(&self.layout().unsynced())? {
            if !is_locked(&path)
                && let Err(error) = files::remove(&path)
            {
                tracing::warn!(%error, "the file of a dead process in unsynced/ cannot be removed; it stays");
            }
        }
        Ok(())
    }

    pub(super) fn pending_syncs(&self) -> &PendingSyncs {
        &self.0.pending_syncs
    }
}

impl State {
    /// Forgets the artifacts for which `done` is true. With the last of them, removes the file in `unsynced/`.
    fn forget(&mut self, done: impl Fn(&ArtifactKey, &Dirty) -> bool) {
        self.dirty.retain(|key, dirty| !done(key, dirty));
        if self.dirty.is_empty()
            && let Some(writer) = self.writer.take()
            && let Err(error) = files::remove_file(&writer.path)
        {
            tracing::debug!(%error, "the file of this process in unsynced/ stays until the next sweep");
        }
    }
}

impl Drop for UnsyncedPublication<'_> {
    fn drop(&mut self) {
        if let Some(dirty) = self.disk.pending_syncs().state.lock().dirty.get_mut(&self.key) {
            dirty.running = dirty.running.saturating_sub(1);
        }
    }
}

impl Writer {
    /// Creates and locks a new file in `unsynced/`.
    fn new(disk: &Disk) -> Result<Self> {
        for _ in 0..MAKES_MAX {
            if let Some(writer) = Self::try_new(disk)? {
                return Ok(writer);
            }
        }
        Err(Error::new(ErrorKind::Other, "every new file in unsynced/ was locked by another process").tier(Tier::Disk))
    }

    /// Returns `None` if another process locked or removed the file between its creation and its locking.
    fn try_new(disk: &Disk) -> Result<Option<Self>> {
        let folder = disk.layout().unsynced();
        modes::make_dir(&folder).at("make", &folder)?;
        let mount = mount_id(disk).unwrap_or_else(|| "0".repeat(MOUNT_DIGITS));
        let name = format!("{mount}-{}", files::random_name());
        let path = folder.join(&name);
        let file = modes::create_shared(&path).at("make", &path)?;
        match file.try_lock() {
            Ok(()) => {}
            // A process is testing whether the writer of the new file lives.
            Err(TryLockError::WouldBlock) => {
                files::remove_file(&path)?;
                return Ok(None);
            }
            // Without locks, other processes count the writer as dead, and this process syncs before it returns.
            Err(TryLockError::Error(cause)) => tracing::debug!(%cause, "the file cannot be locked"),
        }
        // A sweep may have removed the file before it was locked.
        let is_there =
            files::stat(&path)?.map(|found| found.ino()) == Some(Metadata::of(&file).at("examine", &path)?.ino());
        Ok(is_there.then_some(Self { name, path, file }))
    }

    /// Appends a line to the file.
    fn append(&mut self, line: &DirtyEntry) -> Result<()> {
        let mut bytes = serde_json::to_vec(line).unwrap_or_default();
        bytes.push(b'\n');
        let end = self.file.metadata().at("examine", &self.path)?.len();
        self.file.write_all_at(&bytes, end).at("write", &self.path)
    }
}

/// Returns true if a process holds the exclusive lock of the file at `path`.
fn is_locked(path: &RootedPath) -> bool {
    let Ok(file) = path.open(false) else { return false };
    // The test takes the lock shared, so that two processes that test at once do not mistake each other for the writer.
    match file.try_lock_shared() {
        Ok(()) => {
            let _ = file.unlock();
            false
        }
        Err(TryLockError::WouldBlock) => true,
        Err(TryLockError::Error(_)) => false,
    }
}

/// Returns 16 digits of a SHA-256 over the boot id and the filesystems of the cache; `None` if the kernel reports no
/// boot id.
fn mount_id(disk: &Disk) -> Option<String> {
    let boot = Some(boot_id()).filter(|boot| !boot.is_empty())?;
    let layout = disk.layout();
    let device = |path: &RootedPath| path.metadata().map(|metadata| metadata.dev()).ok();
    let devices = [layout.root(), &layout.blobs(), &layout.artifacts()].map(device);
    let filesystem = layout.root().filesystem().ok()?.f_fsid;
    let mut text = Vec::new();
    write!(text, "{boot}\0{devices:?}\0{filesystem}").ok()?;
    Some(Digest::of(&text).to_string()[..MOUNT_DIGITS].to_owned())
}
