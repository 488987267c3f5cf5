//! Evicting: the manifest first, then exactly the objects it names, all under the claim.
//!
//! Killed in between, the artifact is gone and the claim names what is left of it; the next publish or evict of the key
//! removes that.

use super::claim::{self, Claim, Listed};
use super::publish::{LOOKS_IN_FLIGHT, sidecar_of};
use super::store::Store;
use super::{Folder, Remote, orphaned_uploads, upload};
use crate::error::{ErrorKind, Result};
use crate::key::ArtifactKey;
use crate::manifest::Manifest;
use futures::{StreamExt, TryStreamExt};
use std::path::Path;
use std::sync::Arc;

/// The files that the remote holds, and the sidecars beside them.
pub(super) fn held(manifest: &Manifest) -> Listed {
    let held = manifest.files.iter().filter(|(_, entry)| entry.on_remote().is_some());
    let mut listed: Listed = held.map(|(path, entry)| (path.clone(), entry.sha256)).collect();
    let beside = manifest.files.iter().filter(|(_, entry)| entry.sidecar);
    listed.extend(beside.filter_map(|(path, _)| Some((sidecar_of(path).ok()?, None))));
    listed
}

fn held_bytes(manifest: &Manifest) -> u64 {
    manifest.files.values().filter_map(|entry| entry.on_remote()).map(|identity| identity.object_bytes).sum()
}

/// The manifest there. A damaged one names nothing, and is removed all the same.
async fn look(store: &Store, folder: &Folder) -> Result<Option<Manifest>> {
    match folder.read_manifest(store).await {
        Ok(read) => Ok(read.map(|(manifest, _)| manifest)),
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            tracing::warn!(artifact = %folder.key, %error, "evicting a damaged manifest; objects that it named stay on the remote");
            Ok(Some(Manifest::new(folder.key.clone(), crate::manifest::Shape::Tree)))
        }
        Err(error) => Err(error),
    }
}

pub(super) async fn evict(remote: &Remote, key: &ArtifactKey, dry_run: bool) -> Result<Option<u64>> {
    let store = remote.store().await?;
    let folder = Folder::new(key);
    let there = look(store, &folder).await?;
    if there.is_none() {
        remote.refuse_unmanaged(key).await?;
    }
    if dry_run {
        return Ok(there.as_ref().map(held_bytes));
    }
    let Some(there) = there else {
        let abandoned = claim::look(store, &folder).await?.is_some_and(|(record, _)| record.has_ended());
        if abandoned {
            under_claim(remote, store, &folder, Listed::new()).await?;
        }
        return Ok(None);
    };
    under_claim(remote, store, &folder, held(&there)).await
}

async fn under_claim(remote: &Remote, store: &Arc<Store>, folder: &Folder, listed: Listed) -> Result<Option<u64>> {
    let mut claim = Claim::take(remote, folder, listed).await?;
    orphaned_uploads::abort_abandoned(store, folder, &claim).await;
    let done = remove_all(store, folder, &mut claim).await;
    let closed = claim.close().await;
    let done = done?;
    if let Err(error) = closed {
        tracing::warn!(artifact = %folder.key, %error, "evicted, but the claim could not be removed; it will end by itself");
    }
    if let Some(root) = store.folder() {
        let (root, version) = (root.to_path_buf(), root.join(&folder.base));
        let _ = tokio::task::spawn_blocking(move || remove_empty(&version, &root)).await;
    }
    Ok(done)
}

async fn remove_all(store: &Arc<Store>, folder: &Folder, claim: &mut Claim) -> Result<Option<u64>> {
    let there = look(store, folder).await?;
    let mut listed = claim.inherited.clone();
    listed.extend(there.iter().flat_map(held));
    claim.touch();
    remove(store, folder, listed).await?;
    claim.settle();
    Ok(there.as_ref().map(held_bytes))
}

/// Removes the manifest, then `listed`.
pub(super) async fn remove(store: &Arc<Store>, folder: &Folder, listed: Listed) -> Result<()> {
    store.delete(&folder.manifest(store)?).await?;
    remove_objects(store, folder, &listed).await?;
    if let Some(staging) = store.file(&folder.own(store, "")?) {
        let _ = tokio::task::spawn_blocking(move || upload::sweep_unfinished(&staging)).await;
    }
    Ok(())
}

/// Removes objects of the version folder.
pub(super) async fn remove_objects(store: &Arc<Store>, folder: &Folder, listed: &Listed) -> Result<()> {
    let removals = listed.keys().map(|path| async move { store.delete(&folder.object(store, path)?).await });
    let removals: Vec<_> = removals.collect();
    futures::stream::iter(removals).buffer_unordered(LOOKS_IN_FLIGHT).try_collect().await
}

/// Removes the folders of a version that hold nothing any more, and those above it, but not the remote's own.
fn remove_empty(version: &Path, root: &Path) {
    fn below(folder: &Path) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                below(&entry.path());
            }
        }
        let _ = std::fs::remove_dir(folder);
    }
    below(version);
    for folder in version.ancestors().skip(1).take_while(|folder| *folder != root && folder.starts_with(root)) {
        if std::fs::remove_dir(folder).is_err() {
            break;
        }
    }
}
