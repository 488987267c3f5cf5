//! Resolution of movable names: a revision at an origin, or a tag on the remote. The first available answer is used:
//!
//! ```text
//! revision   fresh answer on this disk, fresh shared answer on the remote, the origin, last known answer
//! tag        version of that name on disk, fresh answer on this disk, the remote, last known answer
//! ```
//!
//! Only an unavailable authority is replaced by the last known answer, with a warning. `NotFound` and `Unauthorized`
//! are answers. With `refresh`, only the authority's answer is used. Answers of an origin are remembered on disk and
//! shared with other machines through the remote.

use super::resolve::LookupPolicy;
use super::{Cache, digest_alerts};
use crate::config::{Backfill, OnRemoteDown};
use crate::digest::Digest;
use crate::disk::RememberedRef;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::reference::{Pointer, Reference};
use crate::remote::{RefKind, Remote, RemoteRef, RemoteSource};
use crate::runtime::blocking;
use crate::source::Source;
use crate::transfer::within;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Longest wait for a remote or an origin if an older answer is known that can be used instead.
pub(super) const FALLBACK_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for the shared answer if no answer is known. The origin is asked after that.
const SHARED_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest delay of a caller by the write of the shared answer.
const SHARE_TIMEOUT: Duration = Duration::from_secs(2);

/// The version that a movable name points to, with the tier that supplied the answer, and its age.
#[derive(Debug, Clone)]
pub(super) struct ResolvedVersion {
    pub(super) version: Version,
    pub(super) from: Tier,
    pub(super) age: Duration,
}

/// The meaning of a bare `name@word`.
#[derive(Debug)]
pub(super) enum VersionOrTag {
    /// A version, or unknown. If the remote was contacted, its source, or the reason why there is none.
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

/// The answer of an origin that another machine has stored on the remote.
enum SharedAnswer {
    /// The answer, and its age.
    Known(RemoteRef, Duration),
    /// There is none, or it is not usable.
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
        // 1: the answer on this disk, if it is fresh.
        let here = self.remembered(&pointer.name, &pointer.revision).await?;
        if let Some(here) = here.as_ref().filter(|here| self.is_fresh(here.age, policy)) {
            return Ok(here.clone());
        }
        if policy.refresh && policy.max_tier < Tier::Origin {
            return Err(Error::invalid("a refresh asks the origin, but origins are excluded (offline)")
                .hint("leave out --refresh, or be online: --offline, --local-files-only, MODEL_CACHE_OFFLINE"));
        }
        // 2: the shared answer on the remote, if it is fresh.
        let shared = self.shared_answer(reference, pointer, here.is_some(), policy).await?;
        let known = match &shared {
            SharedAnswer::Known(answer, age) => {
                let theirs = ResolvedVersion { version: answer.version.clone(), from: Tier::Remote, age: *age };
                if here.as_ref().is_none_or(|here| theirs.age < here.age) {
                    self.remember(pointer, &theirs).await;
                    if self.is_fresh(theirs.age, policy) {
                        return Ok(theirs);
                    }
                    Some(theirs)
                } else {
                    here
                }
            }
            SharedAnswer::Absent | SharedAnswer::Unavailable(_) => here,
        };
        // Without an origin, an answer of any age is used.
        if policy.max_tier < Tier::Origin {
            return known.ok_or_else(|| unknown_offline(pointer, shared, policy));
        }
        // 3: the origin, with the newer of the known answers as the fallback.
        self.ask_origin(reference, pointer, known.filter(|_| !policy.refresh), shared, policy.share_answers).await
    }

    /// Asks the origin. If it does not answer, returns the last known answer.
    async fn ask_origin(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        known: Option<ResolvedVersion>,
        shared: SharedAnswer,
        share_answers: bool,
    ) -> Result<ResolvedVersion> {
        self.before_first_call().await;
        let asked = self.0.origins.resolve(reference);
        let answered = match &known {
            None => asked.await,
            Some(_) => within(FALLBACK_TIMEOUT, asked)
                .await
                .unwrap_or_else(|| Err(timeout_error(Tier::Origin, FALLBACK_TIMEOUT))),
        };
        match answered {
            Ok(Some(resolved)) => {
                let answer = ResolvedVersion { version: resolved.key.version, from: Tier::Origin, age: Duration::ZERO };
                self.remember(pointer, &answer).await;
                if share_answers {
                    self.share_answer(pointer, &answer, shared).await;
                }
                Ok(answer)
            }
            Ok(None) => {
                Err(Error::not_found(format!("there is no revision {:?}", pointer.revision)).tier(Tier::Origin))
            }
            Err(error) => last_known(reference, known, error),
        }
    }

