//! The native routes: lists, reports, gets with progress and leases, and evictions.

use crate::common::*;
use axum::Extension;
use axum::extract::ConnectInfo;
use modelcache::cache::{PutOptions, PutTier};
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Reference};
use modelcache_server::{Listeners, Options};
use modelcache_testkit::Content;
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// The files of `team/model@3`.
fn model() -> Vec<(&'static str, Content)> {
    vec![("config.json", "{}".into()), ("sub dir/fé+%.txt", "odd".into()), ("weights.bin", Content::generated(1, MIB))]
}

async fn with_model() -> (House, Served) {
    let house = House::new().await;
    let served = house.daemon();
    house.put(&served, "team/model@3", &model()).await;
    (house, served)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reports_describe_what_is_cached() {
    let (house, served) = with_model().await;
    house.put(&served, "single@1", &[("", "one file".into())]).await;
    let list = served.get("/cache/artifacts").await.ok().json();
    let references: Vec<_> = list["artifacts"].as_array().unwrap().iter().map(|row| row["reference"].clone()).collect();
    assert_eq!(references, ["single@1", "team/model@3"]);

    let artifact = served.get("/cache/artifacts/team%2Fmodel@3").await.ok().json();
    assert_eq!(artifact["reference"], "team/model@3");
    let weights = artifact["files"].as_array().unwrap().iter().find(|file| file["path"] == "weights.bin").unwrap();
    assert_eq!((&weights["size"], &weights["sha256"]), (&json!(MIB), &json!(model()[2].1.sha256().unwrap())));

    let stats = served.get("/cache/stats").await.ok().json();
    assert_eq!((&stats["artifacts"], stats["items"].as_array().unwrap().len()), (&json!(2), 2));
    assert!(stats["used_bytes"].as_u64() >= Some(MIB) && stats["tiers"].is_object() | stats["tiers"].is_array());
    served.get("/cache/artifacts/single@1/files/source%20single@1").await.ok();
    assert_eq!(served.value("/cache/metrics", "/hits/disk").await, 1);
    let routes = served.value("/cache/metrics", "/http/requests").await;
    assert!(
        routes.as_array().unwrap().iter().any(|row| row["route"] == "/cache/stats" && row["count"] == 1),
        "{routes}"
    );
    let activity = served.get("/cache/activity").await.ok().json();
    assert_eq!((&activity["fills"], &activity["errors"]), (&json!([]), &json!([])));
    assert_eq!(activity["readiness"]["ready"], true);
    let text = served.get("/metrics").await.ok().text();
    for line in [
        "modelcache_ready 1\n",
        "modelcache_http_request_seconds_count{route=\"/cache/stats\"} 1\n",
        "modelcache_directory_pending_backfills 0\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    for path in ["/livez", "/readyz", "/openapi.json"] {
        served.get(path).await.ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_are_shown_only_to_callers_on_this_machine() {
    let (house, local) = with_model().await;
    let elsewhere: SocketAddr = "10.1.2.3:4".parse().unwrap();
    let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let change = |router: axum::Router| router.layer(Extension(ConnectInfo(elsewhere)));
    let remote = Served::start_on(listeners, house.config("a"), Options::default(), change);
    let folder = house.folder.path().to_str().unwrap();
    for (served, shown) in [(&local, true), (&remote, false)] {
        for path in ["/cache/stats", "/cache/artifacts", "/cache/artifacts/team%2Fmodel@3"] {
            let text = served.get(path).await.ok().text();
            assert_eq!(text.contains(folder), shown && path != "/cache/artifacts", "{path}: {text}");
        }
        let got = served.post(json!({ "ref": "team/model@3" })).await.ok().json();
        assert_eq!(got["path"].is_string(), shown, "{got}");
        assert_eq!(got.to_string().contains(folder), shown, "{got}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_makes_an_artifact_local() {
    let (house, commit) = House::with_model(&model()).await;
    let served = house.daemon();
    let got = served.post(json!({ "ref": "hf://org/model", "include": ["*.json"] })).await.ok().json();
    assert_eq!((&got["reference"], &got["version"]), (&json!("hf://org/model"), &json!(commit)));
    assert_eq!(house.hub.body_gets().len(), 1, "only the included file was downloaded");
    assert!(served.cache.list().await.unwrap()[0].held_files == 1);
    served.until_unleased().await;

    // As lines: progress, then the report.
    let request = served.request(Method::POST, "/cache/artifacts").header(ACCEPT, "application/x-ndjson");
    let reply = Reply::of(request.json(&json!({ "ref": "hf://org/model" }))).await.ok();
    assert_eq!(reply.header("content-type"), Some("application/x-ndjson"));
    let text = reply.text();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.last().unwrap()["artifact"]["version"], json!(commit), "{text}");
    assert!(lines[..lines.len() - 1].iter().all(|line| line["progress"]["phase"].is_string()), "{text}");

    let request = served.request(Method::POST, "/cache/artifacts").header(ACCEPT, "application/x-ndjson");
    let text = Reply::of(request.json(&json!({ "ref": "hf://org/missing" }))).await.ok().text();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "not_found", "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_with_another_body_is_refused() {
    let house = House::new().await;
    let served = house.daemon();
    let post = |content_type: &'static str, body: &str| {
        let request = served.request(Method::POST, "/cache/artifacts").header(CONTENT_TYPE, content_type);
        Reply::of(request.body(body.to_owned()))
    };
    let body = r#"{"ref": "a@1"}"#;
    // A page of another site can send these three types without asking the browser first.
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
        post(content_type, body).await.refused(415);
    }
    for body in ["", "{", "[]", r#"{"ref": 1}"#, r#"{"ref": "a@1", "unknown": 1}"#, r#"{"ref": "a@1", "hold": -1}"#] {
        let status = post("application/json", body).await.status.as_u16();
        assert!(matches!(status, 400 | 422), "{body}: {status}");
    }
    served.post(json!({ "ref": "a@1", "hold": 86_401 })).await.refused(400);
    served.post(json!({ "ref": "no version" })).await.refused(400);
    served.post(json!({ "ref": "a@1" })).await.refused(404);
    let large = format!(r#"{{"ref": "{}"}}"#, "a".repeat(2 << 20));
    post("application/json", &large).await.refused(413);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_artifact_is_not_evicted_until_the_lease_ends() {
    let (_house, served) = with_model().await;
    let started = Instant::now();
    served.post(json!({ "ref": "team/model@3", "hold": 2 })).await.ok();
    assert_eq!(served.value("/cache/stats", "/leases").await, 1);
    let evict = "/cache/artifacts/team%2Fmodel@3?tier=disk";
    assert!(served.delete(evict).await.refused(409).contains("conflict"));
    served.until_unleased().await;
    let held_for = started.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(10)).contains(&held_for), "{held_for:?}");
    served.delete(evict).await.ok();
    served.delete(evict).await.refused(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_eviction_names_its_tier_and_may_be_a_dry_run() {
    let (house, bucket) = (House::new().await, Bucket::new().await);
    let mut config = house.config("a");
    config.remote = bucket.as_remote(&bucket.s3.endpoint());
    let served = Served::start(config, Options::default());
    house.put(&served, "team/model@3", &model()).await;
    let path = "/cache/artifacts/team%2Fmodel@3";
    let on_remote = served.get("/cache/artifacts?tier=remote").await.ok().json();
    assert_eq!(on_remote["artifacts"][0]["reference"], "team/model@3");
    for wrong in ["", "?tier=", "?tier=both", "?tier=disk&dry_run=perhaps", "?dry_run=true"] {
        served.delete(&format!("{path}{wrong}")).await.refused(400);
    }
    for tier in ["disk", "remote", "all"] {
        let report = served.delete(&format!("{path}?tier={tier}&dry_run=true")).await.ok().json();
        assert_eq!(report["dry_run"], true);
        assert_eq!(report["disk_bytes"].is_u64(), tier != "remote", "{report}");
        assert_eq!(report["remote_bytes"].is_u64(), tier != "disk", "{report}");
    }
    served.get(path).await.ok();
    served.delete(&format!("{path}?tier=disk")).await.ok();
    assert!(served.cache.list().await.unwrap().is_empty());
    served.get(&format!("{path}/files/config.json")).await.ok().has(&"{}".into(), 0..2);
    served.until_unleased().await;
    served.delete(&format!("{path}?tier=remote")).await.ok();
    served.get(path).await.ok();
    served.delete(&format!("{path}?tier=all")).await.ok();
    served.get(path).await.refused(404);
    served.get("/cache/artifacts?tier=both").await.refused(400);
    let alone = Served::start(house.config("b"), Options::default());
    alone.get("/cache/artifacts?tier=remote").await.refused(400);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_and_unknown_artifacts_are_refused_with_a_reason() {
    let (_house, served) = with_model().await;
    for key in ["none@1", "team%2Fmodel@4", "team%2Fmodel%2Fx@3"] {
        served.get(&format!("/cache/artifacts/{key}")).await.refused(404);
        served.delete(&format!("/cache/artifacts/{key}?tier=all")).await.refused(404);
        served.get(&format!("/cache/artifacts/{key}/files/f")).await.refused(404);
    }
    for key in ["no-version", "@1", "a@", "a%40b@1", "a%3Fb@1", "a%5Cb@1", "%ff@1", "a%00@1", "ftp%3A%2F%2Fh%2Fx@1"] {
        served.get(&format!("/cache/artifacts/{key}")).await.refused(400);
        served.delete(&format!("/cache/artifacts/{key}?tier=all")).await.refused(400);
        served.get(&format!("/cache/artifacts/{key}/files/f")).await.refused(400);
    }
    served.get("/cache/artifacts/team%2Fmodel@3/files/none").await.refused(404);
    served.get("/cache/unknown").await.is(404);
    Reply::of(served.request(Method::PUT, "/cache/artifacts")).await.is(405);
    Reply::of(served.request(Method::POST, "/cache/stats")).await.is(405);
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_are_encoded_both_ways() {
    let house = House::new().await;
    let served = house.daemon();
    for (key, encoded) in [
        ("ärtikel/mit leer+plus@v 1", "%C3%A4rtikel%2Fmit%20leer+plus@v%201"),
        ("a%2Fb@100%", "a%252Fb@100%25"),
        ("<script>'\"&@1", "%3Cscript%3E%27%22%26@1"),
        ("日本/語@二", "%E6%97%A5%E6%9C%AC%2F%E8%AA%9E@%E4%BA%8C"),
    ] {
        let content = Content::from(format!("content of {key}"));
        let file = house.path("odd");
        content.write_to(&file).unwrap();
        let parsed = ArtifactKey::bare(key).unwrap();
        served.cache.put_with(&parsed, &file, &PutOptions::default(), &Progress::new()).await.unwrap();
        assert_eq!(served.get(&format!("/cache/artifacts/{encoded}")).await.ok().json()["reference"], key);
        let reply = served.get(&format!("/cache/artifacts/{encoded}/files/odd")).await.ok();
        reply.has(&content, 0..content.len());
        assert_eq!(served.post(json!({ "ref": key })).await.ok().json()["reference"], key);
        served.until_unleased().await;
        served.delete(&format!("/cache/artifacts/{encoded}?tier=disk")).await.ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_of_the_hub_has_its_reference_as_its_key() {
    let (house, commit) = House::with_model(&model()).await;
    let served = house.daemon();
    let key = "/cache/artifacts/hf%3A%2F%2Forg%2Fmodel@main";
    served.get(&format!("{key}/files/config.json")).await.ok().has(&"{}".into(), 0..2);
    served.get(&format!("{key}/files/sub%20dir%2Ff%C3%A9+%25.txt")).await.ok().has(&"odd".into(), 0..3);
    served.get(&format!("{key}/files/sub%20dir/f%C3%A9+%25.txt")).await.ok().has(&"odd".into(), 0..3);
    assert_eq!(served.get(key).await.ok().json()["reference"], json!(format!("hf://org/model@{commit}")));
    served.until_unleased().await;
    served.delete(&format!("/cache/artifacts/hf%3A%2F%2Forg%2Fmodel@{commit}?tier=disk")).await.ok();
    assert!(served.cache.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_prewarm_list_is_local_before_the_daemon_is_ready_and_stays_leased() {
    let (house, _) = House::with_model(&model()).await;
    house.hub.down(true);
    let prewarm = vec![Reference::parse("hf://org/model").unwrap()];
    let served = Served::start(house.config("a"), Options { prewarm, ..Options::default() });
    served.get("/livez").await.ok();
    let report = served.get("/readyz").await.is(503);
    assert!(report.header("retry-after").is_some());
    assert_eq!(report.json()["ready"], false);
    assert_eq!(served.value("/cache/metrics", "/http/ready").await, false);
    until(async || served.get("/readyz").await.json()["artifacts"][0]["error"].is_string()).await;
    house.hub.down(false);
    until(async || served.get("/readyz").await.status == 200).await;
    assert_eq!(served.value("/cache/metrics", "/http/ready").await, true);
    let path = format!("/cache/artifacts/{}?tier=disk", "hf%3A%2F%2Forg%2Fmodel@main");
    served.delete(&path).await.refused(409);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_was_replaced_on_the_remote_is_described_anew_after_its_eviction() {
    let (house, bucket) = (House::new().await, Bucket::new().await);
    let mut config = house.config("a");
    config.remote = bucket.as_remote(&bucket.s3.endpoint());
    let served = Served::start(config, Options::default());
    let (file, key) = (house.path("file"), ArtifactKey::bare("m@1").unwrap());
    for (content, force) in [("first", false), ("the second", true)] {
        Content::from(content).write_to(&file).unwrap();
        let options = PutOptions { force, tier: PutTier::Remote, ..PutOptions::default() };
        served.cache.put_with(&key, &file, &options, &Progress::new()).await.unwrap();
        let body = served.get("/cache/artifacts/m@1/files/file").await.ok();
        assert_eq!(body.text(), content);
        served.until_unleased().await;
        served.delete("/cache/artifacts/m@1?tier=disk").await.ok();
    }
}
