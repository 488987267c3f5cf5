//! `cargo xtask bench-fetch`: fetches a file with one or more connections at once, and discards its bytes.

use super::{Head, Url, percentile};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::time::Instant;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Size of one read.
const BUFFER_BYTES: usize = 256 << 10;
const REDIRECTS_MAX: usize = 5;

/// Fetch a file and discard its bytes
#[derive(Debug, Args)]
pub(crate) struct FetchArguments {
    /// Number of clients that start at the same time
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// Stop at the first byte of the file
    #[arg(long)]
    first_byte: bool,
    url: String,
}

/// The result of one client.
struct Fetched {
    bytes: u64,
    /// Seconds from the start to the first byte of the file.
    first_byte_s: f64,
    /// Seconds from the start to the last byte that was read.
    seconds: f64,
}

impl FetchArguments {
    /// Prints the figures as one line of JSON.
    pub(crate) fn run(&self) -> Result<()> {
        // One thread reads all connections in turn, so that the server can use the other cores.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let fetched = runtime.block_on(async {
            let mut clients = JoinSet::new();
            (0..self.clients).for_each(|_| drop(clients.spawn(fetch(self.url.clone(), self.first_byte))));
            let mut fetched = Vec::new();
            while let Some(one) = clients.join_next().await {
                fetched.push(one??);
            }
            anyhow::Ok(fetched)
        })?;
        let sorted = |value: fn(&Fetched) -> f64| {
            let mut values: Vec<f64> = fetched.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let (seconds, first_byte_s) = (sorted(|one| one.seconds), sorted(|one| one.first_byte_s));
        let figures = serde_json::json!({
            "bytes": fetched.iter().map(|one| one.bytes).sum::<u64>(),
            "first_byte_ms": percentile(&first_byte_s, 50.0) * 1e3,
            "p50_s": percentile(&seconds, 50.0),
            "p99_s": percentile(&seconds, 99.0),
        });
        crate::server::reply(&figures.to_string())
    }
}

async fn fetch(url: String, first_byte: bool) -> Result<Fetched> {
    let started = Instant::now();
    let mut url = Url::parse(&url)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    for _ in 0..REDIRECTS_MAX {
        let mut stream = TcpStream::connect(&url.authority).await?;
        stream.write_all(url.request().as_bytes()).await?;
        let mut received = 0;
        let mut head: Option<Head> = None;
        // Read the head and, if the status is 200, at least one byte of the body.
        while head.as_ref().is_none_or(|head| head.status == 200 && received == head.bytes) {
            let count = stream.read(&mut buffer[received..]).await?;
            ensure!(count > 0, "the connection ended before the file");
            received += count;
            head = Head::parse(&buffer[..received])?;
        }
        let head = head.context("no response")?;
        match head.location {
            None if head.status == 200 => {}
            Some(location) if (300..400).contains(&head.status) => {
                url = url.redirected(&location)?;
                continue;
            }
            _ => bail!("the server answered {} to {}", head.status, url.path),
        }
        let first_byte_s = started.elapsed().as_secs_f64();
        let size = head.body_bytes.context("the response does not state its length")?;
        let mut bytes = (received - head.bytes) as u64;
        while bytes < size && !first_byte {
            let count = stream.read(&mut buffer).await?;
            ensure!(count > 0, "the connection ended after {bytes} of {size} bytes");
            bytes += count as u64;
        }
        return Ok(Fetched { bytes, first_byte_s, seconds: started.elapsed().as_secs_f64() });
    }
    bail!("more than {REDIRECTS_MAX} redirects")
}
