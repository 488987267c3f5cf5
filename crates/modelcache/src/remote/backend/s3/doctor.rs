//! Checks of a bucket for `modelcache doctor` that need no object: settings, clock and credentials.

use super::S3Backend;
use super::credentials::CredentialSource;
use crate::check::{Area, Check, Clock, in_time};
use crate::config::{RemoteConfig, Secret};
use crate::error::Result;
use crate::remote::doctor::RETRY;
use object_store::aws::AmazonS3ConfigKey;
use std::time::{Duration, SystemTime};

/// Credentials with less time left than this give a warning.
const ENDS_SOON: Duration = Duration::from_secs(900);

impl S3Backend {
    /// Adds the checks. Returns false without credentials, because every further request fails then.
    pub(super) async fn examine_bucket(&self, config: &RemoteConfig, clock: &Clock, checks: &mut Vec<Check>) -> bool {
        checks.push(Check::ok(Area::Remote, self.describe(config)));
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
    fn describe(&self, config: &RemoteConfig) -> String {
        let settings = &self.settings;
        let style = if settings.path_style { "path style" } else { "virtual-hosted style" };
        let mut text = format!("{} at {}, region {}, {style}", config.url, settings.endpoint_url(), settings.region);
        let encrypts = config.options.iter().find(|(name, _)| name.ends_with("sse") || name.contains("encryption"));
        if let Some((_, how)) = encrypts {
            text.push_str(&format!(", encryption {how}"));
        }
        if self.options.passed_on.iter().any(|(name, _)| *name == AmazonS3ConfigKey::RequestPayer) {
            text.push_str(", requester pays");
        }
        text
    }

    /// Compares the local clock with the endpoint's `Date` header, which a refusal has, too. Ignores connection errors,
    /// because the other checks report them.
    async fn query_clock(&self, clock: &Clock) {
        let endpoint = self.settings.endpoint_url();
        let request = self.plain_client.get(&endpoint).timeout(RETRY.read_timeout);
        if let Ok(answer) = request.send().await {
            let date = answer.headers().get("date").and_then(|value| value.to_str().ok());
            clock.learn(&endpoint, date);
        }
    }

    /// Reports the provider of the credential chain that is used.
    async fn examine_credentials(&self) -> Result<Check> {
        let skips = |(key, value): &(AmazonS3ConfigKey, Secret)| {
            *key == AmazonS3ConfigKey::SkipSignature && !matches!(value.expose(), "false" | "0")
        };
        if self.options.passed_on.iter().any(skips) {
            return Ok(Check::ok(Area::Credentials, "requests are not signed (skip_signature)"));
        }
        let CredentialSource { place, key_begins, ends } = in_time(self.credentials.credential_source()).await?;
        let mut says = format!("from {place}; the key's id begins with {key_begins}");
        let left = ends.map(|ends| ends.duration_since(SystemTime::now()).unwrap_or_default());
        if let Some(left) = left {
            says.push_str(&format!("; they expire in {} min", left.as_secs() / 60));
        }
        Ok(match left {
            Some(left) if left < ENDS_SOON => {
                let fix = "no action is needed if they are renewed automatically; else log in again (`aws sso login`)";
                Check::warning(Area::Credentials, says, fix)
            }
            _ => Check::ok(Area::Credentials, says),
        })
    }
}
