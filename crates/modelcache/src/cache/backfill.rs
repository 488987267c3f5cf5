//! Backfill: uploading files that came from an origin to the remote, at once, in the background, or by a later run.
//!
//! In every mode except [`Backfill::Never`], a pending upload is recorded durably before the artifact is published on
//! disk, and removed once the remote has the files. A crash or an unreachable remote therefore delays the upload, but
//! does not lose it. Pending uploads are completed by [`Cache::backfill_pending`] and, with [`Backfill::Wait`] and
//! [`Backfill::Background`], at the end of every run that reached the remote. A hit never waits for them. An upload
//! that can never succeed is dropped with a warning.
//!
//! An artifact that was put while no remote was configured is recorded, too. Only [`Cache::backfill_pending`] uploads
//! it.
//!
//! If the remote refuses a write because of a missing permission, this is reported once, and the remote counts as
//! read-only until the process ends.

use super::plan::FillPlan;
use super::tasks::Tasks;
use super::{BackfillReport, Cache, PendingBackfill};
use crate::config::Backfill;
use crate::disk::{
    AcquireOutcome, Disk, FileLock, HeartbeatWatch, Leadership, LeasedArtifact, LocalFile, MissingFiles, NO_REMOTE,
    PendingUpload,
};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::option_name::setting::REMOTE;
use crate::progress::{Phase, Progress};
use crate::remote::{PendingPublish, PublishOptions, PublishedBytes, Remote, StreamingUpload, VerifiedFiles};
use crate::selection::Selection;
use crate::transfer::DownloadFile;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for the backfill lock or the lease of an artifact. After that the upload stays pending.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Time between two attempts to get the backfill lock or the lease.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The state of the backfills of this process.
#[derive(Debug, Default)]
pub(super) struct Backfills {
    /// Background uploads.
    tasks: Tasks,
    /// True if the last use of the remote succeeded, so that pending uploads of earlier runs can be completed.
    remote_usable: AtomicBool,
    /// Held while pending uploads are completed, so that only one task does it.
    completing: tokio::sync::Mutex<()>,
}

/// The upload that follows a fill.
#[derive(Debug)]
pub(super) struct BackfillJob {
    missing: MissingFiles,
    /// True if the remote is unreachable, so that a later run has to upload the files.
    remote_down: bool,
    /// True if the pending upload is recorded in the local directory.
    is_recorded: bool,
    /// The upload that ran during the download, and the verified files.
    streaming: Option<(StreamingUpload, VerifiedFiles)>,
}

impl BackfillJob {
    pub(super) fn new(
        missing: MissingFiles,
        remote_down: bool,
        streaming: Option<(StreamingUpload, VerifiedFiles)>,
    ) -> Self {
        Self { missing, remote_down, is_recorded: false, streaming }
    }
}

impl Cache {
    /// Returns the configured backfill mode.
    pub(super) fn backfill_mode(&self) -> Backfill {
        self.0.config.backfill.unwrap_or_default()
    }

    /// Returns true if downloaded files may be uploaded to the remote, now or later.
    pub(super) fn may_backfill(&self) -> bool {
        let remote = self.0.remote.as_ref().filter(|remote| !remote.is_read_only());
        remote.is_some() && self.backfill_mode() != Backfill::Never
    }

    /// Starts to upload the files during their download, if the backfill is not deferred and the remote does not have
    /// the artifact.
    pub(super) fn start_streaming_upload(
        &self,
        plan: &FillPlan,
        to_download: &mut BTreeMap<String, DownloadFile>,
    ) -> Option<StreamingUpload> {
        let is_immediate = matches!(self.backfill_mode(), Backfill::Wait | Backfill::Background) && self.may_backfill();
        let is_new = plan.remote.is_none() && !plan.remote_unusable && !plan.remote_unmanaged && !plan.origin_in_remote;
        let remote = self.0.remote.as_ref().filter(|_| is_immediate && is_new && !to_download.is_empty())?;
        let files = to_download.values().map(|file| (file.path.clone(), file.partial_file.clone())).collect();
        let (streaming_upload, sink) = StreamingUpload::start(remote, plan.listing.clone(), files);
        to_download.values_mut().for_each(|file| file.on_part = Some(sink.clone()));
        Some(streaming_upload)
    }

