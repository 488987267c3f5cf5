//! The S3 backend: requests and their signatures, credentials, settings, and listings without the keys that
//! `object_store` cannot represent.

mod copy;
mod credentials;
mod doctor;
mod endpoint;
mod error_response;
mod http_client;
mod policy;
mod profile;
mod raw_client;
mod settings;
mod uploads;
mod xml;

pub(super) use error_response::ErrorResponse;
pub use policy::{Policy, Role};
pub(in crate::remote) use settings::Options;
#[cfg(fuzzing)]
pub(crate) use {http_client::fuzz as fuzz_listing, profile::fuzz as fuzz_profile};

use super::{Backend, CopyOutcome, CopyRequest, EndpointContext, MultipartUploads, StoredChecksums, failure};
use crate::check::{Check, Clock};
use crate::config::RemoteConfig;
use crate::error::{Error, Result, Tier};
use crate::mutex::Mutex;
use crate::reference::is_bucket_name;
use crate::remote::store::Store;
use crate::transfer::Retry;
use async_trait::async_trait;
use copy::Copier;
use credentials::Credentials;
use http_client::Connector;
use object_store::ObjectStore;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::list::{PaginatedListOptions, PaginatedListResult, PaginatedListStore as _};
use object_store::path::Path;
use profile::Profiles;
use raw_client::RawClient;
use settings::S3Settings;
use std::borrow::Cow;
use std::sync::Arc;

/// Longest key, in bytes (<https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html>).
const KEY_BYTES_MAX: usize = 1024;

/// An opened bucket.
pub(super) struct S3Backend {
    s3: AmazonS3,
    credentials: Arc<Credentials>,
    /// The client for reads that `object_store` does not offer: stored checksums and listings of uploads. `None` if the
    /// options exclude it.
    read_client: Option<Arc<RawClient>>,
    copier: Option<Copier>,
    /// The HTTP client without the request timeouts and errors of `http_client.rs`.
    plain_client: reqwest::Client,
    settings: S3Settings,
    options: Options,
    prefix: String,
    context: EndpointContext,
    /// The bucket's region as reported by the server, if it differs from the region that requests are signed for.
    reported_region: Mutex<Option<String>>,
}

impl S3Backend {
    /// Sets up the clients without sending a request. Blocks while it reads AWS files and root certificates.
    pub(super) fn open(
        config: &RemoteConfig,
        bucket: &str,
        prefix: &str,
        options: &Options,
        retry: &Retry,
    ) -> Result<Self> {
        if !is_bucket_name(bucket) {
            return Err(Error::invalid("the address names no bucket").tier(Tier::Remote));
        }
        let profiles = Profiles::load(&config.environment);
        let settings = S3Settings::gather(options, &config.environment, &profiles)?;
        let connector = Connector::new(&settings, options, retry)?;
        let plain_client = connector.plain_client().clone();
        let credentials =
            Arc::new(Credentials::new(&config.environment, options, profiles, &settings.region, plain_client.clone()));
        let raw_client = Arc::new(RawClient::new(bucket, &settings, options, &connector, &credentials));
        let copier = Copier::new(&raw_client, options);
        let read_client = raw_client::supports_reads(options).then_some(raw_client);
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(&settings.region)
            .with_virtual_hosted_style_request(!settings.endpoint.is_path_style(bucket))
            .with_allow_http(settings.allow_http)
            .with_disable_bulk_delete(true)
            .with_unsigned_payload(!settings.signs_payload(options))
            .with_retry(object_store::RetryConfig { max_retries: 0, ..Default::default() })
            .with_credentials(credentials.clone())
            .with_http_connector(connector);
        // `object_store` knows neither partitions nor FIPS and dual-stack endpoints. In virtual-hosted style it uses
        // the endpoint unchanged, so it must contain the bucket. Directory buckets (S3 Express) have endpoints of their
        // own.
        if settings.endpoint.custom.is_some() || !options.is_directory_bucket() {
            builder = builder.with_endpoint(match settings.endpoint.is_path_style(bucket) {
                true => settings.endpoint_url(),
                false => settings.endpoint.bucket_url(bucket, &settings.region),
            });
        }
        // Options of the user override the settings above.
        for (key, value) in &options.passed_on {
            builder = builder.with_config(*key, value.expose());
        }
        let s3 = builder.build().map_err(|error| {
            // The text may contain the value of an option, so it is not part of the message shown to the user.
            tracing::debug!(%error, "the S3 client refused its options");
            Error::invalid("the options of the remote are invalid or contradict each other")
                .tier(Tier::Remote)
                .hint("check [remote.options]; the debug log contains the reason")
        })?;
        let context = EndpointContext {
            container: bucket.to_owned(),
            endpoint: settings.endpoint_url(),
            region: settings.region.clone(),
        };
        Ok(Self {
            s3,
            credentials,
            read_client,
            copier,
            plain_client,
            settings,
            options: options.clone(),
            prefix: prefix.to_owned(),
            context,
            reported_region: Mutex::default(),
        })
    }

