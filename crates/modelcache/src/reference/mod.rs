//! References: the names of artifacts on the command line and in the API.
//!
//! This module parses every form; each scheme has a file of its own. A bare `name@version` never refers to a public
//! server, unless an origin is configured for it.

mod bucket;
mod folder;
mod hub;
mod mlflow;
pub(crate) mod oci;
mod web;

pub use bucket::BucketPlace;
pub(crate) use bucket::is_bucket_name;
pub use folder::folder_name;
pub use hub::{HubRepo, RepoKind};
pub use mlflow::{MlflowModel, MlflowVersion};
pub use oci::{OciAt, OciRepo};
pub use web::WebFile;
pub(crate) use web::is_derived;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::redact;
use std::fmt;
use std::str::FromStr;

/// The location that a reference points to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A bare key: on disk, on the remote, or at the configured origin.
    Bare(ArtifactKey),
    /// A repository at the Hugging Face Hub.
    Hub(HubRepo),
    /// A local file or folder, by absolute path.
    Folder(String),
    /// An object in a bucket, or everything below a prefix.
    Bucket(BucketPlace),
    /// One file on a web server.
    Web(WebFile),
    /// A model in an MLflow registry.
    Mlflow(MlflowModel),
    /// A repository in an OCI registry.
    Oci(OciRepo),
}

/// A movable name, such as a branch or tag. It has to be resolved to a version, and may point to another version later.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pointer {
    /// The name of the artifact, which all its versions share.
    pub name: ArtifactName,
    /// The revision: a branch, a tag, an alias.
    pub revision: String,
}

/// The revision of a URL without a version: the server's current content.
const WEB_REVISION: &str = "current";

/// A parsed reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// The location.
    pub target: Target,
    /// The single file that the reference selects, if any.
    pub file: Option<FilePath>,
    /// The required digest: of the file, or of the file list of a tree.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Parses `text`. An error never quotes a password, signature or token in it.
    pub fn parse(text: &str) -> Result<Self> {
        // The secret would become a part of names, listings and logs.
        if redact::has_secret_query(text) && !text.starts_with("http") {
            return Err(Error::invalid(format!("{:?} carries a signature or a token", redact::reference(text)))
                .hint(redact::HINT));
        }
        Self::parse_unredacted(text)
            .map_err(|error| if redacts_its_errors(text) { error } else { redact::refusal(text, error) })
    }

    /// Returns a reference as typed, in a form that may be shown: a valid reference unchanged, any other text with
    /// passwords, signatures and tokens redacted.
    pub fn shown(text: &str) -> String {
        if Self::parse(text).is_ok() { text.to_owned() } else { redact::reference(text) }
    }

    /// Parses `text`. The error may quote secrets in it.
    fn parse_unredacted(text: &str) -> Result<Self> {
        let (body, digest) = split_digest(text)?;
        let reference = match body.split_once("://") {
            Some(("hf", rest)) => hub::parse(rest)?,
            Some(("file", rest)) => Self { target: Target::Folder(folder::parse(rest)?), file: None, digest: None },
            Some(("s3", rest)) => bucket::parse(rest)?,
            Some((scheme @ ("https" | "http"), rest)) => {
                Self { target: Target::Web(web::parse(scheme, rest)?), file: None, digest: None }
            }
            Some(("oci", rest)) => oci::parse(rest)?,
            Some(("models", rest)) => mlflow::parse(&format!("//{rest}"))?,
            None if body.starts_with("models:") => mlflow::parse(&body["models:".len()..])?,
            Some((scheme, _)) => {
                return Err(Error::invalid(format!("{:?}: unknown scheme {scheme:?}", redact::reference(text))).hint(
                    "write name@version, hf://org/model@revision, s3://bucket/prefix, https://host/file or \
                     file:///path",
                ));
            }
            None => Self { target: Target::Bare(ArtifactKey::listed(body)?), file: None, digest: None },
        };
        Ok(Self { digest, ..reference })
    }

    /// Returns the reference at another revision, for `--revision`. Fails if references of this scheme have no
    /// revisions.
    pub fn at_revision(mut self, revision: &str) -> Result<Self> {
        match &mut self.target {
            Target::Hub(repo) => repo.revision = hub::checked_revision(revision)?,
            Target::Mlflow(model) => model.version = mlflow::version(revision)?,
            Target::Oci(repo) => repo.at = oci::at(revision)?,
            Target::Bare(_) | Target::Folder(_) | Target::Bucket(_) | Target::Web(_) => {
                return Err(Error::invalid(format!("{self} has no revisions"))
                    .hint("only hf://, models:/ and oci:// references take --revision"));
            }
        }
        Ok(self)
    }

    /// Returns the key if the reference alone determines it, for example for a bare key or a commit on the Hub.
    pub fn exact_key(&self) -> Option<ArtifactKey> {
        match &self.target {
            Target::Bare(key) => Some(key.clone()),
            Target::Hub(repo) if repo.is_commit() => repo.key_at(&repo.revision).ok(),
            Target::Web(file) => file.key_at(file.version.clone()?).ok(),
            Target::Mlflow(model) => match model.version {
                MlflowVersion::Number(number) => model.key_at(number)?.ok(),
                _ => None,
            },
            Target::Oci(repo) => match &repo.at {
                OciAt::Digest(digest) => repo.key_at(digest).ok(),
                OciAt::Tag(_) => None,
            },
            Target::Hub(_) | Target::Folder(_) | Target::Bucket(_) => None,
        }
    }

    /// Returns the movable name of the reference, or `None` if the reference is exact. A folder has no pointer either:
    /// it is read each time.
    pub fn pointer(&self) -> Option<Pointer> {
        match &self.target {
            Target::Hub(repo) if !repo.is_commit() => {
                Some(Pointer { name: repo.name().ok()?, revision: repo.revision.clone() })
            }
            Target::Bucket(place) => Some(Pointer { name: place.name().ok()?, revision: place.revision().to_owned() }),
            Target::Web(file) if file.version.is_none() => {
                Some(Pointer { name: file.name().ok()?, revision: WEB_REVISION.to_owned() })
            }
            Target::Mlflow(model) => {
                let revision = model.revision()?;
                Some(Pointer { name: model.artifact_name()?.ok()?, revision })
            }
            Target::Oci(repo) => match &repo.at {
                OciAt::Tag(tag) => Some(Pointer { name: repo.name().ok()?, revision: tag.clone() }),
                OciAt::Digest(_) => None,
            },
            Target::Hub(_) | Target::Bare(_) | Target::Folder(_) | Target::Web(_) => None,
        }
    }
}

