//! Opening one file of an artifact: its bytes can be read as they come.
//!
//! What is here is lent at once. Else the caller joins the flight that brings the file, or starts the one that a get of
//! the same would start, and reads from staging: what it waits for is asked for first. Whether bytes are given before
//! the whole file is proven is decided in `plan.rs`. Where another process fills the artifact, opening waits until that
//! is done.
//!
//! Surprise: an open file is bound to the very file that it was first given bytes of. If that turns out wrong and is
//! filled anew, every further wait fails; there is never a mixture of two.

use super::fill::{FillOutcome, FillState, FirstRead, InFlightFill, vanished};
use super::get::artifact;
use super::plan::only_file;
use super::resolve::FetchRequest;
use super::{Artifact, Cache, GetOptions};
use crate::disk::{self, LeasedArtifact};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::selection::Selection;
use crate::transfer::{PartialFile, PartialFiles, PartialReader, blocking};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

/// What is to be opened, and how.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Which file of the artifact. `None`: the one that the reference names, or the only one there is.
    pub file: Option<FilePath>,
    /// Give bytes as soon as they are written, right or wrong. That the whole is wrong is found out later all the same.
    pub unchecked: bool,
    /// As for [`GetOptions::refresh`].
    pub refresh: bool,
    /// As for [`GetOptions::max_tier`].
    pub max_tier: Tier,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { file: None, unchecked: false, refresh: false, max_tier: Tier::Origin }
    }
}

/// One file of an artifact, which may still be coming. Once it is whole, it is held against eviction while this lives.
///
/// Dropped before that, it lets go of the fill as a cancelled [`get`](Cache::get) does: what came is kept for the next
/// one, and a fill of which every byte has come is published.
#[derive(Debug)]
pub struct OpenFile {
    /// The artifact.
    pub key: ArtifactKey,
    /// Which of its files.
    pub path: FilePath,
    size: u64,
    progress: Progress,
    shared: Arc<Shared>,
    /// `None` where it was here.
    filling: Option<Filling>,
}

/// A fill that an open file waits for.
#[derive(Debug)]
struct Filling {
    reader: PartialReader,
    /// Keeps it going.
    _flight: Arc<InFlightFill>,
}

/// What an open file has in common with the task that follows its flight.
#[derive(Debug, Default)]
struct Shared {
    /// The file that bytes are read from.
    given: OnceLock<BoundFile>,
    end: watch::Sender<Option<Result<Arc<LeasedArtifact>>>>,
    /// Where the whole file lies, for who may take no lock.
    whole: OnceLock<PathBuf>,
}

#[derive(Debug)]
struct BoundFile {
    file: Arc<File>,
    /// Of the staged file; `None`: it was published.
    generation: Option<u64>,
}

impl BoundFile {
    /// Whether it is that one, or whole.
    fn is_of(&self, generation: u64) -> bool {
        self.generation.is_none_or(|given| given == generation)
    }
}

impl Cache {
    /// Opens one file of the artifact for reading, whether or not it is here yet. Its size is known when this returns.
    ///
    /// # Errors
    /// As for [`get`](Self::get), as far as they are met before the first byte is asked for; `Invalid` where several
    /// files might be meant.
    pub async fn open_file(
        &self,
        reference: &Reference,
        options: &OpenOptions,
        progress: &Progress,
    ) -> Result<OpenFile> {
        let opened = match self.open_once(reference, options, progress).await {
            Err(error) if error.is_superseded() => {
                tracing::warn!(%error, "starting over");
                self.open_once(reference, &OpenOptions { refresh: true, ..options.clone() }, progress).await
            }
            opened => opened,
        };
        opened.inspect_err(|error| self.metrics().failed(error.kind()))
    }

    async fn open_once(&self, reference: &Reference, options: &OpenOptions, progress: &Progress) -> Result<OpenFile> {
        let get = options.as_get(reference)?;
        if let Some(hit) = self.hit(reference, &get, progress) {
            return self.open_here(hit?, progress).await.map_err(|error| error.artifact(reference));
        }
        let request = self.resolve(reference, &get, progress).await.map_err(|error| error.artifact(reference))?;
        self.open_wanted(request, options.unchecked, progress).await.map_err(|error| error.artifact(reference))
    }

