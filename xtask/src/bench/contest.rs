//! Programs that do the same, measured in turn: a round runs each of them once.
//!
//! Machines drift, so that only what took turns is compared. A slow program runs fewer rounds, which its line tells: it
//! leaves when it has taken [`SPENT_S_MAX`] and run [`ROUNDS_MIN`] times. One that fails leaves, with the reason.

use super::machine::memory_bytes;
use super::setup::Setup;
use super::usage::Run;
use crate::table;
use anyhow::Result;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read};
use std::path::Path;

/// How long one program may take in one contest, in seconds.
const SPENT_S_MAX: f64 = 25.0;
/// One run is no measurement.
const ROUNDS_MIN: usize = 2;
/// What one run brings stays until the end of its contest, up to this many bytes: an ext4 without a journal passes over
/// each inode that was removed in the last minutes, at the cost of whoever makes files next.
const KEPT_BYTES_MAX: u64 = 64 << 20;

/// One program with one setting.
pub(super) struct Entry<'a> {
    pub(super) who: &'static str,
    pub(super) setting: String,
    pub(super) checked: &'static str,
    /// What one run is measured as: what is added to the setting, and whether the result is durable then.
    pub(super) steps: Vec<(&'static str, &'static str)>,
    /// Runs once with a new folder to work in; one measure a step, each of which includes the steps before.
    pub(super) run: Racer<'a>,
}

/// A run of a program in a folder of its own.
pub(super) type Racer<'a> = Box<dyn Fn(&Path) -> Result<Vec<Run>> + 'a>;

pub(super) const OURS: &str = "modelcache";

/// What came of one step of an entry.
pub(super) struct Line {
    pub(super) who: &'static str,
    pub(super) setting: String,
    checked: &'static str,
    durable: &'static str,
    bytes: u64,
    pub(super) runs: Vec<Run>,
    failure: Option<String>,
}

/// Runs the entries, each of which moves `bytes`.
pub(super) fn contest(setup: &Setup, bytes: u64, entries: &[Entry<'_>]) -> Result<Vec<Line>> {
    in_turn(setup, bytes, entries, || Ok(()))
}

/// The same where the bytes are written to disk: all find as much memory for the page cache, whoever ran before.
pub(super) fn contest_to_disk(setup: &Setup, bytes: u64, entries: &[Entry<'_>]) -> Result<Vec<Line>> {
    in_turn(setup, bytes, entries, || warm_page_cache(&setup.scratch.disk, bytes))
}

fn in_turn(setup: &Setup, bytes: u64, entries: &[Entry<'_>], prepare: impl Fn() -> Result<()>) -> Result<Vec<Line>> {
    let lines = |entry: &Entry<'_>| -> Vec<Line> {
        let line = |(suffix, durable): &(&str, &'static str)| Line {
            who: entry.who,
            setting: format!("{}{suffix}", entry.setting),
            checked: entry.checked,
            durable,
            bytes,
            runs: Vec::new(),
            failure: None,
        };
        entry.steps.iter().map(line).collect()
    };
    let mut results: Vec<Vec<Line>> = entries.iter().map(lines).collect();
    for round in 1..=setup.rounds {
        for (at, (entry, lines)) in entries.iter().zip(&mut results).enumerate() {
            let out = lines.iter().any(|line| line.failure.is_some());
            if out || lines.last().is_some_and(Line::has_run_enough) {
                continue;
            }
            let name = if bytes > KEPT_BYTES_MAX { "run".to_owned() } else { format!("run/{round}-{at}") };
            let folder = setup.scratch.fresh(&name)?;
            prepare()?;
            match (entry.run)(&folder) {
                Ok(runs) => {
                    let last = runs.last().copied().unwrap_or_default();
                    eprintln!("  {round}  {:<16} {:<24} {:.2} s", entry.who, entry.setting, last.seconds);
                    lines.iter_mut().zip(runs).for_each(|(line, run)| line.runs.push(run));
                }
                Err(error) => {
                    eprintln!("  {round}  {:<16} {:<24} {error:#}", entry.who, entry.setting);
                    lines.iter_mut().for_each(|line| line.failure = Some(format!("{error:#}")));
                }
            }
        }
    }
    super::scratch::remove(&setup.scratch.disk.join("run"))?;
    Ok(results.into_iter().flatten().collect())
}

/// Writes as much through the page cache as a program's files will take there, and removes it.
///
/// A virtual machine that gives back what is free within seconds is given it page by page when it writes: several times
/// the price of the write itself, to be paid by whoever comes after a program that takes none. Memory that a file has just
/// left is taken again first, other memory is not.
fn warm_page_cache(folder: &Path, bytes: u64) -> Result<()> {
    let warmed = bytes.saturating_add(bytes / 8).min(memory_bytes("MemAvailable") / 2);
    let path = folder.join("warm");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
    io::copy(&mut io::repeat(1).take(warmed), &mut file)?;
    drop(file);
    Ok(fs::remove_file(&path)?)
}

impl Line {
    pub(super) fn is_ours(&self) -> bool {
        self.who == OURS
    }

    fn has_run_enough(&self) -> bool {
        let spent: f64 = self.runs.iter().map(|run| run.seconds).sum();
        spent > SPENT_S_MAX && self.runs.len() >= ROUNDS_MIN
    }

    /// The middle of its runs, by seconds; `None` where it failed.
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
        let mut cells = vec![self.who.to_owned(), self.setting.clone()];
        let Some(seconds) = self.seconds() else {
            cells.push(failure_cell(self.failure.as_deref().unwrap_or("not run")));
            return cells;
        };
        cells.extend([
            format!("{seconds:.2}"),
            spread(self.runs.iter().map(|run| run.seconds), 2),
            self.runs.len().to_string(),
            format!("{:.0}", self.bytes as f64 / 1e6 / seconds),
            self.core_seconds_per_gb().map_or_else(String::new, |spent| format!("{spent:.2}")),
            self.rss_bytes().map_or_else(String::new, |bytes| format!("{}", bytes >> 20)),
            self.checked.into(),
            self.durable.into(),
            best_peer.map_or_else(String::new, |best| format!("{:.2}", best / seconds)),
        ]);
        cells
    }
}

/// The fastest of the others among the lines that `counts` lets pass.
pub(super) fn best_peer(lines: &[Line], counts: impl Fn(&Line) -> bool) -> Option<f64> {
    lines.iter().filter(|line| !line.is_ours() && counts(line)).filter_map(Line::seconds).min_by(f64::total_cmp)
}

/// Our line with this setting.
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
        "checked",
        "durable",
        "x best peer",
    ];
    table::markdown(&header, &lines.iter().map(|line| line.cells(best_peer)).collect::<Vec<_>>())
}

