//! The main path: from a reference to the path of a leased artifact, in seven steps: resolve, acquire, join, plan,
//! download, publish, backfill.
//!
//! Each step is one call, and its policy is in a file of its own. Steps 4 to 7 are a *fill*. It runs in a task, so that
//! it continues for the other waiting callers if one of them is cancelled. A fill can be aborted at any point: staged
//! files are invisible until they are published, and the next fill resumes from them.

use super::backfill::BackfillJob;
use super::fill::{FillOutcome, FillPublisher, JoinOutcome};
use super::plan::FillPlan;
use super::resolve::FetchRequest;
use super::{Artifact, BytesByTier, Cache, GetOptions, GetReport};
use crate::config::{DirLayout, Extract};
use crate::disk::{
    AcquireOutcome, Destination, LOCK_WAIT_MAX, LeasedArtifact, MissingFiles, Purpose, StagedFile, Staging,
    format_name, staged_name,
};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::manifest::Manifest;
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::remote::{StreamingUpload, VerifiedFiles};
use crate::runtime::blocking;
use crate::transfer::{DownloadFile, DownloadedFile, PartialFile, PartialFiles, ReadGate};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Minimum size of a download, in bytes, after which the limit on concurrent requests is remembered.
const REMEMBERED_BYTES_MIN: u64 = 64 << 20;
/// Time between two attempts to acquire a lease during an eviction.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The verified files of a fill, in staging and not yet published.
struct StagedFill {
    staging: Staging,
    listing: Manifest,
    files: BTreeMap<FilePath, StagedFile>,
    /// Files that the remote lists, but for which it sent wrong bytes or none.
    bad_on_remote: BTreeSet<FilePath>,
    /// Bytes downloaded over a network: without those that were resumed from an earlier fill or copied from a local
    /// directory.
    fetched_bytes: u64,
    /// The upload to the remote that ran during the download.
    streaming_upload: Option<StreamingUpload>,
}

impl Cache {
    /// Returns the artifact with all selected files on disk, leased and verified. Downloads the missing ones.
    ///
    /// If the artifact is replaced at its origin during the download, the downloaded files are discarded, and the get
    /// starts over once.
    ///
    /// # Errors
    /// `NotFound` if no tier has the artifact; `Unauthorized`, `Unavailable` or `Corrupt` if a tier that might have it
    /// failed; `Full` or `Directory` if it cannot be stored in the local directory.
    pub async fn get_with(&self, reference: &Reference, options: &GetOptions, progress: &Progress) -> Result<Artifact> {
        let started = Instant::now();
        let mut outcome = match self.get_once(reference, options, progress).await {
            Err(error) if error.is_superseded() => {
                tracing::warn!(%error, "the artifact was replaced at its origin during the download; starting over");
                // Cached resolutions point to the replaced version, so resolve the reference at its authority again.
                let options = GetOptions { refresh: true, ..options.clone() };
                self.get_once(reference, &options, progress).await
            }
            outcome => outcome,
        };
        if self.0.config.layout == DirLayout::Hub
            && let Ok(artifact) = &mut outcome
            && let Err(error) = self.link_hub_layout(reference, artifact).await
        {
            outcome = Err(error.artifact(reference));
        }
        if let Ok(artifact) = &mut outcome {
            artifact.report.took = started.elapsed();
        }
        self.count_get(&outcome);
        outcome
    }

    /// Makes one attempt of [`get_with`](Self::get_with).
    async fn get_once(&self, reference: &Reference, options: &GetOptions, progress: &Progress) -> Result<Artifact> {
        let extract = options.extract.unwrap_or(self.0.config.extract);
        // Steps 1 and 2 in some tens of microseconds, for an ordinary hit.
        let hit = match extract {
            Extract::Never => self.try_fast_hit(reference, options, progress),
            _ => self.try_extracted_hit(reference, extract, options, progress).await?.map(Ok),
        };
        if let Some(hit) = hit {
            return hit;
        }
        // Step 1: resolve the reference to a key, a selection and an origin.
        let request = self.resolve(reference, options, progress).await.map_err(|error| error.artifact(reference))?;
        // Local files with wrong bytes are withdrawn here, so that the get downloads them again.
        if options.verify {
            self.verify_hit(&request, progress).await.map_err(|error| error.artifact(&request.key))?;
        }
        if extract != Extract::Never {
            let extracted = self.get_extracted(&request, extract, options, progress).await;
            if let Some(artifact) = extracted.map_err(|error| error.artifact(&request.key))? {
                return Ok(artifact);
            }
        }
        self.get_resolved(&request, progress).await.map_err(|error| error.artifact(&request.key))
    }

