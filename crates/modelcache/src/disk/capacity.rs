//! Whether a whole list of artifacts would fit, before the first byte of it moves.
//!
//! Files that are equal count once. What the list already has here stays; everything else that nobody holds may go.

use super::Disk;
use super::budget::allocated_for;
use super::files;
use super::layout::staged_name;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::human::bytes;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::FileEntry;
use std::collections::{BTreeMap, BTreeSet};

/// What a list takes, in bytes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpaceNeeded {
    /// All of it.
    pub(crate) list_bytes: u64,
    /// What is not here yet.
    pub(crate) missing_bytes: u64,
}

/// One name for equal files of any artifacts; where nothing is known of a file's content, it equals no other.
pub(crate) fn content_name(key: &ArtifactKey, path: &FilePath, entry: &FileEntry) -> String {
    match (entry.sha256, entry.git_oid) {
        (None, None) => format!("{key} {path}"),
        _ => staged_name(path, entry),
    }
}

impl Disk {
    /// What the list of `keys` takes with its files, each by its [`content_name`]; `Full` if it cannot all be here at
    /// once.
    pub(crate) fn fit(
        &self,
        keys: &BTreeSet<ArtifactKey>,
        wanted: &BTreeMap<String, FileEntry>,
    ) -> Result<SpaceNeeded> {
        let (mut fit, mut present) = (SpaceNeeded { list_bytes: 0, missing_bytes: 0 }, Vec::new());
        for entry in wanted.values() {
            let blob = entry.sha256.map(|digest| files::stat(&self.layout().blob(&digest))).transpose()?.flatten();
            fit.list_bytes += allocated_for(entry.size);
            match blob {
                Some(metadata) => present.push(metadata.ino()),
                None => fit.missing_bytes += allocated_for(entry.size),
            }
        }
        let room = self.space_besides(keys, &present)?;
        if fit.missing_bytes <= room {
            return Ok(fit);
        }
        let SpaceNeeded { list_bytes, missing_bytes } = fit;
        let budget = self.space()?.budget;
        Err(Error::new(
            ErrorKind::Full,
            format!(
                "the list does not fit: it needs {} more on disk ({} in all), and at most {} can be made free (budget {})",
                bytes(missing_bytes),
                bytes(list_bytes),
                bytes(room),
                bytes(budget)
            ),
        )
        .tier(Tier::Disk)
        .hint("shorten the list, raise MODEL_CACHE_MAX_BYTES, or let go of what is in use or pinned (`modelcache ls`)"))
    }

    /// Bytes that could be free if all but the list's own went that can go.
    fn space_besides(&self, keys: &BTreeSet<ArtifactKey>, present: &[u64]) -> Result<u64> {
        let (usage, space, evictable) = (self.usage()?.0, self.space()?, self.evictable_bytes(keys, present)?);
        let of_budget = (space.budget + evictable).saturating_sub(usage.counted());
        let of_filesystem = (space.free + evictable).saturating_sub(space.min_free + usage.reserved);
        Ok(of_budget.min(of_filesystem))
    }
}
