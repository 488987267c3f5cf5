//! Multipart uploads: parts are sent in any order and concurrently, and the object appears when the upload is
//! completed.
//!
//! One memory budget, shared by all uploads of a remote, limits the number of parts in flight. An upload that fails or
//! is dropped is aborted. The uploads of a killed process are listed in its claim.

use super::store::Store;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::ladder::PartHasher;
use crate::manifest::ObjectIdentity;
use crate::mutex::Mutex;
use crate::progress::Progress;
use crate::runtime::{address_space_left, blocking};
use crate::transfer::spawn_cleanup;
use bytes::{Bytes, BytesMut};
use object_store::multipart::PartId;
use object_store::path::Path;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

/// Files up to this many bytes are uploaded in one request. Also the smallest part size.
pub(super) const SINGLE_BYTES_MAX: u64 = 8 << 20;
/// Most parts of an upload, below S3's limit of 10,000.
const PARTS_MAX: u64 = 9_000;
/// Memory for parts in flight, in KiB: six parts of the smallest size. Each KiB is one permit of the semaphore.
const BUDGET_KIB: u32 = 48 * 1024;

/// Memory budget for parts in flight. Clones share it.
#[derive(Clone)]
pub(super) struct UploadMemory {
    free: Arc<Semaphore>,
    kib: u32,
    pool: Arc<BufferPool>,
}

impl Default for UploadMemory {
    /// Returns a budget of [`BUDGET_KIB`]. If the address space is limited, the budget is at most a quarter of the free
    /// address space, but at least one part.
    fn default() -> Self {
        let quarter_kib = |left: u64| u32::try_from(left / 4 / 1024).unwrap_or(BUDGET_KIB);
        let part_kib = (SINGLE_BYTES_MAX / 1024) as u32;
        let kib = address_space_left().map_or(BUDGET_KIB, quarter_kib).clamp(part_kib, BUDGET_KIB);
        Self { free: Arc::new(Semaphore::new(kib as usize)), kib, pool: Arc::default() }
    }
}

impl UploadMemory {
    /// Waits until `bytes` bytes of the budget are free. A part larger than the whole budget gets all of it.
    pub(super) async fn reserve(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).clamp(1, self.kib);
        let permits = self.free.clone().acquire_many_owned(kib).await;
        permits.map_err(|cause| Error::new(ErrorKind::Other, "the memory budget of uploads is closed").cause(cause))
    }
}

/// Reusable buffers of uploaded parts. If one thread allocates a large block and another frees it, the allocator keeps
/// the block in a per-thread arena. Without reuse, an upload would occupy several times its budget.
#[derive(Default)]
struct BufferPool(Mutex<Vec<BytesMut>>);

impl BufferPool {
    fn take(&self) -> BytesMut {
        self.0.lock().pop().unwrap_or_default()
    }

    fn put(&self, sent: Bytes) {
        let mut pool = self.0.lock();
        let held: usize = pool.iter().map(BytesMut::capacity).sum();
        // The buffer is reusable only if no clone of it exists any more, for instance in the HTTP client.
        if let Ok(buffer) = sent.try_into_mut()
            && held + buffer.capacity() <= BUDGET_KIB as usize * 1024
        {
            pool.push(buffer);
        }
    }
}

/// The buffer of one part, and its share of the memory budget.
pub(crate) struct PartBuffer {
    index: usize,
    start: u64,
    buffer: BytesMut,
    wants_digest: bool,
    sha256: Option<Digest>,
    permit: OwnedSemaphorePermit,
}

impl PartBuffer {
    /// Returns the byte range of the part in the file.
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.start + self.buffer.len() as u64
    }

    /// Calls `read` to fill the buffer of the part from the file.
    pub(crate) fn read(&mut self, read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        read(&mut self.buffer)
    }

    /// Calls `hash` with the bytes of the part. If the request must sign the part's digest, `hash` also receives a
    /// hasher to update, so that part and file are hashed in one pass. Blocks until `hash` returns.
    pub(crate) fn hash(&mut self, hash: impl FnOnce(&[u8], Option<&mut PartHasher>) -> Result<()>) -> Result<()> {
        let mut hasher = self.wants_digest.then(PartHasher::new);
        hash(&self.buffer, hasher.as_mut())?;
        self.sha256 = hasher.map(PartHasher::finish);
        Ok(())
    }
}

