//! What one command did, for Prometheus: the file of `MODEL_CACHE_METRICS_FILE`.
//!
//! The file is written anew at the end of each command, whether it succeeded or not, in the text form that the textfile
//! collector of node-exporter reads. Everything in it is a gauge about the last command: a process that ends counts
//! nothing on. It appears at once and whole, and that it cannot be written is a warning, never the command's failure.

use modelcache::cache::{BytesByTier, GetReport, PutReport, Stats};
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
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Readable for the collector, which is another user.
const MODE: u32 = 0o644;

/// What happened so far in this command. Verbs note, the end writes.
#[derive(Debug, Default)]
pub(crate) struct Run(Mutex<Noted>);

#[derive(Debug, Default)]
struct Noted {
    /// Artifacts by the farthest tier that gave bytes.
    artifacts: BTreeMap<&'static str, u64>,
    failures: BTreeMap<&'static str, u64>,
    bytes: BytesByTier,
    uploaded_bytes: u64,
    phases: BTreeMap<&'static str, Duration>,
}

impl Run {
    /// An artifact was got.
    pub(crate) fn got(&self, report: &GetReport) {
        let mut noted = self.noted();
        *noted.artifacts.entry(tier_name(report.from)).or_default() += 1;
        noted.bytes.disk += report.bytes.disk;
        noted.bytes.remote += report.bytes.remote;
        noted.bytes.origin += report.bytes.origin;
        noted.uploaded_bytes += report.backfilled_bytes;
        report.phases.iter().for_each(|(phase, spent)| *noted.phases.entry(phase.name()).or_default() += *spent);
    }

    /// An artifact was put.
    pub(crate) fn put(&self, report: &PutReport) {
        let mut noted = self.noted();
        noted.uploaded_bytes += report.uploaded_bytes;
        report.phases.iter().for_each(|(phase, spent)| *noted.phases.entry(phase.name()).or_default() += *spent);
    }

    /// Something failed.
    pub(crate) fn failed(&self, kind: ErrorKind) {
        *self.noted().failures.entry(kind.name()).or_default() += 1;
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The text of the file.
    pub(crate) fn text(&self, verb: &'static str, code: u8, took: Duration, stats: Option<&Stats>) -> String {
        let noted = self.noted();
        let mut page = Page::default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let about = [(("verb", verb), 1.0)];
        page.family("command", "The last command", about);
        page.plain("command_end_timestamp_seconds", "When the last command ended", now.as_secs_f64());
        page.plain("command_duration_seconds", "How long it took", took.as_secs_f64());
        page.plain("command_exit_code", "Its exit code", f64::from(code));
        let tiers = [("disk", noted.bytes.disk), ("remote", noted.bytes.remote), ("origin", noted.bytes.origin)];
        let got = |tier: &'static str| noted.artifacts.get(tier).copied().unwrap_or_default();
        let artifacts = tiers.map(|(tier, _)| (("from", tier), got(tier) as f64));
        page.family("command_artifacts", "Artifacts got, by the farthest tier that gave bytes", artifacts);
        let bytes = tiers.map(|(tier, bytes)| (("tier", tier), bytes as f64));
        page.family("command_bytes", "Bytes by the tier that they came from", bytes);
        page.plain("command_uploaded_bytes", "Bytes written to the remote", noted.uploaded_bytes as f64);
        let failures = noted.failures.iter().map(|(code, count)| (("code", *code), *count as f64));
        page.family("command_failures", "Failures by kind", failures);
        let phases = noted.phases.iter().map(|(phase, spent)| (("phase", *phase), spent.as_secs_f64()));
        page.family("command_phase_seconds", "Time spent by phase", phases);
        if let Some(stats) = stats {
            for (name, help, value) in stats.gauges() {
                page.plain(name, help, value as f64);
            }
        }
        page.text()
    }
}

/// Puts `text` at `path`, whole or not at all. The folder must be there: it is the collector's.
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

/// The page as it comes together; every name begins with `modelcache_`.
struct Page(Registry);

impl Default for Page {
    fn default() -> Self {
        Self(Registry::with_prefix("modelcache"))
    }
}

impl Page {
    fn plain(&mut self, name: &str, help: &str, value: f64) {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        self.0.register(name, help, gauge);
    }

    /// Values told apart by one label, given as its name and value.
    fn family(
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
        // Writing to a text cannot fail.
        let _ = text::encode(&mut text, &self.0);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_and_readable_for_others() {
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
