//! The limiter: how many requests for bytes may be under way at once, found by trying.
//!
//! It starts with [`CONCURRENCY_INITIAL`], adds as long as goodput rises by a twentieth for it, and otherwise goes back and rests
//! before it tries again. While slices wait for the workers the network is not what is slow: more requests would only
//! take memory, and it goes back to where it began. A server that says it is asked too much (503, 429) halves it. One
//! limiter serves all fills of the process: they share the machine's network, and a fleet's fills meet at one server.
//!
//! Surprise: a request counts as some bytes, whatever it brings, so that small files tell as well what more requests
//! are good for.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests at once to begin with.
const CONCURRENCY_INITIAL: usize = 16;
/// Requests at once, however slow it goes.
const CONCURRENCY_MIN: usize = 4;
/// Requests at once at most. What a connection holds that its reader has not taken yet is up to a MiB.
const MOST: usize = 64;
/// How long goodput is measured at a time. Requests of a part take about as long where it matters.
const WINDOW: Duration = Duration::from_millis(200);
/// Goodput has to rise by this for more requests to be kept.
const GAIN: f64 = 1.05;
/// Windows of rest after more requests were no use, the first time and at most: it doubles as long as they are none.
const BACKOFF_WINDOWS: u32 = 2;
const BACKOFF_WINDOWS_MAX: u32 = 32;
/// Windows of rest after there were too many for a server.
const HALVED_WINDOWS: u32 = 10;
/// What a request counts, besides its bytes.
const REQUEST_BYTES: u64 = 64 << 10;
/// Ended requests whose pace is remembered.
const PEERS: usize = 32;
/// So many must have ended before one is called slow.
const PEERS_MIN: usize = 3;
/// A request that takes so many times as long as its peers is slow.
const SLOW_FACTOR: f64 = 4.0;
/// No request is slow before this.
const SLOW_MIN: Duration = Duration::from_secs(1);
/// What a request costs before its first byte, as bytes, when requests of different lengths are compared.
const LATENCY_BYTES: f64 = 1_048_576.0;

/// Shared by all fills; clones are the same limiter.
#[derive(Debug, Clone)]
pub(super) struct Limiter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    permits: Arc<Semaphore>,
    /// Received since the window began, requests included.
    window_bytes: AtomicU64,
    /// Slices handed to the workers since then, and those among them that had to wait there.
    slices: AtomicU64,
    waiting_slices: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    climb: ConcurrencyController,
    window_start: Instant,
    /// Permits to be taken out of use as they come back.
    debt: usize,
    /// All permits were in use when the window began.
    was_full: bool,
    last_halved: Option<Instant>,
    /// Seconds per byte of requests that ended lately.
    peers: VecDeque<f64>,
}

/// The right to have one request under way.
#[derive(Debug)]
pub(super) struct Permit {
    permit: Option<OwnedSemaphorePermit>,
    limiter: Limiter,
}

impl Limiter {
    /// For a process that may have `files_max` files open, if that is known.
    pub(super) fn new(files_max: Option<u64>) -> Self {
        // A request needs a connection; two files for each are open, with up to three descriptors; and what comes may be
        // sent meanwhile.
        let most =
            files_max.map_or(MOST, |files| usize::try_from(files / 16).unwrap_or(MOST)).clamp(CONCURRENCY_MIN, MOST);
        let climb = ConcurrencyController::new(CONCURRENCY_INITIAL.min(most), most);
        Self(Arc::new(Inner {
            permits: Arc::new(Semaphore::new(climb.limit)),
            window_bytes: AtomicU64::new(0),
            slices: AtomicU64::new(0),
            waiting_slices: AtomicU64::new(0),
            state: Mutex::new(State {
                climb,
                window_start: Instant::now(),
                debt: 0,
                was_full: false,
                last_halved: None,
                peers: VecDeque::new(),
            }),
        }))
    }

    /// Waits for the right to send one request.
    pub(super) async fn acquire(&self) -> Permit {
        // Never closed: there is no failure to tell.
        let permit = self.0.permits.clone().acquire_owned().await.ok();
        Permit { permit, limiter: self.clone() }
    }

    /// The same, if nobody waits for it.
    pub(super) fn try_acquire(&self) -> Option<Permit> {
        let permit = self.0.permits.clone().try_acquire_owned().ok()?;
        Some(Permit { permit: Some(permit), limiter: self.clone() })
    }

    /// Whether more requests might be under way than there are: nothing is left to start.
    pub(super) fn is_slack(&self) -> bool {
        self.0.permits.available_permits() > 0
    }

