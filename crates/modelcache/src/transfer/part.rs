//! One range of a file, got right: from the first source that gives it, in as many requests as that takes.
//!
//! What comes is gathered in slices. A slice is handed to the workers while the next one is being received; there is
//! never more than one of a range in their hands, so that its hash goes on in order. A range that is cut goes on where
//! it stopped, one that fails its check is fetched once more, one that is far slower than others is asked for again
//! over a second connection.
//!
//! The last slice of a range is held back until the answer has ended. An answer that goes on has other bytes than it
//! says: nothing of it is marked as complete, and the range starts over. Where the file is hashed in order and bytes of
//! the range are in the hash already, the whole file starts over ([`PartFailure::Spoiled`]).
//!
//! Surprise: requests are counted by permits, and a range gives its permit back while it only waits.

use super::answer::StallDetector;
use super::blocking;
use super::buffer::{Buffer, SLICE_BYTES};
use super::download::{DownloadFile, Failures, Local, PartFailure};
use super::engine::Engine;
use super::hedge::HedgedRead;
use super::limiter::Permit;
use super::retry::{Attempts, Retry};
use super::workers::{CheckpointPair, Hash, Pending, Slice, SliceOutcome, Work, slice_of};
use crate::disk::StagedWriter;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::{Ladder, PartHasher};
use crate::progress::Progress;
use crate::source::Source;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often a range is compared with its peers.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What one part's task needs.
#[derive(Debug, Clone)]
pub(super) struct PartTask {
    pub(super) engine: Arc<Engine>,
    pub(super) retry: Retry,
    pub(super) file: Arc<DownloadFile>,
    pub(super) writer: Arc<StagedWriter>,
    /// Of what is written, as the arrival has it.
    pub(super) generation: u64,
    /// Sources left for this attempt at the file, best first.
    pub(super) sources: Vec<Arc<dyn Source>>,
    pub(super) ladder: Option<Arc<Ladder>>,
    pub(super) part_size: u64,
    /// The file comes as one stream: the server gives no ranges.
    pub(super) one_stream: bool,
    /// Parts that an ended fill says it wrote.
    pub(super) left_over: Arc<BTreeSet<u64>>,
    pub(super) failures: Arc<Failures>,
    /// Bytes that this attempt has shown as done.
    pub(super) shown: Arc<AtomicU64>,
    pub(super) local: Arc<Local>,
    pub(super) progress: Progress,
}

impl PartTask {
    /// Sees that the bytes in `range` are written and right.
    pub(super) async fn run(self, range: Range<u64>, permit: Permit) -> Result<(), PartFailure> {
        let mut part = PartProgress::new(&self, &range);
        if self.left_over(&range, &mut part).await? {
            drop(permit);
        } else {
            self.part(&range, permit, &mut part).await?;
        }
        self.file.partial_file.part_received(self.generation, &range);
        if let Some(sink) = &self.file.on_part {
            sink.notify(&self.file.path, self.generation, range);
        }
        if part.is_to_catch_up { Ok(self.catch_up().await?) } else { Ok(()) }
    }

    fn show(&self, bytes: u64) {
        self.shown.fetch_add(bytes, Ordering::Relaxed);
        self.progress.done(bytes);
    }

    fn unshow(&self, bytes: u64) {
        self.shown.fetch_sub(bytes, Ordering::Relaxed);
        self.progress.undone(bytes);
    }

    /// Takes the part in `range` as an ended fill left it, if it did and, where a ladder can tell, it is right.
    async fn left_over(&self, range: &Range<u64>, part: &mut PartProgress) -> Result<bool, PartFailure> {
        let index = range.start / self.part_size;
        if !self.left_over.contains(&index) {
            return Ok(false);
        }
        if self.ladder.is_some() {
            while part.next < range.end {
                let buffer = part.buffer(self).await?;
                part.submit(self, range, Work::ReadBack(slice_of(&(part.next..range.end))), buffer).await?;
            }
            if !part.settle(self).await? {
                part.restart(self, range);
                return Ok(false);
            }
        } else {
            let writer = self.writer.clone();
            part.is_to_catch_up = blocking(move || writer.part_done(index)).await?;
            self.show(range.end - range.start);
        }
        self.local.resumed.fetch_add(range.end - range.start, Ordering::Relaxed);
        Ok(true)
    }

