//! Debian's `docker-registry`, for the tests of OCI: a real one, fetched once, installed nowhere.
//!
//! One on the `PATH` is taken as it is. Otherwise Debian's package is unpacked below `target/`, which needs `apt-get` and
//! `dpkg` and no rights. Where there are neither, the tests that want a registry skip themselves.

use crate::repository::target_folder;
use crate::test::run;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "docker-registry";

/// The program, fetched if need be; `None` on a machine where it cannot be had.
pub(crate) fn program() -> Result<Option<PathBuf>> {
    if let Some(program) = on_path(PACKAGE) {
        println!("{}", program.display());
        return Ok(Some(program));
    }
    let folder = target_folder()?.join(PACKAGE);
    let program = folder.join("root/usr/bin").join(PACKAGE);
    if program.is_file() {
        println!("{} is there", program.display());
        return Ok(Some(program));
    }
    if on_path("apt-get").is_none() || on_path("dpkg").is_none() {
        println!(
            "no {PACKAGE} on the PATH, and no apt-get to fetch it with: tests that want a registry skip themselves"
        );
        println!("install CNCF Distribution (Debian and Ubuntu: docker-registry), so that `{PACKAGE}` is on the PATH");
        return Ok(None);
    }
    fetch(&folder)?;
    match program.is_file() {
        true => Ok(Some(program)),
        false => bail!("Debian's package {PACKAGE} has no usr/bin/{PACKAGE}"),
    }
}

/// Unpacks the package into `folder/root`. Nothing half-unpacked keeps that name.
fn fetch(folder: &Path) -> Result<()> {
    let unpacked = folder.join("unpacked");
    drop(fs::remove_dir_all(folder));
    fs::create_dir_all(&unpacked)?;
    let download = |folder: &Path| run(Command::new("apt-get").args(["download", PACKAGE]).current_dir(folder));
    if download(folder).is_err() {
        // A machine that is new knows no package until it was told the list.
        let remedy = "cannot fetch docker-registry; as root: apt-get update, or apt-get install docker-registry";
        run(Command::new("apt-get").args(["update", "--quiet"])).and_then(|()| download(folder)).context(remedy)?;
    }
    let package = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let package = package.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "deb"));
    run(Command::new("dpkg").arg("-x").arg(package.context("apt-get downloaded nothing")?).arg(&unpacked))?;
    fs::rename(unpacked, folder.join("root")).context("cannot name what was unpacked")
}

/// The program called `name`, as the shell would find it.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}
