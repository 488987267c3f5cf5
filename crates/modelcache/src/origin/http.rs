//! HTTP client for origins: redirects that do not leak credentials, parsing of headers, and errors for responses.
//!
//! Error messages name only scheme, host and port of a server, never a query, because it may contain a signature.
//!
//! The library reads no environment variables, but two of its dependencies do: the HTTP client takes proxies from
//! `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, and root certificates from `SSL_CERT_FILE` and `SSL_CERT_DIR`.

use super::link_local;
use crate::config::Config;
pub(super) use crate::config::{encode_path, encode_segment};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::printable;
use crate::runtime::blocking;
pub(super) use crate::transfer::is_html;
use crate::transfer::{
    BodyLimits, IDLE_CONNECTION_TIMEOUT, Pauses, RETRY_AFTER_MAX, Retry, check_headers, content_range, read_body,
    retry_after, tls_error, with_lookup_deadline,
};
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LINK, LOCATION};
use reqwest::{Client, ClientBuilder, Response, StatusCode};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OnceCell;
use url::Url;

/// Longest wait for a connection. A reachable server completes the handshake within a few round trips.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Hint for a proxy that refuses requests without a user.
const PROXY_USER_HINT: &str =
    "the proxy requires a user and password: HTTPS_PROXY=http://user:password@host:port (HTTP_PROXY for http)";

/// Hint for a definite answer that has no hint of its own.
pub(super) const REFUSED_HINT: &str = "the server refuses the request itself, and trying again does not help: check the \
                                       address, and any proxy on the way";
/// Hint for a response that another server than the origin seems to have sent.
const PORTAL_HINT: &str = "check the address (HF_ENDPOINT for the Hub) in a browser: a proxy or a login page of the \
                           network (captive portal) may have answered; then check HTTPS_PROXY";

/// Sends the HTTP requests of one origin.
#[derive(Debug)]
pub(super) struct Http {
    /// The connection pools, see [`Retry::clients`]. All origins of a cache, and caches for other tokens, share them,
    /// because building one reads the system's root certificates, which takes some milliseconds.
    clients: Arc<[OnceCell<Client>; 2]>,
    read_timeout: Duration,
    pauses: Pauses,
    /// See [`Config::refuse_link_local`].
    refuse_link_local: bool,
}

impl Http {
    /// Creates a client with the timeouts of `retry`. It sends nothing to a host that asked for a pause.
    pub(super) fn new(config: &Config, retry: &Retry) -> Self {
        Self {
            clients: retry.clients().clone(),
            read_timeout: retry.read_timeout(),
            pauses: retry.pauses().clone(),
            refuse_link_local: config.refuse_link_local,
        }
    }

    /// Sends one GET without following redirects. Requests the body as stored, without compression.
    pub(super) async fn get(&self, url: &Url, mut headers: HeaderMap) -> Result<Response> {
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if self.refuse_link_local {
            link_local::check_host(url)?;
        }
        let request = self.client().await?.get(url.clone()).headers(headers);
        self.pauses.wait(&Server(url).to_string()).await;
        let response = request.send().await.map_err(|error| transport_error(error, url))?;
        tracing::debug!(server = %Server(url), path = url.path(), status = response.status().as_u16(), "GET");
        Ok(response)
    }

