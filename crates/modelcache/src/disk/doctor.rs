//! Examining the local directory: what a fill will need of it, tried out where it can be tried.
//!
//! Works on a directory that cannot be opened, and makes none that is not there: then the nearest folder above is looked
//! at. What is tried is tried in one folder with a temporary name below the directory, which is removed again; what a
//! kill leaves of it a sweep removes.

use super::files::{self, TEMPORARY, random_name};
use super::io_error::IoContext;
use super::layout::Layout;
use super::rooted::RootedPath;
use super::{Misplaced, check_format, link, lock, modes, ownership};
use crate::config::{ByteBound, Config};
use crate::doctor::{Area, Check};
use crate::error::{Error, ErrorKind, Result};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Less room than this is worth a word.
const LITTLE_ROOM_BYTES: u64 = 1 << 30;
/// Fewer free inodes than this are worth a word.
const FEW_INODES: u64 = 1000;

/// Looks at everything that concerns the directory of `config`. Blocks.
pub(crate) fn examine(config: &Config) -> Vec<Check> {
    let mut checks = Vec::new();
    match std::path::absolute(&config.dir) {
        Ok(root) => examine_root(&root, config, &mut checks),
        Err(cause) => {
            let error = super::fault("resolve", &config.dir, cause);
            checks.push(Check::problem(Area::Directory, &error));
        }
    }
    checks.extend(config.lower_dir.as_deref().map(examine_lower));
    checks
}

fn examine_root(root: &Path, config: &Config, checks: &mut Vec<Check>) {
    let layout = Layout::new(root);
    let usable = ownership::check(root, config.shared).and_then(|()| check_format(&layout));
    if let Err(error) = usable {
        checks.push(Check::problem(Area::Directory, &error));
        return;
    }
    let Some(there) = nearest_folder(root) else {
        let error = Error::new(ErrorKind::Directory, format!("no folder above {} exists", root.display()));
        checks.push(Check::problem(Area::Directory, &error.hint("point MODEL_CACHE_DIR to another directory")));
        return;
    };
    let is_there = there == root;
    // outside the root
    match fs::metadata(&there) {
        Ok(metadata) if !metadata.is_dir() => {
            let error = Error::new(ErrorKind::Directory, format!("{} is no folder", there.display()));
            let hint = "move what lies there away, or point MODEL_CACHE_DIR elsewhere";
            checks.push(Check::problem(Area::Directory, &error.hint(hint)));
            return;
        }
        Ok(metadata) => checks.push(found(root, is_there, &metadata)),
        Err(cause) => {
            checks.push(Check::problem(Area::Directory, &super::fault("look at", &there, cause)));
            return;
        }
    }
    checks.push(writable(&there, is_there));
    checks.extend(filesystem(&there, config, &layout, is_there));
    if is_there && checks.iter().all(|check| check.error_kind() != Some(ErrorKind::Directory)) {
        checks.extend(attempts(&layout));
    }
    if is_there {
        checks.extend(misplaced(&layout));
    }
}

/// `root`, or what is nearest above it. Something that is no folder is found, too.
fn nearest_folder(root: &Path) -> Option<PathBuf> {
    root.ancestors().find(|path| fs::symlink_metadata(path).is_ok()).map(Path::to_owned) // outside the root
}

fn found(root: &Path, is_there: bool, metadata: &fs::Metadata) -> Check {
    let says = match is_there {
        true => format!(
            "{} (owner {}, group {}, mode {:04o})",
            root.display(),
            metadata.uid(),
            metadata.gid(),
            metadata.mode() & 0o7777
        ),
        false => format!("{} is not there yet; the first command makes it", root.display()),
    };
    Check::ok(Area::Directory, says)
}

fn writable(there: &Path, is_there: bool) -> Check {
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    // outside the root
    match rustix::fs::access(there, access).at("write to", there) {
        Ok(()) => Check::ok(Area::Directory, format!("{} can be written", there.display())),
        Err(error) if is_there && holds_something(there) => {
            let served = "what it holds is served; nothing can be fetched into it";
            Check::problem(Area::Directory, &error).with_detail(served)
        }
        Err(error) => Check::problem(Area::Directory, &error),
    }
}

fn holds_something(root: &Path) -> bool {
    files::entries(&Layout::new(root).artifacts()).is_ok_and(|entries| !entries.is_empty())
}

