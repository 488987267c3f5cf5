//! A web server as an origin: one artifact is one file.
//!
//! Resolving requests the first byte, because `HEAD` is often refused or answered differently, and signed URLs allow
//! one method only. The response states size, validators and digests. If the reference has no version, the validator
//! becomes the version: `etag-…` from a strong entity tag, else `modified-…` from date and size, else `sha256-…`, for
//! which the whole file is read once.
//!
//! Later responses must be of the same content. If a digest is known, it alone decides. Otherwise the validators must
//! agree with those of the first response. The back ends of a load balancer may have different ones for one file, so a
//! response that differs is requested again a few times; then the read fails as superseded.
//!
//! Digests come from `Repr-Digest`, `Digest`, `Content-Digest` and `X-Checksum-Sha256`, and from a `.sha256` file
//! beside the file. Credentials are sent only to the scheme, host and port of the reference's URL, and those for
//! http also to https on the same host.

use super::authorization;
use super::http::{self, FinalResponse, Http, HttpErrorResponse, Request, Server};
use super::{Origin, ResolvedSource};
use crate::config::Config;
use crate::credentials::{Choice, Credential, Credentials};
use crate::digest::{Digest, Provenance};
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath, Version};
use crate::limits;
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::mutex::Mutex;
use crate::printable;
use crate::reference::{Reference, Scheme, Target, WebFile, is_derived, web};
use crate::sidecar;
use crate::source::{Body, Source};
use crate::transfer::{Retry, StallDetector, check_headers, content_range};
use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::StreamExt as _;
use reqwest::StatusCode;
use reqwest::header::{CONNECTION, HeaderMap, HeaderValue, IF_MATCH, RANGE};
use sha2::Digest as _;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;
use url::Url;

/// Maximum number of requests while the responses have other validators than the first one. After that, the file counts
/// as replaced.
const ATTEMPTS_MAX: usize = 8;
/// The same, once a server was seen to return to the first validators: its back ends disagree. Enough for five of them
/// (0.8^64 < 10^-6).
const ATTEMPTS_IN_POOL_MAX: usize = 64;
/// Largest checksum file, in bytes. It has one line per file of a release.
const SIDECAR_BYTES_MAX: u64 = 1024 * 1024;
/// Largest file without a stated size, in bytes: more than any single file of a model has.
const UNSIZED_BYTES_MAX: u64 = 1 << 40;
/// Interval between log messages while a whole file is read for its digest.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Longest time for which a source created by resolving is kept for its caller. After that the server is requested
/// again.
const RECENT_SOURCE_AGE_MAX: Duration = Duration::from_secs(10);
/// Longest validator that becomes a version unchanged. A longer one, or one with special characters, is hashed.
const VALIDATOR_LEN_MAX: usize = 80;

/// A client for all web servers.
#[derive(Debug)]
pub(super) struct Web {
    credentials: Credentials,
    http: Http,
    retry: Retry,
    /// The sources that resolving created in the last seconds, with the properties that the server stated.
    recent: Mutex<HashMap<ArtifactKey, (Instant, Arc<WebSource>)>>,
    /// True once the warning about a netrc that other users can read was logged.
    netrc_warning_logged: AtomicBool,
}

/// The properties of a file, as stated by its server.
#[derive(Debug, Clone)]
struct FileInfo {
    size: u64,
    etag: Option<HeaderValue>,
    modified: Option<HeaderValue>,
    /// The digest stated in the headers.
    stated: Option<Digest>,
    /// The digest of the bytes, if the whole file had to be read.
    computed: Option<Digest>,
}

#[async_trait]
impl Origin for Arc<Web> {
    fn scheme(&self) -> &'static Scheme {
        &web::SCHEME
    }

    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        let Target::Web(file) = &reference.target else { return Ok(None) };
        let has_expected_digest = reference.digest.is_some();
        // A version in the reference is trusted without a request.
        if let Some(version) = &file.version {
            let key = file.key_at(version.clone())?;
            let source = Arc::new(WebSource::new(self, file, key.clone(), has_expected_digest)?);
            return Ok(Some(ResolvedSource { source, key }));
        }
        let info = self.retry.run(|| self.probe(&file.url, true, has_expected_digest)).await?;
        let key = file.key_at(info.version()?)?;
        let source = WebSource::new(self, file, key.clone(), has_expected_digest)?;
        let source = Arc::new(WebSource { info: OnceCell::new_with(Some(info)), ..source });
        self.keep_recent(&source);
        Ok(Some(ResolvedSource { source, key }))
    }

    fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let Target::Web(file) = &reference.target else { return None };
        if let Some(source) = self.take_recent(key) {
            return Some(source);
        }
        Some(Arc::new(WebSource::new(self, file, key.clone(), reference.digest.is_some()).ok()?))
    }
}

