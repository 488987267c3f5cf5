//! One file on a web server.
//!
//! A first byte is asked for and tells everything: size, validators, digests, whether there are ranges. Without a given
//! version the validator becomes the version: `etag-…` from a strong entity tag, else `modified-…` from date and size,
//! else `sha256-…`, for which the file is read through once; so is one whose size the server does not say, and one that
//! nothing but its bytes tells from another. Every later answer must fit the first one: what was replaced meanwhile is
//! said to be superseded, never mixed.
//!
//! Digests are taken from `Repr-Digest`, `Digest`, `Content-Digest` and `X-Checksum-Sha256`, and from a `.sha256` beside
//! the file. Credentials go to the scheme, host and port of the address itself, on no redirect elsewhere. A redirect's
//! target is remembered and asked directly until it is refused, then the address once more.
//!
//! Surprise: `HEAD` is never sent. Servers refuse it, or answer it otherwise than the `GET` that follows; signed
//! addresses allow one method only.

use super::Resolved;
use super::authorization;
use super::http::{self, Answer, Http, Refusal, Request, Server};
use crate::credentials::{Choice, Credential, Credentials};
use crate::digest::{Digest, Provenance};
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath, Version};
use crate::limits;
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::reference::{WebFile, is_derived};
use crate::sidecar;
use crate::source::{Body, Source};
use crate::transfer::{Retry, StallDetector, check_headers, content_range};
use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderValue, IF_MATCH, RANGE};
use sha2::Digest as _;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;
use url::Url;

/// Most bytes of a checksum file that are looked at: a line per file of a large release.
const SIDECAR_BYTES_MAX: u64 = 1024 * 1024;
/// Most bytes of a file whose size the server does not state: more than any single file of a model has.
const UNSIZED_BYTES_MAX: u64 = 1 << 40;
/// How often it is logged how far a file has been read through.
const SHOW_EVERY: Duration = Duration::from_secs(10);
/// How long a source that resolving made waits for whoever asked; then the server is asked anew.
const HANDED_ON_MAX: Duration = Duration::from_secs(10);
/// Longest validator that becomes a version as it is; a longer one, or one with odd characters, is hashed.
const PLAIN_VALIDATOR_MAX: usize = 80;

/// All web servers, and how to ask them.
#[derive(Debug)]
pub(super) struct Web {
    credentials: Credentials,
    http: Http,
    retry: Retry,
    /// Sources that resolving has just made, which know what the server said.
    handed_on: Mutex<HashMap<ArtifactKey, (Instant, Arc<WebSource>)>>,
    open_netrc_was_said: AtomicBool,
}

/// What a server says of a file.
#[derive(Debug, Clone)]
struct FileInfo {
    size: u64,
    etag: Option<HeaderValue>,
    modified: Option<HeaderValue>,
    /// The digest in the headers.
    stated: Option<Digest>,
    /// The digest of the bytes, where they had to be read through.
    counted: Option<Digest>,
}

/// The key that an address has now, and a source bound to it.
pub(super) async fn resolve(web: &Arc<Web>, file: &WebFile, demanded: bool) -> Result<Resolved> {
    if let Some(version) = &file.version {
        let key = file.key_at(version.clone())?;
        return Ok(Resolved { source: Arc::new(WebSource::new(web, file, key.clone(), demanded)?), key });
    }
    let found = web.retry.run(|| web.look(&file.url, true, demanded)).await?;
    let key = file.key_at(found.version()?)?;
    let source = WebSource::new(web, file, key.clone(), demanded)?;
    let source = Arc::new(WebSource { found: OnceCell::new_with(Some(found)), ..source });
    web.hand_on(&source);
    Ok(Resolved { source, key })
}

/// A source for `key`, which is `file` at a version.
pub(super) fn source(web: &Arc<Web>, file: &WebFile, key: &ArtifactKey, demanded: bool) -> Option<Arc<dyn Source>> {
    if let Some(source) = web.handed_on(key) {
        return Some(source);
    }
    Some(Arc::new(WebSource::new(web, file, key.clone(), demanded).ok()?))
}

