//! Writer of a staged file: slices are written in any order, and hashed without a second pass over the file.
//!
//! With a ladder, each part is hashed alone, from its checkpoint. Without a ladder, the file is hashed in order. A
//! slice at the position of the [`Cursor`] is hashed when it arrives. A slice that arrives too early is read back from
//! the page cache when the cursor has reached it.
//!
//! The caller does the hashing, so that it can hash two files side by side: it takes the cursor if its slice is next,
//! and reads back the [out-of-order parts](StagedWriter::next_to_catch_up).

use super::io_error::fault;
use super::lock::FileLock;
use super::optional;
use super::parts_journal::PartsJournal;
use super::rooted::{Metadata, RootedPath};
use crate::digest::{Digest, GitOid};
use crate::error::{Error, ErrorKind, Result};
use crate::ladder::{Ladder, LadderHasher, PartHasher};
use crate::manifest::FileIdentity;
use crate::mutex::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, retry_on_intr};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};

/// Maximum size in bytes of a file that is written [as a whole](StagedWriter::whole). The smallest buffer has this size,
/// so that such a file always arrives as one slice.
pub(crate) const WHOLE_BYTES_MAX: u64 = 64 << 10;
/// Alignment in bytes of direct writes, in memory and in the file.
pub(crate) const ALIGNMENT: usize = 4096;

/// The file to write, and how it is verified.
#[derive(Debug, Clone)]
pub(crate) struct StagedFileSpec {
    /// The path of the staged file.
    pub(crate) path: RootedPath,
    /// Size of the file in bytes.
    pub(crate) size: u64,
    /// Size of a part in bytes.
    pub(crate) part_size: u64,
    /// True if the file is hashed in order; false if its parts are verified by a ladder.
    pub(crate) in_order: bool,
    /// True if the git object id is computed as well.
    pub(crate) git: bool,
    /// True if it is written with O_DIRECT, which bypasses the page cache, on filesystems that support it.
    pub(crate) direct: bool,
}

/// A staged file that is open for writing.
#[derive(Debug)]
pub(crate) struct StagedWriter {
    /// The lock of the staging folder, so that no other fill adopts the folder while a write may be running.
    _owner: Option<Arc<FileLock>>,
    /// The journal of written parts; `None` for a file of one part.
    parts: Option<PartsJournal>,
    path: RootedPath,
    size: u64,
    part_size: u64,
    /// The file, opened for reads and writes through the page cache; `None` if it is written as a whole.
    buffered: Option<File>,
    /// The identity of a file that was written as a whole.
    written: OnceLock<FileIdentity>,
    /// Locked while a slice is written through the page cache.
    buffered_write: Mutex<()>,
    /// The file, opened with O_DIRECT.
    direct: Option<File>,
    /// True once the filesystem has refused a direct write.
    direct_failed: AtomicBool,
    /// Number of bytes hashed in order, which is the position of the [`Cursor`]; [`u64::MAX`] if a ladder verifies each
    /// part.
    cursor: AtomicU64,
    /// Locked while bytes are hashed in order.
    order: Mutex<InOrder>,
    /// Never locked while bytes are hashed, so that the completion of a part does not wait for hashing.
    out_of_order: Mutex<OutOfOrderParts>,
}

/// The hashers of a file that is hashed in order.
struct InOrder {
    hasher: LadderHasher,
    git: Option<sha1::Sha1>,
}

/// The parts that are complete and that the in-order hash has not reached.
#[derive(Debug, Default)]
struct OutOfOrderParts {
    /// Parts that are completely written and not yet hashed.
    parts: BTreeSet<u64>,
    catching_up: CatchUp,
}

/// State of the task that reads back and hashes out-of-order parts. There is at most one per file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum CatchUp {
    /// No task: the part at the cursor is not written yet.
    #[default]
    Idle,
    /// [`StagedWriter::part_done`] has told its caller to catch up, and the caller has not started.
    Requested,
    /// A task is reading back and hashing.
    Running,
}

/// Exclusive access to the in-order hash of a file, at the position of the next byte.
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

/// The digests of a file that was hashed in order.
#[derive(Debug, Clone)]
pub(crate) struct FileDigests {
    pub(crate) sha256: Digest,
    pub(crate) git_oid: Option<GitOid>,
    pub(crate) ladder: Ladder,
}

impl StagedFileSpec {
    fn parts(&self) -> u64 {
        self.size.div_ceil(self.part_size)
    }

