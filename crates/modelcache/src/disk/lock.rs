//! Locks between processes: `flock` on files that are never unlinked.
//!
//! Nobody blocks in `flock`: a lock is tried, and whoever must wait sleeps and tries again. A guard unlocks explicitly
//! before it closes, so that a forked child that still has the descriptor does not keep the lock. The order in which
//! locks may be taken: fill, owner, shared lease, check, budget, then (one try) exclusive lease or owner. Whoever brings
//! an artifact to the remote holds its backfill lock before any of them.
//!
//! Some filesystems grant every lock or refuse all. [`are_honest`] finds out; where every lock is refused, a lock counts
//! as gained, and whoever relies on exclusion asks the directory whether its locks are honest.

use super::files;
use super::io_error::{IoContext, errno};
use super::modes;
use super::rooted::{Metadata, RootedPath};
use crate::error::Result;
use rustix::io::Errno;
use std::fs::{File, TryLockError};
use std::io;

/// A held lock; falls with the value.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

impl FileLock {
    /// Tries to hold `path` alone; `None` while somebody else holds it.
    pub(crate) fn try_exclusive(path: &RootedPath) -> Result<Option<Self>> {
        let file = modes::open_shared(path).at("open the lock", path)?;
        Self::locked(file.try_lock(), file).at("lock", path)
    }

    /// Tries to share `path`; `None` while somebody holds it alone. On a read-only directory an existing lock file is
    /// enough, and where there is none the error says so.
    pub(crate) fn try_shared(path: &RootedPath) -> Result<Option<Self>> {
        let file = match modes::open_shared(path) {
            Ok(file) => file,
            Err(denied) => path.open(false).map_err(|_| denied).at("open the lock", path)?,
        };
        Self::try_shared_of(file, path)
    }

    /// The same for a lock file that is open already.
    pub(crate) fn try_shared_of(file: File, path: &RootedPath) -> Result<Option<Self>> {
        Self::locked(file.try_lock_shared(), file).at("lock", path)
    }

    /// Tries to hold the existing file `path` alone; the outer `None` if there is none, or no longer once it is held:
    /// whoever removes a locked file does so under its lock. It is never made: a journal that its owner is just removing
    /// must not come back.
    pub(crate) fn try_existing(path: &RootedPath) -> Result<Option<Option<Self>>> {
        // The kernel locks what can only be read, too, on local filesystems: another user's temporary file.
        let open = || path.open(true).or_else(|_| path.open(false));
        let opened = files::absent(open()).at("open the lock", path)?;
        let Some(file) = opened else { return Ok(None) };
        let Some(held) = Self::locked(file.try_lock(), file).at("lock", path)? else { return Ok(Some(None)) };
        let locked = Metadata::of(&held.file).at("look at", path)?.ino();
        let is_there = files::stat(path)?.is_some_and(|there| there.ino() == locked);
        Ok(is_there.then_some(Some(held)))
    }

    /// Takes the lock of a file that this process has just made.
    pub(crate) fn of_new(file: File, path: &RootedPath) -> Result<Option<Self>> {
        Self::locked(file.try_lock(), file).at("lock", path)
    }

    /// Takes the lock of a temporary file that this process has just made; nobody else locks an empty one.
    pub(crate) fn of_temporary(file: File) -> io::Result<Self> {
        Self::locked(file.try_lock(), file)?.ok_or_else(|| Errno::WOULDBLOCK.into())
    }

    fn locked(outcome: Result<(), TryLockError>, file: File) -> io::Result<Option<Self>> {
        match outcome {
            Ok(()) => Ok(Some(Self { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(cause)) if has_no_locks(&cause) => Ok(Some(Self { file })),
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

/// Whether locks exclude on the filesystem of `path`, a file of its own: while one open holds it, a second must not get
/// it. Somebody else who holds it at this moment is proof enough.
pub(crate) fn are_honest(path: &RootedPath) -> Result<bool> {
    let [first, second] = [modes::open_shared(path), modes::open_shared(path)];
    let (first, second) = (first.at("open the lock", path)?, second.at("open the lock", path)?);
    match first.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(true),
        Err(TryLockError::Error(cause)) if has_no_locks(&cause) => return Ok(false),
        Err(TryLockError::Error(cause)) => return Err(cause).at("lock", path),
    }
    Ok(matches!(second.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Whether the filesystem has no locks at all.
fn has_no_locks(cause: &io::Error) -> bool {
    matches!(errno(cause), Some(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS))
}
