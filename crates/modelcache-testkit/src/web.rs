//! A stand-in for web servers: tests define the answer for each path.
//!
//! A [`Page`] is content with or without ranges, validators, digests and length, or a redirect or error. It may require
//! a credential, or be replaced by another page during a download. All requests are logged.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, RANGE,
};
use hyper::{Method, Request, Response, StatusCode};

use crate::content::{CHUNK, Content};
use crate::log::{Log, LoggedRequest, Place};
use crate::range::{RequestedRange, parse_range};
use crate::serve::{Answer, Body, BoxError, Server, answer, bind, full, lock, serve};

/// How a server handles a `Range` header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ranges {
    /// It serves the range.
    #[default]
    Served,
    /// It sends the whole content.
    Ignored,
    /// It answers 416 to any range.
    Refused,
}

/// The answer of one path.
#[derive(Clone, Debug)]
pub struct Page {
    status: u16,
    content: Content,
    headers: Vec<(String, String)>,
    ranges: Ranges,
    without_length: bool,
    ignores_conditions: bool,
    /// Required value of `Authorization`; any other request is answered with 401.
    wants: Option<String>,
    /// Ranges that begin at this byte or later are answered with 503.
    broken_from: Option<u64>,
    /// After this many answers, the second page replaces this one.
    then: Option<(usize, Box<Page>)>,
    /// The page that gives the next answer.
    in_turn: Option<Box<Page>>,
}

impl Page {
    /// Content with a length and ranges, without further headers.
    pub fn of(content: impl Into<Content>) -> Self {
        Self {
            status: 200,
            content: content.into(),
            headers: Vec::new(),
            ranges: Ranges::Served,
            without_length: false,
            ignores_conditions: false,
            wants: None,
            broken_from: None,
            then: None,
            in_turn: None,
        }
    }

    /// A redirect with this status.
    pub fn redirect(status: u16, to: impl Into<String>) -> Self {
        Self { status, ..Self::of("moved") }.header("location", to)
    }

    /// An error with this status.
    pub fn status(status: u16) -> Self {
        Self { status, ..Self::of("refused") }
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Adds an entity tag, including its quotes.
    pub fn etag(self, etag: &str) -> Self {
        self.header("etag", etag)
    }

    /// Sets how `Range` headers are handled.
    pub fn ranges(self, ranges: Ranges) -> Self {
        Self { ranges, ..self }
    }

    /// Sends the body in chunks, without a length and without ranges.
    pub fn without_length(self) -> Self {
        Self { without_length: true, ranges: Ranges::Ignored, ..self }
    }

    /// Ignores `If-Match`.
    pub fn ignoring_conditions(self) -> Self {
        Self { ignores_conditions: true, ..self }
    }

    /// Requires exactly this `Authorization`; other requests are answered with 401.
    pub fn wanting(self, authorization: &str) -> Self {
        Self { wants: Some(authorization.to_owned()), ..self }
    }

    /// Answers 503 to ranges that begin at `byte` or later.
    pub fn broken_from(self, byte: u64) -> Self {
        Self { broken_from: Some(byte), ..self }
    }

    /// Gives the answers of this page and of `page` in turn, like two back ends of a load balancer.
    pub fn in_turn_with(self, page: Self) -> Self {
        Self { in_turn: Some(Box::new(page)), ..self }
    }

    /// Replaces this page by `page` after `answers` answers.
    pub fn then(self, answers: usize, page: Self) -> Self {
        Self { then: Some((answers, Box::new(page))), ..self }
    }
}

/// A running web server. It stops when it is dropped.
#[derive(Debug)]
pub struct Web {
    shared: Arc<Shared>,
    server: Server,
}

#[derive(Debug, Default)]
struct Shared {
    pages: Mutex<BTreeMap<String, Page>>,
    log: Log,
    body_bytes: AtomicU64,
}

impl Web {
    /// Starts a server on a free port of 127.0.0.1.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_at("127.0.0.1")
    }

