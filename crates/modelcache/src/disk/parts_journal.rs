//! The journal of the written parts of a staged file. It lets a later fill resume the download.
//!
//! The journal is a file beside the staged file: a header with the two sizes, then one byte per part, which is set
//! after the bytes of the part were written. The journal is a hint and is never synced: a part that it lists is
//! verified before it counts. A journal for other sizes is ignored. A file of one part has no journal: it is either
//! complete or discarded.

use super::files;
use super::io_error::fault;
use super::rooted::RootedPath;
use crate::error::Result;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Length of the header in bytes: file size and part size, each a little-endian `u64`.
const HEADER_BYTES: u64 = 16;
/// Value of the byte of a written part.
const WRITTEN: u8 = b'1';

/// The open journal of one staged file.
#[derive(Debug)]
pub(super) struct PartsJournal {
    file: File,
    path: RootedPath,
}

/// Returns the path of the journal of the staged file at `path`.
pub(super) fn journal_of(path: &RootedPath) -> RootedPath {
    path.with_file_name(format!("{}.parts", path.name()))
}

/// Returns the length in bytes of the journal of a file of `size` bytes; 0 for a file of one part.
pub(super) fn journal_bytes(size: u64, part_size: u64) -> u64 {
    if size > part_size { HEADER_BYTES + size.div_ceil(part_size) } else { 0 }
}

fn header(size: u64, part_size: u64) -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(&size.to_le_bytes());
    header[8..].copy_from_slice(&part_size.to_le_bytes());
    header
}

impl PartsJournal {
    /// Creates an empty journal, replacing an existing one; `None` for a file of one part.
    pub(super) fn create(staged: &RootedPath, size: u64, part_size: u64) -> Result<Option<Self>> {
        let path = journal_of(staged);
        files::remove_file(&path)?;
        if size <= part_size {
            return Ok(None);
        }
        let at = |cause| fault("make", &path, cause);
        let file = path.create_new(0o666).map_err(at)?;
        file.write_all_at(&header(size, part_size), 0).map_err(at)?;
        Ok(Some(Self { file, path }))
    }

    /// Creates a journal that lists every part, for a sealed file (complete and read-only), and returns those parts;
    /// `None` for a file of one part.
    pub(super) fn of_sealed(staged: &RootedPath, size: u64, part_size: u64) -> Result<Option<(Self, BTreeSet<u64>)>> {
        let Some(journal) = Self::create(staged, size, part_size)? else { return Ok(None) };
        let parts: BTreeSet<u64> = (0..size.div_ceil(part_size)).collect();
        parts.iter().try_for_each(|part| journal.mark(*part))?;
        Ok(Some((journal, parts)))
    }

    /// Opens the journal that an earlier fill left, and returns it with the parts that it lists; `None` if there is no
    /// journal for these sizes.
    pub(super) fn resume(staged: &RootedPath, size: u64, part_size: u64) -> Option<(Self, BTreeSet<u64>)> {
        let path = journal_of(staged);
        let file = path.open(true).ok()?;
        let parts = Self::read(&file, size, part_size)?;
        Some((Self { file, path }, parts))
    }

    /// Returns the parts that the journal of the file at `staged` lists, without changing it.
    pub(super) fn listed(staged: &RootedPath, size: u64, part_size: u64) -> impl Iterator<Item = u64> {
        let file = journal_of(staged).open(false).ok();
        file.and_then(|file| Self::read(&file, size, part_size)).unwrap_or_default().into_iter()
    }

    fn read(file: &File, size: u64, part_size: u64) -> Option<BTreeSet<u64>> {
        let mut bytes = vec![0; usize::try_from(journal_bytes(size, part_size)).ok()?];
        let mut read = 0;
        // A truncated journal lists fewer parts. A read error has the same effect.
        while let Ok(more @ 1..) = file.read_at(&mut bytes[read..], read as u64) {
            read += more;
        }
        let marks = bytes[..read].strip_prefix(&header(size, part_size))?;
        Some((0..).zip(marks).filter(|(_, mark)| **mark == WRITTEN).map(|(part, _)| part).collect())
    }

    /// Records that the bytes of `part` are written.
    pub(super) fn mark(&self, part: u64) -> Result<()> {
        self.file.write_all_at(&[WRITTEN], HEADER_BYTES + part).map_err(|cause| fault("write", &self.path, cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_lists_the_marked_parts_and_is_ignored_for_other_sizes() {
        let folder = tempfile::tempdir().expect("folder");
        let staged = RootedPath::root(folder.path()).join("sha256-x");
        let journal = PartsJournal::create(&staged, 4500, 1024).expect("makes").expect("more than one part");
        journal.mark(3).expect("marks");
        journal.mark(0).expect("marks");
        let found = |size, part_size| PartsJournal::resume(&staged, size, part_size).map(|(_, parts)| parts);
        assert_eq!(found(4500, 1024), Some(BTreeSet::from([0, 3])));
        assert_eq!((found(4501, 1024), found(4500, 2048)), (None, None));
        assert_eq!(journal_of(&staged).metadata().expect("stat").len(), 16 + 4, "the header and one byte per part");
        PartsJournal::create(&staged, 4500, 1024).expect("makes");
        assert_eq!(found(4500, 1024), Some(BTreeSet::new()), "a new journal lists no parts");
        assert!(PartsJournal::create(&staged, 1024, 1024).expect("makes").is_none());
        assert_eq!(found(4500, 1024), None, "the journal is removed if the file has one part");
    }
}
