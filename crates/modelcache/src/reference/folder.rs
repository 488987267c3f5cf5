//! References to local folders and files: `file:///path`.

use super::location::Location;
use super::{Pointer, Reference, Scheme, Target, encoded};
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName};
use crate::redact;
use percent_encoding::percent_decode_str;
use std::fmt;

/// The scheme of local folders and files.
pub(crate) static SCHEME: Scheme =
    Scheme { decodes_escapes: true, ..Scheme::built_in("file://", &["file"], "file:///folder-or-file", parse) };

/// The absolute path of a local file or folder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FolderPath(String);

impl FolderPath {
    /// Returns the path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A folder has neither an exact key nor a pointer, because its version depends on its present content.
impl Location for FolderPath {
    fn scheme(&self) -> Option<&'static Scheme> {
        Some(&SCHEME)
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        None
    }

    fn pointer(&self) -> Option<Pointer> {
        None
    }
}

/// Formats as a reference.
impl fmt::Display for FolderPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file://{}", encoded(&self.0))
    }
}

/// Parses the text after `file://`.
fn parse(_prefix: &str, rest: &str) -> Result<Reference> {
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    let text = redact::reference(&format!("file://{rest}"));
    let refuse = |why: &str| Error::invalid(format!("{text}: {why}")).hint("write file:///absolute/path");
    if !path.starts_with('/') {
        return Err(refuse("the path is not absolute"));
    }
    let path = percent_decode_str(path).decode_utf8().map_err(|_| refuse("the path is not UTF-8"))?;
    if path.contains('\0') || path.split('/').any(|segment| segment == "..") {
        return Err(refuse("the path contains '..' or a NUL byte"));
    }
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty() && *segment != ".").collect();
    if segments.is_empty() {
        return Err(refuse("the root folder cannot be an artifact"));
    }
    let path = FolderPath(format!("/{}", segments.join("/")));
    Ok(Reference { target: Target::Folder(path), file: None, digest: None })
}

/// Returns the artifact name of the folder or file at the absolute `path`.
pub fn folder_name(path: &str) -> Result<ArtifactName> {
    ArtifactName::from_uri("file", path.split('/').filter(|segment| !segment.is_empty()))
}