impl Web {
    /// Servers that were not yet spoken to.
    pub(super) fn new(credentials: Credentials, retry: Retry) -> Self {
        Self {
            credentials,
            http: Http::new(retry.read_timeout()),
            retry,
            handed_on: Mutex::default(),
            open_netrc_was_said: AtomicBool::new(false),
        }
    }

    fn hand_on(&self, source: &Arc<WebSource>) {
        let mut handed_on = self.handed_on.lock().unwrap_or_else(PoisonError::into_inner);
        handed_on.retain(|_, (since, _)| since.elapsed() < HANDED_ON_MAX);
        handed_on.insert(source.key.clone(), (Instant::now(), source.clone()));
    }

    fn handed_on(&self, key: &ArtifactKey) -> Option<Arc<WebSource>> {
        let (since, source) = self.handed_on.lock().unwrap_or_else(PoisonError::into_inner).remove(key)?;
        (since.elapsed() < HANDED_ON_MAX).then_some(source)
    }

    /// GETs `url` for the file at `home`, by way of any redirects.
    async fn get(&self, url: Url, home: &Url, headers: HeaderMap) -> Result<Answer> {
        let authorization = self.authorization(home)?;
        self.http.follow(url, Request { headers, home, authorization: authorization.as_ref(), stay: false }).await
    }

    fn authorization(&self, home: &Url) -> Result<Option<HeaderValue>> {
        let credential = match self.credentials.choose(home) {
            Choice::Configured(credential) => credential,
            Choice::Netrc(credential) => {
                if self.credentials.is_netrc_open() && !self.open_netrc_was_said.swap(true, Ordering::Relaxed) {
                    tracing::warn!("others may read the netrc, and it has a password in it: chmod 600 it");
                }
                credential
            }
            Choice::KeptBack | Choice::None => return Ok(None),
        };
        let what = format_args!("the credential for {}", Server(home));
        match credential {
            Credential::Bearer(token) => authorization::bearer(token.expose(), what).map(Some),
            Credential::Basic { username, password } => {
                authorization::basic(username, password.expose(), what).map(Some)
            }
        }
    }

