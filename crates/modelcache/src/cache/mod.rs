//! [`Cache`], the interface of the library for front ends. It contains the policy; `disk`, `remote`, `origin` and
//! `transfer` do the I/O.
//!
//! [`get`](Cache::get) is the main path: `get.rs` shows its seven steps. `plan.rs` decides how a failing tier affects a
//! get. Opening a cache sends no request over the network, and neither does a get of a local artifact.

mod backfill;
mod builder;
mod counters;
mod digest_alerts;
mod durable;
mod evict;
mod extract;
mod fast_path;
mod fill;
mod get;
mod hub_layout;
mod lease;
mod listing;
mod lower;
mod materialize;
mod open;
mod pin;
mod plan;
mod pointer;
mod prewarm;
mod prune;
mod put;
mod queries;
mod replaced;
mod report;
mod request;
mod resolve;
mod resolve_reference;
mod start_jitter;
mod tag;
mod tasks;
mod uncached;
mod verify;

pub use report::{
    Activity, Artifact, BackfillReport, BytesByTier, EvictReport, EvictTier, FillStatus, GetAnswer, GetOptions,
    GetPlan, GetReport, InspectedFile, Inspection, LeasedReference, ListedArtifact, PendingBackfill, PinReport,
    PlannedFile, PlannedPrewarm, PrewarmPlan, PutOptions, PutReport, PutTier, RemoteSurvey, ResolvedReference, Stats,
    TagReport,
};

pub use builder::CacheBuilder;
pub use counters::DIRECTORY_FAMILIES;

pub use open::{OpenFile, OpenOptions};
pub use request::{GetRequest, PutRequest};
pub use uncached::UncachedFile;

pub use verify::{Verification, VerifyOptions, VerifyTarget, VerifyTier};

pub use crate::disk::{
    Destination, Holder, HubLayout, KeepReason, KeptArtifact, Leftovers, Link, LinkMode, Materialized, Misplaced, Pin,
    PruneOptions, PruneReport, PrunedArtifact, Purpose, RunningFill,
};

use crate::config::{Config, RemoteMode, Secret};
use crate::disk::{Disk, Lower};
use crate::error::{Result, Tier};
use crate::origin::{HubApi, Origins};
use crate::reference::Reference;
use crate::remote::Remote;
use crate::runtime::blocking;
use crate::transfer::{Downloader, Retry};
use backfill::Backfills;
use fill::InFlightFills;
use start_jitter::StartJitter;
use std::sync::Arc;

/// A tiered cache of model artifacts: a local directory, an optional remote, and origins.
///
/// Cheap to clone. Clones share all state: in-flight fills, background uploads, pending syncs and metrics.
#[derive(Debug, Clone)]
pub struct Cache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    disk: Disk,
    lower: Option<Lower>,
    remote: Option<Remote>,
    origins: Origins,
    hub_api: HubApi,
    downloader: Downloader,
    in_flight: InFlightFills,
    start_jitter: StartJitter,
    backfills: Backfills,
}

impl Cache {
    /// Opens the cache. Creates the local directory if it does not exist, unless the configuration forbids that; then
    /// the cache is empty and read-only. Sends no request over the network.
    ///
    /// # Errors
    /// `Directory` if the local directory cannot be used; `Invalid` if the configuration of the remote is wrong.
    pub fn open(config: Config) -> Result<Self> {
        let exists = config.dir.exists(); // not below the root
        let disk = match config.create_dir || exists {
            true => Disk::open(&config.dir, config.max_bytes, config.min_free_bytes, config.shared)?,
            false => Disk::open_absent(&config.dir, config.max_bytes, config.min_free_bytes)?,
        };
        let retry = Retry::new(config.retry);
        Self::with_disk(disk, config, retry)
    }

    /// Returns a cache for a caller with another Hub token, or with none. It shares the local directory and the metrics
    /// with this cache. It does not share in-flight fills, so that joining a fill gives no access to an artifact that
    /// the caller's own token cannot read.
    pub fn with_hub_token(&self, token: Option<Secret>) -> Result<Self> {
        let mut config = self.0.config.clone();
        config.hub.token = token;
        // With the same retry policy: a host that asked one caller for a pause is left alone by all of them.
        Self::with_disk(self.0.disk.clone(), config, self.0.downloader.retry().clone())
    }

