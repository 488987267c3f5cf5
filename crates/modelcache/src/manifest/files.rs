//! The files of a manifest: one list, sorted by path.
//!
//! A list takes less than half the memory of a tree map whose keys were inserted in order, and a manifest with a million
//! files is mostly this list. Inserting at the end is fast, inserting elsewhere moves what follows.

use super::FileEntry;
use crate::key::FilePath;
use std::fmt::Debug;
use std::ops::Index;
use std::{iter, slice};

/// What is known of each file, by its path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Files(Vec<(FilePath, FileEntry)>);

/// Iterator over [`Files`], in order of path.
pub type Iter<'a> =
    iter::Map<slice::Iter<'a, (FilePath, FileEntry)>, fn(&'a (FilePath, FileEntry)) -> (&'a FilePath, &'a FileEntry)>;

impl Files {
    /// No files.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// A list of what `files` holds; `Err` with the path that is in it twice.
    pub(super) fn from_list(mut files: Vec<(FilePath, FileEntry)>) -> Result<Self, FilePath> {
        if !files.is_sorted_by(|(a, _), (b, _)| a < b) {
            files.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            if let Some(at) = files.windows(2).position(|pair| pair[0].0 == pair[1].0) {
                return Err(files.swap_remove(at).0);
            }
        }
        Ok(Self(files))
    }

    /// Where `path` is in the list (`Ok`), or belongs (`Err`).
    fn position(&self, path: &FilePath) -> Result<usize, usize> {
        match self.0.last() {
            Some((last, _)) if last < path => Err(self.0.len()),
            _ => self.0.binary_search_by(|(there, _)| there.cmp(path)),
        }
    }

    /// The number of files.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is a file at `path`.
    pub fn contains_key(&self, path: &FilePath) -> bool {
        self.position(path).is_ok()
    }

    /// The entry of `path`.
    pub fn get(&self, path: &FilePath) -> Option<&FileEntry> {
        self.position(path).ok().map(|at| &self.0[at].1)
    }

    /// The entry of `path`, to be changed.
    pub fn get_mut(&mut self, path: &FilePath) -> Option<&mut FileEntry> {
        self.position(path).ok().map(|at| &mut self.0[at].1)
    }

    /// The entry of `path`, which is made if there is none.
    pub fn get_or_default(&mut self, path: &FilePath) -> &mut FileEntry {
        let at = self.position(path).unwrap_or_else(|at| {
            self.0.insert(at, (path.clone(), FileEntry::default()));
            at
        });
        &mut self.0[at].1
    }

    /// Adds a file, and returns the entry that it replaces, if any.
    pub fn insert(&mut self, path: FilePath, entry: FileEntry) -> Option<FileEntry> {
        match self.position(&path) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at].1, entry)),
            Err(at) => {
                self.0.insert(at, (path, entry));
                None
            }
        }
    }

    /// Removes the files for which `keep` returns false.
    pub fn retain(&mut self, mut keep: impl FnMut(&FilePath, &mut FileEntry) -> bool) {
        self.0.retain_mut(|(path, entry)| keep(path, entry));
    }

    /// Paths and entries.
    pub fn iter(&self) -> Iter<'_> {
        self.0.iter().map(|(path, entry)| (path, entry))
    }

    /// Paths and entries, which may be changed.
    pub fn iter_mut(&mut self) -> impl DoubleEndedIterator<Item = (&FilePath, &mut FileEntry)> + ExactSizeIterator {
        self.0.iter_mut().map(|(path, entry)| (&*path, entry))
    }

    /// The paths.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &FilePath> + ExactSizeIterator + Clone + Debug {
        self.0.iter().map(|(path, _)| path)
    }

    /// The entries.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &FileEntry> + ExactSizeIterator + Clone + Debug {
        self.0.iter().map(|(_, entry)| entry)
    }

    /// The entries, to be changed.
    pub fn values_mut(&mut self) -> impl DoubleEndedIterator<Item = &mut FileEntry> + ExactSizeIterator {
        self.0.iter_mut().map(|(_, entry)| entry)
    }

    /// Bytes that the list takes in memory.
    pub(super) fn memory_bytes(&self) -> usize {
        let of = |(path, entry): &(FilePath, FileEntry)| path.as_str().len() + entry.heap_bytes();
        self.0.capacity() * size_of::<(FilePath, FileEntry)>() + self.0.iter().map(of).sum::<usize>()
    }
}

impl Index<&FilePath> for Files {
    type Output = FileEntry;

    fn index(&self, path: &FilePath) -> &FileEntry {
        self.get(path).expect("there is a file at this path")
    }
}

/// Of two entries with one path the later one counts.
impl FromIterator<(FilePath, FileEntry)> for Files {
    fn from_iter<I: IntoIterator<Item = (FilePath, FileEntry)>>(files: I) -> Self {
        let mut files: Vec<_> = files.into_iter().collect();
        files.sort_by(|(a, _), (b, _)| a.cmp(b));
        files.dedup_by(|later, earlier| {
            let is_same = later.0 == earlier.0;
            if is_same {
                std::mem::swap(&mut later.1, &mut earlier.1);
            }
            is_same
        });
        Self(files)
    }
}

impl IntoIterator for Files {
    type Item = (FilePath, FileEntry);
    type IntoIter = std::vec::IntoIter<(FilePath, FileEntry)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a Files {
    type Item = (&'a FilePath, &'a FileEntry);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl serde::Serialize for Files {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> FilePath {
        FilePath::new(text).expect("path")
    }

    fn paths(files: &Files) -> Vec<&str> {
        files.keys().map(FilePath::as_str).collect()
    }

    #[test]
    fn files_stay_sorted_and_are_found_in_whatever_order_they_come() {
        let mut files = Files::new();
        for (size, name) in ["m", "z", "a", "n"].into_iter().enumerate() {
            assert_eq!(files.insert(path(name), FileEntry::of(size as u64)), None);
        }
        assert_eq!(files.insert(path("n"), FileEntry::of(9)), Some(FileEntry::of(3)));
        files.get_or_default(&path("b")).size = 7;
        assert_eq!(paths(&files), ["a", "b", "m", "n", "z"]);
        assert_eq!([files[&path("n")].size, files[&path("b")].size], [9, 7]);
        assert!(files.get(&path("c")).is_none());
        files.retain(|_, entry| entry.size > 1);
        assert_eq!(paths(&files), ["a", "b", "n"]);
    }

    #[test]
    fn of_equal_paths_the_last_counts_in_a_collection_and_is_refused_in_a_list() {
        let twice =
            || vec![(path("b"), FileEntry::of(1)), (path("a"), FileEntry::of(2)), (path("b"), FileEntry::of(3))];
        let files: Files = twice().into_iter().collect();
        assert_eq!((paths(&files), files[&path("b")].size), (vec!["a", "b"], 3));
        assert_eq!(Files::from_list(twice()), Err(path("b")));
    }
}
