//! Doctor checks of the local directory: permissions, filesystem, free space, locks, links, and misplaced entries.
//!
//! Most checks also run if the directory cannot be opened. If the directory does not exist, it is not created, and the
//! nearest existing folder above it is checked instead. Locks and links are tried in a temporary folder in `staging/`,
//! which is removed afterwards. If the process is killed, a sweep removes that folder.

use super::files::{self, TEMPORARY_PREFIX, random_name};
use super::io_error::IoContext;
use super::layout::Layout;
use super::optional::OptionalCall;
use super::rooted::RootedPath;
use super::{Misplaced, check_format, link, lock, modes, ownership};
use crate::check::{Area, Check};
use crate::config::{ByteBound, Config, Environment};
use crate::error::{Error, ErrorKind, Result};
use crate::option_name::call::INTO;
use crate::option_name::setting::{DIR, MAX_BYTES, MIN_FREE_BYTES};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The doctor warns if fewer bytes than this are available.
const SPACE_WARNING_BYTES: u64 = 1 << 30;
/// Magic number of overlayfs, the filesystem of a container's own layer.
const OVERLAY_MAGIC: u32 = 0x794c_7630;
/// Files that the kubelet mounts into each container. They are on the filesystem of the node that also has `emptyDir`
/// volumes.
const KUBELET_FILES: [&str; 2] = ["/etc/hosts", "/dev/termination-log"];
/// The doctor warns if fewer inodes than this are free.
const INODES_WARNING: u64 = 1000;

/// Runs all checks of the directory and of the lower directory in `config`. Blocks.
pub(crate) fn examine(config: &Config, environment: &Environment) -> Vec<Check> {
    let mut checks = Vec::new();
    match std::path::absolute(&config.dir) {
        Ok(root) => {
            examine_root(&root, config, &mut checks);
            let folder = nearest_existing(&root);
            checks.extend(folder.and_then(|folder| volume_limit_check(&folder, config.max_bytes, environment)));
        }
        Err(cause) => {
            let error = super::fault("resolve", &config.dir, cause);
            checks.push(Check::problem(Area::Directory, &error));
        }
    }
    checks.extend(config.lower_dir.as_deref().map(lower_check));
    checks
}

fn examine_root(root: &Path, config: &Config, checks: &mut Vec<Check>) {
    // Without the right owner and format, the other checks do not apply.
    let layout = Layout::new(root);
    let usable = ownership::check(root, config.shared).and_then(|()| check_format(&layout));
    if let Err(error) = usable {
        checks.push(Check::problem(Area::Directory, &error));
        return;
    }
    let Some(folder) = nearest_existing(root) else {
        let error = Error::new(ErrorKind::Directory, format!("no folder above {} exists", root.display()));
        checks.push(Check::problem(Area::Directory, &error.hint(format!("point {DIR} to another directory"))));
        return;
    };
    let root_exists = folder == root;
    // not below the root
    match fs::metadata(&folder) {
        Ok(metadata) if !metadata.is_dir() => {
            let error = Error::new(ErrorKind::Directory, format!("{} is not a folder", folder.display()));
            let hint = format!("move it away, or point {DIR} elsewhere");
            checks.push(Check::problem(Area::Directory, &error.hint(hint)));
            return;
        }
        Ok(metadata) => checks.push(root_check(root, root_exists, &metadata)),
        Err(cause) => {
            checks.push(Check::problem(Area::Directory, &super::fault("examine", &folder, cause)));
            return;
        }
    }
    checks.push(access_check(&folder, root_exists));
    checks.extend(filesystem_checks(&folder, config, &layout, root_exists));
    if root_exists && checks.iter().all(|check| check.kind != Some(ErrorKind::Directory)) {
        checks.extend(trial_checks(&layout));
    }
    if root_exists {
        checks.extend(misplaced_checks(&layout));
    }
}

/// Returns the first of `root` and the paths above it that exists, whether or not it is a folder.
pub(super) fn nearest_existing(root: &Path) -> Option<PathBuf> {
    root.ancestors().find(|path| fs::symlink_metadata(path).is_ok()).map(Path::to_owned) // not below the root
}

