//! `cargo xtask page`: tests the status page of the daemon in headless Chromium.
//!
//! Chromium is Debian's package, because the browsers that Playwright downloads are not on package registries. If it is
//! not installed, the test is skipped, and the package is named. Playwright comes from PyPI.

use crate::debian::on_path;
use crate::python::BUILD_XTASK;
use crate::repository::{cargo, root, target_folder};
use crate::test::run;
use crate::venv::{self, Requirements};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::Command;

const FOLDER: &str = "crates/modelcache-server/tests/page";
const REQUIREMENTS: &str = "crates/modelcache-server/tests/page/requirements.txt";
/// Names of the program in Debian and other distributions.
const CHROMIUM: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// Test the status page of the daemon in headless Chromium
#[derive(Debug, Default, Args)]
pub struct Page {
    /// Write a screenshot of the page to this file, for the documentation
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
}

impl Page {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let Some(chromium) = chromium() else {
            println!("chromium is not on the PATH: the test of the status page is skipped");
            println!("install it, on Debian and Ubuntu: apt-get install chromium");
            return Ok(());
        };
        let venv = target_folder()?.join("venv-page");
        venv::ensure(&venv, &[Requirements::WithDependencies(REQUIREMENTS)])?;
        run(cargo()
            .args(["build", "--package", "modelcache-cli", "--package", "modelcache-testkit"])
            .args(BUILD_XTASK))?;
        let programs = target_folder()?.join("debug");
        let mut test = Command::new(venv.join("bin/python"));
        test.arg(root().join(FOLDER).join("test_page.py")).arg("--chromium").arg(chromium);
        test.arg("--modelcache").arg(programs.join("modelcache")).arg("--testkit").arg(programs.join("testkit"));
        if let Some(file) = &self.screenshot {
            test.arg("--screenshot").arg(file);
        }
        run(&mut test)
    }
}

/// Returns the path of Chromium, or `None` if it is not on the `PATH`.
pub(crate) fn chromium() -> Option<PathBuf> {
    CHROMIUM.iter().find_map(on_path)
}
