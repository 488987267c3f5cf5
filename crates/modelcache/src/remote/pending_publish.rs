//! Publishing that begins before the files are proven: they are sent while they are read or filled for the first time.
//!
//! ```text
//! 1 look, refuse, claim    as any publish does, but for a place where nothing is and without waiting for another writer
//! 2 begin                  a multipart upload for each large file that no other version has; the claim names them
//! 3 send                   parts as they come, whoever has them
//! 4 publish                what is proven by then is completed; the rest goes the usual way
//! ```
//!
//! Nothing is visible before 4, not even an object: dropped before, the uploads are aborted and the claim is given back.

use super::claim::Claim;
use super::multipart::{Multipart, SINGLE_BYTES_MAX};
use super::publish::{LOOKS_IN_FLIGHT, PublishJob, RemoteManifest};
use super::{Folder, Remote, dedup_source, orphaned_uploads};
use crate::digest::Digest;
use crate::disk::LocalFile;
use crate::error::{Error, Result};
use crate::key::FilePath;
use crate::ladder::PartHasher;
use crate::manifest::{FileEntry, Manifest};
use crate::progress::Progress;
use crate::transfer::{spawn_cleanup, within};
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::PathBuf;
use std::time::Duration;

/// How long a remote may take to say whether sending can begin.
const BEGIN_MAX: Duration = Duration::from_secs(5);
/// Bytes read at a time.
const SLICE_BYTES: usize = 1 << 20;

/// A publish that has begun.
pub(crate) struct PendingPublish(Option<Inner>);

impl std::fmt::Debug for PendingPublish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Begun").field(&self.paths()).finish()
    }
}

struct Inner {
    claim: Claim,
    /// Whether the place was seen to hold nobody else's objects.
    checked: bool,
    uploads: BTreeMap<FilePath, Multipart>,
    /// Those whose bytes are all on their way, and what they are.
    sent: BTreeMap<FilePath, (Multipart, Digest)>,
}

/// What a publish goes on with.
pub(super) struct Opened {
    pub(super) claim: Claim,
    pub(super) checked: bool,
    /// Files that were sent already, and what was.
    pub(super) sent: BTreeMap<FilePath, (Multipart, Digest)>,
}

impl Remote {
    /// Begins to publish `manifest`, whose digests need not be known. `None` where there is nothing to begin with, or
    /// something in the way: whoever publishes then will see what.
    ///
    /// `files` are where files lie that can be read already.
    pub(crate) async fn begin(
        &self,
        manifest: &Manifest,
        paths: &BTreeSet<FilePath>,
        files: &BTreeMap<FilePath, LocalFile>,
        sidecars: bool,
    ) -> Option<PendingPublish> {
        if self.is_read_only() || self.refuses_writes() {
            return None;
        }
        match within(BEGIN_MAX, begin(self, manifest, paths, files, sidecars)).await? {
            Ok(begun) => begun,
            Err(error) => {
                tracing::debug!(artifact = %manifest.key, %error, "nothing is sent yet");
                None
            }
        }
    }
}

async fn begin(
    remote: &Remote,
    manifest: &Manifest,
    paths: &BTreeSet<FilePath>,
    files: &BTreeMap<FilePath, LocalFile>,
    sidecars: bool,
) -> Result<Option<PendingPublish>> {
    let large = |(path, entry): &(&FilePath, &FileEntry)| paths.contains(*path) && entry.size > SINGLE_BYTES_MAX;
    let large: BTreeMap<_, _> = manifest.files.iter().filter(large).collect();
    let store = remote.store().await?;
    if large.is_empty() || store.bucket().is_none() {
        return Ok(None);
    }
    let (folder, rewrite, progress) = (Folder::new(&manifest.key), BTreeSet::new(), Progress::new());
    let places: BTreeMap<_, _> = paths.iter().map(|path| (path.clone(), LocalFile::from(PathBuf::new()))).collect();
    let job = PublishJob {
        remote,
        store,
        folder,
        manifest,
        files: &places,
        force: false,
        rewrite: &rewrite,
        sidecars,
        progress: &progress,
    };
    job.refuse_sidecar_clash()?;
    if !matches!(job.look().await?, RemoteManifest::Nothing) {
        return Ok(None);
    }
    let checked = job.refuse_place().await?;
    let (dedup_sources, mut lone) = (dedup_source::possible(store, &job.folder).await, Vec::new());
    for (path, entry) in large {
        if !may_be_one_of(&dedup_sources, entry, files.get(path)).await {
            lone.push((path.clone(), entry.size));
        }
    }
    if lone.is_empty() {
        return Ok(None);
    }
    let claim = Claim::take_within(remote, &job.folder, job.claimed(&RemoteManifest::Nothing), Duration::ZERO).await?;
    orphaned_uploads::abort_abandoned(store, &job.folder, &claim).await;
    let mut begun = PendingPublish(Some(Inner { claim, checked, uploads: BTreeMap::new(), sent: BTreeMap::new() }));
    match begun.begin_uploads(&job, lone).await {
        Ok(()) => Ok(Some(begun)),
        Err(error) => {
            begun.abandon().await;
            Err(error)
        }
    }
}

