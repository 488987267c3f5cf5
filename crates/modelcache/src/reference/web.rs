//! References to one file on a web server: `https://host/path/file[@version]`.
//!
//! The last `@` after the final `/` precedes the version. In a reference without a version, an `@` in the file name is
//! written `%40`. The artifact name has scheme, host, port, and every segment of the path.
//!
//! A URL with a query is refused. A query is often a signature, which would become a part of names, listings and logs,
//! and which changes over time.

use super::location::Location;
use super::{Pointer, Reference, Scheme, Target};
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::redact;
use percent_encoding::percent_decode_str;
use std::fmt;
use url::Url;

/// Hint for an invalid reference.
const FORM_HINT: &str = "write https://host/path/file or https://host/path/file@version";

/// The scheme of web servers.
pub(crate) static SCHEME: Scheme = Scheme {
    alias: Some("http://"),
    decodes_escapes: true,
    redacts_errors: true,
    ..Scheme::built_in("https://", &["https", "http"], "https://host/file", parse)
};

/// The revision of a URL without a version: the server's current content.
const REVISION: &str = "current";

/// One file on a web server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WebFile {
    /// The URL, without user, password, query and fragment.
    pub url: Url,
    /// The version in the reference. `None`: the version is derived from the server's response.
    pub version: Option<Version>,
}

/// The prefixes of derived versions: from the entity tag, from date and size, or from the digest of the bytes.
const DERIVED: [&str; 3] = ["etag-", "modified-", "sha256-"];

/// Returns true if `version` has the form of a version that was derived from a server's response.
pub(crate) fn is_derived(version: &Version) -> bool {
    DERIVED.iter().any(|prefix| version.as_str().starts_with(prefix))
}

impl WebFile {
    /// Returns the artifact name: scheme, host and port, path.
    pub fn name(&self) -> Result<ArtifactName> {
        let host = self.url.host_str().unwrap_or_default();
        let server = self.url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let segments = [server].into_iter().chain(self.segments()?).collect::<Vec<_>>();
        ArtifactName::from_uri(self.url.scheme(), segments.iter().map(String::as_str))
    }

    /// Returns the path of the file within its artifact: the last segment, or the part after an encoded slash in it.
    pub fn path(&self) -> Result<FilePath> {
        let last = self.segments()?.pop().unwrap_or_default();
        FilePath::new(last.rsplit('/').next().unwrap_or_default())
    }

    /// Returns the key of this file at `version`.
    pub fn key_at(&self, version: Version) -> Result<ArtifactKey> {
        Ok(ArtifactKey::new(self.name()?, version))
    }

    /// Returns the decoded segments of the path.
    fn segments(&self) -> Result<Vec<String>> {
        let decoded = |segment: &str| {
            let text = percent_decode_str(segment).decode_utf8();
            text.map(String::from).map_err(|_| Error::invalid(format!("{}: the path is not UTF-8", self.url)))
        };
        self.url.path_segments().into_iter().flatten().map(decoded).collect()
    }
}

impl Location for WebFile {
    fn scheme(&self) -> Option<&'static Scheme> {
        Some(&SCHEME)
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        self.key_at(self.version.clone()?).ok()
    }

    fn pointer(&self) -> Option<Pointer> {
        let name = self.name().ok()?;
        self.version.is_none().then(|| Pointer { name, revision: REVISION.to_owned() })
    }

    fn with_version(&self, version: &Version) -> Option<Target> {
        Some(Target::Web(Self { version: Some(version.clone()), ..self.clone() }))
    }

    fn can_resolve_to(&self, version: &Version) -> bool {
        is_derived(version)
    }
}

/// Formats as a reference.
impl fmt::Display for WebFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.as_str())?;
        self.version.as_ref().map_or(Ok(()), |version| write!(f, "@{version}"))
    }
}

/// Parses the text after `https://` or `http://`: `host/path/file[@version]`.
fn parse(prefix: &str, rest: &str) -> Result<Reference> {
    let file = parse_file(prefix.trim_end_matches("://"), rest)?;
    Ok(Reference { target: Target::Web(file), file: None, digest: None })
}

