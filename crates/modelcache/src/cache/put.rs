//! Publishing a file or folder as an artifact, on the remote and on disk.
//!
//! Each input file is read once: it is copied into staging and hashed. A large file that is new on the remote is
//! uploaded in the same pass. The uploads become visible when all files are hashed and no other content exists under
//! the key. The artifact is published on the remote first and on disk last, so that an artifact on disk is on the
//! remote too.
//!
//! With [`PutTier::Remote`] nothing is copied. Files that are not uploaded in the first pass are read again, and the
//! put fails if a file has changed since.

use super::{Cache, PutOptions, PutReport, PutTier};
use crate::disk::{
    InputFile, InputHasher, InputReader, LocalFile, MissingFiles, NO_REMOTE, RootedPath, StagedFile, Staging,
    copy_input, format_of, hash_input, list_input, open_input, staged_name,
};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::forbid::Forbid;
use crate::format::{self, Format};
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::PartHasher;
use crate::manifest::{FileEntry, FileIdentity, Manifest, Shape};
use crate::option_name::call;
use crate::option_name::setting::REMOTE;
use crate::progress::{Phase, Progress};
use crate::remote::{Multipart, PendingPublish, PublishOptions, PublishedBytes, Remote, UploadHasher, UploadReader};
use crate::runtime::blocking;
use crate::selection::Selection;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Number of files that are copied and hashed concurrently.
const CONCURRENT_COPIES: usize = 4;

impl Cache {
    /// Publishes a file or folder under `key`: on disk and on the remote, if one is configured, or on the remote only.
    /// Then sets the tag of `options`, if there is one.
    ///
    /// # Errors
    /// `Corrupt` if a file does not have the expected format; `Invalid` if the path or the key cannot be an artifact;
    /// `Conflict` if the key has other content, unless `force` is set; `Full`, `Directory`, `Unavailable` and
    /// `Unauthorized` as for [`get`](Self::get). If a check or the publish on the remote fails, nothing is visible.
    pub async fn put_with(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        // A tag that cannot be set is refused before the upload, so that no version is published without it.
        if let Some(tag) = &options.tag {
            self.check_tag(key, tag).await.map_err(|error| error.artifact(key))?;
        }
        let outcome = self.put_inner(key, path, options, progress).await.map_err(|error| error.artifact(key));
        self.count_put(&outcome);
        let mut report = outcome?;
        if let Some(tag) = &options.tag {
            report.tag = Some(self.tag(key, tag).await?);
        }
        Ok(report)
    }

    /// Does the work of [`put_with`](Self::put_with), except for the tag. Its errors do not name the artifact.
    async fn put_inner(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        let started = Instant::now();
        // Checks that do not read whole files come first.
        let remote = self.remote_for_put(options)?;
        let (source, expected, follow_links) = (path.to_owned(), options.expect, options.follow_links);
        let excluded = Selection::globs(&[], &options.exclude)?;
        let forbid = self.0.config.forbid.clone();
        let (shape, inputs) = blocking(move || {
            let (shape, inputs) = list_input(&source, &excluded, follow_links)?;
            refuse_forbidden(&forbid, &inputs)?;
            expected.map_or(Ok(()), |expected| check_formats(expected, shape, &inputs)).map(|()| (shape, inputs))
        })
        .await?;
        self.refuse_tag(key).await?;
        let (manifest, published, path) = match options.tier {
            PutTier::All => self.put_everywhere(key, shape, &inputs, options, progress).await?,
            PutTier::Remote => self.put_remotely(key, shape, inputs, options, progress).await?,
        };
        Ok(PutReport {
            key: key.clone(),
            path,
            files: manifest.files.len(),
            bytes: manifest.bytes(),
            uploaded_bytes: published.uploaded_bytes,
            copied_bytes: published.copied_bytes,
            on_remote: remote.is_some(),
            sha256: manifest
                .content_digest()
                .ok_or_else(|| Error::new(ErrorKind::Other, "a digest is missing after hashing"))?,
            phases: progress.phases(),
            took: started.elapsed(),
            tag: None,
        })
    }

