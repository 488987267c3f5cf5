//! Durability: artifacts are published before they are on stable storage. The tests cover waiting, and trust in such
//! files.
//!
//! The fault shim moves a run into another boot, or ahead by the clock that counts from the boot. A gate holds back
//! every sync, so that a test can inspect the state before it.

use crate::common::order::State;
use crate::common::*;
use modelcache_testkit::shim::Call;
use modelcache_testkit::{Content, Errno, Shim, ShimRun};
use std::fs::{self, FileTimes, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

const MODEL: &str = "hf://org/model";
const WEIGHTS: &str = "model.safetensors";
/// Seconds after which the kernel should have written a file back.
const AFTER_WRITE_BACK: u32 = 60;
/// Calls that make something durable.
const SYNCS: [&str; 3] = ["fdatasync", "fsync", "syncfs"];

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
        house.make_cache("a");
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
    fn behind(&self, gate: &Gate) -> ShimRun {
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
        self.manifest(commit).to_string().matches("\"unsynced_mount\"").count()
    }

    /// Settings for a run that comes after write-back.
    fn later(&self) -> ShimRun {
        self.shim.count(&self.root()).later(AFTER_WRITE_BACK)
    }

    /// Settings for a run after a reboot.
    fn in_next_boot(&self) -> ShimRun {
        self.shim.count(&self.root()).in_boot(&self.house.write("boot", "another boot\n"))
    }

    /// Asserts that the files of the model are right and recorded as durable.
    #[track_caller]
    fn assert_settled(&self) {
        assert_eq!(self.marked(&self.commit), 0, "{}", self.manifest(&self.commit));
        assert_model(&self.get());
        self.house.assert_consistent("a");
    }
}

/// Changes a byte and keeps inode, size and time, as after a write that the medium has lost.
fn corrupt(path: &Path) {
    let metadata = fs::metadata(path).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5_000_000).unwrap();
    file.write_all_at(&[!byte[0]], 5_000_000).unwrap();
    file.set_times(FileTimes::new().set_modified(metadata.modified().unwrap())).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o444)).unwrap();
}

/// Returns the number of calls with one of `names`.
fn count(shim_run: &ShimRun, names: &[&str]) -> usize {
    shim_run.calls().iter().filter(|call| names.contains(&&*call.name)).count()
}

fn is_right(path: &Path) -> bool {
    fs::read(path).unwrap() == big().to_vec().unwrap()
}

#[test]
fn a_get_does_not_sync_and_a_use_after_write_back_does() {
    let Some(bench) = Bench::new() else { return };
    let first = bench.shim.count(&bench.root());
    assert_model(&bench.on().envs(first.envs()).run(["get", MODEL]).path());
    assert_eq!((count(&first, &SYNCS), bench.marked(&bench.commit)), (0, 4), "every file is marked, none is synced");

    let soon = bench.shim.count(&bench.root());
    bench.on().envs(soon.envs()).run(["get", MODEL]).path_saying(&["on disk"]);
    assert_eq!((count(&soon, &SYNCS), bench.marked(&bench.commit)), (0, 4), "a hit does not wait for the disk");

    let later = bench.later();
    bench.on().envs(later.envs()).run(["get", MODEL]).path_saying(&["on disk"]);
    assert_eq!((count(&later, &["fdatasync"]), bench.marked(&bench.commit)), (4, 0), "each file once");
    let calls = later.calls();
    let synced = calls.iter().rposition(|call| call.name == "fdatasync").unwrap();
    let cleared = calls.iter().position(|call| call.name.starts_with("rename") && call.path.ends_with("manifest.json"));
    assert!(cleared.is_some_and(|cleared| synced < cleared), "{calls:?}");
    bench.assert_settled();
}

#[test]
fn unsynced_files_are_trusted_in_the_same_boot_and_hashed_in_another() {
    let Some(bench) = Bench::new() else { return };
    let weights = bench.get().join(WEIGHTS);
    corrupt(&weights);
    bench.get();
    assert!(!is_right(&weights), "in the boot of the mark, files are not hashed");
    let reboot = bench.in_next_boot();
    bench.on().envs(reboot.envs()).run(["get", MODEL]).path_saying(&["was changed or damaged", "from origin"]);
    assert!(is_right(&weights));
    bench.on().run(["get", MODEL, "--durable"]).path();
    bench.assert_settled();
}

#[test]
fn the_end_of_a_container_leaves_its_files_trusted() {
    if !can_mount() {
        return;
    }
    let Some(bench) = Bench::new() else { return };
    let weights = bench.on().shell(&format!("exec unshare -mpf --mount-proc {BIN} get {MODEL}")).path().join(WEIGHTS);
    corrupt(&weights);
    bench.get();
    assert!(!is_right(&weights), "boot and mount are those of the container");
}

