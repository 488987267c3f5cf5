//! Metrics of a cache since it was opened. All front ends derive their numbers from these counters.
//!
//! One lock protects all counters; readers get a copy. The counters are kept in memory only, and end with the process.

use crate::error::{ErrorKind, Result, Tier};
use crate::mutex::Mutex;
use crate::progress::Phase;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The counters of one cache. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Mutex<Counts>>);

/// A copy of the counters.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Successful gets, by the farthest tier that supplied bytes. A get that joined another fill does not count as a
    /// hit on disk.
    pub hits: ByTier,
    /// Gets for which not all selected files were on disk.
    pub misses: u64,
    /// The misses that waited for the fill of another caller or process.
    pub waits: Waits,
    /// Bytes by the tier that supplied them. Bytes from tier disk were not downloaded.
    pub bytes: ByTier,
    /// Successful puts.
    pub puts: u64,
    /// Bytes uploaded to the remote.
    pub uploaded_bytes: u64,
    /// Bytes that the object store copied, so that they needed no upload.
    pub copied_bytes: u64,
    /// Artifacts that were evicted to make room on disk.
    pub evictions: Evictions,
    /// Failed gets and puts, by error kind. A kind that has not occurred is absent.
    pub failures: BTreeMap<&'static str, u64>,
    /// Seconds spent in gets and puts, by phase.
    pub phase_seconds: BTreeMap<&'static str, f64>,
    /// The health of each tier at the last request to it. A tier that was never requested is absent.
    pub tiers: BTreeMap<&'static str, Health>,
}

/// The health of a tier at the last request to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Health {
    /// True if the tier answered, even with `NotFound`.
    pub up: bool,
    /// Time of the request, in seconds since the Unix epoch.
    pub asked_unix: u64,
    /// The error, if the tier did not answer.
    pub error: Option<String>,
}

/// One number for each tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ByTier {
    /// The local directory.
    pub disk: u64,
    /// The object store.
    pub remote: u64,
    /// The origins.
    pub origin: u64,
}

/// Gets that waited for the fill of another caller or process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Waits {
    /// Number of gets.
    pub count: u64,
    /// Total waiting time in seconds.
    pub seconds: f64,
}

/// Artifacts that were evicted to make room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Evictions {
    /// Number of artifacts.
    pub count: u64,
    /// Bytes freed.
    pub bytes: u64,
}

/// The numbers that one successful get adds to the counters.
#[derive(Debug)]
pub(crate) struct GetCounts<'a> {
    pub(crate) from: Tier,
    pub(crate) bytes: ByTier,
    pub(crate) uploaded_bytes: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) phases: &'a BTreeMap<Phase, Duration>,
}

impl Metrics {
    /// Returns a copy of the counters.
    pub fn counts(&self) -> Counts {
        self.0.lock().clone()
    }

    /// Counts one successful get.
    pub(crate) fn record_get(&self, got: &GetCounts<'_>) {
        let mut counts = self.0.lock();
        // A get that joined another fill received no bytes itself, so `from` is the disk. It is a miss nevertheless.
        let waited = got.phases.get(&Phase::Join).copied();
        counts.hits.add(got.from, u64::from(got.from != Tier::Disk || waited.is_none()));
        counts.misses += u64::from(got.from != Tier::Disk || waited.is_some());
        if let Some(waited) = waited {
            counts.waits.count += 1;
            counts.waits.seconds += waited.as_secs_f64();
        }
        counts.bytes.disk += got.bytes.disk;
        counts.bytes.remote += got.bytes.remote;
        counts.bytes.origin += got.bytes.origin;
        counts.uploaded_bytes += got.uploaded_bytes;
        counts.copied_bytes += got.copied_bytes;
        counts.add_phases(got.phases);
    }

    /// Counts one successful put.
    pub(crate) fn record_put(&self, uploaded_bytes: u64, copied_bytes: u64, phases: &BTreeMap<Phase, Duration>) {
        let mut counts = self.0.lock();
        counts.puts += 1;
        counts.uploaded_bytes += uploaded_bytes;
        counts.copied_bytes += copied_bytes;
        counts.add_phases(phases);
    }

    /// Counts bytes uploaded in the background, which are part of no get and no put.
    pub(crate) fn record_background_upload(&self, uploaded_bytes: u64, copied_bytes: u64) {
        let mut counts = self.0.lock();
        counts.uploaded_bytes += uploaded_bytes;
        counts.copied_bytes += copied_bytes;
    }

