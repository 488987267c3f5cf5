//! Materializing: building a folder outside the cache with an artifact's files (`get --into DIR`).
//!
//! The new folder is built beside the destination under a temporary name, and then exchanged with it. A reader sees the
//! old folder or the new one.
//!
//! A mount point cannot be exchanged. There the new folder is built inside the mount, and then its files are moved to
//! their places one by one, the marker last. The marker in the built folder is the record of a move that was
//! interrupted: the next call completes it.
//!
//! Only files that an earlier call created are ever removed: a marker file in the folder lists them. A temporary folder
//! is locked while it is being built, so that the next call recognises and removes the leftovers of a killed process.

use super::files::{self, absent};
use super::io_error::{Shown, errno};
use super::layout::{ArtifactDir, Layout};
use super::link::{self, Link};
use super::lock::FileLock;
use super::modes;
use super::optional::sync_folder;
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Result, Tier};
use crate::human;
use crate::json;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity};
use crate::option_name::call::{LINK, TIER};
use crate::progress::Progress;
use rustix::fs::{RenameFlags, ioctl_ficlone};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the marker file, which lists the files of a materialized folder. No artifact has a file of this name.
pub(super) const MARKER: &str = ".modelcache.json";
/// Name of the temporary cache directory that `storage-initializer` creates in a destination that is a mount point.
pub const CACHE_IN_MOUNT: &str = ".modelcache-storage-initializer";
/// Suffix of the temporary name of the old folder, where the filesystem cannot exchange two folders.
const OLD: &str = "-old";
/// Prefix of the name of the temporary folder in a mount point.
const IN_PLACE_PREFIX: &str = ".modelcache-";
/// Maximum size of a marker file in bytes.
const MARKER_BYTES_MAX: u64 = 64 << 20;
/// Buffer size for copying, in bytes.
const COPY_BYTES: usize = 1 << 20;

/// Returns true if `dir` is a folder at which a filesystem is mounted.
pub fn is_mount_point(dir: &Path) -> bool {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else { return true };
    RootedPath::root(parent).join(name).is_mount().unwrap_or(false)
}

/// How the files of the folder are created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinkMode {
    /// A hard link if possible, otherwise a reflink, otherwise a copy.
    #[default]
    Auto,
    /// Only this kind of link; an error if it is not possible.
    Only(Link),
}

/// A folder that may be replaced: it is absent, empty, or was materialized before.
#[derive(Debug, Clone)]
pub struct Destination {
    dir: RootedPath,
    /// The path as the caller wrote it, for messages.
    requested: PathBuf,
    mode: LinkMode,
    /// True for a mount point, whose content is replaced file by file.
    in_place: bool,
    /// True if every file is copied and takes space: no link into the cache is possible there, or the mode allows only
    /// copies.
    needs_copies: bool,
}

/// Result of a materialization.
#[derive(Debug, Clone, Serialize)]
pub struct Materialized {
    /// The folder.
    #[serde(serialize_with = "json::path")]
    pub dir: PathBuf,
    /// The folder. If the artifact or the selection is a single file, `cache/materialize.rs` replaces it with the path
    /// of that file. Not serialized, because the report of the get contains it.
    #[serde(skip)]
    pub path: PathBuf,
    /// Number of files by kind of link.
    pub links: BTreeMap<Link, usize>,
}

/// The files that the new folder must contain.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    pub(crate) key: ArtifactKey,
    /// The folder of the leased artifact.
    pub(crate) from: ArtifactDir,
    /// True if hard links are allowed. Files of a lower directory must not be linked.
    pub(crate) may_link: bool,
    pub(crate) files: Vec<(FilePath, FileEntry)>,
}

/// Content of the marker file.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    /// A note for users.
    about: String,
    #[serde(flatten)]
    key: ArtifactKey,
    /// The files as they were created. A file with another identity now belongs to the user.
    files: BTreeMap<FilePath, MarkedFile>,
}

/// A file as it was created in the folder.
#[derive(Debug, Serialize, Deserialize)]
struct MarkedFile {
    #[serde(flatten)]
    identity: FileIdentity,
    /// Older releases did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<Digest>,
}

