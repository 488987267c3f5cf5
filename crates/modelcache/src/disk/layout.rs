//! Paths in the local directory. This module changes no file.

use super::rooted::RootedPath;
use crate::digest::Digest;
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version, escape, unescape};
use crate::manifest::FileEntry;

/// The paths under one cache directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: RootedPath,
}

impl Layout {
    /// Returns the layout of the directory at `root`. Symbolic links that lead to it are resolved.
    pub(crate) fn new(root: &std::path::Path) -> Self {
        Self { root: RootedPath::root(root) }
    }

    pub(crate) fn root(&self) -> &RootedPath {
        &self.root
    }

    pub(crate) fn format(&self) -> RootedPath {
        self.root.join("FORMAT")
    }

    pub(crate) fn cache_tag(&self) -> RootedPath {
        self.root.join("CACHEDIR.TAG")
    }

    pub(crate) fn blobs(&self) -> RootedPath {
        self.root.join("blobs")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> RootedPath {
        let hex = digest.to_string();
        self.root.join("blobs").join(&hex[..2]).join(hex)
    }

    pub(crate) fn artifacts(&self) -> RootedPath {
        self.root.join("artifacts")
    }

    pub(crate) fn artifact(&self, key: &ArtifactKey) -> ArtifactDir {
        ArtifactDir(self.artifacts().join(escape(key.name.as_str())).join(escape(key.version.as_str())))
    }

    pub(crate) fn artifact_versions(&self, name: &ArtifactName) -> RootedPath {
        self.artifacts().join(escape(name.as_str()))
    }

    pub(crate) fn refs(&self) -> RootedPath {
        self.root.join("refs")
    }

    /// Records of the digests of files in lower directories.
    pub(crate) fn lower_records(&self) -> RootedPath {
        self.root.join("lower")
    }

    pub(crate) fn refs_of(&self, name: &ArtifactName) -> RootedPath {
        self.refs().join(escape(name.as_str()))
    }

    pub(crate) fn ref_file(&self, name: &ArtifactName, revision: &str) -> RootedPath {
        self.refs_of(name).join(escape(revision))
    }

    pub(crate) fn stagings(&self) -> RootedPath {
        self.root.join("staging")
    }

    pub(crate) fn quarantine(&self) -> RootedPath {
        self.root.join("quarantine")
    }

    /// The records of pending uploads.
    pub(crate) fn pending_uploads(&self) -> RootedPath {
        self.root.join("backfill")
    }

    pub(crate) fn pending_upload(&self, key_hash: &str) -> RootedPath {
        self.pending_uploads().join(format!("{key_hash}-{}", rustix::process::geteuid().as_raw()))
    }

    /// The lock of the process that uploads `key` to the remote.
    pub(crate) fn backfill_lock(&self, key: &ArtifactKey) -> RootedPath {
        self.locks().join(format!("{}.backfill", key.hash()))
    }

    pub(crate) fn locks(&self) -> RootedPath {
        self.root.join("locks")
    }

    pub(crate) fn budget_lock(&self) -> RootedPath {
        self.locks().join("budget")
    }

    /// The change log. The budget record names the current log and its length.
    pub(crate) fn changes(&self) -> RootedPath {
        self.locks().join("changes")
    }

    /// The limit on concurrent requests at the end of the last download from each endpoint.
    pub(crate) fn request_limits(&self) -> RootedPath {
        self.locks().join("request-limits")
    }

    /// A lock that is taken only to find out whether locks exclude other processes.
    pub(crate) fn probe_lock(&self) -> RootedPath {
        self.locks().join("probe")
    }

    /// The lock of the leader of the fill of `key`. Generations above 0 are for successors of a leader whose heartbeat
    /// stopped.
    pub(crate) fn fill_lock(&self, key: &ArtifactKey, generation: usize) -> RootedPath {
        self.fill_lock_of(&key.hash(), generation)
    }

    /// The lock of the leader of the fill of the artifact with the key hash `hash`.
    pub(crate) fn fill_lock_of(&self, hash: &str, generation: usize) -> RootedPath {
        self.locks().join(if generation == 0 { format!("{hash}.fill") } else { format!("{hash}.fill-{generation}") })
    }

    /// The lock of the process that syncs or hashes the unsynced files of `artifact`.
    pub(crate) fn check_lock(&self, artifact: &ArtifactDir) -> RootedPath {
        self.locks().join(format!("{}.check", artifact.hash()))
    }

    /// The lease of `artifact`: a lock that readers hold shared, and an eviction holds exclusively.
    pub(crate) fn lease_lock(&self, artifact: &ArtifactDir) -> RootedPath {
        self.lease_lock_of(&artifact.hash())
    }

    /// The lease of the artifact with the key hash `hash`.
    pub(crate) fn lease_lock_of(&self, hash: &str) -> RootedPath {
        self.locks().join(format!("{hash}.lease"))
    }
}

/// Name of the Hugging Face cache folder.
pub(super) const HUB: &str = "hub";
/// Name of the folder of an artifact's views.
pub(super) const FILES: &str = "files";
/// Name of an artifact's manifest.
pub(super) const MANIFEST: &str = "manifest.json";
/// Name of an empty file whose mtime is the time of last use.
pub(super) const LAST_USED: &str = "last-used";
/// Name of an artifact's pin.
pub(super) const PIN: &str = "pin";

/// The folder of one artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ArtifactDir(pub(crate) RootedPath);

impl ArtifactDir {
    pub(crate) fn path(&self) -> &RootedPath {
        &self.0
    }

