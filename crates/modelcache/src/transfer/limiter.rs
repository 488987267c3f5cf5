//! Adaptive limit on concurrent range requests, shared by all fills of the process.
//!
//! The controller hill-climbs on goodput: it raises the limit while throughput grows by at least 5 %, otherwise it
//! reverts and waits before probing again. It halves the limit on 503 and 429, and resets it to the initial value when
//! hashing or disk writes, not the network, are the bottleneck. One limiter serves all fills, because they share the
//! machine's network, and all fills of a fleet often read from one server.

use crate::mutex::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Initial number of concurrent requests.
const CONCURRENCY_INITIAL: usize = 16;
/// Lower bound on concurrent requests, so that repeated throttling cannot stop progress.
const CONCURRENCY_MIN: usize = 4;
/// Upper bound on concurrent requests. It bounds memory: each connection buffers up to 1 MiB that is not read yet.
const CONCURRENCY_MAX: usize = 64;
/// Measurement interval for goodput; about the duration of one part download on a fast link.
const WINDOW: Duration = Duration::from_millis(200);
/// Smallest growth of goodput, as a factor, for which a raised limit is kept.
const GOODPUT_GAIN_MIN: f64 = 1.05;
/// Windows to wait after an unsuccessful probe. Doubles after each further one, up to [`BACKOFF_WINDOWS_MAX`].
const BACKOFF_WINDOWS: u32 = 2;
/// Upper bound on the windows to wait after an unsuccessful probe.
const BACKOFF_WINDOWS_MAX: u32 = 32;
/// Windows to wait after a server throttled requests or the workers fell behind.
const THROTTLED_WINDOWS: u32 = 10;
/// Bytes credited to each completed request in addition to its body; see [`Limiter::record_completed`].
const REQUEST_CREDIT_BYTES: u64 = 64 << 10;
/// Upper bound on files that are downloaded concurrently. Each keeps a few descriptors open.
const CONCURRENT_FILES_MAX: usize = 64;
/// Number of recently completed requests with which the pace of a request is compared.
const PEERS_MAX: usize = 32;
/// Number of completed requests needed before another one can be judged slow.
const PEERS_MIN: usize = 3;
/// A request is slow if it takes this many times as long as the median of its peers.
const SLOW_FACTOR: f64 = 4.0;
/// Minimum duration of a request before it can be judged slow.
const SLOW_MIN: Duration = Duration::from_secs(1);
/// Latency of a request, expressed in bytes (1 MiB). It makes requests of different lengths comparable.
const LATENCY_BYTES: f64 = 1_048_576.0;

/// The adaptive request limit. Clones share one limiter.
#[derive(Debug, Clone)]
pub(super) struct Limiter(Arc<SharedLimiter>);

#[derive(Debug)]
struct SharedLimiter {
    permits: Arc<Semaphore>,
    /// Bytes received in the current window, including the credit of completed requests.
    window_bytes: AtomicU64,
    /// Slices handed to the workers in the current window.
    slices: AtomicU64,
    /// The slices among them that were queued behind a backlog.
    waiting_slices: AtomicU64,
    state: Mutex<LimiterState>,
}

#[derive(Debug)]
struct LimiterState {
    controller: ConcurrencyController,
    window_start: Instant,
    /// Permits to discard when they are returned, because the limit was lowered while they were in use.
    surplus_permits: usize,
    /// True if all permits were in use at the end of the previous window.
    was_full: bool,
    last_halved: Option<Instant>,
    /// Pace of recently completed requests, in seconds per byte.
    peers: VecDeque<f64>,
}

/// Permission for one concurrent request. Dropping it returns the permit.
#[derive(Debug)]
pub(super) struct Permit {
    permit: Option<OwnedSemaphorePermit>,
    limiter: Limiter,
}

impl Limiter {
    /// Creates the limiter. `files_max` is the process's limit on open files, if known.
    pub(super) fn new(files_max: Option<u64>) -> Self {
        // Each request uses one connection. For each there are two open files with up to three descriptors, and the
        // received bytes may be uploaded at the same time. A sixteenth of the limit leaves room for all of it.
        let limit_max = files_max
            .map_or(CONCURRENCY_MAX, |files| usize::try_from(files / 16).unwrap_or(CONCURRENCY_MAX))
            .clamp(CONCURRENCY_MIN, CONCURRENCY_MAX);
        let controller = ConcurrencyController::new(CONCURRENCY_INITIAL.min(limit_max), limit_max);
        Self(Arc::new(SharedLimiter {
            permits: Arc::new(Semaphore::new(controller.limit)),
            window_bytes: AtomicU64::new(0),
            slices: AtomicU64::new(0),
            waiting_slices: AtomicU64::new(0),
            state: Mutex::new(LimiterState {
                controller,
                window_start: Instant::now(),
                surplus_permits: 0,
                was_full: false,
                last_halved: None,
                peers: VecDeque::new(),
            }),
        }))
    }

