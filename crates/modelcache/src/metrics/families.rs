//! Metric families: the data model of Prometheus, its text format, and the tables that families are made from.
//!
//! A table of [`Descriptor`]s defines each metric once. [`families`] reads the values, [`text`] formats them, and
//! [`markdown`] documents them. A front end describes metrics of its own with a table of its own.

use serde::{Serialize, Serializer};
use std::fmt::Write;

/// Prefix of every metric name.
const PREFIX: &str = "modelcache_";

/// Upper bounds of the buckets of a [`Histogram`], in seconds. A bucket without a bound follows.
const BUCKET_BOUNDS_S: [f64; 14] =
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0];

/// One row of a table of metrics. `S` is the type that the values are read from.
#[derive(Debug)]
pub struct Descriptor<S: 'static> {
    /// The name without the prefix `modelcache_`, in base units. The name of a counter ends in `_total`.
    pub name: &'static str,
    /// The kind.
    pub kind: Kind,
    /// The names of the labels.
    pub labels: &'static [&'static str],
    /// The path of the same value in the JSON form of `S`, for the documentation; `None` if there is no JSON form.
    pub json: Option<&'static str>,
    /// The help text: one sentence, without the full stop.
    pub help: &'static str,
    /// Returns the samples, each with one value per label.
    pub samples: fn(&S) -> Vec<Sample>,
}

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A number that only grows while the process runs.
    Counter,
    /// A number that grows and shrinks.
    Gauge,
    /// A distribution of durations.
    Histogram,
}

/// A Prometheus metric family: all samples of one metric name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Family {
    /// The full metric name. The name of a counter ends in `_total`.
    pub name: String,
    /// The kind.
    pub kind: Kind,
    /// The names of the labels.
    pub labels: &'static [&'static str],
    /// The help text.
    pub help: &'static str,
    /// The samples.
    pub samples: Vec<Sample>,
}

/// One sample of a [`Family`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// The values of the labels, in the order of [`Family::labels`].
    pub labels: Vec<String>,
    /// The value of the sample.
    pub value: Value,
}

/// The value of a [`Sample`].
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// The value of a counter or a gauge.
    Number(f64),
    /// The value of a histogram.
    Histogram(Histogram),
}

/// A distribution of durations, in buckets from one millisecond to one hour.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    sum_s: f64,
    /// Number of durations by bucket, not cumulative.
    counts: [u64; BUCKET_BOUNDS_S.len() + 1],
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

impl<S> Descriptor<S> {
    /// Describes a counter.
    pub const fn counter(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
        samples: fn(&S) -> Vec<Sample>,
    ) -> Self {
        Self { name, kind: Kind::Counter, labels, json: None, help, samples }
    }

    /// Describes a gauge.
    pub const fn gauge(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
        samples: fn(&S) -> Vec<Sample>,
    ) -> Self {
        Self { kind: Kind::Gauge, ..Self::counter(name, labels, help, samples) }
    }

    /// Describes a histogram.
    pub const fn histogram(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
        samples: fn(&S) -> Vec<Sample>,
    ) -> Self {
        Self { kind: Kind::Histogram, ..Self::counter(name, labels, help, samples) }
    }

    /// Sets the path of the same value in the JSON form of `S`.
    #[must_use]
    pub const fn json(self, path: &'static str) -> Self {
        Self { json: Some(path), ..self }
    }

    /// Returns the full metric name.
    fn full_name(&self) -> String {
        format!("{PREFIX}{}", self.name)
    }
}

impl Sample {
    /// Returns the only sample of a family without labels.
    pub fn only(value: f64) -> Vec<Self> {
        vec![Self::labelled([], value)]
    }

    /// Returns a sample with these values of its labels.
    pub fn labelled<const N: usize>(labels: [&str; N], value: f64) -> Self {
        Self { labels: labels.map(str::to_owned).into(), value: Value::Number(value) }
    }
}

impl Histogram {
    /// Adds a duration in seconds.
    pub fn observe(&mut self, seconds: f64) {
        let bucket = BUCKET_BOUNDS_S.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKET_BOUNDS_S.len());
        self.counts[bucket] += 1;
        self.sum_s += seconds;
    }

    /// Returns the sum of all durations in seconds.
    pub fn sum(&self) -> f64 {
        self.sum_s
    }

    /// Returns the number of durations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Returns the upper bound of each bucket, as Prometheus writes it, and the number of durations up to that bound.
    /// The last bound is `+Inf`.
    pub fn buckets(&self) -> Vec<(String, u64)> {
        let bounds = BUCKET_BOUNDS_S.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        let cumulative = self.counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        bounds.zip(cumulative).collect()
    }
}

