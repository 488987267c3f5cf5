//! Making files and folders: who else may write them follows from the folder that they are made in.
//!
//! The setting decides the modes of the top folders when they are made; whatever is made below follows its folder, so
//! that a process which was not told that the directory is shared does not close it to the others. In a folder that
//! only its owner writes the umask decides. In a shared one the mode is set before the name appears: a crash in between
//! cannot leave a folder that others find and may not use. Nothing that exists is changed, and no link is followed.

use super::fault::At;
use super::files::{TEMPORARY, random_name};
use crate::config::Sharing;
use crate::error::Result;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Every user may write it.
const WORLD_WRITE: u32 = 0o002;
/// The group may write it.
const GROUP_WRITE: u32 = 0o020;
/// What is made in the folder gets the folder's group.
const SET_GROUP: u32 = 0o2000;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Others who share the folder must write it: locks, the last use, journals, the budget record.
    Written,
    /// Others read it and replace it by name: manifests, what revisions mean.
    Read,
}

impl Use {
    fn mode(self, sharing: Sharing) -> Option<u32> {
        match (self, sharing) {
            (_, Sharing::Off) => None,
            (Self::Read, _) => Some(0o644),
            (Self::Written, Sharing::Group) => Some(0o664),
            (Self::Written, Sharing::World) => Some(0o666),
        }
    }
}

/// Makes one of the top folders, or the directory itself, with the modes that `sharing` wants.
pub(crate) fn make_top_dir(path: &Path, sharing: Sharing) -> Result<()> {
    let mode = match sharing {
        Sharing::Off => None,
        Sharing::Group => Some(SET_GROUP | 0o775),
        Sharing::World => Some(0o777),
    };
    match path.is_dir() {
        true => Ok(()),
        false => unless_there(path, || create_dir(path, mode)).at("make the cache directory", path),
    }
}

/// Makes a folder in its parent; that it is already there is fine.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    unless_there(path, || make_new_dir(path))
}

/// Makes a folder that must not be there yet.
pub(crate) fn make_new_dir(path: &Path) -> io::Result<()> {
    let parent = mode_of_parent(path)?;
    let mode = match shared_by(parent) {
        Sharing::Off => None,
        Sharing::Group => Some(0o775 | parent & SET_GROUP),
        Sharing::World => Some(0o777 | parent & SET_GROUP),
    };
    create_dir(path, mode)
}

/// Makes a folder and the folders above it that are missing.
pub(crate) fn make_dirs(path: &Path) -> io::Result<()> {
    match make_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_dirs(path.parent().ok_or(error)?)?;
            make_dir(path)
        }
        made => made,
    }
}

/// Opens a file that everybody writes who shares its folder; makes it, empty, if it is missing. Refuses what is no
/// regular file.
pub(crate) fn open_shared(path: &Path) -> io::Result<File> {
    loop {
        match open_existing(path, true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        match create(path, Use::Written) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
}

/// Makes a new file that everybody writes who shares its folder.
pub(crate) fn create_shared(path: &Path) -> io::Result<File> {
    create(path, Use::Written)
}

/// Makes a new file that others read.
pub(crate) fn create_readable(path: &Path) -> io::Result<File> {
    create(path, Use::Read)
}

/// Opens a regular file that exists, for reading and perhaps for writing. A pipe or device that was planted in its
/// place neither blocks the open nor passes.
pub(crate) fn open_existing(path: &Path, write: bool) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(Errno::INVAL.into()) }
}

/// Who writes into a folder of this mode.
fn shared_by(mode: u32) -> Sharing {
    match mode {
        mode if mode & WORLD_WRITE != 0 => Sharing::World,
        mode if mode & GROUP_WRITE != 0 => Sharing::Group,
        _ => Sharing::Off,
    }
}

fn mode_of_parent(path: &Path) -> io::Result<u32> {
    Ok(fs::metadata(path.parent().unwrap_or(path))?.permissions().mode())
}

fn unless_there(path: &Path, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // A link to a folder is none: what it leads to is not ours.
    let there = || fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    if there() {
        return Ok(());
    }
    match make() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && there() => Ok(()),
        made => made,
    }
}

/// Makes a folder; with a mode, it has that mode from the moment its name is there.
fn create_dir(path: &Path, mode: Option<u32>) -> io::Result<()> {
    let Some(mode) = mode else { return fs::create_dir(path) };
    let temporary = path.with_file_name(format!("{TEMPORARY}{}", random_name()));
    fs::create_dir(&temporary)?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::open(&temporary, flags, Mode::empty())
        .and_then(|dir| rustix::fs::fchmod(&dir, Mode::from_raw_mode(mode)))
        .map_err(io::Error::from)
        .and_then(|()| appear(&temporary, path));
    if made.is_err() {
        let _ = fs::remove_dir(&temporary);
    }
    made
}

/// Makes a file that must not be there yet; in a shared folder it has its mode from the moment its name is there.
fn create(path: &Path, purpose: Use) -> io::Result<File> {
    let new = |path: &Path| OpenOptions::new().read(true).write(true).create_new(true).open(path);
    let Some(mode) = purpose.mode(shared_by(mode_of_parent(path)?)) else { return new(path) };
    let temporary = path.with_file_name(format!("{TEMPORARY}{}", random_name()));
    let file = new(&temporary)?;
    let made = file.set_permissions(Permissions::from_mode(mode)).and_then(|()| appear(&temporary, path));
    if made.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    made.map(|()| file)
}

/// Renames to a name that is free. Filesystems that cannot make sure of that are asked first.
pub(crate) fn appear(temporary: &Path, path: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) if fs::symlink_metadata(path).is_ok() => Err(Errno::EXIST.into()),
        Err(Errno::INVAL | Errno::NOSYS) if temporary.is_dir() => fs::rename(temporary, path),
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(temporary, path).and_then(|()| fs::remove_file(temporary)),
        renamed => Ok(renamed?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("is there").permissions().mode() & 0o7777
    }

    #[test]
    fn what_is_made_below_follows_its_folder() {
        let folder = tempfile::tempdir().expect("folder");
        for (sharing, dirs, written, read) in
            [(Sharing::Group, 0o2775, 0o664, 0o644), (Sharing::World, 0o777, 0o666, 0o644)]
        {
            let top = folder.path().join(format!("{sharing:?}"));
            make_top_dir(&top, sharing).expect("makes");
            let below = top.join("a/b");
            make_dirs(&below).expect("makes");
            assert_eq!((mode(&top), mode(&below)), (dirs, dirs), "{sharing:?}");
            open_shared(&below.join("lock")).expect("opens");
            create_readable(&below.join("manifest")).expect("makes");
            assert_eq!((mode(&below.join("lock")), mode(&below.join("manifest"))), (written, read), "{sharing:?}");
            make_dirs(&below).expect("is there");
            open_shared(&below.join("lock")).expect("is there");
            assert_eq!(fs::read_dir(&below).expect("lists").count(), 2, "no temporary stays");
        }
    }

    #[test]
    fn links_and_pipes_in_the_place_of_a_file_are_refused() {
        let folder = tempfile::tempdir().expect("folder");
        let path = |name: &str| folder.path().join(name);
        fs::write(path("outside"), b"").expect("writes");
        std::os::unix::fs::symlink(path("outside"), path("link")).expect("links");
        rustix::fs::mknodat(CWD, path("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("pipe");
        for name in ["link", "pipe"] {
            assert!(open_shared(&path(name)).is_err(), "{name}");
            assert!(create_shared(&path(name)).is_err(), "{name}");
        }
    }
}
