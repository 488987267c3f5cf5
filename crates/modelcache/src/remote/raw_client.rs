//! Signed S3 requests that `object_store` does not offer: checksums of an object, and lists of multipart uploads.
//!
//! If the remote's options change how requests are signed or encrypted (`skip_signature`, a customer key and others),
//! these requests are not sent, and objects count as having no checksum.

use super::credentials::Credentials;
use super::http_client::Connector;
use super::settings::{Options, S3Settings};
use super::store::Store;
use crate::digest::Digest;
use crate::error::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use object_store::CredentialProvider as _;
use object_store::aws::{AmazonS3ConfigKey, AwsAuthorizer};
use object_store::client::{HttpClient, HttpRequestBody};
use object_store::path::Path;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::sync::Arc;

/// Encodes everything but the unreserved characters of RFC 3986 and the slash, as SigV4 requires for a path.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
/// Metadata header with the digest of the object, set by upload tools.
const METADATA: &str = "x-amz-meta-sha256";
/// Header with the SHA-256 that S3 verified at upload.
const CHECKSUM: &str = "x-amz-checksum-sha256";
/// Header with the type of that checksum: `FULL_OBJECT` or `COMPOSITE`.
const CHECKSUM_TYPE: &str = "x-amz-checksum-type";

/// Sends signed requests to one bucket.
pub(super) struct RawClient {
    client: HttpClient,
    credentials: Arc<Credentials>,
    /// Scheme, host and, in path style, the bucket.
    base: String,
    region: String,
}

/// Checksums of an object, as stated by the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StoredChecksums {
    /// The ETag of the object that the checksum belongs to.
    pub(super) etag: Option<String>,
    /// The digest and the header that contains it.
    pub(super) sha256: Option<(Digest, &'static str)>,
    /// A header that should contain a digest, but has an invalid value.
    pub(super) garbage: Option<&'static str>,
}

impl RawClient {
    /// Returns `None` if the options change how requests are signed or encrypted.
    pub(super) fn new(
        bucket: &str,
        settings: &S3Settings,
        options: &Options,
        connector: &Connector,
        credentials: &Arc<Credentials>,
    ) -> Option<Self> {
        use AmazonS3ConfigKey as Key;
        let changes = |key: &Key| {
            let is_read_with_a_key = key.as_ref() == "aws_sse_customer_key_base64";
            is_read_with_a_key || matches!(key, Key::SkipSignature | Key::RequestPayer | Key::S3Express)
        };
        if options.passed_on.iter().any(|(key, _)| changes(key)) {
            return None;
        }
        let region = settings.region.clone();
        let endpoint = settings.endpoint.clone().unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let base = match settings.path_style {
            true => format!("{endpoint}/{bucket}"),
            false => endpoint.replacen("://", &format!("://{bucket}."), 1),
        };
        Some(Self { client: connector.http(), credentials: credentials.clone(), base, region })
    }

