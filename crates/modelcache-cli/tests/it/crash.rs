//! Crash tests: for every operation, SIGKILL before the n-th call that changes the directory.
//!
//! After each kill, a fresh process must find every artifact in its old or its new state, the repeated command must
//! succeed with the right bytes, and nothing may leak. Each test is one row: an [`Operation`].
//!
//! `CRASH_SEED` repeats a sample, `CRASH_POINTS` sets its size, `CRASH_EXHAUSTIVE=1` takes every call (with
//! `cargo nextest run --profile long`). Calls are sampled by kind, so that a thousand writes do not hide one rename.

use crate::common;
use crate::common::order::{State, spoil_record};
use crate::common::{House, MIB, Outcome, Run, shim, wait_until};
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::shim::sample;
use modelcache_testkit::{Call, Content, Dice, Shim, ShimRun};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

const POINTS: usize = 8;

/// One operation under test: its preparation, the command that is killed, and the checks afterwards.
#[derive(Clone, Copy)]
struct Operation {
    name: &'static str,
    /// Uses the S3 stand-in as remote.
    remote: bool,
    max_bytes: &'static str,
    /// Commands that run before, undisturbed.
    before: &'static [&'static [&'static str]],
    /// Further preparation of the directory.
    prepare: fn(&CrashTest, &str),
    /// The command that is killed, then repeated.
    act: &'static [&'static str],
    /// Exit codes allowed for the repeated command.
    codes: &'static [i32],
    /// Artifacts may be absent after the kill.
    evicts: bool,
    /// Further check after the kill.
    died: fn(&CrashTest, &str),
    /// Further check after the repeated command.
    repeated: fn(&CrashTest, &str),
    /// References to get afterwards, with the expected files.
    right: &'static [Right],
}

const ROW: Operation = Operation {
    name: "",
    remote: false,
    max_bytes: "1GB",
    before: &[],
    prepare: |_, _| {},
    act: &[],
    codes: &[0],
    evicts: false,
    died: |_, _| {},
    repeated: |_, _| {},
    right: &[],
};

const ROW_TO_REMOTE: Operation = Operation { remote: true, ..ROW };

type Files = BTreeMap<&'static str, Content>;
/// A reference and its expected files.
type Right = (&'static str, fn() -> Files);

const V1: &str = "hf://org/model@v1";
const V2: &str = "hf://org/model@v2";
const OTHER: &str = "hf://org/other@v1";

/// A file of more than one part, duplicate files, and an empty file.
fn v1() -> Files {
    [
        ("a.json", "{\"a\": 1}".into()),
        ("copies/a.json", "{\"a\": 1}".into()),
        ("copies/second.bin", Content::generated(2, MIB + 5)),
        ("empty", "".into()),
        ("first.bin", Content::generated(2, MIB + 5)),
        ("model.safetensors", Content::generated(1, 9 * MIB + 4321)),
    ]
    .into()
}

/// Shares all files but `a.json` with [`v1`], and has a new one.
fn v2() -> Files {
    let mut files = v1();
    files.insert("a.json", "{\"a\": 2}".into());
    files.insert("new.bin", Content::generated(3, 4097));
    files
}

fn other() -> Files {
    [("other.bin", Content::generated(4, 10 * MIB))].into()
}

#[test]
fn a_first_get_survives_a_kill_at_any_call() {
    crash(Operation { name: "get", act: &["get", V1], right: &[(V1, v1)], ..ROW });
}

#[test]
fn a_get_that_shares_blobs_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1]];
    crash(Operation { name: "get shared", before, act: &["get", V2], right: &[(V1, v1), (V2, v2)], ..ROW });
}

#[test]
fn a_get_that_widens_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1, "--include", "*.json"]];
    crash(Operation { name: "get wider", before, act: &["get", V1], right: &[(V1, v1)], ..ROW });
}

#[test]
fn a_get_that_must_evict_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", OTHER]];
    let row = Operation { name: "get evicting", before, max_bytes: "15MB", evicts: true, ..ROW };
    crash(Operation { act: &["get", V1], right: &[(V1, v1)], ..row });
}

