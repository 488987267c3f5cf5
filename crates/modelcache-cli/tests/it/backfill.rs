//! Backfill: artifacts from an origin are uploaded to the remote at once, in the background, or later, also after
//! failures.

use crate::common::*;
use modelcache_testkit::s3::S3Fault;
use serde_json::json;
use std::fs;
use std::time::Duration;

const REF: &str = "hf://org/model";
const OTHER: &str = "hf://org/other";

/// An environment with a second, small repository.
fn house() -> House {
    let (house, _) = House::with_model();
    house.hub.repo("org/other").commit().file("weights", "other").publish().unwrap();
    house
}

fn manifests(house: &House) -> usize {
    house.s3.keys(BUCKET).iter().filter(|key| key.ends_with("manifest.json")).count()
}

/// Returns the number of write requests to S3.
fn writes(house: &House) -> usize {
    house.s3.requests().iter().filter(|seen| !matches!(seen.method.as_str(), "GET" | "HEAD")).count()
}

/// Asserts that an empty cache directory gets the model without any byte from the Hub.
#[track_caller]
fn assert_on_remote(house: &House) {
    let before = house.hub.body_bytes();
    assert_model(&house.on("fresh").run(["get", REF]).path());
    assert_eq!(house.hub.body_bytes(), before, "the remote serves all bytes");
    assert_eq!(house.pending("fresh"), (0, 0));
    fs::remove_dir_all(house.path("fresh")).unwrap();
}

#[test]
fn an_upload_left_for_later_is_listed_and_completed() {
    let house = house();
    assert_model(&house.on("a").run(["get", REF, "--backfill", "later"]).path());
    assert_eq!((writes(&house), house.s3.keys(BUCKET)), (0, vec![]));
    assert_eq!(house.pending("a"), (1, model_bytes()));

    let listed = house.on("a").run(["backfill", "--dry-run", "--json"]).object();
    assert_eq!(listed["remote"], format!("s3://{BUCKET}/cache"));
    assert_eq!((&listed["files"], &listed["size"]), (&json!(4), &json!(model_bytes())));
    house.on("a").run(["stats"]).ok().stdout.lines().find(|line| line.contains("modelcache backfill")).unwrap();

    let done = house.on("a").run(["backfill", "--json"]).object();
    assert_eq!(done["outcome"], "done");
    assert_eq!(house.pending("a"), (0, 0));
    assert_eq!(files_below(&house.path("a/backfill")), Vec::<std::path::PathBuf>::new());
    assert_on_remote(&house);
    house.on("a").run(["backfill"]).ok().said(&["nothing to upload"]);
}

#[test]
fn backfill_never_uploads_nothing_and_leaves_no_pending_upload() {
    let house = house();
    house.on("a").env("MODEL_CACHE_BACKFILL", "never").run(["get", REF]).path();
    assert_eq!((writes(&house), house.pending("a")), (0, (0, 0)));
    house.on("a").run(["get", OTHER, "--backfill", "sometimes"]).failed(2, &["backfill", "sometimes"]);
}

#[test]
fn background_backfill_prints_the_path_first_and_uploads_before_it_exits() {
    let house = house();
    let struck = house.s3.faults().add(S3Fault::delay(Duration::from_secs(2)).method("PUT").on("claim").once());
    let mut get = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "30s").start(["get", REF, "--backfill", "background"]);
    let path = get.first_line();
    assert_eq!(manifests(&house), 0, "printed before the upload");
    assert_model(path.as_ref());
    assert_eq!(get.wait().code, Some(0));
    assert_eq!(struck.count(), 1);
    assert_eq!(house.pending("a"), (0, 0));
    assert_on_remote(&house);
}

#[test]
fn exec_does_not_wait_for_a_background_upload() {
    let house = house();
    house.on("a").run(["exec", REF, "--backfill", "background", "--", "true"]).ok();
    assert_eq!((writes(&house), house.pending("a").0), (0, 1));
    house.on("a").run(["exec", OTHER, "--", "true"]).ok();
    assert_eq!((manifests(&house), house.pending("a").0), (1, 1), "only its own upload precedes the command");
}

