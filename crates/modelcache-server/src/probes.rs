//! Probes, metrics for Prometheus, and the description of the API.

use crate::app::App;
use crate::header;
use crate::http_metrics::HTTP_METRICS;
use crate::prewarm::ReadinessReport;
use axum::Json;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use modelcache::metrics;
use std::sync::Arc;

/// The content type of the Prometheus text format.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Liveness: 200 as long as the process answers
#[utoipa::path(get, path = "/livez", tag = "operation", responses((status = 200, body = String)))]
pub(crate) async fn livez() -> &'static str {
    "ok\n"
}

/// Readiness: 200 once the prewarm list is on disk, 503 with the progress until then
#[utoipa::path(get, path = "/readyz", tag = "operation",
    responses((status = 200, body = ReadinessReport), (status = 503, body = ReadinessReport)))]
pub(crate) async fn readyz(State(app): State<Arc<App>>) -> Response {
    let report = app.readiness.report();
    match report.ready {
        true => Json(report).into_response(),
        false => {
            let wait = header::retry_after(Some(report.retry_after()));
            (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, wait)], Json(report)).into_response()
        }
    }
}

/// The counters for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "operation", responses((status = 200, body = String)))]
pub(crate) async fn prometheus(State(app): State<Arc<App>>) -> Response {
    let mut families = app.cache.metrics().counts().families();
    families.extend(metrics::families(HTTP_METRICS, &app.http_counts()));
    // Without the directory the counters of the process are still worth reporting.
    if let Ok(stats) = app.cache.stats().await {
        families.extend(stats.families());
    }
    let text = metrics::text(&families);
    ([(CONTENT_TYPE, HeaderValue::from_static(PROMETHEUS))], text).into_response()
}

/// This description
#[utoipa::path(get, path = "/openapi.json", tag = "operation", responses((status = 200, body = Object)))]
pub(crate) async fn description() -> Response {
    Json(crate::openapi::document()).into_response()
}
