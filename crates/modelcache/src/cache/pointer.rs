//! Resolution of movable names: a revision at an origin, or a tag on the remote. The first one that exists is used:
//!
//! ```text
//! revision   fresh cached version on disk, fresh shared version on the remote, the origin, last known version
//! tag        a version of that name on disk, fresh cached version on disk, the remote, last known version
//! ```
//!
//! The authority for a revision is its origin. The authority for a tag is the remote. The last known version is used
//! only if the authority is unavailable, and a warning is logged. `NotFound` and `Unauthorized` are definite. With
//! `refresh`, only the authority is used. A version that an origin resolves is cached on disk, and shared with other
//! machines through the remote.

use super::resolve::LookupPolicy;
use super::{Cache, digest_alerts};
use crate::config::{Backfill, OnRemoteDown};
use crate::digest::Digest;
use crate::disk::RememberedRef;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::option_name::call::{LOCAL_FILES_ONLY, REFRESH};
use crate::option_name::{call, setting};
use crate::reference::{Pointer, Reference};
use crate::remote::{RefKind, Remote, RemoteRef, RemoteSource};
use crate::runtime::blocking;
use crate::source::Source;
use crate::transfer::within;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Longest wait for the remote or an origin if a last known version can be used instead.
pub(super) const FALLBACK_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for the shared version if no version is known. After that, the origin is contacted.
const SHARED_VERSION_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for which a caller waits until the shared version is written.
const SHARE_WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// The version that a movable name points to, the tier that supplied it, and its age since it was resolved.
#[derive(Debug, Clone)]
pub(super) struct ResolvedVersion {
    pub(super) version: Version,
    pub(super) from: Tier,
    pub(super) age: Duration,
}

/// The meaning of a bare `name@word`.
#[derive(Debug)]
pub(super) enum VersionOrTag {
    /// A version, or a name that is not known to be a tag. If the remote was contacted: the source there, or the reason
    /// why there is none.
    Version(Option<Result<Arc<RemoteSource>>>),
    /// A tag.
    Tag(ResolvedVersion, TagRecord),
}

/// The tag that was resolved to a version.
#[derive(Debug, Clone)]
pub(super) struct TagRecord {
    pub(super) tag: Version,
    /// Digest of the content of the version when it was tagged; `None` if the remote was not contacted or did not
    /// record it.
    pub(super) sha256: Option<Digest>,
}

/// The version of a revision that another machine resolved at the origin and stored on the remote.
enum SharedVersion {
    /// The stored version, and its age.
    Known(RemoteRef, Duration),
    /// No version is stored, or the stored one is not usable.
    Absent,
    /// The remote was not contacted, or failed with this error.
    Unavailable(Option<Error>),
}

impl Cache {
    /// Resolves a revision to a version.
    pub(super) async fn resolve_pointer(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        policy: LookupPolicy,
    ) -> Result<ResolvedVersion> {
        // 1: the version cached on disk, if it is fresh.
        let cached = self.cached_version(&pointer.name, &pointer.revision).await?;
        if let Some(cached) = cached.as_ref().filter(|cached| self.is_fresh(cached.age, policy)) {
            return Ok(cached.clone());
        }
        if policy.refresh && policy.max_tier < Tier::Origin {
            return Err(Error::invalid("a refresh needs the origin, but origins are excluded (offline)").hint(
                format!(
                    "leave out {REFRESH}, or leave out {}, {LOCAL_FILES_ONLY} and {} to be online",
                    call::OFFLINE,
                    setting::OFFLINE
                ),
            ));
        }
        // 2: the shared version on the remote, if it is fresh.
        let shared = self.shared_version(reference, pointer, cached.is_some(), policy).await?;
        let known = match &shared {
            SharedVersion::Known(stored, age) => {
                let shared = ResolvedVersion { version: stored.version.clone(), from: Tier::Remote, age: *age };
                if cached.as_ref().is_none_or(|cached| shared.age < cached.age) {
                    self.cache_version(pointer, &shared).await;
                    if self.is_fresh(shared.age, policy) {
                        return Ok(shared);
                    }
                    Some(shared)
                } else {
                    cached
                }
            }
            SharedVersion::Absent | SharedVersion::Unavailable(_) => cached,
        };
        // If the origin must not be contacted, a known version of any age is used.
        if policy.max_tier < Tier::Origin {
            return known.ok_or_else(|| unknown_offline(pointer, shared, policy));
        }
        // 3: the origin, with the newer of the known versions as the fallback.
        self.resolve_revision_at_origin(reference, pointer, known.filter(|_| !policy.refresh), shared, policy.may_write)
            .await
    }

