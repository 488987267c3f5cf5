//! The Hub as an origin: listings, revisions, tokens, redirects and failures.
//!
//! The tests run against the Hub stand-in, and against canned answers for responses that no Hub gives. Every source
//! here carries a token. Every failure goes through [`failure`], which searches the printed error for the token.

use futures::StreamExt as _;
use futures::future::join_all;
use modelcache::config::{Config, HubConfig, RetryConfig, Secret};
use modelcache::digest::Provenance;
use modelcache::key::FilePath;
use modelcache::origin::{Origins, ResolvedSource};
use modelcache::source::{Body, Source};
use modelcache::transfer::Retry;
use modelcache::{Error, ErrorKind, Reference, Result, Tier};
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::{FaultProxy, Hub, Place, content};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const TOKEN: &str = "hf_canary0123456789";
const BIG: u64 = 3 * 1024 * 1024;

fn origins(endpoint: &str, token: Option<&str>) -> Origins {
    let retry = RetryConfig { deadline: Duration::from_secs(4), read_timeout: Duration::from_millis(900) };
    let mut config = Config::new("unused");
    config.hub = HubConfig { endpoint: endpoint.to_owned(), token: token.map(Secret::new), via: None };
    Origins::new(&config, Retry::new(retry)).unwrap()
}

async fn resolve(hub: &Hub, reference: &str) -> Result<ResolvedSource> {
    let resolved = origins(&hub.url(), Some(TOKEN)).resolve(&Reference::parse(reference).unwrap()).await?;
    Ok(resolved.expect("a missing repository is an error"))
}

/// A Hub with `org/model`: one large and one small file. The returned source is bound to `main`.
async fn hub_with_model() -> (Hub, Arc<dyn Source>) {
    let hub = Hub::start().await.unwrap();
    hub.repo("org/model").commit().generated("model.bin", 1, BIG).plain("config.json", "{}").publish().unwrap();
    let source = resolve(&hub, "hf://org/model").await.unwrap().source;
    (hub, source)
}

fn path(text: &str) -> FilePath {
    FilePath::new(text).unwrap()
}

/// Returns the error of `result`, which must not be a success. Asserts that its text contains no secret.
fn failure<T>(result: Result<T>) -> Error {
    let Err(error) = result else { panic!("this must fail") };
    let printed = format!("{error} {error:?} {:?}", error.hint_text());
    for secret in [TOKEN, "canary", "Signature", "Expires", "Key-Pair-Id"] {
        assert!(!printed.contains(secret), "{secret} in: {printed}");
    }
    assert_eq!(error.failed_tier(), Some(Tier::Origin), "{printed}");
    assert!(error.artifact_name().is_some_and(|name| name.starts_with("hf://")), "{printed}");
    error
}

async fn bytes(body: Body) -> (Vec<u8>, Option<Error>) {
    let mut stream = body.stream;
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await {
        match chunk {
            Ok(chunk) => bytes.extend_from_slice(&chunk),
            Err(error) => return (bytes, Some(error)),
        }
    }
    (bytes, None)
}

async fn read(source: &Arc<dyn Source>, file: &str, range: Range<u64>) -> Vec<u8> {
    match bytes(source.read(&path(file), range).await.unwrap()).await {
        (bytes, None) => bytes,
        (_, Some(error)) => panic!("{error}"),
    }
}

fn resolves(hub: &Hub) -> usize {
    hub.requests().iter().filter(|seen| seen.place == Place::Hub && seen.path.contains("/resolve/")).count()
}

