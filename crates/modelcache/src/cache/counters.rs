//! Metrics of gets and puts, and gauges of the local directory.

use super::{Artifact, Cache, PutReport, Stats};
use crate::error::Result;
use crate::metrics::{ByTier, Family, GetCounts, Metrics};

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

impl Stats {
    /// Returns the gauges of the directory: name without prefix, help text, value.
    pub fn gauges(&self) -> [(&'static str, &'static str, u64); 8] {
        [
            ("directory_artifacts", "Artifacts in the local directory", self.artifacts as u64),
            ("directory_leased_artifacts", "Artifacts with a lease", self.leases as u64),
            ("directory_pinned_artifacts", "Artifacts with a pin", self.pins as u64),
            ("directory_budget_bytes", "Budget of the local directory", self.budget_bytes),
            ("directory_used_bytes", "Bytes that count against the budget", self.used_bytes),
            ("directory_staging_bytes", "Bytes of running and abandoned fills", self.staging_bytes),
            ("directory_quarantine_bytes", "Bytes of files that failed verification", self.quarantine_bytes),
            ("directory_filesystem_free_bytes", "Free bytes on the filesystem", self.filesystem_free_bytes),
        ]
    }

    /// Returns the gauges as Prometheus metric families.
    pub fn families(&self) -> Vec<Family> {
        self.gauges().into_iter().map(|(name, help, value)| Family::gauge(name, help, value as f64)).collect()
    }
}
