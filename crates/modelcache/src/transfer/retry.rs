//! Retry policy: exponential backoff with full jitter, a deadline, and a retry budget shared by all requests.
//!
//! Only failures marked transient are retried. The budget keeps retries from multiplying the load of an outage: they
//! may be a tenth of all requests, plus an initial allowance so that an idle process can retry at all. Retry loops are
//! never nested: a source does not retry the reads that the downloader retries.

use super::pauses::Pauses;
use crate::config::RetryConfig;
use crate::error::{Error, Result, Tier};
use crate::metrics::Metrics;
use crate::mutex::Mutex;
use crate::progress::Progress;
use reqwest::Client;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio::time::Instant;

/// First backoff, before jitter. Doubles with each attempt.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// Longest backoff, before jitter.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Tokens earned by each request; a retry costs [`RETRY_COST`].
const REQUEST_EARNS: i64 = 1;
/// Tokens that a retry costs, so that retries stay within a tenth of all requests.
const RETRY_COST: i64 = 10;
/// Initial and maximum number of tokens: an idle process may spend them at once (32 retries).
const TOKENS_MAX: i64 = 320;
/// Factor by which the deadline is longer if the server requests a wait (`Retry-After`). The Hub limits requests in
/// windows of five minutes, and the default deadline is one minute.
const REQUESTED_WAIT_DEADLINE_FACTOR: u32 = 6;
/// Time since the first failure after which a wait is reported at log level info.
const REPORT_AFTER: Duration = Duration::from_secs(2);
/// Minimum time between two such reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

tokio::task_local! {
    /// Time from which [`within`] allows no further retry.
    static RETRY_DEADLINE: Instant;
    /// The progress in which retries are recorded while [`recording_retries`] runs.
    static PROGRESS: Progress;
}

/// Runs `work`, and records the retries of its requests in `progress`. Does not apply to tasks that `work` spawns.
pub(crate) async fn recording_retries<T>(progress: &Progress, work: impl Future<Output = T>) -> T {
    PROGRESS.scope(progress.clone(), work).await
}

/// Runs `work` for at most `limit`. Returns `None` on timeout.
///
/// Requests in `work` are not retried in the last eighth of the time, so that the error of a failing server is returned
/// instead of a timeout.
pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let end = Instant::now() + limit;
    tokio::time::timeout_at(end, RETRY_DEADLINE.scope(end - limit / 8, work)).await.ok()
}

/// The retry policy. Clones share one budget, the pauses that servers ask for, and the connections to origins.
#[derive(Debug, Clone)]
pub struct Retry {
    config: RetryConfig,
    tokens: Arc<AtomicI64>,
    pauses: Pauses,
    /// The HTTP clients for origins, each built at its first request: without and with access to link-local addresses.
    clients: Arc<[OnceCell<Client>; 2]>,
    /// Time of the last report of a wait at log level info.
    last_report: Arc<Mutex<Option<Instant>>>,
    /// Where retries are counted, and the tier that requests go to.
    counted_in: Option<(Metrics, Tier)>,
}

/// The attempts of one request so far.
#[derive(Debug)]
pub struct Attempts {
    retry: Retry,
    first_failure: Option<Instant>,
    failures: u32,
}

impl Retry {
    /// Creates a policy with a full budget.
    pub fn new(config: RetryConfig) -> Self {
        Self {
            config,
            tokens: Arc::new(AtomicI64::new(TOKENS_MAX)),
            pauses: Pauses::default(),
            clients: Arc::default(),
            last_report: Arc::default(),
            counted_in: None,
        }
    }

    /// Returns the policy for requests to `tier`: it counts retries and throttling answers in `metrics`.
    pub(crate) fn counted_in(&self, metrics: &Metrics, tier: Tier) -> Self {
        Self { counted_in: Some((metrics.clone(), tier)), ..self.clone() }
    }

