//! OCI registries: artifacts as ORAS, ModelPack and KitOps push them.
//!
//! A tag resolves to the digest of its manifest; the manifest's bytes are checked against it, and its layers become
//! files (`layers`), checked by the digest that the manifest states. How a registry is asked, and what it is shown, is
//! `registry`'s business. Layers are read by ranges, mostly from an address elsewhere that the registry redirects to,
//! which is remembered until it is spent.

mod layers;
mod registry;

pub(super) use registry::Registries;

use super::Resolved;
use super::http::{self, Answer, Request};
use crate::digest::Digest;
use crate::error::{Context as _, Error, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::reference::oci::parse_digest;
use crate::reference::{OciAt, OciRepo};
use crate::source::{Body, Source};
use async_trait::async_trait;
use layers::{Document, Layers, only_choice};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RANGE};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;
use url::Url;

/// The manifest that the reference means now, and a source bound to it.
pub(super) async fn resolve(registries: &Arc<Registries>, repo: &OciRepo) -> Result<Resolved> {
    let (digest, bytes) = match &repo.at {
        OciAt::Digest(digest) => (*digest, None),
        OciAt::Tag(_) => {
            let bytes = registries.retry.run(|| registries.manifest(repo, &repo.at)).await?;
            (Digest::of(&bytes), Some(bytes))
        }
    };
    let key = repo.key_at(&digest)?;
    // What a tag means is remembered: not that it means nothing.
    if let Some(Document::Layers(layers)) = bytes.as_deref().and_then(|bytes| Document::parse(bytes).ok())
        && let Ok(layers) = Layers::new(&key, layers)
    {
        layers.refuse_none(&digest)?;
    }
    let repo = OciRepo { at: OciAt::Digest(digest), ..repo.clone() };
    Ok(Resolved { source: Arc::new(OciSource::new(registries, repo, key.clone(), digest, bytes)), key })
}

/// A source for `key`, which is `repo` at a digest; `None` for a version that is no digest.
pub(super) fn source(registries: &Arc<Registries>, repo: &OciRepo, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
    let digest = parse_digest(key.version.as_str()).ok()?;
    let repo = OciRepo { at: OciAt::Digest(digest), ..repo.clone() };
    Some(Arc::new(OciSource::new(registries, repo, key.clone(), digest, None)))
}

/// One artifact: a repository at the digest of a manifest.
struct OciSource {
    registries: Arc<Registries>,
    /// Its place is the digest.
    repo: OciRepo,
    key: ArtifactKey,
    digest: Digest,
    /// The manifest's bytes, where resolving a tag brought them.
    bytes: Option<Vec<u8>>,
    layers: OnceCell<Layers>,
    /// Where a layer was redirected to last.
    places: Mutex<HashMap<Digest, Url>>,
}

/// Signed addresses stay unprinted.
impl fmt::Debug for OciSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OciSource").field("key", &self.key).finish_non_exhaustive()
    }
}

#[async_trait]
impl Source for OciSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    /// What is missing is an error: there is to say whether it is the repository or the manifest.
    async fn manifest(&self) -> Result<Option<Manifest>> {
        let layers = self.layers().await.context(&self.key, Tier::Origin)?;
        Ok(Some(layers.manifest.clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.open(path, range).await.context(&self.key, Tier::Origin)
    }
}

impl OciSource {
    fn new(
        registries: &Arc<Registries>,
        repo: OciRepo,
        key: ArtifactKey,
        digest: Digest,
        bytes: Option<Vec<u8>>,
    ) -> Self {
        let (layers, places) = (OnceCell::new(), Mutex::default());
        Self { registries: registries.clone(), repo, key, digest, bytes, layers, places }
    }

    async fn layers(&self) -> Result<&Layers> {
        self.layers.get_or_try_init(|| self.find_layers()).await
    }

    async fn find_layers(&self) -> Result<Layers> {
        let mut digest = self.digest;
        let mut bytes = match &self.bytes {
            Some(bytes) => bytes.clone(),
            None => self.fetch(digest).await?,
        };
        // An index that offers one manifest is that manifest; one index in another is nothing that anybody pushes.
        if let Document::Index(manifests) = Document::parse(&bytes)? {
            digest = only_choice(&self.repo, manifests)?;
            bytes = self.fetch(digest).await?;
        }
        match Document::parse(&bytes)? {
            Document::Layers(layers) => {
                let layers = Layers::new(&self.key, layers)?;
                layers.refuse_none(&digest)?;
                Ok(layers)
            }
            Document::Index(_) => Err(Error::corrupt(format!("sha256:{digest} is an index inside an index"))),
        }
    }

    async fn fetch(&self, digest: Digest) -> Result<Vec<u8>> {
        let at = OciAt::Digest(digest);
        self.registries.retry.run(|| self.registries.manifest(&self.repo, &at)).await
    }

    /// One attempt at the bytes: where the layer was found last, else by way of the registry.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let layers = self.layers().await?;
        let (Some(entry), Some(blob)) = (layers.manifest.files.get(path), layers.blobs.get(path)) else {
            return Err(Error::not_found(format!("there is no file {path} in {}", self.repo)));
        };
        if let Some(body) = Body::unasked(path, &range, Some(entry.size))? {
            return Ok(body);
        }
        let headers = HeaderMap::from_iter([(RANGE, http::range_header(&range)?)]);
        if let Some(place) = self.place(blob) {
            let home = self.registries.home(&self.repo)?;
            let ask = Request { headers: headers.clone(), home: &home, authorization: None, stay: false };
            let answer = self.registries.http.follow(place, ask).await?;
            if !matches!(answer.response.status().as_u16(), 400 | 401 | 403 | 404 | 410) {
                return self.body(path, &range, entry.size, answer).await;
            }
            tracing::debug!(%path, status = answer.response.status().as_u16(), "an address is spent; asking the registry again");
            self.forget(blob);
            http::drain(answer.response).await;
        }
        let url = registry::below(
            &self.registries.home(&self.repo)?,
            &format!("v2/{}/blobs/sha256:{blob}", self.repo.repository),
        )?;
        let answer = self.registries.ask(&self.repo, url, headers, false).await?;
        if !answer.at_home && answer.response.status().is_success() {
            self.remember(*blob, answer.url.clone());
        }
        self.body(path, &range, entry.size, answer).await
    }

    async fn body(&self, path: &FilePath, range: &Range<u64>, size: u64, answer: Answer) -> Result<Body> {
        let status = answer.response.status();
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(self.registries.refused(answer, &self.repo, &format!("blob for {path}")).await);
        }
        let start = http::body_start(status, answer.response.headers(), range, Some(size))
            .map_err(|error| Error::new(error.kind(), format!("{path}: {}", error.message())))?;
        Ok(Body { start, stream: http::body_stream(answer.response, &answer.url) })
    }

    fn place(&self, blob: &Digest) -> Option<Url> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).get(blob).cloned()
    }

    fn remember(&self, blob: Digest, url: Url) {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).insert(blob, url);
    }

    fn forget(&self, blob: &Digest) {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).remove(blob);
    }
}

/// Whatever a registry answers; see `fuzzing`.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        registry::fuzz(text);
    }
    let (Ok(document), Ok(key)) = (layers::Document::parse(bytes), ArtifactKey::bare("fuzz@1")) else { return };
    if let layers::Document::Layers(list) = document
        && let Ok(layers) = layers::Layers::new(&key, list)
    {
        for path in layers.manifest.files.keys() {
            let climbs = path.as_str().split('/').any(|segment| matches!(segment, "" | "." | ".."));
            assert!(!climbs && !path.as_str().contains('\\'), "{path}");
        }
    }
}
