//! Callers that must not get what they ask for: without a token, from a page of another site, or with names that lead
//! elsewhere.

use crate::common::*;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use modelcache::config::{OriginTemplate, Secret};
use modelcache::redact;
use modelcache_server::{Listeners, Options};
use modelcache_testkit::Content;
use modelcache_testkit::web::{Page, Web};
use reqwest::Method;
use reqwest::header::{AUTHORIZATION, HOST};
use serde_json::json;
use std::fs;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing_subscriber::fmt::MakeWriter;

const NATIVE: [&str; 6] = [
    "/cache/stats",
    "/cache/metrics",
    "/cache/activity",
    "/cache/artifacts",
    "/cache/artifacts/m@1",
    "/cache/artifacts/m@1/files/f",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_native_routes_want_the_token() {
    let house = House::new().await;
    let served = house.daemon_with_token();
    let basic = |user: &str, password: &str| format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
    let wrong = [
        None,
        Some("Bearer wrong".to_owned()),
        Some("Bearer ".to_owned()),
        Some("Bearer daemon-canary-toke".to_owned()),
        Some(format!("Bearer {DAEMON_TOKEN}x")),
        Some(format!("Token {DAEMON_TOKEN}")),
        Some(DAEMON_TOKEN.to_owned()),
        Some(basic("a", "wrong")),
        Some(basic(DAEMON_TOKEN, "")),
        Some("Basic !!!".to_owned()),
    ];
    for path in NATIVE {
        for authorization in &wrong {
            for method in [Method::GET, Method::POST, Method::DELETE] {
                let request = served.request(method, path);
                let request = match authorization {
                    Some(value) => request.header(AUTHORIZATION, value),
                    None => request,
                };
                let reply = Reply::of(request).await;
                assert!(reply.header("www-authenticate").unwrap().starts_with("Basic realm="), "{reply:?}");
                assert!(reply.refused(401).contains("MODEL_CACHE_TOKEN"));
            }
        }
    }
    for right in [format!("Bearer {DAEMON_TOKEN}"), format!("bearer {DAEMON_TOKEN}"), basic("any", DAEMON_TOKEN)] {
        served.get_with("/cache/stats", "authorization", &right).await.ok();
        // With a token, the host may have any name.
        let request =
            served.request(Method::GET, "/cache/stats").header(HOST, "cache.example").header(AUTHORIZATION, right);
        Reply::of(request).await.ok();
    }
    for path in ["/livez", "/readyz", "/metrics", "/openapi.json"] {
        served.get(path).await.ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_only_requests_to_localhost_are_answered() {
    let house = House::new().await;
    let served = house.daemon();
    for path in NATIVE {
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8917", "10.0.0.1", "[::2]"] {
            let reply = Reply::of(served.request(Method::GET, path).header(HOST, host)).await;
            assert!(reply.refused(421).contains("localhost"), "{path} {host}");
        }
    }
    for host in ["localhost", "127.0.0.1:8917", "[::1]:8917"] {
        Reply::of(served.request(Method::GET, "/cache/stats").header(HOST, host)).await.ok();
    }
    let insecure = Served::start(house.config("b"), Options { insecure: true, ..Options::default() });
    Reply::of(insecure.request(Method::GET, "/cache/stats").header(HOST, "any.example")).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_cannot_choose_the_server_of_an_artifact() {
    let house = House::new().await;
    let served = house.daemon();
    let web = Web::start().unwrap();
    web.put("/model.bin", Page::of("content"));
    let secret = house.path("secret");
    Content::from("file-canary").write_to(&secret).unwrap();
    let (secret, host) = (secret.to_str().unwrap(), web.addr());
    let references = [
        format!("http://{host}/model.bin"),
        format!("http://{host}/model.bin@1"),
        format!("https://{host}/model.bin"),
        format!("s3://bucket-{}/model", host.port()),
        format!("oci://{host}/repo:tag"),
        format!("oci://{host}/repo@sha256:{}", "0".repeat(64)),
        format!("file://{secret}"),
        "file:///etc/passwd".to_owned(),
        "file:///etc".to_owned(),
        format!("http/{host}/model.bin@1"),
        format!("file{secret}@1"),
        "file/etc/passwd@1".to_owned(),
        "s3/bucket/model@1".to_owned(),
    ];
    let mut answers = Vec::new();
    for reference in &references {
        let encoded = modelcache::config::encode_segment(reference);
        let artifact = format!("/cache/artifacts/{encoded}");
        let replies = [
            served.post(json!({ "ref": reference })).await,
            served.post(json!({ "ref": reference, "hold": 10 })).await,
            served.get(&artifact).await,
            served.get(&format!("{artifact}/files/passwd")).await,
            served.get(&format!("{artifact}/files/secret")).await,
            served.delete(&format!("{artifact}?tier=all")).await,
            served.delete(&format!("{artifact}?tier=all&dry_run=true")).await,
        ];
        for (at, reply) in replies.into_iter().enumerate() {
            let status = reply.status.as_u16();
            let text = reply.text();
            assert!(!text.contains("root:") && !text.contains("file-canary"), "{reference}: {text}");
            // What a key names may be looked up on disk and on the remote.
            let is_lookup = matches!(at, 2 | 5 | 6);
            let expected = if is_lookup { matches!(status, 403 | 404 | 400) } else { matches!(status, 403 | 400) };
            if !expected {
                answers.push(format!("{reference} {at}: {status} {text}"));
            }
        }
    }
    assert!(answers.is_empty(), "{}", answers.join("\n"));
    assert!(web.requests().is_empty(), "the daemon asked the server: {:?}", web.requests());
    assert!(served.cache.list().await.unwrap().is_empty());

    let open = Served::start(house.config("b"), Options { allow_any_origin: true, ..Options::default() });
    open.post(json!({ "ref": format!("http://{host}/model.bin") })).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn with_any_origin_allowed_metadata_services_are_refused_still() {
    let house = House::new().await;
    let web = Web::start().unwrap();
    web.put("/away", Page::redirect(302, "http://169.254.169.254/latest/meta-data/iam"));
    let served = Served::start(house.config("a"), Options { allow_any_origin: true, ..Options::default() });
    for url in [
        "http://169.254.169.254/latest/meta-data/iam".to_owned(),
        "http://2852039166/x".to_owned(),
        "http://[fd00:ec2::254]/x".to_owned(),
        format!("{}/away", web.url()),
    ] {
        let reply = served.post(json!({ "ref": url })).await;
        assert!(reply.text().contains("link-local"), "{url}: {reply:?}");
        assert!(!reply.status.is_success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_path_leads_out_of_an_artifact() {
    let (house, commit) = House::with_model(&[("a.txt", "a".into())]).await;
    // An origin of bare names in a folder: the names must not lead out of it.
    let root = house.path("models");
    Content::from("fine").write_to(root.join("m/1/f")).unwrap();
    Content::from("file-canary").write_to(house.path("secret/1/f")).unwrap();
    let mut config = house.config("a");
    let template = format!("file://{}/{{name}}/{{version}}", root.display());
    config.origins = vec![OriginTemplate::new(&template).unwrap()];
    let served = Served::start(config, Options::default());
    assert_eq!(served.get("/cache/artifacts/m@1/files/f").await.ok().text(), "fine");
    served.get(&file_url("org/model", &commit, "a.txt")).await.ok();
    let climbs = ["..", "%2e%2e", "%2E.", ".%2e", "%252e%252e", "..%00", "..%5c", "%c0%ae%c0%ae", "．．"];
    let slashes = ["/", "%2f", "%2F", "%5c", "\\", "%252f", "//"];
    for climb in climbs {
        for slash in slashes {
            let up = format!("{climb}{slash}").repeat(8);
            for path in [
                format!("/cache/artifacts/m@1/files/{up}etc/passwd"),
                format!("/cache/artifacts/m@1/files{slash}{up}etc{slash}passwd"),
                format!("/cache/artifacts/{climb}{slash}secret@1/files/f"),
                format!("/cache/artifacts/m%2F{climb}{slash}..%2Fsecret@1/files/f"),
                format!("/cache/artifacts/m@{climb}{slash}{climb}{slash}secret{slash}1/files/f"),
                format!("/cache/artifacts/{up}etc%2Fpasswd@1/files/passwd"),
                format!("/org/model/resolve/{commit}/{up}etc/passwd"),
                format!("/org/model/resolve/{up}etc/passwd"),
                format!("/{climb}/{climb}/resolve/main/etc/passwd"),
                format!("/api/models/org/model/tree/{commit}/{up}etc"),
                format!("/api/models/{climb}{slash}{climb}/tree/main"),
            ] {
                let (status, text) = served.raw_get(&path).await;
                assert!((400..500).contains(&status) || status == 307, "{path}: {text}");
                assert!(!text.contains("root:") && !text.contains("file-canary"), "{path}: {text}");
            }
        }
    }
    for path in
        ["/etc/passwd", "//etc/passwd", "/cache/artifacts/m@1/files//etc/passwd", "/cache/artifacts/m@1/files/", "*"]
    {
        let (status, text) = served.raw_get(path).await;
        assert!((400..500).contains(&status), "{path}: {text}");
    }
    assert!(!fs::exists(house.path("models/secret")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_passed_on_does_not_leave_its_repository() {
    let house = House::new().await;
    let served = house.daemon();
    for path in [
        "/api/models/org/model/discussions/../../../../whoami-v2",
        "/api/models/org/model/discussions/%2e%2e/%2E./.%2e/../whoami-v2",
        "/api/models/org/model/commits/..",
        "/api/models/org/model/discussions/..\\..\\..\\x",
        "/api/models/org/model/discussions/./x",
    ] {
        let (status, text) = served.raw_get(path).await;
        assert!((400..500).contains(&status), "{path}: {text}");
    }
    assert!(house.hub.requests().is_empty(), "{:?}", house.hub.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_hub_is_itself_says_so() {
    let house = House::new().await;
    let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let mut config = house.config("a");
    config.hub.endpoint = format!("http://{}", listeners.local_addrs().unwrap()[0]);
    let served = Served::start_on(listeners, config, with_token(), |router| router);
    for path in ["/api/models/org/model", "/org/model/resolve/main/f", "/api/whoami-v2"] {
        for token in [None, Some(DAEMON_TOKEN), Some(TOKEN_A)] {
            let started = std::time::Instant::now();
            let reply = served.get_as(token, path).await;
            assert!(reply.text().contains("points at the daemon itself"), "{path} {token:?}: {reply:?}");
            reply.hub_error(508);
            assert!(started.elapsed() < Duration::from_secs(5), "{path}: {:?}", started.elapsed());
        }
    }
    let request = served.request(Method::POST, "/cache/artifacts").bearer_auth(DAEMON_TOKEN);
    let reply = Reply::of(request.json(&json!({ "ref": "hf://org/model" }))).await;
    assert!(!reply.status.is_success() && reply.text().contains("itself"), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_request_gets_into_the_headers_of_a_response() {
    let (house, commit) = House::with_model(&[("a.txt", "a".into()), ("b.txt", "b".into())]).await;
    let served = house.daemon();
    let evil = "x%0d%0aset-cookie:%20evil=1";
    for path in [
        format!("/org/model/resolve/main/{evil}"),
        format!("/org/model/resolve/{evil}/a.txt"),
        format!("/api/models/org/model/tree/main/{evil}"),
        format!("/api/models/org/model/revision/{evil}"),
        format!("/cache/artifacts/{evil}@1"),
        format!("/cache/artifacts/m@1/files/{evil}"),
        format!("/org/model/resolve/{commit}/a.txt?{evil}"),
    ] {
        let (_, text) = served.raw_get(&path).await;
        assert!(!text.to_lowercase().contains("\r\nset-cookie"), "{path}: {text}");
    }
    let id = served.get_with("/livez", "x-request-id", "abc-1").await.ok();
    assert_eq!(id.header("x-request-id"), Some("abc-1"));
    for odd in ["<script>", "a b", &"x".repeat(500)] {
        let reply = served.get_with("/livez", "x-request-id", odd).await.ok();
        assert_ne!(reply.header("x-request-id"), Some(odd));
    }
    let tree = "GET /api/models/org/model/tree/main?limit=1 HTTP/1.1\r\nConnection: close\r\nHost: ";
    for host in ["evil.example/a?b=<x>\"", "user@evil.example", "a>; rel=\"next\", <http://evil.example/"] {
        let text = served.raw(&format!("{tree}{host}\r\n\r\n")).await;
        assert!(text.contains("link: </api/models/") || text.starts_with("HTTP/1.1 4"), "{text}");
        assert!(!text.contains("evil"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_and_bodies_have_limits() {
    let house = House::new().await;
    let served = house.daemon();
    let long = "x".repeat(64 << 10);
    for request in [
        format!("GET /{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("GET /livez HTTP/1.1\r\nHost: localhost\r\nX: {long}\r\n\r\n"),
        format!("GET /livez HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X: y\r\n".repeat(1_000)),
        "not http\r\n\r\n".to_owned(),
        format!(
            "POST /cache/artifacts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            1_u64 << 40
        ),
    ] {
        let text = served.raw(&request).await;
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{}", &text[..text.len().min(300)]);
    }
    served.get("/livez").await.ok();
}

/// The log of all daemons of this process.
#[derive(Clone, Default)]
struct LogText(Arc<Mutex<Vec<u8>>>);

impl io::Write for LogText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogText {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_a_log_a_metric_or_an_error() {
    let log = LogText::default();
    let filter = tracing_subscriber::EnvFilter::new("modelcache=trace,modelcache_server=trace");
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(log.clone()).with_ansi(false).try_init();
    let (house, commit) =
        House::with_model(&[("config.json", "{}".into()), ("model.bin", Content::generated(1, MIB))]).await;
    house.hub.repo("org/model").private(TOKEN_A).private(OWN_HUB_TOKEN);
    let web = Web::start().unwrap();
    web.put("/model.bin", Page::of("content"));
    let mut config = house.config("a");
    config.hub.token = Some(Secret::new(OWN_HUB_TOKEN));
    let served = Served::start(config, Options { allow_any_origin: true, ..with_token() });
    let path = file_url("org/model", &commit, "model.bin");
    for token in [TOKEN_A, TOKEN_B, DAEMON_TOKEN] {
        served.get_as(Some(token), &path).await;
        served.get_as(Some(token), "/cache/stats").await;
        served.get_as(Some(token), &format!("/api/models/org/none?token={token}")).await;
    }
    for token in [DAEMON_TOKEN, OWN_HUB_TOKEN] {
        // A token in the wrong place.
        served.get_as(Some(DAEMON_TOKEN), &format!("/cache/artifacts/{token}")).await;
        served.get(&file_url(token, token, token)).await;
    }
    // The CDN refuses its signed URLs: the errors name them.
    house.publish("org/second", &[("model.bin", Content::generated(2, MIB))]);
    house.hub.use_external_cdn(&web.url());
    served.get_as(Some(DAEMON_TOKEN), &file_url("org/second", "main", "model.bin")).await;
    let signed = format!("{}/model.bin?Signature=url-canary&Expires=1", web.url());
    let request = served.request(Method::POST, "/cache/artifacts").bearer_auth(DAEMON_TOKEN);
    let reply = Reply::of(request.json(&json!({ "ref": signed }))).await;
    assert!(!reply.text().contains("url-canary"), "{reply:?}");
    house.hub.down(true);
    served.get_as(Some(TOKEN_B), "/api/models/org/third").await;
    for path in ["/cache/stats", "/cache/metrics", "/cache/activity", "/cache/artifacts", "/metrics"] {
        let text = served.get_as(Some(DAEMON_TOKEN), path).await.ok().text();
        assert!(!text.contains("url-canary"), "{text}");
    }
    // As the program prints it: registered secrets are redacted in each line.
    let log = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    let log: String = log.lines().map(|line| format!("{}\n", redact::text(line))).collect();
    assert!(log.contains("modelcache_server"), "nothing was logged");
    for secret in [DAEMON_TOKEN, OWN_HUB_TOKEN, TOKEN_A, TOKEN_B, "url-canary", "Signature="] {
        let line = log.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret} is in the log: {line:?}");
    }
}