    /// Reads the origin's last answer from the remote, where another machine has stored it. A failing remote is skipped
    /// here if the get may continue without it.
    async fn shared_answer(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        is_known: bool,
        policy: LookupPolicy,
    ) -> Result<SharedAnswer> {
        let Some(remote) = self.remote_within(policy.max_tier) else { return Ok(SharedAnswer::Unavailable(None)) };
        self.before_first_call().await;
        let timeout = match (is_known, policy.max_tier) {
            (true, _) => Some(FALLBACK_TIMEOUT),
            (false, Tier::Origin) => Some(SHARED_ANSWER_TIMEOUT),
            // No other tier can answer, so wait as long as the remote retries.
            (false, _) => None,
        };
        let asked = remote.answer(&pointer.name, &pointer.revision);
        match self.within_timeout(timeout, asked).await {
            Ok(Some(answer)) if reference.may_mean(&answer.version) => {
                let age = answer.age(SystemTime::now());
                Ok(SharedAnswer::Known(answer, age))
            }
            Ok(_) => Ok(SharedAnswer::Absent),
            Err(error) => {
                let error = self.tolerate_remote_failure(error)?;
                tracing::debug!(%error, revision = pointer.revision, "cannot read the shared answer from the remote");
                Ok(SharedAnswer::Unavailable(Some(error)))
            }
        }
    }

    /// Stores the origin's answer on the remote for other machines. If writes are not configured to happen now, does
    /// nothing. The write is a task, so that the caller waits for it only up to [`SHARE_TIMEOUT`].
    async fn share_answer(&self, pointer: &Pointer, answer: &ResolvedVersion, shared: SharedAnswer) {
        if matches!(self.backfill_mode(), Backfill::Later | Backfill::Never) {
            return;
        }
        let remote = match shared {
            SharedAnswer::Unavailable(_) => return,
            SharedAnswer::Absent => self.0.remote.clone(),
            // Write only if the version changed or the stored answer is outdated.
            SharedAnswer::Known(theirs, age) => {
                let is_news = theirs.version != answer.version || age > self.0.config.ref_ttl;
                self.0.remote.clone().filter(|_| is_news)
            }
        };
        let Some(remote) = remote.filter(Remote::is_writable) else { return };
        let name = pointer.name.clone();
        let record = RemoteRef::now(&pointer.revision, &answer.version, RefKind::Origin, None);
        let write = tokio::spawn(async move {
            if let Err(error) = remote.write_answer(&name, &record).await {
                // Not a warning: credentials that may only read are a valid setup. Other machines ask the origin.
                tracing::debug!(%error, "cannot share the origin's answer on the remote");
            }
        });
        let _ = tokio::time::timeout(SHARE_TIMEOUT, write).await;
    }

