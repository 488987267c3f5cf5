//! `cargo xtask test`: runs all checks of this repository.
//!
//! The stages run from cheap to expensive. After the first failure, no further stage runs. A table at the end shows the
//! result of each stage. Needs cargo, git and Python, and uses `cargo nextest` if it is installed. All stages build
//! with the same features (`--workspace`), so that no dependency is built twice. Without Chromium, the test of the status page is
//! skipped.

use crate::docs::Docs;
use crate::python::Python;
use crate::repository::{cargo, root, shell_line, target_folder};
use crate::{page, registry, table, tidy};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Python packages for the tests. Those of the second list are installed without their dependencies.
const REQUIREMENTS: &str = "crates/modelcache-cli/tests/python/requirements.txt";
const REQUIREMENTS_NO_DEPS: &str = "crates/modelcache-cli/tests/python/requirements-no-deps.txt";

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
        let (mut venv, mut registry) = (None, None);
        if !self.quick {
            stages.run("format", || run(cargo().args(["fmt", "--all", "--check"])));
            stages.run("tidy", tidy::check);
            stages.run("generated docs", || Docs { check: true }.run());
            // The second time without the optional origins.
            let clippy = |what| run(cargo().args(["clippy", "--workspace", what, "--", "-D", "warnings"]));
            stages.run("clippy", || clippy("--all-targets").and_then(|()| clippy("--no-default-features")));
            let doc = ["doc", "--workspace", "--no-deps"];
            stages.run("rustdoc", || run(cargo().args(doc).env("RUSTDOCFLAGS", "-D warnings")));
            stages.run("python packages", || {
                venv = python_packages()?;
                Ok(())
            });
            stages.run("python package", || Python::default().run());
            stages.run("status page", || page::Page::default().run());
            stages.run("docker-registry", || {
                registry = registry::program()?;
                Ok(())
            });
        }
        stages.run("doc tests", || run(cargo().args(["test", "--workspace", "--doc"])));
        stages.run("tests", || {
            let mut runner = test_runner();
            registry.iter().for_each(|program| {
                runner.env("MODELCACHE_TEST_REGISTRY", program);
            });
            run(with_venv(&mut runner, venv.as_deref()))
        });
        stages.finish()
    }
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

/// Returns the command that runs all tests except the documentation tests.
fn test_runner() -> Command {
    let mut command = cargo();
    let probe = cargo().args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if probe.is_ok_and(|status| status.success()) {
        command.args(["nextest", "run", "--workspace"]);
    } else {
        // Documentation tests have a stage of their own.
        command.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests"]);
    }
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

/// Returns a virtual environment with the packages that the tests need. Creates it if it does not exist or the lists
/// have changed.
fn python_packages() -> Result<Option<PathBuf>> {
    let lists = [(REQUIREMENTS, false), (REQUIREMENTS_NO_DEPS, true)];
    let lists: Vec<_> = lists.into_iter().filter(|(list, _)| root().join(list).is_file()).collect();
    if lists.is_empty() {
        println!("{REQUIREMENTS} does not exist; tests that need Python are skipped");
        return Ok(None);
    }
    environment("venv", &lists).map(Some)
}

/// Returns the virtual environment `name` below the target folder with the packages of `lists`. Creates it, also if the
/// lists have changed. Each list has a flag that is true if its packages are installed without their dependencies.
pub fn environment(name: &str, lists: &[(&str, bool)]) -> Result<PathBuf> {
    let venv = target_folder()?.join(name);
    let stamp = venv.join("requirements.stamp");
    let read = |(list, _): &(&str, bool)| {
        let text = fs::read_to_string(root().join(list)).with_context(|| format!("cannot read {list}"))?;
        anyhow::Ok(format!("# {list}\n{text}\n"))
    };
    let contents = lists.iter().map(read).collect::<Result<String>>()?;
    if fs::read_to_string(&stamp).is_ok_and(|current| current == contents) {
        println!("{} is up to date", venv.display());
        return Ok(venv);
    }
    create_venv(&venv)?;
    for (list, no_deps) in lists {
        pip_install(&venv, &[if *no_deps { &["--no-deps", "-r"][..] } else { &["-r"] }, &[list]].concat())?;
    }
    fs::write(stamp, contents)?;
    Ok(venv)
}

/// Creates an empty virtual environment. Replaces an existing one.
pub fn create_venv(venv: &Path) -> Result<()> {
    let mut command = Command::new("python3");
    command.args(["-m", "venv", "--clear"]).arg(venv);
    println!("$ {}", shell_line(&command));
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => bail!("cannot create a Python environment; on Debian and Ubuntu: apt-get install python3-venv"),
        Err(error) => Err(error).context("cannot run python3; on Debian and Ubuntu: apt-get install python3-venv"),
    }
}

/// Runs `pip install` in a virtual environment.
pub fn pip_install(venv: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(venv.join("bin/python"));
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    run(command.args(pip).args(arguments).current_dir(root()))
}
