//! Answers of a hostile or broken server: a [`Gate`](crate::Gate) replaces or corrupts the honest answers.
//!
//! [`Fault::on`] is compared with the decoded `/path?query`. Lies that corrupt a body skip answers of at most one byte,
//! so that a probe for the first byte of a file does not use one up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::Response;
use hyper::body::Frame;
use hyper::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, LAST_MODIFIED, LINK,
    TRANSFER_ENCODING,
};

use crate::faults::Fault;
use crate::serve::{Answer, BoxError, Dropped, full};

/// `Content-Length` of an endless answer with status 200.
const ENDLESS_BYTES: u64 = 100 << 20;
/// `Content-Length` of an endless answer in chunks below 1 KiB: small enough to be plausible for metadata.
const TRICKLE_BYTES: u64 = 60_000;

/// The kinds of lie. Use the constructors on [`Lie`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// This many extra bytes before the body. `true`: `Content-Length` agrees; `false`: the body is chunked.
    Prepend(usize, bool),
    /// This many extra bytes after the body. `true`: `Content-Length` agrees; `false`: the body is chunked.
    Append(usize, bool),
    /// The body lacks this many bytes at its end; `Content-Length` agrees with it.
    Short(usize),
    /// The first byte of the body is changed.
    Flip,
    /// `Content-Range` states offsets that are higher by the first number, and a file size that is higher by the sum of
    /// both numbers.
    Shift(u64, u64),
    /// The answer has this `Content-Encoding`, although the body is not encoded.
    Encoded(&'static str),
    /// A different answer with this status. Its body repeats the chunk without end, with this pause before each.
    Endless(u16, Bytes, Duration),
    /// A different answer of 200 with this body, and a `Link` header if the second string is not empty. `{n}` becomes
    /// the number of the request.
    Replace(String, String),
}

/// A lie of a server. Without `.times(n)` it stays armed.
pub type Lie = Fault<Kind>;

impl Fault<Kind> {
    /// Adds `bytes` before the body. With `sized`, `Content-Length` covers them; otherwise the body is chunked.
    pub fn prepend(bytes: usize, sized: bool) -> Self {
        Self::new(Kind::Prepend(bytes, sized))
    }

    /// Adds `bytes` after the body. With `sized`, `Content-Length` covers them; otherwise the body is chunked.
    pub fn append(bytes: usize, sized: bool) -> Self {
        Self::new(Kind::Append(bytes, sized))
    }

    /// A well-formed answer without its last `bytes`.
    pub fn short(bytes: usize) -> Self {
        Self::new(Kind::Short(bytes))
    }

    /// Changes the first byte; the length stays.
    pub fn flip() -> Self {
        Self::new(Kind::Flip)
    }

    /// Answers with a `Content-Range` whose offsets are `by` higher than requested. Its file size is `by` higher, too.
    pub fn other_range(by: u64) -> Self {
        Self::new(Kind::Shift(by, 0))
    }

    /// Answers with a `Content-Range` that states a file size that is `by` higher.
    pub fn other_size(by: u64) -> Self {
        Self::new(Kind::Shift(0, by))
    }

    /// Adds a `Content-Encoding` header.
    pub fn encoded(encoding: &'static str) -> Self {
        Self::new(Kind::Encoded(encoding))
    }

    /// Replaces the answer by one with an endless body: `chunk` again and again, with a pause of `every` before each.
    pub fn endless(status: u16, chunk: impl Into<Bytes>, every: Duration) -> Self {
        Self::new(Kind::Endless(status, chunk.into(), every))
    }

    /// Replaces the body. `{n}` in it becomes a number that differs in each answer.
    pub fn replace(body: impl Into<String>) -> Self {
        Self::new(Kind::Replace(body.into(), String::new()))
    }

    /// Replaces the body and adds a link to the next page. `{n}` in either becomes a number that differs in each
    /// answer.
    pub fn replace_page(body: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(Kind::Replace(body.into(), next.into()))
    }
}

impl Kind {
    /// Returns true if the lie corrupts the bytes of an honest answer, false if it replaces the answer.
    pub(crate) fn corrupts_answer(&self) -> bool {
        !matches!(self, Self::Endless(..) | Self::Replace(..))
    }

