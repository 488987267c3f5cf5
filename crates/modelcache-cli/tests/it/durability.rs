//! Durability: artifacts are published before they are on stable storage. The tests cover waiting, and trust in such
//! files.
//!
//! A gate in the fault shim holds back every sync, so that a test can inspect the state between publishing and
//! durability for as long as it needs.

use crate::common::order::State;
use crate::common::*;
use modelcache_testkit::folder::syncing;
use modelcache_testkit::{Content, Errno, Shim, Strike};
use std::fs::{self, FileTimes, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

const MODEL: &str = "hf://org/model";
const WEIGHTS: &str = "model.safetensors";

/// An environment with the cache directory `a`, and the fault shim.
struct Bench {
    house: House,
    shim: Shim,
    commit: String,
}

/// The file that opens a gate. The gate also opens on drop, so that a failing test leaves no process waiting at it.
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
        // Creates the directory, with all syncs that belong to it, before a gate is closed.
        house.on_local("a").run(["stats"]).ok();
        Some(Self { house, shim, commit })
    }

    fn root(&self) -> PathBuf {
        self.house.path("a")
    }

    fn gate(&self, name: &str) -> Gate {
        Gate(self.house.path(name))
    }

    /// A run that does not wait for the disk, unlike those of the other tests.
    fn on(&self) -> Run {
        self.house.on_local("a").without("MODEL_CACHE_DURABLE")
    }

    /// Settings for a run with every sync held back until `gate` opens.
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

    /// Returns the number of files that the manifest marks as unsynced.
    fn marked(&self, commit: &str) -> usize {
        self.manifest(commit).to_string().matches("\"unsynced_by\"").count()
    }

    fn wait_until_durable(&self) {
        wait_until("no process is syncing", || self.syncing_pids().is_empty());
    }

    /// Returns the processes that are syncing files of this directory.
    fn syncing_pids(&self) -> Vec<u32> {
        syncing(&self.root()).unwrap()
    }

    /// Kills the process that is syncing, and waits until it has ended.
    fn kill_syncing(&self) {
        let pids = self.syncing_pids();
        assert_eq!(pids.len(), 1, "exactly one process syncs");
        let status = std::process::Command::new("kill").args(["-KILL", &pids[0].to_string()]).status();
        assert!(status.unwrap().success());
        self.wait_until_durable();
    }

    /// Asserts that the files of the model are right and recorded as durable.
    #[track_caller]
    fn assert_settled(&self) {
        assert_eq!(self.marked(&self.commit), 0, "{}", self.manifest(&self.commit));
        assert_model(&self.get());
        self.house.assert_consistent("a");
        assert_eq!(fs::read_dir(self.root().join("unsynced")).unwrap().count(), 0, "a list of unsynced files is left");
    }
}

/// Changes a byte and keeps inode, size and time, as after a write that the medium has lost.
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
fn a_get_returns_before_its_files_are_durable_and_a_child_process_syncs_them() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    // The run ends only when its pipes are closed, so the child process that stays does not hold them.
    let path = bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    assert_model(&path);
    assert_eq!(bench.marked(&bench.commit), 4, "every file is marked");
    let syncing_pids = bench.syncing_pids();
    assert_eq!(syncing_pids.len(), 1, "the parent has ended, and its child syncs");
    let session = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        text.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap().to_owned()
    };
    assert_ne!(session(syncing_pids[0]), session(std::process::id()), "a hangup of the terminal does not reach it");
    gate.open();
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn the_syncing_process_keeps_no_file_of_the_caller_open() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let lock = bench.house.write("lock", "");
    let script = format!("exec 9<'{}'; flock 9; {BIN} get {MODEL}", lock.display());
    bench.on().envs(bench.behind(&gate).envs()).shell(&script).path();
    assert_eq!(bench.syncing_pids().len(), 1);
    let free = fs::File::open(&lock).unwrap().try_lock();
    assert!(free.is_ok(), "the caller's lock ended with the caller: {free:?}");
    gate.open();
    bench.wait_until_durable();
}

#[test]
fn a_hit_trusts_files_of_a_live_writer_and_hashes_files_of_a_dead_one() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let path = bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    let weights = path.join(WEIGHTS);
    spoil(&weights);
    bench.on().run(["get", MODEL]).path_saying(&["on disk"]);
    assert!(!is_right(&weights), "files of a live writer are not hashed");
    bench.kill_syncing();
    bench.on().run(["get", MODEL]).path_saying(&["was changed or damaged", "from origin"]);
    assert!(is_right(&weights), "files of a dead writer are hashed");
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn intact_files_of_a_dead_writer_are_hashed_once_and_then_durable() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    bench.kill_syncing();
    bench.house.hub.clear_requests();
    let count = bench.shim.count(&bench.root());
    bench.on().envs(count.envs()).run(["get", MODEL]).path_saying(&["read in full", "on disk"]);
    assert_eq!(bench.house.hub.body_bytes(), 0, "nothing was fetched");
    let synced = count.calls().iter().filter(|call| call.name == "fdatasync").count();
    assert_eq!(synced, 4, "each file");
    assert_eq!(bench.marked(&bench.commit), 0);
    let again = bench.on().run(["get", MODEL]).ok();
    assert!(!again.stderr.contains("read in full"), "{again}");
    bench.house.assert_consistent("a");
    assert_eq!(fs::read_dir(bench.root().join("unsynced")).unwrap().count(), 0, "the dead writer's list is swept");
}

