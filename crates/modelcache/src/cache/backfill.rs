//! Backfilling: what came from an origin goes to the remote, now, in the background, or with a later run.
//!
//! Whatever the mode, a durable intent stands in the local directory before the artifact is published, and goes when the
//! remote has it: a process that dies, a remote that is down, cost time and not the remote its copy. What is left is
//! completed by `backfill`, and by every run that fetched or put something; a hit never waits for it. Large files are sent
//! while they are still poured, where that can be; what became of that is looked at only here.
//!
//! A refusal for want of a right is told once, and the remote is only read from then on. What can never succeed, because
//! the remote has other content or the artifact left this disk, is dropped and said.

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
use crate::transfer::{DownloadFile, blocking};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long another process that uploads the same is waited for; what it does not finish stays intended.
const OTHER_MAX: Duration = Duration::from_secs(60);
/// Time between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What this process has to do with backfills.
#[derive(Debug, Default)]
pub(super) struct Backfills {
    /// Uploads in the background.
    tasks: Tasks,
    /// This process wrote to the remote, or could have: a good time for what earlier ones left.
    remote_answers: AtomicBool,
    /// One at a time completes what others left.
    completing: tokio::sync::Mutex<()>,
}

/// What a fill has to bring to the remote.
#[derive(Debug)]
pub(super) struct ToBackfill {
    missing: Missing,
    /// The remote does not answer now.
    later: bool,
    /// Whether it stands in the directory.
    is_noted: bool,
    /// What was sent while it was poured, and the proof of it.
    sent: Option<(StreamingUpload, Proven)>,
}

impl ToBackfill {
    pub(super) fn new(missing: Missing, later: bool, sent: Option<(StreamingUpload, Proven)>) -> Self {
        Self { missing, later, is_noted: false, sent }
    }
}

impl Cache {
    pub(super) fn backfill_mode(&self) -> Backfill {
        self.0.config.backfill.unwrap_or_default()
    }

    /// Whether what is fetched is meant for a remote, now or later.
    pub(super) fn may_backfill(&self) -> bool {
        let remote = self.0.remote.as_ref().filter(|remote| !remote.is_read_only());
        remote.is_some() && self.backfill_mode() != Backfill::Never
    }

    /// Lets files go to the remote while they are poured, if all of them are meant for it and it has none of them.
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

    /// Notes durably what the remote lacks. Where that fails the upload is tried all the same.
    pub(super) async fn record_pending_upload(&self, key: &ArtifactKey, to: Option<ToBackfill>) -> Option<ToBackfill> {
        let (Some(to), Some(remote)) = (to, &self.0.remote) else { return None };
        let (disk, of, url, missing) = (self.0.disk.clone(), key.clone(), remote.url().to_owned(), to.missing.clone());
        let noted = blocking(move || disk.record_pending_upload(&of, &url, &missing)).await;
        if let Err(error) = &noted {
            tracing::warn!(%key, %error, "what the remote lacks cannot be noted; a later run will not complete it");
        }
        Some(ToBackfill { is_noted: noted.is_ok(), ..to })
    }

    /// Notes it again where it was forgotten: an eviction of what had been here may have come before what was just lent.
    pub(super) async fn restore_pending_upload(&self, key: &ArtifactKey, to: Option<ToBackfill>) -> Option<ToBackfill> {
        let (Some(to), Some(remote)) = (to, &self.0.remote) else { return None };
        match self.pending_upload(remote, key).await {
            Ok(Some(_)) => Some(to),
            _ => self.record_pending_upload(key, Some(to)).await,
        }
    }

