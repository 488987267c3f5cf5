//! Download of a run of consecutive parts: reads it from the first source that delivers it correctly.
//!
//! One request covers the whole run. With a ladder, each part is verified on its own. Received bytes are collected in
//! slices. The workers hash and write one slice while the next one is received. A part has at most one slice with the
//! workers, so that it is hashed in order. An interrupted part continues where it stopped, a part that fails
//! verification is downloaded once more, and a request that is far slower than others gets a second connection
//! (`hedge.rs`).

use super::buffer::{Buffer, SLICE_BYTES};
use super::download::{DownloadFile, Failures, LocalBytes, PartFailure};
use super::engine::Engine;
use super::hedge::HedgedRead;
use super::http_response::StallDetector;
use super::limiter::{Permit, Receiving};
use super::retry::{Attempts, Retry};
use super::workers::{CheckpointPair, Hash, PendingSlice, Slice, SliceOutcome, Work, slice_len};
use crate::disk::StagedWriter;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::{Ladder, PartHasher};
use crate::metrics::{ByTier, Metrics, Stalls};
use crate::progress::Progress;
use crate::runtime::blocking;
use crate::source::Source;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Interval at which the pace of a request is compared with its peers.
const PEER_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// How much longer than the HTTP client this module waits for bytes. The error of the client is preferred, because it
/// names the server; not every source has such a client.
const CLIENT_GRACE: Duration = Duration::from_millis(250);
/// Received bytes are added to the metrics in steps of this size, because the counters are behind a lock.
const COUNT_STEP_BYTES: u64 = 4 << 20;

/// Everything that the task of one run needs. Cloned for each run.
#[derive(Debug, Clone)]
pub(super) struct PartTask {
    pub(super) engine: Arc<Engine>,
    pub(super) retry: Retry,
    pub(super) metrics: Metrics,
    pub(super) file: Arc<DownloadFile>,
    pub(super) writer: Arc<StagedWriter>,
    /// Generation of the staged file, see [`PartialFile`](super::PartialFile).
    pub(super) generation: u64,
    /// Sources to use in this attempt at the file, best first.
    pub(super) sources: Vec<Arc<dyn Source>>,
    pub(super) ladder: Option<Arc<Ladder>>,
    pub(super) part_size: u64,
    /// True if the file is downloaded as one stream, because the server ignores ranges.
    pub(super) one_stream: bool,
    /// Parts that an earlier fill wrote, according to its journal. They are not trusted until verified.
    pub(super) resumable_parts: Arc<BTreeSet<u64>>,
    pub(super) failures: Arc<Failures>,
    /// Bytes that this attempt has reported as done to the progress display.
    pub(super) reported_bytes: Arc<AtomicU64>,
    pub(super) local: Arc<LocalBytes>,
    pub(super) progress: Progress,
}

impl PartTask {
    /// Ensures that the bytes in `run` are written and verified. A part that an earlier fill wrote must be a run of its
    /// own, because the request of a run has no gaps.
    pub(super) async fn run(self, run: Range<u64>, permit: Permit) -> Result<(), PartFailure> {
        let part_bytes = self.part_bytes();
        let (mut request, mut start) = (RunRequest::new(&run, permit), run.start);
        while start < run.end {
            let range = start..(start + part_bytes).min(run.end);
            start = range.end;
            let mut part = PartProgress::new(&self, &range);
            // A resumed part needs no request.
            if !self.resume_part(&range, &mut part).await? {
                self.fetch_part(&range, &mut request, &mut part).await?;
            }
            self.file.partial_file.range_received(self.generation, &range);
            if let Some(sink) = &self.file.on_part {
                sink.notify(&self.file.path, self.generation, range);
            }
            // If the hash of the file waited for this part, this task now hashes the later parts that arrived earlier.
            if part.must_catch_up {
                if start == run.end {
                    // Hashing may take long and needs no permit.
                    drop(request);
                    return Ok(self.catch_up().await?);
                }
                self.catch_up().await?;
            }
        }
        Ok(())
    }

    /// Returns the number of bytes that are received as one step: a part, or the whole file with all its parts if it is
    /// read in one stream.
    pub(super) fn part_bytes(&self) -> u64 {
        if self.one_stream { self.file.entry.size.max(1) } else { self.part_size }
    }

