//! Controller of the request limit: decides from the goodput of each window how many requests may run concurrently.
//!
//! It begins with a slow start, like TCP: the limit is doubled or quadrupled while each step raises goodput by at least
//! 25 %. Then it hill-climbs in steps of a quarter: it keeps a step that raises goodput by at least 5 %, otherwise it
//! reverts the step and waits before it probes again. On 503 and 429 it halves the limit, and for some time stays below
//! the limit at which the server throttled requests.
//!
//! A window counts only if the limit was in effect at its start and end: all permits are in use, and either three
//! quarters of the requests are receiving, or as many requests were completed as the limit allows. Waiting for first
//! bytes after a raise is therefore not measured. The controller has no clock and does no I/O, so that a model of a
//! server can drive it (`simulation.rs`).

use crate::disk::FoundLimit;
use std::time::{Duration, Instant};

/// Initial number of concurrent requests.
pub(super) const CONCURRENCY_INITIAL: usize = 16;
/// Lower bound on concurrent requests, so that repeated throttling cannot stop progress.
pub(super) const CONCURRENCY_MIN: usize = 4;
/// Length of a window in slow start.
const SLOW_START_WINDOW: Duration = Duration::from_millis(60);
/// Length of a window after slow start; about the duration of one request on a fast link.
const WINDOW: Duration = Duration::from_millis(200);
/// Bytes credited to each completed request in addition to its body. Small files carry few bytes per request, and the
/// credit shows that more requests help even if throughput is bound by latency.
const REQUEST_CREDIT_BYTES: u64 = 64 << 10;
/// Goodput up to which slow start quadruples the limit, in bytes per second. At four times this goodput, common
/// networks (10 Gbit/s) and machines reach their own limits.
const QUADRUPLING_GOODPUT_MAX: f64 = 400e6;
/// Smallest growth of goodput, as a factor, with which slow start goes on.
const SLOW_START_GAIN_MIN: f64 = 1.25;
/// Smallest growth of goodput, as a factor, for which a raised limit is kept.
const GOODPUT_GAIN_MIN: f64 = 1.05;
/// Windows to wait after an unsuccessful probe. Doubles after each further one, up to [`BACKOFF_WINDOWS_MAX`].
const BACKOFF_WINDOWS: u32 = 2;
/// Upper bound on the windows to wait after an unsuccessful probe.
const BACKOFF_WINDOWS_MAX: u32 = 32;
/// Windows to wait after a server throttled requests or the workers fell behind.
const HOLD_WINDOWS: u32 = 5;
/// Windows after which a limit at which a server throttled requests is tried again.
const CEILING_WINDOWS: u32 = 64;

/// The search for the best limit, and the window that is being measured.
#[derive(Debug)]
pub(super) struct ConcurrencyController {
    search: Search,
    window: Window,
    /// Number of requests whose response has begun. A second connection of a request is not counted.
    receiving: usize,
    /// Number of requests that were completed under the present limit.
    completed: usize,
    last_halved: Option<Instant>,
}

/// What is measured in the present window.
#[derive(Debug)]
struct Window {
    start: Instant,
    /// True if the limit was in effect at the start.
    was_in_effect: bool,
    /// Bytes received, including the credit of completed requests.
    bytes: u64,
    /// Slices handed to the workers.
    slices: u64,
    /// The slices among them that were queued behind a backlog.
    waiting_slices: u64,
}

/// Hill climbing for the best limit. Its only input is the goodput of each window.
#[derive(Debug)]
struct Search {
    limit: usize,
    limit_max: usize,
    phase: Phase,
    /// Goodput before the last raise, in bytes per second.
    goodput_before: f64,
    /// True until a step gains too little, or the limit is lowered.
    is_slow_start: bool,
    /// Windows to wait after the next unsuccessful probe.
    backoff_windows: u32,
    /// A limit that is not exceeded for this many windows, because the server throttled requests at a higher one.
    ceiling: Option<(usize, u32)>,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// The next window measures the goodput at the present limit.
    Measure,
    /// The next window decides whether the raise from this value is kept.
    Judge(usize),
    /// This many windows are skipped before the next probe.
    Backoff(u32),
}

impl Window {
    fn new(start: Instant, was_in_effect: bool) -> Self {
        Self { start, was_in_effect, bytes: 0, slices: 0, waiting_slices: 0 }
    }

    /// Returns true if hashing or disk writes are the bottleneck: more than a quarter of the slices found a backlog.
    fn is_behind(&self) -> bool {
        4 * self.waiting_slices > self.slices
    }
}

