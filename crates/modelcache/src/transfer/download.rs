//! The pour: files from sources into staging, in parallel ranges, checked on the way.
//!
//! Every file comes part by part, each part from the first of its sources that gives it right (`part.rs`). A file
//! without a ladder is checked as a whole: one that fails is fetched once more from the same sources, then without the
//! first. What an ended fill left in staging is gone on with: its parts are read and checked before they count. Memory
//! is bounded by the buffers that all fills share, whatever the size of files. Nothing here decides where bytes should
//! come from or what becomes of them.

use super::engine::Engine;
use super::order::{Order, PartQueue};
use super::part::PartTask;
use super::part_sink::PartSink;
use super::partial_file::{NEXT_DEMAND_WAIT, Next, PartialFile};
use super::retry::Retry;
use crate::config::WriteMode;
use crate::digest::Provenance;
use crate::disk::{FileLock, Hashed, Purpose, RootedPath, StagedFileSpec, StagedWriter, goes_direct};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::{Ladder, part_size};
use crate::manifest::{FileEntry, FileIdentity};
use crate::progress::Progress;
use crate::source::Source;
use futures::{StreamExt, TryStreamExt, stream};
use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

/// How many parts a file's hash in order may lag behind what is asked for: what came early has to be read back, best from
/// memory.
const LAG_PARTS: u64 = 64;
/// How many parts that came may wait for a hash that is slower than the network. What an ended fill left came long ago,
/// and is no reason to wait.
const BEHIND_PARTS: usize = 8;
/// How soon to look again whether the hash has caught up.
const LOOK_BEHIND: Duration = Duration::from_millis(5);

/// One file to be poured.
#[derive(Debug, Clone)]
pub(crate) struct DownloadFile {
    pub(crate) path: FilePath,
    /// What is known of it: its size always, digests and ladder if anybody knows them.
    pub(crate) entry: FileEntry,
    /// Where it is staged.
    pub(crate) target: RootedPath,
    /// Says that the staging is somebody's as long as anything may be written there.
    pub(crate) owner: Arc<FileLock>,
    /// Where it can be read, best first.
    pub(crate) sources: Vec<Arc<dyn Source>>,
    /// Who is told of every part that is written and checked.
    pub(crate) on_part: Option<PartSink>,
    /// What has come of it, for those who read it meanwhile.
    pub(crate) partial_file: Arc<PartialFile>,
}

/// A file that is staged and proven.
#[derive(Debug, Clone)]
pub(crate) struct DownloadedFile {
    pub(crate) target: RootedPath,
    /// The entry with what the pour learnt: digest, ladder, provenance.
    pub(crate) entry: FileEntry,
    pub(crate) identity: FileIdentity,
    /// Bytes that came over a network: all but what an ended fill had left, or another local directory has.
    pub(crate) fetched_bytes: u64,
    /// Tiers whose copy failed a check or was gone although they list it.
    pub(crate) bad_tiers: BTreeSet<Tier>,
}

/// Pours files; one per cache. All of a process share connections, buffers and workers.
#[derive(Debug, Clone)]
pub(crate) struct Downloader {
    retry: Retry,
    write_mode: WriteMode,
    engine: Arc<Engine>,
}

/// What all files of one pour have in common.
#[derive(Debug, Clone, Copy)]
struct DownloadRun {
    purpose: Purpose,
    /// Bytes of all its files.
    bytes: u64,
    /// There is one file only.
    is_alone: bool,
}

/// Bytes of an attempt that came over no network.
#[derive(Debug, Default)]
pub(super) struct Local {
    /// Left by an ended fill.
    pub(super) resumed: AtomicU64,
    /// Read from a local directory.
    pub(super) copied: AtomicU64,
}

impl Local {
    fn bytes(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed) + self.copied.load(Ordering::Relaxed)
    }
}

/// Why a part or file could not be had in the present way.
pub(super) enum PartFailure {
    /// No source gave it.
    Failed(Error),
    /// It cannot be written, or read back: another source would not help.
    Broken(Error),
    /// The file's hash has bytes of an answer that turned out wrong: the file starts over.
    Spoiled(Error),
    /// A server answers the whole file whatever range is asked.
    IgnoresRanges,
}

impl From<Error> for PartFailure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Downloader {
    pub(crate) fn new(retry: Retry, write_mode: WriteMode) -> Self {
        Self { retry, write_mode, engine: Engine::shared() }
    }

