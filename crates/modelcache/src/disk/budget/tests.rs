//! Tests of the budget and the index. After random operations of two processes, the total is that of a full count, and
//! the index selects the same candidates for eviction as a scan of the whole directory.
//!
//! `INDEX_SEED` repeats a run. `INDEX_ROUNDS` is the number of runs. `INDEX_ARTIFACTS` is the number of artifacts in
//! the test that an eviction reads only the evicted artifacts.

use super::super::{InputFile, copy_input};
use super::*;
use crate::config::{ByteBound, Sharing};
use crate::disk::index::below_artifacts;
use crate::disk::prune::{Leftovers, PruneOptions};
use crate::disk::{AcquireOutcome, LeasedArtifact, Pin};
use crate::manifest::{FileDetails, Shape};
use crate::progress::Progress;
use crate::selection::Selection;
use modelcache_testkit::Dice;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

const KEYS: u64 = 14;
const CONTENTS: u64 = 9;
const BUDGET_BYTES: u64 = 6 * BLOCK_BYTES;
const STEPS: usize = 60;

fn number_from(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |number| number.parse().expect("a number"))
}

fn key(number: u64) -> ArtifactKey {
    ArtifactKey::bare(&format!("team/model-{}@{number}", number % 3)).expect("key")
}

/// Runs a fill of `key` with one file. Fails if there is no room, or if `key` has other content.
pub(in crate::disk) fn put(disk: &Disk, key: &ArtifactKey, content: &str, source: &Path) -> Result<LeasedArtifact> {
    fs::write(source, content).expect("writes");
    let (path, size) = (FilePath::new("f").expect("path"), content.len() as u64);
    let mut listing = Manifest::new(key.clone(), Shape::Tree);
    let entry =
        FileEntry::with(size, FileDetails { sha256: Some(Digest::of(content.as_bytes())), ..FileDetails::default() });
    let staging = disk.try_begin_fill(key, &[(path.clone(), entry)], Vec::new())?;
    let input = InputFile { path: path.clone(), from: source.to_owned(), size };
    let staged = copy_input(&input, &staging.file("copy"), &Progress::new())?;
    let staged = crate::disk::StagedFile { name: "copy".into(), ..staged };
    listing.files.insert(path.clone(), staged.entry.clone());
    disk.publish(staging, &listing, &BTreeMap::from([(path, staged)]))
}

/// Returns true if the view has no blob. A change of such a view by another program is noticed at the next count only.
fn is_alone(view: &RootedPath) -> bool {
    view.metadata().is_ok_and(|metadata| metadata.nlink() == 1)
}

/// One directory, opened by two processes.
struct Fixture {
    folder: tempfile::TempDir,
    ours: [Disk; 2],
    leased: Vec<LeasedArtifact>,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let open = || {
            let (most, least) = (ByteBound::Bytes(BUDGET_BYTES), ByteBound::Bytes(0));
            Disk::open(&folder.path().join("cache"), most, least, Sharing::Off).expect("opens")
        };
        let ours = [open(), open()];
        Self { folder, ours, leased: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn record(&self) -> Option<Record> {
        read_record(&self.ours[0].layout().budget_lock().open(false).ok()?)
    }

    /// Runs a random operation by a random process. Returns its name.
    fn step(&mut self, dice: &mut Dice) -> &'static str {
        let ours = dice.pick(&self.ours).clone();
        let key = key(dice.below(KEYS));
        let (content, source) = (format!("content {}", dice.below(CONTENTS)), self.path("source"));
        let dir = ours.layout().artifact(&key);
        match dice.below(19) {
            0..=6 => {
                let _ = put(&ours, &key, &content, &source);
                "put"
            }
            7 | 8 => {
                let _ = ours.acquire(&key, &Selection::all());
                "acquire"
            }
            9 => match ours.try_acquire_fast(&key, &Selection::all()) {
                Some(leased) => {
                    self.leased.push(leased);
                    "acquired and kept"
                }
                None => "not acquired by the fast path",
            },
            10 => {
                self.leased.clear();
                "all leases released"
            }
            11 => {
                let _ = ours.evict(&key);
                "evict"
            }
            12 => {
                let _ = if dice.percent(50) { ours.pin(&key, &Pin::default()) } else { ours.unpin(&key).map(drop) };
                "pin or unpin"
            }
            13 => {
                let outside = self.path(&format!("outside-{}", dice.below(3)));
                let _ = fs::remove_file(&outside);
                if !is_alone(&dir.files().join("f")) {
                    let _ = fs::hard_link(dir.files().join("f").full(), outside);
                }
                "link outside"
            }
            14 => {
                let view = dir.files().join("f");
                if !is_alone(&view) && view.unlink().is_ok() && dice.percent(50) {
                    fs::write(view.full(), "CONTENT 1").expect("writes");
                }
                let _ = ours.acquire(&key, &Selection::all());
                "a view was removed or replaced"
            }
            15 => {
                let log = ours.layout().changes();
                let length = log.metadata().map_or(0, |metadata| metadata.len());
                match (dice.below(3), OpenOptions::new().write(true).open(log.full())) {
                    (0, Ok(log)) => log.set_len(dice.below(length + 1)).expect("cuts"),
                    (1, Ok(log)) => log.write_all_at(b"garbage", dice.below(length + 1)).expect("garbles"),
                    _ => drop(log.unlink()),
                }
                "the log was truncated, overwritten or removed"
            }
            16 => {
                let hold = ours.hold_budget().expect("holds");
                let folder = below_artifacts(&ours, &dir).expect("a folder");
                hold.at.append(&ours.layout().changes(), &folder);
                "killed between log and record"
            }
            17 => {
                ours.hold_budget().expect("holds").begin_change_of(&dir).expect("announces");
                "killed between record and manifest"
            }
            _ => {
                let wanted = (FilePath::new("f").expect("path"), FileEntry::of(9));
                if let Ok(staging) = ours.try_begin_fill(&key, &[wanted], Vec::new()) {
                    let digest = Digest::of(content.as_bytes());
                    fs::write(staging.file(&format!("sha256-{digest}")).full(), &content).expect("writes");
                }
                "killed while filling"
            }
        }
    }