    /// Records the pending upload durably. If that fails, the upload is still attempted after the fill.
    pub(super) async fn record_pending_upload(
        &self,
        key: &ArtifactKey,
        job: Option<BackfillJob>,
    ) -> Option<BackfillJob> {
        let (Some(job), Some(remote)) = (job, &self.0.remote) else { return None };
        let (owned_key, url, missing) = (key.clone(), remote.url().to_owned(), job.missing.clone());
        let recorded = self.on_disk(move |disk| disk.record_pending_upload(&owned_key, &url, &missing)).await;
        if let Err(error) = &recorded {
            tracing::warn!(
                %key, %error,
                "cannot record the pending upload; if the upload fails, no later run retries it"
            );
        }
        Some(BackfillJob { is_recorded: recorded.is_ok(), ..job })
    }

    /// Records the pending upload again if the record was removed. An eviction of other files of the artifact removes
    /// the record if it happens before this fill publishes and leases the artifact.
    pub(super) async fn restore_pending_upload(
        &self,
        key: &ArtifactKey,
        job: Option<BackfillJob>,
    ) -> Option<BackfillJob> {
        let (Some(job), Some(remote)) = (job, &self.0.remote) else { return None };
        match self.pending_upload(remote, key).await {
            Ok(Some(_)) => Some(job),
            _ => self.record_pending_upload(key, Some(job)).await,
        }
    }

    /// Step 7 of the main path: uploads the missing files, depending on the backfill mode. A failure is logged and does
    /// not fail the get.
    pub(super) async fn backfill(
        &self,
        leased: &Arc<LeasedArtifact>,
        job: Option<BackfillJob>,
        progress: &Progress,
    ) -> PublishedBytes {
        let Some(job) = job else { return PublishedBytes::default() };
        if job.remote_down {
            let artifact = &leased.manifest.key;
            tracing::info!(%artifact, "the remote is unreachable; a later run uploads this artifact");
            return PublishedBytes::default();
        }
        match self.backfill_mode() {
            Backfill::Wait => self.upload(leased, job, progress).await,
            Backfill::Background => {
                // The task holds the lease until the upload ends.
                let (cache, leased) = (self.clone(), leased.clone());
                self.0.backfills.tasks.add(tokio::spawn(async move {
                    let published = cache.upload(&leased, job, &Progress::new()).await;
                    cache.metrics().record_background_upload(published.uploaded_bytes, published.copied_bytes);
                    cache.complete(&Progress::new()).await;
                }));
                PublishedBytes::default()
            }
            Backfill::Later | Backfill::Never => PublishedBytes::default(),
        }
    }

    /// Uploads the files that this process has just downloaded. Logs a failure.
    async fn upload(&self, leased: &Arc<LeasedArtifact>, job: BackfillJob, progress: &Progress) -> PublishedBytes {
        let Some(remote) = &self.0.remote else { return PublishedBytes::default() };
        let (key, files) = (&leased.manifest.key, job.missing.files.clone());
        let Some(uploaded) = self.upload_under_lock(remote, leased, job, progress).await.transpose() else {
            return PublishedBytes::default();
        };
        self.metrics().record_health(Tier::Remote, &uploaded);
        match uploaded {
            Ok(published) => {
                self.set_remote_usable(true);
                published
            }
            Err(error) => {
                self.set_remote_usable(false);
                let dropped = self.drop_if_permanent(remote, key, &files, &error).await;
                log_failure(remote, &error, dropped);
                PublishedBytes::default()
            }
        }
    }

