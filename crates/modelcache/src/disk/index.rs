//! In-memory index of all artifacts: their time of last use, and the files that their manifests record. With it,
//! evicting an artifact or checking a blob does not need to read every manifest.
//!
//! Each process has its own index. It reads the directory when the index is first needed, and then keeps it current by
//! the change log. `last-used` is touched without a line in that log, so the time in the index must be compared with
//! the file.
//!
//! The index is only a hint: a candidate for eviction is examined again under its lease, and an identity is always
//! compared with the file itself.

use super::change_log::Position;
use super::layout::ArtifactDir;
use super::{Disk, ScannedArtifact};
use crate::digest::Digest;
use crate::error::Result;
use crate::manifest::{FileIdentity, Manifest};
use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Sort key of the order of last use: time of last use, and the artifact's folder below `artifacts/`.
pub(super) type LastUseOrder = (Option<SystemTime>, Arc<Path>);

/// The artifacts as of one position in the change log.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// Position in the change log up to which the index is current; `None` until the directory was read.
    at: Option<Position>,
    artifacts: HashMap<Arc<Path>, IndexedArtifact>,
    by_use: BTreeSet<LastUseOrder>,
    /// Number of views that manifests record, and of links to them below `hub/`, by inode.
    views: HashMap<u64, u32>,
    /// Number of manifests that record a file with this digest and identity, as durable or as unsynced in this boot.
    vouched: HashMap<(Digest, FileIdentity), u32>,
}

#[derive(Debug)]
struct IndexedArtifact {
    last_used: Option<SystemTime>,
    files: Box<[RecordedFile]>,
    /// The inode of each link below `hub/`.
    hub_links: Box<[u64]>,
}

/// A held file, as a manifest records it.
#[derive(Debug)]
struct RecordedFile {
    /// The digest that the bytes are known to have; `None` for an unsynced file of another boot.
    digest: Option<Digest>,
    identity: FileIdentity,
}

impl Index {
    /// Reads the whole directory. The caller holds the budget lock; `at` is the end of the change log when it was
    /// taken.
    pub(super) fn read(disk: &Disk, at: Position) -> Result<Self> {
        let mut index = Self::as_of(at);
        disk.scan_each(&mut |artifact| {
            index.insert(disk, &artifact);
            Ok(())
        })?;
        Ok(index)
    }

    /// Returns an empty index, which the caller fills with the artifacts as of `at`.
    pub(super) fn as_of(at: Position) -> Self {
        Self { at: Some(at), ..Self::default() }
    }

    /// Reads the artifacts again that were changed up to `at`. Returns false if the change log does not list them.
    pub(super) fn catch_up(&mut self, disk: &Disk, at: Position) -> Result<bool> {
        let changed = self.at.and_then(|known| known.read_until(&disk.layout().changes(), at));
        let Some(mut changed) = changed else { return Ok(false) };
        changed.sort_unstable();
        changed.dedup();
        // A logged change may not have happened. Reading the manifest again is right in both cases.
        for artifact in &changed {
            self.refresh(disk, &ArtifactDir(disk.layout().artifacts().join(artifact)))?;
        }
        self.at = Some(at);
        Ok(true)
    }

    /// Reads one artifact again.
    pub(super) fn refresh(&mut self, disk: &Disk, dir: &ArtifactDir) -> Result<()> {
        if let Some(folder) = below_artifacts(disk, dir) {
            self.remove(&folder);
        }
        if let Some(artifact) = disk.scan_one(dir)? {
            self.insert(disk, &artifact);
        }
        Ok(())
    }

