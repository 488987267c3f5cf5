//! Pruning on request: the local directory is made smaller now, not when the next fill needs room.

use super::Cache;
use crate::disk::{PruneOptions, PruneReport};
use crate::error::Result;
use crate::transfer::blocking;

impl Cache {
    /// Removes leftovers from disk, and artifacts as far as `options` ask for it. What is held or pinned stays; the
    /// report says so. That a size was not reached is no error here: see [`PruneReport::reached`].
    ///
    /// # Errors
    /// `Directory` where nothing can be removed.
    pub async fn prune(&self, options: &PruneOptions) -> Result<PruneReport> {
        let (disk, options) = (self.0.disk.clone(), options.clone());
        blocking(move || disk.prune(&options)).await
    }
}
