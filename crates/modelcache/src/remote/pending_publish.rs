//! Publishes that start before the digests of the files are known: large files are uploaded while they are downloaded
//! or read for the first time.
//!
//! [`Remote::begin`] acquires the claim and creates a multipart upload for each large file. The caller sends the parts.
//! [`Remote::publish_pending`] then completes the uploads of verified files, and uploads all other files. No object is
//! visible before that. If the pending publish is dropped, its uploads are aborted and its claim is released.

use super::claim::Claim;
use super::multipart::{Multipart, SINGLE_BYTES_MAX};
use super::publish::{PublishJob, RemoteManifest, SMALL_REQUESTS_IN_FLIGHT};
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

/// Timeout of [`Remote::begin`]. A slow remote must not delay the download.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Size of one read of a local file, in bytes.
const SLICE_BYTES: usize = 1 << 20;

/// A publish that holds the claim and uploads files, but is not visible yet.
pub(crate) struct PendingPublish(Option<PendingInner>);

impl std::fmt::Debug for PendingPublish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PendingPublish").field(&self.paths()).finish()
    }
}

struct PendingInner {
    claim: Claim,
    /// True if the version folder was found to hold no unmanaged objects.
    no_unmanaged: bool,
    /// Uploads whose parts are not all sent.
    uploads: BTreeMap<FilePath, Multipart>,
    /// Uploads whose parts are all sent, with the digest of the file.
    sent: BTreeMap<FilePath, (Multipart, Digest)>,
}

/// The state with which a publish continues under its claim.
pub(super) struct ClaimedPublish {
    pub(super) claim: Claim,
    /// True if the version folder was found to hold no unmanaged objects.
    pub(super) no_unmanaged: bool,
    /// Uploads whose parts are all sent, with the digest of the file.
    pub(super) sent: BTreeMap<FilePath, (Multipart, Digest)>,
}

