//! Who sends a request: the token of the native routes, and the caller of a Hugging Face route.

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::{AUTHORIZATION, HOST, WWW_AUTHENTICATE};
use axum::http::{Extensions, HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use subtle::ConstantTimeEq as _;

/// The caller of a Hugging Face route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Caller {
    /// It sent the daemon's token, and acts with the daemon's own Hub token.
    Daemon,
    /// It sent a token of its own.
    Hub(String),
    /// It sent no token.
    Anonymous,
}

impl Caller {
    pub(crate) fn of(app: &App, headers: &HeaderMap) -> Self {
        match bearer(headers) {
            Some(token) if is_own(app, token) => Self::Daemon,
            Some(token) => Self::Hub(token.to_owned()),
            None => Self::Anonymous,
        }
    }
}

/// Returns the token of an `Authorization: Bearer` header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    Some(token.trim()).filter(|token| scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
}

/// Returns the password of an `Authorization: Basic` header, which browsers send for the status page.
fn basic_password(headers: &HeaderMap) -> Option<String> {
    let (scheme, encoded) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let decoded = STANDARD.decode(encoded.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    String::from_utf8(decoded).ok()?.split_once(':').map(|(_, password)| password.to_owned())
}

/// Compares a token with the daemon's, in a time that does not depend on how much of it is right.
fn is_own(app: &App, token: &str) -> bool {
    app.options.token.as_ref().is_some_and(|own| bool::from(own.expose().as_bytes().ct_eq(token.as_bytes())))
}

/// Refuses requests to the native routes without the token. If no token is configured, refuses requests that a web page
/// of another site may have made in the browser of a user of this machine.
pub(crate) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match check(&app, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            let mut response = refusal.into_response();
            if response.status() == StatusCode::UNAUTHORIZED {
                let challenge = HeaderValue::from_static("Basic realm=\"modelcache\", charset=\"UTF-8\"");
                response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            }
            response
        }
    }
}

fn check(app: &App, headers: &HeaderMap) -> ApiResult<()> {
    if app.options.token.is_some() {
        let token = bearer(headers).map(str::to_owned).or_else(|| basic_password(headers));
        return match token.is_some_and(|token| is_own(app, &token)) {
            true => Ok(()),
            false => Err(ApiError::new(
                StatusCode::UNAUTHORIZED,
                "this route needs the token of the daemon",
                "send it as Authorization: Bearer TOKEN, or as the password in a browser; it is MODEL_CACHE_TOKEN",
            )),
        };
    }
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    match app.options.insecure || is_loopback_name(host) {
        true => Ok(()),
        false => Err(ApiError::new(
            StatusCode::MISDIRECTED_REQUEST,
            "this daemon has no token, and answers only requests to localhost",
            "use the address 127.0.0.1 or localhost, or set MODEL_CACHE_TOKEN",
        )),
    }
}

/// Returns true if the `Host` header names this machine itself. If the domain name of another site resolves to
/// 127.0.0.1 (DNS rebinding), the requests of its pages have that domain name in the `Host` header.
fn is_loopback_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Returns true if the request comes from this machine, so that its sender can use paths of the cache directory.
pub(crate) fn is_local(extensions: &Extensions) -> bool {
    extensions.get::<ConnectInfo<SocketAddr>>().is_some_and(|ConnectInfo(peer)| peer.ip().to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_machines_are_recognised() {
        for host in ["localhost", "LOCALHOST:8917", "127.0.0.1:1", "127.9.9.9", "[::1]:8917", "[::1]"] {
            assert!(is_loopback_name(host), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "10.0.0.1:8917"] {
            assert!(!is_loopback_name(host), "{host}");
        }
    }
}
