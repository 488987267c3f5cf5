//! Signed S3 requests that `object_store` does not offer: checksums of an object, listings of multipart uploads,
//! conditional copies, and uploads of parts with a known digest.
//!
//! [`RawClient`] is the only place that builds and signs such requests. `copy.rs` and `uploads.rs` use it.

use super::credentials::Credentials;
use super::http_client::{Connector, ExtraTimeout};
use super::settings::{Options, S3Settings};
use crate::digest::Digest;
use crate::remote::backend::StoredChecksums;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::request::Builder;
use http::{HeaderMap, Method};
use object_store::CredentialProvider as _;
use object_store::aws::{AmazonS3ConfigKey, AwsAuthorizer};
use object_store::client::{HttpClient, HttpRequestBody, HttpResponse};
use object_store::multipart::PartId;
use object_store::path::Path;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::sync::Arc;
use std::time::Duration;

/// Encodes everything but the unreserved characters of RFC 3986 and the slash, as SigV4 requires for a path.
const PATH_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
/// Metadata header with the digest of the object, set by upload tools.
const METADATA_HEADER: &str = "x-amz-meta-sha256";
/// Header with the SHA-256 that S3 verified at upload.
const CHECKSUM_HEADER: &str = "x-amz-checksum-sha256";
/// Header with the type of that checksum: `FULL_OBJECT` or `COMPOSITE`.
const CHECKSUM_TYPE_HEADER: &str = "x-amz-checksum-type";

/// Sends signed requests to one bucket.
pub(super) struct RawClient {
    client: HttpClient,
    credentials: Arc<Credentials>,
    bucket: String,
    /// URL of the bucket, without a slash at its end.
    url: String,
    region: String,
    signs_payload: bool,
    request_payer: bool,
}

/// Returns false if an option is on that changes how read requests are signed or encrypted. [`RawClient`] is then not
/// used for reads: the remote reads no checksums of objects, and cannot list multipart uploads. Copies and uploads of
/// parts support `request_payer` all the same.
pub(super) fn supports_reads(options: &Options) -> bool {
    use AmazonS3ConfigKey as Key;
    let needs_customer_key = options.passed_on.iter().any(|(key, _)| key.as_ref() == "aws_sse_customer_key_base64");
    let changes_reads =
        [Key::SkipSignature, Key::RequestPayer, Key::S3Express].into_iter().any(|key| options.is_on(key));
    !needs_customer_key && !changes_reads
}

impl RawClient {
    pub(super) fn new(
        bucket: &str,
        settings: &S3Settings,
        options: &Options,
        connector: &Connector,
        credentials: &Arc<Credentials>,
    ) -> Self {
        Self {
            client: connector.object_store_client(),
            credentials: credentials.clone(),
            bucket: bucket.to_owned(),
            url: settings.endpoint.bucket_url(bucket, &settings.region),
            region: settings.region.clone(),
            signs_payload: settings.signs_payload(options),
            request_payer: options.is_on(AmazonS3ConfigKey::RequestPayer),
        }
    }

    /// Returns true if the signature of a request covers the digest of its body.
    pub(super) fn signs_payload(&self) -> bool {
        self.signs_payload
    }

    /// Returns a request for the object `key`, or for the bucket if `key` is `None`. `query` must be encoded.
    fn request(&self, method: Method, key: Option<&Path>, query: &str) -> Builder {
        let path = key.map(|key| format!("/{}", utf8_percent_encode(key.as_ref(), PATH_SET))).unwrap_or_default();
        let separator = if query.is_empty() { "" } else { "?" };
        http::Request::builder().method(method).uri(format!("{}{path}{separator}{query}", self.url))
    }

