//! The library from outside, in one program.
#![allow(clippy::unwrap_used)]

mod common;
mod flights;
mod get;
mod hostile_servers;
mod hub_origin;
mod open;
mod pour;
mod remote_bucket;
mod remote_conformance;
mod remote_support;
mod scrub;
mod source_conformance;
