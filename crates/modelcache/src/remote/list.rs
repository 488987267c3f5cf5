//! Listing of the published artifacts, found by their manifests below the remote's prefix.
//!
//! Only the keys of manifests and refs are kept in memory, and the names of the folders that contain none. An artifact
//! that is evicted during the listing is skipped. A damaged manifest is skipped with a warning.

use super::refs::{self, RemoteRef};
use super::store::Store;
use super::{Folder, MANIFEST, Remote};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, ArtifactName, OWN_FOLDER, Version};
use crate::manifest::Manifest;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use std::collections::{BTreeMap, BTreeSet};

/// Concurrent reads of manifests.
const READS_IN_FLIGHT: usize = 16;
/// Maximum number of folders of other tools to remember.
const FOLDERS_MAX: usize = 1000;

/// Returns the key of every artifact that has a manifest, valid or damaged, ordered by name and version.
pub(super) async fn keys(remote: &Remote) -> Result<Vec<ArtifactKey>> {
    let store = remote.store().await?;
    Ok(keys_among(store, &record_objects(store, &mut RemoteListing::default()).await?))
}

/// What a listing of the remote found.
#[derive(Debug, Default)]
pub(crate) struct RemoteListing {
    /// The manifest of every published artifact, ordered by name and version.
    pub(crate) manifests: Vec<Manifest>,
    pub(crate) tags: Vec<(ArtifactName, RemoteRef)>,
    /// The number of artifacts that were published under a longer prefix than the configured one, keyed by the part
    /// that the configured prefix lacks.
    pub(crate) longer_prefixes: BTreeMap<String, usize>,
    /// The folders, directly below the prefix, in which other tools put objects.
    pub(crate) unmanaged_folders: BTreeSet<String>,
}

/// Returns the manifest of every published artifact; see [`Remote::list`].
pub(super) async fn list(remote: &Remote) -> Result<Vec<Manifest>> {
    let store = remote.store().await?;
    let mut listing = RemoteListing::default();
    read_manifests(store, &record_objects(store, &mut listing).await?, &mut listing).await?;
    Ok(listing.manifests)
}

/// Returns manifests, tags and what else is there, from one listing of the store.
pub(super) async fn list_with_tags(remote: &Remote) -> Result<RemoteListing> {
    let store = remote.store().await?;
    let mut listing = RemoteListing::default();
    let objects = record_objects(store, &mut listing).await?;
    read_manifests(store, &objects, &mut listing).await?;
    listing.tags = refs::tags_among(store, &objects).await?;
    // Objects of an artifact do not tell whether modelcache put them: the manifest does.
    for key in keys_among(store, &objects) {
        let folder = key.name.as_str().split('/').next().unwrap_or_default();
        listing.unmanaged_folders.remove(folder);
    }
    Ok(listing)
}

/// Lists the objects that are manifests or refs. Adds the folders of all other objects to `listing`.
async fn record_objects(store: &Store, listing: &mut RemoteListing) -> Result<Vec<ObjectMeta>> {
    let is_record = |path: &str| key_of(path).is_some() || refs::is_ref(path);
    let folders = &mut listing.unmanaged_folders;
    let wanted = |meta: &ObjectMeta| {
        let Some(path) = store.relative(&meta.location) else { return false };
        let folder = path.split_once('/').map_or("", |(folder, _)| folder);
        // A listing needs bounded memory, however many folders there are.
        if folders.len() < FOLDERS_MAX && !folder.is_empty() && !path.contains(OWN_FOLDER) && !folders.contains(folder)
        {
            folders.insert(folder.to_owned());
        }
        is_record(path)
    };
    store.list_matching(store.root().as_ref(), wanted).await?.ok_or_else(|| {
        Error::new(ErrorKind::Unauthorized, "listing the remote is not permitted")
            .hint("grant s3:ListBucket on the bucket")
    })
}

