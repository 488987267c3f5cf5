//! The Hugging Face routes: a client with `HF_ENDPOINT` set to the daemon works unchanged.
//!
//! Lists and metadata are made from the manifest, so that they are answered while the Hub is down. Files are streamed
//! while they download. What the Hub alone knows (the account of a token, branches, commits) is passed on.
//!
//! Clients compare only the size of a file. If a digest does not match, the connection is cut before the last bytes,
//! and a client that asks for the rest of the file gets the whole file again; old clients, which would append it, get
//! an error. After three such downloads, each within a week of the one before, the file is refused for a minute.

mod listing;
mod rights;
mod route;

pub(crate) use rights::Rights;

use crate::access::Caller;
use crate::app::App;
use crate::error::{Failure, status_of};
use crate::file::FileRequest;
use crate::header;
use crate::http_metrics::RouteName;
use crate::listen::{Scheme, WithoutLength};
use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HOST, LINK, LOCATION, RETRY_AFTER, USER_AGENT, VIA};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, Limited};
use listing::Storage;
use modelcache::config::encode_path;
use modelcache::key::FilePath;
use modelcache::manifest::Manifest;
use modelcache::mutex::Mutex;
use modelcache::{Cache, Error, ErrorKind, Reference, Tier};
use rights::{NoAccess, Refusal, unless_paused};
use route::{Repo, Route};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

const X_REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
const X_LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const X_LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const X_ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
const X_ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");

/// Files above this size are downloaded by `huggingface_hub` 2 over plain HTTP only if the answer to HEAD states no
/// size.
const STATED_SIZE_MAX: u64 = 50_000_000_000;
/// Largest form of a `paths-info` request.
const FORM_BYTES_MAX: usize = 1 << 20;
/// How long the Hub's description of a revision is used. It contains counters, for instance of downloads.
const INFO_AGE_MAX: Duration = Duration::from_secs(600);
/// Number and size of descriptions that are remembered.
const INFOS_MAX: usize = 256;
const INFO_BYTES_MAX: usize = 256 << 10;
/// Longest wait for the Hub's description of a revision. After it, the description is made from the manifest.
const INFO_TIMEOUT: Duration = Duration::from_secs(3);

/// The Hub's descriptions of revisions, by their path and query, without the hints at its own storage.
#[derive(Debug, Default)]
pub(crate) struct Infos(Mutex<HashMap<String, (Instant, Bytes)>>);

/// How long all requests are refused after the daemon has received one of its own.
const LOOP_MEMORY: Duration = Duration::from_secs(10);

/// When the daemon last received a request of its own, because the endpoint of its Hub is its own address.
#[derive(Debug, Default)]
pub(crate) struct OwnRequests(watch::Sender<Option<Instant>>);

impl OwnRequests {
    fn record(&self) {
        self.0.send_replace(Some(Instant::now()));
    }

    /// Waits for a request of the daemon itself. Returns at once if there was one lately.
    async fn received(&self) {
        let is_recent = |at: &Option<Instant>| at.is_some_and(|at| at.elapsed() < LOOP_MEMORY);
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(is_recent).await;
    }
}

/// Answers a request to the Hugging Face routes.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    let Some(route) = route::parse(request.uri().path()) else { return no_route() };
    let (parts, body) = request.into_parts();
    if came_from_here(&app, &parts.headers) {
        app.own_requests.record();
        return loop_detected();
    }
    let name = match route {
        Route::Info { .. } => "hub_info",
        Route::Tree { .. } => "hub_tree",
        Route::PathsInfo { .. } => "hub_paths_info",
        Route::Resolve { .. } => "hub_file",
        Route::Other { .. } | Route::WhoAmI => "hub_other",
    };
    let is_allowed = match route {
        Route::PathsInfo { .. } => parts.method == Method::POST,
        _ => matches!(parts.method, Method::GET | Method::HEAD),
    };
    let mut response = match is_allowed {
        true => {
            let call = Call {
                caller: Caller::of(&app, &parts.headers),
                app: &app,
                method: &parts.method,
                uri: &parts.uri,
                headers: &parts.headers,
                scheme: parts.extensions.get().copied().unwrap_or(Scheme::Http),
            };
            // The future is large, and most requests need little of it.
            let answer = Box::pin(call.answer(route, body));
            tokio::select! {
                biased;
                () = app.own_requests.received() => loop_detected(),
                response = answer => response.unwrap_or_else(|refused| *refused),
            }
        }
        false => error(StatusCode::METHOD_NOT_ALLOWED, None, "this route has no such method"),
    };
    response.extensions_mut().insert(RouteName(name));
    response
}

