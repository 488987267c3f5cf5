//! File content: `resolve` at the Hub, and the CDN that serves LFS files.
//!
//! A plain file is served by the Hub itself. HEAD and GET of an LFS file are answered with 302 to a CDN URL with an
//! expiry and a signature. The CDN accepts only this exact URL and needs no token.
//!
//! The `Content-Length` of that 302 is the length of the redirect's text. The size of the file is in `X-Linked-Size`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::{ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, LINK, LOCATION};
use hyper::{Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::api::xet_hash;
use super::refuse::{self, X_REPO_COMMIT};
use super::repo::{Entry, RepoId, Tree};
use super::route::values;
use super::{Shared, body};
use crate::content;
use crate::serve::{Answer, answer, lock};

const X_LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const X_LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const X_XET_HASH: HeaderName = HeaderName::from_static("x-xet-hash");
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The file that a CDN URL leads to.
#[derive(Clone, Debug)]
pub(super) struct CdnObject {
    /// The resolve path for which the URL was issued. Faults are matched against it.
    pub(super) subject: String,
    pub(super) entry: Arc<Entry>,
}

/// A request for one file of one commit.
pub(super) struct Ask<'a> {
    pub(super) repo: &'a RepoId,
    pub(super) revision: &'a str,
    pub(super) tree: &'a Tree,
    pub(super) file: &'a str,
    pub(super) method: &'a Method,
    pub(super) headers: &'a HeaderMap,
    pub(super) xet: bool,
}

/// Answers HEAD or GET of a file at the Hub.
pub(super) fn resolve(shared: &Arc<Shared>, ask: &Ask<'_>) -> Answer {
    let commit = ask.tree.commit.as_str();
    let Some(entry) = ask.tree.files.get(ask.file) else {
        return refuse::no_entry(commit);
    };
    let pinned = format!("{}/resolve/{commit}/{}", ask.repo.web_path(), utf8_percent_encode(ask.file, ENCODED));
    let redirect_revisions = lock(&shared.settings).redirect_revisions;
    // The first case that applies decides: redirect to the commit, not modified, redirect to the CDN, content.
    let mut answer = if redirect_revisions && ask.revision != commit {
        redirect(StatusCode::TEMPORARY_REDIRECT, &pinned)
    } else if *ask.method == Method::HEAD && is_known(ask.headers, entry.digest()) {
        answer(StatusCode::NOT_MODIFIED, "text/plain", "")
    } else if entry.lfs.is_some() {
        let subject = format!("{}/resolve/{commit}/{}", ask.repo.web_path(), ask.file);
        redirect(StatusCode::FOUND, &signed_url(shared, subject, entry))
    } else {
        let subject = format!("{}/resolve/{}/{}", ask.repo.web_path(), ask.revision, ask.file);
        body::content(shared, &subject, &entry.content, ask.method, ask.headers)
    };
    let headers = answer.headers_mut();
    headers.insert(X_REPO_COMMIT, header(commit));
    headers.insert(ETAG, header(&format!("\"{}\"", entry.digest())));
    if entry.lfs.is_some() {
        headers.insert(X_LINKED_ETAG, header(&format!("\"{}\"", entry.digest())));
        headers.insert(X_LINKED_SIZE, shared.metadata_size(entry).into());
        if ask.xet {
            headers.insert(X_XET_HASH, header(&xet_hash(entry)));
            let token_route = format!("{}/api/models/{}/xet-read-token/{commit}", shared.hub_url(), ask.repo.name);
            headers.insert(LINK, header(&format!("<{token_route}>; rel=\"xet-auth\"")));
        }
    }
    answer
}

/// Returns the file of a CDN request, or the refusal if its signature is wrong or expired.
pub(super) fn cdn_object(shared: &Shared, path: &str, query: &str) -> Result<CdnObject, Box<Answer>> {
    let one = |name| values(query, name).into_iter().next().unwrap_or_default();
    let expires = one("Expires");
    let signed = one("Signature") == signature(shared, path, &expires);
    let in_time = expires.parse::<u64>().is_ok_and(|end| now_s() < end);
    if !signed || !in_time {
        let body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>AccessDenied</Code></Error>";
        return Err(Box::new(answer(StatusCode::FORBIDDEN, "application/xml", body)));
    }
    let found = lock(&shared.cdn_objects).get(path).cloned();
    found.ok_or_else(|| Box::new(answer(StatusCode::NOT_FOUND, "text/plain", "not found")))
}

/// Answers HEAD or GET of a file at the CDN.
pub(super) fn cdn(shared: &Arc<Shared>, object: &CdnObject, method: &Method, headers: &HeaderMap) -> Answer {
    let entry = &object.entry;
    let mut answer = body::content(shared, &object.subject, &entry.content, method, headers);
    // Like the real CDN's, this ETag is opaque: it is not the digest of the content.
    let etag = format!("\"{}\"", &content::sha1(entry.digest().as_bytes())[..32]);
    answer.headers_mut().insert(ETAG, header(&etag));
    answer
}

fn signed_url(shared: &Shared, subject: String, entry: &Arc<Entry>) -> String {
    let subject_hash = content::sha1(subject.as_bytes());
    let (first, second) = (&subject_hash[..2], &subject_hash[2..4]);
    let path = format!("/repos/{first}/{second}/{subject_hash}/{}", entry.digest());
    let ttl_s = lock(&shared.settings).signed_url_ttl.as_secs();
    let expires = (now_s() + ttl_s).to_string();
    let signature = signature(shared, &path, &expires);
    lock(&shared.cdn_objects).insert(path.clone(), CdnObject { subject, entry: entry.clone() });
    let (external, proxy) = {
        let settings = lock(&shared.settings);
        (settings.external_cdn_url.clone(), settings.cdn_proxy_url.clone())
    };
    let cdn = proxy.unwrap_or_else(|| shared.cdn_url().to_owned());
    // With `external_cdn_url`, another server stands in for the CDN.
    let place = external.map_or_else(|| format!("{cdn}{path}"), |url| format!("{url}/{}", entry.digest()));
    format!("{place}?Expires={expires}&Signature={signature}&Key-Pair-Id=TESTKIT")
}

fn signature(shared: &Shared, path: &str, expires: &str) -> String {
    let epoch = lock(&shared.settings).signing_epoch;
    content::sha256(format!("testkit {epoch} {path} {expires}").as_bytes())
}

fn redirect(status: StatusCode, location: &str) -> Answer {
    // Do not repeat the URL in the text: tests check that no signature gets into a client's log.
    let mut answer = answer(status, "text/plain; charset=utf-8", format!("{}. Redirecting", status.as_str()));
    answer.headers_mut().insert(LOCATION, header(location));
    answer
}

/// Redirects to the same path with a counter in the query, so that every hop has a new URL.
pub(super) fn loop_back(path: &str, query: &str) -> Answer {
    let turn = values(query, "turn").first().and_then(|turn| turn.parse::<u64>().ok()).unwrap_or(0) + 1;
    redirect(StatusCode::FOUND, &format!("{path}?turn={turn}"))
}

fn is_known(headers: &HeaderMap, digest: &str) -> bool {
    let given = headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok()).unwrap_or_default();
    given.split(',').any(|tag| tag.trim().trim_start_matches("W/").trim_matches('"') == digest)
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn header(text: &str) -> HeaderValue {
    text.parse().expect("hex, digits and encoded paths are header values")
}
