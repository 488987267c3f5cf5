//! Row for servers that limit the rate of each connection, so a program has to find out by itself how many connections
//! to use.

use super::{progress, size};
use crate::comparison::{Entry, best_peer, compare_to_disk, median, ours};
use crate::copiers::{Copier, Operation};
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess, Shape};
use crate::setup::{Setup, check_size};
use crate::usage::measure;
use anyhow::Result;
use std::cell::RefCell;
use std::path::Path;
use xtask::table::markdown;

const NAME: &str = "bench/shaped";
const REFERENCE: &str = "bench/shaped@1";
const FILE: &str = "shaped.bin";
const KEY: &str = "shaped/shaped.bin";
const FIRST: &str = "first get";
const SECOND: &str = "second get";
/// The shapes, as MB/s of each connection and milliseconds to the first byte.
const SHAPES: [(u64, u64); 6] = [(5, 30), (5, 150), (20, 30), (20, 150), (90, 30), (90, 150)];

/// The result for one shape.
struct Outcome {
    shape: (u64, u64),
    /// Seconds of the first and of the second get; medians over the rounds.
    ours_s: [Option<f64>; 2],
    /// Highest number of busy connections in the first and in the second get; medians over the rounds.
    connections: [Option<f64>; 2],
    best_peer_s: Option<f64>,
    /// Program and setting of the fastest peer.
    best_peer: String,
}

impl Outcome {
    /// Returns the speed of a get, as a percentage of the speed of the fastest peer.
    fn share(&self, get: usize) -> Option<f64> {
        Some(100.0 * self.best_peer_s? / self.ours_s[get]?)
    }

    fn cells(&self) -> Vec<String> {
        let number =
            |value: Option<f64>, digits: usize| value.map_or_else(String::new, |value| format!("{value:.digits$}"));
        let (rate, delay) = self.shape;
        let mut cells = vec![format!("{rate}"), format!("{delay}")];
        for get in 0..2 {
            cells.push(number(self.ours_s[get], 2));
            cells.push(number(self.connections[get], 0));
        }
        cells.extend([self.best_peer.clone(), number(self.best_peer_s, 2)]);
        cells.extend([0, 1].map(|get| self.share(get).map_or_else(String::new, |share| format!("{share:.0} %"))));
        cells
    }
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "shaped");
    let bytes = setup.sizes.file / 4;
    std::fs::create_dir_all(setup.served_folder())?;
    let file = setup.scratch.data(FILE, 9, bytes)?;
    setup.publish(&ServerProcess::start(&setup.served_folder(), ServerKind::Plain)?, NAME, &file)?;
    setup.link_for_peers("shaped", &file)?;
    let outcomes = SHAPES.into_iter().map(|shape| measured(setup, bytes, shape)).collect::<Result<Vec<_>>>()?;
    std::fs::remove_file(file)?;
    let header = [
        "MB/s on each connection",
        "first byte ms",
        "first get s",
        "first get: connections",
        "second get s",
        "second get: connections",
        "fastest peer",
        "fastest peer s",
        "first get: speed, relative to the peer",
        "second get: speed, relative to the peer",
    ];
    let worst =
        |get: usize| outcomes.iter().map(|outcome| outcome.share(get)).min_by(|a, b| by_speed(*a, *b)).flatten();
    Ok(Section {
        row: "shaped",
        title: format!("One {} file, S3 to disk, with traffic shaping", size(bytes)),
        what: "The server limits the rate of each connection (`SO_MAX_PACING_RATE`) and delays the first byte of each \
               response, so only a program with many connections is fast. `second get` is a get into the same cache \
               directory after an eviction, so the number of connections for this server is known. The peers are s5cmd \
               with 64 x 8, 128 x 8 and 256 x 4 MiB, and obstore with 64 x 8 MiB; the table shows the fastest of them. \
               `64 x 8` is 64 concurrent requests of 8 MiB. \
               modelcache runs at its defaults and verifies SHA-256; the peers do not verify the bytes. \
               `connections` is the highest number of responses of at least 64 KiB at the same time. Times and \
               connections are medians over the rounds."
            .to_owned(),
        tables: vec![markdown(&header, &outcomes.iter().map(Outcome::cells).collect::<Vec<_>>())],
        charts: Vec::new(),
        targets: vec![
            Target::at_least("first get: speed, relative to the fastest peer, worst case", worst(0), " %", 95.0, None),
            Target::at_least("second get: speed, relative to the fastest peer, worst case", worst(1), " %", 98.0, None),
        ],
        notes: Vec::new(),
    })
}

