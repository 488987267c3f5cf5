//! `cargo xtask dist`: builds the files of a release into `target/dist`, and tests them as a user installs them.
//!
//! The program is linked statically, so that one file runs on every Linux distribution and in an empty container image.
//! `packaging/pack.py` makes the archive, the Debian package, the container image, the SBOM and the install script from
//! it, and maturin makes the wheel. With `--debug`, the debug build is packed, without a wheel. The programs for the
//! tests come from Debian packages; nothing needs root rights.

use crate::debian::Package;
use crate::python::{BUILD_XTASK, PACKAGE, Python, empty_folder};
use crate::repository::{build_static, cargo, git, remap_paths, root, target_folder};
use crate::test::run;
use crate::venv::{self, Requirements};
use anyhow::{Result, ensure};
use clap::Args;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const REQUIREMENTS: [Requirements; 1] = [Requirements::WithDependencies("packaging/requirements.txt")];
/// Platform tag of the wheel: glibc 2.17 (2012) or newer.
const WHEEL_PLATFORM: &str = "manylinux2014";
/// Debian packages that the tests need, each with the variable for its folder. Without a package, its tests are
/// skipped. bubblewrap runs programs in another root filesystem, and umoci unpacks the container image.
const TEST_PACKAGES: [(&str, Package); 4] = [
    ("TEST_BUBBLEWRAP", Package { name: "bubblewrap", program: "usr/bin/bwrap", libraries: &[] }),
    ("TEST_UMOCI", Package { name: "umoci", program: "usr/bin/umoci", libraries: &[] }),
    // A small system with busybox and musl, as Alpine is. Alpine's own packages are not in Debian's archive.
    ("TEST_BUSYBOX", Package { name: "busybox-static", program: "bin/busybox", libraries: &["musl"] }),
    ("TEST_DEBIAN", Package { name: "coreutils", program: "bin/ls", libraries: DEBIAN }),
];
/// With coreutils, the packages of a Debian system that can run the install script and dpkg.
const DEBIAN: &[&str] = &[
    "base-files",
    "base-passwd",
    "dash",
    "diffutils",
    "dpkg",
    "gzip",
    "libacl1",
    "libattr1",
    "libbz2-1.0",
    "libc-bin",
    "libc6",
    "libgcc-s1",
    "libgmp10",
    "liblzma5",
    "libmd0",
    "libpcre2-8-0",
    "libselinux1",
    "libssl3",
    "libzstd1",
    "sed",
    "tar",
    "zlib1g",
];

/// Build the files of a release, and test them
#[derive(Debug, Default, Args)]
pub struct Dist {
    /// Pack the debug build, without the wheel. For the tests of this repository
    #[arg(long)]
    debug: bool,
    /// Build a second time, in another folder, and compare the bytes of all files. With --debug, only the packing is
    /// repeated
    #[arg(long)]
    twice: bool,
    /// Arguments for pytest, for instance -k NAME
    #[arg(last = true)]
    pytest: Vec<String>,
}

impl Dist {
    /// Packs the debug build, twice.
    pub(crate) fn of_debug_build() -> Self {
        Self { debug: true, twice: true, ..Self::default() }
    }

    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let target = target_folder()?;
        let venv = target.join("venv-packaging");
        venv::ensure(&venv, &REQUIREMENTS)?;
        let folder = target.join("dist");
        self.build(&venv, &folder, &target.join("dist-build"))?;
        if self.twice {
            let again = target.join("dist-again");
            self.build(&venv, &again, &target.join("dist-build-again"))?;
            compare(&folder, &again)?;
        }
        test(&venv, &folder, &target, &self.pytest)?;
        // The tests of the Python package, with the wheel as it is shipped.
        match files(&folder)?.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "whl")) {
            Some(wheel) => Python::of_wheel(wheel).run(),
            None => Ok(()),
        }
    }

    /// Builds all files into `folder`. Replaces it. `release_target` is cargo's target folder for release builds.
    fn build(&self, venv: &Path, folder: &Path, release_target: &Path) -> Result<()> {
        let work = folder.with_extension("work");
        empty_folder(folder)?;
        empty_folder(&work)?;
        // The time of the last commit, which all packed files get.
        let epoch = git(&["log", "-1", "--format=%ct"])?.trim().to_owned();
        let program = build_static((!self.debug).then_some(release_target))?;
        let pack = |arguments: &[&OsStr]| {
            let mut command = Command::new(venv.join("bin/python"));
            command.arg("packaging/pack.py").args(arguments).current_dir(root());
            run(command.env("SOURCE_DATE_EPOCH", &epoch).env("CARGO", cargo().get_program()))
        };
        if !self.debug {
            // maturin includes all files whose names begin with `LICENSE`.
            let licences = root().join(PACKAGE).join("LICENSE-THIRD-PARTY");
            let sbom = work.join("modelcache-python.cdx.json");
            pack(&["licences".as_ref(), "modelcache-python".as_ref(), licences.as_ref()])?;
            pack(&["sbom".as_ref(), "modelcache-python".as_ref(), sbom.as_ref()])?;
            let mut maturin = Command::new(venv.join("bin/maturin"));
            maturin.arg("build").arg("--sbom-include").arg(&sbom);
            maturin.args(["--release", "--zig", "--compatibility", WHEEL_PLATFORM, "--out"]).arg(folder);
            maturin.env("SOURCE_DATE_EPOCH", &epoch).env("CARGO_TARGET_DIR", release_target);
            maturin.env("CARGO_ENCODED_RUSTFLAGS", remap_paths());
            // maturin looks for zig on the PATH.
            let path = std::env::var("PATH").unwrap_or_default();
            maturin.env("PATH", format!("{}:{path}", venv.join("bin").display()));
            run(maturin.current_dir(root().join(PACKAGE)))?;
            fs::remove_file(licences)?;
        }
        pack(&["release".as_ref(), program.as_ref(), work.as_ref(), folder.as_ref()])
    }
}

/// Returns the paths of the files in a folder, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// Fails if the files of two folders differ in number, names or bytes.
fn compare(first: &Path, second: &Path) -> Result<()> {
    let (first, second) = (files(first)?, files(second)?);
    ensure!(first.len() == second.len(), "the build is not reproducible: {first:?} became {second:?}");
    for (one, other) in first.iter().zip(&second) {
        let is_same = one.file_name() == other.file_name() && fs::read(one)? == fs::read(other)?;
        let (one, other) = (one.display(), other.display());
        ensure!(is_same, "the build is not reproducible: {one} and {other} differ; compare them with diffoscope");
    }
    println!("two builds have equal bytes");
    Ok(())
}

/// Runs the tests of the files in `folder`.
fn test(venv: &Path, folder: &Path, target: &Path, arguments: &[String]) -> Result<()> {
    run(cargo().args(["build", "--package", "modelcache-testkit"]).args(BUILD_XTASK))?;
    let mut pytest = Command::new(venv.join("bin/python"));
    pytest.args(["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "packaging/tests"]).args(arguments);
    pytest
        .current_dir(root())
        .env("PYTHONPATH", "packaging")
        .env("TEST_DIST", folder)
        .env("TEST_TESTKIT", target.join("debug/testkit"));
    for (variable, package) in TEST_PACKAGES {
        if let Some(folder) = package.unpacked()? {
            pytest.env(variable, folder);
        }
    }
    run(&mut pytest)
}
