//! HTTP responses of origins and of the remote: header checks, and the only reader of bodies that are kept in memory.
//!
//! # Contract
//! - [`check_headers`] rejects a response with contradictory headers or an encoded body.
//! - [`retry_after`] is the only parser of `Retry-After`.
//! - [`read_body`] is the only way to collect a body into memory. It stops at a number of bytes, at a silent or nearly
//!   stalled connection and at a deadline for the whole body. Its buffer grows with the bytes received, never with the
//!   announced length.
//! - File bodies are streamed by `part.rs`, under the same stall rule ([`StallDetector`]).

use crate::check::http_date;
use crate::error::{Error, Result};
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, StatusCode};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// A connection that delivers fewer bytes than this within one read timeout of waiting counts as stalled.
pub(crate) const STALL_BYTES: u64 = 32 << 10;
/// Maximum number of bytes of an error response's body to read. Real error messages have a few hundred.
pub(crate) const ERROR_BODY_BYTES_MAX: u64 = 64 << 10;
/// Fixed part of a body's deadline, as a number of read timeouts. [`BYTES_PER_S_MIN`] determines the rest.
const DEADLINE_READ_TIMEOUTS: u32 = 10;
/// Slowest rate that a body's deadline allows, in bytes per second: 64 s for 16 MiB, 34 min for the largest manifest.
const BYTES_PER_S_MIN: u64 = 256 << 10;
/// Upper bound on the wait that a server can request. A longer wait is shortened to it.
pub(crate) const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);
/// Time to wait for the rest of an unused body, so that its connection can be reused.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(1);

/// Limits for a body that is kept in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyLimits {
    bytes_max: u64,
    /// Longest silence, and the window of the stall rule.
    read_timeout: Duration,
    /// Longest time for the whole body.
    deadline: Duration,
}

impl BodyLimits {
    /// Returns the limits for a response of at most `bytes_max` bytes. The deadline is 10 read timeouts and one second
    /// per 256 KiB.
    pub(crate) fn metadata(bytes_max: u64, read_timeout: Duration) -> Self {
        let deadline = read_timeout * DEADLINE_READ_TIMEOUTS + Duration::from_secs(bytes_max / BYTES_PER_S_MIN);
        Self { bytes_max, read_timeout, deadline }
    }

    /// Returns the limits for a response that must be complete within `deadline`.
    pub(crate) fn within(bytes_max: u64, deadline: Duration) -> Self {
        Self { bytes_max, read_timeout: deadline, deadline }
    }

    /// Returns the limits for the body of an error response.
    pub(crate) fn error_response(read_timeout: Duration) -> Self {
        Self::within(ERROR_BODY_BYTES_MAX, read_timeout)
    }

    /// Returns the limits for the rest of a body that is discarded.
    pub(crate) fn drain() -> Self {
        Self::within(ERROR_BODY_BYTES_MAX, DRAIN_TIME_MAX)
    }
}

/// The reason why a body is incomplete.
#[derive(Debug)]
pub(crate) enum BodyError<E> {
    /// The body is longer than this limit, in bytes.
    TooLong(u64),
    /// No bytes were received for this long.
    Silent(Duration),
    /// The connection delivered fewer than [`STALL_BYTES`] in a window of waiting.
    Stalled,
    /// The body was not complete after this long.
    TooSlow(Duration),
    /// The stream failed with this error.
    Broken(E),
}

impl<E> BodyError<E> {
    /// Converts the reason into an error. `server` names the server or object in the message. `broken` converts a
    /// failure of the stream.
    pub(crate) fn into_error(self, server: impl std::fmt::Display, broken: impl FnOnce(E) -> Error) -> Error {
        match self {
            Self::TooLong(bytes_max) => {
                Error::corrupt(format!("the response of {server} has more than {bytes_max} bytes"))
            }
            Self::Silent(time) => Error::unavailable(format!("{server} sent no bytes for {} s", time.as_secs_f32())),
            Self::Stalled => Error::unavailable(format!("{server} is too slow: the connection has nearly stalled")),
            Self::TooSlow(time) => {
                Error::unavailable(format!("the response of {server} was not complete after {} s", time.as_secs_f32()))
            }
            Self::Broken(error) => broken(error),
        }
    }
}