    /// Reads back and hashes in order what came before its turn.
    async fn catch_up(&self) -> Result<()> {
        let Some(range) = self.writer.next_to_catch_up() else { return Ok(()) };
        let slice = Slice::catch_up(self.writer.clone(), &range, self.engine.buffers.take().await);
        self.engine.workers.submit(slice).done().await.map(drop)
    }

    /// Gets one range right, from the first source that gives it.
    async fn part(&self, range: &Range<u64>, permit: Permit, part: &mut PartProgress) -> Result<(), PartFailure> {
        let (mut failure, mut permit): (Option<Error>, _) = (None, Some(permit));
        for (at, source) in self.sources.iter().enumerate() {
            let is_last = at + 1 == self.sources.len();
            let mut attempts = self.retry.attempts();
            let mut mismatched = false;
            loop {
                if permit.is_none() {
                    permit = Some(self.engine.limiter.acquire().await);
                }
                let error = match self.stream(source.as_ref(), range, part).await {
                    Ok(()) => {
                        if source.tier() == Tier::Disk {
                            self.local.copied.fetch_add(range.end - range.start, Ordering::Relaxed);
                        }
                        return Ok(());
                    }
                    Err(PartFailure::Failed(error)) => error,
                    Err(trouble) => return Err(trouble),
                };
                if error.is_throttled() {
                    self.engine.limiter.throttled();
                }
                if error.kind() == ErrorKind::Corrupt && !mismatched && error.is_transient() {
                    tracing::warn!(%error, "fetching the part again");
                    mismatched = true;
                } else if !is_last && part.is_short() {
                    self.note_bad(source.tier(), &Error::corrupt(error.message()));
                    failure = Some(worse(failure, error));
                    part.short_ends = 0;
                    break;
                } else if let Err(error) = {
                    permit = None;
                    self.pause(&mut attempts, error).await
                } {
                    self.note_bad(source.tier(), &error);
                    failure = Some(worse(failure, error.tier(source.tier())));
                    break;
                }
            }
        }
        let nowhere = || Error::not_found(format!("no source holds {}", self.file.path));
        Err(PartFailure::Failed(failure.unwrap_or_else(nowhere)))
    }

    /// Corrupt bytes are not waited for; the network is.
    async fn pause(&self, attempts: &mut Attempts, error: Error) -> Result<()> {
        if error.kind() == ErrorKind::Corrupt { Err(error) } else { attempts.pause(error).await }
    }

