//! A tiered cache for model artifacts: local disk, an object store, the origin.

pub mod digest;
pub mod error;
pub mod finding;
pub mod format;
pub mod human;
pub mod key;
pub mod ladder;
pub mod limits;
pub mod manifest;
pub mod printable;
pub mod redact;
pub mod reference;
pub mod selection;
pub mod sidecar;

pub mod config;
pub mod credentials;
pub mod metrics;
pub mod progress;
pub mod runtime;
pub mod settings;
pub mod source;

#[cfg(fuzzing)]
pub mod fuzzing;

pub mod cache;
pub mod disk;
pub mod doctor;
pub mod origin;
pub mod remote;
pub mod transfer;

pub use cache::Cache;
pub use config::Config;
pub use error::{Error, ErrorKind, Result, Tier};
pub use key::ArtifactKey;
pub use reference::Reference;
pub use selection::Selection;