impl Web {
    /// Creates a client. Sends no request.
    pub(super) fn new(config: &Config, retry: Retry) -> Self {
        Self {
            credentials: config.credentials.clone(),
            http: Http::new(config, &retry),
            retry,
            recent: Mutex::default(),
            netrc_warning_logged: AtomicBool::new(false),
        }
    }

    /// Keeps a source for the next call of [`take_recent`](Self::take_recent), and drops outdated ones.
    fn keep_recent(&self, source: &Arc<WebSource>) {
        let mut recent = self.recent.lock();
        recent.retain(|_, (since, _)| since.elapsed() < RECENT_SOURCE_AGE_MAX);
        recent.insert(source.key.clone(), (Instant::now(), source.clone()));
    }

    /// Returns the source that resolving has just created for `key`, which saves a request.
    fn take_recent(&self, key: &ArtifactKey) -> Option<Arc<WebSource>> {
        let (since, source) = self.recent.lock().remove(key)?;
        (since.elapsed() < RECENT_SOURCE_AGE_MAX).then_some(source)
    }

    /// Sends a GET for `url` and follows redirects. The credential for `file_url` is sent only to `file_url`.
    async fn get(&self, url: Url, file_url: &Url, headers: HeaderMap) -> Result<FinalResponse> {
        let authorization = self.authorization(file_url)?;
        self.http
            .follow(
                url,
                Request {
                    headers,
                    credential_url: file_url,
                    authorization: authorization.as_ref(),
                    same_origin_only: false,
                },
            )
            .await
    }

    /// Returns the `Authorization` header for `file_url`, if there is a credential for it.
    fn authorization(&self, file_url: &Url) -> Result<Option<HeaderValue>> {
        let credential = match self.credentials.choose(file_url) {
            Choice::Configured(credential) => credential,
            Choice::Netrc(credential) => {
                if self.credentials.is_netrc_readable_by_others()
                    && !self.netrc_warning_logged.swap(true, Ordering::Relaxed)
                {
                    tracing::warn!("other users can read the netrc, which contains a password: run chmod 600 on it");
                }
                credential
            }
            // A netrc login is not sent over plain http.
            Choice::Withheld | Choice::None => return Ok(None),
        };
        let what = format_args!("the credential for {}", Server(file_url));
        match credential {
            Credential::Bearer(token) => authorization::bearer(token.expose(), what).map(Some),
            Credential::Basic { username, password } => {
                authorization::basic(username, password.expose(), what).map(Some)
            }
        }
    }

    /// Requests the properties of the file at `url`.
    ///
    /// `derive`: the version must be derived from the properties. `has_expected_digest`: the reference has a digest. A
    /// file without a size or without a validator is read as a whole, because only its digest can detect that it is
    /// replaced during the download. A validator is not needed if a digest is known and no version is derived.
    async fn probe(&self, url: &Url, derive: bool, has_expected_digest: bool) -> Result<FileInfo> {
        // The first byte, because a range request also shows whether ranges are supported.
        let headers = HeaderMap::from_iter([(RANGE, http::range_header(&(0..1))?)]);
        let mut fetched = self.get(url.clone(), url, headers).await?;
        // Some servers refuse ranges instead of ignoring them. A real 416 means that the file is empty.
        if fetched.response.status() == StatusCode::RANGE_NOT_SATISFIABLE && stated_size(&fetched) != Some(0) {
            http::drain(fetched.response).await;
            fetched = self.get(url.clone(), url, HeaderMap::new()).await?;
        }
        let fetched = self.checked(fetched, url).await?;
        let (status, headers) = (fetched.response.status(), fetched.response.headers());
        let (etag, modified) = (headers.get("etag").cloned(), headers.get("last-modified").cloned());
        let stated = stated_digest(headers, status)?;
        let mut info = FileInfo { size: 0, etag, modified, stated, computed: None };
        // Sufficient: a size together with a validator or, if no version is needed, with a digest.
        match stated_size(&fetched) {
            Some(size) if info.validator(size).is_some() || !derive && (has_expected_digest || stated.is_some()) => {
                info.size = size;
            }
            _ => self.hash_whole_file(&mut info, fetched, url).await?,
        }
        Ok(info)
    }

