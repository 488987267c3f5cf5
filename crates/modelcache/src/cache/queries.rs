//! Queries: list artifacts, inspect one artifact, and report disk usage. They change no artifact.

use super::backfill::pending;
use super::plan::manifest_of;
use super::{
    Activity, Cache, GetOptions, InspectedFile, Inspection, LeasedReference, ListedArtifact, RemoteSurvey, Stats,
};
use crate::disk::{ArtifactDir, Disk, Lower, ScannedArtifact};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::option_name::setting::REMOTE;
use crate::progress::Progress;
use crate::reference::{Reference, Target};
use crate::remote::RemoteListing;
use crate::selection::Selection;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

impl Cache {
    /// Lists the artifacts in the local directory, sorted by key.
    pub async fn list(&self) -> Result<Vec<ListedArtifact>> {
        self.on_disk(move |disk| {
            let row = |artifact: ScannedArtifact| -> Option<Result<ListedArtifact>> {
                let (leased, pin) = (disk.is_leased(&artifact.dir), disk.pin_in(&artifact.dir));
                let manifest = artifact.manifest?;
                Some(pin.map(|pin| ListedArtifact { leased, pin, ..list_entry(&manifest, artifact.last_used) }))
            };
            let mut rows: Vec<ListedArtifact> = disk.scan()?.into_iter().filter_map(row).collect::<Result<_>>()?;
            rows.sort_by(|a, b| a.key.cmp(&b.key));
            Ok(rows)
        })
        .await
    }

    /// Lists the artifacts on the remote with their tags, sorted by key.
    ///
    /// # Errors
    /// `Invalid` if no remote is configured.
    pub async fn list_remote(&self) -> Result<Vec<ListedArtifact>> {
        Ok(self.survey_remote().await?.artifacts)
    }

    /// Lists the artifacts on the remote as [`list_remote`](Self::list_remote) does, and what else is there.
    ///
    /// # Errors
    /// `Invalid` if no remote is configured.
    pub async fn survey_remote(&self) -> Result<RemoteSurvey> {
        let Some(remote) = &self.0.remote else {
            return Err(Error::invalid("no remote is configured")
                .hint(format!("set {REMOTE}, for instance s3://bucket/prefix")));
        };
        let RemoteListing { manifests, tags, longer_prefixes, unmanaged_folders } = remote.list_with_tags().await?;
        let tags_of = |key: &ArtifactKey| {
            let tags = tags.iter().filter(|(name, tag)| *name == key.name && tag.version == key.version);
            tags.map(|(_, tag)| tag.revision.clone()).collect()
        };
        let row = |manifest: &Manifest| ListedArtifact { tags: tags_of(&manifest.key), ..list_entry(manifest, None) };
        let mut artifacts: Vec<ListedArtifact> = manifests.iter().map(row).collect();
        artifacts.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(RemoteSurvey { artifacts, longer_prefixes, unmanaged_folders })
    }