#[test]
fn a_get_that_resumes_survives_a_second_kill() {
    let prepare = |bench: &CrashTest, dir: &str| bench.kill_halfway(dir, &["get", V1]);
    crash(Operation { name: "get resumed", prepare, act: &["get", V1], right: &[(V1, v1)], ..ROW });
}

#[test]
fn a_get_that_adopts_parts_survives_a_kill_at_any_call() {
    let prepare = |bench: &CrashTest, dir: &str| bench.leave_a_part(dir);
    crash(Operation { name: "get adopting", prepare, act: &["get", V1], right: &[(V1, v1)], ..ROW });
}

#[test]
fn a_get_that_heals_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1]];
    let prepare = |bench: &CrashTest, dir: &str| bench.damage(dir, "first.bin");
    crash(Operation { name: "get healing", before, prepare, act: &["get", V1], right: &[(V1, v1)], ..ROW });
}

#[test]
fn a_get_that_backfills_survives_a_kill_at_any_call() {
    crash(Operation { name: "get backfilling", remote: true, act: &["get", V1], right: &[(V1, v1)], ..ROW });
}

#[test]
fn a_get_that_leaves_the_remote_for_later_survives_a_kill_at_any_call() {
    let row = Operation { name: "get later", remote: true, repeated: CrashTest::assert_completed, ..ROW };
    crash(Operation { act: &["get", V1, "--backfill", "later"], right: &[(V1, v1)], ..row });
}

#[test]
fn a_backfill_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1, "--backfill", "later"]];
    let row = Operation { name: "backfill", remote: true, before, repeated: CrashTest::assert_completed, ..ROW };
    crash(Operation { act: &["backfill"], right: &[(V1, v1)], ..row });
}

#[test]
fn a_put_survives_a_kill_at_any_call() {
    crash(Operation { name: "put", act: &["put", "m@1", "v1"], right: &[("m@1", v1)], ..ROW });
}

#[test]
fn a_put_to_the_remote_survives_a_kill_at_any_call() {
    crash(Operation { name: "put remote", remote: true, act: &["put", "m@1", "v1"], right: &[("m@1", v1)], ..ROW });
}

#[test]
fn a_forced_put_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["put", "m@1", "v1"]];
    let row = Operation { name: "put forced", before, evicts: true, ..ROW };
    crash(Operation { act: &["put", "m@1", "v2", "--force"], right: &[("m@1", v2)], ..row });
}

#[test]
fn an_evict_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1], &["get", V2]];
    let row = Operation { name: "evict", before, codes: &[0, 3], evicts: true, ..ROW };
    crash(Operation { act: &["evict", V2, "--tier", "disk"], right: &[(V1, v1)], ..row });
}

#[test]
fn a_get_in_the_layout_of_the_hub_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1]];
    crash(Operation { name: "get layout", before, act: &["get", V1, "--layout", "hub"], right: &[(V1, v1)], ..ROW });
}

#[test]
fn a_get_that_extracts_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["put", "archive@1", "v1.tar.gz"]];
    let repeated = |bench: &CrashTest, dir: &str| {
        let found = bench.run(&ROW, dir).run(["get", "archive@1", "--extract", "auto"]).path();
        v1().iter().for_each(|(path, content)| common::assert_same(&found.join(path), content));
    };
    crash(Operation {
        name: "get extracting",
        before,
        repeated,
        act: &["get", "archive@1", "--extract", "auto"],
        ..ROW
    });
}

#[test]
fn an_evict_of_the_layout_of_the_hub_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1, "--layout", "hub"], &["get", V2, "--layout", "hub"]];
    let repeated = |bench: &CrashTest, dir: &str| {
        let snapshots = bench.house.path(dir).join("hub/models--org--model/snapshots");
        assert_eq!(fs::read_dir(snapshots).unwrap().count(), 1, "the links of the evicted version are gone");
    };
    let row = Operation { name: "evict layout", before, repeated, codes: &[0, 3], evicts: true, ..ROW };
    crash(Operation { act: &["evict", V2, "--tier", "disk"], right: &[(V1, v1)], ..row });
}

