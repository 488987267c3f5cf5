//! Counters of HTTP requests and responses.

use axum::extract::{MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::http::header::HeaderName;
use axum::middleware::Next;
use axum::response::Response;
use modelcache::metrics::{Descriptor, Histogram, Sample, Value};
use modelcache::mutex::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use tracing::Instrument as _;

use crate::app::App;
use crate::error::Failure;
use crate::header;
use crate::listen::ConnectionCounters;
use crate::trace;

/// The header with the id of a request, in requests and responses.
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over from a request.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The name of a route in metrics, if the matched path is not specific enough.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RouteName(pub(crate) &'static str);

/// The counters.
#[derive(Debug, Default)]
pub(crate) struct HttpMetrics {
    /// Requests by route and status.
    requests: Mutex<BTreeMap<(String, u16), u64>>,
    /// Times until the head of the response, by route.
    request_seconds: Mutex<BTreeMap<String, Histogram>>,
    /// Requests whose response head was not sent yet.
    in_flight: AtomicU64,
    sent_bytes: AtomicU64,
    cut_responses: AtomicU64,
}

/// A copy of the counters of the daemon.
#[derive(Debug, Clone, serde::Serialize)]
pub struct HttpCounts {
    /// True if the prewarm list is on disk.
    ready: bool,
    requests: Vec<RequestCount>,
    request_seconds: BTreeMap<String, Histogram>,
    in_flight: u64,
    sent_bytes: u64,
    cut_responses: u64,
    connections: BTreeMap<&'static str, u64>,
    connections_open: u64,
}

/// The metrics of the daemon beside those of its cache.
pub const HTTP_METRICS: &[Descriptor<HttpCounts>] = &[
    Descriptor::gauge(
        "ready",
        &[],
        "1 if every artifact of the prewarm list is on disk, so that `/readyz` answers 200; 0 otherwise",
        |counts: &HttpCounts| Sample::only(f64::from(u8::from(counts.ready))),
    )
    .json("http.ready"),
    Descriptor::counter(
        "http_requests_total",
        &["route", "status"],
        "Requests by route and status; the routes of the Hub begin with `hub_`",
        |counts: &HttpCounts| {
            let sample = |row: &RequestCount| {
                Sample::labelled([row.route.as_str(), row.status.to_string().as_str()], row.count as f64)
            };
            counts.requests.iter().map(sample).collect()
        },
    )
    .json("http.requests"),
    Descriptor::histogram(
        "http_request_seconds",
        &["route"],
        "Times from a request to the head of its response, in seconds, by route, unless the client left earlier",
        |counts: &HttpCounts| {
            let sample = |(route, histogram): (&String, &Histogram)| Sample {
                labels: vec![route.clone()],
                value: Value::Histogram(histogram.clone()),
            };
            counts.request_seconds.iter().map(sample).collect()
        },
    )
    .json("http.request_seconds"),
    Descriptor::gauge(
        "http_requests_in_flight",
        &[],
        "Requests whose response has not begun",
        |counts: &HttpCounts| Sample::only(counts.in_flight as f64),
    )
    .json("http.in_flight"),
    Descriptor::counter("http_sent_bytes_total", &[], "Bytes of files in responses", |counts: &HttpCounts| {
        Sample::only(counts.sent_bytes as f64)
    })
    .json("http.sent_bytes"),
    Descriptor::counter(
        "http_cut_responses_total",
        &[],
        "Responses that were cut because the rest of the file could not be delivered, or had wrong bytes",
        |counts: &HttpCounts| Sample::only(counts.cut_responses as f64),
    )
    .json("http.cut_responses"),
    Descriptor::gauge("http_connections_open", &[], "Open connections", |counts: &HttpCounts| {
        Sample::only(counts.connections_open as f64)
    })
    .json("http.connections_open"),
    Descriptor::counter(
        "http_connections_total",
        &["outcome"],
        "Connections that were accepted, and those that were refused, evicted or ended by a timeout",
        |counts: &HttpCounts| {
            counts.connections.iter().map(|(name, count)| Sample::labelled([*name], *count as f64)).collect()
        },
    )
    .json("http.connections"),
];

/// The number of requests of one route that were answered with one status.
#[derive(Debug, Clone, serde::Serialize)]
struct RequestCount {
    route: String,
    status: u16,
    count: u64,
}

impl HttpMetrics {
    pub(crate) fn count_sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn count_cut(&self) {
        self.cut_responses.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self, connections: &ConnectionCounters, ready: bool) -> HttpCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let requests = self.requests.lock();
        let row = |((route, status), count): (&(String, u16), &u64)| RequestCount {
            route: route.clone(),
            status: *status,
            count: *count,
        };
        HttpCounts {
            ready,
            requests: requests.iter().map(row).collect(),
            request_seconds: self.request_seconds.lock().clone(),
            in_flight: read(&self.in_flight),
            sent_bytes: read(&self.sent_bytes),
            cut_responses: read(&self.cut_responses),
            connections: connections.by_outcome(),
            connections_open: connections.open(),
        }
    }
}

/// Counts a request until its response head is ready, or until its client goes away.
struct InFlight<'a>(&'a HttpMetrics);

impl<'a> InFlight<'a> {
    fn start(metrics: &'a HttpMetrics) -> Self {
        metrics.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(metrics)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Gives each request an id, counts it and logs it.
pub(crate) async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let (method, uri) = (request.method().clone(), request.uri().clone());
    // Called only for a line that is logged.
    let path = || trace::shown_path(&uri);
    let started = Instant::now();
    let in_flight = InFlight::start(&app.http);
    let log_span = tracing::info_span!("request", id = %id);
    let trace_span = log_span.in_scope(|| trace::span(&request, &id));
    let response = next.run(request).instrument(trace_span.clone()).instrument(log_span.clone()).await;
    drop(in_flight);
    let named = response.extensions().get::<RouteName>().map(|RouteName(name)| (*name).to_owned());
    let route = named.or(route).unwrap_or_else(|| "none".into());
    let status = response.status();
    trace::record(&trace_span, &method, &route, status);
    let took = started.elapsed();
    app.http.request_seconds.lock().entry(route.clone()).or_default().observe(took.as_secs_f64());
    *app.http.requests.lock().entry((route, status.as_u16())).or_default() += 1;
    let _entered = log_span.enter();
    let ms = took.as_millis() as u64;
    let failure = response.extensions().get::<Failure>().map(|Failure(error)| error.clone());
    match &failure {
        Some(error) if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            tracing::warn!(%method, path = path(), status = status.as_u16(), ms, %error, "request failed");
            app.activity.record_error("request", error);
        }
        Some(error) => tracing::info!(%method, path = path(), status = status.as_u16(), ms, %error, "request refused"),
        None => tracing::debug!(%method, path = path(), status = status.as_u16(), ms, "request"),
    }
    let mut response = response.map(|body| trace::until_sent(body, trace_span));
    response.headers_mut().insert(X_REQUEST_ID, header::value(&id));
    response
}

/// Returns the id of a request: the one that it brings if it is harmless, or a new one.
fn request_id(request: &Request) -> String {
    let brought = request.headers().get(X_REQUEST_ID).and_then(|id| id.to_str().ok());
    let is_harmless = |id: &&str| {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte);
        !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX && id.bytes().all(is_allowed)
    };
    brought.filter(is_harmless).map_or_else(crate::random_id, str::to_owned)
}
