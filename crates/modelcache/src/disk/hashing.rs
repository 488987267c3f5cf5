//! Hashing what lies on disk: two stretches at once on a core, and past the page cache where the medium is to answer.
//!
//! A stretch is a part that a ladder checks alone, or a whole file. A thread reads two of them in turn, a slice of each,
//! and hashes both slices together: nearly twice as fast as one after the other. When one ends, the next takes its place.
//! Memory is two slices a thread, whatever the size of files.
//!
//! Surprise: a file that is read past the page cache stays in it if it was there, and does not come in if it was not: who
//! serves from memory goes on doing so, and rot on the medium is found all the same.

use super::ALIGNMENT;
use super::io_error::errno;
use crate::digest::Digest;
use crate::ladder::{Ladder, PartHasher};
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Bytes of a stretch that are read and hashed at a time.
const SLICE_BYTES: usize = 1 << 20;
/// More threads than this feed no disk, and two slices each are what they hold.
const THREADS_MAX: usize = 16;

/// Threads that hash what is in memory.
pub(crate) fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

/// Threads that hash what comes from the medium: while some wait for it, others hash.
pub(crate) fn threads_from_medium() -> usize {
    (2 * threads()).min(THREADS_MAX)
}

/// Lets reads of `file` come from the medium, not from the kernel's memory. Where the filesystem has no direct reads, the
/// kernel's copy is dropped instead.
pub(crate) fn from_medium(file: &File) {
    let direct = rustix::fs::fcntl_getfl(file).and_then(|flags| rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT));
    if direct.is_err() {
        let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    }
}

fn is_direct(file: &File) -> bool {
    rustix::fs::fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::DIRECT))
}

/// Ends direct reads of `file`; `false` if there were none.
fn through_memory(file: &File) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return false };
    flags.contains(OFlags::DIRECT) && rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT).is_ok()
}

/// Bytes of an open file that are hashed in order; `of` says which, to whoever asked.
pub(crate) struct Stretch<T> {
    of: T,
    direct: bool,
    range: Range<u64>,
    hasher: PartHasher,
    trouble: Option<io::Error>,
}

impl<T: AsRef<File>> Stretch<T> {
    /// The bytes in `range`, before which `hasher` stands.
    pub(crate) fn new(of: T, range: Range<u64>, hasher: PartHasher) -> Self {
        Self { direct: is_direct(of.as_ref()), of, range, hasher, trouble: None }
    }

    /// The whole of a file of `size` bytes.
    pub(crate) fn whole(of: T, size: u64) -> Self {
        Self::new(of, 0..size, PartHasher::new())
    }

    /// Reads on into `slice`; how many bytes. None at the end, which may come early, and after trouble.
    fn read(&mut self, slice: &mut [u8]) -> usize {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        // Direct reads are of whole blocks; what is beyond the stretch is left out.
        let want = left.min(slice.len()).next_multiple_of(ALIGNMENT).min(slice.len());
        let read = match self.read_at(&mut slice[..want]) {
            Ok(read) => read.min(left),
            Err(error) => {
                self.trouble = Some(error);
                0
            }
        };
        self.range.start = if read == 0 { self.range.end } else { self.range.start + read as u64 };
        read
    }

    fn read_at(&mut self, slice: &mut [u8]) -> io::Result<usize> {
        let (file, at) = (self.of.as_ref(), self.range.start);
        if at >= self.range.end {
            return Ok(0);
        }
        match file.read_at(slice, at) {
            // Other blocks than ours, a part that begins within one, or a file that ended early.
            Err(error) if self.direct && errno(&error) == Some(Errno::INVAL) => {
                through_memory(file);
                self.direct = false;
                file.read_at(slice, at)
            }
            Ok(read) if !self.direct => {
                // The kernel reads ahead for one reader of a file, not for several: what comes next is asked for here.
                let ahead = NonZeroU64::new(slice.len() as u64);
                let _ = rustix::fs::fadvise(file, at + read as u64, ahead, Advice::WillNeed);
                Ok(read)
            }
            outcome => outcome,
        }
    }