/// Returns the keys of the artifacts whose manifests are among `objects`, ordered by name and version.
fn keys_among(store: &Store, objects: &[ObjectMeta]) -> Vec<ArtifactKey> {
    let mut keys: Vec<_> = objects.iter().filter_map(|meta| key_of(store.relative(&meta.location)?)).collect();
    keys.sort();
    keys
}

/// Reads the manifests among `objects` into `listing`.
async fn read_manifests(store: &Store, objects: &[ObjectMeta], listing: &mut RemoteListing) -> Result<()> {
    let keys = keys_among(store, objects);
    let reads: Vec<_> = keys.iter().map(|key| read_listed(store, key)).collect();
    let read: Vec<Option<Manifest>> = futures::stream::iter(reads).buffered(READS_IN_FLIGHT).try_collect().await?;
    for (key, manifest) in keys.iter().zip(read).filter_map(|(key, manifest)| Some((key, manifest?))) {
        if manifest.key == *key {
            listing.manifests.push(manifest);
        } else if let Some(prefix) = missing_prefix(key, &manifest.key) {
            *listing.longer_prefixes.entry(prefix).or_default() += 1;
        } else {
            warn_skipped(key, &super::foreign_manifest(&manifest.key));
        }
    }
    listing.manifests.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(())
}

/// Returns the part of the path of `found` that precedes the path of `published`, or `None` if the first path does not
/// end in the second. `found` is the key that the path of a manifest states, `published` the key inside that manifest.
fn missing_prefix(found: &ArtifactKey, published: &ArtifactKey) -> Option<String> {
    let path = |key: &ArtifactKey| format!("{}/{}", key.name, key.version);
    path(found).strip_suffix(&path(published))?.strip_suffix('/').map(str::to_owned)
}

/// Returns the artifact of the manifest at `path`, or `None` if `path` is not the key of a manifest.
fn key_of(path: &str) -> Option<ArtifactKey> {
    let base = path.strip_suffix(MANIFEST)?.strip_suffix('/')?.strip_suffix(OWN_FOLDER)?.strip_suffix('/')?;
    let (name, version) = base.rsplit_once('/')?;
    Some(ArtifactKey::new(name.parse::<ArtifactName>().ok()?, Version::new(version).ok()?))
}

/// Reads one manifest. Returns `None` if it was evicted since the listing, is damaged, or is in a newer format.
async fn read_listed(store: &Store, key: &ArtifactKey) -> Result<Option<Manifest>> {
    match Folder::new(key).read_any_manifest(store).await {
        Ok(read) => Ok(read.map(|(manifest, _)| manifest)),
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid) => {
            warn_skipped(key, &error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Logs that the listing skips an artifact.
fn warn_skipped(key: &ArtifactKey, error: &Error) {
    tracing::warn!(artifact = %key, %error, "cannot read a manifest on the remote; skipping the artifact in the listing");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_that_the_address_lacks_is_found() {
        let key = |text| ArtifactKey::bare(text).expect("key");
        let missing = |found, published| missing_prefix(&key(found), &key(published));
        assert_eq!(missing("mc/e@2", "e@2").as_deref(), Some("mc"));
        assert_eq!(missing("a/mc/team/e@2", "team/e@2").as_deref(), Some("a/mc"));
        assert_eq!(missing("mce@2", "e@2"), None);
        assert_eq!(missing("e@3", "e@2"), None);
    }

    #[test]
    fn an_artifact_is_recognized_by_the_key_of_its_manifest_only() {
        let key = |path| key_of(path).map(|key| key.to_string());
        assert_eq!(key("a/b/1/.modelcache/manifest.json").as_deref(), Some("a/b@1"));
        assert_eq!(key("hf/o/m/c/.modelcache/manifest.json").as_deref(), Some("hf://o/m@c"));
        for odd in [
            "a/.modelcache/manifest.json",
            "a/1/manifest.json",
            "a/1/.modelcache/claim",
            ".modelcache/manifest.json",
            "a/1/.modelcache/x/.modelcache/manifest.json",
        ] {
            assert_eq!(key(odd), None, "{odd}");
        }
    }
}
