//! Values of the `Authorization` header.

use crate::error::{Error, Result};
use base64::Engine as _;
use reqwest::header::HeaderValue;

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
