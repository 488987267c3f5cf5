//! Tests of the stand-ins with real clients, in one binary.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod hub;
mod proxy;
mod s3;
