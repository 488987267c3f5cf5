//! Durability: a get returns when its bytes are checked and published; that they survive a power cut comes after.
//!
//! What a process has published it makes durable in the background, one artifact at a time, or leaves to another process
//! that it hands its duties to. Whoever asks for durable files waits here, also for what another process published.

use super::resolve::FetchRequest;
use super::{Cache, SyncHandoff};
use crate::config::Durable;
use crate::disk::{Disk, LeasedArtifact, Purpose};
use crate::error::{Context, Result, Tier};
use crate::key::ArtifactKey;
use crate::selection::Selection;
use crate::transfer::blocking;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Pause before another try, where the directory was held by somebody for too long.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// One at a time makes durable what this process published; the others wait without a thread.
#[derive(Debug, Default)]
pub(super) struct Durability(Arc<tokio::sync::Mutex<()>>);

impl Cache {
    /// Waits until everything that this process has published is durable.
    ///
    /// # Errors
    /// `Directory` where the medium failed: what it did not take is not lent any more.
    pub async fn make_durable(&self) -> Result<()> {
        let _turn = self.0.durability.0.lock().await;
        let disk = self.0.disk.clone();
        blocking(move || disk.sync_dirty()).await
    }

    /// Bytes that this process has published and that are not known to be durable.
    pub fn undurable_bytes(&self) -> u64 {
        self.0.disk.dirty_bytes()
    }

    /// What is to be made durable, for a process that is given the lock and calls [`make_durable_for`]; `None` if there
    /// is nothing. Once that process runs, [`handed_off`](Self::handed_over) says so.
    pub fn hand_off(&self) -> Result<Option<SyncHandoff>> {
        self.0.disk.hand_off()
    }

    /// Another process makes durable what this one published, and holds the lock.
    pub fn handed_off(&self) {
        self.0.disk.handed_off();
    }

    /// To be called in a child that was forked, before anything else: what its parent owes is not the child's, and the
    /// child's copy of the descriptor must not speak for a parent that has ended. Waits for nothing.
    pub fn forked(&self) {
        self.0.disk.forked();
    }

    /// Something was published: it becomes durable in the background, unless the caller waits or leaves it for later.
    pub(super) fn was_published(&self) {
        if self.0.config.durable == Durable::Background && self.0.disk.may_defer_sync() {
            let cache = self.clone();
            tokio::spawn(async move {
                // Told where it failed for good; the next get of it finds what is missing. Else somebody is in the way.
                while cache.make_durable().await.is_err() && cache.undurable_bytes() > 0 {
                    tokio::time::sleep(TRY_AGAIN).await;
                }
            });
        }
    }

    /// Waits until what was lent is durable, where somebody wants that or nobody could tell later that it is not.
    pub(super) async fn durably(&self, request: &FetchRequest, leased: &LeasedArtifact) -> Result<()> {
        if leased.is_lower || !(request.durable || self.waits_for_the_disk()) {
            return Ok(());
        }
        let is_marked = leased.manifest.selected(&request.selection).any(|(_, entry)| entry.unsynced().is_some());
        if !is_marked && !self.0.disk.is_dirty(&request.key) {
            return Ok(());
        }
        self.sync(&request.key, &request.selection).await
    }

    /// The same for what was put.
    pub(super) async fn sync(&self, key: &ArtifactKey, selection: &Selection) -> Result<()> {
        let (disk, of, selection) = (self.0.disk.clone(), key.clone(), selection.clone());
        blocking(move || disk.sync_selected(&of, &selection)).await.context(key, Tier::Disk)
    }

    /// What a fill is for: where every get waits for the disk, its files are written past the page cache at once.
    pub(super) fn purpose_of(&self, request: &FetchRequest) -> Purpose {
        if self.0.config.durable == Durable::Wait { Purpose::Keep } else { request.purpose }
    }

    fn waits_for_the_disk(&self) -> bool {
        self.0.config.durable == Durable::Wait || !self.0.disk.may_defer_sync()
    }
}

/// Makes durable what another process published and handed over, with the lock that it held. Blocks.
///
/// # Errors
/// `Directory` where the directory or the list of duties is not there any more; else as [`Cache::make_durable`].
pub fn make_durable_for(dir: &Path, writer: &str, lock: File) -> Result<()> {
    Disk::open_present(dir)?.sync_for(writer, lock)
}
