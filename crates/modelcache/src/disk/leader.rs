//! Leader election: of all processes that need the same key, one fills it and the others wait.
//!
//! The leader holds the lock file `<key>.fill` and writes a heartbeat with its progress into it four times a second.
//! Other processes do not block in `flock`: they find the lock held, and read the heartbeat.
//!
//! If the heartbeat is older than [`HEARTBEAT_TIMEOUT`], the leader counts as dead although its lock is held: the
//! process was stopped, or it died and a forked child keeps the descriptor open. The waiter that takes the next lock
//! file (`<key>.fill-1`, …) becomes its successor, with a staging folder of its own. If the old leader continues, both
//! publish the same bytes.

use super::Disk;
use super::files;
use super::lock::FileLock;
use super::rooted::RootedPath;
use crate::error::Result;
use crate::key::ArtifactKey;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime};

/// Interval between two heartbeats of a leader.
pub(crate) const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);
/// Age of a heartbeat from which its leader may count as dead.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(30);
/// Minimum time between the two checks that must both find the heartbeat too old. One check is not enough: a new leader
/// holds the lock for a moment before it writes, and the clocks of machines that share a directory may differ.
const RECHECK_INTERVAL: Duration = Duration::from_secs(3);
/// Maximum number of fill locks per key. If the leaders of all of them count as dead, the other processes only wait.
const GENERATIONS_MAX: usize = 8;
/// Size of a heartbeat in bytes. A heartbeat is padded to it, so that a shorter one overwrites a longer one completely.
const RECORD_BYTES: usize = 128;

/// Progress of a fill, written by its leader for waiting processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Heartbeat {
    pub(crate) pid: u32,
    /// Bytes downloaded so far; for a put, bytes read so far.
    pub(crate) done_bytes: u64,
    /// Total bytes of the fill; 0 while unknown.
    pub(crate) total_bytes: u64,
}

/// The leadership of the fill of one key. It ends when this value is dropped.
#[derive(Debug)]
pub(crate) struct Leader {
    lock: FileLock,
    path: RootedPath,
}

/// Result of [`Disk::try_lead`].
#[derive(Debug)]
pub(crate) enum Leadership {
    /// The caller is the leader.
    Ours(Leader),
    /// Another process is the leader. Carries its last heartbeat.
    Theirs(Heartbeat),
}

/// The last heartbeat that one waiter has read, by generation of the leader: when it was written, and when this waiter
/// first read it.
#[derive(Debug, Default)]
pub(crate) struct HeartbeatWatch(BTreeMap<usize, (SystemTime, Instant)>);

impl Disk {
    /// Tries to become the leader of the fill of `key`, without waiting. A waiter tries again with the same `watch`.
    pub(crate) fn try_lead(&self, key: &ArtifactKey, watch: &mut HeartbeatWatch) -> Result<Leadership> {
        self.ensure_writable()?;
        let mut free = None;
        for generation in 0..GENERATIONS_MAX {
            let path = self.layout().fill_lock(key, generation);
            // The lock file of a later generation exists only if a successor was elected.
            if free.is_some() && files::stat(&path)?.is_none() {
                break;
            }
            match FileLock::try_exclusive(&path)? {
                // Keep the first free lock, and go on: a successor of the lock's last holder may still be filling.
                Some(lock) => free = free.or(Some((lock, path))),
                None => {
                    let (heartbeat, written_at) = read_heartbeat(&path)?;
                    // The leader is alive, or does not count as dead yet.
                    if !watch.has_timed_out(generation, written_at) {
                        return Ok(Leadership::Theirs(heartbeat));
                    }
                    tracing::warn!(%key, pid = heartbeat.pid, "the process that fills this artifact has stopped writing its heartbeat; no longer waiting for it");
                }
            }
        }
        // Every lock is held by a leader that counts as dead. Wait until one of them ends.
        let Some((lock, path)) = free else { return Ok(Leadership::Theirs(Heartbeat::default())) };
        let leader = Leader { lock, path };
        // Write a heartbeat at once: the file still has the one of the previous leader.
        leader.heartbeat(0, 0);
        Ok(Leadership::Ours(leader))
    }

    /// Returns the last heartbeat that process `pid` wrote as the leader of the artifact with the key hash `hash`;
    /// `None` if it wrote none, or another process has led since. Takes no lock.
    pub(super) fn heartbeat_of(&self, hash: &str, pid: u32) -> Result<Option<Heartbeat>> {
        for generation in 0..GENERATIONS_MAX {
            let path = self.layout().fill_lock_of(hash, generation);
            if files::stat(&path)?.is_none() {
                break;
            }
            let (heartbeat, _) = read_heartbeat(&path)?;
            if heartbeat.pid == pid {
                return Ok(Some(heartbeat));
            }
        }
        Ok(None)
    }
}

impl HeartbeatWatch {
    /// Returns true if the heartbeat of a leader has stopped: it is too old and did not change for
    /// [`RECHECK_INTERVAL`], or it did not change for [`HEARTBEAT_TIMEOUT`]. The second rule covers a time of writing
    /// that is in the future.
    fn has_timed_out(&mut self, generation: usize, written_at: SystemTime) -> bool {
        let (known_written_at, first_read_at) = self.0.entry(generation).or_insert((written_at, Instant::now()));
        // There is a new heartbeat: start over.
        if *known_written_at != written_at {
            (*known_written_at, *first_read_at) = (written_at, Instant::now());
        }
        let age = SystemTime::now().duration_since(written_at).unwrap_or_default();
        let unchanged = first_read_at.elapsed();
        age > HEARTBEAT_TIMEOUT && unchanged > RECHECK_INTERVAL || unchanged > HEARTBEAT_TIMEOUT
    }
}

