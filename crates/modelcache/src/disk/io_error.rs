//! Translation of I/O errors in the local directory to error kinds with a remedy.

use super::rooted::RootedPath;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Tier};
use crate::option_name::setting::DIR;
use rustix::io::Errno;
use std::io;
use std::path::{Path, PathBuf};

/// Returns the error number of the operating system, if `cause` has one.
pub(super) fn errno(cause: &io::Error) -> Option<Errno> {
    cause.raw_os_error().map(Errno::from_raw_os_error)
}

/// Hint shown if an entry of the wrong type is at the path of a file of the cache.
const MISPLACED: &str =
    "`modelcache doctor` lists entries that do not belong there, and `modelcache prune` moves them to quarantine/";

/// Returns the error for `cause`, an I/O error of `operation` on `path`.
///
/// Its kind is [`ErrorKind::Full`] if space, quota or the maximum file size is exhausted, [`ErrorKind::Limits`] if too
/// many files are open, and [`ErrorKind::Directory`] otherwise.
pub(crate) fn fault(operation: &str, path: &(impl Shown + ?Sized), cause: io::Error) -> Error {
    let (kind, hint) = match errno(&cause) {
        Some(Errno::NOSPC) => {
            (ErrorKind::Full, format!("free space or inodes on this filesystem, or point {DIR} to a larger one"))
        }
        Some(Errno::DQUOT) => (ErrorKind::Full, "the user's disk quota is used up".into()),
        Some(Errno::FBIG) => (ErrorKind::Full, FILE_SIZE_HINT.into()),
        Some(Errno::ROFS) => (
            ErrorKind::Directory,
            format!("the filesystem is mounted read-only: mount it writable, or point {DIR} elsewhere"),
        ),
        Some(Errno::ACCESS | Errno::PERM) => {
            (ErrorKind::Directory, format!("give this user write access to the directory, or point {DIR} elsewhere"))
        }
        Some(Errno::EXIST | Errno::NOTDIR) => (
            ErrorKind::Directory,
            format!("the path exists and is not a folder: move it away, or point {DIR} elsewhere"),
        ),
        Some(Errno::MFILE | Errno::NFILE) => {
            (ErrorKind::Limits, "too many open files: raise the limit (ulimit -n)".into())
        }
        Some(Errno::LOOP | Errno::ISDIR) => (ErrorKind::Directory, MISPLACED.into()),
        // `RootedPath::open` refuses an entry that is not a regular file or has a second link, by an error without a
        // number.
        None if cause.kind() == io::ErrorKind::InvalidInput => (ErrorKind::Directory, MISPLACED.into()),
        Some(Errno::IO) => (ErrorKind::Directory, "the disk reported an error: see the kernel log".into()),
        _ => (ErrorKind::Directory, "check the directory and its filesystem".into()),
    };
    Error::new(kind, format!("cannot {operation} {}", path.shown())).tier(Tier::Disk).hint(hint).cause(cause)
}

/// Returns true if this user cannot read or remove an entry, because another user set its permissions, or because it is
/// nested too deeply. In a shared directory, any user can create such entries.
pub(crate) fn is_inaccessible(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(cause) = error.downcast_ref::<io::Error>() {
            return matches!(cause.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidFilename);
        }
        next = error.source();
    }
    false
}

/// A path that can be shown in a message.
pub(crate) trait Shown {
    /// Returns the whole path. The root is shown as the caller wrote it.
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

/// Adds the operation and the path to the error of an I/O result.
pub(crate) trait IoContext<T> {
    /// Converts the error with [`fault`].
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
