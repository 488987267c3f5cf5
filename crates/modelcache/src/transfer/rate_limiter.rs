//! A pace: how many bytes a second may be read, over everybody who keeps to it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long nobody is kept who was told to stop.
const NAP: Duration = Duration::from_millis(50);

/// A limit on bytes per second, or none.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    bytes_per_s: Option<u64>,
    /// When the next bytes may be read.
    next: Mutex<Instant>,
}

impl RateLimiter {
    /// At most this many bytes a second; `None` for as fast as it goes.
    pub(crate) fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s: bytes_per_s.map(|rate| rate.max(1)), next: Mutex::new(Instant::now()) }
    }

    /// Whether there is a limit.
    pub(crate) fn is_limited(&self) -> bool {
        self.bytes_per_s.is_some()
    }

    /// Books `bytes` and tells how long to wait before they are read.
    fn book(&self, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_s else { return Duration::ZERO };
        let now = Instant::now();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*next).max(now);
        *next = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
        start - now
    }

    /// Sleeps until `bytes` more may be read; ends early once `stopped` says so.
    pub(crate) fn sleep(&self, bytes: u64, stopped: impl Fn() -> bool) {
        let mut left = self.book(bytes);
        while !left.is_zero() && !stopped() {
            let nap = left.min(NAP);
            std::thread::sleep(nap);
            left -= nap;
        }
    }

    /// The same for a task.
    pub(crate) async fn wait(&self, bytes: u64) {
        let left = self.book(bytes);
        if !left.is_zero() {
            tokio::time::sleep(left).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_booked_before_is_waited_for() {
        let rate_limiter = RateLimiter::new(Some(1000));
        assert_eq!(rate_limiter.book(500), Duration::ZERO);
        let second = rate_limiter.book(2000);
        assert!(second > Duration::from_millis(300) && second <= Duration::from_millis(500), "{second:?}");
        let third = rate_limiter.book(1);
        assert!(third > Duration::from_secs(2) && third <= Duration::from_millis(2500), "{third:?}");
        assert_eq!(RateLimiter::new(None).book(u64::MAX), Duration::ZERO);
    }
}
