//! Filesystem access below the root of a cache directory, without following symbolic links.
//!
//! Other users may write in a shared directory. They may replace a folder by a symbolic link at any moment, so a check
//! of a path guarantees nothing for its next use. Each method here therefore has two steps. It opens the parent folder
//! without following links, unless it [is open already](RootedPath::opened). Then it acts on that descriptor and one
//! name, without following a link at that name. A link at the path of a folder counts as an empty folder: lookups find
//! nothing, and creating an entry fails with `NotADirectory`.
//!
//! A [`RootedPath`] is not a `std::path::Path`. Only [`RootedPath::full`] converts it, for messages and for callers.
//! `cargo xtask test` rejects calls of `std::fs` in the other modules that work below a root.

use super::optional::OptionalCall;
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

/// Maximum nesting of folders that are walked or removed. Paths of artifacts are far shorter, so only another user or
/// program can have created a deeper tree.
pub(super) const DEPTH_MAX: usize = 512;
/// Flags for opening a folder in order to act on names in it. `O_PATH` needs no permission to list the folder.
#[cfg(target_os = "linux")]
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
#[cfg(not(target_os = "linux"))]
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// The current time of the filesystem. Setting it needs write access only; any other time needs ownership.
pub(super) const NOW: Timestamps = {
    let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    Timestamps { last_access: now, last_modification: now }
};

/// The folder at which all paths start.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Root {
    /// The path as the caller wrote it.
    named: PathBuf,
    /// The path of the same folder without symbolic links.
    real: PathBuf,
}

/// A path at or below a root. No symbolic link below the root is followed.
#[derive(Clone)]
pub(crate) struct RootedPath {
    root: Arc<Root>,
    /// The path below the root. It has only normal components: no `..`, no `.`, no leading `/`.
    relative: PathBuf,
    /// See [`RootedPath::opened`].
    opened: Option<Arc<OpenedFolder>>,
}

/// An open folder at which the lookups of [`RootedPath`]s at or below it start.
struct OpenedFolder {
    /// The path of the folder below the root.
    relative: PathBuf,
    folder: Folder,
}

/// Paths are compared without regard to where their lookups start.
impl Ord for RootedPath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (&self.root, &self.relative).cmp(&(&other.root, &other.relative))
    }
}

impl PartialOrd for RootedPath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for RootedPath {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for RootedPath {}

impl RootedPath {
    /// Returns the path of the root itself. Symbolic links in `path` are resolved once, here. If the root does not
    /// exist yet, `path` is used unchanged.
    pub(crate) fn root(path: &Path) -> Self {
        // Links in the path of the root are followed only here. All other methods use the resolved root.
        let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Self { root: Arc::new(Root { named: path.to_owned(), real }), relative: PathBuf::new(), opened: None }
    }

    /// Opens this folder, and returns its path with the open descriptor. Calls on names in the folder, through this path
    /// or paths made from it, start at the descriptor, which is faster. The name of the folder itself, and the names
    /// above it, are looked up from the root.
    ///
    /// Returns the path unchanged if the folder cannot be opened, or if other users may write in it: they could move it
    /// out of the cache directory, and the descriptor would lead there.
    pub(crate) fn opened(mut self) -> Self {
        let is_private = |folder: &Folder| Metadata::of(folder).is_ok_and(|found| found.mode() & 0o022 == 0);
        if let Some(folder) = self.open_folder().ok().filter(is_private) {
            self.opened = Some(Arc::new(OpenedFolder { relative: self.relative.clone(), folder }));
        }
        self
    }

    /// Returns a path with the same root and the same open folder.
    fn beside(&self, relative: PathBuf) -> Self {
        Self { root: self.root.clone(), relative, opened: self.opened.clone() }
    }

    /// Returns the open folder at which lookups of `relative` start, and the path from there; `None` if they start at
    /// the root.
    fn start_of<'a>(&self, relative: &'a Path) -> Option<(&Folder, &'a Path)> {
        let opened = self.opened.as_deref()?;
        Some((&opened.folder, relative.strip_prefix(&opened.relative).ok()?))
    }

