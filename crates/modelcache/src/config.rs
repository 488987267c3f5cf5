//! The complete, validated configuration of a cache.
//!
//! The library reads no environment variables. Front ends gather the settings with [`settings`](crate::settings) and
//! pass a [`Config`]. Secrets have the type [`Secret`], which never prints its value.

use crate::credentials::Credentials;
use crate::error::{Error, Result};
use crate::forbid::Forbid;
use crate::key::ArtifactKey;
use crate::origin::Origin;
use crate::redact;
use crate::reference::{Reference, schemes};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The configuration of a [`Cache`](crate::Cache). [`Config::new`] has the defaults.
///
/// ```
/// use modelcache::config::{ByteBound, Config};
///
/// let mut config = Config::new("/var/cache/models");
/// config.max_bytes = ByteBound::Percent(50);
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// The local directory.
    pub dir: PathBuf,
    /// Creates the local directory if it does not exist. A front end that only reads turns this off.
    pub create_dir: bool,
    /// The budget: the directory takes at most this many bytes.
    pub max_bytes: ByteBound,
    /// Space that is left free on the filesystem.
    pub min_free_bytes: ByteBound,
    /// When downloaded files are synced to stable storage.
    pub durable: Durable,
    /// Which users share the local directory.
    pub shared: Sharing,
    /// A second, read-only cache directory, for example one that is part of a container image. Files that the local
    /// directory lacks are looked up there.
    pub lower_dir: Option<PathBuf>,
    /// How files are written to disk.
    pub write_mode: WriteMode,
    /// The layout in which artifacts are made available, unless a get states another one.
    pub layout: DirLayout,
    /// Whether archives are extracted, unless a get states otherwise.
    pub extract: Extract,
    /// Keeps an archive on disk after it was extracted.
    pub keep_archive: bool,
    /// The remote tier, if one is configured.
    pub remote: Option<RemoteConfig>,
    /// How to reach the buckets of `s3://` references.
    pub buckets: BucketConfig,
    /// Refuse files without a published checksum.
    pub require_checksum: bool,
    /// Files that are neither published nor downloaded nor returned.
    pub forbid: Forbid,
    /// The policy for an unavailable remote.
    pub on_remote_down: OnRemoteDown,
    /// Whether the remote may be written to.
    pub remote_mode: RemoteMode,
    /// When artifacts from an origin are uploaded to the remote. If `None`, a long-lived front end uses
    /// [`Backfill::Background`], all others [`Backfill::Wait`].
    pub backfill: Option<Backfill>,
    /// The origins of a bare `name@version`, in order. The next one is consulted only if the previous one does not have
    /// the artifact.
    pub origins: Vec<OriginTemplate>,
    /// The Hugging Face Hub.
    pub hub: HubConfig,
    /// Credentials for web servers.
    pub credentials: Credentials,
    /// The MLflow server.
    pub mlflow: MlflowConfig,
    /// OCI registries.
    pub oci: OciConfig,
    /// The application's own origins, beside the built-in ones. See [`crate::origin`] for an example.
    pub own_origins: Vec<Arc<dyn Origin>>,
    /// How long a resolved revision or tag is considered current.
    pub ref_ttl: Duration,
    /// Never contact an origin over the network. A single call can also exclude the remote.
    pub offline: bool,
    /// The longest random delay before the first request to a remote or an origin.
    pub start_jitter: Duration,
    /// How requests are retried.
    pub retry: RetryConfig,
    /// Never connect an origin to an address from which only this machine can read, such as the metadata service of a
    /// cloud. For front ends that accept references from others.
    pub refuse_link_local: bool,
}

impl Config {
    /// Returns the default configuration for the local directory `dir`: a budget of 80 % of the filesystem, 10 % of it
    /// left free, no remote, and the public Hugging Face Hub.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            create_dir: true,
            max_bytes: ByteBound::Percent(80),
            min_free_bytes: ByteBound::Percent(10),
            durable: Durable::default(),
            shared: Sharing::default(),
            lower_dir: None,
            write_mode: WriteMode::default(),
            layout: DirLayout::default(),
            extract: Extract::default(),
            keep_archive: false,
            remote: None,
            buckets: BucketConfig::default(),
            require_checksum: false,
            forbid: Forbid::default(),
            on_remote_down: OnRemoteDown::default(),
            remote_mode: RemoteMode::default(),
            backfill: None,
            origins: Vec::new(),
            hub: HubConfig::default(),
            credentials: Credentials::default(),
            mlflow: MlflowConfig::default(),
            oci: OciConfig::default(),
            own_origins: Vec::new(),
            ref_ttl: Duration::from_secs(60),
            offline: false,
            start_jitter: Duration::ZERO,
            retry: RetryConfig::default(),
            refuse_link_local: false,
        }
    }
}

/// A number of bytes, or a percentage of the filesystem that contains the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteBound {
    /// This many bytes.
    Bytes(u64),
    /// A percentage of the filesystem's size (0 to 100).
    Percent(u8),
}

