//! The lower directory on the main path: a read-only cache that is consulted after the local directory and before any
//! tier that is reached over the network.

use super::Cache;
use super::resolve::FetchRequest;
use crate::disk::{LeasedArtifact, RememberedRef};
use crate::error::Result;
use crate::key::{ArtifactKey, ArtifactName};
use crate::manifest::Manifest;
use crate::runtime::blocking;

impl Cache {
    /// Acquires a lease in the lower directory if it holds all selected files; otherwise returns `None`.
    pub(super) async fn acquire_lower(&self, request: &FetchRequest) -> Result<Option<LeasedArtifact>> {
        let Some(lower) = self.0.lower.clone() else { return Ok(None) };
        let (key, selection) = (request.key.clone(), request.selection.clone());
        blocking(move || lower.acquire(&key, &selection)).await
    }

    /// Returns the manifest of `key` in the lower directory, if it has one.
    pub(super) async fn lower_manifest(&self, key: &ArtifactKey) -> Result<Option<Manifest>> {
        let Some(lower) = self.0.lower.clone() else { return Ok(None) };
        let key = key.clone();
        blocking(move || Ok(lower.manifest(&key))).await
    }

    /// Returns the cached version of a revision or tag: from the local directory, otherwise from the lower one. Blocks.
    pub(super) fn remembered_ref(&self, name: &ArtifactName, revision: &str) -> Result<Option<RememberedRef>> {
        match (self.0.disk.remembered_ref(name, revision)?, &self.0.lower) {
            (None, Some(lower)) => lower.remembered_ref(name, revision),
            (cached, _) => Ok(cached),
        }
    }
}
