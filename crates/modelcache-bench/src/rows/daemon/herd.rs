//! Row for many clients that request the same file at once. The daemon does not have the file.

use super::{fetch, start_daemon};
use crate::comparison::median;
use crate::page::{Section, Target};
use crate::rows::hub::ServedRepo;
use crate::rows::{progress, size};
use crate::setup::Setup;
use anyhow::Result;
use xtask::table::markdown;

const CLIENTS: usize = 200;
/// Memory that the daemon may take besides the memory for its connections, in MiB.
const BASE_MIB: f64 = 128.0;
/// Memory that the daemon may take for each connection, in KiB.
const CONNECTION_KIB: f64 = 32.0;

/// Figures of one round.
struct Herd {
    p50_s: f64,
    p99_s: f64,
    rss_mib: f64,
    core_seconds: f64,
    /// Bytes that the CDN sent.
    origin_bytes: u64,
}

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "daemon-herd");
    // Every client receives the whole file, so this row uses the file size of `files-large`, which is smaller than that
    // of the large file.
    let bytes = setup.sizes.large_files.1;
    let served = ServedRepo::start(setup, bytes)?;
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    for clients in [1, CLIENTS] {
        let herds = (0..setup.rounds).map(|_| herd(setup, &served, clients, bytes)).collect::<Result<Vec<_>>>()?;
        let of = |value: fn(&Herd) -> f64| median(herds.iter().map(value).collect());
        let ratio = of(|herd| herd.p99_s / herd.p50_s);
        let rss_mib = herds.iter().map(|herd| herd.rss_mib).fold(0.0, f64::max);
        let shown = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
        rows.push(vec![
            clients.to_string(),
            shown(of(|herd| herd.p50_s)),
            shown(of(|herd| herd.p99_s)),
            shown(ratio),
            shown(of(|herd| herd.core_seconds)),
            format!("{rss_mib:.0}"),
            shown(of(|herd| herd.origin_bytes as f64).map(|sent| sent / bytes as f64)),
        ]);
        if clients == CLIENTS {
            let required_mib = BASE_MIB + clients as f64 * CONNECTION_KIB / 1024.0;
            targets = vec![
                Target::at_most("p99 of the clients' times, relative to p50", ratio, " x", 1.2, None),
                Target::at_most("peak RSS of the daemon", Some(rss_mib), " MiB", required_mib, None),
            ];
        }
    }
    Ok(Section {
        row: "daemon-herd",
        title: format!("Daemon: {CLIENTS} clients request the same {} file, which is not in the cache", size(bytes)),
        what: format!(
            "The clients are connections of one process. They start at the same time, read the whole file and discard \
             it. The times are those from the start to the last byte, as percentiles over the clients and as medians \
             over the rounds. Core-seconds and peak RSS are those of the daemon, which shares the cores with the \
             clients and with the CDN. The memory target is {BASE_MIB} MiB, and {CONNECTION_KIB} KiB for each \
             connection."
        ),
        tables: vec![markdown(
            &[
                "clients",
                "p50 s",
                "p99 s",
                "p99 / p50",
                "core-s",
                "peak RSS MiB",
                "bytes sent by the CDN, relative to the file",
            ],
            &rows,
        )],
        charts: Vec::new(),
        targets,
        notes: Vec::new(),
    })
}

/// Runs `clients` clients against a daemon with an empty cache.
fn herd(setup: &Setup, served: &ServedRepo<'_>, clients: usize, bytes: u64) -> Result<Herd> {
    let folder = setup.scratch.empty_folder("run")?;
    served.cdn.reset_counts()?;
    let daemon = start_daemon(setup, &folder.join("cache"), Some(&served.hub.url()))?;
    let url = served.file_url(&daemon.url());
    let ((_, figures), used) = daemon.usage_during(|| fetch(&url, clients, bytes))?;
    let herd = Herd {
        p50_s: figures.get("p50_s")?,
        p99_s: figures.get("p99_s")?,
        rss_mib: used.rss_bytes as f64 / f64::from(1 << 20),
        core_seconds: used.core_seconds,
        origin_bytes: served.cdn.counts()?.bytes_sent,
    };
    eprintln!("  {clients} clients: p50 {:.2} s, p99 {:.2} s, {:.0} MiB", herd.p50_s, herd.p99_s, herd.rss_mib);
    drop(daemon);
    crate::scratch::remove(&folder)?;
    Ok(herd)
}