impl Destination {
    /// Checks that `dir` may be replaced as a whole, that it can be written, and that the links of `mode` are possible
    /// there. It must not contain the cache directory or the working directory, and must not be inside the cache
    /// directory.
    pub(crate) fn check(dir: &Path, cache: &Layout, mode: LinkMode) -> Result<Self> {
        let refuse = |reason: &str, hint: &str| Err(Error::invalid(format!("{} {reason}", dir.display())).hint(hint));
        if dir.starts_with("~") {
            return refuse(
                "begins with ~, which the shell did not expand",
                "write \"$HOME/…\", or ./~/… for a folder named ~",
            );
        }
        let real = real_path(dir)?;
        let cache_root = cache.root().full();
        let cache_root = fs::canonicalize(&cache_root).unwrap_or(cache_root); // not below the root
        if std::env::current_dir().is_ok_and(|current| current.starts_with(&real)) {
            return refuse(
                "is or contains the folder this command runs in, and would be replaced as a whole",
                "name an empty or absent folder in it, or run the command elsewhere",
            );
        }
        // A mount point may have the cache directory in it, under a name that no artifact has.
        let cache_in_mount = cache_root == real.join(CACHE_IN_MOUNT) && is_mount_point(&real);
        if !cache_in_mount && (real.starts_with(&cache_root) || cache_root.starts_with(&real)) {
            return refuse(
                "contains the cache directory or is inside it",
                "choose a folder outside the cache directory",
            );
        }
        // not below the root
        if real.file_name().is_none() || absent(fs::metadata(&real)).is_ok_and(|m| m.is_some_and(|m| !m.is_dir())) {
            return refuse("is not a folder", "name a folder; it need not exist");
        }
        let (parent, name) = (real.parent().unwrap_or(Path::new("/")), real.file_name().unwrap_or_default());
        let dir_in_parent = RootedPath::root(parent).join(name);
        let in_place = files::is_folder(&dir_in_parent)?
            && dir_in_parent.is_mount().map_err(|cause| destination_error("examine", dir, cause))?;
        // In a mount point, all files are created below `real`, so `real` itself is the root of the paths.
        let dir_to_fill = if in_place { RootedPath::root(&real) } else { dir_in_parent };
        let requested = dir.to_owned();
        let mut destination = Self { dir: dir_to_fill, requested, mode, in_place, needs_copies: false };
        destination.refuse_unmanaged_files()?;
        destination.needs_copies = destination.probe_links(cache)?;
        Ok(destination)
    }

    /// Creates a temporary folder where the new files will be, and tries the links of the mode in it. Returns true if
    /// the files have to be copied.
    ///
    /// # Errors
    /// `Other` if nothing can be created there, or if the only kind of link that is allowed is not possible.
    fn probe_links(&self, cache: &Layout) -> Result<bool> {
        let parent = self.build_parent();
        let folder = BuildFolder::create(&nearest_existing(&parent), &self.build_prefix())?;
        // A read-only cache directory cannot hold the file for the trial. Then the links are tried with the real files.
        let source = cache.stagings().join(format!("{}{}", files::TEMPORARY_PREFIX, files::random_name()));
        let Ok(created) = modes::create_readable(&source) else { return Ok(false) };
        let locked = FileLock::of_temporary(created);
        let target = folder.path.join("probe");
        let kinds = kinds_to_try(self.mode, true);
        let is_possible = |kind: &Link| match kind {
            Link::Hard => source.hard_link(&target).and_then(|()| target.unlink()).is_ok(),
            Link::Reflink => reflink(&source, &target, 0o666).and_then(|()| target.unlink()).is_ok(),
            Link::Symlink => true,
            Link::Copy => false,
        };
        let may_link = kinds.iter().any(is_possible);
        files::remove_file(&source)?;
        drop(locked);
        match (may_link, kinds.contains(&Link::Copy)) {
            (false, false) => Err(impossible_link(kinds, &self.dir, Errno::OPNOTSUPP.into())),
            (may_link, _) => Ok(!may_link),
        }
    }

    /// Fails if the filesystem of the destination has no room for `files`. Called before they are downloaded.
    pub(crate) fn check_room(&self, files: &[(FilePath, FileEntry)]) -> Result<()> {
        if !self.needs_copies {
            return Ok(());
        }
        let marker = read_marker(&self.dir)?;
        let is_kept = |path: &FilePath, entry: &FileEntry| {
            self.in_place
                && marker
                    .as_ref()
                    .and_then(|marker| marker.files.get(path))
                    .is_some_and(|marked| has_content(marked, entry))
        };
        let needed: u64 = files.iter().filter(|(path, entry)| !is_kept(path, entry)).map(|(_, entry)| entry.size).sum();
        let existing = nearest_existing(&self.build_parent());
        let room = existing.filesystem().map_err(|cause| destination_error("examine", &existing, cause))?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        if needed <= free {
            return Ok(());
        }
        let (needed, free) = (human::bytes(needed), human::bytes(free));
        Err(Error::new(
            ErrorKind::Full,
            format!("{} has no room: the files take {needed}, and {free} are free", self.requested.display()),
        )
        .hint("free space there, or choose another folder"))
    }

