//! Materializing: an artifact's files in a folder of the caller's own, which is replaced as a whole.
//!
//! The folder is built beside its place, under a name of its own, and changes places with what was there. Whoever looks
//! sees the old folder or the new one. What was not put there by an earlier call is never removed: a marker file in the
//! folder lists what was. A folder whose builder died is removed by the next call; the live ones are locked.

use super::files::{self, absent};
use super::io_error::{Shown, errno};
use super::layout::ArtifactDir;
use super::link::{self, Link};
use super::lock::FileLock;
use super::rooted::{Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, FILE_SIZE_HINT, Result, Tier};
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

/// Says in a materialized folder what was put there. No artifact has a file of this name.
const MARKER: &str = ".modelcache.json";
/// Closes the name of an old folder while it is out of its place.
const OLD: &str = "-old";
/// Bytes of a marker that are read.
const MARKER_BYTES_MAX: u64 = 64 << 20;
/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// How files come into the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinkMode {
    /// A hard link where that is possible, else a reflink, else a copy.
    #[default]
    Auto,
    /// This way or not at all.
    Only(Link),
}

/// A folder that may be replaced: absent, empty, or materialized before.
#[derive(Debug, Clone)]
pub struct Destination {
    dir: RootedPath,
    asked: PathBuf,
}

/// A folder that was materialized.
#[derive(Debug, Clone, Serialize)]
pub struct Materialized {
    /// The folder.
    pub dir: PathBuf,
    /// The one file, if the artifact or the selection is one; else the folder.
    pub path: PathBuf,
    /// How many files came which way.
    pub links: BTreeMap<Link, usize>,
}

/// What shall stand in the folder.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    pub(crate) key: ArtifactKey,
    /// Where the files are lent from.
    pub(crate) from: ArtifactDir,
    /// Whether that may be linked to: the lower directory's may not.
    pub(crate) may_link: bool,
    pub(crate) files: Vec<(FilePath, FileEntry)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    /// For people.
    about: String,
    #[serde(flatten)]
    key: ArtifactKey,
    /// What was put there; a file that is another now is the user's.
    files: BTreeMap<FilePath, FileIdentity>,
}

impl Destination {
    /// Looks whether `dir` may be replaced. `cache_root` and the present folder may not be in it.
    pub(crate) fn check(dir: &Path, cache_root: &Path) -> Result<Self> {
        let refuse = |why: &str, hint: &str| Err(Error::invalid(format!("{} {why}", dir.display())).hint(hint));
        let real = real_path(dir)?;
        let cache_root = fs::canonicalize(cache_root).unwrap_or_else(|_| cache_root.to_owned()); // outside the root
        if std::env::current_dir().is_ok_and(|present| present.starts_with(&real)) {
            return refuse(
                "is the folder this command runs in, and would be replaced as a whole",
                "name a folder in it, or run the command elsewhere",
            );
        }
        if real.starts_with(&cache_root) || cache_root.starts_with(&real) {
            return refuse("and the cache directory lie in each other", "choose a folder outside the cache directory");
        }
        // outside the root
        if real.file_name().is_none() || absent(fs::metadata(&real)).is_ok_and(|m| m.is_some_and(|m| !m.is_dir())) {
            return refuse("is no folder", "name a folder: it need not exist");
        }
        let (above, name) = (real.parent().unwrap_or(Path::new("/")), real.file_name().unwrap_or_default());
        let destination = Self { dir: RootedPath::root(above).join(name), asked: dir.to_owned() };
        destination.refuse_what_is_not_ours()?;
        Ok(destination)
    }

    /// Refuses a folder with files that no earlier call put there.
    fn refuse_what_is_not_ours(&self) -> Result<()> {
        let Some(unmanaged) = unmanaged_file(&self.dir)? else { return Ok(()) };
        Err(self.not_ours(&unmanaged))
    }

    fn not_ours(&self, unmanaged: &Path) -> Error {
        Error::new(
            ErrorKind::Conflict,
            format!(
                "{} holds {}, which modelcache did not put there or which was changed since",
                self.asked.display(),
                unmanaged.display()
            ),
        )
        .hint("the folder is replaced as a whole: move that away first, or choose a new or empty folder")
    }

