//! The native routes below `/cache`. The reports are those of the library; docs/json.md describes their fields.

use crate::access::is_local;
use crate::activity::{LastHour, RecentError};
use crate::app::{App, HOLD_MAX};
use crate::doctor;
use crate::error::{ApiError, ApiResult};
use crate::file::FileRequest;
use crate::prewarm::ReadinessReport;
use axum::body::Body;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{Extensions, HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Json, extract};
use bytes::Bytes;
use futures::stream;
use modelcache::cache::{Artifact, EvictTier, FillStatus, GetOptions};
use modelcache::key::FilePath;
use modelcache::progress::Progress;
use modelcache::reference::Target;
use modelcache::{ArtifactKey, Error, ErrorKind, Reference, Result, Selection, Tier};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Interval of progress lines.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// The schemes whose server is part of the configuration, so that a client cannot choose it.
const CONFIGURED_SCHEMES: [&str; 2] = ["hf://", "models:/"];

/// The body of `POST /cache/artifacts`.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct GetBody {
    /// The reference, for instance `team/model@3` or `hf://org/model@main`.
    #[serde(rename = "ref")]
    reference: String,
    /// Get only files that match one of these patterns (fnmatch).
    #[serde(default)]
    include: Vec<String>,
    /// Leave out files that match one of these patterns.
    #[serde(default)]
    exclude: Vec<String>,
    /// Keep the artifact leased for this many seconds, at most a day.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 86400)]
    hold: u64,
}

/// What the daemon is doing.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct ActivityReport {
    pub(crate) daemon: DaemonReport,
    /// The fills in progress.
    #[schema(value_type = Vec<Object>)]
    pub(crate) fills: Vec<FillStatus>,
    /// The last errors, the newest first.
    pub(crate) errors: Vec<RecentError>,
    pub(crate) last_hour: LastHour,
    pub(crate) readiness: ReadinessReport,
}

/// The daemon itself.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct DaemonReport {
    pub(crate) version: &'static str,
    /// The URLs at which it is served.
    pub(crate) listen: Vec<String>,
    /// Seconds since the start.
    pub(crate) uptime_seconds: f64,
}

/// The query of the doctor.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct DoctorQuery {
    /// Return the last report if it is at most this many seconds old (300 by default, from 5 to 86400).
    #[param(maximum = 86400)]
    max_age: Option<u64>,
}

/// The query of `DELETE`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct EvictQuery {
    /// The tier to remove the artifact from: `disk`, `remote` or `all`.
    tier: Option<String>,
    /// Report what would be removed, and remove nothing.
    #[serde(default)]
    dry_run: bool,
}

/// The query of the list of artifacts.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListQuery {
    /// The tier to list: `disk` (the default) or `remote`.
    tier: Option<String>,
}

/// State of the directory, its artifacts, and the health of the tiers
#[utoipa::path(get, path = "/cache/stats", tag = "cache", responses((status = 200, body = Object), (status = 401)))]
pub(crate) async fn stats(State(app): State<Arc<App>>, extensions: Extensions) -> ApiResult<Json<Value>> {
    stats_report(&app, &extensions).await.map(Json)
}

pub(crate) async fn stats_report(app: &App, extensions: &Extensions) -> ApiResult<Value> {
    let (stats, items) = (app.cache.stats().await?, app.cache.list().await?);
    let mut report = json!(stats);
    report["tiers"] = json!(app.cache.metrics().counts().tiers);
    report["items"] = json!(items);
    hide_paths(&mut report, extensions);
    Ok(report)
}

/// The counters as JSON
#[utoipa::path(get, path = "/cache/metrics", tag = "cache", responses((status = 200, body = Object), (status = 401)))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Json<Value> {
    Json(metrics_report(&app))
}

pub(crate) fn metrics_report(app: &App) -> Value {
    let mut report = json!(app.cache.metrics().counts().answer());
    report["http"] = json!(app.http_counts());
    report
}

/// The daemon, fills in progress, recent errors, the hit rate of the last hour, and the readiness
#[utoipa::path(get, path = "/cache/activity", tag = "cache", responses((status = 200, body = ActivityReport), (status = 401)))]
pub(crate) async fn activity(State(app): State<Arc<App>>) -> Json<ActivityReport> {
    Json(activity_report(&app))
}

