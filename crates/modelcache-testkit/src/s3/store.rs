//! The store behind the S3 stand-in: s3s-fs, corrected where it differs from S3.
//!
//! Corrected: conditions on GET and HEAD; races of conditional writes (one wins, and no reader gets the bytes of one
//! version with the ETag of another); ETags in listings; `NoSuchBucket`; folders are not objects; an upload with a
//! wrong digest leaves no object; unfinished uploads can be listed and survive a refused completion; an unknown upload
//! is `NoSuchUpload`.
//!
//! Remaining difference: an object is a file, so the keys `a` and `a/b` cannot both exist.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures::{TryStreamExt as _, stream};
use s3s::crypto::Checksum as _;
use s3s::dto::*;
use s3s::{S3, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::fault::Kind;
use crate::content::CHUNK;
use crate::faults::Faults;
use crate::serve::lock;

/// Largest body, in bytes, that is read before its key is locked, so that a slow client does not block other requests.
const SMALL_BYTES: i64 = 8 * 1024 * 1024;

type Answered<T> = S3Result<S3Response<T>>;

#[derive(Debug)]
pub(super) struct Store {
    inner: FileSystem,
    root: PathBuf,
    faults: Arc<Faults<Kind>>,
    locks: Mutex<HashMap<String, Arc<RwLock<()>>>>,
    uploads: Uploads,
}

/// Uploads that were neither completed nor aborted, by id.
pub(super) type Uploads = Arc<Mutex<BTreeMap<String, Upload>>>;

#[derive(Clone, Debug)]
pub(super) struct Upload {
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) initiated: SystemTime,
}

impl Store {
    pub(super) fn new(root: PathBuf, faults: Arc<Faults<Kind>>) -> anyhow::Result<Self> {
        let inner = FileSystem::new(&root).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        Ok(Self { inner, root, faults, locks: Mutex::default(), uploads: Uploads::default() })
    }

    pub(super) fn uploads(&self) -> Uploads {
        self.uploads.clone()
    }

    fn has_bucket(&self, bucket: &str) -> S3Result<()> {
        let found = self.root.join(bucket).is_dir();
        found.then_some(()).ok_or_else(|| s3_error!(NoSuchBucket, "The specified bucket does not exist"))
    }

    fn is_object(&self, bucket: &str, key: &str) -> bool {
        self.root.join(bucket).join(key).is_file()
    }

    fn takes_fault(&self, method: &str, bucket: &str, key: &str, wanted: fn(&Kind) -> bool) -> bool {
        self.faults.take(method, &format!("/{bucket}/{key}"), wanted).is_some()
    }

    fn ignores_conditions(&self, method: &str, bucket: &str, key: &str) -> bool {
        self.takes_fault(method, bucket, key, |kind| matches!(kind, Kind::IgnoreConditions))
    }

    /// Returns the error for a key without an object: 403 if the caller may not list, since S3 hides then that the key
    /// is missing.
    fn missing(&self, method: &str, bucket: &str, key: &str) -> s3s::S3Error {
        if self.takes_fault(method, bucket, key, |kind| matches!(kind, Kind::NoListPermission)) {
            s3_error!(AccessDenied, "Access Denied")
        } else {
            s3_error!(NoSuchKey, "The specified key does not exist.")
        }
    }

    fn lock_of(&self, bucket: &str, key: &str) -> Arc<RwLock<()>> {
        lock(&self.locks).entry(format!("{bucket}/{key}")).or_default().clone()
    }

    async fn reading(&self, bucket: &str, key: &str) -> OwnedRwLockReadGuard<()> {
        self.lock_of(bucket, key).read_owned().await
    }

    async fn writing(&self, bucket: &str, key: &str) -> OwnedRwLockWriteGuard<()> {
        self.lock_of(bucket, key).write_owned().await
    }

