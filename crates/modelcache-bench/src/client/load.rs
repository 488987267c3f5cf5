//! `cargo xtask bench-load`: sends requests for a small file at a fixed rate over keep-alive connections (open loop).
//!
//! Every request has a scheduled time, and its latency is measured from then. A slow response delays the next request of
//! its connection, and the delay counts as latency of that request (no coordinated omission).

use super::{Head, Url, percentile};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Time to connect all threads, before the first request is due.
const LEAD: Duration = Duration::from_millis(300);

/// Send requests at a fixed rate
#[derive(Debug, Args)]
pub(crate) struct LoadArguments {
    /// Requests per second, over all connections
    #[arg(long)]
    rate: u32,
    #[arg(long)]
    connections: u32,
    #[arg(long)]
    seconds: u32,
    url: String,
}

/// One request.
struct Timed {
    /// Microseconds from the scheduled time to the last byte of the response.
    latency_us: f64,
    /// Microseconds from the scheduled time to the send.
    late_us: f64,
}

impl LoadArguments {
    /// Prints the figures as one line of JSON.
    pub(crate) fn run(&self) -> Result<()> {
        wake_precisely();
        let url = Url::parse(&self.url)?;
        let started = Instant::now() + LEAD;
        let timed = std::thread::scope(|scope| {
            let url = &url;
            let threads: Vec<_> = (0..self.connections)
                .map(|connection| scope.spawn(move || self.send_requests(url, connection, started)))
                .collect();
            let results = threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread of the load generator panicked"))?);
            results.collect::<Result<Vec<_>>>()
        })?;
        let seconds = (started.elapsed()).as_secs_f64();
        let sorted = |value: fn(&Timed) -> f64| {
            let mut values: Vec<f64> = timed.iter().flatten().map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let (latencies, late) = (sorted(|one| one.latency_us), sorted(|one| one.late_us));
        let figures = serde_json::json!({
            "rate": latencies.len() as f64 / seconds,
            "p50_us": percentile(&latencies, 50.0),
            "p99_us": percentile(&latencies, 99.0),
            "p999_us": percentile(&latencies, 99.9),
            "max_us": percentile(&latencies, 100.0),
            "late_p50_us": percentile(&late, 50.0),
            "late_p99_us": percentile(&late, 99.0),
        });
        crate::server::reply(&figures.to_string())
    }

    /// Sends every request that is due on this connection.
    fn send_requests(&self, url: &Url, connection: u32, started: Instant) -> Result<Vec<Timed>> {
        let mut stream = TcpStream::connect(&url.authority)?;
        stream.set_nodelay(true)?;
        let request = url.request();
        let mut buffer = vec![0; 64 << 10];
        // The first request opens the connection in the server and is not measured.
        stream.write_all(request.as_bytes())?;
        read_response(&mut stream, &mut buffer)?;
        let mut timed = Vec::new();
        for number in (connection..self.rate * self.seconds).step_by(self.connections as usize) {
            let due = started + Duration::from_secs_f64(f64::from(number) / f64::from(self.rate));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let late_us = due.elapsed().as_secs_f64() * 1e6;
            stream.write_all(request.as_bytes())?;
            read_response(&mut stream, &mut buffer)?;
            timed.push(Timed { latency_us: due.elapsed().as_secs_f64() * 1e6, late_us });
        }
        Ok(timed)
    }
}

/// Reads a response to its end.
fn read_response(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<()> {
    let (mut received, mut expected) = (0, None);
    while expected.is_none_or(|expected| received < expected) {
        let count = stream.read(&mut buffer[received..])?;
        ensure!(count > 0, "the server closed the connection, or the response is too large");
        received += count;
        if expected.is_none()
            && let Some(head) = Head::parse(&buffer[..received])?
        {
            ensure!(head.status == 200, "the server answered {}", head.status);
            let body_bytes = head.body_bytes.context("the response does not state its length")?;
            expected = Some(head.bytes + usize::try_from(body_bytes)?);
        }
    }
    Ok(())
}

/// Lets the kernel wake the threads of this process at the requested time. By default, it may wake them 50 us later.
#[expect(unsafe_code, reason = "one call without pointers")]
fn wake_precisely() {
    // SAFETY: with PR_SET_TIMERSLACK, prctl(2) takes a number of nanoseconds.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
}
