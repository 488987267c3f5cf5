//! The Hugging Face Hub, or a server with its API at the configured endpoint.
//!
//! A revision resolves to a commit. The tree of the commit is the manifest, with the digests of the Hub. Files are read
//! from `resolve`, which redirects large files to signed URLs of a CDN. The token is sent to the endpoint only.
//!
//! The Hub reports a private repository as missing to clients without access, so the messages mention both causes.

use super::authorization::bearer;
use super::http::{self, FinalResponse, Http, HttpErrorResponse, Request, Server};
use super::{HubAnswer, Origin, ResolvedSource, no_files};
use crate::check::{Area, Check, Clock};
use crate::config::{Config, HubConfig, Secret};
use crate::digest::{GitOid, Provenance};
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::limits;
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::mutex::Mutex;
use crate::printable;
use crate::reference::{HubRepo, Reference, Scheme, Target, hub};
use crate::source::{Body, Source};
use crate::transfer::{Paging, Retry, content_range};
use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::StatusCode;
use reqwest::header::{AUTHORIZATION, ETAG, HeaderMap, HeaderValue, IF_MATCH, RANGE, VIA};
use serde::Deserialize;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;
use url::Url;

/// A client for one endpoint of the Hub API.
#[derive(Debug)]
pub(super) struct Hub {
    config: HubConfig,
    http: Http,
    retry: Retry,
    /// Cached answers about commits, the oldest first.
    commits: Mutex<VecDeque<(ArtifactKey, Arc<CommitAnswers>)>>,
}

/// An answer of the API.
enum ApiAnswer {
    Found {
        body: Vec<u8>,
        headers: HeaderMap,
    },
    NoRevision,
    /// The server does not know the call, or is no Hub. The error says so.
    UnknownCall(Error),
}

/// Time for which the list of files of a commit is cached. A client that fetches many files one by one causes one
/// request for the list, not one for each.
const COMMIT_CACHE_TTL: Duration = Duration::from_secs(60);
/// Maximum number of files in all cached lists, and of lists.
const CACHED_FILES_MAX: usize = 20_000;
const CACHED_COMMITS_MAX: usize = 16;
/// Concurrent requests for the sizes of files, where the list of files has none.
const FILE_REQUESTS_MAX: usize = 8;
/// Number of left out files that a warning names.
const LEFT_OUT_NAMED: usize = 3;
/// The name of the Hub's token in error messages.
const HUB_TOKEN: &str = "the Hub token (HF_TOKEN)";

#[async_trait]
impl Origin for Arc<Hub> {
    fn scheme(&self) -> &'static Scheme {
        &hub::SCHEME
    }

    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        let Target::Hub(repo) = &reference.target else { return Ok(None) };
        let commit = match repo.is_commit() {
            // A full commit id needs no request.
            true => repo.revision.clone(),
            false => self.retry.run(|| self.commit(repo)).await?,
        };
        let key = repo.key_at(&commit)?;
        let repo = HubRepo { revision: commit, ..repo.clone() };
        Ok(Some(ResolvedSource { source: Arc::new(HubSource::new(self, repo, key.clone())), key }))
    }

    fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let Target::Hub(repo) = &reference.target else { return None };
        let repo = HubRepo { revision: key.version.as_str().to_owned(), ..repo.clone() };
        Some(Arc::new(HubSource::new(self, repo, key.clone())))
    }

    async fn check(&self, clock: &Clock) -> Result<Option<Check>> {
        self.account_check(clock).await.map(Some)
    }
}

impl Hub {
    /// Creates a client. Sends no request.
    pub(super) fn new(config: &Config, retry: Retry) -> Self {
        Self { config: config.hub.clone(), http: Http::new(config, &retry), retry, commits: Mutex::default() }
    }

    /// Returns the cached answers about a commit. All its sources share them.
    fn commit_answers(&self, key: &ArtifactKey) -> Arc<CommitAnswers> {
        let mut commits = self.commits.lock();
        commits.retain(|(_, answers)| answers.may_be_used());
        if let Some((_, answers)) = commits.iter().find(|(other, _)| other == key) {
            return answers.clone();
        }
        let answers = Arc::<CommitAnswers>::default();
        commits.push_back((key.clone(), answers.clone()));
        let files = |(_, answers): &(ArtifactKey, Arc<CommitAnswers>)| answers.file_count();
        while commits.len() > CACHED_COMMITS_MAX || commits.iter().map(files).sum::<usize>() > CACHED_FILES_MAX {
            commits.pop_front();
        }
        answers
    }

    /// Drops the cached answers about a commit, because the server contradicts them.
    fn forget_answers(&self, key: &ArtifactKey) {
        self.commits.lock().retain(|(other, _)| other != key);
    }

    /// Returns how long requests to the endpoint are still paused; `None` if they are not.
    pub(super) fn pause(&self) -> Option<Duration> {
        self.retry.pauses().left(&Server(&self.endpoint().ok()?).to_string())
    }

    /// Returns the token of the configuration.
    pub(super) fn token(&self) -> Option<&str> {
        self.config.token.as_ref().map(Secret::expose)
    }