    /// Returns the response, unless it is an error or a page in the place of the file. A refused condition (412)
    /// passes, and so does a refused range (416).
    async fn checked(&self, fetched: FinalResponse, file_url: &Url) -> Result<FinalResponse> {
        let status = fetched.response.status();
        if status.is_success() {
            check_is_file(status, fetched.response.headers(), file_url)?;
        } else if !matches!(status, StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PRECONDITION_FAILED) {
            return Err(self.error_of(fetched, file_url).await);
        }
        Ok(fetched)
    }

    /// Reads the whole file to determine its size and digest. Uses the response `fetched` if it is the whole file.
    async fn hash_whole_file(&self, info: &mut FileInfo, mut fetched: FinalResponse, url: &Url) -> Result<()> {
        tracing::info!(server = %Server(url), "no size or no validator; reading the whole file once to hash it");
        if fetched.response.status() != StatusCode::OK {
            http::drain(fetched.response).await;
            fetched = self.get(url.clone(), url, HeaderMap::new()).await?;
            if fetched.response.status() == StatusCode::OK {
                check_is_file(StatusCode::OK, fetched.response.headers(), url)?;
            } else {
                return Err(self.error_of(fetched, url).await);
            }
        }
        let stated_bytes = http::content_length(fetched.response.headers());
        if stated_bytes.is_some_and(|stated_bytes| stated_bytes > limits::FILE_BYTES_MAX) {
            return Err(Error::corrupt(format!(
                "{} states a size above the limit of {} bytes",
                Server(url),
                limits::FILE_BYTES_MAX
            )));
        }
        let (mut size, mut hasher) = (0, sha2::Sha256::new());
        // The read timeout of the client ends a silent connection; the detector ends one that is far too slow.
        let mut stall = StallDetector::new(self.retry.read_timeout());
        let mut last_log = Instant::now();
        let mut body = http::body_stream(fetched.response, &fetched.url);
        loop {
            let wait_start = Instant::now();
            let Some(chunk) = body.next().await else { break };
            let chunk = chunk?;
            size += chunk.len() as u64;
            if stated_bytes.is_none() && size > UNSIZED_BYTES_MAX {
                let message = format!("{} states no size and has sent {UNSIZED_BYTES_MAX} bytes", Server(url));
                return Err(Error::corrupt(message)
                    .hint("check that it is not an endless stream, or let the server send Content-Length"));
            }
            if stall.record(chunk.len() as u64, wait_start.elapsed()) {
                return Err(Error::unavailable(format!("the connection to {} has nearly stalled", Server(url))));
            }
            hasher.update(&chunk);
            if last_log.elapsed() >= LOG_INTERVAL {
                last_log = Instant::now();
                tracing::info!(server = %Server(url), bytes = size, "still reading the whole file");
            }
        }
        if stated_bytes.is_some_and(|stated_bytes| stated_bytes != size) {
            return Err(Error::unavailable(format!("{} ended the file early", Server(url))));
        }
        (info.size, info.computed) = (size, Some(Digest::from_bytes(hasher.finalize().into())));
        Ok(())
    }

