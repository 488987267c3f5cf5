//! The storage layer over a [`Backend`]: retries, translated errors, and absence as a value.
//!
//! Every operation is retried under the process's shared [`Retry`], with three exceptions: [`Store::written_at_ms`],
//! [`Store::listed`], and [`Store::read`], which the caller retries. `object_store`'s own retries are off, so that
//! retries do not multiply. Absence is `None`. An unmet condition is the value [`PutOutcome::ConditionFailed`], not an
//! error.
//!
//! A create-only write may fail its condition because an earlier attempt of the same write succeeded and its response
//! was lost. The caller must be able to recognise its own object.

use super::backend::{
    self, Backend, EndpointContext, MultipartUploads, Options, RemoteLocation, SkippedKeys, StoredChecksums,
};
use crate::config::RemoteConfig;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::limits;
use crate::manifest::ObjectIdentity;
use crate::option_name::setting::REMOTE_MODE;
use crate::runtime::chunks;
use crate::transfer::{BodyLimits, Paging, Retry, StallDetector, read_body};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::list::PaginatedListResult;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResultPayload, ListResult, ObjectMeta, ObjectStoreExt, PutMode, UpdateVersion,
};
use std::fmt;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// An opened bucket or folder.
pub(super) struct Store {
    backend: Arc<dyn Backend>,
    retry: Retry,
    /// The first refusal of a write because of a missing permission.
    refusal: OnceLock<Error>,
    /// Set once the store has refused to list.
    listing_is_denied: AtomicBool,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (endpoint_context, prefix) = (self.backend.endpoint_context(), self.backend.prefix());
        f.debug_struct("Store").field("at", endpoint_context).field("prefix", &prefix).finish_non_exhaustive()
    }
}

/// Condition of a write on the existing object.
#[derive(Debug, Clone, Copy)]
pub(super) enum Condition<'a> {
    /// Unconditional.
    Always,
    /// No object exists (`If-None-Match: *`).
    Absent,
    /// The object has this ETag (`If-Match`).
    Matches(&'a str),
}

/// Result of a write.
#[derive(Debug)]
pub(super) enum PutOutcome {
    /// The object was written.
    Done(ObjectIdentity),
    /// The condition was not met. Nothing was written.
    ConditionFailed,
    /// The store does not support the condition. Nothing was written.
    ConditionUnsupported,
}

/// Result of reading a range of an object.
pub(super) enum ReadBody {
    /// A stream that begins at `start`, which is 0 if the server ignored the range.
    Stream {
        /// Offset of the first byte.
        start: u64,
        /// The ETag in the response.
        etag: Option<String>,
        /// The content.
        stream: BoxStream<'static, Result<Bytes>>,
    },
    /// The object has another ETag or size than requested.
    Changed,
}

impl Store {
    /// Sets up the clients without sending a request. Blocks while it reads AWS files and root certificates.
    pub(super) fn open(
        config: &RemoteConfig,
        location: &RemoteLocation,
        options: &Options,
        retry: Retry,
    ) -> Result<Self> {
        Ok(Self::new(backend::open(config, location, options, &retry)?, retry))
    }

    pub(super) fn new(backend: Arc<dyn Backend>, retry: Retry) -> Self {
        Self { backend, retry, refusal: OnceLock::new(), listing_is_denied: AtomicBool::new(false) }
    }

    /// Returns the backend, for operations that are neither retried nor translated here.
    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Returns the backend's interface for multipart uploads.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] if the backend does not support them.
    pub(super) fn uploads(&self) -> Result<&dyn MultipartUploads> {
        self.backend
            .uploads()
            .ok_or_else(|| Error::new(ErrorKind::Other, "the remote does not support multipart uploads"))
    }

    /// Returns the key of `relative`, a path below the remote's prefix.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the path cannot be a key of this store.
    pub(super) fn key(&self, relative: &str) -> Result<Path> {
        let text = match self.backend.prefix() {
            "" => relative.to_owned(),
            prefix => format!("{prefix}/{relative}"),
        };
        let unusable = |why: String| {
            Error::invalid(format!("{relative:?} cannot be a key of the remote: {why}")).tier(Tier::Remote)
        };
        // `Path::parse` keeps the text unchanged. `Path::from` would escape characters such as `+` and `é`.
        let key = Path::parse(&text).map_err(|error| unusable(error.to_string()))?;
        if let Some(reason) = self.backend.unusable_key(&key) {
            return Err(unusable(reason));
        }
        Ok(key)
    }

