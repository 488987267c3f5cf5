//! Pending uploads: the files of an artifact that a remote still lacks, recorded in `backfill/<key hash>-<uid>`.
//!
//! A fill records the pending upload before it publishes, so that a crash in between loses no upload. The record may
//! therefore refer to an artifact that is not on disk yet. The record is removed when the remote has the files, or when
//! the artifact is evicted. It is replaced by rename, under the budget lock. The uploading process holds the lock
//! `<key hash>.backfill`. No process waits for this lock, and a process that leads a fill does not try it.
//!
//! An artifact that was put without a remote has such a record, too, under [`NO_REMOTE`]. An artifact with a record is
//! the only copy, unless its origin keeps old versions: it is not evicted to make room.
//!
//! Each user uploads only from their own records, and only files with the recorded digests. Otherwise one user of a
//! shared directory could publish to the remote with the credentials of another user.

use super::Disk;
use super::files;
use super::lock::FileLock;
use super::rooted::RootedPath;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::limits;
use crate::manifest::Manifest;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// Format number of the record. A record with a higher number is not changed.
const FORMAT: u32 = 1;

/// The address in the record of an artifact that was put while no remote was configured.
pub(crate) const NO_REMOTE: &str = "";

/// The files of one artifact that one remote still lacks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MissingFiles {
    /// The paths of the files.
    pub(crate) files: BTreeSet<FilePath>,
    /// The files among them whose objects on the remote must be overwritten, because a reader found wrong bytes in
    /// them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) rewrite: BTreeSet<FilePath>,
    /// The digests with which the fill verified the files. Other content is not uploaded.
    #[serde(default)]
    pub(crate) digests: BTreeMap<FilePath, Digest>,
}

impl MissingFiles {
    /// Returns those of the files that `manifest` lists as held, with the recorded digests.
    pub(crate) fn held_by(&self, manifest: &Manifest) -> BTreeSet<FilePath> {
        let is_held = |path: &&FilePath| {
            let entry = manifest.files.get(path).filter(|entry| entry.held.is_some());
            self.digests.get(path).is_some_and(|digest| entry.and_then(|entry| entry.sha256) == Some(*digest))
        };
        self.files.iter().filter(is_held).cloned().collect()
    }

    /// Returns a copy that contains only those of the files that are also in `files`.
    pub(crate) fn only(&self, files: &BTreeSet<FilePath>) -> Self {
        let mut subset = self.clone();
        subset.files.retain(|path| files.contains(path));
        subset.rewrite.retain(|path| files.contains(path));
        subset.digests.retain(|path, _| files.contains(path));
        subset
    }
}

/// The pending upload of one artifact to one remote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PendingUpload {
    pub(crate) key: ArtifactKey,
    /// The address of the remote, or [`NO_REMOTE`].
    pub(crate) remote: String,
    pub(crate) missing: MissingFiles,
}

/// The content of one record: what each remote lacks of one artifact.
#[derive(Debug, Serialize, Deserialize)]
#[serde(from = "StoredUploadFields")]
struct StoredUpload {
    format: u32,
    #[serde(flatten)]
    key: ArtifactKey,
    /// The missing files, keyed by the address of the remote.
    remotes: BTreeMap<String, MissingFiles>,
}

/// The form of [`StoredUpload`] for reading. With a flattened key, serde would buffer all other fields in memory.
#[derive(Deserialize)]
struct StoredUploadFields {
    format: u32,
    name: ArtifactName,
    version: Version,
    remotes: BTreeMap<String, MissingFiles>,
}

impl StoredUpload {
    /// Removes files of one remote.
    fn remove(&mut self, remote: &str, files: &BTreeSet<FilePath>) {
        if let Some(recorded) = self.remotes.get_mut(remote) {
            recorded.files.retain(|path| !files.contains(path));
            recorded.rewrite.retain(|path| !files.contains(path));
            recorded.digests.retain(|path, _| !files.contains(path));
        }
    }
}