impl Reference {
    /// Returns the reference pinned to `key`, the version that it resolved to.
    pub fn pinned(&self, key: &ArtifactKey) -> Self {
        let target = match &self.target {
            Target::Hub(repo) => Target::Hub(HubRepo { revision: key.version.as_str().to_owned(), ..repo.clone() }),
            // The current content of these locations has no reference but the bare key.
            Target::Bare(_) | Target::Folder(_) | Target::Bucket(_) | Target::Web(_) => Target::Bare(key.clone()),
            Target::Mlflow(model) => match key.version.as_str().parse() {
                Ok(number) => Target::Mlflow(MlflowModel { version: MlflowVersion::Number(number), ..model.clone() }),
                Err(_) => Target::Bare(key.clone()),
            },
            Target::Oci(repo) => match oci::at(key.version.as_str()) {
                Ok(at) => Target::Oci(OciRepo { at, ..repo.clone() }),
                Err(_) => Target::Bare(key.clone()),
            },
        };
        Self { target, ..self.clone() }
    }

    /// Returns true if this reference can resolve to `version`. Recorded resolutions are checked with this before use,
    /// because other users can write to the record.
    pub fn may_mean(&self, version: &Version) -> bool {
        match &self.target {
            Target::Hub(repo) => repo.key_at(version.as_str()).is_ok(),
            Target::Mlflow(_) => {
                version.as_str().parse::<u64>().is_ok_and(|number| number.to_string() == version.as_str())
            }
            Target::Oci(_) => matches!(oci::at(version.as_str()), Ok(OciAt::Digest(_))),
            Target::Web(_) => is_derived(version),
            Target::Bucket(_) => {
                version.as_str().parse::<Digest>().is_ok_and(|hash| hash.to_string() == version.as_str())
            }
            Target::Bare(_) | Target::Folder(_) => true,
        }
    }

    /// Returns true if the reference points into the local filesystem, so that resolving it needs no network.
    pub fn is_local(&self) -> bool {
        matches!(self.target, Target::Folder(_))
    }
}

/// Returns true if the parser of the scheme redacts its own error messages, with more specific hints.
fn redacts_its_errors(text: &str) -> bool {
    ["http://", "https://", "oci://"].iter().any(|scheme| text.starts_with(scheme))
}

const DIGEST_HINT: &str = "append #sha256= and the 64 hex digits of the expected digest, or leave it out";

/// Splits `#sha256=<hex>` off the end of a reference.
fn split_digest(text: &str) -> Result<(&str, Option<Digest>)> {
    match text.split_once('#') {
        None => Ok((text, None)),
        Some((body, fragment)) => match fragment.strip_prefix("sha256=") {
            Some(hex) => Ok((
                body,
                Some(hex.parse().map_err(|error: Error| error.artifact(redact::reference(text)).hint(DIGEST_HINT))?),
            )),
            None => Err(Error::invalid(format!(
                "{:?}: after '#' only sha256=<64 hex digits> is supported",
                redact::reference(text)
            ))
            .hint(DIGEST_HINT)),
        },
    }
}

impl TryFrom<&str> for Reference {
    type Error = Error;

