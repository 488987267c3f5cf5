//! The daemon with the real clients of the Hub from PyPI: several versions of `huggingface_hub`, and transformers.
//!
//! The tests need the Python environments of `cargo xtask test`. Without them they are skipped, with a message.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod faults;
mod harness;
mod repositories;
mod transformers;