#[tokio::test]
async fn a_listing_of_several_pages_is_complete() {
    let hub = Hub::start().await.unwrap();
    let repo = hub.repo("datasets/org/many");
    let commit = (0..2501).fold(repo.commit(), |commit, at| commit.plain(&format!("d{}/{at}.txt", at % 7), "x"));
    commit.publish().unwrap();
    let source = resolve(&hub, "hf://datasets/org/many").await.unwrap().source;
    let manifest = source.manifest().await.unwrap().unwrap();
    assert_eq!(manifest.files.len(), 2501);
    let pages = hub.requests().iter().filter(|seen| seen.path.contains("/tree/")).count();
    assert_eq!(pages, 3, "2,501 files and 7 folders");
    assert!(hub.requests().iter().all(|seen| seen.authorized()), "every page is requested with the token");
}

#[tokio::test]
async fn entries_carry_the_digests_of_the_hub() {
    let (_hub, source) = hub_with_model().await;
    let manifest = source.manifest().await.unwrap().unwrap();
    let (large, small) = (&manifest.files[&path("model.bin")], &manifest.files[&path("config.json")]);
    assert_eq!(large.sha256.unwrap().to_string(), content::sha256(&content::bytes(1, BIG as usize)));
    assert_eq!(small.git_oid.unwrap().to_string(), content::git_sha1(b"{}"));
    assert_eq!((large.provenance, small.provenance), (Some(Provenance::Origin), Some(Provenance::Origin)));
    assert_eq!((large.git_oid, small.sha256), (None, None), "the git digest of a pointer is left out");
}

#[tokio::test]
async fn branch_tag_and_pull_request_resolve_to_their_commits() {
    let hub = Hub::start().await.unwrap();
    let repo = hub.repo("org/model");
    let first = repo.commit().plain("a", "1").publish().unwrap();
    repo.tag("v1", &first);
    repo.branch("refs/pr/1", &first);
    repo.branch("feature/x", &first);
    let second = repo.commit().plain("a", "2").publish().unwrap();
    for (revision, commit) in [
        ("", &second),
        ("@main", &second),
        ("@v1", &first),
        ("@refs/pr/1", &first),
        ("@refs%2Fpr%2F1", &first),
        ("@feature%2Fx", &first),
        (":v1", &first),
    ] {
        let resolved = resolve(&hub, &format!("hf://org/model{revision}")).await.unwrap();
        assert_eq!(resolved.key.version.as_str(), commit, "{revision}");
        assert_eq!(resolved.key.name.as_str(), "hf/org/model");
        assert_eq!(resolved.source.manifest().await.unwrap().unwrap().key, resolved.key);
    }
    hub.clear_requests();
    let resolved = resolve(&hub, &format!("hf://org/model@{first}")).await.unwrap();
    assert_eq!(resolved.key.version.as_str(), first);
    assert!(hub.requests().is_empty(), "a commit needs no request");
}

#[tokio::test]
async fn the_token_reaches_the_endpoint_and_never_the_cdn() {
    let (hub, source) = hub_with_model().await;
    source.manifest().await.unwrap();
    assert_eq!(read(&source, "model.bin", 5..9).await, &content::bytes(1, 9)[5..]);
    assert_eq!(read(&source, "config.json", 0..2).await, b"{}");
    let (at_hub, at_cdn): (Vec<_>, Vec<_>) = hub.requests().into_iter().partition(|seen| seen.place == Place::Hub);
    assert!(at_hub.iter().all(|seen| seen.authorization.as_deref() == Some(&*format!("Bearer {TOKEN}"))));
    assert_eq!(at_cdn.len(), 1);
    assert!(hub.tokens_at_cdn().is_empty());
    let agents: Vec<_> = hub.requests().into_iter().filter_map(|seen| seen.user_agent).collect();
    assert!(agents.iter().all(|agent| agent.starts_with("modelcache/")), "{agents:?}");
}

