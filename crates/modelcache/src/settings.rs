//! The table of settings. Each row defines the flag, the variable, the key in the file, and the documentation.
//!
//! A front end passes flags, environment and the text of configuration files, and gets a complete, validated
//! [`Config`]. The error for an invalid value names the setting, its source and the accepted values. An empty value
//! counts as unset. An unknown key in a file is an error; an unknown `MODEL_CACHE_*` variable is only a warning,
//! because programs share environments.

mod credentials;
mod file;
mod read;
mod registries;
mod values;

use crate::config::{
    Backfill, BucketConfig, ByteBound, Config, DirLayout, Durable, Environment, Extract, HubConfig, OnRemoteDown,
    OriginTemplate, RemoteConfig, RemoteMode, Secret, Sharing, WriteMode,
};
use crate::credentials::Credentials;
use crate::error::{Error, Result};
use crate::forbid::Forbid;
use crate::human::nearest;
use crate::option_name::setting::{DIR, REMOTE};
use crate::option_name::{OptionName, Scope};
use crate::reference::{is_bucket_name, not_a_bucket};
use crate::{printable, redact};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use credentials::netrc_path;
use file::File;
pub use read::{environment, read_files, read_if_there};
pub(crate) use values::parse_switch;
use values::{DURATION_ACCEPTS, SIZE_ACCEPTS, SWITCH_ACCEPTS};
pub use values::{parse_duration, parse_lifetime, parse_size};

/// The file name of the user's and of the system-wide configuration file.
pub const FILE_NAME: &str = "modelcache.toml";

/// The variable that names a configuration file.
pub const FILE_VARIABLE: &str = "MODEL_CACHE_CONFIG";

/// The system-wide configuration file.
const SYSTEM_FILE: &str = "/etc/modelcache/modelcache.toml";

/// The value name of switches, in help texts. The flag of a switch may have no value, which means `1`.
pub const SWITCH: &str = "0|1";

/// The port of the daemon.
const SERVE_PORT: u16 = 8917;

/// The value name of a secret, which no error quotes.
const TOKEN: &str = "TOKEN";

/// The shortest token of the daemon. A shorter one could be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// The key of the tables of credentials.
const CREDENTIALS_KEY: &str = "credentials";

/// The key of the table of options of the object store.
const OPTIONS_KEY: &str = "remote.options";

/// One setting.
pub struct Setting {
    /// The key in the configuration file, and the name in messages.
    pub key: &'static str,
    /// The environment variable, if there is one.
    pub variable: Option<&'static str>,
    /// The flag without dashes, if there is one.
    pub flag: Option<&'static str>,
    /// The name of the value in help texts.
    pub value_name: &'static str,
    /// The default, for documentation.
    pub default: &'static str,
    /// The meaning, for documentation.
    pub description: &'static str,
    /// The accepted values, for documentation and for the hint of an invalid value.
    pub accepts: &'static str,
    /// Parses a value into the draft.
    set: fn(&SettingValue, &mut Draft) -> Result<()>,
}

impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setting").field("key", &self.key).finish_non_exhaustive()
    }
}