impl ConcurrencyController {
    /// Creates a controller at the time `now`. The limit is at most `limit_max`.
    pub(super) fn new(limit_max: usize, now: Instant) -> Self {
        let limit = CONCURRENCY_INITIAL.min(limit_max);
        Self {
            search: Search {
                limit,
                limit_max,
                phase: Phase::Measure,
                goodput_before: 0.0,
                is_slow_start: true,
                backoff_windows: BACKOFF_WINDOWS,
                ceiling: None,
            },
            window: Window::new(now, false),
            receiving: 0,
            completed: 0,
            last_halved: None,
        }
    }

    /// Begins with what an earlier search found, unless a search has begun. Returns false if one has.
    pub(super) fn start_with(&mut self, remembered: Option<FoundLimit>) -> bool {
        if !self.search.is_slow_start || !matches!(self.search.phase, Phase::Measure) || self.receiving > 0 {
            return false;
        }
        // Use a remembered limit only if it is above the initial one. A lower one would only slow the start down, and
        // another user of a shared directory may have written it.
        if let Some(found) = remembered.filter(|found| found.limit > self.search.limit) {
            self.search.limit = found.limit.min(self.search.limit_max);
            self.search.is_slow_start = found.is_slow_start;
        }
        true
    }

    /// Returns the number of requests that may run concurrently.
    pub(super) fn limit(&self) -> usize {
        self.search.limit
    }

    /// Returns what the search has found so far: the limit, or the previous one while a raise is being judged.
    pub(super) fn found(&self) -> FoundLimit {
        let limit = self.search.raised_from().unwrap_or(self.search.limit);
        FoundLimit { limit, is_slow_start: self.search.is_slow_start }
    }

    /// Records that a response has begun.
    pub(super) fn begin_receiving(&mut self) {
        self.receiving += 1;
    }

    /// Records that a request, for which [`begin_receiving`](Self::begin_receiving) was called, ended.
    pub(super) fn end_receiving(&mut self) {
        self.receiving -= 1;
    }

    /// Records that a request received its last byte.
    pub(super) fn record_completed(&mut self, now: Instant, is_full: bool) {
        self.completed += 1;
        self.record_received(REQUEST_CREDIT_BYTES, now, is_full);
    }

    /// Records that a slice was handed to the workers. `waits` is true if it was queued behind a backlog.
    pub(super) fn record_queued_slice(&mut self, waits: bool) {
        self.window.slices += 1;
        self.window.waiting_slices += u64::from(waits);
    }

    /// Records received bytes and, at the end of a window, adjusts the limit. `is_full` is true if as many requests run
    /// as the limit allows.
    pub(super) fn record_received(&mut self, bytes: u64, now: Instant, is_full: bool) {
        self.window.bytes += bytes;
        let limit = self.search.limit;
        // Some permits belong to second connections and to requests without a response yet, so three quarters of the
        // limit are enough. After a raise, more requests must be receiving than the previous limit allowed.
        let receiving_min = self.search.raised_from().map_or(0, |from| from + 1).max(3 * limit / 4);
        let is_in_effect = is_full && (self.receiving >= receiving_min || self.completed >= limit);
        let took = now - self.window.start;
        if is_in_effect && !self.window.was_in_effect {
            // Measure from here on.
            self.window = Window::new(now, true);
            return;
        }
        let window = if self.search.is_slow_start { SLOW_START_WINDOW } else { WINDOW };
        if took < window {
            return;
        }
        if self.window.is_behind() && !self.search.judges_slow_start() {
            self.search.hold();
        } else if is_in_effect && self.window.was_in_effect && took < 5 * WINDOW {
            // A window of a second or more does not count, because no bytes arrived in it for long.
            self.search.end_window(self.window.bytes as f64 / took.as_secs_f64());
        }
        // Requests completed under the old limit say nothing about the new one.
        if self.search.limit != limit {
            self.completed = 0;
        }
        self.window = Window::new(now, is_in_effect && self.search.limit == limit);
    }

    /// Halves the limit after a server answered 503 or 429. Concurrent requests are throttled together, so this takes
    /// effect at most once per [`WINDOW`]. Returns true if it did.
    pub(super) fn record_throttled(&mut self, now: Instant) -> bool {
        if self.last_halved.is_some_and(|last| now - last < WINDOW) {
            return false;
        }
        self.last_halved = Some(now);
        self.search.halve();
        self.completed = 0;
        true
    }
}