    async fn open_wanted(&self, mut request: FetchRequest, unchecked: bool, progress: &Progress) -> Result<OpenFile> {
        if let Some(leased) = self.try_acquire(&request).await? {
            return self.open_landed(&request, FillOutcome::here(leased), progress).await;
        }
        let file = match request.selection.one_file() {
            Some(file) => file.clone(),
            None => self.file_meant(&mut request, progress).await?,
        };
        let first_read = FirstRead { file: file.clone(), unchecked };
        let (flight, started) = self.flight(&request, Some(&first_read), progress);
        let (mut stages, mut arriving) = (flight.state(), flight.partial_files());
        let partial_file = loop {
            match &*stages.borrow_and_update() {
                FillState::Running => {}
                FillState::Published(outcome) | FillState::Ended(Ok(outcome)) => break Err(outcome.clone()),
                FillState::Ended(Err(error)) => return Err(error.clone()),
            }
            if let Some(partial_file) = arriving.borrow_and_update().as_ref().map(|files| partial_file_of(files, &file))
            {
                break Ok(partial_file?);
            }
            tokio::select! {
                biased;
                changed = stages.changed() => changed.map_err(|_| vanished())?,
                _ = arriving.changed() => {}
            }
        };
        let partial_file = match partial_file {
            Ok(partial_file) => partial_file,
            Err(outcome) => return self.open_landed(&request, outcome, progress).await,
        };
        let opened = OpenFile {
            key: request.key.clone(),
            path: file,
            size: partial_file.size(),
            progress: flight.progress().clone(),
            shared: Arc::default(),
            filling: Some(Filling { reader: partial_file.read(unchecked), _flight: flight }),
        };
        let follower = Follower {
            cache: self.clone(),
            request,
            path: opened.path.clone(),
            partial_file,
            shared: opened.shared.clone(),
            progress: progress.clone(),
            started,
        };
        tokio::spawn(follower.follow(stages));
        Ok(opened)
    }

    /// The only file of an artifact that is not here: found before a fill is begun, which asks for the same lists no
    /// second time.
    async fn file_meant(&self, request: &mut FetchRequest, progress: &Progress) -> Result<FilePath> {
        if let (None, Some(remote)) = (&request.remote, self.remote_within(request.max_tier)) {
            request.remote = Some(Ok(Arc::new(remote.source(&request.key))));
        }
        self.plan_fill(request, progress).await?.only_file()
    }

    async fn open_landed(&self, request: &FetchRequest, outcome: FillOutcome, progress: &Progress) -> Result<OpenFile> {
        self.require_checksums(request, &outcome.leased.manifest)?;
        self.durably(request, &outcome.leased).await?;
        self.open_here(artifact(request, outcome, progress)?, progress).await
    }

    async fn open_here(&self, artifact: Artifact, progress: &Progress) -> Result<OpenFile> {
        let (key, leased) = (artifact.key.clone(), artifact._lent.clone());
        let path = only_file(leased.manifest.selected(&artifact.selection).map(|(path, _)| path))?;
        let shared = Arc::new(Shared::default());
        shared.give(&path, &leased).await?;
        shared.finish(&path, leased);
        let size = shared.given.get().map_or(Ok(0), |given| given.file.metadata().map(|found| found.len()));
        let size = size.map_err(|cause| Error::new(ErrorKind::Directory, "cannot look at it").cause(cause))?;
        self.count_get(&Ok(artifact));
        Ok(OpenFile { key, path, size, progress: progress.clone(), shared, filling: None })
    }
}

/// What sees to it that an open file learns of the end of its flight, and that it counts as a get. It does not keep the
/// flight going.
struct Follower {
    cache: Cache,
    request: FetchRequest,
    path: FilePath,
    partial_file: Arc<PartialFile>,
    shared: Arc<Shared>,
    progress: Progress,
    /// The flight is its own.
    started: bool,
}