    /// Returns true if the file has one part and fits into every buffer, so that it can be written [as a
    /// whole](StagedWriter::whole).
    pub(crate) fn fits_one_slice(&self) -> bool {
        (1..=self.part_size.min(WHOLE_BYTES_MAX)).contains(&self.size)
    }
}

impl StagedWriter {
    /// Creates the file and allocates its full length, so that a full disk is detected before anything is downloaded.
    pub(crate) fn create(spec: StagedFileSpec, owner: Option<Arc<FileLock>>) -> Result<Self> {
        let path = &spec.path;
        let at = |operation, cause: io::Error| fault(operation, path, cause);
        // Create a new inode: a write of a cancelled attempt may still be running, and must not reach the new file.
        super::files::remove_file(path)?;
        let parts = PartsJournal::create(path, spec.size, spec.part_size)?;
        let buffered = path.create_new(0o600).map_err(|cause| at("make", cause))?;
        allocate(&buffered, spec.size).map_err(|cause| at("make room for", cause))?;
        Ok(Self::from_file(spec, Some(buffered), parts, owner))
    }

    /// Returns a writer of a small file that is not in staging yet. The file is created, written and sealed in one step,
    /// by the thread that writes its only slice.
    pub(crate) fn whole(spec: StagedFileSpec, owner: Option<Arc<FileLock>>) -> Self {
        Self::from_file(spec, None, None, owner)
    }

    /// Returns the bytes of the parts that [`resume`](Self::resume) would find in the staged file at `path`.
    pub(super) fn resumable_bytes(path: &RootedPath, metadata: &Metadata) -> u64 {
        let (size, part_size) = (metadata.len(), crate::ladder::part_size(metadata.len()));
        match metadata.mode() & 0o222 {
            0 => size,
            _ => PartsJournal::listed(path, size, part_size)
                .map(|part| part_size.min(size.saturating_sub(part * part_size)))
                .sum(),
        }
    }

    /// Opens the file that an earlier fill left, and returns it with the parts that are written; `None` if the file
    /// cannot be resumed. Each part must be verified before it counts.
    pub(crate) fn resume(spec: &StagedFileSpec, owner: Option<Arc<FileLock>>) -> Result<Option<(Self, BTreeSet<u64>)>> {
        let Some(metadata) = super::files::stat(&spec.path)? else { return Ok(None) };
        // A file with more than one link is a reused blob, which must never be written.
        if !metadata.is_file() || metadata.len() != spec.size || metadata.nlink() != 1 {
            return Ok(None);
        }
        // A read-only file is complete. Its journal was removed when it was sealed. It is verified again like any other:
        // without a ladder, a small file is made read-only before its digest is compared.
        let sealed = metadata.mode() & 0o222 == 0;
        let journal = match sealed {
            true => PartsJournal::of_sealed(&spec.path, spec.size, spec.part_size)?,
            false => PartsJournal::resume(&spec.path, spec.size, spec.part_size),
        };
        let (journal, parts) = match journal {
            Some((_, parts)) if parts.is_empty() => return Ok(None),
            Some((journal, parts)) => (Some(journal), parts),
            None if sealed => (None, (0..spec.parts()).collect()),
            None => return Ok(None),
        };
        let open = || {
            let read_only = spec.path.open(false)?;
            let found = Metadata::of(&read_only)?;
            // Since the file was examined, another user may have replaced it by a link to a file elsewhere.
            if found.ino() != metadata.ino() || found.nlink() != 1 {
                return Err(io::Error::from(Errno::STALE));
            }
            // Make it writable through the descriptor, then open it again by its name, and compare the inodes.
            optional::set_mode(&read_only, 0o600)?;
            let writable = spec.path.open(true)?;
            let is_same = found.ino() == Metadata::of(&writable)?.ino();
            if is_same { Ok(writable) } else { Err(io::Error::from(Errno::STALE)) }
        };
        let Ok(buffered) = open() else { return Ok(None) };
        Ok(Some((Self::from_file(spec.clone(), Some(buffered), journal, owner), parts)))
    }

    /// Returns a writer of the open file `buffered`.
    fn from_file(
        spec: StagedFileSpec,
        buffered: Option<File>,
        parts: Option<PartsJournal>,
        owner: Option<Arc<FileLock>>,
    ) -> Self {
        let StagedFileSpec { path, size, part_size, in_order, git, direct } = spec;
        // The second descriptor is opened by name. Use it only if the name still leads to the same file.
        let inode = |file: &File| Metadata::of(file).map(|found| found.device_and_inode()).ok();
        let direct = direct.then(|| path.open_direct().ok()).flatten();
        let same = buffered.as_ref().and_then(inode);
        let direct = direct.filter(|direct| same.is_some() && inode(direct) == same);
        Self {
            _owner: owner,
            parts,
            path,
            size,
            part_size,
            buffered,
            written: OnceLock::new(),
            buffered_write: Mutex::default(),
            direct,
            direct_failed: AtomicBool::new(false),
            cursor: AtomicU64::new(if in_order { 0 } else { u64::MAX }),
            order: Mutex::new(InOrder::new(size, part_size, git)),
            out_of_order: Mutex::default(),
        }
    }

