//! The HTTP client below `object_store`'s S3 client: timeouts, no redirects, and errors with the server's details.
//!
//! `object_store` drops the headers and error bodies that contain a bucket's region, the time to wait before a retry,
//! or the server's clock. This client first converts an error response into an [`ErrorResponse`]. Each request has its
//! own timeout, because the body of an object may take an hour and a metadata request may not.
//!
//! Listings are edited: one key with an empty segment (`a//b`) makes `object_store` fail for the whole page. modelcache
//! never writes such keys. They are removed from the response and passed on in [`SkippedKeys`].

use super::error_response::{ErrorResponse, MESSAGE_CHARS_MAX, NOT_A_STORE_HINT};
use super::settings::{Options, S3Settings};
use super::xml;
use crate::error::{Error, Result, Tier};
use crate::limits;
use crate::remote::backend::SkippedKeys;
use crate::transfer::{
    BodyError, BodyLimits, IDLE_CONNECTION_TIMEOUT, Pauses, Retry, check_headers, is_html, read_body, retry_after,
};
use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use object_store::path::Path;
use std::time::Duration;

/// Slowest upload that does not time out, in bytes per second. The time of the upload at this rate is added to the read
/// timeout.
const UPLOAD_BYTES_PER_S_MIN: u64 = 64 * 1024;

/// Added to the timeout of a request that completes a multipart upload. S3 states that it may take several minutes
/// (<https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html>).
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(600);

/// Request extension that adds this time to the timeout, for requests that take the server long.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExtraTimeout(pub(super) Duration);

/// Passes one shared client to `object_store`.
#[derive(Debug, Clone)]
pub(super) struct Connector(ObjectStoreHttp);

/// Implements `object_store`'s HTTP service with the timeouts and errors of this module.
#[derive(Debug, Clone)]
struct ObjectStoreHttp {
    client: reqwest::Client,
    read_timeout: Duration,
    pauses: Pauses,
    /// The host that is paused in [`Pauses`] if the server asks for it.
    endpoint: String,
}

impl Connector {
    /// Builds the client. Blocks while it loads root certificates.
    pub(super) fn new(settings: &S3Settings, options: &Options, retry: &Retry) -> Result<Self> {
        let setup_failed = |cause| {
            Error::invalid("cannot set up the HTTP client of the remote")
                .tier(Tier::Remote)
                .cause(reqwest::Error::without_url(cause))
        };
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("modelcache/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(settings.connect_timeout)
            .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .https_only(!settings.allow_http)
            .tls_danger_accept_invalid_certs(options.allow_invalid_certificates);
        if let Some(path) = &settings.ca_file {
            let unusable = |message: String| {
                Error::invalid(message).tier(Tier::Remote).hint("check AWS_CA_BUNDLE, ca_bundle or SSL_CERT_FILE")
            };
            let pem = std::fs::read(path).map_err(|cause| {
                unusable(format!("cannot read the certificates in {}", path.display())).cause(cause)
            })?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|cause| unusable(format!("no certificates in {}", path.display())).cause(cause))?;
            builder = builder.tls_certs_merge(certificates);
        }
        if let Some(address) = &options.proxy_url {
            let excludes = options.proxy_excludes.as_deref().and_then(reqwest::NoProxy::from_string);
            builder = builder.proxy(reqwest::Proxy::all(address.expose()).map_err(setup_failed)?.no_proxy(excludes));
        }
        Ok(Self(ObjectStoreHttp {
            client: builder.build().map_err(setup_failed)?,
            read_timeout: retry.read_timeout(),
            pauses: retry.pauses().clone(),
            endpoint: settings.endpoint_url(),
        }))
    }

    /// Returns the HTTP client without the request timeouts and errors of this module.
    pub(super) fn plain_client(&self) -> &reqwest::Client {
        &self.0.client
    }

    /// Returns a client with the timeouts and errors of this module, as `object_store` uses it.
    pub(super) fn object_store_client(&self) -> HttpClient {
        HttpClient::new(self.0.clone())
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

/// Wraps an [`Error`] so that it passes through `object_store` unchanged. `failure::translate` unwraps it.
fn wrapped(error: Error) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, error.tier(Tier::Remote))
}

