//! Resolving a reference to an immutable one, which names a version instead of a revision or tag. Downloads no file.

use super::resolve::{FetchRequest, Resolution};
use super::{Cache, GetOptions, ResolvedReference};
use crate::error::{Result, Tier};
use crate::manifest::Manifest;
use crate::reference::{Reference, Target};
use crate::selection::Selection;
use crate::source::Source;

impl Cache {
    /// Resolves a reference to the version that it points to now. Ignores the selection in `options`.
    ///
    /// # Errors
    /// `NotFound` if the revision or tag does not exist, or if no tier has the artifact of a bare key; otherwise as for
    /// [`get`](Self::get). Does not check that a commit exists at its origin.
    pub async fn resolve_reference(&self, reference: &Reference, options: &GetOptions) -> Result<ResolvedReference> {
        self.resolve_reference_inner(reference, options).await.map_err(|error| error.artifact(reference))
    }

    /// Does the work of [`resolve_reference`](Self::resolve_reference). Its errors do not name the artifact.
    async fn resolve_reference_inner(&self, reference: &Reference, options: &GetOptions) -> Result<ResolvedReference> {
        let reference = &self.0.origins.completed(reference);
        let policy = self.policy(options);
        let resolution = self.resolution(reference, policy).await?;
        if let Some(tag_record) = &resolution.tag_record {
            self.check_tagged(&resolution.key, tag_record).await?;
        }
        // The revision or tag that was resolved. If nothing was resolved, the reference names a version.
        let revision = match (&reference.target, &resolution.resolved_version) {
            (_, None) => None,
            (Target::Bare(key), _) => Some(key.version.to_string()),
            (_, Some(_)) => reference.pointer().map(|pointer| pointer.revision),
        };
        let (from, age) = resolution
            .resolved_version
            .as_ref()
            .map_or((None, None), |version| (Some(version.from), Some(version.age)));
        let Resolution { key, origin, tag_record, remote, .. } = resolution;
        let selection = reference.file.clone().map_or_else(Selection::all, Selection::file);
        let plain = FetchRequest::new(key, selection, policy.max_tier);
        let (digest, purpose) = (reference.digest, options.purpose);
        let request = FetchRequest { digest, origin, purpose, tag_record, remote, ..plain };
        let (manifest_tier, manifest) = match (self.known_manifest(&request).await, &reference.target) {
            (Some((tier, manifest)), _) => (Some(tier), Some(manifest)),
            // A bare key does not prove that the version exists. Request its manifest from all tiers.
            (None, Target::Bare(_)) => {
                let mut tier_manifests = self.tier_manifests(&request).await?;
                (Some(Tier::Origin), Some(self.merge(&request, &mut tier_manifests)?))
            }
            (None, _) => (None, None),
        };
        let is_bare = matches!(reference.target, Target::Bare(_));
        let sha256 = manifest.as_ref().and_then(|manifest| request.known_digest(manifest));
        let exact = Reference { digest: None, ..reference.at_key(&request.key) };
        // A bare version is confirmed by the tier that has its manifest.
        let from = from.or(manifest_tier.filter(|_| is_bare));
        Ok(ResolvedReference { reference: exact, key: request.key, revision, sha256, from, age })
    }

    /// Returns the first manifest found on disk, in the lower directory or on the remote, with its tier.
    async fn known_manifest(&self, request: &FetchRequest) -> Option<(Tier, Manifest)> {
        let key = request.key.clone();
        if let Ok(Some(manifest)) = self.on_disk(move |disk| disk.manifest(&key)).await {
            return Some((Tier::Disk, manifest));
        }
        if let Ok(Some(manifest)) = self.lower_manifest(&request.key).await {
            return Some((Tier::Disk, manifest));
        }
        let remote = self.remote_within(request.max_tier)?;
        self.wait_for_start_jitter().await;
        let manifest = match &request.remote {
            Some(Ok(source)) => source.manifest().await,
            Some(Err(_)) => return None,
            None => remote.source(&request.key).manifest().await,
        };
        match manifest {
            Ok(manifest) => manifest.map(|manifest| (Tier::Remote, manifest)),
            Err(error) => {
                tracing::debug!(%error, "cannot read the manifest from the remote");
                None
            }
        }
    }
}
