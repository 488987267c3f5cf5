//! A place in a bucket as an origin: one object, or everything below a prefix.
//!
//! Resolving lists it; the version is a hash over keys, sizes and ETags, so it changes when anything there does. What
//! lies beside the files and states their digests is read when the manifest is asked for. A version that this program
//! published there is read by its manifest. Clients and credentials are those of an S3 remote; a bucket in another
//! region than the configured one is found by the region that its server tells.
//!
//! Surprise: a source is good for the version that it was made for only. Once the place holds other objects there is no
//! way back to the old ones, and the source says that they were replaced.

use super::Resolved;
use crate::config::{BucketConfig, RemoteConfig};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath, Version};
use crate::manifest::Manifest;
use crate::reference::BucketPlace;
use crate::remote::{Address, AddressContents, Remote, UnmanagedObjects};
use crate::source::{Body, Source};
use crate::transfer::Retry;
use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;

/// Buckets kept open; more are closed and opened again.
const OPEN_MAX: usize = 16;

/// Every bucket that references name.
pub(super) struct Buckets {
    config: BucketConfig,
    retry: Retry,
    open: Mutex<BTreeMap<String, Remote>>,
    /// The source that was resolved last: whoever asked is about to read it, and need not list it again.
    last: Mutex<Option<Arc<BucketSource>>>,
}

impl fmt::Debug for Buckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buckets").finish_non_exhaustive()
    }
}

impl Buckets {
    pub(super) fn new(config: BucketConfig, retry: Retry) -> Self {
        Self { config, retry, open: Mutex::default(), last: Mutex::default() }
    }

    /// The bucket's client; with `region`, a new one that signs for it.
    fn bucket(&self, name: &str, region: Option<String>) -> Result<Remote> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(remote), None) = (open.get(name), &region) {
            return Ok(remote.clone());
        }
        let BucketConfig { mut options, environment } = self.config.clone();
        if let Some(region) = region {
            options.insert("region".into(), region);
        }
        let remote =
            Remote::open(&RemoteConfig { url: format!("s3://{name}"), options, environment }, self.retry.clone())?;
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        open.insert(name.to_owned(), remote.clone());
        Ok(remote)
    }

    /// What lies there now, and the client to read it with.
    async fn find(&self, place: &BucketPlace) -> Result<Option<(Remote, AddressContents)>> {
        let address = Address { base: place.key.clone(), folder: place.folder };
        let remote = self.bucket(&place.bucket, None)?;
        let (remote, found) = match (remote.find(&address).await, remote.reported_region()) {
            (Err(error), Some(region)) => {
                tracing::debug!(%error, bucket = place.bucket, region, "asking again in the region that the server told");
                let remote = self.bucket(&place.bucket, Some(region))?;
                let found = remote.find(&address).await?;
                (remote, found)
            }
            (found, _) => (remote, found?),
        };
        Ok(found.map(|found| (remote, found)))
    }
}

/// What lies there now.
pub(super) async fn resolve(buckets: &Arc<Buckets>, place: &BucketPlace) -> Result<Resolved> {
    let Some((remote, found)) = buckets.find(place).await.map_err(ours)? else {
        return Err(Error::not_found("there is no such object, and nothing below it")
            .tier(Tier::Origin)
            .hint("check bucket and key; `aws s3 ls` shows what is there. Keys are taken as they are written"));
    };
    let key = ArtifactKey::new(place.name()?, version(&found)?);
    let source = BucketSource::new(buckets, place, &key);
    let source = Arc::new(BucketSource { found: OnceCell::new_with(Some(Some((remote, found)))), ..source });
    *buckets.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(source.clone());
    Ok(Resolved { key, source })
}

/// A source for the version that `key` names, once it was resolved.
pub(super) fn source(buckets: &Arc<Buckets>, place: &BucketPlace, key: &ArtifactKey) -> Arc<dyn Source> {
    let last = buckets.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match last.filter(|last| last.key == *key && last.place == *place) {
        Some(last) => last,
        None => Arc::new(BucketSource::new(buckets, place, key)),
    }
}

fn version(found: &AddressContents) -> Result<Version> {
    Version::new(&found.digest().to_string())
}

/// The client is the remote's, and its failures name that tier.
fn ours(error: Error) -> Error {
    error.of_tier(Tier::Origin)
}

/// One version of what lies at a place.
struct BucketSource {
    buckets: Arc<Buckets>,
    place: BucketPlace,
    key: ArtifactKey,
    found: OnceCell<Option<(Remote, AddressContents)>>,
    unmanaged: OnceCell<UnmanagedObjects>,
}

impl fmt::Debug for BucketSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketSource({} at {})", self.key, self.place)
    }
}

impl BucketSource {
    fn new(buckets: &Arc<Buckets>, place: &BucketPlace, key: &ArtifactKey) -> Self {
        let (buckets, place, key) = (buckets.clone(), place.clone(), key.clone());
        Self { buckets, place, key, found: OnceCell::new(), unmanaged: OnceCell::new() }
    }

    async fn found(&self) -> Result<Option<&(Remote, AddressContents)>> {
        let find = || async {
            match self.buckets.find(&self.place).await? {
                Some((_, found)) if version(&found)? != self.key.version => Err(replaced("what lies there")),
                found => Ok(found),
            }
        };
        Ok(self.found.get_or_try_init(find).await?.as_ref())
    }

    async fn known(&self) -> Result<Option<Manifest>> {
        let Some((remote, found)) = self.found().await? else { return Ok(None) };
        let listed = match found {
            AddressContents::Published(_, manifest) => manifest.clone(),
            AddressContents::UnmanagedObjects(listing) => {
                let describe = || remote.describe(&self.key, listing);
                self.unmanaged.get_or_try_init(describe).await?.manifest.clone()
            }
        };
        Ok(Some(Manifest { key: self.key.clone(), ..listed }.without_holdings()))
    }

    async fn body(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let Some((remote, found)) = self.found().await? else {
            return Err(Error::not_found("there is no such object, and nothing below it"));
        };
        match remote.read_found(found, path, range).await {
            Err(error) if error.kind() == ErrorKind::Conflict => Err(replaced(path)),
            body => body,
        }
    }
}

fn replaced(what: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Conflict, format!("{what} was replaced or removed since it was listed"))
        .hint("what lies there now is another version: run it again with --refresh")
        .superseded()
}

#[async_trait]
impl Source for BucketSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        self.known().await.map_err(|error| ours(error.artifact(&self.key)))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let body = self.body(path, range).await.map_err(|error| ours(error.artifact(&self.key)))?;
        Ok(Body { start: body.start, stream: body.stream.map_err(ours).boxed() })
    }

    fn stated_by(&self, path: &FilePath) -> Option<String> {
        self.unmanaged.get()?.stated_by(path).map(str::to_owned)
    }
}
