//! The only code that calls the filesystem below the root of a cache directory.
//!
//! Other users may write in a shared directory. At any moment they may put a symbolic link in the place of a folder, so a
//! check of a path says nothing about the next use of that path. Every call here works in two steps: it opens the folder
//! of a name without following a link, and then acts on that descriptor and one name, without following a link there.
//! A [`RootedPath`] therefore is no `std::path::Path`, and nothing turns it into one but [`RootedPath::full`], for
//! messages and for callers. `cargo xtask tidy` refuses calls of `std::fs` in the other modules that work below a root.
//!
//! A link in the place of a folder has nothing in it: looking finds nothing there, and making something there fails with
//! `NotADirectory`.

use crate::manifest::FileIdentity;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps};
use rustix::io::{Errno, retry_on_intr};
use std::ffi::{CStr, OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How deep nested folders are removed or walked through. The paths of artifacts are far shorter; a deeper
/// tree was planted.
pub(super) const DEPTH_MAX: usize = 512;
/// How a folder is opened to act on names in it. `O_PATH` needs no permission to list it.
#[cfg(target_os = "linux")]
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
#[cfg(not(target_os = "linux"))]
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// This moment, by the filesystem's clock. Setting it needs write access only; any other time needs ownership.
pub(super) const NOW: Timestamps = {
    let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    Timestamps { last_access: now, last_modification: now }
};

/// The folder that all paths start from.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Root {
    /// As the caller named it.
    named: PathBuf,
    /// The same folder, without symbolic links.
    real: PathBuf,
}

/// A path at or below a root. Below the root no symbolic link is followed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RootedPath {
    root: Arc<Root>,
    /// Names only: no `..`, no `.`, no root.
    relative: PathBuf,
}

impl RootedPath {
    /// The root itself, which may lie behind symbolic links. They are resolved once, here. A root that is not there yet
    /// is taken as it is named.
    pub(crate) fn root(path: &Path) -> Self {
        let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Self { root: Arc::new(Root { named: path.to_owned(), real }), relative: PathBuf::new() }
    }

    /// The path of `name`, one or more names, in this folder. Anything but names, such as `..`, is left out.
    pub(crate) fn join(&self, name: impl AsRef<Path>) -> Self {
        let mut relative = self.relative.clone();
        for component in name.as_ref().components() {
            debug_assert!(matches!(component, Component::Normal(_)), "{component:?} is no name");
            if let Component::Normal(name) = component {
                relative.push(name);
            }
        }
        Self { root: self.root.clone(), relative }
    }

    /// The folder that it lies in; `None` for the root.
    pub(crate) fn parent(&self) -> Option<Self> {
        Some(Self { root: self.root.clone(), relative: self.relative.parent()?.to_owned() })
    }

    /// The same folder with another name in it.
    pub(crate) fn with_file_name(&self, name: impl AsRef<OsStr>) -> Self {
        Self { root: self.root.clone(), relative: self.relative.with_file_name(name) }
    }

    /// Its last name, as text; empty for the root, or where it is not UTF-8.
    pub(crate) fn name(&self) -> &str {
        self.relative.file_name().and_then(OsStr::to_str).unwrap_or_default()
    }

    /// It and the folders above it, up to the root.
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = Self> {
        std::iter::successors(Some(self.clone()), Self::parent)
    }

    /// What follows `folder` in it, if it lies there.
    pub(crate) fn below(&self, folder: &Self) -> Option<&Path> {
        (self.root == folder.root).then(|| self.relative.strip_prefix(&folder.relative).ok())?
    }

    /// The whole path, for callers, messages and other programs. Nothing in this crate opens it.
    pub(crate) fn full(&self) -> PathBuf {
        if self.relative.as_os_str().is_empty() {
            self.root.named.clone()
        } else {
            self.root.named.join(&self.relative)
        }
    }

    fn real(&self) -> PathBuf {
        if self.relative.as_os_str().is_empty() { self.root.real.clone() } else { self.root.real.join(&self.relative) }
    }