/// Why there are no figures, as far as a cell holds it.
pub(super) fn failure_cell(failure: &str) -> String {
    failure.chars().take(60).collect()
}

/// The least and the most of them, with so many digits.
pub(super) fn spread(values: impl Iterator<Item = f64> + Clone, digits: usize) -> String {
    let (least, most) = (values.clone().fold(f64::MAX, f64::min), values.fold(0.0, f64::max));
    format!("{least:.digits$}-{most:.digits$}")
}

/// The middle one; of an even number, the mean of the middle two.
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

    fn line(who: &'static str, seconds: &[f64]) -> Line {
        let runs = seconds.iter().map(|seconds| Run { seconds: *seconds, core_seconds: 4.0, rss_bytes: 64 << 20 });
        let runs = runs.collect();
        let (setting, failure) = (String::new(), None);
        Line { who, setting, checked: "no", durable: "no", bytes: 2_000_000_000, runs, failure }
    }

    #[test]
    fn ratios_are_to_the_fastest_of_the_others() {
        let lines = [line(OURS, &[1.0, 4.0, 2.0]), line("slow", &[9.0]), line("fast", &[3.0, 5.0])];
        let best = best_peer(&lines, |_| true);
        assert_eq!(best, Some(4.0));
        let cells = lines[0].cells(best);
        assert_eq!(cells[2..8], ["2.00", "1.00-4.00", "3", "1000", "2.00", "64"]);
        assert_eq!(cells[10], "2.00", "twice as fast");
        assert_eq!(lines[1].cells(best)[10], "0.44");
    }

    #[test]
    fn one_that_fails_has_no_figure_and_is_no_best() {
        let mut failed = line("fast", &[1.0]);
        failed.failure = Some("why".into());
        let lines = [failed, line("slow", &[9.0])];
        assert_eq!(best_peer(&lines, |_| true), Some(9.0));
        assert_eq!(lines[0].cells(None)[2..], ["why"]);
    }
}