/// Whether another version may have this file already: then the server copies it, once its digest is known.
async fn may_be_one_of(dedup_sources: &[FileEntry], entry: &FileEntry, file: Option<&LocalFile>) -> bool {
    for dedup_source in dedup_sources.iter().filter(|dedup_source| dedup_source.size == entry.size) {
        let differs = match (entry.sha256, dedup_source.sha256, file) {
            (Some(ours), Some(theirs), _) => ours != theirs,
            (None, Some(_), Some(file)) => {
                let (file, dedup_source) = (file.clone(), dedup_source.clone());
                tokio::task::spawn_blocking(move || differs_at_first(&file, &dedup_source)).await.unwrap_or(false)
            }
            _ => false,
        };
        if !differs {
            return true;
        }
    }
    false
}

/// Whether the first part of a file is another than that of `twin`, as its ladder tells.
fn differs_at_first(file: &LocalFile, dedup_source: &FileEntry) -> bool {
    let Some((ladder, rung)) = dedup_source.ladder.as_ref().and_then(|ladder| Some((ladder, ladder.after(0)?))) else {
        return false;
    };
    let read = || {
        let (mut part, mut hasher) = (file.open()?.take(ladder.part_size()), PartHasher::new());
        let mut buffer = vec![0; SLICE_BYTES];
        loop {
            match part.read(&mut buffer)? {
                0 => return std::io::Result::Ok(hasher.state()),
                read => hasher.update(&buffer[..read]),
            }
        }
    };
    read().is_ok_and(|state| state != Some(rung))
}

impl PendingPublish {
    async fn begin_uploads(&mut self, job: &PublishJob<'_>, files: Vec<(FilePath, u64)>) -> Result<()> {
        let Some(Inner { claim, uploads, .. }) = &mut self.0 else { return Ok(()) };
        let begin = |(path, size): (FilePath, u64)| async move {
            let key = job.folder.object(job.store, &path)?;
            Ok::<_, Error>((path, Multipart::begin(job.store, &job.remote.0.upload_memory, &key, size).await?))
        };
        // Cut off before they are noted, some may be there that nobody can name: the next writer looks.
        claim.touch();
        let begins: Vec<_> = files.into_iter().map(begin).collect();
        let mut begins = futures::stream::iter(begins).buffer_unordered(LOOKS_IN_FLIGHT);
        while let Some(multipart) = begins.next().await {
            let (path, multipart) = multipart?;
            uploads.insert(path, multipart);
        }
        drop(begins);
        let ids = uploads.iter().map(|(path, multipart)| (multipart.id().to_owned(), path.clone()));
        claim.notes().uploads(ids.collect::<Vec<_>>()).await;
        if claim.inherited.is_empty() {
            claim.settle();
        }
        Ok(())
    }

    /// The upload of a file, for whoever sends its parts.
    pub(crate) fn take(&mut self, path: &FilePath) -> Option<Multipart> {
        self.0.as_mut()?.uploads.remove(path)
    }

    /// The files that can be sent.
    pub(crate) fn paths(&self) -> Vec<FilePath> {
        self.0.iter().flat_map(|inner| inner.uploads.keys().cloned()).collect()
    }

    /// It will not be sent: it is aborted with whatever else is not published.
    pub(crate) fn give_up(&mut self, path: FilePath, multipart: Multipart) {
        if let Some(inner) = &mut self.0 {
            inner.uploads.insert(path, multipart);
        }
    }

    /// All parts are on their way, and this is what they are.
    pub(crate) fn put_back(&mut self, path: FilePath, multipart: Multipart, sha256: Digest) {
        if let Some(inner) = &mut self.0 {
            inner.sent.insert(path, (multipart, sha256));
        }
    }

    /// Takes everything back, and waits until that is done.
    pub(crate) async fn abandon(mut self) {
        if let Some(inner) = self.0.take() {
            inner.abandon().await;
        }
    }

    pub(super) async fn open(mut self) -> Option<Opened> {
        let mut inner = self.0.take()?;
        inner.abort_uploads().await;
        let Inner { claim, checked, sent, .. } = inner;
        Some(Opened { claim, checked, sent })
    }
}

impl Drop for PendingPublish {
    fn drop(&mut self) {
        if let Some(inner) = self.0.take() {
            spawn_cleanup(inner.abandon());
        }
    }
}

impl Inner {
    async fn abandon(mut self) {
        let sent = std::mem::take(&mut self.sent).into_iter().map(|(path, (multipart, _))| (path, multipart));
        self.uploads.extend(sent);
        self.abort_uploads().await;
        if let Err(error) = self.claim.abandon().await {
            tracing::debug!(%error, "a claim is left to end by itself");
        }
    }

    /// What does not go is left to whoever looks at the claim.
    async fn abort_uploads(&mut self) {
        if !abort_all(std::mem::take(&mut self.uploads).into_values()).await {
            self.claim.touch();
        }
    }
}

/// Aborts uploads; whether all are gone.
pub(super) async fn abort_all(uploads: impl Iterator<Item = Multipart>) -> bool {
    let aborts: Vec<_> = uploads.map(Multipart::abort).collect();
    let gone: Vec<bool> = futures::stream::iter(aborts).buffer_unordered(LOOKS_IN_FLIGHT).collect().await;
    gone.into_iter().all(|gone| gone)
}
