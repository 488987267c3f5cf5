//! Listening sockets, limits on connections, shutdown, TLS and systemd.
#![allow(clippy::print_stdout, reason = "child processes of the tests report there")]

use std::convert::Infallible;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::ConnectInfo;
use axum::routing::{get, post};
use axum::{Extension, Router};
use futures::stream;
use modelcache::ErrorKind;
use modelcache_server::{
    ConnectionCounters, ConnectionLimits, Listeners, Notifier, Scheme, ServeOptions, TlsFiles, serve, watchdog_time,
};
use rcgen::{CertificateParams, CertifiedKey, KeyPair};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

const MILLISECOND: Duration = Duration::from_millis(1);
/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);
const GET: &str = "GET /ok HTTP/1.1\r\nHost: x\r\n\r\n";

fn router() -> Router {
    let chunk = Bytes::from(vec![b'x'; 64 << 10]);
    Router::new()
        .route("/ok", get(|| async { "ok" }))
        .route(
            "/who",
            get(|ConnectInfo(peer): ConnectInfo<SocketAddr>, Extension(scheme): Extension<Scheme>| async move {
                format!("{peer} {}", scheme.as_str())
            }),
        )
        .route("/length", post(|body: Bytes| async move { body.len().to_string() }))
        .route(
            "/endless",
            get(|| async { Body::from_stream(stream::repeat_with(move || Ok::<_, Infallible>(chunk.clone()))) }),
        )
        .route(
            "/late",
            get(|| async {
                sleep(800 * MILLISECOND).await;
                "late"
            }),
        )
        .route("/waits", get(|| async { waiting_body(800 * MILLISECOND, 2) }))
        .route("/waits-long", get(|| async { waiting_body(2500 * MILLISECOND, 1) }))
}

/// Returns a body of some parts. The daemon waits for the origin before each of them, and before the end.
fn waiting_body(wait: Duration, parts: usize) -> Body {
    Body::from_stream(stream::unfold(0, move |at| async move {
        sleep(wait).await;
        (at < parts).then_some((Ok::<_, Infallible>("part"), at + 1))
    }))
}

/// A running server.
struct Running {
    address: SocketAddr,
    counters: Arc<ConnectionCounters>,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<modelcache::Result<()>>,
}

impl Running {
    fn start(options: ServeOptions) -> Self {
        let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        let address = listeners.local_addrs().unwrap()[0];
        let counters = Arc::clone(&options.counters);
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(serve(listeners, router(), options, async { stopped.await.unwrap_or_default() }));
        Self { address, counters, stop: Some(stop), server }
    }

    fn limited(change: impl FnOnce(&mut ConnectionLimits)) -> Self {
        let mut options = ServeOptions::default();
        change(&mut options.limits);
        Self::start(options)
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Connects and sends `bytes`.
    async fn send(&self, bytes: impl AsRef<[u8]>) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(bytes.as_ref()).await.unwrap();
        stream
    }

    fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits until `condition` holds.
    async fn until(&self, condition: impl Fn(&ConnectionCounters) -> bool) {
        let waiting = async {
            while !condition(&self.counters) {
                sleep(10 * MILLISECOND).await;
            }
        };
        assert!(timeout(LONG, waiting).await.is_ok(), "{:?}", self.counters);
    }
}

/// Reads the head of a response.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(LONG, stream.read_u8()).await.unwrap().unwrap());
    }
    String::from_utf8(head).unwrap().to_ascii_lowercase()
}

/// Reads one response with a `Content-Length`, and returns its head and body.
async fn response(stream: &mut (impl AsyncRead + Unpin)) -> (String, String) {
    let head = head(stream).await;
    let length = head.split("content-length: ").nth(1).map_or(0, |rest| rest.lines().next().unwrap().parse().unwrap());
    let mut body = vec![0; length];
    timeout(LONG, stream.read_exact(&mut body)).await.unwrap().unwrap();
    (head, String::from_utf8(body).unwrap())
}

