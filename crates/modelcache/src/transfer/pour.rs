//! The pour: files from sources into staging, in parallel ranges, checked on the way.
//!
//! Every file comes part by part, each part from the first of its sources that gives it right. A part that is cut goes
//! on where it stopped; one that fails its check is fetched once more from the same source, then from the next. A file
//! without a ladder is checked as a whole, with the same rule. What an ended fill left in staging is gone on with: its
//! parts are read and checked before they count. Memory is bounded by the number of connections, whatever the size of
//! files. Nothing here decides where bytes should come from or what becomes of them.

use super::buffer::{Buffer, BufferPool};
use super::retry::{Attempts, Retry};
use super::sink::PartSink;
use crate::digest::{Digest, Provenance};
use crate::disk::{Draft, FileLock, Hashed, StagedWriter};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::{Ladder, PartHasher, part_size};
use crate::manifest::{FileEntry, FileIdentity};
use crate::progress::Progress;
use crate::source::Source;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Requests under way at once, over all fills of a cache.
const CONNECTIONS: usize = 16;
/// Files being poured at once in one fill: bounds open files; small files keep every connection busy.
const FILES_AT_ONCE: usize = 32;
/// A connection that brings less than this in one read timeout has stalled, in bytes.
const STALL_BYTES: u64 = 32 << 10;

/// One file to be poured.
#[derive(Debug, Clone)]
pub(crate) struct PourFile {
    pub(crate) path: FilePath,
    /// What is known of it: its size always, digests and ladder if anybody knows them.
    pub(crate) entry: FileEntry,
    /// Where it is staged.
    pub(crate) target: PathBuf,
    /// Says that the staging is somebody's as long as anything may be written there.
    pub(crate) owner: Arc<FileLock>,
    /// Where it can be read, best first.
    pub(crate) sources: Vec<Arc<dyn Source>>,
    /// Who is told of every part that is written and checked.
    pub(crate) on_part: Option<PartSink>,
}

/// A file that is staged and proven.
#[derive(Debug, Clone)]
pub(crate) struct Poured {
    pub(crate) target: PathBuf,
    /// The entry with what the pour learnt: digest, ladder, provenance.
    pub(crate) entry: FileEntry,
    pub(crate) identity: FileIdentity,
    /// Bytes that came over a network: all but what an ended fill had left, or another local directory has.
    pub(crate) fetched_bytes: u64,
    /// Tiers whose copy failed a check or was gone although they list it.
    pub(crate) bad_tiers: BTreeSet<Tier>,
}

/// Pours files; one per cache, so that all fills share connections and buffers.
#[derive(Debug, Clone)]
pub(crate) struct Pourer {
    retry: Retry,
    connections: Arc<Semaphore>,
    buffers: BufferPool,
}

/// What one part's task needs.
#[derive(Debug, Clone)]
struct PartTask {
    pourer: Pourer,
    file: Arc<PourFile>,
    writer: Arc<StagedWriter>,
    /// Sources left for this attempt at the file, best first.
    sources: Vec<Arc<dyn Source>>,
    ladder: Option<Arc<Ladder>>,
    part_size: u64,
    /// Parts that an ended fill says it wrote.
    left_over: Arc<BTreeSet<u64>>,
    failures: Arc<Failures>,
    /// Bytes that this attempt has shown as done.
    shown: Arc<AtomicU64>,
    local: Arc<Local>,
    progress: Progress,
}

/// Bytes of an attempt that came over no network.
#[derive(Debug, Default)]
struct Local {
    /// Left by an ended fill.
    resumed: AtomicU64,
    /// Read from a local directory.
    copied: AtomicU64,
}

impl Local {
    fn bytes(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed) + self.copied.load(Ordering::Relaxed)
    }
}