    /// Steps 2 to 7, for a resolved reference.
    pub(super) async fn get_resolved(&self, request: &FetchRequest, progress: &Progress) -> Result<Artifact> {
        // Step 2: acquire a lease if all selected files are on disk.
        let outcome = match self.acquire(request, progress).await? {
            Some(leased) => FillOutcome::local(leased),
            // Step 3: join the in-flight fill of these files, or start one (`fill` below).
            None => match &request.destination {
                None => self.fill_single_flight(request, progress).await?,
                Some(destination) => {
                    let mut request = request.clone();
                    self.check_destination(destination.clone(), &mut request, progress).await?;
                    self.fill_single_flight(&request, progress).await?
                }
            },
        };
        // Also for files that were downloaded under a less strict configuration.
        self.check_policy(request, &outcome.leased.manifest)?;
        self.wait_until_durable(request, &outcome.leased).await?;
        artifact(request, outcome, progress)
    }

    /// Fails if the folder into which the caller will materialize the files has no room for them. The fill serves other
    /// callers, too, so this is not part of it.
    async fn check_destination(
        &self,
        destination: Destination,
        request: &mut FetchRequest,
        progress: &Progress,
    ) -> Result<()> {
        let selected = self.plan_ahead(request, progress).await?.selected;
        blocking(move || destination.check_room(&selected)).await
    }

    /// Runs one fill on behalf of all callers that joined it. `publisher` reports its state to them.
    pub(super) async fn fill(
        &self,
        request: &FetchRequest,
        progress: &Progress,
        publisher: &FillPublisher,
    ) -> Result<FillOutcome> {
        // Step 3 between processes: wait for the process that fills this artifact, or become the leader.
        let lead = match self.join_or_lead(request, progress).await? {
            JoinOutcome::Filled(leased) => return Ok(FillOutcome::local(*leased)),
            JoinOutcome::Leading(lead) => lead,
        };
        publisher.share_leadership(&lead);
        // Steps 4 and 5.
        let (plan, mut staged) = self.plan_and_download(request, progress, publisher).await?;
        // The formats of all files are known only now. Forbidden files do not stay in staging.
        if let Err(error) = self.check_policy(request, &staged.completed_listing()) {
            publisher.invalidate_partial_files();
            blocking(move || staged.staging.discard()).await?;
            return Err(error);
        }
        let backfill_job = self.backfill_job(&plan, &mut staged);
        let fetched_bytes = staged.fetched_bytes;
        // Record the pending upload before publishing, so that a crash after the publish cannot lose it.
        let backfill_job = self.record_pending_upload(&request.key, backfill_job).await;
        // Step 6: publish the staged files and lease them. The manifest is the commit point.
        let leased = self.publish(staged, progress).await?;
        self.spawn_background_sync();
        // An eviction just before the publish may have removed the record. The lease now prevents another one.
        let backfill_job = self.restore_pending_upload(&request.key, backfill_job).await;
        // Waiting processes and callers continue now. They do not wait for the backfill.
        drop(lead);
        let outcome = FillOutcome { fetched_bytes, ..FillOutcome::local(leased) };
        publisher.set_published(&outcome);
        // Step 7: backfill the remote. A failure is logged, and a later run tries again.
        let done = self.backfill(&outcome.leased, backfill_job, progress).await;
        Ok(FillOutcome { backfilled_bytes: done.uploaded_bytes, copied_bytes: done.copied_bytes, ..outcome })
    }

    /// Steps 4 and 5 of the main path. Repeats them once if another tool replaced unmanaged objects after they were
    /// listed.
    async fn plan_and_download(
        &self,
        request: &FetchRequest,
        progress: &Progress,
        publisher: &FillPublisher,
    ) -> Result<(FillPlan, StagedFill)> {
        // Step 4: plan which files are missing and which sources have them.
        let plan = self.plan_fill(request, progress).await?;
        self.set_remote_usable(!plan.remote_unusable);
        // Step 5: download the missing files into staging.
        // Bytes that fail verification may belong to a newer file, which replaced the listed one after it was listed.
        let may_be_replaced =
            |error: &Error, tier| error.kind() == ErrorKind::Corrupt && plan.saw_other_validators(tier);
        match self.download(request, &plan, progress, publisher).await {
            Err(error) if may_be_replaced(&error, Tier::Origin) => Err(error.superseded()),
            Err(error)
                if plan.remote_unmanaged
                    && (error.kind() == ErrorKind::Conflict || may_be_replaced(&error, Tier::Remote)) =>
            {
                tracing::warn!(%error, "objects on the remote were replaced; starting over with a new list");
                // The source in the request has already listed the old objects. Without it, the plan creates a new one.
                let relisted = FetchRequest { remote: None, ..request.clone() };
                let plan = self.plan_fill(&relisted, progress).await?;
                // Readers must not combine bytes of old and new objects.
                publisher.invalidate_partial_files();
                let staged = self.download(&relisted, &plan, progress, publisher).await?;
                Ok((plan, staged))
            }
            downloaded => Ok((plan, downloaded?)),
        }
    }

