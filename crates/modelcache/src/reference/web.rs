//! References to one file on a web server: `https://host/path/file[@version]`.
//!
//! The last `@` after the final `/` splits off the version; an `@` that belongs to the file's name is written `%40`. The
//! name keeps scheme, host and port, and every segment of the path.
//!
//! Surprise: an address with a query is refused. What stands there is often a signature, which would end up in names,
//! listings and logs, and be another tomorrow.

use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::redact;
use percent_encoding::percent_decode_str;
use std::fmt;
use url::Url;

/// How to write one.
const FORM: &str = "write https://host/path/file or https://host/path/file@version";

/// One file on a web server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WebFile {
    /// Its address: without user, password, query and fragment.
    pub url: Url,
    /// The version that it was given; without one, the server's validator decides.
    pub version: Option<Version>,
}

/// What a version begins with that the server's own marks gave: its entity tag, its date and size, the bytes themselves.
const DERIVED: [&str; 3] = ["etag-", "modified-", "sha256-"];

/// Whether a version was made from what the server said, not given by the caller.
pub(crate) fn is_derived(version: &Version) -> bool {
    DERIVED.iter().any(|prefix| version.as_str().starts_with(prefix))
}

impl WebFile {
    /// The artifact's name: scheme, host with its port, path.
    pub fn name(&self) -> Result<ArtifactName> {
        let host = self.url.host_str().unwrap_or_default();
        let server = self.url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let parts = [server].into_iter().chain(self.segments()?).collect::<Vec<_>>();
        ArtifactName::from_uri(self.url.scheme(), parts.iter().map(String::as_str))
    }

    /// The path of the file within its artifact: the last segment. Of an encoded slash in it, what follows.
    pub fn path(&self) -> Result<FilePath> {
        let last = self.segments()?.pop().unwrap_or_default();
        FilePath::new(last.rsplit('/').next().unwrap_or_default())
    }

    /// The key of this file at `version`.
    pub fn key_at(&self, version: Version) -> Result<ArtifactKey> {
        Ok(ArtifactKey::new(self.name()?, version))
    }

    /// The segments of its path, decoded.
    fn segments(&self) -> Result<Vec<String>> {
        let decoded = |segment: &str| {
            let text = percent_decode_str(segment).decode_utf8();
            text.map(String::from).map_err(|_| Error::invalid(format!("{}: the path is not UTF-8", self.url)))
        };
        self.url.path_segments().into_iter().flatten().map(decoded).collect()
    }
}

/// As it is typed.
impl fmt::Display for WebFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.as_str())?;
        self.version.as_ref().map_or(Ok(()), |version| write!(f, "@{version}"))
    }
}

