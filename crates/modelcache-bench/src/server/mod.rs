//! `cargo xtask bench-server`: an S3 server with little overhead, in a separate process.
//!
//! Serves a folder with S3 and with plain range requests on one address: `sendfile(2)` from tmpfs or the page cache,
//! one thread per connection, no signature checks. Bodies of uploads are counted and discarded, except small ones,
//! which become files. An object whose body was discarded cannot be read. To publish a version through the server, the
//! bench therefore uploads it and then places the uploaded files at the paths of the discarded objects. Each object
//! keeps the ETag of its upload. Traffic can be shaped (time to the first byte, and rate of each connection), and TLS
//! can be used.
//!
//! The server reads commands from standard input, one word per line (`stats`, `reset`). It exits when standard input is
//! closed, so that a bench that dies leaves no server behind. A measured program gets the counts with
//! `GET /?bench-stats`.

mod date;
mod objects;
mod request;
mod s3;
mod wire;

use self::objects::Objects;
use self::request::Request;
use self::wire::Wire;
use super::usage::own_core_seconds;
use anyhow::{Context, Result};
use clap::Args;
use modelcache_testkit::Authority;
use std::io::{BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

/// Responses of at least this many bytes count as transfers. The highest number of concurrent transfers is reported.
const TRANSFER_BYTES: u64 = 64 * 1024;

/// Serve a folder to a bench
#[derive(Debug, Args)]
pub(crate) struct ServerArguments {
    /// The folder; a bucket is a folder in it
    #[arg(long)]
    folder: PathBuf,
    /// Use TLS, and write the certificate of its certificate authority to this file
    #[arg(long)]
    tls_ca_file: Option<PathBuf>,
    /// Time to the first byte of a response, in milliseconds
    #[arg(long, default_value_t = 0)]
    first_byte_ms: u64,
    /// Bytes per second on each connection; 0 is unlimited
    #[arg(long, default_value_t = 0)]
    bytes_per_s: u64,
}

/// Maximum number of bytes sent by one call of `sendfile(2)`.
const STEP_BYTES: u64 = 8 << 20;

/// State shared by all connections.
pub(super) struct Shared {
    objects: Objects,
    shaping: Shaping,
    tls: Option<Arc<ServerConfig>>,
    counts: Counts,
}

/// Traffic shaping.
#[derive(Clone, Copy)]
pub(super) struct Shaping {
    first_byte: Duration,
    bytes_per_s: u64,
}

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    active_transfers: AtomicU64,
    /// Highest value of `active_transfers`; each connection carries at most one.
    busy_connections_max: AtomicU64,
}

impl ServerArguments {
    pub(crate) fn run(&self) -> Result<()> {
        let tls = match &self.tls_ca_file {
            None => None,
            Some(path) => {
                let authority = Authority::new()?;
                authority.write_to(path)?;
                Some(authority.server(&["localhost", "127.0.0.1"])?)
            }
        };
        let shaping = Shaping { first_byte: Duration::from_millis(self.first_byte_ms), bytes_per_s: self.bytes_per_s };
        let objects = Objects::new(self.folder.clone());
        let shared = Arc::new(Shared { objects, shaping, tls, counts: Counts::default() });
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on loopback")?;
        // The parent process reads the address from the first line.
        reply(&listener.local_addr()?.to_string())?;
        let serving = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = serving.clone();
                // The error is that the client disconnected, which is expected.
                std::thread::spawn(move || drop(shared.serve_connection(stream)));
            }
        });
        for line in std::io::stdin().lines() {
            match line?.as_str() {
                "stats" => reply(&shared.counts.to_json())?,
                _ => {
                    shared.counts.reset();
                    reply("done")?;
                }
            }
        }
        Ok(())
    }
}

/// Formats the day of a time, as `2000-02-29`.
pub(super) fn day(time: std::time::SystemTime) -> String {
    date::day(time)
}

/// Prints a line and flushes it, for the process that reads it.
pub(super) fn reply(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

impl Counts {
    fn to_json(&self) -> String {
        let number = |count: &AtomicU64| count.load(Ordering::SeqCst);
        serde_json::json!({
            "requests": number(&self.requests),
            "bytes_sent": number(&self.bytes_sent),
            "bytes_received": number(&self.bytes_received),
            "busy_connections_max": number(&self.busy_connections_max),
            "core_seconds": own_core_seconds(),
        })
        .to_string()
    }

    fn reset(&self) {
        for count in [&self.requests, &self.bytes_sent, &self.bytes_received, &self.busy_connections_max] {
            count.store(0, Ordering::SeqCst);
        }
    }
}

impl Shared {
    /// Answers the requests of one connection in turn, until the client closes it.
    fn serve_connection(&self, stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        if self.shaping.bytes_per_s > 0 {
            wire::pace(&stream, self.shaping.bytes_per_s)?;
        }
        let wire = match &self.tls {
            None => Wire::Plain(stream),
            Some(config) => Wire::Tls(Box::new(StreamOwned::new(ServerConnection::new(config.clone())?, stream))),
        };
        let mut wire = BufReader::with_capacity(64 * 1024, wire);
        while let Some(request) = Request::read(&mut wire)? {
            self.counts.requests.fetch_add(1, Ordering::SeqCst);
            let keep = !request.wants_close();
            self.respond(&mut wire, request)?;
            if !keep {
                break;
            }
        }
        Ok(())
    }

    /// Sends a head, and `size` bytes of an open file from offset `at` as the body.
    fn send_file(
        &self,
        wire: &mut BufReader<Wire>,
        head: &str,
        file: &std::fs::File,
        at: u64,
        size: u64,
    ) -> Result<()> {
        std::thread::sleep(self.shaping.first_byte);
        let transfer = size >= TRANSFER_BYTES;
        if transfer {
            let active = self.counts.active_transfers.fetch_add(1, Ordering::SeqCst) + 1;
            self.counts.busy_connections_max.fetch_max(active, Ordering::SeqCst);
        }
        let sent = self.send_body(wire.get_mut(), head, file, at, size);
        if transfer {
            self.counts.active_transfers.fetch_sub(1, Ordering::SeqCst);
        }
        sent
    }

    fn send_body(&self, wire: &mut Wire, head: &str, file: &std::fs::File, at: u64, size: u64) -> Result<()> {
        wire.write_all(head.as_bytes())?;
        let mut sent = 0;
        while sent < size {
            let now = wire.send_file(file, at + sent, STEP_BYTES.min(size - sent))?;
            sent += now;
            self.counts.bytes_sent.fetch_add(now, Ordering::SeqCst);
        }
        Ok(wire.flush()?)
    }
}