    /// Its filesystem: sizes and what is free.
    pub(crate) fn filesystem(&self) -> io::Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::fstatvfs(self.open_folder()?)?)
    }

    /// Opens it as a folder to act on names in it.
    pub(crate) fn open_folder(&self) -> io::Result<Folder> {
        Ok(Folder(self.open_as(FOLDER)?))
    }

    /// Opens it as a folder that can be synced, listed and locked.
    pub(crate) fn open_dir(&self) -> io::Result<File> {
        Ok(self.open_as(OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC)?.into())
    }

    /// Opens the folder of this path, and no link in the place of one.
    fn open_as(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let opened = match openat2(&self.real(), flags) {
            None => self.open_stepwise(flags),
            Some(opened) => opened,
        };
        match opened {
            // Some component was a link.
            Err(Errno::LOOP) => Err(Errno::NOTDIR.into()),
            opened => Ok(opened?),
        }
    }

    /// The same where the kernel, or what stands before it, has no `openat2`: one component after the other.
    fn open_stepwise(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        let mut names = self.relative.components().map(|component| component.as_os_str().to_owned()).peekable();
        let next = |is_last: bool| if is_last { flags } else { FOLDER } | OFlags::NOFOLLOW;
        let flags = next(names.peek().is_none());
        let mut folder = retry_on_intr(|| rustix::fs::open(&self.root.real, flags, Mode::empty()))?;
        while let Some(name) = names.next() {
            let flags = next(names.peek().is_none());
            folder = retry_on_intr(|| rustix::fs::openat(&folder, &name, flags, Mode::empty()))?;
        }
        Ok(folder)
    }

    /// Acts on the folder it lies in and its name there.
    fn at<T>(&self, act: impl FnOnce(&Folder, &OsStr) -> io::Result<T>) -> io::Result<T> {
        match (self.parent(), self.relative.file_name()) {
            (Some(parent), Some(name)) => act(&parent.open_folder()?, name),
            // The root has a place that is not ours; only ways to look at it come here.
            _ => act(&self.open_folder()?, OsStr::new(".")),
        }
    }

    /// What lies there, a link itself included.
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        self.at(|folder, name| folder.metadata(name))
    }

    /// Whether this process may write it.
    pub(crate) fn check_writable(&self) -> io::Result<()> {
        let access = rustix::fs::Access::WRITE_OK;
        self.at(|folder, name| Ok(rustix::fs::accessat(folder, name, access, AtFlags::EACCESS)?))
    }

    /// Opens a regular file that exists. A pipe or device that was planted in its place neither blocks nor passes.
    ///
    /// A file that is to be written must have one link. Another user may have made a second one of a file of ours that
    /// lies elsewhere, where the kernel allows that (`fs.protected_hardlinks=0`).
    pub(crate) fn open(&self, write: bool) -> io::Result<File> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let (file, named) = self.at(|folder, name| {
            let file = open_at(folder, name, access, Mode::empty())?;
            // One look at the name tells both which file it is and how many names that has: a second name may have been
            // removed since the file was opened by it.
            let named = if write { Some(folder.metadata(name)?) } else { None };
            Ok((file, named))
        })?;
        let opened = Metadata::of(&file)?;
        let found = named.unwrap_or(opened);
        if found.device_and_inode() != opened.device_and_inode() {
            return Err(Errno::STALE.into());
        }
        match found.is_file() {
            true if write && found.nlink() > 1 => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "the file has a second name"))
            }
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is a {}, not a file", found.kind()))),
        }
    }

    /// Opens a file of this process for writing past the page cache.
    pub(crate) fn open_direct(&self) -> io::Result<File> {
        #[cfg(target_os = "linux")]
        return self.open_at(OFlags::WRONLY | OFlags::DIRECT, Mode::empty());
        #[cfg(not(target_os = "linux"))]
        Err(Errno::NOSYS.into())
    }

    /// Makes a new file that may have the permissions `mode`, as far as the umask lets it.
    pub(crate) fn create_new(&self, mode: u32) -> io::Result<File> {
        self.open_at(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, Mode::from_raw_mode(mode))
    }

    fn open_at(&self, access: OFlags, mode: Mode) -> io::Result<File> {
        self.at(|folder, name| open_at(folder, name, access, mode))
    }

    /// Makes a folder. With `mode` it has exactly these permissions.
    pub(crate) fn create_dir(&self, mode: Option<u32>) -> io::Result<()> {
        self.at(|folder, name| {
            rustix::fs::mkdirat(folder, name, Mode::from_raw_mode(mode.unwrap_or(0o777)))?;
            let Some(mode) = mode else { return Ok(()) };
            let made = rustix::fs::openat(
                folder,
                name,
                OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            Ok(rustix::fs::fchmod(&made, Mode::from_raw_mode(mode))?)
        })
    }

    /// Removes what is no folder.
    pub(crate) fn unlink(&self) -> io::Result<()> {
        self.at(|folder, name| Ok(rustix::fs::unlinkat(folder, name, AtFlags::empty())?))
    }

    /// Removes an empty folder.
    pub(crate) fn remove_dir(&self) -> io::Result<()> {
        self.at(|folder, name| Ok(rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)?))
    }

    /// Removes a folder and all it holds, or whatever lies there.
    pub(crate) fn remove_all(&self) -> io::Result<()> {
        self.at(|folder, name| folder.remove_all(name, DEPTH_MAX))
    }

    /// Gives it the path `to`, replacing what lies there.
    pub(crate) fn rename(&self, to: &Self) -> io::Result<()> {
        self.both(to, |from, name, folder, new| Ok(rustix::fs::renameat(from, name, folder, new)?))
    }

    /// The same with flags, where the filesystem has them.
    pub(crate) fn rename_with(&self, to: &Self, flags: RenameFlags) -> Result<(), Errno> {
        let renamed =
            self.both(to, |from, name, folder, new| Ok(rustix::fs::renameat_with(from, name, folder, new, flags)?));
        renamed.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Makes `to`, which must not be there, another name of this file.
    pub(crate) fn hard_link(&self, to: &Self) -> io::Result<()> {
        self.both(to, |from, name, folder, new| Ok(rustix::fs::linkat(from, name, folder, new, AtFlags::empty())?))
    }

    /// Makes a symbolic link to `target` here.
    pub(crate) fn symlink_to(&self, target: &Path) -> io::Result<()> {
        self.at(|folder, name| Ok(rustix::fs::symlinkat(target, folder, name)?))
    }

    fn both<T>(&self, to: &Self, act: impl FnOnce(&Folder, &OsStr, &Folder, &OsStr) -> io::Result<T>) -> io::Result<T> {
        self.at(|from, name| to.at(|folder, new| act(from, name, folder, new)))
    }

    /// Sets the last change of what lies there, a link itself included, to now.
    pub(crate) fn touch(&self) -> io::Result<()> {
        self.at(|folder, name| folder.touch(name))
    }

    /// The paths directly in this folder.
    pub(crate) fn entries(&self) -> io::Result<Vec<Self>> {
        let dir = Dir::new(self.open_dir()?)?;
        let path = |entry: rustix::io::Result<rustix::fs::DirEntry>| match entry {
            Ok(entry) if is_itself(entry.file_name()) => None,
            Ok(entry) => Some(Ok(self.join(OsStr::from_bytes(entry.file_name().to_bytes())))),
            Err(error) => Some(Err(error.into())),
        };
        dir.filter_map(path).collect()
    }
}

