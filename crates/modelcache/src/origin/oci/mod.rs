//! OCI registries as an origin: artifacts pushed with ORAS, ModelPack and KitOps.
//!
//! A tag resolves to the digest of its manifest. The bytes of the manifest are verified against that digest, and its
//! layers become files (`layers.rs`), verified by the digests in the manifest. `registry.rs` sends the requests and
//! handles authentication. Layers are read by ranges, mostly from a URL that the registry redirects to.

mod layers;
mod registry;

use crate::mutex::Mutex;
pub(super) use registry::Registries;

use super::http::{self, FinalResponse, Request};
use super::{Origin, ResolvedSource};
use crate::digest::Digest;
use crate::error::{Context as _, Error, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::reference::{OciAt, OciRepo, Reference, Scheme, Target, oci};
use crate::source::{Body, Source};
use async_trait::async_trait;
use layers::{Document, Layers, single_manifest};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RANGE};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;
use url::Url;

#[async_trait]
impl Origin for Arc<Registries> {
    fn scheme(&self) -> &'static Scheme {
        &oci::SCHEME
    }

    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        let Target::Oci(repo) = &reference.target else { return Ok(None) };
        let (digest, bytes) = match &repo.at {
            // A digest needs no request.
            OciAt::Digest(digest) => (*digest, None),
            OciAt::Tag(_) => {
                let bytes = self.retry.run(|| self.manifest(repo, &repo.at)).await?;
                (Digest::of(&bytes), Some(bytes))
            }
        };
        let key = repo.key_at(&digest)?;
        // The caller records the digest that the tag points to. A manifest without files must fail before that.
        if let Some(Document::Layers(layers)) = bytes.as_deref().and_then(|bytes| Document::parse(bytes).ok())
            && let Ok(layers) = Layers::new(&key, layers)
        {
            layers.require_files(&digest)?;
        }
        let repo = OciRepo { at: OciAt::Digest(digest), ..repo.clone() };
        Ok(Some(ResolvedSource { source: Arc::new(OciSource::new(self, repo, key.clone(), digest, bytes)), key }))
    }

    fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let Target::Oci(repo) = &reference.target else { return None };
        let digest = oci::parse_digest(key.version.as_str()).ok()?;
        let repo = OciRepo { at: OciAt::Digest(digest), ..repo.clone() };
        Some(Arc::new(OciSource::new(self, repo, key.clone(), digest, None)))
    }
}

/// The source for one artifact: a repository at the digest of a manifest.
struct OciSource {
    registries: Arc<Registries>,
    /// The repository at the digest.
    repo: OciRepo,
    key: ArtifactKey,
    digest: Digest,
    /// The bytes of the manifest, if they were read to resolve a tag.
    manifest_bytes: Option<Vec<u8>>,
    layers: OnceCell<Layers>,
    /// The target of the last redirect of each layer.
    redirects: Mutex<HashMap<Digest, Url>>,
}

