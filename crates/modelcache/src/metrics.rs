//! Metrics of a cache since it was opened. All front ends derive their numbers from these counters.
//!
//! One lock protects all counters; readers get a copy. The counters are kept in memory only, and end with the process.
//! [`Counts`] has the fields of the JSON form, and [`FAMILIES`] the metric that each of them is exported as.

mod families;

pub use families::{Descriptor, Family, Histogram, Kind, Sample, Value, families, markdown, text};

use crate::error::{ErrorKind, Result, Tier};
use crate::mutex::Mutex;
use crate::progress::Phase;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use std::collections::BTreeMap;
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
    /// Bytes of successful gets by the tier that supplied them. Bytes from tier disk were not downloaded.
    pub bytes: ByTier,
    /// Bytes of successful gets that came from disk or the remote, at most the size of the selected files.
    pub origin_avoided_bytes: u64,
    /// Bytes of files received by downloads, by tier, counted while they arrive. Includes bytes of failed gets, and
    /// bytes that were discarded. Tier disk stands for another local directory.
    pub received_bytes: ByTier,
    /// Successful puts.
    pub puts: u64,
    /// Bytes uploaded to the remote.
    pub uploaded_bytes: u64,
    /// Bytes that the object store copied, so that they needed no upload.
    pub copied_bytes: u64,
    /// Files passed through without being stored, because they are larger than the budget.
    pub uncached_files: u64,
    /// Bytes of these files.
    pub uncached_bytes: u64,
    /// Artifacts that were evicted to make room on disk.
    pub evictions: Evictions,
    /// Files that failed verification, by the tier that held them. A download counts a file once per tier.
    pub corrupt_files: ByTier,
    /// Bytes of the parts that failed verification, or of the whole files if the wrong parts are unknown.
    pub corrupt_bytes: ByTier,
    /// Corrupt files that were replaced: downloaded again to disk, or uploaded again to the remote. On the remote, also
    /// missing files.
    pub repaired_files: ByTier,
    /// Requests that failed and were sent again.
    pub retries: ByTier,
    /// Answers 429 and 503, with which a server asks for fewer requests.
    pub throttled: ByTier,
    /// Downloads of parts that were found to be too slow.
    pub stalls: Stalls,
    /// Fills that are running now.
    pub fills_in_flight: u64,
    /// Calls that are waiting now for the fill of another caller or process.
    pub waiting_calls: u64,
    /// Failed gets and puts, by error kind. A kind that has not occurred is absent.
    pub failures: BTreeMap<&'static str, u64>,
    /// Durations of the phases of gets and puts, by phase. In JSON, `phase_seconds` has the sums and `phase_buckets`
    /// the buckets.
    #[serde(flatten, serialize_with = "sums_and_buckets")]
    pub phase_seconds: BTreeMap<&'static str, Histogram>,
    /// The health of each tier at the last request to it. A tier that was never requested is absent.
    pub tiers: BTreeMap<&'static str, Health>,
}

/// The JSON form of the counters.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CountsAnswer<'a> {
    #[serde(flatten)]
    counts: &'a Counts,
    /// The fraction of successful gets that were hits on disk; `None` before the first get.
    hit_rate: Option<f64>,
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

/// Downloads of parts that were found to be too slow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stalls {
    /// The server sent no bytes within the read timeout.
    pub silent: ByTier,
    /// The connection delivered nearly no bytes within the read timeout.
    pub stalled: ByTier,
    /// The request was far slower than others, and the rest was requested over a second connection.
    pub hedged: ByTier,
}

/// The numbers that one successful get adds to the counters.
#[derive(Debug)]
pub(crate) struct GetCounts<'a> {
    pub(crate) from: Tier,
    pub(crate) bytes: ByTier,
    pub(crate) selected_bytes: u64,
    pub(crate) uploaded_bytes: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) phases: &'a BTreeMap<Phase, Duration>,
}

/// Counts one in a gauge of [`Counts`] until it is dropped.
#[derive(Debug)]
pub(crate) struct GaugeGuard {
    metrics: Metrics,
    gauge: fn(&mut Counts) -> &mut u64,
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        *(self.gauge)(&mut self.metrics.0.lock()) -= 1;
    }
}

