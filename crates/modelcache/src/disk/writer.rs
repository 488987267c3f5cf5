//! The file being filled: written slice by slice, in any order, and hashed in the same pass.
//!
//! With a ladder each part is hashed from its own rung, alone. Without one the file is hashed in order: a slice that
//! arrives at the cursor is hashed while it is hot; one that arrives early is read back, from the page cache, when the
//! cursor gets there. There is no second pass over the whole file. Large files with a ladder are written past the page
//! cache (O_DIRECT) where the filesystem takes that.

use super::{fault, identity};
use crate::digest::{Digest, GitOid};
use crate::error::Result;
use crate::ladder::{Ladder, LadderHasher};
use crate::manifest::FileIdentity;
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What direct writes must be aligned to, in memory and in the file.
pub(crate) const ALIGNMENT: usize = 4096;
/// Files from this size on are written past the page cache, when they need not be read back.
const DIRECT_BYTES_MIN: u64 = 64 << 20;

/// A file in staging, open for writing.
#[derive(Debug)]
pub(crate) struct StagedWriter {
    path: PathBuf,
    size: u64,
    part_size: u64,
    buffered: File,
    direct: Option<File>,
    direct_failed: AtomicBool,
    /// How far the file is hashed in order; [`u64::MAX`] when a ladder checks each part.
    cursor: AtomicU64,
    order: Mutex<InOrder>,
}

struct InOrder {
    hasher: LadderHasher,
    git: Option<sha1::Sha1>,
    /// Parts that are written whole and not yet hashed.
    waiting: BTreeSet<u64>,
}

impl std::fmt::Debug for InOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InOrder").field("position", &self.hasher.position()).field("waiting", &self.waiting).finish()
    }
}

/// What an in-order pass computed.
#[derive(Debug, Clone)]
pub(crate) struct Hashed {
    pub(crate) sha256: Digest,
    pub(crate) git_oid: Option<GitOid>,
    pub(crate) ladder: Ladder,
}