    /// Resolves a revision at its origin. Returns the last known version if the origin is unavailable.
    async fn resolve_revision_at_origin(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        known: Option<ResolvedVersion>,
        shared: SharedVersion,
        may_write: bool,
    ) -> Result<ResolvedVersion> {
        self.wait_for_start_jitter().await;
        let request = self.0.origins.resolve(reference);
        let resolved = match &known {
            None => request.await,
            Some(_) => within(FALLBACK_TIMEOUT, request)
                .await
                .unwrap_or_else(|| Err(timeout_error(Tier::Origin, FALLBACK_TIMEOUT))),
        };
        self.metrics().record_health(Tier::Origin, &resolved);
        match resolved {
            Ok(Some(resolved)) => {
                let version =
                    ResolvedVersion { version: resolved.key.version, from: Tier::Origin, age: Duration::ZERO };
                self.cache_version(pointer, &version).await;
                if may_write {
                    self.share_version(pointer, &version, shared).await;
                }
                Ok(version)
            }
            Ok(None) => {
                Err(Error::not_found(format!("there is no revision {:?}", pointer.revision)).tier(Tier::Origin))
            }
            Err(error) => last_known(reference, known, error),
        }
    }

    /// Reads the shared version from the remote. A failing remote is not an error if the get may continue without it.
    async fn shared_version(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        is_known: bool,
        policy: LookupPolicy,
    ) -> Result<SharedVersion> {
        let Some(remote) = self.remote_within(policy.max_tier) else { return Ok(SharedVersion::Unavailable(None)) };
        self.wait_for_start_jitter().await;
        let timeout = match (is_known, policy.max_tier) {
            (true, _) => Some(FALLBACK_TIMEOUT),
            (false, Tier::Origin) => Some(SHARED_VERSION_TIMEOUT),
            // No other tier can resolve the revision, so wait as long as the remote retries.
            (false, _) => None,
        };
        let request = remote.origin_answer(&pointer.name, &pointer.revision);
        let stored = self.within_timeout(timeout, request).await;
        self.metrics().record_health(Tier::Remote, &stored);
        match stored {
            Ok(Some(stored)) if reference.can_resolve_to(&stored.version) => {
                let age = stored.age(SystemTime::now());
                Ok(SharedVersion::Known(stored, age))
            }
            Ok(_) => Ok(SharedVersion::Absent),
            Err(error) => {
                let error = self.tolerate_remote_failure(error)?;
                tracing::debug!(%error, revision = pointer.revision, "cannot read the shared version from the remote");
                Ok(SharedVersion::Unavailable(Some(error)))
            }
        }
    }

    /// Stores on the remote, for other machines, a version that the origin resolved. Does nothing if the backfill mode
    /// defers or forbids writes. The write is a task, so that the caller waits at most [`SHARE_WRITE_TIMEOUT`].
    async fn share_version(&self, pointer: &Pointer, resolved: &ResolvedVersion, shared: SharedVersion) {
        if matches!(self.backfill_mode(), Backfill::Later | Backfill::Never) {
            return;
        }
        let remote = match shared {
            SharedVersion::Unavailable(_) => return,
            SharedVersion::Absent => self.0.remote.clone(),
            // Write only if the version changed or the stored one is outdated.
            SharedVersion::Known(stored, age) => {
                let is_outdated = stored.version != resolved.version || age > self.0.config.ref_ttl;
                self.0.remote.clone().filter(|_| is_outdated)
            }
        };
        let Some(remote) = remote.filter(Remote::is_writable) else { return };
        let name = pointer.name.clone();
        let record = RemoteRef::now(&pointer.revision, &resolved.version, RefKind::Origin, None);
        let write = tokio::spawn(async move {
            if let Err(error) = remote.write_origin_answer(&name, &record).await {
                // Not a warning, because read-only credentials are a valid setup. Other machines contact the origin.
                tracing::debug!(%error, "cannot store the resolved version on the remote");
            }
        });
        let _ = tokio::time::timeout(SHARE_WRITE_TIMEOUT, write).await;
    }

