//! The metrics file: each command writes its metrics for Prometheus, on success and on failure.

use crate::common::{House, model_bytes};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const FILE: &str = "modelcache.prom";

/// Returns the samples by name with labels. A line that is neither a sample nor a comment fails the test.
#[track_caller]
fn samples(path: &Path) -> BTreeMap<String, f64> {
    let text = fs::read_to_string(path).unwrap();
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?} in {text}"));
        (name.to_owned(), value.parse().unwrap())
    };
    text.lines().filter(|line| !line.starts_with('#')).map(sample).collect()
}

#[test]
fn a_get_records_the_source_of_its_bytes_and_the_state_of_the_directory() {
    let (house, _) = House::with_model();
    let path = house.path(FILE);
    let get = || house.on("a").env("MODEL_CACHE_METRICS_FILE", &path).run(["get", "hf://org/model"]).ok();
    get();
    let first = samples(&path);
    let of = |samples: &BTreeMap<String, f64>, name: &str| samples.get(name).copied();
    assert_eq!(of(&first, r#"modelcache_command{verb="get"}"#), Some(1.0));
    assert_eq!(of(&first, "modelcache_command_exit_code"), Some(0.0));
    assert_eq!(of(&first, r#"modelcache_command_artifacts{from="origin"}"#), Some(1.0));
    assert_eq!(of(&first, r#"modelcache_command_bytes{tier="origin"}"#), Some(model_bytes() as f64));
    assert_eq!(of(&first, "modelcache_command_uploaded_bytes"), Some(model_bytes() as f64));
    assert_eq!(of(&first, "modelcache_directory_artifacts"), Some(1.0));
    assert_eq!(of(&first, "modelcache_directory_budget_bytes"), Some(1e9));
    assert!(of(&first, r#"modelcache_command_phase_seconds{phase="download"}"#).unwrap() > 0.0, "{first:?}");
    get();
    let second = samples(&path);
    assert_eq!(of(&second, r#"modelcache_command_artifacts{from="disk"}"#), Some(1.0));
    assert_eq!(of(&second, r#"modelcache_command_artifacts{from="origin"}"#), Some(0.0), "of the last run only");
}

#[test]
fn a_failure_is_recorded_with_its_code() {
    let house = House::new();
    let path = house.path(FILE);
    house.on("a").env("MODEL_CACHE_METRICS_FILE", &path).run(["get", "nobody@1"]).failed(3, &["not found"]);
    let samples = samples(&path);
    assert_eq!(samples["modelcache_command_exit_code"], 3.0);
    assert_eq!(samples[r#"modelcache_command_failures{code="not_found"}"#], 1.0);
}

#[test]
fn exec_writes_the_file_before_it_executes_the_command() {
    let (house, _) = House::with_model();
    let path = house.path(FILE);
    let run = house.on("a").env("MODEL_CACHE_METRICS_FILE", &path);
    let seen = run.run(["exec", "hf://org/model", "--", "cat", path.to_str().unwrap()]).ok();
    assert!(seen.stdout.contains(r#"modelcache_command{verb="exec"} 1"#), "{seen}");
}

#[test]
fn a_file_that_cannot_be_written_is_a_warning() {
    let (house, _) = House::with_model();
    let run = house.on("a").env("MODEL_CACHE_METRICS_FILE", house.path("absent/x.prom"));
    let outcome = run.run(["get", "hf://org/model"]);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert!(outcome.stderr.contains("MODEL_CACHE_METRICS_FILE"), "{outcome}");
}
