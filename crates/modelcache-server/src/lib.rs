//! The HTTP daemon of modelcache: native routes, a Hugging Face endpoint, probes, metrics and a status page.
//!
//! [`router`] returns the routes as an [`axum::Router`]; [`serve`] serves them on sockets, with limits. The daemon has
//! no state of its own: everything lasting is in the cache directory, so that it may be killed at any moment.

mod access;
mod activity;
mod app;
mod body;
mod doctor;
mod error;
mod file;
mod header;
mod http_metrics;
mod hub;
mod listen;
mod native;
mod openapi;
mod page;
mod prewarm;
mod probes;
mod range;
mod trace;

pub use app::Options;
pub use doctor::DoctorRun;
pub use http_metrics::{HTTP_METRICS, HttpCounts};
pub use listen::{
    ConnectionCounters, ConnectionLimits, Listeners, Notifier, Scheme, ServeOptions, TlsFiles, serve, watchdog_time,
};
pub use openapi::{document as openapi_document, page as openapi_page};

use app::App;
use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use modelcache::config::{Backfill, RemoteMode};
use modelcache::progress::Progress;
use modelcache::{Cache, Config};
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::Arc;
use std::time::Duration;

/// Interval at which uploads that failed or were left behind are tried again.
const UPLOADS_INTERVAL: Duration = Duration::from_secs(60);

/// A daemon over one cache. Its background tasks end when its last clone and its last router are dropped.
#[derive(Clone)]
pub struct Daemon(Arc<App>);

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("dir", &self.0.cache.config().dir).finish_non_exhaustive()
    }
}

/// Completes the configuration of a cache that a daemon will serve: uploads in the background, no requests to
/// link-local addresses, and a mark in requests to the Hub by which the daemon recognises its own.
pub fn complete_config(config: &mut Config) {
    config.backfill.get_or_insert(Backfill::Background);
    config.refuse_link_local = true;
    config.hub.via = Some(format!("1.1 modelcache-{}", random_id()));
}

/// Returns 16 random hex digits.
fn random_id() -> String {
    let mut bytes = [0; 8];
    // Without random bytes, all ids are zero. Then the log cannot distinguish requests, and a daemon that is the
    // Hub endpoint of another daemon takes the requests of that daemon for its own. It reports a loop, and nothing is
    // lost.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    hex::encode(bytes)
}

/// Returns all routes of a daemon over `cache`, and starts its background tasks in the present Tokio runtime.
pub fn router(cache: Cache, options: Options) -> Router {
    Daemon::start(cache, options).router()
}

impl Daemon {
    /// Starts the background tasks of a daemon in the present Tokio runtime. `cache` should have a configuration from
    /// [`complete_config`].
    pub fn start(cache: Cache, options: Options) -> Self {
        let app = App::new(cache, options);
        tokio::spawn(prewarm::run(Arc::downgrade(&app)));
        let weak = Arc::downgrade(&app);
        tokio::spawn(async move {
            while let Some(app) = weak.upgrade() {
                app.activity.sample(&app.cache.metrics().counts());
                drop(app);
                tokio::time::sleep(activity::SAMPLE_INTERVAL).await;
            }
        });
        let weak = Arc::downgrade(&app);
        tokio::spawn(async move {
            while let Some(cache) = weak.upgrade().map(|app| app.cache.clone()) {
                complete_uploads(&cache).await;
                tokio::time::sleep(UPLOADS_INTERVAL).await;
            }
        });
        Self(app)
    }

    /// Returns all routes.
    pub fn router(&self) -> Router {
        let app = &self.0;
        let guarded = Router::new()
            .route("/", get(page::page))
            .route("/page.js", get(page::script))
            .route("/page.css", get(page::style))
            .route("/cache/stats", get(native::stats))
            .route("/cache/metrics", get(native::metrics))
            .route("/cache/activity", get(native::activity))
            .route("/cache/doctor", get(native::doctor))
            .route("/cache/artifacts", get(native::list).merge(post(native::get)))
            .route("/cache/artifacts/{key}", get(native::inspect).delete(native::evict))
            .route("/cache/artifacts/{key}/files/{*path}", get(native::file));
        let metrics = Router::new().route("/metrics", get(probes::prometheus));
        let (guarded, free) = match app.options.has_admin_listener {
            true => (guarded.merge(metrics), Router::new()),
            false => (guarded, metrics),
        };
        let guarded = guarded.layer(from_fn_with_state(app.clone(), access::guard));
        let free = free.merge(probe_routes()).route("/openapi.json", get(probes::description));
        let routes = guarded.merge(free).fallback(hub::handle);
        routes.layer(from_fn_with_state(app.clone(), http_metrics::observe)).with_state(app.clone())
    }

    /// Returns the counters of connections, for [`ServeOptions`].
    pub fn connection_counters(&self) -> Arc<ConnectionCounters> {
        self.0.connections.clone()
    }

    /// Returns the routes of an address for operators: probes and metrics, without a token.
    pub fn admin_router(&self) -> Router {
        let app = &self.0;
        let routes = probe_routes().route("/metrics", get(probes::prometheus));
        routes.layer(from_fn_with_state(app.clone(), http_metrics::observe)).with_state(app.clone())
    }
}

/// Completes uploads that failed while the remote was down, or that an earlier process left behind.
async fn complete_uploads(cache: &Cache) {
    let is_writable = cache.config().remote.is_some() && cache.config().remote_mode == RemoteMode::ReadWrite;
    let is_pending = || async { cache.pending_backfills().await.is_ok_and(|pending| !pending.is_empty()) };
    if is_writable
        && is_pending().await
        && let Err(error) = cache.backfill_pending(&Progress::new()).await
    {
        tracing::debug!(%error, "pending uploads cannot be completed yet");
    }
}

fn probe_routes() -> Router<Arc<App>> {
    Router::new().route("/livez", get(probes::livez)).route("/readyz", get(probes::readyz))
}