    /// Returns the digest from the file `<url>.sha256`; `None` if that file is missing or has no digest for `path`.
    async fn sidecar(&self, file: &WebFile, path: &FilePath) -> Result<Option<Digest>> {
        let mut url = file.url.clone();
        url.set_path(&format!("{}.sha256", file.url.path()));
        let fetched = self.get(url, &file.url, HeaderMap::new()).await?;
        let status = fetched.response.status();
        if !status.is_success() {
            let error = HttpErrorResponse::read(&self.http, fetched.response, false).await.error(&fetched.url);
            // A missing checksum file is normal. A transient error is returned, so that the request is retried.
            return if error.is_transient() { Err(error) } else { Ok(None) };
        }
        // An encoded, too long or unreadable file counts as no checksum file.
        let text = match self.http.body(fetched.response, &fetched.url, SIDECAR_BYTES_MAX).await {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(None),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8(text).ok();
        Ok(text.and_then(|text| sidecar::digest_of(&text, path.as_str())))
    }

    /// Converts an error response into an error with a remedy. All statuses of web servers are mapped here.
    async fn error_of(&self, fetched: FinalResponse, file_url: &Url) -> Error {
        let FinalResponse { response, url, is_same_origin, .. } = fetched;
        let response = HttpErrorResponse::read(&self.http, response, false).await;
        let error = response.error(&url);
        let (server, status) = (Server(file_url), response.status.as_u16());
        match status {
            // The redirect target refused the request, which had no credential.
            401 | 403 if !is_same_origin => {
                let message = format!("{server} redirected the request, and {}", error.message());
                Error::new(error.kind(), message).hint(format!(
                    "credentials for {server} are not sent to redirect targets; use the address that it redirects to"
                ))
            }
            401 | 403 => Error::new(error.kind(), format!("{}; {}", error.message(), self.sent_credential(file_url)))
                .hint(self.credential_hint(file_url)),
            404 | 410
                if is_same_origin
                    && !matches!(self.credentials.choose(file_url), Choice::Configured(_) | Choice::Netrc(_)) =>
            {
                Error::not_found(format!("{}; {}", error.message(), self.sent_credential(file_url))).hint(
                    "check the address; a server may answer 404 if a credential is missing: add one to the netrc, or \
                     under [credentials] in the configuration file",
                )
            }
            404 | 410 => error.hint("check the address"),
            _ => error,
        }
    }

    /// Describes the credential that was sent, for the error message.
    fn sent_credential(&self, file_url: &Url) -> String {
        match self.credentials.choose(file_url) {
            Choice::Configured(_) => "the credential of the configuration file was sent".into(),
            Choice::Netrc(_) => "the credential of the netrc was sent".into(),
            Choice::Withheld => "the netrc has a credential, which is not sent over plain http".into(),
            Choice::None => {
                "no credential was sent: neither the netrc nor the configuration file has one for this server".into()
            }
        }
    }

    /// Returns the hint for a refused or missing credential.
    fn credential_hint(&self, file_url: &Url) -> String {
        let table = format!("[credentials.\"{}\"] in the configuration file", Server(file_url));
        let machine = file_url.host_str().unwrap_or_default();
        match self.credentials.choose(file_url) {
            Choice::Configured(_) => format!("check that {table} is valid and may read this file"),
            Choice::Netrc(_) => {
                format!("check that the entry for {machine} in the netrc is valid and may read this file")
            }
            Choice::Withheld => format!("use https, or state it in {table} if it may be sent in the clear"),
            Choice::None if file_url.scheme() == "http" => format!("write {table}"),
            Choice::None => format!("add `machine {machine} login … password …` to ~/.netrc, or {table} with bearer"),
        }
    }
}

/// Returns the size of the whole file, as stated by the headers of a response.
fn stated_size(fetched: &FinalResponse) -> Option<u64> {
    let headers = fetched.response.headers();
    let range = http::header(headers, "content-range");
    match fetched.response.status() {
        StatusCode::OK => http::content_length(headers),
        StatusCode::PARTIAL_CONTENT => content_range(range?)?.total,
        StatusCode::RANGE_NOT_SATISFIABLE => range?.strip_prefix("bytes */")?.parse().ok(),
        _ => None,
    }
}

/// Rejects a response that is not the file itself: an encoded body, or an HTML page in its place.
fn check_is_file(status: StatusCode, headers: &HeaderMap, url: &Url) -> Result<()> {
    let server = Server(url);
    check_headers(status, headers)?;
    // A page is expected only if the URL itself names one.
    let names_page = [".html", ".htm"].iter().any(|end| url.path().ends_with(end));
    if http::is_html(headers) && !names_page {
        return Err(Error::corrupt(format!("{server} answers with an HTML page (text/html), not with a file")).hint(
            "open the address in a browser: it may be a login page, or a page about the file; credentials come from \
             the netrc or [credentials] in the configuration file",
        ));
    }
    Ok(())
}

/// Returns the SHA-256 of the whole file, as stated by the headers.
///
/// # Errors
/// `Corrupt` if the headers state different digests.
fn stated_digest(headers: &HeaderMap, status: StatusCode) -> Result<Option<Digest>> {
    let decode = |text: &str| Some(Digest::from_bytes(BASE64_STANDARD.decode(text.trim()).ok()?.try_into().ok()?));
    let lists = |name: &str| -> Vec<String> {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).map(|item| item.trim().to_owned()).collect()
    };
    let sha256_of = |item: &String| {
        let (algorithm, value) = item.split_once('=')?;
        // `Repr-Digest` puts the value between colons and may add parameters.
        let value = value.split(';').next().unwrap_or(value).trim().trim_matches(':');
        algorithm.trim().eq_ignore_ascii_case("sha-256").then(|| decode(value))?
    };
    let mut stated: Vec<Digest> = lists("repr-digest").iter().chain(&lists("digest")).filter_map(sha256_of).collect();
    if status == StatusCode::OK {
        // In a partial response `Content-Digest` is that of the part.
        stated.extend(lists("content-digest").iter().filter_map(sha256_of));
    }
    stated.extend(http::header(headers, "x-checksum-sha256").and_then(|hex| hex.trim().parse::<Digest>().ok()));
    // All stated digests must agree.
    match stated.iter().find(|other| **other != stated[0]) {
        Some(other) => Err(Error::corrupt(format!("the server states two digests, {} and {other}", stated[0]))),
        None => Ok(stated.first().copied()),
    }
}

