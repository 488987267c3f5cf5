//! Single-flight: concurrent requests for the same files share one fill.
//!
//! Within a process, an in-flight fill is a task. Callers with the same [`FillKey`] wait for it and see its progress.
//! The task is aborted when the last caller is dropped, unless all bytes are downloaded and verified: then it is still
//! published. A caller that opens one file may also join a fill of more files.
//!
//! Fills of different single files of one artifact run at the same time, under one fill lock. All other fills of the
//! artifact are serialized by that lock, so that no file is downloaded twice. So are the fills of other processes,
//! which read the progress from the heartbeat of the leader.

use super::Cache;
use super::report::FillStatus;
use super::resolve::FetchRequest;
use super::tasks::Tasks;
use crate::digest::Digest;
use crate::disk::{HEARTBEAT_INTERVAL, HeartbeatWatch, Leader, Leadership, LeasedArtifact};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::metrics::GaugeGuard;
use crate::mutex::Mutex;
use crate::progress::{Phase, PhaseGuard, Progress};
use crate::runtime::blocking;
use crate::selection::Selection;
use crate::transfer::{PartialFiles, PartialReader, recording_retries};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time;

/// Initial time between two attempts to take the fill lock.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Longest time between two attempts to take the fill lock.
const POLL_INTERVAL_MAX: Duration = Duration::from_millis(200);
/// Maximum number of attempts to start a fill whose task ends without a result each time.
const STARTS_MAX: usize = 3;

/// The in-flight fills of this process.
#[derive(Debug, Default)]
pub(super) struct InFlightFills {
    running: Mutex<HashMap<FillKey, Weak<InFlightFill>>>,
    /// Fills that no caller waits for, but that continue because all bytes are downloaded and verified.
    finishing: Arc<Tasks>,
}

/// Requests with equal keys share a fill: artifact key, selection, demanded digest, and the farthest tier that the fill
/// may contact.
type FillKey = (ArtifactKey, String, Option<Digest>, Tier);

/// An in-flight fill. Callers share it in an `Arc`; when the last one drops it, the task is aborted.
#[derive(Debug)]
pub(super) struct InFlightFill {
    fill_key: FillKey,
    selection: Selection,
    progress: Progress,
    started: Instant,
    state: watch::Receiver<FillState>,
    partial_files: watch::Receiver<Option<PartialFiles>>,
    /// The leadership of this fill, while it has one.
    leadership: SharedLeadership,
    /// True if the fill was started to open a file.
    is_for_reading: bool,
    /// `None` only while this value is dropped.
    task: Option<JoinHandle<()>>,
    finishing: Arc<Tasks>,
}

/// The sending side of an in-flight fill: publishes its state and its partial files to the waiting callers.
#[derive(Debug)]
pub(super) struct FillPublisher {
    state: watch::Sender<FillState>,
    partial_files: watch::Sender<Option<PartialFiles>>,
    leadership: SharedLeadership,
    first_read: Option<FirstRead>,
}

/// The leadership of a fill, which a fill of another file of the artifact may share. It does not keep the fill lock.
type SharedLeadership = Arc<Mutex<Weak<LeaderGuard>>>;

/// The file that the caller will read during the fill.
#[derive(Debug, Clone)]
pub(super) struct FirstRead {
    pub(super) file: FilePath,
    /// True if the reader accepts unverified bytes.
    pub(super) unchecked: bool,
}

/// The state of an in-flight fill, as waiting callers see it.
#[derive(Debug, Clone)]
pub(super) enum FillState {
    /// The fill is downloading.
    Running,
    /// The artifact is published and leased. The backfill to the remote may still be running.
    Published(FillOutcome),
    /// The fill ended, with success or failure.
    Ended(Result<FillOutcome>),
}

