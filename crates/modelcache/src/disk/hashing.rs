//! Hashing files on disk: two ranges at a time on each thread, with direct reads if the device itself is to be checked.
//!
//! A [`HashTask`] hashes one range of bytes in order: a part with a checkpoint, or a whole file. A thread reads a slice
//! for each of two tasks and hashes both slices together, which is nearly twice as fast as one after the other. A
//! thread needs memory for two slices, whatever the size of the files.
//!
//! Direct reads leave the page cache as it is: cached files stay cached, and others are not loaded. A check of the
//! device therefore does not slow down readers, and finds corruption even of files that are in the page cache.

use super::ALIGNMENT;
use super::io_error::errno;
use crate::digest::Digest;
use crate::ladder::{Ladder, PartHasher};
use crate::mutex::Mutex;
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::thread;

/// Number of bytes that a task reads and hashes at a time; a multiple of [`ALIGNMENT`].
const SLICE_BYTES: usize = 1 << 20;
/// Maximum number of threads. More threads do not get more out of a disk, and each needs memory for two slices.
const THREADS_MAX: usize = 16;

/// Returns the number of threads for hashing files that are in the page cache.
pub(crate) fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

/// Returns the number of threads for hashing files with direct reads: while some wait for the device, others hash.
pub(crate) fn threads_for_device_reads() -> usize {
    (2 * threads()).min(THREADS_MAX)
}

/// Sets `O_DIRECT` on `file`, so that reads come from the device and not from the page cache. If the filesystem does
/// not support it, drops the pages of the file from the cache instead.
pub(crate) fn bypass_page_cache(file: &File) {
    let direct = rustix::fs::fcntl_getfl(file).and_then(|flags| rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT));
    if direct.is_err() {
        let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    }
}

fn is_direct(file: &File) -> bool {
    rustix::fs::fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::DIRECT))
}

/// Clears `O_DIRECT` of `file`. Returns true if it was set.
fn clear_direct(file: &File) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return false };
    flags.contains(OFlags::DIRECT) && rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT).is_ok()
}

/// A range of an open file that is read and hashed in order.
pub(crate) struct HashTask<T> {
    /// The open file, with the caller's label for the range.
    labeled_file: T,
    /// True while reads bypass the page cache.
    direct: bool,
    /// The bytes that are not read yet.
    range: Range<u64>,
    hasher: PartHasher,
    /// The read error that ended the task, if any.
    error: Option<io::Error>,
}

impl<T: AsRef<File>> HashTask<T> {
    /// Creates a task for the bytes in `range`. `hasher` must have the state at the start of the range.
    pub(crate) fn new(labeled_file: T, range: Range<u64>, hasher: PartHasher) -> Self {
        Self { direct: is_direct(labeled_file.as_ref()), labeled_file, range, hasher, error: None }
    }

    /// Creates a task for a whole file of `size` bytes.
    pub(crate) fn whole(labeled_file: T, size: u64) -> Self {
        Self::new(labeled_file, 0..size, PartHasher::new())
    }

    /// Reads the next bytes into `slice`, and returns their number. Returns 0 at the end of the range or of the file,
    /// and after an error.
    fn read(&mut self, slice: &mut [u8]) -> usize {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        // Direct reads need whole blocks. Bytes beyond the end of the range are not hashed.
        let want = left.min(slice.len()).next_multiple_of(ALIGNMENT).min(slice.len());
        let read = match self.read_at(&mut slice[..want]) {
            Ok(read) => read.min(left),
            Err(error) => {
                self.error = Some(error);
                0
            }
        };
        self.range.start = if read == 0 { self.range.end } else { self.range.start + read as u64 };
        read
    }

    fn read_at(&mut self, slice: &mut [u8]) -> io::Result<usize> {
        let (file, at) = (self.labeled_file.as_ref(), self.range.start);
        if at >= self.range.end {
            return Ok(0);
        }
        match file.read_at(slice, at) {
            // Direct reads do not work at this offset: the device has larger blocks than `ALIGNMENT`, the part starts
            // within a block, or the file ended early. Read through the page cache instead.
            Err(error) if self.direct && errno(&error) == Some(Errno::INVAL) => {
                clear_direct(file);
                self.direct = false;
                file.read_at(slice, at)
            }
            Ok(read) if !self.direct => {
                // The kernel reads ahead for one reader of a file, not for several, so request the next bytes here.
                let ahead = NonZeroU64::new(slice.len() as u64);
                let _ = rustix::fs::fadvise(file, at + read as u64, ahead, Advice::WillNeed);
                Ok(read)
            }
            outcome => outcome,
        }
    }

    fn is_finished(&self) -> bool {
        self.range.is_empty()
    }

