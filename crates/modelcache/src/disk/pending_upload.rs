//! Intents: what still has to reach a remote, in `backfill/<key hash>` until it has.
//!
//! An intent is written before the artifact it is about is published, so that a crash in between forgets nothing, and
//! it goes when the remote has the files, or when the artifact leaves this disk. Reading and writing one is a short
//! budget hold; whoever uploads holds `<key hash>.backfill` alone meanwhile, tried once and never while leading a fill.
//!
//! Surprise: an intent may be about an artifact that is not here yet, whose fill is about to publish it.

use super::Disk;
use super::files;
use super::lock::FileLock;
use super::rooted::RootedPath;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::limits;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The number of this format. One that is higher is left alone.
const FORMAT: u32 = 1;

/// What one remote still lacks of one artifact.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Missing {
    /// The files.
    pub(crate) files: BTreeSet<FilePath>,
    /// Those among them whose objects look sound and are not.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) rewrite: BTreeSet<FilePath>,
}

/// What still has to reach a remote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PendingUpload {
    pub(crate) key: ArtifactKey,
    /// The remote's address.
    pub(crate) remote: String,
    pub(crate) missing: Missing,
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(from = "Fields")]
struct Stored {
    format: u32,
    #[serde(flatten)]
    key: ArtifactKey,
    /// By the remote's address.
    remotes: BTreeMap<String, Missing>,
}

/// Its fields as they are read: a flattened key would have serde keep every other field in memory, too.
#[derive(Deserialize)]
struct Fields {
    format: u32,
    name: ArtifactName,
    version: Version,
    remotes: BTreeMap<String, Missing>,
}

