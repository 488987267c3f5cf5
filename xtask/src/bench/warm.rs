//! Hits: what it costs to be given the path of an artifact that is on disk.

use super::median_and_spread;
use super::usage::measure;
use crate::repository::{Build, build_modelcache, cargo};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::{Command, Stdio};

/// The whole command, from exec to exit.
pub(super) fn command(runs: usize) -> Result<Vec<String>> {
    let program = build_modelcache(Build::Release)?;
    let folder = tempfile::tempdir()?;
    let given = folder.path().join("model.bin");
    std::fs::write(&given, vec![7; 1 << 20])?;
    let run = |arguments: &[&str]| measure(in_folder(&mut Command::new(&program), folder.path()).args(arguments));
    run(&["put", "bench/model@1", &given.display().to_string()])?;
    let times: Vec<f64> =
        (0..runs).map(|_| Ok(run(&["get", "bench/model@1"])?.seconds * 1e3)).collect::<Result<_>>()?;
    let [median, spread] = median_and_spread(times, |ms| format!("{ms:.1} ms"));
    Ok(vec!["warm get, whole command".into(), median, spread, "".into(), format!("{runs} runs")])
}

fn in_folder<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    command.env("MODEL_CACHE_DIR", folder.join("cache")).env("MODEL_CACHE_MIN_FREE_BYTES", "0")
}

/// In process, by the library's own benchmark: one line a row, cells split by `|`.
pub(super) fn in_process(quick: bool) -> Result<Vec<Vec<String>>> {
    let mut command = cargo();
    command.args(["bench", "--quiet", "--package", "modelcache", "--bench", "directory"]);
    if quick {
        command.args(["--", "--quick"]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the benchmark of the directory failed");
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .lines()
        .filter(|line| line.contains('|'))
        .map(|line| line.split('|').map(str::to_owned).collect())
        .collect())
}
