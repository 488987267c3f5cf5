//! Which caller may read which repository.

use crate::common::*;
use modelcache_server::Options;
use modelcache_testkit::Content;
use modelcache_testkit::hub::HubFault;
use std::time::{Duration, Instant};
use tokio::time::sleep;

fn files() -> Vec<(&'static str, Content)> {
    vec![("config.json", "{}".into()), ("model.bin", Content::generated(4, MIB + 3))]
}

/// Options with which every answer of the Hub about rights is asked for again after a moment.
fn forgetful() -> Options {
    Options { auth_fresh: Duration::from_millis(100), ..Options::default() }
}

/// The routes that show something of a repository.
fn routes(repo: &str, commit: &str) -> Vec<String> {
    vec![
        format!("/api/models/{repo}"),
        format!("/api/models/{repo}/tree/main"),
        format!("/api/models/{repo}/revision/{commit}"),
        file_url(repo, "main", "config.json"),
        file_url(repo, commit, "config.json"),
        file_url(repo, commit, "model.bin"),
        file_url(repo, commit, "none"),
    ]
}

async fn warm(served: &Served, token: Option<&str>, repo: &str, commit: &str) {
    for (path, content) in files() {
        served.get_as(token, &file_url(repo, commit, path)).await.ok().has(&content, 0..content.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_repository_is_shown_only_to_those_whom_the_hub_lets_read_it() {
    let (house, commit) = House::with_model(&files()).await;
    house.hub.repo("org/model").private(TOKEN_A);
    let served = Served::start(house.config("a"), Options { token: with_token().token, ..forgetful() });
    warm(&served, Some(TOKEN_A), "org/model", &commit).await;
    for token in [Some(TOKEN_B), None, Some("junk")] {
        for path in routes("org/model", &commit) {
            let code = served.get_as(token, &path).await.hub_error(401);
            assert_eq!(code.as_deref(), Some("RepoNotFound"), "{path}");
        }
    }
    // The daemon's own Hub token may not read it, and it is on disk already.
    house.hub.repo("org/model").private(TOKEN_B);
    sleep(Duration::from_millis(200)).await;
    warm(&served, Some(TOKEN_B), "org/model", &commit).await;
    assert!(house.hub.tokens_at_cdn().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_repository_shows_its_files_only_to_accepted_callers() {
    let (house, commit) = House::with_model(&files()).await;
    house.hub.repo("org/model").accept(TOKEN_A);
    let served = house.daemon();
    warm(&served, Some(TOKEN_A), "org/model", &commit).await;
    for token in [Some(TOKEN_B), None] {
        for path in [file_url("org/model", &commit, "model.bin"), file_url("org/model", "main", "model.bin")] {
            let code = served.get_as(token, &path).await.hub_error(403);
            assert_eq!(code.as_deref(), Some("GatedRepo"), "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_of_the_hub_is_remembered_for_each_caller() {
    let (house, commit) = House::with_model(&files()).await;
    house.hub.repo("org/model").private(TOKEN_A);
    let served = house.daemon();
    for _ in 0..5 {
        warm(&served, Some(TOKEN_A), "org/model", &commit).await;
        served.get_as(Some(TOKEN_B), &file_url("org/model", &commit, "model.bin")).await.is(401);
    }
    let asked: Vec<_> = house
        .hub
        .requests()
        .into_iter()
        .filter(|seen| seen.path.contains("auth-check"))
        .map(|seen| seen.authorization)
        .collect();
    // Once for A, once for B, and once whether the repository is public.
    assert_eq!(asked.len(), 3, "{asked:?}");
    let tokens: Vec<_> = house.hub.requests().into_iter().filter_map(|seen| seen.authorization).collect();
    assert!(tokens.iter().all(|token| !token.contains(OWN_HUB_TOKEN)), "the daemon's token was used for a caller");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_of_a_public_repository_share_what_the_daemon_downloaded() {
    let (house, commit) = House::with_model(&files()).await;
    let served = house.daemon();
    warm(&served, Some(TOKEN_A), "org/model", &commit).await;
    let downloads = house.body_gets();
    warm(&served, None, "org/model", &commit).await;
    warm(&served, Some(TOKEN_B), "org/model", &commit).await;
    assert_eq!(house.body_gets(), downloads);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_of_the_daemon_acts_with_its_own_hub_token() {
    let (house, commit) = House::with_model(&files()).await;
    house.hub.repo("org/model").private(OWN_HUB_TOKEN);
    let served = house.daemon_with_token();
    for token in [None, Some("daemon-wrong-token"), Some(TOKEN_B)] {
        served.get_as(token, &file_url("org/model", &commit, "config.json")).await.hub_error(401);
    }
    warm(&served, Some(DAEMON_TOKEN), "org/model", &commit).await;
    served.get_as(Some(DAEMON_TOKEN), "/api/models/org/none").await.hub_error(401);
    let seen: Vec<_> = house.hub.requests().into_iter().filter_map(|seen| seen.authorization).collect();
    assert!(seen.iter().all(|token| !token.contains(DAEMON_TOKEN)), "the daemon's token was sent to the Hub");

    house.publish("org/gated", &files());
    house.hub.repo("org/gated").gated();
    let code = served.get_as(Some(DAEMON_TOKEN), &file_url("org/gated", "main", "config.json")).await;
    assert!(matches!(code.status.as_u16(), 307 | 403), "{code:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_public_repositories_load_while_the_hub_is_down_also_after_a_restart() {
    let (house, commit) = House::with_model(&files()).await;
    let served = house.daemon();
    let main = file_url("org/model", "main", "config.json");
    served.get(&main).await.is(307);
    warm(&served, None, "org/model", &commit).await;
    house.hub.down(true);
    warm(&served, None, "org/model", &commit).await;
    served.stop().await;
    let served = house.daemon();
    for token in [None, Some(TOKEN_A)] {
        let started = Instant::now();
        warm(&served, token, "org/model", &commit).await;
        let location = served.get_as(token, &main).await.is(307);
        assert_eq!(location.header("location"), Some(file_url("org/model", &commit, "config.json").as_str()));
        served.get_as(token, "/api/models/org/model/tree/main?recursive=true").await.ok();
        let info = served.get_as(token, "/api/models/org/model").await.ok();
        assert_eq!(info.json()["sha"], commit);
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    }
    // What is not there is not invented.
    let reply = served.get("/api/models/org/other").await;
    assert!(reply.status == 503 && reply.header("retry-after").is_some(), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_repositories_load_quickly_while_the_hub_is_silent() {
    let (house, commit) = House::with_model(&files()).await;
    let served = house.daemon();
    warm(&served, None, "org/model", &commit).await;
    served.get(&file_url("org/model", "main", "config.json")).await.is(307);
    served.stop().await;
    // The permission of the Hub has to be asked for again, and the Hub takes requests and does not answer them.
    house.hub.faults().add(HubFault::delay(Duration::from_secs(600)));
    let mut config = house.config("a");
    config.ref_ttl = Duration::ZERO;
    config.retry = Default::default();
    let served = Served::start(config, Options::default());
    let paths = routes("org/model", &commit);
    let requests = paths.iter().cycle().take(24).map(async |path| {
        let started = Instant::now();
        (served.get(path).await.status.as_u16(), started.elapsed())
    });
    for (status, time) in futures::future::join_all(requests).await {
        assert!(matches!(status, 200 | 307 | 404), "{status}");
        assert!(time < Duration::from_secs(9), "clients give up after 10 s: {time:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permission_outlives_the_hub_for_a_limited_time() {
    let (house, commit) = House::with_model(&files()).await;
    house.hub.repo("org/model").accept(TOKEN_A);
    let path = file_url("org/model", &commit, "config.json");
    let options = Options { auth_stale: Duration::from_secs(4), ..forgetful() };
    let served = Served::start(house.config("a"), options);
    let allowed = Instant::now();
    served.get_as(Some(TOKEN_A), &path).await.ok();
    house.hub.down(true);
    sleep(Duration::from_secs(1)).await;
    served.get_as(Some(TOKEN_A), &path).await.ok();
    for token in [Some(TOKEN_B), None] {
        served.get_as(token, &path).await.hub_error(503);
    }
    sleep(Duration::from_secs(5).saturating_sub(allowed.elapsed())).await;
    let reply = served.get_as(Some(TOKEN_A), &path).await.is(503);
    assert!(reply.header("retry-after").is_some());
    served.stop().await;
    // After a restart nothing is known of the callers of a repository that is not public.
    let served = house.daemon();
    served.get_as(Some(TOKEN_A), &path).await.hub_error(503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permission_that_is_withdrawn_ends_soon() {
    let (house, commit) = House::with_model(&files()).await;
    house.hub.repo("org/model").private(TOKEN_A);
    let served = Served::start(house.config("a"), forgetful());
    let path = file_url("org/model", &commit, "config.json");
    served.get_as(Some(TOKEN_A), &path).await.ok();
    house.hub.faults().add(HubFault::status(401).on("auth-check"));
    sleep(Duration::from_millis(200)).await;
    served.get_as(Some(TOKEN_A), &path).await.hub_error(401);
    // The permission does not come back when the Hub is down.
    house.hub.down(true);
    sleep(Duration::from_millis(200)).await;
    let reply = served.get_as(Some(TOKEN_A), &path).await;
    assert!(matches!(reply.status.as_u16(), 401 | 503), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_was_made_private_is_not_public_any_more() {
    let (house, commit) = House::with_model(&files()).await;
    let served = house.daemon();
    warm(&served, None, "org/model", &commit).await;
    served.stop().await;
    house.hub.repo("org/model").private(TOKEN_A);
    let served = house.daemon();
    served.get(&file_url("org/model", &commit, "config.json")).await.hub_error(401);
    served.stop().await;
    house.hub.down(true);
    let served = house.daemon();
    served.get(&file_url("org/model", &commit, "config.json")).await.is(503);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_wrong_tokens_do_not_use_up_memory_or_lock_anyone_out() {
    let (house, commit) = House::with_model(&files()).await;
    house.hub.repo("org/model").private(TOKEN_A);
    let served = house.daemon();
    let path = file_url("org/model", &commit, "config.json");
    served.get_as(Some(TOKEN_A), &path).await.ok();
    for number in 0..300 {
        served.get_as(Some(&format!("hf_junk_{number}")), &path).await.is(401);
    }
    let long = "x".repeat(20_000);
    for token in [long.as_str(), "a b", "\u{7f}x"] {
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        let reply = served.raw(&format!("{head}Authorization: Bearer {token}\r\n\r\n")).await;
        assert!(reply.starts_with("HTTP/1.1 4"), "{reply}");
    }
    served.get_as(Some(TOKEN_A), &path).await.ok();
    let errors = served.value("/cache/activity", "/errors").await;
    assert!(errors.as_array().unwrap().len() < 100, "{errors}");
}
