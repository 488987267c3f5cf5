//! Tests of the budget and the index. After random operations of two processes, the total must equal a full count, and
//! the index must select the same candidates for eviction as a scan of the whole directory.
//!
//! Environment variables: `INDEX_SEED` repeats a run, `INDEX_ROUNDS` is the number of runs, and `INDEX_ARTIFACTS` is
//! the number of artifacts in `an_eviction_reads_the_evicted_artifacts_only`.

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

/// Number of different keys.
const KEYS: u64 = 14;
/// Number of different contents. It is less than [`KEYS`], so that artifacts share blobs.
const CONTENTS: u64 = 9;
/// Budget of the directory: six files of one block each.
const BUDGET_BYTES: u64 = 6 * BLOCK_BYTES;
/// Number of random operations in one run.
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
    let input = InputFile { path: path.clone(), from: source.to_owned(), size, executable: false };
    let staged = copy_input(&input, &staging.file("copy"), &Progress::new())?;
    let staged = crate::disk::StagedFile { name: "copy".into(), ..staged };
    listing.files.insert(path.clone(), staged.entry.clone());
    disk.publish(staging, &listing, &BTreeMap::from([(path, staged)]))
}

/// Returns true if the view has one link, and so no blob. A change of such a view by another program is noticed only at
/// the next count.
fn has_no_blob(view: &RootedPath) -> bool {
    view.metadata().is_ok_and(|metadata| metadata.nlink() == 1)
}

/// One directory, opened twice as by two processes.
struct Fixture {
    folder: tempfile::TempDir,
    disks: [Disk; 2],
    /// Leases that are held until a later step releases them.
    leased: Vec<LeasedArtifact>,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let open = || {
            let (max_bytes, min_free) = (ByteBound::Bytes(BUDGET_BYTES), ByteBound::Bytes(0));
            Disk::open(&folder.path().join("cache"), max_bytes, min_free, Sharing::Off).expect("opens")
        };
        let disks = [open(), open()];
        Self { folder, disks, leased: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn record(&self) -> Option<BudgetRecord> {
        read_record(&self.disks[0].layout().budget_lock().open(false).ok()?)
    }

    /// Runs a random operation of a random process. Returns a description of the operation.
    fn step(&mut self, dice: &mut Dice) -> &'static str {
        let disk = dice.pick(&self.disks).clone();
        let key = key(dice.below(KEYS));
        let (content, source) = (format!("content {}", dice.below(CONTENTS)), self.path("source"));
        let dir = disk.layout().artifact(&key);
        match dice.below(19) {
            0..=6 => {
                let _ = put(&disk, &key, &content, &source);
                "put"
            }
            7 | 8 => {
                let _ = disk.acquire(&key, &Selection::all());
                "acquire"
            }
            9 => match disk.try_acquire_fast(&key, &Selection::all()) {
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
                let _ = disk.evict(&key);
                "evict"
            }
            12 => {
                let _ = if dice.percent(50) { disk.pin(&key, &Pin::default()) } else { disk.unpin(&key).map(drop) };
                "pin or unpin"
            }
            13 => {
                let outside = self.path(&format!("outside-{}", dice.below(3)));
                let _ = fs::remove_file(&outside);
                if !has_no_blob(&dir.files().join("f")) {
                    let _ = fs::hard_link(dir.files().join("f").full(), outside);
                }
                "link outside"
            }
            14 => {
                let view = dir.files().join("f");
                if !has_no_blob(&view) && view.unlink().is_ok() && dice.percent(50) {
                    fs::write(view.full(), "CONTENT 1").expect("writes");
                }
                let _ = disk.acquire(&key, &Selection::all());
                "a view was removed or replaced"
            }
            15 => {
                let log = disk.layout().changes();
                let length = log.metadata().map_or(0, |metadata| metadata.len());
                match (dice.below(3), OpenOptions::new().write(true).open(log.full())) {
                    (0, Ok(log)) => log.set_len(dice.below(length + 1)).expect("cuts"),
                    (1, Ok(log)) => log.write_all_at(b"garbage", dice.below(length + 1)).expect("garbles"),
                    _ => drop(log.unlink()),
                }
                "the log was truncated, overwritten or removed"
            }
            16 => {
                let guard = disk.lock_budget().expect("holds");
                let folder = below_artifacts(&disk, &dir).expect("a folder");
                guard.log_end.append(&disk.layout().changes(), &folder);
                "killed between log and record"
            }
            17 => {
                disk.lock_budget().expect("holds").begin_change_of(&dir).expect("announces");
                "killed between record and manifest"
            }
            _ => {
                let wanted = (FilePath::new("f").expect("path"), FileEntry::of(9));
                if let Ok(staging) = disk.try_begin_fill(&key, &[wanted], Vec::new()) {
                    let digest = Digest::of(content.as_bytes());
                    fs::write(staging.file(&format!("sha256-{digest}")).full(), &content).expect("writes");
                }
                "killed while filling"
            }
        }
    }

