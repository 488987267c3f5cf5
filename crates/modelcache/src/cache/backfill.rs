//! Backfill: the upload of files that came from an origin to the remote, at once, in the background, or by a later run.
//!
//! In every mode a pending upload is recorded durably before the artifact is published on disk, and removed once the
//! remote has the files. A crash or an unreachable remote therefore delays the upload, but does not lose it. Pending
//! uploads are completed by [`Cache::backfill_pending`], and at the end of every run that reached the remote. A hit
//! never waits for them. An upload that can never succeed is dropped with a warning.
//!
//! If the remote refuses a write because of a missing permission, this is reported once, and the remote counts as
//! read-only until the process ends.

use super::plan::FillPlan;
use super::tasks::Tasks;
use super::{BackfillReport, Cache, PendingBackfill};
use crate::config::Backfill;
use crate::disk::{
    AcquireOutcome, Disk, FileLock, Leadership, LeasedArtifact, LocalFile, Missing, PendingUpload, Watch,
};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::progress::{Phase, Progress};
use crate::remote::{PendingPublish, Proven, PublishOptions, Published, Remote, StreamingUpload};
use crate::selection::Selection;
use crate::transfer::DownloadFile;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for the backfill lock or the lease of an artifact. After that the upload stays pending.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Time between two attempts.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The state of the backfills of this process.
#[derive(Debug, Default)]
pub(super) struct Backfills {
    /// Background uploads.
    tasks: Tasks,
    /// True if the remote answered the last request, so that pending uploads of earlier runs can be completed.
    remote_answers: AtomicBool,
    /// Held while pending uploads are completed, so that only one task does it.
    completing: tokio::sync::Mutex<()>,
}

/// The upload that follows a fill.
#[derive(Debug)]
pub(super) struct ToBackfill {
    missing: Missing,
    /// True if the remote is unreachable, so that a later run has to upload.
    remote_down: bool,
    /// True if the pending upload is recorded in the local directory.
    is_recorded: bool,
    /// The upload that ran during the download, and the verified files.
    streaming: Option<(StreamingUpload, Proven)>,
}

impl ToBackfill {
    pub(super) fn new(missing: Missing, remote_down: bool, streaming: Option<(StreamingUpload, Proven)>) -> Self {
        Self { missing, remote_down, is_recorded: false, streaming }
    }
}

impl Cache {
    /// Returns the configured backfill mode.
    pub(super) fn backfill_mode(&self) -> Backfill {
        self.0.config.backfill.unwrap_or_default()
    }