/// Reports owner, group and mode of the root.
fn root_check(root: &Path, root_exists: bool, metadata: &fs::Metadata) -> Check {
    let summary = match root_exists {
        true => format!(
            "{} (owner {}, group {}, mode {:04o})",
            root.display(),
            metadata.uid(),
            metadata.gid(),
            metadata.mode() & 0o7777
        ),
        false => format!("{} does not exist yet; the first command creates it", root.display()),
    };
    Check::ok(Area::Directory, summary)
}

/// Reports whether `folder` can be written. A read-only cache directory with artifacts is still served.
fn access_check(folder: &Path, root_exists: bool) -> Check {
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    // not below the root
    match rustix::fs::access(folder, access).at("write to", folder) {
        Ok(()) => Check::ok(Area::Directory, format!("{} can be written", folder.display())),
        Err(error) if root_exists && has_artifacts(folder) => {
            let detail = "its artifacts are still served; nothing can be downloaded into it";
            Check::problem(Area::Directory, &error).with_detail(detail)
        }
        Err(error) => Check::problem(Area::Directory, &error),
    }
}

/// Returns true if the directory has entries in `artifacts/`.
fn has_artifacts(root: &Path) -> bool {
    files::entries(&Layout::new(root).artifacts()).is_ok_and(|entries| !entries.is_empty())
}

/// Reports type, free space and free inodes of the filesystem.
fn filesystem_checks(folder: &Path, config: &Config, layout: &Layout, root_exists: bool) -> Vec<Check> {
    // not below the root
    let stat = match rustix::fs::statvfs(folder).at("examine the filesystem of", folder) {
        Ok(stat) => stat,
        Err(error) => return vec![Check::problem(Area::Directory, &error)],
    };
    let mut checks = vec![filesystem_type_check(folder)];
    let filesystem_bytes = stat.f_blocks * stat.f_frsize;
    let (budget, min_free) = (config.max_bytes.bytes(filesystem_bytes), config.min_free_bytes.bytes(filesystem_bytes));
    let free = stat.f_bavail * stat.f_frsize;
    let used = if root_exists { super::budget::recorded_total(layout) } else { Some(0) };
    let room = free.saturating_sub(min_free).min(budget.saturating_sub(used.unwrap_or(0)));
    let summary = format!(
        "room for {} more: budget {} ({}), {} used; {} free on the filesystem, of which {} must stay free",
        gigabytes(room),
        gigabytes(budget),
        bound_text(config.max_bytes),
        used.map_or_else(|| "an unknown amount".into(), gigabytes),
        gigabytes(free),
        gigabytes(min_free)
    );
    let fix = format!(
        "free space on this filesystem, lower {MIN_FREE_BYTES}, raise {MAX_BYTES}, or point {DIR} to a \
         larger one"
    );
    checks.push(match room {
        0 if used == Some(0) => Check::problem(Area::Directory, &Error::new(ErrorKind::Full, summary).hint(fix)),
        0..SPACE_WARNING_BYTES => Check::warning(Area::Directory, summary, fix),
        _ => Check::ok(Area::Directory, summary),
    });
    if stat.f_files > 0 && stat.f_favail < INODES_WARNING {
        let summary = format!("{} of {} inodes are free", stat.f_favail, stat.f_files);
        let fix = format!(
            "remove small files on this filesystem, or point {DIR} elsewhere; every cached file takes an inode"
        );
        checks.push(match stat.f_favail {
            0 => Check::problem(Area::Directory, &Error::new(ErrorKind::Full, summary).hint(fix)),
            _ => Check::warning(Area::Directory, summary, fix),
        });
    }
    checks
}

