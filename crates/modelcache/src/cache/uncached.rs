//! Files that are passed through without being stored, because they are larger than the budget.

use super::{Cache, OpenOptions};
use crate::digest::{Digest, GitOid};
use crate::error::{Error, Result};
use crate::format::{Format, HEAD_BYTES};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::FileEntry;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::source::Source;
use crate::transfer::{Attempts, Retry};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use sha2::Digest as _;
use std::ops::Range;
use std::sync::Arc;

/// One file of an artifact that is read from its source and not stored.
#[derive(Debug, Clone)]
pub struct UncachedFile {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The path of the file in the artifact.
    pub path: FilePath,
    entry: FileEntry,
    /// The sources, best first. There is at least one.
    sources: Vec<Arc<dyn Source>>,
    retry: Retry,
}

impl Cache {
    /// Opens one file of the artifact for reading from the remote or the origin, without storing it. It is meant for
    /// files for which [`open_file`](Self::open_file) fails with `Full`.
    ///
    /// # Errors
    /// As for [`open_file`](Self::open_file).
    pub async fn open_uncached(&self, reference: &Reference, options: &OpenOptions) -> Result<UncachedFile> {
        let progress = Progress::new();
        let request = self.resolve(reference, &options.as_get(reference)?, &progress).await;
        let mut request = request.map_err(|error| error.artifact(reference))?;
        let opened = async {
            let plan = self.plan_ahead(&mut request, &progress).await?;
            let path = plan.only_file()?;
            let sources = plan.sources_of(&path)?;
            let entry = plan.selected.iter().find(|(selected, _)| *selected == path).map(|(_, entry)| entry.clone());
            let (key, entry) = (plan.listing.key.clone(), entry.unwrap_or_default());
            let file = UncachedFile { key, path, entry, sources, retry: self.0.downloader.retry().clone() };
            if self.0.config.forbid.has_formats() {
                let head_range = 0..file.size().min(HEAD_BYTES as u64);
                let head: Vec<Bytes> = file.read(head_range).try_collect().await?;
                self.0.config.forbid.check([(&file.path, Some(Format::of(&head.concat(), file.size())))])?;
            }
            Ok(file)
        };
        opened.await.map_err(|error: Error| error.artifact(reference))
    }
}

impl UncachedFile {
    /// Returns the size of the file in bytes.
    pub fn size(&self) -> u64 {
        self.entry.size
    }

    /// Streams `range` (in bytes, end exclusive). A broken connection is resumed where it broke; a source that fails
    /// for good is replaced by the next one.
    ///
    /// A stream of the whole file ends with `Corrupt` in place of its last chunk if the digest of the file does not
    /// match. A smaller range cannot be verified.
    pub fn read(&self, range: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
        let is_whole = range == (0..self.entry.size);
        let reading = Reading {
            attempts: self.retry.attempts(),
            hash: is_whole.then(|| ContentHash::of(&self.entry)).flatten(),
            file: self.clone(),
            source: 0,
            body: None,
            left: range,
        };
        futures::stream::try_unfold(reading, |mut reading| async move {
            let chunk = reading.next_chunk().await?;
            Ok(chunk.map(|chunk| (chunk, reading)))
        })
        .boxed()
    }
}

/// A running read of an [`UncachedFile`].
struct Reading {
    file: UncachedFile,
    /// The index of the present source.
    source: usize,
    attempts: Attempts,
    /// The body of the present request.
    body: Option<BoxStream<'static, Result<Bytes>>>,
    /// The bytes that are still to be read.
    left: Range<u64>,
    /// The hash of the bytes so far; `None` if they cannot be verified.
    hash: Option<ContentHash>,
}

impl Reading {
    /// Returns the next chunk; `None` at the end of the range.
    async fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        while !self.left.is_empty() {
            let error = match self.try_next_chunk().await {
                Ok(chunk) => {
                    // Verify before the last chunk is passed on, so that a caller never receives a complete file with
                    // wrong bytes.
                    if self.left.is_empty() {
                        self.verify()?;
                    }
                    return Ok(Some(chunk));
                }
                Err(error) => error,
            };
            self.body = None;
            // The next attempt continues after the last byte that was passed on.
            match self.attempts.pause(error).await {
                Ok(()) => {}
                Err(_) if self.source + 1 < self.file.sources.len() => {
                    (self.source, self.attempts) = (self.source + 1, self.file.retry.attempts());
                }
                Err(error) => return Err(error.artifact(&self.file.key)),
            }
        }
        Ok(None)
    }

    /// Reads one chunk from the present body. Requests a body first if there is none.
    async fn try_next_chunk(&mut self) -> Result<Bytes> {
        let body = match &mut self.body {
            Some(body) => body,
            None => {
                let source = &self.file.sources[self.source];
                let body = source.read(&self.file.path, self.left.clone()).await?;
                // A server that ignores ranges sends the file from its beginning.
                let skipped = self.left.start.saturating_sub(body.start);
                self.body.insert(skip_bytes(body.stream, skipped))
            }
        };
        let cut = || Error::unavailable(format!("{}: the connection ended early", self.file.path));
        let mut chunk = body.try_next().await?.ok_or_else(cut)?;
        let left = self.left.end - self.left.start;
        if chunk.len() as u64 > left {
            if self.left.end == self.file.entry.size {
                let path = &self.file.path;
                return Err(Error::corrupt(format!("{path}: the server sent more bytes than the file has")));
            }
            // A server that ignores ranges sends the file to its end.
            chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        }
        self.left.start += chunk.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(&chunk);
        }
        self.attempts = self.file.retry.attempts();
        Ok(chunk)
    }

    /// Compares the digest of the bytes with that of the file, if the range is the whole file and a digest is known.
    fn verify(&mut self) -> Result<()> {
        let (path, tier) = (&self.file.path, self.file.sources[self.source].tier());
        match self.hash.take().is_none_or(|hash| hash.matches(&self.file.entry)) {
            true => Ok(()),
            false => Err(Error::corrupt(format!("{path}: the bytes do not match the digest"))
                .artifact(&self.file.key)
                .tier(tier)),
        }
    }
}

/// Drops the first `bytes` bytes of a stream.
fn skip_bytes(stream: BoxStream<'static, Result<Bytes>>, bytes: u64) -> BoxStream<'static, Result<Bytes>> {
    let skipped = stream.scan(bytes, |left, chunk| {
        let chunk = chunk.map(|mut chunk| {
            let dropped = (*left).min(chunk.len() as u64);
            *left -= dropped;
            chunk.split_off(usize::try_from(dropped).unwrap_or(usize::MAX))
        });
        std::future::ready(Some(chunk))
    });
    skipped.try_filter(|chunk| std::future::ready(!chunk.is_empty())).boxed()
}

/// The running hash by which the content of a file is verified.
enum ContentHash {
    Sha256(sha2::Sha256),
    Git(sha1::Sha1),
}

impl ContentHash {
    /// Returns the hash that the entry has a digest for; `None` if it has none.
    fn of(entry: &FileEntry) -> Option<Self> {
        match (entry.sha256, entry.git_oid) {
            (Some(_), _) => Some(Self::Sha256(sha2::Sha256::new())),
            (None, Some(_)) => Some(Self::Git(GitOid::hasher(entry.size))),
            (None, None) => None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
        }
    }

    /// Returns true if the digest of the bytes is that of the entry.
    fn matches(self, entry: &FileEntry) -> bool {
        match self {
            Self::Sha256(hash) => entry.sha256 == Some(Digest::from_bytes(hash.finalize().into())),
            Self::Git(hash) => entry.git_oid == Some(GitOid::finish(hash)),
        }
    }
}
