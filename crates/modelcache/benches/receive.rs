//! Compares HTTP clients that receive ranges of an object over loopback into aligned buffers.
//!
//! `cargo bench --bench receive [-- --quick]` prints a table with MB/s and the core-seconds per GB of the client:
//! medians over rounds, each of which runs every client once. The server is a separate process. Nothing is hashed or
//! written to disk, so the difference between two clients is the most that a `get` could save by changing its client.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use object_store::aws::AmazonS3Builder;
use object_store::{Certificate, ClientOptions, GetOptions, GetRange, ObjectStore, path::Path};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

/// Size of the receive buffer, as in a download.
const SLICE_BYTES: usize = 1 << 20;
/// Alignment of the receive buffer in bytes, as O_DIRECT writes require it.
const ALIGNMENT: usize = 4096;
/// Buffer size for a response head, in bytes.
const HEAD_BYTES_MAX: usize = 4096;
/// The size that the server claims for every object.
const OBJECT_BYTES: u64 = 1 << 40;

fn main() {
    let has = |wanted: &str| std::env::args().any(|argument| argument == wanted);
    if has("serve") {
        return serve();
    }
    let (bytes, rounds) = if has("--quick") { (512 << 20, 3) } else { (2 << 30, 5) };
    let mut server = Command::new(std::env::current_exe().unwrap());
    let mut server = server.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut greeting = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut greeting).unwrap();
    let [plain, encrypted, certificate] = greeting.trim().split(' ').collect::<Vec<_>>()[..] else {
        panic!("the server printed {greeting:?}")
    };
    let server_info = Arc::new(ServerInfo {
        plain: plain.parse().unwrap(),
        encrypted: encrypted.parse().unwrap(),
        certificate: hex::decode(certificate).unwrap().into(),
    });
    println!("| client | connections | range MiB | MB/s | core-s/GB |\n|---|---|---|---|---|");
    for (connections, range_bytes) in [(8, 16 << 20), (16, 8 << 20), (16, 16 << 20)] {
        let comparison = Comparison { server: server_info.clone(), connections, range_bytes, bytes };
        let mut cells: Vec<Vec<(f64, f64)>> = vec![Vec::new(); CLIENTS.len()];
        for _ in 0..rounds {
            for (client, cells) in CLIENTS.iter().zip(&mut cells) {
                cells.push(comparison.measure(*client));
            }
        }
        for (client, cells) in CLIENTS.iter().zip(cells) {
            let median = |of: fn(&(f64, f64)) -> f64| {
                let mut values: Vec<f64> = cells.iter().map(of).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            };
            let (rate, cost) = (median(|cell| cell.0), median(|cell| cell.1));
            println!("| {client:?} | {connections} | {} | {rate:.0} | {cost:.3} |", range_bytes >> 20);
        }
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

/// An HTTP client.
#[derive(Debug, Clone, Copy)]
enum Client {
    /// `object_store`, as the remote uses it.
    ObjectStore,
    /// `object_store` on a runtime with one thread.
    ObjectStoreOneThread,
    /// `reqwest`, without `object_store`.
    Reqwest,
    /// `hyper` on a connection opened by this program. The number is the maximum of its read buffer in KiB; `None`
    /// keeps the default.
    Hyper(Option<usize>),
    /// `hyper` with a read buffer of exactly this many KiB.
    HyperExact(usize),
    /// Requests written by hand to async sockets. Bodies are read directly into the aligned buffer.
    Raw,
    /// `Raw` on a runtime with one thread.
    RawOneThread,
    /// `Raw` with blocking sockets, one thread per connection.
    RawBlocking,
    /// `object_store` over TLS.
    ObjectStoreTls,
    /// `Raw` over TLS.
    RawTls,
}

const CLIENTS: &[Client] = &[
    Client::ObjectStore,
    Client::ObjectStoreOneThread,
    Client::Reqwest,
    Client::Hyper(None),
    Client::Hyper(Some(64)),
    Client::Hyper(Some(1024)),
    Client::HyperExact(128),
    Client::HyperExact(256),
    Client::HyperExact(1024),
    Client::Raw,
    Client::RawOneThread,
    Client::RawBlocking,
    Client::ObjectStoreTls,
    Client::RawTls,
];

/// The addresses and the certificate of the server.
#[derive(Debug)]
struct ServerInfo {
    plain: SocketAddr,
    encrypted: SocketAddr,
    certificate: CertificateDer<'static>,
}

impl ServerInfo {
    fn store(&self, encrypted: bool) -> impl ObjectStore {
        let endpoint = match encrypted {
            true => format!("https://localhost:{}", self.encrypted.port()),
            false => format!("http://{}", self.plain),
        };
        let certificate = Certificate::from_der(&self.certificate).unwrap();
        AmazonS3Builder::new()
            .with_client_options(ClientOptions::new().with_root_certificate(certificate).with_allow_http(!encrypted))
            .with_endpoint(endpoint)
            .with_bucket_name("bucket")
            .with_access_key_id("id")
            .with_secret_access_key("secret")
            .with_region("here")
            .build()
            .unwrap()
    }

    fn tls(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        TlsConnector::from(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()))
    }
}

