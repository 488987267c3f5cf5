//! References to the Hugging Face Hub: `hf://[datasets/|spaces/]org/name[@revision[/file]]`.

use super::location::Location;
use super::{Pointer, Reference, Scheme, Target};
use crate::digest::GitOid;
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::redact;
use percent_encoding::percent_decode_str;
use std::fmt;

/// The scheme of the Hub.
pub(crate) static SCHEME: Scheme = Scheme {
    has_revisions: true,
    prints_keys_as_uri: true,
    ..Scheme::built_in("hf://", &["hf"], "hf://org/model[@revision[/file]]", parse)
};

/// The kinds of repositories on the Hub. Each has a namespace of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RepoKind {
    /// Models: the default, without a prefix.
    Model,
    /// Datasets: `datasets/`.
    Dataset,
    /// Spaces: `spaces/`.
    Space,
}

impl RepoKind {
    /// Returns the segment for this kind in API paths: `models`, `datasets`, `spaces`.
    pub fn api_segment(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
            Self::Space => "spaces",
        }
    }

    /// Returns the prefix of the repository in file URLs and references, which is empty for models.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
            Self::Space => "spaces/",
        }
    }
}

/// A repository on the Hub, at a revision.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HubRepo {
    /// Model, dataset or space.
    pub kind: RepoKind,
    /// `org/name`, or one segment for old repositories.
    pub id: String,
    /// A branch, a tag, `refs/pr/N`, or a commit of 40 hex digits.
    pub revision: String,
}

impl HubRepo {
    /// Returns true if the revision is a commit, which never moves.
    pub fn is_commit(&self) -> bool {
        self.revision.parse::<GitOid>().is_ok()
    }

    /// Returns the artifact name: `hf/`, the prefix of the kind, the repository.
    pub fn name(&self) -> Result<ArtifactName> {
        let prefix = self.kind.prefix().trim_end_matches('/');
        let segments = Some(prefix).filter(|prefix| !prefix.is_empty()).into_iter().chain(self.id.split('/'));
        ArtifactName::from_uri("hf", segments)
    }

    /// Returns the repository and commit of a key that [`key_at`](Self::key_at) returned; `None` for any other key.
    pub fn of_key(key: &ArtifactKey) -> Option<Self> {
        let path = key.name.as_str().strip_prefix("hf/")?;
        let kinds = [RepoKind::Dataset, RepoKind::Space];
        let prefixed = kinds.iter().find_map(|kind| Some((*kind, path.strip_prefix(kind.prefix())?)));
        let (kind, id) = prefixed.unwrap_or((RepoKind::Model, path));
        let repo = Self { kind, id: id.to_owned(), revision: key.version.as_str().to_owned() };
        repo.exact_key().is_some_and(|own| own == *key).then_some(repo)
    }

    /// Returns the name of the repository's folder in a Hugging Face cache, such as `models--org--name`.
    pub fn cache_folder(&self) -> String {
        format!("{}--{}", self.kind.api_segment(), self.id.replace('/', "--"))
    }

    /// Returns the key of this repository at `commit` (40 hex digits).
    pub fn key_at(&self, commit: &str) -> Result<ArtifactKey> {
        let commit: GitOid = commit.parse()?;
        Ok(ArtifactKey::new(self.name()?, Version::new(&commit.to_string())?))
    }
}

impl Location for HubRepo {
    fn scheme(&self) -> Option<&'static Scheme> {
        Some(&SCHEME)
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        self.key_at(&self.revision).ok()
    }

    fn pointer(&self) -> Option<Pointer> {
        let name = self.name().ok()?;
        (!self.is_commit()).then(|| Pointer { name, revision: self.revision.clone() })
    }

    fn at_revision(&self, revision: &str) -> Result<Option<Target>> {
        Ok(Some(Target::Hub(Self { revision: checked_revision(revision)?, ..self.clone() })))
    }

    fn at_key(&self, key: &ArtifactKey) -> Target {
        Target::Hub(Self { revision: key.version.as_str().to_owned(), ..self.clone() })
    }

    fn can_resolve_to(&self, version: &Version) -> bool {
        self.key_at(version.as_str()).is_ok()
    }
}