/// Reads a file in order.
pub(crate) trait UploadReader: Send + 'static {
    /// Fills `buffer` with the next bytes. Blocks.
    fn read(&mut self, buffer: &mut [u8]) -> Result<()>;
}

/// Hashes a file in order.
pub(crate) trait UploadHasher: Send + 'static {
    /// Hashes the next bytes, also with `part_hasher` if the request must sign the part's digest. Blocks.
    fn update(&mut self, bytes: &[u8], part_hasher: Option<&mut PartHasher>) -> Result<()>;
}

/// State of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PartState {
    Unsent,
    InFlight,
    /// Contains the part's ETag.
    Uploaded(String),
}

/// A multipart upload in progress.
pub(crate) struct Multipart {
    store: Arc<Store>,
    key: Path,
    id: String,
    size: u64,
    part_bytes: u64,
    memory: UploadMemory,
    sending: JoinSet<Result<(usize, PartId)>>,
    parts: Vec<PartState>,
    guard: AbortGuard,
}

impl Multipart {
    /// Creates a multipart upload of `size` bytes to `key`.
    pub(super) async fn begin(store: &Arc<Store>, memory: &UploadMemory, key: &Path, size: u64) -> Result<Self> {
        let what_failed = format!("cannot begin to write {key}");
        let uploads = store.uploads()?;
        let begin = || async {
            match uploads.create(key).await {
                Ok(id) => Ok(id),
                Err(error) => Err(store.failed_write(error, &what_failed).await),
            }
        };
        let id = store.retry().run(begin).await?;
        let part_bytes = part_bytes(size);
        Ok(Self {
            store: store.clone(),
            key: key.clone(),
            guard: AbortGuard::new(store.clone(), key.clone(), id.clone()),
            id,
            size,
            part_bytes,
            memory: memory.clone(),
            sending: JoinSet::new(),
            parts: vec![PartState::Unsent; usize::try_from(size.div_ceil(part_bytes)).unwrap_or(usize::MAX)],
        })
    }

    /// Returns the store's id of the upload.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Returns the number of parts.
    pub(crate) fn part_count(&self) -> usize {
        self.parts.len()
    }

    /// Returns true if [`send`](Self::send) was called for the part.
    pub(super) fn was_sent(&self, index: usize) -> bool {
        self.parts.get(index).is_some_and(|state| *state != PartState::Unsent)
    }

    /// Returns the size of every part but the last, in bytes.
    pub(super) fn part_bytes(&self) -> u64 {
        self.part_bytes
    }

    /// Waits until the memory budget has room for a part, and returns the buffer of the part.
    pub(crate) fn reserve_part(&self, index: usize) -> impl Future<Output = Result<PartBuffer>> + Send + use<> {
        let start = index as u64 * self.part_bytes;
        let bytes = self.part_bytes.min(self.size - start);
        let (memory, store) = (self.memory.clone(), self.store.clone());
        async move {
            let permit = memory.reserve(bytes).await?;
            let mut buffer = memory.pool.take();
            buffer.resize(usize::try_from(bytes).unwrap_or_default(), 0);
            let wants_digest = store.uploads()?.signs_digests();
            Ok(PartBuffer { index, start, buffer, wants_digest, sha256: None, permit })
        }
    }

    /// Reads, hashes and sends all parts in order. Reads each part while the one before it is hashed. `progress` counts
    /// the bytes of a part when it is uploaded. Returns `reader` and `hasher` after the last part.
    pub(crate) async fn send_file<R: UploadReader, H: UploadHasher>(
        &mut self,
        mut reader: R,
        mut hasher: H,
        progress: Option<&Progress>,
    ) -> Result<(R, H)> {
        let mut next;
        (reader, next) = read_part(reader, self.reserve_part(0)).await?;
        for index in 1..self.part_count() {
            let reserved = self.reserve_part(index);
            // The part is sent as soon as it is hashed, not after the next one is read: reading the next one may wait for
            // the memory that this part frees.
            let hash_and_send = self.hash_and_send(next, hasher, progress);
            (hasher, (reader, next)) = tokio::try_join!(hash_and_send, read_part(reader, reserved))?;
        }
        hasher = self.hash_and_send(next, hasher, progress).await?;
        Ok((reader, hasher))
    }

