//! Manifests that were read before, so that a hit need not parse one again.
//!
//! Held in memory only, and believed only as long as the file in the directory is the one that was read: a manifest is
//! replaced by rename, never written in place, so its identity tells. Losing the memo costs a read.

use super::layout::ArtifactDir;
use crate::manifest::{FileIdentity, Manifest};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Most manifests that are remembered; beyond that all are forgotten, and those still in use come back.
const MANIFESTS_MAX: usize = 1024;
/// Manifests of more files are read each time: reading them is not what a hit on them costs.
const FILES_MAX: usize = 4096;

/// What was read, by artifact folder.
#[derive(Debug, Default)]
pub(super) struct Memo(Mutex<HashMap<PathBuf, (FileIdentity, Arc<Manifest>)>>);

impl Memo {
    /// The manifest in `dir`, if the file there is the one that was read.
    pub(super) fn recall(&self, dir: &ArtifactDir, file: FileIdentity) -> Option<Arc<Manifest>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(dir.path()).filter(|(read, _)| *read == file).map(|(_, manifest)| manifest.clone())
    }

    /// Remembers what was read from `file` in `dir`.
    pub(super) fn remember(&self, dir: &ArtifactDir, file: FileIdentity, manifest: &Arc<Manifest>) {
        if manifest.files.len() > FILES_MAX {
            return;
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MANIFESTS_MAX {
            known.clear();
        }
        known.insert(dir.path().to_owned(), (file, manifest.clone()));
    }
}