    fn note_bad(&self, tier: Tier, error: &Error) {
        if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) {
            self.failures.note_bad(tier);
        }
        match self.sources.len() > 1 {
            true if self.failures.is_news(tier) => {
                tracing::warn!(file = %self.file.path, %tier, %error, "this source failed; trying the next");
            }
            // The same trouble with another part.
            _ => tracing::debug!(file = %self.file.path, %tier, %error, "this source failed"),
        }
    }

    /// Streams what is missing of the range from one source, once.
    async fn stream(
        &self,
        source: &dyn Source,
        range: &Range<u64>,
        part: &mut PartProgress,
    ) -> Result<(), PartFailure> {
        let want = part.next..range.end;
        let cuts = || source.ignores_ranges() && range.end - range.start < self.file.entry.size;
        if cuts() {
            return Err(PartFailure::IgnoresRanges);
        }
        let reading = ResponseReader::start(self, source, want.clone());
        let body = reading.first(source.read(&self.file.path, want.clone())).await?;
        // The answer itself may have told.
        if cuts() {
            return Err(PartFailure::IgnoresRanges);
        }
        if body.start != want.start {
            // From the beginning of the file: only of use to whoever asked for all of it.
            if body.start != 0 || part.next != range.start {
                part.restart(self, range);
            }
            if range.start != 0 || range.end != self.file.entry.size {
                return Err(PartFailure::IgnoresRanges);
            }
            // What comes need not be what came before: all of it is hashed anew.
            self.writer.rewind();
        }
        let received = self.receive(reading, HedgedRead::new(body.stream, part.next), range, part).await;
        // What is in the workers' hands is written and hashed, whatever became of the stream.
        let holds = part.settle(self).await?;
        part.spare = None;
        if !holds {
            // It is complete, and wrong, however the stream ended.
            part.restart(self, range);
            let expected = self.file.entry.sha256.map(|digest| digest.short()).unwrap_or_default();
            return Err(PartFailure::Failed(
                Error::corrupt(format!(
                    "sha256 mismatch for {} in bytes {}-{}: not part of {expected}…; discarded",
                    self.file.path, range.start, range.end
                ))
                .tier(source.tier())
                .transient(true),
            ));
        }
        match received {
            Err(PartFailure::Failed(error)) if error.kind() == ErrorKind::Corrupt => {
                let is_hashed = self.ladder.is_none() && part.next > range.start;
                part.restart(self, range);
                return Err(if is_hashed { PartFailure::Spoiled(error.tier(source.tier())) } else { error.into() });
            }
            received => received?,
        }
        if part.next < range.end {
            return Err(part.ended_early(&self.file.path, want.start, range.end, source.tier()).into());
        }
        Ok(())
    }

    /// Hands what comes to the workers, until the answer ends. The last slice only then: nothing may follow it.
    async fn receive<'a>(
        &'a self,
        mut reading: ResponseReader<'a>,
        mut race: HedgedRead<'a>,
        range: &Range<u64>,
        part: &mut PartProgress,
    ) -> Result<(), PartFailure> {
        let tier = reading.source.tier();
        let mut filling: Option<Buffer> = None;
        loop {
            let position = part.next + filling.as_ref().map_or(0, |buffer| buffer.len() as u64);
            if position == range.end && !race.keep_those_at(position) {
                break;
            }
            let Some(chunk) = reading.next(&mut race, position).await? else { break };
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let mut buffer = match filling.take() {
                    Some(buffer) => buffer,
                    None => part.buffer(self).await?,
                };
                let room = range.end - part.next;
                let taken = buffer.fill(rest, usize::try_from(room).unwrap_or(usize::MAX));
                if taken == 0 {
                    break;
                }
                rest = &rest[taken..];
                if buffer.len() == SLICE_BYTES && SLICE_BYTES as u64 != room {
                    part.submit(self, range, Work::Write, buffer).await?;
                } else {
                    filling = Some(buffer);
                }
            }
            if !rest.is_empty() && range.start == 0 && range.end < self.file.entry.size {
                // Perhaps it is the whole file. Asked for as one, the server shows what it sends.
                return Err(PartFailure::IgnoresRanges);
            }
            if !rest.is_empty() {
                let error = Error::corrupt("the server sent more than was asked for").tier(tier).transient(true);
                return Err(error.into());
            }
        }
        if let Some(last) = filling.filter(|buffer| part.next + buffer.len() as u64 == range.end) {
            part.submit(self, range, Work::Write, last).await?;
        }
        if part.next == range.end && !race.is_hedged() && tier != Tier::Disk {
            self.engine.limiter.ended(reading.want.end - reading.want.start, reading.began.elapsed());
        }
        Ok(())
    }
}

/// One request's answer being read: how long that takes, and what is done about it.
struct ResponseReader<'a> {
    task: &'a PartTask,
    source: &'a dyn Source,
    want: Range<u64>,
    began: Instant,
    looked: Instant,
    stall: StallDetector,
}

