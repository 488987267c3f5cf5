//! Worker pool that hashes and writes slices outside the async threads.
//!
//! The slices of all fills wait in one queue. A worker hashes two slices of different streams interleaved on one core,
//! which takes little longer than hashing one. The number of workers that hash concurrently is limited, so that pairs
//! form. More workers may write at the same time. A worker is a blocking task that ends when the queue is empty, so no
//! thread remains that a forked process would lack.
//!
//! The slices of a dropped stream are discarded unwritten. An error affects only the stream that the slice belongs to.

use super::buffer::{Buffer, SLICE_BYTES};
use crate::digest::Digest;
use crate::disk::{Cursor, StagedWriter};
use crate::error::{Error, ErrorKind, Result};
use crate::ladder::{Ladder, PartHasher};
use crate::mutex::Mutex;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Upper bound on the number of workers.
const WORKERS_MAX: usize = 16;
/// Lower bound on the maximum number of workers: one hashes while others wait for the disk.
const WORKERS_MIN: usize = 4;

/// The queue of slices and its workers. Clones share one pool.
#[derive(Debug, Clone)]
pub(super) struct Workers(Arc<WorkerPool>);

#[derive(Debug)]
struct WorkerPool {
    state: Mutex<QueueState>,
    /// Signals that a hashing slot became free or that the queue changed.
    freed: Condvar,
    workers_max: usize,
    /// Number of hashing slots.
    hashing_max: usize,
    /// See [`Workers::new`].
    backlog_bytes_max: usize,
}

#[derive(Debug, Default)]
struct QueueState {
    queue: VecDeque<SliceJob>,
    /// Number of running workers.
    workers: usize,
    /// Number of hashing slots in use.
    hashing: usize,
    /// Number of pairs hashed so far.
    pairs: u64,
}

/// A slice and the work to do with it.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) writer: Arc<StagedWriter>,
    /// Offset of the slice in the file.
    pub(super) offset: u64,
    pub(super) buffer: Buffer,
    pub(super) work: Work,
    pub(super) hash: Hash,
    /// Set on the last slice of a part: the checkpoints to verify, if any, and the parts that are then complete.
    pub(super) end: Option<(Option<CheckpointPair>, Range<u64>)>,
}

/// Where the bytes of a slice come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// The bytes are in the buffer and are written to the file.
    Write,
    /// This many bytes are read back from the file.
    ReadBack(usize),
    /// This many bytes are read back from the file. After them the job continues with all further bytes that
    /// [must be hashed](StagedWriter::next_to_catch_up).
    CatchUp(usize),
}

/// How a slice is hashed.
pub(super) enum Hash {
    /// As a part that a ladder verifies, with the hasher of that part.
    Part(PartHasher),
    /// With the in-order hash of the file, if the slice is at its cursor.
    InOrder,
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Part(_)) { "Part" } else { "InOrder" })
    }
}

/// The two checkpoints of a ladder around one part: the hash state before it and the one after it.
#[derive(Debug, Clone)]
pub(super) struct CheckpointPair {
    pub(super) ladder: Arc<Ladder>,
    /// Index of the part.
    pub(super) index: u64,
    /// The digest of the file, which takes the place of the checkpoint after the last part.
    pub(super) sha256: Option<Digest>,
}

/// The result of processing a slice.
#[derive(Debug)]
pub(super) struct SliceOutcome {
    /// The emptied buffer.
    pub(super) buffer: Buffer,
    pub(super) hash: Hash,
    /// False if the hash does not match the checkpoint after the part.
    pub(super) matches: bool,
    /// True if the caller must now hash the parts that arrived early. Only one task gets this value.
    pub(super) must_catch_up: bool,
}

/// A queued slice and the channel for its outcome.
#[derive(Debug)]
struct SliceJob {
    slice: Slice,
    reply: oneshot::Sender<Result<SliceOutcome>>,
}

impl Work {
    /// Returns the number of bytes to read from the file; `None` if they are in the buffer.
    pub(super) fn bytes_to_read_back(self) -> Option<usize> {
        match self {
            Self::Write => None,
            Self::ReadBack(len) | Self::CatchUp(len) => Some(len),
        }
    }
}

