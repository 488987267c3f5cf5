//! Answers that carry file content: ranges, streaming and the faults of a body.
//!
//! Content is read one chunk at a time as the client takes it, so a file of any size costs one chunk of memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, RANGE};
use hyper::{Method, Response, StatusCode};

use super::Shared;
use super::fault::Kind;
use crate::content::{CHUNK, Content};
use crate::range::{RequestedRange, parse_range};
use crate::serve::{Answer, Body, BoxError, Dropped, full};

/// Pause before a body is cut short. Hyper may discard its write buffer when a body ends before `Content-Length`; the
/// pause lets it send the buffered bytes first.
const CUT_GRACE: Duration = Duration::from_millis(30);

/// Serves `content`, or the range that the headers ask for. Faults of the body apply if they match `subject`, the path
/// of the resolve URL.
pub(super) fn content(
    shared: &Arc<Shared>,
    subject: &str,
    content: &Content,
    method: &Method,
    headers: &HeaderMap,
) -> Answer {
    let range_header = headers.get(RANGE).and_then(|value| value.to_str().ok());
    let take_fault = |accepts: fn(&Kind) -> bool| shared.faults.take(method.as_str(), subject, accepts);
    let ignore_range = range_header.is_some() && take_fault(|kind| matches!(kind, Kind::IgnoreRange)).is_some();
    let len = content.len();
    let (status, mut range) = match parse_range(range_header.filter(|_| !ignore_range), len) {
        RequestedRange::Whole => (StatusCode::OK, 0..len),
        RequestedRange::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        RequestedRange::Unsatisfiable => return unsatisfiable(len),
    };
    let content_range = format!("bytes {}-{}/{len}", range.start, range.end.saturating_sub(1));

    let mut faults = BodyFaults::default();
    if method == Method::GET {
        // `Short` changes the range before `Content-Length` is computed, so the answer is consistent in itself.
        if let Some(Kind::Short(by)) = take_fault(|kind| matches!(kind, Kind::Short(_))) {
            range.end = range.end.saturating_sub(by).max(range.start);
        }
        faults = BodyFaults::from_faults(shared, subject, &range);
    }
    let length = range.end - range.start;
    let body = if method == Method::HEAD { full(Bytes::new()) } else { stream_body(shared, content, range, faults) };

    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_LENGTH, length.into());
    headers.insert(CONTENT_TYPE, "application/octet-stream".parse().expect("a content type is a header value"));
    if !ignore_range {
        headers.insert(ACCEPT_RANGES, "bytes".parse().expect("a word is a header value"));
    }
    if status == StatusCode::PARTIAL_CONTENT {
        headers.insert(CONTENT_RANGE, content_range.parse().expect("digits are a header value"));
    }
    answer
}

fn unsatisfiable(len: u64) -> Answer {
    let mut answer = Response::new(full(Bytes::new()));
    *answer.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
    answer.headers_mut().insert(CONTENT_LENGTH, 0.into());
    answer.headers_mut().insert(CONTENT_RANGE, format!("bytes */{len}").parse().expect("digits are a header value"));
    answer
}

/// The faults of one body. Positions are offsets in the file.
#[derive(Debug, Default)]
struct BodyFaults {
    flip: Option<u64>,
    cut: Option<u64>,
    stall: Option<(u64, Duration)>,
}

impl BodyFaults {
    fn from_faults(shared: &Shared, subject: &str, range: &Range<u64>) -> Self {
        let take_fault = |accepts: &dyn Fn(&Kind) -> bool| shared.faults.take("GET", subject, accepts);
        let mut faults = Self::default();
        if let Some(Kind::Flip(at)) = take_fault(&|kind| matches!(kind, Kind::Flip(at) if range.contains(at))) {
            faults.flip = Some(at);
        }
        let size = range.end - range.start;
        // Faults that need more bytes than this body has stay armed for a later answer.
        if let Some(Kind::Cut(bytes)) = take_fault(&|kind| matches!(kind, Kind::Cut(bytes) if *bytes < size)) {
            faults.cut = Some(range.start + bytes);
        }
        if let Some(Kind::Stall(bytes, time)) =
            take_fault(&|kind| matches!(kind, Kind::Stall(bytes, _) if *bytes < size))
        {
            faults.stall = Some((range.start + bytes, time));
        }
        if let Some(Kind::StallAt(at, time)) =
            take_fault(&|kind| matches!(kind, Kind::StallAt(at, _) if range.contains(at)))
        {
            faults.stall = Some((at, time));
        }
        faults
    }

    /// Returns the end of the next chunk, so that no chunk spans a cut or a stall.
    fn chunk_end(&self, at: u64, end: u64) -> u64 {
        // A flip needs no boundary: it alters one byte within a chunk.
        let marks = [self.cut, self.stall.map(|(mark, _)| mark)];
        let next = marks.into_iter().flatten().filter(|mark| *mark > at).min().unwrap_or(end);
        (at + CHUNK).min(next).min(end)
    }
}

struct BodyStream {
    shared: Arc<Shared>,
    content: Content,
    at: u64,
    end: u64,
    faults: BodyFaults,
}

impl BodyStream {
    async fn next(mut self) -> Option<(Result<Frame<Bytes>, BoxError>, Self)> {
        if let Some((mark, time)) = self.faults.stall
            && mark == self.at
        {
            self.faults.stall = None;
            tokio::time::sleep(time).await;
        }
        // Ending the stream with an error makes hyper close the connection early.
        if self.faults.cut == Some(self.at) {
            tokio::time::sleep(CUT_GRACE).await;
            return Some((Err(Dropped.into()), self));
        }
        if self.at >= self.end {
            return None;
        }
        let range = self.at..self.faults.chunk_end(self.at, self.end);
        let mut bytes = match self.content.read(range.clone()) {
            Ok(bytes) => bytes,
            Err(error) => return Some((Err(error.into()), self)),
        };
        if let Some(flip) = self.faults.flip.filter(|flip| range.contains(flip)) {
            let mut corrupted = BytesMut::from(&bytes[..]);
            corrupted[usize::try_from(flip - range.start).expect("a place inside a chunk")] ^= 1;
            bytes = corrupted.freeze();
        }
        self.at = range.end;
        self.shared.body_bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        Some((Ok(Frame::data(bytes)), self))
    }
}

fn stream_body(shared: &Arc<Shared>, content: &Content, range: Range<u64>, faults: BodyFaults) -> Body {
    let (shared, content) = (shared.clone(), content.clone());
    let reading = BodyStream { shared, content, at: range.start, end: range.end, faults };
    StreamBody::new(stream::unfold(reading, BodyStream::next)).boxed_unsync()
}