    /// Returns the answer that replaces the honest one. Adds the bytes it sends to `count`.
    pub(crate) fn answer(self, number: u64, count: &Arc<AtomicU64>) -> Option<Answer> {
        match self {
            Self::Endless(status, chunk, every) => {
                let length = if chunk.len() < 1024 { TRICKLE_BYTES } else { ENDLESS_BYTES };
                let count = count.clone();
                let chunks = stream::repeat(()).then(move |()| {
                    let (chunk, count) = (chunk.clone(), count.clone());
                    async move {
                        tokio::time::sleep(every).await;
                        count.fetch_add(chunk.len() as u64, Ordering::SeqCst);
                        Ok::<_, BoxError>(Frame::data(chunk))
                    }
                });
                let mut answer = Response::new(StreamBody::new(chunks).boxed_unsync());
                *answer.status_mut() = status.try_into().expect("a status");
                let headers = answer.headers_mut();
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/xml"));
                if status == 200 {
                    // S3 clients need these headers to accept an object.
                    headers.insert(CONTENT_LENGTH, length.into());
                    headers.insert(ETAG, HeaderValue::from_static("\"endless\""));
                    headers.insert(LAST_MODIFIED, HeaderValue::from_static("Wed, 01 Jan 2025 00:00:00 GMT"));
                }
                Some(answer)
            }
            Self::Replace(body, link) => {
                let fill = |text: &str| text.replace("{n}", &number.to_string());
                let mut answer = Response::new(full(fill(&body)));
                if !link.is_empty() {
                    answer.headers_mut().insert(LINK, fill(&link).parse().expect("a link is a header's value"));
                }
                Some(answer)
            }
            _ => None,
        }
    }

    /// Returns the honest answer, corrupted.
    pub(crate) async fn corrupt(self, answer: Answer) -> Result<Answer, Dropped> {
        let (mut head, body) = answer.into_parts();
        let mut bytes = body.collect().await.map_err(|_| Dropped)?.to_bytes().to_vec();
        let other = |bytes: usize| b"OTHER BYTES ".iter().copied().cycle().take(bytes).collect::<Vec<u8>>();
        let mut sized = true;
        match self {
            Self::Prepend(more, is_sized) => {
                bytes.splice(..0, other(more));
                sized = is_sized;
            }
            Self::Append(more, is_sized) => {
                bytes.extend(other(more));
                sized = is_sized;
            }
            Self::Short(less) => bytes.truncate(bytes.len().saturating_sub(less)),
            Self::Flip => bytes.iter_mut().take(1).for_each(|byte| *byte ^= 1),
            Self::Shift(offset, size) => shift(&mut head.headers, offset, size),
            Self::Encoded(encoding) => {
                head.headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
            }
            Self::Endless(..) | Self::Replace(..) => {}
        }
        // The corrupted body may have another length, so the framing of the honest answer does not apply.
        head.headers.remove(TRANSFER_ENCODING);
        head.headers.insert(CONTENT_LENGTH, bytes.len().into());
        let body = match sized {
            true => full(bytes),
            false => {
                head.headers.remove(CONTENT_LENGTH);
                let chunks = bytes.chunks(64 << 10).map(|chunk| Ok(Frame::data(Bytes::copy_from_slice(chunk))));
                StreamBody::new(stream::iter(chunks.collect::<Vec<Result<_, BoxError>>>())).boxed_unsync()
            }
        };
        Ok(Response::from_parts(head, body))
    }
}

/// Raises the offsets in `Content-Range` by `offset`, and the file size by `offset + size`, if the header is present.
fn shift(headers: &mut hyper::HeaderMap, offset: u64, size: u64) {
    let name: HeaderName = CONTENT_RANGE;
    let shifted = headers.get(&name).and_then(|value| value.to_str().ok()).and_then(|text| {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let [first, last, total] = [first, last, total].map(|number| number.parse::<u64>().ok());
        Some(format!("bytes {}-{}/{}", first? + offset, last? + offset, total? + offset + size))
    });
    if let Some(shifted) = shifted {
        headers.insert(name, shifted.parse().expect("digits are a header's value"));
    }
}
