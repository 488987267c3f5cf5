//! A location in a bucket as an origin: one object, or all objects below a prefix.
//!
//! Resolving lists the location. The version is a hash over keys, sizes and ETags, so it changes if any object changes.
//! A version that modelcache published there is read by its manifest. Clients and credentials are those of an S3
//! remote. If a bucket is in another region than the configured one, requests go to the region that the server reports.
//!
//! A source is valid only for the version that it was created for. If the objects at the location change, the source
//! fails with `Conflict`.

use super::{Origin, ResolvedSource};
use crate::config::{BucketConfig, RemoteConfig};
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath, Version};
use crate::manifest::Manifest;
use crate::mutex::Mutex;
use crate::option_name::call::{INCLUDE, REFRESH};
use crate::reference::{BucketPlace, Reference, Scheme, Target, bucket};
use crate::remote::{Address, AddressContents, ListedReads, Remote, UnmanagedObjects};
use crate::source::{Body, Source};
use crate::transfer::Retry;
use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;

/// Maximum number of bucket clients to keep. When it is reached, all are dropped and created again on demand.
const CLIENTS_MAX: usize = 16;

/// The clients of the buckets that were used recently.
pub(super) struct Buckets {
    config: BucketConfig,
    retry: Retry,
    /// The clients, keyed by bucket name.
    clients: Mutex<BTreeMap<String, Remote>>,
    /// The source of the reference that was resolved last, with its listing. The caller usually reads it next.
    last_resolved: Mutex<Option<Arc<BucketSource>>>,
}

impl fmt::Debug for Buckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buckets").finish_non_exhaustive()
    }
}

impl Buckets {
    pub(super) fn new(config: BucketConfig, retry: Retry) -> Self {
        Self { config, retry, clients: Mutex::default(), last_resolved: Mutex::default() }
    }

    /// Returns the client of the bucket `name`. With `region`, creates a new one that signs for that region.
    fn client(&self, name: &str, region: Option<String>) -> Result<Remote> {
        let mut clients = self.clients.lock();
        // Without an explicit region the existing client is reused.
        if let (Some(remote), None) = (clients.get(name), &region) {
            return Ok(remote.clone());
        }
        let BucketConfig { mut options, environment } = self.config.clone();
        if let Some(region) = region {
            options.insert("region".into(), region);
        }
        let remote =
            Remote::open(&RemoteConfig { url: format!("s3://{name}"), options, environment }, self.retry.clone())?;
        // Clients are cheap to create again, so there is no need for an eviction order.
        if clients.len() >= CLIENTS_MAX {
            clients.clear();
        }
        clients.insert(name.to_owned(), remote.clone());
        Ok(remote)
    }

    /// Returns the present contents of `place` and the client to read them with; `None` if `place` has no objects.
    async fn find(&self, place: &BucketPlace) -> Result<Option<(Remote, AddressContents)>> {
        let address = Address { base: place.key.clone(), folder: place.folder };
        let remote = self.client(&place.bucket, None)?;
        // If the bucket is in another region than the configured one, the server reports the right region.
        let (remote, found) = match (remote.find(&address).await, remote.reported_region()) {
            (Err(error), Some(region)) => {
                tracing::debug!(%error, bucket = place.bucket, region, "retrying in the reported region");
                let remote = self.client(&place.bucket, Some(region))?;
                let found = remote.find(&address).await?;
                (remote, found)
            }
            (found, _) => (remote, found?),
        };
        Ok(found.map(|found| (remote, found)))
    }
}

#[async_trait]
impl Origin for Arc<Buckets> {
    fn scheme(&self) -> &'static Scheme {
        &bucket::SCHEME
    }

    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        let Target::Bucket(place) = &reference.target else { return Ok(None) };
        let Some((remote, found)) = self.find(place).await.map_err(as_origin_error)? else {
            return Err(Error::not_found("there is no such object, and no object below this prefix")
                .tier(Tier::Origin)
                .hint(absent_hint(place)));
        };
        // The listing is kept in the source, so that reading the manifest does not list again.
        let key = ArtifactKey::new(place.name()?, version(&found)?);
        let source = BucketSource::new(self, place, &key);
        let source = Arc::new(BucketSource { found: OnceCell::new_with(Some(Some((remote, found)))), ..source });
        *self.last_resolved.lock() = Some(source.clone());
        Ok(Some(ResolvedSource { key, source }))
    }

    fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let Target::Bucket(place) = &reference.target else { return None };
        let last_resolved = self.last_resolved.lock().clone();
        // Reuse the listing of that source if it has the same version.
        match last_resolved.filter(|last_resolved| last_resolved.key == *key && last_resolved.place == *place) {
            Some(last_resolved) => Some(last_resolved),
            None => Some(Arc::new(BucketSource::new(self, place, key))),
        }
    }
}

