//! File helpers of the disk tier: identities, atomic writes, walking and removing.

use super::io_error::{IoContext, Shown, errno, is_inaccessible};
use super::lock::FileLock;
use super::modes;
use super::optional::sync_folder;
pub(crate) use super::rooted::absent;
use super::rooted::{DEPTH_MAX, Folders, Metadata, RootedPath, too_deep};
use crate::digest::Digest;
use crate::error::Result;
use crate::ladder::{Ladder, LadderHasher};
use crate::manifest::FileIdentity;
use rand::distr::{Alphanumeric, SampleString};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};

/// Buffer size for hashing, in bytes.
const READ_BYTES: usize = 1 << 20;

/// Prefix of the names of temporary files and folders. A sweep finds leftovers by this prefix.
pub(crate) const TEMPORARY_PREFIX: &str = "new-";

/// Returns the identity of an open file, as manifests record it: inode, size and mtime.
pub(crate) fn identity(file: &File) -> io::Result<FileIdentity> {
    Ok(Metadata::of(file)?.identity())
}

/// Returns the metadata of `path` itself (symbolic links are not followed), or `None` if nothing exists there.
pub(crate) fn stat(path: &RootedPath) -> Result<Option<Metadata>> {
    absent(path.metadata()).at("examine", path)
}

/// Removes the file at `path`, if it exists.
pub(crate) fn remove_file(path: &RootedPath) -> Result<()> {
    // Call `stat` first: even to remove a name that does not exist, the kernel locks the folder against new entries.
    match stat(path)? {
        Some(_) => absent(path.unlink()).at("remove", path).map(|_| ()),
        None => Ok(()),
    }
}

/// Removes the file or folder at `path`, if it exists. A folder is removed with its content.
pub(crate) fn remove(path: &RootedPath) -> Result<()> {
    absent(path.remove_all()).at("remove", path).map(|_| ())
}

/// Like [`remove`], but returns false if a folder is left because a file in it is still open: NFS keeps such a file
/// under a name that begins with `.nfs`.
pub(crate) fn remove_unless_open(path: &RootedPath) -> Result<bool> {
    match remove(path) {
        Err(error) if is_left_open(&error) => Ok(false),
        removed => removed.map(|()| true),
    }
}

