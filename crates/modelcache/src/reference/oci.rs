//! References to an OCI registry: `oci://registry[:port]/repository:tag`, `oci://…@sha256:<hex>`.
//!
//! Parsed as docker does: the default tag is `latest`, and a digest overrides a tag. Nothing is percent-decoded,
//! because no part may contain a character that needs encoding.

use super::location::Location;
use super::{Pointer, Reference, Scheme, Target};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::redact;
use std::fmt;

/// The name of Docker Hub in keys.
const DOCKER_HUB: &str = "docker.io";
/// Other hosts of Docker Hub. In references they mean [`DOCKER_HUB`].
const DOCKER_HUB_ALIASES: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];
/// Longest tag, in bytes (<https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests>).
const TAG_BYTES_MAX: usize = 128;

/// The scheme of OCI registries.
pub(crate) static SCHEME: Scheme = Scheme {
    has_revisions: true,
    redacts_errors: true,
    prints_keys_as_uri: true,
    ..Scheme::built_in("oci://", &["oci"], "oci://host/repository[:tag]", parse)
};

/// A repository in a registry, at a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OciRepo {
    /// Host and optional port of the registry, in lower case.
    pub registry: String,
    /// The repository: one or more segments.
    pub repository: String,
    /// The selector of the manifest.
    pub at: OciAt,
}

/// The selector of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum OciAt {
    /// A tag, which may move.
    Tag(String),
    /// The digest of the manifest's bytes.
    Digest(Digest),
}

impl OciRepo {
    /// Returns the artifact name: `oci/`, the registry, the repository.
    pub fn name(&self) -> Result<ArtifactName> {
        ArtifactName::from_uri("oci", [self.registry.as_str()].into_iter().chain(self.repository.split('/')))
    }

    /// Returns the key of the manifest with `digest`.
    pub fn key_at(&self, digest: &Digest) -> Result<ArtifactKey> {
        Ok(ArtifactKey::new(self.name()?, Version::new(&format!("sha256:{digest}"))?))
    }
}

impl Location for OciRepo {
    fn scheme(&self) -> Option<&'static Scheme> {
        Some(&SCHEME)
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        match &self.at {
            OciAt::Digest(digest) => self.key_at(digest).ok(),
            OciAt::Tag(_) => None,
        }
    }

    fn pointer(&self) -> Option<Pointer> {
        match &self.at {
            OciAt::Tag(tag) => Some(Pointer { name: self.name().ok()?, revision: tag.clone() }),
            OciAt::Digest(_) => None,
        }
    }

    fn at_revision(&self, revision: &str) -> Result<Option<Target>> {
        Ok(Some(Target::Oci(Self { at: parse_at(revision)?, ..self.clone() })))
    }

    fn at_key(&self, key: &ArtifactKey) -> Target {
        match parse_at(key.version.as_str()) {
            Ok(at) => Target::Oci(Self { at, ..self.clone() }),
            Err(_) => Target::Bare(key.clone()),
        }
    }

    fn can_resolve_to(&self, version: &Version) -> bool {
        matches!(parse_at(version.as_str()), Ok(OciAt::Digest(_)))
    }
}

/// Formats as a reference.
impl fmt::Display for OciRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci://{}/{}{}", self.registry, self.repository, self.at)
    }
}

/// Formats as the suffix of a repository: `:tag`, `@sha256:<hex>`.
impl fmt::Display for OciAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => write!(f, ":{tag}"),
            Self::Digest(digest) => write!(f, "@sha256:{digest}"),
        }
    }
}

/// Parses the text after `oci://`: `registry[:port]/repository[:tag][@sha256:hex]`.
fn parse(_prefix: &str, rest: &str) -> Result<Reference> {
    let refuse = |why: &str| {
        Error::invalid(format!("{}: {why}", redact::reference(&format!("oci://{rest}"))))
            .hint("write oci://registry/repository:tag or oci://registry/repository@sha256:<hex>")
    };
    let (registry, path) = rest.split_once('/').ok_or_else(|| refuse("it names no repository"))?;
    if registry.contains('@') {
        // The text is not quoted, because a password may precede the `@`.
        return Err(Error::invalid("an oci:// reference carries credentials")
            .hint("leave them out; modelcache uses the credentials that `docker login REGISTRY` stores"));
    }
    let registry = checked_registry(registry).ok_or_else(|| refuse("the registry is not a valid host"))?;
    let (path, digest) = match path.split_once('@') {
        Some((path, digest)) => (path, Some(parse_digest(digest)?)),
        None => (path, None),
    };
    let (repository, tag) = path.split_once(':').unwrap_or((path, "latest"));
    let repository = match (registry.as_str(), repository.contains('/')) {
        (DOCKER_HUB, false) => format!("library/{repository}"),
        _ => repository.to_owned(),
    };
    if !repository.split('/').all(is_repository_segment) {
        return Err(refuse("not a valid repository name: only lower-case letters, digits and . _ - are allowed"));
    }
    let tag = checked_tag(tag)?;
    let repo = OciRepo { registry, repository, at: digest.map_or(OciAt::Tag(tag), OciAt::Digest) };
    repo.name()?;
    Ok(Reference { target: Target::Oci(repo), file: None, digest: None })
}

/// Parses the argument of `--revision` or the version of a key: a tag, or `sha256:<hex>`.
fn parse_at(text: &str) -> Result<OciAt> {
    if text.contains(':') { parse_digest(text).map(OciAt::Digest) } else { checked_tag(text).map(OciAt::Tag) }
}

