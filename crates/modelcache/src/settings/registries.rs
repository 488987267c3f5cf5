//! Settings of model registries: MLflow's variables and docker's `config.json`.
//!
//! Invalid settings are an error only when a registry is used. On many machines `MLFLOW_TRACKING_URI` is a folder or a
//! Databricks profile, and `config.json` belongs to docker. Neither may break a command that uses no registry.

use super::{Draft, SettingValue, expand_home};
use crate::config::{Environment, OciLogin, Secret};
use crate::error::{Error, Result};
use crate::redact;
use crate::reference::oci;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Returns the URL of a server. The value `none` overrides a URL with a lower precedence.
pub(super) fn server(value: &SettingValue) -> Option<Secret> {
    (value.text != "none").then(|| Secret::new(value.text.as_str()))
}

/// Parses the list of registries without TLS.
pub(super) fn plain_http(text: &str) -> Result<Vec<String>> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "none");
    let checked = |name: &str| {
        oci::checked_registry(name)
            .ok_or_else(|| Error::invalid(format!("{:?} is neither a host nor host:port", redact::setting(name))))
    };
    names.map(checked).collect()
}

/// Reads the credentials of model registries into the draft: from MLflow's variables and docker's `config.json`. They
/// have no settings, because they should not be in a configuration file.
pub(super) fn read_credentials(
    environment: &Environment,
    read_secret: impl Fn(&Path) -> std::io::Result<Option<String>>,
    draft: &mut Draft,
) {
    draft.config.mlflow.environment = environment.clone();
    draft.config.mlflow.token = environment.get("MLFLOW_TRACKING_TOKEN").map(|token| Secret::new(token.trim()));
    let password = environment.get("MLFLOW_TRACKING_PASSWORD").map(Secret::new);
    let user = environment.get("MLFLOW_TRACKING_USERNAME").map(str::to_owned);
    draft.config.mlflow.login = user.zip(password);
    let Some(path) = docker_file(environment) else { return };
    let read = read_secret(&path).map_err(|error| error.to_string());
    let logins = read.and_then(|text| text.map_or(Ok(Docker::default()), |text| Docker::parse(&text)));
    match logins {
        Ok(docker) => {
            draft.config.oci.logins = docker.logins();
            draft.config.oci.helper = docker.creds_store.filter(|helper| !helper.is_empty());
        }
        Err(error) => {
            draft.config.oci.trouble =
                Some(format!("docker's configuration {} cannot be read: {error}", path.display()))
        }
    }
}

/// Returns the path of docker's configuration, which other OCI tools use, too.
fn docker_file(environment: &Environment) -> Option<PathBuf> {
    let folder = environment.get("DOCKER_CONFIG").map(|folder| expand_home(folder, environment));
    let folder = folder.or_else(|| Some(Path::new(environment.get("HOME")?).join(".docker")))?;
    Some(folder.join("config.json"))
}

/// The fields of `config.json` for credentials.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Docker {
    /// Credentials by registry.
    auths: BTreeMap<String, Auth>,
    /// Names of credential helpers by registry.
    cred_helpers: BTreeMap<String, String>,
    /// The name of the credential helper for all other registries.
    creds_store: Option<String>,
}

/// The credentials of one registry.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    /// Base64 of `user:password`.
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl Docker {
    /// Parses the file. The error contains the line number, but none of the file's text.
    fn parse(text: &str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|error| format!("line {}: not a valid docker configuration", error.line()))
    }

    /// Returns the credentials by registry. A key that is exactly the registry's name takes precedence over a key with
    /// a scheme or path.
    fn logins(&self) -> BTreeMap<String, OciLogin> {
        let helpers = self.cred_helpers.iter().map(|(key, helper)| (key, OciLogin::Helper(helper.clone())));
        let auths = self.auths.iter().filter_map(|(key, auth)| Some((key, auth.login()?)));
        let mut logins = BTreeMap::new();
        // Sorted so that exact names come last and replace the others.
        let mut rows: Vec<(bool, String, OciLogin)> = auths
            .chain(helpers)
            .filter_map(|(key, login)| {
                let registry = registry_of(key)?;
                Some((*key == registry, registry, login))
            })
            .collect();
        rows.sort_by_key(|(exact, ..)| *exact);
        for (_, registry, login) in rows {
            logins.insert(registry, login);
        }
        logins
    }
}

impl Auth {
    /// Returns the credentials of an entry, or `None` if it has none.
    fn login(&self) -> Option<OciLogin> {
        let present = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if present(&self.identitytoken).is_some() {
            return Some(OciLogin::IdentityToken);
        }
        if let Some(encoded) = present(&self.auth) {
            let text = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
            let (user, password) = text.split_once(':')?;
            return Some(OciLogin::Password(user.to_owned(), Secret::new(password.trim_end_matches('\0'))));
        }
        Some(OciLogin::Password(present(&self.username)?, Secret::new(present(&self.password)?)))
    }
}