/// Returns the reference to the repository or file that a page of the public Hub shows; `None` for any other URL, and
/// for the URL of a file (`…/resolve/…`).
fn hub_page(server: &str, path: &str) -> Option<String> {
    const OTHER_PAGES: [&str; 9] = ["api", "blog", "docs", "front", "join", "learn", "papers", "posts", "settings"];
    if !["huggingface.co", "www.huggingface.co", "hf.co"].contains(&server) {
        return None;
    }
    let segments: Vec<&str> = path.trim_end_matches('/').split('/').collect();
    let (kind, rest) = match segments.as_slice() {
        [kind @ ("datasets" | "spaces"), rest @ ..] if rest.len() > 1 => (format!("{kind}/"), rest),
        ["models", rest @ ..] if !rest.is_empty() => (String::new(), rest),
        [first, ..] if OTHER_PAGES.contains(first) || first.is_empty() => return None,
        rest => (String::new(), rest),
    };
    match rest {
        [name] => Some(format!("hf://{kind}{name}")),
        [owner, name] => Some(format!("hf://{kind}{owner}/{name}")),
        [owner, name, "tree" | "blob" | "raw", revision, file @ ..] => {
            let file = file.iter().map(|segment| format!("/{segment}")).collect::<String>();
            Some(format!("hf://{kind}{owner}/{name}@{revision}{file}"))
        }
        _ => None,
    }
}

/// Parses the text after `<scheme>://`.
///
/// # Errors
/// `Invalid`. The message quotes no password and no signature.
fn parse_file(scheme: &str, rest: &str) -> Result<WebFile> {
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    // URL parsers skip extra slashes and would take the next segment, with user and password, as the server.
    if server.is_empty() {
        return Err(Error::invalid(format!("a {scheme}:// URL without a server")).hint(FORM_HINT));
    }
    // The text may contain a password or a signature. The messages of these two checks do not quote it.
    if server.contains('@') {
        return Err(Error::invalid(format!("a {scheme}:// URL with user or password")).hint(
            "leave them out: credentials are read from the netrc (~/.netrc) or from [credentials] in the configuration \
             file",
        ));
    }
    if rest.contains('?') {
        return Err(Error::invalid(format!("a {scheme}:// URL with a query (from '?' on)")).hint(
            "leave the query out, and put credentials into the netrc or the configuration file; \
             or download the file, and publish it with `modelcache put NAME@VERSION FILE`",
        ));
    }
    if let Some(repository) = hub_page(server, path) {
        let message = format!("{scheme}://{server}/{path} is a page of the Hugging Face Hub, not a file");
        return Err(Error::invalid(message).hint(format!("write {repository}")));
    }
    let refuse = |why: &str| {
        Error::invalid(format!("{}: {why}", redact::reference(&format!("{scheme}://{rest}")))).hint(FORM_HINT)
    };
    if rest.chars().any(|c| c.is_control() || c == '\\') {
        return Err(refuse("contains a control character or a backslash"));
    }
    let is_dot_segment =
        |segment: &str| matches!(segment.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..");
    if path.split('/').any(is_dot_segment) {
        return Err(refuse("the path contains '.' or '..'"));
    }
    let (folder, file) = path.split_at(path.rfind('/').map_or(0, |at| at + 1));
    let (file, version) = match file.rsplit_once('@') {
        Some((file, version)) => (file, Some(Version::new(version).map_err(|error| refuse(error.message()))?)),
        None => (file, None),
    };
    if file.is_empty() {
        return Err(refuse("the URL has no file name"));
    }
    let url = Url::parse(&format!("{scheme}://{server}/{folder}{file}"))
        .map_err(|cause| refuse("not a valid URL").cause(cause))?;
    let file = WebFile { url, version };
    file.name()?;
    file.path()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_the_hub_is_refused_with_the_reference_that_it_shows() {
        for (url, reference) in [
            ("https://huggingface.co/gpt2", "hf://gpt2"),
            ("https://huggingface.co/org/model/", "hf://org/model"),
            ("http://hf.co/org/model", "hf://org/model"),
            ("https://huggingface.co/datasets/org/name", "hf://datasets/org/name"),
            ("https://huggingface.co/org/model/tree/v1", "hf://org/model@v1"),
            ("https://huggingface.co/org/model/blob/main/sub/a.json", "hf://org/model@main/sub/a.json"),
        ] {
            let error = Reference::parse(url).expect_err("a page");
            assert_eq!(error.hint_text(), Some(format!("write {reference}").as_str()), "{url}");
            assert!(Reference::parse(reference).is_ok(), "{reference}");
        }
        for file in ["https://huggingface.co/org/model/resolve/main/a.bin", "https://h/org/model"] {
            assert!(Reference::parse(file).is_ok(), "{file}");
        }
    }

    fn web(text: &str) -> Result<WebFile> {
        let (scheme, rest) = text.split_once("://").expect("a scheme");
        parse_file(scheme, rest)
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
    fn distinct_urls_have_distinct_names() {
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
    fn invalid_urls_and_urls_with_secrets_are_refused_without_quoting_them() {
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
