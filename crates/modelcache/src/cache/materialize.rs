//! Materializing: what was lent, in a folder of the caller's own.

use super::{Artifact, Cache};
use crate::disk::{Destination, LinkMode, Materialized, Tree};
use crate::error::Result;
use crate::progress::{Phase, Progress};
use crate::transfer::blocking;
use std::path::Path;

impl Cache {
    /// Looks whether `dir` may be replaced as a whole: it is absent, empty, or was materialized before and holds nothing
    /// else. Asked before a get, so that a refusal comes before the bytes.
    ///
    /// # Errors
    /// `Conflict` where the folder holds something else; `Invalid` for the present folder, the cache directory, a file.
    pub async fn destination(&self, dir: &Path) -> Result<Destination> {
        let (dir, root) = (dir.to_owned(), self.0.disk.layout().root().full());
        blocking(move || Destination::check(&dir, &root)).await
    }
}

impl Artifact {
    /// Puts the files that were got into the folder, in the place of what was there. Afterwards the lease is needed for
    /// symbolic links only.
    ///
    /// # Errors
    /// `Corrupt` where the cached bytes turn out wrong while they are copied; `Full`; `Other` for the folder's trouble.
    /// The old folder is untouched then.
    pub async fn materialize(
        &self,
        destination: &Destination,
        mode: LinkMode,
        progress: &Progress,
    ) -> Result<Materialized> {
        let selected = self._lent.manifest.selected(&self.selection);
        let files: Vec<_> = selected.map(|(path, entry)| (path.clone(), entry.clone())).collect();
        let _phase = progress.enter(Phase::Materialize, files.iter().map(|(_, entry)| entry.size).sum());
        let may_link = !self._lent.is_lower;
        let tree = Tree { key: self.key.clone(), from: self._lent.dir.clone(), may_link, files };
        let (destination, progress, leased) = (destination.clone(), progress.clone(), self._lent.clone());
        let made = blocking(move || {
            // The lease lasts as long as this work, whoever stops waiting for it.
            let made = destination.materialize(&tree, mode, &progress);
            drop(leased);
            made
        });
        let mut made = made.await?;
        if let Ok(inside) = self.path.strip_prefix(self._lent.dir.files().full()).map(Path::to_owned)
            && inside != Path::new("")
        {
            made.path = made.dir.join(inside);
        }
        Ok(made)
    }
}
