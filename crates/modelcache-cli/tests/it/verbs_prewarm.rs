//! `prewarm`: filling a list of artifacts.

use crate::common::*;
use modelcache_testkit::Content;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// An environment with `org/a` and `org/b` of 4 MiB each, which share 3 MiB, and `org/c` with 4 MiB of its own.
fn house() -> House {
    let house = House::new();
    for (name, own) in [("a", 1), ("b", 2)] {
        let commit = house.hub.repo(&format!("org/{name}")).commit().file("shared", Content::generated(9, 3 * MIB));
        commit.file("own", Content::generated(own, MIB)).publish().unwrap();
    }
    house.hub.repo("org/c").commit().file("own", Content::generated(3, 4 * MIB)).publish().unwrap();
    house
}

#[test]
fn a_list_is_filled_with_shared_files_fetched_once_and_a_second_run_fetches_nothing() {
    let house = house();
    house.write("list", "# models\nhf://org/a\nhf://org/b   # shares with a\n\n");
    let args = ["prewarm", "hf://org/c", "--file", "list"];
    let outcome = house.on_local("d").env("MODEL_CACHE_MAX_BYTES", "10MB").run(args).ok();
    let sizes = "3 artifacts: 9.4 MB in total, 9.4 MB not on disk yet";
    let outcome = outcome.said(&[sizes, "3 artifacts downloaded", "0 already on disk"]);
    assert_eq!(outcome.stdout, "");
    assert_eq!(house.listed("d").len(), 3);
    let again = house.on_local("d").env("MODEL_CACHE_MAX_BYTES", "10MB").run(args).ok();
    again.said(&["0 B not on disk yet", "0 artifacts downloaded (0 B), 3 already on disk"]);
}

#[test]
fn a_list_that_does_not_fit_is_refused_before_any_download() {
    let house = house();
    let small = || house.on_local("d").env("MODEL_CACHE_MAX_BYTES", "9MB");
    let list = ["prewarm", "hf://org/a", "hf://org/b", "hf://org/c"];
    small().run(list).failed(6, &["needs 9.4 MB more", "at most 9.0 MB can be made free"]);
    assert_eq!(house.hub.body_bytes(), 0);
    // A listed artifact on disk keeps its space, so the rest of the list still does not fit.
    small().run(["get", "hf://org/a"]).path();
    let bytes_before = house.hub.body_bytes();
    small().run(list).failed(6, &["needs 5.2 MB more"]);
    assert_eq!(house.hub.body_bytes(), bytes_before);
    // A pinned artifact that is not on the list takes room from it.
    small().run(["pin", "hf://org/a"]).ok();
    small().run(["prewarm", "hf://org/c"]).ok();
    small().run(["pin", "hf://org/c"]).ok();
    house.hub.repo("org/e").commit().file("own", Content::generated(5, 4 * MIB)).publish().unwrap();
    small().run(["prewarm", "hf://org/e"]).failed(6, &["needs 4.2 MB more", "release or unpin"]);
    small().run(["unpin", "hf://org/a"]).ok();
    small().run(["prewarm", "hf://org/e"]).ok();
}

#[test]
fn listed_artifacts_on_disk_are_not_evicted_for_the_rest_of_the_list() {
    let house = house();
    let tight = || house.on_local("d").env("MODEL_CACHE_MAX_BYTES", "9MB");
    tight().run(["get", "hf://org/a"]).path();
    tight().run(["get", "hf://org/c"]).path();
    // There is room for two artifacts. `org/c` is evicted although it was used last, because `org/a` is on the list.
    house.hub.repo("org/f").commit().file("own", Content::generated(6, 4 * MIB)).publish().unwrap();
    let got = tight().run(["prewarm", "hf://org/a", "hf://org/f"]).ok();
    got.said(&["1 artifact downloaded (4.2 MB), 1 already on disk"]);
    let listed = house.listed("d");
    assert!(listed.iter().all(|reference| !reference.contains("org/c")), "{listed:?}");
    assert_eq!(listed.len(), 2, "{listed:?}");
}

#[test]
fn one_failing_artifact_does_not_stop_the_others_and_json_has_one_object_each() {
    let house = house();
    let args = ["prewarm", "hf://org/a", "hf://org/none", "hf://org/b", "--jobs", "2", "--json"];
    let outcome = house.on_local("d").run(args).said(&["error: hf://org/none", "2 artifacts downloaded", "1 failed"]);
    assert_eq!(outcome.code, Some(3), "{outcome}");
    let rows = outcome.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let rows: BTreeMap<String, Value> = rows.map(|row| (text(&row["reference"]), row)).collect();
    assert_eq!(rows.len(), 3, "{outcome}");
    assert_eq!(rows["hf://org/none"]["error"]["code"], "not_found");
    assert_eq!((&rows["hf://org/a"]["files"], &rows["hf://org/b"]["size"]), (&json!(2), &json!(4 * MIB)));
}

#[test]
fn a_list_that_cannot_be_read_or_has_a_bad_line_is_a_usage_error() {
    let house = house();
    house.write("list", "hf://org/a\n\nfraud\n");
    house.on_local("d").run(["prewarm", "--file", "list"]).failed(2, &["list line 3: ", "has no version"]);
    house.on_local("d").run(["prewarm", "--file", "none"]).failed(2, &["cannot read the list none"]);
    house.on_local("d").run(["prewarm"]).said(&["<REF>"]);
    assert_eq!(house.hub.requests().len(), 0);
}