    /// Removes the staged file at `path` and its journal, so that no fill resumes its wrong bytes.
    pub(crate) fn remove_staged(path: &RootedPath) -> Result<()> {
        super::files::remove_file(path)?;
        super::files::remove_file(&super::parts_journal::journal_of(path))
    }

    /// Reads back the bytes that were written at `offset`.
    pub(crate) fn load(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let read = self.buffered().and_then(|file| file.read_exact_at(into, offset));
        read.map_err(|cause| fault("read back", &self.path, cause))
    }

    fn buffered(&self) -> io::Result<&File> {
        self.buffered.as_ref().ok_or_else(|| io::Error::other("the file is written as a whole"))
    }

    /// Writes `slice` at `offset` without hashing it. Only an aligned slice can be written with O_DIRECT.
    pub(crate) fn store(&self, offset: u64, slice: &[u8]) -> Result<()> {
        if self.is_whole() && offset == 0 && slice.len() as u64 == self.size {
            return self.write_whole(slice);
        }
        self.write_bytes(offset, slice).map_err(|cause| fault("write", &self.path, cause))
    }

    /// Writes `slice` at `offset`, and hashes it if it is at the cursor.
    pub(crate) fn write(&self, offset: u64, slice: &[u8]) -> Result<()> {
        self.store(offset, slice)?;
        if let Some(mut cursor) = self.take_cursor(offset) {
            cursor.update(slice);
            cursor.advance(slice);
        }
        Ok(())
    }

    /// Writes and hashes the next slice of a file that is written from beginning to end. `beside` hashes the slice in
    /// the same pass.
    pub(crate) fn append(&self, offset: u64, slice: &[u8], beside: &mut PartHasher) -> Result<()> {
        self.store(offset, slice)?;
        let mut order = self.order.lock();
        order.hasher.update_both(slice, beside);
        self.cursor.store(order.hasher.position(), Ordering::Release);
        Ok(())
    }

    /// Returns true if the cursor is at `offset`.
    pub(crate) fn is_next(&self, offset: u64) -> bool {
        self.cursor.load(Ordering::Acquire) == offset
    }

    /// Returns the number of bytes hashed in order; [`u64::MAX`] if a ladder verifies each part.
    pub(crate) fn hashed_bytes(&self) -> u64 {
        self.cursor.load(Ordering::Acquire)
    }