/// `host/path/file[@version]` after `https://` or `http://`.
pub(super) fn parse(scheme: &str, rest: &str) -> Result<WebFile> {
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    // With more slashes a reader of addresses takes what follows for the server, user and password included.
    if server.is_empty() {
        return Err(Error::invalid(format!("a {scheme}:// address without a server")).hint(FORM));
    }
    // Nothing is repeated before it is known to carry no password and no signature.
    if server.contains('@') {
        return Err(Error::invalid(format!("a {scheme}:// address with user or password in it")).hint(
            "leave them out: they are taken from the netrc (~/.netrc) or from [credentials] in the configuration file",
        ));
    }
    if rest.contains('?') {
        return Err(Error::invalid(format!("a {scheme}:// address with a query (from '?' on)")).hint(
            "use the address without it, with credentials in the netrc or the configuration file; \
             or fetch it yourself and `modelcache put NAME@VERSION FILE`",
        ));
    }
    let refuse =
        |why: &str| Error::invalid(format!("{}: {why}", redact::reference(&format!("{scheme}://{rest}")))).hint(FORM);
    if rest.chars().any(|c| c.is_control() || c == '\\') {
        return Err(refuse("contains a control character or a backslash"));
    }
    let dots = |segment: &str| matches!(segment.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..");
    if path.split('/').any(dots) {
        return Err(refuse("the path climbs"));
    }
    let (folder, file) = path.split_at(path.rfind('/').map_or(0, |at| at + 1));
    let (file, version) = match file.rsplit_once('@') {
        Some((file, version)) => (file, Some(Version::new(version).map_err(|error| refuse(error.message()))?)),
        None => (file, None),
    };
    if file.is_empty() {
        return Err(refuse("names no file"));
    }
    let url = Url::parse(&format!("{scheme}://{server}/{folder}{file}"))
        .map_err(|cause| refuse("is no address").cause(cause))?;
    let file = WebFile { url, version };
    file.name()?;
    file.path()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web(text: &str) -> Result<WebFile> {
        let (scheme, rest) = text.split_once("://").expect("a scheme");
        parse(scheme, rest)
    }

    #[test]
    fn the_last_at_after_the_final_slash_splits_off_the_version() {
        for (text, url, version, name, path) in [
            ("https://h/a/m.bin", "https://h/a/m.bin", None, "https/h/a/m.bin", "m.bin"),
            ("https://h/a/m.bin@3", "https://h/a/m.bin", Some("3"), "https/h/a/m.bin", "m.bin"),
            ("https://h/@a/m.bin", "https://h/@a/m.bin", None, "https/h/%40a/m.bin", "m.bin"),
            ("https://h/m@2x@1.0", "https://h/m@2x", Some("1.0"), "https/h/m%402x", "m@2x"),
            ("https://h/m%402x.bin", "https://h/m%402x.bin", None, "https/h/m%402x.bin", "m@2x.bin"),
            ("http://H:8080/m", "http://h:8080/m", None, "http/h:8080/m", "m"),
            ("https://h:443/m", "https://h/m", None, "https/h/m", "m"),
            ("https://[::1]:9/m", "https://[::1]:9/m", None, "https/[::1]:9/m", "m"),
            ("https://h/g%2Fp/f%C3%A9 x", "https://h/g%2Fp/f%C3%A9%20x", None, "https/h/g%2Fp/fé x", "fé x"),
        ] {
            let file = web(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((file.url.as_str(), file.version.as_ref().map(Version::as_str)), (url, version), "{text}");
            assert_eq!(file.name().expect("name").as_str(), name, "{text}");
            assert_eq!(file.path().expect("path").as_str(), path, "{text}");
            assert_eq!(web(&file.to_string()).expect("prints what parses"), file, "{text}");
        }
    }

    #[test]
    fn distinct_addresses_have_distinct_names() {
        let names: std::collections::BTreeSet<_> = [
            "https://h/a/b",
            "http://h/a/b",
            "https://h/a%2Fb",
            "https://h/a%252Fb",
            "https://h:1/a/b",
            "https://h/A/b",
        ]
        .map(|text| web(text).expect(text).name().expect("name").as_str().to_owned())
        .into();
        assert_eq!(names.len(), 6, "{names:?}");
    }

    #[test]
    fn addresses_that_climb_confuse_or_carry_secrets_are_refused_without_repeating_them() {
        for bad in [
            "https://",
            "https://h",
            "https://h/",
            "https://h/d/",
            "https:///a",
            "https://h//a",
            "https://h/a/../b",
            "https://h/%2e%2E/b",
            "https://h/a\\b",
            "https://h/a%5Cb",
            "https://h/a\nb",
            "https://h/..%2fb/%2e.",
            "https://h/x%2f..",
            "https://h/a@",
            "https://h/a@..",
            "https://h/%ff",
            "https://h/.modelcache",
            "https://h:x/a",
            "https://user:canary@h/a",
            "https://canary@h/a",
            "https://h/a?sig=canary",
            "https://h?sig=canary",
            "https://u:canary@h",
        ] {
            let error = web(bad).err().unwrap_or_else(|| panic!("{bad} was accepted"));
            assert!(
                error.hint_text().is_some() || error.message().contains("name") || error.message().contains("path"),
                "{bad}: {error}"
            );
            assert!(!format!("{error:?}").contains("canary"), "{error}");
            assert!(!redact::reference(bad).contains("canary"), "{bad}");
        }
    }
}
