//! A hostile user of a shared directory replaces its folders by links, before and while commands run.
//!
//! The target of a link must stay as it is. `NEIGHBOURS_SECONDS` sets how long each folder is swapped back and forth.

use crate::common::*;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Seconds for which each folder is swapped in CI.
const SWAP_SECONDS: f64 = 2.0;

/// A cache directory with an artifact, and a private folder of the user with a file for every name that the cache uses.
struct Shared {
    house: House,
    mine: PathBuf,
}

impl Shared {
    fn new() -> Self {
        let house = House::new();
        for (path, content) in [("source/a.bin", "model"), ("source/d/b.bin", "more")] {
            house.write(path, content);
        }
        let shared = Self { mine: house.path("mine"), house };
        shared.put_back();
        let digest = fs::read_dir(shared.cache("blobs")).unwrap().next().unwrap().unwrap().path();
        let blob = fs::read_dir(&digest).unwrap().next().unwrap().unwrap().file_name().into_string().unwrap();
        let intent = "0b203ec73c7ce729a75f7f51a8caf41e";
        let names = [
            "a.bin",
            "d/b.bin",
            "b.bin",
            "files/a.bin",
            "files/d/b.bin",
            "1/files/a.bin",
            "1/manifest.json",
            "m/1/pin",
            "manifest.json",
            "last-used",
            "pin",
            "journal",
            "x-y/journal",
            "new-abc",
            "budget",
            "changes",
            "probe",
            "m/prod",
            "0123456789abcdef-abc",
            intent,
            &format!("{blob}-abc"),
            &blob,
            &format!("{}/{blob}", &blob[..2]),
        ];
        for name in names {
            shared.house.write(&format!("mine/{name}"), "dear to me");
        }
        shared
    }

    fn cache(&self, folder: &str) -> PathBuf {
        self.house.path("a").join(folder)
    }

    fn run(&self, args: &[&str]) -> Outcome {
        self.house.on_local("a").run(args)
    }

    /// Puts the artifact into the cache directory.
    fn put_back(&self) {
        self.run(&["put", "m@1", self.house.path("source").to_str().unwrap(), "--force"]).ok();
    }

    /// Returns the files of the private folder with their content.
    fn possessions(&self) -> BTreeMap<PathBuf, String> {
        let read = |file: PathBuf| {
            let content = fs::read_to_string(self.mine.join(&file)).unwrap_or_default();
            (file, content)
        };
        files_below(&self.mine).into_iter().map(read).collect()
    }

    /// Runs the commands that any user runs. No command may crash, but each may fail.
    fn use_it(&self, round: usize) {
        let source = self.house.path("source");
        let other = format!("other{round}@1");
        let commands: [&[&str]; 8] = [
            &["get", "m@1"],
            &["put", &other, source.to_str().unwrap()],
            &["verify"],
            &["prune"],
            &["get", "m@1", "--verify"],
            &["prune", "--to", "0"],
            &["put", "m@1", source.to_str().unwrap()],
            &["evict", "m@1", "--tier", "disk", "--yes"],
        ];
        for command in commands {
            let outcome = self.run(command);
            assert!(outcome.code.is_some_and(|code| code < 100), "{command:?}: {outcome}");
        }
    }
}

const FOLDERS: [&str; 13] = [
    "locks",
    "artifacts",
    "artifacts/m",
    "artifacts/m/1",
    "artifacts/m/1/files",
    "artifacts/m/1/files/d",
    "blobs",
    "blobs/xx",
    "quarantine",
    "staging",
    "refs",
    "backfill",
    "lower",
];

/// Returns the path of an entry of [`FOLDERS`]. `blobs/xx` stands for the folder of the first blob.
fn real_name(shared: &Shared, folder: &str) -> PathBuf {
    match folder {
        "blobs/xx" => fs::read_dir(shared.cache("blobs")).unwrap().next().unwrap().unwrap().path(),
        folder => shared.cache(folder),
    }
}