/// The leased artifact, and the bytes transferred for this caller.
#[derive(Debug, Clone)]
pub(super) struct FillOutcome {
    pub(super) leased: Arc<LeasedArtifact>,
    /// Bytes of the files that no local directory had.
    pub(super) fetched_bytes: u64,
    /// Bytes uploaded to the remote.
    pub(super) backfilled_bytes: u64,
    /// Bytes that the object store copied instead.
    pub(super) copied_bytes: u64,
}

impl FillOutcome {
    /// Returns the outcome for a caller that joined the fill. The transferred bytes count only for the call that
    /// started the fill.
    pub(super) fn without_transfers(self) -> Self {
        Self { fetched_bytes: 0, backfilled_bytes: 0, copied_bytes: 0, ..self }
    }
}

/// Result of [`Cache::join_or_lead`].
pub(super) enum JoinOutcome {
    /// Another fill published the artifact.
    Filled(Box<LeasedArtifact>),
    /// The caller is the leader and has to fill the artifact.
    Leading(Arc<LeaderGuard>),
}

impl Cache {
    /// Step 3 of the main path within this process: joins the in-flight fill, or starts one.
    pub(super) async fn fill_single_flight(&self, request: &FetchRequest, progress: &Progress) -> Result<FillOutcome> {
        for _ in 0..STARTS_MAX {
            let (fill, started) = self.join_or_start_fill(request, None, progress);
            // The caller that started the fill also waits for the backfill.
            let outcome = if started {
                fill.wait_until_ended().await
            } else {
                let _waiting = self.count_waiting_call();
                fill.wait_until_published(progress).await
            };
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
        Err(task_lost())
    }

    /// Returns the in-flight fill for `request`, and true if this call started it. With `first_read`, also joins a fill
    /// of more files that includes the file to read.
    pub(super) fn join_or_start_fill(
        &self,
        request: &FetchRequest,
        first_read: Option<&FirstRead>,
        progress: &Progress,
    ) -> (Arc<InFlightFill>, bool) {
        let fill_key = fill_key(request);
        let mut in_flight = self.0.in_flight.running.lock();
        // Remove the fills that no caller holds any more.
        in_flight.retain(|_, fill| fill.strong_count() > 0);
        let running = |fill: &Weak<InFlightFill>| fill.upgrade().filter(|fill| fill.is_running());
        // A demanded digest is that of the selected file or of the file list, so the selections must be equal then.
        let wider = || {
            let first_read = first_read.filter(|_| request.digest.is_none())?;
            in_flight.values().filter_map(running).find(|fill| fill.includes(&first_read.file, &fill_key))
        };
        if let Some(fill) = in_flight.get(&fill_key).and_then(running).or_else(wider) {
            return (fill, false);
        }
        // The map stays locked until the new fill is in it, so that no other caller starts the same one.
        let ((state_sender, state), (partial_files_sender, partial_files)) =
            (watch::channel(FillState::Running), watch::channel(None));
        let leadership = SharedLeadership::default();
        let publisher = FillPublisher {
            state: state_sender,
            partial_files: partial_files_sender,
            leadership: leadership.clone(),
            first_read: first_read.cloned(),
        };
        let (cache, request, fill_progress) = (self.clone(), request.clone(), progress.clone());
        let selection = request.selection.clone();
        // A task of its own: the fill continues if the caller that started it is cancelled, but others wait for it.
        let running = self.metrics().count_while(|counts| &mut counts.fills_in_flight);
        let task = tokio::spawn(async move {
            let _running = running;
            let fill = cache.fill(&request, &fill_progress, &publisher);
            let ended = recording_retries(&fill_progress, fill).await;
            publisher.state.send_replace(FillState::Ended(ended));
        });
        let fill = Arc::new(InFlightFill {
            fill_key: fill_key.clone(),
            selection,
            progress: progress.clone(),
            started: Instant::now(),
            state,
            partial_files,
            leadership,
            is_for_reading: first_read.is_some(),
            task: Some(task),
            finishing: self.0.in_flight.finishing.clone(),
        });
        // The map holds a weak reference, so that only callers keep the fill running.
        in_flight.insert(fill_key, Arc::downgrade(&fill));
        (fill, true)
    }

    /// Returns the in-flight fills of this cache and its clones that callers wait for, oldest first.
    pub fn fills(&self) -> Vec<FillStatus> {
        // An upgraded reference would keep the fill running, so each one is dropped at once.
        let status = |fill: &Weak<InFlightFill>| fill.upgrade().and_then(|fill| fill.status());
        let mut fills: Vec<_> = self.0.in_flight.running.lock().values().filter_map(status).collect();
        fills.sort_by_key(|fill| Reverse(fill.running_for));
        fills
    }

    /// Counts a call as waiting until the guard is dropped.
    pub(super) fn count_waiting_call(&self) -> GaugeGuard {
        self.metrics().count_while(|counts| &mut counts.waiting_calls)
    }

    /// Waits for the fills that continue without a caller because all their bytes are downloaded and verified. They are
    /// published when this returns.
    pub async fn wait_for_fills(&self) {
        self.0.in_flight.finishing.wait().await;
    }

    /// Step 3 of the main path between processes: waits until another process has filled the artifact, or until this
    /// process is the leader.
    pub(super) async fn join_or_lead(&self, request: &FetchRequest, progress: &Progress) -> Result<JoinOutcome> {
        let mut waiting = FillWait::new(self, progress);
        loop {
            if let Some(leader) = self.leadership_to_share(request) {
                let leased = self.try_acquire(request).await?;
                return Ok(leased.map_or(JoinOutcome::Leading(leader), |leased| JoinOutcome::Filled(Box::new(leased))));
            }
            let leadership = self.try_lead(&request.key, &mut waiting).await?;
            // Also after the lock was taken: the previous leader may have published just before.
            if let Some(leased) = self.try_acquire(request).await? {
                return Ok(JoinOutcome::Filled(Box::new(leased)));
            }
            match leadership {
                Leadership::Ours(leader) => {
                    return Ok(JoinOutcome::Leading(Arc::new(LeaderGuard::start(leader, progress))));
                }
                Leadership::Theirs(heartbeat) => {
                    waiting.pause(heartbeat.done_bytes, heartbeat.total_bytes).await;
                }
            }
        }
    }

    /// Returns the leadership of a fill of the same artifact in this process, if the fill of `request` may run beside
    /// it: both are fills of a single file, and no fill of the same file or of more files is running.
    fn leadership_to_share(&self, request: &FetchRequest) -> Option<Arc<LeaderGuard>> {
        let file = request.selection.one_file()?;
        let own_key = fill_key(request);
        let in_flight = self.0.in_flight.running.lock();
        let mut leader = None;
        for fill in in_flight.values().filter_map(Weak::upgrade) {
            if fill.fill_key.0 != request.key || fill.fill_key == own_key || !fill.is_running() {
                continue;
            }
            if fill.selection.one_file().is_none_or(|other| other == file) {
                return None;
            }
            leader = leader.or_else(|| fill.leadership.lock().upgrade());
        }
        leader
    }

    /// Waits until this process is the leader of the fill of `key`, even if another process has published the artifact
    /// meanwhile.
    pub(super) async fn wait_to_lead(&self, key: &ArtifactKey, progress: &Progress) -> Result<LeaderGuard> {
        let mut waiting = FillWait::new(self, progress);
        loop {
            match self.try_lead(key, &mut waiting).await? {
                Leadership::Ours(leader) => return Ok(LeaderGuard::start(leader, progress)),
                Leadership::Theirs(heartbeat) => waiting.pause(heartbeat.done_bytes, heartbeat.total_bytes).await,
            }
        }
    }

    /// Tries once to become the leader of the fill of `key`.
    async fn try_lead(&self, key: &ArtifactKey, waiting: &mut FillWait<'_>) -> Result<Leadership> {
        let (key, mut watch) = (key.clone(), std::mem::take(&mut waiting.watch));
        let (leadership, watch) = self.on_disk(move |disk| Ok((disk.try_lead(&key, &mut watch)?, watch))).await?;
        waiting.watch = watch;
        Ok(leadership)
    }
}

/// Returns the key under which requests share a fill.
fn fill_key(request: &FetchRequest) -> FillKey {
    (request.key.clone(), request.selection.identity(), request.digest, request.max_tier)
}

impl FillPublisher {
    /// Lets fills of other files of the artifact share the leadership of this one.
    pub(super) fn share_leadership(&self, leader: &Arc<LeaderGuard>) {
        *self.leadership.lock() = Arc::downgrade(leader);
    }

