//! The list of artifacts that the daemon gets at its start and keeps leased, and the readiness that follows from it.

use crate::app::App;
use futures::StreamExt as _;
use modelcache::cache::{Artifact, GetOptions, Purpose};
use modelcache::mutex::Mutex;
use modelcache::progress::Progress;
use modelcache::{Error, Reference, Result};
use serde::Serialize;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// First and longest pause between two attempts.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Artifacts that are downloaded at the same time.
const JOBS: usize = 4;
/// Longest `Retry-After`.
const RETRY_AFTER_MAX: f64 = 60.0;

/// The state of the list.
#[derive(Debug)]
pub(crate) struct Readiness {
    started: Instant,
    items: Vec<Item>,
}

/// One artifact of the list.
#[derive(Debug)]
struct Item {
    reference: Reference,
    progress: Progress,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The leased artifact, once it is on disk.
    artifact: Option<Artifact>,
    is_filling: bool,
    error: Option<String>,
    /// Attempts that failed.
    failures: u64,
}

/// The readiness of the daemon: `/readyz`.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub(crate) struct ReadinessReport {
    /// True if every artifact of the list is on disk.
    pub(crate) ready: bool,
    pub(crate) done_bytes: u64,
    /// `null` while the size of an artifact is unknown.
    pub(crate) total_bytes: Option<u64>,
    /// The estimated seconds until all downloads are done; `null` while there is no estimate.
    pub(crate) seconds_left: Option<f64>,
    pub(crate) artifacts: Vec<ItemReport>,
}

/// One artifact of the list.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub(crate) struct ItemReport {
    pub(crate) reference: String,
    /// `waiting`, `filling`, `ready`, or `failed` until the next attempt.
    pub(crate) state: &'static str,
    pub(crate) done_bytes: u64,
    /// `null` while the size is unknown.
    pub(crate) total_bytes: Option<u64>,
    /// The error of the last attempt or request that failed.
    pub(crate) error: Option<String>,
    /// Number of requests and attempts that failed and were tried again since the start.
    pub(crate) retries: u64,
}

impl Readiness {
    pub(crate) fn new(references: &[Reference]) -> Self {
        let item = |reference: &Reference| Item {
            reference: reference.clone(),
            progress: Progress::new(),
            state: Mutex::default(),
        };
        Self { started: Instant::now(), items: references.iter().map(item).collect() }
    }

    /// Returns true if every artifact of the list is on disk.
    pub(crate) fn is_ready(&self) -> bool {
        self.items.iter().all(|item| item.state.lock().artifact.is_some())
    }

    pub(crate) fn report(&self) -> ReadinessReport {
        let artifacts: Vec<_> = self.items.iter().map(Item::report).collect();
        let ready = artifacts.iter().all(|artifact| artifact.state == "ready");
        let done_bytes = artifacts.iter().map(|artifact| artifact.done_bytes).sum();
        let total_bytes = artifacts.iter().map(|artifact| artifact.total_bytes).sum::<Option<u64>>();
        let received: u64 = self.items.iter().map(|item| item.progress.snapshot()).map(received_bytes).sum();
        let rate = received as f64 / self.started.elapsed().as_secs_f64().max(0.001);
        let left = total_bytes.filter(|_| received > 0).map(|total| total.saturating_sub(done_bytes) as f64 / rate);
        let seconds_left = if ready { Some(0.0) } else { left };
        ReadinessReport { ready, done_bytes, total_bytes, seconds_left, artifacts }
    }
}

impl ReadinessReport {
    /// Returns how long a client should wait before the next request.
    pub(crate) fn retry_after(&self) -> Duration {
        Duration::from_secs_f64(self.seconds_left.unwrap_or(5.0).clamp(1.0, RETRY_AFTER_MAX))
    }
}

fn received_bytes(now: modelcache::progress::Snapshot) -> u64 {
    now.remote_bytes + now.origin_bytes
}

impl Item {
    fn report(&self) -> ItemReport {
        let state = self.state.lock();
        let (now, retries) = (self.progress.snapshot(), self.progress.retries());
        let (name, done_bytes, total_bytes) = match &state.artifact {
            Some(artifact) => ("ready", artifact.report.selected_bytes, Some(artifact.report.selected_bytes)),
            None => {
                let name = match (state.is_filling, &state.error) {
                    (true, _) => "filling",
                    (false, Some(_)) => "failed",
                    (false, None) => "waiting",
                };
                (name, now.done_bytes, Some(now.total_bytes).filter(|total| *total > 0))
            }
        };
        let error = match &state.artifact {
            Some(_) => None,
            None => retries.last_error.or_else(|| state.error.clone()),
        };
        ItemReport {
            reference: self.reference.to_string(),
            state: name,
            done_bytes,
            total_bytes,
            error,
            retries: retries.count + state.failures,
        }
    }

    /// Gets the artifact once, unless it is on disk already.
    async fn get(&self, app: &App, options: &GetOptions) -> Result<()> {
        if self.state.lock().artifact.is_some() {
            return Ok(());
        }
        self.state.lock().is_filling = true;
        let got = app.cache.get_with(&self.reference, options, &self.progress).await;
        let mut state = self.state.lock();
        state.is_filling = false;
        match got {
            Ok(artifact) => {
                (state.artifact, state.error) = (Some(artifact), None);
                Ok(())
            }
            Err(error) => {
                state.fail(&error);
                Err(error)
            }
        }
    }
}

impl State {
    fn fail(&mut self, error: &Error) {
        (self.error, self.failures) = (Some(error.to_string()), self.failures + 1);
    }
}

/// Gets all artifacts of the list. Repeats what fails until it succeeds, or until the daemon is dropped: a missing
/// artifact may be published, and a service may recover.
pub(crate) async fn run(app: Weak<App>) {
    let mut pause = PAUSE_FIRST;
    while let Some(app) = app.upgrade().filter(|app| !app.readiness.items.is_empty()) {
        match attempt(&app).await {
            Ok(()) => return tracing::info!("all artifacts of the prewarm list are on disk"),
            Err(error) => {
                tracing::warn!(%error, pause_s = pause.as_secs(), "the prewarm list is not complete; trying again");
                app.activity.record_error("prewarm", &error);
            }
        }
        drop(app);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Plans the whole list and gets what is missing. Returns the first error, after all of the list was tried.
async fn attempt(app: &Arc<App>) -> Result<()> {
    let items = &app.readiness.items;
    let options = GetOptions { purpose: Purpose::Keep, durable: true, ..GetOptions::default() };
    let references: Vec<_> = items.iter().map(|item| item.reference.clone()).collect();
    let plan = match app.cache.plan_prewarm(&references, &options).await {
        Ok(plan) => plan,
        Err(error) => {
            items.iter().for_each(|item| item.state.lock().fail(&error));
            return Err(error);
        }
    };
    let mut first = Ok(());
    for (item, planned) in items.iter().zip(&plan.artifacts) {
        if let Err(error) = planned {
            item.state.lock().fail(error);
            first = first.and(Err(error.clone()));
        }
    }
    let mut gets = std::pin::pin!(plan.gets(JOBS, |index| items[index].get(app, &options)));
    while let Some(got) = gets.next().await {
        first = first.and(got);
    }
    first
}
