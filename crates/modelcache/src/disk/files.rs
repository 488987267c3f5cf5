//! Small file work shared by the disk tier: identities, durable writes, walking, removing.

use super::fault::At;
use super::lock::FileLock;
use super::modes;
use crate::digest::Digest;
use crate::error::Result;
use crate::ladder::{Ladder, LadderHasher};
use crate::manifest::FileIdentity;
use rand::distr::{Alphanumeric, SampleString};
use rustix::io::Errno;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Bytes read at a time when hashing.
const READ_BYTES: usize = 1 << 20;

/// How the names of files and folders begin that are not finished. What their writers leave behind is counted and swept.
pub(crate) const TEMPORARY: &str = "new-";

/// What tells a file from another, as manifests record it.
pub(crate) fn identity(metadata: &Metadata) -> FileIdentity {
    let mtime_ns = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
    FileIdentity { inode: metadata.ino(), bytes: metadata.len(), mtime_ns }
}

/// The same, of what the leaner call answers.
#[allow(clippy::unnecessary_cast)]
pub(crate) fn identity_of_stat(stat: &rustix::fs::Stat) -> FileIdentity {
    let mtime_ns = (stat.st_mtime as i64).saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec as i64);
    FileIdentity { inode: stat.st_ino as u64, bytes: stat.st_size as u64, mtime_ns }
}

/// Bytes that a file takes on the filesystem.
pub(crate) fn allocated(metadata: &Metadata) -> u64 {
    metadata.blocks() * 512
}

/// The metadata of `path` itself (links are not followed), or `None` if there is nothing.
pub(crate) fn stat(path: &Path) -> Result<Option<Metadata>> {
    absent(fs::symlink_metadata(path)).at("look at", path)
}

/// Turns "not found" into `None`.
pub(crate) fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file; that it is already gone is fine.
///
/// It looks first: to remove even what is not there, the kernel locks the folder against all who make names in it.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match stat(path)? {
        Some(_) => absent(fs::remove_file(path)).at("remove", path).map(|_| ()),
        None => Ok(()),
    }
}

/// Removes a folder and all it holds; that it is already gone is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    absent(fs::remove_dir_all(path)).at("remove", path).map(|_| ())
}

/// Removes whatever lies at `path`, a folder with all it holds.
pub(crate) fn remove(path: &Path) -> Result<()> {
    if is_folder(path)? { remove_tree(path) } else { remove_file(path) }
}

/// Makes names in `dir` survive a power cut.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).at("make durable", dir)
}

/// Writes `bytes` to `target` so that a reader sees the old content or the new, never a mixture; durable on return.
/// The temporary file lies in `temporary_dir`, or beside the target if that is on another mount.
pub(crate) fn replace(target: &Path, bytes: &[u8], temporary_dir: &Path) -> Result<()> {
    let place = |temporary: &Path| fs::rename(temporary, target);
    write_then(target, bytes, temporary_dir, Sync::All, place).at("write", target)
}

/// The same, durable at some later time: whoever reads `target` after a power cut may find it torn, and must notice.
/// What is there already is not lost meanwhile: it is replaced by what is durable, whatever name a power cut leaves.
pub(crate) fn replace_unsynced(target: &Path, bytes: &[u8], temporary_dir: &Path) -> Result<()> {
    let sync = if stat(target)?.is_some() { Sync::Content } else { Sync::Nothing };
    let place = |temporary: &Path| fs::rename(temporary, target);
    write_then(target, bytes, temporary_dir, sync, place).at("write", target)
}

/// The same for a hint, which nobody misses: neither the old nor the new need survive a power cut.
pub(crate) fn replace_hint(target: &Path, bytes: &[u8], temporary_dir: &Path) -> Result<()> {
    let place = |temporary: &Path| fs::rename(temporary, target);
    write_then(target, bytes, temporary_dir, Sync::Nothing, place).at("write", target)
}

/// The same for a file that is not there yet; `false` if it is by now, and stays as it is.
pub(crate) fn create(target: &Path, bytes: &[u8], temporary_dir: &Path) -> Result<bool> {
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
    target: &Path,
    bytes: &[u8],
    dir: &Path,
    sync: Sync,
    place: impl Fn(&Path) -> io::Result<()>,
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
        let _ = fs::remove_file(&temporary);
    }
    let folder = target.parent().unwrap_or(dir);
    match written {
        Err(error) if error.raw_os_error() == Some(Errno::XDEV.raw_os_error()) && folder != dir => {
            write_then(target, bytes, folder, sync, place)
        }
        Ok(()) if sync == Sync::All => File::open(folder)?.sync_all(),
        ended => ended,
    }
}

/// The whole of a small file, or `None` if there is none.
pub(crate) fn read_small(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    let read = || {
        let file = modes::open_existing(path, false)?;
        let bytes_expected = file.metadata()?.len().min(bytes_max) + 1;
        let mut bytes = Vec::with_capacity(usize::try_from(bytes_expected).unwrap_or_default());
        file.take(bytes_max + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    absent(read()).at("read", path)
}

/// Whether `path` itself is a folder; a link to one is none.
pub(crate) fn is_folder(path: &Path) -> Result<bool> {
    Ok(stat(path)?.is_some_and(|metadata| metadata.is_dir()))
}

/// The paths directly in `dir`, none if it does not exist. A link to a folder has none: what it leads to is not ours.
pub(crate) fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    if !is_folder(dir)? {
        return Ok(Vec::new());
    }
    let Some(listing) = absent(fs::read_dir(dir)).at("list", dir)? else { return Ok(Vec::new()) };
    listing.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>().at("list", dir)
}

/// Calls `visit` for every path below `dir` that is no folder; links are not followed.
pub(crate) fn walk(dir: &Path, visit: &mut dyn FnMut(&Path, &Metadata) -> Result<()>) -> Result<()> {
    for path in entries(dir)? {
        match stat(&path)? {
            Some(metadata) if metadata.is_dir() => walk(&path, visit)?,
            Some(metadata) => visit(&path, &metadata)?,
            None => {}
        }
    }
    Ok(())
}

/// Digest and ladder of an open file, from its start.
pub(crate) fn hash(file: &mut File, path: &Path, part_size: u64) -> Result<(Digest, Ladder)> {
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