#[test]
fn a_prune_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", OTHER], &["put", "gone@1", "v1"], &["get", V1, "--include", "*.json"]];
    let prepare = |bench: &CrashTest, dir: &str| bench.litter(dir);
    let repeated =
        |bench: &CrashTest, dir: &str| assert!(bench.house.staging(dir).is_empty(), "prune leaves nothing over");
    crash(Operation { name: "prune", before, prepare, repeated, act: &["prune"], right: &[(OTHER, other)], ..ROW });
}

#[test]
fn a_prune_to_a_size_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", OTHER], &["get", V1]];
    let row = Operation { name: "prune --to", before, evicts: true, ..ROW };
    crash(Operation { act: &["prune", "--to", "11MB"], right: &[(V1, v1)], ..row });
}

#[test]
fn a_pin_survives_a_kill_at_any_call() {
    let row = Operation { name: "pin", before: &[&["get", V1]], died: CrashTest::assert_pin_readable, ..ROW };
    let repeated = |bench: &CrashTest, dir: &str| assert_eq!(bench.pin_reason(dir).as_deref(), Some("why"));
    crash(Operation { repeated, act: &["pin", V1, "--reason", "why"], right: &[(V1, v1)], ..row });
}

#[test]
fn an_unpin_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", V1], &["pin", V1, "--reason", "why"]];
    let row = Operation { name: "unpin", before, died: CrashTest::assert_pin_readable, ..ROW };
    let repeated = |bench: &CrashTest, dir: &str| assert_eq!(bench.pin_reason(dir), None);
    crash(Operation { repeated, act: &["unpin", V1], right: &[(V1, v1)], ..row });
}

#[test]
fn a_sweep_survives_a_kill_at_any_call() {
    let before: &[&[&str]] = &[&["get", OTHER], &["put", "gone@1", "v1"], &["get", V1, "--include", "*.json"]];
    let prepare = |bench: &CrashTest, dir: &str| bench.litter(dir);
    crash(Operation { name: "sweep", before, prepare, act: &["stats"], right: &[(OTHER, other)], ..ROW });
}

#[test]
fn a_folder_of_hard_links_is_the_old_or_the_new_one_after_a_kill_at_any_call() {
    into("hard");
}

#[test]
fn a_folder_of_copies_is_the_old_or_the_new_one_after_a_kill_at_any_call() {
    into("copy");
}

/// Kills `get --into` an existing folder before calls that change the folder or its parent.
#[allow(clippy::print_stderr)]
fn into(link: &'static str) {
    let Some(shim) = shim() else { return };
    let bench = CrashTest::new(shim);
    let mut dice = Dice::from_env("CRASH_SEED");
    let get = |parent: &str, version: &'static str, shim_run: &ShimRun| {
        let out = bench.house.path(parent).join("out");
        let run = bench.run(&ROW, "cache").envs(shim_run.envs());
        run.run(["get", version, "--into", out.to_str().unwrap(), "--link", link])
    };
    let only_count = |parent: &str| bench.shim.count(&bench.house.path(parent));
    let count = only_count("whole");
    get("whole", V1, &only_count("elsewhere")).ok();
    get("whole", V2, &count).ok();
    let (calls, root) = (count.calls(), bench.house.path("whole"));

    let (mut killed, mut renewed) = (0, 0);
    let points = bench.points(&root, false, &calls, &mut dice);
    for n in &points {
        let parent = format!("into-{n}");
        get(&parent, V1, &only_count("elsewhere")).ok();
        let shim_run = bench.shim.kill_at(&bench.house.path(&parent), *n);
        let outcome = get(&parent, V2, &shim_run);
        eprintln!("kill planned before call {n}: {:?}", shim_run.calls().into_iter().find(|call| call.number == *n));
        assert!(matches!(outcome.code, None | Some(0)), "{outcome}");
        killed += u32::from(outcome.code.is_none());
        let out = bench.house.path(&parent).join("out");
        let is_new = out.join("new.bin").exists();
        renewed += u32::from(is_new);
        assert_folder(&out, &if is_new { v2() } else { v1() });
        get(&parent, V2, &only_count("elsewhere")).ok();
        assert_folder(&out, &v2());
        let beside: Vec<_> = fs::read_dir(bench.house.path(&parent)).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(beside, ["out"], "leftovers");
    }
    bench.house.assert_consistent("cache");
    let (total, seed) = (calls.len(), dice.seed());
    eprintln!(
        "crash: get --into --link {link}: killed before {killed} of {total} calls; {renewed} runs left the new folder, \
         seed {seed}"
    );
    assert!(killed > 0, "no run was killed: this proved nothing");
}