/// Returns true if a folder could not be removed because a file in it is open elsewhere.
fn is_left_open(error: &(dyn std::error::Error + 'static)) -> bool {
    let cause = std::iter::successors(Some(error), |error| error.source()).find_map(|error| error.downcast_ref());
    cause.and_then(errno).is_some_and(|errno| matches!(errno, Errno::NOTEMPTY | Errno::BUSY))
}

/// Syncs `dir`, so that the names in it survive a power cut.
pub(crate) fn sync_dir(dir: &RootedPath) -> Result<()> {
    dir.open_dir().and_then(|dir| sync_folder(&dir)).at("make durable", dir)
}

/// Replaces the content of `target` atomically: a reader sees the old bytes or the new ones. The new content is durable
/// on return.
///
/// The temporary file is created in `temporary_dir`, or beside the target if that folder is on another mount.
pub(crate) fn replace(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<()> {
    let place = |temporary: &RootedPath| temporary.rename(target);
    write_then(target, bytes, temporary_dir, SyncScope::All, place).at("write", target)
}

/// Replaces the content of `target` atomically, without syncing its folder. After a power cut, the file has the old or
/// the new content. A file that did not exist before is not synced at all: after a power cut it may be torn, which a
/// reader must detect.
pub(crate) fn replace_unsynced(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<()> {
    // If the target exists, sync the new bytes first. Otherwise the rename could reach the disk before them, and a
    // power cut would lose the old and the new content.
    let sync = if stat(target)?.is_some() { SyncScope::Content } else { SyncScope::Nothing };
    let place = |temporary: &RootedPath| temporary.rename(target);
    write_then(target, bytes, temporary_dir, sync, place).at("write", target)
}

/// Replaces the content of a file that can be determined again, such as a remembered request limit, atomically and
/// without syncing. After a power cut, the old and the new content may be lost.
pub(crate) fn replace_hint(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<()> {
    let place = |temporary: &RootedPath| temporary.rename(target);
    write_then(target, bytes, temporary_dir, SyncScope::Nothing, place).at("write", target)
}

/// Creates the file `target` with `bytes`, durable on return. If it exists, changes nothing and returns false.
pub(crate) fn create(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<bool> {
    match write_then(target, bytes, temporary_dir, SyncScope::All, |temporary| {
        modes::rename_no_replace(temporary, target)
    }) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        created => created.at("write", target).map(|()| true),
    }
}

/// How much of a new file is synced before the write returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SyncScope {
    /// The bytes, and then the folder that has the name.
    All,
    /// Only the bytes.
    Content,
    Nothing,
}

/// Writes `bytes` to a temporary file, which `place` then renames or links to its final name.
fn write_then(
    target: &RootedPath,
    bytes: &[u8],
    dir: &RootedPath,
    sync: SyncScope,
    place: impl Fn(&RootedPath) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = dir.join(format!("{TEMPORARY_PREFIX}{}", random_name()));
    let sync_content = |file: &File| if sync == SyncScope::Nothing { Ok(()) } else { file.sync_all() };
    let written = modes::create_readable(&temporary).and_then(|file| {
        // Lock the file before the first byte and until the rename: a sweep removes temporary files that are not
        // locked.
        let lock = FileLock::of_temporary(file)?;
        lock.file().write_all(bytes)?;
        sync_content(lock.file())?;
        place(&temporary)
    });
    if written.is_err() {
        let _ = temporary.unlink();
    }
    let folder = target.parent().unwrap_or_else(|| dir.clone());
    match written {
        // `dir` is on another mount than the target: write the temporary file beside the target.
        Err(error) if error.raw_os_error() == Some(Errno::XDEV.raw_os_error()) && folder != *dir => {
            write_then(target, bytes, &folder, sync, place)
        }
        Ok(()) if sync == SyncScope::All => sync_folder(&folder.open_dir()?),
        ended => ended,
    }
}

/// Returns the content of a small file, or `None` if it does not exist. Of a file with more than `bytes_max` bytes,
/// returns the first `bytes_max` + 1, so that the caller sees that it is too large.
pub(crate) fn read_small(path: &RootedPath, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    absent(path.open(false).and_then(|file| read_start(file, bytes_max))).at("read", path)
}

/// Like [`read_small`], but also returns `None` if the file may have been written by another user.
///
/// The owner must be this user. The file must also be writable and have one link. Otherwise it may be a blob or view of
/// this user that another user has linked to this path, with content that came from elsewhere.
pub(crate) fn read_own(path: &RootedPath, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    let Some(file) = absent(path.open(false)).at("open", path)? else { return Ok(None) };
    let metadata = Metadata::of(&file).at("examine", path)?;
    let is_own =
        metadata.uid() == rustix::process::geteuid().as_raw() && metadata.nlink() == 1 && metadata.mode() & 0o200 != 0;
    if !is_own {
        tracing::debug!(%path, owner = metadata.uid(), "a record that another user may have written is ignored");
        return Ok(None);
    }
    read_start(file, bytes_max).map(Some).at("read", path)
}

fn read_start(file: File, bytes_max: u64) -> io::Result<Vec<u8>> {
    let bytes_expected = file.metadata()?.len().min(bytes_max) + 1;
    let mut bytes = Vec::with_capacity(usize::try_from(bytes_expected).unwrap_or_default());
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns true if `path` itself is a folder. A symbolic link to a folder is not one.
pub(crate) fn is_folder(path: &RootedPath) -> Result<bool> {
    Ok(stat(path)?.is_some_and(|metadata| metadata.is_dir()))
}

/// Returns the paths directly in `dir`, or none if it does not exist or is a symbolic link.
pub(crate) fn entries(dir: &RootedPath) -> Result<Vec<RootedPath>> {
    Ok(absent(dir.entries()).at("list", dir)?.unwrap_or_default())
}

/// Like [`entries`], but also returns none if this user [cannot read](is_inaccessible) the folder.
pub(crate) fn entries_if_accessible(dir: &RootedPath) -> Result<Vec<RootedPath>> {
    unless_inaccessible(entries(dir), dir).map(Option::unwrap_or_default)
}

/// Returns `None` if `result` failed because the entry at `path` [is inaccessible](is_inaccessible) to this user: one
/// user of a shared directory must not stop the work of the others.
pub(crate) fn unless_inaccessible<T>(result: Result<T>, path: &RootedPath) -> Result<Option<T>> {
    match result {
        Err(error) if is_inaccessible(&error) => {
            tracing::debug!(%path, %error, "an entry that this user cannot read or remove is skipped");
            Ok(None)
        }
        result => result.map(Some),
    }
}

/// Calls `visit` for every path below `dir` that is not a folder. Symbolic links are not followed. Folders below `dir`
/// that [cannot be read](is_inaccessible) are skipped.
pub(crate) fn walk(dir: &RootedPath, visit: &mut dyn FnMut(&RootedPath, &Metadata) -> Result<()>) -> Result<()> {
    walk_down(dir, DEPTH_MAX, &|path, below| unless_inaccessible(below, path).map(drop), visit)
}

/// Like [`walk`], but fails if a folder cannot be read.
pub(crate) fn walk_all(dir: &RootedPath, visit: &mut dyn FnMut(&RootedPath, &Metadata) -> Result<()>) -> Result<()> {
    walk_down(dir, DEPTH_MAX, &|_, below| below, visit)
}

/// `accept` gets the outcome of each folder below `dir`, and returns the error that ends the walk, if any.
fn walk_down(
    dir: &RootedPath,
    levels_left: usize,
    accept: &dyn Fn(&RootedPath, Result<()>) -> Result<()>,
    visit: &mut dyn FnMut(&RootedPath, &Metadata) -> Result<()>,
) -> Result<()> {
    let Some(levels_left) = levels_left.checked_sub(1) else { return Err(too_deep()).at("walk through", dir) };
    let mut folders = Folders::default();
    for path in entries(dir)? {
        match folders.metadata(&path).at("examine", &path)? {
            Some(metadata) if metadata.is_dir() => accept(&path, walk_down(&path, levels_left, accept, visit))?,
            Some(metadata) => visit(&path, &metadata)?,
            None => {}
        }
    }
    Ok(())
}

/// Returns the digest and the ladder of an open file, which is read from its present position to the end.
pub(crate) fn hash(file: &mut File, path: &(impl Shown + ?Sized), part_size: u64) -> Result<(Digest, Ladder)> {
    let mut hasher = LadderHasher::new(part_size);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer).at("read", path)? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// Length of a [`random_name`] in characters.
pub(crate) const RANDOM_NAME_CHARS: usize = 16;

/// Returns a random name of letters and digits, unique for all practical purposes.
pub(crate) fn random_name() -> String {
    Alphanumeric.sample_string(&mut rand::rng(), RANDOM_NAME_CHARS)
}
