//! Materializing: building a folder outside the cache with an artifact's files (`get --into DIR`).
//!
//! The new folder is built beside the destination under a temporary name, and then exchanged with it. A reader sees the
//! old folder or the new one.
//!
//! Only files that an earlier call created are ever removed: a marker file in the folder lists them. A temporary folder
//! is locked while it is being built, so that the next call recognises and removes the leftovers of a killed process.

use super::files::{self, absent};
use super::io_error::{Shown, errno};
use super::layout::ArtifactDir;
use super::link::{self, Link};
use super::lock::FileLock;
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Result, Tier};
use crate::json;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, FileIdentity};
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
/// Suffix of the temporary name of the old folder, where the filesystem cannot exchange two folders.
const OLD: &str = "-old";
/// Maximum size of a marker file in bytes.
const MARKER_BYTES_MAX: u64 = 64 << 20;
/// Buffer size for copying, in bytes.
const COPY_BYTES: usize = 1 << 20;

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
}

/// Result of a materialization.
#[derive(Debug, Clone, Serialize)]
pub struct Materialized {
    /// The folder.
    #[serde(serialize_with = "json::path")]
    pub dir: PathBuf,
    /// The file, if the artifact or the selection is a single file; otherwise the folder. The report of the get has it.
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
    files: BTreeMap<FilePath, FileIdentity>,
}

impl Destination {
    /// Checks that `dir` may be replaced as a whole. It must not contain the cache directory or the working directory,
    /// and must not be inside the cache directory.
    pub(crate) fn check(dir: &Path, cache_root: &Path) -> Result<Self> {
        let refuse = |reason: &str, hint: &str| Err(Error::invalid(format!("{} {reason}", dir.display())).hint(hint));
        let real = real_path(dir)?;
        let cache_root = fs::canonicalize(cache_root).unwrap_or_else(|_| cache_root.to_owned()); // outside the root
        if std::env::current_dir().is_ok_and(|current| current.starts_with(&real)) {
            return refuse(
                "is the folder this command runs in, and would be replaced as a whole",
                "name a folder in it, or run the command elsewhere",
            );
        }
        if real.starts_with(&cache_root) || cache_root.starts_with(&real) {
            return refuse(
                "contains the cache directory or is inside it",
                "choose a folder outside the cache directory",
            );
        }
        // outside the root
        if real.file_name().is_none() || absent(fs::metadata(&real)).is_ok_and(|m| m.is_some_and(|m| !m.is_dir())) {
            return refuse("is not a folder", "name a folder; it need not exist");
        }
        let (parent, name) = (real.parent().unwrap_or(Path::new("/")), real.file_name().unwrap_or_default());
        let destination = Self { dir: RootedPath::root(parent).join(name), requested: dir.to_owned() };
        destination.refuse_unmanaged_files()?;
        Ok(destination)
    }

    /// Fails if the folder contains a file that no earlier call created, or that was changed since.
    fn refuse_unmanaged_files(&self) -> Result<()> {
        let Some(unmanaged) = unmanaged_file(&self.dir)? else { return Ok(()) };
        Err(self.unmanaged_error(&unmanaged))
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

    /// Builds the new folder and exchanges it with the destination. Durable on return.
    pub(crate) fn materialize(&self, tree: &Tree, mode: LinkMode, progress: &Progress) -> Result<Materialized> {
        let parent = self.dir.parent().unwrap_or_else(|| self.dir.clone());
        fs::create_dir_all(parent.full()).map_err(|cause| destination_error("make", &parent, cause))?; // outside the root
        // Step 1: remove the leftovers of killed calls.
        let prefix = format!(".{}.modelcache-", self.dir.name());
        remove_leftovers(&parent, &prefix, &self.dir)?;
        // Step 2: build the new folder under a temporary name.
        let new = BuildFolder::create(&parent, &prefix)?;
        let (mut links, mut folders) = (BTreeMap::new(), BTreeSet::from([new.path.clone()]));
        for (path, entry) in &tree.files {
            let target = new.path.join(path.as_str());
            make_folder(target.parent().as_ref().unwrap_or(&new.path), &mut folders)?;
            let kinds = kinds_to_try(mode, tree.may_link);
            let link = create_file(&tree.from.view(path), &target, entry, kinds, progress)?;
            *links.entry(link).or_default() += 1;
        }
        // Step 3: write the marker, and sync all folders. Reflinks and copies are already synced.
        write_marker(&new.path, tree)?;
        folders.iter().try_for_each(sync)?;
        // Step 4: exchange the folders. Check again first, because the user may have added a file to the old folder.
        self.refuse_unmanaged_files()?;
        exchange(&new.path, &self.dir).map_err(|cause| exchange_error(&self.requested, cause))?;
        // Step 5: check the old folder again under the temporary name. If a file was added before the exchange, undo
        // it.
        if let Some(unmanaged) = unmanaged_file(&new.path)? {
            exchange(&new.path, &self.dir).map_err(|cause| exchange_error(&self.requested, cause))?;
            return Err(self.unmanaged_error(&unmanaged));
        }
        // Step 6: sync the parent. Dropping `new` then removes the old folder.
        sync(&parent)?;
        Ok(Materialized { dir: self.dir.full(), path: self.dir.full(), links })
    }
}

/// Creates `folder`, which is below a folder in `made`, and its missing parents. Adds the new folders to `made`.
fn make_folder(folder: &RootedPath, made: &mut BTreeSet<RootedPath>) -> Result<()> {
    if made.contains(folder) {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make_folder(&parent, made)?;
    }
    folder.create_dir(None).map_err(|cause| destination_error("make", folder, cause))?;
    made.insert(folder.clone());
    Ok(())
}

/// Returns a file in `dir` that no earlier call created, or that was changed since.
fn unmanaged_file(dir: &RootedPath) -> Result<Option<PathBuf>> {
    let marker = files::read_small(&dir.join(MARKER), MARKER_BYTES_MAX)?;
    let recorded = marker.and_then(|bytes| serde_json::from_slice::<Marker>(&bytes).ok()).map(|marker| marker.files);
    let mut unmanaged = None;
    files::walk_all(dir, &mut |path, metadata| {
        let inside = path.below(dir).unwrap_or(Path::new(""));
        let path = inside.to_str().and_then(|path| FilePath::new(path).ok());
        let identity = recorded.as_ref().zip(path).and_then(|(recorded, path)| recorded.get(&path));
        let is_managed = identity.is_some_and(|identity| is_unchanged(identity, metadata));
        if !is_managed && inside != Path::new(MARKER) && unmanaged.is_none() {
            unmanaged = Some(inside.to_owned());
        }
        Ok(())
    })?;
    Ok(unmanaged)
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
        // outside the root
        match fs::canonicalize(existing) {
            Ok(real) => return Ok(missing.iter().rev().fold(real, |path, name| path.join(name))),
            Err(cause) => match (existing.parent(), existing.file_name()) {
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
                return Ok(Self { path, _lock: lock });
            }
        }
    }
}

