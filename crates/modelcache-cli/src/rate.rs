//! The rate of a transfer and the time that is left, from samples of its bytes.

use std::time::{Duration, Instant};

/// Time constant of the moving average, in seconds.
const TIME_CONSTANT_S: f64 = 5.0;
/// Longest time left that is a useful estimate, in seconds.
const TIME_LEFT_MAX_S: f64 = 1e7;

/// Computes the rate of a transfer from successive samples.
#[derive(Debug, Default)]
pub(crate) struct RateMeter {
    last: Option<(Instant, u64)>,
    bytes_per_second: Option<f64>,
}

impl RateMeter {
    /// Takes a sample, and returns the average rate in bytes per second; `None` until bytes have moved. It is an
    /// exponential moving average over time, so that it does not depend on the sampling interval.
    pub(crate) fn sample(&mut self, now: Instant, done_bytes: u64) -> Option<f64> {
        if let Some((then, before)) = self.last.replace((now, done_bytes)) {
            let seconds = now.duration_since(then).as_secs_f64();
            let current = done_bytes.saturating_sub(before) as f64 / seconds;
            self.bytes_per_second = match self.bytes_per_second {
                rate if seconds <= 0.0 => rate,
                None if current == 0.0 => None,
                None => Some(current),
                Some(rate) => Some(current + (rate - current) * (-seconds / TIME_CONSTANT_S).exp()),
            };
        }
        self.bytes_per_second
    }
}

/// Returns the time that the rest of a transfer takes at the current rate, in whole seconds. Returns `None` without a
/// rate, or if the time is too long to be a useful estimate.
pub(crate) fn time_left(done_bytes: u64, total_bytes: u64, bytes_per_second: Option<f64>) -> Option<Duration> {
    let seconds = (total_bytes.saturating_sub(done_bytes) as f64 / bytes_per_second?).ceil();
    (seconds < TIME_LEFT_MAX_S).then(|| Duration::from_secs(seconds as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_bytes_do_not_make_a_negative_rate() {
        let (start, mut meter) = (Instant::now(), RateMeter::default());
        assert_eq!(meter.sample(start, 50), None);
        assert_eq!(meter.sample(start + Duration::from_secs(1), 20), None);
        assert_eq!(meter.sample(start + Duration::from_secs(2), 120), Some(100.0));
    }

    #[test]
    fn a_transfer_that_stopped_has_no_time_left() {
        assert_eq!(time_left(0, 100, None), None);
        assert_eq!(time_left(0, 100, Some(0.0)), None);
        assert_eq!(time_left(100, 100, Some(0.0)), None);
        assert_eq!(time_left(0, 101, Some(100.0)), Some(Duration::from_secs(2)));
    }
}
