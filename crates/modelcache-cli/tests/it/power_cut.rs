//! Power cuts at random moments: files that were not synced are torn, and the machine boots again.
//!
//! A command is killed before one of its calls, or not at all. Then every file that was written since its last sync
//! loses bytes under the stat that it had, names that were never synced may disappear, and another boot begins.
//! Afterwards every get gives exactly the right bytes, the count is right, and nothing leaks.
//!
//! `POWER_SEED` repeats a run, `POWER_CUTS` sets the number of rounds (with `cargo nextest run --profile long`).

use crate::common::{House, Outcome, Run, assert_same, files_below, shim};
use modelcache_testkit::folder::Census;
use modelcache_testkit::power::{Cut, cut};
use modelcache_testkit::{Content, Dice, Shim};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Rounds of each test in an ordinary run.
const CUTS: u64 = 24;
/// Seconds after which the kernel should have written a file back.
const AFTER_WRITE_BACK: u32 = 60;
/// Number of rounds from one check of the whole directory to the next.
const ORDER_EVERY: u64 = 4;

const V1: &str = "hf://org/model@v1";
const V2: &str = "hf://org/model@v2";

type Files = BTreeMap<&'static str, Content>;

/// Small files, a file of several parts, duplicate files, and an empty file.
fn v1() -> Files {
    [
        ("a.json", "{\"a\": 1}".into()),
        ("copies/second.bin", Content::generated(2, 300_005)),
        ("empty", "".into()),
        ("first.bin", Content::generated(2, 300_005)),
        ("model.safetensors", Content::generated(1, (8 << 20) + 4321)),
    ]
    .into()
}

/// Shares all but two files with [`v1`].
fn v2() -> Files {
    let mut files = v1();
    files.insert("a.json", "{\"a\": 2}".into());
    files.insert("new.bin", Content::generated(3, 70_001));
    files
}

