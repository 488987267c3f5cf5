//! Parsers for sizes, durations and switches.

use crate::config::ByteBound;
use crate::error::{Error, Result};
use std::time::Duration;

/// The values that [`parse_size`] accepts, for documentation and hints.
pub(super) const SIZE_ACCEPTS: &str = "14GB, 1.5TiB, 80% of the filesystem, or a number of bytes";
/// The values that [`parse_duration`] accepts, for documentation and hints.
pub(super) const DURATION_ACCEPTS: &str = "for example 500ms, 30s, 1.5m, 1h30m, 7d, or a number of seconds";
/// The values that [`parse_switch`] accepts, for documentation and hints.
pub(super) const SWITCH_ACCEPTS: &str = "1, true, yes or on; 0, false, no or off";

/// Maximum number of digits after the decimal point of a size. For a size in terabytes, the twelfth digit counts single
/// bytes.
const FRACTION_DIGITS_MAX: usize = 12;

/// Parses a size: a number of bytes, a number with a unit, or a whole percentage.
///
/// Accepts the units of the SI (`kB`, `MB`, …) and of the IEC (`KiB`, `MiB`, …), in upper or lower case, with or
/// without the `B`, as in quantities of Kubernetes.
pub fn parse_size(text: &str) -> Result<ByteBound> {
    let refuse = || Error::invalid("not a size");
    let text = text.trim();
    if let Some(percent) = text.strip_suffix('%') {
        return match percent.trim().parse() {
            Ok(percent @ 0..=100) => Ok(ByteBound::Percent(percent)),
            _ => Err(Error::invalid("not a whole percentage between 0% and 100%")),
        };
    }
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()));
    let unit = unit.trim().to_ascii_lowercase();
    let unit = match unit.strip_suffix('b').unwrap_or(&unit) {
        "" => 1,
        "k" => 1000,
        "m" => 1000_u128.pow(2),
        "g" => 1000_u128.pow(3),
        "t" => 1000_u128.pow(4),
        "p" => 1000_u128.pow(5),
        "ki" => 1024,
        "mi" => 1024_u128.pow(2),
        "gi" => 1024_u128.pow(3),
        "ti" => 1024_u128.pow(4),
        "pi" => 1024_u128.pow(5),
        _ => return Err(refuse()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > FRACTION_DIGITS_MAX || (whole.is_empty() && fraction.is_empty()) {
        return Err(refuse());
    }
    let digits = |digits: &str| if digits.is_empty() { Ok(0) } else { digits.parse::<u64>().map(u128::from) };
    let whole = digits(whole).map_err(|_| refuse())? * unit;
    let fraction = digits(fraction).map_err(|_| refuse())? * unit / 10_u128.pow(fraction.len() as u32);
    u64::try_from(whole + fraction).map(ByteBound::Bytes).map_err(|_| Error::invalid("too large"))
}

/// Parses a switch. See [`SWITCH_ACCEPTS`]. Accepts `y` and `n`, too, because the client of the object store does.
pub(crate) fn parse_switch(text: &str) -> Result<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "y" | "on" => Ok(true),
        "0" | "false" | "no" | "n" | "off" => Ok(false),
        _ => Err(Error::invalid("neither on nor off")),
    }
}

/// Parses an age or a lifetime, which may be days as well as seconds: as [`parse_duration`], but a number needs a unit.
pub fn parse_lifetime(text: &str) -> Result<Duration> {
    let number = text.trim();
    if number.parse::<f64>().is_ok() {
        return Err(Error::invalid("a number without a unit")
            .hint(format!("write {number}d for days, {number}h for hours, or {number}s for seconds")));
    }
    parse_duration(text)
}

/// Parses a duration: a number of seconds, or numbers with units such as `ms`, `s`, `sec`, `minutes`, `h`, `days`.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let refuse = || Error::invalid("not a duration").hint(format!("accepted: {DURATION_ACCEPTS}"));
    let mut rest = text.trim();
    let mut seconds = 0.0;
    if rest.is_empty() {
        return Err(refuse());
    }
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len()));
        let tail = tail.trim_start();
        let (unit, tail) = tail.split_at(tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len()));
        let unit_seconds = match unit {
            "ms" => 0.001,
            "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
            // A number without a unit must be the whole text.
            "" if number.len() == text.trim().len() => 1.0,
            "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
            "h" | "hr" | "hrs" | "hour" | "hours" => 3600.0,
            "d" | "day" | "days" => 86_400.0,
            "w" | "week" | "weeks" => 604_800.0,
            _ => return Err(refuse()),
        };
        seconds += number.parse::<f64>().map_err(|_| refuse())? * unit_seconds;
        rest = tail.trim_start();
    }
    // Round to microseconds, because binary fractions add spurious nanoseconds.
    Duration::try_from_secs_f64(seconds)
        .map(|duration| Duration::from_micros(u64::try_from((duration.as_nanos() + 500) / 1000).unwrap_or(u64::MAX)))
        .map_err(|_| refuse())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_accepted_in_common_notations() {
        let bytes = |text: &str| match parse_size(text) {
            Ok(ByteBound::Bytes(bytes)) => Some(bytes),
            _ => None,
        };
        assert_eq!(bytes("14GB"), Some(14_000_000_000));
        assert_eq!(bytes("1.5TiB"), Some(1_649_267_441_664));
        assert_eq!(bytes("1.5 tib"), Some(1_649_267_441_664));
        assert_eq!(bytes("10Gi"), Some(10 << 30));
        assert_eq!(bytes("500M"), Some(500_000_000));
        assert_eq!(bytes("12"), Some(12));
        assert_eq!(bytes("12B"), Some(12));
        assert_eq!(bytes("18446744073709551615"), Some(u64::MAX));
        assert_eq!(parse_size("80%").expect("size"), ByteBound::Percent(80));
        for bad in ["", "GB", ".", "-1", "1.2.3GB", "1e3", "99999999PB", "1GBit", "80.5%", "%", "256%", "٣GB"] {
            assert!(parse_size(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn durations_are_accepted_in_common_notations() {
        let seconds = |text: &str| parse_duration(text).ok().map(|duration| duration.as_secs_f64());
        assert_eq!(seconds("60s"), Some(60.0));
        assert_eq!(seconds("500ms"), Some(0.5));
        assert_eq!(seconds("1h30m"), Some(5400.0));
        assert_eq!(seconds("1h 30m"), Some(5400.0));
        assert_eq!(seconds("1.5m"), Some(90.0));
        for week in ["7d", "7days", "7 days", "1w", "168 hours"] {
            assert_eq!(seconds(week), Some(604_800.0), "{week}");
        }
        assert_eq!(seconds("90"), Some(90.0));
        assert_eq!(seconds("0.1s"), Some(0.1));
        for bad in ["", "s", "-1s", "1h30", "1 fortnight", "1..5s", "1e400s", &"9".repeat(400)] {
            assert!(parse_duration(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn an_age_needs_a_unit() {
        assert_eq!(parse_lifetime("7days").ok(), Some(Duration::from_secs(604_800)));
        assert_eq!(parse_lifetime("0s").ok(), Some(Duration::ZERO));
        for number in ["7", " 7 ", "0", "1.5"] {
            let error = parse_lifetime(number).expect_err("no unit");
            assert!(error.hint_text().is_some_and(|hint| hint.contains(&format!("{}d", number.trim()))), "{number}");
        }
    }
}