#[test]
fn intact_files_are_hashed_once_after_a_reboot_and_then_durable() {
    let Some(bench) = Bench::new() else { return };
    bench.get();
    bench.house.hub.clear_requests();
    let reboot = bench.in_next_boot();
    bench.on().envs(reboot.envs()).run(["get", MODEL]).path_saying(&["read in full", "on disk"]);
    assert_eq!(bench.house.hub.body_bytes(), 0, "nothing was fetched");
    assert_eq!((count(&reboot, &["fdatasync"]), bench.marked(&bench.commit)), (4, 0), "each file");
    let again = bench.on().envs(bench.in_next_boot().envs()).run(["get", MODEL]).ok();
    assert!(!again.stderr.contains("read in full"), "{again}");
    bench.assert_settled();
}

#[test]
fn a_get_that_shares_an_unsynced_file_marks_it_too() {
    let Some(bench) = Bench::new() else { return };
    bench.get();
    let next = bench.house.hub.repo("org/model").commit().file("README.md", "new").publish().unwrap();
    let reference = format!("{MODEL}@{next}");
    bench.house.hub.clear_requests();
    let path = bench.on().run(["get", &reference]).path();
    assert_eq!(bench.house.hub.body_bytes(), 3, "an unsynced file is shared without hashing or fetching");
    assert_eq!(bench.marked(&next), 5, "the second get marks all of its files");
    let later = bench.later();
    bench.on().envs(later.envs()).run(["get", &reference]).path();
    let synced = |name: &str| later.calls().iter().any(|call| call.name == "fdatasync" && call.path.ends_with(name));
    assert!(synced(WEIGHTS) && synced("README.md"), "the shared file, too: {:?}", later.calls());
    assert_eq!((bench.marked(&next), bench.marked(&bench.commit)), (0, 4), "the marks of the first get stay");

    // Simulates a power cut after which a file has other bytes.
    corrupt(&path.join(WEIGHTS));
    let reboot = bench.in_next_boot();
    let old = bench.on().envs(reboot.envs()).run(["get", &format!("{MODEL}@{}", bench.commit)]);
    let old = old.path_saying(&["was changed or damaged"]);
    assert!(is_right(&old.join(WEIGHTS)));
    let new = bench.on().envs(reboot.envs()).run(["get", &reference]).path();
    assert!(is_right(&new.join(WEIGHTS)), "found in one artifact, withdrawn from both");
    bench.on().run(["get", &format!("{MODEL}@{}", bench.commit), "--durable"]).path();
    bench.assert_settled();
}

#[test]
fn an_unsynced_file_of_another_boot_is_hashed_before_it_is_shared() {
    let Some(bench) = Bench::new() else { return };
    corrupt(&bench.get().join(WEIGHTS));
    let next = bench.house.hub.repo("org/model").commit().file("README.md", "new").publish().unwrap();
    let reboot = bench.in_next_boot();
    let path = bench.on().envs(reboot.envs()).run(["get", &format!("{MODEL}@{next}")]).path();
    assert!(is_right(&path.join(WEIGHTS)));
}

#[test]
fn durable_waits_for_the_sync_also_on_a_hit_of_unsynced_files() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let shim_run = bench.behind(&gate);
    let waiting = bench.on().envs(shim_run.envs()).start(["get", "--durable", MODEL]);
    wait_until("a file is synced", || shim_run.calls().iter().any(|call| call.name == "fdatasync"));
    assert_eq!(bench.marked(&bench.commit), 4);
    gate.open();
    waiting.wait().path();
    assert_eq!(bench.marked(&bench.commit), 0);

    bench.house.on_local("a").run(["evict", MODEL, "--tier", "disk", "--yes"]).ok();
    bench.get();
    assert_eq!(bench.marked(&bench.commit), 4);
    bench.on().run(["get", "--durable", MODEL]).path_saying(&["on disk"]);
    bench.assert_settled();
}

