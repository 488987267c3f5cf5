//! Request log of a stand-in, in the order in which answers began.
//!
//! Tests read it to prove claims such as "no body was fetched twice". An entry is added when the head of its answer is
//! ready: a request that still hangs has no entry, and one without an answer has status 0.

use std::sync::Mutex;

use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, RANGE, USER_AGENT};

use crate::serve::lock;

/// The listener that received a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The Hub itself.
    Hub,
    /// The host that LFS files are redirected to.
    Cdn,
    /// The S3 server.
    S3,
    /// A web server.
    Web,
    /// A gate in front of another server.
    Gate,
}

/// One request and the status of its answer.
#[derive(Clone, Debug)]
pub struct LoggedRequest {
    /// The listener that received it.
    pub place: Place,
    /// Method as on the wire.
    pub method: String,
    /// Path as on the wire, still percent-encoded.
    pub path: String,
    /// Query as on the wire, without the question mark. Empty if there is none.
    pub query: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// The `Authorization` header with its value.
    pub authorization: Option<String>,
    /// The `User-Agent` header.
    pub user_agent: Option<String>,
    /// Hub and CDN: decoded path in the repo, if the request was for file content. S3: decoded key.
    pub file: Option<String>,
    /// Status of the answer, or 0 if the connection was dropped without one.
    pub status: u16,
}

impl LoggedRequest {
    /// Returns true if the request had an `Authorization` header.
    pub fn authorized(&self) -> bool {
        self.authorization.is_some()
    }

    pub(crate) fn of<B>(place: Place, request: &hyper::Request<B>) -> Self {
        let headers = request.headers();
        Self {
            place,
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
            query: request.uri().query().unwrap_or_default().to_owned(),
            range: text(headers, &RANGE),
            authorization: text(headers, &AUTHORIZATION),
            user_agent: text(headers, &USER_AGENT),
            file: None,
            status: 0,
        }
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// All requests to one stand-in.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Vec<LoggedRequest>>);

impl Log {
    pub(crate) fn push(&self, seen: LoggedRequest) {
        lock(&self.0).push(seen);
    }

    pub(crate) fn all(&self) -> Vec<LoggedRequest> {
        lock(&self.0).clone()
    }

    pub(crate) fn clear(&self) {
        lock(&self.0).clear();
    }
}
