//! The programs that we are measured beside: installed into one environment below `target/`, or found on the machine.
//!
//! One that cannot be had is no error: it stands in the tables with the reason.

use super::usage::run;
use crate::repository::{root, target_folder};
use crate::test::create_venv;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: &str = "xtask/src/bench/peers";
/// What the machine may have, and how it tells its version.
const FOUND: [(&str, &str); 2] = [("rclone", "version"), ("aria2c", "--version")];

pub(super) struct Peers {
    venv: PathBuf,
    /// By package or program.
    versions: BTreeMap<String, String>,
    missing: BTreeMap<String, String>,
}

impl Peers {
    /// Installs what is not there yet in the version wanted.
    pub(super) fn install() -> Result<Self> {
        let venv = target_folder()?.join("bench-venv");
        if !venv.join("bin/python").exists() {
            create_venv(&venv)?;
        }
        let mut peers = Self { venv, versions: BTreeMap::new(), missing: BTreeMap::new() };
        for (list, options) in [("requirements.txt", &[][..]), ("requirements-no-deps.txt", &["--no-deps"])] {
            let path = root().join(FOLDER).join(list);
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
                peers.add(line, options)?;
            }
        }
        for (program, question) in FOUND {
            match run(Command::new(program).arg(question)) {
                Ok((_, told)) => {
                    let version = told.lines().next().unwrap_or_default().split(' ').next_back().unwrap_or_default();
                    peers.versions.insert(program.into(), version.trim_start_matches('v').into());
                }
                Err(_) => drop(peers.missing.insert(program.into(), "not on this machine".into())),
            }
        }
        Ok(peers)
    }

    /// One package, `name==version`.
    fn add(&mut self, line: &str, options: &[&str]) -> Result<()> {
        let (name, version) = line.split_once("==").with_context(|| format!("{line}: no version is pinned"))?;
        let stamp = self.venv.join(format!("{name}-{version}.installed"));
        if !stamp.exists() {
            eprintln!("installing {line}");
            let mut pip = Command::new(self.python());
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(options).arg(line);
            if let Err(error) = run(&mut pip) {
                eprintln!("xtask: {name} is left out: {error:#}");
                self.missing.insert(name.into(), "could not be installed".into());
                return Ok(());
            }
            fs::write(stamp, "")?;
        }
        self.versions.insert(name.into(), version.into());
        Ok(())
    }

    /// Errors, with the reason, where a package or program is not to be had.
    pub(super) fn want(&self, name: &str) -> Result<()> {
        ensure!(!self.missing.contains_key(name), "{}", self.missing[name]);
        ensure!(self.versions.contains_key(name), "not installed");
        Ok(())
    }

    /// The environment.
    pub(super) fn venv(&self) -> &Path {
        &self.venv
    }

    /// Its interpreter.
    pub(super) fn python(&self) -> PathBuf {
        self.venv.join("bin/python")
    }

    /// A program of the environment.
    pub(super) fn program(&self, name: &str) -> Command {
        peer(&self.venv.join("bin").join(name))
    }

    /// One of the scripts in the folder beside this module, ours among them.
    pub(super) fn script(&self, name: &str) -> Command {
        let mut command = peer(&self.python());
        command.arg(root().join(FOLDER).join(name));
        command
    }

    /// A program of the machine.
    pub(super) fn found(&self, name: &str) -> Command {
        peer(Path::new(name))
    }

    /// What was found and what was not.
    pub(super) fn told(&self) -> String {
        let have = self.versions.iter().map(|(name, version)| format!("{name} {version}"));
        let lack = self.missing.iter().map(|(name, why)| format!("{name} ({why})"));
        have.chain(lack).collect::<Vec<_>>().join(", ")
    }
}

/// A command that knows nothing of this terminal.
fn peer(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HF_HUB_DISABLE_TELEMETRY", "1");
    command
}
