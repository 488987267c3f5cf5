//! Downloader: copies files from sources into staging, in parallel ranges, verifying them in the same pass.
//!
//! Each part is downloaded from the first source that delivers it correctly (`part.rs`). A file without a ladder is
//! verified as a whole; if that fails, it is downloaded once more from the same sources, then without the first one.
//! Partial downloads that an earlier fill left in staging are resumed: their parts are read back and verified before
//! they count. Memory is bounded by the shared engine (`engine.rs`), whatever the size of the files. The choice of
//! sources and the use of the staged files belong to the caller.

use super::engine::Engine;
use super::order::{Order, PartQueue};
use super::part::PartTask;
use super::part_sink::PartSink;
use super::partial_file::{NEXT_DEMAND_WAIT, NextPart, PartialFile};
use super::retry::{Retry, recording_retries};
use crate::config::WriteMode;
use crate::digest::Provenance;
use crate::disk::{FileDigests, FileLock, FoundLimit, Purpose, RootedPath, StagedFileSpec, StagedWriter, goes_direct};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::{Ladder, part_size};
use crate::manifest::{FileEntry, FileIdentity};
use crate::metrics::Metrics;
use crate::mutex::Mutex;
use crate::progress::Progress;
use crate::runtime::blocking;
use crate::source::Source;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Maximum number of bytes between the in-order hash and the part to request next. Parts that arrive early are read
/// back for hashing. With this bound they are probably still in the page cache.
const HASH_LAG_BYTES_MAX: u64 = 1 << 30;
/// Maximum number of received bytes that may wait for the in-order hash if hashing is slower than the network. Does not
/// apply to a resumed file: its parts were received long ago.
const UNHASHED_BYTES_MAX: u64 = 128 << 20;
/// Maximum number of bytes that one request covers.
const REQUEST_BYTES_MAX: u64 = 16 << 20;
/// Number of bytes that one request covers while the pace of the connections is unknown.
const REQUEST_BYTES_FIRST: u64 = 8 << 20;
/// How long one request should take. A shorter one is not worth its round trip, and a longer one ends after all others.
const REQUEST_TIME: Duration = Duration::from_millis(250);
/// How long a failed download waits for the files that are being downloaded. A file of one part is kept for the next
/// fill only if it is complete.
const SEAL_WAIT_MAX: Duration = Duration::from_secs(1);
/// Interval for checking whether the in-order hash has caught up.
const HASH_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// One file to download.
#[derive(Debug, Clone)]
pub(crate) struct DownloadFile {
    pub(crate) path: FilePath,
    /// The known metadata of the file: always the size; digests and ladder if available.
    pub(crate) entry: FileEntry,
    /// Path of the staged file.
    pub(crate) target: RootedPath,
    /// True if an earlier fill may have left the file in staging.
    pub(crate) may_be_staged: bool,
    /// Lock that marks the staging folder as owned, held as long as a write to it may be in progress.
    pub(crate) owner: Arc<FileLock>,
    /// Sources of the file, best first.
    pub(crate) sources: Vec<Arc<dyn Source>>,
    /// Receives a notification for every part that is written and verified.
    pub(crate) on_part: Option<PartSink>,
    /// State shared with readers of the incomplete file.
    pub(crate) partial_file: Arc<PartialFile>,
}

/// A file that is staged and verified.
#[derive(Debug, Clone)]
pub(crate) struct DownloadedFile {
    pub(crate) target: RootedPath,
    /// The entry, completed with the digest, ladder and provenance computed by the download.
    pub(crate) entry: FileEntry,
    pub(crate) identity: FileIdentity,
    /// Bytes downloaded over a network: the size without bytes resumed from an earlier fill or copied from a local
    /// directory.
    pub(crate) fetched_bytes: u64,
    /// Tiers with a copy that failed verification or was missing although listed.
    pub(crate) bad_tiers: BTreeSet<Tier>,
}

/// Downloads files. There is one per cache; all downloaders of a process share the request limit, buffers and workers.
#[derive(Debug, Clone)]
pub(crate) struct Downloader {
    retry: Retry,
    write_mode: WriteMode,
    /// Created by the first download, so that hits do not read the limits of the machine.
    engine: Arc<OnceLock<Arc<Engine>>>,
    metrics: Metrics,
}

