//! The properties of a location that are known without contacting its origin. Each kind of location implements
//! [`Location`].

use super::{Pointer, Scheme, Target};
use crate::error::Result;
use crate::key::{ArtifactKey, Version};
use std::fmt;

/// The location of a reference. Its `Display` form is the reference without file and digest.
pub(super) trait Location: fmt::Display {
    /// Returns the scheme; `None` for a bare key.
    fn scheme(&self) -> Option<&'static Scheme>;

    /// Returns the key if the location alone determines it.
    fn exact_key(&self) -> Option<ArtifactKey>;

    /// Returns the movable name, or `None` if the location is exact or is read each time, like a folder.
    fn pointer(&self) -> Option<Pointer>;

    /// Returns the location at another revision, or `None` if locations of this kind have no revisions.
    fn at_revision(&self, _revision: &str) -> Result<Option<Target>> {
        Ok(None)
    }

    /// Returns the location of `key`, the version that this location resolved to. The default is the bare key, for
    /// locations whose own references cannot name a version.
    fn at_key(&self, key: &ArtifactKey) -> Target {
        Target::Bare(key.clone())
    }

    /// Returns the location with a version that the caller chooses, or `None` if its origin determines the version.
    fn with_version(&self, _version: &Version) -> Option<Target> {
        None
    }

    /// Returns true if the location can resolve to `version`.
    fn can_resolve_to(&self, _version: &Version) -> bool {
        true
    }
}

/// A bare key.
impl Location for ArtifactKey {
    fn scheme(&self) -> Option<&'static Scheme> {
        None
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        Some(self.clone())
    }

    fn pointer(&self) -> Option<Pointer> {
        None
    }
}
