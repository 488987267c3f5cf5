//! Redirects followed by hand, so that a credential is sent home and nowhere else.

use super::http::{self, Http, Server};
use crate::error::{Error, Result};
use crate::limits;
use base64::Engine as _;
use reqwest::Response;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use url::Url;

/// The last answer after all redirects, and where it came from.
pub(super) struct Answer {
    pub(super) response: Response,
    pub(super) url: Url,
    /// Whether it came from the server that the credential belongs to.
    pub(super) at_home: bool,
}

/// How far redirects are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Within the one server: for whatever decides what an artifact is.
    Home,
    /// Anywhere: for bytes, which are checked.
    Anywhere,
}

/// GETs `url`; `authorization` goes to the scheme, host and port of `home` only.
pub(super) async fn follow(
    http: &Http,
    mut url: Url,
    headers: &HeaderMap,
    home: &Url,
    authorization: Option<&HeaderValue>,
    reach: Reach,
) -> Result<Answer> {
    for _ in 0..=limits::REDIRECTS_MAX {
        let at_home = http::same_origin(&url, home);
        if !at_home && reach == Reach::Home {
            return Err(Error::corrupt(format!(
                "{} redirects a request for metadata to {}; not followed",
                Server(home),
                Server(&url)
            )));
        }
        let mut headers = headers.clone();
        if let Some(authorization) = authorization.filter(|_| at_home) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let response = http.get(&url, headers).await?;
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(Answer { response, url, at_home });
        }
        url = http::redirect_target(&url, response.headers().get(LOCATION))?;
        http::drain(response).await;
    }
    Err(Error::unavailable(format!("{} still redirects after {} redirects", Server(&url), limits::REDIRECTS_MAX))
        .hint("check the address of the server, and any proxy on the way")
        .transient(false))
}

/// The header for a token; `what` names where it comes from, should no header be able to carry it.
pub(super) fn bearer(token: &str, what: &str) -> Result<HeaderValue> {
    secret_header(&format!("Bearer {token}"), what)
}

/// The header for a user and a password (RFC 7617).
pub(super) fn basic(user: &str, password: &str) -> Result<HeaderValue> {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    secret_header(&format!("Basic {pair}"), "the password")
}

fn secret_header(text: &str, what: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_| Error::invalid(format!("{what} contains characters that no token has; a stray line end?")))?;
    value.set_sensitive(true);
    Ok(value)
}