    /// Resolves a bare `name@word`. A version takes precedence over a tag of the same name.
    pub(super) async fn resolve_version_or_tag(&self, key: &ArtifactKey, policy: LookupPolicy) -> Result<VersionOrTag> {
        // Tags exist only for bare names. A version on disk needs no lookup.
        if key.name.scheme().is_some() || self.is_on_disk(key).await? {
            return Ok(VersionOrTag::Version(None));
        }
        let tag_record = |answer| VersionOrTag::Tag(answer, TagRecord { tag: key.version.clone(), sha256: None });
        // The remembered tag, if it is fresh.
        let here = self.remembered(&key.name, key.version.as_str()).await?;
        if let Some(here) = here.as_ref().filter(|here| self.is_fresh(here.age, policy)) {
            return Ok(tag_record(here.clone()));
        }
        let Some(remote) = self.remote_within(policy.max_tier) else {
            return match here {
                Some(_) if policy.refresh => {
                    Err(Error::invalid("a refresh asks the remote, but there is none, or it is excluded (offline)")
                        .hint("leave out --refresh, or be online and configure MODEL_CACHE_REMOTE"))
                }
                Some(here) => Ok(tag_record(here)),
                None => Ok(VersionOrTag::Version(None)),
            };
        };
        self.before_first_call().await;
        // The remote, with the remembered tag as the fallback.
        let known = here.filter(|_| !policy.refresh);
        match self.query_version_and_tag(remote, key, known.is_some()).await {
            Ok(meaning) => {
                if let VersionOrTag::Tag(answer, _) = &meaning {
                    self.remember(&pointer_of(key), answer).await;
                }
                Ok(meaning)
            }
            Err(error) if known.is_some() => {
                last_known(&key, known, self.tolerate_remote_failure(error)?).map(tag_record)
            }
            Err(error) if policy.refresh => Err(error),
            // Treated as a version: an origin may have it, and planning decides about the failed remote.
            Err(error) => Ok(VersionOrTag::Version(Some(Err(error)))),
        }
    }

    /// Asks the remote for a version and for a tag of that name concurrently.
    ///
    /// # Errors
    /// The error of the remote, if it is unknown whether the name is a version or a tag.
    async fn query_version_and_tag(&self, remote: &Remote, key: &ArtifactKey, is_known: bool) -> Result<VersionOrTag> {
        let source = Arc::new(remote.source(key));
        let both = async { Ok(futures::join!(source.manifest(), remote.tag(&key.name, key.version.as_str()))) };
        match self.within_timeout(is_known.then_some(FALLBACK_TIMEOUT), both).await? {
            (Ok(Some(_)), _) => Ok(VersionOrTag::Version(Some(Ok(source)))),
            (Ok(None), Ok(Some(tag))) => {
                let answer = ResolvedVersion { version: tag.version, from: Tier::Remote, age: Duration::ZERO };
                Ok(VersionOrTag::Tag(answer, TagRecord { tag: key.version.clone(), sha256: tag.sha256 }))
            }
            // Neither exists on the remote: a remembered tag was removed there.
            (Ok(None), Ok(None)) => {
                self.forget(key).await;
                Ok(VersionOrTag::Version(Some(Ok(source))))
            }
            // There is a manifest, so the name is a version, even if the manifest is unusable.
            (Err(error), _) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid) => {
                Ok(VersionOrTag::Version(Some(Err(error))))
            }
            (Err(error), _) | (Ok(None), Err(error)) => Err(error),
        }
    }

    /// Compares the digest that was tagged with the content of the version on disk, if it is there.
    ///
    /// # Errors
    /// `Corrupt` if the tag and the remote agree on other content than the disk has.
    pub(super) async fn check_tagged(&self, key: &ArtifactKey, tag_record: &TagRecord) -> Result<()> {
        let (Some(sha256), Some(remote)) = (tag_record.sha256, &self.0.remote) else { return Ok(()) };
        let dir = self.0.disk.layout().artifact(key);
        let here = self.on_disk(move |disk| disk.shared_manifest(&dir)).await?;
        let Some(here) = here.and_then(|manifest| manifest.content_digest()).filter(|here| *here != sha256) else {
            return Ok(());
        };
        match remote.source(key).manifest().await {
            // Disk and remote differ: the version was replaced on the remote, and the local copy is outdated.
            Ok(Some(there)) if there.content_digest().is_some_and(|there| there != here) => {
                Err(digest_alerts::outdated_here(key, &tag_record.tag, sha256, here))
            }
            // Disk and remote agree: the version was replaced after it was tagged.
            Ok(Some(_)) => {
                digest_alerts::retagged(key, &tag_record.tag, sha256, here);
                Ok(())
            }
            // Without the remote it cannot be decided which content is right.
            _ => Ok(()),
        }
    }

    /// Returns true if an answer of this age is used without asking its authority.
    fn is_fresh(&self, age: Duration, policy: LookupPolicy) -> bool {
        !policy.refresh && age <= self.0.config.ref_ttl
    }

    /// Returns the key of a revision from the answer on this disk, if it is fresh or no other tier may be contacted.
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

    /// Waits for a request to the remote, at most for `timeout`. There is no timeout if `on_remote_down` requires the
    /// get to fail with a failing remote.
    async fn within_timeout<T>(&self, timeout: Option<Duration>, asked: impl Future<Output = Result<T>>) -> Result<T> {
        match timeout.filter(|_| self.0.config.on_remote_down == OnRemoteDown::Origin) {
            Some(timeout) => within(timeout, asked).await.unwrap_or_else(|| Err(timeout_error(Tier::Remote, timeout))),
            None => asked.await,
        }
    }

    /// Returns true if the local or the lower directory has a manifest of this version.
    async fn is_on_disk(&self, key: &ArtifactKey) -> Result<bool> {
        let dir = self.0.disk.layout().artifact(key);
        Ok(self.on_disk(move |disk| disk.shared_manifest(&dir)).await?.is_some()
            || self.lower_manifest(key).await?.is_some())
    }

    /// Returns the last answer for a revision or tag that is stored on disk.
    async fn remembered(&self, name: &ArtifactName, revision: &str) -> Result<Option<ResolvedVersion>> {
        let (cache, name, revision) = (self.clone(), name.clone(), revision.to_owned());
        let remembered = blocking(move || cache.remembered_ref(&name, &revision)).await?;
        Ok(remembered.map(|RememberedRef { version, age }| ResolvedVersion { version, from: Tier::Disk, age }))
    }

    /// Stores an answer on disk. A failure is logged: the next get asks again.
    async fn remember(&self, pointer: &Pointer, answer: &ResolvedVersion) {
        let (disk, pointer, answer) = (self.0.disk.clone(), pointer.clone(), answer.clone());
        let remember =
            blocking(move || disk.remember_ref(&pointer.name, &pointer.revision, &answer.version, answer.age));
        if let Err(error) = remember.await {
            tracing::debug!(%error, "cannot store the resolved version on disk");
        }
    }

    /// Removes the remembered version of a tag that was moved or removed.
    pub(super) async fn forget(&self, key: &ArtifactKey) {
        let key = key.clone();
        let forget = self.on_disk(move |disk| match disk.remembered_ref(&key.name, key.version.as_str())? {
            Some(_) => disk.forget_ref(&key.name, key.version.as_str()),
            None => Ok(()),
        });
        if let Err(error) = forget.await {
            tracing::debug!(%error, "cannot remove the remembered version of a tag");
        }
    }
}