    /// Returns true if downloaded files are to be uploaded to the remote, now or later.
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
        let is_now = matches!(self.backfill_mode(), Backfill::Wait | Backfill::Background) && self.may_backfill();
        let is_new = plan.remote.is_none() && !plan.remote_unusable && !plan.remote_unmanaged;
        let remote = self.0.remote.as_ref().filter(|_| is_now && is_new && !to_download.is_empty())?;
        let files = to_download.values().map(|file| (file.path.clone(), file.partial_file.clone())).collect();
        let (streaming_upload, sink) = StreamingUpload::start(remote, plan.listing.clone(), files);
        to_download.values_mut().for_each(|file| file.on_part = Some(sink.clone()));
        Some(streaming_upload)
    }

    /// Records the pending upload durably. If that fails, the upload is still attempted after the fill.
    pub(super) async fn record_pending_upload(&self, key: &ArtifactKey, to: Option<ToBackfill>) -> Option<ToBackfill> {
        let (Some(to), Some(remote)) = (to, &self.0.remote) else { return None };
        let (of, url, missing) = (key.clone(), remote.url().to_owned(), to.missing.clone());
        let recorded = self.on_disk(move |disk| disk.record_pending_upload(&of, &url, &missing)).await;
        if let Err(error) = &recorded {
            tracing::warn!(%key, %error, "cannot record the pending upload; if it fails, no later run tries again");
        }
        Some(ToBackfill { is_recorded: recorded.is_ok(), ..to })
    }

    /// Records the pending upload again if it was removed: an eviction of other files of the artifact, before this fill
    /// published and leased it, removes the record.
    pub(super) async fn restore_pending_upload(&self, key: &ArtifactKey, to: Option<ToBackfill>) -> Option<ToBackfill> {
        let (Some(to), Some(remote)) = (to, &self.0.remote) else { return None };
        match self.pending_upload(remote, key).await {
            Ok(Some(_)) => Some(to),
            _ => self.record_pending_upload(key, Some(to)).await,
        }
    }

    /// Step 7 of the main path: uploads the missing files, depending on the backfill mode. A failure is logged and does
    /// not fail the get.
    pub(super) async fn backfill(
        &self,
        leased: &Arc<LeasedArtifact>,
        to: Option<ToBackfill>,
        progress: &Progress,
    ) -> Published {
        let Some(to) = to else { return Published::default() };
        if to.remote_down {
            let artifact = &leased.manifest.key;
            tracing::info!(%artifact, "the remote does not answer; a later run uploads this artifact");
            return Published::default();
        }
        match self.backfill_mode() {
            Backfill::Wait => self.upload(leased, to, progress).await,
            Backfill::Background => {
                // The task holds the lease until the upload ends.
                let (cache, leased) = (self.clone(), leased.clone());
                self.0.backfills.tasks.keep(tokio::spawn(async move {
                    let published = cache.upload(&leased, to, &Progress::new()).await;
                    cache.metrics().uploaded(published.uploaded_bytes, published.copied_bytes);
                    cache.complete(&Progress::new()).await;
                }));
                Published::default()
            }
            Backfill::Later | Backfill::Never => Published::default(),
        }
    }

    /// Uploads the files that this process has just downloaded. Logs a failure.
    async fn upload(&self, leased: &Arc<LeasedArtifact>, to: ToBackfill, progress: &Progress) -> Published {
        let Some(remote) = &self.0.remote else { return Published::default() };
        let (key, files) = (&leased.manifest.key, to.missing.files.clone());
        let uploaded = self.upload_under_lock(remote, leased, to, progress).await;
        self.metrics().asked(Tier::Remote, &uploaded);
        match uploaded {
            Ok(published) => {
                self.note_remote(true);
                published
            }
            Err(error) => {
                self.note_remote(false);
                let dropped = self.drop_if_permanent(remote, key, &files, &error).await;
                log_failure(remote, &error, dropped);
                Published::default()
            }
        }
    }

    /// Takes the backfill lock and uploads the files, unless another process has uploaded them meanwhile.
    async fn upload_under_lock(
        &self,
        remote: &Remote,
        leased: &Arc<LeasedArtifact>,
        mut to: ToBackfill,
        progress: &Progress,
    ) -> Result<Published> {
        let key = &leased.manifest.key;
        if let Some(refusal) = remote.refusal() {
            log_failure(remote, &refusal, false);
            return Ok(Published::default());
        }
        // Step 1: take the backfill lock.
        let started = Instant::now();
        let _lock = loop {
            match self.backfill_lock(key).await? {
                Some(lock) => break lock,
                None if started.elapsed() > WAIT_MAX => {
                    tracing::info!(artifact = %key, "another process is uploading this artifact to the remote");
                    return Ok(Published::default());
                }
                None => {
                    // Release the claim of the streaming upload: the process that holds the lock needs it.
                    drop(to.streaming.take());
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        };
        // Step 2: check the record. The process that held the lock before may have uploaded the files.
        if to.is_recorded && self.pending_upload(remote, key).await?.is_none() {
            return Ok(Published::default());
        }
        // Step 3: complete the streaming upload, upload the other files and publish them.
        let pending = match to.streaming {
            Some((streaming_upload, proven)) => streaming_upload.finish(proven).await,
            None => None,
        };
        self.send(remote, leased, &to.missing, pending, progress).await
    }

    /// Uploads leased files and publishes them on the remote. Then removes them from the pending upload. The caller
    /// holds the backfill lock.
    async fn send(
        &self,
        remote: &Remote,
        leased: &LeasedArtifact,
        missing: &Missing,
        pending: Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<Published> {
        let key = &leased.manifest.key;
        let entries = missing.files.iter().filter_map(|path| leased.manifest.files.get(path));
        let _phase = progress.enter(Phase::Backfill, entries.map(|entry| entry.size).sum());
        let files = missing.files.iter().map(|path| (path.clone(), LocalFile::from(leased.dir.view(path)))).collect();
        let listing = Manifest::clone(&leased.manifest).without_holdings();
        let options = PublishOptions { rewrite: missing.rewrite.clone(), ..PublishOptions::default() };
        let published =
            remote.publish_pending(&listing, &files, options, pending, progress).await.context(key, Tier::Remote)?;
        // Only after the publish: a crash before it leaves the upload pending.
        self.settle(remote, key, &missing.files).await?;
        Ok(published)
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
        if let Err(error) = self.settle(remote, key, files).await {
            tracing::debug!(%error, "cannot remove a pending upload that cannot succeed");
        }
        true
    }

    /// Returns the pending uploads to any remote.
    pub async fn pending_backfills(&self) -> Result<Vec<PendingBackfill>> {
        self.on_disk(pending).await
    }

    /// Completes all pending uploads to the configured remote. If one fails, the others are still attempted, unless the
    /// error concerns the remote as a whole: `Unavailable`, `Unauthorized` or `Invalid`.
    ///
    /// # Errors
    /// `Invalid` if no remote is configured or it is read-only. Errors of single uploads are in the report.
    pub async fn backfill_pending(&self, progress: &Progress) -> Result<BackfillReport> {
        let Some(remote) = &self.0.remote else {
            return Err(Error::invalid("no remote is configured")
                .hint("set MODEL_CACHE_REMOTE, for instance s3://bucket/prefix"));
        };
        remote.ensure_read_write("leave it to a machine that may write there")?;
        let _alone = self.0.backfills.completing.lock().await;
        self.complete_all(remote, progress).await
    }

    /// Waits for background uploads at the end of a run. If this process reached the remote, also completes the pending
    /// uploads of earlier runs. Failures are logged, because the requested work is already done.
    pub async fn finish_backfills(&self, progress: &Progress) -> BackfillReport {
        self.0.backfills.tasks.finish().await;
        match self.backfill_mode() {
            Backfill::Wait | Backfill::Background => self.complete(progress).await,
            Backfill::Later | Backfill::Never => BackfillReport::default(),
        }
    }

    /// Records whether the remote answered the last request.
    pub(super) fn note_remote(&self, answers: bool) {
        self.0.backfills.remote_answers.store(answers, Ordering::Relaxed);
    }

    /// Completes the pending uploads if the remote is writable and has answered. Does nothing if another task does so
    /// already. Failures are logged.
    async fn complete(&self, progress: &Progress) -> BackfillReport {
        let answers = self.0.backfills.remote_answers.load(Ordering::Relaxed);
        let (Some(remote), true) = (self.0.remote.as_ref().filter(|remote| remote.is_writable()), answers) else {
            return BackfillReport::default();
        };
        let Ok(_alone) = self.0.backfills.completing.try_lock() else { return BackfillReport::default() };
        let report = self.complete_all(remote, progress).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot complete the pending uploads of earlier runs");
            BackfillReport::default()
        });
        self.metrics().uploaded(report.uploaded_bytes, report.copied_bytes);
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
                Ok(Completed::Done(published)) => {
                    report.uploaded_bytes += published.uploaded_bytes;
                    report.copied_bytes += published.copied_bytes;
                    report.done.push(key);
                }
                Ok(Completed::Busy) => report.busy.push(key),
                Ok(Completed::Gone(why)) => report.dropped.push((key, why)),
                Err(error) => {
                    let dropped = self.drop_if_permanent(remote, &key, &missing.files, &error).await;
                    // These errors concern the remote or its configuration, so all further uploads would fail as well.
                    let stop =
                        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unauthorized | ErrorKind::Invalid);
                    if dropped { &mut report.dropped } else { &mut report.failed }.push((key, error));
                    if stop {
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
    async fn complete_one(&self, remote: &Remote, key: &ArtifactKey, progress: &Progress) -> Result<Completed> {
        // Step 1: take the backfill lock, and read the record again under it.
        let Some(_lock) = self.backfill_lock(key).await? else { return Ok(Completed::Busy) };
        let Some(missing) = self.pending_upload(remote, key).await? else { return Ok(Completed::Busy) };
        // Step 2: lease the files that are on disk.
        let Some((leased, held)) = self.acquire_held(key, &missing).await? else {
            let gone = self.drop_absent(remote, key, &missing).await?;
            return Ok(gone.map_or(Completed::Busy, Completed::Gone));
        };
        // Step 3: upload them.
        let rewrite = missing.rewrite.intersection(&held).cloned().collect();
        let published = self
            .send(remote, &leased, &Missing { files: held.clone(), rewrite, ..Missing::default() }, None, progress)
            .await?;
        // Step 4: drop the files that are no longer on disk from the pending upload.
        let absent: BTreeSet<_> = missing.files.difference(&held).cloned().collect();
        if !absent.is_empty()
            && let Some(why) = self.drop_absent(remote, key, &missing.only(&absent)).await?
        {
            tracing::debug!(error = %why, "some files of the pending upload are no longer on this disk");
        }
        Ok(Completed::Done(published))
    }

    /// Leases the missing files that are on disk with the recorded digests, and returns which they are; `None` if there
    /// are none.
    async fn acquire_held(
        &self,
        key: &ArtifactKey,
        missing: &Missing,
    ) -> Result<Option<(LeasedArtifact, BTreeSet<FilePath>)>> {
        let started = Instant::now();
        loop {
            let (of, missing) = (key.clone(), missing.clone());
            let leased = self.on_disk(move |disk| {
                let Some(manifest) = disk.manifest(&of)? else { return Ok(None) };
                let held = missing.held_by(&manifest);
                if held.is_empty() {
                    return Ok(None);
                }
                let outcome = disk.acquire(&of, &Selection::files(held.iter().cloned()))?;
                // The manifest may have been replaced since it was read. The one under the lease counts.
                let is_same = |leased: &LeasedArtifact| missing.held_by(&leased.manifest) == held;
                Ok(match outcome {
                    AcquireOutcome::Leased(leased) if !is_same(&leased) => Some((AcquireOutcome::Absent, held)),
                    outcome => Some((outcome, held)),
                })
            });
            match leased.await? {
                None => return Ok(None),
                Some((AcquireOutcome::Leased(leased), held)) => return Ok(Some((*leased, held))),
                // An eviction is running, or a damaged file was found, which the manifest then no longer holds.
                Some(_) if started.elapsed() < WAIT_MAX => tokio::time::sleep(POLL_INTERVAL).await,
                Some(_) => {
                    let error = Error::unavailable("the lease on its files cannot be acquired");
                    return Err(error.artifact(key).tier(Tier::Disk));
                }
            }
        }
    }

    /// Removes files that are not on disk from the pending upload, and returns the error that reports this. If a fill
    /// may be about to publish them, keeps them and returns `None`.
    async fn drop_absent(&self, remote: &Remote, key: &ArtifactKey, missing: &Missing) -> Result<Option<Error>> {
        // While another process fills the artifact, or has just published it, the files are not lost.
        let of = key.clone();
        let leadership = self.on_disk(move |disk| disk.try_lead(&of, &mut Watch::default())).await?;
        let Leadership::Ours(_lead) = leadership else { return Ok(None) };
        if self.acquire_held(key, missing).await?.is_some() {
            return Ok(None); // A fill has just published them. The next run uploads them.
        }
        self.settle(remote, key, &missing.files).await?;
        let error = Error::not_found("it left this disk before the remote had it").artifact(key).tier(Tier::Disk);
        Ok(Some(error.hint("the next get of the artifact uploads it to the remote")))
    }

    /// Tries to take the backfill lock of `key`.
    async fn backfill_lock(&self, key: &ArtifactKey) -> Result<Option<FileLock>> {
        let key = key.clone();
        self.on_disk(move |disk| disk.try_backfill(&key)).await
    }

    /// Returns the files of `key` in the pending upload to `remote`.
    async fn pending_upload(&self, remote: &Remote, key: &ArtifactKey) -> Result<Option<Missing>> {
        let (key, url) = (key.clone(), remote.url().to_owned());
        self.on_disk(move |disk| disk.pending_upload(&key, &url)).await
    }

    /// Removes `files` from the pending upload of `key` to `remote`.
    async fn settle(&self, remote: &Remote, key: &ArtifactKey, files: &BTreeSet<FilePath>) -> Result<()> {
        let (key, url, files) = (key.clone(), remote.url().to_owned(), files.clone());
        self.on_disk(move |disk| disk.settle(&key, &url, &files)).await
    }
}

/// Result of [`Cache::complete_one`].
enum Completed {
    /// The files were uploaded.
    Done(Published),
    /// Another process uploads or fills the artifact.
    Busy,
    /// The files are no longer on this disk, and the pending upload was removed.
    Gone(Error),
}

/// Logs a failed upload. A remote that refuses writes is reported only once.
fn log_failure(remote: &Remote, error: &Error, dropped: bool) {
    let hint = error.hint_text();
    if remote.refuses_writes() {
        if remote.is_first_refusal() {
            tracing::warn!(
                %error, hint,
                "the remote refuses writes; the artifact is available locally, and this process only reads the remote \
                 from now on"
            );
        }
    } else if dropped {
        tracing::warn!(%error, hint, "could not be written to the remote; the upload is not tried again");
    } else {
        tracing::warn!(
            %error, hint,
            "could not be written to the remote; the artifact is available locally, and a later run tries again"
        );
    }
}

/// Returns true if every further attempt of this upload would fail, independent of the configuration of the remote.
fn is_permanent(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Corrupt)
}

/// Returns the pending uploads to any remote. Blocks.
pub(super) fn pending(disk: &Disk) -> Result<Vec<PendingBackfill>> {
    let one = |PendingUpload { key, remote, missing }: PendingUpload| {
        let manifest = disk.manifest(&key).ok().flatten();
        let entries = manifest.iter().flat_map(|manifest| &manifest.files);
        let held = entries.filter(|(path, entry)| missing.files.contains(*path) && entry.held.is_some());
        let bytes = held.map(|(_, entry)| entry.size).sum();
        PendingBackfill { reference: key.to_string(), key, remote, files: missing.files.len(), bytes }
    };
    Ok(disk.pending_uploads()?.into_iter().map(one).collect())
}
