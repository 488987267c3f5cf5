//! References: the names of artifacts on the command line and in the API.
//!
//! Each kind of location has a file of its own with its [`Scheme`], the parser of its references, and its
//! implementation of the trait `Location`. `SCHEMES` lists the built-in schemes. A bare `name@version` never refers to
//! a public server, unless an origin is configured for it.

pub(crate) mod bucket;
pub(crate) mod folder;
pub(crate) mod hub;
mod location;
pub(crate) mod mlflow;
pub(crate) mod oci;
mod place;
mod scheme;
pub(crate) mod web;

pub use bucket::BucketPlace;
pub(crate) use bucket::{is_bucket_name, not_a_bucket};
pub use folder::{FolderPath, folder_name};
pub use hub::{HubRepo, RepoKind};
pub use mlflow::{MlflowModel, MlflowVersion};
pub use oci::{OciAt, OciRepo};
pub use place::Place;
pub(crate) use scheme::OWN_ORIGIN;
pub use scheme::Scheme;
pub use web::WebFile;
pub(crate) use web::is_derived;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::option_name::call::REVISION;
use crate::redact;
use location::Location;
use std::fmt;
use std::str::FromStr;

/// The registry of built-in schemes, in the order of help texts. Each has an origin in `origin::built_in`.
static SCHEMES: [&Scheme; 6] =
    [&hub::SCHEME, &bucket::SCHEME, &mlflow::SCHEME, &oci::SCHEME, &web::SCHEME, &folder::SCHEME];

/// Returns the built-in schemes.
pub(crate) fn schemes() -> impl Iterator<Item = &'static Scheme> {
    SCHEMES.into_iter()
}

/// Returns the built-in scheme whose artifacts have names that begin with the segment `word`.
pub(crate) fn scheme_of_word(word: &str) -> Option<&'static Scheme> {
    schemes().find(|scheme| scheme.words.contains(&word))
}

/// The location that a reference points to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A bare key: on disk, on the remote, or at the configured origin.
    Bare(ArtifactKey),
    /// A repository at the Hugging Face Hub.
    Hub(HubRepo),
    /// A local file or folder, by absolute path.
    Folder(FolderPath),
    /// An object in a bucket, or everything below a prefix.
    Bucket(BucketPlace),
    /// One file on a web server.
    Web(WebFile),
    /// A model in an MLflow registry.
    Mlflow(MlflowModel),
    /// A repository in an OCI registry.
    Oci(OciRepo),
    /// A location at an application's own origin.
    Own(Place),
}

impl Target {
    /// Returns the location as a trait object.
    fn location(&self) -> &dyn Location {
        match self {
            Self::Bare(key) => key,
            Self::Hub(repo) => repo,
            Self::Folder(path) => path,
            Self::Bucket(place) => place,
            Self::Web(file) => file,
            Self::Mlflow(model) => model,
            Self::Oci(repo) => repo,
            Self::Own(place) => place,
        }
    }
}

/// A movable name, such as a branch or tag. It has to be resolved to a version, and may point to another version later.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pointer {
    /// The name of the artifact, which all its versions share.
    pub name: ArtifactName,
    /// The revision: a branch, a tag, an alias.
    pub revision: String,
}

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
    /// Parses `text`, a bare key or a reference of a built-in scheme. An error never quotes a password, signature or
    /// token in it.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_with(text, schemes())
    }

    /// Parses `text`, a bare key or a reference of one of `schemes`.
    pub(crate) fn parse_with(text: &str, mut schemes: impl Iterator<Item = &'static Scheme>) -> Result<Self> {
        // A secret would become part of names, listings and logs. References to web servers have a check of their own.
        if redact::has_secret_query(text) && !text.starts_with("http") {
            return Err(Error::invalid(format!("{:?} carries a signature or a token", redact::reference(text)))
                .hint(redact::HINT));
        }
        let scheme = schemes.find(|scheme| scheme.split(text).is_some());
        Self::parse_unredacted(text, scheme).map_err(|error| {
            let error = match tidied(text) {
                Some(tidy) => Error::invalid(error.message()).hint(format!("write {tidy}")),
                None => error,
            };
            match scheme {
                Some(scheme) if scheme.redacts_errors => error,
                _ => redact::refusal(text, error),
            }
        })
    }

    /// Returns `text` in a form that may be shown: unchanged if it is a valid reference, otherwise with passwords,
    /// signatures and tokens redacted.
    pub fn shown(text: &str) -> String {
        if Self::parse(text).is_ok() { text.to_owned() } else { redact::reference(text) }
    }

    /// Parses `text`, a reference of `scheme` or a bare key. The error may quote secrets in it.
    fn parse_unredacted(text: &str, scheme: Option<&'static Scheme>) -> Result<Self> {
        // In an object key of a bucket, `#` is a character like any other, unless `#sha256=` begins a digest.
        let has_literal_hash = scheme.is_some_and(|scheme| *scheme == bucket::SCHEME) && !text.contains("#sha256=");
        let (body, digest) = if has_literal_hash { (text, None) } else { split_digest(text)? };
        let reference = match (scheme.and_then(|scheme| Some((scheme, scheme.split(body)?))), body.split_once("://")) {
            (Some((scheme, (prefix, rest))), _) => scheme.parse(prefix, rest)?,
            (None, Some((unknown, _))) => {
                let message = format!("{:?}: unknown scheme {unknown:?}", redact::reference(text));
                return Err(Error::invalid(message).hint(format!("write name@version, {}", forms())));
            }
            // A bare key, or another key as `modelcache ls` prints it.
            (None, None) => Self { target: Target::Bare(ArtifactKey::listed(body)?), file: None, digest: None },
        };
        Ok(Self { digest, ..reference })
    }

    /// Returns the reference at another revision, for `--revision`. Fails if references of this scheme have no
    /// revisions.
    pub fn at_revision(mut self, revision: &str) -> Result<Self> {
        let Some(target) = self.target.location().at_revision(revision)? else {
            let prefixes: Vec<_> =
                schemes().filter(|scheme| scheme.has_revisions).map(|scheme| scheme.prefix).collect();
            return Err(Error::invalid(format!("{self} has no revisions"))
                .hint(format!("only {} references take {REVISION}", prefixes.join(", "))));
        };
        self.target = target;
        Ok(self)
    }

    /// Returns the scheme, or `None` for a bare key.
    pub fn scheme(&self) -> Option<&'static Scheme> {
        self.target.location().scheme()
    }

    /// Returns the location at an application's own origin, or `None` if the reference points elsewhere.
    pub fn place(&self) -> Option<&Place> {
        match &self.target {
            Target::Own(place) => Some(place),
            _ => None,
        }
    }

    /// Returns the key if the reference alone determines it, for example for a bare key or a commit on the Hub.
    pub fn exact_key(&self) -> Option<ArtifactKey> {
        self.target.location().exact_key()
    }

    /// Returns the movable name of the reference, or `None` if the reference is exact. Also `None` for a local folder,
    /// because its version depends on its present content.
    pub fn pointer(&self) -> Option<Pointer> {
        self.target.location().pointer()
    }

    /// Returns the reference of `key`, the version that this reference resolved to.
    pub fn at_key(&self, key: &ArtifactKey) -> Self {
        Self { target: self.target.location().at_key(key), ..self.clone() }
    }

    /// Returns the reference with a version that the caller chooses. Unchanged if the origin determines the version.
    pub(crate) fn with_version(self, version: &Version) -> Self {
        Self { target: self.target.location().with_version(version).unwrap_or(self.target), ..self }
    }

    /// Returns true if this reference can resolve to `version`. Recorded resolutions are checked with this before use,
    /// because other users can write to the record.
    pub fn can_resolve_to(&self, version: &Version) -> bool {
        self.target.location().can_resolve_to(version)
    }

    /// Returns true if the reference points into the local filesystem, so that resolving it needs no network.
    pub fn is_local(&self) -> bool {
        matches!(self.target, Target::Folder(_))
    }
}

