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
        house.on("d").run(["put", &format!("{name}@1"), path.to_str().unwrap()]).ok();
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

    let message_parts = [&in_use, pinned[0], pinned[1], "are still used, more than the requested 0 B"];
    house.on_local("d").run(["prune", "--to", "0"]).failed(6, &message_parts);
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

/// Puts 20 MB under each of three versions, in a cache of 50 MB. Returns the outcome of the last put.
fn put_three(run: impl Fn() -> Run, house: &House) -> Outcome {
    let put = |version: u64| {
        let file = house.write("file", Content::generated(version, 20_000_000));
        run().env("MODEL_CACHE_MAX_BYTES", "50MB").run(["put", &format!("only@{version}"), file.to_str().unwrap()])
    };
    put(1).ok();
    put(2).ok();
    put(3)
}

#[test]
fn the_only_copy_of_an_artifact_is_not_evicted_to_make_room() {
    let house = House::new();
    let refused = put_three(|| house.on_local("a"), &house);
    refused.failed(6, &["only@1 is the only copy", "MODEL_CACHE_REMOTE", "modelcache backfill", "modelcache evict"]);
    assert_eq!(house.listed("a"), ["only@1", "only@2"]);
    let file = house.path("file");
    let said = house.on_local("a").run(["put", "only@3", file.to_str().unwrap()]).ok();
    assert!(said.stderr.contains("only@3: kept on this disk only"), "{said}");

    // Another user's record, and one that cannot be read, protect, too.
    for record in files_below(&house.path("a/backfill")) {
        let record = house.path("a/backfill").join(record);
        let name = record.file_name().unwrap().to_str().unwrap().split_once('-').unwrap().0.to_owned();
        fs::remove_file(&record).unwrap();
        fs::write(record.with_file_name(format!("{name}-4711")), "{").unwrap();
    }
    let kept = house.on_local("a").run(["prune", "--to", "0", "--json"]);
    assert_eq!(kept.code, Some(6));
    assert_eq!(house.listed("a").len(), 3);
}

#[test]
fn prune_removes_only_copies_with_a_flag_only() {
    let house = House::new();
    let file = house.write("file", Content::generated(1, MIB));
    house.on_local("a").run(["put", "only@1", file.to_str().unwrap()]).ok();
    for options in [&["--older-than", "0s"][..], &["--to", "0"], &["--older-than", "0s", "--dry-run"]] {
        let pruned = house.on_local("a").run([&["prune"], options].concat());
        assert!(format!("{pruned}").contains("kept only@1: it is the only copy"), "{pruned}");
        assert_eq!(pruned.code, Some(if options[0] == "--to" { 6 } else { 0 }), "{pruned}");
    }
    house.on_local("a").run(["prune", "--to", "0"]).failed(6, &["--only-copies", "modelcache backfill"]);
    assert_eq!(house.listed("a"), ["only@1"]);
    house.on_local("a").run(["prune", "--to", "0", "--only-copies"]).ok();
    assert_eq!(house.listed("a"), [""; 0]);
    assert_eq!(files_below(&house.path("a/backfill")), [""; 0].map(Path::new));
}

#[test]
fn a_backfill_uploads_what_was_put_without_a_remote_and_then_it_may_be_evicted() {
    let house = House::new();
    put_three(|| house.on_local("a").env("MODEL_CACHE_MAX_BYTES", "1GB"), &house);
    house.on("a").run(["get", "only@1"]).path();
    assert_eq!(house.published_keys(), [""; 0], "a get does not upload it");
    let listed = house.on("a").run(["backfill", "--dry-run", "--json"]).objects();
    assert_eq!((listed.len(), &listed[0]["remote"]), (2, &Value::Null));
    house.on("a").run(["backfill"]).ok().said(&["2 artifacts complete on the remote"]);
    // A backfill leases what it uploads. This get makes the other one the least recently used.
    house.on("a").run(["get", "only@1"]).path();
    let file = house.write("file", Content::generated(3, 20_000_000));
    house.on("a").env("MODEL_CACHE_MAX_BYTES", "50MB").run(["put", "only@3", file.to_str().unwrap()]).ok();
    assert_eq!(house.listed("a"), ["only@1", "only@3"]);
    // Put again with a remote.
    house.on_local("b").run(["put", "again@1", file.to_str().unwrap()]).ok();
    house.on("b").run(["put", "again@1", file.to_str().unwrap()]).ok();
    house.on("b").run(["prune", "--to", "0"]).ok();
    assert_eq!(house.listed("b"), [""; 0]);
}

#[test]
fn a_refused_upload_leaves_the_artifact_the_only_copy() {
    let house = House::new();
    house.on("b").run(["put", "m@1", house.write("one", "1").to_str().unwrap()]).ok();
    house.on_local("a").run(["put", "m@1", house.write("two", "22").to_str().unwrap()]).ok();
    house.on("a").run(["backfill"]).failed(1, &["already published with other content"]);
    house.on("a").run(["prune", "--to", "0"]).failed(6, &["kept m@1: it is the only copy"]);
}

#[test]
fn a_pending_upload_protects_what_its_origin_may_have_replaced() {
    let (house, _) = House::with_model();
    house.s3.bucket("other").unwrap();
    house.s3.put("other", "k/x", "x").unwrap();
    for reference in ["hf://org/model", "s3://other/k/x"] {
        house.on("a").run(["get", reference, "--backfill", "later"]).path();
    }
    let pruned = house.on("a").run(["prune", "--older-than", "0s", "--json"]).object();
    assert_eq!((references(&pruned["evicted"]).len(), references(&pruned["kept"]).len()), (1, 1), "{pruned}");
    assert!(text(&pruned["evicted"][0]["reference"]).starts_with("hf://org/model@"), "{pruned}");
    assert_eq!(pruned["kept"][0]["why"], "only_copy");
    house.on("a").run(["backfill"]).ok();
    house.on("a").run(["prune", "--older-than", "0s"]).ok();
    assert_eq!(house.listed("a"), [""; 0]);
}
