//! Calls that some filesystems refuse, and without which the cache still works: setting modes and times, and syncing a
//! folder.
//!
//! A refusal does not fail the operation: it is logged once per process, and `modelcache doctor` names it.

use super::rooted::{NOW, RootedPath};
use rustix::io::Errno;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

/// A kind of call that a filesystem may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OptionalCall {
    SetMode,
    SetTime,
    SyncFolder,
}

impl OptionalCall {
    /// Says what the filesystem refuses, and what follows from it.
    pub(crate) fn refusal(self) -> &'static str {
        match self {
            Self::SetMode => {
                "this filesystem does not let modes be set: cached files are not read-only, and may be modified by \
                 accident"
            }
            Self::SetTime => {
                "this filesystem does not let times be set: artifacts are evicted in the order in which they were \
                 published, not in the order of last use"
            }
            Self::SyncFolder => {
                "this filesystem does not let folders be synced: a power cut may lose files that were reported as \
                 stored, and they are downloaded again"
            }
        }
    }

    /// Converts a refusal by the filesystem to success, and logs the first one. Any other error is returned.
    pub(crate) fn accept_refusal(self, outcome: io::Result<()>) -> io::Result<()> {
        static LOGGED: [AtomicBool; 3] = [const { AtomicBool::new(false) }; 3];
        match outcome {
            Err(cause) if self.is_refusal(&cause) => {
                if !LOGGED[self as usize].swap(true, Ordering::Relaxed) {
                    tracing::warn!(%cause, "{}", self.refusal());
                }
                Ok(())
            }
            outcome => outcome,
        }
    }

    fn is_refusal(self, cause: &io::Error) -> bool {
        let errno = cause.raw_os_error().map(Errno::from_raw_os_error);
        match self {
            Self::SetMode | Self::SetTime => {
                matches!(errno, Some(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL))
            }
            // Permission errors are not in this list: they mean that this user may not open the folder, not that the
            // filesystem refuses to sync it.
            Self::SyncFolder => matches!(errno, Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)),
        }
    }

    /// Tries the call on `file`, which is in `folder`. Returns the error of a refusal.
    pub(crate) fn try_out(self, file: &RootedPath, folder: &RootedPath) -> Option<io::Error> {
        let tried = match self {
            Self::SetMode => file.open(false).and_then(|file| file.set_permissions(Permissions::from_mode(0o444))),
            Self::SetTime => file.open(false).and_then(|file| Ok(rustix::fs::futimens(&file, &NOW)?)),
            Self::SyncFolder => folder.open_dir().and_then(|dir| dir.sync_all()),
        };
        tried.err().filter(|cause| self.is_refusal(cause))
    }
}

/// Sets the permissions of a file of this user.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    OptionalCall::SetMode.accept_refusal(file.set_permissions(Permissions::from_mode(mode)))
}

/// Syncs an open folder.
pub(crate) fn sync_folder(folder: &File) -> io::Result<()> {
    OptionalCall::SyncFolder.accept_refusal(folder.sync_all())
}