impl From<StoredUploadFields> for StoredUpload {
    fn from(fields: StoredUploadFields) -> Self {
        let StoredUploadFields { format, name, version, remotes } = fields;
        Self { format, key: ArtifactKey::new(name, version), remotes }
    }
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Disk {
    /// Adds files that `remote` lacks to the pending upload of `key`. Durable on return.
    pub(crate) fn record_pending_upload(&self, key: &ArtifactKey, remote: &str, missing: &MissingFiles) -> Result<()> {
        self.ensure_writable()?;
        self.edit_pending_upload(key, |stored| {
            let recorded = stored.remotes.entry(remote.to_owned()).or_default();
            recorded.files.extend(missing.files.iter().cloned());
            recorded.rewrite.extend(missing.rewrite.iter().cloned());
            recorded.digests.extend(missing.digests.iter().map(|(path, digest)| (path.clone(), *digest)));
        })
    }

    /// Removes files from the pending upload of `key`, because `remote` has them, or because this disk cannot provide
    /// them.
    pub(crate) fn remove_from_pending_upload(
        &self,
        key: &ArtifactKey,
        remote: &str,
        files: &BTreeSet<FilePath>,
    ) -> Result<()> {
        self.edit_pending_upload(key, |stored| stored.remove(remote, files))
    }

    /// Removes files from the record of `key`, because `remote` has them now.
    pub(crate) fn record_uploaded(&self, key: &ArtifactKey, remote: &str, files: &BTreeSet<FilePath>) -> Result<()> {
        if read(&self.layout().pending_upload(&key.hash()))?.is_none() {
            return Ok(());
        }
        self.edit_pending_upload(key, |stored| {
            stored.remove(remote, files);
            stored.remove(NO_REMOTE, files);
        })
    }

    /// Makes the upload of an artifact that was put without a remote pending for `remote`. The record under
    /// [`NO_REMOTE`] stays until `remote` has the files, so that the artifact still counts as the only copy if the
    /// upload is dropped.
    pub(crate) fn request_upload(&self, key: &ArtifactKey, remote: &str) -> Result<()> {
        self.edit_pending_upload(key, |stored| {
            if let Some(missing) = stored.remotes.get(NO_REMOTE).cloned() {
                stored.remotes.insert(remote.to_owned(), missing);
            }
        })
    }

    /// Returns true if `key` is on this disk and no other tier is known to have it.
    pub(crate) fn is_only_copy(&self, key: &ArtifactKey) -> Result<bool> {
        let artifact = self.scan_one(&self.layout().artifact(key))?;
        artifact.map_or(Ok(false), |artifact| Ok(artifact.is_only_copy(&self.pending_hashes()?)))
    }

    /// Returns the key hashes of the artifacts with a record of any user.
    pub(crate) fn pending_hashes(&self) -> Result<HashSet<String>> {
        let hash = |path: RootedPath| path.name().split('-').next().map(str::to_owned);
        Ok(files::entries(&self.layout().pending_uploads())?.into_iter().filter_map(hash).collect())
    }

    /// Returns the files of `key` that `remote` lacks; `None` if no upload is pending.
    pub(crate) fn pending_upload(&self, key: &ArtifactKey, remote: &str) -> Result<Option<MissingFiles>> {
        let stored = read(&self.layout().pending_upload(&key.hash()))?;
        // The file name contains only a hash of the key, so compare the key itself.
        Ok(stored.filter(|stored| stored.key == *key).and_then(|mut stored| stored.remotes.remove(remote)))
    }

    /// Returns all pending uploads, sorted by key and remote.
    pub(crate) fn pending_uploads(&self) -> Result<Vec<PendingUpload>> {
        let mut pending_uploads = Vec::new();
        for path in files::entries(&self.layout().pending_uploads())? {
            // If one record cannot be read, return the others.
            let stored = match read(&path) {
                Ok(stored) => stored,
                Err(error) => {
                    tracing::debug!(%error, "a pending upload cannot be read; it is skipped");
                    continue;
                }
            };
            let Some(StoredUpload { key, remotes, .. }) = stored else { continue };
            let of = |(remote, missing)| PendingUpload { key: key.clone(), remote, missing };
            pending_uploads.extend(remotes.into_iter().map(of));
        }
        pending_uploads.sort_by(|a, b| (&a.key, &a.remote).cmp(&(&b.key, &b.remote)));
        Ok(pending_uploads)
    }

    /// Takes the backfill lock, the right to upload `key`; `None` while another process holds it.
    pub(crate) fn try_backfill(&self, key: &ArtifactKey) -> Result<Option<FileLock>> {
        self.ensure_writable()?;
        FileLock::try_exclusive(&self.layout().backfill_lock(key))
    }

    /// Changes the record of `key` with `edit`, under the budget lock. Removes the record if no file is left in it.
    fn edit_pending_upload(&self, key: &ArtifactKey, edit: impl FnOnce(&mut StoredUpload)) -> Result<()> {
        let path = self.layout().pending_upload(&key.hash());
        // The budget lock makes processes change the record one after the other.
        let guard = self.lock_budget()?;
        let existing = read(&path)?.filter(|stored| stored.key == *key);
        let exists = existing.is_some();
        let mut stored =
            existing.unwrap_or_else(|| StoredUpload { format: FORMAT, key: key.clone(), remotes: BTreeMap::new() });
        edit(&mut stored);
        stored.remotes.retain(|_, missing| !missing.files.is_empty());
        if !stored.remotes.is_empty() {
            let encode = |cause| Error::new(ErrorKind::Other, "cannot encode a pending upload").cause(cause);
            // The record must be durable before the caller publishes, so that a later crash does not lose the upload.
            files::replace(&path, &serde_json::to_vec(&stored).map_err(encode)?, &self.layout().stagings())?;
        } else if exists {
            // Sync the removal as well. Otherwise the upload could be pending again after a power cut.
            files::remove_file(&path)?;
            files::sync_dir(&self.layout().pending_uploads())?;
        }
        guard.release()
    }

    /// Removes the pending uploads, of any user, of an artifact that is evicted and so can no longer be uploaded. The
    /// caller holds the budget lock.
    pub(super) fn remove_pending_upload(&self, hash: &str) -> Result<()> {
        for path in files::entries(&self.layout().pending_uploads())? {
            if !path.name().starts_with(hash) {
                continue;
            }
            let stored = read(&path).ok().flatten();
            // Nobody waits for an upload of an artifact that was put without a remote.
            if stored.as_ref().is_none_or(|stored| stored.remotes.keys().any(|remote| remote != NO_REMOTE)) {
                let key = stored.map(|stored| stored.key.to_string());
                tracing::warn!(
                    artifact = key.as_deref().unwrap_or(hash),
                    "the artifact is evicted before the remote has all its files; the pending upload is removed"
                );
            }
            files::unless_inaccessible(files::remove_file(&path), &path)?;
        }
        Ok(())
    }
}

/// Reads a record; `None` if it is missing, damaged, or of another user.
///
/// # Errors
/// `Directory` if a newer release wrote it.
fn read(path: &RootedPath) -> Result<Option<StoredUpload>> {
    let Some(bytes) = files::read_own(path, limits::MANIFEST_BYTES_MAX)? else { return Ok(None) };
    // Parse the format number first: the other fields of a newer format may have other types.
    if let Ok(FormatOnly { format }) = serde_json::from_slice(&bytes)
        && format > FORMAT
    {
        return Err(Error::new(ErrorKind::Directory, format!("{} has format {format}", path))
            .tier(Tier::Disk)
            .hint("update modelcache"));
    }
    match serde_json::from_slice(&bytes) {
        Ok(stored) => Ok(Some(stored)),
        Err(error) => {
            tracing::warn!(path = %path, %error, "the record of a pending upload is damaged and is ignored");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};

    fn disk(root: &std::path::Path) -> Disk {
        Disk::open(root, ByteBound::Bytes(1 << 30), ByteBound::Bytes(0), Sharing::Off).expect("opens")
    }

    fn missing(files: &[&str], rewrite: &[&str]) -> MissingFiles {
        let paths = |texts: &[&str]| texts.iter().map(|text| FilePath::new(text).expect("path")).collect();
        let digests =
            files.iter().map(|text| (FilePath::new(text).expect("path"), Digest::of(text.as_bytes()))).collect();
        MissingFiles { files: paths(files), rewrite: paths(rewrite), digests }
    }

    #[test]
    fn a_pending_upload_grows_and_shrinks_by_remote_and_is_removed_when_empty() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, key) = (disk(folder.path()), ArtifactKey::bare("team/a@1").expect("key"));
        disk.record_pending_upload(&key, "s3://one", &missing(&["a"], &["a"])).expect("records");
        disk.record_pending_upload(&key, "s3://one", &missing(&["b/c"], &[])).expect("records");
        disk.record_pending_upload(&key, "s3://two", &missing(&["a"], &[])).expect("records");
        assert_eq!(disk.pending_upload(&key, "s3://one").expect("reads"), Some(missing(&["a", "b/c"], &["a"])));
        assert_eq!(disk.pending_uploads().expect("lists").len(), 2);
        disk.remove_from_pending_upload(&key, "s3://one", &missing(&["a"], &[]).files).expect("removes");
        assert_eq!(disk.pending_upload(&key, "s3://one").expect("reads"), Some(missing(&["b/c"], &[])));
        disk.remove_from_pending_upload(&key, "s3://one", &missing(&["b/c"], &[]).files).expect("removes");
        assert_eq!(disk.pending_upload(&key, "s3://one").expect("reads"), None);
        disk.remove_from_pending_upload(&key, "s3://two", &missing(&["a"], &[]).files).expect("removes");
        assert_eq!(files::entries(&disk.layout().pending_uploads()).expect("lists"), []);
    }