/// Reads until the server closes the connection. Returns the text, and how long it took.
async fn closed(stream: &mut (impl AsyncRead + Unpin)) -> (String, Duration) {
    let (started, mut bytes) = (Instant::now(), Vec::new());
    // A reset is also an end.
    let _ = timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("the connection stayed open");
    (String::from_utf8_lossy(&bytes).into_owned(), started.elapsed())
}

async fn exchange(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).await.unwrap();
    response(stream).await
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_find_the_address_of_the_client_and_the_scheme() {
    let server = Running::limited(|_| {});
    let mut stream = server.connect().await;
    let (_, body) = exchange(&mut stream, "GET /who HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(body, format!("{} http", stream.local_addr().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ipv4_client_of_an_ipv6_socket_is_seen_as_ipv4() {
    let listeners = Listeners::bind(&["[::]:0".parse().unwrap()]).unwrap();
    let port = listeners.local_addrs().unwrap()[0].port();
    tokio::spawn(serve(listeners, router(), ServeOptions::default(), std::future::pending()));
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let (_, body) = exchange(&mut stream, "GET /who HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(body, format!("{} http", stream.local_addr().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_head_that_arrives_a_byte_at_a_time_ends_the_connection_in_time() {
    let server = Running::limited(|limits| limits.head_timeout = 600 * MILLISECOND);
    let (mut reader, mut writer) = server.connect().await.into_split();
    let drip = tokio::spawn(async move {
        for byte in GET.bytes().chain(std::iter::repeat(b'x')) {
            if writer.write_u8(byte).await.is_err() {
                return;
            }
            sleep(100 * MILLISECOND).await;
        }
    });
    let (text, time) = closed(&mut reader).await;
    assert_eq!(text, "");
    assert!((500 * MILLISECOND..3000 * MILLISECOND).contains(&time), "{time:?}");
    assert_eq!(server.counters.head_timeouts(), 1);
    drip.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_ends_after_the_time_for_a_request_head() {
    let server = Running::limited(|limits| limits.head_timeout = 500 * MILLISECOND);
    let (_, time) = closed(&mut server.connect().await).await;
    assert!((400 * MILLISECOND..3000 * MILLISECOND).contains(&time), "{time:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_alive_connection_has_the_idle_time_and_a_started_head_its_own() {
    let server = Running::limited(|limits| {
        (limits.head_timeout, limits.idle_timeout) = (400 * MILLISECOND, 1500 * MILLISECOND);
    });
    let mut stream = server.connect().await;
    for _ in 0..2 {
        assert_eq!(exchange(&mut stream, GET).await.1, "ok");
        sleep(800 * MILLISECOND).await;
    }
    let (_, time) = closed(&mut stream).await;
    assert!(time < 3000 * MILLISECOND, "{time:?}");
    assert_eq!((server.counters.idle_timeouts(), server.counters.head_timeouts()), (1, 0));

    let mut stream = server.connect().await;
    assert_eq!(exchange(&mut stream, GET).await.1, "ok");
    stream.write_all(b"GET /o").await.unwrap();
    let (_, time) = closed(&mut stream).await;
    assert!(time < 1300 * MILLISECOND, "{time:?}");
    assert_eq!(server.counters.head_timeouts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_head_that_is_too_large_is_answered_with_431() {
    let server = Running::limited(|_| {});
    let long = format!("GET /ok HTTP/1.1\r\nHost: x\r\nCookie: {}\r\n\r\n", "c".repeat(2 << 20));
    let many = format!("GET /ok HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(100));
    for head in [long, many] {
        let (mut reader, mut writer) = server.connect().await.into_split();
        let send = tokio::spawn(async move { writer.write_all(head.as_bytes()).await });
        let (text, _) = closed(&mut reader).await;
        assert!(text.starts_with("HTTP/1.1 431 "), "{text:?}");
        let _ = send.await.unwrap();
    }
    let fits = format!("GET /ok HTTP/1.1\r\nHost: x\r\nCookie: {}\r\n\r\n", "c".repeat(30 << 10));
    assert_eq!(response(&mut server.send(fits).await).await.1, "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_body_that_is_too_large_is_answered_with_413_that_the_client_receives() {
    let server = Running::limited(|limits| limits.body_bytes = 100_000);
    let length = |length: usize| format!("POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    let chunked = "POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let accepted = length(100_000) + &"b".repeat(100_000);
    assert_eq!(response(&mut server.send(accepted).await).await.1, "100000");
    for head in [length(2_000_000), format!("{chunked}1e8480\r\n")] {
        let mut stream = server.send(head + &"b".repeat(1_000_000)).await;
        // The client sends everything before it reads. Its second half meets a connection that has been answered.
        for _ in 0..10 {
            sleep(30 * MILLISECOND).await;
            stream.write_all(&[b'b'; 100_000]).await.unwrap();
        }
        let (head, body) = response(&mut stream).await;
        assert!(head.starts_with("http/1.1 413 ") && head.contains("connection: close"), "{head}");
        assert!(body.contains("too large"), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_body_that_arrives_too_slowly_is_answered_with_408() {
    let server = Running::limited(|limits| (limits.body_start, limits.body_rate_min) = (300 * MILLISECOND, 1000));
    // Half a second more for 500 bytes.
    for (sent, time) in [(0, 300 * MILLISECOND), (500, 800 * MILLISECOND)] {
        let started = Instant::now();
        let head = "POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n";
        let mut stream = server.send(format!("{head}{}", "b".repeat(sent))).await;
        let (head, _) = response(&mut stream).await;
        assert!(head.starts_with("http/1.1 408 "), "{head}");
        assert!((time..time + 2000 * MILLISECOND).contains(&started.elapsed()), "{:?}", started.elapsed());
    }
    assert_eq!(server.counters.body_timeouts(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_loses_its_connection_and_one_that_waits_for_the_daemon_does_not() {
    let server = Running::limited(|limits| limits.send_timeout = 2000 * MILLISECOND);
    let stuck = server.send("GET /endless HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let mut waits = server.send("GET /waits-long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    // A client at an even pace.
    let mut reads = server.send("GET /endless HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let mut buffer = vec![0; 4 << 20];
    for _ in 0..25 {
        timeout(LONG, reads.read_exact(&mut buffer)).await.unwrap().unwrap();
        sleep(100 * MILLISECOND).await;
    }
    server.until(|counters| counters.send_timeouts() == 1).await;
    timeout(LONG, reads.read_exact(&mut buffer)).await.unwrap().unwrap();
    drop(reads);
    assert!(closed(&mut waits).await.0.contains("part"));
    // A client that goes away ends its response.
    server.until(|counters| counters.open() == 0).await;
    drop(stuck);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_slow_connections_do_not_stop_a_normal_client() {
    let open_files = getrlimit(Resource::Nofile).current.unwrap_or(1 << 16);
    // Both ends of a connection are in this process.
    let slow_clients = 10_000.min((open_files.saturating_sub(200) / 2) as usize);
    let server = Running::limited(|limits| {
        (limits.connections, limits.connections_per_address) = (slow_clients / 4, slow_clients);
    });
    let mut kept = server.connect().await;
    assert_eq!(exchange(&mut kept, GET).await.1, "ok");
    let (mut slow, mut slowest) = (Vec::new(), Duration::ZERO);
    for number in 0..slow_clients {
        // Some say nothing, some begin a request.
        slow.push(server.send(&GET[..number % 20]).await);
        if number % 100 == 0 {
            let started = Instant::now();
            assert_eq!(response(&mut server.send(GET).await).await.1, "ok");
            assert_eq!(exchange(&mut kept, GET).await.1, "ok", "an established client is kept");
            slowest = slowest.max(started.elapsed());
        }
    }
    println!("{slow_clients} slow connections; slowest exchange of a normal client: {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    assert!(server.counters.evicted() >= (slow_clients / 2) as u64, "{:?}", server.counters);
    assert_eq!(server.counters.refused(), 0);
    assert!(server.counters.open() <= (slow_clients / 4) as u64, "{:?}", server.counters);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_beyond_the_limit_is_refused_with_503_while_all_others_run_requests() {
    for change in [(|limits: &mut ConnectionLimits| limits.connections = 1) as fn(&mut ConnectionLimits), |limits| {
        limits.connections_per_address = 1
    }] {
        let server = Running::limited(change);
        let mut busy = server.send("GET /waits HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        head(&mut busy).await;
        let (text, _) = closed(&mut server.connect().await).await;
        assert!(text.starts_with("HTTP/1.1 503 ") && text.contains("too many connections"), "{text:?}");
        assert!(closed(&mut busy).await.0.contains("part"));
        server.until(|counters| counters.open() == 0).await;
        assert_eq!(response(&mut server.send(GET).await).await.1, "ok");
        assert_eq!(server.counters.refused(), 1);
    }
}

#[tokio::test]
async fn a_taken_port_is_an_error_that_names_the_address_and_the_remedy() {
    let first = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let address = first.local_addrs().unwrap()[0];
    assert_ne!(address.port(), 0);
    let error = Listeners::bind(&[address]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Other);
    assert_eq!(error.to_string().split(": ").next().unwrap(), format!("cannot listen on {address}"));
    let hint = error.hint_text().unwrap();
    assert!(hint.contains("ss -ltnp") && hint.contains("MODEL_CACHE_LISTEN"), "{hint}");

    let error = Listeners::bind(&["192.0.2.1:0".parse().unwrap()]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("no interface of this machine has the address"), "{error}");
    assert_eq!(Listeners::bind(&[]).unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_address_families_can_be_bound_to_one_port() {
    let free = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let port = free.local_addrs().unwrap()[0].port();
    drop(free);
    let addresses = [SocketAddr::from(([0, 0, 0, 0], port)), SocketAddr::from(([0; 8], port))];
    let listeners = Listeners::bind(&addresses).unwrap();
    assert_eq!(listeners.local_addrs().unwrap(), addresses);
    tokio::spawn(serve(listeners, router(), ServeOptions::default(), std::future::pending()));
    for host in ["127.0.0.1", "::1"] {
        assert_eq!(exchange(&mut TcpStream::connect((host, port)).await.unwrap(), GET).await.1, "ok");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_waits_for_a_running_response_and_closes_all_other_connections() {
    let mut server = Running::limited(|_| {});
    let mut silent = server.connect().await;
    let mut idle = server.send(GET).await;
    response(&mut idle).await;
    let mut late = server.send("GET /late HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let mut busy = server.send("GET /waits HTTP/1.1\r\nHost: x\r\n\r\n").await;
    head(&mut busy).await;
    sleep(200 * MILLISECOND).await;
    server.stop();
    let started = Instant::now();
    closed(&mut silent).await;
    closed(&mut idle).await;
    assert!(started.elapsed() < 500 * MILLISECOND, "{:?}", started.elapsed());
    assert!(TcpStream::connect(server.address).await.is_err(), "no new connections");
    let (text, _) = closed(&mut busy).await;
    assert_eq!(text.matches("part").count(), 2, "{text}");
    let (text, _) = closed(&mut late).await;
    assert!(text.ends_with("late") && text.contains("connection: close"), "{text}");
    timeout(LONG, server.server).await.unwrap().unwrap().unwrap();
    assert_eq!(server.counters.open(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_cuts_responses_that_outlast_the_grace_time() {
    let mut server = Running::start(ServeOptions { grace: 400 * MILLISECOND, ..ServeOptions::default() });
    let mut endless = server.send("GET /endless HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let reads = tokio::spawn(async move { tokio::io::copy(&mut endless, &mut tokio::io::sink()).await });
    sleep(200 * MILLISECOND).await;
    server.stop();
    let started = Instant::now();
    timeout(LONG, server.server).await.unwrap().unwrap().unwrap();
    assert!((300 * MILLISECOND..3000 * MILLISECOND).contains(&started.elapsed()), "{:?}", started.elapsed());
    // The chunked body has no end.
    let _ = timeout(LONG, reads).await.unwrap();
    assert_eq!(server.counters.open(), 0);
}

fn certificate() -> CertifiedKey<KeyPair> {
    rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap()
}

fn write_pem(folder: &Path, CertifiedKey { cert, signing_key }: &CertifiedKey<KeyPair>) {
    std::fs::write(folder.join("tls.crt"), cert.pem()).unwrap();
    std::fs::write(folder.join("tls.key"), signing_key.serialize_pem()).unwrap();
}

fn tls_files(folder: &Path) -> TlsFiles {
    TlsFiles { certificate: folder.join("tls.crt"), key: folder.join("tls.key") }
}

/// Requests `/who` over TLS, trusting only `certificate`.
async fn get_tls(address: SocketAddr, certificate: &CertificateDer<'static>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    Ok(exchange(&mut stream, "GET /who HTTP/1.1\r\nHost: x\r\n\r\n").await.1)
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_files_are_reloaded_when_they_change_and_kept_when_the_new_ones_are_broken() {
    // As in a Kubernetes secret, the files are links into a folder that is itself a link, which is replaced.
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let switch_to = |version: &str| {
        std::os::unix::fs::symlink(version, folder.join("..new")).unwrap();
        std::fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
    };
    let certificates = [certificate(), certificate(), certificate()];
    for (number, certificate) in certificates.iter().enumerate() {
        let version = folder.join(number.to_string());
        std::fs::create_dir(&version).unwrap();
        write_pem(&version, certificate);
    }
    std::fs::write(folder.join("2/tls.crt"), "broken").unwrap();
    switch_to("0");
    for name in ["tls.crt", "tls.key"] {
        std::os::unix::fs::symlink(format!("..data/{name}"), folder.join(name)).unwrap();
    }
    let tls = Some(tls_files(folder));
    let server = Running::start(ServeOptions { tls, tls_check_interval: 50 * MILLISECOND, ..ServeOptions::default() });
    let [first, second, third] = certificates.each_ref().map(|certificate| certificate.cert.der());
    assert!(get_tls(server.address, first).await.unwrap().ends_with(" https"));
    get_tls(server.address, second).await.unwrap_err();
    server.until(|counters| counters.handshake_failures() == 1).await;

    switch_to("1");
    sleep(500 * MILLISECOND).await;
    get_tls(server.address, second).await.unwrap();
    get_tls(server.address, first).await.unwrap_err();

    switch_to("2");
    sleep(500 * MILLISECOND).await;
    get_tls(server.address, second).await.unwrap();
    write_pem(&folder.join("2"), &certificates[2]);
    sleep(500 * MILLISECOND).await;
    get_tls(server.address, third).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_handshake_that_does_not_begin_ends_the_connection_in_time() {
    let folder = tempfile::tempdir().unwrap();
    write_pem(folder.path(), &certificate());
    let mut options = ServeOptions { tls: Some(tls_files(folder.path())), ..ServeOptions::default() };
    options.limits.handshake_timeout = 400 * MILLISECOND;
    let server = Running::start(options);
    let (_, time) = closed(&mut server.connect().await).await;
    assert!((300 * MILLISECOND..3000 * MILLISECOND).contains(&time), "{time:?}");
    assert_eq!(server.counters.handshake_failures(), 1);
}

#[tokio::test]
async fn tls_files_that_cannot_be_used_are_errors_that_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let good = certificate();
    let dated = |from, to| {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (rcgen::date_time_ymd(from, 1, 1), rcgen::date_time_ymd(to, 1, 1));
        let signing_key = KeyPair::generate().unwrap();
        CertifiedKey { cert: params.self_signed(&signing_key).unwrap(), signing_key }
    };
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    let (cert, key) = (good.cert.pem(), good.signing_key.serialize_pem());
    let (expired, future) = (dated(2020, 2021), dated(2999, 3000));
    let cases = [
        (cert.clone(), other_key, "does not belong to the certificate"),
        (expired.cert.pem(), expired.signing_key.serialize_pem(), "has expired"),
        (future.cert.pem(), future.signing_key.serialize_pem(), "is not valid yet"),
        (key.clone(), cert.clone(), "has no PEM block CERTIFICATE"),
        (cert.clone(), cert.clone(), "has no PEM block of a private key"),
        (cert.clone(), String::new(), "has no PEM block of a private key"),
        (cert.replace("MII", "AAA"), key, "cannot be parsed"),
    ];
    for (cert, key, problem) in cases {
        std::fs::write(folder.join("tls.crt"), cert).unwrap();
        std::fs::write(folder.join("tls.key"), key).unwrap();
        let error = tls_files(folder).check().unwrap_err();
        assert!(error.to_string().contains(problem), "{error}: not `{problem}`");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.hint_text().is_some(), "{error}");
        let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        let options = ServeOptions { tls: Some(tls_files(folder)), ..ServeOptions::default() };
        serve(listeners, router(), options, std::future::pending()).await.unwrap_err();
    }
    write_pem(folder, &good);
    tls_files(folder).check().unwrap();
    std::fs::remove_file(folder.join("tls.key")).unwrap();
    let error = tls_files(folder).check().unwrap_err();
    assert!(error.to_string().contains("cannot read the TLS key"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_that_the_daemon_is_ready_alive_and_stopping() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let manager = tokio::net::UnixDatagram::bind(&path).unwrap();
    let next = || async {
        let mut message = [0; 100];
        let length = timeout(LONG, manager.recv(&mut message)).await.unwrap().unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    };
    let watchdog = watchdog_time(Some("400000"), Some(&std::process::id().to_string()));
    let notifier = Notifier::new(Some(path.as_os_str()), watchdog).unwrap();
    let mut server = Running::start(ServeOptions { notifier: notifier.clone(), ..ServeOptions::default() });
    assert_eq!(next().await, "READY=1");
    let started = Instant::now();
    for _ in 0..3 {
        assert_eq!(next().await, "WATCHDOG=1");
    }
    assert!((500 * MILLISECOND..2000 * MILLISECOND).contains(&started.elapsed()), "{:?}", started.elapsed());
    notifier.status("3 artifacts\nREADY=0");
    let status = loop {
        let message = next().await;
        if message != "WATCHDOG=1" {
            break message;
        }
    };
    assert_eq!(status, "STATUS=3 artifacts READY=0");
    let mut busy = server.send("GET /waits HTTP/1.1\r\nHost: x\r\n\r\n").await;
    head(&mut busy).await;
    server.stop();
    while next().await != "STOPPING=1" {}
    assert_eq!(next().await, "WATCHDOG=1", "also while requests finish");
    closed(&mut busy).await;
    server.server.await.unwrap().unwrap();
}

#[test]
fn without_the_variables_of_systemd_nothing_is_sent() {
    Notifier::new(None, None).unwrap().status("text");
    assert_eq!(watchdog_time(None, None), None);
    assert_eq!(watchdog_time(Some("1000"), Some("1")), None, "meant for another process");
    assert_eq!(watchdog_time(Some("1000"), None), Some(MILLISECOND));
    assert_eq!(watchdog_time(Some("0"), None), None);
    assert_eq!(Notifier::new(Some("a\0b".as_ref()), None).unwrap_err().kind(), ErrorKind::Invalid);
}

#[cfg(target_os = "linux")]
#[test]
fn a_notify_socket_may_have_an_abstract_name() {
    use std::os::linux::net::SocketAddrExt as _;
    let name = format!("modelcache-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let manager = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
    Notifier::new(Some(format!("@{name}").as_ref()), None).unwrap().status("up");
    let mut message = [0; 20];
    let length = manager.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"STATUS=up");
}

/// Runs one of the ignored tests below in a process of its own. It ends with the returned value.
struct ChildTest(Child);

impl ChildTest {
    /// The descriptors 3 and on are `passed`, as systemd passes them.
    fn start(name: &str, passed: Option<OwnedFd>) -> Self {
        let mut command = Command::new("sh");
        let redirect = if passed.is_some() { "3<&0" } else { "" };
        let script = format!(r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" --exact "$1" --ignored --nocapture {redirect}"#);
        command.args(["-c", &script]).arg(std::env::current_exe().unwrap()).arg(format!("listen::{name}"));
        command.stdin(passed.map_or(Stdio::null(), Stdio::from)).stdout(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    /// Waits for a line of the child that begins with `start`, and returns the rest.
    fn line(&mut self, start: &str) -> String {
        let mut lines = BufReader::new(self.0.stdout.take().unwrap()).lines().map(Result::unwrap);
        lines.find_map(|line| Some(line.split_once(start)?.1.to_owned())).unwrap()
    }
}

impl Drop for ChildTest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_systemd_passes_is_served() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    // Connects before the daemon runs, as with socket activation.
    let mut early = TcpStream::connect(address).await.unwrap();
    let mut child = ChildTest::start("serve_the_socket_of_systemd", Some(socket.into()));
    assert_eq!(exchange(&mut early, GET).await.1, "ok");
    assert_eq!(child.line("listening on "), address.to_string());
}

#[test]
fn a_descriptor_from_systemd_that_is_not_a_listening_tcp_socket_is_an_error() {
    let (unix, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for passed in [OwnedFd::from(unix), file.into(), udp.into()] {
        let mut child = ChildTest::start("serve_the_socket_of_systemd", Some(passed));
        assert!(child.line("error: ").contains("from systemd"));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by other tests as a child process"]
async fn serve_the_socket_of_systemd() {
    match Listeners::from_systemd() {
        Ok(listeners) => {
            let listeners = listeners.unwrap();
            assert_eq!(Listeners::from_systemd().unwrap_err().kind(), ErrorKind::Other, "only once");
            println!("\nlistening on {}", listeners.local_addrs().unwrap()[0]);
            serve(listeners, router(), ServeOptions::default(), sleep(LONG)).await.unwrap();
        }
        Err(error) => println!("\nerror: {error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_free_descriptors_serves_new_clients_and_does_not_spin() {
    let mut child = ChildTest::start("serve_with_few_descriptors", None);
    let address = child.line("listening on ");
    let mut slow = Vec::new();
    for _ in 0..12 {
        slow.push(TcpStream::connect(&address).await.unwrap());
        sleep(20 * MILLISECOND).await;
    }
    let mut client = TcpStream::connect(&address).await.unwrap();
    let (_, errors) = exchange(&mut client, "GET /errors HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let errors: u64 = errors.parse().unwrap();
    // Each of the 13 connections finds no descriptor once or twice; a loop without a pause fails thousands of times.
    assert!((1..60).contains(&errors), "{errors} errors");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by another test as a child process"]
async fn serve_with_few_descriptors() {
    let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let address = listeners.local_addrs().unwrap()[0];
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: Some(64) }).unwrap();
    let mut files: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    files.truncate(files.len() - 4);
    let options = ServeOptions::default();
    let counters = Arc::clone(&options.counters);
    let router = router().route("/errors", get(|| async move { counters.accept_errors().to_string() }));
    println!("\nlistening on {address}");
    serve(listeners, router, options, sleep(LONG)).await.unwrap();
}
