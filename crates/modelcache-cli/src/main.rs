//! The `modelcache` binary. Its code is in the library of this crate.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(modelcache_cli::run(std::env::args_os()))
}
