//! Figures of a call that a script repeats in one process, because a hit takes only microseconds.

use crate::comparison::median;
use crate::usage::{Figures, Usage};
use anyhow::Result;
use std::process::Command;

/// Figures that a script reports for its calls.
pub(super) struct CallTimes {
    pub(super) p10_us: f64,
    pub(super) p50_us: f64,
    pub(super) p90_us: f64,
    pub(super) p99_us: f64,
    /// Core-microseconds per call, of all threads.
    pub(super) core_us: f64,
    /// Usage of the whole process, including its start.
    pub(super) process: Usage,
}

impl CallTimes {
    /// Runs a script that makes the calls.
    pub(super) fn run(command: &mut Command) -> Result<Self> {
        let (process, figures) = Figures::run(command)?;
        Ok(Self {
            p10_us: figures.get("p10_us")?,
            p50_us: figures.get("p50_us")?,
            p90_us: figures.get("p90_us")?,
            p99_us: figures.get("p99_us")?,
            core_us: figures.get("core_us")?,
            process,
        })
    }
}

/// Returns the median of one figure over several processes.
pub(super) fn median_of(calls: &[CallTimes], figure: fn(&CallTimes) -> f64) -> Option<f64> {
    median(calls.iter().map(figure).collect())
}
