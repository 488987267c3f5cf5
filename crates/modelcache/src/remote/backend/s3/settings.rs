//! Settings of a bucket: the options of `[remote.options]`, and the AWS settings.
//!
//! Parsing sends no request. Environment variables come from the configuration, never from the process's own
//! environment. The shared AWS configuration files are read when the store is first used.

use super::endpoint::Endpoint;
use super::profile::Profiles;
use crate::config::{Environment, RemoteConfig, Secret};
use crate::error::{Error, Result, Tier};
use crate::human::nearest;
use crate::option_name::setting::READ_TIMEOUT;
use crate::redact;
use crate::settings::parse_switch;
use object_store::ClientConfigKey;
use object_store::aws::AmazonS3ConfigKey;
use std::path::PathBuf;
use std::time::Duration;
use url::Url;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The region that requests are signed for if none is configured.
const DEFAULT_REGION: &str = "us-east-1";

/// The parsed options of `[remote.options]`.
#[derive(Debug, Clone, Default)]
pub(in crate::remote) struct Options {
    /// Region, if configured.
    pub(super) region: Option<String>,
    /// Endpoint, if configured.
    pub(super) endpoint: Option<String>,
    /// True to put the bucket name into the path of the URL, false to put it into the host name.
    pub(super) path_style: Option<bool>,
    /// True to allow plain HTTP.
    pub(super) allow_http: Option<bool>,
    /// True to accept invalid TLS certificates.
    pub(super) allow_invalid_certificates: bool,
    /// Longest wait for a connection.
    pub(super) connect_timeout: Option<Duration>,
    /// The proxy for all requests.
    pub(super) proxy_url: Option<Secret>,
    /// Hosts for which the proxy is not used.
    pub(super) proxy_excludes: Option<String>,
    /// Access key id.
    pub(super) access_key: Option<Secret>,
    /// Secret access key.
    pub(super) secret_key: Option<Secret>,
    /// Session token of temporary credentials.
    pub(super) session_token: Option<Secret>,
    /// Options passed on to the builder of the `object_store` client.
    pub(super) passed_on: Vec<(AmazonS3ConfigKey, Secret)>,
}

/// The option names that are suggested for an unknown name.
const NAMES: [&str; 22] = [
    "region",
    "endpoint",
    "path_style",
    "sse",
    "sse_kms_key_id",
    "sse_bucket_key_enabled",
    "sse_customer_key_base64",
    "unsigned_payload",
    "allow_http",
    "allow_invalid_certificates",
    "skip_signature",
    "request_payer",
    "checksum_algorithm",
    "disable_tagging",
    "virtual_hosted_style_request",
    "connect_timeout",
    "proxy_url",
    "proxy_excludes",
    "access_key_id",
    "secret_access_key",
    "session_token",
    "s3_express",
];

fn invalid(message: String) -> Error {
    Error::invalid(message).tier(Tier::Remote)
}

impl Options {
    /// Returns true if the bucket is a directory bucket (S3 Express One Zone).
    pub(super) fn is_directory_bucket(&self) -> bool {
        self.is_on(AmazonS3ConfigKey::S3Express)
    }

    /// Returns true if the option `key`, which is passed on to `object_store`, has a value that means true.
    pub(super) fn is_on(&self, key: AmazonS3ConfigKey) -> bool {
        self.passed_on.iter().any(|(passed, value)| *passed == key && is_on(value.expose()))
    }

