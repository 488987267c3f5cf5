//! `cargo xtask release`: prints the steps of a release, or checks that the repository is ready for it.
//!
//! `--check` changes nothing. All checks run, also after a failure, so that one call lists everything that is left to
//! do. The version of the release is that of the library in Cargo.toml.

use crate::docs::Docs;
use crate::repository::{cargo, git, metadata, root};
use crate::{table, tidy};
use anyhow::{Context, Result, ensure};
use clap::Args;
use regex::Regex;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The published crates in the order of publication: each comes after the crates that it depends on.
pub(crate) const PUBLISHED: [&str; 3] = ["modelcache", "modelcache-server", "modelcache-cli"];
/// The crate of the Python package. The wheel takes its version from Cargo.toml, and the rest from pyproject.toml.
const PYTHON: &str = "modelcache-python";
const PYPROJECT: &str = "crates/modelcache-python/pyproject.toml";
/// Fields of Cargo.toml that a published crate needs. The registry demands the first two and shows the others.
const FIELDS: [&str; 6] = ["description", "license", "readme", "keywords", "categories", "repository"];
/// The texts of the two licences.
const LICENCES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

/// Print the manual steps of a release, or check that it can be made
#[derive(Debug, Args)]
pub struct Release {
    /// Check that everything is ready; prints a table, and what to do for each failed check
    #[arg(long)]
    check: bool,
}

impl Release {
    /// Runs the task.
    ///
    /// # Errors
    /// If a check fails, or cargo or git cannot be run.
    pub fn run(&self) -> Result<()> {
        let packages = packages()?;
        let library = packages.iter().find(|package| package.name == PUBLISHED[0]).context("the library is missing")?;
        if self.check {
            return report(&checks(&packages, library)?);
        }
        println!("The steps of release {}, in this order:\n", library.version);
        steps(&library.version).iter().for_each(|step| println!("[ ] {step}"));
        Ok(())
    }
}

/// Returns the steps that are done by hand.
fn steps(version: &str) -> Vec<String> {
    let mut steps = vec![
        "cargo xtask release --check".to_owned(),
        ".ci/run                                       # in a fresh clone of the commit".to_owned(),
        "cargo xtask fuzz                              # each parser for a minute".to_owned(),
        "cargo xtask crates                            # licences, packages, semantic versioning".to_owned(),
        "cargo xtask dist --twice                      # builds the files of the release, and tests them".to_owned(),
        format!("git tag --annotate v{version} --message 'modelcache {version}'"),
        format!("git push origin v{version}"),
    ];
    // A version of a crate cannot be published a second time, so these steps come last.
    steps.extend(PUBLISHED.map(|name| format!("cargo publish --package {name}")));
    steps.push("twine upload target/dist/*.whl".to_owned());
    steps.push(format!("attach all files of target/dist to the release v{version} of the repository host"));
    steps.push(format!("skopeo copy oci-archive:target/dist/modelcache-{version}-x86_64-image.tar docker://REGISTRY/modelcache:{version}"));
    steps.push("add an empty section [Unreleased] to CHANGELOG.md".to_owned());
    steps
}

/// The problems that a check found, each with its remedy. Empty if the check passed.
type Problems = Vec<String>;

/// Runs all checks. Returns each with its name.
fn checks(packages: &[Package], library: &Package) -> Result<Vec<(&'static str, Problems)>> {
    let read = |file: &str| fs::read_to_string(root().join(file)).with_context(|| format!("cannot read {file}"));
    let (readme, pyproject) = (read("README.md")?, read(PYPROJECT)?);
    let mut versions = package_versions(packages, &library.version);
    versions.extend(python_version(&pyproject, &library.version));
    for file in tidy::tracked_files()?.iter().filter(|file| file.starts_with("deploy/")) {
        // Not all files there need be text.
        let text = fs::read_to_string(root().join(file)).unwrap_or_default();
        versions.extend(deployed_versions(file, &text, &library.version)?);
    }
    let docs = Docs { check: true }.run();
    Ok(vec![
        ("versions", versions),
        ("changelog", changelog(&read("CHANGELOG.md")?, &library.version)?),
        ("published crates", published(packages)),
        ("dependencies", dependencies(packages)),
        ("fuzz/Cargo.lock", lock_file(&root().join("fuzz/Cargo.toml"))?),
        ("package metadata", fields(packages, &pyproject)),
        ("licences", licences(packages, root(), |path| path.is_file())),
        ("rust-version", rust_version(packages, &readme)),
        ("README", readme_versions(&readme, &library.version)?),
        ("working tree", working_tree(&git(&["status", "--porcelain"])?)),
        ("generated docs", docs.err().map(|error| format!("{error:#}")).into_iter().collect()),
    ])
}