    /// Step 2 of the main path.
    async fn acquire(&self, request: &FetchRequest, progress: &Progress) -> Result<Option<LeasedArtifact>> {
        let _phase = progress.enter(Phase::Acquire, 0);
        self.try_acquire(request).await
    }

    /// Acquires a lease if the local or the lower directory holds all selected files; otherwise returns `None`. Waits
    /// for the end of an eviction of the artifact.
    pub(super) async fn try_acquire(&self, request: &FetchRequest) -> Result<Option<LeasedArtifact>> {
        let started = Instant::now();
        loop {
            let (key, selection) = (request.key.clone(), request.selection.clone());
            match self.on_disk(move |disk| disk.acquire(&key, &selection)).await? {
                AcquireOutcome::Leased(leased) => return Ok(Some(*leased)),
                AcquireOutcome::Absent => return self.acquire_lower(request).await,
                AcquireOutcome::Evicting if started.elapsed() > LOCK_WAIT_MAX => {
                    return Err(Error::unavailable("an eviction of the artifact does not finish")
                        .tier(Tier::Disk)
                        .hint("look for a stopped modelcache process; its lock is released when it ends"));
                }
                AcquireOutcome::Evicting => tokio::time::sleep(POLL_INTERVAL).await,
            }
        }
    }

    /// Reserves room on disk, evicting other artifacts if necessary, and downloads the missing files into staging.
    async fn download(
        &self,
        request: &FetchRequest,
        plan: &FillPlan,
        progress: &Progress,
        publisher: &FillPublisher,
    ) -> Result<StagedFill> {
        let (key, selected) = (request.key.clone(), plan.selected.clone());
        // Reuses local blobs and the staged files of an earlier fill. Reserves room for the rest.
        let staging = self.on_disk(move |disk| disk.begin_fill(&key, &selected)).await?;
        let (partial_files, to_download) = files_to_download(&staging, plan)?;
        // Callers of `open_file` can read from here on. The one that started this fill stays registered as a reader
        // during the download.
        let _first_reader = publisher.set_partial_files(partial_files);
        let (downloaded, streaming_upload) =
            match self.download_missing(to_download, plan, self.purpose_of(request), progress).await {
                Ok(downloaded) => downloaded,
                Err(error) => {
                    // Before the staged files are removed or replaced, so that no reader uses them afterwards.
                    publisher.invalidate_partial_files();
                    // The next fill resumes from the downloaded bytes, unless they are needed as room on a full disk.
                    if error.kind() == ErrorKind::Full
                        && let Err(error) = blocking(move || staging.discard()).await
                    {
                        tracing::warn!(%error, "cannot remove the staged files; the next fill removes them");
                    }
                    return Err(error);
                }
            };
        let fetched_bytes = downloaded.iter().map(|file| file.fetched_bytes).sum();
        let by_name: BTreeMap<String, _> =
            downloaded.into_iter().map(|file| (file.target.name().to_owned(), file)).collect();
        // Collect the reused and the downloaded files by path.
        let (mut files, mut bad_on_remote) = (BTreeMap::new(), BTreeSet::new());
        for (path, entry) in &plan.selected {
            let name = staged_name(path, entry);
            let staged = match (staging.reused(&name), by_name.get(&name)) {
                (Some(identity), _) => {
                    // The bytes are verified, but no ladder was computed. Keep only a ladder from this disk.
                    let ladder = plan.listing.files.get(path).and_then(|listed| listed.ladder.clone());
                    let mut entry = entry.clone();
                    entry.ladder = ladder;
                    StagedFile { name, entry, identity }
                }
                (None, Some(downloaded)) => {
                    if downloaded.bad_tiers.contains(&Tier::Remote) {
                        bad_on_remote.insert(path.clone());
                    }
                    // Another file of equal content may have been downloaded in place of this one. Keep the mode of
                    // this file.
                    let executable = entry.executable;
                    let mut entry = downloaded.entry.clone();
                    entry.executable = executable;
                    StagedFile { name, entry, identity: downloaded.identity }
                }
                (None, None) => return Err(Error::not_found(format!("{path} was not downloaded"))),
            };
            files.insert(path.clone(), staged);
        }
        let files = detect_formats(&staging, files, self.0.config.forbid.has_formats()).await?;
        let staged_fill = StagedFill {
            staging,
            listing: plan.listing.clone(),
            files,
            bad_on_remote,
            fetched_bytes,
            streaming_upload,
        };
        // The digests of all files are known only now. A mismatch must not be published.
        request.check_demanded_digest(&staged_fill.completed_listing())?;
        Ok(staged_fill)
    }