/// Kind, room and inodes of the filesystem.
fn filesystem(there: &Path, config: &Config, layout: &Layout, is_there: bool) -> Vec<Check> {
    // outside the root
    let stat = match rustix::fs::statvfs(there).at("look at the filesystem of", there) {
        Ok(stat) => stat,
        Err(error) => return vec![Check::problem(Area::Directory, &error)],
    };
    let mut checks = vec![kind_check(there)];
    let all = stat.f_blocks * stat.f_frsize;
    let (budget, min_free) = (config.max_bytes.bytes(all), config.min_free_bytes.bytes(all));
    let free = stat.f_bavail * stat.f_frsize;
    let used = if is_there { super::budget::recorded_total(layout) } else { Some(0) };
    let room = free.saturating_sub(min_free).min(budget.saturating_sub(used.unwrap_or(0)));
    let says = format!(
        "room for {} more: budget {} ({}), {} used; {} free on the filesystem, {} of them stay free",
        gigabytes(room),
        gigabytes(budget),
        bound(config.max_bytes),
        used.map_or_else(|| "an unknown part".into(), gigabytes),
        gigabytes(free),
        gigabytes(min_free)
    );
    let fix = "free space on this filesystem, lower MODEL_CACHE_MIN_FREE_BYTES, raise MODEL_CACHE_MAX_BYTES, or point \
               MODEL_CACHE_DIR to a larger one";
    checks.push(match room {
        0 if used == Some(0) => Check::problem(Area::Directory, &Error::new(ErrorKind::Full, says).hint(fix)),
        0..LITTLE_ROOM_BYTES => Check::warning(Area::Directory, says, fix),
        _ => Check::ok(Area::Directory, says),
    });
    if stat.f_files > 0 && stat.f_favail < FEW_INODES {
        let says = format!("{} of {} inodes are free", stat.f_favail, stat.f_files);
        let fix =
            "remove small files on this filesystem, or point MODEL_CACHE_DIR elsewhere; every cached file takes one";
        checks.push(match stat.f_favail {
            0 => Check::problem(Area::Directory, &Error::new(ErrorKind::Full, says).hint(fix)),
            _ => Check::warning(Area::Directory, says, fix),
        });
    }
    checks
}

fn bound(bound: ByteBound) -> String {
    match bound {
        ByteBound::Bytes(bytes) => format!("{bytes} bytes"),
        ByteBound::Percent(percent) => format!("{percent}% of the filesystem"),
    }
}

