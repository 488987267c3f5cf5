//! Several processes on one directory: they share one fill, and another process resumes the fill of a dead one.

use crate::common::*;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::proxy::ProxyFault;
use modelcache_testkit::{Content, FaultProxy};
use serde_json::json;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// Number of parts of the large file. One can be missing while the others are staged.
const PARTS: u64 = 5;
const PART: u64 = 4 * MIB;

fn large() -> Content {
    Content::generated(7, PARTS * PART - 1000)
}

fn house_with_large() -> House {
    let house = House::new();
    house.hub.repo("org/large").commit().lfs("large.bin", large()).file("config.json", "{}").publish().unwrap();
    house
}

fn run(house: &House, dir: &str) -> Run {
    house.on_local(dir).env("MODEL_CACHE_READ_TIMEOUT", "10m")
}

/// Starts a get and waits until all parts but the last one are in staging. That part stalls after its first MiB, on its
/// first and on its second connection. A third one is never opened.
fn stalled(house: &House) -> Running {
    let stall = HubFault::stall_at((PARTS - 1) * PART + MIB, Duration::from_secs(600)).on("large.bin");
    let stalls = house.hub.faults().add(stall);
    let running = run(house, "a").start(["get", "hf://org/large"]);
    wait_until("all parts but one are in staging", || house.marked_parts("a") == PARTS - 1);
    wait_until("both connections have stalled", || stalls.count() == 2);
    house.hub.faults().clear();
    running
}

fn assert_large(folder: &std::path::Path) {
    assert_same(&folder.join("large.bin"), &large());
}

#[test]
fn ten_processes_at_once_cost_one_fetch() {
    let house = house_with_large();
    let gets: Vec<Running> = (0..10).map(|_| run(&house, "a").start(["get", "hf://org/large"])).collect();
    for get in gets {
        assert_large(&get.wait().path());
    }
    assert_eq!(house.hub.body_bytes(), large().len() + 2, "each byte was fetched once");
    assert_eq!(house.staging("a"), Vec::<PathBuf>::new());
}

#[test]
fn after_a_kill_or_an_interrupt_only_the_part_in_flight_is_fetched_again() {
    for (signal, code, word) in
        [("KILL", None, ""), ("INT", Some(130), "interrupted"), ("TERM", Some(143), "terminated")]
    {
        let house = house_with_large();
        let running = stalled(&house);
        running.signal(signal);
        let outcome = running.wait().said(&[word]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (code, ""), "{outcome}");
        house.assert_no_artifact("a");
        let stats = run(&house, "a").run(["stats", "--json"]).object();
        assert!(stats["staging_bytes"].as_u64().unwrap() >= large().len(), "the staged bytes are counted: {stats}");
        // The file has its full size from the beginning, but the part in flight is not complete.
        let resumable = stats["resumable_bytes"].as_u64().unwrap();
        assert!((large().len() - PART..large().len()).contains(&resumable), "{resumable} of {}", large().len());

        house.hub.clear_requests();
        let got = run(&house, "a").run(["get", "hf://org/large", "--json"]).object();
        assert_large(&PathBuf::from(text(&got["path"])));
        assert!(house.hub.body_bytes() <= PART + 2, "{} bytes again after {signal}", house.hub.body_bytes());
        assert_eq!(got["bytes"]["origin"], json!(house.hub.body_bytes()), "{got}");
        assert!(got["bytes"]["disk"].as_u64().unwrap() >= large().len() - PART, "{got}");
        assert_eq!(house.staging("a"), Vec::<PathBuf>::new(), "nothing is left over");
    }
}

#[test]
fn a_get_of_fewer_files_keeps_the_staged_parts_of_a_larger_one() {
    let house = house_with_large();
    let running = stalled(&house);
    running.signal("KILL");
    running.wait();
    run(&house, "a").run(["get", "hf://org/large", "--include", "*.json"]).path();
    house.hub.clear_requests();
    assert_large(&run(&house, "a").run(["get", "hf://org/large"]).path());
    assert!(house.hub.body_bytes() <= PART, "{} bytes were fetched again", house.hub.body_bytes());
}

