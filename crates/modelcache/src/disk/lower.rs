//! The lower directory: a second cache, for instance part of a container image, that is only read.
//!
//! Its artifacts are served without locks, leases, links or updates of the time of last use. In an image layer, a file
//! has another inode and a coarser mtime than the manifest recorded when the image was built. Such a file is hashed
//! once. Its digest is recorded in the upper directory, under the lower root and the device, inode, size and mtime of
//! the file. If a selected file has wrong bytes, the artifact counts as absent from the lower directory.

use super::budget::boot_id;
use super::files;
use super::rooted::{Metadata, RootedPath};
use super::{ArtifactDir, Disk, DiskSource, LeasedArtifact, VerifyRun, check_format};
use crate::config::{ByteBound, Sharing};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, FilePath};
use crate::manifest::{FileEntry, Manifest};
use crate::mutex::Mutex;
use crate::option_name::setting::LOWER_DIR;
use crate::selection::Selection;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A lower directory.
#[derive(Debug, Clone)]
pub(crate) struct Lower {
    disk: Disk,
    /// The directory that records the digests of lower files.
    upper: Disk,
    /// Digests of lower files that this process has read from a record or computed, by record name.
    digests: Arc<Mutex<HashMap<String, Digest>>>,
}

/// The digest of a file in the lower directory.
#[derive(Debug, Clone, Copy)]
struct LowerDigest {
    digest: Digest,
    /// True if this process did not know the digest before.
    is_new: bool,
}

impl Lower {
    /// Opens the directory at `root` for reading. If it cannot be used, logs a warning and returns `None`: a lower
    /// directory only saves downloads.
    pub(crate) fn open(root: &Path, upper: &Disk) -> Option<Self> {
        let opened = std::path::absolute(root)
            .map_err(|cause| super::fault("resolve", root, cause))
            .and_then(|root| Disk::open_read_only(&root, "it is a lower directory, which is only read"));
        match opened {
            Ok(disk) => Some(Self { disk, upper: upper.clone(), digests: Arc::default() }),
            Err(error) => {
                tracing::warn!(%error, hint = error.hint_text(), "the lower directory cannot be used and is ignored");
                None
            }
        }
    }

    pub(crate) fn root(&self) -> &RootedPath {
        self.disk.layout().root()
    }

    /// Returns the path of the artifact's folder, which may not exist.
    pub(crate) fn dir(&self, key: &ArtifactKey) -> ArtifactDir {
        self.disk.layout().artifact(key)
    }

    /// Returns the manifest of `key`. A manifest that cannot be read counts as absent.
    pub(crate) fn manifest(&self, key: &ArtifactKey) -> Option<Manifest> {
        let ignore = |error: &Error| tracing::warn!(%error, "a manifest of the lower directory is ignored");
        self.disk.manifest(key).inspect_err(ignore).unwrap_or(None)
    }

    /// Returns the number of artifacts.
    pub(crate) fn artifacts(&self) -> Result<usize> {
        Ok(self.disk.scan()?.iter().filter(|artifact| artifact.manifest.is_some()).count())
    }

    pub(crate) fn remembered_ref(&self, name: &ArtifactName, revision: &str) -> Result<Option<super::RememberedRef>> {
        self.disk.remembered_ref(name, revision)
    }

