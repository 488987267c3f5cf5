//! Entries of the wrong type below the root: a pipe, a device, a symbolic link, a folder at the path of a file.
//!
//! Another user of a shared directory, or a careless copy, can leave such entries. Code that expects a file or a folder
//! at such a path fails, so these entries block fills and evictions. `doctor` lists them. `prune` moves them to
//! `quarantine/`, where they stay until they are removed by hand, because they may be a user's own data.

use super::files::{self, TEMPORARY_PREFIX, random_name};
use super::io_error::IoContext;
use super::layout::{FILES, LAST_USED, Layout, MANIFEST, PIN};
use super::rooted::{Metadata, RootedPath, absent};
use super::{Disk, modes};
use crate::error::Result;
use serde::Serialize;

/// The expected type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExpectedType {
    Folder,
    /// A file. A folder with the name of a temporary entry (`new-…`) is accepted as well.
    File,
    /// A folder or a file, for instance a staging folder, or a temporary file in `staging/`.
    Either,
    /// No type is right, because the entry cannot be read.
    Nothing,
    /// The name determines the type: the entries of an artifact's folder.
    ByName,
}

/// An entry of the wrong type for its place.
#[derive(Debug, Clone, Serialize)]
pub struct Misplaced {
    /// The path of the entry.
    pub path: String,
    /// The type of the entry: `pipe`, `symbolic link`, `folder`, …
    pub is: &'static str,
    /// The numeric user id of the owner.
    pub owner: u32,
    #[serde(skip)]
    at: RootedPath,
    #[serde(skip)]
    expected: ExpectedType,
}

impl ExpectedType {
    /// Returns true if the entry at `path` with the metadata `found` has this type.
    fn accepts(self, path: &RootedPath, found: &Metadata) -> bool {
        match self {
            Self::Folder => found.is_dir(),
            Self::File => found.is_file() || found.is_dir() && path.name().starts_with(TEMPORARY_PREFIX),
            Self::Nothing => false,
            Self::Either => found.is_dir() || found.is_file(),
            Self::ByName => match path.name() {
                FILES => found.is_dir(),
                MANIFEST | LAST_USED | PIN => found.is_file(),
                _ => Self::Either.accepts(path, found),
            },
        }
    }
}

/// Returns every entry of the wrong type.
///
/// Entries below an artifact's `files/` are not examined: a view that is not a regular file counts as missing, and the
/// next fill replaces it.
pub(super) fn misplaced(layout: &Layout) -> Result<Vec<Misplaced>> {
    use ExpectedType::{ByName, Either, File, Folder};
    let mut found = Vec::new();
    // Each top folder, with the expected types of its entries, of their entries, and so on.
    let tree: [(RootedPath, &[ExpectedType]); 8] = [
        (layout.blobs(), &[Folder, File]),
        (layout.artifacts(), &[Folder, Folder, ByName]),
        (layout.refs(), &[Folder, File]),
        (layout.stagings(), &[Either, File]),
        (layout.locks(), &[File]),
        (layout.pending_uploads(), &[File]),
        (layout.lower_records(), &[File]),
        (layout.quarantine(), &[]),
    ];
    for (folder, below) in tree {
        check(&folder, Folder, below, &mut found)?;
    }
    for file in [layout.format(), layout.cache_tag()] {
        check(&file, File, &[], &mut found)?;
    }
    Ok(found)
}

/// Adds the entry at `path` to `found` if it is not of the type `expected`. Otherwise checks its entries against
/// `below`.
fn check(path: &RootedPath, expected: ExpectedType, below: &[ExpectedType], found: &mut Vec<Misplaced>) -> Result<()> {
    let Some(metadata) = files::stat(path)? else { return Ok(()) };
    // A misplaced folder is reported as a whole; its entries are not examined.
    if !expected.accepts(path, &metadata) {
        found.push(Misplaced {
            path: path.to_string(),
            is: metadata.kind(),
            owner: metadata.uid(),
            at: path.clone(),
            expected,
        });
    } else if let Some((next, below)) = below.split_first().filter(|_| metadata.is_dir()) {
        let Some(paths) = files::unless_inaccessible(files::entries(path), path)? else {
            found.push(Misplaced {
                path: path.to_string(),
                is: "folder that cannot be read",
                owner: metadata.uid(),
                at: path.clone(),
                expected: ExpectedType::Nothing,
            });
            return Ok(());
        };
        for path in paths {
            check(&path, *next, below, found)?;
        }
    }
    Ok(())
}

impl Disk {
    /// Returns the entries of the wrong type below the top folders, which [`set_aside`](Self::set_aside) can move.
    pub(super) fn misplaced(&self) -> Result<Vec<Misplaced>> {
        let (mut all, root) = (misplaced(self.layout())?, self.layout().root());
        // A top folder, `FORMAT` or `CACHEDIR.TAG` of the wrong type is only reported.
        all.retain(|entry| entry.at.parent().is_some_and(|folder| folder != *root));
        Ok(all)
    }

    /// Moves entries of the wrong type to `quarantine/`, and returns those that were moved.
    ///
    /// Takes no lock, because no process uses an entry of the wrong type.
    pub(super) fn set_aside(&self, entries: Vec<Misplaced>) -> Vec<Misplaced> {
        let was_moved = |entry: &Misplaced| match set_aside(self.layout(), &entry.at, entry.expected) {
            Ok(moved) => moved,
            Err(error) => {
                tracing::warn!(path = %entry.path, is = entry.is, owner = entry.owner, %error, "an entry that does not belong in the cache directory cannot be moved to quarantine/; its owner or root can remove it");
                false
            }
        };
        entries.into_iter().filter(was_moved).collect()
    }
}

/// Moves the entry at `path` to `quarantine/`, unless it is a file. Returns true if it was moved.
pub(super) fn set_aside_unless_file(layout: &Layout, path: &RootedPath) -> Result<bool> {
    set_aside(layout, path, ExpectedType::File)
}

/// Moves the entry at `path` to `quarantine/`, unless it has the expected type by now. Returns true if it was moved.
fn set_aside(layout: &Layout, path: &RootedPath, expected: ExpectedType) -> Result<bool> {
    // File names are limited to 255 bytes; 40 characters leave room for the prefix and the random suffix.
    let name: String = path.name().chars().take(40).collect();
    let target = layout.quarantine().join(format!("misplaced-{name}-{}", random_name()));
    let is_expected =
        |at: &RootedPath| files::stat(at).map(|found| found.is_some_and(|found| expected.accepts(path, &found)));
    if is_expected(path)? || absent(path.rename(&target)).at("set aside", path)?.is_none() {
        return Ok(false);
    }
    if is_expected(&target)? {
        // Between the check and the rename, another process replaced the entry by one of the right type: put it back.
        modes::rename_no_replace(&target, path).at("put back", path)?;
        return Ok(false);
    }
    tracing::warn!(%path, to = %target, "an entry that does not belong there was moved to quarantine/");
    Ok(true)
}
