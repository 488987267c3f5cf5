//! Opening files for reading: staged files that are still being written, and files of a leased artifact.

use super::io_error::IoContext;
use super::{LeasedArtifact, RootedPath, files};
use crate::error::Result;
use crate::key::FilePath;
use rustix::fs::{Advice, fadvise};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;

/// A file on this machine that can be opened for reading.
#[derive(Debug, Clone)]
pub struct LocalFile(Location);

#[derive(Debug, Clone)]
enum Location {
    /// A file of the caller, outside the cache directory.
    External(PathBuf),
    /// A file in the cache directory.
    Cached(RootedPath),
}

impl LocalFile {
    pub(crate) fn open(&self) -> io::Result<File> {
        match &self.0 {
            Location::External(path) => File::open(path), // not below the root
            Location::Cached(path) => path.open(false),
        }
    }
}

impl From<PathBuf> for LocalFile {
    fn from(path: PathBuf) -> Self {
        Self(Location::External(path))
    }
}

impl From<RootedPath> for LocalFile {
    fn from(path: RootedPath) -> Self {
        Self(Location::Cached(path))
    }
}

impl fmt::Display for LocalFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Location::External(path) => path.display().fmt(f),
            Location::Cached(path) => path.fmt(f),
        }
    }
}

/// Opens the staged file at `path`; `None` if it is missing. The caller must check that it is the expected file.
pub(crate) fn open_staged(path: &RootedPath) -> Result<Option<File>> {
    let Some(file) = files::absent(path.open(false)).at("open", path)? else { return Ok(None) };
    // Disable readahead while the file may still be written with O_DIRECT: pages that were read ahead of such a write
    // would stay in the page cache and hide the new data. A filesystem may ignore this advice.
    let _ = fadvise(&file, 0, None, Advice::Random);
    Ok(Some(file))
}

/// Enables readahead again. Call this when the file is complete.
pub(crate) fn restore_readahead(file: &File) {
    let _ = fadvise(file, 0, None, Advice::Normal);
}

impl LeasedArtifact {
    /// Opens one of the leased files for reading.
    pub(crate) fn open(&self, file: &FilePath) -> Result<File> {
        let view = self.dir.view(file);
        view.open(false).at("open", &view)
    }
}
