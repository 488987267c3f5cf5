//! End-to-end tests of the `modelcache` binary, in one test program. Each module covers one area of behaviour.
#![allow(clippy::unwrap_used)]

mod backfill;
mod bad_input;
mod chaos;
mod cli;
mod common;
mod crash;
mod doctor;
mod durability;
mod foreign;
mod healing;
mod io_errors;
mod limits;
mod lower;
mod lying_locks;
mod machine;
mod main_job;
mod metrics_file;
mod mlflow;
mod neighbours;
mod oci;
mod offline;
mod pages;
mod power_cut;
mod proxies;
mod put_options;
mod real_model;
mod redirects;
mod revisions;
mod security;
mod serve;
mod sharing;
mod signals;
mod together;
#[cfg(feature = "otel")]
mod traces;
mod troubleshooting;
mod uploads;
mod verbs_exec;
mod verbs_into;
mod verbs_pin;
mod verbs_prewarm;
mod verbs_prune;
mod verify;
mod weather;
mod web;
