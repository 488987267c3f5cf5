//! `Cache::open_file`: reading a file while it is downloaded. The tests cover which bytes are readable before the file
//! is verified, and the order of the requests.

use crate::common::weather::{BUCKET, Weather};
use crate::common::{House, assert_same, get};
use modelcache::cache::{EvictTier, GetOptions, OpenFile, OpenOptions};
use modelcache::config::{Config, RetryConfig};
use modelcache::key::FilePath;
use modelcache::ladder::{Ladder, LadderHasher};
use modelcache::manifest::{FileEntry, Manifest};
use modelcache::progress::Progress;
use modelcache::{Cache, ErrorKind, Reference, Result, Tier};
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use tokio::time::{sleep, timeout};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Part size in these tests. It gives the file 64 parts, as many as a file of half a GiB has with its usual part size.
const PART: u64 = 256 * KIB;
const SIZE: u64 = 64 * PART - 321;
/// Byte allowance of the proxy that is never used up.
const WIDE: u64 = 1 << 40;
const HUB: &str = "hf://org/model@main/model.bin";

static CONTENT: Content = Content::Generated { seed: 5, len: SIZE };

fn last() -> Range<u64> {
    SIZE - 10..SIZE
}

async fn open_with(cache: &Cache, reference: &str, options: OpenOptions) -> Result<OpenFile> {
    let (reference, progress) = (Reference::parse(reference).unwrap(), Progress::new());
    soon(cache.open_file(&reference, &options, &progress)).await
}

async fn open(cache: &Cache, reference: &str) -> OpenFile {
    open_with(cache, reference, OpenOptions::default()).await.unwrap()
}

async fn open_unchecked(cache: &Cache, reference: &str) -> OpenFile {
    open_with(cache, reference, OpenOptions { unchecked: true, ..OpenOptions::default() }).await.unwrap()
}

/// Fails the test if `work` takes longer than a minute.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), work).await.expect("timed out")
}