#[test]
fn after_a_reboot_unsynced_files_are_hashed_even_if_the_lock_is_held() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let path = bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    spoil(&path.join(WEIGHTS));
    let boot = bench.house.write("boot", "another boot\n");
    let strike = bench.shim.count(&bench.root()).in_boot(&boot);
    bench.on().envs(strike.envs()).run(["get", MODEL]).path_saying(&["was changed or damaged"]);
    assert!(is_right(&path.join(WEIGHTS)));
    gate.open();
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn a_get_that_shares_an_unsynced_file_syncs_it_too() {
    let Some(bench) = Bench::new() else { return };
    let (first, second) = (bench.gate("first"), bench.gate("second"));
    bench.on().envs(bench.behind(&first).envs()).run(["get", MODEL]).path();
    let next = bench.house.hub.repo("org/model").commit().file("README.md", "new").publish().unwrap();
    let reference = format!("{MODEL}@{next}");
    let strike = bench.behind(&second);
    bench.house.hub.clear_requests();
    let path = bench.on().envs(strike.envs()).run(["get", &reference]).path();
    assert_eq!(bench.house.hub.body_bytes(), 3, "a live writer's file is shared without hashing or fetching");
    assert_eq!(bench.marked(&next), 5, "the second get marks all of its files");
    assert_eq!(bench.syncing_pids().len(), 2);
    second.open();
    wait_until("the second get is done", || bench.syncing_pids().len() == 1);
    let synced = |name: &str| strike.calls().iter().any(|call| call.name == "fdatasync" && call.path.ends_with(name));
    assert!(synced(WEIGHTS) && synced("README.md"), "the shared file, too: {:?}", strike.calls());
    assert_eq!(bench.marked(&next), 0);
    assert_eq!(bench.marked(&bench.commit), 4, "the marks of the first writer stay");
    bench.kill_syncing();

    // Simulates a power cut after which a file has other bytes.
    spoil(&path.join(WEIGHTS));
    let old = bench.on().run(["get", &format!("{MODEL}@{}", bench.commit)]).path_saying(&["was changed or damaged"]);
    assert!(is_right(&old.join(WEIGHTS)));
    let new = bench.on().run(["get", &reference]).path();
    assert!(is_right(&new.join(WEIGHTS)), "found in one artifact, withdrawn from both");
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn durable_waits_for_the_sync_also_on_a_hit_of_unsynced_files() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let strike = bench.behind(&gate);
    let waiting = bench.on().envs(strike.envs()).start(["get", "--durable", MODEL]);
    wait_until("a file is synced", || strike.calls().iter().any(|call| call.name == "fdatasync"));
    assert_eq!(bench.syncing_pids(), [0u32; 0], "only the caller syncs");
    assert_eq!(bench.marked(&bench.commit), 4);
    gate.open();
    waiting.wait().path();
    assert_eq!(bench.marked(&bench.commit), 0);

    bench.house.on_local("a").run(["evict", MODEL, "--tier", "disk", "--yes"]).ok();
    let other = bench.gate("other");
    bench.on().envs(bench.behind(&other).envs()).run(["get", MODEL]).path();
    bench.on().run(["get", "--durable", MODEL]).path_saying(&["on disk"]);
    assert_eq!(bench.marked(&bench.commit), 0, "although the other process has not begun");
    other.open();
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn put_prewarm_and_get_into_wait_for_the_sync() {
    let Some(bench) = Bench::new() else { return };
    for (path, content) in model() {
        bench.house.write(&format!("mine/{path}"), content);
    }
    let put = bench.on().envs(bench.shim.count(&bench.root()).envs()).run(["put", "mine@1", "mine"]).ok();
    assert_eq!(bench.syncing_pids(), [0u32; 0], "{put}");
    let manifest = fs::read_to_string(bench.root().join("artifacts/mine/1/manifest.json")).unwrap();
    assert!(!manifest.contains("unsynced"));

    bench.on().run(["prewarm", MODEL]).ok();
    assert_eq!((bench.syncing_pids().len(), bench.marked(&bench.commit)), (0, 0));

    // The files are synced before the folder is renamed into its place.
    let count = bench.shim.count(bench.root().parent().unwrap());
    let run = bench.house.on_local("b").without("MODEL_CACHE_DURABLE").envs(count.envs());
    run.run(["get", MODEL, "--into", "out"]).path();
    let calls = count.calls();
    let synced = calls.iter().rposition(|call| call.name == "fdatasync" && call.path.ends_with(WEIGHTS)).unwrap();
    let placed = calls.iter().position(|call| call.name.starts_with("rename") && call.path.ends_with("out")).unwrap();
    assert!(synced < placed, "{calls:?}");
}

#[test]
fn a_small_download_is_synced_at_once() {
    let Some(bench) = Bench::new() else { return };
    bench.on().run(["get", MODEL, "--include", "*.json"]).path();
    assert_eq!((bench.syncing_pids().len(), bench.marked(&bench.commit)), (0, 0));
}

#[test]
fn process_1_syncs_before_it_ends() {
    if !can_mount() {
        return;
    }
    let Some(bench) = Bench::new() else { return };
    let script = format!("exec unshare -pf --mount-proc {BIN} get {MODEL}");
    bench.on().shell(&script).path();
    assert_eq!((bench.syncing_pids().len(), bench.marked(&bench.commit)), (0, 0));
}

#[test]
fn exec_runs_its_command_at_once_without_a_child_and_as_the_only_lease_holder() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let script = r#"read children < /proc/$$/task/$$/children; echo "children: $children""#;
    let run = bench.on().envs(bench.behind(&gate).envs());
    let outcome = run.run(["exec", MODEL, "--", "sh", "-c", script]).ok();
    assert_eq!(outcome.stdout, "children: \n");
    assert_eq!((bench.syncing_pids().len(), bench.marked(&bench.commit)), (1, 4), "it ran before any file was durable");
    bench.house.on_local("a").run(["evict", MODEL, "--tier", "disk", "--yes"]).ok();
    gate.open();
    bench.wait_until_durable();
    assert_eq!(bench.house.state("a"), State::new(), "an evicted artifact does not come back");
    bench.house.assert_consistent("a");
}

