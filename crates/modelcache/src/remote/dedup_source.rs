//! Deduplication of uploads: files that another version of the same name already has on the remote are copied by the
//! server.
//!
//! Sources are found by SHA-256 in the manifests of the newest versions. The digest of the source object is not
//! verified before the copy; readers check digests. Every failure in this module falls back to an upload.

use super::Folder;
use super::backend::{CopyOutcome, CopyRequest};
use super::publish::{SMALL_REQUESTS_IN_FLIGHT, same_object};
use super::store::Store;
use crate::digest::Digest;
use crate::error::{Error, Result, Tier};
use crate::key::{ArtifactKey, FilePath, Version};
use crate::manifest::{FileEntry, Manifest, ObjectIdentity};
use futures::StreamExt;
use object_store::path::Path;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Smallest file that is deduplicated, in bytes. Uploading a smaller one takes no longer than finding a source.
pub(super) const BYTES_MIN: u64 = 64 * 1024;
/// Most versions that are ordered by publication time. Each takes one HEAD request.
const VERSIONS_MAX: usize = 64;
/// Most manifests that are read in one search for sources.
const MANIFESTS_MAX: usize = 8;

/// An object of another version to copy from, and its identity as recorded in that version's manifest.
#[derive(Debug, Clone)]
pub(super) struct DedupSource {
    object: Path,
    recorded: ObjectIdentity,
}

/// Returns sources for files with the `wanted` digests and sizes, keyed by digest. The map has no entry for a file
/// without a source.
pub(super) async fn find(
    store: &Arc<Store>,
    folder: &Folder,
    wanted: &[(Digest, u64)],
) -> BTreeMap<Digest, DedupSource> {
    let mut sources = BTreeMap::new();
    let versions = match newest(store, folder).await {
        Ok(versions) => versions,
        Err(error) => {
            tracing::debug!(%error, "cannot list other versions on the remote to deduplicate uploads");
            return sources;
        }
    };
    for version in versions.into_iter().take(MANIFESTS_MAX) {
        let other = Folder::new(&ArtifactKey::new(folder.key.name.clone(), version));
        match other.read_manifest(store).await {
            Ok(Some((manifest, _))) => collect_matches(store, &other, &manifest, wanted, &mut sources),
            Ok(None) => {}
            Err(error) => tracing::debug!(artifact = %other.key, %error, "manifest skipped in deduplication"),
        }
        // Every file has a source: no further manifest is needed.
        if sources.len() == wanted.len() {
            break;
        }
    }
    sources
}

/// Returns those files of the newest versions that the remote holds, as possible duplicates. Used before the digests of
/// the local files are known.
pub(super) async fn candidates(store: &Arc<Store>, folder: &Folder) -> Vec<FileEntry> {
    let mut entries = Vec::new();
    for version in newest(store, folder).await.unwrap_or_default().into_iter().take(MANIFESTS_MAX) {
        let other = Folder::new(&ArtifactKey::new(folder.key.name.clone(), version));
        if let Ok(Some((manifest, _))) = other.read_manifest(store).await {
            entries
                .extend(manifest.files.into_iter().map(|(_, entry)| entry).filter(|entry| entry.on_remote().is_some()));
        }
    }
    entries
}

/// Adds the objects of `manifest` that match a `wanted` digest and size to `sources`.
fn collect_matches(
    store: &Store,
    other: &Folder,
    manifest: &Manifest,
    wanted: &[(Digest, u64)],
    sources: &mut BTreeMap<Digest, DedupSource>,
) {
    for (path, entry) in &manifest.files {
        if let (Some(digest), Some(recorded)) = (entry.sha256, entry.on_remote())
            && wanted.contains(&(digest, entry.size))
            && recorded.object_bytes == entry.size
            && let Ok(object) = other.object(store, path)
        {
            sources.entry(digest).or_insert_with(|| DedupSource { object, recorded: recorded.clone() });
        }
    }
}

/// Returns the other published versions of the name, the latest publication first.
async fn newest(store: &Arc<Store>, folder: &Folder) -> Result<Vec<Version>> {
    let names = store.folder_names(&store.key(folder.key.name.as_str())?).await?;
    let mut versions: Vec<Version> = names.iter().filter_map(|name| Version::new(name).ok()).collect();
    versions.retain(|version| *version != folder.key.version);
    // Preselect by version number without a request for each version. Higher numbers are probably newer.
    versions.sort_by_key(|version| std::cmp::Reverse(natural_order(version.as_str())));
    versions.truncate(VERSIONS_MAX);
    // The manifest is written last, so its modification time is the time of publication.
    let requests = versions.into_iter().map(|version| async move {
        let other = Folder::new(&ArtifactKey::new(folder.key.name.clone(), version.clone()));
        let written = store.written_at_ms(&other.manifest(store)?).await?;
        Ok(written.map(|written| (written, version)))
    });
    let requests: Vec<_> = requests.collect();
    let results: Vec<Result<Option<(i64, Version)>>> =
        futures::stream::iter(requests).buffered(SMALL_REQUESTS_IN_FLIGHT).collect().await;
    let mut dated: Vec<(i64, Version)> = results.into_iter().filter_map(|result| result.ok().flatten()).collect();
    dated.sort_by_key(|(written, _)| std::cmp::Reverse(*written));
    Ok(dated.into_iter().map(|(_, version)| version).collect())
}

/// Returns a sort key in which `v9` comes before `v10`: a list of numbers, each with the text before it. The text
/// decides only between equal numbers.
fn natural_order(text: &str) -> Vec<(u64, String)> {
    let mut parts: Vec<(u64, String)> = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let text_end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let digits_end = rest[text_end..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |end| text_end + end);
        parts.push((rest[text_end..digits_end].parse().unwrap_or(0), rest[..text_end].to_owned()));
        rest = &rest[digits_end..];
    }
    parts
}

/// Lets the server copy `source` to `target`. Returns `None` if the copy failed and the file must be uploaded.
pub(super) async fn try_copy(
    store: &Arc<Store>,
    source: &DedupSource,
    path: &FilePath,
    target: &Path,
    staging: &Path,
) -> Option<ObjectIdentity> {
    let copy = async {
        // The source must still be the object that its manifest records.
        match store.head(&source.object).await? {
            Some(current) if same_object(&source.recorded, &current) => {}
            _ => return Ok(None),
        }
        let recorded = &source.recorded;
        let copy = CopyRequest { from: &source.object, recorded, to: target, staging };
        let CopyOutcome::Done(etag) = store.backend().copy(store, &copy).await? else { return Ok(None) };
        // Check the result: the target must have the size of the source and the ETag that the copy reported.
        match store.head(target).await? {
            Some(copied) if copied.object_bytes == recorded.object_bytes && (etag.is_none() || copied.etag == etag) => {
                Ok(Some(copied))
            }
            _ => Err(Error::unavailable(format!("the copy {target} differs from its source")).tier(Tier::Remote)),
        }
    };
    match copy.await {
        Ok(copied) => copied,
        Err(error) => {
            tracing::debug!(%path, from = %source.object, %error, "server-side copy failed; uploading the file");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_in_natural_order() {
        let mut versions = ["10", "9", "v2", "v10", "2024-01-02", "2024-01-10", "main"];
        versions.sort_by_key(|version| natural_order(version));
        let position = |version| versions.iter().position(|other| *other == version);
        assert!(position("9") < position("10") && position("v2") < position("v10"));
        assert!(position("2024-01-02") < position("2024-01-10"), "{versions:?}");
    }
}
