//! Upload during download: each part of a file goes to the remote when it is downloaded. The multipart upload is
//! completed only after the digest of the whole file is verified.
//!
//! The fill reports completed parts through a channel and never waits for the upload. Parts are read from the staged
//! file, which is in the page cache by then, within the memory budget of all uploads. A slow or failing remote does not
//! delay the fill: the remaining parts are uploaded after the fill.
//!
//! A fill that receives wrong bytes downloads the file again, as a new generation. Uploaded parts are used only if they
//! were read from the generation that was verified.

use super::Remote;
use super::multipart::{Multipart, PartBuffer};
use super::pending_publish::PendingPublish;
use crate::digest::Digest;
use crate::disk::identity;
use crate::error::{Error, ErrorKind, Result};
use crate::key::FilePath;
use crate::limits::PART_BYTES_MIN;
use crate::manifest::{FileIdentity, Manifest};
use crate::runtime::blocking;
use crate::transfer::{CompletedPart, PartSink, PartialFile, PartialFiles, spawn_cleanup};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Unit of progress, in bytes. The part sizes of ladders and of uploads are multiples of it.
const UNIT_BYTES: u64 = PART_BYTES_MIN;

/// The files that a fill has verified, with their identity on disk and their digest.
pub(crate) type VerifiedFiles = BTreeMap<FilePath, (FileIdentity, Digest)>;

/// An upload that runs during a fill. Dropping it aborts the uploads and releases the claim.
#[derive(Debug)]
pub(crate) struct StreamingUpload {
    verified: Option<oneshot::Sender<VerifiedFiles>>,
    task: Option<JoinHandle<Option<PendingPublish>>>,
}

impl StreamingUpload {
    /// Starts to upload `files` of `listing` during their download. The fill must report completed parts to the
    /// returned [`PartSink`].
    pub(crate) fn start(remote: &Remote, listing: Manifest, files: PartialFiles) -> (Self, PartSink) {
        let ((sink, completed), (sender, verified)) = (PartSink::new(), oneshot::channel());
        let task = tokio::spawn(send(remote.clone(), listing, files, completed, verified));
        (Self { verified: Some(sender), task: Some(task) }, sink)
    }

    /// Uploads the remaining parts of the verified files, and returns the pending publish. Returns `None` if no upload
    /// was started.
    pub(crate) async fn finish(mut self, verified: VerifiedFiles) -> Option<PendingPublish> {
        self.verified.take()?.send(verified).ok()?;
        self.task.take()?.await.ok().flatten()
    }
}

impl Drop for StreamingUpload {
    fn drop(&mut self) {
        // Closing the channel makes the task abandon the upload. If the task has ended already, abandon its result.
        drop(self.verified.take());
        let Some(task) = self.task.take() else { return };
        spawn_cleanup(async move {
            if let Ok(Some(pending)) = task.await {
                pending.abandon().await;
            }
        });
    }
}

/// The background task: starts the publish, uploads parts during the fill, and uploads the rest after it.
async fn send(
    remote: Remote,
    listing: Manifest,
    files: PartialFiles,
    mut completed: mpsc::UnboundedReceiver<CompletedPart>,
    mut verified: oneshot::Receiver<VerifiedFiles>,
) -> Option<PendingPublish> {
    let paths = files.keys().cloned().collect();
    let mut pending = remote.begin(&listing, &paths, &BTreeMap::new(), false).await?;
    let pending_paths = pending.paths();
    let follow = |path: FilePath| {
        let (partial_file, multipart) = (files.get(&path)?.clone(), pending.take_upload(&path)?);
        Some((path, StreamedFile::new(partial_file, multipart)))
    };
    let mut following: BTreeMap<_, _> = pending_paths.into_iter().filter_map(follow).collect();
    // Upload parts until the fill ends, even if not all completed parts are uploaded by then.
    let verified = tokio::select! {
        biased;
        verified = &mut verified => verified,
        () = follow_all(&mut pending, &mut following, &mut completed) => verified.await,
    };
    // The fill failed or was cancelled.
    let Ok(verified) = verified else {
        following.into_iter().for_each(|(path, file)| pending.discard(path, file.multipart));
        pending.abandon().await;
        return None;
    };
    for (path, mut file) in following {
        let sent = match verified.get(&path) {
            Some((identity, sha256)) => file.finish(*identity).await.map(|()| *sha256),
            // This fill did not download the file.
            None => Err(Error::new(ErrorKind::Other, "the file was on disk already")),
        };
        match sent {
            Ok(sha256) => pending.add_sent(path, file.multipart, sha256),
            Err(error) => {
                tracing::debug!(%path, %error, "cannot upload a file during its download");
                pending.discard(path, file.multipart);
            }
        }
    }
    Some(pending)
}