/// Warns about a budget that is a share of a Kubernetes node's filesystem, because the limits of the pod and of its
/// volume (`sizeLimit`) cannot be seen from inside a container.
fn volume_limit_check(folder: &Path, budget: ByteBound, environment: &Environment) -> Option<Check> {
    // Kubernetes sets the variable in every container.
    environment.get("KUBERNETES_SERVICE_HOST")?;
    let ByteBound::Percent(percent) = budget else { return None };
    let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev()); // not below the root
    let own = device(folder)?;
    // The layer of the container is on the node, too, and counts towards the limit of the pod.
    let statfs = rustix::fs::statfs(folder); // not below the root
    let is_layer = statfs.is_ok_and(|stat| stat.f_type as u32 == OVERLAY_MAGIC);
    if !is_layer && !KUBELET_FILES.iter().any(|file| device(Path::new(file)) == Some(own)) {
        return None;
    }
    Some(Check::warning(
        Area::Directory,
        format!(
            "the budget is {percent}% of the filesystem of the Kubernetes node; the kubelet evicts a pod that uses more \
             than its ephemeral-storage limit or the sizeLimit of its emptyDir, which are not visible here"
        ),
        format!("set {MAX_BYTES} to less than the limit, for instance to 45GiB if it is 50Gi"),
    ))
}