    /// Resolves a bare `name@word`. A version takes precedence over a tag of the same name.
    pub(super) async fn resolve_version_or_tag(&self, key: &ArtifactKey, policy: LookupPolicy) -> Result<VersionOrTag> {
        // Tags exist only for bare names. A version on disk needs no request.
        if key.name.scheme().is_some() || self.is_on_disk(key).await? {
            return Ok(VersionOrTag::Version(None));
        }
        let tag = |resolved| VersionOrTag::Tag(resolved, TagRecord { tag: key.version.clone(), sha256: None });
        // The version cached on disk, if it is fresh.
        let cached = self.cached_version(&key.name, key.version.as_str()).await?;
        if let Some(cached) = cached.as_ref().filter(|cached| self.is_fresh(cached.age, policy)) {
            return Ok(tag(cached.clone()));
        }
        let Some(remote) = self.remote_within(policy.max_tier) else {
            return match cached {
                Some(_) if policy.refresh => Err(Error::invalid(
                    "a refresh needs the remote, but none is configured, or it is excluded (offline)",
                )
                .hint(format!("leave out {REFRESH}, or be online and configure {}", setting::REMOTE))),
                Some(cached) => Ok(tag(cached)),
                None => Ok(VersionOrTag::Version(None)),
            };
        };
        self.wait_for_start_jitter().await;
        // The remote, with the cached version as the fallback.
        let known = cached.filter(|_| !policy.refresh);
        let found = self.query_version_and_tag(remote, key, known.is_some()).await;
        self.metrics().record_health(Tier::Remote, &found);
        match found {
            Ok(version_or_tag) => {
                if let VersionOrTag::Tag(resolved, _) = &version_or_tag {
                    self.cache_version(&pointer_of(key), resolved).await;
                }
                Ok(version_or_tag)
            }
            Err(error) if known.is_some() => last_known(&key, known, self.tolerate_remote_failure(error)?).map(tag),
            Err(error) if policy.refresh => Err(error),
            // Treat the name as a version, which an origin may have. Planning decides about the failed remote.
            Err(error) => Ok(VersionOrTag::Version(Some(Err(error)))),
        }
    }

    /// Requests a version and a tag of that name from the remote concurrently.
    ///
    /// # Errors
    /// The error of the remote, if it is unknown whether the name is a version or a tag.
    async fn query_version_and_tag(&self, remote: &Remote, key: &ArtifactKey, is_known: bool) -> Result<VersionOrTag> {
        let source = Arc::new(remote.source(key));
        let both = async { Ok(futures::join!(source.manifest(), remote.tag(&key.name, key.version.as_str()))) };
        match self.within_timeout(is_known.then_some(FALLBACK_TIMEOUT), both).await? {
            (Ok(Some(_)), _) => Ok(VersionOrTag::Version(Some(Ok(source)))),
            (Ok(None), Ok(Some(tag))) => {
                let resolved = ResolvedVersion { version: tag.version, from: Tier::Remote, age: Duration::ZERO };
                Ok(VersionOrTag::Tag(resolved, TagRecord { tag: key.version.clone(), sha256: tag.sha256 }))
            }
            // The remote has neither, so a tag that is cached on disk was removed there.
            (Ok(None), Ok(None)) => {
                self.forget_tag(key).await;
                Ok(VersionOrTag::Version(Some(Ok(source))))
            }
            // There is a manifest, so the name is a version, even if the manifest is unusable.
            (Err(error), _) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid) => {
                Ok(VersionOrTag::Version(Some(Err(error))))
            }
            (Err(error), _) | (Ok(None), Err(error)) => Err(error),
        }
    }

    /// Compares the digest that was tagged with the content of the version on disk. Returns `Ok` if the version is not
    /// on disk or the digest is unknown.
    ///
    /// # Errors
    /// `Corrupt` if the disk has other content than the tag records, and the remote has other content than the disk.
    pub(super) async fn check_tagged(&self, key: &ArtifactKey, tag_record: &TagRecord) -> Result<()> {
        let (Some(sha256), Some(remote)) = (tag_record.sha256, &self.0.remote) else { return Ok(()) };
        let dir = self.0.disk.layout().artifact(key);
        let manifest = self.on_disk(move |disk| disk.shared_manifest(&dir)).await?;
        let digest = manifest.and_then(|manifest| manifest.content_digest());
        let Some(on_disk) = digest.filter(|on_disk| *on_disk != sha256) else { return Ok(()) };
        let on_remote =
            remote.source(key).manifest().await.ok().flatten().and_then(|manifest| manifest.content_digest());
        match on_remote {
            // Disk and remote differ: the version was replaced on the remote, and the local copy is outdated.
            Some(on_remote) if on_remote != on_disk => {
                Err(digest_alerts::outdated_on_disk(key, &tag_record.tag, sha256, on_disk))
            }
            // Disk and remote agree: the version was replaced after it was tagged.
            Some(_) => {
                digest_alerts::changed_after_tagging(key, &tag_record.tag, sha256, on_disk);
                Ok(())
            }
            // The remote is unavailable or does not know the digest, so it cannot be decided which content is right.
            None => Ok(()),
        }
    }

    /// Returns true if a version that was resolved `age` ago is used without contacting its authority.
    fn is_fresh(&self, age: Duration, policy: LookupPolicy) -> bool {
        !policy.refresh && age <= self.0.config.ref_ttl
    }

    /// Returns the key of a revision from the version cached on disk, if it is fresh or no other tier may be contacted.
    pub(super) fn cached_key(&self, reference: &Reference, policy: LookupPolicy) -> Option<ArtifactKey> {
        let pointer = reference.pointer().filter(|_| self.0.disk.allows_fast_path())?;
        let RememberedRef { version, age } = self.0.disk.remembered_ref(&pointer.name, &pointer.revision).ok()??;
        let is_final = policy.max_tier < Tier::Origin && self.remote_within(policy.max_tier).is_none();
        (self.is_fresh(age, policy) || is_final && !policy.refresh).then(|| ArtifactKey::new(pointer.name, version))
    }

    /// Returns the remote, if one is configured and `max_tier` allows contacting it.
    pub(super) fn remote_within(&self, max_tier: Tier) -> Option<&Remote> {
        self.0.remote.as_ref().filter(|_| max_tier >= Tier::Remote)
    }

    /// Waits for a request to the remote, at most for `timeout`. Waits without a limit if `on_remote_down` requires the
    /// get to fail when the remote fails.
    async fn within_timeout<T>(
        &self,
        timeout: Option<Duration>,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        match timeout.filter(|_| self.0.config.on_remote_down == OnRemoteDown::Origin) {
            Some(timeout) => {
                within(timeout, request).await.unwrap_or_else(|| Err(timeout_error(Tier::Remote, timeout)))
            }
            None => request.await,
        }
    }

    /// Returns true if the local or the lower directory has a manifest of this version.
    async fn is_on_disk(&self, key: &ArtifactKey) -> Result<bool> {
        let dir = self.0.disk.layout().artifact(key);
        Ok(self.on_disk(move |disk| disk.shared_manifest(&dir)).await?.is_some()
            || self.lower_manifest(key).await?.is_some())
    }

    /// Returns the version of a revision or tag that is cached on disk, in this directory or the lower one.
    async fn cached_version(&self, name: &ArtifactName, revision: &str) -> Result<Option<ResolvedVersion>> {
        let (cache, name, revision) = (self.clone(), name.clone(), revision.to_owned());
        let cached = blocking(move || cache.remembered_ref(&name, &revision)).await?;
        Ok(cached.map(|RememberedRef { version, age }| ResolvedVersion { version, from: Tier::Disk, age }))
    }

    /// Caches a resolved version on disk. A failure is only logged, because the next get can resolve the name again.
    async fn cache_version(&self, pointer: &Pointer, resolved: &ResolvedVersion) {
        let (pointer, resolved) = (pointer.clone(), resolved.clone());
        let write = self
            .on_disk(move |disk| disk.remember_ref(&pointer.name, &pointer.revision, &resolved.version, resolved.age));
        if let Err(error) = write.await {
            tracing::debug!(%error, "cannot cache the resolved version on disk");
        }
    }

    /// Removes the cached version of a tag that was moved or removed.
    pub(super) async fn forget_tag(&self, key: &ArtifactKey) {
        let key = key.clone();
        let forget = self.on_disk(move |disk| match disk.remembered_ref(&key.name, key.version.as_str())? {
            Some(_) => disk.forget_ref(&key.name, key.version.as_str()),
            None => Ok(()),
        });
        if let Err(error) = forget.await {
            tracing::debug!(%error, "cannot remove the cached version of a tag");
        }
    }
}