#[test]
fn a_link_in_the_place_of_a_folder_leads_no_command_outside() {
    for folder in FOLDERS {
        let shared = Shared::new();
        let before = shared.possessions();
        let place = real_name(&shared, folder);
        fs::rename(&place, place.with_extension("old")).unwrap();
        symlink(&shared.mine, &place).unwrap();
        shared.use_it(0);
        assert_eq!(shared.possessions(), before, "{folder}");
    }
}

#[test]
#[allow(clippy::print_stderr)]
fn a_folder_that_becomes_a_link_at_any_moment_leads_no_command_outside() {
    let seconds = std::env::var("NEIGHBOURS_SECONDS").map_or(SWAP_SECONDS, |text| text.parse().expect("seconds"));
    for folder in ["artifacts/m", "artifacts/m/1", "artifacts/m/1/files", "artifacts/m/1/files/d", "staging"] {
        let shared = Shared::new();
        let (before, place) = (shared.possessions(), real_name(&shared, folder));
        let (end, ended) = (Instant::now() + Duration::from_secs_f64(seconds), AtomicBool::new(false));
        let (swaps, rounds) = std::thread::scope(|scope| {
            let swapping = scope.spawn(|| swap(&place, &shared.mine, &ended));
            let mut round = 0;
            while Instant::now() < end {
                shared.use_it(round);
                round += 1;
            }
            ended.store(true, Ordering::Relaxed);
            (swapping.join().unwrap(), round)
        });
        eprintln!("{folder}: {swaps} exchanges beside {} commands", 8 * rounds);
        assert_eq!(shared.possessions(), before, "{folder}, after {swaps} swaps");
        assert!(swaps > 0, "{folder} was never a link");
    }
}

/// Exchanges the folder at `place` with a link to `target` until `ended` is set. Returns the number of exchanges.
fn swap(place: &Path, target: &Path, ended: &AtomicBool) -> u64 {
    let (link, mut swaps) = (place.with_extension("link"), 0);
    while !ended.load(Ordering::Relaxed) {
        let is_link = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
        if !is_link(&link) && !is_link(place) {
            let _ = symlink(target, &link);
        }
        match renameat_with(CWD, place, CWD, &link, RenameFlags::EXCHANGE) {
            Ok(()) => swaps += 1,
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
        }
    }
    swaps
}

/// Creates an entry of the wrong type at a path.
type Plant = fn(&Path);

#[test]
fn entries_of_the_wrong_type_are_named_by_doctor_and_moved_by_prune() {
    let fifo: Plant = |path| {
        rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    };
    let folder: Plant = |path| fs::create_dir_all(path.join("inside")).unwrap();
    let link: Plant = |path| symlink("/dev/null", path).unwrap();
    let cases: [(&str, &str, Plant); 9] = [
        ("locks/budget", "pipe", fifo),
        ("locks/budget", "folder", folder),
        ("locks/changes", "pipe", fifo),
        ("locks/probe", "pipe", fifo),
        ("staging/new-abc", "pipe", fifo),
        ("staging/x-y/journal", "pipe", fifo),
        ("artifacts/m/1/manifest.json", "folder", folder),
        ("artifacts/m/1/last-used", "symbolic link", link),
        ("artifacts/odd", "pipe", fifo),
    ];
    for (name, is, plant) in cases {
        let shared = Shared::new();
        let place = shared.cache(name);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&place);
        plant(&place);
        if name != "locks/probe" {
            let doctor = shared.house.on_local("a").run(["doctor", "--read-only"]);
            assert_eq!(doctor.code, Some(8), "{name}: {doctor}");
            assert!(doctor.stdout.contains(name) && doctor.stdout.contains(is), "{name}: {doctor}");
            let dry = shared.run(&["prune", "--dry-run", "--json"]);
            assert!(place.symlink_metadata().is_ok(), "{name}: {dry}");
        }
        let pruned = shared.run(&["prune"]).ok();
        assert!(pruned.stderr.contains(name), "{name}: {pruned}");
        assert!(!fs::symlink_metadata(&place).is_ok_and(|found| !found.is_file()), "{name} is still there");
        shared.put_back();
        shared.run(&["get", "m@1"]).ok();
        shared.run(&["evict", "m@1", "--tier", "disk", "--yes"]).ok();
        shared.house.on_local("a").run(["doctor", "--read-only"]).ok();
    }
}
