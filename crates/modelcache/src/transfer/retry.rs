//! Trying again: exponential backoff with full jitter, a deadline, and a budget shared by all requests.
//!
//! Only failures marked transient are tried again. The budget keeps retries from multiplying an outage: they may be a
//! tenth of all requests, and a few more so that a quiet process can retry at all. Nothing here is stacked on another
//! retry loop: sources do not retry what the pour retries.

use crate::config::RetryConfig;
use crate::error::{Error, Result};
use std::future::Future;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// First backoff, before jitter; doubles with each attempt.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// Longest backoff, before jitter.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Tokens a request earns; a retry costs [`RETRY_COST`].
const REQUEST_EARNS: i64 = 1;
/// Tokens a retry costs: retries stay within a tenth of all requests.
const RETRY_COST: i64 = 10;
/// Tokens at the start and at most: what a quiet process may spend at once (32 retries).
const TOKENS_MAX: i64 = 320;
/// A request that has failed for this long is spoken of.
const TELL_AFTER: Duration = Duration::from_secs(2);
/// Time between two such lines.
const TELL_EVERY: Duration = Duration::from_secs(5);

tokio::task_local! {
    /// Until when a request may be tried again, for a caller who loses patience soon after.
    static PATIENCE: Instant;
}

/// Runs `work` for at most `limit`; `None` when that is over. Requests in it are not tried again when no time is left for
/// an answer, so that what a failing server said comes back, rather than that time ran out.
pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let end = Instant::now() + limit;
    tokio::time::timeout_at(end, PATIENCE.scope(end - limit / 8, work)).await.ok()
}

/// How to try again; clones share one budget.
#[derive(Debug, Clone)]
pub struct Retry {
    config: RetryConfig,
    tokens: Arc<AtomicI64>,
    /// When somebody was last told what is waited for.
    told: Arc<Mutex<Option<Instant>>>,
}

/// One request's attempts so far.
#[derive(Debug)]
pub struct Attempts {
    retry: Retry,
    first_failure: Option<Instant>,
    failures: u32,
}

impl Retry {
    /// A policy with a full budget.
    pub fn new(config: RetryConfig) -> Self {
        Self { config, tokens: Arc::new(AtomicI64::new(TOKENS_MAX)), told: Arc::default() }
    }

    /// Longest silence of a server that is waited for.
    pub fn read_timeout(&self) -> Duration {
        self.config.read_timeout
    }

    /// Starts counting the attempts of one request.
    pub fn attempts(&self) -> Attempts {
        let earn = |tokens: i64| Some((tokens + REQUEST_EARNS).min(TOKENS_MAX));
        let _ = self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, earn);
        Attempts { retry: self.clone(), first_failure: None, failures: 0 }
    }

    /// Whether a request may be sent beside one that is under way, for the same bytes; it costs what a retry does.
    pub(crate) fn may_hedge(&self) -> bool {
        self.pay()
    }

    fn pay(&self) -> bool {
        let pay = |tokens: i64| (tokens >= RETRY_COST).then_some(tokens - RETRY_COST);
        self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay).is_ok()
    }

    /// Whether it is time to say again what is waited for: many requests meet with the same trouble.
    fn may_tell(&self) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let due = told.is_none_or(|last| last.elapsed() >= TELL_EVERY);
        if due {
            *told = Some(Instant::now());
        }
        due
    }

    /// Runs `request` until it succeeds, fails for good, or the deadline or budget is spent.
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
    /// Sleeps before the next attempt, or gives `error` back when there shall be none.
    pub async fn pause(&mut self, error: Error) -> Result<()> {
        let Some(wait) = self.wait_after(&error, Instant::now()) else { return Err(error) };
        if (error.wait().is_some() || self.is_long(wait)) && self.retry.may_tell() {
            tracing::info!(%error, wait_s = wait.as_secs_f32().ceil(), attempt = self.failures, "waiting before another try");
        } else {
            tracing::debug!(%error, wait_ms = wait.as_millis() as u64, attempt = self.failures, "trying again");
        }
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Whether somebody who watches should know what is waited for.
    fn is_long(&self, wait: Duration) -> bool {
        self.first_failure.is_some_and(|first| first.elapsed() + wait >= TELL_AFTER)
    }

    fn wait_after(&mut self, error: &Error, now: Instant) -> Option<Duration> {
        if !error.is_transient() {
            return None;
        }
        let deadline = *self.first_failure.get_or_insert(now) + self.retry.config.deadline;
        let deadline = PATIENCE.try_with(|end| deadline.min(*end)).unwrap_or(deadline);
        let backoff = FIRST_BACKOFF.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_MAX);
        let jittered = backoff.mul_f64(rand::random_range(0.0..=1.0));
        let wait = error.wait().map_or(jittered, |asked| asked.saturating_add(jittered.min(Duration::from_secs(1))));
        if now.checked_add(wait).is_none_or(|then| then > deadline) {
            return None;
        }
        self.failures += 1;
        self.retry.pay().then_some(wait)
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
    async fn transient_failures_are_tried_again_and_others_are_not() {
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
    fn what_is_waited_for_is_told_once_for_many_requests() {
        let policy = retry(Duration::from_secs(60));
        let mut attempts = policy.attempts();
        let error = Error::unavailable("throttled").retry_after(Duration::from_secs(3));
        let wait = attempts.wait_after(&error, Instant::now()).expect("it is tried again");
        assert!(attempts.is_long(wait) && !attempts.is_long(Duration::from_millis(10)));
        assert_eq!([policy.may_tell(), policy.clone().may_tell()], [true, false]);
    }

    #[test]
    fn a_wait_beyond_the_deadline_fails_at_once() {
        let policy = retry(Duration::from_secs(5));
        let error = Error::unavailable("throttled").retry_after(Duration::from_secs(60));
        assert_eq!(policy.attempts().wait_after(&error, Instant::now()), None);
    }

    #[tokio::test]
    async fn an_impatient_caller_gets_the_servers_answer_and_no_silence() {
        let retry = retry(Duration::from_secs(60));
        let busy =
            within(Duration::from_millis(800), retry.run(|| async { Err::<(), _>(Error::unavailable("busy")) })).await;
        assert_eq!(busy.expect("in time").expect_err("busy").message(), "busy");
        let silent = within(Duration::from_millis(800), retry.run(std::future::pending::<Result<()>>)).await;
        assert!(silent.is_none(), "silence is cut short");
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