    /// Takes the backfill lock and uploads the files. Returns `None` if it did not contact the remote: the remote
    /// refuses writes, or another process uploads the files or has uploaded them.
    async fn upload_under_lock(
        &self,
        remote: &Remote,
        leased: &Arc<LeasedArtifact>,
        mut job: BackfillJob,
        progress: &Progress,
    ) -> Result<Option<PublishedBytes>> {
        let key = &leased.manifest.key;
        if let Some(refusal) = remote.refusal() {
            log_failure(remote, &refusal, false);
            return Ok(None);
        }
        // Step 1: take the backfill lock.
        let started = Instant::now();
        let _lock = loop {
            match self.backfill_lock(key).await? {
                Some(lock) => break lock,
                None if started.elapsed() > WAIT_MAX => {
                    tracing::info!(artifact = %key, "another process is uploading this artifact to the remote");
                    return Ok(None);
                }
                None => {
                    // Release the claim of the streaming upload: the process that holds the lock needs it.
                    drop(job.streaming.take());
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        };
        // Step 2: check the record. The process that held the lock before may have uploaded the files.
        if job.is_recorded && self.pending_upload(remote, key).await?.is_none() {
            return Ok(None);
        }
        // Step 3: complete the streaming upload, upload the other files and publish them.
        let pending = match job.streaming {
            Some((streaming_upload, proven)) => streaming_upload.finish(proven).await,
            None => None,
        };
        self.upload_and_publish(remote, leased, &job.missing, pending, progress).await.map(Some)
    }

    /// Uploads leased files and publishes them on the remote. Then removes them from the pending upload. The caller
    /// holds the backfill lock.
    async fn upload_and_publish(
        &self,
        remote: &Remote,
        leased: &LeasedArtifact,
        missing: &MissingFiles,
        pending: Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<PublishedBytes> {
        let key = &leased.manifest.key;
        let entries = missing.files.iter().filter_map(|path| leased.manifest.files.get(path));
        let _phase = progress.enter(Phase::Backfill, entries.map(|entry| entry.size).sum());
        let files = missing.files.iter().map(|path| (path.clone(), LocalFile::from(leased.dir.view(path)))).collect();
        let listing = Manifest::clone(&leased.manifest).without_holdings();
        let options = PublishOptions { rewrite: missing.rewrite.clone(), ..PublishOptions::default() };
        let published =
            remote.publish_pending(&listing, &files, options, pending, progress).await.context(key, Tier::Remote)?;
        self.metrics().update(|counts| counts.repaired_files.add(Tier::Remote, missing.rewrite.len() as u64));
        // Only after the publish: a crash before it leaves the upload pending.
        self.record_uploaded(remote, key, missing.files.clone()).await?;
        Ok(published)
    }

    /// Records that the remote has these files, so that they are not pending and not the only copies.
    pub(super) async fn record_uploaded(
        &self,
        remote: &Remote,
        key: &ArtifactKey,
        files: BTreeSet<FilePath>,
    ) -> Result<()> {
        let (key, url) = (key.clone(), remote.url().to_owned());
        self.on_disk(move |disk| disk.record_uploaded(&key, &url, &files)).await
    }

    /// Removes the pending upload if the error is permanent. Returns true if it is.
    async fn drop_if_permanent(
        &self,
        remote: &Remote,
        key: &ArtifactKey,
        files: &BTreeSet<FilePath>,
        error: &Error,
    ) -> bool {
        if !is_permanent(error) {
            return false;
        }
        if let Err(error) = self.remove_pending_files(remote, key, files).await {
            tracing::debug!(%error, "cannot remove a pending upload that cannot succeed");
        }
        true
    }

    /// Returns the pending uploads to any remote, and the artifacts that were put while no remote was configured.
    pub async fn pending_backfills(&self) -> Result<Vec<PendingBackfill>> {
        self.on_disk(pending).await
    }

    /// Completes all pending uploads to the configured remote, and uploads the artifacts that were put while no remote
    /// was configured. If one fails, the others are still attempted, unless the error concerns the remote as a whole:
    /// `Unavailable`, `Unauthorized` or `Invalid`.
    ///
    /// # Errors
    /// `Invalid` if no remote is configured or it is read-only. Errors of single uploads are in the report.
    pub async fn backfill_pending(&self, progress: &Progress) -> Result<BackfillReport> {
        let Some(remote) = &self.0.remote else {
            return Err(Error::invalid("no remote is configured")
                .hint(format!("set {REMOTE}, for instance s3://bucket/prefix")));
        };
        remote.ensure_read_write(|| "run it on a machine that may write to the remote".to_owned())?;
        let _guard = self.0.backfills.completing.lock().await;
        let url = remote.url().to_owned();
        self.on_disk(move |disk| {
            let pending = disk.pending_uploads()?;
            let mut without_remote = pending.iter().filter(|pending| pending.remote == NO_REMOTE);
            without_remote.try_for_each(|pending| disk.request_upload(&pending.key, &url))
        })
        .await?;
        self.complete_all(remote, progress).await
    }

    /// Waits for background uploads at the end of a run. If this process reached the remote, and the mode is
    /// [`Backfill::Wait`] or [`Backfill::Background`], also completes the pending uploads of earlier runs. Failures are
    /// only logged, because the requested work is already done.
    pub async fn finish_backfills(&self, progress: &Progress) -> BackfillReport {
        self.0.backfills.tasks.wait().await;
        match self.backfill_mode() {
            Backfill::Wait | Backfill::Background => self.complete(progress).await,
            Backfill::Later | Backfill::Never => BackfillReport::default(),
        }
    }

    /// Records whether the last use of the remote succeeded.
    pub(super) fn set_remote_usable(&self, is_usable: bool) {
        self.0.backfills.remote_usable.store(is_usable, Ordering::Relaxed);
    }

    /// Completes the pending uploads if the remote is writable and its last use succeeded. Does nothing if another task
    /// is completing them. Failures are logged.
    async fn complete(&self, progress: &Progress) -> BackfillReport {
        let is_usable = self.0.backfills.remote_usable.load(Ordering::Relaxed);
        let (Some(remote), true) = (self.0.remote.as_ref().filter(|remote| remote.is_writable()), is_usable) else {
            return BackfillReport::default();
        };
        let Ok(_guard) = self.0.backfills.completing.try_lock() else { return BackfillReport::default() };
        let report = self.complete_all(remote, progress).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot complete the pending uploads of earlier runs");
            BackfillReport::default()
        });
        self.metrics().record_background_upload(report.uploaded_bytes, report.copied_bytes);
        report.failed.iter().for_each(|(_, error)| log_failure(remote, error, false));
        report.dropped.iter().for_each(|(_, error)| log_failure(remote, error, true));
        report
    }

    /// Completes the pending uploads to `remote` one after the other.
    async fn complete_all(&self, remote: &Remote, progress: &Progress) -> Result<BackfillReport> {
        let mut report = BackfillReport::default();
        let pending_uploads = self.on_disk(move |disk| disk.pending_uploads()).await?;
        for PendingUpload { key, missing, .. } in
            pending_uploads.into_iter().filter(|pending_upload| pending_upload.remote == remote.url())
        {
            match self.complete_one(remote, &key, progress).await {
                Ok(UploadOutcome::Done(published)) => {
                    report.uploaded_bytes += published.uploaded_bytes;
                    report.copied_bytes += published.copied_bytes;
                    report.done.push(key);
                }
                Ok(UploadOutcome::Busy) => report.busy.push(key),
                Ok(UploadOutcome::Gone(why)) => report.dropped.push((key, why)),
                Err(error) => {
                    let dropped = self.drop_if_permanent(remote, &key, &missing.files, &error).await;
                    // These errors concern the remote or its configuration, so all further uploads would fail as well.
                    let concerns_remote =
                        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unauthorized | ErrorKind::Invalid);
                    if dropped { &mut report.dropped } else { &mut report.failed }.push((key, error));
                    if concerns_remote {
                        break;
                    }
                }
            }
        }
        // Also abort orphaned uploads of killed processes.
        remote.sweep_uploads().await;
        Ok(report)
    }

