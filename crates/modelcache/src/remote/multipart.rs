//! A multipart upload: parts in any order, many on their way, seen by nobody until it is completed.
//!
//! One bound of memory, shared by all uploads of a remote, says how many parts are on their way. An upload that does not
//! end well is aborted, also when it is dropped; what a kill leaves of one is named by its writer's claim.
//!
//! Surprise: where a part's digest has to be signed, it is taken while the part is read, beside that of the file, and the
//! request is made here; the store's own client would hash the part once more.

use super::store::Store;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::ladder::PartHasher;
use crate::manifest::ObjectIdentity;
use crate::progress::Progress;
use crate::runtime::address_space_left;
use crate::transfer::spawn_cleanup;
use bytes::{Bytes, BytesMut};
use object_store::aws::AmazonS3;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

/// Files up to this many bytes are sent in one request; parts are at least as large.
pub(super) const SINGLE_BYTES_MAX: u64 = 8 << 20;
/// Most parts of an upload; S3 allows 10,000.
const PARTS_MAX: u64 = 9_000;
/// Memory for bytes on their way, in KiB: permits of the semaphore.
const BUFFER_KIB: u32 = 48 * 1024;

/// Memory for bytes on their way; clones share it.
#[derive(Clone)]
pub(super) struct UploadMemory {
    free: Arc<Semaphore>,
    kib: u32,
    spares: Arc<Spares>,
}

impl Default for UploadMemory {
    /// [`BUFFER_KIB`], or a quarter of the address space that is left, where that is limited and less: one part at least.
    fn default() -> Self {
        let fitting = |left: u64| u32::try_from(left / 4 / 1024).unwrap_or(BUFFER_KIB);
        let part = (SINGLE_BYTES_MAX / 1024) as u32;
        let kib = address_space_left().map_or(BUFFER_KIB, fitting).clamp(part, BUFFER_KIB);
        Self { free: Arc::new(Semaphore::new(kib as usize)), kib, spares: Arc::default() }
    }
}

impl UploadMemory {
    /// Waits until so much may be held.
    pub(super) async fn reserve(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).clamp(1, self.kib);
        let permits = self.free.clone().acquire_many_owned(kib).await;
        permits.map_err(|cause| Error::new(ErrorKind::Other, "uploading was cut short").cause(cause))
    }
}

/// Buffers of parts that were sent, to be used again. What many threads take in large pieces and free in others the
/// allocator keeps for each of them: without this an upload holds several times what is on its way.
#[derive(Default)]
struct Spares(Mutex<Vec<BytesMut>>);

impl Spares {
    fn take(&self) -> BytesMut {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_back(&self, sent: Bytes) {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held: usize = spares.iter().map(BytesMut::capacity).sum();
        if let Ok(spare) = sent.try_into_mut()
            && held + spare.capacity() <= BUFFER_KIB as usize * 1024
        {
            spares.push(spare);
        }
    }
}

/// Room for one part, and then its bytes.
pub(crate) struct PartMemory {
    index: usize,
    start: u64,
    buffer: BytesMut,
    wants_digest: bool,
    sha256: Option<Digest>,
    permit: OwnedSemaphorePermit,
}

impl PartMemory {
    /// Where the part is in the file.
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.start + self.buffer.len() as u64
    }

    /// Lets `fill` write the whole part, and hash it as it goes if it is given something to hash with. Blocks as it does.
    pub(crate) fn fill(&mut self, fill: impl FnOnce(&mut [u8], Option<&mut PartHasher>) -> Result<()>) -> Result<()> {
        let mut hasher = self.wants_digest.then(PartHasher::new);
        fill(&mut self.buffer, hasher.as_mut())?;
        self.sha256 = hasher.map(PartHasher::finish);
        Ok(())
    }
}

/// How far a part has come.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PartState {
    Not,
    UnderWay,
    Arrived(String),
}

/// An upload that has begun.
pub(crate) struct Multipart {
    store: Arc<Store>,
    s3: AmazonS3,
    key: Path,
    id: String,
    size: u64,
    part_bytes: u64,
    memory: UploadMemory,
    sending: JoinSet<Result<(usize, PartId)>>,
    sent: Vec<PartState>,
    guard: AbortGuard,
}

