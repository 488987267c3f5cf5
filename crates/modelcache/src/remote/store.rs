//! The storage layer over `object_store`: a bucket or a local folder, with retries and translated errors.
//!
//! Every operation is retried under the process's shared [`Retry`], except [`Store::read`], which the caller retries.
//! `object_store`'s own retries are off, so that retries do not multiply. Absence is `None`. An unmet condition is the
//! value [`Written::Refused`], not an error.
//!
//! A create-only write may be refused because its own first attempt arrived without an answer. The caller must be able
//! to recognise its own object.

use super::backend::failure::{self, EndpointContext};
use super::backend::s3::copy::Copier;
use super::backend::s3::credentials::Credentials;
use super::backend::s3::http_client::{Connector, LeftOut};
use super::backend::s3::profile::Profiles;
use super::backend::s3::raw_client::{self, RawClient};
use super::backend::s3::settings::{Options, RemoteLocation, S3Settings};
use crate::config::RemoteConfig;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::limits;
use crate::manifest::ObjectIdentity;
use crate::reference::is_bucket_name;
use crate::transfer::{BodyLimits, Paging, Retry, StallDetector, read_body};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::list::{PaginatedListOptions, PaginatedListResult, PaginatedListStore as _};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResultPayload, ListResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    UpdateVersion,
};
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Longest key, in bytes (<https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html>).
const KEY_BYTES_MAX: usize = 1024;
/// Size of one read of a local file, in bytes.
const FILE_CHUNK_BYTES: usize = 1024 * 1024;

/// An opened bucket or folder.
pub(super) struct Store {
    objects: Arc<dyn ObjectStore>,
    kind: Kind,
    /// Prefix of every key; empty, or without slashes at its ends.
    prefix: String,
    /// Names of bucket, endpoint and region, for messages.
    at: EndpointContext,
    /// The bucket's region as reported by the server, if it differs from the region that requests are signed for.
    reported_region: Mutex<Option<String>>,
    retry: Retry,
    /// The first refusal of a write because of a missing permission.
    refusal: OnceLock<Error>,
}

enum Kind {
    Bucket { s3: AmazonS3, credentials: Arc<Credentials>, raw_client: Option<Arc<RawClient>>, copier: Option<Copier> },
    Folder { root: PathBuf },
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("at", &self.at).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// Condition of a write on the present object.
#[derive(Debug, Clone, Copy)]
pub(super) enum Condition<'a> {
    /// Unconditional.
    Always,
    /// There is no object (`If-None-Match: *`).
    Absent,
    /// The object has this ETag (`If-Match`).
    Matches(&'a str),
}

/// Result of a conditional write.
#[derive(Debug)]
pub(super) enum Written {
    /// The object was written.
    Done(ObjectIdentity),
    /// The condition was not met.
    Refused,
    /// The store does not support the condition. Nothing was written.
    Unsupported,
}

/// Result of reading a range of an object.
pub(super) enum ReadBody {
    /// A stream that begins at `start`, which is 0 if the server ignored the range.
    Stream {
        /// Offset of the first byte.
        start: u64,
        /// The content.
        stream: BoxStream<'static, Result<Bytes>>,
    },
    /// The object has another ETag or size than requested.
    Changed,
}

impl Store {
    /// Sets up the clients without sending a request. Blocks while it reads AWS files and root certificates.
    pub(super) fn open(config: &RemoteConfig, place: &RemoteLocation, options: &Options, retry: Retry) -> Result<Self> {
        match place {
            RemoteLocation::Folder(folder) => Self::open_folder(folder, retry),
            RemoteLocation::Bucket { bucket, prefix } => Self::open_bucket(config, bucket, prefix, options, retry),
        }
    }

