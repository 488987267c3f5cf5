//! What a running call is doing, readable at any time by whoever shows it.
//!
//! Plain atomics: the pour adds, a door polls. Nothing is ever waited for here.

use crate::error::Tier;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The steps of the main path, as a person is told of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Phase {
    /// A reference to a key.
    Resolve,
    /// Looking on disk.
    Acquire,
    /// Waiting for another fill of the same artifact.
    Join,
    /// Manifest, what is missing, room.
    Plan,
    /// Downloading ranges from a source into staging.
    Download,
    /// Reading and hashing the files given to `put`.
    Read,
    /// Making staged files durable and visible.
    Publish,
    /// Writing to the remote what came from the origin or from the caller.
    Backfill,
    /// Linking or copying into a folder of the caller's own.
    Materialize,
    /// Reading what is there and comparing it with its digests.
    Verify,
}

const PHASES: [Phase; 10] = [
    Phase::Resolve,
    Phase::Acquire,
    Phase::Join,
    Phase::Plan,
    Phase::Download,
    Phase::Read,
    Phase::Publish,
    Phase::Backfill,
    Phase::Materialize,
    Phase::Verify,
];

impl Phase {
    /// The word for it.
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
            Self::Verify => "verify",
        }
    }
}

/// A handle on a running call; clones show the same call.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    phase: AtomicU8,
    total_bytes: AtomicU64,
    /// Bytes done in this phase.
    done_bytes: AtomicU64,
    remote_bytes: AtomicU64,
    origin_bytes: AtomicU64,
    phase_ns: [AtomicU64; PHASES.len()],
}

/// A reading of a [`Progress`].
#[derive(Debug, Clone, Copy)]
pub struct Snapshot {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of this phase to be done; 0 while unknown.
    pub total_bytes: u64,
    /// Bytes of this phase done.
    pub done_bytes: u64,
    /// Bytes received from the remote.
    pub remote_bytes: u64,
    /// Bytes received from origins.
    pub origin_bytes: u64,
}

impl Progress {
    /// A handle for one call.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the call is doing now.
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

    /// Time spent in each phase that was entered.
    pub fn phases(&self) -> BTreeMap<Phase, Duration> {
        let spent = |phase: Phase| Duration::from_nanos(self.0.phase_ns[phase as usize].load(Ordering::Relaxed));
        PHASES.into_iter().map(|phase| (phase, spent(phase))).filter(|(_, spent)| !spent.is_zero()).collect()
    }

    /// Enters `phase` with `total_bytes` to do; the time until the guard falls is the phase's.
    pub(crate) fn enter(&self, phase: Phase, total_bytes: u64) -> PhaseGuard {
        self.0.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.0.done_bytes.store(0, Ordering::Relaxed);
        self.0.phase.store(phase as u8, Ordering::Relaxed);
        PhaseGuard { progress: self.clone(), phase, entered: Instant::now() }
    }

    /// Bytes of the present phase that are done.
    pub(crate) fn done(&self, bytes: u64) {
        self.0.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of the present phase that turned out not to be done.
    pub(crate) fn undone(&self, bytes: u64) {
        self.0.done_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes of the pour that are done, and all of them; for those who wait for it elsewhere.
    pub(crate) fn download_bytes(&self) -> (u64, u64) {
        let now = self.snapshot();
        match now.phase {
            Phase::Download => (now.done_bytes, now.total_bytes),
            _ => (0, 0),
        }
    }

    /// Shows how far somebody else is, for whom this call waits.
    pub(crate) fn watch(&self, done_bytes: u64, total_bytes: u64) {
        self.0.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.0.done_bytes.store(done_bytes, Ordering::Relaxed);
    }

    /// Bytes that came over the network from `tier`, kept or not.
    pub(crate) fn received(&self, tier: Tier, bytes: u64) {
        match tier {
            Tier::Disk => return,
            Tier::Remote => &self.0.remote_bytes,
            Tier::Origin => &self.0.origin_bytes,
        }
        .fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Measures a phase until it falls.
#[derive(Debug)]
pub(crate) struct PhaseGuard {
    progress: Progress,
    phase: Phase,
    entered: Instant,
}

impl Drop for PhaseGuard {
    fn drop(&mut self) {
        let spent = u64::try_from(self.entered.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        self.progress.0.phase_ns[self.phase as usize].fetch_add(spent, Ordering::Relaxed);
    }
}
