//! Counts the files of a cache directory, independently of the program's own accounting.
//!
//! Relies only on the layout that docs/disk-format.md promises. May run while other processes change the directory:
//! files that vanish during the walk are skipped, and a file with several hard links counts once.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Result of one walk through a cache directory.
#[derive(Debug, Default)]
pub struct Census {
    /// Allocated bytes of blobs, quarantine, staged files and views. Each inode counts once.
    pub counted_bytes: u64,
    /// Blobs with a single hard link.
    pub orphans: Vec<PathBuf>,
    /// Folders in staging.
    pub stagings: Vec<PathBuf>,
    /// Folders in staging with files that have a single hard link, the journal aside.
    pub stagings_with_bytes: Vec<PathBuf>,
    /// Files directly in staging: temporaries that were about to be renamed into place.
    pub temporaries: Vec<PathBuf>,
    /// Views of artifacts that have no manifest.
    pub loose_views: Vec<PathBuf>,
    /// Records of pending uploads, one file per artifact.
    pub pending_uploads: Vec<PathBuf>,
}

impl Census {
    /// Walks through `root`. Fails on read errors; missing files and folders are not errors.
    pub fn of(root: &Path) -> io::Result<Self> {
        let mut census = Self::default();
        let mut counted: BTreeMap<u64, u64> = BTreeMap::new();
        let mut count = |metadata: &Metadata| counted.insert(metadata.ino(), metadata.blocks() * 512);
        walk(&root.join("blobs"), &mut |path, metadata| {
            if metadata.nlink() == 1 {
                census.orphans.push(path.to_owned());
            }
            count(metadata);
        })?;
        walk(&root.join("quarantine"), &mut |_, metadata| {
            count(metadata);
        })?;
        for path in entries(&root.join("staging"))? {
            if !path.is_dir() {
                if let Ok(metadata) = fs::symlink_metadata(&path)
                    && metadata.nlink() == 1
                {
                    count(&metadata);
                }
                census.temporaries.push(path);
                continue;
            }
            let mut has_bytes = false;
            walk(&path, &mut |file, metadata| {
                if file.file_name().is_some_and(|name| name != "journal") {
                    has_bytes |= metadata.nlink() == 1;
                    count(metadata);
                }
            })?;
            census.stagings_with_bytes.extend(has_bytes.then(|| path.clone()));
            census.stagings.push(path);
        }
        census.pending_uploads = entries(&root.join("backfill"))?;
        for name in entries(&root.join("artifacts"))? {
            for version in entries(&name)? {
                let is_loose = !version.join("manifest.json").exists();
                walk(&version.join("files"), &mut |view, metadata| {
                    census.loose_views.extend(is_loose.then(|| view.to_owned()));
                    // A view that no longer shares a blob's inode takes space, too.
                    count(metadata);
                })?;
            }
        }
        census.counted_bytes = counted.values().sum();
        Ok(census)
    }
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(listing) = present(fs::read_dir(folder))? else { return Ok(Vec::new()) };
    listing.map(|entry| entry.map(|entry| entry.path())).collect()
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path, &Metadata)) -> io::Result<()> {
    for path in entries(folder)? {
        match present(fs::symlink_metadata(&path))? {
            Some(metadata) if metadata.is_dir() => walk(&path, visit)?,
            Some(metadata) => visit(&path, &metadata),
            None => {}
        }
    }
    Ok(())
}

fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_counts_once_and_leftovers_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let write = |path: &str, bytes: usize| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![1; bytes]).unwrap();
        };
        write("blobs/aa/a", 5000);
        write("blobs/bb/b", 5000);
        write("quarantine/c", 10);
        write("staging/k-1/journal", 10);
        write("staging/k-1/part", 10);
        write("staging/new-1", 10);
        write("artifacts/n/1/files/loose", 1);
        write("staging/k-2/journal", 10);
        write("backfill/k", 10);
        fs::hard_link(root.join("blobs/aa/a"), root.join("staging/k-2/again")).unwrap();
        let census = Census::of(root).unwrap();
        let each = fs::metadata(root.join("blobs/aa/a")).unwrap().blocks() * 512;
        let small = fs::metadata(root.join("quarantine/c")).unwrap().blocks() * 512;
        assert_eq!(census.counted_bytes, 2 * each + 4 * small);
        assert_eq!(census.orphans, [root.join("blobs/bb/b")]);
        assert_eq!(census.stagings_with_bytes, [root.join("staging/k-1")]);
        assert_eq!(census.stagings.len(), 2);
        assert_eq!(census.temporaries, [root.join("staging/new-1")]);
        assert_eq!(census.loose_views, [root.join("artifacts/n/1/files/loose")]);
        assert_eq!(census.pending_uploads, [root.join("backfill/k")]);
        assert_eq!(Census::of(&root.join("nowhere")).unwrap().counted_bytes, 0);
    }
}
