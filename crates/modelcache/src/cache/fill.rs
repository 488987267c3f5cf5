//! Flights: one fill for everybody who wants the same.
//!
//! In this process the fill is a task of its own. Callers wait for it and see its progress; it goes on as long as any
//! of them waits, whoever of them is cancelled, and ends with the last, unless every byte has come and is proven: then it
//! is published all the same. Other processes see it through the leader's record on disk. Callers who want another part of
//! the same artifact meet where processes meet: at its fill lock. Who opens one file is content with a flight that
//! brings more.

use super::Cache;
use super::resolve::FetchRequest;
use super::tasks::Tasks;
use crate::digest::Digest;
use crate::disk::{HEARTBEAT_INTERVAL, Leader, Leadership, LeasedArtifact, Watch};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::progress::{Phase, PhaseGuard, Progress};
use crate::selection::Selection;
use crate::transfer::{PartialFiles, PartialReader, blocking};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time;

/// First and longest pause before a lock that somebody holds is looked at again.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const POLL_INTERVAL_MAX: Duration = Duration::from_millis(200);
/// A flight whose task vanished without a word is started again this often.
const STARTS_MAX: usize = 3;

/// The flights of this process.
#[derive(Debug, Default)]
pub(super) struct InFlightFills {
    running: Mutex<HashMap<FillKey, Weak<InFlightFill>>>,
    /// Those that nobody waits for any more and that come to their end all the same.
    finishing: Arc<Tasks>,
}

/// What makes two callers want the same: key, selection, demanded digest; and how far they let a fill reach.
type FillKey = (ArtifactKey, String, Option<Digest>, Tier);

/// A fill under way. Dropped by the last who waits for it, it ends.
#[derive(Debug)]
pub(super) struct InFlightFill {
    id: FillKey,
    selection: Selection,
    progress: Progress,
    state: watch::Receiver<FillState>,
    partial_files: watch::Receiver<Option<PartialFiles>>,
    /// Started by who opened a file.
    is_for_reading: bool,
    /// Gone when this is dropped.
    task: Option<JoinHandle<()>>,
    finishing: Arc<Tasks>,
}

/// Where a fill tells those who wait for it.
#[derive(Debug)]
pub(super) struct FillPublisher {
    state: watch::Sender<FillState>,
    partial_files: watch::Sender<Option<PartialFiles>>,
    first_read: Option<FirstRead>,
}

/// A file that somebody is about to read.
#[derive(Debug, Clone)]
pub(super) struct FirstRead {
    pub(super) file: FilePath,
    pub(super) unchecked: bool,
}

/// How far a flight is, for those who wait.
#[derive(Debug, Clone)]
pub(super) enum FillState {
    /// Bytes are still coming.
    Running,
    /// The artifact can be lent, and whoever started the flight still writes to the remote.
    Published(FillOutcome),
    /// All is done, or nothing came of it.
    Ended(Result<FillOutcome>),
}

/// What came of a flight.
#[derive(Debug, Clone)]
pub(super) struct FillOutcome {
    pub(super) leased: Arc<LeasedArtifact>,
    /// Bytes that no local directory had.
    pub(super) fetched_bytes: u64,
    pub(super) backfilled_bytes: u64,
    pub(super) copied_bytes: u64,
}

impl FillOutcome {
    /// Somebody else brought it.
    pub(super) fn waited(self) -> Self {
        Self { fetched_bytes: 0, backfilled_bytes: 0, copied_bytes: 0, ..self }
    }
}

/// Who fills.
pub(super) enum Joined {
    /// Somebody else just did.
    Filled(Box<LeasedArtifact>),
    /// This flight.
    Leading(Lead),
}

