//! What a movable name means now: a revision at an origin, a tag on the remote.
//!
//! ```text
//! revision   this disk's answer while fresh · the fleet's, on the remote, while fresh · the origin · the last one known
//! tag        a version of that name on disk · this disk's answer while fresh · the remote · the last one known
//! ```
//!
//! Where any answer is known, however old, whoever is farther away gets [`PATIENCE`]. If the authority then does not
//! answer, the last known version serves, and one warning says which, how old, and why. That there is no such name, or
//! no right to it, is an answer and never papered over. Whoever asks for a refresh wants the authority's word or none.
//!
//! What an origin answers is remembered on disk and told to the fleet. That telling fails costs others a question.

use super::resolve::LookupPolicy;
use super::{Cache, digest_alerts};
use crate::config::{Backfill, OnRemoteDown};
use crate::digest::Digest;
use crate::disk::RememberedRef;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::reference::{Pointer, Reference};
use crate::remote::{RefKind, Remote, RemoteRef, RemoteSource};
use crate::source::Source;
use crate::transfer::{blocking, within};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How long somebody farther away is waited for where an answer is known.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// How long the fleet's answer is waited for where none is known: the origin has it, too.
const SHARED_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a caller is kept by telling the fleet.
const SHARE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a movable name means.
#[derive(Debug, Clone)]
pub(super) struct ResolvedVersion {
    pub(super) version: Version,
    pub(super) from: Tier,
    pub(super) age: Duration,
}

/// What a bare `name@word` means.
#[derive(Debug)]
pub(super) enum VersionOrTag {
    /// A version, as far as anybody knows. If the remote was asked for it, here is its source, or why there is none.
    Version(Option<Result<Arc<RemoteSource>>>),
    /// A tag.
    Tag(ResolvedVersion, TagRecord),
}

/// The tag that led to a version.
#[derive(Debug, Clone)]
pub(super) struct TagRecord {
    pub(super) tag: Version,
    /// What its version consisted of when it was tagged, if the remote was asked and says so.
    pub(super) sha256: Option<Digest>,
}

/// What the fleet knows.
enum Fleet {
    /// This.
    Knows(RemoteRef, Duration),
    /// Nothing, or nothing usable.
    Silent,
    /// It was not asked, or could not be.
    Unasked(Option<Error>),
}

