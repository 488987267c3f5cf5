//! Capacity check of a prewarm: refuses a list of artifacts that does not fit on disk, before the first download.
//!
//! Files with equal content count once. Files of the list that are already on disk stay. The bytes of all other
//! artifacts count as free space, unless the artifact is leased or pinned.

use super::Disk;
use super::budget::allocated_for;
use super::files;
use super::layout::staged_name;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::human::bytes;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::FileEntry;
use crate::option_name::setting::MAX_BYTES;
use std::collections::{BTreeMap, BTreeSet};

/// The space that a list of artifacts needs, in bytes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpaceNeeded {
    /// Bytes of all files of the list.
    pub(crate) list_bytes: u64,
    /// Bytes of the files that are not on disk yet.
    pub(crate) missing_bytes: u64,
}

/// Returns a name that is equal for files with equal content, also of different artifacts. Without a digest or Git
/// object id, the name is unique to the file.
pub(crate) fn content_name(key: &ArtifactKey, path: &FilePath, entry: &FileEntry) -> String {
    match (entry.sha256, entry.git_oid) {
        (None, None) => format!("{key} {path}"),
        _ => staged_name(path, entry),
    }
}

impl Disk {
    /// Returns the space that the artifacts `keys` need. `wanted` contains their files, keyed by [`content_name`].
    ///
    /// # Errors
    /// [`ErrorKind::Full`] if the artifacts do not fit on disk all at the same time.
    pub(crate) fn check_capacity(
        &self,
        keys: &BTreeSet<ArtifactKey>,
        wanted: &BTreeMap<String, FileEntry>,
    ) -> Result<SpaceNeeded> {
        let (mut needed, mut present) = (SpaceNeeded { list_bytes: 0, missing_bytes: 0 }, Vec::new());
        for entry in wanted.values() {
            let blob = entry.sha256.map(|digest| files::stat(&self.layout().blob(&digest))).transpose()?.flatten();
            needed.list_bytes += allocated_for(entry.size);
            match blob {
                Some(metadata) => present.push(metadata.ino()),
                None => needed.missing_bytes += allocated_for(entry.size),
            }
        }
        let available = self.reclaimable_space(keys, &present)?;
        if needed.missing_bytes <= available {
            return Ok(needed);
        }
        let SpaceNeeded { list_bytes, missing_bytes } = needed;
        let budget = self.space()?.budget;
        Err(Error::new(
            ErrorKind::Full,
            format!(
                "the list does not fit: it needs {} more on disk ({} in all), and at most {} can be made free (budget {})",
                bytes(missing_bytes),
                bytes(list_bytes),
                bytes(available),
                bytes(budget)
            ),
        )
        .tier(Tier::Disk)
        .hint(format!("shorten the list, raise {MAX_BYTES}, or release or unpin other artifacts (`modelcache ls`)")))
    }

    /// Returns the bytes that would be free if all evictable artifacts were evicted except `keys`. The blobs with the
    /// inodes `present` stay, too.
    fn reclaimable_space(&self, keys: &BTreeSet<ArtifactKey>, present: &[u64]) -> Result<u64> {
        let (usage, space, evictable) = (self.usage()?.0, self.space()?, self.evictable_bytes(keys, present)?);
        // Two bounds apply: the budget of the cache, and the minimum of free space on the filesystem.
        let within_budget = (space.budget + evictable).saturating_sub(usage.counted());
        let within_filesystem = (space.free + evictable).saturating_sub(space.min_free + usage.reserved);
        Ok(within_budget.min(within_filesystem))
    }
}
