//! What an operator wants to see at a glance: recent errors, and the hit rate of the last hour.

use modelcache::Error;
use modelcache::metrics::Counts;
use modelcache::mutex::Mutex;
use serde::Serialize;
use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Number of errors that are kept.
const ERRORS_MAX: usize = 50;
/// Interval and number of samples of the counters: one hour.
pub(crate) const SAMPLE_INTERVAL: Duration = Duration::from_secs(60);
const SAMPLES_MAX: usize = 61;

/// Recent errors and samples of the counters.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    errors: Mutex<VecDeque<RecentError>>,
    samples: Mutex<VecDeque<Sample>>,
}

/// An error of a request.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub(crate) struct RecentError {
    /// Time of the error, in seconds since the Unix epoch. An error that repeats has the time of the last one.
    pub(crate) at_unix: u64,
    /// What failed: a request, or a response that was cut.
    pub(crate) what: &'static str,
    /// The kind of the error.
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    /// How often the error occurred in a row.
    pub(crate) count: u64,
}

/// The counters of gets at one moment, from the start of the daemon on.
#[derive(Debug, Clone, Copy)]
struct Sample {
    hits: u64,
    misses: u64,
}

/// The gets of the last hour.
#[derive(Debug, Clone, Copy, Serialize, utoipa::ToSchema)]
pub(crate) struct LastHour {
    /// Gets that were hits on disk.
    pub(crate) hits: u64,
    /// Gets for which not all files were on disk.
    pub(crate) misses: u64,
    /// The fraction of hits; `null` without gets.
    pub(crate) hit_rate: Option<f64>,
}

impl Activity {
    pub(crate) fn record_error(&self, what: &'static str, error: &Error) {
        let at_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let message = error.to_string();
        let mut errors = self.errors.lock();
        match errors.front_mut().filter(|last| last.message == message) {
            Some(last) => (last.count, last.at_unix) = (last.count + 1, at_unix),
            None => {
                let hint = error.hint_text().map(str::to_owned);
                let code = error.kind().name();
                errors.push_front(RecentError { at_unix, what, code, message, hint, count: 1 });
                errors.truncate(ERRORS_MAX);
            }
        }
    }

    /// Returns the recent errors, the last one first.
    pub(crate) fn errors(&self) -> Vec<RecentError> {
        self.errors.lock().iter().cloned().collect()
    }

    /// Takes a sample of the counters. Called once in each [`SAMPLE_INTERVAL`].
    pub(crate) fn sample(&self, counts: &Counts) {
        let mut samples = self.samples.lock();
        samples.push_back(Sample { hits: counts.hits.disk, misses: counts.misses });
        while samples.len() > SAMPLES_MAX {
            samples.pop_front();
        }
    }

    /// Returns the gets since the oldest sample.
    pub(crate) fn last_hour(&self, counts: &Counts) -> LastHour {
        let oldest = self.samples.lock().front().copied().unwrap_or(Sample { hits: 0, misses: 0 });
        let (hits, misses) =
            (counts.hits.disk.saturating_sub(oldest.hits), counts.misses.saturating_sub(oldest.misses));
        let gets = hits + misses;
        LastHour { hits, misses, hit_rate: (gets > 0).then(|| hits as f64 / gets as f64) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_errors_are_counted_and_old_ones_dropped() {
        let activity = Activity::default();
        for number in 0..60 {
            activity.record_error("request", &Error::unavailable(format!("error {number}")));
        }
        activity.record_error("request", &Error::unavailable("error 59"));
        let errors = activity.errors();
        assert_eq!((errors.len(), errors[0].count, errors[0].message.as_str()), (ERRORS_MAX, 2, "error 59"));
    }

    #[test]
    fn the_hit_rate_is_that_of_the_last_hour() {
        let (activity, mut counts) = (Activity::default(), Counts::default());
        assert_eq!(activity.last_hour(&counts).hit_rate, None);
        for minute in 0..100 {
            (counts.hits.disk, counts.misses) = (minute, 100);
            activity.sample(&counts);
        }
        counts.hits.disk += 1;
        let hour = activity.last_hour(&counts);
        assert_eq!((hour.hits, hour.misses, hour.hit_rate), (61, 0, Some(1.0)));
    }
}