    /// Publishes the partial files of the fill. If the fill was started to open a file, returns a reader of that file:
    /// it is registered before the first request, so that the download starts with that file.
    pub(super) fn set_partial_files(&self, partial_files: PartialFiles) -> Option<PartialReader> {
        let first_read = self.first_read.as_ref();
        let reader = first_read
            .and_then(|first_read| Some(partial_files.get(&first_read.file)?.open_reader(first_read.unchecked)));
        self.partial_files.send_replace(Some(partial_files));
        reader
    }

    /// Invalidates all partial files, because the download failed or its source changed. Readers must not use bytes
    /// received so far.
    pub(super) fn invalidate_partial_files(&self) {
        self.partial_files.borrow().iter().flat_map(PartialFiles::values).for_each(|file| file.mark_failed());
    }

    /// Reports to the waiting callers that the artifact is published and leased.
    pub(super) fn set_published(&self, outcome: &FillOutcome) {
        self.state.send_replace(FillState::Published(outcome.clone()));
    }
}

impl InFlightFill {
    /// Returns the progress of the fill.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Returns the status of the fill; `None` if it has ended.
    fn status(&self) -> Option<FillStatus> {
        if matches!(*self.state.borrow(), FillState::Ended(_)) || self.state.has_changed().is_err() {
            return None;
        }
        let (now, retries, key) = (self.progress.snapshot(), self.progress.retries(), self.fill_key.0.clone());
        Some(FillStatus {
            reference: key.to_string(),
            key,
            phase: now.phase,
            done_bytes: now.done_bytes,
            total_bytes: (now.total_bytes > 0).then_some(now.total_bytes),
            remote_bytes: now.remote_bytes,
            origin_bytes: now.origin_bytes,
            running_for: self.started.elapsed(),
            retries: retries.count,
            last_error: retries.last_error,
        })
    }

