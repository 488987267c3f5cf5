//! Row for the growth of cost: with the number of files, and with the number of connections.

use super::daemon::{artifact_url, fetch, put, start_daemon};
use super::large_file::make_room;
use super::{progress, size};
use crate::chart::{Chart, ChartLine};
use crate::comparison::median;
use crate::page::{Section, Target};
use crate::server_process::{ServerKind, ServerProcess};
use crate::setup::{Setup, check_size};
use crate::usage::Usage;
use anyhow::Result;
use std::fs;
use xtask::table::markdown;

/// Size of each file in the measurement by number of files.
const FILE_BYTES: u64 = 4 << 10;
const FILES: [usize; 5] = [1, 10, 100, 1000, 10_000];
/// Most files with `--quick`.
const FILES_QUICK_MAX: usize = 100;
const CONNECTIONS: [usize; 5] = [1, 4, 16, 64, 256];

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "growth");
    make_room(setup)?;
    let files = by_files(setup)?;
    let connections = by_connections(setup)?;
    let per_file = |of: usize| files.iter().find(|line| line.0 == of).map(|line| line.1.seconds / of as f64);
    let growth = per_file(10_000).zip(per_file(1000)).map(|(most, fewer)| most / fewer);
    let core_seconds = |of: usize| connections.iter().find(|line| line.0 == of).map(|line| line.1.core_seconds);
    let daemon_growth = core_seconds(256).zip(core_seconds(1)).map(|(most, one)| most / one);
    let seconds = |value: fn(&(usize, Usage, Usage)) -> f64| {
        files.iter().map(|line| (line.0 as f64, value(line))).collect::<Vec<_>>()
    };
    let line = |name: &str, points| ChartLine { name: name.into(), points };
    let megabytes = |used: &Usage| format!("{:.0}", used.rss_bytes as f64 / f64::from(1 << 20));
    let gigabytes = setup.sizes.daemon_bytes as f64 / 1e9;
    let file_cells = files.iter().map(|(count, first, hit)| {
        let per_file = |used: &Usage| format!("{:.0}", used.seconds * 1e6 / *count as f64);
        let seconds = |used: &Usage| format!("{:.3}", used.seconds);
        vec![count.to_string(), seconds(first), per_file(first), megabytes(first), seconds(hit), megabytes(hit)]
    });
    let connection_cells = connections.iter().map(|(count, used)| {
        let core_seconds = format!("{:.2}", used.core_seconds / gigabytes);
        vec![count.to_string(), format!("{:.2}", used.seconds), core_seconds, megabytes(used)]
    });
    Ok(Section {
        row: "growth",
        title: "Growth of cost".into(),
        what: format!(
            "First, a get of one artifact with more and more files of {}, from S3 and then from the disk. The times \
             are those of the whole command. Second, the daemon sends {} from the page cache over more and more \
             connections at once, each of which gets an equal share; core-seconds and peak RSS are those of the \
             daemon. Times and core-seconds are medians over the rounds, peak RSS is the highest. Both axes of the charts are logarithmic.",
            size(FILE_BYTES),
            size(setup.sizes.daemon_bytes)
        ),
        tables: vec![
            markdown(
                &["files", "first get s", "us per file", "peak RSS MiB", "second get s", "second get: peak RSS MiB"],
                &file_cells.collect::<Vec<_>>(),
            ),
            markdown(&["connections", "s", "core-s/GB", "peak RSS MiB"], &connection_cells.collect::<Vec<_>>()),
        ],
        charts: vec![
            Chart {
                name: "growth-files",
                title: "Time of a get, by the number of files".into(),
                x: "files",
                y: "seconds",
                lines: vec![
                    line("first get, from S3", seconds(|(_, first, _)| first.seconds)),
                    line("second get, from the disk", seconds(|(_, _, hit)| hit.seconds)),
                ],
            },
            Chart {
                name: "growth-connections",
                title: "Core-seconds of the daemon per GB, by the number of connections".into(),
                x: "connections",
                y: "core-seconds per GB",
                lines: vec![line(
                    "from the page cache",
                    connections.iter().map(|(count, used)| (*count as f64, used.core_seconds / gigabytes)).collect(),
                )],
            },
        ],
        targets: vec![
            Target::at_most("10000 files: time per file, relative to 1000 files", growth, " x", 1.1, None),
            Target::at_most("256 connections: core-seconds, relative to one", daemon_growth, " x", 1.5, None),
        ],
        notes: Vec::new(),
    })
}