impl Multipart {
    /// Begins the upload of `size` bytes to `key` of a bucket.
    pub(super) async fn begin(store: &Arc<Store>, memory: &UploadMemory, key: &Path, size: u64) -> Result<Self> {
        let doing = format!("cannot begin to write {key}");
        let s3 = store.bucket().ok_or_else(|| Error::new(ErrorKind::Other, "the remote is no bucket"))?;
        let begin = || async {
            match s3.create_multipart(key).await {
                Ok(id) => Ok(id),
                Err(error) => Err(store.failed_write(error, &doing).await),
            }
        };
        let id = store.retry().run(begin).await?;
        let part_bytes = part_bytes(size);
        Ok(Self {
            store: store.clone(),
            s3: s3.clone(),
            key: key.clone(),
            guard: AbortGuard::new(store.clone(), key.clone(), id.clone()),
            id,
            size,
            part_bytes,
            memory: memory.clone(),
            sending: JoinSet::new(),
            sent: vec![PartState::Not; usize::try_from(size.div_ceil(part_bytes)).unwrap_or(usize::MAX)],
        })
    }

    /// How the store calls it.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// How many parts it has.
    pub(crate) fn parts(&self) -> usize {
        self.sent.len()
    }

    /// Whether a part was put on its way.
    pub(super) fn was_sent(&self, index: usize) -> bool {
        self.sent.get(index).is_some_and(|sent| *sent != PartState::Not)
    }

    /// Bytes of every part but the last.
    pub(super) fn part_bytes(&self) -> u64 {
        self.part_bytes
    }

    /// Waits for room for a part.
    pub(crate) async fn room(&self, index: usize) -> Result<PartMemory> {
        let start = index as u64 * self.part_bytes;
        let bytes = self.part_bytes.min(self.size - start);
        let permit = self.memory.reserve(bytes).await?;
        let mut buffer = self.memory.spares.take();
        buffer.resize(usize::try_from(bytes).unwrap_or_default(), 0);
        Ok(PartMemory { index, start, buffer, wants_digest: self.store.signs_digests(), sha256: None, permit })
    }

    /// Puts a part on its way, and looks whether those before it arrived; `progress` is told when this one has.
    ///
    /// # Errors
    /// What went wrong with any of them; nothing can come of the upload then.
    pub(crate) fn send(&mut self, part: PartMemory, progress: Option<&Progress>) -> Result<()> {
        while let Some(ended) = self.sending.try_join_next() {
            self.landed(ended)?;
        }
        let PartMemory { index, buffer, sha256, permit, .. } = part;
        let (store, s3, key, id) = (self.store.clone(), self.s3.clone(), self.key.clone(), self.id.clone());
        self.sent[index] = PartState::UnderWay;
        let (bytes, spares, progress) = (buffer.freeze(), self.memory.spares.clone(), progress.cloned());
        self.sending.spawn(async move {
            let part = send_part(&store, &s3, &key, &id, index, bytes.clone(), sha256).await?;
            progress.inspect(|progress| progress.done(bytes.len() as u64));
            spares.give_back(bytes);
            drop(permit);
            Ok((index, part))
        });
        Ok(())
    }

    fn landed(&mut self, ended: std::result::Result<Result<(usize, PartId)>, tokio::task::JoinError>) -> Result<()> {
        let (index, part) =
            ended.map_err(|cause| Error::new(ErrorKind::Other, "sending was cut short").cause(cause))??;
        self.sent[index] = PartState::Arrived(part.content_id);
        Ok(())
    }

    /// Waits until all parts that were put on their way have arrived.
    pub(super) async fn arrived(&mut self) -> Result<()> {
        while let Some(ended) = self.sending.join_next().await {
            self.landed(ended)?;
        }
        Ok(())
    }

    /// Makes the object of the parts. The bytes that were sent must have been proven. `appears` is called when all parts
    /// have arrived: from then on the object may be there.
    pub(super) async fn complete(mut self, appears: impl FnOnce()) -> Result<ObjectIdentity> {
        let completed = match self.arrived().await {
            Ok(()) => {
                appears();
                self.put_together().await
            }
            Err(error) => Err(error),
        };
        match completed {
            Ok(identity) => {
                self.guard.done();
                Ok(identity)
            }
            Err(error) => {
                self.abort().await;
                Err(error)
            }
        }
    }