/// A response that ends the handling of a request early.
type Refused = Box<Response>;

/// One request.
struct Call<'a> {
    app: &'a Arc<App>,
    caller: Caller,
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
    /// The scheme of the connection.
    scheme: Scheme,
}

/// A repository at the commit that a request means.
struct Commit {
    repo: Repo,
    /// The cache with the token of the caller, or of another one with the same rights.
    cache: Cache,
    manifest: Arc<Manifest>,
    /// The reference to the commit.
    reference: Reference,
}

impl Call<'_> {
    fn query(&self) -> &str {
        self.uri.query().unwrap_or_default()
    }

    async fn answer(&self, route: Route, body: Body) -> Result<Response, Refused> {
        match route {
            Route::Info { repo, revision } => self.info(self.commit(repo, &revision).await?).await,
            Route::Tree { repo, revision, folder } => self.tree(&self.commit(repo, &revision).await?, &folder),
            Route::PathsInfo { repo, revision } => self.paths_info(&self.commit(repo, &revision).await?, body).await,
            Route::Resolve { repo, revision, file } => {
                self.resolve(self.commit(repo, &revision).await?, &revision, &file).await
            }
            Route::Other { repo } => {
                // `auth-check` is passed on, too, so that the Hub answers it for the token of the caller.
                tracing::debug!(repo = repo.id, path = self.uri.path(), "passed on to the Hub");
                Ok(self.pass_on().await)
            }
            Route::WhoAmI => Ok(self.pass_on().await),
        }
    }

    /// Returns the token with which requests are passed on.
    fn token(&self) -> Option<&str> {
        match &self.caller {
            Caller::Daemon => self.app.cache.hub_api().token(),
            Caller::Hub(token) => Some(token),
            Caller::Anonymous => None,
        }
    }

    /// Resolves a revision, after the rights of the caller were checked.
    async fn commit(&self, repo: Repo, revision: &str) -> Result<Commit, Refused> {
        let app = self.app;
        let cache = app.rights.cache_for(&self.caller, &repo).await.map_err(|no_access| match no_access {
            NoAccess::Refused(refusal) => refused(&refusal),
            NoAccess::Unknown(error) => Box::new(failed(error)),
        })?;
        let reference = cache.reference(&repo.reference(revision));
        // What cannot be a revision does not exist.
        let reference = reference.map_err(|_| Box::new(no_revision(revision)))?;
        let found = unless_paused(cache.hub_api(), app.manifest(&cache, &reference, Tier::Origin)).await;
        let manifest = match found {
            Ok(manifest) => manifest,
            Err(error) => {
                if error.kind() == ErrorKind::Unauthorized {
                    app.rights.forget_cache(&repo);
                }
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unauthorized)
                    && self.caller == Caller::Daemon
                    && let Some(refusal) = app.rights.own_refusal(&repo).await
                {
                    return Err(refused(&refusal));
                }
                return Err(Box::new(match error.kind() {
                    ErrorKind::NotFound => no_revision(revision),
                    _ => failed(error),
                }));
            }
        };
        let commit = manifest.key.version.as_str();
        let reference = cache.reference(&repo.reference(commit)).map_err(|error| Box::new(failed(error)))?;
        Ok(Commit { repo, cache, manifest, reference })
    }

    /// Returns the description of a revision: that of the Hub, or one made from the manifest.
    async fn info(&self, commit: Commit) -> Result<Response, Refused> {
        let Commit { repo, manifest, .. } = &commit;
        let query = self.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let path = format!("{}/revision/{}{query}", repo.api_path(), manifest.key.version);
        let body = match self.app.infos.get(&path) {
            Some(body) => body,
            None => match self.hub_info(&path).await {
                Some(body) => {
                    self.app.infos.insert(path, body.clone());
                    body
                }
                None => listing::info(repo, manifest, self.query()).to_string().into(),
            },
        };
        Ok(with_commit(json_body(body), manifest))
    }

    /// Requests the description of a revision from the Hub. Returns `None` if the daemon is offline, or if the Hub
    /// sends no description in time.
    async fn hub_info(&self, path: &str) -> Option<Bytes> {
        if self.app.cache.config().offline || self.app.rights.is_hub_silent() {
            return None;
        }
        let request = self.app.cache.hub_api().get(path, self.token());
        let answer = tokio::time::timeout(INFO_TIMEOUT, request).await.ok()?.ok()?;
        let mut info: Value = serde_json::from_slice(&answer.body).ok().filter(|_| answer.status == 200)?;
        listing::without_xet(&mut info);
        Some(info.to_string().into())
    }

    fn tree(&self, commit: &Commit, folder: &str) -> Result<Response, Refused> {
        let Some(page) = listing::tree(&commit.manifest, folder, self.query()) else {
            return Err(Box::new(no_entry(&commit.manifest, folder)));
        };
        let mut response = with_commit(Json(Value::Array(page.entries)).into_response(), &commit.manifest);
        if let Some(cursor) = page.next {
            // Clients follow the link as it stands, so it names the host that they used.
            let forwarded = self.headers.get("x-forwarded-proto").is_some_and(|scheme| scheme == "https");
            let scheme = if forwarded { Scheme::Https } else { self.scheme }.as_str();
            let host = self.headers.get(HOST).and_then(|host| host.to_str().ok()).filter(|host| is_authority(host));
            // A client that did not send a host name gets a link that is relative to its request.
            let server = host.map(|host| format!("{scheme}://{host}")).unwrap_or_default();
            let kept = self.query().split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("cursor="));
            let query: Vec<_> = kept.map(str::to_owned).chain([format!("cursor={cursor}")]).collect();
            let link = format!("<{server}{}?{}>; rel=\"next\"", self.uri.path(), query.join("&"));
            response.headers_mut().insert(LINK, header::value(&link));
        }
        Ok(response)
    }

    async fn paths_info(&self, commit: &Commit, body: Body) -> Result<Response, Refused> {
        let body = Limited::new(body, FORM_BYTES_MAX).collect().await.map_err(|_| {
            Box::new(error(StatusCode::PAYLOAD_TOO_LARGE, None, "the form has more than 1 MiB; ask for fewer paths"))
        })?;
        let body = body.to_bytes();
        let text = String::from_utf8_lossy(&body);
        let paths = match serde_json::from_slice::<Value>(&body) {
            Ok(form) => {
                let paths = form.get("paths").and_then(Value::as_array).into_iter().flatten();
                paths.filter_map(|path| path.as_str().map(str::to_owned)).collect()
            }
            Err(_) => route::values(&text, "paths"),
        };
        let entries = listing::paths_info(&commit.manifest, &paths);
        Ok(with_commit(Json(Value::Array(entries)).into_response(), &commit.manifest))
    }

    /// Answers HEAD and GET of a file.
    async fn resolve(&self, commit: Commit, revision: &str, file: &str) -> Result<Response, Refused> {
        let Commit { repo, cache, manifest, reference } = &commit;
        let path = FilePath::new(file).ok().filter(|path| manifest.files.contains_key(path));
        let Some(path) = path else { return Err(Box::new(no_entry(manifest, file))) };
        let entry = &manifest.files[&path];
        let storage = Storage::of(entry);
        let etag = storage.etag().map(|etag| format!("\"{etag}\""));
        let add_headers = |response: &mut Response| {
            let headers = response.headers_mut();
            headers.insert(X_REPO_COMMIT, header::cleaned(manifest.key.version.as_str()));
            if let (Storage::Lfs(_), Some(etag)) = (&storage, &etag) {
                headers.insert(X_LINKED_ETAG, header::cleaned(etag));
                headers.insert(X_LINKED_SIZE, entry.size.into());
            }
            if self.method == Method::HEAD && entry.size > STATED_SIZE_MAX && !self.is_old_client() {
                headers.remove(CONTENT_LENGTH);
                headers.remove(X_LINKED_SIZE);
                // For a body of known length, also an empty one, axum would state that length.
                *response.body_mut() = Body::from_stream(stream::empty::<Result<Bytes, Infallible>>());
                response.extensions_mut().insert(WithoutLength);
            }
        };
        // A movable revision is redirected to its commit, so that a client that resumes stays on one commit.
        if revision != manifest.key.version.as_str() {
            let (prefix, id, commit) = (repo.prefix(), &repo.id, &manifest.key.version);
            let location = format!("/{prefix}{id}/resolve/{commit}/{}", encode_path(file));
            let mut response = StatusCode::TEMPORARY_REDIRECT.into_response();
            response.headers_mut().insert(LOCATION, header::value(&location));
            if let Some(etag) = &etag {
                response.headers_mut().insert(ETAG, header::cleaned(etag));
            }
            add_headers(&mut response);
            return Ok(response);
        }
        let request = FileRequest {
            app: self.app,
            cache,
            reference,
            manifest,
            path: &path,
            method: self.method,
            headers: self.headers,
            etag: etag.clone(),
            max_tier: Tier::Origin,
            // The old client appends the whole file to what it has.
            rewinds: !self.is_old_client(),
        };
        let responded = unless_paused(cache.hub_api(), request.respond()).await;
        let mut response = responded.map_err(|error| {
            if error.kind() == ErrorKind::Unauthorized {
                self.app.rights.forget_cache(repo);
            }
            Box::new(failed(error))
        })?;
        add_headers(&mut response);
        Ok(response)
    }

    /// Returns true for `huggingface_hub` before 1.0, which needs the size of every file, and keeps an incomplete file
    /// for the next call.
    fn is_old_client(&self) -> bool {
        let agent = self.headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
        agent.contains("hf_hub/0.") || agent.contains("huggingface_hub/0.")
    }

    /// Passes a request on to the Hub with the token of the caller.
    async fn pass_on(&self) -> Response {
        let path = self.uri.path_and_query().map_or("", |path| path.as_str()).trim_start_matches('/');
        let answer = match self.app.cache.config().offline {
            true => Err(Error::unavailable("the daemon is offline (MODEL_CACHE_OFFLINE or HF_HUB_OFFLINE)")),
            false => self.app.cache.hub_api().get(path, self.token()).await,
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return failed(error),
        };
        let body = match serde_json::from_slice::<Value>(&answer.body) {
            Ok(mut value) => {
                listing::without_xet(&mut value);
                value.to_string().into()
            }
            Err(_) => Bytes::from(answer.body),
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
        let headers = response.headers_mut();
        let content_type = answer.content_type.as_deref().unwrap_or("application/json");
        headers.insert(CONTENT_TYPE, header::cleaned(content_type));
        if let Some(code) = &answer.error_code {
            headers.insert(X_ERROR_CODE, header::cleaned(code));
        }
        if let Some(message) = &answer.error_message {
            headers.insert(X_ERROR_MESSAGE, header::cleaned(message));
        }
        if let Some(wait) = answer.retry_after {
            headers.insert(RETRY_AFTER, header::retry_after(Some(wait)));
        }
        response
    }
}

