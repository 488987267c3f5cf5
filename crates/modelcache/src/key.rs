//! Names: which artifact ([`ArtifactKey`]) and which file within it ([`FilePath`]).
//!
//! A value of these types has been checked, so that nothing below ever meets a name that climbs, and
//! [`escape`] turns any of them into one folder name, without clash. Names that came from a URI carry scheme
//! and authority in front (`hf/org/model`), so that what was put and what was fetched never share a key.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits;
use crate::redact;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// First segments that belong to URIs: a bare name may not begin with one of them.
pub const SCHEME_WORDS: [&str; 8] = ["hf", "http", "https", "s3", "file", "models", "mlflow", "oci"];

/// The folder of our own records, in every place where an artifact lies. No name or path enters it.
pub const OWN_FOLDER: &str = ".modelcache";

/// An artifact's name: segments split by `/`, the first of them a scheme word if it came from a URI.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactName(String);

/// An artifact's version: one segment; immutable once published.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(String);

/// The path of a file within an artifact: relative, `/`-separated, never climbing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FilePath(Box<str>);

/// Where an artifact lives: its name and version.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ArtifactKey {
    /// The name.
    pub name: ArtifactName,
    /// The version.
    pub version: Version,
}

/// What is wrong with one segment of a name, if anything.
fn segment_fault(segment: &str, forbidden: &[char]) -> Option<String> {
    if segment.is_empty() {
        return Some("has an empty segment".into());
    }
    if segment == "." || segment == ".." {
        return Some(format!("has the segment {segment:?}"));
    }
    if segment.len() > limits::SEGMENT_BYTES_MAX {
        return Some(format!("has a segment of {} bytes; at most {}", segment.len(), limits::SEGMENT_BYTES_MAX));
    }
    if segment.starts_with(OWN_FOLDER) {
        return Some(format!("has a segment that starts with {OWN_FOLDER:?}, which is reserved"));
    }
    let bad = segment.chars().find(|c| c.is_control() || forbidden.contains(c))?;
    Some(format!("contains {bad:?}"))
}

/// Characters that mean something in a reference, and the backslash, which climbs on other systems.
const NAME_FORBIDDEN: [char; 4] = ['@', '#', '?', '\\'];

/// What to write instead of a name or version that cannot be.
const NAME_HINT: &str =
    "write NAME@VERSION: segments split by '/', a version of one segment, none with any of @ # ? \\ in it";

impl ArtifactName {
    /// A bare name as a person gives it to `put`: one to eight segments, the first no scheme word.
    pub fn bare(text: &str) -> Result<Self> {
        let name = Self::checked(text)?;
        let segments = text.split('/').count();
        if segments > limits::NAME_SEGMENTS_MAX {
            return Err(Error::invalid(format!(
                "the name {text:?} has {segments} segments; at most {}",
                limits::NAME_SEGMENTS_MAX
            )));
        }
        if let Some(word) = name.scheme() {
            return Err(Error::invalid(format!("the name {text:?} begins with {word:?}, which stands for a URI"))
                .hint(format!("write the URI itself ({word}://…), or choose another first segment")));
        }
        Ok(name)
    }

