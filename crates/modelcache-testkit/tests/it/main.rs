//! The stand-ins, asked by real clients, in one program.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod hub;
mod proxy;
mod s3;