    /// Parses the options of `config`.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) for an unknown name or an invalid value.
    pub(in crate::remote) fn parse(config: &RemoteConfig) -> Result<Self> {
        let mut options = Self::default();
        for (name, value) in &config.options {
            options.set(name, value)?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let value = value.trim();
        // Most options become headers, which cannot have such characters.
        if value.chars().any(char::is_control) {
            return Err(invalid(format!("the remote option {name:?} has a line break or another control character")));
        }
        let plain = name.strip_prefix("aws_").unwrap_or(name);
        match plain {
            "region" | "default_region" => self.region = Some(value.to_owned()),
            "endpoint" | "endpoint_url" | "endpoint_url_s3" => self.endpoint = Some(value.to_owned()),
            "path_style" => self.path_style = Some(flag(name, value)?),
            "virtual_hosted_style_request" => self.path_style = Some(!flag(name, value)?),
            "allow_http" => self.allow_http = Some(flag(name, value)?),
            "allow_invalid_certificates" => self.allow_invalid_certificates = flag(name, value)?,
            "connect_timeout" => self.connect_timeout = Some(seconds(name, value)?),
            "proxy_url" => self.proxy_url = Some(Secret::new(value)),
            "proxy_excludes" => self.proxy_excludes = Some(value.to_owned()),
            "access_key_id" => self.access_key = Some(Secret::new(value)),
            "secret_access_key" => self.secret_key = Some(Secret::new(value)),
            "session_token" | "token" => self.session_token = Some(Secret::new(value)),
            "sse_customer_key_base64" => self.passed_on.push((pass_on(name, plain)?, Secret::new(value))),
            _ => self.passed_on.push((pass_on(name, plain)?, Secret::unregistered(value))),
        }
        Ok(())
    }
}

/// Returns the `object_store` key of an option. Fails for an unknown option and for one that modelcache sets itself.
fn pass_on(name: &str, plain: &str) -> Result<AmazonS3ConfigKey> {
    use AmazonS3ConfigKey as Key;
    let plain = if plain == "sse" { "server_side_encryption" } else { plain };
    match plain.parse() {
        Ok(Key::Bucket) => {
            Err(invalid(format!("the remote option {name:?} is not allowed: the bucket is part of the address"))
                .hint("write s3://BUCKET/PREFIX"))
        }
        Ok(Key::Client(
            key @ (ClientConfigKey::UserAgent | ClientConfigKey::Timeout | ClientConfigKey::ReadTimeout),
        )) => {
            let error = invalid(format!("the remote option {name:?} is not allowed: modelcache sets it"));
            Err(match key {
                ClientConfigKey::UserAgent => error,
                _ => error.hint(format!("set read_timeout or {READ_TIMEOUT}")),
            })
        }
        Ok(Key::Client(_)) | Err(_) => {
            let error = invalid(format!("unknown remote option {name:?}"));
            Err(match nearest(plain, NAMES) {
                Some(known) => error.hint(format!("did you mean {known:?}?")),
                None => error.hint(format!("known options: {}", NAMES.join(", "))),
            })
        }
        Ok(key) => Ok(key),
    }
}

fn flag(name: &str, value: &str) -> Result<bool> {
    parse_switch(value)
        .map_err(|_| invalid(format!("the remote option {name:?} is {value:?}")).hint("write true or false"))
}

/// Returns true if an option passed on to `object_store` has a value that means true.
fn is_on(value: &str) -> bool {
    parse_switch(value).is_ok_and(|on| on)
}

fn seconds(name: &str, value: &str) -> Result<Duration> {
    let number = value.trim().trim_end_matches('s').trim();
    match number.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
        Some(time) if !time.is_zero() => Ok(time),
        _ => Err(invalid(format!("the remote option {name:?} is {value:?}")).hint("write a number of seconds")),
    }
}

/// The settings of the S3 client, merged from options, environment variables and AWS profile.
#[derive(Debug, Clone)]
pub(super) struct S3Settings {
    pub(super) region: String,
    pub(super) endpoint: Endpoint,
    pub(super) allow_http: bool,
    pub(super) connect_timeout: Duration,
    /// A file of root certificates to trust in addition to the system's.
    pub(super) ca_file: Option<PathBuf>,
}

