//! Where everything lies in the local directory. Names, and whether a folder is where its name says; nothing is changed.

use super::rooted::RootedPath;
use crate::digest::Digest;
use crate::key::{ArtifactKey, ArtifactName, FilePath, escape};
use crate::manifest::FileEntry;

/// The paths under one cache directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: RootedPath,
}

impl Layout {
    /// Of the directory at `root`, which may lie behind symbolic links.
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

    /// What was found out about files of lower directories.
    pub(crate) fn lower_records(&self) -> RootedPath {
        self.root.join("lower")
    }

    pub(crate) fn reference(&self, name: &ArtifactName, revision: &str) -> RootedPath {
        self.refs().join(escape(name.as_str())).join(escape(revision))
    }

    pub(crate) fn stagings(&self) -> RootedPath {
        self.root.join("staging")
    }

    pub(crate) fn quarantine(&self) -> RootedPath {
        self.root.join("quarantine")
    }

    /// Who has still to make something durable: one locked file a process.
    pub(crate) fn unsynced(&self) -> RootedPath {
        self.root.join("unsynced")
    }

    /// What still has to reach a remote.
    pub(crate) fn pending_uploads(&self) -> RootedPath {
        self.root.join("backfill")
    }

    pub(crate) fn pending_upload(&self, key_hash: &str) -> RootedPath {
        self.pending_uploads().join(key_hash)
    }

    /// Held by the one that uploads `key`.
    pub(crate) fn backfill_lock(&self, key: &ArtifactKey) -> RootedPath {
        self.locks().join(format!("{}.backfill", key.hash()))
    }

    pub(crate) fn locks(&self) -> RootedPath {
        self.root.join("locks")
    }

    pub(crate) fn budget_lock(&self) -> RootedPath {
        self.locks().join("budget")
    }

    /// Which manifests were changed; what the budget record says of it counts.
    pub(crate) fn changes(&self) -> RootedPath {
        self.locks().join("changes")
    }

    /// Locked to find out whether locks exclude.
    pub(crate) fn probe_lock(&self) -> RootedPath {
        self.locks().join("probe")
    }

    /// The lock of the one that fills `key`; beyond generation 0, of the one that follows a leader who fell silent.
    pub(crate) fn fill_lock(&self, key: &ArtifactKey, generation: usize) -> RootedPath {
        let hash = key.hash();
        self.locks().join(if generation == 0 { format!("{hash}.fill") } else { format!("{hash}.fill-{generation}") })
    }

    /// Held by the one that checks what a writer of `artifact` left that died before it was durable.
    pub(crate) fn check_lock(&self, artifact: &ArtifactDir) -> RootedPath {
        self.locks().join(format!("{}.check", artifact.hash()))
    }

    pub(crate) fn lease(&self, artifact: &ArtifactDir) -> RootedPath {
        self.lease_of(&artifact.hash())
    }

    /// The same, by the artifact's hash.
    pub(crate) fn lease_of(&self, hash: &str) -> RootedPath {
        self.locks().join(format!("{hash}.lease"))
    }
}

/// The names of an artifact's manifest, and of the file whose time is the last use.
pub(super) const FILES: &str = "files";
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const LAST_USED: &str = "last-used";

/// One artifact's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ArtifactDir(pub(crate) RootedPath);

impl ArtifactDir {
    pub(crate) fn path(&self) -> &RootedPath {
        &self.0
    }

    /// Whether it and the folder above it are folders. Links that somebody planted lead to what is not ours to change.
    pub(crate) fn is_ours(&self) -> crate::error::Result<bool> {
        let above = self.0.parent().map_or(Ok(false), |above| super::files::is_folder(&above))?;
        Ok(above && super::files::is_folder(&self.0)?)
    }

    /// The same text as [`ArtifactKey::hash`].
    pub(super) fn hash(&self) -> String {
        let above = self.0.parent();
        ArtifactKey::hash_of_folders(above.as_ref().map_or("", RootedPath::name), self.0.name())
    }

    pub(crate) fn manifest(&self) -> RootedPath {
        self.0.join(MANIFEST)
    }

    pub(crate) fn last_used(&self) -> RootedPath {
        self.0.join(LAST_USED)
    }

    pub(crate) fn pin(&self) -> RootedPath {
        self.0.join("pin")
    }

    pub(crate) fn files(&self) -> RootedPath {
        self.0.join(FILES)
    }

    pub(crate) fn view(&self, path: &FilePath) -> RootedPath {
        self.files().join(path.as_str())
    }
}

/// The name of a file in staging: its digest where one is known, so that equal files are staged once; else git's
/// identity; else a hash of the path.
pub(crate) fn staged_name(path: &FilePath, entry: &FileEntry) -> String {
    match (entry.sha256, entry.git_oid) {
        (Some(digest), _) => format!("sha256-{digest}"),
        (None, Some(oid)) => format!("git-{oid}"),
        (None, None) => format!("path-{}", Digest::of(path.as_str().as_bytes())),
    }
}
