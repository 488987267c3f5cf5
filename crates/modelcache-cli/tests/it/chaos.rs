//! Chaos test: many processes run get, put, exec, evict and prune at random on one small directory. Some are stopped
//! for a moment or killed. The result is compared with a model of the directory.
//!
//! The model: every artifact has one content, and every file that is present has this content. The artifact that `exec`
//! leases stays complete while its command runs. The counted bytes never exceed the budget. Each file is fetched from
//! the origin once, and once more for each eviction of its artifact and each kill of a process that got it.
//!
//! `CHAOS_SEED` repeats the choices (not the timing), `CHAOS_SECONDS` sets the length. One hour:
//! `CHAOS_SECONDS=3600 cargo nextest run -p modelcache-cli --test it chaos:: --profile long`.

use crate::common::{House, Outcome, files_below};
use modelcache_testkit::folder::Census;
use modelcache_testkit::{Content, Dice};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const SECONDS: u64 = 120;
const PROCESSES: u64 = 16;
/// Room for about four of the artifacts.
const BUDGET: u64 = 2_000_000;
const DIR: &str = "cache";

/// Percentage of each action. A new verb needs a row here and an arm in [`Chaos::act`].
const ACTS: [(Act, u64); 7] = [
    (Act::Get, 35),
    (Act::GetSome, 15),
    (Act::Exec, 20),
    (Act::Put, 10),
    (Act::Evict, 12),
    (Act::Prune, 4),
    (Act::PruneTo, 4),
];
/// Percentage of processes that are killed.
const KILLED: u64 = 25;
/// Percentage of the other processes that are stopped for a moment and then continued.
const STOPPED: u64 = 10;
/// The command of `exec`: verifies every file of the artifact, twice.
const COMPARE: &str = r#"cd "$0"; sha256sum --quiet -c "$1"; sleep 0.05; exec sha256sum --quiet -c "$1""#;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Get,
    GetSome,
    Exec,
    Put,
    Evict,
    Prune,
    PruneTo,
}

/// One artifact, with the state that the model keeps for it.
struct Artifact {
    reference: String,
    /// Its folder below `artifacts/`.
    folder: String,
    from_hub: bool,
    files: BTreeMap<String, Content>,
    /// Number of evictions of the artifact plus killed processes that got it.
    losses: AtomicU64,
}

struct Chaos {
    house: House,
    artifacts: Vec<Artifact>,
    ended: AtomicBool,
    counts: Mutex<BTreeMap<String, u64>>,
}

