//! Paths of this repository, and cargo commands run in it.

use crate::python::NATIVE;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Returns the root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository")
}

/// Returns a command for the cargo that started this program, run in the root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // `cargo run` sets these variables for xtask. The build that this command starts must not see them.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}

/// Returns what `cargo metadata` reports about the packages of the workspace.
pub(crate) fn metadata() -> Result<Value> {
    Ok(serde_json::from_slice(&printed_by(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?)?)
}

/// Runs a cargo command and returns what it prints to standard output.
pub(crate) fn printed_by(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "`{}` failed", shell_line(command));
    Ok(output.stdout)
}

/// Returns cargo's target folder.
pub fn target_folder() -> Result<PathBuf> {
    let metadata = metadata()?;
    Ok(metadata["target_directory"].as_str().context("cargo metadata reports no target folder")?.into())
}

/// Runs git in the repository and returns what it prints.
pub(crate) fn git(arguments: &[&str]) -> Result<String> {
    let output = Command::new("git").args(arguments).current_dir(root()).output().context("cannot run git")?;
    ensure!(output.status.success(), "git {}: {}", arguments[0], String::from_utf8_lossy(&output.stderr).trim());
    String::from_utf8(output.stdout).context("git printed a name that is not UTF-8")
}

/// How `modelcache` is built.
pub enum Build {
    /// With the features and the profile of the tests, so that nothing is built twice.
    Development,
    /// As it is shipped: in the release profile, with only its own features.
    Release,
}

/// Builds the program `modelcache` and returns its path.
pub fn build_modelcache(build: Build) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--bin", "modelcache", "--message-format=json-render-diagnostics"]);
    match build {
        Build::Development => command.arg("--workspace"),
        Build::Release => command.args(["--package", "modelcache-cli", "--release"]),
    };
    executable(&build_messages(&mut command)?)
}

/// Builds `modelcache` statically linked and without symbols, and returns its path. `release_target` is the target
/// folder of a release build. `None` makes a debug build in the usual target folder.
pub(crate) fn build_static(release_target: Option<&Path>) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["rustc", "--locked", "--package", "modelcache-cli", "--bin", "modelcache"]);
    if let Some(folder) = release_target {
        command.arg("--release").env("CARGO_TARGET_DIR", folder).env("CARGO_ENCODED_RUSTFLAGS", remap_paths());
    }
    command.args(["--message-format=json-render-diagnostics", "--"]);
    // These flags apply only to the last step, which links the program. Its dependencies are built without them.
    command.args(["-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
    executable(&build_messages(&mut command)?)
}

/// Returns the path of the program that cargo has built.
fn executable(messages: &[Value]) -> Result<PathBuf> {
    let mut programs = messages.iter().filter_map(|message| message["executable"].as_str());
    programs.next_back().map(PathBuf::from).context("cargo built no program")
}

/// Returns flags of rustc for `CARGO_ENCODED_RUSTFLAGS`. They replace the paths of this machine, so that the build
/// neither contains them nor depends on them.
pub(crate) fn remap_paths() -> String {
    let home = std::env::var("HOME").unwrap_or_default();
    let cargo_home = std::env::var("CARGO_HOME").unwrap_or_else(|_| format!("{home}/.cargo"));
    format!("--remap-path-prefix={}=/modelcache\x1f--remap-path-prefix={cargo_home}=/cargo", root().display())
}

/// Builds the native module of the Python package as it is shipped, and returns its path.
pub fn build_native() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--package", "modelcache-python", "--release", "--message-format=json-render-diagnostics"]);
    let messages = build_messages(&mut command)?;
    let files = messages.iter().filter_map(|message| message["filenames"].as_array()).flatten();
    let mut paths = files.filter_map(|file| file.as_str()).map(PathBuf::from);
    paths.find(|path| path.ends_with(NATIVE)).context("cargo built no native module")
}

/// Runs a cargo build and returns its JSON messages.
fn build_messages(command: &mut Command) -> Result<Vec<Value>> {
    let printed = printed_by(command)?;
    let lines = printed.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

/// Formats a command as a person would type it in the root.
pub fn shell_line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    let root = format!("{}/", root().display());
    words.map(|word| quoted(&word.to_string_lossy().replace(&root, ""))).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@=,+%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_relative_to_the_repository() {
        let mut command = Command::new(root().join("target/venv/bin/python"));
        command.arg(root().join("xtask/script.py")).args(["two words", "plain"]);
        assert_eq!(shell_line(&command), "python xtask/script.py 'two words' plain");
    }
}
