//! Checks that programs and tests use the same features of each dependency, so that no crate is built twice.
//!
//! Cargo enables the features that the selected packages need. A command that builds programs only must select the same
//! features as one that builds the tests of the whole workspace. Otherwise the crates that differ, and all crates that
//! depend on them, are built once more.

use crate::python::BUILD_XTASK;
use crate::repository::{cargo, printed_by};
use anyhow::{Result, ensure};
use std::collections::BTreeSet;

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
    let printed = String::from_utf8(printed_by(&mut command)?)?;
    // A package whose dependencies were printed before is marked.
    Ok(printed.lines().map(|line| line.trim_end_matches("(*)").trim_end().to_owned()).collect())
}