    /// Returns the folder in which the temporary folder is created.
    fn build_parent(&self) -> RootedPath {
        if self.in_place { self.dir.clone() } else { self.dir.parent().unwrap_or_else(|| self.dir.clone()) }
    }

    /// Returns the prefix of the name of the temporary folder.
    fn build_prefix(&self) -> String {
        if self.in_place { IN_PLACE_PREFIX.to_owned() } else { format!(".{}.modelcache-", self.dir.name()) }
    }

    /// Fails if the folder contains a file that no earlier call created, or that was changed since.
    fn refuse_unmanaged_files(&self) -> Result<()> {
        match self.unmanaged_file(&self.dir)? {
            Some(unmanaged) => Err(self.unmanaged_error(&unmanaged)),
            None => Ok(()),
        }
    }

    fn unmanaged_error(&self, unmanaged: &Path) -> Error {
        Error::new(
            ErrorKind::Conflict,
            format!(
                "{} holds {}, which modelcache did not put there or which was changed since",
                self.requested.display(),
                unmanaged.display()
            ),
        )
        .hint("the folder is replaced as a whole: move that file away first, or choose a new or empty folder")
    }

    /// Builds the new folder and exchanges it with the destination; the files of a mount point are moved one by one.
    /// Durable on return.
    pub(crate) fn materialize(&self, tree: &Tree, progress: &Progress) -> Result<Materialized> {
        let parent = self.build_parent();
        fs::create_dir_all(parent.full()).map_err(|cause| destination_error("make", &parent, cause))?; // not below the root
        let _only_call = if self.in_place { Some(self.lock()?) } else { None };
        // Step 1: remove the leftovers of killed calls. In a mount point, first complete what they were moving.
        let prefix = self.build_prefix();
        self.complete_leftovers()?;
        remove_leftovers(&parent, &prefix, &self.dir)?;
        self.check_room(&tree.files)?;
        // Step 2: build the new folder under a temporary name.
        let mut new = BuildFolder::create(&parent, &prefix)?;
        let present = read_marker(&self.dir)?;
        let (mut links, mut folders) = (BTreeMap::new(), BTreeSet::from([new.path.clone()]));
        for (path, entry) in &tree.files {
            let target = new.path.join(path.as_str());
            make_folder(target.parent().as_ref().unwrap_or(&new.path), &mut folders)?;
            let kinds = kinds_to_try(self.mode, tree.may_link);
            // A mount point may have no room for a second copy, so a copy that an earlier call made is used again.
            let is_kept =
                self.in_place && self.needs_copies && keep_copy(&self.dir, present.as_ref(), path, entry, &target);
            let link = match is_kept {
                true => Link::Copy,
                false => create_file(&tree.from.view(path), &target, entry, kinds, progress)?,
            };
            *links.entry(link).or_default() += 1;
        }
        // Step 3: write the marker, and sync all folders. Reflinks and copies are already synced.
        write_marker(&new.path, tree)?;
        folders.iter().try_for_each(sync)?;
        // Step 4: exchange the folders. Check again first, because the user may have added a file to the old folder.
        self.refuse_unmanaged_files()?;
        if self.in_place {
            // If a move fails, the built folder stays: its marker is the record of the files that are moved already.
            new.keep = true;
            self.move_into_place(&new.path)?;
            new.keep = false;
            return Ok(Materialized { dir: self.dir.full(), path: self.dir.full(), links });
        }
        exchange(&new.path, &self.dir).map_err(|cause| destination_error("replace", &self.requested, cause))?;
        // Step 5: check the old folder again under the temporary name. If a file was added before the exchange, undo
        // it.
        if let Some(unmanaged) = self.unmanaged_file(&new.path)? {
            exchange(&new.path, &self.dir).map_err(|cause| destination_error("replace", &self.requested, cause))?;
            return Err(self.unmanaged_error(&unmanaged));
        }
        // Step 6: sync the parent. Dropping `new` then removes the old folder.
        sync(&parent)?;
        Ok(Materialized { dir: self.dir.full(), path: self.dir.full(), links })
    }

