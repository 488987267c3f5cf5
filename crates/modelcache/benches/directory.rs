//! What a hit costs in process, in a directory of one artifact and in one of ten thousand.
//!
//! `cargo bench --bench directory [-- --quick]` prints a line a row, cells split by `|`; `cargo xtask bench` makes them
//! part of its table. A hit is a `get` with all that belongs to it: lease, one stat a file, last use.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use modelcache::cache::GetOptions;
use modelcache::config::{ByteBound, Config, HubConfig, OnRemoteDown, RemoteMode, RetryConfig, Sharing};
use modelcache::digest::{Digest, Provenance};
use modelcache::key::{ArtifactKey, FilePath, escape};
use modelcache::manifest::{FileEntry, FileIdentity, Held, Manifest, Shape};
use modelcache::progress::Progress;
use modelcache::{Cache, Reference};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (gets, artifacts) = if quick { (500, 500) } else { (20_000, 10_000) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for count in [1, artifacts] {
        let folder = tempfile::tempdir().unwrap();
        drop(open(folder.path()));
        (0..count).for_each(|number| publish(folder.path(), number));
        let started = Instant::now();
        let cache = open(folder.path());
        runtime.block_on(get(&cache, 0));
        let first = started.elapsed();
        // Makes the lock files, which a fill would have made.
        runtime.block_on(async {
            for number in 0..count {
                get(&cache, number).await;
            }
        });
        let mut times: Vec<Duration> = runtime.block_on(async {
            let mut times = Vec::with_capacity(gets);
            for number in 0..gets {
                let started = Instant::now();
                get(&cache, number % count).await;
                times.push(started.elapsed());
            }
            times
        });
        times.sort();
        let us = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
        println!(
            "warm get in process, {count} artifacts|{:.0} us|p90 {:.0} us, p99 {:.0} us||open and first hit {:.2} ms",
            us(50),
            us(90),
            us(99),
            first.as_secs_f64() * 1e3
        );
    }
}

async fn get(cache: &Cache, number: usize) {
    let reference = Reference::parse(&format!("bench/model-{number}@1")).unwrap();
    let artifact = cache.get(&reference, &GetOptions::default(), &Progress::new()).await.unwrap();
    assert!(artifact.path.is_absolute());
}

fn open(dir: &Path) -> Cache {
    Cache::open(Config {
        dir: dir.to_owned(),
        shared: Sharing::Off,
        lower_dir: None,
        max_bytes: ByteBound::Bytes(1 << 40),
        min_free_bytes: ByteBound::Bytes(0),
        durable: Default::default(),
        remote: None,
        buckets: Default::default(),
        require_checksum: false,
        on_remote_down: OnRemoteDown::Origin,
        remote_mode: RemoteMode::ReadWrite,
        backfill: None,
        origins: Vec::new(),
        hub: HubConfig::default(),
        credentials: Default::default(),
        mlflow: Default::default(),
        oci: Default::default(),
        ref_ttl: Duration::from_secs(60),
        offline: false,
        start_jitter: Duration::ZERO,
        retry: RetryConfig::default(),
    })
    .unwrap()
}

/// An artifact of three small files as a fill would have left it, without the syncs, which ten thousand need not pay.
fn publish(dir: &Path, number: usize) {
    let key = ArtifactKey::bare(&format!("bench/model-{number}@1")).unwrap();
    let folder = dir.join("artifacts").join(escape(key.name.as_str())).join(escape(key.version.as_str()));
    fs::create_dir_all(folder.join("files")).unwrap();
    let mut manifest = Manifest::new(key, Shape::Tree);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let content = format!("{name} of {number}");
        let digest = Digest::of(content.as_bytes());
        let hex = digest.to_string();
        let blob = dir.join("blobs").join(&hex[..2]).join(&hex);
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(&blob, &content).unwrap();
        fs::hard_link(&blob, folder.join("files").join(name)).unwrap();
        let metadata = fs::metadata(&blob).unwrap();
        let mtime_ns = metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec();
        let held = Held::Disk(FileIdentity { inode: metadata.ino(), bytes: metadata.len(), mtime_ns });
        let entry = FileEntry {
            size: metadata.len(),
            sha256: Some(digest),
            provenance: Some(Provenance::Put),
            held: Some(held),
            ..FileEntry::default()
        };
        manifest.files.insert(FilePath::new(name).unwrap(), entry);
    }
    fs::write(folder.join("last-used"), "").unwrap();
    fs::write(folder.join("manifest.json"), manifest.to_bytes().unwrap()).unwrap();
}