pub(crate) fn activity_report(app: &App) -> ActivityReport {
    ActivityReport {
        daemon: DaemonReport {
            version: env!("CARGO_PKG_VERSION"),
            listen: app.options.listen.clone(),
            uptime_seconds: app.started.elapsed().as_secs_f64(),
        },
        fills: app.fills(),
        errors: app.activity.errors(),
        last_hour: app.activity.last_hour(&app.cache.metrics().counts()),
        readiness: app.readiness.report(),
    }
}

/// The findings of the doctor on configuration, directory, credentials, remote, origins, clock and network
///
/// A run asks every tier, so that a report is used again for a while. The doctor writes nothing to the remote.
#[utoipa::path(get, path = "/cache/doctor", tag = "cache", params(DoctorQuery),
    responses((status = 200, body = Object), (status = 400), (status = 401), (status = 404)))]
pub(crate) async fn doctor(
    State(app): State<Arc<App>>,
    query: Result<Query<DoctorQuery>, extract::rejection::QueryRejection>,
) -> ApiResult<Json<Value>> {
    let Query(query) = query.map_err(bad_query)?;
    let max_age = query.max_age.map_or(doctor::MAX_AGE, Duration::from_secs);
    check_at_most("max_age", max_age, doctor::MAX_AGE_MAX, "leave it out")?;
    app.doctor.report(max_age.max(doctor::MAX_AGE_MIN)).await.map(Json)
}

/// List the artifacts on disk or on the remote
#[utoipa::path(get, path = "/cache/artifacts", tag = "cache", params(ListQuery),
    responses((status = 200, body = Object), (status = 400), (status = 401)))]
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    query: Result<Query<ListQuery>, extract::rejection::QueryRejection>,
) -> ApiResult<Response> {
    let Query(query) = query.map_err(bad_query)?;
    let artifacts = match query.tier.as_deref() {
        None | Some("disk") => app.cache.list().await?,
        Some("remote") => app.cache.list_remote().await?,
        Some(other) => return Err(bad_tier(other, "disk or remote")),
    };
    Ok(Json(json!({ "artifacts": artifacts })).into_response())
}

/// The manifest of one artifact: its files with sizes and digests, by tier
#[utoipa::path(get, path = "/cache/artifacts/{key}", tag = "cache",
    params(("key" = String, Path, description = "`name@version`, or the `reference` of a list; a slash is written %2F")),
    responses((status = 200, body = Object), (status = 400), (status = 401), (status = 403), (status = 404)))]
pub(crate) async fn inspect(
    State(app): State<Arc<App>>,
    key: Result<Path<String>, extract::rejection::PathRejection>,
    extensions: Extensions,
) -> ApiResult<Response> {
    let reference = without_own_origin(&app, app.cache.reference(&key.map_err(bad_path)?.0)?)?;
    let mut report = json!(app.cache.inspect(&reference).await?);
    hide_paths(&mut report, &extensions);
    Ok(Json(report).into_response())
}

/// Make an artifact local, and keep it leased for a while
///
/// With `Accept: application/x-ndjson` the response is a stream of lines: progress, then the report or the error.
#[utoipa::path(post, path = "/cache/artifacts", tag = "cache", request_body = GetBody,
    responses((status = 200, body = Object), (status = 400), (status = 401), (status = 403), (status = 404),
        (status = 413), (status = 415), (status = 502), (status = 503), (status = 507)))]
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    extensions: Extensions,
    body: Result<Json<GetBody>, JsonRejection>,
) -> ApiResult<Response> {
    let Json(body) = body.map_err(|rejection| {
        // Well-formed JSON of another shape is a bad request, too.
        let status = match rejection.status() {
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            status => status,
        };
        ApiError::new(status, &rejection.body_text(), "send {\"ref\": \"name@version\"} as application/json")
    })?;
    let hold = Duration::from_secs(body.hold);
    check_at_most("hold", hold, HOLD_MAX, "ask again before it ends")?;
    let reference = app.cache.reference(&body.reference)?;
    let max_tier = max_tier(&app, &reference)?;
    let selection = Selection::globs(&body.include, &body.exclude)?;
    let options = GetOptions { selection, max_tier, ..GetOptions::default() };
    let progress = Progress::new();
    let getting = {
        let (app, progress) = (app.clone(), progress.clone());
        async move {
            let artifact = app.cache.get_with(&reference, &options, &progress).await;
            let artifact = artifact.map_err(|error| without_origin(error, max_tier))?;
            let mut report = answer(&body.reference, &artifact);
            hide_paths(&mut report, &extensions);
            if !hold.is_zero() {
                app.hold(artifact, hold)?;
            }
            Ok(report)
        }
    };
    let wants_lines = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if wants_lines.contains("application/x-ndjson") {
        return Ok(progress_lines(getting, progress));
    }
    Ok(Json(getting.await?).into_response())
}

