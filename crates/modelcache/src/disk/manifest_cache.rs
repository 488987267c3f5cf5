//! In-memory cache of parsed manifests.
//!
//! An entry is used only while the file on disk has the identity under which it was read. A manifest is replaced by
//! rename, never written in place, so every change gives the file another identity.

use crate::manifest::{FileIdentity, Manifest};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

/// Maximum memory of the cache in bytes: about 100,000 manifests of a few files. Beyond it, the least recently used
/// entries are removed. The last one is kept whatever its size, because it is in use.
const BYTES_MAX: usize = 128 << 20;
/// Approximate memory of an entry in bytes, without the manifest.
const ENTRY_BYTES: usize = 200;

/// Parsed manifests by the hash of their artifact.
#[derive(Debug, Default)]
pub(super) struct ManifestCache {
    known: Mutex<Entries>,
    /// Number of manifests that were parsed because they were not in the cache.
    #[cfg(test)]
    pub(super) parsed: std::sync::atomic::AtomicU64,
}

#[derive(Debug, Default)]
struct Entries {
    manifests: HashMap<Arc<str>, Entry>,
    /// Hashes in the order of last use, by the number of that use.
    by_use: BTreeMap<u64, Arc<str>>,
    /// Number of uses so far.
    uses: u64,
    /// Memory of all entries in bytes.
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    /// Identity of the file that was read.
    file: FileIdentity,
    manifest: Arc<Manifest>,
    bytes: usize,
    last_use: u64,
}

impl ManifestCache {
    /// Returns the manifest of the artifact with this hash, if `file` is the identity under which it was read.
    pub(super) fn recall(&self, hash: &str, file: FileIdentity) -> Option<Arc<Manifest>> {
        let known = &mut *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = known.manifests.get_mut(hash).filter(|kept| kept.file == file)?;
        // Move the entry to the end of the order of use.
        if let Some(hash) = known.by_use.remove(&kept.last_use) {
            known.uses += 1;
            kept.last_use = known.uses;
            known.by_use.insert(kept.last_use, hash);
        }
        Some(kept.manifest.clone())
    }

    /// Adds the manifest that was read from a file with the identity `file`.
    pub(super) fn remember(&self, hash: &str, file: FileIdentity, manifest: &Arc<Manifest>) {
        let bytes = ENTRY_BYTES + manifest.memory_bytes();
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remember(hash, file, manifest, bytes, BYTES_MAX);
    }
}

impl Entries {
    fn remember(&mut self, hash: &str, file: FileIdentity, manifest: &Arc<Manifest>, bytes: usize, bytes_max: usize) {
        self.uses += 1;
        let (hash, last_use): (Arc<str>, _) = (hash.into(), self.uses);
        if let Some(before) =
            self.manifests.insert(hash.clone(), Entry { file, manifest: manifest.clone(), bytes, last_use })
        {
            self.by_use.remove(&before.last_use);
            self.bytes -= before.bytes;
        }
        self.by_use.insert(last_use, hash);
        self.bytes += bytes;
        // Never remove the last entry, which is the one just added.
        while self.bytes > bytes_max && self.manifests.len() > 1 {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            self.bytes -= self.manifests.remove(&oldest).map_or(0, |kept| kept.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{ArtifactKey, FilePath};
    use crate::manifest::{FileEntry, Shape};

    fn manifest(files: usize) -> Arc<Manifest> {
        let mut manifest = Manifest::new(ArtifactKey::bare("team/model@1").expect("key"), Shape::Tree);
        for number in 0..files {
            let path = FilePath::new(&format!("f/{number}")).expect("path");
            manifest.files.insert(path, FileEntry::of(number as u64));
        }
        Arc::new(manifest)
    }

    fn file(inode: u64) -> FileIdentity {
        FileIdentity { inode, bytes: 1, mtime_ns: 1 }
    }

    #[test]
    fn a_manifest_is_returned_while_the_file_has_the_identity_that_was_read() {
        let memo = ManifestCache::default();
        for files in [0, 3, 100] {
            memo.remember("hash", file(7), &manifest(files));
            assert_eq!(memo.recall("hash", file(7)), Some(manifest(files)));
            assert_eq!(memo.recall("hash", file(8)), None);
            assert_eq!(memo.recall("other", file(7)), None);
        }
    }

    #[test]
    fn the_least_recently_used_are_removed_first_and_the_last_one_never() {
        let (memo, three) = (ManifestCache::default(), 300);
        let remember = |number: u64, bytes| {
            let known = &mut *memo.known.lock().expect("not poisoned");
            known.remember(&number.to_string(), file(number), &manifest(2), bytes, three);
            assert_eq!(known.bytes, known.manifests.values().map(|kept| kept.bytes).sum::<usize>());
            assert_eq!(known.by_use.len(), known.manifests.len());
        };
        let known = || (0..9).filter(|number| memo.recall(&number.to_string(), file(*number)).is_some());
        (0..3).for_each(|number| remember(number, 100));
        assert!(memo.recall("0", file(0)).is_some(), "it is used again");
        remember(3, 100);
        assert_eq!(known().collect::<Vec<_>>(), [0, 2, 3]);
        remember(2, 50);
        remember(4, 50);
        assert_eq!(known().collect::<Vec<_>>(), [0, 2, 3, 4], "a smaller one in its place leaves room");
        remember(5, 1000);
        assert_eq!(known().collect::<Vec<_>>(), [5], "the last one is kept whatever its size");
        remember(6, 100);
        assert_eq!(known().collect::<Vec<_>>(), [6]);
    }
}
