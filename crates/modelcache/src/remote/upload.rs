//! Upload of local files: each file is read once, in order, and hashed while it is sent.
//!
//! An object becomes visible only after the digest of the file was verified: a small file is verified before its
//! request, a large one before its multipart upload is completed. Multipart uploads are recorded in the claim, so that
//! the next writer can abort those of a killed process. One memory budget bounds all uploads together.

use super::backend::failure;
use super::claim::UploadRegistry;
use super::multipart::{Multipart, PartMemory, SINGLE_BYTES_MAX, UploadMemory};
use super::store::{Condition, Store, Written};
use crate::digest::Digest;
use crate::disk::LocalFile;
use crate::error::{Error, ErrorKind, Result};
use crate::key::FilePath;
use crate::ladder::PartHasher;
use crate::manifest::ObjectIdentity;
use crate::progress::Progress;
use bytes::Bytes;
use object_store::path::Path;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

/// Size of one read, in bytes.
const SLICE_BYTES: usize = 1 << 20;
/// Name prefix of temporary files in a remote that is a folder.
pub(super) const UNFINISHED: &str = "upload-";
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
    /// Folder for temporary files, if the store is a folder.
    staging: Option<PathBuf>,
    memory: UploadMemory,
    /// Records multipart uploads in the claim.
    registry: UploadRegistry,
    progress: Progress,
}

impl Uploader {
    /// Returns an uploader. `registry` belongs to the claim of the version folder.
    pub(super) fn new(
        store: Arc<Store>,
        staging: Option<PathBuf>,
        memory: UploadMemory,
        registry: UploadRegistry,
        progress: Progress,
    ) -> Self {
        Self { store, staging, memory, registry, progress }
    }

    /// Uploads one file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if size or digest of the file differ from the expected ones. No object appears then.
    pub(super) async fn send(&self, upload: Upload) -> Result<ObjectIdentity> {
        let identity = match self.store.bucket() {
            None => self.copy(&upload).await?,
            Some(_) if upload.size <= SINGLE_BYTES_MAX => self.single(&upload).await?,
            Some(_) => self.multipart(&upload).await?,
        };
        match identity.etag {
            Some(_) => Ok(identity),
            // Some stores return no ETag from a write: read it, because the manifest records it.
            None => Ok(self.store.head(&upload.object).await?.unwrap_or(identity)),
        }
    }

    /// Uploads a small file in one request.
    async fn single(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let _permit = self.memory.reserve(upload.size).await?;
        // Verified before the request, which makes the object visible.
        let bytes = Reader::open(upload).await?.read_verified(upload).await?;
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

    /// Uploads a large file in parts, which are sent while the next ones are read.
    async fn multipart(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let mut multipart = Multipart::begin(&self.store, &self.memory, &upload.object, upload.size).await?;
        // Record the upload in the claim before its parts cost storage.
        self.registry.register([(multipart.id().to_owned(), upload.path.clone())]).await;
        match self.parts(&mut multipart, upload).await {
            // The digest of the whole file is verified now.
            Ok(()) => multipart.complete(|| ()).await,
            Err(error) => {
                multipart.abort().await;
                Err(error)
            }
        }
    }

    /// Reads and sends all parts, then verifies the digest of the file.
    async fn parts(&self, multipart: &mut Multipart, upload: &Upload) -> Result<()> {
        let mut reader = Reader::open(upload).await?;
        for index in 0..multipart.parts() {
            let (next, part) = reader.next_part(multipart.room(index).await?).await?;
            reader = next;
            multipart.send(part, Some(&self.progress))?;
        }
        reader.finish(upload).await
    }

    /// Copies the file into a remote that is a folder: written to a temporary file, synced and renamed into place.
    async fn copy(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let (Some(target), Some(staging)) = (self.store.file(&upload.object), self.staging.clone()) else {
            return Err(Error::new(ErrorKind::Other, "the remote is no folder"));
        };
        let (upload_clone, store) = (upload.clone(), self.store.clone());
        let copied = tokio::task::spawn_blocking(move || copy_into(&upload_clone, &target, &staging, &store));
        copied.await.map_err(|cause| Error::new(ErrorKind::Other, "copying was cut short").cause(cause))??;
        self.progress.done(upload.size);
        let gone = || Error::unavailable(format!("{} is gone from the remote", upload.object));
        self.store.head(&upload.object).await?.ok_or_else(gone)
    }
}

/// A local file that is read once, in order.
struct Reader {
    file: File,
    hasher: PartHasher,
    path: LocalFile,
}

impl Reader {
    async fn open(upload: &Upload) -> Result<Self> {
        let path = upload.file.clone();
        blocking(move || Ok(Self { file: open(&path)?, hasher: PartHasher::new(), path })).await
    }

    /// Reads and hashes the next part.
    async fn next_part(mut self, mut part: PartMemory) -> Result<(Self, PartMemory)> {
        blocking(move || {
            part.fill(|buffer, part_hasher| self.read(buffer, part_hasher))?;
            Ok((self, part))
        })
        .await
    }

