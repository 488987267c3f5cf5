//! Listing of the published artifacts, found by their manifests below the remote's prefix.
//!
//! Only the keys of manifests and refs are kept in memory. An artifact that is evicted during the listing is skipped. A
//! damaged manifest is skipped with a warning.

use super::refs::{self, RemoteRef};
use super::store::Store;
use super::{Folder, MANIFEST, Remote};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, ArtifactName, OWN_FOLDER, Version};
use crate::manifest::Manifest;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;

/// Concurrent reads of manifests.
const READS_IN_FLIGHT: usize = 16;

/// Returns the key of every artifact that has a manifest, valid or damaged, ordered by name and version.
pub(super) async fn keys(remote: &Remote) -> Result<Vec<ArtifactKey>> {
    let store = remote.store().await?;
    Ok(keys_among(store, &record_objects(store).await?))
}

/// Returns the manifest of every published artifact; see [`Remote::list`].
pub(super) async fn list(remote: &Remote) -> Result<Vec<Manifest>> {
    let store = remote.store().await?;
    manifests(store, &record_objects(store).await?).await
}

/// Returns manifests and tags from one listing of the store.
pub(super) async fn list_with_tags(remote: &Remote) -> Result<(Vec<Manifest>, Vec<(ArtifactName, RemoteRef)>)> {
    let store = remote.store().await?;
    let objects = record_objects(store).await?;
    Ok((manifests(store, &objects).await?, refs::tags_among(store, &objects).await?))
}

/// Lists the objects that are manifests or refs.
async fn record_objects(store: &Store) -> Result<Vec<ObjectMeta>> {
    let is_record = |path: &str| key_of(path).is_some() || refs::is_ref(path);
    let wanted = |meta: &ObjectMeta| store.relative(&meta.location).is_some_and(is_record);
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

/// Reads the manifests among `objects`, ordered by name and version.
async fn manifests(store: &Store, objects: &[ObjectMeta]) -> Result<Vec<Manifest>> {
    let keys = keys_among(store, objects);
    let reads: Vec<_> = keys.iter().map(|key| read_listed(store, key)).collect();
    let read: Vec<Option<Manifest>> = futures::stream::iter(reads).buffered(READS_IN_FLIGHT).try_collect().await?;
    let mut manifests: Vec<Manifest> = read.into_iter().flatten().collect();
    manifests.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(manifests)
}

/// Returns the artifact of the manifest at `path`, or `None` if `path` is not the key of a manifest.
fn key_of(path: &str) -> Option<ArtifactKey> {
    let base = path.strip_suffix(MANIFEST)?.strip_suffix('/')?.strip_suffix(OWN_FOLDER)?.strip_suffix('/')?;
    let (name, version) = base.rsplit_once('/')?;
    Some(ArtifactKey::new(name.parse::<ArtifactName>().ok()?, Version::new(version).ok()?))
}

/// Reads one manifest. Returns `None` if it was evicted since the listing, is damaged, or is in a newer format.
async fn read_listed(store: &Store, key: &ArtifactKey) -> Result<Option<Manifest>> {
    match Folder::new(key).read_manifest(store).await {
        Ok(read) => Ok(read.map(|(manifest, _)| manifest)),
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid) => {
            tracing::warn!(artifact = %key, %error, "cannot read a manifest on the remote; skipping the artifact in the listing");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
