//! Materializing: linking or copying a leased artifact into a folder of the caller.

use super::{Artifact, Cache};
use crate::disk::{Destination, LinkMode, Materialized, Tree};
use crate::error::Result;
use crate::progress::{Phase, Progress};
use crate::runtime::blocking;
use std::path::Path;

impl Cache {
    /// Checks that `dir` may be replaced as a whole: it is absent, it is empty, or it contains only files that were
    /// materialized earlier. Call this before the get, and set [`GetOptions::destination`](super::GetOptions), so that
    /// a refusal precedes the download. A mount point is not replaced as a whole, but filled file by file.
    ///
    /// # Errors
    /// `Conflict` if the folder contains other files; `Invalid` for the working directory, the cache directory, or a
    /// path that is a file; `Other` if it cannot be written, or cannot have the links of `mode`.
    pub async fn destination(&self, dir: &Path, mode: LinkMode) -> Result<Destination> {
        let (dir, disk) = (dir.to_owned(), self.0.disk.clone());
        blocking(move || Destination::check(&dir, disk.layout(), mode)).await
    }
}

impl Artifact {
    /// Replaces the content of the folder with the selected files. Hard links and copies outlive the lease. Symbolic
    /// links point into the cache: keep the lease as long as they are used.
    ///
    /// # Errors
    /// `Corrupt` if cached bytes fail verification while they are copied; `Full`; `Other` if the folder cannot be
    /// written. After an error the old folder is unchanged, except in a mount point, which the next call
    /// completes.
    pub async fn materialize(&self, destination: &Destination, progress: &Progress) -> Result<Materialized> {
        let selected = self.lease.manifest.selected(&self.selection);
        let files: Vec<_> = selected.map(|(path, entry)| (path.clone(), entry.clone())).collect();
        let _phase = progress.enter(Phase::Materialize, files.iter().map(|(_, entry)| entry.size).sum());
        // Files of the read-only lower directory must not be hard-linked: they are reflinked or copied.
        let may_link = !self.lease.is_lower;
        let tree = Tree { key: self.key.clone(), from: self.lease.dir.clone(), may_link, files };
        let (destination, progress, lease) = (destination.clone(), progress.clone(), self.lease.clone());
        let made = blocking(move || {
            // The closure owns the lease, so that it lasts until the copy ends, even if the caller is cancelled.
            let made = destination.materialize(&tree, &progress);
            drop(lease);
            made
        });
        let mut made = made.await?;
        // If the artifact or the selection is a single file, return its path in the new folder, not that of the folder.
        if let Ok(inside) =
            self.lease.path(&self.selection).strip_prefix(self.lease.dir.files().full()).map(Path::to_owned)
            && inside != Path::new("")
        {
            made.path = made.dir.join(inside);
        }
        Ok(made)
    }
}