    /// Returns a watch of the state. It does not keep the fill running.
    pub(super) fn state(&self) -> watch::Receiver<FillState> {
        self.state.clone()
    }

    /// Returns a watch of the partial files; `None` until they are known. It does not keep the fill running.
    pub(super) fn partial_files(&self) -> watch::Receiver<Option<PartialFiles>> {
        self.partial_files.clone()
    }

    /// Returns true if this fill selects `file` and has the same key as `other`, except for the selection.
    fn includes(&self, file: &FilePath, other: &FillKey) -> bool {
        let ((key, _, digest, max_tier), (other_key, _, other_digest, other_max_tier)) = (&self.fill_key, other);
        (key, digest, max_tier) == (other_key, other_digest, other_max_tier) && self.selection.matches(file)
    }

    /// Returns true if all bytes are downloaded and verified, so that only the publish is left.
    fn is_finishing(&self) -> bool {
        self.partial_files.borrow().as_ref().is_some_and(|files| files.values().all(|file| file.is_complete()))
    }

    /// Returns true while the fill is downloading.
    fn is_running(&self) -> bool {
        // A task that ended without a result, for instance by a panic, has closed the channel.
        matches!(*self.state.borrow(), FillState::Running) && self.state.has_changed().is_ok()
    }

    /// Waits for the end of the fill. Returns `None` if its task ended without a result.
    async fn wait_until_ended(&self) -> Option<Result<FillOutcome>> {
        let mut state = self.state.clone();
        let ended = state.wait_for(|state| matches!(state, FillState::Ended(_))).await.ok()?;
        match &*ended {
            FillState::Ended(outcome) => Some(outcome.clone()),
            FillState::Running | FillState::Published(_) => None,
        }
    }

