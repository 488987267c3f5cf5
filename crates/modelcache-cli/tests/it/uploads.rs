//! Uploads of large files while they are read or downloaded for the first time, and the clean-up after failures.

use crate::common::*;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::s3::S3Fault;
use serde_json::Value;
use std::fs;
use std::time::Duration;

const REF: &str = "hf://org/model";
/// Longer than any timeout of these tests.
const FOR_EVER: Duration = Duration::from_secs(600);

/// Content of three parts.
fn large() -> Content {
    Content::generated(7, 20 * MIB + 5)
}

/// An environment with a large file to put, and a repository with the same file.
fn house() -> House {
    let house = House::new();
    house.write("large.bin", large());
    house.hub.repo("org/model").commit().lfs("large.bin", large()).file("config.json", "{}").publish().unwrap();
    house
}

fn manifests(house: &House) -> usize {
    house.s3.keys(BUCKET).iter().filter(|key| key.ends_with("manifest.json")).count()
}

fn claims(house: &House) -> usize {
    house.s3.keys(BUCKET).iter().filter(|key| key.ends_with("claim")).count()
}

/// Returns the number of parts that the store accepted.
fn parts(house: &House) -> usize {
    let is_part = |seen: &&modelcache_testkit::LoggedRequest| seen.method == "PUT" && seen.query.contains("partNumber");
    house.s3.requests().iter().filter(is_part).filter(|seen| seen.status == 200).count()
}

/// Asserts that the bucket has no object of an artifact and no unfinished multipart upload.
#[track_caller]
fn assert_clean(house: &House) {
    assert_eq!(house.s3.uploads(BUCKET), [""; 0], "unfinished uploads");
    assert_eq!((house.published_keys(), manifests(house)), (vec![], 0));
}

/// Asserts that an empty cache directory gets the large file from the remote, and that no upload or claim is left.
#[track_caller]
fn assert_on_remote(house: &House, reference: &str) {
    assert_eq!((house.s3.uploads(BUCKET), claims(house)), (vec![], 0));
    let before = house.hub.body_bytes();
    let path = house.on("fresh").run(["get", reference]).path();
    assert_same(&if path.is_dir() { path.join("large.bin") } else { path }, &large());
    assert_eq!(house.hub.body_bytes(), before, "the remote serves it");
    fs::remove_dir_all(house.path("fresh")).unwrap();
}

#[test]
fn a_put_uploads_each_part_once_with_and_without_a_local_copy() {
    let house = house();
    for (n, options) in [&[][..], &["--tier", "remote"], &["--sidecar"]].into_iter().enumerate() {
        house.s3.clear_requests();
        let (dir, key) = (format!("a{n}"), format!("m{n}@1"));
        let put = [&["put", key.as_str(), "large.bin", "--json"], options].concat();
        let put = house.on(&dir).run(put).object();
        assert_eq!((&put["uploaded_bytes"], put["sha256"].as_str().unwrap().len()), (&large().len().into(), 64));
        assert_eq!(parts(&house), 3, "{options:?}");
        assert_on_remote(&house, &key);
        // An object that is on the remote is not uploaded again.
        house.s3.clear_requests();
        house.on(&dir).run(["put", &key, "large.bin"]).ok();
        assert_eq!((parts(&house), house.s3.uploads(BUCKET).len()), (0, 0));
    }
}

#[test]
fn more_large_files_than_parts_fit_into_memory_are_uploaded_together() {
    const FILES: u64 = 8;
    let house = House::new();
    let many = (0..FILES).map(|seed| (format!("{seed}.bin"), Content::generated(seed, 17 * MIB)));
    let commit = house.hub.repo("org/many").commit();
    many.fold(commit, |commit, (name, content)| commit.lfs(&name, content)).publish().unwrap();
    house.on("a").run(["get", "hf://org/many", "--backfill", "later"]).ok();
    house.on("a").run(["backfill"]).ok();
    assert_eq!((parts(&house) as u64, house.s3.uploads(BUCKET).len()), (3 * FILES, 0));
}