    /// Locks the mount point against other calls that fill it.
    fn lock(&self) -> Result<FileLock> {
        let opened = self.dir.open_dir().map_err(|cause| destination_error("open", &self.dir, cause))?;
        FileLock::of_new(opened, &self.dir)?.ok_or_else(|| {
            Error::unavailable(format!("another modelcache process fills {}", self.requested.display()))
                .hint("wait until it has ended, then run the command again")
        })
    }

    /// Completes the moves of killed calls. A built folder without a marker was not complete, and nothing of it was
    /// moved.
    fn complete_leftovers(&self) -> Result<()> {
        if !self.in_place {
            return Ok(());
        }
        built_folders(&self.dir)?.iter().try_for_each(|built| self.move_into_place(built))
    }

    /// Moves the files of the folder `built`, which is in the mount point, to their places. Files that only the old
    /// marker lists are removed first, and the new marker is moved last. Does nothing if `built` has no marker.
    fn move_into_place(&self, built: &RootedPath) -> Result<()> {
        let Some(new) = read_marker(built)? else { return Ok(()) };
        let fail = |operation, path: &RootedPath| {
            let path = path.clone();
            move |cause| destination_error(operation, &path, cause)
        };
        // A file may become a folder of the same name, so the old files are removed first.
        let old = read_marker(&self.dir)?.map(|old| old.files).unwrap_or_default();
        for (path, marked) in old.iter().filter(|(path, _)| !new.files.contains_key(path)) {
            let file = self.dir.join(path.as_str());
            // A killed call may have removed it, and put a new folder in its place.
            if !files::stat(&file)?.is_some_and(|found| !found.is_dir() && is_unchanged(&marked.identity, &found)) {
                continue;
            }
            absent(file.unlink()).map_err(fail("remove", &file))?;
            // The folders that are empty now. A folder with other entries stays.
            let parents = file.ancestors().skip(1).take_while(|folder| *folder != self.dir);
            parents.take_while(|folder| folder.remove_dir().is_ok()).for_each(drop);
        }
        let mut folders = BTreeSet::from([self.dir.clone()]);
        for path in new.files.keys() {
            let (from, to) = (built.join(path.as_str()), self.dir.join(path.as_str()));
            // A killed call has moved this file already.
            if files::stat(&from)?.is_none() {
                continue;
            }
            make_folder(&to.parent().unwrap_or_else(|| self.dir.clone()), &mut folders)?;
            // Only an empty folder can be removed this way.
            if files::is_folder(&to)? {
                to.remove_dir().map_err(fail("replace", &to))?;
            }
            from.rename(&to).map_err(fail("replace", &to))?;
        }
        folders.iter().try_for_each(sync)?;
        let marker = self.dir.join(MARKER);
        built.join(MARKER).rename(&marker).map_err(fail("write", &marker))?;
        sync(&self.dir)
    }

    /// Returns a file in `dir`, the destination or the old folder, that no earlier call created, or that was changed
    /// since.
    fn unmanaged_file(&self, dir: &RootedPath) -> Result<Option<PathBuf>> {
        let mut markers: Vec<_> = read_marker(dir)?.into_iter().collect();
        let built = if self.in_place { built_folders(dir)? } else { Vec::new() };
        for folder in &built {
            markers.extend(read_marker(folder)?);
        }
        let is_managed = |path: &FilePath, metadata: &Metadata| {
            let mut recorded = markers.iter().filter_map(|marker| marker.files.get(path));
            recorded.any(|marked| is_unchanged(&marked.identity, metadata))
        };
        let mut unmanaged = None;
        let mut visit = |path: &RootedPath, metadata: &Metadata| {
            let inside = path.below(dir).unwrap_or(Path::new(""));
            let file = inside.to_str().and_then(|path| FilePath::new(path).ok());
            let is_managed = file.is_some_and(|file| is_managed(&file, metadata));
            if !is_managed && inside != Path::new(MARKER) && unmanaged.is_none() {
                unmanaged = Some(inside.to_owned());
            }
            Ok(())
        };
        for path in files::entries(dir)? {
            // `mkfs` creates `lost+found` in a new filesystem, and only root may list it.
            let is_skipped =
                built.contains(&path) || self.in_place && matches!(path.name(), "lost+found" | CACHE_IN_MOUNT);
            match files::stat(&path)? {
                _ if is_skipped => {}
                Some(metadata) if metadata.is_dir() => files::walk_all(&path, &mut visit)?,
                Some(metadata) => visit(&path, &metadata)?,
                None => {}
            }
        }
        Ok(unmanaged)
    }
}

