//! Orphaned multipart uploads: uploads of killed writers. They are invisible and cost storage until they are aborted.
//!
//! A writer that takes over a claim aborts the uploads that the claim lists. It also aborts all others in the version
//! folder, because only the holder of the claim may write to this folder. The sweep, which runs after a backfill,
//! aborts uploads that no claim lists: those that are older than a day and lie in a version folder without a valid
//! claim. Uploads of other tools elsewhere in the bucket are not touched.
//!
//! Listing uploads needs the permission `s3:ListBucketMultipartUploads`. Without it, or on a store that cannot list
//! uploads, only the uploads listed in claims are aborted.

use super::backend::UnfinishedUpload;
use super::claim::{self, Claim, Uploads};
use super::multipart::abort;
use super::publish::SMALL_REQUESTS_IN_FLIGHT;
use super::store::Store;
use super::{CLAIM, Folder, MANIFEST, Remote};
use crate::error::Result;
use crate::key::OWN_FOLDER;
use futures::StreamExt;
use object_store::path::Path;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Age above which an upload counts as orphaned. A younger one may be in progress.
const AGE_MIN: Duration = Duration::from_secs(24 * 3600);
/// Most folders that one sweep checks for a claim or a manifest.
const FOLDERS_MAX: usize = 64;

/// If an expired claim was taken over, aborts the uploads of its writer. Must run before the new writer creates its own
/// uploads, because all uploads in the version folder are aborted.
pub(super) async fn abort_abandoned(store: &Arc<Store>, folder: &Folder, claim: &Claim) {
    let Some(listed) = &claim.abandoned_uploads else { return };
    if store.backend().uploads().is_none() {
        return;
    }
    let mut uploads_by_id = match object_keys(store, folder, listed) {
        Ok(keys) => keys,
        Err(error) => return tracing::debug!(%error, "cannot abort the uploads listed in a claim"),
    };
    // The claim may lack uploads that its writer created shortly before it died.
    if let Ok(base) = store.key(&folder.base) {
        let found = list(store, &format!("{base}/")).await;
        uploads_by_id.extend(found.into_iter().filter_map(|upload| Some((upload.id, Path::parse(upload.key).ok()?))));
    }
    abort_all(store, uploads_by_id).await;
}

/// Aborts the uploads listed in a claim. Returns true if the store confirmed that none of them exists any more.
pub(super) async fn abort_listed(store: &Arc<Store>, folder: &Folder, listed: &Uploads) -> bool {
    match object_keys(store, folder, listed) {
        Ok(keys) => {
            let count = keys.len();
            abort_all(store, keys).await == count
        }
        Err(_) => false,
    }
}

/// Returns the object key of each upload.
fn object_keys(store: &Store, folder: &Folder, listed: &Uploads) -> Result<BTreeMap<String, Path>> {
    listed.iter().map(|(id, path)| Ok((id.clone(), folder.object(store, path)?))).collect()
}

/// Aborts uploads concurrently. Returns how many of them no longer exist.
async fn abort_all(store: &Arc<Store>, uploads: BTreeMap<String, Path>) -> usize {
    let aborts = uploads.into_iter().map(|(id, key)| async move { abort(store, &key, &id).await });
    let aborts: Vec<_> = aborts.collect();
    let aborted: Vec<bool> = futures::stream::iter(aborts).buffer_unordered(SMALL_REQUESTS_IN_FLIGHT).collect().await;
    aborted.into_iter().filter(|aborted| *aborted).count()
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
    let (mut is_version_cache, mut swept) = (BTreeMap::new(), BTreeMap::new());
    for upload in old {
        let Ok(key) = Path::parse(&upload.key) else { continue };
        if is_idle_version(store, &key, &mut is_version_cache).await? {
            swept.insert(upload.id, key);
        }
    }
    Ok(abort_all(store, swept).await)
}

/// Returns true if `key` is in a version folder without a valid claim. `is_version_cache` remembers for each folder
/// that was checked whether it is a version folder.
async fn is_idle_version(store: &Store, key: &Path, is_version_cache: &mut BTreeMap<String, bool>) -> Result<bool> {
    let Some(relative) = store.relative(key) else { return Ok(false) };
    // Check every folder above the key. A version folder has at least two levels: name and version.
    for (end, _) in relative.match_indices('/').skip(1) {
        let base = &relative[..end];
        let is_version = match is_version_cache.get(base) {
            Some(is_version) => *is_version,
            // Bounds the number of requests in one sweep.
            None if is_version_cache.len() >= FOLDERS_MAX => return Ok(false),
            None => {
                let record = claim::read_at(store, &store.key(&format!("{base}/{OWN_FOLDER}/{CLAIM}"))?).await?;
                let is_version = match record {
                    // Another writer holds the claim: the upload may be in progress.
                    Some((record, _)) if !record.has_expired() => return Ok(false),
                    // An expired claim or a manifest shows that modelcache wrote the folder.
                    Some(_) => true,
                    None => store.head(&store.key(&format!("{base}/{OWN_FOLDER}/{MANIFEST}"))?).await?.is_some(),
                };
                is_version_cache.insert(base.to_owned(), is_version);
                is_version
            }
        };
        if is_version {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the unfinished uploads to keys with this `prefix`. Returns an empty list if they cannot be listed.
async fn list(store: &Store, prefix: &str) -> Vec<UnfinishedUpload> {
    match store.backend().uploads() {
        Some(uploads) => uploads.list(prefix).await,
        None => Vec::new(),
    }
}
