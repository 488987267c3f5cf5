//! Row for 50 processes that get the same artifact at once, into one directory that does not have it.

use super::pull::{REFERENCE, Stage};
use super::{progress, size};
use crate::bench::contest::median;
use crate::bench::page::{Bar, Section};
use crate::bench::served::Kind;
use crate::bench::setup::Setup;
use crate::bench::usage::{Run, Running};
use crate::table::markdown;
use anyhow::{Result, ensure};

const PROCESSES: usize = 50;

pub(crate) fn section(setup: &Setup) -> Result<Section> {
    progress(setup, "herd");
    let stage = Stage::set(setup, Kind::Plain)?;
    let (mut alone, mut slowest, mut ratios, mut spent) =
        (Vec::new(), Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
    for round in 1..=setup.rounds {
        let (one, bytes_alone) = herd(&stage, 1)?;
        let (many, bytes) = herd(&stage, PROCESSES)?;
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
        vec!["one alone".into(), shown(alone), format!("{spent_alone:.2}"), "1".into()],
        vec![format!("the slowest of {PROCESSES}"), shown(slowest), format!("{spent_herd:.2}"), ratio_shown(ratio)],
    ];
    Ok(Section {
        row: "herd",
        title: format!("{PROCESSES} processes want the same {}, one directory", size(setup.sizes.file)),
        what: "All are started at once; core-seconds are those of all of them. Bytes are counted by the server.".into(),
        tables: vec![markdown(&["who", "median s", "core-s", "remote bytes, x one alone"], &rows)],
        bars: vec![
            Bar::at_most("remote bytes", ratio, " x", 1.01, None),
            Bar::at_most("the slowest", slowest.zip(alone).map(|(slowest, alone)| slowest / alone), " x", 1.25, None),
        ],
        notes: Vec::new(),
    })
}

fn ratio_shown(ratio: Option<f64>) -> String {
    ratio.map_or_else(String::new, |ratio| format!("{ratio:.4}"))
}

/// Runs `count` processes at once. Returns the usage of each, and the bytes that the server sent.
fn herd(stage: &Stage<'_>, count: usize) -> Result<(Vec<Run>, u64)> {
    let folder = stage.setup.scratch.fresh("run")?;
    stage.served.forget_counts()?;
    let start = |_| {
        let mut command = stage.setup.with_remote(&folder.join("cache"), &stage.served);
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
    let bytes = stage.served.counted()?.bytes_sent;
    crate::bench::scratch::remove(&folder)?;
    Ok((runs, bytes))
}