    fn open_folder(folder: &std::path::Path, retry: Retry) -> Result<Self> {
        let unusable = || Error::invalid(format!("the remote's folder {folder:?} cannot be used")).tier(Tier::Remote);
        let root = folder.to_path_buf();
        let prefix = Path::from_absolute_path(folder).map_err(|cause| unusable().cause(cause))?.as_ref().to_owned();
        let shown = folder.display().to_string();
        Ok(Self {
            objects: Arc::new(LocalFileSystem::new().with_fsync(true)),
            kind: Kind::Folder { root },
            prefix,
            at: EndpointContext { container: shown.clone(), endpoint: shown, region: String::new() },
            reported_region: Mutex::default(),
            retry,
            refusal: OnceLock::new(),
        })
    }

    fn open_bucket(config: &RemoteConfig, bucket: &str, prefix: &str, options: &Options, retry: Retry) -> Result<Self> {
        if !is_bucket_name(bucket) {
            return Err(Error::invalid("the address names no bucket").tier(Tier::Remote));
        }
        let profiles = Profiles::load(&config.environment);
        let settings = S3Settings::gather(options, &config.environment, &profiles)?;
        let connector = Connector::new(&settings, options, retry.read_timeout())?;
        let credentials = Arc::new(Credentials::new(
            &config.environment,
            options,
            profiles,
            &settings.region,
            connector.client().clone(),
        ));
        let raw_client = Arc::new(RawClient::new(bucket, &settings, options, &connector, &credentials));
        let copier = Copier::new(&raw_client, options);
        let raw_client = raw_client::supports_reads(options).then_some(raw_client);
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(&settings.region)
            .with_virtual_hosted_style_request(!settings.path_style)
            .with_allow_http(settings.allow_http)
            .with_disable_bulk_delete(true)
            .with_unsigned_payload(!settings.signs_payload(options))
            .with_retry(object_store::RetryConfig { max_retries: 0, ..Default::default() })
            .with_credentials(credentials.clone())
            .with_http_connector(connector);
        if let Some(endpoint) = &settings.endpoint {
            // In virtual-hosted style, `object_store` uses the endpoint unchanged, so it must contain the bucket.
            let virtual_host = || settings.bucket_url(bucket);
            builder = builder.with_endpoint(if settings.path_style { endpoint.clone() } else { virtual_host() });
        }
        // Options of the user override the settings above.
        for (key, value) in &options.passed_on {
            builder = builder.with_config(*key, value.expose());
        }
        let s3 = builder.build().map_err(|error| {
            // The text may contain the value of an option, so it is not part of the message.
            tracing::debug!(%error, "the S3 client refused its options");
            Error::invalid("the options of the remote are inconsistent")
                .tier(Tier::Remote)
                .hint("check [remote.options]")
        })?;
        let endpoint = settings.endpoint_url();
        Ok(Self {
            objects: Arc::new(s3.clone()),
            kind: Kind::Bucket { s3, credentials, raw_client, copier },
            prefix: prefix.to_owned(),
            at: EndpointContext { container: bucket.to_owned(), endpoint, region: settings.region },
            reported_region: Mutex::default(),
            retry,
            refusal: OnceLock::new(),
        })
    }

    /// Returns the key of `relative`, a path below the remote's prefix.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the path cannot be a key of this store.
    pub(super) fn key(&self, relative: &str) -> Result<Path> {
        let text = match self.prefix.as_str() {
            "" => relative.to_owned(),
            prefix => format!("{prefix}/{relative}"),
        };
        let unusable = |why: String| {
            Error::invalid(format!("{relative:?} cannot be a key of the remote: {why}")).tier(Tier::Remote)
        };
        if matches!(self.kind, Kind::Bucket { .. }) && text.len() > KEY_BYTES_MAX {
            return Err(unusable(format!("{} bytes with the prefix; at most {KEY_BYTES_MAX}", text.len())));
        }
        // `Path::parse` keeps the text unchanged. `Path::from` would escape characters such as `+` and `é`.
        let key = Path::parse(&text).map_err(|error| unusable(error.to_string()))?;
        // `LocalFileSystem` writes to `name#1` before it renames to `name`, and hides such names in listings.
        let numbered = |name: &str| {
            name.split_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        if matches!(self.kind, Kind::Folder { .. }) && key.filename().is_some_and(numbered) {
            return Err(unusable("in a folder, names that end in # and digits stand for uploads in progress".into()));
        }
        Ok(key)
    }

    /// Returns the prefix of all keys, or `None` if it is empty.
    pub(super) fn root(&self) -> Option<Path> {
        (!self.prefix.is_empty()).then(|| Path::parse(&self.prefix).ok()).flatten()
    }

    /// Returns `key` without the remote's prefix.
    pub(super) fn relative<'a>(&self, key: &'a Path) -> Option<&'a str> {
        match self.prefix.as_str() {
            "" => Some(key.as_ref()),
            prefix => key.as_ref().strip_prefix(prefix)?.strip_prefix('/'),
        }
    }

