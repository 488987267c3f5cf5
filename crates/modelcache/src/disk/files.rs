//! Small file work shared by the disk tier: identities, durable writes, walking, removing.

use super::io_error::{IoContext, Shown};
use super::lock::FileLock;
use super::modes;
pub(crate) use super::rooted::absent;
use super::rooted::{DEPTH_MAX, Folders, Metadata, RootedPath};
use crate::digest::Digest;
use crate::error::Result;
use crate::ladder::{Ladder, LadderHasher};
use crate::manifest::FileIdentity;
use rand::distr::{Alphanumeric, SampleString};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};

/// Bytes read at a time when hashing.
const READ_BYTES: usize = 1 << 20;

/// How the names of files and folders begin that are not finished. What their writers leave behind is counted and swept.
pub(crate) const TEMPORARY: &str = "new-";

/// What tells an open file from another, as manifests record it.
pub(crate) fn identity(file: &File) -> io::Result<FileIdentity> {
    Ok(Metadata::of(file)?.identity())
}

/// The metadata of `path` itself (links are not followed), or `None` if there is nothing.
pub(crate) fn stat(path: &RootedPath) -> Result<Option<Metadata>> {
    absent(path.metadata()).at("look at", path)
}

/// Removes a file; that it is already gone is fine.
///
/// It looks first: to remove even what is not there, the kernel locks the folder against all who make names in it.
pub(crate) fn remove_file(path: &RootedPath) -> Result<()> {
    match stat(path)? {
        Some(_) => absent(path.unlink()).at("remove", path).map(|_| ()),
        None => Ok(()),
    }
}

/// Removes whatever lies at `path`, a folder with all it holds; that it is already gone is fine.
pub(crate) fn remove(path: &RootedPath) -> Result<()> {
    absent(path.remove_all()).at("remove", path).map(|_| ())
}

/// Makes names in `dir` survive a power cut.
pub(crate) fn sync_dir(dir: &RootedPath) -> Result<()> {
    dir.open_dir().and_then(|dir| dir.sync_all()).at("make durable", dir)
}

/// Writes `bytes` to `target` so that a reader sees the old content or the new, never a mixture; durable on return.
/// The temporary file lies in `temporary_dir`, or beside the target if that is on another mount.
pub(crate) fn replace(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<()> {
    let place = |temporary: &RootedPath| temporary.rename(target);
    write_then(target, bytes, temporary_dir, Sync::All, place).at("write", target)
}

/// The same, durable at some later time: whoever reads `target` after a power cut may find it torn, and must notice.
/// What is there already is not lost meanwhile: it is replaced by what is durable, whatever name a power cut leaves.
pub(crate) fn replace_unsynced(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<()> {
    let sync = if stat(target)?.is_some() { Sync::Content } else { Sync::Nothing };
    let place = |temporary: &RootedPath| temporary.rename(target);
    write_then(target, bytes, temporary_dir, sync, place).at("write", target)
}

/// The same for a hint, which nobody misses: neither the old nor the new need survive a power cut.
pub(crate) fn replace_hint(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<()> {
    let place = |temporary: &RootedPath| temporary.rename(target);
    write_then(target, bytes, temporary_dir, Sync::Nothing, place).at("write", target)
}

/// The same for a file that is not there yet; `false` if it is by now, and stays as it is.
pub(crate) fn create(target: &RootedPath, bytes: &[u8], temporary_dir: &RootedPath) -> Result<bool> {
    match write_then(target, bytes, temporary_dir, Sync::All, |temporary| modes::appear(temporary, target)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        created => created.at("write", target).map(|()| true),
    }
}

/// What of a new file is made durable at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sync {
    /// Its bytes, then its name.
    All,
    /// Its bytes.
    Content,
    Nothing,
}

/// Writes `bytes` to a temporary file and gives it its name with `place`.
///
/// The file is locked before the first byte is written, until it has its name: a sweep removes those that nobody locks.
fn write_then(
    target: &RootedPath,
    bytes: &[u8],
    dir: &RootedPath,
    sync: Sync,
    place: impl Fn(&RootedPath) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = dir.join(format!("{TEMPORARY}{}", random_name()));
    let synced = |file: &File| if sync == Sync::Nothing { Ok(()) } else { file.sync_all() };
    let written = modes::create_readable(&temporary).and_then(|file| {
        let lock = FileLock::of_temporary(file)?;
        lock.file().write_all(bytes)?;
        synced(lock.file())?;
        place(&temporary)
    });
    if written.is_err() {
        let _ = temporary.unlink();
    }
    let folder = target.parent().unwrap_or_else(|| dir.clone());
    match written {
        Err(error) if error.raw_os_error() == Some(Errno::XDEV.raw_os_error()) && folder != *dir => {
            write_then(target, bytes, &folder, sync, place)
        }
        Ok(()) if sync == Sync::All => folder.open_dir()?.sync_all(),
        ended => ended,
    }
}

/// The whole of a small file, or `None` if there is none.
pub(crate) fn read_small(path: &RootedPath, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    let read = || {
        let file = path.open(false)?;
        let bytes_expected = file.metadata()?.len().min(bytes_max) + 1;
        let mut bytes = Vec::with_capacity(usize::try_from(bytes_expected).unwrap_or_default());
        file.take(bytes_max + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    absent(read()).at("read", path)
}

/// Whether `path` itself is a folder; a link to one is none.
pub(crate) fn is_folder(path: &RootedPath) -> Result<bool> {
    Ok(stat(path)?.is_some_and(|metadata| metadata.is_dir()))
}

/// The paths directly in `dir`, none if it does not exist. A link to a folder has none: what it leads to is not ours.
pub(crate) fn entries(dir: &RootedPath) -> Result<Vec<RootedPath>> {
    Ok(absent(dir.entries()).at("list", dir)?.unwrap_or_default())
}

/// Calls `visit` for every path below `dir` that is no folder; links are not followed.
pub(crate) fn walk(dir: &RootedPath, visit: &mut dyn FnMut(&RootedPath, &Metadata) -> Result<()>) -> Result<()> {
    walk_down(dir, DEPTH_MAX, visit)
}

fn walk_down(
    dir: &RootedPath,
    depth: usize,
    visit: &mut dyn FnMut(&RootedPath, &Metadata) -> Result<()>,
) -> Result<()> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(io::Error::other("folders lie too deep in each other")).at("walk through", dir);
    };
    let mut folder = Folders::default();
    for path in entries(dir)? {
        match folder.metadata(&path).at("look at", &path)? {
            Some(metadata) if metadata.is_dir() => walk_down(&path, depth, visit)?,
            Some(metadata) => visit(&path, &metadata)?,
            None => {}
        }
    }
    Ok(())
}

/// Digest and ladder of an open file, from its start.
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

/// Characters of a [`random_name`], which are letters and digits.
pub(crate) const RANDOM_NAME_CHARS: usize = 16;

/// A name that no other process chooses.
pub(crate) fn random_name() -> String {
    Alphanumeric.sample_string(&mut rand::rng(), RANDOM_NAME_CHARS)
}
