//! Stand-ins for the services that modelcache talks to, with fault injection.
//!
//! All of them listen on loopback, on a port that the kernel picks, and stop when their handle is dropped. Content is
//! generated from a seed, so a file of any size costs no memory and a test can recompute it.
//!
//! | module | stands in for |
//! |---|---|
//! | [`hub`] | the Hugging Face Hub and, on another address, its CDN |
//! | [`s3`] | an S3 endpoint over a folder, including conditional requests |
//! | [`web`] | any other web server, with or without ranges, validators, digests, credentials |
//! | [`tls`] | TLS in front of any of them, and a proxy that tunnels |
//! | [`gate`] | a front that requires credentials, redirects to a CDN, or [falsifies answers](lie) |
//! | [`moto`], [`registry`], [`mlflow`] | none: these start the real servers |
//! | [`proxy`] | a bad network, in front of any of them |
//! | [`shim`] | disk errors and sudden death, below a program |
//! | [`power`] | a power cut, applied to the files that a program left |
//!
//! [`folder`] counts the files of a cache directory without the program's help; [`dice`] is a seeded random number
//! generator.
//!
//! The stand-ins run on threads of their own, not on the caller's runtime. A test may block its thread (run a command,
//! join a child) while the servers keep answering.

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
pub mod wire;

mod range;
mod serve;

pub use content::Content;
pub use dice::Dice;
pub use faults::{Fault, Faults, Hits};
pub use gate::{Demand, Gate};
pub use hub::Hub;
pub use lie::Lie;
pub use log::{LoggedRequest, Place};
pub use mlflow::Mlflow;
pub use moto::Moto;
pub use proxy::FaultProxy;
pub use registry::Registry;
pub use s3::S3;
pub use serve::free_port;
pub use shim::{Call, Errno, Flock, Shim, ShimRun};
pub use tls::{Authority, ConnectProxy, TlsFront};
pub use web::{Page, Ranges, Web};