impl Drop for BuildFolder {
    fn drop(&mut self) {
        if let Err(error) = files::remove(&self.path) {
            tracing::warn!(%error, "a temporary folder cannot be removed; the next call tries again");
        }
    }
}

/// Removes the temporary folders of killed calls. If a call was killed between the two renames that replace an
/// exchange, moves the old folder back to `destination`.
fn remove_leftovers(parent: &RootedPath, prefix: &str, destination: &RootedPath) -> Result<()> {
    let is_random =
        |name: &str| name.len() == files::RANDOM_NAME_CHARS && name.chars().all(|c| c.is_ascii_alphanumeric());
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
            Link::Reflink => reflink(view, target),
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
    let kind = if kinds == [Link::Reflink] { "a reflink" } else { "a hard link" };
    Err(Error::new(ErrorKind::Other, format!("{kind} is not possible at {target}"))
        .hint("the folder lies on another filesystem, on one without such links, or beside the lower directory: try --link auto")
        .cause(refused))
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
    // Return a refusal. The caller then makes a copy, whose bytes are verified.
    target.unlink()?;
    Err(Errno::PERM.into())
}

/// Creates a reflink of `view`, and syncs it.
fn reflink(view: &RootedPath, target: &RootedPath) -> io::Result<()> {
    let (from, to) = (view.open(false)?, target.create_new(0o666)?);
    let cloned = ioctl_ficlone(&to, &from).map_err(io::Error::from).and_then(|()| to.sync_all());
    if cloned.is_err() {
        let _ = target.unlink();
    }
    cloned
}

/// Copies `view`, and compares the copied bytes with the digest in the same pass.
fn copy(view: &RootedPath, target: &RootedPath, entry: &FileEntry, progress: &Progress) -> Result<()> {
    let mut from = view.open(false).map_err(|cause| destination_error("read", view, cause))?;
    let mut to = target.create_new(0o666).map_err(|cause| destination_error("write", target, cause))?;
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
            .hint("evict it with --tier disk and get it again"));
    }
    Ok(())
}

/// Writes the marker file with the present identities of all files.
fn write_marker(dir: &RootedPath, tree: &Tree) -> Result<()> {
    let mut files = BTreeMap::new();
    for (path, _) in &tree.files {
        let target = dir.join(path.as_str());
        let metadata = target.metadata().map_err(|cause| destination_error("examine", &target, cause))?;
        files.insert(path.clone(), metadata.identity());
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

/// Returns the error for a destination that cannot be replaced.
fn exchange_error(dir: &Path, cause: io::Error) -> Error {
    match errno(&cause) {
        Some(Errno::BUSY | Errno::XDEV) => {
            Error::invalid(format!("{} is a mount, and cannot be replaced as a whole", dir.display()))
                .hint("name a folder in it")
                .cause(cause)
        }
        _ => destination_error("replace", dir, cause),
    }
}

fn sync(dir: &RootedPath) -> Result<()> {
    dir.open_dir().and_then(|dir| dir.sync_all()).map_err(|cause| destination_error("make durable", dir, cause))
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
