//! Broken file locks: `flock` always succeeds without locking (some NFS and Lustre mounts), or always fails.
//!
//! Several processes run at once on one directory. Bytes may be fetched twice, but they are never wrong. No command
//! reports a success that it did not have. With working locks, one sweep makes the directory consistent again.
//! `LOCKS_SEED` repeats a run, `LOCKS_ROUNDS` sets its length.

use crate::common::{House, Outcome, assert_model, assert_same, files_below, model, shim};
use modelcache_testkit::{Dice, Flock, Shim};
use std::path::Path;

const ROUNDS: u64 = 3;
const AT_ONCE: usize = 5;
const GET: &[&str] = &["get", "hf://org/model"];
const PUT: &[&str] = &["put", "m@1", "model"];
const EVICT: &[&str] = &["evict", "hf://org/model", "--tier", "disk"];

#[test]
fn no_bytes_are_wrong_if_locks_succeed_without_locking() {
    together(Flock::Lies, &[GET, GET, PUT, EVICT]);
}

#[test]
fn no_bytes_are_wrong_if_every_lock_fails() {
    together(Flock::Refuses, &[GET, GET, PUT, EVICT]);
}

#[test]
fn every_get_and_put_succeeds_if_locks_succeed_without_locking() {
    all_succeed(Flock::Lies);
}

#[test]
fn every_get_and_put_succeeds_if_every_lock_fails() {
    all_succeed(Flock::Refuses);
}

struct LockTest {
    house: House,
    shim: Shim,
    dice: Dice,
}

impl LockTest {
    fn new(shim: Shim) -> Self {
        let (house, _) = House::with_model();
        model().into_iter().for_each(|(path, content)| drop(house.write(&format!("model/{path}"), content)));
        Self { house, shim, dice: Dice::from_env("LOCKS_SEED") }
    }

    /// Runs [`AT_ONCE`] commands, picked from `commands`, at the same time on `dir` with broken locks.
    fn at_once(&mut self, dir: &str, how: Flock, commands: &[&'static [&'static str]]) -> Vec<(&'static str, Outcome)> {
        let root = self.house.path(dir);
        let running: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let args = *self.dice.pick(commands);
                let run = self.house.on_local(dir).env("MODEL_CACHE_READ_TIMEOUT", "30s");
                (args[0], run.envs(self.shim.flock(&root, how).envs()).start(args))
            })
            .collect();
        running.into_iter().map(|(verb, running)| (verb, running.wait())).collect()
    }

    /// Asserts that all files are right and that everything works again with working locks.
    fn assert_recovers(&self, dir: &str) {
        // Asserts the digest of every held file.
        self.house.state(dir);
        assert_model(&self.house.on_local(dir).run(GET).path());
        self.house.on_local(dir).run(PUT).ok();
        assert_model(&self.house.on_local(dir).run(["get", "m@1"]).path());
        self.house.sweep(dir);
        self.house.assert_consistent(dir);
    }
}

/// Asserts that commands at the same time give no wrong bytes and no failure without a reason, and that the directory
/// recovers.
#[allow(clippy::print_stderr)]
fn together(how: Flock, commands: &[&'static [&'static str]]) {
    let Some(shim) = shim() else { return };
    let mut bench = LockTest::new(shim);
    let (mut runs, mut done) = (0, 0);
    for round in 0..rounds() {
        let dir = format!("round-{round}");
        for _ in 0..2 {
            for (verb, outcome) in bench.at_once(&dir, how, commands) {
                runs += 1;
                match outcome.code {
                    Some(0) => {
                        done += 1;
                        assert_present_is_right(verb, &outcome.ok());
                    }
                    Some(code) => {
                        assert_ne!(code, 5, "wrong bytes: {outcome}");
                        outcome.failed(code, &[]);
                    }
                    None => panic!("killed by a signal: {outcome}"),
                }
            }
        }
        bench.assert_recovers(&dir);
    }
    eprintln!("lying locks: {how:?}: {runs} runs, {done} succeeded, nothing wrong, seed {}", bench.dice.seed());
}

/// Asserts that all gets and puts succeed, because nothing evicts.
#[allow(clippy::print_stderr)]
fn all_succeed(how: Flock) {
    let Some(shim) = shim() else { return };
    let mut bench = LockTest::new(shim);
    let mut runs = 0;
    for round in 0..rounds() {
        let dir = format!("round-{round}");
        for (verb, outcome) in bench.at_once(&dir, how, &[GET, PUT]) {
            runs += 1;
            if verb == "get" {
                assert_model(&outcome.path());
            } else {
                outcome.ok();
            }
        }
        bench.assert_recovers(&dir);
    }
    eprintln!("lying locks: {how:?}: {runs} gets and puts, all succeeded, seed {}", bench.dice.seed());
}

fn rounds() -> u64 {
    std::env::var("LOCKS_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap())
}

/// Asserts that the files of a get that are still present are right. An eviction may have removed the others.
#[track_caller]
fn assert_present_is_right(verb: &str, outcome: &Outcome) {
    if verb != "get" {
        return;
    }
    let path = Path::new(outcome.stdout.trim_end());
    let truth = model();
    for name in files_below(path) {
        let known = truth.iter().find(|(path, _)| Path::new(path) == name);
        let (_, content) = known.unwrap_or_else(|| panic!("an unknown file: {}", name.display()));
        if path.join(&name).exists() {
            assert_same(&path.join(&name), content);
        }
    }
}