    /// Downloads the files. If the remote does not have the artifact, also uploads them to it at the same time.
    async fn download_missing(
        &self,
        mut to_download: BTreeMap<String, DownloadFile>,
        plan: &FillPlan,
        purpose: Purpose,
        progress: &Progress,
    ) -> Result<(Vec<DownloadedFile>, Option<StreamingUpload>)> {
        let streaming_upload = self.start_streaming_upload(plan, &mut to_download);
        let bytes = to_download.values().map(|file| file.entry.size).sum();
        let _phase = progress.enter(Phase::Download, bytes);
        // Small downloads neither need many connections nor show how many are right.
        let large = to_download.values().next().filter(|_| bytes >= REMEMBERED_BYTES_MIN);
        let endpoint = large.and_then(|file| file.sources.first()?.endpoint());
        let endpoint = self.start_with_remembered_limit(endpoint).await;
        let downloaded = self.0.downloader.download(to_download.into_values().collect(), purpose, progress).await?;
        self.remember_limit(endpoint).await;
        Ok((downloaded, streaming_upload))
    }

    /// Raises the initial limit on concurrent requests to the one that was remembered for the endpoint, if there is
    /// one. Returns the endpoint if this process has not downloaded before: only then is the limit that this download
    /// finds a limit of that endpoint.
    async fn start_with_remembered_limit(&self, endpoint: Option<String>) -> Option<String> {
        let endpoint = endpoint?;
        let name = endpoint.clone();
        let remembered = self.on_disk(move |disk| Ok(disk.remembered_request_limit(&name))).await.ok().flatten();
        self.0.downloader.start_with(remembered).then_some(endpoint)
    }

    /// Remembers the limit on concurrent requests for the next process.
    async fn remember_limit(&self, endpoint: Option<String>) {
        let Some(endpoint) = endpoint else { return };
        let found = self.0.downloader.found_limit();
        let remembered = self.on_disk(move |disk| disk.remember_request_limit(&endpoint, found)).await;
        if let Err(error) = remembered {
            tracing::debug!(%error, "the limit on concurrent requests was not remembered");
        }
    }

    /// Step 6 of the main path.
    async fn publish(&self, staged: StagedFill, progress: &Progress) -> Result<LeasedArtifact> {
        let _phase = progress.enter(Phase::Publish, 0);
        self.on_disk(move |disk| disk.publish(staged.staging, &staged.listing, &staged.files)).await
    }

    /// Returns the upload of the files that the remote lacks or has with wrong bytes. Moves the streaming upload out of
    /// `staged` into it. Returns `None` if there are no such files, or if they must not be uploaded.
    fn backfill_job(&self, plan: &FillPlan, staged: &mut StagedFill) -> Option<BackfillJob> {
        if !self.may_backfill() || plan.remote_unmanaged || plan.origin_in_remote {
            let key = &plan.listing.key;
            tracing::debug!(
                %key,
                "no backfill: the mode is `never`, there is no writable remote, its objects are unmanaged, or the \
                 origin reads from it"
            );
            return None;
        }
        // The remote contradicts the origin or refused a request. If it is only unreachable, a later run can upload the
        // files.
        if plan.remote_unusable && !plan.remote_down {
            return None;
        }
        let held = |path: &FilePath| {
            plan.remote.as_ref().and_then(|m| m.files.get(path)).is_some_and(|entry| entry.held.is_some())
        };
        let missing = |path: &&FilePath| !held(path) || staged.bad_on_remote.contains(*path);
        let paths: BTreeSet<FilePath> = staged.files.keys().filter(missing).cloned().collect();
        let digest_of = |path: &FilePath| Some((path.clone(), staged.files.get(path)?.entry.sha256?));
        let missing = MissingFiles {
            digests: paths.iter().filter_map(digest_of).collect(),
            rewrite: staged.bad_on_remote.clone(),
            files: paths,
        };
        let streaming =
            staged.streaming_upload.take().map(|streaming_upload| (streaming_upload, staged.verified_files()));
        (!missing.files.is_empty()).then(|| BackfillJob::new(missing, plan.remote_down, streaming))
    }
}

