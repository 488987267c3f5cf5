//! A call made again and again in one process, as the scripts tell of it: hits, which take microseconds.

use crate::bench::contest::median;
use crate::bench::usage::{Figures, Run};
use anyhow::Result;
use std::process::Command;

/// What a process told of its calls.
pub(super) struct Calls {
    pub(super) p10_us: f64,
    pub(super) p50_us: f64,
    pub(super) p90_us: f64,
    pub(super) p99_us: f64,
    /// Core-microseconds of one, of all threads.
    pub(super) core_us: f64,
    /// The whole process, with its start.
    pub(super) process: Run,
}

impl Calls {
    /// Runs a script that makes them.
    pub(super) fn of(command: &mut Command) -> Result<Self> {
        let (process, told) = Figures::of(command)?;
        Ok(Self {
            p10_us: told.figure("p10_us")?,
            p50_us: told.figure("p50_us")?,
            p90_us: told.figure("p90_us")?,
            p99_us: told.figure("p99_us")?,
            core_us: told.figure("core_us")?,
            process,
        })
    }
}

/// The middle of one figure of several processes.
pub(super) fn middle(calls: &[Calls], figure: fn(&Calls) -> f64) -> Option<f64> {
    median(calls.iter().map(figure).collect())
}
