//! What a stand-in was asked, in the order the answers began.
//!
//! A test that claims "no body was fetched twice" reads it here. An entry appears when the head of its answer is
//! ready, so a request that still hangs is not in the log, and one whose connection was dropped has status 0.

use std::sync::Mutex;

use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, RANGE, USER_AGENT};

use crate::serve::lock;

/// Which listener a request reached.
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
}

/// One request and the status it got.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The listener.
    pub place: Place,
    /// Method as on the wire.
    pub method: String,
    /// Path as on the wire, still percent-encoded.
    pub path: String,
    /// Query as on the wire, without the question mark; empty without one.
    pub query: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// The `Authorization` header, value and all.
    pub authorization: Option<String>,
    /// The `User-Agent` header.
    pub user_agent: Option<String>,
    /// Hub and CDN: the path inside the repo, decoded, if the request was for the content of a file.
    pub file: Option<String>,
    /// Status of the answer; 0 if the connection was dropped without one.
    pub status: u16,
}

impl Seen {
    /// Whether the request came with an `Authorization` header.
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

/// The requests of one stand-in.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Vec<Seen>>);

impl Log {
    pub(crate) fn push(&self, seen: Seen) {
        lock(&self.0).push(seen);
    }

    pub(crate) fn all(&self) -> Vec<Seen> {
        lock(&self.0).clone()
    }

    pub(crate) fn clear(&self) {
        lock(&self.0).clear();
    }
}