    /// Returns true if readers of unverified bytes may read each slice of a part as soon as it is written. No byte may
    /// then be written twice in one generation. False with a ladder, because a part that fails verification is written
    /// again, and if the server ignores ranges, because it may send the file again from the beginning. Also false for a
    /// file that is written as a whole.
    fn may_read_slices(&self, source: &dyn Source) -> bool {
        self.ladder.is_none() && !self.one_stream && !source.ignores_ranges() && !self.writer.is_whole()
    }

    /// Adds `bytes` to the progress display.
    fn report_done(&self, bytes: u64) {
        self.reported_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.progress.done(bytes);
    }

    /// Takes `bytes` back from the progress display.
    fn report_undone(&self, bytes: u64) {
        self.reported_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.progress.undone(bytes);
    }

    /// Takes over the part in `range` from an earlier fill. Returns false if that fill did not write it or, with a
    /// ladder, if its bytes are wrong.
    async fn resume_part(&self, range: &Range<u64>, part: &mut PartProgress) -> Result<bool, PartFailure> {
        let index = range.start / self.part_size;
        if !self.resumable_parts.contains(&index) {
            return Ok(false);
        }
        if self.ladder.is_some() {
            // With a ladder the part is verified alone, by reading it back.
            while part.next < range.end {
                let buffer = part.buffer(self).await?;
                let len = slice_len(&(part.next..range.end)).min(buffer.capacity());
                part.submit(self, range, Work::ReadBack(len), buffer).await?;
            }
            if !part.wait_for_slice(self).await? {
                part.restart(self, range);
                return Ok(false);
            }
        } else {
            // Without a ladder, the part is hashed when the in-order hash reaches it, and verified with the whole file.
            let writer = self.writer.clone();
            part.must_catch_up = blocking(move || writer.part_done(index)).await?;
            self.report_done(range.end - range.start);
        }
        self.local.resumed.fetch_add(range.end - range.start, Ordering::Relaxed);
        Ok(true)
    }

    /// Reads back and hashes, in order, the parts that were written before the hash reached them.
    async fn catch_up(&self) -> Result<()> {
        let Some(range) = self.writer.next_to_catch_up() else { return Ok(()) };
        let slice = Slice::catch_up(self.writer.clone(), &range, self.engine.buffers.take(SLICE_BYTES).await);
        self.engine.workers.submit(slice).outcome().await.map(drop)
    }

