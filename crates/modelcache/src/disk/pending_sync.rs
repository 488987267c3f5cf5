//! Duties: what this process has published and has still to make durable, and whose such word is worth something.
//!
//! A process that publishes without waiting for the disk holds one file in `unsynced/` locked, alone, for as long as it
//! owes anything; every file that it publishes meanwhile bears the name of that file in its manifest. The lock is the
//! proof that it lives: it falls with the last descriptor, is not there after a reboot or on another machine, and cannot
//! be seen through another mount of what was unmounted. Whoever finds a mark asks for the lock, shared, so that those
//! who ask do not take each other for the writer: refused, the bytes are in the kernel's hands and can be lent at once;
//! granted, the writer is gone and nobody knows.
//!
//! Surprise: the lock is never let go but by closing. A process that is handed the descriptor takes over the duties
//! without a moment in which nobody has them.

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
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Digits of the name of a place: this boot, these filesystems.
const PLACE_DIGITS: usize = 16;
/// How often it is tried to pay what another process handed over, where somebody keeps the budget for long.
const TRIES_MAX: usize = 10;
/// How often a file is made anew.
const MAKES_MAX: usize = 16;
/// Bytes of a list of duties that are read.
const LIST_BYTES_MAX: u64 = 64 << 20;

/// What a process owes.
#[derive(Debug, Default)]
pub(super) struct PendingSyncs {
    state: Mutex<State>,
    /// One at a time makes something durable: what waits finds it done.
    pub(super) turn: Mutex<()>,
    /// A `syncfs` of this process failed.
    pub(super) filesystem_failed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    writer: Option<Writer>,
    dirty: BTreeMap<ArtifactKey, Dirty>,
    /// Counts what was published, so that what comes while an artifact is made durable is not forgotten.
    published: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Dirty {
    number: u64,
    bytes: u64,
    /// Publications under way: nothing of them can be made durable yet.
    running: usize,
}

/// The locked file.
#[derive(Debug)]
struct Writer {
    name: String,
    path: RootedPath,
    file: File,
}

/// A line of it: what is owed, for people and for whoever takes over.
#[derive(Debug, Serialize, Deserialize)]
struct DirtyEntry {
    #[serde(flatten)]
    key: ArtifactKey,
    bytes: u64,
}

/// A publication under way: until it is dropped, what it owes cannot be paid.
#[derive(Debug)]
pub(super) struct UnsyncedPublication<'disk> {
    disk: &'disk Disk,
    key: ArtifactKey,
    /// What the manifest says of its files.
    pub(super) writer: String,
}

/// What a process leaves to another one: its duties, and the lock that says that somebody has them.
#[derive(Debug)]
pub struct SyncHandoff {
    /// The local directory.
    pub dir: PathBuf,
    /// The name of the locked file.
    pub writer: String,
    /// The locked file.
    pub lock: File,
}

/// Which marks are worth something, looked up once each.
pub(super) struct WriterLiveness<'disk> {
    disk: &'disk Disk,
    known: HashMap<String, bool>,
}

