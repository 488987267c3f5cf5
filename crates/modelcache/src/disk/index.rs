//! What the artifacts hold, in memory, so that one eviction or one shared blob need not read every manifest.
//!
//! Per artifact: its last use and the files it records. It says where to look first, never what is so: a victim is looked
//! at again under its lease before it goes, and what an identity is compared with is the file. It belongs to one process,
//! is read from the directory when first needed, and kept up by the change log: manifests change within budget holds
//! only. The last use is touched by anybody without a word, so that it is believed only after a look.

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

/// Where an artifact stands in the order of last use: when, and its folder below `artifacts/`.
pub(super) type LastUseOrder = (Option<SystemTime>, Arc<Path>);

/// The artifacts as of one position in the change log.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// `None` until the directory was read.
    at: Option<Position>,
    artifacts: HashMap<Arc<Path>, IndexedArtifact>,
    by_use: BTreeSet<LastUseOrder>,
    /// Views that manifests record of an inode.
    views: HashMap<u64, u32>,
    /// Manifests that vouch for a file as a digest.
    vouchers: HashMap<(Digest, FileIdentity), u32>,
    /// Writers that do, as long as they live: what they published may not be durable yet.
    promises: HashMap<(Digest, FileIdentity), Vec<Arc<str>>>,
}

#[derive(Debug)]
struct IndexedArtifact {
    last_used: Option<SystemTime>,
    files: Box<[Recorded]>,
}

/// A file that a manifest records.
#[derive(Debug)]
struct Recorded {
    digest: Option<Digest>,
    identity: FileIdentity,
    /// Who makes it durable, if that is still to be done.
    writer: Option<Arc<str>>,
}

impl Index {
    /// Reads the whole directory. The caller holds the budget, whose changes stood at `at` when it was taken.
    pub(super) fn read(disk: &Disk, at: Position) -> Result<Self> {
        let mut index = Self::as_of(at);
        disk.scan_each(&mut |artifact| {
            index.insert(disk, &artifact);
            Ok(())
        })?;
        Ok(index)
    }

    /// An index to be filled, of the directory as it stands at `at`.
    pub(super) fn as_of(at: Position) -> Self {
        Self { at: Some(at), ..Self::default() }
    }

    /// Learns of the changes up to `at`; `false` if the log does not tell them.
    pub(super) fn catch_up(&mut self, disk: &Disk, at: Position) -> Result<bool> {
        let changed = self.at.and_then(|known| known.until(&disk.layout().changes(), at));
        let Some(mut changed) = changed else { return Ok(false) };
        changed.sort_unstable();
        changed.dedup();
        for artifact in &changed {
            self.refresh(disk, &ArtifactDir(disk.layout().artifacts().join(artifact)))?;
        }
        self.at = Some(at);
        Ok(true)
    }

    /// Reads one artifact anew.
    pub(super) fn refresh(&mut self, disk: &Disk, dir: &ArtifactDir) -> Result<()> {
        if let Some(folder) = below_artifacts(disk, dir) {
            self.remove(&folder);
        }
        if let Some(artifact) = disk.scan_one(dir)? {
            self.insert(disk, &artifact);
        }
        Ok(())
    }

    /// Takes in what was found of an artifact that it does not know.
    pub(super) fn insert(&mut self, disk: &Disk, artifact: &ScannedArtifact) {
        let Some(folder) = below_artifacts(disk, &artifact.dir) else { return };
        let folder: Arc<Path> = folder.into();
        let files: Box<[Recorded]> = artifact.manifest.iter().flat_map(recorded).collect();
        for file in &files {
            *self.views.entry(file.identity.inode).or_default() += 1;
            match (file.digest, &file.writer) {
                (Some(digest), None) => *self.vouchers.entry((digest, file.identity)).or_default() += 1,
                (Some(digest), Some(writer)) => {
                    self.promises.entry((digest, file.identity)).or_default().push(writer.clone());
                }
                (None, _) => {}
            }
        }
        self.by_use.insert((artifact.last_used, folder.clone()));
        self.artifacts.insert(folder, IndexedArtifact { last_used: artifact.last_used, files });
    }