    /// Downloads and verifies one part from the first source that delivers it correctly.
    async fn fetch_part<'a>(
        &'a self,
        range: &Range<u64>,
        request: &mut RunRequest<'a>,
        part: &mut PartProgress,
    ) -> Result<(), PartFailure> {
        let mut failure: Option<Error> = None;
        // Continue the open response, if there is one, before sources that failed for an earlier part.
        let is_open =
            |source: &&Arc<dyn Source>| request.response.as_ref().is_some_and(|open| open.comes_from(&***source));
        let (open, others): (Vec<_>, Vec<_>) = self.sources.iter().partition(is_open);
        for (index, source) in open.into_iter().chain(others).enumerate() {
            let is_last = index + 1 == self.sources.len();
            let mut attempts = self.retry.counted_in(&self.metrics, source.tier()).attempts();
            let mut mismatched = false;
            loop {
                // The permit was returned for the pause before a retry.
                if request.permit.is_none() {
                    request.permit = Some(self.engine.limiter.acquire().await);
                }
                let error = match self.stream(source.as_ref(), range, request, part).await {
                    Ok(()) => {
                        if source.tier() == Tier::Disk {
                            self.local.copied.fetch_add(range.end - range.start, Ordering::Relaxed);
                        }
                        return Ok(());
                    }
                    Err(PartFailure::Failed(error)) => error,
                    Err(other) => return Err(other),
                };
                if error.throttled_by().is_some() {
                    self.engine.limiter.record_throttled();
                }
                // Wrong bytes are downloaded once more from the same source, without a pause. If a copy is too short,
                // the next source, if any, is used at once. All other failures are retried under the retry policy, and
                // then the next source is used.
                if error.kind() == ErrorKind::Corrupt && !mismatched && error.is_transient() {
                    tracing::warn!(%error, "a part failed verification; downloading it again from the same source");
                    self.metrics.update(|counts| counts.retries.add(source.tier(), 1));
                    mismatched = true;
                } else if !is_last && part.is_short() {
                    self.record_failure(source.tier(), &Error::corrupt(error.message()));
                    failure = Some(more_informative(failure, error));
                    part.empty_responses = 0;
                    break;
                } else if let Err(error) = {
                    request.permit = None;
                    self.pause(&mut attempts, error).await
                } {
                    self.record_failure(source.tier(), &error);
                    failure = Some(more_informative(failure, error.tier(source.tier())));
                    break;
                }
            }
        }
        let no_source = || Error::not_found(format!("no source has {}", self.file.path));
        Err(PartFailure::Failed(failure.unwrap_or_else(no_source)))
    }

    /// Pauses before a retry, or returns `error` if it must not be retried. Waiting does not help against corrupt
    /// bytes.
    async fn pause(&self, attempts: &mut Attempts, error: Error) -> Result<()> {
        if error.kind() == ErrorKind::Corrupt { Err(error) } else { attempts.pause(error).await }
    }

    /// Logs that a source failed, as a warning once per tier, and marks a tier with a wrong or missing copy as bad.
    fn record_failure(&self, tier: Tier, error: &Error) {
        if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) {
            self.failures.record_bad(tier);
        }
        match self.sources.len() > 1 {
            true if self.failures.is_first_report(tier) => {
                tracing::warn!(file = %self.file.path, %tier, %error, "this source failed; trying the next");
            }
            // Another part already reported the tier, or there is no other source to try.
            _ => tracing::debug!(file = %self.file.path, %tier, %error, "this source failed"),
        }
    }

    /// Receives the rest of the part from one source, in one attempt. Continues the open response of this run, if it
    /// comes from this source. Otherwise sends a request for the rest of the run.
    async fn stream<'a>(
        &'a self,
        source: &'a dyn Source,
        range: &Range<u64>,
        request: &mut RunRequest<'a>,
        part: &mut PartProgress,
    ) -> Result<(), PartFailure> {
        let start = part.next;
        let open = request.response.take().filter(|response| response.comes_from(source));
        let is_open = open.is_some();
        let mut response = match open {
            Some(response) => response,
            None => self.request(source, range, request.end, part).await?,
        };
        part.may_read_slices = self.may_read_slices(source);
        let mut received = self.receive(&mut response, range, part).await;
        // A server may end a response early. At a part boundary, that is no failure of this part.
        if is_open && received.is_ok() && part.next == start {
            response = self.request(source, range, request.end, part).await?;
            received = self.receive(&mut response, range, part).await;
        }
        // Wait for the slice that the workers still have, even if the stream failed.
        let matches = part.wait_for_slice(self).await?;
        part.returned = None;
        if !matches {
            // The part is complete and wrong, however the stream ended.
            part.restart(self, range);
            self.failures.count_corrupt(&self.metrics, source.tier(), range.end - range.start);
            let expected = self.file.entry.sha256.map(|digest| digest.short()).unwrap_or_default();
            return Err(PartFailure::Failed(
                Error::corrupt(format!(
                    "sha256 mismatch for {} in bytes {}-{}: not the bytes of the file with sha256 {expected}…; discarded",
                    self.file.path, range.start, range.end
                ))
                .tier(source.tier())
                .transient(true),
            ));
        }
        match received {
            Err(PartFailure::Failed(error)) if error.kind() == ErrorKind::Corrupt => {
                // Bytes of a wrong response that are in the in-order hash cannot be taken out again. The response may
                // have begun in an earlier part of the run, whose bytes are in the hash as well.
                let hashed_from = range.start.min(response.reader.requested.start);
                let is_hashed = self.ladder.is_none() && part.next > hashed_from;
                part.restart(self, range);
                return Err(if is_hashed { PartFailure::RestartFile(error.tier(source.tier())) } else { error.into() });
            }
            received => received?,
        }
        if part.next < range.end {
            return Err(part.ended_early(&self.file.path, start, range.end, source.tier()).into());
        }
        request.response = Some(response);
        Ok(())
    }

    /// Requests the rest of the run, from the next byte of the part in `range` to `end`, and waits for the beginning of
    /// the response.
    async fn request<'a>(
        &'a self,
        source: &'a dyn Source,
        range: &Range<u64>,
        end: u64,
        part: &mut PartProgress,
    ) -> Result<OpenResponse<'a>, PartFailure> {
        let requested = part.next..end;
        // A server that ignores ranges can be asked only for the whole file.
        let is_unusable = || source.ignores_ranges() && end - range.start < self.file.entry.size;
        if is_unusable() {
            return Err(PartFailure::IgnoresRanges);
        }
        let mut reader = ResponseReader::start(self, source, requested.clone());
        let body = reader.first(source.read(&self.file.path, requested.clone())).await?;
        // Only the response may have revealed that the server ignores ranges.
        if is_unusable() {
            return Err(PartFailure::IgnoresRanges);
        }
        if body.start != requested.start {
            // The first bytes of this part would be written again, and readers may have read them. The next attempt is
            // one stream, in a new generation.
            if part.may_read_slices && part.next > range.start {
                return Err(PartFailure::IgnoresRanges);
            }
            // The response begins at another offset. It is usable only if it is the whole file, and the whole file was
            // requested.
            let is_whole_file = range.start == 0 && end == self.file.entry.size;
            if is_whole_file && body.start != 0 {
                let message = format!("the response begins at byte {}, not at byte {}", body.start, requested.start);
                return Err(Error::corrupt(message).tier(source.tier()).transient(false).into());
            }
            if body.start != 0 || part.next != range.start {
                part.restart(self, range);
            }
            if !is_whole_file {
                return Err(PartFailure::IgnoresRanges);
            }
            // The response may differ from the one before, so its bytes are hashed from the beginning.
            self.writer.rewind();
            reader.requested.start = part.next;
        }
        reader.begin();
        Ok(OpenResponse { reader, hedged: HedgedRead::new(body.stream, part.next), surplus: Bytes::new() })
    }

    /// Passes received bytes to the workers until the part is complete. For the last part of the run, continues until
    /// the response ends, and holds the last slice back until then. If more bytes follow, the response is not the
    /// requested range, and the part must not be marked as complete.
    async fn receive<'a>(
        &'a self,
        response: &mut OpenResponse<'a>,
        range: &Range<u64>,
        part: &mut PartProgress,
    ) -> Result<(), PartFailure> {
        let tier = response.reader.source.tier();
        let is_last_part = range.end == response.reader.requested.end;
        let mut filling: Option<Buffer> = None;
        loop {
            let position = part.next + filling.as_ref().map_or(0, |buffer| buffer.len() as u64);
            if position == range.end && !is_last_part {
                break;
            }
            // All bytes are here. Wait for the end of the response, on the connections that delivered the last byte.
            if position == range.end && !response.hedged.retain_at(position) {
                break;
            }
            let Some(chunk) = response.next(position).await? else { break };
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let mut buffer = match filling.take() {
                    Some(buffer) => buffer,
                    None => part.buffer(self).await?,
                };
                let room = range.end - part.next;
                let taken = buffer.fill(rest, usize::try_from(room).unwrap_or(usize::MAX));
                // The part is complete.
                if taken == 0 {
                    filling = Some(buffer);
                    break;
                }
                rest = &rest[taken..];
                // A full slice goes to the workers, unless it is the last one.
                if buffer.len() == buffer.capacity() && buffer.len() as u64 != room {
                    part.submit(self, range, Work::Write, buffer).await?;
                } else if part.may_read_slices
                    && (buffer.len() as u64) < room
                    && self.file.partial_file.is_waited_for(&(part.next..part.next + buffer.len() as u64))
                {
                    // A reader waits for these bytes: write them now. `wait_for_slice` then reports
                    // them to it.
                    part.submit(self, range, Work::Write, buffer).await?;
                    part.wait_for_slice(self).await?;
                } else {
                    filling = Some(buffer);
                }
            }
            if !is_last_part {
                // These bytes belong to the next part.
                response.surplus = chunk.slice_ref(rest);
                continue;
            }
            let run = &response.reader.requested;
            if !rest.is_empty() && run.start == 0 && run.end < self.file.entry.size {
                // The server may have sent the whole file. Request it as one stream, so that its length can be checked.
                return Err(PartFailure::IgnoresRanges);
            }
            if !rest.is_empty() {
                let error = Error::corrupt("the server sent more bytes than requested").tier(tier).transient(true);
                return Err(error.into());
            }
        }
        if let Some(last) = filling.filter(|buffer| part.next + buffer.len() as u64 == range.end) {
            part.submit(self, range, Work::Write, last).await?;
        }
        // Only network requests without a hedge are a measure for the pace of others.
        if part.next == range.end && is_last_part && !response.hedged.is_hedged() && tier != Tier::Disk {
            let Range { start, end } = response.reader.requested;
            self.engine.limiter.record_completed(end - start, response.reader.started.elapsed());
        }
        Ok(())
    }
}