impl CheckpointPair {
    /// Returns a hasher with the state before the part.
    pub(super) fn hasher(&self) -> Option<PartHasher> {
        Some(PartHasher::resume(self.ladder.before(self.index)?, self.index * self.ladder.part_size()))
    }

    /// Returns true if `hasher`, which has hashed the part, matches the checkpoint after it, or the file's digest after
    /// the last part.
    fn matches(&self, hasher: PartHasher) -> bool {
        match self.ladder.after(self.index) {
            Some(after) => hasher.state() == Some(after),
            None => Some(hasher.finish()) == self.sha256,
        }
    }
}

impl Workers {
    /// Creates a pool for a machine with `cores` cores. The workers count as the bottleneck if more than
    /// `backlog_bytes_max` bytes are queued. Shorter queues are normal, because slices of many connections arrive
    /// together.
    pub(super) fn new(cores: usize, backlog_bytes_max: usize) -> Self {
        let workers_max = (2 * cores).clamp(WORKERS_MIN, WORKERS_MAX);
        // Half of the cores receive. A core that hashes pairs keeps up with a core that receives.
        let hashing_max = (cores / 2).clamp(1, workers_max / 2);
        Self(Arc::new(WorkerPool {
            state: Mutex::default(),
            freed: Condvar::new(),
            workers_max,
            hashing_max,
            backlog_bytes_max,
        }))
    }

    /// Returns true if the queue is so long that the workers, not the network, are the bottleneck.
    pub(super) fn are_behind(&self) -> bool {
        let queued: usize = self.0.state.lock().queue.iter().map(|job| job.slice.buffer.capacity()).sum();
        queued > self.0.backlog_bytes_max
    }

    /// Queues a slice. The returned value resolves to its outcome.
    pub(super) fn submit(&self, slice: Slice) -> PendingSlice {
        let (reply, pending) = oneshot::channel();
        let mut state = self.0.state.lock();
        state.queue.push_back(SliceJob { slice, reply });
        self.0.wake_worker(state);
        PendingSlice(pending)
    }

    #[cfg(test)]
    fn pairs(&self) -> u64 {
        self.0.state.lock().pairs
    }
}

/// A submitted slice. Dropping this value cancels the slice if no worker has taken it yet.
#[derive(Debug)]
pub(super) struct PendingSlice(oneshot::Receiver<Result<SliceOutcome>>);

impl PendingSlice {
    /// Waits for the outcome of the slice.
    pub(super) async fn outcome(self) -> Result<SliceOutcome> {
        self.0
            .await
            .map_err(|cause| Error::new(ErrorKind::Other, "the worker of a slice ended unexpectedly").cause(cause))?
    }
}

impl WorkerPool {
    /// Starts or wakes a worker after a job was added to the queue. `state` is the lock under which the job was added.
    fn wake_worker(self: &Arc<Self>, mut state: MutexGuard<'_, QueueState>) {
        if state.workers < self.workers_max {
            // Count the new worker under the lock, so that no more than `workers_max` are started.
            state.workers += 1;
            let worker = Worker { pool: self.clone(), is_counted: true };
            drop(state);
            tokio::task::spawn_blocking(move || worker.run());
        } else {
            self.freed.notify_one();
        }
    }
}

/// One worker. It is counted in [`QueueState::workers`] until it finds the queue empty.
struct Worker {
    pool: Arc<WorkerPool>,
    is_counted: bool,
}

/// A hashing slot in use. Dropping it frees the slot.
struct Slot<'a>(&'a WorkerPool);

/// The jobs that a worker takes from the queue at a time: one, or a pair to hash interleaved.
struct Batch<'a> {
    jobs: Vec<SliceJob>,
    /// `None` if the job cannot be hashed yet, because the in-order hash has not reached its slice.
    slot: Option<Slot<'a>>,
}

