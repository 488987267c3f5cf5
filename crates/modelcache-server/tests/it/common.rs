//! The test environment: a daemon on a free port, with a Hub stand-in and, where a test wants one, a bucket behind a
//! fault proxy.
//!
//! [`Reply`] searches every response for the secrets that the tests use, so a test fails if one leaks.
#![allow(unreachable_pub)]

use futures::StreamExt as _;
use modelcache::cache::PutOptions;
use modelcache::config::{ByteBound, Config, Durable, Environment, HubConfig, RemoteConfig, RetryConfig, Secret};
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Cache};
use modelcache_server::{Daemon, Listeners, Options, ServeOptions, complete_config, serve};
use modelcache_testkit::{Content, FaultProxy, Hub, S3};
use reqwest::header::HeaderMap;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

pub const MIB: u64 = 1 << 20;
pub const BUCKET: &str = "models";
/// The token of the daemon.
pub const DAEMON_TOKEN: &str = "daemon-canary-token";
/// The daemon's own Hub token.
pub const OWN_HUB_TOKEN: &str = "hf_canaryOfTheDaemon";
/// Hub tokens of two callers.
pub const TOKEN_A: &str = "hf_canaryOfCallerA";
pub const TOKEN_B: &str = "hf_canaryOfCallerB";
/// Secrets of the tests. No response, log line or metric may contain one of them. `Signature=` is part of every URL that
/// the CDN stand-in signs.
pub const SECRETS: [&str; 5] = [DAEMON_TOKEN, OWN_HUB_TOKEN, TOKEN_A, TOKEN_B, "Signature="];
/// Time limit of everything that should happen soon.
const SOON: Duration = Duration::from_secs(60);

/// A Hub stand-in, and a temporary folder for cache directories and files.
pub struct House {
    pub hub: Hub,
    pub folder: TempDir,
}