    /// Returns the S3 client if the store is a bucket.
    pub(super) fn bucket(&self) -> Option<&AmazonS3> {
        match &self.kind {
            Kind::Bucket { s3, .. } => Some(s3),
            Kind::Folder { .. } => None,
        }
    }

    /// Returns the credential chain if the store is a bucket.
    pub(super) fn credentials(&self) -> Option<&Credentials> {
        match &self.kind {
            Kind::Bucket { credentials, .. } => Some(credentials),
            Kind::Folder { .. } => None,
        }
    }

    /// Returns the client for requests that `object_store` lacks, if the store is a bucket and its options allow it.
    pub(super) fn raw_client(&self) -> Option<&RawClient> {
        match &self.kind {
            Kind::Bucket { raw_client, .. } => raw_client.as_deref(),
            Kind::Folder { .. } => None,
        }
    }

    /// Returns the client for server-side copies, if the store is a bucket and its options allow it.
    pub(super) fn copier(&self) -> Option<&Copier> {
        match &self.kind {
            Kind::Bucket { copier, .. } => copier.as_ref(),
            Kind::Folder { .. } => None,
        }
    }

    /// Returns true if the requests of parts sign the part's digest, so that the caller should compute it while
    /// reading.
    pub(super) fn signs_digests(&self) -> bool {
        self.copier().is_some_and(|copier| copier.client().signs_payload())
    }

    /// Returns the first refusal of a write because of a missing permission.
    pub(super) fn refusal(&self) -> Option<&Error> {
        self.refusal.get()
    }