    /// Completes one pending upload.
    async fn complete_one(&self, remote: &Remote, key: &ArtifactKey, progress: &Progress) -> Result<UploadOutcome> {
        // Step 1: take the backfill lock, and read the record again under it.
        let Some(_lock) = self.backfill_lock(key).await? else { return Ok(UploadOutcome::Busy) };
        let Some(missing) = self.pending_upload(remote, key).await? else { return Ok(UploadOutcome::Busy) };
        // Step 2: lease the files that are on disk.
        let Some((leased, held)) = self.acquire_held(key, &missing).await? else {
            let gone = self.drop_absent(remote, key, &missing).await?;
            return Ok(gone.map_or(UploadOutcome::Busy, UploadOutcome::Gone));
        };
        // Step 3: upload them.
        let rewrite = missing.rewrite.intersection(&held).cloned().collect();
        let to_upload = MissingFiles { files: held.clone(), rewrite, ..MissingFiles::default() };
        let published = self.upload_and_publish(remote, &leased, &to_upload, None, progress).await?;
        // Step 4: drop the files that are no longer on disk from the pending upload.
        let absent: BTreeSet<_> = missing.files.difference(&held).cloned().collect();
        if !absent.is_empty()
            && let Some(why) = self.drop_absent(remote, key, &missing.only(&absent)).await?
        {
            tracing::debug!(error = %why, "some files of the pending upload are no longer on this disk");
        }
        Ok(UploadOutcome::Done(published))
    }

