//! Locks between processes: `flock` on files that are never unlinked.
//!
//! Nobody blocks in `flock`: a lock is tried, and whoever must wait sleeps and tries again. A guard unlocks explicitly
//! before it closes, so that a forked child that still has the descriptor does not keep the lock. The order in which
//! locks may be taken: fill, owner, shared lease, budget, then (one try) exclusive lease or owner.

use super::fault::At;
use super::files::absent;
use crate::error::Result;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

/// A held lock; falls with the value.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

impl FileLock {
    /// Tries to hold `path` alone; `None` while somebody else holds it.
    pub(crate) fn try_exclusive(path: &Path) -> Result<Option<Self>> {
        let file = open_for_writing(path).at("open the lock", path)?;
        Self::locked(file.try_lock(), file).at("lock", path)
    }

    /// Tries to hold the existing file `path` alone; the outer `None` if there is none. It is never made: a journal that
    /// its owner is just removing must not come back.
    pub(crate) fn try_existing(path: &Path) -> Result<Option<Option<Self>>> {
        let opened = absent(OpenOptions::new().read(true).write(true).open(path)).at("open the lock", path)?;
        opened.map(|file| Self::locked(file.try_lock(), file).at("lock", path)).transpose()
    }

    /// Tries to share `path`; `None` while somebody holds it alone. On a read-only directory an existing lock file is
    /// enough, and where there is none the error says so.
    pub(crate) fn try_shared(path: &Path) -> Result<Option<Self>> {
        let file = match open_for_writing(path) {
            Ok(file) => file,
            Err(denied) => File::open(path).map_err(|_| denied).at("open the lock", path)?,
        };
        Self::locked(file.try_lock_shared(), file).at("lock", path)
    }

    /// Takes the lock of a file that this process has just made.
    pub(crate) fn of_new(file: File, path: &Path) -> Result<Option<Self>> {
        Self::locked(file.try_lock(), file).at("lock", path)
    }

    fn locked(outcome: Result<(), TryLockError>, file: File) -> io::Result<Option<Self>> {
        match outcome {
            Ok(()) => Ok(Some(Self { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(cause)) => Err(cause),
        }
    }

    /// The locked file itself, whose content belongs to the holder.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

fn open_for_writing(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}
