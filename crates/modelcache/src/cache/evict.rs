//! Eviction on request: from disk, from the remote, or both.
//!
//! The disk comes first: if the artifact is leased, the eviction fails before anything is removed from the remote.

use super::resolve::LookupPolicy;
use super::{Cache, EvictReport, EvictTier, GetOptions};
use crate::disk::Disk;
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::key::ArtifactKey;
use crate::option_name::call::TIER;
use crate::reference::{Pointer, Reference, Target};
use crate::remote::RefKind;
use crate::source::Source;
use std::sync::Arc;

impl Cache {
    /// Removes an artifact. With `dry_run`, only reports what would be removed. A revision stands for the version that
    /// it last resolved to on this machine.
    ///
    /// # Errors
    /// `NotFound` if none of the selected tiers has it; `Conflict` while the artifact is leased, or while another
    /// writer publishes it on the remote; `Invalid` for a tag.
    pub async fn evict(&self, reference: &Reference, tier: EvictTier, dry_run: bool) -> Result<EvictReport> {
        // A tag is not resolved, because it may have moved since this machine resolved it last. Only the version with
        // exactly this name is evicted.
        let (key, origin) = match &reference.target {
            Target::Bare(key) => (key.clone(), self.template_origin(key, self.policy(&GetOptions::default()))),
            _ => self.last_resolved_key(reference).await?,
        };
        if let Some(remote) = self.0.remote.as_ref().filter(|_| tier != EvictTier::Disk) {
            remote
                .ensure_read_write(|| format!("remove it from this disk only: {}", TIER.set_to("disk")))
                .map_err(|error| error.artifact(&key))?;
        }
        // List the refs before the version is removed, so that they can be removed with it.
        let refs = if tier == EvictTier::Disk { Vec::new() } else { self.refs_to(&key).await? };
        let only_copy = tier != EvictTier::Remote && self.is_only_copy(&key).await?;
        // Step 1: evict from disk. This fails if the artifact is leased or pinned.
        let on_disk = match tier {
            EvictTier::All | EvictTier::Disk => self.evict_disk(&key, dry_run).await.context(&key, Tier::Disk)?,
            EvictTier::Remote => None,
        };
        let (disk_bytes, shared_bytes) = (on_disk.map(|on_disk| on_disk.0), on_disk.map_or(0, |on_disk| on_disk.1));
        // Step 2: evict from the remote.
        let mut remote_stays = false;
        let remote_bytes = match (&self.0.remote, tier) {
            (Some(remote), EvictTier::All | EvictTier::Remote) => match remote.evict(&key, dry_run).await {
                // Unmanaged objects are never removed. This must not undo or hide the eviction from disk.
                Err(error)
                    if disk_bytes.is_some()
                        && error.kind() == ErrorKind::Conflict
                        && remote.has_unmanaged(&key).await? =>
                {
                    if !dry_run {
                        tracing::warn!(%error, "the unmanaged objects on the remote are not removed");
                    }
                    remote_stays = true;
                    None
                }
                evicted => evicted.context(&key, Tier::Remote)?,
            },
            _ => None,
        };
        // None of these tiers has a version of this name, so the name may be a tag.
        if disk_bytes.is_none() && remote_bytes.is_none() {
            self.refuse_tag(&key).await?;
        }
        // Step 3: remove the refs, even if there was no version any more, because a killed process may have left them.
        if !dry_run && tier != EvictTier::Disk && !remote_stays {
            self.remove_refs(&key, &refs).await?;
        }
        let can_be_fetched_again = match origin {
            _ if remote_stays => true,
            // A commit or a digest can be fetched again. Objects in a bucket may have been replaced.
            Some(_) if key.name.origin_keeps_versions() => true,
            Some(origin) if dry_run && tier != EvictTier::Disk => matches!(origin.manifest().await, Ok(Some(_))),
            _ => false,
        };
        let tags: Vec<_> =
            refs.into_iter().filter(|remote_ref| remote_ref.kind == RefKind::Tag).map(|tag| tag.revision).collect();
        if disk_bytes.is_none() && remote_bytes.is_none() && tags.is_empty() {
            return Err(not_there(&key, tier));
        }
        let is_on_remote = remote_bytes.is_some() || !tags.is_empty();
        let remote = self.0.remote.as_ref().filter(|_| is_on_remote).map(|remote| remote.url().to_owned());
        Ok(EvictReport {
            key,
            dry_run,
            disk_bytes,
            shared_bytes,
            remote_bytes,
            remote,
            only_copy,
            can_be_fetched_again,
            tags,
        })
    }

    /// Returns true if the artifact is on disk and no other tier is known to have it.
    pub(super) async fn is_only_copy(&self, key: &ArtifactKey) -> Result<bool> {
        let key = key.clone();
        self.on_disk(move |disk| disk.is_only_copy(&key)).await
    }