    /// Sends a GET for `url` and follows redirects. The credential is sent only to the scheme, host and port of
    /// [`Request::credential_url`] and, if that URL is plain http, to its host over TLS.
    pub(super) async fn follow(&self, mut url: Url, request: Request<'_>) -> Result<FinalResponse> {
        let mut same_origin_headers = HeaderMap::new();
        for _ in 0..=limits::REDIRECTS_MAX {
            let is_same_origin = same_origin(&url, request.credential_url) || is_upgrade(request.credential_url, &url);
            // Checked for every hop, before anything is sent to it.
            if request.same_origin_only && !is_same_origin {
                return Err(cross_origin_error("redirects a request for metadata", request.credential_url, &url));
            }
            let mut headers = request.headers.clone();
            if let Some(authorization) = request.authorization.filter(|_| is_same_origin) {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
            let response = self.get(&url, headers).await?;
            // Headers such as `X-Repo-Commit` are on the redirect, not on the response of the CDN.
            if is_same_origin {
                response.headers().iter().for_each(|(name, value)| {
                    same_origin_headers.insert(name, value.clone());
                });
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(FinalResponse { response, url, is_same_origin, same_origin_headers });
            }
            url = redirect_target(&url, response.headers().get(LOCATION))?;
            // Read the rest of the response, so that its connection can be reused.
            drain(response).await;
        }
        let server = Server(&url);
        Err(Error::unavailable(format!("{server} still redirects after {} redirects", limits::REDIRECTS_MAX))
            .hint("check the address (HF_ENDPOINT for the Hub), and any proxy on the way")
            .transient(false))
    }

    /// Returns the body of a metadata response. Fails if it is longer than `bytes_max`, is encoded, or is an HTML page.
    pub(super) async fn body(&self, response: Response, url: &Url, bytes_max: u64) -> Result<Vec<u8>> {
        check_headers(response.status(), response.headers())?;
        let limits = BodyLimits::metadata(bytes_max, self.read_timeout);
        let announces_html = is_html(response.headers());
        match read_body(response.bytes_stream(), limits).await {
            // Some servers announce every body as HTML, also their JSON.
            (body, None) if announces_html && body.trim_ascii_start().starts_with(b"<") => Err(html_error(url)),
            (body, None) => Ok(body),
            (_, Some(error)) => Err(error.into_error(Server(url), |error| transport_error(error, url))),
        }
    }

    /// Returns the client, building it first if necessary.
    async fn client(&self) -> Result<&Client> {
        let (read_timeout, refuse_link_local) = (self.read_timeout, self.refuse_link_local);
        self.clients[usize::from(!refuse_link_local)]
            .get_or_try_init(|| async {
                // On a blocking thread and not before the first request, because reading the system's root certificates
                // takes longer than a cache hit.
                let failed = |error| Error::new(ErrorKind::Other, "cannot set up HTTP").cause(error_chain(&error));
                blocking(move || build(read_timeout, refuse_link_local).map_err(failed)).await
            })
            .await
    }
}

/// The headers and the credential of a GET that may be redirected.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// Headers sent with every request, including those to redirect targets.
    pub(super) headers: HeaderMap,
    /// The URL with the scheme, host and port that the credential may be sent to.
    pub(super) credential_url: &'a Url,
    /// The value of the `Authorization` header.
    pub(super) authorization: Option<&'a HeaderValue>,
    /// Fail if a redirect leads to another scheme, host or port than those of `credential_url`.
    pub(super) same_origin_only: bool,
}

/// The final response of a GET, after all redirects.
#[derive(Debug)]
pub(super) struct FinalResponse {
    pub(super) response: Response,
    /// The URL that it came from.
    pub(super) url: Url,
    /// True if that URL has the scheme, host and port of [`Request::credential_url`], or those of its TLS upgrade.
    pub(super) is_same_origin: bool,
    /// The headers of all responses from that scheme, host and port, including redirects. A later value of a header
    /// replaces an earlier one.
    pub(super) same_origin_headers: HeaderMap,
}

/// Returns the error for a link or redirect from `from` to another scheme, host or port, where the credential must not
/// be sent.
pub(super) fn cross_origin_error(what: &str, from: &Url, to: &Url) -> Error {
    let (from, to) = (Server(from), Server(to));
    Error::invalid(format!("{from} {what} to {to}; not followed"))
        .hint(format!("if {to} is the right server, set it as the endpoint (for the Hub: HF_ENDPOINT={to})"))
}