/// Why a part or file could not be had in the present way.
enum Trouble {
    /// No source gave it.
    Failed(Error),
    /// A server answers the whole file whatever range is asked.
    IgnoresRanges,
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Pourer {
    pub(crate) fn new(retry: Retry) -> Self {
        Self { retry, connections: Arc::new(Semaphore::new(CONNECTIONS)), buffers: BufferPool::default() }
    }

    /// Pours all `files`; ends at the first that no source gives.
    pub(crate) async fn pour(&self, files: Vec<PourFile>, progress: &Progress) -> Result<Vec<Poured>> {
        let pours: Vec<_> = files.into_iter().map(|file| self.pour_file(file, progress)).collect();
        stream::iter(pours).buffer_unordered(FILES_AT_ONCE).try_collect().await
    }

    /// Pours one file, trying its sources as long as that makes sense.
    ///
    /// A whole-file mismatch says nothing about which source was bad, so the order of attempts is: all sources, all
    /// sources once more, then without the first, and so on.
    async fn pour_file(&self, file: PourFile, progress: &Progress) -> Result<Poured> {
        let file = Arc::new(file);
        let outcome = self.try_sources(&file, progress).await;
        if matches!(&outcome, Err(error) if error.kind() == ErrorKind::Corrupt) {
            let target = file.target.clone();
            blocking(move || StagedWriter::forget(&target)).await?;
        }
        outcome
    }

    async fn try_sources(&self, file: &Arc<PourFile>, progress: &Progress) -> Result<Poured> {
        let failures = Arc::new(Failures::default());
        // An empty file has no part that a ladder could check: it is hashed as a whole.
        let by_parts = file.entry.sha256.is_some() && file.entry.size > 0;
        let mut ladder = file.entry.ladder.clone().filter(|_| by_parts).map(Arc::new);
        let (mut skipped, mut mismatches, mut one_stream, mut resume) = (0, 0, false, true);
        loop {
            let attempt = Attempt {
                sources: file.sources[skipped..].to_vec(),
                ladder: ladder.clone().filter(|_| !one_stream),
                one_stream,
                resume: std::mem::take(&mut resume),
                failures: failures.clone(),
            };
            let (checked_by_ladder, may_resume) = (attempt.ladder.is_some(), attempt.resume);
            let local = Arc::new(Local::default());
            let error = match self.attempt(file, attempt, local.clone(), progress).await {
                Ok((entry, identity)) => {
                    let bad_tiers = failures.bad();
                    let fetched_bytes = entry.size - local.bytes();
                    return Ok(Poured { target: file.target.clone(), entry, identity, fetched_bytes, bad_tiers });
                }
                Err(Trouble::IgnoresRanges) if !one_stream => {
                    one_stream = true;
                    continue;
                }
                Err(Trouble::IgnoresRanges) => {
                    Error::unavailable("the server ignores ranges and starts elsewhere").transient(false)
                }
                Err(Trouble::Failed(error)) => error,
            };
            if error.kind() != ErrorKind::Corrupt {
                return Err(error);
            }
            if may_resume && !checked_by_ladder && local.resumed.load(Ordering::Relaxed) > 0 {
                tracing::warn!(%error, "what an ended fill left was wrong; fetching the file anew");
                continue;
            }
            if checked_by_ladder {
                // Every source failed it: perhaps it is the ladder that is wrong. Hash in order, once more.
                ladder = None;
                continue;
            }
            mismatches += 1;
            if mismatches >= 2 {
                if let Some(source) = file.sources.get(skipped) {
                    failures.note_bad(source.tier());
                }
                (skipped, mismatches) = (skipped + 1, 0);
            }
            if skipped >= file.sources.len() {
                return Err(error);
            }
            tracing::warn!(%error, "fetching the file again");
        }
    }

    /// One attempt at a whole file: all its parts, then the proof.
    async fn attempt(
        &self,
        file: &Arc<PourFile>,
        attempt: Attempt,
        local: Arc<Local>,
        progress: &Progress,
    ) -> Result<(FileEntry, FileIdentity), Trouble> {
        let size = file.entry.size;
        let draft = Draft {
            path: file.target.clone(),
            size,
            part_size: attempt.ladder.as_ref().map_or_else(|| part_size(size), |ladder| ladder.part_size()),
            in_order: attempt.ladder.is_none(),
            git: file.entry.sha256.is_none() && file.entry.git_oid.is_some(),
        };
        let (part_size, owner) = (draft.part_size, file.owner.clone());
        let may_resume = attempt.resume && !attempt.one_stream;
        let (writer, left_over) = blocking(move || {
            let left = if may_resume { StagedWriter::resume(&draft, Some(owner.clone()))? } else { None };
            match left {
                Some(left) => Ok(left),
                None => Ok((StagedWriter::create(draft, Some(owner))?, BTreeSet::new())),
            }
        })
        .await?;
        let task = PartTask {
            pourer: self.clone(),
            file: file.clone(),
            writer: Arc::new(writer),
            sources: attempt.sources,
            ladder: attempt.ladder,
            part_size,
            left_over: Arc::new(left_over),
            failures: attempt.failures,
            shown: Arc::default(),
            local,
            progress: progress.clone(),
        };
        let shown = task.shown.clone();
        let proof = task.prove(attempt.one_stream).await;
        proof.inspect_err(|_| progress.undone(shown.load(Ordering::Relaxed)))
    }
}

/// Which tiers failed to give a file, over all its parts and attempts.
#[derive(Debug, Default)]
struct Failures {
    /// Those that gave wrong bytes, or none that they list.
    bad: Mutex<BTreeSet<Tier>>,
    /// Those that were spoken of.
    told: Mutex<BTreeSet<Tier>>,
}

impl Failures {
    fn note_bad(&self, tier: Tier) {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).insert(tier);
    }