/// Returns the partial file of each selected file, and the files to download, keyed by staging name. Files with equal
/// content share a staging name and a partial file, and are downloaded once.
fn files_to_download(staging: &Staging, plan: &FillPlan) -> Result<(PartialFiles, BTreeMap<String, DownloadFile>)> {
    let (mut partial_files, mut by_name, mut to_download) = (PartialFiles::new(), BTreeMap::new(), BTreeMap::new());
    let mut read_gates: BTreeMap<String, ReadGate> = BTreeMap::new();
    for (path, entry) in &plan.selected {
        // The strictest gate of all files with equal content applies to each of them.
        let (name, read_gate) = (staged_name(path, entry), plan.read_gate(path));
        let strictest = read_gates.entry(name).or_insert(read_gate);
        *strictest = read_gate.max(*strictest);
    }
    for (path, entry) in &plan.selected {
        let name = staged_name(path, entry);
        let target = staging.file(&name);
        let read_gate = read_gates.get(&name).copied().unwrap_or(ReadGate::Published);
        let partial_file: &mut Arc<PartialFile> =
            by_name.entry(name.clone()).or_insert_with(|| PartialFile::new(target.clone(), entry.size, read_gate));
        partial_files.insert(path.clone(), partial_file.clone());
        // A reused file is complete and verified, so it can be read at once.
        if staging.reused(&name).is_some() {
            partial_file.mark_verified();
        } else if let Entry::Vacant(vacant) = to_download.entry(name) {
            let (owner, partial_file, sources) = (staging.owner(), partial_file.clone(), plan.sources_of(path)?);
            let (path, entry, may_be_staged) = (path.clone(), entry.clone(), staging.is_adopted());
            vacant.insert(DownloadFile {
                path,
                entry,
                target,
                may_be_staged,
                owner,
                sources,
                on_part: None,
                partial_file,
            });
        }
    }
    Ok((partial_files, to_download))
}

/// Detects the format of each file whose format is unknown, from its first bytes. With `of_all`, detects the format of
/// every file, because a manifest may state a wrong one.
async fn detect_formats(
    staging: &Staging,
    mut files: BTreeMap<FilePath, StagedFile>,
    of_all: bool,
) -> Result<BTreeMap<FilePath, StagedFile>> {
    let folder = staging.file("");
    blocking(move || {
        for file in files.values_mut().filter(|file| of_all || file.entry.format.is_none()) {
            file.entry.format = format_name(folder.join(&file.name).open(false));
        }
        Ok(files)
    })
    .await
}

impl StagedFill {
    /// Returns the identity and the digest of each verified file, by path.
    fn verified_files(&self) -> VerifiedFiles {
        let verified =
            |(path, file): (&FilePath, &StagedFile)| Some((path.clone(), (file.identity, file.entry.sha256?)));
        self.files.iter().filter_map(verified).collect()
    }

    /// Returns the listing, completed with the digests that this fill computed.
    fn completed_listing(&self) -> Manifest {
        let mut listing = self.listing.clone();
        for (path, file) in &self.files {
            if let Some(entry) = listing.files.get_mut(path) {
                entry.learn(&file.entry);
                // What was detected counts, not what a manifest states.
                if file.entry.format.is_some() {
                    entry.format.clone_from(&file.entry.format);
                }
            }
        }
        listing
    }
}

impl FillOutcome {
    /// Returns the outcome for files that were on disk already, so that no bytes were transferred.
    pub(super) fn local(leased: LeasedArtifact) -> Self {
        Self { leased: Arc::new(leased), fetched_bytes: 0, backfilled_bytes: 0, copied_bytes: 0 }
    }
}

/// Returns the artifact and its report, after a last check of the demanded digest.
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
    // `get_with` sets the duration.
    let took = Duration::ZERO;
    let report = GetReport { from, bytes, backfilled_bytes, copied_bytes, files, selected_bytes, link, phases, took };
    let (path, selection) = (leased.path(&request.selection), request.selection.clone());
    Ok(Artifact { key: request.key.clone(), path, hub: None, report, selection, lease: leased })
}