    /// Waits until the artifact is published. Meanwhile copies the progress of the fill to `progress`. Returns `None`
    /// if the task ended without a result.
    async fn wait_until_published(&self, progress: &Progress) -> Option<Result<FillOutcome>> {
        let _phase = progress.enter(Phase::Join, 0);
        let mut state = self.state.clone();
        loop {
            tokio::select! {
                outcome = state.wait_for(|state| !matches!(state, FillState::Running)) => {
                    return match &*outcome.ok()? {
                        FillState::Published(outcome) => Some(Ok(outcome.clone().without_transfers())),
                        FillState::Ended(outcome) => Some(outcome.clone().map(FillOutcome::without_transfers)),
                        FillState::Running => None,
                    };
                }
                // While the state does not change, show the progress of the fill.
                () = time::sleep(POLL_INTERVAL_MAX) => {
                    progress.follow(&self.progress);
                }
            }
        }
    }
}

impl Drop for InFlightFill {
    fn drop(&mut self) {
        // Dropping a `JoinHandle` does not stop its task, so either keep it or abort it.
        let Some(task) = self.task.take() else { return };
        // All bytes are verified: publish them. If the fill was started to open a file, also finish its backfill, which
        // the reader does not wait for.
        if self.is_finishing() && (self.is_running() || self.is_for_reading) {
            return self.finishing.add(task);
        }
        if self.is_running() {
            tracing::debug!(key = %self.fill_key.0, "cancelling a fill that no caller waits for any more");
        }
        task.abort();
    }
}

/// Returns the error for a fill task that ended without a result.
pub(super) fn task_lost() -> Error {
    Error::new(ErrorKind::Other, "the fill ended unexpectedly")
}

/// A wait for the fill of another process.
struct FillWait<'a> {
    cache: &'a Cache,
    progress: &'a Progress,
    watch: HeartbeatWatch,
    pause: Duration,
    phase: Option<(PhaseGuard, GaugeGuard)>,
}

impl<'a> FillWait<'a> {
    fn new(cache: &'a Cache, progress: &'a Progress) -> Self {
        Self { cache, progress, watch: HeartbeatWatch::default(), pause: POLL_INTERVAL, phase: None }
    }

    /// Shows the progress of the leader, and sleeps. The sleep grows by a quarter each time, up to
    /// [`POLL_INTERVAL_MAX`].
    async fn pause(&mut self, done_bytes: u64, total_bytes: u64) {
        self.phase.get_or_insert_with(|| (self.progress.enter(Phase::Join, 0), self.cache.count_waiting_call()));
        self.progress.set_bytes(done_bytes, total_bytes);
        time::sleep(self.pause).await;
        self.pause = (self.pause * 5 / 4).min(POLL_INTERVAL_MAX);
    }
}

/// Keeps the leadership of a fill: a task holds the fill lock and writes heartbeats until this value is dropped.
#[derive(Debug)]
pub(super) struct LeaderGuard(AbortHandle);

impl LeaderGuard {
    /// Starts the task that writes heartbeats.
    fn start(leader: Leader, progress: &Progress) -> Self {
        let progress = progress.clone();
        let leader = Arc::new(leader);
        let task = tokio::spawn(async move {
            let mut interval = time::interval(HEARTBEAT_INTERVAL);
            loop {
                interval.tick().await;
                let ((done, total), leader) = (progress.fill_bytes(), leader.clone());
                // On a thread for blocking calls, because a hanging filesystem must not block other tasks.
                let heartbeat = blocking(move || {
                    leader.heartbeat(done, total);
                    Ok(())
                });
                let _ = heartbeat.await;
            }
        });
        Self(task.abort_handle())
    }
}

impl Drop for LeaderGuard {
    fn drop(&mut self) {
        self.0.abort();
    }
}