    async fn put_together(&mut self) -> Result<ObjectIdentity> {
        let (key, id) = (&self.key, &self.id);
        let doing = format!("cannot finish writing {key}");
        let part = |sent: PartState| match sent {
            PartState::Arrived(content_id) => Some(PartId { content_id }),
            PartState::Not | PartState::UnderWay => None,
        };
        let parts: Option<Vec<_>> = std::mem::take(&mut self.sent).into_iter().map(part).collect();
        let parts = parts.ok_or_else(|| Error::new(ErrorKind::Other, "a part was not sent"))?;
        // A try that failed may have arrived although its answer did not.
        let was_tried = AtomicBool::new(false);
        let put = || async {
            match self.s3.complete_multipart(key, id, parts.clone()).await {
                Ok(put) => Ok(Some(put.e_tag)),
                Err(error) => match self.store.failed_write(error, &doing).await {
                    error if error.kind() == ErrorKind::NotFound && was_tried.load(Ordering::Relaxed) => Ok(None),
                    error => {
                        was_tried.store(true, Ordering::Relaxed);
                        Err(error)
                    }
                },
            }
        };
        if let Some(etag @ Some(_)) = self.store.retry().run(put).await? {
            return Ok(ObjectIdentity { etag, object_bytes: self.size });
        }
        match self.store.head(key).await? {
            Some(identity) if identity.object_bytes == self.size => Ok(identity),
            _ => Err(Error::unavailable(format!("{doing}: the upload is gone"))),
        }
    }

    /// Takes it back. Whether the store did, as far as it told.
    pub(super) async fn abort(mut self) -> bool {
        self.sending.shutdown().await;
        self.guard.abort().await
    }
}

/// The size of all parts but the last: a power of two, as the parts of a ladder are.
pub(super) fn part_bytes(size: u64) -> u64 {
    size.div_ceil(PARTS_MAX).next_power_of_two().max(SINGLE_BYTES_MAX)
}

async fn send_part(
    store: &Store,
    s3: &AmazonS3,
    key: &Path,
    id: &str,
    index: usize,
    bytes: Bytes,
    sha256: Option<Digest>,
) -> Result<PartId> {
    let doing = format!("cannot write part {} of {key}", index + 1);
    let id = id.to_owned();
    let send = || async {
        let sent = match (sha256, store.copier()) {
            (Some(sha256), Some(copier)) => copier.put_part(key, &id, index, bytes.clone(), sha256).await,
            _ => s3.put_part(key, &id, index, bytes.clone().into()).await,
        };
        match sent {
            Ok(part) => Ok(part),
            Err(error) => Err(store.failed_write(error, &doing).await),
        }
    };
    store.retry().run(send).await
}

/// Aborts a multipart upload unless it was completed.
pub(super) struct AbortGuard {
    store: Arc<Store>,
    key: Path,
    id: Option<String>,
}

impl AbortGuard {
    pub(super) fn new(store: Arc<Store>, key: Path, id: String) -> Self {
        Self { store, key, id: Some(id) }
    }

    /// It was completed.
    pub(super) fn done(&mut self) {
        self.id = None;
    }

    pub(super) async fn abort(&mut self) -> bool {
        let Some(id) = &self.id else { return true };
        let is_gone = abort(&self.store, &self.key, id).await;
        // Not before: who is cancelled here leaves it to the drop.
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

/// Aborts an upload, which may be gone. Whether it is, as far as the store told.
pub(super) async fn abort(store: &Store, key: &Path, id: &str) -> bool {
    let Some(s3) = store.bucket() else { return true };
    let Err(error) = s3.abort_multipart(key, &id.to_owned()).await else { return true };
    let error = store.failed(error, "cannot abort an upload").await;
    if error.kind() == ErrorKind::NotFound {
        return true;
    }
    tracing::warn!(%key, %error, "an unfinished upload stays on the remote for now");
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_within_what_s3_allows() {
        assert_eq!(part_bytes(1), SINGLE_BYTES_MAX);
        assert_eq!(part_bytes(40 << 20), SINGLE_BYTES_MAX);
        for size in [100 << 30, 800 << 30, crate::limits::FILE_BYTES_MAX] {
            let parts = size.div_ceil(part_bytes(size));
            assert!(parts <= 10_000 && part_bytes(size) <= 5 << 30, "{size}: {parts} parts");
        }
    }
}
