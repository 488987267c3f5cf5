//! Counting: what calls came to, and the state of the directory, as numbers for whoever watches.

use super::{Artifact, Cache, PutReport, Stats};
use crate::error::Result;
use crate::metrics::{ByTier, Family, Got, Metrics};

impl Cache {
    /// The counters since the cache was opened; what every clone of it did counts.
    pub fn metrics(&self) -> &Metrics {
        self.0.disk.metrics()
    }

    pub(super) fn count_get(&self, outcome: &Result<Artifact>) {
        match outcome {
            Ok(Artifact { report, .. }) => {
                let bytes = report.bytes;
                self.metrics().got(&Got {
                    from: report.from,
                    bytes: ByTier { disk: bytes.disk, remote: bytes.remote, origin: bytes.origin },
                    uploaded_bytes: report.backfilled_bytes,
                    copied_bytes: report.copied_bytes,
                    phases: &report.phases,
                });
            }
            Err(error) => self.metrics().failed(error.kind()),
        }
    }

    pub(super) fn count_put(&self, outcome: &Result<PutReport>) {
        match outcome {
            Ok(report) => self.metrics().put(report.uploaded_bytes, report.copied_bytes, &report.phases),
            Err(error) => self.metrics().failed(error.kind()),
        }
    }
}

impl Stats {
    /// Names without their prefix, meanings and values of what is measured in the directory.
    pub fn gauges(&self) -> [(&'static str, &'static str, u64); 8] {
        [
            ("directory_artifacts", "Artifacts in the local directory", self.artifacts as u64),
            ("directory_leased_artifacts", "Artifacts that somebody holds", self.leases as u64),
            ("directory_pinned_artifacts", "Artifacts that are pinned", self.pins as u64),
            ("directory_budget_bytes", "The budget", self.budget_bytes),
            ("directory_used_bytes", "What counts against it", self.used_bytes),
            ("directory_staging_bytes", "Fills in progress or left over", self.staging_bytes),
            ("directory_quarantine_bytes", "What failed a check", self.quarantine_bytes),
            ("directory_filesystem_free_bytes", "Free on the filesystem", self.filesystem_free_bytes),
        ]
    }

    /// The same as families of Prometheus.
    pub fn families(&self) -> Vec<Family> {
        self.gauges().into_iter().map(|(name, help, value)| Family::gauge(name, help, value as f64)).collect()
    }
}
