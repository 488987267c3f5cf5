//! Sending local files: read once, in order, hashed on the way, and committed only if the digest is right.
//!
//! Memory is bounded for all files together. A multipart upload that does not end well is aborted, also when its
//! future is dropped; what a kill leaves of one is for the bucket's lifecycle rule.
//!
//! Surprise: a file is compared with its digest before anything of it becomes visible: a small one before it is sent,
//! a large one before its parts are put together.

use super::failure;
use super::store::{Condition, Store, Written};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::ObjectIdentity;
use crate::progress::Progress;
use bytes::{Bytes, BytesMut};
use object_store::aws::AmazonS3;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const MIB: u64 = 1024 * 1024;
/// Files up to this many bytes are sent in one request.
const SINGLE_BYTES_MAX: u64 = 8 * MIB;
/// Most parts of an upload; S3 allows 10,000.
const PARTS_MAX: u64 = 9_000;
/// Parts of one file on their way at a time.
const PARTS_IN_FLIGHT: usize = 4;
/// Memory for bytes on their way, in KiB: permits of the semaphore.
const BUFFER_KIB: u32 = 48 * 1024;
/// Beginning of the names of unfinished copies in a folder.
pub(super) const UNFINISHED: &str = "upload-";
/// Files on their way at a time.
pub(super) const FILES_IN_FLIGHT: usize = 16;

/// A local file, and what it has to be.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    /// The object.
    pub(super) object: Path,
    /// The local file.
    pub(super) file: PathBuf,
    /// Its bytes.
    pub(super) size: u64,
    /// Its digest.
    pub(super) sha256: Digest,
}

/// Sends files under one bound of memory.
pub(super) struct Uploader {
    store: Arc<Store>,
    /// Where unfinished copies lie, where the store is a folder.
    staging: Option<PathBuf>,
    memory: Memory,
    progress: Progress,
}

/// Memory for bytes on their way; clones share it.
#[derive(Clone)]
pub(super) struct Memory {
    free: Arc<Semaphore>,
    spares: Arc<Spares>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(BUFFER_KIB as usize)), spares: Arc::default() }
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
        if let Ok(spare) = sent.try_into_mut() {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(spare);
        }
    }
}

impl Uploader {
    /// For the version folder whose claim the caller holds.
    pub(super) fn new(store: Arc<Store>, staging: Option<PathBuf>, memory: Memory, progress: Progress) -> Self {
        Self { store, staging, memory, progress }
    }

    /// Sends one file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the file is not what it has to be; nothing of it is visible then.
    pub(super) async fn send(&self, upload: Upload) -> Result<ObjectIdentity> {
        let identity = match self.store.bucket() {
            None => self.copy(&upload).await?,
            Some(_) if upload.size <= SINGLE_BYTES_MAX => self.single(&upload).await?,
            Some(s3) => self.multipart(s3, &upload).await?,
        };
        match identity.etag {
            Some(_) => Ok(identity),
            None => Ok(self.store.head(&upload.object).await?.unwrap_or(identity)),
        }
    }

    async fn single(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let _permit = self.reserve(upload.size).await?;
        let reader = Reader::open(upload).await?;
        let (reader, bytes) = reader.part(upload.size, BytesMut::new()).await?;
        reader.finish(upload).await?;
        let length = bytes.len() as u64;
        match self.store.put(&upload.object, bytes, Condition::Always).await? {
            Written::Done(identity) => {
                self.progress.done(length);
                Ok(identity)
            }
            Written::Refused | Written::Unsupported => {
                Err(Error::unavailable(format!("the store refused {}", upload.object)))
            }
        }
    }

    async fn multipart(&self, s3: &AmazonS3, upload: &Upload) -> Result<ObjectIdentity> {
        let key = &upload.object;
        let doing = format!("cannot begin to write {key}");
        let id = self
            .store
            .retry()
            .run(|| async {
                match s3.create_multipart(key).await {
                    Ok(id) => Ok(id),
                    Err(error) => Err(self.store.failed_write(error, &doing).await),
                }
            })
            .await?;
        let mut guard = AbortGuard::new(self.store.clone(), key.clone(), id.clone());
        let sent = match self.parts(s3, upload, &id).await {
            Ok(parts) => self.complete(s3, upload, &id, parts).await,
            Err(error) => Err(error),
        };
        match sent {
            Ok(identity) => {
                guard.done();
                Ok(identity)
            }
            Err(error) => {
                guard.abort().await;
                Err(error)
            }
        }
    }

