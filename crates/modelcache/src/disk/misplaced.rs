//! Entries of the wrong type below the root: a pipe, a device, a symbolic link, a folder in the place of a file.
//!
//! Another user of a shared directory, or a careless copy, can leave such entries. All code that expects a file or a
//! folder there refuses them, so they block fills and evictions. `doctor` lists them. `prune` moves them to
//! `quarantine/`, where they stay until they are removed by hand, because they may be a user's own data.

use super::files::{self, TEMPORARY, random_name};
use super::io_error::IoContext;
use super::layout::{FILES, LAST_USED, Layout, MANIFEST};
use super::rooted::{Metadata, RootedPath, absent};
use super::{Disk, modes};
use crate::error::Result;
use serde::Serialize;

/// The type of entry expected at one level below a top folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Folder,
    File,
    /// A folder or a file: staging folders, and beside them the temporary files of manifests.
    Either,
    /// No entry: this one cannot be read.
    Nothing,
    /// The entries of an artifact's folder: the name determines the type.
    ArtifactParts,
}

/// An entry of the wrong type for its place.
#[derive(Debug, Clone, Serialize)]
pub struct Misplaced {
    /// Its path.
    pub path: String,
    /// Its type: `pipe`, `symbolic link`, `folder`, …
    pub is: &'static str,
    /// The numeric user id of its owner.
    pub owner: u32,
    #[serde(skip)]
    at: RootedPath,
    #[serde(skip)]
    expected: Level,
}

impl Level {
    fn accepts(self, path: &RootedPath, found: &Metadata) -> bool {
        match self {
            Self::Folder => found.is_dir(),
            Self::File => found.is_file() || found.is_dir() && path.name().starts_with(TEMPORARY),
            Self::Nothing => false,
            Self::Either => found.is_dir() || found.is_file(),
            Self::ArtifactParts => match path.name() {
                FILES => found.is_dir(),
                MANIFEST | LAST_USED | "pin" => found.is_file(),
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
    use Level::{ArtifactParts, Either, File, Folder};
    let mut found = Vec::new();
    let levels: [(RootedPath, &[Level]); 9] = [
        (layout.blobs(), &[Folder, File]),
        (layout.artifacts(), &[Folder, Folder, ArtifactParts]),
        (layout.refs(), &[Folder, File]),
        (layout.stagings(), &[Either, File]),
        (layout.locks(), &[File]),
        (layout.unsynced(), &[File]),
        (layout.pending_uploads(), &[File]),
        (layout.lower_records(), &[File]),
        (layout.quarantine(), &[]),
    ];
    for (folder, levels) in levels {
        check(&folder, Folder, levels, &mut found)?;
    }
    for file in [layout.format(), layout.cache_tag()] {
        check(&file, File, &[], &mut found)?;
    }
    Ok(found)
}

fn check(path: &RootedPath, level: Level, below: &[Level], found: &mut Vec<Misplaced>) -> Result<()> {
    let Some(metadata) = files::stat(path)? else { return Ok(()) };
    // A misplaced folder is reported as a whole; its entries are not examined.
    if !level.accepts(path, &metadata) {
        found.push(Misplaced {
            path: path.to_string(),
            is: metadata.kind(),
            owner: metadata.uid(),
            at: path.clone(),
            expected: level,
        });
    } else if let Some((next, below)) = below.split_first().filter(|_| metadata.is_dir()) {
        let Some(paths) = files::unless_barred(files::entries(path), path)? else {
            found.push(Misplaced {
                path: path.to_string(),
                is: "folder that cannot be read",
                owner: metadata.uid(),
                at: path.clone(),
                expected: Level::Nothing,
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
    /// Returns the entries of the wrong type below the top folders: those that [`set_aside`](Self::set_aside) can move.
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
    set_aside(layout, path, Level::File)
}

/// Moves the entry at `path` to `quarantine/`, unless it has the expected type by now. Returns true if it was moved.
fn set_aside(layout: &Layout, path: &RootedPath, expected: Level) -> Result<bool> {
    // File names are limited to 255 bytes; 40 characters leave room for the prefix and the random suffix.
    let name: String = path.name().chars().take(40).collect();
    let aside = layout.quarantine().join(format!("misplaced-{name}-{}", random_name()));
    let belongs =
        |at: &RootedPath| files::stat(at).map(|found| found.is_some_and(|found| expected.accepts(path, &found)));
    if belongs(path)? || absent(path.rename(&aside)).at("set aside", path)?.is_none() {
        return Ok(false);
    }
    if belongs(&aside)? {
        // A process replaced the entry with a right one between the check and the rename: put it back.
        modes::appear(&aside, path).at("put back", path)?;
        return Ok(false);
    }
    tracing::warn!(%path, to = %aside, "an entry that does not belong there was moved to quarantine/");
    Ok(true)
}