#[tokio::test]
async fn later_ranges_skip_the_redirect_until_the_address_expires() {
    let (hub, source) = hub_with_model().await;
    let want = content::bytes(1, BIG as usize);
    for start in [0, 1000, 2_000_000] {
        assert_eq!(read(&source, "model.bin", start..start + 10).await, &want[start as usize..][..10]);
    }
    assert_eq!(resolves(&hub), 1);
    hub.expire_signed_urls();
    assert_eq!(read(&source, "model.bin", 7..9).await, &want[7..9]);
    assert_eq!(read(&source, "model.bin", 8..9).await, &want[8..9]);
    assert_eq!(resolves(&hub), 2, "renewed once, and remembered again");
    assert!(hub.tokens_at_cdn().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cdn_that_is_gone_is_forgotten() {
    let (hub, source) = hub_with_model().await;
    let start = || FaultProxy::start_on(hub.cdn_url(), 0).unwrap();
    let proxy = start();
    hub.use_cdn_proxy(&proxy.url());
    assert_eq!(read(&source, "model.bin", 0..1).await, content::bytes(1, 1));
    drop(proxy);
    let proxy = start();
    hub.use_cdn_proxy(&proxy.url());
    // The signed URL of the first proxy fails once, and then the Hub is asked for another.
    assert!(failure(source.read(&path("model.bin"), 0..1).await).is_transient());
    assert_eq!(read(&source, "model.bin", 0..1).await, content::bytes(1, 1));
}

#[tokio::test]
async fn a_cdn_that_refuses_every_url_is_unavailable_and_not_unauthorized() {
    let (hub, source) = hub_with_model().await;
    hub.signed_url_ttl(Duration::ZERO);
    let error = failure(source.read(&path("model.bin"), 0..1).await);
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.is_transient() && error.hint_text().unwrap().contains("CDN"), "{error}");
    assert_eq!(resolves(&hub), 1, "one attempt; the download decides about a retry");
}

#[tokio::test]
async fn a_missing_repository_or_revision_is_named_with_a_hint() {
    let (hub, _) = hub_with_model().await;
    let error = failure(resolve(&hub, "hf://org/model@v9").await);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("v9") && error.message().contains("org/model"), "{error}");
    assert!(error.hint_text().is_some());

    let error = failure(resolve(&hub, "hf://org/mdoel").await);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("token"), "with a token the token may be the reason: {error}");

    let reference = Reference::parse("hf://org/mdoel").unwrap();
    let error = failure(origins(&hub.url(), None).resolve(&reference).await);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.hint_text().unwrap().contains("HF_TOKEN"), "{error}");

    let elsewhere = resolve(&hub, &format!("hf://org/mdoel@{}", "0".repeat(40))).await.unwrap().source;
    assert_eq!(failure(elsewhere.manifest().await).kind(), ErrorKind::NotFound, "it may be private: an error");
}

#[tokio::test]
async fn a_private_repository_needs_the_right_token() {
    let hub = Hub::start().await.unwrap();
    let repo = hub.repo("org/secret");
    repo.commit().plain("a", "1").publish().unwrap();
    repo.private(TOKEN);
    let source = resolve(&hub, "hf://org/secret").await.unwrap().source;
    assert_eq!(read(&source, "a", 0..1).await, b"1");
    for token in [None, Some("hf_other_canary")] {
        let reference = Reference::parse("hf://org/secret").unwrap();
        let error = failure(origins(&hub.url(), token).resolve(&reference).await);
        assert_eq!(error.kind(), ErrorKind::NotFound, "the Hub does not distinguish private from absent");
        assert!(error.hint_text().unwrap().contains("HF_TOKEN"), "{error}");
    }
}

#[tokio::test]
async fn the_error_for_a_gated_repository_names_the_page_of_its_conditions() {
    let hub = Hub::start().await.unwrap();
    let repo = hub.repo("datasets/org/gated");
    repo.commit().plain("a", "1").publish().unwrap();
    repo.gated();
    let source = resolve(&hub, "hf://datasets/org/gated").await.unwrap().source;
    assert!(source.manifest().await.unwrap().is_some(), "listings stay open");
    let error = failure(source.read(&path("a"), 0..1).await);
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(
        error.hint_text().unwrap().contains(&format!("{}/datasets/org/gated", hub.url())),
        "{:?}",
        error.hint_text()
    );
    repo.accept(TOKEN);
    assert_eq!(read(&source, "a", 0..1).await, b"1");
}

