//! Where everything lies in the local directory. Names, and whether a folder is where its name says; nothing is changed.

use crate::digest::Digest;
use crate::key::{ArtifactKey, ArtifactName, FilePath, escape};
use crate::manifest::FileEntry;
use std::path::{Path, PathBuf};

/// The paths under one cache directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn format(&self) -> PathBuf {
        self.root.join("FORMAT")
    }

    pub(crate) fn cache_tag(&self) -> PathBuf {
        self.root.join("CACHEDIR.TAG")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.root.join("blobs").join(&hex[..2]).join(hex)
    }

    pub(crate) fn artifacts(&self) -> PathBuf {
        self.root.join("artifacts")
    }

    pub(crate) fn artifact(&self, key: &ArtifactKey) -> ArtifactDir {
        ArtifactDir(self.artifacts().join(escape(key.name.as_str())).join(escape(key.version.as_str())))
    }

    pub(crate) fn artifact_versions(&self, name: &ArtifactName) -> PathBuf {
        self.artifacts().join(escape(name.as_str()))
    }

    pub(crate) fn refs(&self) -> PathBuf {
        self.root.join("refs")
    }

    /// What was found out about files of lower directories.
    pub(crate) fn lower_records(&self) -> PathBuf {
        self.root.join("lower")
    }

    pub(crate) fn reference(&self, name: &ArtifactName, revision: &str) -> PathBuf {
        self.refs().join(escape(name.as_str())).join(escape(revision))
    }

    pub(crate) fn stagings(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(crate) fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// Who has still to make something durable: one locked file a process.
    pub(crate) fn unsynced(&self) -> PathBuf {
        self.root.join("unsynced")
    }

    /// What still has to reach a remote.
    pub(crate) fn intents(&self) -> PathBuf {
        self.root.join("backfill")
    }

    pub(crate) fn intent(&self, key_hash: &str) -> PathBuf {
        self.intents().join(key_hash)
    }

    /// Held by the one that uploads `key`.
    pub(crate) fn backfill_lock(&self, key: &ArtifactKey) -> PathBuf {
        self.locks().join(format!("{}.backfill", key.hash()))
    }

    pub(crate) fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    pub(crate) fn budget_lock(&self) -> PathBuf {
        self.locks().join("budget")
    }

    /// Which manifests were changed; what the budget record says of it counts.
    pub(crate) fn changes(&self) -> PathBuf {
        self.locks().join("changes")
    }

    /// Locked to find out whether locks exclude.
    pub(crate) fn probe_lock(&self) -> PathBuf {
        self.locks().join("probe")
    }

    /// The lock of the one that fills `key`; beyond generation 0, of the one that follows a leader who fell silent.
    pub(crate) fn fill_lock(&self, key: &ArtifactKey, generation: usize) -> PathBuf {
        let hash = key.hash();
        self.locks().join(if generation == 0 { format!("{hash}.fill") } else { format!("{hash}.fill-{generation}") })
    }

    /// Held by the one that checks what a writer of `artifact` left that died before it was durable.
    pub(crate) fn check_lock(&self, artifact: &ArtifactDir) -> PathBuf {
        self.locks().join(format!("{}.check", artifact.hash()))
    }

    pub(crate) fn lease(&self, artifact: &ArtifactDir) -> PathBuf {
        self.lease_of(&artifact.hash())
    }

    /// The same, by the artifact's hash.
    pub(crate) fn lease_of(&self, hash: &str) -> PathBuf {
        self.locks().join(format!("{hash}.lease"))
    }
}

/// One artifact's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ArtifactDir(pub(crate) PathBuf);

impl ArtifactDir {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Whether it and the folder above it are folders. Links that somebody planted lead to what is not ours to change.
    pub(crate) fn is_ours(&self) -> crate::error::Result<bool> {
        let above = self.0.parent().map_or(Ok(false), super::files::is_folder)?;
        Ok(above && super::files::is_folder(&self.0)?)
    }

    /// The same text as [`ArtifactKey::hash`].
    pub(super) fn hash(&self) -> String {
        let name_of =
            |path: Option<&Path>| path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        let version = name_of(Some(&self.0)).unwrap_or_default();
        ArtifactKey::hash_of_folders(&name_of(self.0.parent()).unwrap_or_default(), &version)
    }

    pub(crate) fn manifest(&self) -> PathBuf {
        self.0.join("manifest.json")
    }

    pub(crate) fn last_used(&self) -> PathBuf {
        self.0.join("last-used")
    }

    pub(crate) fn pin(&self) -> PathBuf {
        self.0.join("pin")
    }

    pub(crate) fn files(&self) -> PathBuf {
        self.0.join("files")
    }

    pub(crate) fn view(&self, path: &FilePath) -> PathBuf {
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
