//! Step 1 of the main path: resolving a reference to a key, a selection, and a source at the origin.
//!
//! A reference that names a version is resolved without any request. `pointer.rs` resolves revisions and tags.

use super::pointer::{ResolvedVersion, TagRecord, VersionOrTag};
use super::{Cache, GetOptions};
use crate::config::OriginTemplate;
use crate::digest::Digest;
use crate::disk::{Destination, Purpose};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{Manifest, Shape};
use crate::option_name::call::{EXCLUDE, INCLUDE};
use crate::option_name::{call, setting};
use crate::origin::Origins;
use crate::progress::{Phase, Progress};
use crate::reference::{Reference, Target};
use crate::remote::RemoteSource;
use crate::selection::Selection;
use crate::source::{Body, Source};
use crate::transfer::recording_retries;
use async_trait::async_trait;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;

/// Which tiers may be contacted to resolve a reference, and how cached resolutions are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LookupPolicy {
    /// Resolve at the authority (the origin for a revision, the remote for a tag), even if a cached resolution is
    /// fresh.
    pub(super) refresh: bool,
    /// The farthest tier that may be contacted.
    pub(super) max_tier: Tier,
    /// True for a get. It may record on the remote to which version an origin resolved a revision, for other machines,
    /// and may evict an outdated local copy. False for a lookup during a fill or an eviction, and for a call that
    /// changes nothing.
    pub(super) may_write: bool,
}

/// The version that a reference points to, and its sources.
#[derive(Debug)]
pub(super) struct Resolution {
    pub(super) key: ArtifactKey,
    /// The source at the origin, used if neither disk nor remote has the artifact. It has not been contacted yet.
    pub(super) origin: Option<Arc<dyn Source>>,
    /// The version that a revision or tag was resolved to; `None` if the reference names a version.
    pub(super) resolved_version: Option<ResolvedVersion>,
    /// The tag that was resolved.
    pub(super) tag_record: Option<TagRecord>,
    /// If the remote was contacted for the resolution, the source there, or the reason why there is none.
    pub(super) remote: Option<Result<Arc<RemoteSource>>>,
}

/// A resolved get: which files of which artifact, and from where they may be downloaded.
#[derive(Debug, Clone)]
pub(super) struct FetchRequest {
    pub(super) key: ArtifactKey,
    pub(super) selection: Selection,
    /// The digest that the caller demands (`#sha256=…`).
    pub(super) digest: Option<Digest>,
    /// The source at the origin, used if neither disk nor remote has the artifact. It has not been contacted yet.
    pub(super) origin: Option<Arc<dyn Source>>,
    /// The farthest tier that a fill may contact.
    pub(super) max_tier: Tier,
    /// The purpose of the download.
    pub(super) purpose: Purpose,
    /// The tag that was resolved.
    pub(super) tag_record: Option<TagRecord>,
    /// If the remote was contacted for the resolution, the source there, or the reason why there is none.
    pub(super) remote: Option<Result<Arc<RemoteSource>>>,
    /// True if the get waits until the files are on stable storage.
    pub(super) durable: bool,
    /// The folder into which the caller will materialize the files.
    pub(super) destination: Option<Destination>,
}

impl LookupPolicy {
    /// Returns the hint for an artifact that was not found because a tier was excluded, in offline mode or with
    /// `local_files_only`.
    pub(super) fn hint_online() -> String {
        let (offline, local_files_only) = (call::OFFLINE, call::LOCAL_FILES_ONLY);
        format!(
            "get the artifact once with network access, without {offline} and {local_files_only}, and with {} and \
             HF_HUB_OFFLINE unset; or put it on a remote that can be reached",
            setting::OFFLINE
        )
    }

    /// Returns the part of a message that names the excluded tiers.
    pub(super) fn tiers_not_consulted(self) -> &'static str {
        match self.max_tier {
            Tier::Disk => "neither remote nor origin was asked (local files only)",
            Tier::Remote | Tier::Origin => "no origin was asked (offline)",
        }
    }
}

impl Cache {
    /// Step 1 of the main path: resolves a reference, with the lookup policy that `options` and the configuration
    /// allow.
    pub(super) async fn resolve(
        &self,
        reference: &Reference,
        options: &GetOptions,
        progress: &Progress,
    ) -> Result<FetchRequest> {
        recording_retries(progress, self.resolve_with(reference, options, self.policy(options), progress)).await
    }