#[tokio::test]
async fn a_throttled_request_waits_as_long_as_asked() {
    for fault in [HubFault::throttle(1), HubFault::rate_limit(1)] {
        let (hub, _) = hub_with_model().await;
        hub.faults().add(fault.once());
        let start = Instant::now();
        resolve(&hub, "hf://org/model").await.unwrap();
        assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn a_wait_beyond_the_deadline_fails_at_once_and_is_named() {
    let (hub, source) = hub_with_model().await;
    hub.faults().add(HubFault::throttle(3600));
    let start = Instant::now();
    for (token, hint) in [(None, "HF_TOKEN"), (Some(TOKEN), "fewer requests")] {
        let reference = Reference::parse("hf://org/model").unwrap();
        let error = failure(origins(&hub.url(), token).resolve(&reference).await);
        assert_eq!((error.kind(), error.wait()), (ErrorKind::Unavailable, Some(Duration::from_secs(3600))));
        assert!(error.message().contains("3600 s"), "{error}");
        assert!(error.hint_text().unwrap().contains(hint), "{:?}", error.hint_text());
    }
    let error = failure(source.read(&path("model.bin"), 0..1).await);
    assert_eq!(error.wait(), Some(Duration::from_secs(3600)), "a read reports the wait, too");
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_transient_failure_is_retried_and_a_lasting_one_is_not() {
    let (hub, _) = hub_with_model().await;
    for fault in [HubFault::status(503), HubFault::status(500), HubFault::hang_up()] {
        let hits = hub.faults().add(fault.times(2));
        let source = resolve(&hub, "hf://org/model").await.unwrap().source;
        source.manifest().await.unwrap().unwrap();
        assert_eq!(hits.count(), 2);
    }
    let hits = hub.faults().add(HubFault::status(400));
    let error = failure(resolve(&hub, "hf://org/model").await);
    assert!(!error.is_transient(), "{error}");
    assert_eq!(hits.count(), 1);
}

#[tokio::test]
async fn a_read_is_one_attempt_and_its_error_is_marked_as_transient() {
    let (hub, source) = hub_with_model().await;
    let hits = hub.faults().add(HubFault::status(503).once());
    assert!(failure(source.read(&path("model.bin"), 0..1).await).is_transient());
    assert_eq!(hits.count(), 1);
    assert_eq!(read(&source, "model.bin", 0..1).await, content::bytes(1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_of_one_commit_share_the_list_of_files_and_a_failure_to_get_it() {
    let hub = Hub::start().await.unwrap();
    let commit = hub.repo("org/model").commit().plain("config.json", "{}").publish().unwrap();
    let (origins, reference) =
        (origins(&hub.url(), Some(TOKEN)), Reference::parse(&format!("hf://org/model@{commit}")));
    let source = async || origins.resolve(reference.as_ref().unwrap()).await.unwrap().unwrap().source;
    let sources = [source().await, source().await, source().await, source().await, source().await];
    hub.faults().add(HubFault::status(503).on("/tree/"));
    let started = Instant::now();
    for listed in join_all(sources.iter().map(|source| source.manifest())).await {
        assert_eq!(failure(listed).kind(), ErrorKind::Unavailable);
    }
    assert!(started.elapsed() < Duration::from_secs(10), "they waited for each other: {:?}", started.elapsed());

    hub.faults().clear();
    hub.clear_requests();
    for source in sources.iter().chain([&source().await]) {
        assert_eq!(source.manifest().await.unwrap().unwrap().files.len(), 1);
    }
    assert_eq!(hub.requests().iter().filter(|request| request.path.contains("/tree/")).count(), 1);
}

#[tokio::test]
async fn a_hub_that_is_down_is_unavailable() {
    let (hub, _) = hub_with_model().await;
    hub.down(true);
    let error = failure(resolve(&hub, "hf://org/model").await);
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let reference = Reference::parse("hf://org/model").unwrap();
    let error = failure(origins("http://127.0.0.1:1", Some(TOKEN)).resolve(&reference).await);
    assert!(error.is_transient() && error.to_string().contains("http://127.0.0.1:1"), "{error}");
    assert!(error.to_string().contains("refused"), "the reason is not lost: {error}");
}

#[tokio::test]
async fn an_ignored_range_shows_in_the_start_of_the_body() {
    let (hub, source) = hub_with_model().await;
    hub.faults().add(HubFault::ignore_range());
    let body = source.read(&path("model.bin"), 1000..1010).await.unwrap();
    assert_eq!(body.start, 0);
    let (got, error) = bytes(body).await;
    assert!(error.is_none() && got == content::bytes(1, BIG as usize));
}

#[tokio::test]
async fn a_truncated_body_ends_early_without_a_panic() {
    let (hub, source) = hub_with_model().await;
    hub.faults().add(HubFault::short(100).once());
    let (got, error) = bytes(source.read(&path("model.bin"), 0..1000).await.unwrap()).await;
    assert!(got == content::bytes(1, 900) && error.is_none(), "{} bytes, {error:?}", got.len());

    hub.faults().add(HubFault::cut(1000).once());
    let (got, error) = bytes(source.read(&path("model.bin"), 0..BIG).await.unwrap()).await;
    let error = error.expect("the length was announced");
    assert!(got.len() <= 1000 && error.is_transient(), "{error}");
    assert!(!format!("{error:?}").contains("Signature"), "{error:?}");
}

#[tokio::test]
async fn a_silent_server_times_out() {
    let (hub, source) = hub_with_model().await;
    hub.faults().add(HubFault::stall(1000, Duration::from_secs(60)).once());
    let start = Instant::now();
    let (got, error) = bytes(source.read(&path("model.bin"), 0..BIG).await.unwrap()).await;
    let error = error.expect("it fell silent");
    assert!(error.is_transient() && got.len() <= 1000, "{error}");
    hub.faults().add(HubFault::delay(Duration::from_secs(60)).once());
    let error = failure(source.read(&path("model.bin"), 0..1).await);
    assert!(error.is_transient() && error.message().contains("timed out"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_size_that_contradicts_the_tree_is_corrupt_and_both_are_named() {
    let hub = Hub::start().await.unwrap();
    hub.repo("org/model").commit().generated("model.bin", 1, BIG).plain("small.txt", "12345").publish().unwrap();
    hub.faults().add(HubFault::lie_size(7).on("model.bin").once());
    hub.faults().add(HubFault::lie_size(-1).on("small.txt").once());
    let source = resolve(&hub, "hf://org/model").await.unwrap().source;
    let manifest = source.manifest().await.unwrap().unwrap();
    for (file, real) in [("model.bin", BIG), ("small.txt", 5)] {
        let listed = manifest.files[&path(file)].size;
        assert_ne!(listed, real);
        let error = failure(source.read(&path(file), 0..1).await);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.message().contains(&format!("{listed} bytes")), "{error}");
        assert!(error.message().contains(&format!("{real} bytes")), "{error}");
    }
}

#[tokio::test]
async fn a_redirect_loop_ends() {
    let (hub, source) = hub_with_model().await;
    let hits = hub.faults().add(HubFault::redirect_loop());
    let error = failure(source.read(&path("model.bin"), 0..1).await);
    assert!(!error.is_transient() && error.message().contains("redirects"), "{error}");
    assert_eq!(hits.count(), 11, "the request and ten redirects");
    assert_eq!(failure(resolve(&hub, "hf://org/model").await).kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_hostile_path_in_the_tree_fails_the_whole_listing() {
    for name in ["../../etc/passwd", "/etc/passwd", "a/../../x", "a//b"] {
        let hub = Hub::start().await.unwrap();
        hub.repo("org/evil").commit().plain("fine.txt", "1").plain(name, "2").publish().unwrap();
        let source = resolve(&hub, "hf://org/evil").await.unwrap().source;
        let error = failure(source.manifest().await);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
        assert!(hub.body_gets().is_empty());
    }
}

#[tokio::test]
async fn files_with_names_that_cannot_be_kept_are_left_out() {
    let hub = Hub::start().await.unwrap();
    let names = ["onnx\\model.onnx", "a\\..\\b", ".modelcache.json", ".modelcache/manifest.json"];
    let commit = hub.repo("org/odd").commit().plain("fine.txt", "1");
    names.iter().fold(commit, |commit, name| commit.plain(name, "2")).publish().unwrap();
    let source = resolve(&hub, "hf://org/odd").await.unwrap().source;
    let manifest = source.manifest().await.unwrap().unwrap();
    assert!(manifest.files.keys().eq([&path("fine.txt")]), "{:?}", manifest.files);
    assert_eq!(read(&source, "fine.txt", 0..1).await, b"1");
}

#[tokio::test]
async fn a_proxy_that_knows_only_the_older_calls_serves_the_same_files() {
    let (hub, source) = hub_with_model().await;
    let all = source.manifest().await.unwrap().unwrap();
    // Artifactory and Nexus answer 404 to the tree, and some of them to every query.
    for calls in [&["/tree/"][..], &["/tree/", "?blobs"], &["/tree/", "?"]] {
        hub.faults().clear();
        calls.iter().for_each(|call| drop(hub.faults().add(HubFault::status(404).on(*call))));
        let source = resolve(&hub, "hf://org/model").await.unwrap().source;
        let manifest = source.manifest().await.unwrap().unwrap();
        assert_eq!(manifest.files, all.files, "{calls:?}");
        assert_eq!(read(&source, "config.json", 0..2).await, b"{}");
    }
    hub.faults().add(HubFault::status(404));
    assert!(failure(source_at(&hub).await.manifest().await).hint_text().unwrap().contains("HF_ENDPOINT"));
}

/// Returns a source for a commit of `org/model`, without a request.
async fn source_at(hub: &Hub) -> Arc<dyn Source> {
    resolve(hub, &format!("hf://org/model@{}", "ab".repeat(20))).await.unwrap().source
}

#[tokio::test]
async fn a_revision_that_the_hub_redirects_is_followed() {
    let (hub, _) = hub_with_model().await;
    hub.redirect_revisions(true);
    let source = resolve(&hub, "hf://org/model").await.unwrap().source;
    assert_eq!(read(&source, "config.json", 0..2).await, b"{}");
}

/// Starts a server that answers every request with `answer(head)`, and returns its address.
async fn canned(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if stream.read_exact(&mut byte).await.is_err() {
                        return;
                    }
                    head.push(byte[0]);
                }
                let answer = answer(&String::from_utf8_lossy(&head));
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    address
}

fn reply(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// A source at a canned server, bound to a commit. Its tree has not been listed.
async fn canned_source(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Arc<dyn Source> {
    let endpoint = canned(answer).await;
    let reference = Reference::parse(&format!("hf://org/model@{}", "ab".repeat(20))).unwrap();
    let resolved = origins(&endpoint, Some(TOKEN)).resolve(&reference).await.unwrap();
    resolved.expect("a commit needs no request").source
}

#[tokio::test]
async fn bytes_of_another_commit_are_refused() {
    let source = canned_source(|_| reply("200 OK", &format!("X-Repo-Commit: {}\r\n", "cd".repeat(20)), "12345")).await;
    let error = failure(source.read(&path("a"), 0..5).await);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[tokio::test]
async fn the_token_and_the_listing_stay_at_the_endpoint() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let elsewhere = canned({
        let seen = seen.clone();
        move |head| {
            seen.lock().unwrap().push(head.to_owned());
            reply("200 OK", "", "[]")
        }
    })
    .await;
    let entry = r#"[{"type":"file","path":"a","size":1}]"#;
    let target = elsewhere.clone();
    let paged = move |_: &str| reply("200 OK", &format!("Link: <{target}/x?canary>; rel=\"next\"\r\n"), entry);
    // The next page is requested from the endpoint, which sends the same one again.
    let error = failure(canned_source(paged).await.manifest().await);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");

    let target = elsewhere.clone();
    let moved = move |_: &str| reply("302 Found", &format!("Location: {target}/x?canary\r\n"), "");
    let source = canned_source(moved).await;
    let error = failure(source.manifest().await);
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.hint_text().unwrap().contains(&format!("HF_ENDPOINT={elsewhere}")), "{error}");
    assert!(seen.lock().unwrap().is_empty(), "metadata was requested from another host");

    assert_eq!(source.read(&path("a"), 0..2).await.unwrap().start, 0, "bytes may come from another host");
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert!(!seen[0].to_lowercase().contains("authorization") && !seen[0].contains(TOKEN), "{}", seen[0]);
}

#[tokio::test]
async fn a_listing_without_end_is_refused() {
    let endless = |_: &str| reply("200 OK", "Link: </next>; rel=\"next\"\r\n", "[]");
    let error = failure(canned_source(endless).await.manifest().await);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_a_hub_is_reported_with_hf_endpoint() {
    let page = |_: &str| reply("200 OK", "", "<html>Welcome to our proxy</html>");
    let error = failure(canned_source(page).await.manifest().await);
    assert!(error.hint_text().unwrap().contains("HF_ENDPOINT"), "{error}");
    let nothing = |_: &str| reply("404 Not Found", "", "");
    let error = failure(canned_source(nothing).await.manifest().await);
    assert!(error.hint_text().unwrap().contains("HF_ENDPOINT"), "{error}");
}

#[tokio::test]
async fn a_refused_token_is_unauthorized_and_not_repeated() {
    let echo = |_: &str| {
        let message = format!("X-Error-Message: Invalid token {TOKEN} in Authorization header\r\n");
        reply("401 Unauthorized", &message, "")
    };
    let error = failure(canned_source(echo).await.manifest().await);
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(error.message().contains("Invalid token"), "the message of the Hub is kept: {error}");
    assert!(error.hint_text().unwrap().contains("HF_TOKEN"));
    let echo = |_: &str| reply("403 Forbidden", "", &format!("{{\"error\":\"no\\n{TOKEN}\"}}"));
    assert_eq!(failure(canned_source(echo).await.manifest().await).kind(), ErrorKind::Unauthorized);
}

#[tokio::test]
async fn an_object_that_changes_during_the_download_is_requested_again() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let source = canned_source({
        let seen = seen.clone();
        move |head| {
            let matched = head.to_lowercase().contains("if-match: \"one\"");
            seen.lock().unwrap().push(matched);
            match matched {
                true => reply("412 Precondition Failed", "", ""),
                false => reply("200 OK", "ETag: \"one\"\r\n", "12345"),
            }
        }
    })
    .await;
    assert_eq!(read(&source, "a", 0..5).await, b"12345");
    assert_eq!(read(&source, "a", 0..5).await, b"12345");
    assert_eq!(*seen.lock().unwrap(), [false, true, false]);
}

#[tokio::test]
async fn definite_answers_have_their_own_kind_and_remedy() {
    let disabled = "X-Error-Code: DisabledRepo\r\nX-Error-Message: reported\r\n";
    let awaited = "X-Error-Code: GatedRepo\r\nX-Error-Message: your request awaits a review\r\n";
    for (status, headers, kind, says) in [
        ("403 Forbidden", disabled, ErrorKind::Unauthorized, ["is disabled at the Hub: reported", "no token"]),
        ("451 Legal", disabled, ErrorKind::Unauthorized, ["is disabled at the Hub: reported", "no token"]),
        ("451 Legal", "", ErrorKind::Unauthorized, ["451", "legal reasons"]),
        ("403 Forbidden", awaited, ErrorKind::Unauthorized, ["is gated: your request awaits", "accept its conditions"]),
        ("402 Payment Required", "", ErrorKind::Unavailable, ["402", "trying again does not help"]),
    ] {
        let source = canned_source(move |_| reply(status, headers, "")).await;
        let error = source.manifest().await.expect_err(status);
        assert_eq!((error.kind(), error.is_transient()), (kind, false), "{error}");
        let shown = format!("{error} {}", error.hint_text().unwrap_or_default());
        assert!(says.iter().all(|part| shown.contains(part)), "{shown}");
    }
}

#[tokio::test]
async fn a_page_or_an_encoded_body_in_the_place_of_an_answer_is_named() {
    let html = "Content-Type: text/html; charset=utf-8\r\n";
    let listing = canned_source(move |_| reply("200 OK", html, "<html>log in</html>")).await;
    let error = listing.manifest().await.expect_err("a page");
    assert!(error.to_string().contains("HTML page"), "{error}");
    let hint = error.hint_text().unwrap_or_default();
    assert!(hint.contains("HF_ENDPOINT") && hint.contains("captive portal"), "{hint}");
    let file = canned_source(move |head| match head.contains("/resolve/") {
        true => reply("200 OK", html, "<html>log in</html>"),
        false => reply("200 OK", html, r#"[{"type":"file","path":"a","size":5}]"#),
    })
    .await;
    file.manifest().await.expect("JSON that is announced as HTML is read");
    let error = failure(file.read(&path("a"), 0..5).await);
    assert!(error.to_string().contains("HTML page"), "{error}");
    let encoded = canned_source(|_| reply("200 OK", "Content-Encoding: gzip\r\n", "xx")).await;
    let error = encoded.manifest().await.expect_err("encoded");
    assert!(error.to_string().contains("gzip"), "{error}");
}

#[tokio::test]
async fn servers_of_a_cdn_may_have_their_own_etags_if_the_list_has_a_digest() {
    let conditions = Arc::new(Mutex::new(Vec::new()));
    let source = canned_source({
        let conditions = conditions.clone();
        move |head| {
            if !head.contains("/resolve/") {
                let oid = "ab".repeat(20);
                return reply("200 OK", "", &format!(r#"[{{"type":"file","path":"a","size":5,"oid":"{oid}"}}]"#));
            }
            conditions.lock().unwrap().push(head.to_lowercase().contains("if-match"));
            reply("200 OK", "ETag: \"one\"\r\n", "12345")
        }
    })
    .await;
    source.manifest().await.expect("listed");
    for _ in 0..2 {
        assert_eq!(read(&source, "a", 0..5).await, b"12345");
    }
    assert_eq!(*conditions.lock().unwrap(), [false, false]);
}

#[tokio::test]
async fn a_downgrade_or_odd_redirect_is_refused() {
    for location in ["ftp://h/x?canary", "file:///etc/passwd", "http://[bad", ""] {
        let source = canned_source(move |_| reply("302 Found", &format!("Location: {location}\r\n"), "")).await;
        let error = failure(source.read(&path("a"), 0..1).await);
        assert!(!error.is_transient(), "{location}: {error}");
    }
}

#[tokio::test]
async fn a_token_with_a_line_end_is_named_not_printed() {
    let reference = Reference::parse("hf://org/model").unwrap();
    let error = failure(origins("http://127.0.0.1:1", Some("hf_canary\n")).resolve(&reference).await);
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.message().contains("HF_TOKEN") && !error.to_string().contains("canary"));
}
