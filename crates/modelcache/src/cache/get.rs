//! The main path: from a reference to a lent path, in seven steps.
//!
//! Each step is one call; what a step decides stands in its own file. Absence is a value on the way down and becomes an
//! error only here. Steps 4 to 7 are a flight: they go on for whoever else waits when a caller is dropped. Whenever they
//! end, nothing is half-made: staging is private until published, and the next fill goes on with it. Nobody waits for
//! the disk who did not ask to: see `durable.rs`.

use super::backfill::ToBackfill;
use super::fill::{FillOutcome, FillPublisher, Joined};
use super::plan::FillPlan;
use super::resolve::FetchRequest;
use super::{Artifact, BytesByTier, Cache, GetOptions, GetReport};
use crate::disk::{
    AcquireOutcome, LeasedArtifact, Purpose, RootedPath, StagedFile, Staging, format_named, staged_name,
};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::manifest::Manifest;
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::remote::{Proven, StreamingUpload};
use crate::transfer::{DownloadFile, DownloadedFile, PartialFile, PartialFiles, ReadGate, blocking};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an eviction, which is done in moments, is waited for.
const EVICTION_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long to sleep while an eviction is at work on what is wanted.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What a fill brought, still private.
struct Filled {
    staging: Staging,
    listing: Manifest,
    files: BTreeMap<FilePath, StagedFile>,
    /// Files that the remote lists but gave wrong or not at all.
    bad_on_remote: BTreeSet<FilePath>,
    /// Bytes that no local directory had.
    fetched_bytes: u64,
    /// What went to the remote meanwhile.
    streaming_upload: Option<StreamingUpload>,
}

impl Cache {
    /// Makes the artifact local and lends its path.
    ///
    /// # Errors
    /// `NotFound` when no tier has it; `Unauthorized`, `Unavailable`, `Corrupt` when the tiers that might have it
    /// failed; `Full`, `Directory` when the local directory cannot take it.
    ///
    /// What is replaced at its origin while it is fetched is discarded and fetched anew, once.
    pub async fn get(&self, reference: &Reference, options: &GetOptions, progress: &Progress) -> Result<Artifact> {
        let outcome = match self.get_once(reference, options, progress).await {
            Err(error) if error.is_superseded() => {
                tracing::warn!(%error, "starting over");
                // What anybody remembers of it is no longer so.
                let options = GetOptions { refresh: true, ..options.clone() };
                self.get_once(reference, &options, progress).await
            }
            outcome => outcome,
        };
        self.count_get(&outcome);
        outcome
    }

    async fn get_once(&self, reference: &Reference, options: &GetOptions, progress: &Progress) -> Result<Artifact> {
        if let Some(hit) = self.hit(reference, options, progress) {
            return hit;
        }
        let request = self.resolve(reference, options, progress).await.map_err(|error| error.artifact(reference))?;
        if options.verify {
            self.verify_hit(&request, progress).await.map_err(|error| error.artifact(&request.key))?;
        }
        self.get_resolved(&request, progress).await.map_err(|error| error.artifact(&request.key))
    }

    pub(super) async fn get_resolved(&self, request: &FetchRequest, progress: &Progress) -> Result<Artifact> {
        let outcome = match self.acquire(request, progress).await? {
            Some(leased) => FillOutcome::here(leased),
            None => self.fill_single_flight(request, progress).await?,
        };
        self.require_checksums(request, &outcome.leased.manifest)?;
        self.durably(request, &outcome.leased).await?;
        artifact(request, outcome, progress)
    }