    /// Resolves a reference with the lookup policy `policy`.
    pub(super) async fn resolve_with(
        &self,
        reference: &Reference,
        options: &GetOptions,
        policy: LookupPolicy,
        progress: &Progress,
    ) -> Result<FetchRequest> {
        let _phase = progress.enter(Phase::Resolve, 0);
        let selection = match &reference.file {
            Some(file) if !options.selection.is_all() => {
                return Err(Error::invalid(format!(
                    "{reference} names one file, {file}; {INCLUDE} and {EXCLUDE} choose among many"
                ))
                .hint("omit the file in the reference, or omit the patterns"));
            }
            Some(file) => Selection::file(file.clone()),
            None => options.selection.clone(),
        };
        let resolution = self.resolution(reference, policy).await?;
        // A call that downloads nothing must not evict anything either.
        if policy.refresh && policy.may_write {
            self.evict_if_replaced(&resolution, policy).await?;
        }
        let Resolution { key, origin, tag_record, remote, .. } = resolution;
        // The content of a tagged version must still be the content that was tagged.
        if let Some(tag_record) = &tag_record {
            self.check_tagged(&key, tag_record).await?;
        }
        let (digest, max_tier) = (reference.digest, policy.max_tier);
        let GetOptions { purpose, durable, .. } = *options;
        let destination = options.destination.clone();
        Ok(FetchRequest { key, selection, digest, origin, max_tier, purpose, durable, destination, tag_record, remote })
    }

    /// Returns the lookup policy of a call, limited by the configuration.
    pub(super) fn policy(&self, options: &GetOptions) -> LookupPolicy {
        let allowed = if self.0.config.offline { Tier::Remote } else { Tier::Origin };
        LookupPolicy { refresh: options.refresh, max_tier: options.max_tier.min(allowed), may_write: true }
    }

    /// Resolves a reference to the version that it points to now.
    pub(super) async fn resolution(&self, reference: &Reference, policy: LookupPolicy) -> Result<Resolution> {
        let reference = &self.0.origins.completed(reference);
        if let Target::Bare(key) = &reference.target {
            return self.resolve_bare(reference, key, policy).await;
        }
        let (key, resolved_version) = match (reference.exact_key(), reference.pointer()) {
            (Some(key), _) => (key, None),
            (None, Some(pointer)) => {
                let resolved = self.resolve_pointer(reference, &pointer, policy).await?;
                (ArtifactKey::new(pointer.name, resolved.version.clone()), Some(resolved))
            }
            // For instance a local folder, whose version depends on its present content.
            (None, None) => return self.resolve_at_origin(reference, policy).await,
        };
        let origin = self.0.origins.source(reference, &key).filter(|_| policy.max_tier == Tier::Origin);
        Ok(Resolution { key, origin, resolved_version, tag_record: None, remote: None })
    }

    /// Resolves a bare `name@version` or `name@tag`.
    async fn resolve_bare(&self, reference: &Reference, key: &ArtifactKey, policy: LookupPolicy) -> Result<Resolution> {
        let (key, resolved_version, tag_record, remote) = match self.resolve_version_or_tag(key, policy).await? {
            VersionOrTag::Version(remote) => (key.clone(), None, None, remote),
            VersionOrTag::Tag(resolved, tag_record) => {
                (ArtifactKey::new(key.name.clone(), resolved.version.clone()), Some(resolved), Some(tag_record), None)
            }
        };
        // `ls` prints the key of an artifact from an origin in this form. It is accepted like the URI of that origin.
        let origin_of_key = || self.0.origins.source(reference, &key).filter(|_| policy.max_tier == Tier::Origin);
        let origin = self.template_origin(&key, policy).or_else(origin_of_key);
        Ok(Resolution { key, origin, resolved_version, tag_record, remote })
    }

    /// Resolves a reference whose version only the origin can determine. Local folders are read even if origins are
    /// excluded.
    async fn resolve_at_origin(&self, reference: &Reference, policy: LookupPolicy) -> Result<Resolution> {
        if !reference.is_local() {
            if policy.max_tier < Tier::Origin {
                let reason = policy.tiers_not_consulted();
                return Err(Error::not_found(format!("only the origin knows the current version; {reason}"))
                    .hint(LookupPolicy::hint_online()));
            }
            self.wait_for_start_jitter().await;
        }
        let absent = || Error::not_found("there is no such file or folder").tier(Tier::Origin).hint("check the path");
        let resolved = self.0.origins.resolve(reference).await;
        if !reference.is_local() {
            self.metrics().record_health(Tier::Origin, &resolved);
        }
        let resolved = resolved?.ok_or_else(absent)?;
        Ok(Resolution {
            key: resolved.key,
            origin: Some(resolved.source),
            resolved_version: None,
            tag_record: None,
            remote: None,
        })
    }

    /// Returns the source for a bare key from the configured origin templates, if there are any. It is not contacted
    /// yet.
    pub(super) fn template_origin(&self, key: &ArtifactKey, policy: LookupPolicy) -> Option<Arc<dyn Source>> {
        // In offline mode, only templates of local folders are left.
        let may_ask = |template: &&OriginTemplate| {
            policy.max_tier == Tier::Origin || template.apply(key).is_ok_and(|reference| reference.is_local())
        };
        let templates: Vec<_> = self.0.config.origins.iter().filter(may_ask).cloned().collect();
        (!templates.is_empty() && key.name.scheme().is_none()).then(|| {
            Arc::new(TemplateOrigin {
                key: key.clone(),
                templates,
                origins: self.0.origins.clone(),
                located: OnceCell::new(),
            }) as Arc<dyn Source>
        })
    }
}

