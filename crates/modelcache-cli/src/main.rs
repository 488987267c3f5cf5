//! The `modelcache` binary: all of it is in the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    modelcache_cli::run(std::env::args_os())
}
