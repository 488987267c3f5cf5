//! Single-flight within a process: concurrent gets of one artifact share one fill, also if some of them are cancelled.

use crate::common::{House, assert_same, get, get_some, until};
use modelcache::cache::GetOptions;
use modelcache::config::{ByteBound, RetryConfig};
use modelcache::progress::{Phase, Progress};
use modelcache::{Cache, ErrorKind, Reference};
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use std::time::Duration;
use tokio::time::sleep;

const MIB: u64 = 1 << 20;
const MODEL: &str = "hf://org/model";
const FOR_EVER: Duration = Duration::from_secs(600);

fn big() -> Content {
    Content::generated(1, 20 * MIB + 4321)
}

/// An environment in which the Hub has a fault for the model.
async fn house(fault: HubFault) -> House {
    let house = House::new().await;
    house.hub.repo("org/model").commit().file("config.json", "{}").lfs("model.bin", big()).publish().unwrap();
    house.hub.faults().add(fault.on("model.bin"));
    house
}

/// One response with a part of the model stalls. The rest of that part comes half a second later, over a second
/// connection.
fn stall_once() -> HubFault {
    HubFault::stall(MIB, FOR_EVER).once()
}

fn patient(house: &House) -> Cache {
    let retry = RetryConfig { deadline: Duration::from_secs(3), read_timeout: Duration::from_secs(600) };
    Cache::open({
        let mut config = house.config("a");
        config.retry = retry;
        config
    })
    .unwrap()
}

fn bytes_of_all() -> u64 {
    big().len() + 2
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_leader_or_waiter_leaves_the_fill_to_the_others() {
    let house = house(stall_once()).await;
    let cache = patient(&house);
    let start = || {
        let cache = cache.clone();
        tokio::spawn(async move { get(&cache, MODEL).await.map(|artifact| artifact.path) })
    };
    let leader = start();
    until(|| house.hub.body_bytes() > 0).await;
    let (waiter, other) = (start(), start());
    until(|| cache.metrics().counts().waiting_calls == 2).await;
    leader.abort();
    waiter.abort();
    assert_same(&other.await.unwrap().unwrap().join("model.bin"), &big());
    assert_eq!(house.hub.body_bytes(), bytes_of_all(), "each byte was fetched once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_without_waiters_ends_and_the_next_fill_resumes_it() {
    // The last part stalls on each connection.
    let house = house(HubFault::stall_at(17 * MIB, FOR_EVER)).await;
    let cache = patient(&house);
    let only = tokio::spawn({
        let cache = cache.clone();
        async move { get(&cache, MODEL).await.map(|_| ()) }
    });
    until(|| house.hub.body_bytes() >= big().len() - 8 * MIB).await;
    sleep(Duration::from_millis(300)).await;
    only.abort();
    assert!(only.await.unwrap_err().is_cancelled());
    // Writes in flight keep the staging folder locked for a moment.
    sleep(Duration::from_millis(300)).await;
    house.hub.faults().clear();
    house.hub.clear_requests();
    let got = get(&cache, MODEL).await.unwrap();
    assert_same(&got.path.join("model.bin"), &big());
    assert!(house.hub.body_bytes() <= 8 * MIB + 2, "{} bytes were fetched again", house.hub.body_bytes());
    assert_eq!(got.report.bytes.origin, house.hub.body_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn waiters_see_progress_and_get_a_report() {
    let house = house(stall_once()).await;
    let cache = patient(&house);
    let first = tokio::spawn({
        let cache = cache.clone();
        async move { get(&cache, MODEL).await.unwrap().report }
    });
    until(|| house.hub.body_bytes() > 0).await;
    let progress = Progress::new();
    let waiter = tokio::spawn({
        let (cache, progress) = (cache.clone(), progress.clone());
        async move {
            let reference = Reference::parse(MODEL).unwrap();
            cache.get_with(&reference, &GetOptions::default(), &progress).await.unwrap().report
        }
    });
    until(|| progress.snapshot().phase == Phase::Join && progress.snapshot().total_bytes == bytes_of_all()).await;
    until(|| progress.snapshot().done_bytes > 0).await;
    let (first, waiter) = (first.await.unwrap(), waiter.await.unwrap());
    assert_eq!((first.bytes.origin, first.bytes.disk), (bytes_of_all(), 0));
    assert_eq!((waiter.bytes.origin, waiter.bytes.disk), (0, bytes_of_all()), "bytes are not counted twice");
    assert!(waiter.phases.contains_key(&Phase::Join) && !first.phases.contains_key(&Phase::Join));
}

#[tokio::test(flavor = "multi_thread")]
async fn waiters_share_a_failure() {
    let house = House::new().await;
    house.hub.repo("org/model").commit().lfs("model.bin", big()).publish().unwrap();
    house.hub.faults().add(HubFault::flip(7).on("model.bin"));
    let cache = house.cache("a");
    let gets = (0..4).map(|_| {
        let cache = cache.clone();
        tokio::spawn(async move { get(&cache, MODEL).await.unwrap_err() })
    });
    for error in futures::future::join_all(gets).await {
        let error = error.unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    let asked = house.hub.body_gets().len();
    assert!(asked <= 14, "{asked} requests; one fill makes at most 14 in two attempts");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_selection_waits_and_then_fetches_only_its_own() {
    let house = house(stall_once()).await;
    let cache = patient(&house);
    let all = tokio::spawn({
        let cache = cache.clone();
        async move { get_some(&cache, MODEL, &["*.bin"], &[]).await.unwrap().path }
    });
    until(|| house.hub.body_bytes() > 0).await;
    let small = get_some(&cache, MODEL, &["*.json"], &[]).await.unwrap();
    assert_same(&small.path.join("config.json"), &"{}".into());
    assert_same(&all.await.unwrap().join("model.bin"), &big());
    assert_eq!(house.hub.body_bytes(), bytes_of_all());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_waits_briefly_for_leased_space_and_then_names_the_lease_holder() {
    let house = House::new().await;
    for (seed, name) in ["one", "two"].into_iter().enumerate() {
        house.hub.repo(name).commit().generated("model.bin", seed as u64, 6 * MIB).publish().unwrap();
    }
    let cache = Cache::open({
        let mut config = house.config("a");
        config.max_bytes = ByteBound::Bytes(9 * MIB);
        config
    })
    .unwrap();
    let one = get(&cache, "hf://one").await.unwrap();
    let refused = get(&cache, "hf://two").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Full);
    assert!(refused.to_string().contains("one@") && refused.to_string().contains("in use"), "{refused}");
    let two = tokio::spawn({
        let cache = cache.clone();
        async move { get(&cache, "hf://two").await.map(|artifact| artifact.report.bytes.origin) }
    });
    sleep(Duration::from_millis(500)).await;
    drop(one);
    assert_eq!(two.await.unwrap().unwrap(), 6 * MIB, "it was fetched as soon as there was room");
}