    /// Asserts that the total and the index of a random process agree with the directory.
    fn check(&self, dice: &mut Dice) {
        let disk = dice.pick(&self.disks);
        let mut guard = disk.lock_budget().expect("holds");
        assert_eq!(guard.total, disk.published_bytes().expect("counts"), "the total");
        let fresh = Index::read(disk, guard.log_end_at_start).expect("reads");
        fresh.assert_same(&guard.index().expect("reads"));
        for bytes in [1, 2 * BLOCK_BYTES, BUDGET_BYTES / 2, BUDGET_BYTES] {
            let own = key(dice.below(KEYS));
            let own = disk.layout().artifact(&own);
            let mut search = VictimSearch { own: own.clone(), cursor: None, obstacles: Obstacles::default() };
            let chosen = guard.victims(bytes, &mut search).expect("chooses");
            let chosen = chosen.map(|victims| victims.into_iter().map(|victim| victim.dir).collect::<Vec<_>>());
            assert_eq!(chosen, victims_by_scan(disk, bytes, &own), "victims for {bytes} bytes");
        }
        guard.release().expect("releases");
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
    let (mut removed_links, mut freed, mut victims) = (HashMap::<u64, u64>::new(), 0, Vec::new());
    for artifact in artifacts.iter().filter(|artifact| artifact.dir != *own) {
        if freed >= bytes {
            break;
        }
        let view = files::stat(&artifact.dir.files().join("f")).expect("examines");
        let is_held = artifact.manifest.iter().flat_map(|m| m.files.values()).any(|entry| entry.held.is_some());
        let is_linked_outside =
            view.as_ref().is_some_and(|view| view.nlink() > links.get(&view.ino()).copied().unwrap_or_default());
        if disk.lease_or_pin(&artifact.dir).expect("examines").is_some() || is_held && is_linked_outside {
            continue;
        }
        if let Some(view) = view {
            let removed = removed_links.entry(view.ino()).or_default();
            *removed += 1;
            // An eviction removes the blob of the artifact's own digest only.
            let digest =
                artifact.manifest.as_ref().and_then(|m| m.files.values().next()).and_then(|entry| entry.sha256);
            let blob = digest.and_then(|digest| files::stat(&disk.layout().blob(&digest)).expect("examines"));
            let is_blob = blob.is_some_and(|blob| blob.ino() == view.ino() && blobs.contains(&view.ino()));
            freed += if *removed + u64::from(is_blob) == view.nlink() { view.allocated() } else { 0 };
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
    let (max_bytes, min_free) = (ByteBound::Bytes(artifacts * BLOCK_BYTES), ByteBound::Bytes(0));
    let disk = Disk::open(&fixture.path("cache"), max_bytes, min_free, Sharing::Off).expect("opens");
    let fill = |number: u64| {
        drop(put(&disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"))
    };
    (0..=artifacts).for_each(fill);
    let is_on_disk = |number: u64| disk.layout().artifact(&key(number)).path().metadata().is_ok();
    assert!(!is_on_disk(0) && is_on_disk(1), "the first artifact is evicted for the last");
    for number in 5..artifacts {
        fs::write(disk.layout().artifact(&key(number)).manifest().full(), "{").expect("spoils");
    }
    // Use artifact 1 after it was indexed, so that it is not the next to be evicted.
    disk.acquire(&key(1), &Selection::all()).expect("acquires");
    fill(artifacts + 1);
    fill(artifacts + 2);
    assert_eq!([1, 2, 3, 4].map(is_on_disk), [true, false, false, true]);
    assert!((5..artifacts).all(is_on_disk), "the other artifacts were not read");
    // If the evictions do not make enough room, the whole directory is swept before the request is refused.
    let mut guard = disk.lock_budget().expect("holds");
    guard.make_space((artifacts - 1) * BLOCK_BYTES, &key(artifacts + 3)).expect("room enough");
    assert!(!(5..artifacts).any(is_on_disk));
}

#[test]
fn no_artifact_is_evicted_if_all_candidates_would_not_make_enough_room() {
    let fixture = Fixture::new();
    let disk = &fixture.disks[0];
    for number in 0..4 {
        drop(put(disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"));
    }
    let Ok(AcquireOutcome::Leased(held)) = disk.acquire(&key(3), &Selection::all()) else { panic!("not leased") };
    let mut guard = disk.lock_budget().expect("holds");
    let refusal = guard.make_space(6 * BLOCK_BYTES, &key(9)).expect_err("one artifact is in use");
    assert_eq!((refusal.kind(), refusal.is_transient()), (ErrorKind::Full, true));
    assert!(refusal.message().contains("team/model-0@3 is in use"), "{refusal}");
    assert_eq!(disk.scan().expect("scans").len(), 4);
    drop(held);
    guard.make_space(6 * BLOCK_BYTES, &key(9)).expect("room enough");
    assert_eq!(disk.scan().expect("scans").len(), 0);
    guard.release().expect("releases");
}

#[test]
fn leftovers_of_a_dead_fill_are_removed_before_any_artifact() {
    let fixture = Fixture::new();
    let disk = &fixture.disks[0];
    let fill = |number: u64| {
        drop(put(disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"))
    };
    (0..7).for_each(fill);
    assert_eq!(disk.scan().expect("scans").len(), 6, "one artifact was evicted, and the next sweep is not due");
    // A fill died after it published its blob and before it published its manifest. The staged file is a link to the
    // blob.
    let digest = Digest::of(b"content 99");
    disk.evict(&key(6)).expect("evicts");
    let wanted = (FilePath::new("f").expect("path"), FileEntry::of(10));
    let staging = disk.try_begin_fill(&key(99), &[wanted], Vec::new()).expect("begins");
    let (staged, blob) = (staging.file(&format!("sha256-{digest}")), disk.layout().blob(&digest));
    fs::write(staged.full(), "content 99").expect("writes");
    fs::create_dir_all(blob.parent().expect("a folder").full()).expect("makes");
    let mut guard = disk.lock_budget().expect("holds");
    guard.begin_change().expect("begins");
    staged.hard_link(&blob).expect("links");
    guard.add(BLOCK_BYTES);
    guard.release().expect("releases");
    staging.abandon();
    fill(7);
    assert!(blob.metadata().is_err(), "the blob belongs to no artifact");
    assert_eq!(disk.scan().expect("scans").len(), 6, "no artifact was evicted");
}

#[test]
fn the_longest_record_fits() {
    let longest_position = r#"{"log":18446744073709551615,"bytes":18446744073709551615}"#;
    let record = BudgetRecord {
        total: u64::MAX,
        dirty: false,
        boot_id: boot_id(),
        pid: u32::MAX,
        changes: serde_json::from_str(longest_position).expect("a position"),
    };
    let bytes = with_checksum(&serde_json::to_string(&record).expect("encodes")).into_bytes();
    assert!(bytes.len() <= RECORD_BYTES, "{}", String::from_utf8_lossy(&bytes));
}

#[test]
fn a_record_with_a_changed_byte_is_not_used() {
    let fixture = Fixture::new();
    let disk = &fixture.disks[0];
    drop(put(disk, &key(1), "content", &fixture.path("source")).expect("fits"));
    let total = fixture.record().expect("a record").total;
    assert_eq!(total, disk.published_bytes().expect("counts"));
    let lock = OpenOptions::new().read(true).write(true).open(disk.layout().budget_lock().full()).expect("opens");
    let mut written = [0; RECORD_BYTES];
    lock.read_exact_at(&mut written, 0).expect("reads");
    for (at, byte) in written.iter().enumerate() {
        lock.write_all_at(&[byte ^ 1], at as u64).expect("writes");
        // If the name of the field `check` is changed, the record has an unknown field, but the total is right.
        assert!(read_record(&lock).is_none_or(|read| read.total == total && !read.dirty), "byte {at}");
        lock.write_all_at(&[*byte], at as u64).expect("writes");
    }
    let field = format!("\"total\":{total}");
    let text = String::from_utf8_lossy(&written).replacen(&field, &format!("\"total\":{}", total ^ 1), 1);
    lock.write_all_at(text.as_bytes(), 0).expect("writes");
    let guard = disk.lock_budget().expect("holds");
    assert_eq!(guard.total, total, "the bytes are counted again");
    guard.release().expect("releases");
}

#[test]
fn a_temporary_file_of_a_dead_writer_is_removed_before_any_artifact() {
    let fixture = Fixture::new();
    let disk = &fixture.disks[0];
    let fill = |number: u64| {
        drop(put(disk, &key(number), &format!("content {number}"), &fixture.path("source")).expect("fits"))
    };
    let counted = || disk.usage().expect("counts").0.counted();
    (0..4).for_each(fill);
    let temporary = disk.layout().stagings().join(format!("{}{}", files::TEMPORARY_PREFIX, files::random_name()));
    let file = OpenOptions::new().write(true).create_new(true).open(temporary.full()).expect("makes");
    let writer = FileLock::of_temporary(file).expect("locks");
    writer.file().write_all_at(b"a manifest", 0).expect("writes");
    assert_eq!(counted(), 5 * BLOCK_BYTES);
    let prune = |dry_run| disk.prune(&PruneOptions { dry_run, ..PruneOptions::default() }).expect("prunes");
    for dry_run in [true, false] {
        assert_eq!(prune(dry_run).leftovers, Leftovers::default(), "the writer is alive");
    }
    fill(5);
    assert!(temporary.metadata().is_ok());
    drop(writer);
    assert_eq!(prune(true).leftovers.temporary_bytes, BLOCK_BYTES);
    fill(6);
    assert!(temporary.metadata().is_err(), "the writer died");
    assert_eq!((disk.scan().expect("scans").len(), counted()), (6, 6 * BLOCK_BYTES), "no artifact was evicted");

    disk.evict(&key(6)).expect("evicts");
    fs::write(temporary.full(), "left").expect("writes");
    let pruned = prune(false);
    assert_eq!((pruned.leftovers.temporary_bytes, pruned.freed_bytes), (BLOCK_BYTES, BLOCK_BYTES));
    assert!(temporary.metadata().is_err());
}
