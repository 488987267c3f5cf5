//! The span of a request, for traces. Its fields follow the conventions of OpenTelemetry for HTTP servers
//! (<https://opentelemetry.io/docs/specs/semconv/http/http-spans/>).

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{Method, StatusCode, Uri};
use hyper::body::{Frame, SizeHint};
use modelcache::{printable, redact};
use percent_encoding::percent_decode_str;
use std::pin::Pin;
use std::task::{Context, Poll};
use tracing::Span;
use tracing::field::Empty;

/// Returns the span of a request. It continues the trace of the client if the request has a `traceparent`.
pub(crate) fn span(request: &Request, id: &str) -> Span {
    let span = tracing::debug_span!(
        "http",
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = known(request.method()),
        http.response.status_code = Empty,
        http.route = Empty,
        request.id = %redact::text(id),
        url.path = shown_path(request.uri()),
    );
    #[cfg(feature = "otel")]
    if !span.is_disabled() {
        use opentelemetry::propagation::TextMapPropagator as _;
        use tracing_opentelemetry::OpenTelemetrySpanExt as _;
        let client = opentelemetry_sdk::propagation::TraceContextPropagator::new()
            .extract(&opentelemetry_http::HeaderExtractor(request.headers()));
        // Fails if no layer for traces is installed.
        let _ = span.set_parent(client);
    }
    span
}

/// Returns the path of a request without credentials. A reference in a path is percent-encoded, and credentials in it
/// are recognised only once it is decoded.
pub(crate) fn shown_path(uri: &Uri) -> String {
    let path = printable::line(uri.path());
    let decoded = percent_decode_str(&path).decode_utf8_lossy();
    let redacted = redact::text(&decoded);
    if redacted == decoded { redact::text(&path).into_owned() } else { printable::line(&redacted).into_owned() }
}

/// Returns the name of a method of HTTP; any other word of a client becomes `_OTHER`, so that names stay few.
fn known(method: &Method) -> &str {
    match *method {
        Method::GET | Method::HEAD | Method::POST | Method::PUT | Method::DELETE | Method::PATCH | Method::OPTIONS => {
            method.as_str()
        }
        _ => "_OTHER",
    }
}

/// Returns `body`, which ends the span of its request when it was sent or its client went away.
pub(crate) fn until_sent(body: Body, span: Span) -> Body {
    if span.is_disabled() { body } else { Body::new(SpanBody { body, span }) }
}

/// A body that holds the span of its request.
struct SpanBody {
    body: Body,
    span: Span,
}

impl HttpBody for SpanBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Self { body, span } = &mut *self;
        // A fill that begins while the body is sent belongs to the request.
        let _entered = span.enter();
        Pin::new(body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for SpanBody {
    fn drop(&mut self) {
        // The end of a span in a trace is the time of its last exit, so enter and exit it now.
        self.span.in_scope(|| ());
    }
}

/// Records the response in the span of its request.
#[cfg_attr(not(feature = "otel"), expect(unused_variables, reason = "the name of the span is only for traces"))]
pub(crate) fn record(span: &Span, method: &Method, route: &str, status: StatusCode) {
    #[cfg(feature = "otel")]
    if !span.is_disabled() {
        use opentelemetry::trace::TraceContextExt as _;
        use tracing_opentelemetry::OpenTelemetrySpanExt as _;
        // Once a span has children, recording its field `otel.name` does not rename it.
        span.context().span().update_name(format!("{} {route}", known(method)));
    }
    span.record("http.route", route);
    span.record("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
}
