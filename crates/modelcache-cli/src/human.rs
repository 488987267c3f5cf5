//! Formats numbers for people: sizes in decimal units, durations, ages.

pub(crate) use modelcache::human::bytes;
use std::time::{Duration, SystemTime};

/// Formats a rate in bytes per second: `2.5 MB/s`.
pub(crate) fn rate(bytes_per_second: f64) -> String {
    format!("{}/s", bytes(bytes_per_second.max(0.0) as u64))
}

/// Formats a count with its noun: `1 artifact`, `3 artifacts`.
pub(crate) fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Formats a duration in one unit below a minute, and else in its two largest units: `0.4 ms`, `3.4 s`, `2 min 5 s`,
/// `1 h 3 min`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let whole = seconds.round() as u64;
    match seconds {
        s if s < 0.01 => format!("{:.1} ms", s * 1e3),
        s if s < 0.9995 => format!("{:.0} ms", s * 1e3),
        s if s < 59.95 => format!("{s:.1} s"),
        s if s < 3599.5 => format!("{} min {} s", whole / 60, whole % 60),
        s if s < 86_399.5 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3600 % 24),
    }
}

/// Formats the whole seconds until an event: `9 s`, `2 min 5 s`.
pub(crate) fn countdown(left: Duration) -> String {
    match left.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        _ => duration(left),
    }
}

/// Formats the time since `then`, rounded down to one unit. A time in the future counts as now.
pub(crate) fn ago(then: SystemTime, now: SystemTime) -> String {
    let count = |number: u64, unit: &str| format!("{number} {unit}{} ago", if number == 1 { "" } else { "s" });
    match now.duration_since(then).unwrap_or_default().as_secs() {
        0..60 => "just now".into(),
        s @ 60..3600 => count(s / 60, "minute"),
        s @ 3600..86_400 => count(s / 3600, "hour"),
        s => count(s / 86_400, "day"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_bytes_per_second() {
        assert_eq!(rate(2_500_000.0), "2.5 MB/s");
    }

    #[test]
    fn durations_are_shown_in_their_largest_units() {
        let shown = [
            (0.0004, "0.4 ms"),
            (0.35, "350 ms"),
            (0.9996, "1.0 s"),
            (3.44, "3.4 s"),
            (59.96, "1 min 0 s"),
            (125.0, "2 min 5 s"),
            (3780.0, "1 h 3 min"),
            (86_399.8, "1 d 0 h"),
            (90_000.0, "1 d 1 h"),
        ];
        for (seconds, text) in shown {
            assert_eq!(duration(Duration::from_secs_f64(seconds)), text);
        }
    }

    #[test]
    fn a_countdown_has_no_fractions() {
        let shown = [0, 9, 59, 60, 125].map(|seconds| countdown(Duration::from_secs(seconds)));
        assert_eq!(shown, ["0 s", "9 s", "59 s", "1 min 0 s", "2 min 5 s"]);
    }

    #[test]
    fn ages_have_one_unit_and_are_never_in_the_future() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let ago = |seconds| ago(now - Duration::from_secs(seconds), now);
        assert_eq!(ago(5), "just now");
        assert_eq!(ago(60), "1 minute ago");
        assert_eq!(ago(7200), "2 hours ago");
        assert_eq!(ago(86_400 * 3), "3 days ago");
        assert_eq!(super::ago(now + Duration::from_secs(9), now), "just now");
    }
}