impl FileInfo {
    /// Returns the validator as text: the strong entity tag, else the modification date with the size.
    fn validator(&self, size: u64) -> Option<String> {
        if let Some(etag) = self.strong_etag() {
            let text = String::from_utf8_lossy(etag.as_bytes()).trim_matches('"').to_owned();
            return Some(format!("etag-{}", version_text(&text)));
        }
        let modified = self.modified.as_ref()?.to_str().ok()?;
        // A version has no spaces and commas: join the words of the date.
        let words: Vec<_> = modified.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect();
        Some(format!("modified-{}-{size}", version_text(&words.join("-"))))
    }

    /// Returns the entity tag if it is strong: in quotes, without `W/`, and not empty.
    fn strong_etag(&self) -> Option<&HeaderValue> {
        self.etag.as_ref().filter(|etag| etag.as_bytes().starts_with(b"\"") && etag.len() > 2)
    }

    /// Returns the version: the validator, else the computed digest.
    fn version(&self) -> Result<Version> {
        let validator = self.validator(self.size).or_else(|| Some(format!("sha256-{}", self.computed?)));
        Version::new(&validator.unwrap_or_default())
    }

    /// Returns what differs in a response, as far as its headers show.
    ///
    /// # Errors
    /// `Corrupt` if the headers state different digests.
    fn difference(&self, fetched: &FinalResponse) -> Result<Option<Difference>> {
        let (status, headers) = (fetched.response.status(), fetched.response.headers());
        let of_content = |description| Ok(Some(Difference { description, is_of_content: true }));
        if let Some(bytes) = stated_size(fetched).filter(|bytes| *bytes != self.size) {
            return of_content(format!("it had {} bytes and has now {bytes}", self.size));
        }
        if let (Some(ours), Some(theirs)) = (self.stated, stated_digest(headers, status)?)
            && ours != theirs
        {
            return of_content(format!("its sha256 was {ours} and is now {theirs}"));
        }
        let refused = (status == StatusCode::PRECONDITION_FAILED).then(|| "its ETag is another one".to_owned());
        let description = self.other_validator(headers).or(refused);
        Ok(description.map(|description| Difference { description, is_of_content: false }))
    }

    /// Returns the validator that differs in a response, for the message; `None` if they agree, as far as both are
    /// stated.
    fn other_validator(&self, headers: &HeaderMap) -> Option<String> {
        let differs = |ours: &Option<HeaderValue>, theirs: Option<&HeaderValue>, name: &str| {
            let (ours, theirs) = (opaque(ours.as_ref()?), opaque(theirs?));
            (ours != theirs).then(|| format!("its {name} was {ours} and is now {theirs}"))
        };
        let etag = headers.get("etag");
        // An unchanged strong tag outweighs a different date: mirrors may have their own dates.
        let same_etag = self.strong_etag().is_some() && etag.map(opaque) == self.etag.as_ref().map(opaque);
        differs(&self.etag, etag, "ETag").or_else(|| {
            let modified = headers.get("last-modified").filter(|_| !same_etag);
            differs(&self.modified, modified, "Last-Modified")
        })
    }
}

/// Returns the text of a validator without the mark of a weak entity tag (`W/`), which proxies add.
fn opaque(validator: &HeaderValue) -> String {
    let text = printable::quote(&String::from_utf8_lossy(validator.as_bytes()));
    text.strip_prefix("W/").map(str::to_owned).unwrap_or(text)
}

/// Returns `text` if it can be a version, else a hash of it.
fn version_text(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '+' | '=');
    match !text.is_empty() && text.len() <= VALIDATOR_LEN_MAX && text.chars().all(safe) {
        true => text.to_owned(),
        false => Digest::of(text.as_bytes()).to_string()[..32].to_owned(),
    }
}

/// The source for one file at one version.
struct WebSource {
    web: Arc<Web>,
    file: WebFile,
    path: FilePath,
    key: ArtifactKey,
    /// True if the reference has a digest. Validators then need not agree, and a server without a digest causes no
    /// warning.
    has_expected_digest: bool,
    info: OnceCell<FileInfo>,
    manifest: OnceCell<Manifest>,
    /// The target of the last redirect. It is requested directly until it is refused.
    redirect_url: Mutex<Option<Url>>,
    /// True if the server refuses ranges instead of ignoring them.
    refuses_ranges: AtomicBool,
    /// True if the server answered a range with the whole file.
    ignores_ranges: AtomicBool,
    /// True if a response had other validators than the first one.
    saw_other_validators: AtomicBool,
    /// True once the first validators came back after others: the file was not replaced, but the back ends of the
    /// server disagree.
    back_ends_disagree: AtomicBool,
}