/// Reads a body into memory as far as `limits` allow. Returns the bytes received, and the reason if the body is
/// incomplete.
pub(crate) async fn read_body<B: AsRef<[u8]>, E>(
    mut stream: impl Stream<Item = Result<B, E>> + Unpin,
    limits: BodyLimits,
) -> (Vec<u8>, Option<BodyError<E>>) {
    let (deadline, mut body) = (Instant::now() + limits.deadline, Vec::new());
    let mut stall = StallDetector::new(limits.read_timeout);
    loop {
        let wait_start = Instant::now();
        // Whichever limit expires first ends the read: silence since the last chunk, or the deadline for the whole
        // body.
        let silent_at = wait_start + limits.read_timeout;
        let chunk = match tokio::time::timeout_at(silent_at.min(deadline), stream.next()).await {
            Ok(None) => return (body, None),
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(error))) => return (body, Some(BodyError::Broken(error))),
            Err(_) if silent_at <= deadline => return (body, Some(BodyError::Silent(limits.read_timeout))),
            Err(_) => return (body, Some(BodyError::TooSlow(limits.deadline))),
        };
        let chunk = chunk.as_ref();
        // Keep the bytes up to the limit, so that the caller can still use the beginning of a body that is too long.
        let room = usize::try_from(limits.bytes_max).unwrap_or(usize::MAX) - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if chunk.len() > room {
            return (body, Some(BodyError::TooLong(limits.bytes_max)));
        }
        if stall.record(chunk.len() as u64, wait_start.elapsed()) {
            return (body, Some(BodyError::Stalled));
        }
        // A server that sends without a pause never reaches the timeout above, so check the deadline here, too.
        if Instant::now() >= deadline {
            return (body, Some(BodyError::TooSlow(limits.deadline)));
        }
    }
}

/// Detects connections that are alive but far too slow: fewer than [`STALL_BYTES`] in a window of waiting.
///
/// Only time spent waiting for the connection counts, so that a slow disk or a rate limit is not mistaken for a stall.
#[derive(Debug)]
pub(crate) struct StallDetector {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl StallDetector {
    /// Creates a detector for one connection. `window` is the waiting time after which the bytes are judged.
    pub(crate) fn new(window: Duration) -> Self {
        Self { window, waited: Duration::ZERO, bytes: 0 }
    }

    /// Records `bytes` received after waiting for `waited`. Returns true if the connection has stalled.
    pub(crate) fn record(&mut self, bytes: u64, waited: Duration) -> bool {
        (self.bytes, self.waited) = (self.bytes + bytes, self.waited + waited);
        if self.waited < self.window {
            return false;
        }
        let stalled = self.bytes < STALL_BYTES;
        *self = Self::new(self.window);
        stalled
    }
}

/// Checks the headers of a response that carries bytes of a file: the body must be the file as stored, and not longer
/// than the stated range.
///
/// # Errors
/// `Corrupt` for an encoded or compressed body, and for a `Content-Length` above the length of the `Content-Range`.
pub(crate) fn check_headers(status: StatusCode, headers: &HeaderMap) -> Result<()> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    // Some object stores return the framing of an upload (`aws-chunked`) as if it were an encoding of the object.
    let is_encoding = |encoding: &&str| !matches!(*encoding, "" | "identity" | "aws-chunked" | "chunked");
    // A compressed `Transfer-Encoding` changes the bytes as well. The HTTP client undoes only `chunked`.
    let transfer = headers.get_all("transfer-encoding").into_iter();
    let encodings = headers.get_all("content-encoding").into_iter().chain(transfer);
    let encodings = encodings.flat_map(|value| value.to_str().unwrap_or("unreadable").split(','));
    if let Some(encoding) = encodings.map(str::trim).find(is_encoding) {
        return Err(Error::corrupt(format!(
            "the server sent the file with the encoding {encoding:?}, although the request allows none"
        ))
        .hint(
            "make the server send the file without Content-Encoding: it may come from compression, from a rule for .gz \
             files, or from the metadata of the object",
        ));
    }
    let length = text("content-length").and_then(|length| length.parse::<u64>().ok());
    let range = text("content-range").and_then(content_range).filter(|_| status == StatusCode::PARTIAL_CONTENT);
    match (range, length) {
        // A shorter body is allowed: the reader counts the bytes and requests the rest.
        (Some(range), Some(length)) if range.last - range.first + 1 < length => Err(Error::corrupt(format!(
            "the server's headers contradict each other: Content-Range {}-{}, Content-Length {length}",
            range.first, range.last
        ))),
        _ => Ok(()),
    }
}