impl Follower {
    async fn follow(self, mut stages: watch::Receiver<FillState>) {
        let phase = (!self.started).then(|| self.progress.enter(Phase::Join, 0));
        let outcome = match stages.wait_for(|state| !matches!(state, FillState::Running)).await.as_deref() {
            Ok(FillState::Published(outcome)) => Ok(outcome.clone()),
            Ok(FillState::Ended(outcome)) => {
                outcome.clone().inspect_err(|error| self.cache.metrics().failed(error.kind()))
            }
            Ok(FillState::Running) | Err(_) => Err(vanished()),
        };
        drop(phase);
        let ended = match &outcome {
            Ok(outcome) => self.finish(outcome).await,
            Err(error) => Err(error.clone()),
        };
        if let Err(error) = ended {
            self.shared.end.send_replace(Some(Err(error)));
        }
        let Ok(outcome) = outcome else { return };
        let (cache, leased) = (&self.cache, outcome.leased.clone());
        let outcome = if self.started { outcome } else { outcome.waited() };
        cache.count_get(&artifact(&self.request, outcome, &self.progress));
        // Whoever reads need not wait for the disk.
        if let Err(error) = cache.durably(&self.request, &leased).await {
            tracing::warn!(artifact = %self.request.key, %error, "what was opened is not durable");
        }
    }

    /// The file is whole, if what was given is of the file that was proven, and what is published is as long.
    async fn finish(&self, outcome: &FillOutcome) -> Result<()> {
        self.shared.give(&self.path, &outcome.leased).await?;
        let given = self.shared.given.get();
        let fits = given.is_some_and(|given| given.generation.is_none_or(|given| self.partial_file.is_proven(given)));
        let size = outcome.leased.manifest.files.get(&self.path).map(|entry| entry.size);
        if !fits || size != Some(self.partial_file.size()) {
            return Err(replaced(&self.path));
        }
        self.shared.finish(&self.path, outcome.leased.clone());
        Ok(())
    }
}

impl OpenOptions {
    fn as_get(&self, reference: &Reference) -> Result<GetOptions> {
        let selection = match (&self.file, &reference.file) {
            (Some(file), Some(named)) if file != named => {
                return Err(Error::invalid(format!("{reference} names a file, and {file} is another")));
            }
            (Some(_), Some(_)) | (None, _) => Selection::all(),
            (Some(file), None) => Selection::file(file.clone()),
        };
        Ok(GetOptions { selection, refresh: self.refresh, max_tier: self.max_tier, ..GetOptions::default() })
    }
}

impl OpenFile {
    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How far its fill is, and how many bytes came from where so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether all of it is here, proven and held.
    pub fn is_whole(&self) -> bool {
        self.shared.whole.get().is_some()
    }

    /// Where it lies, once all of it is here, proven and held. Takes no lock.
    pub fn whole_path(&self) -> Option<&Path> {
        self.shared.whole.get().map(PathBuf::as_path)
    }

    /// The file, once anything was given of it: to be read from where [`wait`](Self::wait) says so. Takes no lock.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.shared.given.get().map(|given| &given.file)
    }

    /// The file, if `range` (bytes) of it can be read without waiting.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait), as far as they are known.
    pub fn try_wait(&self, range: Range<u64>) -> Result<Option<&Arc<File>>> {
        self.check(&range)?;
        let Some(given) = self.shared.given.get() else { return Ok(None) };
        match &self.filling {
            Some(filling) if !self.is_whole() => match filling.reader.may_read(&range) {
                Some(generation) if given.is_of(generation) => Ok(Some(&given.file)),
                Some(_) => Err(replaced(&self.path).artifact(&self.key)),
                None => Ok(None),
            },
            _ => Ok(Some(&given.file)),
        }
    }

    /// Waits until `range` (bytes) of the file can be read, from the file that is returned. It is asked for before
    /// anything else that is not there yet.
    ///
    /// # Errors
    /// Whatever the fill fails with. `Corrupt` where bytes that were given before have turned out wrong, or may have:
    /// the file was filled anew. `Invalid` for bytes that the file does not have.
    pub async fn wait(&self, range: Range<u64>) -> Result<&Arc<File>> {
        if let Some(file) = self.try_wait(range.clone())? {
            return Ok(file);
        }
        let Some(filling) = &self.filling else { return Err(vanished()) };
        filling.reader.demand(&range);
        let waited = filling.wait(&self.shared, &self.path, &range).await;
        waited.map_err(|error| error.artifact(&self.key))
    }

    /// Waits until all of the file is here, proven and held, and gives its path, which stays valid while this value
    /// lives.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub async fn whole(&self) -> Result<PathBuf> {
        if let Some(filling) = self.filling.as_ref().filter(|_| !self.is_whole()) {
            filling.reader.demand(&(0..self.size));
        }
        let mut ends = self.shared.end.subscribe();
        let ended = ends.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        let leased = ended.unwrap_or_else(|| Err(vanished())).map_err(|error| error.artifact(&self.key))?;
        Ok(leased.dir.view(&self.path).full())
    }

    fn check(&self, range: &Range<u64>) -> Result<()> {
        if range.start > range.end || range.end > self.size {
            let has = format!("{} has {} bytes, and no {}..{}", self.path, self.size, range.start, range.end);
            return Err(Error::invalid(has).artifact(&self.key));
        }
        Ok(())
    }
}

