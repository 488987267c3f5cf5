//! Compares programs in rounds; each round runs every program once.
//!
//! The speed of a machine drifts, so only results of the same rounds are compared. If the runs of a program differ
//! much, there are additional rounds. A slow program drops out after [`SPENT_S_MAX`] seconds and at least
//! [`ROUNDS_MIN`] runs; its line shows the number of its runs. A program that fails drops out, too, and its line shows
//! the reason.

use super::machine::memory_bytes;
use super::setup::Setup;
use super::usage::Usage;
use anyhow::Result;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read};
use std::path::Path;
use xtask::table;

/// A program drops out of a comparison once its runs have taken this many seconds in total.
const SPENT_S_MAX: f64 = 25.0;
/// Minimum number of runs of a slow program, because a single run is no measurement.
const ROUNDS_MIN: usize = 2;
/// If the interquartile range of a program exceeds this share of its median, additional rounds follow, at most as many
/// as before. With fewer than five runs, the range of all runs takes the place of the interquartile range.
const INTERQUARTILE_SHARE_MAX: f64 = 0.1;
/// A comparison that moves at most this many bytes per run keeps the files of all runs until it ends. An ext4 without a
/// journal skips inodes that were freed in the last minutes, so removing the files of one run would slow down the next
/// program that creates files.
const KEPT_BYTES_MAX: u64 = 64 << 20;

/// One program at one setting.
pub(super) struct Entry<'a> {
    pub(super) program: &'static str,
    pub(super) setting: String,
    /// How the program verifies the bytes, for the column `verified`.
    pub(super) verified: &'static str,
    /// The measured steps: the suffix for the setting, and the cell in the column `durable`.
    pub(super) steps: Vec<(&'static str, &'static str)>,
    /// Runs the program once in a new folder. Returns one measurement per step; each includes the steps before it.
    pub(super) run: RunOnce<'a>,
}

impl<'a> Entry<'a> {
    /// Returns the entry of our program, which verifies all bytes against their SHA-256.
    pub(super) fn ours(
        setting: impl Into<String>,
        steps: &[(&'static str, &'static str)],
        run: impl Fn(&Path) -> Result<Vec<Usage>> + 'a,
    ) -> Self {
        let (setting, steps) = (setting.into(), steps.to_vec());
        Self { program: OURS, setting, verified: "SHA-256", steps, run: Box::new(run) }
    }
}

/// Runs a program once in a folder of its own.
pub(super) type RunOnce<'a> = Box<dyn Fn(&Path) -> Result<Vec<Usage>> + 'a>;

/// Name of our program in the tables.
pub(super) const OURS: &str = "modelcache";

/// Results of one step of an entry.
pub(super) struct Line {
    pub(super) program: &'static str,
    pub(super) setting: String,
    verified: &'static str,
    durable: &'static str,
    bytes: u64,
    pub(super) runs: Vec<Usage>,
    failure: Option<String>,
}

