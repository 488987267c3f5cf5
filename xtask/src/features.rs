//! Checks that programs and tests use the same features of each dependency, so that no crate is built twice.
//!
//! Cargo enables the features that the selected packages need. A command that builds programs only must select the same
//! features as one that builds the tests of the whole workspace. Otherwise the crates that differ, and all crates that
//! depend on them, are built once more.

use crate::python::BUILD_XTASK;
use crate::repository::cargo;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::process::Stdio;

/// Compares the features that a build of xtask uses with those of all tests.
pub(crate) fn check() -> Result<()> {
    let programs = packages(&[&BUILD_XTASK[..], &["--edges", "no-dev"]].concat())?;
    let tests = packages(&["--workspace"])?;
    let differing: Vec<_> = programs.difference(&tests).collect();
    differing.iter().for_each(|package| println!("{package}"));
    ensure!(
        differing.is_empty(),
        "tests use other features of these packages than programs do; enable the features in xtask/Cargo.toml as well"
    );
    println!("programs and tests use the same features of {} packages", programs.len());
    Ok(())
}

/// Returns the packages that a cargo command with these arguments builds, each as `name version features`.
fn packages(selection: &[&str]) -> Result<BTreeSet<String>> {
    let mut command = cargo();
    command.args(["tree", "--prefix", "none", "--format", "{p} {f}"]).args(selection);
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo tree failed");
    // A package whose dependencies were printed before is marked.
    let lines = std::str::from_utf8(&output.stdout)?.lines();
    Ok(lines.map(|line| line.trim_end_matches("(*)").trim_end().to_owned()).collect())
}
