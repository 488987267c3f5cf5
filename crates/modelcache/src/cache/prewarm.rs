//! Prewarming: planning the fill of a list of artifacts. A list that does not fit on disk is refused as a whole, before
//! any download.
//!
//! The caller then gets each artifact, in the order of [`PrewarmPlan::gets`]. It should keep all leases until the last
//! get has returned, so that the fill of one artifact does not evict another one of the list.

use super::{Cache, GetOptions, PlannedPrewarm, PrewarmPlan};
use crate::disk::content_name;
use crate::error::{Context, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::FileEntry;
use crate::progress::Progress;
use crate::reference::Reference;
use futures::{Stream, StreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};

/// Number of artifacts that are planned concurrently.
const CONCURRENT_PLANS: usize = 8;

/// One artifact of the list, with its selected files.
struct PlannedArtifact {
    artifact: PlannedPrewarm,
    /// The selected files, each with its content name.
    files: Vec<(String, FileEntry)>,
}

impl Cache {
    /// Plans the fill of a whole list, and checks that all artifacts fit on disk at the same time. Files with equal
    /// content count once. If one reference fails, its error is in the plan, and the others are planned.
    ///
    /// # Errors
    /// `Full`, with both sizes, if the artifacts of the list do not fit on disk together.
    pub async fn plan_prewarm(&self, references: &[Reference], options: &GetOptions) -> Result<PrewarmPlan> {
        let plans: Vec<_> = references.iter().map(|reference| self.plan_one(reference, options)).collect();
        let mut planned: Vec<Result<PlannedArtifact>> = stream::iter(plans).buffered(CONCURRENT_PLANS).collect().await;
        mark_shared(&mut planned);
        let planned_ok = || planned.iter().flatten();
        let keys: BTreeSet<_> = planned_ok().map(|planned| planned.artifact.key.clone()).collect();
        // Keyed by content name, so that equal files count once.
        let files: BTreeMap<_, _> = planned_ok().flat_map(|planned| planned.files.iter().cloned()).collect();
        let needed = self.on_disk(move |disk| disk.check_capacity(&keys, &files)).await?;
        Ok(PrewarmPlan {
            artifacts: planned.into_iter().map(|planned| Ok(planned?.artifact)).collect(),
            list_bytes: needed.list_bytes,
            missing_bytes: needed.missing_bytes,
        })
    }

    /// Plans the fill of one reference. Returns its selected files, whether or not they are on disk.
    async fn plan_one(&self, reference: &Reference, options: &GetOptions) -> Result<PlannedArtifact> {
        let progress = Progress::new();
        let resolved = self.resolve(reference, options, &progress).await;
        let request = resolved.map_err(|error| error.artifact(reference))?;
        let key = request.key.clone();
        let on_disk = self.on_disk(move |disk| disk.manifest(&key)).await.context(&request.key, Tier::Disk)?;
        let artifact = |is_local| PlannedPrewarm { key: request.key.clone(), is_local, shares: false };
        // Everything is on disk: use the local manifest, and contact no other tier.
        if let Some(manifest) = on_disk.filter(|manifest| manifest.holds(&request.selection)) {
            return Ok(PlannedArtifact {
                artifact: artifact(true),
                files: by_content(&request.key, manifest.selected(&request.selection)),
            });
        }
        let plan = self.plan_fill(&request, &progress).await.map_err(|error| error.artifact(&request.key))?;
        let files = by_content(&request.key, plan.selected.iter().map(|(path, entry)| (path, entry)));
        Ok(PlannedArtifact { artifact: artifact(false), files })
    }
}

impl PrewarmPlan {
    /// Runs the futures that `get` returns for the index of each planned artifact, at most `jobs` at the same time, and
    /// yields their outputs as they complete.
    pub fn gets<F: Future>(&self, jobs: usize, get: impl Fn(usize) -> F) -> impl Stream<Item = F::Output> {
        // Wave 0: artifacts on disk. Their leases keep the later waves from evicting them. Wave 1: downloads. Wave 2:
        // artifacts that share files with earlier ones, one at a time, so that each finds the shared files on disk.
        let mut waves = [(Vec::new(), jobs), (Vec::new(), jobs), (Vec::new(), 1)];
        for (index, planned) in self.artifacts.iter().enumerate() {
            if let Ok(planned) = planned {
                let wave = if planned.is_local { 0 } else { 1 + usize::from(planned.shares) };
                waves[wave].0.push(get(index));
            }
        }
        stream::iter(waves).flat_map(|(gets, jobs)| stream::iter(gets).buffer_unordered(jobs))
    }
}

/// Sets `shares` of each artifact that has a missing file in common with an earlier one.
fn mark_shared(planned: &mut [Result<PlannedArtifact>]) {
    let mut seen = BTreeSet::new();
    for planned in planned.iter_mut().flatten().filter(|planned| !planned.artifact.is_local) {
        planned.artifact.shares = planned.files.iter().any(|(name, _)| seen.contains(name));
        seen.extend(planned.files.iter().map(|(name, _)| name.clone()));
    }
}

/// Returns the files, each with its content name.
fn by_content<'a>(
    key: &ArtifactKey,
    files: impl Iterator<Item = (&'a FilePath, &'a FileEntry)>,
) -> Vec<(String, FileEntry)> {
    files.map(|(path, entry)| (content_name(key, path, entry), entry.clone())).collect()
}