/// Properties shared by all files of one call of [`Downloader::download`].
#[derive(Debug, Clone, Copy)]
struct DownloadRun {
    purpose: Purpose,
    /// Total size of the files in bytes.
    bytes: u64,
    /// True if there is only one file.
    is_alone: bool,
}

/// Bytes of an attempt that did not come over a network.
#[derive(Debug, Default)]
pub(super) struct LocalBytes {
    /// Bytes found in staging, left by an earlier fill.
    pub(super) resumed: AtomicU64,
    /// Bytes read from another local directory.
    pub(super) copied: AtomicU64,
}

impl LocalBytes {
    fn total(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed) + self.copied.load(Ordering::Relaxed)
    }
}

/// The reason why a part or file was not downloaded in the present attempt.
pub(super) enum PartFailure {
    /// No source delivered it.
    Failed(Error),
    /// The staged file cannot be written or read back. Another source would not help.
    Storage(Error),
    /// Bytes of a response that turned out wrong are already in the in-order hash. The whole file must be downloaded
    /// again.
    RestartFile(Error),
    /// The server ignores the `Range` header and sends the whole file.
    IgnoresRanges,
}

impl From<Error> for PartFailure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Downloader {
    pub(crate) fn new(retry: Retry, write_mode: WriteMode, metrics: Metrics) -> Self {
        Self { retry, write_mode, engine: Arc::default(), metrics }
    }

    fn engine(&self) -> &Arc<Engine> {
        self.engine.get_or_init(Engine::shared)
    }

    /// Returns the retry policy, which all requests of a cache share.
    pub(crate) fn retry(&self) -> &Retry {
        &self.retry
    }

    /// Raises the initial limit on concurrent requests to `remembered`, which an earlier process found. Returns false
    /// and changes nothing if this process has already downloaded.
    pub(crate) fn start_with(&self, remembered: Option<FoundLimit>) -> bool {
        self.engine().limiter.start_with(remembered)
    }

    /// Returns the limit on concurrent requests that was found so far.
    pub(crate) fn found_limit(&self) -> FoundLimit {
        self.engine().limiter.found()
    }

    /// Downloads all `files`. Fails at the first file that no source delivers correctly.
    pub(crate) async fn download(
        &self,
        mut files: Vec<DownloadFile>,
        purpose: Purpose,
        progress: &Progress,
    ) -> Result<Vec<DownloadedFile>> {
        let bytes = files.iter().map(|file| file.entry.size).sum();
        let run = DownloadRun { purpose, bytes, is_alone: files.len() == 1 };
        // Use a random order, so that not all nodes of a fleet begin with the same file.
        files.shuffle(&mut rand::rng());
        let (mut waiting, mut running) = (files.into_iter(), FuturesUnordered::new());
        let files_max = self.engine().files_max;
        let (mut downloaded, mut failure) = (Vec::new(), None);
        loop {
            while failure.is_none() && running.len() < files_max {
                let Some(file) = waiting.next() else { break };
                running.push(self.download_file(file, run, progress));
            }
            // After a failure, no file is started. The running ones may still complete within `SEAL_WAIT_MAX`, so that
            // the next fill resumes with them.
            let ended = match &failure {
                None => running.next().await,
                Some((_, end)) => tokio::time::timeout_at(*end, running.next()).await.ok().flatten(),
            };
            match ended {
                Some(Ok(file)) => downloaded.push(file),
                Some(Err(error)) if failure.is_none() => failure = Some((error, Instant::now() + SEAL_WAIT_MAX)),
                Some(Err(_)) => {}
                None => return failure.map_or(Ok(downloaded), |(error, _)| Err(error)),
            }
        }
    }

    /// Downloads one file and records the outcome for its readers.
    async fn download_file(&self, file: DownloadFile, run: DownloadRun, progress: &Progress) -> Result<DownloadedFile> {
        let file = Arc::new(file);
        let outcome = self.try_sources(&file, run, progress).await;
        if outcome.is_err() {
            // Do this before the file is removed, so that no reader opens a file that is about to be removed.
            file.partial_file.mark_failed();
        }
        // Wrong bytes must not be resumed by the next fill.
        if matches!(&outcome, Err(error) if error.kind() == ErrorKind::Corrupt) {
            let target = file.target.clone();
            blocking(move || StagedWriter::remove_staged(&target)).await?;
        }
        outcome.inspect(|_| file.partial_file.mark_verified())
    }

