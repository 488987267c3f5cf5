//! Evicting on request: from disk, from the remote, or both.
//!
//! Disk comes first: an artifact in use is refused before the remote loses anything.

use super::{Cache, EvictReport, EvictTier};
use crate::error::{Context, ErrorKind, Result, Tier};
use crate::key::ArtifactKey;
use crate::reference::{Pointer, Reference};
use crate::source::Source;
use crate::transfer::blocking;
use std::sync::Arc;

impl Cache {
    /// Removes an artifact. With `dry_run`, only tells. Revisions mean what they last meant on this machine.
    ///
    /// # Errors
    /// `Conflict` while somebody uses it, or another writer is at work on the remote.
    pub async fn evict(&self, reference: &Reference, tier: EvictTier, dry_run: bool) -> Result<EvictReport> {
        let (key, origin) = self.key_without_network(reference).await?;
        let disk_bytes = match tier {
            EvictTier::All | EvictTier::Disk => self.evict_disk(&key, dry_run).await.context(&key, Tier::Disk)?,
            EvictTier::Remote => None,
        };
        let remote_bytes = match (&self.0.remote, tier) {
            (Some(remote), EvictTier::All | EvictTier::Remote) => {
                remote.evict(&key, dry_run).await.context(&key, Tier::Remote)?
            }
            _ => None,
        };
        let origin_can_give_back = match origin {
            Some(_) if key.name.scheme().is_some() => true,
            Some(origin) if dry_run => matches!(origin.manifest().await, Ok(Some(_))),
            _ => false,
        };
        Ok(EvictReport { key, disk_bytes, remote_bytes, origin_can_give_back })
    }

    async fn evict_disk(&self, key: &ArtifactKey, dry_run: bool) -> Result<Option<u64>> {
        let (disk, key) = (self.0.disk.clone(), key.clone());
        blocking(move || {
            if dry_run { Ok(disk.manifest(&key)?.map(|manifest| manifest.held_bytes())) } else { disk.evict(&key) }
        })
        .await
    }

    /// The key a reference leads to, preferring what this machine remembers to asking an origin.
    pub(super) async fn key_without_network(
        &self,
        reference: &Reference,
    ) -> Result<(ArtifactKey, Option<Arc<dyn Source>>)> {
        let reference = &self.0.origins.placed(reference);
        if let Some(Pointer { name, revision }) = reference.pointer()
            && let Some(remembered) = self.remembered_ref(&name, &revision)?
        {
            let key = ArtifactKey::new(name, remembered.version);
            let origin = self.0.origins.source(reference, &key);
            return Ok((key, origin));
        }
        self.resolve_key(reference).await.map_err(|error| match error.kind() {
            ErrorKind::Unavailable => error.hint("name the commit instead of the revision: then no origin is asked"),
            _ => error,
        })
    }
}