    /// Takes the cursor; `None` if it is not at `offset`, or if another thread holds it.
    pub(crate) fn take_cursor(&self, offset: u64) -> Option<Cursor<'_>> {
        if !self.is_next(offset) {
            return None;
        }
        let order = self.order.try_lock()?;
        // The position may have advanced between the check and the lock.
        (order.hasher.position() == offset).then_some(Cursor { order, position: &self.cursor })
    }

    /// Creates the file with `content`, and seals it.
    fn write_whole(&self, content: &[u8]) -> Result<()> {
        let file = match self.path.create_new(0o600) {
            // Another user of a shared directory has placed something there.
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
                super::files::remove(&self.path)?;
                self.path.create_new(0o600)
            }
            created => created,
        };
        let file = file.map_err(|cause| fault("make", &self.path, cause))?;
        file.write_all_at(content, 0).map_err(|cause| fault("write", &self.path, cause))?;
        let identity = seal(file, &self.path)?;
        self.written.get_or_init(|| identity);
        Ok(())
    }

    fn write_bytes(&self, offset: u64, slice: &[u8]) -> io::Result<()> {
        let direct = self.direct.as_ref().filter(|_| !self.direct_failed.load(Ordering::Relaxed));
        let Some(direct) = direct.filter(|_| offset.is_multiple_of(ALIGNMENT as u64)) else {
            return self.write_buffered(offset, slice);
        };
        // O_DIRECT writes only whole blocks. The rest at the end of the file is buffered.
        let whole_blocks = slice.len() / ALIGNMENT * ALIGNMENT;
        let (aligned, tail) = slice.split_at(whole_blocks);
        if let Err(error) = direct.write_all_at(aligned, offset) {
            if error.raw_os_error() != Some(Errno::INVAL.raw_os_error()) {
                return Err(error);
            }
            // EINVAL: the filesystem requires another alignment. From now on, all writes to this file are buffered.
            self.direct_failed.store(true, Ordering::Relaxed);
            self.write_buffered(offset, aligned)?;
        }
        self.write_buffered(offset + whole_blocks as u64, tail)
    }

    fn write_buffered(&self, offset: u64, slice: &[u8]) -> io::Result<()> {
        if slice.is_empty() {
            return Ok(());
        }
        // The kernel executes buffered writes to one file one after the other, and a second writer spins until its
        // turn. Wait on this mutex instead, which leaves the core to other threads.
        let _exclusive = self.buffered_write.lock();
        self.buffered()?.write_all_at(slice, offset)
    }

    /// Records in the journal that a part is completely written and, with a ladder, verified.
    ///
    /// Returns true if the caller must [catch up](Self::next_to_catch_up) now. At most one caller at a time must do so.
    pub(crate) fn part_done(&self, part: u64) -> Result<bool> {
        if let Some(parts) = &self.parts {
            parts.mark(part)?;
        }
        // With a ladder, nothing is hashed in order.
        if self.hashed_bytes() == u64::MAX {
            return Ok(false);
        }
        let mut early = self.out_of_order.lock();
        early.parts.insert(part);
        if early.catching_up != CatchUp::Idle || self.next_unhashed(&mut early).is_none() {
            return Ok(false);
        }
        early.catching_up = CatchUp::Requested;
        Ok(true)
    }

    /// Returns the next range to read back and hash, within one part, for the task that catches up.
    ///
    /// Returns `None` if the part at the cursor is not written yet. This ends the task. The completion of that part
    /// requests a new one.
    pub(crate) fn next_to_catch_up(&self) -> Option<Range<u64>> {
        let mut early = self.out_of_order.lock();
        let next = self.next_unhashed(&mut early);
        early.catching_up = if next.is_some() { CatchUp::Running } else { CatchUp::Idle };
        let position = next?;
        Some(position..((position / self.part_size + 1) * self.part_size).min(self.size))
    }

    /// Returns the number of complete parts that a running catch-up task has not hashed yet; 0 if no task is running.
    pub(crate) fn parts_behind(&self) -> usize {
        let mut early = self.out_of_order.lock();
        self.next_unhashed(&mut early);
        if early.catching_up == CatchUp::Running { early.parts.len() } else { 0 }
    }

    /// Returns the position of the cursor if the part at that position is complete. Removes the parts before the cursor
    /// from `early`.
    fn next_unhashed(&self, early: &mut OutOfOrderParts) -> Option<u64> {
        let position = self.hashed_bytes();
        if position >= self.size {
            early.parts.clear();
            return None;
        }
        let part = position / self.part_size;
        early.parts = early.parts.split_off(&part);
        early.parts.contains(&part).then_some(position)
    }

    /// Resets the in-order hash, to write the file again from its beginning. No write may be running.
    pub(crate) fn rewind(&self) {
        if self.hashed_bytes() != u64::MAX {
            let mut order = self.order.lock();
            *order = InOrder::new(self.size, self.part_size, order.git.is_some());
            *self.out_of_order.lock() = OutOfOrderParts::default();
            self.cursor.store(0, Ordering::Release);
        }
    }

    /// Returns the digests of a file that was hashed in order. All parts must be complete and hashed.
    pub(crate) fn hashed(&self) -> FileDigests {
        let mut order = self.order.lock();
        let hasher = std::mem::replace(&mut order.hasher, LadderHasher::new(self.part_size));
        let git_oid = order.git.take().map(GitOid::finish);
        let (sha256, ladder) = hasher.finish();
        FileDigests { sha256, git_oid, ladder }
    }

    /// Returns true if the file is written as a whole.
    pub(crate) fn is_whole(&self) -> bool {
        self.buffered.is_none()
    }

    /// Returns the identity of a file that was written as a whole, and is sealed.
    pub(crate) fn written(&self) -> Option<FileIdentity> {
        self.written.get().copied()
    }

    /// Makes the file read-only, closes it, and returns its identity. The file is synced later, after it is published.
    pub(crate) fn seal(self) -> Result<FileIdentity> {
        let path = self.path;
        let file = self.buffered.ok_or_else(|| Error::new(ErrorKind::Other, format!("{path} was not written")))?;
        drop((self.direct, self.parts));
        let identity = seal(file, &path)?;
        // A read-only file counts as complete, so its journal is no longer needed.
        super::files::remove_file(&super::parts_journal::journal_of(&path))?;
        Ok(identity)
    }
}