impl<'a> ResponseReader<'a> {
    fn start(task: &'a PartTask, source: &'a dyn Source, want: Range<u64>) -> Self {
        let began = Instant::now();
        Self { task, source, want, began, looked: began, stall: StallDetector::new(task.retry.read_timeout()) }
    }

    fn silent(&self) -> Error {
        let seconds = self.task.retry.read_timeout().as_secs_f32();
        Error::unavailable(format!("no bytes for {seconds} s")).tier(self.source.tier())
    }

    /// The beginning of the answer.
    async fn first<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(self.task.retry.read_timeout(), answer).await.map_err(|_| self.silent())?
    }

    /// The next bytes, which belong at `position`; `None` at the end.
    async fn next(&mut self, race: &mut HedgedRead<'a>, position: u64) -> Result<Option<Bytes>> {
        let (timeout, waiting) = (self.task.retry.read_timeout(), Instant::now());
        let chunk = loop {
            if self.looked.elapsed() >= LOOK_EVERY {
                self.looked = Instant::now();
                self.hedge(race, position);
            }
            let patience = timeout.saturating_sub(waiting.elapsed());
            match tokio::time::timeout(patience.min(LOOK_EVERY), race.next(position)).await {
                Ok(None) => return Ok(None),
                Ok(Some(chunk)) => break chunk?,
                Err(_) if patience <= LOOK_EVERY => return Err(self.silent()),
                Err(_) => {}
            }
        };
        let received = chunk.len() as u64 + race.take_wasted();
        self.task.progress.received(self.source.tier(), received);
        if self.source.tier() != Tier::Disk {
            self.task.engine.limiter.received(received);
        }
        if self.stall.record(received, waiting.elapsed()) {
            return Err(Error::unavailable("the connection has nearly stalled").tier(self.source.tier()));
        }
        Ok(Some(chunk))
    }

    /// Asks for the rest over a second connection, once, if this one is far slower than others were and no request
    /// waits for its turn.
    fn hedge(&self, race: &mut HedgedRead<'a>, position: u64) {
        let (engine, bytes) = (&self.task.engine, self.want.end - self.want.start);
        if race.is_hedged()
            || self.task.one_stream
            || position == self.want.end
            || self.source.tier() == Tier::Disk
            || !engine.limiter.is_slow(bytes, self.began.elapsed())
        {
            return;
        }
        let Some(permit) = engine.limiter.try_acquire() else { return };
        if self.task.retry.may_hedge() {
            tracing::debug!(file = %self.task.file.path, position, "far slower than others; asking for the rest again");
            race.join(self.again(position..self.want.end), position, permit);
        }
    }

    fn again(&self, range: Range<u64>) -> BoxStream<'a, Result<Bytes>> {
        let (source, path) = (self.source, &self.task.file.path);
        let body = async move {
            let body = source.read(path, range.clone()).await?;
            match body.start == range.start {
                true => Ok(body.stream),
                false => Err(Error::unavailable("the server ignores ranges now and then").tier(source.tier())),
            }
        };
        futures::stream::once(body).try_flatten().boxed()
    }
}

/// How far one range has come.
struct PartProgress {
    /// Next byte wanted: all before it are with the workers or done.
    next: u64,
    /// The hash so far, where a ladder will check it and the workers do not have it.
    hasher: Option<PartHasher>,
    /// What the workers have, and how many bytes that is.
    in_flight: Option<(u64, Pending)>,
    /// An empty buffer that came back from them.
    spare: Option<Buffer>,
    /// Bytes shown as done.
    shown: u64,
    /// Streams in a row that ended in good order without bringing a byte.
    short_ends: u32,
    /// The file's hash has to catch up, and nobody else sees to it.
    is_to_catch_up: bool,
    /// The ladder, where it was asked, did not contradict.
    holds: bool,
}

impl PartProgress {
    fn new(task: &PartTask, range: &Range<u64>) -> Self {
        let hasher = Self::rung(task, range).and_then(|rung| rung.hasher());
        Self {
            next: range.start,
            hasher,
            in_flight: None,
            spare: None,
            shown: 0,
            short_ends: 0,
            is_to_catch_up: false,
            holds: true,
        }
    }