impl Cache {
    /// The version that a revision leads to.
    pub(super) async fn resolve_pointer(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        policy: LookupPolicy,
    ) -> Result<ResolvedVersion> {
        let here = self.remembered(&pointer.name, &pointer.revision).await?;
        if let Some(here) = here.as_ref().filter(|here| self.is_fresh(here.age, policy)) {
            return Ok(here.clone());
        }
        if policy.refresh && policy.max_tier < Tier::Origin {
            return Err(Error::invalid("a refresh asks the origin, and origins are not to be asked")
                .hint("leave out --refresh, or be online: --offline, --local-files-only, MODEL_CACHE_OFFLINE"));
        }
        let fleet = self.shared_answer(reference, pointer, here.is_some(), policy).await?;
        let known = match &fleet {
            Fleet::Knows(answer, age) => {
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
            Fleet::Silent | Fleet::Unasked(_) => here,
        };
        if policy.max_tier < Tier::Origin {
            return known.ok_or_else(|| unknown_offline(pointer, fleet, policy));
        }
        self.ask_origin(reference, pointer, known.filter(|_| !policy.refresh), fleet, policy.share_answers).await
    }

    /// Asks the origin; the last known answer serves where that does not come.
    async fn ask_origin(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        known: Option<ResolvedVersion>,
        fleet: Fleet,
        share_answers: bool,
    ) -> Result<ResolvedVersion> {
        self.before_first_call().await;
        let asked = self.0.origins.resolve(reference);
        let answered = match &known {
            None => asked.await,
            Some(_) => within(PATIENCE, asked).await.unwrap_or_else(|| Err(timeout_error(Tier::Origin, PATIENCE))),
        };
        match answered {
            Ok(Some(resolved)) => {
                let answer = ResolvedVersion { version: resolved.key.version, from: Tier::Origin, age: Duration::ZERO };
                self.remember(pointer, &answer).await;
                if share_answers {
                    self.share_answer(pointer, &answer, fleet).await;
                }
                Ok(answer)
            }
            Ok(None) => {
                Err(Error::not_found(format!("there is no revision {:?}", pointer.revision)).tier(Tier::Origin))
            }
            Err(error) => last_known(reference, known, error),
        }
    }

    /// What the fleet last heard from the origin. A remote that fails is passed over: planning says what that means.
    async fn shared_answer(
        &self,
        reference: &Reference,
        pointer: &Pointer,
        is_known: bool,
        policy: LookupPolicy,
    ) -> Result<Fleet> {
        let Some(remote) = self.remote_within(policy.max_tier) else { return Ok(Fleet::Unasked(None)) };
        self.before_first_call().await;
        let patience = match (is_known, policy.max_tier) {
            (true, _) => Some(PATIENCE),
            (false, Tier::Origin) => Some(SHARED_ANSWER_TIMEOUT),
            // There is nobody else to ask.
            (false, _) => None,
        };
        let asked = remote.answer(&pointer.name, &pointer.revision);
        match self.in_time(patience, asked).await {
            Ok(Some(answer)) if reference.may_mean(&answer.version) => {
                let age = answer.age(SystemTime::now());
                Ok(Fleet::Knows(answer, age))
            }
            Ok(_) => Ok(Fleet::Silent),
            Err(error) => {
                let error = self.remote_failed(error)?;
                tracing::debug!(%error, revision = pointer.revision, "the remote does not say what the revision means");
                Ok(Fleet::Unasked(Some(error)))
            }
        }
    }

    /// Lets the fleet know, in a task of its own: whoever asked is kept only for a moment. Where nothing is to be written
    /// to the remote now, this is not either.
    async fn share_answer(&self, pointer: &Pointer, answer: &ResolvedVersion, fleet: Fleet) {
        if matches!(self.backfill_mode(), Backfill::Later | Backfill::Never) {
            return;
        }
        let remote = match fleet {
            Fleet::Unasked(_) => return,
            Fleet::Silent => self.0.remote.clone(),
            Fleet::Knows(theirs, age) => {
                let is_news = theirs.version != answer.version || age > self.0.config.ref_ttl;
                self.0.remote.clone().filter(|_| is_news)
            }
        };
        let Some(remote) = remote.filter(Remote::is_writable) else { return };
        let name = pointer.name.clone();
        let told = RemoteRef::now(&pointer.revision, &answer.version, RefKind::Origin, None);
        let telling = tokio::spawn(async move {
            if let Err(error) = remote.write_answer(&name, &told).await {
                // No word to people: whoever may only read has done nothing wrong.
                tracing::debug!(%error, "the fleet is not told what the origin said");
            }
        });
        let _ = tokio::time::timeout(SHARE_TIMEOUT, telling).await;
    }

    /// What a bare `name@word` means: a version before a tag.
    pub(super) async fn resolve_version_or_tag(&self, key: &ArtifactKey, policy: LookupPolicy) -> Result<VersionOrTag> {
        if key.name.scheme().is_some() || self.is_here(key).await? {
            return Ok(VersionOrTag::Version(None));
        }
        let tag_record = |answer| VersionOrTag::Tag(answer, TagRecord { tag: key.version.clone(), sha256: None });
        let here = self.remembered(&key.name, key.version.as_str()).await?;
        if let Some(here) = here.as_ref().filter(|here| self.is_fresh(here.age, policy)) {
            return Ok(tag_record(here.clone()));
        }
        let Some(remote) = self.remote_within(policy.max_tier) else {
            return match here {
                Some(_) if policy.refresh => {
                    Err(Error::invalid("a refresh asks the remote, and it is not to be asked")
                        .hint("leave out --refresh, or be online and configure MODEL_CACHE_REMOTE"))
                }
                Some(here) => Ok(tag_record(here)),
                None => Ok(VersionOrTag::Version(None)),
            };
        };
        self.before_first_call().await;
        let known = here.filter(|_| !policy.refresh);
        match self.query_version_and_tag(remote, key, known.is_some()).await {
            Ok(word) => {
                if let VersionOrTag::Tag(answer, _) = &word {
                    self.remember(&pointer_of(key), answer).await;
                }
                Ok(word)
            }
            Err(error) if known.is_some() => last_known(&key, known, self.remote_failed(error)?).map(tag_record),
            Err(error) if policy.refresh => Err(error),
            Err(error) => Ok(VersionOrTag::Version(Some(Err(error)))),
        }
    }

    /// Asks the remote for a version and for a tag of that name, both at once.
    ///
    /// # Errors
    /// When neither is known for certain.
    async fn query_version_and_tag(&self, remote: &Remote, key: &ArtifactKey, is_known: bool) -> Result<VersionOrTag> {
        let source = Arc::new(remote.source(key));
        let both = async { Ok(futures::join!(source.manifest(), remote.tag(&key.name, key.version.as_str()))) };
        match self.in_time(is_known.then_some(PATIENCE), both).await? {
            (Ok(Some(_)), _) => Ok(VersionOrTag::Version(Some(Ok(source)))),
            (Ok(None), Ok(Some(tag))) => {
                let answer = ResolvedVersion { version: tag.version, from: Tier::Remote, age: Duration::ZERO };
                Ok(VersionOrTag::Tag(answer, TagRecord { tag: key.version.clone(), sha256: tag.sha256 }))
            }
            (Ok(None), Ok(None)) => {
                self.forget(key).await;
                Ok(VersionOrTag::Version(Some(Ok(source))))
            }
            // A manifest that cannot be used is a version's all the same.
            (Err(error), _) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid) => {
                Ok(VersionOrTag::Version(Some(Err(error))))
            }
            (Err(error), _) | (Ok(None), Err(error)) => Err(error),
        }
    }

