//! Counters: what a cache did since it was opened. One table, from which every door's numbers follow.
//!
//! Whoever does something counts it; whoever shows it takes a copy. Counting never waits for anything but another count.
//! A process that ends takes its counters with it, and each process has its own.

use crate::error::{ErrorKind, Result, Tier};
use crate::progress::Phase;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The counters of one cache; clones count together.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Mutex<Counts>>);

/// A copy of the counters.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Artifacts got, by the farthest tier that gave bytes.
    pub hits: ByTier,
    /// Gets that found less on disk than they wanted: all but the hits of tier disk.
    pub misses: u64,
    /// Of those: gets that waited while somebody else fetched.
    pub waits: Waits,
    /// Bytes by the tier that they came from; of tier disk, those that needed not be fetched.
    pub bytes: ByTier,
    /// Artifacts put.
    pub puts: u64,
    /// Bytes written to the remote.
    pub uploaded_bytes: u64,
    /// Bytes that the remote's server copied instead.
    pub copied_bytes: u64,
    /// Artifacts that left the disk to make room.
    pub evictions: Evictions,
    /// Gets and puts that failed, by kind; kinds that never happened are absent.
    pub failures: BTreeMap<&'static str, u64>,
    /// Seconds spent in gets and puts, by phase.
    pub phase_seconds: BTreeMap<&'static str, f64>,
    /// How each tier did when it was last asked; those that were not are absent.
    pub tiers: BTreeMap<&'static str, Health>,
}

/// How a tier did when it was last asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Whether it answered; that it has nothing is an answer.
    pub up: bool,
    /// When it was asked, in seconds since the Unix epoch.
    pub asked_unix: u64,
    /// How it failed, if it did.
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

/// Gets that waited for somebody else's fill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Waits {
    /// How many.
    pub count: u64,
    /// For how long, all together.
    pub seconds: f64,
}

/// Artifacts that were evicted to make room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Evictions {
    /// How many.
    pub count: u64,
    /// The bytes that became free.
    pub bytes: u64,
}

/// What one get came to, as it is counted.
#[derive(Debug)]
pub(crate) struct Got<'a> {
    pub(crate) from: Tier,
    pub(crate) bytes: ByTier,
    pub(crate) uploaded_bytes: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) phases: &'a BTreeMap<Phase, Duration>,
}

impl Metrics {
    /// The counters as they are now.
    pub fn counts(&self) -> Counts {
        self.lock().clone()
    }

    pub(crate) fn got(&self, got: &Got<'_>) {
        let mut counts = self.lock();
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
        counts.spent(got.phases);
    }

    pub(crate) fn put(&self, uploaded_bytes: u64, copied_bytes: u64, phases: &BTreeMap<Phase, Duration>) {
        let mut counts = self.lock();
        counts.puts += 1;
        counts.uploaded_bytes += uploaded_bytes;
        counts.copied_bytes += copied_bytes;
        counts.spent(phases);
    }

    /// Bytes that reached the remote while no call waited for them.
    pub(crate) fn uploaded(&self, uploaded_bytes: u64, copied_bytes: u64) {
        let mut counts = self.lock();
        counts.uploaded_bytes += uploaded_bytes;
        counts.copied_bytes += copied_bytes;
    }

    pub(crate) fn evicted(&self, bytes: u64) {
        let mut counts = self.lock();
        counts.evictions.count += 1;
        counts.evictions.bytes += bytes;
    }

    pub(crate) fn failed(&self, kind: ErrorKind) {
        *self.lock().failures.entry(kind.name()).or_default() += 1;
    }

    /// Notes how a tier that was asked did. It fails when it does not answer, or not this caller; absence is an answer.
    pub(crate) fn asked<T>(&self, tier: Tier, outcome: &Result<T>) {
        let error = match outcome {
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unauthorized) => {
                Some(error.to_string())
            }
            _ => None,
        };
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let health = Health { up: error.is_none(), asked_unix: since_epoch.as_secs(), error };
        self.lock().tiers.insert(tier.name(), health);
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn rows(self, label: &'static str) -> Vec<Sample> {
        let rows = [("disk", self.disk), ("remote", self.remote), ("origin", self.origin)];
        rows.map(|(tier, value)| Sample { label: Some((label, tier.into())), value: value as f64 }).into()
    }
}

impl Counts {
    /// The share of gets that disk answered by itself; `None` before the first.
    pub fn hit_rate(&self) -> Option<f64> {
        let gets = self.hits.disk + self.misses;
        (gets > 0).then(|| self.hits.disk as f64 / gets as f64)
    }

    fn spent(&mut self, phases: &BTreeMap<Phase, Duration>) {
        for (phase, spent) in phases {
            *self.phase_seconds.entry(phase.name()).or_default() += spent.as_secs_f64();
        }
    }