impl Metrics {
    /// Returns a copy of the counters.
    pub fn counts(&self) -> Counts {
        self.0.lock().clone()
    }

    /// Counts a file of `bytes` bytes that was passed through without being stored.
    pub fn record_uncached(&self, bytes: u64) {
        self.update(|counts| {
            counts.uncached_files += 1;
            counts.uncached_bytes += bytes;
        });
    }

    /// Changes the counters.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.0.lock());
    }

    /// Adds one to a gauge until the guard is dropped.
    pub(crate) fn count_while(&self, gauge: fn(&mut Counts) -> &mut u64) -> GaugeGuard {
        *gauge(&mut self.0.lock()) += 1;
        GaugeGuard { metrics: self.clone(), gauge }
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
        counts.origin_avoided_bytes += got.selected_bytes.min(got.bytes.disk + got.bytes.remote);
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

    /// Counts `files` in which bytes from `tier` failed verification, and the number of these bytes.
    pub(crate) fn record_corrupt(&self, tier: Tier, files: u64, bytes: u64) {
        let mut counts = self.0.lock();
        counts.corrupt_files.add(tier, files);
        counts.corrupt_bytes.add(tier, bytes);
    }

    /// Counts a failed get or put.
    pub(crate) fn record_failure(&self, kind: ErrorKind) {
        *self.0.lock().failures.entry(kind.name()).or_default() += 1;
    }

    /// Records the health of a tier after a request. It is down if it was unavailable, and up after any other answer,
    /// such as `NotFound`. Refused credentials are an outage of the remote, but not of the origin, which refuses single
    /// repositories. Other errors say nothing about the tier, because many arise before a request is sent.
    pub(crate) fn record_health<T>(&self, tier: Tier, outcome: &Result<T>) {
        let error = match outcome.as_ref().err().map(|error| (error.kind(), error)) {
            None | Some((ErrorKind::NotFound | ErrorKind::Corrupt, _)) => None,
            Some((ErrorKind::Unauthorized, _)) if tier == Tier::Origin => None,
            Some((ErrorKind::Unavailable | ErrorKind::Unauthorized, error)) => Some(error.to_string()),
            Some(_) => return,
        };
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let health = Health { up: error.is_none(), asked_unix: since_epoch.as_secs(), error };
        self.0.lock().tiers.insert(tier.name(), health);
    }
}

impl ByTier {
    /// Adds `number` to the number of `tier`.
    pub(crate) fn add(&mut self, tier: Tier, number: u64) {
        *match tier {
            Tier::Disk => &mut self.disk,
            Tier::Remote => &mut self.remote,
            Tier::Origin => &mut self.origin,
        } += number;
    }

    /// Returns one sample for each tier, with the tier as the only label.
    fn samples(self) -> Vec<Sample> {
        self.by_tier().map(|(tier, number)| Sample::labelled([tier], number)).into()
    }

    fn by_tier(self) -> [(&'static str, f64); 3] {
        [(Tier::Disk, self.disk), (Tier::Remote, self.remote), (Tier::Origin, self.origin)]
            .map(|(tier, number)| (tier.name(), number as f64))
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
            self.phase_seconds.entry(phase.name()).or_default().observe(spent.as_secs_f64());
        }
    }

    /// Returns the JSON form of the counters.
    pub fn answer(&self) -> CountsAnswer<'_> {
        CountsAnswer { counts: self, hit_rate: self.hit_rate() }
    }

    /// Returns the counters as Prometheus metric families.
    pub fn families(&self) -> Vec<Family> {
        families(FAMILIES, self)
    }
}

/// Serializes the sums and the buckets of the histograms as two maps.
fn sums_and_buckets<S: Serializer>(phases: &BTreeMap<&str, Histogram>, serializer: S) -> Result<S::Ok, S::Error> {
    let sums: BTreeMap<_, _> = phases.iter().map(|(phase, histogram)| (*phase, histogram.sum())).collect();
    let buckets: BTreeMap<_, _> = phases.iter().map(|(phase, histogram)| (*phase, histogram.buckets())).collect();
    let mut map = serializer.serialize_map(Some(2))?;
    map.serialize_entry("phase_seconds", &sums)?;
    map.serialize_entry("phase_buckets", &buckets)?;
    map.end()
}