/// Returns the `Range` header for `range`, which must not be empty.
pub(super) fn range_header(range: &std::ops::Range<u64>) -> Result<HeaderValue> {
    let value = HeaderValue::from_str(&format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
    value.map_err(|cause| Error::invalid("invalid byte range").cause(cause))
}

/// Builds the client. Reads the system's root certificates.
fn build(read_timeout: Duration, refuse_link_local: bool) -> reqwest::Result<Client> {
    let builder = || {
        let builder = match refuse_link_local {
            true => ClientBuilder::new().dns_resolver(link_local::Resolver),
            false => ClientBuilder::new(),
        };
        builder
            .user_agent(concat!("modelcache/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT)
            .read_timeout(read_timeout)
    };
    // Without root certificates the client still serves plain HTTP, and requests over TLS fail with a remedy.
    builder().build().or_else(|error| {
        tracing::warn!(error = error_chain(&error), "no root certificates found; https requests will fail");
        builder().tls_certs_only([]).build()
    })
}

/// Displays the scheme, host and port of a URL, the parts that may appear in messages and logs.
pub(super) struct Server<'a>(pub(super) &'a Url);

impl fmt::Display for Server<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme(), self.0.host_str().unwrap_or_default())?;
        self.0.port().map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// Returns true if two URLs have the same scheme, host and port, so that a credential for one may be sent to the other.
pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// Returns true if `url` is on the host of `credential_url` and uses TLS, and `credential_url` does not. Sending the
/// credential to `url` is safer than sending it to `credential_url`, for which it was configured.
fn is_upgrade(credential_url: &Url, url: &Url) -> bool {
    (credential_url.scheme(), url.scheme()) == ("http", "https")
        && credential_url.host() == url.host()
        && (url.port() == credential_url.port() || url.port().is_none())
}

/// Returns the target of a redirect: `location`, resolved against `from`.
///
/// # Errors
/// `Unavailable` for a missing `Location`, a scheme other than http and https, and a redirect from https to http.
pub(super) fn redirect_target(from: &Url, location: Option<&HeaderValue>) -> Result<Url> {
    let refuse =
        |why: &str| Err(Error::new(ErrorKind::Unavailable, format!("{} redirects {why}; not followed", Server(from))));
    // `Location` may be relative to the redirecting URL.
    let Some(target) = location.and_then(|value| value.to_str().ok()).and_then(|text| from.join(text).ok()) else {
        return refuse("without a valid Location header");
    };
    match (from.scheme(), target.scheme()) {
        (_, "https") | ("http", "http") => Ok(target),
        // A redirect out of TLS would expose the response to modification.
        ("https", "http") => refuse(&format!("from https to {}", Server(&target))),
        (_, scheme) => refuse(&format!("to an address that begins with {scheme:?}")),
    }
}

/// Converts a transport failure (connection, TLS, timeout, or a broken connection) into an error with a remedy.
pub(super) fn transport_error(error: reqwest::Error, url: &Url) -> Error {
    let error = error.without_url();
    // The client's own message ("error sending request") adds nothing to its cause.
    let server = Server(url);
    let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), error_chain);
    const ROOTS: &str =
        "install the system's root certificates (ca-certificates), or set SSL_CERT_FILE to a file with them";
    if let Some(untrusted) = tls_error(&server.to_string(), &why, ROOTS) {
        return untrusted;
    }
    if error.is_builder() {
        // The address was parsed before, or came from a redirect.
        return Error::corrupt(format!("an address at {server} cannot be requested")).cause(why);
    }
    // A failed connection may be the fault of the proxy, so name it.
    let proxy = proxy_of(url).filter(|_| error.is_connect());
    let what = match (error.is_connect(), error.is_timeout()) {
        (true, _) => match &proxy {
            Some(proxy) => format!("cannot reach {server} through the proxy {proxy}"),
            None => format!("cannot reach {server}"),
        },
        (_, true) => format!("timed out waiting for {server}"),
        _ => format!("the connection to {server} broke"),
    };
    let wants_password = why.contains("authorization required");
    let failed = with_lookup_deadline(Error::unavailable(what).cause(why.clone()), &why);
    match proxy {
        Some(_) if wants_password => failed.transient(false).hint(PROXY_USER_HINT),
        Some(_) => failed.hint("check HTTPS_PROXY and HTTP_PROXY; hosts in NO_PROXY are reached without it"),
        None if error.is_connect() => failed.hint("check the network and the proxy settings (HTTPS_PROXY)"),
        None => failed,
    }
}

/// Returns the scheme, host and port of the proxy that the client uses for `url`, without user and password.
fn proxy_of(url: &Url) -> Option<String> {
    let proxy = Matcher::from_env().intercept(&url.as_str().parse().ok()?)?;
    let proxy = Url::parse(&proxy.uri().to_string()).ok()?;
    Some(Server(&proxy).to_string())
}

/// Formats an error and all its causes on one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}