/// Uploads completed parts until the channel is closed. After an error, discards the upload of the file.
async fn follow_all(
    pending: &mut PendingPublish,
    files: &mut BTreeMap<FilePath, StreamedFile>,
    completed: &mut mpsc::UnboundedReceiver<CompletedPart>,
) {
    while let Some(part) = completed.recv().await {
        let Some(file) = files.get_mut(&part.path) else { continue };
        if let Err(error) = file.record_downloaded(part.generation, part.bytes).await {
            tracing::debug!(path = %part.path, %error, "stopped the upload of a file during its download");
            if let Some(file) = files.remove(&part.path) {
                pending.discard(part.path, file.multipart);
            }
        }
    }
}

/// A file that is uploaded while it is downloaded.
struct StreamedFile {
    multipart: Multipart,
    partial_file: Arc<PartialFile>,
    /// Generation of the staged file from which parts are read; `None` before the first part.
    generation: Option<u64>,
    /// The open staged file, while parts remain to be read.
    file: Option<Arc<File>>,
    /// For each unit of [`UNIT_BYTES`], true if the unit is downloaded.
    downloaded: Vec<bool>,
    unsent_parts: usize,
}

impl StreamedFile {
    fn new(partial_file: Arc<PartialFile>, multipart: Multipart) -> Self {
        let (downloaded, unsent_parts) = (vec![false; units(partial_file.size())], multipart.part_count());
        Self { multipart, partial_file, generation: None, file: None, downloaded, unsent_parts }
    }

    /// Records that `bytes` of the staged file of `generation` are downloaded, and uploads the parts that are complete
    /// now.
    async fn record_downloaded(&mut self, generation: u64, bytes: Range<u64>) -> Result<()> {
        // Parts of two generations must not be mixed in one upload.
        if *self.generation.get_or_insert(generation) != generation {
            return Err(replaced());
        }
        // Only whole units count; the last unit of the file may be shorter.
        let last = if bytes.end == self.partial_file.size() { units(bytes.end) } else { index(bytes.end / UNIT_BYTES) };
        let first = index(bytes.start.div_ceil(UNIT_BYTES));
        for unit in first..last.min(self.downloaded.len()) {
            self.downloaded[unit] = true;
        }
        // A part of the upload is a whole number of units. Upload each part once all of its units are downloaded.
        let per_part = index(self.multipart.part_bytes() / UNIT_BYTES);
        for part in first / per_part..last.div_ceil(per_part) {
            let units = part * per_part..((part + 1) * per_part).min(self.downloaded.len());
            if !self.multipart.was_sent(part) && self.downloaded[units].iter().all(|downloaded| *downloaded) {
                self.send(part).await?;
            }
        }
        Ok(())
    }

    /// Uploads the remaining parts of the file. The file is complete, and the fill verified it under
    /// `verified_identity`.
    async fn finish(&mut self, verified_identity: FileIdentity) -> Result<()> {
        // Parts of another generation than the verified one cannot be used.
        if self.generation.is_some_and(|sent| !self.partial_file.is_verified(sent)) {
            return Err(replaced());
        }
        // The path may hold another file by now: read the rest only from the verified file.
        if self.unsent_parts > 0 && identity(&*self.file().await?).map_err(unreadable)? != verified_identity {
            return Err(replaced());
        }
        for part in 0..self.multipart.part_count() {
            if !self.multipart.was_sent(part) {
                self.send(part).await?;
            }
        }
        // Wait for the parts in flight. If one fails, the publish can still upload the file from the start.
        self.multipart.wait_for_parts().await
    }

    /// Reads one part from the staged file and starts its upload.
    async fn send(&mut self, part: usize) -> Result<()> {
        let (file, mut part_buffer) = (self.file().await?, self.multipart.reserve_part(part).await?);
        let read = move || {
            let at = part_buffer.range().start;
            part_buffer.read(|buffer| file.read_exact_at(buffer, at).map_err(unreadable))?;
            part_buffer.hash(|bytes, part_hasher| {
                // The signature of the request covers the digest of the part.
                if let Some(hasher) = part_hasher {
                    hasher.update(bytes);
                }
                Ok(())
            })?;
            Ok::<PartBuffer, Error>(part_buffer)
        };
        self.multipart.send(blocking(read).await?, None)?;
        self.unsent_parts -= 1;
        if self.unsent_parts == 0 {
            // Close the file now: many files may wait for the end of the fill, and file descriptors are limited.
            self.file = None;
        }
        Ok(())
    }

    /// Returns the open staged file.
    async fn file(&mut self) -> Result<Arc<File>> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let staged = self.partial_file.staged().clone();
        let file = Arc::new(blocking(move || staged.open(false).map_err(unreadable)).await?);
        // The path may hold the staged file of a newer generation by now, which is mostly empty.
        if self.generation.is_some_and(|generation| !self.partial_file.is_current(generation)) {
            return Err(replaced());
        }
        Ok(self.file.insert(file).clone())
    }
}

/// Returns the number of units in `size` bytes.
fn units(size: u64) -> usize {
    index(size.div_ceil(UNIT_BYTES))
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn replaced() -> Error {
    Error::new(ErrorKind::Other, "the file was downloaded again")
}

fn unreadable(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Other, "cannot read the staged file").cause(cause)
}
