//! `cargo xtask deploy`: tests the Helm chart, the manifests made from it, the files for ECS and Docker Compose, the
//! dashboard and the alert rules.
//!
//! Helm comes from PyPI as a library. No cluster and no container runtime are needed: the tests run the command lines
//! of the containers with the real programs. With `--write`, the plain manifests are rendered from the chart first.

use crate::monitoring;
use crate::python::BUILD_XTASK;
use crate::repository::{cargo, root, target_folder};
use crate::test::run;
use crate::venv::{self, Requirements};
use anyhow::Result;
use clap::Args;
use std::process::Command;

const TESTS: &str = "deploy/tests";
const REQUIREMENTS: [Requirements; 2] = [
    Requirements::WithDependencies("deploy/tests/requirements.txt"),
    Requirements::WithDependencies("deploy/tests/requirements-monitoring.txt"),
];

/// Test the Helm chart and the other files below deploy/
#[derive(Debug, Default, Args)]
pub struct Deploy {
    /// Write the plain manifests in deploy/kubernetes first
    #[arg(long)]
    write: bool,
    /// Arguments for pytest, for instance -k NAME
    #[arg(last = true)]
    pytest: Vec<String>,
}

impl Deploy {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let venv = target_folder()?.join("venv-deploy");
        venv::ensure(&venv, &REQUIREMENTS)?;
        let python = || {
            let mut command = Command::new(venv.join("bin/python"));
            command.current_dir(root());
            command
        };
        if self.write {
            run(python().arg(root().join(TESTS).join("render.py")))?;
        }
        run(cargo()
            .args(["build", "--package", "modelcache-cli", "--package", "modelcache-testkit"])
            .args(BUILD_XTASK))?;
        let programs = target_folder()?.join("debug");
        let mut pytest = python();
        pytest.args(["-m", "pytest", "-q", "--color=no", TESTS]).args(&self.pytest);
        pytest.env("MODELCACHE", programs.join("modelcache")).env("TESTKIT", programs.join("testkit"));
        run(pytest.envs(monitoring::prometheus()?))
    }
}
