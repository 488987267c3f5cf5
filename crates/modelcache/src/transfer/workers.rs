//! The workers: they hash and write slices, off the async threads, two hashes at a time on one core.
//!
//! Slices of all fills wait in one queue. A worker that finds two of different streams that are to be hashed takes both
//! and hashes them side by side, which takes little longer than one; it never waits for a second. Few hash at once, so
//! that pairs are found; more may be writing meanwhile. A worker is a blocking task that ends when the queue is empty:
//! nothing is left running, and a process that forks loses nothing.
//!
//! What came before its turn in a file that is hashed in order is read back and hashed slice after slice, as one job
//! that its worker puts in front of the queue again and mostly takes itself: that hash is a chain, and whoever waits for
//! it would wait for a thread to wake between any two. One such job is in front at a time; others queue as all do, and
//! whatever waits longest has the other half of the pair.
//!
//! A slice whose stream is gone is dropped unwritten. What fails, fails the stream that the slice is of.

use super::buffer::{Buffer, SLICE_BYTES};
use crate::digest::Digest;
use crate::disk::{Cursor, StagedWriter};
use crate::error::{Error, ErrorKind, Result};
use crate::ladder::{Ladder, PartHasher};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Workers, at most.
const WORKERS_MAX: usize = 16;
/// Workers, at least: one that hashes, others that wait for the disk.
const WORKERS_MIN: usize = 4;

/// The queue and those who serve it; clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Workers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// A slot for hashing came free, or there is something else to look at.
    freed: Condvar,
    workers_max: usize,
    hashing_max: usize,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<SliceJob>,
    workers: usize,
    hashing: usize,
    /// Pairs hashed so far.
    pairs: u64,
}

/// A slice and what is to be done with it.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) writer: Arc<StagedWriter>,
    /// Where in the file it lies.
    pub(super) offset: u64,
    pub(super) buffer: Buffer,
    pub(super) work: Work,
    pub(super) hash: Hash,
    /// Set on the last slice of a range: what the hash must come to, and the parts that are then complete.
    pub(super) end: Option<(Option<CheckpointPair>, Range<u64>)>,
}

/// Where a slice comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// It is in the buffer, to be written.
    Write,
    /// It is in the file, so many bytes, to be read back.
    ReadBack(usize),
    /// The same, and after it all that there is [to catch up](StagedWriter::next_to_catch_up) with in the file.
    CatchUp(usize),
}

/// How a slice is hashed.
pub(super) enum Hash {
    /// As part of a range that a ladder checks.
    Part(PartHasher),
    /// With its file, if it is next there.
    InOrder,
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Part(_)) { "Part" } else { "InOrder" })
    }
}

/// Two rungs of a ladder: what stands before a part, and what after.
#[derive(Debug, Clone)]
pub(super) struct CheckpointPair {
    pub(super) ladder: Arc<Ladder>,
    /// The part between them.
    pub(super) index: u64,
    /// The file's digest: what the last part ends at.
    pub(super) sha256: Option<Digest>,
}

/// What became of a slice.
#[derive(Debug)]
pub(super) struct SliceOutcome {
    /// Empty.
    pub(super) buffer: Buffer,
    pub(super) hash: Hash,
    /// The ladder did not contradict.
    pub(super) holds: bool,
    /// The file's hash has to catch up with its parts, and nobody else sees to it.
    pub(super) is_to_catch_up: bool,
}

#[derive(Debug)]
struct SliceJob {
    slice: Slice,
    reply: oneshot::Sender<Result<SliceOutcome>>,
}

impl Work {
    /// How many bytes are read from the file; `None` where they are in the buffer.
    pub(super) fn reads_back(self) -> Option<usize> {
        match self {
            Self::Write => None,
            Self::ReadBack(len) | Self::CatchUp(len) => Some(len),
        }
    }
}

impl CheckpointPair {
    /// A hasher that stands before the part.
    pub(super) fn hasher(&self) -> Option<PartHasher> {
        Some(PartHasher::resume(self.ladder.before(self.index)?, self.index * self.ladder.part_size()))
    }

    /// Whether a part, hashed from the rung before it, ends at the rung after it; the last one at the file's digest.
    fn holds(&self, hasher: PartHasher) -> bool {
        match self.ladder.after(self.index) {
            Some(after) => hasher.state() == Some(after),
            None => Some(hasher.finish()) == self.sha256,
        }
    }
}

