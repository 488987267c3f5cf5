//! A disk that fails: ENOSPC, EDQUOT, EIO, EROFS and EMFILE at every call of a get and of a put, reads included.
//!
//! Success means right bytes. A failure has its exit code, the error text of the system, and a remedy. The next clean
//! run works. `IO_SEED` repeats a sample, `IO_POINTS` sets its size, `IO_EXHAUSTIVE=1` takes every call (with
//! `cargo nextest run --profile long`).

use crate::common::{House, Outcome, assert_model, model, shim};
use modelcache_testkit::shim::sample;
use modelcache_testkit::{Call, Content, Dice, Errno, Shim, ShimRun};
use std::collections::BTreeSet;
use std::path::Path;

const POINTS: usize = 6;
const GET: &[&str] = &["get", "hf://org/model"];
const PUT: &[&str] = &["put", "m@1", "model"];
/// The call that makes a published file durable.
const SYNC: &str = "fdatasync";

/// Returns the error text of the system for `errno`, and the expected exit code.
fn expected(errno: Errno) -> (&'static str, i32) {
    match errno {
        Errno::ENOSPC => ("No space left on device", 6),
        Errno::EDQUOT => ("quota exceeded", 6),
        Errno::EIO => ("Input/output error", 8),
        Errno::EROFS => ("Read-only file system", 8),
        Errno::EMFILE => ("Too many open files", 8),
        other => unreachable!("{other:?} is no failure of the disk"),
    }
}

#[test]
fn a_full_disk_is_no_false_success() {
    fail_everywhere("ENOSPC", Errno::ENOSPC);
}

#[test]
fn a_used_up_quota_is_no_false_success() {
    fail_everywhere("EDQUOT", Errno::EDQUOT);
}

#[test]
fn a_disk_error_is_no_false_success() {
    fail_everywhere("EIO", Errno::EIO);
}

#[test]
fn a_disk_that_turns_read_only_is_no_false_success() {
    fail_everywhere("EROFS", Errno::EROFS);
}

#[test]
fn a_lack_of_descriptors_is_no_false_success() {
    fail_everywhere("EMFILE", Errno::EMFILE);
}

#[test]
#[allow(clippy::print_stderr)]
fn a_failed_fsync_is_not_retried_and_its_file_is_not_published() {
    let Some(shim) = shim() else { return };
    let bench = Bench::new(shim);
    let mut struck = 0;
    for args in [GET, PUT] {
        let count = bench.shim.count(&bench.house.path("whole"));
        bench.house.on_local("whole").envs(count.envs()).run(args).ok();
        for n in 1..=count.calls().into_iter().filter(is_sync).count() as u64 {
            bench.fails_to_sync(args, n);
            struck += 1;
        }
        std::fs::remove_dir_all(bench.house.path("whole")).unwrap();
    }
    eprintln!("io errors: {struck} failed syncs");
    assert!(struck > 0, "no fsync was struck");
}