impl Infos {
    fn get(&self, path: &str) -> Option<Bytes> {
        let infos = self.0.lock();
        infos.get(path).filter(|(since, _)| since.elapsed() < INFO_AGE_MAX).map(|(_, body)| body.clone())
    }

    fn insert(&self, path: String, body: Bytes) {
        if body.len() > INFO_BYTES_MAX {
            return;
        }
        let mut infos = self.0.lock();
        if infos.len() >= INFOS_MAX {
            infos.clear();
        }
        infos.insert(path, (Instant::now(), body));
    }
}

/// Returns true if the daemon sent the request itself, because the endpoint of its Hub is its own address.
fn came_from_here(app: &App, headers: &HeaderMap) -> bool {
    let own = app.cache.config().hub.via.as_deref();
    let via = headers.get_all(VIA).into_iter().filter_map(|via| via.to_str().ok());
    own.is_some_and(|own| via.flat_map(|via| via.split(',')).any(|via| via.trim() == own))
}

fn loop_detected() -> Response {
    let message =
        "HF_ENDPOINT of this daemon points at the daemon itself; unset it for the daemon, or set it to the Hub";
    tracing::error!("{message}");
    error(StatusCode::LOOP_DETECTED, None, message)
}

/// Returns true for a host name or address, with or without a port.
fn is_authority(text: &str) -> bool {
    text.parse::<Authority>().is_ok_and(|authority| !authority.as_str().contains('@'))
}