impl FetchRequest {
    /// Returns a request for the selected files of `key`, which may contact no tier beyond `max_tier`. It has no
    /// origin, demands no digest, and does not wait until the files are durable.
    pub(super) fn new(key: ArtifactKey, selection: Selection, max_tier: Tier) -> Self {
        Self {
            key,
            selection,
            digest: None,
            origin: None,
            max_tier,
            purpose: Purpose::default(),
            tag_record: None,
            remote: None,
            durable: false,
            destination: None,
        }
    }

    /// Returns the policy for lookups during the fill. The reference is resolved already, so no resolution is refreshed
    /// or recorded on the remote.
    pub(super) fn policy(&self) -> LookupPolicy {
        LookupPolicy { refresh: false, max_tier: self.max_tier, may_write: false }
    }

    /// Compares the demanded digest, if there is one, with `manifest`. A digest that is still unknown is not an error:
    /// the comparison is repeated after the download.
    ///
    /// # Errors
    /// `Corrupt` if the digests differ.
    pub(super) fn check_demanded_digest(&self, manifest: &Manifest) -> Result<()> {
        let Some(demanded) = self.digest else { return Ok(()) };
        match self.known_digest(manifest) {
            Some(known) if known != demanded => {
                Err(Error::corrupt(format!("sha256 {demanded} is demanded, but the artifact has {known}"))
                    .hint("the reference pins other content than this version has; check where the digest came from"))
            }
            _ => Ok(()),
        }
    }

    /// Returns the digest that a demanded digest is compared with; `None` until it is known.
    pub(super) fn known_digest(&self, manifest: &Manifest) -> Option<Digest> {
        match self.single_file(manifest) {
            Some(path) => manifest.files.get(path).and_then(|entry| entry.sha256),
            None => manifest.list_digest(),
        }
    }

    /// Returns the file that the demanded digest belongs to; `None` if it is the digest of the file list of a tree.
    pub(super) fn single_file<'a>(&'a self, manifest: &'a Manifest) -> Option<&'a FilePath> {
        match manifest.shape {
            Shape::File => manifest.files.keys().next(),
            Shape::Tree => self.selection.one_file(),
        }
    }
}

/// The origin of a bare key: the first configured template whose location has the artifact. Locations are contacted at
/// the first use.
#[derive(Debug)]
struct TemplateOrigin {
    key: ArtifactKey,
    templates: Vec<OriginTemplate>,
    origins: Origins,
    located: OnceCell<Option<(Arc<dyn Source>, Manifest)>>,
}

impl TemplateOrigin {
    /// Returns the first source that has the artifact, and its manifest.
    async fn locate(&self) -> Result<Option<&(Arc<dyn Source>, Manifest)>> {
        let located = self.located.get_or_try_init(|| async {
            for template in &self.templates {
                if let Some(located) = self.try_template(template).await? {
                    return Ok::<_, Error>(Some(located));
                }
            }
            Ok(None)
        });
        Ok(located.await?.as_ref())
    }

    /// Returns the source that has the artifact, once it has been located.
    fn located_source(&self) -> Option<&Arc<dyn Source>> {
        self.located.get()?.as_ref().map(|(source, _)| source)
    }

    /// Returns the source at the location of `template` and its manifest; `None` if the artifact is not there.
    async fn try_template(&self, template: &OriginTemplate) -> Result<Option<(Arc<dyn Source>, Manifest)>> {
        // A template need not fit every name. If it yields no valid reference, its location does not have the artifact.
        let Ok(reference) = template.apply(&self.key) else { return Ok(None) };
        let located = async {
            let Some(resolved) = self.origins.resolve(&reference).await? else { return Ok::<_, Error>(None) };
            let manifest = resolved.source.manifest().await?;
            Ok(manifest.map(|manifest| (resolved.source, Manifest { key: self.key.clone(), ..manifest })))
        };
        match located.await {
            // Continue with the next template. Any other error ends the search: this location may have the artifact.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            result => result,
        }
    }
}

#[async_trait]
impl Source for TemplateOrigin {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        Ok(self.locate().await?.map(|(_, manifest)| manifest.clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        match self.locate().await? {
            Some((source, _)) => source.read(path, range).await,
            None => Err(Error::not_found("no configured origin has the artifact").tier(Tier::Origin)),
        }
    }

    fn digest_stated_by(&self, path: &FilePath) -> Option<String> {
        self.located_source()?.digest_stated_by(path)
    }

    fn ignores_ranges(&self) -> bool {
        self.located_source().is_some_and(|source| source.ignores_ranges())
    }

    fn saw_other_validators(&self) -> bool {
        self.located_source().is_some_and(|source| source.saw_other_validators())
    }

    fn endpoint(&self) -> Option<String> {
        self.located_source()?.endpoint()
    }

    fn store(&self) -> Option<String> {
        self.located_source()?.store()
    }
}