/// Asserts that a materialized folder holds exactly these files and its marker.
#[track_caller]
fn assert_folder(folder: &Path, files: &Files) {
    let mut names: Vec<_> = files.keys().map(std::path::PathBuf::from).chain([".modelcache.json".into()]).collect();
    names.sort();
    assert_eq!(common::files_below(folder), names);
    files.iter().for_each(|(name, content)| common::assert_same(&folder.join(name), content));
}

/// The environment and the fault shim of one test.
struct CrashTest {
    house: House,
    shim: Shim,
}

impl CrashTest {
    fn new(shim: Shim) -> Self {
        let house = House::new();
        for (repo, tag, files) in [("org/model", "v1", v1()), ("org/model", "v2", v2()), ("org/other", "v1", other())] {
            let repo = house.hub.repo(repo);
            let commit = files.into_iter().fold(repo.commit(), |commit, (path, content)| commit.file(path, content));
            repo.tag(tag, &commit.publish().unwrap());
        }
        for (folder, files) in [("v1", v1()), ("v2", v2())] {
            files.into_iter().for_each(|(path, content)| drop(house.write(&format!("{folder}/{path}"), content)));
        }
        let tar = ["-czf", "v1.tar.gz", "-C", "v1", "."];
        let made = std::process::Command::new("tar").args(tar).current_dir(house.path("")).status();
        assert!(made.unwrap().success());
        Self { house, shim }
    }

    fn run(&self, row: &Operation, dir: &str) -> Run {
        let run = if row.remote { self.house.on(dir) } else { self.house.on_local(dir) };
        // A busy machine must not turn a wait into a failure.
        run.env("MODEL_CACHE_MAX_BYTES", row.max_bytes).env("MODEL_CACHE_READ_TIMEOUT", "30s")
    }

    /// Prepares the directory `dir` for one run of `row`.
    fn prepared(&self, row: &Operation, dir: &str) {
        if row.remote {
            let _ = fs::remove_dir_all(self.house.s3.object_path(common::BUCKET, "cache"));
        }
        fs::create_dir_all(self.house.path(dir)).unwrap();
        row.before.iter().for_each(|args| drop(self.run(row, dir).run(*args).ok()));
        (row.prepare)(self, dir);
    }

    /// Kills a run of `args` at half of the calls that an undisturbed run in a spare directory makes.
    fn kill_halfway(&self, dir: &str, args: &[&str]) {
        let spare = format!("{dir}-spare");
        let count = self.shim.count(&self.house.path(&spare));
        self.run(&ROW, &spare).envs(count.envs()).run(args).ok();
        let (root, half) = (self.house.path(dir), count.calls().len() as u64 / 2);
        let killed = self.run(&ROW, dir).envs(self.shim.kill_at(&root, half).envs()).run(args);
        assert_eq!(killed.code, None, "{killed}");
    }

