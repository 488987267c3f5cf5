//! Compares the local clock with the `Date` header of servers.
//!
//! S3 refuses signatures that are more than 15 minutes off. A claim on the remote carries the time at which it expires,
//! by the clock of its writer, and other writers compare that time with their own clocks.

use super::{Area, Check};
use crate::error::{Error, ErrorKind};
use crate::mutex::Mutex;
use std::time::{Duration, SystemTime};

/// A difference above this is a warning. It is half of the lifetime of a claim.
const WARN_ABOVE: Duration = Duration::from_secs(30);
/// A difference above this is a problem: claims expire far too early or too late, and S3 will soon refuse signatures.
const PROBLEM_ABOVE: Duration = Duration::from_secs(300);

/// The servers that sent a date, and the number of seconds that the local clock is ahead of each.
#[derive(Debug, Default)]
pub struct Clock(Mutex<Vec<(String, i64)>>);

impl Clock {
    /// Compares the `Date` header of a response that was just received with the local clock.
    pub fn learn(&self, server: &str, date: Option<&str>) {
        let Some(theirs) = date.and_then(http_date) else { return };
        let ours = SystemTime::now();
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        let ahead = match ours.duration_since(theirs) {
            Ok(ahead) => seconds(ahead),
            Err(behind) => -seconds(behind.duration()),
        };
        self.0.lock().push((server.to_owned(), ahead));
    }

    /// Returns the result for the largest difference, or `None` if no server sent a date.
    pub(crate) fn check(&self) -> Option<Check> {
        let differences = self.0.lock();
        let (server, ahead) = differences.iter().max_by_key(|(_, ahead)| ahead.unsigned_abs())?;
        let difference = Duration::from_secs(ahead.unsigned_abs());
        let direction = if *ahead < 0 { "behind" } else { "ahead of" };
        let message = format!("this machine's clock is {} s {direction} that of {server}", difference.as_secs());
        let fix = "set the clock (NTP); requests to S3 are signed with the time";
        Some(match difference {
            _ if difference > PROBLEM_ABOVE => {
                Check::problem(Area::Clock, &Error::new(ErrorKind::Unauthorized, message).hint(fix))
            }
            _ if difference > WARN_ABOVE => Check::warning(Area::Clock, message, fix),
            _ => Check::ok(Area::Clock, format!("agrees with {server}")),
        })
    }
}

/// Parses a date such as `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7). The obsolete formats are not supported.
pub(crate) fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, day, month, year, time, "GMT"] = fields[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    humantime::parse_rfc3339(&format!("{year}-{month:02}-{day}T{time}Z")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Severity;

    #[test]
    fn http_dates_are_parsed() {
        let seconds =
            |text| http_date(text).map(|time| time.duration_since(SystemTime::UNIX_EPOCH).expect("late").as_secs());
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        for bad in ["", "yesterday", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 CET"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_largest_difference_determines_the_gravity() {
        let severity = |rows: &[i64]| {
            let clock = Clock::default();
            rows.iter().for_each(|ahead| clock.0.lock().push(("s".into(), *ahead)));
            clock.check().map(|check| check.severity)
        };
        assert_eq!(severity(&[]), None);
        assert_eq!(severity(&[1, -2]), Some(Severity::Ok));
        assert_eq!(severity(&[1, -40]), Some(Severity::Warning));
        assert_eq!(severity(&[400, 0]), Some(Severity::Problem));
    }
}
