//! Parses the `Range` header; single ranges only.
//!
//! Follows RFC 9110 section 14: a header that cannot be parsed is ignored and the whole content is served; a valid
//! range beyond the end is unsatisfiable. A header with several ranges counts as one that cannot be parsed.

use std::ops::Range;

/// The part of a content that a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RequestedRange {
    Whole,
    Part(Range<u64>),
    Unsatisfiable,
}

/// Parses a `Range` header for a content of `len` bytes.
pub(crate) fn parse_range(header: Option<&str>, len: u64) -> RequestedRange {
    let Some(spec) = header.and_then(|header| header.trim().strip_prefix("bytes=")) else {
        return RequestedRange::Whole;
    };
    let Some((first, last)) = spec.split_once('-') else {
        return RequestedRange::Whole;
    };
    let part = match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(len),
        (Ok(first), Err(_)) if last.trim().is_empty() => first..len,
        (Err(_), Ok(suffix)) if first.trim().is_empty() => len - suffix.min(len)..len,
        _ => return RequestedRange::Whole,
    };
    if part.is_empty() { RequestedRange::Unsatisfiable } else { RequestedRange::Part(part) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_rfc_9110() {
        let cases = [
            ("bytes=0-0", 10, RequestedRange::Part(0..1)),
            ("bytes=2-4", 10, RequestedRange::Part(2..5)),
            ("bytes=2-", 10, RequestedRange::Part(2..10)),
            ("bytes=2-99", 10, RequestedRange::Part(2..10)),
            ("bytes=-3", 10, RequestedRange::Part(7..10)),
            ("bytes=-99", 10, RequestedRange::Part(0..10)),
            ("bytes=-0", 10, RequestedRange::Unsatisfiable),
            ("bytes=10-", 10, RequestedRange::Unsatisfiable),
            ("bytes=0-0", 0, RequestedRange::Unsatisfiable),
            ("bytes=10-12", 10, RequestedRange::Unsatisfiable),
            ("bytes=4-2", 10, RequestedRange::Whole),
            ("bytes=20-12", 10, RequestedRange::Whole),
            ("bytes=10-x", 10, RequestedRange::Whole),
            ("bytes=0-1,4-5", 10, RequestedRange::Whole),
            ("lines=0-1", 10, RequestedRange::Whole),
        ];
        for (header, len, want) in cases {
            assert_eq!(parse_range(Some(header), len), want, "{header} of {len}");
        }
        assert_eq!(parse_range(None, 10), RequestedRange::Whole);
    }
}
