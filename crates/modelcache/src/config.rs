//! Configuration as the library takes it: handed in, complete, checked.
//!
//! The library reads no environment variable; doors gather settings through [`settings`](crate::settings) and hand
//! over a [`Config`]. Secrets are held in a type that never prints.

use crate::credentials::Credentials;
use crate::error::{Error, Result};
use crate::key::ArtifactKey;
use crate::redact;
use crate::reference::{Reference, Target};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Everything a [`Cache`](crate::Cache) needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// The local directory.
    pub dir: PathBuf,
    /// The budget: most bytes the directory may take.
    pub max_bytes: ByteBound,
    /// Bytes of the filesystem that are left free.
    pub min_free_bytes: ByteBound,
    /// When what was fetched is made durable.
    pub durable: Durable,
    /// Who else may write into the local directory.
    pub shared: Sharing,
    /// A cache underneath that is only read, baked into an image for instance.
    pub lower_dir: Option<PathBuf>,
    /// How files are written to disk.
    pub write_mode: WriteMode,
    /// The far tier, if there is one.
    pub remote: Option<RemoteConfig>,
    /// How buckets are reached that `s3://` references name.
    pub buckets: BucketConfig,
    /// Refuse files of which nobody states a checksum.
    pub require_checksum: bool,
    /// What an unavailable remote means.
    pub on_remote_down: OnRemoteDown,
    /// Whether the remote may be written.
    pub remote_mode: RemoteMode,
    /// When the remote gets what came from an origin. `None` where nobody chose: a door that lives long takes
    /// [`Backfill::Background`] then, all others [`Backfill::Wait`].
    pub backfill: Option<Backfill>,
    /// Where a bare `name@version` comes from, in order; the next only where the one before does not have it.
    pub origins: Vec<OriginTemplate>,
    /// The Hugging Face Hub.
    pub hub: HubConfig,
    /// Credentials for web servers.
    pub credentials: Credentials,
    /// The MLflow server.
    pub mlflow: MlflowConfig,
    /// OCI registries.
    pub oci: OciConfig,
    /// How long a resolved revision or tag is taken to be current.
    pub ref_ttl: Duration,
    /// Never ask an origin over the network; one call may be narrower still.
    pub offline: bool,
    /// The first call to a remote or an origin is put off by a random time up to this.
    pub start_jitter: Duration,
    /// How requests are tried again.
    pub retry: RetryConfig,
}

/// A number of bytes, or a share of the filesystem that holds the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteBound {
    /// This many bytes.
    Bytes(u64),
    /// This share of the filesystem's size, in percent (0 to 100).
    Percent(u8),
}

impl ByteBound {
    /// The bound in bytes on a filesystem of `filesystem_bytes`.
    pub fn bytes(self, filesystem_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => filesystem_bytes / 100 * u64::from(percent),
        }
    }
}

/// When what was fetched and published is made durable: able to survive a power cut. What is not yet is never trusted
/// after one: it is hashed before it is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durable {
    /// Before the get returns.
    Wait,
    /// In the background, while this process goes on.
    #[default]
    Background,
    /// When the caller says so, or another process that the duty is handed to.
    Later,
}

/// Which users share the local directory, and so which modes its files get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// As the process's umask says.
    #[default]
    Off,
    /// Everybody in the folder's group.
    Group,
    /// Everybody.
    World,
}

/// Whether files are written through the page cache or past it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteMode {
    /// Through it where the file is read next and memory has room for it, else past it.
    #[default]
    Auto,
    /// Through it.
    Buffered,
    /// Past it (O_DIRECT), large files only, and where the filesystem takes that.
    Direct,
}

/// Where the remote is and how to reach it.
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteConfig {
    /// `s3://bucket/prefix` or `file:///folder`.
    pub url: String,
    /// Options of the store by name: `region`, `endpoint`, `path_style`, encryption and so on.
    pub options: BTreeMap<String, String>,
    /// The environment in which AWS credentials and settings are looked up (`AWS_*`, `HOME`).
    pub environment: Environment,
}