    /// Evicts `key` from disk. Returns the bytes freed and the bytes that other users of the same files keep, or `None`
    /// if the artifact is not on disk.
    async fn evict_disk(&self, key: &ArtifactKey, dry_run: bool) -> Result<Option<(u64, u64)>> {
        let key = key.clone();
        self.on_disk(move |disk| Self::evict_with_extracted(disk, &key, dry_run)).await
    }

    /// Evicts `key` and the files that were extracted from it. Returns the bytes as [`evict_disk`](Self::evict_disk).
    pub(super) fn evict_with_extracted(disk: &Disk, key: &ArtifactKey, dry_run: bool) -> Result<Option<(u64, u64)>> {
        let evict = |key: &ArtifactKey| {
            let expected = disk.bytes_of_eviction(key)?;
            if dry_run {
                return Ok(expected);
            }
            Ok(disk.evict(key)?.map(|freed| (freed, expected.map_or(0, |(_, shared)| shared))))
        };
        // If one of them cannot be evicted, none is.
        if !dry_run {
            Self::ensure_evictable_with_extracted(disk, key)?;
        }
        // The files that were extracted from an archive go with it, unless another version is the same archive.
        let mut evicted = Vec::new();
        for (extracted, revision) in Self::extracted_from(disk, key)? {
            match Self::is_shared(disk, key, &extracted)? {
                // All bytes stay.
                true => evicted.extend(disk.bytes_of_eviction(&extracted)?.map(|(freed, shared)| (0, freed + shared))),
                false => evicted.extend(evict(&extracted)?),
            }
            if !dry_run {
                disk.forget_ref(&extracted.name, &revision)?;
            }
        }
        evicted.extend(evict(key)?);
        Ok(evicted.into_iter().reduce(|sum, one| (sum.0 + one.0, sum.1 + one.1)))
    }

    /// Fails if `key`, or files that were extracted from it, cannot be evicted at this moment. Changes nothing.
    pub(super) fn ensure_evictable_with_extracted(disk: &Disk, key: &ArtifactKey) -> Result<()> {
        for (extracted, _) in Self::extracted_from(disk, key)? {
            if !Self::is_shared(disk, key, &extracted)? {
                disk.ensure_evictable(&extracted)?;
            }
        }
        disk.ensure_evictable(key)
    }

    /// Returns the key that a reference last resolved to on this machine, and its origin. If no version is cached, the
    /// reference is resolved, which may use the network.
    pub(super) async fn last_resolved_key(
        &self,
        reference: &Reference,
    ) -> Result<(ArtifactKey, Option<Arc<dyn Source>>)> {
        let reference = &self.0.origins.completed(reference);
        // A call that downloads nothing does not write to the remote.
        let policy = LookupPolicy { may_write: false, ..self.policy(&GetOptions::default()) };
        let pointer = reference.pointer().or_else(|| self.possible_tag(reference));
        if let Some(Pointer { name, revision }) = pointer
            && let Some(cached) = self.remembered_ref(&name, &revision)?
        {
            let key = ArtifactKey::new(name, cached.version);
            let origin = self.0.origins.source(reference, &key).filter(|_| policy.max_tier == Tier::Origin);
            return Ok((key, origin));
        }
        if let Target::Bare(key) = &reference.target {
            return Ok((key.clone(), self.template_origin(key, policy)));
        }
        let resolution = self.resolution(reference, policy).await;
        resolution.map(|resolution| (resolution.key, resolution.origin)).map_err(|error| match error.kind() {
            ErrorKind::Unavailable => {
                error.hint("name the commit instead of the revision: then the origin is not contacted")
            }
            _ => error,
        })
    }

    /// Returns a bare `name@word` as a possible tag, unless it is a version on disk.
    fn possible_tag(&self, reference: &Reference) -> Option<Pointer> {
        let Target::Bare(key) = &reference.target else { return None };
        let is_version = self.0.disk.manifest(key).is_ok_and(|manifest| manifest.is_some());
        (!is_version && key.name.scheme().is_none())
            .then(|| Pointer { name: key.name.clone(), revision: key.version.to_string() })
    }
}

/// Returns the error for an artifact that none of the selected tiers has.
fn not_there(key: &ArtifactKey, tier: EvictTier) -> Error {
    let (message, list) = match tier {
        EvictTier::All => ("neither on disk nor on the remote", "modelcache ls"),
        EvictTier::Disk => ("not on disk", "modelcache ls"),
        EvictTier::Remote => ("not on the remote", "modelcache ls --remote"),
    };
    Error::not_found(message).artifact(key).hint(format!("`{list}` lists what is there"))
}
