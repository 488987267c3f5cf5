//! Checks the proxies and root certificates that the environment sets.

use super::{Area, Check};
use crate::config::Environment;
use crate::error::Error;
use std::path::Path;
use url::Url;

/// Variables that name a proxy. Their names may be in upper or lower case.
const PROXIES: [&str; 3] = ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"];
/// Variables that name a file of root certificates.
const CERTIFICATES: [&str; 2] = ["AWS_CA_BUNDLE", "SSL_CERT_FILE"];

/// Checks the variables for proxies and certificates.
pub(super) fn examine(environment: &Environment) -> Vec<Check> {
    let variable = |name: &str| environment.get(name).or_else(|| environment.get(&name.to_ascii_lowercase()));
    let mut checks: Vec<Check> = PROXIES.iter().filter_map(|name| Some(proxy(name, variable(name)?))).collect();
    match (checks.is_empty(), variable("NO_PROXY")) {
        (true, _) => checks.push(Check::ok(Area::Network, "no proxy")),
        (false, Some(hosts)) => checks.push(Check::ok(Area::Network, format!("NO_PROXY: {hosts}"))),
        (false, None) => {}
    }
    let files = CERTIFICATES.iter().filter_map(|name| Some((name, environment.get(name)?)));
    checks.extend(files.map(|(name, path)| certificates(name, Path::new(path))));
    checks
}

/// Checks the URL of a proxy. The result does not show the password.
fn proxy(name: &str, address: &str) -> Check {
    let full = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    match Url::parse(&full) {
        Ok(url) if url.has_host() => {
            let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
            let user = if url.username().is_empty() { "" } else { ", with a user name" };
            let host = url.host_str().unwrap_or_default();
            Check::ok(Area::Network, format!("{name}: {}://{host}{port}{user}", url.scheme()))
        }
        _ => {
            let error = Error::invalid(format!("{name} is not a valid URL"));
            Check::problem(Area::Network, &error.hint("write it as http://host:port, or unset it"))
        }
    }
}

/// Checks a file of root certificates.
fn certificates(name: &str, path: &Path) -> Check {
    let shown = path.display();
    let fix = "name a file with root certificates in PEM form, or unset it";
    let pem = match std::fs::read(path) {
        Ok(pem) => pem,
        Err(cause) => {
            let error = Error::invalid(format!("{name}: {shown} cannot be read")).cause(cause);
            return Check::problem(Area::Network, &error.hint(fix));
        }
    };
    match reqwest::Certificate::from_pem_bundle(&pem) {
        Ok(found) if !found.is_empty() => {
            Check::ok(Area::Network, format!("{name}: {} root certificates in {shown}", found.len()))
        }
        _ => Check::problem(Area::Network, &Error::invalid(format!("{name}: no certificates in {shown}")).hint(fix)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;
    use std::collections::HashMap;

    #[test]
    fn the_password_of_a_proxy_is_not_shown() {
        let variables =
            [("https_proxy", "http://user:canary@proxy:3128"), ("ALL_PROXY", "proxy:1"), ("NO_PROXY", "a,b")];
        let environment = Environment(variables.map(|(name, value)| (name.into(), value.into())).into());
        let checks = examine(&environment);
        assert!(!format!("{checks:?}").contains("canary"), "{checks:?}");
        assert_eq!(checks[0].message, "HTTPS_PROXY: http://proxy:3128, with a user name");
        assert_eq!((checks.len(), checks[2].message.as_str()), (3, "NO_PROXY: a,b"));
        assert_eq!(examine(&Environment(HashMap::new()))[0].message, "no proxy");
    }

    #[test]
    fn a_file_without_certificates_is_a_problem() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("ca.pem");
        assert_eq!(certificates("X", &path).severity, Severity::Problem);
        std::fs::write(&path, "nothing").expect("writes");
        assert_eq!(certificates("X", &path).severity, Severity::Problem);
    }
}