/// What only protects files, or keeps an order, is not necessary: network filesystems refuse some of it.
#[test]
fn refused_modes_times_syncs_of_folders_and_allocations_are_no_failure() {
    let Some(shim) = shim() else { return };
    let bench = Bench::new(shim);
    let rows = [
        ("fchmod,chmod,fchmodat", Errno::EPERM, Some("does not let modes be set")),
        ("futimens,utimensat", Errno::EPERM, Some("does not let times be set")),
        ("fsync_folder", Errno::EINVAL, Some("does not let folders be synced")),
        ("fallocate,fallocate64", Errno::EINVAL, None),
        ("fallocate,fallocate64", Errno::EOPNOTSUPP, None),
        // These are refused by the filesystem of a remote that is a folder, too.
        ("linkat,link,renameat2", Errno::ENOSYS, None),
    ];
    for (n, (calls, errno, warned)) in rows.into_iter().enumerate() {
        let dir = format!("refused-{n}");
        // Below this folder are the cache directory and the remote.
        let root = bench.house.path(&dir);
        let remote = format!("file://{}/remote", root.display());
        let on = |cache: &str| {
            let fault = bench.shim.fail_at(&root, 1, errno).of(calls).from_then_on();
            let run = bench.house.on_local(&format!("{dir}/{cache}")).envs(fault.envs());
            run.env("MODEL_CACHE_REMOTE", &remote)
        };
        let put = on("a").run(PUT).ok();
        let got = on("b").run(["get", "m@1"]);
        for outcome in [put.stderr, got.stderr.clone()] {
            let warnings = warned.map_or(0, |warned| outcome.matches(warned).count());
            assert_eq!(warnings, usize::from(warned.is_some()), "{calls} {errno:?}: {outcome}");
        }
        assert_model(&got.path());
        on("b").run(["evict", "m@1", "--yes"]).ok();
        let doctor = on("a").run(["doctor"]);
        let named = format!("{}{}", doctor.stdout, doctor.stderr);
        assert!(warned.is_none_or(|warned| named.contains(warned)), "{calls}: {doctor}");
        bench.house.assert_nothing_leaked(&format!("{dir}/a"));
    }
}

#[test]
fn an_interrupted_call_is_made_again() {
    let Some(shim) = shim() else { return };
    let bench = Bench::new(shim);
    for call in ["renameat", "linkat", "mkdirat", "unlinkat", "rmdir", "fallocate", "create"] {
        for args in [GET, PUT] {
            let fault = bench.shim.fail_at(&bench.house.path(call), 1, Errno::EINTR).of(call);
            let outcome = bench.house.on_local(call).envs(fault.envs()).run(args);
            bench.assert_right(args, call, outcome);
        }
    }
}

/// NFS keeps a removed file that is still open under another name in its folder.
#[test]
fn a_folder_with_an_open_file_is_left_and_the_next_cleanup_removes_it() {
    let Some(shim) = shim() else { return };
    let bench = Bench::new(shim);
    let root = bench.house.path("a");
    let used = || bench.house.on_local("a").run(["stats", "--json"]).object()["used_bytes"].as_u64().unwrap();
    bench.house.write("solo", Content::generated(7, 9 << 20));
    let put = ["put", "m@1", "solo"];
    bench.house.on_local("a").run(put).ok();
    let before = used();
    let fault = || bench.shim.fail_at(&root, 1, Errno::ENOTEMPTY).of("rmdir").from_then_on();
    let evicted = bench.house.on_local("a").envs(fault().envs()).run(["evict", "m@1", "--yes"]).ok();
    evicted.said(&["a file in it is still open", "9.4 MB on disk"]);
    assert!(root.join("artifacts/m/1").exists() && used() < before / 100, "the bytes are free");
    assert_eq!(bench.house.listed("a"), [""; 0]);
    // Room is made although the folder still cannot be removed. An artifact that is on the remote, too, makes room.
    let tight = |run: crate::common::Run| run.env("MODEL_CACHE_MAX_BYTES", "15MB");
    tight(bench.house.on("a")).run(put).ok();
    let filled = tight(bench.house.on_local("a")).envs(fault().envs()).run(GET);
    assert_model(&filled.path_saying(&["a file in it is still open"]));
    tight(bench.house.on_local("a")).run(["prune"]).ok();
    assert!(!root.join("artifacts/m").exists(), "the next clean-up removes the folder");
}

struct Bench {
    house: House,
    shim: Shim,
}