#[test]
fn a_killed_upload_is_completed_by_the_next_run_that_fetches_something() {
    let house = house();
    for mode in ["wait", "background"] {
        let held = S3Fault::delay(Duration::from_secs(600)).method("PUT").on("partNumber=1");
        let struck = house.s3.faults().add(held);
        let run = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m");
        let get = run.start(["get", REF, "--backfill", mode]);
        wait_until("the upload is under way", || struck.count() > 0 && !house.listed("a").is_empty());
        get.signal("KILL");
        get.wait();
        house.s3.faults().clear();
        house.end_claims();
        assert_eq!((manifests(&house), house.pending("a").0), (0, 1), "{mode}");

        house.s3.clear_requests();
        assert_model(&house.on("a").run(["get", REF]).path());
        assert_eq!(house.s3.requests().len(), 0, "a hit sends no request");
        assert_eq!(house.pending("a").0, 1, "{mode}");

        house.on("a").run(["get", OTHER]).path_saying(&["pending uploads of earlier runs", "1 artifact complete"]);
        assert_eq!(house.pending("a"), (0, 0));
        assert_on_remote(&house);
        house.on("a").run(["evict", REF, "--yes"]).ok();
        house.on("a").run(["evict", OTHER, "--yes"]).ok();
    }
}

#[test]
fn a_remote_that_was_down_receives_the_upload_when_it_is_back() {
    let house = house();
    house.s3.down(true);
    let run = || house.on("a").env("MODEL_CACHE_RETRY_DEADLINE", "100ms");
    assert_model(&run().run(["get", REF]).path());
    assert_eq!(house.pending("a").0, 1);
    run().run(["backfill"]).failed(7, &["remote"]);
    assert_eq!(house.pending("a").0, 1, "still pending");
    house.s3.down(false);
    run().run(["backfill"]).ok();
    assert_on_remote(&house);
}

#[test]
fn a_refused_upload_is_reported_once_and_not_retried() {
    let house = house();
    let refused = house.s3.faults().add(S3Fault::access_denied().method("PUT"));
    let got = house.on("a").run(["get", REF, OTHER]).ok().said(&["WARN", "s3:PutObject", BUCKET, "only read"]);
    assert_eq!(got.stderr.matches("WARN").count(), 1, "{got}");
    assert_eq!(refused.count(), 1, "one request");
    assert_eq!(house.pending("a").0, 2, "both stay pending");
    house.on("a").run(["put", "mine@1", house.write("mine", "m").to_str().unwrap()]).failed(4, &["s3:PutObject"]);
    assert_eq!(house.listed("a").iter().filter(|listed| listed.starts_with("mine")).count(), 0);
    house.on("a").run(["backfill"]).failed(4, &["s3:PutObject"]);
    house.s3.faults().clear();
    house.on("a").run(["backfill"]).ok();
    assert_on_remote(&house);
}

#[test]
fn a_remote_that_is_only_read_is_never_written() {
    let house = house();
    house.on("writer").run(["get", OTHER]).path();
    house.s3.clear_requests();
    let run = || house.on("a").env("MODEL_CACHE_REMOTE_MODE", "ro");
    let got = run().run(["get", REF, OTHER]).ok();
    assert!(!got.stderr.contains("WARN"), "{got}");
    assert_eq!(house.pending("a"), (0, 0));
    let file = house.write("mine", "m");
    run().run(["put", "mine@1", file.to_str().unwrap()]).failed(2, &["MODEL_CACHE_REMOTE_MODE=ro", "--remote none"]);
    run().run(["evict", OTHER]).failed(2, &["read-only", "--tier disk"]);
    run().run(["evict", OTHER, "--tier", "remote", "--dry-run"]).failed(2, &["--tier disk"]);
    run().run(["evict", OTHER, "--tier", "disk"]).ok();
    run().run(["backfill"]).failed(2, &["read-only"]);
    assert_eq!(writes(&house), 0);
    house.on("a").run(["--remote-mode", "ro", "put", "mine@1", "mine"]).failed(2, &["read-only"]);
    house.on("a").run(["put", "mine@1", "mine"]).ok();
}