fn json_body(body: Bytes) -> Response {
    ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
}

fn with_commit(mut response: Response, manifest: &Manifest) -> Response {
    response.headers_mut().insert(X_REPO_COMMIT, header::cleaned(manifest.key.version.as_str()));
    response
}

/// Returns an error response in the form of the Hub.
fn error(status: StatusCode, code: Option<&str>, message: &str) -> Response {
    let mut response = (status, Json(json!({ "error": message }))).into_response();
    let headers = response.headers_mut();
    if let Some(code) = code {
        headers.insert(X_ERROR_CODE, header::cleaned(code));
    }
    headers.insert(X_ERROR_MESSAGE, header::cleaned(message));
    response
}

fn no_route() -> Response {
    let mut response = error(StatusCode::NOT_FOUND, None, "there is no such route");
    response.extensions_mut().insert(RouteName("none"));
    response
}

fn no_revision(revision: &str) -> Response {
    error(StatusCode::NOT_FOUND, Some("RevisionNotFound"), &format!("Invalid rev id: {revision}"))
}

/// The commit is part of the response: with it, the client remembers that the file does not exist.
fn no_entry(manifest: &Manifest, file: &str) -> Response {
    with_commit(error(StatusCode::NOT_FOUND, Some("EntryNotFound"), &format!("Entry not found: {file}")), manifest)
}

