//! Validated names: the key of an artifact ([`ArtifactKey`]), and the path of a file within it ([`FilePath`]).
//!
//! No value of these types can leave its folder (`..`, absolute paths). [`escape`] maps each of them to one folder
//! name, without collisions. A name from a URI begins with the scheme and the authority (`hf/org/model`), so that
//! artifacts from `put` and artifacts from an origin never share a key.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::{OWN_ORIGIN, scheme_of_word};
use crate::{limits, redact};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The folder of the cache's own records beside the files of an artifact. No name or path can refer to it.
pub const OWN_FOLDER: &str = ".modelcache";

/// The name of an artifact: segments separated by `/`. If it comes from a URI, the first segment is the word of the
/// URI's scheme (`hf`, `s3`, …).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactName(String);

/// The version of an artifact: one segment. Its content is immutable once it is published.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(String);

/// The path of a file within an artifact: relative, `/`-separated, without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FilePath(Box<str>);

/// The key of an artifact: its name and version.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ArtifactKey {
    /// The name of the artifact.
    pub name: ArtifactName,
    /// The version of the artifact.
    pub version: Version,
}

/// Returns the reason why `segment` is invalid, as the end of an error message; `None` if it is valid.
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

/// Characters with a meaning in a reference, and the backslash, which separates paths on other systems.
const NAME_FORBIDDEN: [char; 4] = ['@', '#', '?', '\\'];

/// The first segment of the names of files that were extracted from archives.
const EXTRACTED: &str = "extracted";

/// Hint for an invalid name or version.
const NAME_HINT: &str = "write NAME@VERSION: a name of segments separated by '/', a version of one segment, and no \
                         @ # ? or \\ in either";

