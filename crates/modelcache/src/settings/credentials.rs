//! `[credentials."https://host"]` of the configuration file, and the netrc, made into [`Credentials`].
//!
//! Most calls need none of them, so what cannot be read is a warning here, and an error only where a server wants it.

use super::expand_home;
use super::file::{CREDENTIAL_KEYS, File};
use crate::config::{Environment, Secret};
use crate::credentials::{Credential, Credentials, Netrc};
use crate::error::{Error, Result};
use crate::redact;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// How a table of credentials looks; the hint for one that cannot be used.
pub(super) const ACCEPTS: &str = "tables such as [credentials.\"https://registry.example\"] with bearer, or with username and \
                                  password; bearer_env, bearer_file, password_env and password_file say where the \
                                  secret stands";

/// The netrc that is read: `NETRC`, else `~/.netrc`.
pub fn netrc_path(environment: &Environment) -> Option<PathBuf> {
    match environment.get("NETRC") {
        Some(path) => Some(expand_home(path, environment)),
        None => Some(Path::new(environment.get("HOME")?).join(".netrc")),
    }
}

/// All credentials; an earlier file overrules a later one.
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
                Ok(credential) => credentials.state(server, credential).map_err(refuse)?,
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

/// Whether a text is written like the name of a variable, rather than like a secret.
fn is_variable(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_' || byte.is_ascii_digit())
}

/// One table. Wrong keys are an error; a secret that is not where it should be is a reason not to use it.
fn credential(
    table: &BTreeMap<String, String>,
    environment: &Environment,
    read_secret: &impl Fn(&Path) -> io::Result<Option<String>>,
) -> Result<Result<Credential, String>> {
    let stated = |what: &str| {
        let keys = CREDENTIAL_KEYS
            .iter()
            .filter(|key| key.strip_suffix("_env").or(key.strip_suffix("_file")).unwrap_or(key) == what);
        let mut found = keys.filter_map(|key| Some((*key, table.get(*key)?)));
        match (found.next(), found.next()) {
            (Some((one, _)), Some((other, _))) => Err(Error::invalid(format!("has both {one} and {other}"))),
            (found, _) => Ok(found),
        }
    };
    let secret = |(key, value): (&str, &String)| match key {
        _ if key.ends_with("_env") => {
            environment.get(value).map(str::to_owned).ok_or_else(|| match is_variable(value) {
                true => format!("{value} is not set"),
                false => format!("{key} is not the name of a variable"),
            })
        }
        _ if key.ends_with("_file") => {
            let path = expand_home(value, environment);
            // It may be the secret itself, put where its file should be named.
            let shown = if value.starts_with(['/', '~', '.']) {
                path.display().to_string()
            } else {
                format!("what {key} names")
            };
            let text = read_secret(&path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
            let text = text.ok_or_else(|| format!("there is no {shown}"))?;
            Ok(text.trim_end_matches(['\r', '\n']).to_owned())
        }
        _ => Ok(value.clone()),
    };
    Ok(match (stated("bearer")?, table.get("username"), stated("password")?) {
        (Some(bearer), None, None) => secret(bearer).map(|token| Credential::Bearer(Secret::new(token))),
        (None, Some(username), Some(password)) => secret(password)
            .map(|password| Credential::Basic { username: username.clone(), password: Secret::new(password) }),
        _ => return Err(Error::invalid("has neither a bearer alone nor a username with its password")),
    })
}
