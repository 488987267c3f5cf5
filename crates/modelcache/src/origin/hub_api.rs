//! Requests to the API of the Hub that are passed on for the clients of a daemon.

use super::hub::Hub;
use crate::config::Config;
use crate::error::Result;
use crate::transfer::Retry;
use std::sync::Arc;
use std::time::Duration;

/// A client for the API of the Hub. It sends each request once. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct HubApi(Arc<Hub>);

/// An answer of the Hub, whatever its status.
#[derive(Debug, Clone)]
pub struct HubAnswer {
    /// The HTTP status.
    pub status: u16,
    /// The content type, if the Hub states it.
    pub content_type: Option<String>,
    /// The value of `X-Error-Code`, for instance `GatedRepo`.
    pub error_code: Option<String>,
    /// The value of `X-Error-Message`.
    pub error_message: Option<String>,
    /// The time that the Hub asks to wait before the next request.
    pub retry_after: Option<Duration>,
    /// The body, at most 16 MiB.
    pub body: Vec<u8>,
}

impl HubApi {
    /// Creates a client. Sends no request.
    pub(crate) fn new(config: &Config, retry: Retry) -> Self {
        Self(Arc::new(Hub::new(config, retry)))
    }

    /// Sends a GET for `path` with `token`. The path is percent-encoded, has no slash at the beginning, and may have a
    /// query. An answer 429 or 503 that states a wait pauses all requests of the cache to the Hub for that time.
    ///
    /// # Errors
    /// `Invalid` if the Hub redirects to another server. `Unavailable` if the Hub does not answer, or if it has asked
    /// for a pause that is not over ([`Error::wait`](crate::Error::wait) has the rest of it).
    pub async fn get(&self, path: &str, token: Option<&str>) -> Result<HubAnswer> {
        self.0.pass_on(path, token).await
    }

    /// Returns the token of the cache's configuration.
    pub fn token(&self) -> Option<&str> {
        self.0.token()
    }

    /// Returns how long the Hub asked all requests to wait, counted from now; `None` if it did not.
    pub fn pause(&self) -> Option<Duration> {
        self.0.pause()
    }
}