impl WriterLiveness<'_> {
    /// The identity under which the bytes of `entry` are right: durable, or in the hands of a writer that lives.
    pub(super) fn identity(&mut self, entry: &FileEntry) -> Option<FileIdentity> {
        entry.on_disk().or_else(|| {
            let file = entry.unsynced()?;
            self.has(file.writer()).then(|| file.identity())
        })
    }

    /// Whether `writer` still answers for what bears its name.
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

    /// Whether it can be told here who has duties; else nothing is published without waiting.
    pub(crate) fn may_defer_sync(&self) -> bool {
        self.locks_are_honest() && place(self).is_some()
    }

    /// Whether `writer` is still about to make durable what bears its name.
    fn is_alive(&self, writer: &str) -> bool {
        let is_name = writer.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !is_name || writer.split('-').next() != place(self).as_deref() {
            return false;
        }
        if self.pending_syncs().state().writer.as_ref().is_some_and(|ours| ours.name == writer) {
            return true;
        }
        is_locked(&self.layout().unsynced().join(writer))
    }

    /// Announces a publication of `key`, of so many bytes: from now on this process is known to live.
    pub(super) fn mark_dirty(&self, key: &ArtifactKey, bytes: u64) -> Result<UnsyncedPublication<'_>> {
        let mut state = self.pending_syncs().state();
        let state = &mut *state;
        let writer = match &mut state.writer {
            Some(writer) => writer,
            none => none.insert(Writer::new(self)?),
        };
        writer.note(&DirtyEntry { key: key.clone(), bytes })?;
        state.published += 1;
        let dirty = state.dirty.entry(key.clone()).or_default();
        (dirty.number, dirty.bytes, dirty.running) = (state.published, dirty.bytes + bytes, dirty.running + 1);
        Ok(UnsyncedPublication { disk: self, key: key.clone(), writer: writer.name.clone() })
    }

    /// The artifacts of which something is owed.
    pub(super) fn dirty(&self) -> Vec<ArtifactKey> {
        self.pending_syncs().state().dirty.keys().cloned().collect()
    }

    /// Bytes that were published here and are not known to be durable.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.pending_syncs().state().dirty.values().map(|dirty| dirty.bytes).sum()
    }

    /// Whether anything of `key` is owed.
    pub(crate) fn is_dirty(&self, key: &ArtifactKey) -> bool {
        self.pending_syncs().state().dirty.contains_key(key)
    }

    /// The last publication of `key` that is owed; `None` also while one is under way, which nobody can pay for yet.
    pub(super) fn dirty_number(&self, key: &ArtifactKey) -> Option<u64> {
        self.pending_syncs().state().dirty.get(key).filter(|dirty| dirty.running == 0).map(|dirty| dirty.number)
    }

    /// Nothing of `key` is owed any more that was published up to `number`.
    pub(super) fn mark_synced(&self, key: &ArtifactKey, number: u64) {
        self.pending_syncs().state().forget(|of, dirty| of == key && dirty.number <= number && dirty.running == 0);
    }

    /// What is owed, for another process, which is to be given the lock. This one owes it until
    /// [`handed_off`](Self::handed_over).
    pub(crate) fn hand_off(&self) -> Result<Option<SyncHandoff>> {
        let state = self.pending_syncs().state();
        let Some(writer) = &state.writer else { return Ok(None) };
        let lock = writer.file.try_clone().at("hand over", &writer.path)?;
        Ok(Some(SyncHandoff { dir: self.layout().root().full(), writer: writer.name.clone(), lock }))
    }

    /// Another process has the duties, and the lock.
    pub(crate) fn handed_off(&self) {
        let mut state = self.pending_syncs().state();
        state.dirty.clear();
        state.writer = None;
    }

    /// This process is a child that was forked: the duties, and the lock, are its parent's. The parent may have been at
    /// work on them in that moment; then the descriptor stays open.
    pub(crate) fn forked(&self) {
        if let Ok(mut state) = self.pending_syncs().state.try_lock() {
            state.dirty.clear();
            state.writer = None;
        }
    }

    /// Makes durable what another process handed over, with the lock that it held.
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

    fn take_over(&self, writer: &str, lock: File) -> Result<()> {
        let path = self.layout().unsynced().join(writer);
        let gone = || Error::new(ErrorKind::Directory, format!("{} is not what was handed over", path));
        let ours = Metadata::of(&lock).at("look at", &path)?.device_and_inode();
        if files::stat(&path)?.map(|there| there.device_and_inode()) != Some(ours) {
            return Err(gone().tier(Tier::Disk));
        }
        let list = files::read_small(&path, LIST_BYTES_MAX)?.unwrap_or_default();
        let mut state = self.pending_syncs().state();
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

    /// Removes the files of writers that are gone. Those who ask whether one lives share its lock, as this does.
    pub(super) fn drop_dead_writers(&self) -> Result<()> {
        if !self.locks_are_honest() {
            return Ok(());
        }
        for path in files::entries(&self.layout().unsynced())? {
            if !is_locked(&path)
                && let Err(error) = files::remove(&path)
            {
                tracing::warn!(%error, "what a process left in unsynced/ cannot be removed; it is left alone");
            }
        }
        Ok(())
    }

    pub(super) fn pending_syncs(&self) -> &PendingSyncs {
        &self.0.pending_syncs
    }
}

