//! The span of a request, for traces. Its fields follow the conventions of OpenTelemetry for HTTP servers
//! (<https://opentelemetry.io/docs/specs/semconv/http/http-spans/>).

use axum::extract::Request;
use axum::http::{Method, StatusCode};
use modelcache::{printable, redact};
use tracing::Span;
use tracing::field::Empty;

/// Returns the span of a request. It continues the trace of the client if the request has a `traceparent`.
pub(crate) fn span(request: &Request, id: &str) -> Span {
    let span = tracing::debug_span!(
        "http",
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = %request.method(),
        http.response.status_code = Empty,
        http.route = Empty,
        request.id = id,
        url.path = %redact::text(&printable::line(request.uri().path())),
    );
    #[cfg(feature = "otel")]
    {
        use opentelemetry::propagation::TextMapPropagator as _;
        use tracing_opentelemetry::OpenTelemetrySpanExt as _;
        let client = opentelemetry_sdk::propagation::TraceContextPropagator::new()
            .extract(&opentelemetry_http::HeaderExtractor(request.headers()));
        // Fails if nobody collects traces.
        let _ = span.set_parent(client);
    }
    span
}

/// Records the response in the span of its request.
#[cfg_attr(not(feature = "otel"), expect(unused_variables, reason = "the name of the span is only for traces"))]
pub(crate) fn record(span: &Span, method: &Method, route: &str, status: StatusCode) {
    #[cfg(feature = "otel")]
    {
        use opentelemetry::trace::TraceContextExt as _;
        use tracing_opentelemetry::OpenTelemetrySpanExt as _;
        // The field `otel.name` has no effect once the span has a child.
        span.context().span().update_name(format!("{method} {route}"));
    }
    span.record("http.route", route);
    span.record("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
}