    /// Builds the folder beside its place and puts it there; durable on return.
    pub(crate) fn materialize(&self, tree: &Tree, mode: LinkMode, progress: &Progress) -> Result<Materialized> {
        let parent = self.dir.parent().unwrap_or_else(|| self.dir.clone());
        fs::create_dir_all(parent.full()).map_err(|cause| trouble("make", &parent, cause))?; // outside the root
        let prefix = format!(".{}.modelcache-", self.dir.name());
        sweep(&parent, &prefix, &self.dir)?;
        let site = Site::open(&parent, &prefix)?;
        let (mut links, mut folders) = (BTreeMap::new(), BTreeSet::from([site.path.clone()]));
        for (path, entry) in &tree.files {
            let target = site.path.join(path.as_str());
            make_folder(target.parent().as_ref().unwrap_or(&site.path), &mut folders)?;
            let link = place(&tree.from.view(path), &target, entry, ways(mode, tree.may_link), progress)?;
            *links.entry(link).or_default() += 1;
        }
        write_marker(&site.path, tree)?;
        folders.iter().try_for_each(sync)?;
        // Somebody may have put something there meanwhile, or may be doing so while the two change places.
        self.refuse_what_is_not_ours()?;
        swap(&site.path, &self.dir).map_err(|cause| not_swapped(&self.asked, cause))?;
        if let Some(unmanaged) = unmanaged_file(&site.path)? {
            swap(&site.path, &self.dir).map_err(|cause| not_swapped(&self.asked, cause))?;
            return Err(self.not_ours(&unmanaged));
        }
        sync(&parent)?;
        Ok(Materialized { dir: self.dir.full(), path: self.dir.full(), links })
    }
}

/// Makes a folder below one of `made`, and those in between; `made` gains them.
fn make_folder(folder: &RootedPath, made: &mut BTreeSet<RootedPath>) -> Result<()> {
    if made.contains(folder) {
        return Ok(());
    }
    if let Some(above) = folder.parent() {
        make_folder(&above, made)?;
    }
    folder.create_dir(None).map_err(|cause| trouble("make", folder, cause))?;
    made.insert(folder.clone());
    Ok(())
}

/// A file in `dir` that no earlier call put there as it is now.
fn unmanaged_file(dir: &RootedPath) -> Result<Option<PathBuf>> {
    let marker = files::read_small(&dir.join(MARKER), MARKER_BYTES_MAX)?;
    let ours = marker.and_then(|bytes| serde_json::from_slice::<Marker>(&bytes).ok()).map(|marker| marker.files);
    let mut unmanaged = None;
    files::walk(dir, &mut |path, metadata| {
        let inside = path.below(dir).unwrap_or(Path::new(""));
        let put_there = ours.as_ref().zip(inside.to_str().and_then(|path| FilePath::new(path).ok()));
        let known = put_there.and_then(|(ours, path)| ours.get(&path)).is_some_and(|put| is_still(put, metadata));
        if !known && inside != Path::new(MARKER) && unmanaged.is_none() {
            unmanaged = Some(inside.to_owned());
        }
        Ok(())
    })?;
    Ok(unmanaged)
}

/// Whether a file is the one that was put there. Of a hard link into the cache, whose mtime is the cache's, the inode
/// tells.
fn is_still(put: &FileIdentity, metadata: &Metadata) -> bool {
    let now = metadata.identity();
    now == *put || (metadata.nlink() > 1 && now.inode == put.inode && now.bytes == put.bytes)
}

/// Where `dir` really is, links followed as far as it exists.
fn real_path(dir: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(dir).map_err(|cause| trouble("find", dir, cause))?;
    let mut missing = Vec::new();
    let mut there = absolute.as_path();
    loop {
        // outside the root
        match fs::canonicalize(there) {
            Ok(real) => return Ok(missing.iter().rev().fold(real, |path, name| path.join(name))),
            Err(cause) => match (there.parent(), there.file_name()) {
                (Some(parent), Some(name)) if cause.kind() == io::ErrorKind::NotFound => {
                    missing.push(name.to_owned());
                    there = parent;
                }
                _ => return Err(trouble("find", dir, cause)),
            },
        }
    }
}

