//! `prune`: the artifacts and leftovers that it removes and keeps, and the agreement of the dry run with the result.

use crate::common::*;
use modelcache_testkit::{Content, content};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// An environment with `a`, `b` and `c`, of 1, 2 and 3 MiB, last used 3, 2 and 1 days ago. `c` shares a file with `a`.
fn house() -> House {
    let house = House::new();
    let shared = Content::generated(1, MIB);
    house.write("a/x", shared.clone());
    house.write("b/x", Content::generated(2, 2 * MIB));
    house.write("c/x", Content::generated(3, 2 * MIB));
    house.write("c/shared", shared);
    for (days, name) in (1..).zip(["c", "b", "a"]) {
        let path = house.path(name);
        house.on_local("d").run(["put", &format!("{name}@1"), path.to_str().unwrap()]).ok();
        let last_used =
            File::options().write(true).open(house.path(&format!("d/artifacts/{name}/1/last-used"))).unwrap();
        let then = SystemTime::now() - Duration::from_secs(days * 86_400);
        last_used.set_times(FileTimes::new().set_modified(then)).unwrap();
    }
    house
}

/// Returns the bytes on the filesystem that count against the budget. Each inode counts once.
fn counted(dir: &Path) -> u64 {
    let mut inodes = BTreeMap::new();
    for part in ["blobs", "staging", "quarantine"] {
        for file in files_below(&dir.join(part)) {
            let metadata = fs::symlink_metadata(dir.join(part).join(file)).unwrap();
            inodes.insert(metadata.ino(), metadata.blocks() * 512);
        }
    }
    inodes.values().sum()
}

fn references(rows: &Value) -> Vec<String> {
    rows.as_array().unwrap().iter().map(|row| text(&row["reference"])).collect()
}

/// Runs `prune` as a dry run and then for real, asserts that both agree to the byte, and returns the report.
#[track_caller]
fn prune(house: &House, args: &[&str]) -> Value {
    let dir = house.path("d");
    let run = |more: &[&str]| house.on_local("d").run([&["prune", "--json"], args, more].concat()).object();
    let before = counted(&dir);
    let planned = run(&["--dry-run"]);
    assert_eq!(counted(&dir), before, "a dry run changes nothing");
    let did = run(&[]);
    for field in ["used_before_bytes", "used_bytes", "freed_bytes", "leftovers", "evicted", "kept", "reached"] {
        assert_eq!(planned[field], did[field], "{field}");
    }
    let after = counted(&dir);
    assert_eq!((&did["used_before_bytes"], &did["used_bytes"]), (&json!(before), &json!(after)), "as counted");
    assert_eq!(did["freed_bytes"], json!(before - after));
    assert_eq!(house.on_local("d").run(["stats", "--json"]).object()["used_bytes"], json!(after));
    did
}

#[test]
fn artifacts_not_used_for_long_are_removed() {
    let house = house();
    let did = prune(&house, &["--older-than", "36h"]);
    assert_eq!(references(&did["evicted"]), ["a@1", "b@1"], "least recently used first");
    assert_eq!(did["evicted"][0]["freed_bytes"], 0, "c still has the file of a");
    assert_eq!(house.listed("d"), ["c@1"]);
    house.on_local("d").run(["prune", "--older-than", "36h"]).ok().said(&["nothing to remove"]);
}

#[test]
fn the_least_recently_used_are_removed_until_the_size_is_reached() {
    let house = house();
    let did = prune(&house, &["--to", "4MB"]);
    assert_eq!(
        (references(&did["evicted"]), &did["reached"]),
        (vec!["a@1".to_owned(), "b@1".to_owned()], &json!(true))
    );
    assert!(did["used_bytes"].as_u64().unwrap() <= 4_000_000);
    assert_eq!(house.listed("d"), ["c@1"]);
}

#[test]
fn without_a_bound_only_leftovers_are_removed() {
    let house = house();
    let junk = vec![7; 100_000];
    let digest = content::sha256(&junk);
    for path in [
        "staging/0123-dead/sha256-x".to_owned(),
        "staging/new-0123456789abcdef".to_owned(),
        format!("blobs/{}/{digest}", &digest[..2]),
        format!("quarantine/{digest}-x"),
        "quarantine/misplaced-x/inside".to_owned(),
    ] {
        house.write(&format!("d/{path}"), junk.clone());
    }
    house.write("d/staging/0123-dead/journal", "");
    let did = prune(&house, &[]);
    assert_eq!((&did["evicted"], &did["kept"]), (&json!([]), &json!([])));
    assert_eq!(did["leftovers"]["fills"], 1);
    for kind in ["fill_bytes", "temporary_bytes", "blob_bytes", "quarantine_bytes"] {
        assert!(did["leftovers"][kind].as_u64().unwrap() >= 100_000, "{kind}: {did}");
    }
    assert_eq!(house.listed("d"), ["a@1", "b@1", "c@1"]);
    assert_eq!(house.staging("d"), Vec::<std::path::PathBuf>::new());
    assert!(house.path("d/quarantine/misplaced-x/inside").exists(), "a misplaced entry stays in quarantine");
}

#[test]
fn artifacts_in_use_or_pinned_stay_and_a_shortfall_is_a_failure() {
    let house = house();
    house.on_local("d").env("USER", "ops").run(["pin", "a@1", "--reason", "canary"]).ok();
    let running = house.on_local("d").start(["exec", "b@1", "--", "sleep", "600"]);
    running.wait_until_it_is("sleep");
    let planned = house.on_local("d").run(["prune", "--to", "0", "--dry-run"]).ok();
    let plan = house.on_local("d").run(["prune", "--to", "0", "--dry-run", "--json"]).object();
    assert_eq!((&plan["to_bytes"], &plan["reached"]), (&json!(0), &json!(false)));
    let pid = running.pid();
    let in_use = format!("kept b@1: it is in use by process {pid} (sleep)");
    let pinned = ["kept a@1: it is pinned by ops@", ": canary"];
    assert!(planned.stdout.contains(&in_use) && planned.stdout.contains(pinned[0]), "{planned}");

    let says = [&in_use, pinned[0], pinned[1], "are still used, more than the requested 0 B"];
    house.on_local("d").run(["prune", "--to", "0"]).failed(6, &says);
    assert_eq!(house.listed("d"), ["a@1", "b@1"]);
    running.signal("KILL");
    running.wait();
    let did = prune(&house, &["--older-than", "0s"]);
    assert_eq!((references(&did["evicted"]), references(&did["kept"])), (vec!["b@1".into()], vec!["a@1".into()]));
    assert_eq!(did["kept"][0]["why"], "pinned");
}

#[test]
fn bytes_linked_outside_the_cache_are_not_reported_as_freed() {
    let house = house();
    fs::hard_link(house.path("d/artifacts/b/1/files/x"), house.path("kept")).unwrap();
    let did = prune(&house, &["--older-than", "36h"]);
    assert_eq!((references(&did["evicted"]), &did["freed_bytes"]), (vec!["a@1".into(), "b@1".into()], &json!(0)));
    assert_same(&house.path("kept"), &Content::generated(2, 2 * MIB));
}
