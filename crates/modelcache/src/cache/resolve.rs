//! Resolving: from a reference to a key, a selection, and the source at the origin.
//!
//! What the reference alone decides costs nothing. A revision asks the fresh answer on disk, then the origin; when the
//! origin is unavailable, the last answer on disk serves, and a warning says so.

use super::Cache;
use crate::config::OriginTemplate;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{Manifest, Shape};
use crate::origin::Origins;
use crate::progress::{Phase, Progress};
use crate::reference::{Pointer, Reference, Target};
use crate::selection::Selection;
use crate::source::{Body, Source};
use crate::transfer::blocking;
use async_trait::async_trait;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;

/// What a get is after, once the reference is understood.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) key: ArtifactKey,
    pub(super) selection: Selection,
    /// The digest that the caller demands.
    pub(super) digest: Option<Digest>,
    /// Where the artifact comes from if neither disk nor remote has it; not asked yet.
    pub(super) origin: Option<Arc<dyn Source>>,
}

impl Cache {
    /// Step 1 of the main path.
    pub(super) async fn resolve(
        &self,
        reference: &Reference,
        selection: &Selection,
        progress: &Progress,
    ) -> Result<Wanted> {
        let _phase = progress.enter(Phase::Resolve, 0);
        let selection = match &reference.file {
            Some(file) if !selection.is_all() => {
                return Err(Error::invalid(format!(
                    "{reference} names one file, {file}; --include and --exclude choose among many"
                ))
                .hint("leave either out"));
            }
            Some(file) => Selection::file(file.clone()),
            None => selection.clone(),
        };
        let (key, origin) = self.resolve_key(reference).await?;
        Ok(Wanted { key, selection, digest: reference.digest, origin })
    }

    /// The key a reference leads to now, and the source at its origin.
    pub(super) async fn resolve_key(&self, reference: &Reference) -> Result<(ArtifactKey, Option<Arc<dyn Source>>)> {
        let reference = &self.0.origins.placed(reference);
        if let Target::Bare(key) = &reference.target {
            let origin = self.template_origin(key).or_else(|| self.0.origins.source(reference, key));
            return Ok((key.clone(), origin));
        }
        let key = match (reference.exact_key(), reference.pointer()) {
            (Some(key), _) => key,
            (None, Some(pointer)) => self.resolve_pointer(reference, pointer).await?,
            // A folder: whether it still is what its version says, only a look can tell.
            (None, None) => {
                let absent =
                    || Error::not_found("there is no such file or folder").tier(Tier::Origin).hint("check the path");
                let resolved = self.0.origins.resolve(reference).await?.ok_or_else(absent)?;
                return Ok((resolved.key, Some(resolved.source)));
            }
        };
        let origin = self.0.origins.source(reference, &key);
        Ok((key, origin))
    }

    /// The version that a pointer leads to: this disk's answer while it is fresh, else the origin's; the last one known
    /// where the origin does not answer.
    async fn resolve_pointer(&self, reference: &Reference, pointer: Pointer) -> Result<ArtifactKey> {
        let Pointer { name, revision } = pointer;
        let remembered = {
            let (disk, name, revision) = (self.0.disk.clone(), name.clone(), revision.clone());
            blocking(move || disk.remembered_ref(&name, &revision)).await?
        };
        if let Some(fresh) = remembered.as_ref().filter(|answer| answer.age <= self.0.config.ref_ttl) {
            return Ok(ArtifactKey::new(name, fresh.version.clone()));
        }
        match self.0.origins.resolve(reference).await {
            Ok(Some(resolved)) => {
                let (disk, key) = (self.0.disk.clone(), resolved.key.clone());
                let remember = blocking(move || disk.remember_ref(&key.name, &revision, &key.version)).await;
                if let Err(error) = remember {
                    tracing::debug!(%error, "the answer is not remembered");
                }
                Ok(resolved.key)
            }
            Ok(None) => Err(Error::not_found(format!("there is no revision {revision:?}")).tier(Tier::Origin)),
            Err(error) => match remembered {
                Some(last) if error.kind() == ErrorKind::Unavailable => {
                    let key = ArtifactKey::new(name, last.version);
                    tracing::warn!(%error, %key, age_s = last.age.as_secs(), "the origin does not answer; using what the revision last meant");
                    Ok(key)
                }
                _ => Err(error),
            },
        }
    }

    /// The source for a bare key by the configured templates, if there are any.
    fn template_origin(&self, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let templates = &self.0.config.origins;
        (!templates.is_empty() && key.name.scheme().is_none()).then(|| {
            Arc::new(TemplateOrigin {
                key: key.clone(),
                templates: templates.clone(),
                origins: self.0.origins.clone(),
                found: OnceCell::new(),
            }) as Arc<dyn Source>
        })
    }
}

impl Wanted {
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
}