    /// Sends one GET for `path` with `token`, and returns the answer, whatever its status.
    pub(super) async fn pass_on(&self, path: &str, token: Option<&str>) -> Result<HubAnswer> {
        let url = self.url_for(path)?;
        let server = Server(&url).to_string();
        if let Some(left) = self.pause() {
            return Err(Error::unavailable(format!("{server} has asked for a pause")).retry_after(left));
        }
        let FinalResponse { response, url, .. } = self.follow_as(token, url, HeaderMap::new(), true).await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let retry_after = http::requested_wait(&headers).filter(|_| matches!(status, 429 | 503));
        if let Some(wait) = retry_after {
            self.retry.pauses().begin(&server, wait);
        }
        let text = |name| http::header(&headers, name).map(str::to_owned);
        Ok(HubAnswer {
            status,
            content_type: text("content-type"),
            error_code: text("x-error-code"),
            error_message: text("x-error-message"),
            retry_after,
            body: self.http.body(response, &url, limits::RESPONSE_BYTES_MAX).await?,
        })
    }

    /// Requests the account of the token from `whoami`, which responds with and without a token.
    async fn account_check(&self, clock: &Clock) -> Result<Check> {
        let url = self.url_for("api/whoami-v2")?;
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.config.token {
            let value = bearer(token.expose(), HUB_TOKEN)?;
            headers.insert(AUTHORIZATION, value);
        }
        let response = self.http.get(&url, headers).await?;
        let server = Server(&url).to_string();
        // The date of the response also serves the check of the clock.
        clock.learn(&server, http::header(response.headers(), "date"));
        let (status, has_token) = (response.status(), self.config.token.is_some());
        // The body only serves to name the account, so a failure to read it is ignored.
        let body = self.http.body(response, &url, limits::RESPONSE_BYTES_MAX).await.unwrap_or_default();
        Ok(match status {
            StatusCode::OK if has_token => {
                #[derive(serde::Deserialize)]
                struct Account {
                    name: String,
                }
                let name = serde_json::from_slice::<Account>(&body).ok().map(|account| account.name);
                let account = name.map_or_else(|| "an unnamed account".into(), |name| format!("{name:?}"));
                Check::ok(Area::Origin, format!("{server} answers; the token is that of {account}"))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if has_token => Check::problem(
                Area::Origin,
                &Error::new(ErrorKind::Unauthorized, format!("{server} rejects the token: it is wrong or has expired"))
                    .hint("set HF_TOKEN to a token that is valid (huggingface.co/settings/tokens), or unset it"),
            ),
            StatusCode::TOO_MANY_REQUESTS => Check::warning(
                Area::Origin,
                format!("{server} answers, but throttles the requests of this machine (429)"),
                if has_token {
                    "send fewer requests, or use a plan with higher limits"
                } else {
                    "set HF_TOKEN: requests with a token have higher limits"
                },
            ),
            // The Hub is down. The caller decides whether that is a problem or a warning.
            status if status.is_server_error() => {
                return Err(Error::unavailable(format!("{server} answered {}", status.as_u16()))
                    .hint("try again later; see status.huggingface.co, or check HF_ENDPOINT"));
            }
            _ if has_token => Check::warning(
                Area::Origin,
                format!("{server} answers, but does not name the account of the token ({})", status.as_u16()),
                "ignore this for a mirror; otherwise check that HF_ENDPOINT is the address of a Hub",
            ),
            _ => Check::ok(
                Area::Origin,
                format!("{server} answers; no token is set, so only public repositories are seen"),
            ),
        })
    }

    /// Returns the configured endpoint as a URL.
    fn endpoint(&self) -> Result<Url> {
        let text = self.config.endpoint.trim_end_matches('/');
        match Url::parse(text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(url),
            _ => Err(Error::invalid("the Hub's endpoint is not an http or https URL")
                .hint("set HF_ENDPOINT to scheme and host, for instance https://huggingface.co")),
        }
    }

    /// Returns the URL of `path`, which is percent-encoded already and may have a query, below the endpoint.
    fn url_for(&self, path: &str) -> Result<Url> {
        let mut url = self.endpoint()?;
        let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
        url.set_path(&format!("{}/{path}", url.path().trim_end_matches('/')));
        url.set_query(query);
        Ok(url)
    }

    /// Returns the commit that `repo.revision` points to now.
    async fn commit(&self, repo: &HubRepo) -> Result<String> {
        #[derive(Deserialize)]
        struct Info {
            sha: GitOid,
        }
        // Without `expand` the answer lists every file, which for a large dataset is many megabytes.
        let body = self.revision(repo, &["?expand=sha", ""]).await?.ok_or_else(|| no_revision(repo))?;
        let info: Info = parse(&body, "a revision without a commit")?;
        Ok(info.sha.to_string())
    }

    /// Requests the description of a revision with the first of `queries` that the server knows: some proxies know
    /// only the call without a query. Returns `None` if the revision does not exist.
    async fn revision(&self, repo: &HubRepo, queries: &[&str]) -> Result<Option<Vec<u8>>> {
        let path =
            format!("api/{}/{}/revision/{}", repo.kind.api_segment(), repo.id, http::encode_segment(&repo.revision));
        let mut unknown = None;
        for query in queries {
            match self.api(self.url_for(&format!("{path}{query}"))?, repo).await? {
                ApiAnswer::Found { body, .. } => return Ok(Some(body)),
                ApiAnswer::NoRevision => return Ok(None),
                ApiAnswer::UnknownCall(error) => unknown = Some(error),
            }
        }
        unknown.map_or(Ok(None), Err)
    }

    /// Sends a request to the API. Fails if the endpoint redirects to another server.
    async fn api(&self, url: Url, repo: &HubRepo) -> Result<ApiAnswer> {
        let fetched = self.follow(url, HeaderMap::new(), true).await?;
        let (status, headers) = (fetched.response.status(), fetched.response.headers().clone());
        if status.is_success() {
            let body = self.http.body(fetched.response, &fetched.url, limits::RESPONSE_BYTES_MAX).await?;
            return Ok(ApiAnswer::Found { body, headers });
        }
        match (http::header(&headers, "x-error-code"), status.as_u16()) {
            // The caller knows best how to report a missing revision.
            (Some("RevisionNotFound"), _) => Ok(ApiAnswer::NoRevision),
            // A Hub names the missing thing in a code. A server without the code does not know the call.
            (None, 404 | 405 | 410 | 501) => Ok(ApiAnswer::UnknownCall(self.error_of(fetched, repo, None).await)),
            _ => Err(self.error_of(fetched, repo, None).await),
        }
    }

    /// Sends a GET for `url` and follows redirects. The token is sent to the endpoint only.
    async fn follow(&self, url: Url, headers: HeaderMap, same_origin_only: bool) -> Result<FinalResponse> {
        self.follow_as(self.token(), url, headers, same_origin_only).await
    }

    /// Sends a GET as [`follow`](Self::follow) does, with another token.
    async fn follow_as(
        &self,
        token: Option<&str>,
        url: Url,
        mut headers: HeaderMap,
        same_origin_only: bool,
    ) -> Result<FinalResponse> {
        let endpoint = self.endpoint()?;
        if let Some(via) = self.config.via.as_deref().and_then(|via| HeaderValue::from_str(via).ok()) {
            headers.insert(VIA, via);
        }
        let authorization = token.map(|token| bearer(token, HUB_TOKEN)).transpose()?;
        let request =
            Request { headers, credential_url: &endpoint, authorization: authorization.as_ref(), same_origin_only };
        self.http.follow(url, request).await
    }

    /// Returns the error for an unsuccessful response to a request for a repository. `account_check` maps the statuses
    /// of `whoami` itself, and `api` handles missing revisions and unknown calls.
    async fn error_of(&self, fetched: FinalResponse, repo: &HubRepo, path: Option<&FilePath>) -> Error {
        let FinalResponse { response, url, is_same_origin, .. } = fetched;
        let response = HttpErrorResponse::read(&self.http, response, is_same_origin).await;
        if !is_same_origin {
            // The CDN, not the Hub, refused the request.
            return redirect_target_error(&response, &url);
        }
        let (id, has_token) = (&repo.id, self.config.token.is_some());
        let general = || response.error(&url);
        let explanation = response.explanation();
        match (response.status.as_u16(), response.code.as_deref()) {
            // The error codes of the Hub are more specific than its statuses, so they are matched first.
            (401 | 403, Some("GatedRepo")) => {
                Error::new(ErrorKind::Unauthorized, format!("{id} is gated{explanation}")).hint(format!(
                    "accept its conditions at {}/{}{id}, and set HF_TOKEN to a token of that account",
                    Server(&url),
                    repo.kind.prefix()
                ))
            }
            (_, Some("DisabledRepo")) => {
                Error::new(ErrorKind::Unauthorized, format!("{id} is disabled at the Hub{explanation}"))
                    .hint("no token gives access to it; the page of the repository may name the reason")
            }
            (401 | 404, Some("RepoNotFound")) => no_repo(id, has_token),
            (404, Some("RevisionNotFound")) => no_revision(repo),
            (404, Some("EntryNotFound")) => no_entry(repo, path),
            // Without an error code the server is probably not a Hub.
            (404 | 410, _) => general().hint("check that HF_ENDPOINT is the address of a Hub"),
            (401 | 403, _) if has_token => general().hint("check that HF_TOKEN is valid and may read this repository"),
            (401 | 403, _) => general().hint("set HF_TOKEN, and check that HF_ENDPOINT is the address of a Hub"),
            (429, _) if has_token => general().hint("send fewer requests, or use a plan with higher limits"),
            (429, _) => general().hint("set HF_TOKEN: requests with a token have higher limits"),
            _ => general(),
        }
    }
}

/// Returns the error for a repository that does not exist or cannot be seen.
fn no_repo(id: &str, has_token: bool) -> Error {
    if has_token {
        return Error::not_found(format!("there is no repository {id}, or the token has no access to it"))
            .hint("check the name, and that HF_TOKEN belongs to an account with access");
    }
    Error::not_found(format!("there is no repository {id}, or it is private"))
        .hint("check the name; for a private repository set HF_TOKEN")
}

/// Returns the error for a missing branch, tag or commit.
fn no_revision(repo: &HubRepo) -> Error {
    Error::not_found(format!("there is no revision {} in {}", repo.revision, repo.id))
        .hint("check the branch, tag or commit; without @revision it is main")
}

/// Returns the error for a missing file.
fn no_entry(repo: &HubRepo, path: Option<&FilePath>) -> Error {
    let entry = path.map_or("such entry".to_owned(), |path| format!("file {path}"));
    Error::not_found(format!("there is no {entry} in {} at {}", repo.id, repo.revision))
        .hint("check the name of the file")
}

/// Converts an error response of a redirect target. A signed URL needs no credentials, so 401 and 403 mean that it
/// expired, never that the user lacks access.
fn redirect_target_error(response: &HttpErrorResponse, url: &Url) -> Error {
    let message = || format!("{} refused a URL that the Hub has just signed ({})", Server(url), response.status);
    match response.status.as_u16() {
        401 | 403 => Error::unavailable(message())
            .hint("try again; if it persists, check any proxy between this machine and the CDN"),
        404 | 410 | 412 => Error::unavailable(message()).transient(false).hint(http::REFUSED_HINT),
        _ => response.error(url),
    }
}

/// Parses a JSON response of the endpoint. `problem` describes an unreadable response in the error message.
fn parse<'a, T: Deserialize<'a>>(body: &'a [u8], problem: &str) -> Result<T> {
    serde_json::from_slice(body).map_err(|cause| {
        Error::corrupt(format!("the Hub answered with {problem}"))
            .cause(cause)
            .hint("check that HF_ENDPOINT is the address of a Hub")
    })
}

/// The source for one repository at one commit.
struct HubSource {
    hub: Arc<Hub>,
    /// The repository; its revision is the commit.
    repo: HubRepo,
    key: ArtifactKey,
    answers: Arc<CommitAnswers>,
}

/// What the Hub has answered about one commit.
#[derive(Default)]
struct CommitAnswers {
    /// The list of files with the time of the answer; `None` if there is no such commit.
    manifest: OnceCell<(Instant, Option<Manifest>)>,
    /// The last failure to list the files.
    failure: Mutex<Option<(Instant, Error)>>,
    /// The location from which each file was read last.
    locations: Mutex<HashMap<FilePath, ReadLocation>>,
}

impl CommitAnswers {
    /// Returns true if another source may use these answers. A missing commit may be pushed at any time.
    fn may_be_used(&self) -> bool {
        self.manifest.get().is_none_or(|(at, manifest)| manifest.is_some() && at.elapsed() < COMMIT_CACHE_TTL)
    }