    fn is_read(&self) -> bool {
        self.range.is_empty()
    }

    fn end(self) -> (T, io::Result<PartHasher>) {
        (self.of, self.trouble.map_or(Ok(self.hasher), Err))
    }
}

/// A place for one stretch at a time, and its slice.
struct Slot<T> {
    stretch: Option<Stretch<T>>,
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl<T: AsRef<File>> Slot<T> {
    fn new() -> Self {
        let storage = vec![0; SLICE_BYTES + ALIGNMENT];
        Self { start: storage.as_ptr().align_offset(ALIGNMENT), storage, stretch: None, len: 0 }
    }

    fn read(&mut self) -> u64 {
        let slice = &mut self.storage[self.start..self.start + SLICE_BYTES];
        self.len = self.stretch.as_mut().map_or(0, |stretch| stretch.read(slice));
        self.len as u64
    }

    /// The hasher and what it has to take, if there is a stretch.
    fn work(&mut self) -> Option<(&mut PartHasher, &[u8])> {
        let slice = &self.storage[self.start..self.start + self.len];
        self.stretch.as_mut().map(|stretch| (&mut stretch.hasher, slice))
    }
}

/// Reads and hashes stretches on this thread until there is no `next`, and tells of each that `ended`.
///
/// `took` hears of bytes as they are read, and ends it all with `false`.
pub(crate) fn in_pairs<T: AsRef<File>, E>(
    mut next: impl FnMut() -> Result<Option<Stretch<T>>, E>,
    mut took: impl FnMut(u64) -> bool,
    mut ended: impl FnMut(T, io::Result<PartHasher>) -> Result<(), E>,
) -> Result<(), E> {
    let mut slots = [Slot::new(), Slot::new()];
    loop {
        for slot in &mut slots {
            if slot.stretch.is_none() {
                slot.stretch = next()?;
            }
        }
        if slots.iter().all(|slot| slot.stretch.is_none()) || !took(slots.iter_mut().map(Slot::read).sum()) {
            return Ok(());
        }
        let [a, b] = &mut slots;
        match (a.work(), b.work()) {
            (Some((a, x)), Some((b, y))) => PartHasher::update_pair(a, x, b, y),
            (Some((hasher, slice)), None) | (None, Some((hasher, slice))) => hasher.update(slice),
            (None, None) => {}
        }
        for slot in &mut slots {
            if let Some(stretch) = slot.stretch.take_if(|stretch| stretch.is_read()) {
                let (of, hashed) = stretch.end();
                ended(of, hashed)?;
            }
        }
    }
}

/// The digest of a file of `size` bytes, read in order. Of its beginning only, if `took` ends it.
pub(crate) fn in_order(file: &File, size: u64, took: impl FnMut(u64) -> bool) -> io::Result<Digest> {
    let mut whole = Some(Stretch::whole(Part { file, index: 0 }, size));
    let mut outcome = Ok(PartHasher::new());
    let keep = |_: Part<'_>, hashed| {
        outcome = hashed;
        Ok(())
    };
    let Ok(()) = in_pairs::<_, Infallible>(|| Ok(whole.take()), took, keep);
    outcome.map(PartHasher::finish)
}

/// Which of the `parts` of a file of `size` bytes hold under `ladder`, whose end is `digest`. On all cores.
///
/// That all parts do proves the file. That some do not proves nothing yet: the ladder may be wrong, or the disk ill.
pub(crate) fn right_parts(
    file: &File,
    size: u64,
    digest: Digest,
    ladder: &Ladder,
    parts: &BTreeSet<u64>,
) -> BTreeSet<u64> {
    let left = Mutex::new(parts.iter());
    let right = Mutex::new(BTreeSet::new());
    let next = || {
        let index = *left.lock().unwrap_or_else(PoisonError::into_inner).next()?;
        Some(Stretch::new(Part { file, index }, ladder.range(index, size), ladder.hasher(index)?))
    };
    let ended = |part: Part<'_>, hashed: io::Result<PartHasher>| {
        if hashed.is_ok_and(|hasher| ladder.holds(part.index, Some(digest), hasher)) {
            right.lock().unwrap_or_else(PoisonError::into_inner).insert(part.index);
        }
        Ok(())
    };
    let work = || {
        let Ok(()) = in_pairs::<_, Infallible>(|| Ok(next()), |_| true, ended);
    };
    thread::scope(|scope| {
        let others = threads().min(parts.len().div_ceil(2)).saturating_sub(1);
        // Where a thread cannot be started, those that run do its share.
        (0..others).for_each(|_| drop(thread::Builder::new().spawn_scoped(scope, work)));
        work();
    });
    right.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the bytes of a file are those of `digest`: by parts on all cores where there is a ladder for it, else, and where