    /// What the server says of the file at `url` now. `derive` where that must do for a version; `demanded` where the
    /// caller brings a digest. Without any of these and without a validator only a digest of all bytes tells this
    /// content from what may lie there while it is fetched.
    async fn look(&self, url: &Url, derive: bool, demanded: bool) -> Result<FileInfo> {
        let headers = HeaderMap::from_iter([(RANGE, http::range_header(&(0..1))?)]);
        let mut answer = self.get(url.clone(), url, headers).await?;
        if answer.response.status() == StatusCode::RANGE_NOT_SATISFIABLE && stated_size(&answer) != Some(0) {
            http::drain(answer.response).await;
            answer = self.get(url.clone(), url, HeaderMap::new()).await?;
        }
        let status = answer.response.status();
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(self.refused(answer, url).await);
        }
        let headers = answer.response.headers();
        check_kind(status, headers, url)?;
        let (etag, modified) = (headers.get("etag").cloned(), headers.get("last-modified").cloned());
        let stated = stated_digest(headers, status)?;
        let mut found = FileInfo { size: 0, etag, modified, stated, counted: None };
        match stated_size(&answer) {
            Some(size) if found.validator(size).is_some() || !derive && (demanded || stated.is_some()) => {
                found.size = size;
            }
            _ => self.read_through(&mut found, answer, url).await?,
        }
        Ok(found)
    }

    /// Reads the whole file to learn size and digest; `answer` is used if it is the whole already.
    async fn read_through(&self, found: &mut FileInfo, mut answer: Answer, url: &Url) -> Result<()> {
        tracing::info!(server = %Server(url), "the server states no size or nothing to tell versions by: reading the file through once");
        if answer.response.status() != StatusCode::OK {
            http::drain(answer.response).await;
            answer = self.get(url.clone(), url, HeaderMap::new()).await?;
            if answer.response.status() == StatusCode::OK {
                check_kind(StatusCode::OK, answer.response.headers(), url)?;
            } else {
                return Err(self.refused(answer, url).await);
            }
        }
        let told = http::content_length(answer.response.headers());
        if told.is_some_and(|told| told > limits::FILE_BYTES_MAX) {
            return Err(Error::corrupt(format!("{} states a size that no file has", Server(url))));
        }
        let (mut size, mut hasher) = (0, sha2::Sha256::new());
        let mut stall = StallDetector::new(self.retry.read_timeout());
        let mut shown = Instant::now();
        let mut body = http::body_stream(answer.response, &answer.url);
        loop {
            let waiting = Instant::now();
            let Some(chunk) = body.next().await else { break };
            let chunk = chunk?;
            size += chunk.len() as u64;
            if told.is_none() && size > UNSIZED_BYTES_MAX {
                let why = format!("{} states no size and has sent {UNSIZED_BYTES_MAX} bytes", Server(url));
                return Err(Error::corrupt(why).hint("is it a stream without end? let the server send Content-Length"));
            }
            if stall.record(chunk.len() as u64, waiting.elapsed()) {
                return Err(Error::unavailable(format!("the connection to {} has nearly stalled", Server(url))));
            }
            hasher.update(&chunk);
            if shown.elapsed() >= SHOW_EVERY {
                shown = Instant::now();
                tracing::info!(server = %Server(url), bytes = size, "still reading the file through");
            }
        }
        if told.is_some_and(|told| told != size) {
            return Err(Error::unavailable(format!("{} ended the file early", Server(url))));
        }
        (found.size, found.counted) = (size, Some(Digest::from_bytes(hasher.finalize().into())));
        Ok(())
    }

    /// The digest that `<url>.sha256` states, if there is such a file. Whatever else lies there is none.
    async fn sidecar(&self, file: &WebFile, path: &FilePath) -> Result<Option<Digest>> {
        let mut url = file.url.clone();
        url.set_path(&format!("{}.sha256", file.url.path()));
        let answer = self.get(url, &file.url, HeaderMap::new()).await?;
        let status = answer.response.status();
        if !status.is_success() {
            let error = Refusal::read(&self.http, answer.response, false).await.error(&answer.url);
            return if error.is_transient() { Err(error) } else { Ok(None) };
        }
        let encoded = check_headers(status, answer.response.headers()).is_err();
        let text = match self.http.body(answer.response, &answer.url, SIDECAR_BYTES_MAX).await {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(None),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8(text).ok().filter(|_| !encoded);
        Ok(text.and_then(|text| sidecar::digest_of(&text, path.as_str())))
    }

    /// What a refusal means: the one place where statuses of web servers become kinds.
    async fn refused(&self, answer: Answer, home: &Url) -> Error {
        let Answer { response, url, at_home, .. } = answer;
        let refusal = Refusal::read(&self.http, response, false).await;
        let error = refusal.error(&url);
        let (server, status) = (Server(home), refusal.status.as_u16());
        match status {
            401 | 403 if !at_home => {
                Error::new(error.kind(), format!("{server} redirects there, and {}", error.message())).hint(format!(
                    "what is sent to {server} is sent nowhere else; ask whoever runs it, or use the address that it redirects to"
                ))
            }
            401 | 403 => Error::new(error.kind(), format!("{}; {}", error.message(), self.sent(home))).hint(self.remedy(home)),
            404 | 410 if at_home && !matches!(self.credentials.choose(home), Choice::Configured(_) | Choice::Netrc(_)) => {
                Error::not_found(format!("{}; {}", error.message(), self.sent(home))).hint(
                    "check the address; a server may hide what others may not see: credentials come from the netrc \
                     or [credentials] in the configuration file",
                )
            }
            404 | 410 => error.hint("check the address"),
            _ => error,
        }
    }

    /// Which credential was sent.
    fn sent(&self, home: &Url) -> String {
        match self.credentials.choose(home) {
            Choice::Configured(_) => "the credential of the configuration file was sent".into(),
            Choice::Netrc(_) => "the credential of the netrc was sent".into(),
            Choice::KeptBack => "the netrc has a credential, which is not sent over plain http".into(),
            Choice::None => "no credential was sent: neither netrc nor configuration has one for it".into(),
        }
    }

    fn remedy(&self, home: &Url) -> String {
        let table = format!("[credentials.\"{}\"] in the configuration file", Server(home));
        let machine = home.host_str().unwrap_or_default();
        match self.credentials.choose(home) {
            Choice::Configured(_) => format!("check {table}: is it valid, and may it read this?"),
            Choice::Netrc(_) => {
                format!("check the entry for {machine} in the netrc: is it valid, and may it read this?")
            }
            Choice::KeptBack => format!("use https, or state it in {table} if it may be sent in the clear"),
            Choice::None if home.scheme() == "http" => format!("write {table}"),
            Choice::None => format!("add `machine {machine} login … password …` to ~/.netrc, or {table} with bearer"),
        }
    }
}