    /// Returns the bucket's region as reported by the server, if it differs from the region that requests are signed
    /// for.
    pub(super) fn reported_region(&self) -> Option<String> {
        self.reported_region.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the path of the file of object `key` if the store is a folder.
    pub(super) fn file(&self, key: &Path) -> Option<PathBuf> {
        match &self.kind {
            Kind::Folder { root } => Some(root.join(self.relative(key)?)),
            Kind::Bucket { .. } => None,
        }
    }

    /// Returns the folder if the store is one.
    pub(super) fn folder(&self) -> Option<&std::path::Path> {
        match &self.kind {
            Kind::Folder { root } => Some(root),
            Kind::Bucket { .. } => None,
        }
    }

    /// Returns the retry policy.
    pub(super) fn retry(&self) -> &Retry {
        &self.retry
    }

    /// Returns the names of bucket, endpoint and region, for messages.
    pub(super) fn at(&self) -> &EndpointContext {
        &self.at
    }

    /// Translates an error of `object_store`. `doing` is the failed operation. Remembers a region that the server
    /// reports and drops expired credentials.
    pub(super) async fn failed(&self, error: object_store::Error, doing: &str) -> Error {
        let expired = failure::is_expired(&error);
        let region = failure::refusal(&error).and_then(|refusal| refusal.region.clone());
        if let Some(region) = region.filter(|region| *region != self.at.region) {
            *self.reported_region.lock().unwrap_or_else(PoisonError::into_inner) = Some(region);
        }
        let error = failure::translate(error, doing, &self.at);
        match &self.kind {
            // A retry helps only if the credentials can be renewed.
            Kind::Bucket { credentials, .. } if expired => error.transient(credentials.expired().await),
            _ => error,
        }
    }

    /// Translates an error of a write as [`failed`](Self::failed) does. Remembers a refusal because of a missing
    /// permission, so that further writes are skipped.
    pub(super) async fn failed_write(&self, error: object_store::Error, doing: &str) -> Error {
        let refused = failure::refuses_write(&error);
        let error = self.failed(error, doing).await;
        if !refused {
            return error;
        }
        let right = match &self.kind {
            Kind::Bucket { .. } => format!("grant s3:PutObject on the bucket {:?}", self.at.container),
            Kind::Folder { .. } => format!("check owner and mode of the folder {}", self.at.container),
        };
        let refusal = Error::new(ErrorKind::Unauthorized, error.message())
            .tier(Tier::Remote)
            .hint(format!("{right}, or make the remote read-only: MODEL_CACHE_REMOTE_MODE=ro"));
        self.refusal.get_or_init(|| refusal.clone());
        refusal
    }

    /// Returns `None` if the object does not exist, or if the answer is a 403 that S3 also sends for a missing object.
    pub(super) async fn present<T>(&self, answer: object_store::Result<T>, doing: &str) -> Result<Option<T>> {
        match answer {
            Ok(value) => Ok(Some(value)),
            Err(error) if failure::is_ambiguous(&error) => {
                warn_ambiguous(&self.at);
                Ok(None)
            }
            Err(error) => match self.failed(error, doing).await {
                error if error.kind() == ErrorKind::NotFound => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Reads a whole object of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the object is larger.
    pub(super) async fn get(&self, key: &Path, bytes_max: u64) -> Result<Option<(Bytes, ObjectIdentity)>> {
        let doing = format!("cannot read {key}");
        self.retry
            .run(|| async {
                let Some(answer) = self.present(self.objects.get(key).await, &doing).await? else { return Ok(None) };
                let identity = identity(&answer.meta);
                let too_big = || Error::corrupt(format!("{key} has more than {bytes_max} bytes")).tier(Tier::Remote);
                if identity.object_bytes > bytes_max {
                    return Err(too_big());
                }
                let limits = BodyLimits::answer(bytes_max, self.retry.read_timeout());
                let (bytes, cut) = read_body(self.stream(answer, doing.clone()), limits).await;
                if let Some(cut) = cut {
                    return Err(cut.error(key, |error| error).tier(Tier::Remote));
                }
                if bytes.len() as u64 != identity.object_bytes {
                    let message = format!("{doing}: the answer has {} of {} bytes", bytes.len(), identity.object_bytes);
                    return Err(Error::unavailable(message).tier(Tier::Remote));
                }
                Ok(Some((Bytes::from(bytes), identity)))
            })
            .await
    }

    /// Returns ETag and size of an object, or `None` if it does not exist.
    pub(super) async fn head(&self, key: &Path) -> Result<Option<ObjectIdentity>> {
        let doing = format!("cannot look at {key}");
        self.retry
            .run(|| async {
                let answer = self.present(self.objects.head(key).await, &doing).await?;
                Ok(answer.map(|meta| identity(&meta)))
            })
            .await
    }

    /// Returns the modification time of an object in milliseconds since the Unix epoch by the store's clock, or `None`
    /// if the object does not exist. Not retried.
    pub(super) async fn written_at_ms(&self, key: &Path) -> Result<Option<i64>> {
        let doing = format!("cannot look at {key}");
        let answer = self.present(self.objects.head(key).await, &doing).await?;
        Ok(answer.map(|meta| meta.last_modified.timestamp_millis()))
    }

    /// Returns the names of the folders directly in `folder`, or none if listing is not permitted.
    pub(super) async fn folders(&self, folder: &Path) -> Result<Vec<String>> {
        let mut folders = Vec::new();
        self.pages(Some(folder), true, |page| {
            folders.extend(page.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)));
            within_files_max(folders.len()).map(|()| true)
        })
        .await?;
        Ok(folders)
    }

    /// Returns a non-empty object directly in `folder`. Our own records lie one level deeper, and folder markers are
    /// empty. Returns `None` if there is none or listing is not permitted.
    pub(super) async fn any_in(&self, folder: &Path) -> Result<Option<String>> {
        let mut found = None;
        let listed = self.pages(Some(folder), true, |page| {
            found = page.objects.iter().find(|object| object.size > 0).map(|object| object.location.to_string());
            Ok(found.is_none())
        });
        match listed.await {
            Ok(_) => Ok(found),
            Err(error) if error.kind() == ErrorKind::Unauthorized => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a range of an object, without retries. The object must have the size of `wanted`, and its ETag if `wanted`
    /// has one.
    pub(super) async fn read(&self, key: &Path, range: Range<u64>, wanted: &ObjectIdentity) -> Result<ReadBody> {
        let etag = wanted.etag.as_deref();
        // It comes from a manifest or a listing. `object_store` panics if it cannot be sent.
        if etag.is_some_and(|etag| http::HeaderValue::from_str(etag).is_err()) {
            return Err(Error::corrupt(format!("the ETag recorded for {key} has characters that no ETag can have"))
                .tier(Tier::Remote));
        }
        let doing = format!("cannot read {key}");
        let options = |ranged: bool| GetOptions {
            range: ranged.then(|| GetRange::Bounded(range.clone())),
            if_match: etag.map(str::to_owned),
            ..GetOptions::default()
        };
        // A server without range support sends the whole object, which `object_store` refuses: request it without a
        // range.
        let answer = match self.objects.get_opts(key, options(true)).await {
            Err(error) if failure::ignores_range(&error) => self.objects.get_opts(key, options(false)).await,
            answer => answer,
        };
        match answer {
            // A store that ignores `If-Match` still sends the ETag and the size of the object.
            Ok(answer)
                if etag.is_some_and(|etag| is_another(etag, answer.meta.e_tag.as_deref()))
                    || answer.meta.size != wanted.object_bytes =>
            {
                Ok(ReadBody::Changed)
            }
            Ok(answer) => Ok(ReadBody::Stream { start: answer.range.start, stream: self.stream(answer, doing) }),
            Err(error) if etag.is_some() && failure::condition_failed(&error) => Ok(ReadBody::Changed),
            Err(error) => Err(self.failed(error, &doing).await),
        }
    }

    /// Returns the body of an answer. Fails if the connection is silent for the read timeout or has nearly stalled.
    fn stream(&self, answer: object_store::GetResult, doing: String) -> BoxStream<'static, Result<Bytes>> {
        let at = self.at.clone();
        let silence = self.retry.read_timeout();
        match answer.payload {
            GetResultPayload::File(file, _) => file_stream(file, answer.range, doing, at),
            GetResultPayload::Stream(stream) => {
                let stream = stream.map_err({
                    let doing = doing.clone();
                    move |error| failure::translate(error, &doing, &at)
                });
                with_idle_limit(stream.boxed(), silence, doing)
            }
        }
    }

    /// Writes a small object in one request.
    pub(super) async fn put(&self, key: &Path, bytes: Bytes, condition: Condition<'_>) -> Result<Written> {
        let doing = format!("cannot write {key}");
        let mode = match condition {
            Condition::Always => PutMode::Overwrite,
            Condition::Absent => PutMode::Create,
            Condition::Matches(etag) => PutMode::Update(UpdateVersion { e_tag: Some(etag.to_owned()), version: None }),
        };
        self.retry
            .run(|| async {
                let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
                match self.objects.put_opts(key, bytes.clone().into(), options).await {
                    Ok(put) => Ok(Written::Done(ObjectIdentity { etag: put.e_tag, object_bytes: bytes.len() as u64 })),
                    // 412. A 409 (concurrent conditional write) is transient and retried.
                    Err(error) if !matches!(condition, Condition::Always) && failure::condition_failed(&error) => {
                        Ok(Written::Refused)
                    }
                    Err(error) if !matches!(condition, Condition::Always) && failure::condition_unknown(&error) => {
                        Ok(Written::Unsupported)
                    }
                    Err(error) => Err(self.failed_write(error, &doing).await),
                }
            })
            .await
    }

    /// Removes an object. Succeeds if it does not exist.
    pub(super) async fn delete(&self, key: &Path) -> Result<()> {
        let doing = format!("cannot remove {key}");
        self.retry
            .run(|| async {
                match self.objects.delete(key).await {
                    Ok(()) => Ok(()),
                    Err(error) => match self.failed(error, &doing).await {
                        error if error.kind() == ErrorKind::NotFound => Ok(()),
                        error => Err(error),
                    },
                }
            })
            .await
    }

    /// Lists every object below `prefix`. Returns `None` if listing is not permitted.
    pub(super) async fn list(&self, prefix: Option<&Path>) -> Result<Option<Vec<ObjectMeta>>> {
        self.list_those(prefix, |_| true).await
    }

    /// Lists the objects below `prefix` that `wanted` accepts. Other objects are not kept in memory. Returns `None` if
    /// listing is not permitted.
    ///
    /// # Errors
    /// `Invalid` for more than [`limits::FILES_MAX`] accepted objects.
    pub(super) async fn list_those(
        &self,
        prefix: Option<&Path>,
        wanted: impl Fn(&ObjectMeta) -> bool,
    ) -> Result<Option<Vec<ObjectMeta>>> {
        let mut objects = Vec::new();
        let listed = self.pages(prefix, false, |page| {
            objects.extend(page.objects.into_iter().filter(&wanted));
            within_files_max(objects.len()).map(|()| true)
        });
        match listed.await {
            Ok(permitted) => Ok(permitted.then_some(objects)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Some(Vec::new())),
            Err(error) => Err(error),
        }
    }

    /// Lists the objects below `prefix` and passes each page to `take`, until `take` returns false. With `flat`, lists
    /// only the objects and folders directly in `prefix`. Returns false if listing is not permitted.
    ///
    /// # Errors
    /// `Corrupt` for a listing that does not end, see [`Paging`].
    pub(super) async fn pages(
        &self,
        prefix: Option<&Path>,
        flat: bool,
        mut take: impl FnMut(ListResult) -> Result<bool>,
    ) -> Result<bool> {
        let doing = "cannot list the remote";
        // A folder is listed in one page.
        let Kind::Bucket { s3, .. } = &self.kind else {
            let listed = self.retry.run(|| async {
                let listed = match flat {
                    true => self.objects.list_with_delimiter(prefix).await,
                    false => self.objects.list(prefix).try_collect::<Vec<_>>().await.map(|objects| ListResult {
                        objects,
                        common_prefixes: Vec::new(),
                        extensions: Default::default(),
                    }),
                };
                match listed {
                    Ok(listed) => Ok(listed),
                    Err(error) => Err(self.failed(error, doing).await),
                }
            });
            return take(listed.await?).map(|_| true);
        };
        let prefix = prefix.map(|prefix| format!("{prefix}/"));
        let (mut paging, mut token) = (Paging::default(), None);
        loop {
            let page = self.retry.run(|| async {
                let delimiter = flat.then_some(Cow::Borrowed("/"));
                let options =
                    PaginatedListOptions { page_token: token.clone(), delimiter, ..PaginatedListOptions::default() };
                match s3.list_paginated(prefix.as_deref(), options).await {
                    Ok(page) => Ok(Some(page)),
                    Err(error) if failure::is_ambiguous(&error) => Ok(None),
                    Err(error) => Err(self.failed(error, doing).await),
                }
            });
            let Some(PaginatedListResult { result, page_token }) = page.await? else { return Ok(false) };
            // The last key of the page, including removed ones and folders. `Paging` checks that the pages advance.
            let left_out = result.extensions.get::<LeftOut>().and_then(|LeftOut(keys)| keys.last().map(String::as_str));
            let last = [
                result.objects.last().map(|object| object.location.as_ref()),
                result.common_prefixes.last().map(AsRef::as_ref),
                left_out,
            ];
            let last = last.into_iter().flatten().collect::<Vec<_>>().join("\n");
            let next = page_token.as_deref().filter(|token| !token.is_empty());
            paging
                .page(Some(last.as_str()).filter(|last| !last.is_empty()), next)
                .map_err(|error| error.tier(Tier::Remote))?;
            token = next.map(str::to_owned);
            if !take(result)? || token.is_none() {
                return Ok(true);
            }
        }
    }
}

/// Fails if a list has more entries than an artifact can have files.
fn within_files_max(entries: usize) -> Result<()> {
    match entries > limits::FILES_MAX {
        true => Err(Error::invalid(format!("the remote lists more than {} entries", limits::FILES_MAX))
            .tier(Tier::Remote)
            .hint("if other tools write below this prefix, give modelcache its own prefix or use a longer one")),
        false => Ok(()),
    }
}

/// Returns true if the ETag `now` is known and differs from `etag`. Quotes are ignored, because some stores omit them
/// in listings.
pub(super) fn is_another(etag: &str, now: Option<&str>) -> bool {
    let bare = |etag: &str| etag.trim_matches('"').to_owned();
    now.is_some_and(|now| bare(now) != bare(etag))
}

pub(super) fn identity(meta: &ObjectMeta) -> ObjectIdentity {
    ObjectIdentity { etag: meta.e_tag.clone(), object_bytes: meta.size }
}

/// Warns about ambiguous 403 answers. Once per process, because the bucket answers so for every missing object.
pub(super) fn warn_ambiguous(at: &EndpointContext) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            bucket = at.container,
            "the remote answers 403 where an object may just be missing; treating it as missing. The credentials may lack s3:ListBucket or s3:GetObject; objects of other tools are found with s3:ListBucket only"
        );
    }
}

