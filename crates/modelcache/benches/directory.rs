//! Measures a hit and a fill that evicts, in process, in directories of 1 to 100,000 artifacts.
//!
//! `cargo bench --bench directory [-- --quick]` prints one line per measurement, with cells separated by `|`.
//! `cargo xtask bench` copies the lines into a table. A hit is a complete `get`: lease, one stat of each file, record
//! of the last use. A fill that evicts is a `get` of a small file from a `file://` origin when the budget is full, so
//! that an artifact has to be evicted first.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use modelcache::cache::GetOptions;
use modelcache::config::{ByteBound, Config};
use modelcache::digest::{Digest, Provenance};
use modelcache::key::{ArtifactKey, FilePath, escape};
use modelcache::manifest::{FileDetails, FileEntry, FileIdentity, HeldIdentity, Manifest, Shape};
use modelcache::progress::Progress;
use modelcache::{Cache, Reference};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// A budget that no measurement reaches.
const BUDGET_BYTES: u64 = 1 << 40;
/// Number of artifacts with the same configuration and tokenizer, like versions of one model.
const VERSIONS: usize = 100;

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (gets, evictions, artifacts_max) = if quick { (2_000, 10, 10_000) } else { (20_000, 50, 100_000) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for count in [1, 100, 10_000, 100_000].into_iter().filter(|count| *count <= artifacts_max) {
        let folder = tempfile::tempdir().unwrap();
        let cache_dir = folder.path().join("cache");
        drop(open(&cache_dir, BUDGET_BYTES));
        (0..count).for_each(|number| publish(&cache_dir, number));
        measure_hits(&runtime, &cache_dir, count, gets);
        if count > 1 {
            measure_evicting_fills(&runtime, folder.path(), count, evictions);
        }
    }
}

/// Prints the line for `gets` hits in a directory of `count` artifacts.
fn measure_hits(runtime: &Runtime, dir: &Path, count: usize, gets: usize) {
    let before = resident_mib();
    let started = Instant::now();
    let cache = open(dir, BUDGET_BYTES);
    runtime.block_on(get(&cache, 0));
    let first = started.elapsed();
    // Get every artifact once: this creates the lock files, as a fill would have done, and reads every manifest.
    runtime.block_on(async {
        for number in 0..count {
            get(&cache, number).await;
        }
    });
    let times = runtime.block_on(async {
        let mut times = Vec::with_capacity(gets);
        for number in 0..gets {
            // Spread the gets over the directory, independently of the order of publication.
            let number = number * 7919 % count;
            let started = Instant::now();
            get(&cache, number).await;
            times.push(started.elapsed());
        }
        times
    });
    let [p50, p90, p99] = percentiles(times, [50, 90, 99]).map(|time| time.as_secs_f64() * 1e6);
    println!(
        "warm get in process, {count} artifacts|{p50:.0} us|p90 {p90:.0} us, p99 {p99:.0} us|opening and first hit \
         {:.2} ms; memory grew by {} MiB after a get of every artifact",
        first.as_secs_f64() * 1e3,
        resident_mib().saturating_sub(before)
    );
}

/// Prints the line for fills that evict, in a directory of `count` artifacts whose size is exactly the budget.
fn measure_evicting_fills(runtime: &Runtime, folder: &Path, count: usize, evictions: usize) {
    let dir = folder.join("cache");
    let used = runtime.block_on(open(&dir, BUDGET_BYTES).stats()).unwrap().used_bytes;
    let (before, cache) = (resident_mib(), open(&dir, used));
    let mut times: Vec<Duration> = (0..=evictions)
        .map(|number| {
            let file = folder.join(format!("small-{number}"));
            fs::write(&file, format!("small file {number} among {count}")).unwrap();
            let reference = Reference::parse(&format!("file://{}", file.display())).unwrap();
            let started = Instant::now();
            let options = GetOptions::default();
            let _ = runtime.block_on(cache.get_with(&reference, &options, &Progress::new())).unwrap();
            started.elapsed()
        })
        .collect();
    let first = times.remove(0);
    let [p50, p90] = percentiles(times, [50, 90]).map(|time| time.as_secs_f64() * 1e3);
    println!(
        "fill that evicts, {count} artifacts|{p50:.1} ms|p90 {p90:.1} ms|first fill of the process {:.0} ms; memory \
         grew by {} MiB",
        first.as_secs_f64() * 1e3,
        resident_mib().saturating_sub(before)
    );
}

/// Returns the percentiles of the times.
fn percentiles<const N: usize>(mut times: Vec<Duration>, percent: [usize; N]) -> [Duration; N] {
    times.sort();
    percent.map(|percent| times[(times.len() - 1) * percent / 100])
}

/// Returns the resident memory of this process.
fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: Option<u64> = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    kib.unwrap_or_default() / 1024
}

/// Gets the artifact `number`, and releases its lease at once.
async fn get(cache: &Cache, number: usize) {
    let reference = Reference::parse(&format!("bench/model-{number}@1")).unwrap();
    let artifact = cache.get_with(&reference, &GetOptions::default(), &Progress::new()).await.unwrap();
    assert!(artifact.path.is_absolute());
}

fn open(dir: &Path, max_bytes: u64) -> Cache {
    let mut config = Config::new(dir);
    config.max_bytes = ByteBound::Bytes(max_bytes);
    config.min_free_bytes = ByteBound::Bytes(0);
    Cache::open(config).unwrap()
}

/// Writes an artifact of three small files as a fill leaves it. Skips the syncs, which would take too long for so many.
fn publish(dir: &Path, number: usize) {
    let key = ArtifactKey::bare(&format!("bench/model-{number}@1")).unwrap();
    let folder = dir.join("artifacts").join(escape(key.name.as_str())).join(escape(key.version.as_str()));
    fs::create_dir_all(folder.join("files")).unwrap();
    let mut manifest = Manifest::new(key, Shape::Tree);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let is_unique = name == "model.safetensors";
        let content = format!("{name} of {}", if is_unique { number } else { number / VERSIONS });
        let digest = Digest::of(content.as_bytes());
        let hex = digest.to_string();
        let blob = dir.join("blobs").join(&hex[..2]).join(&hex);
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        if is_unique || number.is_multiple_of(VERSIONS) {
            fs::write(&blob, &content).unwrap();
        }
        fs::hard_link(&blob, folder.join("files").join(name)).unwrap();
        let metadata = fs::metadata(&blob).unwrap();
        let mtime_ns = metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec();
        let held = HeldIdentity::Disk(FileIdentity { inode: metadata.ino(), bytes: metadata.len(), mtime_ns });
        let entry = FileEntry::with(
            metadata.len(),
            FileDetails {
                sha256: Some(digest),
                provenance: Some(Provenance::Put),
                held: Some(held),
                ..FileDetails::default()
            },
        );
        manifest.files.insert(FilePath::new(name).unwrap(), entry);
    }
    fs::write(folder.join("last-used"), "").unwrap();
    fs::write(folder.join("manifest.json"), manifest.to_bytes().unwrap()).unwrap();
}
