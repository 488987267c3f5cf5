//! Row for 50 processes that get the same artifact at once, into one directory that does not have it.

use super::large_file::{REFERENCE, ServedFile};
use super::{progress, size};
use crate::comparison::median;
use crate::page::{Section, Target};
use crate::server_process::ServerKind;
use crate::setup::Setup;
use crate::usage::{Running, Usage};
use anyhow::{Result, ensure};
use xtask::table::markdown;

const PROCESSES: usize = 50;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "herd");
    let served = ServedFile::start(setup, ServerKind::Plain)?;
    let (mut alone, mut slowest, mut ratios, mut spent) =
        (Vec::new(), Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
    for round in 1..=setup.rounds {
        let (one, bytes_alone) = herd(&served, 1)?;
        let (many, bytes) = herd(&served, PROCESSES)?;
        alone.push(one[0].seconds);
        slowest.push(many.iter().map(|run| run.seconds).fold(0.0, f64::max));
        ratios.push(bytes as f64 / bytes_alone as f64);
        for (spent, runs) in spent.iter_mut().zip([&one, &many]) {
            spent.push(runs.iter().map(|run| run.core_seconds).sum());
        }
        eprintln!("  {round}  alone {:.2} s, slowest of {PROCESSES} {:.2} s", alone[round - 1], slowest[round - 1]);
    }
    let [spent_alone, spent_herd] = spent.map(|spent| median(spent).unwrap_or_default());
    let (alone, slowest, ratio) = (median(alone), median(slowest), median(ratios));
    let shown = |seconds: Option<f64>| seconds.map_or_else(String::new, |seconds| format!("{seconds:.2}"));
    let rows = [
        vec!["1".into(), shown(alone), format!("{spent_alone:.2}"), "1".into()],
        vec![format!("{PROCESSES}, the slowest"), shown(slowest), format!("{spent_herd:.2}"), ratio_shown(ratio)],
    ];
    Ok(Section {
        row: "herd",
        title: format!("{PROCESSES} processes get the same {} file into one directory", size(setup.sizes.file)),
        what: "All processes start at the same time and share one directory that does not have the file, so one of \
               them downloads it and the others wait. The time is that of the slowest process, core-seconds are the \
               sum of all processes. The server counts the bytes that it sends."
            .into(),
        tables: vec![markdown(&["processes", "median s", "core-s", "bytes sent, relative to one process"], &rows)],
        charts: Vec::new(),
        targets: vec![
            Target::at_most("bytes sent, relative to one process", ratio, " x", 1.01, None),
            Target::at_most(
                "time of the slowest process, relative to one process",
                slowest.zip(alone).map(|(slowest, alone)| slowest / alone),
                " x",
                1.25,
                None,
            ),
        ],
        notes: Vec::new(),
    })
}

fn ratio_shown(ratio: Option<f64>) -> String {
    ratio.map_or_else(String::new, |ratio| format!("{ratio:.4}"))
}

/// Runs `count` processes at once. Returns the usage of each, and the bytes that the server sent.
fn herd(served: &ServedFile<'_>, count: usize) -> Result<(Vec<Usage>, u64)> {
    let folder = served.setup.scratch.empty_folder("run")?;
    served.server.reset_counts()?;
    let start = |_| {
        let mut command = served.setup.with_remote(&folder.join("cache"), &served.server);
        Running::start(command.args(["get", REFERENCE, "--quiet"]))
    };
    let running = (0..count).map(start).collect::<Result<Vec<_>>>()?;
    // One thread per process, so that each is timed to its own end.
    let waiting: Vec<_> = running.into_iter().map(|one| std::thread::spawn(move || one.wait())).collect();
    let mut runs = Vec::new();
    for one in waiting {
        let (run, status, output) = one.join().map_err(|_| anyhow::anyhow!("a thread of the herd panicked"))??;
        ensure!(status.success(), "one of the herd ended with {status}: {}", output[1]);
        runs.push(run);
    }
    let bytes = served.server.counts()?.bytes_sent;
    crate::scratch::remove(&folder)?;
    Ok((runs, bytes))
}