/// Formats as a reference. A slash in the revision becomes `%2F`, unless it belongs to `refs/pr/N` or `refs/convert/X`.
impl fmt::Display for HubRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://{}{}@", self.kind.prefix(), self.id)?;
        let revision = self.revision.replace('%', "%25");
        match split_revision(&revision) {
            (_, None) => f.write_str(&revision),
            (_, Some(_)) => f.write_str(&revision.replace('/', "%2F")),
        }
    }
}

/// Parses the text after `hf://`: `[datasets/|spaces/]org/name`, then `@rev[/file]` or `:rev`.
fn parse(_prefix: &str, rest: &str) -> Result<Reference> {
    let refuse = |why: &str| {
        Error::invalid(format!("{}: {why}", redact::reference(&format!("hf://{rest}"))))
            .hint("write hf://org/model@revision or hf://org/model@revision/file")
    };
    let (path, revision, file) = match rest.split_once('@') {
        Some((path, after)) => {
            let (revision, file) = split_revision(after);
            (path, revision, file)
        }
        None => match rest.split_once(':') {
            Some((path, revision)) => (path, revision, None),
            None => (rest, "main", None),
        },
    };
    let path = path.trim_end_matches('/');
    let (kind, id) = if let Some(id) = path.strip_prefix("datasets/") {
        (RepoKind::Dataset, id)
    } else if let Some(id) = path.strip_prefix("spaces/") {
        (RepoKind::Space, id)
    } else {
        (RepoKind::Model, path.strip_prefix("models/").unwrap_or(path))
    };
    let segments: Vec<&str> = id.split('/').collect();
    if segments.len() > 2 {
        return Err(refuse("a repository has one or two segments, and a file must follow a revision"));
    }
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if segments
        .iter()
        .any(|segment| segment.is_empty() || *segment == "." || *segment == ".." || !segment.chars().all(is_allowed))
    {
        return Err(refuse("not a valid repository name"));
    }
    let repo = HubRepo { kind, id: id.to_owned(), revision: checked_revision(revision)? };
    repo.name()?;
    let file = match file {
        Some(file) => Some(FilePath::new(
            &percent_decode_str(file).decode_utf8().map_err(|_| refuse("the file name is not UTF-8"))?,
        )?),
        None => None,
    };
    Ok(Reference { target: Target::Hub(repo), file, digest: None })
}

/// Splits `rev[/file]`. A revision `refs/pr/N` or `refs/convert/X` has three segments.
fn split_revision(after: &str) -> (&str, Option<&str>) {
    let segments = if after.starts_with("refs/pr/") || after.starts_with("refs/convert/") { 3 } else { 1 };
    match after.match_indices('/').nth(segments - 1) {
        Some((at, _)) => (&after[..at], Some(&after[at + 1..]).filter(|file| !file.is_empty())),
        None => (after, None),
    }
}

/// Decodes percent escapes in a revision (a slash is written `%2F`) and checks it. Refuses names that git refuses for
/// refs. Returns a commit in lower case.
fn checked_revision(text: &str) -> Result<String> {
    let revision = percent_decode_str(text).decode_utf8_lossy().into_owned();
    let is_forbidden =
        |c: char| c.is_control() || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\' | '@' | '#');
    if revision.is_empty()
        || revision.chars().any(is_forbidden)
        || revision.split('/').any(|segment| segment.is_empty() || segment.starts_with('.'))
        || revision.contains("..")
    {
        return Err(
            Error::invalid(format!("{text:?} is not a revision")).hint("write a branch, a tag, refs/pr/N or a commit")
        );
    }
    if revision.parse::<GitOid>().is_ok() { Ok(revision.to_ascii_lowercase()) } else { Ok(revision) }
}
