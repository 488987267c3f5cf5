//! Making files and folders: who else may write them follows from the folder that they are made in.
//!
//! The setting decides the modes of the top folders when they are made; whatever is made below follows its folder, so
//! that a process which was not told that the directory is shared does not close it to the others. In a folder that
//! only its owner writes the umask decides. In a shared one the mode is set before the name appears: a crash in between
//! cannot leave a folder that others find and may not use. Nothing that exists is changed, and no link is followed.
//!
//! A shared folder whose names only their owners need to remove is sticky, so that no other user can put something else
//! in their place.

use super::files::{TEMPORARY, random_name};
use super::io_error::{IoContext, errno};
use super::rooted::RootedPath;
use crate::config::Sharing;
use crate::error::Result;
use rustix::fs::RenameFlags;
use rustix::io::Errno;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;

/// Every user may write it.
const WORLD_WRITE: u32 = 0o002;
/// The group may write it.
const GROUP_WRITE: u32 = 0o020;
/// What is made in the folder gets the folder's group.
const SET_GROUP: u32 = 0o2000;
/// A name in the folder can be removed or replaced by its owner, the folder's owner and root only.
const STICKY: u32 = 0o1000;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileUse {
    /// Others who share the folder must write it: locks, the last use, journals, the budget record.
    Written,
    /// Others read it and replace it by name: manifests, what revisions mean.
    Read,
}

impl FileUse {
    fn mode(self, sharing: Sharing) -> Option<u32> {
        match (self, sharing) {
            (_, Sharing::Off) => None,
            (Self::Read, _) => Some(0o644),
            (Self::Written, Sharing::Group) => Some(0o664),
            (Self::Written, Sharing::World) => Some(0o666),
        }
    }
}

/// Who removes the names in a top folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// Nobody, or their owners.
    ByOwner,
    /// Any user of the directory: to evict, to publish anew, to clean up.
    ByAny,
}

/// Makes one of the top folders, or the directory itself, with the modes that `sharing` wants.
pub(crate) fn make_top_dir(path: &RootedPath, sharing: Sharing, removal: Removal) -> Result<()> {
    let sticky = if removal == Removal::ByOwner { STICKY } else { 0 };
    let mode = match sharing {
        Sharing::Off => None,
        Sharing::Group => Some(SET_GROUP | sticky | 0o775),
        Sharing::World => Some(sticky | 0o777),
    };
    unless_there(path, || create_dir(path, mode)).at("make the cache directory", path)
}

/// Makes a folder in its parent; that it is already there is fine.
pub(crate) fn make_dir(path: &RootedPath) -> io::Result<()> {
    unless_there(path, || make_new_dir(path))
}

/// Makes a folder that must not be there yet.
pub(crate) fn make_new_dir(path: &RootedPath) -> io::Result<()> {
    let parent = mode_of_parent(path)?;
    let mode = match shared_by(parent) {
        Sharing::Off => None,
        Sharing::Group => Some(0o775 | parent & SET_GROUP),
        Sharing::World => Some(0o777 | parent & SET_GROUP),
    };
    create_dir(path, mode)
}

/// Makes a folder and the folders above it that are missing.
pub(crate) fn make_dirs(path: &RootedPath) -> io::Result<()> {
    match make_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_dirs(&path.parent().ok_or(error)?)?;
            make_dir(path)
        }
        made => made,
    }
}

/// Opens a file that everybody writes who shares its folder; makes it, empty, if it is missing. Refuses what is no
/// regular file.
pub(crate) fn open_shared(path: &RootedPath) -> io::Result<File> {
    loop {
        match path.open(true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Replaced since it was opened.
            Err(error) if errno(&error) == Some(Errno::STALE) => {}
            opened => return opened,
        }
        match create(path, FileUse::Written) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
}

/// Makes a new file that everybody writes who shares its folder.
pub(crate) fn create_shared(path: &RootedPath) -> io::Result<File> {
    create(path, FileUse::Written)
}

/// Makes a new file that others read.
pub(crate) fn create_readable(path: &RootedPath) -> io::Result<File> {
    create(path, FileUse::Read)
}

/// Who writes into a folder of this mode.
fn shared_by(mode: u32) -> Sharing {
    match mode {
        mode if mode & WORLD_WRITE != 0 => Sharing::World,
        mode if mode & GROUP_WRITE != 0 => Sharing::Group,
        _ => Sharing::Off,
    }
}

fn mode_of_parent(path: &RootedPath) -> io::Result<u32> {
    Ok(path.parent().as_ref().unwrap_or(path).metadata()?.mode())
}

fn unless_there(path: &RootedPath, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // A link to a folder is none: what it leads to is not ours.
    let there = || path.metadata().is_ok_and(|metadata| metadata.is_dir());
    if there() {
        return Ok(());
    }
    match make() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && there() => Ok(()),
        made => made,
    }
}