    /// Returns the path of `name`, which has one or more components, in this folder. Components such as `..` are
    /// ignored.
    pub(crate) fn join(&self, name: impl AsRef<Path>) -> Self {
        let mut relative = self.relative.clone();
        for component in name.as_ref().components() {
            debug_assert!(matches!(component, Component::Normal(_)), "{component:?} is not a name");
            if let Component::Normal(name) = component {
                relative.push(name);
            }
        }
        self.beside(relative)
    }

    /// Returns the parent folder of this path; `None` for the root.
    pub(crate) fn parent(&self) -> Option<Self> {
        Some(self.beside(self.relative.parent()?.to_owned()))
    }

    /// Returns the path of `name` in the parent folder of this path.
    pub(crate) fn with_file_name(&self, name: impl AsRef<OsStr>) -> Self {
        self.beside(self.relative.with_file_name(name))
    }

    /// Returns the last component; empty for the root, or if it is not UTF-8.
    pub(crate) fn name(&self) -> &str {
        self.relative.file_name().and_then(OsStr::to_str).unwrap_or_default()
    }

    /// Iterates over this path and the folders above it, up to the root.
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = Self> {
        std::iter::successors(Some(self.clone()), Self::parent)
    }

    /// Returns this path relative to `folder`; `None` if it is not below `folder`.
    pub(crate) fn below(&self, folder: &Self) -> Option<&Path> {
        (self.root == folder.root).then(|| self.relative.strip_prefix(&folder.relative).ok())?
    }

    /// Returns the whole path, for callers, messages and other programs. Code that works below the root must
    /// not open it.
    pub(crate) fn full(&self) -> PathBuf {
        if self.relative.as_os_str().is_empty() {
            self.root.named.clone()
        } else {
            self.root.named.join(&self.relative)
        }
    }

    /// Returns the whole path with the resolved root.
    fn real(&self) -> PathBuf {
        if self.relative.as_os_str().is_empty() { self.root.real.clone() } else { self.root.real.join(&self.relative) }
    }