/// The conditions under which the clients are compared.
#[derive(Debug, Clone)]
struct Comparison {
    server: Arc<ServerInfo>,
    connections: usize,
    range_bytes: u64,
    /// Bytes that one run receives, at most.
    bytes: u64,
}

impl Comparison {
    /// Runs a client. Returns its MB/s, and the core-seconds of this process per GB.
    fn measure(&self, client: Client) -> (f64, f64) {
        let (started, cpu) = (Instant::now(), cpu_seconds());
        let received = match client {
            Client::RawBlocking => self.run_on_threads(),
            _ => self.run_on_tasks(client),
        };
        let (wall, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        assert_eq!(received, self.bytes / self.range_bytes * self.range_bytes, "{client:?}");
        (received as f64 / wall / 1e6, cpu / (received as f64 / 1e9))
    }

    fn ranges(&self) -> Ranges {
        Ranges { next: Arc::default(), range_bytes: self.range_bytes, bytes: self.bytes }
    }

    fn run_on_tasks(&self, client: Client) -> u64 {
        let runtime = match client {
            Client::ObjectStoreOneThread | Client::RawOneThread => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = { runtime }.enable_all().build().unwrap();
        let ranges = self.ranges();
        let store = Arc::new(self.server.store(matches!(client, Client::ObjectStoreTls)));
        let web = reqwest::Client::new();
        runtime.block_on(async {
            let tasks: Vec<_> = (0..self.connections)
                .map(|_| {
                    let (ranges, store, web, server) =
                        (ranges.clone(), store.clone(), web.clone(), self.server.clone());
                    tokio::spawn(async move {
                        match client {
                            Client::Reqwest => reqwest_ranges(&web, server.plain, ranges).await,
                            Client::Hyper(kib) => hyper_ranges(server.plain, kib, None, ranges).await,
                            Client::HyperExact(kib) => hyper_ranges(server.plain, None, Some(kib), ranges).await,
                            Client::Raw | Client::RawOneThread => {
                                raw_ranges(tokio::net::TcpStream::connect(server.plain).await.unwrap(), ranges).await
                            }
                            Client::RawTls => {
                                let stream = tokio::net::TcpStream::connect(server.encrypted).await.unwrap();
                                let name = ServerName::try_from("localhost").unwrap();
                                raw_ranges(server.tls().connect(name, stream).await.unwrap(), ranges).await
                            }
                            _ => store_ranges(store.as_ref(), ranges).await,
                        }
                    })
                })
                .collect();
            let mut received = 0;
            for task in tasks {
                received += task.await.unwrap();
            }
            received
        })
    }

    fn run_on_threads(&self) -> u64 {
        let (ranges, address) = (self.ranges(), self.server.plain);
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..self.connections).map(|_| scope.spawn(|| raw_blocking(address, &ranges))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        })
    }
}