    /// Counts one artifact that was evicted to make room, and freed `bytes`.
    pub(crate) fn record_eviction(&self, bytes: u64) {
        let mut counts = self.0.lock();
        counts.evictions.count += 1;
        counts.evictions.bytes += bytes;
    }

    /// Counts a failed get or put.
    pub(crate) fn record_failure(&self, kind: ErrorKind) {
        *self.0.lock().failures.entry(kind.name()).or_default() += 1;
    }

    /// Records the health of a tier after a request. The tier is down if it was unavailable or refused the credentials.
    /// It is up after any other error, such as `NotFound`, because it answered.
    pub(crate) fn record_health<T>(&self, tier: Tier, outcome: &Result<T>) {
        let error = match outcome {
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unauthorized) => {
                Some(error.to_string())
            }
            _ => None,
        };
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let health = Health { up: error.is_none(), asked_unix: since_epoch.as_secs(), error };
        self.0.lock().tiers.insert(tier.name(), health);
    }
}

impl ByTier {
    fn add(&mut self, tier: Tier, number: u64) {
        *match tier {
            Tier::Disk => &mut self.disk,
            Tier::Remote => &mut self.remote,
            Tier::Origin => &mut self.origin,
        } += number;
    }

    /// Returns one sample for each tier, with the tier as the value of `label`.
    fn samples(self, label: &'static str) -> Vec<Sample> {
        let numbers = [("disk", self.disk), ("remote", self.remote), ("origin", self.origin)];
        numbers.map(|(tier, value)| Sample { label: Some((label, tier.into())), value: value as f64 }).into()
    }
}

impl Counts {
    /// Returns the fraction of successful gets that were hits on disk; `None` before the first get.
    pub fn hit_rate(&self) -> Option<f64> {
        let gets = self.hits.disk + self.misses;
        (gets > 0).then(|| self.hits.disk as f64 / gets as f64)
    }

    /// Adds the durations of the phases of one call.
    fn add_phases(&mut self, phases: &BTreeMap<Phase, Duration>) {
        for (phase, spent) in phases {
            *self.phase_seconds.entry(phase.name()).or_default() += spent.as_secs_f64();
        }
    }

    /// Returns the counters as Prometheus metric families.
    pub fn families(&self) -> Vec<Family> {
        let failure = |(code, count): (&&'static str, &u64)| Sample {
            label: Some(("code", (*code).into())),
            value: *count as f64,
        };
        let up = |(tier, health): (&&'static str, &Health)| Sample {
            label: Some(("tier", (*tier).into())),
            value: f64::from(u8::from(health.up)),
        };
        let phase = |(phase, seconds): (&&'static str, &f64)| Sample {
            label: Some(("phase", (*phase).into())),
            value: *seconds,
        };
        vec![
            Family::counter("gets", "Gets by the farthest tier that supplied bytes", self.hits.samples("from")),
            Family::unlabelled("misses", "Gets for which not all files were on disk", self.misses as f64),
            Family::unlabelled("waits", "Gets that waited for the fill of another caller", self.waits.count as f64),
            Family::unlabelled("wait_seconds", "Seconds for which gets waited for another fill", self.waits.seconds),
            Family::counter("bytes", "Bytes by the tier that supplied them", self.bytes.samples("tier")),
            Family::unlabelled("puts", "Artifacts published by put", self.puts as f64),
            Family::unlabelled("uploaded_bytes", "Bytes uploaded to the remote", self.uploaded_bytes as f64),
            Family::unlabelled("copied_bytes", "Bytes copied by the object store", self.copied_bytes as f64),
            Family::unlabelled("evictions", "Artifacts evicted to make room", self.evictions.count as f64),
            Family::unlabelled("evicted_bytes", "Bytes freed by evictions", self.evictions.bytes as f64),
            Family::counter(
                "failures",
                "Failed gets and puts, by error kind",
                self.failures.iter().map(failure).collect(),
            ),
            Family::counter(
                "phase_seconds",
                "Seconds spent in gets and puts, by phase",
                self.phase_seconds.iter().map(phase).collect(),
            ),
            Family {
                is_counter: false,
                ..Family::counter(
                    "tier_up",
                    "Whether a tier answered the last request",
                    self.tiers.iter().map(up).collect(),
                )
            },
        ]
    }
}

/// A Prometheus metric family: all samples of one metric name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Family {
    /// The metric name with the prefix `modelcache_`, without the suffix `_total`.
    pub name: String,
    /// The help text.
    pub help: &'static str,
    /// True for a counter, false for a gauge.
    pub is_counter: bool,
    /// The samples.
    pub samples: Vec<Sample>,
}