fn pointer_of(key: &ArtifactKey) -> Pointer {
    Pointer { name: key.name.clone(), revision: key.version.to_string() }
}

fn timeout_error(tier: Tier, timeout: Duration) -> Error {
    Error::unavailable(format!("no answer within {} s", timeout.as_secs())).tier(tier)
}

/// Returns the last known answer if the authority is unavailable. Any other error is an answer of the authority, and is
/// returned.
fn last_known(
    asked_for: &impl std::fmt::Display,
    known: Option<ResolvedVersion>,
    error: Error,
) -> Result<ResolvedVersion> {
    match known {
        Some(known) if error.kind() == ErrorKind::Unavailable => {
            let version = &known.version;
            let age_s = Some(known.age.as_secs()).filter(|_| known.age < Duration::MAX);
            tracing::warn!(%error, %version, age_s, "{asked_for}: no answer; using the version that it last meant");
            Ok(known)
        }
        _ => Err(error),
    }
}

/// Returns the error for a revision without a known answer if its origin must not be contacted.
fn unknown_offline(pointer: &Pointer, shared: SharedAnswer, policy: LookupPolicy) -> Error {
    if let SharedAnswer::Unavailable(Some(error)) = shared {
        return error;
    }
    let Pointer { name, revision } = pointer;
    let message = format!("the version of {name} at revision {revision:?} is not known on this machine");
    Error::not_found(format!("{message}; {}", policy.tiers_not_consulted())).hint(LookupPolicy::HINT_ONLINE)
}
