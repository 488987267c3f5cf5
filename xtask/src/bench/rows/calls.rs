//! A call made again and again in one process, as the scripts tell of it: hits, which take microseconds.

use crate::bench::contest::median;
use crate::bench::usage::{Run, run};
use anyhow::{Context, Result};
use serde_json::Value;
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
        let (process, printed) = run(command)?;
        let told: Value = serde_json::from_str(&printed).context("the script told no figures")?;
        let figure = |name: &str| told[name].as_f64().with_context(|| format!("the script tells no {name}"));
        Ok(Self {
            p10_us: figure("p10_us")?,
            p50_us: figure("p50_us")?,
            p90_us: figure("p90_us")?,
            p99_us: figure("p99_us")?,
            core_us: figure("core_us")?,
            process,
        })
    }
}

/// The middle of one figure of several processes.
pub(super) fn middle(calls: &[Calls], figure: fn(&Calls) -> f64) -> Option<f64> {
    median(calls.iter().map(figure).collect())
}
