//! The lower directory: a cache underneath, baked into an image for instance, that is only read.
//!
//! It is lent from without a lease, a lock, a touch or a link in it. Files of an image layer have other inodes and
//! coarser times than those that were recorded when the image was built: such a file is hashed once, and what was found
//! is remembered in the directory above under (lower root, device, inode, size, mtime). A file whose bytes are wrong
//! makes that copy of the artifact count as absent.

use super::budget::boot_id;
use super::files;
use super::rooted::{Metadata, RootedPath};
use super::{ArtifactDir, Disk, DiskSource, LeasedArtifact, VerifyRun, check_format};
use crate::config::{ByteBound, Sharing};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, ArtifactName, FilePath};
use crate::manifest::{FileEntry, Manifest};
use crate::selection::Selection;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// A cache underneath.
#[derive(Debug, Clone)]
pub(crate) struct Lower {
    disk: Disk,
    /// Where what was found out is remembered.
    upper: Disk,
    /// The same, for this process: digests by record name.
    seen: Arc<Mutex<HashMap<String, Digest>>>,
}

/// What a file consists of, and whether this process hears of it for the first time.
#[derive(Debug, Clone, Copy)]
struct LowerFile {
    digest: Digest,
    is_news: bool,
}

impl Lower {
    /// Opens the directory at `root` for reading. One that cannot be used is left out with a warning: it only saves
    /// bytes.
    pub(crate) fn open(root: &Path, upper: &Disk) -> Option<Self> {
        let opened = std::path::absolute(root)
            .map_err(|cause| super::fault("resolve", root, cause))
            .and_then(|root| Disk::reader(&root, "it is a lower directory, which is only read"));
        match opened {
            Ok(disk) => Some(Self { disk, upper: upper.clone(), seen: Arc::default() }),
            Err(error) => {
                tracing::warn!(%error, hint = error.hint_text(), "the lower directory is left out");
                None
            }
        }
    }

    pub(crate) fn root(&self) -> &RootedPath {
        self.disk.layout().root()
    }

    /// The artifact's folder in it, whether or not it is there.
    pub(crate) fn dir(&self, key: &ArtifactKey) -> ArtifactDir {
        self.disk.layout().artifact(key)
    }

    /// What it knows of `key`. A manifest that cannot be used counts as absent.
    pub(crate) fn manifest(&self, key: &ArtifactKey) -> Option<Manifest> {
        let ignore = |error: &Error| tracing::warn!(%error, "a manifest of the lower directory is ignored");
        self.disk.manifest(key).inspect_err(ignore).unwrap_or(None)
    }

    pub(crate) fn artifacts(&self) -> Result<usize> {
        Ok(self.disk.scan()?.iter().filter(|artifact| artifact.manifest.is_some()).count())
    }

    pub(crate) fn remembered_ref(&self, name: &ArtifactName, revision: &str) -> Result<Option<super::RememberedRef>> {
        self.disk.remembered_ref(name, revision)
    }