    async fn hash_and_send<H: UploadHasher>(
        &mut self,
        mut part: PartBuffer,
        mut hasher: H,
        progress: Option<&Progress>,
    ) -> Result<H> {
        let hashed = blocking(move || {
            part.hash(|bytes, part_hasher| hasher.update(bytes, part_hasher))?;
            Ok((part, hasher))
        });
        let (part, hasher) = hashed.await?;
        self.send(part, progress)?;
        Ok(hasher)
    }

    /// Starts to upload a part in the background, and collects the results of earlier parts. `progress` counts the
    /// bytes when this part is uploaded.
    ///
    /// # Errors
    /// The error of an earlier part. The upload has failed then.
    pub(crate) fn send(&mut self, part: PartBuffer, progress: Option<&Progress>) -> Result<()> {
        while let Some(ended) = self.sending.try_join_next() {
            self.record_uploaded(ended)?;
        }
        let PartBuffer { index, buffer, sha256, permit, .. } = part;
        let (store, key, id) = (self.store.clone(), self.key.clone(), self.id.clone());
        self.parts[index] = PartState::InFlight;
        let (bytes, pool, progress) = (buffer.freeze(), self.memory.pool.clone(), progress.cloned());
        self.sending.spawn(async move {
            let part = send_part(&store, &key, &id, index, bytes.clone(), sha256).await?;
            progress.inspect(|progress| progress.done(bytes.len() as u64));
            // Return the buffer before the permit: the next part then reuses it instead of allocating.
            pool.put(bytes);
            drop(permit);
            Ok((index, part))
        });
        Ok(())
    }

    fn record_uploaded(
        &mut self,
        ended: std::result::Result<Result<(usize, PartId)>, tokio::task::JoinError>,
    ) -> Result<()> {
        let (index, part) = ended
            .map_err(|cause| Error::new(ErrorKind::Other, "the task that uploads a part failed").cause(cause))??;
        self.parts[index] = PartState::Uploaded(part.content_id);
        Ok(())
    }

    /// Waits until all parts in flight are uploaded.
    pub(super) async fn wait_for_parts(&mut self) -> Result<()> {
        while let Some(ended) = self.sending.join_next().await {
            self.record_uploaded(ended)?;
        }
        Ok(())
    }

    /// Completes the upload, which makes the object visible. The caller must have verified the digest of the file.
    /// Calls `before_completion` once all parts are uploaded, because the object may exist from then on.
    pub(super) async fn complete(mut self, before_completion: impl FnOnce()) -> Result<ObjectIdentity> {
        let completed = match self.wait_for_parts().await {
            Ok(()) => {
                before_completion();
                self.request_completion().await
            }
            Err(error) => Err(error),
        };
        match completed {
            Ok(identity) => {
                self.guard.disarm();
                Ok(identity)
            }
            Err(error) => {
                self.abort().await;
                Err(error)
            }
        }
    }

    async fn request_completion(&mut self) -> Result<ObjectIdentity> {
        let (key, id) = (&self.key, &self.id);
        let what_failed = format!("cannot finish writing {key}");
        let part = |state: PartState| match state {
            PartState::Uploaded(content_id) => Some(PartId { content_id }),
            PartState::Unsent | PartState::InFlight => None,
        };
        let parts: Option<Vec<_>> = std::mem::take(&mut self.parts).into_iter().map(part).collect();
        let parts = parts.ok_or_else(|| Error::new(ErrorKind::Other, "a part was not sent"))?;
        let uploads = self.store.uploads()?;
        // A failed attempt may have completed the upload without an answer. A later attempt is then refused (404 for
        // the upload id; some stores answer 403), and the object is checked below.
        let was_tried = AtomicBool::new(false);
        let complete = || async {
            match uploads.complete(key, id, parts.clone()).await {
                Ok(etag) => Ok(Ok(etag)),
                Err(error) => {
                    let error = self.store.failed(error, &what_failed).await;
                    let is_refused = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unauthorized);
                    let was_tried = was_tried.swap(true, Ordering::Relaxed);
                    if is_refused && was_tried { Ok(Err(error)) } else { Err(error) }
                }
            }
        };
        let refusal = match self.store.retry().run(complete).await? {
            Ok(etag @ Some(_)) => return Ok(ObjectIdentity { etag, object_bytes: self.size }),
            // No ETag in the answer: read the object's identity.
            Ok(None) => None,
            Err(refusal) => Some(refusal),
        };
        match self.store.head(key).await? {
            Some(identity) if identity.object_bytes == self.size => Ok(identity),
            _ => {
                let gone = Error::unavailable(format!("{what_failed}: the multipart upload no longer exists"))
                    .tier(Tier::Remote);
                Err(refusal.map_or_else(|| gone.clone(), |refusal| gone.clone().cause(refusal)))
            }
        }
    }

    /// Aborts the upload. Returns true if the store confirmed that the upload no longer exists.
    pub(super) async fn abort(mut self) -> bool {
        self.sending.shutdown().await;
        self.guard.abort().await
    }
}