    /// Returns the client for stored checksums and listings of uploads, or `None` if the options exclude it.
    fn read_client(&self) -> Option<&RawClient> {
        self.read_client.as_deref()
    }

    /// Returns the client for copies and for parts with a known digest, or `None` if the options exclude it.
    fn copier(&self) -> Option<&Copier> {
        self.copier.as_ref()
    }
}

#[async_trait]
impl Backend for S3Backend {
    fn objects(&self) -> &dyn ObjectStore {
        &self.s3
    }

    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn endpoint_context(&self) -> &EndpointContext {
        &self.context
    }

    fn unusable_key(&self, key: &Path) -> Option<String> {
        let bytes = key.as_ref().len();
        (bytes > KEY_BYTES_MAX).then(|| format!("{bytes} bytes with the prefix; at most {KEY_BYTES_MAX}"))
    }

    async fn list_page(
        &self,
        prefix: Option<&Path>,
        one_level: bool,
        token: Option<String>,
    ) -> object_store::Result<PaginatedListResult> {
        let prefix = prefix.map(|prefix| format!("{prefix}/"));
        let delimiter = one_level.then_some(Cow::Borrowed("/"));
        let options = PaginatedListOptions { page_token: token, delimiter, ..PaginatedListOptions::default() };
        self.s3.list_paginated(prefix.as_deref(), options).await
    }

    async fn copy(&self, store: &Arc<Store>, copy: &CopyRequest<'_>) -> Result<CopyOutcome> {
        match self.copier() {
            Some(copier) => copy::copy(store, copier, self, copy).await,
            None => Ok(CopyOutcome::Unsupported),
        }
    }

    fn uploads(&self) -> Option<&dyn MultipartUploads> {
        Some(self)
    }

    async fn stored_checksums(&self, key: &Path) -> object_store::Result<Option<StoredChecksums>> {
        match self.read_client() {
            Some(read_client) => read_client.checksums(key).await.map(Some),
            None => Ok(None),
        }
    }

    /// Also records a region that the server reports, and drops expired credentials.
    async fn explain(&self, error: object_store::Error, what_failed: &str) -> Error {
        let has_expired = failure::is_expired(&error);
        let region = failure::error_response(&error).and_then(|response| response.region.clone());
        if let Some(region) = region.filter(|region| *region != self.context.region) {
            *self.reported_region.lock() = Some(region);
        }
        let error = failure::translate(error, what_failed, &self.context);
        // A retry helps only if the credentials can be renewed.
        if has_expired { error.transient(self.credentials.drop_expired().await) } else { error }
    }

    fn write_permission_hint(&self, error: &Error) -> String {
        match (error_response::names_kms_permission(error.message()), error.hint_text()) {
            (true, Some(hint)) => hint.to_owned(),
            _ => format!("grant s3:PutObject on the bucket {:?}", self.context.container),
        }
    }

    fn reported_region(&self) -> Option<String> {
        self.reported_region.lock().clone()
    }

    async fn examine(&self, config: &RemoteConfig, clock: &Clock, checks: &mut Vec<Check>) -> Result<bool> {
        Ok(self.examine_bucket(config, clock, checks).await)
    }
}
