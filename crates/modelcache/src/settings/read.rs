//! Reading the files that settings come from, for doors.
//!
//! The environment is handed in: only the door's own process has one. A file that is there and cannot be read is an
//! error with its path; one that is not there counts as empty, unless a person named it.

use super::{ConfigFiles, Settings, netrc_path};
use crate::config::Environment;
use crate::error::{Error, ErrorKind, Result};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The variables as text. One of ours that is not UTF-8 is refused; others are none of our business.
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

/// Paths and texts of the configuration files.
pub fn read_files(files: ConfigFiles) -> Result<Vec<(PathBuf, String)>> {
    let refuse = |path: &Path, cause: io::Error| {
        Error::invalid(format!("cannot read the configuration file {}", path.display())).cause(cause)
    };
    match files {
        ConfigFiles::Named(path) => match std::fs::read_to_string(&path) {
            Ok(text) => Ok(vec![(path, text)]),
            Err(cause) => Err(refuse(&path, cause).hint("--config and MODEL_CACHE_CONFIG name a TOML file")),
        },
        ConfigFiles::Usual(paths) => paths
            .into_iter()
            .filter_map(|path| match read_if_there(&path) {
                Ok(text) => Some(Ok((path, text?))),
                Err(cause) => Some(Err(refuse(&path, cause))),
            })
            .collect(),
    }
}

/// The text of a file; `None` if there is no such file.
pub fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Settings {
    /// The settings with what only this machine tells: whether others may read the netrc, and where a directory lies
    /// that was named from the present folder.
    pub fn placed(mut self, environment: &Environment) -> Result<Self> {
        if netrc_path(environment).is_some_and(|path| others_may_read(&path)) {
            self.config.credentials.netrc_is_open();
        }
        self.config.dir = std::path::absolute(&self.config.dir)
            .map_err(|cause| Error::new(ErrorKind::Directory, "the present folder is not known").cause(cause))?;
        Ok(self)
    }
}

/// Whether users other than the owner may read the file.
fn others_may_read(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.mode() & 0o044 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn only_our_own_variables_must_be_utf8() {
        let bad = || OsString::from_vec(vec![0xff]);
        let read = environment([("LESS".into(), bad()), (bad(), "x".into()), ("A".into(), "b".into())]);
        assert_eq!(read.expect("environment").get("A"), Some("b"));
        assert!(environment([("MODEL_CACHE_DIR".into(), bad())]).is_err());
    }
}
