//! Extraction: a get of an archive that returns the folder of its files.
//!
//! The extracted files are an artifact of their own: `extracted/<name of the archive>`, with the digest of the archive
//! as version. So they are verified, leased, counted and evicted like any other artifact, and different versions share
//! equal files. The local directory remembers the version of the archive as a revision of this artifact, so a hit does
//! not need the archive.
//!
//! A tar archive is extracted while it is downloaded, from bytes that may not be verified yet. Its files are published
//! only after the whole archive was verified.

use super::fill::FillOutcome;
use super::get::artifact;
use super::open::OpenFile;
use super::resolve::FetchRequest;
use super::{Artifact, Cache, GetOptions};
use crate::config::{Backfill, Extract};
use crate::digest::Digest;
use crate::disk::{Disk, StreamedFill};
use crate::error::{Error, ErrorKind, Result};
use crate::extract::{Archive, is_archive, is_named_as_archive};
use crate::format::{Format, HEAD_BYTES};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::mutex::Mutex;
use crate::option_name::call::EXTRACT;
use crate::option_name::setting::FORBID;
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::runtime::{STACK_BYTES, blocking};
use crate::selection::Selection;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

/// Maximum number of attempts, if the bytes that were read during the download fail verification.
const ATTEMPTS_MAX: usize = 3;

/// Name and revisions under which the files of an archive are stored.
struct Extraction {
    name: ArtifactName,
    /// The revision under which the digest of the archive is remembered: the version of the archive, and a digest of
    /// the selection unless it selects all files.
    revision: String,
    how: Extract,
}

impl Extraction {
    fn of(request: &FetchRequest, how: Extract) -> Result<Self> {
        let version = &request.key.version;
        let revision = match request.selection.is_all() {
            true => version.to_string(),
            false => {
                let selection = Digest::of(format!("{:?}", request.selection.identity()).as_bytes());
                format!("{version}{SELECTION}{selection}")
            }
        };
        Ok(Self { name: request.key.name.extracted()?, revision, how })
    }

    /// Returns true if an archive with this name is extracted.
    fn concerns(&self, path: &FilePath) -> bool {
        self.how == Extract::Always || is_named_as_archive(path.file_name())
    }

    /// Returns the revisions under which the digest may be remembered. An archive whose name only `always` accepts has
    /// a revision of its own, which `auto` does not look for.
    fn revisions(&self) -> Vec<String> {
        match self.how {
            Extract::Always => vec![self.revision.clone(), format!("{}{SELECTION}always", self.revision)],
            Extract::Auto | Extract::Never => vec![self.revision.clone()],
        }
    }

    /// Returns the key of the files of the archive with this digest.
    fn key(&self, archive: Digest) -> Result<ArtifactKey> {
        Ok(ArtifactKey::new(self.name.clone(), Version::new(&archive.to_string())?))
    }

    /// Returns the key whose locks and staging folder the extraction uses: the digest may not be known yet.
    fn lock_key(&self) -> Result<ArtifactKey> {
        let revision = Digest::of(self.revision.as_bytes());
        Ok(ArtifactKey::new(self.name.clone(), Version::new(&format!("archive-{revision}"))?))
    }
}

/// Separates the version of an archive from the digest of a selection. Not part of a version.
const SELECTION: char = '#';

/// The result of one attempt to extract a file.
enum ExtractOutcome {
    Extracted(StreamedFill),
    /// The file is not an archive.
    NotAnArchive(Format),
}

