//! Locks that lie: `flock` always succeeds and locks nothing (some NFS and Lustre mounts), or always fails.
//!
//! Several processes at once on one directory. Bytes may be fetched twice; they are never wrong, no command says that it
//! worked when it did not, and with true locks again one sweep puts the house in order. `LOCKS_SEED` repeats a run,
//! `LOCKS_ROUNDS` sets its length.

use crate::common::{House, Outcome, assert_model, assert_same, files_below, model, shim};
use modelcache_testkit::{Dice, Flock, Shim};
use std::path::Path;

const ROUNDS: u64 = 3;
const AT_ONCE: usize = 5;
const GET: &[&str] = &["get", "hf://org/model"];
const PUT: &[&str] = &["put", "m@1", "model"];
const EVICT: &[&str] = &["evict", "hf://org/model", "--tier", "disk"];

#[test]
fn nothing_is_wrong_where_every_lock_is_given() {
    together(Flock::Lies, &[GET, GET, PUT, EVICT]);
}

#[test]
fn nothing_is_wrong_where_no_lock_is_given() {
    together(Flock::Refuses, &[GET, GET, PUT, EVICT]);
}

#[test]
fn every_get_and_put_succeeds_where_every_lock_is_given() {
    all_succeed(Flock::Lies);
}

#[test]
fn every_get_and_put_succeeds_where_no_lock_is_given() {
    all_succeed(Flock::Refuses);
}

struct Bench {
    house: House,
    shim: Shim,
    dice: Dice,
}

impl Bench {
    fn new(shim: Shim) -> Self {
        let (house, _) = House::with_model();
        model().into_iter().for_each(|(path, content)| drop(house.write(&format!("model/{path}"), content)));
        Self { house, shim, dice: Dice::from_env("LOCKS_SEED") }
    }

    /// A few of `commands` at once on `dir`, none of which can trust a lock.
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

    /// What lies about is right, and with true locks everything works again.
    fn assert_recovers(&self, dir: &str) {
        self.house.state(dir);
        assert_model(&self.house.on_local(dir).run(GET).path());
        self.house.on_local(dir).run(PUT).ok();
        assert_model(&self.house.on_local(dir).run(["get", "m@1"]).path());
        self.house.sweep(dir);
        self.house.assert_consistent(dir);
    }
}

/// Whatever happens at once, no bytes are wrong, no failure is without its reason, and the directory recovers.
#[allow(clippy::print_stderr)]
fn together(how: Flock, commands: &[&'static [&'static str]]) {
    let Some(shim) = shim() else { return };
    let mut bench = Bench::new(shim);
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
                        assert_ne!(code, 5, "no bytes were wrong: {outcome}");
                        outcome.failed(code, &[]);
                    }
                    None => panic!("it died: {outcome}"),
                }
            }
        }
        bench.assert_recovers(&dir);
    }
    eprintln!("lying locks: {how:?}: {runs} runs, {done} succeeded, nothing wrong, seed {}", bench.dice.seed());
}

/// Without evictions nothing stands in the way of a get or a put: all of them work.
#[allow(clippy::print_stderr)]
fn all_succeed(how: Flock) {
    let Some(shim) = shim() else { return };
    let mut bench = Bench::new(shim);
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

/// Files may have been evicted since; those that are there are right.
#[track_caller]
fn assert_present_is_right(verb: &str, outcome: &Outcome) {
    if verb != "get" {
        return;
    }
    let path = Path::new(outcome.stdout.trim_end());
    let truth = model();
    for name in files_below(path) {
        let known = truth.iter().find(|(path, _)| Path::new(path) == name);
        let (_, content) = known.unwrap_or_else(|| panic!("a strange file: {}", name.display()));
        if path.join(&name).exists() {
            assert_same(&path.join(&name), content);
        }
    }
}
