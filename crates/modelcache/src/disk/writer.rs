//! The file being filled: written slice by slice, in any order, and hashed in the same pass.
//!
//! With a ladder each part is hashed from its own rung, alone. Without one the file is hashed in order: a slice that
//! arrives at the cursor is hashed while it is hot; one that arrives early is read back, from the page cache, when the
//! cursor gets there. There is no second pass over the whole file. Who writes decides whether that goes past the page
//! cache (O_DIRECT); a filesystem that does not take it is written to as usual.
//!
//! Surprise: nothing here hashes by itself. Whoever writes takes the [`Cursor`] where the slice is next, and reads back
//! what [came early](StagedWriter::next_to_catch_up), so that two files can be hashed side by side.

use super::io_error::fault;
use super::lock::FileLock;
use super::parts_journal::PartsJournal;
use super::rooted::{Metadata, RootedPath};
use crate::digest::{Digest, GitOid};
use crate::error::{Error, Result};
use crate::ladder::{Ladder, LadderHasher, PartHasher};
use crate::manifest::FileIdentity;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// What direct writes must be aligned to, in memory and in the file.
pub(crate) const ALIGNMENT: usize = 4096;
/// What is to be written, and how it will be checked.
#[derive(Debug, Clone)]
pub(crate) struct StagedFileSpec {
    /// Where it is staged.
    pub(crate) path: RootedPath,
    /// Bytes.
    pub(crate) size: u64,
    /// Bytes of a part.
    pub(crate) part_size: u64,
    /// Hash it as it comes; else its parts are checked by a ladder.
    pub(crate) in_order: bool,
    /// Compute git's identity, too.
    pub(crate) git: bool,
    /// Write past the page cache, where the filesystem takes that.
    pub(crate) direct: bool,
}

/// A file in staging, open for writing.
#[derive(Debug)]
pub(crate) struct StagedWriter {
    /// Nobody adopts the staging folder while a write may still be under way.
    _owner: Option<Arc<FileLock>>,
    parts: Option<PartsJournal>,
    path: RootedPath,
    size: u64,
    part_size: u64,
    buffered: File,
    /// Held while a slice is written through the page cache.
    turn: Mutex<()>,
    direct: Option<File>,
    direct_failed: AtomicBool,
    /// How far the file is hashed in order; [`u64::MAX`] when a ladder checks each part.
    cursor: AtomicU64,
    /// Held while bytes are hashed.
    order: Mutex<InOrder>,
    /// Never held for long: whoever completes a part does not wait for a hash.
    early: Mutex<OutOfOrderBlocks>,
}

struct InOrder {
    hasher: LadderHasher,
    git: Option<sha1::Sha1>,
}

/// What came before its turn.
#[derive(Debug, Default)]
struct OutOfOrderBlocks {
    /// Parts that are written whole and not yet hashed.
    parts: BTreeSet<u64>,
    catching_up: CatchUp,
}

/// Whether what came early is read back and hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum CatchUp {
    /// By nobody: the part at the cursor is not there yet.
    #[default]
    Nobody,
    /// By somebody who was told to, and has not begun.
    Told,
    /// It is at work.
    AtWork,
}

/// The place in a file that is hashed in order where the next bytes go. Nobody else hashes it meanwhile.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    order: MutexGuard<'a, InOrder>,
    position: &'a AtomicU64,
}

impl std::fmt::Debug for InOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InOrder").field("position", &self.hasher.position()).finish_non_exhaustive()
    }
}

/// What an in-order pass computed.
#[derive(Debug, Clone)]
pub(crate) struct Hashed {
    pub(crate) sha256: Digest,
    pub(crate) git_oid: Option<GitOid>,
    pub(crate) ladder: Ladder,
}

impl StagedFileSpec {
    fn parts(&self) -> u64 {
        self.size.div_ceil(self.part_size)
    }
}

impl StagedWriter {
    /// Makes the file with its full length allocated, so that a full disk is met now.
    pub(crate) fn create(draft: StagedFileSpec, owner: Option<Arc<FileLock>>) -> Result<Self> {
        let path = &draft.path;
        let at = |operation, cause: io::Error| fault(operation, path, cause);
        // Always a new inode: a write of an abandoned attempt that is still under way must not land in this one.
        super::files::remove_file(path)?;
        let parts = PartsJournal::create(path, draft.size, draft.part_size)?;
        let buffered = path.create_new(0o600).map_err(|cause| at("make", cause))?;
        allocate(&buffered, draft.size).map_err(|cause| at("make room for", cause))?;
        Ok(Self::over(draft, buffered, parts, owner))
    }