impl Worker {
    fn run(mut self) {
        let pool = self.pool.clone();
        while let Some(batch) = self.next(&pool) {
            let Batch { jobs, slot } = batch;
            // 1. Load the bytes that are to be read back.
            let mut jobs: Vec<SliceJob> = jobs.into_iter().filter_map(SliceJob::load_bytes).collect();
            // 2. Hash them and free the slot at once: writing needs none.
            if let Some(slot) = slot {
                hash(&mut jobs);
                drop(slot);
            }
            // 3. Requeue catch-up jobs that have more to hash, before the slow writes below.
            let (catch_up_jobs, others): (Vec<SliceJob>, Vec<SliceJob>) =
                jobs.into_iter().partition(SliceJob::catches_up);
            let unfinished: Vec<SliceJob> = catch_up_jobs.into_iter().filter_map(SliceJob::next_slice).collect();
            if !unfinished.is_empty() {
                let mut state = pool.state.lock();
                unfinished.into_iter().for_each(|job| state.requeue_catch_up(job));
                if !others.is_empty() {
                    // This worker writes next, so another one may continue the catch-up job.
                    pool.wake_worker(state);
                }
            }
            // 4. Verify and write the slices of the other jobs, and send their outcomes.
            others.into_iter().for_each(SliceJob::complete);
        }
    }

    /// Returns the next batch, or `None` if the queue is empty; then this worker is no longer counted. Waits while all
    /// queued jobs need a hashing slot and none is free.
    fn next<'a>(&mut self, pool: &'a WorkerPool) -> Option<Batch<'a>> {
        let mut state = pool.state.lock();
        loop {
            // Discard the slices of dropped streams.
            state.queue.retain(|job| !job.reply.is_closed());
            if state.queue.is_empty() {
                (state.workers, self.is_counted) = (state.workers - 1, false);
                // Other workers may still wait for a slot although the queue is empty; let them end, too.
                pool.freed.notify_all();
                return None;
            }
            // Take the first job that can run now. Without a free slot, that is one that cannot be hashed yet: it is
            // only written, and hashed later.
            let is_free = state.hashing < pool.hashing_max;
            let Some(at) = state.queue.iter().position(|job| is_free || !job.can_hash()) else {
                state = pool.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let mut jobs: Vec<SliceJob> = state.queue.remove(at).into_iter().collect();
            if !is_free || !jobs.iter().all(SliceJob::can_hash) {
                return Some(Batch { jobs, slot: None });
            }
            // Pair it with a second job that can be hashed, if there is one. Never wait for it.
            if let Some(at) = state.queue.iter().position(SliceJob::can_hash) {
                jobs.extend(state.queue.remove(at));
                state.pairs += 1;
            }
            state.hashing += 1;
            return Some(Batch { jobs, slot: Some(Slot(pool)) });
        }
    }
}

