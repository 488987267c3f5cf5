//! `cargo xtask bench`: the figures of the documentation, measured, and printed as one table.
//!
//! Everything runs against servers in this process, on loopback. Rivals come from PyPI into an environment of their own
//! below `target/` and run in the same rounds as we do, in turn, because machines drift. Times are medians with their
//! spread; core-seconds are those of the program measured, not of the server. Nothing here is asserted.

mod herd;
mod pull;
mod usage;
mod warm;

use crate::table;
use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

/// Measure; prints a table
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Smaller data and fewer rounds: a look, not a figure
    #[arg(long)]
    quick: bool,
    /// Only these rows
    #[arg(long, value_enum, value_name = "ROW")]
    only: Vec<Row>,
    /// How many rounds, each of which runs every program once
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Row {
    /// A warm get, the whole command
    Warm,
    /// A warm get in process, and a directory with 10,000 artifacts
    Directory,
    /// One large file from S3 to disk, beside s5cmd
    Pull,
    /// 50 processes that want the same
    Herd,
}

impl Bench {
    pub(crate) fn run(&self) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds is at least 1");
        let rounds = if self.quick { self.rounds.min(2) } else { self.rounds };
        let wanted = |row| self.only.is_empty() || self.only.contains(&row);
        let mut rows = Vec::new();
        if wanted(Row::Warm) {
            rows.push(warm::command(if self.quick { 10 } else { 100 })?);
        }
        if wanted(Row::Directory) {
            rows.extend(warm::in_process(self.quick)?);
        }
        if wanted(Row::Pull) {
            rows.extend(pull::rows(if self.quick { 256 << 20 } else { 4 << 30 }, rounds)?);
        }
        if wanted(Row::Herd) {
            rows.extend(herd::rows(if self.quick { 64 << 20 } else { 1 << 30 })?);
        }
        println!("\n{}", machine());
        println!("\n{}", table::markdown(&["what", "median", "spread", "core-s/GB", "notes"], &rows));
        Ok(())
    }
}

/// The machine the figures are of.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} cores, {}", model.trim_start_matches([':', ' ', '\t']))
}

/// The middle one of `values`, and the least and greatest of them, each shown by `show`.
fn median_and_spread(mut values: Vec<f64>, show: impl Fn(f64) -> String) -> [String; 2] {
    values.sort_by(f64::total_cmp);
    let (least, greatest) = (values[0], values[values.len() - 1]);
    [show(values[values.len() / 2]), format!("{}-{}", show(least), show(greatest))]
}
