//! Metrics of one command, written to the file of `MODEL_CACHE_METRICS_FILE`.
//!
//! Each command replaces the file when it ends, whether it succeeded or failed. The format is the Prometheus text
//! format, for the textfile collector of node-exporter. All metrics are gauges that describe the last command, because
//! a short-lived process cannot keep counters. The file is replaced atomically. A failure to write it is logged as a
//! warning and does not fail the command.

use modelcache::ErrorKind;
use modelcache::cache::{BytesByTier, GetReport, PutReport, Stats};
use modelcache::metrics::{self, Descriptor, Sample};
use modelcache::mutex::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Permissions of the file: readable by all users, because the collector runs as another user.
const MODE: u32 = 0o644;

/// The metrics of this command so far. They are recorded during the command and written at its end.
#[derive(Debug, Default)]
pub(crate) struct CommandMetrics(Mutex<RecordedMetrics>);

#[derive(Debug, Clone, Default)]
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
        *recorded.artifacts.entry(report.from.name()).or_default() += 1;
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
    pub(crate) fn text(&self, verb: &'static str, exit_code: u8, took: Duration, stats: Option<&Stats>) -> String {
        let ended_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let command = EndedCommand { verb, exit_code, took, ended_unix, recorded: self.0.lock().clone() };
        let mut families = metrics::families(FAMILIES, &command);
        families.extend(stats.into_iter().flat_map(Stats::families));
        metrics::text(&families)
    }
}

/// The last command, from which the metrics are read.
#[derive(Debug)]
pub(crate) struct EndedCommand {
    verb: &'static str,
    exit_code: u8,
    took: Duration,
    /// Time of the end since the Unix epoch.
    ended_unix: Duration,
    recorded: RecordedMetrics,
}

/// The metrics of [`EndedCommand`].
pub(crate) const FAMILIES: &[Descriptor<EndedCommand>] = &[
    Descriptor::gauge("command", &["verb"], "1 for the verb of the last command", |command| {
        vec![Sample::labelled([command.verb], 1.0)]
    }),
    Descriptor::gauge("command_end_timestamp_seconds", &[], "Unix time at which the last command ended", |command| {
        Sample::only(command.ended_unix.as_secs_f64())
    }),
    Descriptor::gauge("command_duration_seconds", &[], "Duration of the last command", |command| {
        Sample::only(command.took.as_secs_f64())
    }),
    Descriptor::gauge("command_exit_code", &[], "Exit code of the last command", |command| {
        Sample::only(f64::from(command.exit_code))
    }),
    Descriptor::gauge(
        "command_artifacts",
        &["from"],
        "Artifacts obtained, by the farthest tier that supplied bytes",
        |EndedCommand { recorded, .. }| {
            let count = |tier| recorded.artifacts.get(tier).copied().unwrap_or_default();
            ["disk", "remote", "origin"].map(|tier| Sample::labelled([tier], count(tier) as f64)).into()
        },
    ),
    Descriptor::gauge("command_bytes", &["tier"], "Bytes by the tier that supplied them", |command| {
        let BytesByTier { disk, remote, origin } = command.recorded.bytes;
        [("disk", disk), ("remote", remote), ("origin", origin)]
            .map(|(tier, bytes)| Sample::labelled([tier], bytes as f64))
            .into()
    }),
    Descriptor::gauge("command_uploaded_bytes", &[], "Bytes written to the remote", |command| {
        Sample::only(command.recorded.uploaded_bytes as f64)
    }),
    Descriptor::gauge("command_failures", &["code"], "Failures by kind", |command| {
        command.recorded.failures.iter().map(|(code, count)| Sample::labelled([*code], *count as f64)).collect()
    }),
    Descriptor::gauge("command_phase_seconds", &["phase"], "Time spent by phase", |command| {
        command.recorded.phases.iter().map(|(phase, spent)| Sample::labelled([*phase], spent.as_secs_f64())).collect()
    }),
];

/// Replaces the file at `path` with `text`, atomically. The folder must exist, because it belongs to the collector.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".modelcache-").tempfile_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(PermissionsExt::from_mode(MODE))?;
    file.persist(path).map(|_| ()).map_err(|error| error.error)
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
