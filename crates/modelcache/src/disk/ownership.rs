//! Whose directory it is: one that a stranger planted in a folder open to all is not used.
//!
//! In a sticky folder that everybody writes (`/tmp`) any user can make, or link, the directory first and fill it with
//! manifests and bytes that agree with each other. Owners that are trusted: this user, root, the owner of the folder
//! above; anybody once the directory is said to be shared, except for a link.

use super::io_error::IoContext;
use super::rooted::RootedPath;
use crate::config::Sharing;
use crate::error::{Error, ErrorKind, Result, Tier};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The sticky bit, and writable for all.
const OPEN_TO_ALL: u32 = 0o1002;

/// Refuses a root that was replaced while links to it were resolved: `real` is where they led, and a folder called `root` is
/// another one.
pub(super) fn check_same(root: &Path, real: &RootedPath) -> Result<()> {
    let named = fs::symlink_metadata(root).at("look at", root)?;
    let real = real.metadata().at("look at", root)?;
    if named.is_symlink() || (named.dev(), named.ino()) == real.device_and_inode() {
        return Ok(());
    }
    let message = format!("{} was replaced while it was opened", root.display());
    Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint("see who can rename that folder"))
}

/// Refuses a root that somebody else put into a folder open to all.
pub(super) fn check(root: &Path, sharing: Sharing) -> Result<()> {
    let Some(found) = super::rooted::absent(std::fs::symlink_metadata(root)).at("look at", root)? else {
        return Ok(());
    };
    let Some(above) = root.parent() else { return Ok(()) };
    let above = fs::metadata(above).at("look at", above)?;
    if above.mode() & OPEN_TO_ALL != OPEN_TO_ALL {
        return Ok(());
    }
    let us = rustix::process::geteuid().as_raw();
    if [us, 0, above.uid()].contains(&found.uid()) || (found.is_dir() && sharing != Sharing::Off) {
        return Ok(());
    }
    let (what, hint) = match found.is_symlink() {
        true => ("a symbolic link", "point MODEL_CACHE_DIR to a folder of your own"),
        false => (
            "a folder",
            "point MODEL_CACHE_DIR to a folder of your own, or set MODEL_CACHE_SHARED if you trust that user",
        ),
    };
    let message = format!("{} is {what} that user {} made where everybody can", root.display(), found.uid());
    Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint(hint))
}