impl From<Fields> for Stored {
    fn from(fields: Fields) -> Self {
        let Fields { format, name, version, remotes } = fields;
        Self { format, key: ArtifactKey::new(name, version), remotes }
    }
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Disk {
    /// Notes that `remote` lacks these files, beside what is noted already. Durable on return.
    pub(crate) fn record_pending_upload(&self, key: &ArtifactKey, remote: &str, missing: &Missing) -> Result<()> {
        self.ensure_writable()?;
        self.edit_pending_upload(key, |stored| {
            let noted = stored.remotes.entry(remote.to_owned()).or_default();
            noted.files.extend(missing.files.iter().cloned());
            noted.rewrite.extend(missing.rewrite.iter().cloned());
        })
    }

    /// Takes back that `remote` lacks these files: it has them, or never will.
    pub(crate) fn settle(&self, key: &ArtifactKey, remote: &str, files: &BTreeSet<FilePath>) -> Result<()> {
        self.edit_pending_upload(key, |stored| {
            if let Some(noted) = stored.remotes.get_mut(remote) {
                noted.files.retain(|path| !files.contains(path));
                noted.rewrite.retain(|path| !files.contains(path));
            }
        })
    }

    /// What `remote` lacks of `key`.
    pub(crate) fn pending_upload(&self, key: &ArtifactKey, remote: &str) -> Result<Option<Missing>> {
        let stored = read(&self.layout().pending_upload(&key.hash()))?;
        Ok(stored.filter(|stored| stored.key == *key).and_then(|mut stored| stored.remotes.remove(remote)))
    }

    /// Everything that still has to reach a remote, by key.
    pub(crate) fn pending_uploads(&self) -> Result<Vec<PendingUpload>> {
        let mut pending_uploads = Vec::new();
        for path in files::entries(&self.layout().pending_uploads())? {
            let stored = match read(&path) {
                Ok(stored) => stored,
                Err(error) => {
                    tracing::debug!(%error, "an intent is left alone");
                    continue;
                }
            };
            let Some(Stored { key, remotes, .. }) = stored else { continue };
            let of = |(remote, missing)| PendingUpload { key: key.clone(), remote, missing };
            pending_uploads.extend(remotes.into_iter().map(of));
        }
        pending_uploads.sort_by(|a, b| (&a.key, &a.remote).cmp(&(&b.key, &b.remote)));
        Ok(pending_uploads)
    }

    /// The right to upload `key`; `None` while another process is at it.
    pub(crate) fn try_backfill(&self, key: &ArtifactKey) -> Result<Option<FileLock>> {
        self.ensure_writable()?;
        FileLock::try_exclusive(&self.layout().backfill_lock(key))
    }

    fn edit_pending_upload(&self, key: &ArtifactKey, edit: impl FnOnce(&mut Stored)) -> Result<()> {
        let path = self.layout().pending_upload(&key.hash());
        let hold = self.hold_budget()?;
        let there = read(&path)?.filter(|stored| stored.key == *key);
        let is_there = there.is_some();
        let mut stored = there.unwrap_or_else(|| Stored { format: FORMAT, key: key.clone(), remotes: BTreeMap::new() });
        edit(&mut stored);
        stored.remotes.retain(|_, missing| !missing.files.is_empty());
        if !stored.remotes.is_empty() {
            let encode = |cause| Error::new(ErrorKind::Other, "cannot write an intent").cause(cause);
            files::replace(&path, &serde_json::to_vec(&stored).map_err(encode)?, &self.layout().stagings())?;
        } else if is_there {
            files::remove_file(&path)?;
            files::sync_dir(&self.layout().pending_uploads())?;
        }
        hold.release()
    }

    /// An artifact that left this disk cannot be uploaded any more. The caller holds the budget.
    pub(super) fn remove_pending_upload(&self, hash: &str) -> Result<()> {
        let path = self.layout().pending_upload(hash);
        if files::stat(&path)?.is_none() {
            return Ok(());
        }
        let key = read(&path).ok().flatten().map(|stored| stored.key.to_string());
        tracing::warn!(
            artifact = key.as_deref().unwrap_or(hash),
            "evicted before the remote had it; the remote will not get it from here"
        );
        files::remove_file(&path)
    }
}

/// The intent there. A damaged one says nothing.
fn read(path: &RootedPath) -> Result<Option<Stored>> {
    let Some(bytes) = files::read_small(path, limits::MANIFEST_BYTES_MAX)? else { return Ok(None) };
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
            tracing::warn!(path = %path, %error, "an intent to upload is damaged and ignored");
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

    fn missing(files: &[&str], rewrite: &[&str]) -> Missing {
        let paths = |texts: &[&str]| texts.iter().map(|text| FilePath::new(text).expect("path")).collect();
        Missing { files: paths(files), rewrite: paths(rewrite) }
    }

    #[test]
    fn an_intent_grows_shrinks_and_goes_by_remote() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, key) = (disk(folder.path()), ArtifactKey::bare("team/a@1").expect("key"));
        disk.record_pending_upload(&key, "s3://one", &missing(&["a"], &["a"])).expect("notes");
        disk.record_pending_upload(&key, "s3://one", &missing(&["b/c"], &[])).expect("notes");
        disk.record_pending_upload(&key, "s3://two", &missing(&["a"], &[])).expect("notes");
        assert_eq!(disk.pending_upload(&key, "s3://one").expect("reads"), Some(missing(&["a", "b/c"], &["a"])));
        assert_eq!(disk.pending_uploads().expect("lists").len(), 2);
        disk.settle(&key, "s3://one", &missing(&["a"], &[]).files).expect("settles");
        assert_eq!(disk.pending_upload(&key, "s3://one").expect("reads"), Some(missing(&["b/c"], &[])));
        disk.settle(&key, "s3://one", &missing(&["b/c"], &[]).files).expect("settles");
        assert_eq!(disk.pending_upload(&key, "s3://one").expect("reads"), None);
        disk.settle(&key, "s3://two", &missing(&["a"], &[]).files).expect("settles");
        assert_eq!(files::entries(&disk.layout().pending_uploads()).expect("lists"), []);
    }

    #[test]
    fn a_damaged_intent_is_none_and_a_newer_one_is_left_alone() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, key) = (disk(folder.path()), ArtifactKey::bare("team/a@1").expect("key"));
        let path = disk.layout().pending_upload(&key.hash());
        std::fs::write(path.full(), "{").expect("writes");
        assert_eq!(disk.pending_uploads().expect("lists"), []);
        disk.record_pending_upload(&key, "s3://one", &missing(&["a"], &[])).expect("written anew");
        let newer = std::fs::read_to_string(path.full()).expect("reads").replace("\"format\":1", "\"format\":2");
        std::fs::write(path.full(), &newer).expect("writes");
        assert_eq!(disk.pending_uploads().expect("lists"), []);
        disk.record_pending_upload(&key, "s3://one", &missing(&["b"], &[])).expect_err("not ours to change");
        assert_eq!(std::fs::read_to_string(path.full()).expect("reads"), newer);
    }

    #[test]
    fn one_uploads_at_a_time() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, key) = (disk(folder.path()), ArtifactKey::bare("team/a@1").expect("key"));
        let held = disk.try_backfill(&key).expect("tries").expect("free");
        assert!(disk.try_backfill(&key).expect("tries").is_none());
        drop(held);
        assert!(disk.try_backfill(&key).expect("tries").is_some());
    }
}