    /// Returns the remote to publish on, if one is configured.
    ///
    /// # Errors
    /// `Invalid` if the options require a remote and there is none, or if the remote is read-only.
    fn remote_for_put(&self, options: &PutOptions) -> Result<Option<&Remote>> {
        let remote = self.0.remote.as_ref();
        if remote.is_none() && (options.tier == PutTier::Remote || options.sidecars) {
            let what =
                if options.sidecars { "sidecars are written on the remote" } else { "this put is for the remote only" };
            return Err(Error::invalid(format!("{what}, but no remote is configured"))
                .hint(format!("set {REMOTE}, for instance s3://bucket/prefix")));
        }
        remote.map_or(Ok(()), |remote| {
            remote.ensure_read_write(|| format!("put it on this disk only: {}", call::REMOTE.set_to("none")))
        })?;
        Ok(remote)
    }

    /// Publishes on the remote, if one is configured, and then on disk.
    async fn put_everywhere(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        inputs: &[InputFile],
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<(Manifest, PublishedBytes, Option<PathBuf>)> {
        // No fill of the same key may run at the same time.
        let leader = self.wait_to_lead(key, progress).await?;
        // Step 1: read the inputs. Copy them into staging, hash them, and upload the large ones.
        let mut pending = self.begin_put_upload(key, shape, inputs, options).await;
        let (staging, manifest, files) = self.copy_and_hash(key, shape, inputs, &mut pending, progress).await?;
        // Step 2: check for other content under the key on disk.
        let replaces = self.refuse_other_content(&manifest, options).await?;
        // Step 3: publish on the remote.
        let staged =
            files.iter().map(|(path, file)| (path.clone(), LocalFile::from(staging.file(&file.name)))).collect();
        let published = self.put_on_remote(&manifest, &staged, options, pending, progress).await?;
        if replaces {
            self.evict_replaced(key).await?;
        }
        // Step 4: publish on disk, and wait until the files are durable.
        let leased = {
            let _phase = progress.enter(Phase::Publish, 0);
            let manifest = manifest.clone();
            let leased = self.on_disk(move |disk| disk.publish(staging, &manifest, &files)).await?;
            self.sync(key, &Selection::all()).await?;
            leased
        };
        // Under the lease, so that no eviction comes in between.
        if self.0.remote.is_none() {
            self.record_only_copy(&manifest).await?;
        };
        drop(leader);
        Ok((manifest, published, Some(leased.path(&Selection::all()))))
    }

    /// Publishes on the remote only. The files are uploaded from their own paths.
    async fn put_remotely(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        inputs: Vec<InputFile>,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<(Manifest, PublishedBytes, Option<PathBuf>)> {
        // Step 1: read the inputs. Hash them, and upload the large ones.
        let mut pending = self.begin_put_upload(key, shape, &inputs, options).await;
        let hash = |input: InputFile| {
            let (upload, progress) =
                (pending.as_mut().and_then(|pending| pending.take_upload(&input.path)), progress.clone());
            async move {
                match upload {
                    Some(upload) => read_and_upload(input, None, upload, &progress).await,
                    None => {
                        let hashed = blocking(move || Ok((hash_input(&input, &progress)?, input.path))).await;
                        hashed.map(|(entry, path)| InputRead { path, entry, copy: None, upload: None })
                    }
                }
            }
        };
        let mut manifest = Manifest::new(key.clone(), shape);
        let read: Vec<InputRead> = {
            let _phase = progress.enter(Phase::Read, inputs.iter().map(|input| input.size).sum());
            let hashes: Vec<_> = inputs.iter().cloned().map(hash).collect();
            stream::iter(hashes).buffer_unordered(CONCURRENT_COPIES).try_collect().await?
        };
        manifest.files =
            read.into_iter().map(|read| read.attach_upload(&mut pending)).map(|read| (read.path, read.entry)).collect();
        manifest.check().map_err(|error| Error::invalid(error.message().to_owned()))?;
        // Step 2: check for other content under the key on disk.
        let replaces = self.refuse_other_content(&manifest, options).await?;
        // Step 3: publish on the remote. This reads the files that are not uploaded yet a second time, and fails if one
        // has changed.
        let files = inputs.into_iter().map(|input| (input.path, LocalFile::from(input.from))).collect();
        let published = self.put_on_remote(&manifest, &files, options, pending, progress).await;
        let published = published.map_err(|error| match error.kind() {
            ErrorKind::Corrupt => error.hint("put it again when no process writes to it"),
            _ => error,
        });
        let published = published?;
        if replaces {
            self.evict_replaced(key).await?;
        }
        Ok((manifest, published, None))
    }

    /// Starts the publish on the remote, so that large files are uploaded while they are read for the first time.
    async fn begin_put_upload(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        inputs: &[InputFile],
        options: &PutOptions,
    ) -> Option<PendingPublish> {
        let remote = self.0.remote.as_ref()?;
        let mut listing = Manifest::new(key.clone(), shape);
        let entry = |input: &InputFile| FileEntry::of(input.size);
        listing.files = inputs.iter().map(|input| (input.path.clone(), entry(input))).collect();
        let paths = listing.files.keys().cloned().collect();
        let files = inputs.iter().map(|input| (input.path.clone(), LocalFile::from(input.from.clone()))).collect();
        remote.begin(&listing, &paths, &files, options.sidecars).await
    }

    /// Copies the input files into staging and hashes them in the same pass. Uploads the files for which `pending` has
    /// a multipart upload.
    async fn copy_and_hash(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        inputs: &[InputFile],
        pending: &mut Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<(Staging, Manifest, BTreeMap<FilePath, StagedFile>)> {
        let entry = |input: &InputFile| FileEntry::of(input.size);
        let wanted: Vec<_> = inputs.iter().map(|input| (input.path.clone(), entry(input))).collect();
        let fill_key = key.clone();
        // Reserves room for the copies, evicting other artifacts if necessary.
        let staging = self.on_disk(move |disk| disk.begin_fill(&fill_key, &wanted)).await?;
        let _phase = progress.enter(Phase::Read, inputs.iter().map(|input| input.size).sum());
        let copies = inputs.iter().cloned().map(|input| {
            let (name, progress) = (staged_name(&input.path, &entry(&input)), progress.clone());
            let upload = pending.as_mut().and_then(|pending| pending.take_upload(&input.path));
            let target = staging.file(&name);
            async move {
                let read = match upload {
                    Some(upload) => read_and_upload(input, Some(target), upload, &progress).await?,
                    None => {
                        let copied =
                            blocking(move || Ok((copy_input(&input, &target, &progress)?, input.path))).await?;
                        let (StagedFile { entry, identity, .. }, path) = copied;
                        InputRead { path, entry, copy: Some(identity), upload: None }
                    }
                };
                Ok::<_, Error>((name, read))
            }
        });
        let copies: Vec<(String, InputRead)> =
            stream::iter(copies.collect::<Vec<_>>()).buffer_unordered(CONCURRENT_COPIES).try_collect().await?;
        let staged = |(name, read): (String, InputRead)| {
            let InputRead { path, entry, copy, .. } = read.attach_upload(pending);
            copy.map(|identity| (path, StagedFile { name, entry, identity }))
        };
        let files: BTreeMap<_, _> = copies.into_iter().filter_map(staged).collect();
        let mut manifest = Manifest::new(key.clone(), shape);
        manifest.files = files.iter().map(|(path, file)| (path.clone(), file.entry.clone())).collect();
        manifest.check().map_err(|error| Error::invalid(error.message().to_owned()))?;
        Ok((staging, manifest, files))
    }

    /// Checks the content under the key on disk. Returns true if there is other content that has to be replaced.
    ///
    /// # Errors
    /// `Conflict` if there is other content and `force` is not set, or if the other content is leased or pinned.
    async fn refuse_other_content(&self, manifest: &Manifest, options: &PutOptions) -> Result<bool> {
        let (manifest, force) = (manifest.clone(), options.force);
        // Warn only once about files that stay executable: in the publish on the remote if there is one, otherwise
        // here.
        let has_remote = self.0.remote.is_some();
        let agrees = move |present: Manifest, manifest: &Manifest| {
            let agreed = present.agrees_with(manifest);
            if agreed.is_ok() && !has_remote {
                present.warn_kept_executable(manifest);
            }
            agreed
        };
        self.on_disk(move |disk| match disk.manifest(&manifest.key)?.map(|present| agrees(present, &manifest)) {
            // Checked before the remote is changed: if the local content cannot be replaced, nothing is.
            Some(Err(_)) if force => Self::ensure_evictable_with_extracted(disk, &manifest.key).map(|()| true),
            Some(agreed) => agreed.context(&manifest.key, Tier::Disk).map(|()| false),
            None => Ok(false),
        })
        .await
    }

    /// Records that no other tier has the artifact, so that it is not evicted to make room.
    async fn record_only_copy(&self, manifest: &Manifest) -> Result<()> {
        let digest = |(path, entry): (&FilePath, &FileEntry)| Some((path.clone(), entry.sha256?));
        let files = manifest.files.keys().cloned().collect();
        let digests = manifest.files.iter().filter_map(digest).collect();
        let (key, missing) = (manifest.key.clone(), MissingFiles { files, digests, ..MissingFiles::default() });
        self.on_disk(move |disk| disk.record_pending_upload(&key, NO_REMOTE, &missing)).await
    }

    /// Evicts the old content from disk. Called after the publish on the remote, so that the old content stays if that
    /// fails.
    async fn evict_replaced(&self, key: &ArtifactKey) -> Result<()> {
        let key = key.clone();
        self.on_disk(move |disk| Self::evict_with_extracted(disk, &key, false).map(|_| ())).await
    }

    /// Uploads the remaining files, and publishes the manifest on the remote.
    async fn put_on_remote(
        &self,
        manifest: &Manifest,
        files: &BTreeMap<FilePath, LocalFile>,
        options: &PutOptions,
        pending: Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<PublishedBytes> {
        let Some(remote) = &self.0.remote else { return Ok(PublishedBytes::default()) };
        let _phase = progress.enter(Phase::Backfill, manifest.bytes());
        // With `force`, files with equal content are uploaded as well: a damaged object can look sound.
        let rewrite = if options.force { files.keys().cloned().collect() } else { BTreeSet::new() };
        let options = PublishOptions { force: options.force, rewrite, sidecars: options.sidecars };
        let published = remote
            .publish_pending(manifest, files, options, pending, progress)
            .await
            .context(&manifest.key, Tier::Remote);
        self.metrics().record_health(Tier::Remote, &published);
        let published = published?;
        self.set_remote_usable(true);
        let uploaded = manifest.files.keys().cloned().collect();
        if let Err(error) = self.record_uploaded(remote, &manifest.key, uploaded).await {
            tracing::debug!(%error, "cannot record that the remote has the artifact; a later upload finds it there");
        }
        Ok(published)
    }
}

/// An input file after its first pass.
struct InputRead {
    path: FilePath,
    entry: FileEntry,
    /// The identity of the copy in staging, if there is one.
    copy: Option<FileIdentity>,
    /// The multipart upload to which all parts were sent.
    upload: Option<Multipart>,
}

impl InputRead {
    /// Attaches the upload and the digest of the file to the pending publish, which completes the upload later.
    fn attach_upload(mut self, pending: &mut Option<PendingPublish>) -> Self {
        if let (Some(upload), Some(pending), Some(sha256)) = (self.upload.take(), pending, self.entry.sha256) {
            pending.add_sent(self.path.clone(), upload, sha256);
        }
        self
    }
}

/// Reads a file once: hashes it, copies it to `target`, and uploads it part by part.
async fn read_and_upload(
    input: InputFile,
    target: Option<RootedPath>,
    mut upload: Multipart,
    progress: &Progress,
) -> Result<InputRead> {
    let (path, progress) = (input.path.clone(), progress.clone());
    let (reader, hasher) = blocking(move || open_input(&input, target.as_ref(), &progress)).await?;
    let (reader, hasher) = upload.send_file(reader, hasher, None).await?;
    let (entry, copy) = blocking(move || reader.finish(hasher)).await?;
    Ok(InputRead { path, entry, copy, upload: Some(upload) })
}

impl UploadReader for InputReader {
    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        Self::read(self, buffer)
    }
}

impl UploadHasher for InputHasher {
    fn update(&mut self, bytes: &[u8], part_hasher: Option<&mut PartHasher>) -> Result<()> {
        Self::update(self, bytes, part_hasher)
    }
}

/// Fails if a file is forbidden.
fn refuse_forbidden(forbid: &Forbid, inputs: &[InputFile]) -> Result<()> {
    forbid.check(inputs.iter().map(|input| (&input.path, None)))?;
    if forbid.has_formats() {
        for input in inputs {
            forbid.check([(&input.path, Some(format_of(&input.from)?))])?;
        }
    }
    Ok(())
}

/// Fails if the files do not have the expected format.
fn check_formats(expected: Format, shape: Shape, inputs: &[InputFile]) -> Result<()> {
    let formats: Vec<_> = inputs.iter().map(|input| format_of(&input.from)).collect::<Result<_>>()?;
    format::expect(expected, shape == Shape::Tree, inputs.iter().map(|input| &input.path).zip(formats))
}
