//! Opening one file of an artifact, which can then be read during its download.
//!
//! A local file is leased at once. Otherwise the caller joins the in-flight fill that includes the file, or starts the
//! fill that a get would start, and reads from staging. The ranges that it waits for are downloaded first. `plan.rs`
//! decides whether bytes may be read before the whole file is verified. If another process fills the artifact, opening
//! waits for the end of that fill.
//!
//! An open file is bound to one generation of the staged file: the one that the first bytes were read from. If that
//! generation fails verification and the file is downloaded again, all further waits fail. The bytes read never mix two
//! generations.

use super::fill::{FillOutcome, FillState, FirstRead, InFlightFill, task_lost};
use super::get::artifact;
use super::plan::only_file;
use super::resolve::FetchRequest;
use super::{Artifact, Cache, GetOptions};
use crate::disk::{self, LeasedArtifact};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::runtime::blocking;
use crate::selection::Selection;
use crate::transfer::{PartialFile, PartialFiles, PartialReader};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

/// Options of [`Cache::open_file`]: which file to open, and when its bytes may be read.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// The file of the artifact. `None` opens the file that the reference names, or the only file of the artifact.
    pub file: Option<FilePath>,
    /// Make bytes readable as soon as they are written, before they are verified. Wrong bytes are still detected at the
    /// end of the download.
    pub unchecked: bool,
    /// See [`GetOptions::refresh`].
    pub refresh: bool,
    /// See [`GetOptions::max_tier`].
    pub max_tier: Tier,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { file: None, unchecked: false, refresh: false, max_tier: Tier::Origin }
    }
}

/// One file of an artifact, which may still be downloading. Once it is complete, the artifact is leased until this
/// value is dropped.
///
/// Dropping it earlier has the effect of cancelling a [`get`](Cache::get): downloaded bytes are kept for the next fill,
/// and a fill whose bytes are all downloaded is still published.
#[derive(Debug)]
#[must_use = "the download continues only while this value exists"]
pub struct OpenFile {
    /// The key of the artifact.
    pub key: ArtifactKey,
    /// The path of the file in the artifact.
    pub path: FilePath,
    size: u64,
    progress: Progress,
    shared: Arc<Shared>,
    /// The fill that downloads the file; `None` if the file was on disk.
    filling: Option<AwaitedFill>,
}

/// The fill that an open file waits for.
#[derive(Debug)]
struct AwaitedFill {
    reader: PartialReader,
    /// Keeps the fill running.
    _fill: Arc<InFlightFill>,
}

/// State shared by an open file and its [`Follower`].
#[derive(Debug, Default)]
struct Shared {
    /// The file that bytes are read from. It is set before the first read and never changes.
    bound: OnceLock<BoundFile>,
    /// The result of the fill; `None` while it is running.
    end: watch::Sender<Option<Result<Arc<LeasedArtifact>>>>,
    /// The path of the complete file. It is separate from `end` so that it can be read without a lock.
    whole: OnceLock<PathBuf>,
}

/// An open file descriptor, and the generation of the staged file that it refers to.
#[derive(Debug)]
struct BoundFile {
    file: Arc<File>,
    /// `None` for a published file.
    generation: Option<u64>,
}

impl BoundFile {
    /// Returns true if bytes of `generation` may be read from this file.
    fn has_generation(&self, generation: u64) -> bool {
        self.generation.is_none_or(|bound| bound == generation)
    }
}

impl Cache {
    /// Opens one file of the artifact for reading, whether or not it is on disk yet. Returns once the size of the file
    /// is known.
    ///
    /// # Errors
    /// As for [`get`](Self::get), if the error occurs before the download starts; `Invalid` if it is ambiguous which
    /// file to open.
    pub async fn open_file(
        &self,
        reference: &Reference,
        options: &OpenOptions,
        progress: &Progress,
    ) -> Result<OpenFile> {
        let opened = match self.open_once(reference, options, progress).await {
            Err(error) if error.is_superseded() => {
                tracing::warn!(%error, "the artifact was replaced at its origin during the download; starting over");
                self.open_once(reference, &OpenOptions { refresh: true, ..options.clone() }, progress).await
            }
            opened => opened,
        };
        opened.inspect_err(|error| self.metrics().record_failure(error.kind()))
    }

    /// Makes one attempt of [`open_file`](Self::open_file).
    async fn open_once(&self, reference: &Reference, options: &OpenOptions, progress: &Progress) -> Result<OpenFile> {
        let get = options.as_get(reference)?;
        if let Some(hit) = self.try_fast_hit(reference, &get, progress) {
            return self.open_leased(hit?, true, progress).await.map_err(|error| error.artifact(reference));
        }
        let request = self.resolve(reference, &get, progress).await.map_err(|error| error.artifact(reference))?;
        // A forbidden format is detected only when the file is complete, so no bytes may be read before that.
        let unchecked = options.unchecked && !self.0.config.forbid.has_formats();
        self.open_resolved(request, unchecked, true, progress).await.map_err(|error| error.artifact(reference))
    }

