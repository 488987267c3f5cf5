//! The HTTP client below `object_store`'s S3 client: timeouts, no redirects, and errors with the server's details.
//!
//! `object_store` drops the headers and error bodies that state a bucket's region, a wait or the server's clock. This
//! client turns an error answer into a [`Refusal`] first. Each request has its own timeout, because a body may take an
//! hour and a metadata request may not.
//!
//! Listings are edited: one key with an empty segment (`a//b`) makes `object_store` fail for the whole page. Such keys
//! are never ours. They are removed from the answer and passed on in [`LeftOut`].

use super::refusal::Refusal;
use super::settings::{Options, S3Settings};
use super::xml;
use crate::error::{Error, Result, Tier};
use crate::limits;
use crate::remote::backend::LeftOut;
use crate::transfer::{BodyLimits, Cut, Pauses, Retry, check_headers, read_body};
use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use object_store::path::Path;
use std::time::Duration;

/// Slowest upload that does not time out, in bytes per second. Its time is added to the read timeout.
const UPLOAD_BYTES_PER_S_MIN: u64 = 64 * 1024;

/// Added to the timeout of a request that completes a multipart upload. S3 states that it may take several minutes
/// (<https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html>).
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(600);

/// Request extension that adds this time to the timeout, for requests that take the server long.
#[derive(Debug, Clone, Copy)]
pub(super) struct LongerTimeout(pub(super) Duration);

/// Passes one shared client to `object_store`.
#[derive(Debug, Clone)]
pub(super) struct Connector(ObjectStoreHttp);

/// Implements `object_store`'s HTTP service with the timeouts and errors of this module.
#[derive(Debug, Clone)]
struct ObjectStoreHttp {
    client: reqwest::Client,
    read_timeout: Duration,
    pauses: Pauses,
    /// The host of [`Pauses`].
    endpoint: String,
}

impl Connector {
    /// Builds the client. Blocks while it loads root certificates.
    pub(super) fn new(settings: &S3Settings, options: &Options, retry: &Retry) -> Result<Self> {
        let failed = |cause| {
            Error::invalid("cannot set up the HTTP client of the remote")
                .tier(Tier::Remote)
                .cause(reqwest::Error::without_url(cause))
        };
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("modelcache/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(settings.connect_timeout)
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
            builder = builder.proxy(reqwest::Proxy::all(address.expose()).map_err(failed)?.no_proxy(excludes));
        }
        Ok(Self(ObjectStoreHttp {
            client: builder.build().map_err(failed)?,
            read_timeout: retry.read_timeout(),
            pauses: retry.pauses().clone(),
            endpoint: settings.endpoint_url(),
        }))
    }

    /// Returns the plain client, without the timeouts and errors of this module.
    pub(super) fn client(&self) -> &reqwest::Client {
        &self.0.client
    }

    /// Returns a client with the timeouts and errors of this module, as `object_store` uses it.
    pub(super) fn http(&self) -> HttpClient {
        HttpClient::new(self.0.clone())
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

/// Wraps an [`Error`] so that it passes through `object_store` unchanged. `failure::translate` unwraps it.
fn failed(error: Error) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, error.tier(Tier::Remote))
}

