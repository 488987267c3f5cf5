//! Models of a store that drive the controller of the request limit without a network.
//!
//! `cargo test -p modelcache simulation -- --nocapture` prints a table: the time of a download under the controller,
//! beside that with the best constant number of connections.

use super::controller::ConcurrencyController;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_millis(2);
const LIMIT_MAX: usize = 256;
const MIB: f64 = 1_048_576.0;

/// A store and the network to it.
#[derive(Clone, Copy)]
struct Store {
    /// Bytes per second on each connection.
    each: f64,
    /// Bytes per second on all connections together.
    total: f64,
    /// Time to the first byte of a response.
    latency: Duration,
    /// Concurrent requests above which the store answers 503.
    most: usize,
}

/// One connection of the client.
#[derive(Clone, Copy)]
enum Connection {
    Idle,
    /// The response begins at this time.
    Waits(Duration),
    /// This many bytes are left.
    Receives(f64),
}

/// The result of one download.
#[derive(Debug)]
struct Outcome {
    seconds: f64,
    /// Number of requests that were answered with 503.
    throttled: usize,
    /// The limit at the end.
    limit: usize,
}

/// Downloads `bytes` in requests of `request_bytes`, with the limit of `controller` or with a constant limit.
fn download(
    store: Store,
    bytes: f64,
    request_bytes: f64,
    constant: Option<usize>,
    controller: &mut ConcurrencyController,
) -> Outcome {
    let (start, mut now, mut queued, mut throttled) = (Instant::now(), Duration::ZERO, bytes, 0);
    let mut connections = vec![Connection::Idle; LIMIT_MAX];
    loop {
        let limit = constant.unwrap_or_else(|| controller.limit());
        let mut running = connections.iter().filter(|connection| !matches!(connection, Connection::Idle)).count();
        if queued <= 0.0 && running == 0 {
            return Outcome { seconds: now.as_secs_f64(), throttled, limit };
        }
        // Send requests.
        for connection in &mut connections {
            if running >= limit || queued <= 0.0 {
                break;
            }
            if matches!(connection, Connection::Idle) {
                running += 1;
                if running > store.most {
                    // Model of a 503 and its retry: the response begins after ten times the latency.
                    (*connection, throttled) = (Connection::Waits(now + 10 * store.latency), throttled + 1);
                    controller.record_throttled(start + now);
                } else {
                    *connection = Connection::Waits(now + store.latency);
                }
                queued -= request_bytes;
            }
        }
        // Receive.
        now += STEP;
        let is_full = running >= limit && queued > 0.0;
        let receiving = connections.iter().filter(|one| matches!(one, Connection::Receives(_))).count();
        let step_bytes = store.each.min(store.total / receiving.max(1) as f64) * STEP.as_secs_f64();
        for connection in &mut connections {
            match *connection {
                Connection::Waits(until) if until <= now => {
                    *connection = Connection::Receives(request_bytes);
                    controller.begin_receiving();
                }
                Connection::Receives(left) if left <= step_bytes => {
                    *connection = Connection::Idle;
                    controller.record_received(left as u64, start + now, is_full);
                    controller.end_receiving();
                    controller.record_completed(start + now, is_full);
                }
                Connection::Receives(left) => {
                    *connection = Connection::Receives(left - step_bytes);
                    controller.record_received(step_bytes as u64, start + now, is_full);
                }
                _ => {}
            }
        }
    }
}

fn controller() -> ConcurrencyController {
    ConcurrencyController::new(LIMIT_MAX, Instant::now())
}

/// Returns the time with the best constant number of connections, and that number.
fn best(store: Store, bytes: f64, request_bytes: f64) -> (f64, usize) {
    let constants = [8, 16, 24, 32, 48, 64, 96, 128, 192, 256];
    let times = constants
        .map(|constant| (download(store, bytes, request_bytes, Some(constant), &mut controller()).seconds, constant));
    times.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are constants")
}

/// Returns a store shaped as in the bench row `shaped`, on a machine that processes 1 GB/s.
fn paced(each_mb: f64, latency_ms: u64) -> Store {
    Store { each: each_mb * 1e6, total: 1e9, latency: Duration::from_millis(latency_ms), most: usize::MAX }
}

#[test]
#[expect(clippy::print_stdout, reason = "the table is for the reader who tunes the controller")]
fn a_download_reaches_a_minimum_share_of_the_best_speed() {
    println!("| MB/s each | first byte ms | MiB | s | end limit | best s | connections | share |");
    println!("|---|---|---|---|---|---|---|---|");
    for (each, latency, mib, share_min) in [
        (5.0, 30, 1024.0, 0.70),
        (5.0, 150, 1024.0, 0.60),
        (20.0, 30, 1024.0, 0.80),
        (20.0, 150, 1024.0, 0.65),
        (90.0, 30, 1024.0, 0.85),
        (90.0, 150, 1024.0, 0.75),
        (5.0, 30, 4096.0, 0.90),
        (20.0, 30, 4096.0, 0.90),
        (90.0, 30, 4096.0, 0.90),
        (5.0, 30, 16384.0, 0.95),
        (90.0, 150, 16384.0, 0.85),
    ] {
        let (store, bytes) = (paced(each, latency), mib * MIB);
        // About what the download chooses at this rate.
        let request_bytes = if each > 50.0 { 16.0 * MIB } else { 4.0 * MIB };
        let outcome = download(store, bytes, request_bytes, None, &mut controller());
        let (best_s, connections) = best(store, bytes, request_bytes);
        let share = best_s / outcome.seconds;
        println!(
            "| {each} | {latency} | {mib} | {:.2} | {} | {best_s:.2} | {connections} | {share:.2} |",
            outcome.seconds, outcome.limit
        );
        assert!(share >= share_min, "{each} MB/s, {latency} ms, {mib} MiB: {share:.2} of the best, {outcome:?}");
    }
}

#[test]
fn on_a_link_that_one_connection_fills_the_limit_hardly_grows() {
    let store = Store { each: 1e9, total: 1e9, latency: Duration::from_millis(5), most: usize::MAX };
    let outcome = download(store, 8192.0 * MIB, 16.0 * MIB, None, &mut controller());
    assert!(outcome.limit <= 32, "{outcome:?}");
}

#[test]
fn a_store_that_throttles_sends_few_errors_and_is_used_well() {
    let store = Store { most: 48, ..paced(20.0, 30) };
    let outcome = download(store, 8192.0 * MIB, 4.0 * MIB, None, &mut controller());
    let constant = download(store, 8192.0 * MIB, 4.0 * MIB, Some(256), &mut controller());
    assert!(outcome.throttled * 4 < constant.throttled, "{} and {}", outcome.throttled, constant.throttled);
    let attainable_s = 8192.0 * MIB / (48.0 * 20e6);
    assert!(outcome.seconds < 1.5 * attainable_s, "{outcome:?}, attainable {attainable_s}");
}
