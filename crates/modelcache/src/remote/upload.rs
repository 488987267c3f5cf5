//! Upload of local files: each file is read once, in order, and hashed while it is sent.
//!
//! An object becomes visible only after the digest of the file was verified: a small file is verified before the
//! request that uploads it, a large one before its multipart upload is completed. Multipart uploads are recorded in the
//! claim, so that the next writer can abort those of a killed process. One memory budget bounds all uploads together.

use super::claim::UploadRegistry;
use super::multipart::{Multipart, SINGLE_BYTES_MAX, UploadHasher, UploadMemory, UploadReader};
use super::store::{Condition, PutOutcome, Store};
use crate::digest::Digest;
use crate::disk::LocalFile;
use crate::error::{Error, ErrorKind, Result};
use crate::key::FilePath;
use crate::ladder::PartHasher;
use crate::manifest::ObjectIdentity;
use crate::progress::Progress;
use crate::runtime::blocking;
use bytes::Bytes;
use object_store::path::Path;
use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;

/// Concurrent uploads of files.
pub(super) const FILES_IN_FLIGHT: usize = 32;

/// A local file to upload, with its expected size and digest.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    /// Path in the artifact.
    pub(super) path: FilePath,
    /// Key of the object.
    pub(super) object: Path,
    /// The local file.
    pub(super) file: LocalFile,
    /// Expected size in bytes.
    pub(super) size: u64,
    /// Expected digest.
    pub(super) sha256: Digest,
}

/// Uploads the files of one publish within the memory budget.
pub(super) struct Uploader {
    store: Arc<Store>,
    /// Key below which temporary objects may be created.
    staging: Path,
    memory: UploadMemory,
    /// Records multipart uploads in the claim.
    registry: UploadRegistry,
    progress: Progress,
}

impl Uploader {
    /// Returns an uploader. `registry` belongs to the claim of the version folder.
    pub(super) fn new(
        store: Arc<Store>,
        staging: Path,
        memory: UploadMemory,
        registry: UploadRegistry,
        progress: Progress,
    ) -> Self {
        Self { store, staging, memory, registry, progress }
    }

    /// Uploads one file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if size or digest of the file differ from the expected ones. The object is not created
    /// then.
    pub(super) async fn send(&self, upload: Upload) -> Result<ObjectIdentity> {
        let identity = match self.store.backend().uploads() {
            None => self.whole_file(&upload).await?,
            Some(_) if upload.size <= SINGLE_BYTES_MAX => self.single(&upload).await?,
            Some(_) => self.multipart(&upload).await?,
        };
        match identity.etag {
            Some(_) => Ok(identity),
            // Some stores return no ETag for a write. Request it, because the manifest records it.
            None => Ok(self.store.head(&upload.object).await?.unwrap_or(identity)),
        }
    }

    /// Uploads a small file in one request.
    async fn single(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let _permit = self.memory.reserve(upload.size).await?;
        // Verify the file before the request makes the object visible.
        let bytes = Reader::open(upload).await?.read_verified(upload).await?;
        let length = bytes.len() as u64;
        match self.store.put(&upload.object, bytes, Condition::Always).await? {
            PutOutcome::Done(identity) => {
                self.progress.done(length);
                Ok(identity)
            }
            PutOutcome::ConditionFailed | PutOutcome::ConditionUnsupported => {
                Err(Error::unavailable(format!("the store refused the unconditional write of {}", upload.object)))
            }
        }
    }

    /// Uploads a large file in parts, which are sent while the next ones are read.
    async fn multipart(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let mut multipart = Multipart::begin(&self.store, &self.memory, &upload.object, upload.size).await?;
        // Record the upload in the claim before its parts cost storage.
        self.registry.register([(multipart.id().to_owned(), upload.path.clone())]).await;
        match self.send_parts(&mut multipart, upload).await {
            // `send_parts` has verified the digest of the whole file.
            Ok(()) => multipart.complete(|| ()).await,
            Err(error) => {
                multipart.abort().await;
                Err(error)
            }
        }
    }

    /// Reads and sends all parts, then verifies the digest of the file.
    async fn send_parts(&self, multipart: &mut Multipart, upload: &Upload) -> Result<()> {
        let (reader, hasher) =
            multipart.send_file(Reader::open(upload).await?, PartHasher::new(), Some(&self.progress)).await?;
        let expected = upload.sha256;
        blocking(move || reader.check(hasher, expected)).await
    }

    /// Uploads a file as a whole, to a remote without multipart uploads.
    async fn whole_file(&self, upload: &Upload) -> Result<ObjectIdentity> {
        self.store.backend().put_file(upload, &self.staging).await?;
        self.progress.done(upload.size);
        let missing = || Error::unavailable(format!("{} was removed from the remote after its upload", upload.object));
        self.store.head(&upload.object).await?.ok_or_else(missing)
    }
}

/// A local file that is read once, in order.
struct Reader {
    file: File,
    path: LocalFile,
}

impl Reader {
    async fn open(upload: &Upload) -> Result<Self> {
        let path = upload.file.clone();
        blocking(move || Ok(Self { file: open(&path)?, path })).await
    }

    /// Reads a whole small file and verifies its digest.
    async fn read_verified(mut self, upload: &Upload) -> Result<Bytes> {
        let (size, expected) = (usize::try_from(upload.size).unwrap_or_default(), upload.sha256);
        blocking(move || {
            let (mut bytes, mut hasher) = (vec![0; size], PartHasher::new());
            self.read(&mut bytes)?;
            hasher.update(&bytes);
            self.check(hasher, expected)?;
            Ok(bytes.into())
        })
        .await
    }

    /// Verifies that the file has no more bytes and that its digest, from `hasher`, is `expected`. Blocks.
    fn check(mut self, hasher: PartHasher, expected: Digest) -> Result<()> {
        // A read at the end of the file returns 0.
        match self.file.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(changed(&self.path, "it is longer")),
            Err(cause) => return Err(unreadable(&self.path, cause)),
        }
        ensure_digest(expected, hasher.finish(), &self.path)
    }
}

impl UploadReader for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact(buffer).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(&self.path, "it is shorter"),
            _ => unreadable(&self.path, cause),
        })
    }
}

impl UploadHasher for PartHasher {
    fn update(&mut self, bytes: &[u8], part_hasher: Option<&mut PartHasher>) -> Result<()> {
        match part_hasher {
            // One pass over the data updates both hashers.
            Some(part) => Self::update_pair(self, bytes, part, bytes),
            None => Self::update(self, bytes),
        }
        Ok(())
    }
}

pub(super) fn open(path: &LocalFile) -> Result<File> {
    path.open().map_err(|cause| unreadable(path, cause))
}

pub(super) fn unreadable(path: &LocalFile, cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Other, format!("cannot read {path}")).cause(cause)
}

/// Returns the error for a local file that differs from the expected one; `difference` completes the message.
pub(super) fn changed(path: &LocalFile, difference: &str) -> Error {
    Error::corrupt(format!("{path} changed before it was sent: {difference}"))
}

pub(super) fn ensure_digest(expected: Digest, found: Digest, path: &LocalFile) -> Result<()> {
    if found != expected {
        return Err(changed(path, &format!("sha256 {}, expected {}", found.short(), expected.short())));
    }
    Ok(())
}