    fn try_from(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Reference {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl TryFrom<&Reference> for Reference {
    type Error = Error;

    fn try_from(reference: &Reference) -> Result<Self> {
        Ok(reference.clone())
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Bare(key) => write!(f, "{key}")?,
            Target::Hub(repo) => write!(f, "{repo}")?,
            Target::Folder(path) => write!(f, "file://{}", encoded(path))?,
            Target::Bucket(place) => write!(f, "{place}")?,
            Target::Web(file) => write!(f, "{file}")?,
            Target::Mlflow(model) => write!(f, "{model}")?,
            Target::Oci(repo) => write!(f, "{repo}")?,
        }
        if let Some(file) = &self.file {
            write!(f, "/{}", encoded(file.as_str()))?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "#sha256={digest}")?;
        }
        Ok(())
    }
}

/// Escapes `%` and `#` in a path, which a reference would read as an encoding or as the start of a digest.
fn encoded(path: &str) -> String {
    path.replace('%', "%25").replace('#', "%23")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hub(text: &str) -> (RepoKind, String, String, Option<String>) {
        let reference = Reference::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        match reference.target {
            Target::Hub(repo) => (repo.kind, repo.id, repo.revision, reference.file.map(String::from)),
            other => panic!("{text} is {other:?}"),
        }
    }

    #[test]
    fn hub_references_parse_in_every_documented_form() {
        use RepoKind::*;
        let row = |kind, id: &str, revision: &str, file: Option<&str>| {
            (kind, id.to_owned(), revision.to_owned(), file.map(str::to_owned))
        };
        assert_eq!(hub("hf://org/model"), row(Model, "org/model", "main", None));
        assert_eq!(hub("hf://gpt2"), row(Model, "gpt2", "main", None));
        assert_eq!(hub("hf://org/model@v1"), row(Model, "org/model", "v1", None));
        assert_eq!(hub("hf://org/model:v1"), row(Model, "org/model", "v1", None));
        assert_eq!(hub("hf://org/model@v1/sub dir/f%C3%A9.txt"), row(Model, "org/model", "v1", Some("sub dir/fé.txt")));
        assert_eq!(hub("hf://org/model@refs/pr/1"), row(Model, "org/model", "refs/pr/1", None));
        assert_eq!(hub("hf://org/model@refs%2Fpr%2F1/a.bin"), row(Model, "org/model", "refs/pr/1", Some("a.bin")));
        assert_eq!(hub("hf://org/model@refs/pr/1/a.bin"), row(Model, "org/model", "refs/pr/1", Some("a.bin")));
        assert_eq!(hub("hf://datasets/org/name@main"), row(Dataset, "org/name", "main", None));
        assert_eq!(hub("hf://spaces/org/name"), row(Space, "org/name", "main", None));
    }

    #[test]
    fn a_commit_is_an_exact_key_and_a_branch_is_not() {
        let commit = "AB".repeat(20);
        let key = Reference::parse(&format!("hf://org/model@{commit}")).expect("parses").exact_key().expect("exact");
        assert_eq!(key.name.as_str(), "hf/org/model");
        assert_eq!(key.version.as_str(), commit.to_lowercase());
        assert!(Reference::parse("hf://org/model").expect("parses").exact_key().is_none());
    }

    #[test]
    fn bare_keys_split_at_the_last_at_and_have_no_default_origin() {
        let reference = Reference::parse("team/fraud@3").expect("parses");
        assert_eq!(reference.exact_key().map(|key| key.to_string()), Some("team/fraud@3".into()));
        for bad in ["fraud", "@3", "fraud@", "hf/org/model@3", "a@b@c", "oci/r/m@1"] {
            assert!(Reference::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_required_digest_is_split_off() {
        let digest = Digest::of(b"x");
        assert_eq!(Reference::parse(&format!("a@1#sha256={digest}")).expect("parses").digest, Some(digest));
        assert!(Reference::parse("a@1#md5=00").is_err());
        assert!(Reference::parse("a@1#sha256=00").is_err());
    }

    #[test]
    fn an_unknown_scheme_is_refused() {
        let error = Reference::parse("ftp://x/y").expect_err("no such scheme");
        assert!(error.message().contains("unknown scheme"), "{error}");
    }

    #[test]
    fn folders_are_absolute_and_have_no_parent_segments() {
        assert_eq!(
            Reference::parse("file:///models//a/./b/").expect("parses").target,
            Target::Folder("/models/a/b".into())
        );
        for bad in ["file://relative", "file:///", "file:///a/../b", "file:///a/%2e%2e/b"] {
            assert!(Reference::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn invalid_repositories_and_revisions_are_refused() {
        for bad in [
            "hf://",
            "hf://../x",
            "hf://a/..",
            "hf://a/b/c",
            "hf://a/b@",
            "hf://a/b@..",
            "hf://a/b@x/../y",
            "hf://a b/c",
            "hf://a/b@v1/..%2f..%2fetc",
            "hf://a/b@x y",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_parses_prints_to_itself(text in "(hf://|file:///|s3://|models:/|oci://|)[a-z/@:#%2fF.=é ]{0,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()).expect("prints what parses"), reference);
            }
        }
    }
}