    fn manifest(&self) -> Option<&Option<Manifest>> {
        self.manifest.get().map(|(_, manifest)| manifest)
    }

    fn file_count(&self) -> usize {
        self.manifest().and_then(Option::as_ref).map_or(0, |manifest| manifest.files.len())
    }
}

/// Prints no signed URLs.
impl fmt::Debug for CommitAnswers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommitAnswers").finish_non_exhaustive()
    }
}

/// The location from which a file was read last, mostly a signed URL.
#[derive(Clone)]
struct ReadLocation {
    url: Url,
    /// The strong entity tag of the file there.
    etag: Option<HeaderValue>,
}

/// One entry of a tree, with the fields that are used here.
#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    size: Option<u64>,
    oid: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
}

/// A file in the description of a revision. The sizes and digests are stated only if they were asked for.
#[derive(Deserialize)]
struct Sibling {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    oid: Option<String>,
    lfs: Option<SiblingLfs>,
}

#[derive(Deserialize)]
struct SiblingLfs {
    sha256: String,
}

/// Prints no signed URLs.
impl fmt::Debug for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSource").field("key", &self.key).finish_non_exhaustive()
    }
}

#[async_trait]
impl Source for HubSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    fn endpoint(&self) -> Option<String> {
        Some(Server(&self.hub.endpoint().ok()?).to_string())
    }

    /// Returns `None` for a missing commit. A missing repository is an error, because it may be private and the message
    /// has a remedy.
    async fn manifest(&self) -> Result<Option<Manifest>> {
        let asked = Instant::now();
        let list = || async {
            // The request of another caller failed while this one waited for it.
            let failed = self.answers.failure.lock().clone().filter(|(at, _)| *at >= asked);
            if let Some((_, error)) = failed {
                return Err(error);
            }
            let listed = self.list().await;
            listed
                .map(|manifest| (Instant::now(), manifest))
                .inspect_err(|error| *self.answers.failure.lock() = Some((Instant::now(), error.clone())))
        };
        let listed = self.answers.manifest.get_or_try_init(list).await;
        listed.map(|(_, manifest)| manifest.clone()).context(&self.key, Tier::Origin)
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let opened = self.open(path, range).await.context(&self.key, Tier::Origin);
        opened.inspect_err(|error| {
            if error.kind() == ErrorKind::Corrupt {
                self.hub.forget_answers(&self.key);
            }
        })
    }
}

