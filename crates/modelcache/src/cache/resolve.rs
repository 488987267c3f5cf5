//! Resolving: from a reference to a key, a selection, and the source at the origin.
//!
//! What the reference alone decides costs nothing. What a movable name means is found in `pointer.rs`.

use super::pointer::{ResolvedVersion, TagRecord, VersionOrTag};
use super::{Cache, GetOptions};
use crate::config::OriginTemplate;
use crate::digest::Digest;
use crate::disk::Purpose;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{Manifest, Shape};
use crate::origin::Origins;
use crate::progress::{Phase, Progress};
use crate::reference::{Reference, Target};
use crate::remote::RemoteSource;
use crate::selection::Selection;
use crate::source::{Body, Source};
use async_trait::async_trait;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;

/// How answers are sought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LookupPolicy {
    /// Whatever is remembered, the authority is asked.
    pub(super) refresh: bool,
    /// The farthest tier that may be asked.
    pub(super) max_tier: Tier,
    /// Whether the fleet is told what an origin answers.
    pub(super) share_answers: bool,
}

/// What a reference means now.
#[derive(Debug)]
pub(super) struct Resolution {
    pub(super) key: ArtifactKey,
    /// Where it comes from if neither disk nor remote has it; not asked yet.
    pub(super) origin: Option<Arc<dyn Source>>,
    /// Who said so; `None` where the reference itself does.
    pub(super) answer: Option<ResolvedVersion>,
    /// The tag that led there.
    pub(super) tag_record: Option<TagRecord>,
    /// Its source on the remote, or why there is none, if the remote was asked on the way.
    pub(super) remote: Option<Result<Arc<RemoteSource>>>,
}

/// What a get is after, once the reference is understood.
#[derive(Debug, Clone)]
pub(super) struct FetchRequest {
    pub(super) key: ArtifactKey,
    pub(super) selection: Selection,
    /// The digest that the caller demands.
    pub(super) digest: Option<Digest>,
    /// Where the artifact comes from if neither disk nor remote has it; not asked yet.
    pub(super) origin: Option<Arc<dyn Source>>,
    /// How far whoever fills it may reach.
    pub(super) max_tier: Tier,
    /// What for.
    pub(super) purpose: Purpose,
    /// The tag that led there.
    pub(super) tag_record: Option<TagRecord>,
    /// Its source on the remote, or why there is none, if the remote was asked on the way.
    pub(super) remote: Option<Result<Arc<RemoteSource>>>,
    /// Whether the caller waits until it survives a power cut.
    pub(super) durable: bool,
}

impl LookupPolicy {
    /// What somebody can do whose artifact was not found because nobody was asked.
    pub(super) const HINT_ONLINE: &str = "run it once without --offline and --local-files-only, with MODEL_CACHE_OFFLINE \
         and HF_HUB_OFFLINE unset, where the network is; or put it on a remote that can be reached from here";

    /// Who was not asked.
    pub(super) fn tiers_not_consulted(self) -> &'static str {
        match self.max_tier {
            Tier::Disk => "neither remote nor origin was asked (local files only)",
            Tier::Remote | Tier::Origin => "no origin was asked (offline)",
        }
    }
}

impl Cache {
    /// Step 1 of the main path.
    pub(super) async fn resolve(
        &self,
        reference: &Reference,
        options: &GetOptions,
        progress: &Progress,
    ) -> Result<FetchRequest> {
        self.resolve_with(reference, options, self.policy(options), progress).await
    }

