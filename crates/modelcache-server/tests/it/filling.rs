//! Files that are read while they download, and files for which the cache has no room.

use crate::common::*;
use futures::StreamExt as _;
use modelcache::config::{ByteBound, Config, RetryConfig};
use modelcache::ladder::LadderHasher;
use modelcache::manifest::Manifest;
use modelcache_server::Options;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use reqwest::Method;
use reqwest::header::RANGE;
use std::fs;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Part size of the ladder in these tests.
const PART: u64 = 256 << 10;
const SIZE: u64 = 16 * MIB + 321;
const MODEL: &str = "/cache/artifacts/hf%3A%2F%2Forg%2Fmodel@main/files/model.bin";

fn content() -> Content {
    Content::generated(5, SIZE)
}

async fn house() -> House {
    House::with_model(&[("model.bin", content())]).await.0
}

/// Gives requests so much time that only the test decides when they go on.
fn patient(mut config: Config) -> Config {
    config.retry = RetryConfig { deadline: Duration::from_secs(30), read_timeout: Duration::from_secs(600) };
    config
}

/// A daemon whose remote has `m@1`, with a ladder of small parts. Its bytes come through a proxy.
async fn with_ladder() -> (House, Bucket, Served) {
    let (house, bucket) = (House::new().await, Bucket::new().await);
    let mut config = house.config("publisher");
    config.remote = bucket.as_remote(&bucket.s3.endpoint());
    config.retry.read_timeout = Duration::from_secs(60);
    let publisher = Served::start(config, Options::default());
    house.put(&publisher, "m@1", &[("", content())]).await;
    let path = bucket.s3.object_path(BUCKET, "cache/m/1/.modelcache/manifest.json");
    let mut manifest = Manifest::from_bytes(&fs::read(&path).unwrap()).unwrap();
    let mut hasher = LadderHasher::new(PART);
    hasher.update(&content().to_vec().unwrap());
    manifest.files.values_mut().next().unwrap().ladder = Some(hasher.finish().1);
    fs::write(path, manifest.to_bytes().unwrap()).unwrap();
    let mut config = patient(house.config("a"));
    config.remote = bucket.as_remote(&bucket.proxy.url());
    let served = Served::start(config, Options::default());
    (house, bucket, served)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_range_waits_only_for_its_own_verified_part() {
    let (_house, bucket, served) = with_ladder().await;
    let path = "/cache/artifacts/m@1/files/source%20m@1";
    bucket.proxy.let_through(SIZE / 2);
    let middle = 9 * MIB..9 * MIB + 100;
    let range = format!("bytes={}-{}", middle.start, middle.end - 1);
    served.get_with(path, "range", &range).await.is(206).has(&content(), middle);
    // The end is there before the middle, and the fill is not over.
    let mut end = Box::pin(served.get_with(path, "range", "bytes=-10"));
    let waits = timeout(Duration::from_millis(300), &mut end).await;
    assert!(served.cache.list().await.unwrap().is_empty(), "the file is whole already");
    bucket.proxy.let_through(1 << 40);
    let end = if let Ok(reply) = waits { reply } else { end.await };
    end.is(206).has(&content(), SIZE - 10..SIZE);
    served.get(path).await.ok().has(&content(), 0..SIZE);
    let gets = bucket.s3.object_gets("source");
    // On a busy machine a few parts are requested twice, because the first request is slow.
    assert!(gets.len() < SIZE.div_ceil(PART) as usize + 10, "{} requests", gets.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_bytes_of_a_file_arrive_while_the_rest_downloads() {
    let house = house().await;
    // Not even the first slice of the first part is full.
    let stall = HubFault::stall_at(100 << 10, Duration::from_secs(600)).on("model.bin");
    house.hub.faults().add(stall);
    let served = Served::start(patient(house.config("a")), Options::default());
    for path in
        [MODEL.to_owned(), served.get("/org/model/resolve/main/model.bin").await.header("location").unwrap().into()]
    {
        let response = served.request(Method::GET, &path).send().await.unwrap();
        let mut body = response.bytes_stream();
        let first = timeout(Duration::from_secs(20), body.next()).await.expect("no byte arrives").unwrap().unwrap();
        assert_eq!(first, content().read(0..first.len() as u64).unwrap());
    }
    // HEAD does not wait for the file at all.
    served.head(MODEL).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_bytes_are_wrong_at_the_origin_never_completes_and_is_not_stored() {
    let house = house().await;
    house.hub.faults().add(HubFault::flip(10 * MIB).on("model.bin"));
    let served = house.daemon();
    let location = served.get("/org/model/resolve/main/model.bin").await.header("location").unwrap().to_owned();
    for path in [MODEL, &location] {
        for range in [None, Some("bytes=5-"), Some("bytes=-20"), Some("bytes=0-0"), Some("bytes=10485750-10485770")] {
            let request = served.request(Method::GET, path);
            let reply = Reply::of(match range {
                Some(range) => request.header(RANGE, range),
                None => request,
            })
            .await;
            let is_complete = !reply.cut && reply.status.is_success();
            assert!(!is_complete, "{path} {range:?} completed: {reply:?}");
        }
    }
    let held: u64 = served.cache.list().await.unwrap().iter().map(|artifact| artifact.held_bytes).sum();
    assert_eq!(held, 0, "wrong bytes are stored");
    assert!(served.value("/cache/metrics", "/http/cut_responses").await.as_u64() > Some(0));
    let errors = served.value("/cache/activity", "/errors").await;
    assert!(errors.to_string().contains("corrupt"), "{errors}");

    // Clients repeat a download without end as long as each attempt brings bytes, so it is refused for a while.
    house.hub.faults().clear();
    let before = house.hub.body_bytes();
    for path in [MODEL, &location] {
        served.get(path).await.is(502);
    }
    assert_eq!(house.hub.body_bytes(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_wrong_byte_on_the_way_is_mended_by_the_second_request() {
    let house = house().await;
    house.hub.faults().add(HubFault::flip(10 * MIB).on("model.bin").once());
    let served = house.daemon();
    let first = served.get(MODEL).await;
    let have = first.body.len();
    if first.cut {
        // The bytes that the client has may be wrong, so the rest of the file is of no use to it.
        served.get_with(MODEL, "range", &format!("bytes={have}-")).await.ok().has(&content(), 0..SIZE);
    } else {
        first.ok().has(&content(), 0..SIZE);
    }
    served.get_with(MODEL, "range", "bytes=1000-1009").await.is(206).has(&content(), 1000..1010);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_larger_than_the_budget_is_passed_through_and_counted() {
    let house = house().await;
    let mut config = house.config("a");
    config.max_bytes = ByteBound::Bytes(MIB);
    let served = Served::start(config, Options::default());
    served.get(MODEL).await.ok().has(&content(), 0..SIZE);
    served.get_with(MODEL, "range", "bytes=5000000-5000099").await.is(206).has(&content(), 5_000_000..5_000_100);
    served.get_with(MODEL, "range", "bytes=-10").await.is(206).has(&content(), SIZE - 10..SIZE);
    let location = served.get("/org/model/resolve/main/model.bin").await.header("location").unwrap().to_owned();
    served.get(&location).await.ok().has(&content(), 0..SIZE);
    let counts = served.value("/cache/metrics", "").await;
    assert_eq!((&counts["uncached_files"], &counts["http"]["cut_responses"]), (&4.into(), &0.into()), "{counts}");
    assert!(served.cache.list().await.unwrap().iter().all(|artifact| artifact.held_bytes == 0));
    served.post(serde_json::json!({ "ref": "hf://org/model" })).await.refused(507);

    house.hub.faults().add(HubFault::flip(10 * MIB).on("model.bin"));
    assert!(served.get(MODEL).await.cut, "wrong bytes were passed through as a whole file");
    house.hub.faults().clear();
    // The client that was cut starts over.
    served.get_with(MODEL, "range", "bytes=1000-").await.ok().has(&content(), 0..SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_for_which_the_disk_has_no_room_is_passed_through() {
    let house = house().await;
    let mut config = house.config("a");
    config.min_free_bytes = ByteBound::Bytes(1 << 60);
    let served = Served::start(config, Options::default());
    served.get(MODEL).await.ok().has(&content(), 0..SIZE);
    assert_eq!(served.value("/cache/metrics", "/uncached_files").await, 1);
    // The daemon says why nothing is stored.
    served.post(serde_json::json!({ "ref": "hf://org/model" })).await.refused(507);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_the_origin_cuts_is_resumed_unseen_by_the_client() {
    let house = house().await;
    house.hub.faults().add(HubFault::cut(3 * MIB).on("model.bin").times(2));
    let served = house.daemon();
    served.get(MODEL).await.ok().has(&content(), 0..SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_a_fill_that_the_next_one_continues() {
    let house = house().await;
    house.hub.faults().add(HubFault::stall_at(15 * MIB, Duration::from_secs(600)).on("model.bin").once());
    let served = Served::start(patient(house.config("a")), Options::default());
    let response = served.request(Method::GET, MODEL).send().await.unwrap();
    let mut body = response.bytes_stream();
    body.next().await.unwrap().unwrap();
    // Everything but the part that hangs is there.
    until(async || house.hub.body_bytes() >= 12 * MIB).await;
    sleep(Duration::from_millis(500)).await;
    drop(body);
    until(async || served.value("/cache/stats", "/leases").await == 0).await;
    let before = house.hub.body_bytes();
    served.get(MODEL).await.ok().has(&content(), 0..SIZE);
    let again = house.hub.body_bytes() - before;
    assert!(again < SIZE * 3 / 4, "{again} bytes were downloaded again");
}
