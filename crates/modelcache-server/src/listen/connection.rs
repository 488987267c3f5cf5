//! One connection, from the TLS handshake to its end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tower::ServiceExt as _;

use super::activity::{Activity, BodyFailure, Phase};
use super::body::{RequestBody, ResponseBody, WithoutLength};
use super::connections::Entry;
use super::counters::ConnectionCounters;
use super::limits::ConnectionLimits;
use super::socket::Socket;
use super::tls::Tls;

/// The scheme of the connection of a request. Handlers get it as a request extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Plain HTTP.
    Http,
    /// HTTP over TLS, terminated by this process.
    Https,
}

impl Scheme {
    /// Returns the scheme as URLs have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) router: Router,
    pub(super) tls: Option<Tls>,
    pub(super) limits: ConnectionLimits,
    pub(super) counters: Arc<ConnectionCounters>,
    /// Becomes true at shutdown.
    pub(super) stopping: watch::Receiver<bool>,
}

/// Serves a connection until it ends.
pub(super) async fn serve(
    shared: Arc<Shared>,
    stream: TcpStream,
    peer: SocketAddr,
    entry: Entry,
    activity: Arc<Activity>,
) {
    let counters = Arc::clone(&shared.counters);
    let socket = Socket::new(stream, Arc::clone(&activity), counters, shared.limits.send_timeout);
    let connection = Connection { shared, peer, entry: Arc::new(entry), activity };
    let Some(tls) = &connection.shared.tls else { return connection.http(socket, Scheme::Http).await };
    let handshake = timeout(connection.shared.limits.handshake_timeout, tls.accept(socket));
    let mut stopping = connection.shared.stopping.clone();
    let result = tokio::select! {
        result = handshake => result,
        _ = stopping.wait_for(|stopping| *stopping) => return,
    };
    match result {
        Ok(Ok(stream)) => {
            connection.activity.handshake_done();
            connection.http(stream, Scheme::Https).await;
        }
        Ok(Err(error)) => {
            connection.shared.counters.count_handshake_failure();
            tracing::debug!(%peer, %error, "TLS handshake failed");
        }
        Err(_) => {
            connection.shared.counters.count_handshake_failure();
            tracing::debug!(%peer, "TLS handshake took too long");
        }
    }
}

#[derive(Debug, Clone)]
struct Connection {
    shared: Arc<Shared>,
    peer: SocketAddr,
    entry: Arc<Entry>,
    activity: Arc<Activity>,
}

impl Connection {
    /// Serves HTTP/1.1 on a connected stream.
    async fn http(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, scheme: Scheme) {
        let limits = &self.shared.limits;
        let service = service_fn(|request| self.clone().respond(request, scheme));
        let http = http1::Builder::new()
            .max_buf_size(limits.head_bytes.max(8 << 10))
            .max_headers(limits.header_count)
            // Measured below: hyper's timeout would also end connections that are idle between two requests.
            .header_read_timeout(None)
            .serve_connection(TokioIo::new(stream), service);
        let mut http = pin!(http);
        let mut timer = pin!(sleep_until(Instant::now() + limits.head_timeout));
        let mut stopping = self.shared.stopping.clone();
        let mut stopped = false;
        loop {
            tokio::select! {
                result = &mut http => {
                    if let Err(error) = result {
                        tracing::debug!(peer = %self.peer, %error, "connection failed");
                    }
                    return;
                }
                // The timer is not reset at each change of phase. It fires early, and is set to the current deadline.
                () = &mut timer => {
                    let now = Instant::now();
                    match self.activity.deadline(limits) {
                        Some(deadline) if deadline <= now => return self.count_timeout(),
                        Some(deadline) => timer.as_mut().reset(deadline),
                        None => timer.as_mut().reset(now + limits.head_timeout.min(limits.idle_timeout)),
                    }
                }
                _ = stopping.wait_for(|stopping| *stopping), if !stopped => {
                    stopped = true;
                    if self.activity.phase() == Phase::Connected {
                        return;
                    }
                    // Ends an idle connection, and a busy one after its response.
                    http.as_mut().graceful_shutdown();
                }
            }
        }
    }

    fn count_timeout(&self) {
        if self.activity.phase() == Phase::Idle {
            self.shared.counters.count_idle_timeout();
        } else {
            self.shared.counters.count_head_timeout();
            tracing::debug!(peer = %self.peer, "no complete request head in time");
        }
    }

    /// Passes a request to the router.
    async fn respond(self, request: Request<Incoming>, scheme: Scheme) -> Result<Response<ResponseBody>, Infallible> {
        let Self { shared, peer, entry, activity } = self;
        activity.request_started();
        entry.request_started();
        let (parts, body) = request.into_parts();
        let too_large = body.size_hint().lower() > shared.limits.body_bytes;
        let body = RequestBody::new(body, Arc::clone(&activity), Arc::clone(&shared.counters), &shared.limits);
        let mut response = if too_large {
            drop(body);
            refusal_of_body(BodyFailure::TooLarge)
        } else {
            let mut request = Request::from_parts(parts, Body::new(body));
            request.extensions_mut().insert(ConnectInfo(peer));
            request.extensions_mut().insert(scheme);
            let Ok(response) = shared.router.clone().oneshot(request).await;
            response
        };
        // The handler knows only that it could not read the body.
        if let Some(failure) = activity.body_failure() {
            response = refusal_of_body(failure);
        }
        let has_length = response.extensions().get::<WithoutLength>().is_none();
        Ok(response.map(|body| ResponseBody::new(body, has_length, activity, entry)))
    }
}

/// Returns the response to a request whose body is refused.
fn refusal_of_body(failure: BodyFailure) -> Response<Body> {
    let (status, message, hint) = match failure {
        BodyFailure::TooLarge => {
            (StatusCode::PAYLOAD_TOO_LARGE, "the request body is too large", "send fewer patterns in one request")
        }
        BodyFailure::TooSlow => {
            (StatusCode::REQUEST_TIMEOUT, "the request body arrived too slowly", "check the network, and try again")
        }
    };
    let mut response = Response::new(Body::from(refusal("invalid", message, hint)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Returns the body of an error response.
fn refusal(code: &str, message: &str, hint: &str) -> String {
    format!(r#"{{"error": {{"code": "{code}", "message": "{message}", "hint": "{hint}"}}}}"#)
}

/// Tells a client of plain HTTP that there are too many connections, if its socket accepts the response at once.
pub(super) fn refuse(stream: &TcpStream) {
    let body = refusal("unavailable", "too many connections are open", "try again in a second");
    let response = format!(
        "HTTP/1.1 503 Service Unavailable\r\n{CONTENT_TYPE}: application/json\r\ncontent-length: {}\r\n\
         {RETRY_AFTER}: 1\r\n{CONNECTION}: close\r\n\r\n{body}",
        body.len(),
    );
    let _ = stream.try_write(response.as_bytes());
    // Closing a socket with unread input resets the connection, and the client may lose the response.
    let _ = stream.try_read(&mut [0; 8 << 10]);
}
