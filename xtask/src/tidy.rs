//! Checks all files that git tracks for rules of this repository that no compiler checks.
//!
//! Rust modules start with a header. No code is left unfinished. No file contains a path of the development machine, or
//! a package mirror that only this machine can reach. Below the root of a cache directory, only one module calls the
//! filesystem with a path. A module of the library imports only from its own layer and from lower ones. The library
//! names no variable of the front ends.

use crate::repository::{git, root};
use anyhow::{Result, ensure};
use regex::Regex;
use std::fs;

/// The only package source that the lock file may name.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Checks every tracked file and prints every violation.
pub(crate) fn check() -> Result<()> {
    let rules = Rules::new()?;
    let mut violations = Vec::new();
    let files = tracked_files()?;
    for path in &files {
        // Skip a link to a folder, and a file that was removed but is still tracked.
        if let Ok(text) = fs::read_to_string(root().join(path)) {
            violations.extend(rules.violations(path, &text).into_iter().map(|violation| format!("{path}{violation}")));
        }
    }
    violations.iter().for_each(|violation| println!("{violation}"));
    ensure!(violations.is_empty(), "{} violations of the rules in xtask/src/tidy.rs", violations.len());
    println!("{} files follow the rules", files.len());
    Ok(())
}

/// Returns the paths of all files that git tracks.
pub(crate) fn tracked_files() -> Result<Vec<String>> {
    let names = git(&["ls-files", "-z"])?;
    Ok(names.split_terminator('\0').map(str::to_owned).collect())
}

struct Rules {
    /// Patterns that no line may match, with the reason.
    forbidden: Vec<(Regex, &'static str)>,
    /// Matches a call of the filesystem with a path.
    filesystem_call: Regex,
    /// Matches an import from the crate itself.
    import: Regex,
}

/// The layers of the library, from the top down. A module imports only from its own layer and from those below.
const LAYERS: [&[&str]; 7] = [
    &["cache", "doctor"],
    &["origin"],
    &["remote"],
    &["transfer"],
    &["disk"],
    &["check", "config", "credentials", "metrics", "progress", "rate_limiter", "runtime", "settings"],
    &[
        "digest",
        "error",
        "extract",
        "finding",
        "forbid",
        "format",
        "human",
        "json",
        "key",
        "ladder",
        "limits",
        "manifest",
        "mutex",
        "option_name",
        "printable",
        "redact",
        "reference",
        "selection",
        "sidecar",
        "source",
    ],
];

/// Allowed imports from a higher layer, by the beginning of the importing path and the imported module. The
/// configuration holds the application's own origins.
const ALLOWED_IMPORTS: [(&str, &str); 1] = [("config.rs", "origin")];

/// Modules of the library without a layer: the root, and the entry points of fuzz targets.
const WITHOUT_LAYER: [&str; 2] = ["lib", "fuzzing"];

/// Returns the path below the library's sources, and the module that it belongs to.
fn library_module(path: &str) -> Option<(&str, &str)> {
    let path = path.strip_prefix("crates/modelcache/src/")?;
    Some((path, path.split('/').next()?.trim_end_matches(".rs")))
}

/// Returns the layer of a module of the library; 0 is the top.
fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

/// The rows of settings, with their variables. Other modules of the library name an option with `OptionName`.
const MAY_NAME_VARIABLES: [&str; 2] = ["settings.rs", "settings/"];

/// Folders with code that works on files of a cache directory.
const CACHE_DIRECTORY_CODE: [&str; 3] =
    ["crates/modelcache/src/disk/", "crates/modelcache/src/cache/", "crates/modelcache/src/transfer/"];
/// Modules that may call the filesystem with a path: `rooted.rs`, for files below the root of the cache directory, and
/// modules that only read files of the caller, files of the kernel, or the folder above the root.
const MAY_CALL_FILESYSTEM: [&str; 5] = ["rooted.rs", "input.rs", "memory.rs", "ownership.rs", "holders.rs"];
/// Comment that allows a call, at the end of its line or of the line above. The call names the root itself, a folder
/// above it, or a file outside the cache directory.
const NOT_BELOW: &str = "// not below the root";

impl Rules {
    fn new() -> Result<Self> {
        // The patterns are split, so that this file passes its own check. Home folders with one-letter names are
        // allowed as examples.
        let forbidden = [
            (concat!("(^|[^A-Za-z0-9_])to", "do!"), "unfinished code"),
            (
                concat!("(^|[^A-Za-z0-9_.%/:-])/", "(work|root|home/[A-Za-z0-9_.-]{2,})(/|[^A-Za-z0-9_.-]|$)"),
                "a path of the development machine",
            ),
            (
                concat!("(static|index)[.]crates", "[.]io|python", "hosted[.]org|pypi[.]", "org/simple"),
                "the host of a package registry",
            ),
            (concat!("--(extra-)?index", "-url|^ *replace", "-with *="), "a package mirror"),
        ];
        let compile = |(pattern, reason)| Ok((Regex::new(pattern)?, reason));
        // Functions of `std::fs`, `rustix::fs` and `std::path` that take a path.
        let filesystem_call = Regex::new(concat!(
            "(fs::(read|write|rename|remove|create|copy|hard_link|soft_link|metadata|symlink|canonicalize|set_perm",
            "|open|mkdir|unlink|link|stat|lstat|chmod|utimens|access|mknod)",
            "|OpenOptions::|File::(open|create|options)|[.](exists|canonicalize|read_dir)[(][)]|full[(][)][.])"
        ))?;
        let import = Regex::new(r"crate::(?:([a-z_]+)|\{([^}]*))")?;
        Ok(Self { forbidden: forbidden.into_iter().map(compile).collect::<Result<_>>()?, filesystem_call, import })
    }