#[test]
#[allow(clippy::print_stderr)]
fn sixteen_processes_at_random_leave_nothing_wrong_and_nothing_over() {
    let dice = Dice::from_env("CHAOS_SEED");
    let seconds = std::env::var("CHAOS_SECONDS").map_or(SECONDS, |seconds| seconds.parse().unwrap());
    let chaos = Chaos::new();
    let end = Instant::now() + Duration::from_secs(seconds);
    let most = thread::scope(|scope| {
        let watcher = scope.spawn(|| chaos.watch_the_budget());
        let workers: Vec<_> = (0..PROCESSES)
            .map(|index| {
                let (chaos, mut dice) = (&chaos, dice.split(index));
                scope.spawn(move || {
                    while Instant::now() < end {
                        chaos.act(&mut dice);
                    }
                })
            })
            .collect();
        let failed = workers.into_iter().filter_map(|worker| worker.join().err()).next();
        chaos.ended.store(true, Ordering::Relaxed);
        let most = watcher.join();
        if let Some(panic) = failed {
            std::panic::resume_unwind(panic);
        }
        most.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    chaos.assert_settled();
    let counts = chaos.counts.lock().unwrap().clone();
    eprintln!("chaos: {seconds} s, at most {most} of {BUDGET} bytes, seed {}, {counts:?}", dice.seed());
}

impl Chaos {
    fn new() -> Self {
        let house = House::new();
        let mut artifacts = Vec::new();
        for index in 0..8 {
            let shared = Content::generated(99, 100_000);
            let big = Content::generated(index, 300_000 + index * 40_000);
            let files: BTreeMap<String, Content> = [
                (format!("{index}/big.bin"), big),
                (format!("{index}/shared.bin"), shared),
                (format!("{index}/small.json"), format!("{{\"index\": {index}}}").into_bytes().into()),
            ]
            .into();
            let from_hub = index < 6;
            let (reference, folder) = if from_hub {
                let repo = house.hub.repo(&format!("org/m{index}"));
                let commit = files.iter().fold(repo.commit(), |commit, (path, content)| {
                    if path.ends_with("bin") {
                        commit.lfs(path, content.clone())
                    } else {
                        commit.plain(path, content.clone())
                    }
                });
                let commit = commit.publish().unwrap();
                (format!("hf://org/m{index}@{commit}"), format!("hf%2Forg%2Fm{index}/{commit}"))
            } else {
                files
                    .iter()
                    .for_each(|(path, content)| drop(house.write(&format!("p{index}/{path}"), content.clone())));
                (format!("p{index}@1"), format!("p{index}/1"))
            };
            let line = |(path, content): (&String, &Content)| format!("{}  {path}\n", content.sha256().unwrap());
            house.write(&format!("sums{}", artifacts.len()), files.iter().map(line).collect::<String>().as_str());
            artifacts.push(Artifact { reference, folder, from_hub, files, losses: AtomicU64::new(0) });
        }
        Self { house, artifacts, ended: AtomicBool::new(false), counts: Mutex::default() }
    }

    /// Runs one process, kills it in some cases, and compares its outcome with the model.
    fn act(&self, dice: &mut Dice) {
        let act = choose(dice);
        let candidates: Vec<&Artifact> = self
            .artifacts
            .iter()
            .filter(|artifact| act == Act::Evict || artifact.from_hub != (act == Act::Put))
            .collect();
        let artifact = *dice.pick(candidates.as_slice());
        let (source, _) = artifact.folder.split_once('/').unwrap();
        let at = self.artifacts.iter().position(|other| other.reference == artifact.reference).unwrap();
        let sums = self.house.path(&format!("sums{at}")).display().to_string();
        let half = (BUDGET / 2).to_string();
        let globs = ["*.json", "*big*", "*shared*"];
        let args = match act {
            Act::Get => vec!["get", &artifact.reference],
            Act::GetSome => vec!["get", &artifact.reference, "--include", *dice.pick(&globs)],
            Act::Exec => vec!["exec", &artifact.reference, "--", "sh", "-ec", COMPARE, "{}", &sums],
            Act::Prune => vec!["prune"],
            Act::PruneTo => vec!["prune", "--to", &half],
            Act::Put => vec!["put", &artifact.reference, source],
            Act::Evict => vec!["evict", &artifact.reference, "--tier", "disk", "--yes"],
        };
        let run = self.house.on_local(DIR).env("MODEL_CACHE_MAX_BYTES", BUDGET.to_string());
        let run = run.env("MODEL_CACHE_READ_TIMEOUT", "30s").env("MODEL_CACHE_LOG", "info,modelcache::disk=debug");
        let running = run.start(&args);
        // Kill or stop the process at a random moment.
        let killed = dice.percent(KILLED);
        if killed {
            thread::sleep(Duration::from_millis(dice.below(400)));
            running.signal("KILL");
        } else if dice.percent(STOPPED) {
            thread::sleep(Duration::from_millis(dice.below(100)));
            running.signal("STOP");
            thread::sleep(Duration::from_millis(dice.below(1000)));
            running.signal("CONT");
            self.count("stopped for a moment".into());
        }
        let outcome = running.wait();
        self.note_evictions(&outcome);
        match outcome.code {
            None => {
                assert!(killed, "the process died without a kill: {outcome}");
                if !matches!(act, Act::Prune | Act::PruneTo) {
                    artifact.losses.fetch_add(1, Ordering::Relaxed);
                }
                self.count(format!("{act:?} killed"));
            }
            Some(code) => {
                self.count(format!("{act:?} {code}"));
                self.assert_allowed(act, code, artifact, outcome);
            }
        }
    }

    /// Asserts that a process that was not killed ended with an exit code that the model allows.
    fn assert_allowed(&self, act: Act, code: i32, artifact: &Artifact, outcome: Outcome) {
        match (act, code) {
            // `exec` ends with the code of its command, which has verified all leased files.
            (Act::Exec | Act::Evict | Act::Put | Act::Prune | Act::PruneTo, 0) => {}
            (_, 0) => assert_present_is_right(Path::new(outcome.stdout.trim_end()), artifact),
            // All artifacts that could be evicted are in use or being filled.
            (Act::Get | Act::GetSome | Act::Exec | Act::Put, 6) => drop(outcome.failed(6, &["no room"])),
            // The artifact is in use (1) or not on disk (3).
            (Act::Evict, 1) => {
                assert!(outcome.stderr.contains("in use") || outcome.stderr.contains("just used"), "{outcome}")
            }
            (Act::Evict, 3) => {}
            (Act::PruneTo, 6) => drop(outcome.failed(6, &["are still used"])),
            _ => panic!("{act:?} of {}: {outcome}", artifact.reference),
        }
    }

    /// Counts the evictions in the log. Each is logged before it begins, so a killed process cannot hide one.
    fn note_evictions(&self, outcome: &Outcome) {
        for line in outcome.stderr.lines().filter(|line| line.contains("evicting")) {
            let names = |artifact: &&Artifact| line.contains(&artifact.reference) || line.contains(&artifact.folder);
            let victim = self.artifacts.iter().find(names);
            victim.unwrap_or_else(|| panic!("an unknown artifact: {line}")).losses.fetch_add(1, Ordering::Relaxed);
            self.count("evictions".into());
        }
    }

    /// Counts the files in the directory again and again, under the budget lock, so that no space is reserved and
    /// nothing is published meanwhile. Returns the highest count.
    fn watch_the_budget(&self) -> u64 {
        let root = self.house.path(DIR);
        let mut most = 0;
        while !self.ended.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(20));
            let Ok(lock) = OpenOptions::new().read(true).write(true).open(root.join("locks/budget")) else { continue };
            if lock.try_lock().is_err() {
                continue;
            }
            let census = Census::of(&root).unwrap();
            lock.unlock().unwrap();
            self.count("looks".into());
            assert!(census.counted_bytes <= BUDGET, "over the budget: {census:?}");
            most = most.max(census.counted_bytes);
        }
        most
    }

    /// Checks the final state: all files are right, nothing is left over, and no file was fetched without need.
    fn assert_settled(&self) {
        // Every file has the content of the model.
        for (reference, files) in self.house.state(DIR) {
            let artifact = self.artifacts.iter().find(|artifact| artifact.reference == reference).unwrap();
            for (path, digest) in files {
                assert_eq!(digest, artifact.files[&path].sha256().unwrap(), "{reference}: {path}");
            }
        }
        // After a sweep nothing is left over.
        self.house.sweep(DIR);
        self.house.assert_consistent(DIR);
        // Each file was fetched once, and at most once more for each loss.
        let gets = self.house.hub.body_gets();
        for artifact in self.artifacts.iter().filter(|artifact| artifact.from_hub) {
            let losses = artifact.losses.load(Ordering::Relaxed);
            for path in artifact.files.keys() {
                let fetched = gets.iter().filter(|seen| seen.file.as_ref() == Some(path)).count() as u64;
                assert!(fetched <= 1 + losses, "{path} was fetched {fetched} times and lost {losses} times");
            }
        }
        *self.counts.lock().unwrap().entry("origin fetches".into()).or_default() += gets.len() as u64;
    }

    fn count(&self, what: String) {
        *self.counts.lock().unwrap().entry(what).or_default() += 1;
    }
}

fn choose(dice: &mut Dice) -> Act {
    let mut left = dice.below(100);
    for (act, share) in ACTS {
        match left.checked_sub(share) {
            Some(rest) => left = rest,
            None => return act,
        }
    }
    Act::Get
}

/// Asserts that the files that are still present are right. An eviction may have removed the others.
#[track_caller]
fn assert_present_is_right(folder: &Path, artifact: &Artifact) {
    for name in files_below(folder) {
        let content =
            artifact.files.get(name.to_str().unwrap()).unwrap_or_else(|| panic!("unknown: {}", name.display()));
        if let Ok(bytes) = std::fs::read(folder.join(&name)) {
            assert!(bytes == content.to_vec().unwrap(), "{} of {} is wrong", name.display(), artifact.reference);
        }
    }
}
