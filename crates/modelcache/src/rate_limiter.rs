//! Rate limit in bytes per second, shared by all tasks and threads that use it.

use crate::mutex::Mutex;
use std::time::{Duration, Instant};

/// Longest sleep between two checks of whether to stop.
const SLEEP_STEP: Duration = Duration::from_millis(50);

/// A limit on bytes per second, or no limit.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    bytes_per_s: Option<u64>,
    /// Time at which the next bytes may be read.
    next: Mutex<Instant>,
}

impl RateLimiter {
    /// Creates a limiter. `None` means no limit.
    pub(crate) fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s: bytes_per_s.map(|rate| rate.max(1)), next: Mutex::new(Instant::now()) }
    }

    /// Returns true if there is a limit.
    pub(crate) fn is_limited(&self) -> bool {
        self.bytes_per_s.is_some()
    }

    /// Reserves `bytes` and returns how long to wait before reading them.
    fn reserve(&self, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_s else { return Duration::ZERO };
        let now = Instant::now();
        let mut next = self.next.lock();
        // Unused time is not saved up: after a pause, the limit applies as at the start.
        let start = (*next).max(now);
        *next = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
        start - now
    }

    /// Blocks the thread until `bytes` more may be read. Returns early once `is_stopped` returns true.
    pub(crate) fn sleep(&self, bytes: u64, is_stopped: impl Fn() -> bool) {
        let mut left = self.reserve(bytes);
        while !left.is_zero() && !is_stopped() {
            let step = left.min(SLEEP_STEP);
            std::thread::sleep(step);
            left -= step;
        }
    }

    /// Waits asynchronously until `bytes` more may be read.
    pub(crate) async fn wait(&self, bytes: u64) {
        let left = self.reserve(bytes);
        if !left.is_zero() {
            tokio::time::sleep(left).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_waits_for_the_earlier_ones() {
        let rate_limiter = RateLimiter::new(Some(1000));
        assert_eq!(rate_limiter.reserve(500), Duration::ZERO);
        let second = rate_limiter.reserve(2000);
        assert!(second > Duration::from_millis(300) && second <= Duration::from_millis(500), "{second:?}");
        let third = rate_limiter.reserve(1);
        assert!(third > Duration::from_secs(2) && third <= Duration::from_millis(2500), "{third:?}");
        assert_eq!(RateLimiter::new(None).reserve(u64::MAX), Duration::ZERO);
    }
}
