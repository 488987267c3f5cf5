//! Opening what is read: a staged file by its number, a lent one by its place.
//!
//! A file that is still being filled is opened for reading only. As long as that lasts the kernel shall read nothing
//! ahead: what it found there before it was written could stay in memory for what was written.

use super::fault::At;
use super::{Lent, StagedInode, files, modes};
use crate::error::Result;
use crate::key::FilePath;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The file staged at `path`, if it is that one.
pub(crate) fn open_staged(path: &Path, inode: &StagedInode) -> Result<Option<File>> {
    let Some(file) = files::absent(modes::open_existing(path, false)).at("open", path)? else { return Ok(None) };
    let is_it = file.metadata().at("look at", path)?.ino() == inode.number();
    // Advice: where it is not taken, nothing is lost.
    let _ = fadvise(&file, 0, None, Advice::Random);
    Ok(is_it.then_some(file))
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