/// A difference between a response and the first one.
struct Difference {
    /// What differs, for the message.
    description: String,
    /// True if the content itself differs, and not only a validator.
    is_of_content: bool,
}

/// Prints no signed URLs.
impl fmt::Debug for WebSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSource").field("key", &self.key).finish_non_exhaustive()
    }
}

#[async_trait]
impl Source for WebSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    fn endpoint(&self) -> Option<String> {
        Some(Server(&self.file.url).to_string())
    }

    /// A missing file is an error rather than `None`, because the message has a remedy.
    async fn manifest(&self) -> Result<Option<Manifest>> {
        let manifest = self.manifest.get_or_try_init(|| self.list()).await;
        manifest.cloned().map(Some).context(&self.key, Tier::Origin)
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.open(path, range).await.context(&self.key, Tier::Origin)
    }

    fn ignores_ranges(&self) -> bool {
        self.ignores_ranges.load(Ordering::Relaxed)
    }

    fn saw_other_validators(&self) -> bool {
        self.saw_other_validators.load(Ordering::Relaxed)
    }
}

impl WebSource {
    fn new(web: &Arc<Web>, file: &WebFile, key: ArtifactKey, has_expected_digest: bool) -> Result<Self> {
        Ok(Self {
            web: web.clone(),
            path: file.path()?,
            file: file.clone(),
            key,
            has_expected_digest,
            info: OnceCell::new(),
            manifest: OnceCell::new(),
            redirect_url: Mutex::default(),
            refuses_ranges: AtomicBool::new(false),
            ignores_ranges: AtomicBool::new(false),
            saw_other_validators: AtomicBool::new(false),
            back_ends_disagree: AtomicBool::new(false),
        })
    }

    /// Returns the properties of the file, requesting them at the first call.
    ///
    /// # Errors
    /// `Unavailable` (superseded) if the file now has another version than this source.
    async fn info(&self) -> Result<&FileInfo> {
        let derived = is_derived(&self.key.version);
        let probe = || async {
            let mut attempts = 0;
            loop {
                attempts += 1;
                let info =
                    self.web.retry.run(|| self.web.probe(&self.file.url, derived, self.has_expected_digest)).await?;
                let version = info.version().ok().filter(|_| derived);
                match version.filter(|version| *version != self.key.version) {
                    None => return Ok(info),
                    // Another back end may have this version. A digest of the whole file is expensive, and decides.
                    Some(_) if attempts < ATTEMPTS_MAX && info.computed.is_none() => {}
                    Some(version) => return Err(self.superseded(&format!("it is now {version}"))),
                }
            }
        };
        self.info.get_or_try_init(probe).await
    }

    /// Returns the error for a file that was replaced since it was resolved. `what` says what differs.
    fn superseded(&self, what: &str) -> Error {
        Error::new(ErrorKind::Unavailable, format!("{} changed since it was resolved: {what}", self.path))
            .superseded()
            .hint(
                "run the command again once the file no longer changes; if it does not change, the back ends of the \
                 server disagree: append #sha256=… to the URL, or put a .sha256 file beside the file; validators then \
                 need not agree",
            )
    }

    /// Returns true if a digest is known that does not come from this download, so that validators need not agree.
    fn digest_decides(&self) -> bool {
        let listed = self.manifest.get().and_then(|manifest| manifest.files.get(&self.path));
        self.has_expected_digest
            || listed.is_some_and(|entry| entry.sha256.is_some() && entry.provenance != Some(Provenance::FirstSeen))
    }

    /// Builds the manifest of the file, with the best digest available.
    async fn list(&self) -> Result<Manifest> {
        let info = self.info().await?;
        let sidecar_digest = match self.path.as_str().ends_with(".sha256") {
            true => None,
            false => self.web.retry.run(|| self.web.sidecar(&self.file, &self.path)).await?,
        };
        // The two digests must agree, because neither is more trustworthy.
        if let (Some(header), Some(sidecar_digest)) = (info.stated, sidecar_digest)
            && header != sidecar_digest
        {
            return Err(Error::corrupt(format!(
                "the server states sha256 {header}, but the .sha256 file states {sidecar_digest}"
            ))
            .hint("one of the two belongs to another file; report it to the publisher"));
        }
        // Order of trust: stated by the server, stated by a checksum file, computed from the first download.
        let mut entry = FileEntry::of(info.size);
        let candidates = [
            (info.stated, Provenance::Origin),
            (sidecar_digest, Provenance::Sidecar),
            (info.computed, Provenance::FirstSeen),
        ];
        if let Some(best) = candidates.into_iter().find_map(|(digest, provenance)| Some((digest?, provenance))) {
            (entry.sha256, entry.provenance) = (Some(best.0), Some(best.1));
        }
        if !self.has_expected_digest && info.stated.is_none() && sidecar_digest.is_none() {
            tracing::warn!(
                artifact = %self.key,
                "no checksum available; trusting the first download (pin it with #sha256=…)"
            );
        }
        let mut manifest = Manifest::new(self.key.clone(), Shape::File);
        manifest.files.insert(self.path.clone(), entry);
        manifest.check()?;
        Ok(manifest)
    }