/// Ends a stream with an error if no bytes arrive for `silence`, or if the connection has nearly stalled.
fn with_idle_limit(
    stream: BoxStream<'static, Result<Bytes>>,
    silence: Duration,
    doing: String,
) -> BoxStream<'static, Result<Bytes>> {
    let stall = StallDetector::new(silence);
    futures::stream::unfold(Some((stream, doing, stall)), move |state| async move {
        let (mut stream, doing, mut stall) = state?;
        let waiting = Instant::now();
        match tokio::time::timeout(silence, stream.next()).await {
            Ok(Some(Ok(chunk))) if stall.record(chunk.len() as u64, waiting.elapsed()) => {
                let error = Error::unavailable(format!("{doing}: the connection has nearly stalled"));
                Some((Err(error.tier(Tier::Remote)), None))
            }
            Ok(Some(item)) => {
                let next = item.is_ok().then_some((stream, doing, stall));
                Some((item, next))
            }
            Ok(None) => None,
            Err(_) => {
                let error = Error::unavailable(format!("{doing}: no bytes for {} s", silence.as_secs_f32()));
                Some((Err(error.tier(Tier::Remote)), None))
            }
        }
    })
    .boxed()
}

/// Streams a local file in large reads. `object_store` reads 8 KiB at a time, each with a switch to another thread.
fn file_stream(
    file: std::fs::File,
    range: Range<u64>,
    doing: String,
    at: EndpointContext,
) -> BoxStream<'static, Result<Bytes>> {
    use std::os::unix::fs::FileExt as _;
    let file = Arc::new(file);
    futures::stream::try_unfold(range.start, move |offset| {
        let (file, doing, at, end) = (file.clone(), doing.clone(), at.clone(), range.end);
        async move {
            let want = usize::try_from(end - offset).unwrap_or(usize::MAX).min(FILE_CHUNK_BYTES);
            if want == 0 {
                return Ok(None);
            }
            let read = tokio::task::spawn_blocking(move || {
                let mut buffer = vec![0; want];
                let got = file.read_at(&mut buffer, offset)?;
                buffer.truncate(got);
                Ok(Bytes::from(buffer))
            });
            match read.await {
                Ok(Ok(bytes)) if bytes.is_empty() => Ok(None),
                Ok(Ok(bytes)) => {
                    let next = offset + bytes.len() as u64;
                    Ok(Some((bytes, next)))
                }
                Ok(Err(io)) => Err(failure::from_io(&io, &doing, &at)),
                Err(_) => Err(Error::unavailable(format!("{doing}: cancelled")).tier(Tier::Remote)),
            }
        }
    })
    .boxed()
}