fn timed_out(_: tokio::time::error::Elapsed) -> HttpError {
    HttpError::new(HttpErrorKind::Timeout, std::io::Error::new(std::io::ErrorKind::TimedOut, "no response in time"))
}

#[async_trait]
impl HttpService for ObjectStoreHttp {
    async fn call(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        let is_listing = request.uri().query().is_some_and(|query| query.contains("list-type=2"));
        // Only the body of an object is streamed: the request for it is the only GET without a query. Every other body
        // is read into memory.
        let is_get = request.method() == reqwest::Method::GET;
        let is_object_read = is_get && request.uri().query().is_none();
        let is_completion = request.method() == reqwest::Method::POST
            && request.uri().query().is_some_and(|query| query.contains("uploadId="));
        let requested = request.extensions().get::<ExtraTimeout>().map(|ExtraTimeout(time)| *time);
        let extra = requested.unwrap_or(if is_completion { COMPLETION_TIMEOUT } else { Duration::ZERO });
        // The timeout for the response headers includes the time to send the request body.
        let upload = Duration::from_secs(request.body().content_length() as u64 / UPLOAD_BYTES_PER_S_MIN);
        self.pauses.wait(&self.endpoint).await;
        let timeout = self.read_timeout + upload + extra;
        let response = tokio::time::timeout(timeout, self.client.call(request)).await.map_err(timed_out)??;
        let (mut parts, body) = response.into_parts();
        let is_error = !parts.status.is_success();
        // S3 sends at least one of these headers with every object and listing.
        if is_get
            && !is_error
            && is_html(&parts.headers)
            && !["etag", "x-amz-request-id"].iter().any(|name| parts.headers.contains_key(*name))
        {
            let message = format!("{} answers with an HTML page (text/html), as no object store does", self.endpoint);
            return Err(wrapped(Error::unavailable(message).transient(false).hint(NOT_A_STORE_HINT)));
        }
        if is_object_read && !is_error {
            // Compressed or otherwise transformed bodies are refused, because their bytes are not those of the object.
            check_headers(parts.status, &parts.headers).map_err(wrapped)?;
            return Ok(HttpResponse::from_parts(parts, body));
        }
        let timeout = self.read_timeout + extra;
        let limits = match is_error {
            true => BodyLimits::error_response(timeout),
            false if is_listing => BodyLimits::metadata(limits::RESPONSE_BYTES_MAX, self.read_timeout),
            // No stall detection: S3 sends single blanks as keep-alive while it completes an upload or a copy.
            false => BodyLimits::within(limits::RESPONSE_BYTES_MAX, timeout),
        };
        let body = match read_body(body.bytes_stream(), limits).await {
            (body, None) => body,
            // The beginning of an error body suffices.
            (body, Some(BodyError::TooLong(_))) if is_error => body,
            (_, Some(BodyError::Broken(error))) => return Err(error),
            (_, Some(error)) => {
                return Err(wrapped(
                    error.into_error("the server", |error: HttpError| Error::unavailable(error.to_string())),
                ));
            }
        };
        if is_error {
            return Err(HttpError::new(
                HttpErrorKind::Unknown,
                error_response_of(parts.status.as_u16(), &parts.headers, &body),
            ));
        }
        let body = if is_listing {
            let page = String::from_utf8_lossy(&body);
            check_listing(&page).map_err(wrapped)?;
            let (kept, skipped) = without_unusable_keys(&page);
            parts.extensions.insert(SkippedKeys(skipped));
            HttpResponseBody::from(kept)
        } else {
            body.into()
        };
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// Extracts the [`ErrorResponse`] from status, headers and body of an error response.
fn error_response_of(status: u16, headers: &reqwest::header::HeaderMap, body: &[u8]) -> ErrorResponse {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let body = String::from_utf8_lossy(body);
    ErrorResponse {
        status,
        code: xml::text(&body, "Code").or_else(|| header("x-minio-error-code")),
        message: xml::text(&body, "Message").map(|message| message.chars().take(MESSAGE_CHARS_MAX).collect()),
        region: header("x-amz-bucket-region").or_else(|| xml::text(&body, "Region")),
        retry_after: retry_after(headers),
        date: header("date"),
    }
}

/// Fails if a page is truncated and has no continuation token. `object_store` would take it for the last page.
fn check_listing(xml: &str) -> Result<()> {
    let is_truncated = || xml::text(xml, "IsTruncated").is_some_and(|text| text.trim() == "true");
    let has_token = || xml::text(xml, "NextContinuationToken").is_some_and(|token| !token.is_empty());
    match is_truncated() && !has_token() {
        true => Err(Error::corrupt("the server's listing is incomplete: a truncated page has no continuation token")),
        false => Ok(()),
    }
}

/// Removes the keys that `object_store` cannot represent and folder markers (`a/`) from a listing. Returns the listing
/// and the removed keys.
fn without_unusable_keys(xml: &str) -> (String, Vec<String>) {
    let (mut kept, mut skipped) = (String::with_capacity(xml.len()), Vec::new());
    let mut copied = 0;
    for entry in xml::elements(xml, "Contents") {
        let key = xml::text(&xml[entry.clone()], "Key").unwrap_or_default();
        let usable = !key.is_empty() && !key.ends_with('/') && !key.starts_with('/') && Path::parse(&key).is_ok();
        if !usable {
            kept.push_str(&xml[copied..entry.start]);
            copied = entry.end;
            skipped.push(key);
        }
    }
    kept.push_str(&xml[copied..]);
    (kept, skipped)
}

/// Fuzz target: edits an arbitrary listing.
#[cfg(fuzzing)]
pub(crate) fn fuzz(xml: &str) {
    let (kept, skipped) = without_unusable_keys(xml);
    assert!(kept.len() <= xml.len() && skipped.len() <= xml.matches("Contents").count());
    let _ = (xml::text(xml, "Code"), check_listing(xml));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_response_keeps_the_error_details_and_drops_secrets() {
        let mut headers = reqwest::header::HeaderMap::new();
        headers.insert("x-amz-bucket-region", "eu-west-1".parse().expect("value"));
        headers.insert("retry-after", "3".parse().expect("value"));
        let body = "<?xml?><Error><Code>ExpiredToken</Code><Message>a &amp; b &#x41;</Message><Token-0>canary</Token-0></Error>";
        let response = error_response_of(400, &headers, body.as_bytes());
        assert_eq!(response.to_string(), "HTTP 400 ExpiredToken: a & b A");
        assert_eq!(response.region.as_deref(), Some("eu-west-1"));
        assert_eq!(response.retry_after, Some(Duration::from_secs(3)));
        assert!(!format!("{response:?}").contains("canary"));
    }

    #[test]
    fn unusable_keys_are_removed_from_a_listing() {
        let entry = |key: &str| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
        let good = [entry("a/b &amp; c.bin"), entry("ä/%41+é"), entry("x")];
        let unusable = [entry("a//b"), entry("/a"), entry("a/"), entry("a/../b"), entry("a&#x1;b")];
        let page =
            |entries: &[String]| format!("<ListBucketResult><Name>b</Name>{}</ListBucketResult>", entries.concat());
        let mixed: Vec<String> = good
            .iter()
            .zip(&unusable)
            .flat_map(|(good, unusable)| [unusable.clone(), good.clone()])
            .chain(unusable[3..].to_vec())
            .collect();
        let (kept, mut skipped) = without_unusable_keys(&page(&mixed));
        skipped.sort();
        assert_eq!(kept, page(&good));
        assert_eq!(skipped, ["/a", "a\u{1}b", "a/", "a/../b", "a//b"]);
        assert_eq!(without_unusable_keys("<x>"), ("<x>".to_owned(), Vec::new()));
    }

    #[test]
    fn a_truncated_page_must_have_a_continuation_token() {
        let page = |inner: &str| format!("<ListBucketResult>{inner}</ListBucketResult>");
        let next = "<NextContinuationToken>t</NextContinuationToken>";
        for whole in ["", "<IsTruncated>false</IsTruncated>", &format!("<IsTruncated>true</IsTruncated>{next}")] {
            check_listing(&page(whole)).expect("complete");
        }
        for cut in ["", "<NextContinuationToken></NextContinuationToken>"] {
            let error = check_listing(&page(&format!("<IsTruncated>true</IsTruncated>{cut}"))).expect_err("incomplete");
            assert_eq!(error.kind(), crate::error::ErrorKind::Corrupt);
        }
    }
}