/// The request of a run.
struct RunRequest<'a> {
    /// End of the run in the file.
    end: u64,
    /// `None` during the pause before a retry.
    permit: Option<Permit>,
    /// The response, once a part of the run was received from it.
    response: Option<OpenResponse<'a>>,
}

impl RunRequest<'_> {
    fn new(run: &Range<u64>, permit: Permit) -> Self {
        Self { end: run.end, permit: Some(permit), response: None }
    }
}

/// A response from which the next parts of the run are read.
struct OpenResponse<'a> {
    reader: ResponseReader<'a>,
    hedged: HedgedRead<'a>,
    /// Received bytes that belong to the next part.
    surplus: Bytes,
}

impl OpenResponse<'_> {
    fn comes_from(&self, source: &dyn Source) -> bool {
        std::ptr::addr_eq(self.reader.source, source)
    }

    /// Returns the next bytes, which belong at offset `position`; `None` at the end.
    async fn next(&mut self, position: u64) -> Result<Option<Bytes>> {
        if !self.surplus.is_empty() {
            return Ok(Some(std::mem::take(&mut self.surplus)));
        }
        self.reader.next(&mut self.hedged, position).await
    }
}

/// Reads the response of one request. Detects silence and stalls, and opens a second connection if it is too slow.
struct ResponseReader<'a> {
    task: &'a PartTask,
    source: &'a dyn Source,
    requested: Range<u64>,
    started: Instant,
    last_peer_check: Instant,
    stall: StallDetector,
    /// Received bytes that are not in the metrics yet.
    uncounted_bytes: u64,
    /// Set when the response has begun, unless it comes from a local directory.
    receiving: Option<Receiving>,
}