    /// Returns true if all files that `selection` selects are on this disk. Contacts neither remote nor origin. Counts
    /// as a use of the artifact, but not in the metrics.
    pub async fn contains(&self, reference: &Reference, selection: &Selection) -> Result<bool> {
        let options = GetOptions { selection: selection.clone(), max_tier: Tier::Disk, ..GetOptions::default() };
        let request = match self.resolve(reference, &options, &Progress::new()).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            request => request?,
        };
        Ok(self.try_acquire(&request).await?.is_some())
    }

    /// Returns what the manifests on disk, in the lower directory and on the remote record about one artifact. An error
    /// of the remote is part of the result, unless no other tier has the artifact.
    ///
    /// # Errors
    /// `NotFound` if no tier has a manifest of the artifact.
    pub async fn inspect(&self, reference: &Reference) -> Result<Inspection> {
        let (key, remote_source) = match &reference.target {
            Target::Bare(_) => {
                let resolution = self.resolution(reference, self.policy(&GetOptions::default())).await;
                resolution.map(|resolution| (resolution.key, resolution.remote))
            }
            _ => self.last_resolved_key(reference).await.map(|(key, _)| (key, None)),
        }
        .map_err(|error| error.artifact(reference))?;
        let dir = self.0.disk.layout().artifact(&key);
        let disk = self.0.disk.manifest(&key)?;
        let (remote, remote_error) = match &self.0.remote {
            Some(remote) => {
                let source = remote_source.unwrap_or_else(|| Ok(Arc::new(remote.source(&key))));
                match manifest_of(source).await {
                    Ok((_, manifest)) => (manifest, None),
                    Err(error) => (None, Some(error)),
                }
            }
            None => (None, None),
        };
        let lower = self.lower_manifest(&key).await?;
        let Some(known) = disk.as_ref().or(lower.as_ref()).or(remote.as_ref()) else {
            return Err(remote_error
                .unwrap_or_else(|| {
                    Error::not_found("neither this disk nor the remote has the artifact")
                        .hint("`modelcache ls` and `modelcache ls --remote` list the artifacts")
                })
                .artifact(&key));
        };
        let lower_dir = self.0.lower.as_ref().map(|lower| lower.dir(&key));
        let path_in = |dir: &ArtifactDir, manifest: &Manifest| match (manifest.shape, manifest.files.keys().next()) {
            (Shape::File, Some(file)) => dir.view(file).full(),
            _ => dir.files().full(),
        };
        // An artifact has a path if some of its files are on disk, or if it is complete because all its files are
        // empty.
        let has_path = |manifest: &&Manifest| manifest.held_bytes() > 0 || manifest.holds(&Selection::all());
        let own = disk.as_ref().filter(has_path).map(|manifest| path_in(&dir, manifest));
        let below = lower.as_ref().filter(has_path).zip(lower_dir).map(|(manifest, dir)| path_in(&dir, manifest));
        let path = own.or(below);
        Ok(Inspection {
            reference: key.to_string(),
            shape: known.shape,
            sha256: known.content_digest(),
            path,
            known_on_disk: disk.is_some(),
            known_in_lower: lower.is_some(),
            known_on_remote: remote.is_some(),
            last_used: self.0.disk.last_used(&dir)?,
            leased: self.0.disk.is_leased(&dir),
            holders: self.0.disk.lease_holders(&dir),
            pin: self.0.disk.pin_in(&dir)?,
            files: inspected_files([disk.as_ref(), lower.as_ref(), remote.as_ref()]),
            remote_error: remote_error.map(|error| error.to_string()),
            key,
        })
    }

    /// Returns content and disk usage of the local directory.
    pub async fn stats(&self) -> Result<Stats> {
        self.query_directory(|_, stats, _| Ok(stats)).await
    }

    /// Returns content and disk usage of the local directory, and the fills and leases of all processes.
    pub async fn activity(&self) -> Result<Activity> {
        self.query_directory(|disk, stats, leased| {
            let lease = |artifact: ScannedArtifact| LeasedReference {
                reference: artifact.name(),
                holders: disk.lease_holders(&artifact.dir),
            };
            let mut leased: Vec<LeasedReference> = leased.into_iter().map(lease).collect();
            leased.sort_by(|a, b| a.reference.cmp(&b.reference));
            Ok(Activity { stats, fills: disk.running_fills()?, leased })
        })
        .await
    }

    /// Returns what `answer` makes of the stats and the leased artifacts.
    async fn query_directory<T: Send + 'static>(
        &self,
        answer: impl FnOnce(&Disk, Stats, Vec<ScannedArtifact>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let lower = self.0.lower.clone();
        let remote = self.0.remote.as_ref().map(|remote| remote.url().to_owned());
        self.on_disk(move |disk| {
            let (usage, quarantine_bytes) = disk.usage()?;
            let (space, mut artifacts) = (disk.space()?, disk.scan()?);
            let manifests: Vec<&Manifest> =
                artifacts.iter().filter_map(|artifact| artifact.manifest.as_ref()).collect();
            let pinned = |artifact: &&ScannedArtifact| matches!(disk.pin_in(&artifact.dir), Ok(Some(_)));
            // An artifact that was put without a remote waits for no upload.
            let mut pending = pending(disk)?;
            pending.retain(|pending| pending.remote.is_some());
            let held_files =
                |manifest: &&Manifest| manifest.files.values().filter(|entry| entry.held.is_some()).count();
            let (present, files) = (manifests.len(), manifests.iter().map(held_files).sum());
            let pins = artifacts.iter().filter(pinned).count();
            artifacts.retain(|artifact| disk.is_leased(&artifact.dir));
            let stats = Stats {
                dir: disk.layout().root().full(),
                lower_dir: lower.as_ref().map(|lower| lower.root().full()),
                lower_artifacts: lower.as_ref().map_or(Ok(0), Lower::artifacts)?,
                artifacts: present,
                files,
                leases: artifacts.len(),
                pins,
                budget_bytes: space.budget,
                used_bytes: usage.counted(),
                staging_bytes: usage.staging + usage.temporary,
                resumable_bytes: disk.resumable_bytes()?,
                quarantine_bytes,
                filesystem_free_bytes: space.free,
                min_free_bytes: space.min_free,
                pending_backfills: pending.len(),
                pending_backfill_bytes: pending.iter().map(|pending| pending.bytes).sum(),
                remote,
            };
            answer(disk, stats, artifacts)
        })
        .await
        .map_err(|error: Error| if error.kind() == ErrorKind::Directory { error.tier(Tier::Disk) } else { error })
    }
}

/// Merges the files of the manifests on disk, in the lower directory and on the remote by path.
fn inspected_files(manifests: [Option<&Manifest>; 3]) -> Vec<InspectedFile> {
    let mut files: BTreeMap<&FilePath, [Option<&FileEntry>; 3]> = BTreeMap::new();
    for (tier, manifest) in manifests.into_iter().enumerate() {
        for (path, entry) in manifest.into_iter().flat_map(|manifest| &manifest.files) {
            files.entry(path).or_default()[tier] = Some(entry);
        }
    }
    let file = |(path, entries): (&FilePath, [Option<&FileEntry>; 3])| {
        let known = || entries.into_iter().flatten();
        let [on_disk, in_lower, on_remote] = entries.map(|entry| entry.is_some_and(|entry| entry.held.is_some()));
        InspectedFile {
            path: path.clone(),
            size: known().next().map_or(0, |entry| entry.size),
            sha256: known().find_map(|entry| entry.sha256),
            git_oid: known().find_map(|entry| entry.git_oid),
            provenance: known().find_map(|entry| entry.provenance),
            format: known().find_map(|entry| entry.format.clone()),
            on_disk,
            in_lower,
            on_remote,
        }
    };
    files.into_iter().map(file).collect()
}

/// Returns the list entry of an artifact, without lease, pin and tags.
fn list_entry(manifest: &Manifest, last_used: Option<SystemTime>) -> ListedArtifact {
    ListedArtifact {
        key: manifest.key.clone(),
        reference: manifest.key.to_string(),
        shape: manifest.shape,
        held_files: manifest.files.values().filter(|entry| entry.held.is_some()).count(),
        files: manifest.files.len(),
        held_bytes: manifest.held_bytes(),
        bytes: manifest.bytes(),
        formats: manifest.files.values().filter_map(|entry| entry.format.clone()).collect(),
        last_used,
        leased: false,
        pin: None,
        tags: Vec::new(),
    }
}
