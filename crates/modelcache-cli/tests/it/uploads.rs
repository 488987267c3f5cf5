//! Sending large files: while they are read or filled for the first time, and what becomes of it when something fails.

use crate::common::*;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::s3::S3Fault;
use serde_json::Value;
use std::fs;
use std::time::Duration;

const REF: &str = "hf://org/model";
/// Longer than any test.
const FOR_EVER: Duration = Duration::from_secs(600);

/// Three parts.
fn large() -> Content {
    Content::generated(7, 20 * MIB + 5)
}

/// With a large file to be put, and a repository of one.
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

/// Parts that the store took.
fn parts(house: &House) -> usize {
    let is_part = |seen: &&modelcache_testkit::Seen| seen.method == "PUT" && seen.query.contains("partNumber");
    house.s3.requests().iter().filter(is_part).filter(|seen| seen.status == 200).count()
}

/// Nothing of an artifact is on the remote, neither to be seen nor hidden.
#[track_caller]
fn assert_clean(house: &House) {
    assert_eq!(house.s3.uploads(BUCKET), [""; 0], "unfinished uploads");
    assert_eq!((house.published_keys(), manifests(house)), (vec![], 0));
}

/// A machine that has nothing gets the large file from the remote.
#[track_caller]
fn assert_on_remote(house: &House, reference: &str) {
    assert_eq!((house.s3.uploads(BUCKET), claims(house)), (vec![], 0));
    let before = house.hub.body_bytes();
    let path = house.on("fresh").run(["get", reference]).path();
    assert_same(&if path.is_dir() { path.join("large.bin") } else { path }, &large());
    assert_eq!(house.hub.body_bytes(), before, "the remote has it");
    fs::remove_dir_all(house.path("fresh")).unwrap();
}

#[test]
fn a_put_sends_each_part_once_to_disk_and_remote_or_to_the_remote_alone() {
    let house = house();
    for (n, options) in [&[][..], &["--tier", "remote"], &["--sidecar"]].into_iter().enumerate() {
        house.s3.clear_requests();
        let (dir, key) = (format!("a{n}"), format!("m{n}@1"));
        let put = [&["put", key.as_str(), "large.bin", "--json"], options].concat();
        let put = house.on(&dir).run(put).object();
        assert_eq!((&put["uploaded_bytes"], put["sha256"].as_str().unwrap().len()), (&large().len().into(), 64));
        assert_eq!(parts(&house), 3, "{options:?}");
        assert_on_remote(&house, &key);
        // What is there already is not sent again.
        house.s3.clear_requests();
        house.on(&dir).run(["put", &key, "large.bin"]).ok();
        assert_eq!((parts(&house), house.s3.uploads(BUCKET).len()), (0, 0));
    }
}

#[test]
fn new_content_of_a_size_that_another_version_has_is_sent_in_one_pass_and_equal_content_is_copied() {
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
    assert!(staged > 0 && manifests(&house) == 2, "it is sent while it is staged");
    put.signal("KILL");
}

#[test]
fn the_next_put_on_the_machine_sweeps_what_a_killed_one_left_and_does_not_wait_for_its_claim() {
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
        // A minute's wait would be taken for a hang.
        house.on("a").run(put()).ok();
        assert_on_remote(&house, "m@1");
        house.on("a").run(["evict", "m@1", "--yes"]).ok();
    }
}

#[test]
fn another_machine_sweeps_what_a_killed_put_left_by_the_claims_word_or_by_looking() {
    let house = house();
    for by_looking in [false, true] {
        let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=2"));
        let killed = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["put", "m@1", "large.bin"]);
        wait_until("a part is on its way", || held.count() > 0);
        killed.signal("KILL");
        killed.wait();
        house.s3.faults().clear();
        house.end_claims();
        if by_looking {
            // As if it had been killed before it noted what it began.
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
fn an_interrupted_put_takes_back_what_it_began() {
    let house = house();
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=2"));
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let before = held.count();
        let put = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["put", "m@1", "large.bin"]);
        wait_until("a part is on its way", || held.count() > before);
        put.signal(signal);
        assert_eq!(put.wait().code, Some(code));
        assert_clean(&house);
        house.assert_nothing("a");
    }
}

#[test]
fn a_put_that_is_interrupted_when_all_is_read_takes_back_what_it_began() {
    let house = house();
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=2"));
    for options in [&[][..], &["--tier", "remote"]] {
        let before = held.count();
        let put = [&["put", "m@1", "large.bin"], options].concat();
        let put = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(put);
        wait_until("a part is on its way", || held.count() > before);
        // The file is read within this time, and the publish waits for the part.
        std::thread::sleep(Duration::from_secs(1));
        put.signal("INT");
        assert_eq!(put.wait().code, Some(130));
        assert_clean(&house);
        house.assert_nothing("a");
    }
}

#[test]
fn a_file_that_changes_while_a_put_reads_it_is_refused_and_nothing_is_left() {
    let house = house();
    // More than may be on its way: the end of it is not read before the first parts have arrived.
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
        house.assert_nothing("a");
    }
}

