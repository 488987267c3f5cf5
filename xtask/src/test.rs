//! `cargo xtask test`: runs all checks of this repository.
//!
//! The stages run from cheap to expensive. After the first failure, no further stage runs. A table at the end shows the
//! result of each stage. Needs cargo, git and Python, and uses `cargo nextest` if it is installed. The stages that
//! build programs or tests use the same features, so that no dependency is built twice. Without Chromium, the test of
//! the status page is skipped.

use crate::docs::Docs;
use crate::python::Python;
use crate::repository::{cargo, shell_line, target_folder};
use crate::venv::{self, Requirements};
use crate::{debian, deploy, dist, features, hub_clients, page, site, table, tidy};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Python packages for the tests.
const REQUIREMENTS: [Requirements; 2] = [
    Requirements::WithDependencies("crates/modelcache-cli/tests/python/requirements.txt"),
    Requirements::Exact("crates/modelcache-cli/tests/python/requirements-no-deps.txt"),
];

/// Run all checks: lints, documentation, tests
#[derive(Debug, Args)]
pub struct Test {
    /// Run only the tests: no lints, no documentation, no Python environment
    #[arg(long)]
    quick: bool,
}

impl Test {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let mut stages = Stages::default();
        let (mut venv, mut registry, mut bsdtar) = (None, None, None);
        if !self.quick {
            stages.run("format", || run(cargo().args(["fmt", "--all", "--check"])));
            stages.run("tidy", tidy::check);
            stages.run("features", features::check);
            stages.run("generated docs", || Docs { check: true }.run());
            // Clippy runs twice: with the default features, and without them.
            let clippy = |what| run(cargo().args(["clippy", "--workspace", what, "--", "-D", "warnings"]));
            stages.run("clippy", || clippy("--all-targets").and_then(|()| clippy("--no-default-features")));
            let doc = ["doc", "--workspace", "--no-deps"];
            stages.run("rustdoc", || run(cargo().args(doc).env("RUSTDOCFLAGS", "-D warnings")));
            stages.run("python packages", || {
                let folder = target_folder()?.join("venv");
                venv::ensure(&folder, &REQUIREMENTS)?;
                venv = Some(folder);
                Ok(())
            });
            stages.run("python package", || Python::default().run());
            stages.run("status page", || page::Page::default().run());
            stages.run("deployment", || deploy::Deploy::default().run());
            stages.run("documentation site", || site::Site::default().run());
            stages.run("release files", || dist::Dist::of_debug_build().run());
            stages.run("docker-registry", || {
                let without = "tests that need a registry are skipped; install CNCF Distribution for them";
                registry = optional(&debian::REGISTRY, without)?;
                Ok(())
            });
            stages.run("bsdtar", || {
                let without = "archives are not compared with bsdtar; install libarchive-tools for that";
                bsdtar = optional(&debian::BSDTAR, without)?;
                Ok(())
            });
        }
        stages.run("doc tests", || run(cargo().args(["test", "--workspace", "--doc"])));
        stages.run("tests", || {
            let mut runner = test_runner(None);
            registry.iter().for_each(|program| {
                runner.env("MODELCACHE_TEST_REGISTRY", &program.path);
            });
            bsdtar.iter().for_each(|program| {
                runner.env("MODELCACHE_TEST_BSDTAR", &program.path);
                runner.envs(program.libraries.iter().map(|folder| ("MODELCACHE_TEST_BSDTAR_LIBRARIES", folder)));
            });
            run(with_venv(&mut runner, venv.as_deref()))
        });
        if !self.quick {
            stages.run("hub clients", hub_clients::test);
        }
        stages.finish()
    }
}

/// Returns the program of a Debian package. Prints its path, or `without` if it cannot be had here.
fn optional(package: &debian::Package, without: &str) -> Result<Option<debian::Program>> {
    let program = package.program()?;
    match &program {
        Some(program) => println!("{}", program.path.display()),
        None => println!("{without}"),
    }
    Ok(program)
}

/// The stages so far, with duration and result.
#[derive(Default)]
struct Stages {
    /// Name and duration of each stage; `None` if the stage did not run.
    rows: Vec<(&'static str, Option<Duration>)>,
    failure: Option<(&'static str, anyhow::Error)>,
}

impl Stages {
    fn run(&mut self, name: &'static str, stage: impl FnOnce() -> Result<()>) {
        // After a failure, the remaining stages appear in the table as not run.
        if self.failure.is_some() {
            self.rows.push((name, None));
            return;
        }
        println!("\n== {name}");
        let started = Instant::now();
        if let Err(error) = stage() {
            eprintln!("xtask: {name}: {error:#}");
            self.failure = Some((name, error));
        }
        self.rows.push((name, Some(started.elapsed())));
    }

    /// Prints the table. Fails if a stage failed.
    fn finish(self) -> Result<()> {
        let failed = self.failure.as_ref().map(|(name, _)| *name);
        let result = |name, took: &Option<Duration>| match took {
            None => "not run",
            Some(_) if failed == Some(name) => "FAILED",
            Some(_) => "ok",
        };
        let row = |(name, took): &(&'static str, Option<Duration>)| {
            let spent = took.map_or_else(String::new, |took| format!("{:.1}", took.as_secs_f64()));
            vec![(*name).to_owned(), spent, result(*name, took).to_owned()]
        };
        let total: Duration = self.rows.iter().filter_map(|(_, took)| *took).sum();
        let mut rows: Vec<_> = self.rows.iter().map(row).collect();
        rows.push(vec!["all".into(), format!("{:.1}", total.as_secs_f64()), failed.map_or("ok", |_| "FAILED").into()]);
        println!("\n{}", table::markdown(&["stage", "seconds", "result"], &rows));
        match self.failure {
            Some((name, error)) => Err(error.context(format!("stage {name:?} failed"))),
            None => Ok(()),
        }
    }
}

/// Returns the command that runs one test program by its name, or all tests except the documentation tests.
pub(crate) fn test_runner(program: Option<&str>) -> Command {
    let mut command = cargo();
    let probe = cargo().args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if probe.is_ok_and(|status| status.success()) {
        // Half of the time, a test waits for a timeout, a process or the disk.
        let threads = 2 * std::thread::available_parallelism().map_or(1, usize::from);
        command.args(["nextest", "run", "--workspace", "--test-threads", &threads.to_string()]);
    } else {
        command.args(["test", "--workspace", "--no-fail-fast"]);
    }
    match program {
        Some(program) => command.args(["--test", program]),
        // Documentation tests have a stage of their own.
        None => command.args(["--lib", "--bins", "--tests"]),
    };
    command
}

/// Passes the Python environment to the tests. Without it, the tests that need one are skipped.
fn with_venv<'a>(command: &'a mut Command, venv: Option<&Path>) -> &'a mut Command {
    if let Some(venv) = venv {
        command.env("MODELCACHE_TEST_VENV", venv).env("TESTKIT_MOTO_VENV", venv);
    }
    command
}

/// Prints a command and runs it. Fails if it does not exit with 0.
pub fn run(command: &mut Command) -> Result<()> {
    let line = shell_line(command);
    println!("$ {line}");
    let status = command.status().with_context(|| format!("cannot run {line}"))?;
    ensure!(status.success(), "`{line}` ended with {status}");
    Ok(())
}