impl ByteBound {
    /// Returns the bound in bytes, for a filesystem of `filesystem_bytes`.
    pub fn bytes(self, filesystem_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => filesystem_bytes / 100 * u64::from(percent),
        }
    }
}

/// When downloaded and published files are synced to stable storage, so that they survive a power cut. After a power
/// cut, files that were not synced are hashed before they are leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durable {
    /// Before the get returns.
    Wait,
    /// In the background, while this process runs.
    #[default]
    Background,
    /// By a later use of the files, once the kernel has had the time to write them back. For processes that end soon.
    Later,
}

/// Which users share the local directory. This determines the modes of its files and folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// No sharing: the modes follow the umask of the process.
    #[default]
    Off,
    /// All members of the folder's group.
    Group,
    /// All users.
    World,
}

/// Whether files are written through the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteMode {
    /// Through the page cache if the file is read next and fits into free memory, otherwise with direct I/O.
    #[default]
    Auto,
    /// Through the page cache.
    Buffered,
    /// With direct I/O (O_DIRECT), for large files on filesystems that support it.
    Direct,
}

/// Whether an archive is extracted, so that a get returns the folder of its files.
///
/// A get extracts an archive only if it selects no other file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Extract {
    /// Never: an archive is a file like any other.
    #[default]
    Never,
    /// If the content of the file is an archive (tar, plain or compressed, or zip), and its name has the extension of
    /// one, or no extension. Anything else is returned as it is.
    Auto,
    /// Always: anything that is not an archive is an error.
    Always,
}

impl Extract {
    /// Returns the value with this name: `never`, `auto` or `always`.
    ///
    /// # Errors
    /// `Invalid` for any other name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "never" => Ok(Self::Never),
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            _ => Err(Error::invalid(format!("{name:?} does not state whether to extract archives"))
                .hint("accepted: auto, always or never")),
        }
    }
}

/// The layout in which the files of an artifact are made available.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirLayout {
    /// A folder of the artifact's own.
    #[default]
    Files,
    /// As [`Files`](Self::Files), and an artifact of the Hugging Face Hub also in the layout of a Hugging Face cache.
    Hub,
}

/// The location of the remote, and how to reach it.
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteConfig {
    /// `s3://bucket/prefix` or `file:///folder`.
    pub url: String,
    /// Options of the store by name: `region`, `endpoint`, `path_style`, encryption and so on.
    pub options: BTreeMap<String, String>,
    /// The environment in which AWS credentials and settings are looked up (`AWS_*`, `HOME`).
    pub environment: Environment,
}

/// How to reach buckets other than the remote's. Front ends pass the options and the environment of the remote.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BucketConfig {
    /// Options of the store, as in [`RemoteConfig`].
    pub options: BTreeMap<String, String>,
    /// The environment in which AWS credentials and settings are looked up, as in [`RemoteConfig`].
    pub environment: Environment,
}

/// Environment variables, passed by the front end.
#[derive(Clone, Default, PartialEq)]
pub struct Environment(pub HashMap<String, String>);

impl Environment {
    /// Returns the value of `name` without white space around it, or `None` if it is unset or empty. A Kubernetes
    /// secret that was made with `echo` ends in a line break.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }
}

/// Prints only the number of variables, because values may be secrets.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Environment({} variables)", self.0.len())
    }
}

/// The policy for a remote that is still unavailable after retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnRemoteDown {
    /// Continue with the origin.
    #[default]
    Origin,
    /// Fail.
    Fail,
}

/// Whether the remote may be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RemoteMode {
    /// Read and written.
    #[default]
    ReadWrite,
    /// Only read.
    ReadOnly,
}

/// When artifacts from an origin are uploaded to the remote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backfill {
    /// Before the call returns.
    #[default]
    Wait,
    /// In the background; the call does not wait.
    Background,
    /// In a later run; this run only records the pending upload.
    Later,
    /// Not at all.
    Never,
}

/// How to reach the Hub.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// The URL of the Hub, without a slash at the end; it may have a path.
    pub endpoint: String,
    /// The token sent to that endpoint, and to no other host.
    pub token: Option<Secret>,
    /// The value of the `Via` header of requests to the endpoint. A daemon sets it to recognise its own requests.
    pub via: Option<String>,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self { endpoint: "https://huggingface.co".into(), token: None, via: None }
    }
}

/// How to reach MLflow. URLs are secrets, too, because they may contain a password.
#[derive(Debug, Clone, Default)]
pub struct MlflowConfig {
    /// The tracking server. It serves runs, and may proxy their files.
    pub tracking_uri: Option<Secret>,
    /// The server of the model registry, if it is not the tracking server.
    pub registry_uri: Option<Secret>,
    /// The token, which is sent only to these two servers.
    pub token: Option<Secret>,
    /// User and password, which are sent only to these two servers. They override the token, as in MLflow's own client.
    pub login: Option<(String, Secret)>,
    /// The environment in which the credentials for buckets with models are looked up (`AWS_*`, `HOME`).
    pub environment: Environment,
    /// The folder of this machine below which model files are read, if the server stores models as plain files. If
    /// `None`, no such files are read.
    pub local_root: Option<PathBuf>,
}

