//! Upload during download: each part of a file goes to the remote when it is downloaded. The multipart upload is
//! completed only after the digest of the whole file is verified.
//!
//! The fill reports completed parts through a channel and never waits. Parts are read back from staging, from the page
//! cache, within the memory budget of all uploads. A slow or failing remote does not delay the fill: the remaining
//! parts are uploaded after it.
//!
//! A fill that finds wrong bytes downloads the file again, as a new generation. Uploaded parts count only if they were
//! read from the generation that was verified.

use super::Remote;
use super::multipart::{Multipart, PartMemory, SINGLE_BYTES_MAX};
use super::pending_publish::PendingPublish;
use crate::digest::Digest;
use crate::disk::identity;
use crate::error::{Error, ErrorKind, Result};
use crate::key::FilePath;
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

/// Part sizes of ladders and of uploads are multiples of this, in bytes.
const UNIT_BYTES: u64 = SINGLE_BYTES_MAX;

/// The files that a fill has verified, with their identity on disk and their digest.
pub(crate) type Proven = BTreeMap<FilePath, (FileIdentity, Digest)>;

/// An upload that runs during a fill. Dropping it aborts the uploads and releases the claim.
#[derive(Debug)]
pub(crate) struct StreamingUpload {
    proven: Option<oneshot::Sender<Proven>>,
    task: Option<JoinHandle<Option<PendingPublish>>>,
}

impl StreamingUpload {
    /// Starts to upload `files` of `listing` during their download. The fill must report completed parts to the
    /// returned [`PartSink`].
    pub(crate) fn start(remote: &Remote, listing: Manifest, files: PartialFiles) -> (Self, PartSink) {
        let ((sink, completed), (sender, proven)) = (PartSink::new(), oneshot::channel());
        let task = tokio::spawn(send(remote.clone(), listing, files, completed, proven));
        (Self { proven: Some(sender), task: Some(task) }, sink)
    }

    /// Uploads the remaining parts of the verified files, and returns the pending publish. Returns `None` if no upload
    /// was started.
    pub(crate) async fn finish(mut self, proven: Proven) -> Option<PendingPublish> {
        self.proven.take()?.send(proven).ok()?;
        self.task.take()?.await.ok().flatten()
    }
}

impl Drop for StreamingUpload {
    fn drop(&mut self) {
        // Closing the channel makes the task abandon the upload. If the task is already done, abandon its result.
        drop(self.proven.take());
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
    mut proven: oneshot::Receiver<Proven>,
) -> Option<PendingPublish> {
    let paths = files.keys().cloned().collect();
    let mut pending = remote.begin(&listing, &paths, &BTreeMap::new(), false).await?;
    let pending_paths = pending.paths();
    let follow = |path: FilePath| {
        let (partial_file, multipart) = (files.get(&path)?.clone(), pending.take(&path)?);
        Some((path, FollowedFile::new(partial_file, multipart)))
    };
    let mut following: BTreeMap<_, _> = pending_paths.into_iter().filter_map(follow).collect();
    // Upload parts until the fill ends, whether or not all completed parts have been uploaded by then.
    let proven = tokio::select! {
        biased;
        proven = &mut proven => proven,
        () = follow_all(&mut pending, &mut following, &mut completed) => proven.await,
    };
    // The fill failed or was cancelled.
    let Ok(proven) = proven else {
        following.into_iter().for_each(|(path, file)| pending.give_up(path, file.multipart));
        pending.abandon().await;
        return None;
    };
    for (path, mut file) in following {
        let sent = match proven.get(&path) {
            Some((identity, sha256)) => file.finish(*identity).await.map(|()| *sha256),
            // Not part of this fill.
            None => Err(Error::new(ErrorKind::Other, "the file was on disk already")),
        };
        match sent {
            Ok(sha256) => pending.put_back(path, file.multipart, sha256),
            Err(error) => {
                tracing::debug!(%path, %error, "cannot upload a file during its download");
                pending.give_up(path, file.multipart);
            }
        }
    }
    Some(pending)
}

/// Uploads completed parts until the channel is closed. Gives up a file after its first error.
async fn follow_all(
    pending: &mut PendingPublish,
    files: &mut BTreeMap<FilePath, FollowedFile>,
    completed: &mut mpsc::UnboundedReceiver<CompletedPart>,
) {
    while let Some(part) = completed.recv().await {
        let Some(file) = files.get_mut(&part.path) else { continue };
        if let Err(error) = file.record_filled(part.generation, part.bytes).await {
            tracing::debug!(path = %part.path, %error, "stopped the upload of a file during its download");
            if let Some(file) = files.remove(&part.path) {
                pending.give_up(part.path, file.multipart);
            }
        }
    }
}

/// A file that is uploaded while it is downloaded.
struct FollowedFile {
    multipart: Multipart,
    partial_file: Arc<PartialFile>,
    /// Generation of the staged file from which parts were read; `None` before the first part.
    generation: Option<u64>,
    /// The open staged file, while parts remain to be read.
    file: Option<Arc<File>>,
    /// For each unit of [`UNIT_BYTES`], true if it is downloaded.
    filled: Vec<bool>,
    unsent_parts: usize,
}

impl FollowedFile {
    fn new(partial_file: Arc<PartialFile>, multipart: Multipart) -> Self {
        let (filled, unsent_parts) = (vec![false; units(partial_file.size())], multipart.parts());
        Self { multipart, partial_file, generation: None, file: None, filled, unsent_parts }
    }