impl Search {
    /// Returns true if the limit was just multiplied. The first bytes of many responses then arrive together, so a
    /// backlog of the workers does not show that they are the bottleneck.
    fn judges_slow_start(&self) -> bool {
        self.is_slow_start && self.raised_from().is_some()
    }

    /// Returns the limit before the last raise, while that raise is being judged.
    fn raised_from(&self) -> Option<usize> {
        if let Phase::Judge(from) = self.phase { Some(from) } else { None }
    }

    /// Takes the goodput of a window in which the present limit was in effect, in bytes per second, and adjusts
    /// the limit.
    fn end_window(&mut self, goodput: f64) {
        let limit = self.limit;
        tracing::trace!(limit, goodput, phase = ?self.phase, "judging a window of the request limit");
        self.ceiling = self.ceiling.and_then(|(limit, windows)| Some((limit, windows.checked_sub(1)?)));
        self.phase = match self.phase {
            Phase::Backoff(left @ 1..) => Phase::Backoff(left - 1),
            Phase::Backoff(0) | Phase::Measure => self.raise(goodput),
            Phase::Judge(_) if goodput >= self.goodput_before * GOODPUT_GAIN_MIN => {
                // The raise paid off: keep it and probe higher.
                // Slow start ends when a step gains less than it requires.
                self.is_slow_start &= goodput >= self.goodput_before * SLOW_START_GAIN_MIN;
                self.backoff_windows = BACKOFF_WINDOWS;
                self.raise(goodput)
            }
            Phase::Judge(from) => {
                // The raise did not pay off: revert it and wait, longer after each failure.
                let backoff_windows = self.backoff_windows;
                (self.limit, self.is_slow_start, self.backoff_windows) =
                    (from, false, (2 * backoff_windows).min(BACKOFF_WINDOWS_MAX));
                Phase::Backoff(backoff_windows)
            }
        };
    }

    /// Raises the limit: to a multiple in slow start, by a quarter later. Returns the next phase.
    fn raise(&mut self, goodput: f64) -> Phase {
        let from = self.limit;
        let wanted = match self.is_slow_start {
            true if goodput <= QUADRUPLING_GOODPUT_MAX => 4 * from,
            true => 2 * from,
            false => from + (from / 4).max(1),
        };
        let limit_max = self.ceiling.map_or(self.limit_max, |(limit, _)| limit.min(self.limit_max));
        // At the maximum, check again later, because the ceiling expires.
        if from >= limit_max {
            return Phase::Backoff(BACKOFF_WINDOWS);
        }
        self.goodput_before = goodput;
        self.limit = wanted.min(limit_max);
        Phase::Judge(from)
    }

    /// Halves the limit because a server throttled requests.
    fn halve(&mut self) {
        // Do not exceed three quarters of this limit for some time, but never forbid the initial limit.
        self.ceiling = Some(((self.limit - self.limit / 4).max(CONCURRENCY_INITIAL), CEILING_WINDOWS));
        self.wait_at((self.limit / 2).max(CONCURRENCY_MIN));
    }

    /// Reverts a raise whose effect is not known yet, because hashing or disk writes are the bottleneck. More requests
    /// would only buffer bytes in memory.
    fn hold(&mut self) {
        tracing::trace!(limit = self.limit, "hashing or disk writes are the bottleneck; holding the request limit");
        self.wait_at(self.raised_from().unwrap_or(self.limit));
    }

