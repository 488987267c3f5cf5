//! The files of a manifest: a vector, sorted by path.
//!
//! A vector takes less than half the memory of a tree map whose keys are inserted in order. Most of the memory of a
//! manifest with a million files is this vector. Inserting at the end is fast; inserting elsewhere moves all later
//! entries.

use super::FileEntry;
use crate::key::FilePath;
use std::fmt::Debug;
use std::ops::Index;
use std::{iter, slice};

/// The files of a manifest, by path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Files(Vec<(FilePath, FileEntry)>);

/// An iterator over [`Files`], in the order of the paths.
pub type Iter<'a> =
    iter::Map<slice::Iter<'a, (FilePath, FileEntry)>, fn(&'a (FilePath, FileEntry)) -> (&'a FilePath, &'a FileEntry)>;

impl Files {
    /// Creates an empty list.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Creates the list from `files`. If a path occurs twice, returns it as the error.
    pub(super) fn from_list(mut files: Vec<(FilePath, FileEntry)>) -> Result<Self, FilePath> {
        if !files.is_sorted_by(|(a, _), (b, _)| a < b) {
            files.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            if let Some(at) = files.windows(2).position(|pair| pair[0].0 == pair[1].0) {
                return Err(files.swap_remove(at).0);
            }
        }
        Ok(Self(files))
    }

    /// Returns the index of `path` (`Ok`), or the index at which to insert it (`Err`).
    fn position(&self, path: &FilePath) -> Result<usize, usize> {
        match self.0.last() {
            // Fast path for paths that are inserted in order.
            Some((last, _)) if last < path => Err(self.0.len()),
            _ => self.0.binary_search_by(|(existing, _)| existing.cmp(path)),
        }
    }

    /// Returns the number of files.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if there are no files.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns true if the list has `path`.
    pub fn contains_key(&self, path: &FilePath) -> bool {
        self.position(path).is_ok()
    }

    /// Returns the entry of `path`.
    pub fn get(&self, path: &FilePath) -> Option<&FileEntry> {
        self.position(path).ok().map(|at| &self.0[at].1)
    }

    /// Returns the entry of `path`, mutably.
    pub fn get_mut(&mut self, path: &FilePath) -> Option<&mut FileEntry> {
        self.position(path).ok().map(|at| &mut self.0[at].1)
    }

    /// Returns the entry of `path`, mutably. Inserts a default entry if there is none.
    pub fn get_or_default(&mut self, path: &FilePath) -> &mut FileEntry {
        let at = self.position(path).unwrap_or_else(|at| {
            self.0.insert(at, (path.clone(), FileEntry::default()));
            at
        });
        &mut self.0[at].1
    }

    /// Inserts a file. Returns the entry that it replaces, if any.
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

    /// Iterates over paths and entries.
    pub fn iter(&self) -> Iter<'_> {
        self.0.iter().map(|(path, entry)| (path, entry))
    }

    /// Iterates over paths and mutable entries.
    pub fn iter_mut(&mut self) -> impl DoubleEndedIterator<Item = (&FilePath, &mut FileEntry)> + ExactSizeIterator {
        self.0.iter_mut().map(|(path, entry)| (&*path, entry))
    }

    /// Iterates over the paths.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &FilePath> + ExactSizeIterator + Clone + Debug {
        self.0.iter().map(|(path, _)| path)
    }

    /// Iterates over the entries.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &FileEntry> + ExactSizeIterator + Clone + Debug {
        self.0.iter().map(|(_, entry)| entry)
    }

    /// Iterates over the entries, mutably.
    pub fn values_mut(&mut self) -> impl DoubleEndedIterator<Item = &mut FileEntry> + ExactSizeIterator {
        self.0.iter_mut().map(|(_, entry)| entry)
    }

    /// Returns the memory that the list uses, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        let heap_bytes = |(path, entry): &(FilePath, FileEntry)| path.as_str().len() + entry.heap_bytes();
        self.0.capacity() * size_of::<(FilePath, FileEntry)>() + self.0.iter().map(heap_bytes).sum::<usize>()
    }
}

impl Index<&FilePath> for Files {
    type Output = FileEntry;

    fn index(&self, path: &FilePath) -> &FileEntry {
        self.get(path).expect("the manifest lists this path")
    }
}

/// If a path occurs twice, the later entry is kept.
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
    fn files_stay_sorted_and_are_found_in_any_order_of_insertion() {
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
    fn of_a_repeated_path_collect_keeps_the_last_entry_and_from_list_fails() {
        let twice =
            || vec![(path("b"), FileEntry::of(1)), (path("a"), FileEntry::of(2)), (path("b"), FileEntry::of(3))];
        let files: Files = twice().into_iter().collect();
        assert_eq!((paths(&files), files[&path("b")].size), (vec!["a", "b"], 3));
        assert_eq!(Files::from_list(twice()), Err(path("b")));
    }
}
