//! Metrics of one command, written to the file of `MODEL_CACHE_METRICS_FILE`.
//!
//! Each command replaces the file when it ends, whether it succeeded or failed. The format is the Prometheus text
//! format, for the textfile collector of node-exporter. All metrics are gauges that describe the last command, because
//! a short-lived process cannot keep counters. The file is replaced atomically. A failure to write it is logged as a
//! warning and does not fail the command.

use modelcache::cache::{BytesByTier, GetReport, PutReport, Stats};
use modelcache::mutex::Mutex;
use modelcache::{ErrorKind, Tier};
use prometheus_client::encoding::text;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::io;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Permissions of the file: readable by all users, because the collector runs as another user.
const MODE: u32 = 0o644;

/// The metrics of this command so far. They are recorded during the command and written at its end.
#[derive(Debug, Default)]
pub(crate) struct CommandMetrics(Mutex<RecordedMetrics>);

#[derive(Debug, Default)]
struct RecordedMetrics {
    /// Artifacts by the farthest tier that bytes were read from.
    artifacts: BTreeMap<&'static str, u64>,
    failures: BTreeMap<&'static str, u64>,
    bytes: BytesByTier,
    uploaded_bytes: u64,
    phases: BTreeMap<&'static str, Duration>,
}

impl CommandMetrics {
    /// Records a completed get.
    pub(crate) fn record_get(&self, report: &GetReport) {
        let mut recorded = self.0.lock();
        *recorded.artifacts.entry(tier_name(report.from)).or_default() += 1;
        recorded.bytes.disk += report.bytes.disk;
        recorded.bytes.remote += report.bytes.remote;
        recorded.bytes.origin += report.bytes.origin;
        recorded.uploaded_bytes += report.backfilled_bytes;
        report.phases.iter().for_each(|(phase, spent)| *recorded.phases.entry(phase.name()).or_default() += *spent);
    }

    /// Records a completed put.
    pub(crate) fn record_put(&self, report: &PutReport) {
        let mut recorded = self.0.lock();
        recorded.uploaded_bytes += report.uploaded_bytes;
        report.phases.iter().for_each(|(phase, spent)| *recorded.phases.entry(phase.name()).or_default() += *spent);
    }

    /// Records a failure of `kind`.
    pub(crate) fn record_failure(&self, kind: ErrorKind) {
        *self.0.lock().failures.entry(kind.name()).or_default() += 1;
    }

    /// Returns the content of the metrics file.
    pub(crate) fn text(&self, verb: &'static str, code: u8, took: Duration, stats: Option<&Stats>) -> String {
        let recorded = self.0.lock();
        let mut page = Page::default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        page.labelled_gauge("command", "The last command", [(("verb", verb), 1.0)]);
        page.gauge("command_end_timestamp_seconds", "End of the last command (Unix time)", now.as_secs_f64());
        page.gauge("command_duration_seconds", "Duration of the last command in seconds", took.as_secs_f64());
        page.gauge("command_exit_code", "Exit code of the last command", f64::from(code));
        let tiers =
            [("disk", recorded.bytes.disk), ("remote", recorded.bytes.remote), ("origin", recorded.bytes.origin)];
        let count = |tier: &'static str| recorded.artifacts.get(tier).copied().unwrap_or_default();
        let artifacts = tiers.map(|(tier, _)| (("from", tier), count(tier) as f64));
        page.labelled_gauge("command_artifacts", "Artifacts by the farthest tier that bytes were read from", artifacts);
        let bytes = tiers.map(|(tier, bytes)| (("tier", tier), bytes as f64));
        page.labelled_gauge("command_bytes", "Bytes read, by tier", bytes);
        page.gauge("command_uploaded_bytes", "Bytes written to the remote", recorded.uploaded_bytes as f64);
        let failures = recorded.failures.iter().map(|(code, count)| (("code", *code), *count as f64));
        page.labelled_gauge("command_failures", "Failures by kind", failures);
        let phases = recorded.phases.iter().map(|(phase, spent)| (("phase", *phase), spent.as_secs_f64()));
        page.labelled_gauge("command_phase_seconds", "Time spent by phase", phases);
        if let Some(stats) = stats {
            for (name, help, value) in stats.gauges() {
                page.gauge(name, help, value as f64);
            }
        }
        page.text()
    }
}

/// Replaces the file at `path` with `text`, atomically. The folder must exist, because it belongs to the collector.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".modelcache-").tempfile_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(PermissionsExt::from_mode(MODE))?;
    file.persist(path).map(|_| ()).map_err(|error| error.error)
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Disk => "disk",
        Tier::Remote => "remote",
        Tier::Origin => "origin",
    }
}

/// A page of metrics. Every name begins with `modelcache_`.
struct Page(Registry);

impl Default for Page {
    fn default() -> Self {
        Self(Registry::with_prefix("modelcache"))
    }
}

impl Page {
    /// Adds a gauge without labels.
    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        self.0.register(name, help, gauge);
    }

    /// Adds a gauge with one label. Each value comes with the label's name and value.
    fn labelled_gauge(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ((&'static str, &'static str), f64)>,
    ) {
        let family = Family::<[(&'static str, &'static str); 1], Gauge<f64, AtomicU64>>::default();
        for (label, value) in values {
            family.get_or_create(&[label]).set(value);
        }
        self.0.register(name, help, family);
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a `String` cannot fail.
        let _ = text::encode(&mut text, &self.0);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_atomically_and_readable_by_others() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("modelcache.prom");
        write(&path, "old").expect("written");
        write(&path, "new").expect("written again");
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "new");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, MODE);
        assert_eq!(std::fs::read_dir(folder.path()).expect("list").count(), 1, "nothing left over");
        assert!(write(&folder.path().join("absent/x.prom"), "").is_err());
    }
}