    /// Records that `bytes` of the staged file of `generation` are downloaded, and uploads the parts that are complete
    /// now.
    async fn record_filled(&mut self, generation: u64, bytes: Range<u64>) -> Result<()> {
        // Parts of two generations must not be mixed in one upload.
        if *self.generation.get_or_insert(generation) != generation {
            return Err(replaced());
        }
        // Only whole units count; the last unit of the file may be shorter.
        let last = if bytes.end == self.partial_file.size() { units(bytes.end) } else { index(bytes.end / UNIT_BYTES) };
        let first = index(bytes.start.div_ceil(UNIT_BYTES));
        for unit in first..last.min(self.filled.len()) {
            self.filled[unit] = true;
        }
        // A part of the upload is a whole number of units. Upload each part once all of its units are downloaded.
        let per_part = index(self.multipart.part_bytes() / UNIT_BYTES);
        for part in first / per_part..last.div_ceil(per_part) {
            let units = part * per_part..((part + 1) * per_part).min(self.filled.len());
            if !self.multipart.was_sent(part) && self.filled[units].iter().all(|filled| *filled) {
                self.send(part).await?;
            }
        }
        Ok(())
    }

    /// Uploads the remaining parts of the file, which is complete and was verified as `identity_proven`.
    async fn finish(&mut self, identity_proven: FileIdentity) -> Result<()> {
        // Parts read from another generation than the verified one are worthless.
        if self.generation.is_some_and(|sent| !self.partial_file.is_proven(sent)) {
            return Err(replaced());
        }
        // The file may have been published or replaced since: read the rest only from the verified file.
        if self.unsent_parts > 0 && identity(&*self.file().await?).map_err(unreadable)? != identity_proven {
            return Err(replaced());
        }
        for part in 0..self.multipart.parts() {
            if !self.multipart.was_sent(part) {
                self.send(part).await?;
            }
        }
        // Collect errors of parts in flight now, so that the publish can still upload the file from the start.
        self.multipart.wait_for_parts().await
    }

    /// Reads one part from the staged file and starts its upload.
    async fn send(&mut self, part: usize) -> Result<()> {
        let (file, mut room) = (self.file().await?, self.multipart.room(part).await?);
        let read = move || {
            let at = room.range().start;
            room.fill(|buffer, part_hasher| {
                file.read_exact_at(buffer, at).map_err(unreadable)?;
                // The signature needs the digest of the part.
                if let Some(hasher) = part_hasher {
                    hasher.update(buffer);
                }
                Ok(())
            })?;
            Ok::<PartMemory, Error>(room)
        };
        self.multipart.send(blocking(read).await?, None)?;
        self.unsent_parts -= 1;
        if self.unsent_parts == 0 {
            // Close the file: many files may wait for the end of the fill, and descriptors are limited.
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