#[test]
fn put_prewarm_and_get_into_wait_for_the_sync() {
    let Some(bench) = Bench::new() else { return };
    for (path, content) in model() {
        bench.house.write(&format!("mine/{path}"), content);
    }
    bench.on().run(["put", "mine@1", "mine"]).ok();
    let manifest = fs::read_to_string(bench.root().join("artifacts/mine/1/manifest.json")).unwrap();
    assert!(!manifest.contains("unsynced"));

    bench.on().run(["prewarm", MODEL]).ok();
    assert_eq!(bench.marked(&bench.commit), 0);

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
fn exec_runs_its_command_at_once_without_a_child_and_as_the_only_lease_holder() {
    let Some(bench) = Bench::new() else { return };
    let gate = bench.gate("gate");
    let script = r#"read children < /proc/$$/task/$$/children; echo "children: $children""#;
    let run = bench.on().envs(bench.behind(&gate).envs());
    let outcome = run.run(["exec", MODEL, "--", "sh", "-c", script]).ok();
    assert_eq!(outcome.stdout, "children: \n");
    assert_eq!(bench.marked(&bench.commit), 4, "it ran before any file was durable");
    bench.house.on_local("a").run(["evict", MODEL, "--tier", "disk", "--yes"]).ok();
    assert_eq!(bench.house.state("a"), State::new());
    bench.house.assert_consistent("a");
}

#[test]
fn a_failed_write_back_is_found_by_a_later_use_which_fetches_the_file_again() {
    let Some(bench) = Bench::new() else { return };
    bench.get();
    let shim_run = bench.shim.fail_at(&bench.root(), 1, Errno::EIO).of("fdatasync").later(AFTER_WRITE_BACK);
    bench.house.hub.clear_requests();
    let outcome = bench.on().envs(shim_run.envs()).run(["get", MODEL]);
    assert_model(&outcome.path_saying(&["could not be synced to disk", "Input/output error", "from origin"]));
    assert!(bench.house.hub.body_bytes() > 0, "it was fetched again, not taken from the failed blob");
    assert_eq!(bench.marked(&bench.commit), 1, "the others are durable");
    bench.on().run(["get", MODEL, "--durable"]).path();
    bench.assert_settled();
}

#[test]
fn processes_that_clear_the_same_marks_do_not_disturb_each_other() {
    let Some(bench) = Bench::new() else { return };
    bench.get();
    let running: Vec<_> = (0..6).map(|_| bench.on().envs(bench.later().envs()).start(["get", MODEL])).collect();
    running.into_iter().for_each(|running| drop(running.wait().path()));
    bench.assert_settled();
}

#[test]
fn a_hit_waits_for_no_other_process_to_clear_marks() {
    let Some(bench) = Bench::new() else { return };
    bench.get();
    let lock = fs::File::open(bench.root().join("locks/budget")).unwrap();
    lock.lock().unwrap();
    let started = std::time::Instant::now();
    bench.on().envs(bench.later().envs()).run(["get", MODEL]).path_saying(&["on disk"]);
    assert!(started.elapsed().as_secs() < 20, "it waited for the budget lock");
    assert_eq!(bench.marked(&bench.commit), 4, "the next use tries again");
    lock.unlock().unwrap();
    bench.on().envs(bench.later().envs()).run(["get", MODEL]).path();
    bench.assert_settled();
}

#[test]
fn a_read_only_directory_leaves_the_report_of_a_failed_write_to_others() {
    if !can_mount() {
        return;
    }
    let Some(bench) = Bench::new() else { return };
    let weights = bench.get().join(WEIGHTS);
    let dir = bench.root();
    let mount = format!("mount --bind {0} {0} && mount -o remount,ro,bind {0}", dir.display());
    let script = format!("exec unshare -m sh -c '{mount} && exec {BIN} get {MODEL}'");
    let later = bench.later();
    bench.on().envs(later.envs()).shell(&script).path_saying(&["on disk"]);
    assert_eq!(count(&later, &SYNCS), 0, "the kernel reports a failed write once");
    corrupt(&weights);
    let outcome = bench.on().envs(bench.in_next_boot().envs()).shell(&script);
    assert_ne!(outcome.code, Some(0), "after a reboot the files are hashed: {outcome}");
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
fn many_marks_are_cleared_in_one_write() {
    let Some(bench) = Bench::new() else { return };
    let commit = many(&bench.house);
    // After a reboot the files are hashed and synced at once. Later in the same boot each file is synced, because its
    // own descriptor reports a failed write.
    for (shim_run, syncs) in [(bench.in_next_boot(), (1, 0)), (bench.later(), (0, MANY + 4))] {
        bench.get();
        assert_eq!(bench.marked(&commit), MANY + 4);
        bench.on().envs(shim_run.envs()).run(["get", MODEL]).path_saying(&["on disk"]);
        assert_eq!((count(&shim_run, &["syncfs"]), count(&shim_run, &["fdatasync"])), syncs);
        let is_manifest = |call: &&Call| call.name.starts_with("rename") && call.path.ends_with("manifest.json");
        assert_eq!((shim_run.calls().iter().filter(is_manifest).count(), bench.marked(&commit)), (1, 0));
        bench.house.on_local("a").run(["evict", MODEL, "--tier", "disk", "--yes"]).ok();
    }
}

#[test]
fn metadata_files_torn_by_a_power_cut_count_as_absent() {
    let Some(bench) = Bench::new() else { return };
    bench.on().run(["get", MODEL, "--durable"]).path();
    bench.house.on_local("a").run(["pin", MODEL]).ok();
    let hints = ["refs", "locks", "backfill"].map(|name| bench.root().join(name));
    bench.house.write("a/backfill/0123456789abcdef0123456789abcdef", "{\"format\":1}");
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