    /// Kills a get of [`V1`] that has written one part of its large file and recorded it in the journal.
    fn leave_a_part(&self, dir: &str) {
        let stall = HubFault::stall_at(65_536, Duration::from_secs(600)).on("model.safetensors");
        self.house.hub.faults().add(stall);
        let running = self.run(&ROW, dir).env("MODEL_CACHE_READ_TIMEOUT", "10m").start(["get", V1]);
        wait_until("one part is marked", || self.house.marked_parts(dir) > 0);
        running.signal("KILL");
        assert_eq!(running.wait().code, None);
        self.house.hub.faults().clear();
    }

    /// Asserts that one `backfill` completes the pending upload.
    fn assert_completed(&self, dir: &str) {
        self.house.end_claims();
        self.run(&ROW_TO_REMOTE, dir).run(["backfill"]).ok();
        assert_eq!(self.house.pending(dir), (0, 0));
        let manifests = |key: &String| key.ends_with("manifest.json");
        assert_eq!(self.house.s3.keys(common::BUCKET).iter().filter(|key| manifests(key)).count(), 1);
    }

    /// Returns the reason of the pin of [`V1`], or `unreadable` if the pin has none. `None` if there is no pin.
    fn pin_reason(&self, dir: &str) -> Option<String> {
        let row = self.house.on_local(dir).run(["inspect", "--json", V1]).object();
        (!row["pin"].is_null()).then(|| row["pin"]["reason"].as_str().unwrap_or("unreadable").to_owned())
    }

    /// Asserts that the pin is complete or absent.
    fn assert_pin_readable(&self, dir: &str) {
        assert!(matches!(self.pin_reason(dir).as_deref(), None | Some("why")), "{:?}", self.pin_reason(dir));
    }

    /// Overwrites a file with other bytes of the same length, as another program could.
    fn damage(&self, dir: &str, name: &str) {
        let root = self.house.path(dir);
        let views = common::files_below(&root.join("artifacts"));
        let view = root.join("artifacts").join(views.iter().find(|path| path.ends_with(name)).unwrap());
        fs::set_permissions(&view, fs::Permissions::from_mode(0o644)).unwrap();
        let len = fs::metadata(&view).unwrap().len();
        fs::write(&view, vec![7; usize::try_from(len).unwrap()]).unwrap();
    }

    /// Leaves every kind of leftover: an interrupted fill, views without a manifest, blobs without a view, a corrupt
    /// budget record.
    fn litter(&self, dir: &str) {
        let root = self.house.path(dir);
        self.kill_halfway(dir, &["get", V2]);
        fs::remove_file(root.join("artifacts/gone/1/manifest.json")).unwrap();
        fs::remove_dir_all(root.join("artifacts/gone/1/files/copies")).unwrap();
        fs::remove_file(root.join("artifacts/gone/1/files/first.bin")).unwrap();
        spoil_record(&root);
    }
}

/// Runs one operation undisturbed to count its calls, then kills it before a sample of them.
#[allow(clippy::print_stderr)]
fn crash(row: Operation) {
    let Some(shim) = shim() else { return };
    let bench = CrashTest::new(shim);
    let mut dice = Dice::from_env("CRASH_SEED");

    // One undisturbed run shows the state before, the state after, and the calls between them.
    bench.prepared(&row, "whole");
    // `state` would fail on the damaged file.
    let old = if row.name == "get healing" { State::new() } else { bench.house.state("whole") };
    let count = bench.shim.count(&bench.house.path("whole"));
    bench.run(&row, "whole").envs(count.envs()).run(row.act).ok();
    let (calls, new) = (count.calls(), bench.house.state("whole"));

    // Each kill happens in a fresh directory.
    let points = bench.points(&bench.house.path("whole"), !row.before.is_empty(), &calls, &mut dice);
    let mut killed = 0;
    for n in &points {
        killed += u32::from(bench.dies_at(&row, *n, &old, &new));
    }
    let (name, total, seed) = (row.name, calls.len(), dice.seed());
    eprintln!("crash: {name}: killed before {killed} of {total} calls ({} tried), seed {seed}", points.len());
    assert!(killed > 0, "no run was killed: this proved nothing");
}

