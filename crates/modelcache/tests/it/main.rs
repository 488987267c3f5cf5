//! Integration tests of the library through its public API, in one test program.
#![allow(clippy::unwrap_used)]

mod common;
mod download;
mod flights;
mod get;
mod hostile_servers;
mod hub_origin;
mod metrics;
mod open;
mod remote_bucket;
mod remote_conformance;
mod remote_support;
mod scrub;
mod source_conformance;