    /// Step 7 of the main path. That it fails costs the next machine time, not this caller its artifact.
    pub(super) async fn backfill(
        &self,
        leased: &Arc<LeasedArtifact>,
        to: Option<ToBackfill>,
        progress: &Progress,
    ) -> Published {
        let Some(to) = to else { return Published::default() };
        if to.later {
            tracing::info!(artifact = %leased.manifest.key, "the remote does not answer; it gets this with a later run");
            return Published::default();
        }
        match self.backfill_mode() {
            Backfill::Wait => self.upload(leased, to, progress).await,
            Backfill::Background => {
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

    /// Uploads what this process has just filled.
    async fn upload(&self, leased: &Arc<LeasedArtifact>, to: ToBackfill, progress: &Progress) -> Published {
        let Some(remote) = &self.0.remote else { return Published::default() };
        let (key, files) = (&leased.manifest.key, to.missing.files.clone());
        let uploaded = self.upload_noted(remote, leased, to, progress).await;
        self.metrics().asked(Tier::Remote, &uploaded);
        match uploaded {
            Ok(published) => {
                self.note_remote(true);
                published
            }
            Err(error) => {
                self.note_remote(false);
                let dropped = self.drop_hopeless(remote, key, &files, &error).await;
                tell(remote, &error, dropped);
                Published::default()
            }
        }
    }

    async fn upload_noted(
        &self,
        remote: &Remote,
        leased: &Arc<LeasedArtifact>,
        mut to: ToBackfill,
        progress: &Progress,
    ) -> Result<Published> {
        let key = &leased.manifest.key;
        if let Some(refusal) = remote.refusal() {
            tell(remote, &refusal, false);
            return Ok(Published::default());
        }
        let started = Instant::now();
        let _turn = loop {
            match self.backfill_lock(key).await? {
                Some(turn) => break turn,
                None if started.elapsed() > OTHER_MAX => {
                    tracing::info!(artifact = %key, "another process is bringing this to the remote");
                    return Ok(Published::default());
                }
                None => {
                    // Whoever is at it needs the claim that was taken to send early.
                    drop(to.sent.take());
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        };
        if to.is_noted && self.pending_upload(remote, key).await?.is_none() {
            return Ok(Published::default()); // Whoever had the turn before did it.
        }
        let begun = match to.sent {
            Some((streaming_upload, proven)) => streaming_upload.finish(proven).await,
            None => None,
        };
        self.send(remote, leased, &to.missing, begun, progress).await
    }

    /// Sends files that are lent, and takes back that the remote lacks them. The caller has the turn.
    async fn send(
        &self,
        remote: &Remote,
        leased: &LeasedArtifact,
        missing: &Missing,
        begun: Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<Published> {
        let key = &leased.manifest.key;
        let entries = missing.files.iter().filter_map(|path| leased.manifest.files.get(path));
        let _phase = progress.enter(Phase::Backfill, entries.map(|entry| entry.size).sum());
        let files = missing.files.iter().map(|path| (path.clone(), LocalFile::from(leased.dir.view(path)))).collect();
        let listing = Manifest::clone(&leased.manifest).without_holdings();
        let options = PublishOptions { rewrite: missing.rewrite.clone(), ..PublishOptions::default() };
        let published =
            remote.publish_pending(&listing, &files, options, begun, progress).await.context(key, Tier::Remote)?;
        self.settle(remote, key, &missing.files).await?;
        Ok(published)
    }

    /// Drops what would fail for ever. Whether it was dropped.
    async fn drop_hopeless(
        &self,
        remote: &Remote,
        key: &ArtifactKey,
        files: &BTreeSet<FilePath>,
        error: &Error,
    ) -> bool {
        if !is_for_good(error) {
            return false;
        }
        if let Err(error) = self.settle(remote, key, files).await {
            tracing::debug!(%error, "the intent stays");
        }
        true
    }

    /// What still has to reach any remote.
    pub async fn pending_backfills(&self) -> Result<Vec<PendingBackfill>> {
        let disk = self.0.disk.clone();
        blocking(move || pending(&disk)).await
    }

    /// Brings everything to the remote that still has to reach it. One that fails does not stop the others, except that
    /// a remote which does not answer is not asked again.
    ///
    /// # Errors
    /// `Invalid` where there is no remote, or it is only read.
    pub async fn backfill_pending(&self, progress: &Progress) -> Result<BackfillReport> {
        let Some(remote) = &self.0.remote else {
            return Err(Error::invalid("no remote is configured")
                .hint("set MODEL_CACHE_REMOTE, for instance s3://bucket/prefix"));
        };
        remote.ensure_read_write("leave it to a machine that may write there")?;
        let _alone = self.0.backfills.completing.lock().await;
        self.complete_all(remote, progress).await
    }

    /// The end of a run: waits for what goes on in the background; if this process reached the remote, brings what
    /// earlier ones left there, too. Failures are logged: the work that was asked for is done.
    pub async fn finish_backfills(&self, progress: &Progress) -> BackfillReport {
        self.0.backfills.tasks.finish().await;
        match self.backfill_mode() {
            Backfill::Wait | Backfill::Background => self.complete(progress).await,
            Backfill::Later | Backfill::Never => BackfillReport::default(),
        }
    }

    /// Whether the remote answered, the last time that it was asked.
    pub(super) fn note_remote(&self, answers: bool) {
        self.0.backfills.remote_answers.store(answers, Ordering::Relaxed);
    }

    async fn complete(&self, progress: &Progress) -> BackfillReport {
        let answers = self.0.backfills.remote_answers.load(Ordering::Relaxed);
        let (Some(remote), true) = (self.0.remote.as_ref().filter(|remote| remote.is_writable()), answers) else {
            return BackfillReport::default();
        };
        let Ok(_alone) = self.0.backfills.completing.try_lock() else { return BackfillReport::default() };
        let report = self.complete_all(remote, progress).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "what earlier runs left for the remote is left again");
            BackfillReport::default()
        });
        self.metrics().uploaded(report.uploaded_bytes, report.copied_bytes);
        report.failed.iter().for_each(|(_, error)| tell(remote, error, false));
        report.dropped.iter().for_each(|(_, error)| tell(remote, error, true));
        report
    }

    async fn complete_all(&self, remote: &Remote, progress: &Progress) -> Result<BackfillReport> {
        let (disk, mut report) = (self.0.disk.clone(), BackfillReport::default());
        let pending_uploads = blocking(move || disk.pending_uploads()).await?;
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
                    let dropped = self.drop_hopeless(remote, &key, &missing.files, &error).await;
                    // What is wrong with the remote, or with how it is set up, is wrong for all of them.
                    let stop =
                        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unauthorized | ErrorKind::Invalid);
                    if dropped { &mut report.dropped } else { &mut report.failed }.push((key, error));
                    if stop {
                        break;
                    }
                }
            }
        }
        remote.sweep_uploads().await;
        Ok(report)
    }

    /// Brings one artifact there.
    async fn complete_one(&self, remote: &Remote, key: &ArtifactKey, progress: &Progress) -> Result<Completed> {
        let Some(_turn) = self.backfill_lock(key).await? else { return Ok(Completed::Busy) };
        let Some(missing) = self.pending_upload(remote, key).await? else { return Ok(Completed::Busy) };
        let Some((leased, held)) = self.acquire_held(key, &missing).await? else {
            let gone = self.drop_absent(remote, key, &missing).await?;
            return Ok(gone.map_or(Completed::Busy, Completed::Gone));
        };
        let rewrite = missing.rewrite.intersection(&held).cloned().collect();
        let published = self
            .send(remote, &leased, &Missing { files: held.clone(), rewrite, ..Missing::default() }, None, progress)
            .await?;
        let absent: BTreeSet<_> = missing.files.difference(&held).cloned().collect();
        if !absent.is_empty()
            && let Some(why) = self.drop_absent(remote, key, &missing.only(&absent)).await?
        {
            tracing::debug!(error = %why, "the rest of it is not here");
        }
        Ok(Completed::Done(published))
    }

    /// Lends those of `files` that are here; `None` if none is.
    async fn acquire_held(
        &self,
        key: &ArtifactKey,
        missing: &Missing,
    ) -> Result<Option<(LeasedArtifact, BTreeSet<FilePath>)>> {
        let started = Instant::now();
        loop {
            let (disk, of, missing) = (self.0.disk.clone(), key.clone(), missing.clone());
            let leased = blocking(move || {
                let Some(manifest) = disk.manifest(&of)? else { return Ok(None) };
                let held = missing.held_by(&manifest);
                if held.is_empty() {
                    return Ok(None);
                }
                let outcome = disk.acquire(&of, &Selection::files(held.iter().cloned()))?;
                // The manifest may have been replaced since: the leased one counts.
                let is_same = |leased: &LeasedArtifact| missing.held_by(&leased.manifest) == held;
                Ok(match outcome {
                    AcquireOutcome::Leased(leased) if !is_same(&leased) => Some((AcquireOutcome::Absent, held)),
                    outcome => Some((outcome, held)),
                })
            });
            match leased.await? {
                None => return Ok(None),
                Some((AcquireOutcome::Leased(leased), held)) => return Ok(Some((*leased, held))),
                // Damage was found, and what is damaged is held no more; or an eviction is at work.
                Some(_) if started.elapsed() < OTHER_MAX => tokio::time::sleep(POLL_INTERVAL).await,
                Some(_) => return Err(Error::unavailable("it cannot be lent").artifact(key).tier(Tier::Disk)),
            }
        }
    }

    /// Drops an intent for files that are not here, unless a fill may be about to bring them.
    ///
    /// # Errors
    /// `NotFound`, to say so; nothing where a fill is at work.
    async fn drop_absent(&self, remote: &Remote, key: &ArtifactKey, missing: &Missing) -> Result<Option<Error>> {
        let (disk, of) = (self.0.disk.clone(), key.clone());
        let leadership = blocking(move || disk.try_lead(&of, &mut Watch::default())).await?;
        let Leadership::Ours(_lead) = leadership else { return Ok(None) };
        if self.acquire_held(key, missing).await?.is_some() {
            return Ok(None); // The fill before us just published it; the next run uploads it.
        }
        self.settle(remote, key, &missing.files).await?;
        let error = Error::not_found("it left this disk before the remote had it").artifact(key).tier(Tier::Disk);
        Ok(Some(error.hint("the next get of it brings it to the remote")))
    }

    async fn backfill_lock(&self, key: &ArtifactKey) -> Result<Option<FileLock>> {
        let (disk, key) = (self.0.disk.clone(), key.clone());
        blocking(move || disk.try_backfill(&key)).await
    }

    async fn pending_upload(&self, remote: &Remote, key: &ArtifactKey) -> Result<Option<Missing>> {
        let (disk, key, url) = (self.0.disk.clone(), key.clone(), remote.url().to_owned());
        blocking(move || disk.pending_upload(&key, &url)).await
    }

    async fn settle(&self, remote: &Remote, key: &ArtifactKey, files: &BTreeSet<FilePath>) -> Result<()> {
        let (disk, key, url, files) = (self.0.disk.clone(), key.clone(), remote.url().to_owned(), files.clone());
        blocking(move || disk.settle(&key, &url, &files)).await
    }
}

