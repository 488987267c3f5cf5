//! Entries of the wrong type below the root: a pipe, a device, a symbolic link, a folder in the place of a file.
//!
//! Another user of a shared directory, or a careless copy, can leave them. Whatever expects a file or a folder there
//! refuses them, so they stand in the way of fills and evictions. `doctor` names them. `prune` moves them to
//! `quarantine/`, where they stay until somebody removes them: they may be somebody's.

use super::files::{self, TEMPORARY, random_name};
use super::io_error::IoContext;
use super::layout::{FILES, LAST_USED, Layout, MANIFEST};
use super::rooted::{Metadata, RootedPath, absent};
use super::{Disk, modes};
use crate::error::Result;
use serde::Serialize;

/// What is expected at one level below a top folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Folder,
    File,
    /// Staging folders, and beside them manifests that are being written.
    Either,
    /// The parts of an artifact, each by its name.
    ArtifactParts,
}

/// An entry that does not belong where it lies.
#[derive(Debug, Clone, Serialize)]
pub struct Misplaced {
    /// Its path.
    pub path: String,
    /// What it is: `pipe`, `symbolic link`, `folder`, …
    pub is: &'static str,
    /// Who owns it: the numeric user id.
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
            Self::Either => found.is_dir() || found.is_file(),
            Self::ArtifactParts => match path.name() {
                FILES => found.is_dir(),
                MANIFEST | LAST_USED | "pin" => found.is_file(),
                _ => Self::Either.accepts(path, found),
            },
        }
    }
}

/// Every entry of the wrong type. Below an artifact's `files/` nothing is looked at: a view that is no file is missing,
/// and the next fill replaces it.
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
    if !level.accepts(path, &metadata) {
        found.push(Misplaced {
            path: path.to_string(),
            is: metadata.kind(),
            owner: metadata.uid(),
            at: path.clone(),
            expected: level,
        });
    } else if let Some((next, below)) = below.split_first().filter(|_| metadata.is_dir()) {
        for path in files::entries(path)? {
            check(&path, *next, below, found)?;
        }
    }
    Ok(())
}

impl Disk {
    /// Entries of the wrong type below the top folders: those that [`set_aside`](Self::set_aside) can move.
    pub(super) fn misplaced(&self) -> Result<Vec<Misplaced>> {
        let (mut all, root) = (misplaced(self.layout())?, self.layout().root());
        all.retain(|entry| entry.at.parent().is_some_and(|folder| folder != *root));
        Ok(all)
    }

    /// Moves entries of the wrong type to `quarantine/`; those that were moved. Needs no lock: no process works with
    /// what is neither the file nor the folder that belongs there.
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

/// Moves what lies at `path` to `quarantine/`, unless it is a file.
pub(super) fn set_aside_no_file(layout: &Layout, path: &RootedPath) -> Result<bool> {
    set_aside(layout, path, Level::File)
}

/// Moves what lies at `path` to `quarantine/`, unless it is what is expected there by now.
fn set_aside(layout: &Layout, path: &RootedPath, expected: Level) -> Result<bool> {
    // A name has at most 255 bytes.
    let name: String = path.name().chars().take(40).collect();
    let aside = layout.quarantine().join(format!("misplaced-{name}-{}", random_name()));
    let belongs =
        |at: &RootedPath| files::stat(at).map(|found| found.is_some_and(|found| expected.accepts(path, &found)));
    if belongs(path)? || absent(path.rename(&aside)).at("set aside", path)?.is_none() {
        return Ok(false);
    }
    if belongs(&aside)? {
        // What belongs there came in between the look and the move.
        modes::appear(&aside, path).at("put back", path)?;
        return Ok(false);
    }
    tracing::warn!(%path, to = %aside, "what does not belong there was moved to quarantine/");
    Ok(true)
}