/// Names the type of the rows below, so that the closures need no types.
type Row = Descriptor<Counts>;

/// The metrics of [`Counts`].
pub const FAMILIES: &[Descriptor<Counts>] = &[
    Row::counter(
        "gets_total",
        &["from"],
        "Successful gets, by the farthest tier that supplied bytes; one that joined another fill counts as a \
         miss only",
        |counts| counts.hits.samples(),
    )
    .json("hits"),
    Row::counter("misses_total", &[], "Gets for which not all files were on disk", |counts| {
        Sample::only(counts.misses as f64)
    })
    .json("misses"),
    Row::counter(
        "waits_total",
        &[],
        "Gets that waited for the fill of another caller or process (joined fills)",
        |counts| Sample::only(counts.waits.count as f64),
    )
    .json("waits.count"),
    Row::counter(
        "wait_seconds_total",
        &[],
        "Seconds for which gets waited for the fill of another caller or process",
        |counts| Sample::only(counts.waits.seconds),
    )
    .json("waits.seconds"),
    Row::counter(
        "bytes_total",
        &["tier"],
        "Bytes of successful gets, by the tier that supplied them; `disk`: they were not downloaded",
        |counts| counts.bytes.samples(),
    )
    .json("bytes"),
    Row::counter(
        "origin_avoided_bytes_total",
        &[],
        "Bytes of successful gets that came from disk or the remote, at most the size of the files: an \
         origin did not have to deliver them",
        |counts| Sample::only(counts.origin_avoided_bytes as f64),
    )
    .json("origin_avoided_bytes"),
    Row::counter(
        "received_bytes_total",
        &["tier"],
        "Bytes of files that downloads received, including those of failed gets and discarded ones; `disk`: \
         from another local directory",
        |counts| counts.received_bytes.samples(),
    )
    .json("received_bytes"),
    Row::counter("uploaded_bytes_total", &[], "Bytes uploaded to the remote", |counts| {
        Sample::only(counts.uploaded_bytes as f64)
    })
    .json("uploaded_bytes"),
    Row::counter(
        "copied_bytes_total",
        &[],
        "Bytes copied by the object store, so that they needed no upload",
        |counts| Sample::only(counts.copied_bytes as f64),
    )
    .json("copied_bytes"),
    Row::counter(
        "uncached_files_total",
        &[],
        "Files passed through without being stored, because they are larger than the budget",
        |counts| Sample::only(counts.uncached_files as f64),
    )
    .json("uncached_files"),
    Row::counter("uncached_bytes_total", &[], "Bytes of files passed through without being stored", |counts| {
        Sample::only(counts.uncached_bytes as f64)
    })
    .json("uncached_bytes"),
    Row::counter("puts_total", &[], "Artifacts published by put", |counts| Sample::only(counts.puts as f64))
        .json("puts"),
    Row::counter("evictions_total", &[], "Artifacts evicted to make room", |counts| {
        Sample::only(counts.evictions.count as f64)
    })
    .json("evictions.count"),
    Row::counter("evicted_bytes_total", &[], "Bytes freed by evictions", |counts| {
        Sample::only(counts.evictions.bytes as f64)
    })
    .json("evictions.bytes"),
    Row::counter(
        "corrupt_files_total",
        &["tier"],
        "Files that failed verification, by the tier that held or sent them",
        |counts| counts.corrupt_files.samples(),
    )
    .json("corrupt_files"),
    Row::counter(
        "corrupt_bytes_total",
        &["tier"],
        "Bytes of the parts that failed verification, or of the whole file if its wrong parts are unknown",
        |counts| counts.corrupt_bytes.samples(),
    )
    .json("corrupt_bytes"),
    Row::counter(
        "repaired_files_total",
        &["tier"],
        "Corrupt files that were replaced: downloaded again to disk, or uploaded again to the remote (there \
         also missing files)",
        |counts| counts.repaired_files.samples(),
    )
    .json("repaired_files"),
    Row::counter("retries_total", &["tier"], "Requests that failed and were sent again", |counts| {
        counts.retries.samples()
    })
    .json("retries"),
    Row::counter(
        "throttled_total",
        &["tier"],
        "Answers 429 and 503, with which a server asks for fewer requests",
        |counts| counts.throttled.samples(),
    )
    .json("throttled"),
    Row::counter(
        "stalls_total",
        &["kind", "tier"],
        "Slow downloads of parts: no bytes within the read timeout (`silent`), nearly none (`stalled`), or \
         far slower than others, so that a second connection was opened (`hedged`)",
        |counts| counts.stalls.samples(),
    )
    .json("stalls.KIND"),
    Row::gauge("fills_in_flight", &[], "Fills that are running", |counts| Sample::only(counts.fills_in_flight as f64))
        .json("fills_in_flight"),
    Row::gauge("waiting_calls", &[], "Calls that are waiting for the fill of another caller or process", |counts| {
        Sample::only(counts.waiting_calls as f64)
    })
    .json("waiting_calls"),
    Row::counter("failures_total", &["code"], "Failed gets and puts, by error kind", |counts| {
        // All kinds, because Prometheus sees no increase in a series that begins with 1.
        let failures = |name| counts.failures.get(name).copied().unwrap_or(0);
        ErrorKind::ALL.map(|kind| Sample::labelled([kind.name()], failures(kind.name()) as f64)).into()
    })
    .json("failures"),
    Row::histogram(
        "phase_seconds",
        &["phase"],
        "Durations of the phases of gets and puts, in seconds: `resolve`, `acquire` (a lease), `join` (wait \
         for another fill), `plan`, `download`, `read` (by put), `publish`, `backfill`, `materialize`, \
         `verify`",
        |counts| by_name(&counts.phase_seconds, |histogram| Value::Histogram(histogram.clone())),
    )
    .json("phase_seconds, phase_buckets"),
    Row::gauge(
        "tier_up",
        &["tier"],
        "Whether a tier answered the last request; absent before the first one",
        |counts| by_name(&counts.tiers, |health| Value::Number(f64::from(u8::from(health.up)))),
    )
    .json("tiers.TIER.up"),
    Row::gauge(
        "tier_last_request_timestamp_seconds",
        &["tier"],
        "Time of the last request to a tier that determined whether it is up (Unix time)",
        |counts| by_name(&counts.tiers, |health| Value::Number(health.asked_unix as f64)),
    )
    .json("tiers.TIER.asked_unix"),
];

