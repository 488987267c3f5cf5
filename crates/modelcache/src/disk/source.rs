//! A local directory as a source for a fill: a lower directory, or the cache directory itself if its blobs cannot be
//! linked.
//!
//! Files are found by digest, so that blobs of other artifacts can be used as well. Their bytes are not trusted: the
//! download verifies them like those of a server. No lock is taken. A file that is evicted meanwhile stays readable
//! while it is open; later reads return `NotFound`.

use super::{Disk, RootedPath, fault, files};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, Manifest};
use crate::runtime::{blocking, chunks};
use crate::source::{Body, Source};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// The files of one artifact that a local directory has.
#[derive(Debug)]
pub(crate) struct DiskSource {
    manifest: Option<Manifest>,
    files: BTreeMap<FilePath, RootedPath>,
}

impl Disk {
    /// Returns a source for the files of `wanted` that are in this directory, as blobs or as views of `key`.
    pub(crate) fn source(&self, key: &ArtifactKey, wanted: &[(FilePath, FileEntry)]) -> Result<DiskSource> {
        let (dir, manifest) = (self.layout().artifact(key), self.manifest(key)?);
        let mut found = BTreeMap::new();
        for (path, entry) in wanted {
            let Some(digest) = entry.sha256 else { continue };
            let listed = manifest.as_ref().and_then(|manifest| manifest.files.get(path));
            let held = listed.filter(|listed| listed.held.is_some() && listed.sha256 == Some(digest));
            let view = held.map(|_| dir.view(path));
            // First choice: the blob, whose name is its digest. Second choice: the view, if its manifest entry has the
            // digest.
            for candidate in [Some(self.layout().blob(&digest)), view].into_iter().flatten() {
                let metadata = files::stat(&candidate)?.filter(|metadata| metadata.is_file());
                if metadata.is_some_and(|metadata| metadata.len() == entry.size) {
                    found.entry(path.clone()).or_insert(candidate);
                }
            }
        }
        Ok(DiskSource { manifest, files: found })
    }
}

impl DiskSource {
    pub(crate) fn holds(&self, path: &FilePath) -> bool {
        self.files.contains_key(path)
    }
}

#[async_trait]
impl Source for DiskSource {
    fn tier(&self) -> Tier {
        Tier::Disk
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        Ok(self.manifest.clone())
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let gone = || Error::not_found(format!("{path} is no longer on disk")).tier(Tier::Disk);
        let from = self.files.get(path).ok_or_else(gone)?.clone();
        let opened = from.clone();
        let file = blocking(move || files::absent(opened.open(false)).map_err(|cause| fault("open", &opened, cause)))
            .await?
            .ok_or_else(gone)?;
        let read = move |buffer: &mut [u8], at| match file.read_at(buffer, at) {
            // The file was truncated since its size was checked.
            Ok(0) => Err(Error::new(ErrorKind::Corrupt, format!("{from} ends early"))),
            read => read.map_err(|cause| fault("read", &from, cause)),
        };
        Ok(Body { start: range.start, stream: chunks(range, read) })
    }
}