fn timed_out(_: tokio::time::error::Elapsed) -> HttpError {
    HttpError::new(HttpErrorKind::Timeout, std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time"))
}

#[async_trait]
impl HttpService for ObjectStoreHttp {
    async fn call(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        let listing = request.uri().query().is_some_and(|query| query.contains("list-type=2"));
        // The body of an object is streamed; it is the only GET without a query. Every other body is read into memory.
        let streams = request.method() == reqwest::Method::GET && request.uri().query().is_none();
        let completes = request.method() == reqwest::Method::POST
            && request.uri().query().is_some_and(|query| query.contains("uploadId="));
        let longer = request.extensions().get::<LongerTimeout>().map(|LongerTimeout(longer)| *longer);
        let extra = longer.unwrap_or(if completes { COMPLETION_TIMEOUT } else { Duration::ZERO });
        // The timeout for the headers of the answer covers sending the request body.
        let upload = Duration::from_secs(request.body().content_length() as u64 / UPLOAD_BYTES_PER_S_MIN);
        self.pauses.wait(&self.endpoint).await;
        let patience = self.read_timeout + upload + extra;
        let response = tokio::time::timeout(patience, self.client.call(request)).await.map_err(timed_out)??;
        let (mut parts, body) = response.into_parts();
        let refused = !parts.status.is_success();
        if streams && !refused {
            // Compressed or otherwise transformed bodies are refused, because their bytes are not those of the object.
            check_headers(parts.status, &parts.headers).map_err(failed)?;
            return Ok(HttpResponse::from_parts(parts, body));
        }
        let patience = self.read_timeout + extra;
        let limits = match refused {
            true => BodyLimits::refusal(patience),
            false if listing => BodyLimits::answer(limits::ANSWER_BYTES_MAX, self.read_timeout),
            // No stall detection: S3 sends single blanks as keep-alive while it completes an upload or a copy.
            false => BodyLimits::within(limits::ANSWER_BYTES_MAX, patience),
        };
        let body = match read_body(body.bytes_stream(), limits).await {
            (body, None) => body,
            // The beginning of an error body suffices.
            (body, Some(Cut::TooLong(_))) if refused => body,
            (_, Some(Cut::Broken(error))) => return Err(error),
            (_, Some(cut)) => {
                return Err(failed(cut.error("the server", |error: HttpError| Error::unavailable(error.to_string()))));
            }
        };
        if refused {
            return Err(HttpError::new(HttpErrorKind::Unknown, refusal(parts.status.as_u16(), &parts.headers, &body)));
        }
        let body = if listing {
            let page = String::from_utf8_lossy(&body);
            check_listing(&page).map_err(failed)?;
            let (kept, left_out) = without_odd_keys(&page);
            parts.extensions.insert(LeftOut(left_out));
            HttpResponseBody::from(kept)
        } else {
            body.into()
        };
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// Extracts the [`Refusal`] from status, headers and body of an error answer.
fn refusal(status: u16, headers: &reqwest::header::HeaderMap, body: &[u8]) -> Refusal {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let body = String::from_utf8_lossy(body);
    Refusal {
        status,
        code: xml::text(&body, "Code").or_else(|| header("x-minio-error-code")),
        message: xml::text(&body, "Message").map(|message| message.chars().take(200).collect()),
        region: header("x-amz-bucket-region").or_else(|| xml::text(&body, "Region")),
        retry_after: header("retry-after").and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs),
        date: header("date"),
    }
}

/// Refuses a page that is truncated and names no next page: `object_store` would take it for the last one.
fn check_listing(xml: &str) -> Result<()> {
    let is_truncated = || xml::text(xml, "IsTruncated").is_some_and(|text| text.trim() == "true");
    let names_next = || xml::text(xml, "NextContinuationToken").is_some_and(|token| !token.is_empty());
    match is_truncated() && !names_next() {
        true => Err(Error::corrupt("the server's listing is incomplete: a truncated page names no next page")),
        false => Ok(()),
    }
}

/// Removes the keys that `object_store` cannot represent and folder markers (`a/`) from a listing. Returns the listing
/// and the removed keys.
fn without_odd_keys(xml: &str) -> (String, Vec<String>) {
    let (mut kept, mut left_out) = (String::with_capacity(xml.len()), Vec::new());
    let mut copied = 0;
    for entry in xml::elements(xml, "Contents") {
        let key = xml::text(&xml[entry.clone()], "Key").unwrap_or_default();
        let usable = !key.is_empty() && !key.ends_with('/') && !key.starts_with('/') && Path::parse(&key).is_ok();
        if !usable {
            kept.push_str(&xml[copied..entry.start]);
            copied = entry.end;
            left_out.push(key);
        }
    }
    kept.push_str(&xml[copied..]);
    (kept, left_out)
}

/// Fuzz target: edits an arbitrary listing.
#[cfg(fuzzing)]
pub(crate) fn fuzz(xml: &str) {
    let (kept, left_out) = without_odd_keys(xml);
    assert!(kept.len() <= xml.len() && left_out.len() <= xml.matches("Contents").count());
    let _ = (xml::text(xml, "Code"), check_listing(xml));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_the_error_details_and_drops_secrets() {
        let mut headers = reqwest::header::HeaderMap::new();
        headers.insert("x-amz-bucket-region", "eu-west-1".parse().expect("value"));
        headers.insert("retry-after", "3".parse().expect("value"));
        let body = "<?xml?><Error><Code>ExpiredToken</Code><Message>a &amp; b &#x41;</Message><Token-0>canary</Token-0></Error>";
        let refusal = refusal(400, &headers, body.as_bytes());
        assert_eq!(refusal.to_string(), "HTTP 400 ExpiredToken: a & b A");
        assert_eq!(refusal.region.as_deref(), Some("eu-west-1"));
        assert_eq!(refusal.retry_after, Some(Duration::from_secs(3)));
        assert!(!format!("{refusal:?}").contains("canary"));
    }

    #[test]
    fn odd_keys_leave_a_listing_and_good_ones_stay() {
        let entry = |key: &str| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
        let good = [entry("a/b &amp; c.bin"), entry("ä/%41+é"), entry("x")];
        let odd = [entry("a//b"), entry("/a"), entry("a/"), entry("a/../b"), entry("a&#x1;b")];
        let page =
            |entries: &[String]| format!("<ListBucketResult><Name>b</Name>{}</ListBucketResult>", entries.concat());
        let mixed: Vec<String> = good
            .iter()
            .zip(&odd)
            .flat_map(|(good, odd)| [odd.clone(), good.clone()])
            .chain(odd[3..].to_vec())
            .collect();
        let (kept, mut left_out) = without_odd_keys(&page(&mixed));
        left_out.sort();
        assert_eq!(kept, page(&good));
        assert_eq!(left_out, ["/a", "a\u{1}b", "a/", "a/../b", "a//b"]);
        assert_eq!(without_odd_keys("<x>"), ("<x>".to_owned(), Vec::new()));
    }

    #[test]
    fn a_truncated_page_must_name_the_next_one() {
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