    /// Those of `wanted` that it has, to be copied and checked.
    pub(crate) fn source(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<DiskSource> {
        self.disk.source(key, wanted)
    }

    /// Lends what `selection` chooses of `key`, if all of it is here and right.
    pub(crate) fn acquire(&self, key: &ArtifactKey, selection: &Selection) -> Result<Option<LeasedArtifact>> {
        let Some(manifest) = self.manifest(key).filter(|manifest| manifest.holds(selection)) else { return Ok(None) };
        let dir = self.disk.layout().artifact(key);
        for (path, entry) in manifest.selected(selection) {
            let view = dir.view(path);
            let Some(metadata) = files::stat(&view)?.filter(Metadata::is_file) else { return Ok(None) };
            if entry.on_disk() == Some(metadata.identity()) && !self.was_found_wrong(&metadata, entry) {
                continue;
            }
            let found = self.digest_of(&view, &metadata, entry)?;
            if found.is_none() || found.map(|found| found.digest) != entry.sha256 {
                // Whoever waits for a fill asks again and again.
                if found.is_none_or(|found| found.is_news) {
                    tracing::warn!(artifact = %key, file = %path, "the lower directory's copy is damaged; it is ignored");
                }
                return Ok(None);
            }
        }
        Ok(Some(LeasedArtifact { manifest: Arc::new(manifest), dir, link: None, is_lower: true, _lease: None }))
    }

    /// Reads what is held of `key` in full. What is wrong is remembered by this process, and not lent by it.
    pub(crate) fn verify(&self, key: &ArtifactKey, selection: &Selection, reading: &VerifyRun) -> Result<()> {
        let Some(manifest) = self.manifest(key) else { return Ok(()) };
        let dir = self.disk.layout().artifact(key);
        for (path, _) in manifest.selected(selection).filter(|(_, entry)| entry.held.is_some()) {
            let view = dir.view(path);
            let Some(metadata) = files::stat(&view)?.filter(Metadata::is_file) else { continue };
            if let Some(digest) = self.disk.hash_rate_limited(&view, reading)? {
                self.seen().insert(self.record_name(&metadata), digest);
            }
        }
        Ok(())
    }

    /// Whether this process read the file in full, and found other bytes than `entry` has.
    fn was_found_wrong(&self, metadata: &Metadata, entry: &FileEntry) -> bool {
        let seen = self.seen();
        !seen.is_empty() && seen.get(&self.record_name(metadata)).is_some_and(|found| entry.sha256 != Some(*found))
    }

    /// What the file at `view` consists of: remembered, or found by hashing it. `None` if it is being changed.
    ///
    /// What may not be durable there is another file with every boot: a power cut changes bytes and nothing else.
    fn digest_of(&self, view: &RootedPath, metadata: &Metadata, entry: &FileEntry) -> Result<Option<LowerFile>> {
        let name = match entry.unsynced() {
            None => self.record_name(metadata),
            Some(_) => Digest::of(format!("{}\0{}", self.record_name(metadata), boot_id()).as_bytes()).to_string(),
        };
        if let Some(seen) = self.seen().get(&name) {
            return Ok(Some(LowerFile { digest: *seen, is_news: false }));
        }
        let path = self.upper.layout().lower_records().join(&name);
        let stored = files::read_small(&path, 128).unwrap_or(None);
        if let Some(digest) = stored.and_then(|text| String::from_utf8_lossy(&text).trim().parse().ok()) {
            self.seen().insert(name, digest);
            return Ok(Some(LowerFile { digest, is_news: true }));
        }
        let Some((digest, _)) =
            self.disk.hash_unchanged(view)?.filter(|(_, hashed_under)| *hashed_under == metadata.identity())
        else {
            return Ok(None);
        };
        if !self.upper.is_read_only()
            && let Err(error) = files::replace(&path, format!("{digest}\n").as_bytes(), &self.upper.layout().stagings())
        {
            tracing::debug!(%error, "the digest found is not remembered");
        }
        self.seen().insert(name, digest);
        Ok(Some(LowerFile { digest, is_news: true }))
    }

    fn record_name(&self, metadata: &Metadata) -> String {
        let identity = metadata.identity();
        let root = self.root();
        let text = format!("{root}\0{}\0{}\0{}\0{}", metadata.dev(), identity.inode, identity.bytes, identity.mtime_ns);
        Digest::of(text.as_bytes()).to_string()
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, HashMap<String, Digest>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    /// A directory that exists, for reading only. Nothing is made in it.
    pub(super) fn reader(root: &Path, why: &str) -> Result<Self> {
        super::ownership::check(root, Sharing::Off)?;
        let layout = super::Layout::new(root);
        if files::stat(&layout.format())?.is_none() {
            return Err(Error::new(ErrorKind::Directory, format!("{} is no cache directory", root.display()))
                .hint("fill it with modelcache when the image is built, or unset MODEL_CACHE_LOWER_DIR"));
        }
        check_format(&layout)?;
        let (max_bytes, min_free_bytes) = (ByteBound::Bytes(0), ByteBound::Bytes(0));
        Ok(Self(Arc::new(super::Inner {
            layout,
            max_bytes,
            min_free_bytes,
            unwritable: Some(Error::new(ErrorKind::Directory, why)),
            locks_are_honest: true,
            is_local: false,
            memo: Default::default(),
            pending_syncs: Default::default(),
            leases: Default::default(),
            index: Default::default(),
            maintenance: Default::default(),
            metrics: Default::default(),
        })))
    }
}