    /// Compares what was tagged with what is under the version now, as far as that is on disk.
    ///
    /// # Errors
    /// `Corrupt` where disk has other content than the tag and the remote agree on.
    pub(super) async fn check_tagged(&self, key: &ArtifactKey, tag_record: &TagRecord) -> Result<()> {
        let (Some(sha256), Some(remote)) = (tag_record.sha256, &self.0.remote) else { return Ok(()) };
        let dir = self.0.disk.layout().artifact(key);
        let disk = self.0.disk.clone();
        let here = blocking(move || disk.shared_manifest(&dir)).await?;
        let Some(here) = here.and_then(|manifest| manifest.content_digest()).filter(|here| *here != sha256) else {
            return Ok(());
        };
        match remote.source(key).manifest().await {
            Ok(Some(there)) if there.content_digest().is_some_and(|there| there != here) => {
                Err(digest_alerts::outdated_here(key, &tag_record.tag, sha256, here))
            }
            Ok(Some(_)) => {
                digest_alerts::retagged(key, &tag_record.tag, sha256, here);
                Ok(())
            }
            // Nobody can say now whether it changed.
            _ => Ok(()),
        }
    }

    fn is_fresh(&self, age: Duration, policy: LookupPolicy) -> bool {
        !policy.refresh && age <= self.0.config.ref_ttl
    }

    /// What a revision means without asking anybody: it was asked a moment ago, or nobody is to be asked.
    pub(super) fn cached_key(&self, reference: &Reference, policy: LookupPolicy) -> Option<ArtifactKey> {
        let pointer = reference.pointer().filter(|_| self.0.disk.allows_fast_path())?;
        let RememberedRef { version, age } = self.0.disk.remembered_ref(&pointer.name, &pointer.revision).ok()??;
        let is_last_word = policy.max_tier < Tier::Origin && self.remote_within(policy.max_tier).is_none();
        (self.is_fresh(age, policy) || is_last_word && !policy.refresh).then(|| ArtifactKey::new(pointer.name, version))
    }

    /// The remote, where there is one and it may be asked.
    pub(super) fn remote_within(&self, max_tier: Tier) -> Option<&Remote> {
        self.0.remote.as_ref().filter(|_| max_tier >= Tier::Remote)
    }

    /// The outcome of asking the remote, within `patience` unless a failing remote shall be waited for to the end.
    async fn in_time<T>(&self, patience: Option<Duration>, asked: impl Future<Output = Result<T>>) -> Result<T> {
        match patience.filter(|_| self.0.config.on_remote_down == OnRemoteDown::Origin) {
            Some(patience) => {
                within(patience, asked).await.unwrap_or_else(|| Err(timeout_error(Tier::Remote, patience)))
            }
            None => asked.await,
        }
    }

    /// Whether disk, ours or the one below, knows this very version.
    async fn is_here(&self, key: &ArtifactKey) -> Result<bool> {
        let (disk, dir) = (self.0.disk.clone(), self.0.disk.layout().artifact(key));
        Ok(blocking(move || disk.shared_manifest(&dir)).await?.is_some() || self.lower_manifest(key).await?.is_some())
    }

    async fn remembered(&self, name: &ArtifactName, revision: &str) -> Result<Option<ResolvedVersion>> {
        let (cache, name, revision) = (self.clone(), name.clone(), revision.to_owned());
        let remembered = blocking(move || cache.remembered_ref(&name, &revision)).await?;
        Ok(remembered.map(|RememberedRef { version, age }| ResolvedVersion { version, from: Tier::Disk, age }))
    }

    async fn remember(&self, pointer: &Pointer, answer: &ResolvedVersion) {
        let (disk, pointer, answer) = (self.0.disk.clone(), pointer.clone(), answer.clone());
        let remember =
            blocking(move || disk.remember_ref(&pointer.name, &pointer.revision, &answer.version, answer.age));
        if let Err(error) = remember.await {
            tracing::debug!(%error, "the answer is not remembered");
        }
    }

    /// Forgets what a tag meant that is no longer there.
    pub(super) async fn forget(&self, key: &ArtifactKey) {
        let (disk, key) = (self.0.disk.clone(), key.clone());
        let forget = blocking(move || match disk.remembered_ref(&key.name, key.version.as_str())? {
            Some(_) => disk.forget_ref(&key.name, key.version.as_str()),
            None => Ok(()),
        });
        if let Err(error) = forget.await {
            tracing::debug!(%error, "a tag that is gone stays remembered");
        }
    }
}

fn pointer_of(key: &ArtifactKey) -> Pointer {
    Pointer { name: key.name.clone(), revision: key.version.to_string() }
}

fn timeout_error(who: Tier, patience: Duration) -> Error {
    Error::unavailable(format!("no answer within {} s", patience.as_secs())).tier(who)
}

/// The last known answer in place of one that does not come; other failures are answers themselves.
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

/// Why a revision stays unknown when its origin is not to be asked.
fn unknown_offline(pointer: &Pointer, fleet: Fleet, policy: LookupPolicy) -> Error {
    if let Fleet::Unasked(Some(error)) = fleet {
        return error;
    }
    let Pointer { name, revision } = pointer;
    Error::not_found(format!("what {revision:?} of {name} means is not known here; {}", policy.tiers_not_consulted()))
        .hint(LookupPolicy::HINT_ONLINE)
}