impl Cache {
    /// Returns the leased files of the archive that `request` selects, and extracts them first if they are not on disk.
    /// Returns `None` if nothing is to be extracted.
    ///
    /// # Errors
    /// `Corrupt` if the archive is damaged, breaks a rule, or exceeds a limit; with [`Extract::Always`], also if it is
    /// not an archive. Those of a get.
    pub(super) async fn get_extracted(
        &self,
        request: &FetchRequest,
        how: Extract,
        options: &GetOptions,
        progress: &Progress,
    ) -> Result<Option<Artifact>> {
        if request.key.name.is_extracted() {
            return Ok(None);
        }
        let extraction = match (Extraction::of(request, how), how) {
            (Ok(extraction), _) => extraction,
            // The name is too long to have another one derived from it.
            (Err(_), Extract::Auto) => return Ok(None),
            (Err(error), _) => return Err(error),
        };
        if let Some(hit) = self.remembered_hit(request, &extraction, options, progress).await? {
            return Ok(Some(hit));
        }
        // Only a single selected file can be an archive.
        let mut request = request.clone();
        let Some((path, entry)) = self.only_selected(&mut request, progress).await? else {
            return match how {
                Extract::Always => {
                    Err(Error::invalid("the reference selects several files; only a single archive can be extracted")
                        .hint(format!("name the archive in the reference, or omit {EXTRACT}")))
                }
                _ => Ok(None),
            };
        };
        if !extraction.concerns(&path) {
            return Ok(None);
        }
        // A demanded digest was compared with the manifest of the archive.
        if let Some(archive) = entry.sha256
            && let Some(hit) = self.extracted_hit(&request, extraction.key(archive)?, options, progress).await?
        {
            self.remember_archive(&extraction, &path, archive).await?;
            return Ok(Some(hit));
        }
        // Only one process extracts. The others wait, and then find the files.
        let lead = self.wait_to_lead(&extraction.lock_key()?, progress).await?;
        if let Some(hit) = self.remembered_hit(&request, &extraction, options, progress).await? {
            return Ok(Some(hit));
        }
        let extracted = self.extract(&request, &path, &extraction, progress).await;
        drop(lead);
        extracted
    }

    /// Returns the leased files of an archive if the reference or a cached resolution determines the key, and the files
    /// are on disk. Contacts no tier; the archive itself need not be on disk any more.
    pub(super) async fn try_extracted_hit(
        &self,
        reference: &Reference,
        how: Extract,
        options: &GetOptions,
        progress: &Progress,
    ) -> Result<Option<Artifact>> {
        let Some(request) = self.local_request(reference, options) else { return Ok(None) };
        if request.key.name.is_extracted() {
            return Ok(None);
        }
        let Ok(extraction) = Extraction::of(&request, how) else { return Ok(None) };
        let hit = self.remembered_hit(&request, &extraction, options, progress).await;
        hit.map_err(|error| error.artifact(&request.key))
    }

    /// Returns the digest of the archive, if the local directory knows it.
    async fn remembered_archive(
        &self,
        request: &FetchRequest,
        extraction: &Extraction,
        options: &GetOptions,
    ) -> Result<Option<Digest>> {
        let (key, selection) = (request.key.clone(), request.selection.clone());
        let (name, revisions, how) = (extraction.name.clone(), extraction.revisions(), extraction.how);
        let refresh = options.refresh;
        self.on_disk(move |disk| {
            // The manifest of the archive takes precedence over the remembered digest.
            if let Some(manifest) = disk.manifest(&key)? {
                let mut selected = manifest.selected(&selection);
                let only = selected.next().filter(|_| selected.next().is_none());
                let is_concerned = |path: &FilePath| how == Extract::Always || is_named_as_archive(path.file_name());
                let Some((path, entry)) = only.filter(|(path, _)| is_concerned(path)) else { return Ok(None) };
                // Evictions and pins find the files of this version by the remembered digest.
                if let Some(archive) = entry.sha256
                    && let Some(revision) = revision_of(&revisions, path)
                    && disk.manifest(&ArtifactKey::new(name.clone(), Version::new(&archive.to_string())?))?.is_some()
                {
                    remember(disk, &name, revision, archive)?;
                }
                return Ok(entry.sha256);
            }
            for revision in revisions.iter().filter(|_| !refresh) {
                if let Some(remembered) = disk.remembered_ref(&name, revision)? {
                    return Ok(remembered.version.as_str().parse().ok());
                }
            }
            Ok(None)
        })
        .await
    }