/// Returns the wait that the header `Retry-After` requests, in seconds or as a date (RFC 9110, 10.2.3). `None` for a wait
/// of 0 s and for a date in the past: the usual backoff then applies.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let value = text("retry-after").filter(|value| !value.is_empty())?;
    let wait = if value.bytes().all(|digit| digit.is_ascii_digit()) {
        value.parse().map_or(RETRY_AFTER_MAX, Duration::from_secs)
    } else {
        // The server's own clock decides, because the clock of this machine may be wrong.
        let now = text("date").and_then(http_date).unwrap_or_else(SystemTime::now);
        http_date(value)?.duration_since(now).ok()?
    };
    Some(wait.min(RETRY_AFTER_MAX)).filter(|wait| !wait.is_zero())
}

/// Returns true if the body is announced as an HTML page. In place of another kind of body, the page is usually that of
/// a login or of a proxy.
pub(crate) fn is_html(headers: &HeaderMap) -> bool {
    let kind = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.trim_start().to_ascii_lowercase().starts_with("text/html")
}

/// A parsed `Content-Range` header, such as `bytes 5-9/10`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// Offset of the first byte.
    pub(crate) first: u64,
    /// Offset of the last byte.
    pub(crate) last: u64,
    /// Size of the whole file in bytes; `None` if the header has `*`.
    pub(crate) total: Option<u64>,
}