/// Prints no signed URLs.
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

    fn endpoint(&self) -> Option<String> {
        Some(self.repo.registry.clone())
    }

    /// A missing artifact is an error rather than `None`, because the message names the missing part.
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
        manifest_bytes: Option<Vec<u8>>,
    ) -> Self {
        let (layers, redirects) = (OnceCell::new(), Mutex::default());
        Self { registries: registries.clone(), repo, key, digest, manifest_bytes, layers, redirects }
    }

    /// Returns the layers, reading the manifest at the first call.
    async fn layers(&self) -> Result<&Layers> {
        self.layers.get_or_try_init(|| self.find_layers()).await
    }

    /// Reads the manifest, or the single manifest of an index, and parses its layers.
    async fn find_layers(&self) -> Result<Layers> {
        let mut digest = self.digest;
        let mut bytes = match &self.manifest_bytes {
            Some(bytes) => bytes.clone(),
            None => self.fetch_manifest(digest).await?,
        };
        // An index with a single manifest stands for that manifest. No known tool pushes an index inside an index.
        if let Document::Index(manifests) = Document::parse(&bytes)? {
            digest = single_manifest(&self.repo, manifests)?;
            bytes = self.fetch_manifest(digest).await?;
        }
        match Document::parse(&bytes)? {
            Document::Layers(layers) => {
                let layers = Layers::new(&self.key, layers)?;
                layers.require_files(&digest)?;
                Ok(layers)
            }
            Document::Index(_) => Err(Error::corrupt(format!("sha256:{digest} is an index inside an index"))),
        }
    }

    /// Reads the manifest with `digest`, with retries.
    async fn fetch_manifest(&self, digest: Digest) -> Result<Vec<u8>> {
        let at = OciAt::Digest(digest);
        self.registries.retry.run(|| self.registries.manifest(&self.repo, &at)).await
    }

    /// Makes one attempt to read `range`: from the target of the last redirect, else through the registry.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let layers = self.layers().await?;
        let (Some(entry), Some(blob)) = (layers.manifest.files.get(path), layers.blobs.get(path)) else {
            return Err(Error::not_found(format!("there is no file {path} in {}", self.repo)));
        };
        if let Some(body) = Body::for_empty_range(path, &range, Some(entry.size))? {
            return Ok(body);
        }
        let headers = HeaderMap::from_iter([(RANGE, http::range_header(&range)?)]);
        // 1. Request the last redirect target directly, without credentials.
        if let Some(redirect_url) = self.redirect_url(blob) {
            let base_url = self.registries.base_url(&self.repo)?;
            let request = Request {
                headers: headers.clone(),
                credential_url: &base_url,
                authorization: None,
                same_origin_only: false,
            };
            let fetched = self.registries.http.follow(redirect_url, request).await?;
            // CDNs answer a request for an expired URL with one of these statuses.
            if !matches!(fetched.response.status().as_u16(), 400 | 401 | 403 | 404 | 410) {
                return self.body(path, &range, entry.size, fetched).await;
            }
            // 2. The URL expired: forget it and let the registry redirect again.
            let status = fetched.response.status().as_u16();
            tracing::debug!(%path, status, "redirect target refused; requesting the layer from the registry");
            self.forget_redirect(blob);
            http::drain(fetched.response).await;
        }
        // 3. Request the layer from the registry.
        let url = registry::url_for(
            &self.registries.base_url(&self.repo)?,
            &format!("v2/{}/blobs/sha256:{blob}", self.repo.repository),
        )?;
        let fetched = self.registries.request(&self.repo, url, headers, false).await?;
        // Only a redirect target is worth remembering.
        if !fetched.is_same_origin && fetched.response.status().is_success() {
            self.remember_redirect(*blob, fetched.url.clone());
        }
        self.body(path, &range, entry.size, fetched).await
    }

    /// Checks a response against the size of the layer and returns the bytes.
    async fn body(&self, path: &FilePath, range: &Range<u64>, size: u64, fetched: FinalResponse) -> Result<Body> {
        let status = fetched.response.status();
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(self.registries.error_of(fetched, &self.repo, &format!("blob for {path}")).await);
        }
        let start = http::body_start(status, fetched.response.headers(), range, Some(size))
            .map_err(|error| Error::new(error.kind(), format!("{path}: {}", error.message())))?;
        Ok(Body { start, stream: http::body_stream(fetched.response, &fetched.url) })
    }

    fn redirect_url(&self, blob: &Digest) -> Option<Url> {
        self.redirects.lock().get(blob).cloned()
    }

    fn remember_redirect(&self, blob: Digest, url: Url) {
        self.redirects.lock().insert(blob, url);
    }

    fn forget_redirect(&self, blob: &Digest) {
        self.redirects.lock().remove(blob);
    }
}

/// Fuzz target for responses of a registry; see `fuzzing`.
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
