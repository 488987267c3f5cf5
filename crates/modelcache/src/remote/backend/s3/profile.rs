//! The AWS configuration files: settings of a profile in `~/.aws/config` and `~/.aws/credentials`.
//!
//! Lines other than `[section]` and `name = value` are ignored.

use crate::config::Environment;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

type Sections = HashMap<String, HashMap<String, String>>;

/// The sections of both files, and the name of the selected profile.
#[derive(Clone, Default)]
pub(super) struct Profiles {
    name: String,
    sections: Sections,
}

/// Prints names only, because values may be keys.
impl std::fmt::Debug for Profiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Profiles({:?} of {:?})", self.name, self.sections.keys())
    }
}

/// Returns the home directory according to `environment`.
pub(super) fn home(environment: &Environment) -> Option<PathBuf> {
    environment.get("HOME").or_else(|| environment.get("USERPROFILE")).map(PathBuf::from)
}

/// Returns the path of one of the two files: the value of `variable` with `~` expanded, or the default path.
fn file(environment: &Environment, variable: &str, default: &str) -> Option<PathBuf> {
    match environment.get(variable) {
        Some(path) => match path.strip_prefix("~/") {
            Some(rest) => Some(home(environment)?.join(rest)),
            None => Some(PathBuf::from(path)),
        },
        None => Some(home(environment)?.join(default)),
    }
}

impl Profiles {
    /// Returns the name of the profile that `environment` selects.
    pub(super) fn selected(environment: &Environment) -> &str {
        environment.get("AWS_PROFILE").or_else(|| environment.get("AWS_DEFAULT_PROFILE")).unwrap_or("default")
    }

    /// Returns the paths of the credentials file and the configuration file, in this order.
    pub(super) fn files(environment: &Environment) -> Vec<PathBuf> {
        let credentials = file(environment, "AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
        let config = file(environment, "AWS_CONFIG_FILE", ".aws/config");
        credentials.into_iter().chain(config).collect()
    }

    /// Reads both files. A missing file counts as empty. Blocks.
    pub(super) fn load(environment: &Environment) -> Self {
        let read = |path: Option<PathBuf>| path.map(|path: PathBuf| read_text(&path)).unwrap_or_default();
        Self::from_texts(
            Self::selected(environment),
            &read(file(environment, "AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials")),
            &read(file(environment, "AWS_CONFIG_FILE", ".aws/config")),
        )
    }

    /// Parses the texts of both files. The credentials file takes precedence.
    pub(super) fn from_texts(name: &str, credentials: &str, config: &str) -> Self {
        let mut sections = Sections::new();
        // The configuration file has sections named `profile NAME`, the credentials file sections named `NAME`.
        for (section, values) in parse(config) {
            let key = match section.strip_prefix("profile ") {
                Some(profile) => profile.trim().to_owned(),
                None => section,
            };
            sections.entry(key).or_default().extend(values);
        }
        for (section, values) in parse(credentials) {
            sections.entry(section).or_default().extend(values);
        }
        Self { name: name.to_owned(), sections }
    }

    /// Returns the name of the selected profile.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns true if the selected profile exists.
    pub(super) fn exists(&self) -> bool {
        self.sections.contains_key(&self.name)
    }

    /// Returns a setting of the selected profile.
    pub(super) fn current(&self, setting: &str) -> Option<&str> {
        self.get(&self.name, setting)
    }

    /// Returns a setting of any profile, or of a section such as `sso-session NAME`. An empty value counts as unset.
    pub(super) fn get(&self, section: &str, setting: &str) -> Option<&str> {
        self.sections.get(section)?.get(setting).map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// Reads a file. A missing file counts as empty, and so does an unreadable one, with a warning.
fn read_text(path: &Path) -> String {
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read an AWS configuration file");
            String::new()
        }
    }
}

/// Parses one file into sections, in file order. A nested setting is named `group.setting`, as in
/// `s3.addressing_style`.
fn parse(text: &str) -> Vec<(String, HashMap<String, String>)> {
    let mut sections: Vec<(String, HashMap<String, String>)> = Vec::new();
    let mut group = String::new();
    for line in text.lines() {
        let is_nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            sections.push((name.split_whitespace().collect::<Vec<_>>().join(" "), HashMap::new()));
        } else if let (Some((name, value)), Some((_, values))) = (line.split_once('='), sections.last_mut()) {
            // A comment at the end of a line begins with a space.
            let value = value.split(" #").next().unwrap_or(value).trim();
            let name = name.trim().to_ascii_lowercase();
            // Indented lines belong to the setting without a value above them, such as `s3 =`.
            match is_nested {
                true => drop(values.insert(format!("{group}.{name}"), value.to_owned())),
                false => {
                    group.clone_from(&name);
                    values.insert(name, value.to_owned());
                }
            }
        }
    }
    sections
}

/// Fuzz target: parses an arbitrary configuration file.
#[cfg(fuzzing)]
pub(crate) fn fuzz(text: &str) {
    assert!(parse(text).len() <= text.lines().count());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_are_read_as_aws_writes_them() {
        let config = "[default]\nregion=eu-central-1\ns3 =\n    max_concurrent_requests = 20\n\
                      [profile team]\nregion = us-west-2 # near\nsso_session = corp\n[sso-session corp]\nsso_region = eu-west-1\n";
        let profiles = Profiles::from_texts("team", "; keys\n[team]\naws_access_key_id = AK\n", config);
        assert_eq!(profiles.current("region"), Some("us-west-2"));
        assert_eq!(profiles.current("aws_access_key_id"), Some("AK"));
        assert_eq!(profiles.get("default", "region"), Some("eu-central-1"));
        assert_eq!(profiles.get("default", "max_concurrent_requests"), None);
        assert_eq!(profiles.get("default", "s3.max_concurrent_requests"), Some("20"));
        assert_eq!(profiles.get("sso-session corp", "sso_region"), Some("eu-west-1"));
        assert!(!Profiles::from_texts("other", "", config).exists());
    }

    #[test]
    fn the_environment_selects_files_and_profile() {
        let environment = |pairs: &[(&str, &str)]| {
            Environment(pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
        };
        let home = environment(&[("HOME", "/home/u")]);
        assert_eq!(Profiles::files(&home)[0], Path::new("/home/u/.aws/credentials"));
        let moved = environment(&[("HOME", "/home/u"), ("AWS_CONFIG_FILE", "~/c"), ("AWS_PROFILE", "p")]);
        assert_eq!(Profiles::files(&moved)[1], Path::new("/home/u/c"));
        assert_eq!(Profiles::selected(&moved), "p");
        assert!(Profiles::files(&Environment::default()).is_empty());
    }
}
