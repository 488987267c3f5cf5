//! `Cache::get` with a real directory and the Hub stand-in.

use crate::common::{House, assert_same, get, get_some};
use modelcache::config::ByteBound;
use modelcache::{Cache, ErrorKind, Tier};
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn big(seed: u64) -> Content {
    Content::generated(seed, 20 * MIB + 4321)
}

async fn house_with_model() -> House {
    let house = House::new().await;
    let repo = house.hub.repo("org/model");
    let commit = repo
        .commit()
        .file("config.json", "{}")
        .file("sub dir/fé+%.txt", "odd name")
        .file("empty", "")
        .lfs("model.safetensors", big(1));
    commit.publish().unwrap();
    house
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_get_fills_disk_and_a_warm_one_sends_no_request() {
    let house = house_with_model().await;
    let cache = house.cache("a");
    let cold = get(&cache, "hf://org/model@main").await.unwrap();
    assert_eq!(cold.report.from, Tier::Origin);
    assert_same(&cold.path.join("model.safetensors"), &big(1));
    assert_same(&cold.path.join("sub dir/fé+%.txt"), &"odd name".into());
    assert_same(&cold.path.join("empty"), &"".into());
    assert_eq!(cold.path.join("config.json").metadata().unwrap().mode() & 0o777, 0o444);

    house.hub.down(true);
    let warm = get(&house.cache("a"), "hf://org/model@main").await.unwrap();
    assert_eq!((warm.report.from, warm.report.bytes.origin, warm.path), (Tier::Disk, 0, cold.path));
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_of_a_cache_share_their_counters() {
    let house = house_with_model().await;
    let cache = house.cache("a");
    let _ = get(&cache, "hf://org/model").await.unwrap();
    let _ = get(&cache.clone(), "hf://org/model").await.unwrap();
    get(&cache.with_hub_token(None).unwrap(), "absent@1").await.unwrap_err();
    let counts = cache.metrics().counts();
    assert_eq!((counts.hits.disk, counts.hits.origin, counts.misses), (1, 1, 1));
    assert_eq!(counts.bytes.origin, house.hub.body_bytes());
    assert_eq!(counts.failures["not_found"], 1);
    assert!(counts.phase_seconds["download"].sum() > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_callers_at_once_cost_one_fetch() {
    let house = house_with_model().await;
    let (one, other) = (house.cache("a"), house.cache("a"));
    let gets = (0..16).map(|n| {
        let cache = if n % 2 == 0 { one.clone() } else { other.clone() };
        tokio::spawn(async move { get(&cache, "hf://org/model").await.map(|artifact| artifact.path) })
    });
    for got in futures::future::join_all(gets).await {
        assert_same(&got.unwrap().unwrap().join("model.safetensors"), &big(1));
    }
    let size = big(1).len() + "{}odd name".len() as u64;
    assert_eq!(house.hub.body_bytes(), size, "each byte was fetched once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partial_artifact_is_completed_by_fetching_only_the_missing_files() {
    let house = house_with_model().await;
    let cache = house.cache("a");
    let part = get_some(&cache, "hf://org/model", &["*.json"], &[]).await.unwrap();
    assert!(part.path.join("config.json").exists() && !part.path.join("model.safetensors").exists());
    house.hub.clear_requests();
    let whole = get(&cache, "hf://org/model").await.unwrap();
    assert_same(&whole.path.join("model.safetensors"), &big(1));
    assert!(
        house.hub.body_gets().iter().all(|seen| seen.file.as_deref() != Some("config.json")),
        "config.json was fetched again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_share_blobs_and_fetch_only_the_difference() {
    let house = house_with_model().await;
    let cache = house.cache("a");
    let old = get(&cache, "hf://org/model").await.unwrap();
    let commit = house.hub.repo("org/model").commit().file("README.md", "new").publish().unwrap();
    house.hub.clear_requests();
    let new = get(&cache, &format!("hf://org/model@{commit}")).await.unwrap();
    assert_eq!(house.hub.body_bytes(), 3, "only README.md was fetched: small files are shared by their git digest");
    let inode =
        |artifact: &modelcache::cache::Artifact| artifact.path.join("model.safetensors").metadata().unwrap().ino();
    assert_eq!(inode(&old), inode(&new), "one blob, two views");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_file_of_a_repository_is_returned_as_a_file() {
    let house = house_with_model().await;
    let file = get(&house.cache("a"), "hf://org/model@main/config.json").await.unwrap();
    assert_same(&file.path, &"{}".into());
    let error = get(&house.cache("a"), "hf://org/model@main/nothing.bin").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = get_some(&house.cache("a"), "hf://org/model", &["*.gguf"], &[]).await.unwrap_err();
    assert!(error.message().contains("*.gguf") && error.hint_text().unwrap().contains("config.json"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_on_the_way_is_found_and_fetched_again() {
    let house = house_with_model().await;
    let hits = house.hub.faults().add(HubFault::flip(5 * MIB).on("model.safetensors").once());
    let got = get(&house.cache("a"), "hf://org/model").await.unwrap();
    assert_eq!(hits.count(), 1);
    assert_same(&got.path.join("model.safetensors"), &big(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_stay_wrong_are_refused_and_nothing_is_published() {
    let house = house_with_model().await;
    house.hub.faults().add(HubFault::flip(7).on("model.safetensors"));
    let error = get(&house.cache("a"), "hf://org/model").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert_eq!(house.cache("a").list().await.unwrap().len(), 0);

    house.hub.faults().clear();
    assert_same(&get(&house.cache("a"), "hf://org/model").await.unwrap().path.join("model.safetensors"), &big(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_file_is_checked_by_its_git_digest() {
    let house = house_with_model().await;
    house.hub.faults().add(HubFault::flip(0).on("config.json"));
    let error = get(&house.cache("a"), "hf://org/model").await.unwrap_err();
    assert!(error.to_string().contains("git sha1 mismatch for config.json"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cuts_stalls_and_refusals_are_retried() {
    for fault in [
        HubFault::short(3 * MIB),
        HubFault::cut(MIB),
        HubFault::status(503),
        HubFault::stall(MIB, Duration::from_secs(30)),
        HubFault::throttle(1),
    ] {
        let house = house_with_model().await;
        let what = format!("{fault:?}");
        let hits = house.hub.faults().add(fault.on("model.safetensors").times(2));
        let got = get(&house.cache("a"), "hf://org/model").await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_same(&got.path.join("model.safetensors"), &big(1));
        assert!(hits.count() > 0, "{what} was not triggered");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_ranges_is_read_as_one_stream() {
    let house = house_with_model().await;
    let hits = house.hub.faults().add(HubFault::ignore_range().on("model.safetensors"));
    let got = get(&house.cache("a"), "hf://org/model").await.unwrap();
    assert_same(&got.path.join("model.safetensors"), &big(1));
    assert!(hits.count() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_length_is_refused() {
    let house = house_with_model().await;
    house.hub.faults().add(HubFault::lie_size(-5).on("model.safetensors"));
    let error = get(&house.cache("a"), "hf://org/model").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_is_never_accepted_for_a_digest_of_other_content() {
    let house = House::new().await;
    let given = house.path("empty");
    std::fs::write(&given, "").unwrap();
    let key = modelcache::ArtifactKey::bare("m@1").unwrap();
    house.cache_with_remote("a").put_with(&key, &given, &Default::default(), &Default::default()).await.unwrap();
    let path = house.path("remote/m/1/.modelcache/manifest.json");
    let mut manifest = modelcache::manifest::Manifest::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    for entry in manifest.files.values_mut() {
        entry.sha256 = Some(big(1).sha256().unwrap().parse().unwrap());
        entry.ladder = Some(modelcache::ladder::Ladder::new(8 * MIB, Vec::new()).unwrap());
    }
    std::fs::write(&path, manifest.to_bytes().unwrap()).unwrap();
    let error = get(&house.cache_with_remote("b"), "m@1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_found_by_a_hit_and_fetched_again() {
    let house = house_with_model().await;
    let cache = house.cache("a");
    let path = get(&cache, "hf://org/model").await.unwrap().path.join("model.safetensors");
    let mut permissions = path.metadata().unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    std::fs::set_permissions(&path, permissions).unwrap();
    std::fs::write(&path, b"spoilt").unwrap();

    let again = get(&house.cache("a"), "hf://org/model").await.unwrap();
    assert_eq!(again.report.from, Tier::Origin);
    assert_same(&again.path.join("model.safetensors"), &big(1));
    let stats = cache.stats().await.unwrap();
    assert!(stats.quarantine_bytes > 0, "the damaged file is in quarantine and counted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_file_and_a_damaged_manifest_are_filled_again() {
    let house = house_with_model().await;
    let path = get(&house.cache("a"), "hf://org/model").await.unwrap().path;
    std::fs::remove_file(path.join("config.json")).unwrap();
    let again = get(&house.cache("a"), "hf://org/model").await.unwrap();
    assert_same(&again.path.join("config.json"), &"{}".into());
    drop(again);

    std::fs::write(path.parent().unwrap().join("manifest.json"), b"{\"format\":1,").unwrap();
    house.hub.clear_requests();
    let again = get(&house.cache("a"), "hf://org/model").await.unwrap();
    assert_same(&again.path.join("model.safetensors"), &big(1));
    assert!(
        house.hub.body_gets().iter().all(|seen| seen.file.as_deref() != Some("model.safetensors")),
        "model.safetensors was fetched although its blob is on disk"
    );
}

fn bounded(house: &House, bytes: u64) -> Cache {
    let mut config = house.config("a");
    config.max_bytes = ByteBound::Bytes(bytes);
    Cache::open(config).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn least_recently_used_goes_before_the_download_and_the_budget_holds() {
    let house = House::new().await;
    for (seed, name) in ["one", "two", "three"].into_iter().enumerate() {
        house.hub.repo(name).commit().generated("model.bin", seed as u64, 4 * MIB).publish().unwrap();
    }
    let cache = bounded(&house, 9 * MIB);
    for name in ["one", "two"] {
        let _ = get(&cache, &format!("hf://{name}")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _ = get(&cache, "hf://one").await.unwrap(); // now "two" is the least recently used
    let _ = get(&bounded(&house, 9 * MIB), "hf://three").await.unwrap(); // as a new process: the last use is on disk
    let names: Vec<String> = cache.list().await.unwrap().into_iter().map(|row| row.key.name.to_string()).collect();
    assert_eq!(names, ["hf/one", "hf/three"]);
    let stats = cache.stats().await.unwrap();
    assert!(stats.used_bytes <= stats.budget_bytes, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_larger_than_the_budget_is_refused_before_any_download() {
    let house = House::new().await;
    house.hub.repo("small").commit().generated("model.bin", 1, MIB).publish().unwrap();
    house.hub.repo("large").commit().generated("model.bin", 2, 8 * MIB).publish().unwrap();
    let cache = bounded(&house, 4 * MIB);
    let _ = get(&cache, "hf://small").await.unwrap();
    house.hub.clear_requests();
    let error = get(&cache, "hf://large").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(error.message().contains("8.4 MB") && error.message().contains("4.2 MB"), "both sizes are named: {error}");
    assert_eq!(house.hub.body_bytes(), 0);
    assert_eq!(cache.list().await.unwrap().len(), 1, "nothing was evicted");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_in_use_is_not_evicted_and_is_named() {
    let house = House::new().await;
    for (name, seed) in [("one", 1), ("two", 2)] {
        house.hub.repo(name).commit().generated("model.bin", seed, 4 * MIB).publish().unwrap();
    }
    let cache = bounded(&house, 5 * MIB);
    let leased = get(&cache, "hf://one").await.unwrap();
    let error = get(&cache, "hf://two").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(error.message().contains("hf://one") && error.message().contains("in use"), "{error}");
    assert!(leased.path.join("model.bin").exists());
    drop(leased);
    let _ = get(&cache, "hf://two").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demanded_digest_is_compared_before_anything_is_published() {
    let house = house_with_model().await;
    let right = big(1).sha256().unwrap();
    let wrong = "0".repeat(64);
    let reference = |digest: &str| format!("hf://org/model@main/model.safetensors#sha256={digest}");
    assert_eq!(get(&house.cache("a"), &reference(&wrong)).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(house.hub.body_bytes(), 0, "the Hub states the digest: no byte was fetched");
    let _ = get(&house.cache("a"), &reference(&right)).await.unwrap();
    assert_eq!(get(&house.cache("a"), &reference(&wrong)).await.unwrap_err().kind(), ErrorKind::Corrupt, "warm, too");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_keeps_its_last_known_commit_while_the_origin_is_down() {
    let house = house_with_model().await;
    let config = || {
        let mut config = house.config("a");
        config.ref_ttl = Duration::ZERO;
        config
    };
    let cold = get(&Cache::open(config()).unwrap(), "hf://org/model@main").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    house.hub.down(true);
    let warm = get(&Cache::open(config()).unwrap(), "hf://org/model@main").await.unwrap();
    assert_eq!(warm.path, cold.path);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_an_origin_and_its_change_is_another_version() {
    let house = House::new().await;
    let source = house.path("source/sub");
    std::fs::create_dir_all(&source).unwrap();
    std::fs::write(source.join("a.txt"), "one").unwrap();
    let reference = format!("file://{}", house.path("source").display());
    let first = get(&house.cache("a"), &reference).await.unwrap();
    assert_same(&first.path.join("sub/a.txt"), &"one".into());
    assert_eq!(get(&house.cache("a"), &reference).await.unwrap().report.from, Tier::Disk);
    std::fs::write(source.join("a.txt"), "three").unwrap();
    let second = get(&house.cache("a"), &reference).await.unwrap();
    assert_ne!(first.key, second.key);
    assert_same(&second.path.join("sub/a.txt"), &"three".into());

    let file = get(&house.cache("a"), &format!("{reference}/sub/a.txt")).await.unwrap();
    assert_same(&file.path, &"three".into());
    let error = get(&house.cache("a"), "file:///no/such/folder").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_key_has_no_origin_unless_one_is_configured() {
    let house = house_with_model().await;
    let error = get(&house.cache("a"), "org/model@main").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(house.hub.requests().is_empty(), "a bare name is not looked up at the Hub");

    let origins = ["hf://nowhere/{name}@{version}", "file:///no/such/{name}/{version}", "hf://{name}@{version}"]
        .map(|text| modelcache::config::OriginTemplate::new(text).unwrap());
    let mut config = house.config("a");
    config.origins = origins.to_vec();
    let cache = Cache::open(config).unwrap();
    let got = get(&cache, "org/model@main").await.unwrap();
    assert_eq!(got.key.to_string(), "org/model@main");
    assert_same(&got.path.join("model.safetensors"), &big(1));
}
