//! Adaptive limit on concurrent range requests, shared by all fills of the process.
//!
//! The controller (`controller.rs`) decides the limit. One limiter serves all fills, because they share the network.

use super::controller::ConcurrencyController;
use crate::disk::FoundLimit;
use crate::mutex::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Number of recently completed requests with which the pace of a request is compared.
const PEERS_MAX: usize = 32;
/// Number of completed requests needed before another one can be judged slow.
const PEERS_MIN: usize = 3;
/// A request is slow if it takes this many times as long as the median of its peers.
const SLOW_FACTOR: f64 = 4.0;
/// Minimum duration of a request before it can be judged slow.
const SLOW_MIN: Duration = Duration::from_millis(500);
/// Latency of a request, expressed in bytes (1 MiB). It makes requests of different lengths comparable.
const LATENCY_BYTES: f64 = 1_048_576.0;

/// The adaptive request limit. Clones share one limiter.
#[derive(Debug, Clone)]
pub(super) struct Limiter(Arc<SharedLimiter>);

#[derive(Debug)]
struct SharedLimiter {
    permits: Arc<Semaphore>,
    state: Mutex<LimiterState>,
}

#[derive(Debug)]
struct LimiterState {
    controller: ConcurrencyController,
    /// The limit that the semaphore's permits reflect.
    applied_limit: usize,
    /// Permits to discard when they are returned, because the limit was lowered while they were in use.
    surplus_permits: usize,
    /// Pace of recently completed requests, in seconds per byte.
    peers: VecDeque<f64>,
}

/// Permission for one concurrent request. Dropping it returns the permit.
#[derive(Debug)]
pub(super) struct Permit {
    permit: Option<OwnedSemaphorePermit>,
    limiter: Limiter,
}

/// A response that is being received. Dropping it records its end.
#[derive(Debug)]
pub(super) struct Receiving(Limiter);

impl Limiter {
    /// Creates the limiter. At most `limit_max` requests run concurrently.
    pub(super) fn new(limit_max: usize) -> Self {
        let controller = ConcurrencyController::new(limit_max, Instant::now());
        let applied_limit = controller.limit();
        Self(Arc::new(SharedLimiter {
            permits: Arc::new(Semaphore::new(applied_limit)),
            state: Mutex::new(LimiterState { controller, applied_limit, surplus_permits: 0, peers: VecDeque::new() }),
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

    /// Begins with what an earlier search found, unless a search has begun. Returns false if one has.
    pub(super) fn start_with(&self, remembered: Option<FoundLimit>) -> bool {
        self.update(|controller| controller.start_with(remembered))
    }

    /// Returns what the search has found so far.
    pub(super) fn found(&self) -> FoundLimit {
        self.0.state.lock().controller.found()
    }

    /// Returns the number of requests that may run concurrently.
    pub(super) fn limit(&self) -> usize {
        self.0.state.lock().applied_limit
    }

    /// Returns true if permits are unused, so that the limit does not restrict throughput.
    pub(super) fn has_free_permits(&self) -> bool {
        self.0.permits.available_permits() > 0
    }

    /// Records that a response has begun.
    pub(super) fn begin_receiving(&self) -> Receiving {
        self.0.state.lock().controller.begin_receiving();
        Receiving(self.clone())
    }

    /// Records `bytes` received, and adjusts the limit if that ends a window of the controller.
    pub(super) fn record_received(&self, bytes: u64) {
        let is_full = !self.has_free_permits();
        self.update(|controller| controller.record_received(bytes, Instant::now(), is_full));
    }

    /// Records that a slice was handed to the workers. `waits` is true if it was queued behind a backlog.
    pub(super) fn record_queued_slice(&self, waits: bool) {
        self.0.state.lock().controller.record_queued_slice(waits);
    }

    /// Halves the limit after a server answered 503 or 429, unless it was halved just before.
    pub(super) fn record_throttled(&self) {
        if self.update(|controller| controller.record_throttled(Instant::now())) {
            let limit = self.limit();
            tracing::debug!(
                limit,
                "a server throttled a request (503 or 429); halved the limit on concurrent requests"
            );
        }
    }

    /// Records that a request for `bytes` was completed after `took`.
    pub(super) fn record_completed(&self, bytes: u64, took: Duration) {
        let is_full = !self.has_free_permits();
        self.update(|controller| controller.record_completed(Instant::now(), is_full));
        let mut state = self.0.state.lock();
        if state.peers.len() == PEERS_MAX {
            state.peers.pop_front();
        }
        state.peers.push_back(took.as_secs_f64() / (bytes as f64 + LATENCY_BYTES));
    }

    /// Returns true if a request that has received `bytes` in `elapsed` is far slower than its peers were.
    pub(super) fn is_slow(&self, bytes: u64, elapsed: Duration) -> bool {
        elapsed >= SLOW_MIN
            && self.peer_pace().is_some_and(|pace| {
                let expected = (bytes as f64 + LATENCY_BYTES) * pace;
                elapsed.as_secs_f64() > SLOW_FACTOR * expected
            })
    }

    /// Returns the bytes that a request receives in `time`, by the median of its peers; `None` if too few are known.
    pub(super) fn expected_bytes(&self, time: Duration) -> Option<u64> {
        Some((time.as_secs_f64() / self.peer_pace()? - LATENCY_BYTES) as u64)
    }

    /// Returns the median pace of recently completed requests, in seconds per byte; `None` if there are too few.
    fn peer_pace(&self) -> Option<f64> {
        let mut peers: Vec<f64> = self.0.state.lock().peers.iter().copied().collect();
        peers.sort_by(f64::total_cmp);
        peers.get(peers.len() / 2).copied().filter(|_| peers.len() >= PEERS_MIN)
    }

    /// Updates the controller and applies its limit to the permits.
    fn update<T>(&self, change: impl FnOnce(&mut ConcurrencyController) -> T) -> T {
        let mut state = self.0.state.lock();
        let result = change(&mut state.controller);
        let (limit, applied) = (state.controller.limit(), state.applied_limit);
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
        state.applied_limit = limit;
        result
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.0.state.lock().controller.end_receiving();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::controller::CONCURRENCY_INITIAL;

    #[tokio::test]
    async fn a_lower_limit_takes_effect_as_permits_are_returned() {
        let limiter = Limiter::new(64);
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
        let free: Vec<_> = std::iter::from_fn(|| limiter.try_acquire()).take(64).collect();
        assert_eq!(free.len(), CONCURRENCY_INITIAL / 2);
    }

    #[test]
    fn the_limit_never_exceeds_its_maximum() {
        assert_eq!([1, 8, 1000].map(|most| Limiter::new(most).limit()), [1, 8, CONCURRENCY_INITIAL]);
    }

    #[test]
    fn slow_is_far_slower_than_the_peers() {
        let limiter = Limiter::new(64);
        let (mib, second) = (1 << 20, Duration::from_secs(1));
        assert!(!limiter.is_slow(8 * mib, 60 * second), "without peers no request is slow");
        assert_eq!(limiter.expected_bytes(second), None);
        (0..PEERS_MIN).for_each(|_| limiter.record_completed(7 * mib, second));
        assert!(!limiter.is_slow(7 * mib, 3 * second) && limiter.is_slow(7 * mib, 5 * second));
        assert!(!limiter.is_slow(79 * mib, 5 * second), "ten times the bytes may take longer");
        assert_eq!(limiter.expected_bytes(second), Some(7 * mib));
    }
}