    /// Returns the labeled file, and the hasher or the read error.
    fn finish(self) -> (T, io::Result<PartHasher>) {
        (self.labeled_file, self.error.map_or(Ok(self.hasher), Err))
    }
}

/// One of the two tasks of a thread, with its buffer.
struct Slot<T> {
    task: Option<HashTask<T>>,
    storage: Vec<u8>,
    /// Offset of the aligned slice in `storage`.
    start: usize,
    /// Number of bytes in the slice that were read last.
    len: usize,
}

impl<T: AsRef<File>> Slot<T> {
    fn new() -> Self {
        // Direct reads need an aligned buffer.
        let storage = vec![0; SLICE_BYTES + ALIGNMENT];
        Self { start: storage.as_ptr().align_offset(ALIGNMENT), storage, task: None, len: 0 }
    }

    /// Reads the next slice of the task. Returns the number of bytes read.
    fn read(&mut self) -> u64 {
        let slice = &mut self.storage[self.start..self.start + SLICE_BYTES];
        self.len = self.task.as_mut().map_or(0, |task| task.read(slice));
        self.len as u64
    }

    /// Returns the hasher and the bytes to hash, if there is a task.
    fn work(&mut self) -> Option<(&mut PartHasher, &[u8])> {
        let slice = &self.storage[self.start..self.start + self.len];
        self.task.as_mut().map(|task| (&mut task.hasher, slice))
    }
}

/// Performs tasks on this thread, two at a time, until `next` returns `None`.
///
/// After each read, `on_read` gets the number of bytes; if it returns false, the function returns at once.
/// `on_finished` gets the labeled file of each finished task, with the hasher or the read error.
pub(crate) fn in_pairs<T: AsRef<File>, E>(
    mut next: impl FnMut() -> Result<Option<HashTask<T>>, E>,
    mut on_read: impl FnMut(u64) -> bool,
    mut on_finished: impl FnMut(T, io::Result<PartHasher>) -> Result<(), E>,
) -> Result<(), E> {
    let mut slots = [Slot::new(), Slot::new()];
    loop {
        // Start the next task in each free slot.
        for slot in &mut slots {
            if slot.task.is_none() {
                slot.task = next()?;
            }
        }
        if slots.iter().all(|slot| slot.task.is_none()) || !on_read(slots.iter_mut().map(Slot::read).sum()) {
            return Ok(());
        }
        let [a, b] = &mut slots;
        match (a.work(), b.work()) {
            (Some((a, x)), Some((b, y))) => PartHasher::update_pair(a, x, b, y),
            (Some((hasher, slice)), None) | (None, Some((hasher, slice))) => hasher.update(slice),
            (None, None) => {}
        }
        for slot in &mut slots {
            if let Some(task) = slot.task.take_if(|task| task.is_finished()) {
                let (labeled_file, hashed) = task.finish();
                on_finished(labeled_file, hashed)?;
            }
        }
    }
}

/// Returns the digest of a file of `size` bytes, read in order. If `on_read` returns false, reading stops, and the
/// result is not the digest of the file.
pub(crate) fn in_order(file: &File, size: u64, on_read: impl FnMut(u64) -> bool) -> io::Result<Digest> {
    let mut whole = Some(HashTask::whole(Part { file, index: 0 }, size));
    let mut outcome = Ok(PartHasher::new());
    let keep = |_: Part<'_>, hashed| {
        outcome = hashed;
        Ok(())
    };
    let Ok(()) = in_pairs::<_, Infallible>(|| Ok(whole.take()), on_read, keep);
    outcome.map(PartHasher::finish)
}

/// Returns those of `parts` of a file of `size` bytes that match `ladder`, which ends at `digest`. Uses all cores.
///
/// If all parts of the file match, the file has the digest. If a part does not match, the file may still have the
/// digest: the ladder may be wrong, or a read may have failed.
pub(crate) fn matching_parts(
    file: &File,
    size: u64,
    digest: Digest,
    ladder: &Ladder,
    parts: &BTreeSet<u64>,
) -> BTreeSet<u64> {
    let remaining = Mutex::new(parts.iter());
    let matching = Mutex::new(BTreeSet::new());
    let next = || {
        let index = *remaining.lock().next()?;
        Some(HashTask::new(Part { file, index }, ladder.range(index, size), ladder.hasher(index)?))
    };
    let on_finished = |part: Part<'_>, hashed: io::Result<PartHasher>| {
        if hashed.is_ok_and(|hasher| ladder.holds(part.index, Some(digest), hasher)) {
            matching.lock().insert(part.index);
        }
        Ok(())
    };
    let work = || {
        let Ok(()) = in_pairs::<_, Infallible>(|| Ok(next()), |_| true, on_finished);
    };
    thread::scope(|scope| {
        // This thread works as well, and each thread takes two parts at a time.
        let others = threads().min(parts.len().div_ceil(2)).saturating_sub(1);
        // If a thread cannot be started, the others do its share.
        (0..others).for_each(|_| drop(thread::Builder::new().spawn_scoped(scope, work)));
        work();
    });
    matching.into_inner()
}

