//! Opening what is read: a staged file, a lent one.
//!
//! A file that is still being filled is opened for reading only. As long as that lasts the kernel shall read nothing
//! ahead: what it found there before it was written could stay in memory for what was written.

use super::fault::At;
use super::{Lent, files, modes};
use crate::error::Result;
use crate::key::FilePath;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::path::Path;

/// The file staged at `path`, if there is one: whoever opens it sees whether it is the one that was meant.
pub(crate) fn open_staged(path: &Path) -> Result<Option<File>> {
    let Some(file) = files::absent(modes::open_existing(path, false)).at("open", path)? else { return Ok(None) };
    // Advice: where it is not taken, nothing is lost.
    let _ = fadvise(&file, 0, None, Advice::Random);
    Ok(Some(file))
}

/// Has the kernel read ahead again in a file that is whole by now.
pub(crate) fn read_ahead_again(file: &File) {
    let _ = fadvise(file, 0, None, Advice::Normal);
}

impl Lent {
    /// One of its files, for reading.
    pub(crate) fn open(&self, file: &FilePath) -> Result<File> {
        let view = self.dir.view(file);
        modes::open_existing(&view, false).at("open", &view)
    }
}
