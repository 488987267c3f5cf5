//! Values of the `Authorization` header, marked as sensitive so that they are never printed.

use crate::error::{Error, Result};
use crate::redact;
use base64::Engine as _;
use reqwest::header::HeaderValue;
use std::fmt::Display;

/// Returns the header value for a bearer token.
///
/// # Errors
/// `Invalid` if the token has characters that a header cannot carry. `name` names the token in the message.
pub(super) fn bearer(token: &str, name: impl Display) -> Result<HeaderValue> {
    sensitive_value(&format!("Bearer {token}"), name)
}

/// Returns the header value for a user and a password (RFC 7617).
pub(super) fn basic(user: &str, password: &str, name: impl Display) -> Result<HeaderValue> {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    // The encoded form must not appear in logs either.
    redact::register(&pair);
    sensitive_value(&format!("Basic {pair}"), name)
}

/// Returns `text` as a header value that is never printed. `name` names the secret in the error message.
fn sensitive_value(text: &str, name: impl Display) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text).map_err(|_| {
        Error::invalid(format!("{name} has characters that a header cannot carry")).hint("check it for line breaks")
    })?;
    // `Debug` of a sensitive value prints no content.
    value.set_sensitive(true);
    Ok(value)
}
