//! Flights: one fill for everybody who wants the same.
//!
//! In this process the fill is a task of its own. Callers wait for it and see its progress; it goes on as long as any
//! of them waits, whoever of them is cancelled, and ends with the last, unless every byte has come and is proven: then it
//! is published all the same. Other processes see it through the leader's record on disk. Callers who want another part of
//! the same artifact meet where processes meet: at its fill lock. Who opens one file is content with a flight that
//! brings more.

use super::Cache;
use super::resolve::Wanted;
use super::tasks::Tasks;
use crate::digest::Digest;
use crate::disk::{BEAT_EVERY, Leader, Leadership, Lent, Watch};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::progress::{Phase, PhaseGuard, Progress};
use crate::selection::Selection;
use crate::transfer::{Arrivals, Reading, blocking};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time;

/// First and longest pause before a lock that somebody holds is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const LOOK_AGAIN_MAX: Duration = Duration::from_millis(200);
/// A flight whose task vanished without a word is started again this often.
const STARTS_MAX: usize = 3;

/// The flights of this process.
#[derive(Debug, Default)]
pub(super) struct Flights {
    flying: Mutex<HashMap<FlightId, Weak<Flight>>>,
    /// Those that nobody waits for any more and that come to their end all the same.
    landing: Arc<Tasks>,
}

/// What makes two callers want the same: key, selection, demanded digest; and how far they let a fill reach.
type FlightId = (ArtifactKey, String, Option<Digest>, Tier);

/// A fill under way. Dropped by the last who waits for it, it ends.
#[derive(Debug)]
pub(super) struct Flight {
    id: FlightId,
    selection: Selection,
    progress: Progress,
    stage: watch::Receiver<Stage>,
    arrivals: watch::Receiver<Option<Arrivals>>,
    /// Started by who opened a file.
    is_for_reading: bool,
    /// Gone when this is dropped.
    task: Option<JoinHandle<()>>,
    landing: Arc<Tasks>,
}

/// Where a fill tells those who wait for it.
#[derive(Debug)]
pub(super) struct Teller {
    stage: watch::Sender<Stage>,
    arrivals: watch::Sender<Option<Arrivals>>,
    opening: Option<Opening>,
}

/// A file that somebody is about to read.
#[derive(Debug, Clone)]
pub(super) struct Opening {
    pub(super) file: FilePath,
    pub(super) unchecked: bool,
}

/// How far a flight is, for those who wait.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    /// Bytes are still coming.
    Flying,
    /// The artifact can be lent, and whoever started the flight still writes to the remote.
    Published(Landed),
    /// All is done, or nothing came of it.
    Ended(Result<Landed>),
}

/// What came of a flight.
#[derive(Debug, Clone)]
pub(super) struct Landed {
    pub(super) lent: Arc<Lent>,
    /// Bytes that no local directory had.
    pub(super) fetched_bytes: u64,
    pub(super) backfilled_bytes: u64,
    pub(super) copied_bytes: u64,
}

impl Landed {
    /// Somebody else brought it.
    pub(super) fn waited(self) -> Self {
        Self { fetched_bytes: 0, backfilled_bytes: 0, copied_bytes: 0, ..self }
    }
}

/// Who fills.
pub(super) enum Joined {
    /// Somebody else just did.
    Lent(Box<Lent>),
    /// This flight.
    Leading(Lead),
}

impl Cache {
    /// Step 3 of the main path within this process: starts the flight, or waits for the one that is under way.
    pub(super) async fn board(&self, wanted: &Wanted, progress: &Progress) -> Result<Landed> {
        for _ in 0..STARTS_MAX {
            let (flight, started) = self.flight(wanted, None, progress);
            let landed = if started { flight.ended().await } else { flight.published(progress).await };
            if let Some(landed) = landed {
                return landed;
            }
        }
        Err(vanished())
    }

    /// The flight for `wanted`, and whether this call started it. For somebody who opens a file, one that brings more
    /// of the same will do.
    pub(super) fn flight(
        &self,
        wanted: &Wanted,
        opening: Option<&Opening>,
        progress: &Progress,
    ) -> (Arc<Flight>, bool) {
        let id = (wanted.key.clone(), wanted.selection.identity(), wanted.digest, wanted.reach);
        let mut flights = self.0.flights.lock();
        flights.retain(|_, flight| flight.strong_count() > 0);
        let flying = |flight: &Weak<Flight>| flight.upgrade().filter(|flight| flight.is_flying());
        let wider = || {
            let opening = opening.filter(|_| wanted.digest.is_none())?;
            flights.values().filter_map(flying).find(|flight| flight.brings(&opening.file, &id))
        };
        if let Some(flight) = flights.get(&id).and_then(flying).or_else(wider) {
            return (flight, false);
        }
        let ((stage_sender, stage), (arrivals_sender, arrivals)) =
            (watch::channel(Stage::Flying), watch::channel(None));
        let teller = Teller { stage: stage_sender, arrivals: arrivals_sender, opening: opening.cloned() };
        let (cache, wanted, shown) = (self.clone(), wanted.clone(), progress.clone());
        let selection = wanted.selection.clone();
        let task = tokio::spawn(async move {
            let ended = cache.fill(&wanted, &shown, &teller).await;
            teller.stage.send_replace(Stage::Ended(ended));
        });
        let flight = Arc::new(Flight {
            id: id.clone(),
            selection,
            progress: progress.clone(),
            stage,
            arrivals,
            is_for_reading: opening.is_some(),
            task: Some(task),
            landing: self.0.flights.landing.clone(),
        });
        flights.insert(id, Arc::downgrade(&flight));
        (flight, true)
    }

    /// Waits for the fills that go on though nobody waits for them any more, because every byte of them has come: what
    /// they bring is published then.
    pub async fn land(&self) {
        self.0.flights.landing.finish().await;
    }

