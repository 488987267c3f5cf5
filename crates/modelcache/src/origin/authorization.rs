//! Values of the `Authorization` header, which never print.

use crate::error::{Error, Result};
use crate::redact;
use base64::Engine as _;
use reqwest::header::HeaderValue;
use std::fmt::Display;

/// The header for a token; `what` names it, should no header be able to carry it.
pub(super) fn bearer(token: &str, what: impl Display) -> Result<HeaderValue> {
    secret(&format!("Bearer {token}"), what)
}

/// The header for a user and a password (RFC 7617).
pub(super) fn basic(user: &str, password: &str, what: impl Display) -> Result<HeaderValue> {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    redact::learn(&pair);
    secret(&format!("Basic {pair}"), what)
}

fn secret(text: &str, what: impl Display) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text).map_err(|_| {
        Error::invalid(format!("{what} has characters that none has")).hint("check it for stray line ends")
    })?;
    value.set_sensitive(true);
    Ok(value)
}