    /// Waits for a permit to send one request.
    pub(super) async fn acquire(&self) -> Permit {
        // The semaphore is never closed, so acquiring cannot fail.
        let permit = self.0.permits.clone().acquire_owned().await.ok();
        Permit { permit, limiter: self.clone() }
    }

    /// Returns a permit if one is free now.
    pub(super) fn try_acquire(&self) -> Option<Permit> {
        let permit = self.0.permits.clone().try_acquire_owned().ok()?;
        Some(Permit { permit: Some(permit), limiter: self.clone() })
    }

    /// Returns true if permits are unused, so that the limit does not restrict throughput.
    pub(super) fn has_free_permits(&self) -> bool {
        self.0.permits.available_permits() > 0
    }

    /// Returns the number of files to download concurrently: enough small files to keep all permits in use.
    pub(super) fn concurrent_files_max(&self) -> usize {
        (2 * self.0.state.lock().controller.limit_max).min(CONCURRENT_FILES_MAX)
    }

    /// Records `bytes` received and, at the end of a window, adjusts the limit.
    pub(super) fn record_received(&self, bytes: u64) {
        let total = self.0.window_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let mut state = self.0.state.lock();
        let took = state.window_start.elapsed();
        if took < WINDOW {
            return;
        }
        self.0.window_bytes.store(0, Ordering::Relaxed);
        let (slices, waiting) =
            (self.0.slices.swap(0, Ordering::Relaxed), self.0.waiting_slices.swap(0, Ordering::Relaxed));
        // A backlog for more than a quarter of the slices means that hashing or disk writes are the bottleneck.
        let is_behind = 4 * waiting > slices;
        // The goodput of a window in which permits were unused says nothing about the right limit.
        let is_full = !self.has_free_permits() && !is_behind;
        // Then more requests would only buffer bytes in memory.
        if is_behind && state.controller.limit > CONCURRENCY_INITIAL {
            let limit = state.controller.reset_to(CONCURRENCY_INITIAL);
            self.adjust(&mut state, limit);
        }
        // Judge only windows that began and ended at the limit, and that no pause stretched.
        if is_full && state.was_full && took < 5 * WINDOW {
            let limit = state.controller.end_window(total as f64 / took.as_secs_f64());
            self.adjust(&mut state, limit);
        }
        (state.window_start, state.was_full) = (Instant::now(), is_full);
    }

    /// Records that a slice was handed to the workers. `waits` is true if it was queued behind a backlog.
    pub(super) fn record_queued_slice(&self, waits: bool) {
        self.0.slices.fetch_add(1, Ordering::Relaxed);
        self.0.waiting_slices.fetch_add(u64::from(waits), Ordering::Relaxed);
    }

    /// Halves the limit after a server answered 503 or 429. Concurrent requests are throttled together, so this takes
    /// effect at most once per window.
    pub(super) fn record_throttled(&self) {
        let mut state = self.0.state.lock();
        if state.last_halved.is_some_and(|last| last.elapsed() < WINDOW) {
            return;
        }
        state.last_halved = Some(Instant::now());
        let limit = state.controller.halve();
        self.adjust(&mut state, limit);
        tracing::debug!(limit, "a server throttled a request; halving the limit on concurrent requests");
    }

    /// Records that a request for `bytes` was completed after `took`.
    pub(super) fn record_completed(&self, bytes: u64, took: Duration) {
        // Small files carry few bytes per request. The credit lets the controller see that more requests help even when
        // throughput is bound by latency.
        self.record_received(REQUEST_CREDIT_BYTES);
        let mut state = self.0.state.lock();
        if state.peers.len() == PEERS_MAX {
            state.peers.pop_front();
        }
        state.peers.push_back(took.as_secs_f64() / (bytes as f64 + LATENCY_BYTES));
    }