impl HubSource {
    fn new(hub: &Arc<Hub>, repo: HubRepo, key: ArtifactKey) -> Self {
        Self { answers: hub.commit_answers(&key), hub: hub.clone(), repo, key }
    }

    /// Lists all files of the commit. Returns `None` if the commit does not exist.
    async fn list(&self) -> Result<Option<Manifest>> {
        let mut files = FileList::new(self.key.clone());
        let is_found = match self.list_tree(&mut files).await? {
            TreeListing::All => true,
            TreeListing::NoRevision => false,
            TreeListing::UnknownCall(error) => self.list_siblings(&mut files, error).await?,
        };
        if !is_found {
            return Ok(None);
        }
        let manifest = files.finish()?;
        if manifest.files.is_empty() {
            let (endpoint, HubRepo { id, revision, .. }) = (self.hub.endpoint()?, &self.repo);
            let what = format!("{} lists no files of {id} at {revision}", Server(&endpoint));
            return Err(no_files(what).hint(
                "open the repository in a browser: if it is not empty, check HF_ENDPOINT and any proxy on the way",
            ));
        }
        Ok(Some(manifest))
    }

    /// Lists the whole tree, page by page.
    async fn list_tree(&self, files: &mut FileList) -> Result<TreeListing> {
        let endpoint = self.hub.endpoint()?;
        let HubRepo { kind, id, revision } = &self.repo;
        let path = format!("api/{}/{id}/tree/{revision}?recursive=true&expand=false", kind.api_segment());
        let mut next = Some(self.hub.url_for(&path)?);
        let (mut entries, mut paging) = (0, Paging::default());
        while let Some(url) = next {
            let (page, headers) = match self.hub.retry.run(|| self.hub.api(url.clone(), &self.repo)).await? {
                ApiAnswer::Found { body, headers } => (body, headers),
                ApiAnswer::NoRevision => return Ok(TreeListing::NoRevision),
                ApiAnswer::UnknownCall(error) if entries == 0 => return Ok(TreeListing::UnknownCall(error)),
                ApiAnswer::UnknownCall(error) => return Err(error),
            };
            let page: Vec<TreeEntry> = parse(&page, "a tree that is no list of entries")?;
            // The next page is in the `Link` header; the real Hub has 1,000 entries per page.
            next = http::next_link(&headers).map(|link| next_page(&endpoint, &url, link)).transpose()?;
            entries += page.len();
            paging.record_page(page.last().map(|entry| entry.path.as_str()), next.as_ref().map(Url::as_str))?;
            // An empty page that is not the last, or far too many entries: the listing would never end.
            if (page.is_empty() && next.is_some()) || entries > 2 * limits::FILES_MAX {
                return Err(Error::corrupt(format!("the list of files does not end ({entries} entries so far)")));
            }
            page.into_iter().try_for_each(|entry| files.add_entry(entry))?;
        }
        Ok(TreeListing::All)
    }

