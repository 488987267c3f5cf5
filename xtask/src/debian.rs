//! Programs of Debian packages: found on the `PATH`, or downloaded once and unpacked below `target/`.
//!
//! The download needs `apt-get` and `dpkg`, but no root rights.

use crate::repository::target_folder;
use crate::test::run;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    /// The name of the package.
    pub name: &'static str,
    /// The path of the program in the package, for example `usr/bin/aria2c`.
    pub program: &'static str,
    /// Packages with shared libraries of the program that are rarely installed. They are downloaded with it.
    pub libraries: &'static [&'static str],
}

/// CNCF Distribution, a real registry for the OCI tests.
pub(crate) const REGISTRY: Package =
    Package { name: "docker-registry", program: "usr/bin/docker-registry", libraries: &[] };

/// The tar program of libarchive, to which extracted archives are compared.
pub(crate) const BSDTAR: Package =
    Package { name: "libarchive-tools", program: "usr/bin/bsdtar", libraries: &["libarchive13"] };

/// A program that can be run.
#[derive(Debug)]
pub struct Program {
    /// The path of the program.
    pub path: PathBuf,
    /// The value that the program needs for `LD_LIBRARY_PATH`.
    pub libraries: Option<PathBuf>,
}

impl Package {
    /// Returns the program, and downloads it if necessary. Returns `None` if it is not on the `PATH`, and the machine has
    /// no `apt-get` or no `dpkg`.
    ///
    /// # Errors
    /// If the package cannot be downloaded, or does not have the program.
    pub fn program(&self) -> Result<Option<Program>> {
        let file_name = Path::new(self.program).file_name().context("the program has no name")?;
        if let Some(path) = on_path(file_name) {
            return Ok(Some(Program { path, libraries: None }));
        }
        let Some(root) = self.unpacked()? else { return Ok(None) };
        let libraries = if self.libraries.is_empty() { None } else { Some(library_folder(&root)?) };
        Ok(Some(Program { path: root.join(self.program), libraries }))
    }

    /// Returns the folder in which the packages are unpacked, and downloads them if necessary. Returns `None` if the
    /// machine has no `apt-get` or no `dpkg`.
    ///
    /// # Errors
    /// If the package cannot be downloaded, or does not have the program.
    pub(crate) fn unpacked(&self) -> Result<Option<PathBuf>> {
        let folder = target_folder()?.join(self.name);
        let root = folder.join("root");
        // A symbolic link counts without its target, which may be an absolute path outside of the folder.
        let is_there = || root.join(self.program).symlink_metadata().is_ok();
        if !is_there() {
            if on_path("apt-get").is_none() || on_path("dpkg").is_none() {
                println!("{} is not downloaded, because apt-get or dpkg is missing", self.name);
                return Ok(None);
            }
            self.download_and_unpack(&folder)?;
            ensure!(is_there(), "Debian's package {} has no {}", self.name, self.program);
        }
        Ok(Some(root))
    }

    /// Downloads the packages and unpacks them into `folder/root`. The folder gets this name last, so that an incomplete
    /// package never has it.
    fn download_and_unpack(&self, folder: &Path) -> Result<()> {
        let unpacked = folder.join("unpacked");
        drop(fs::remove_dir_all(folder));
        fs::create_dir_all(&unpacked)?;
        let names = || std::iter::once(&self.name).chain(self.libraries);
        let download = || run(Command::new("apt-get").arg("download").args(names()).current_dir(folder));
        if download().is_err() {
            // A new machine has no package lists.
            let remedy = format!("cannot download {0}; as root: apt-get update, or apt-get install {0}", self.name);
            run(Command::new("apt-get").args(["update", "--quiet"])).and_then(|()| download()).context(remedy)?;
        }
        let files = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
        for package in files.filter(|path| path.extension().is_some_and(|ending| ending == "deb")) {
            run(Command::new("dpkg").arg("-x").arg(package).arg(&unpacked))?;
        }
        fs::rename(unpacked, folder.join("root")).context("cannot rename the unpacked package")
    }
}

/// Returns the folder of shared libraries below the root of an unpacked package, such as `usr/lib/x86_64-linux-gnu`.
fn library_folder(root: &Path) -> Result<PathBuf> {
    let mut folders = fs::read_dir(root.join("usr/lib"))?.filter_map(|entry| Some(entry.ok()?.path()));
    let folder = folders.find(|path| path.to_string_lossy().contains("-linux-"));
    folder.context("the packages have no shared libraries")
}

/// Returns the path of the program `name`, as the shell would find it.
pub(crate) fn on_path(name: impl AsRef<Path>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(&name)).find(|program| program.is_file())
}
