//! The programs that modelcache is compared with: installed into one environment below `target/`, or found on the
//! machine.
//!
//! A peer that is not available is no error: the tables show the reason.

use super::usage::run;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xtask::repository::{root, target_folder};
use xtask::venv;

const FOLDER: &str = "crates/modelcache-bench/src/peers";
/// Programs that are used if the machine has them, with the argument that prints their version.
const SYSTEM_PROGRAMS: [(&str, &str); 2] = [("rclone", "version"), ("aria2c", "--version")];

pub(super) struct Peers {
    venv: PathBuf,
    /// The available peers: version by name of the package or program.
    versions: BTreeMap<String, String>,
    /// The other peers: reason by name of the package or program.
    missing: BTreeMap<String, String>,
}

impl Peers {
    /// Installs the packages that are not installed in the pinned version, and looks for the other programs.
    pub(super) fn install() -> Result<Self> {
        let venv = target_folder()?.join("bench-venv");
        if !venv.join("bin/python").exists() {
            venv::create(&venv)?;
        }
        let mut peers = Self { venv, versions: BTreeMap::new(), missing: BTreeMap::new() };
        for (list, options) in [("requirements.txt", &[][..]), ("requirements-no-deps.txt", &["--no-deps"])] {
            let path = root().join(FOLDER).join(list);
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
                peers.install_package(line, options)?;
            }
        }
        for (program, version_argument) in SYSTEM_PROGRAMS {
            match run(Command::new(program).arg(version_argument)) {
                Ok((_, printed)) => {
                    let version = printed.lines().next().unwrap_or_default().split(' ').next_back().unwrap_or_default();
                    peers.versions.insert(program.into(), version.trim_start_matches('v').into());
                }
                Err(_) => drop(peers.missing.insert(program.into(), "not on this machine".into())),
            }
        }
        Ok(peers)
    }

    /// Installs one package, which `line` names as `name==version`, unless it is installed.
    fn install_package(&mut self, line: &str, options: &[&str]) -> Result<()> {
        let (name, version) = line.split_once("==").with_context(|| format!("{line}: the version is not pinned"))?;
        // The name of the stamp file contains the version, so that a changed pin is installed again.
        let stamp = self.venv.join(format!("{name}-{version}.installed"));
        if !stamp.exists() {
            eprintln!("installing {line}");
            let mut pip = Command::new(self.python());
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(options).arg(line);
            if let Err(error) = run(&mut pip) {
                eprintln!("xtask: cannot install {name}, so it is not measured: {error:#}");
                self.missing.insert(name.into(), "could not be installed".into());
                return Ok(());
            }
            fs::write(stamp, "")?;
        }
        self.versions.insert(name.into(), version.into());
        Ok(())
    }

    /// Fails with the reason if a package or program is not available.
    pub(super) fn require(&self, name: &str) -> Result<()> {
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
        clean_command(&self.venv.join("bin").join(name))
    }

    /// Returns a command for a script in the folder beside this module. Some of the scripts measure our own package.
    pub(super) fn script(&self, name: &str) -> Command {
        let mut command = clean_command(&self.python());
        command.arg(root().join(FOLDER).join(name));
        command
    }

    /// Returns a command for a program of the machine.
    pub(super) fn system_program(&self, name: &str) -> Command {
        clean_command(Path::new(name))
    }

    /// Lists available peers with their versions, and missing ones with the reason.
    pub(super) fn summary(&self) -> String {
        let available = self.versions.iter().map(|(name, version)| format!("{name} {version}"));
        let missing = self.missing.iter().map(|(name, why)| format!("{name} ({why})"));
        available.chain(missing).collect::<Vec<_>>().join(", ")
    }
}

/// Returns a command with a clean environment, so that the user's settings have no effect.
fn clean_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HF_HUB_DISABLE_TELEMETRY", "1");
    command
}
