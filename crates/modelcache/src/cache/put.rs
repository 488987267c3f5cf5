//! Putting: a file or folder becomes an artifact on the remote and on disk.
//!
//! The source is read once: a file is copied into staging, hashed, and, if it is large and new on the remote, sent, all in
//! the same pass. What was sent shows as nothing until the whole is proven and nothing stands against it. The remote is
//! written first and disk last, so that what this machine lends as published is published. Other content under the same
//! key is refused before anything is visible; `force` replaces it.
//!
//! To the remote alone nothing is copied: what is not sent in the first pass is sent in a second, hashed again on the way,
//! and refused if it is not what it was.

use super::{Cache, PutOptions, PutReport, PutTier};
use crate::disk::{
    Copying, InputFile, LocalFile, RootedPath, StagedFile, Staging, copy_input, format_of, hash_input, list_input,
    staged_name,
};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::format::{self, Format};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity, Manifest, Shape};
use crate::progress::{Phase, Progress};
use crate::remote::{Multipart, PendingPublish, PublishOptions, Published, Remote};
use crate::transfer::blocking;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Files copied and hashed at once.
const COPIES_AT_ONCE: usize = 4;

impl Cache {
    /// Publishes a file or folder on disk and, where there is one, the remote; or on the remote only.
    ///
    /// # Errors
    /// `Corrupt` for what is not of the format expected; `Invalid` for what cannot be an artifact; `Conflict` where the
    /// key has other content (unless forced); `Full`, `Directory`, `Unavailable`, `Unauthorized` as for
    /// [`get`](Self::get). Nothing is visible then.
    pub async fn put(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        let outcome = self.put_unnamed(key, path, options, progress).await.map_err(|error| error.artifact(key));
        self.count_put(&outcome);
        outcome
    }

    async fn put_unnamed(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        let remote = self.remote_to_put(options)?;
        let (source, expected) = (path.to_owned(), options.expect);
        let (shape, given) = blocking(move || {
            let (shape, given) = list_input(&source)?;
            expected.map_or(Ok(()), |expected| expect(expected, shape, &given)).map(|()| (shape, given))
        })
        .await?;
        self.refuse_tag(key).await?;
        let (manifest, published, path) = match options.tier {
            PutTier::All => self.put_everywhere(key, shape, &given, options, progress).await?,
            PutTier::Remote => self.put_remotely(key, shape, given, options, progress).await?,
        };
        let sha256 = match shape {
            Shape::File => manifest.files.values().next().and_then(|entry| entry.sha256),
            Shape::Tree => manifest.list_digest(),
        };
        Ok(PutReport {
            key: key.clone(),
            path,
            files: manifest.files.len(),
            bytes: manifest.bytes(),
            uploaded_bytes: published.uploaded_bytes,
            copied_bytes: published.copied_bytes,
            on_remote: remote.is_some(),
            sha256: sha256.ok_or_else(|| Error::new(ErrorKind::Other, "a digest is missing after hashing"))?,
            phases: progress.phases(),
        })
    }

    /// The remote, if there is one; refused before a byte is read where it cannot be what is asked for.
    fn remote_to_put(&self, options: &PutOptions) -> Result<Option<&Remote>> {
        let remote = self.0.remote.as_ref();
        if remote.is_none() && (options.tier == PutTier::Remote || options.sidecars) {
            let what = if options.sidecars { "a sidecar lies on the remote" } else { "this goes to the remote only" };
            return Err(Error::invalid(format!("{what}, and no remote is configured"))
                .hint("set MODEL_CACHE_REMOTE, for instance s3://bucket/prefix"));
        }
        remote.map_or(Ok(()), |remote| remote.ensure_read_write("put it on this disk only: --remote none"))?;
        Ok(remote)
    }