#[test]
fn equal_content_is_copied_and_other_content_of_equal_size_is_uploaded_in_one_pass() {
    let house = house();
    house.on("a").run(["put", "m@1", "large.bin"]).ok();
    house.s3.clear_requests();
    let copied = house.on("b").run(["put", "m@2", "large.bin", "--json"]).object();
    assert_eq!((&copied["copied_bytes"], parts(&house)), (&large().len().into(), 0));
    house.write("large.bin", Content::generated(8, large().len()));
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=1"));
    let put = house.on("c").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["put", "m@3", "large.bin"]);
    wait_until("a part is on its way", || held.count() > 0);
    let staged: u64 = house.staging("c").iter().map(|dir| files_below(dir).len() as u64).sum();
    assert!(staged > 0 && manifests(&house) == 2, "uploaded while it is staged");
    put.signal("KILL");
}

#[test]
fn the_next_put_on_the_machine_sweeps_a_killed_upload_without_waiting_for_its_claim() {
    let house = house();
    for options in [&[][..], &["--tier", "remote"]] {
        let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=2"));
        let put = || [&["put", "m@1", "large.bin"], options].concat();
        let killed = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(put());
        wait_until("a part is on its way", || held.count() > 0);
        killed.signal("KILL");
        assert_eq!(killed.wait().code, None);
        house.s3.faults().clear();
        assert_eq!(
            (house.s3.uploads(BUCKET), claims(&house), manifests(&house)),
            (vec!["cache/m/1/large.bin".into()], 1, 0)
        );
        // Waiting a minute for the end of the claim would exceed the time limit of a run.
        house.on("a").run(put()).ok();
        assert_on_remote(&house, "m@1");
        house.on("a").run(["evict", "m@1", "--yes"]).ok();
    }
}

#[test]
fn another_machine_finds_a_killed_upload_by_its_claim_or_by_listing_and_sweeps_it() {
    let house = house();
    for by_listing in [false, true] {
        let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=2"));
        let killed = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["put", "m@1", "large.bin"]);
        wait_until("a part is on its way", || held.count() > 0);
        killed.signal("KILL");
        killed.wait();
        house.s3.faults().clear();
        house.end_claims();
        if by_listing {
            // As if the writer had been killed before it recorded the upload in its claim.
            let path = house.s3.object_path(BUCKET, "cache/m/1/.modelcache/claim");
            let mut claim: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            claim.as_object_mut().unwrap().remove("uploads").unwrap();
            fs::write(&path, claim.to_string()).unwrap();
        } else {
            house.s3.faults().add(S3Fault::access_denied().method("GET").on("?uploads"));
        }
        house.on("b").run(["put", "m@1", "large.bin"]).ok();
        house.s3.faults().clear();
        assert_on_remote(&house, "m@1");
        house.on("b").run(["evict", "m@1", "--yes"]).ok();
    }
}

#[test]
fn an_interrupted_put_aborts_its_uploads() {
    let house = house();
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=2"));
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let before = held.count();
        let put = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["put", "m@1", "large.bin"]);
        wait_until("a part is on its way", || held.count() > before);
        put.signal(signal);
        assert_eq!(put.wait().code, Some(code));
        assert_clean(&house);
        house.assert_no_artifact_or_staging("a");
    }
}

#[test]
fn a_put_that_is_interrupted_after_reading_its_file_aborts_its_uploads() {
    let house = house();
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=2"));
    for options in [&[][..], &["--tier", "remote"]] {
        let before = held.count();
        let put = [&["put", "m@1", "large.bin"], options].concat();
        let put = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(put);
        wait_until("a part is on its way", || held.count() > before);
        // Within this time the file is read. The publish then waits for the part.
        std::thread::sleep(Duration::from_secs(1));
        put.signal("INT");
        assert_eq!(put.wait().code, Some(130));
        assert_clean(&house);
        house.assert_no_artifact_or_staging("a");
    }
}

#[test]
fn a_file_that_changes_while_a_put_reads_it_is_refused_and_nothing_is_left() {
    let house = house();
    // The file exceeds the limit on bytes in flight: its end is read only after the first parts are uploaded.
    for options in [&[][..], &["--tier", "remote"]] {
        let file = house.write("growing.bin", Content::generated(3, 80 * MIB));
        let slow =
            house.s3.faults().add(S3Fault::delay(Duration::from_secs(3)).method("PUT").on("partNumber").times(4));
        let put = [&["put", "m@1", "growing.bin"], options].concat();
        let put = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "30s").start(put);
        wait_until("a part is on its way", || slow.count() > 0);
        let file = fs::OpenOptions::new().append(true).open(file).unwrap();
        std::io::Write::write_all(&mut &file, b"more").unwrap();
        put.wait().failed(1, &["changed while it was being read", "put it again"]);
        house.s3.faults().clear();
        assert_clean(&house);
        house.assert_no_artifact_or_staging("a");
    }
}

