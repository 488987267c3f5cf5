//! Twins: equal files that other versions of the same name have on the remote already.
//!
//! They are found by SHA-256 in the manifests of a few versions, the newest first, and copied there by the server, so
//! that nothing of them is sent. A copy has the bytes that the other version's manifest claims, no more: whoever reads
//! checks. Whatever fails here, or cannot be asked, costs an upload and no more.

use super::publish::{LOOKS_IN_FLIGHT, same_object};
use super::store::Store;
use super::{Folder, copy};
use crate::digest::Digest;
use crate::error::Result;
use crate::key::{ArtifactKey, FilePath, Version};
use crate::manifest::{FileEntry, Manifest, ObjectIdentity};
use futures::StreamExt;
use object_store::path::Path;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Smaller files are sent: that costs no more than to ask.
pub(super) const BYTES_MIN: u64 = 64 * 1024;
/// Versions whose age is asked for.
const VERSIONS_MAX: usize = 64;
/// Manifests that are read.
const MANIFESTS_MAX: usize = 8;

/// An object of another version with the bytes wanted.
#[derive(Debug, Clone)]
pub(super) struct DedupSource {
    object: Path,
    recorded: ObjectIdentity,
}

/// The twins of files with these digests and sizes, as far as there are any.
pub(super) async fn find(
    store: &Arc<Store>,
    folder: &Folder,
    wanted: &[(Digest, u64)],
) -> BTreeMap<Digest, DedupSource> {
    let mut dedup_sources = BTreeMap::new();
    let versions = match newest(store, folder).await {
        Ok(versions) => versions,
        Err(error) => {
            tracing::debug!(%error, "other versions on the remote are not looked at");
            return dedup_sources;
        }
    };
    for version in versions.into_iter().take(MANIFESTS_MAX) {
        let other = Folder::new(&ArtifactKey::new(folder.key.name.clone(), version));
        match other.read_manifest(store).await {
            Ok(Some((manifest, _))) => learn(store, &other, &manifest, wanted, &mut dedup_sources),
            Ok(None) => {}
            Err(error) => tracing::debug!(artifact = %other.key, %error, "not looked at for equal files"),
        }
        if dedup_sources.len() == wanted.len() {
            break;
        }
    }
    dedup_sources
}

/// Files that other versions have and that could be twins, as far as their manifests tell.
pub(super) async fn possible(store: &Arc<Store>, folder: &Folder) -> Vec<FileEntry> {
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

fn learn(
    store: &Store,
    other: &Folder,
    manifest: &Manifest,
    wanted: &[(Digest, u64)],
    dedup_sources: &mut BTreeMap<Digest, DedupSource>,
) {
    for (path, entry) in &manifest.files {
        if let (Some(digest), Some(recorded)) = (entry.sha256, entry.on_remote())
            && wanted.contains(&(digest, entry.size))
            && recorded.object_bytes == entry.size
            && let Ok(object) = other.object(store, path)
        {
            dedup_sources.entry(digest).or_insert_with(|| DedupSource { object, recorded: recorded.clone() });
        }
    }
}

/// Other published versions of the name, the last written first.
async fn newest(store: &Arc<Store>, folder: &Folder) -> Result<Vec<Version>> {
    let names = store.folders(&store.key(folder.key.name.as_str())?).await?;
    let mut versions: Vec<Version> = names.iter().filter_map(|name| Version::new(name).ok()).collect();
    versions.retain(|version| *version != folder.key.version);
    // Where there are very many, numbers tell the newer ones without a question.
    versions.sort_by_key(|version| std::cmp::Reverse(natural(version.as_str())));
    versions.truncate(VERSIONS_MAX);
    let looks = versions.into_iter().map(|version| async move {
        let other = Folder::new(&ArtifactKey::new(folder.key.name.clone(), version.clone()));
        let written = store.written_at_ms(&other.manifest(store)?).await?;
        Ok(written.map(|written| (written, version)))
    });
    let looks: Vec<_> = looks.collect();
    let looked: Vec<Result<Option<(i64, Version)>>> =
        futures::stream::iter(looks).buffered(LOOKS_IN_FLIGHT).collect().await;
    let mut dated: Vec<(i64, Version)> = looked.into_iter().filter_map(|look| look.ok().flatten()).collect();
    dated.sort_by_key(|(written, _)| std::cmp::Reverse(*written));
    Ok(dated.into_iter().map(|(_, version)| version).collect())
}

/// Orders `v9` before `v10`: digits by their number, the rest by character.
fn natural(text: &str) -> Vec<(u64, String)> {
    let mut parts: Vec<(u64, String)> = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let words = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let digits = rest[words..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |end| words + end);
        parts.push((rest[words..digits].parse().unwrap_or(0), rest[..words].to_owned()));
        rest = &rest[digits..];
    }
    parts
}

/// Lets the server copy `twin` to `target`; `None` where it has to be sent.
pub(super) async fn copied(
    store: &Arc<Store>,
    dedup_source: &DedupSource,
    path: &FilePath,
    target: &Path,
    staging: Option<PathBuf>,
) -> Option<ObjectIdentity> {
    let copy = async {
        match store.head(&dedup_source.object).await? {
            Some(now) if same_object(&dedup_source.recorded, &now) => {}
            _ => return Ok(None),
        }
        copy::copy(store, &dedup_source.object, &dedup_source.recorded, target, staging).await
    };
    match copy.await {
        Ok(copied) => copied,
        Err(error) => {
            tracing::debug!(%path, from = %dedup_source.object, %error, "not copied on the remote; it is sent");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_order_versions() {
        let mut versions = ["10", "9", "v2", "v10", "2024-01-02", "2024-01-10", "main"];
        versions.sort_by_key(|version| natural(version));
        let at = |version| versions.iter().position(|other| *other == version);
        assert!(at("9") < at("10") && at("v2") < at("v10") && at("2024-01-02") < at("2024-01-10"), "{versions:?}");
    }
}
