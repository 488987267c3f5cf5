//! Reads the environment and the configuration files for front ends.
//!
//! A file that exists but cannot be read is an error. A missing file is skipped, unless the user named it.

use super::{ConfigFiles, FILE_VARIABLE, Settings, netrc_path};
use crate::config::Environment;
use crate::error::{Error, ErrorKind, Result};
use crate::option_name::call::CONFIG;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Converts environment variables to text. Fails if a `MODEL_CACHE_*` variable is not UTF-8. Ignores other variables
/// that are not UTF-8.
pub fn environment(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Environment> {
    let mut environment = Environment::default();
    for (name, value) in variables {
        let Ok(name) = name.into_string() else { continue };
        match value.into_string() {
            Ok(value) => {
                environment.0.insert(name, value);
            }
            Err(_) if name.starts_with("MODEL_CACHE_") => {
                return Err(Error::invalid(format!("{name} is not UTF-8")));
            }
            Err(_) => {}
        }
    }
    Ok(environment)
}

/// Reads the configuration files. Returns the path and text of each file that exists.
pub fn read_files(files: ConfigFiles) -> Result<Vec<(PathBuf, String)>> {
    let refuse = |path: &Path, cause: io::Error| {
        Error::invalid(format!("cannot read the configuration file {}", path.display())).cause(cause)
    };
    match files {
        ConfigFiles::Named(path) => match std::fs::read_to_string(&path) {
            Ok(text) => Ok(vec![(path, text)]),
            Err(cause) => Err(refuse(&path, cause).hint(format!("{CONFIG} and {FILE_VARIABLE} name a TOML file"))),
        },
        ConfigFiles::Usual(paths) => paths
            .into_iter()
            .filter_map(|path| match read_if_there(&path) {
                Ok(None) => None,
                Ok(Some(text)) => Some(Ok((path, text))),
                Err(cause) => Some(Err(refuse(&path, cause))),
            })
            .collect(),
    }
}

/// Reads a file. Returns `None` if it does not exist.
pub fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Settings {
    /// Completes the settings from the local machine: checks whether other users may read the netrc, and makes the
    /// cache directory absolute.
    pub fn completed_on_this_machine(mut self, environment: &Environment) -> Result<Self> {
        if netrc_path(environment).is_some_and(|path| others_may_read(&path)) {
            self.config.credentials.mark_netrc_readable_by_others();
        }
        self.config.dir = std::path::absolute(&self.config.dir).map_err(|cause| {
            Error::new(ErrorKind::Directory, "the current folder cannot be determined").cause(cause)
        })?;
        Ok(self)
    }
}

/// Returns true if users other than the owner may read the file.
fn others_may_read(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.mode() & 0o044 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn only_modelcache_variables_must_be_utf_8() {
        let bad = || OsString::from_vec(vec![0xff]);
        let read = environment([("LESS".into(), bad()), (bad(), "x".into()), ("A".into(), "b".into())]);
        assert_eq!(read.expect("environment").get("A"), Some("b"));
        assert!(environment([("MODEL_CACHE_DIR".into(), bad())]).is_err());
    }
}