    /// Downloads one file, with further attempts as long as they can help.
    ///
    /// If the digest of a whole file does not match, any of its sources may have sent the wrong bytes. The order of
    /// attempts is therefore: all sources, all sources once more, then without the first, and so on.
    async fn try_sources(
        &self,
        file: &Arc<DownloadFile>,
        run: DownloadRun,
        progress: &Progress,
    ) -> Result<DownloadedFile> {
        let failures = Arc::new(Failures::default());
        // An empty file has no part that a ladder could verify: it is hashed as a whole.
        let by_parts = file.entry.sha256.is_some() && file.entry.size > 0;
        let mut ladder = file.entry.ladder.clone().filter(|_| by_parts).map(Arc::new);
        let (mut skipped, mut mismatches, mut one_stream, mut is_first) = (0, 0, false, true);
        loop {
            let attempt = Attempt {
                sources: file.sources[skipped..].to_vec(),
                ladder: ladder.clone().filter(|_| !one_stream),
                run,
                one_stream,
                is_first: std::mem::take(&mut is_first),
                failures: failures.clone(),
            };
            let (checked_by_ladder, may_resume) = (attempt.ladder.is_some(), attempt.is_first);
            let local = Arc::new(LocalBytes::default());
            let error = match self.attempt(file, attempt, local.clone(), progress).await {
                Ok((entry, identity)) => {
                    let bad_tiers = failures.bad_tiers();
                    let fetched_bytes = entry.size - local.total();
                    return Ok(DownloadedFile {
                        target: file.target.clone(),
                        entry,
                        identity,
                        fetched_bytes,
                        bad_tiers,
                    });
                }
                Err(PartFailure::IgnoresRanges) if !one_stream => {
                    // Request the whole file as one stream from now on.
                    one_stream = true;
                    continue;
                }
                Err(PartFailure::IgnoresRanges) => Error::unavailable(
                    "the server ignores the Range header, and its response does not begin at the requested byte",
                )
                .transient(false),
                Err(PartFailure::Failed(error) | PartFailure::Storage(error) | PartFailure::RestartFile(error)) => {
                    error
                }
            };
            // Only wrong bytes justify another attempt at the file. Network failures were already retried per part.
            if error.kind() != ErrorKind::Corrupt {
                return Err(error);
            }
            // Without a ladder, the mismatch may come from resumed bytes. Download again without them; this does not
            // count as a mismatch of the sources.
            if may_resume && !checked_by_ladder && local.resumed.load(Ordering::Relaxed) > 0 {
                tracing::warn!(%error, "the partial download of an earlier run is corrupt; downloading the file again");
                continue;
            }
            if checked_by_ladder {
                // Every source failed against the ladder, so the ladder itself may be wrong. Verify by the digest
                // instead.
                ladder = None;
                continue;
            }
            mismatches += 1;
            // After two mismatches drop the first of the remaining sources.
            if mismatches >= 2 {
                if let Some(source) = file.sources.get(skipped) {
                    failures.record_bad(source.tier());
                }
                (skipped, mismatches) = (skipped + 1, 0);
            }
            if skipped >= file.sources.len() {
                return Err(error);
            }
            tracing::warn!(%error, "the file is wrong; downloading it again");
        }
    }

