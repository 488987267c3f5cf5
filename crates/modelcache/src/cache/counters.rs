//! Metrics of gets and puts, and gauges of the local directory.

use super::{Artifact, Cache, PutReport, Stats};
use crate::error::Result;
use crate::metrics::{self, ByTier, Descriptor, Family, GetCounts, Metrics, Sample};

impl Cache {
    /// Returns the counters since the cache was opened. All clones of the cache share them.
    pub fn metrics(&self) -> &Metrics {
        self.0.disk.metrics()
    }

    /// Adds the outcome of a get to the metrics.
    pub(super) fn count_get(&self, outcome: &Result<Artifact>) {
        match outcome {
            Ok(Artifact { report, .. }) => {
                let bytes = report.bytes;
                self.metrics().record_get(&GetCounts {
                    from: report.from,
                    bytes: ByTier { disk: bytes.disk, remote: bytes.remote, origin: bytes.origin },
                    selected_bytes: report.selected_bytes,
                    uploaded_bytes: report.backfilled_bytes,
                    copied_bytes: report.copied_bytes,
                    phases: &report.phases,
                });
            }
            Err(error) => self.metrics().record_failure(error.kind()),
        }
    }

    /// Adds the outcome of a put to the metrics.
    pub(super) fn count_put(&self, outcome: &Result<PutReport>) {
        match outcome {
            Ok(report) => self.metrics().record_put(report.uploaded_bytes, report.copied_bytes, &report.phases),
            Err(error) => self.metrics().record_failure(error.kind()),
        }
    }
}

/// Names the type of the rows below, so that the closures need no types.
type Row = Descriptor<Stats>;

/// The metrics of [`Stats`]: gauges of the local directory.
pub const DIRECTORY_FAMILIES: &[Descriptor<Stats>] = &[
    Row::gauge("directory_artifacts", &[], "Artifacts in the local directory", |stats| {
        Sample::only(stats.artifacts as f64)
    })
    .json("artifacts"),
    Row::gauge("directory_leased_artifacts", &[], "Artifacts with a lease", |stats| Sample::only(stats.leases as f64))
        .json("leases"),
    Row::gauge("directory_pinned_artifacts", &[], "Artifacts with a pin", |stats| Sample::only(stats.pins as f64))
        .json("pins"),
    Row::gauge("directory_budget_bytes", &[], "Budget of the local directory", |stats| {
        Sample::only(stats.budget_bytes as f64)
    })
    .json("budget_bytes"),
    Row::gauge("directory_used_bytes", &[], "Bytes that count against the budget", |stats| {
        Sample::only(stats.used_bytes as f64)
    })
    .json("used_bytes"),
    Row::gauge("directory_staging_bytes", &[], "Bytes of running and abandoned fills", |stats| {
        Sample::only(stats.staging_bytes as f64)
    })
    .json("staging_bytes"),
    Row::gauge("directory_quarantine_bytes", &[], "Bytes of files that failed verification", |stats| {
        Sample::only(stats.quarantine_bytes as f64)
    })
    .json("quarantine_bytes"),
    Row::gauge("directory_filesystem_free_bytes", &[], "Free bytes on the filesystem", |stats| {
        Sample::only(stats.filesystem_free_bytes as f64)
    })
    .json("filesystem_free_bytes"),
    Row::gauge("directory_min_free_bytes", &[], "Bytes on the filesystem that the cache leaves free", |stats| {
        Sample::only(stats.min_free_bytes as f64)
    })
    .json("min_free_bytes"),
    Row::gauge("directory_pending_backfills", &[], "Artifacts that have still to be uploaded to the remote", |stats| {
        Sample::only(stats.pending_backfills as f64)
    })
    .json("pending_backfills"),
    Row::gauge("directory_pending_backfill_bytes", &[], "Bytes of the files that have still to be uploaded", |stats| {
        Sample::only(stats.pending_backfill_bytes as f64)
    })
    .json("pending_backfill_bytes"),
];

impl Stats {
    /// Returns the gauges as Prometheus metric families.
    pub fn families(&self) -> Vec<Family> {
        metrics::families(DIRECTORY_FAMILIES, self)
    }
}
