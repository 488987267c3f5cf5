//! Creates files and folders with the permissions that the mode of the parent folder implies.
//!
//! `MODEL_CACHE_SHARED` decides the modes of the top folders when they are created. The mode of every entry below them
//! follows from its parent, so that a process without that setting does not lock out the other users. If only the owner
//! can write to the parent, the umask decides. Modes of existing entries are never changed, and no symbolic link is
//! followed.
//!
//! A shared top folder is sticky if only the owner of an entry in it needs to remove it. Then no user can replace an
//! entry of another user. The folders below it are not sticky.

use super::files::{TEMPORARY_PREFIX, random_name};
use super::io_error::{IoContext, errno};
use super::link::is_refusal;
use super::optional;
use super::rooted::RootedPath;
use crate::config::Sharing;
use crate::error::Result;
use rustix::fs::RenameFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;

/// Mode bit: every user may write.
const WORLD_WRITE: u32 = 0o002;
/// Mode bit: the group may write.
const GROUP_WRITE: u32 = 0o020;
/// Mode bit of folders: new entries get the folder's group.
const SET_GROUP: u32 = 0o2000;
/// Mode bit of folders: only the owner of an entry, the owner of the folder and root can remove or replace the entry.
const STICKY: u32 = 0o1000;

/// How other users of the directory use a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileUse {
    /// Other users write the file: locks, `last-used`, journals, the budget record.
    Written,
    /// Other users read the file, and replace it by rename: manifests and refs.
    Read,
}

impl FileUse {
    /// Returns the mode of a new file; `None` if the umask decides.
    fn mode(self, sharing: Sharing) -> Option<u32> {
        match (self, sharing) {
            (_, Sharing::Off) => None,
            (Self::Read, _) => Some(0o644),
            (Self::Written, Sharing::Group) => Some(0o664),
            (Self::Written, Sharing::World) => Some(0o666),
        }
    }
}

/// The users that need to remove entries from a top folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// No user but the owner of each entry. The folder can be sticky.
    ByOwner,
    /// Any user of the directory, in order to evict, publish again or clean up. The folder cannot be sticky.
    ByAny,
}

/// Creates a top folder or the root with the mode for `sharing`. An existing folder is not changed.
pub(crate) fn make_top_dir(path: &RootedPath, sharing: Sharing, removal: Removal) -> Result<()> {
    let sticky = if removal == Removal::ByOwner { STICKY } else { 0 };
    let mode = match sharing {
        Sharing::Off => None,
        Sharing::Group => Some(SET_GROUP | sticky | 0o775),
        Sharing::World => Some(sticky | 0o777),
    };
    unless_dir_exists(path, || create_dir(path, mode)).at("make the cache directory", path)
}

/// Creates a folder in its parent. Succeeds if the folder already exists.
pub(crate) fn make_dir(path: &RootedPath) -> io::Result<()> {
    unless_dir_exists(path, || make_new_dir(path))
}

/// Creates a folder. Fails with `AlreadyExists` if the name is taken.
pub(crate) fn make_new_dir(path: &RootedPath) -> io::Result<()> {
    let parent = mode_of_parent(path)?;
    let mode = match shared_by(parent) {
        Sharing::Off => None,
        Sharing::Group => Some(0o775 | parent & SET_GROUP),
        Sharing::World => Some(0o777 | parent & SET_GROUP),
    };
    create_dir(path, mode)
}

/// Creates a folder, and the missing folders above it.
pub(crate) fn make_dirs(path: &RootedPath) -> io::Result<()> {
    match make_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_dirs(&path.parent().ok_or(error)?)?;
            make_dir(path)
        }
        made => made,
    }
}

