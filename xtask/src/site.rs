//! `cargo xtask site`: builds the documentation site, and tests the documentation.
//!
//! MkDocs builds the site from `docs/` into `target/site`. The tests run every command of the tutorials with the built
//! programs, check the links of all pages, and read the site in Chromium if it is installed. The Python packages come
//! from PyPI; the tests themselves need no network. `--recording` makes the terminal recording again.

use crate::page;
use crate::python::{self, BUILD_XTASK, NATIVE};
use crate::repository::{cargo, root, target_folder};
use crate::test::run;
use crate::venv::{self, Requirements};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::Command;

const RECORDING: &str = "docs/site/recording.py";
const TESTS: &str = "docs/tests";
/// The site, the tests, and the packages that the tutorials tell the reader to install.
const REQUIREMENTS: [Requirements; 4] = [
    Requirements::WithDependencies("docs/site/requirements.txt"),
    Requirements::WithDependencies("docs/tests/requirements.txt"),
    Requirements::WithDependencies("examples/fastapi/requirements.txt"),
    Requirements::Exact("docs/tests/requirements-no-deps.txt"),
];

/// Build the documentation site, and test the documentation
#[derive(Debug, Default, Args)]
pub struct Site {
    /// Serve the site on port 8000 of this machine and build it again when a page changes. Runs no test
    #[arg(long)]
    serve: bool,
    /// Write a terminal recording to this file, for the documentation. Runs no test
    #[arg(long, value_name = "FILE")]
    recording: Option<PathBuf>,
}

impl Site {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let target = target_folder()?;
        let venv = target.join("venv-site");
        venv::ensure(&venv, &REQUIREMENTS)?;
        let mut mkdocs = Command::new(venv.join("bin/mkdocs"));
        mkdocs.current_dir(root()).env("NO_MKDOCS_2_WARNING", "1");
        if self.serve {
            return run(mkdocs.arg("serve"));
        }
        let programs = target.join("debug");
        let python = venv.join("bin/python");
        if let Some(file) = &self.recording {
            build_programs()?;
            let mut recording = Command::new(&python);
            return run(recording.arg(root().join(RECORDING)).arg("--programs").arg(&programs).arg(file));
        }
        let site = target.join("site");
        run(mkdocs.args(["build", "--strict", "--site-dir"]).arg(&site))?;

        build_programs()?;
        // With the features of the tests, so that no dependency is built twice.
        run(cargo().args(["build", "--workspace", "--example", "tutorial"]))?;
        let wheel = python::pack(&python, &programs.join(NATIVE), &target.join("site-wheel"))?;
        venv::pip_install(&venv, &["--force-reinstall", "--no-deps", &wheel.to_string_lossy()])?;

        let mut pytest = Command::new(&python);
        pytest.args(["-m", "pytest", "-q", "-rs", "--color=no", "-p", "no:cacheprovider", TESTS]).current_dir(root());
        pytest.env("SITE_FOLDER", &site).env("SITE_PROGRAMS", &programs);
        pytest.envs(page::chromium().map(|program| ("SITE_CHROMIUM", program)));
        run(pytest.env("SITE_RUST_EXAMPLE", programs.join("examples/tutorial")))
    }
}

/// Builds the programs that the documentation names.
fn build_programs() -> Result<()> {
    let packages = ["modelcache-cli", "modelcache-testkit", "modelcache-python"];
    run(cargo().arg("build").args(packages.into_iter().flat_map(|name| ["--package", name])).args(BUILD_XTASK))
}
