//! Stand-ins for the things modelcache talks to, and the faults they may have.
//!
//! Everything listens on loopback with a port the kernel picks, and ends when its handle is dropped. Content comes
//! from a seed, so a file of any size costs no memory and can be recomputed by whoever checks it.
//!
//! | module | stands in for |
//! |---|---|
//! | [`hub`] | the Hugging Face Hub and, on another address, its CDN |
//! | [`s3`] | an S3 endpoint over a folder, with the conditions of the real one kept |
//! | [`web`] | any other web server, with or without ranges, validators, digests, credentials |
//! | [`tls`] | TLS in front of any of them, and a proxy that tunnels |
//! | [`gate`] | what stands in front of a server: credentials, a CDN, [lies](lie) about what it answers |
//! | [`moto`], [`registry`], [`mlflow`] | nothing: they start the real servers |
//! | [`proxy`] | a bad network, in front of any of them |
//! | [`shim`] | a bad disk and sudden death, underneath a program |
//! | [`power`] | a power cut, afterwards |
//!
//! [`folder`] counts what a cache directory holds, without asking the program; [`dice`] are chance with a seed.
//!
//! Surprise: the stand-ins run on threads of their own, not on the caller's runtime. A test may block its thread (run
//! a command, join a child) and the servers go on answering.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test ends at the first surprise"))]

pub mod content;
pub mod dice;
pub mod faults;
pub mod folder;
pub mod gate;
pub mod hub;
pub mod lie;
pub mod log;
pub mod mlflow;
pub mod moto;
pub mod power;
pub mod proxy;
pub mod registry;
pub mod s3;
pub mod shim;
pub mod tls;
pub mod web;

mod range;
mod serve;
mod wire;

pub use content::Content;
pub use dice::Dice;
pub use faults::{Fault, Faults, Hits};
pub use gate::{Demand, Gate};
pub use hub::Hub;
pub use lie::Lie;
pub use log::{Place, Seen};
pub use mlflow::Mlflow;
pub use moto::Moto;
pub use proxy::FaultProxy;
pub use registry::Registry;
pub use s3::S3;
pub use shim::{Call, Errno, Flock, Shim, Strike};
pub use tls::{Authority, ConnectProxy, TlsFront};
pub use web::{Page, Ranges, Web};
