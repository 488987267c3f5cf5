//! References to an application's own origin: `<prefix><path>[@revision[/file]]`, for example `shelf://novels/emma@2`.
//!
//! The path is not percent-decoded; the file is. The default revision is `current`.

use super::location::Location;
use super::scheme::{OWN_ORIGIN, Scheme, Syntax};
use super::{Pointer, Reference, Target};
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::redact;
use percent_encoding::percent_decode_str;
use std::fmt;

/// The revision of a reference without one.
const CURRENT: &str = "current";

/// A location at an application's own origin.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    scheme: &'static Scheme,
    path: String,
    revision: String,
}

impl Place {
    /// Parses the text after the prefix of `scheme`.
    pub(super) fn parse(scheme: &'static Scheme, rest: &str) -> Result<Reference> {
        let text = redact::reference(&format!("{}{rest}", scheme.prefix));
        let refuse = |why: &str| Error::invalid(format!("{text}: {why}")).hint(format!("write {}", scheme.form));
        let (path, after) = rest.split_once('@').map_or((rest, None), |(path, after)| (path, Some(after)));
        let (revision, file) = match after.map(|after| after.split_once('/').unwrap_or((after, ""))) {
            Some((revision, file)) => (revision, Some(file).filter(|file| !file.is_empty())),
            None => (CURRENT, None),
        };
        Version::new(revision).map_err(|error| refuse(error.message()))?;
        let place = Self { scheme, path: path.to_owned(), revision: revision.to_owned() };
        if path.is_empty() {
            return Err(refuse("it names no artifact"));
        }
        place.name().map_err(|error| refuse(error.message()))?;
        let decoded = |file| percent_decode_str(file).decode_utf8().map_err(|_| refuse("the file name is not UTF-8"));
        let file = file.map(|file| FilePath::new(&decoded(file)?)).transpose()?;
        Ok(Reference { target: Target::Own(place), file, digest: None })
    }

    /// Returns the location that `key` came from. Returns `None` if `key` does not belong to `scheme`.
    pub(crate) fn of_key(scheme: &'static Scheme, key: &ArtifactKey) -> Option<Self> {
        let path = key.name.as_str().strip_prefix(&first_segment(scheme))?.strip_prefix('/')?;
        let path = percent_decode_str(path).decode_utf8().ok()?.into_owned();
        let place = Self { scheme, path, revision: key.version.as_str().to_owned() };
        (place.exact_key().as_ref() == Some(key)).then_some(place)
    }

    /// Returns the path: the text between the prefix of the scheme and the revision.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns the revision. It is an exact version if the scheme recognises it as one.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Returns the artifact name: `origin+` and the word of the scheme, then the path.
    pub fn name(&self) -> Result<ArtifactName> {
        ArtifactName::from_uri(&first_segment(self.scheme), self.path.split('/'))
    }

    /// Returns the key of the artifact at `version`.
    ///
    /// # Errors
    /// `Invalid` if the scheme does not recognise `version` as a version.
    pub fn key_at(&self, version: &str) -> Result<ArtifactKey> {
        if !self.is_version(version) {
            return Err(Error::invalid(format!("{version:?} is not a version of {}{}", self.scheme.prefix, self.path)));
        }
        Ok(ArtifactKey::new(self.name()?, Version::new(version)?))
    }

    /// Returns true if the scheme recognises `text` as an exact version.
    fn is_version(&self, text: &str) -> bool {
        matches!(self.scheme.syntax, Syntax::Place(is_version) if is_version(text))
    }
}

/// Returns the first segment of names of `scheme`.
fn first_segment(scheme: &Scheme) -> String {
    format!("{OWN_ORIGIN}{}", scheme.prefix.trim_end_matches("://"))
}

impl Location for Place {
    fn scheme(&self) -> Option<&'static Scheme> {
        Some(self.scheme)
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        self.key_at(&self.revision).ok()
    }

    fn pointer(&self) -> Option<Pointer> {
        let name = self.name().ok()?;
        (!self.is_version(&self.revision)).then(|| Pointer { name, revision: self.revision.clone() })
    }

    fn at_revision(&self, revision: &str) -> Result<Option<Target>> {
        let revision = Version::new(revision)?.as_str().to_owned();
        Ok(Some(Target::Own(Self { revision, ..self.clone() })))
    }

    fn at_key(&self, key: &ArtifactKey) -> Target {
        Target::Own(Self { revision: key.version.as_str().to_owned(), ..self.clone() })
    }

    fn can_resolve_to(&self, version: &Version) -> bool {
        self.is_version(version.as_str())
    }
}

/// Formats as a reference.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}@{}", self.scheme.prefix, self.path, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static SHELF: Scheme = Scheme::new("shelf://", "shelf://book[@edition]", |text| text.parse::<u32>().is_ok());

    fn shelf(text: &str) -> Result<Reference> {
        Reference::parse_with(text, crate::reference::schemes().chain([&SHELF]))
    }

    #[test]
    fn a_reference_prints_as_it_parses() {
        for (text, printed) in [
            ("shelf://emma", "shelf://emma@current"),
            ("shelf://novels/emma@2", "shelf://novels/emma@2"),
            ("shelf://novels/a%2Fb@2", "shelf://novels/a%2Fb@2"),
            ("shelf://emma@2/part%201/a b.txt", "shelf://emma@2/part 1/a b.txt"),
        ] {
            let reference = shelf(text).expect(text);
            assert_eq!(reference.to_string(), printed);
            assert_eq!(shelf(printed).expect(printed), reference);
            let digest = "ab".repeat(32);
            assert_eq!(shelf(&format!("{printed}#sha256={digest}")).expect(text).target, reference.target);
        }
        for bad in [
            "shelf://",
            "shelf:///a",
            "shelf://a//b",
            "shelf://../b",
            "shelf://a@",
            "shelf://a@b@c",
            "shelf://a?token=x",
        ] {
            assert!(shelf(bad).is_err(), "{bad} was accepted");
        }
        assert!(Reference::parse("shelf://emma").is_err(), "the scheme is unknown without its origin");
    }

    #[test]
    fn a_version_is_an_exact_key_and_a_revision_is_not() {
        let exact = shelf("shelf://novels/a%2Fb@2").expect("parses");
        let key = exact.exact_key().expect("exact");
        assert_eq!(key.to_string(), "origin+shelf/novels/a%252Fb@2");
        assert!(exact.pointer().is_none() && exact.can_resolve_to(&key.version));
        let movable = shelf("shelf://novels/a%2Fb").expect("parses");
        let pointer = movable.pointer().expect("movable");
        assert_eq!((pointer.name, pointer.revision.as_str()), (key.name.clone(), "current"));
        assert!(movable.exact_key().is_none() && !movable.can_resolve_to(&Version::new("draft").expect("version")));
        assert_eq!(movable.at_key(&key), exact);
        assert_eq!(movable.at_revision("2").expect("revisions"), exact);
        assert_eq!(Place::of_key(&SHELF, &key).as_ref(), exact.place());
    }

    #[test]
    fn no_bare_name_can_be_a_name_of_such_an_origin() {
        let key = shelf("shelf://emma@2").expect("parses").exact_key().expect("exact");
        assert!(ArtifactKey::bare(&key.to_string()).is_err());
        assert_eq!(key.name.scheme(), Some("origin+shelf"));
        assert_eq!(Reference::parse(&key.to_string()).expect("as listed").exact_key(), Some(key));
    }
}
