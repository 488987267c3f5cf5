//! Creates a second name for the bytes of a file: a hard link, otherwise a reflink, otherwise a copy.
//!
//! The kernel refuses hard links across mounts (also between bind mounts of one filesystem), to another user's
//! read-only file (`protected_hardlinks`), and beyond the filesystem's limit on links. A reflink or copy has an inode
//! of its own, whose bytes count separately against the budget.
//!
//! This module verifies no bytes. A reflink has the bytes of its source, and [`copy`] returns the digest of the copied
//! bytes.

use super::files;
use super::io_error::{IoContext, errno};
use super::optional;
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::Result;
use crate::ladder::{LadderHasher, part_size};
use crate::manifest::FileIdentity;
use rustix::io::Errno;
use serde::Serialize;
use std::fs::File;
use std::io::{self, Read, Write};

/// Buffer size for copying, in bytes.
const COPY_BYTES: usize = 1 << 20;

/// How a file was made from another one, and how it shares the bytes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// Another name of the same inode: takes no space, is read-only, needs the same filesystem.
    Hard,
    /// A separate inode that shares blocks until one of the files is changed. Needs a filesystem with reflinks.
    Reflink,
    /// A symbolic link into the cache, which an eviction breaks. Used only outside the cache, on request.
    Symlink,
    /// A separate file, verified while it is copied.
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

/// Creates a hard link to `from` at `to`, which must not exist. Returns false if the filesystem or the kernel refuses
/// it.
pub(crate) fn hard_link(from: &RootedPath, to: &RootedPath) -> io::Result<bool> {
    match from.hard_link(to) {
        Ok(()) => Ok(true),
        Err(error) if is_refusal(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns true if a link or rename is not possible between two paths: they are on different mounts, the file has
/// another owner or too many links, or the filesystem does not support it. Any other error is a failure.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::PERM | Errno::XDEV | Errno::MLINK | Errno::OPNOTSUPP | Errno::NOSYS))
}

/// Creates `to` as a reflink of `from`, and returns the identity of `to`. Returns `None` if the filesystem has no
/// reflinks, or if `from` no longer has the identity `known`.
pub(crate) fn reflink(from: &RootedPath, to: &RootedPath, known: FileIdentity) -> Result<Option<FileIdentity>> {
    let Ok(source) = from.open(false) else { return Ok(None) };
    let target = to.create_new(0o600).at("make", to)?;
    // Compare the identities after cloning: a change during the call would be in the clone.
    let cloned = rustix::fs::ioctl_ficlone(&target, &source).is_ok()
        && Metadata::of(&source).at("examine", from)?.identity() == known;
    if cloned { seal(target, to).map(Some) } else { files::remove_file(to).map(|()| None) }
}

/// Copies `from` to `to`, which must not exist. Returns the digest of the copied bytes, and the identity of `to`.
pub(crate) fn copy(from: &RootedPath, to: &RootedPath) -> Result<(Digest, FileIdentity)> {
    let mut source = from.open(false).at("open", from)?;
    let mut target = to.create_new(0o600).at("make", to)?;
    let mut hasher = LadderHasher::new(part_size(Metadata::of(&source).at("examine", from)?.len()));
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

/// Makes a new file read-only and durable, and returns its identity.
fn seal(file: File, path: &RootedPath) -> Result<FileIdentity> {
    optional::set_mode(&file, 0o444).at("make read-only", path)?;
    file.sync_all().at("make durable", path)?;
    Ok(Metadata::of(&file).at("examine", path)?.identity())
}