    /// Returns the extracted files, leased, if the local directory knows the archive and has all of them.
    async fn remembered_hit(
        &self,
        request: &FetchRequest,
        extraction: &Extraction,
        options: &GetOptions,
        progress: &Progress,
    ) -> Result<Option<Artifact>> {
        let remembered = self.remembered_archive(request, extraction, options).await?;
        // A demanded digest may also be that of the list of files, which only the manifest of the archive has.
        let is_demanded = |archive: &Digest| request.digest.is_none_or(|demanded| demanded == *archive);
        let Some(archive) = remembered.filter(is_demanded) else { return Ok(None) };
        self.extracted_hit(request, extraction.key(archive)?, options, progress).await
    }

    /// Remembers the digest of the archive at `path`.
    async fn remember_archive(&self, extraction: &Extraction, path: &FilePath, archive: Digest) -> Result<()> {
        let Some(revision) = revision_of(&extraction.revisions(), path).cloned() else { return Ok(()) };
        let name = extraction.name.clone();
        self.on_disk(move |disk| remember(disk, &name, &revision, archive)).await
    }

    /// Returns the extracted files, leased, if all of them are on disk.
    async fn extracted_hit(
        &self,
        archive: &FetchRequest,
        key: ArtifactKey,
        options: &GetOptions,
        progress: &Progress,
    ) -> Result<Option<Artifact>> {
        let request = extracted_request(archive, key);
        if options.verify {
            self.verify_hit(&request, progress).await?;
        }
        let Some(leased) = self.try_acquire(&request).await? else { return Ok(None) };
        self.check_policy(&request, &leased.manifest)?;
        self.wait_until_durable(&request, &leased).await?;
        artifact(&request, FillOutcome::local(leased), progress).map(Some)
    }

    /// Returns the selected file if exactly one is selected. Requests manifests if necessary.
    async fn only_selected(
        &self,
        request: &mut FetchRequest,
        progress: &Progress,
    ) -> Result<Option<(FilePath, FileEntry)>> {
        let selected: Vec<_> = match self.try_acquire(request).await? {
            Some(leased) => {
                request.check_demanded_digest(&leased.manifest)?;
                let selected = leased.manifest.selected(&request.selection).take(2);
                selected.map(|(path, entry)| (path.clone(), entry.clone())).collect()
            }
            None => self.plan_ahead(request, progress).await?.selected,
        };
        Ok(<[_; 1]>::try_from(selected).ok().map(|[only]| only))
    }