/// Returns the nearest existing folder at or above `folder`.
fn nearest_existing(folder: &RootedPath) -> RootedPath {
    let path = folder.full();
    RootedPath::root(path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/")))
}

/// Returns the temporary folders of calls that fill the mount point `dir`, or were killed while they did.
fn built_folders(dir: &RootedPath) -> Result<Vec<RootedPath>> {
    let is_built = |path: &RootedPath| path.name().strip_prefix(IN_PLACE_PREFIX).is_some_and(is_random);
    Ok(files::entries(dir)?.into_iter().filter(is_built).collect())
}

/// Returns the content of the marker in `dir`; `None` if there is none that can be read.
fn read_marker(dir: &RootedPath) -> Result<Option<Marker>> {
    let bytes = files::read_small(&dir.join(MARKER), MARKER_BYTES_MAX)?;
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

/// Returns true if a recorded file was created with the content of `entry`.
fn has_content(marked: &MarkedFile, entry: &FileEntry) -> bool {
    marked.identity.bytes == entry.size && marked.sha256.is_some() && marked.sha256 == entry.sha256
}

/// Links the unchanged copy of the file that an earlier call made in `dir` to `target`. Returns false if there is none.
fn keep_copy(
    dir: &RootedPath,
    present: Option<&Marker>,
    path: &FilePath,
    entry: &FileEntry,
    target: &RootedPath,
) -> bool {
    let Some(marked) = present.and_then(|marker| marker.files.get(path)) else { return false };
    let file = dir.join(path.as_str());
    let is_present = || {
        file.metadata().is_ok_and(|found| {
            let has_mode = (found.mode() & 0o100 != 0) == entry.executable;
            found.is_file() && found.nlink() == 1 && has_mode && found.identity() == marked.identity
        })
    };
    has_content(marked, entry) && is_present() && file.hard_link(target).is_ok()
}

/// Creates `folder`, which is below a folder in `made`, and its missing parents. Adds the new folders to `made`.
fn make_folder(folder: &RootedPath, made: &mut BTreeSet<RootedPath>) -> Result<()> {
    if made.contains(folder) {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make_folder(&parent, made)?;
    }
    match folder.create_dir(None) {
        // In a mount point, the folder of an older version may be there.
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists && files::is_folder(folder)? => {}
        created => created.map_err(|cause| destination_error("make", folder, cause))?,
    }
    made.insert(folder.clone());
    Ok(())
}

/// Returns true if a file still has the identity that was recorded when it was created. The mtime of a hard link into
/// the cache is not compared, because the cache may change it.
fn is_unchanged(recorded: &FileIdentity, metadata: &Metadata) -> bool {
    let now = metadata.identity();
    now == *recorded || (metadata.nlink() > 1 && now.inode == recorded.inode && now.bytes == recorded.bytes)
}

/// Returns the absolute path of `dir`. Symbolic links are resolved in the part of the path that exists.
fn real_path(dir: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(dir).map_err(|cause| destination_error("find", dir, cause))?;
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        // not below the root
        match fs::canonicalize(existing) {
            Ok(real) => return Ok(missing.iter().rev().fold(real, |path, name| path.join(name))),
            Err(cause) => match (existing.parent(), existing.file_name()) {
                // not below the root
                _ if fs::symlink_metadata(existing).is_ok_and(|metadata| metadata.is_symlink())
                    && cause.kind() == io::ErrorKind::NotFound =>
                {
                    let message = format!("{} is a symbolic link to a folder that does not exist", existing.display());
                    return Err(Error::invalid(message).hint("make the folder, or remove the link"));
                }
                (Some(parent), Some(name)) if cause.kind() == io::ErrorKind::NotFound => {
                    missing.push(name.to_owned());
                    existing = parent;
                }
                _ => return Err(destination_error("find", dir, cause)),
            },
        }
    }
}

/// The temporary folder, locked while it exists. On drop, removes the folder that then has the temporary name: the new
/// folder if the call failed, the old folder if the call succeeded.
struct BuildFolder {
    path: RootedPath,
    /// True if the folder is to stay when this value is dropped.
    keep: bool,
    _lock: FileLock,
}

impl BuildFolder {
    fn create(parent: &RootedPath, prefix: &str) -> Result<Self> {
        loop {
            let path = parent.join(format!("{prefix}{}", files::random_name()));
            path.create_dir(None).map_err(|cause| destination_error("make", &path, cause))?;
            // Another call may remove the folder as a leftover before it is locked. Then create another folder.
            if let Ok(dir) = path.open_dir()
                && let Some(lock) = FileLock::of_new(dir, &path)?
                && files::is_folder(&path)?
            {
                return Ok(Self { path, keep: false, _lock: lock });
            }
        }
    }
}

impl Drop for BuildFolder {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = files::remove(&self.path)
        {
            tracing::warn!(%error, "a temporary folder cannot be removed; the next call tries again");
        }
    }
}

