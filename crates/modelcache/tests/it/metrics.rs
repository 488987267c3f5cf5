//! Metrics of gets that meet failures: retries, throttling, stalls, corrupt files and joined fills.

use crate::common::weather::{BUCKET, Weather};
use crate::common::{House, get, until};
use modelcache::Cache;
use modelcache::config::Backfill;
use modelcache::metrics::{ByTier, text};
use modelcache::progress::Phase;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 3 * MIB;
const MODEL: &str = "hf://org/model";

#[tokio::test(flavor = "multi_thread")]
async fn retries_throttling_stalls_and_the_repair_of_a_corrupt_object_are_counted() {
    let weather = Weather::new().await;
    let hub = &weather.house.hub;
    hub.repo("org/model").commit().lfs("model.bin", Content::generated(1, SIZE)).publish().unwrap();
    let open = |dir: &str| {
        let mut config = weather.config(dir, &weather.s3.endpoint());
        config.backfill = Some(Backfill::Wait);
        config.retry.deadline = Duration::from_secs(60);
        Cache::open(config).unwrap()
    };
    let first = open("a");
    drop(get(&first, MODEL).await.unwrap());
    let counts = first.metrics().counts();
    assert_eq!((counts.received_bytes.origin, counts.origin_avoided_bytes), (SIZE, 0));
    assert_eq!((counts.uploaded_bytes, counts.retries), (SIZE, ByTier::default()));

    // The object on the remote is damaged, and the origin fails in three ways before it delivers the file.
    let key = weather.s3.keys(BUCKET).into_iter().find(|key| key.ends_with("model.bin")).unwrap();
    weather.s3.flip_byte(BUCKET, &key, MIB).unwrap();
    hub.faults().add(HubFault::throttle(1).on("model.bin").once());
    hub.faults().add(HubFault::status(500).on("model.bin").once());
    hub.faults().add(HubFault::stall(MIB, Duration::from_secs(5)).on("model.bin").once());
    let cache = open("b");
    let start = || {
        let cache = cache.clone();
        tokio::spawn(async move { get(&cache, MODEL).await.map(drop) })
    };
    let leader = start();
    until(|| cache.fills().iter().any(|fill| fill.retries > 0 && fill.last_error.is_some())).await;
    let [fill] = &cache.fills()[..] else { panic!("{:?}", cache.fills()) };
    assert!(fill.reference.starts_with("hf://org/model@"), "{fill:?}");
    assert_eq!((fill.phase, fill.total_bytes), (Phase::Download, Some(SIZE)), "{fill:?}");
    assert!(fill.remote_bytes >= 2 * SIZE && fill.last_error.as_ref().unwrap().contains("throttled"), "{fill:?}");
    let joined = start();
    until(|| cache.metrics().counts().waiting_calls == 1).await;
    assert_eq!(cache.metrics().counts().fills_in_flight, 1);
    leader.await.unwrap().unwrap();
    joined.await.unwrap().unwrap();

    until(|| cache.metrics().counts().fills_in_flight == 0).await;
    let counts = cache.metrics().counts();
    assert!(cache.fills().is_empty() && counts.waiting_calls == 0);
    let only = |remote, origin| ByTier { disk: 0, remote, origin };
    assert_eq!((counts.hits, counts.misses, counts.waits.count), (only(0, 1), 2, 1));
    assert_eq!(counts.retries, only(1, 2), "one for the corrupt part; a 429 and a 500");
    assert_eq!((counts.throttled, counts.stalls.hedged), (only(0, 1), only(0, 1)));
    assert_eq!((counts.corrupt_files, counts.corrupt_bytes), (only(1, 0), only(2 * SIZE, 0)));
    assert_eq!(counts.repaired_files, only(1, 0));
    assert_eq!(counts.received_bytes.remote, 2 * SIZE);
    assert!(counts.received_bytes.origin >= SIZE, "{counts:?}");
    assert_eq!(counts.phase_seconds["download"].count(), 1);
    let text = text(&[counts.families(), cache.stats().await.unwrap().families()].concat());
    for line in [
        "modelcache_retries_total{tier=\"origin\"} 2\n",
        "modelcache_stalls_total{kind=\"hedged\",tier=\"origin\"} 1\n",
        "modelcache_phase_seconds_bucket{phase=\"join\",le=\"+Inf\"} 1\n",
        "modelcache_directory_artifacts 1\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }

    // A third machine finds the right bytes on the remote.
    let third = open("c");
    drop(get(&third, MODEL).await.unwrap());
    let counts = third.metrics().counts();
    assert_eq!((counts.received_bytes, counts.corrupt_files), (only(SIZE, 0), ByTier::default()));
    assert_eq!(counts.origin_avoided_bytes, SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_changed_on_disk_is_counted_as_corrupt_and_after_the_next_get_as_repaired() {
    let house = House::new().await;
    house.hub.repo("org/model").commit().lfs("model.bin", Content::generated(1, SIZE)).publish().unwrap();
    let cache = house.cache("a");
    let file = get(&cache, MODEL).await.unwrap().path.join("model.bin");
    fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    File::options().write(true).open(&file).unwrap().write_all_at(b"other bytes", MIB).unwrap();
    cache.scrub(u64::MAX, |_| ()).await.unwrap();
    cache.scrub(u64::MAX, |_| ()).await.unwrap();
    let counts = cache.metrics().counts();
    assert_eq!((counts.corrupt_files.disk, counts.corrupt_bytes.disk, counts.repaired_files.disk), (1, SIZE, 0));
    drop(get(&cache, MODEL).await.unwrap());
    assert_eq!(cache.metrics().counts().repaired_files.disk, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_cannot_resolve_a_revision_is_down_even_if_the_last_known_one_is_used() {
    let house = House::new().await;
    house.hub.repo("org/model").commit().lfs("model.bin", Content::generated(1, SIZE)).publish().unwrap();
    let mut config = house.config("a");
    config.retry.deadline = Duration::ZERO;
    config.ref_ttl = Duration::ZERO;
    let cache = Cache::open(config).unwrap();
    let is_up = || cache.metrics().counts().tiers["origin"].up;
    drop(get(&cache, MODEL).await.unwrap());
    assert!(is_up());
    house.hub.down(true);
    drop(get(&cache, MODEL).await.unwrap());
    assert!(!is_up());
    house.hub.down(false);
    drop(get(&cache, MODEL).await.unwrap());
    assert!(is_up());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_fills_does_not_keep_them_running() {
    let house = House::new().await;
    house.hub.repo("org/model").commit().lfs("model.bin", Content::generated(1, SIZE)).publish().unwrap();
    house.hub.faults().add(HubFault::throttle(600).on("model.bin"));
    let mut config = house.config("a");
    config.retry.deadline = Duration::from_secs(600);
    let cache = Cache::open(config).unwrap();
    let call = tokio::spawn({
        let cache = cache.clone();
        async move { get(&cache, MODEL).await.map(drop) }
    });
    until(|| cache.fills().iter().any(|fill| fill.retries > 0)).await;
    let fills = cache.fills();
    call.abort();
    until(|| cache.metrics().counts().fills_in_flight == 0).await;
    assert!(cache.fills().is_empty() && fills.len() == 1);
}