    /// Signs and sends a request. `sha256` is the digest of `body`. If it is `None`, the digest is computed if needed.
    async fn send(&self, request: Builder, body: Bytes, sha256: Option<Digest>) -> object_store::Result<HttpResponse> {
        let mut request = request.body(HttpRequestBody::from(body)).map_err(generic)?;
        let credential = self.credentials.get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.region)
            .with_sign_payload(self.signs_payload)
            .with_request_payer(self.request_payer)
            .try_authorize(&mut request, sha256.as_ref().map(|digest| digest.as_bytes().as_slice()))?;
        self.client.execute(request).await.map_err(generic)
    }

    /// Sends a GET request with `query` for the bucket. Returns the body of the response.
    pub(super) async fn get(&self, query: &str) -> object_store::Result<String> {
        text(self.send(self.request(Method::GET, None, query), Bytes::new(), None).await?).await
    }

    /// Sends a HEAD request with checksum mode for an object. Returns the checksums in the headers of the response.
    pub(super) async fn checksums(&self, key: &Path) -> object_store::Result<StoredChecksums> {
        let request = self.request(Method::HEAD, Some(key), "").header("x-amz-checksum-mode", "ENABLED");
        Ok(checksums_in(self.send(request, Bytes::new(), None).await?.headers()))
    }

    /// Uploads the part at `index` (from 0) of a multipart upload.
    pub(super) async fn put_part(
        &self,
        key: &Path,
        upload: &str,
        index: usize,
        bytes: Bytes,
        sha256: Digest,
    ) -> object_store::Result<PartId> {
        let request = self.request(Method::PUT, Some(key), &part_query(upload, index as u64));
        let request = request.header(http::header::CONTENT_LENGTH, bytes.len());
        let response = self.send(request, bytes, Some(sha256)).await?;
        let etag = response.headers().get(http::header::ETAG).and_then(|etag| etag.to_str().ok());
        let missing_etag = || generic("the response to the upload of a part contains no ETag");
        etag.map(|etag| PartId { content_id: etag.to_owned() }).ok_or_else(missing_etag)
    }

    /// Copies `from` to `to`, or to the part of an upload that `query` names. Returns the body of the response. `extra`
    /// is added to the timeout, because the server responds only when the copy is complete.
    pub(super) async fn copy(
        &self,
        from: &Path,
        to: &Path,
        query: &str,
        headers: &HeaderMap,
        extra: Duration,
    ) -> object_store::Result<String> {
        let source = format!("{}/{}", self.bucket, utf8_percent_encode(from.as_ref(), PATH_SET));
        let mut request = self.request(Method::PUT, Some(to), query).header("x-amz-copy-source", source);
        if let Some(request_headers) = request.headers_mut() {
            request_headers.extend(headers.clone());
        }
        text(self.send(request.extension(ExtraTimeout(extra)), Bytes::new(), None).await?).await
    }
}

/// Returns the query that names the part at `index` (from 0) of a multipart upload.
pub(super) fn part_query(upload: &str, index: u64) -> String {
    format!("partNumber={}&uploadId={}", index + 1, utf8_percent_encode(upload, NON_ALPHANUMERIC))
}

async fn text(response: HttpResponse) -> object_store::Result<String> {
    let body = response.into_body().bytes().await.map_err(generic)?;
    Ok(String::from_utf8_lossy(&body).into_owned())
}

fn generic(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: source.into() }
}

/// Extracts the checksum of the whole object from the headers. The metadata header takes precedence over S3's checksum,
/// because the upload tool computed its value from the file.
fn checksums_in(headers: &HeaderMap) -> StoredChecksums {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let etag = text("etag").map(str::to_owned);
    let metadata = text(METADATA_HEADER).map(|hex| hex.parse::<Digest>());
    let invalid_header = metadata.as_ref().is_some_and(Result::is_err).then_some(METADATA_HEADER);
    let sha256 = match metadata {
        Some(Ok(digest)) => Some((digest, METADATA_HEADER)),
        // The SHA-256 of a multipart object is a checksum of part checksums.
        _ if is_multipart(etag.as_deref()) || text(CHECKSUM_TYPE_HEADER) == Some("COMPOSITE") => None,
        _ => text(CHECKSUM_HEADER).and_then(whole_object_digest).map(|digest| (digest, CHECKSUM_HEADER)),
    };
    StoredChecksums { etag, sha256, invalid_header }
}