impl fmt::Display for RootedPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.full().display().fmt(f)
    }
}

impl fmt::Debug for RootedPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.full().fmt(f)
    }
}

/// An open folder, to act on names in it.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

impl AsFd for Folder {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Folder {
    /// What lies at `name`, a link itself included.
    pub(crate) fn metadata(&self, name: impl AsRef<OsStr>) -> io::Result<Metadata> {
        Ok(Metadata(rustix::fs::statat(&self.0, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW)?))
    }

    /// Opens the folder at `name` to act on names in it, and no link in its place.
    pub(crate) fn open_folder(&self, name: impl AsRef<OsStr>) -> io::Result<Self> {
        let flags = FOLDER | OFlags::NOFOLLOW;
        Ok(Self(retry_on_intr(|| rustix::fs::openat(&self.0, name.as_ref(), flags, Mode::empty()))?))
    }

    /// Sets the last change of what lies at `name` to now.
    pub(crate) fn touch(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(rustix::fs::utimensat(&self.0, name.as_ref(), &NOW, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Removes whatever lies at `name`. Each folder is emptied through its own descriptor.
    fn remove_all(&self, name: &OsStr, depth: usize) -> io::Result<()> {
        let Some(depth) = depth.checked_sub(1) else { return Err(too_deep()) };
        match rustix::fs::unlinkat(&self.0, name, AtFlags::empty()) {
            // What Linux, and what POSIX says of a folder.
            Err(Errno::ISDIR | Errno::PERM) if self.metadata(name)?.is_dir() => {}
            removed => return Ok(removed?),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = Self(rustix::fs::openat(&self.0, name, flags, Mode::empty())?);
        let names: Vec<OsString> = Dir::read_from(&folder)?
            .filter(|entry| !entry.as_ref().is_ok_and(|entry| is_itself(entry.file_name())))
            .map(|entry| Ok(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned()))
            .collect::<io::Result<_>>()?;
        for name in names {
            absent(folder.remove_all(&name, depth))?;
        }
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }
}

/// The folders of successive paths, each opened once while the next path lies in it.
#[derive(Debug, Default)]
pub(crate) struct Folders(Option<(RootedPath, Option<Folder>)>);

impl Folders {
    /// Starts with the folder at `path`, which is open already.
    pub(crate) fn starting_at(path: RootedPath, folder: Folder) -> Self {
        Self(Some((path, Some(folder))))
    }

    /// What lies at `path`, or `None`.
    pub(crate) fn metadata(&mut self, path: &RootedPath) -> io::Result<Option<Metadata>> {
        let (Some(parent), Some(name)) = (path.parent(), path.relative.file_name()) else {
            return absent(path.metadata());
        };
        if self.0.as_ref().is_none_or(|(open, _)| open.relative != parent.relative || open.root != parent.root) {
            let folder = absent(parent.open_folder())?;
            self.0 = Some((parent, folder));
        }
        match &self.0 {
            Some((_, Some(folder))) => absent(folder.metadata(name)),
            _ => Ok(None),
        }
    }
}

/// What there is to know of a file, a folder or a link without opening it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Metadata(Stat);

#[allow(clippy::unnecessary_cast, reason = "the fields have other types on other platforms")]
impl Metadata {
    /// Of an open file.
    pub(crate) fn of(file: impl AsFd) -> io::Result<Self> {
        Ok(Self(rustix::fs::fstat(file)?))
    }

    fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.0.st_mode)
    }

    /// What it is, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self.file_type() {
            FileType::RegularFile => "file",
            FileType::Directory => "folder",
            FileType::Symlink => "symbolic link",
            FileType::Fifo => "pipe",
            FileType::Socket => "socket",
            FileType::CharacterDevice | FileType::BlockDevice => "device",
            _ => "entry of an unknown type",
        }
    }