/// the ladder finds fault, in order.
pub(crate) fn has_digest(file: &File, digest: Digest, ladder: Option<&Ladder>) -> io::Result<bool> {
    let size = file.metadata()?.len();
    if let Some(ladder) = ladder.filter(|ladder| size > 0 && ladder.fits(size)) {
        let parts = (0..size.div_ceil(ladder.part_size())).collect();
        if right_parts(file, size, digest, ladder, &parts) == parts {
            return Ok(true);
        }
    }
    Ok(in_order(file, size, |_| true)? == digest)
}

/// A part of a file, or the whole.
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

        // Parts of whole pages can be read past the page cache, others not: both ways, from memory and from the medium.
        #[test]
        fn exactly_the_parts_with_flipped_bits_are_not_right(
            len in 1usize..40_000, part in prop_oneof![Just(64u64), Just(4096), Just(6400), Just(8192)],
            flips in proptest::collection::vec(any::<proptest::sample::Index>(), 0..4), medium in any::<bool>(),
        ) {
            let good = filled(len, part);
            let (digest, ladder) = (Digest::of(&good), ladder(&good, part));
            let mut bad = good.clone();
            flips.iter().for_each(|at| bad[at.index(len)] ^= 4);
            let file = file(&bad);
            if medium {
                from_medium(&file);
            }
            let parts: BTreeSet<u64> = (0..(len as u64).div_ceil(part)).collect();
            let expected = parts.iter().copied().filter(|index| {
                let range = ladder.range(*index, len as u64);
                let range = range.start as usize..range.end as usize;
                good[range.clone()] == bad[range]
            });
            prop_assert_eq!(right_parts(&file, len as u64, digest, &ladder, &parts), expected.collect::<BTreeSet<_>>());
            prop_assert_eq!(has_digest(&file, digest, Some(&ladder)).expect("reads"), good == bad);
            prop_assert_eq!(has_digest(&file, Digest::of(&bad), None).expect("reads"), true);
        }
    }

    #[test]
    fn a_ladder_that_lies_makes_no_right_file_wrong_and_no_wrong_one_right() {
        let (content, other) = (filled(20_000, 1), filled(20_000, 2));
        let file = file(&content);
        let lying = ladder(&other, 4096);
        assert!(has_digest(&file, Digest::of(&content), Some(&lying)).expect("reads"));
        assert!(!has_digest(&file, Digest::of(&other), Some(&lying)).expect("reads"));
        assert!(!has_digest(&file, Digest::of(&other), Some(&ladder(&content, 4096))).expect("reads"));
    }

    #[test]
    fn long_stretches_go_on_slice_by_slice_and_a_file_that_ended_early_is_not_right() {
        let content = filled(3 * SLICE_BYTES + 70_001, 3);
        let (digest, part) = (Digest::of(&content), SLICE_BYTES as u64 + 64 * 1024);
        let (ladder, whole) = (ladder(&content, part), file(&content));
        for medium in [false, true] {
            if medium {
                from_medium(&whole);
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
        let right = right_parts(&whole, size, digest, &ladder, &parts);
        assert_eq!(right, parts.iter().copied().take(parts.len() - 1).collect());
        assert!(!has_digest(&whole, digest, Some(&ladder)).expect("reads"));
    }
}