#[test]
fn a_put_that_fails_during_the_upload_leaves_nothing_behind() {
    let house = house();
    house.s3.faults().add(S3Fault::error(400, "InvalidPart", "no").method("PUT").on("partNumber=2"));
    assert_ne!(house.on("a").run(["put", "m@1", "large.bin"]).code, Some(0));
    // An expired claim may remain.
    let there = house.published_keys().into_iter().filter(|key| !key.ends_with("claim"));
    assert_eq!((there.count(), house.s3.uploads(BUCKET)), (0, vec![]));
    house.assert_no_artifact_or_staging("a");
    house.s3.faults().clear();
    house.on("a").run(["put", "m@1", "large.bin"]).ok();
    assert_on_remote(&house, "m@1");
}

#[test]
fn a_put_for_which_the_disk_has_no_room_leaves_nothing_on_the_remote() {
    if !can_mount() {
        return;
    }
    let house = house();
    let dir = house.path("a").display().to_string();
    fs::create_dir_all(&dir).unwrap();
    let mount = format!("mount -t tmpfs -o size=12m none {dir}");
    let put = house.on("a").run_after(&mount, &["put", "m@1", house.path("large.bin").to_str().unwrap()]);
    put.failed(6, &[]);
    assert_clean(&house);
}

#[test]
fn two_concurrent_puts_both_succeed_with_equal_content_and_one_fails_otherwise() {
    let house = house();
    let both = ["a", "b"].map(|dir| house.on(dir).start(["put", "m@1", "large.bin"]));
    both.into_iter().for_each(|put| drop(put.wait().ok()));
    assert_on_remote(&house, "m@1");
    house.write("other.bin", Content::generated(9, 17 * MIB));
    let slow = S3Fault::delay(Duration::from_millis(500)).method("PUT").on("partNumber=1").once();
    house.s3.faults().add(slow);
    let both = [("a", "large.bin"), ("b", "other.bin")].map(|(dir, file)| house.on(dir).start(["put", "n@1", file]));
    let codes = both.map(|put| put.wait().code);
    assert!(codes == [Some(0), Some(1)] || codes == [Some(1), Some(0)], "{codes:?}");
    assert_eq!((house.s3.uploads(BUCKET), claims(&house), manifests(&house)), (vec![], 0, 2));
}

#[test]
fn a_file_is_uploaded_while_it_is_filled_and_a_killed_upload_is_swept() {
    let house = house();
    // One or two parts of the file stall, on every connection. The others are downloaded and uploaded.
    house.hub.faults().add(HubFault::stall(65_536, FOR_EVER).on("large.bin").after_skipping(4));
    let get = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["get", REF]);
    wait_until("a part has arrived", || parts(&house) > 0);
    assert_eq!((house.listed("a"), manifests(&house)), (vec![], 0), "it is still being filled");
    get.signal("KILL");
    get.wait();
    house.hub.faults().clear();
    assert_eq!(house.s3.uploads(BUCKET).len(), 1);
    house.on("a").run(["get", REF]).path();
    assert_eq!(house.pending("a"), (0, 0));
    assert_on_remote(&house, REF);
}

#[test]
fn a_fill_with_upload_transfers_each_byte_once() {
    let house = house();
    for mode in ["wait", "background"] {
        house.s3.clear_requests();
        let before = house.hub.body_bytes();
        let got = house.on("a").run(["get", REF, "--backfill", mode, "--json"]).object();
        assert_eq!(got["backfilled_bytes"], if mode == "wait" { large().len() + 2 } else { 0 });
        assert_eq!((house.hub.body_bytes() - before, parts(&house)), (large().len() + 2, 3), "{mode}");
        assert_on_remote(&house, REF);
        house.on("a").run(["evict", REF, "--yes"]).ok();
    }
}

#[test]
fn a_failing_upload_does_not_fail_the_get_and_is_completed_later() {
    let house = house();
    house.s3.faults().add(S3Fault::internal_error().method("PUT").on("partNumber=2"));
    let run = || house.on("a").env("MODEL_CACHE_RETRY_DEADLINE", "300ms");
    let path = run().run(["get", REF]).path_saying(&["WARN", "the upload to the remote failed"]);
    assert_same(&path.join("large.bin"), &large());
    assert_eq!((house.pending("a").0, manifests(&house), house.s3.uploads(BUCKET).len()), (1, 0, 0));
    house.s3.faults().clear();
    run().run(["backfill"]).ok();
    assert_eq!(house.pending("a"), (0, 0));
    assert_on_remote(&house, REF);
}