/// How to reach buckets other than the remote's: as the remote's own is reached.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BucketConfig {
    /// Options of the store, as in [`RemoteConfig`].
    pub options: BTreeMap<String, String>,
    /// Where AWS credentials and settings are looked up.
    pub environment: Environment,
}

/// Environment variables, handed in by the door.
#[derive(Clone, Default, PartialEq)]
pub struct Environment(pub HashMap<String, String>);

impl Environment {
    /// The value of `name`, unless it is unset or empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// Values may be secrets: only the number is printed.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Environment({} variables)", self.0.len())
    }
}

/// What an unavailable remote means, after retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnRemoteDown {
    /// Go on to the origin.
    #[default]
    Origin,
    /// Fail.
    Fail,
}

/// Whether the remote may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RemoteMode {
    /// Read and written.
    #[default]
    ReadWrite,
    /// Only read.
    ReadOnly,
}

/// When the remote gets what came from an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backfill {
    /// Before the call returns.
    #[default]
    Wait,
    /// While the process goes on; the call does not wait.
    Background,
    /// With a later run: only a durable intent is written.
    Later,
    /// Not at all.
    Never,
}

/// How to reach the Hub.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// Scheme and host, without a slash at the end.
    pub endpoint: String,
    /// The token sent to that endpoint, and to no other host.
    pub token: Option<Secret>,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self { endpoint: "https://huggingface.co".into(), token: None }
    }
}

/// How to reach MLflow. Addresses are secrets, too: they may carry a password.
#[derive(Debug, Clone, Default)]
pub struct MlflowConfig {
    /// The tracking server: runs, and files that it hands on.
    pub tracking_uri: Option<Secret>,
    /// The server of the model registry, where it is another one.
    pub registry_uri: Option<Secret>,
    /// The token sent to these two, and to no other server.
    pub token: Option<Secret>,
    /// User and password, sent likewise; they overrule the token, as in MLflow's own client.
    pub login: Option<(String, Secret)>,
    /// Where the credentials of buckets that hold models are looked up (`AWS_*`, `HOME`).
    pub environment: Environment,
    /// The folder of this machine below which models may lie that the server keeps as plain files; none is read without.
    pub local_root: Option<PathBuf>,
}

/// How to reach OCI registries.
#[derive(Debug, Clone, Default)]
pub struct OciConfig {
    /// Registries (`host` or `host:port`) that are spoken to without TLS, besides those on this machine.
    pub plain_http: Vec<String>,
    /// Credentials by registry, as docker keeps them.
    pub logins: BTreeMap<String, OciLogin>,
    /// The program that keeps the credentials of all other registries; not run, but named.
    pub helper: Option<String>,
    /// Why docker's file could not be read, if it could not: told where credentials are missed.
    pub trouble: Option<String>,
}

/// What docker's configuration has for a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OciLogin {
    /// User and password: sent to that registry, or to the token server that it names.
    Password(String, Secret),
    /// They are kept by this program, which is not run.
    Helper(String),
    /// A token of a kind that is not understood.
    IdentityToken,
}

/// How requests are tried again.
#[derive(Debug, Clone, Copy)]
pub struct RetryConfig {
    /// How long after the first failure a request may still be tried again.
    pub deadline: Duration,
    /// Longest silence of a server: connecting, to the first byte, between bytes.
    pub read_timeout: Duration,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), read_timeout: Duration::from_secs(30) }
    }
}