/// The ranges that remain to be requested, shared by all connections.
#[derive(Debug, Clone)]
struct Ranges {
    next: Arc<AtomicU64>,
    range_bytes: u64,
    bytes: u64,
}

impl Ranges {
    fn next(&self) -> Option<Range<u64>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let start = index * self.range_bytes;
        (start + self.range_bytes <= self.bytes).then(|| start..start + self.range_bytes)
    }
}

/// An aligned receive buffer, filled again from its start whenever it is full, as in a download.
struct Slices {
    storage: Vec<u8>,
    /// Offset of the first aligned byte.
    start: usize,
    /// Bytes in the buffer.
    filled: usize,
    /// Bytes received in total.
    received: u64,
}

impl Slices {
    fn new() -> Self {
        let storage = vec![0; SLICE_BYTES + ALIGNMENT];
        Self { start: storage.as_ptr().align_offset(ALIGNMENT), storage, filled: 0, received: 0 }
    }

    /// Copies bytes that were received into another buffer.
    fn copy(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.room();
            let take = bytes.len().min(room.len());
            room[..take].copy_from_slice(&bytes[..take]);
            self.advance(take);
            bytes = &bytes[take..];
        }
    }

    /// Returns the free space for the next bytes.
    fn room(&mut self) -> &mut [u8] {
        &mut self.storage[self.start + self.filled..self.start + SLICE_BYTES]
    }

    /// Counts bytes that were written to `room`.
    fn advance(&mut self, bytes: usize) {
        self.received += bytes as u64;
        self.filled = (self.filled + bytes) % SLICE_BYTES;
    }
}

async fn store_ranges(store: &dyn ObjectStore, ranges: Ranges) -> u64 {
    let mut slices = Slices::new();
    while let Some(range) = ranges.next() {
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let mut stream = store.get_opts(&Path::from("object"), options).await.unwrap().into_stream();
        while let Some(chunk) = stream.next().await {
            slices.copy(&chunk.unwrap());
        }
    }
    slices.received
}

async fn reqwest_ranges(client: &reqwest::Client, server: SocketAddr, ranges: Ranges) -> u64 {
    let url = format!("http://{server}/bucket/object");
    let mut slices = Slices::new();
    while let Some(range) = ranges.next() {
        let range = format!("bytes={}-{}", range.start, range.end - 1);
        let response = client.get(&url).header("range", range).send().await.unwrap();
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            slices.copy(&chunk.unwrap());
        }
    }
    slices.received
}

async fn hyper_ranges(server: SocketAddr, max_kib: Option<usize>, exact_kib: Option<usize>, ranges: Ranges) -> u64 {
    let stream = tokio::net::TcpStream::connect(server).await.unwrap();
    let mut builder = http1::Builder::new();
    if let Some(kib) = max_kib {
        builder.max_buf_size(kib << 10);
    }
    builder.read_buf_exact_size(exact_kib.map(|kib| kib << 10));
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut slices = Slices::new();
    while let Some(range) = ranges.next() {
        let request = http::Request::get("/bucket/object")
            .header("host", server.to_string())
            .header("range", format!("bytes={}-{}", range.start, range.end - 1))
            .body(Empty::<Bytes>::new());
        sender.ready().await.unwrap();
        let mut body = sender.send_request(request.unwrap()).await.unwrap().into_body();
        while let Some(frame) = body.frame().await {
            slices.copy(frame.unwrap().data_ref().unwrap());
        }
    }
    drop(sender);
    let _ = connection.await;
    slices.received
}

async fn raw_ranges(mut stream: impl AsyncRead + AsyncWrite + Unpin, ranges: Ranges) -> u64 {
    let mut slices = Slices::new();
    let mut head = vec![0; HEAD_BYTES_MAX];
    while let Some(range) = ranges.next() {
        stream.write_all(request(&range).as_bytes()).await.unwrap();
        let mut have = 0;
        let body_at = loop {
            have += stream.read(&mut head[have..]).await.unwrap();
            if let Some(at) = end_of_head(&head[..have]) {
                break at;
            }
        };
        slices.copy(&head[body_at..have]);
        let mut left = (range.end - range.start) as usize - (have - body_at);
        while left > 0 {
            let room = slices.room();
            let want = room.len().min(left);
            let read = stream.read(&mut room[..want]).await.unwrap();
            assert!(read > 0, "the server closed the connection early");
            slices.advance(read);
            left -= read;
        }
    }
    slices.received
}