    /// Returns the longest wait for the next bytes of a silent server.
    pub fn read_timeout(&self) -> Duration {
        self.config.read_timeout
    }

    /// Returns the cells of the HTTP clients that all origins share: without and with access to link-local addresses. A
    /// cell is empty until the first request.
    pub(crate) fn clients(&self) -> &Arc<[OnceCell<Client>; 2]> {
        &self.clients
    }

    /// Returns the pauses, for clients that send requests.
    pub(crate) fn pauses(&self) -> &Pauses {
        &self.pauses
    }

    /// Starts counting the attempts of one request.
    pub fn attempts(&self) -> Attempts {
        let earn = |tokens: i64| Some((tokens + REQUEST_EARNS).min(TOKENS_MAX));
        let _ = self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, earn);
        Attempts { retry: self.clone(), first_failure: None, failures: 0 }
    }

    /// Takes the cost of a retry from the budget, for a hedged request: a second one for the same bytes. Returns false
    /// if the budget is spent.
    pub(crate) fn spend_for_hedge(&self) -> bool {
        self.spend_retry_cost()
    }

    /// Takes the cost of a retry from the budget. Returns false if the budget is spent.
    fn spend_retry_cost(&self) -> bool {
        let spend = |tokens: i64| (tokens >= RETRY_COST).then_some(tokens - RETRY_COST);
        self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }

    /// Returns true if a wait may be reported now, and records the report. Many requests meet the same failure, so
    /// reports are limited to one per [`REPORT_INTERVAL`].
    fn take_report_turn(&self) -> bool {
        let mut last_report = self.last_report.lock();
        let is_due = last_report.is_none_or(|last| last.elapsed() >= REPORT_INTERVAL);
        if is_due {
            *last_report = Some(Instant::now());
        }
        is_due
    }

    /// Runs `request` until it succeeds, fails permanently, or the deadline or the budget is spent.
    pub async fn run<T, F>(&self, mut request: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut attempts = self.attempts();
        loop {
            match request().await {
                Ok(value) => return Ok(value),
                Err(error) => attempts.pause(error).await?,
            }
        }
    }
}