    /// Lists the files with the older call that every mirror and proxy knows: the names in the description of the
    /// revision. If it lacks the size or the digest of a file, a request for the file's first byte gets them. Returns
    /// false if the commit does not exist.
    ///
    /// # Errors
    /// `unknown_tree`, the error of the newer call, if the server knows neither.
    async fn list_siblings(&self, files: &mut FileList, unknown_tree: Error) -> Result<bool> {
        let found = self.hub.retry.run(|| self.hub.revision(&self.repo, &["?blobs=true", ""])).await;
        let body = match found {
            Ok(Some(body)) => body,
            Ok(None) => return Ok(false),
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(unknown_tree),
            Err(error) => return Err(error),
        };
        #[derive(Deserialize)]
        struct Siblings {
            siblings: Vec<Sibling>,
        }
        tracing::debug!(repository = self.repo.id, "the server does not list trees; using the names in the revision");
        let Siblings { siblings } = parse(&body, "a revision without a list of files")?;
        if siblings.len() > limits::FILES_MAX {
            return Err(Error::corrupt(format!("the revision lists {} files", siblings.len())));
        }
        let siblings: Vec<_> = siblings.into_iter().filter(|sibling| files.keep_or_leave_out(&sibling.name)).collect();
        let entries = siblings.into_iter().map(|sibling| self.entry_of(sibling));
        let mut entries = futures::stream::iter(entries).buffered(FILE_REQUESTS_MAX);
        while let Some(entry) = entries.try_next().await? {
            files.add_entry(entry)?;
        }
        Ok(true)
    }

    /// Returns the tree entry of a file in a description of the revision.
    async fn entry_of(&self, sibling: Sibling) -> Result<TreeEntry> {
        let Sibling { name: path, size, oid, lfs } = sibling;
        if size.is_some() && (oid.is_some() || lfs.is_some()) {
            let lfs = lfs.map(|lfs| Lfs { oid: lfs.sha256 });
            return Ok(TreeEntry { kind: "file".into(), path, size, oid, lfs });
        }
        self.hub.retry.run(|| self.describe(&path)).await
    }

    /// Requests the first byte of a file, and takes its size and digest from the response headers.
    async fn describe(&self, path: &str) -> Result<TreeEntry> {
        let fetched = self.request_range(self.file_url(path)?, &(0..1), None).await?;
        let (status, headers) = (fetched.response.status(), fetched.response.headers());
        let size = match status {
            StatusCode::OK => http::content_length(headers),
            StatusCode::PARTIAL_CONTENT => {
                http::header(headers, "content-range").and_then(content_range).and_then(|range| range.total)
            }
            // An empty file has no first byte.
            StatusCode::RANGE_NOT_SATISFIABLE => Some(0),
            _ => return Err(self.hub.error_of(fetched, &self.repo, FilePath::new(path).ok().as_ref()).await),
        };
        let tag = http::header(&fetched.same_origin_headers, "x-linked-etag")
            .or_else(|| http::header(&fetched.same_origin_headers, "etag"));
        let tag = tag.map(|tag| tag.trim_start_matches("W/").trim_matches('"').to_owned());
        // The Hub's entity tag is the SHA-256 of a large file (LFS), or the git object id of any other file.
        let of_length = |length: usize| tag.clone().filter(|tag| tag.len() == length);
        let (lfs, oid) = (of_length(64).map(|oid| Lfs { oid }), of_length(40));
        Ok(TreeEntry { kind: "file".into(), path: path.to_owned(), size, oid, lfs })
    }

