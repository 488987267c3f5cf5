//! The files of `aws configure`: `~/.aws/config` and `~/.aws/credentials`, as far as settings are concerned.
//!
//! Lenient: what is no `[section]` and no `name = value` is passed over, as the AWS tools do with nested settings.

use crate::config::Environment;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

type Sections = HashMap<String, HashMap<String, String>>;

/// The shared configuration, and which profile of it is meant.
#[derive(Clone, Default)]
pub(super) struct Profiles {
    name: String,
    sections: Sections,
}

/// Values may be keys: names only.
impl std::fmt::Debug for Profiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Profiles({:?} of {:?})", self.name, self.sections.keys())
    }
}

/// The folder `~`, as the environment has it.
pub(super) fn home(environment: &Environment) -> Option<PathBuf> {
    environment.get("HOME").or_else(|| environment.get("USERPROFILE")).map(PathBuf::from)
}

/// Where one of the two files lies: the variable's value (with `~` expanded), else its usual place.
fn file(environment: &Environment, variable: &str, usual: &str) -> Option<PathBuf> {
    match environment.get(variable) {
        Some(path) => match path.strip_prefix("~/") {
            Some(rest) => Some(home(environment)?.join(rest)),
            None => Some(PathBuf::from(path)),
        },
        None => Some(home(environment)?.join(usual)),
    }
}

impl Profiles {
    /// The name of the profile that the environment chooses.
    pub(super) fn chosen(environment: &Environment) -> &str {
        environment.get("AWS_PROFILE").or_else(|| environment.get("AWS_DEFAULT_PROFILE")).unwrap_or("default")
    }

    /// The two files, in the order credentials, configuration.
    pub(super) fn files(environment: &Environment) -> Vec<PathBuf> {
        let credentials = file(environment, "AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
        let config = file(environment, "AWS_CONFIG_FILE", ".aws/config");
        credentials.into_iter().chain(config).collect()
    }

    /// Reads both files; a file that is not there is empty. Blocks.
    pub(super) fn load(environment: &Environment) -> Self {
        let read = |path: Option<PathBuf>| path.map(|path: PathBuf| read_text(&path)).unwrap_or_default();
        Self::from_texts(
            Self::chosen(environment),
            &read(file(environment, "AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials")),
            &read(file(environment, "AWS_CONFIG_FILE", ".aws/config")),
        )
    }

    /// From the files' texts; where both have a setting, the credentials file wins.
    pub(super) fn from_texts(name: &str, credentials: &str, config: &str) -> Self {
        let mut sections = Sections::new();
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

    /// The chosen profile's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the chosen profile exists.
    pub(super) fn exists(&self) -> bool {
        self.sections.contains_key(&self.name)
    }

    /// A setting of the chosen profile.
    pub(super) fn current(&self, setting: &str) -> Option<&str> {
        self.get(&self.name, setting)
    }

    /// A setting of any profile, or of a section such as `sso-session NAME`.
    pub(super) fn get(&self, section: &str, setting: &str) -> Option<&str> {
        self.sections.get(section)?.get(setting).map(String::as_str).filter(|value| !value.is_empty())
    }
}

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

fn parse(text: &str) -> Vec<(String, HashMap<String, String>)> {
    let mut sections: Vec<(String, HashMap<String, String>)> = Vec::new();
    for line in text.lines() {
        let nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) || (nested && !line.starts_with('[')) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            sections.push((name.split_whitespace().collect::<Vec<_>>().join(" "), HashMap::new()));
        } else if let (Some((name, value)), Some((_, values))) = (line.split_once('='), sections.last_mut()) {
            let value = value.split(" #").next().unwrap_or(value).trim();
            values.insert(name.trim().to_ascii_lowercase(), value.to_owned());
        }
    }
    sections
}

/// Whatever a user's file holds; see `fuzzing`.
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
        assert_eq!(profiles.get("sso-session corp", "sso_region"), Some("eu-west-1"));
        assert!(!Profiles::from_texts("other", "", config).exists());
    }

    #[test]
    fn the_environment_says_where_the_files_lie() {
        let environment = |pairs: &[(&str, &str)]| {
            Environment(pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
        };
        let home = environment(&[("HOME", "/home/u")]);
        assert_eq!(Profiles::files(&home)[0], Path::new("/home/u/.aws/credentials"));
        let moved = environment(&[("HOME", "/home/u"), ("AWS_CONFIG_FILE", "~/c"), ("AWS_PROFILE", "p")]);
        assert_eq!(Profiles::files(&moved)[1], Path::new("/home/u/c"));
        assert_eq!(Profiles::chosen(&moved), "p");
        assert!(Profiles::files(&Environment::default()).is_empty());
    }
}