    /// Files worth having open at once: enough for small ones to keep every request busy.
    pub(super) fn files_at_once(&self) -> usize {
        2 * self.state().climb.most.min(32)
    }

    /// These bytes came.
    pub(super) fn received(&self, bytes: u64) {
        let total = self.0.window_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let mut state = self.state();
        let took = state.window_start.elapsed();
        if took < WINDOW {
            return;
        }
        self.0.window_bytes.store(0, Ordering::Relaxed);
        let (slices, waiting) =
            (self.0.slices.swap(0, Ordering::Relaxed), self.0.waiting_slices.swap(0, Ordering::Relaxed));
        let is_behind = 4 * waiting > slices;
        // What was not for want of requests says nothing about how many are right.
        let is_full = !self.is_slack() && !is_behind;
        if is_behind && state.climb.limit > CONCURRENCY_INITIAL {
            let limit = state.climb.back_to(CONCURRENCY_INITIAL);
            self.adjust(&mut state, limit);
        }
        if is_full && state.was_full && took < 5 * WINDOW {
            let limit = state.climb.window(total as f64 / took.as_secs_f64());
            self.adjust(&mut state, limit);
        }
        (state.window_start, state.was_full) = (Instant::now(), is_full);
    }

    /// A slice went to the workers; whether others wait there.
    pub(super) fn handed_over(&self, waits: bool) {
        self.0.slices.fetch_add(1, Ordering::Relaxed);
        self.0.waiting_slices.fetch_add(u64::from(waits), Ordering::Relaxed);
    }

    /// A server said that it is asked too much. Requests under way say it all at once: it counts once a window.
    pub(super) fn throttled(&self) {
        let mut state = self.state();
        if state.last_halved.is_some_and(|last| last.elapsed() < WINDOW) {
            return;
        }
        state.last_halved = Some(Instant::now());
        let limit = state.climb.halve();
        self.adjust(&mut state, limit);
        tracing::debug!(limit, "a server throttles; fewer requests at once");
    }

    /// A request for `bytes` ended well after `took`.
    pub(super) fn ended(&self, bytes: u64, took: Duration) {
        self.received(REQUEST_BYTES);
        let mut state = self.state();
        if state.peers.len() == PEERS {
            state.peers.pop_front();
        }
        state.peers.push_back(took.as_secs_f64() / (bytes as f64 + LATENCY_BYTES));
    }

    /// Whether a request for `bytes` that has been under way for `elapsed` is far slower than its peers were.
    pub(super) fn is_slow(&self, bytes: u64, elapsed: Duration) -> bool {
        if elapsed < SLOW_MIN {
            return false;
        }
        let mut peers: Vec<f64> = self.state().peers.iter().copied().collect();
        if peers.len() < PEERS_MIN {
            return false;
        }
        peers.sort_by(f64::total_cmp);
        elapsed.as_secs_f64() > SLOW_FACTOR * peers[peers.len() / 2] * (bytes as f64 + LATENCY_BYTES)
    }

    /// Makes `limit` the number of permits that are in use or to be had.
    fn adjust(&self, state: &mut State, limit: usize) {
        let now = state.climb.in_force;
        if limit > now {
            let mark_synced = state.debt.min(limit - now);
            state.debt -= mark_synced;
            self.0.permits.add_permits(limit - now - mark_synced);
        } else {
            let dirty = now - limit;
            state.debt += dirty - self.0.permits.forget_permits(dirty);
        }
        state.climb.in_force = limit;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn limit(&self) -> usize {
        self.state().climb.limit
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.limiter.state();
        if state.debt > 0
            && let Some(permit) = self.permit.take()
        {
            state.debt -= 1;
            permit.forget();
        }
    }
}

/// The search for the best number: no clock, no requests, only what each window brought.
#[derive(Debug)]
struct ConcurrencyController {
    limit: usize,
    /// The number that permits were made for.
    in_force: usize,
    most: usize,
    step: Step,
    /// Goodput before the last step up, in bytes a second.
    before: f64,
    /// No step up was in vain yet: they may be large.
    is_young: bool,
    /// Windows of rest after the next step in vain.
    rest: u32,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The next window tells what this number is good for.
    Measure,
    /// Just gone up from that number; what comes now is a mixture.
    Settle(usize),
    /// The next window tells what going up from that number was good for.
    Judge(usize),
    /// So many windows are to pass.
    Rest(u32),
}

impl ConcurrencyController {
    fn new(limit: usize, most: usize) -> Self {
        Self { limit, in_force: limit, most, step: Step::Measure, before: 0.0, is_young: true, rest: BACKOFF_WINDOWS }
    }