    fn rung(task: &PartTask, range: &Range<u64>) -> Option<CheckpointPair> {
        let (ladder, index) = (task.ladder.clone()?, range.start / task.part_size);
        Some(CheckpointPair { ladder, index, sha256: task.file.entry.sha256 })
    }

    /// A stream that ended in good order, too soon.
    fn ended_early(&mut self, path: &FilePath, began: u64, end: u64, tier: Tier) -> Error {
        self.short_ends = if self.next == began { self.short_ends + 1 } else { 0 };
        Error::unavailable(format!("{path} ended {} bytes early", end - self.next)).tier(tier)
    }

    /// Once that may be the network; again, without a byte, the copy is shorter than it is listed.
    fn is_short(&self) -> bool {
        self.short_ends >= 2
    }

    /// Forgets what came; the workers have nothing of it.
    fn restart(&mut self, task: &PartTask, range: &Range<u64>) {
        task.unshow(self.shown);
        let short_ends = self.short_ends;
        *self = Self { short_ends, ..Self::new(task, range) };
    }

    /// A buffer to fill while the workers have another; the first has to be waited for like everybody's.
    fn second(&self, task: &PartTask) -> Option<Buffer> {
        self.in_flight.as_ref().and_then(|_| task.engine.buffers.spare())
    }

    /// An empty buffer: the one that came back, one that nobody uses, or the next that comes back.
    async fn buffer(&mut self, task: &PartTask) -> Result<Buffer, PartFailure> {
        if let Some(buffer) = self.spare.take().or_else(|| self.second(task)) {
            return Ok(buffer);
        }
        self.settle(task).await?;
        match self.spare.take() {
            Some(buffer) => Ok(buffer),
            None => Ok(task.engine.buffers.take().await),
        }
    }

    /// Hands the next slice to the workers, after the one before came back.
    async fn submit(
        &mut self,
        task: &PartTask,
        range: &Range<u64>,
        work: Work,
        buffer: Buffer,
    ) -> Result<(), PartFailure> {
        self.settle(task).await?;
        let len = work.reads_back().unwrap_or(buffer.len()) as u64;
        let (writer, offset) = (task.writer.clone(), self.next);
        let hash = self.hasher.take().map_or(Hash::InOrder, Hash::Part);
        let parts = range.start / task.part_size..range.end.div_ceil(task.part_size);
        let end = (offset + len == range.end).then(|| (Self::rung(task, range), parts));
        task.engine.limiter.handed_over(task.engine.workers.are_behind());
        let pending = task.engine.workers.submit(Slice { writer, offset, buffer, work, hash, end });
        (self.next, self.in_flight) = (offset + len, Some((len, pending)));
        if task.engine.buffers.is_tight() {
            self.spare = None;
        }
        Ok(())
    }

    /// Waits for what the workers have. Whether the ladder, where it was asked, has not contradicted, now or before.
    async fn settle(&mut self, task: &PartTask) -> Result<bool, PartFailure> {
        let Some((len, pending)) = self.in_flight.take() else { return Ok(self.holds) };
        let SliceOutcome { buffer, hash, holds, is_to_catch_up } = pending.done().await.map_err(PartFailure::Broken)?;
        if let Hash::Part(hasher) = hash {
            self.hasher = Some(hasher);
        }
        (self.spare, self.shown) = (Some(buffer), self.shown + len);
        self.is_to_catch_up |= is_to_catch_up;
        self.holds &= holds;
        task.show(len);
        Ok(self.holds)
    }
}

/// Of two failures, the one that tells more: damage before absence, and the later of equals.
fn worse(first: Option<Error>, second: Error) -> Error {
    match first {
        Some(first) if first.kind() == ErrorKind::Corrupt && second.kind() != ErrorKind::Corrupt => first,
        Some(first) if second.kind() == ErrorKind::NotFound => first,
        _ => second,
    }
}
