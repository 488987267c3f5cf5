//! The Hub's refusals: status, `X-Error-Code`, `X-Error-Message` and a JSON body, each in one place.
//!
//! Clients act on the code, not on the status alone: a 401 without it is a generic error to them.

use hyper::StatusCode;
use hyper::header::{HeaderName, HeaderValue, RETRY_AFTER};

use crate::serve::{Answer, answer};

pub(super) const X_ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
pub(super) const X_ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");
pub(super) const X_REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");

/// An error answer; without a code the header is left out.
pub(super) fn refuse(status: StatusCode, code: Option<&'static str>, message: &str) -> Answer {
    let body = serde_json::json!({ "error": message }).to_string();
    let mut answer = answer(status, "application/json; charset=utf-8", body);
    let headers = answer.headers_mut();
    if let Some(code) = code {
        headers.insert(X_ERROR_CODE, HeaderValue::from_static(code));
    }
    // A header carries ASCII; a file name in the message may not be.
    let ascii: String = message.chars().map(|c| if c.is_ascii() && !c.is_ascii_control() { c } else { '?' }).collect();
    headers.insert(X_ERROR_MESSAGE, ascii.parse().expect("printable ASCII is a header value"));
    answer
}

/// The repo is absent, or private and the caller has no right to know better.
pub(super) fn no_repo() -> Answer {
    refuse(StatusCode::UNAUTHORIZED, Some("RepoNotFound"), "Repository not found")
}

/// The repo's files need an accepted request for access.
pub(super) fn gated(repo: &str) -> Answer {
    let message = format!("Access to {repo} is restricted and you are not in the authorized list");
    refuse(StatusCode::FORBIDDEN, Some("GatedRepo"), &message)
}

/// Neither branch, tag, pull request nor commit.
pub(super) fn no_revision(revision: &str) -> Answer {
    refuse(StatusCode::NOT_FOUND, Some("RevisionNotFound"), &format!("Invalid rev id: {revision}"))
}

/// The revision exists and has no such path; the commit lets a client remember the absence.
pub(super) fn no_entry(commit: &str) -> Answer {
    let mut answer = refuse(StatusCode::NOT_FOUND, Some("EntryNotFound"), "Entry not found");
    answer.headers_mut().insert(X_REPO_COMMIT, commit.parse().expect("a commit is hex"));
    answer
}

/// No such route.
pub(super) fn no_route() -> Answer {
    refuse(StatusCode::NOT_FOUND, None, "Sorry, we can't find the page you are looking for.")
}

/// Too many requests, said in one of the two ways the Hub has.
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