    /// Sends a GET request with `query` for the bucket itself. Returns the body of the answer.
    pub(super) async fn get(&self, query: &str) -> object_store::Result<String> {
        let generic = |source| object_store::Error::Generic { store: "S3", source };
        let request = http::Request::get(format!("{}?{query}", self.base)).body(HttpRequestBody::empty());
        let mut request = request.map_err(|error| generic(Box::new(error)))?;
        let credential = self.credentials.get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(&mut request, None)?;
        let response = self.client.execute(request).await.map_err(|error| generic(Box::new(error)))?;
        let body = response.into_body().bytes().await.map_err(|error| generic(Box::new(error)))?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Sends a HEAD request with checksum mode for an object. Returns the headers of the answer.
    async fn head(&self, key: &Path) -> object_store::Result<HeaderMap> {
        let generic = |source| object_store::Error::Generic { store: "S3", source };
        let address = format!("{}/{}", self.base, utf8_percent_encode(key.as_ref(), PATH));
        let request = http::Request::head(address).header("x-amz-checksum-mode", "ENABLED");
        let mut request = request.body(HttpRequestBody::empty()).map_err(|error| generic(Box::new(error)))?;
        let credential = self.credentials.get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(&mut request, None)?;
        let response = self.client.execute(request).await.map_err(|error| generic(Box::new(error)))?;
        Ok(response.headers().clone())
    }
}

impl Store {
    /// Returns the checksums of an object, or `None` if it does not exist or the store has no [`RawClient`].
    pub(super) async fn stored_checksums(&self, key: &Path) -> Result<Option<StoredChecksums>> {
        let Some(raw_client) = self.raw_client() else { return Ok(None) };
        let doing = format!("cannot look at {key}");
        let ask = || async {
            Ok(self.present(raw_client.head(key).await, &doing).await?.map(|headers| checksums_in(&headers)))
        };
        self.retry().run(ask).await
    }
}

/// Extracts the checksum of the whole object from the headers. The metadata header takes precedence over S3's checksum,
/// because the tool that set it computed the digest of the file.
fn checksums_in(headers: &HeaderMap) -> StoredChecksums {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let etag = text("etag").map(str::to_owned);
    let metadata = text(METADATA).map(|hex| hex.parse::<Digest>());
    let garbage = metadata.as_ref().is_some_and(Result::is_err).then_some(METADATA);
    let sha256 = match metadata {
        Some(Ok(digest)) => Some((digest, METADATA)),
        // The SHA-256 of a multipart object is a checksum of part checksums.
        _ if is_multipart(etag.as_deref()) || text(CHECKSUM_TYPE) == Some("COMPOSITE") => None,
        _ => text(CHECKSUM).and_then(whole_object_digest).map(|digest| (digest, CHECKSUM)),
    };
    StoredChecksums { etag, sha256, garbage }
}

/// Returns true if the ETag is that of a multipart upload (`"<hex>-<parts>"`). Not every store reports the type of its
/// checksum, so the ETag is checked, too.
fn is_multipart(etag: Option<&str>) -> bool {
    let parts = etag.and_then(|etag| etag.trim_matches('"').rsplit_once('-'));
    parts.is_some_and(|(_, parts)| !parts.is_empty() && parts.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Returns the digest, or `None` for a checksum of part checksums (`<base64>-<parts>`) and for an invalid value.
fn whole_object_digest(checksum: &str) -> Option<Digest> {
    let bytes = STANDARD.decode(checksum).ok()?;
    Some(Digest::from_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_in(rows: &[(&'static str, String)]) -> Option<(Digest, &'static str)> {
        let row = |(name, value): &(&'static str, String)| {
            (http::HeaderName::from_static(name), value.parse().expect("value"))
        };
        checksums_in(&rows.iter().map(row).collect()).sha256
    }

    #[test]
    fn metadata_and_checksums_of_whole_objects_yield_a_digest() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let base64 = STANDARD.encode(b.as_bytes());
        assert_eq!(digest_in(&[(METADATA, a.to_string().to_uppercase())]), Some((a, METADATA)));
        assert_eq!(digest_in(&[(CHECKSUM, base64.clone())]), Some((b, CHECKSUM)));
        assert_eq!(digest_in(&[(METADATA, a.to_string()), (CHECKSUM, base64.clone())]), Some((a, METADATA)));
        assert_eq!(digest_in(&[(METADATA, "unknown".into()), (CHECKSUM, base64.clone())]), Some((b, CHECKSUM)));
        assert_eq!(digest_in(&[(CHECKSUM, format!("{base64}-2"))]), None, "a checksum of checksums");
        assert_eq!(digest_in(&[(CHECKSUM, STANDARD.encode(b"short"))]), None);
        let typed = |kind: &str| digest_in(&[(CHECKSUM, base64.clone()), (CHECKSUM_TYPE, kind.into())]);
        assert_eq!((typed("FULL_OBJECT"), typed("COMPOSITE")), (Some((b, CHECKSUM)), None));
        let tag_record = |etag: &str| digest_in(&[(CHECKSUM, base64.clone()), ("etag", etag.into())]);
        assert_eq!((tag_record("\"9b2c-d\""), tag_record("\"9b2cd-2\"")), (Some((b, CHECKSUM)), None));
        assert_eq!(digest_in(&[]), None);
    }
}