    fn bad(&self) -> BTreeSet<Tier> {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether this tier's trouble has not been told yet; from now on it has.
    fn is_news(&self, tier: Tier) -> bool {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(tier)
    }
}

/// How one attempt at a file goes about it.
struct Attempt {
    sources: Vec<Arc<dyn Source>>,
    ladder: Option<Arc<Ladder>>,
    one_stream: bool,
    /// Go on with what an ended fill left.
    resume: bool,
    failures: Arc<Failures>,
}

/// Compares what was hashed with what is known; the entry with what was learnt.
fn proven(file: &PourFile, hashed: Hashed) -> Result<FileEntry> {
    let mut entry = file.entry.clone();
    let demanded = entry.provenance == Some(Provenance::Caller);
    let mismatch = |what: &str, expected: String, got: String| {
        let tiers: Vec<String> = file.sources.iter().map(|source| source.tier().to_string()).collect();
        let sidecar = file.sources.iter().find_map(|source| source.stated_by(&file.path));
        let sidecar = sidecar.filter(|_| entry.provenance == Some(Provenance::Sidecar));
        let expected = match &sidecar {
            Some(sidecar) => format!("{expected} (as {sidecar} says)"),
            None => expected,
        };
        let hint = match tiers.as_slice() {
            _ if sidecar.is_some() => {
                "either the file was replaced and its checksum was not, or it is damaged: see which, and mend that one"
            }
            _ if demanded => "the reference demands other content; check where the digest came from",
            [only] if only == "remote" => "the copy there is damaged; `modelcache put --force` replaces it",
            _ => "the copy there is damaged, or something on the way alters it; nothing was kept",
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

impl PartTask {
    /// Fetches every part, proves the whole.
    async fn prove(self, one_stream: bool) -> Result<(FileEntry, FileIdentity), Trouble> {
        self.all_parts(one_stream).await?;
        let Self { writer, ladder, file, .. } = self;
        let writer =
            Arc::into_inner(writer).ok_or_else(|| Error::new(ErrorKind::Other, "a part is still being written"))?;
        let entry = match ladder {
            Some(_) => file.entry.clone(),
            None => proven(&file, writer.hashed())?,
        };
        let identity = blocking(move || writer.seal()).await?;
        Ok((entry, identity))
    }

    fn show(&self, bytes: u64) {
        self.shown.fetch_add(bytes, Ordering::Relaxed);
        self.progress.done(bytes);
    }

    fn unshow(&self, bytes: u64) {
        self.shown.fetch_sub(bytes, Ordering::Relaxed);
        self.progress.undone(bytes);
    }

    /// Fetches every part, as many at once as connections allow.
    async fn all_parts(&self, one_stream: bool) -> Result<(), Trouble> {
        let size = self.file.entry.size;
        let step = if one_stream { size.max(1) } else { self.part_size };
        let mut running = JoinSet::new();
        for start in (0..size).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            let permit = loop {
                tokio::select! {
                    permit = self.pourer.connections.clone().acquire_owned() => break permit,
                    Some(ended) = running.join_next() => ended_part(ended)?,
                }
            };
            let permit = permit.map_err(|_| Error::new(ErrorKind::Other, "the cache is closing"))?;
            let (task, file) = (self.clone(), self.file.clone());
            running.spawn(async move {
                let range = start..(start + step).min(size);
                let outcome = match task.left_over(&range).await {
                    Ok(false) => task.part(range).await,
                    Ok(true) => Ok(()),
                    Err(error) => Err(error.into()),
                };
                if let (Ok(()), Some(sink)) = (&outcome, &file.on_part) {
                    sink.tell(&file.path, start..(start + step).min(size));
                }
                drop(permit);
                outcome
            });
        }
        while let Some(ended) = running.join_next().await {
            ended_part(ended)?;
        }
        Ok(())
    }

    /// Takes the part in `range` as an ended fill left it, if it did and, where a ladder can tell, it is right.
    async fn left_over(&self, range: &Range<u64>) -> Result<bool> {
        let index = range.start / self.part_size;
        if !self.left_over.contains(&index) {
            return Ok(false);
        }
        let (writer, ladder, sha256, checked) =
            (self.writer.clone(), self.ladder.clone(), self.file.entry.sha256, range.clone());
        let right = blocking(move || {
            let right = match ladder.as_ref().and_then(|ladder| Some((ladder, ladder.before(index)?))) {
                Some((ladder, before)) => {
                    let hasher = PartHasher::resume(before, checked.start);
                    writer.recheck(checked, hasher, |hasher| holds(ladder, index, sha256, hasher))?
                }
                None => true,
            };
            if right {
                writer.part_done(index)?;
            }
            Ok(right)
        });
        let right = right.await?;
        if right {
            self.local.resumed.fetch_add(range.end - range.start, Ordering::Relaxed);
            self.show(range.end - range.start);
        }
        Ok(right)
    }

    /// Gets one range right, from the first source that gives it.
    async fn part(self, range: Range<u64>) -> Result<(), Trouble> {
        let mut failure: Option<Error> = None;
        let mut progress = PartProgress::new(&self, &range);
        for (at, source) in self.sources.iter().enumerate() {
            let is_last = at + 1 == self.sources.len();
            let mut attempts = self.pourer.retry.attempts();
            let mut mismatched = false;
            loop {
                match self.stream(source.as_ref(), &range, &mut progress).await {
                    Ok(()) => {
                        if source.tier() == Tier::Disk {
                            self.local.copied.fetch_add(range.end - range.start, Ordering::Relaxed);
                        }
                        return Ok(());
                    }
                    Err(Trouble::IgnoresRanges) => return Err(Trouble::IgnoresRanges),
                    Err(Trouble::Failed(error))
                        if error.kind() == ErrorKind::Corrupt && !mismatched && error.is_transient() =>
                    {
                        tracing::warn!(%error, "fetching the part again");
                        mismatched = true;
                    }
                    Err(Trouble::Failed(error)) if !is_last && progress.is_short() => {
                        self.note_bad(source.tier(), &Error::corrupt(error.message()));
                        failure = Some(worse(failure, error));
                        progress.short_ends = 0;
                        break;
                    }
                    Err(Trouble::Failed(error)) => match self.pause(&mut attempts, error).await {
                        Ok(()) => {}
                        Err(error) => {
                            self.note_bad(source.tier(), &error);
                            failure = Some(worse(failure, error.tier(source.tier())));
                            break;
                        }
                    },
                }
            }
        }
        let nowhere = || Error::not_found(format!("no source holds {}", self.file.path));
        Err(Trouble::Failed(failure.unwrap_or_else(nowhere)))
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
    async fn stream(&self, source: &dyn Source, range: &Range<u64>, part: &mut PartProgress) -> Result<(), Trouble> {
        let timeout = self.pourer.retry.read_timeout();
        let silent = || Error::unavailable(format!("no bytes for {} s", timeout.as_secs_f32())).tier(source.tier());
        let want = part.next..range.end;
        if want.is_empty() {
            return self.finish(source.tier(), range, part).await;
        }
        let body =
            tokio::time::timeout(timeout, source.read(&self.file.path, want.clone())).await.map_err(|_| silent())??;
        if body.start != want.start {
            // From the beginning of the file: only of use to whoever asked for all of it.
            if body.start != 0 || part.next != range.start {
                part.restart(self, range);
            }
            if range.start != 0 || range.end != self.file.entry.size {
                return Err(Trouble::IgnoresRanges);
            }
        }
        let mut stream = body.stream;
        let mut buffer = part.buffer.take().unwrap_or_else(|| self.pourer.buffers.take());
        buffer.clear();
        let mut pace = Pace::start();
        let outcome: Result<()> = loop {
            let chunk = match tokio::time::timeout(timeout, stream.next()).await {
                Err(_) => break Err(silent()),
                Ok(None) => break Ok(()),
                Ok(Some(Err(error))) => break Err(error),
                Ok(Some(Ok(chunk))) => chunk,
            };
            self.progress.received(source.tier(), chunk.len() as u64);
            if pace.stalled(chunk.len() as u64, timeout) {
                break Err(Error::unavailable("the connection has nearly stalled").tier(source.tier()));
            }
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let room = range.end - part.next;
                let taken = buffer.fill(rest, usize::try_from(room).unwrap_or(usize::MAX));
                if taken == 0 {
                    break;
                }
                rest = &rest[taken..];
                if buffer.len() == super::buffer::SLICE_BYTES || buffer.len() as u64 == room {
                    buffer = part.flush(self, buffer).await?;
                }
            }
            if !rest.is_empty() {
                break Err(Error::corrupt("the server sent more than was asked for")
                    .tier(source.tier())
                    .transient(true));
            }
        };
        part.buffer = Some(buffer);
        outcome?;
        if part.next < range.end {
            return Err(part.ended_early(&self.file.path, want.start, range.end, source.tier()).into());
        }
        self.finish(source.tier(), range, part).await
    }

    /// The range is written: check it, if a ladder can.
    async fn finish(&self, tier: Tier, range: &Range<u64>, part: &mut PartProgress) -> Result<(), Trouble> {
        if let (Some(ladder), Some(hasher)) = (&self.ladder, part.hasher.clone()) {
            let index = range.start / self.part_size;
            if !holds(ladder, index, self.file.entry.sha256, hasher) {
                part.restart(self, range);
                let expected = self.file.entry.sha256.map(|digest| digest.short()).unwrap_or_default();
                return Err(Trouble::Failed(
                    Error::corrupt(format!(
                        "sha256 mismatch for {} in bytes {}-{}: not part of {expected}…; discarded",
                        self.file.path, range.start, range.end
                    ))
                    .tier(tier)
                    .transient(true),
                ));
            }
        }
        let (writer, index, last) =
            (self.writer.clone(), range.start / self.part_size, range.end.div_ceil(self.part_size));
        Ok(blocking(move || (index..last).try_for_each(|part| writer.part_done(part))).await?)
    }
}

/// Whether a part, hashed from the rung before it, ends at the rung after it; the last one at the file's digest.
fn holds(ladder: &Ladder, index: u64, sha256: Option<Digest>, hasher: PartHasher) -> bool {
    match ladder.after(index) {
        Some(after) => hasher.state() == Some(after),
        None => Some(hasher.finish()) == sha256,
    }
}

/// How far one range has come.
struct PartProgress {
    /// Next byte wanted.
    next: u64,
    /// The hash so far, where a ladder will check it.
    hasher: Option<PartHasher>,
    buffer: Option<Buffer>,
    /// Streams in a row that ended in good order without bringing a byte.
    short_ends: u32,
}

impl PartProgress {
    fn new(task: &PartTask, range: &Range<u64>) -> Self {
        Self { next: range.start, hasher: Self::hasher(task, range), buffer: None, short_ends: 0 }
    }

    fn hasher(task: &PartTask, range: &Range<u64>) -> Option<PartHasher> {
        let state = task.ladder.as_ref()?.before(range.start / task.part_size)?;
        Some(PartHasher::resume(state, range.start))
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

    fn restart(&mut self, task: &PartTask, range: &Range<u64>) {
        task.unshow(self.next - range.start);
        (self.next, self.hasher) = (range.start, Self::hasher(task, range));
    }

    /// Hashes and writes a slice, off the async threads; the buffer comes back empty.
    async fn flush(&mut self, task: &PartTask, mut buffer: Buffer) -> Result<Buffer> {
        let (writer, offset, mut hasher) = (task.writer.clone(), self.next, self.hasher.take());
        let len = buffer.len() as u64;
        let (buffer, hasher) = blocking(move || {
            if let Some(hasher) = &mut hasher {
                hasher.update(&buffer);
            }
            writer.write(offset, &buffer)?;
            buffer.clear();
            Ok((buffer, hasher))
        })
        .await?;
        self.hasher = hasher;
        self.next += len;
        task.show(len);
        Ok(buffer)
    }
}

/// Finds connections that still send, but hardly.
struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn start() -> Self {
        Self { since: Instant::now(), bytes: 0 }
    }

    fn stalled(&mut self, bytes: u64, window: std::time::Duration) -> bool {
        self.bytes += bytes;
        if self.since.elapsed() < window {
            return false;
        }
        let stalled = self.bytes < STALL_BYTES;
        *self = Self::start();
        stalled
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

fn ended_part(ended: Result<Result<(), Trouble>, tokio::task::JoinError>) -> Result<(), Trouble> {
    ended.map_err(|cause| Error::new(ErrorKind::Other, "a part's task ended unexpectedly").cause(cause))?
}

/// Runs disk work or hashing off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(cause) => Err(Error::new(ErrorKind::Other, "background work ended unexpectedly").cause(cause)),
    }
}
