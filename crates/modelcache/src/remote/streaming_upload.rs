//! Sending what is still being filled: parts go to the remote as they come, and wait there, unseen, for the proof.
//!
//! The fill tells which parts are there and never waits; they are read back from staging, hot in the page cache, under the
//! memory that all uploads share. A remote that is slow or fails costs the fill nothing: what was not sent when the fill
//! ends goes afterwards, the usual way.
//!
//! Surprise: a fill may find at its end that a file is wrong and begin anew, as another generation. So whatever was sent
//! counts only if it was read from the very file that was proven.

use super::Remote;
use super::multipart::{Multipart, PartMemory, SINGLE_BYTES_MAX};
use super::pending_publish::PendingPublish;
use crate::digest::Digest;
use crate::disk::identity;
use crate::error::{Error, ErrorKind, Result};
use crate::key::FilePath;
use crate::manifest::{FileIdentity, Manifest};
use crate::transfer::{CompletedPart, PartSink, PartialFile, PartialFiles, blocking, spawn_cleanup};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// What parts of any ladder and of any upload are multiples of.
const UNIT_BYTES: u64 = SINGLE_BYTES_MAX;

/// The files that a fill proved: under which identity, and with which digest.
pub(crate) type Proven = BTreeMap<FilePath, (FileIdentity, Digest)>;

/// Sending that goes on beside a fill. Dropped, everything is taken back.
#[derive(Debug)]
pub(crate) struct StreamingUpload {
    proven: Option<oneshot::Sender<Proven>>,
    task: Option<JoinHandle<Option<PendingPublish>>>,
}

impl StreamingUpload {
    /// Starts to send `files` of `listing` as they arrive, as far as that makes sense. Whoever fills them tells the sink.
    pub(crate) fn start(remote: &Remote, listing: Manifest, files: PartialFiles) -> (Self, PartSink) {
        let ((sink, told), (sender, proven)) = (PartSink::new(), oneshot::channel());
        let task = tokio::spawn(send(remote.clone(), listing, files, told, proven));
        (Self { proven: Some(sender), task: Some(task) }, sink)
    }

    /// The fill is done: sends what is left, and gives back what is to be published.
    pub(crate) async fn finish(mut self, proven: Proven) -> Option<PendingPublish> {
        self.proven.take()?.send(proven).ok()?;
        self.task.take()?.await.ok().flatten()
    }
}

impl Drop for StreamingUpload {
    fn drop(&mut self) {
        drop(self.proven.take());
        let Some(task) = self.task.take() else { return };
        spawn_cleanup(async move {
            if let Ok(Some(begun)) = task.await {
                begun.abandon().await;
            }
        });
    }
}

async fn send(
    remote: Remote,
    listing: Manifest,
    files: PartialFiles,
    mut told: mpsc::UnboundedReceiver<CompletedPart>,
    mut proven: oneshot::Receiver<Proven>,
) -> Option<PendingPublish> {
    let paths = files.keys().cloned().collect();
    let mut begun = remote.begin(&listing, &paths, &BTreeMap::new(), false).await?;
    let begun_paths = begun.paths();
    let follow = |path: FilePath| {
        let (partial_file, multipart) = (files.get(&path)?.clone(), begun.take(&path)?);
        Some((path, FollowedFile::new(partial_file, multipart)))
    };
    let mut following: BTreeMap<_, _> = begun_paths.into_iter().filter_map(follow).collect();
    let proven = tokio::select! {
        biased;
        proven = &mut proven => proven,
        () = follow_all(&mut begun, &mut following, &mut told) => proven.await,
    };
    let Ok(proven) = proven else {
        following.into_iter().for_each(|(path, file)| begun.give_up(path, file.multipart));
        begun.abandon().await;
        return None;
    };
    for (path, mut file) in following {
        let sent = match proven.get(&path) {
            Some((identity, sha256)) => file.finish(*identity).await.map(|()| *sha256),
            None => Err(Error::new(ErrorKind::Other, "it was here already")),
        };
        match sent {
            Ok(sha256) => begun.put_back(path, file.multipart, sha256),
            Err(error) => {
                tracing::debug!(%path, %error, "not sent while it was filled");
                begun.give_up(path, file.multipart);
            }
        }
    }
    Some(begun)
}