#[test]
fn staged_parts_of_a_killed_fill_are_verified_before_use() {
    let house = house_with_large();
    let running = stalled(&house);
    running.signal("KILL");
    running.wait();
    let folder = house.staging("a").remove(0);
    let staged =
        files_below(&folder).into_iter().find(|path| path.to_string_lossy().len() > 70 && path.extension().is_none());
    let staged = folder.join(staged.unwrap());
    // Writes zeroes into every part, as a power cut can. Without a ladder the part cannot be identified.
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(staged).unwrap();
    for part in 0..PARTS {
        file.write_all_at(&[0; 512], part * PART + PART / 2).unwrap();
    }
    let got = run(&house, "a").run(["get", "hf://org/large"]).said(&["earlier run is corrupt"]).path();
    assert_large(&got);
}

#[test]
fn with_a_ladder_only_the_torn_part_is_fetched_again() {
    let house = house_with_large();
    let on = |dir: &str| house.on(dir).env("MODEL_CACHE_READ_TIMEOUT", "10m");
    on("first").run(["get", "hf://org/large"]).path();
    house.hub.down(true);
    let commit = house.hub.repo("org/large").resolve("main").unwrap();
    let reference = format!("hf://org/large@{commit}");

    // Kills a slow fill from S3 that has staged some parts, with journal.
    let slow = FaultProxy::start_on(house.s3.endpoint(), 0).unwrap();
    slow.faults().add(ProxyFault::slow(100 << 10).after_skipping(4));
    let running = on("a").env("AWS_ENDPOINT_URL", slow.url()).start(["get", &reference]);
    wait_until("some parts are in staging", || house.marked_parts("a") >= 2);
    running.signal("KILL");
    running.wait();
    let before = house.marked_parts("a");
    assert!(before < PARTS, "killed too late");
    let folder = house.staging("a").remove(0);
    let journal = files_below(&folder).into_iter().find(|path| path.to_string_lossy().ends_with("parts")).unwrap();
    let marks = fs::read(folder.join(&journal)).unwrap();
    let torn = (0..).zip(&marks[16..]).find(|(_, mark)| **mark == b'1').unwrap().0 as u64;
    let staged = folder.join(journal.to_str().unwrap().strip_suffix(".parts").unwrap());
    use std::os::unix::fs::FileExt;
    File::options().write(true).open(staged).unwrap().write_all_at(&[0; 512], torn * PART + 77).unwrap();

    let got = on("a").run(["get", &reference, "--json"]).object();
    assert_large(&PathBuf::from(text(&got["path"])));
    let fetched = got["bytes"]["remote"].as_u64().unwrap();
    assert!(fetched <= (PARTS - before + 1) * PART + 2, "{fetched} bytes fetched, {before} parts staged, one torn");
    assert!(fetched >= PART - 1000, "the torn part was fetched again: {got}");
}

#[test]
fn a_waiter_resumes_the_fill_when_the_leader_is_killed() {
    let house = house_with_large();
    let leader = stalled(&house);
    let waiter = run(&house, "a").start(["get", "hf://org/large", "--json"]);
    std::thread::sleep(Duration::from_secs(2));
    let before = house.hub.body_bytes();
    leader.signal("KILL");
    let got = waiter.wait().object();
    assert_large(&PathBuf::from(text(&got["path"])));
    assert!(house.hub.body_bytes() - before <= PART + 2, "it reused the staged parts");
    assert!(got["seconds"]["join"].as_f64().unwrap() > 0.1, "it waited: {got}");
    leader.wait();
}

#[test]
fn a_waiter_reports_the_progress_of_the_leader() {
    let house = house_with_large();
    let leader = stalled(&house);
    let waiter = run(&house, "a").start(["get", "hf://org/large"]);
    std::thread::sleep(Duration::from_secs(4));
    waiter.signal("INT");
    let said = waiter.wait();
    assert!(said.stderr.contains("waiting for another download") && said.stderr.contains("of 21.0 MB"), "{said}");
    leader.signal("KILL");
    leader.wait();
}

