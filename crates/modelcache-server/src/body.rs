//! The body of a file response: bytes of a local file, of a file that is still downloading, or of one that is passed
//! through without being stored.

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use modelcache::cache::{OpenFile, UncachedFile};
use modelcache::{Error, Result};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Memory for the chunks of all responses together. With more responses the chunks become smaller.
const CHUNK_MEMORY: usize = 32 << 20;
/// Largest and smallest chunk. A larger one saves no more time; a smaller one costs a system call for few bytes.
const CHUNK_MAX: usize = 512 << 10;
const CHUNK_MIN: usize = 32 << 10;
/// Size of the first chunk. Small, so that the first byte of a file that is downloading is sent early.
const CHUNK_FIRST: usize = 16 << 10;

/// Number of bodies that are being sent.
static BODIES: AtomicUsize = AtomicUsize::new(0);

/// A file that is opened for a response.
pub(crate) enum Opened {
    /// On disk, or on its way there.
    Cached(Arc<OpenFile>),
    /// Passed through without being stored, because the cache has no room for it.
    Uncached(UncachedFile),
}

impl Opened {
    /// Returns the bytes of `range`. If the stream ends with an error, the connection has to be cut.
    ///
    /// A range that ends with the file is complete only after the whole file was verified, even if the file was opened
    /// for reading unverified bytes.
    pub(crate) fn read(self, range: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
        match self {
            Self::Cached(file) => cached(file, range),
            Self::Uncached(file) => file.read(range),
        }
    }
}

/// Streams a range of a file that is on disk or downloading.
fn cached(file: Arc<OpenFile>, range: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
    let (sending, start) = (Sending::start(), range.start);
    stream::try_unfold((file, range, sending), move |(file, left, sending)| async move {
        if left.is_empty() {
            return Ok(None);
        }
        let bytes = sending.chunk_bytes();
        let bytes = if left.start == start { bytes.min(CHUNK_FIRST) } else { bytes };
        let end = left.end.min(left.start + bytes as u64);
        // The last bytes of the file are sent only after its digest was verified.
        if end == file.size() {
            file.whole().await?;
        }
        let chunk = read_at(file.wait(left.start..end).await?.clone(), left.start..end).await?;
        let left = left.start + chunk.len() as u64..left.end;
        Ok(Some((chunk, (file, left, sending))))
    })
    .boxed()
}

/// Reads the beginning of `range`, at least one byte of it. What is in memory is read at once; only reads from the disk
/// are left to a thread.
async fn read_at(file: Arc<File>, range: Range<u64>) -> Result<Bytes> {
    let failed =
        |cause: std::io::Error| Error::new(modelcache::ErrorKind::Directory, "cannot read a cached file").cause(cause);
    let len = usize::try_from(range.end - range.start).unwrap_or(CHUNK_MAX);
    let mut buffer = vec![0; len];
    match preadv2(&file, &mut [IoSliceMut::new(&mut buffer)], range.start, ReadWriteFlags::NOWAIT) {
        Ok(read @ 1..) => {
            buffer.truncate(read);
            return Ok(buffer.into());
        }
        // Not in memory, or the filesystem does not support the flag.
        Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INVAL) => {}
        Err(error) => return Err(failed(error.into())),
    }
    let read = tokio::task::spawn_blocking(move || {
        file.read_exact_at(&mut buffer, range.start)?;
        Ok(Bytes::from(buffer))
    });
    read.await.map_err(|_| Error::new(modelcache::ErrorKind::Other, "the read was cancelled"))?.map_err(failed)
}

/// Counts a body that is being sent.
struct Sending;

impl Sending {
    fn start() -> Self {
        BODIES.fetch_add(1, Ordering::Relaxed);
        Self
    }

    /// Returns the size of the next chunk.
    fn chunk_bytes(&self) -> usize {
        (CHUNK_MEMORY / BODIES.load(Ordering::Relaxed).max(1)).clamp(CHUNK_MIN, CHUNK_MAX)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        BODIES.fetch_sub(1, Ordering::Relaxed);
    }
}