    /// A flight, for everybody who waits for it; `tell` tells them what is coming, and as soon as there is something to
    /// lend.
    pub(super) async fn fill(
        &self,
        request: &FetchRequest,
        progress: &Progress,
        publisher: &FillPublisher,
    ) -> Result<FillOutcome> {
        let lead = match self.lead(request, progress).await? {
            Joined::Filled(leased) => return Ok(FillOutcome::here(*leased)),
            Joined::Leading(lead) => lead,
        };
        let (plan, mut filled) = self.plan_and_download(request, progress, publisher).await?;
        let to_backfill = self.missing_on_remote(&plan, &mut filled);
        let fetched_bytes = filled.fetched_bytes;
        // Before anything is published: whoever dies from here on has said what the remote still lacks.
        let to_backfill = self.record_pending_upload(&request.key, to_backfill).await;
        let leased = self.publish(filled, progress).await?;
        self.was_published();
        let to_backfill = self.restore_pending_upload(&request.key, to_backfill).await;
        drop(lead);
        let outcome = FillOutcome { fetched_bytes, ..FillOutcome::here(leased) };
        publisher.published(&outcome);
        let done = self.backfill(&outcome.leased, to_backfill, progress).await;
        Ok(FillOutcome { backfilled_bytes: done.uploaded_bytes, copied_bytes: done.copied_bytes, ..outcome })
    }

    /// Steps 4 and 5; once more where another tool replaced files that had been listed.
    async fn plan_and_download(
        &self,
        request: &FetchRequest,
        progress: &Progress,
        publisher: &FillPublisher,
    ) -> Result<(FillPlan, Filled)> {
        let plan = self.plan_fill(request, progress).await?;
        self.note_remote(!plan.remote_unusable);
        match self.download(request, &plan, progress, publisher).await {
            Err(error) if plan.remote_unmanaged && error.kind() == ErrorKind::Conflict => {
                tracing::warn!(%error, "starting over with a new list");
                let anew = FetchRequest { remote: None, ..request.clone() };
                let plan = self.plan_fill(&anew, progress).await?;
                publisher.forget();
                let filled = self.download(&anew, &plan, progress, publisher).await?;
                Ok((plan, filled))
            }
            downloaded => Ok((plan, downloaded?)),
        }
    }

    async fn acquire(&self, request: &FetchRequest, progress: &Progress) -> Result<Option<LeasedArtifact>> {
        let _phase = progress.enter(Phase::Acquire, 0);
        self.try_acquire(request).await
    }

    /// Lends what is wanted if disk holds all of it, waiting out an eviction that is at work on it.
    pub(super) async fn try_acquire(&self, request: &FetchRequest) -> Result<Option<LeasedArtifact>> {
        let started = Instant::now();
        loop {
            let (disk, key, selection) = (self.0.disk.clone(), request.key.clone(), request.selection.clone());
            match blocking(move || disk.acquire(&key, &selection)).await? {
                AcquireOutcome::Leased(leased) => return Ok(Some(*leased)),
                AcquireOutcome::Absent => return self.acquire_lower(request).await,
                AcquireOutcome::Evicting if started.elapsed() > EVICTION_WAIT_MAX => {
                    return Err(Error::unavailable("an eviction has been at work on it for too long")
                        .tier(Tier::Disk)
                        .hint("see whether a modelcache process is stopped; its hold falls when it ends"));
                }
                AcquireOutcome::Evicting => tokio::time::sleep(POLL_INTERVAL).await,
            }
        }
    }

