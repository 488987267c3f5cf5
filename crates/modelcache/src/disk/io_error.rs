//! What an input/output error in the local directory means to a caller.

use super::rooted::RootedPath;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Tier};
use rustix::io::Errno;
use std::io;
use std::path::{Path, PathBuf};

/// The system's number of an error, where it has one.
pub(super) fn errno(cause: &io::Error) -> Option<Errno> {
    cause.raw_os_error().map(Errno::from_raw_os_error)
}

/// The remedy where something else lies in the place of a file of the cache.
const MISPLACED: &str =
    "`modelcache doctor` names what does not belong in the directory, and `modelcache prune` moves it to quarantine/";

/// Translates an error of `operation` on `path` (once, here): no room, directory not usable, or the machine's trouble.
pub(crate) fn fault(operation: &str, path: &(impl Shown + ?Sized), cause: io::Error) -> Error {
    let (kind, hint) = match errno(&cause) {
        Some(Errno::NOSPC) => {
            (ErrorKind::Full, "free space or inodes on this filesystem, or point MODEL_CACHE_DIR to a larger one")
        }
        Some(Errno::DQUOT) => (ErrorKind::Full, "the user's disk quota is used up"),
        Some(Errno::FBIG) => (ErrorKind::Full, FILE_SIZE_HINT),
        Some(Errno::ROFS) => (
            ErrorKind::Directory,
            "the filesystem is mounted read-only: mount it writable, or point MODEL_CACHE_DIR elsewhere",
        ),
        Some(Errno::ACCESS | Errno::PERM) => {
            (ErrorKind::Directory, "give this user write access to the directory, or point MODEL_CACHE_DIR elsewhere")
        }
        Some(Errno::EXIST | Errno::NOTDIR) => {
            (ErrorKind::Directory, "what lies there is no folder: move it away, or point MODEL_CACHE_DIR elsewhere")
        }
        Some(Errno::MFILE | Errno::NFILE) => (ErrorKind::Other, "too many open files: raise the limit (ulimit -n)"),
        Some(Errno::LOOP | Errno::ISDIR) => (ErrorKind::Directory, MISPLACED),
        None if cause.kind() == io::ErrorKind::InvalidInput => (ErrorKind::Directory, MISPLACED),
        Some(Errno::IO) => (ErrorKind::Directory, "the disk reports an error: see the kernel's log"),
        _ => (ErrorKind::Directory, "see whether the directory and its filesystem are in order"),
    };
    Error::new(kind, format!("cannot {operation} {}", path.shown())).tier(Tier::Disk).hint(hint).cause(cause)
}

/// A path that can be shown in a message.
pub(crate) trait Shown {
    /// The whole path, as the caller named its beginning.
    fn shown(&self) -> String;
}

impl Shown for Path {
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

impl Shown for PathBuf {
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

impl Shown for RootedPath {
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl<T: Shown + ?Sized> Shown for &T {
    fn shown(&self) -> String {
        (**self).shown()
    }
}

/// Adds operation and path to an [`io::Result`].
pub(crate) trait IoContext<T> {
    /// Translates the error of `operation` on `path`.
    fn at(self, operation: &str, path: &(impl Shown + ?Sized)) -> crate::Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, operation: &str, path: &(impl Shown + ?Sized)) -> crate::Result<T> {
        self.map_err(|cause| fault(operation, path, cause))
    }
}

impl<T> IoContext<T> for Result<T, Errno> {
    fn at(self, operation: &str, path: &(impl Shown + ?Sized)) -> crate::Result<T> {
        self.map_err(|cause| fault(operation, path, cause.into()))
    }
}