/// Opens a file that all users of its folder write, and creates it, empty, if it is missing. Refuses an entry that is
/// not a regular file.
pub(crate) fn open_shared(path: &RootedPath) -> io::Result<File> {
    loop {
        match path.open(true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // The file was replaced while it was being opened: try again.
            Err(error) if errno(&error) == Some(Errno::STALE) => {}
            opened => return opened,
        }
        match create(path, FileUse::Written) {
            // Another process created it first: open that file.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
}

/// Creates a new file that all users of its folder write.
pub(crate) fn create_shared(path: &RootedPath) -> io::Result<File> {
    create(path, FileUse::Written)
}

/// Creates a new file that other users of its folder read.
pub(crate) fn create_readable(path: &RootedPath) -> io::Result<File> {
    create(path, FileUse::Read)
}

/// Returns the sharing that the mode of a folder expresses.
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

/// Calls `make` unless `path` is a folder. Also succeeds if another process creates the folder at the same moment.
fn unless_dir_exists(path: &RootedPath, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // A symbolic link does not count as a folder: its target may be outside the cache directory.
    let exists = || path.metadata().is_ok_and(|metadata| metadata.is_dir());
    if exists() {
        return Ok(());
    }
    match make() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && exists() => Ok(()),
        made => made,
    }
}

/// Creates a folder. With `mode`, the folder has that mode as soon as it is visible under its name.
fn create_dir(path: &RootedPath, mode: Option<u32>) -> io::Result<()> {
    if mode.is_none() {
        return path.create_dir(mode);
    }
    // Set the mode under a temporary name. Otherwise a crash could leave a folder that the other users cannot use.
    let temporary = path.with_file_name(format!("{TEMPORARY_PREFIX}{}", random_name()));
    let made = temporary.create_dir(mode).and_then(|()| rename_no_replace(&temporary, path));
    if made.is_err() {
        let _ = temporary.remove_dir();
    }
    made
}

/// Creates a file that must not exist yet. In a shared folder, it has its mode as soon as it is visible under its name.
fn create(path: &RootedPath, file_use: FileUse) -> io::Result<File> {
    let Some(mode) = file_use.mode(shared_by(mode_of_parent(path)?)) else { return path.create_new(0o666) };
    let temporary = path.with_file_name(format!("{TEMPORARY_PREFIX}{}", random_name()));
    let file = temporary.create_new(0o666)?;
    let made = optional::set_mode(&file, mode).and_then(|()| rename_no_replace(&temporary, path));
    if made.is_err() {
        let _ = temporary.unlink();
    }
    made.map(|()| file)
}

/// Renames `temporary` to `path`. Fails with `AlreadyExists` if the name is taken.
pub(crate) fn rename_no_replace(temporary: &RootedPath, path: &RootedPath) -> io::Result<()> {
    match temporary.rename_with(path, RenameFlags::NOREPLACE) {
        // The filesystem has no RENAME_NOREPLACE: check first, then use calls that fail if the name is taken.
        Err(Errno::INVAL | Errno::NOSYS) if path.metadata().is_ok() => Err(Errno::EXIST.into()),
        // A folder cannot be hard-linked. At worst, `rename` replaces an empty folder.
        Err(Errno::INVAL | Errno::NOSYS) if temporary.metadata()?.is_dir() => temporary.rename(path),
        // `link` fails if the name is taken. Without hard links, take the name first.
        Err(Errno::INVAL | Errno::NOSYS) => match temporary.hard_link(path) {
            Err(cause) if is_refusal(&cause) => path.create_new(0o600).and_then(|_| temporary.rename(path)),
            linked => linked.and_then(|()| temporary.unlink()),
        },
        renamed => Ok(renamed?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &RootedPath) -> u32 {
        path.metadata().expect("examines").mode()
    }

    #[test]
    fn modes_of_new_entries_follow_their_folder() {
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
            make_dirs(&below).expect("the folder exists");
            open_shared(&below.join("lock")).expect("the file exists");
            assert_eq!(below.entries().expect("lists").len(), 2, "no temporary file is left");
            let sticky = top.with_file_name(format!("{sharing:?}-sticky"));
            make_top_dir(&sticky, sharing, Removal::ByOwner).expect("makes");
            make_dir(&sticky.join("a")).expect("makes");
            assert_eq!((mode(&sticky), mode(&sticky.join("a"))), (dirs | STICKY, dirs), "{sharing:?}");
        }
    }

    #[test]
    fn links_and_pipes_at_the_path_of_a_file_are_refused() {
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