#[test]
fn a_slow_remote_does_not_hold_up_a_get_that_does_not_wait_for_it() {
    let house = house();
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber"));
    let run = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m");
    let mut get = run.start(["get", REF, "--backfill", "background"]);
    let path = get.first_line();
    assert_same(&std::path::Path::new(&path).join("large.bin"), &large());
    wait_until("a part is on its way", || held.count() > 0);
    assert_eq!((manifests(&house), house.pending("a").0), (0, 1));
    get.signal("KILL");
    get.wait();
}

#[test]
fn a_failing_get_aborts_its_uploads() {
    let house = house();
    house.hub.faults().add(HubFault::flip(12 * MIB).on("large.bin"));
    assert_eq!(house.on("a").run(["get", REF]).code, Some(5));
    assert_clean(&house);
    assert_eq!((claims(&house), house.pending("a")), (0, (0, 0)));
}

#[test]
fn a_file_that_is_downloaded_again_is_uploaded_again() {
    let house = house();
    house.hub.faults().add(HubFault::flip(12 * MIB).on("large.bin").once());
    // The abort of the first upload is still running when the second download is verified.
    house.s3.faults().add(S3Fault::delay(Duration::from_millis(500)).method("DELETE").on("uploadId"));
    house.on("a").run(["get", REF]).path();
    assert_eq!(house.pending("a"), (0, 0));
    assert_on_remote(&house, REF);
}

#[test]
fn few_open_files_are_enough_to_upload_many_files_during_a_fill() {
    if !can_mount() {
        return;
    }
    let house = House::new();
    let names: Vec<String> = (0..60).map(|n| format!("{n}.bin")).collect();
    let content = |n: usize| Content::generated(n as u64, 8 * MIB + 1);
    let commit = house.hub.repo("org/model").commit();
    let commit = names.iter().enumerate().fold(commit, |commit, (n, name)| commit.lfs(name, content(n)));
    commit.publish().unwrap();
    // No file is verified before all of them are downloaded.
    let patient = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "60s");
    let folder = patient.run_after("ulimit -n 96", &["get", REF]).path();
    names.iter().enumerate().for_each(|(n, name)| assert_same(&folder.join(name), &content(n)));
    assert_eq!((house.pending("a"), parts(&house)), ((0, 0), 2 * names.len()), "each part was uploaded once");
    assert_eq!((house.s3.uploads(BUCKET), claims(&house)), (vec![], 0));
}

#[test]
fn old_orphaned_uploads_of_modelcache_are_swept_and_no_others() {
    let house = house();
    let key = |name: &str| format!("cache/{name}/1/large.bin");
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=1"));
    let stalled_put = |name: &str| {
        let before = held.count();
        let run = house.on(name).env("MODEL_CACHE_READ_TIMEOUT", "10m");
        let put = run.start(["put", &format!("{name}@1"), "large.bin"]);
        wait_until("a part is on its way", || held.count() > before);
        put
    };
    for name in ["old", "young", "theirs"] {
        let put = stalled_put(name);
        put.signal("KILL");
        put.wait();
    }
    let live = stalled_put("live");
    // Without the claim, nothing shows that this upload is one of modelcache.
    house.s3.remove(BUCKET, "cache/theirs/1/.modelcache/claim").unwrap();
    for name in ["old", "theirs", "live"] {
        house.s3.age_uploads(&format!("/{name}/"), Duration::from_secs(25 * 3600));
    }
    let put = house.on("a").run(["put", "small@1", house.write("small", "x").to_str().unwrap()]).ok();
    put.said(&["aborted orphaned multipart uploads on the remote"]);
    assert_eq!(house.s3.uploads(BUCKET), [key("live"), key("theirs"), key("young")]);
    live.signal("KILL");
    live.wait();
}

#[test]
fn a_claim_names_uploads_and_no_secret() {
    let house = house();
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=1"));
    let put = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["put", "m@1", "large.bin"]);
    wait_until("a part is on its way", || held.count() > 0);
    let claim: Value =
        serde_json::from_slice(&house.s3.object(BUCKET, "cache/m/1/.modelcache/claim").unwrap()).unwrap();
    let named: Vec<_> = claim["uploads"].as_object().unwrap().values().cloned().collect();
    assert_eq!(named, ["large.bin"]);
    put.signal("KILL");
    put.wait();
}
