//! Downloads from an S3 stand-in over a faulty network: slow connections, dropped fills, every write mode.

use crate::common::weather::Weather;
use crate::common::{assert_same, get};
use modelcache::cache::{GetOptions, Purpose};
use modelcache::config::WriteMode;
use modelcache::progress::Progress;
use modelcache::{Cache, Reference};
use modelcache_testkit::Content;
use modelcache_testkit::proxy::ProxyFault;
use std::fs;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const PART: u64 = 4 * MIB;

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_a_slow_range_is_requested_again_and_the_slow_connection_is_dropped() {
    let weather = Weather::new().await;
    let content = Content::generated(1, 8 * PART);
    weather.put("model.bin", &content).await;
    // One connection needs minutes for a part. The others are fast.
    weather.proxy.faults().add(ProxyFault::slow(100_000).once());
    let before = weather.proxy.bytes_down();
    let got = get(&weather.cache("a"), "model.bin@1").await.unwrap();
    assert_same(&got.path, &content);
    let ranges = weather.ranges("model.bin");
    let again: Vec<_> = ranges.iter().filter(|(start, _)| !start.is_multiple_of(PART)).collect();
    assert_eq!(again.len(), 1, "{ranges:?}");
    assert!(
        ranges.iter().any(|(start, end)| end == &again[0].1 && start < &again[0].0),
        "the slow request began this range: {ranges:?}"
    );
    let passed = weather.proxy.bytes_down() - before;
    assert!(passed < content.len() + PART / 2, "the slow connection was not dropped: {passed} bytes passed");
}

/// Together these fills need more permits and buffers than exist. They succeed only if a dropped fill releases its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_fill_releases_its_permits_and_buffers() {
    let weather = Weather::new().await;
    let content = Content::generated(2, 20 * PART);
    weather.put("model.bin", &content).await;
    for round in 0..6 {
        let cache = weather.cache("a");
        weather.proxy.faults().add(ProxyFault::hang(3 * MIB));
        let progress = Progress::new();
        let (reference, options) = (Reference::parse("model.bin@1").unwrap(), GetOptions::default());
        let fill = cache.get_with(&reference, &options, &progress);
        let some_came = async {
            while progress.snapshot().remote_bytes < MIB {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            got = fill => panic!("round {round}: {:?}", got.map(|artifact| artifact.path)),
            () = some_came => {}
        }
        weather.proxy.faults().clear();
        weather.proxy.sever();
    }
    let got = get(&weather.cache("a"), "model.bin@1").await.unwrap();
    assert_same(&got.path, &content);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_write_mode_stores_the_same_bytes() {
    let weather = Weather::new().await;
    // Large enough for direct I/O, with a size that is not a multiple of the block size.
    let content = Content::generated(3, 64 * MIB + 4321);
    weather.put("model.bin", &content).await;
    let modes = [WriteMode::Auto, WriteMode::Buffered, WriteMode::Direct];
    for (mode, purpose) in modes.into_iter().flat_map(|mode| [(mode, Purpose::Read), (mode, Purpose::Keep)]) {
        let dir = format!("{mode:?}-{purpose:?}");
        let config = {
            let mut config = weather.config(&dir, &weather.s3.endpoint());
            config.write_mode = mode;
            config
        };
        let options = GetOptions { purpose, ..GetOptions::default() };
        let reference = Reference::parse("model.bin@1").unwrap();
        let got = Cache::open(config).unwrap().get_with(&reference, &options, &Progress::new()).await.unwrap();
        assert_same(&got.path, &content);
        fs::remove_dir_all(weather.house.path(&dir)).unwrap();
    }
}
