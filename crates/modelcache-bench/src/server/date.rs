//! Formats times for HTTP and for the XML of S3, both in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// A time in the Gregorian calendar.
struct Civil {
    year: u64,
    /// From 1, like the day.
    month: u64,
    day: u64,
    weekday: &'static str,
    /// Hour, minute and second.
    clock: [u64; 3],
}

impl Civil {
    /// Converts a time to the calendar. The calculation counts years from March, so that a leap day is the last day of
    /// its year (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
    fn of(time: SystemTime) -> Self {
        let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            weekday: DAYS[(days % 7) as usize],
            clock: [second / 3600, second / 60 % 60, second % 60],
        }
    }
}

/// Formats a time for an HTTP header: `Thu, 01 Jan 1970 00:00:00 GMT`.
pub(super) fn http(time: SystemTime) -> String {
    let Civil { year, month, day, weekday, clock: [hour, minute, second] } = Civil::of(time);
    let month = MONTHS[(month - 1) as usize];
    format!("{weekday}, {day:02} {month} {year} {hour:02}:{minute:02}:{second:02} GMT")
}

/// Formats a time for the XML of S3: `1970-01-01T00:00:00.000Z`.
pub(super) fn xml(time: SystemTime) -> String {
    let Civil { year, month, day, clock: [hour, minute, second], .. } = Civil::of(time);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.000Z")
}

/// Formats the day of a time: `1970-01-01`.
pub(super) fn day(time: SystemTime) -> String {
    let Civil { year, month, day, .. } = Civil::of(time);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_those_of_the_calendar() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(http(at(0)), "Thu, 01 Jan 1970 00:00:00 GMT");
        // RFC 9110's own example.
        assert_eq!(http(at(784_111_777)), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(xml(at(951_782_400)), "2000-02-29T00:00:00.000Z");
        assert_eq!(xml(at(1_767_225_599)), "2025-12-31T23:59:59.000Z");
    }
}