/// Returns the hint for a location without objects. A key with wildcards is probably meant as a pattern.
fn absent_hint(place: &BucketPlace) -> String {
    let Some(at) = place.key.find(['*', '?', '[']) else {
        return "check bucket and key, for instance with `aws s3 ls`; percent escapes in a key are not decoded".into();
    };
    let (folder, pattern) = place.key[..at]
        .rfind('/')
        .map_or(("", place.key.as_str()), |slash| (&place.key[..=slash], &place.key[slash + 1..]));
    format!(
        "a key is no pattern; choose files with {INCLUDE}: modelcache get 's3://{}/{folder}' --include '{pattern}'",
        place.bucket
    )
}

/// Returns the version of the listed contents: a hash over keys, sizes and ETags.
fn version(found: &AddressContents) -> Result<Version> {
    Version::new(&found.digest().to_string())
}

/// Changes the tier of an error to origin: the client is that of the remote, so its errors name the remote.
fn as_origin_error(error: Error) -> Error {
    error.replace_tier(Tier::Origin)
}

/// The source for one version of a location in a bucket.
struct BucketSource {
    buckets: Arc<Buckets>,
    place: BucketPlace,
    key: ArtifactKey,
    /// The listed contents and their client; `None` if the location has no objects.
    found: OnceCell<Option<(Remote, AddressContents)>>,
    /// The manifest of objects that modelcache did not publish, read at the first use.
    unmanaged: OnceCell<UnmanagedObjects>,
    reads: ListedReads,
}

impl fmt::Debug for BucketSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketSource({} at {})", self.key, self.place)
    }
}

impl BucketSource {
    fn new(buckets: &Arc<Buckets>, place: &BucketPlace, key: &ArtifactKey) -> Self {
        let (buckets, place, key) = (buckets.clone(), place.clone(), key.clone());
        let (found, unmanaged) = (OnceCell::new(), OnceCell::new());
        Self { buckets, place, key, found, unmanaged, reads: ListedReads::default() }
    }

    /// Returns the contents of the location, listing it at the first call.
    ///
    /// # Errors
    /// `Conflict` if the contents have another version than this source.
    async fn found(&self) -> Result<Option<&(Remote, AddressContents)>> {
        let find = || async {
            match self.buckets.find(&self.place).await? {
                // Never mix objects of two versions.
                Some((_, found)) if version(&found)? != self.key.version => {
                    Err(replaced("the content of the location"))
                }
                found => Ok(found),
            }
        };
        Ok(self.found.get_or_try_init(find).await?.as_ref())
    }

    /// Returns the manifest, without the record of which files are held.
    async fn load_manifest(&self) -> Result<Option<Manifest>> {
        let Some((remote, found)) = self.found().await? else { return Ok(None) };
        // A published version has a manifest. For other objects one is built, with digests from checksum files.
        let listed = match found {
            AddressContents::Published(_, manifest) => manifest.clone(),
            AddressContents::UnmanagedObjects(listing) => {
                let describe = || remote.describe(&self.key, listing);
                self.unmanaged.get_or_try_init(describe).await?.manifest.clone()
            }
        };
        Ok(Some(Manifest { key: self.key.clone(), ..listed }.without_holdings()))
    }

    /// Reads `range` of a file, on condition that the object is the listed one.
    async fn body(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let Some((remote, found)) = self.found().await? else {
            return Err(Error::not_found("there is no such object, and no object below this prefix"));
        };
        let has_digest = self.unmanaged.get().is_some_and(|unmanaged| unmanaged.has_digest(path));
        match remote.read_found(found, path, range, &self.reads, has_digest).await {
            // The object has another ETag than in the listing.
            Err(error) if error.kind() == ErrorKind::Conflict => Err(replaced(path)),
            body => body,
        }
    }
}

/// Returns the error for content that has another version than the source.
fn replaced(what: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Conflict, format!("{what} was replaced or removed after it was listed"))
        .hint(format!("the new content is another version: run the command again with {REFRESH}"))
        .superseded()
}

#[async_trait]
impl Source for BucketSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    fn store(&self) -> Option<String> {
        Some(format!("s3://{}", self.place.bucket))
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        self.load_manifest().await.map_err(|error| as_origin_error(error.artifact(&self.key)))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let body = self.body(path, range).await.map_err(|error| as_origin_error(error.artifact(&self.key)))?;
        Ok(Body { start: body.start, stream: body.stream.map_err(as_origin_error).boxed() })
    }

    fn saw_other_validators(&self) -> bool {
        self.reads.saw_other_etag()
    }

    fn digest_stated_by(&self, path: &FilePath) -> Option<String> {
        self.unmanaged.get()?.stated_by(path).map(str::to_owned)
    }
}