/// Returns true if `name` is a random name as temporary folders have it.
fn is_random(name: &str) -> bool {
    name.len() == files::RANDOM_NAME_CHARS && name.chars().all(|c| c.is_ascii_alphanumeric())
}

/// Removes the temporary folders of killed calls. If a call was killed between the two renames that replace an
/// exchange, moves the old folder back to `destination`.
fn remove_leftovers(parent: &RootedPath, prefix: &str, destination: &RootedPath) -> Result<()> {
    for path in files::entries(parent)? {
        let Some(rest) = path.name().strip_prefix(prefix) else { continue };
        let is_old = rest.strip_suffix(OLD).is_some_and(is_random);
        if !is_old && !is_random(rest) {
            continue;
        }
        // The folder of a running call is locked.
        let Ok(dir) = path.open_dir() else { continue };
        let Ok(Some(_dead)) = FileLock::of_new(dir, &path) else { continue };
        if is_old && files::stat(destination)?.is_none() {
            path.rename(destination).map_err(|cause| destination_error("put back", destination, cause))?;
        } else {
            files::remove(&path)?;
        }
    }
    Ok(())
}

/// Returns the kinds of link to try, best first.
fn kinds_to_try(mode: LinkMode, may_link: bool) -> &'static [Link] {
    match mode {
        LinkMode::Auto if !may_link => &[Link::Reflink, Link::Copy],
        LinkMode::Only(Link::Hard) if !may_link => &[],
        LinkMode::Auto => &[Link::Hard, Link::Reflink, Link::Copy],
        LinkMode::Only(Link::Hard) => &[Link::Hard],
        LinkMode::Only(Link::Reflink) => &[Link::Reflink],
        LinkMode::Only(Link::Symlink) => &[Link::Symlink],
        LinkMode::Only(Link::Copy) => &[Link::Copy],
    }
}

/// Creates the file `target` by the first of `kinds` that is possible, and returns that kind.
fn create_file(
    view: &RootedPath,
    target: &RootedPath,
    entry: &FileEntry,
    kinds: &[Link],
    progress: &Progress,
) -> Result<Link> {
    let mut refused = io::Error::from(io::ErrorKind::Unsupported);
    for kind in kinds {
        // After a refusal, try the next kind. Any other error ends the call.
        let outcome = match kind {
            Link::Hard => hard_link(view, target, entry),
            Link::Reflink => reflink(view, target, mode_of(entry)),
            Link::Symlink => target.symlink_to(&view.full()),
            // A copy reports its progress and its errors itself.
            Link::Copy => {
                copy(view, target, entry, progress)?;
                return Ok(*kind);
            }
        };
        match outcome {
            Ok(()) => {
                progress.done(entry.size);
                return Ok(*kind);
            }
            Err(cause) if is_refusal(&cause) => refused = cause,
            Err(cause) => return Err(destination_error("link", target, cause)),
        }
    }
    Err(impossible_link(kinds, target, refused))
}

/// Returns the error for a filesystem that cannot create any of `kinds`.
fn impossible_link(kinds: &[Link], target: &RootedPath, refused: io::Error) -> Error {
    let kind = if kinds == [Link::Reflink] { "a reflink" } else { "a hard link" };
    Error::new(ErrorKind::Other, format!("{kind} is not possible at {target}"))
        .hint(format!(
            "the folder is on another filesystem, its filesystem has no such links, or the files are in the lower \
             directory, which is never hard-linked: try {}",
            LINK.set_to("auto")
        ))
        .cause(refused)
}