    /// Sets the limit and waits before the next probe.
    fn wait_at(&mut self, limit: usize) {
        (self.limit, self.phase, self.is_slow_start) = (limit, Phase::Backoff(HOLD_WINDOWS), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT_MAX: usize = 256;

    /// Returns the search after `windows` windows on a network with the goodput `goodput(limit)`.
    fn search_after(windows: usize, goodput: impl Fn(usize) -> f64) -> Search {
        let mut search = ConcurrencyController::new(LIMIT_MAX, Instant::now()).search;
        for _ in 0..windows {
            search.end_window(goodput(search.limit));
        }
        search
    }

    #[test]
    fn the_limit_is_multiplied_while_goodput_follows() {
        let limits =
            |each: f64| [0, 1, 2, 3, 4, 5].map(|windows| search_after(windows, |limit| limit as f64 * each).limit);
        assert_eq!(limits(1e6), [16, 64, 256, 256, 256, 256]);
        assert_eq!(limits(90e6), [16, 32, 64, 128, 256, 256]);
    }

    #[test]
    fn a_raised_limit_is_kept_while_each_connection_adds_throughput() {
        // 60 MB/s a connection, 3 GB/s in all.
        let shaped = |limit: usize| (limit as f64 * 60e6).min(3e9);
        let found = search_after(12, shaped).limit;
        assert!(shaped(found) >= 0.95 * 3e9, "limit {found}");
    }

    #[test]
    fn a_raised_limit_is_reverted_when_goodput_does_not_grow() {
        let mut search = search_after(2, |_| 1e9);
        assert_eq!(search.limit, CONCURRENCY_INITIAL, "after one probe");
        let probes = (0..100).filter(|_| {
            search.end_window(1e9);
            search.limit > CONCURRENCY_INITIAL
        });
        let probes = probes.count();
        assert!((1..30).contains(&probes), "{probes} of 100 windows probe a higher limit");
    }

    #[test]
    fn a_throttled_limit_is_halved_down_to_the_minimum_and_recovers() {
        let mut search = search_after(0, |_| 0.0);
        let halved = [(); 4].map(|()| {
            search.halve();
            search.limit
        });
        assert_eq!(halved, [8, 4, 4, 4]);
        for _ in 0..60 {
            search.end_window(search.limit as f64 * 50e6);
        }
        assert!(search.limit >= CONCURRENCY_INITIAL, "{}", search.limit);
    }

    #[test]
    fn a_limit_at_which_a_server_throttled_is_not_reached_again_for_some_time() {
        let mut search = search_after(2, |limit| limit as f64);
        assert_eq!(search.limit, LIMIT_MAX);
        search.halve();
        let mut highest = |windows| {
            (0..windows)
                .map(|_| {
                    search.end_window(search.limit as f64);
                    search.limit
                })
                .max()
        };
        assert_eq!((highest(CEILING_WINDOWS), highest(20)), (Some(192), Some(LIMIT_MAX)));
    }

    #[test]
    fn a_search_begins_with_what_an_earlier_one_found() {
        let new = || ConcurrencyController::new(LIMIT_MAX, Instant::now());
        let found = |limit, is_slow_start| FoundLimit { limit, is_slow_start };
        let mut controller = new();
        assert!(controller.start_with(Some(found(100, false))));
        assert_eq!(controller.found(), found(100, false));
        controller.search.end_window(1e9);
        assert_eq!((controller.limit(), controller.found()), (125, found(100, false)), "the raise is not judged yet");
        assert!(!controller.start_with(Some(found(200, false))), "only before the first download");
        for (remembered, limit) in [(1000, LIMIT_MAX), (0, CONCURRENCY_INITIAL), (64, 64)] {
            let mut controller = new();
            assert!(controller.start_with(Some(found(remembered, true))));
            assert_eq!(controller.found(), found(limit, true), "slow start goes on");
        }
    }

    #[test]
    fn a_ceiling_never_exceeds_the_maximum() {
        let mut search = ConcurrencyController::new(8, Instant::now()).search;
        search.halve();
        (0..100).for_each(|_| search.end_window(search.limit as f64));
        assert_eq!(search.limit, 8);
    }

    #[test]
    fn a_window_counts_only_if_most_requests_receive_bytes() {
        let (mut controller, mut now) = (ConcurrencyController::new(LIMIT_MAX, Instant::now()), Instant::now());
        let mut receive = |controller: &mut ConcurrencyController, is_full| {
            for _ in 0..10 {
                now += SLOW_START_WINDOW / 4;
                controller.record_received(1 << 20, now, is_full);
            }
            controller.limit()
        };
        assert_eq!(receive(&mut controller, true), CONCURRENCY_INITIAL, "no response has begun");
        (0..CONCURRENCY_INITIAL).for_each(|_| controller.begin_receiving());
        assert_eq!(receive(&mut controller, false), CONCURRENCY_INITIAL, "permits are free");
        let raised = receive(&mut controller, true);
        assert!(raised > CONCURRENCY_INITIAL);
        assert_eq!(receive(&mut controller, true), raised, "the new requests wait for responses");
    }

    #[test]
    fn a_backlog_of_the_workers_reverts_a_raise_except_at_the_start() {
        let mut controller = ConcurrencyController::new(LIMIT_MAX, Instant::now());
        for (is_slow_start, limit) in [(true, 100), (false, 80), (false, 80)] {
            controller.search.is_slow_start = is_slow_start;
            controller.search.limit = 100;
            controller.search.phase = Phase::Judge(80);
            controller.record_queued_slice(true);
            controller.record_received(1, controller.window.start + WINDOW, true);
            assert_eq!(controller.limit(), limit, "starting: {is_slow_start}");
        }
    }
}