    /// A name built from a URI: `scheme/part/part…`. Characters that a name or one part may not have are
    /// percent-encoded.
    pub fn from_uri<'a>(scheme: &str, parts: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut text = scheme.to_owned();
        for part in parts {
            text.push('/');
            for (at, c) in part.char_indices() {
                let own_folder = at == 0 && part.starts_with(OWN_FOLDER);
                if own_folder || matches!(c, '%' | '/') || c.is_control() || NAME_FORBIDDEN.contains(&c) {
                    encode_char(c, &mut text);
                } else {
                    text.push(c);
                }
            }
        }
        Self::checked(&text)
    }

    /// Any well-formed name, bare or from a URI.
    fn checked(text: &str) -> Result<Self> {
        if text.len() > limits::NAME_BYTES_MAX {
            return Err(Error::invalid(format!(
                "the name has {} bytes; at most {}",
                text.len(),
                limits::NAME_BYTES_MAX
            )));
        }
        match text.split('/').find_map(|segment| segment_fault(segment, &NAME_FORBIDDEN)) {
            Some(fault) => Err(Error::invalid(format!("the name {text:?} {fault}")).hint(NAME_HINT)),
            None => Ok(Self(text.to_owned())),
        }
    }

    /// The scheme word in front, if the name came from a URI.
    pub fn scheme(&self) -> Option<&'static str> {
        let first = self.0.split('/').next()?;
        SCHEME_WORDS.into_iter().find(|word| *word == first)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Version {
    /// A version: one segment without `@ # ? \`, control characters or a reserved beginning.
    pub fn new(text: &str) -> Result<Self> {
        if let Some(fault) = segment_fault(text, &NAME_FORBIDDEN) {
            return Err(Error::invalid(format!("the version {text:?} {fault}")).hint(NAME_HINT));
        }
        if text.contains('/') {
            return Err(Error::invalid(format!("the version {text:?} contains '/'")).hint(NAME_HINT));
        }
        Ok(Self(text.to_owned()))
    }

    /// The version as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FilePath {
    /// A path within an artifact. Refuses what climbs, what is absolute, backslashes and control characters.
    pub fn new(text: &str) -> Result<Self> {
        if text.len() > limits::PATH_BYTES_MAX {
            return Err(Error::invalid(format!(
                "the file path has {} bytes; at most {}",
                text.len(),
                limits::PATH_BYTES_MAX
            )));
        }
        match text.split('/').find_map(|segment| segment_fault(segment, &['\\'])) {
            Some(fault) => Err(Error::invalid(format!("the file path {text:?} {fault}"))),
            None => Ok(Self(text.into())),
        }
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last segment.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

impl ArtifactKey {
    /// A key from its two parts.
    pub fn new(name: ArtifactName, version: Version) -> Self {
        Self { name, version }
    }

    /// The key a person gives to `put`: a bare `name@version`.
    pub fn bare(text: &str) -> Result<Self> {
        let parse = || {
            let (name, version) = text.rsplit_once('@').ok_or_else(|| {
                Error::invalid(format!("{text:?} has no version"))
                    .hint("write NAME@VERSION, for instance fraud-detector@3")
            })?;
            Ok(Self::new(ArtifactName::bare(name)?, Version::new(version)?))
        };
        parse().map_err(|error| redact::refusal(text, error))
    }

    /// The key as it is listed: a bare one, or that of something that its URI names only as it is now: a folder as it
    /// once was (`file/models/m@4451…`), a web page's earlier content.
    pub(crate) fn listed(text: &str) -> Result<Self> {
        match text.rsplit_once('@') {
            Some((name, version)) if Self::is_listed_alone(name) => {
                Ok(Self::new(ArtifactName::checked(name)?, Version::new(version)?))
            }
            _ => Self::bare(text),
        }
    }

    /// Schemes whose URI says all of a key: a commit at the Hub, a manifest's digest in a registry.
    const URIS: [&str; 2] = ["hf", "oci"];

    /// Whether names that begin so are typed as they are listed. Those whose URI says all of it never are.
    fn is_listed_alone(name: &str) -> bool {
        let scheme = name.split_once('/').map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| !Self::URIS.contains(&scheme) && SCHEME_WORDS.contains(&scheme))
    }

    /// 32 hex digits that stand for this key where a short name without structure is needed (locks, staging). Derived
    /// from the escaped folder names, so that it can be told from an artifact's folder alone.
    pub fn hash(&self) -> String {
        Self::hash_of_folders(&escape(self.name.as_str()), &escape(self.version.as_str()))
    }

    /// [`hash`](Self::hash) from the two folder names.
    pub(crate) fn hash_of_folders(name: &str, version: &str) -> String {
        let mut text = Digest::of(format!("{name}/{version}").as_bytes()).to_string();
        text.truncate(32);
        text
    }
}

impl fmt::Display for ArtifactKey {
    /// `name@version`, or the URI that leads to this key when it came from the Hub or an OCI registry.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name.0.split_once('/') {
            Some((scheme, rest)) if Self::URIS.contains(&scheme) => write!(f, "{scheme}://{rest}@{}", self.version),
            _ => write!(f, "{}@{}", self.name, self.version),
        }
    }
}

macro_rules! text_type {
    ($type:ident, $parse:path) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                $parse(text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                $parse(&text)
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.0.into()
            }
        }
    };
}

text_type!(ArtifactName, ArtifactName::checked);
text_type!(Version, Version::new);
text_type!(FilePath, FilePath::new);

fn encode_char(c: char, out: &mut String) {
    let mut bytes = [0; 4];
    for byte in c.encode_utf8(&mut bytes).bytes() {
        out.push_str(&format!("%{byte:02X}"));
    }
}