    /// Leases the files in `missing` (the remote lacks them) that are on disk with the recorded digests, and returns
    /// their paths; `None` if there are none.
    async fn acquire_held(
        &self,
        key: &ArtifactKey,
        missing: &MissingFiles,
    ) -> Result<Option<(LeasedArtifact, BTreeSet<FilePath>)>> {
        let started = Instant::now();
        loop {
            let (wanted, missing) = (key.clone(), missing.clone());
            let leased = self.on_disk(move |disk| {
                let Some(manifest) = disk.manifest(&wanted)? else { return Ok(None) };
                let held = missing.held_by(&manifest);
                if held.is_empty() {
                    return Ok(None);
                }
                let outcome = disk.acquire(&wanted, &Selection::files(held.iter().cloned()))?;
                // The manifest may have been replaced since it was read. Retry if the leased one holds other files.
                let is_same = |leased: &LeasedArtifact| missing.held_by(&leased.manifest) == held;
                Ok(match outcome {
                    AcquireOutcome::Leased(leased) if !is_same(&leased) => Some((AcquireOutcome::Absent, held)),
                    outcome => Some((outcome, held)),
                })
            });
            match leased.await? {
                None => return Ok(None),
                Some((AcquireOutcome::Leased(leased), held)) => return Ok(Some((*leased, held))),
                // An eviction is running, the manifest was replaced, or a damaged file was found and withdrawn.
                Some(_) if started.elapsed() < WAIT_MAX => tokio::time::sleep(POLL_INTERVAL).await,
                Some(_) => {
                    let error = Error::unavailable("cannot acquire a lease on the files to upload");
                    return Err(error.artifact(key).tier(Tier::Disk));
                }
            }
        }
    }