    /// Returns true if a request for `bytes` that has taken `elapsed` so far is far slower than its peers were.
    pub(super) fn is_slow(&self, bytes: u64, elapsed: Duration) -> bool {
        if elapsed < SLOW_MIN {
            return false;
        }
        let mut peers: Vec<f64> = self.0.state.lock().peers.iter().copied().collect();
        if peers.len() < PEERS_MIN {
            return false;
        }
        peers.sort_by(f64::total_cmp);
        elapsed.as_secs_f64() > SLOW_FACTOR * peers[peers.len() / 2] * (bytes as f64 + LATENCY_BYTES)
    }

    /// Changes the total number of permits, used and free, to `limit`.
    fn adjust(&self, state: &mut LimiterState, limit: usize) {
        let applied = state.controller.applied_limit;
        if limit > applied {
            // First keep permits that were to be discarded, then create new ones.
            let reused = state.surplus_permits.min(limit - applied);
            state.surplus_permits -= reused;
            self.0.permits.add_permits(limit - applied - reused);
        } else {
            let surplus = applied - limit;
            // Free permits are removed now, those in use when they are returned (`Permit::drop`).
            state.surplus_permits += surplus - self.0.permits.forget_permits(surplus);
        }
        state.controller.applied_limit = limit;
    }

    #[cfg(test)]
    fn limit(&self) -> usize {
        self.0.state.lock().controller.limit
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.limiter.0.state.lock();
        if state.surplus_permits > 0
            && let Some(permit) = self.permit.take()
        {
            state.surplus_permits -= 1;
            permit.forget();
        }
    }
}

/// Hill climbing for the best limit. It has no clock and does no I/O; its only input is the goodput of each window.
#[derive(Debug)]
struct ConcurrencyController {
    limit: usize,
    /// The limit that the semaphore's permits reflect.
    applied_limit: usize,
    limit_max: usize,
    phase: Phase,
    /// Goodput before the last raise, in bytes per second.
    goodput_before: f64,
    /// True until the first unsuccessful probe. Until then the limit grows in larger steps.
    never_reverted: bool,
    /// Windows to wait after the next unsuccessful probe.
    backoff_windows: u32,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// The next window measures the goodput at the present limit.
    Measure,
    /// The limit was just raised from this value; the next window mixes both limits and is ignored.
    Settle(usize),
    /// The next window decides whether the raise from this value is kept.
    Judge(usize),
    /// This many windows are skipped before the next probe.
    Backoff(u32),
}

impl ConcurrencyController {
    fn new(limit: usize, limit_max: usize) -> Self {
        Self {
            limit,
            applied_limit: limit,
            limit_max,
            phase: Phase::Measure,
            goodput_before: 0.0,
            never_reverted: true,
            backoff_windows: BACKOFF_WINDOWS,
        }
    }

    /// Takes the goodput of the window that ended, in bytes per second, and returns the limit from now on.
    fn end_window(&mut self, goodput: f64) -> usize {
        self.phase = match self.phase {
            Phase::Backoff(left @ 1..) => Phase::Backoff(left - 1),
            Phase::Backoff(0) | Phase::Measure => self.raise(goodput),
            Phase::Settle(from) => Phase::Judge(from),
            Phase::Judge(_) if goodput >= self.goodput_before * GOODPUT_GAIN_MIN => {
                // The raise paid off: keep it and probe higher.
                self.backoff_windows = BACKOFF_WINDOWS;
                self.raise(goodput)
            }
            Phase::Judge(from) => {
                // The raise did not pay off: revert it and wait, longer after each failure.
                let backoff_windows = self.backoff_windows;
                (self.limit, self.never_reverted, self.backoff_windows) =
                    (from, false, (2 * backoff_windows).min(BACKOFF_WINDOWS_MAX));
                Phase::Backoff(backoff_windows)
            }
        };
        self.limit
    }

    /// Raises the limit by half, or by a quarter after a failed probe. At the maximum it only waits.
    fn raise(&mut self, goodput: f64) -> Phase {
        let (from, stride) = (self.limit, if self.never_reverted { self.limit / 2 } else { self.limit / 4 });
        if from == self.limit_max {
            return Phase::Backoff(BACKOFF_WINDOWS_MAX);
        }
        self.goodput_before = goodput;
        self.limit = (from + stride.max(1)).min(self.limit_max);
        Phase::Settle(from)
    }

