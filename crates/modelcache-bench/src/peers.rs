//! The programs that modelcache is compared with: Python packages in one environment below `target/`, and programs of
//! Debian packages.
//!
//! A peer that is not available is no error: the tables show the reason.

use super::usage::{Running, run};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xtask::debian::{Package, Program};
use xtask::repository::{root, target_folder};
use xtask::venv;

const FOLDER: &str = "crates/modelcache-bench/src/peers";
/// Programs of Debian packages, with the argument that prints their version.
const DEBIAN_PROGRAMS: [(&str, Package, &str); 3] = [
    ("rclone", Package { name: "rclone", program: "usr/bin/rclone", libraries: &[] }, "version"),
    (
        "aria2c",
        Package { name: "aria2", program: "usr/bin/aria2c", libraries: &["libaria2-0", "libc-ares2"] },
        "--version",
    ),
    ("nginx", Package { name: "nginx", program: "usr/sbin/nginx", libraries: &[] }, "-v"),
];

pub(super) struct Peers {
    venv: PathBuf,
    /// The available peers: version by name of the package or program.
    versions: BTreeMap<String, String>,
    /// The other peers: reason by name of the package or program.
    missing: BTreeMap<String, String>,
    /// The available programs of Debian packages, by name.
    programs: BTreeMap<&'static str, Program>,
}

impl Peers {
    /// Installs the packages that are not installed in the pinned version, and downloads the other programs unless the
    /// machine has them.
    pub(super) fn install() -> Result<Self> {
        let venv = target_folder()?.join("bench-venv");
        if !venv.join("bin/python").exists() {
            venv::create(&venv)?;
        }
        let mut peers = Self { venv, versions: BTreeMap::new(), missing: BTreeMap::new(), programs: BTreeMap::new() };
        for (list, options) in [("requirements.txt", &[][..]), ("requirements-no-deps.txt", &["--no-deps"])] {
            let path = root().join(FOLDER).join(list);
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
                peers.install_package(line, options)?;
            }
        }
        for (name, package, version_argument) in DEBIAN_PROGRAMS {
            if let Err(error) = peers.add_program(name, package, version_argument) {
                eprintln!("bench: {name} is not measured: {error:#}");
                peers.missing.insert(name.into(), format!("{error:#}"));
            }
        }
        Ok(peers)
    }

    fn add_program(&mut self, name: &'static str, package: Package, version_argument: &str) -> Result<()> {
        let program = package.program()?.context("not on this machine")?;
        let (_, status, output) = Running::start(program_command(&program).arg(version_argument))?.wait()?;
        ensure!(status.success(), "does not run: {}", output[1].lines().next().unwrap_or_default());
        // nginx prints its version to standard error.
        let line = output.iter().flat_map(|text| text.lines()).next().unwrap_or_default();
        let version = line.split([' ', '/']).next_back().unwrap_or_default().trim_start_matches('v');
        self.versions.insert(name.into(), version.into());
        self.programs.insert(name, program);
        Ok(())
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

    /// Returns a command for a program of a Debian package, or fails with the reason if it is not available.
    pub(super) fn debian_program(&self, name: &str) -> Result<Command> {
        self.require(name)?;
        Ok(program_command(&self.programs[name]))
    }

    /// Lists available peers with their versions, and missing ones with the reason.
    pub(super) fn summary(&self) -> String {
        let available = self.versions.iter().map(|(name, version)| format!("{name} {version}"));
        let missing = self.missing.iter().map(|(name, why)| format!("{name} ({why})"));
        available.chain(missing).collect::<Vec<_>>().join(", ")
    }
}

/// Returns a command for a program of a Debian package.
fn program_command(program: &Program) -> Command {
    let mut command = clean_command(&program.path);
    command.envs(program.libraries.iter().map(|folder| ("LD_LIBRARY_PATH", folder)));
    command
}

/// Returns a command with a clean environment, so that the user's settings have no effect.
fn clean_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HF_HUB_DISABLE_TELEMETRY", "1");
    command
}