/// Reads a short body to its end, so that the connection can be reused. Gives up on a long or slow body.
pub(super) async fn drain(response: Response) {
    read_body(response.bytes_stream(), BodyLimits::drain()).await;
}

/// Cuts a stream after `bytes` bytes.
pub(super) fn first_bytes(stream: BoxStream<'static, Result<Bytes>>, bytes: u64) -> BoxStream<'static, Result<Bytes>> {
    let limited = stream.scan(bytes, |left, chunk| {
        let limited = match chunk {
            // End the stream, which also drops the rest of the response.
            _ if *left == 0 => None,
            Err(error) => Some(Err(error)),
            Ok(mut chunk) => {
                chunk.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= chunk.len() as u64;
                Some(Ok(chunk))
            }
        };
        std::future::ready(limited)
    });
    limited.boxed()
}

/// Returns the body of a response as a stream.
pub(super) fn body_stream(response: Response, url: &Url) -> BoxStream<'static, Result<Bytes>> {
    let url = url.clone();
    response.bytes_stream().map(move |chunk| chunk.map_err(|error| transport_error(error, &url))).boxed()
}

/// Checks status and headers of a response to a request for `range` of a file. Returns the offset in the file at which
/// the body begins: the start of `range`, or 0 if the server sends the whole file.
///
/// # Errors
/// `Corrupt` if the response is another range, or states another size than `size` (the size in the file list, if
/// known).
pub(super) fn body_start(
    status: StatusCode,
    headers: &HeaderMap,
    range: &std::ops::Range<u64>,
    size: Option<u64>,
) -> Result<u64> {
    let (first, last) = (range.start, range.end.saturating_sub(1));
    let (start, reported_size) = match status {
        StatusCode::OK => (0, content_length(headers)),
        StatusCode::PARTIAL_CONTENT => match header(headers, "content-range").and_then(content_range) {
            // A shorter range is allowed: the reader requests the rest.
            Some(received) if received.first == first && received.last <= last => (first, received.total),
            Some(received) => {
                return Err(Error::corrupt(format!(
                    "requested bytes {first}-{last}, but the server sent bytes {}-{}",
                    received.first, received.last
                )));
            }
            None => return Err(Error::corrupt("the server answered 206 without a valid Content-Range")),
        },
        StatusCode::RANGE_NOT_SATISFIABLE => {
            // A range inside the listed size was refused, so the file has changed or the list is wrong.
            let reported_size = header(headers, "content-range").and_then(|text| text.strip_prefix("bytes */"));
            let size = size.map_or("no size".into(), |size| format!("{size} bytes"));
            return Err(Error::corrupt(format!(
                "the server refused bytes {first}-{last}: the file list states {size}, the server states {}",
                reported_size.unwrap_or("no size"),
            )));
        }
        status => {
            let message = format!("unexpected status {status} for a file");
            return Err(Error::unavailable(message).transient(false).hint(REFUSED_HINT));
        }
    };
    check_headers(status, headers)?;
    match (reported_size, size) {
        (Some(reported), Some(size)) if reported != size => {
            Err(Error::corrupt(format!("the file list states {size} bytes, but the server states {reported} bytes")))
        }
        // Without a listed size, the range must at least fit into the file.
        (Some(reported), None) if reported < range.end => {
            Err(Error::corrupt(format!("requested bytes {first}-{last} of a file of {reported} bytes")))
        }
        _ => Ok(start),
    }
}

/// Returns the error for an HTML page in the place of a file or of metadata.
pub(super) fn html_error(url: &Url) -> Error {
    Error::corrupt(format!("{} answers with an HTML page (text/html)", Server(url))).hint(PORTAL_HINT)
}

/// Returns the `Content-Length`, if it is present and a number.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    header(headers, "content-length")?.parse().ok()
}

/// Returns the value of a header (`name` in lower case), if it is present and text.
pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Returns the URL of the next page from the header `Link: <…>; rel="next"`.
pub(super) fn next_link(headers: &HeaderMap) -> Option<&str> {
    let values = headers.get_all(LINK).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(links).find(|(_, relation)| relation.split(' ').any(|word| word == "next")).map(|(url, _)| url)
}