    /// Pours all `files`; ends at the first that no source gives.
    pub(crate) async fn download(
        &self,
        mut files: Vec<DownloadFile>,
        purpose: Purpose,
        progress: &Progress,
    ) -> Result<Vec<DownloadedFile>> {
        let bytes = files.iter().map(|file| file.entry.size).sum();
        let pouring = DownloadRun { purpose, bytes, is_alone: files.len() == 1 };
        // Not every node of a fleet begins with the same file.
        files.shuffle(&mut rand::rng());
        let pours: Vec<_> = files.into_iter().map(|file| self.download_file(file, pouring, progress)).collect();
        stream::iter(pours).buffer_unordered(self.engine.limiter.files_at_once()).try_collect().await
    }

    /// Pours one file, trying its sources as long as that makes sense.
    ///
    /// A whole-file mismatch says nothing about which source was bad, so the order of attempts is: all sources, all
    /// sources once more, then without the first, and so on.
    async fn download_file(
        &self,
        file: DownloadFile,
        pouring: DownloadRun,
        progress: &Progress,
    ) -> Result<DownloadedFile> {
        let file = Arc::new(file);
        let outcome = self.try_sources(&file, pouring, progress).await;
        if outcome.is_err() {
            // Before the file goes: nobody shall be given what is not there.
            file.partial_file.failed();
        }
        if matches!(&outcome, Err(error) if error.kind() == ErrorKind::Corrupt) {
            let target = file.target.clone();
            blocking(move || StagedWriter::forget(&target)).await?;
        }
        outcome.inspect(|_| file.partial_file.proven())
    }

    async fn try_sources(
        &self,
        file: &Arc<DownloadFile>,
        pouring: DownloadRun,
        progress: &Progress,
    ) -> Result<DownloadedFile> {
        let failures = Arc::new(Failures::default());
        // An empty file has no part that a ladder could check: it is hashed as a whole.
        let by_parts = file.entry.sha256.is_some() && file.entry.size > 0;
        let mut ladder = file.entry.ladder.clone().filter(|_| by_parts).map(Arc::new);
        let (mut skipped, mut mismatches, mut one_stream, mut resume) = (0, 0, false, true);
        loop {
            let attempt = Attempt {
                sources: file.sources[skipped..].to_vec(),
                ladder: ladder.clone().filter(|_| !one_stream),
                pouring,
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
                    return Ok(DownloadedFile {
                        target: file.target.clone(),
                        entry,
                        identity,
                        fetched_bytes,
                        bad_tiers,
                    });
                }
                Err(PartFailure::IgnoresRanges) if !one_stream => {
                    one_stream = true;
                    continue;
                }
                Err(PartFailure::IgnoresRanges) => {
                    Error::unavailable("the server ignores ranges and starts elsewhere").transient(false)
                }
                Err(PartFailure::Failed(error) | PartFailure::Broken(error) | PartFailure::Spoiled(error)) => error,
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
        file: &Arc<DownloadFile>,
        attempt: Attempt,
        local: Arc<Local>,
        progress: &Progress,
    ) -> Result<(FileEntry, FileIdentity), PartFailure> {
        let (size, in_order) = (file.entry.size, attempt.ladder.is_none());
        let (part_size, owner) = (attempt.part_size(size), file.owner.clone());
        let (pouring, write_mode, may_resume) =
            (attempt.pouring, self.write_mode, attempt.resume && !attempt.one_stream);
        let (path, git) = (file.target.clone(), file.entry.sha256.is_none() && file.entry.git_oid.is_some());
        let partial_file = file.partial_file.clone();
        let (writer, left_over, generation) = blocking(move || {
            let direct = goes_direct(write_mode, pouring.purpose, size, pouring.bytes, in_order);
            let draft = StagedFileSpec { path, size, part_size, in_order, git, direct };
            let left = if may_resume { StagedWriter::resume(&draft, Some(owner.clone()))? } else { None };
            match left {
                Some((writer, parts)) => Ok((writer, parts, partial_file.go_on(!in_order))),
                None => {
                    let generation = partial_file.begin(!in_order);
                    Ok((StagedWriter::create(draft, Some(owner))?, BTreeSet::new(), generation))
                }
            }
        })
        .await?;
        let order = attempt.order();
        let task = PartTask {
            engine: self.engine.clone(),
            retry: self.retry.clone(),
            file: file.clone(),
            writer: Arc::new(writer),
            generation,
            sources: attempt.sources,
            ladder: attempt.ladder,
            part_size,
            one_stream: attempt.one_stream,
            left_over: Arc::new(left_over),
            failures: attempt.failures,
            shown: Arc::default(),
            local,
            progress: progress.clone(),
        };
        let shown = task.shown.clone();
        let proof = prove(task, order).await;
        proof.inspect_err(|_| progress.undone(shown.load(Ordering::Relaxed)))
    }
}

/// Which tiers failed to give a file, over all its parts and attempts.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Those that gave wrong bytes, or none that they list.
    bad: Mutex<BTreeSet<Tier>>,
    /// Those that were spoken of.
    told: Mutex<BTreeSet<Tier>>,
}