impl Workers {
    /// For a machine with so many cores.
    pub(super) fn new(cores: usize) -> Self {
        let workers_max = (2 * cores).clamp(WORKERS_MIN, WORKERS_MAX);
        // The other cores receive; one that hashes pairs keeps up with them.
        let hashing_max = (cores / 2).clamp(1, workers_max / 2);
        Self(Arc::new(Shared { state: Mutex::default(), freed: Condvar::new(), workers_max, hashing_max }))
    }

    /// Whether so many slices wait that the workers are behind.
    pub(super) fn are_behind(&self) -> bool {
        self.0.lock().queue.len() > 2 * self.0.hashing_max
    }

    /// Hands a slice over; what becomes of it comes back.
    pub(super) fn submit(&self, slice: Slice) -> Pending {
        let (reply, pending) = oneshot::channel();
        let mut state = self.0.lock();
        state.queue.push_back(SliceJob { slice, reply });
        self.0.see_to(state);
        Pending(pending)
    }

    #[cfg(test)]
    fn pairs(&self) -> u64 {
        self.0.lock().pairs
    }
}

/// A slice that was handed over.
#[derive(Debug)]
pub(super) struct Pending(oneshot::Receiver<Result<SliceOutcome>>);

impl Pending {
    /// What became of it.
    pub(super) async fn done(self) -> Result<SliceOutcome> {
        self.0.await.map_err(|cause| Error::new(ErrorKind::Other, "background work ended unexpectedly").cause(cause))?
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has somebody look at the queue, which `state` was locked to add to.
    fn see_to(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.workers < self.workers_max {
            state.workers += 1;
            let worker = Worker { shared: self.clone(), is_counted: true };
            drop(state);
            tokio::task::spawn_blocking(move || worker.run());
        } else {
            self.freed.notify_one();
        }
    }
}

/// One worker; counted until it knows that the queue is empty.
struct Worker {
    shared: Arc<Shared>,
    is_counted: bool,
}

/// A slot for hashing, taken.
struct Slot<'a>(&'a Shared);

/// What a worker takes at a time.
struct Batch<'a> {
    jobs: Vec<SliceJob>,
    /// `None` where nothing is to be hashed.
    slot: Option<Slot<'a>>,
}

impl Worker {
    fn run(mut self) {
        let shared = self.shared.clone();
        while let Some(batch) = self.next(&shared) {
            let Batch { jobs, slot } = batch;
            let mut jobs: Vec<SliceJob> = jobs.into_iter().filter_map(SliceJob::loaded).collect();
            if let Some(slot) = slot {
                hash(&mut jobs);
                drop(slot);
            }
            let (chains, others): (Vec<SliceJob>, Vec<SliceJob>) = jobs.into_iter().partition(SliceJob::catches_up);
            let chains: Vec<SliceJob> = chains.into_iter().filter_map(SliceJob::go_on).collect();
            if !chains.is_empty() {
                let mut state = shared.lock();
                chains.into_iter().for_each(|chain| state.go_on(chain));
                if !others.is_empty() {
                    // They are written first: somebody else may go on with the chain.
                    shared.see_to(state);
                }
            }
            others.into_iter().for_each(SliceJob::complete);
        }
    }

    /// The next batch; `None` when the queue is empty, and this worker no longer counted.
    fn next<'a>(&mut self, shared: &'a Shared) -> Option<Batch<'a>> {
        let mut state = shared.lock();
        loop {
            state.queue.retain(|job| !job.reply.is_closed());
            if state.queue.is_empty() {
                (state.workers, self.is_counted) = (state.workers - 1, false);
                // Others may still wait for a slot, and for nothing.
                shared.freed.notify_all();
                return None;
            }
            let is_free = state.hashing < shared.hashing_max;
            let Some(at) = state.queue.iter().position(|job| is_free || !job.hashes()) else {
                state = shared.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let mut jobs: Vec<SliceJob> = state.queue.remove(at).into_iter().collect();
            if !is_free || !jobs.iter().all(SliceJob::hashes) {
                return Some(Batch { jobs, slot: None });
            }
            if let Some(at) = state.queue.iter().position(SliceJob::hashes) {
                jobs.extend(state.queue.remove(at));
                state.pairs += 1;
            }
            state.hashing += 1;
            return Some(Batch { jobs, slot: Some(Slot(shared)) });
        }
    }
}