    /// Returns a source for those files of `wanted` that the lower directory has. The fill copies and verifies them.
    pub(crate) fn source(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<DiskSource> {
        self.disk.source(key, wanted)
    }

    /// Returns the artifact `key`, without a lease, if all selected files exist with the right bytes.
    pub(crate) fn acquire(&self, key: &ArtifactKey, selection: &Selection) -> Result<Option<LeasedArtifact>> {
        let Some(manifest) = self.manifest(key).filter(|manifest| manifest.holds(selection)) else { return Ok(None) };
        let dir = self.disk.layout().artifact(key);
        for (path, entry) in manifest.selected(selection) {
            let view = dir.view(path);
            let Some(metadata) = files::stat(&view)?.filter(Metadata::is_file) else { return Ok(None) };
            if entry.on_disk() == Some(metadata.identity()) && !self.was_found_wrong(&metadata, entry) {
                continue;
            }
            // The file is unsynced, has another identity than the recorded one, or was found wrong by `verify`. Compare
            // the digest, hashing the file if necessary.
            let found = self.digest_of(&view, &metadata, entry)?;
            if found.is_none() || found.map(|found| found.digest) != entry.sha256 {
                // Warn once: a caller that waits for a fill comes here repeatedly.
                if found.is_none_or(|found| found.is_new) {
                    self.report_damaged(key, path, &metadata);
                }
                return Ok(None);
            }
        }
        Ok(Some(LeasedArtifact { manifest: Arc::new(manifest), dir, link: None, is_lower: true, lease: None }))
    }

    /// Hashes the selected files of `key` that are held. From then on this process does not serve those with wrong
    /// bytes.
    pub(crate) fn verify(&self, key: &ArtifactKey, selection: &Selection, run: &VerifyRun) -> Result<()> {
        let Some(manifest) = self.manifest(key) else { return Ok(()) };
        let dir = self.disk.layout().artifact(key);
        for (path, entry) in manifest.selected(selection).filter(|(_, entry)| entry.held.is_some()) {
            let view = dir.view(path);
            let Some(metadata) = files::stat(&view)?.filter(Metadata::is_file) else { continue };
            if let Some(digest) = self.disk.hash_rate_limited(&view, run)? {
                self.digests.lock().insert(self.digest_name(&metadata, entry), digest);
                if entry.sha256 != Some(digest) {
                    self.report_damaged(key, path, &metadata);
                }
            }
        }
        Ok(())
    }

    fn report_damaged(&self, key: &ArtifactKey, path: &FilePath, metadata: &Metadata) {
        self.upper.metrics().record_corrupt(Tier::Disk, 1, metadata.len());
        tracing::warn!(artifact = %key, file = %path, "the lower directory's copy is damaged; it is ignored");
    }

    /// Returns true if this process has hashed the file and found another digest than that of `entry`.
    fn was_found_wrong(&self, metadata: &Metadata, entry: &FileEntry) -> bool {
        let digests = self.digests.lock();
        !digests.is_empty()
            && digests.get(&self.digest_name(metadata, entry)).is_some_and(|found| entry.sha256 != Some(*found))
    }

    /// Returns the name under which the digest of a file is recorded.
    fn digest_name(&self, metadata: &Metadata, entry: &FileEntry) -> String {
        match entry.unsynced() {
            None => self.record_name(metadata),
            // A power cut may change the bytes of an unsynced file without changing its identity. The name of its
            // record contains the boot id, so that the record is valid for this boot only.
            Some(_) => Digest::of(format!("{}\0{}", self.record_name(metadata), boot_id()).as_bytes()).to_string(),
        }
    }

    /// Returns the digest of the file at `view`, from a record or by hashing it. `None` if the file is being changed.
    fn digest_of(&self, view: &RootedPath, metadata: &Metadata, entry: &FileEntry) -> Result<Option<LowerDigest>> {
        let name = self.digest_name(metadata, entry);
        if let Some(digest) = self.digests.lock().get(&name) {
            return Ok(Some(LowerDigest { digest: *digest, is_new: false }));
        }
        // Another process may have recorded the digest.
        let path = self.upper.layout().lower_records().join(&name);
        let stored = files::read_small(&path, 128).unwrap_or(None);
        if let Some(digest) = stored.and_then(|text| String::from_utf8_lossy(&text).trim().parse().ok()) {
            self.digests.lock().insert(name, digest);
            return Ok(Some(LowerDigest { digest, is_new: true }));
        }
        // The file must still be the one that the caller examined.
        let Some((digest, _)) =
            self.disk.hash_unchanged(view)?.filter(|(_, hashed_under)| *hashed_under == metadata.identity())
        else {
            return Ok(None);
        };
        if !self.upper.is_read_only()
            && let Err(error) = files::replace(&path, format!("{digest}\n").as_bytes(), &self.upper.layout().stagings())
        {
            tracing::debug!(%error, "the digest of a lower file cannot be recorded");
        }
        self.digests.lock().insert(name, digest);
        Ok(Some(LowerDigest { digest, is_new: true }))
    }

    /// Returns the name of the record of a file with this metadata.
    fn record_name(&self, metadata: &Metadata) -> String {
        let identity = metadata.identity();
        let root = self.root();
        let text = format!("{root}\0{}\0{}\0{}\0{}", metadata.dev(), identity.inode, identity.bytes, identity.mtime_ns);
        Digest::of(text.as_bytes()).to_string()
    }
}

impl Disk {
    /// Opens an existing cache directory for reading only. Nothing is created in it. A later call that would write
    /// fails with an error that states `reason`.
    pub(super) fn open_read_only(root: &Path, reason: &str) -> Result<Self> {
        super::ownership::check(root, Sharing::Off)?;
        let layout = super::Layout::new(root);
        if files::stat(&layout.format())?.is_none() {
            return Err(Error::new(ErrorKind::Directory, format!("{} is not a cache directory", root.display()))
                .hint(format!("fill it with modelcache when the image is built, or unset {LOWER_DIR}")));
        }
        check_format(&layout)?;
        let unwritable = Some(Error::new(ErrorKind::Directory, reason));
        Ok(Self(Arc::new(super::DiskState::new(layout, ByteBound::Bytes(0), ByteBound::Bytes(0), unwritable))))
    }
}