/// What came of one pending backfill.
enum Completed {
    Done(Published),
    /// Somebody else is at it.
    Busy,
    /// It is not here any more, and was dropped.
    Gone(Error),
}

/// Says that the remote did not get something. Of a remote that refuses to be written it is said once.
fn tell(remote: &Remote, error: &Error, dropped: bool) {
    let hint = error.hint_text();
    if remote.refuses_writes() {
        if remote.is_first_refusal() {
            tracing::warn!(%error, hint, "the remote refuses to be written; it is local all the same, and the remote is only read until this process ends");
        }
    } else if dropped {
        tracing::warn!(%error, hint, "this will not reach the remote from here");
    } else {
        tracing::warn!(%error, hint, "could not be written to the remote; it is local all the same, and a later run tries again");
    }
}

/// Whether the same upload would fail every time, however the remote is set up.
fn is_for_good(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Corrupt)
}

/// What still has to reach any remote. Blocks.
pub(super) fn pending(disk: &Disk) -> Result<Vec<PendingBackfill>> {
    let one = |PendingUpload { key, remote, missing }: PendingUpload| {
        let manifest = disk.manifest(&key).ok().flatten();
        let entries = manifest.iter().flat_map(|manifest| &manifest.files);
        let held = entries.filter(|(path, entry)| missing.files.contains(*path) && entry.held.is_some());
        let bytes = held.map(|(_, entry)| entry.size).sum();
        PendingBackfill { key, remote, files: missing.files.len(), bytes }
    };
    Ok(disk.pending_uploads()?.into_iter().map(one).collect())
}