    fn known_upload(&self, id: &str) -> S3Result<()> {
        let known = lock(&self.uploads).contains_key(id);
        known.then_some(()).ok_or_else(|| s3_error!(NoSuchUpload, "The specified upload does not exist."))
    }

    /// Returns the ETag that s3s-fs noted, else the MD5 of the file. s3s-fs itself takes these two steps.
    fn e_tag(&self, bucket: &str, key: &str) -> io::Result<String> {
        let noted = std::fs::read(note_path(&self.root, bucket, key)).ok();
        let noted = noted.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
        if let Some(tag) = noted.as_ref().and_then(|note| note["e_tag"].as_str()) {
            return Ok(tag.to_owned());
        }
        let mut hasher = s3s::crypto::Md5::new();
        let mut file = File::open(self.root.join(bucket).join(key))?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match io::Read::read(&mut file, &mut buffer)? {
                0 => return Ok(hex::encode(hasher.finalize())),
                read => hasher.update(&buffer[..read]),
            }
        }
    }

    fn tag_listed(&self, bucket: &str, objects: Option<&mut Vec<Object>>) {
        for object in objects.into_iter().flatten() {
            let tag = object.key.as_deref().and_then(|key| self.e_tag(bucket, key).ok());
            object.e_tag = tag.map(ETag::Strong);
        }
    }
}

/// Returns the path of the file in which s3s-fs notes an object's ETag and checksums.
pub(super) fn note_path(root: &std::path::Path, bucket: &str, key: &str) -> PathBuf {
    let [bucket, key] = [bucket, key].map(|text| URL_SAFE_NO_PAD.encode(text));
    root.join(format!(".bucket-{bucket}.object-{key}.internal.json"))
}

