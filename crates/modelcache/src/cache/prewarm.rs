//! Prewarming: a list is planned as a whole and refused as a whole, before a byte of it moves.
//!
//! The fills themselves are plain [`get`](Cache::get)s. A caller that keeps what they lend until the last one is done
//! keeps its own list from evicting itself.

use super::{Cache, GetOptions, PlannedPrewarm, PrewarmPlan};
use crate::disk::content_name;
use crate::error::{Context, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::FileEntry;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::transfer::blocking;
use futures::{StreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};

/// Artifacts planned at once.
const PLANS_AT_ONCE: usize = 8;

/// One artifact of the list, and the files wanted of it.
struct Planned {
    artifact: PlannedPrewarm,
    /// By their content names.
    files: Vec<(String, FileEntry)>,
}

impl Cache {
    /// Plans the fill of a whole list; equal files count once. One reference that fails does not spoil the others'.
    ///
    /// # Errors
    /// `Full`, with both sizes, when the list cannot all be on disk at once.
    pub async fn plan_prewarm(&self, references: &[Reference], options: &GetOptions) -> Result<PrewarmPlan> {
        let plans: Vec<_> = references.iter().map(|reference| self.plan_one(reference, options)).collect();
        let mut planned: Vec<Result<Planned>> = stream::iter(plans).buffered(PLANS_AT_ONCE).collect().await;
        mark_shared(&mut planned);
        let found = || planned.iter().flatten();
        let keys: BTreeSet<_> = found().map(|planned| planned.artifact.key.clone()).collect();
        let request: BTreeMap<_, _> = found().flat_map(|planned| planned.files.iter().cloned()).collect();
        let disk = self.0.disk.clone();
        let fit = blocking(move || disk.fit(&keys, &request)).await?;
        Ok(PrewarmPlan {
            artifacts: planned.into_iter().map(|planned| Ok(planned?.artifact)).collect(),
            list_bytes: fit.list_bytes,
            missing_bytes: fit.missing_bytes,
        })
    }

    async fn plan_one(&self, reference: &Reference, options: &GetOptions) -> Result<Planned> {
        let progress = Progress::new();
        let resolved = self.resolve(reference, options, &progress).await;
        let request = resolved.map_err(|error| error.artifact(reference))?;
        let (disk, key) = (self.0.disk.clone(), request.key.clone());
        let on_disk = blocking(move || disk.manifest(&key)).await.context(&request.key, Tier::Disk)?;
        let artifact = |is_local| PlannedPrewarm { key: request.key.clone(), is_local, shares: false };
        if let Some(manifest) = on_disk.filter(|manifest| manifest.holds(&request.selection)) {
            return Ok(Planned {
                artifact: artifact(true),
                files: by_content(&request.key, manifest.selected(&request.selection)),
            });
        }
        let plan = self.plan_fill(&request, &progress).await.map_err(|error| error.artifact(&request.key))?;
        let files = by_content(&request.key, plan.selected.iter().map(|(path, entry)| (path, entry)));
        Ok(Planned { artifact: artifact(false), files })
    }
}

/// Marks those that share files with one before them.
fn mark_shared(planned: &mut [Result<Planned>]) {
    let mut seen = BTreeSet::new();
    for planned in planned.iter_mut().flatten().filter(|planned| !planned.artifact.is_local) {
        planned.artifact.shares = planned.files.iter().any(|(name, _)| seen.contains(name));
        seen.extend(planned.files.iter().map(|(name, _)| name.clone()));
    }
}

fn by_content<'a>(
    key: &ArtifactKey,
    files: impl Iterator<Item = (&'a FilePath, &'a FileEntry)>,
) -> Vec<(String, FileEntry)> {
    files.map(|(path, entry)| (content_name(key, path, entry), entry.clone())).collect()
}
