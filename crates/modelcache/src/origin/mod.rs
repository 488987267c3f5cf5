//! Origins: the authoritative services that resolve references and serve files. Read-only.
//!
//! Every origin is an [`Origin`]. `built_in` is the registry of those that come with the library. Parsing, reserved
//! names and help texts use the registry of their schemes, which is in [`reference`](crate::reference). An application
//! adds its own with [`Config::own_origins`].
//!
//! # Contract
//! [`Origins::resolve`] requests the version that a reference points to now, and returns its key with a [`Source`]
//! bound to it. [`Origins::source`] returns a source for a known key and sends no request. Every source fulfils the
//! contract in [`source`](crate::source) and passes its conformance suite.
//!
//! - If an origin lists no files, the artifact does not exist: `NotFound`, and nothing is stored.
//! - Credentials are sent only to the scheme, host and port that they were configured for, and those for http also to
//!   https on the same host. Other redirect targets do not get them.
//! - No connection is made and no certificate is read before the first request.
//!
//! # An application's own origin
//! The program `examples/own_origin.rs` in full. The conformance suite of sources also runs over it.
//!
#![doc = "```"]
#![doc = include_str!("../../examples/own_origin.rs")]
#![doc = "```"]

mod authorization;
mod bucket;
#[cfg(any(test, not(all(feature = "mlflow", feature = "oci"))))]
mod disabled;
mod doctor;
mod folder;
mod http;
mod hub;
mod hub_api;
mod link_local;
#[cfg(feature = "mlflow")]
mod mlflow;
#[cfg(feature = "oci")]
mod oci;
mod web;

pub(crate) use doctor::examine;
pub use hub_api::{HubAnswer, HubApi};
#[cfg(fuzzing)]
pub(crate) use {hub::fuzz as fuzz_hub, oci::fuzz as fuzz_oci};

use crate::check::{Check, Clock};
use crate::config::Config;
use crate::error::{Context as _, Error, Result, Tier};
use crate::key::ArtifactKey;
use crate::reference::{Place, Reference, Scheme, Target, schemes};
use crate::source::Source;
use crate::transfer::Retry;
use async_trait::async_trait;
use std::fmt;
use std::sync::Arc;

/// The registry of built-in origins: one for each of the built-in schemes, in the same order. Sends no request.
fn built_in(config: &Config, retry: &Retry) -> [Arc<dyn Origin>; 6] {
    [
        Arc::new(Arc::new(hub::Hub::new(config, retry.clone()))),
        Arc::new(Arc::new(bucket::Buckets::new(config.buckets.clone(), retry.clone()))),
        #[cfg(feature = "mlflow")]
        Arc::new(Arc::new(mlflow::Mlflow::new(config, retry.clone()))),
        #[cfg(not(feature = "mlflow"))]
        Arc::new(disabled::DisabledOrigin { scheme: &crate::reference::mlflow::SCHEME, feature: "mlflow" }),
        #[cfg(feature = "oci")]
        Arc::new(Arc::new(oci::Registries::new(config, retry.clone()))),
        #[cfg(not(feature = "oci"))]
        Arc::new(disabled::DisabledOrigin { scheme: &crate::reference::oci::SCHEME, feature: "oci" }),
        Arc::new(Arc::new(web::Web::new(config, retry.clone()))),
        Arc::new(folder::Folders),
    ]
}

/// A service that resolves references of one scheme and serves files.
#[async_trait]
pub trait Origin: fmt::Debug + Send + Sync {
    /// Returns the scheme of the references that this origin resolves.
    fn scheme(&self) -> &'static Scheme;

    /// Resolves `reference`, which has the scheme of this origin, to the version that it points to now. Returns
    /// `None` if there is no such file or folder.
    ///
    /// # Errors
    /// As for [`Origins::resolve`].
    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>>;

    /// Returns a source for `reference`, which resolved to `key` before. Sends no request. Returns `None` if the
    /// reference must be resolved again to find out whether the origin still has that version.
    fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>>;