/// One file of an artifact, while it downloads if it is not on disk yet
#[utoipa::path(get, path = "/cache/artifacts/{key}/files/{path}", tag = "cache",
    params(("key" = String, Path, description = "`name@version`, or the `reference` of a list; a slash is written %2F"),
        ("path" = String, Path, description = "The path of the file in the artifact")),
    responses((status = 200, content_type = "application/octet-stream"), (status = 206), (status = 304), (status = 400),
        (status = 401), (status = 403), (status = 404), (status = 416), (status = 502), (status = 503)))]
pub(crate) async fn file(
    State(app): State<Arc<App>>,
    path: Result<Path<(String, String)>, extract::rejection::PathRejection>,
    request: Request,
) -> ApiResult<Response> {
    let Path((key, path)) = path.map_err(bad_path)?;
    let (reference, path) = (app.cache.reference(&key)?, FilePath::new(&path)?);
    let max_tier = max_tier(&app, &reference)?;
    let manifest = app.manifest(&app.cache, &reference, max_tier).await;
    let manifest = manifest.map_err(|error| without_origin(error, max_tier))?;
    let sha256 = manifest.files.get(&path).and_then(|entry| entry.sha256);
    if let Some(demanded) = reference.digest
        && ![sha256, manifest.content_digest()].contains(&Some(demanded))
    {
        let error =
            Error::corrupt(format!("sha256 {demanded} is demanded, but neither the file nor the artifact has it"));
        return Err(error.artifact(&manifest.key).hint("check where the digest came from").into());
    }
    // From here on the version is fixed, even if a tag moves.
    let reference = app.cache.reference(&manifest.key.to_string())?;
    let request = FileRequest {
        app: &app,
        cache: &app.cache,
        reference: &reference,
        manifest: &manifest,
        path: &path,
        method: request.method(),
        headers: request.headers(),
        etag: sha256.map(|sha256| format!("\"{sha256}\"")),
        max_tier,
        rewinds: true,
    };
    Ok(request.respond().await?)
}

/// Evict an artifact from the named tier
#[utoipa::path(delete, path = "/cache/artifacts/{key}", tag = "cache",
    params(("key" = String, Path, description = "`name@version`, or the `reference` of a list; a slash is written %2F"), EvictQuery),
    responses((status = 200, body = Object), (status = 400), (status = 401), (status = 403), (status = 404),
        (status = 409)))]
pub(crate) async fn evict(
    State(app): State<Arc<App>>,
    key: Result<Path<String>, extract::rejection::PathRejection>,
    query: Result<Query<EvictQuery>, extract::rejection::QueryRejection>,
) -> ApiResult<Response> {
    let reference = without_own_origin(&app, app.cache.reference(&key.map_err(bad_path)?.0)?)?;
    let Query(query) = query.map_err(bad_query)?;
    let tier = match query.tier.as_deref() {
        Some("disk") => EvictTier::Disk,
        Some("remote") => EvictTier::Remote,
        Some("all") => EvictTier::All,
        Some(other) => return Err(bad_tier(other, "disk, remote or all")),
        None => {
            let hint = "add ?tier=disk, ?tier=remote or ?tier=all";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "the tier is missing", hint));
        }
    };
    let report = app.cache.evict(&reference, tier, query.dry_run).await?;
    app.forget(&report.key);
    Ok(Json(json!(report)).into_response())
}

/// Returns the farthest tier that the daemon may contact for a client's reference. If the reference names a version at
/// a server that is not part of the configuration, as references in the output of `ls` do, that is the remote.
///
/// # Errors
/// 403 for a reference that only such a server can resolve.
fn max_tier(app: &App, reference: &Reference) -> ApiResult<Tier> {
    if may_ask_origin(app, reference) {
        return Ok(Tier::Origin);
    }
    exact_key(reference).map(|_| Tier::Remote)
}

/// Returns the reference for a look-up on disk and on the remote that does not contact a server of the client's choice.
///
/// # Errors
/// As for [`max_tier`].
fn without_own_origin(app: &App, reference: Reference) -> ApiResult<Reference> {
    if may_ask_origin(app, &reference) {
        return Ok(reference);
    }
    Ok(Reference { target: Target::Bare(exact_key(&reference)?), file: None, digest: None })
}