    async fn put_everywhere(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        given: &[InputFile],
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<(Manifest, Published, Option<PathBuf>)> {
        let lead = self.lead_alone(key, progress).await?;
        let mut begun = self.begin_put_upload(key, shape, given, options).await;
        let (staging, manifest, files) = self.state(key, shape, given, &mut begun, progress).await?;
        let replaces = self.refuse_other_content(&manifest, options).await?;
        let staged =
            files.iter().map(|(path, file)| (path.clone(), LocalFile::from(staging.file(&file.name)))).collect();
        let published = self.put_on_remote(&manifest, &staged, options, begun, progress).await?;
        if replaces {
            self.evict_replaced(key).await?;
        }
        let leased = {
            let _phase = progress.enter(Phase::Publish, 0);
            let (disk, manifest) = (self.0.disk.clone(), manifest.clone());
            let leased = blocking(move || disk.publish(staging, &manifest, &files)).await?;
            self.sync(key, &crate::Selection::all()).await?;
            leased
        };
        drop(lead);
        Ok((manifest, published, Some(leased.path(&crate::Selection::all()))))
    }

    /// Publishes on the remote from where the files lie.
    async fn put_remotely(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        given: Vec<InputFile>,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<(Manifest, Published, Option<PathBuf>)> {
        let mut begun = self.begin_put_upload(key, shape, &given, options).await;
        let hash = |given: InputFile| {
            let (sending, progress) = (begun.as_mut().and_then(|begun| begun.take(&given.path)), progress.clone());
            async move {
                match sending {
                    Some(sending) => read_and_send(given, None, sending, &progress).await,
                    None => {
                        let hashed = blocking(move || Ok((hash_input(&given, &progress)?, given.path))).await;
                        hashed.map(|(entry, path)| InputRead { path, entry, copy: None, sending: None })
                    }
                }
            }
        };
        let mut manifest = Manifest::new(key.clone(), shape);
        let read: Vec<InputRead> = {
            let _phase = progress.enter(Phase::Read, given.iter().map(|given| given.size).sum());
            let hashes: Vec<_> = given.iter().cloned().map(hash).collect();
            stream::iter(hashes).buffer_unordered(COPIES_AT_ONCE).try_collect().await?
        };
        manifest.files =
            read.into_iter().map(|read| read.sent(&mut begun)).map(|read| (read.path, read.entry)).collect();
        manifest.check().map_err(|error| Error::invalid(error.message().to_owned()))?;
        let replaces = self.refuse_other_content(&manifest, options).await?;
        let files = given.into_iter().map(|given| (given.path, LocalFile::from(given.from))).collect();
        let published = self.put_on_remote(&manifest, &files, options, begun, progress).await;
        let published = published.map_err(|error| match error.kind() {
            ErrorKind::Corrupt => error.hint("put it again when nothing writes to it"),
            _ => error,
        });
        let published = published?;
        if replaces {
            self.evict_replaced(key).await?;
        }
        Ok((manifest, published, None))
    }

    /// Begins to publish on the remote, so that large files can be sent while they are read for the first time.
    async fn begin_put_upload(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        given: &[InputFile],
        options: &PutOptions,
    ) -> Option<PendingPublish> {
        let remote = self.0.remote.as_ref()?;
        let mut listing = Manifest::new(key.clone(), shape);
        let entry = |given: &InputFile| FileEntry::of(given.size);
        listing.files = given.iter().map(|given| (given.path.clone(), entry(given))).collect();
        let paths = listing.files.keys().cloned().collect();
        let files = given.iter().map(|given| (given.path.clone(), LocalFile::from(given.from.clone()))).collect();
        remote.begin(&listing, &paths, &files, options.sidecars).await
    }

    /// Copies the given files into staging, hashes them on the way, and sends those that can be sent.
    async fn state(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        given: &[InputFile],
        begun: &mut Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<(Staging, Manifest, BTreeMap<FilePath, StagedFile>)> {
        let entry = |given: &InputFile| FileEntry::of(given.size);
        let request: Vec<_> = given.iter().map(|given| (given.path.clone(), entry(given))).collect();
        let (disk, fill_key) = (self.0.disk.clone(), key.clone());
        let staging = blocking(move || disk.begin_fill(&fill_key, &request)).await?;
        let _phase = progress.enter(Phase::Read, given.iter().map(|given| given.size).sum());
        let copies = given.iter().cloned().map(|given| {
            let (name, progress) = (staged_name(&given.path, &entry(&given)), progress.clone());
            let (target, sending) = (staging.file(&name), begun.as_mut().and_then(|begun| begun.take(&given.path)));
            async move {
                let read = match sending {
                    Some(sending) => read_and_send(given, Some(target), sending, &progress).await?,
                    None => {
                        let copied =
                            blocking(move || Ok((copy_input(&given, &target, &progress)?, given.path))).await?;
                        let (StagedFile { entry, identity, .. }, path) = copied;
                        InputRead { path, entry, copy: Some(identity), sending: None }
                    }
                };
                Ok::<_, Error>((name, read))
            }
        });
        let copies: Vec<(String, InputRead)> =
            stream::iter(copies.collect::<Vec<_>>()).buffer_unordered(COPIES_AT_ONCE).try_collect().await?;
        let staged = |(name, read): (String, InputRead)| {
            let InputRead { path, entry, copy, .. } = read.sent(begun);
            copy.map(|identity| (path, StagedFile { name, entry, identity }))
        };
        let files: BTreeMap<_, _> = copies.into_iter().filter_map(staged).collect();
        let mut manifest = Manifest::new(key.clone(), shape);
        manifest.files = files.iter().map(|(path, file)| (path.clone(), file.entry.clone())).collect();
        manifest.check().map_err(|error| Error::invalid(error.message().to_owned()))?;
        Ok((staging, manifest, files))
    }

    /// Other content under the key on disk: refused; when forced, only where somebody holds it. Whether there is some to
    /// be replaced. Before the remote loses anything, so that what somebody is reading here is not replaced.
    async fn refuse_other_content(&self, manifest: &Manifest, options: &PutOptions) -> Result<bool> {
        let (disk, manifest, force) = (self.0.disk.clone(), manifest.clone(), options.force);
        blocking(move || match disk.manifest(&manifest.key)?.map(|present| present.agrees_with(&manifest)) {
            Some(Err(_)) if force => disk.refuse_kept(&manifest.key).map(|()| true),
            Some(agreed) => agreed.context(&manifest.key, Tier::Disk).map(|()| false),
            None => Ok(false),
        })
        .await
    }

    /// Removes the other content, once the remote has the new: a remote that refuses costs nobody the old.
    async fn evict_replaced(&self, key: &ArtifactKey) -> Result<()> {
        let (disk, key) = (self.0.disk.clone(), key.clone());
        blocking(move || disk.evict(&key).map(|_| ())).await
    }

    async fn put_on_remote(
        &self,
        manifest: &Manifest,
        files: &BTreeMap<FilePath, LocalFile>,
        options: &PutOptions,
        begun: Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<Published> {
        let Some(remote) = &self.0.remote else { return Ok(Published::default()) };
        let _phase = progress.enter(Phase::Backfill, manifest.bytes());
        // An object can be damaged and look sound; forcing sends equal content, too.
        let rewrite = if options.force { files.keys().cloned().collect() } else { BTreeSet::new() };
        let options = PublishOptions { force: options.force, rewrite, sidecars: options.sidecars };
        let published = remote
            .publish_pending(manifest, files, options, begun, progress)
            .await
            .context(&manifest.key, Tier::Remote);
        self.metrics().asked(Tier::Remote, &published);
        let published = published?;
        self.note_remote(true);
        Ok(published)
    }
}

/// A given file that was read.
struct InputRead {
    path: FilePath,
    entry: FileEntry,
    copy: Option<FileIdentity>,
    /// Where all its bytes are on their way to.
    sending: Option<Multipart>,
}

impl InputRead {
    /// Hands what was sent to what has begun, with the proof.
    fn sent(mut self, begun: &mut Option<PendingPublish>) -> Self {
        if let (Some(sending), Some(begun), Some(sha256)) = (self.sending.take(), begun, self.entry.sha256) {
            begun.put_back(self.path.clone(), sending, sha256);
        }
        self
    }
}

/// Reads a file once: hashed, copied to `target`, and sent part by part.
async fn read_and_send(
    given: InputFile,
    target: Option<RootedPath>,
    mut sending: Multipart,
    progress: &Progress,
) -> Result<InputRead> {
    let path = given.path.clone();
    let mut copying = blocking(move || Copying::open(&given, target.as_ref())).await?;
    for index in 0..sending.parts() {
        let mut part = sending.room(index).await?;
        (copying, part) = blocking(move || {
            part.fill(|buffer, beside| copying.fill(buffer, beside))?;
            Ok((copying, part))
        })
        .await?;
        let bytes = part.range();
        sending.send(part, None)?;
        progress.done(bytes.end - bytes.start);
    }
    let (entry, copy) = blocking(move || copying.finish()).await?;
    Ok(InputRead { path, entry, copy, sending: Some(sending) })
}

/// Refuses files that are not of the format expected.
fn expect(expected: Format, shape: Shape, given: &[InputFile]) -> Result<()> {
    let formats: Vec<_> = given.iter().map(|given| format_of(&given.from)).collect::<Result<_>>()?;
    format::expect(expected, shape == Shape::Tree, given.iter().map(|given| &given.path).zip(formats))
}