    /// Downloads and extracts the archive at `path`, and publishes its files.
    async fn extract(
        &self,
        request: &FetchRequest,
        path: &FilePath,
        extraction: &Extraction,
        progress: &Progress,
    ) -> Result<Option<Artifact>> {
        let mut attempts_left = ATTEMPTS_MAX;
        let (fill, _phase) = loop {
            let open = Arc::new(self.open_resolved(request.clone(), true, false, progress).await?);
            let lock_key = extraction.lock_key()?;
            let verified = async {
                let verified = open.whole().await;
                // From here on, only the extraction is left.
                (verified, progress.enter(Phase::Extract, 0))
            };
            let extracted = self.extract_open(&open, path, &lock_key, progress);
            let (mut verified, mut extracted, mut known) = (pin!(verified), pin!(extracted), None);
            let outcome = loop {
                tokio::select! {
                    outcome = &mut extracted => break outcome,
                    verified = &mut verified, if known.is_none() => known = Some(verified),
                }
            };
            // A refusal of the archive (`Corrupt`) is reported only if its bytes pass verification. Any other error is
            // reported at once.
            if let Err(error) = &outcome
                && error.kind() != ErrorKind::Corrupt
            {
                return Err(error.clone());
            }
            let (verified, phase) = match known {
                Some(known) => known,
                None => verified.await,
            };
            attempts_left -= 1;
            match (outcome, verified) {
                (Ok(ExtractOutcome::NotAnArchive(format)), Ok(_)) if extraction.how == Extract::Always => {
                    let message = match format {
                        Format::SevenZip => {
                            format!("{path} is {format}, which is not extracted; tar, compressed tar and zip are")
                        }
                        _ => format!("{path} is not an archive: it is {format}"),
                    };
                    return Err(Error::corrupt(message)
                        .hint(format!("omit {EXTRACT}, or use {} for files and archives", EXTRACT.set_to("auto"))));
                }
                (Ok(ExtractOutcome::NotAnArchive(_)), Ok(_)) => return self.as_it_is(request, progress).await,
                (Ok(ExtractOutcome::Extracted(fill)), Ok(_)) => break (fill, phase),
                // The bytes read during the download failed verification, and the archive was downloaded again. Extract
                // it from disk.
                (_, Err(error))
                    if error.kind() == ErrorKind::Corrupt
                        && attempts_left > 0
                        && self.try_acquire(request).await?.is_some() =>
                {
                    tracing::warn!(%error, "the archive was wrong while it was extracted; extracting it again");
                }
                // Report the download error first: it explains any other failure.
                (_, Err(error)) | (Err(error), _) => return Err(error),
            }
        };
        // The archive is on disk and verified now. Its manifest has the digest.
        let (digest, provenance) = {
            let leased = self.try_acquire(request).await?;
            let archive = leased.as_ref().and_then(|leased| leased.manifest.files.get(path));
            let (Some(leased), Some(archive)) = (&leased, archive) else {
                return Err(Error::unavailable("the archive was removed while it was extracted"));
            };
            request.check_demanded_digest(&leased.manifest)?;
            (
                archive.sha256.ok_or_else(|| Error::new(ErrorKind::Other, "the archive has no digest"))?,
                archive.provenance,
            )
        };
        let extracted = extracted_request(request, extraction.key(digest)?);
        let key = extracted.key.clone();
        let (staging, listing, files) = blocking(move || {
            let (staging, mut files) = fill.finish()?;
            let mut listing = Manifest::new(key, Shape::Tree);
            for (path, file) in &mut files {
                file.entry.provenance = provenance;
                listing.files.insert(path.clone(), file.entry.clone());
            }
            listing.check()?;
            Ok((staging, listing, files))
        })
        .await?;
        self.check_policy(&extracted, &listing)
            .map_err(|error| error.hint(format!("make the archive without that file, or change {FORBID}")))?;
        let archive_key = request.key.clone();
        let published = self.on_disk(move |disk| {
            let published = disk.publish(staging, &listing, &files)?;
            // A pin of the archive protects its files.
            if let Some(pin) = disk.pin_in(&disk.layout().artifact(&archive_key))? {
                disk.pin(&listing.key, &pin)?;
            }
            Ok(published)
        });
        let published = published.await?;
        self.spawn_background_sync();
        self.remember_archive(extraction, path, digest).await?;
        self.wait_until_durable(&extracted, &published).await?;
        self.drop_archive(&request.key).await;
        let fetched_bytes = published.manifest.bytes();
        artifact(&extracted, FillOutcome { fetched_bytes, ..FillOutcome::local(published) }, progress).map(Some)
    }

    /// Returns the file that was downloaded and is not an archive.
    async fn as_it_is(&self, request: &FetchRequest, progress: &Progress) -> Result<Option<Artifact>> {
        let Some(leased) = self.try_acquire(request).await? else { return Ok(None) };
        self.check_policy(request, &leased.manifest)?;
        self.wait_until_durable(request, &leased).await?;
        let received = progress.snapshot();
        let fetched_bytes = received.remote_bytes + received.origin_bytes;
        artifact(request, FillOutcome { fetched_bytes, ..FillOutcome::local(leased) }, progress).map(Some)
    }