    /// Opens the file of a resolved reference. With `counts`, the open counts as a get.
    pub(super) async fn open_resolved(
        &self,
        mut request: FetchRequest,
        unchecked: bool,
        counts: bool,
        progress: &Progress,
    ) -> Result<OpenFile> {
        // The file is on disk: lease it, as step 2 of the main path does.
        if let Some(leased) = self.try_acquire(&request).await? {
            return self.open_filled(&request, FillOutcome::local(leased), counts, progress).await;
        }
        let file = match request.selection.one_file() {
            Some(file) => file.clone(),
            None => self.plan_ahead(&mut request, progress).await?.only_file()?,
        };
        // Join or start the fill, and wait until its partial files are known.
        let first_read = FirstRead { file: file.clone(), unchecked };
        let (fill, started) = self.join_or_start_fill(&request, Some(&first_read), progress);
        let (mut states, mut partial_files) = (fill.state(), fill.partial_files());
        let partial_file = loop {
            match &*states.borrow_and_update() {
                FillState::Running => {}
                // The fill is over already, for instance because another process has filled the artifact.
                FillState::Published(outcome) | FillState::Ended(Ok(outcome)) => break Err(outcome.clone()),
                FillState::Ended(Err(error)) => return Err(error.clone()),
            }
            let found = partial_files.borrow_and_update().as_ref().map(|files| partial_file_of(files, &file));
            if let Some(partial_file) = found {
                break Ok(partial_file?);
            }
            tokio::select! {
                biased;
                changed = states.changed() => changed.map_err(|_| task_lost())?,
                _ = partial_files.changed() => {}
            }
        };
        let partial_file = match partial_file {
            Ok(partial_file) => partial_file,
            Err(outcome) => return self.open_filled(&request, outcome, counts, progress).await,
        };
        let opened = OpenFile {
            key: request.key.clone(),
            path: file,
            size: partial_file.size(),
            progress: fill.progress().clone(),
            shared: Arc::default(),
            filling: Some(AwaitedFill { reader: partial_file.open_reader(unchecked), _fill: fill }),
        };
        // The follower completes the open file when the fill has ended. It does not keep the fill running.
        let follower = Follower {
            cache: self.clone(),
            request,
            path: opened.path.clone(),
            partial_file,
            shared: opened.shared.clone(),
            progress: progress.clone(),
            started,
            counts,
        };
        tokio::spawn(follower.follow(states));
        Ok(opened)
    }

    /// Opens the file after the artifact is published.
    async fn open_filled(
        &self,
        request: &FetchRequest,
        outcome: FillOutcome,
        counts: bool,
        progress: &Progress,
    ) -> Result<OpenFile> {
        self.check_policy(request, &outcome.leased.manifest)?;
        self.wait_until_durable(request, &outcome.leased).await?;
        self.open_leased(artifact(request, outcome, progress)?, counts, progress).await
    }

    /// Opens the file of a leased artifact. With `counts`, counts the get.
    async fn open_leased(&self, artifact: Artifact, counts: bool, progress: &Progress) -> Result<OpenFile> {
        let (key, leased) = (artifact.key.clone(), artifact.lease.clone());
        let path = only_file(leased.manifest.selected(&artifact.selection).map(|(path, _)| path))?;
        let shared = Arc::new(Shared::default());
        shared.bind_published(&path, &leased).await?;
        shared.finish(&path, leased);
        let size = shared.bound.get().map_or(Ok(0), |bound| bound.file.metadata().map(|found| found.len()));
        let size = size.map_err(|cause| Error::new(ErrorKind::Directory, "cannot read the file size").cause(cause))?;
        if counts {
            self.count_get(&Ok(artifact));
        }
        Ok(OpenFile { key, path, size, progress: progress.clone(), shared, filling: None })
    }
}

/// The task that waits for the publish on behalf of an open file, completes the open file, and counts the open as a
/// get. It does not keep the fill running.
struct Follower {
    cache: Cache,
    request: FetchRequest,
    path: FilePath,
    partial_file: Arc<PartialFile>,
    shared: Arc<Shared>,
    progress: Progress,
    /// True if the open started the fill, false if it joined one.
    started: bool,
    /// True if the open counts as a get.
    counts: bool,
}

