//! Python environments below `target/`, made from requirements files.

use crate::repository::{root, shell_line};
use crate::test::run;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

/// A requirements file, by its path in the repository.
pub(crate) enum Requirements {
    /// The packages are installed with their dependencies.
    WithDependencies(&'static str),
    /// Exactly these packages are installed.
    Exact(&'static str),
}

impl Requirements {
    fn file(&self) -> &'static str {
        match self {
            Self::WithDependencies(file) | Self::Exact(file) => file,
        }
    }

    fn pip_arguments(&self) -> &'static [&'static str] {
        match self {
            Self::WithDependencies(_) => &["-r"],
            Self::Exact(_) => &["--no-deps", "-r"],
        }
    }
}

/// Creates a virtual environment with the packages of these files. Does nothing if it was made from the same files.
///
/// # Errors
/// If Python cannot create environments, or pip cannot install a package.
pub(crate) fn ensure(venv: &Path, requirements: &[Requirements]) -> Result<()> {
    let mut contents = String::new();
    for file in requirements.iter().map(Requirements::file) {
        let text = fs::read_to_string(root().join(file)).with_context(|| format!("cannot read {file}"))?;
        contents.push_str(&format!("# {file}\n{text}\n"));
    }
    // Written last, so that an incomplete environment is made again.
    let stamp = venv.join("requirements.stamp");
    if fs::read_to_string(&stamp).is_ok_and(|current| current == contents) {
        println!("{} is up to date", venv.display());
        return Ok(());
    }
    create(venv)?;
    for list in requirements {
        pip_install(venv, &[list.pip_arguments(), &[list.file()]].concat())?;
    }
    Ok(fs::write(stamp, contents)?)
}

/// Creates an empty virtual environment. Replaces an existing one.
///
/// # Errors
/// If Python is missing, or its module `venv`.
pub fn create(venv: &Path) -> Result<()> {
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
///
/// # Errors
/// If pip fails.
pub fn pip_install(venv: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(venv.join("bin/python"));
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    run(command.args(pip).args(arguments).current_dir(root()))
}
