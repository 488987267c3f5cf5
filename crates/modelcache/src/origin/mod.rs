//! Origins: the authoritative services that resolve references and serve files. Read-only.
//!
//! # Contract
//! [`Origins::resolve`] requests the version that a reference points to now, and returns its key with a [`Source`]
//! bound to it. [`Origins::source`] returns a source for a known key and sends no request. Every source fulfils the
//! contract in [`source`](crate::source) and passes its conformance suite.
//!
//! - An origin that lists no files has no artifact: `NotFound`, and nothing is stored.
//! - Credentials are sent only to the scheme, host and port that they were configured for, not to redirect targets.
//! - No connection is made and no certificate is read before the first request.

mod authorization;
mod bucket;
mod doctor;
mod folder;
mod http;
mod hub;
mod mlflow;
mod oci;
mod web;

pub(crate) use doctor::examine;
#[cfg(fuzzing)]
pub(crate) use {hub::fuzz as fuzz_hub, oci::fuzz as fuzz_oci};

use crate::config::{BucketConfig, HubConfig, MlflowConfig, OciConfig};
use crate::credentials::Credentials;
use crate::error::{Context as _, Error, Result, Tier};
use crate::key::ArtifactKey;
use crate::reference::{Reference, Target};
use crate::source::Source;
use crate::transfer::Retry;
use std::sync::Arc;

/// All origins of a cache. There is one per cache; cloning is cheap.
#[derive(Debug, Clone)]
pub struct Origins {
    hub: Arc<hub::Hub>,
    buckets: Arc<bucket::Buckets>,
    web: Arc<web::Web>,
    mlflow: Arc<mlflow::Mlflow>,
    registries: Arc<oci::Registries>,
    retry: Retry,
}

/// Returns the error for an artifact without files. Nothing is stored for it, because a faulty origin (a broken proxy,
/// a folder that is not mounted) looks the same.
fn no_files(what: impl Into<String>) -> Error {
    Error::not_found(what)
}

/// The result of resolving a reference.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The key of the artifact at the origin.
    pub key: ArtifactKey,
    /// The source to read the artifact from.
    pub source: Arc<dyn Source>,
}

impl Origins {
    /// Creates the origins of a configuration. Sends no request.
    pub fn new(hub: HubConfig, buckets: BucketConfig, retry: Retry) -> Self {
        Self {
            hub: Arc::new(hub::Hub::new(hub, retry.clone())),
            buckets: Arc::new(bucket::Buckets::new(buckets, retry.clone())),
            web: Arc::new(web::Web::new(Credentials::default(), retry.clone())),
            mlflow: Arc::new(mlflow::Mlflow::new(MlflowConfig::default(), retry.clone())),
            registries: Arc::new(oci::Registries::new(OciConfig::default(), retry.clone())),
            retry,
        }
    }

    /// Sets the credentials for web servers.
    #[must_use]
    pub fn with_credentials(self, credentials: Credentials) -> Self {
        Self { web: Arc::new(web::Web::new(credentials, self.retry.clone())), ..self }
    }

    /// Sets the MLflow servers.
    #[must_use]
    pub fn with_mlflow(self, config: MlflowConfig) -> Self {
        Self { mlflow: Arc::new(mlflow::Mlflow::new(config, self.retry.clone())), ..self }
    }

    /// Sets the configuration for OCI registries. Registries can be used without it, too, anonymously.
    #[must_use]
    pub fn with_oci(self, config: OciConfig) -> Self {
        Self { registries: Arc::new(oci::Registries::new(config, self.retry.clone())), ..self }
    }

    /// Returns `reference` completed from the configuration: an MLflow reference gets its server, which is part of its
    /// key.
    pub fn placed(&self, reference: &Reference) -> Reference {
        let mut reference = reference.clone();
        if let Target::Mlflow(model) = &mut reference.target {
            model.server = self.mlflow.server();
        }
        reference
    }

    /// Resolves `reference` to the version that it points to now.
    ///
    /// Returns `None` if there is no such file or folder, or if the key is bare: a bare key belongs to no origin until
    /// an [`OriginTemplate`](crate::config::OriginTemplate) is applied. A commit of the Hub is not checked here; a
    /// missing one is noticed when its manifest is read.
    ///
    /// # Errors
    /// `NotFound` for a missing repository, revision or object, `Unauthorized` for credentials that are missing or
    /// refused and for gated repositories, `Unavailable` after retries, `Invalid` for a folder that cannot be an
    /// artifact, `Corrupt` for a response that contradicts itself.
    pub async fn resolve(&self, reference: &Reference) -> Result<Option<Resolved>> {
        match &reference.target {
            Target::Bare(_) => Ok(None),
            Target::Hub(repo) => hub::resolve(&self.hub, repo).await.context(reference, Tier::Origin).map(Some),
            Target::Folder(path) => folder::resolve(path).await.context(reference, Tier::Origin),
            Target::Bucket(place) => {
                bucket::resolve(&self.buckets, place).await.context(reference, Tier::Origin).map(Some)
            }
            Target::Web(file) => {
                let demanded = reference.digest.is_some();
                web::resolve(&self.web, file, demanded).await.context(reference, Tier::Origin).map(Some)
            }
            Target::Mlflow(model) => {
                mlflow::resolve(&self.mlflow, model).await.context(reference, Tier::Origin).map(Some)
            }
            Target::Oci(repo) => oci::resolve(&self.registries, repo).await.context(reference, Tier::Origin).map(Some),
        }
    }

    /// Returns a source for `reference`, which resolved to `key` before. Sends no request.
    ///
    /// Returns `None` if the key belongs to no origin, and for local files and folders: they must be resolved again to
    /// find out whether they still have that version.
    pub fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        match &reference.target {
            Target::Hub(repo) => Some(hub::source(&self.hub, repo, key)),
            Target::Bucket(place) => Some(bucket::source(&self.buckets, place, key)),
            Target::Web(file) => web::source(&self.web, file, key, reference.digest.is_some()),
            Target::Mlflow(model) => Some(mlflow::source(&self.mlflow, &model.name, key)),
            Target::Oci(repo) => oci::source(&self.registries, repo, key),
            Target::Bare(_) => mlflow::listed_source(&self.mlflow, key),
            Target::Folder(_) => None,
        }
    }
}