/// Serializes as `{"sum": SECONDS, "buckets": [[BOUND, COUNT], …]}` with cumulative counts.
impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Form {
            sum: f64,
            buckets: Vec<(String, u64)>,
        }
        Form { sum: self.sum_s, buckets: self.buckets() }.serialize(serializer)
    }
}

/// Reads the metrics of a table from `state`.
pub fn families<S>(table: &[Descriptor<S>], state: &S) -> Vec<Family> {
    let family = |row: &Descriptor<S>| Family {
        name: row.full_name(),
        kind: row.kind,
        labels: row.labels,
        help: row.help,
        samples: (row.samples)(state),
    };
    table.iter().map(family).collect()
}

/// Formats metric families in the Prometheus text format, version 0.0.4
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
pub fn text(families: &[Family]) -> String {
    let mut text = String::new();
    for Family { name, kind, labels, help, samples } in families {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} {}", kind.name());
        for sample in samples {
            let labels = || labels.iter().copied().zip(sample.labels.iter().map(String::as_str));
            let _ = match &sample.value {
                Value::Number(value) => writeln!(text, "{name}{} {value}", label_set(labels())),
                Value::Histogram(histogram) => {
                    for (bound, count) in histogram.buckets() {
                        let labels = label_set(labels().chain([("le", bound.as_str())]));
                        let _ = writeln!(text, "{name}_bucket{labels} {count}");
                    }
                    let (labels, sum, count) = (label_set(labels()), histogram.sum(), histogram.count());
                    writeln!(text, "{name}_sum{labels} {sum}\n{name}_count{labels} {count}")
                }
            };
        }
    }
    text
}

/// Formats labels as `{name="value",…}`, or as nothing if there are none. Escapes the values.
fn label_set<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<_> = labels.map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

/// Returns the documentation of a table as a Markdown table.
pub fn markdown<S>(table: &[Descriptor<S>]) -> String {
    // A table without a JSON form has no column for it.
    let has_json = table.iter().any(|row| row.json.is_some());
    let (head, line) = if has_json { ("| JSON ", "|---") } else { ("", "") };
    let mut text = format!("| metric | kind {head}| meaning |\n|---|---{line}|---|\n");
    for row in table {
        let labels = if row.labels.is_empty() { String::new() } else { format!("{{{}}}", row.labels.join(",")) };
        let json = row.json.map_or(String::new(), |path| format!("`{path}`"));
        let json = if has_json { format!("| {json} ") } else { String::new() };
        let _ = writeln!(text, "| `{}{labels}` | {} {json}| {} |", row.full_name(), row.kind.name(), row.help);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Descriptor<Histogram>] = &[
        Descriptor::counter("answers_total", &["route", "code"], "Answers", |_| {
            vec![Sample::labelled(["a\\b\"c\nd", "200"], 3.0)]
        })
        .json("answers"),
        Descriptor::histogram("answer_seconds", &["route"], "Durations", |histogram| {
            vec![Sample { labels: vec!["r".into()], value: Value::Histogram(histogram.clone()) }]
        }),
    ];

    #[test]
    fn label_values_are_escaped_and_a_sample_may_have_two_labels() {
        let text = text(&families(TABLE, &Histogram::default()));
        assert!(text.contains("modelcache_answers_total{route=\"a\\\\b\\\"c\\nd\",code=\"200\"} 3\n"), "{text}");
    }

    #[test]
    fn a_histogram_has_cumulative_buckets_a_sum_and_a_count() {
        let mut histogram = Histogram::default();
        [0.001, 0.002, 50.0, 10_000.0].into_iter().for_each(|seconds| histogram.observe(seconds));
        let text = text(&families(TABLE, &histogram));
        for line in [
            "# TYPE modelcache_answer_seconds histogram\n",
            "modelcache_answer_seconds_bucket{route=\"r\",le=\"0.001\"} 1\n",
            "modelcache_answer_seconds_bucket{route=\"r\",le=\"0.003\"} 2\n",
            "modelcache_answer_seconds_bucket{route=\"r\",le=\"30\"} 2\n",
            "modelcache_answer_seconds_bucket{route=\"r\",le=\"3600\"} 3\n",
            "modelcache_answer_seconds_bucket{route=\"r\",le=\"+Inf\"} 4\n",
            "modelcache_answer_seconds_sum{route=\"r\"} 10050.003\n",
            "modelcache_answer_seconds_count{route=\"r\"} 4\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn the_documentation_has_labels_kinds_and_json_fields() {
        let text = markdown(TABLE);
        assert!(
            text.contains("| `modelcache_answers_total{route,code}` | counter | `answers` | Answers |\n"),
            "{text}"
        );
        assert!(text.contains("| `modelcache_answer_seconds{route}` | histogram |  | Durations |\n"), "{text}");
    }
}
