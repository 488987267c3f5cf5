//! Refuses a cache directory that another user planted in a folder such as `/tmp`.
//!
//! In a sticky folder that all users can write, any user can create or link the directory first, and fill it with
//! manifests and bytes that match each other. Trusted owners are this user, root, and the owner of the folder above. If
//! the directory is configured as shared, every owner is trusted, but only of a folder, not of a symbolic link.

use super::io_error::IoContext;
use super::rooted::RootedPath;
use crate::config::Sharing;
use crate::error::{Error, ErrorKind, Result, Tier};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Mode bits of a folder such as `/tmp`: sticky, and writable by every user.
const OPEN_TO_ALL: u32 = 0o1002;

/// Refuses a root that was replaced while the symbolic links in its path were resolved.
///
/// `real` is the folder that they led to. If `root` itself is not a link, it must be that folder.
pub(super) fn check_same(root: &Path, real: &RootedPath) -> Result<()> {
    let named = fs::symlink_metadata(root).at("examine", root)?;
    let real = real.metadata().at("examine", root)?;
    if named.is_symlink() || (named.dev(), named.ino()) == real.device_and_inode() {
        return Ok(());
    }
    let message = format!("{} was replaced while it was opened", root.display());
    Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint("check which users can rename that folder"))
}

/// Refuses a root that an untrusted user created in a sticky folder that all users can write.
pub(super) fn check(root: &Path, sharing: Sharing) -> Result<()> {
    let Some(found) = super::rooted::absent(std::fs::symlink_metadata(root)).at("examine", root)? else {
        return Ok(());
    };
    // `/` has no folder above it in which another user could have planted it.
    let Some(above) = root.parent() else { return Ok(()) };
    let above = fs::metadata(above).at("examine", above)?;
    if above.mode() & OPEN_TO_ALL != OPEN_TO_ALL {
        return Ok(());
    }
    // Trust the owner, or any owner of a shared folder. Of a symbolic link, the owner of the link itself counts.
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
    let message =
        format!("{} is {what} that user {} created in a folder that is writable for all", root.display(), found.uid());
    Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint(hint))
}