    /// Halves the limit and returns the result.
    fn halve(&mut self) -> usize {
        self.reset_to((self.limit / 2).max(CONCURRENCY_MIN))
    }

    /// Sets the limit and waits before the next probe.
    fn reset_to(&mut self, limit: usize) -> usize {
        (self.limit, self.phase, self.never_reverted) = (limit, Phase::Backoff(THROTTLED_WINDOWS), false);
        limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the controller after `windows` windows on a network with the goodput `goodput(limit)`.
    fn controller_after(windows: usize, goodput: impl Fn(usize) -> f64) -> ConcurrencyController {
        let mut controller = ConcurrencyController::new(CONCURRENCY_INITIAL, CONCURRENCY_MAX);
        for _ in 0..windows {
            controller.end_window(goodput(controller.limit));
        }
        controller
    }

    #[test]
    fn a_raised_limit_is_kept_while_each_connection_adds_throughput() {
        // 60 MB/s a connection, 3 GB/s in all.
        let shaped = |limit: usize| (limit as f64 * 60e6).min(3e9);
        let found = controller_after(12, shaped).limit;
        assert!(shaped(found) >= 0.95 * 3e9, "limit {found}");
    }

    #[test]
    fn a_raised_limit_is_reverted_when_goodput_does_not_grow() {
        let mut controller = controller_after(3, |_| 1e9);
        assert_eq!(controller.limit, CONCURRENCY_INITIAL, "after one probe");
        let probes = (0..100).filter(|_| controller.end_window(1e9) > CONCURRENCY_INITIAL).count();
        assert!((1..30).contains(&probes), "{probes} of 100 windows probe a higher limit");
    }

    #[test]
    fn a_throttled_limiter_halves_down_to_the_minimum_and_recovers() {
        let mut controller = controller_after(0, |_| 0.0);
        let halved: Vec<_> = (0..4).map(|_| controller.halve()).collect();
        assert_eq!(halved, [8, 4, 4, 4]);
        for _ in 0..60 {
            controller.end_window(controller.limit as f64 * 50e6);
        }
        assert!(controller.limit >= CONCURRENCY_INITIAL, "{}", controller.limit);
    }

    #[tokio::test]
    async fn a_lower_limit_takes_effect_as_permits_are_returned() {
        let limiter = Limiter::new(None);
        let mut held = Vec::new();
        for _ in 0..CONCURRENCY_INITIAL {
            held.push(limiter.acquire().await);
        }
        limiter.record_throttled();
        limiter.record_throttled();
        assert_eq!(limiter.limit(), CONCURRENCY_INITIAL / 2, "concurrent throttling halves the limit once");
        held.truncate(CONCURRENCY_INITIAL / 2);
        assert!(limiter.try_acquire().is_none(), "returned permits are discarded");
        held.clear();
        let mut free: Vec<_> = std::iter::from_fn(|| limiter.try_acquire()).take(CONCURRENCY_MAX).collect();
        assert_eq!(free.len(), CONCURRENCY_INITIAL / 2);
        free.clear();
        let mut state = limiter.0.state.lock();
        let limit = state.controller.limit_max;
        limiter.adjust(&mut state, limit);
        drop(state);
        assert_eq!(
            std::iter::from_fn(|| limiter.try_acquire()).take(2 * CONCURRENCY_MAX).collect::<Vec<_>>().len(),
            CONCURRENCY_MAX
        );
    }

    #[test]
    fn few_descriptors_mean_few_requests() {
        assert_eq!(Limiter::new(Some(128)).limit(), 8);
        assert_eq!(Limiter::new(Some(1)).limit(), CONCURRENCY_MIN);
        assert_eq!(Limiter::new(Some(1 << 20)).limit(), CONCURRENCY_INITIAL);
    }

    #[test]
    fn slow_is_far_slower_than_the_peers() {
        let limiter = Limiter::new(None);
        let (mib, second) = (1 << 20, Duration::from_secs(1));
        assert!(!limiter.is_slow(8 * mib, 60 * second), "without peers no request is slow");
        (0..PEERS_MIN).for_each(|_| limiter.record_completed(8 * mib, second));
        assert!(!limiter.is_slow(8 * mib, 3 * second) && limiter.is_slow(8 * mib, 5 * second));
        assert!(!limiter.is_slow(80 * mib, 5 * second), "ten times the bytes may take longer");
    }
}
