//! Conversion of the library's [`Error`], and of panics, to the exceptions of the Python package.

use modelcache::{Error, ErrorKind, printable};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::any::Any;
use std::io::{self, Write};
use std::panic::PanicHookInfo;

/// Returns the Python exception for `error`. The Python package chooses its class by the name of the error's kind.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let exception = MAKE.import(py, "modelcache._errors", "from_native").and_then(|make| {
        let wait_seconds = error.wait().map(|wait| wait.as_secs_f64());
        let tier = error.failed_tier().map(|tier| tier.to_string());
        let details = (error.hint_text(), error.artifact_name(), tier, wait_seconds, error.is_transient());
        make.call1((error.kind().name(), error.to_string(), details))
    });
    // If the package cannot make the exception, raise the reason for that instead.
    exception.map_or_else(|reason| reason, PyErr::from_value)
}

/// Panic hook: writes one line to standard error. The caller gets the error from [`panic_error`] as an exception.
pub(crate) fn print_panic(info: &PanicHookInfo<'_>) {
    // Standard error may be closed. There is no other place to report to.
    let _ = writeln!(io::stderr().lock(), "{}", printable::panic(info));
}

/// Returns the error for a panic. Panics must not unwind into the interpreter.
pub(crate) fn panic_error(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    Error::new(ErrorKind::Other, format!("a defect in modelcache: {}", text.unwrap_or("a panic")))
        .hint("please report it, with the output on standard error")
}