impl StagedWriter {
    /// Makes the file with its full length allocated, so that a full disk is met now. `in_order`: hash it as it comes
    /// (`git`: with git's identity, too); else its parts are checked by a ladder.
    pub(crate) fn create(path: &Path, size: u64, part_size: u64, in_order: bool, git: bool) -> Result<Self> {
        let at = |operation, cause: io::Error| fault(operation, path, cause);
        // Always a new inode: a write of an abandoned attempt that is still under way must not land in this one.
        super::files::remove_file(path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let buffered = options.open(path).map_err(|cause| at("make", cause))?;
        allocate(&buffered, size).map_err(|cause| at("make room for", cause))?;
        let direct = (!in_order && size >= DIRECT_BYTES_MIN).then(|| open_direct(path)).flatten();
        let git = git.then(|| {
            use sha1::Digest as _;
            sha1::Sha1::new_with_prefix(format!("blob {size}\0"))
        });
        Ok(Self {
            path: path.to_owned(),
            size,
            part_size,
            buffered,
            direct,
            direct_failed: AtomicBool::new(false),
            cursor: AtomicU64::new(if in_order { 0 } else { u64::MAX }),
            order: Mutex::new(InOrder { hasher: LadderHasher::new(part_size), git, waiting: BTreeSet::new() }),
        })
    }

    /// Writes `slice` at `offset`, and hashes it if it is next in order. Direct writes need an aligned slice.
    pub(crate) fn write(&self, offset: u64, slice: &[u8]) -> Result<()> {
        self.write_bytes(offset, slice).map_err(|cause| fault("write", &self.path, cause))?;
        if self.cursor.load(Ordering::Acquire) == offset {
            let mut order = self.order();
            if order.hasher.position() == offset {
                order.take(slice);
                self.cursor.store(order.hasher.position(), Ordering::Release);
            }
        }
        Ok(())
    }

    fn write_bytes(&self, offset: u64, slice: &[u8]) -> io::Result<()> {
        let direct = self.direct.as_ref().filter(|_| !self.direct_failed.load(Ordering::Relaxed));
        let Some(direct) = direct.filter(|_| offset.is_multiple_of(ALIGNMENT as u64)) else {
            return self.buffered.write_all_at(slice, offset);
        };
        let whole_blocks = slice.len() / ALIGNMENT * ALIGNMENT;
        let (aligned, tail) = slice.split_at(whole_blocks);
        if let Err(error) = direct.write_all_at(aligned, offset) {
            if error.raw_os_error() != Some(Errno::INVAL.raw_os_error()) {
                return Err(error);
            }
            self.direct_failed.store(true, Ordering::Relaxed);
            self.buffered.write_all_at(aligned, offset)?;
        }
        self.buffered.write_all_at(tail, offset + whole_blocks as u64)
    }

    /// A part is written whole. In order: hashes all that is next, reading back what came early.
    pub(crate) fn part_done(&self, part: u64) -> Result<()> {
        if self.cursor.load(Ordering::Acquire) == u64::MAX {
            return Ok(());
        }
        let mut order = self.order();
        order.waiting.insert(part);
        let mut buffer = Vec::new();
        while let Some(position) = order.next_waiting(self.part_size, self.size) {
            let end = ((position / self.part_size + 1) * self.part_size).min(self.size);
            buffer.resize(usize::try_from((end - position).min(1 << 20)).unwrap_or(1 << 20), 0);
            let mut at = position;
            while at < end {
                let want = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
                self.buffered
                    .read_exact_at(&mut buffer[..want], at)
                    .map_err(|cause| fault("read back", &self.path, cause))?;
                order.take(&buffer[..want]);
                at += want as u64;
            }
            self.cursor.store(at, Ordering::Release);
        }
        Ok(())
    }

    /// The digests of a file that was hashed in order; all its parts are done.
    pub(crate) fn hashed(&self) -> Hashed {
        use sha1::Digest as _;
        let mut order = self.order();
        let hasher = std::mem::replace(&mut order.hasher, LadderHasher::new(self.part_size));
        let git_oid = order.git.take().map(|git| GitOid::from_bytes(git.finalize().into()));
        let (sha256, ladder) = hasher.finish();
        Hashed { sha256, git_oid, ladder }
    }

    /// Makes the bytes durable and the file read-only, closes it, and returns the identity under which it was checked.
    pub(crate) fn seal(self) -> Result<FileIdentity> {
        let path = self.path;
        self.buffered.sync_data().map_err(|cause| fault("make durable", &path, cause))?;
        drop((self.buffered, self.direct));
        fs::set_permissions(&path, Permissions::from_mode(0o444))
            .map_err(|cause| fault("make read-only", &path, cause))?;
        let metadata = fs::symlink_metadata(&path).map_err(|cause| fault("look at", &path, cause))?;
        Ok(identity(&metadata))
    }

    fn order(&self) -> MutexGuard<'_, InOrder> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InOrder {
    fn take(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        if let Some(git) = &mut self.git {
            use sha1::Digest as _;
            git.update(bytes);
        }
    }

    /// Where to go on, if the part at the cursor is written whole. Parts passed meanwhile are forgotten.
    fn next_waiting(&mut self, part_size: u64, size: u64) -> Option<u64> {
        let position = Some(self.hasher.position()).filter(|position| *position < size)?;
        let part = position / part_size;
        self.waiting = self.waiting.split_off(&part);
        self.waiting.contains(&part).then_some(position)
    }
}

/// Allocates the full length. Filesystems that cannot still get the length.
fn allocate(file: &File, size: u64) -> io::Result<()> {
    if size == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(size),
        Err(errno) => Err(errno.into()),
    }
}

fn open_direct(path: &Path) -> Option<File> {
    OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_in_any_order_hash_to_the_file(len in 0usize..9000, seed in any::<u64>()) {
            let content: Vec<u8> = (0..len).map(|at| (at as u64 ^ seed).wrapping_mul(0x9e37_79b9) as u8).collect();
            let folder = tempfile::tempdir().expect("folder");
            let writer = StagedWriter::create(&folder.path().join("f"), len as u64, 1024, true, true).expect("creates");
            let mut parts: Vec<usize> = (0..len.div_ceil(1024)).collect();
            parts.sort_by_key(|part| (*part as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            for part in parts {
                let bytes = &content[part * 1024..len.min((part + 1) * 1024)];
                let (first, second) = bytes.split_at(bytes.len() / 2);
                writer.write(part as u64 * 1024, first).expect("writes");
                writer.write((part * 1024 + first.len()) as u64, second).expect("writes");
                writer.part_done(part as u64).expect("hashes");
            }
            let hashed = writer.hashed();
            prop_assert_eq!(hashed.sha256, Digest::of(&content));
            prop_assert!(hashed.ladder.fits(len as u64));
            use sha1::Digest as _;
            let mut git = sha1::Sha1::new_with_prefix(format!("blob {len}\0"));
            git.update(&content);
            prop_assert_eq!(hashed.git_oid, Some(GitOid::from_bytes(git.finalize().into())));
            writer.seal().expect("seals");
            prop_assert_eq!(fs::read(folder.path().join("f")).expect("reads"), content);
        }
    }
}
