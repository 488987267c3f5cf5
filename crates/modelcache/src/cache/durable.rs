//! Durability: when published files are synced to stable storage.
//!
//! By default a get returns once its files are verified and published, and syncs them in the background, one artifact
//! at a time. The pending syncs can also be handed off to another process. A get that requires durable files waits
//! here, also for files that another process published.

use super::resolve::FetchRequest;
use super::{Cache, SyncHandoff};
use crate::config::Durable;
use crate::disk::{Disk, LeasedArtifact, Purpose};
use crate::error::{Context, Result, Tier};
use crate::key::ArtifactKey;
use crate::selection::Selection;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Time between two attempts to sync, if another process holds the budget lock for too long.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Serializes the syncs of this process. The lock is asynchronous, so that waiting calls occupy no thread.
#[derive(Debug, Default)]
pub(super) struct Durability(Arc<tokio::sync::Mutex<()>>);

impl Cache {
    /// Syncs everything that this process has published, and waits until it is durable.
    ///
    /// # Errors
    /// `Directory` if the sync of a file failed. That file is quarantined, and no longer leased.
    pub async fn make_durable(&self) -> Result<()> {
        let _turn = self.0.durability.0.lock().await;
        self.on_disk(move |disk| disk.sync_dirty()).await
    }

    /// Returns the number of bytes that this process has published and not synced yet.
    pub fn undurable_bytes(&self) -> u64 {
        self.0.disk.dirty_bytes()
    }

    /// Returns the pending syncs of this process, with the lock, for a process that calls [`make_durable_for`]. Returns
    /// `None` if nothing is pending. Call [`handed_off`](Self::handed_off) once that process runs.
    pub fn hand_off(&self) -> Result<Option<SyncHandoff>> {
        self.0.disk.hand_off()
    }

    /// Drops the pending syncs and the lock of this process, because another process has taken over both.
    pub fn handed_off(&self) {
        self.0.disk.handed_off();
    }

    /// Drops the pending syncs in a forked child, where it must be called before anything else. They belong to the
    /// parent, and the child's copy of the lock must not make a dead parent look alive. Does not block.
    pub fn forked(&self) {
        self.0.disk.forked();
    }

    /// Starts to sync the published files in the background, if the configuration requests it
    /// ([`Durable::Background`]).
    pub(super) fn spawn_background_sync(&self) {
        if self.0.config.durable == Durable::Background && self.0.disk.may_defer_sync() {
            let cache = self.clone();
            tokio::spawn(async move {
                // A failed sync is logged and leaves no dirty bytes: the next get finds the file missing. If bytes are
                // still dirty, the budget lock could not be taken.
                while cache.make_durable().await.is_err() && cache.undurable_bytes() > 0 {
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            });
        }
    }

    /// Waits until the selected files are durable, if the caller or the configuration requires it, or if other
    /// processes could not detect that they are unsynced (see [`Disk::may_defer_sync`]).
    pub(super) async fn wait_until_durable(&self, request: &FetchRequest, leased: &LeasedArtifact) -> Result<()> {
        if leased.is_lower || !(request.durable || self.always_waits_until_durable()) {
            return Ok(());
        }
        let is_unsynced = leased.manifest.selected(&request.selection).any(|(_, entry)| entry.unsynced().is_some());
        if !is_unsynced && !self.0.disk.is_dirty(&request.key) {
            return Ok(());
        }
        self.sync(&request.key, &request.selection).await
    }

    /// Syncs the selected files of `key`, and waits until they are durable.
    pub(super) async fn sync(&self, key: &ArtifactKey, selection: &Selection) -> Result<()> {
        let (of, selection) = (key.clone(), selection.clone());
        self.on_disk(move |disk| disk.sync_selected(&of, &selection)).await.context(key, Tier::Disk)
    }

    /// Returns the purpose of a download. If every get waits until its files are durable, they are written with
    /// O_DIRECT at once, like files that are only kept.
    pub(super) fn purpose_of(&self, request: &FetchRequest) -> Purpose {
        if self.0.config.durable == Durable::Wait { Purpose::Keep } else { request.purpose }
    }

    /// Returns true if every get waits until its files are durable.
    fn always_waits_until_durable(&self) -> bool {
        self.0.config.durable == Durable::Wait || !self.0.disk.may_defer_sync()
    }
}

/// Syncs the artifacts that another process handed off. `writer` and `lock` are those of its [`SyncHandoff`]. Blocks.
///
/// # Errors
/// `Directory` if the directory or the list of pending syncs no longer exists; otherwise as for
/// [`Cache::make_durable`].
pub fn make_durable_for(dir: &Path, writer: &str, lock: File) -> Result<()> {
    Disk::open_existing(dir)?.sync_for(writer, lock)
}
