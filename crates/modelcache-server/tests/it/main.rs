//! Tests of the daemon's library over real sockets, in one test program. Each module covers one area of behaviour.
#![allow(clippy::unwrap_used)]

mod common;
mod files;
mod filling;
mod herd;
mod hub_routes;
mod hub_trouble;
mod listen;
mod native;
mod rights;
mod strangers;
