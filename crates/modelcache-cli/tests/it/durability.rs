//! Published before it is durable: who waits, who does not, and what is trusted while nobody knows.
//!
//! A gate in the fault shim holds every sync back, so that what lies between publishing and durability can be looked at
//! for as long as a test likes.

use crate::common::order::State;
use crate::common::*;
use modelcache_testkit::folder::syncing;
use modelcache_testkit::{Content, Errno, Shim, Strike};
use std::fs::{self, FileTimes, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

const MODEL: &str = "hf://org/model";
const WEIGHTS: &str = "model.safetensors";

/// A house, the shim, and the cache directory `a` in it.
struct Bench {
    house: House,
    shim: Shim,
    commit: String,
}

/// The gate is opened when this is dropped, so that a test that fails leaves no process at it.
struct Gate(PathBuf);

impl Gate {
    fn open(&self) {
        fs::write(&self.0, "").unwrap();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = fs::write(&self.0, "");
    }
}

impl Bench {
    fn new() -> Option<Self> {
        let shim = shim()?;
        let (house, commit) = House::with_model();
        // The directory is marked as ours durably, before the gate is closed.
        house.on_local("a").run(["stats"]).ok();
        Some(Self { house, shim, commit })
    }

    fn root(&self) -> PathBuf {
        self.house.path("a")
    }

    fn gate(&self, name: &str) -> Gate {
        Gate(self.house.path(name))
    }

    /// A run that does not wait for the disk.
    fn on(&self) -> Run {
        self.house.on_local("a").without("MODEL_CACHE_DURABLE")
    }

    fn behind(&self, gate: &Gate) -> Strike {
        self.shim.count(&self.root()).gated(&gate.0)
    }

    fn get(&self) -> PathBuf {
        self.on().run(["get", MODEL]).path()
    }

    fn manifest(&self, commit: &str) -> serde_json::Value {
        let path = self.root().join("artifacts/hf%2Forg%2Fmodel").join(commit).join("manifest.json");
        let text = fs::read(path).unwrap_or_else(|_| b"null".into());
        serde_json::from_slice(&text).unwrap()
    }

    /// How many files of the model bear a mark.
    fn marked(&self, commit: &str) -> usize {
        self.manifest(commit).to_string().matches("\"unsynced\"").count()
    }

    fn wait_until_durable(&self) {
        wait_until("nobody owes anything", || self.owing().is_empty());
    }

    /// Processes that make something durable in this directory.
    fn owing(&self) -> Vec<u32> {
        syncing(&self.root()).unwrap()
    }

    /// Kills whoever owes something, and waits until it is gone.
    fn kill_owing(&self) {
        let pids = self.owing();
        assert_eq!(pids.len(), 1, "one process has the duty");
        let status = std::process::Command::new("kill").args(["-KILL", &pids[0].to_string()]).status();
        assert!(status.unwrap().success());
        self.wait_until_durable();
    }

    /// The files of the model are right, and known to be durable.
    #[track_caller]
    fn assert_settled(&self) {
        assert_eq!(self.marked(&self.commit), 0, "{}", self.manifest(&self.commit));
        assert_model(&self.get());
        self.house.assert_in_order("a");
        assert_eq!(fs::read_dir(self.root().join("unsynced")).unwrap().count(), 0, "a list of duties is left");
    }
}

/// Other bytes under the same inode, size and time, as a medium that lost a write would have them.
fn spoil(path: &Path) {
    let metadata = fs::metadata(path).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5_000_000).unwrap();
    file.write_all_at(&[!byte[0]], 5_000_000).unwrap();
    file.set_times(FileTimes::new().set_modified(metadata.modified().unwrap())).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o444)).unwrap();
}

fn is_right(path: &Path) -> bool {
    fs::read(path).unwrap() == big().to_vec().unwrap()
}

