//! Runs the doctor for `GET /cache/doctor` and remembers its report, because a run asks every tier.

use axum::http::StatusCode;
use futures::future::BoxFuture;
use modelcache::mutex::Mutex;
use serde_json::{Value, json};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::error::{ApiError, ApiResult};

/// Age up to which a report is used again, unless the request says otherwise.
pub(crate) const MAX_AGE: Duration = Duration::from_secs(300);
/// Largest age that a request may name.
pub(crate) const MAX_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Age up to which a report is used again in any case, so that requests cannot keep the doctor running.
pub(crate) const MAX_AGE_MIN: Duration = Duration::from_secs(5);

/// The doctor of the front end, which knows the settings and where they come from. Returns its report, as
/// `modelcache doctor --json` prints it.
#[derive(Clone)]
pub struct DoctorRun(Arc<dyn Fn() -> BoxFuture<'static, Value> + Send + Sync>);

impl DoctorRun {
    /// Creates a doctor from a function that runs it.
    pub fn new<F: Future<Output = Value> + Send + 'static>(run: impl Fn() -> F + Send + Sync + 'static) -> Self {
        Self(Arc::new(move || Box::pin(run())))
    }
}

impl fmt::Debug for DoctorRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DoctorRun")
    }
}

/// The doctor and its last report.
#[derive(Debug, Default)]
pub(crate) struct Doctor {
    run: Option<DoctorRun>,
    last: Mutex<Option<(Instant, Value)>>,
    /// Held during a run, so that there is only one at a time.
    running: tokio::sync::Mutex<()>,
}

impl Doctor {
    pub(crate) fn new(run: Option<DoctorRun>) -> Self {
        Self { run, ..Self::default() }
    }

    /// Returns the last report, if the doctor has run.
    pub(crate) fn last(&self) -> Option<Value> {
        self.last.lock().as_ref().map(|(_, report)| report.clone())
    }

    /// Returns the last report if its run began at most `max_age` ago; otherwise runs the doctor. A request that
    /// arrives during a run waits for the end of that run. It gets the report of that run if the run began at most
    /// `max_age` before the request, and the report of a later run otherwise.
    ///
    /// # Errors
    /// 404 if the front end handed in no doctor.
    pub(crate) async fn report(&self, max_age: Duration) -> ApiResult<Value> {
        let Some(DoctorRun(run)) = &self.run else {
            let hint = "run `modelcache doctor` on its machine";
            return Err(ApiError::new(StatusCode::NOT_FOUND, "this daemon was started without a doctor", hint));
        };
        let oldest = Instant::now().checked_sub(max_age);
        let _running = self.running.lock().await;
        let is_recent = |at: &Instant| oldest.is_none_or(|oldest| *at >= oldest);
        if let Some((_, report)) = self.last.lock().as_ref().filter(|(at, _)| is_recent(at)) {
            return Ok(report.clone());
        }
        let at = Instant::now();
        let mut report = run().await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        report["at_unix"] = json!(now.as_secs());
        *self.last.lock() = Some((at, report.clone()));
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[tokio::test]
    async fn requests_at_the_same_time_share_one_run_and_later_ones_its_report() {
        let runs = Arc::new(AtomicU64::new(0));
        let counter = runs.clone();
        let doctor = Doctor::new(Some(DoctorRun::new(move || {
            let run = counter.fetch_add(1, Ordering::Relaxed) + 1;
            async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                json!({ "run": run })
            }
        })));
        assert_eq!(doctor.last(), None);
        let (first, second) = tokio::join!(doctor.report(MAX_AGE), doctor.report(MAX_AGE));
        assert_eq!(
            (first.expect("report")["run"].clone(), second.expect("report")["run"].clone()),
            (json!(1), json!(1))
        );
        assert_eq!(doctor.report(MAX_AGE).await.expect("report")["run"], 1);
        assert_eq!(doctor.report(Duration::ZERO).await.expect("report")["run"], 2);
        assert_eq!(runs.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_daemon_without_a_doctor_says_so() {
        let refused = Doctor::default().report(MAX_AGE).await.expect_err("no doctor");
        assert_eq!(refused.status, StatusCode::NOT_FOUND);
    }
}