    /// Goes on with what an ended fill left at the same place, and the parts that are said to be there; `None` if it
    /// left nothing of use. Each of them must be [checked](Self::recheck) before it counts.
    pub(crate) fn resume(
        draft: &StagedFileSpec,
        owner: Option<Arc<FileLock>>,
    ) -> Result<Option<(Self, BTreeSet<u64>)>> {
        let Some(metadata) = super::files::stat(&draft.path)? else { return Ok(None) };
        if !metadata.is_file() || metadata.len() != draft.size || metadata.nlink() != 1 {
            return Ok(None);
        }
        // Read-only: it was complete and proven when its fill ended.
        let sealed = metadata.mode() & 0o222 == 0;
        let journal = match sealed {
            true => PartsJournal::of_sealed(&draft.path, draft.size, draft.part_size)?,
            false => PartsJournal::resume(&draft.path, draft.size, draft.part_size),
        };
        let (journal, parts) = match journal {
            Some((_, parts)) if parts.is_empty() => return Ok(None),
            Some((journal, parts)) => (Some(journal), parts),
            None if sealed => (None, (0..draft.parts()).collect()),
            None => return Ok(None),
        };
        let open = || {
            let sealed = draft.path.open(false)?;
            let found = Metadata::of(&sealed)?;
            // Not a link that another user just made of a file elsewhere.
            if found.ino() != metadata.ino() || found.nlink() != 1 {
                return Err(io::Error::from(Errno::STALE));
            }
            sealed.set_permissions(Permissions::from_mode(0o600))?;
            let writable = draft.path.open(true)?;
            let same = found.ino() == Metadata::of(&writable)?.ino();
            if same { Ok(writable) } else { Err(io::Error::from(Errno::STALE)) }
        };
        let Ok(buffered) = open() else { return Ok(None) };
        Ok(Some((Self::over(draft.clone(), buffered, journal, owner), parts)))
    }

    fn over(draft: StagedFileSpec, buffered: File, parts: Option<PartsJournal>, owner: Option<Arc<FileLock>>) -> Self {
        let StagedFileSpec { path, size, part_size, in_order, git, direct } = draft;
        // Opened by its name: it counts only if that is still the same file.
        let inode = |file: &File| Metadata::of(file).map(|found| found.device_and_inode()).ok();
        let direct = direct.then(|| path.open_direct().ok()).flatten();
        let direct = direct.filter(|direct| inode(direct).is_some_and(|found| Some(found) == inode(&buffered)));
        Self {
            _owner: owner,
            parts,
            path,
            size,
            part_size,
            buffered,
            turn: Mutex::default(),
            direct,
            direct_failed: AtomicBool::new(false),
            cursor: AtomicU64::new(if in_order { 0 } else { u64::MAX }),
            order: Mutex::new(InOrder::new(size, part_size, git)),
            early: Mutex::default(),
        }
    }

    /// Removes the file staged at `path`, whose bytes are wrong, so that nobody goes on with it.
    pub(crate) fn forget(path: &RootedPath) -> Result<()> {
        super::files::remove_file(path)?;
        super::files::remove_file(&super::parts_journal::journal_of(path))
    }

    /// Reads back what was written at `offset`.
    pub(crate) fn load(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.buffered.read_exact_at(into, offset).map_err(|cause| fault("read back", &self.path, cause))
    }

    /// Writes `slice` at `offset`. Direct writes need an aligned slice.
    pub(crate) fn store(&self, offset: u64, slice: &[u8]) -> Result<()> {
        self.write_bytes(offset, slice).map_err(|cause| fault("write", &self.path, cause))
    }

    /// Writes `slice` at `offset`, and hashes it if it is next in order.
    pub(crate) fn write(&self, offset: u64, slice: &[u8]) -> Result<()> {
        self.store(offset, slice)?;
        if let Some(mut cursor) = self.at_cursor(offset) {
            cursor.update(slice);
            cursor.advance(slice);
        }
        Ok(())
    }

    /// The same for a file that is written from its beginning to its end: `beside` takes the slice in the same pass.
    pub(crate) fn append(&self, offset: u64, slice: &[u8], beside: &mut PartHasher) -> Result<()> {
        self.store(offset, slice)?;
        let mut order = self.order();
        order.hasher.update_beside(slice, beside);
        self.cursor.store(order.hasher.position(), Ordering::Release);
        Ok(())
    }

    /// Whether the bytes at `offset` are the next to be hashed in order.
    pub(crate) fn is_next(&self, offset: u64) -> bool {
        self.cursor.load(Ordering::Acquire) == offset
    }

    /// How far the file is hashed in order; [`u64::MAX`] when a ladder checks each part.
    pub(crate) fn hashed_bytes(&self) -> u64 {
        self.cursor.load(Ordering::Acquire)
    }