    /// Returns the size and the free space of the filesystem of this folder.
    pub(crate) fn filesystem(&self) -> io::Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::fstatvfs(self.open_folder()?)?)
    }

    /// Returns true if this folder is a mount point.
    pub(crate) fn is_mount(&self) -> io::Result<bool> {
        let folder = self.open_folder()?;
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{StatxAttributes, StatxFlags, statx};
            // Linux before 5.8 does not report it.
            if let Ok(found) = statx(&folder, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
                && found.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT)
            {
                return Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
            }
        }
        let parent = self.parent().unwrap_or_else(|| self.clone()).open_folder()?;
        Ok(Metadata::of(&folder)?.dev() != Metadata::of(&parent)?.dev())
    }

    /// Opens this folder in order to act on names in it.
    pub(crate) fn open_folder(&self) -> io::Result<Folder> {
        Ok(Folder(self.open_as(FOLDER)?))
    }

    /// Opens this folder so that it can be synced, listed and locked.
    pub(crate) fn open_dir(&self) -> io::Result<File> {
        Ok(self.open_as(OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC)?.into())
    }

    /// Opens the folder at this path, without following a link in any component below the root.
    fn open_as(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let opened = match self.start_of(&self.relative) {
            // The folder is opened again, as `.`: its `O_PATH` descriptor can be neither listed nor synced.
            Some((folder, rest)) if rest.as_os_str().is_empty() => openat2(folder, Path::new("."), flags),
            Some((folder, rest)) => openat2(folder, rest, flags),
            None => openat2(CWD, &self.real(), flags),
        };
        match opened.unwrap_or_else(|| self.open_stepwise(flags)) {
            // A component was a symbolic link.
            Err(Errno::LOOP) => Err(Errno::NOTDIR.into()),
            opened => Ok(opened?),
        }
    }

    /// Opens the folder one component at a time, for kernels and sandboxes without `openat2`.
    fn open_stepwise(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        let start = self.start_of(&self.relative);
        let below = start.map_or(self.relative.as_path(), |(_, rest)| rest);
        let mut names = below.components().map(|component| component.as_os_str().to_owned()).peekable();
        // The last component is opened with `flags`, the folders that lead to it with `FOLDER`.
        let flags_for = |is_last: bool| if is_last { flags } else { FOLDER } | OFlags::NOFOLLOW;
        let first = flags_for(names.peek().is_none());
        let mut folder = retry_on_intr(|| match start {
            Some((folder, _)) => rustix::fs::openat(folder, c".", first, Mode::empty()),
            None => rustix::fs::open(&self.root.real, first, Mode::empty()),
        })?;
        while let Some(name) = names.next() {
            let next = flags_for(names.peek().is_none());
            folder = retry_on_intr(|| rustix::fs::openat(&folder, &name, next, Mode::empty()))?;
        }
        Ok(folder)
    }

    /// Opens the parent folder of this path, and calls `act` with it and the last component. Calls it again if a signal
    /// interrupted it, which happens on network filesystems.
    fn at<T>(&self, act: impl Fn(&Folder, &OsStr) -> io::Result<T>) -> io::Result<T> {
        let parent;
        let (folder, name) = match (self.relative.parent(), self.relative.file_name()) {
            (Some(above), Some(name)) => match self.start_of(above) {
                Some((folder, rest)) if rest.as_os_str().is_empty() => (folder, name),
                _ => {
                    parent = self.beside(above.to_owned()).open_folder()?;
                    (&parent, name)
                }
            },
            // This is the root, whose parent does not belong to the cache. Only methods that change nothing get here.
            _ => {
                parent = self.open_folder()?;
                (&parent, OsStr::new("."))
            }
        };
        loop {
            match act(folder, name) {
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                ended => return ended,
            }
        }
    }

    /// Returns the metadata of the entry at this path. For a symbolic link, this is the metadata of the link itself.
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        self.at(|folder, name| folder.metadata(name))
    }

    /// Succeeds if this process may write the entry.
    pub(crate) fn check_writable(&self) -> io::Result<()> {
        let access = rustix::fs::Access::WRITE_OK;
        self.at(|folder, name| Ok(rustix::fs::accessat(folder, name, access, AtFlags::EACCESS)?))
    }

    /// Opens an existing regular file for reading and, with `write`, for writing. Refuses any other entry, for instance
    /// a pipe that another user created at this path, without blocking on it.
    ///
    /// A file to be written must have exactly one link. If the kernel allows it (`fs.protected_hardlinks=0`), another
    /// user may have linked a file of this user from elsewhere into the directory.
    pub(crate) fn open(&self, write: bool) -> io::Result<File> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let (file, named) = self.at(|folder, name| {
            let file = open_at(folder, name, access, Mode::empty())?;
            // One `stat` of the name returns both the inode and the number of links. The link count of the descriptor
            // is not enough: the name through which the file was opened may have been removed since.
            let named = if write { Some(folder.metadata(name)?) } else { None };
            Ok((file, named))
        })?;
        let opened = Metadata::of(&file)?;
        let found = named.unwrap_or(opened);
        // The entry was replaced after the file was opened.
        if found.device_and_inode() != opened.device_and_inode() {
            return Err(Errno::STALE.into());
        }
        match found.is_file() {
            true if write && found.nlink() > 1 => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "the file has more than one hard link"))
            }
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is a {}, not a file", found.kind()))),
        }
    }

    /// Opens a file that this process has created, for writing with O_DIRECT, which bypasses the page cache.
    pub(crate) fn open_direct(&self) -> io::Result<File> {
        #[cfg(target_os = "linux")]
        return self.open_at(OFlags::WRONLY | OFlags::DIRECT, Mode::empty());
        #[cfg(not(target_os = "linux"))]
        Err(Errno::NOSYS.into())
    }

    /// Creates a file with the permissions `mode`, reduced by the umask. Fails if the name is taken.
    pub(crate) fn create_new(&self, mode: u32) -> io::Result<File> {
        self.open_at(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, Mode::from_raw_mode(mode))
    }

    fn open_at(&self, access: OFlags, mode: Mode) -> io::Result<File> {
        self.at(|folder, name| open_at(folder, name, access, mode))
    }

    /// Creates a folder. With `mode`, the folder has exactly these permissions.
    pub(crate) fn create_dir(&self, mode: Option<u32>) -> io::Result<()> {
        self.at(|folder, name| {
            rustix::fs::mkdirat(folder, name, Mode::from_raw_mode(mode.unwrap_or(0o777)))?;
            let Some(mode) = mode else { return Ok(()) };
            // `mkdirat` applies the umask, so the mode is set again.
            let made = rustix::fs::openat(
                folder,
                name,
                OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            let moded = rustix::fs::fchmod(&made, Mode::from_raw_mode(mode)).map_err(Into::into);
            OptionalCall::SetMode.accept_refusal(moded)
        })
    }

    /// Removes a file, link or other entry that is not a folder.
    pub(crate) fn unlink(&self) -> io::Result<()> {
        self.at(|folder, name| Ok(rustix::fs::unlinkat(folder, name, AtFlags::empty())?))
    }

    /// Removes an empty folder.
    pub(crate) fn remove_dir(&self) -> io::Result<()> {
        self.at(|folder, name| Ok(rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)?))
    }

    /// Removes the entry at this path, of any type. A folder is removed with its content.
    pub(crate) fn remove_all(&self) -> io::Result<()> {
        self.at(|folder, name| folder.remove_all(name, DEPTH_MAX))
    }

    /// Renames the entry to `to`, replacing an existing entry.
    pub(crate) fn rename(&self, to: &Self) -> io::Result<()> {
        self.at_both(to, |from, name, folder, new| Ok(rustix::fs::renameat(from, name, folder, new)?))
    }

    /// Renames the entry to `to` with `flags`. Fails if the filesystem does not support them.
    pub(crate) fn rename_with(&self, to: &Self, flags: RenameFlags) -> Result<(), Errno> {
        // Keep the error number: the caller distinguishes an unsupported flag from other failures.
        let renamed =
            self.at_both(to, |from, name, folder, new| Ok(rustix::fs::renameat_with(from, name, folder, new, flags)?));
        renamed.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Creates a hard link to this file at `to`, which must not exist.
    pub(crate) fn hard_link(&self, to: &Self) -> io::Result<()> {
        self.at_both(to, |from, name, folder, new| Ok(rustix::fs::linkat(from, name, folder, new, AtFlags::empty())?))
    }

    /// Creates a symbolic link to `target` at this path.
    pub(crate) fn symlink_to(&self, target: &Path) -> io::Result<()> {
        self.at(|folder, name| Ok(rustix::fs::symlinkat(target, folder, name)?))
    }

    /// Opens the parent folders of this path and of `to`, and calls `act` with each folder and the last component in
    /// it.
    fn at_both<T>(&self, to: &Self, act: impl Fn(&Folder, &OsStr, &Folder, &OsStr) -> io::Result<T>) -> io::Result<T> {
        self.at(|from, name| to.at(|folder, new| act(from, name, folder, new)))
    }

    /// Sets the access time and the modification time of the entry to now. For a symbolic link, sets those of the link
    /// itself.
    pub(crate) fn touch(&self) -> io::Result<()> {
        self.at(|folder, name| folder.touch(name))
    }

    /// Returns the paths of all entries in this folder.
    pub(crate) fn entries(&self) -> io::Result<Vec<Self>> {
        let dir = Dir::new(self.open_dir()?)?;
        let path = |entry: rustix::io::Result<rustix::fs::DirEntry>| match entry {
            Ok(entry) if is_dot_entry(entry.file_name()) => None,
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

/// An open folder. Methods act on names in it.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

impl AsFd for Folder {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Folder {
    /// Returns the metadata of the entry `name`. For a symbolic link, this is the metadata of the link itself.
    pub(crate) fn metadata(&self, name: impl AsRef<OsStr>) -> io::Result<Metadata> {
        Ok(Metadata(rustix::fs::statat(&self.0, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW)?))
    }

    /// Opens the folder `name` in this folder. Fails if it is a symbolic link.
    pub(crate) fn open_folder(&self, name: impl AsRef<OsStr>) -> io::Result<Self> {
        let flags = FOLDER | OFlags::NOFOLLOW;
        Ok(Self(retry_on_intr(|| rustix::fs::openat(&self.0, name.as_ref(), flags, Mode::empty()))?))
    }

    /// Sets the access time and the modification time of the entry `name` to now.
    pub(crate) fn touch(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(rustix::fs::utimensat(&self.0, name.as_ref(), &NOW, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Removes the entry `name`, of any type. Each folder is emptied through its own descriptor.
    fn remove_all(&self, name: &OsStr, levels_left: usize) -> io::Result<()> {
        let Some(levels_left) = levels_left.checked_sub(1) else { return Err(too_deep()) };
        match retry_on_intr(|| rustix::fs::unlinkat(&self.0, name, AtFlags::empty())) {
            // The entry is a folder: Linux returns EISDIR, POSIX specifies EPERM.
            Err(Errno::ISDIR | Errno::PERM) if self.metadata(name)?.is_dir() => {}
            removed => return Ok(removed?),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = Self(rustix::fs::openat(&self.0, name, flags, Mode::empty())?);
        // List all names before removing any: a listing may skip entries if others are removed meanwhile.
        let names: Vec<OsString> = Dir::read_from(&folder)?
            .filter(|entry| !entry.as_ref().is_ok_and(|entry| is_dot_entry(entry.file_name())))
            .map(|entry| Ok(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned()))
            .collect::<io::Result<_>>()?;
        for name in names {
            // Another process may be removing the same tree at the same time.
            match absent(folder.remove_all(&name, levels_left)) {
                // NFS keeps the name of a file that is still open. The rest of the folder is removed all the same.
                Err(cause)
                    if matches!(cause.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty) => {}
                removed => drop(removed?),
            }
        }
        Ok(retry_on_intr(|| rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR))?)
    }
}

/// Returns the metadata of one path after another. Keeps the last parent folder open, and opens another folder only if
/// the next path has another parent.
#[derive(Debug, Default)]
pub(crate) struct Folders(Option<(RootedPath, Option<Folder>)>);

impl Folders {
    /// Starts with `folder`, which is already open at `path`.
    pub(crate) fn starting_at(path: RootedPath, folder: Folder) -> Self {
        Self(Some((path, Some(folder))))
    }

    /// Returns the metadata of the entry at `path`; `None` if there is none.
    pub(crate) fn metadata(&mut self, path: &RootedPath) -> io::Result<Option<Metadata>> {
        let (Some(parent), Some(name)) = (path.parent(), path.relative.file_name()) else {
            return absent(path.metadata());
        };
        if self.0.as_ref().is_none_or(|(open, _)| *open != parent) {
            let folder = absent(parent.open_folder())?;
            self.0 = Some((parent, folder));
        }
        match &self.0 {
            Some((_, Some(folder))) => absent(folder.metadata(name)),
            _ => Ok(None),
        }
    }
}

/// The metadata of a file, a folder or a link, as returned by `stat`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Metadata(Stat);

#[allow(clippy::unnecessary_cast, reason = "the fields have other types on other platforms")]
impl Metadata {
    /// Returns the metadata of an open file.
    pub(crate) fn of(file: impl AsFd) -> io::Result<Self> {
        Ok(Self(rustix::fs::fstat(file)?))
    }

    fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.0.st_mode)
    }

    /// Returns the name of the file type for messages.
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

    /// Returns the length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.0.st_size as u64
    }

    /// Returns the bytes allocated on the filesystem.
    pub(crate) fn allocated(&self) -> u64 {
        // `st_blocks` counts units of 512 bytes on every filesystem.
        self.0.st_blocks as u64 * 512
    }

    pub(crate) fn ino(&self) -> u64 {
        self.0.st_ino as u64
    }

    pub(crate) fn dev(&self) -> u64 {
        self.0.st_dev as u64
    }

    /// Returns device and inode number, which identify a file on this machine.
    pub(crate) fn device_and_inode(&self) -> (u64, u64) {
        (self.dev(), self.ino())
    }

    pub(crate) fn nlink(&self) -> u64 {
        self.0.st_nlink as u64
    }

    /// Returns the user id of the owner.
    pub(crate) fn uid(&self) -> u32 {
        self.0.st_uid
    }

    /// Returns permissions, set-ID bits and the sticky bit.
    pub(crate) fn mode(&self) -> u32 {
        self.0.st_mode as u32 & 0o7777
    }

    /// Returns the modification time.
    pub(crate) fn modified(&self) -> SystemTime {
        let nanoseconds = Duration::from_nanos(self.0.st_mtime_nsec as u64);
        let seconds = Duration::from_secs((self.0.st_mtime as i64).unsigned_abs());
        // Times before 1970 are negative.
        let whole = if (self.0.st_mtime as i64) < 0 {
            UNIX_EPOCH.checked_sub(seconds)
        } else {
            UNIX_EPOCH.checked_add(seconds)
        };
        whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
    }

    /// Returns the identity that manifests record: inode, size and modification time.
    pub(crate) fn identity(&self) -> FileIdentity {
        let mtime_ns =
            (self.0.st_mtime as i64).saturating_mul(1_000_000_000).saturating_add(self.0.st_mtime_nsec as i64);
        FileIdentity { inode: self.ino(), bytes: self.len(), mtime_ns }
    }
}

/// Opens `name` in `folder`. Fails on a symbolic link, and does not block on a pipe.
fn open_at(folder: &Folder, name: &OsStr, access: OFlags, mode: Mode) -> io::Result<File> {
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(retry_on_intr(|| rustix::fs::openat(folder, name, flags, mode))?.into())
}

/// Converts "not found" to `None`. A path through an entry that is not a folder counts as not found as well.
pub(crate) fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens the folder at `path` from `start`, without following a link in any component; `None` if `openat2` is not
/// available.
#[cfg(target_os = "linux")]
fn openat2(start: impl AsFd, path: &Path, flags: OFlags) -> Option<Result<OwnedFd, Errno>> {
    /// Linux before 5.6 has no `openat2`. Some sandboxes refuse it with EPERM, which the call itself never returns.
    static IS_UNAVAILABLE: AtomicBool = AtomicBool::new(false);
    if IS_UNAVAILABLE.load(Ordering::Relaxed) {
        return None;
    }
    let links = rustix::fs::ResolveFlags::NO_SYMLINKS;
    match retry_on_intr(|| rustix::fs::openat2(&start, path, flags, Mode::empty(), links)) {
        Err(Errno::NOSYS | Errno::PERM) => {
            IS_UNAVAILABLE.store(true, Ordering::Relaxed);
            None
        }
        opened => Some(opened),
    }
}

#[cfg(not(target_os = "linux"))]
fn openat2(_: impl AsFd, _: &Path, _: OFlags) -> Option<Result<OwnedFd, Errno>> {
    None
}

/// Returns true for the entries `.` and `..` of a listing.
fn is_dot_entry(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// Returns the error for a tree with more than [`DEPTH_MAX`] levels.
pub(super) fn too_deep() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidFilename, format!("folders are nested more than {DEPTH_MAX} deep"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    /// Creates a root with the file `in/deep/file`, and beside it a folder that no path below the root may reach.
    fn directory() -> (tempfile::TempDir, RootedPath, PathBuf) {
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
    fn a_link_at_the_path_of_a_folder_counts_as_an_empty_folder() {
        for depth in 1..=2 {
            let (_folder, root, outside) = directory();
            let names: Vec<&str> = ["in", "deep"][..depth].to_vec();
            let link = root.join(names.join("/"));
            let target = if depth == 1 { outside.clone() } else { outside.join("deep") };
            link.remove_all().expect("removes");
            link.symlink_to(&target).expect("links");
            let before = content(&outside);
            let file = root.join("in/deep/file");
            assert!(absent(file.metadata()).expect("examines").is_none());
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
            // `remove_all` removes the link, not its target.
            root.join("in").remove_all().expect("removes");
            assert_eq!(content(&outside), before);
            assert!(absent(root.join("in").metadata()).expect("examines").is_none());
        }
    }

    #[test]
    fn a_link_at_the_end_of_a_path_is_not_followed() {
        let (_folder, root, outside) = directory();
        let link = root.join("in/link");
        link.symlink_to(&outside.join("deep/file")).expect("links");
        let before = content(&outside);
        assert!(link.open(false).is_err() && link.open(true).is_err());
        assert!(!link.metadata().expect("examines").is_file());
        link.touch().expect("touches the link itself");
        let other = root.join("other");
        link.rename(&other).expect("renames the link itself");
        other.unlink().expect("removes the link itself");
        assert_eq!(content(&outside), before);
    }

    #[test]
    fn a_file_with_a_second_link_is_not_opened_for_writing() {
        let (_folder, root, outside) = directory();
        let planted = root.join("in/lock");
        fs::hard_link(outside.join("deep/file"), planted.full()).expect("links");
        assert!(planted.open(true).is_err());
        assert!(planted.open(false).is_ok());
    }

    #[test]
    fn opening_stepwise_and_by_openat2_have_equal_results() {
        let (_folder, root, outside) = directory();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inode = |opened: Result<OwnedFd, Errno>| opened.map(|fd| Metadata::of(fd).expect("examines").ino());
        root.join("in/link").symlink_to(&outside).expect("links");
        let names = ["", "in", "in/deep", "in/deep/file", "in/none", "in/link", "in/link/deep"];
        let open = root.join("in").opened();
        let from_open = ["", "deep", "deep/file", "none", "link", "link/deep"].map(|name| open.join(name));
        for path in names.map(|name| root.join(name)).into_iter().chain(from_open) {
            let by_kernel = path.open_as(flags);
            let by_kernel =
                inode(by_kernel.map_err(|error| Errno::from_io_error(&error).expect("an error of the system")));
            let stepwise = inode(path.open_stepwise(flags))
                .map_err(|errno| if errno == Errno::LOOP { Errno::NOTDIR } else { errno });
            assert_eq!(by_kernel, stepwise, "{path}");
        }
    }

    #[test]
    fn lookups_from_an_open_folder_stay_in_it_and_follow_no_link() {
        let (_folder, root, outside) = directory();
        let before = content(&outside);
        fs::set_permissions(root.join("in").full(), Permissions::from_mode(0o755)).expect("sets");
        let open = root.join("in").opened();
        assert_eq!((&open, open.parent()), (&root.join("in"), Some(root.clone())), "the same path");
        root.join("in").rename(&root.join("moved")).expect("renames");
        root.join("in").symlink_to(&outside).expect("links");
        // The names in the folder and in the folders below it.
        assert_eq!(open.entries().expect("lists"), [root.join("in/deep")]);
        assert_eq!(io::read_to_string(open.join("deep/file").open(false).expect("opens")).expect("reads"), "ours");
        drop(open.join("deep/new").create_new(0o600).expect("makes"));
        open.join("deep/new").rename(&open.join("new")).expect("renames");
        assert!(root.join("moved/new").metadata().expect("is there").is_file());
        // A link below it, and the path of the folder itself, which lead out of the root.
        open.join("link").symlink_to(&outside.join("deep")).expect("links");
        let through = open.join("link/new").create_new(0o600);
        assert_eq!(through.expect_err("refused").kind(), io::ErrorKind::NotADirectory);
        assert!(!open.metadata().expect("examines the link").is_dir());
        assert_eq!(content(&outside), before);
    }

    #[test]
    fn a_folder_that_others_may_write_is_not_held_open() {
        let (_folder, root, _) = directory();
        for (mode, is_held) in [(0o755, true), (0o775, false), (0o757, false)] {
            fs::set_permissions(root.join("in").full(), Permissions::from_mode(mode)).expect("sets");
            assert_eq!(root.join("in").opened().opened.is_some(), is_held, "{mode:o}");
        }
        assert!(root.join("none").opened().opened.is_none());
    }

    #[test]
    fn the_path_of_the_root_may_contain_links() {
        let (folder, root, _) = directory();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(root.full(), &link).expect("links");
        let through = RootedPath::root(&link);
        assert!(through.join("in/deep/file").open(false).is_ok());
        assert_eq!(through.join("in").full(), link.join("in"), "the path is shown as the caller wrote it");
    }

    #[test]
    fn removing_folders_nested_too_deep_fails() {
        let (_folder, root, _) = directory();
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
        // The tree can be removed in two halves, the lower one first.
        deep.ancestors().nth(200).expect("half of it").remove_all().expect("removes");
        root.join("d").remove_all().expect("removes");
    }

    #[test]
    fn remove_all_removes_a_tree_and_path_helpers_return_components() {
        let (_folder, root, _) = directory();
        assert_eq!(root.join("in").entries().expect("lists"), [root.join("in/deep")]);
        root.join("in").remove_all().expect("removes");
        assert_eq!(root.entries().expect("lists"), []);
        assert_eq!((root.join("a/b").name(), root.name()), ("b", ""));
        assert_eq!(root.join("a/b").below(&root.join("a")), Some(Path::new("b")));
        assert_eq!(root.join("a").below(&root.join("a/b")), None);
    }
}