impl Remote {
    /// Starts to publish the files `paths` of `manifest`. Their digests need not be known. `files` contains those that
    /// exist on this disk already.
    ///
    /// Returns `None` if no file is large enough to be uploaded early, if a manifest is published already, or if an
    /// early upload is not possible, for instance because another writer holds the claim. The publish that follows
    /// reports the reason if it persists.
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
        match within(BEGIN_TIMEOUT, begin(self, manifest, paths, files, sidecars)).await? {
            Ok(pending) => pending,
            Err(error) => {
                tracing::debug!(artifact = %manifest.key, %error, "cannot start the upload early");
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
    // Small files are uploaded in one request after their digest is verified.
    let large = |(path, entry): &(&FilePath, &FileEntry)| paths.contains(*path) && entry.size > SINGLE_BYTES_MAX;
    let large: BTreeMap<_, _> = manifest.files.iter().filter(large).collect();
    let store = remote.store().await?;
    if large.is_empty() || store.backend().uploads().is_none() {
        return Ok(None);
    }
    let (folder, rewrite, progress) = (Folder::new(&manifest.key), BTreeSet::new(), Progress::new());
    // The checks of the job need the paths in the artifact only, so the local paths are empty.
    let pathless_files: BTreeMap<_, _> =
        paths.iter().map(|path| (path.clone(), LocalFile::from(PathBuf::new()))).collect();
    let job = PublishJob {
        remote,
        store,
        folder,
        manifest,
        files: &pathless_files,
        force: false,
        rewrite: &rewrite,
        sidecars,
        progress: &progress,
    };
    // Step 1: check as every publish does, but require that no manifest exists.
    job.refuse_sidecar_clash()?;
    if !matches!(job.read_manifest().await?, RemoteManifest::Nothing) {
        return Ok(None);
    }
    let no_unmanaged = job.check_version_folder().await?;
    // Step 2: select the files that no other version contains. The server copies the others at the publish.
    let (candidates, mut unique) = (dedup_source::candidates(store, &job.folder).await, Vec::new());
    for (path, entry) in large {
        if !may_be_duplicate(&candidates, entry, files.get(path)).await {
            unique.push((path.clone(), entry.size));
        }
    }
    if unique.is_empty() {
        return Ok(None);
    }
    // Step 3: acquire the claim, without waiting for another writer.
    let claim =
        Claim::acquire_within(remote, &job.folder, job.files_to_claim(&RemoteManifest::Nothing), Duration::ZERO)
            .await?;
    orphaned_uploads::abort_abandoned(store, &job.folder, &claim).await;
    let mut pending =
        PendingPublish(Some(PendingInner { claim, no_unmanaged, uploads: BTreeMap::new(), sent: BTreeMap::new() }));
    // Step 4: create the multipart uploads and record them in the claim.
    match pending.begin_uploads(&job, unique).await {
        Ok(()) => Ok(Some(pending)),
        Err(error) => {
            pending.abandon().await;
            Err(error)
        }
    }
}

/// Returns true if one of `candidates`, the files of other versions, may have the content of `entry`. The server can
/// then copy the object once the digest is known.
async fn may_be_duplicate(candidates: &[FileEntry], entry: &FileEntry, file: Option<&LocalFile>) -> bool {
    for candidate in candidates.iter().filter(|candidate| candidate.size == entry.size) {
        let differs = match (entry.sha256, candidate.sha256, file) {
            (Some(ours), Some(theirs), _) => ours != theirs,
            // The size is equal and the digest unknown: compare the first part instead of hashing the whole file.
            (None, Some(_), Some(file)) => {
                let (file, candidate) = (file.clone(), candidate.clone());
                tokio::task::spawn_blocking(move || first_part_differs(&file, &candidate)).await.unwrap_or(false)
            }
            _ => false,
        };
        if !differs {
            return true;
        }
    }
    false
}

/// Returns true if the first part of the local file differs from that of `candidate`, according to the first checkpoint
/// of its ladder. Returns false if `candidate` has no checkpoint or the local file cannot be read.
fn first_part_differs(file: &LocalFile, candidate: &FileEntry) -> bool {
    let Some((ladder, checkpoint)) = candidate.ladder.as_ref().and_then(|ladder| Some((ladder, ladder.after(0)?)))
    else {
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
    read().is_ok_and(|state| state != Some(checkpoint))
}

impl PendingPublish {
    /// Creates a multipart upload for each file and records them in the claim.
    async fn begin_uploads(&mut self, job: &PublishJob<'_>, files: Vec<(FilePath, u64)>) -> Result<()> {
        let Some(PendingInner { claim, uploads, .. }) = &mut self.0 else { return Ok(()) };
        let begin = |(path, size): (FilePath, u64)| async move {
            let key = job.folder.object(job.store, &path)?;
            Ok::<_, Error>((path, Multipart::begin(job.store, &job.remote.0.upload_memory, &key, size).await?))
        };
        // If this future is cancelled before the uploads are recorded, their ids are lost. The claim must then stay, so
        // that the next writer takes it over and lists the uploads of the folder.
        claim.keep_record_on_release();
        let begins: Vec<_> = files.into_iter().map(begin).collect();
        let mut begins = futures::stream::iter(begins).buffer_unordered(SMALL_REQUESTS_IN_FLIGHT);
        while let Some(multipart) = begins.next().await {
            let (path, multipart) = multipart?;
            uploads.insert(path, multipart);
        }
        drop(begins);
        let ids = uploads.iter().map(|(path, multipart)| (multipart.id().to_owned(), path.clone()));
        claim.upload_registry().register(ids.collect::<Vec<_>>()).await;
        // Recorded uploads do not count as leftovers, because they are aborted by id before the claim is released.
        if claim.taken_over_files.is_empty() {
            claim.remove_record_on_release();
        }
        Ok(())
    }

    /// Takes the upload of a file, so that the caller can send its parts.
    pub(crate) fn take_upload(&mut self, path: &FilePath) -> Option<Multipart> {
        self.0.as_mut()?.uploads.remove(path)
    }

    /// Returns the files whose upload was created and not taken.
    pub(crate) fn paths(&self) -> Vec<FilePath> {
        self.0.iter().flat_map(|inner| inner.uploads.keys().cloned()).collect()
    }

    /// Takes back an upload that failed or is not needed. The publish aborts it.
    pub(crate) fn discard(&mut self, path: FilePath, multipart: Multipart) {
        if let Some(inner) = &mut self.0 {
            inner.uploads.insert(path, multipart);
        }
    }

    /// Takes back an upload whose parts are all sent, with the digest of the file.
    pub(crate) fn add_sent(&mut self, path: FilePath, multipart: Multipart, sha256: Digest) {
        if let Some(inner) = &mut self.0 {
            inner.sent.insert(path, (multipart, sha256));
        }
    }

    /// Aborts all uploads, releases the claim, and waits for both.
    pub(crate) async fn abandon(mut self) {
        if let Some(inner) = self.0.take() {
            inner.abandon().await;
        }
    }

    /// Aborts the incomplete uploads and returns the state for the publish.
    pub(super) async fn into_claimed(mut self) -> Option<ClaimedPublish> {
        let mut inner = self.0.take()?;
        inner.abort_uploads().await;
        let PendingInner { claim, no_unmanaged, sent, .. } = inner;
        Some(ClaimedPublish { claim, no_unmanaged, sent })
    }
}

impl Drop for PendingPublish {
    fn drop(&mut self) {
        if let Some(inner) = self.0.take() {
            spawn_cleanup(inner.abandon());
        }
    }
}

impl PendingInner {
    async fn abandon(mut self) {
        let sent = std::mem::take(&mut self.sent).into_iter().map(|(path, (multipart, _))| (path, multipart));
        self.uploads.extend(sent);
        self.abort_uploads().await;
        if let Err(error) = self.claim.abandon().await {
            tracing::debug!(%error, "cannot release a claim; it expires by itself");
        }
    }

    /// Aborts the incomplete uploads. If one cannot be aborted, the claim stays, and the next writer aborts it.
    async fn abort_uploads(&mut self) {
        if !abort_all(std::mem::take(&mut self.uploads).into_values()).await {
            self.claim.keep_record_on_release();
        }
    }
}

/// Aborts uploads concurrently. Returns true if the store confirmed that none of them exists any more.
pub(super) async fn abort_all(uploads: impl Iterator<Item = Multipart>) -> bool {
    let aborts: Vec<_> = uploads.map(Multipart::abort).collect();
    let gone: Vec<bool> = futures::stream::iter(aborts).buffer_unordered(SMALL_REQUESTS_IN_FLIGHT).collect().await;
    gone.into_iter().all(|gone| gone)
}
