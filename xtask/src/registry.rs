//! Provides the program `docker-registry`, a real registry, for the OCI tests.
//!
//! If it is on the `PATH`, that program is used. Otherwise Debian's package is downloaded once and unpacked below
//! `target/`, which needs `apt-get` and `dpkg`, but no root rights. Without these, the tests that need a registry are
//! skipped.

use crate::repository::target_folder;
use crate::test::run;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "docker-registry";

/// Returns the path of the program, and downloads it if necessary. Returns `None` if it cannot be downloaded here.
pub(crate) fn program() -> Result<Option<PathBuf>> {
    if let Some(program) = on_path(PACKAGE) {
        println!("{}", program.display());
        return Ok(Some(program));
    }
    let folder = target_folder()?.join(PACKAGE);
    let program = folder.join("root/usr/bin").join(PACKAGE);
    if program.is_file() {
        println!("{} was downloaded before", program.display());
        return Ok(Some(program));
    }
    if on_path("apt-get").is_none() || on_path("dpkg").is_none() {
        println!(
            "{PACKAGE} is not on the PATH, and apt-get or dpkg is missing: tests that need a registry are skipped"
        );
        println!("install CNCF Distribution (Debian and Ubuntu: docker-registry), so that `{PACKAGE}` is on the PATH");
        return Ok(None);
    }
    download_and_unpack(&folder)?;
    match program.is_file() {
        true => Ok(Some(program)),
        false => bail!("Debian's package {PACKAGE} has no usr/bin/{PACKAGE}"),
    }
}

/// Downloads the package and unpacks it into `folder/root`. The folder gets this name last, so that an incomplete
/// package never has it.
fn download_and_unpack(folder: &Path) -> Result<()> {
    let unpacked = folder.join("unpacked");
    drop(fs::remove_dir_all(folder));
    fs::create_dir_all(&unpacked)?;
    let download = |folder: &Path| run(Command::new("apt-get").args(["download", PACKAGE]).current_dir(folder));
    if download(folder).is_err() {
        // A new machine has no package lists.
        let remedy = "cannot download docker-registry; as root: apt-get update, or apt-get install docker-registry";
        run(Command::new("apt-get").args(["update", "--quiet"])).and_then(|()| download(folder)).context(remedy)?;
    }
    let package = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let package = package.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "deb"));
    run(Command::new("dpkg").arg("-x").arg(package.context("apt-get downloaded nothing")?).arg(&unpacked))?;
    fs::rename(unpacked, folder.join("root")).context("cannot rename the unpacked package")
}

/// Returns the path of the program `name`, as the shell would find it.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}
