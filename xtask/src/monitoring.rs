//! Prometheus and promtool, for the tests of the dashboard and of the rules: `deploy/tests/test_monitoring.py`.

use crate::debian::Package;
use anyhow::Result;
use std::path::PathBuf;

/// The variables in which the tests expect the paths, with the programs. Both are in one package.
const PROGRAMS: [(&str, Package); 2] = [
    ("MODELCACHE_TEST_PROMETHEUS", package_with("usr/bin/prometheus")),
    ("MODELCACHE_TEST_PROMTOOL", package_with("usr/bin/promtool")),
];

const fn package_with(program: &'static str) -> Package {
    Package { name: "prometheus", program, libraries: &[] }
}

/// Returns the variables of the tests with the paths of Prometheus and promtool, as [`std::process::Command::envs`]
/// takes them. Downloads the package if necessary. A program that cannot be had here is left out, and its tests are
/// skipped.
///
/// # Errors
/// If the package cannot be downloaded, or does not have a program.
pub fn prometheus() -> Result<Vec<(&'static str, PathBuf)>> {
    let mut variables = Vec::new();
    for (variable, package) in PROGRAMS {
        if let Some(program) = package.program()? {
            variables.push((variable, program.path));
        }
    }
    Ok(variables)
}
