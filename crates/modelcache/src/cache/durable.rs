//! Durability: when published files are synced to stable storage.
//!
//! By default a get returns once its files are verified and published, and syncs them in the background, one artifact
//! at a time. A process that ends soon leaves that to the kernel and to the next use. A get that requires durable files
//! waits here, also for files that another process published.

use super::Cache;
use super::resolve::FetchRequest;
use crate::config::Durable;
use crate::disk::{LeasedArtifact, Purpose};
use crate::error::{Context, ErrorKind, Result, Tier};
use crate::key::ArtifactKey;
use crate::selection::Selection;
use std::time::Duration;

/// Time between two attempts to sync, if another process holds the budget lock for too long.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

impl Cache {
    /// Syncs everything that this process has published, and waits until it is durable.
    ///
    /// # Errors
    /// `Directory` if the sync of a file failed. That file is quarantined, and no longer leased.
    pub async fn make_durable(&self) -> Result<()> {
        let _turn = self.0.disk.sync_turn().lock().await;
        self.on_disk(move |disk| disk.sync_published()).await
    }

    /// Starts to sync the published files in the background, if the configuration requests it
    /// ([`Durable::Background`]).
    pub(super) fn spawn_background_sync(&self) {
        if self.0.config.durable == Durable::Background {
            let cache = self.clone();
            tokio::spawn(async move {
                // A failed sync is logged and not repeated: the next get finds the file missing.
                while cache.make_durable().await.is_err_and(|error| error.kind() == ErrorKind::Unavailable) {
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            });
        }
    }

    /// Waits until the selected files are durable, if the caller or the configuration requires it, or if the next user
    /// could not trust unsynced files (see [`Disk::may_defer_sync`](crate::disk::Disk::may_defer_sync)).
    pub(super) async fn wait_until_durable(&self, request: &FetchRequest, leased: &LeasedArtifact) -> Result<()> {
        let is_unsynced = || leased.manifest.selected(&request.selection).any(|(_, entry)| entry.unsynced().is_some());
        let must_wait = || request.durable || self.0.config.durable == Durable::Wait || !self.0.disk.may_defer_sync();
        if !leased.is_lower && is_unsynced() && must_wait() {
            return self.sync(&request.key, &request.selection).await;
        }
        Ok(())
    }

    /// Syncs the selected files of `key`, and waits until they are durable.
    pub(super) async fn sync(&self, key: &ArtifactKey, selection: &Selection) -> Result<()> {
        let _turn = self.0.disk.sync_turn().lock().await;
        let (of, selection) = (key.clone(), selection.clone());
        self.on_disk(move |disk| disk.sync_selected(&of, &selection)).await.context(key, Tier::Disk)
    }

    /// Returns the purpose of a download. If every get waits until its files are durable, they are written with
    /// O_DIRECT at once, like files that are only kept.
    pub(super) fn purpose_of(&self, request: &FetchRequest) -> Purpose {
        if self.0.config.durable == Durable::Wait { Purpose::Keep } else { request.purpose }
    }
}