impl QueueState {
    /// Puts a catch-up job back into the queue.
    ///
    /// The job goes to the front, because its slices depend on each other, and each wait delays all that follow.
    /// Usually the same worker takes it again. If another catch-up job is in front, this one goes to the end, so that
    /// two long jobs cannot occupy every slot.
    fn requeue_catch_up(&mut self, job: SliceJob) {
        match self.queue.front() {
            Some(first) if first.catches_up() => self.queue.push_back(job),
            _ => self.queue.push_front(job),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.is_counted {
            self.pool.state.lock().workers -= 1;
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.state.lock().hashing -= 1;
        self.0.freed.notify_one();
    }
}

impl SliceJob {
    /// Returns true if the slice can be hashed now: as a part, or because the in-order hash has reached it.
    fn can_hash(&self) -> bool {
        match self.slice.hash {
            Hash::Part(_) => true,
            Hash::InOrder => self.slice.writer.is_next(self.slice.offset),
        }
    }

    /// Returns true for a catch-up job, which continues until no bytes are left to hash.
    fn catches_up(&self) -> bool {
        matches!(self.slice.work, Work::CatchUp(_))
    }

    /// Reads the bytes back if necessary. Returns `None` if that failed; the error was then sent to the stream.
    fn load_bytes(mut self) -> Option<Self> {
        if let Some(len) = self.slice.work.bytes_to_read_back()
            && let Err(error) = self.slice.writer.load(self.slice.offset, self.slice.buffer.space(len))
        {
            self.fail(error);
            return None;
        }
        Some(self)
    }

    /// Advances a catch-up job to its next slice. Returns `None` after the last one, having sent the outcome.
    fn next_slice(mut self) -> Option<Self> {
        let Some(range) = self.slice.writer.next_to_catch_up() else {
            self.complete();
            return None;
        };
        (self.slice.offset, self.slice.work) = Slice::to_catch_up(&range);
        Some(self)
    }

    /// Verifies and writes the slice, marks completed parts and sends the outcome.
    fn complete(self) {
        let Self { slice, reply } = self;
        let outcome = slice.complete();
        // If the stream was dropped meanwhile, the outcome and its buffer are dropped, too.
        let _ = reply.send(outcome);
    }

    /// Sends `error` to the stream.
    fn fail(self, error: Error) {
        let Self { slice, reply } = self;
        // Release the writer first: the receiver may need to be its only owner.
        drop(slice);
        let _ = reply.send(Err(error));
    }
}

impl Slice {
    /// Creates a catch-up job for a file. It starts with `range` and continues with all further bytes that can be
    /// hashed.
    pub(super) fn catch_up(writer: Arc<StagedWriter>, range: &Range<u64>, buffer: Buffer) -> Self {
        let (offset, work) = Self::to_catch_up(range);
        Self { writer, offset, buffer, work, hash: Hash::InOrder, end: None }
    }

    /// Returns the offset and the work for the first slice of `range`.
    fn to_catch_up(range: &Range<u64>) -> (u64, Work) {
        (range.start, Work::CatchUp(slice_len(range)))
    }

    /// Verifies and writes the slice, and marks the parts that it completes.
    fn complete(self) -> Result<SliceOutcome> {
        let Self { writer, offset, mut buffer, work, hash, end } = self;
        let matches = match (&end, &hash) {
            (Some((Some(checkpoints), _)), Hash::Part(hasher)) => checkpoints.matches(hasher.clone()),
            // There is a ladder, but no checkpoint for the part, so it cannot be verified.
            (Some((Some(_), _)), Hash::InOrder) => false,
            _ => true,
        };
        // The last slice of a part that fails verification is not written.
        if matches && work == Work::Write {
            writer.store(offset, &buffer)?;
        }
        let mut must_catch_up = false;
        // Mark the parts only now, after all their bytes are written and verified.
        if matches && let Some((_, parts)) = end {
            for part in parts {
                must_catch_up |= writer.part_done(part)?;
            }
        }
        buffer.clear();
        Ok(SliceOutcome { buffer, hash, matches, must_catch_up })
    }
}

/// Returns the length of the first slice of `range`, in bytes.
pub(super) fn slice_len(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(SLICE_BYTES).min(SLICE_BYTES)
}

/// The hash that a slice is added to.
enum HashTarget<'a> {
    Part(&'a mut PartHasher),
    InOrder(Cursor<'a>),
}

impl HashTarget<'_> {
    /// Returns the hasher for the next `len` bytes, if they all belong to one part.
    fn hasher(&mut self, len: usize) -> Option<&mut PartHasher> {
        match self {
            Self::Part(hasher) => Some(hasher),
            Self::InOrder(cursor) => cursor.hasher(len),
        }
    }

    /// Hashes `bytes`, which may cross a part boundary.
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Part(hasher) => hasher.update(bytes),
            Self::InOrder(cursor) => cursor.update(bytes),
        }
    }

    /// Moves the in-order cursor past the hashed `bytes`.
    fn end(self, bytes: &[u8]) {
        if let Self::InOrder(cursor) = self {
            cursor.advance(bytes);
        }
    }
}

/// Returns the hash to add the slice of `job` to and its bytes, or `None` if the slice cannot be hashed now.
fn hash_target(job: &mut SliceJob) -> Option<(HashTarget<'_>, &[u8])> {
    let Slice { writer, offset, buffer, hash, .. } = &mut job.slice;
    let target = match hash {
        Hash::Part(hasher) => HashTarget::Part(hasher),
        Hash::InOrder => HashTarget::InOrder(writer.take_cursor(*offset)?),
    };
    Some((target, buffer))
}