/// Returns true if the file has `digest`. With a ladder, the parts are hashed on all cores. Without one, or if a part
/// does not match, the whole file is hashed in order.
pub(crate) fn has_digest(file: &File, digest: Digest, ladder: Option<&Ladder>) -> io::Result<bool> {
    let size = file.metadata()?.len();
    if let Some(ladder) = ladder.filter(|ladder| size > 0 && ladder.fits(size)) {
        let parts = (0..size.div_ceil(ladder.part_size())).collect();
        if matching_parts(file, size, digest, ladder, &parts) == parts {
            return Ok(true);
        }
    }
    Ok(in_order(file, size, |_| true)? == digest)
}

/// A part of a file, or the whole file as part 0.
struct Part<'a> {
    file: &'a File,
    index: u64,
}

impl AsRef<File> for Part<'_> {
    fn as_ref(&self) -> &File {
        self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ladder::LadderHasher;
    use proptest::prelude::*;
    use std::io::Write;

    fn filled(len: usize, seed: u64) -> Vec<u8> {
        (0..len as u64).map(|at| (at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect()
    }

    fn ladder(content: &[u8], part: u64) -> Ladder {
        let mut hasher = LadderHasher::new(part);
        hasher.update(content);
        hasher.finish().1
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(content).expect("writes");
        file
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        // Parts of whole pages can be read with O_DIRECT, others cannot. Both kinds are read with and without it.
        #[test]
        fn exactly_the_parts_with_flipped_bits_do_not_match(
            len in 1usize..40_000, part in prop_oneof![Just(64u64), Just(4096), Just(6400), Just(8192)],
            flips in proptest::collection::vec(any::<proptest::sample::Index>(), 0..4), direct in any::<bool>(),
        ) {
            let good = filled(len, part);
            let (digest, ladder) = (Digest::of(&good), ladder(&good, part));
            let mut bad = good.clone();
            flips.iter().for_each(|at| bad[at.index(len)] ^= 4);
            let file = file(&bad);
            if direct {
                bypass_page_cache(&file);
            }
            let parts: BTreeSet<u64> = (0..(len as u64).div_ceil(part)).collect();
            let expected = parts.iter().copied().filter(|index| {
                let range = ladder.range(*index, len as u64);
                let range = range.start as usize..range.end as usize;
                good[range.clone()] == bad[range]
            });
            let matching = matching_parts(&file, len as u64, digest, &ladder, &parts);
            prop_assert_eq!(matching, expected.collect::<BTreeSet<_>>());
            prop_assert_eq!(has_digest(&file, digest, Some(&ladder)).expect("reads"), good == bad);
            prop_assert_eq!(has_digest(&file, Digest::of(&bad), None).expect("reads"), true);
        }
    }

    #[test]
    fn a_wrong_ladder_does_not_change_the_result() {
        let (content, other) = (filled(20_000, 1), filled(20_000, 2));
        let file = file(&content);
        let wrong = ladder(&other, 4096);
        assert!(has_digest(&file, Digest::of(&content), Some(&wrong)).expect("reads"));
        assert!(!has_digest(&file, Digest::of(&other), Some(&wrong)).expect("reads"));
        assert!(!has_digest(&file, Digest::of(&other), Some(&ladder(&content, 4096))).expect("reads"));
    }

    #[test]
    fn parts_longer_than_a_slice_are_hashed_and_a_truncated_file_does_not_match() {
        let content = filled(3 * SLICE_BYTES + 70_001, 3);
        let (digest, part) = (Digest::of(&content), SLICE_BYTES as u64 + 64 * 1024);
        let (ladder, whole) = (ladder(&content, part), file(&content));
        for direct in [false, true] {
            if direct {
                bypass_page_cache(&whole);
            }
            assert!(has_digest(&whole, digest, Some(&ladder)).expect("reads"));
            let size = content.len() as u64;
            let mut bytes = 0;
            let found = in_order(&whole, size, |more| {
                bytes += more;
                true
            });
            assert_eq!((found.expect("reads"), bytes), (digest, size));
        }
        let size = content.len() as u64;
        whole.set_len(size - 1).expect("shortens");
        let parts = (0..size.div_ceil(part)).collect();
        let matching = matching_parts(&whole, size, digest, &ladder, &parts);
        assert_eq!(matching, parts.iter().copied().take(parts.len() - 1).collect());
        assert!(!has_digest(&whole, digest, Some(&ladder)).expect("reads"));
    }
}