/// The size of the whole file that an answer's headers tell.
fn stated_size(answer: &Answer) -> Option<u64> {
    let headers = answer.response.headers();
    let range = http::header(headers, "content-range");
    match answer.response.status() {
        StatusCode::OK => http::content_length(headers),
        StatusCode::PARTIAL_CONTENT => content_range(range?)?.total,
        StatusCode::RANGE_NOT_SATISFIABLE => range?.strip_prefix("bytes */")?.parse().ok(),
        _ => None,
    }
}

/// Refuses what is not the file itself: an encoding of it, or a page for people in its place.
fn check_kind(status: StatusCode, headers: &HeaderMap, url: &Url) -> Result<()> {
    let server = Server(url);
    check_headers(status, headers)?;
    let is_page = http::header(headers, "content-type").is_some_and(|kind| kind.trim_start().starts_with("text/html"));
    let wants_page = [".html", ".htm"].iter().any(|end| url.path().ends_with(end));
    if is_page && !wants_page {
        return Err(Error::corrupt(format!("{server} answers with a page for people (text/html), not with a file"))
            .hint(
                "open the address in a browser: is it a login page, or a page about the file? \
             credentials come from the netrc or [credentials] in the configuration file",
            ));
    }
    Ok(())
}

/// The SHA-256 that headers state of the whole file.
fn stated_digest(headers: &HeaderMap, status: StatusCode) -> Result<Option<Digest>> {
    let bytes = |text: &str| Some(Digest::from_bytes(BASE64_STANDARD.decode(text.trim()).ok()?.try_into().ok()?));
    let lists = |name: &str| -> Vec<String> {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).map(|item| item.trim().to_owned()).collect()
    };
    let of = |item: &String| {
        let (algorithm, value) = item.split_once('=')?;
        let value = value.split(';').next().unwrap_or(value).trim().trim_matches(':');
        algorithm.trim().eq_ignore_ascii_case("sha-256").then(|| bytes(value))?
    };
    let mut stated: Vec<Digest> = lists("repr-digest").iter().chain(&lists("digest")).filter_map(of).collect();
    if status == StatusCode::OK {
        stated.extend(lists("content-digest").iter().filter_map(of));
    }
    stated.extend(http::header(headers, "x-checksum-sha256").and_then(|hex| hex.trim().parse::<Digest>().ok()));
    match stated.iter().find(|other| **other != stated[0]) {
        Some(other) => Err(Error::corrupt(format!("the server states two digests, {} and {other}", stated[0]))),
        None => Ok(stated.first().copied()),
    }
}

impl FileInfo {
    /// What tells this content from another, as text.
    fn validator(&self, size: u64) -> Option<String> {
        if let Some(etag) = self.strong_etag() {
            let text = String::from_utf8_lossy(etag.as_bytes()).trim_matches('"').to_owned();
            return Some(format!("etag-{}", plain(&text)));
        }
        let modified = self.modified.as_ref()?.to_str().ok()?;
        let words: Vec<_> = modified.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect();
        Some(format!("modified-{}-{size}", plain(&words.join("-"))))
    }

    fn strong_etag(&self) -> Option<&HeaderValue> {
        self.etag.as_ref().filter(|etag| etag.as_bytes().starts_with(b"\"") && etag.len() > 2)
    }

    fn version(&self) -> Result<Version> {
        let validator = self.validator(self.size).or_else(|| Some(format!("sha256-{}", self.counted?)));
        Version::new(&validator.unwrap_or_default())
    }