#[test]
fn only_one_of_two_processes_uploads() {
    let house = house();
    house.on("a").run(["get", REF, "--backfill", "later"]).path();
    house.s3.clear_requests();
    house.s3.faults().add(S3Fault::delay(Duration::from_millis(300)).method("PUT").on("partNumber=1").once());
    let both = [0, 1].map(|_| house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "30s").start(["backfill"]));
    for run in both {
        run.wait().ok();
    }
    let began =
        house.s3.requests().iter().filter(|seen| seen.method == "POST" && seen.query.starts_with("uploads")).count();
    assert_eq!((began, manifests(&house), house.pending("a")), (1, 1, (0, 0)));
}

#[test]
fn a_misconfigured_remote_loses_no_pending_upload() {
    let house = house();
    house.on("a").run(["get", REF, OTHER, "--backfill", "later"]).ok();
    house.s3.faults().add(S3Fault::wrong_region("eu-west-1"));
    house.on("a").run(["backfill"]).failed(2, &["eu-west-1"]);
    house.s3.faults().clear();
    assert_eq!(house.pending("a").0, 2, "both stay");
    house.on("a").run(["backfill"]).ok();
    assert_on_remote(&house);
}

#[test]
fn evicting_an_artifact_removes_its_pending_upload() {
    let house = house();
    house.on("a").run(["get", REF, "--backfill", "later"]).path();
    let intent = house.path("a/backfill").join(&files_below(&house.path("a/backfill"))[0]);
    let kept = fs::read(&intent).unwrap();
    house.on("a").run(["evict", REF, "--tier", "disk"]).ok().said(&["WARN", "before the remote has all its files"]);
    assert_eq!(house.pending("a"), (0, 0));

    fs::write(&intent, kept).unwrap();
    house.on("a").run(["backfill"]).failed(3, &["left this disk before they were uploaded"]);
    house.on("a").run(["backfill"]).ok();
    assert_eq!(writes(&house), 0);
}

#[test]
fn an_upload_that_cannot_succeed_is_reported_and_dropped() {
    let house = house();
    house.write("origin/a/1/file", "of the origin");
    let other = house.write("other/file", "of somebody else");
    let template = format!("file://{}/{{name}}/{{version}}", house.path("origin").display());
    let run = || house.on("a").env("MODEL_CACHE_ORIGIN", &template);
    run().run(["get", "a@1", "--backfill", "later"]).path();
    house.on("b").run(["put", "a@1", other.parent().unwrap().to_str().unwrap()]).ok();
    run().run(["backfill"]).failed(1, &["other content"]);
    run().run(["backfill"]).ok();
    assert_eq!(house.pending("a"), (0, 0));
    assert_eq!(fs::read(run().run(["get", "a@1"]).path().join("file")).unwrap(), b"of the origin");
}

#[test]
fn a_pending_upload_for_another_remote_is_kept() {
    let house = house();
    house.on("a").run(["get", REF, "--backfill", "later"]).path();
    let elsewhere = format!("file://{}", house.path("elsewhere").display());
    let run = || house.on_local("a").env("MODEL_CACHE_REMOTE", &elsewhere);
    run().run(["backfill"]).ok().said(&["pending for another remote: 1 artifact"]);
    assert_eq!(house.pending("a").0, 1);
    house.on_local("a").run(["backfill"]).failed(2, &["no remote is configured"]);
    house.on("a").run(["backfill"]).ok();
    assert_on_remote(&house);
}
