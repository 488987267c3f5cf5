//! Opening what is read: a staged file, a lent one.
//!
//! A file that is still being filled is opened for reading only. As long as that lasts the kernel shall read nothing
//! ahead: what it found there before it was written could stay in memory for what was written.

use super::io_error::IoContext;
use super::{LeasedArtifact, RootedPath, files};
use crate::error::Result;
use crate::key::FilePath;
use rustix::fs::{Advice, fadvise};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;

/// A file on this machine that is to be read.
#[derive(Debug, Clone)]
pub struct LocalFile(Place);

#[derive(Debug, Clone)]
enum Place {
    /// The caller's own, wherever it lies.
    Given(PathBuf),
    /// One of the cache directory.
    Cached(RootedPath),
}

impl LocalFile {
    pub(crate) fn open(&self) -> io::Result<File> {
        match &self.0 {
            Place::Given(path) => File::open(path), // outside the root
            Place::Cached(path) => path.open(false),
        }
    }
}

impl From<PathBuf> for LocalFile {
    fn from(path: PathBuf) -> Self {
        Self(Place::Given(path))
    }
}

impl From<RootedPath> for LocalFile {
    fn from(path: RootedPath) -> Self {
        Self(Place::Cached(path))
    }
}

impl fmt::Display for LocalFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Given(path) => path.display().fmt(f),
            Place::Cached(path) => path.fmt(f),
        }
    }
}

/// The file staged at `path`, if there is one: whoever opens it sees whether it is the one that was meant.
pub(crate) fn open_staged(path: &RootedPath) -> Result<Option<File>> {
    let Some(file) = files::absent(path.open(false)).at("open", path)? else { return Ok(None) };
    // Advice: where it is not taken, nothing is lost.
    let _ = fadvise(&file, 0, None, Advice::Random);
    Ok(Some(file))
}

/// Has the kernel read ahead again in a file that is whole by now.
pub(crate) fn read_ahead_again(file: &File) {
    let _ = fadvise(file, 0, None, Advice::Normal);
}

impl LeasedArtifact {
    /// One of its files, for reading.
    pub(crate) fn open(&self, file: &FilePath) -> Result<File> {
        let view = self.dir.view(file);
        view.open(false).at("open", &view)
    }
}
