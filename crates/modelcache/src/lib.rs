//! A tiered cache for model artifacts: local disk, an object store, and origins such as the Hugging Face Hub.
//!
//! [`Cache::open`] takes a [`Config`]; [`settings`] gathers one from flags, environment and files. [`Cache::get`] takes
//! a [`Reference`] and returns an artifact whose files are on the local disk, verified, and leased until it is dropped.
//! Failures are an [`Error`] with an [`ErrorKind`] that a caller can act on.
//!
//! The library reads no environment variables, prints nothing, and installs no signal handlers.

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