    /// The same, asking otherwise than `options` say.
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
                    "{reference} names one file, {file}; --include and --exclude choose among many"
                ))
                .hint("leave either out"));
            }
            Some(file) => Selection::file(file.clone()),
            None => options.selection.clone(),
        };
        let Resolution { key, origin, tag_record, remote, .. } = self.resolution(reference, policy).await?;
        if let Some(tag_record) = &tag_record {
            self.check_tagged(&key, tag_record).await?;
        }
        let (digest, max_tier) = (reference.digest, policy.max_tier);
        let GetOptions { purpose, durable, .. } = *options;
        Ok(FetchRequest { key, selection, digest, origin, max_tier, purpose, durable, tag_record, remote })
    }

    /// How a call asks, within what the configuration allows.
    pub(super) fn policy(&self, options: &GetOptions) -> LookupPolicy {
        let allowed = if self.0.config.offline { Tier::Remote } else { Tier::Origin };
        LookupPolicy { refresh: options.refresh, max_tier: options.max_tier.min(allowed), share_answers: true }
    }

    /// What a reference means now.
    pub(super) async fn resolution(&self, reference: &Reference, policy: LookupPolicy) -> Result<Resolution> {
        let reference = &self.0.origins.placed(reference);
        if let Target::Bare(key) = &reference.target {
            return self.resolve_bare(reference, key, policy).await;
        }
        let (key, answer) = match (reference.exact_key(), reference.pointer()) {
            (Some(key), _) => (key, None),
            (None, Some(pointer)) => {
                let answer = self.resolve_pointer(reference, &pointer, policy).await?;
                (ArtifactKey::new(pointer.name, answer.version.clone()), Some(answer))
            }
            // A folder: whether it still is what its version says, only a look can tell.
            (None, None) => return self.resolve_for_query(reference, policy).await,
        };
        let origin = self.0.origins.source(reference, &key).filter(|_| policy.max_tier == Tier::Origin);
        Ok(Resolution { key, origin, answer, tag_record: None, remote: None })
    }

    async fn resolve_bare(&self, reference: &Reference, key: &ArtifactKey, policy: LookupPolicy) -> Result<Resolution> {
        let (key, answer, tag_record, remote) = match self.resolve_version_or_tag(key, policy).await? {
            VersionOrTag::Version(remote) => (key.clone(), None, None, remote),
            VersionOrTag::Tag(answer, tag_record) => {
                (ArtifactKey::new(key.name.clone(), answer.version.clone()), Some(answer), Some(tag_record), None)
            }
        };
        // A listed key of a registry is as good as its URI.
        let listed = || self.0.origins.source(reference, &key).filter(|_| policy.max_tier == Tier::Origin);
        let origin = self.template_origin(&key, policy).or_else(listed);
        Ok(Resolution { key, origin, answer, tag_record, remote })
    }

    async fn resolve_for_query(&self, reference: &Reference, policy: LookupPolicy) -> Result<Resolution> {
        if !reference.is_local() {
            if policy.max_tier < Tier::Origin {
                let nobody = policy.tiers_not_consulted();
                return Err(Error::not_found(format!("what it is now, only its origin can tell; {nobody}"))
                    .hint(LookupPolicy::HINT_ONLINE));
            }
            self.before_first_call().await;
        }
        let absent = || Error::not_found("there is no such file or folder").tier(Tier::Origin).hint("check the path");
        let resolved = self.0.origins.resolve(reference).await;
        self.metrics().asked(Tier::Origin, &resolved);
        let resolved = resolved?.ok_or_else(absent)?;
        Ok(Resolution {
            key: resolved.key,
            origin: Some(resolved.source),
            answer: None,
            tag_record: None,
            remote: None,
        })
    }

    /// The source for a bare key by the configured templates, if there are any.
    pub(super) fn template_origin(&self, key: &ArtifactKey, policy: LookupPolicy) -> Option<Arc<dyn Source>> {
        let may_ask = |template: &&OriginTemplate| {
            policy.max_tier == Tier::Origin || template.apply(key).is_ok_and(|reference| reference.is_local())
        };
        let templates: Vec<_> = self.0.config.origins.iter().filter(may_ask).cloned().collect();
        (!templates.is_empty() && key.name.scheme().is_none()).then(|| {
            Arc::new(TemplateOrigin {
                key: key.clone(),
                templates,
                origins: self.0.origins.clone(),
                found: OnceCell::new(),
            }) as Arc<dyn Source>
        })
    }
}

impl FetchRequest {
    /// How whoever fills it asks: what a name means is settled.
    pub(super) fn policy(&self) -> LookupPolicy {
        LookupPolicy { refresh: false, max_tier: self.max_tier, share_answers: false }
    }

    /// Compares the demanded digest, if there is one, with what is known by now. Unknown digests pass: they are
    /// compared again once the bytes were seen.
    pub(super) fn check_demanded_digest(&self, manifest: &Manifest) -> Result<()> {
        let Some(demanded) = self.digest else { return Ok(()) };
        let known = match self.single_file(manifest) {
            Some(path) => manifest.files.get(path).and_then(|entry| entry.sha256),
            None => manifest.list_digest(),
        };
        match known {
            Some(known) if known != demanded => {
                Err(Error::corrupt(format!("sha256 {demanded} is demanded, but the artifact has {known}"))
                    .hint("the reference pins other content than this version has; check where the digest came from"))
            }
            _ => Ok(()),
        }
    }

    /// The file whose digest a demand is about; `None` for trees, where it is about the file list.
    pub(super) fn single_file<'a>(&'a self, manifest: &'a Manifest) -> Option<&'a FilePath> {
        match manifest.shape {
            Shape::File => manifest.files.keys().next(),
            Shape::Tree => self.selection.one_file(),
        }
    }
}

/// The origin of a bare key: the first configured template whose place has it. Nothing is asked before it is read.
#[derive(Debug)]
struct TemplateOrigin {
    key: ArtifactKey,
    templates: Vec<OriginTemplate>,
    origins: Origins,
    found: OnceCell<Option<(Arc<dyn Source>, Manifest)>>,
}

impl TemplateOrigin {
    async fn found(&self) -> Result<Option<&(Arc<dyn Source>, Manifest)>> {
        let found = self.found.get_or_try_init(|| async {
            for template in &self.templates {
                if let Some(found) = self.ask(template).await? {
                    return Ok::<_, Error>(Some(found));
                }
            }
            Ok(None)
        });
        Ok(found.await?.as_ref())
    }

    async fn ask(&self, template: &OriginTemplate) -> Result<Option<(Arc<dyn Source>, Manifest)>> {
        // A template need not fit every name: what it cannot express, its place does not have.
        let Ok(reference) = template.apply(&self.key) else { return Ok(None) };
        let asked = async {
            let Some(resolved) = self.origins.resolve(&reference).await? else { return Ok::<_, Error>(None) };
            let manifest = resolved.source.manifest().await?;
            Ok(manifest.map(|manifest| (resolved.source, Manifest { key: self.key.clone(), ..manifest })))
        };
        match asked.await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            answer => answer,
        }
    }
}

#[async_trait]
impl Source for TemplateOrigin {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        Ok(self.found().await?.map(|(_, manifest)| manifest.clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        match self.found().await? {
            Some((source, _)) => source.read(path, range).await,
            None => Err(Error::not_found("no configured origin has it").tier(Tier::Origin)),
        }
    }

    fn stated_by(&self, path: &FilePath) -> Option<String> {
        let (source, _) = self.found.get()?.as_ref()?;
        source.stated_by(path)
    }
}
