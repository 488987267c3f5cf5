//! Orphaned multipart uploads: uploads of killed writers. They are invisible and cost storage until they are aborted.
//!
//! A writer that takes over a claim aborts the uploads listed there, and all others in the version folder, because only
//! the holder of the claim may write there. A periodic sweep aborts uploads that no claim lists: old ones in a version
//! folder of ours without a valid claim. Uploads of other tools elsewhere in the bucket are left alone.
//!
//! Listing uploads needs the permission `s3:ListBucketMultipartUploads`. Without it, or on a store that cannot list
//! uploads, only the uploads listed in claims are aborted.

use super::backend::UnfinishedUpload;
use super::claim::{self, Claim, Uploads};
use super::multipart::abort;
use super::publish::LOOKS_IN_FLIGHT;
use super::store::Store;
use super::{Folder, MANIFEST, Remote};
use crate::error::Result;
use crate::key::OWN_FOLDER;
use futures::StreamExt;
use object_store::path::Path;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Age from which an upload counts as orphaned. A younger one may be in progress.
const AGE_MIN: Duration = Duration::from_secs(24 * 3600);
/// Most version folders checked in one sweep.
const FOLDERS_MAX: usize = 64;

/// If an expired claim was taken over, aborts the uploads of its writer. Must run before the new writer creates its own
/// uploads, because all uploads in the version folder are aborted.
pub(super) async fn abort_abandoned(store: &Arc<Store>, folder: &Folder, claim: &Claim) {
    // Nothing to do unless a claim was taken over.
    let Some(named) = &claim.abandoned_uploads else { return };
    if store.backend().uploads().is_none() {
        return;
    }
    let mut left = match named_keys(store, folder, named) {
        Ok(keys) => keys,
        Err(error) => return tracing::debug!(%error, "cannot abort the uploads listed in a claim"),
    };
    // Uploads created shortly before the writer died may be missing in its claim.
    if let Ok(base) = store.key(&folder.base) {
        let found = list(store, &format!("{base}/")).await;
        left.extend(found.into_iter().filter_map(|upload| Some((upload.id, Path::parse(upload.key).ok()?))));
    }
    abort_all(store, left).await;
}

/// Aborts the uploads listed in a claim. Returns true if the store confirmed that all of them are gone.
pub(super) async fn abort_noted(store: &Arc<Store>, folder: &Folder, named: &Uploads) -> bool {
    match named_keys(store, folder, named) {
        Ok(keys) => {
            let count = keys.len();
            abort_all(store, keys).await == count
        }
        Err(_) => false,
    }
}

/// Returns the object key of each upload.
fn named_keys(store: &Store, folder: &Folder, named: &Uploads) -> Result<BTreeMap<String, Path>> {
    named.iter().map(|(id, path)| Ok((id.clone(), folder.object(store, path)?))).collect()
}

/// Aborts uploads concurrently. Returns the number of those that are gone.
async fn abort_all(store: &Arc<Store>, uploads: BTreeMap<String, Path>) -> usize {
    let aborts = uploads.into_iter().map(|(id, key)| async move { abort(store, &key, &id).await });
    let aborts: Vec<_> = aborts.collect();
    let done: Vec<bool> = futures::stream::iter(aborts).buffer_unordered(LOOKS_IN_FLIGHT).collect().await;
    done.into_iter().filter(|done| *done).count()
}

/// Aborts old uploads in version folders without a valid claim. Returns their number.
pub(super) async fn sweep(remote: &Remote) -> Result<usize> {
    let store = remote.store().await?;
    let root = store.root().map(|root| format!("{root}/")).unwrap_or_default();
    // An upload without a readable time is kept.
    let is_old = |upload: &UnfinishedUpload| {
        let age = upload.begun_at.and_then(|begun_at| SystemTime::now().duration_since(begun_at).ok());
        age.is_some_and(|age| age > AGE_MIN)
    };
    let old: Vec<_> = list(store, &root).await.into_iter().filter(is_old).collect();
    let (mut known, mut swept) = (BTreeMap::new(), BTreeMap::new());
    for upload in old {
        let Ok(key) = Path::parse(&upload.key) else { continue };
        if is_idle_version(store, &key, &mut known).await? {
            swept.insert(upload.id, key);
        }
    }
    Ok(abort_all(store, swept).await)
}

/// Returns true if `key` is in a version folder of ours without a valid claim. `known` caches by folder whether it is a
/// version folder.
async fn is_idle_version(store: &Store, key: &Path, known: &mut BTreeMap<String, bool>) -> Result<bool> {
    let Some(relative) = store.relative(key) else { return Ok(false) };
    // Try every folder above the key. A version folder has at least two levels: name and version.
    for (end, _) in relative.match_indices('/').skip(1) {
        let base = &relative[..end];
        let found = match known.get(base) {
            Some(found) => *found,
            // Bounds the number of requests in one sweep.
            None if known.len() >= FOLDERS_MAX => return Ok(false),
            None => {
                let record = claim::read_at(store, &store.key(&format!("{base}/{OWN_FOLDER}/claim"))?).await?;
                let found = match record {
                    // A writer is at work: the upload may be in progress.
                    Some((record, _)) if !record.has_expired() => return Ok(false),
                    // An expired claim or a manifest shows that the folder is ours.
                    Some(_) => true,
                    None => store.head(&store.key(&format!("{base}/{OWN_FOLDER}/{MANIFEST}"))?).await?.is_some(),
                };
                known.insert(base.to_owned(), found);
                found
            }
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the unfinished uploads to keys with this `prefix`, or none if they cannot be listed.
async fn list(store: &Store, prefix: &str) -> Vec<UnfinishedUpload> {
    match store.backend().uploads() {
        Some(uploads) => uploads.list(prefix).await,
        None => Vec::new(),
    }
}