impl Drop for ResponseReader<'_> {
    fn drop(&mut self) {
        self.count_received();
    }
}

impl<'a> ResponseReader<'a> {
    fn start(task: &'a PartTask, source: &'a dyn Source, requested: Range<u64>) -> Self {
        let started = Instant::now();
        Self {
            task,
            source,
            requested,
            started,
            last_peer_check: started,
            stall: StallDetector::new(task.retry.read_timeout()),
            uncounted_bytes: 0,
            receiving: None,
        }
    }

    /// Records that the response has begun.
    fn begin(&mut self) {
        if self.source.tier() != Tier::Disk {
            self.receiving = Some(self.task.engine.limiter.begin_receiving());
        }
    }

    /// Adds the received bytes to the metrics.
    fn count_received(&mut self) {
        let bytes = std::mem::take(&mut self.uncounted_bytes);
        self.task.metrics.update(|counts| counts.received_bytes.add(self.source.tier(), bytes));
    }

    /// Counts that this request is too slow.
    fn count_stall(&self, kind: fn(&mut Stalls) -> &mut ByTier) {
        self.task.metrics.update(|counts| kind(&mut counts.stalls).add(self.source.tier(), 1));
    }

    /// Counts a silent server if the wait that began at `start` failed after the read timeout. The timeout of the HTTP
    /// client is as long, and may have ended the wait.
    fn count_if_silent(&self, start: Instant) {
        if start.elapsed() + PEER_CHECK_INTERVAL >= self.task.retry.read_timeout() {
            self.count_stall(|stalls| &mut stalls.silent);
        }
    }

    /// Returns the error for a server that sent no bytes within the read timeout.
    fn silence_error(&self) -> Error {
        let seconds = self.task.retry.read_timeout().as_secs_f32();
        Error::unavailable(format!("no bytes for {seconds} s")).tier(self.source.tier())
    }