/// The folder while it is being built. Dropped, it removes what then lies under its name: itself, or the old folder.
struct Site {
    path: RootedPath,
    _alive: FileLock,
}

impl Site {
    fn open(parent: &RootedPath, prefix: &str) -> Result<Self> {
        loop {
            let path = parent.join(format!("{prefix}{}", files::random_name()));
            path.create_dir(None).map_err(|cause| trouble("make", &path, cause))?;
            // Between the two somebody's sweep may have taken it for a dead one.
            if let Ok(dir) = path.open_dir()
                && let Some(alive) = FileLock::of_new(dir, &path)?
                && files::is_folder(&path)?
            {
                return Ok(Self { path, _alive: alive });
            }
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Err(error) = files::remove(&self.path) {
            tracing::warn!(%error, "a temporary folder stays; the next call removes it");
        }
    }
}

/// Removes what died while it was being built. An old folder that died between leaving its place and the new one's
/// coming there goes back.
fn sweep(parent: &RootedPath, prefix: &str, place: &RootedPath) -> Result<()> {
    let random = |name: &str| name.len() == files::RANDOM_NAME_CHARS && name.chars().all(|c| c.is_ascii_alphanumeric());
    for path in files::entries(parent)? {
        let Some(rest) = path.name().strip_prefix(prefix) else { continue };
        let is_old = rest.strip_suffix(OLD).is_some_and(random);
        if !is_old && !random(rest) {
            continue;
        }
        let Ok(dir) = path.open_dir() else { continue };
        let Ok(Some(_dead)) = FileLock::of_new(dir, &path) else { continue };
        if is_old && files::stat(place)?.is_none() {
            path.rename(place).map_err(|cause| trouble("put back", place, cause))?;
        } else {
            files::remove(&path)?;
        }
    }
    Ok(())
}

/// The ways to be tried, best first.
fn ways(mode: LinkMode, may_link: bool) -> &'static [Link] {
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

/// Brings one file to `target`; tells which way.
fn place(
    view: &RootedPath,
    target: &RootedPath,
    entry: &FileEntry,
    ways: &[Link],
    progress: &Progress,
) -> Result<Link> {
    let mut refused = io::Error::from(io::ErrorKind::Unsupported);
    for way in ways {
        let outcome = match way {
            Link::Hard => hard_link(view, target, entry),
            Link::Reflink => reflink(view, target),
            Link::Symlink => target.symlink_to(&view.full()),
            Link::Copy => {
                copy(view, target, entry, progress)?;
                return Ok(*way);
            }
        };
        match outcome {
            Ok(()) => {
                progress.done(entry.size);
                return Ok(*way);
            }
            Err(cause) if is_refusal(&cause) => refused = cause,
            Err(cause) => return Err(trouble("link", target, cause)),
        }
    }
    let way = if ways == [Link::Reflink] { "a reflink" } else { "a hard link" };
    Err(Error::new(ErrorKind::Other, format!("{way} is not possible at {target}"))
        .hint("the folder lies on another filesystem, on one without such links, or beside the lower directory: try --link auto")
        .cause(refused))
}

/// Whether the filesystem cannot link this way; another way may do.
fn is_refusal(cause: &io::Error) -> bool {
    link::is_refusal(cause) || matches!(errno(cause), Some(Errno::INVAL | Errno::NOTTY))
}

/// Makes a hard link. Refuses what is not a read-only file of the right size: in a shared directory another user may have
/// put something else in the place of the view.
fn hard_link(view: &RootedPath, target: &RootedPath, entry: &FileEntry) -> io::Result<()> {
    view.hard_link(target)?;
    let linked = target.metadata()?;
    if linked.is_file() && linked.len() == entry.size && linked.mode() & 0o222 == 0 {
        return Ok(());
    }
    // A copy is checked.
    target.unlink()?;
    Err(Errno::PERM.into())
}

fn reflink(view: &RootedPath, target: &RootedPath) -> io::Result<()> {
    let (from, to) = (view.open(false)?, target.create_new(0o666)?);
    let cloned = ioctl_ficlone(&to, &from).map_err(io::Error::from).and_then(|()| to.sync_all());
    if cloned.is_err() {
        let _ = target.unlink();
    }
    cloned
}

/// Copies and checks in the same pass.
fn copy(view: &RootedPath, target: &RootedPath, entry: &FileEntry, progress: &Progress) -> Result<()> {
    let mut from = view.open(false).map_err(|cause| trouble("read", view, cause))?;
    let mut to = target.create_new(0o666).map_err(|cause| trouble("write", target, cause))?;
    let (mut hasher, mut buffer) = (sha2::Sha256::new(), vec![0; COPY_BYTES]);
    loop {
        let read = from.read(&mut buffer).map_err(|cause| trouble("read", view, cause))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read]).map_err(|cause| trouble("write", target, cause))?;
        progress.done(read as u64);
    }
    to.sync_all().map_err(|cause| trouble("make durable", target, cause))?;
    let found = Digest::from_bytes(hasher.finalize().into());
    if entry.sha256.is_some_and(|expected| expected != found) {
        return Err(Error::corrupt(format!("the cached bytes of {view} are wrong; nothing was replaced"))
            .tier(Tier::Disk)
            .hint("evict it with --tier disk and get it again"));
    }
    Ok(())
}