    /// Extracts the archive in `open` into staging, on a thread of its own. The download goes on meanwhile.
    ///
    /// The thread waits for the download, which needs the threads for blocking calls, so it must not be one of them.
    async fn extract_open(
        &self,
        open: &Arc<OpenFile>,
        path: &FilePath,
        key: &ArtifactKey,
        progress: &Progress,
    ) -> Result<ExtractOutcome> {
        // `stop` is closed if the caller is cancelled.
        let (stop, _running) = watch::channel(());
        let (stop, failure) = (Arc::new(stop), Arc::<Mutex<Option<Error>>>::default());
        let reader = ArchiveReader {
            open: open.clone(),
            handle: Handle::current(),
            stop: stop.clone(),
            position: 0,
            failure: failure.clone(),
        };
        let (disk, path, key, progress) = (self.0.disk.clone(), path.clone(), key.clone(), progress.clone());
        let (send, outcome) = oneshot::channel();
        let started = std::thread::Builder::new().name("extract".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let outcome = reader.extract(&disk, &path, &key, stop, &progress);
            // A download error is the cause of the read error: report it instead.
            let failed = failure.lock().take();
            let _ = send.send(failed.map_or(outcome, Err));
        });
        started.map_err(|cause| Error::new(ErrorKind::Limits, "cannot start a thread").cause(cause))?;
        outcome.await.map_err(|_| Error::new(ErrorKind::Other, "the extraction ended unexpectedly"))?
    }

    /// Removes the archive from disk after its files were extracted, unless it is to be kept. If uploads run in the
    /// background, the removal does, too.
    async fn drop_archive(&self, key: &ArtifactKey) {
        if self.0.config.keep_archive {
            return;
        }
        let (cache, key) = (self.clone(), key.clone());
        let drop_it = async move {
            // An upload may still read it.
            cache.wait_for_fills().await;
            let owned_key = key.clone();
            let dropped = cache.on_disk(move |disk| {
                let is_alone = disk.manifest(&owned_key)?.is_some_and(|manifest| manifest.files.len() == 1);
                let is_pending = disk.pending_hashes()?.contains(&owned_key.hash());
                if is_alone && !is_pending { disk.evict(&owned_key).map(drop) } else { Ok(()) }
            });
            if let Err(error) = dropped.await {
                tracing::debug!(%key, %error, "the extracted archive stays on disk");
            }
        };
        match self.0.config.backfill {
            Some(Backfill::Background) => drop(tokio::spawn(drop_it)),
            _ => drop_it.await,
        }
    }

    /// Returns the keys of the files that were extracted from versions of archive `key`, with the revisions under which
    /// they are remembered.
    pub(super) fn extracted_from(disk: &Disk, key: &ArtifactKey) -> Result<Vec<(ArtifactKey, String)>> {
        let all = Self::extracted_by_name(disk, key)?;
        Ok(all.into_iter().filter(|(_, revision)| is_of_version(revision, key)).collect())
    }

    /// Returns true if a version other than `archive` is remembered to have the same extracted files.
    pub(super) fn is_shared(disk: &Disk, archive: &ArtifactKey, extracted: &ArtifactKey) -> Result<bool> {
        let all = Self::extracted_by_name(disk, archive)?;
        Ok(all.iter().any(|(key, revision)| key == extracted && !is_of_version(revision, archive)))
    }

    /// Returns the keys of the files that were extracted from all versions of an archive, with their revisions.
    fn extracted_by_name(disk: &Disk, archive: &ArtifactKey) -> Result<Vec<(ArtifactKey, String)>> {
        let Ok(name) = archive.name.extracted() else { return Ok(Vec::new()) };
        let mut keys = Vec::new();
        for revision in disk.remembered_revisions(&name)? {
            if let Some(remembered) = disk.remembered_ref(&name, &revision)? {
                keys.push((ArtifactKey::new(name.clone(), remembered.version), revision));
            }
        }
        Ok(keys)
    }
}