/// Fails with 412 or 304 if the conditions of a read do not hold.
fn check_read(
    tag: Option<&ETag>,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<()> {
    let is = |condition: &ETagCondition| match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(wanted) => tag.is_some_and(|tag| tag.value() == wanted.value()),
    };
    if if_match.is_some_and(|condition| !is(condition)) {
        return Err(s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold"));
    }
    if if_none_match.is_some_and(is) {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

/// Returns a body that reads an open file in chunks of 256 KiB. s3s-fs reads 4 KiB at a time, which is slow.
fn file_body(file: File, start: u64, len: u64) -> StreamingBlob {
    let state = (file, start, start + len);
    StreamingBlob::wrap(stream::unfold(state, |(file, at, end)| async move {
        if at >= end {
            return None;
        }
        let size = CHUNK.min(end - at);
        let mut chunk = vec![0; usize::try_from(size).expect("a chunk fits in memory")];
        let read = file.read_exact_at(&mut chunk, at).map(|()| Bytes::from(chunk));
        let next = if read.is_ok() { at + size } else { end };
        Some((read, (file, next, end)))
    }))
}

/// Returns the first byte and the length of the content in an answer.
fn extent(output: &GetObjectOutput) -> Option<(u64, u64)> {
    let len = u64::try_from(output.content_length?).ok()?;
    let start = match &output.content_range {
        None => 0,
        Some(range) => range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()?,
    };
    Some((start, len))
}

#[async_trait]
impl S3 for Store {
    async fn get_object(&self, mut req: S3Request<GetObjectInput>) -> Answered<GetObjectOutput> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        self.has_bucket(&bucket)?;
        // Held until the answer is built: a write between the file and its ETag would mix two versions.
        let _held = self.reading(&bucket, &key).await;
        if !self.is_object(&bucket, &key) {
            return Err(self.missing("GET", &bucket, &key));
        }
        // s3s-fs must not see the conditions: they are checked here.
        let (if_match, if_none_match) = (req.input.if_match.take(), req.input.if_none_match.take());
        let conditional = if_match.is_some() || if_none_match.is_some();
        // The open file keeps its content even if a later write replaces the object while the body streams.
        let file = File::open(self.root.join(&bucket).join(&key)).map_err(|error| s3_error!(error, NoSuchKey))?;
        let mut answer = self.inner.get_object(req).await?;
        if conditional && !self.ignores_conditions("GET", &bucket, &key) {
            check_read(answer.output.e_tag.as_ref(), if_match.as_ref(), if_none_match.as_ref())?;
        }
        if let Some((start, len)) = extent(&answer.output) {
            answer.output.body = Some(file_body(file, start, len));
        }
        Ok(answer)
    }

    async fn head_object(&self, mut req: S3Request<HeadObjectInput>) -> Answered<HeadObjectOutput> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        self.has_bucket(&bucket)?;
        let _held = self.reading(&bucket, &key).await;
        if !self.is_object(&bucket, &key) {
            return Err(self.missing("HEAD", &bucket, &key));
        }
        let (if_match, if_none_match) = (req.input.if_match.take(), req.input.if_none_match.take());
        let conditional = if_match.is_some() || if_none_match.is_some();
        let answer = self.inner.head_object(req).await?;
        if conditional && !self.ignores_conditions("HEAD", &bucket, &key) {
            check_read(answer.output.e_tag.as_ref(), if_match.as_ref(), if_none_match.as_ref())?;
        }
        Ok(answer)
    }

    async fn put_object(&self, mut req: S3Request<PutObjectInput>) -> Answered<PutObjectOutput> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        self.has_bucket(&bucket)?;
        let conditional = req.input.if_match.is_some() || req.input.if_none_match.is_some();
        // Without the conditions, s3s-fs overwrites.
        if conditional && self.ignores_conditions("PUT", &bucket, &key) {
            (req.input.if_match, req.input.if_none_match) = (None, None);
        }
        // Read a small body before taking the lock.
        if req.input.content_length.is_some_and(|len| len <= SMALL_BYTES)
            && let Some(body) = req.input.body.take()
        {
            let chunks: Vec<Bytes> = body
                .try_collect()
                .await
                .map_err(|error| s3s::S3Error::with_source(S3ErrorCode::IncompleteBody, error))?;
            let chunks = chunks.into_iter().map(Ok::<_, io::Error>);
            req.input.body = Some(StreamingBlob::wrap(stream::iter(chunks)));
        }
        // One writer per key at a time, so that of several conditional writes only one succeeds.
        let _held = self.writing(&bucket, &key).await;
        let existed = self.is_object(&bucket, &key);
        let answer = self.inner.put_object(req).await;
        // s3s-fs leaves the file behind if the digest does not match.
        if answer.is_err() && !existed {
            let _ = std::fs::remove_file(self.root.join(&bucket).join(&key));
        }
        answer
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> Answered<DeleteObjectOutput> {
        let _held = self.writing(&req.input.bucket, &req.input.key).await;
        self.inner.delete_object(req).await
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> Answered<DeleteObjectsOutput> {
        self.has_bucket(&req.input.bucket)?;
        self.inner.delete_objects(req).await
    }

    async fn copy_object(&self, req: S3Request<CopyObjectInput>) -> Answered<CopyObjectOutput> {
        let _held = self.writing(&req.input.bucket, &req.input.key).await;
        self.inner.copy_object(req).await
    }

    async fn list_objects(&self, req: S3Request<ListObjectsInput>) -> Answered<ListObjectsOutput> {
        let bucket = req.input.bucket.clone();
        let mut answer = self.inner.list_objects(req).await?;
        self.tag_listed(&bucket, answer.output.contents.as_mut());
        Ok(answer)
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> Answered<ListObjectsV2Output> {
        let (bucket, prefix) = (req.input.bucket.clone(), req.input.prefix.clone().unwrap_or_default());
        if self.takes_fault("GET", &bucket, &prefix, |kind| matches!(kind, Kind::NoListPermission)) {
            return Err(s3_error!(AccessDenied, "Access Denied"));
        }
        let mut answer = self.inner.list_objects_v2(req).await?;
        self.tag_listed(&bucket, answer.output.contents.as_mut());
        Ok(answer)
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> Answered<CreateMultipartUploadOutput> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        self.has_bucket(&bucket)?;
        let answer = self.inner.create_multipart_upload(req).await?;
        if let Some(id) = answer.output.upload_id.clone() {
            // s3s-fs cannot list uploads, so keep a list here.
            lock(&self.uploads).insert(id, Upload { bucket, key, initiated: SystemTime::now() });
        }
        Ok(answer)
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> Answered<UploadPartOutput> {
        self.known_upload(&req.input.upload_id)?;
        self.inner.upload_part(req).await
    }

    async fn upload_part_copy(&self, req: S3Request<UploadPartCopyInput>) -> Answered<UploadPartCopyOutput> {
        self.known_upload(&req.input.upload_id)?;
        self.inner.upload_part_copy(req).await
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> Answered<ListPartsOutput> {
        self.known_upload(&req.input.upload_id)?;
        self.inner.list_parts(req).await
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> Answered<ListMultipartUploadsOutput> {
        self.has_bucket(&req.input.bucket)?;
        let prefix = req.input.prefix.unwrap_or_default();
        let uploads = lock(&self.uploads).clone();
        let here = uploads.into_iter().filter(|(_, up)| up.bucket == req.input.bucket && up.key.starts_with(&prefix));
        let mut rows: Vec<MultipartUpload> = here
            .map(|(id, upload)| MultipartUpload {
                key: Some(upload.key),
                upload_id: Some(id),
                initiated: Some(upload.initiated.into()),
                ..Default::default()
            })
            .collect();
        rows.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(req.input.bucket),
            is_truncated: Some(false),
            uploads: Some(rows),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        mut req: S3Request<CompleteMultipartUploadInput>,
    ) -> Answered<CompleteMultipartUploadOutput> {
        let (bucket, key, id) = (req.input.bucket.clone(), req.input.key.clone(), req.input.upload_id.clone());
        self.known_upload(&id)?;
        let conditional = req.input.if_match.is_some() || req.input.if_none_match.is_some();
        if conditional && self.ignores_conditions("POST", &bucket, &key) {
            (req.input.if_match, req.input.if_none_match) = (None, None);
        }
        let _held = self.writing(&bucket, &key).await;
        // s3s-fs removes its upload record before it checks the parts. On S3, a refused completion leaves the upload
        // open, so restore the record.
        let ticket = self.root.join(format!(".upload-{id}.json"));
        let kept = std::fs::read(&ticket);
        let answer = self.inner.complete_multipart_upload(req).await;
        match (&answer, kept) {
            (Err(_), Ok(kept)) => std::fs::write(&ticket, kept).map_err(s3s::S3Error::internal_error)?,
            // The upload was completed, or it had no record.
            _ => drop(lock(&self.uploads).remove(&id)),
        }
        answer
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> Answered<AbortMultipartUploadOutput> {
        let id = req.input.upload_id.clone();
        self.known_upload(&id)?;
        // Before the call below: if the client disconnects and this future is dropped, the upload still counts as
        // aborted.
        lock(&self.uploads).remove(&id);
        self.inner.abort_multipart_upload(req).await
    }

    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> Answered<CreateBucketOutput> {
        self.inner.create_bucket(req).await
    }

    async fn delete_bucket(&self, req: S3Request<DeleteBucketInput>) -> Answered<DeleteBucketOutput> {
        self.inner.delete_bucket(req).await
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> Answered<HeadBucketOutput> {
        self.inner.head_bucket(req).await
    }

    async fn get_bucket_location(&self, req: S3Request<GetBucketLocationInput>) -> Answered<GetBucketLocationOutput> {
        self.inner.get_bucket_location(req).await
    }

    async fn list_buckets(&self, req: S3Request<ListBucketsInput>) -> Answered<ListBucketsOutput> {
        self.inner.list_buckets(req).await
    }
}