impl House {
    pub async fn new() -> Self {
        Self { hub: Hub::start().await.unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    /// Returns a house whose Hub has `org/model` with these files, and the commit.
    pub async fn with_model(files: &[(&str, Content)]) -> (Self, String) {
        let house = Self::new().await;
        let commit = house.publish("org/model", files);
        (house, commit)
    }

    /// Commits files to a repository of the Hub, and returns the commit.
    pub fn publish(&self, repo: &str, files: &[(&str, Content)]) -> String {
        let commit = self.hub.repo(repo).commit();
        files.iter().fold(commit, |commit, (path, content)| commit.file(path, content.clone())).publish().unwrap()
    }

    /// Returns the configuration of a daemon with the cache directory `dir` and without a remote.
    pub fn config(&self, dir: &str) -> Config {
        let mut config = Config::new(self.folder.path().join(dir));
        config.max_bytes = ByteBound::Bytes(1 << 30);
        config.min_free_bytes = ByteBound::Bytes(0);
        config.durable = Durable::Background;
        config.hub =
            HubConfig { endpoint: self.hub.url(), token: Some(Secret::new(OWN_HUB_TOKEN)), ..HubConfig::default() };
        config.retry = RetryConfig { deadline: Duration::from_secs(3), read_timeout: Duration::from_secs(2) };
        config
    }

    /// Starts a daemon with the cache directory `a` and default options.
    pub fn daemon(&self) -> Served {
        Served::start(self.config("a"), Options::default())
    }

    /// Starts a daemon that wants [`DAEMON_TOKEN`] from its callers.
    pub fn daemon_with_token(&self) -> Served {
        Served::start(self.config("a"), with_token())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts files into the cache of a daemon as the artifact `key`: a single file if there is one without a name.
    pub async fn put(&self, served: &Served, key: &str, files: &[(&str, Content)]) {
        let source = self.path(&format!("source {}", key.replace('/', "_")));
        for (path, content) in files {
            let path = if path.is_empty() { source.clone() } else { source.join(path) };
            content.write_to(path).unwrap();
        }
        let key = ArtifactKey::bare(key).unwrap();
        served.cache.put_with(&key, &source, &PutOptions::default(), &Progress::new()).await.unwrap();
    }

    /// Returns the GETs of file content that the Hub and its CDN have answered.
    pub fn body_gets(&self) -> usize {
        self.hub.body_gets().len()
    }

    /// Returns the number of requests to the Hub with `part` in their path.
    pub fn requests(&self, part: &str) -> usize {
        self.hub.requests().iter().filter(|seen| seen.path.contains(part)).count()
    }
}

/// Options with a token.
pub fn with_token() -> Options {
    Options { token: Some(Secret::new(DAEMON_TOKEN)), ..Options::default() }
}

/// A bucket that a daemon reaches through a fault proxy.
pub struct Bucket {
    pub s3: S3,
    pub proxy: FaultProxy,
}

impl Bucket {
    pub async fn new() -> Self {
        let s3 = S3::start().await.unwrap();
        s3.bucket(BUCKET).unwrap();
        let proxy = FaultProxy::start(s3.endpoint()).await.unwrap();
        Self { s3, proxy }
    }

    /// Makes the bucket the remote of a configuration.
    pub fn as_remote(&self, endpoint: &str) -> Option<RemoteConfig> {
        let environment = self.s3.env().into_iter().filter(|(name, _)| !name.contains("ENDPOINT")).collect();
        Some(RemoteConfig {
            url: format!("s3://{BUCKET}/cache"),
            options: BTreeMap::from([("endpoint".into(), endpoint.into())]),
            environment: Environment(environment),
        })
    }
}

/// A running daemon with a client.
pub struct Served {
    pub url: String,
    pub cache: Cache,
    pub client: Client,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<modelcache::Result<()>>,
}

impl Served {
    pub fn start(config: Config, options: Options) -> Self {
        let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        Self::start_on(listeners, config, options, |router| router)
    }

    /// Starts a daemon on these sockets, with a change of its router.
    pub fn start_on(
        listeners: Listeners,
        mut config: Config,
        options: Options,
        change: impl FnOnce(axum::Router) -> axum::Router,
    ) -> Self {
        complete_config(&mut config);
        let url = format!("http://{}", listeners.local_addrs().unwrap()[0]);
        let cache = Cache::open(config).unwrap();
        let daemon = Daemon::start(cache.clone(), options);
        let (stop, stopped) = oneshot::channel::<()>();
        let options = ServeOptions {
            counters: daemon.connection_counters(),
            grace: Duration::from_secs(1),
            ..ServeOptions::default()
        };
        let server = serve(listeners, change(daemon.router()), options, async { stopped.await.unwrap_or_default() });
        let client = Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
        Self { url, cache, client, stop: Some(stop), server: tokio::spawn(server) }
    }

    /// Stops the daemon and waits for its end, so that another one can use its directory.
    pub async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        timeout(SOON, &mut self.server).await.unwrap().unwrap().unwrap();
        self.cache.wait_for_fills().await;
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub async fn get(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::GET, path)).await
    }

    pub async fn head(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::HEAD, path)).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::DELETE, path)).await
    }

    /// Sends a GET with one header.
    pub async fn get_with(&self, path: &str, name: &str, value: &str) -> Reply {
        Reply::of(self.request(Method::GET, path).header(name, value)).await
    }

    /// Sends a GET with a bearer token, or without one.
    pub async fn get_as(&self, token: Option<&str>, path: &str) -> Reply {
        let request = self.request(Method::GET, path);
        Reply::of(match token {
            Some(token) => request.bearer_auth(token),
            None => request,
        })
        .await
    }

    pub async fn post(&self, body: Value) -> Reply {
        Reply::of(self.request(Method::POST, "/cache/artifacts").json(&body)).await
    }

    /// Sends bytes as they are, and returns the text of the response. Clients normalise paths, which this does not.
    pub async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.url.trim_start_matches("http://")).await.unwrap();
        // The daemon may answer and close before it has read everything.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut text = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut text)).await.expect("the connection stayed open");
        let text = String::from_utf8_lossy(&text).into_owned();
        assert_no_secret(&text);
        text
    }

    /// Sends a GET for a path as it is, and returns the status and the text of the response.
    pub async fn raw_get(&self, path: &str) -> (u16, String) {
        let text = self.raw(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).await;
        (text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0), text)
    }

    /// Returns one value of `/cache/metrics` or `/cache/stats` by JSON pointer.
    pub async fn value(&self, path: &str, pointer: &str) -> Value {
        let report = self.get(path).await.ok().json();
        report.pointer(pointer).unwrap_or_else(|| panic!("{pointer} is not in {report}")).clone()
    }

    /// Waits until no artifact is leased.
    pub async fn until_unleased(&self) {
        until(async || !self.cache.list().await.unwrap().iter().any(|artifact| artifact.leased)).await;
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// A complete response.
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    /// True if the connection was cut before the end of the body.
    pub cut: bool,
}