    /// Adds an artifact that is not in the index.
    pub(super) fn insert(&mut self, disk: &Disk, artifact: &ScannedArtifact) {
        let Some(folder) = below_artifacts(disk, &artifact.dir) else { return };
        let folder: Arc<Path> = folder.into();
        let files: Box<[RecordedFile]> =
            artifact.manifest.iter().flat_map(|manifest| recorded(disk, manifest)).collect();
        let mut hub_links = Vec::new();
        // The index is a hint: links that cannot be listed count as links outside the cache.
        let _ = disk.hub_links(&artifact.dir, &mut |_, metadata| {
            hub_links.push(metadata.ino());
            Ok(())
        });
        for inode in files.iter().map(|file| &file.identity.inode).chain(&hub_links) {
            *self.views.entry(*inode).or_default() += 1;
        }
        for file in &files {
            if let Some(digest) = file.digest {
                *self.vouched.entry((digest, file.identity)).or_default() += 1;
            }
        }
        self.by_use.insert((artifact.last_used, folder.clone()));
        let hub_links = hub_links.into();
        self.artifacts.insert(folder, IndexedArtifact { last_used: artifact.last_used, files, hub_links });
    }

    /// Removes an artifact and its files.
    fn remove(&mut self, folder: &Path) {
        let Some((folder, known)) = self.artifacts.remove_entry(folder) else { return };
        for inode in known.files.iter().map(|file| &file.identity.inode).chain(&known.hub_links) {
            decrement(&mut self.views, inode);
        }
        for file in &known.files {
            if let Some(digest) = file.digest {
                decrement(&mut self.vouched, &(digest, file.identity));
            }
        }
        self.by_use.remove(&(known.last_used, folder));
    }

    /// Returns the artifact that follows `cursor` in the order of last use; without a cursor, the first artifact.
    pub(super) fn next(&self, cursor: Option<&LastUseOrder>) -> Option<LastUseOrder> {
        let after = cursor.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_use.range::<LastUseOrder, _>((after, Bound::Unbounded)).next().cloned()
    }

    /// Records the time of last use of an artifact.
    pub(super) fn set_last_used(&mut self, folder: &Arc<Path>, last_used: Option<SystemTime>) {
        let Some(known) = self.artifacts.get_mut(folder) else { return };
        // The set is sorted by time, so the entry is removed and inserted again.
        self.by_use.remove(&(known.last_used, folder.clone()));
        known.last_used = last_used;
        self.by_use.insert((last_used, folder.clone()));
    }

    /// Returns the number of views of `inode` that manifests record, and of links to it below `hub/`.
    pub(super) fn views(&self, inode: u64) -> u64 {
        self.views.get(&inode).copied().unwrap_or_default().into()
    }

    /// Asserts that both indexes have the same content, except for the times of last use.
    #[cfg(test)]
    pub(super) fn assert_same(&self, other: &Self) {
        let keys = |index: &Self| index.artifacts.keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(keys(self), keys(other), "artifacts");
        assert_eq!(self.views, other.views, "views");
        assert_eq!(self.vouched, other.vouched, "vouched files");
        assert_eq!(self.artifacts.len(), self.by_use.len());
    }

    /// Returns true if a manifest records a file with `digest` and `identity`, as durable or as unsynced in this boot.
    pub(super) fn vouches(&self, digest: &Digest, identity: FileIdentity) -> bool {
        self.vouched.contains_key(&(*digest, identity))
    }
}

/// Returns the held files that `manifest` records.
fn recorded(disk: &Disk, manifest: &Manifest) -> impl Iterator<Item = RecordedFile> {
    let mount = disk.current_mount();
    manifest.files.values().filter_map(move |entry| {
        let digest = entry.sha256.filter(|_| mount.trusted_identity(entry).is_some());
        Some(RecordedFile { digest, identity: entry.recorded_on_disk()? })
    })
}

/// Returns the artifact's folder as a path below `artifacts/`.
pub(super) fn below_artifacts(disk: &Disk, dir: &ArtifactDir) -> Option<PathBuf> {
    dir.path().below(&disk.layout().artifacts()).map(Path::to_owned)
}

/// Decrements the count of `key`, and removes the key when the count reaches 0.
fn decrement<K: Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => *count -= 1,
        _ => drop(counts.remove(key)),
    }
}