impl Stalls {
    fn samples(self) -> Vec<Sample> {
        let by_kind = [("silent", self.silent), ("stalled", self.stalled), ("hedged", self.hedged)];
        let of_kind = |(kind, numbers): (&'static str, ByTier)| {
            numbers.by_tier().map(|(tier, number)| Sample::labelled([kind, tier], number))
        };
        by_kind.into_iter().flat_map(of_kind).collect()
    }
}

/// Returns one sample for each entry of a map, with the key as the only label.
fn by_name<T>(map: &BTreeMap<&'static str, T>, value: impl Fn(&T) -> Value) -> Vec<Sample> {
    map.iter().map(|(name, of)| Sample { labels: vec![(*name).to_owned()], value: value(of) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn got(metrics: &Metrics, from: Tier, waited: Option<Duration>) {
        let phases: BTreeMap<_, _> = waited.map(|waited| (Phase::Join, waited)).into_iter().collect();
        let bytes = ByTier { remote: 5, ..ByTier::default() };
        let counts = GetCounts { from, bytes, selected_bytes: 4, uploaded_bytes: 2, copied_bytes: 0, phases: &phases };
        metrics.record_get(&counts);
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
        assert_eq!((counts.uploaded_bytes, counts.phase_seconds["join"].sum()), (8, 1.5));
        assert_eq!(counts.origin_avoided_bytes, 16, "at most the size of the files");
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
    fn refused_credentials_are_an_outage_of_the_remote_only_and_other_errors_change_nothing() {
        let metrics = Metrics::default();
        for tier in [Tier::Remote, Tier::Origin] {
            metrics.record_health::<()>(tier, &Err(Error::invalid("not a reference")));
        }
        assert!(metrics.counts().tiers.is_empty());
        for tier in [Tier::Remote, Tier::Origin] {
            metrics.record_health::<()>(tier, &Err(Error::new(ErrorKind::Unauthorized, "403")));
        }
        let tiers = metrics.counts().tiers;
        assert!(!tiers["remote"].up && tiers["origin"].up);
    }

    #[test]
    fn families_are_formatted_as_prometheus_text() {
        let metrics = Metrics::default();
        metrics.record_health(Tier::Remote, &Ok(()));
        metrics.record_failure(ErrorKind::NotFound);
        metrics.record_eviction(7);
        metrics.record_uncached(9);
        metrics.update(|counts| counts.stalls.hedged.add(Tier::Origin, 2));
        got(&metrics, Tier::Disk, Some(Duration::from_millis(2)));
        let text = text(&metrics.counts().families());
        for line in [
            "# TYPE modelcache_gets_total counter\nmodelcache_gets_total{from=\"disk\"} 0\n",
            "modelcache_failures_total{code=\"not_found\"} 1\n",
            "modelcache_failures_total{code=\"full\"} 0\n",
            "modelcache_evicted_bytes_total 7\n",
            "modelcache_uncached_bytes_total 9\n",
            "modelcache_stalls_total{kind=\"hedged\",tier=\"origin\"} 2\n",
            "# TYPE modelcache_tier_up gauge\nmodelcache_tier_up{tier=\"remote\"} 1\n",
            "modelcache_phase_seconds_bucket{phase=\"join\",le=\"0.003\"} 1\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn names_follow_the_conventions_of_prometheus_and_are_unique() {
        let names: std::collections::BTreeSet<_> = FAMILIES.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), FAMILIES.len());
        for row in FAMILIES {
            assert_eq!(row.name.ends_with("_total"), row.kind == Kind::Counter, "{}", row.name);
            assert!(row.name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_'), "{}", row.name);
            assert!(!row.help.ends_with('.'), "{}", row.help);
            let counts = Counts { failures: [("other", 1)].into(), ..Counts::default() };
            let samples = (row.samples)(&counts);
            assert!(samples.iter().all(|sample| sample.labels.len() == row.labels.len()), "{}", row.name);
        }
    }

    /// A JSON field without a metric, or a metric without its field, fails this test.
    #[test]
    fn each_field_of_the_json_form_is_a_metric() {
        let json = serde_json::to_value(Counts::default().answer()).expect("serializable");
        let fields: std::collections::BTreeSet<&str> =
            json.as_object().expect("an object").keys().map(String::as_str).collect();
        let paths = FAMILIES.iter().filter_map(|row| row.json).flat_map(|paths| paths.split(", "));
        let mut documented: std::collections::BTreeSet<&str> =
            paths.filter_map(|path| path.split('.').next()).collect();
        documented.insert("hit_rate");
        assert_eq!(fields, documented);
    }

    #[test]
    fn the_json_form_has_the_sum_and_the_buckets_of_each_phase() {
        let metrics = Metrics::default();
        got(&metrics, Tier::Disk, Some(Duration::from_millis(1500)));
        let json = serde_json::to_value(metrics.counts().answer()).expect("serializable");
        assert_eq!(json["phase_seconds"], serde_json::json!({"join": 1.5}));
        assert_eq!(json["phase_buckets"]["join"][6], serde_json::json!(["1", 0]));
        assert_eq!(json["phase_buckets"]["join"][7], serde_json::json!(["3", 1]));
        assert_eq!(json["hit_rate"], 0.0);
    }

    #[test]
    fn a_gauge_counts_until_its_guard_is_dropped() {
        let metrics = Metrics::default();
        let guards = [(); 2].map(|()| metrics.count_while(|counts| &mut counts.waiting_calls));
        assert_eq!(metrics.counts().waiting_calls, 2);
        drop(guards);
        assert_eq!(metrics.counts().waiting_calls, 0);
    }
}
