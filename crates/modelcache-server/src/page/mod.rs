//! The status page at `/`: what an operator wants to see at a glance.
//!
//! The first paint has the data, so that it needs no script. The script then polls the JSON routes. The page loads
//! nothing from other servers, and every value is inserted as text.

mod template;

use crate::app::App;
use crate::native::{activity_report, metrics_report, stats_report};
use axum::extract::State;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use axum::http::{Extensions, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

const HTML: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");

/// Headers of all parts of the page. `data:` allows the empty icon, without which browsers ask for `/favicon.ico`.
const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ),
    (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
];

/// `GET /`: the status page.
pub(crate) async fn page(State(app): State<Arc<App>>, extensions: Extensions) -> Response {
    let (stats, error) = match stats_report(&app, &extensions).await {
        Ok(stats) => (stats, Value::Null),
        // If the cache directory cannot be read, show the rest of the page and this error.
        Err(error) => (Value::Null, error.fields()),
    };
    let data = json!({
        "stats": stats,
        "error": error,
        "activity": activity_report(&app),
        "metrics": metrics_report(&app),
        "doctor": app.doctor.last(),
    });
    part("text/html; charset=utf-8", template::render(HTML, &data))
}

/// `GET /page.js`: the script of the page.
pub(crate) async fn script() -> Response {
    part("text/javascript; charset=utf-8", SCRIPT)
}

/// `GET /page.css`: the style of the page.
pub(crate) async fn style() -> Response {
    part("text/css; charset=utf-8", STYLE)
}

fn part(content_type: &'static str, body: impl IntoResponse) -> Response {
    (HEADERS, [(CONTENT_TYPE, HeaderValue::from_static(content_type))], body).into_response()
}
