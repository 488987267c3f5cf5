//! Tests of the daemon's library over real sockets, in one test program. Each module covers one area of behaviour.
#![allow(clippy::unwrap_used)]

mod listen;