    /// Returns the prefix of all keys, or `None` if it is empty.
    pub(super) fn root(&self) -> Option<Path> {
        let prefix = self.backend.prefix();
        (!prefix.is_empty()).then(|| Path::parse(prefix).ok()).flatten()
    }

    /// Returns `key` without the remote's prefix, or `None` if the key is outside it.
    pub(super) fn relative<'a>(&self, key: &'a Path) -> Option<&'a str> {
        match self.backend.prefix() {
            "" => Some(key.as_ref()),
            prefix => key.as_ref().strip_prefix(prefix)?.strip_prefix('/'),
        }
    }

    /// Returns the first refusal of a write because of a missing permission.
    pub(super) fn refusal(&self) -> Option<&Error> {
        self.refusal.get()
    }

    /// Returns the bucket's region as reported by the server, if it differs from the region that requests are signed
    /// for.
    pub(super) fn reported_region(&self) -> Option<String> {
        self.backend.reported_region()
    }

    /// Returns the retry policy.
    pub(super) fn retry(&self) -> &Retry {
        &self.retry
    }

    /// Returns the names of bucket, endpoint and region, for messages.
    pub(super) fn endpoint_context(&self) -> &EndpointContext {
        self.backend.endpoint_context()
    }

    /// Translates an error of `object_store`. `what_failed` is the failed operation.
    pub(super) async fn failed(&self, error: object_store::Error, what_failed: &str) -> Error {
        self.backend.explain(error, what_failed).await
    }

    /// Translates an error of a write as [`failed`](Self::failed) does. Remembers a refusal because of a missing
    /// permission, so that further writes are skipped.
    pub(super) async fn failed_write(&self, error: object_store::Error, what_failed: &str) -> Error {
        let refused = backend::refuses_write(&error);
        let error = self.failed(error, what_failed).await;
        if !refused {
            return error;
        }
        let refusal = Error::new(ErrorKind::Unauthorized, error.message()).tier(Tier::Remote).hint(format!(
            "{}, or make the remote read-only: {}",
            self.backend.write_permission_hint(&error),
            REMOTE_MODE.set_to("ro")
        ));
        self.refusal.get_or_init(|| refusal.clone());
        refusal
    }

    /// Returns `None` if the object does not exist, or if that cannot be told from a missing permission: without
    /// `s3:ListBucket`, S3 answers 403 for a missing object, too.
    ///
    /// # Errors
    /// `Unauthorized` with the server's message if the object is listed and may not be read.
    pub(super) async fn none_if_missing<T>(
        &self,
        response: object_store::Result<T>,
        key: &Path,
        what_failed: &str,
    ) -> Result<Option<T>> {
        match response {
            Ok(value) => Ok(Some(value)),
            Err(error) if backend::is_ambiguous(&error) => match self.is_listed(key).await? {
                Some(true) => Err(self.failed(error, what_failed).await),
                Some(false) => Ok(None),
                None => {
                    warn_ambiguous(self.endpoint_context(), Some(&self.failed(error, what_failed).await));
                    Ok(None)
                }
            },
            Err(error) => match self.failed(error, what_failed).await {
                error if error.kind() == ErrorKind::NotFound => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Returns whether a listing names `key`; see [`listed`](Self::listed).
    async fn is_listed(&self, key: &Path) -> Result<Option<bool>> {
        Ok(self.listed(key).await?.map(|identity| identity.is_some()))
    }

    /// Looks for `key` on the first page of the listing of its folder, and returns its identity there. Returns
    /// `Some(None)` if the key does not exist. Returns `None` if this is not known: listing is not permitted, or the
    /// key is not on the first page and more pages follow. Not retried.
    pub(super) async fn listed(&self, key: &Path) -> Result<Option<Option<ObjectIdentity>>> {
        if self.listing_is_denied.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let folder = key.as_ref().rsplit_once('/').and_then(|(folder, _)| Path::parse(folder).ok());
        match self.backend.list_page(folder.as_ref(), true, None).await {
            Ok(page) => match page.result.objects.iter().find(|object| object.location == *key) {
                Some(object) => Ok(Some(Some(identity(object)))),
                None => Ok(page.page_token.is_none().then_some(None)),
            },
            Err(error) if backend::is_ambiguous(&error) => {
                self.listing_is_denied.store(true, Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(self.failed(error, "cannot list the remote").await),
        }
    }

    /// Reads a whole object of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the object is larger.
    pub(super) async fn get(&self, key: &Path, bytes_max: u64) -> Result<Option<(Bytes, ObjectIdentity)>> {
        let what_failed = format!("cannot read {key}");
        self.retry
            .run(|| async {
                let Some(response) =
                    self.none_if_missing(self.backend.objects().get(key).await, key, &what_failed).await?
                else {
                    return Ok(None);
                };
                let identity = identity(&response.meta);
                let too_big = || Error::corrupt(format!("{key} has more than {bytes_max} bytes")).tier(Tier::Remote);
                if identity.object_bytes > bytes_max {
                    return Err(too_big());
                }
                let limits = BodyLimits::metadata(bytes_max, self.retry.read_timeout());
                let (bytes, body_error) = read_body(self.stream(response, what_failed.clone()), limits).await;
                if let Some(body_error) = body_error {
                    return Err(body_error.into_error(key, |error| error).tier(Tier::Remote));
                }
                if bytes.len() as u64 != identity.object_bytes {
                    let message = format!("{what_failed}: received {} of {} bytes", bytes.len(), identity.object_bytes);
                    return Err(Error::unavailable(message).tier(Tier::Remote));
                }
                Ok(Some((Bytes::from(bytes), identity)))
            })
            .await
    }

    /// Returns ETag and size of an object, or `None` if it does not exist.
    pub(super) async fn head(&self, key: &Path) -> Result<Option<ObjectIdentity>> {
        let what_failed = format!("cannot get the metadata of {key}");
        self.retry
            .run(|| async {
                let response = self.none_if_missing(self.backend.objects().head(key).await, key, &what_failed).await?;
                Ok(response.map(|meta| identity(&meta)))
            })
            .await
    }

    /// Returns the modification time of an object in milliseconds since the Unix epoch by the store's clock, or `None`
    /// if the object does not exist. Not retried.
    pub(super) async fn written_at_ms(&self, key: &Path) -> Result<Option<i64>> {
        let what_failed = format!("cannot examine {key}");
        let response = self.none_if_missing(self.backend.objects().head(key).await, key, &what_failed).await?;
        Ok(response.map(|meta| meta.last_modified.timestamp_millis()))
    }

    /// Returns the names of the folders directly in `folder`, or none if listing is not permitted.
    pub(super) async fn folder_names(&self, folder: &Path) -> Result<Vec<String>> {
        let mut folder_names = Vec::new();
        self.for_each_page(Some(folder), true, |page| {
            folder_names.extend(page.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)));
            within_files_max(folder_names.len()).map(|()| true)
        })
        .await?;
        Ok(folder_names)
    }

    /// Returns the key of a non-empty object directly in `folder`, or `None` if none exists or listing is not
    /// permitted. Such an object comes from another tool: folder markers are empty, and modelcache's own records lie
    /// one level deeper.
    pub(super) async fn first_nonempty_object(&self, folder: &Path) -> Result<Option<String>> {
        let mut found = None;
        let listed = self.for_each_page(Some(folder), true, |page| {
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
    /// has one. Weak and strong ETags with the same text are equal.
    pub(super) async fn read(&self, key: &Path, range: Range<u64>, wanted: &ObjectIdentity) -> Result<ReadBody> {
        let etag = wanted.etag.as_deref();
        // The ETag comes from a manifest or a listing. `object_store` panics on one that is not a valid header value.
        if etag.is_some_and(|etag| http::HeaderValue::from_str(etag).is_err()) {
            return Err(Error::corrupt(format!(
                "the ETag recorded for {key} contains characters that are invalid in an ETag"
            ))
            .tier(Tier::Remote));
        }
        let what_failed = format!("cannot read {key}");
        let options = |ranged: bool| GetOptions {
            range: ranged.then(|| GetRange::Bounded(range.clone())),
            if_match: etag.and_then(if_match),
            ..GetOptions::default()
        };
        // A server without range support sends the whole object, which `object_store` refuses: request it without a
        // range.
        let response = match self.backend.objects().get_opts(key, options(true)).await {
            Err(error) if backend::ignores_range(&error) => self.backend.objects().get_opts(key, options(false)).await,
            response => response,
        };
        match response {
            // A store that ignores `If-Match` still sends the ETag and the size of the object.
            Ok(response)
                if etag.is_some_and(|etag| etag_differs(etag, response.meta.e_tag.as_deref()))
                    || response.meta.size != wanted.object_bytes =>
            {
                Ok(ReadBody::Changed)
            }
            Ok(response) => {
                let etag = response.meta.e_tag.clone();
                Ok(ReadBody::Stream { start: response.range.start, etag, stream: self.stream(response, what_failed) })
            }
            Err(error) if etag.is_some() && backend::condition_failed(&error) => Ok(ReadBody::Changed),
            Err(error) => Err(self.failed(error, &what_failed).await),
        }
    }

    /// Returns the body of a response. Fails if the connection is silent for the read timeout or has nearly stalled.
    fn stream(&self, response: object_store::GetResult, what_failed: String) -> BoxStream<'static, Result<Bytes>> {
        let endpoint_context = self.endpoint_context().clone();
        let read_timeout = self.retry.read_timeout();
        match response.payload {
            // `object_store` would read 8 KiB at a time, each with a switch to another thread.
            GetResultPayload::File(file, _) => chunks(response.range, move |buffer, offset| {
                file.read_at(buffer, offset).map_err(|io| backend::from_io(&io, &what_failed, &endpoint_context))
            }),
            GetResultPayload::Stream(stream) => {
                let stream = stream.map_err({
                    let what_failed = what_failed.clone();
                    move |error| backend::translate(error, &what_failed, &endpoint_context)
                });
                with_idle_limit(stream.boxed(), read_timeout, what_failed)
            }
        }
    }

    /// Returns the checksums that the backend stores for an object, or `None` if the object does not exist or the
    /// backend has no checksums.
    pub(super) async fn stored_checksums(&self, key: &Path) -> Result<Option<StoredChecksums>> {
        let what_failed = format!("cannot examine {key}");
        let ask = || async { self.none_if_missing(self.backend.stored_checksums(key).await, key, &what_failed).await };
        self.retry.run(ask).await.map(Option::flatten)
    }

    /// Writes a small object in one request.
    pub(super) async fn put(&self, key: &Path, bytes: Bytes, condition: Condition<'_>) -> Result<PutOutcome> {
        let what_failed = format!("cannot write {key}");
        let mode = match condition {
            Condition::Always => PutMode::Overwrite,
            Condition::Absent => PutMode::Create,
            Condition::Matches(etag) => PutMode::Update(UpdateVersion { e_tag: Some(etag.to_owned()), version: None }),
        };
        self.retry
            .run(|| async {
                match self.backend.put(key, bytes.clone(), mode.clone()).await {
                    Ok(put) => {
                        Ok(PutOutcome::Done(ObjectIdentity { etag: put.e_tag, object_bytes: bytes.len() as u64 }))
                    }
                    // HTTP 412. A 409 (concurrent conditional write) is transient and retried.
                    Err(error) if !matches!(condition, Condition::Always) && backend::condition_failed(&error) => {
                        Ok(PutOutcome::ConditionFailed)
                    }
                    Err(error) if !matches!(condition, Condition::Always) && backend::condition_unsupported(&error) => {
                        Ok(PutOutcome::ConditionUnsupported)
                    }
                    Err(error) => Err(self.failed_write(error, &what_failed).await),
                }
            })
            .await
    }

    /// Removes an object. Succeeds if it does not exist.
    pub(super) async fn delete(&self, key: &Path) -> Result<()> {
        let what_failed = format!("cannot remove {key}");
        self.retry
            .run(|| async {
                match self.backend.objects().delete(key).await {
                    Ok(()) => Ok(()),
                    Err(error) => match self.failed(error, &what_failed).await {
                        error if error.kind() == ErrorKind::NotFound => Ok(()),
                        error => Err(error),
                    },
                }
            })
            .await
    }

    /// Lists every object below `prefix`. Returns `None` if listing is not permitted.
    pub(super) async fn list(&self, prefix: Option<&Path>) -> Result<Option<Vec<ObjectMeta>>> {
        self.list_matching(prefix, |_| true).await
    }

    /// Lists the objects below `prefix` that `wanted` accepts. Other objects are not kept in memory. Returns `None` if
    /// listing is not permitted.
    ///
    /// # Errors
    /// `Invalid` for more than [`limits::FILES_MAX`] accepted objects.
    pub(super) async fn list_matching(
        &self,
        prefix: Option<&Path>,
        mut wanted: impl FnMut(&ObjectMeta) -> bool,
    ) -> Result<Option<Vec<ObjectMeta>>> {
        let mut objects = Vec::new();
        let listed = self.for_each_page(prefix, false, |page| {
            objects.extend(page.objects.into_iter().filter(&mut wanted));
            within_files_max(objects.len()).map(|()| true)
        });
        match listed.await {
            Ok(permitted) => Ok(permitted.then_some(objects)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Some(Vec::new())),
            Err(error) => Err(error),
        }
    }

    /// Lists the objects below `prefix` and passes each page to `handle_page`, until `handle_page` returns false. With
    /// `one_level`, lists only the objects and folders directly in `prefix`. Returns false if listing is not permitted.
    ///
    /// # Errors
    /// `Corrupt` for a listing that does not end, see [`Paging`].
    pub(super) async fn for_each_page(
        &self,
        prefix: Option<&Path>,
        one_level: bool,
        mut handle_page: impl FnMut(ListResult) -> Result<bool>,
    ) -> Result<bool> {
        let what_failed = "cannot list the remote";
        let (mut paging, mut token) = (Paging::default(), None);
        loop {
            let page = self.retry.run(|| async {
                match self.backend.list_page(prefix, one_level, token.clone()).await {
                    Ok(page) => Ok(Some(page)),
                    Err(error) if backend::is_ambiguous(&error) => Ok(None),
                    Err(error) => Err(self.failed(error, what_failed).await),
                }
            });
            let Some(PaginatedListResult { result, page_token }) = page.await? else { return Ok(false) };
            // The end of this page, by which `Paging` checks that the pages advance: the last object, the last folder,
            // and the last key that the backend left out because `object_store` cannot represent it.
            let skipped =
                result.extensions.get::<SkippedKeys>().and_then(|SkippedKeys(keys)| keys.last().map(String::as_str));
            let last = [
                result.objects.last().map(|object| object.location.as_ref()),
                result.common_prefixes.last().map(AsRef::as_ref),
                skipped,
            ];
            let last = last.into_iter().flatten().collect::<Vec<_>>().join("\n");
            let next = page_token.as_deref().filter(|token| !token.is_empty());
            paging
                .record_page(Some(last.as_str()).filter(|last| !last.is_empty()), next)
                .map_err(|error| error.tier(Tier::Remote))?;
            token = next.map(str::to_owned);
            if !handle_page(result)? || token.is_none() {
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

/// Returns true if the ETag `current` is known and differs from `etag`. Quotes are ignored, because some stores omit
/// them in listings, and so is the mark of a weak ETag, which some send in one kind of response only.
pub(super) fn etag_differs(etag: &str, current: Option<&str>) -> bool {
    current.is_some_and(|current| opaque(current) != opaque(etag))
}

/// Returns the text of an ETag.
fn opaque(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"')
}

/// Returns the value of `If-Match` for an ETag; `None` for a weak one, which never matches (RFC 9110, 13.1.1).
fn if_match(etag: &str) -> Option<String> {
    (!etag.starts_with("W/")).then(|| format!("\"{}\"", opaque(etag)))
}

pub(super) fn identity(meta: &ObjectMeta) -> ObjectIdentity {
    ObjectIdentity { etag: meta.e_tag.clone(), object_bytes: meta.size }
}

/// Warns about an ambiguous 403, and quotes it. Warns once per process, because the bucket sends one for every missing
/// object.
pub(super) fn warn_ambiguous(context: &EndpointContext, response: Option<&Error>) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            bucket = context.container,
            response = response.map(Error::message),
            "the remote answers 403 for an object that may just be missing, and listing is not permitted; the object is treated as missing. Grant s3:ListBucket, and s3:GetObject if the object exists"
        );
    }
}

/// Ends a stream with an error if no bytes arrive for `read_timeout`, or if the connection has nearly stalled.
fn with_idle_limit(
    stream: BoxStream<'static, Result<Bytes>>,
    read_timeout: Duration,
    what_failed: String,
) -> BoxStream<'static, Result<Bytes>> {
    let stall = StallDetector::new(read_timeout);
    futures::stream::unfold(Some((stream, what_failed, stall)), move |state| async move {
        let (mut stream, what_failed, mut stall) = state?;
        let wait_start = Instant::now();
        match tokio::time::timeout(read_timeout, stream.next()).await {
            Ok(Some(Ok(chunk))) if stall.record(chunk.len() as u64, wait_start.elapsed()) => {
                let error = Error::unavailable(format!("{what_failed}: the connection has nearly stalled"));
                Some((Err(error.tier(Tier::Remote)), None))
            }
            Ok(Some(item)) => {
                let next = item.is_ok().then_some((stream, what_failed, stall));
                Some((item, next))
            }
            Ok(None) => None,
            Err(_) => {
                let error = Error::unavailable(format!("{what_failed}: no bytes for {} s", read_timeout.as_secs_f32()));
                Some((Err(error.tier(Tier::Remote)), None))
            }
        }
    })
    .boxed()
}