/// A reference and its expected files.
type Right = (&'static str, fn() -> Files);

/// Command lines, as lists of arguments.
type Commands = &'static [&'static [&'static str]];

/// One test: the commands before, which are undisturbed and durable, the commands of which one is killed, and the
/// expected files.
struct Row {
    name: &'static str,
    before: Commands,
    act: Commands,
    right: &'static [Right],
}

#[test]
fn a_first_get_outlives_a_power_cut() {
    power(Row { name: "get", before: &[], act: &[&["get", V1], &["get", V1]], right: &[(V1, v1)] });
}

#[test]
fn a_get_that_shares_and_one_that_widens_outlive_a_power_cut() {
    let act: &[&[&str]] = &[&["get", V2], &["get", V1]];
    let before: &[&[&str]] = &[&["get", V1, "--include", "*.bin"]];
    power(Row { name: "get shared and wider", before, act, right: &[(V1, v1), (V2, v2)] });
}

#[test]
fn a_put_outlives_a_power_cut() {
    power(Row { name: "put", before: &[], act: &[&["put", "m@1", "v1"]], right: &[("m@1", v1)] });
}

struct Bench {
    house: House,
    shim: Shim,
    /// Files with the boot id before and after the cut.
    boots: [PathBuf; 2],
}

#[allow(clippy::print_stderr)]
fn power(row: Row) {
    let Some(shim) = shim() else { return };
    let bench = Bench::new(shim);
    let mut dice = Dice::from_env("POWER_SEED");
    let rounds = std::env::var("POWER_CUTS").map_or(CUTS, |cuts| cuts.parse().unwrap());
    // Count the calls of each command in an undisturbed run.
    let counts: Vec<u64> = {
        row.before.iter().for_each(|args| drop(bench.on("whole", 0).run(*args).ok()));
        let count = |args: &&[&str]| {
            let shim_run = bench.shim.count(&bench.house.path("whole"));
            bench.on("whole", 0).envs(shim_run.envs()).run(*args).ok();
            shim_run.calls().len() as u64
        };
        row.act.iter().map(count).collect()
    };
    let (mut torn, mut lost, mut killed, mut hurt) = (0, 0, 0, 0);
    for round in 0..rounds {
        let (dir, ledger) = (format!("round-{round}"), bench.house.path(&format!("ledger-{round}")));
        let root = bench.house.path(&dir);
        row.before.iter().for_each(|args| drop(bench.on(&dir, 0).run(*args).ok()));
        // In half of the rounds, a get does not wait for the disk. The next command syncs what it uses of that.
        let waits = dice.percent(50);
        // One of the commands is killed. The ones before it are not, but their unsynced writes may be lost, too.
        let struck = usize::try_from(dice.below(row.act.len() as u64)).unwrap();
        for (args, (count, at)) in row.act.iter().zip(counts.iter().zip(0..)).take(struck + 1) {
            // Prefers the end of a run, where it publishes. A number beyond the last call leaves the run undisturbed:
            // it may have unsynced writes, too.
            let from = if dice.percent(60) { count / 2 } else { 1 };
            let n = if at == struck { from + dice.below(count + 20 - from) } else { u64::MAX };
            let shim_run = bench.shim.kill_at(&root, n).with_ledger(&ledger).in_boot(&bench.boots[0]);
            let shim_run = shim_run.later(u32::try_from(at).unwrap() * AFTER_WRITE_BACK);
            let run = bench.on(&dir, 0).envs(shim_run.envs());
            let run = if waits { run } else { run.without("MODEL_CACHE_DURABLE") };
            let outcome = run.run(*args);
            assert!(matches!(outcome.code, None | Some(0)), "{outcome}");
            killed += u32::from(outcome.code.is_none());
        }
        // In half of the rounds, names that were not synced disappear, too.
        let cut = cut(&root, &ledger, dice.percent(50), &mut dice).unwrap();
        (torn, lost) = (torn + cut.torn, lost + cut.lost);
        hurt += u32::from(cut != Default::default());
        // The test runner shows this only if the test fails.
        eprintln!("round {round}: {} struck, {cut:?}", row.act[struck][0]);
        // All further commands run in the next boot.
        bench.assert_recovers(&row, &dir, round, cut);
        fs::remove_dir_all(&root).unwrap();
        let _ = fs::remove_file(&ledger);
    }
    let (name, seed) = (row.name, dice.seed());
    eprintln!(
        "power: {name}: {rounds} cuts ({killed} killed, {hurt} took anything: {torn} files, {lost} names), seed {seed}"
    );
    assert!(hurt > 0, "no cut took anything: this proved nothing");
}

impl Bench {
    fn new(shim: Shim) -> Self {
        let house = House::new();
        for (tag, files) in [("v1", v1()), ("v2", v2())] {
            let repo = house.hub.repo("org/model");
            let commit = files.into_iter().fold(repo.commit(), |commit, (path, content)| commit.file(path, content));
            repo.tag(tag, &commit.publish().unwrap());
        }
        v1().into_iter().for_each(|(path, content)| drop(house.write(&format!("v1/{path}"), content)));
        let boots = ["one", "other"].map(|name| house.write(&format!("boot-{name}"), format!("boot-{name}\n")));
        Self { house, shim, boots }
    }

    /// A run before the cut (`boot` 0) or after it (1).
    fn on(&self, dir: &str, boot: usize) -> Run {
        let shim_run = self.shim.count(&self.house.path("nowhere")).in_boot(&self.boots[boot]);
        self.house.on_local(dir).envs(shim_run.envs()).env("MODEL_CACHE_READ_TIMEOUT", "30s")
    }

    fn assert_recovers(&self, row: &Row, dir: &str, round: u64, cut: Cut) {
        for (reference, files) in row.right {
            let mut outcome = self.on(dir, 1).run(["get", reference]);
            if row.name == "put" && outcome.code == Some(3) {
                // The put was not published, so it can be repeated.
                self.on(dir, 1).run(row.act[0]).ok();
                outcome = self.on(dir, 1).run(["get", reference]);
            }
            assert_right(outcome, &files());
        }
        if round.is_multiple_of(ORDER_EVERY) {
            match cut.lost {
                0 => self.house.assert_consistent(dir),
                // If names were lost, a view without its blob is still valid.
                _ => self.house.assert_nothing_leaked(dir),
            }
            return;
        }
        // Within the same boot the record is not recounted: it must be right as the gets left it.
        let stats = self.on(dir, 1).run(["stats", "--json"]).object();
        let census = Census::of(&self.house.path(dir)).unwrap();
        assert_eq!(stats["used_bytes"], census.counted_bytes, "wrong count: {census:?}");
    }
}

/// Asserts that the printed path holds exactly these files.
#[track_caller]
fn assert_right(outcome: Outcome, files: &Files) {
    let path = outcome.path();
    let names: Vec<_> = files.keys().map(PathBuf::from).collect();
    assert_eq!(files_below(&path), names);
    files.iter().for_each(|(name, content)| assert_same(&Path::new(&path).join(name), content));
}