fn pointer_of(key: &ArtifactKey) -> Pointer {
    Pointer { name: key.name.clone(), revision: key.version.to_string() }
}

fn timeout_error(tier: Tier, timeout: Duration) -> Error {
    Error::unavailable(format!("no answer within {} s", timeout.as_secs())).tier(tier)
}

/// Returns the last known version, with a warning, if `error` is `Unavailable`. Otherwise returns `error`, which is a
/// definite response of the authority.
fn last_known(
    reference: &impl std::fmt::Display,
    known: Option<ResolvedVersion>,
    error: Error,
) -> Result<ResolvedVersion> {
    match known {
        Some(known) if error.kind() == ErrorKind::Unavailable => {
            let version = &known.version;
            let age_s = Some(known.age.as_secs()).filter(|_| known.age < Duration::MAX);
            tracing::warn!(%error, %version, age_s, "{reference}: no answer; using the version that it last meant");
            Ok(known)
        }
        _ => Err(error),
    }
}

/// Returns the error for a revision without a known version if its origin must not be contacted.
fn unknown_offline(pointer: &Pointer, shared: SharedVersion, policy: LookupPolicy) -> Error {
    if let SharedVersion::Unavailable(Some(error)) = shared {
        return error;
    }
    let Pointer { name, revision } = pointer;
    let message = format!("the version of {name} at revision {revision:?} is not known on this machine");
    Error::not_found(format!("{message}; {}", policy.tiers_not_consulted())).hint(LookupPolicy::hint_online())
}
