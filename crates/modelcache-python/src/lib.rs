//! `_native`, the extension module of the Python package `modelcache`.
//!
//! The module is private. The public, typed API is written in Python, in `python/modelcache/`. Each operation of
//! `cache::Cache` returns a `call::Call`. A thread waits for the call, or an event loop is called back. No wait holds
//! the interpreter's lock. `failure` converts errors and panics to the exceptions of the package. `process` separates
//! the state of a process from that of its forked children.

mod cache;
mod call;
mod failure;
mod file;
mod keywords;
mod lease;
mod logs;
mod process;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
mod _native {
    use crate::{failure, keywords, process};
    use pyo3::prelude::*;
    use std::ffi::OsString;
    use std::io::Write;
    use std::panic::catch_unwind;

    #[pymodule_export]
    use crate::cache::Cache;
    #[pymodule_export]
    use crate::call::Call;
    #[pymodule_export]
    use crate::file::File;
    #[pymodule_export]
    use crate::lease::Lease;

    /// The version of the package.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// Marks this process as a forked child, which from now on uses a state of its own.
    #[pyfunction]
    fn forked() {
        process::forked();
    }

    /// Begins interpreter shutdown: from now on only the calling thread may use the module. Other threads hang when
    /// they make a call or return from one, as daemon threads do when the interpreter ends.
    #[pyfunction]
    fn begin_shutdown(py: Python<'_>) {
        process::begin_shutdown(py);
    }

    /// Stops the threads of this module, before the interpreter ends. Calls fail afterwards.
    #[pyfunction]
    fn shut_down(py: Python<'_>) {
        process::shut_down(py);
    }

    /// Removes and returns the queued log records, each as level, name of the logger and text.
    #[pyfunction]
    fn take_records() -> Vec<(u8, String, String)> {
        process::existing().map(process::Process::take_records).unwrap_or_default().into()
    }

    /// Returns the keyword for a flag of a command, and whether the flag has no value.
    #[pyfunction]
    fn keyword_of_flag(flag: &str) -> Option<(&'static str, bool)> {
        keywords::of_flag(flag)
    }

    /// Runs the command line in this process and returns its exit code. `args` begins with the name of the program. The
    /// caller has left the handling of signals to the command.
    #[pyfunction]
    fn run_command(py: Python<'_>, args: Vec<OsString>) -> u8 {
        // A panic of a command is caught in `modelcache_cli::run`. This is for a panic outside of it: the exit code of
        // Rust programs that panic. The panic is already printed.
        const PANICKED: u8 = 101;
        py.detach(|| {
            let code = catch_unwind(|| modelcache_cli::run(args)).unwrap_or(PANICKED);
            // A Rust program does this when it ends. A closed output has no reader to whom it matters.
            let _ = std::io::stdout().flush();
            code
        })
    }

    /// Returns a call that panics, or panics at once if `at_once` is set. For the test that a panic becomes an
    /// exception.
    #[pyfunction]
    fn panicking_call(py: Python<'_>, at_once: bool) -> PyResult<Call> {
        process::entry(py, |_| {
            assert!(!at_once, "on purpose");
            Ok(Call::new(py, modelcache::progress::Progress::new(), async { panic!("on purpose") }))
        })
    }

    #[pymodule_init]
    fn init() {
        std::panic::set_hook(Box::new(failure::print_panic));
        modelcache::option_name::write_options_with(keywords::write_option);
        modelcache_cli::prefer_aes_128();
    }
}
