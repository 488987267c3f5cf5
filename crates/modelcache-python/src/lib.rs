//! The native half of the Python package `modelcache`: the library's cache, as Python can call it.
//!
//! Private: the typed face is in `python/modelcache/`. Every verb of `cache::Cache` gives a `call::Call`, which a
//! thread waits for or an event loop is told of; nothing waits with the interpreter's lock held. Failures become the
//! package's exceptions in one place (`failure`); a panic becomes one, too. What belongs to a process stays behind in
//! a fork (`process`).

mod answers;
mod cache;
mod call;
mod failure;
mod file;
mod lease;
mod logs;
mod process;

use pyo3::prelude::*;

/// The native half of the package.
#[pymodule]
mod _native {
    use crate::{failure, logs, process};
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::cache::Cache;
    #[pymodule_export]
    use crate::call::Call;
    #[pymodule_export]
    use crate::file::File;
    #[pymodule_export]
    use crate::lease::Lease;

    /// The release.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// Tells that this process is a forked child: what it had of its parent stays behind.
    #[pyfunction]
    fn forked() {
        process::forked();
    }

    /// The interpreter is about to end: from now on only this thread may call. All others hang where they call, or come
    /// back from a call, as daemon threads do when the interpreter ends.
    #[pyfunction]
    fn begin_end(py: Python<'_>) {
        process::begin_end(py);
    }

    /// Ends the threads of this process, before the interpreter does. No call can be made afterwards.
    #[pyfunction]
    fn shut_down(py: Python<'_>) {
        process::shut_down(py);
    }

    /// The log records that wait: level, logger and text.
    #[pyfunction]
    fn take_records() -> Vec<(u8, String, String)> {
        process::existing().map(process::Process::take_records).unwrap_or_default().into()
    }

    /// Panics inside a call, or before there is one: for the test that none crosses.
    #[pyfunction]
    fn panicking_call(py: Python<'_>, at_once: bool) -> PyResult<Call> {
        process::entry(py, |_| {
            assert!(!at_once, "on purpose");
            Ok(Call::new(py, modelcache::progress::Progress::new(), async { panic!("on purpose") }))
        })
    }

    #[pymodule_init]
    fn init() {
        std::panic::set_hook(Box::new(failure::tell_panic));
        logs::start();
    }
}
