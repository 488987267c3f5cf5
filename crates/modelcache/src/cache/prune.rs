//! Pruning on request: making the local directory smaller now, and not only when the next fill needs room.

use super::Cache;
use crate::disk::{PruneOptions, PruneReport};
use crate::error::Result;

impl Cache {
    /// Removes leftovers from disk, and the artifacts that `options` select. Leased and pinned artifacts stay, and the
    /// report lists them. It is not an error if the requested size is not reached, see `reached` of [`PruneReport`].
    ///
    /// # Errors
    /// `Directory` if the directory cannot be written.
    pub async fn prune(&self, options: &PruneOptions) -> Result<PruneReport> {
        let options = options.clone();
        self.on_disk(move |disk| disk.prune(&options)).await
    }
}
