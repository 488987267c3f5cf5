//! The developer tasks of this repository, one module per task, and what they share with the benchmarks.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

pub mod bench;
pub mod crates;
pub mod debian;
pub mod demo;
pub mod deploy;
pub mod dist;
pub mod docs;
mod features;
pub mod fuzz;
mod hub_clients;
pub mod monitoring;
pub mod page;
pub mod python;
pub mod release;
pub mod repository;
pub mod site;
pub mod table;
pub mod test;
mod tidy;
pub mod venv;