impl Follower {
    /// Runs the task.
    async fn follow(self, mut states: watch::Receiver<FillState>) {
        // Step 1: wait for the publish.
        let phase = (!self.started).then(|| (self.progress.enter(Phase::Join, 0), self.cache.count_waiting_call()));
        let outcome = match states.wait_for(|state| !matches!(state, FillState::Running)).await.as_deref() {
            Ok(FillState::Published(outcome)) => Ok(outcome.clone()),
            Ok(FillState::Ended(outcome)) => {
                outcome.clone().inspect_err(|error| self.cache.metrics().record_failure(error.kind()))
            }
            Ok(FillState::Running) | Err(_) => Err(task_lost()),
        };
        drop(phase);
        // Step 2: report the result to waiting readers.
        let ended = match &outcome {
            Ok(outcome) => self.finish(outcome).await,
            Err(error) => Err(error.clone()),
        };
        if let Err(error) = ended {
            self.shared.end.send_replace(Some(Err(error)));
        }
        // Step 3: count the get. The transferred bytes count for the call that started the fill.
        let Ok(outcome) = outcome else { return };
        let (cache, leased) = (&self.cache, outcome.leased.clone());
        let outcome = if self.started { outcome } else { outcome.without_transfers() };
        if self.counts {
            cache.count_get(&artifact(&self.request, outcome, &self.progress));
        }
        // Step 4: sync, if the configuration requires it. Readers do not wait for this.
        if let Err(error) = cache.wait_until_durable(&self.request, &leased).await {
            tracing::warn!(artifact = %self.request.key, %error, "cannot sync an opened file to stable storage");
        }
    }

    /// Completes the open file. Fails unless the bytes read so far are of the generation that was verified, and the
    /// published file has the expected size.
    async fn finish(&self, outcome: &FillOutcome) -> Result<()> {
        self.shared.bind_published(&self.path, &outcome.leased).await?;
        let bound = self.shared.bound.get();
        let is_verified = bound
            .is_some_and(|bound| bound.generation.is_none_or(|generation| self.partial_file.is_verified(generation)));
        let size = outcome.leased.manifest.files.get(&self.path).map(|entry| entry.size);
        if !is_verified || size != Some(self.partial_file.size()) {
            return Err(replaced(&self.path));
        }
        self.shared.finish(&self.path, outcome.leased.clone());
        Ok(())
    }
}

impl OpenOptions {
    /// Returns the options of a get of the file.
    pub(super) fn as_get(&self, reference: &Reference) -> Result<GetOptions> {
        let selection = match (&self.file, &reference.file) {
            (Some(file), Some(named)) if file != named => {
                return Err(Error::invalid(format!("{reference} names another file than the requested {file}")));
            }
            // The file is in the reference already, or the artifact must have only one.
            (Some(_), Some(_)) | (None, _) => Selection::all(),
            (Some(file), None) => Selection::file(file.clone()),
        };
        Ok(GetOptions { selection, refresh: self.refresh, max_tier: self.max_tier, ..GetOptions::default() })
    }
}

impl OpenFile {
    /// Returns the size of the complete file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the progress of the fill, with the bytes received from each tier.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Returns true once the whole file is on disk, verified and leased.
    pub fn is_whole(&self) -> bool {
        self.shared.whole.get().is_some()
    }

    /// Returns the path of the file once the whole file is on disk, verified and leased. Takes no lock.
    pub fn whole_path(&self) -> Option<&Path> {
        self.shared.whole.get().map(PathBuf::as_path)
    }

    /// Returns the file once it is open: after the first [`wait`](Self::wait), or once the whole file is on disk.
    /// Only ranges for which `wait` or [`try_wait`](Self::try_wait) returned the file may be read. Takes no lock.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.shared.bound.get().map(|bound| &bound.file)
    }

    /// Returns the file if `range` (in bytes) can be read from it without waiting. Returns `None` until
    /// [`wait`](Self::wait) has opened the file or the fill has ended, even if the range is downloaded.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait), if the error is known already.
    pub fn try_wait(&self, range: Range<u64>) -> Result<Option<&Arc<File>>> {
        self.check_range(&range)?;
        let Some(bound) = self.shared.bound.get() else { return Ok(None) };
        match &self.filling {
            Some(filling) if !self.is_whole() => match filling.reader.begin_read(&range) {
                Some(generation) if bound.has_generation(generation) => Ok(Some(&bound.file)),
                Some(_) => Err(replaced(&self.path).artifact(&self.key)),
                None => Ok(None),
            },
            _ => Ok(Some(&bound.file)),
        }
    }

    /// Waits until `range` (in bytes) can be read, and returns the file to read it from. The range is downloaded before
    /// all others that are missing.
    ///
    /// # Errors
    /// The error of the fill. `Corrupt` if the file failed verification and is downloaded again, so that bytes read
    /// before may be wrong. `Invalid` if the range is outside the file.
    pub async fn wait(&self, range: Range<u64>) -> Result<&Arc<File>> {
        if let Some(file) = self.try_wait(range.clone())? {
            return Ok(file);
        }
        let Some(filling) = &self.filling else { return Err(task_lost()) };
        filling.reader.demand(&range);
        let file = filling.wait(&self.shared, &self.path, &range).await;
        file.map_err(|error| error.artifact(&self.key))
    }

    /// Waits until the whole file is on disk, verified and leased, and returns its path. The path is valid until this
    /// value is dropped.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub async fn whole(&self) -> Result<PathBuf> {
        if let Some(filling) = self.filling.as_ref().filter(|_| !self.is_whole()) {
            filling.reader.demand(&(0..self.size));
        }
        let mut ends = self.shared.end.subscribe();
        let ended = ends.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        let leased = ended.unwrap_or_else(|| Err(task_lost())).map_err(|error| error.artifact(&self.key))?;
        Ok(leased.dir.view(&self.path).full())
    }

    /// Fails with `Invalid` if `range` is not in the file.
    fn check_range(&self, range: &Range<u64>) -> Result<()> {
        if range.start > range.end || range.end > self.size {
            let Range { start, end } = range;
            let message = format!("the range {start}..{end} is not in {}, which has {} bytes", self.path, self.size);
            return Err(Error::invalid(message).artifact(&self.key));
        }
        Ok(())
    }
}