    /// Removes files that are not on disk from the pending upload, and returns the error that reports this. Keeps the
    /// files and returns `None` if a fill may be about to publish them.
    async fn drop_absent(&self, remote: &Remote, key: &ArtifactKey, missing: &MissingFiles) -> Result<Option<Error>> {
        // While another process fills the artifact, or has just published it, the files are not lost.
        let owned_key = key.clone();
        let leadership = self.on_disk(move |disk| disk.try_lead(&owned_key, &mut HeartbeatWatch::default())).await?;
        let Leadership::Ours(_leader) = leadership else { return Ok(None) };
        if self.acquire_held(key, missing).await?.is_some() {
            return Ok(None); // A fill has just published them. The next run uploads them.
        }
        self.remove_pending_files(remote, key, &missing.files).await?;
        let error = Error::not_found("the files left this disk before they were uploaded").artifact(key);
        Ok(Some(error.tier(Tier::Disk).hint("the next get of the artifact uploads it to the remote")))
    }

    /// Tries to take the backfill lock of `key`.
    async fn backfill_lock(&self, key: &ArtifactKey) -> Result<Option<FileLock>> {
        let key = key.clone();
        self.on_disk(move |disk| disk.try_backfill(&key)).await
    }

    /// Returns the files of `key` in the pending upload to `remote`.
    async fn pending_upload(&self, remote: &Remote, key: &ArtifactKey) -> Result<Option<MissingFiles>> {
        let (key, url) = (key.clone(), remote.url().to_owned());
        self.on_disk(move |disk| disk.pending_upload(&key, &url)).await
    }

    /// Removes `files` from the pending upload of `key` to `remote`.
    async fn remove_pending_files(&self, remote: &Remote, key: &ArtifactKey, files: &BTreeSet<FilePath>) -> Result<()> {
        let (key, url, files) = (key.clone(), remote.url().to_owned(), files.clone());
        self.on_disk(move |disk| disk.remove_from_pending_upload(&key, &url, &files)).await
    }
}

/// Result of [`Cache::complete_one`].
enum UploadOutcome {
    /// The files were uploaded.
    Done(PublishedBytes),
    /// Another process is uploading or filling the artifact, or has just uploaded it.
    Busy,
    /// The files are no longer on this disk, and the pending upload was removed.
    Gone(Error),
}

/// Logs a failed upload. A remote that refuses writes is reported only once.
fn log_failure(remote: &Remote, error: &Error, dropped: bool) {
    let hint = error.hint_text();
    if remote.refuses_writes() {
        if remote.mark_refusal_reported() {
            tracing::warn!(
                %error, hint,
                "the remote refuses writes; the artifact is available locally, and this process only reads the remote \
                 from now on"
            );
        }
    } else if dropped {
        tracing::warn!(%error, hint, "the upload to the remote failed and cannot succeed; it is not retried");
    } else {
        tracing::warn!(
            %error, hint,
            "the upload to the remote failed; the artifact is available locally, and a later run retries the upload"
        );
    }
}

/// Returns true if every further attempt of this upload would fail, however the remote is configured.
fn is_permanent(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Corrupt)
}

/// Returns the pending uploads to any remote, and the artifacts that were put while no remote was configured. Blocks.
pub(super) fn pending(disk: &Disk) -> Result<Vec<PendingBackfill>> {
    let report = |PendingUpload { key, remote, missing }: PendingUpload| {
        let manifest = disk.manifest(&key).ok().flatten();
        let entries = manifest.iter().flat_map(|manifest| &manifest.files);
        let held = entries.filter(|(path, entry)| missing.files.contains(*path) && entry.held.is_some());
        let bytes = held.map(|(_, entry)| entry.size).sum();
        let remote = Some(remote).filter(|remote| remote != NO_REMOTE);
        PendingBackfill { reference: key.to_string(), key, remote, files: missing.files.len(), bytes }
    };
    let mut pending: Vec<_> = disk.pending_uploads()?.into_iter().map(report).collect();
    // An artifact that was put without a remote has two records while a requested upload of it is pending: one for the
    // requested remote, and one without a remote. Report only the former.
    let requested: BTreeSet<_> = pending.iter().filter(|p| p.remote.is_some()).map(|p| p.key.clone()).collect();
    pending.retain(|pending| pending.remote.is_some() || !requested.contains(&pending.key));
    Ok(pending)
}