/// Parses a `Content-Range`. Returns `None` if it is malformed or contradicts itself.
pub(crate) fn content_range(text: &str) -> Option<ContentRange> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    let fits = first <= last && last < u64::MAX && total.is_none_or(|total| last < total);
    fits.then_some(ContentRange { first, last, total })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;

    const WINDOW: Duration = Duration::from_millis(300);

    /// Reads the endless body of a server that sends `chunk` every `every_ms` milliseconds.
    async fn read_endless(chunk: &'static [u8], every_ms: u64, limits: BodyLimits) -> (usize, Option<BodyError<()>>) {
        let endless = stream::repeat(()).then(move |()| async move {
            tokio::time::sleep(Duration::from_millis(every_ms)).await;
            Ok(chunk)
        });
        let (body, cut) = read_body(Box::pin(endless), limits).await;
        (body.len(), cut)
    }

    #[tokio::test]
    async fn a_body_without_end_is_cut_by_its_size_its_rate_or_its_deadline() {
        const CHUNK: &[u8] = &[b' '; 32 << 10];
        let limits = BodyLimits::metadata(100_000, WINDOW);
        assert!(matches!(read_endless(CHUNK, 0, limits).await, (100_000, Some(BodyError::TooLong(100_000)))));
        assert!(matches!(read_endless(b"xy", 20, limits).await, (2..100, Some(BodyError::Stalled))));
        assert!(matches!(read_endless(b"x", 5_000, limits).await, (0, Some(BodyError::Silent(WINDOW)))));
        let limits = BodyLimits { deadline: WINDOW, ..BodyLimits::metadata(1 << 30, WINDOW * 2) };
        assert!(matches!(read_endless(CHUNK, 20, limits).await, (1.., Some(BodyError::TooSlow(WINDOW)))));
    }

    #[tokio::test]
    async fn a_complete_body_is_returned_unchanged() {
        let chunks = [Ok::<_, ()>(b"ab".as_slice()), Ok(b""), Ok(b"c")];
        let (body, cut) = read_body(stream::iter(chunks), BodyLimits::metadata(3, WINDOW)).await;
        assert!(cut.is_none() && body == b"abc");
        let (body, cut) =
            read_body(stream::iter([Ok(b"ab".as_slice()), Err(())]), BodyLimits::error_response(WINDOW)).await;
        assert!(matches!(cut, Some(BodyError::Broken(()))) && body == b"ab");
    }

    #[test]
    fn a_wait_is_read_as_seconds_or_as_a_date_and_bounded() {
        let wait = |rows: &[(&'static str, &str)]| {
            let row = |(name, value): &(&'static str, &str)| {
                (http::HeaderName::from_static(name), value.parse().expect("value"))
            };
            retry_after(&rows.iter().map(row).collect()).map(|wait| wait.as_secs())
        };
        assert_eq!((wait(&[("retry-after", "7")]), wait(&[("retry-after", " 7 ")])), (Some(7), Some(7)));
        assert_eq!(wait(&[("retry-after", "86401")]), Some(RETRY_AFTER_MAX.as_secs()));
        assert_eq!(wait(&[("retry-after", &"9".repeat(40))]), Some(RETRY_AFTER_MAX.as_secs()), "above 64 bits");
        let date = ("date", "Wed, 21 Oct 2015 07:28:00 GMT");
        assert_eq!(wait(&[("retry-after", "Wed, 21 Oct 2015 07:28:09 GMT"), date]), Some(9), "by the server's clock");
        assert_eq!(wait(&[("retry-after", "Wed, 21 Oct 2015 07:28:09 GMT")]), None, "in the past");
        assert_eq!(wait(&[("retry-after", "Thu, 01 Jan 2125 00:00:00 GMT")]), Some(RETRY_AFTER_MAX.as_secs()));
        for none in ["0", "", "-1", "1.5", "soon"] {
            assert_eq!(wait(&[("retry-after", none)]), None, "{none:?}");
        }
        assert_eq!(wait(&[]), None);
    }

    #[test]
    fn headers_that_contradict_each_other_or_name_an_encoding_are_refused() {
        let check = |status: u16, rows: &[(&'static str, &str)]| {
            let row = |(name, value): &(&'static str, &str)| {
                (http::HeaderName::from_static(name), value.parse().expect("value"))
            };
            let mut headers = HeaderMap::new();
            for (name, value) in rows.iter().map(row) {
                headers.append(name, value);
            }
            check_headers(StatusCode::from_u16(status).expect("status"), &headers)
        };
        let range = ("content-range", "bytes 5-8/10");
        assert!(check(206, &[range, ("content-length", "4")]).is_ok());
        assert!(check(206, &[range]).is_ok(), "chunked");
        assert!(check(206, &[range, ("content-length", "3")]).is_ok(), "it ends early");
        for length in ["5", "124"] {
            assert!(check(206, &[range, ("content-length", length)]).is_err(), "{length}");
        }
        for good in ["identity", "aws-chunked", "", "aws-chunked, identity"] {
            assert!(check(200, &[("content-encoding", good)]).is_ok(), "{good}");
        }
        for bad in ["gzip", "aws-chunked,gzip", "identity, br", "x"] {
            assert!(check(200, &[("content-encoding", bad)]).is_err(), "{bad}");
        }
        assert!(check(200, &[("content-encoding", "identity"), ("content-encoding", "gzip")]).is_err());
    }
}
