//! Server-side copies within a bucket, on the condition that the source is unchanged.
//!
//! `object_store` has no conditional copy and no copy above 5 GiB, so the requests `CopyObject` and `UploadPartCopy` go
//! through the [`RawClient`]. Large objects are copied as a multipart upload.

use super::raw_client::{RawClient, part_query};
use super::settings::Options;
use super::xml;
use crate::error::{Error, Result, Tier};
use crate::remote::backend::{CopyOutcome, CopyRequest, MultipartUploads, failure};
use crate::remote::multipart::AbortGuard;
use crate::remote::store::Store;
use futures::{StreamExt, TryStreamExt};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use object_store::aws::AmazonS3ConfigKey;
use object_store::multipart::PartId;
use std::sync::Arc;
use std::time::Duration;

/// Largest object copied in one request, and smallest part of a larger one, in bytes. S3 allows 5 GiB, but responds to
/// such a request only after minutes.
const SINGLE_COPY_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Most parts of a copy, below S3's limit of 10,000.
const PARTS_MAX: u64 = 9_000;
/// Concurrent part copies of one object.
const PARTS_IN_FLIGHT: usize = 4;
/// Slowest server-side copy that does not time out, in bytes per second.
const BYTES_PER_S_MIN: u64 = 4 * 1024 * 1024;

/// Sends copy and part requests for one bucket.
pub(super) struct Copier {
    client: Arc<RawClient>,
    /// Headers that set the encryption of the copy.
    headers: HeaderMap,
}

impl Copier {
    /// Returns `None` if one of the remote's options is not supported by copies. All files are uploaded then.
    pub(super) fn new(client: &Arc<RawClient>, options: &Options) -> Option<Self> {
        let mut copier = Self { client: client.clone(), headers: HeaderMap::new() };
        options.passed_on.iter().try_for_each(|(key, value)| copier.apply_option(key, value.expose())).ok()?;
        Some(copier)
    }

    /// Returns the client that uploads parts with a known digest.
    pub(super) fn client(&self) -> &RawClient {
        &self.client
    }

    /// Translates one option into a header. Fails for an option that copies do not support.
    fn apply_option(&mut self, key: &AmazonS3ConfigKey, value: &str) -> std::result::Result<(), ()> {
        let header = match key.as_ref() {
            "aws_server_side_encryption" => "x-amz-server-side-encryption",
            "aws_sse_kms_key_id" => "x-amz-server-side-encryption-aws-kms-key-id",
            "aws_sse_bucket_key_enabled" => "x-amz-server-side-encryption-bucket-key-enabled",
            // The `RawClient` applies the option, or the option has no effect on a copy.
            "aws_request_payer" | "aws_unsigned_payload" | "aws_disable_tagging" => return Ok(()),
            _ => return Err(()),
        };
        let value = HeaderValue::from_str(value).map_err(|_| ())?;
        self.headers.insert(HeaderName::from_static(header), value);
        Ok(())
    }

    /// Sends a copy request for `bytes` bytes and returns the body of the response.
    async fn request(
        &self,
        store: &Store,
        copy: &CopyRequest<'_>,
        query: &str,
        bytes: u64,
        mut headers: HeaderMap,
    ) -> Result<String> {
        let what_failed = format!("cannot copy {} to {}", copy.from, copy.to);
        // The store refuses the copy if the source was replaced since its manifest was written.
        if let Some(etag) = &copy.recorded.etag {
            match HeaderValue::from_str(etag) {
                Ok(etag) => drop(headers.insert("x-amz-copy-source-if-match", etag)),
                Err(cause) => {
                    tracing::debug!(%cause, "an ETag is not a valid header value; copying without a condition")
                }
            }
        }
        let extra = Duration::from_secs(bytes / BYTES_PER_S_MIN);
        let response = self.client.copy(copy.from, copy.to, query, &headers, extra).await;
        let body = response.map_err(|error| failure::translate(error, &what_failed, store.endpoint_context()))?;
        // S3 may send the status 200 and report the failure of a copy in the body.
        match xml::text(&body, "Code").filter(|_| xml::elements(&body, "Error").next().is_some()) {
            Some(code) => {
                Err(Error::unavailable(format!("{what_failed}: the server reported {code}")).tier(Tier::Remote))
            }
            None => Ok(body),
        }
    }
}

/// Copies `copy.from` to `copy.to` if the source still is `copy.recorded`.
pub(super) async fn copy(
    store: &Arc<Store>,
    copier: &Copier,
    uploads: &dyn MultipartUploads,
    copy: &CopyRequest<'_>,
) -> Result<CopyOutcome> {
    let bytes = copy.recorded.object_bytes;
    let etag = match bytes <= SINGLE_COPY_BYTES_MAX {
        true => Some(copy_whole(store, copier, copy).await?),
        false => {
            let part_bytes = bytes.div_ceil(PARTS_MAX).max(SINGLE_COPY_BYTES_MAX);
            copy_in_parts(store, copier, uploads, copy, part_bytes).await?
        }
    };
    Ok(CopyOutcome::Done(etag))
}

/// Copies an object in one request. Returns the ETag of the copy.
async fn copy_whole(store: &Store, copier: &Copier, copy: &CopyRequest<'_>) -> Result<String> {
    let body = copier.request(store, copy, "", copy.recorded.object_bytes, copier.headers.clone()).await?;
    etag_in(&body)
}