/// All settings, in the order of the documentation.
pub const SETTINGS: &[Setting] = &[
    Setting {
        key: "dir",
        variable: Some("MODEL_CACHE_DIR"),
        flag: Some("dir"),
        value_name: "FOLDER",
        default: "`$XDG_CACHE_HOME/modelcache`, otherwise `~/.cache/modelcache`, otherwise `modelcache` in the \
                  temporary folder",
        description: "The cache directory on the local disk.",
        accepts: "a folder, which is created if it does not exist",
        set: |value, draft| {
            draft.dir = Some(draft.expand_home(&value.text));
            Ok(())
        },
    },
    Setting {
        key: "max_bytes",
        variable: Some("MODEL_CACHE_MAX_BYTES"),
        flag: Some("max-bytes"),
        value_name: "SIZE",
        default: "`80%`",
        description: "The disk budget: the largest size of the cache directory.",
        accepts: SIZE_ACCEPTS,
        set: |value, draft| {
            draft.config.max_bytes = parse_size(&value.text)?;
            match draft.config.max_bytes {
                ByteBound::Bytes(0) | ByteBound::Percent(0) => Err(Error::invalid("must be more than zero")),
                _ => Ok(()),
            }
        },
    },
    Setting {
        key: "min_free_bytes",
        variable: Some("MODEL_CACHE_MIN_FREE_BYTES"),
        flag: Some("min-free-bytes"),
        value_name: "SIZE",
        default: "`10%`",
        description: "The space that always stays free on the filesystem. It applies in addition to the budget.",
        accepts: SIZE_ACCEPTS,
        set: |value, draft| {
            draft.config.min_free_bytes = parse_size(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "durable",
        variable: Some("MODEL_CACHE_DURABLE"),
        flag: Some("durable"),
        value_name: SWITCH,
        default: "`0`",
        description: "Sync downloaded files to stable storage (fsync) before the command returns. Without it, the kernel \
                  writes them within about half a minute, and a later use syncs them; after a reboot, files that \
                  were not synced are read in full and verified before they are used. `put`, `prewarm`, \
                  `get --into`, and every command on a network filesystem always sync before they return.",
        accepts: SWITCH_ACCEPTS,
        set: |value, draft| {
            draft.config.durable = if parse_switch(&value.text)? { Durable::Wait } else { Durable::default() };
            Ok(())
        },
    },
    Setting {
        key: "shared",
        variable: Some("MODEL_CACHE_SHARED"),
        flag: Some("shared"),
        value_name: "off|group|world",
        default: "`off`",
        description: "Which users share the cache directory. This sets the modes of new files and folders, whatever \
                  the umask; published files are always read-only. An existing directory keeps its modes.",
        accepts: "off, group (the group of the folder) or world (all users)",
        set: |value, draft| {
            draft.config.shared = match value.text.as_str() {
                "off" => Sharing::Off,
                "group" => Sharing::Group,
                "world" => Sharing::World,
                _ => return Err(Error::invalid("unknown value")),
            };
            Ok(())
        },
    },
    Setting {
        key: "lower_dir",
        variable: Some("MODEL_CACHE_LOWER_DIR"),
        flag: Some("lower-dir"),
        value_name: "FOLDER",
        default: "none",
        description: "A second, read-only cache, for example part of a container image. Its files are used without a \
                  download.",
        accepts: "a cache directory of an earlier run, or none",
        set: |value, draft| {
            draft.config.lower_dir = (value.text != "none").then(|| draft.expand_home(&value.text));
            Ok(())
        },
    },
    Setting {
        key: "layout",
        variable: Some("MODEL_CACHE_LAYOUT"),
        flag: Some("layout"),
        value_name: "files|hub",
        default: "`files`",
        description: "With `hub`, artifacts of the Hugging Face Hub are also made available as a Hugging Face cache in \
                  the folder `hub` of the cache directory, by hard links. Programs read it with `HF_HUB_CACHE` set to \
                  that folder, and `HF_HUB_OFFLINE=1`. Other artifacts are not affected.",
        accepts: "files or hub",
        set: |value, draft| {
            draft.config.layout = match value.text.as_str() {
                "files" => DirLayout::Files,
                "hub" => DirLayout::Hub,
                _ => return Err(Error::invalid("unknown value")),
            };
            Ok(())
        },
    },
    Setting {
        key: "extract",
        variable: Some("MODEL_CACHE_EXTRACT"),
        flag: Some("extract"),
        value_name: "auto|always|never",
        default: "`never`",
        description: "Whether an archive (tar, plain or compressed, or zip) is extracted, so that a command gets the folder of \
                      its files. The setting concerns commands that get a single file. `auto` extracts a file whose \
                      content is an archive and whose name has the extension of one, or no extension, and returns \
                      anything else as it is. For `always`, anything else is an error. The extracted files are an \
                      artifact of their own, `extracted/NAME`: they count in the budget, and are verified, leased \
                      and evicted like others.",
        accepts: "auto, always or never",
        set: |value, draft| {
            draft.config.extract = Extract::parse(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "keep_archive",
        variable: Some("MODEL_CACHE_KEEP_ARCHIVE"),
        flag: Some("keep-archive"),
        value_name: SWITCH,
        default: "`0`",
        description: "Keep an archive on disk after it was extracted. Without it, the archive is removed from this disk, \
                      unless this disk has the only copy, or the archive is pinned or in use.",
        accepts: SWITCH_ACCEPTS,
        set: |value, draft| {
            draft.config.keep_archive = parse_switch(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "write_mode",
        variable: Some("MODEL_CACHE_WRITE_MODE"),
        flag: Some("write-mode"),
        value_name: "auto|buffered|direct",
        default: "`auto`",
        description: "How files are written to disk. `buffered` writes through the page cache, so that a reader finds \
                  the files in memory. `direct` uses direct I/O, which pushes nothing else out of memory and does not \
                  count against the memory limit of a pod. `auto`: `get` is buffered unless a download needs more \
                  than half of the free memory, and `prewarm` is direct. Files below 64 MiB, and files without known \
                  checkpoints (never hashed before), are always buffered.",
        accepts: "auto, buffered or direct",
        set: |value, draft| {
            draft.config.write_mode = match value.text.as_str() {
                "auto" => WriteMode::Auto,
                "buffered" => WriteMode::Buffered,
                "direct" => WriteMode::Direct,
                _ => return Err(Error::invalid("unknown value")),
            };
            Ok(())
        },
    },
    Setting {
        key: "remote",
        variable: Some("MODEL_CACHE_REMOTE"),
        flag: Some("remote"),
        value_name: "URL",
        default: "none",
        description: "The shared object store. Without it, there are only the disk and the origins.",
        accepts: "s3://bucket/prefix, file:///folder, or none",
        set: |value, draft| {
            let url = match value.text.as_str() {
                "none" => None,
                text => Some(checked_remote(text)?),
            };
            draft.set_remote(value, url)
        },
    },
    Setting {
        key: "s3_bucket",
        variable: Some("MODEL_CACHE_S3_BUCKET"),
        flag: None,
        value_name: "BUCKET",
        default: "none",
        description: "Short form of the remote `s3://BUCKET`. It is an error to set both to different locations.",
        accepts: "the name of a bucket",
        set: |value, draft| {
            if value.text.contains("://") {
                return Err(
                    Error::invalid("a URL, not a bucket").hint(format!("set {REMOTE} to a URL, or use only the name"))
                );
            }
            let url = checked_remote(&format!("s3://{}", value.text))?;
            draft.set_remote(value, Some(url))
        },
    },
    Setting {
        key: OPTIONS_KEY,
        variable: None,
        flag: None,
        value_name: "TABLE",
        default: "none",
        description: "Options of the object store by name, for example `region`, `endpoint` or encryption.",
        accepts: "a table of strings, numbers and booleans",
        set: |_, _| Ok(()),
    },
    Setting {
        key: "require_checksum",
        variable: Some("MODEL_CACHE_REQUIRE_CHECKSUM"),
        flag: Some("require-checksum"),
        value_name: SWITCH,
        default: "`0`",
        description: "Refuse files without a published checksum: files in a bucket without `.sha256`, `SHA256SUMS` or \
                  checksum metadata, and files whose digest is only known from their first download.",
        accepts: SWITCH_ACCEPTS,
        set: |value, draft| {
            draft.config.require_checksum = parse_switch(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "forbid",
        variable: Some("MODEL_CACHE_FORBID"),
        flag: Some("forbid"),
        value_name: "LIST",
        default: "none",
        description: "Files that are neither published nor downloaded nor returned, separated by commas: formats of \
                      content (`pickle`, `pytorch`, `onnx`, …) and patterns of names (`*.pkl`). `pickle` includes PyTorch \
                      files, which contain one. A name is checked before a download, and so is a format that is known \
                      already; otherwise the format is checked before the file becomes visible.",
        accepts: "formats and patterns, or none",
        set: |value, draft| {
            let list = if value.text == "none" { "" } else { &value.text };
            draft.config.forbid = Forbid::parse(list.split(','))?;
            Ok(())
        },
    },
    Setting {
        key: "on_remote_down",
        variable: Some("MODEL_CACHE_ON_REMOTE_DOWN"),
        flag: None,
        value_name: "origin|fail",
        default: "`origin`",
        description: "Whether to continue with the origin, or to fail, if the remote is still unavailable after \
                  retries.",
        accepts: "origin or fail",
        set: |value, draft| {
            draft.config.on_remote_down = match value.text.as_str() {
                "origin" => OnRemoteDown::Origin,
                "fail" => OnRemoteDown::Fail,
                _ => return Err(Error::invalid("unknown value")),
            };
            Ok(())
        },
    },
    Setting {
        key: "remote_mode",
        variable: Some("MODEL_CACHE_REMOTE_MODE"),
        flag: Some("remote-mode"),
        value_name: "rw|ro",
        default: "`rw`",
        description: "Whether the remote may be written to: `rw` reads and writes, `ro` only reads.",
        accepts: "rw or ro",
        set: |value, draft| {
            draft.config.remote_mode = match value.text.as_str() {
                "rw" => RemoteMode::ReadWrite,
                "ro" => RemoteMode::ReadOnly,
                _ => return Err(Error::invalid("unknown value")),
            };
            Ok(())
        },
    },
    Setting {
        key: "backfill",
        variable: Some("MODEL_CACHE_BACKFILL"),
        flag: Some("backfill"),
        value_name: "wait|background|later|never",
        default: "`wait`; `background` in Python",
        description: "When artifacts from an origin are uploaded to the remote: before the call returns (`wait`), in \
                  the background, by a later run such as `modelcache backfill` (`later`), or never. With \
                  `background`, `get` prints its path first and ends after the upload; `exec` leaves the upload to a \
                  later run.",
        accepts: "wait, background, later or never",
        set: |value, draft| {
            draft.config.backfill = Some(match value.text.as_str() {
                "wait" => Backfill::Wait,
                "background" => Backfill::Background,
                "later" => Backfill::Later,
                "never" => Backfill::Never,
                _ => return Err(Error::invalid("unknown value")),
            });
            Ok(())
        },
    },
    Setting {
        key: "origin",
        variable: Some("MODEL_CACHE_ORIGIN"),
        flag: Some("origin"),
        value_name: "TEMPLATE",
        default: "none",
        description: "The origin of a bare `name@version`: a template, or several templates separated by commas. The \
                  next one is used only if the previous one does not have the artifact.",
        accepts: "for example hf://{name}@{version}, https://registry/{name}/{version}.tar.gz or \
                  file:///models/{name}/{version}; or none",
        set: |value, draft| {
            let templates = value.text.split(',').map(str::trim).filter(|text| !text.is_empty() && *text != "none");
            draft.config.origins = templates.map(OriginTemplate::new).collect::<Result<_>>()?;
            Ok(())
        },
    },
    Setting {
        key: CREDENTIALS_KEY,
        variable: None,
        flag: None,
        value_name: "TABLE",
        default: "none",
        description: "Credentials for web servers, one table for each scheme, host and port. They are not sent after \
                  a redirect to another server. For a server without a table, the netrc is used, for https only.",
        accepts: credentials::ACCEPTS,
        set: |_, _| Ok(()),
    },
    Setting {
        key: "mlflow_tracking_uri",
        variable: Some("MLFLOW_TRACKING_URI"),
        flag: None,
        value_name: "URL",
        default: "none",
        description: "The MLflow server of `models:/` references. It is checked only when such a reference is used.",
        accepts: "scheme, host, port and path of the server, for example https://mlflow.example",
        set: |value, draft| {
            draft.config.mlflow.tracking_uri = registries::server(value);
            Ok(())
        },
    },
    Setting {
        key: "mlflow_registry_uri",
        variable: Some("MLFLOW_REGISTRY_URI"),
        flag: None,
        value_name: "URL",
        default: "none",
        description: "The MLflow server of the model registry, if it is not the tracking server.",
        accepts: "scheme, host, port and path of the server",
        set: |value, draft| {
            draft.config.mlflow.registry_uri = registries::server(value);
            Ok(())
        },
    },
    Setting {
        key: "mlflow_local_root",
        variable: Some("MODEL_CACHE_MLFLOW_LOCAL_ROOT"),
        flag: None,
        value_name: "FOLDER",
        default: "none",
        description: "If the MLflow server stores models as plain files, they are read from this machine, and only \
                  below this folder.",
        accepts: "a folder, or none",
        set: |value, draft| {
            draft.config.mlflow.local_root = (value.text != "none").then(|| draft.expand_home(&value.text));
            Ok(())
        },
    },
    Setting {
        key: "oci_plain_http",
        variable: Some("MODEL_CACHE_OCI_PLAIN_HTTP"),
        flag: None,
        value_name: "REGISTRIES",
        default: "none",
        description: "OCI registries that are reached without TLS, separated by commas. Registries on this machine \
                  (`localhost` and loopback addresses) need not be listed.",
        accepts: "hosts with their ports, for example registry.internal:5000; or none",
        set: |value, draft| {
            draft.config.oci.plain_http = registries::plain_http(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "ref_ttl",
        variable: Some("MODEL_CACHE_REF_TTL"),
        flag: None,
        value_name: "DURATION",
        default: "`60s`",
        description: "How long a resolved revision or tag is considered current, before it is resolved again.",
        accepts: DURATION_ACCEPTS,
        set: |value, draft| {
            draft.config.ref_ttl = parse_duration(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "offline",
        variable: Some("MODEL_CACHE_OFFLINE"),
        flag: None,
        value_name: SWITCH,
        default: "`0`",
        description: "Never contact an origin over the network: only files on disk and on the remote are used, and \
                  revisions keep their last known meaning. The flag `--offline` does the same for one call.",
        accepts: SWITCH_ACCEPTS,
        set: |value, draft| {
            draft.offline = Some(parse_switch(&value.text)?);
            Ok(())
        },
    },
    Setting {
        key: "start_jitter",
        variable: Some("MODEL_CACHE_START_JITTER"),
        flag: None,
        value_name: "DURATION",
        default: "`0s`",
        description: "Wait a random time up to this before the first request of a get to the remote or an origin, so \
                  that the machines of a fleet that start together do not send their requests together. Artifacts on \
                  disk are not delayed.",
        accepts: DURATION_ACCEPTS,
        set: |value, draft| {
            draft.config.start_jitter = parse_duration(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "retry_deadline",
        variable: Some("MODEL_CACHE_RETRY_DEADLINE"),
        flag: None,
        value_name: "DURATION",
        default: "`60s`",
        description: "How long after its first failure a request may be retried; `0s` disables retries.",
        accepts: DURATION_ACCEPTS,
        set: |value, draft| {
            draft.config.retry.deadline = parse_duration(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "read_timeout",
        variable: Some("MODEL_CACHE_READ_TIMEOUT"),
        flag: None,
        value_name: "DURATION",
        default: "`30s`",
        description: "The timeout for connecting to a server, for the first byte of its response, and between bytes.",
        accepts: DURATION_ACCEPTS,
        set: |value, draft| {
            draft.config.retry.read_timeout = parse_duration(&value.text)?;
            if draft.config.retry.read_timeout.is_zero() {
                Err(Error::invalid("must be more than zero"))
            } else {
                Ok(())
            }
        },
    },
    Setting {
        key: "listen",
        variable: Some("MODEL_CACHE_LISTEN"),
        flag: Some("listen"),
        value_name: "ADDRESS",
        default: "`127.0.0.1:8917`",
        description: "The address on which `serve` accepts connections. An address that other machines can reach needs \
                  `MODEL_CACHE_TOKEN`, or `--insecure`.",
        accepts: "an IP address and a port, or several, separated by commas",
        set: |value, draft| {
            draft.serve.listen = parse_addresses(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "admin_listen",
        variable: Some("MODEL_CACHE_ADMIN_LISTEN"),
        flag: Some("admin-listen"),
        value_name: "ADDRESS",
        default: "none",
        description: "A second address of `serve`, on which only the probes and `/metrics` are served, without a token. \
                  The first address then asks for the token at `/metrics`.",
        accepts: "an IP address and a port, or none",
        set: |value, draft| {
            draft.serve.admin_listen = match value.text.as_str() {
                "none" => Vec::new(),
                text => parse_addresses(text)?,
            };
            Ok(())
        },
    },
    Setting {
        key: "token",
        variable: Some("MODEL_CACHE_TOKEN"),
        flag: None,
        value_name: TOKEN,
        default: "none",
        description: "The bearer token that clients of `serve` send. It guards every route below `/cache`. A client of \
                  the Hugging Face routes that sends it acts with the daemon's own Hub token.",
        accepts: "at least 16 characters without spaces",
        set: |value, draft| {
            // Register the token first, so that no message quotes it, not even one about an unusable token.
            redact::register(&value.text);
            if value.text.len() < TOKEN_BYTES_MIN || !value.text.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(
                    Error::invalid("not a usable token").hint("for instance the output of: openssl rand -hex 32")
                );
            }
            draft.serve.token = Some(Secret::new(&value.text));
            Ok(())
        },
    },
    Setting {
        key: "insecure",
        variable: Some("MODEL_CACHE_INSECURE"),
        flag: Some("insecure"),
        value_name: SWITCH,
        default: "`0`",
        description: "Let `serve` listen without a token on addresses that other machines can reach. Everyone who can \
                  connect may then read and evict every artifact.",
        accepts: SWITCH_ACCEPTS,
        set: |value, draft| {
            draft.serve.insecure = parse_switch(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "allow_any_origin",
        variable: Some("MODEL_CACHE_ALLOW_ANY_ORIGIN"),
        flag: Some("allow-any-origin"),
        value_name: SWITCH,
        default: "`0`",
        description: "Let clients of `serve` request references with any server, bucket or registry. Without it, they \
                  can only request `name@version`, and repositories of the configured Hub and MLflow servers.",
        accepts: SWITCH_ACCEPTS,
        set: |value, draft| {
            draft.serve.allow_any_origin = parse_switch(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "auth_stale",
        variable: Some("MODEL_CACHE_AUTH_STALE"),
        flag: None,
        value_name: "DURATION",
        default: "`1h`",
        description: "While the Hub cannot be reached, `serve` lets a client read private and gated repositories for \
                  this long after the Hub last allowed it.",
        accepts: DURATION_ACCEPTS,
        set: |value, draft| {
            draft.serve.auth_stale = parse_duration(&value.text)?;
            Ok(())
        },
    },
    Setting {
        key: "tls_certificate",
        variable: Some("MODEL_CACHE_TLS_CERTIFICATE"),
        flag: Some("tls-certificate"),
        value_name: "FILE",
        default: "none",
        description: "The certificate chain of `serve` in PEM format, for https. It is read again when the file changes.",
        accepts: "a file, together with `tls_key`",
        set: |value, draft| {
            draft.serve.tls_certificate = Some(draft.expand_home(&value.text));
            Ok(())
        },
    },
    Setting {
        key: "tls_key",
        variable: Some("MODEL_CACHE_TLS_KEY"),
        flag: Some("tls-key"),
        value_name: "FILE",
        default: "none",
        description: "The private key of the certificate in PEM format. It is read again when the file changes.",
        accepts: "a file, together with `tls_certificate`",
        set: |value, draft| {
            draft.serve.tls_key = Some(draft.expand_home(&value.text));
            Ok(())
        },
    },
    Setting {
        key: "prewarm",
        variable: Some("MODEL_CACHE_PREWARM"),
        flag: None,
        value_name: "REFS",
        default: "none",
        description: "The artifacts that `serve` gets when it starts, and keeps leased. `/readyz` answers 503 until all \
                  of them are on disk.",
        accepts: "references, separated by spaces or commas",
        set: |value, draft| {
            let words = value.text.split([' ', ',', '\t', '\n']).filter(|word| !word.is_empty());
            draft.serve.prewarm = words.map(str::to_owned).collect();
            Ok(())
        },
    },
    Setting {
        key: "metrics_file",
        variable: Some("MODEL_CACHE_METRICS_FILE"),
        flag: None,
        value_name: "FILE",
        default: "none",
        description: "A file that each command replaces when it ends, with metrics of the command and of the cache \
                  directory, in the Prometheus text format. For the textfile collector of node-exporter.",
        accepts: "a file in an existing, writable folder, or none",
        set: |value, draft| {
            draft.metrics_file = (value.text != "none").then(|| draft.expand_home(&value.text));
            Ok(())
        },
    },
    Setting {
        key: "log",
        variable: Some("MODEL_CACHE_LOG"),
        flag: None,
        value_name: "FILTER",
        default: "`info`; `warn` on a terminal",
        description: "The log level, or a filter in the form of `RUST_LOG`. A bare level applies to modelcache only; \
                  libraries are logged if the filter names them.",
        accepts: "off, error, warn, info, debug, trace, or for example info,modelcache=debug or \
                  debug,hyper_util=trace",
        set: |value, draft| {
            draft.log = LogSettings {
                filter: value.text.clone(),
                source: Some(value.source.clone()),
                format: draft.log.format,
            };
            Ok(())
        },
    },
    Setting {
        key: "log_format",
        variable: Some("MODEL_CACHE_LOG_FORMAT"),
        flag: None,
        value_name: "text|json",
        default: "`text`",
        description: "The format of log lines.",
        accepts: "text or json",
        set: |value, draft| {
            draft.log.format = match value.text.as_str() {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                _ => return Err(Error::invalid("unknown value")),
            };
            Ok(())
        },
    },
];

/// The variables of other programs that modelcache reads, and the effect of each.
const FOREIGN_VARIABLES: &[(&str, &str)] = &[
    ("HF_ENDPOINT", "URL of the Hugging Face Hub, for `hf://` references. Default `https://huggingface.co`."),
    ("HF_TOKEN", "The token for the Hub. It is sent to no other host."),
    ("HF_TOKEN_PATH", "The file with the Hub's token, if `HF_TOKEN` is not set. Default `$HF_HOME/token`."),
    (
        "HF_HUB_OFFLINE",
        "With `1`, `on`, `yes` or `true`: the same as `MODEL_CACHE_OFFLINE=1`, unless that variable is set.",
    ),
    (
        "HF_HOME",
        "The folder of the Hub's token file. Default `$XDG_CACHE_HOME/huggingface`, otherwise `~/.cache/huggingface`.",
    ),
    ("MLFLOW_TRACKING_TOKEN", "The token for the MLflow servers above. It is sent to no other server."),
    (
        "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD",
        "User and password for the MLflow servers above. They are sent to no other server, and override the token.",
    ),
    ("MLFLOW_S3_ENDPOINT_URL", "The S3 endpoint of buckets with MLflow models, if it differs from that of the remote."),
    ("DOCKER_CONFIG", "The folder of the `config.json` with credentials for OCI registries. Default `~/.docker`."),
    (
        "AWS_*",
        "Credentials, profile, region and endpoint for an S3 remote and for `s3://` references, as in the AWS CLI.",
    ),
    (
        "XDG_CACHE_HOME, XDG_CONFIG_HOME",
        "The base folders of the default cache directory and of the user's configuration file.",
    ),
    ("NETRC", "The netrc file, with users and passwords for web servers. Default `~/.netrc`."),
    ("SSL_CERT_FILE, SSL_CERT_DIR", "The trusted root certificates, instead of the system's."),
    (
        "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY",
        "The proxy for requests, and the hosts that are reached without it.",
    ),
    ("NO_COLOR", "With any value: output on a terminal has no colours."),
    (
        "OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_*",
        "The collector that gets traces by OTLP over HTTP, and the standard variables of OpenTelemetry for it.",
    ),
];

/// The complete, validated settings of a front end.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The configuration of the library.
    pub config: Config,
    /// The metrics file that each command writes, if one is configured.
    pub metrics_file: Option<PathBuf>,
    /// The settings of the front end's log.
    pub log: LogSettings,
    /// The settings of the daemon.
    pub serve: ServeSettings,
    /// Warnings, which the front end logs once its log is running.
    pub warnings: Vec<String>,
}

/// The filter and format of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// A filter in the form of `RUST_LOG`. The front end validates it, because the library has no parser for filters.
    pub filter: String,
    /// The source of the filter; `None` for the default.
    pub source: Option<String>,
    /// The format of a line.
    pub format: LogFormat,
}

impl LogSettings {
    /// Returns the error for a filter that cannot be parsed.
    pub fn bad_filter(&self, why: impl fmt::Display) -> Error {
        let source = self.source.as_deref().unwrap_or("the default");
        Error::invalid(format!("log = {:?} from {source}: {why}", redact::setting(&self.filter))).hint(format!(
            "accepted: {}",
            SETTINGS.iter().find(|setting| setting.key == "log").map_or("a level", |setting| setting.accepts)
        ))
    }
}

/// The settings of the daemon, which only the command `serve` uses.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// The addresses to accept connections on.
    pub listen: Vec<SocketAddr>,
    /// The addresses on which only probes and metrics are served.
    pub admin_listen: Vec<SocketAddr>,
    /// The token that clients have to send; `None` if everyone may read and evict.
    pub token: Option<Secret>,
    /// Listen beyond loopback without a token.
    pub insecure: bool,
    /// Clients may request references with any server.
    pub allow_any_origin: bool,
    /// How long a permission of the Hub is used while the Hub cannot be reached.
    pub auth_stale: Duration,
    /// The certificate chain, in PEM format.
    pub tls_certificate: Option<PathBuf>,
    /// The private key, in PEM format.
    pub tls_key: Option<PathBuf>,
    /// The references to get at the start.
    pub prewarm: Vec<String>,
}

impl Default for ServeSettings {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, SERVE_PORT))],
            admin_listen: Vec::new(),
            token: None,
            insecure: false,
            allow_any_origin: false,
            auth_stale: Duration::from_secs(3600),
            tls_certificate: None,
            tls_key: None,
            prewarm: Vec::new(),
        }
    }
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The configuration files that a front end should read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigFiles {
    /// The user named this file: it must exist, and no other file is read.
    Named(PathBuf),
    /// The default files, as far as they exist; an earlier one overrides a later one.
    Usual(Vec<PathBuf>),
}

impl ConfigFiles {
    /// Returns the files to read. `flag` is the value of `--config`.
    pub fn choose(flag: Option<&Path>, environment: &Environment) -> Self {
        if let Some(path) = flag {
            return Self::Named(path.to_owned());
        }
        if let Some(path) = environment.get(FILE_VARIABLE) {
            return Self::Named(expand_home(path, environment));
        }
        let user = base_folder("XDG_CONFIG_HOME", ".config", environment);
        let user = user.map(|folder| folder.join("modelcache").join(FILE_NAME));
        Self::Usual(user.into_iter().chain([PathBuf::from(SYSTEM_FILE)]).collect())
    }
}

/// A value passed by the caller, for example as a flag or as an argument of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argument {
    /// The value, in the form of an environment variable.
    pub text: String,
    /// The source of the value, for messages.
    pub source: String,
}

/// The value of a setting, with its source.
#[derive(Debug)]
struct SettingValue {
    text: String,
    /// The precedence: 0 for an argument, 1 for a variable, 2 and more for files. The smallest one wins.
    rank: usize,
    /// The flag, the variable, or the file and key.
    source: String,
}

/// Settings while they are being gathered.
struct Draft {
    environment: Environment,
    /// The configuration so far, without `dir`, `remote` and `offline`, which are set when the draft is finished.
    config: Config,
    /// The cache directory; `None` until a setting determines it.
    dir: Option<PathBuf>,
    /// Rank, source and URL of the remote with the highest precedence so far. The URL is `None` if the value was
    /// `none`.
    remote: Option<(usize, String, Option<String>)>,
    /// `None` until a setting determines it.
    offline: Option<bool>,
    /// See [`Settings::metrics_file`].
    metrics_file: Option<PathBuf>,
    /// See [`Settings::log`].
    log: LogSettings,
    /// See [`Settings::serve`].
    serve: ServeSettings,
}

impl Settings {
    /// Gathers the settings. A flag overrides a variable, a variable overrides the files, an earlier file overrides a
    /// later one, and all of them override the default.
    ///
    /// `flags` is keyed by the flag names in [`SETTINGS`]. `files` has paths and texts. `read_secret` returns the text
    /// of a file with secrets (the Hub's token, the netrc), or `None` if the file does not exist. A file that cannot be
    /// read results in a warning, because most calls need no secret.
    pub fn gather(
        flags: &BTreeMap<&'static str, String>,
        environment: &Environment,
        files: &[(PathBuf, String)],
        read_secret: impl Fn(&Path) -> std::io::Result<Option<String>>,
    ) -> Result<Self> {
        let of = |setting: &Setting| {
            let (flag, text) = flags.get_key_value(setting.flag?)?;
            Some((setting.key, Argument { text: text.clone(), source: format!("--{flag}") }))
        };
        Self::gather_arguments(&SETTINGS.iter().filter_map(of).collect(), environment, files, read_secret)
    }

    /// Gathers the settings like [`Settings::gather`], with arguments keyed by the setting's key. This includes
    /// settings without a flag.
    pub fn gather_arguments(
        arguments: &BTreeMap<&str, Argument>,
        environment: &Environment,
        files: &[(PathBuf, String)],
        read_secret: impl Fn(&Path) -> std::io::Result<Option<String>>,
    ) -> Result<Self> {
        // Register the secrets first, so that no error quotes one.
        redact::register_environment(&environment.0);
        let files = files.iter().map(|(path, text)| File::parse(path, text)).collect::<Result<Vec<_>>>()?;
        let mut draft = Draft::new(environment.clone());
        for setting in SETTINGS {
            let Some(value) = setting.find(arguments, environment, &files) else { continue };
            if is_quoted(&value.text) {
                let error = Error::invalid("the quotes are part of the value");
                return Err(setting.refuse(&value, &error.hint(QUOTES_HINT)));
            }
            (setting.set)(&value, &mut draft).map_err(|error| setting.refuse(&value, &error))?;
        }
        let mut warnings = unknown_variables(environment);
        warnings.extend(quoted_variables(environment));
        if draft.dir.is_none() && base_folder("XDG_CACHE_HOME", ".cache", environment).is_none() {
            let dir = default_dir(environment);
            warnings.push(format!(
                "HOME is not set, so the directory is {}, which may be emptied at any time; set {DIR}",
                dir.display()
            ));
        }
        let hub = hub_config(environment, &read_secret, &mut warnings)?;
        let credentials = credentials::gather(&files, environment, &read_secret, &mut warnings)?;
        let mut options = BTreeMap::new();
        for file in files {
            for (name, value) in file.options {
                options.entry(name).or_insert(value);
            }
        }
        registries::read_credentials(environment, &read_secret, &mut draft);
        let (metrics_file, serve) = (draft.metrics_file.take(), std::mem::take(&mut draft.serve));
        let (config, log) = draft.finish(options, hub, credentials);
        Ok(Self { config, metrics_file, log, serve, warnings })
    }
}

impl Setting {
    /// Returns the setting with this name; `None` for an option of a call.
    pub fn named(option: OptionName) -> Option<&'static Self> {
        SETTINGS.iter().find(|setting| option.scope == Scope::Setting && setting.key == option.name)
    }

    /// Returns the value with the highest precedence, or `None` if the setting is not set.
    fn find(
        &self,
        arguments: &BTreeMap<&str, Argument>,
        environment: &Environment,
        files: &[File],
    ) -> Option<SettingValue> {
        let present = |text: &&str| !text.trim().is_empty();
        let value = |text: &str, rank, source| SettingValue { text: text.trim().to_owned(), rank, source };
        let argument = arguments.get(self.key).filter(|argument| present(&argument.text.as_str()));
        let argument = argument.map(|argument| value(&argument.text, 0, argument.source.clone()));
        let variable = || {
            let variable = self.variable?;
            environment.get(variable).filter(present).map(|text| value(text, 1, variable.to_owned()))
        };
        let file = || {
            files.iter().enumerate().find_map(|(at, file)| {
                let text = file.values.get(self.key).map(String::as_str).filter(present)?;
                Some(value(text, 2 + at, format!("{}: {}", file.path.display(), self.key)))
            })
        };
        argument.or_else(variable).or_else(file)
    }

    /// Returns the error for an invalid value, with setting, source and accepted values.
    fn refuse(&self, value: &SettingValue, error: &Error) -> Error {
        let hint = error.hint_text().map_or_else(|| format!("accepted: {}", self.accepts), str::to_owned);
        // A token that is too short is a secret nevertheless.
        let text = if self.value_name == TOKEN { "…".into() } else { redact::setting(&value.text) };
        Error::invalid(format!("{} = {text:?} from {}: {}", self.key, value.source, error.message())).hint(hint)
    }
}

impl Draft {
    fn new(environment: Environment) -> Self {
        Self {
            environment,
            config: Config::new(PathBuf::new()),
            dir: None,
            remote: None,
            offline: None,
            metrics_file: None,
            log: LogSettings { filter: "info".into(), source: None, format: LogFormat::default() },
            serve: ServeSettings::default(),
        }
    }

    fn expand_home(&self, text: &str) -> PathBuf {
        expand_home(text, &self.environment)
    }

    /// Sets the remote from one of its two settings, `remote` and `s3_bucket`. Fails if the other setting has the same
    /// rank and another value.
    fn set_remote(&mut self, value: &SettingValue, url: Option<String>) -> Result<()> {
        match &self.remote {
            Some((rank, source, other)) if *rank == value.rank && *other != url => {
                let other = other.as_deref().unwrap_or("none");
                Err(Error::invalid(format!("conflicts with {source}, which is {other:?}"))
                    .hint("set only one of the two"))
            }
            Some((rank, ..)) if *rank <= value.rank => Ok(()),
            _ => {
                self.remote = Some((value.rank, value.source.clone(), url));
                Ok(())
            }
        }
    }

    /// Returns the configuration and the log settings, with the defaults filled in.
    fn finish(
        self,
        options: BTreeMap<String, String>,
        hub: HubConfig,
        credentials: Credentials,
    ) -> (Config, LogSettings) {
        let remote = self.remote.and_then(|(_, _, url)| url);
        let environment = self.environment;
        let config = Config {
            dir: self.dir.unwrap_or_else(|| default_dir(&environment)),
            offline: self.offline.unwrap_or_else(|| hub_is_offline(&environment)),
            buckets: BucketConfig { options: options.clone(), environment: environment.clone() },
            remote: remote.map(|url| RemoteConfig { url, options, environment }),
            hub,
            credentials,
            ..self.config
        };
        (config, self.log)
    }
}

/// Parses addresses to listen on, separated by commas.
fn parse_addresses(text: &str) -> Result<Vec<SocketAddr>> {
    let address = |word: &str| match (word, word.parse()) {
        (_, Ok(address)) => Ok(address),
        // `:8917` means port 8917 on all IPv4 interfaces, as in the options of other servers.
        (word, Err(_)) if word.starts_with(':') => format!("0.0.0.0{word}").parse(),
        (word, Err(_)) => word.replacen("localhost:", "127.0.0.1:", 1).parse(),
    };
    let parsed: Result<Vec<_>, _> = text.split(',').map(str::trim).map(address).collect();
    parsed.map_err(|_| Error::invalid("not an address").hint("write address and port, for instance 0.0.0.0:8917"))
}

/// Checks the URL of a remote. Returns it without trailing slashes.
fn checked_remote(text: &str) -> Result<String> {
    let url = text.trim_end_matches('/');
    if let Some(path) = url.strip_prefix("s3://") {
        if !is_bucket_name(path.split('/').next().unwrap_or_default()) {
            return Err(not_a_bucket("not the URL of an object store", path));
        }
        return Ok(url.to_owned());
    }
    match text.strip_prefix("file://") {
        Some(path) if path.starts_with('/') && !url.ends_with(':') => Ok(url.to_owned()),
        Some(_) => Err(Error::invalid("not an absolute path").hint("write file:///folder")),
        None if text.starts_with('/') => {
            let address = url::Url::from_file_path(url).map_or_else(|()| "file:///folder".to_owned(), String::from);
            Err(Error::invalid("a path, not a URL").hint(format!("write {}", printable::line(&address))))
        }
        None => Err(Error::invalid("not the URL of an object store")),
    }
}

/// Reads the settings of the Hugging Face Hub from the environment and the token file.
fn hub_config(
    environment: &Environment,
    read_secret: impl Fn(&Path) -> std::io::Result<Option<String>>,
    warnings: &mut Vec<String>,
) -> Result<HubConfig> {
    let mut hub = HubConfig::default();
    if let Some(endpoint) = environment.get("HF_ENDPOINT") {
        let parsed = url::Url::parse(endpoint).ok();
        if !parsed.is_some_and(|url| matches!(url.scheme(), "https" | "http") && url.host().is_some()) {
            return Err(Error::invalid(format!(
                "HF_ENDPOINT = {:?} is not an http or https URL",
                redact::setting(endpoint)
            ))
            .hint("for example https://huggingface.co"));
        }
        hub.endpoint = endpoint.trim_end_matches('/').to_owned();
    }
    let clean = |text: &str| Some(text.trim()).filter(|text| !text.is_empty()).map(Secret::new);
    hub.token = match environment.get("HF_TOKEN").and_then(clean) {
        Some(token) => Some(token),
        None => match token_file(environment) {
            Some(path) => read_secret(&path).unwrap_or_else(|error| {
                warnings.push(format!("the Hub's token file {} cannot be read: {error}", path.display()));
                None
            }),
            None => None,
        }
        .as_deref()
        .and_then(clean),
    };
    Ok(hub)
}

/// Returns the variables that turn on offline mode in `environment`.
pub(crate) fn offline_variables(environment: &Environment) -> Vec<&'static str> {
    let own = environment.get("MODEL_CACHE_OFFLINE").is_some_and(|text| parse_switch(text).is_ok_and(|on| on));
    let variables = [("MODEL_CACHE_OFFLINE", own), ("HF_HUB_OFFLINE", hub_is_offline(environment))];
    variables.into_iter().filter_map(|(name, is_on)| is_on.then_some(name)).collect()
}

/// Returns true if `HF_HUB_OFFLINE` is on. Accepts the same values as the Hub's own tools.
fn hub_is_offline(environment: &Environment) -> bool {
    let words = ["1", "on", "yes", "true"];
    environment.get("HF_HUB_OFFLINE").is_some_and(|text| words.iter().any(|word| text.eq_ignore_ascii_case(word)))
}

/// Returns the path of the token file that the Hub's own tools use.
fn token_file(environment: &Environment) -> Option<PathBuf> {
    if let Some(path) = environment.get("HF_TOKEN_PATH") {
        return Some(expand_home(path, environment));
    }
    let home = match environment.get("HF_HOME") {
        Some(home) => expand_home(home, environment),
        None => base_folder("XDG_CACHE_HOME", ".cache", environment)?.join("huggingface"),
    };
    Some(home.join("token"))
}

/// Returns the cache directory if none is configured.
fn default_dir(environment: &Environment) -> PathBuf {
    base_folder("XDG_CACHE_HOME", ".cache", environment)
        .unwrap_or_else(|| PathBuf::from(environment.get("TMPDIR").unwrap_or("/tmp")))
        .join("modelcache")
}

/// Returns the folder in `variable`, or `below` in the user's home. Ignores a relative path, as the XDG specification
/// requires.
fn base_folder(variable: &str, below: &str, environment: &Environment) -> Option<PathBuf> {
    let absolute = |text: &&str| Path::new(text).is_absolute();
    match environment.get(variable).filter(absolute) {
        Some(folder) => Some(PathBuf::from(folder)),
        None => Some(Path::new(environment.get("HOME").filter(absolute)?).join(below)),
    }
}

/// Expands `~/` to the user's home, because no shell expands it in variables and files.
fn expand_home(text: &str, environment: &Environment) -> PathBuf {
    match (text.strip_prefix("~/"), environment.get("HOME")) {
        (Some(rest), Some(home)) => Path::new(home).join(rest),
        _ => PathBuf::from(text),
    }
}

/// Returns a warning for each unknown `MODEL_CACHE_*` variable. The variables that Kubernetes sets in each pod for a
/// service named `model-cache` are ignored.
fn unknown_variables(environment: &Environment) -> Vec<String> {
    let known = || SETTINGS.iter().filter_map(|setting| setting.variable).chain([FILE_VARIABLE]);
    let is_service_link = |name: &str| {
        let name = name.trim_start_matches("MODEL_CACHE_");
        name == "PORT" || name.starts_with("PORT_") || name.contains("SERVICE_HOST") || name.contains("SERVICE_PORT")
    };
    // `exec` sets these variables for its command, which may be modelcache again.
    let set_by_exec = |name: &str| name == "MODEL_CACHE_PATH" || name.starts_with("MODEL_CACHE_PATH_");
    let ours = environment.0.keys().filter(|name| name.starts_with("MODEL_CACHE_") && !set_by_exec(name));
    let mut unknown: Vec<_> =
        ours.filter(|name| !is_service_link(name) && !known().any(|known| known == name.as_str())).collect();
    unknown.sort();
    let warn = |name: &String| match nearest(name, known()) {
        Some(near) => format!("unknown environment variable {name} is ignored; did you mean {near}?"),
        None => format!("unknown environment variable {name} is ignored"),
    };
    unknown.into_iter().map(warn).collect()
}

/// Hint for a value in quotes.
const QUOTES_HINT: &str = "leave the quotes out: no shell removes them in env files of Docker and in manifests";

/// Returns true if `text` is in quotes.
fn is_quoted(text: &str) -> bool {
    ['"', '\''].iter().any(|quote| text.len() > 1 && text.starts_with(*quote) && text.ends_with(*quote))
}

/// Returns a warning for each variable of another program whose value is in quotes.
fn quoted_variables(environment: &Environment) -> Vec<String> {
    let is_read = |name: &str| {
        let matches = |known: &str| known.strip_suffix('*').map_or(known == name, |prefix| name.starts_with(prefix));
        FOREIGN_VARIABLES.iter().any(|(names, _)| names.split(", ").any(matches))
    };
    let quoted = environment.0.iter().filter(|(name, text)| is_read(name) && is_quoted(text.trim()));
    let mut names: Vec<_> = quoted.map(|(name, _)| name).collect();
    names.sort();
    names.iter().map(|name| format!("the quotes in {name} are part of its value; {QUOTES_HINT}")).collect()
}

/// Returns the documentation of all settings as Markdown tables.
pub fn markdown() -> String {
    let code =
        |text: Option<String>| text.map_or_else(|| "—".to_owned(), |text| format!("`{}`", text.replace('|', "\\|")));
    let mut text = String::from("| in the file | variable | flag | default | meaning |\n|---|---|---|---|---|\n");
    for setting in SETTINGS {
        text.push_str(&format!(
            "| {} | {} | {} | {} | {} Accepted: {}. |\n",
            code(Some(setting.key.to_owned())),
            code(setting.variable.map(str::to_owned)),
            code(setting.flag.map(|flag| match setting.value_name {
                // A switch takes its value only after `=`.
                SWITCH => format!("--{flag}[=0|1]"),
                value => format!("--{flag} {value}"),
            })),
            setting.default,
            setting.description,
            setting.accepts,
        ));
    }
    text.push_str("\n## Variables of other programs\n\n| variable | effect in modelcache |\n|---|---|\n");
    for (variables, description) in FOREIGN_VARIABLES {
        let variables: Vec<_> = variables.split(", ").map(|variable| format!("`{variable}`")).collect();
        text.push_str(&format!("| {} | {description} |\n", variables.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::collections::HashMap;

    /// The inputs of [`Settings::gather`].
    #[derive(Default)]
    struct Inputs {
        flags: BTreeMap<&'static str, String>,
        environment: Environment,
        files: Vec<(PathBuf, String)>,
    }

    impl Inputs {
        fn flag(mut self, flag: &'static str, value: &str) -> Self {
            self.flags.insert(flag, value.into());
            self
        }

        fn variable(mut self, variable: &str, value: &str) -> Self {
            self.environment.0.insert(variable.into(), value.into());
            self
        }

        fn file(mut self, path: &str, text: &str) -> Self {
            self.files.push((path.into(), text.into()));
            self
        }

        fn gather(&self) -> Result<Settings> {
            Settings::gather(&self.flags, &self.environment, &self.files, |_| Ok(None))
        }

        fn config(&self) -> Config {
            self.gather().expect("settings").config
        }

        fn refused(&self) -> (String, String) {
            let error = self.gather().expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            (error.message().to_owned(), error.hint_text().expect("a hint").to_owned())
        }
    }

    fn inputs() -> Inputs {
        Inputs::default()
    }

    #[test]
    fn arguments_are_keyed_by_setting_and_messages_use_their_source() {
        let argument = |text: &str| Argument { text: text.into(), source: "the argument ttl".into() };
        let inputs = Inputs::default().variable("MODEL_CACHE_REF_TTL", "7s");
        let gather = |text: &str| {
            let arguments = BTreeMap::from([("ref_ttl", argument(text))]);
            Settings::gather_arguments(&arguments, &inputs.environment, &[], |_| Ok(None))
        };
        assert_eq!(gather("5s").expect("settings").config.ref_ttl, Duration::from_secs(5));
        assert_eq!(
            gather(" ").expect("settings").config.ref_ttl,
            Duration::from_secs(7),
            "an empty value counts as unset"
        );
        let error = gather("soon").expect_err("refused");
        assert_eq!(error.message(), "ref_ttl = \"soon\" from the argument ttl: not a duration");
    }

    #[test]
    fn defaults_are_those_of_the_table() {
        let config = inputs().variable("HOME", "/home/a").config();
        assert_eq!(config.dir, Path::new("/home/a/.cache/modelcache"));
        assert_eq!((config.max_bytes, config.min_free_bytes), (ByteBound::Percent(80), ByteBound::Percent(10)));
        assert!(config.remote.is_none() && config.origins.is_empty() && config.hub.token.is_none());
        assert_eq!(config.ref_ttl, Duration::from_secs(60));
        assert_eq!(config.retry.deadline, Duration::from_secs(60));
        assert_eq!(config.retry.read_timeout, Duration::from_secs(30));
        assert_eq!(config.hub.endpoint, "https://huggingface.co");
        let log = inputs().gather().expect("settings").log;
        assert_eq!(log, LogSettings { filter: "info".into(), source: None, format: LogFormat::Text });
    }

    /// A default is defined twice, as text and as value: the text must parse to the value.
    #[test]
    fn default_texts_parse_to_the_defaults() {
        let none = inputs();
        for setting in SETTINGS {
            let text = setting.default.trim_matches('`');
            if text.contains('`') || text == "none" {
                continue;
            }
            let set = inputs().file("/f", &format!("{} = {text:?}", setting.key));
            let describe = |inputs: &Inputs| {
                let mut settings = inputs.gather().expect("settings");
                settings.log.source = None;
                format!("{settings:?}")
            };
            assert_eq!(describe(&set), describe(&none), "{}", setting.key);
        }
    }

    #[test]
    fn the_default_directory_depends_on_xdg_home_and_tmpdir() {
        let dir = |inputs: Inputs| inputs.config().dir;
        let home = || inputs().variable("HOME", "/home/a");
        assert_eq!(dir(home().variable("XDG_CACHE_HOME", "/x")), Path::new("/x/modelcache"));
        assert_eq!(dir(home().variable("XDG_CACHE_HOME", "x")), Path::new("/home/a/.cache/modelcache"));
        assert_eq!(dir(inputs().variable("TMPDIR", "/t")), Path::new("/t/modelcache"));
        assert_eq!(dir(inputs()), Path::new("/tmp/modelcache"));
        assert_eq!(dir(home().variable("MODEL_CACHE_DIR", "~/m")), Path::new("/home/a/m"));
    }

    #[test]
    fn flag_beats_variable_beats_user_file_beats_system_file() {
        let full = inputs()
            .flag("max-bytes", "1")
            .variable("MODEL_CACHE_MAX_BYTES", "2")
            .file("/user", "max_bytes = 3")
            .file("/etc", "max_bytes = 4");
        let bound = |inputs: &Inputs| inputs.config().max_bytes;
        assert_eq!(bound(&full), ByteBound::Bytes(1));
        let full = Inputs { flags: BTreeMap::new(), ..full };
        assert_eq!(bound(&full), ByteBound::Bytes(2));
        let full = full.variable("MODEL_CACHE_MAX_BYTES", "");
        assert_eq!(bound(&full), ByteBound::Bytes(3), "an empty variable is not set");
        assert_eq!(bound(&Inputs { files: full.files[1..].to_vec(), ..full }), ByteBound::Bytes(4));
    }

    #[test]
    fn a_bad_value_is_refused_with_setting_source_and_remedy() {
        let sources = [
            (inputs().flag("max-bytes", "much"), "--max-bytes"),
            (inputs().variable("MODEL_CACHE_MAX_BYTES", "much"), "MODEL_CACHE_MAX_BYTES"),
            (inputs().file("/etc/x.toml", "max_bytes = 'much'"), "/etc/x.toml: max_bytes"),
        ];
        for (inputs, source) in sources {
            let (message, hint) = inputs.refused();
            assert_eq!(message, format!("max_bytes = \"much\" from {source}: not a size"));
            assert_eq!(hint, format!("accepted: {SIZE_ACCEPTS}"));
        }
        for (key, value) in [
            ("max_bytes", "0"),
            ("min_free_bytes", "101%"),
            ("remote", "gs://b"),
            ("remote", "s3://"),
            ("remote", "file://rel"),
            ("remote", "file://"),
            ("s3_bucket", "s3://b"),
            ("require_checksum", "maybe"),
            ("on_remote_down", "ignore"),
            ("origin", "hf://org/model"),
            ("ref_ttl", "soon"),
            ("offline", "maybe"),
            ("start_jitter", "a bit"),
            ("read_timeout", "0s"),
            ("log_format", "xml"),
        ] {
            let (message, _) = inputs().file("/f", &format!("{key} = {value:?}")).refused();
            assert!(message.starts_with(&format!("{key} = {value:?} from /f: {key}: ")), "{message}");
        }
        let (message, _) = inputs().variable("HF_ENDPOINT", "huggingface.co").refused();
        assert!(message.contains("HF_ENDPOINT"), "{message}");
        for (path, address) in [("/a/b/", "file:///a/b"), ("/a/b#c", "file:///a/b%23c"), ("/", "file:///folder")] {
            let (message, hint) = inputs().variable("MODEL_CACHE_REMOTE", path).refused();
            assert!(message.contains("a path, not a URL") && hint.contains(&format!("write {address}")), "{hint}");
        }
    }

    #[test]
    fn an_unknown_key_names_the_nearest_known_one() {
        let hint = |text: &str| inputs().file("/f", text).refused().1;
        assert_eq!(hint("max-bytes = 1"), "did you mean \"max_bytes\"?");
        assert_eq!(hint("orgin = ''"), "did you mean \"origin\"?");
        assert_eq!(hint("[remote]\nurll = 's3://b'"), "did you mean \"remote.url\"?");
        assert!(hint("colour = 'red'").starts_with("known: dir, "));
        let (message, _) = inputs().file("/f", "\nmax_bytes = \n").refused();
        assert!(message.starts_with("/f: line 2: "), "{message}");
        let (message, hint) = inputs().file("/f", "max_bytes = 1.5").refused();
        assert_eq!(message, "/f: max_bytes is a TOML float");
        assert!(hint.contains("14GB"));
    }

    #[test]
    fn remote_and_s3_bucket_must_not_contradict() {
        let url = |inputs: Inputs| inputs.config().remote.map(|remote| remote.url);
        let both = |a, b| inputs().variable("MODEL_CACHE_REMOTE", a).variable("MODEL_CACHE_S3_BUCKET", b);
        assert_eq!(url(inputs().variable("MODEL_CACHE_S3_BUCKET", "b")).as_deref(), Some("s3://b"));
        assert_eq!(url(both("s3://b/", "b")).as_deref(), Some("s3://b"));
        let (message, hint) = both("s3://b/p", "b").refused();
        assert!(message.contains("MODEL_CACHE_S3_BUCKET") && message.contains("MODEL_CACHE_REMOTE"), "{message}");
        assert_eq!(hint, "set only one of the two");
        assert_eq!(
            url(both("s3://b", "b").flag("remote", "file:///x")).as_deref(),
            Some("file:///x"),
            "a flag overrides"
        );
        assert_eq!(url(both("s3://b", "b").flag("remote", "none")), None);
        assert_eq!(
            url(inputs().variable("MODEL_CACHE_S3_BUCKET", "b").file("/f", "remote = 's3://c'")).as_deref(),
            Some("s3://b")
        );
    }

    #[test]
    fn store_options_come_from_the_files() {
        let inputs = inputs()
            .file("/user", "[remote]\nurl = 's3://b'\n[remote.options]\npath_style = true\nretries = 3")
            .file("/etc", "[remote.options]\nregion = 'eu-west-1'\npath_style = false");
        let remote = inputs.config().remote.expect("remote");
        let options: Vec<_> = remote.options.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(options, [("path_style", "true"), ("region", "eu-west-1"), ("retries", "3")]);
        let (message, _) = self::inputs().file("/f", "[remote.options]\nx = [1]").refused();
        assert_eq!(message, "/f: remote.options.x is a TOML array");
        assert!(self::inputs().file("/f", "[remote]\noptions = 1").gather().is_err());
    }

    #[test]
    fn origins_are_a_comma_list_or_an_array() {
        let two = "hf://{name}@{version}, file:///m/{name}/{version}";
        assert_eq!(inputs().variable("MODEL_CACHE_ORIGIN", two).config().origins.len(), 2);
        let array = "origin = ['hf://{name}@{version}', 'file:///m/{name}/{version}']";
        assert_eq!(inputs().file("/f", array).flag("origin", "none").config().origins.len(), 0);
        assert_eq!(inputs().file("/f", array).config().origins.len(), 2);
    }

    #[test]
    fn the_hub_is_configured_like_its_own_tools() {
        let token = |inputs: Inputs| {
            let read = |path: &Path| Ok(Some(format!("{}\n", path.display())));
            let settings = Settings::gather(&inputs.flags, &inputs.environment, &inputs.files, read).expect("settings");
            settings.config.hub.token.map(|token| token.expose().to_owned())
        };
        let home = || inputs().variable("HOME", "/home/a");
        assert_eq!(token(home()).as_deref(), Some("/home/a/.cache/huggingface/token"));
        assert_eq!(token(home().variable("XDG_CACHE_HOME", "/x")).as_deref(), Some("/x/huggingface/token"));
        assert_eq!(token(home().variable("HF_HOME", "/h")).as_deref(), Some("/h/token"));
        assert_eq!(
            token(home().variable("HF_HOME", "/h").variable("HF_TOKEN_PATH", "~/t")).as_deref(),
            Some("/home/a/t")
        );
        assert_eq!(token(home().variable("HF_TOKEN", " hf_x\n")).as_deref(), Some("hf_x"));
        assert_eq!(token(inputs()), None);
        assert_eq!(inputs().variable("HF_ENDPOINT", "http://hub:1//").config().hub.endpoint, "http://hub:1");
    }

    /// Returns the credential for `url`, and the warnings.
    fn choice(inputs: &Inputs, files: &[(&str, &str)], url: &str) -> (String, Vec<String>) {
        let read =
            |path: &Path| Ok(files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).into()));
        let settings = Settings::gather(&inputs.flags, &inputs.environment, &inputs.files, read).expect("settings");
        let choice = settings.config.credentials.choose(&url::Url::parse(url).expect(url)).expose();
        (choice, settings.warnings)
    }

    #[test]
    fn credentials_come_from_the_files_then_the_netrc() {
        let netrc = "machine r.example login ann password one";
        let home = || inputs().variable("HOME", "/h");
        let on_r = |inputs: Inputs| {
            choice(
                &inputs,
                &[("/h/.netrc", netrc), ("/t", "two\n"), ("/n", "default login d password three")],
                "https://r.example/x",
            )
        };
        let table = |keys: &str| {
            home().variable("TOKEN", "four").file("/f", &format!("[credentials.'https://r.example']\n{keys}"))
        };
        assert_eq!(on_r(inputs()).0, "none");
        assert_eq!(on_r(home()).0, "netrc ann:one");
        assert_eq!(on_r(home().variable("NETRC", "/n")).0, "netrc d:three");
        assert_eq!(on_r(table("bearer = 'x'")).0, "configured x");
        assert_eq!(on_r(table("bearer_file = '/t'")).0, "configured two");
        assert_eq!(on_r(table("bearer_env = 'TOKEN'")).0, "configured four");
        assert_eq!(on_r(table("username = 'u'\npassword_file = '/t'")).0, "configured u:two");
        let (fallback, warnings) = on_r(table("bearer_env = 'NOT_SET'"));
        assert_eq!(fallback, "netrc ann:one");
        assert!(warnings[0].contains("NOT_SET is not set"), "{warnings:?}");
        let (_, warnings) = choice(&home(), &[("/h/.netrc", "machine x password canary oops")], "https://r.example/x");
        assert!(warnings[0].contains("/h/.netrc") && !warnings[0].contains("canary"), "{warnings:?}");
        assert!(on_r(home().variable("NETRC", "/gone")).1[0].contains("/gone"));
    }

    #[test]
    fn a_table_of_credentials_that_cannot_be_used_is_refused_without_its_secret() {
        for (server, keys, hint_part) in [
            ("https://r", "bearr = 'canary'", "did you mean \"bearer\"?"),
            ("https://r", "bearer = ['canary']", "accepted: "),
            ("https://r", "bearer = 'canary'\nbearer_env = 'X'", "accepted: tables such as"),
            ("https://r", "username = 'u'", "accepted: tables such as"),
            ("https://r", "bearer = 'canary'\nusername = 'u'\npassword = 'canary'", "accepted: tables such as"),
            ("r", "bearer = 'canary'", "accepted: tables such as"),
            ("https://r/path", "bearer = 'canary'", "accepted: tables such as"),
        ] {
            let (message, hint) = inputs().file("/f", &format!("[credentials.{server:?}]\n{keys}")).refused();
            assert!(message.starts_with("/f: ") && hint.contains(hint_part), "{message} {hint}");
            assert!(!message.contains("canary") && !hint.contains("canary"), "{message} {hint}");
        }
        let (message, _) = inputs().variable("MODEL_CACHE_ORIGIN", "https://u:canary@r/{name}").refused();
        assert!(!message.contains("canary"), "{message}");
    }

    #[test]
    fn offline_is_a_switch_and_the_hubs_variable_applies_if_it_is_unset() {
        let offline = |inputs: Inputs| inputs.config().offline;
        for word in ["1", "true", "ON", "yes"] {
            assert!(offline(inputs().variable("MODEL_CACHE_OFFLINE", word)), "{word}");
            assert!(offline(inputs().variable("HF_HUB_OFFLINE", word)), "{word}");
        }
        assert!(!offline(inputs()) && !offline(inputs().variable("HF_HUB_OFFLINE", "0")));
        assert!(!offline(inputs().variable("HF_HUB_OFFLINE", "1").variable("MODEL_CACHE_OFFLINE", "0")));
        assert!(offline(inputs().file("/f", "offline = true")));
    }

    #[test]
    fn an_unreadable_token_file_is_a_warning() {
        let environment = Environment(HashMap::from([("HOME".into(), "/home/a".into())]));
        let denied = |_: &Path| Err(std::io::ErrorKind::PermissionDenied.into());
        let settings = Settings::gather(&BTreeMap::new(), &environment, &[], denied).expect("settings");
        assert!(settings.config.hub.token.is_none());
        assert!(settings.warnings[0].contains("/home/a/.cache/huggingface/token"), "{:?}", settings.warnings);
    }

    #[test]
    fn quotes_around_a_value_are_refused_and_in_variables_of_other_programs_warned_about() {
        for (name, value) in [("MODEL_CACHE_DIR", "\"/models\""), ("MODEL_CACHE_REMOTE", "'s3://bucket'")] {
            let error = inputs().variable(name, value).gather().expect_err("quoted");
            assert!(error.message().contains("the quotes are part of the value"), "{error}");
            assert_eq!(error.hint_text(), Some(QUOTES_HINT));
        }
        let inputs = inputs().variable("HOME", "/h").variable("HF_TOKEN", "\"hf_x\"").variable("AWS_REGION", "'eu'");
        let warnings = inputs.variable("MY_TOKEN", "\"x\"").gather().expect("settings").warnings;
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("AWS_REGION") && warnings[1].contains("HF_TOKEN"), "{warnings:?}");
        assert!(!warnings[1].contains("hf_x"), "{warnings:?}");
    }

    #[test]
    fn unknown_variables_are_warned_about_except_for_service_links() {
        let inputs = inputs()
            .variable("MODEL_CACHE_MAX_BYTE", "1")
            .variable("MODEL_CACHE_FROBNICATE", "x")
            .variable("MODEL_CACHE_CONFIG", "/f")
            .variable("MODEL_CACHE_PATH", "/by/exec")
            .variable("MODEL_CACHE_PATH_2", "/by/exec")
            .variable("MODEL_CACHE_PORT_80_TCP_ADDR", "10.0.0.1")
            .variable("MODEL_CACHE_SERVICE_HOST", "10.0.0.1");
        let warnings = inputs.variable("HOME", "/h").gather().expect("settings").warnings;
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].starts_with("unknown environment variable MODEL_CACHE_FROBNICATE"), "{warnings:?}");
        assert!(warnings[1].ends_with("did you mean MODEL_CACHE_MAX_BYTES?"), "{warnings:?}");
    }

    #[test]
    fn the_token_of_the_daemon_is_long_and_never_quoted() {
        for text in ["abc", "short-token", "sixteen characters"] {
            let (message, hint) = inputs().variable("MODEL_CACHE_TOKEN", text).refused();
            assert!(!message.contains(text) && hint.contains("openssl"), "{message}");
        }
        let token = inputs().variable("MODEL_CACHE_TOKEN", "0123456789abcdef").gather().expect("settings").serve.token;
        assert_eq!(token.expect("a token").expose(), "0123456789abcdef");
    }

    #[test]
    fn a_named_file_is_read_alone() {
        let environment = |rows: &[(&str, &str)]| {
            Environment(rows.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
        };
        let home = environment(&[("HOME", "/home/a")]);
        assert_eq!(
            ConfigFiles::choose(None, &home),
            ConfigFiles::Usual(vec!["/home/a/.config/modelcache/modelcache.toml".into(), SYSTEM_FILE.into()])
        );
        let named = environment(&[("HOME", "/home/a"), (FILE_VARIABLE, "~/c.toml")]);
        assert_eq!(ConfigFiles::choose(None, &named), ConfigFiles::Named("/home/a/c.toml".into()));
        assert_eq!(ConfigFiles::choose(Some(Path::new("x")), &named), ConfigFiles::Named("x".into()));
    }

    #[test]
    fn every_setting_that_messages_name_has_a_variable() {
        for option in crate::option_name::setting::ALL {
            assert!(Setting::named(*option).is_some_and(|setting| setting.variable.is_some()), "{option}");
        }
    }

    #[test]
    fn the_documentation_has_every_setting() {
        let text = markdown();
        for setting in SETTINGS {
            assert!(text.contains(&format!("| `{}` |", setting.key)), "{}", setting.key);
            assert!(setting.variable.is_none_or(|variable| text.contains(variable)), "{}", setting.key);
        }
    }
}
