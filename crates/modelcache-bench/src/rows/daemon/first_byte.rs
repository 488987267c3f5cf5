//! Row for the time to the first byte of a large file that the daemon does not have.

use super::{put, start_daemon};
use crate::comparison::{OURS, median, spread};
use crate::page::{Section, Target};
use crate::rows::hub::ServedRepo;
use crate::rows::{progress, size};
use crate::server_process::{SHAPED_FIRST_BYTE_MS, ServerKind};
use crate::service::Service;
use crate::setup::Setup;
use crate::usage::Figures;
use anyhow::Result;
use modelcache_testkit::hub::HubFault;
use std::io::Write as _;
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;
use xtask::table::markdown;

/// Runs per round, because a run is short.
const RUNS_PER_ROUND: usize = 4;

/// An origin: the kind of its CDN, and the delay of the Hub's responses in milliseconds.
const ORIGINS: [(ServerKind, u64); 3] =
    [(ServerKind::SHAPED, 0), (ServerKind::SHAPED, SHAPED_FIRST_BYTE_MS), (ServerKind::Plain, 0)];

/// Makes the daemon send a request to the Hub, so that it has a connection to the Hub, like a daemon that has been
/// running for a while.
fn use_hub(daemon: &Service) -> Result<()> {
    let mut stream = TcpStream::connect(daemon.address())?;
    write!(stream, "GET /api/whoami-v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    std::io::copy(&mut stream, &mut std::io::sink())?;
    Ok(())
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "daemon-first-byte");
    let mut rows = Vec::new();
    let mut ratios = Vec::new();
    for (cdn, hub_delay_ms) in ORIGINS {
        let served = ServedRepo::start_with_cdn(setup, setup.sizes.file, cdn)?;
        if hub_delay_ms > 0 {
            served.hub.faults().add(HubFault::delay(Duration::from_millis(hub_delay_ms)));
        }
        let cdn_delay_ms = if cdn == ServerKind::SHAPED { SHAPED_FIRST_BYTE_MS } else { 0 };
        let [mut direct, mut through] = [Vec::new(), Vec::new()];
        for _ in 0..setup.rounds * RUNS_PER_ROUND {
            direct.push(first_byte_ms(&served.file_url(&served.hub.url()))?);
            let folder = setup.scratch.empty_folder("run")?;
            let dir = folder.join("cache");
            // The first artifact of a directory costs some milliseconds more, once.
            put(setup, &dir, &setup.scratch.data("small.bin", 7, 4 << 10)?)?;
            let daemon = start_daemon(setup, &dir, Some(&served.hub.url()))?;
            use_hub(&daemon)?;
            through.push(first_byte_ms(&served.file_url(&daemon.url()))?);
        }
        let ratio = median(through.clone()).zip(median(direct.clone())).map(|(through, direct)| through / direct);
        let mut row = |program: &str, values: Vec<f64>, ratio: Option<f64>| {
            eprintln!("  {cdn_delay_ms} ms {hub_delay_ms} ms  {program:<16} {:.1} ms", values[0]);
            rows.push(vec![
                format!("{cdn_delay_ms} ms"),
                format!("{hub_delay_ms} ms"),
                program.to_owned(),
                median(values.clone()).map_or_else(String::new, |value| format!("{value:.1}")),
                spread(values.iter().copied(), 1),
                ratio.map_or_else(String::new, |ratio| format!("{ratio:.2} x")),
            ]);
        };
        row("direct", direct, None);
        row(OURS, through, ratio);
        ratios.push(ratio);
    }
    crate::scratch::remove(&setup.scratch.disk.join("run"))?;
    Ok(Section {
        row: "daemon-first-byte",
        title: format!("Daemon: first byte of a {} file that is not in the cache", size(setup.sizes.file)),
        what: format!(
            "The time from connecting to the first byte of the file, with a client that requests the file and follows \
             redirects: `direct` from the stand-in for the Hub and from its CDN, and through a daemon that has \
             another artifact in its cache, and has sent one request to the Hub before. The CDN and the Hub delay each \
             response by the time in the first two columns. Before the daemon requests the file, it asks the Hub \
             whether the client may read the repository, and for the files with their digests. The target is for the \
             first two rows. {} runs each.",
            setup.rounds * RUNS_PER_ROUND
        ),
        tables: vec![markdown(
            &["delay of the CDN", "delay of the Hub", "client", "median ms", "spread", "relative to direct"],
            &rows,
        )],
        charts: Vec::new(),
        targets: vec![Target::at_most(
            &format!("time to the first byte, CDN with {SHAPED_FIRST_BYTE_MS} ms, relative to direct"),
            ratios[0],
            " x",
            1.2,
            None,
        )],
        notes: Vec::new(),
    })
}

fn first_byte_ms(url: &str) -> Result<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    Figures::run(command.args(["bench-fetch", "--first-byte", url]))?.1.get("first_byte_ms")
}