    /// Returns the URL of a file at the endpoint.
    fn file_url(&self, path: &str) -> Result<Url> {
        let HubRepo { kind, id, revision } = &self.repo;
        self.hub.url_for(&format!("{}{id}/resolve/{revision}/{}", kind.prefix(), http::encode_path(path)))
    }

    /// Makes one attempt to read `range`: from the last known location, else through the endpoint.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let size = self.known_size(path)?;
        if let Some(body) = Body::for_empty_range(path, &range, size)? {
            return Ok(body);
        }
        // 1. Request the last known location directly, which saves a redirect per part.
        if let Some(location) = self.location(path) {
            let forget = || drop(self.answers.locations.lock().remove(path));
            let fetched = self.request_range(location.url.clone(), &range, location.etag.clone()).await;
            // The server at the location may be gone for good: the next attempt asks the endpoint.
            let fetched = fetched.inspect_err(|_| forget())?;
            let status = fetched.response.status().as_u16();
            if status >= 400 {
                forget();
            }
            if !matches!(status, 401 | 403 | 404 | 410 | 412) {
                return self.body(path, &range, size, fetched).await;
            }
            // 2. The signed URL expired, or the file changed there: let the endpoint redirect again.
            tracing::debug!(%path, status, "signed URL refused; resolving again");
            http::drain(fetched.response).await;
        }
        // 3. Request the file from the endpoint.
        let fetched = self.request_range(self.file_url(path.as_str())?, &range, None).await?;
        self.body(path, &range, size, fetched).await
    }

    /// Requests `range` from `url`. With `etag`, the server refuses the request if the file has changed (`If-Match`).
    async fn request_range(&self, url: Url, range: &Range<u64>, etag: Option<HeaderValue>) -> Result<FinalResponse> {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, http::range_header(range)?);
        if let Some(etag) = etag {
            headers.insert(IF_MATCH, etag);
        }
        self.hub.follow(url, headers, false).await
    }

    /// Checks a response against the commit and the size of the file, remembers its location and returns the bytes.
    async fn body(
        &self,
        path: &FilePath,
        range: &Range<u64>,
        size: Option<u64>,
        fetched: FinalResponse,
    ) -> Result<Body> {
        let status = fetched.response.status();
        // A 416 is left to `body_start`, whose message is more specific.
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(self.hub.error_of(fetched, &self.repo, Some(path)).await);
        }
        let FinalResponse { response, url, same_origin_headers, .. } = fetched;
        // The header is on the response of the endpoint, which may be the redirect.
        let commit = http::header(&same_origin_headers, "x-repo-commit");
        if let Some(commit) = commit.filter(|commit| !commit.eq_ignore_ascii_case(&self.repo.revision)) {
            return Err(Error::corrupt(format!(
                "{path}: requested commit {}, but the server sent {commit:?}",
                self.repo.revision
            )));
        }
        let start = match http::body_start(status, response.headers(), range, size) {
            Err(_) if http::is_html(response.headers()) => return Err(http::html_error(&url)),
            start => start.map_err(|error| Error::new(error.kind(), format!("{path}: {}", error.message())))?,
        };
        // `If-Match` needs a strong tag; a weak one begins with `W/`. For a file with a digest no tag is kept: the
        // digest decides, and the servers of a CDN may have different tags for one file.
        let is_strong = |etag: &&HeaderValue| etag.as_bytes().starts_with(b"\"");
        let etag = response.headers().get(ETAG).filter(|etag| is_strong(etag) && !self.has_digest(path)).cloned();
        self.answers.locations.lock().insert(path.clone(), ReadLocation { url: url.clone(), etag });
        Ok(Body { start, stream: http::body_stream(response, &url) })
    }

    /// Returns the size of a file, or `None` if the tree was not listed yet.
    ///
    /// # Errors
    /// `NotFound` if the tree was listed and lacks the file.
    fn known_size(&self, path: &FilePath) -> Result<Option<u64>> {
        match self.answers.manifest() {
            None => Ok(None),
            Some(manifest) => match manifest.as_ref().and_then(|manifest| manifest.files.get(path)) {
                Some(entry) => Ok(Some(entry.size)),
                None => Err(Error::not_found(format!("there is no file {path} in {}", self.repo.id))),
            },
        }
    }

    /// Returns true if the list of files has a digest of the file.
    fn has_digest(&self, path: &FilePath) -> bool {
        let listed = self.answers.manifest().and_then(|manifest| manifest.as_ref()?.files.get(path));
        listed.is_some_and(|entry| entry.sha256.is_some() || entry.git_oid.is_some())
    }

    fn location(&self, path: &FilePath) -> Option<ReadLocation> {
        self.answers.locations.lock().get(path).cloned()
    }
}

/// Returns the URL of the next page, always at the endpoint: mirrors pass on links of the Hub that they mirror, and the
/// token must not be sent there.
fn next_page(endpoint: &Url, page: &Url, link: &str) -> Result<Url> {
    let next =
        page.join(link).map_err(|cause| Error::corrupt("the link to the next page is not a URL").cause(cause))?;
    let base = endpoint.path().trim_end_matches('/');
    // A proxy may serve the Hub below a path of its own, and pass on links that begin at the root of the Hub.
    let is_below_base = next.path().strip_prefix(base).is_some_and(|rest| rest.starts_with('/'));
    let mut here = endpoint.clone();
    here.set_path(&if is_below_base { next.path().to_owned() } else { format!("{base}{}", next.path()) });
    here.set_query(next.query());
    Ok(here)
}

