//! What a daemon knows of an artifact without a download: its files, and whether everyone may read it.

use super::{Cache, GetOptions};
use crate::error::Result;
use crate::key::{ArtifactName, Version};
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::reference::Reference;
use std::sync::Arc;
use std::time::Duration;

impl Cache {
    /// Returns the manifest of the artifact: all its files with sizes and, as far as they are known, digests. Downloads
    /// no file. Requests the list from the remote or the origin only if the local directory has none. The selection in
    /// `options` is ignored.
    ///
    /// # Errors
    /// As for [`get`](Self::get), if the error occurs before the download starts.
    pub async fn manifest(&self, reference: &Reference, options: &GetOptions) -> Result<Arc<Manifest>> {
        let progress = Progress::new();
        let request = self.resolve(reference, options, &progress).await;
        let mut request = request.map_err(|error| error.artifact(reference))?;
        let dir = self.0.disk.layout().artifact(&request.key);
        if let Some(manifest) = self.on_disk(move |disk| disk.shared_manifest(&dir)).await? {
            return Ok(manifest);
        }
        let plan = self.plan_ahead(&mut request, &progress).await.map_err(|error| error.artifact(&request.key))?;
        Ok(Arc::new(plan.listing))
    }
}

/// The revision under which the mark of a public repository is stored. No revision begins with a dot.
const PUBLIC_MARK: &str = ".public";

impl Cache {
    /// Records in the local directory that everyone may read the artifacts of this name. A daemon uses it while the
    /// origin, which decides about rights, cannot be reached.
    pub async fn mark_public(&self, name: &ArtifactName) -> Result<()> {
        let (name, mark) = (name.clone(), Version::new("public")?);
        self.on_disk(move |disk| disk.remember_ref(&name, PUBLIC_MARK, &mark, Duration::ZERO)).await
    }

    /// Removes the record of [`mark_public`](Self::mark_public).
    pub async fn unmark_public(&self, name: &ArtifactName) -> Result<()> {
        let name = name.clone();
        self.on_disk(move |disk| disk.forget_ref(&name, PUBLIC_MARK)).await
    }

    /// Returns true if [`mark_public`](Self::mark_public) has recorded the name.
    pub async fn is_marked_public(&self, name: &ArtifactName) -> Result<bool> {
        let name = name.clone();
        self.on_disk(move |disk| Ok(disk.remembered_ref(&name, PUBLIC_MARK)?.is_some())).await
    }
}