/// Copies an object as a multipart upload: each part is a range of the source. Returns the ETag of the copy.
async fn copy_in_parts(
    store: &Arc<Store>,
    copier: &Copier,
    uploads: &dyn MultipartUploads,
    copy: &CopyRequest<'_>,
    part_bytes: u64,
) -> Result<Option<String>> {
    let what_failed = format!("cannot copy {} to {}", copy.from, copy.to);
    let failed = |error| failure::translate(error, &what_failed, store.endpoint_context());
    let id = uploads.create(copy.to).await.map_err(failed)?;
    // No claim lists this upload, so the guard aborts it after an error and when this future is dropped.
    let mut guard = AbortGuard::new(store.clone(), copy.to.clone(), id.clone());
    let parts = (0..copy.recorded.object_bytes.div_ceil(part_bytes)).map(|index| {
        let (id, start) = (id.clone(), index * part_bytes);
        let end = (start + part_bytes).min(copy.recorded.object_bytes);
        async move {
            let mut headers = HeaderMap::new();
            if let Ok(range) = HeaderValue::from_str(&format!("bytes={start}-{}", end - 1)) {
                headers.insert(HeaderName::from_static("x-amz-copy-source-range"), range);
            }
            let body = copier.request(store, copy, &part_query(&id, index), end - start, headers).await?;
            Ok(PartId { content_id: etag_in(&body)? })
        }
    });
    let parts = futures::stream::iter(parts.collect::<Vec<_>>()).buffered(PARTS_IN_FLIGHT);
    let copied = match parts.try_collect::<Vec<_>>().await {
        Ok(parts) => uploads.complete(copy.to, &id, parts).await.map_err(failed),
        Err(error) => Err(error),
    };
    match copied {
        Ok(etag) => {
            guard.disarm();
            Ok(etag)
        }
        Err(error) => {
            guard.abort().await;
            Err(error)
        }
    }
}

/// Returns the ETag in the response to a copy.
fn etag_in(body: &str) -> Result<String> {
    xml::text(body, "ETag").ok_or_else(|| {
        Error::unavailable("the response to a copy contains no ETag").tier(Tier::Remote).transient(false)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, RemoteConfig, RetryConfig};
    use crate::manifest::ObjectIdentity;
    use crate::remote::backend::s3::S3Backend;
    use crate::transfer::Retry;
    use modelcache_testkit::{Content, S3};
    use object_store::path::Path;

    const MIB: u64 = 1024 * 1024;

    async fn bucket(options: &[(&str, &str)]) -> (S3, Arc<Store>, Arc<S3Backend>) {
        let s3 = S3::start().await.expect("starts");
        s3.bucket("models").expect("bucket");
        let config = RemoteConfig {
            url: "s3://models/p q".into(),
            options: options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            environment: Environment(s3.env().into_iter().collect()),
        };
        let (options, retry) = (Options::parse(&config).expect("options"), Retry::new(RetryConfig::default()));
        let policy = retry.clone();
        let opened = tokio::task::spawn_blocking(move || S3Backend::open(&config, "models", "p q", &options, &policy));
        let backend = Arc::new(opened.await.expect("ends").expect("opens"));
        (s3, Arc::new(Store::new(backend.clone(), retry)), backend)
    }

    async fn recorded(store: &Store, key: &Path) -> ObjectIdentity {
        store.head(key).await.expect("responds").expect("exists")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_large_object_is_copied_in_parts() {
        let (s3, store, backend) = bucket(&[]).await;
        let content = Content::generated(5, 13 * MIB + 7);
        s3.put("models", "p q/a/ü+%.bin", content.clone()).expect("puts");
        let (from, to) = (store.key("a/ü+%.bin").expect("key"), store.key("b/ü+%.bin").expect("key"));
        let recorded = recorded(&store, &from).await;
        let copy = CopyRequest { from: &from, recorded: &recorded, to: &to, staging: &to };
        let copier = backend.copier().expect("copies");
        copy_in_parts(&store, copier, &*backend, &copy, 5 * MIB).await.expect("copies");
        assert!(s3.object("models", "p q/b/ü+%.bin") == Some(content.to_vec().expect("content")));
        let parts = s3.requests().iter().filter(|seen| seen.query.contains("partNumber")).count();
        assert_eq!(parts, 3);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_refused_part_copy_leaves_no_upload_behind() {
        use modelcache_testkit::s3::S3Fault;
        let (s3, store, backend) = bucket(&[]).await;
        s3.put("models", "p q/a", Content::generated(5, 11 * MIB)).expect("puts");
        let (from, to) = (store.key("a").expect("key"), store.key("b").expect("key"));
        let recorded = recorded(&store, &from).await;
        s3.faults().add(S3Fault::internal_error().on("partNumber=2"));
        let copy = CopyRequest { from: &from, recorded: &recorded, to: &to, staging: &to };
        let copier = backend.copier().expect("copies");
        copy_in_parts(&store, copier, &*backend, &copy, 5 * MIB).await.expect_err("refused");
        assert_eq!(s3.keys("models"), ["p q/a"]);
        let aborted =
            |seen: &modelcache_testkit::log::LoggedRequest| seen.method == "DELETE" && seen.query.contains("uploadId");
        assert!(s3.requests().iter().any(aborted), "the upload is aborted");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn unsupported_options_disable_server_side_copies() {
        let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, [7; 32]);
        for options in [&[("sse_customer_key_base64", key.as_str())][..], &[("checksum_algorithm", "sha256")]] {
            assert!(bucket(options).await.2.copier().is_none(), "{options:?}");
        }
        let (_s3, _store, backend) = bucket(&[("sse", "aws:kms"), ("sse_kms_key_id", "k")]).await;
        assert_eq!(backend.copier().expect("copies").headers.len(), 2);
    }
}