#[test]
fn a_get_returns_before_its_files_are_durable_and_a_process_apart_makes_them_so() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    // That this ends says that no pipe of the caller's is held by whoever stays.
    let path = bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    assert_model(&path);
    assert_eq!(bench.marked(&bench.commit), 4, "every file bears the mark");
    let owing = bench.owing();
    assert_eq!(owing.len(), 1, "the parent is gone, and its child is at it");
    let session = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        text.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap().to_owned()
    };
    assert_ne!(session(owing[0]), session(std::process::id()), "a hangup of the terminal does not reach it");
    gate.open();
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn what_a_caller_has_open_is_not_kept_open_by_who_makes_files_durable() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let lock = bench.house.write("lock", "");
    let script = format!("exec 9<'{}'; flock 9; {BIN} get {MODEL}", lock.display());
    bench.on().envs(bench.behind(&gate).envs()).shell(&script).path();
    assert_eq!(bench.owing().len(), 1);
    let free = fs::File::open(&lock).unwrap().try_lock();
    assert!(free.is_ok(), "the caller's lock has fallen with the caller: {free:?}");
    gate.open();
    bench.wait_until_durable();
}

#[test]
fn a_lender_trusts_what_a_living_writer_published_and_reads_what_a_dead_one_left() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let path = bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    let weights = path.join(WEIGHTS);
    spoil(&weights);
    bench.on().run(["get", MODEL]).path_saying(&["on disk"]);
    assert!(!is_right(&weights), "nothing was read while the writer lives");
    bench.kill_owing();
    bench.on().run(["get", MODEL]).path_saying(&["is not what it was", "from origin"]);
    assert!(is_right(&weights), "what a dead writer left is read in full");
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn what_a_dead_writer_left_and_is_right_is_read_once_and_durable_from_then_on() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    bench.kill_owing();
    bench.house.hub.clear_requests();
    let count = bench.shim.count(&bench.root());
    bench.on().envs(count.envs()).run(["get", MODEL]).path_saying(&["read in full", "on disk"]);
    assert_eq!(bench.house.hub.body_bytes(), 0, "nothing was fetched");
    let synced = count.calls().iter().filter(|call| call.name == "fdatasync").count();
    assert_eq!(synced, 4, "each file");
    assert_eq!(bench.marked(&bench.commit), 0);
    let again = bench.on().run(["get", MODEL]).ok();
    assert!(!again.stderr.contains("read in full"), "{again}");
    bench.house.assert_in_order("a");
    assert_eq!(fs::read_dir(bench.root().join("unsynced")).unwrap().count(), 0, "the dead writer's list is swept");
}