    /// Reserves room, evicting if need be, and pours what disk does not have.
    async fn download(
        &self,
        request: &FetchRequest,
        plan: &FillPlan,
        progress: &Progress,
        publisher: &FillPublisher,
    ) -> Result<Filled> {
        let (disk, key, selected) = (self.0.disk.clone(), request.key.clone(), plan.selected.clone());
        let staging = blocking(move || disk.begin_fill(&key, &selected)).await?;
        let (partial_files, to_download) = to_download(&staging, plan)?;
        let _first_reader = publisher.partial_files(partial_files);
        let (downloaded, streaming_upload) =
            match self.download_missing(to_download, plan, self.purpose_of(request), progress).await {
                Ok(downloaded) => downloaded,
                Err(error) => {
                    // Before any of it goes or is filled again: nobody shall be given what is not there.
                    publisher.forget();
                    // What was fetched is kept for the next fill, unless it is what fills the disk.
                    if error.kind() == ErrorKind::Full
                        && let Err(left) = blocking(move || staging.discard()).await
                    {
                        tracing::warn!(error = %left, "what was fetched could not be removed; the next fill does");
                    }
                    return Err(error);
                }
            };
        let fetched_bytes = downloaded.iter().map(|file| file.fetched_bytes).sum();
        let by_target: BTreeMap<RootedPath, _> =
            downloaded.into_iter().map(|file| (file.target.clone(), file)).collect();
        let (mut files, mut bad_on_remote) = (BTreeMap::new(), BTreeSet::new());
        for (path, entry) in &plan.selected {
            let name = staged_name(path, entry);
            let staged = match (staging.reused(&name), by_target.get(&staging.file(&name))) {
                (Some(identity), _) => {
                    // Its bytes are proven. A ladder that somebody told of is not.
                    let ladder = plan.listing.files.get(path).and_then(|listed| listed.ladder.clone());
                    let mut entry = entry.clone();
                    entry.ladder = ladder;
                    StagedFile { name, entry, identity }
                }
                (None, Some(downloaded)) => {
                    if downloaded.bad_tiers.contains(&Tier::Remote) {
                        bad_on_remote.insert(path.clone());
                    }
                    StagedFile { name, entry: downloaded.entry.clone(), identity: downloaded.identity }
                }
                (None, None) => return Err(Error::not_found(format!("{path} was not filled"))),
            };
            files.insert(path.clone(), staged);
        }
        let files = detect_formats(&staging, files).await?;
        let filled =
            Filled { staging, listing: plan.listing.clone(), files, bad_on_remote, fetched_bytes, streaming_upload };
        request.check_demanded_digest(&filled.known())?;
        Ok(filled)
    }

    async fn download_missing(
        &self,
        mut to_download: BTreeMap<String, DownloadFile>,
        plan: &FillPlan,
        purpose: Purpose,
        progress: &Progress,
    ) -> Result<(Vec<DownloadedFile>, Option<StreamingUpload>)> {
        let streaming_upload = self.start_streaming_upload(plan, &mut to_download);
        let _phase = progress.enter(Phase::Download, to_download.values().map(|file| file.entry.size).sum());
        Ok((
            self.0.downloader.download(to_download.into_values().collect(), purpose, progress).await?,
            streaming_upload,
        ))
    }

    async fn publish(&self, filled: Filled, progress: &Progress) -> Result<LeasedArtifact> {
        let _phase = progress.enter(Phase::Publish, 0);
        let disk = self.0.disk.clone();
        blocking(move || disk.publish(filled.staging, &filled.listing, &filled.files)).await
    }

    /// The files of this fill that the remote should now be given, and those among them that it must write anew.
    fn missing_on_remote(&self, plan: &FillPlan, filled: &mut Filled) -> Option<ToBackfill> {
        if !self.may_backfill() || plan.remote_unmanaged {
            tracing::debug!(key = %plan.listing.key, "nothing of this goes to a remote");
            return None;
        }
        if plan.remote_unusable && !plan.remote_down {
            return None;
        }
        let held = |path: &FilePath| {
            plan.remote.as_ref().and_then(|m| m.files.get(path)).is_some_and(|entry| entry.held.is_some())
        };
        let missing = |path: &&FilePath| !held(path) || filled.bad_on_remote.contains(*path);
        let paths: BTreeSet<FilePath> = filled.files.keys().filter(missing).cloned().collect();
        let rewrite = filled.bad_on_remote.clone();
        let sent = filled.streaming_upload.take().map(|streaming_upload| (streaming_upload, filled.proven()));
        (!paths.is_empty()).then(|| ToBackfill::new(paths, rewrite, plan.remote_down, sent))
    }
}