/// Returns true if the filesystem cannot create a link of this kind, so that the next kind is to be tried.
fn is_refusal(cause: &io::Error) -> bool {
    link::is_refusal(cause) || matches!(errno(cause), Some(Errno::INVAL | Errno::NOTTY))
}

/// Creates a hard link to `view`, which must be a read-only file of the right size.
fn hard_link(view: &RootedPath, target: &RootedPath, entry: &FileEntry) -> io::Result<()> {
    // Check the new link, not the view: another user of a shared directory may replace the view at any time.
    view.hard_link(target)?;
    let linked = target.metadata()?;
    if linked.is_file() && linked.len() == entry.size && linked.mode() & 0o222 == 0 {
        return Ok(());
    }
    // Return a refusal. The caller then tries the next kind of link: a reflink, whose bytes are not verified, or a
    // copy, whose bytes are.
    target.unlink()?;
    Err(Errno::PERM.into())
}

/// Creates a reflink of `view`, and syncs it.
fn reflink(view: &RootedPath, target: &RootedPath, mode: u32) -> io::Result<()> {
    let (from, to) = (view.open(false)?, target.create_new(mode)?);
    let cloned = ioctl_ficlone(&to, &from).map_err(io::Error::from).and_then(|()| to.sync_all());
    if cloned.is_err() {
        let _ = target.unlink();
    }
    cloned
}

/// Returns the mode with which a copy or a reflink is created; the umask reduces it.
fn mode_of(entry: &FileEntry) -> u32 {
    if entry.executable { 0o777 } else { 0o666 }
}

/// Copies `view`, and compares the copied bytes with the digest in the same pass.
fn copy(view: &RootedPath, target: &RootedPath, entry: &FileEntry, progress: &Progress) -> Result<()> {
    let mut from = view.open(false).map_err(|cause| destination_error("read", view, cause))?;
    let mut to = target.create_new(mode_of(entry)).map_err(|cause| destination_error("write", target, cause))?;
    let (mut hasher, mut buffer) = (sha2::Sha256::new(), vec![0; COPY_BYTES]);
    loop {
        let read = from.read(&mut buffer).map_err(|cause| destination_error("read", view, cause))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read]).map_err(|cause| destination_error("write", target, cause))?;
        progress.done(read as u64);
    }
    to.sync_all().map_err(|cause| destination_error("make durable", target, cause))?;
    let found = Digest::from_bytes(hasher.finalize().into());
    if entry.sha256.is_some_and(|expected| expected != found) {
        return Err(Error::corrupt(format!("the cached bytes of {view} are wrong; nothing was replaced"))
            .tier(Tier::Disk)
            .hint(format!("evict it with {} and get it again", TIER.set_to("disk"))));
    }
    Ok(())
}

/// Writes the marker file with the present identities of all files.
fn write_marker(dir: &RootedPath, tree: &Tree) -> Result<()> {
    let mut files = BTreeMap::new();
    for (path, entry) in &tree.files {
        let target = dir.join(path.as_str());
        let metadata = target.metadata().map_err(|cause| destination_error("examine", &target, cause))?;
        files.insert(path.clone(), MarkedFile { identity: metadata.identity(), sha256: entry.sha256 });
    }
    let marker = Marker {
        about: "Put here by modelcache, which replaces this folder as a whole.".into(),
        key: tree.key.clone(),
        files,
    };
    let (path, bytes) = (dir.join(MARKER), serde_json::to_vec_pretty(&marker).unwrap_or_default());
    path.create_new(0o666)
        .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
        .map_err(|cause| destination_error("write", &path, cause))
}

/// Moves the folder `new` to `dir`. If `dir` was not empty, the old folder is at the path of `new` afterwards.
fn exchange(new: &RootedPath, dir: &RootedPath) -> io::Result<()> {
    // A plain rename succeeds if `dir` does not exist or is empty.
    match new.rename(dir) {
        Err(cause) if matches!(errno(&cause), Some(Errno::NOTEMPTY | Errno::EXIST)) => {}
        renamed => return renamed,
    }
    // Otherwise exchange the two in one step.
    match new.rename_with(dir, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        exchanged => return exchanged.map_err(io::Error::from),
    }
    // The filesystem cannot exchange two folders. Rename twice; in between, `dir` does not exist.
    let old = new.with_file_name(format!("{}{OLD}", new.name()));
    dir.rename(&old)?;
    match new.rename(dir) {
        Ok(()) => old.rename(new),
        Err(cause) => {
            let _ = old.rename(dir);
            Err(cause)
        }
    }
}

