//! Conditional and range requests for a file (RFC 9110, sections 13 and 14).

use axum::http::header::{IF_NONE_MATCH, IF_RANGE, RANGE};
use axum::http::{HeaderMap, HeaderName};
use std::ops::Range;

/// What the headers of a request ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Requested {
    /// The whole file: 200.
    Whole,
    /// A part of it, in bytes: 206. `open_ended` is true if the client asked for the rest of the file (`bytes=10-`).
    Part { range: Range<u64>, open_ended: bool },
    /// Nothing, because the client has the file: 304.
    NotModified,
    /// A range outside the file: 416.
    Unsatisfiable,
}

/// Returns what the headers ask for. `etag` is the strong entity tag of the file with its quotes, if it has one.
///
/// A malformed range, a unit other than bytes and more than one range are answered with the whole file, as the RFC
/// allows.
pub(crate) fn requested(headers: &HeaderMap, size: u64, etag: Option<&str>) -> Requested {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if let (Some(known), Some(etag)) = (text(IF_NONE_MATCH), etag)
        && known.split(',').map(str::trim).any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
    {
        return Requested::NotModified;
    }
    // A client that has another version of the file cannot use a range of this one.
    let is_same = text(IF_RANGE).is_none_or(|tag| Some(tag.trim()) == etag);
    let range = text(RANGE).filter(|_| is_same).and_then(|text| text.trim().strip_prefix("bytes="));
    range.and_then(|range| parse(range.trim(), size)).unwrap_or(Requested::Whole)
}

/// Parses `first-last`, `first-` or `-suffix`. Returns `None` if the range is malformed.
fn parse(text: &str, size: u64) -> Option<Requested> {
    let (first, last) = text.split_once('-')?;
    let number = |text: &str| -> Option<u64> {
        match text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
            // A number that does not fit lies outside every file.
            true => Some(text.parse().unwrap_or(u64::MAX)),
            false => None,
        }
    };
    let (range, open_ended) = match (first, last) {
        ("", suffix) => {
            let suffix = number(suffix)?;
            (size.saturating_sub(suffix)..size, false)
        }
        (first, "") => (number(first)?..size, true),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return None;
            }
            (first..last.saturating_add(1).min(size), false)
        }
    };
    match range.start < range.end {
        true => Some(Requested::Part { range, open_ended }),
        false => Some(Requested::Unsatisfiable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn of(pairs: &[(HeaderName, &'static str)]) -> Requested {
        let headers = pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
        requested(&headers, 100, Some("\"e\""))
    }

    fn part(range: Range<u64>, open_ended: bool) -> Requested {
        Requested::Part { range, open_ended }
    }

    #[test]
    fn single_ranges_are_parsed() {
        for (text, expected) in [
            ("bytes=0-0", part(0..1, false)),
            ("bytes=10-19", part(10..20, false)),
            ("bytes=10-", part(10..100, true)),
            ("bytes=90-1000", part(90..100, false)),
            ("bytes=-10", part(90..100, false)),
            ("bytes=-1000", part(0..100, false)),
            ("bytes=100-", Requested::Unsatisfiable),
            ("bytes=-0", Requested::Unsatisfiable),
            ("bytes=18446744073709551616-", Requested::Unsatisfiable),
            ("bytes=9-8", Requested::Whole),
            ("bytes=1-2,4-5", Requested::Whole),
            ("bytes=+1-2", Requested::Whole),
            ("lines=1-2", Requested::Whole),
            ("bytes=", Requested::Whole),
        ] {
            assert_eq!(of(&[(RANGE, text)]), expected, "{text}");
        }
    }

    #[test]
    fn conditions_are_evaluated_before_ranges() {
        assert_eq!(of(&[(IF_NONE_MATCH, "\"x\", W/\"e\""), (RANGE, "bytes=0-0")]), Requested::NotModified);
        assert_eq!(of(&[(IF_NONE_MATCH, "*")]), Requested::NotModified);
        assert_eq!(of(&[(IF_NONE_MATCH, "\"x\""), (RANGE, "bytes=0-0")]), part(0..1, false));
        assert_eq!(of(&[(IF_RANGE, "\"e\""), (RANGE, "bytes=5-")]), part(5..100, true));
        assert_eq!(of(&[(IF_RANGE, "\"old\""), (RANGE, "bytes=5-")]), Requested::Whole);
        assert_eq!(of(&[(IF_RANGE, "W/\"e\""), (RANGE, "bytes=5-")]), Requested::Whole);
    }

    #[test]
    fn an_empty_file_has_no_range() {
        let headers = HeaderMap::from_iter([(RANGE, HeaderValue::from_static("bytes=0-0"))]);
        assert_eq!(requested(&headers, 0, None), Requested::Unsatisfiable);
        assert_eq!(requested(&HeaderMap::new(), 0, None), Requested::Whole);
    }
}
