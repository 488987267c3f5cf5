//! Locks between processes, by `flock`. The files below `locks/` are never unlinked.
//!
//! - No process blocks in `flock`. It tries, sleeps and tries again.
//! - Locks are taken in this order: backfill, fill, owner (the journal in the staging folder of this fill), shared
//!   lease, check (`<key>.check`, for syncing or hashing unsynced files), budget. A process that holds the budget lock
//!   tries further locks only once: the exclusive lease of an artifact, or the owner lock of another staging folder.
//! - Some filesystems grant every lock, and some support none; [`are_honest`] detects both. If a filesystem supports no
//!   locks, every try succeeds. Code that depends on exclusion calls `Disk::locks_are_honest`.

use super::files;
use super::io_error::{IoContext, errno};
use super::modes;
use super::rooted::{Metadata, RootedPath};
use crate::error::Result;
use rustix::io::Errno;
use std::fs::{File, TryLockError};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for a lock that is held only for a critical section or an eviction. It is this long because a slow disk
/// may have to remove many files meanwhile; a process that holds the lock for longer is probably stopped.
pub(crate) const LOCK_WAIT_MAX: Duration = Duration::from_secs(30);
/// Pause between two tries of a lock.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A held file lock, released on drop.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

impl FileLock {
    /// Tries to lock `path` exclusively; `None` if another process holds the lock.
    pub(crate) fn try_exclusive(path: &RootedPath) -> Result<Option<Self>> {
        let file = modes::open_shared(path).at("open the lock", path)?;
        Self::locked(file.try_lock(), file).at("lock", path)
    }

    /// Tries to lock `path` shared; `None` if another process holds the lock exclusively.
    ///
    /// In a read-only directory, an existing lock file is opened for reading. If there is none, returns the error of
    /// creating it.
    pub(crate) fn try_shared(path: &RootedPath) -> Result<Option<Self>> {
        let file = match modes::open_shared(path) {
            Ok(file) => file,
            Err(denied) => path.open(false).map_err(|_| denied).at("open the lock", path)?,
        };
        Self::try_shared_of(file, path)
    }

    /// Locks `path` exclusively; `None` if another process holds the lock for longer than `wait_max`.
    pub(super) fn wait_exclusive(path: &RootedPath, wait_max: Duration) -> Result<Option<Self>> {
        Self::wait(wait_max, || Self::try_exclusive(path))
    }

    /// Locks `path` shared, as [`try_shared`](Self::try_shared) does; `None` if another process holds the lock
    /// exclusively for longer than [`LOCK_WAIT_MAX`].
    pub(super) fn wait_shared(path: &RootedPath) -> Result<Option<Self>> {
        Self::wait(LOCK_WAIT_MAX, || Self::try_shared(path))
    }

    fn wait(wait_max: Duration, attempt: impl Fn() -> Result<Option<Self>>) -> Result<Option<Self>> {
        let started = Instant::now();
        loop {
            match attempt()? {
                // Poll, because no process may block in `flock`.
                None if started.elapsed() < wait_max => thread::sleep(POLL_INTERVAL),
                outcome => return Ok(outcome),
            }
        }
    }

    /// Tries to lock `file`, which is open at `path`, shared; `None` if another process holds the lock exclusively.
    pub(crate) fn try_shared_of(file: File, path: &RootedPath) -> Result<Option<Self>> {
        Self::locked(file.try_lock_shared(), file).at("lock", path)
    }

    /// Tries to lock the existing file at `path` exclusively. Returns `None` if the file does not exist or was removed
    /// before the lock was taken, and `Some(None)` if another process holds the lock.
    ///
    /// Used for the journals of staging folders and for temporary files. Never creates the file, because its owner may
    /// be removing it.
    pub(crate) fn try_existing(path: &RootedPath) -> Result<Option<Option<Self>>> {
        // A temporary file of another user can only be opened read-only. On local filesystems this is enough to lock
        // it.
        let open = || path.open(true).or_else(|_| path.open(false));
        let opened = files::absent(open()).at("open the lock", path)?;
        let Some(file) = opened else { return Ok(None) };
        let Some(held) = Self::locked(file.try_lock(), file).at("lock", path)? else { return Ok(Some(None)) };
        // The last holder may have removed the file under its lock: check that the path still names the locked file.
        let locked = Metadata::of(&held.file).at("examine", path)?.ino();
        let is_current = files::stat(path)?.is_some_and(|found| found.ino() == locked);
        Ok(is_current.then_some(Some(held)))
    }

    /// Tries to lock a file that this process has just created; `None` if another process locked it first.
    pub(crate) fn of_new(file: File, path: &RootedPath) -> Result<Option<Self>> {
        Self::locked(file.try_lock(), file).at("lock", path)
    }

    /// Locks a temporary file that this process has just created. Other processes do not lock empty temporary files.
    pub(crate) fn of_temporary(file: File) -> io::Result<Self> {
        Self::locked(file.try_lock(), file)?.ok_or_else(|| Errno::WOULDBLOCK.into())
    }

    /// Converts the outcome of a try to a held lock, `None`, or an error.
    fn locked(outcome: Result<(), TryLockError>, file: File) -> io::Result<Option<Self>> {
        match outcome {
            Ok(()) => Ok(Some(Self { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            // The filesystem does not support locks: continue as if this process had got the lock.
            Err(TryLockError::Error(cause)) if has_no_locks(&cause) => Ok(Some(Self { file })),
            Err(TryLockError::Error(cause)) => Err(cause),
        }
    }

    /// Returns the locked file. Only the process that holds the lock writes to it.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a forked child may still have the descriptor, and would keep the lock.
        let _ = self.file.unlock();
    }
}

/// Returns true if locks exclude other processes on the filesystem of `path`, a lock file that is used for this test
/// only: while one open file description holds the lock, a second one must not get it.
pub(crate) fn are_honest(path: &RootedPath) -> Result<bool> {
    let [first, second] = [modes::open_shared(path), modes::open_shared(path)];
    let (first, second) = (first.at("open the lock", path)?, second.at("open the lock", path)?);
    match first.try_lock() {
        Ok(()) => {}
        // Another process runs this test at the same time, and its lock excludes this process.
        Err(TryLockError::WouldBlock) => return Ok(true),
        Err(TryLockError::Error(cause)) if has_no_locks(&cause) => return Ok(false),
        Err(TryLockError::Error(cause)) => return Err(cause).at("lock", path),
    }
    Ok(matches!(second.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Returns true if the error means that the filesystem does not support locks.
fn has_no_locks(cause: &io::Error) -> bool {
    matches!(errno(cause), Some(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS))
}
