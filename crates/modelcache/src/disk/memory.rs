//! Memory that is available for the page cache, on the machine and in the control group of this process.
//!
//! Pages of the page cache count against the limit of a group, but are reclaimed when memory is needed. Inactive file
//! pages therefore count as free here. A limit that cannot be read counts as no limit.
//!
//! Sources: Linux `Documentation/filesystems/proc.rst` (MemAvailable), `Documentation/admin-guide/cgroup-v2.rst` and
//! `cgroup-v1/memory.rst`.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the bytes that can be used before active memory is reclaimed; `None` if neither the machine nor a group
/// reports a value.
pub(crate) fn free_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    let group =
        fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_free(&text, Path::new("/sys/fs/cgroup")));
    [machine, group].into_iter().flatten().min()
}

/// Returns `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Returns the smallest number of free bytes among the process's control group and the groups above it.
fn group_free(cgroup: &str, mount: &Path) -> Option<u64> {
    cgroup.lines().filter_map(|line| hierarchy_free(line, mount)).min()
}

/// Returns the smallest number of free bytes in the hierarchy of one line of `/proc/self/cgroup`, which has the form
/// `number:controllers:path`.
fn hierarchy_free(line: &str, mount: &Path) -> Option<u64> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let (root, limit, usage) = match controllers {
        // Version 2.
        "" => (mount.to_owned(), "memory.max", "memory.current"),
        // Version 1, with the memory controller.
        _ if controllers.split(',').any(|name| name == "memory") => {
            (mount.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
        }
        _ => return None,
    };
    // In a container, the path may be that of the host, which does not exist here. The group of the container is then
    // the root that is visible here.
    let group = root.join(path.trim_start_matches('/'));
    let groups = group.ancestors().take_while(|folder| folder.starts_with(&root)).map(Path::to_owned);
    let left = |folder: PathBuf| {
        let limit = number(&folder.join(limit))?;
        let used = number(&folder.join(usage))?.saturating_sub(inactive_file_bytes(&folder));
        Some(limit.saturating_sub(used))
    };
    groups.filter_map(left).min()
}

/// Returns the number in a file, or `None` if it has `max` or cannot be read.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Returns the bytes of inactive file pages of the group at `folder`.
fn inactive_file_bytes(folder: &Path) -> u64 {
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let value = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    // In version 1, `total_inactive_file` includes the groups below. In version 2, `inactive_file` does.
    value("total_inactive_file ").or_else(|| value("inactive_file ")).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, text: &str) {
        fs::create_dir_all(folder).expect("folder");
        fs::write(folder.join(name), text).expect("writes");
    }

    #[test]
    fn available_memory_is_read_from_meminfo() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        assert!(free_bytes().is_none_or(|bytes| bytes > 0));
    }

    #[test]
    fn the_smallest_free_memory_up_to_the_root_counts_and_inactive_pages_are_free() {
        let folder = tempfile::tempdir().expect("folder");
        let mount = folder.path();
        let pod = mount.join("kubepods/pod1");
        write(&pod, "memory.max", "1000\n");
        write(&pod, "memory.current", "900\n");
        write(&pod, "memory.stat", "anon 100\ninactive_file 300\nactive_file 200\n");
        write(&pod.join("main"), "memory.max", "max\n");
        assert_eq!(group_free("0::/kubepods/pod1/main\n", mount), Some(400));
        assert_eq!(group_free("0::/elsewhere\n", mount), None, "the group has no limit");
        write(mount, "memory.max", "500");
        write(mount, "memory.current", "450");
        assert_eq!(group_free("0::/elsewhere\n", mount), Some(50), "the group that a container sees as its root");
    }

    #[test]
    fn version_1_groups_are_read_from_other_files() {
        let folder = tempfile::tempdir().expect("folder");
        let group = folder.path().join("memory/docker/x");
        write(&group, "memory.limit_in_bytes", "1000");
        write(&group, "memory.usage_in_bytes", "700");
        write(&group, "memory.stat", "inactive_file 1\ntotal_inactive_file 500\n");
        assert_eq!(group_free("4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n0::/y\n", folder.path()), Some(800));
    }
}
