//! The same bytes under another name: a hard link where that may be, else a reflink, else a copy.
//!
//! Hard links are refused across mounts (also bind mounts of one filesystem), for another user's read-only file
//! (`protected_hardlinks`), and beyond the filesystem's number of links. Then a file has bytes of its own, which count
//! by themselves. Nothing here decides whether bytes are right: a clone is as right as what it was made from, and
//! [`copy`] tells what it copied.

use super::files;
use super::io_error::{IoContext, errno};
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::Result;
use crate::ladder::{LadderHasher, part_size};
use crate::manifest::FileIdentity;
use rustix::io::Errno;
use serde::Serialize;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;

/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// How a file came to its place: how it shares its bytes with the one it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// The same file under another name: no bytes, read-only, same filesystem.
    Hard,
    /// A file of its own that shares blocks until one is changed, where the filesystem can.
    Reflink,
    /// A pointer into the cache, which an eviction breaks. Only in folders outside the cache, on request.
    Symlink,
    /// A file of its own, checked while it is copied.
    Copy,
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Hard => "hard link",
            Self::Reflink => "reflink",
            Self::Symlink => "symlink",
            Self::Copy => "copy",
        })
    }
}

/// Links `from` as `to`, which must not be there; `false` where the filesystem or the kernel refuses that link.
pub(crate) fn hard_link(from: &RootedPath, to: &RootedPath) -> io::Result<bool> {
    match from.hard_link(to) {
        Ok(()) => Ok(true),
        Err(error) if is_refusal(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a link or rename failed because these two places do not go together, not because something is wrong.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::PERM | Errno::XDEV | Errno::MLINK | Errno::OPNOTSUPP | Errno::NOSYS))
}

/// Makes `to` a reflink of `from` while `from` is the file `known`; the new file's identity, or `None` where that cannot
/// be done.
pub(crate) fn reflink(from: &RootedPath, to: &RootedPath, known: FileIdentity) -> Result<Option<FileIdentity>> {
    let Ok(source) = from.open(false) else { return Ok(None) };
    let target = to.create_new(0o600).at("make", to)?;
    let cloned = rustix::fs::ioctl_ficlone(&target, &source).is_ok()
        && Metadata::of(&source).at("look at", from)?.identity() == known;
    if cloned { seal(target, to).map(Some) } else { files::remove_file(to).map(|()| None) }
}

/// Copies `from` to `to`, which must not be there; what was copied, and the new file's identity.
pub(crate) fn copy(from: &RootedPath, to: &RootedPath) -> Result<(Digest, FileIdentity)> {
    let mut source = from.open(false).at("open", from)?;
    let mut target = to.create_new(0o600).at("make", to)?;
    let mut hasher = LadderHasher::new(part_size(Metadata::of(&source).at("look at", from)?.len()));
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let read = source.read(&mut buffer).at("read", from)?;
        if read == 0 {
            return Ok((hasher.finish().0, seal(target, to)?));
        }
        hasher.update(&buffer[..read]);
        target.write_all(&buffer[..read]).at("write", to)?;
    }
}

fn seal(file: File, path: &RootedPath) -> Result<FileIdentity> {
    file.set_permissions(Permissions::from_mode(0o444)).at("make read-only", path)?;
    file.sync_all().at("make durable", path)?;
    Ok(Metadata::of(&file).at("look at", path)?.identity())
}