/// Parses one `Link` header into pairs of URL and relation. A comma inside `<…>` belongs to the URL.
fn links(value: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let mut rest = value;
    while let Some((url, after)) = rest.split_once('<').and_then(|(_, after)| after.split_once('>')) {
        let (parameters, next) = after.split_once(",").unwrap_or((after, ""));
        let relation = parameters.split(';').find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("rel").then(|| value.trim().trim_matches('"'))
        });
        found.push((url, relation.unwrap_or_default()));
        rest = next;
    }
    found
}

/// Returns the wait that the server requests: `Retry-After`, else the reset time of an exhausted `RateLimit`.
pub(super) fn requested_wait(headers: &HeaderMap) -> Option<Duration> {
    let reset = || header(headers, "ratelimit").and_then(rate_limit_reset).map(Duration::from_secs);
    retry_after(headers).or_else(reset).map(|wait| wait.min(RETRY_AFTER_MAX))
}

/// Returns the seconds until the first exhausted policy is reset: 55 for `"resolvers";r=0;t=55`.
fn rate_limit_reset(text: &str) -> Option<u64> {
    text.split(',').find_map(|policy| {
        let parameter = |name: &str| {
            let pairs = policy.split(';').filter_map(|pair| pair.trim().split_once('='));
            pairs.into_iter().find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<u64>().ok())
        };
        parameter("t").filter(|_| parameter("r") == Some(0))
    })
}

/// An error response with the explanation of the server.
#[derive(Debug)]
pub(super) struct HttpErrorResponse {
    /// The status code.
    pub(super) status: StatusCode,
    /// The header `X-Error-Code` of the Hub, if present.
    pub(super) code: Option<String>,
    /// The server's error message, shortened to one line of bounded length.
    pub(super) message: Option<String>,
    /// The wait that the server requests.
    pub(super) wait: Option<Duration>,
    /// The beginning of the body, for origins with an error format of their own. Empty if it must not be quoted.
    #[cfg_attr(not(any(feature = "mlflow", feature = "oci")), allow(dead_code))]
    pub(super) body: Vec<u8>,
}

impl HttpErrorResponse {
    /// Reads status, headers and body. Keeps the message and the body only if `quote` is true, because texts from a
    /// redirect target must not appear in messages. A body that is too long or too slow is cut.
    pub(super) async fn read(http: &Http, response: Response, quote: bool) -> Self {
        let headers = response.headers();
        let (status, wait) = (response.status(), requested_wait(headers));
        let code = header(headers, "x-error-code").map(printable::quote);
        let message = header(headers, "x-error-message").map(printable::quote);
        let (body, _) = read_body(response.bytes_stream(), BodyLimits::error_response(http.read_timeout)).await;
        // The header takes precedence over the body.
        let message = message.or_else(|| json_error(&body)).filter(|_| quote);
        let body = if quote { body } else { Vec::new() };
        Self { status, code, message: message.filter(|text| !text.is_empty()), wait, body }
    }

    /// Returns the server's message with a colon before it, or an empty text.
    pub(super) fn explanation(&self) -> String {
        self.message.as_ref().map_or(String::new(), |message| format!(": {message}"))
    }

    /// Converts the response into an error according to its status. Origins refine it by their own error codes.
    pub(super) fn error(&self, server: &Url) -> Error {
        let explanation = self.explanation();
        let (status, server) = (self.status, Server(server));
        let what = format!("{server} answered {status}{explanation}");
        let error = match status {
            StatusCode::TOO_MANY_REQUESTS => Error::unavailable(format!("{server} throttled the request{explanation}")),
            // These client errors are transient, all others are permanent. Most server errors are transient.
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY => Error::unavailable(what),
            StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => {
                Error::unavailable(what).transient(false).hint(REFUSED_HINT)
            }
            StatusCode::NETWORK_AUTHENTICATION_REQUIRED => Error::unavailable(what).transient(false).hint(PORTAL_HINT),
            status if status.is_server_error() => Error::unavailable(what),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::new(ErrorKind::Unauthorized, what),
            StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS => Error::new(ErrorKind::Unauthorized, what)
                .hint("the server withholds it for legal reasons, and no credential gives access"),
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
                Error::unavailable(what).transient(false).hint(PROXY_USER_HINT)
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => Error::not_found(what),
            _ => Error::unavailable(what).transient(false).hint(REFUSED_HINT),
        };
        // Both statuses make the limiter send fewer concurrent requests.
        let error = if matches!(self.status.as_u16(), 429 | 503) { error.throttled(server.to_string()) } else { error };
        match self.wait {
            Some(wait) if error.is_transient() => error.retry_after(wait),
            _ => error,
        }
    }
}

