//! Sources: what a fill can read an artifact from. The remote is one, every origin is one.
//!
//! # Contract
//! A source is bound to one artifact. [`Source::manifest`] lists **all** its files, whether or not this source holds
//! them all; `Ok(None)` means that the artifact is not there, which is no failure. [`Source::read`] streams bytes of
//! one file and promises nothing about them: whoever reads counts and checks.
//!
//! - Requests for manifests are retried inside, under [`Retry`](crate::transfer::Retry). `read` is one attempt: the
//!   pour retries, part by part, and knows what it already has.
//! - An error says what it means by kind: `NotFound` (this file is gone), `Unauthorized`, `Unavailable` (transient or
//!   not), `Corrupt` (the server contradicts itself). A failure worth trying again is marked transient.
//! - A server that ignores ranges is allowed: [`Body::start`] tells where the stream really begins.
//! - No answer and no error ever carries a token or a signed address.
//!
//! One conformance suite runs over every implementation (`tests/it/source_conformance.rs`).

use crate::error::{Error, Result, Tier};
use crate::key::FilePath;
use crate::manifest::Manifest;
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use std::fmt;
use std::ops::Range;

/// One artifact in one place.
#[async_trait]
pub trait Source: fmt::Debug + Send + Sync {
    /// What kind of place it is.
    fn tier(&self) -> Tier;

    /// The list of the artifact's files, or `None` if it is not there.
    ///
    /// From the remote, `held` tells which files can be read there; an origin can serve every file it lists and
    /// leaves `held` empty. The answer is remembered: asking twice costs one request.
    async fn manifest(&self) -> Result<Option<Manifest>>;

    /// The bytes of `path` in `range` (bytes, end exclusive, not empty, inside the file).
    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body>;

    /// What states the digest of `path` where that is a file or header beside it, as far as it was asked for; for the
    /// message when the bytes have another.
    fn stated_by(&self, _path: &FilePath) -> Option<String> {
        None
    }

    /// Whether a range is cut from an answer that has the whole file, as far as it is known. The end of such an answer is
    /// not seen, so that bytes too many stay unnoticed: whoever wants the whole file asks for it in one stream.
    fn ignores_ranges(&self) -> bool {
        false
    }
}

/// A stream of bytes of one file.
pub struct Body {
    /// Offset in the file of the first byte streamed: what was asked for, or 0 if the server ignores ranges.
    pub start: u64,
    /// The bytes. May end early or late, or fail; the reader counts.
    pub stream: BoxStream<'static, Result<Bytes>>,
}

impl Body {
    /// The answer to a read of `range` where it needs no request: an empty one. `size` is the file's, if it is known.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::error::ErrorKind::Invalid) where the file has no such range.
    pub(crate) fn unasked(path: &FilePath, range: &Range<u64>, size: Option<u64>) -> Result<Option<Self>> {
        if range.end < range.start || size.is_some_and(|size| range.end > size) {
            return Err(Error::invalid(format!("{path} has no bytes {}..{}", range.start, range.end)));
        }
        Ok(range.is_empty().then(|| Self { start: range.start, stream: futures::stream::empty().boxed() }))
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("start", &self.start).finish_non_exhaustive()
    }
}