    /// Returns the module that a line imports from a higher layer.
    fn upward_import<'l>(&self, path: &str, line: &'l str) -> Option<&'l str> {
        let (path, own) = library_module(path)?;
        let own = layer(own).filter(|_| !line.trim_start().starts_with("//"))?;
        let is_allowed = |name: &str| ALLOWED_IMPORTS.iter().any(|(from, to)| path.starts_with(from) && name == *to);
        let groups = self.import.captures_iter(line).filter_map(|found| found.get(1).or(found.get(2)));
        let mut names =
            groups.flat_map(|group| group.as_str().split(", ")).map(|name| name.split("::").next().unwrap_or(name));
        names.find(|name| layer(name).is_some_and(|other| other < own) && !is_allowed(name))
    }

    /// Returns true if a line of the library has a variable of the front ends in a message.
    fn is_forbidden_variable(path: &str, line: &str) -> bool {
        let file = library_module(path).map(|(file, _)| file);
        file.is_some_and(|file| !MAY_NAME_VARIABLES.iter().any(|allowed| file.starts_with(allowed)))
            && !line.trim_start().starts_with("//")
            && line.contains("MODEL_CACHE_")
    }

    /// Returns true if a line calls the filesystem with a path although its module may not.
    fn is_forbidden_filesystem_call(&self, path: &str, above: &str, line: &str) -> bool {
        let folder = CACHE_DIRECTORY_CODE.iter().find_map(|folder| path.strip_prefix(folder));
        let is_restricted =
            folder.is_some_and(|file| !MAY_CALL_FILESYSTEM.contains(&file) && !file.ends_with("tests.rs"));
        let code = line.trim_start();
        is_restricted
            && !code.starts_with("//")
            && !code.starts_with("use ")
            && !line.ends_with(NOT_BELOW)
            && !above.ends_with(NOT_BELOW)
            && self.filesystem_call.is_match(line)
    }

    /// Returns `:line: reason` for every violation in a file.
    fn violations(&self, path: &str, text: &str) -> Vec<String> {
        let mut violations = Vec::new();
        // The header of an example that is also a doc test is an attribute.
        if path.ends_with(".rs") && !text.starts_with("//! ") && !text.starts_with("#![doc = ") {
            violations.push(":1: the module has no //! header that states its purpose".to_owned());
        }
        let module = library_module(path).map(|(_, module)| module);
        if let Some(module) = module.filter(|module| layer(module).is_none() && !WITHOUT_LAYER.contains(module)) {
            violations.push(format!(":1: the module {module} is in none of the layers in xtask/src/tidy.rs"));
        }
        let (mut is_test, mut above) = (false, "");
        for (number, line) in (1..).zip(text.lines()) {
            is_test |= line == "#[cfg(test)]" || line.starts_with("#[cfg(all(test");
            if !is_test && self.is_forbidden_filesystem_call(path, above, line) {
                violations.push(format!(
                    ":{number}: only disk/rooted.rs may call the filesystem below the root of a cache directory: {}",
                    line.trim()
                ));
            }
            if !is_test && Self::is_forbidden_variable(path, line) {
                violations
                    .push(format!(":{number}: names a variable of the front ends; use option_name: {}", line.trim()));
            }
            if let Some(module) = self.upward_import(path, line).filter(|_| !is_test) {
                violations.push(format!(":{number}: imports {module}, which is in a higher layer"));
            }
            above = line;
            for (pattern, reason) in &self.forbidden {
                if pattern.is_match(line) {
                    violations.push(format!(":{number}: {reason}: {}", line.trim()));
                }
            }
            if path == "Cargo.lock" && line.starts_with("source = ") && !line.contains(CRATES_IO) {
                violations.push(format!(":{number}: the package is not from crates.io: {line}"));
            }
        }
        violations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(path: &str, text: &str) -> usize {
        Rules::new().expect("valid patterns").violations(path, text).len()
    }

    #[test]
    fn imports_point_down() {
        let line = "//! M.\nuse crate::cache::Cache;\n";
        assert_eq!(violations("crates/modelcache/src/disk/mod.rs", line), 1);
        assert_eq!(violations("crates/modelcache/src/disk/mod.rs", "//! M.\nuse crate::{cache, key};\n"), 1);
        assert_eq!(violations("crates/modelcache/src/doctor/mod.rs", line), 0);
        assert_eq!(violations("crates/modelcache/src/new/mod.rs", "//! M.\n"), 1);
        assert_eq!(violations("crates/modelcache/src/cache/get.rs", "//! M.\nuse crate::disk::Disk;\n"), 0);
        assert_eq!(violations("crates/modelcache/src/key.rs", "//! M.\n// see crate::cache\n"), 0);
    }

    #[test]
    fn the_library_names_variables_only_in_its_settings() {
        let line = "//! M.\n.hint(\"set MODEL_CACHE_DIR\")\n";
        assert_eq!(violations("crates/modelcache/src/disk/mod.rs", line), 1);
        assert_eq!(violations("crates/modelcache/src/settings.rs", line), 0);
        assert_eq!(violations("crates/modelcache/src/settings/read.rs", line), 0);
        assert_eq!(violations("crates/modelcache-cli/src/output.rs", line), 0);
        assert_eq!(violations("crates/modelcache/src/disk/mod.rs", "//! M.\n// MODEL_CACHE_DIR\n"), 0);
    }

    #[test]
    fn paths_and_mirrors_of_one_machine_are_found() {
        for line in [
            concat!("cd /", "root/x"),
            concat!("see \"/", "work\""),
            concat!("/", "home/alice/.cache"),
            concat!("pip --index", "-url x"),
            concat!("    to", "do!()"),
        ] {
            assert_eq!(violations("a.md", line), 1, "{line}");
        }
        for line in ["/home/u/.aws", "s3://bucket/work/x", "target/root/x", "https://host/root", "/rooted", "network"] {
            assert_eq!(violations("a.md", line), 0, "{line}");
        }
    }

    #[test]
    fn below_the_root_one_module_calls_the_filesystem() {
        let line = "//! A module.\n    let file = std::fs::File::open(path)?;\n";
        assert_eq!(violations("crates/modelcache/src/disk/publish.rs", line), 1);
        assert_eq!(violations("crates/modelcache/src/disk/publish.rs", "//! M.\nif path.exists() {\n"), 1);
        assert_eq!(violations("crates/modelcache/src/disk/rooted.rs", line), 0);
        assert_eq!(violations("crates/modelcache/src/remote/upload.rs", line), 0);
        assert_eq!(violations("crates/modelcache/src/disk/publish.rs", &format!("//! M.\n#[cfg(test)]\n{line}")), 0);
        let allowed = "//! M.\nstd::fs::create_dir_all(above)?; // not below the root\n";
        assert_eq!(violations("crates/modelcache/src/disk/mod.rs", allowed), 0);
    }

    #[test]
    fn modules_need_a_header_and_packages_a_public_source() {
        assert_eq!(violations("a.rs", "use x;\n"), 1);
        assert_eq!(violations("a.rs", "//! What it is for.\nuse x;\n"), 0);
        assert_eq!(violations("a.py", "import x\n"), 0);
        assert_eq!(violations("Cargo.lock", "source = \"registry+https://mirror.example/index\""), 1);
        assert_eq!(violations("Cargo.lock", &format!("source = \"{CRATES_IO}\"")), 0);
    }
}
