//! Tests of the daemon with the clients of the Hub from PyPI, each in a Python environment of its own below `target/`.

use crate::repository::target_folder;
use crate::test::{run, test_runner};
use crate::venv::{self, Requirements};
use anyhow::Result;
use std::path::PathBuf;

/// Each environment with its packages. Every dependency is pinned. `hf_xet` has an environment of its own, so that each
/// client can be tested with and without it.
const ENVIRONMENTS: [(&str, &str); 5] = [
    ("hub-0.36", "crates/modelcache-server/tests/clients/requirements/hub-0.36.txt"),
    ("hub-1.31", "crates/modelcache-server/tests/clients/requirements/hub-1.31.txt"),
    ("hub-2.4", "crates/modelcache-server/tests/clients/requirements/hub-2.4.txt"),
    ("transformers", "crates/modelcache-server/tests/clients/requirements/transformers.txt"),
    ("hf-xet", "crates/modelcache-server/tests/clients/requirements/hf-xet.txt"),
];

/// Runs the tests.
///
/// # Errors
/// If an environment cannot be made, or a test fails.
pub(crate) fn test() -> Result<()> {
    let folder = environments()?;
    run(test_runner(Some("clients")).env("MODELCACHE_TEST_CLIENTS", folder))
}

/// Returns the folder with all environments, and makes those that are missing or have other packages.
fn environments() -> Result<PathBuf> {
    let folder = target_folder()?.join("clients");
    for (name, file) in ENVIRONMENTS {
        venv::ensure(&folder.join(name), &[Requirements::Exact(file)])?;
    }
    Ok(folder)
}