/// Hashes one slice, or two interleaved.
fn hash(jobs: &mut [SliceJob]) {
    let mut targets = jobs.iter_mut().filter_map(hash_target);
    match (targets.next(), targets.next()) {
        (Some((mut one, x)), Some((mut other, y))) => {
            match (one.hasher(x.len()), other.hasher(y.len())) {
                // The interleaved code cannot store checkpoints, so a slice that crosses a part boundary is hashed
                // alone.
                (Some(a), Some(b)) => PartHasher::update_pair(a, x, b, y),
                _ => {
                    one.update(x);
                    other.update(y);
                }
            }
            one.end(x);
            other.end(y);
        }
        (Some((mut one, x)), None) => {
            one.update(x);
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
        let spec = StagedFileSpec { path, size, part_size: PART, in_order, git: false, direct: false };
        Arc::new(StagedWriter::create(spec, None).expect("creates"))
    }

    async fn slice(pool: &BufferPool, writer: &Arc<StagedWriter>, offset: usize, bytes: &[u8], hash: Hash) -> Slice {
        let mut buffer = pool.take(SLICE_BYTES).await;
        buffer.fill(bytes, usize::MAX);
        Slice { writer: writer.clone(), offset: offset as u64, buffer, work: Work::Write, hash, end: None }
    }

    /// Two files are hashed in order and a third by its ladder, at the same time, with enough slices to form pairs.
    #[tokio::test(flavor = "multi_thread")]
    async fn interleaved_hashing_gives_the_digest_of_each_stream() {
        let (folder, pool, workers) =
            (TempDir::new().expect("folder"), BufferPool::new(24 << 20, None), Workers::new(1, 4 << 20));
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
                let checkpoints = CheckpointPair { ladder, index: 0, sha256: Some(digest) };
                let mut hash =
                    if at < 2 { Hash::InOrder } else { Hash::Part(checkpoints.hasher().expect("the first")) };
                let last = if at < 2 { content.len() } else { PART as usize };
                for offset in (0..last).step_by(SLICE_BYTES) {
                    let end = (offset + SLICE_BYTES).min(last);
                    let mut slice = slice(&pool, &writer, offset, &content[offset..end], hash).await;
                    let checkpoints = (at == 2).then(|| checkpoints.clone());
                    slice.end = (end == last).then_some((checkpoints, 0..1));
                    let done = workers.submit(slice).outcome().await.expect("works");
                    assert!(done.matches && done.buffer.is_empty());
                    hash = done.hash;
                }
                if at < 2 {
                    assert_eq!(writer.hashed().sha256, digest);
                }
            }
        });
        let streams: Vec<_> = streams.collect();
        futures::future::join_all(streams).await;
        assert_eq!(workers.0.state.lock().hashing, 0);
    }

    /// With one hashing slot, queued slices are taken in pairs.
    #[tokio::test(flavor = "multi_thread")]
    async fn queued_slices_are_hashed_in_pairs() {
        let (folder, pool, workers) =
            (TempDir::new().expect("folder"), BufferPool::new(24 << 20, None), Workers::new(1, 4 << 20));
        let content = bytes(SLICE_BYTES, 7);
        let writers: Vec<_> = (0..8).map(|at| writer(&folder, &at.to_string(), SLICE_BYTES, true)).collect();
        workers.0.state.lock().hashing = 1;
        let mut pending = Vec::new();
        for writer in &writers {
            pending.push(workers.submit(slice(&pool, writer, 0, &content, Hash::InOrder).await));
        }
        drop(Slot(&workers.0));
        for pending in pending {
            pending.outcome().await.expect("works");
        }
        assert_eq!(workers.pairs(), 4);
        assert!(writers.iter().all(|writer| writer.hashed().sha256 == Digest::of(&content)));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn parts_that_arrived_early_are_hashed_by_one_job() {
        let (folder, pool, workers) =
            (TempDir::new().expect("folder"), BufferPool::new(24 << 20, None), Workers::new(2, 4 << 20));
        let content = bytes(3 * PART as usize - 5, 3);
        let writer = writer(&folder, "f", content.len(), true);
        let mut outcomes = Vec::new();
        for part in [2, 1, 0] {
            let range = part * PART as usize..((part + 1) * PART as usize).min(content.len());
            for offset in range.clone().step_by(SLICE_BYTES) {
                let end = (offset + SLICE_BYTES).min(range.end);
                let mut slice = slice(&pool, &writer, offset, &content[offset..end], Hash::InOrder).await;
                slice.end = (end == range.end).then(|| (None, part as u64..part as u64 + 1));
                let done = workers.submit(slice).outcome().await.expect("works");
                if end == range.end {
                    outcomes.push((done.must_catch_up, writer.parts_behind()));
                }
            }
        }
        assert_eq!(outcomes, [(false, 0), (false, 0), (true, 0)], "the first part was hashed as it came");
        let range = writer.next_to_catch_up().expect("the second part");
        assert_eq!((range.clone(), writer.parts_behind()), (PART..2 * PART, 2), "a job is at work");
        let slice = Slice::catch_up(writer.clone(), &range, pool.take(SLICE_BYTES).await);
        workers.submit(slice).outcome().await.expect("works");
        assert_eq!((writer.next_to_catch_up(), writer.parts_behind()), (None, 0));
        assert_eq!(writer.hashed().sha256, Digest::of(&content));
    }

    /// Otherwise two long catch-up jobs would occupy every slot until their ends.
    #[tokio::test]
    async fn only_one_catch_up_job_is_in_front_of_the_queue() {
        let (folder, pool) = (TempDir::new().expect("folder"), BufferPool::new(24 << 20, None));
        let (mut state, mut pending) = (QueueState::default(), Vec::new());
        for name in ["other", "one", "two"] {
            let writer = writer(&folder, name, SLICE_BYTES, true);
            let mut slice = slice(&pool, &writer, 0, &[1], Hash::InOrder).await;
            let (reply, receiver) = oneshot::channel();
            pending.push(receiver);
            if name == "other" {
                state.queue.push_back(SliceJob { slice, reply });
            } else {
                slice.work = Work::CatchUp(1);
                state.requeue_catch_up(SliceJob { slice, reply });
            }
        }
        let order: Vec<bool> = state.queue.iter().map(SliceJob::catches_up).collect();
        assert_eq!(order, [true, false, true]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_wrong_part_is_not_marked_and_a_failed_write_fails_its_own_stream_only() {
        let (folder, pool, workers) =
            (TempDir::new().expect("folder"), BufferPool::new(24 << 20, None), Workers::new(2, 4 << 20));
        let content = bytes(2 * PART as usize, 9);
        let mut hasher = LadderHasher::new(PART);
        hasher.update(&content);
        let (sha256, ladder) = hasher.finish();
        let checkpoints = CheckpointPair { ladder: Arc::new(ladder), index: 1, sha256: Some(sha256) };
        let part = writer(&folder, "part", content.len(), false);
        let hash = Hash::Part(checkpoints.hasher().expect("the second"));
        let mut wrong = slice(&pool, &part, PART as usize, &content[..SLICE_BYTES], hash).await;
        wrong.end = Some((Some(checkpoints), 1..2));
        // Beyond the largest offset that a file can have.
        let beyond = slice(&pool, &part, usize::MAX >> 1, &content[..SLICE_BYTES], Hash::InOrder).await;
        let other = writer(&folder, "other", SLICE_BYTES, true);
        let fine = slice(&pool, &other, 0, &content[..SLICE_BYTES], Hash::InOrder).await;
        let [wrong, beyond, fine] = [wrong, beyond, fine].map(|slice| workers.submit(slice));
        assert!(!wrong.outcome().await.expect("is no failure").matches);
        assert!(beyond.outcome().await.is_err());
        assert!(fine.outcome().await.expect("works").matches);
        let journal = fs::read(folder.path().join("part.parts")).expect("journal");
        assert!(!journal.contains(&b'1'), "{journal:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_slice_whose_stream_was_dropped_is_not_written() {
        let (folder, pool, workers) =
            (TempDir::new().expect("folder"), BufferPool::new(24 << 20, None), Workers::new(1, 4 << 20));
        let content = bytes(SLICE_BYTES, 1);
        let writer = writer(&folder, "f", SLICE_BYTES, true);
        workers.0.state.lock().hashing = 1;
        drop(workers.submit(slice(&pool, &writer, 0, &content, Hash::InOrder).await));
        drop(Slot(&workers.0));
        let last = slice(&pool, &writer, 0, &content[..1], Hash::InOrder).await;
        workers.submit(last).outcome().await.expect("works");
        assert!(writer.is_next(1), "the dropped slice was not hashed");
    }
}
