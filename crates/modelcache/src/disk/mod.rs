//! The near tier: a local directory, shared by any number of processes without a daemon.
//!
//! # Contract
//! - The directory is the index: everything known is read from it, and losing this process loses nothing.
//! - A reader sees an artifact's old manifest or its new one; what a manifest calls held exists and is right, or lending
//!   finds out. Blobs are immutable; nothing is truncated or overwritten in place.
//! - Counted bytes stay within the budget: room is made before anything is written.
//! - Locks save bandwidth and protect leases; wrong bytes never come from a lock that failed.
//!
//! All functions here block on disk work; async callers use `spawn_blocking`. The layout and the order of steps are
//! written down in `docs/disk-format.md`.

mod budget;
mod fault;
mod files;
mod fit;
mod given;
mod holders;
mod layout;
mod lease;
mod lend;
mod lock;
mod materialize;
mod pin;
mod prune;
mod publish;
mod refs;
mod staging;
mod writer;

pub(crate) use budget::{Evicted, Usage};
pub(crate) use fault::fault;
pub(crate) use files::identity;
pub(crate) use fit::content_name;
pub(crate) use given::{Given, copy_given, list_given};
pub(crate) use layout::{ArtifactDir, Layout, staged_name};
pub(crate) use lend::{Lend, Lent};
pub(crate) use lock::FileLock;
pub(crate) use materialize::Tree;
pub use materialize::{Destination, Link, LinkMode, Materialized};
pub use pin::{Holder, InTheWay, Pin};
pub use prune::{KeptArtifact, Leftovers, PruneOptions, PruneReport, PrunedArtifact};
pub(crate) use publish::StagedFile;
pub(crate) use staging::Staging;
pub(crate) use writer::{ALIGNMENT, Hashed, StagedWriter};

use crate::config::ByteBound;
use crate::digest::{Digest, GitOid};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName};
use crate::limits;
use crate::manifest::Manifest;
use fault::At;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// What the `FORMAT` file says; a higher number is refused.
const FORMAT: &str = "modelcache 1\n";
/// Content of `CACHEDIR.TAG`, which tells backup tools to leave the directory out (bford.info/cachedir).
const CACHE_TAG: &str =
    "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of model artifacts; it can be filled again.\n";

/// The local directory.
#[derive(Debug, Clone)]
pub(crate) struct Disk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    layout: Layout,
    max_bytes: ByteBound,
    min_free_bytes: ByteBound,
    /// Why nothing can be written here, if nothing can.
    unwritable: Option<String>,
}

/// One artifact's folder, as a scan found it.
#[derive(Debug)]
pub(crate) struct ScannedArtifact {
    pub(crate) dir: ArtifactDir,
    /// `None` if there is none or it is damaged.
    pub(crate) manifest: Option<Manifest>,
    pub(crate) last_used: Option<SystemTime>,
}

impl ScannedArtifact {
    /// How people know it: its key, or its folder while no manifest tells.
    pub(crate) fn name(&self) -> String {
        self.manifest.as_ref().map_or_else(|| self.dir.path().display().to_string(), |m| m.key.to_string())
    }
}

/// The bounds and the free space, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Space {
    pub(crate) budget: u64,
    pub(crate) min_free: u64,
    pub(crate) free: u64,
}

impl Disk {
    /// Opens the directory, making it if need be. A directory that cannot be written still serves what it holds.
    pub(crate) fn open(root: &Path, max_bytes: ByteBound, min_free_bytes: ByteBound) -> Result<Self> {
        let root = std::path::absolute(root).at("resolve", root)?;
        let layout = Layout::new(root);
        let unwritable = match prepare(&layout) {
            Ok(()) => None,
            Err(error) if files::stat(&layout.format()).is_ok_and(|metadata| metadata.is_some()) => {
                Some(error.to_string())
            }
            Err(error) => return Err(error),
        };
        check_format(&layout)?;
        Ok(Self(Arc::new(Inner { layout, max_bytes, min_free_bytes, unwritable })))
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.0.layout
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.0.unwritable.is_some()
    }