/// Sends parts until nobody tells of any more. A file that cannot be sent is given up.
async fn follow_all(
    begun: &mut PendingPublish,
    files: &mut BTreeMap<FilePath, FollowedFile>,
    told: &mut mpsc::UnboundedReceiver<CompletedPart>,
) {
    while let Some(part) = told.recv().await {
        let Some(file) = files.get_mut(&part.path) else { continue };
        if let Err(error) = file.note(part.generation, part.bytes).await {
            tracing::debug!(path = %part.path, %error, "not sent while it is filled");
            if let Some(file) = files.remove(&part.path) {
                begun.give_up(part.path, file.multipart);
            }
        }
    }
}

/// A file that is being filled and sent.
struct FollowedFile {
    multipart: Multipart,
    partial_file: Arc<PartialFile>,
    /// Of the file that parts are read from, once there is one.
    generation: Option<u64>,
    /// That file, as long as there are parts to be read.
    file: Option<Arc<File>>,
    /// Which units are there.
    filled: Vec<bool>,
    unsent_parts: usize,
}

impl FollowedFile {
    fn new(partial_file: Arc<PartialFile>, multipart: Multipart) -> Self {
        let (filled, unsent_parts) = (vec![false; units(partial_file.size())], multipart.parts());
        Self { multipart, partial_file, generation: None, file: None, filled, unsent_parts }
    }

    /// These bytes are there, in the staged file of that generation: sends what became whole.
    async fn note(&mut self, generation: u64, bytes: Range<u64>) -> Result<()> {
        if *self.generation.get_or_insert(generation) != generation {
            return Err(replaced());
        }
        let last = if bytes.end == self.partial_file.size() { units(bytes.end) } else { index(bytes.end / UNIT_BYTES) };
        let first = index(bytes.start.div_ceil(UNIT_BYTES));
        for unit in first..last.min(self.filled.len()) {
            self.filled[unit] = true;
        }
        let per_part = index(self.multipart.part_bytes() / UNIT_BYTES);
        for part in first / per_part..last.div_ceil(per_part) {
            let units = part * per_part..((part + 1) * per_part).min(self.filled.len());
            if !self.multipart.was_sent(part) && self.filled[units].iter().all(|filled| *filled) {
                self.send(part).await?;
            }
        }
        Ok(())
    }

    /// Sends what was not sent yet of the file, which is whole and was proven as `identity`.
    async fn finish(&mut self, identity_proven: FileIdentity) -> Result<()> {
        if self.generation.is_some_and(|sent| !self.partial_file.is_proven(sent)) {
            return Err(replaced());
        }
        // By now it may have been published, and lie elsewhere.
        if self.unsent_parts > 0 && identity(&*self.file().await?).map_err(unreadable)? != identity_proven {
            return Err(replaced());
        }
        for part in 0..self.multipart.parts() {
            if !self.multipart.was_sent(part) {
                self.send(part).await?;
            }
        }
        // What failed on the way is found now, while it can still go the usual way.
        self.multipart.arrived().await
    }

    async fn send(&mut self, part: usize) -> Result<()> {
        let (file, mut room) = (self.file().await?, self.multipart.room(part).await?);
        let read = move || {
            let at = room.range().start;
            room.fill(|buffer, beside| {
                file.read_exact_at(buffer, at).map_err(unreadable)?;
                if let Some(hasher) = beside {
                    hasher.update(buffer);
                }
                Ok(())
            })?;
            Ok::<PartMemory, Error>(room)
        };
        self.multipart.send(blocking(read).await?, None)?;
        self.unsent_parts -= 1;
        if self.unsent_parts == 0 {
            // Many files may wait for the proof: none of them is kept open for that.
            self.file = None;
        }
        Ok(())
    }

    async fn file(&mut self) -> Result<Arc<File>> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let staged = self.partial_file.staged().clone();
        let file = Arc::new(blocking(move || staged.open(false).map_err(unreadable)).await?);
        // Another one may lie there by now, most of which is not there yet.
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
    Error::new(ErrorKind::Other, "it was filled anew")
}

fn unreadable(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Other, "cannot read back what is being filled").cause(cause)
}