    /// Whether an answer is about the same content.
    fn fits(&self, answer: &Answer) -> bool {
        let headers = answer.response.headers();
        let differs = |ours: &Option<HeaderValue>, name: &str| match (ours, headers.get(name)) {
            (Some(ours), Some(theirs)) => ours != theirs,
            _ => false,
        };
        let same_etag = self.strong_etag().is_some() && headers.get("etag") == self.etag.as_ref();
        let other = differs(&self.etag, "etag") || (!same_etag && differs(&self.modified, "last-modified"));
        !other && stated_size(answer).is_none_or(|told| told == self.size)
    }
}

/// `text`, if a version can be so called, else a hash of it.
fn plain(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '+' | '=');
    match !text.is_empty() && text.len() <= PLAIN_VALIDATOR_MAX && text.chars().all(safe) {
        true => text.to_owned(),
        false => Digest::of(text.as_bytes()).to_string()[..32].to_owned(),
    }
}

/// The first `bytes` of a stream.
fn first_bytes(stream: BoxStream<'static, Result<Bytes>>, bytes: u64) -> BoxStream<'static, Result<Bytes>> {
    let cut = stream.scan(bytes, |left, chunk| {
        let chunk = chunk.map(|mut chunk| {
            chunk.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= chunk.len() as u64;
            chunk
        });
        std::future::ready(Some(chunk).filter(|chunk| !chunk.as_ref().is_ok_and(Bytes::is_empty)))
    });
    cut.boxed()
}

/// One file at one version.
struct WebSource {
    web: Arc<Web>,
    file: WebFile,
    path: FilePath,
    key: ArtifactKey,
    /// The caller demands a digest: that nobody states one is no matter.
    demanded: bool,
    found: OnceCell<FileInfo>,
    manifest: OnceCell<Manifest>,
    /// Where a redirect led.
    place: Mutex<Option<Url>>,
    /// The server refuses ranges instead of ignoring them.
    refuses_ranges: AtomicBool,
    /// A range was answered with the whole file.
    ignores_ranges: AtomicBool,
}

/// Signed addresses stay unprinted.
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

    /// A missing file is an error, because there is something to say.
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
}

impl WebSource {
    fn new(web: &Arc<Web>, file: &WebFile, key: ArtifactKey, demanded: bool) -> Result<Self> {
        Ok(Self {
            web: web.clone(),
            path: file.path()?,
            file: file.clone(),
            key,
            demanded,
            found: OnceCell::new(),
            manifest: OnceCell::new(),
            place: Mutex::default(),
            refuses_ranges: AtomicBool::new(false),
            ignores_ranges: AtomicBool::new(false),
        })
    }

    /// What the server said of the file when it was first asked, which must fit the version.
    async fn found(&self) -> Result<&FileInfo> {
        let derived = is_derived(&self.key.version);
        let found = self
            .found
            .get_or_try_init(|| self.web.retry.run(|| self.web.look(&self.file.url, derived, self.demanded)))
            .await?;
        match derived && found.version()? != self.key.version {
            true => Err(self.superseded()),
            false => Ok(found),
        }
    }

    fn superseded(&self) -> Error {
        Error::new(ErrorKind::Unavailable, format!("{} changed since it was looked at", self.path))
            .superseded()
            .hint("run it again once nothing writes there; without @version the address means what lies there now")
    }

    async fn list(&self) -> Result<Manifest> {
        let found = self.found().await?;
        let beside = match self.path.as_str().ends_with(".sha256") {
            true => None,
            false => self.web.retry.run(|| self.web.sidecar(&self.file, &self.path)).await?,
        };
        if let (Some(header), Some(beside)) = (found.stated, beside)
            && header != beside
        {
            return Err(Error::corrupt(format!(
                "the server states sha256 {header}, the .sha256 beside the file {beside}"
            ))
            .hint("one of the two is not of this file; ask whoever publishes it"));
        }
        let mut entry = FileEntry::of(found.size);
        let known =
            [(found.stated, Provenance::Origin), (beside, Provenance::Sidecar), (found.counted, Provenance::FirstSeen)];
        if let Some(known) = known.into_iter().find_map(|(digest, provenance)| Some((digest?, provenance))) {
            (entry.sha256, entry.provenance) = (Some(known.0), Some(known.1));
        }
        if !self.demanded && found.stated.is_none() && beside.is_none() {
            tracing::warn!(
                artifact = %self.key,
                "nobody states a checksum of it: what comes first is taken to be right; pin it with #sha256="
            );
        }
        let mut manifest = Manifest::new(self.key.clone(), Shape::File);
        manifest.files.insert(self.path.clone(), entry);
        manifest.check()?;
        Ok(manifest)
    }

