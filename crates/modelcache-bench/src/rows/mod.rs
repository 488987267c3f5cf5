//! The rows of docs/benchmarks.md: one file each, or one file for several similar rows.

pub(super) mod archive;
mod calls;
pub(super) mod daemon;
pub(super) mod files;
pub(super) mod growth;
pub(super) mod hash;
pub(super) mod herd;
pub(super) mod hub;
pub(super) mod large_file;
pub(super) mod layout;
pub(super) mod memory;
pub(super) mod python;
pub(super) mod shaped;
pub(super) mod upload;
pub(super) mod verify;
pub(super) mod warm;

use super::setup::Setup;
use std::process::Command;

/// Formats the size of a file: `4 GiB`, `256 MiB`, `4 KiB`.
fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        bytes if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
        bytes => format!("{} KiB", bytes >> 10),
    }
}

/// Our setting that syncs before it returns and bypasses the page cache.
const DURABLE: &str = "durable, O_DIRECT";
const DEFAULTS: &str = "defaults";

fn durable(command: &mut Command) -> &mut Command {
    command.env("MODEL_CACHE_DURABLE", "true").env("MODEL_CACHE_WRITE_MODE", "direct")
}

fn progress(setup: &Setup, row: &str) {
    eprintln!("{row}: {} rounds", setup.rounds);
}