fn bound_text(bound: ByteBound) -> String {
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

/// Reports the type of the filesystem, with a warning if a cache should not be on such a filesystem.
fn filesystem_type_check(folder: &Path) -> Check {
    // not below the root
    let Ok(stat) = rustix::fs::statfs(folder) else {
        return Check::ok(Area::Directory, "the type of the filesystem is unknown");
    };
    // The magic numbers of linux/magic.h and of the filesystems' own headers.
    let (name, remedy) = match stat.f_type as u32 {
        0xef53 => ("ext4", None),
        0x5846_5342 => ("xfs", None),
        0x9123_683e => ("btrfs", None),
        0x2fc1_2fc1 => ("zfs", None),
        OVERLAY_MAGIC => {
            ("overlay", Some("mount a volume: this is the container's own layer, which is removed with it"))
        }
        0x0102_1994 => {
            ("tmpfs", Some("use a disk: this is memory, so the files take up memory and are lost at a restart"))
        }
        0x6969 => ("nfs", Some("use a local disk: it serves hits faster, and has more reliable locks")),
        0x0bd0_0bd0 => ("lustre", Some("mount it with -o flock, or use a local disk: this is a network filesystem")),
        0x6573_5546 => ("fuse", Some("use a local disk: a filesystem in user space may lack hard links or locks")),
        0xff53_4d42 | 0xfe53_4d42 => ("smb", Some("use a local disk: this is a network filesystem")),
        0x0102_1997 => ("9p", Some("use a disk of its own: this is a shared folder of a virtual machine")),
        0x00c3_6400 => ("ceph", Some("use a local disk: it serves hits faster")),
        _ => ("unrecognized type", None),
    };
    match remedy {
        None => Check::ok(Area::Directory, format!("filesystem: {name}")),
        Some(remedy) => Check::warning(Area::Directory, format!("filesystem: {name}"), remedy),
    }
}

/// Tries writing and syncing, locks, hard links and reflinks in a temporary folder. Then checks that all folders of the
/// cache are on one filesystem.
fn trial_checks(layout: &Layout) -> Vec<Check> {
    let (root, stagings) = (layout.root(), layout.stagings());
    // Use `staging/`, because a sweep removes temporary folders there. If it does not exist, use the root.
    let parent = if files::is_folder(&stagings).unwrap_or(false) { &stagings } else { root };
    let folder = match TrialFolder::make(parent) {
        Ok(folder) => folder,
        Err(error) => return vec![Check::problem(Area::Directory, &error)],
    };
    let mut checks = Vec::new();
    let file = folder.0.join("file");
    match write_and_sync(&file) {
        Ok(()) => checks.push(Check::ok(Area::Directory, "a file can be written and made durable")),
        Err(error) => return vec![Check::problem(Area::Directory, &error)],
    }
    for call in [OptionalCall::SetTime, OptionalCall::SyncFolder, OptionalCall::SetMode] {
        if let Some(cause) = call.try_out(&file, &folder.0) {
            let fix = format!("point {DIR} to a local disk, or to a mount that allows it");
            checks.push(Check::warning(Area::Directory, format!("{} ({cause})", call.refusal()), fix));
        }
    }
    checks.push(match lock::are_honest(&folder.0.join("lock")) {
        Ok(true) => Check::ok(Area::Directory, "file locks work"),
        Ok(false) => Check::warning(
            Area::Directory,
            "file locks have no effect on this filesystem: files may be downloaded twice, and only artifacts that have long been idle are evicted",
            format!("mount it with working locks (NFS: version 4; Lustre: -o flock), or point {DIR} to a local disk"),
        ),
        Err(error) => Check::problem(Area::Directory, &error),
    });
    checks.push(match link::hard_link(&file, &folder.0.join("link")).at("link", &file) {
        Ok(true) => Check::ok(Area::Directory, "hard links can be made"),
        Ok(false) => Check::warning(
            Area::Directory,
            "hard links are refused: files are cloned or copied, and equal files take up space twice",
            format!("point {DIR} to a filesystem with hard links"),
        ),
        Err(error) => Check::problem(Area::Directory, &error),
    });
    let identity = files::stat(&file).ok().flatten().map(|metadata| metadata.identity());
    let cloned =
        identity.is_some_and(|known| matches!(link::reflink(&file, &folder.0.join("clone"), known), Ok(Some(_))));
    let summary = if cloned {
        "files can be cloned (reflink)".to_owned()
    } else {
        format!("reflinks are not supported: {INTO} makes hard links or copies")
    };
    checks.push(Check::ok(Area::Directory, summary));
    checks.extend(one_filesystem(layout));
    checks
}

/// Reports each entry of the wrong type.
fn misplaced_checks(layout: &Layout) -> Vec<Check> {
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

/// Warns if a folder of the cache is on another filesystem than the root: files cannot be linked between the two.
fn one_filesystem(layout: &Layout) -> Option<Check> {
    let device = |path: &RootedPath| path.metadata().ok().map(|metadata| metadata.dev());
    let root = device(layout.root());
    let folders = [layout.stagings(), layout.blobs(), layout.artifacts(), layout.quarantine()];
    let apart = folders.iter().find(|path| device(path).is_some_and(|device| Some(device) != root))?;
    Some(Check::warning(
        Area::Directory,
        format!("{} is on another filesystem than the rest of the cache: files are copied, not linked", apart),
        "put the whole cache directory on one filesystem",
    ))
}

/// A temporary folder, removed on drop.
struct TrialFolder(RootedPath);

impl TrialFolder {
    fn make(parent: &RootedPath) -> Result<Self> {
        let path = parent.join(format!("{TEMPORARY_PREFIX}{}", random_name()));
        modes::make_new_dir(&path).at("make a folder in", parent)?;
        Ok(Self(path))
    }
}

impl Drop for TrialFolder {
    fn drop(&mut self) {
        let _ = self.0.remove_all();
    }
}

/// Writes and syncs a file of 64 KiB.
fn write_and_sync(path: &RootedPath) -> Result<()> {
    let written = modes::create_readable(path)
        .and_then(|mut file| file.write_all(&[7; 64 * 1024]).and_then(|()| file.sync_all()));
    written.at("write", path)
}

/// Reports whether the lower directory can be used.
fn lower_check(root: &Path) -> Check {
    match super::Disk::open_read_only(root, "it is only read") {
        Ok(disk) => {
            let artifacts =
                disk.scan().map_or(0, |found| found.iter().filter(|artifact| artifact.manifest.is_some()).count());
            Check::ok(Area::Lower, format!("{} holds {artifacts} artifacts, and is only read", root.display()))
        }
        // A warning only: without a lower directory, everything else works.
        Err(error) => Check::warning_of(Area::Lower, &error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn in_a_pod_a_budget_in_percent_of_the_node_is_a_warning() {
        let pod = Environment(HashMap::from([("KUBERNETES_SERVICE_HOST".into(), "10.0.0.1".into())]));
        let warned = |folder: &str, budget, environment: &Environment| {
            let check = volume_limit_check(Path::new(folder), budget, environment);
            check.is_some_and(|check| check.message.contains("sizeLimit") && check.fix.is_some())
        };
        let percent = ByteBound::Percent(80);
        // `/etc` is on the filesystem of `/etc/hosts`, or in the layer of the container.
        assert!(warned("/etc", percent, &pod));
        assert!(!warned("/proc", percent, &pod), "a filesystem of its own");
        assert!(!warned("/etc", ByteBound::Bytes(1 << 30), &pod) && !warned("/etc", percent, &Environment::default()));
    }
}