    fn remove(&mut self, folder: &Path) {
        let Some((folder, known)) = self.artifacts.remove_entry(folder) else { return };
        for file in &known.files {
            take_off(&mut self.views, &file.identity.inode);
            match (file.digest, &file.writer) {
                (Some(digest), None) => take_off(&mut self.vouchers, &(digest, file.identity)),
                (Some(digest), Some(writer)) => self.forget_promise((digest, file.identity), writer),
                (None, _) => {}
            }
        }
        self.by_use.remove(&(known.last_used, folder));
    }

    fn forget_promise(&mut self, file: (Digest, FileIdentity), writer: &str) {
        let Some(writers) = self.promises.get_mut(&file) else { return };
        if let Some(at) = writers.iter().position(|known| **known == *writer) {
            writers.swap_remove(at);
        }
        if writers.is_empty() {
            self.promises.remove(&file);
        }
    }

    /// The least recently used artifact after `turn`, as far as is known.
    pub(super) fn next(&self, turn: Option<&LastUseOrder>) -> Option<LastUseOrder> {
        let after = turn.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_use.range::<LastUseOrder, _>((after, Bound::Unbounded)).next().cloned()
    }

    /// Learns when an artifact was last used.
    pub(super) fn set_last_used(&mut self, folder: &Arc<Path>, last_used: Option<SystemTime>) {
        let Some(known) = self.artifacts.get_mut(folder) else { return };
        self.by_use.remove(&(known.last_used, folder.clone()));
        known.last_used = last_used;
        self.by_use.insert((last_used, folder.clone()));
    }

    /// Views that manifests record of `inode`.
    pub(super) fn views(&self, inode: u64) -> u64 {
        self.views.get(&inode).copied().unwrap_or_default().into()
    }

    /// Whether both know the same; the last use apart, which is believed only after a look.
    #[cfg(test)]
    pub(super) fn assert_same(&self, other: &Self) {
        let keys = |index: &Self| index.artifacts.keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(keys(self), keys(other), "artifacts");
        assert_eq!(self.views, other.views, "views");
        assert_eq!(self.vouchers, other.vouchers, "vouchers");
        let promises = |index: &Self| {
            let sorted = |writers: &Vec<Arc<str>>| writers.iter().cloned().collect::<BTreeSet<_>>();
            index.promises.iter().map(|(file, writers)| (*file, sorted(writers))).collect::<HashMap<_, _>>()
        };
        assert_eq!(promises(self), promises(other), "promises");
        assert_eq!(self.artifacts.len(), self.by_use.len());
    }

    /// Whether a committed manifest records `identity` for `digest`, durably.
    pub(super) fn vouches(&self, digest: &Digest, identity: FileIdentity) -> bool {
        self.vouchers.contains_key(&(*digest, identity))
    }

    /// The writers that published `identity` as `digest` and were to make it durable.
    pub(super) fn promised(&self, digest: &Digest, identity: FileIdentity) -> Vec<Arc<str>> {
        self.promises.get(&(*digest, identity)).cloned().unwrap_or_default()
    }
}

/// What a manifest records of files on this disk.
fn recorded(manifest: &Manifest) -> impl Iterator<Item = Recorded> {
    manifest.files.values().filter_map(|entry| {
        let writer = entry.unsynced().map(|file| file.writer().into());
        Some(Recorded { digest: entry.sha256, identity: entry.recorded_on_disk()?, writer })
    })
}

/// The artifact's folder below `artifacts/`.
pub(super) fn below_artifacts(disk: &Disk, dir: &ArtifactDir) -> Option<PathBuf> {
    dir.path().below(&disk.layout().artifacts()).map(Path::to_owned)
}

fn take_off<K: Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => *count -= 1,
        _ => drop(counts.remove(key)),
    }
}