impl State {
    /// Takes a chain back into the queue: in front, for it is the longest of what is to be done, but behind another.
    fn go_on(&mut self, chain: SliceJob) {
        match self.queue.front() {
            Some(first) if first.catches_up() => self.queue.push_back(chain),
            _ => self.queue.push_front(chain),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.is_counted {
            self.shared.lock().workers -= 1;
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.lock().hashing -= 1;
        self.0.freed.notify_one();
    }
}

impl SliceJob {
    /// Whether there is something to hash now.
    fn hashes(&self) -> bool {
        match self.slice.hash {
            Hash::Part(_) => true,
            Hash::InOrder => self.slice.writer.is_next(self.slice.offset),
        }
    }

    /// Whether it goes on until nothing is left to catch up with.
    fn catches_up(&self) -> bool {
        matches!(self.slice.work, Work::CatchUp(_))
    }

    /// With its bytes; `None` if they could not be read, which was then told.
    fn loaded(mut self) -> Option<Self> {
        if let Some(len) = self.slice.work.reads_back()
            && let Err(error) = self.slice.writer.load(self.slice.offset, self.slice.buffer.room(len))
        {
            self.fail(error);
            return None;
        }
        Some(self)
    }

    /// Itself with the next of what there is to catch up with; where that was all, it answers.
    fn go_on(mut self) -> Option<Self> {
        let Some(range) = self.slice.writer.next_to_catch_up() else {
            self.complete();
            return None;
        };
        (self.slice.offset, self.slice.work) = Slice::to_catch_up(&range);
        Some(self)
    }

    /// Checks, writes, marks and answers.
    fn complete(self) {
        let Self { slice, reply } = self;
        let outcome = slice.complete();
        // Nobody may be there any more; then the answer is dropped with its buffer.
        let _ = reply.send(outcome);
    }

    fn fail(self, error: Error) {
        let Self { slice, reply } = self;
        // Whoever is answered may want to be the only one who holds the writer.
        drop(slice);
        let _ = reply.send(Err(error));
    }
}

impl Slice {
    /// What there is to catch up with in a file: `range` of it first, then the rest.
    pub(super) fn catch_up(writer: Arc<StagedWriter>, range: &Range<u64>, buffer: Buffer) -> Self {
        let (offset, work) = Self::to_catch_up(range);
        Self { writer, offset, buffer, work, hash: Hash::InOrder, end: None }
    }

    /// The beginning of `range`.
    fn to_catch_up(range: &Range<u64>) -> (u64, Work) {
        (range.start, Work::CatchUp(slice_of(range)))
    }

    fn complete(self) -> Result<SliceOutcome> {
        let Self { writer, offset, mut buffer, work, hash, end } = self;
        let holds = match (&end, &hash) {
            (Some((Some(rung), _)), Hash::Part(hasher)) => rung.holds(hasher.clone()),
            // A rung that does not exist holds nothing.
            (Some((Some(_), _)), Hash::InOrder) => false,
            _ => true,
        };
        if holds && work == Work::Write {
            writer.store(offset, &buffer)?;
        }
        let mut is_to_catch_up = false;
        if holds && let Some((_, parts)) = end {
            for part in parts {
                is_to_catch_up |= writer.part_done(part)?;
            }
        }
        buffer.clear();
        Ok(SliceOutcome { buffer, hash, holds, is_to_catch_up })
    }
}

/// How much of a range is read at a time.
pub(super) fn slice_of(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(SLICE_BYTES).min(SLICE_BYTES)
}

/// What a slice is hashed into.
enum HashTarget<'a> {
    Part(&'a mut PartHasher),
    Order(Cursor<'a>),
}

impl HashTarget<'_> {
    /// The hasher for the next `len` bytes, if they all belong to one part.
    fn hasher(&mut self, len: usize) -> Option<&mut PartHasher> {
        match self {
            Self::Part(hasher) => Some(hasher),
            Self::Order(cursor) => cursor.hasher(len),
        }
    }

    fn alone(&mut self, bytes: &[u8]) {
        match self {
            Self::Part(hasher) => hasher.update(bytes),
            Self::Order(cursor) => cursor.update(bytes),
        }
    }

    fn end(self, bytes: &[u8]) {
        if let Self::Order(cursor) = self {
            cursor.advance(bytes);
        }
    }
}

/// Where `job` is to be hashed into, if that is possible now, and its bytes.
fn target(job: &mut SliceJob) -> Option<(HashTarget<'_>, &[u8])> {
    let Slice { writer, offset, buffer, hash, .. } = &mut job.slice;
    let into = match hash {
        Hash::Part(hasher) => HashTarget::Part(hasher),
        Hash::InOrder => HashTarget::Order(writer.at_cursor(*offset)?),
    };
    Some((into, buffer))
}

fn hash(jobs: &mut [SliceJob]) {
    let mut targets = jobs.iter_mut().filter_map(target);
    match (targets.next(), targets.next()) {
        (Some((mut one, x)), Some((mut other, y))) => {
            match (one.hasher(x.len()), other.hasher(y.len())) {
                (Some(a), Some(b)) => PartHasher::update_pair(a, x, b, y),
                _ => {
                    one.alone(x);
                    other.alone(y);
                }
            }
            one.end(x);
            other.end(y);
        }
        (Some((mut one, x)), None) => {
            one.alone(x);
            one.end(x);
        }
        (None, _) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{RootedPath, StagedFileSpec};
    use crate::ladder::LadderHasher;
    use crate::transfer::buffer::BufferPool;
    use std::fs;
    use tempfile::TempDir;

    const PART: u64 = 4 * SLICE_BYTES as u64;

    fn bytes(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|at| (at as u64).wrapping_mul(2_654_435_761).to_le_bytes()[2] ^ seed).collect()
    }

    fn writer(folder: &TempDir, name: &str, size: usize, in_order: bool) -> Arc<StagedWriter> {
        let (path, size) = (RootedPath::root(folder.path()).join(name), size as u64);
        let draft = StagedFileSpec { path, size, part_size: PART, in_order, git: false, direct: false };
        Arc::new(StagedWriter::create(draft, None).expect("creates"))
    }

    async fn slice(pool: &BufferPool, writer: &Arc<StagedWriter>, offset: usize, bytes: &[u8], hash: Hash) -> Slice {
        let mut buffer = pool.take().await;
        buffer.fill(bytes, usize::MAX);
        Slice { writer: writer.clone(), offset: offset as u64, buffer, work: Work::Write, hash, end: None }
    }

    /// Two files in order and a part of a third, all at once and by so many slices that pairs are found.
    #[tokio::test(flavor = "multi_thread")]
    async fn streams_hashed_side_by_side_come_to_what_each_is() {
        let (folder, pool, workers) = (TempDir::new().expect("folder"), BufferPool::new(None), Workers::new(1));
        let contents: Vec<_> = (1..=3).map(|seed| bytes(PART as usize + 1000 * usize::from(seed), seed)).collect();
        let digests: Vec<_> = contents.iter().map(|content| Digest::of(content)).collect();
        let mut ladders = contents.iter().map(|content| {
            let mut hasher = LadderHasher::new(PART);
            hasher.update(content);
            Arc::new(hasher.finish().1)
        });
        let streams = contents.iter().enumerate().map(|(at, content)| {
            let (pool, workers, ladder) = (pool.clone(), workers.clone(), ladders.next().expect("one each"));
            let (writer, digest) = (writer(&folder, &at.to_string(), content.len(), at < 2), digests[at]);
            async move {
                let rung = CheckpointPair { ladder, index: 0, sha256: Some(digest) };
                let mut hash = if at < 2 { Hash::InOrder } else { Hash::Part(rung.hasher().expect("the first")) };
                let last = if at < 2 { content.len() } else { PART as usize };
                for offset in (0..last).step_by(SLICE_BYTES) {
                    let end = (offset + SLICE_BYTES).min(last);
                    let mut slice = slice(&pool, &writer, offset, &content[offset..end], hash).await;
                    let rung = (at == 2).then(|| rung.clone());
                    slice.end = (end == last).then_some((rung, 0..1));
                    let done = workers.submit(slice).done().await.expect("works");
                    assert!(done.holds && done.buffer.is_empty());
                    hash = done.hash;
                }
                if at < 2 {
                    assert_eq!(writer.hashed().sha256, digest);
                }
            }
        });
        let streams: Vec<_> = streams.collect();
        futures::future::join_all(streams).await;
        assert_eq!(workers.0.lock().hashing, 0);
    }

    /// With one slot for hashing, what waits for it is taken by twos.
    #[tokio::test(flavor = "multi_thread")]
    async fn slices_that_wait_are_taken_by_twos() {
        let (folder, pool, workers) = (TempDir::new().expect("folder"), BufferPool::new(None), Workers::new(1));
        let content = bytes(SLICE_BYTES, 7);
        let writers: Vec<_> = (0..8).map(|at| writer(&folder, &at.to_string(), SLICE_BYTES, true)).collect();
        workers.0.lock().hashing = 1;
        let mut pending = Vec::new();
        for writer in &writers {
            pending.push(workers.submit(slice(&pool, writer, 0, &content, Hash::InOrder).await));
        }
        drop(Slot(&workers.0));
        for pending in pending {
            pending.done().await.expect("works");
        }
        assert_eq!(workers.pairs(), 4);
        assert!(writers.iter().all(|writer| writer.hashed().sha256 == Digest::of(&content)));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_came_early_is_caught_up_with_at_one_request() {
        let (folder, pool, workers) = (TempDir::new().expect("folder"), BufferPool::new(None), Workers::new(2));
        let content = bytes(3 * PART as usize - 5, 3);
        let writer = writer(&folder, "f", content.len(), true);
        let mut told = Vec::new();
        for part in [2, 1, 0] {
            let range = part * PART as usize..((part + 1) * PART as usize).min(content.len());
            for offset in range.clone().step_by(SLICE_BYTES) {
                let end = (offset + SLICE_BYTES).min(range.end);
                let mut slice = slice(&pool, &writer, offset, &content[offset..end], Hash::InOrder).await;
                slice.end = (end == range.end).then(|| (None, part as u64..part as u64 + 1));
                let done = workers.submit(slice).done().await.expect("works");
                if end == range.end {
                    told.push((done.is_to_catch_up, writer.parts_behind()));
                }
            }
        }
        assert_eq!(told, [(false, 0), (false, 0), (true, 0)], "the first part was hashed as it came");
        let range = writer.next_to_catch_up().expect("the second part");
        assert_eq!((range.clone(), writer.parts_behind()), (PART..2 * PART, 2), "somebody is at work");
        let slice = Slice::catch_up(writer.clone(), &range, pool.take().await);
        workers.submit(slice).done().await.expect("works");
        assert_eq!((writer.next_to_catch_up(), writer.parts_behind()), (None, 0));
        assert_eq!(writer.hashed().sha256, Digest::of(&content));
    }

    /// Else two long chains would have every slot for themselves, and whoever waits would wait for their ends.
    #[tokio::test]
    async fn one_chain_is_in_front_and_the_next_queues_as_all_do() {
        let (folder, pool) = (TempDir::new().expect("folder"), BufferPool::new(None));
        let (mut state, mut pending) = (State::default(), Vec::new());
        for name in ["other", "one", "two"] {
            let writer = writer(&folder, name, SLICE_BYTES, true);
            let mut slice = slice(&pool, &writer, 0, &[1], Hash::InOrder).await;
            let (reply, answer) = oneshot::channel();
            pending.push(answer);
            if name == "other" {
                state.queue.push_back(SliceJob { slice, reply });
            } else {
                slice.work = Work::CatchUp(1);
                state.go_on(SliceJob { slice, reply });
            }
        }
        let order: Vec<bool> = state.queue.iter().map(SliceJob::catches_up).collect();
        assert_eq!(order, [true, false, true]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_wrong_part_is_not_marked_and_a_failed_write_fails_its_own_stream_only() {
        let (folder, pool, workers) = (TempDir::new().expect("folder"), BufferPool::new(None), Workers::new(2));
        let content = bytes(2 * PART as usize, 9);
        let mut hasher = LadderHasher::new(PART);
        hasher.update(&content);
        let (sha256, ladder) = hasher.finish();
        let rung = CheckpointPair { ladder: Arc::new(ladder), index: 1, sha256: Some(sha256) };
        let part = writer(&folder, "part", content.len(), false);
        let hash = Hash::Part(rung.hasher().expect("the second"));
        let mut wrong = slice(&pool, &part, PART as usize, &content[..SLICE_BYTES], hash).await;
        wrong.end = Some((Some(rung), 1..2));
        // It lies where no file can have a byte.
        let beyond = slice(&pool, &part, usize::MAX >> 1, &content[..SLICE_BYTES], Hash::InOrder).await;
        let other = writer(&folder, "other", SLICE_BYTES, true);
        let fine = slice(&pool, &other, 0, &content[..SLICE_BYTES], Hash::InOrder).await;
        let [wrong, beyond, fine] = [wrong, beyond, fine].map(|slice| workers.submit(slice));
        assert!(!wrong.done().await.expect("is no failure").holds);
        assert!(beyond.done().await.is_err());
        assert!(fine.done().await.expect("works").holds);
        let journal = fs::read(folder.path().join("part.parts")).expect("journal");
        assert!(!journal.contains(&b'1'), "{journal:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_nobody_waits_for_is_dropped_unwritten() {
        let (folder, pool, workers) = (TempDir::new().expect("folder"), BufferPool::new(None), Workers::new(1));
        let content = bytes(SLICE_BYTES, 1);
        let writer = writer(&folder, "f", SLICE_BYTES, true);
        workers.0.lock().hashing = 1;
        drop(workers.submit(slice(&pool, &writer, 0, &content, Hash::InOrder).await));
        drop(Slot(&workers.0));
        let last = slice(&pool, &writer, 0, &content[..1], Hash::InOrder).await;
        workers.submit(last).done().await.expect("works");
        assert!(writer.is_next(1), "only what was waited for was hashed");
    }
}
