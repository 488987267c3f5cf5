//! In-memory cache of parsed manifests.
//!
//! An entry is valid only while the file on disk has the identity under which it was read. A manifest is replaced by
//! rename, never written in place, so every change gives the file another identity.

use crate::manifest::{FileIdentity, Manifest};
use crate::mutex::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Maximum memory of the cache in bytes, enough for about 100,000 manifests of a few files. Beyond it, the least
/// recently used entries are removed. The newest entry stays whatever its size, because it is in use.
const BYTES_MAX: usize = 128 << 20;
/// Approximate memory of an entry in bytes, without the manifest.
const ENTRY_BYTES: usize = 200;

/// Parsed manifests, by the key hash of their artifact.
#[derive(Debug, Default)]
pub(super) struct ManifestCache {
    entries: Mutex<Entries>,
    /// Number of manifests that were parsed because they were not in the cache.
    #[cfg(test)]
    pub(super) parsed: std::sync::atomic::AtomicU64,
}

#[derive(Debug, Default)]
struct Entries {
    manifests: HashMap<Arc<str>, Entry>,
    /// Key hashes in the order of last use, by the number of that use.
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
    /// Memory of the entry in bytes.
    bytes: usize,
    last_use: u64,
}

impl ManifestCache {
    /// Returns the manifest of the artifact with this key hash, if `file` is the identity under which it was read.
    pub(super) fn get(&self, hash: &str, file: FileIdentity) -> Option<Arc<Manifest>> {
        let entries = &mut *self.entries.lock();
        let entry = entries.manifests.get_mut(hash).filter(|entry| entry.file == file)?;
        // Move the entry to the end of the order of use.
        if let Some(hash) = entries.by_use.remove(&entry.last_use) {
            entries.uses += 1;
            entry.last_use = entries.uses;
            entries.by_use.insert(entry.last_use, hash);
        }
        Some(entry.manifest.clone())
    }

    /// Adds the manifest that was read from a file with the identity `file`.
    pub(super) fn insert(&self, hash: &str, file: FileIdentity, manifest: &Arc<Manifest>) {
        let bytes = ENTRY_BYTES + manifest.memory_bytes();
        self.entries.lock().insert(hash, file, manifest, bytes, BYTES_MAX);
    }
}

impl Entries {
    fn insert(&mut self, hash: &str, file: FileIdentity, manifest: &Arc<Manifest>, bytes: usize, bytes_max: usize) {
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
        // The last entry is the one just added. Never remove it.
        while self.bytes > bytes_max && self.manifests.len() > 1 {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            self.bytes -= self.manifests.remove(&oldest).map_or(0, |entry| entry.bytes);
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
        let cache = ManifestCache::default();
        for files in [0, 3, 100] {
            cache.insert("hash", file(7), &manifest(files));
            assert_eq!(cache.get("hash", file(7)), Some(manifest(files)));
            assert_eq!(cache.get("hash", file(8)), None);
            assert_eq!(cache.get("other", file(7)), None);
        }
    }

    #[test]
    fn the_least_recently_used_entries_are_removed_first_and_the_newest_one_never() {
        let (cache, bytes_max) = (ManifestCache::default(), 300);
        let insert = |number: u64, bytes| {
            let entries = &mut *cache.entries.lock();
            entries.insert(&number.to_string(), file(number), &manifest(2), bytes, bytes_max);
            assert_eq!(entries.bytes, entries.manifests.values().map(|entry| entry.bytes).sum::<usize>());
            assert_eq!(entries.by_use.len(), entries.manifests.len());
        };
        let cached = || (0..9).filter(|number| cache.get(&number.to_string(), file(*number)).is_some());
        (0..3).for_each(|number| insert(number, 100));
        assert!(cache.get("0", file(0)).is_some(), "0 is the most recently used");
        insert(3, 100);
        assert_eq!(cached().collect::<Vec<_>>(), [0, 2, 3]);
        insert(2, 50);
        insert(4, 50);
        assert_eq!(cached().collect::<Vec<_>>(), [0, 2, 3, 4], "replacing an entry by a smaller one makes room");
        insert(5, 1000);
        assert_eq!(cached().collect::<Vec<_>>(), [5], "the newest entry stays whatever its size");
        insert(6, 100);
        assert_eq!(cached().collect::<Vec<_>>(), [6]);
    }
}
