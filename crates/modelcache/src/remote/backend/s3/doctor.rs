//! Checks of a bucket for `modelcache doctor` that access no object: settings, clock and credentials.

use super::S3Backend;
use super::credentials::CredentialSource;
use crate::check::{Area, Check, Clock, with_timeout};
use crate::config::RemoteConfig;
use crate::error::Result;
use crate::remote::doctor::RETRY;
use object_store::aws::AmazonS3ConfigKey;
use std::time::{Duration, SystemTime};

/// Credentials that expire within this time cause a warning.
const EXPIRES_SOON: Duration = Duration::from_secs(900);

impl S3Backend {
    /// Adds the checks. Returns false if no credentials were found, because every further request would fail.
    pub(super) async fn examine_bucket(&self, config: &RemoteConfig, clock: &Clock, checks: &mut Vec<Check>) -> bool {
        checks.push(Check::ok(Area::Remote, self.summary(config)));
        self.query_clock(clock).await;
        match self.examine_credentials().await {
            Ok(check) => {
                checks.push(check);
                true
            }
            Err(error) => {
                checks.push(Check::problem(Area::Credentials, &error));
                false
            }
        }
    }

    /// Returns one line that describes address, region and options of the bucket.
    fn summary(&self, config: &RemoteConfig) -> String {
        let settings = &self.settings;
        let style = if settings.endpoint.is_path_style(&self.context.container) {
            "path style"
        } else {
            "virtual-hosted style"
        };
        let mut text = format!("{} at {}, region {}, {style}", config.url, settings.endpoint_url(), settings.region);
        let encrypts = config.options.iter().find(|(name, _)| name.ends_with("sse") || name.contains("encryption"));
        if let Some((_, how)) = encrypts {
            text.push_str(&format!(", encryption {how}"));
        }
        if self.options.is_on(AmazonS3ConfigKey::RequestPayer) {
            text.push_str(", requester pays");
        }
        text
    }

    /// Compares the local clock with the endpoint's `Date` header, which an error response has, too. Ignores connection
    /// errors, because the other checks report them.
    async fn query_clock(&self, clock: &Clock) {
        let endpoint = self.settings.endpoint_url();
        let request = self.plain_client.get(&endpoint).timeout(RETRY.read_timeout);
        if let Ok(response) = request.send().await {
            let date = response.headers().get("date").and_then(|value| value.to_str().ok());
            clock.learn(&endpoint, date);
        }
    }

    /// Reports which provider of the credential chain is used.
    async fn examine_credentials(&self) -> Result<Check> {
        if self.options.is_on(AmazonS3ConfigKey::SkipSignature) {
            return Ok(Check::ok(Area::Credentials, "requests are not signed (skip_signature)"));
        }
        let CredentialSource { provider_name, key_id_start, expires_at } =
            with_timeout(self.credentials.credential_source()).await?;
        let mut message = format!("from {provider_name}; the access key id begins with {key_id_start}");
        let left = expires_at.map(|expires_at| expires_at.duration_since(SystemTime::now()).unwrap_or_default());
        if let Some(left) = left {
            message.push_str(&format!("; they expire in {} min", left.as_secs() / 60));
        }
        Ok(match left {
            Some(left) if left < EXPIRES_SOON => {
                let fix = "no action is needed if the credentials are renewed automatically; otherwise log in again \
                           (`aws sso login`)";
                Check::warning(Area::Credentials, message, fix)
            }
            _ => Check::ok(Area::Credentials, message),
        })
    }
}
