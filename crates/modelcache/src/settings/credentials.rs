//! Reads the credentials of the configuration file (`[credentials."https://host"]`) and the netrc into [`Credentials`].
//!
//! Most calls need no credentials. A source that cannot be read is therefore a warning here, and an error only when a
//! server requires the credential.

use super::expand_home;
use super::file::{CREDENTIAL_KEYS, File};
use crate::config::{Environment, Secret};
use crate::credentials::{Credential, Credentials, Netrc};
use crate::error::{Error, Result};
use crate::redact;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// The form of a table of credentials, for documentation and for the hint of an invalid table.
pub(super) const ACCEPTS: &str = "tables such as [credentials.\"https://registry.example\"] with bearer, or with \
                                  username and password; bearer_env, bearer_file, password_env and password_file \
                                  name a variable or file with the secret";

/// Returns the path of the netrc: `NETRC`, or `~/.netrc`.
pub fn netrc_path(environment: &Environment) -> Option<PathBuf> {
    match environment.get("NETRC") {
        Some(path) => Some(expand_home(path, environment)),
        None => Some(Path::new(environment.get("HOME")?).join(".netrc")),
    }
}

/// Gathers the credentials from the configuration files and the netrc. An earlier file overrides a later one.
pub(super) fn gather(
    files: &[File],
    environment: &Environment,
    read_secret: &impl Fn(&Path) -> io::Result<Option<String>>,
    warnings: &mut Vec<String>,
) -> Result<Credentials> {
    let mut credentials = Credentials::default();
    for file in files {
        for (server, table) in &file.credentials {
            let place = format!("{}: credentials.{:?}", file.path.display(), redact::setting(server));
            let refuse = |error: Error| {
                Error::invalid(format!("{place}: {}", error.message())).hint(format!("accepted: {ACCEPTS}"))
            };
            match credential(table, environment, read_secret).map_err(refuse)? {
                Ok(credential) => credentials.add(server, credential).map_err(refuse)?,
                Err(why) => warnings.push(format!("{place} is not used: {why}")),
            }
        }
    }
    if let Some(path) = netrc_path(environment) {
        let problem = match read_secret(&path) {
            Ok(Some(text)) => Netrc::parse(&text)
                .map(|netrc| credentials.set_netrc(netrc))
                .err()
                .map(|error| error.message().to_owned()),
            Ok(None) => environment.get("NETRC").map(|_| "there is no such file".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        warnings.extend(problem.map(|problem| format!("the netrc {} is not used: {problem}", path.display())));
    }
    Ok(credentials)
}

/// Returns true if a text looks like the name of a variable and not like a secret, so that a message may quote it.
fn is_variable_name(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_' || byte.is_ascii_digit())
}

/// Reads one table. Fails if its keys are invalid. If the secret cannot be read, returns the reason as `Ok(Err(…))`,
/// and the table is not used.
fn credential(
    table: &BTreeMap<String, String>,
    environment: &Environment,
    read_secret: &impl Fn(&Path) -> io::Result<Option<String>>,
) -> Result<Result<Credential, String>> {
    // Returns the key and value that define the bearer or the password: directly, by a variable or by a file.
    let definition = |what: &str| {
        let keys = CREDENTIAL_KEYS
            .iter()
            .filter(|key| key.strip_suffix("_env").or(key.strip_suffix("_file")).unwrap_or(key) == what);
        let mut found = keys.filter_map(|key| Some((*key, table.get(*key)?)));
        match (found.next(), found.next()) {
            (Some((one, _)), Some((other, _))) => Err(Error::invalid(format!("has both {one} and {other}"))),
            (found, _) => Ok(found),
        }
    };
    // Returns the secret that a key and value define.
    let secret = |(key, value): (&str, &String)| match key {
        _ if key.ends_with("_env") => {
            environment.get(value).map(str::to_owned).ok_or_else(|| match is_variable_name(value) {
                true => format!("{value} is not set"),
                false => format!("{key} is not the name of a variable"),
            })
        }
        _ if key.ends_with("_file") => {
            let path = expand_home(value, environment);
            // The value may be the secret itself instead of a path, so it is shown only if it looks like a path.
            let shown = if value.starts_with(['/', '~', '.']) {
                path.display().to_string()
            } else {
                format!("the file of {key}")
            };
            let text = read_secret(&path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
            let text = text.ok_or_else(|| format!("{shown} does not exist"))?;
            Ok(text.trim_end_matches(['\r', '\n']).to_owned())
        }
        _ => Ok(value.clone()),
    };
    Ok(match (definition("bearer")?, table.get("username"), definition("password")?) {
        (Some(bearer), None, None) => secret(bearer).map(|token| Credential::Bearer(Secret::new(token))),
        (None, Some(username), Some(password)) => secret(password)
            .map(|password| Credential::Basic { username: username.clone(), password: Secret::new(password) }),
        _ => return Err(Error::invalid("needs either a bearer, or a username and a password")),
    })
}