/// One folder name for any text: `/`, `%`, control characters and a leading dot are percent-encoded; what
/// is then longer than [`limits::ESCAPED_BYTES_MAX`] is cut and closed with `%~` and a hash of the whole.
/// Two texts never share a folder name: an escape is always `%` and two hex digits, so `%~` marks a cut only.
pub fn escape(text: &str) -> String {
    const HASH_DIGITS: usize = 32;
    let mut escaped = String::with_capacity(text.len());
    let mut cut_at = 0;
    for (at, c) in text.char_indices() {
        if c == '/' || c == '%' || c.is_control() || (at == 0 && c == '.') {
            encode_char(c, &mut escaped);
        } else {
            escaped.push(c);
        }
        if escaped.len() <= limits::ESCAPED_BYTES_MAX - HASH_DIGITS - 2 {
            cut_at = escaped.len();
        }
    }
    if escaped.len() > limits::ESCAPED_BYTES_MAX {
        escaped.truncate(cut_at);
        escaped.push_str("%~");
        escaped.push_str(&Digest::of(text.as_bytes()).to_string()[..HASH_DIGITS]);
    }
    escaped
}

/// The text that [`escape`] was given, or `None` if the name was cut or is no escaped name.
pub fn unescape(escaped: &str) -> Option<String> {
    let text = percent_encoding::percent_decode_str(escaped).decode_utf8().ok()?.into_owned();
    (escape(&text) == escaped).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_climb_or_confuse_are_refused() {
        for bad in [
            "",
            "/",
            "a//b",
            "/a",
            "a/",
            ".",
            "..",
            "a/../b",
            "a@b",
            "a#b",
            "a?b",
            "a\\b",
            "a\0b",
            "a\nb",
            ".modelcache",
            "a/.modelcache-x",
            "hf/org/model",
            "s3",
            "1/2/3/4/5/6/7/8/9",
        ] {
            assert!(ArtifactName::bare(bad).is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "team/model", "é", "with space", "100%", ".hidden", "a.b", "1/2/3/4/5/6/7/8", "hfx/y"] {
            assert!(ArtifactName::bare(good).is_ok(), "{good:?} was refused");
        }
        assert!(ArtifactName::bare(&"x".repeat(255)).is_ok());
        assert!(ArtifactName::bare(&"x".repeat(256)).is_err());
    }

    #[test]
    fn versions_are_one_segment() {
        assert!(Version::new("3").is_ok());
        for bad in ["", "a/b", "..", "a@b", "\0", ".modelcache"] {
            assert!(Version::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn file_paths_never_climb() {
        for bad in
            ["", "..", "../x", "a/../x", "/etc/passwd", "a//b", "a/", "a\\..\\b", "a\0", ".modelcache/manifest.json"]
        {
            assert!(FilePath::new(bad).is_err(), "{bad:?} was accepted");
        }
        for good in ["config.json", "sub dir/fé+%.txt", "a@b#c?d", ".gitattributes", "x/.y"] {
            assert!(FilePath::new(good).is_ok(), "{good:?} was refused");
        }
    }

    #[test]
    fn names_from_uris_encode_what_names_may_not_have() {
        let name = ArtifactName::from_uri("file", ["a@b", "c%d", ".modelcache"]).expect("encodes");
        assert_eq!(name.as_str(), "file/a%40b/c%25d/%2Emodelcache");
        assert!(ArtifactName::from_uri("file", [".."]).is_err());
    }

    #[test]
    fn long_names_are_cut_without_clash() {
        let (a, b) = ("x".repeat(400) + "a", "x".repeat(400) + "b");
        assert_ne!(escape(&a), escape(&b));
        assert!(escape(&a).len() <= limits::ESCAPED_BYTES_MAX);
        assert_ne!(escape(&escape(&a)), escape(&a), "an escaped name given as a name is another name");
    }

    proptest! {
        #[test]
        fn escape_is_one_safe_segment_and_reversible(text in "\\PC{1,60}|[/%.~a\\x00-\\x1f]{1,300}") {
            let escaped = escape(&text);
            prop_assert!(escaped.len() <= limits::ESCAPED_BYTES_MAX);
            prop_assert!(!escaped.contains('/') && !escaped.starts_with('.') && !escaped.contains('\0'));
            if !escaped.contains("%~") {
                prop_assert_eq!(unescape(&escaped), Some(text));
            }
        }

        #[test]
        fn distinct_keys_have_distinct_places(a in "[ab/%.é ]{1,9}@[12%.é]{1,3}", b in "[ab/%.é ]{1,9}@[12%.é]{1,3}") {
            if let (Ok(a), Ok(b)) = (ArtifactKey::bare(&a), ArtifactKey::bare(&b)) && a != b {
                let place = |key: &ArtifactKey| (escape(key.name.as_str()), escape(key.version.as_str()));
                prop_assert_ne!(place(&a), place(&b));
                let object = |key: &ArtifactKey| format!("{}/{}/", key.name, key.version);
                prop_assert_ne!(object(&a), object(&b));
                prop_assert_ne!(a.hash(), b.hash());
            }
        }
    }
}