/// Orders relative speeds. A missing one is the lowest, so that the worst case is then missing, too.
fn by_speed(a: Option<f64>, b: Option<f64>) -> std::cmp::Ordering {
    a.unwrap_or(f64::MIN).total_cmp(&b.unwrap_or(f64::MIN))
}

/// Compares all programs on a server of one shape.
fn measured(setup: &Setup, bytes: u64, shape: (u64, u64)) -> Result<Outcome> {
    let (rate, first_byte_ms) = shape;
    eprintln!("  {rate} MB/s on each connection, first byte after {first_byte_ms} ms");
    let kind = ServerKind::Shaped(Shape { bytes_per_s: rate * 1_000_000, first_byte_ms });
    let server = ServerProcess::start(&setup.served_folder(), kind)?;
    let connections = RefCell::new([Vec::new(), Vec::new()]);
    let get = |folder: &Path, index: usize| {
        server.reset_counts()?;
        let (used, path) = setup.get(&mut setup.with_remote(&folder.join("cache"), &server), REFERENCE)?;
        check_size(&path, bytes)?;
        connections.borrow_mut()[index].push(server.counts()?.busy_connections_max as f64);
        anyhow::Ok(used)
    };
    let gets = Entry::ours("", &[(FIRST, "after"), (SECOND, "after")], |folder| {
        let first = get(folder, 0)?;
        measure(
            setup.with_remote(&folder.join("cache"), &server).args(["evict", REFERENCE, "--tier", "disk", "--yes"]),
        )?;
        Ok(vec![first, get(folder, 1)?])
    });
    let peers = [("s5cmd", 64, 8), ("s5cmd", 128, 8), ("s5cmd", 256, 4), ("obstore", 64, 8)];
    let peer = |(program, requests, mib): (&'static str, u32, u32)| {
        let (copier, server) = (Copier::with_parts(program, requests, mib), &server);
        let run = move |folder: &Path| {
            let file = folder.join(FILE);
            let used = measure(&mut copier.command(setup, server, Operation::Get, KEY, &file)?)?;
            check_size(&file, bytes)?;
            Ok(vec![used])
        };
        Entry { program, setting: copier.setting(), verified: "no", steps: vec![("", "no")], run: Box::new(run) }
    };
    let mut entries = vec![gets];
    entries.extend(peers.map(peer));
    let lines = compare_to_disk(setup, bytes, &entries)?;
    drop(entries);
    let best_peer_s = best_peer(&lines, |_| true);
    let fastest = lines.iter().find(|line| !line.is_ours() && line.seconds() == best_peer_s);
    Ok(Outcome {
        shape,
        ours_s: [FIRST, SECOND].map(|setting| ours(&lines, setting)?.seconds()),
        connections: connections.into_inner().map(median),
        best_peer_s,
        best_peer: fastest.map_or_else(String::new, |line| format!("{}, {}", line.program, line.setting)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shorter_time_is_a_higher_share() {
        let outcome = Outcome {
            shape: (5, 30),
            ours_s: [Some(2.5), Some(2.0)],
            connections: [Some(200.0), None],
            best_peer_s: Some(2.0),
            best_peer: "s5cmd, 256 x 4 MiB".to_owned(),
        };
        assert_eq!([0, 1].map(|get| outcome.share(get)), [Some(80.0), Some(100.0)]);
        assert_eq!(
            outcome.cells().join(" | "),
            "5 | 30 | 2.50 | 200 | 2.00 |  | s5cmd, 256 x 4 MiB | 2.00 | 80 % | 100 %"
        );
    }
}