    /// Makes one attempt to read `range`: from the target of the last redirect, else from the URL of the file.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        if path != &self.path {
            return Err(Error::not_found(format!("there is no file {path} at {}", self.file.url)));
        }
        let info = self.info().await?;
        if let Some(body) = Body::for_empty_range(path, &range, Some(info.size))? {
            return Ok(body);
        }
        let mut attempts = 0;
        loop {
            attempts += 1;
            let fetched = self.fetch(info, &range, attempts > 1).await?;
            let Some(difference) = info.difference(&fetched)? else {
                self.record_agreement(attempts);
                return self.body(info, &range, fetched);
            };
            self.saw_other_validators.store(true, Ordering::Relaxed);
            let Difference { description, is_of_content } = difference;
            let is_refused = fetched.response.status() == StatusCode::PRECONDITION_FAILED;
            if !is_of_content && !is_refused && self.digest_decides() {
                return self.body(info, &range, fetched);
            }
            let attempts_max =
                if self.back_ends_disagree.load(Ordering::Relaxed) { ATTEMPTS_IN_POOL_MAX } else { ATTEMPTS_MAX };
            if is_of_content || attempts >= attempts_max {
                return Err(self.superseded(&description));
            }
            tracing::debug!(%path, description, attempts, "another validator; requesting the range again");
            http::drain(fetched.response).await;
        }
    }

    /// Records that a response agreed with the first one, after `attempts` requests.
    fn record_agreement(&self, attempts: usize) {
        if attempts > 1 && !self.back_ends_disagree.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                artifact = %self.key,
                "the server's answers disagree about the validators of the file, and no digest is known; only answers \
                 with the first validators are used"
            );
        }
    }

    /// Requests `range`: from the target of the last redirect, else from the URL of the file. Fails for a response that
    /// is neither the file nor a refusal of the condition.
    async fn fetch(&self, info: &FileInfo, range: &Range<u64>, again: bool) -> Result<FinalResponse> {
        let redirect_url = self.redirect_url.lock().clone();
        if let Some(redirect_url) = redirect_url {
            let fetched = self.request_range(redirect_url, info, range, again).await?;
            let status = fetched.response.status().as_u16();
            if !matches!(status, 401 | 403 | 404 | 410 | 412) {
                return self.web.checked(fetched, &self.file.url).await;
            }
            tracing::debug!(path = %self.path, status, "redirect target refused; requesting the original URL again");
            self.remember_redirect(None);
            http::drain(fetched.response).await;
        }
        let fetched = self.request_range(self.file.url.clone(), info, range, again).await?;
        self.web.checked(fetched, &self.file.url).await
    }

    /// Requests `range` from `url`, or the whole file if the server refuses ranges. With a strong entity tag and no
    /// digest, the request has the condition `If-Match`: the server refuses it if the file was replaced. If `again` is
    /// true, the connection is closed afterwards, because a load balancer may lead all requests of one connection to
    /// the same back end.
    async fn request_range(&self, url: Url, info: &FileInfo, range: &Range<u64>, again: bool) -> Result<FinalResponse> {
        let mut headers = HeaderMap::new();
        let etag = info.strong_etag().filter(|_| !self.digest_decides());
        headers.extend(etag.map(|etag| (IF_MATCH, etag.clone())));
        headers.extend(again.then(|| (CONNECTION, HeaderValue::from_static("close"))));
        // `If-Match` also makes a resumed download fail if the file was replaced.
        let mut ranged = headers.clone();
        ranged.insert(RANGE, http::range_header(range)?);
        if !self.refuses_ranges.load(Ordering::Relaxed) {
            let fetched = self.web.get(url.clone(), &self.file.url, ranged).await?;
            // A 416 for a range inside the file means that the server refuses ranges, unless it states another size.
            let refused = fetched.response.status() == StatusCode::RANGE_NOT_SATISFIABLE;
            if !refused || stated_size(&fetched).is_some_and(|stated_bytes| stated_bytes != info.size) {
                return Ok(fetched);
            }
            http::drain(fetched.response).await;
            self.refuses_ranges.store(true, Ordering::Relaxed);
        }
        self.web.get(url, &self.file.url, headers).await
    }

    /// Remembers the URL of a response of the right content, and returns its bytes.
    fn body(&self, info: &FileInfo, range: &Range<u64>, fetched: FinalResponse) -> Result<Body> {
        let status = fetched.response.status();
        let start = http::body_start(status, fetched.response.headers(), range, Some(info.size))
            .map_err(|error| Error::new(error.kind(), format!("{}: {}", self.path, error.message())))?;
        // Only a redirect target is worth remembering.
        self.remember_redirect((!fetched.is_same_origin).then(|| fetched.url.clone()));
        let stream = http::body_stream(fetched.response, &fetched.url);
        // From a server that ignores ranges, the beginning of the file is still usable: cut the body after the range.
        let stream = match status == StatusCode::OK && range.start == 0 && range.end < info.size {
            true => {
                self.ignores_ranges.store(true, Ordering::Relaxed);
                http::first_bytes(stream, range.end)
            }
            false => stream,
        };
        Ok(Body { start, stream })
    }

    fn remember_redirect(&self, redirect_url: Option<Url>) {
        *self.redirect_url.lock() = redirect_url;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(rows: &[(&'static str, &str)]) -> HeaderMap {
        let row = |(name, value): &(&'static str, &str)| {
            (reqwest::header::HeaderName::from_static(name), value.parse().expect("value"))
        };
        rows.iter().map(row).collect()
    }

    fn info(rows: &[(&'static str, &str)]) -> FileInfo {
        let headers = headers(rows);
        let (etag, modified) = (headers.get("etag").cloned(), headers.get("last-modified").cloned());
        FileInfo { size: 7, etag, modified, stated: None, computed: Some(Digest::of(b"x")) }
    }

    #[test]
    fn the_strongest_validator_becomes_the_version() {
        let version = |rows: &[(&'static str, &str)]| info(rows).version().expect("version").as_str().to_owned();
        let date = ("last-modified", "Wed, 25 Nov 2026 02:00:00 GMT");
        assert_eq!(version(&[("etag", "\"5f-3c:x\""), date]), "etag-5f-3c:x");
        assert_eq!(version(&[("etag", "W/\"5f\""), date]), "modified-Wed-25-Nov-2026-02-00-00-GMT-7");
        assert_eq!(version(&[("etag", "\"\""), date]), version(&[date]), "an empty tag is no validator");
        assert_eq!(version(&[("etag", "unquoted")]), format!("sha256-{}", Digest::of(b"x")));
        let odd = [
            version(&[("etag", "\"../x\"")]),
            version(&[("etag", "\"../y\"")]),
            version(&[("etag", &format!("\"{}\"", "z".repeat(900)))]),
        ];
        assert!(odd.iter().all(|version| version.len() == 37), "{odd:?}");
        assert!(odd[0] != odd[1]);
    }

    #[test]
    fn digests_are_read_in_every_form_and_may_not_contradict() {
        let digest = Digest::of(b"x");
        let base64 = BASE64_STANDARD.encode(digest.as_bytes());
        let other = BASE64_STANDARD.encode(Digest::of(b"y").as_bytes());
        let read = |status: u16, rows: &[(&'static str, &str)]| {
            stated_digest(&headers(rows), StatusCode::from_u16(status).expect("status"))
        };
        for row in [
            ("repr-digest", format!("sha-512=:AAAA:, sha-256=:{base64}:")),
            ("digest", format!("SHA-256={base64}")),
            ("digest", format!("md5=AAAA==,sha-256={base64}")),
            ("x-checksum-sha256", digest.to_string().to_uppercase()),
        ] {
            assert_eq!(read(206, &[(row.0, &row.1)]).expect("reads"), Some(digest), "{row:?}");
        }
        let content = ("content-digest", &*format!("sha-256=:{base64}:"));
        assert_eq!(read(200, &[content]).expect("reads"), Some(digest));
        assert_eq!(read(206, &[content]).expect("reads"), None, "of the part only");
        for row in
            [("digest", "sha-256=AAAA"), ("digest", "sha-256"), ("repr-digest", "=:::"), ("x-checksum-sha256", "")]
        {
            assert_eq!(read(200, &[row]).expect("passed over"), None, "{row:?}");
        }
        assert!(read(200, &[content, ("digest", &format!("sha-256={other}"))]).is_err());
    }
}