    /// Waits for the beginning of the response, for at most the read timeout. The timeout does not count while the
    /// request is held back because its host asked for a pause.
    async fn first<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        let (timeout, pauses) = (self.task.retry.read_timeout() + CLIENT_GRACE, self.task.retry.pauses());
        let mut answer = std::pin::pin!(answer);
        let answer = loop {
            match tokio::time::timeout(timeout, &mut answer).await {
                Ok(answer) => break answer,
                Err(_) if pauses.any_within(timeout) => {}
                Err(_) => break Err(self.silence_error()),
            }
        };
        if answer.is_err() && !pauses.any_within(timeout) {
            self.count_if_silent(self.started);
        }
        answer
    }

    /// Returns the next bytes, which belong at offset `position`; `None` at the end.
    async fn next(&mut self, hedged: &mut HedgedRead<'a>, position: u64) -> Result<Option<Bytes>> {
        let (timeout, wait_start) = (self.task.retry.read_timeout() + CLIENT_GRACE, Instant::now());
        let chunk = loop {
            if self.last_peer_check.elapsed() >= PEER_CHECK_INTERVAL {
                self.last_peer_check = Instant::now();
                self.hedge(hedged, position);
            }
            // Wake up regularly, because a hedge may be needed while no bytes arrive.
            let remaining = timeout.saturating_sub(wait_start.elapsed());
            match tokio::time::timeout(remaining.min(PEER_CHECK_INTERVAL), hedged.next(position)).await {
                Ok(chunk) => break chunk,
                Err(_) if remaining <= PEER_CHECK_INTERVAL => break Some(Err(self.silence_error())),
                Err(_) => {}
            }
        };
        let chunk = chunk.transpose().inspect_err(|_| self.count_if_silent(wait_start))?;
        let Some(chunk) = chunk else { return Ok(None) };
        let received = chunk.len() as u64 + hedged.take_wasted();
        self.task.progress.received(self.source.tier(), received);
        self.uncounted_bytes += received;
        if self.uncounted_bytes >= COUNT_STEP_BYTES {
            self.count_received();
        }
        if self.source.tier() != Tier::Disk {
            self.task.engine.limiter.record_received(received);
        }
        if self.stall.record(received, wait_start.elapsed()) {
            self.count_stall(|stalls| &mut stalls.stalled);
            return Err(Error::unavailable("the connection has nearly stalled").tier(self.source.tier()));
        }
        Ok(Some(chunk))
    }

    /// Requests the rest over a second connection, once, if this one is far slower than others were and a permit is
    /// free.
    fn hedge(&self, hedged: &mut HedgedRead<'a>, position: u64) {
        let (engine, bytes) = (&self.task.engine, position - self.requested.start);
        if hedged.is_hedged()
            || self.task.one_stream
            || position == self.requested.end
            || self.source.tier() == Tier::Disk
            || !engine.limiter.is_slow(bytes, self.started.elapsed())
        {
            return;
        }
        let Some(permit) = engine.limiter.try_acquire() else { return };
        if self.task.retry.spend_for_hedge() {
            let message = "request far slower than its peers; requesting the rest on a second connection";
            tracing::debug!(file = %self.task.file.path, position, "{message}");
            self.count_stall(|stalls| &mut stalls.hedged);
            hedged.add(self.reread(position..self.requested.end), position, permit);
        }
    }

    /// Returns the stream of a second request for `range`. It is sent when the stream is first polled.
    fn reread(&self, range: Range<u64>) -> BoxStream<'a, Result<Bytes>> {
        let (source, path) = (self.source, &self.task.file.path);
        let body = async move {
            let body = source.read(path, range.clone()).await?;
            match body.start == range.start {
                true => Ok(body.stream),
                false => {
                    Err(Error::unavailable("the server ignored the range of a repeated request").tier(source.tier()))
                }
            }
        };
        futures::stream::once(body).try_flatten().boxed()
    }
}

/// The progress of one part.
struct PartProgress {
    /// Offset of the next byte to hand to the workers. All bytes before it are with the workers or written.
    next: u64,
    /// The hash so far. `None` while the workers have it, and always without a ladder.
    hasher: Option<PartHasher>,
    /// The slice that the workers have, and its length in bytes.
    in_flight: Option<(u64, PendingSlice)>,
    /// An empty buffer that the workers returned.
    returned: Option<Buffer>,
    /// Bytes of the part reported as done to the progress display.
    reported_bytes: u64,
    /// Number of consecutive responses that ended without an error and without a byte.
    empty_responses: u32,
    /// True if this task must hash the parts that arrived early.
    must_catch_up: bool,
    /// False once a checkpoint of the ladder did not match.
    matches: bool,
    /// See [`PartTask::may_read_slices`].
    may_read_slices: bool,
}

impl PartProgress {
    fn new(task: &PartTask, range: &Range<u64>) -> Self {
        let hasher = Self::checkpoints(task, range).and_then(|checkpoints| checkpoints.hasher());
        Self {
            next: range.start,
            hasher,
            in_flight: None,
            returned: None,
            reported_bytes: 0,
            empty_responses: 0,
            must_catch_up: false,
            matches: true,
            may_read_slices: false,
        }
    }