impl Attempts {
    /// Sleeps before the next attempt, or returns `error` if there must be no other attempt.
    pub async fn pause(&mut self, error: Error) -> Result<()> {
        let wait = self.wait_after(&error, Instant::now());
        if let Some((metrics, tier)) = &self.retry.counted_in {
            metrics.update(|counts| {
                counts.throttled.add(*tier, u64::from(error.throttled_by().is_some()));
                counts.retries.add(*tier, u64::from(wait.is_some()));
            });
        }
        let Some(wait) = wait else { return Err(error) };
        // Requests outside a call, such as those of a background upload, have no progress.
        let _ = PROGRESS.try_with(|progress| progress.record_retry(&error));
        if (error.wait().is_some() || self.is_worth_reporting(wait)) && self.retry.take_report_turn() {
            let wait_s = wait.as_secs_f32().ceil();
            tracing::info!(%error, wait_s, attempt = self.failures, "waiting before the next attempt");
        } else {
            tracing::debug!(%error, wait_ms = wait.as_millis() as u64, attempt = self.failures, "retrying");
        }
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Returns true if the wait is long enough to be shown to the user.
    fn is_worth_reporting(&self, wait: Duration) -> bool {
        self.first_failure.is_some_and(|first| first.elapsed() + wait >= REPORT_AFTER)
    }

    /// Returns the wait before the next attempt, or `None` if the request must not be retried.
    fn wait_after(&mut self, error: &Error, now: Instant) -> Option<Duration> {
        if !error.is_transient() {
            return None;
        }
        let usual = self.retry.config.deadline;
        let limit = match (error.wait(), error.retry_limit()) {
            (Some(_), _) => usual.saturating_mul(REQUESTED_WAIT_DEADLINE_FACTOR),
            (None, limit) => limit.map_or(usual, |limit| limit.min(usual)),
        };
        let deadline = *self.first_failure.get_or_insert(now) + limit;
        let deadline = RETRY_DEADLINE.try_with(|end| deadline.min(*end)).unwrap_or(deadline);
        let backoff = FIRST_BACKOFF.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_MAX);
        // Full jitter: clients that failed together must not retry together.
        let jittered = backoff.mul_f64(rand::random_range(0.0..=1.0));
        // A wait that the server requested (`Retry-After`) is never shortened.
        let wait =
            error.wait().map_or(jittered, |requested| requested.saturating_add(jittered.min(Duration::from_secs(1))));
        // Fail now instead of sleeping past the deadline.
        if now.checked_add(wait).is_none_or(|end| end > deadline) {
            return None;
        }
        self.failures += 1;
        // If several requests to a host are told to wait, only the first one pays for a retry.
        let is_new =
            error.throttled_by().zip(error.wait()).is_none_or(|(host, wait)| self.retry.pauses.begin(host, wait));
        (!is_new || self.retry.spend_retry_cost()).then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn retry(deadline: Duration) -> Retry {
        Retry::new(RetryConfig { deadline, ..RetryConfig::default() })
    }

    #[tokio::test]
    async fn transient_failures_are_retried_and_others_are_not() {
        let calls = AtomicU32::new(0);
        let value = retry(Duration::from_secs(60))
            .run(|| async {
                match calls.fetch_add(1, Ordering::Relaxed) {
                    0..2 => Err(Error::unavailable("busy")),
                    _ => Ok(7),
                }
            })
            .await;
        assert_eq!(value.expect("succeeds at last"), 7);

        calls.store(0, Ordering::Relaxed);
        let failed: Result<()> = retry(Duration::from_secs(60))
            .run(|| async {
                calls.fetch_add(1, Ordering::Relaxed);
                Err(Error::not_found("gone"))
            })
            .await;
        assert!(failed.is_err());
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_wait_is_reported_once_for_many_requests() {
        let policy = retry(Duration::from_secs(60));
        let mut attempts = policy.attempts();
        let error = Error::unavailable("throttled").retry_after(Duration::from_secs(3));
        let wait = attempts.wait_after(&error, Instant::now()).expect("it is retried");
        assert!(attempts.is_worth_reporting(wait) && !attempts.is_worth_reporting(Duration::from_millis(10)));
        assert_eq!([policy.take_report_turn(), policy.clone().take_report_turn()], [true, false]);
    }

    #[test]
    fn a_wait_beyond_the_deadline_fails_at_once() {
        let policy = retry(Duration::from_secs(5));
        let error = Error::unavailable("throttled").retry_after(Duration::from_secs(60));
        assert_eq!(policy.attempts().wait_after(&error, Instant::now()), None);
    }

    #[tokio::test]
    async fn a_short_timeout_returns_the_error_of_the_server() {
        let retry = retry(Duration::from_secs(60));
        let busy =
            within(Duration::from_millis(800), retry.run(|| async { Err::<(), _>(Error::unavailable("busy")) })).await;
        assert_eq!(busy.expect("in time").expect_err("busy").message(), "busy");
        let silent = within(Duration::from_millis(800), retry.run(std::future::pending::<Result<()>>)).await;
        assert!(silent.is_none(), "the request never responds");
    }

    #[test]
    fn an_outage_spends_the_budget_and_successes_earn_it_back() {
        let policy = retry(Duration::from_secs(3600));
        let error = Error::unavailable("busy");
        let spend = |policy: &Retry| {
            (0..1000).filter(|_| policy.attempts().wait_after(&error, Instant::now()).is_some()).count()
        };
        let spent = spend(&policy);
        assert!((32..200).contains(&spent), "{spent} retries for 1000 requests");
        (0..1000).for_each(|_| drop(policy.attempts()));
        assert!(policy.attempts().wait_after(&error, Instant::now()).is_some());
    }
}