/// Returns the Hub's refusal of a caller.
fn refused(refusal: &Refusal) -> Refused {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::FORBIDDEN);
    let message = refusal.message.as_deref().unwrap_or("the Hub refuses access to this repository");
    Box::new(error(status, refusal.code.as_deref(), message))
}

/// Returns the response for an error of the library.
fn failed(failure: Error) -> Response {
    let (status, code) = match failure.kind() {
        // The Hub limits the rate of requests, and so does the daemon on its behalf.
        ErrorKind::Unavailable if failure.wait().is_some() => (StatusCode::TOO_MANY_REQUESTS, None),
        ErrorKind::Unauthorized => (StatusCode::FORBIDDEN, Some("GatedRepo")),
        ErrorKind::NotFound => (StatusCode::NOT_FOUND, Some("EntryNotFound")),
        // The names in the request were valid, so the answer of the Hub is not, for instance a redirect to a metadata
        // service.
        ErrorKind::Invalid => (StatusCode::BAD_GATEWAY, None),
        _ => (status_of(&failure), None),
    };
    let mut response = error(status, code, &failure.to_string());
    if failure.kind() == ErrorKind::Unavailable {
        response.headers_mut().insert(RETRY_AFTER, header::retry_after(failure.wait()));
    }
    response.extensions_mut().insert(Failure(failure));
    response
}