    #[test]
    fn a_damaged_pending_upload_is_replaced_and_one_of_a_newer_release_is_not_changed() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, key) = (disk(folder.path()), ArtifactKey::bare("team/a@1").expect("key"));
        let path = disk.layout().pending_upload(&key.hash());
        std::fs::write(path.full(), "{").expect("writes");
        assert_eq!(disk.pending_uploads().expect("lists"), []);
        disk.record_pending_upload(&key, "s3://one", &missing(&["a"], &[])).expect("replaces");
        let newer = std::fs::read_to_string(path.full()).expect("reads").replace("\"format\":1", "\"format\":2");
        std::fs::write(path.full(), &newer).expect("writes");
        assert_eq!(disk.pending_uploads().expect("lists"), []);
        disk.record_pending_upload(&key, "s3://one", &missing(&["b"], &[])).expect_err("a newer release wrote it");
        assert_eq!(std::fs::read_to_string(path.full()).expect("reads"), newer);
    }

    #[test]
    fn only_one_process_holds_the_backfill_lock() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, key) = (disk(folder.path()), ArtifactKey::bare("team/a@1").expect("key"));
        let held = disk.try_backfill(&key).expect("tries").expect("free");
        assert!(disk.try_backfill(&key).expect("tries").is_none());
        drop(held);
        assert!(disk.try_backfill(&key).expect("tries").is_some());
    }
}
