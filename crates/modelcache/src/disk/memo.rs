//! Manifests that were read before, so that a hit need not parse one again.
//!
//! Held in memory only, and believed only as long as the file in the directory is the one that was read: a manifest is
//! replaced by rename, never written in place, so its identity tells. Losing the memo costs a read. Small manifests are
//! kept as plain lists, which take a quarter of the memory of a map, and cost a hit a microsecond.

use crate::key::{ArtifactKey, FilePath};
use crate::ladder::part_size;
use crate::manifest::{FileEntry, FileIdentity, Manifest, Shape};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// Most bytes that are remembered, about: 100,000 manifests of some files. Beyond that the oldest are forgotten.
const BYTES_MAX: usize = 128 << 20;
/// Manifests of more files are read each time: reading them is not what a hit on them costs.
const FILES_MAX: usize = 4096;
/// Up to so many files a manifest is kept as a list.
const PACKED_FILES_MAX: usize = 16;
/// What a manifest takes besides its files, and what one file takes besides its entry, about.
const MANIFEST_BYTES: usize = 300;
const FILE_BYTES: usize = 100;
const STATE_BYTES: usize = 32;

/// What was read, by the artifact's hash.
#[derive(Debug, Default)]
pub(super) struct Memo(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    manifests: HashMap<Arc<str>, (FileIdentity, Kept)>,
    /// In the order in which they came.
    order: VecDeque<Arc<str>>,
    bytes: usize,
}

#[derive(Debug)]
enum Kept {
    Packed { key: ArtifactKey, shape: Shape, files: Box<[(FilePath, FileEntry)]> },
    Whole(Arc<Manifest>),
}

impl Memo {
    /// The manifest of the artifact with this hash, if the file there is the one that was read.
    pub(super) fn recall(&self, hash: &str, file: FileIdentity) -> Option<Arc<Manifest>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.manifests.get(hash).filter(|(read, _)| *read == file).map(|(_, kept)| kept.manifest())
    }

    /// Remembers what was read from `file`.
    pub(super) fn remember(&self, hash: &str, file: FileIdentity, manifest: &Arc<Manifest>) {
        if manifest.files.len() > FILES_MAX {
            return;
        }
        let kept = Kept::of(manifest);
        let known = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.bytes += kept.bytes();
        match known.manifests.get_mut(hash) {
            Some(there) => {
                let before = std::mem::replace(there, (file, kept));
                known.bytes -= before.1.bytes();
            }
            None => {
                let hash: Arc<str> = hash.into();
                known.order.push_back(hash.clone());
                known.manifests.insert(hash, (file, kept));
            }
        }
        known.forget(BYTES_MAX);
    }
}

impl Known {
    /// Forgets the oldest beyond `most` bytes.
    fn forget(&mut self, most: usize) {
        while self.bytes > most {
            let Some(oldest) = self.order.pop_front() else { return };
            if let Some((_, kept)) = self.manifests.remove(&oldest) {
                self.bytes -= kept.bytes();
            }
        }
    }
}

impl Kept {
    fn of(manifest: &Arc<Manifest>) -> Self {
        let Manifest { key, shape, files, extra } = &**manifest;
        if files.len() > PACKED_FILES_MAX || !extra.is_empty() {
            return Self::Whole(manifest.clone());
        }
        let files = files.iter().map(|(path, entry)| (path.clone(), entry.clone())).collect();
        Self::Packed { key: key.clone(), shape: *shape, files }
    }

    fn manifest(&self) -> Arc<Manifest> {
        match self {
            Self::Whole(manifest) => manifest.clone(),
            Self::Packed { key, shape, files } => {
                let files = files.iter().cloned().collect();
                Arc::new(Manifest { files, ..Manifest::new(key.clone(), *shape) })
            }
        }
    }

    fn bytes(&self) -> usize {
        let of = |entry: &FileEntry| {
            let states = entry.ladder.as_ref().map_or(0, |_| entry.size / part_size(entry.size));
            size_of::<(FilePath, FileEntry)>() + FILE_BYTES + usize::try_from(states).unwrap_or_default() * STATE_BYTES
        };
        let files: usize = match self {
            Self::Packed { files, .. } => files.iter().map(|(_, entry)| of(entry)).sum(),
            // A map's nodes are two thirds full.
            Self::Whole(manifest) => manifest.files.values().map(of).sum::<usize>() * 3 / 2,
        };
        MANIFEST_BYTES + files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(files: usize) -> Arc<Manifest> {
        let mut manifest = Manifest::new(ArtifactKey::bare("team/model@1").expect("key"), Shape::Tree);
        for number in 0..files {
            let path = FilePath::new(&format!("f/{number}")).expect("path");
            manifest.files.insert(path, FileEntry { size: number as u64, ..FileEntry::default() });
        }
        Arc::new(manifest)
    }

    fn file(inode: u64) -> FileIdentity {
        FileIdentity { inode, bytes: 1, mtime_ns: 1 }
    }

    #[test]
    fn what_was_read_is_given_back_as_long_as_it_is_that_file() {
        let memo = Memo::default();
        for files in [0, 3, 100] {
            memo.remember("hash", file(7), &manifest(files));
            assert_eq!(memo.recall("hash", file(7)), Some(manifest(files)));
            assert_eq!(memo.recall("hash", file(8)), None);
            assert_eq!(memo.recall("other", file(7)), None);
        }
        let mut odd = Manifest::clone(&manifest(1));
        odd.extra.insert("field".into(), "of another release".into());
        memo.remember("hash", file(9), &Arc::new(odd.clone()));
        assert_eq!(memo.recall("hash", file(9)).as_deref(), Some(&odd));
    }

    #[test]
    fn the_oldest_are_forgotten_first_and_the_count_stays_right() {
        let mut known = Known::default();
        for number in 0..10 {
            let (hash, kept): (Arc<str>, _) = (number.to_string().into(), Kept::of(&manifest(2)));
            known.bytes += kept.bytes();
            known.order.push_back(hash.clone());
            known.manifests.insert(hash, (file(number), kept));
        }
        let one = known.bytes / 10;
        known.forget(3 * one);
        let mut left: Vec<&str> = known.manifests.keys().map(|hash| &**hash).collect();
        left.sort_unstable();
        assert_eq!(left, ["7", "8", "9"]);
        known.forget(0);
        assert_eq!((known.bytes, known.manifests.len(), known.order.len()), (0, 0, 0));
    }
}
