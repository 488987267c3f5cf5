//! References: what a person types to name an artifact.
//!
//! Every form of the interface is understood here, each scheme in its own file. A bare `name@version` never implies a
//! public place.

mod bucket;
mod folder;
mod hub;
mod mlflow;
pub(crate) mod oci;
mod web;

pub use bucket::BucketPlace;
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

/// What kind of place a reference points into.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A bare key: found on disk or the remote, else at the configured origin.
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

/// A movable name that a reference goes through: what it means has to be asked, and may be another version tomorrow.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pointer {
    /// The artifact's name, the same at every version.
    pub name: ArtifactName,
    /// The revision: a branch, a tag, an alias.
    pub revision: String,
}

/// The revision of a web address without a version: what the server has now.
const WEB_REVISION: &str = "current";

/// What a person typed, understood.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Where it points.
    pub target: Target,
    /// The one file it selects, if it does.
    pub file: Option<FilePath>,
    /// The digest it demands: of the file, or of the file list for a tree.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Understands `text`, or says why not, without repeating a password, a signature or a token in it.
    pub fn parse(text: &str) -> Result<Self> {
        // Names, listings and logs would keep it.
        if redact::has_secret_query(text) && !text.starts_with("http") {
            return Err(Error::invalid(format!("{:?} carries a signature or a token", redact::reference(text)))
                .hint(redact::HINT));
        }
        Self::understand(text).map_err(|error| if is_careful(text) { error } else { redact::refusal(text, error) })
    }

    /// `text`, a reference as it was typed, as it may be shown: one that is understood as it is, any other one without
    /// passwords, signatures and tokens.
    pub fn shown(text: &str) -> String {
        if Self::parse(text).is_ok() { text.to_owned() } else { redact::reference(text) }
    }

    fn understand(text: &str) -> Result<Self> {
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
                return Err(Error::invalid(format!("{:?}: no origin is called {scheme:?}", redact::reference(text)))
                    .hint("write name@version, hf://org/model@revision, s3://bucket/prefix, https://host/file or file:///path"));
            }
            None => Self { target: Target::Bare(ArtifactKey::listed(body)?), file: None, digest: None },
        };
        Ok(Self { digest, ..reference })
    }

    /// The same reference at another revision: what `--revision` means. Refused where there is none.
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

    /// The key, when the reference alone decides it: a bare key, or a commit at the Hub.
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

    /// The pointer that it goes through, where it has one. A folder has none: it is looked at each time.
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
    /// The same reference at the version that it was found to mean: it leads to `key` from now on.
    pub fn pinned(&self, key: &ArtifactKey) -> Self {
        let target = match &self.target {
            Target::Hub(repo) => Target::Hub(HubRepo { revision: key.version.as_str().to_owned(), ..repo.clone() }),
            // What a place holds now is named as it is listed.
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

    /// Whether `version` can be what this leads to: what somebody else wrote down is not taken at its word.
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

    /// Whether it leads into this machine's own filesystem, so that following it asks nobody.
    pub fn is_local(&self) -> bool {
        matches!(self.target, Target::Folder(_))
    }
}

/// Whether the parser of this scheme repeats nothing that may be secret, and has a better hint.
fn is_careful(text: &str) -> bool {
    ["http://", "https://", "oci://"].iter().any(|scheme| text.starts_with(scheme))
}

const DIGEST_HINT: &str = "append #sha256= and the digest that the content must have, or nothing";

/// Takes `#sha256=<hex>` off the end.
fn split_digest(text: &str) -> Result<(&str, Option<Digest>)> {
    match text.split_once('#') {
        None => Ok((text, None)),
        Some((body, fragment)) => match fragment.strip_prefix("sha256=") {
            Some(hex) => Ok((
                body,
                Some(hex.parse().map_err(|error: Error| error.artifact(redact::reference(text)).hint(DIGEST_HINT))?),
            )),
            None => Err(Error::invalid(format!(
                "{:?}: after '#' only sha256=<64 hex digits> is understood",
                redact::reference(text)
            ))
            .hint(DIGEST_HINT)),
        },
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

/// A path in which nothing is read as something else: not the sign of an encoding, not the beginning of a digest.
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
    fn a_demanded_digest_is_taken_off() {
        let digest = Digest::of(b"x");
        assert_eq!(Reference::parse(&format!("a@1#sha256={digest}")).expect("parses").digest, Some(digest));
        assert!(Reference::parse("a@1#md5=00").is_err());
        assert!(Reference::parse("a@1#sha256=00").is_err());
    }

    #[test]
    fn a_scheme_that_is_no_origin_says_so() {
        let error = Reference::parse("ftp://x/y").expect_err("no such scheme");
        assert!(error.message().contains("no origin is called"), "{error}");
    }

    #[test]
    fn folders_are_absolute_and_do_not_climb() {
        assert_eq!(
            Reference::parse("file:///models//a/./b/").expect("parses").target,
            Target::Folder("/models/a/b".into())
        );
        for bad in ["file://relative", "file:///", "file:///a/../b", "file:///a/%2e%2e/b"] {
            assert!(Reference::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn climbing_or_odd_repositories_and_revisions_are_refused() {
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
