//! Tests the Hub stand-in over real sockets, with a client that does not follow redirects.

use std::time::{Duration, Instant};

use modelcache_testkit::hub::{HubFault, Repo};
use modelcache_testkit::{Content, Hub, Place, content};
use reqwest::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, ETAG, LINK, LOCATION, RETRY_AFTER};
use reqwest::{Client, Method, Response};
use serde_json::Value;

const SEED: u64 = 11;
const MODEL_LEN: u64 = 3_000_000;

fn client() -> Client {
    Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().unwrap()
}

async fn ask(method: Method, url: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = client().request(method, url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap()
}

async fn get(url: &str) -> Response {
    ask(Method::GET, url, &[]).await
}

async fn get_json(url: &str) -> Value {
    get(url).await.json().await.unwrap()
}

fn header(answer: &Response, name: impl AsRef<str>) -> String {
    answer.headers().get(name.as_ref()).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

/// Fills a repo with plain, LFS, nested and oddly named files. Returns it with its commit.
fn filled(hub: &Hub) -> (Repo, String) {
    let repo = hub.repo("org/model");
    let commit = repo
        .commit()
        .file("config.json", "{}")
        .generated("model.safetensors", SEED, MODEL_LEN)
        .file("sub dir/fé+%.txt", "odd")
        .file("sub dir/deep/x.txt", "x")
        .publish()
        .unwrap();
    (repo, commit)
}

#[tokio::test]
async fn a_hub_over_folders_answers_no_request_before_it_has_all_of_them() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("model.safetensors")).unwrap().set_len(200_000_000).unwrap();
    let repos = [("org/model".to_owned(), folder.path().to_owned())];
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let hub = std::thread::spawn(move || Hub::start_with(port, &repos).unwrap());
    let url = format!("http://127.0.0.1:{port}/api/models/org/model");
    let first = loop {
        match client().get(&url).send().await {
            Ok(answer) => break answer,
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    };
    assert_eq!(first.status(), 200);
    drop(hub.join());
}

#[tokio::test]
async fn info_tree_and_paths_info_agree_on_the_files() {
    let hub = Hub::start().await.unwrap();
    let (_, commit) = filled(&hub);
    let sha256 = Content::generated(SEED, MODEL_LEN).sha256().unwrap();

    let info = get_json(&format!("{}/api/models/org/model?blobs=true", hub.url())).await;
    assert_eq!(info["sha"], commit);
    assert_eq!(info["siblings"].as_array().unwrap().len(), 4);
    assert_eq!(info["siblings"][1]["lfs"]["sha256"], sha256);
    assert_eq!(info["siblings"][0]["blobId"], content::git_sha1(b"{}"));
    let bare = get_json(&format!("{}/api/models/org/model/revision/{commit}", hub.url())).await;
    assert!(bare["siblings"][0].get("size").is_none(), "sizes only with blobs=true");

    let flat = get_json(&format!("{}/api/models/org/model/tree/main", hub.url())).await;
    let paths: Vec<_> = flat.as_array().unwrap().iter().map(|row| row["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["config.json", "model.safetensors", "sub dir"]);
    assert_eq!(flat[2]["type"], "directory");
    assert_eq!(flat[1]["lfs"]["oid"], sha256);
    assert_eq!(flat[1]["size"], MODEL_LEN);
    assert_ne!(flat[1]["oid"], flat[1]["lfs"]["oid"]);
    assert!(flat[1].get("xetHash").is_none());
    let deep = get_json(&format!("{}/api/models/org/model/tree/main/sub%20dir?recursive=True", hub.url())).await;
    let paths: Vec<_> = deep.as_array().unwrap().iter().map(|row| row["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["sub dir/deep", "sub dir/deep/x.txt", "sub dir/fé+%.txt"]);

    let url = format!("{}/api/models/org/model/paths-info/main", hub.url());
    let form = "paths=sub+dir%2Ff%C3%A9%2B%25.txt&paths=absent&expand=true";
    let rows: Value = client().post(url).body(form).send().await.unwrap().json().await.unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["oid"], content::git_sha1(b"odd"));
    assert_eq!(rows[0]["lastCommit"]["id"], commit);
}

#[tokio::test]
async fn a_large_tree_comes_in_pages_with_absolute_links() {
    let hub = Hub::start().await.unwrap();
    let mut commit = hub.repo("datasets/big").commit();
    for index in 0..2501 {
        commit = commit.file(&format!("{index:05}.txt"), "");
    }
    commit.publish().unwrap();
    let mut url = format!("{}/api/datasets/big/tree/main?recursive=true", hub.url());
    let mut sizes = Vec::new();
    loop {
        let answer = get(&url).await;
        let link = header(&answer, LINK);
        sizes.push(answer.json::<Value>().await.unwrap().as_array().unwrap().len());
        match link.strip_suffix(">; rel=\"next\"").and_then(|link| link.strip_prefix('<')) {
            Some(next) => url = next.to_owned(),
            None => break,
        }
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    }
    assert_eq!(sizes, [1000, 1000, 501]);
    hub.page_size(2000);
    assert_eq!(get_json(&url.replace("cursor=2000", "cursor=0")).await.as_array().unwrap().len(), 2000);
}

#[tokio::test]
async fn a_plain_file_is_served_in_place_with_ranges() {
    let hub = Hub::start().await.unwrap();
    let repo = hub.repo("gpt2");
    let commit = repo.commit().file("a/vocab.txt", "0123456789").publish().unwrap();
    let url = format!("{}/gpt2/resolve/main/a/vocab.txt", hub.url());
    let etag = format!("\"{}\"", content::git_sha1(b"0123456789"));

    for method in [Method::HEAD, Method::GET] {
        let answer = ask(method, &url, &[]).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(header(&answer, "x-repo-commit"), commit);
        assert_eq!(header(&answer, ETAG), etag);
        assert_eq!(header(&answer, CONTENT_LENGTH), "10");
        assert_eq!(header(&answer, ACCEPT_RANGES), "bytes");
    }
    let cases =
        [("bytes=0-0", "bytes 0-0/10", "0"), ("bytes=-3", "bytes 7-9/10", "789"), ("bytes=8-99", "bytes 8-9/10", "89")];
    for (range, content_range, body) in cases {
        let answer = ask(Method::GET, &url, &[("range", range)]).await;
        assert_eq!(answer.status(), 206);
        assert_eq!(header(&answer, CONTENT_RANGE), content_range);
        assert_eq!(answer.text().await.unwrap(), body);
    }
    let past = ask(Method::GET, &url, &[("range", "bytes=10-")]).await;
    assert_eq!((past.status().as_u16(), header(&past, CONTENT_RANGE)), (416, "bytes */10".to_owned()));
    assert_eq!(ask(Method::HEAD, &url, &[("if-none-match", &etag)]).await.status(), 304);
    assert_eq!(hub.body_gets().len(), 4);
}

#[tokio::test]
async fn an_lfs_file_is_redirected_to_another_host_by_a_signed_url() {
    let hub = Hub::start().await.unwrap();
    let (_, commit) = filled(&hub);
    let url = format!("{}/org/model/resolve/main/model.safetensors", hub.url());
    let sha256 = Content::generated(SEED, MODEL_LEN).sha256().unwrap();
    let mut location = String::new();
    for method in [Method::HEAD, Method::GET] {
        let answer = ask(method, &url, &[("authorization", "Bearer hf_secret")]).await;
        assert_eq!(answer.status(), 302);
        assert_eq!(header(&answer, "x-repo-commit"), commit);
        assert_eq!(header(&answer, "x-linked-etag"), format!("\"{sha256}\""));
        assert_eq!(header(&answer, "x-linked-size"), MODEL_LEN.to_string());
        location = header(&answer, LOCATION);
        assert!(location.starts_with(&hub.cdn_url()));
    }
    let whole = get(&location).await;
    assert_eq!(content::sha256(&whole.bytes().await.unwrap()), sha256);
    let part = ask(Method::GET, &location, &[("range", "bytes=1000000-1000099")]).await;
    assert_eq!(part.status(), 206);
    assert_eq!(part.bytes().await.unwrap(), Content::generated(SEED, MODEL_LEN).read(1_000_000..1_000_100).unwrap());
    assert_eq!(hub.body_gets().len(), 2);
    assert!(hub.body_gets().iter().all(|seen| seen.place == Place::Cdn));
    assert_eq!(hub.body_bytes(), MODEL_LEN + 100);
    assert!(hub.tokens_at_cdn().is_empty());
    assert!(hub.requests().iter().any(|seen| seen.authorization.as_deref() == Some("Bearer hf_secret")));

    ask(Method::GET, &location, &[("authorization", "Bearer leaked")]).await;
    assert_eq!(hub.tokens_at_cdn(), ["Bearer leaked"]);
    assert_eq!(get(&location.replace("Signature=", "Signature=0")).await.status(), 403);
    hub.expire_signed_urls();
    assert_eq!(get(&location).await.status(), 403);
    hub.signed_url_ttl(Duration::ZERO);
    let stale = header(&get(&url).await, LOCATION);
    assert_eq!(get(&stale).await.status(), 403);
}

#[tokio::test]
async fn refusals_carry_the_codes_that_clients_look_for() {
    let hub = Hub::start().await.unwrap();
    let (_, commit) = filled(&hub);
    hub.repo("org/secret").private("hf_a").commit().file("x", "x").publish().unwrap();
    hub.repo("org/gate").accept("hf_a").commit().file("x", "x").publish().unwrap();
    hub.user("ann", "hf_a");
    let cases = [
        ("/org/model/resolve/main/absent", "", 404, "EntryNotFound"),
        ("/org/model/resolve/nope/config.json", "", 404, "RevisionNotFound"),
        ("/api/models/org/model/tree/nope", "", 404, "RevisionNotFound"),
        ("/api/models/org/model/tree/main/nope", "", 404, "EntryNotFound"),
        ("/org/absent/resolve/main/x", "", 401, "RepoNotFound"),
        ("/api/models/org/absent", "", 401, "RepoNotFound"),
        ("/api/models/org/secret", "", 401, "RepoNotFound"),
        ("/org/secret/resolve/main/x", "hf_b", 401, "RepoNotFound"),
        ("/org/secret/resolve/main/x", "hf_a", 200, ""),
        ("/org/gate/resolve/main/x", "", 403, "GatedRepo"),
        ("/org/gate/resolve/main/x", "hf_b", 403, "GatedRepo"),
        ("/org/gate/resolve/main/x", "hf_a", 200, ""),
        ("/api/models/org/gate/tree/main", "", 200, ""),
        ("/api/models/org/gate/auth-check", "", 403, "GatedRepo"),
        ("/api/whoami-v2", "hf_a", 200, ""),
        ("/api/whoami-v2", "hf_b", 401, ""),
        ("/api/agent-harnesses", "", 404, ""),
        ("/api/telemetry/x", "", 404, ""),
    ];
    for (path, token, status, code) in cases {
        let bearer = format!("Bearer {token}");
        let headers: &[(&str, &str)] = if token.is_empty() { &[] } else { &[("authorization", &bearer)] };
        let answer = ask(Method::GET, &format!("{}{path}", hub.url()), headers).await;
        assert_eq!((answer.status().as_u16(), header(&answer, "x-error-code").as_str()), (status, code), "{path}");
        if status >= 400 {
            assert!(!header(&answer, "x-error-message").is_empty(), "{path}");
            let is_entry = code == "EntryNotFound";
            assert_eq!(header(&answer, "x-repo-commit"), if is_entry { commit.as_str() } else { "" }, "{path}");
            assert!(answer.json::<Value>().await.unwrap()["error"].is_string());
        }
    }
}

#[tokio::test]
async fn revisions_move_and_commits_stay() {
    let hub = Hub::start().await.unwrap();
    let (repo, first) = filled(&hub);
    repo.tag("v1", &first);
    let second = repo.commit().file("config.json", "{\"v\":2}").remove("model.safetensors").publish().unwrap();
    let third = repo.commit().on("refs/pr/1").file("only.txt", "pr").publish().unwrap();
    assert_eq!(repo.resolve("main"), Some(second.clone()));
    assert_eq!(repo.resolve("v1"), Some(first.clone()));
    let url = hub.url();
    assert_eq!(get_json(&format!("{url}/api/models/org/model/revision/refs%2Fpr%2F1")).await["sha"], third);
    assert_eq!(get(&format!("{url}/org/model/resolve/v1/config.json")).await.text().await.unwrap(), "{}");
    assert_eq!(get(&format!("{url}/org/model/resolve/refs%2Fpr%2F1/only.txt")).await.text().await.unwrap(), "pr");
    assert_eq!(get(&format!("{url}/org/model/resolve/{second}/model.safetensors")).await.status(), 404);
    let refs = get_json(&format!("{url}/api/models/org/model/refs")).await;
    assert_eq!(refs["branches"][0]["targetCommit"], second);
    assert_eq!(refs["pullRequests"][0]["ref"], "refs/pr/1");
    hub.redirect_revisions(true);
    let moved = get(&format!("{url}/org/model/resolve/main/sub%20dir/f%C3%A9%2B%25.txt")).await;
    assert_eq!(moved.status(), 307);
    assert_eq!(header(&moved, LOCATION), format!("/org/model/resolve/{second}/sub%20dir/f%C3%A9%2B%25.txt"));
    assert_eq!(get(&format!("{url}{}", header(&moved, LOCATION))).await.text().await.unwrap(), "odd");
}

#[tokio::test]
async fn xet_hints_appear_only_when_switched_on() {
    let hub = Hub::start().await.unwrap();
    let (repo, _) = filled(&hub);
    repo.xet(true);
    let tree = get_json(&format!("{}/api/models/org/model/tree/main", hub.url())).await;
    assert_eq!(tree[1]["xetHash"].as_str().unwrap().len(), 64);
    assert!(tree[0].get("xetHash").is_none());
    let head = ask(Method::HEAD, &format!("{}/org/model/resolve/main/model.safetensors", hub.url()), &[]).await;
    assert_eq!(header(&head, "x-xet-hash"), tree[1]["xetHash"].as_str().unwrap());
}

#[tokio::test]
async fn faults_that_replace_the_answer_are_counted_and_aimed() {
    let hub = Hub::start().await.unwrap();
    filled(&hub);
    let config = format!("{}/org/model/resolve/main/config.json", hub.url());
    let hits = hub.faults().add(HubFault::throttle(7).on("config").times(2));
    hub.faults().add(HubFault::rate_limit(55).on("/tree/").once());
    let throttled = get(&config).await;
    assert_eq!((throttled.status().as_u16(), header(&throttled, RETRY_AFTER)), (429, "7".to_owned()));
    assert_eq!(get(&config).await.status(), 429);
    assert_eq!(get(&config).await.status(), 200);
    assert_eq!(hits.count(), 2);
    let limited = get(&format!("{}/api/models/org/model/tree/main", hub.url())).await;
    assert_eq!(header(&limited, "ratelimit"), "\"resolvers\";r=0;t=55");

    hub.faults().add(HubFault::status(503).once());
    assert_eq!(get(&config).await.status(), 503);
    hub.faults().add(HubFault::hang_up().once());
    assert!(client().get(&config).send().await.is_err());
    hub.down(true);
    assert!(client().get(&config).send().await.is_err());
    hub.down(false);
    assert_eq!(get(&config).await.status(), 200);
    hub.faults().add(HubFault::redirect_loop().on("config"));
    let following = Client::builder().no_proxy().build().unwrap();
    assert!(following.get(&config).send().await.unwrap_err().is_redirect());
    hub.faults().clear();
    hub.faults().add(HubFault::lie_size(-5).on("model.safetensors"));
    let tree = get_json(&format!("{}/api/models/org/model/tree/main", hub.url())).await;
    assert_eq!(tree[1]["size"], MODEL_LEN - 5);
}

#[tokio::test]
async fn faults_of_the_body_spoil_only_bodies() {
    let hub = Hub::start().await.unwrap();
    filled(&hub);
    let url = format!("{}/org/model/resolve/main/model.safetensors", hub.url());
    let good = Content::generated(SEED, MODEL_LEN).to_vec().unwrap();
    let cdn = header(&get(&url).await, LOCATION);
    let whole = async || get(&cdn).await.bytes().await;

    let hits = hub.faults().add(HubFault::flip(1_234_567).on("model.safetensors").once());
    get(&url).await;
    assert_eq!(hits.count(), 0, "a redirect has no body to spoil");
    let other_part = ask(Method::GET, &cdn, &[("range", "bytes=0-99")]).await;
    assert_eq!(other_part.bytes().await.unwrap(), &good[..100]);
    let spoiled = whole().await.unwrap();
    let wrong: Vec<_> = (0..good.len()).filter(|at| spoiled[*at] != good[*at]).collect();
    assert_eq!(wrong, [1_234_567]);
    assert_eq!(whole().await.unwrap(), good);

    hub.faults().add(HubFault::cut(1_000_000).once());
    let mut answer = get(&cdn).await;
    assert_eq!(header(&answer, CONTENT_LENGTH), MODEL_LEN.to_string());
    let mut received = 0;
    let ended_well = loop {
        match answer.chunk().await {
            Ok(Some(chunk)) => received += chunk.len(),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    assert_eq!((received, ended_well), (1_000_000, false));

    hub.faults().add(HubFault::short(10).once());
    assert_eq!(whole().await.unwrap(), &good[..good.len() - 10]);

    hub.faults().add(HubFault::ignore_range().once());
    let answer = ask(Method::GET, &cdn, &[("range", "bytes=5-9")]).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.bytes().await.unwrap(), good);

    hub.faults().add(HubFault::stall(2_000_000, Duration::from_millis(300)).once());
    let start = Instant::now();
    assert_eq!(whole().await.unwrap(), good);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn a_blocked_thread_does_not_stop_the_hub() {
    let hub = Hub::start_on(0).unwrap();
    filled(&hub);
    let url = format!("{}/org/model/resolve/main/config.json", hub.url());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let from_a_thread = std::thread::spawn(move || runtime.block_on(async { get(&url).await.text().await.unwrap() }));
    assert_eq!(from_a_thread.join().unwrap(), "{}");
}