    /// Refuses what would write into a directory that cannot be written.
    pub(crate) fn ensure_writable(&self) -> Result<()> {
        match &self.0.unwritable {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Directory, format!("the cache directory cannot be written: {why}"))
                .tier(Tier::Disk)
                .hint("what it holds is still served; to fetch more, mount it writable or point MODEL_CACHE_DIR elsewhere")),
        }
    }

    /// The bounds in bytes and what is free.
    pub(crate) fn space(&self) -> Result<Space> {
        let root = self.layout().root();
        let stat = rustix::fs::statvfs(root).at("look at the filesystem of", root)?;
        let filesystem = stat.f_blocks * stat.f_frsize;
        Ok(Space {
            budget: self.0.max_bytes.bytes(filesystem),
            min_free: self.0.min_free_bytes.bytes(filesystem),
            free: stat.f_bavail * stat.f_frsize,
        })
    }

    /// A bound in bytes, on this filesystem.
    pub(crate) fn bound_bytes(&self, bound: ByteBound) -> Result<u64> {
        let root = self.layout().root();
        let stat = rustix::fs::statvfs(root).at("look at the filesystem of", root)?;
        Ok(bound.bytes(stat.f_blocks * stat.f_frsize))
    }

    /// Tries to become the one that fills `key`; `None` while another is.
    pub(crate) fn try_fill(&self, key: &ArtifactKey) -> Result<Option<FileLock>> {
        self.ensure_writable()?;
        FileLock::try_exclusive(&self.layout().fill_lock(key))
    }

    /// What disk knows of `key`, held or not.
    pub(crate) fn manifest(&self, key: &ArtifactKey) -> Result<Option<Manifest>> {
        self.read_manifest(&self.layout().artifact(key))
    }

    /// The manifest in `dir`. A damaged one is moved aside and counts as absent: its blobs are found again by digest.
    pub(crate) fn read_manifest(&self, dir: &ArtifactDir) -> Result<Option<Manifest>> {
        let path = dir.manifest();
        let Some(bytes) = files::read_small(&path, limits::MANIFEST_BYTES_MAX)? else { return Ok(None) };
        let belongs_here = |manifest: &Manifest| self.layout().artifact(&manifest.key) == *dir;
        match Manifest::from_bytes(&bytes) {
            Ok(manifest) if belongs_here(&manifest) => Ok(Some(manifest)),
            Err(error) if error.kind() == ErrorKind::Invalid => Err(error),
            Ok(_) | Err(_) => {
                tracing::warn!(path = %path.display(), "a manifest is damaged; it is ignored and will be written anew");
                Ok(None)
            }
        }
    }

    /// Every artifact's folder with its manifest.
    pub(crate) fn scan(&self) -> Result<Vec<ScannedArtifact>> {
        let mut found = Vec::new();
        for name_dir in files::entries(&self.layout().artifacts())? {
            for version_dir in files::entries(&name_dir)? {
                let dir = ArtifactDir(version_dir);
                // A manifest of a newer release is left alone: neither evicted nor swept.
                let Ok(manifest) = self.read_manifest(&dir) else { continue };
                let last_used = self.last_used(&dir)?;
                found.push(ScannedArtifact { dir, manifest, last_used });
            }
        }
        Ok(found)
    }

    /// The same, least recently used first.
    pub(crate) fn scan_by_last_use(&self) -> Result<Vec<ScannedArtifact>> {
        let mut artifacts = self.scan()?;
        artifacts.sort_by_key(|artifact| artifact.last_used);
        Ok(artifacts)
    }

    pub(crate) fn last_used(&self, dir: &ArtifactDir) -> Result<Option<SystemTime>> {
        Ok(files::stat(&dir.last_used())?.and_then(|metadata| metadata.modified().ok()))
    }

    /// Whether anybody holds a lease on the artifact now.
    pub(crate) fn is_leased(&self, dir: &ArtifactDir) -> bool {
        matches!(FileLock::try_exclusive(&self.layout().lease(dir)), Ok(None))
    }

    /// Evicts one artifact on request; `None` if it is not here. Held or pinned artifacts are refused.
    pub(crate) fn evict(&self, key: &ArtifactKey) -> Result<Option<u64>> {
        let dir = self.layout().artifact(key);
        if files::stat(dir.path())?.is_none() {
            return Ok(None);
        }
        self.ensure_writable()?;
        let mut hold = self.hold_budget()?;
        let (manifest, last_used) = (self.read_manifest(&dir)?, self.last_used(&dir)?);
        let evicted = hold.evict(&ScannedArtifact { dir, manifest, last_used })?;
        hold.release()?;
        match evicted {
            Evicted::Freed(bytes) => Ok(Some(bytes)),
            Evicted::Kept(why) => {
                let remedy = match &why {
                    InTheWay::Pinned(_) => format!("take the pin off first: modelcache unpin '{key}'"),
                    _ => "try again when its readers have ended".to_owned(),
                };
                let refusal = Error::new(ErrorKind::Conflict, format!("not evicted: it is {why}"));
                Err(refusal.artifact(key).tier(Tier::Disk).hint(remedy))
            }
        }
    }

    /// The SHA-256 that any version of `name` learnt for a file, by its git identity and size.
    pub(crate) fn digests_of_git_oids(&self, name: &ArtifactName) -> Result<BTreeMap<(GitOid, u64), Digest>> {
        let mut known = BTreeMap::new();
        for version_dir in files::entries(&self.layout().artifact_versions(name))? {
            let Ok(Some(manifest)) = self.read_manifest(&ArtifactDir(version_dir)) else { continue };
            let entries = manifest.files.values();
            known.extend(entries.filter_map(|entry| Some(((entry.git_oid?, entry.size), entry.sha256?))));
        }
        Ok(known)
    }

    /// What counts against the budget, and the bytes in quarantine among it.
    pub(crate) fn usage(&self) -> Result<(Usage, u64)> {
        let mut quarantined = 0;
        files::walk(&self.layout().quarantine(), &mut |_, metadata| {
            quarantined += files::allocated(metadata);
            Ok(())
        })?;
        if self.is_read_only() {
            let mut published = quarantined;
            files::walk(&self.layout().blobs(), &mut |_, metadata| {
                published += files::allocated(metadata);
                Ok(())
            })?;
            return Ok((Usage { published, ..Usage::default() }, quarantined));
        }
        let hold = self.hold_budget()?;
        let usage = hold.usage()?;
        hold.release()?;
        Ok((usage, quarantined))
    }
}