impl AwaitedFill {
    /// Waits until `range` can be read from the staged file, or until the fill ends.
    async fn wait<'a>(&self, shared: &'a Shared, path: &FilePath, range: &Range<u64>) -> Result<&'a Arc<File>> {
        let (mut ends, mut received) = (shared.end.subscribe(), self.reader.watch());
        loop {
            // Mark the present state as seen before it is evaluated, so that no later change is missed.
            let end = ends.borrow_and_update().clone();
            received.mark_seen();
            let bound = shared.bound.get();
            // The fill has succeeded: every range can be read.
            if let (Some(Ok(_)), Some(bound)) = (&end, bound) {
                return Ok(&bound.file);
            }
            match (self.reader.begin_read(range), bound) {
                (Some(generation), Some(bound)) if bound.has_generation(generation) => return Ok(&bound.file),
                // The first readable range: open the staged file, and bind this open file to its generation.
                (Some(generation), None) => {
                    let partial_file = self.reader.partial_file();
                    let staged = partial_file.staged().clone();
                    let file = blocking(move || disk::open_staged(&staged)).await?;
                    // If the file was removed or replaced before it was opened, wait for the change that reports this.
                    if let Some(file) = file.filter(|_| partial_file.is_current(generation)) {
                        let bound = shared
                            .bound
                            .get_or_init(|| BoundFile { file: Arc::new(file), generation: Some(generation) });
                        match bound.has_generation(generation) {
                            true => return Ok(&bound.file),
                            // A concurrent wait has bound another generation.
                            false => continue,
                        }
                    }
                }
                // The bound generation failed verification.
                (_, Some(bound)) if self.reader.generation().is_some_and(|now| !bound.has_generation(now)) => {
                    return Err(replaced(path));
                }
                _ => {}
            }
            if let Some(Err(error)) = end {
                return Err(error);
            }
            tokio::select! {
                changed = ends.changed() => changed.map_err(|_| task_lost())?,
                () = received.changed() => {}
            }
        }
    }
}

impl Shared {
    /// Binds to the published file, unless a generation of the staged file is bound already.
    async fn bind_published(&self, path: &FilePath, leased: &Arc<LeasedArtifact>) -> Result<()> {
        if self.bound.get().is_none() {
            let (from, path) = (leased.clone(), path.clone());
            let file = Arc::new(blocking(move || from.open(&path)).await?);
            // A concurrent wait may have bound a generation meanwhile.
            let _ = self.bound.set(BoundFile { file, generation: None });
        }
        Ok(())
    }

    /// Marks the file as complete, and keeps the lease.
    fn finish(&self, path: &FilePath, leased: Arc<LeasedArtifact>) {
        // Readahead was disabled while the file could still be written with O_DIRECT.
        if let Some(bound) = self.bound.get() {
            disk::restore_readahead(&bound.file);
        }
        let _ = self.whole.set(leased.dir.view(path).full());
        self.end.send_replace(Some(Ok(leased)));
    }
}

/// Returns the partial file of `file`.
///
/// # Errors
/// `NotFound` if the artifact does not have the file.
fn partial_file_of(files: &PartialFiles, file: &FilePath) -> Result<Arc<PartialFile>> {
    files.get(file).cloned().ok_or_else(|| Error::not_found(format!("it has no file {file}")))
}

/// Returns the error for an open file, after the generation that it is bound to failed verification.
fn replaced(path: &FilePath) -> Error {
    Error::corrupt(format!(
        "{path} failed verification while it was read, and is downloaded again: the bytes read so far may be wrong"
    ))
    .hint("discard the bytes read so far, and open the file again")
}