/// Returns the registry of a key such as `https://index.docker.io/v1/` or `registry.example:5000`.
fn registry_of(key: &str) -> Option<String> {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    oci::checked_registry(rest.split('/').next()?)
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::*;
    use crate::config::Config;

    fn gather(variables: &[(&str, &str)], docker: Result<Option<String>, std::io::ErrorKind>) -> Settings {
        let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let environment = Environment(variables.iter().map(pair).collect());
        let read =
            |path: &Path| if path.ends_with("config.json") { docker.clone().map_err(Into::into) } else { Ok(None) };
        Settings::gather(&BTreeMap::new(), &environment, &[], read).expect("settings")
    }

    fn docker(text: &str) -> Config {
        let settings = gather(&[("HOME", "/home/a")], Ok(Some(text.into())));
        assert_eq!(settings.warnings, [""; 0]);
        settings.config
    }

    fn password(user: &str, password: &str) -> OciLogin {
        OciLogin::Password(user.into(), Secret::new(password))
    }

    #[test]
    fn credentials_are_read_from_docker_s_configuration() {
        let encoded = STANDARD.encode("me:pass:word");
        let logins = docker(&format!(
            r#"{{"auths": {{
                "registry.example:5000": {{"auth": "{encoded}"}},
                "https://registry.example:5000/v2/": {{"username": "other", "password": "x"}},
                "https://index.docker.io/v1/": {{"username": "a", "password": "b"}},
                "desktop.example": {{}},
                "azure.example": {{"auth": "{encoded}", "identitytoken": "t"}}
            }}, "credHelpers": {{"1.ecr.example": "ecr-login"}}, "credsStore": "desktop", "proxies": {{}}}}"#
        ));
        let of = |registry: &str| logins.oci.logins.get(registry).cloned();
        assert_eq!(of("registry.example:5000"), Some(password("me", "pass:word")), "the plain name takes precedence");
        assert_eq!(of("docker.io"), Some(password("a", "b")));
        assert_eq!(of("1.ecr.example"), Some(OciLogin::Helper("ecr-login".into())));
        assert_eq!(of("azure.example"), Some(OciLogin::IdentityToken));
        assert_eq!(of("desktop.example"), None);
        assert_eq!(logins.oci.helper.as_deref(), Some("desktop"));
        assert!(!format!("{logins:?}").contains("pass:word"));
    }

    #[test]
    fn an_unreadable_docker_file_is_recorded_without_quoting_it() {
        for (docker, message_part) in [
            (Ok(Some("{\"auths\": {\"r\": \"canary\"}}".to_owned())), "line 1"),
            (Ok(Some("canary".to_owned())), "line 1"),
            (Err(std::io::ErrorKind::PermissionDenied), "permission denied"),
        ] {
            let settings = gather(&[("DOCKER_CONFIG", "~/d"), ("HOME", "/home/a")], docker);
            assert_eq!(settings.warnings, [""; 0], "most commands need no registry");
            let trouble = settings.config.oci.trouble.expect("a reason");
            assert!(trouble.contains("/home/a/d/config.json") && trouble.contains(message_part), "{trouble}");
            assert!(!trouble.contains("canary"), "{trouble}");
        }
    }

    #[test]
    fn mlflow_is_configured_like_its_own_client_and_never_breaks_a_command() {
        let config = |rows: &[(&str, &str)]| gather(rows, Ok(None)).config.mlflow;
        let full = config(&[
            ("MLFLOW_TRACKING_URI", "https://u:canary@h"),
            ("MLFLOW_TRACKING_TOKEN", "canary\n"),
            ("MLFLOW_TRACKING_USERNAME", "me"),
            ("MLFLOW_TRACKING_PASSWORD", "canary"),
        ]);
        assert_eq!(full.token.as_ref().map(Secret::expose), Some("canary"));
        assert_eq!(full.login, Some(("me".into(), Secret::new("canary"))));
        assert!(full.registry_uri.is_none() && full.tracking_uri.is_some());
        assert!(!format!("{full:?}").contains("canary"), "{full:?}");
        assert!(config(&[("MLFLOW_TRACKING_URI", "databricks")]).tracking_uri.is_some(), "no error before it is used");
        assert!(config(&[("MLFLOW_TRACKING_URI", "none")]).tracking_uri.is_none());
    }

    #[test]
    fn registries_without_tls_are_hosts() {
        assert_eq!(plain_http("A.b:5000, c ,none").expect("hosts"), ["a.b:5000", "c"]);
        for bad in ["http://a", "a/b", "a:b"] {
            assert!(plain_http(bad).is_err(), "{bad}");
        }
    }
}