/// Returns the key of a reference that names a version.
fn exact_key(reference: &Reference) -> ApiResult<ArtifactKey> {
    reference.exact_key().ok_or_else(origin_refused)
}

fn may_ask_origin(app: &App, reference: &Reference) -> bool {
    app.options.allow_any_origin || has_configured_origin(reference)
}

/// Returns true if the origin of a reference is part of the configuration. A bare name that begins like a URI is the
/// key of an artifact from there.
fn has_configured_origin(reference: &Reference) -> bool {
    match reference.scheme() {
        Some(_) => CONFIGURED_SCHEMES.iter().any(|scheme| reference.to_string().starts_with(scheme)),
        None => reference.exact_key().is_some_and(|key| key.name.scheme().is_none()),
    }
}

fn origin_refused() -> ApiError {
    ApiError::new(
        StatusCode::FORBIDDEN,
        "clients of this daemon cannot choose the server of an artifact",
        "configure it as MODEL_CACHE_ORIGIN and use name@version, or start the daemon with --allow-any-origin",
    )
}

/// Returns the error of a call that was limited to `max_tier`. If the call could not ask the origin, the refusal of
/// the origin replaces `NotFound`.
fn without_origin(error: Error, max_tier: Tier) -> ApiError {
    match (error.kind(), max_tier) {
        (ErrorKind::NotFound, Tier::Disk | Tier::Remote) => origin_refused(),
        _ => error.into(),
    }
}

/// Returns the report of a get.
fn answer(reference: &str, artifact: &Artifact) -> Value {
    let mut report = json!(artifact.answer());
    report["reference"] = json!(reference);
    report
}

/// Streams progress until `getting` has ended, then its result. If the client goes away, the get is cancelled.
fn progress_lines(getting: impl Future<Output = ApiResult<Value>> + Send + 'static, progress: Progress) -> Response {
    enum Step<F> {
        Running(std::pin::Pin<Box<F>>, Progress),
        Ended,
    }
    let line = |value: Value| Bytes::from(format!("{value}\n"));
    let lines = stream::unfold(Step::Running(Box::pin(getting), progress), move |step| async move {
        let Step::Running(mut getting, progress) = step else { return None };
        let last = match tokio::time::timeout(PROGRESS_INTERVAL, &mut getting).await {
            Err(_) => {
                let now = progress.snapshot();
                let state = json!({ "progress": {
                    "phase": now.phase,
                    "done_bytes": now.done_bytes,
                    "total_bytes": now.total_bytes,
                    "remote_bytes": now.remote_bytes,
                    "origin_bytes": now.origin_bytes,
                    "retries": progress.retries().count,
                    "last_error": progress.retries().last_error,
                }});
                return Some((line(state), Step::Running(getting, progress)));
            }
            Ok(Ok(report)) => json!({ "artifact": report }),
            Ok(Err(failure)) => json!({ "error": failure.fields() }),
        };
        Some((line(last), Step::Ended))
    });
    let body = Body::from_stream(futures::StreamExt::map(lines, Ok::<_, std::convert::Infallible>));
    ([(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))], body).into_response()
}

/// Removes the paths of the local directory from a report for another machine, where they are of no use.
fn hide_paths(report: &mut Value, extensions: &Extensions) {
    if let Value::Object(fields) = report
        && !is_local(extensions)
    {
        fields.retain(|name, _| !matches!(name.as_str(), "path" | "dir" | "lower_dir" | "into"));
    }
}

/// Refuses a time in a request that is longer than `max`.
fn check_at_most(name: &str, given: Duration, max: Duration, hint: &str) -> ApiResult<()> {
    if given <= max {
        return Ok(());
    }
    let message = format!("{name} is at most {} seconds", max.as_secs());
    Err(ApiError::new(StatusCode::BAD_REQUEST, &message, hint))
}

fn bad_tier(given: &str, accepted: &str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, &format!("{given:?} is not a tier"), &format!("use {accepted}"))
}

fn bad_query(rejection: extract::rejection::QueryRejection) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, &rejection.body_text(), "see /openapi.json for the parameters")
}

fn bad_path(rejection: extract::rejection::PathRejection) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, &rejection.body_text(), "percent-encode the name as UTF-8")
}