fn raw_blocking(server: SocketAddr, ranges: &Ranges) -> u64 {
    let mut stream = TcpStream::connect(server).unwrap();
    let mut slices = Slices::new();
    let mut head = vec![0; HEAD_BYTES_MAX];
    while let Some(range) = ranges.next() {
        stream.write_all(request(&range).as_bytes()).unwrap();
        let mut have = 0;
        let body_at = loop {
            have += stream.read(&mut head[have..]).unwrap();
            if let Some(at) = end_of_head(&head[..have]) {
                break at;
            }
        };
        slices.copy(&head[body_at..have]);
        let mut left = (range.end - range.start) as usize - (have - body_at);
        while left > 0 {
            let room = slices.room();
            let want = room.len().min(left);
            let read = stream.read(&mut room[..want]).unwrap();
            assert!(read > 0, "the server closed the connection early");
            slices.advance(read);
            left -= read;
        }
    }
    slices.received
}

fn request(range: &Range<u64>) -> String {
    let Range { start, end } = range;
    format!("GET /bucket/object HTTP/1.1\r\nhost: localhost\r\nrange: bytes={start}-{}\r\n\r\n", end - 1)
}

/// Returns the offset of the body, if the bytes contain the end of the head.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// Returns the user and system seconds of this process, including threads that have ended (`proc(5)`, fields 14 and 15
/// of `stat`, in ticks of 1/100 s).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

/// Runs the server: responds to any GET with the range that it requests. Exits when standard input is closed.
fn serve() {
    let [plain, encrypted] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let tls = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![cert.der().clone()], key).unwrap();
    let tls = Arc::new(tls);
    let addresses = [plain.local_addr().unwrap(), encrypted.local_addr().unwrap()];
    println!("{} {} {}", addresses[0], addresses[1], hex::encode(cert.der()));
    let content: Arc<[u8]> = (0..16u32 << 20).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
    let accept = move |listener: TcpListener, tls: Option<Arc<ServerConfig>>, content: Arc<[u8]>| {
        for stream in listener.incoming() {
            let (stream, tls, content) = (stream.unwrap(), tls.clone(), content.clone());
            stream.set_nodelay(true).unwrap();
            std::thread::spawn(move || match tls {
                Some(tls) => serve_connection(StreamOwned::new(ServerConnection::new(tls).unwrap(), stream), &content),
                None => serve_connection(stream, &content),
            });
        }
    };
    let (accept_encrypted, encrypted_content) = (accept, content.clone());
    std::thread::spawn(move || accept_encrypted(encrypted, Some(tls), encrypted_content));
    std::thread::spawn(move || accept(plain, None, content));
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// Responds to the requests of one connection. Returns `None` when the client closes it.
fn serve_connection(stream: impl Read + Write, content: &[u8]) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut range = None;
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some((start, last)) = line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-')) {
                range = Some(start.parse::<u64>().ok()?..last.parse::<u64>().ok()? + 1);
            }
        }
        let Range { start, end } = range?;
        let mut left = usize::try_from(end - start).ok()?;
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-length: {left}\r\ncontent-range: bytes \
             {start}-{}/{OBJECT_BYTES}\r\netag: \"one\"\r\nlast-modified: Wed, 25 Nov 2026 00:00:00 GMT\r\n\r\n",
            end - 1
        );
        stream.get_mut().write_all(head.as_bytes()).ok()?;
        while left > 0 {
            let now = left.min(content.len());
            stream.get_mut().write_all(&content[..now]).ok()?;
            left -= now;
        }
        stream.get_mut().flush().ok()?;
    }
}
