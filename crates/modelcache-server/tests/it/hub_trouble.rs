//! A Hub that throttles, fails, stalls or redirects.

use crate::common::*;
use futures::future::join_all;
use modelcache_server::Options;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::web::{Page, Web};
use std::time::{Duration, Instant};

const SIZE: u64 = 3 * MIB + 11;

fn content() -> Content {
    Content::generated(6, SIZE)
}

async fn with_model() -> (House, Served, String) {
    let (house, commit) = House::with_model(&[("config.json", "{}".into()), ("model.bin", content())]).await;
    let served = house.daemon();
    (house, served, commit)
}

/// Returns the status and the `Retry-After` of a reply that has to come at once.
async fn at_once(served: &Served, path: &str) -> (u16, Option<u64>) {
    let started = Instant::now();
    let reply = served.get(path).await;
    assert!(started.elapsed() < Duration::from_secs(5), "{path}: {:?} {reply:?}", started.elapsed());
    assert!(!reply.status.is_success() || !reply.cut, "{reply:?}");
    (reply.status.as_u16(), reply.header("retry-after").map(|wait| wait.parse().unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_request_is_passed_on_at_once_and_all_others_wait_as_long() {
    for fault in [HubFault::throttle(60), HubFault::rate_limit(60)] {
        for part in ["auth-check", "/revision/", "/tree/"] {
            let (house, _, commit) = with_model().await;
            house.publish("org/other", &[("a", "b".into())]);
            // With the usual deadline, a pause of a minute is waited out by the library.
            let mut config = house.config("b");
            config.retry = Default::default();
            let served = Served::start(config, Options::default());
            let hits = house.hub.faults().add(fault.clone().on(part));
            let path = if part == "/tree/" {
                file_url("org/model", &commit, "model.bin")
            } else {
                "/api/models/org/model".into()
            };
            let (status, wait) = at_once(&served, &path).await;
            assert!(status == 429 && (50..=61).contains(&wait.unwrap_or(0)), "{part}: {status} {wait:?}");
            // The pause holds for every repository and every caller, without another request.
            house.hub.clear_requests();
            let paths =
                ["/api/models/org/other", "/api/models/org/model", "/org/other/resolve/main/a", "/api/whoami-v2"];
            for (status, wait) in join_all(paths.map(|path| at_once(&served, path))).await {
                assert!(status == 429 && (40..=61).contains(&wait.unwrap_or(0)), "{part}: {status} {wait:?}");
            }
            assert_eq!(house.hub.requests().len(), 0, "{part}: {:?}", house.hub.requests());
            assert_eq!(hits.count(), 1, "{part}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_files_are_served_while_the_hub_throttles() {
    let (house, served, commit) = with_model().await;
    let path = file_url("org/model", &commit, "model.bin");
    served.get(&path).await.ok();
    served.get(&file_url("org/model", "main", "model.bin")).await.is(307);
    house.hub.faults().add(HubFault::throttle(60));
    assert_eq!(at_once(&served, "/api/models/org/none").await.0, 429);
    served.get(&path).await.ok().has(&content(), 0..SIZE);
    served.get(&file_url("org/model", "main", "model.bin")).await.is(307);
    served.get("/api/models/org/model").await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_pause_is_waited_out() {
    let (house, served, commit) = with_model().await;
    house.hub.faults().add(HubFault::throttle(1).on("/tree/").once());
    served.get(&file_url("org/model", &commit, "model.bin")).await.ok().has(&content(), 0..SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_hub_is_reported_as_unavailable_in_its_own_form() {
    let (house, served, commit) = with_model().await;
    house.hub.faults().add(HubFault::status(503));
    for path in ["/api/models/org/model".to_owned(), file_url("org/model", &commit, "model.bin")] {
        let started = Instant::now();
        let reply = served.get(&path).await;
        assert!(reply.header("retry-after").is_some(), "{reply:?}");
        reply.hub_error(503);
        assert!(started.elapsed() < Duration::from_secs(9), "clients give up after 10 s");
    }
    house.hub.faults().clear();
    until(async || served.get(&file_url("org/model", &commit, "model.bin")).await.status == 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_stalls_for_nine_seconds_is_waited_for() {
    let (house, commit) = House::with_model(&[("model.bin", content())]).await;
    house.hub.faults().add(HubFault::stall_at(2 * MIB, Duration::from_secs(9)).on("model.bin").once());
    let mut config = house.config("a");
    config.retry = Default::default();
    let served = Served::start(config, Options::default());
    let started = Instant::now();
    served.get(&file_url("org/model", &commit, "model.bin")).await.ok().has(&content(), 0..SIZE);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_dies_in_the_middle_cuts_the_connection_and_a_later_resume_completes() {
    let (house, served, commit) = with_model().await;
    house.hub.faults().add(HubFault::stall_at(2 * MIB, Duration::from_secs(600)).on("model.bin"));
    let path = file_url("org/model", &commit, "model.bin");
    let reply = served.get(&path).await;
    assert!(reply.cut, "{reply:?}");
    assert!(reply.body == content().read(0..reply.body.len() as u64).unwrap());
    house.hub.faults().clear();
    let have = reply.body.len() as u64;
    let rest = served.get_with(&path, "range", &format!("bytes={have}-")).await;
    let start = if rest.status == 206 { have } else { 0 };
    rest.has(&content(), start..SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_is_sent_to_the_host_that_the_hub_redirects_to() {
    let (house, commit) = House::with_model(&[("model.bin", content())]).await;
    house.hub.repo("org/model").private(TOKEN_A).private(OWN_HUB_TOKEN);
    let web = Web::start_at("127.0.0.3").unwrap();
    web.put(&format!("/{}", content().sha256().unwrap()), Page::of(content()));
    house.hub.use_external_cdn(&web.url());
    let served = house.daemon_with_token();
    for token in [TOKEN_A, DAEMON_TOKEN] {
        served.get_as(Some(token), &file_url("org/model", &commit, "model.bin")).await.ok().has(&content(), 0..SIZE);
    }
    let seen = web.requests();
    assert!(!seen.is_empty() && seen.iter().all(|seen| seen.authorization.is_none()), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_a_metadata_service_is_not_followed() {
    for address in
        ["http://169.254.169.254/latest", "http://[fe80::1]", "http://100.100.100.200", "http://[::ffff:a9fe:a9fe]"]
    {
        let (house, commit) = House::with_model(&[("model.bin", content())]).await;
        house.hub.use_external_cdn(address);
        let served = house.daemon();
        let started = Instant::now();
        let reply = served.get(&file_url("org/model", &commit, "model.bin")).await;
        assert!(reply.cut || reply.status.is_server_error(), "{reply:?}");
        assert!(started.elapsed() < Duration::from_secs(8), "it was tried again: {:?}", started.elapsed());
        let errors = served.value("/cache/activity", "/errors").await;
        assert!(errors.to_string().contains("link-local"), "{errors}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_daemon_serves_what_is_public_and_warm() {
    let (house, served, commit) = with_model().await;
    let path = file_url("org/model", &commit, "model.bin");
    served.get(&path).await.ok();
    served.get(&file_url("org/model", "main", "model.bin")).await.is(307);
    served.stop().await;
    house.hub.clear_requests();
    let mut config = house.config("a");
    config.offline = true;
    let served = Served::start(config, Options::default());
    served.get(&path).await.ok().has(&content(), 0..SIZE);
    served.get(&file_url("org/model", "main", "model.bin")).await.is(307);
    served.get("/api/models/org/model").await.ok();
    served.get("/api/models/org/none").await.hub_error(503);
    assert!(house.hub.requests().is_empty());
}