    /// Returns a source for a key without a reference, as in a listing of the cache, if the key belongs to this origin.
    /// Sends no request.
    fn listed_source(&self, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let place = Place::of_key(self.scheme(), key)?;
        self.source(&Reference { target: Target::Own(place), file: None, digest: None }, key)
    }

    /// Completes the target of a reference of this origin with the parts of its key that the configuration states, such
    /// as the server of an MLflow reference. The default adds nothing.
    fn complete(&self, _target: &mut Target) {}

    /// Checks for the doctor whether the origin can be reached. Reports the dates of responses to `clock`. Returns
    /// `None`, the default, if the origin has no check.
    async fn check(&self, _clock: &Clock) -> Result<Option<Check>> {
        Ok(None)
    }
}

/// All origins of a cache. There is one per cache; cloning is cheap.
#[derive(Debug, Clone)]
pub struct Origins(Arc<[Arc<dyn Origin>]>);

/// Returns the error for an artifact without files. Nothing is stored for it, because a faulty origin (a broken proxy,
/// a folder that is not mounted) looks the same.
fn no_files(message: impl Into<String>) -> Error {
    Error::not_found(message)
}

/// The result of resolving a reference.
#[derive(Debug, Clone)]
pub struct ResolvedSource {
    /// The key of the artifact at the origin.
    pub key: ArtifactKey,
    /// The source to read the artifact from.
    pub source: Arc<dyn Source>,
}

impl Origins {
    /// Creates the origins of a configuration: the built-in ones, and the application's own. Sends no request.
    ///
    /// # Errors
    /// `Invalid` if two origins have the same scheme, or if the prefix of a scheme is not a word and `://`.
    pub fn new(config: &Config, retry: Retry) -> Result<Self> {
        for (index, origin) in config.own_origins.iter().enumerate() {
            let scheme = origin.scheme();
            let others = config.own_origins[..index].iter().map(|origin| origin.scheme());
            let is_taken = schemes().chain(others).any(|other| other.split(scheme.prefix).is_some());
            if is_taken || !scheme.is_well_formed() {
                return Err(Error::invalid(format!("{:?} cannot be the prefix of an origin", scheme.prefix))
                    .hint("use a lower-case word and ://, and a word that no other origin has"));
            }
        }
        Ok(Self(built_in(config, &retry).into_iter().chain(config.own_origins.iter().cloned()).collect()))
    }

    /// Parses a reference of any of these origins, or a bare key.
    pub fn parse(&self, text: &str) -> Result<Reference> {
        Reference::parse_with(text, self.0.iter().map(|origin| origin.scheme()))
    }

    /// Returns the origin of `reference`; `None` for a bare key, or if no origin has its scheme.
    fn of(&self, reference: &Reference) -> Option<&dyn Origin> {
        let scheme = reference.scheme()?;
        self.0.iter().map(AsRef::as_ref).find(|origin| origin.scheme() == scheme)
    }

    /// Returns `reference` completed from the configuration: an MLflow reference gets its server, which is part of its
    /// key.
    pub fn completed(&self, reference: &Reference) -> Reference {
        let mut reference = reference.clone();
        if let Some(origin) = self.of(&reference) {
            origin.complete(&mut reference.target);
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
    pub async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        match self.of(reference) {
            Some(origin) => origin.resolve(reference).await.context(reference, Tier::Origin),
            None => Ok(None),
        }
    }

    /// Returns a source for `reference`, which resolved to `key` before. Sends no request.
    ///
    /// Returns `None` if the key belongs to no origin, and for local files and folders: they must be resolved again to
    /// find out whether they still have that version.
    pub fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        match self.of(reference) {
            Some(origin) => origin.source(reference, key),
            None => self.0.iter().find_map(|origin| origin.listed_source(key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RetryConfig;

    #[test]
    fn every_built_in_scheme_has_one_origin() {
        let config = Config::new("/unused");
        let origins = built_in(&config, &Retry::new(RetryConfig::default()));
        assert!(origins.iter().map(|origin| origin.scheme()).eq(schemes()), "{origins:?}");
    }
}