    /// One attempt at the bytes: where a redirect led last, else by way of the address.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        if path != &self.path {
            return Err(Error::not_found(format!("there is no file {path} at {}", self.file.url)));
        }
        let found = self.found().await?;
        if let Some(body) = Body::unasked(path, &range, Some(found.size))? {
            return Ok(body);
        }
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(place) = place {
            let answer = self.ask(place, found, &range).await?;
            if !matches!(answer.response.status().as_u16(), 401 | 403 | 404 | 410 | 412) {
                return self.body(found, &range, answer).await;
            }
            tracing::debug!(%path, status = answer.response.status().as_u16(), "an address is spent; asking the first one again");
            self.remember(None);
            http::drain(answer.response).await;
        }
        let answer = self.ask(self.file.url.clone(), found, &range).await?;
        self.body(found, &range, answer).await
    }

    async fn ask(&self, url: Url, found: &FileInfo, range: &Range<u64>) -> Result<Answer> {
        let mut headers = HeaderMap::new();
        headers.extend(found.strong_etag().map(|etag| (IF_MATCH, etag.clone())));
        let mut ranged = headers.clone();
        ranged.insert(RANGE, http::range_header(range)?);
        if !self.refuses_ranges.load(Ordering::Relaxed) {
            let answer = self.web.get(url.clone(), &self.file.url, ranged).await?;
            let refused = answer.response.status() == StatusCode::RANGE_NOT_SATISFIABLE;
            if !refused || stated_size(&answer).is_some_and(|told| told != found.size) {
                return Ok(answer);
            }
            http::drain(answer.response).await;
            self.refuses_ranges.store(true, Ordering::Relaxed);
        }
        self.web.get(url, &self.file.url, headers).await
    }

    /// Checks an answer against what is known of the file, remembers where it came from, and hands on its bytes.
    async fn body(&self, found: &FileInfo, range: &Range<u64>, answer: Answer) -> Result<Body> {
        let status = answer.response.status();
        if status == StatusCode::PRECONDITION_FAILED {
            return Err(self.superseded());
        }
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(self.web.refused(answer, &self.file.url).await);
        }
        check_kind(status, answer.response.headers(), &self.file.url)?;
        if !found.fits(&answer) {
            return Err(self.superseded());
        }
        let start = http::body_start(status, answer.response.headers(), range, Some(found.size))
            .map_err(|error| Error::new(error.kind(), format!("{}: {}", self.path, error.message())))?;
        self.remember((!answer.at_home).then(|| answer.url.clone()));
        let stream = http::body_stream(answer.response, &answer.url);
        // From a server that ignores ranges, the first part is all the same right: it ends where it was asked to.
        let stream = match status == StatusCode::OK && range.start == 0 && range.end < found.size {
            true => {
                self.ignores_ranges.store(true, Ordering::Relaxed);
                first_bytes(stream, range.end)
            }
            false => stream,
        };
        Ok(Body { start, stream })
    }

    fn remember(&self, place: Option<Url>) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place;
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

    fn found(rows: &[(&'static str, &str)]) -> FileInfo {
        let headers = headers(rows);
        let (etag, modified) = (headers.get("etag").cloned(), headers.get("last-modified").cloned());
        FileInfo { size: 7, etag, modified, stated: None, counted: Some(Digest::of(b"x")) }
    }

    #[test]
    fn the_strongest_validator_becomes_the_version() {
        let version = |rows: &[(&'static str, &str)]| found(rows).version().expect("version").as_str().to_owned();
        let date = ("last-modified", "Wed, 25 Nov 2026 02:00:00 GMT");
        assert_eq!(version(&[("etag", "\"5f-3c:x\""), date]), "etag-5f-3c:x");
        assert_eq!(version(&[("etag", "W/\"5f\""), date]), "modified-Wed-25-Nov-2026-02-00-00-GMT-7");
        assert_eq!(version(&[("etag", "\"\""), date]), version(&[date]), "an empty tag says nothing");
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