    /// Asserts that total and index of one process agree with the directory.
    fn check(&self, dice: &mut Dice) {
        let disk = dice.pick(&self.ours);
        let mut hold = disk.hold_budget().expect("holds");
        assert_eq!(hold.total, disk.published_bytes().expect("counts"), "the total");
        let fresh = Index::read(disk, hold.began_at).expect("reads");
        fresh.assert_same(&hold.index().expect("knows"));
        for bytes in [1, 2 * BLOCK_BYTES, BUDGET_BYTES / 2, BUDGET_BYTES] {
            let own = key(dice.below(KEYS));
            let own = disk.layout().artifact(&own);
            let mut search = Search { own: own.clone(), cursor: None, obstacles: Obstacles::default() };
            let chosen = hold.victims(bytes, &mut search).expect("chooses");
            let chosen = chosen.map(|victims| victims.into_iter().map(|victim| victim.dir).collect::<Vec<_>>());
            assert_eq!(chosen, victims_by_scan(disk, bytes, &own), "victims for {bytes} bytes");
        }
        hold.release().expect("releases");
    }
}

/// Returns the candidates for eviction, found by a scan of the whole directory without the index.
fn victims_by_scan(disk: &Disk, bytes: u64, own: &ArtifactDir) -> Option<Vec<ArtifactDir>> {
    let (mut blobs, mut links) = (HashSet::new(), HashMap::<u64, u64>::new());
    for folder in [disk.layout().blobs(), disk.layout().quarantine(), disk.layout().stagings()] {
        let mut count = |_: &RootedPath, metadata: &Metadata| {
            *links.entry(metadata.ino()).or_default() += 1;
            if folder == disk.layout().blobs() {
                blobs.insert(metadata.ino());
            }
            Ok(())
        };
        files::walk(&folder, &mut count).expect("walks");
    }
    let artifacts = disk.scan_by_last_use().expect("scans");
    let manifests = artifacts.iter().filter_map(|artifact| artifact.manifest.as_ref());
    for identity in manifests.flat_map(|manifest| manifest.files.values()).filter_map(FileEntry::recorded_on_disk) {
        *links.entry(identity.inode).or_default() += 1;
    }
    let (mut gone, mut freed, mut victims) = (HashMap::<u64, u64>::new(), 0, Vec::new());
    for artifact in artifacts.iter().filter(|artifact| artifact.dir != *own) {
        if freed >= bytes {
            break;
        }
        let view = files::stat(&artifact.dir.files().join("f")).expect("looks");
        let is_held = artifact.manifest.iter().flat_map(|m| m.files.values()).any(|entry| entry.held.is_some());
        let outside =
            view.as_ref().is_some_and(|view| view.nlink() > links.get(&view.ino()).copied().unwrap_or_default());
        if disk.keeps(&artifact.dir).expect("looks").is_some() || is_held && outside {
            continue;
        }
        if let Some(view) = view {
            let gone = gone.entry(view.ino()).or_default();
            *gone += 1;
            // An eviction removes the blob of the artifact's own digest only.
            let entry = artifact.manifest.as_ref().and_then(|m| m.files.values().next()).and_then(|entry| entry.sha256);
            let blob = entry.and_then(|digest| files::stat(&disk.layout().blob(&digest)).expect("looks"));
            let blob = blob.is_some_and(|blob| blob.ino() == view.ino() && blobs.contains(&view.ino()));
            freed += if *gone + u64::from(blob) == view.nlink() { view.allocated() } else { 0 };
        }
        victims.push(artifact.dir.clone());
    }
    (freed >= bytes).then_some(victims)
}