    /// Returns the checkpoints around the part in `range`; `None` without a ladder.
    fn checkpoints(task: &PartTask, range: &Range<u64>) -> Option<CheckpointPair> {
        let (ladder, index) = (task.ladder.clone()?, range.start / task.part_size);
        Some(CheckpointPair { ladder, index, sha256: task.file.entry.sha256 })
    }

    /// Records a response that ended without an error but too early, and returns the error for it.
    fn ended_early(&mut self, path: &FilePath, start: u64, end: u64, tier: Tier) -> Error {
        self.empty_responses = if self.next == start { self.empty_responses + 1 } else { 0 };
        Error::unavailable(format!("{path} ended {} bytes early", end - self.next)).tier(tier)
    }

    /// Returns true if the copy is shorter than listed. One empty response may be caused by the network, two may not.
    fn is_short(&self) -> bool {
        self.empty_responses >= 2
    }

    /// Starts the part over. The workers must not have a slice of it.
    fn restart(&mut self, task: &PartTask, range: &Range<u64>) {
        task.report_undone(self.reported_bytes);
        let empty_responses = self.empty_responses;
        *self = Self { empty_responses, ..Self::new(task, range) };
    }

    /// Returns a second buffer from the pool if the workers have the first one. Otherwise the caller must wait for a
    /// first buffer.
    fn second_buffer(&self, task: &PartTask) -> Option<Buffer> {
        self.in_flight.as_ref().and_then(|_| task.engine.spare_buffer())
    }

    /// Returns an empty buffer: the one that the workers returned, a second one from the pool, or the next one that the
    /// workers return.
    async fn buffer(&mut self, task: &PartTask) -> Result<Buffer, PartFailure> {
        if let Some(buffer) = self.returned.take().or_else(|| self.second_buffer(task)) {
            return Ok(buffer);
        }
        self.wait_for_slice(task).await?;
        match self.returned.take() {
            Some(buffer) => Ok(buffer),
            None => Ok(task.engine.buffer().await),
        }
    }

    /// Hands the next slice to the workers, after they finished the previous one.
    async fn submit(
        &mut self,
        task: &PartTask,
        range: &Range<u64>,
        work: Work,
        buffer: Buffer,
    ) -> Result<(), PartFailure> {
        self.wait_for_slice(task).await?;
        let len = work.bytes_to_read_back().unwrap_or(buffer.len()) as u64;
        let (writer, offset) = (task.writer.clone(), self.next);
        let hash = self.hasher.take().map_or(Hash::InOrder, Hash::Part);
        let parts = range.start / task.part_size..range.end.div_ceil(task.part_size);
        // The last slice carries the expected hash state and the parts that it completes.
        let end = (offset + len == range.end).then(|| (Self::checkpoints(task, range), parts));
        task.engine.limiter.record_queued_slice(task.engine.workers.are_behind());
        let pending = task.engine.workers.submit(Slice { writer, offset, buffer, work, hash, end });
        (self.next, self.in_flight) = (offset + len, Some((len, pending)));
        // Return the second buffer if few are free.
        if task.engine.buffers.is_half_used() {
            self.returned = None;
        }
        Ok(())
    }

    /// Waits for the slice that the workers have, if any. Returns false if a checkpoint of the ladder did not match,
    /// now or before.
    async fn wait_for_slice(&mut self, task: &PartTask) -> Result<bool, PartFailure> {
        let Some((len, pending)) = self.in_flight.take() else { return Ok(self.matches) };
        let SliceOutcome { buffer, hash, matches, must_catch_up } =
            pending.outcome().await.map_err(PartFailure::Storage)?;
        if let Hash::Part(hasher) = hash {
            self.hasher = Some(hasher);
        }
        (self.returned, self.reported_bytes) = (Some(buffer), self.reported_bytes + len);
        self.must_catch_up |= must_catch_up;
        self.matches &= matches;
        task.report_done(len);
        if self.may_read_slices {
            task.file.partial_file.range_received(task.generation, &(self.next - len..self.next));
        }
        Ok(self.matches)
    }
}

/// Returns the more informative of two failures: damage rather than anything else, anything rather than a later
/// absence, and otherwise the later one.
fn more_informative(first: Option<Error>, second: Error) -> Error {
    match first {
        Some(first) if first.kind() == ErrorKind::Corrupt && second.kind() != ErrorKind::Corrupt => first,
        Some(first) if second.kind() == ErrorKind::NotFound => first,
        _ => second,
    }
}
