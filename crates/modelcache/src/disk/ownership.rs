//! Refuses a cache directory that an untrusted user created in a folder such as `/tmp`.
//!
//! In a sticky folder that all users can write, any user can create the directory or a link at its path, and fill it
//! with manifests and bytes that match each other. Trusted owners are this user, root, and the owner of the parent
//! folder. If the directory is configured as shared, the owner of a folder is always trusted, but not the owner of a
//! symbolic link.

use super::io_error::IoContext;
use super::rooted::RootedPath;
use crate::config::Sharing;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::option_name::setting::{DIR, SHARED};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Mode bits of a folder such as `/tmp`: sticky, and writable by every user.
const STICKY_AND_WORLD_WRITABLE: u32 = 0o1002;

/// Refuses a root that was replaced while the symbolic links in its path were resolved.
///
/// `real` is the folder to which the links led. If `root` itself is not a link, it must be that folder.
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
    let Some(found) = super::rooted::absent(fs::symlink_metadata(root)).at("examine", root)? else {
        return Ok(());
    };
    // `/` has no parent folder, so no other user can have created it.
    let Some(parent) = root.parent() else { return Ok(()) };
    let parent = fs::metadata(parent).at("examine", parent)?;
    if parent.mode() & STICKY_AND_WORLD_WRITABLE != STICKY_AND_WORLD_WRITABLE {
        return Ok(());
    }
    // `found` describes a symbolic link itself, not its target, so this is the owner of the link.
    let this_user = rustix::process::geteuid().as_raw();
    if [this_user, 0, parent.uid()].contains(&found.uid()) || (found.is_dir() && sharing != Sharing::Off) {
        return Ok(());
    }
    let (what, hint) = match found.is_symlink() {
        true => ("a symbolic link", format!("point {DIR} to a folder of your own")),
        false => ("a folder", format!("point {DIR} to a folder of your own, or set {SHARED} if you trust that user")),
    };
    let message =
        format!("{} is {what} that user {} created in a folder that is writable for all", root.display(), found.uid());
    Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint(hint))
}
