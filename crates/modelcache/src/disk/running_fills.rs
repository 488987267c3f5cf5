//! The fills that run on the directory at the moment, of all processes.
//!
//! A fill is found by its staging folder, whose journal names artifact and process. Its progress comes from the
//! heartbeat of the leader. For display only; no decision depends on it.

use super::pin::Holder;
use super::{Disk, holders};
use crate::error::Result;
use serde::Serialize;
use std::collections::BTreeMap;

/// A fill of the local directory that is running, in this process or in another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RunningFill {
    /// The reference to the artifact.
    pub reference: String,
    /// The process that fills it.
    pub process: Holder,
    /// Bytes downloaded so far; for a put, bytes read so far. While `total_bytes` is `None`, the bytes that the fill
    /// takes on disk.
    pub done_bytes: u64,
    /// Total bytes of the fill. `None` while they are unknown: before and after the download, and for the files of an
    /// archive.
    pub total_bytes: Option<u64>,
}

impl Disk {
    /// Returns the running fills of all processes, sorted by reference and process.
    pub(crate) fn running_fills(&self) -> Result<Vec<RunningFill>> {
        let mut fills: BTreeMap<(String, u32), RunningFill> = BTreeMap::new();
        for staging in self.stagings()?.into_iter().filter(|staging| staging.live) {
            let visible = holders::of_flock(&staging.journal()).into_iter().next();
            let process = visible.unwrap_or(Holder { pid: staging.pid, command: None });
            // Fills of several files of one artifact share a leader and its heartbeat.
            let fill = fills.entry((staging.key.clone(), staging.pid)).or_insert(RunningFill {
                reference: staging.key.clone(),
                process,
                done_bytes: 0,
                total_bytes: None,
            });
            match self.heartbeat_of(staging.key_hash(), staging.pid)?.filter(|heartbeat| heartbeat.total_bytes > 0) {
                Some(heartbeat) => {
                    (fill.done_bytes, fill.total_bytes) = (heartbeat.done_bytes, Some(heartbeat.total_bytes));
                }
                None => fill.done_bytes += staging.allocated,
            }
        }
        Ok(fills.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};
    use crate::disk::{HeartbeatWatch, Leadership};
    use crate::key::ArtifactKey;

    #[test]
    fn a_running_fill_is_reported_with_the_progress_of_its_leader_until_it_ends() {
        let folder = tempfile::tempdir().expect("folder");
        let open = || Disk::open(folder.path(), ByteBound::Bytes(1 << 30), ByteBound::Bytes(0), Sharing::Off);
        let (filling, watching) = (open().expect("opens"), open().expect("opens"));
        let key = ArtifactKey::bare("model@1").expect("key");
        let running = || watching.running_fills().expect("reads");
        assert_eq!(running(), []);

        let Leadership::Ours(leader) = filling.try_lead(&key, &mut HeartbeatWatch::default()).expect("tries") else {
            panic!("another leader")
        };
        let staging = filling.begin_fill(&key, &[]).expect("begins");
        let fill = running().pop().expect("a fill");
        assert_eq!((fill.reference.as_str(), fill.process.pid), ("model@1", std::process::id()));
        assert_eq!((fill.done_bytes, fill.total_bytes), (0, None), "the total is unknown before the download");
        leader.heartbeat(3, 7);
        assert_eq!(running(), [RunningFill { done_bytes: 3, total_bytes: Some(7), ..fill }]);

        staging.discard().expect("discards");
        assert_eq!(running(), [], "the heartbeat of an ended fill does not count");
    }

    #[test]
    fn the_heartbeat_of_an_earlier_leader_is_not_the_progress_of_a_fill() {
        let folder = tempfile::tempdir().expect("folder");
        let disk = Disk::open(folder.path(), ByteBound::Bytes(1 << 30), ByteBound::Bytes(0), Sharing::Off);
        let (disk, key) = (disk.expect("opens"), ArtifactKey::bare("model@1").expect("key"));
        let _staging = disk.begin_fill(&key, &[]).expect("begins");
        let earlier = br#"{"pid": 1, "done_bytes": 3, "total_bytes": 7}"#;
        std::fs::write(disk.layout().fill_lock(&key, 0).full(), earlier).expect("writes");
        let fills = disk.running_fills().expect("reads");
        assert_eq!(fills.iter().map(|fill| fill.total_bytes).collect::<Vec<_>>(), [None]);
    }
}