#[test]
fn a_file_that_fails_to_sync_is_withdrawn_and_fetched_again() {
    let Some(bench) = Bench::new() else { return };
    let strike = bench.shim.fail_at(&bench.root(), 1, Errno::EIO).of("fdatasync");
    bench.on().envs(strike.envs()).run(["get", MODEL]).path();
    bench.wait_until_durable();
    let held = bench.house.state("a").into_values().map(|files| files.len()).sum::<usize>();
    assert_eq!(held, 3, "one of four is not held any more");
    assert_eq!(bench.marked(&bench.commit), 0, "the others are durable");
    bench.house.hub.clear_requests();
    assert_model(&bench.get());
    assert!(bench.house.hub.body_bytes() > 0, "it was fetched again, not taken from the failed blob");
    bench.wait_until_durable();
    bench.assert_settled();
}

#[test]
fn a_removed_directory_ends_the_syncing_process_and_is_not_recreated() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let behind = bench.behind(&gate);
    bench.on().envs(behind.envs()).run(["get", MODEL]).path();
    assert_eq!(bench.syncing_pids().len(), 1);
    // Before the gate the process creates files, which could disturb the removal of the directory.
    let is_at_gate = || behind.calls().iter().any(|call| call.name.contains("sync"));
    wait_until("the process waits at the gate", is_at_gate);
    fs::remove_dir_all(bench.root()).unwrap();
    gate.open();
    bench.wait_until_durable();
    assert!(!bench.root().exists());
}

/// Number of files, far above the limit up to which files are synced one by one.
const MANY: usize = 200;

fn many(house: &House) -> String {
    let commit = house.hub.repo("org/model").commit();
    let name = |n: usize| format!("layer-{:02}/{n}.bin", n % 10);
    let commit = (0..MANY).fold(commit, |commit, n| commit.file(&name(n), Content::generated(n as u64, 30_000)));
    commit.publish().unwrap()
}

#[test]
fn many_files_are_synced_with_one_syncfs() {
    let Some(bench) = Bench::new() else { return };
    let commit = many(&bench.house);
    let count = bench.shim.count(&bench.root());
    bench.on().envs(count.envs()).run(["get", MODEL, "--durable"]).path();
    let calls = count.calls();
    let named = |name: &str| calls.iter().filter(|call| call.name == name).count();
    assert_eq!((named("syncfs"), named("fdatasync"), bench.marked(&commit)), (1, 0, 0), "one syncfs for all files");
    assert!(named("fsync") < 20, "{} calls of fsync", named("fsync"));
}

#[test]
fn many_files_of_a_dead_writer_are_recorded_in_one_write() {
    let Some(bench) = Bench::new() else { return };
    let (commit, gate) = (many(&bench.house), bench.gate("gate"));
    bench.on().envs(bench.behind(&gate).envs()).run(["get", MODEL]).path();
    bench.kill_syncing();
    assert_eq!(bench.marked(&commit), MANY + 4);
    let count = bench.shim.count(&bench.root());
    bench.on().envs(count.envs()).run(["get", MODEL]).path_saying(&["on disk"]);
    let manifests = |name: &str| name.starts_with("rename");
    let written =
        count.calls().iter().filter(|call| manifests(&call.name) && call.path.ends_with("manifest.json")).count();
    assert_eq!((written, bench.marked(&commit)), (1, 0));
}

#[test]
fn metadata_files_torn_by_a_power_cut_count_as_absent() {
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
        // Only the small files are fetched again: the Hub states no SHA-256 for them, by which a blob is found.
        assert_eq!(bench.house.hub.body_bytes(), 16, "the blobs are found by their digests");
    }
}
