//! The programs that modelcache is compared with: installed into one environment below `target/`, or found on the
//! machine.
//!
//! A peer that is not available is no error: the tables show the reason.

use super::usage::run;
use crate::repository::{root, target_folder};
use crate::test::create_venv;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: &str = "xtask/src/bench/peers";
/// Programs that the machine may have, with the argument that prints their version.
const FOUND: [(&str, &str); 2] = [("rclone", "version"), ("aria2c", "--version")];

pub(super) struct Peers {
    venv: PathBuf,
    /// By name of the package or program.
    versions: BTreeMap<String, String>,
    missing: BTreeMap<String, String>,
}

impl Peers {
    /// Installs the packages that are not yet there in the pinned version.
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
                Ok((_, printed)) => {
                    let version = printed.lines().next().unwrap_or_default().split(' ').next_back().unwrap_or_default();
                    peers.versions.insert(program.into(), version.trim_start_matches('v').into());
                }
                Err(_) => drop(peers.missing.insert(program.into(), "not on this machine".into())),
            }
        }
        Ok(peers)
    }

    /// Installs one package, given as `name==version`.
    fn add(&mut self, line: &str, options: &[&str]) -> Result<()> {
        let (name, version) = line.split_once("==").with_context(|| format!("{line}: no version is pinned"))?;
        // The stamp names the version, so a changed pin is installed again.
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

    /// Fails with the reason if a package or program is not available.
    pub(super) fn want(&self, name: &str) -> Result<()> {
        ensure!(!self.missing.contains_key(name), "{}", self.missing[name]);
        ensure!(self.versions.contains_key(name), "not installed");
        Ok(())
    }

    /// Returns the virtual environment.
    pub(super) fn venv(&self) -> &Path {
        &self.venv
    }

    /// Returns the interpreter of the environment.
    pub(super) fn python(&self) -> PathBuf {
        self.venv.join("bin/python")
    }

    /// Returns a command for a program of the environment.
    pub(super) fn program(&self, name: &str) -> Command {
        peer(&self.venv.join("bin").join(name))
    }

    /// Returns a command for a script in the folder beside this module. Some of the scripts measure our own package.
    pub(super) fn script(&self, name: &str) -> Command {
        let mut command = peer(&self.python());
        command.arg(root().join(FOLDER).join(name));
        command
    }

    /// Returns a command for a program of the machine.
    pub(super) fn found(&self, name: &str) -> Command {
        peer(Path::new(name))
    }

    /// Lists available peers with their versions, and missing ones with the reason.
    pub(super) fn summary(&self) -> String {
        let have = self.versions.iter().map(|(name, version)| format!("{name} {version}"));
        let lack = self.missing.iter().map(|(name, why)| format!("{name} ({why})"));
        have.chain(lack).collect::<Vec<_>>().join(", ")
    }
}

/// Returns a command with a clean environment, so that the user's settings have no effect.
fn peer(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HF_HUB_DISABLE_TELEMETRY", "1");
    command
}