    /// Makes one attempt at a whole file: resumes or creates the staged file, downloads all parts and verifies it.
    async fn attempt(
        &self,
        file: &Arc<DownloadFile>,
        attempt: Attempt,
        local: Arc<LocalBytes>,
        progress: &Progress,
    ) -> Result<(FileEntry, FileIdentity), PartFailure> {
        let (size, has_ladder) = (file.entry.size, attempt.ladder.is_some());
        let in_order = !has_ladder;
        let (part_size, owner) = (attempt.part_size(size), file.owner.clone());
        let (run, write_mode) = (attempt.run, self.write_mode);
        let may_resume = attempt.is_first && file.may_be_staged && !attempt.one_stream;
        let (path, git) = (file.target.clone(), file.entry.sha256.is_none() && file.entry.git_oid.is_some());
        let partial_file = file.partial_file.clone();
        let spec = StagedFileSpec { path, size, part_size, in_order, git, direct: false };
        let is_new = attempt.is_first && !file.may_be_staged;
        let (writer, resumable_parts, generation) = if is_new && spec.fits_one_slice() {
            (StagedWriter::whole(spec, Some(owner)), BTreeSet::new(), partial_file.begin_generation(has_ladder))
        } else {
            blocking(move || {
                // Resume the staged file of an earlier fill if there is a usable one, else create it. A new generation
                // begins before the old file is removed.
                let direct = goes_direct(write_mode, run.purpose, size, run.bytes, in_order);
                let spec = StagedFileSpec { direct, ..spec };
                let resumed = if may_resume { StagedWriter::resume(&spec, Some(owner.clone()))? } else { None };
                match resumed {
                    Some((writer, parts)) => Ok((writer, parts, partial_file.resume_generation(has_ladder))),
                    None => {
                        let generation = partial_file.begin_generation(has_ladder);
                        Ok((StagedWriter::create(spec, Some(owner))?, BTreeSet::new(), generation))
                    }
                }
            })
            .await?
        };
        let order = attempt.order();
        let task = PartTask {
            engine: self.engine().clone(),
            retry: self.retry.clone(),
            metrics: self.metrics.clone(),
            file: file.clone(),
            writer: Arc::new(writer),
            generation,
            sources: attempt.sources,
            ladder: attempt.ladder,
            part_size,
            one_stream: attempt.one_stream,
            resumable_parts: Arc::new(resumable_parts),
            failures: attempt.failures,
            reported_bytes: Arc::default(),
            local,
            progress: progress.clone(),
        };
        let reported_bytes = task.reported_bytes.clone();
        let verified = download_and_verify(task, order).await;
        // A failed attempt takes its bytes back from the progress display.
        verified.inspect_err(|_| progress.undone(reported_bytes.load(Ordering::Relaxed)))
    }
}

/// The tiers that failed to deliver a file, over all its parts and attempts.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Tiers that delivered wrong bytes or lack a file that they list.
    bad: Mutex<BTreeSet<Tier>>,
    /// Tiers whose bytes failed verification, and which were counted for this file.
    corrupt: Mutex<BTreeSet<Tier>>,
    /// Tiers already reported as failed in a warning.
    reported: Mutex<BTreeSet<Tier>>,
}

impl Failures {
    /// Records that `tier` delivered wrong bytes, or lacks a file that it lists.
    pub(super) fn record_bad(&self, tier: Tier) {
        self.bad.lock().insert(tier);
    }

    fn bad_tiers(&self) -> BTreeSet<Tier> {
        self.bad.lock().clone()
    }

    /// Counts `bytes` from `tier` that failed verification. The file is counted once for each tier.
    pub(super) fn count_corrupt(&self, metrics: &Metrics, tier: Tier, bytes: u64) {
        let files = u64::from(self.corrupt.lock().insert(tier));
        metrics.record_corrupt(tier, files, bytes);
    }

    /// Returns true on the first call for `tier`, whose failure must then be logged as a warning.
    pub(super) fn is_first_report(&self, tier: Tier) -> bool {
        self.reported.lock().insert(tier)
    }
}

/// The parameters of one attempt at a file.
struct Attempt {
    sources: Vec<Arc<dyn Source>>,
    ladder: Option<Arc<Ladder>>,
    run: DownloadRun,
    one_stream: bool,
    /// True for the first attempt. Only then may the staged file of an earlier fill be resumed, and only then is it
    /// certain that this fill has not staged the file.
    is_first: bool,
    failures: Arc<Failures>,
}

impl Attempt {
    /// Returns the part size for a file of `size` bytes: that of the ladder, if there is one.
    fn part_size(&self, size: u64) -> u64 {
        self.ladder.as_ref().map_or_else(|| part_size(size), |ladder| ladder.part_size())
    }

    /// Returns the order in which the parts are requested.
    fn order(&self) -> Order {
        match (&self.ladder, self.run.is_alone) {
            (Some(_), _) => Order::Any,
            (None, true) => Order::Windowed,
            (None, false) => Order::Sequential,
        }
    }
}

