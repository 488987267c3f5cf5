//! Versions that were replaced on the remote (`put --force` on another machine) after this disk downloaded them.
//!
//! A hit does not contact the remote, so only a refresh finds out. It compares the manifests and evicts the old copy,
//! so that the get downloads the new content.

use super::Cache;
use super::plan::manifest_of;
use super::resolve::{LookupPolicy, Resolution};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use std::sync::Arc;

impl Cache {
    /// Evicts the copy on disk if the remote has other content under its key. Only for bare names: the content of other
    /// keys is determined by their origin, and so is that of a bare name that a configured origin has.
    ///
    /// # Errors
    /// `Conflict` if the old copy is in use or pinned, or if it was put on this disk and never uploaded; any error of
    /// the remote.
    pub(super) async fn evict_if_replaced(&self, resolution: &Resolution, policy: LookupPolicy) -> Result<()> {
        let key = &resolution.key;
        let (Some(remote), None) = (self.remote_within(policy.max_tier), key.name.scheme()) else { return Ok(()) };
        let owned_key = key.clone();
        let Some(local) = self.on_disk(move |disk| disk.manifest(&owned_key)).await? else { return Ok(()) };
        let source = resolution.remote.clone().unwrap_or_else(|| Ok(Arc::new(remote.source(key))));
        let (_, published) = manifest_of(source).await.context(key, Tier::Remote)?;
        let Some(what) = published.and_then(|published| local.difference(&published)) else { return Ok(()) };
        if let Some(origin) = &resolution.origin
            && origin.manifest().await?.is_some()
        {
            return Ok(());
        }
        if self.is_only_copy(key).await? {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("the remote has other content than this disk: {what}"),
            )
            .hint(format!(
                "the copy on this disk was never uploaded: `modelcache put {key} PATH --force` replaces the remote's, \
                     `modelcache evict {key} --tier disk --yes` removes this one"
            )));
        }
        let owned_key = key.clone();
        self.on_disk(move |disk| Self::evict_with_extracted(disk, &owned_key, false)).await.map_err(|error| {
            let message = format!("the version was replaced on the remote ({what}), but {}", error.message());
            let hint = error.hint_text().unwrap_or("try again").to_owned();
            Error::new(error.kind(), message).tier(Tier::Disk).hint(hint)
        })?;
        tracing::warn!(%key, what, "the version was replaced on the remote; the old content on this disk is replaced, too");
        Ok(())
    }
}