#[test]
fn after_a_reboot_a_mark_is_worth_nothing_though_its_lock_is_held() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let path = bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    spoil(&path.join(WEIGHTS));
    let boot = bench.house.write("boot", "another boot\n");
    let strike = bench.shim.count(&bench.root()).in_boot(&boot);
    bench.on().envs(strike.envs()).run(["get", MODEL]).path_saying(&["is not what it was"]);
    assert!(is_right(&path.join(WEIGHTS)));
    gate.open();
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn whoever_shares_a_file_that_is_not_durable_yet_owes_it_too() {
    let Some(bench) = Bench::new() else { return };
    let (first, second) = (bench.gate("first"), bench.gate("second"));
    bench.on().envs(bench.behind(&first).envs()).run(["get", MODEL]).path();
    let next = bench.house.hub.repo("org/model").commit().file("README.md", "new").publish().unwrap();
    let reference = format!("{MODEL}@{next}");
    let strike = bench.behind(&second);
    bench.house.hub.clear_requests();
    let path = bench.on().envs(strike.envs()).run(["get", &reference]).path();
    assert_eq!(bench.house.hub.body_bytes(), 3, "a living writer's file is shared without being read or fetched");
    assert_eq!(bench.marked(&next), 5, "all of them bear the sharer's mark");
    assert_eq!(bench.owing().len(), 2);
    second.open();
    wait_until("the sharer is done", || bench.owing().len() == 1);
    let synced = |name: &str| strike.calls().iter().any(|call| call.name == "fdatasync" && call.path.ends_with(name));
    assert!(synced(WEIGHTS) && synced("README.md"), "the shared one, too: {:?}", strike.calls());
    assert_eq!(bench.marked(&next), 0);
    assert_eq!(bench.marked(&bench.commit), 4, "that is the sharer's word, not the writer's");
    bench.kill_owing();

    // The power is cut: what nobody synced comes back as other bytes.
    spoil(&path.join(WEIGHTS));
    let old = bench.on().run(["get", &format!("{MODEL}@{}", bench.commit)]).path_saying(&["is not what it was"]);
    assert!(is_right(&old.join(WEIGHTS)));
    let new = bench.on().run(["get", &reference]).path();
    assert!(is_right(&new.join(WEIGHTS)), "found in one artifact, it is withdrawn in both");
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn durable_waits_and_so_does_a_hit_on_what_another_process_owes() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let strike = bench.behind(&gate);
    let waiting = bench.on().envs(strike.envs()).start(["get", "--durable", MODEL]);
    wait_until("a file is synced", || strike.calls().iter().any(|call| call.name == "fdatasync"));
    assert_eq!(bench.owing(), [0u32; 0], "nobody but the caller does it");
    assert_eq!(bench.marked(&bench.commit), 4);
    gate.open();
    waiting.wait().path();
    assert_eq!(bench.marked(&bench.commit), 0);

    bench.house.on_local("a").run(["evict", MODEL, "--tier", "disk", "--yes"]).ok();
    let other = bench.gate("other");
    bench.on().envs(bench.behind(&other).envs()).run(["get", MODEL]).path();
    bench.on().run(["get", "--durable", MODEL]).path_saying(&["on disk"]);
    assert_eq!(bench.marked(&bench.commit), 0, "while the one that owes it has not begun");
    other.open();
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn put_prewarm_and_folders_of_ones_own_wait() {
    let Some(bench) = Bench::new() else { return };
    for (path, content) in model() {
        bench.house.write(&format!("mine/{path}"), content);
    }
    let put = bench.on().envs(bench.shim.count(&bench.root()).envs()).run(["put", "mine@1", "mine"]).ok();
    assert_eq!(bench.owing(), [0u32; 0], "{put}");
    let manifest = fs::read_to_string(bench.root().join("artifacts/mine/1/manifest.json")).unwrap();
    assert!(!manifest.contains("unsynced"));

    bench.on().run(["prewarm", MODEL]).ok();
    assert_eq!((bench.owing().len(), bench.marked(&bench.commit)), (0, 0));

    // What lies in the folder is synced before the folder is in its place.
    let count = bench.shim.count(bench.root().parent().unwrap());
    let run = bench.house.on_local("b").without("MODEL_CACHE_DURABLE").envs(count.envs());
    run.run(["get", MODEL, "--into", "out"]).path();
    let calls = count.calls();
    let synced = calls.iter().rposition(|call| call.name == "fdatasync" && call.path.ends_with(WEIGHTS)).unwrap();
    let placed = calls.iter().position(|call| call.name.starts_with("rename") && call.path.ends_with("out")).unwrap();
    assert!(synced < placed, "{calls:?}");
}

#[test]
fn a_little_is_made_durable_at_once() {
    let Some(bench) = Bench::new() else { return };
    bench.on().run(["get", MODEL, "--include", "*.json"]).path();
    assert_eq!((bench.owing().len(), bench.marked(&bench.commit)), (0, 0));
}

#[test]
fn process_one_makes_it_durable_before_it_ends() {
    if !can_mount() {
        return;
    }
    let Some(bench) = Bench::new() else { return };
    let script = format!("exec unshare -pf --mount-proc {BIN} get {MODEL}");
    bench.on().shell(&script).path();
    assert_eq!((bench.owing().len(), bench.marked(&bench.commit)), (0, 0));
}

#[test]
fn a_command_is_run_at_once_has_no_strange_child_and_alone_holds_the_lease() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let script = r#"read children < /proc/$$/task/$$/children; echo "children: $children""#;
    let run = bench.on().envs(bench.behind(&gate).envs());
    let outcome = run.run(["exec", MODEL, "--", "sh", "-c", script]).ok();
    assert_eq!(outcome.stdout, "children: \n");
    assert_eq!((bench.owing().len(), bench.marked(&bench.commit)), (1, 4), "it ran before anything was durable");
    bench.house.on_local("a").run(["evict", MODEL, "--tier", "disk", "--yes"]).ok();
    gate.open();
    bench.wait_until_durable();
    assert_eq!(bench.house.state("a"), State::new(), "what was evicted meanwhile does not come back");
    bench.house.assert_in_order("a");
}

