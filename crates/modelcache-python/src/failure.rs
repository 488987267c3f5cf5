//! Failures: from the library's one error to the package's exceptions, in one place.

use modelcache::{Error, ErrorKind, printable};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::any::Any;
use std::io::{self, Write};
use std::panic::PanicHookInfo;

/// The exception for `error`; which class it is, the package decides by the name of its kind.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let made = MAKE.import(py, "modelcache._errors", "from_native").and_then(|make| {
        let wait_seconds = error.wait().map(|wait| wait.as_secs_f64());
        let tier = error.failed_tier().map(|tier| tier.to_string());
        let about = (error.hint_text(), error.artifact_name(), tier, wait_seconds, error.is_transient());
        make.call1((error.kind().name(), error.to_string(), about))
    });
    made.map_or_else(|broken| broken, PyErr::from_value)
}

/// Tells of a panic in one line; what the caller gets is [`of_panic`].
pub(crate) fn tell_panic(info: &PanicHookInfo<'_>) {
    // Where standard error is closed there is nobody to tell.
    let _ = writeln!(io::stderr().lock(), "{}", printable::panic(info));
}

/// A panic as a failure: nothing else may leave this module.
pub(crate) fn of_panic(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    Error::new(ErrorKind::Other, format!("a defect in modelcache: {}", text.unwrap_or("a panic")))
        .hint("please report it with what stood on standard error")
}