/// Makes a complete file read-only, closes it, and returns its identity.
fn seal(file: File, path: &RootedPath) -> Result<FileIdentity> {
    optional::set_mode(&file, 0o444).map_err(|cause| fault("make read-only", path, cause))?;
    let examined = |cause| fault("examine", path, cause);
    let written = Metadata::of(&file).map_err(examined)?.identity();
    drop(file);
    // After the close, the name must still lead to the file that was written.
    match path.metadata().map_err(examined)?.identity() == written {
        true => Ok(written),
        false => Err(Error::corrupt(format!("{path} was replaced while it was being filled"))),
    }
}

impl Cursor<'_> {
    /// Returns the hasher for the next `len` bytes; `None` if they cross a part boundary.
    pub(crate) fn hasher(&mut self, len: usize) -> Option<&mut PartHasher> {
        self.order.hasher.within_part(len)
    }

    /// Hashes the next bytes, which may cross part boundaries.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.order.hasher.update(bytes);
    }

    /// Moves the cursor past `bytes`, which the caller has hashed.
    pub(crate) fn advance(mut self, bytes: &[u8]) {
        if let Some(git) = &mut self.order.git {
            use sha1::Digest as _;
            git.update(bytes);
        }
        self.position.store(self.order.hasher.position(), Ordering::Release);
    }
}

impl InOrder {
    /// Returns hashers at the beginning of a file of `size` bytes.
    fn new(size: u64, part_size: u64, git: bool) -> Self {
        Self { hasher: LadderHasher::new(part_size), git: git.then(|| GitOid::hasher(size)) }
    }
}

/// Allocates the full length. On a filesystem without `fallocate`, only sets the length.
fn allocate(file: &File, size: u64) -> io::Result<()> {
    if size == 0 {
        return Ok(());
    }
    match retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size)) {
        Ok(()) => Ok(()),
        // `EINVAL` is the answer of some network filesystems and of filesystems in user space.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(size),
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
            let spec = StagedFileSpec { path, size: len as u64, part_size: 1024, in_order: true, git: true, direct: false };
            let writer = StagedWriter::create(spec, None).expect("creates");
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
                        let mut cursor = writer.take_cursor(range.start).expect("no other thread has the cursor");
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
    fn a_file_that_is_written_as_a_whole_is_sealed_and_takes_the_place_of_another_entry() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("f");
        let spec =
            |path| StagedFileSpec { path, size: 7, part_size: 1 << 20, in_order: false, git: false, direct: false };
        assert!(spec(path.clone()).fits_one_slice());
        for size in [0, WHOLE_BYTES_MAX + 1] {
            assert!(!StagedFileSpec { size, ..spec(path.clone()) }.fits_one_slice());
        }
        let writer = StagedWriter::whole(spec(path.clone()), None);
        assert!(path.metadata().is_err() && writer.written().is_none(), "there is no file before its content");
        assert!(writer.store(0, b"half").is_err() && path.metadata().is_err(), "a part of it makes no file");
        writer.store(0, b"content").expect("writes");
        let made = path.metadata().expect("is there");
        assert_eq!((made.mode(), made.nlink(), writer.written()), (0o444, 1, Some(made.identity())));
        assert_eq!(std::fs::read(path.full()).expect("reads"), b"content");
        // What another user placed there is removed, and the file behind a link is not touched.
        let other = folder.path().join("other");
        std::fs::write(&other, "theirs").expect("writes");
        path.unlink().expect("removes");
        path.symlink_to(&other).expect("links");
        StagedWriter::whole(spec(path.clone()), None).store(0, b"another").expect("writes");
        assert_eq!(std::fs::read(path.full()).expect("reads"), b"another");
        assert_eq!(std::fs::read(other).expect("reads"), b"theirs");
    }

    #[test]
    fn direct_writes_store_the_same_bytes_as_buffered_ones() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("folder");
        let path = RootedPath::root(folder.path()).join("f");
        let content: Vec<u8> = (0..3 * ALIGNMENT + 77).map(|at| (at % 251) as u8).collect();
        let size = content.len() as u64;
        let spec =
            StagedFileSpec { path: path.clone(), size, part_size: 1 << 20, in_order: false, git: false, direct: true };
        let writer = StagedWriter::create(spec, None).expect("creates");
        assert_eq!(writer.direct.is_some(), path.open_direct().is_ok(), "direct if the filesystem supports it");
        // With a skew of 1, the memory is not aligned, so the bytes are written by a buffered write.
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