/// Returns the message of a JSON error: `{"error": "…"}` or `{"error": ["…"]}`.
pub(super) fn json_error(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let error = value.get("error")?;
    error.as_str().or_else(|| error.get(0)?.as_str()).map(printable::quote)
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::HeaderName;

    fn url(text: &str) -> Url {
        Url::parse(text).expect(text)
    }

    fn headers(rows: &[(&'static str, &str)]) -> HeaderMap {
        let row = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), value.parse().expect("value"));
        rows.iter().map(row).collect()
    }

    #[test]
    fn a_credential_belongs_to_one_scheme_host_and_port() {
        let home = url("https://hub.example");
        for same in
            ["https://hub.example/x?y", "https://hub.example:443/", "https://HUB.example", "https://a@hub.example"]
        {
            assert!(same_origin(&home, &url(same)), "{same}");
        }
        for other in [
            "http://hub.example",
            "http://hub.example:443",
            "https://hub.example:444",
            "https://hub.example.evil",
            "https://evil.hub.example",
            "https://hub.example@evil.test",
            "https://127.0.0.1",
        ] {
            assert!(!same_origin(&home, &url(other)), "{other}");
        }
        assert!(!same_origin(&url("http://127.0.0.1:1"), &url("http://127.0.0.1:2")));
        assert!(!same_origin(&url("http://127.0.0.1:1"), &url("http://127.0.0.2:1")));
        assert!(!same_origin(&url("http://localhost:1"), &url("http://127.0.0.1:1")));
    }

    #[test]
    fn redirects_never_leave_tls_nor_http() {
        let to = |from: &str, location: &str| {
            let location = HeaderValue::from_str(location).expect("value");
            redirect_target(&url(from), Some(&location)).map(|url| url.to_string())
        };
        assert_eq!(to("https://a.b/c/d", "/e").expect("relative"), "https://a.b/e");
        assert_eq!(to("http://a.b/c", "https://x.y/z?s=1").expect("up"), "https://x.y/z?s=1");
        assert_eq!(to("http://a.b/c", "//x.y/z").expect("same scheme"), "http://x.y/z");
        for bad in ["http://a.b/c", "file:///etc/passwd", "ftp://x", "data:,x", "http://"] {
            let error = to("https://a.b/c", bad).expect_err(bad);
            assert!(!error.is_transient(), "{error}");
        }
        assert!(
            to("https://a.b", "http://x.y/z?Signature=canary")
                .is_err_and(|error| !error.to_string().contains("canary"))
        );
        assert!(redirect_target(&url("https://a.b"), None).is_err());
    }

    #[test]
    fn path_segments_are_encoded_unambiguously() {
        assert_eq!(encode_segment("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encode_path("sub dir/fé+%.txt"), "sub%20dir/f%C3%A9%2B%25.txt");
        assert_eq!(encode_path("a?b#c;d=e&f:@"), "a%3Fb%23c%3Bd%3De%26f%3A%40");
        let full = url(&format!("http://h/{}", encode_path("…/%2e%2e/x")));
        assert_eq!(full.path(), "/%E2%80%A6/%252e%252e/x");
    }

    #[test]
    fn waits_are_read_from_either_header_and_bounded() {
        let wait = |rows: &[(&'static str, &str)]| requested_wait(&headers(rows)).map(|wait| wait.as_secs());
        assert_eq!(wait(&[("retry-after", "7")]), Some(7));
        assert_eq!(wait(&[("retry-after", " 7 "), ("ratelimit", "\"api\";r=0;t=55")]), Some(7));
        assert_eq!(wait(&[("ratelimit", "\"resolvers\";r=0;t=55")]), Some(55));
        assert_eq!(wait(&[("ratelimit", "\"api\";r=12;t=9, \"resolvers\"; r=0; t=55")]), Some(55));
        assert_eq!(wait(&[("ratelimit", "\"api\";r=12;t=9")]), None);
        assert_eq!(wait(&[("retry-after", "0"), ("ratelimit", "\"api\";r=0;t=55")]), Some(55));
        assert_eq!(wait(&[("ratelimit", "nonsense;;=;t=")]), None);
        assert_eq!(wait(&[("ratelimit", "\"api\";r=0;t=18446744073709551615")]), Some(RETRY_AFTER_MAX.as_secs()));
        assert_eq!(wait(&[]), None);
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        let next = |value: &str| next_link(&headers(&[("link", value)])).map(str::to_owned);
        assert_eq!(next("<https://h/a?cursor=1>; rel=\"next\"").as_deref(), Some("https://h/a?cursor=1"));
        assert_eq!(next("<https://h/a,b>; rel=\"prev\", <https://h/c,d>; rel=next").as_deref(), Some("https://h/c,d"));
        assert_eq!(next("<https://h/a>; rel=\"xet-auth\""), None);
        assert_eq!(next("<https://h/a>; title=\"x\"; rel=\"last next\"").as_deref(), Some("https://h/a"));
        assert_eq!(next("rel=\"next\""), None);
        assert_eq!(next("<broken; rel=\"next\""), None);
    }

    #[test]
    fn a_response_must_match_the_requested_range() {
        let start = |status: u16, rows: &[(&'static str, &str)]| {
            body_start(StatusCode::from_u16(status).expect("status"), &headers(rows), &(5..9), Some(10))
        };
        assert_eq!(start(206, &[("content-range", "bytes 5-8/10")]).expect("exact"), 5);
        assert_eq!(start(206, &[("content-range", "bytes 5-6/10")]).expect("shorter is allowed"), 5);
        assert_eq!(start(206, &[("content-range", "bytes 5-8/*")]).expect("size unknown"), 5);
        assert_eq!(start(200, &[("content-length", "10")]).expect("whole"), 0);
        assert_eq!(start(200, &[]).expect("whole, length unknown"), 0);
        for (status, rows) in [
            (206, ("content-range", "bytes 4-8/10")),
            (206, ("content-range", "bytes 5-9/10")),
            (206, ("content-range", "bytes 5-8/11")),
            (206, ("content-range", "bytes 8-5/10")),
            (206, ("content-range", "bytes 5-10/10")),
            (206, ("content-range", "items 5-8/10")),
            (206, ("etag", "\"x\"")),
            (200, ("content-length", "11")),
            (200, ("content-encoding", "gzip")),
            (416, ("content-range", "bytes */3")),
        ] {
            let error = start(status, &[rows]).expect_err("contradicts");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{status} {rows:?}: {error}");
        }
        let error = start(206, &[("content-range", "bytes 5-8/11")]).expect_err("lies");
        assert!(error.to_string().contains("10 bytes") && error.to_string().contains("11 bytes"), "{error}");
        assert!(start(204, &[]).is_err());
        assert!(body_start(StatusCode::OK, &headers(&[("content-length", "8")]), &(5..9), None).is_err());
    }

    #[test]
    fn an_error_message_of_a_server_becomes_one_bounded_line() {
        assert_eq!(json_error(b"{\"error\":\"a\\nb\\u001b[31m\"}").as_deref(), Some("a b\\u{1b}[31m"));
        assert_eq!(json_error(b"{\"error\":[\"x\"]}").as_deref(), Some("x"));
        assert_eq!(json_error(b"<html>"), None);
    }

    #[test]
    fn the_status_decides_whether_an_error_is_transient() {
        let error = |status: u16, wait: Option<u64>| {
            let wait = wait.map(Duration::from_secs);
            let status = StatusCode::from_u16(status).expect("status");
            HttpErrorResponse { status, code: None, message: None, wait, body: Vec::new() }
                .error(&url("http://h/x?secret"))
        };
        assert_eq!(error(429, Some(5)).wait(), Some(Duration::from_secs(5)));
        assert!(error(429, None).is_transient() && error(503, None).is_transient() && error(500, None).is_transient());
        assert!(!error(400, Some(5)).is_transient() && !error(401, Some(5)).is_transient());
        assert_eq!(error(404, None).kind(), ErrorKind::NotFound);
        assert!(!error(500, None).to_string().contains("secret"));
    }
}