impl ArtifactName {
    /// Parses a bare name, as used with `put`: up to [`limits::NAME_SEGMENTS_MAX`] segments, the first of which is not
    /// a scheme word.
    ///
    /// # Errors
    /// `Invalid` for any other text.
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
            let uri = match (scheme_of_word(word), word.strip_prefix(OWN_ORIGIN)) {
                (Some(scheme), _) => format!("write the URI itself ({}), or ", scheme.form),
                (None, Some(own)) => format!("write the URI itself ({own}://…), or "),
                (None, None) => String::new(),
            };
            return Err(Error::invalid(format!("the name {text:?} begins with {word:?}, which is reserved"))
                .hint(format!("{uri}choose another first segment")));
        }
        Ok(name)
    }

    /// Builds a name from a URI: `scheme/part/part…`. Characters that are invalid in a name or a part are
    /// percent-encoded.
    ///
    /// # Errors
    /// `Invalid` if the name is too long, or if a part is empty, too long, `.` or `..`.
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

    /// Parses any valid name, bare or from a URI.
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

    /// Returns the name of the files that are extracted from archives of this name.
    ///
    /// # Errors
    /// `Invalid` if the name is too long.
    pub(crate) fn extracted(&self) -> Result<Self> {
        Self::from_uri(EXTRACTED, self.0.split('/'))
    }

    /// Returns true for a name of [`extracted`](Self::extracted) files.
    pub(crate) fn is_extracted(&self) -> bool {
        self.0.split('/').next() == Some(EXTRACTED)
    }

    /// Returns the scheme word if the name comes from a URI: a word of a built-in scheme, or `origin+word` for an
    /// application's scheme. The files of archives have such a word, too. No bare name begins with one.
    pub fn scheme(&self) -> Option<&str> {
        let first = self.0.split('/').next()?;
        let is_word = first == EXTRACTED || first.starts_with(OWN_ORIGIN) || scheme_of_word(first).is_some();
        is_word.then_some(first)
    }

    /// Returns true if the name comes from a URI whose origin keeps old versions, so that a version can be downloaded
    /// again after the origin has moved on.
    pub(crate) fn origin_keeps_versions(&self) -> bool {
        self.scheme().is_some_and(|word| scheme_of_word(word).is_none_or(|scheme| scheme.keeps_versions))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Version {
    /// Parses a version: one segment without `@ # ? \` and control characters, which does not begin with
    /// [`OWN_FOLDER`].
    ///
    /// # Errors
    /// `Invalid` for any other text.
    pub fn new(text: &str) -> Result<Self> {
        if let Some(fault) = segment_fault(text, &NAME_FORBIDDEN) {
            return Err(Error::invalid(format!("the version {text:?} {fault}")).hint(NAME_HINT));
        }
        if text.contains('/') {
            return Err(Error::invalid(format!("the version {text:?} contains '/'")).hint(NAME_HINT));
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns the version as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FilePath {
    /// Parses a path within an artifact.
    ///
    /// # Errors
    /// `Invalid` for an absolute path, for a segment that is empty, `.` or `..` or begins with [`OWN_FOLDER`], for
    /// backslashes and control characters, and for a path that is too long.
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

    /// Returns the path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the last segment.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

impl ArtifactKey {
    /// Creates a key from a name and a version.
    pub fn new(name: ArtifactName, version: Version) -> Self {
        Self { name, version }
    }

    /// Parses a bare `name@version`, as used with `put`.
    ///
    /// # Errors
    /// `Invalid` for any other text.
    pub fn bare(text: &str) -> Result<Self> {
        let parse = || {
            let (name, version) = text
                .rsplit_once('@')
                .ok_or_else(|| Error::invalid(format!("{text:?} has no version")).hint(no_version_hint(text)))?;
            Ok(Self::new(ArtifactName::bare(name)?, Version::new(version)?))
        };
        parse().map_err(|error| redact::refusal(text, error))
    }

    /// Parses a key that `ls` prints without `://`: a bare key, or a name from a URI with the version. The second form
    /// can denote earlier content of a folder (`file/models/m@4451…`) or of a file on a web server. Their URIs denote
    /// only the present content.
    pub(crate) fn listed(text: &str) -> Result<Self> {
        match text.rsplit_once('@') {
            Some((name, version)) if Self::is_uri_name_listed_with_version(name) => {
                Ok(Self::new(ArtifactName::checked(name)?, Version::new(version)?))
            }
            _ => Self::bare(text),
        }
    }

    /// Returns true if `name` comes from a URI and its keys are printed as name and version. Keys of schemes whose URIs
    /// contain the version are printed as URIs.
    fn is_uri_name_listed_with_version(name: &str) -> bool {
        let first = name.split_once('/').map(|(first, _)| first);
        first.is_some_and(|first| {
            first == EXTRACTED
                || first.starts_with(OWN_ORIGIN)
                || scheme_of_word(first).is_some_and(|scheme| !scheme.prints_keys_as_uri)
        })
    }

    /// Returns 32 hex digits that identify this key in the names of locks and staging folders. They are derived from
    /// the escaped folder names, so that they can be computed from the folder of an artifact.
    pub fn hash(&self) -> String {
        Self::hash_of_folders(&escape(self.name.as_str()), &escape(self.version.as_str()))
    }

    /// Computes [`hash`](Self::hash) from the two folder names.
    pub(crate) fn hash_of_folders(name: &str, version: &str) -> String {
        let mut text = Digest::of(format!("{name}/{version}").as_bytes()).to_string();
        text.truncate(32);
        text
    }
}

/// Returns the hint for a reference without `@`, which may be a repository of the Hub, a path, or a URL or a tag of
/// another tool.
fn no_version_hint(text: &str) -> String {
    let with_at = |at: usize| format!("{}@{}", &text[..at], &text[at + 1..]);
    let is_path = text.starts_with(['/', '.', '~']);
    match (text.split_once(":/"), text.rfind(':'), text.split('/').count()) {
        // A reference to an origin, where a key is wanted, for instance to publish.
        _ if text.contains("://") => "write NAME@VERSION, the name and version to publish it under".to_owned(),
        (Some((scheme, rest)), ..) if scheme.chars().all(char::is_alphanumeric) => {
            format!("write {scheme}://{}", rest.trim_start_matches('/'))
        }
        (None, Some(at), _) if at > 0 && at + 1 < text.len() => format!("write NAME@VERSION: {}", with_at(at)),
        _ if is_path => {
            "write file:///FOLDER for a local file or folder, or NAME@VERSION for a published artifact".to_owned()
        }
        (.., 2) => format!("for the Hugging Face repository write hf://{text}, otherwise NAME@VERSION: {text}@3"),
        _ => format!("write NAME@VERSION, for instance {text}@3; `modelcache ls` lists the versions on disk"),
    }
}

impl TryFrom<&str> for ArtifactKey {
    type Error = Error;

    /// Parses `name@version`.
    fn try_from(text: &str) -> Result<Self> {
        Self::bare(text)
    }
}

impl TryFrom<&ArtifactKey> for ArtifactKey {
    type Error = Error;

    fn try_from(key: &ArtifactKey) -> Result<Self> {
        Ok(key.clone())
    }
}

impl fmt::Display for ArtifactKey {
    /// Formats the key as `name@version`, or as a URI if it belongs to the Hub or an OCI registry.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_uri = |first| scheme_of_word(first).is_some_and(|scheme| scheme.prints_keys_as_uri);
        match self.name.0.split_once('/') {
            Some((scheme, rest)) if is_uri(scheme) => write!(f, "{scheme}://{rest}@{}", self.version),
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

/// Appends `c` percent-encoded.
fn encode_char(c: char, out: &mut String) {
    let mut bytes = [0; 4];
    for byte in c.encode_utf8(&mut bytes).bytes() {
        out.push_str(&format!("%{byte:02X}"));
    }
}

/// Encodes any text as one folder name. `/`, `%`, control characters and a leading dot are percent-encoded. If the
/// result is longer than [`limits::ESCAPED_BYTES_MAX`], it is cut, and `%~` and a hash of the whole text are appended.
///
/// Two texts never have the same folder name: an escape is always `%` and two hex digits, so `%~` occurs only in cut
/// names.
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
        // The last position between two characters at which `%~` and the hash fit.
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

/// Returns the text from which [`escape`] made this name; `None` if the name was cut, or if it is not an escaped name.
pub fn unescape(escaped: &str) -> Option<String> {
    // The comparison rejects cut names and names that `escape` never returns.
    let text = percent_encoding::percent_decode_str(escaped).decode_utf8().ok()?.into_owned();
    (escape(&text) == escaped).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn invalid_and_ambiguous_names_are_refused() {
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
    fn file_paths_never_leave_the_artifact() {
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
    fn names_from_uris_encode_invalid_characters() {
        let name = ArtifactName::from_uri("file", ["a@b", "c%d", ".modelcache"]).expect("encodes");
        assert_eq!(name.as_str(), "file/a%40b/c%25d/%2Emodelcache");
        assert!(ArtifactName::from_uri("file", [".."]).is_err());
    }

    #[test]
    fn long_names_are_cut_without_collisions() {
        let (a, b) = ("x".repeat(400) + "a", "x".repeat(400) + "b");
        assert_ne!(escape(&a), escape(&b));
        assert!(escape(&a).len() <= limits::ESCAPED_BYTES_MAX);
        assert_ne!(escape(&escape(&a)), escape(&a), "escaping an escaped name changes it");
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
        fn distinct_keys_have_distinct_folders_objects_and_hashes(
            a in "[ab/%.é ]{1,9}@[12%.é]{1,3}", b in "[ab/%.é ]{1,9}@[12%.é]{1,3}",
        ) {
            if let (Ok(a), Ok(b)) = (ArtifactKey::bare(&a), ArtifactKey::bare(&b)) && a != b {
                let folders = |key: &ArtifactKey| (escape(key.name.as_str()), escape(key.version.as_str()));
                prop_assert_ne!(folders(&a), folders(&b));
                let prefix = |key: &ArtifactKey| format!("{}/{}/", key.name, key.version);
                prop_assert_ne!(prefix(&a), prefix(&b));
                prop_assert_ne!(a.hash(), b.hash());
            }
        }
    }
}
