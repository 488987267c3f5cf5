//! The processes that hold a file lock, according to `/proc/locks`. For messages only; no decision depends on it.
//!
//! The list may be incomplete. A process in another PID namespace is not visible. For a child that inherited the
//! descriptor, the process that took the lock is reported in its place.

use super::pin::Holder;
use super::rooted::RootedPath;
use std::fs;
use std::path::Path;

/// Returns the visible processes that hold a `flock` on `path`.
pub(super) fn of_flock(path: &RootedPath) -> Vec<Holder> {
    let (Ok(metadata), Ok(table)) = (path.metadata(), fs::read_to_string("/proc/locks")) else {
        return Vec::new();
    };
    let device = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let mut pids = flock_pids(&table, metadata.ino(), Some(device));
    if pids.is_empty() {
        // On layered filesystems, `stat` reports another device than the lock table. Compare the inode alone.
        pids = flock_pids(&table, metadata.ino(), None);
    }
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter().filter_map(holder).collect()
}

/// Returns the ids of the processes that hold a `flock` on an inode, according to the lock `table`.
///
/// A line is `1: FLOCK  ADVISORY  READ 1234 fd:01:5678 0 EOF`. Lines with `->` are of waiting processes and are left
/// out.
fn flock_pids(table: &str, inode: u64, device: Option<(u32, u32)>) -> Vec<u32> {
    let holder = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = fields[..] else { return None };
        let mut place = place.split(':');
        let number = |text: Option<&str>| u32::from_str_radix(text?, 16).ok();
        let found = (number(place.next())?, number(place.next())?);
        let matches = place.next()?.parse() == Ok(inode) && device.is_none_or(|device| device == found);
        matches.then(|| pid.parse().ok()).flatten()
    };
    table.lines().filter_map(holder).collect()
}

/// Returns process id and command name, or `None` if the process is not visible in this PID namespace.
fn holder(pid: u32) -> Option<Holder> {
    let folder = Path::new("/proc").join(pid.to_string());
    if pid == 0 || !folder.exists() {
        return None;
    }
    let command = fs::read_to_string(folder.join("comm")).ok().map(|name| name.trim_end().to_owned());
    Some(Holder { pid, command })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_holders_of_the_file_are_found_in_the_lock_table() {
        let table = "\
1: FLOCK  ADVISORY  READ 11 fd:01:5678 0 EOF
2: FLOCK  ADVISORY  READ 12 fd:02:5678 0 EOF
2: -> FLOCK  ADVISORY  WRITE 13 fd:01:5678 0 EOF
3: POSIX  ADVISORY  WRITE 14 fd:01:5678 0 EOF
4: FLOCK  ADVISORY  WRITE 15 fd:01:56789 0 EOF
";
        assert_eq!(flock_pids(table, 5678, Some((0xfd, 1))), [11]);
        assert_eq!(flock_pids(table, 5678, None), [11, 12]);
    }

    #[test]
    fn this_process_is_reported_as_the_holder_of_its_lock() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("lock");
        let lock = super::super::FileLock::try_shared(&path).expect("opens").expect("free");
        let pids: Vec<u32> = of_flock(&path).iter().map(|holder| holder.pid).collect();
        assert_eq!(pids, [std::process::id()]);
        drop(lock);
        assert_eq!(of_flock(&path), []);
    }
}