/// Runs get and put with `errno` injected at a sample of their calls.
#[allow(clippy::print_stderr)]
fn fail_everywhere(name: &str, errno: Errno) {
    let Some(shim) = shim() else { return };
    let bench = Bench::new(shim);
    let mut dice = Dice::from_env("IO_SEED");
    let exhaustive = std::env::var("IO_EXHAUSTIVE").is_ok_and(|on| on == "1");
    let points = std::env::var("IO_POINTS").map_or(POINTS, |points| points.parse().unwrap());
    let (mut faults, mut failures) = (0, 0);
    for args in [GET, PUT] {
        let whole = format!("whole-{}", args[0]);
        let root = bench.house.path(&whole);
        let count = bench.shim.count(&root).with_reads();
        bench.house.on_local(&whole).envs(count.envs()).run(args).ok();
        for n in sample(&count.calls(), &root, &mut dice, if exhaustive { usize::MAX } else { points }) {
            let modes: &[bool] = if exhaustive { &[false, true] } else { &[dice.percent(50)] };
            for from_then_on in modes {
                let dir = format!("{}-{n}-{from_then_on}", args[0]);
                let fault = bench.shim.fail_at(&bench.house.path(&dir), n, errno).with_reads();
                let fault = if *from_then_on { fault.from_then_on() } else { fault };
                failures += u32::from(bench.survives(args, &dir, &fault, errno, n));
                faults += 1;
            }
        }
    }
    eprintln!("io errors: {name}: {faults} faults injected, {failures} runs failed, seed {}", dice.seed());
    assert!(failures > 0, "no fault made a run fail: this proved nothing");
}

impl Bench {
    fn new(shim: Shim) -> Self {
        let (house, _) = House::with_model();
        model().into_iter().for_each(|(path, content)| drop(house.write(&format!("model/{path}"), content)));
        Self { house, shim }
    }

    /// Runs one command under a fault, and checks the result and the next clean run. Returns true if the run failed.
    #[allow(clippy::print_stderr)]
    fn survives(&self, args: &[&str], dir: &str, fault: &ShimRun, errno: Errno, n: u64) -> bool {
        let outcome = self.house.on_local(dir).envs(fault.envs()).run(args);
        // The test runner shows this only if the test fails.
        eprintln!("{args:?} under {errno:?} from call {n}: {:?}", fault.calls().iter().find(|call| call.number == n));
        let (text, code) = expected(errno);
        let failed = outcome.code != Some(0);
        if failed {
            outcome.failed(code, &[text, "disk"]);
            self.house.state(dir);
        } else {
            self.assert_right(args, dir, outcome);
        }
        let again = self.house.on_local(dir).run(args);
        self.assert_right(args, dir, again);
        self.house.assert_consistent(dir);
        std::fs::remove_dir_all(self.house.path(dir)).unwrap();
        failed
    }

    /// Asserts that a successful run has made the model local.
    #[track_caller]
    fn assert_right(&self, args: &[&str], dir: &str, outcome: Outcome) {
        if args == PUT {
            outcome.ok();
            assert_model(&self.house.on_local(dir).run(["get", "m@1"]).path());
        } else {
            assert_model(&outcome.path());
        }
    }

    /// Makes the `n`-th sync of a staged file fail, and checks the result.
    fn fails_to_sync(&self, args: &[&str], n: u64) {
        let dir = format!("sync-{}-{n}", args[0]);
        let fault = self.shim.fail_at(&self.house.path(&dir), n, Errno::EIO).of(SYNC);
        let outcome = self.house.on_local(&dir).envs(fault.envs()).run(args);
        outcome.failed(8, &["cannot make durable", "Input/output error"]);
        let calls = fault.calls();
        let synced: Vec<&Path> = calls.iter().filter(|call| is_sync(call)).map(|call| &*call.path).collect();
        let once: BTreeSet<_> = synced.iter().collect();
        assert_eq!(once.len(), synced.len(), "after a failed fsync another one proves nothing: {synced:?}");
        let struck = calls.iter().filter(|call| is_sync(call)).nth(usize::try_from(n).unwrap() - 1).unwrap();
        let held = self.house.state(&dir).into_values().flat_map(|files| files.into_keys()).collect::<BTreeSet<_>>();
        assert!(held.iter().all(|path| !struck.path.ends_with(path)), "{} is held: {held:?}", struck.path.display());
        assert!(held.len() + 1 == model().len(), "the other files are held: {held:?}");
        let again = self.house.on_local(&dir).run(args);
        self.assert_right(args, &dir, again);
    }
}

fn is_sync(call: &Call) -> bool {
    call.name == SYNC
}