/// Returns the forms of references of the built-in schemes, for help texts and hints.
pub fn forms() -> String {
    schemes().map(|scheme| scheme.form).collect::<Vec<_>>().join(", ")
}

/// Returns the reference that was probably meant: without the white space and quotes around it that come with a pasted
/// text, and with the scheme in lower case. `None` if that is no valid reference either.
fn tidied(text: &str) -> Option<String> {
    let is_around = |c: char| {
        c.is_whitespace() || matches!(c, '"' | '\'' | '`' | '“' | '”' | '‘' | '’' | '<' | '>' | '\u{200b}' | '\u{feff}')
    };
    let trimmed = text.trim_matches(is_around);
    let tidy = match trimmed.split_once("://") {
        Some((scheme, rest)) => format!("{}://{rest}", scheme.to_ascii_lowercase()),
        None => trimmed.to_owned(),
    };
    (tidy != text && Reference::parse(&tidy).is_ok()).then_some(tidy)
}

/// Hint for an invalid digest in a reference.
const DIGEST_HINT: &str = "append #sha256= and the 64 hex digits of the expected digest, or leave it out";

/// Splits `#sha256=<hex>` off the end of a reference.
fn split_digest(text: &str) -> Result<(&str, Option<Digest>)> {
    match text.rsplit_once('#') {
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
        self.target.location().fmt(f)?;
        if let Some(file) = &self.file {
            write!(f, "/{}", encoded(file.as_str()))?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "#sha256={digest}")?;
        }
        Ok(())
    }
}

/// Escapes `%` and `#` in a path. In a reference, `%` starts an escape and `#` starts the digest.
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
    fn the_hint_for_a_pasted_reference_is_the_reference_without_what_came_with_it() {
        for pasted in
            [" hf://o/n", "hf://o/n\n", "“hf://o/n”", "'hf://o/n'", "<hf://o/n>", "hf://o/n\u{200b}", "HF://o/n"]
        {
            let error = Reference::parse(pasted).expect_err(pasted);
            assert_eq!(error.hint_text(), Some("write hf://o/n"), "{pasted:?}");
        }
        let error = Reference::parse("'nothing://x'").expect_err("no such scheme");
        assert!(error.hint_text().is_some_and(|hint| !hint.contains("write nothing")), "{error}");
    }

    #[test]
    fn an_unknown_scheme_is_refused() {
        let error = Reference::parse("ftp://x/y").expect_err("no such scheme");
        assert!(error.message().contains("unknown scheme"), "{error}");
    }

    #[test]
    fn folders_are_absolute_and_have_no_parent_segments() {
        let target = Reference::parse("file:///models//a/./b/").expect("parses").target;
        assert!(matches!(&target, Target::Folder(path) if path.as_str() == "/models/a/b"), "{target:?}");
        for bad in ["file://relative", "file:///", "file:///a/../b", "file:///a/%2e%2e/b"] {
            assert!(Reference::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn the_built_in_schemes_do_not_overlap() {
        for (index, scheme) in schemes().enumerate() {
            for other in schemes().skip(index + 1) {
                assert!(scheme.split(other.prefix).is_none() && other.split(scheme.prefix).is_none(), "{scheme:?}");
                assert!(scheme.words.iter().all(|word| !other.words.contains(word)), "{scheme:?} {other:?}");
            }
            assert!(!scheme.words.is_empty() && scheme.split(scheme.form).is_some(), "{scheme:?}");
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
