//! `cargo xtask fuzz`: fuzzes every parser with libFuzzer, on the regular toolchain.
//!
//! libFuzzer stores inputs that reach new code below `target/fuzz/corpus/`, and failing inputs below
//! `target/fuzz/failures/`. `cargo xtask fuzz TARGET --input FILE` runs a failing input again. The seeds in
//! `fuzz/seeds/` are only read.

use crate::repository::{cargo, root, target_folder};
use crate::table;
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiler flags that record the branches an input takes, for libFuzzer.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// Longest input, in bytes. The parsers read small documents.
const INPUT_BYTES_MAX: &str = "16384";
/// Seconds after which an input counts as a failure.
const INPUT_SECONDS_MAX: &str = "10";
/// Memory limit, in MiB.
const MEMORY_MIB_MAX: &str = "2048";

/// Fuzz the parsers of untrusted input
#[derive(Debug, Args)]
pub struct Fuzz {
    /// Fuzz only this target, instead of all
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run this input once, instead of fuzzing
    #[arg(long, requires = "target")]
    input: Option<PathBuf>,
}

impl Fuzz {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let targets = targets()?;
        let chosen: Vec<&String> =
            targets.iter().filter(|name| self.target.as_ref().is_none_or(|target| target == *name)).collect();
        ensure!(!chosen.is_empty(), "unknown fuzz target; the targets are {}", targets.join(", "));
        let folder = target_folder()?.join("fuzz");
        let programs = build(&folder)?;
        let mut rows = Vec::new();
        let mut failed = Vec::new();
        for name in chosen {
            let is_ok = self.fuzz(name, &programs, &folder)?;
            rows.push(vec![name.clone(), self.seconds.to_string(), if is_ok { "ok" } else { "FAILED" }.into()]);
            if !is_ok {
                failed.push(name.as_str());
            }
        }
        println!("\n{}", table::markdown(&["target", "seconds", "result"], &rows));
        ensure!(
            failed.is_empty(),
            "the failing inputs of {} are below {}",
            failed.join(", "),
            folder.join("failures").display()
        );
        Ok(())
    }

    /// Fuzzes one target, or runs its input. Returns true if no input failed.
    fn fuzz(&self, name: &str, programs: &Path, folder: &Path) -> Result<bool> {
        let (corpus, failures) = (folder.join("corpus").join(name), folder.join("failures").join(name));
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&failures)?;
        println!("\n== {name}");
        let mut command = Command::new(programs.join(name));
        if let Some(input) = &self.input {
            command.arg(input);
        } else {
            command.args([
                format!("-max_total_time={}", self.seconds),
                format!("-max_len={INPUT_BYTES_MAX}"),
                format!("-timeout={INPUT_SECONDS_MAX}"),
                format!("-rss_limit_mb={MEMORY_MIB_MAX}"),
                format!("-artifact_prefix={}/", failures.display()),
                "-print_final_stats=1".into(),
                "-verbosity=0".into(),
            ]);
            command.arg(&corpus);
            let seeds = root().join("fuzz/seeds").join(name);
            if seeds.exists() {
                command.arg(seeds);
            }
        }
        Ok(command.status().with_context(|| format!("cannot run {name}"))?.success())
    }
}

/// Returns the names of all targets: one per file in `fuzz/targets`.
fn targets() -> Result<Vec<String>> {
    let entries = fs::read_dir(root().join("fuzz/targets")).context("cannot list fuzz/targets")?;
    let mut names: Vec<String> = entries
        .map(|entry| Ok(entry?.path().file_stem().unwrap_or_default().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// Builds all targets and returns the folder of the programs. Passes `--target`, so that the flags do not apply to
/// build scripts and procedural macros.
fn build(folder: &Path) -> Result<PathBuf> {
    let host = String::from_utf8(Command::new("rustc").arg("-vV").output().context("cannot run rustc")?.stdout)?;
    let host =
        host.lines().find_map(|line| line.strip_prefix("host: ")).context("`rustc -vV` prints no host")?.to_owned();
    let mut command = cargo();
    command.args(["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", &host, "--target-dir"]);
    command.arg(folder).env("RUSTFLAGS", FLAGS);
    ensure!(command.status().context("cannot run cargo")?.success(), "the fuzz targets do not build");
    Ok(folder.join(host).join("release"))
}
