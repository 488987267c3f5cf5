//! The cache: what doors call. Policy only; input and output happen in the floors below.
//!
//! [`get`](Cache::get) is the main path and reads as its seven steps in `get.rs`. What a failing tier means is decided in
//! `plan.rs`, once. Nothing here is asked of the network before it is needed: opening a cache and a warm get touch the
//! local directory only.

mod backfill;
mod counters;
mod digest_alerts;
mod durable;
mod evict;
mod fast_path;
mod fill;
mod get;
mod lease;
mod lower;
mod materialize;
mod open;
mod pin;
mod pinned;
mod plan;
mod pointer;
mod prewarm;
mod prune;
mod put;
mod queries;
mod report;
mod resolve;
mod start_jitter;
mod tag;
mod tasks;
mod verify;

pub use report::{
    Artifact, BackfillReport, BytesByTier, EvictReport, EvictTier, GetOptions, GetPlan, GetReport, Inspection, Listed,
    PendingBackfill, PinReport, Pinned, PlannedFile, PlannedPrewarm, PrewarmPlan, PutOptions, PutReport, PutTier,
    Stats, TagReport,
};

pub use durable::make_durable_for;

pub use open::{OpenFile, OpenOptions};

pub use verify::{Verification, VerifyOptions, VerifyTarget, VerifyTier};

pub use crate::disk::{
    Destination, Holder, InTheWay, KeptArtifact, Leftovers, Link, LinkMode, Materialized, Misplaced, Pin, PruneOptions,
    PruneReport, PrunedArtifact, Purpose, SyncHandoff,
};

use crate::config::{Config, RemoteMode, Secret};
use crate::disk::{Disk, Lower};
use crate::error::Result;
use crate::origin::Origins;
use crate::remote::Remote;
use crate::transfer::{Downloader, Retry};
use backfill::Backfills;
use durable::Durability;
use fill::InFlightFills;
use start_jitter::StartJitter;
use std::sync::Arc;

/// A tiered cache over one local directory. Cheap to clone; clones share everything.
#[derive(Debug, Clone)]
pub struct Cache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    disk: Disk,
    lower: Option<Lower>,
    remote: Option<Remote>,
    origins: Origins,
    downloader: Downloader,
    in_flight: InFlightFills,
    start: StartJitter,
    backfills: Backfills,
    durability: Durability,
}

impl Cache {
    /// Opens the local directory, making it if need be. Asks no network.
    pub fn open(config: Config) -> Result<Self> {
        let disk = Disk::open(&config.dir, config.max_bytes, config.min_free_bytes, config.shared)?;
        Self::over(disk, config)
    }

    /// The same cache for a caller with another token for the Hub, or with none: directory and counters are shared,
    /// fills are not, so that nobody gets by waiting what he may not read.
    pub fn with_hub_token(&self, token: Option<Secret>) -> Result<Self> {
        let mut config = self.0.config.clone();
        config.hub.token = token;
        Self::over(self.0.disk.clone(), config)
    }

    fn over(disk: Disk, config: Config) -> Result<Self> {
        let retry = Retry::new(config.retry);
        let downloader = Downloader::new(retry.clone(), config.write_mode);
        let lower = config.lower_dir.as_ref().and_then(|root| Lower::open(root, &disk));
        let remote = config.remote.as_ref().map(|remote| Remote::open(remote, retry.clone())).transpose()?;
        let remote = match config.remote_mode {
            RemoteMode::ReadWrite => remote,
            RemoteMode::ReadOnly => remote.map(Remote::read_only),
        };
        let origins = Origins::new(config.hub.clone(), config.buckets.clone(), retry)
            .with_credentials(config.credentials.clone())
            .with_mlflow(config.mlflow.clone())
            .with_oci(config.oci.clone());
        Ok(Self(Arc::new(Inner {
            config,
            disk,
            lower,
            remote,
            origins,
            downloader,
            in_flight: InFlightFills::default(),
            start: StartJitter::default(),
            backfills: Backfills::default(),
            durability: Durability::default(),
        })))
    }

    /// The configuration it was opened with.
    pub fn config(&self) -> &Config {
        &self.0.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::reference::Reference;
    use std::path::Path;

    /// Doors spawn these calls. Compiling is the test: streams must be made of collected futures, because a lazy `map`
    /// over borrowed items makes the whole call not `Send`.
    #[allow(dead_code)]
    fn calls_can_be_spawned(cache: &Cache, reference: &Reference, key: &crate::ArtifactKey, progress: &Progress) {
        fn spawnable(_: impl Future + Send) {}
        spawnable(cache.get(reference, &GetOptions::default(), progress));
        spawnable(cache.open_file(reference, &OpenOptions::default(), progress));
        spawnable(cache.plan(reference, &GetOptions::default()));
        spawnable(cache.put(key, Path::new(""), &PutOptions::default(), progress));
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
        spawnable(cache.destination(Path::new("")));
        spawnable(cache.prune(&PruneOptions::default()));
        spawnable(cache.pin(reference, Pin::default()));
        spawnable(cache.unpin(reference));
        spawnable(cache.pinned(reference, &GetOptions::default()));
        spawnable(cache.tag(key, &key.version));
        spawnable(cache.untag(key));
        spawnable(cache.scrub(1, |_| ()));
    }
}
