//! Leadership: of all who want a key filled, one fills it, and the others watch.
//!
//! The leader holds `<key>.fill` and writes into it four times a second how far it is. Nobody waits in `flock`: whoever finds
//! the lock held reads that record instead. A leader whose record has been silent for [`SILENT_AFTER`] counts as gone,
//! though the lock is held: it was stopped, or it is dead and a child of it keeps the descriptor. Then the next lock in
//! line (`<key>.fill-1`, …) decides who follows it, with a staging of its own. If the silent one wakes up, both publish
//! the same bytes.

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

/// Time between two records of a leader.
pub(crate) const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);
/// Silence after which a leader counts as gone.
const SILENT_AFTER: Duration = Duration::from_secs(30);
/// A silent record is looked at twice, this far apart, before its leader is given up: a new leader holds the lock for
/// a moment before it writes, and clocks of machines that share a directory may differ.
const LOOKS_APART: Duration = Duration::from_secs(3);
/// How many leaders in line may fall silent before the others only wait.
const GENERATIONS: usize = 8;
/// Bytes of the record; it is padded, so that a shorter one leaves nothing of a longer one.
const RECORD_BYTES: usize = 128;

/// What a leader tells those who wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Heartbeat {
    pub(crate) pid: u32,
    /// Bytes of its pour that are done.
    pub(crate) done_bytes: u64,
    /// Bytes of its pour; 0 while unknown.
    pub(crate) total_bytes: u64,
}

/// Leads the fill of one key, until it is dropped.
#[derive(Debug)]
pub(crate) struct Leader {
    lock: FileLock,
    path: RootedPath,
}

/// Who leads.
#[derive(Debug)]
pub(crate) enum Leadership {
    /// This caller.
    Ours(Leader),
    /// Somebody else, who last told this.
    Theirs(Heartbeat),
}

/// What one waiter has seen of silent leaders so far: the time of their record, and when it was first seen.
#[derive(Debug, Default)]
pub(crate) struct Watch(BTreeMap<usize, (SystemTime, Instant)>);

impl Disk {
    /// Tries to become the one that fills `key`. Does not wait; a waiter calls again with the same `watch`.
    pub(crate) fn try_lead(&self, key: &ArtifactKey, watch: &mut Watch) -> Result<Leadership> {
        self.ensure_writable()?;
        let mut free = None;
        for generation in 0..GENERATIONS {
            let path = self.layout().fill_lock(key, generation);
            if free.is_some() && files::stat(&path)?.is_none() {
                break;
            }
            match FileLock::try_exclusive(&path)? {
                Some(lock) => free = free.or(Some((lock, path))),
                None => {
                    let (heartbeat, written_at) = read_heartbeat(&path)?;
                    if !watch.finds_silent(generation, written_at) {
                        return Ok(Leadership::Theirs(heartbeat));
                    }
                    tracing::warn!(%key, pid = heartbeat.pid, "whoever fills this has been silent; going on without it");
                }
            }
        }
        let Some((lock, path)) = free else { return Ok(Leadership::Theirs(Heartbeat::default())) };
        let leader = Leader { lock, path };
        leader.heartbeat(0, 0);
        Ok(Leadership::Ours(leader))
    }
}

impl Watch {
    fn finds_silent(&mut self, generation: usize, written_at: SystemTime) -> bool {
        let seen = self.0.entry(generation).or_insert((written_at, Instant::now()));
        if seen.0 != written_at {
            *seen = (written_at, Instant::now());
        }
        let age = SystemTime::now().duration_since(written_at).unwrap_or_default();
        age > SILENT_AFTER && seen.1.elapsed() > LOOKS_APART
    }
}

impl Leader {
    /// Tells those who wait that this leader lives, and how far it is. That nothing can be written (the disk is full,
    /// and this fill is about to make room) costs at worst a second leader.
    pub(crate) fn heartbeat(&self, done_bytes: u64, total_bytes: u64) {
        let heartbeat = Heartbeat { pid: std::process::id(), done_bytes, total_bytes };
        let mut bytes = serde_json::to_vec(&heartbeat).unwrap_or_default();
        bytes.resize(RECORD_BYTES, b' ');
        if let Err(cause) = self.lock.file().write_all_at(&bytes, 0) {
            tracing::debug!(%cause, path = %self.path, "the leader's record is not written");
        }
    }
}

/// What the holder of the lock at `path` last told, and when. A record that cannot be read tells nothing.
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

    fn lead(disk: &Disk, watch: &mut Watch) -> Option<Leader> {
        match disk.try_lead(&key(), watch).expect("tries") {
            Leadership::Ours(leader) => Some(leader),
            Leadership::Theirs(_) => None,
        }
    }

    /// As if the first leader's record had been written, and looked at, long ago.
    fn silence(disk: &Disk) -> Watch {
        let file = File::options().write(true).open(disk.layout().fill_lock(&key(), 0).full()).expect("opens");
        let long_ago = SystemTime::UNIX_EPOCH + SILENT_AFTER;
        file.set_times(std::fs::FileTimes::new().set_modified(long_ago)).expect("sets");
        let looked = Instant::now().checked_sub(2 * LOOKS_APART).expect("an earlier time");
        Watch([(0, (long_ago, looked))].into())
    }

    #[test]
    fn one_leads_and_the_others_see_how_far_it_is() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = disk(&folder);
        let leader = lead(&disk, &mut Watch::default()).expect("leads");
        leader.heartbeat(3, 7);
        let Leadership::Theirs(heartbeat) = disk.try_lead(&key(), &mut Watch::default()).expect("tries") else {
            panic!("two leaders")
        };
        assert_eq!(heartbeat, Heartbeat { pid: std::process::id(), done_bytes: 3, total_bytes: 7 });
        drop(leader);
        assert!(lead(&disk, &mut Watch::default()).is_some(), "the next one leads");
    }

    #[test]
    fn a_silent_leader_is_followed_by_one_and_the_line_ends_when_it_is_done() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = disk(&folder);
        let stopped = lead(&disk, &mut Watch::default()).expect("leads");
        assert!(lead(&disk, &mut Watch::default()).is_none(), "its record is fresh");
        let (mut one, mut other) = (silence(&disk), silence(&disk));
        let follower = lead(&disk, &mut one).expect("follows");
        assert!(lead(&disk, &mut other).is_none(), "the follower lives");
        drop(stopped);
        assert!(lead(&disk, &mut other).is_none(), "the follower still fills, though the first lock is free");
        drop(follower);
        assert!(lead(&disk, &mut other).is_some());
    }

    #[test]
    fn a_record_that_is_old_at_the_first_look_is_looked_at_again() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = disk(&folder);
        let _leader = lead(&disk, &mut Watch::default()).expect("leads");
        silence(&disk);
        assert!(lead(&disk, &mut Watch::default()).is_none(), "somebody who has just come waits");
    }
}
