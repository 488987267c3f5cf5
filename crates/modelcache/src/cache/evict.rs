//! Evicting on request: from disk, from the remote, or both.
//!
//! Disk comes first: an artifact in use is refused before the remote loses anything.

use super::resolve::LookupPolicy;
use super::{Cache, EvictReport, EvictTier, GetOptions};
use crate::error::{Context, ErrorKind, Result, Tier};
use crate::key::ArtifactKey;
use crate::reference::{Pointer, Reference, Target};
use crate::remote::RefKind;
use crate::source::Source;
use crate::transfer::blocking;
use std::sync::Arc;

impl Cache {
    /// Removes an artifact. With `dry_run`, only tells. Revisions mean what they last meant on this machine.
    ///
    /// # Errors
    /// `Conflict` while somebody uses it, or another writer is at work on the remote.
    pub async fn evict(&self, reference: &Reference, tier: EvictTier, dry_run: bool) -> Result<EvictReport> {
        // A tag is never evicted through: what it meant here may not be what it means by now.
        let (key, origin) = match &reference.target {
            Target::Bare(key) => (key.clone(), self.template_origin(key, self.policy(&GetOptions::default()))),
            _ => self.key_without_network(reference).await?,
        };
        if let Some(remote) = self.0.remote.as_ref().filter(|_| tier != EvictTier::Disk) {
            remote
                .ensure_read_write("remove it from this disk only: --tier disk")
                .map_err(|error| error.artifact(&key))?;
        }
        let refs = if tier == EvictTier::Disk { Vec::new() } else { self.refs_to(&key).await? };
        let disk_bytes = match tier {
            EvictTier::All | EvictTier::Disk => self.evict_disk(&key, dry_run).await.context(&key, Tier::Disk)?,
            EvictTier::Remote => None,
        };
        let mut remote_stays = false;
        let remote_bytes = match (&self.0.remote, tier) {
            (Some(remote), EvictTier::All | EvictTier::Remote) => match remote.evict(&key, dry_run).await {
                // Another tool's files are not ours to remove, and no reason to keep what is.
                Err(error)
                    if disk_bytes.is_some()
                        && error.kind() == ErrorKind::Conflict
                        && remote.has_unmanaged(&key).await? =>
                {
                    if !dry_run {
                        tracing::warn!(%error, "the remote keeps it");
                    }
                    remote_stays = true;
                    None
                }
                evicted => evicted.context(&key, Tier::Remote)?,
            },
            _ => None,
        };
        if disk_bytes.is_none() && remote_bytes.is_none() {
            self.refuse_tag(&key).await?;
        }
        // Also where the version is gone already: a process that was killed may have left its refs.
        if !dry_run && tier != EvictTier::Disk && !remote_stays {
            self.remove_refs(&key, &refs).await?;
        }
        let origin_can_give_back = match origin {
            _ if remote_stays => true,
            // What lies in a bucket may be another version by now.
            Some(_) if key.name.scheme().is_some_and(|scheme| scheme != "s3") => true,
            Some(origin) if dry_run && tier != EvictTier::Disk => matches!(origin.manifest().await, Ok(Some(_))),
            _ => false,
        };
        let tags = refs.into_iter().filter(|found| found.kind == RefKind::Tag).map(|tag| tag.revision).collect();
        Ok(EvictReport { key, disk_bytes, remote_bytes, origin_can_give_back, tags })
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
        // Who only looks tells the fleet nothing.
        let policy = LookupPolicy { tells: false, ..self.policy(&GetOptions::default()) };
        let pointer = reference.pointer().or_else(|| self.possible_tag(reference));
        if let Some(Pointer { name, revision }) = pointer
            && let Some(remembered) = self.remembered_ref(&name, &revision)?
        {
            let key = ArtifactKey::new(name, remembered.version);
            let origin = self.0.origins.source(reference, &key).filter(|_| policy.max_tier == Tier::Origin);
            return Ok((key, origin));
        }
        if let Target::Bare(key) = &reference.target {
            return Ok((key.clone(), self.template_origin(key, policy)));
        }
        let resolution = self.resolution(reference, policy).await;
        resolution.map(|resolution| (resolution.key, resolution.origin)).map_err(|error| match error.kind() {
            ErrorKind::Unavailable => error.hint("name the commit instead of the revision: then no origin is asked"),
            _ => error,
        })
    }

    /// A bare `name@word` that is no version on disk, as what may be a tag.
    fn possible_tag(&self, reference: &Reference) -> Option<Pointer> {
        let Target::Bare(key) = &reference.target else { return None };
        let is_version = self.0.disk.manifest(key).is_ok_and(|manifest| manifest.is_some());
        (!is_version && key.name.scheme().is_none())
            .then(|| Pointer { name: key.name.clone(), revision: key.version.to_string() })
    }
}
