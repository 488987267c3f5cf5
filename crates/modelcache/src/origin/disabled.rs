//! A built-in origin whose Cargo feature is disabled in this build.
//!
//! Its references are parsed and its names stay reserved, because other builds may have stored such artifacts in the
//! same directory or on the same remote. From there they are served. Whatever needs the origin fails with the name of
//! the feature.

use super::{Origin, ResolvedSource};
use crate::error::{Error, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::reference::{Reference, Scheme};
use crate::source::{Body, Source};
use async_trait::async_trait;
use std::ops::Range;
use std::sync::Arc;

/// The origin of `scheme`, whose client needs the feature `feature`.
#[derive(Debug, Clone, Copy)]
pub(super) struct DisabledOrigin {
    pub(super) scheme: &'static Scheme,
    pub(super) feature: &'static str,
}

impl DisabledOrigin {
    fn error(self) -> Error {
        Error::invalid(format!("this build has no client for {} references", self.scheme.form))
            .tier(Tier::Origin)
            .hint(format!("build modelcache with the feature {:?}, which is on by default", self.feature))
    }
}

#[async_trait]
impl Origin for DisabledOrigin {
    fn scheme(&self) -> &'static Scheme {
        self.scheme
    }

    async fn resolve(&self, _reference: &Reference) -> Result<Option<ResolvedSource>> {
        Err(self.error())
    }

    fn source(&self, _reference: &Reference, _key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        Some(Arc::new(*self))
    }

    fn listed_source(&self, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        key.name.scheme().filter(|word| self.scheme.words.contains(word)).map(|_| Arc::new(*self) as _)
    }
}

#[async_trait]
impl Source for DisabledOrigin {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        Err(self.error())
    }

    async fn read(&self, _path: &FilePath, _range: Range<u64>) -> Result<Body> {
        Err(self.error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::oci;

    #[tokio::test]
    async fn the_error_names_the_feature() {
        let origin = DisabledOrigin { scheme: &oci::SCHEME, feature: "oci" };
        let reference = Reference::parse("oci://registry.example/team/model:1").expect("parses");
        let error = origin.resolve(&reference).await.expect_err("disabled");
        assert_eq!(error.hint_text(), Some("build modelcache with the feature \"oci\", which is on by default"));
        let [ours, other] = ["oci://registry.example/team/model@sha256:", "mlflow/host/model@"];
        let ours = Reference::parse(&format!("{ours}{}", "0".repeat(64))).expect("parses").exact_key().expect("exact");
        let other = ArtifactKey::listed(&format!("{other}3")).expect("key");
        assert!(origin.listed_source(&ours).is_some() && origin.listed_source(&other).is_none());
    }
}
