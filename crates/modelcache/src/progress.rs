//! Progress of a running call. The call updates it, and front ends poll it. All counters are atomics, so that neither
//! waits for the other.

use crate::error::{Error, Tier};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::Empty;
use tracing::{Span, debug_span};

/// The phases of a call, as shown to users. A get goes through the phases `Resolve` to `Backfill` without `Read`, as
/// far as needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Phase {
    /// Resolving a reference to a key.
    Resolve,
    /// Acquiring a lease on the files on disk.
    Acquire,
    /// Waiting for another fill of the same artifact.
    Join,
    /// Reading manifests, selecting missing files and their sources, and reserving disk space.
    Plan,
    /// Downloading ranges from the sources into staging.
    Download,
    /// Reading and hashing the input files of `put`.
    Read,
    /// Making staged files visible.
    Publish,
    /// Uploading to the remote.
    Backfill,
    /// Linking or copying files into a folder of the caller.
    Materialize,
    /// Extracting the rest of an archive after its download has ended.
    Extract,
    /// Reading stored files, and comparing them with their digests.
    Verify,
}

const PHASES: [Phase; 11] = [
    Phase::Resolve,
    Phase::Acquire,
    Phase::Join,
    Phase::Plan,
    Phase::Download,
    Phase::Read,
    Phase::Publish,
    Phase::Backfill,
    Phase::Materialize,
    Phase::Extract,
    Phase::Verify,
];

impl Phase {
    /// Returns the name of the phase, as in output and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Acquire => "acquire",
            Self::Join => "join",
            Self::Plan => "plan",
            Self::Download => "download",
            Self::Read => "read",
            Self::Publish => "publish",
            Self::Backfill => "backfill",
            Self::Materialize => "materialize",
            Self::Extract => "extract",
            Self::Verify => "verify",
        }
    }
}

/// The progress of one call. Clones share it.
///
/// The phases of the call become `tracing` spans at the level `debug`, below the span in which the progress was
/// created. That span stays open as long as a clone lives. If the progress was created outside of any span, there are
/// none.
#[derive(Debug, Clone)]
pub struct Progress(Arc<Counters>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Counters {
            span: Some(Span::current()).filter(|span| !span.is_disabled()),
            ..Counters::default()
        }))
    }
}

#[derive(Debug, Default)]
struct Counters {
    /// The span of the call, the parent of the spans of its phases.
    span: Option<Span>,
    /// The index of the present phase in [`PHASES`].
    phase: AtomicU8,
    /// Total bytes of the present phase.
    total_bytes: AtomicU64,
    /// Bytes done in the present phase.
    done_bytes: AtomicU64,
    remote_bytes: AtomicU64,
    origin_bytes: AtomicU64,
    /// Nanoseconds spent in each of [`PHASES`]; 0 if the phase has not ended yet.
    phase_ns: [AtomicU64; PHASES.len()],
    /// True while `retries` has an error.
    is_retrying: AtomicBool,
    retries: Mutex<Retries>,
}

/// The requests of a call that failed and were sent again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retries {
    /// Number of failed requests.
    pub count: u64,
    /// The error of the last one; `None` if bytes have arrived since.
    pub last_error: Option<String>,
}

/// The state of a [`Progress`] at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot {
    /// The present phase.
    pub phase: Phase,
    /// Total bytes of this phase; 0 while unknown.
    pub total_bytes: u64,
    /// Bytes of this phase that are done.
    pub done_bytes: u64,
    /// Bytes received from the remote during the call.
    pub remote_bytes: u64,
    /// Bytes received from origins during the call.
    pub origin_bytes: u64,
}

