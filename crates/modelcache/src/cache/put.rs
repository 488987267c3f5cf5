//! Putting: a file or folder becomes an artifact on the remote and on disk.
//!
//! The files are copied into staging and hashed in the same pass; the source is read once. The remote is written first
//! and disk last, so that what this machine lends as published is published. Other content under the same key is
//! refused before anything is written; `force` replaces it.

use super::{Cache, PutOptions, PutReport};
use crate::disk::{Given, StagedFile, Staging, copy_given, list_given, staged_name};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::progress::{Phase, Progress};
use crate::remote::PublishOptions;
use crate::transfer::blocking;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Files copied and hashed at once.
const COPIES_AT_ONCE: usize = 4;

impl Cache {
    /// Publishes a file or folder on disk and, where there is one, the remote.
    ///
    /// # Errors
    /// `Invalid` for what cannot be an artifact; `Conflict` where the key has other content (unless forced); `Full`,
    /// `Directory`, `Unavailable`, `Unauthorized` as for [`get`](Self::get). Nothing is visible then.
    pub async fn put(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        self.put_unnamed(key, path, options, progress).await.map_err(|error| error.artifact(key))
    }

    async fn put_unnamed(
        &self,
        key: &ArtifactKey,
        path: &Path,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<PutReport> {
        let source = path.to_owned();
        let (shape, given) = blocking(move || list_given(&source)).await?;
        self.refuse_tag(key).await?;
        let lead = self.lead_alone(key, progress).await?;
        let (staging, manifest, files) = self.stage(key, shape, &given, progress).await?;
        self.settle_other_content(&manifest, options).await?;
        let uploaded_bytes = self.put_on_remote(&manifest, &staging, &files, options, progress).await?;
        let lent = {
            let _phase = progress.enter(Phase::Publish, 0);
            let (disk, manifest) = (self.0.disk.clone(), manifest.clone());
            blocking(move || disk.publish(staging, &manifest, &files)).await?
        };
        drop(lead);
        let sha256 = match shape {
            Shape::File => manifest.files.values().next().and_then(|entry| entry.sha256),
            Shape::Tree => manifest.list_digest(),
        };
        Ok(PutReport {
            key: key.clone(),
            path: lent.path(&crate::Selection::all()),
            files: manifest.files.len(),
            bytes: manifest.bytes(),
            uploaded_bytes,
            on_remote: self.0.remote.is_some(),
            sha256: sha256.ok_or_else(|| Error::new(ErrorKind::Other, "a digest is missing after hashing"))?,
            phases: progress.phases(),
        })
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

    /// Other content under the key on disk: refused, or evicted when forced. Before the remote loses anything, so that
    /// what somebody is reading here is not replaced.
    async fn settle_other_content(&self, manifest: &Manifest, options: &PutOptions) -> Result<()> {
        let (disk, manifest, force) = (self.0.disk.clone(), manifest.clone(), options.force);
        blocking(move || match disk.manifest(&manifest.key)?.map(|present| present.agrees_with(&manifest)) {
            Some(Err(_)) if force => disk.evict(&manifest.key).map(|_| ()),
            Some(agreed) => agreed.context(&manifest.key, Tier::Disk),
            None => Ok(()),
        })
        .await
    }

    async fn put_on_remote(
        &self,
        manifest: &Manifest,
        staging: &Staging,
        files: &BTreeMap<FilePath, StagedFile>,
        options: &PutOptions,
        progress: &Progress,
    ) -> Result<u64> {
        let Some(remote) = &self.0.remote else { return Ok(0) };
        let _phase = progress.enter(Phase::Backfill, manifest.bytes());
        let staged = files.iter().map(|(path, file)| (path.clone(), staging.file(&file.name))).collect();
        // An object can be damaged and look sound; forcing sends equal content, too.
        let rewrite = if options.force { files.keys().cloned().collect() } else { BTreeSet::new() };
        let options = PublishOptions { force: options.force, rewrite };
        let published =
            remote.publish(manifest, &staged, options, progress).await.context(&manifest.key, Tier::Remote)?;
        Ok(published.uploaded_bytes)
    }
}