/// One sample of a [`Family`], with at most one label.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// Name and value of the label.
    pub label: Option<(&'static str, String)>,
    /// The value of the sample.
    pub value: f64,
}

impl Family {
    /// Returns a gauge without a label.
    pub fn gauge(name: &str, help: &'static str, value: f64) -> Self {
        Self { is_counter: false, ..Self::unlabelled(name, help, value) }
    }

    /// Returns a counter without a label.
    fn unlabelled(name: &str, help: &'static str, value: f64) -> Self {
        Self::counter(name, help, vec![Sample { label: None, value }])
    }

    /// Returns a counter with these samples.
    fn counter(name: &str, help: &'static str, samples: Vec<Sample>) -> Self {
        Self { name: format!("modelcache_{name}"), help, is_counter: true, samples }
    }
}

/// Formats metric families in the Prometheus text format, version 0.0.4.
pub fn text(families: &[Family]) -> String {
    let mut text = String::new();
    for Family { name, help, is_counter, samples } in families {
        let (kind, total) = if *is_counter { ("counter", "_total") } else { ("gauge", "") };
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "# HELP {name}{total} {help}.\n# TYPE {name}{total} {kind}");
        for Sample { label, value } in samples {
            let _ = match label {
                None => writeln!(text, "{name}{total} {value}"),
                Some((label, tag)) => writeln!(text, "{name}{total}{{{label}=\"{tag}\"}} {value}"),
            };
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn got(metrics: &Metrics, from: Tier, waited: Option<Duration>) {
        let phases: BTreeMap<_, _> = waited.map(|waited| (Phase::Join, waited)).into_iter().collect();
        let bytes = ByTier { remote: 5, ..ByTier::default() };
        metrics.record_get(&GetCounts { from, bytes, uploaded_bytes: 2, copied_bytes: 0, phases: &phases });
    }

    #[test]
    fn a_get_that_waited_for_another_fill_is_a_miss() {
        let metrics = Metrics::default();
        assert_eq!(metrics.counts().hit_rate(), None);
        got(&metrics, Tier::Disk, None);
        got(&metrics, Tier::Disk, Some(Duration::from_millis(1500)));
        got(&metrics, Tier::Remote, None);
        got(&metrics, Tier::Origin, None);
        let counts = metrics.counts();
        assert_eq!(counts.hits, ByTier { disk: 1, remote: 1, origin: 1 });
        assert_eq!((counts.misses, counts.hit_rate()), (3, Some(0.25)));
        assert_eq!(counts.waits, Waits { count: 1, seconds: 1.5 });
        assert_eq!(counts.bytes.remote, 20);
        assert_eq!((counts.uploaded_bytes, counts.phase_seconds["join"]), (8, 1.5));
    }

    #[test]
    fn a_tier_without_the_artifact_is_up_and_a_failing_one_reports_its_error() {
        let metrics = Metrics::default();
        assert!(metrics.counts().tiers.is_empty());
        metrics.record_health::<()>(Tier::Remote, &Err(Error::unavailable("no route to host")));
        metrics.record_health::<()>(Tier::Origin, &Err(Error::not_found("no such repository")));
        let tiers = metrics.counts().tiers;
        assert!(!tiers["remote"].up && tiers["origin"].up);
        assert!(tiers["remote"].error.as_ref().is_some_and(|error| error.contains("no route")));
        metrics.record_health(Tier::Remote, &Ok(()));
        let health = &metrics.counts().tiers["remote"];
        assert!(health.up && health.error.is_none());
        assert!(health.asked_unix > 1_700_000_000);
    }

    #[test]
    fn families_are_formatted_as_prometheus_text() {
        let metrics = Metrics::default();
        metrics.record_health(Tier::Remote, &Ok(()));
        metrics.record_failure(ErrorKind::NotFound);
        metrics.record_eviction(7);
        let mut families = metrics.counts().families();
        families.push(Family::gauge("directory_used_bytes", "Used bytes", 12.0));
        let text = text(&families);
        for line in [
            "# TYPE modelcache_gets_total counter\nmodelcache_gets_total{from=\"disk\"} 0\n",
            "modelcache_failures_total{code=\"not_found\"} 1\n",
            "modelcache_evicted_bytes_total 7\n",
            "# TYPE modelcache_tier_up gauge\nmodelcache_tier_up{tier=\"remote\"} 1\n",
            "# HELP modelcache_directory_used_bytes Used bytes.\n# TYPE modelcache_directory_used_bytes gauge\n\
             modelcache_directory_used_bytes 12\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