    /// The cursor, if it is at `offset` and nobody else is at work there.
    pub(crate) fn at_cursor(&self, offset: u64) -> Option<Cursor<'_>> {
        if !self.is_next(offset) {
            return None;
        }
        let order = match self.order.try_lock() {
            Ok(order) => order,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        (order.hasher.position() == offset).then_some(Cursor { order, position: &self.cursor })
    }

    fn write_bytes(&self, offset: u64, slice: &[u8]) -> io::Result<()> {
        let direct = self.direct.as_ref().filter(|_| !self.direct_failed.load(Ordering::Relaxed));
        let Some(direct) = direct.filter(|_| offset.is_multiple_of(ALIGNMENT as u64)) else {
            return self.write_buffered(offset, slice);
        };
        let whole_blocks = slice.len() / ALIGNMENT * ALIGNMENT;
        let (aligned, tail) = slice.split_at(whole_blocks);
        if let Err(error) = direct.write_all_at(aligned, offset) {
            if error.raw_os_error() != Some(Errno::INVAL.raw_os_error()) {
                return Err(error);
            }
            self.direct_failed.store(true, Ordering::Relaxed);
            self.write_buffered(offset, aligned)?;
        }
        self.write_buffered(offset + whole_blocks as u64, tail)
    }

    /// One at a time: the kernel lets no two write into a file's pages at once, and burns a core while the second waits.
    fn write_buffered(&self, offset: u64, slice: &[u8]) -> io::Result<()> {
        if slice.is_empty() {
            return Ok(());
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.buffered.write_all_at(slice, offset)
    }

    /// A part is written whole, and checked if a ladder can: the journal says so. Whether the caller shall now
    /// [catch up](Self::next_to_catch_up); until that ends, nobody else is told to.
    pub(crate) fn part_done(&self, part: u64) -> Result<bool> {
        if let Some(parts) = &self.parts {
            parts.mark(part)?;
        }
        if self.hashed_bytes() == u64::MAX {
            return Ok(false);
        }
        let mut early = self.early();
        early.parts.insert(part);
        if early.catching_up != CatchUp::Nobody || self.next_early(&mut early).is_none() {
            return Ok(false);
        }
        early.catching_up = CatchUp::Told;
        Ok(true)
    }

    /// For whoever was told to catch up: what is to be read back and hashed next, within one part. `None` is the end of
    /// it: then the next part that comes to the cursor tells somebody anew.
    pub(crate) fn next_to_catch_up(&self) -> Option<Range<u64>> {
        let mut early = self.early();
        let next = self.next_early(&mut early);
        early.catching_up = if next.is_some() { CatchUp::AtWork } else { CatchUp::Nobody };
        let position = next?;
        Some(position..((position / self.part_size + 1) * self.part_size).min(self.size))
    }

    /// How many parts are written whole and wait for a hash that is at work on them; none where it waits for a part, or
    /// for whoever was told to go on with it.
    pub(crate) fn parts_behind(&self) -> usize {
        let mut early = self.early();
        self.next_early(&mut early);
        if early.catching_up == CatchUp::AtWork { early.parts.len() } else { 0 }
    }

    /// Where to go on, if the part at the cursor is written whole. Parts passed meanwhile are forgotten.
    fn next_early(&self, early: &mut OutOfOrderBlocks) -> Option<u64> {
        let position = self.hashed_bytes();
        if position >= self.size {
            early.parts.clear();
            return None;
        }
        let part = position / self.part_size;
        early.parts = early.parts.split_off(&part);
        early.parts.contains(&part).then_some(position)
    }

    /// Forgets what was hashed in order: the file is written from its beginning once more. Nothing is under way in it.
    pub(crate) fn rewind(&self) {
        if self.hashed_bytes() != u64::MAX {
            let mut order = self.order();
            *order = InOrder::new(self.size, self.part_size, order.git.is_some());
            *self.early() = OutOfOrderBlocks::default();
            self.cursor.store(0, Ordering::Release);
        }
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

    /// Makes the file read-only, closes it, and returns the identity under which it was checked. It becomes durable once
    /// it is published.
    pub(crate) fn seal(self) -> Result<FileIdentity> {
        let path = self.path;
        self.buffered
            .set_permissions(Permissions::from_mode(0o444))
            .map_err(|cause| fault("make read-only", &path, cause))?;
        let written = Metadata::of(&self.buffered).map_err(|cause| fault("look at", &path, cause))?;
        drop((self.buffered, self.direct, self.parts));
        // Read-only says as much as the journal did.
        super::files::remove_file(&super::parts_journal::journal_of(&path))?;
        let metadata = path.metadata().map_err(|cause| fault("look at", &path, cause))?;
        match metadata.identity() == written.identity() {
            true => Ok(metadata.identity()),
            false => Err(Error::corrupt(format!("{path} was replaced while it was being filled"))),
        }
    }

    fn order(&self) -> MutexGuard<'_, InOrder> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn early(&self) -> MutexGuard<'_, OutOfOrderBlocks> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cursor<'_> {
    /// The hasher for the next `len` bytes, if they all belong to one part.
    pub(crate) fn hasher(&mut self, len: usize) -> Option<&mut PartHasher> {
        self.order.hasher.within_part(len)
    }

    /// Hashes the next bytes, whatever parts they belong to.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.order.hasher.update(bytes);
    }

    /// The bytes were hashed: the cursor stands after them.
    pub(crate) fn advance(mut self, bytes: &[u8]) {
        if let Some(git) = &mut self.order.git {
            use sha1::Digest as _;
            git.update(bytes);
        }
        self.position.store(self.order.hasher.position(), Ordering::Release);
    }
}

impl InOrder {
    /// At the beginning of a file of `size` bytes.
    fn new(size: u64, part_size: u64, git: bool) -> Self {
        let git = git.then(|| {
            use sha1::Digest as _;
            sha1::Sha1::new_with_prefix(format!("blob {size}\0"))
        });
        Self { hasher: LadderHasher::new(part_size), git }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_in_any_order_hash_to_the_file(len in 0usize..9000, seed in any::<u64>()) {
            let content: Vec<u8> = (0..len).map(|at| (at as u64 ^ seed).wrapping_mul(0x9e37_79b9) as u8).collect();
            let folder = tempfile::tempdir().expect("folder");
            let path = RootedPath::root(folder.path()).join("f");
            let draft = StagedFileSpec { path, size: len as u64, part_size: 1024, in_order: true, git: true, direct: false };
            let writer = StagedWriter::create(draft, None).expect("creates");
            let mut parts: Vec<usize> = (0..len.div_ceil(1024)).collect();
            parts.sort_by_key(|part| (*part as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            for part in parts {
                let bytes = &content[part * 1024..len.min((part + 1) * 1024)];
                let (first, second) = bytes.split_at(bytes.len() / 2);
                writer.write(part as u64 * 1024, first).expect("writes");
                writer.write((part * 1024 + first.len()) as u64, second).expect("writes");
                if writer.part_done(part as u64).expect("marks") {
                    while let Some(range) = writer.next_to_catch_up() {
                        let mut bytes = vec![0; (range.end - range.start) as usize];
                        writer.load(range.start, &mut bytes).expect("reads back");
                        let mut cursor = writer.at_cursor(range.start).expect("nobody else is there");
                        cursor.update(&bytes);
                        cursor.advance(&bytes);
                    }
                }
            }
            let hashed = writer.hashed();
            prop_assert_eq!(hashed.sha256, Digest::of(&content));
            prop_assert!(hashed.ladder.fits(len as u64));
            use sha1::Digest as _;
            let mut git = sha1::Sha1::new_with_prefix(format!("blob {len}\0"));
            git.update(&content);
            prop_assert_eq!(hashed.git_oid, Some(GitOid::from_bytes(git.finalize().into())));
            writer.seal().expect("seals");
            prop_assert_eq!(std::fs::read(folder.path().join("f")).expect("reads"), content);
        }
    }
    #[test]
    fn what_is_written_past_the_page_cache_is_what_was_given() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("folder");
        let path = RootedPath::root(folder.path()).join("f");
        let content: Vec<u8> = (0..3 * ALIGNMENT + 77).map(|at| (at % 251) as u8).collect();
        let size = content.len() as u64;
        let draft =
            StagedFileSpec { path: path.clone(), size, part_size: 1 << 20, in_order: false, git: false, direct: true };
        let writer = StagedWriter::create(draft, None).expect("creates");
        assert_eq!(writer.direct.is_some(), path.open_direct().is_ok(), "where the filesystem takes it");
        // An address that no direct write takes: it falls back.
        for skew in [0, 1] {
            let mut memory = vec![0; content.len() + 2 * ALIGNMENT];
            let start = memory.as_ptr().align_offset(ALIGNMENT) + skew;
            memory[start..start + content.len()].copy_from_slice(&content);
            writer.store(0, &memory[start..start + content.len()]).expect("writes");
            let mut back = vec![0; content.len()];
            writer.load(0, &mut back).expect("reads back");
            assert_eq!(back, content);
        }
        writer.seal().expect("seals");
        assert_eq!(std::fs::read(path.full()).expect("reads"), content);
    }
}