    /// Reads the file in order and sends its parts a few at a time.
    async fn parts(&self, s3: &AmazonS3, upload: &Upload, id: &str) -> Result<Vec<PartId>> {
        let part_bytes = part_bytes(upload.size);
        let count = usize::try_from(upload.size.div_ceil(part_bytes)).unwrap_or(usize::MAX);
        let mut ids: Vec<Option<PartId>> = vec![None; count];
        let mut sending = JoinSet::new();
        let mut reader = Reader::open(upload).await?;
        for index in 0..count {
            while sending.len() >= PARTS_IN_FLIGHT {
                landed(&mut ids, &mut sending).await?;
            }
            let size = part_bytes.min(upload.size - index as u64 * part_bytes);
            let permit = self.reserve(size).await?;
            let (next, bytes) = reader.part(size, self.memory.spares.take()).await?;
            reader = next;
            let (store, s3, progress) = (self.store.clone(), s3.clone(), self.progress.clone());
            let spares = self.memory.spares.clone();
            let (key, id) = (upload.object.clone(), id.to_owned());
            sending.spawn(async move {
                let part = send_part(&store, &s3, &key, &id, index, bytes.clone()).await?;
                spares.give_back(bytes);
                progress.done(size);
                drop(permit);
                Ok((index, part))
            });
        }
        reader.finish(upload).await?;
        while !sending.is_empty() {
            landed(&mut ids, &mut sending).await?;
        }
        ids.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| Error::new(ErrorKind::Other, "a part was not sent"))
    }

    async fn complete(&self, s3: &AmazonS3, upload: &Upload, id: &str, parts: Vec<PartId>) -> Result<ObjectIdentity> {
        let key = &upload.object;
        let doing = format!("cannot finish writing {key}");
        let id = id.to_owned();
        let put = self
            .store
            .retry()
            .run(|| async {
                match s3.complete_multipart(key, &id, parts.clone()).await {
                    Ok(put) => Ok(Some(put.e_tag)),
                    Err(error) => match self.store.failed_write(error, &doing).await {
                        // A first try may have arrived although its answer did not.
                        error if error.kind() == ErrorKind::NotFound => Ok(None),
                        error => Err(error),
                    },
                }
            })
            .await?;
        if let Some(etag) = put {
            return Ok(ObjectIdentity { etag, object_bytes: upload.size });
        }
        match self.store.head(key).await? {
            Some(identity) if identity.object_bytes == upload.size => Ok(identity),
            _ => Err(Error::unavailable(format!("{doing}: the upload is gone"))),
        }
    }

    /// Copies into a folder: a new file beside the manifest, made durable, renamed into place.
    async fn copy(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let (Some(target), Some(staging)) = (self.store.file(&upload.object), self.staging.clone()) else {
            return Err(Error::new(ErrorKind::Other, "the remote is no folder"));
        };
        let (upload_too, store) = (upload.clone(), self.store.clone());
        let copied = tokio::task::spawn_blocking(move || copy_into(&upload_too, &target, &staging, &store));
        copied.await.map_err(|cause| Error::new(ErrorKind::Other, "copying was cut short").cause(cause))??;
        self.progress.done(upload.size);
        let gone = || Error::unavailable(format!("{} is gone from the remote", upload.object));
        self.store.head(&upload.object).await?.ok_or_else(gone)
    }

    async fn reserve(&self, bytes: u64) -> Result<tokio::sync::OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).clamp(1, BUFFER_KIB);
        let permits = self.memory.free.clone().acquire_many_owned(kib).await;
        permits.map_err(|cause| Error::new(ErrorKind::Other, "uploading was cut short").cause(cause))
    }
}

/// The size of all parts but the last.
fn part_bytes(size: u64) -> u64 {
    size.div_ceil(PARTS_MAX).max(SINGLE_BYTES_MAX)
}

async fn landed(ids: &mut [Option<PartId>], sending: &mut JoinSet<Result<(usize, PartId)>>) -> Result<()> {
    if let Some(joined) = sending.join_next().await {
        let (index, part) =
            joined.map_err(|cause| Error::new(ErrorKind::Other, "sending was cut short").cause(cause))??;
        ids[index] = Some(part);
    }
    Ok(())
}

async fn send_part(store: &Store, s3: &AmazonS3, key: &Path, id: &str, index: usize, bytes: Bytes) -> Result<PartId> {
    let doing = format!("cannot write part {} of {key}", index + 1);
    let id = id.to_owned();
    store
        .retry()
        .run(|| async {
            match s3.put_part(key, &id, index, bytes.clone().into()).await {
                Ok(part) => Ok(part),
                Err(error) => Err(store.failed_write(error, &doing).await),
            }
        })
        .await
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

    pub(super) async fn abort(&mut self) {
        if let Some(id) = self.id.take() {
            abort(&self.store, &self.key, &id).await;
        }
    }
}

impl Drop for AbortGuard {
    fn drop(&mut self) {
        let (Some(id), Ok(runtime)) = (self.id.take(), tokio::runtime::Handle::try_current()) else { return };
        let (store, key) = (self.store.clone(), self.key.clone());
        runtime.spawn(async move { abort(&store, &key, &id).await });
    }
}

async fn abort(store: &Store, key: &Path, id: &str) {
    let Some(s3) = store.bucket() else { return };
    if let Err(error) = s3.abort_multipart(key, &id.to_owned()).await {
        let error = store.failed(error, "cannot abort an upload").await;
        tracing::warn!(%key, %error, "an unfinished upload is left to the bucket's lifecycle rule");
    }
}

/// A local file that is read once, in order.
struct Reader {
    file: File,
    hasher: Sha256,
    path: PathBuf,
}