/// Prints the table and the problems. Fails if there is a problem.
fn report(checks: &[(&str, Problems)]) -> Result<()> {
    let result = |problems: &Problems| if problems.is_empty() { "ok" } else { "FAILED" };
    let rows: Vec<_> = checks.iter().map(|(name, found)| vec![(*name).to_owned(), result(found).to_owned()]).collect();
    println!("\n{}", table::markdown(&["check", "result"], &rows));
    for (name, problems) in checks {
        problems.iter().for_each(|problem| eprintln!("xtask: {name}: {problem}"));
    }
    let failed = checks.iter().filter(|(_, problems)| !problems.is_empty()).count();
    ensure!(failed == 0, "{failed} of {} checks failed", checks.len());
    Ok(())
}

/// A package of the workspace, as `cargo metadata` reports it.
struct Package {
    name: String,
    version: String,
    rust_version: Option<String>,
    is_published: bool,
    /// The folder of its Cargo.toml.
    folder: PathBuf,
    /// Those of `FIELDS` that are absent or empty.
    missing: Vec<&'static str>,
    /// Name and version requirement of each dependency in the workspace, without those for tests only.
    dependencies: Vec<(String, String)>,
}

impl Package {
    fn parse(value: &Value) -> Result<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let is_empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        let dependencies = value["dependencies"].as_array().into_iter().flatten();
        // Cargo leaves test dependencies without a version out of the published package.
        let of_workspace = dependencies.filter(|other| !other["path"].is_null() && other["kind"] != "dev");
        Ok(Self {
            name: text(&value["name"]).context("a package without a name")?,
            version: text(&value["version"]).context("a package without a version")?,
            rust_version: text(&value["rust_version"]),
            // `publish = false` is an empty list of registries.
            is_published: value["publish"].as_array().is_none_or(|registries| !registries.is_empty()),
            folder: Path::new(value["manifest_path"].as_str().unwrap_or_default()).parent().unwrap_or(root()).into(),
            missing: FIELDS.into_iter().filter(|field| is_empty(&value[*field])).collect(),
            dependencies: of_workspace
                .filter_map(|other| Some((text(&other["name"])?, text(&other["req"])?)))
                .collect(),
        })
    }
}

/// Returns all packages of the workspace.
fn packages() -> Result<Vec<Package>> {
    let metadata = metadata()?;
    metadata["packages"].as_array().context("cargo metadata reports no packages")?.iter().map(Package::parse).collect()
}

/// Checks that all packages of the workspace have the version of the release.
fn package_versions(packages: &[Package], version: &str) -> Problems {
    let others = packages.iter().filter(|package| package.version != version);
    others
        .map(|other| format!("{} has version {}, not {version}; set it in Cargo.toml", other.name, other.version))
        .collect()
}

/// Checks that the Python package takes its version from Cargo.toml, or states the same.
fn python_version(pyproject: &str, version: &str) -> Option<String> {
    let is_dynamic = |line: &str| line.starts_with("dynamic = ") && line.contains("\"version\"");
    if pyproject.lines().any(is_dynamic) || pyproject.lines().any(|line| line == format!("version = \"{version}\"")) {
        return None;
    }
    Some(format!("the Python package has another version than {version}; set `dynamic = [\"version\"]` in {PYPROJECT}"))
}

