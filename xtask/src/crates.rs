//! `cargo xtask crates`: checks the licences and sources of all dependencies, that the published crates can be packed, and
//! that the library follows semantic versioning.
//!
//! cargo-deny and cargo-semver-checks are built from crates.io into `target/tools` the first time, which takes minutes.

use crate::release::PUBLISHED;
use crate::repository::{cargo, git, root, target_folder};
use crate::test::run;
use anyhow::Result;
use clap::Args;
use std::process::Command;

const DENY: (&str, &str) = ("cargo-deny", "0.20.2");
const SEMVER_CHECKS: (&str, &str) = ("cargo-semver-checks", "0.51.0");

/// Check the published crates: licences, packages, semantic versioning
#[derive(Debug, Args)]
pub struct Crates {
    /// Pack the crates without building them from their packages
    #[arg(long)]
    no_verify: bool,
}

impl Crates {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        // Advisories are left out: their database is a git repository, and this task needs the package registry only.
        run(tool(DENY)?.args(["--workspace", "check", "bans", "licenses", "sources"]))?;
        let packages = PUBLISHED.iter().flat_map(|name| ["--package", name]);
        let no_verify = self.no_verify.then_some("--no-verify");
        run(cargo().args(["publish", "--dry-run", "--locked"]).args(packages).args(no_verify))?;
        match last_release()? {
            None => println!("no release yet, so there is no interface to stay compatible with"),
            Some(tag) => {
                // The other published crates have no public Rust API.
                run(tool(SEMVER_CHECKS)?.args(["semver-checks", "--package", PUBLISHED[0], "--baseline-rev", &tag]))?;
            }
        }
        Ok(())
    }
}

/// Returns a command for a program of crates.io. Builds it unless it is there in this version.
fn tool((name, version): (&str, &str)) -> Result<Command> {
    let folder = target_folder()?.join("tools");
    run(cargo().args(["install", "--locked", "--quiet", "--version", version, "--root"]).arg(&folder).arg(name))?;
    let mut command = Command::new(folder.join("bin").join(name));
    command.current_dir(root());
    Ok(command)
}

/// Returns the tag of the last release, such as `v0.1.0`. Returns `None` before the first release.
fn last_release() -> Result<Option<String>> {
    let list = ["tag", "--list", "v[0-9]*", "--merged", "HEAD", "--sort", "-version:refname"];
    Ok(git(&list)?.lines().next().map(str::to_owned))
}