/// Runs the entries in turn, in every round. A run of an entry moves `bytes` bytes.
pub(super) fn compare(setup: &Setup, bytes: u64, entries: &[Entry<'_>]) -> Result<Vec<Line>> {
    in_turn(setup, bytes, entries, || Ok(()))
}

/// Like [`compare`], for programs that write to disk. Calls [`claim_page_cache_memory`] before each run, so that every
/// program finds the same amount of memory for its page cache.
pub(super) fn compare_to_disk(setup: &Setup, bytes: u64, entries: &[Entry<'_>]) -> Result<Vec<Line>> {
    in_turn(setup, bytes, entries, || claim_page_cache_memory(&setup.scratch.disk, bytes))
}

fn in_turn(setup: &Setup, bytes: u64, entries: &[Entry<'_>], prepare: impl Fn() -> Result<()>) -> Result<Vec<Line>> {
    // One line per step of the entry.
    let lines = |entry: &Entry<'_>| -> Vec<Line> {
        let line = |(suffix, durable): &(&str, &'static str)| Line {
            program: entry.program,
            setting: format!("{}{suffix}", entry.setting),
            verified: entry.verified,
            durable,
            bytes,
            runs: Vec::new(),
            failure: None,
        };
        entry.steps.iter().map(line).collect()
    };
    let mut results: Vec<Vec<Line>> = entries.iter().map(lines).collect();
    let is_done = |lines: &[Line]| {
        lines.iter().any(|line| line.failure.is_some()) || lines.last().is_some_and(Line::has_run_enough)
    };
    for round in 1..=2 * setup.rounds {
        let is_unsteady = |lines: &Vec<Line>| !is_done(lines) && !lines.iter().all(Line::is_steady);
        if round > setup.rounds && !results.iter().any(is_unsteady) {
            break;
        }
        for (at, (entry, lines)) in entries.iter().zip(&mut results).enumerate() {
            // A failed or slow program does not run in the remaining rounds.
            if is_done(lines) {
                continue;
            }
            // Large files share one folder name, so that only the files of one run exist at a time.
            let name = if bytes > KEPT_BYTES_MAX { "run".to_owned() } else { format!("run/{round}-{at}") };
            let folder = setup.scratch.empty_folder(&name)?;
            prepare()?;
            match (entry.run)(&folder) {
                Ok(runs) => {
                    let last = runs.last().copied().unwrap_or_default();
                    eprintln!("  {round}  {:<16} {:<24} {:.2} s", entry.program, entry.setting, last.seconds);
                    lines.iter_mut().zip(runs).for_each(|(line, run)| line.runs.push(run));
                }
                Err(error) => {
                    eprintln!("  {round}  {:<16} {:<24} {error:#}", entry.program, entry.setting);
                    lines.iter_mut().for_each(|line| line.failure = Some(format!("{error:#}")));
                }
            }
        }
    }
    super::scratch::remove(&setup.scratch.disk.join("run"))?;
    Ok(results.into_iter().flatten().collect())
}

/// Writes as many bytes through the page cache as a program's files will take there, and removes them.
///
/// A virtual machine may return free memory to its host within seconds, and then gets it back page by page as it
/// writes. That costs several times the write itself and would be charged to the program that runs after one without
/// page cache use. The kernel reuses the memory of a file just removed before any other, so the next program gets pages
/// that are already backed.
pub(super) fn claim_page_cache_memory(folder: &Path, bytes: u64) -> Result<()> {
    let warmed = bytes.saturating_add(bytes / 8).min(memory_bytes("MemAvailable") / 2);
    let path = folder.join("warm");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
    io::copy(&mut io::repeat(1).take(warmed), &mut file)?;
    drop(file);
    Ok(fs::remove_file(&path)?)
}

impl Line {
    pub(super) fn is_ours(&self) -> bool {
        self.program == OURS
    }

    fn has_run_enough(&self) -> bool {
        let spent: f64 = self.runs.iter().map(|run| run.seconds).sum();
        spent > SPENT_S_MAX && self.runs.len() >= ROUNDS_MIN
    }

    /// Returns true if the interquartile range of the runs is within [`INTERQUARTILE_SHARE_MAX`] of their median.
    fn is_steady(&self) -> bool {
        let mut seconds: Vec<f64> = self.runs.iter().map(|run| run.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        let last = seconds.len().saturating_sub(1);
        let Some((lower, upper)) = seconds.get(last / 4).zip(seconds.get((3 * last).div_ceil(4))) else { return true };
        let range = upper - lower;
        median(seconds).is_none_or(|median| range <= INTERQUARTILE_SHARE_MAX * median)
    }

    /// Returns the median of the runs in seconds, or `None` if the program failed.
    pub(super) fn seconds(&self) -> Option<f64> {
        median(self.runs.iter().map(|run| run.seconds).collect()).filter(|_| self.failure.is_none())
    }

    pub(super) fn core_seconds_per_gb(&self) -> Option<f64> {
        median(self.runs.iter().map(|run| run.core_seconds / (self.bytes as f64 / 1e9)).collect())
    }

    pub(super) fn rss_bytes(&self) -> Option<u64> {
        self.runs.iter().map(|run| run.rss_bytes).max()
    }

    fn cells(&self, best_peer: Option<f64>) -> Vec<String> {
        let mut cells = vec![self.program.to_owned(), self.setting.clone()];
        let Some(seconds) = self.seconds() else {
            cells.push(failure_cell(self.failure.as_deref().unwrap_or("not run")));
            return cells;
        };
        cells.extend([
            format!("{seconds:.2}"),
            spread(self.runs.iter().map(|run| run.seconds), 2) + if self.is_steady() { "" } else { ", unsteady" },
            self.runs.len().to_string(),
            format!("{:.0}", self.bytes as f64 / 1e6 / seconds),
            self.core_seconds_per_gb().map_or_else(String::new, |spent| format!("{spent:.2}")),
            self.rss_bytes().map_or_else(String::new, |bytes| format!("{}", bytes >> 20)),
            self.verified.into(),
            self.durable.into(),
            best_peer.map_or_else(String::new, |best| format!("{:.2}", best / seconds)),
        ]);
        cells
    }
}

/// Returns the seconds of the fastest peer among the lines for which `counts` returns true.
pub(super) fn best_peer(lines: &[Line], counts: impl Fn(&Line) -> bool) -> Option<f64> {
    lines.iter().filter(|line| !line.is_ours() && counts(line)).filter_map(Line::seconds).min_by(f64::total_cmp)
}

/// Returns our line with this setting.
pub(super) fn ours<'a>(lines: &'a [Line], setting: &str) -> Option<&'a Line> {
    lines.iter().find(|line| line.is_ours() && line.setting == setting)
}

pub(super) fn table(lines: &[Line], best_peer: Option<f64>) -> String {
    let header = [
        "program",
        "setting",
        "median s",
        "spread",
        "rounds",
        "MB/s",
        "core-s/GB",
        "peak RSS MiB",
        "verified",
        "durable",
        "x best peer",
    ];
    table::markdown(&header, &lines.iter().map(|line| line.cells(best_peer)).collect::<Vec<_>>())
}

/// Shortens a failure so that it fits into a table cell.
pub(super) fn failure_cell(failure: &str) -> String {
    failure.chars().take(60).collect()
}

/// Formats minimum and maximum with this many decimals: `1.00-4.00`.
pub(super) fn spread(values: impl Iterator<Item = f64> + Clone, digits: usize) -> String {
    let (min, max) = (values.clone().fold(f64::MAX, f64::min), values.fold(0.0, f64::max));
    format!("{min:.digits$}-{max:.digits$}")
}

/// Returns the median. For an even number of values it is the mean of the two in the middle.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(program: &'static str, seconds: &[f64]) -> Line {
        let runs = seconds.iter().map(|seconds| Usage { seconds: *seconds, core_seconds: 4.0, rss_bytes: 64 << 20 });
        let runs = runs.collect();
        let (setting, failure) = (String::new(), None);
        Line { program, setting, verified: "no", durable: "no", bytes: 2_000_000_000, runs, failure }
    }

    #[test]
    fn ratios_are_relative_to_the_fastest_peer() {
        let lines = [line(OURS, &[1.0, 4.0, 2.0]), line("slow", &[9.0]), line("fast", &[3.0, 5.0])];
        let best = best_peer(&lines, |_| true);
        assert_eq!(best, Some(4.0));
        let cells = lines[0].cells(best);
        assert_eq!(cells[2..8], ["2.00", "1.00-4.00, unsteady", "3", "1000", "2.00", "64"]);
        assert_eq!(cells[10], "2.00", "twice as fast");
        assert_eq!(lines[1].cells(best)[10], "0.44");
    }

    #[test]
    fn a_program_is_steady_if_the_middle_half_of_its_runs_is_close() {
        assert!(line("", &[]).is_steady() && line("", &[2.0]).is_steady());
        assert!(line("", &[9.0, 1.00, 1.05, 1.09, 0.1]).is_steady(), "single outliers do not count");
        assert!(!line("", &[9.0, 1.00, 1.05, 1.12, 0.1]).is_steady());
        assert!(!line("", &[1.0, 1.2]).is_steady());
    }

    #[test]
    fn a_failed_program_has_no_figures_and_is_not_the_best_peer() {
        let mut failed = line("fast", &[1.0]);
        failed.failure = Some("why".into());
        let lines = [failed, line("slow", &[9.0])];
        assert_eq!(best_peer(&lines, |_| true), Some(9.0));
        assert_eq!(lines[0].cells(None)[2..], ["why"]);
    }
}