    pub(crate) fn is_file(&self) -> bool {
        self.file_type() == FileType::RegularFile
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.file_type() == FileType::Directory
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.0.st_size as u64
    }

    /// Bytes that it takes on the filesystem.
    pub(crate) fn allocated(&self) -> u64 {
        self.0.st_blocks as u64 * 512
    }

    pub(crate) fn ino(&self) -> u64 {
        self.0.st_ino as u64
    }

    pub(crate) fn dev(&self) -> u64 {
        self.0.st_dev as u64
    }

    /// Device and inode number: which file of this machine it is.
    pub(crate) fn device_and_inode(&self) -> (u64, u64) {
        (self.dev(), self.ino())
    }

    pub(crate) fn nlink(&self) -> u64 {
        self.0.st_nlink as u64
    }

    /// Who owns it.
    pub(crate) fn uid(&self) -> u32 {
        self.0.st_uid
    }

    /// Permissions, set-ID bits and the sticky bit.
    pub(crate) fn mode(&self) -> u32 {
        self.0.st_mode as u32 & 0o7777
    }

    /// The last change of its content.
    pub(crate) fn modified(&self) -> SystemTime {
        let nanoseconds = Duration::from_nanos(self.0.st_mtime_nsec as u64);
        let seconds = Duration::from_secs((self.0.st_mtime as i64).unsigned_abs());
        let whole = if (self.0.st_mtime as i64) < 0 {
            UNIX_EPOCH.checked_sub(seconds)
        } else {
            UNIX_EPOCH.checked_add(seconds)
        };
        whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
    }

