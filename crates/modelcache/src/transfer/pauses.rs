//! Pauses of all requests to a host that asked for one, for instance with `Retry-After`.
//!
//! A rate limit applies to a client, not to one request. Without a common pause, every request in flight would meet the
//! limit by itself, and spend the retry budget of the others.

use crate::mutex::Mutex;
use crate::printable;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Requests start within this time after a pause, so that they do not all arrive at once.
const RESTART_WITHIN: Duration = Duration::from_millis(500);

/// The end of the pause of each host. Clones share the pauses.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pauses(Arc<Mutex<HashMap<String, Instant>>>);

impl Pauses {
    /// Pauses requests to `host` for `wait`. Returns true if no pause was under way.
    pub(crate) fn begin(&self, host: &str, wait: Duration) -> bool {
        let now = Instant::now();
        let Some(until) = now.checked_add(wait) else { return true };
        let mut pauses = self.0.lock();
        let end = pauses.entry(host.to_owned()).or_insert(now);
        let is_new = *end <= now;
        *end = until.max(*end);
        is_new
    }

    /// Returns true if any host was paused within the last `age`. A request may then have been held back.
    pub(super) fn any_within(&self, age: Duration) -> bool {
        let (now, pauses) = (Instant::now(), self.0.lock());
        pauses.values().any(|end| *end + RESTART_WITHIN + age > now)
    }

    /// Returns the end of the pause of `host`.
    fn end(&self, host: &str) -> Option<Instant> {
        let pauses = self.0.lock();
        pauses.get(host).copied().filter(|end| *end > Instant::now())
    }

    /// Returns how long requests to `host` are still paused; `None` if they are not.
    pub(crate) fn left(&self, host: &str) -> Option<Duration> {
        self.end(host).map(|end| end.saturating_duration_since(Instant::now()))
    }

    /// Waits until requests to `host` are not paused.
    pub(crate) async fn wait(&self, host: &str) {
        while let Some(end) = self.end(host) {
            tracing::debug!(host = %printable::line(host), "requests to this host are paused, because it asked for a wait");
            tokio::time::sleep_until(end + RESTART_WITHIN.mul_f64(rand::random_range(0.0..=1.0))).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pause_holds_all_requests_to_one_host() {
        let (pauses, start, wait) = (Pauses::default(), Instant::now(), Duration::from_millis(300));
        assert!(pauses.begin("a", wait));
        assert!(!pauses.begin("a", wait / 2), "the same window");
        pauses.wait("b").await;
        assert!(start.elapsed() < wait, "another host is not paused");
        futures::future::join(pauses.wait("a"), pauses.wait("a")).await;
        assert!(start.elapsed() >= wait);
        assert!(pauses.begin("a", wait), "the first pause has ended");
    }
}
