//! Origins: the authorities that resolve references and serve bytes. Read-only.
//!
//! # Contract
//! [`Origins::resolve`] asks an authority what a reference means now and gives the key together with a
//! [`Source`] bound to it; [`Origins::source`] gives a source for an exact key and asks nobody. What a source promises
//! stands in [`source`](crate::source); every origin passes its conformance suite.
//!
//! - A reference to nothing is `None` where there is nothing more to say (a path that is not there), and
//!   [`NotFound`](crate::ErrorKind::NotFound) where there is: which of repository and revision is missing, and what to
//!   check.
//! - An origin that lists no files has no artifact: `NotFound`, and nothing is kept.
//! - Credentials go to the scheme, host and port that they were configured for, on no redirect elsewhere.
//! - Nothing is connected, and no certificate read, before the first request.
//!
//! A bare key belongs to no origin. Whoever wants one from an origin applies an
//! [`OriginTemplate`](crate::config::OriginTemplate) first; the source then speaks of the key of that origin.

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

/// The authorities that resolve references and serve bytes. One per cache; cheap to clone.
#[derive(Debug, Clone)]
pub struct Origins {
    hub: Arc<hub::Hub>,
    buckets: Arc<bucket::Buckets>,
    web: Arc<web::Web>,
    mlflow: Arc<mlflow::Mlflow>,
    registries: Arc<oci::Registries>,
    retry: Retry,
}

/// The error for an artifact whose origin lists no file. Nothing of it is kept: an origin that errs (a broken proxy, a
/// folder that is not mounted) looks the same.
fn no_files(what: impl Into<String>) -> Error {
    Error::not_found(what)
}

/// What a reference pointed to when it was asked.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The key, in the words of the origin.
    pub key: ArtifactKey,
    /// Where to read it.
    pub source: Arc<dyn Source>,
}

impl Origins {
    /// The origins of a configuration. Connects to nothing.
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

    /// The same with credentials for web servers.
    #[must_use]
    pub fn with_credentials(self, credentials: Credentials) -> Self {
        Self { web: Arc::new(web::Web::new(credentials, self.retry.clone())), ..self }
    }

    /// With an MLflow server.
    #[must_use]
    pub fn with_mlflow(self, config: MlflowConfig) -> Self {
        Self { mlflow: Arc::new(mlflow::Mlflow::new(config, self.retry.clone())), ..self }
    }

    /// With what is configured for OCI registries, which can be asked without, too.
    #[must_use]
    pub fn with_oci(self, config: OciConfig) -> Self {
        Self { registries: Arc::new(oci::Registries::new(config, self.retry.clone())), ..self }
    }

    /// The reference with what the configuration adds to it: the MLflow server, which is part of its key.
    pub fn placed(&self, reference: &Reference) -> Reference {
        let mut reference = reference.clone();
        if let Target::Mlflow(model) = &mut reference.target {
            model.server = self.mlflow.server();
        }
        reference
    }

    /// What the reference points to right now.
    ///
    /// `None`: there is no such file or folder, or the key is bare. A commit at the Hub is taken at its word: whether
    /// it exists shows when its manifest is asked for.
    ///
    /// # Errors
    /// `NotFound` for a missing repository, revision or object, `Unauthorized` for credentials that are missing or refused and
    /// for gated repositories, `Unavailable` after retries, `Invalid` for a folder that cannot be an artifact,
    /// `Corrupt` for an answer that contradicts itself.
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

    /// A source for `reference`, once it is known to mean `key`; asks nobody.
    ///
    /// `None` if the key belongs to no origin, and for files and folders: only resolving can tell whether they are
    /// still what the version says.
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
