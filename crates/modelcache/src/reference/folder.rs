//! References to local folders and files: `file:///path`.

use crate::error::{Error, Result};
use crate::key::ArtifactName;
use crate::redact;
use percent_encoding::percent_decode_str;

/// Parses the text after `file://`. Returns the absolute path.
pub(super) fn parse(rest: &str) -> Result<String> {
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
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() {
        return Err(refuse("the root folder cannot be an artifact"));
    }
    Ok(format!("/{}", parts.join("/")))
}

/// Returns the artifact name of the folder or file at the absolute `path`.
pub fn folder_name(path: &str) -> Result<ArtifactName> {
    ArtifactName::from_uri("file", path.split('/').filter(|part| !part.is_empty()))
}