fn write_marker(dir: &RootedPath, tree: &Tree) -> Result<()> {
    let mut put = BTreeMap::new();
    for (path, _) in &tree.files {
        let target = dir.join(path.as_str());
        let metadata = target.metadata().map_err(|cause| trouble("look at", &target, cause))?;
        put.insert(path.clone(), metadata.identity());
    }
    let marker = Marker {
        about: "Put here by modelcache, which replaces this folder as a whole.".into(),
        key: tree.key.clone(),
        files: put,
    };
    let (path, bytes) = (dir.join(MARKER), serde_json::to_vec_pretty(&marker).unwrap_or_default());
    path.create_new(0o666)
        .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
        .map_err(|cause| trouble("write", &path, cause))
}

/// Puts `new` in the place of `dir`; what was there then lies under the name of `new`.
fn swap(new: &RootedPath, dir: &RootedPath) -> io::Result<()> {
    match new.rename(dir) {
        Err(cause) if matches!(errno(&cause), Some(Errno::NOTEMPTY | Errno::EXIST)) => {}
        renamed => return renamed,
    }
    match new.rename_with(dir, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        exchanged => return exchanged.map_err(io::Error::from),
    }
    // This filesystem cannot exchange: for a moment there is no folder.
    let aside = new.with_file_name(format!("{}{OLD}", new.name()));
    dir.rename(&aside)?;
    match new.rename(dir) {
        Ok(()) => aside.rename(new),
        Err(cause) => {
            let _ = aside.rename(dir);
            Err(cause)
        }
    }
}

fn not_swapped(dir: &Path, cause: io::Error) -> Error {
    match errno(&cause) {
        Some(Errno::BUSY | Errno::XDEV) => {
            Error::invalid(format!("{} is a mount, and cannot be replaced as a whole", dir.display()))
                .hint("name a folder in it")
                .cause(cause)
        }
        _ => trouble("replace", dir, cause),
    }
}

fn sync(dir: &RootedPath) -> Result<()> {
    dir.open_dir().and_then(|dir| dir.sync_all()).map_err(|cause| trouble("make durable", dir, cause))
}

/// Trouble in the caller's own folder, which is none of the cache directory's.
fn trouble(operation: &str, path: &(impl Shown + ?Sized), cause: io::Error) -> Error {
    let (kind, hint) = match errno(&cause) {
        Some(Errno::NOSPC | Errno::DQUOT) => (ErrorKind::Full, "free space there, or choose another folder"),
        Some(Errno::FBIG) => (ErrorKind::Full, FILE_SIZE_HINT),
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => (ErrorKind::Other, "choose a folder this user may write to"),
        _ => (ErrorKind::Other, "see whether the folder and its filesystem are in order"),
    };
    let error = Error::new(kind, format!("cannot {operation} {}", path.shown())).cause(cause);
    error.hint(hint)
}
