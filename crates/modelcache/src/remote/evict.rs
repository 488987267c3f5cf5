//! Eviction of an artifact from the remote: the manifest first, then the objects that it lists, all under the claim.
//!
//! If the process is killed after the removal of the manifest, the artifact is absent and the claim lists the remaining
//! objects. The next publish or evict of the key removes them.

use super::claim::{self, Claim, ListedFiles};
use super::publish::{SMALL_REQUESTS_IN_FLIGHT, sidecar_of};
use super::store::Store;
use super::{Folder, Remote, orphaned_uploads};
use crate::error::{ErrorKind, Result};
use crate::key::ArtifactKey;
use crate::manifest::Manifest;
use futures::{StreamExt, TryStreamExt};
use std::sync::Arc;

/// Returns the files of `manifest` that are on the remote, and the checksum files beside them.
pub(super) fn objects_of(manifest: &Manifest) -> ListedFiles {
    let held = manifest.files.iter().filter(|(_, entry)| entry.on_remote().is_some());
    let mut listed: ListedFiles = held.map(|(path, entry)| (path.clone(), entry.sha256)).collect();
    let with_sidecar = manifest.files.iter().filter(|(_, entry)| entry.sidecar);
    listed.extend(with_sidecar.filter_map(|(path, _)| Some((sidecar_of(path).ok()?, None))));
    listed
}

/// Returns the size of all objects of `manifest`, in bytes.
fn object_bytes_of(manifest: &Manifest) -> u64 {
    manifest.files.values().filter_map(|entry| entry.on_remote()).map(|identity| identity.object_bytes).sum()
}

/// Reads the manifest. Returns an empty manifest in place of a damaged one, so that the artifact can be evicted.
async fn manifest_to_evict(store: &Store, folder: &Folder) -> Result<Option<Manifest>> {
    match folder.read_manifest(store).await {
        Ok(read) => Ok(read.map(|(manifest, _)| manifest)),
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            tracing::warn!(artifact = %folder.key, %error, "evicting a damaged manifest; the objects that it listed stay on the remote");
            Ok(Some(Manifest::new(folder.key.clone(), crate::manifest::Shape::Tree)))
        }
        Err(error) => Err(error),
    }
}

/// Evicts the artifact; see [`Remote::evict`].
pub(super) async fn evict(remote: &Remote, key: &ArtifactKey, dry_run: bool) -> Result<Option<u64>> {
    let store = remote.store().await?;
    let folder = Folder::new(key);
    let manifest = manifest_to_evict(store, &folder).await?;
    // Without a manifest, the folder may hold objects of another tool, which are not removed.
    if manifest.is_none() {
        remote.refuse_unmanaged(key).await?;
    }
    if dry_run {
        return Ok(manifest.as_ref().map(object_bytes_of));
    }
    let Some(manifest) = manifest else {
        // No manifest, but an expired claim: an earlier publish or evict was killed. Remove its leftovers.
        let has_leftovers = claim::read(store, &folder).await?.is_some_and(|(record, _)| record.has_expired());
        if has_leftovers {
            evict_under_claim(remote, store, &folder, ListedFiles::new()).await?;
        }
        return Ok(None);
    };
    evict_under_claim(remote, store, &folder, objects_of(&manifest)).await
}

/// Acquires the claim and removes the artifact. Returns the number of bytes removed, or `None` without a manifest.
async fn evict_under_claim(
    remote: &Remote,
    store: &Arc<Store>,
    folder: &Folder,
    listed: ListedFiles,
) -> Result<Option<u64>> {
    // Step 1: acquire the claim, which lists every object to remove from now on.
    let mut claim = Claim::acquire(remote, folder, listed).await?;
    // Step 2: if an expired claim was taken over, abort the multipart uploads of its writer.
    orphaned_uploads::abort_abandoned(store, folder, &claim).await;
    // Step 3: remove the manifest and the objects.
    let removed = remove_all(store, folder, &mut claim).await;
    // Step 4: release the claim, also after an error. It keeps its list if objects may remain.
    let released = claim.release().await;
    let removed = removed?;
    if let Err(error) = released {
        tracing::warn!(artifact = %folder.key, %error, "evicted, but the claim could not be removed; it expires by itself");
    }
    // Step 5: in a remote that is a folder, remove folders that are empty now.
    if let Ok(version_folder) = store.key(&folder.base) {
        store.backend().remove_empty_folders(&version_folder, usize::MAX).await;
    }
    Ok(removed)
}

/// Removes the artifact and the leftovers of an earlier writer. The caller holds the claim.
async fn remove_all(store: &Arc<Store>, folder: &Folder, claim: &mut Claim) -> Result<Option<u64>> {
    // Read the manifest again: another writer may have published before the claim was acquired.
    let manifest = manifest_to_evict(store, folder).await?;
    let mut listed = claim.taken_over_files.clone();
    listed.extend(manifest.iter().flat_map(objects_of));
    claim.keep_record_on_release();
    remove(store, folder, listed).await?;
    claim.remove_record_on_release();
    Ok(manifest.as_ref().map(object_bytes_of))
}

/// Removes the manifest, then the `listed` objects and the temporary files of killed writers.
pub(super) async fn remove(store: &Arc<Store>, folder: &Folder, listed: ListedFiles) -> Result<()> {
    // The manifest is the commit point: without it readers see no artifact, however many objects are left.
    store.delete(&folder.manifest(store)?).await?;
    remove_objects(store, folder, &listed).await?;
    store.backend().sweep_unfinished(&folder.record_key(store, "")?).await;
    Ok(())
}

/// Removes the `listed` objects of the version folder. Missing ones are ignored.
pub(super) async fn remove_objects(store: &Arc<Store>, folder: &Folder, listed: &ListedFiles) -> Result<()> {
    let removals = listed.keys().map(|path| async move { store.delete(&folder.object(store, path)?).await });
    let removals: Vec<_> = removals.collect();
    futures::stream::iter(removals).buffer_unordered(SMALL_REQUESTS_IN_FLIGHT).try_collect().await
}