/// Makes the folders and marks the directory as ours.
fn prepare(layout: &Layout) -> Result<()> {
    let root = layout.root();
    fs::create_dir_all(root).at("make the cache directory", root)?;
    let folders = [layout.blobs(), layout.artifacts(), layout.stagings(), layout.quarantine(), layout.locks()];
    for folder in folders {
        make_dir(&folder)?;
    }
    write_new(&layout.cache_tag(), CACHE_TAG)?;
    write_new(&layout.format(), FORMAT)?;
    // A mount that turned read-only still lets existing folders be "made": ask whether it can be written.
    rustix::fs::access(layout.stagings(), rustix::fs::Access::WRITE_OK).at("write to", root)
}

fn make_dir(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result.at("make", path),
    }
}

fn write_new(path: &PathBuf, content: &str) -> Result<()> {
    match fs::File::create_new(path) {
        Ok(mut file) => file.write_all(content.as_bytes()).at("write", path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error).at("make", path),
    }
}

/// Refuses a directory that a newer release made.
fn check_format(layout: &Layout) -> Result<()> {
    let path = layout.format();
    let text = files::read_small(&path, 64)?.unwrap_or_default();
    let number =
        String::from_utf8_lossy(&text).trim().strip_prefix("modelcache ").and_then(|number| number.parse::<u32>().ok());
    let refuse =
        |message: String, hint: &str| Err(Error::new(ErrorKind::Directory, message).tier(Tier::Disk).hint(hint));
    match number {
        Some(1) => Ok(()),
        Some(newer) => refuse(
            format!("{} has format {newer}; this release knows 1", layout.root().display()),
            "update modelcache, or point MODEL_CACHE_DIR to another directory; nothing was touched",
        ),
        // Another process has made the file and not yet written it.
        None if text.is_empty() => Ok(()),
        None => refuse(
            format!("{} is not a cache directory: its FORMAT file says something else", layout.root().display()),
            "point MODEL_CACHE_DIR to another directory",
        ),
    }
}