    /// Starts a server on a free port of another loopback address.
    pub fn start_at(host: &str) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let handler = {
            let shared = shared.clone();
            move |request: Request<Incoming>| {
                let answer = shared.answer(&request);
                async move { Ok(answer) }
            }
        };
        let server = serve(bind((host, 0))?, handler);
        Ok(Self { shared, server })
    }

    /// Address of the server.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// The server's URL, `http://host:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// Serves `page` at `path` (as on the wire, percent-encoded).
    pub fn put(&self, path: &str, page: Page) {
        lock(&self.shared.pages).insert(path.to_owned(), page);
    }

    /// While down, every connection is closed without an answer.
    pub fn set_down(&self, down: bool) {
        self.server.set_down(down);
    }

    /// Returns all requests so far.
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.log.all()
    }

    /// Clears the request log.
    pub fn clear_log(&self) {
        self.shared.log.clear();
    }

    /// Bytes of content handed to connections.
    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn answer(self: &Arc<Self>, request: &Request<Incoming>) -> Answer {
        let mut seen = LoggedRequest::of(Place::Web, request);
        let page = self.page(request.uri().path());
        let answer = match page {
            Some(page) => self.serve(&page, request.method(), request.headers()),
            None => answer(StatusCode::NOT_FOUND, "text/html", "<html>there is nothing here</html>"),
        };
        seen.status = answer.status().as_u16();
        self.log.push(seen);
        answer
    }

    /// Returns the page at `path` and counts the answer. Moves on to the next page if this one was given often enough.
    fn page(&self, path: &str) -> Option<Page> {
        let mut pages = lock(&self.pages);
        let page = pages.get_mut(path)?;
        // This page has given all its answers.
        if let Some((0, next)) = &page.then {
            *page = Page::clone(next);
        }
        let found = page.clone();
        if let Some((left, _)) = &mut page.then {
            *left -= 1;
        }
        if let Some(next) = page.in_turn.take() {
            *page = next.in_turn_with(Page { in_turn: None, ..found.clone() });
        }
        Some(found)
    }

    fn serve(self: &Arc<Self>, page: &Page, method: &Method, headers: &HeaderMap) -> Answer {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let mut answer = if page.wants.is_some() && text(AUTHORIZATION) != page.wants.as_deref() {
            self::answer(StatusCode::UNAUTHORIZED, "text/plain", "who are you?")
        } else if page.status != 200 {
            let status = StatusCode::from_u16(page.status).expect("a status");
            self::answer(status, "text/plain", page.content.to_vec().expect("small content"))
        } else {
            self.content(page, method, text(RANGE), text(IF_MATCH))
        };
        for (name, value) in &page.headers {
            let name: HeaderName = name.parse().expect("a header's name");
            answer.headers_mut().insert(name, value.parse().expect("a header's value"));
        }
        answer
    }

    fn content(self: &Arc<Self>, page: &Page, method: &Method, range: Option<&str>, if_match: Option<&str>) -> Answer {
        // `If-Match` is compared with the page's own ETag, quotes included.
        let etag = page.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(ETAG.as_str())).map(|(_, etag)| etag);
        if !page.ignores_conditions && if_match.is_some() && if_match != etag.map(String::as_str) {
            return answer(StatusCode::PRECONDITION_FAILED, "text/plain", "");
        }
        let len = page.content.len();
        let asked = match (range, page.ranges) {
            (None, _) | (_, Ranges::Ignored) => RequestedRange::Whole,
            (Some(_), Ranges::Refused) => RequestedRange::Unsatisfiable,
            (range, Ranges::Served) => parse_range(range, len),
        };
        let (status, range) = match asked {
            RequestedRange::Whole => (StatusCode::OK, 0..len),
            RequestedRange::Part(range) if page.broken_from.is_some_and(|from| range.start >= from) => {
                return answer(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "broken");
            }
            RequestedRange::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
            RequestedRange::Unsatisfiable => {
                let mut answer = answer(StatusCode::RANGE_NOT_SATISFIABLE, "text/plain", "");
                answer.headers_mut().insert(CONTENT_RANGE, value(&format!("bytes */{len}")));
                return answer;
            }
        };
        let content_range = format!("bytes {}-{}/{len}", range.start, range.end.saturating_sub(1));
        let length = range.end - range.start;
        let body = if method == Method::HEAD { full(Bytes::new()) } else { self.body(&page.content, range) };
        let mut answer = Response::new(body);
        *answer.status_mut() = status;
        if !page.without_length {
            answer.headers_mut().insert(CONTENT_LENGTH, length.into());
        }
        if status == StatusCode::PARTIAL_CONTENT {
            answer.headers_mut().insert(CONTENT_RANGE, value(&content_range));
        }
        answer
    }

    fn body(self: &Arc<Self>, content: &Content, range: Range<u64>) -> Body {
        let (shared, content) = (self.clone(), content.clone());
        let chunks = stream::unfold(range, move |range| {
            let end = range.end.min(range.start + CHUNK);
            let chunk = (!range.is_empty()).then(|| content.read(range.start..end));
            shared.body_bytes.fetch_add(end - range.start, Ordering::SeqCst);
            async move {
                let chunk = chunk?.map(Frame::data).map_err(BoxError::from);
                Some((chunk, end..range.end))
            }
        });
        StreamBody::new(chunks).boxed_unsync()
    }
}

fn value(text: &str) -> HeaderValue {
    text.parse().expect("digits are a header's value")
}