/// A text that must not appear in logs, errors or metrics.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` secret: it is left out of every text that is shown, also where a server quotes it.
    pub fn new(text: impl Into<String>) -> Self {
        let secret = Self::hidden(text);
        redact::learn(&secret.0);
        secret
    }

    /// A value that may be secret and may as well be a common word: only [`Debug`](fmt::Debug) leaves it out.
    pub(crate) fn hidden(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A reference with `{name}` and `{version}` in it: where a bare key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginTemplate(String);

impl OriginTemplate {
    /// Checks that the template gives a reference that an origin can answer.
    pub fn new(text: &str) -> Result<Self> {
        let template = Self(text.trim().to_owned());
        if !template.0.contains("{name}") && !template.0.contains("{version}") {
            return Err(Error::invalid(format!(
                "the origin {:?} names neither {{name}} nor {{version}}",
                redact::reference(text)
            ))
            .hint("for instance hf://{name}@{version} or https://registry/{name}/{version}.tar.gz"));
        }
        template.apply(&ArtifactKey::bare("a@1")?)?;
        for place in ["{name}", "{version}"] {
            if !template.0.contains(place) {
                return Err(Error::invalid(format!(
                    "the origin {:?} has no {place} in it: other artifacts would get the same content",
                    redact::reference(text)
                ))
                .hint("for instance hf://{name}@{version} or https://registry/{name}/{version}.tar.gz"));
            }
        }
        let rest = template.0.replace("{name}", "").replace("{version}", "");
        if rest.contains(['{', '}']) {
            return Err(Error::invalid(format!(
                "the origin {:?} has other braces than {{name}} and {{version}}",
                redact::reference(text)
            ))
            .hint("check how they are spelled"));
        }
        Ok(template)
    }

    /// The reference for `key`.
    pub fn apply(&self, key: &ArtifactKey) -> Result<Reference> {
        // What the parser decodes is encoded here: a version never becomes two segments, or a query.
        let decoded = ["https://", "http://", "file://"].iter().any(|scheme| self.0.starts_with(scheme));
        let text = |text: &str| if decoded { one_segment(text) } else { text.to_owned() };
        let name = key.name.as_str().split('/').map(text).collect::<Vec<_>>().join("/");
        let filled = self.0.replace("{name}", &name).replace("{version}", &text(key.version.as_str()));
        let mut reference = Reference::parse(&filled)?;
        // The key names the version: no server has to be asked what its file is called now.
        if let Target::Web(file) = &mut reference.target {
            file.version = Some(key.version.clone());
        }
        match reference.target {
            Target::Bare(_) => Err(Error::invalid(format!("the origin {:?} is no URI", redact::reference(&self.0)))),
            _ if reference.file.is_some() => Err(Error::invalid(format!(
                "the origin {:?} names one file of a repository",
                redact::reference(&self.0)
            ))),
            _ => Ok(reference),
        }
    }
}

/// `text` as one segment of a path, slashes included: everything but the unreserved characters of RFC 3986 encoded.
pub(crate) fn one_segment(text: &str) -> String {
    const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// As it was written.
impl fmt::Display for OriginTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_print() {
        let config = HubConfig { token: Some(Secret::new("hf_canary")), ..HubConfig::default() };
        let environment = Environment(HashMap::from([("AWS_SECRET_ACCESS_KEY".into(), "canary".into())]));
        assert!(!format!("{config:?}{environment:?}").contains("canary"));
    }

    #[test]
    fn templates_fill_in_name_and_version() {
        let template = OriginTemplate::new("hf://{name}@{version}").expect("template");
        let reference = template.apply(&ArtifactKey::bare("org/model@v2").expect("key")).expect("applies");
        assert_eq!(reference.to_string(), "hf://org/model@v2");
        let template = OriginTemplate::new("https://r:1/{name}/{version}.tar.gz").expect("template");
        let reference = template.apply(&ArtifactKey::bare("team/a b@1%2f").expect("key")).expect("applies");
        assert_eq!(reference.to_string(), "https://r:1/team/a%20b/1%252f.tar.gz@1%2f");
        let error = OriginTemplate::new("https://user:canary@r/{name}").expect_err("a password");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("netrc")) && !error.to_string().contains("canary"));
        assert!(OriginTemplate::new("hf://org/model").is_err());
        assert!(OriginTemplate::new("{name}@{version}").is_err());
    }
}