/// Returns the one of `revisions` under which the digest of the archive at `path` is remembered.
fn revision_of<'a>(revisions: &'a [String], path: &FilePath) -> Option<&'a String> {
    if is_named_as_archive(path.file_name()) { revisions.first() } else { revisions.last() }
}

/// Remembers the digest of an archive, unless it is remembered already or the directory is only read.
fn remember(disk: &Disk, name: &ArtifactName, revision: &str, archive: Digest) -> Result<()> {
    let version = Version::new(&archive.to_string())?;
    if disk.is_read_only() || disk.remembered_ref(name, revision)?.is_some_and(|known| known.version == version) {
        return Ok(());
    }
    disk.remember_ref(name, revision, &version, Duration::ZERO)
}

/// Returns true if the digest remembered under `revision` is that of a file of `archive`.
fn is_of_version(revision: &str, archive: &ArtifactKey) -> bool {
    let rest = revision.strip_prefix(archive.version.as_str());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(SELECTION))
}

/// Returns the request for the extracted files `key` of an archive.
fn extracted_request(archive: &FetchRequest, key: ArtifactKey) -> FetchRequest {
    let request = FetchRequest::new(key, Selection::all(), archive.max_tier);
    FetchRequest { purpose: archive.purpose, durable: archive.durable, ..request }
}

/// Reads an archive from beginning to end while it is downloaded.
struct ArchiveReader {
    open: Arc<OpenFile>,
    handle: Handle,
    /// Closed when the caller no longer waits.
    stop: Arc<watch::Sender<()>>,
    /// Offset of the next byte.
    position: u64,
    /// The error of the download, which `Read` cannot return.
    failure: Arc<Mutex<Option<Error>>>,
}

impl ArchiveReader {
    fn extract(
        mut self,
        disk: &Disk,
        path: &FilePath,
        key: &ArtifactKey,
        stop: Arc<watch::Sender<()>>,
        progress: &Progress,
    ) -> Result<ExtractOutcome> {
        let unreadable =
            |cause: io::Error| Error::new(ErrorKind::Directory, format!("cannot read {path}")).cause(cause);
        let size = self.open.size();
        let head_bytes = size.min(HEAD_BYTES as u64);
        let mut head = vec![0; usize::try_from(head_bytes).unwrap_or(HEAD_BYTES)];
        self.wait(0..head_bytes)?.read_exact_at(&mut head, 0).map_err(unreadable)?;
        let format = Format::of(&head, size);
        if !is_archive(format) {
            return Ok(ExtractOutcome::NotAnArchive(format));
        }
        let archive = Archive { format, size, name: path.as_str() };
        let mut fill = disk.begin_streamed_fill(key, Box::new(move || stop.is_closed()), progress)?;
        if format == Format::Zip {
            // The central directory is at the end of a zip archive.
            let zip = self.wait(0..size)?.try_clone().map_err(unreadable)?;
            archive.extract_zip(zip, &mut fill)?;
        } else if !archive.extract_stream(&mut self, &mut fill)? {
            return Ok(ExtractOutcome::NotAnArchive(format));
        }
        Ok(ExtractOutcome::Extracted(fill))
    }

    /// Waits until `range` of the archive can be read.
    fn wait(&self, range: Range<u64>) -> Result<Arc<File>> {
        if let Some(file) = self.open.try_wait(range.clone())? {
            return Ok(file.clone());
        }
        self.handle.block_on(async {
            tokio::select! {
                biased;
                file = self.open.wait(range) => file.cloned(),
                () = self.stop.closed() => Err(Error::new(ErrorKind::Other, "the get was cancelled")),
            }
        })
    }
}

impl Read for ArchiveReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = self.open.size().min(self.position + buffer.len() as u64);
        let file = self.wait(self.position..end).map_err(|error| {
            let message = error.to_string();
            *self.failure.lock() = Some(error);
            io::Error::other(message)
        })?;
        let read = file.read_at(&mut buffer[..(end - self.position) as usize], self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}