    /// The counters as families of Prometheus: names, meanings and samples.
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
            Family::counter("gets", "Artifacts got, by the farthest tier that gave bytes", self.hits.rows("from")),
            Family::one("misses", "Gets that found less on disk than they wanted", self.misses as f64),
            Family::one("waits", "Gets that waited while somebody else fetched", self.waits.count as f64),
            Family::one("wait_seconds", "Seconds that they waited", self.waits.seconds),
            Family::counter("bytes", "Bytes by the tier that they came from", self.bytes.rows("tier")),
            Family::one("puts", "Artifacts put", self.puts as f64),
            Family::one("uploaded_bytes", "Bytes written to the remote", self.uploaded_bytes as f64),
            Family::one("copied_bytes", "Bytes that the remote's server copied instead", self.copied_bytes as f64),
            Family::one("evictions", "Artifacts that left the disk to make room", self.evictions.count as f64),
            Family::one("evicted_bytes", "Bytes that became free by that", self.evictions.bytes as f64),
            Family::counter(
                "failures",
                "Gets and puts that failed, by kind",
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
                    "Whether a tier answered when it was last asked",
                    self.tiers.iter().map(up).collect(),
                )
            },
        ]
    }
}

/// Numbers of one name, as Prometheus takes them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Family {
    /// The name, with its prefix, without `_total`.
    pub name: String,
    /// What it means.
    pub help: &'static str,
    /// Whether it only ever grows; otherwise it is a gauge.
    pub is_counter: bool,
    /// The numbers.
    pub samples: Vec<Sample>,
}

/// One number, told apart from its siblings by at most one label.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// Name and value of the label.
    pub label: Option<(&'static str, String)>,
    /// The number.
    pub value: f64,
}

impl Family {
    /// A gauge without a label.
    pub fn gauge(name: &str, help: &'static str, value: f64) -> Self {
        Self { is_counter: false, ..Self::one(name, help, value) }
    }

    fn one(name: &str, help: &'static str, value: f64) -> Self {
        Self::counter(name, help, vec![Sample { label: None, value }])
    }

    fn counter(name: &str, help: &'static str, samples: Vec<Sample>) -> Self {
        Self { name: format!("modelcache_{name}"), help, is_counter: true, samples }
    }
}

/// The text form of Prometheus, version 0.0.4.
pub fn text(families: &[Family]) -> String {
    let mut text = String::new();
    for Family { name, help, is_counter, samples } in families {
        let (kind, total) = if *is_counter { ("counter", "_total") } else { ("gauge", "") };
        // Writing to a text cannot fail.
        let _ = writeln!(text, "# HELP {name}{total} {help}.\n# TYPE {name}{total} {kind}");
        for Sample { label, value } in samples {
            let _ = match label {
                None => writeln!(text, "{name}{total} {value}"),
                Some((label, of)) => writeln!(text, "{name}{total}{{{label}=\"{of}\"}} {value}"),
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
        metrics.got(&Got { from, bytes, uploaded_bytes: 2, copied_bytes: 0, phases: &phases });
    }

    #[test]
    fn who_waited_for_somebody_elses_fetch_did_not_hit() {
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
    fn a_tier_that_has_nothing_is_up_and_one_that_fails_says_how() {
        let metrics = Metrics::default();
        assert!(metrics.counts().tiers.is_empty());
        metrics.asked::<()>(Tier::Remote, &Err(Error::unavailable("no route to host")));
        metrics.asked::<()>(Tier::Origin, &Err(Error::not_found("no such repository")));
        let tiers = metrics.counts().tiers;
        assert!(!tiers["remote"].up && tiers["origin"].up);
        assert!(tiers["remote"].error.as_ref().is_some_and(|error| error.contains("no route")));
        metrics.asked(Tier::Remote, &Ok(()));
        let health = &metrics.counts().tiers["remote"];
        assert!(health.up && health.error.is_none());
        assert!(health.asked_unix > 1_700_000_000);
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let metrics = Metrics::default();
        metrics.asked(Tier::Remote, &Ok(()));
        metrics.failed(ErrorKind::NotFound);
        metrics.evicted(7);
        let mut families = metrics.counts().families();
        families.push(Family::gauge("directory_used_bytes", "What counts", 12.0));
        let text = text(&families);
        for line in [
            "# TYPE modelcache_gets_total counter\nmodelcache_gets_total{from=\"disk\"} 0\n",
            "modelcache_failures_total{code=\"not_found\"} 1\n",
            "modelcache_evicted_bytes_total 7\n",
            "# TYPE modelcache_tier_up gauge\nmodelcache_tier_up{tier=\"remote\"} 1\n",
            "# HELP modelcache_directory_used_bytes What counts.\n# TYPE modelcache_directory_used_bytes gauge\n\
             modelcache_directory_used_bytes 12\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