/// Fills the buffer of a part once it is reserved.
async fn read_part<R: UploadReader>(
    mut reader: R,
    reserved: impl Future<Output = Result<PartBuffer>>,
) -> Result<(R, PartBuffer)> {
    let mut part = reserved.await?;
    blocking(move || {
        part.read(|buffer| reader.read(buffer))?;
        Ok((reader, part))
    })
    .await
}

/// Returns the size of all parts but the last, in bytes: a power of two, like the parts of a ladder.
pub(super) fn part_bytes(size: u64) -> u64 {
    size.div_ceil(PARTS_MAX).next_power_of_two().max(SINGLE_BYTES_MAX)
}

async fn send_part(
    store: &Store,
    key: &Path,
    id: &str,
    index: usize,
    bytes: Bytes,
    sha256: Option<Digest>,
) -> Result<PartId> {
    let what_failed = format!("cannot write part {} of {key}", index + 1);
    let uploads = store.uploads()?;
    let send = || async {
        match uploads.put_part(key, id, index, bytes.clone(), sha256).await {
            Ok(part) => Ok(part),
            Err(error) => Err(store.failed_write(error, &what_failed).await),
        }
    };
    store.retry().run(send).await
}

/// Aborts a multipart upload when dropped, unless it was completed.
pub(super) struct AbortGuard {
    store: Arc<Store>,
    key: Path,
    id: Option<String>,
}

impl AbortGuard {
    pub(super) fn new(store: Arc<Store>, key: Path, id: String) -> Self {
        Self { store, key, id: Some(id) }
    }

    /// Disarms the guard. Called after the upload was completed.
    pub(super) fn disarm(&mut self) {
        self.id = None;
    }

    /// Aborts the upload now. Returns true if the store confirmed that it no longer exists.
    pub(super) async fn abort(&mut self) -> bool {
        let Some(id) = &self.id else { return true };
        let is_gone = abort(&self.store, &self.key, id).await;
        // Disarm only after the request: if this future is cancelled, the drop aborts the upload.
        self.id = None;
        is_gone
    }
}

impl Drop for AbortGuard {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else { return };
        let (store, key) = (self.store.clone(), self.key.clone());
        spawn_cleanup(async move {
            abort(&store, &key, &id).await;
        });
    }
}

/// Aborts an upload. Returns true if the store confirmed that the upload no longer exists, now or before.
pub(super) async fn abort(store: &Store, key: &Path, id: &str) -> bool {
    let Some(uploads) = store.backend().uploads() else { return true };
    let Err(error) = uploads.abort(key, id).await else { return true };
    let error = store.failed(error, "cannot abort a multipart upload").await;
    if error.kind() == ErrorKind::NotFound {
        return true;
    }
    tracing::warn!(%key, %error, "cannot abort a multipart upload; it stays on the remote until a later sweep");
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_sizes_stay_within_the_limits_of_s3() {
        assert_eq!(part_bytes(1), SINGLE_BYTES_MAX);
        assert_eq!(part_bytes(40 << 20), SINGLE_BYTES_MAX);
        for size in [100 << 30, 800 << 30, crate::limits::FILE_BYTES_MAX] {
            let parts = size.div_ceil(part_bytes(size));
            assert!(parts <= 10_000 && part_bytes(size) <= 5 << 30, "{size}: {parts} parts");
        }
    }
}
