//! A tiered cache for model artifacts: local disk, then an object store, then the origin.
//!
//! A [`Cache`] brings an artifact to a local directory and leases it. It looks on disk, then on the remote (S3 or a
//! folder), then at the origin (Hugging Face Hub, S3, HTTP, MLflow, an OCI registry, a folder). Every byte is verified
//! against SHA-256. The nearer tiers are filled on the way back, and the local directory stays inside a byte budget:
//! the least recently used artifacts are evicted before a download starts, never while they are leased.
//!
//! The library runs on Linux and in a Tokio runtime. It reads no environment variable and prints nothing; logs go
//! through [`tracing`](https://docs.rs/tracing).
//!
//! # Get an artifact
//!
//! ```no_run
//! use modelcache::{Cache, config::ByteBound};
//!
//! # async fn example() -> modelcache::Result<()> {
//! let cache = Cache::builder("/var/cache/models")
//!     .remote("s3://bucket/models")
//!     .environment(std::env::vars()) // AWS credentials and settings
//!     .budget(ByteBound::Percent(80))
//!     .open()?;
//! let model = cache.get("hf://org/model@main").include("*.safetensors").await?;
//! println!("{}", model.path.display()); // leased until `model` is dropped
//! # Ok(()) }
//! ```
//!
//! References have the same syntax as on the command line: `name@version`, `hf://org/model@revision`,
//! `s3://bucket/prefix`, `https://host/file`, `models:/name/version`, `oci://registry/repository:tag`, `file:///path`.
//!
//! # Publish an artifact
//!
//! ```
//! # use modelcache::Cache;
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! # let folder = tempfile::tempdir().unwrap();
//! # let weights = folder.path().join("weights.bin");
//! # std::fs::write(&weights, "weights").unwrap();
//! # let cache = Cache::builder(folder.path().join("cache"))
//! #     .min_free(modelcache::config::ByteBound::Bytes(0))
//! #     .open()?;
//! let report = cache.put("fraud-detector@3", &weights).await?;
//! println!("{} bytes, sha256 {}", report.bytes, report.sha256);
//!
//! let model = cache.get("fraud-detector@3").await?;
//! assert_eq!(std::fs::read(&model.path).unwrap(), b"weights");
//! # Ok::<_, modelcache::Error>(()) }).unwrap();
//! ```
//!
//! # Evict, and stay offline
//!
//! ```
//! # use modelcache::Cache;
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! # let folder = tempfile::tempdir().unwrap();
//! # let file = folder.path().join("f");
//! # std::fs::write(&file, "content").unwrap();
//! # let cache = Cache::builder(folder.path().join("cache"))
//! #     .min_free(modelcache::config::ByteBound::Bytes(0))
//! #     .open()?;
//! use modelcache::{ErrorKind, cache::EvictTier};
//!
//! cache.put("m@1", &file).await?;
//! cache.evict(&"m@1".parse()?, EvictTier::Disk, false).await?;
//! let error = cache.get("m@1").offline().await.expect_err("no tier has it");
//! assert_eq!(error.kind(), ErrorKind::NotFound);
//! # Ok::<_, modelcache::Error>(()) }).unwrap();
//! ```
//!
//! An [`Error`] has a kind that a caller can act on, the tier that failed, and a hint with the remedy.
//!
//! # Show progress
//!
//! ```no_run
//! # async fn example(cache: modelcache::Cache) -> modelcache::Result<()> {
//! use modelcache::progress::Progress;
//!
//! let progress = Progress::new();
//! let get = tokio::spawn(cache.get("hf://org/model").progress(&progress).into_future());
//! while !get.is_finished() {
//!     let now = progress.snapshot();
//!     println!("{}: {} of {} bytes", now.phase.name(), now.done_bytes, now.total_bytes);
//!     tokio::time::sleep(std::time::Duration::from_secs(1)).await;
//! }
//! # Ok(()) }
//! ```
//!
//! # Read a file while it downloads
//!
//! [`Cache::open_file`] returns before the file is complete. Reads return verified bytes only.
//!
//! # Add a custom origin
//!
//! See [`origin`]: an application implements [`Origin`](origin::Origin) for a scheme, and passes it to
//! [`CacheBuilder::own_origin`](cache::CacheBuilder::own_origin).
//!
//! # Export metrics
//!
//! ```
//! # let folder = tempfile::tempdir().unwrap();
//! # let cache = modelcache::Cache::builder(folder.path().join("cache")).open().unwrap();
//! let text = modelcache::metrics::text(&cache.metrics().counts().families()); // the text format of Prometheus
//! assert!(text.contains("# TYPE "));
//! ```
//!
//! # Features
//!
//! The features `mlflow` and `oci`, both on by default, contain the clients of those registries. If a feature is
//! disabled, the artifacts of its registry are still served from the local directory and the remote. A call that needs
//! the registry fails with an error that names the feature.
//!
//! # Guarantees
//!
//! Only verified files are published. A process may be killed at any moment, and any number of processes may share a
//! directory. The repository's `docs/reliability.md` lists each guarantee and its test.

pub mod cache;
pub mod check;
pub mod config;
pub mod digest;
pub mod error;
pub mod finding;
pub mod forbid;
pub mod format;
pub mod key;
pub mod manifest;
pub mod metrics;
pub mod option_name;
pub mod origin;
pub mod progress;
pub mod reference;
pub mod selection;
pub mod settings;
pub mod source;

// For the front ends and tests of this repository. Not part of the public API: no version number covers changes.
#[doc(hidden)]
pub mod credentials;
#[doc(hidden)]
pub mod disk;
#[doc(hidden)]
pub mod doctor;
mod extract;
#[cfg(fuzzing)]
pub mod fuzzing;
#[doc(hidden)]
pub mod human;
#[doc(hidden)]
pub mod ladder;
#[doc(hidden)]
pub mod limits;
#[doc(hidden)]
pub mod mutex;
#[doc(hidden)]
pub mod printable;
mod rate_limiter;
#[doc(hidden)]
pub mod redact;
#[doc(hidden)]
pub mod remote;
#[doc(hidden)]
pub mod runtime;
#[doc(hidden)]
pub mod sidecar;
#[doc(hidden)]
pub mod transfer;

mod json;

pub use cache::{Artifact, Cache};
pub use config::Config;
pub use error::{Error, ErrorKind, Result, Tier};
pub use key::ArtifactKey;
pub use reference::Reference;
pub use selection::{ReferencePattern, Selection};
