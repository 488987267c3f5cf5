//! Values of response headers.

use axum::http::HeaderValue;
use std::time::Duration;

/// `Retry-After` of an unavailable service that stated no time.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(5);
/// Longest value that is made from a text of unknown origin, in characters.
const TEXT_CHARACTERS_MAX: usize = 400;

/// Returns `text` as a header value. Returns an empty value if a character of it is not allowed in a header.
pub(crate) fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}

/// Returns the beginning of `text` as a header value, without the characters that a header must not have.
pub(crate) fn cleaned(text: &str) -> HeaderValue {
    let clean = text.chars().filter(|c| c.is_ascii_graphic() || *c == ' ');
    value(&clean.take(TEXT_CHARACTERS_MAX).collect::<String>())
}

/// Returns the value of `Retry-After` for a wait, in whole seconds and at least one.
pub(crate) fn retry_after(wait: Option<Duration>) -> HeaderValue {
    HeaderValue::from(wait.unwrap_or(RETRY_AFTER_DEFAULT).as_secs_f64().ceil().max(1.0) as u64)
}
