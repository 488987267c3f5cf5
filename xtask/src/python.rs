//! `cargo xtask python`: builds the Python package, installs it into its own environment, checks its types and tests
//! it.
//!
//! Cargo builds the native module together with the other programs of this workspace, so that no dependency is built
//! twice, and a script of the tests packs it into a wheel. The tests use the installed package. `--wheel` tests a wheel
//! that is already built, for example that of `cargo xtask dist`. Needs Python 3.10 or newer.

use crate::repository::{cargo, root, target_folder};
use crate::test::run;
use crate::venv::{self, Requirements, pip_install};
use anyhow::{Context, Result};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) const PACKAGE: &str = "crates/modelcache-python";
const REQUIREMENTS: [Requirements; 2] = [
    Requirements::WithDependencies("crates/modelcache-python/tests/requirements.txt"),
    Requirements::Exact("crates/modelcache-python/tests/requirements-no-deps.txt"),
];

/// Build, install and test the Python package
#[derive(Debug, Default, Args)]
pub struct Python {
    /// Test this wheel, and build none
    #[arg(long, value_name = "FILE")]
    wheel: Option<PathBuf>,
    /// Arguments for pytest, for instance -k NAME
    #[arg(last = true)]
    pytest: Vec<String>,
}

impl Python {
    /// Tests a wheel that is already built.
    pub(crate) fn of_wheel(wheel: PathBuf) -> Self {
        Self { wheel: Some(wheel), ..Self::default() }
    }

    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let target = target_folder()?;
        let venv = target.join("venv-python");
        venv::ensure(&venv, &REQUIREMENTS)?;
        let python = venv.join("bin/python");
        // One cargo command for all packages, so that shared dependencies get the same features.
        run(cargo()
            .args(["build", "--package", "modelcache-python", "--package", "modelcache-testkit"])
            .args(BUILD_XTASK))?;
        let wheel = match &self.wheel {
            Some(wheel) => wheel.canonicalize().with_context(|| format!("there is no wheel {}", wheel.display()))?,
            None => pack(&python, &target.join("debug").join(NATIVE), &target.join("python-wheel"))?,
        };
        pip_install(&venv, &["--force-reinstall", "--no-deps", &wheel.to_string_lossy()])?;
        run(in_root(&python).args(["-m", "mypy"]).args(TYPE_CHECKED).current_dir(root().join(PACKAGE)))?;
        let stubtest = ["-m", "mypy.stubtest", "modelcache", "--mypy-config-file", "pyproject.toml"];
        run(in_root(&python).args(stubtest).current_dir(root().join(PACKAGE)))?;
        let pyright = ["-m", "basedpyright", "--warnings", "--pythonpath"];
        run(in_root(&python).args(pyright).arg(&python).current_dir(root().join(PACKAGE)))?;
        let mut pytest = in_root(&python);
        pytest.args(["-m", "pytest", "-q", "--color=no"]).args(&self.pytest);
        run(pytest.env("TESTKIT", target.join("debug/testkit")).current_dir(root().join(PACKAGE)))
    }
}

/// Builds xtask as well: its Cargo.toml enables the dependency features that the tests need, so that no dependency is
/// built twice.
pub const BUILD_XTASK: [&str; 2] = ["--package", "xtask"];
/// File name of the native module that cargo builds.
pub const NATIVE: &str = "libmodelcache_native.so";
/// Paths that mypy checks.
const TYPE_CHECKED: [&str; 3] = ["python/modelcache", "tests", "../../examples/fastapi"];

/// Packs a built native module into a wheel and returns the path of the wheel. Empties `folder` first.
pub fn pack(python: &Path, native: &Path, folder: &Path) -> Result<PathBuf> {
    empty_folder(folder)?;
    run(in_root(python).arg(root().join(PACKAGE).join("tests/wheel.py")).arg(native).arg(folder))?;
    wheel_in(folder)
}

/// Creates an empty folder. Replaces an existing one.
pub(crate) fn empty_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    Ok(fs::create_dir_all(folder)?)
}

/// Returns the path of the wheel in `folder`.
fn wheel_in(folder: &Path) -> Result<PathBuf> {
    Ok(fs::read_dir(folder)?.next().context("no wheel was built")??.path())
}

fn in_root(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}
