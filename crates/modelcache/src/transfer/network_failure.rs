//! Failures to connect, told apart by the texts of the resolver and the TLS library, which report no codes.

use crate::error::Error;
use std::time::Duration;

/// How long the lookup of a host that DNS does not know is retried. A record that was just created appears within
/// seconds; a wrong name never does.
const UNKNOWN_HOST_DEADLINE: Duration = Duration::from_secs(5);

/// Returns the error if `reason` is that TLS with `server` is impossible. `roots_remedy` tells how to trust another
/// root certificate.
pub(crate) fn tls_error(server: &str, reason: &str, roots_remedy: &str) -> Option<Error> {
    let failure = |what: String| Error::unavailable(what).transient(false).cause(reason.to_owned());
    if reason.contains("InvalidContentType") {
        let remedy = "check scheme and port of the address: at this port the server may want http://";
        return Some(failure(format!("{server} does not speak TLS")).hint(remedy));
    }
    if !reason.contains("certificate") {
        return None;
    }
    let text = reason.to_ascii_lowercase();
    let is = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let (what, remedy) = if is(&["expired"]) {
        (
            "its certificate has expired",
            "renew the certificate of the server; if it is valid, set the clock of this machine",
        )
    } else if is(&["notvalidyet", "not valid yet"]) {
        ("its certificate is not valid yet", "set the clock of this machine, or wait until the certificate is valid")
    } else if is(&["notvalidforname", "not valid for name"]) {
        (
            "its certificate is for another host",
            "check the address; behind a proxy, the proxy may have answered in place of the server",
        )
    } else {
        ("the issuer of its certificate is unknown", roots_remedy)
    };
    Some(failure(format!("{server} is not trusted: {what}")).hint(remedy))
}

/// Limits the retries of `error`, a failure to connect, if `reason` is that DNS does not know the host.
pub(crate) fn with_lookup_deadline(error: Error, reason: &str) -> Error {
    // The texts of `getaddrinfo` in glibc and musl. A DNS server that does not answer has another text
    // ("Temporary failure in name resolution").
    let unknown = ["Name or service not known", "No address associated with hostname", "Name does not resolve"];
    if !unknown.iter().any(|text| reason.contains(text)) {
        return error;
    }
    error.retry_within(UNKNOWN_HOST_DEADLINE).hint(match reason.contains("socks proxy") {
        // With `socks5://` this machine resolves names, with `socks5h://` the proxy does.
        true => "write the address of the proxy as socks5h://, so that the proxy resolves host names",
        false => "check the network and the name of the host, which DNS does not know",
    })
}