    /// Returns true if this folder and its parent are folders, not symbolic links. Another user may have created a link
    /// there, and nothing behind a link may be changed.
    pub(crate) fn is_real_folder(&self) -> crate::error::Result<bool> {
        let has_parent = self.0.parent().map_or(Ok(false), |parent| super::files::is_folder(&parent))?;
        Ok(has_parent && super::files::is_folder(&self.0)?)
    }

    /// Returns the hash of the artifact's key, equal to [`ArtifactKey::hash`].
    pub(super) fn hash(&self) -> String {
        let parent = self.0.parent();
        ArtifactKey::hash_of_folders(parent.as_ref().map_or("", RootedPath::name), self.0.name())
    }

    /// Derives the key from the folder names; `None` if a name was shortened because of its length.
    pub(super) fn key(&self) -> Option<ArtifactKey> {
        let decoded = |path: &RootedPath| unescape(path.name());
        let (name, version) = (decoded(&self.0.parent()?)?, decoded(&self.0)?);
        let key = ArtifactKey::new(name.parse().ok()?, Version::new(&version).ok()?);
        (key.hash() == self.hash()).then_some(key)
    }

    pub(crate) fn manifest(&self) -> RootedPath {
        self.0.join(MANIFEST)
    }

    pub(crate) fn last_used(&self) -> RootedPath {
        self.0.join(LAST_USED)
    }

    pub(crate) fn pin(&self) -> RootedPath {
        self.0.join(PIN)
    }

    pub(crate) fn files(&self) -> RootedPath {
        self.0.join(FILES)
    }

    pub(crate) fn view(&self, path: &FilePath) -> RootedPath {
        self.files().join(path.as_str())
    }
}

/// Returns the name of a file in staging. It contains the expected digest, so that files with equal content are staged
/// once. Without a digest it contains the Git object id, and without both a hash of the path.
pub(crate) fn staged_name(path: &FilePath, entry: &FileEntry) -> String {
    match (entry.sha256, entry.git_oid) {
        (Some(digest), _) => format!("sha256-{digest}"),
        (None, Some(oid)) => format!("git-{oid}"),
        (None, None) => format!("path-{}", Digest::of(path.as_str().as_bytes())),
    }
}
