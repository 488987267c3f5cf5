//! Parses a configuration file into values by key, options of the object store, and credentials by server.
//!
//! This module checks types and refuses unknown keys. The values are validated when the settings are gathered.

use super::{CREDENTIALS_KEY, OPTIONS_KEY, SETTINGS};
use crate::error::{Error, Result};
use crate::human::nearest;
use crate::redact;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The keys of a table of credentials.
pub(super) const CREDENTIAL_KEYS: [&str; 7] =
    ["bearer", "bearer_env", "bearer_file", "username", "password", "password_env", "password_file"];

/// A parsed configuration file.
pub(super) struct File {
    pub(super) path: PathBuf,
    /// The values of settings by key.
    pub(super) values: BTreeMap<String, String>,
    /// The options of the object store by name.
    pub(super) options: BTreeMap<String, String>,
    /// Tables of credentials by scheme, host and port.
    pub(super) credentials: BTreeMap<String, BTreeMap<String, String>>,
}

impl File {
    /// Parses `text`, the content of the file at `path`.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self> {
        let table: toml::Table = toml::from_str(text).map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            Error::invalid(format!("{}: line {line}: {}", path.display(), error.message()))
                .hint("the file is TOML, for example max_bytes = \"200GB\"")
        })?;
        let (values, options, credentials) = Default::default();
        let mut file = Self { path: path.to_owned(), values, options, credentials };
        for (key, value) in table {
            match (key.as_str(), value) {
                ("remote", toml::Value::Table(remote)) => file.read_remote(remote)?,
                (CREDENTIALS_KEY, toml::Value::Table(servers)) => file.read_credentials(servers)?,
                (_, value) => file.read_value(&key, &value)?,
            }
        }
        Ok(file)
    }

    /// Reads the table `[remote]`, which has `url` and `options`. A file without options may have `remote = "…"`
    /// instead.
    fn read_remote(&mut self, remote: toml::Table) -> Result<()> {
        for (key, value) in remote {
            match (key.as_str(), value) {
                ("url", value) => self.read_value("remote", &value)?,
                ("options", toml::Value::Table(options)) => {
                    for (name, value) in options {
                        let key = format!("{OPTIONS_KEY}.{name}");
                        let text = scalar_text(&value).ok_or_else(|| self.wrong_type(&key, &value))?;
                        self.options.insert(name, text);
                    }
                }
                (_, value) => self.read_value(&format!("remote.{key}"), &value)?,
            }
        }
        Ok(())
    }

    /// Reads the tables `[credentials."https://host"]`. No message quotes a value.
    fn read_credentials(&mut self, servers: toml::Table) -> Result<()> {
        for (server, value) in servers {
            let key = format!("{CREDENTIALS_KEY}.{:?}", redact::setting(&server));
            let toml::Value::Table(table) = value else { return Err(self.wrong_type(CREDENTIALS_KEY, &value)) };
            let mut texts = BTreeMap::new();
            for (name, value) in table {
                if !CREDENTIAL_KEYS.contains(&name.as_str()) {
                    let hint = match nearest(&name, CREDENTIAL_KEYS) {
                        Some(near) => format!("did you mean {near:?}?"),
                        None => format!("known: {}", CREDENTIAL_KEYS.join(", ")),
                    };
                    return Err(
                        Error::invalid(format!("{}: {key}: unknown key {name:?}", self.path.display())).hint(hint)
                    );
                }
                let text = scalar_text(&value).ok_or_else(|| self.wrong_type(&format!("{key}.{name}"), &value))?;
                texts.insert(name, text);
            }
            self.credentials.insert(server, texts);
        }
        Ok(())
    }

    /// Reads the value of `key`. An array becomes a list separated by commas.
    fn read_value(&mut self, key: &str, value: &toml::Value) -> Result<()> {
        if !SETTINGS.iter().any(|setting| setting.key == key) {
            return Err(self.unknown(key));
        }
        let text = match value {
            toml::Value::Array(items) => {
                items.iter().map(scalar_text).collect::<Option<Vec<_>>>().map(|texts| texts.join(","))
            }
            value => scalar_text(value),
        };
        let text = text
            .filter(|_| ![OPTIONS_KEY, CREDENTIALS_KEY].contains(&key))
            .ok_or_else(|| self.wrong_type(key, value))?;
        self.values.insert(key.to_owned(), text);
        Ok(())
    }

    /// Returns the error for an unknown key.
    fn unknown(&self, key: &str) -> Error {
        let known = SETTINGS.iter().map(|setting| setting.key).chain(["remote.url"]);
        let hint = match nearest(key, known.clone()) {
            Some(near) => format!("did you mean {near:?}?"),
            None => format!("known: {}", known.collect::<Vec<_>>().join(", ")),
        };
        Error::invalid(format!("{}: unknown setting {:?}", self.path.display(), redact::setting(key))).hint(hint)
    }

    /// Returns the error for a value of the wrong type.
    fn wrong_type(&self, key: &str, value: &toml::Value) -> Error {
        let setting = SETTINGS.iter().find(|setting| setting.key == key);
        Error::invalid(format!("{}: {key} is a TOML {}", self.path.display(), value.type_str()))
            .hint(format!("accepted: {}", setting.map_or("a string, a number or a boolean", |setting| setting.accepts)))
    }
}

/// Returns a string, integer or boolean as text. Returns `None` for other types.
fn scalar_text(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(truth) => Some(truth.to_string()),
        _ => None,
    }
}