/// Checks the versions of modelcache that a file below deploy/ names.
fn deployed_versions(file: &str, text: &str, version: &str) -> Result<Problems> {
    // `my-modelcache:1` is another image, and `modelcache:8917` is an address.
    let named = Regex::new(r#"(?m)(?:(?:^|[^-\w])modelcache:|^appVersion: *"?)([0-9]+\.[0-9A-Za-z.+-]+)"#)?;
    let versions = named.captures_iter(text).filter_map(|found| Some(found.get(1)?.as_str()));
    let others = versions.filter(|other| *other != version);
    Ok(others.map(|other| format!("{file} names version {other}; change it to {version}")).collect())
}

/// Checks that the changelog has a dated section for the version, with all entries.
fn changelog(text: &str, version: &str) -> Result<Problems> {
    let text = format!("\n{text}");
    // The rest of the heading, and the number of entries.
    let section = |name: &str| {
        let (_, rest) = text.split_once(&format!("\n## [{name}]"))?;
        let (heading, body) = rest.split_once('\n')?;
        let entries = body.split("\n## ").next()?.lines().filter(|line| line.starts_with("- "));
        Some((heading, entries.count()))
    };
    let expected = format!("`## [{version}] - YYYY-MM-DD`");
    let Some((heading, entries)) = section(version) else {
        return Ok(vec![format!(
            "CHANGELOG.md has no section of the version; rename its section `## [Unreleased]` to {expected}, with the \
             date of the release"
        )]);
    };
    let mut problems = Vec::new();
    if !Regex::new("^ - [0-9]{4}-[0-9]{2}-[0-9]{2}$")?.is_match(heading) {
        problems.push(format!(
            "the heading `## [{version}]{heading}` of CHANGELOG.md has no date; change it to {expected}"
        ));
    }
    if entries == 0 {
        problems.push(format!("the section [{version}] of CHANGELOG.md has no entries"));
    }
    if let Some((_, left)) = section("Unreleased").filter(|(_, entries)| *entries > 0) {
        problems
            .push(format!("CHANGELOG.md has {left} entries below [Unreleased]; move them to the section [{version}]"));
    }
    Ok(problems)
}

/// Checks that exactly the crates of `PUBLISHED` can be published.
fn published(packages: &[Package]) -> Problems {
    let mut problems = Vec::new();
    for package in packages {
        let name = package.name.as_str();
        match (package.is_published, PUBLISHED.contains(&name)) {
            (true, false) => problems.push(format!(
                "{name} would be published; set `publish = false` in its Cargo.toml, or add it to xtask/src/release.rs"
            )),
            (false, true) => problems.push(format!("{name} has `publish = false`")),
            _ => {}
        }
    }
    problems
}

/// Checks that each published crate depends only on those crates of the workspace that are published before it, and
/// requires their present versions.
fn dependencies(packages: &[Package]) -> Problems {
    let mut problems = Vec::new();
    for package in packages.iter().filter(|package| package.is_published) {
        let before = PUBLISHED.iter().take_while(|name| **name != package.name);
        for (name, requirement) in &package.dependencies {
            if !before.clone().any(|earlier| earlier == name) {
                problems.push(format!("{} depends on {name}, which is not published before it", package.name));
            }
            let Some(other) = packages.iter().find(|other| other.name == *name) else { continue };
            if *requirement != format!("^{}", other.version) {
                problems.push(format!(
                    "{} depends on version {requirement} of {name}; set `version = \"{}\"` in [workspace.dependencies] \
                     of Cargo.toml",
                    package.name, other.version
                ));
            }
        }
    }
    problems
}

/// Checks that the lock file beside `manifest` is up to date. The fuzz targets are not in the workspace, so no other
/// cargo command reports that their lock file is out of date. Cargo reads the index of the registry if it needs it.
fn lock_file(manifest: &Path) -> Result<Problems> {
    let arguments = ["update", "--workspace", "--locked", "--manifest-path"];
    let output = cargo().args(arguments).arg(manifest).output().context("cannot run cargo")?;
    if output.status.success() {
        return Ok(vec![]);
    }
    let shown = manifest.strip_prefix(root()).unwrap_or(manifest).display();
    let errors = String::from_utf8_lossy(&output.stderr);
    let cause = errors.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or("cargo update failed");
    Ok(vec![format!("{cause}; run `cargo update --workspace --manifest-path {shown}`")])
}

/// Checks the fields that package registries show.
fn fields(packages: &[Package], pyproject: &str) -> Problems {
    let published: Vec<_> = packages.iter().filter(|package| package.is_published).collect();
    let mut problems = Vec::new();
    for field in FIELDS {
        let without = published.iter().filter(|package| package.missing.contains(&field));
        let names: Vec<_> = without.map(|package| package.name.as_str()).collect();
        let remedy = match field {
            "repository" => {
                "set the public URL in [workspace.package] of Cargo.toml, and `repository.workspace = true`"
            }
            _ => "set it in Cargo.toml",
        };
        if !names.is_empty() {
            problems.push(format!("no `{field}` in {}; {remedy}", names.join(", ")));
        }
    }
    if !pyproject.lines().any(|line| line == "[project.urls]") {
        problems.push(format!("no section [project.urls] in {PYPROJECT}; set `Repository` to the public URL"));
    }
    problems
}

/// Checks that the repository, each published crate and the Python package have the texts of the licences.
fn licences(packages: &[Package], root: &Path, is_file: impl Fn(&Path) -> bool) -> Problems {
    let shipped = packages.iter().filter(|package| package.is_published || package.name == PYTHON);
    let folders = shipped.map(|package| package.folder.as_path()).chain([root]);
    let files = folders.flat_map(|folder| LICENCES.map(|name| folder.join(name)));
    let shown = |file: &Path| file.strip_prefix(root).unwrap_or(file).display().to_string();
    files.filter(|file| !is_file(file)).map(|file| format!("{} is missing", shown(&file))).collect()
}

/// Checks that all packages have one `rust-version`, and that README.md states it.
fn rust_version(packages: &[Package], readme: &str) -> Problems {
    let Some(version) = packages.first().and_then(|package| package.rust_version.as_deref()) else {
        return vec!["`rust-version` is not set in Cargo.toml".to_owned()];
    };
    let others = packages.iter().filter(|package| package.rust_version.as_deref() != Some(version));
    let mut problems: Problems =
        others.map(|other| format!("{} does not have `rust-version` {version}", other.name)).collect();
    let words: Vec<&str> = readme.split(|c: char| c.is_whitespace() || ",;()".contains(c)).collect();
    if !words.windows(2).any(|pair| pair[0] == "Rust" && pair[1].trim_end_matches('.') == version) {
        problems.push(format!("README.md does not state the required Rust {version}"));
    }
    problems
}

/// Checks the versions that README.md names in its installation commands and in its status.
fn readme_versions(readme: &str, version: &str) -> Result<Problems> {
    let named = Regex::new(r"(?:==|@|--version[ =])v?([0-9]+\.[0-9][0-9A-Za-z.+-]*)")?;
    let installs = |line: &&str| line.contains("cargo install") || line.contains("pip install");
    let mut problems = Vec::new();
    for line in readme.lines().filter(installs) {
        let versions = named.captures_iter(line).filter_map(|found| Some(found.get(1)?.as_str()));
        let others = versions.filter(|other| *other != version);
        problems.extend(others.map(|other| format!("README.md installs version {other}; change it to {version}")));
    }
    if let Some(line) = readme.lines().find(|line| line.starts_with("**Status**")) {
        if line.contains("not released") {
            problems
                .push("README.md says \"not released yet\"; change the line **Status**, and `## Install`".to_owned());
        }
        let stated = Regex::new(r"^\*\*Status\*\*: ([0-9.]*[0-9])")?.captures(line).and_then(|found| found.get(1));
        if !stated.is_some_and(|stated| format!("{version}.").starts_with(&format!("{}.", stated.as_str()))) {
            problems.push(format!("the line **Status** of README.md does not name version {version}"));
        }
    }
    Ok(problems)
}

/// Checks the output of `git status --porcelain`.
fn working_tree(status: &str) -> Problems {
    let files: Vec<&str> = status.lines().filter_map(|line| line.get(3..)).collect();
    let more = if files.len() > 1 { format!(" and {} more", files.len() - 1) } else { String::new() };
    files.first().map(|first| format!("{first}{more} not committed; commit or remove")).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const README: &str = "**Status**: 0.1. **Build requirements**: Rust 1.95 and a C compiler.\n\
                          $ cargo install modelcache-cli\n$ pip install modelcache\n";

    /// Returns a package that passes every check.
    fn complete(name: &str) -> Value {
        json!({
            "name": name, "version": "0.1.0", "rust_version": "1.95", "publish": null, "dependencies": [],
            "manifest_path": format!("/r/crates/{name}/Cargo.toml"), "description": "d", "license": "MIT",
            "readme": "README.md", "keywords": ["k"], "categories": ["c"], "repository": "https://host.example/r",
        })
    }

    /// Returns the published crates and one that is not. `change` alters the second one before it is parsed.
    fn packages(change: impl FnOnce(&mut Value)) -> Vec<Package> {
        let mut values = PUBLISHED.map(complete).to_vec();
        values[1]["dependencies"] = json!([
            {"name": "modelcache", "req": "^0.1.0", "kind": null, "path": "/r/crates/modelcache"},
            {"name": "testkit", "req": "*", "kind": "dev", "path": "/r/crates/testkit"},
            {"name": "url", "req": "*", "kind": null},
        ]);
        change(&mut values[1]);
        values.push(json!({"name": "testkit", "version": "0.1.0", "rust_version": "1.95", "publish": []}));
        values.iter().map(|value| Package::parse(value).expect("valid")).collect()
    }

    #[test]
    fn a_package_with_another_version_is_found() {
        assert_eq!(package_versions(&packages(|_| ()), "0.1.0"), [""; 0]);
        let problems = package_versions(&packages(|package| package["version"] = "0.2.0".into()), "0.1.0");
        assert_eq!(problems, ["modelcache-server has version 0.2.0, not 0.1.0; set it in Cargo.toml"]);
    }

    #[test]
    fn another_version_of_the_python_package_is_found() {
        assert_eq!(python_version("[project]\ndynamic = [\"version\"]\n", "0.1.0"), None);
        assert_eq!(python_version("[project]\nversion = \"0.1.0\"\n", "0.1.0"), None);
        assert!(python_version("[project]\nversion = \"0.0.9\"\n", "0.1.0").is_some());
        assert!(python_version("[project]\ndynamic = [\"readme\"]\n", "0.1.0").is_some());
    }

    #[test]
    fn other_versions_in_deployments_are_found() {
        let deployed = |text| deployed_versions("a.yaml", text, "0.1.0").expect("a pattern").len();
        assert_eq!(deployed("image: modelcache:0.1.0\nappVersion: \"0.1.0\"\nimage: other:2.0.0\n"), 0);
        assert_eq!(deployed("    image: host.example/modelcache:0.2.0\n"), 1);
        assert_eq!(deployed("appVersion: 0.0.1\n"), 1);
        assert_eq!(deployed("image: my-vllm-with-modelcache:1\nHF_ENDPOINT: http://modelcache:8917\n"), 0);
        assert_eq!(deployed("\"image\": \"host.example/modelcache:0.2.0\",\n"), 1);
    }

    #[test]
    fn a_changelog_without_a_dated_complete_section_is_found() {
        let problems = |text| changelog(text, "0.1.0").expect("a pattern");
        assert_eq!(problems("# Changelog\n\n## [0.1.0] - 2030-01-02\n\n- A.\n"), [""; 0]);
        assert_eq!(problems("## [Unreleased]\n\n## [0.1.0] - 2030-01-02\n\n- A.\n\n## [0.0.1]\n"), [""; 0]);
        for (text, part) in [
            ("# Changelog\n\n## [Unreleased]\n\n- A.\n", "`## [Unreleased]` to `## [0.1.0] - YYYY-MM-DD`"),
            ("## [0.1.01] - 2030-01-02\n\n- A.\n", "no section"),
            ("## [0.1.0] - unreleased\n\n- A.\n", "no date"),
            ("## [0.1.0] - 2030-01-02\n\n## [0.0.1] - 2029-01-02\n\n- A.\n", "no entries"),
            ("## [Unreleased]\n\n- B.\n- C.\n\n## [0.1.0] - 2030-01-02\n\n- A.\n", "2 entries below [Unreleased]"),
        ] {
            let found = problems(text);
            assert!(found.len() == 1 && found[0].contains(part), "{text}: {found:?}");
        }
    }

    #[test]
    fn a_crate_that_must_not_or_cannot_be_published_is_found() {
        assert_eq!(published(&packages(|_| ())), [""; 0]);
        let problems = published(&packages(|package| package["publish"] = json!([])));
        assert_eq!(problems, ["modelcache-server has `publish = false`"]);
        let problems = published(&packages(|package| package["name"] = "new".into()));
        assert!(problems[0].starts_with("new would be published"), "{problems:?}");
    }

    #[test]
    fn dependencies_need_the_version_of_a_crate_that_is_published_earlier() {
        assert_eq!(dependencies(&packages(|_| ())), [""; 0]);
        for (requirement, name) in [("*", "modelcache"), ("^0.0.9", "modelcache"), ("^0.1.0", "modelcache-cli")] {
            let found = packages(|package| {
                package["dependencies"] = json!([{"name": name, "req": requirement, "kind": null, "path": "/r"}]);
            });
            assert_eq!(dependencies(&found).len(), 1, "{requirement} of {name}");
        }
    }

    #[test]
    fn a_lock_file_with_another_version_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
        let problems = || lock_file(&folder.path().join("Cargo.toml")).expect("cargo");
        write(
            "Cargo.toml",
            "[package]\nname = \"a\"\nversion = \"0.2.0\"\nedition = \"2024\"\n[lib]\npath = \"a.rs\"\n",
        );
        write("a.rs", "");
        let lock = |version: &str| format!("version = 4\n\n[[package]]\nname = \"a\"\nversion = \"{version}\"\n");
        write("Cargo.lock", &lock("0.2.0"));
        assert_eq!(problems(), [""; 0]);
        write("Cargo.lock", &lock("0.1.0"));
        assert!(problems()[0].contains("run `cargo update"), "{:?}", problems());
    }

    #[test]
    fn missing_metadata_is_found() {
        let pyproject = "[project.urls]\nRepository = \"https://host.example/r\"\n";
        assert_eq!(fields(&packages(|_| ()), pyproject), [""; 0]);
        for field in FIELDS {
            let problems = fields(&packages(|package| package[field] = Value::Null), pyproject);
            assert_eq!(problems.len(), 1, "{field}: {problems:?}");
            assert!(problems[0].starts_with(&format!("no `{field}` in modelcache-server;")), "{problems:?}");
        }
        assert_eq!(fields(&packages(|package| package["keywords"] = json!([])), pyproject).len(), 1);
        assert_eq!(fields(&packages(|_| ()), "[project]\n").len(), 1);
    }

    #[test]
    fn a_missing_licence_is_found() {
        let problems = |missing: &str| licences(&packages(|_| ()), Path::new("/r"), |path| !path.ends_with(missing));
        assert_eq!(problems("none"), [""; 0]);
        assert_eq!(problems("modelcache-cli/LICENSE-MIT"), ["crates/modelcache-cli/LICENSE-MIT is missing"]);
        assert!(problems("LICENSE-APACHE").contains(&"LICENSE-APACHE is missing".to_owned()));
    }

    #[test]
    fn another_rust_version_is_found() {
        assert_eq!(rust_version(&packages(|_| ()), README), [""; 0]);
        assert_eq!(rust_version(&packages(|_| ()), "Needs Rust 1.95."), [""; 0]);
        assert_eq!(rust_version(&packages(|_| ()), "Needs Rust 1.9, or 1.95.").len(), 1);
        assert_eq!(rust_version(&packages(|package| package["rust_version"] = "1.90".into()), README).len(), 1);
        assert_eq!(rust_version(&[], README).len(), 1);
    }

    #[test]
    fn other_versions_in_the_readme_are_found() {
        let problems = |readme: &str| readme_versions(readme, "0.1.0").expect("a pattern");
        assert_eq!(problems(README), [""; 0]);
        assert_eq!(problems("$ pip install modelcache==0.1.0\n$ cargo install modelcache-cli@0.1.0\n"), [""; 0]);
        for readme in [
            "$ pip install modelcache==0.2.0\n",
            "$ cargo install modelcache-cli --version 0.0.9\n",
            "**Status**: 0.1, not released yet.\n",
            "**Status**: 0.2.\n",
        ] {
            assert_eq!(problems(readme).len(), 1, "{readme}");
        }
    }

    #[test]
    fn files_that_are_not_committed_are_found() {
        assert_eq!(working_tree(""), [""; 0]);
        assert_eq!(working_tree(" M README.md\n?? new.rs\n"), ["README.md and 1 more not committed; commit or remove"]);
    }

    #[test]
    fn a_failed_check_fails_the_task() {
        report(&[("a", vec![]), ("b", vec![])]).expect("nothing failed");
        let error = report(&[("a", vec![]), ("b", vec!["wrong; mend it".to_owned()])]).expect_err("one failed");
        assert_eq!(error.to_string(), "1 of 2 checks failed");
    }

    // These checks must pass at every commit. The others need to pass only at a release.
    #[test]
    fn the_packages_of_this_repository_fit_together() {
        let packages = super::packages().expect("cargo metadata");
        let version = &packages[0].version;
        let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
        let pyproject = fs::read_to_string(root().join(PYPROJECT)).expect("pyproject.toml");
        let mut problems = package_versions(&packages, version);
        problems.extend(python_version(&pyproject, version));
        problems.extend(published(&packages));
        problems.extend(dependencies(&packages));
        problems.extend(licences(&packages, root(), |path| path.is_file()));
        problems.extend(rust_version(&packages, &readme));
        assert_eq!(problems, [""; 0]);
    }
}