/// How to reach OCI registries.
#[derive(Debug, Clone, Default)]
pub struct OciConfig {
    /// Registries (`host` or `host:port`) that are reached without TLS. Registries on this machine never need TLS.
    pub plain_http: Vec<String>,
    /// Credentials by registry, from docker's configuration.
    pub logins: BTreeMap<String, OciLogin>,
    /// Docker's credential helper for all other registries. It is not run, but error messages name it.
    pub helper: Option<String>,
    /// Why docker's configuration could not be read. Reported only when a registry needs credentials.
    pub trouble: Option<String>,
}

/// The entry of a registry in docker's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OciLogin {
    /// User and password, which are sent to that registry or to the token server that it names.
    Password(String, Secret),
    /// The credentials are stored by this credential helper, which is not run.
    Helper(String),
    /// An identity token, which is not supported.
    IdentityToken,
}

/// How requests are retried.
#[derive(Debug, Clone, Copy)]
pub struct RetryConfig {
    /// The time from its first failure during which a request is retried.
    pub deadline: Duration,
    /// Timeout for connecting, for the first byte, and between bytes.
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
    /// Creates a secret and registers it for redaction: it is replaced in all output, even if a server quotes it.
    pub fn new(text: impl Into<String>) -> Self {
        let secret = Self::unregistered(text);
        redact::register(&secret.0);
        secret
    }

    /// Creates a secret without registering it for redaction, for values that may be common words. Only its own
    /// [`Debug`](fmt::Debug) output hides it.
    pub(crate) fn unregistered(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text, for the code that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The hint for an invalid [`OriginTemplate`].
const TEMPLATE_HINT: &str = "for example hf://{name}@{version} or https://registry/{name}/{version}.tar.gz";

/// The origin of bare keys: a reference with the placeholders `{name}` and `{version}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginTemplate(String);

impl OriginTemplate {
    /// Parses a template. Checks that it has both placeholders, and that it yields a reference to an origin.
    pub fn new(text: &str) -> Result<Self> {
        let template = Self(text.trim().to_owned());
        if !template.0.contains("{name}") && !template.0.contains("{version}") {
            return Err(Error::invalid(format!(
                "the origin {:?} has neither {{name}} nor {{version}}",
                redact::reference(text)
            ))
            .hint(TEMPLATE_HINT));
        }
        template.apply(&ArtifactKey::bare("a@1")?)?;
        for placeholder in ["{name}", "{version}"] {
            if !template.0.contains(placeholder) {
                return Err(Error::invalid(format!(
                    "the origin {:?} has no {placeholder} in it: other artifacts would get the same content",
                    redact::reference(text)
                ))
                .hint(TEMPLATE_HINT));
            }
        }
        let rest = template.0.replace("{name}", "").replace("{version}", "");
        if rest.contains(['{', '}']) {
            return Err(Error::invalid(format!(
                "the origin {:?} has an unknown placeholder; only {{name}} and {{version}} are supported",
                redact::reference(text)
            ))
            .hint("check the spelling of the placeholders"));
        }
        Ok(template)
    }

    /// Returns the reference for `key`.
    pub fn apply(&self, key: &ArtifactKey) -> Result<Reference> {
        // If the parser of the scheme decodes percent escapes, the values are encoded: a version with a slash stays one
        // segment, and a question mark does not begin a query.
        let scheme = schemes().find(|scheme| scheme.split(&self.0).is_some());
        let is_decoded = scheme.is_some_and(|scheme| scheme.decodes_escapes);
        let encode = |text: &str| if is_decoded { encode_segment(text) } else { text.to_owned() };
        let name = key.name.as_str().split('/').map(encode).collect::<Vec<_>>().join("/");
        let filled = self.0.replace("{name}", &name).replace("{version}", &encode(key.version.as_str()));
        // The version comes from the key, so none has to be derived from the server's ETag or Last-Modified.
        let reference = Reference::parse(&filled)?.with_version(&key.version);
        match reference.scheme() {
            None => Err(Error::invalid(format!("the origin {:?} is not a URI", redact::reference(&self.0)))),
            _ if reference.file.is_some() => Err(Error::invalid(format!(
                "the origin {:?} names one file of a repository",
                redact::reference(&self.0)
            ))),
            _ => Ok(reference),
        }
    }
}

/// Percent-encodes `text` as a single path segment, slashes included. Only the unreserved characters of RFC 3986 are
/// not encoded.
pub fn encode_segment(text: &str) -> String {
    const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// Percent-encodes each segment of `path` as [`encode_segment`] does, keeping the slashes.
pub fn encode_path(path: &str) -> String {
    path.split('/').map(encode_segment).collect::<Vec<_>>().join("/")
}

/// Formats the template as it was written.
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
