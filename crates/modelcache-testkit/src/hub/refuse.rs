//! The Hub's error answers: status, `X-Error-Code`, `X-Error-Message` and a JSON body.
//!
//! Clients act on the error code, not only on the status: to them a 401 without a code is a generic error.

use hyper::StatusCode;
use hyper::header::{HeaderName, HeaderValue, RETRY_AFTER};

use crate::serve::{Answer, answer};

pub(super) const X_ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
pub(super) const X_ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");
pub(super) const X_REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");

/// Builds an error answer. Without a code, the `X-Error-Code` header is left out.
pub(super) fn refuse(status: StatusCode, code: Option<&'static str>, message: &str) -> Answer {
    let body = serde_json::json!({ "error": message }).to_string();
    let mut answer = answer(status, "application/json; charset=utf-8", body);
    let headers = answer.headers_mut();
    if let Some(code) = code {
        headers.insert(X_ERROR_CODE, HeaderValue::from_static(code));
    }
    // Header values must be ASCII; a file name in the message may contain other characters.
    let ascii: String = message.chars().map(|c| if c.is_ascii() && !c.is_ascii_control() { c } else { '?' }).collect();
    headers.insert(X_ERROR_MESSAGE, ascii.parse().expect("printable ASCII is a header value"));
    answer
}

/// The repo does not exist, or it is private and the token may not read it.
pub(super) fn no_repo() -> Answer {
    refuse(StatusCode::UNAUTHORIZED, Some("RepoNotFound"), "Repository not found")
}

/// The files of the repo need an access request that was accepted.
pub(super) fn gated(repo: &str) -> Answer {
    let message = format!("Access to {repo} is restricted and you are not in the authorized list");
    refuse(StatusCode::FORBIDDEN, Some("GatedRepo"), &message)
}

/// The revision is no branch, tag, pull request or commit.
pub(super) fn no_revision(revision: &str) -> Answer {
    refuse(StatusCode::NOT_FOUND, Some("RevisionNotFound"), &format!("Invalid rev id: {revision}"))
}

/// The revision exists but has no such path. The answer names the commit, so that a client can cache the absence.
pub(super) fn no_entry(commit: &str) -> Answer {
    let mut answer = refuse(StatusCode::NOT_FOUND, Some("EntryNotFound"), "Entry not found");
    answer.headers_mut().insert(X_REPO_COMMIT, commit.parse().expect("a commit is hex"));
    answer
}

/// The route does not exist.
pub(super) fn no_route() -> Answer {
    refuse(StatusCode::NOT_FOUND, None, "Sorry, we can't find the page you are looking for.")
}

/// 429 with the waiting time in the `RateLimit` or the `Retry-After` header; the real Hub uses both forms.
pub(super) fn throttled(seconds: u64, by_rate_limit: bool) -> Answer {
    let mut answer = refuse(StatusCode::TOO_MANY_REQUESTS, None, "We had to rate limit you");
    let headers = answer.headers_mut();
    if by_rate_limit {
        let value = format!("\"resolvers\";r=0;t={seconds}");
        headers.insert(HeaderName::from_static("ratelimit"), value.parse().expect("digits are a header value"));
    } else {
        headers.insert(RETRY_AFTER, seconds.into());
    }
    answer
}
