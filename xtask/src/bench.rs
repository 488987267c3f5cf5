//! `cargo xtask bench`: the figures of the README, measured.
//!
//! One row so far: a warm `get`, the whole command from exec to exit, in the release profile.

use crate::repository::{self, Build};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Measure; prints a table
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// How many times each command is run
    #[arg(long, default_value_t = 50)]
    runs: usize,
}

impl Bench {
    pub(crate) fn run(&self) -> Result<()> {
        ensure!(self.runs > 0, "--runs is at least 1");
        let binary = repository::build_modelcache(Build::Release)?;
        let folder = tempfile::tempdir()?;
        let given = folder.path().join("model.bin");
        std::fs::write(&given, vec![7; 1 << 20])?;
        once(&binary, folder.path(), &["put", "bench/model@1", &given.display().to_string()])?;

        let mut times: Vec<Duration> =
            (0..self.runs).map(|_| once(&binary, folder.path(), &["get", "bench/model@1"])).collect::<Result<_>>()?;
        times.sort();
        let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1000.0;
        println!("| warm get, whole command | median | p90 | runs |\n|---|---|---|---|");
        println!("| 1 file, one process each | {:.1} ms | {:.1} ms | {} |", at(50), at(90), times.len());
        Ok(())
    }
}

/// Runs the binary in a directory of its own; how long it took.
fn once(binary: &Path, folder: &Path, arguments: &[&str]) -> Result<Duration> {
    let started = Instant::now();
    let status = Command::new(binary)
        .args(arguments)
        .env("MODEL_CACHE_DIR", folder.join("cache"))
        .env("MODEL_CACHE_MIN_FREE_BYTES", "0")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", binary.display()))?;
    ensure!(status.success(), "modelcache {} failed", arguments.join(" "));
    Ok(started.elapsed())
}
