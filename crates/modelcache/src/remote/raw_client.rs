//! What the store states of an object beyond size and ETag: a digest among its metadata, or its own checksum.
//!
//! `object_store` cannot ask for checksums, nor for unfinished uploads, so these requests are made and signed here. Where its options change what a request
//! needs (`skip_signature`, a customer's key and the like), nothing is asked, and objects count as having no checksum.

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

/// Everything but RFC 3986's unreserved characters and the slash: as SigV4 wants a path.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
/// Where tools put the digest of an object that they upload.
const METADATA: &str = "x-amz-meta-sha256";
/// Where S3 states the SHA-256 that it checked itself.
const CHECKSUM: &str = "x-amz-checksum-sha256";
/// Whether that is of the whole object.
const CHECKSUM_TYPE: &str = "x-amz-checksum-type";

/// Sends signed requests.
pub(super) struct RawClient {
    client: HttpClient,
    credentials: Arc<Credentials>,
    /// Scheme, host and, where it is part of the path, the bucket.
    base: String,
    region: String,
}

/// What the store says of an object's bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StoredChecksums {
    /// The ETag that it belongs to.
    pub(super) etag: Option<String>,
    /// The digest and the header that states it.
    pub(super) sha256: Option<(Digest, &'static str)>,
    /// A header that should state one and does not.
    pub(super) garbage: Option<&'static str>,
}

impl RawClient {
    /// `None` where the options change how a request is signed.
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

    /// Asks the bucket itself; the answer's body.
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
    /// What the store states of the object; `None` if it is not there, or nothing can be asked.
    pub(super) async fn stated(&self, key: &Path) -> Result<Option<StoredChecksums>> {
        let Some(raw_client) = self.raw_client() else { return Ok(None) };
        let doing = format!("cannot look at {key}");
        let ask =
            || async { Ok(self.present(raw_client.head(key).await, &doing).await?.map(|headers| stated(&headers))) };
        self.retry().run(ask).await
    }
}

/// Metadata before checksum: whoever set it meant the file.
fn stated(headers: &HeaderMap) -> StoredChecksums {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let etag = text("etag").map(str::to_owned);
    let metadata = text(METADATA).map(|hex| hex.parse::<Digest>());
    let garbage = metadata.as_ref().is_some_and(Result::is_err).then_some(METADATA);
    let sha256 = match metadata {
        Some(Ok(digest)) => Some((digest, METADATA)),
        _ if in_parts(etag.as_deref()) || text(CHECKSUM_TYPE) == Some("COMPOSITE") => None,
        _ => text(CHECKSUM).and_then(whole).map(|digest| (digest, CHECKSUM)),
    };
    StoredChecksums { etag, sha256, garbage }
}

/// Whether the object was sent in parts (`"<hex>-<parts>"`): its SHA-256 at S3 then is one of checksums, and not every
/// store says so.
fn in_parts(etag: Option<&str>) -> bool {
    let parts = etag.and_then(|etag| etag.trim_matches('"').rsplit_once('-'));
    parts.is_some_and(|(_, parts)| !parts.is_empty() && parts.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The digest, unless it is a checksum of the checksums of parts (`<base64>-<parts>`).
fn whole(checksum: &str) -> Option<Digest> {
    let bytes = STANDARD.decode(checksum).ok()?;
    Some(Digest::from_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(rows: &[(&'static str, String)]) -> Option<(Digest, &'static str)> {
        let row = |(name, value): &(&'static str, String)| {
            (http::HeaderName::from_static(name), value.parse().expect("value"))
        };
        stated(&rows.iter().map(row).collect()).sha256
    }

    #[test]
    fn metadata_and_checksums_of_whole_objects_state_a_digest() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let base64 = STANDARD.encode(b.as_bytes());
        assert_eq!(said(&[(METADATA, a.to_string().to_uppercase())]), Some((a, METADATA)));
        assert_eq!(said(&[(CHECKSUM, base64.clone())]), Some((b, CHECKSUM)));
        assert_eq!(said(&[(METADATA, a.to_string()), (CHECKSUM, base64.clone())]), Some((a, METADATA)));
        assert_eq!(said(&[(METADATA, "unknown".into()), (CHECKSUM, base64.clone())]), Some((b, CHECKSUM)));
        assert_eq!(said(&[(CHECKSUM, format!("{base64}-2"))]), None, "a checksum of checksums");
        assert_eq!(said(&[(CHECKSUM, STANDARD.encode(b"short"))]), None);
        let typed = |kind: &str| said(&[(CHECKSUM, base64.clone()), (CHECKSUM_TYPE, kind.into())]);
        assert_eq!((typed("FULL_OBJECT"), typed("COMPOSITE")), (Some((b, CHECKSUM)), None));
        let tag_record = |etag: &str| said(&[(CHECKSUM, base64.clone()), ("etag", etag.into())]);
        assert_eq!((tag_record("\"9b2c-d\""), tag_record("\"9b2cd-2\"")), (Some((b, CHECKSUM)), None));
        assert_eq!(said(&[]), None);
    }
}