impl Reader {
    async fn open(upload: &Upload) -> Result<Self> {
        let path = upload.file.clone();
        blocking(move || Ok(Self { file: open(&path)?, hasher: Sha256::new(), path })).await
    }

    /// The next `size` bytes, in `buffer`.
    async fn part(mut self, size: u64, mut buffer: BytesMut) -> Result<(Self, Bytes)> {
        blocking(move || {
            buffer.resize(usize::try_from(size).unwrap_or_default(), 0);
            self.file.read_exact(&mut buffer).map_err(|cause| match cause.kind() {
                std::io::ErrorKind::UnexpectedEof => changed(&self.path, "it is shorter"),
                _ => unreadable(&self.path, cause),
            })?;
            self.hasher.update(&buffer);
            Ok((self, buffer.freeze()))
        })
        .await
    }

    /// Checks that this was all of it, and the right thing.
    async fn finish(mut self, upload: &Upload) -> Result<()> {
        let expected = upload.sha256;
        blocking(move || {
            match self.file.read(&mut [0]) {
                Ok(0) => {}
                Ok(_) => return Err(changed(&self.path, "it is longer")),
                Err(cause) => return Err(unreadable(&self.path, cause)),
            }
            same_digest(expected, self.hasher, &self.path)
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|cause| Error::new(ErrorKind::Other, "reading a file was cut short").cause(cause))?
}

fn open(path: &FsPath) -> Result<File> {
    File::open(path).map_err(|cause| unreadable(path, cause))
}

fn unreadable(path: &FsPath, cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Other, format!("cannot read {}", path.display())).cause(cause)
}

fn changed(path: &FsPath, how: &str) -> Error {
    Error::corrupt(format!("{} changed before it was sent: {how}", path.display()))
}

fn same_digest(expected: Digest, hasher: Sha256, path: &FsPath) -> Result<()> {
    let found = Digest::from_bytes(hasher.finalize().into());
    if found != expected {
        return Err(changed(path, &format!("sha256 {}, expected {}", found.short(), expected.short())));
    }
    Ok(())
}

/// Writes `upload` to `target`. The temporary file lies among the version's own records: beside the target its name
/// might be too long, since the target's may be as long as a name can be.
fn copy_into(upload: &Upload, target: &FsPath, staging: &FsPath, store: &Store) -> Result<()> {
    let doing = format!("cannot write {}", upload.object);
    let failed = |io: std::io::Error| failure::from_io(&io, &doing, store.at());
    let mut source = open(&upload.file)?;
    std::fs::create_dir_all(staging).map_err(failed)?;
    let temporary = staging.join(format!("{UNFINISHED}{:016x}", rand::random::<u64>()));
    let mut copy = File::create_new(&temporary).map_err(failed)?;
    let copied = copy_checked(&mut source, &mut copy, upload, failed)
        .and_then(|()| copy.sync_all().map_err(failed))
        .and_then(|()| place(&temporary, target, store.folder()).map_err(failed));
    if copied.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    copied
}

fn copy_checked(
    source: &mut File,
    copy: &mut File,
    upload: &Upload,
    failed: impl Fn(std::io::Error) -> Error,
) -> Result<()> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; MIB as usize];
    let mut size = 0;
    loop {
        let got = source.read(&mut buffer).map_err(|cause| unreadable(&upload.file, cause))?;
        if got == 0 {
            break;
        }
        hasher.update(&buffer[..got]);
        copy.write_all(&buffer[..got]).map_err(&failed)?;
        size += got as u64;
    }
    if size != upload.size {
        return Err(changed(&upload.file, &format!("{size} bytes, expected {}", upload.size)));
    }
    same_digest(upload.sha256, hasher, &upload.file)
}

/// Renames into place and makes the entry durable, up to the remote's folder. Folders may vanish while they are made:
/// an evict of something else removes empty ones.
pub(super) fn place(temporary: &FsPath, target: &FsPath, root: Option<&FsPath>) -> std::io::Result<()> {
    let folder = target.parent().unwrap_or(target);
    let mut tries = 0;
    loop {
        let made = std::fs::create_dir_all(folder).and_then(|()| std::fs::rename(temporary, target));
        match made {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && tries < 10 => tries += 1,
            made => break made?,
        }
    }
    for changed in folder.ancestors() {
        File::open(changed)?.sync_all()?;
        if Some(changed) == root {
            break;
        }
    }
    Ok(())
}

/// Removes what killed writers left of copies in a folder. Only under the claim.
pub(super) fn sweep_unfinished(staging: &FsPath) {
    for entry in std::fs::read_dir(staging).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_within_what_s3_allows() {
        assert_eq!(part_bytes(1), 8 * MIB);
        assert_eq!(part_bytes(40 * MIB), 8 * MIB);
        for size in [100 << 30, 800 << 30, crate::limits::FILE_BYTES_MAX] {
            let parts = size.div_ceil(part_bytes(size));
            assert!(parts <= 10_000 && part_bytes(size) <= 5 << 30, "{size}: {parts} parts");
        }
    }
}
