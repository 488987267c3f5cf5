//! Sending local files: read once, in order, hashed on the way, and committed only if the digest is right.
//!
//! Memory is bounded for all files together. Large files go as multipart uploads, which the claim names: what a kill
//! leaves of one the next writer aborts.
//!
//! Surprise: a file is compared with its digest before anything of it becomes visible: a small one before it is sent,
//! a large one before its parts are put together.

use super::claim::ClaimNotes;
use super::failure;
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

/// Bytes read and hashed at a time.
const SLICE_BYTES: usize = 1 << 20;
/// Beginning of the names of unfinished copies in a folder.
pub(super) const UNFINISHED: &str = "upload-";
/// Files on their way at a time.
pub(super) const FILES_IN_FLIGHT: usize = 32;

/// A local file, and what it has to be.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    /// Its path in the artifact.
    pub(super) path: FilePath,
    /// The object.
    pub(super) object: Path,
    /// The local file.
    pub(super) file: LocalFile,
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
    memory: UploadMemory,
    /// Where uploads are noted that begin.
    notes: ClaimNotes,
    progress: Progress,
}

impl Uploader {
    /// For the version folder with the claim of `notes`.
    pub(super) fn new(
        store: Arc<Store>,
        staging: Option<PathBuf>,
        memory: UploadMemory,
        notes: ClaimNotes,
        progress: Progress,
    ) -> Self {
        Self { store, staging, memory, notes, progress }
    }

    /// Sends one file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the file is not what it has to be; nothing of it is visible then.
    pub(super) async fn send(&self, upload: Upload) -> Result<ObjectIdentity> {
        let identity = match self.store.bucket() {
            None => self.copy(&upload).await?,
            Some(_) if upload.size <= SINGLE_BYTES_MAX => self.single(&upload).await?,
            Some(_) => self.multipart(&upload).await?,
        };
        match identity.etag {
            Some(_) => Ok(identity),
            None => Ok(self.store.head(&upload.object).await?.unwrap_or(identity)),
        }
    }

    async fn single(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let _permit = self.memory.reserve(upload.size).await?;
        let bytes = Reader::open(upload).await?.whole(upload).await?;
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

    /// Reads the file in order, and sends its parts while it goes on reading.
    async fn multipart(&self, upload: &Upload) -> Result<ObjectIdentity> {
        let mut multipart = Multipart::begin(&self.store, &self.memory, &upload.object, upload.size).await?;
        self.notes.uploads([(multipart.id().to_owned(), upload.path.clone())]).await;
        match self.parts(&mut multipart, upload).await {
            Ok(()) => multipart.complete(|| ()).await,
            Err(error) => {
                multipart.abort().await;
                Err(error)
            }
        }
    }

    async fn parts(&self, multipart: &mut Multipart, upload: &Upload) -> Result<()> {
        let mut reader = Reader::open(upload).await?;
        for index in 0..multipart.parts() {
            let (next, part) = reader.part(multipart.room(index).await?).await?;
            reader = next;
            multipart.send(part, Some(&self.progress))?;
        }
        reader.finish(upload).await
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

    /// The next part.
    async fn part(mut self, mut part: PartMemory) -> Result<(Self, PartMemory)> {
        blocking(move || {
            part.fill(|buffer, beside| self.read(buffer, beside))?;
            Ok((self, part))
        })
        .await
    }

    /// All of a small file, checked.
    async fn whole(mut self, upload: &Upload) -> Result<Bytes> {
        let (size, expected) = (usize::try_from(upload.size).unwrap_or_default(), upload.sha256);
        blocking(move || {
            let mut bytes = vec![0; size];
            self.read(&mut bytes, None)?;
            self.check(expected)?;
            Ok(bytes.into())
        })
        .await
    }

    /// Checks that this was all of it, and the right thing.
    async fn finish(self, upload: &Upload) -> Result<()> {
        let expected = upload.sha256;
        blocking(move || self.check(expected)).await
    }

    fn read(&mut self, buffer: &mut [u8], mut beside: Option<&mut PartHasher>) -> Result<()> {
        for slice in buffer.chunks_mut(SLICE_BYTES) {
            self.file.read_exact(slice).map_err(|cause| match cause.kind() {
                std::io::ErrorKind::UnexpectedEof => changed(&self.path, "it is shorter"),
                _ => unreadable(&self.path, cause),
            })?;
            match beside.as_deref_mut() {
                Some(part) => PartHasher::update_pair(&mut self.hasher, slice, part, slice),
                None => self.hasher.update(slice),
            }
        }
        Ok(())
    }

    fn check(mut self, expected: Digest) -> Result<()> {
        match self.file.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(changed(&self.path, "it is longer")),
            Err(cause) => return Err(unreadable(&self.path, cause)),
        }
        same_digest(expected, self.hasher.finish(), &self.path)
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

fn same_digest(expected: Digest, found: Digest, path: &LocalFile) -> Result<()> {
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
    same_digest(upload.sha256, hasher.finish(), &upload.file)
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