impl Cache {
    /// Step 3 of the main path within this process: starts the flight, or waits for the one that is under way.
    pub(super) async fn fill_single_flight(&self, request: &FetchRequest, progress: &Progress) -> Result<FillOutcome> {
        for _ in 0..STARTS_MAX {
            let (flight, started) = self.flight(request, None, progress);
            let outcome = if started { flight.ended().await } else { flight.published(progress).await };
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
        Err(vanished())
    }

    /// The flight for `wanted`, and whether this call started it. For somebody who opens a file, one that brings more
    /// of the same will do.
    pub(super) fn flight(
        &self,
        request: &FetchRequest,
        first_read: Option<&FirstRead>,
        progress: &Progress,
    ) -> (Arc<InFlightFill>, bool) {
        let id = (request.key.clone(), request.selection.identity(), request.digest, request.max_tier);
        let mut in_flight = self.0.in_flight.lock();
        in_flight.retain(|_, flight| flight.strong_count() > 0);
        let running = |flight: &Weak<InFlightFill>| flight.upgrade().filter(|flight| flight.is_running());
        let wider = || {
            let first_read = first_read.filter(|_| request.digest.is_none())?;
            in_flight.values().filter_map(running).find(|flight| flight.brings(&first_read.file, &id))
        };
        if let Some(flight) = in_flight.get(&id).and_then(running).or_else(wider) {
            return (flight, false);
        }
        let ((state_sender, state), (arrivals_sender, partial_files)) =
            (watch::channel(FillState::Running), watch::channel(None));
        let publisher =
            FillPublisher { state: state_sender, partial_files: arrivals_sender, first_read: first_read.cloned() };
        let (cache, request, shown) = (self.clone(), request.clone(), progress.clone());
        let selection = request.selection.clone();
        let task = tokio::spawn(async move {
            let ended = cache.fill(&request, &shown, &publisher).await;
            publisher.state.send_replace(FillState::Ended(ended));
        });
        let flight = Arc::new(InFlightFill {
            id: id.clone(),
            selection,
            progress: progress.clone(),
            state,
            partial_files,
            is_for_reading: first_read.is_some(),
            task: Some(task),
            finishing: self.0.in_flight.finishing.clone(),
        });
        in_flight.insert(id, Arc::downgrade(&flight));
        (flight, true)
    }

    /// Waits for the fills that go on though nobody waits for them any more, because every byte of them has come: what
    /// they bring is published then.
    pub async fn wait_for_fills(&self) {
        self.0.in_flight.finishing.finish().await;
    }

    /// Step 3 between processes: waits until somebody else has filled the artifact, or nobody else is filling it.
    pub(super) async fn lead(&self, request: &FetchRequest, progress: &Progress) -> Result<Joined> {
        let mut waiting = Waiting::new(progress);
        loop {
            let leadership = self.try_lead(&request.key, &mut waiting).await?;
            // Looked at after the lock was won, too: the previous leader may just have published.
            if let Some(leased) = self.try_acquire(request).await? {
                return Ok(Joined::Filled(Box::new(leased)));
            }
            match leadership {
                Leadership::Ours(leader) => return Ok(Joined::Leading(Lead::start(leader, progress))),
                Leadership::Theirs(heartbeat) => waiting.pause(heartbeat.done_bytes, heartbeat.total_bytes).await,
            }
        }
    }

    /// Waits until nobody else fills `key`.
    pub(super) async fn lead_alone(&self, key: &ArtifactKey, progress: &Progress) -> Result<Lead> {
        let mut waiting = Waiting::new(progress);
        loop {
            match self.try_lead(key, &mut waiting).await? {
                Leadership::Ours(leader) => return Ok(Lead::start(leader, progress)),
                Leadership::Theirs(heartbeat) => waiting.pause(heartbeat.done_bytes, heartbeat.total_bytes).await,
            }
        }
    }

    async fn try_lead(&self, key: &ArtifactKey, waiting: &mut Waiting<'_>) -> Result<Leadership> {
        let (disk, key, mut watch) = (self.0.disk.clone(), key.clone(), std::mem::take(&mut waiting.watch));
        let (leadership, watch) = blocking(move || Ok((disk.try_lead(&key, &mut watch)?, watch))).await?;
        waiting.watch = watch;
        Ok(leadership)
    }
}

impl InFlightFills {
    fn lock(&self) -> MutexGuard<'_, HashMap<FillKey, Weak<InFlightFill>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FillPublisher {
    /// What is coming. Whoever started the flight to read a file is a reader of it from now on, before the first byte
    /// is asked for.
    pub(super) fn partial_files(&self, partial_files: PartialFiles) -> Option<PartialReader> {
        let first_read = self.first_read.as_ref();
        let reader =
            first_read.and_then(|first_read| Some(partial_files.get(&first_read.file)?.read(first_read.unchecked)));
        self.partial_files.send_replace(Some(partial_files));
        reader
    }

    /// What was coming is not what was wanted: nothing of it is to be read any more.
    pub(super) fn forget(&self) {
        self.partial_files.borrow().iter().flat_map(PartialFiles::values).for_each(|file| file.failed());
    }

    /// There is something to lend.
    pub(super) fn published(&self, outcome: &FillOutcome) {
        self.state.send_replace(FillState::Published(outcome.clone()));
    }
}

impl InFlightFill {
    /// How far it is, for whoever looks at the calls that wait for it.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What tells how far it is, without keeping it going.
    pub(super) fn state(&self) -> watch::Receiver<FillState> {
        self.state.clone()
    }