/// The result of listing a tree.
enum TreeListing {
    All,
    NoRevision,
    UnknownCall(Error),
}

/// The files of a commit, while they are listed.
struct FileList {
    manifest: Manifest,
    /// The number of files with a name that cannot be kept, and the first few names.
    left_out: (usize, Vec<String>),
}

impl FileList {
    fn new(key: ArtifactKey) -> Self {
        Self { manifest: Manifest::new(key, Shape::Tree), left_out: (0, Vec::new()) }
    }

    /// Returns false, and records the name as left out, if it cannot be a file path but is harmless, for instance
    /// `onnx\model.onnx`. Returns true for names that leave the folder, which `add_entry` refuses.
    fn keep_or_leave_out(&mut self, name: &str) -> bool {
        let leaves_folder = name.starts_with('/') || name.split('/').any(|segment| matches!(segment, "" | "." | ".."));
        if leaves_folder || FilePath::new(name).is_ok() {
            return true;
        }
        let (count, first) = &mut self.left_out;
        *count += 1;
        if first.len() < LEFT_OUT_NAMED {
            first.push(printable::quote(name));
        }
        false
    }

    /// Adds one entry of a tree. Folders are skipped, because their files are listed separately.
    ///
    /// # Errors
    /// `Corrupt` for a name that leaves the folder of the repository, for a file without a size, and for a file that is
    /// listed twice.
    fn add_entry(&mut self, entry: TreeEntry) -> Result<()> {
        match entry.kind.as_str() {
            "file" => {}
            "directory" => return Ok(()),
            kind => {
                tracing::warn!(
                    kind,
                    path = entry.path,
                    "the tree lists an entry that is neither file nor folder; skipped"
                );
                return Ok(());
            }
        }
        if !self.keep_or_leave_out(&entry.path) {
            return Ok(());
        }
        let refuse = |why: &dyn fmt::Display| Error::corrupt(format!("the tree lists {:?}: {why}", entry.path));
        let path = FilePath::new(&entry.path).map_err(|error| {
            refuse(&error.message())
                .hint("nothing was downloaded: a repository with an unsafe file name is rejected as a whole")
        })?;
        let Some(size) = entry.size else { return Err(refuse(&"no size")) };
        let mut file = FileEntry::of(size);
        match (&entry.lfs, &entry.oid) {
            (Some(lfs), _) => {
                // The `oid` of an LFS file itself is that of its pointer; the content has a SHA-256.
                let digest = lfs.oid.strip_prefix("sha256:").unwrap_or(&lfs.oid);
                file.sha256 = Some(digest.parse().map_err(|error: Error| refuse(&error.message()))?);
            }
            // Other files are verified by the git object id.
            (None, Some(oid)) => file.git_oid = Some(oid.parse().map_err(|error: Error| refuse(&error.message()))?),
            (None, None) => {}
        }
        file.provenance = (file.sha256.is_some() || file.git_oid.is_some()).then_some(Provenance::Origin);
        match self.manifest.files.insert(path, file) {
            None => Ok(()),
            Some(_) => Err(refuse(&"listed twice")),
        }
    }

    /// Returns the manifest, and warns about the files that were left out.
    fn finish(self) -> Result<Manifest> {
        let (count, first) = &self.left_out;
        if *count > 0 {
            tracing::warn!(
                artifact = %self.manifest.key,
                "{count} files are left out because their names cannot be kept: {}",
                first.join(", ")
            );
        }
        self.manifest.check()?;
        Ok(self.manifest)
    }
}

