//! From a request to its answer: faults first, then routing, then authorization.
//!
//! Every request is logged with the status it got. A private repo answers like a missing one unless the token may read
//! it. A gated repo shows its listings but refuses its files.

use std::sync::Arc;

use futures::future::BoxFuture;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderMap};
use hyper::http::request::Parts;
use hyper::{Method, Request, StatusCode};

use super::fault::Kind;
use super::repo::{RepoData, RepoId, Repos, Tree};
use super::route::{self, Route};
use super::{Shared, api, refuse, resolve};
use crate::log::{LoggedRequest, Place};
use crate::serve::{Answer, Dropped, lock};

type Answering = BoxFuture<'static, Result<Answer, Dropped>>;

/// Returns the request handler of a listener.
pub(super) fn handler(shared: &Arc<Shared>, place: Place) -> impl Fn(Request<Incoming>) -> Answering + Clone + use<> {
    let shared = shared.clone();
    move |request| {
        let shared = shared.clone();
        Box::pin(async move { logged(shared, place, request).await })
    }
}

/// Answers one request and logs it.
async fn logged(shared: Arc<Shared>, place: Place, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let mut seen = LoggedRequest::of(place, &request);
    let answer = answered(&shared, &mut seen, request).await;
    seen.status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
    shared.log.push(seen);
    answer
}

async fn answered(
    shared: &Arc<Shared>,
    seen: &mut LoggedRequest,
    request: Request<Incoming>,
) -> Result<Answer, Dropped> {
    // The CDN's paths name digests only. Resolve them first, because faults are aimed at the path in the repo.
    let object = match seen.place {
        Place::Cdn => Some(resolve::cdn_object(shared, &seen.path, &seen.query)),
        _ => None,
    };
    let subject = match &object {
        Some(Ok(object)) => object.subject.clone(),
        _ => {
            let path = route::decode(&seen.path).unwrap_or_else(|| seen.path.clone());
            if seen.query.is_empty() { path } else { format!("{path}?{}", seen.query) }
        }
    };
    // These faults apply before routing and authorization.
    if let Some(kind) = shared.faults.take(&seen.method, &subject, Kind::applies_before_routing)
        && let Some(answer) = struck(kind, seen).await?
    {
        return Ok(answer);
    }
    match object {
        Some(Ok(object)) => {
            seen.file = Some(object.entry.path.clone());
            Ok(resolve::cdn(shared, &object, request.method(), request.headers()))
        }
        Some(Err(refusal)) => Ok(*refusal),
        None => at_hub(shared, seen, request).await,
    }
}

/// Returns the answer that a fault puts in place of the regular one, or `None` if the fault only delays.
async fn struck(kind: Kind, seen: &LoggedRequest) -> Result<Option<Answer>, Dropped> {
    Ok(match kind {
        Kind::Throttle(seconds) => Some(refuse::throttled(seconds, false)),
        Kind::RateLimit(seconds) => Some(refuse::throttled(seconds, true)),
        Kind::Status(code) => {
            let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            Some(refuse::refuse(status, None, "Internal Error - We're working hard to fix this"))
        }
        Kind::RedirectLoop => Some(resolve::loop_back(&seen.path, &seen.query)),
        Kind::HangUp => return Err(Dropped),
        Kind::Delay(time) => {
            tokio::time::sleep(time).await;
            None
        }
        _ => None,
    })
}

async fn at_hub(shared: &Arc<Shared>, seen: &mut LoggedRequest, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let (parts, body) = request.into_parts();
    let body = match parts.method {
        Method::POST => body.collect().await.map_err(|_| Dropped)?.to_bytes(),
        _ => Default::default(),
    };
    let route = route::route(&seen.path);
    if let Route::Resolve { file, .. } = &route {
        seen.file = Some(file.clone());
    }
    let asked = HubRequest { shared, seen, parts: &parts, body: &String::from_utf8_lossy(&body) };
    Ok(asked.route(&route).unwrap_or_else(|refusal| *refusal))
}

/// One request to the Hub, with its body.
struct HubRequest<'a> {
    shared: &'a Arc<Shared>,
    seen: &'a LoggedRequest,
    parts: &'a Parts,
    body: &'a str,
}

impl HubRequest<'_> {
    fn route(&self, route: &Route) -> Result<Answer, Box<Answer>> {
        let (shared, headers, method) = (self.shared, &self.parts.headers, &self.parts.method);
        let fits = match route {
            Route::PathsInfo { .. } => method == Method::POST,
            _ => matches!(*method, Method::GET | Method::HEAD),
        };
        if !fits {
            return Ok(refuse::no_route());
        }
        let repos = lock(&shared.repos);
        Ok(match route {
            Route::Unknown => refuse::no_route(),
            Route::WhoAmI => api::whoami(shared, headers),
            Route::Refs { repo } => api::refs(visible(&repos, repo, headers)?),
            Route::AuthCheck { repo } => {
                check_gate(repo, visible(&repos, repo, headers)?, headers)?;
                api::json(&"OK".into())
            }
            Route::Info { repo, revision } => {
                let data = visible(&repos, repo, headers)?;
                api::info(shared, repo, data, &*tree_at(data, revision)?, &self.seen.query)
            }
            Route::Commits { repo, revision } => {
                let data = visible(&repos, repo, headers)?;
                api::commits(data, &*tree_at(data, revision)?)
            }
            Route::Tree { repo, revision, folder } => {
                let data = visible(&repos, repo, headers)?;
                let (path, query) = (&self.seen.path, &self.seen.query);
                let page = api::PageRequest { headers, path, query, own_url: shared.hub_url() };
                api::tree(shared, data, &*tree_at(data, revision)?, folder, &page)
            }
            Route::PathsInfo { repo, revision } => {
                let data = visible(&repos, repo, headers)?;
                api::paths_info(shared, data, &*tree_at(data, revision)?, self.body)
            }
            Route::Resolve { repo, revision, file } => {
                let data = visible(&repos, repo, headers)?;
                check_gate(repo, data, headers)?;
                let tree = &*tree_at(data, revision)?;
                resolve::resolve(shared, &resolve::Ask { repo, revision, tree, file, method, headers, xet: data.xet })
            }
        })
    }
}

fn visible<'a>(repos: &'a Repos, id: &RepoId, headers: &HeaderMap) -> Result<&'a RepoData, Box<Answer>> {
    let token = bearer(headers).unwrap_or_default();
    // Without read access the repo answers as if it did not exist, like the real Hub.
    let may_read = |repo: &&RepoData| repo.readers.as_ref().is_none_or(|readers| readers.contains(token));
    repos.by_id.get(id).filter(may_read).ok_or_else(|| Box::new(refuse::no_repo()))
}

fn check_gate(id: &RepoId, repo: &RepoData, headers: &HeaderMap) -> Result<(), Box<Answer>> {
    let token = bearer(headers).unwrap_or_default();
    let may_read = repo.accepted.as_ref().is_none_or(|accepted| accepted.contains(token));
    may_read.then_some(()).ok_or_else(|| Box::new(refuse::gated(&id.name)))
}

fn tree_at(repo: &RepoData, revision: &str) -> Result<Arc<Tree>, Box<Answer>> {
    repo.tree(revision).ok_or_else(|| Box::new(refuse::no_revision(revision)))
}

/// Returns the token of an `Authorization: Bearer` header.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")).map(str::trim)
}