    /// A window ended with this goodput; the number from now on.
    fn window(&mut self, goodput: f64) -> usize {
        self.step = match self.step {
            Step::Rest(left @ 1..) => Step::Rest(left - 1),
            Step::Rest(0) | Step::Measure => self.up(goodput),
            Step::Settle(from) => Step::Judge(from),
            Step::Judge(_) if goodput >= self.before * GAIN => {
                self.rest = BACKOFF_WINDOWS;
                self.up(goodput)
            }
            Step::Judge(from) => {
                let rest = self.rest;
                (self.limit, self.is_young, self.rest) = (from, false, (2 * rest).min(BACKOFF_WINDOWS_MAX));
                Step::Rest(rest)
            }
        };
        self.limit
    }

    fn up(&mut self, goodput: f64) -> Step {
        let (from, stride) = (self.limit, if self.is_young { self.limit / 2 } else { self.limit / 4 });
        if from == self.most {
            return Step::Rest(BACKOFF_WINDOWS_MAX);
        }
        self.before = goodput;
        self.limit = (from + stride.max(1)).min(self.most);
        Step::Settle(from)
    }

    fn halve(&mut self) -> usize {
        self.back_to((self.limit / 2).max(CONCURRENCY_MIN))
    }

    fn back_to(&mut self, limit: usize) -> usize {
        (self.limit, self.step, self.is_young) = (limit, Step::Rest(HALVED_WINDOWS), false);
        limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a climb is after so many windows on a network that brings `goodput(limit)`.
    fn climbed(windows: usize, goodput: impl Fn(usize) -> f64) -> ConcurrencyController {
        let mut climb = ConcurrencyController::new(CONCURRENCY_INITIAL, MOST);
        for _ in 0..windows {
            climb.window(goodput(climb.limit));
        }
        climb
    }

    #[test]
    fn more_requests_are_kept_where_each_brings_its_own() {
        // 60 MB/s a connection, 3 GB/s in all.
        let shaped = |limit: usize| (limit as f64 * 60e6).min(3e9);
        let found = climbed(12, shaped).limit;
        assert!(shaped(found) >= 0.95 * 3e9, "{found} at once");
    }

    #[test]
    fn more_requests_are_given_up_where_they_bring_nothing() {
        let mut climb = climbed(3, |_| 1e9);
        assert_eq!(climb.limit, CONCURRENCY_INITIAL, "after one try");
        let tries = (0..100).filter(|_| climb.window(1e9) > CONCURRENCY_INITIAL).count();
        assert!((1..30).contains(&tries), "seldom tried again, and never for long: {tries}");
    }

    #[test]
    fn a_throttled_limiter_halves_down_to_its_least_and_recovers() {
        let mut climb = climbed(0, |_| 0.0);
        let halved: Vec<_> = (0..4).map(|_| climb.halve()).collect();
        assert_eq!(halved, [8, 4, 4, 4]);
        for _ in 0..60 {
            climb.window(climb.limit as f64 * 50e6);
        }
        assert!(climb.limit >= CONCURRENCY_INITIAL, "{}", climb.limit);
    }

    #[tokio::test]
    async fn fewer_permits_hold_as_soon_as_those_in_use_come_back() {
        let limiter = Limiter::new(None);
        let mut held = Vec::new();
        for _ in 0..CONCURRENCY_INITIAL {
            held.push(limiter.acquire().await);
        }
        limiter.throttled();
        limiter.throttled();
        assert_eq!(limiter.limit(), CONCURRENCY_INITIAL / 2, "one storm halves once");
        held.truncate(CONCURRENCY_INITIAL / 2);
        assert!(limiter.try_acquire().is_none(), "what came back is out of use");
        held.clear();
        let mut free: Vec<_> = std::iter::from_fn(|| limiter.try_acquire()).take(MOST).collect();
        assert_eq!(free.len(), CONCURRENCY_INITIAL / 2);
        free.clear();
        let mut state = limiter.state();
        let limit = state.climb.most;
        limiter.adjust(&mut state, limit);
        drop(state);
        assert_eq!(std::iter::from_fn(|| limiter.try_acquire()).take(2 * MOST).collect::<Vec<_>>().len(), MOST);
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
        assert!(!limiter.is_slow(8 * mib, 60 * second), "no peers, no judgement");
        (0..PEERS_MIN).for_each(|_| limiter.ended(8 * mib, second));
        assert!(!limiter.is_slow(8 * mib, 3 * second) && limiter.is_slow(8 * mib, 5 * second));
        assert!(!limiter.is_slow(80 * mib, 5 * second), "ten times the bytes may take longer");
    }
}