impl S3Settings {
    /// Merges the settings. Options take precedence over variables, and variables over the profile.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) for an invalid endpoint or region. The message contains neither the
    /// region nor credentials in the endpoint, because either may be a secret.
    pub(super) fn gather(options: &Options, environment: &Environment, profiles: &Profiles) -> Result<Self> {
        let variable = |name: &str| environment.get(name).map(str::to_owned);
        let setting = |name: &str| profiles.current(name).map(str::to_owned);
        let configured = || {
            let variables = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"));
            let section = profiles.current("services").map(|name| format!("services {name}"));
            let of_service =
                || section.and_then(|section| profiles.get(&section, "s3.endpoint_url").map(str::to_owned));
            variables.or_else(of_service).or_else(|| setting("endpoint_url"))
        };
        // The variable takes precedence. Then comes the profile: first the setting in its `s3` group, then the one
        // outside.
        let is_true = |variable_name: &str, profile_key: &str| {
            let of_profile = || setting(&format!("s3.{profile_key}")).or_else(|| setting(profile_key));
            let value = variable(variable_name).or_else(of_profile);
            value.is_some_and(|value| value.eq_ignore_ascii_case("true"))
        };
        let is_ignored = is_true("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "ignore_configured_endpoint_urls");
        let custom = options.endpoint.clone().or_else(|| if is_ignored { None } else { configured() });
        let style = setting("s3.addressing_style");
        let style = style.filter(|style| style != "auto").map(|style| style == "path");
        let endpoint = Endpoint {
            custom: custom.map(|endpoint| endpoint.trim_end_matches('/').to_owned()),
            path_style: options.path_style.or(style),
            fips: is_true("AWS_USE_FIPS_ENDPOINT", "use_fips_endpoint"),
            dual_stack: is_true("AWS_USE_DUALSTACK_ENDPOINT", "use_dualstack_endpoint"),
        };
        let region = options
            .region
            .clone()
            .or_else(|| variable("AWS_REGION"))
            .or_else(|| variable("AWS_DEFAULT_REGION"))
            .or_else(|| setting("region"))
            .unwrap_or_else(|| DEFAULT_REGION.to_owned());
        let is_http = endpoint.custom.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        let ca_file = variable("AWS_CA_BUNDLE").or_else(|| setting("ca_bundle")).or_else(|| variable("SSL_CERT_FILE"));
        let settings = Self {
            region,
            endpoint,
            allow_http: options.allow_http.unwrap_or(is_http),
            connect_timeout: options.connect_timeout.unwrap_or(CONNECT_TIMEOUT),
            ca_file: ca_file.map(PathBuf::from),
        };
        settings.check()?;
        Ok(settings)
    }

    /// Returns the configured endpoint, or the one of AWS for the region.
    pub(super) fn endpoint_url(&self) -> String {
        self.endpoint.url(&self.region)
    }

    /// Returns true if requests sign the digest of their body. Without the option `unsigned_payload`, only requests
    /// over plain HTTP do, because TLS protects the integrity of bodies.
    pub(super) fn signs_payload(&self, options: &Options) -> bool {
        let is_that_option =
            |(key, _): &&(AmazonS3ConfigKey, Secret)| matches!(key, AmazonS3ConfigKey::UnsignedPayload);
        match options.passed_on.iter().find(is_that_option) {
            Some((_, value)) => !is_on(value.expose()),
            None => self.endpoint.custom.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://")),
        }
    }

    /// Checks region and endpoint. Each may come from an option, a variable or the profile.
    fn check(&self) -> Result<()> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.region.is_empty() || !self.region.chars().all(is_name) {
            return Err(invalid("the region of the remote is not a valid region name".into())
                .hint("set AWS_REGION, or region under [remote.options], for instance to us-east-1"));
        }
        self.endpoint.check(&self.region)?;
        let Some(endpoint) = &self.endpoint.custom else { return Ok(()) };
        match Url::parse(endpoint) {
            Ok(url) if !url.username().is_empty() || url.password().is_some() => Err(Error::invalid(format!(
                "the endpoint {:?} of the remote carries credentials",
                redact::setting(endpoint)
            ))
            .hint("leave them out; keys come from the environment or from `aws configure`")),
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(()),
            _ => Err(Error::invalid(format!(
                "the endpoint {:?} of the remote is not an http or https address",
                redact::setting(endpoint)
            ))
            .hint("set AWS_ENDPOINT_URL, or endpoint under [remote.options], for instance to http://localhost:9000")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::collections::HashMap;

    fn options(pairs: &[(&str, &str)]) -> Result<Options> {
        let options = pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Options::parse(&RemoteConfig { url: String::new(), options, environment: Environment::default() })
    }

    #[test]
    fn a_misspelt_option_suggests_the_nearest_name() {
        assert_eq!(options(&[("regoin", "x")]).expect_err("unknown").hint_text(), Some("did you mean \"region\"?"));
        assert_eq!(
            options(&[("pathstyle", "x")]).expect_err("unknown").hint_text(),
            Some("did you mean \"path_style\"?")
        );
        assert!(
            options(&[("zzzzzzzz", "x")]).expect_err("unknown").hint_text().is_some_and(|hint| hint.contains("region"))
        );
        assert!(options(&[("bucket", "x")]).is_err());
        assert!(options(&[("path_style", "maybe")]).is_err());
    }

    #[test]
    fn the_profile_sets_endpoint_and_addressing_as_for_the_aws_tools() {
        let config = "[default]\nregion = eu-west-1\nservices = store\nendpoint_url = https://all.example\n\
                      use_dualstack_endpoint = true\ns3 =\n  addressing_style = virtual\n\
                      [services store]\ns3 =\n  endpoint_url = https://s3.example\n";
        let profiles = Profiles::from_texts("default", "", config);
        let url = |variables: &[(&str, &str)]| {
            let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            let none = options(&[]).expect("options");
            let gathered = S3Settings::gather(&none, &Environment(variables), &profiles).expect("settings");
            gathered.endpoint.bucket_url("models", &gathered.region)
        };
        assert_eq!(url(&[]), "https://models.s3.example");
        assert_eq!(url(&[("AWS_ENDPOINT_URL", "https://v.example")]), "https://models.v.example");
        let ignored = ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true");
        assert_eq!(url(&[ignored]), "https://models.s3.dualstack.eu-west-1.amazonaws.com");
        let fips = [ignored, ("AWS_USE_FIPS_ENDPOINT", "true"), ("AWS_USE_DUALSTACK_ENDPOINT", "false")];
        assert_eq!(url(&fips), "https://models.s3-fips.eu-west-1.amazonaws.com");
        assert_eq!(
            url(&[ignored, ("AWS_REGION", "cn-north-1")]),
            "https://models.s3.dualstack.cn-north-1.amazonaws.com.cn"
        );
    }

    #[test]
    fn options_outrank_variables_and_variables_the_profile() {
        let environment = Environment(HashMap::from([
            ("AWS_REGION".to_owned(), "eu-west-1".to_owned()),
            ("AWS_ENDPOINT_URL".to_owned(), "http://localhost:9000/".to_owned()),
        ]));
        let profiles = Profiles::from_texts("default", "", "[default]\nregion = us-west-2\n");
        let none = options(&[]).expect("options");
        let gathered = S3Settings::gather(&none, &environment, &profiles).expect("settings");
        assert_eq!(
            (gathered.region.as_str(), gathered.endpoint.is_path_style("models"), gathered.allow_http),
            ("eu-west-1", true, true)
        );
        assert_eq!(gathered.endpoint.custom.as_deref(), Some("http://localhost:9000"));
        for nonsense in ["nonsense", "localhost:9000", "ftp://host", "http://"] {
            let bad = S3Settings {
                endpoint: Endpoint { custom: Some(nonsense.into()), ..Endpoint::default() },
                ..gathered.clone()
            };
            assert_eq!(bad.check().map_err(|error| error.kind()), Err(ErrorKind::Invalid), "{nonsense}");
        }
        for nonsense in ["eu\u{1b}[31m", "eu\nwest"] {
            assert_eq!(options(&[("region", nonsense)]).expect_err("a control character").kind(), ErrorKind::Invalid);
        }
        for nonsense in ["", "user:canary/x@host", "eu west"] {
            let bad = options(&[("region", nonsense)]).expect("options");
            let refused = S3Settings::gather(&bad, &environment, &profiles).expect_err("no region");
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{nonsense}");
            assert!(!refused.to_string().contains("canary"), "{refused}");
        }

        let gathered = S3Settings::gather(&none, &Environment::default(), &profiles).expect("settings");
        assert_eq!(
            (gathered.region.as_str(), gathered.endpoint.is_path_style("models"), gathered.allow_http),
            ("us-west-2", false, false)
        );

        let named = options(&[("region", "ap-south-1"), ("sse", "aws:kms"), ("sse_kms_key_id", "k")]).expect("options");
        assert_eq!(S3Settings::gather(&named, &environment, &profiles).expect("settings").region, "ap-south-1");
        assert_eq!(named.passed_on.len(), 2);
    }

    #[test]
    fn keys_in_options_do_not_print() {
        let options = options(&[("access_key_id", "canary"), ("secret_access_key", "canary")]).expect("options");
        assert!(!format!("{options:?}").contains("canary"));
    }
}
