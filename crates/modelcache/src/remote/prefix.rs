//! [`Source`] implementation for the objects below a prefix of any bucket, read as an artifact of an origin.
//!
//! The bucket needs no manifest and no checksums: the listing serves as the manifest. A single object is an artifact of
//! one file. An object that was replaced since the listing is detected by its ETag.

use super::backend::{Options, RemoteLocation};
use super::listed_reads::ListedReads;
use super::store::Store;
use crate::config::RemoteConfig;
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileEntry, Manifest, ObjectIdentity, Shape};
use crate::runtime::blocking;
use crate::source::{Body, Source};
use crate::transfer::Retry;
use async_trait::async_trait;
use futures::StreamExt as _;
use object_store::path::Path;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use tokio::sync::OnceCell;

/// The objects below `bucket/prefix`, as the artifact `key` from an origin.
pub(crate) struct PrefixSource {
    config: RemoteConfig,
    bucket: String,
    prefix: String,
    key: ArtifactKey,
    retry: Retry,
    found: OnceCell<Option<FoundObjects>>,
}

/// The opened bucket and its listing.
struct FoundObjects {
    store: Store,
    manifest: Manifest,
    objects: HashMap<FilePath, (Path, ObjectIdentity)>,
    reads: ListedReads,
}

/// Prints the address only, because the configuration may contain keys.
impl fmt::Debug for PrefixSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrefixSource(s3://{}/{})", self.bucket, self.prefix)
    }
}

impl PrefixSource {
    /// Returns the source without sending a request. `config` supplies options and environment; its address is ignored.
    pub(crate) fn new(config: RemoteConfig, bucket: &str, prefix: &str, key: ArtifactKey, retry: Retry) -> Self {
        let (bucket, prefix) = (bucket.to_owned(), prefix.trim_matches('/').to_owned());
        Self { config, bucket, prefix, key, retry, found: OnceCell::new() }
    }

    /// Returns the listing. The first call requests it.
    async fn found(&self) -> Result<Option<&FoundObjects>> {
        Ok(self.found.get_or_try_init(|| self.find()).await?.as_ref())
    }

    /// Opens the bucket and lists the prefix. Returns `None` if no object exists.
    async fn find(&self) -> Result<Option<FoundObjects>> {
        let location = RemoteLocation::Bucket { bucket: self.bucket.clone(), prefix: self.prefix.clone() };
        let options = Options::parse(&self.config)?;
        let (config, retry) = (self.config.clone(), self.retry.clone());
        let store = blocking(move || Store::open(&config, &location, &options, retry)).await?;
        let root = store.root();
        let listed = store.list(root.as_ref()).await?.ok_or_else(|| {
            Error::new(ErrorKind::Unauthorized, format!("listing the bucket {} is not permitted", self.bucket))
                .hint("grant s3:ListBucket on the bucket")
        })?;
        let mut rows = Vec::new();
        for object in listed {
            let Some(relative) = store.relative(&object.location) else { continue };
            let path = FilePath::new(relative).map_err(|error| {
                Error::corrupt(format!("the bucket {} has an object {relative:?}: {}", self.bucket, error.message()))
            })?;
            rows.push((
                path,
                object.location.clone(),
                ObjectIdentity { etag: object.e_tag, object_bytes: object.size },
            ));
        }
        // If no object is below the prefix, the prefix may be the key of a single object.
        let shape = if rows.is_empty() { Shape::File } else { Shape::Tree };
        if let (Shape::File, Some(object)) = (shape, root) {
            let Some(identity) = store.head(&object).await? else { return Ok(None) };
            rows.push((FilePath::new(object.filename().unwrap_or_default())?, object, identity));
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let mut manifest = Manifest::new(self.key.clone(), shape);
        let mut objects = HashMap::new();
        for (path, location, identity) in rows {
            manifest.files.insert(path.clone(), FileEntry::of(identity.object_bytes));
            objects.insert(path, (location, identity));
        }
        manifest.check()?;
        Ok(Some(FoundObjects { store, manifest, objects, reads: ListedReads::default() }))
    }

    /// Opens a byte range of a file.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let missing = || Error::not_found(format!("the bucket {} has no object for {path}", self.bucket));
        let found = self.found().await?.ok_or_else(missing)?;
        let (location, identity) = found.objects.get(path).ok_or_else(missing)?;
        if range.end < range.start || range.end > identity.object_bytes {
            return Err(Error::invalid(format!("{path} has no bytes {}..{}", range.start, range.end)));
        }
        // HTTP has no empty ranges.
        if range.is_empty() {
            return Ok(Body { start: range.start, stream: futures::stream::empty().boxed() });
        }
        let body = found.reads.read(&found.store, location, range, identity, false).await?;
        body.ok_or_else(|| {
            Error::unavailable(format!("{path} was replaced in the bucket while it was read")).transient(false)
        })
    }
}

#[async_trait]
impl Source for PrefixSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    fn store(&self) -> Option<String> {
        Some(format!("s3://{}", self.bucket))
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        let found = self.found().await.context(&self.key, Tier::Origin)?;
        Ok(found.map(|found| found.manifest.clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.open(path, range).await.context(&self.key, Tier::Origin)
    }
}