impl CrashTest {
    /// Returns the numbers of the calls before which to kill. In a prepared directory, calls on the top folders are
    /// left out: they only find that the folders exist.
    fn points(&self, root: &Path, is_prepared: bool, calls: &[Call], dice: &mut Dice) -> Vec<u64> {
        if std::env::var("CRASH_EXHAUSTIVE").is_ok_and(|on| on == "1") {
            return sample(calls, root, dice, usize::MAX);
        }
        let want = std::env::var("CRASH_POINTS").map_or(POINTS, |points| points.parse().unwrap());
        let below_top = |call: &&Call| call.path != root && call.path.parent() != Some(root);
        let calls: Vec<Call> =
            if is_prepared { calls.iter().filter(below_top).cloned().collect() } else { calls.to_vec() };
        sample(&calls, root, dice, want)
    }

    /// Kills one run before call `n` and checks everything that must hold afterwards. Returns false if the run was
    /// not killed, because it made fewer calls than the counted run.
    #[allow(clippy::print_stderr)]
    fn dies_at(&self, row: &Operation, n: u64, old: &State, new: &State) -> bool {
        let dir = format!("killed-{n}");
        let root = self.house.path(&dir);
        self.prepared(row, &dir);
        // Kill the command before its n-th call.
        let shim_run = self.shim.kill_at(&root, n);
        let outcome = self.run(row, &dir).envs(shim_run.envs()).run(row.act);
        let last = shim_run.calls().into_iter().find(|call| call.number == n);
        // The test runner shows this only if the test fails.
        eprintln!("kill planned before call {n}: {last:?}");
        assert!(matches!(outcome.code, None | Some(0)), "{outcome}");
        // A fresh process finds the old or the new state.
        self.assert_old_or_new(row, &dir, old, new);
        (row.died)(self, &dir);

        self.house.end_claims();
        // The repeated command succeeds.
        let again = self.run(row, &dir).run(row.act);
        assert!(again.code.is_some_and(|code| row.codes.contains(&code)), "{again}");
        (row.repeated)(self, &dir);
        // Every reference has the right bytes, with a remote also on a fresh machine.
        for (reference, files) in row.right {
            assert_right(self.run(row, &dir).run(["get", reference]), &files());
            if row.remote {
                let fresh = format!("{dir}-fresh");
                assert_right(self.run(row, &fresh).run(["get", reference]), &files());
                fs::remove_dir_all(self.house.path(&fresh)).unwrap();
            }
        }
        if row.name == "sweep" {
            // `stats` keeps the interrupted fill, so that another process can resume it. Make it old and sweep it, so
            // that the check for leftovers passes.
            self.house.sweep(&dir);
        } else {
            assert_eq!(self.house.state(&dir), *new, "the state of an undisturbed run");
        }
        self.house.assert_consistent(&dir);
        fs::remove_dir_all(&root).unwrap();
        outcome.code.is_none()
    }

    /// Asserts that every artifact is in its old or its new state, and that the count is right.
    fn assert_old_or_new(&self, row: &Operation, dir: &str, old: &State, new: &State) {
        if row.name == "get healing" {
            return; // The damage is found when a lease is acquired, not by `ls`.
        }
        let state = self.house.state(dir);
        let references: BTreeSet<_> = [old, new, &state].into_iter().flat_map(BTreeMap::keys).collect();
        for reference in references {
            let now = state.get(reference);
            let allowed = now == old.get(reference) || now == new.get(reference) || (now.is_none() && row.evicts);
            assert!(allowed, "{reference} is neither old nor new: {now:?}");
        }
        self.house.assert_counted(dir);
    }
}

/// Asserts that the printed path holds exactly these files.
#[track_caller]
fn assert_right(outcome: Outcome, files: &Files) {
    let path = outcome.path();
    let names: Vec<_> = files.keys().map(std::path::PathBuf::from).collect();
    assert_eq!(common::files_below(&path), names);
    files.iter().for_each(|(name, content)| common::assert_same(&path.join(name), content));
}