fn gigabytes(bytes: u64) -> String {
    match bytes {
        0 => "0 B".into(),
        bytes if bytes < 1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        bytes => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

fn kind_check(there: &Path) -> Check {
    // outside the root
    let Ok(stat) = rustix::fs::statfs(there) else {
        return Check::ok(Area::Directory, "the kind of the filesystem is not known");
    };
    // The magic numbers of linux/magic.h and of the filesystems' own headers.
    let (name, caution) = match stat.f_type as u32 {
        0xef53 => ("ext4", None),
        0x5846_5342 => ("xfs", None),
        0x9123_683e => ("btrfs", None),
        0x2fc1_2fc1 => ("zfs", None),
        0x794c_7630 => {
            ("overlay", Some("a container's own layer: it goes with the container; mount a volume to keep it"))
        }
        0x0102_1994 => ("tmpfs", Some("it lies in memory: it is gone after a restart, and counts as memory used")),
        0x6969 => ("nfs", Some("a network filesystem: a local disk serves hits faster, and its locks are surer")),
        0x0bd0_0bd0 => ("lustre", Some("a network filesystem: mount it with -o flock, or use a local disk")),
        0x6573_5546 => ("fuse", Some("a filesystem in user space: it may lack hard links or locks")),
        0xff53_4d42 | 0xfe53_4d42 => ("smb", Some("a network filesystem: use a local disk")),
        0x0102_1997 => ("9p", Some("a shared folder of a virtual machine: use a disk of its own")),
        0x00c3_6400 => ("ceph", Some("a network filesystem: a local disk serves hits faster")),
        _ => ("another kind", None),
    };
    match caution {
        None => Check::ok(Area::Directory, format!("filesystem: {name}")),
        Some(caution) => Check::warning(Area::Directory, format!("filesystem: {name}"), caution),
    }
}

/// What is tried: writing, locks, links, clones, one filesystem.
fn attempts(layout: &Layout) -> Vec<Check> {
    let (root, stagings) = (layout.root(), layout.stagings());
    let parent = if files::is_folder(&stagings).unwrap_or(false) { &stagings } else { root };
    let folder = match TryFolder::make(parent) {
        Ok(folder) => folder,
        Err(error) => return vec![Check::problem(Area::Directory, &error)],
    };
    let mut checks = Vec::new();
    let file = folder.0.join("file");
    match write(&file) {
        Ok(()) => checks.push(Check::ok(Area::Directory, "a file can be written and made durable")),
        Err(error) => return vec![Check::problem(Area::Directory, &error)],
    }
    checks.push(match lock::are_honest(&folder.0.join("lock")) {
        Ok(true) => Check::ok(Area::Directory, "file locks exclude"),
        Ok(false) => Check::warning(
            Area::Directory,
            "file locks do not exclude on this filesystem: bytes may be fetched twice, and only what has long been idle is evicted",
            "mount it with working locks (NFS: version 4; Lustre: -o flock), or point MODEL_CACHE_DIR to a local disk",
        ),
        Err(error) => Check::problem(Area::Directory, &error),
    });
    checks.push(match link::hard_link(&file, &folder.0.join("link")).at("link", &file) {
        Ok(true) => Check::ok(Area::Directory, "hard links can be made"),
        Ok(false) => Check::warning(
            Area::Directory,
            "hard links are refused: files are cloned or copied, and equal files take their bytes twice",
            "point MODEL_CACHE_DIR to a filesystem with hard links",
        ),
        Err(error) => Check::problem(Area::Directory, &error),
    });
    let identity = files::stat(&file).ok().flatten().map(|metadata| metadata.identity());
    let cloned =
        identity.is_some_and(|known| matches!(link::reflink(&file, &folder.0.join("clone"), known), Ok(Some(_))));
    let says = if cloned { "files can be cloned (reflink)" } else { "no reflinks: --into links or copies" };
    checks.push(Check::ok(Area::Directory, says));
    checks.extend(one_filesystem(layout));
    checks
}

/// Entries of the wrong type.
fn misplaced(layout: &Layout) -> Vec<Check> {
    let entries = match super::misplaced::misplaced(layout) {
        Ok(entries) => entries,
        Err(error) => return vec![Check::problem(Area::Directory, &error)],
    };
    let problem = |entry: Misplaced| {
        let Misplaced { path, is, owner, .. } = entry;
        let error =
            Error::new(ErrorKind::Directory, format!("{path} is a {is} that does not belong there (owner {owner})"));
        Check::problem(
            Area::Directory,
            &error.hint(
                "`modelcache prune` moves it to quarantine/; in a sticky folder only its owner or root can remove it",
            ),
        )
    };
    entries.into_iter().map(problem).collect()
}

/// Folders of one cache on several mounts: then nothing can be linked between them.
fn one_filesystem(layout: &Layout) -> Option<Check> {
    let device = |path: &RootedPath| path.metadata().ok().map(|metadata| metadata.dev());
    let root = device(layout.root());
    let parts = [layout.stagings(), layout.blobs(), layout.artifacts(), layout.quarantine()];
    let apart = parts.iter().find(|path| device(path).is_some_and(|device| Some(device) != root))?;
    Some(Check::warning(
        Area::Directory,
        format!("{} lies on another filesystem than the rest: files are copied, not linked", apart),
        "put the whole cache directory on one filesystem",
    ))
}

/// A folder that goes when it is dropped.
struct TryFolder(RootedPath);

impl TryFolder {
    fn make(parent: &RootedPath) -> Result<Self> {
        let path = parent.join(format!("{TEMPORARY}{}", random_name()));
        modes::make_new_dir(&path).at("make a folder in", parent)?;
        Ok(Self(path))
    }
}

impl Drop for TryFolder {
    fn drop(&mut self) {
        let _ = self.0.remove_all();
    }
}

fn write(path: &RootedPath) -> Result<()> {
    let written = modes::create_readable(path)
        .and_then(|mut file| file.write_all(&[7; 64 * 1024]).and_then(|()| file.sync_all()));
    written.at("write", path)
}

fn examine_lower(root: &Path) -> Check {
    match super::Disk::reader(root, "it is only read") {
        Ok(disk) => {
            let artifacts = disk.scan().map_or(0, |found| found.iter().filter(|one| one.manifest.is_some()).count());
            Check::ok(Area::Lower, format!("{} holds {artifacts} artifacts, and is only read", root.display()))
        }
        // It is left out then, and everything works.
        Err(error) => Check::warning_of(Area::Lower, &error),
    }
}
