//! Putting: a file or folder becomes an artifact on the remote and on disk.
//!
//! The files are copied into staging and hashed in the same pass; the source is read once. The remote is written first
//! and disk last, so that what this machine lends as published is published. Other content under the same key is
//! refused before anything is written; `force` replaces it.
//!
//! To the remote alone nothing is copied: the files are hashed where they lie, then sent and hashed again on the way, and
//! refused if they are not what they were.

use super::{Cache, PutOptions, PutReport, PutTier};
use crate::disk::{Given, StagedFile, Staging, copy_given, format_of, hash_given, list_given, staged_name};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::format::{self, Format};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::progress::{Phase, Progress};
use crate::remote::{PublishOptions, Published, Remote};
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
    /// `Corrupt` for what is not of the format expected; `Invalid` for what cannot be an artifact; `Conflict` where the key has other content (unless forced); `Full`,
    /// `Directory`, `Unavailable`, `Unauthorized` as for [`get`](Self::get). Nothing is visible then.
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
            let (shape, given) = list_given(&source)?;
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
        given: &[Given],
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<(Manifest, Published, Option<PathBuf>)> {
        let lead = self.lead_alone(key, progress).await?;
        let (staging, manifest, files) = self.stage(key, shape, given, progress).await?;
        let replaces = self.refuse_other_content(&manifest, options).await?;
        let staged = files.iter().map(|(path, file)| (path.clone(), staging.file(&file.name))).collect();
        let published = self.put_on_remote(&manifest, &staged, options, progress).await?;
        if replaces {
            self.evict_replaced(key).await?;
        }
        let lent = {
            let _phase = progress.enter(Phase::Publish, 0);
            let (disk, manifest) = (self.0.disk.clone(), manifest.clone());
            blocking(move || disk.publish(staging, &manifest, &files)).await?
        };
        drop(lead);
        Ok((manifest, published, Some(lent.path(&crate::Selection::all()))))
    }

    /// Publishes on the remote from where the files lie.
    async fn put_remotely(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        given: Vec<Given>,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<(Manifest, Published, Option<PathBuf>)> {
        let hash = |given: Given| {
            let progress = progress.clone();
            blocking(move || Ok((given.path.clone(), hash_given(&given, &progress)?)))
        };
        let mut manifest = Manifest::new(key.clone(), shape);
        manifest.files = {
            let _phase = progress.enter(Phase::Pour, given.iter().map(|given| given.size).sum());
            let hashes: Vec<_> = given.iter().cloned().map(hash).collect();
            stream::iter(hashes).buffer_unordered(COPIES_AT_ONCE).try_collect().await?
        };
        manifest.check().map_err(|error| Error::invalid(error.message().to_owned()))?;
        let replaces = self.refuse_other_content(&manifest, options).await?;
        let files = given.into_iter().map(|given| (given.path, given.from)).collect();
        let published = self.put_on_remote(&manifest, &files, options, progress).await;
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

    /// Copies the given files into staging and hashes them on the way.
    async fn stage(
        &self,
        key: &ArtifactKey,
        shape: Shape,
        given: &[Given],
        progress: &Progress,
    ) -> Result<(Staging, Manifest, BTreeMap<FilePath, StagedFile>)> {
        let entry = |given: &Given| FileEntry { size: given.size, ..FileEntry::default() };
        let wanted: Vec<_> = given.iter().map(|given| (given.path.clone(), entry(given))).collect();
        let (disk, fill_key) = (self.0.disk.clone(), key.clone());
        let staging = blocking(move || disk.begin_fill(&fill_key, &wanted)).await?;
        let _phase = progress.enter(Phase::Pour, given.iter().map(|given| given.size).sum());
        let copies = given.iter().cloned().map(|given| {
            let (name, progress) = (staged_name(&given.path, &entry(&given)), progress.clone());
            let target = staging.file(&name);
            blocking(move || {
                let copied = copy_given(&given, &target, &progress)?;
                Ok((given.path, StagedFile { name, ..copied }))
            })
        });
        let files: BTreeMap<_, _> =
            stream::iter(copies.collect::<Vec<_>>()).buffer_unordered(COPIES_AT_ONCE).try_collect().await?;
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
        files: &BTreeMap<FilePath, PathBuf>,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<Published> {
        let Some(remote) = &self.0.remote else { return Ok(Published::default()) };
        let _phase = progress.enter(Phase::Backfill, manifest.bytes());
        // An object can be damaged and look sound; forcing sends equal content, too.
        let rewrite = if options.force { files.keys().cloned().collect() } else { BTreeSet::new() };
        let options = PublishOptions { force: options.force, rewrite, sidecars: options.sidecars };
        let published =
            remote.publish(manifest, files, options, progress).await.context(&manifest.key, Tier::Remote)?;
        self.note_remote(true);
        Ok(published)
    }
}

/// Refuses files that are not of the format expected.
fn expect(expected: Format, shape: Shape, given: &[Given]) -> Result<()> {
    let formats: Vec<_> = given.iter().map(|given| format_of(&given.from)).collect::<Result<_>>()?;
    format::expect(expected, shape == Shape::Tree, given.iter().map(|given| &given.path).zip(formats))
}