impl Leader {
    /// Writes a heartbeat with the progress of the fill, for waiting processes.
    ///
    /// A write error is ignored, for instance on a full disk before this fill has made room. In the worst case a second
    /// leader is elected.
    pub(crate) fn heartbeat(&self, done_bytes: u64, total_bytes: u64) {
        let heartbeat = Heartbeat { pid: std::process::id(), done_bytes, total_bytes };
        let mut bytes = serde_json::to_vec(&heartbeat).unwrap_or_default();
        bytes.resize(RECORD_BYTES, b' ');
        if let Err(cause) = self.lock.file().write_all_at(&bytes, 0) {
            tracing::debug!(%cause, path = %self.path, "the heartbeat cannot be written");
        }
    }
}

/// Returns the last heartbeat in the lock file at `path`, and when it was written. If the heartbeat cannot be parsed,
/// all its fields are 0.
fn read_heartbeat(path: &RootedPath) -> Result<(Heartbeat, SystemTime)> {
    let written_at = files::stat(path)?.map(|metadata| metadata.modified()).unwrap_or_else(SystemTime::now);
    let bytes = files::read_small(path, RECORD_BYTES as u64)?.unwrap_or_default();
    Ok((serde_json::from_slice(&bytes).unwrap_or_default(), written_at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};
    use std::fs::File;

    fn disk(folder: &tempfile::TempDir) -> Disk {
        Disk::open(folder.path(), ByteBound::Bytes(1 << 30), ByteBound::Bytes(0), Sharing::Off).expect("opens")
    }

    fn key() -> ArtifactKey {
        ArtifactKey::bare("model@1").expect("key")
    }

    fn lead(disk: &Disk, watch: &mut HeartbeatWatch) -> Option<Leader> {
        match disk.try_lead(&key(), watch).expect("tries") {
            Leadership::Ours(leader) => Some(leader),
            Leadership::Theirs(_) => None,
        }
    }

    /// Sets the heartbeat of the first leader to a time long ago, and returns the watch of a waiter that has read it.
    fn expire(disk: &Disk) -> HeartbeatWatch {
        let file = File::options().write(true).open(disk.layout().fill_lock(&key(), 0).full()).expect("opens");
        let long_ago = SystemTime::UNIX_EPOCH + HEARTBEAT_TIMEOUT;
        file.set_times(std::fs::FileTimes::new().set_modified(long_ago)).expect("sets");
        let first_read_at = Instant::now().checked_sub(2 * RECHECK_INTERVAL).expect("an earlier time");
        HeartbeatWatch([(0, (long_ago, first_read_at))].into())
    }

    #[test]
    fn one_process_leads_and_the_others_read_its_progress() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = disk(&folder);
        let leader = lead(&disk, &mut HeartbeatWatch::default()).expect("leads");
        leader.heartbeat(3, 7);
        let Leadership::Theirs(heartbeat) = disk.try_lead(&key(), &mut HeartbeatWatch::default()).expect("tries")
        else {
            panic!("two leaders")
        };
        assert_eq!(heartbeat, Heartbeat { pid: std::process::id(), done_bytes: 3, total_bytes: 7 });
        drop(leader);
        assert!(lead(&disk, &mut HeartbeatWatch::default()).is_some(), "the next process leads");
    }

    #[test]
    fn a_leader_whose_heartbeat_stopped_has_one_successor_until_that_one_ends() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = disk(&folder);
        let stopped = lead(&disk, &mut HeartbeatWatch::default()).expect("leads");
        assert!(lead(&disk, &mut HeartbeatWatch::default()).is_none(), "the heartbeat is recent");
        let (mut one, mut other) = (expire(&disk), expire(&disk));
        let successor = lead(&disk, &mut one).expect("succeeds");
        assert!(lead(&disk, &mut other).is_none(), "the successor is alive");
        drop(stopped);
        assert!(lead(&disk, &mut other).is_none(), "the successor still fills, although the first lock is free");
        drop(successor);
        assert!(lead(&disk, &mut other).is_some());
    }

    #[test]
    fn a_heartbeat_from_the_future_times_out_when_it_does_not_change() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = disk(&folder);
        let _leader = lead(&disk, &mut HeartbeatWatch::default()).expect("leads");
        let file = File::options().write(true).open(disk.layout().fill_lock(&key(), 0).full()).expect("opens");
        let future = SystemTime::now() + Duration::from_secs(1 << 32);
        file.set_times(std::fs::FileTimes::new().set_modified(future)).expect("sets");
        assert!(lead(&disk, &mut HeartbeatWatch::default()).is_none());
        let long_ago = Instant::now().checked_sub(HEARTBEAT_TIMEOUT + RECHECK_INTERVAL).expect("an earlier time");
        assert!(lead(&disk, &mut HeartbeatWatch([(0, (future, long_ago))].into())).is_some());
    }

    #[test]
    fn a_heartbeat_that_is_too_old_at_the_first_check_is_checked_again() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = disk(&folder);
        let _leader = lead(&disk, &mut HeartbeatWatch::default()).expect("leads");
        expire(&disk);
        assert!(lead(&disk, &mut HeartbeatWatch::default()).is_none(), "a new waiter checks twice");
    }
}