/// Compares the computed digests with the expected ones. Returns the entry completed with the computed values.
///
/// # Errors
/// `Corrupt` if the digests differ.
fn verify_whole_file(file: &DownloadFile, hashed: FileDigests) -> Result<FileEntry> {
    let mut entry = file.entry.clone();
    let is_expected_by_caller = entry.provenance == Some(Provenance::Caller);
    let mismatch = |what: &str, expected: String, got: String| {
        let tiers: Vec<String> = file.sources.iter().map(|source| source.tier().to_string()).collect();
        let sidecar = file.sources.iter().find_map(|source| source.digest_stated_by(&file.path));
        let sidecar = sidecar.filter(|_| entry.provenance == Some(Provenance::Sidecar));
        let expected = match &sidecar {
            Some(sidecar) => format!("{expected} (from {sidecar})"),
            None => expected,
        };
        let hint = match tiers.as_slice() {
            _ if sidecar.is_some() => {
                "either the file was replaced without its checksum, or it is damaged; correct the one that is wrong"
            }
            _ if is_expected_by_caller => {
                "the content does not match the digest in the reference; check where that digest came from"
            }
            [only] if only == "remote" => "the copy on the remote is damaged; `modelcache put --force` replaces it",
            _ => "the copy at the source is damaged, or a proxy alters it; the download was discarded",
        };
        Error::corrupt(format!(
            "{what} mismatch for {} from {}: expected {expected}, got {got}; discarded",
            file.path,
            tiers.join(" and ")
        ))
        .hint(hint)
    };
    match (entry.sha256, entry.git_oid, hashed.git_oid) {
        (Some(expected), _, _) if expected != hashed.sha256 => {
            return Err(mismatch("sha256", expected.to_string(), hashed.sha256.to_string()));
        }
        (None, Some(expected), Some(got)) if expected != got => {
            return Err(mismatch("git sha1", expected.to_string(), got.to_string()));
        }
        _ => {}
    }
    entry.provenance = entry.provenance.or(Some(Provenance::FirstSeen));
    entry.sha256 = Some(hashed.sha256);
    entry.ladder = Some(hashed.ladder);
    Ok(entry)
}

/// Downloads every part, verifies the file and seals it.
async fn download_and_verify(task: PartTask, order: Order) -> Result<(FileEntry, FileIdentity), PartFailure> {
    download_parts(&task, order).await?;
    let PartTask { writer, ladder, file, failures, metrics, sources, local, .. } = task;
    let writer =
        Arc::into_inner(writer).ok_or_else(|| Error::new(ErrorKind::Other, "a part is still being written"))?;
    let entry = match ladder {
        // With a ladder every part was verified on its own, and the last one against the digest.
        Some(_) => file.entry.clone(),
        None => verify_whole_file(&file, writer.hashed()).inspect_err(|_| {
            // If bytes were resumed, they may be the wrong ones, and the source may be right.
            if let Some(source) = sources.first().filter(|_| local.resumed.load(Ordering::Relaxed) == 0) {
                failures.count_corrupt(&metrics, source.tier(), file.entry.size);
            }
        })?,
    };
    // A file that was written as a whole is sealed already.
    let identity = match writer.written() {
        Some(identity) => identity,
        None => blocking(move || writer.seal()).await?,
    };
    Ok((entry, identity))
}