#[test]
fn the_index_selects_the_same_victims_as_a_full_scan() {
    let dice = Dice::from_env("INDEX_SEED");
    for round in 0..number_from("INDEX_ROUNDS", 6) {
        let mut dice = dice.split(round);
        let mut fixture = Fixture::new();
        let mut done = Vec::new();
        for _ in 0..STEPS {
            done.push(fixture.step(&mut dice));
            if dice.percent(60) {
                let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fixture.check(&mut dice)));
                assert!(checked.is_ok(), "round {round}, after {done:?}");
            }
        }
    }
}

/// The manifests of the other artifacts are damaged without a line in the change log. Reading one of them again would
/// remove its artifact.
#[test]
fn an_eviction_reads_the_evicted_artifacts_only() {
    let (fixture, artifacts) = (Fixture::new(), number_from("INDEX_ARTIFACTS", 30));
    let (most, least) = (ByteBound::Bytes(artifacts * BLOCK_BYTES), ByteBound::Bytes(0));
    let disk = Disk::open(&fixture.path("cache"), most, least, Sharing::Off).expect("opens");
    let fill = |number: u64| {
        drop(put(&disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"))
    };
    (0..=artifacts).for_each(fill);
    let is_here = |number: u64| disk.layout().artifact(&key(number)).path().metadata().is_ok();
    assert!(!is_here(0) && is_here(1), "the first is evicted for the last");
    for number in 5..artifacts {
        fs::write(disk.layout().artifact(&key(number)).manifest().full(), "{").expect("spoils");
    }
    // Used since it was indexed, so it is kept.
    disk.acquire(&key(1), &Selection::all()).expect("acquires");
    fill(artifacts + 1);
    fill(artifacts + 2);
    assert_eq!([1, 2, 3, 4].map(is_here), [true, false, false, true]);
    assert!((5..artifacts).all(is_here), "the other artifacts were not read");
    // If that is not enough, the whole directory is swept before room is refused.
    let mut hold = disk.hold_budget().expect("holds");
    hold.make_space((artifacts - 1) * BLOCK_BYTES, &key(artifacts + 3)).expect("room enough");
    assert!(!(5..artifacts).any(is_here));
}

#[test]
fn no_artifact_is_evicted_if_all_candidates_would_not_make_enough_room() {
    let fixture = Fixture::new();
    let disk = &fixture.ours[0];
    for number in 0..4 {
        drop(put(disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"));
    }
    let Ok(AcquireOutcome::Leased(held)) = disk.acquire(&key(3), &Selection::all()) else { panic!("it is here") };
    let mut hold = disk.hold_budget().expect("holds");
    let refusal = hold.make_space(6 * BLOCK_BYTES, &key(9)).expect_err("one is in use");
    assert_eq!((refusal.kind(), refusal.is_transient()), (ErrorKind::Full, true));
    assert!(refusal.message().contains("team/model-0@3 is in use"), "{refusal}");
    assert_eq!(disk.scan().expect("scans").len(), 4);
    drop(held);
    hold.make_space(6 * BLOCK_BYTES, &key(9)).expect("room enough");
    assert_eq!(disk.scan().expect("scans").len(), 0);
    hold.release().expect("releases");
}

#[test]
fn leftovers_of_a_dead_fill_are_removed_before_any_artifact() {
    let fixture = Fixture::new();
    let disk = &fixture.ours[0];
    let fill = |number: u64| {
        drop(put(disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"))
    };
    (0..7).for_each(fill);
    assert_eq!(disk.scan().expect("scans").len(), 6, "it has evicted, and the next sweep is not due");
    // A fill that died after publishing its blob and before its manifest: staging and blob share the bytes.
    let digest = Digest::of(b"content 99");
    disk.evict(&key(6)).expect("evicts");
    let wanted = (FilePath::new("f").expect("path"), FileEntry::of(10));
    let staging = disk.try_begin_fill(&key(99), &[wanted], Vec::new()).expect("begins");
    let (staged, blob) = (staging.file(&format!("sha256-{digest}")), disk.layout().blob(&digest));
    fs::write(staged.full(), "content 99").expect("writes");
    fs::create_dir_all(blob.parent().expect("a folder").full()).expect("makes");
    let mut hold = disk.hold_budget().expect("holds");
    hold.begin_change().expect("begins");
    staged.hard_link(&blob).expect("links");
    hold.add(BLOCK_BYTES);
    hold.release().expect("releases");
    staging.abandon();
    fill(7);
    assert!(blob.metadata().is_err(), "the blob belongs to no artifact");
    assert_eq!(disk.scan().expect("scans").len(), 6, "no artifact was evicted");
}

#[test]
fn the_longest_record_fits() {
    let most = r#"{"log":18446744073709551615,"bytes":18446744073709551615}"#;
    let record = Record {
        total: u64::MAX,
        dirty: false,
        boot_id: boot_id(),
        pid: u32::MAX,
        changes: serde_json::from_str(most).expect("a position"),
    };
    let bytes = with_checksum(&serde_json::to_string(&record).expect("encodes")).into_bytes();
    assert!(bytes.len() <= RECORD_BYTES, "{}", String::from_utf8_lossy(&bytes));
}

#[test]
fn a_record_with_a_changed_byte_is_not_used() {
    let fixture = Fixture::new();
    let disk = &fixture.ours[0];
    drop(put(disk, &key(1), "content", &fixture.path("source")).expect("fits"));
    let total = fixture.record().expect("a record").total;
    assert_eq!(total, disk.published_bytes().expect("counts"));
    let lock = OpenOptions::new().read(true).write(true).open(disk.layout().budget_lock().full()).expect("opens");
    let mut written = [0; RECORD_BYTES];
    lock.read_exact_at(&mut written, 0).expect("reads");
    for (at, byte) in written.iter().enumerate() {
        lock.write_all_at(&[byte ^ 1], at as u64).expect("writes");
        // A change in the name of the field `check` makes an unknown field of it, and the total stays right.
        assert!(read_record(&lock).is_none_or(|read| read.total == total && !read.dirty), "byte {at}");
        lock.write_all_at(&[*byte], at as u64).expect("writes");
    }
    let digit = format!("\"total\":{total}");
    let text = String::from_utf8_lossy(&written).replacen(&digit, &format!("\"total\":{}", total ^ 1), 1);
    lock.write_all_at(text.as_bytes(), 0).expect("writes");
    let hold = disk.hold_budget().expect("holds");
    assert_eq!(hold.total, total, "it is counted again");
    hold.release().expect("releases");
}

#[test]
fn a_temporary_file_of_a_dead_writer_is_removed_before_any_artifact() {
    let fixture = Fixture::new();
    let disk = &fixture.ours[0];
    let fill = |number: u64| {
        drop(put(disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"))
    };
    let counted = || disk.usage().expect("counts").0.counted();
    (0..4).for_each(fill);
    let temporary = disk.layout().stagings().join(format!("{}{}", files::TEMPORARY, files::random_name()));
    let file = OpenOptions::new().write(true).create_new(true).open(temporary.full()).expect("makes");
    let writer = FileLock::of_temporary(file).expect("locks");
    writer.file().write_all_at(b"a manifest", 0).expect("writes");
    assert_eq!(counted(), 5 * BLOCK_BYTES);
    let prune = |dry_run| disk.prune(&PruneOptions { dry_run, ..PruneOptions::default() }).expect("prunes");
    for dry_run in [true, false] {
        assert_eq!(prune(dry_run).leftovers, Leftovers::default(), "its writer is alive");
    }
    fill(5);
    assert!(temporary.metadata().is_ok());
    drop(writer);
    assert_eq!(prune(true).leftovers.temporary_bytes, BLOCK_BYTES);
    fill(6);
    assert!(temporary.metadata().is_err(), "its writer died");
    assert_eq!((disk.scan().expect("scans").len(), counted()), (6, 6 * BLOCK_BYTES), "no artifact was evicted");

    disk.evict(&key(6)).expect("evicts");
    fs::write(temporary.full(), "left").expect("writes");
    let pruned = prune(false);
    assert_eq!((pruned.leftovers.temporary_bytes, pruned.freed_bytes), (BLOCK_BYTES, BLOCK_BYTES));
    assert!(temporary.metadata().is_err());
}