impl Reply {
    pub async fn of(request: RequestBuilder) -> Self {
        let response = timeout(SOON, request.send()).await.expect("no response").unwrap();
        Self::read(response).await
    }

    pub async fn read(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let (mut body, mut cut, mut chunks) = (Vec::new(), false, response.bytes_stream());
        while let Some(chunk) = timeout(SOON, chunks.next()).await.expect("the body does not end") {
            match chunk {
                Ok(chunk) => body.extend_from_slice(&chunk),
                Err(_) => cut = true,
            }
        }
        let reply = Self { status, headers, body, cut };
        assert_no_secret(&format!("{:?}", reply.headers));
        if reply.body.len() < 1 << 20 {
            assert_no_secret(&String::from_utf8_lossy(&reply.body));
        }
        reply
    }

    /// Asserts the status.
    #[track_caller]
    pub fn is(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        self
    }

    /// Asserts status 200 and a complete body.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(!self.cut, "the connection was cut: {self:?}");
        self.is(200)
    }

    /// Asserts the status, and that the error is in the form of the native routes with a hint. Returns its text.
    #[track_caller]
    pub fn refused(self, status: u16) -> String {
        let reply = self.is(status);
        let error = reply.json()["error"].clone();
        assert!(error["code"].is_string() && error["message"].is_string() && error["hint"].is_string(), "{reply:?}");
        error.to_string()
    }

    /// Asserts the status, and that the error is in the form of the Hub. Returns `X-Error-Code`.
    #[track_caller]
    pub fn hub_error(self, status: u16) -> Option<String> {
        let reply = self.is(status);
        let message = reply.json()["error"].as_str().map(str::to_owned);
        assert!(message.is_some() && reply.headers.contains_key("x-error-message"), "{reply:?}");
        reply.header("x-error-code").map(str::to_owned)
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Asserts a complete body with this content, or the part of it that `range` names.
    #[track_caller]
    pub fn has(&self, content: &Content, range: std::ops::Range<u64>) -> &Self {
        assert!(!self.cut, "the connection was cut: {self:?}");
        assert_eq!(self.header("content-length"), Some((range.end - range.start).to_string().as_str()), "{self:?}");
        assert!(self.body == content.read(range).unwrap(), "other bytes: {self:?}");
        self
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = &self.body[..self.body.len().min(600)];
        let Self { status, headers, cut, .. } = self;
        write!(f, "{status} cut={cut} {headers:#?}\n{} bytes: {}", self.body.len(), String::from_utf8_lossy(body))
    }
}

#[track_caller]
pub fn assert_no_secret(text: &str) {
    for secret in SECRETS {
        assert!(!text.contains(secret), "{secret} is in {text}");
    }
}

/// Waits until `condition` holds.
pub async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, waiting).await.expect("it does not happen");
}

/// Returns the path of a file in the Hub routes, at `main` or a commit.
pub fn file_url(repo: &str, revision: &str, file: &str) -> String {
    format!("/{repo}/resolve/{revision}/{file}")
}
