//! The file list of an artifact without a download.

use super::{Cache, GetOptions};
use crate::error::Result;
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::reference::Reference;
use std::sync::Arc;

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
