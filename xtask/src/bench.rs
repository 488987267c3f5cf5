//! `cargo xtask bench`: builds and runs crates/modelcache-bench, which is not needed for the other tasks.

use crate::repository::cargo;
use crate::test::run;
use anyhow::Result;
use clap::Args;
use std::ffi::OsString;

/// Measure modelcache and its peers, and write docs/benchmarks.md
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct Bench {
    /// Arguments of the benchmark program; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl Bench {
    /// Runs the benchmarks.
    ///
    /// # Errors
    /// A row could not be measured.
    pub fn run(&self) -> Result<()> {
        run(cargo().args(["run", "--package", "modelcache-bench", "--"]).args(&self.arguments))
    }
}