    /// Step 3 between processes: waits until somebody else has filled the artifact, or nobody else is filling it.
    pub(super) async fn lead(&self, wanted: &Wanted, progress: &Progress) -> Result<Joined> {
        let mut waiting = Waiting::new(progress);
        loop {
            let leadership = self.try_lead(&wanted.key, &mut waiting).await?;
            // Looked at after the lock was won, too: the previous leader may just have published.
            if let Some(lent) = self.try_lend(wanted).await? {
                return Ok(Joined::Lent(Box::new(lent)));
            }
            match leadership {
                Leadership::Ours(leader) => return Ok(Joined::Leading(Lead::start(leader, progress))),
                Leadership::Theirs(beat) => waiting.pause(beat.done_bytes, beat.total_bytes).await,
            }
        }
    }

    /// Waits until nobody else fills `key`.
    pub(super) async fn lead_alone(&self, key: &ArtifactKey, progress: &Progress) -> Result<Lead> {
        let mut waiting = Waiting::new(progress);
        loop {
            match self.try_lead(key, &mut waiting).await? {
                Leadership::Ours(leader) => return Ok(Lead::start(leader, progress)),
                Leadership::Theirs(beat) => waiting.pause(beat.done_bytes, beat.total_bytes).await,
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

impl Flights {
    fn lock(&self) -> MutexGuard<'_, HashMap<FlightId, Weak<Flight>>> {
        self.flying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Teller {
    /// What is coming. Whoever started the flight to read a file is a reader of it from now on, before the first byte
    /// is asked for.
    pub(super) fn arrivals(&self, arrivals: Arrivals) -> Option<Reading> {
        let opening = self.opening.as_ref();
        let reading = opening.and_then(|opening| Some(arrivals.get(&opening.file)?.read(opening.unchecked)));
        self.arrivals.send_replace(Some(arrivals));
        reading
    }

    /// What was coming is not what was wanted: nothing of it is to be read any more.
    pub(super) fn forget(&self) {
        self.arrivals.borrow().iter().flat_map(Arrivals::values).for_each(|file| file.failed());
    }

    /// There is something to lend.
    pub(super) fn published(&self, landed: &Landed) {
        self.stage.send_replace(Stage::Published(landed.clone()));
    }
}

impl Flight {
    /// How far it is, for whoever looks at the calls that wait for it.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What tells how far it is, without keeping it going.
    pub(super) fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.clone()
    }

    /// What tells which files it brings.
    pub(super) fn arrivals(&self) -> watch::Receiver<Option<Arrivals>> {
        self.arrivals.clone()
    }

    /// Whether `file` of what `id` is about comes with it.
    fn brings(&self, file: &FilePath, id: &FlightId) -> bool {
        let ((key, _, digest, reach), (wanted, _, demanded, wanted_reach)) = (&self.id, id);
        (key, digest, reach) == (wanted, demanded, wanted_reach) && self.selection.matches(file)
    }

    /// Whether every byte has come and is proven, and only the end is missing.
    fn is_landing(&self) -> bool {
        self.arrivals.borrow().as_ref().is_some_and(|files| files.values().all(|file| file.is_complete()))
    }

    fn is_flying(&self) -> bool {
        // A task that vanished without a word has dropped its end.
        matches!(*self.stage.borrow(), Stage::Flying) && self.stage.has_changed().is_ok()
    }

    /// Waits for the end; `None` if the task vanished.
    async fn ended(&self) -> Option<Result<Landed>> {
        let mut stage = self.stage.clone();
        let ended = stage.wait_for(|stage| matches!(stage, Stage::Ended(_))).await.ok()?;
        match &*ended {
            Stage::Ended(landed) => Some(landed.clone()),
            Stage::Flying | Stage::Published(_) => None,
        }
    }

    /// Waits until there is something to lend, showing how far it is; `None` if the task vanished.
    async fn published(&self, progress: &Progress) -> Option<Result<Landed>> {
        let _phase = progress.enter(Phase::Join, 0);
        let mut stage = self.stage.clone();
        loop {
            tokio::select! {
                landed = stage.wait_for(|stage| !matches!(stage, Stage::Flying)) => {
                    return match &*landed.ok()? {
                        Stage::Published(landed) => Some(Ok(landed.clone().waited())),
                        Stage::Ended(landed) => Some(landed.clone().map(Landed::waited)),
                        Stage::Flying => None,
                    };
                }
                () = time::sleep(LOOK_AGAIN_MAX) => {
                    let (done, total) = self.progress.pour_bytes();
                    progress.watch(done, total);
                }
            }
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some(task) = self.task.take() else { return };
        // Whoever opened a file and has read it does not wait for the upload either.
        if self.is_landing() && (self.is_flying() || self.is_for_reading) {
            return self.landing.keep(task);
        }
        if self.is_flying() {
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
        Self { progress, watch: Watch::default(), pause: LOOK_AGAIN, phase: None }
    }

    /// Shows how far the other one is, and sleeps a little longer each time.
    async fn pause(&mut self, done_bytes: u64, total_bytes: u64) {
        self.phase.get_or_insert_with(|| self.progress.enter(Phase::Join, 0));
        self.progress.watch(done_bytes, total_bytes);
        time::sleep(self.pause).await;
        self.pause = (self.pause * 5 / 4).min(LOOK_AGAIN_MAX);
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
            let mut beats = time::interval(BEAT_EVERY);
            loop {
                beats.tick().await;
                let ((done, total), leader) = (progress.pour_bytes(), leader.clone());
                // A directory that hangs must not hold up anything else.
                let beat = blocking(move || {
                    leader.beat(done, total);
                    Ok(())
                });
                let _ = beat.await;
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
