//! The daemon with the real clients of the Hub from PyPI: several versions of `huggingface_hub`, and transformers.
//!
//! The tests need the Python environments of `cargo xtask test`. Without them they are skipped, with a message.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test ends at the first surprise, and is no library")]

mod faults;
mod harness;
mod layout;
mod repositories;
mod transformers;