    /// What tells it from another file, as manifests record it.
    pub(crate) fn identity(&self) -> FileIdentity {
        let mtime_ns =
            (self.0.st_mtime as i64).saturating_mul(1_000_000_000).saturating_add(self.0.st_mtime_nsec as i64);
        FileIdentity { inode: self.ino(), bytes: self.len(), mtime_ns }
    }
}

/// Opens `name` in `folder`, and no link there. A pipe does not block.
fn open_at(folder: &Folder, name: &OsStr, access: OFlags, mode: Mode) -> io::Result<File> {
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(retry_on_intr(|| rustix::fs::openat(folder, name, flags, mode))?.into())
}

/// Turns "not found" into `None`. A name below what is no folder is not there either.
pub(crate) fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a folder without following a link anywhere in its path; `None` where that call is not to be had.
#[cfg(target_os = "linux")]
fn openat2(path: &Path, flags: OFlags) -> Option<Result<OwnedFd, Errno>> {
    /// Linux before 5.6 has no such call; some sandboxes refuse it with EPERM, which it never answers by itself.
    static IS_MISSING: AtomicBool = AtomicBool::new(false);
    if IS_MISSING.load(Ordering::Relaxed) {
        return None;
    }
    let links = rustix::fs::ResolveFlags::NO_SYMLINKS;
    match retry_on_intr(|| rustix::fs::openat2(CWD, path, flags, Mode::empty(), links)) {
        Err(Errno::NOSYS | Errno::PERM) => {
            IS_MISSING.store(true, Ordering::Relaxed);
            None
        }
        opened => Some(opened),
    }
}

#[cfg(not(target_os = "linux"))]
fn openat2(_: &Path, _: OFlags) -> Option<Result<OwnedFd, Errno>> {
    None
}

/// Whether a listed name is that of the folder itself or the one above.
fn is_itself(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

fn too_deep() -> io::Error {
    io::Error::other(format!("folders lie in each other more than {DEPTH_MAX} deep"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A root with a folder `in/deep` and a file in it, and beside it a folder that no path below the root may reach.
    fn house() -> (tempfile::TempDir, RootedPath, PathBuf) {
        let folder = tempfile::tempdir().expect("folder");
        for (path, content) in [("root/in/deep/file", "ours"), ("outside/deep/file", "theirs")] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("makes");
            fs::write(path, content).expect("writes");
        }
        let (root, outside) = (RootedPath::root(&folder.path().join("root")), folder.path().join("outside"));
        (folder, root, outside)
    }

    fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).expect("lists") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => found.extend(content(&path)),
                false => found.push((path.clone(), fs::read(&path).expect("reads"))),
            }
        }
        found.sort();
        found
    }

    #[test]
    fn a_link_in_the_place_of_a_folder_has_nothing_in_it() {
        for depth in 1..=2 {
            let (_folder, root, outside) = house();
            let names: Vec<&str> = ["in", "deep"][..depth].to_vec();
            let link = root.join(names.join("/"));
            let target = if depth == 1 { outside.clone() } else { outside.join("deep") };
            link.remove_all().expect("removes");
            link.symlink_to(&target).expect("links");
            let before = content(&outside);
            let file = root.join("in/deep/file");
            assert!(absent(file.metadata()).expect("looks").is_none());
            assert!(absent(file.open(false)).expect("opens").is_none());
            assert!(absent(file.open(true)).expect("opens").is_none());
            assert!(absent(root.join("in/deep").entries()).expect("lists").is_none());
            let other = root.join("other");
            drop(other.create_new(0o600).expect("makes"));
            let new = root.join("in/deep/new");
            let not_a_folder = |outcome: io::Result<()>| {
                assert_eq!(outcome.expect_err("refused").kind(), io::ErrorKind::NotADirectory, "{link}");
            };
            not_a_folder(new.create_new(0o600).map(drop));
            not_a_folder(new.create_dir(None));
            not_a_folder(new.create_dir(Some(0o777)));
            not_a_folder(new.symlink_to(&outside));
            not_a_folder(other.rename(&new));
            not_a_folder(other.rename(&file));
            not_a_folder(other.hard_link(&new));
            not_a_folder(file.rename(&other));
            not_a_folder(file.hard_link(&root.join("linked")));
            not_a_folder(file.unlink());
            not_a_folder(file.remove_all());
            not_a_folder(root.join("in/deep").remove_dir());
            not_a_folder(file.touch());
            assert_eq!(content(&outside), before);
            // What is removed is the link.
            root.join("in").remove_all().expect("removes");
            assert_eq!(content(&outside), before);
            assert!(absent(root.join("in").metadata()).expect("looks").is_none());
        }
    }

    #[test]
    fn a_link_at_the_end_of_a_path_is_not_followed() {
        let (_folder, root, outside) = house();
        let link = root.join("in/link");
        link.symlink_to(&outside.join("deep/file")).expect("links");
        let before = content(&outside);
        assert!(link.open(false).is_err() && link.open(true).is_err());
        assert!(!link.metadata().expect("looks").is_file());
        link.touch().expect("touches the link itself");
        let other = root.join("other");
        link.rename(&other).expect("renames the link itself");
        other.unlink().expect("removes the link itself");
        assert_eq!(content(&outside), before);
    }

    #[test]
    fn a_file_with_a_second_name_is_not_opened_for_writing() {
        let (_folder, root, outside) = house();
        let planted = root.join("in/lock");
        fs::hard_link(outside.join("deep/file"), planted.full()).expect("links");
        assert!(planted.open(true).is_err());
        assert!(planted.open(false).is_ok());
    }

    #[test]
    fn the_way_without_openat2_finds_the_same() {
        let (_folder, root, outside) = house();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inode = |opened: Result<OwnedFd, Errno>| opened.map(|fd| Metadata::of(fd).expect("looks").ino());
        root.join("in/link").symlink_to(&outside).expect("links");
        for name in ["", "in", "in/deep", "in/deep/file", "in/none", "in/link", "in/link/deep"] {
            let path = root.join(name);
            let by_kernel = path.open_as(flags);
            let by_kernel =
                inode(by_kernel.map_err(|error| Errno::from_io_error(&error).expect("an error of the system")));
            let stepwise = inode(path.open_stepwise(flags))
                .map_err(|errno| if errno == Errno::LOOP { Errno::NOTDIR } else { errno });
            assert_eq!(by_kernel, stepwise, "{name:?}");
        }
    }

    #[test]
    fn the_root_may_lie_behind_links() {
        let (folder, root, _) = house();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(root.full(), &link).expect("links");
        let through = RootedPath::root(&link);
        assert!(through.join("in/deep/file").open(false).is_ok());
        assert_eq!(through.join("in").full(), link.join("in"), "it is shown as it was named");
    }

    #[test]
    fn folders_that_were_nested_without_end_are_left() {
        let (_folder, root, _) = house();
        let (mut deep, names) = (root.clone(), vec!["d"; 40].join("/"));
        for _ in 0..DEPTH_MAX / 40 + 1 {
            deep = deep.join(&names);
        }
        let made = deep.relative.components().try_fold(root.open_folder().expect("opens"), |folder, name| {
            rustix::fs::mkdirat(&folder, name.as_os_str(), Mode::RWXU)?;
            rustix::fs::openat(&folder, name.as_os_str(), FOLDER, Mode::empty()).map(Folder)
        });
        drop(made.expect("makes"));
        assert!(root.join("d").remove_all().is_err());
        // It can be removed from below.
        deep.ancestors().nth(200).expect("half of it").remove_all().expect("removes");
        root.join("d").remove_all().expect("removes");
    }

    #[test]
    fn whatever_lies_below_is_removed_and_names_are_names() {
        let (_folder, root, _) = house();
        assert_eq!(root.join("in").entries().expect("lists"), [root.join("in/deep")]);
        root.join("in").remove_all().expect("removes");
        assert_eq!(root.entries().expect("lists"), []);
        assert_eq!((root.join("a/b").name(), root.name()), ("b", ""));
        assert_eq!(root.join("a/b").below(&root.join("a")), Some(Path::new("b")));
        assert_eq!(root.join("a").below(&root.join("a/b")), None);
    }
}