#[test]
fn a_put_that_the_remote_fails_in_its_midst_leaves_nothing_anywhere() {
    let house = house();
    house.s3.faults().add(S3Fault::error(400, "InvalidPart", "no").method("PUT").on("partNumber=2"));
    assert_ne!(house.on("a").run(["put", "m@1", "large.bin"]).code, Some(0));
    // But for a claim that has ended.
    let there = house.published_keys().into_iter().filter(|key| !key.ends_with("claim"));
    assert_eq!((there.count(), house.s3.uploads(BUCKET)), (0, vec![]));
    house.assert_nothing("a");
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
fn of_two_puts_at_once_both_succeed_with_one_content_and_one_with_two() {
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
fn what_is_filled_is_sent_meanwhile_and_what_a_kill_leaves_is_swept() {
    let house = house();
    // One range of the file stalls; the others come, and go on.
    house.hub.faults().add(HubFault::stall(65_536, FOR_EVER).on("large.bin").once());
    let get = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["get", REF]);
    wait_until("a part has arrived", || parts(&house) > 0);
    assert_eq!((house.listed("a"), manifests(&house)), (vec![], 0), "it is still being filled");
    get.signal("KILL");
    get.wait();
    assert_eq!(house.s3.uploads(BUCKET).len(), 1);
    house.on("a").run(["get", REF]).path();
    assert_eq!(house.pending("a"), (0, 0));
    assert_on_remote(&house, REF);
}

#[test]
fn a_fill_that_is_sent_meanwhile_is_fetched_and_sent_once() {
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
fn a_remote_that_fails_while_it_is_sent_costs_the_get_nothing_and_gets_it_later() {
    let house = house();
    house.s3.faults().add(S3Fault::internal_error().method("PUT").on("partNumber=2"));
    let run = || house.on("a").env("MODEL_CACHE_RETRY_DEADLINE", "300ms");
    let path = run().run(["get", REF]).path_saying(&["WARN", "could not be written to the remote"]);
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
fn a_get_that_fails_takes_back_what_was_sent_meanwhile() {
    let house = house();
    house.hub.faults().add(HubFault::flip(12 * MIB).on("large.bin"));
    assert_eq!(house.on("a").run(["get", REF]).code, Some(5));
    assert_clean(&house);
    assert_eq!((claims(&house), house.pending("a")), (0, (0, 0)));
}

#[test]
fn a_file_that_is_filled_anew_is_sent_as_it_is_then() {
    let house = house();
    house.hub.faults().add(HubFault::flip(12 * MIB).on("large.bin").once());
    // What was sent of the first is still being taken back when the second is proven.
    house.s3.faults().add(S3Fault::delay(Duration::from_millis(500)).method("DELETE").on("uploadId"));
    house.on("a").run(["get", REF]).path();
    assert_eq!(house.pending("a"), (0, 0));
    assert_on_remote(&house, REF);
}

#[test]
fn few_open_files_are_enough_to_send_many_meanwhile() {
    if !can_mount() {
        return;
    }
    let house = House::new();
    let names: Vec<String> = (0..60).map(|n| format!("{n}.bin")).collect();
    let content = |n: usize| Content::generated(n as u64, 8 * MIB + 1);
    let commit = house.hub.repo("org/model").commit();
    let commit = names.iter().enumerate().fold(commit, |commit, (n, name)| commit.lfs(name, content(n)));
    commit.publish().unwrap();
    // None of them is known to be right before all are there.
    let patient = house.on("a").env("MODEL_CACHE_READ_TIMEOUT", "60s");
    let folder = patient.run_after("ulimit -n 96", &["get", REF]).path();
    names.iter().enumerate().for_each(|(n, name)| assert_same(&folder.join(name), &content(n)));
    assert_eq!((house.pending("a"), parts(&house)), ((0, 0), 2 * names.len()), "each part was sent once");
    assert_eq!((house.s3.uploads(BUCKET), claims(&house)), (vec![], 0));
}

#[test]
fn old_unfinished_uploads_of_ours_are_swept_and_no_others() {
    let house = house();
    let key = |name: &str| format!("cache/{name}/1/large.bin");
    let held = house.s3.faults().add(S3Fault::delay(FOR_EVER).method("PUT").on("partNumber=1"));
    let hang = |name: &str| {
        let before = held.count();
        let run = house.on(name).env("MODEL_CACHE_READ_TIMEOUT", "10m");
        let put = run.start(["put", &format!("{name}@1"), "large.bin"]);
        wait_until("a part is on its way", || held.count() > before);
        put
    };
    for name in ["old", "young", "theirs"] {
        let put = hang(name);
        put.signal("KILL");
        put.wait();
    }
    let live = hang("live");
    // Nothing says that this one is ours.
    house.s3.remove(BUCKET, "cache/theirs/1/.modelcache/claim").unwrap();
    for name in ["old", "theirs", "live"] {
        house.s3.age_uploads(&format!("/{name}/"), Duration::from_secs(25 * 3600));
    }
    let put = house.on("a").run(["put", "small@1", house.write("small", "x").to_str().unwrap()]).ok();
    put.said(&["left unfinished on the remote long ago"]);
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