/// What is to be poured, by its name in staging, and for every file what its readers are told of. Equal files come
/// once.
fn to_download(staging: &Staging, plan: &FillPlan) -> Result<(PartialFiles, BTreeMap<String, DownloadFile>)> {
    let (mut partial_files, mut by_name, mut to_download) = (PartialFiles::new(), BTreeMap::new(), BTreeMap::new());
    let mut read_gates: BTreeMap<String, ReadGate> = BTreeMap::new();
    for (path, entry) in &plan.selected {
        // Of equal files, what is asked of one is asked of all.
        let (name, read_gate) = (staged_name(path, entry), plan.read_gate(path));
        let of_all = read_gates.entry(name).or_insert(read_gate);
        *of_all = read_gate.max(*of_all);
    }
    for (path, entry) in &plan.selected {
        let name = staged_name(path, entry);
        let target = staging.file(&name);
        let read_gate = read_gates.get(&name).copied().unwrap_or(ReadGate::Published);
        let partial_file: &mut Arc<PartialFile> =
            by_name.entry(name.clone()).or_insert_with(|| PartialFile::new(target.clone(), entry.size, read_gate));
        partial_files.insert(path.clone(), partial_file.clone());
        if staging.reused(&name).is_some() {
            partial_file.proven();
        } else if let Entry::Vacant(vacant) = to_download.entry(name) {
            let (owner, partial_file, sources) = (staging.owner(), partial_file.clone(), plan.sources_of(path)?);
            let (path, entry) = (path.clone(), entry.clone());
            vacant.insert(DownloadFile { path, entry, target, owner, sources, on_part: None, partial_file });
        }
    }
    Ok((partial_files, to_download))
}

/// Looks at the first bytes of files whose format nobody knows yet.
async fn detect_formats(
    staging: &Staging,
    mut files: BTreeMap<FilePath, StagedFile>,
) -> Result<BTreeMap<FilePath, StagedFile>> {
    let folder = staging.file("");
    blocking(move || {
        for file in files.values_mut().filter(|file| file.entry.format.is_none()) {
            file.entry.format = format_named(folder.join(&file.name).open(false));
        }
        Ok(files)
    })
    .await
}

impl Filled {
    /// What each file turned out to be.
    fn proven(&self) -> Proven {
        let proven = |(path, file): (&FilePath, &StagedFile)| Some((path.clone(), (file.identity, file.entry.sha256?)));
        self.files.iter().filter_map(proven).collect()
    }

    /// The listing with what this fill learnt.
    fn known(&self) -> Manifest {
        let mut known = self.listing.clone();
        for (path, file) in &self.files {
            if let Some(entry) = known.files.get_mut(path) {
                entry.learn(&file.entry);
            }
        }
        known
    }
}

impl FillOutcome {
    /// Disk had it all.
    pub(super) fn here(leased: LeasedArtifact) -> Self {
        Self { leased: Arc::new(leased), fetched_bytes: 0, backfilled_bytes: 0, copied_bytes: 0 }
    }
}

pub(super) fn artifact(request: &FetchRequest, outcome: FillOutcome, progress: &Progress) -> Result<Artifact> {
    let FillOutcome { leased, fetched_bytes, backfilled_bytes, copied_bytes } = outcome;
    request.check_demanded_digest(&leased.manifest)?;
    let received = progress.snapshot();
    let (files, selected_bytes) = leased
        .manifest
        .selected(&request.selection)
        .fold((0, 0), |(files, bytes), (_, entry)| (files + 1, bytes + entry.size));
    let from = match (received.origin_bytes, received.remote_bytes) {
        (1.., _) => Tier::Origin,
        (0, 1..) => Tier::Remote,
        (0, 0) => Tier::Disk,
    };
    let bytes = BytesByTier {
        disk: selected_bytes.saturating_sub(fetched_bytes),
        remote: received.remote_bytes,
        origin: received.origin_bytes,
    };
    let (link, phases) = (leased.link, progress.phases());
    let report = GetReport { from, bytes, backfilled_bytes, copied_bytes, files, selected_bytes, link, phases };
    let (path, selection) = (leased.path(&request.selection), request.selection.clone());
    Ok(Artifact { key: request.key.clone(), path, report, selection, _lent: leased })
}