/// Fuzz target for responses of the Hub; see `fuzzing`.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    let _ = http::json_error(bytes);
    let Ok(page) = parse::<Vec<TreeEntry>>(bytes, "") else { return };
    let Ok(key) = ArtifactKey::bare("fuzz@1") else { return };
    let mut files = FileList::new(key);
    if page.into_iter().try_for_each(|entry| files.add_entry(entry)).is_ok() {
        for path in files.manifest.files.keys() {
            let climbs = path.as_str().split('/').any(|segment| matches!(segment, "" | "." | ".."));
            assert!(!climbs && !path.as_str().contains('\\'), "{path}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RetryConfig;
    use crate::reference::RepoKind;

    fn hub(endpoint: &str) -> Arc<Hub> {
        let mut config = Config::new("");
        (config.hub.endpoint, config.hub.token) = (endpoint.into(), Some(Secret::new("hf_canary")));
        Arc::new(Hub::new(&config, Retry::new(RetryConfig::default())))
    }

    fn entry(json: &str) -> TreeEntry {
        serde_json::from_str(json).expect(json)
    }

    #[test]
    fn an_endpoint_may_have_a_path_and_must_be_a_web_address() {
        let url_for = |endpoint: &str| hub(endpoint).url_for("api/models/x?a=b").map(|url| url.to_string());
        assert_eq!(url_for("https://h").expect("plain"), "https://h/api/models/x?a=b");
        assert_eq!(url_for("https://h:1/").expect("port"), "https://h:1/api/models/x?a=b");
        assert_eq!(url_for("http://h/mirror/hf/").expect("path"), "http://h/mirror/hf/api/models/x?a=b");
        for bad in ["", "huggingface.co", "file:///etc", "ftp://h", "https://"] {
            assert_eq!(url_for(bad).expect_err(bad).kind(), ErrorKind::Invalid);
        }
        let segment = hub("https://h").url_for(&format!("r/{}", http::encode_segment("refs/pr/1"))).expect("address");
        assert_eq!(segment.path(), "/r/refs%2Fpr%2F1");
    }

    #[test]
    fn tree_entries_become_files_with_their_digests() {
        let mut files = FileList::new(ArtifactKey::bare("x@1").expect("key"));
        let (sha, oid) = ("ab".repeat(32), "cd".repeat(20));
        let rows = [
            format!(r#"{{"type":"directory","path":"d","oid":"{oid}","size":0}}"#),
            format!(r#"{{"type":"file","path":"d/s","oid":"{oid}","size":3,"future":[1]}}"#),
            format!(
                r#"{{"type":"file","path":"l","oid":"{oid}","size":9,"lfs":{{"oid":"{sha}","size":9}},"xetHash":"x"}}"#
            ),
            r#"{"type":"portal","path":"../p"}"#.to_owned(),
        ];
        rows.iter().try_for_each(|row| files.add_entry(entry(row))).expect("added");
        let manifest = files.finish().expect("sound");
        let file = |path: &str| &manifest.files[&FilePath::new(path).expect("path")];
        assert_eq!(manifest.files.len(), 2);
        assert_eq!((file("d/s").size, file("d/s").sha256, file("d/s").git_oid.is_some()), (3, None, true));
        assert_eq!((file("l").size, file("l").sha256.is_some(), file("l").git_oid), (9, true, None));
        assert_eq!(file("l").provenance, Some(Provenance::Origin));
    }

    #[test]
    fn malicious_or_malformed_tree_entries_are_rejected() {
        for row in [
            r#"{"type":"file","path":"../x","size":1}"#,
            r#"{"type":"file","path":"/etc/passwd","size":1}"#,
            r#"{"type":"file","path":"a/../b","size":1}"#,
            r#"{"type":"file","path":"taken","size":1}"#,
            r#"{"type":"file","path":"x"}"#,
            r#"{"type":"file","path":"x","size":1,"oid":"zz"}"#,
            r#"{"type":"file","path":"x","size":1,"lfs":{"oid":"00"}}"#,
        ] {
            let mut files = FileList::new(ArtifactKey::bare("x@1").expect("key"));
            files.add_entry(entry(r#"{"type":"file","path":"taken","size":1}"#)).expect("first");
            assert_eq!(files.add_entry(entry(row)).expect_err(row).kind(), ErrorKind::Corrupt, "{row}");
        }
    }

    #[test]
    fn files_with_names_that_cannot_be_kept_are_left_out() {
        let mut files = FileList::new(ArtifactKey::bare("x@1").expect("key"));
        for path in [
            r"onnx\\model.onnx",
            r"..\\evil",
            r"a\u0000",
            ".modelcache.json",
            ".modelcache/manifest.json",
            "model.onnx",
        ] {
            files.add_entry(entry(&format!(r#"{{"type":"file","path":"{path}","size":1}}"#))).expect(path);
        }
        assert_eq!(files.left_out.0, 5);
        assert_eq!(files.left_out.1.len(), LEFT_OUT_NAMED);
        let manifest = files.finish().expect("sound");
        assert!(manifest.files.keys().map(FilePath::as_str).eq(["model.onnx"]));
    }

    #[test]
    fn the_next_page_is_always_requested_from_the_endpoint() {
        let (endpoint, page) = (Url::parse("http://h:1").expect("url"), Url::parse("http://h:1/t?a=b").expect("url"));
        let next = |link: &str| next_page(&endpoint, &page, link).expect("an address").to_string();
        assert_eq!(
            (next("http://h:1/t?cursor=2"), next("?cursor=2")),
            ("http://h:1/t?cursor=2".into(), "http://h:1/t?cursor=2".into())
        );
        for other in
            ["http://h:2/t?c=2", "https://h:1/t?c=2", "http://evil/t?c=2", "//evil/t?c=2", "http://h:1@evil/t?c=2"]
        {
            assert_eq!(next(other), "http://h:1/t?c=2", "{other}");
        }
        let mirror = Url::parse("http://h:1/hf/").expect("url");
        let there = next_page(&mirror, &page, "https://huggingface.co/api/t?c=2").expect("an address");
        assert_eq!(there.as_str(), "http://h:1/hf/api/t?c=2");
        for link in ["/api/t?c=2", "/hf/api/t?c=2", "http://h:1/hf/api/t?c=2", "https://h/hf/api/t?c=2"] {
            let there = next_page(&mirror, &page, link).expect("an address");
            assert_eq!(there.as_str(), "http://h:1/hf/api/t?c=2", "{link}");
        }
    }

    #[test]
    fn sources_and_hubs_do_not_print_their_secrets() {
        let hub = hub("https://h");
        let repo = HubRepo { kind: RepoKind::Model, id: "a/b".into(), revision: "ab".repeat(20) };
        let key = repo.key_at(&repo.revision).expect("key");
        let source = hub.source(&Reference { target: Target::Hub(repo), file: None, digest: None }, &key);
        assert!(source.is_some() && !format!("{hub:?}{source:?}").contains("canary"));
        assert!(bearer("a\nb", HUB_TOKEN).is_err());
    }
}