/// Makes a folder; with a mode, it has that mode from the moment its name is there.
fn create_dir(path: &RootedPath, mode: Option<u32>) -> io::Result<()> {
    if mode.is_none() {
        return path.create_dir(mode);
    }
    let temporary = path.with_file_name(format!("{TEMPORARY}{}", random_name()));
    let made = temporary.create_dir(mode).and_then(|()| appear(&temporary, path));
    if made.is_err() {
        let _ = temporary.remove_dir();
    }
    made
}

/// Makes a file that must not be there yet; in a shared folder it has its mode from the moment its name is there.
fn create(path: &RootedPath, purpose: FileUse) -> io::Result<File> {
    let Some(mode) = purpose.mode(shared_by(mode_of_parent(path)?)) else { return path.create_new(0o666) };
    let temporary = path.with_file_name(format!("{TEMPORARY}{}", random_name()));
    let file = temporary.create_new(0o666)?;
    let made = file.set_permissions(Permissions::from_mode(mode)).and_then(|()| appear(&temporary, path));
    if made.is_err() {
        let _ = temporary.unlink();
    }
    made.map(|()| file)
}

/// Renames to a name that is free. Filesystems that cannot make sure of that are asked first.
pub(crate) fn appear(temporary: &RootedPath, path: &RootedPath) -> io::Result<()> {
    match temporary.rename_with(path, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) if path.metadata().is_ok() => Err(Errno::EXIST.into()),
        Err(Errno::INVAL | Errno::NOSYS) if temporary.metadata()?.is_dir() => temporary.rename(path),
        Err(Errno::INVAL | Errno::NOSYS) => temporary.hard_link(path).and_then(|()| temporary.unlink()),
        renamed => Ok(renamed?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &RootedPath) -> u32 {
        path.metadata().expect("is there").mode()
    }

    #[test]
    fn what_is_made_below_follows_its_folder() {
        let folder = tempfile::tempdir().expect("folder");
        for (sharing, dirs, written, read) in
            [(Sharing::Group, 0o2775, 0o664, 0o644), (Sharing::World, 0o777, 0o666, 0o644)]
        {
            let top = RootedPath::root(folder.path()).join(format!("{sharing:?}"));
            make_top_dir(&top, sharing, Removal::ByAny).expect("makes");
            let below = top.join("a/b");
            make_dirs(&below).expect("makes");
            assert_eq!((mode(&top), mode(&below)), (dirs, dirs), "{sharing:?}");
            open_shared(&below.join("lock")).expect("opens");
            create_readable(&below.join("manifest")).expect("makes");
            assert_eq!((mode(&below.join("lock")), mode(&below.join("manifest"))), (written, read), "{sharing:?}");
            make_dirs(&below).expect("is there");
            open_shared(&below.join("lock")).expect("is there");
            assert_eq!(below.entries().expect("lists").len(), 2, "no temporary stays");
            let sticky = top.with_file_name(format!("{sharing:?}-sticky"));
            make_top_dir(&sticky, sharing, Removal::ByOwner).expect("makes");
            make_dir(&sticky.join("a")).expect("makes");
            assert_eq!((mode(&sticky), mode(&sticky.join("a"))), (dirs | STICKY, dirs), "{sharing:?}");
        }
    }

    #[test]
    fn links_and_pipes_in_the_place_of_a_file_are_refused() {
        let folder = tempfile::tempdir().expect("folder");
        let path = |name: &str| RootedPath::root(folder.path()).join(name);
        std::fs::write(path("outside").full(), b"").expect("writes");
        path("link").symlink_to(&path("outside").full()).expect("links");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("pipe").full(),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .expect("pipe");
        for name in ["link", "pipe"] {
            assert!(open_shared(&path(name)).is_err(), "{name}");
            assert!(create_shared(&path(name)).is_err(), "{name}");
        }
    }
}