    /// What tells which files it brings.
    pub(super) fn partial_files(&self) -> watch::Receiver<Option<PartialFiles>> {
        self.partial_files.clone()
    }

    /// Whether `file` of what `id` is about comes with it.
    fn brings(&self, file: &FilePath, id: &FillKey) -> bool {
        let ((key, _, digest, max_tier), (request, _, demanded, wanted_reach)) = (&self.id, id);
        (key, digest, max_tier) == (request, demanded, wanted_reach) && self.selection.matches(file)
    }

    /// Whether every byte has come and is proven, and only the end is missing.
    fn is_finishing(&self) -> bool {
        self.partial_files.borrow().as_ref().is_some_and(|files| files.values().all(|file| file.is_complete()))
    }

    fn is_running(&self) -> bool {
        // A task that vanished without a word has dropped its end.
        matches!(*self.state.borrow(), FillState::Running) && self.state.has_changed().is_ok()
    }

    /// Waits for the end; `None` if the task vanished.
    async fn ended(&self) -> Option<Result<FillOutcome>> {
        let mut state = self.state.clone();
        let ended = state.wait_for(|state| matches!(state, FillState::Ended(_))).await.ok()?;
        match &*ended {
            FillState::Ended(outcome) => Some(outcome.clone()),
            FillState::Running | FillState::Published(_) => None,
        }
    }

    /// Waits until there is something to lend, showing how far it is; `None` if the task vanished.
    async fn published(&self, progress: &Progress) -> Option<Result<FillOutcome>> {
        let _phase = progress.enter(Phase::Join, 0);
        let mut state = self.state.clone();
        loop {
            tokio::select! {
                outcome = state.wait_for(|state| !matches!(state, FillState::Running)) => {
                    return match &*outcome.ok()? {
                        FillState::Published(outcome) => Some(Ok(outcome.clone().waited())),
                        FillState::Ended(outcome) => Some(outcome.clone().map(FillOutcome::waited)),
                        FillState::Running => None,
                    };
                }
                () = time::sleep(POLL_INTERVAL_MAX) => {
                    let (done, total) = self.progress.download_bytes();
                    progress.watch(done, total);
                }
            }
        }
    }
}

impl Drop for InFlightFill {
    fn drop(&mut self) {
        let Some(task) = self.task.take() else { return };
        // Whoever opened a file and has read it does not wait for the upload either.
        if self.is_finishing() && (self.is_running() || self.is_for_reading) {
            return self.finishing.keep(task);
        }
        if self.is_running() {
            tracing::debug!(key = %self.id.0, "nobody waits for this fill any more; it ends");
        }
        task.abort();
    }
}

/// A flight's task ended without a word.
pub(super) fn vanished() -> Error {
    Error::new(ErrorKind::Other, "the fill ended unexpectedly")
}

/// A caller that waits for another process.
struct Waiting<'a> {
    progress: &'a Progress,
    watch: Watch,
    pause: Duration,
    phase: Option<PhaseGuard>,
}

impl<'a> Waiting<'a> {
    fn new(progress: &'a Progress) -> Self {
        Self { progress, watch: Watch::default(), pause: POLL_INTERVAL, phase: None }
    }

    /// Shows how far the other one is, and sleeps a little longer each time.
    async fn pause(&mut self, done_bytes: u64, total_bytes: u64) {
        self.phase.get_or_insert_with(|| self.progress.enter(Phase::Join, 0));
        self.progress.watch(done_bytes, total_bytes);
        time::sleep(self.pause).await;
        self.pause = (self.pause * 5 / 4).min(POLL_INTERVAL_MAX);
    }
}

/// The lead of a fill: it beats until it is dropped.
#[derive(Debug)]
pub(super) struct Lead(AbortHandle);

impl Lead {
    fn start(leader: Leader, progress: &Progress) -> Self {
        let progress = progress.clone();
        let leader = Arc::new(leader);
        let beating = tokio::spawn(async move {
            let mut beats = time::interval(HEARTBEAT_INTERVAL);
            loop {
                beats.tick().await;
                let ((done, total), leader) = (progress.download_bytes(), leader.clone());
                // A directory that hangs must not hold up anything else.
                let heartbeat = blocking(move || {
                    leader.heartbeat(done, total);
                    Ok(())
                });
                let _ = heartbeat.await;
            }
        });
        Self(beating.abort_handle())
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.0.abort();
    }
}