#[test]
fn a_file_that_the_disk_did_not_take_is_withdrawn_and_fetched_again() {
    let Some(bench) = Bench::new() else { return };
    let strike = bench.shim.fail_at(&bench.root(), 1, Errno::EIO).of("fdatasync");
    bench.on().envs(strike.envs()).run(["get", MODEL]).path();
    bench.wait_until_durable();
    let held = bench.house.state("a").into_values().map(|files| files.len()).sum::<usize>();
    assert_eq!(held, 3, "one of four is not held any more");
    assert_eq!(bench.marked(&bench.commit), 0, "the others are durable");
    bench.house.hub.clear_requests();
    assert_model(&bench.get());
    assert!(bench.house.hub.body_bytes() > 0, "it was fetched again, not taken from what the disk refused");
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn a_directory_that_vanishes_ends_the_process_and_does_not_come_back() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let behind = bench.behind(&gate);
    bench.on().envs(behind.envs()).run(["get", MODEL]).path();
    assert_eq!(bench.owing().len(), 1);
    // Before that it makes names of its own, which a removal under way may meet.
    let is_at_gate = || behind.calls().iter().any(|call| call.name.contains("sync"));
    wait_until("whoever owes waits at the gate", is_at_gate);
    fs::remove_dir_all(bench.root()).unwrap();
    gate.open();
    bench.wait_until_durable();
    assert!(!bench.root().exists());
}

/// Far more files than are synced one by one.
const MANY: usize = 200;

fn many(house: &House) -> String {
    let commit = house.hub.repo("org/model").commit();
    let name = |n: usize| format!("layer-{:02}/{n}.bin", n % 10);
    let commit = (0..MANY).fold(commit, |commit, n| commit.file(&name(n), Content::generated(n as u64, 30_000)));
    commit.publish().unwrap()
}

#[test]
fn many_files_are_synced_at_once() {
    let Some(bench) = Bench::new() else { return };
    let commit = many(&bench.house);
    let count = bench.shim.count(&bench.root());
    bench.on().envs(count.envs()).run(["get", MODEL, "--durable"]).path();
    let calls = count.calls();
    let named = |name: &str| calls.iter().filter(|call| call.name == name).count();
    assert_eq!((named("syncfs"), named("fdatasync"), bench.marked(&commit)), (1, 0, 0), "one for all of them");
    assert!(named("fsync") < 20, "{} more", named("fsync"));
}

#[test]
fn many_files_that_a_dead_writer_left_are_recorded_at_once() {
    let Some(bench) = Bench::new() else { return };
    let (commit, gate) = (many(&bench.house), bench.gate("gate"));
    bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    bench.kill_owing();
    assert_eq!(bench.marked(&commit), MANY + 4);
    let count = bench.shim.count(&bench.root());
    bench.on().envs(count.envs()).run(["get", MODEL]).path_saying(&["on disk"]);
    let manifests = |name: &str| name.starts_with("rename");
    let written =
        count.calls().iter().filter(|call| manifests(&call.name) && call.path.ends_with("manifest.json")).count();
    assert_eq!((written, bench.marked(&commit)), (1, 0));
}

#[test]
fn small_files_that_a_power_cut_tore_count_as_absent() {
    let Some(bench) = Bench::new() else { return };
    bench.on().run(["get", MODEL, "--durable"]).path();
    bench.house.on_local("a").run(["pin", MODEL]).ok();
    let hints = ["refs", "locks", "backfill", "unsynced"].map(|name| bench.root().join(name));
    bench.house.write("a/backfill/0123456789abcdef0123456789abcdef", "{\"format\":1}");
    bench.house.write("a/unsynced/x", "{}");
    for zeros in [0, 7, 512] {
        for path in hints.iter().flat_map(|folder| files_below(folder).into_iter().map(move |path| folder.join(path))) {
            fs::write(path, vec![0; zeros]).unwrap();
        }
        assert_model(&bench.get());
        bench.house.assert_counted("a");
        bench.on().run(["backfill", "--dry-run"]).ok();
        let manifest = bench.root().join("artifacts/hf%2Forg%2Fmodel").join(&bench.commit).join("manifest.json");
        fs::write(&manifest, vec![0; zeros]).unwrap();
        bench.house.hub.clear_requests();
        assert_model(&bench.house.on_local("a").run(["get", MODEL]).path());
        // Of the small ones the Hub tells no SHA-256 to find them by.
        assert_eq!(bench.house.hub.body_bytes(), 16, "the blobs are found by their digests");
    }
}
