//! What a hostile or broken server answers: a [`Gate`](crate::Gate) spoils the honest answers that pass through it.
//!
//! The aim of [`Fault::on`] is compared with the decoded `/path?query`. Lies about file bytes pass over answers of at
//! most one byte, so that a question for the first byte of a file does not use them up.

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

/// The length that an endless answer of 200 states.
const ENDLESS_BYTES: u64 = 100 << 20;
/// The length that it states where it comes in small chunks: what any metadata may have.
const TRICKLE_BYTES: u64 = 60_000;

/// The kinds; build them with the constructors on [`Lie`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// So many other bytes in front of the body; `true` if `Content-Length` agrees, else the body is chunked.
    Prepend(usize, bool),
    /// So many other bytes after the body.
    Append(usize, bool),
    /// The body lacks its last bytes, and `Content-Length` agrees with it.
    Short(usize),
    /// The first byte of the body is another.
    Flip,
    /// `Content-Range` names a range and a size that are this much higher.
    Shift(u64, u64),
    /// `Content-Encoding` says this.
    Encoded(&'static str),
    /// Another answer: its body again and again, one chunk at a time, for ever.
    Endless(u16, Bytes, Duration),
    /// Another answer of 200, with a `Link` header if it is not empty. `{n}` is the number of the strike.
    Replace(String, String),
}

/// A lie of a server. Without `.times(n)` it is told for ever.
pub type Lie = Fault<Kind>;

impl Fault<Kind> {
    /// `bytes` too many, in front. `told`: `Content-Length` says how many come; else the body is chunked.
    pub fn prepend(bytes: usize, told: bool) -> Self {
        Self::new(Kind::Prepend(bytes, told))
    }

    /// `bytes` too many, at the end.
    pub fn append(bytes: usize, told: bool) -> Self {
        Self::new(Kind::Append(bytes, told))
    }

    /// A well-formed answer without its last `bytes`.
    pub fn short(bytes: usize) -> Self {
        Self::new(Kind::Short(bytes))
    }

    /// One wrong byte, the length is right.
    pub fn flip() -> Self {
        Self::new(Kind::Flip)
    }

    /// A `Content-Range` with other offsets than were asked for.
    pub fn other_range(by: u64) -> Self {
        Self::new(Kind::Shift(by, 0))
    }

    /// A `Content-Range` with another size of the file.
    pub fn other_size(by: u64) -> Self {
        Self::new(Kind::Shift(0, by))
    }

    /// A `Content-Encoding`.
    pub fn encoded(encoding: &'static str) -> Self {
        Self::new(Kind::Encoded(encoding))
    }

    /// An answer whose body never ends: `chunk` again and again, with a pause before each.
    pub fn endless(status: u16, chunk: impl Into<Bytes>, every: Duration) -> Self {
        Self::new(Kind::Endless(status, chunk.into(), every))
    }

    /// Another body; `{n}` in it is a number that is new each time.
    pub fn replace(body: impl Into<String>) -> Self {
        Self::new(Kind::Replace(body.into(), String::new()))
    }

    /// Another body, and a link to the next page; `{n}` in either is a number that is new each time.
    pub fn replace_page(body: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(Kind::Replace(body.into(), next.into()))
    }
}

impl Kind {
    /// Whether it spoils the bytes of an answer, as opposed to taking its place.
    pub(crate) fn spoils(&self) -> bool {
        !matches!(self, Self::Endless(..) | Self::Replace(..))
    }

    /// The answer that takes the place of the honest one. `count` counts the bytes that are sent.
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
                    // What clients of S3 want to see of an object.
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

    /// The honest answer, spoiled.
    pub(crate) async fn spoiled(self, answer: Answer) -> Result<Answer, Dropped> {
        let (mut head, body) = answer.into_parts();
        let mut bytes = body.collect().await.map_err(|_| Dropped)?.to_bytes().to_vec();
        let other = |bytes: usize| b"OTHER BYTES ".iter().copied().cycle().take(bytes).collect::<Vec<u8>>();
        let mut told = true;
        match self {
            Self::Prepend(more, is_told) => {
                bytes.splice(..0, other(more));
                told = is_told;
            }
            Self::Append(more, is_told) => {
                bytes.extend(other(more));
                told = is_told;
            }
            Self::Short(less) => bytes.truncate(bytes.len().saturating_sub(less)),
            Self::Flip => bytes.iter_mut().take(1).for_each(|byte| *byte ^= 1),
            Self::Shift(offset, size) => shift(&mut head.headers, offset, size),
            Self::Encoded(encoding) => {
                head.headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
            }
            Self::Endless(..) | Self::Replace(..) => {}
        }
        head.headers.remove(TRANSFER_ENCODING);
        head.headers.insert(CONTENT_LENGTH, bytes.len().into());
        let body = match told {
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

/// Moves offsets and size of the `Content-Range`, if there is one.
fn shift(headers: &mut hyper::HeaderMap, offset: u64, size: u64) {
    let name: HeaderName = CONTENT_RANGE;
    let told = headers.get(&name).and_then(|value| value.to_str().ok()).and_then(|text| {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let [first, last, total] = [first, last, total].map(|number| number.parse::<u64>().ok());
        Some(format!("bytes {}-{}/{}", first? + offset, last? + offset, total? + offset + size))
    });
    if let Some(told) = told {
        headers.insert(name, told.parse().expect("digits are a header's value"));
    }
}