impl PendingSyncs {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets what is done; with the last of it the file goes.
    fn forget(&mut self, done: impl Fn(&ArtifactKey, &Dirty) -> bool) {
        self.dirty.retain(|key, dirty| !done(key, dirty));
        if self.dirty.is_empty()
            && let Some(writer) = self.writer.take()
            && let Err(error) = files::remove_file(&writer.path)
        {
            tracing::debug!(%error, "the list of what was to be made durable stays until the next sweep");
        }
    }
}

impl Drop for UnsyncedPublication<'_> {
    fn drop(&mut self) {
        if let Some(dirty) = self.disk.pending_syncs().state().dirty.get_mut(&self.key) {
            dirty.running = dirty.running.saturating_sub(1);
        }
    }
}

impl Writer {
    /// A new file, locked. Somebody who asks whether its writer lives, or sweeps, may come between making and locking it.
    fn new(disk: &Disk) -> Result<Self> {
        for _ in 0..MAKES_MAX {
            if let Some(writer) = Self::try_new(disk)? {
                return Ok(writer);
            }
        }
        Err(Error::new(ErrorKind::Other, "each new file in unsynced/ is locked by somebody else").tier(Tier::Disk))
    }

    fn try_new(disk: &Disk) -> Result<Option<Self>> {
        let folder = disk.layout().unsynced();
        modes::make_dir(&folder).at("make", &folder)?;
        let place = place(disk).unwrap_or_else(|| "0".repeat(PLACE_DIGITS));
        let name = format!("{place}-{}", files::random_name());
        let path = folder.join(&name);
        let file = modes::create_shared(&path).at("make", &path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                files::remove_file(&path)?;
                return Ok(None);
            }
            // Where there are no locks nobody will take the mark for anything.
            Err(TryLockError::Error(cause)) => tracing::debug!(%cause, "the file cannot be locked"),
        }
        let is_there =
            files::stat(&path)?.map(|found| found.ino()) == Some(Metadata::of(&file).at("look at", &path)?.ino());
        Ok(is_there.then_some(Self { name, path, file }))
    }

    fn note(&mut self, line: &DirtyEntry) -> Result<()> {
        let mut bytes = serde_json::to_vec(line).unwrap_or_default();
        bytes.push(b'\n');
        let end = self.file.metadata().at("look at", &self.path)?.len();
        self.file.write_all_at(&bytes, end).at("write", &self.path)
    }
}

/// Whether somebody holds the file at `path` alone.
fn is_locked(path: &RootedPath) -> bool {
    let Ok(file) = path.open(false) else { return false };
    match file.try_lock_shared() {
        Ok(()) => {
            let _ = file.unlock();
            false
        }
        Err(TryLockError::WouldBlock) => true,
        Err(TryLockError::Error(_)) => false,
    }
}

/// This boot and the filesystems that hold what is lent; `None` where the kernel does not tell which boot it is.
fn place(disk: &Disk) -> Option<String> {
    let boot = Some(boot_id()).filter(|boot| !boot.is_empty())?;
    let layout = disk.layout();
    let device = |path: &RootedPath| path.metadata().map(|metadata| metadata.dev()).ok();
    let devices = [layout.root(), &layout.blobs(), &layout.artifacts()].map(device);
    let filesystem = layout.root().filesystem().ok()?.f_fsid;
    let mut text = Vec::new();
    write!(text, "{boot}\0{devices:?}\0{filesystem}").ok()?;
    Some(Digest::of(&text).to_string()[..PLACE_DIGITS].to_owned())
}