    /// Reads a whole small file and verifies its digest.
    async fn read_verified(mut self, upload: &Upload) -> Result<Bytes> {
        let (size, expected) = (usize::try_from(upload.size).unwrap_or_default(), upload.sha256);
        blocking(move || {
            let mut bytes = vec![0; size];
            self.read(&mut bytes, None)?;
            self.check(expected)?;
            Ok(bytes.into())
        })
        .await
    }

    /// Verifies that the file ends here and has the expected digest.
    async fn finish(self, upload: &Upload) -> Result<()> {
        let expected = upload.sha256;
        blocking(move || self.check(expected)).await
    }

    /// Fills `buffer` and updates the file's hasher, and `part_hasher` if given.
    fn read(&mut self, buffer: &mut [u8], mut part_hasher: Option<&mut PartHasher>) -> Result<()> {
        for slice in buffer.chunks_mut(SLICE_BYTES) {
            self.file.read_exact(slice).map_err(|cause| match cause.kind() {
                std::io::ErrorKind::UnexpectedEof => changed(&self.path, "it is shorter"),
                _ => unreadable(&self.path, cause),
            })?;
            match part_hasher.as_deref_mut() {
                // One pass over the data updates both hashers.
                Some(part) => PartHasher::update_pair(&mut self.hasher, slice, part, slice),
                None => self.hasher.update(slice),
            }
        }
        Ok(())
    }

    fn check(mut self, expected: Digest) -> Result<()> {
        // A read at the end of the file must return 0.
        match self.file.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(changed(&self.path, "it is longer")),
            Err(cause) => return Err(unreadable(&self.path, cause)),
        }
        ensure_digest(expected, self.hasher.finish(), &self.path)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|cause| Error::new(ErrorKind::Other, "reading a file was cut short").cause(cause))?
}

fn open(path: &LocalFile) -> Result<File> {
    path.open().map_err(|cause| unreadable(path, cause))
}

fn unreadable(path: &LocalFile, cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Other, format!("cannot read {path}")).cause(cause)
}

fn changed(path: &LocalFile, how: &str) -> Error {
    Error::corrupt(format!("{path} changed before it was sent: {how}"))
}

fn ensure_digest(expected: Digest, found: Digest, path: &LocalFile) -> Result<()> {
    if found != expected {
        return Err(changed(path, &format!("sha256 {}, expected {}", found.short(), expected.short())));
    }
    Ok(())
}

/// Copies `upload` to `target` through a temporary file in `staging`. The temporary file is not beside the target,
/// because its name could exceed the limit if the name of the target has the maximum length.
fn copy_into(upload: &Upload, target: &FsPath, staging: &FsPath, store: &Store) -> Result<()> {
    let doing = format!("cannot write {}", upload.object);
    let failed = |io: std::io::Error| failure::from_io(&io, &doing, store.at());
    let mut source = open(&upload.file)?;
    std::fs::create_dir_all(staging).map_err(failed)?;
    let temporary = staging.join(format!("{UNFINISHED}{:016x}", rand::random::<u64>()));
    let mut copy = File::create_new(&temporary).map_err(failed)?;
    // Verify, sync, rename: the target appears complete and durable, or not at all.
    let copied = copy_checked(&mut source, &mut copy, upload, failed)
        .and_then(|()| copy.sync_all().map_err(failed))
        .and_then(|()| rename_durably(&temporary, target, store.folder()).map_err(failed));
    if copied.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    copied
}

/// Copies the file and verifies size and digest of the copied bytes.
fn copy_checked(
    source: &mut File,
    copy: &mut File,
    upload: &Upload,
    failed: impl Fn(std::io::Error) -> Error,
) -> Result<()> {
    let mut hasher = PartHasher::new();
    let mut buffer = vec![0; SLICE_BYTES];
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
    ensure_digest(upload.sha256, hasher.finish(), &upload.file)
}

/// Renames `temporary` to `target` and syncs the folders from `target` up to `root`, the remote's folder.
pub(super) fn rename_durably(temporary: &FsPath, target: &FsPath, root: Option<&FsPath>) -> std::io::Result<()> {
    let folder = target.parent().unwrap_or(target);
    let mut tries = 0;
    loop {
        let made = std::fs::create_dir_all(folder).and_then(|()| std::fs::rename(temporary, target));
        match made {
            // A concurrent evict of another artifact may have removed the new folder while it was empty: try again.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && tries < 10 => tries += 1,
            made => break made?,
        }
    }
    // A new folder is durable only after its parent is synced.
    for changed in folder.ancestors() {
        File::open(changed)?.sync_all()?;
        if Some(changed) == root {
            break;
        }
    }
    Ok(())
}

/// Removes the temporary files of killed writers from `staging`. The caller must hold the claim.
pub(super) fn sweep_unfinished(staging: &FsPath) {
    for entry in std::fs::read_dir(staging).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