impl Progress {
    /// Creates the progress of one call.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the present state.
    pub fn snapshot(&self) -> Snapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            phase: PHASES[usize::from(self.0.phase.load(Ordering::Relaxed)).min(PHASES.len() - 1)],
            total_bytes: read(&self.0.total_bytes),
            done_bytes: read(&self.0.done_bytes),
            remote_bytes: read(&self.0.remote_bytes),
            origin_bytes: read(&self.0.origin_bytes),
        }
    }

    /// Returns the time spent in each phase that has ended at least once.
    pub fn phases(&self) -> BTreeMap<Phase, Duration> {
        let spent = |phase: Phase| Duration::from_nanos(self.0.phase_ns[phase as usize].load(Ordering::Relaxed));
        PHASES.into_iter().map(|phase| (phase, spent(phase))).filter(|(_, spent)| !spent.is_zero()).collect()
    }

    /// Returns the retries so far.
    pub fn retries(&self) -> Retries {
        self.lock_retries().clone()
    }

    /// Records that a request failed with `error` and will be sent again.
    pub(crate) fn record_retry(&self, error: &Error) {
        let mut retries = self.lock_retries();
        retries.count += 1;
        retries.last_error = Some(error.to_string());
        self.0.is_retrying.store(true, Ordering::Relaxed);
    }

    fn lock_retries(&self) -> MutexGuard<'_, Retries> {
        self.0.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters `phase` with `total_bytes` to process. The phase ends when the guard is dropped.
    pub(crate) fn enter(&self, phase: Phase, total_bytes: u64) -> PhaseGuard {
        self.0.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.0.done_bytes.store(0, Ordering::Relaxed);
        self.0.phase.store(phase as u8, Ordering::Relaxed);
        // `tracing` needs a constant name, so the name of the phase is in `otel.name`.
        let span = self.0.span.as_ref().map(|parent| {
            let span = debug_span!(
                parent: parent, "phase", otel.name = phase.name(), total_bytes = total_bytes as i64,
                remote_bytes = Empty, origin_bytes = Empty, retries = Empty
            );
            (span, self.received_and_retries())
        });
        PhaseGuard { progress: self.clone(), phase, entered: Instant::now(), span }
    }

    /// Returns the bytes received from the remote and from origins, and the number of retries, so far.
    fn received_and_retries(&self) -> [u64; 3] {
        let now = self.snapshot();
        [now.remote_bytes, now.origin_bytes, self.lock_retries().count]
    }

    /// Adds bytes that were processed in the present phase.
    pub(crate) fn done(&self, bytes: u64) {
        self.0.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Subtracts bytes that have to be processed again in the present phase.
    pub(crate) fn undone(&self, bytes: u64) {
        self.0.done_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Shows the bytes and the retries of `fill`, which this call waits for.
    pub(crate) fn follow(&self, fill: &Self) {
        let (done_bytes, total_bytes) = fill.fill_bytes();
        self.set_bytes(done_bytes, total_bytes);
        let retries = fill.retries();
        *self.lock_retries() = retries;
    }

    /// Returns the done and the total bytes of the phase `Download` or, in a put, `Read`. Callers and processes that
    /// wait for this fill show them. Both numbers are 0 in other phases.
    pub(crate) fn fill_bytes(&self) -> (u64, u64) {
        let now = self.snapshot();
        match now.phase {
            Phase::Download | Phase::Read => (now.done_bytes, now.total_bytes),
            _ => (0, 0),
        }
    }

    /// Sets the bytes of the present phase to those of the fill that this call waits for.
    pub(crate) fn set_bytes(&self, done_bytes: u64, total_bytes: u64) {
        self.0.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.0.done_bytes.store(done_bytes, Ordering::Relaxed);
    }

    /// Adds bytes received over the network from `tier`, including bytes that are then discarded.
    pub(crate) fn received(&self, tier: Tier, bytes: u64) {
        match tier {
            Tier::Disk => return,
            Tier::Remote => &self.0.remote_bytes,
            Tier::Origin => &self.0.origin_bytes,
        }
        .fetch_add(bytes, Ordering::Relaxed);
        if self.0.is_retrying.load(Ordering::Relaxed) {
            let mut retries = self.lock_retries();
            retries.last_error = None;
            self.0.is_retrying.store(false, Ordering::Relaxed);
        }
    }
}

/// Measures the duration of a phase. Dropping it ends the phase.
#[derive(Debug)]
pub(crate) struct PhaseGuard {
    progress: Progress,
    phase: Phase,
    entered: Instant,
    /// The span of the phase, and [`Progress::received_and_retries`] when the phase began.
    span: Option<(Span, [u64; 3])>,
}

impl Drop for PhaseGuard {
    fn drop(&mut self) {
        // At least 1 ns, because 0 stands for a phase that has not ended yet.
        let spent = u64::try_from(self.entered.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        self.progress.0.phase_ns[self.phase as usize].fetch_add(spent, Ordering::Relaxed);
        if let Some((span, before)) = &self.span {
            let now = self.progress.received_and_retries();
            for (at, name) in ["remote_bytes", "origin_bytes", "retries"].into_iter().enumerate() {
                // OpenTelemetry has no unsigned numbers.
                span.record(name, now[at].saturating_sub(before[at]) as i64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_call_shows_the_bytes_of_a_download_and_of_a_put() {
        let (fill, waiting) = (Progress::new(), Progress::new());
        for (phase, shown) in [(Phase::Download, (3, 7)), (Phase::Read, (3, 7)), (Phase::Publish, (0, 0))] {
            let _phase = fill.enter(phase, 7);
            fill.done(3);
            waiting.follow(&fill);
            assert_eq!((waiting.snapshot().done_bytes, waiting.snapshot().total_bytes), shown, "{phase:?}");
        }
    }

    #[test]
    fn an_error_is_shown_until_bytes_arrive_and_a_waiting_call_shows_it_too() {
        let (fill, waiting) = (Progress::new(), Progress::new());
        fill.record_retry(&Error::unavailable("refused"));
        fill.record_retry(&Error::unavailable("reset"));
        waiting.follow(&fill);
        assert_eq!(waiting.retries(), Retries { count: 2, last_error: Some("reset".into()) });
        fill.received(Tier::Remote, 1);
        waiting.follow(&fill);
        assert_eq!(waiting.retries(), Retries { count: 2, last_error: None });
    }
}