fn sync(dir: &RootedPath) -> Result<()> {
    dir.open_dir().and_then(|dir| sync_folder(&dir)).map_err(|cause| destination_error("make durable", dir, cause))
}

/// Returns the error for an I/O error in the caller's folder. Unlike [`fault`](super::fault), its hints do not mention
/// the cache directory.
fn destination_error(operation: &str, path: &(impl Shown + ?Sized), cause: io::Error) -> Error {
    let (kind, hint) = match errno(&cause) {
        Some(Errno::NOSPC | Errno::DQUOT) => (ErrorKind::Full, "free space there, or choose another folder"),
        Some(Errno::FBIG) => (ErrorKind::Full, FILE_SIZE_HINT),
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => (ErrorKind::Other, "choose a folder this user may write to"),
        _ => (ErrorKind::Other, "check the folder and its filesystem"),
    };
    let error = Error::new(kind, format!("cannot {operation} {}", path.shown())).cause(cause);
    error.hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ladder::part_size;

    /// Writes `files` and their marker to `dir`.
    fn fill(dir: &RootedPath, files: &[(&str, &str)]) {
        let mut marked = BTreeMap::new();
        for (path, content) in files {
            let target = dir.join(path);
            fs::create_dir_all(target.parent().expect("parent").full()).expect("makes");
            fs::write(target.full(), content).expect("writes");
            let identity = target.metadata().expect("examines").identity();
            let mut file = target.open(false).expect("opens");
            let sha256 = Some(files::hash(&mut file, &target, part_size(1)).expect("hashes").0);
            marked.insert(FilePath::new(path).expect("path"), MarkedFile { identity, sha256 });
        }
        let key = ArtifactKey::bare("a@1").expect("key");
        let marker = Marker { about: String::new(), key, files: marked };
        fs::write(dir.join(MARKER).full(), serde_json::to_vec(&marker).expect("encodes")).expect("writes");
    }

    /// Returns the names and contents of all files below `dir` except the marker.
    fn content(dir: &RootedPath) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        files::walk_all(dir, &mut |path, _| {
            if path.name() != MARKER {
                let name = path.below(dir).expect("below").to_owned();
                found.insert(name, fs::read_to_string(path.full()).expect("reads"));
            }
            Ok(())
        })
        .expect("walks");
        found
    }

    #[test]
    fn a_move_into_a_mount_point_that_was_interrupted_is_completed_by_the_next_call() {
        let old = [("both", "old"), ("file", "old"), ("folder/a", "old"), ("gone/deep/b", "old")];
        let new = [("both", "new"), ("file/c", "new"), ("folder", "new"), ("z", "new")];
        let expected: BTreeMap<_, _> = new.iter().map(|(path, text)| (path.into(), (*text).to_owned())).collect();
        // The number of files that the interrupted call had moved; the marker is never moved before them.
        for moved in 0..=new.len() {
            let folder = tempfile::tempdir().expect("folder");
            let dir = RootedPath::root(folder.path());
            let (requested, mode) = (folder.path().to_owned(), LinkMode::Auto);
            let destination = Destination { dir: dir.clone(), requested, mode, in_place: true, needs_copies: true };
            fill(&dir, &old);
            let built = dir.join(format!("{IN_PLACE_PREFIX}{}", files::random_name()));
            fill(&built, &new);
            for (path, _) in &old[1..] {
                if moved > 0 {
                    dir.join(path).unlink().expect("removes");
                }
            }
            if moved > 0 {
                ["file", "folder"].iter().for_each(|name| drop(dir.join(name).remove_dir()));
            }
            for (path, _) in &new[..moved] {
                let target = dir.join(path);
                fs::create_dir_all(target.parent().expect("parent").full()).expect("makes");
                built.join(path).rename(&target).expect("moves");
            }
            destination.refuse_unmanaged_files().expect("all files are recorded");
            destination.complete_leftovers().expect("completes");
            remove_leftovers(&dir, IN_PLACE_PREFIX, &dir).expect("removes");
            assert_eq!(content(&dir), expected, "{moved} files were moved");
            destination.refuse_unmanaged_files().expect("all files are recorded");
            fs::write(dir.join("mine").full(), "").expect("writes");
            assert_eq!(destination.refuse_unmanaged_files().expect_err("refuses").kind(), ErrorKind::Conflict);
        }
    }
}