    /// Creates a cache that uses the open local directory `disk`.
    fn with_disk(disk: Disk, config: Config, retry: Retry) -> Result<Self> {
        let metrics = disk.metrics();
        let downloader = Downloader::new(retry.clone(), config.write_mode, metrics.clone());
        let lower = config.lower_dir.as_ref().and_then(|root| Lower::open(root, &disk));
        let remote = config
            .remote
            .as_ref()
            .map(|remote| Remote::open(remote, retry.counted_in(metrics, Tier::Remote)))
            .transpose()?;
        let remote = match config.remote_mode {
            RemoteMode::ReadWrite => remote,
            RemoteMode::ReadOnly => remote.map(Remote::read_only),
        };
        let origin_retry = retry.counted_in(metrics, Tier::Origin);
        let hub_api = HubApi::new(&config, origin_retry.clone());
        let origins = Origins::new(&config, origin_retry)?;
        Ok(Self(Arc::new(Inner {
            config,
            disk,
            lower,
            remote,
            origins,
            hub_api,
            downloader,
            in_flight: InFlightFills::default(),
            start_jitter: StartJitter::default(),
            backfills: Backfills::default(),
        })))
    }

    /// Runs `work` with the local directory on a thread for blocking calls.
    async fn on_disk<T: Send + 'static>(&self, work: impl FnOnce(&Disk) -> Result<T> + Send + 'static) -> Result<T> {
        let disk = self.0.disk.clone();
        blocking(move || work(&disk)).await
    }

    /// Parses a reference, as [`Reference::parse`] does. Also accepts references to the application's own origins.
    pub fn reference(&self, text: &str) -> Result<Reference> {
        self.0.origins.parse(text)
    }

    /// Returns a client for the API of the Hub.
    pub fn hub_api(&self) -> &HubApi {
        &self.0.hub_api
    }

    /// Returns the configuration of this cache.
    pub fn config(&self) -> &Config {
        &self.0.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use std::path::Path;

    /// Front ends spawn these calls, so their futures must be `Send`. Compiling is the test. A stream must be built
    /// from collected futures: a lazy `map` over borrowed items makes the whole future not `Send`.
    #[allow(dead_code)]
    fn calls_can_be_spawned(cache: &Cache, reference: &Reference, key: &crate::ArtifactKey, progress: &Progress) {
        fn spawnable(_: impl Future + Send) {}
        spawnable(cache.get_with(reference, &GetOptions::default(), progress));
        spawnable(cache.open_file(reference, &OpenOptions::default(), progress));
        spawnable(cache.open_uncached(reference, &OpenOptions::default()));
        spawnable(cache.plan(reference, &GetOptions::default()));
        spawnable(cache.manifest(reference, &GetOptions::default()));
        spawnable(cache.put_with(key, Path::new(""), &PutOptions::default(), progress));
        spawnable(cache.backfill_pending(progress));
        spawnable(cache.finish_backfills(progress));
        spawnable(cache.wait_for_fills());
        spawnable(cache.make_durable());
        spawnable(cache.evict(reference, EvictTier::All, true));
        spawnable(cache.list());
        spawnable(cache.list_remote());
        spawnable(cache.inspect(reference));
        spawnable(cache.stats());
        spawnable(cache.plan_prewarm(&[], &GetOptions::default()));
        spawnable(cache.destination(Path::new(""), LinkMode::Auto));
        spawnable(cache.prune(&PruneOptions::default()));
        spawnable(cache.pin(reference, Pin::default()));
        spawnable(cache.unpin(reference));
        spawnable(cache.resolve_reference(reference, &GetOptions::default()));
        spawnable(cache.tag(key, &key.version));
        spawnable(cache.untag(key));
        spawnable(cache.scrub(1, |_| ()));
    }
}