/// Returns true if the ETag is that of a multipart upload (`"<hex>-<parts>"`). Not every store reports the type of its
/// checksum, so the ETag is checked, too.
fn is_multipart(etag: Option<&str>) -> bool {
    let parts = etag.and_then(|etag| etag.trim_matches('"').rsplit_once('-'));
    parts.is_some_and(|(_, parts)| !parts.is_empty() && parts.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Parses the digest of a whole object. Returns `None` for a checksum of part checksums (`<base64>-<parts>`) and for an
/// invalid value.
fn whole_object_digest(checksum: &str) -> Option<Digest> {
    let bytes = STANDARD.decode(checksum).ok()?;
    Some(Digest::from_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, RemoteConfig};

    fn digest_in(rows: &[(&'static str, String)]) -> Option<(Digest, &'static str)> {
        let row = |(name, value): &(&'static str, String)| {
            (http::HeaderName::from_static(name), value.parse().expect("value"))
        };
        checksums_in(&rows.iter().map(row).collect()).sha256
    }

    #[test]
    fn an_option_changes_reads_only_if_it_is_on() {
        let supports = |name: &str, value: &str| {
            let options = [(name.to_owned(), value.to_owned())].into();
            let config = RemoteConfig { url: String::new(), options, environment: Environment::default() };
            let options = Options::parse(&config).expect("options");
            supports_reads(&options)
        };
        for name in ["skip_signature", "request_payer", "s3_express"] {
            for off in ["false", "FALSE", "0", "no", "n", "off"] {
                assert!(supports(name, off), "{name} = {off}");
            }
            for on in ["true", "1", "yes", "y", "on"] {
                assert!(!supports(name, on), "{name} = {on}");
            }
        }
        assert!(!supports("sse_customer_key_base64", "AAAA") && supports("sse", "aws:kms"));
    }

    #[test]
    fn metadata_and_checksums_of_whole_objects_yield_a_digest() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let base64 = STANDARD.encode(b.as_bytes());
        assert_eq!(digest_in(&[(METADATA_HEADER, a.to_string().to_uppercase())]), Some((a, METADATA_HEADER)));
        assert_eq!(digest_in(&[(CHECKSUM_HEADER, base64.clone())]), Some((b, CHECKSUM_HEADER)));
        assert_eq!(
            digest_in(&[(METADATA_HEADER, a.to_string()), (CHECKSUM_HEADER, base64.clone())]),
            Some((a, METADATA_HEADER))
        );
        assert_eq!(
            digest_in(&[(METADATA_HEADER, "unknown".into()), (CHECKSUM_HEADER, base64.clone())]),
            Some((b, CHECKSUM_HEADER))
        );
        assert_eq!(digest_in(&[(CHECKSUM_HEADER, format!("{base64}-2"))]), None, "a checksum of checksums");
        assert_eq!(digest_in(&[(CHECKSUM_HEADER, STANDARD.encode(b"short"))]), None);
        let typed = |kind: &str| digest_in(&[(CHECKSUM_HEADER, base64.clone()), (CHECKSUM_TYPE_HEADER, kind.into())]);
        assert_eq!((typed("FULL_OBJECT"), typed("COMPOSITE")), (Some((b, CHECKSUM_HEADER)), None));
        let with_etag = |etag: &str| digest_in(&[(CHECKSUM_HEADER, base64.clone()), ("etag", etag.into())]);
        assert_eq!((with_etag("\"9b2c-d\""), with_etag("\"9b2cd-2\"")), (Some((b, CHECKSUM_HEADER)), None));
        assert_eq!(digest_in(&[]), None);
    }
}