/// Parses `sha256:<64 hex digits>`. Other algorithms are refused.
pub(crate) fn parse_digest(text: &str) -> Result<Digest> {
    match text.split_once(':') {
        Some(("sha256", hex)) => {
            hex.parse().map_err(|error: Error| error.hint("copy the whole digest: sha256: and 64 hex digits"))
        }
        Some((algorithm, _)) => Err(Error::invalid(format!("the digest algorithm {algorithm:?} is not supported"))
            .hint("only sha256 is supported; push the artifact again with sha256 digests, the default of most tools")),
        None => Err(Error::invalid(format!("{text:?} is not a digest")).hint("write sha256: and 64 hex digits")),
    }
}

/// Returns host and port in lower case, or `None` if `text` is not a valid host. The aliases of Docker Hub become
/// `docker.io`.
pub(crate) fn checked_registry(text: &str) -> Option<String> {
    let text = text.to_ascii_lowercase();
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    let url = url::Url::parse(&format!("http://{text}/")).ok()?;
    if text.is_empty() || !text.chars().all(is_allowed) || text.ends_with(':') || url.host().is_none() {
        return None;
    }
    Some(if DOCKER_HUB_ALIASES.contains(&text.as_str()) { DOCKER_HUB.into() } else { text })
}

/// Returns true if the segment has lower-case letters and digits, with `.`, `_` and `-` between them.
fn is_repository_segment(segment: &str) -> bool {
    let is_alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_end = |byte: Option<u8>| byte.is_some_and(is_alphanumeric);
    let is_allowed = |byte: u8| is_alphanumeric(byte) || matches!(byte, b'.' | b'_' | b'-');
    is_end(segment.bytes().next()) && is_end(segment.bytes().last()) && segment.bytes().all(is_allowed)
}

/// Returns the tag, or an error if it is not valid.
fn checked_tag(tag: &str) -> Result<String> {
    let is_first = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let is_allowed = |byte: u8| is_first(byte) || matches!(byte, b'.' | b'-');
    let is_valid =
        tag.len() <= TAG_BYTES_MAX && tag.bytes().next().is_some_and(is_first) && tag.bytes().all(is_allowed);
    if !is_valid {
        return Err(Error::invalid(format!("{tag:?} is not a valid tag"))
            .hint("a tag has at most 128 letters, digits and . _ -"));
    }
    Ok(tag.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(text: &str) -> OciRepo {
        match Reference::parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).target {
            Target::Oci(repo) => repo,
            other => panic!("{text} is {other:?}"),
        }
    }

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn every_documented_form_parses() {
        for (text, printed) in [
            ("oci://r.example/m:v1".to_owned(), "oci://r.example/m:v1".to_owned()),
            ("oci://r.example:5000/team/m".into(), "oci://r.example:5000/team/m:latest".into()),
            ("oci://[::1]:5000/m:1".into(), "oci://[::1]:5000/m:1".into()),
            ("oci://R.Example/a/b/c_d.e-f:_X.1".into(), "oci://r.example/a/b/c_d.e-f:_X.1".into()),
            (format!("oci://r/m@sha256:{HEX}"), format!("oci://r/m@sha256:{HEX}")),
            (format!("oci://r/m:v1@sha256:{HEX}"), format!("oci://r/m@sha256:{HEX}")),
            ("oci://docker.io/busybox:1".into(), "oci://docker.io/library/busybox:1".into()),
            ("oci://index.docker.io/a/b:1".into(), "oci://docker.io/a/b:1".into()),
        ] {
            assert_eq!(repo(&text).to_string(), printed);
            assert_eq!(repo(&printed), repo(&text), "the printed form parses to the same reference");
        }
    }

    #[test]
    fn a_digest_is_an_exact_key_that_prints_as_its_uri() {
        let text = format!("oci://r.example:5000/team/m@sha256:{HEX}");
        let key = Reference::parse(&text).expect("parses").exact_key().expect("exact");
        assert_eq!(key.name.as_str(), "oci/r.example:5000/team/m");
        assert_eq!(key.version.as_str(), format!("sha256:{HEX}"));
        assert_eq!(key.to_string(), text);
        let pointer = Reference::parse("oci://r/m:v1").expect("parses").pointer().expect("a pointer");
        assert_eq!((pointer.name.as_str(), pointer.revision.as_str()), ("oci/r/m", "v1"));
    }

    #[test]
    fn invalid_references_are_refused() {
        for bad in [
            "oci://",
            "oci://r",
            "oci://r/",
            "oci:///m",
            "oci://r/Model:1",
            "oci://r/../x:1",
            "oci://r/a//b:1",
            "oci://r/-a:1",
            "oci://r/a:",
            "oci://r/a:b:c",
            "oci://r/a:.b",
            "oci://r/a%2fb:1",
            "oci://r/a?x:1",
            "oci://r:/a:1",
            "oci://r:x/a:1",
            "oci://r/a@sha256:12",
            "oci://r/a@",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad} was accepted");
        }
        assert!(Reference::parse(&format!("oci://r/a:{}", "t".repeat(129))).is_err());
        let error = Reference::parse(&format!("oci://r/a@sha512:{HEX}{HEX}")).expect_err("sha512");
        assert!(error.to_string().contains("sha512"), "{error}");
        let error = Reference::parse("oci://user:canary@r/a:1").expect_err("a password");
        assert!(!format!("{error:?}").contains("canary"), "{error}");
    }
}
