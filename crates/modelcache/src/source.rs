//! [`Source`], the trait that the remote and every origin implement: the manifest and byte ranges of one artifact.
//!
//! The contract is in the documentation of the trait. `tests/it/source_conformance.rs` tests every implementation.

use crate::error::{Error, Result, Tier};
use crate::key::FilePath;
use crate::manifest::Manifest;
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use std::fmt;
use std::ops::Range;

/// One artifact in one tier.
///
/// # Contract
/// - A source belongs to one artifact. Its manifest lists **all** files of the artifact, whether or not this source
///   holds them.
/// - Requests for manifests are retried by the source, under [`Retry`](crate::transfer::Retry). A `read` is a single
///   attempt: the download retries part by part, and requests only the missing bytes.
/// - The source does not verify the bytes of a `read`. The caller counts and verifies them.
/// - An error has one of these kinds: `NotFound` (the file no longer exists), `Unauthorized`, `Unavailable`, `Corrupt`
///   (the server contradicts itself). An error is marked transient if a retry may succeed.
/// - A server may ignore ranges. [`Body::start`] is the offset at which the stream really begins.
/// - Neither results nor errors contain a token or a signed URL.
#[async_trait]
pub trait Source: fmt::Debug + Send + Sync {
    /// Returns the tier of the source.
    fn tier(&self) -> Tier;

    /// Returns the manifest of the artifact, or `None` if the source does not have the artifact.
    ///
    /// On the remote, `held` marks the files that can be read there. An origin can serve every file that it lists, and
    /// leaves `held` empty. The result is cached: a second call sends no request.
    async fn manifest(&self) -> Result<Option<Manifest>>;

    /// Streams the bytes of `path` in `range` (in bytes, end exclusive, not empty, inside the file).
    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body>;

    /// Returns the name of the checksum file or header that contains the digest of `path`, if it is known. The message
    /// of a digest mismatch names it.
    fn digest_stated_by(&self, _path: &FilePath) -> Option<String> {
        None
    }

    /// Returns true if the server is known to answer a range request with the whole file. The source cuts the range out
    /// of that response and does not read to its end, so surplus bytes are not detected. A caller that needs the whole
    /// file should therefore read it in one stream.
    fn ignores_ranges(&self) -> bool {
        false
    }

    /// Returns true if a response had other validators (ETag, modification date) than the list of files, and was used
    /// because a digest decides. If the digest then does not match, the file may have been replaced.
    fn saw_other_validators(&self) -> bool {
        false
    }

    /// Returns a name for the server or bucket that sends the bytes, if it is known, without credentials. The number of
    /// concurrent requests that was right for it is remembered under this name.
    fn endpoint(&self) -> Option<String> {
        self.store()
    }

    /// Returns the bucket or folder that contains the files, as `s3://bucket` or `file:///folder`, if there is one and
    /// it is known. Files in the bucket or folder of the remote are not uploaded to the remote a second time.
    fn store(&self) -> Option<String> {
        None
    }
}

/// A stream of bytes of one file.
pub struct Body {
    /// Offset in the file of the first byte in the stream: the start of the requested range, or 0 if the server ignores
    /// ranges.
    pub start: u64,
    /// The bytes. The stream may fail, and it may be shorter or longer than the requested range.
    pub stream: BoxStream<'static, Result<Bytes>>,
}

impl Body {
    /// Checks `range`. Returns an empty body if `range` is empty, so that no request is needed; otherwise `None`.
    /// `size` is the size of the file, if it is known.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::error::ErrorKind::Invalid) if the range is outside the file.
    pub(crate) fn for_empty_range(path: &FilePath, range: &Range<u64>, size: Option<u64>) -> Result<Option<Self>> {
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