/// Returns the usage of the first and the second get, by the number of files.
fn by_files(setup: &Setup) -> Result<Vec<(usize, Usage, Usage)>> {
    fs::create_dir_all(setup.served_folder())?;
    let server = ServerProcess::start(&setup.served_folder(), ServerKind::Plain)?;
    let mut lines = Vec::new();
    for count in FILES.into_iter().filter(|count| !setup.quick || *count <= FILES_QUICK_MAX) {
        let name = format!("growth-{count}");
        let source = setup.scratch.memory.join(&name);
        for number in 0..count {
            setup.scratch.data(&format!("{name}/part-{number:05}.bin"), 100 + number as u64, FILE_BYTES)?;
        }
        setup.publish(&server, &name, &source)?;
        let reference = format!("{name}@1");
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for round in 1..=setup.rounds {
            let dir = setup.scratch.empty_folder("growth")?;
            for runs in [&mut first, &mut second] {
                let (used, path) = setup.get(&mut setup.with_remote(&dir, &server), &reference)?;
                check_size(&path, count as u64 * FILE_BYTES)?;
                eprintln!("  {round}  {count} files  {:.3} s", used.seconds);
                runs.push(used);
            }
            crate::scratch::remove(&dir)?;
        }
        crate::scratch::remove(&source)?;
        lines.push((count, medians(&first), medians(&second)));
    }
    crate::scratch::remove(&setup.served_folder())?;
    Ok(lines)
}

/// Returns the seconds of the clients and the usage of the daemon, by the number of connections.
fn by_connections(setup: &Setup) -> Result<Vec<(usize, Usage)>> {
    let mut lines = Vec::new();
    for count in CONNECTIONS {
        let folder = setup.scratch.empty_folder("daemon")?;
        let (dir, bytes) = (folder.join("cache"), setup.sizes.daemon_bytes / count as u64);
        let source = setup.scratch.data("share.bin", 7, bytes)?;
        let file = put(setup, &dir, &source)?;
        let daemon = start_daemon(setup, &dir, None)?;
        let url = artifact_url(&daemon, &file);
        // The first fetch reads the file into the page cache.
        fetch(&url, 1, bytes)?;
        let mut runs = Vec::new();
        for round in 1..=setup.rounds {
            let ((client, _), used) = daemon.usage_during(|| fetch(&url, count, bytes))?;
            eprintln!("  {round}  {count} connections  {:.2} s", client.seconds);
            // The kernel counts CPU time in ticks of 0.01 s. A run that is shorter counts as one tick, not as none.
            runs.push(Usage { seconds: client.seconds, core_seconds: used.core_seconds.max(0.01), ..used });
        }
        lines.push((count, medians(&runs)));
        drop(daemon);
        crate::scratch::remove(&folder)?;
        fs::remove_file(&source)?;
    }
    Ok(lines)
}

/// Returns the median time, the median core-seconds and the highest peak memory.
fn medians(runs: &[Usage]) -> Usage {
    let middle = |value: fn(&Usage) -> f64| median(runs.iter().map(value).collect()).unwrap_or_default();
    Usage {
        seconds: middle(|run| run.seconds),
        core_seconds: middle(|run| run.core_seconds),
        rss_bytes: runs.iter().map(|run| run.rss_bytes).max().unwrap_or_default(),
    }
}