async fn until(mut condition: impl FnMut() -> bool) {
    soon(async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Lets bytes through the proxy, a few at a time, until `work` is done.
async fn trickle<T>(weather: &Weather, work: impl Future<Output = T>) -> T {
    trickle_at_most(weather, u64::MAX, work).await
}

/// Lets at most `bytes` bytes through the proxy, a few at a time, until `work` is done. Without a bound, the whole file
/// arrives if the machine is so busy that `work` takes long.
async fn trickle_at_most<T>(weather: &Weather, bytes: u64, work: impl Future<Output = T>) -> T {
    let line = async {
        for _ in 0..bytes / (32 * KIB) {
            weather.proxy.let_through(32 * KIB);
            sleep(Duration::from_millis(5)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        done = soon(work) => done,
        () = line => unreachable!(),
    }
}

/// Reads `range` as soon as it is readable, and asserts that the bytes are right.
async fn read(file: &OpenFile, content: &Content, range: Range<u64>) {
    let from = soon(file.wait(range.clone())).await.unwrap();
    let mut bytes = vec![0; (range.end - range.start) as usize];
    from.read_exact_at(&mut bytes, range.start).unwrap();
    assert!(bytes == content.read(range.clone()).unwrap(), "{range:?} has other bytes");
}

fn ladder(content: &Content) -> Ladder {
    let mut hasher = LadderHasher::new(PART);
    hasher.update(&content.to_vec().unwrap());
    hasher.finish().1
}

/// A bucket behind a proxy that holds `m@1`. The manifest has a ladder with small parts.
async fn weather() -> Weather {
    let weather = Weather::new().await;
    weather.put("m", &CONTENT).await;
    edit(&weather, |entry| entry.ladder = Some(ladder(&CONTENT)));
    weather
}

/// Changes the entry of the only file in the manifest on the remote.
fn edit(weather: &Weather, change: impl FnOnce(&mut FileEntry)) {
    let path = weather.s3.object_path(BUCKET, "cache/m/1/.modelcache/manifest.json");
    let mut manifest = Manifest::from_bytes(&fs::read(&path).unwrap()).unwrap();
    change(manifest.files.values_mut().next().unwrap());
    fs::write(path, manifest.to_bytes().unwrap()).unwrap();
}

/// Asserts that the requests together cover the file, each byte once.
#[track_caller]
fn assert_requested_once(weather: &Weather) {
    let mut asked = weather.ranges("m");
    asked.sort_unstable();
    let mut next = 0;
    for (start, end) in &asked {
        assert_eq!(*start, next, "{asked:?}");
        next = *end;
    }
    assert_eq!(next, SIZE, "{asked:?}");
}

/// A cache with a long read timeout, for tests that stall the server.
fn patient(weather: &Weather, dir: &str) -> Cache {
    let retry = RetryConfig { deadline: Duration::from_secs(3), read_timeout: Duration::from_secs(600) };
    Cache::open({
        let mut config = weather.config(dir, &weather.proxy.url());
        config.retry = retry;
        config
    })
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_bytes_and_then_the_last_are_read_before_half_of_the_file_has_come() {
    let weather = weather().await;
    let cache = patient(&weather, "a");
    let before = weather.proxy.bytes_down();
    weather.proxy.let_through(SIZE / 2 - MIB);
    let file = open(&cache, "m@1").await;
    assert_eq!(file.size(), SIZE);
    read(&file, &CONTENT, 0..100).await;
    read(&file, &CONTENT, last()).await;
    assert!(weather.proxy.bytes_down() - before < SIZE / 2, "{} bytes", weather.proxy.bytes_down() - before);
    let asked = weather.ranges("m");
    assert!(asked.iter().any(|(_, end)| *end == SIZE), "{asked:?}");
    assert!(asked.len() < 32, "the end was requested before the middle: {asked:?}");
    assert!(!file.is_whole() && file.progress().snapshot().remote_bytes < SIZE / 2);

    weather.proxy.let_through(WIDE);
    let path = soon(file.whole()).await.unwrap();
    assert_same(&path, &CONTENT);
    read(&file, &CONTENT, 0..SIZE).await;
    assert!(file.is_whole());
    assert_requested_once(&weather);
    assert_eq!(cache.metrics().counts().hits.remote, 1, "it counts as a get");
}

/// A source that does not send the whole file yet.
#[derive(Clone, Copy)]
enum Paused<'a> {
    /// The proxy before the remote lets only some bytes through.
    Remote(&'a Weather),
    /// The Hub stalls, also on further connections.
    Hub(&'a House),
}

/// Opens `reference` for two readers, of which one accepts unverified bytes. Asserts that the other one can read
/// nothing before the download is complete. Then `source` sends the rest of the file.
async fn assert_unchecked_reads_early(source: Paused<'_>, cache: &Cache, reference: &str, content: &Content) {
    let first = async {
        let (unchecked, checked) = (open_unchecked(cache, reference).await, open(cache, reference).await);
        read(&unchecked, content, 0..100).await;
        (unchecked, checked)
    };
    let (unchecked, checked) = match source {
        Paused::Remote(weather) => trickle(weather, first).await,
        Paused::Hub(_) => first.await,
    };
    let mut waits = Box::pin(checked.wait(0..100));
    assert!(timeout(Duration::from_millis(300), &mut waits).await.is_err(), "unverified bytes were readable");
    match source {
        Paused::Remote(weather) => weather.proxy.let_through(WIDE),
        Paused::Hub(house) => house.hub.faults().clear(),
    }
    soon(waits).await.unwrap();
    read(&checked, content, 0..content.len()).await;
    read(&unchecked, content, 0..content.len()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_ladder_only_unchecked_readers_get_bytes_before_the_file_is_verified() {
    let (weather, content) = (Weather::new().await, Content::generated(6, 48 * MIB + 1));
    weather.put("m", &content).await;
    edit(&weather, |entry| entry.ladder = None);
    assert_unchecked_reads_early(Paused::Remote(&weather), &patient(&weather, "a"), "m@1", &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_demanded_digest_the_ladder_of_the_remote_releases_nothing_early() {
    let weather = weather().await;
    let reference = format!("m@1#sha256={}", CONTENT.sha256().unwrap());
    assert_unchecked_reads_early(Paused::Remote(&weather), &patient(&weather, "a"), &reference, &CONTENT).await;
}

/// An environment with the model at the Hub. Also returns the content of its file.
async fn house_with_model() -> (House, Content) {
    let (house, content) = (House::new().await, Content::generated(7, 20 * MIB + 4321));
    house.hub.repo("org/model").commit().lfs("model.bin", content.clone()).publish().unwrap();
    (house, content)
}

/// A fault that stalls the last part of the model.
fn stall() -> HubFault {
    HubFault::stall_at(17 * MIB, Duration::from_secs(600)).on("model.bin")
}

/// A cache with a short read timeout, which retries a stalled request after two seconds.
fn impatient(config: Config) -> Cache {
    let retry = RetryConfig { deadline: Duration::from_secs(30), read_timeout: Duration::from_secs(2) };
    Cache::open({
        let mut config = config;
        config.retry = retry;
        config
    })
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_list_from_the_origin_the_ladder_of_the_remote_releases_nothing_early() {
    let (house, content) = house_with_model().await;
    let config = |dir: &str| {
        let mut config = house.config(dir);
        config.remote = house.folder_remote();
        config
    };
    drop(get(&Cache::open(config("first")).unwrap(), HUB).await.unwrap());
    // The manifest on the remote has a ladder, but the remote has lost the object.
    let folder = fs::read_dir(house.path("remote/hf/org/model")).unwrap().map(|entry| entry.unwrap().path());
    let manifest = folder.map(|version| version.join(".modelcache/manifest.json")).find(|path| path.exists()).unwrap();
    let mut edited = Manifest::from_bytes(&fs::read(&manifest).unwrap()).unwrap();
    assert!(edited.files.values().all(|entry| entry.ladder.is_some()));
    edited.files.values_mut().for_each(|entry| entry.held = None);
    fs::write(&manifest, edited.to_bytes().unwrap()).unwrap();
    house.hub.faults().add(stall());
    assert_unchecked_reads_early(Paused::Hub(&house), &impatient(config("a")), HUB, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ladder_verified_on_this_disk_releases_bytes_early_from_any_source() {
    let (house, content) = house_with_model().await;
    let retry = RetryConfig { deadline: Duration::from_secs(3), read_timeout: Duration::from_secs(600) };
    let cache = Cache::open({
        let mut config = house.config("a");
        config.retry = retry;
        config
    })
    .unwrap();
    let path = get(&cache, HUB).await.unwrap().path;
    // Damages the local copy, so that the file is downloaded again.
    let bad = house.path("bad");
    fs::write(&bad, "bad").unwrap();
    fs::rename(bad, &path).unwrap();
    let blobs = fs::read_dir(house.path("a/blobs")).unwrap().map(|entry| entry.unwrap().path());
    blobs.for_each(|blobs| fs::remove_dir_all(blobs).unwrap());
    house.hub.faults().add(stall());
    let file = open(&cache, HUB).await;
    read(&file, &content, 0..100).await;
    assert!(!file.is_whole(), "one part is stalled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_ladder_is_detected_and_never_mixes_two_files() {
    let weather = weather().await;
    // The ladder is right for the parts that the proxy lets through first, in any order. After them it belongs to
    // another file.
    let other = Content::generated(8, SIZE);
    let (truth, lie) = (ladder(&CONTENT), ladder(&other));
    let rungs = |ladder: &Ladder, parts: Range<u64>| parts.map(|part| ladder.after(part).unwrap()).collect::<Vec<_>>();
    let mixed = [rungs(&truth, 0..40), rungs(&lie, 40..63)].concat();
    edit(&weather, |entry| entry.ladder = Some(Ladder::new(PART, mixed).unwrap()));
    weather.proxy.let_through(SIZE / 4);
    let cache = patient(&weather, "a");
    let (early, late) = (open(&cache, "m@1").await, open(&cache, "m@1").await);
    trickle_at_most(&weather, 20 * PART, read(&early, &CONTENT, 0..100)).await;
    weather.proxy.let_through(WIDE);
    let error = soon(early.wait(last())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("downloaded again"), "{error}");
    read(&late, &CONTENT, 0..SIZE).await;
    let error = soon(early.wait(0..1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "also after the file is published: {error}");
    assert_eq!(soon(early.whole()).await.unwrap_err().kind(), ErrorKind::Corrupt);
    read(&open(&cache, "m@1").await, &CONTENT, 0..SIZE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_that_were_read_unchecked_are_reported() {
    let weather = weather().await;
    edit(&weather, |entry| entry.ladder = None);
    let object = weather.s3.object_path(BUCKET, "cache/m/1/m");
    let other = fs::OpenOptions::new().write(true).open(&object).unwrap();
    other.write_all_at(b"wrong", 10).unwrap();
    weather.proxy.let_through(MIB);
    let file = open_unchecked(&patient(&weather, "a"), "m@1").await;
    let mut bytes = [0; 5];
    let from = trickle(&weather, file.wait(0..100)).await.unwrap();
    from.read_exact_at(&mut bytes, 10).unwrap();
    assert_eq!(&bytes, b"wrong");
    weather.proxy.let_through(WIDE);
    assert_eq!(soon(file.whole()).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(soon(file.wait(0..100)).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_fails_half_way_fails_its_readers() {
    let weather = weather().await;
    weather.proxy.let_through(SIZE / 4);
    let cache = Cache::open(weather.config("a", &weather.proxy.url())).unwrap();
    let file = open(&cache, "m@1").await;
    trickle(&weather, read(&file, &CONTENT, 0..100)).await;
    weather.s3.down(true);
    weather.proxy.sever();
    weather.proxy.let_through(WIDE);
    let error = soon(file.wait(last())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("m@1"), "{error}");
    assert_eq!(soon(file.whole()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    weather.s3.down(false);
    read(&open(&cache, "m@1").await, &CONTENT, 0..SIZE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_and_a_get_share_one_fill() {
    let weather = weather().await;
    weather.proxy.let_through(SIZE / 4);
    let cache = patient(&weather, "a");
    let one = open(&cache, "m@1").await;
    let getting = tokio::spawn({
        let cache = cache.clone();
        async move { get(&cache, "m@1").await.unwrap() }
    });
    let named = OpenOptions { file: Some(FilePath::new("m").unwrap()), ..OpenOptions::default() };
    let other = open_with(&cache, "m@1", named).await.unwrap();
    let together = futures::future::join(read(&one, &CONTENT, 0..SIZE), read(&other, &CONTENT, last()));
    weather.proxy.let_through(WIDE);
    together.await;
    assert_same(&soon(getting).await.unwrap().path, &CONTENT);
    assert_requested_once(&weather);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_readable_before_the_other_files_of_its_fill_are_complete() {
    let (house, content) = house_with_model().await;
    house.hub.repo("org/model").commit().lfs("other.bin", Content::generated(1, 9 * MIB)).publish().unwrap();
    // The last part stalls on its first and on its second connection. The read timeout ends both.
    house.hub.faults().add(HubFault::stall_at(8 * MIB, Duration::from_secs(600)).on("other.bin").times(2));
    let cache = impatient(house.config("a"));
    let getting = tokio::spawn({
        let cache = cache.clone();
        async move { get(&cache, "hf://org/model").await.unwrap().path }
    });
    until(|| house.hub.body_bytes() > 0).await;
    let file = open(&cache, HUB).await;
    read(&file, &content, 0..content.len()).await;
    assert!(!file.is_whole(), "verified, but not published before the other file is complete");
    assert_same(&soon(getting).await.unwrap().join("model.bin"), &content);
    assert_eq!(house.hub.body_bytes(), content.len() + 9 * MIB, "each byte was fetched once");
}

#[tokio::test(flavor = "multi_thread")]
async fn single_files_of_one_artifact_are_filled_at_the_same_time_and_each_only_once() {
    let (house, other) = (House::new().await, Content::generated(2, 3 * MIB));
    let model = Content::generated(7, 20 * MIB + 4321);
    let commit = house.hub.repo("org/model").commit().lfs("model.bin", model.clone()).lfs("other.bin", other.clone());
    commit.file("config.json", "{}").publish().unwrap();
    house.hub.faults().add(stall().once());
    let cache = Cache::open({
        let mut config = house.config("a");
        config.retry = RetryConfig { deadline: Duration::from_secs(60), read_timeout: Duration::from_secs(8) };
        config
    })
    .unwrap();
    let stalled = open_unchecked(&cache, HUB).await;
    read(&stalled, &model, 0..MIB).await;
    // These files are published while the first one still downloads.
    let beside = open(&cache, "hf://org/model@main/other.bin").await;
    assert_same(&soon(beside.whole()).await.unwrap(), &other);
    let small = open(&cache, "hf://org/model@main/config.json").await;
    soon(small.whole()).await.unwrap();
    // A fill of all files waits for the first one, so that no byte is requested twice.
    let getting = tokio::spawn({
        let cache = cache.clone();
        async move { get(&cache, "hf://org/model").await.unwrap().path }
    });
    sleep(Duration::from_millis(300)).await;
    assert!(!stalled.is_whole() && !getting.is_finished());
    assert_same(&soon(getting).await.unwrap().join("model.bin"), &model);
    assert!(stalled.is_whole());
    let sizes = model.len() + other.len() + 2;
    assert!(house.hub.body_bytes() < sizes + 4 * MIB, "{} of {sizes}", house.hub.body_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_only_reader_ends_its_fill_and_the_next_fill_resumes_it() {
    let weather = weather().await;
    weather.proxy.let_through(SIZE / 4);
    let cache = patient(&weather, "a");
    let file = open(&cache, "m@1").await;
    trickle_at_most(&weather, 20 * PART, read(&file, &CONTENT, 0..100)).await;
    drop(file);
    weather.proxy.sever();
    let before = weather.proxy.bytes_down();
    weather.proxy.let_through(WIDE);
    let got = get(&cache, "m@1").await.unwrap();
    assert!(got.report.bytes.remote > 0, "the get started a fill of its own: {:?}", got.report);
    assert_same(&got.path, &CONTENT);
    assert!(weather.proxy.bytes_down() - before < SIZE, "the downloaded parts were kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_read_to_its_end_is_published_even_if_it_is_closed_at_once() {
    let weather = weather().await;
    let cache = patient(&weather, "a");
    let file = open(&cache, "m@1").await;
    soon(file.wait(0..SIZE)).await.unwrap();
    drop(file);
    let here = OpenOptions { max_tier: Tier::Disk, ..OpenOptions::default() };
    soon(cache.wait_for_fills()).await;
    let _ = open_with(&cache, "m@1", here).await.unwrap();
    assert_eq!(weather.ranges("m").len(), 64);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_file_is_not_evicted() {
    let weather = weather().await;
    let cache = patient(&weather, "a");
    for round in ["filled", "here"] {
        let file = open(&cache, "m@1").await;
        let path = soon(file.whole()).await.unwrap();
        let reference = Reference::parse("m@1").unwrap();
        let evict = || cache.evict(&reference, EvictTier::Disk, false);
        assert_eq!(evict().await.unwrap_err().kind(), ErrorKind::Conflict, "{round}");
        read(&file, &CONTENT, 0..SIZE).await;
        drop(file);
        if round == "here" {
            evict().await.unwrap();
            assert!(!path.exists());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_a_file_that_another_process_fills_waits_for_the_fill() {
    let weather = weather().await;
    weather.proxy.let_through(SIZE / 4);
    let (one, other) = (patient(&weather, "a"), patient(&weather, "a"));
    let first = open(&one, "m@1").await;
    trickle(&weather, read(&first, &CONTENT, 0..100)).await;
    let second = tokio::spawn(async move { open(&other, "m@1").await });
    until(|| weather.s3.object_gets("m/1/.modelcache/manifest.json").len() >= 2).await;
    assert!(!second.is_finished());
    weather.proxy.let_through(WIDE);
    let second = soon(second).await.unwrap();
    assert!(second.is_whole());
    read(&second, &CONTENT, 0..SIZE).await;
    read(&first, &CONTENT, 0..SIZE).await;
    assert_requested_once(&weather);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_opened_by_its_name_and_only_that_file_is_fetched() {
    let house = House::new().await;
    let commit = house.hub.repo("org/model").commit();
    commit.file("config.json", "{}").file("empty", "").lfs("model.bin", CONTENT.clone()).publish().unwrap();
    let cache = house.cache("a");
    let error = open_with(&cache, "hf://org/model", OpenOptions::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.hint_text().unwrap().contains("config.json"), "{error:?}");
    let named = |name: &str| OpenOptions { file: Some(FilePath::new(name).unwrap()), ..OpenOptions::default() };
    assert_eq!(open_with(&cache, HUB, named("config.json")).await.unwrap_err().kind(), ErrorKind::Invalid);
    let absent = open_with(&cache, "hf://org/model", named("absent")).await.unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotFound, "{absent}");
    assert_eq!(house.hub.body_bytes(), 0);
    let file = open_with(&cache, "hf://org/model", named("config.json")).await.unwrap();
    read(&file, &"{}".into(), 0..2).await;
    assert_eq!(soon(file.wait(1..3)).await.unwrap_err().kind(), ErrorKind::Invalid);
    let empty = open_with(&cache, "hf://org/model", named("empty")).await.unwrap();
    assert_eq!(empty.size(), 0);
    soon(empty.wait(0..0)).await.unwrap();
    assert!(soon(empty.whole()).await.unwrap().exists());
    assert_eq!(house.hub.body_bytes(), 2);
    let _ = get(&cache, "hf://org/model").await.unwrap();
    read(&open(&cache, HUB).await, &CONTENT, 0..SIZE).await;
    let error = open_with(&cache, "hf://org/model", OpenOptions::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "also if the whole artifact is on disk: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_on_disk_under_another_name_is_readable_at_once() {
    let weather = weather().await;
    let cache = patient(&weather, "a");
    let _ = get(&cache, "m@1").await.unwrap();
    weather.put("copy", &CONTENT).await;
    let asked = weather.ranges("copy").len();
    let file = open(&cache, "copy@1").await;
    read(&file, &CONTENT, last()).await;
    soon(file.whole()).await.unwrap();
    assert_eq!(weather.ranges("copy").len(), asked, "nothing was fetched");
    let options = GetOptions { max_tier: Tier::Disk, ..GetOptions::default() };
    let _ = cache.get_with(&Reference::parse("copy@1").unwrap(), &options, &Progress::new()).await.unwrap();
}