impl Failures {
    pub(super) fn note_bad(&self, tier: Tier) {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).insert(tier);
    }

    fn bad(&self) -> BTreeSet<Tier> {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether this tier's trouble has not been told yet; from now on it has.
    pub(super) fn is_news(&self, tier: Tier) -> bool {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(tier)
    }
}

/// How one attempt at a file goes about it.
struct Attempt {
    sources: Vec<Arc<dyn Source>>,
    ladder: Option<Arc<Ladder>>,
    pouring: DownloadRun,
    one_stream: bool,
    /// Go on with what an ended fill left.
    resume: bool,
    failures: Arc<Failures>,
}

impl Attempt {
    fn part_size(&self, size: u64) -> u64 {
        self.ladder.as_ref().map_or_else(|| part_size(size), |ladder| ladder.part_size())
    }

    fn order(&self) -> Order {
        match (&self.ladder, self.pouring.is_alone) {
            (Some(_), _) => Order::Any,
            (None, true) => Order::Nearly,
            (None, false) => Order::Strict,
        }
    }
}

/// Compares what was hashed with what is known; the entry with what was learnt.
fn proven(file: &DownloadFile, hashed: Hashed) -> Result<FileEntry> {
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

/// Fetches every part, proves the whole.
async fn prove(task: PartTask, order: Order) -> Result<(FileEntry, FileIdentity), PartFailure> {
    all_parts(&task, order).await?;
    let PartTask { writer, ladder, file, .. } = task;
    let writer =
        Arc::into_inner(writer).ok_or_else(|| Error::new(ErrorKind::Other, "a part is still being written"))?;
    let entry = match ladder {
        Some(_) => file.entry.clone(),
        None => proven(&file, writer.hashed())?,
    };
    let identity = blocking(move || writer.seal()).await?;
    Ok((entry, identity))
}

/// Fetches every part, as many at once as the limiter allows; what a reader waits for before the rest.
async fn all_parts(task: &PartTask, order: Order) -> Result<(), PartFailure> {
    let size = task.file.entry.size;
    let step = if task.one_stream { size.max(1) } else { task.part_size };
    let mut left = PartQueue::new(size.div_ceil(step), order);
    let mut running = JoinSet::new();
    while !left.is_empty() {
        let permit = loop {
            tokio::select! {
                permit = task.engine.limiter.acquire() => break permit,
                Some(ended) = running.join_next() => ended_part(ended)?,
            }
        };
        // As late as can be: somebody may have begun to read meanwhile.
        let (part, pause) = next_part(task, &mut left, step, running.is_empty());
        if let Some(part) = part {
            left.begin(part);
            let range = part * step..((part + 1) * step).min(size);
            running.spawn(task.clone().run(range, permit));
            continue;
        }
        drop(permit);
        tokio::select! {
            Some(ended) = running.join_next() => ended_part(ended)?,
            () = task.file.partial_file.demand_changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
    while let Some(ended) = running.join_next().await {
        ended_part(ended)?;
    }
    Ok(())
}

/// The part to be asked for now, or for how long to ask for none.
fn next_part(task: &PartTask, left: &mut PartQueue, step: u64, is_idle: bool) -> (Option<u64>, Duration) {
    let demand_changed = task.file.partial_file.next(left, step);
    let in_order = left.peek();
    let lags = |part: u64| {
        let ahead = task.writer.hashed_bytes().saturating_add(LAG_PARTS * step);
        part * step > ahead || task.left_over.is_empty() && task.writer.parts_behind() > BEHIND_PARTS
    };
    match demand_changed {
        Next::Demanded(part) => (Some(part), Duration::ZERO),
        _ if is_idle => (in_order, Duration::ZERO),
        Next::Wait => (None, NEXT_DEMAND_WAIT),
        Next::Any if in_order.is_some_and(lags) => (None, LOOK_BEHIND),
        Next::Any => (in_order, Duration::MAX),
    }
}

fn ended_part(ended: Result<Result<(), PartFailure>, tokio::task::JoinError>) -> Result<(), PartFailure> {
    ended.map_err(|cause| Error::new(ErrorKind::Other, "a part's task ended unexpectedly").cause(cause))?
}

/// Runs disk work or hashing off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(cause) => Err(Error::new(ErrorKind::Other, "background work ended unexpectedly").cause(cause)),
    }
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
    use std::collections::VecDeque;
    use std::ops::Range;

    /// A server that sends the file it is asked for from the beginning of the range to its own end: another each time.
    #[derive(Debug)]
    struct Endless(Mutex<VecDeque<Vec<u8>>>);

    #[async_trait]
    impl Source for Endless {
        fn tier(&self) -> Tier {
            Tier::Origin
        }

        async fn manifest(&self) -> Result<Option<Manifest>> {
            Ok(None)
        }

        async fn read(&self, _: &FilePath, range: Range<u64>) -> Result<Body> {
            let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let answer = answers.pop_front().ok_or_else(|| Error::unavailable("no more").transient(false))?;
            let sent = answer[usize::try_from(range.start).unwrap_or_default()..].to_vec();
            Ok(Body { start: range.start, stream: stream::iter([Ok(Bytes::from(sent))]).boxed() })
        }
    }

    /// A file that is poured from one source, without any digest.
    fn undigested(folder: &RootedPath, size: u64, answers: Vec<Vec<u8>>) -> DownloadFile {
        let owner = FileLock::try_exclusive(&folder.join("owner")).expect("locks").expect("nobody else");
        let target = folder.join("file");
        DownloadFile {
            path: FilePath::new("file").expect("a path"),
            entry: FileEntry::with(size, FileDetails::default()),
            target: target.clone(),
            owner: Arc::new(owner),
            sources: vec![Arc::new(Endless(Mutex::new(answers.into())))],
            on_part: None,
            partial_file: PartialFile::new(target, size, super::super::ReadGate::Proven),
        }
    }

    /// Of one slice, which is held back, and of several, the first of which are hashed when the surplus shows.
    #[tokio::test(flavor = "multi_thread")]
    async fn bytes_of_an_answer_that_is_too_long_are_not_kept_where_nobody_states_a_digest() {
        for bytes in [1000, 1_400_000_u32] {
            let folder = tempfile::tempdir().expect("a folder");
            let right: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
            let too_long = [b"OTHER BYTES ".as_slice(), &right].concat();
            let file = undigested(&RootedPath::root(folder.path()), right.len() as u64, vec![too_long, right.clone()]);
            let (target, downloader) =
                (file.target.clone(), Downloader::new(Retry::new(RetryConfig::default()), WriteMode::Buffered));
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

    #[tokio::test(flavor = "multi_thread")]
    async fn a_part_that_is_wrong_is_wrong_also_where_the_stream_fails_after_it() {
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
        let owner = FileLock::try_exclusive(&RootedPath::root(folder.path()).join("owner"))
            .expect("locks")
            .expect("nobody else");
        let target = RootedPath::root(folder.path()).join("file");
        let file = DownloadFile {
            path: FilePath::new("file").expect("a path"),
            entry,
            target: target.clone(),
            owner: Arc::new(owner),
            sources: vec![Arc::new(Endless(Mutex::new([damaged, right.clone()].into())))],
            on_part: None,
            partial_file: PartialFile::new(target.clone(), size, super::super::ReadGate::ByPart),
        };
        let downloader = Downloader::new(Retry::new(RetryConfig::default()), WriteMode::Buffered);
        downloader.download(vec![file], Purpose::Read, &Progress::new()).await.expect("the second answer is right");
        assert!(std::fs::read(target.full()).expect("is there") == right, "wrong bytes were taken for right");
    }
}