/// Downloads every part, with as many concurrent requests as the limiter allows. Parts that a reader waits for come
/// first.
async fn download_parts(task: &PartTask, order: Order) -> Result<(), PartFailure> {
    let size = task.file.entry.size;
    let part_bytes = task.part_bytes();
    let group = (REQUEST_BYTES_MAX / part_bytes).max(1);
    let mut queue = PartQueue::new(size.div_ceil(part_bytes), group, order);
    let mut running = JoinSet::new();
    while !queue.is_empty() {
        // Wait for a permit. Failed parts end the download meanwhile.
        let permit = loop {
            tokio::select! {
                permit = task.engine.limiter.acquire() => break permit,
                Some(ended) = running.join_next() => part_result(ended)?,
            }
        };
        // Choose the part only now, because a reader may have started while this task waited for the permit.
        let (next, pause) = next_part(task, &mut queue, part_bytes, running.len());
        if let Some((part, most)) = next {
            let parts = queue.take_run(part, most, |part| task.resumable_parts.contains(&part));
            let range = parts.start * part_bytes..(parts.end * part_bytes).min(size);
            let progress = task.progress.clone();
            let download = task.clone().run(range, permit);
            running.spawn(async move { recording_retries(&progress, download).await });
            continue;
        }
        // Nothing may be requested now: return the permit and wait until a request ends, a demand changes or time is
        // up.
        drop(permit);
        tokio::select! {
            Some(ended) = running.join_next() => part_result(ended)?,
            () = task.file.partial_file.demand_changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
    while let Some(ended) = running.join_next().await {
        part_result(ended)?;
    }
    Ok(())
}

/// Returns the number of parts that the next request may cover, if `queued` parts have not been requested yet.
fn parts_per_request(task: &PartTask, part_bytes: u64, queued: usize) -> u64 {
    let limiter = &task.engine.limiter;
    let bytes = limiter.expected_bytes(REQUEST_TIME).unwrap_or(REQUEST_BYTES_FIRST).min(REQUEST_BYTES_MAX);
    // Towards the end, requests cover fewer parts, so that all connections finish at about the same time.
    let share = queued.div_ceil(2 * limiter.limit()) as u64;
    bytes.div_ceil(part_bytes).min(share).max(1)
}

/// Returns the part to request now and the number of parts that the request may cover, or `None` and the time after
/// which to try again.
fn next_part(
    task: &PartTask,
    queue: &mut PartQueue,
    part_bytes: u64,
    running: usize,
) -> (Option<(u64, u64)>, Duration) {
    let next = task.file.partial_file.next_part(queue, part_bytes);
    let (in_order, most) = (queue.peek(), parts_per_request(task, part_bytes, queue.len()));
    let request = in_order.map(|part| (part, most));
    // True if the in-order hash is so far behind that `part` should not be requested yet.
    let hash_lags = |part: u64| {
        let offset_max = task.writer.hashed_bytes().saturating_add(HASH_LAG_BYTES_MAX);
        let unhashed = task.writer.parts_behind() as u64 * part_bytes;
        // At least one part of each running request may wait for the in-order hash: on slow connections, parts of all
        // requests arrive together.
        let unhashed_max = UNHASHED_BYTES_MAX.max(running as u64 * part_bytes);
        part * part_bytes > offset_max || task.resumable_parts.is_empty() && unhashed > unhashed_max
    };
    match next {
        // A waiting reader is served regardless of how far the hash lags behind. It gets a connection for each part.
        NextPart::Demanded(part) => (Some((part, 1)), Duration::ZERO),
        // Nothing is being downloaded: request a part in any case, so that the download always makes progress.
        _ if running == 0 => (request, Duration::ZERO),
        NextPart::Wait => (None, NEXT_DEMAND_WAIT),
        // Hashing is the bottleneck: wait for it instead of widening the gap.
        NextPart::Any if in_order.is_some_and(hash_lags) => (None, HASH_POLL_INTERVAL),
        NextPart::Any => (request, Duration::MAX),
    }
}

/// Converts the outcome of a part's task, which may have panicked.
fn part_result(ended: Result<Result<(), PartFailure>, tokio::task::JoinError>) -> Result<(), PartFailure> {
    ended.map_err(|cause| Error::new(ErrorKind::Other, "a part's task ended unexpectedly").cause(cause))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RetryConfig;
    use crate::ladder::LadderHasher;
    use crate::manifest::{FileDetails, Manifest};
    use crate::source::Body;
    use async_trait::async_trait;
    use bytes::Bytes;
    use futures::stream;
    use std::collections::VecDeque;
    use std::ops::Range;

    /// A source that sends a file from the start of the requested range to the end of the file, in two chunks. Each
    /// request gets the next file of the list.
    #[derive(Debug)]
    struct RestOfFile(Mutex<VecDeque<Vec<u8>>>);

    #[async_trait]
    impl Source for RestOfFile {
        fn tier(&self) -> Tier {
            Tier::Origin
        }

        async fn manifest(&self) -> Result<Option<Manifest>> {
            Ok(None)
        }

        async fn read(&self, _: &FilePath, range: Range<u64>) -> Result<Body> {
            let mut files = self.0.lock();
            let file = files.pop_front().ok_or_else(|| Error::unavailable("no more").transient(false))?;
            let mut first = Bytes::from(file[usize::try_from(range.start).unwrap_or_default()..].to_vec());
            let second = first.split_off(first.len() / 2);
            Ok(Body { start: range.start, stream: stream::iter([Ok(first), Ok(second)]).boxed() })
        }
    }

    /// A source that sends at most `bytes_max` bytes of each requested range. It lacks the file if `content` is `None`.
    #[derive(Debug)]
    struct Ranges {
        content: Option<Vec<u8>>,
        bytes_max: usize,
        /// Number of bytes by which the response claims to begin after the requested range does.
        shift: u64,
        requests: Mutex<Vec<Range<u64>>>,
    }

    #[async_trait]
    impl Source for Ranges {
        fn tier(&self) -> Tier {
            Tier::Origin
        }

        async fn manifest(&self) -> Result<Option<Manifest>> {
            Ok(None)
        }

        async fn read(&self, _: &FilePath, range: Range<u64>) -> Result<Body> {
            let at = |offset: u64| usize::try_from(offset).unwrap_or_default();
            self.requests.lock().push(range.clone());
            let content = self.content.as_ref().ok_or_else(|| Error::not_found("no such file"))?;
            let sent = &content[at(range.start)..at(range.end).min(at(range.start).saturating_add(self.bytes_max))];
            let stream = stream::iter([Ok(Bytes::copy_from_slice(sent))]).boxed();
            Ok(Body { start: range.start + self.shift, stream })
        }
    }

    /// Downloads a file of 64 parts from a [`Ranges`] source. If `has_missing` is true, a source that lacks the file is
    /// tried before it. Returns the ranges that were requested from the source that has the file, and the number of
    /// retries.
    async fn download_ranges(bytes_max: usize, has_missing: bool) -> (Vec<Range<u64>>, u64) {
        let folder = tempfile::tempdir().expect("a folder");
        let content: Vec<u8> = (0..64 * RANGES_PART).map(|at| (at % 251) as u8).collect();
        let mut hasher = LadderHasher::new(RANGES_PART);
        hasher.update(&content);
        let (sha256, ladder) = hasher.finish();
        let details = FileDetails { sha256: Some(sha256), ladder: Some(ladder), ..FileDetails::default() };
        let source = |content| Arc::new(Ranges { content, bytes_max, shift: 0, requests: Mutex::default() });
        let (missing, right) = (source(None), source(Some(content.clone())));
        let mut file = file_without_digest(&RootedPath::root(folder.path()), content.len() as u64, Vec::new());
        file.entry = FileEntry::with(content.len() as u64, details);
        file.sources = vec![right.clone()];
        if has_missing {
            file.sources.insert(0, missing);
        }
        let (target, downloader) = (file.target.clone(), new_downloader());
        downloader.download(vec![file], Purpose::Read, &Progress::new()).await.expect("downloads");
        assert!(std::fs::read(target.full()).expect("is there") == content);
        let mut requests = right.requests.lock().clone();
        requests.sort_by_key(|range| range.start);
        (requests, downloader.metrics.counts().retries.origin)
    }

    /// Size of a part, in bytes.
    const RANGES_PART: u64 = 64 << 10;

    #[tokio::test(flavor = "multi_thread")]
    async fn one_request_covers_several_parts_and_each_byte_is_requested_once() {
        for has_missing in [false, true] {
            let (requests, retries) = download_ranges(usize::MAX, has_missing).await;
            assert!(requests.len() < 64, "{requests:?}");
            assert!(requests.iter().zip(&requests[1..]).all(|(one, next)| one.end == next.start), "{requests:?}");
            assert_eq!(retries, 0);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_response_that_ends_at_the_boundary_of_a_part_is_continued_without_a_retry() {
        let (requests, retries) = download_ranges(RANGES_PART as usize, false).await;
        assert_eq!((requests.len(), retries), (64, 0), "{requests:?}");
        assert!(requests.iter().any(|range| range.end - range.start > RANGES_PART), "{requests:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_response_that_begins_after_the_first_byte_is_not_taken_for_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = file_without_digest(&RootedPath::root(folder.path()), 1000, Vec::new());
        let (content, requests) = (Some(vec![7; 1000]), Mutex::default());
        file.sources = vec![Arc::new(Ranges { content, bytes_max: usize::MAX, shift: 5, requests })];
        let download = new_downloader().download(vec![file], Purpose::Read, &Progress::new()).await;
        let error = download.expect_err("the response is not the file");
        assert!(error.to_string().contains("begins at byte 5"), "{error}");
    }

    fn new_downloader() -> Downloader {
        Downloader::new(Retry::new(RetryConfig::default()), WriteMode::Buffered, Metrics::default())
    }

    /// A file to download from one source, without any digest.
    fn file_without_digest(folder: &RootedPath, size: u64, sent_files: Vec<Vec<u8>>) -> DownloadFile {
        let owner = FileLock::try_exclusive(&folder.join("owner")).expect("locks").expect("is free");
        let target = folder.join("file");
        DownloadFile {
            path: FilePath::new("file").expect("a path"),
            entry: FileEntry::with(size, FileDetails::default()),
            target: target.clone(),
            may_be_staged: false,
            owner: Arc::new(owner),
            sources: vec![Arc::new(RestOfFile(Mutex::new(sent_files.into())))],
            on_part: None,
            partial_file: PartialFile::new(target, size, super::super::ReadGate::Verified),
        }
    }

    /// Tests a file of one slice, which is held back until the response ends, and a file of several slices, whose first
    /// slices are already hashed when the surplus bytes arrive.
    #[tokio::test(flavor = "multi_thread")]
    async fn bytes_of_a_response_that_is_too_long_are_discarded_even_without_a_digest() {
        for bytes in [1000, 1_400_000_u32] {
            let folder = tempfile::tempdir().expect("a folder");
            let right: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
            let too_long = [b"OTHER BYTES ".as_slice(), &right].concat();
            let file = file_without_digest(
                &RootedPath::root(folder.path()),
                right.len() as u64,
                vec![too_long, right.clone()],
            );
            let (target, downloader) = (file.target.clone(), new_downloader());
            let downloaded =
                downloader.download(vec![file], Purpose::Read, &Progress::new()).await.expect("the second is right");
            assert!(
                std::fs::read(target.full()).expect("is there") == right,
                "{bytes}: wrong bytes were taken for right"
            );
            let digest = downloaded.first().and_then(|downloaded| downloaded.entry.sha256);
            assert_eq!(digest, Some(crate::digest::Digest::of(&right)), "{bytes}: the digest is that of other bytes");
        }
    }

    /// A reader of unverified bytes gets the slices of a file as they arrive, but a small file is written as a whole.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_small_file_is_written_as_a_whole_also_while_a_reader_waits_for_its_first_byte() {
        let folder = tempfile::tempdir().expect("folder");
        let file = file_without_digest(&RootedPath::root(folder.path()), 1000, vec![vec![7; 1000]]);
        let (target, reader) = (file.target.clone(), file.partial_file.open_reader(true));
        new_downloader().download(vec![file], Purpose::Read, &Progress::new()).await.expect("downloads");
        assert!(reader.begin_read(&(0..1000)).is_some(), "the reader may read it");
        assert_eq!(std::fs::read(target.full()).expect("is there"), [7; 1000]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_wrong_part_is_rejected_even_if_its_stream_fails_afterwards() {
        let folder = tempfile::tempdir().expect("a folder");
        let right: Vec<u8> = (0..700_000_u32).map(|at| (at % 251) as u8).collect();
        let mut damaged = right.clone();
        damaged[699_999] ^= 1;
        damaged.extend(b"more");
        let size = right.len() as u64;
        let mut hasher = LadderHasher::new(part_size(size));
        hasher.update(&right);
        let (sha256, ladder) = hasher.finish();
        let entry =
            FileEntry::with(size, FileDetails { sha256: Some(sha256), ladder: Some(ladder), ..FileDetails::default() });
        let owner =
            FileLock::try_exclusive(&RootedPath::root(folder.path()).join("owner")).expect("locks").expect("is free");
        let target = RootedPath::root(folder.path()).join("file");
        let file = DownloadFile {
            path: FilePath::new("file").expect("a path"),
            entry,
            target: target.clone(),
            may_be_staged: false,
            owner: Arc::new(owner),
            sources: vec![Arc::new(RestOfFile(Mutex::new([damaged, right.clone()].into())))],
            on_part: None,
            partial_file: PartialFile::new(target.clone(), size, super::super::ReadGate::ByPart),
        };
        let downloader = new_downloader();
        downloader.download(vec![file], Purpose::Read, &Progress::new()).await.expect("the second response is right");
        let counts = downloader.metrics.counts();
        assert_eq!((counts.retries.origin, counts.received_bytes.origin), (1, 2 * size + 4));
        assert!(std::fs::read(target.full()).expect("is there") == right, "wrong bytes were taken for right");
    }
}