impl Filling {
    async fn wait<'a>(&self, shared: &'a Shared, path: &FilePath, range: &Range<u64>) -> Result<&'a Arc<File>> {
        let (mut ends, mut received) = (shared.end.subscribe(), self.reader.watch());
        loop {
            let end = ends.borrow_and_update().clone();
            received.look();
            let given = shared.given.get();
            if let (Some(Ok(_)), Some(given)) = (&end, given) {
                return Ok(&given.file);
            }
            match (self.reader.may_read(range), given) {
                (Some(generation), Some(given)) if given.is_of(generation) => return Ok(&given.file),
                (Some(generation), None) => {
                    let partial_file = self.reader.partial_file();
                    let staged = partial_file.staged().clone();
                    let file = blocking(move || disk::open_staged(&staged)).await?;
                    // Where it is not there any more, or another one, that is told in a moment.
                    if let Some(file) = file.filter(|_| partial_file.is_current(generation)) {
                        let given = shared
                            .given
                            .get_or_init(|| BoundFile { file: Arc::new(file), generation: Some(generation) });
                        match given.is_of(generation) {
                            true => return Ok(&given.file),
                            // Another wait was first, and another file.
                            false => continue,
                        }
                    }
                }
                (_, Some(given)) if self.reader.generation().is_some_and(|now| !given.is_of(now)) => {
                    return Err(replaced(path));
                }
                _ => {}
            }
            if let Some(Err(error)) = end {
                return Err(error);
            }
            tokio::select! {
                changed = ends.changed() => changed.map_err(|_| vanished())?,
                () = received.changed() => {}
            }
        }
    }
}

impl Shared {
    /// Gives what is published, unless something was given before.
    async fn give(&self, path: &FilePath, leased: &Arc<LeasedArtifact>) -> Result<()> {
        if self.given.get().is_none() {
            let (from, path) = (leased.clone(), path.clone());
            let file = Arc::new(blocking(move || from.open(&path)).await?);
            let _ = self.given.set(BoundFile { file, generation: None });
        }
        Ok(())
    }

    /// The artifact can be lent, and what was given is of it: the file is whole.
    fn finish(&self, path: &FilePath, leased: Arc<LeasedArtifact>) {
        if let Some(given) = self.given.get() {
            disk::read_ahead_again(&given.file);
        }
        let _ = self.whole.set(leased.dir.view(path).full());
        self.end.send_replace(Some(Ok(leased)));
    }
}

fn partial_file_of(files: &PartialFiles, file: &FilePath) -> Result<Arc<PartialFile>> {
    files.get(file).cloned().ok_or_else(|| Error::not_found(format!("it has no file {file}")))
}

fn replaced(path: &FilePath) -> Error {
    Error::corrupt(format!(
        "{path} turned out wrong while it was read, and is filled anew: what was read of it early is not to be used"
    ))
    .hint("discard what was read, and open it again")
}