#[test]
fn a_stopped_leader_is_replaced_and_does_no_harm_when_it_continues() {
    let house = house_with_large();
    let leader = stalled(&house);
    leader.signal("STOP");
    let lock = fs::read_dir(house.path("a/locks")).unwrap().map(|entry| entry.unwrap().path());
    let lock = lock.into_iter().find(|path| path.extension().is_some_and(|end| end == "fill")).unwrap();
    // Sets the last heartbeat of the leader to a minute ago.
    let long_ago = SystemTime::now() - Duration::from_secs(60);
    File::options().write(true).open(lock).unwrap().set_times(fs::FileTimes::new().set_modified(long_ago)).unwrap();

    let follower = run(&house, "a").run(["get", "hf://org/large"]).said(&["has stopped writing its heartbeat"]).path();
    assert_large(&follower);
    house.hub.faults().clear();
    leader.signal("CONT");
    leader.signal("KILL");
    leader.wait();
    assert_large(&run(&house, "a").run(["get", "hf://org/large"]).path_saying(&["on disk"]));
}

#[test]
fn leftovers_of_a_killed_fill_are_removed_before_a_published_artifact_is_evicted() {
    let house = house_with_large();
    house.hub.repo("org/small").commit().generated("s.bin", 3, 6 * MIB).publish().unwrap();
    house.hub.repo("org/other").commit().generated("o.bin", 4, 20 * MIB).publish().unwrap();
    let small = |args: &[&str]| run(&house, "a").env("MODEL_CACHE_MAX_BYTES", "40MiB").run(args);
    small(&["get", "hf://org/small"]).path();
    let running = stalled(&house);
    running.signal("KILL");
    running.wait();
    small(&["get", "hf://org/other"]).path();
    let left: Vec<String> = house.listed("a").iter().map(|name| name[..12].to_owned()).collect();
    assert_eq!(left, ["hf://org/oth", "hf://org/sma"], "nothing published had to go");
    assert_eq!(house.staging("a"), Vec::<PathBuf>::new());
}

/// Maps a file, prints `mapped`, waits for a line on standard input, and prints the SHA-256 of the mapped bytes.
const MAPPER: &str = r#"
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("mapped", flush=True)
sys.stdin.readline()
print(hashlib.sha256(mapped).hexdigest())
"#;

#[test]
fn a_mapped_or_open_file_keeps_its_bytes_without_a_lease() {
    let house = House::new();
    let (old, new) = (Content::generated(1, 3 * MIB), Content::generated(2, 3 * MIB));
    house.write("old/w.bin", old.clone());
    house.write("new/w.bin", new.clone());
    let run = |args: &[&str]| house.on_local("a").run(args);
    let replace: &[&str] = &["put", "m@1", "new", "--force"];
    let evict: &[&str] = &["evict", "m@1", "--tier", "disk", "--yes"];
    for fates in
        [[replace, &["prune"], evict], [evict, &["put", "m@1", "new"], &["prune", "--to", "0", "--only-copies"]]]
    {
        run(&["put", "m@1", "old"]).ok();
        let file = run(&["get", "m@1"]).path().join("w.bin");
        let mut open = File::open(&file).unwrap();
        let mut mapper = Command::new("python3")
            .args(["-c", MAPPER])
            .arg(&file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(mapper.stdout.take().unwrap()).lines();
        assert_eq!(said.next().unwrap().unwrap(), "mapped");
        fates.iter().for_each(|args| drop(run(args).ok()));
        assert!(!file.exists(), "the file is no longer in the cache");

        mapper.stdin.take().unwrap().write_all(b"go\n").unwrap();
        assert_eq!(said.next().unwrap().unwrap(), old.sha256().unwrap(), "{fates:?}");
        assert!(mapper.wait().unwrap().success());
        let mut bytes = Vec::new();
        open.read_to_end(&mut bytes).unwrap();
        assert!(bytes == old.to_vec().unwrap(), "{fates:?}");
        house.assert_consistent("a");
    }
}
