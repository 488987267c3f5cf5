//! [`Call`]: a future of the library that Python drives, either from a blocked thread or from an event loop.
//!
//! A blocking caller calls [`Call::wait`] in a loop of Python code. Each call of `wait` returns within a tenth of a
//! second, so that the loop can handle signals, forward log records and report progress. Callbacks run in that loop,
//! without a Rust frame below them, and may use the cache. An event loop uses [`Call::start`], which takes a callback.
//!
//! Cancelling ends this call only: a fill continues while any caller in this process waits for it.

use crate::file::File;
use crate::lease::Lease;
use crate::process::{self, ProcessLocal};
use crate::{failure, logs};
use futures::FutureExt;
use modelcache::cache::{Artifact, OpenFile};
use modelcache::mutex::Mutex;
use modelcache::progress::Progress;
use modelcache::{Error, ErrorKind, Result};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use serde::Serialize;
use serde_json::Value;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Runtime, RuntimeFlavor};
use tokio::task::{AbortHandle, JoinHandle};

/// Longest time that [`Call::wait`] blocks before it returns to Python.
const WAIT_INTERVAL: Duration = Duration::from_millis(100);
/// Longest time that [`Call::cancel`] waits for the task to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

type Work = Pin<Box<dyn Future<Output = Result<CallOutput>> + Send>>;

/// The output of a successful call.
pub(crate) enum CallOutput {
    /// A path.
    Path(PathBuf),
    /// An output whose leases the cache keeps. The function stores them in the cache. It is called when the output is
    /// converted, with the interpreter's lock held. If the output is dropped instead, the leases are released.
    StoreLeases(Box<dyn FnOnce() + Send>, Box<CallOutput>),
    /// A leased artifact, which becomes a `Lease`.
    Lease(Box<Artifact>),
    /// An open file, which becomes a `File`, and the longest time in seconds that one of its reads may wait.
    File(Box<OpenFile>, Option<f64>),
    /// Any other output, in the form that `modelcache --json` prints.
    Json(Value),
}

/// Serializes a report. The Python package parses it into the classes of `_reports.py`.
pub(crate) fn json(report: &impl Serialize) -> Result<Value> {
    serde_json::to_value(report)
        .map_err(|cause| Error::new(ErrorKind::Other, "cannot serialize the result of the call").cause(cause))
}

impl CallOutput {
    /// Converts the output to a Python object.
    fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self {
            Self::Path(path) => path.into_os_string().into_py_any(py),
            Self::StoreLeases(store_leases, output) => {
                // With the interpreter's lock held, no fork can copy the table of leases while its mutex is locked.
                store_leases();
                output.into_python(py)
            }
            Self::Lease(artifact) => {
                Lease::new(*artifact).map_err(|error| failure::exception(py, &error))?.into_py_any(py)
            }
            Self::File(file, timeout) => File::new(*file, timeout).into_py_any(py),
            Self::Json(value) => value.to_string().into_py_any(py),
        }
    }

    /// Calls the Python function `done(output, exception)`. One of the two arguments is `None`.
    pub(crate) fn call_back(py: Python<'_>, done: &Bound<'_, PyAny>, outcome: Result<Self>) -> PyResult<()> {
        let outcome = outcome.map_err(|error| failure::exception(py, &error));
        match outcome.and_then(|output| output.into_python(py)) {
            Ok(output) => done.call1((output, py.None())),
            Err(error) => done.call1((py.None(), error)),
        }
        .map(|_| ())
    }
}

/// The progress handles of a call. [`snapshot`] adds them up.
pub(crate) type ProgressHandles = Arc<Mutex<Vec<Progress>>>;

/// A call of the library that Python waits for or cancels.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct Call {
    /// Empty while a thread is in [`Call::wait`], and after the call has ended.
    stage: Mutex<ProcessLocal<Stage>>,
    handles: ProgressHandles,
}

enum Stage {
    /// Not polled yet.
    New(Work),
    /// A runtime task that a blocked thread waits for.
    Awaited(JoinHandle<Result<CallOutput>>),
    /// A runtime task that reports its outcome to an event loop.
    Started(AbortHandle),
}

impl Call {
    /// Creates a call with one progress handle. Nothing runs before [`wait`](Self::wait) or [`start`](Self::start).
    pub(crate) fn new(
        py: Python<'_>,
        progress: Progress,
        work: impl Future<Output = Result<CallOutput>> + Send + 'static,
    ) -> Self {
        Self::with_handles(py, Arc::new(Mutex::new(vec![progress])), work)
    }

    /// Creates a call with several progress handles. `work` may add handles.
    pub(crate) fn with_handles(
        py: Python<'_>,
        handles: ProgressHandles,
        work: impl Future<Output = Result<CallOutput>> + Send + 'static,
    ) -> Self {
        // The program may have changed the level of the logger since the last call.
        logs::look_up_level(py);
        Self { stage: Mutex::new(ProcessLocal::new(Stage::New(Box::pin(work)))), handles }
    }
}

/// Runs a call for at most [`WAIT_INTERVAL`]. Returns `Ok` with its outcome or, if it has not ended, `Err` with the
/// task in which it continues.
fn run_for_interval(
    runtime: &Runtime,
    stage: Option<Stage>,
) -> std::result::Result<Result<CallOutput>, JoinHandle<Result<CallOutput>>> {
    let already_awaited = || Error::invalid("a call can be awaited only once, and only in the process that created it");
    runtime.block_on(async {
        match stage {
            // First interval: poll the work on this thread. A call that ends within the interval, such as a hit on
            // disk, needs no task and no switch to another thread.
            Some(Stage::New(work)) => {
                let mut work = catching_panics(work);
                tokio::select! {
                    biased;
                    outcome = &mut work => Ok(outcome),
                    () = tokio::time::sleep(WAIT_INTERVAL) => Err(tokio::spawn(work)),
                }
            }
            // Later intervals: the task runs on the threads of the runtime, and this thread only waits for it.
            Some(Stage::Awaited(mut task)) => match tokio::time::timeout(WAIT_INTERVAL, &mut task).await {
                Ok(Ok(outcome)) => Ok(outcome),
                Ok(Err(cancelled)) => Ok(Err(Error::new(ErrorKind::Other, "the call was cancelled").cause(cancelled))),
                Err(_) => Err(task),
            },
            // Started for an event loop, ended, in use by another thread, or created before a fork.
            Some(Stage::Started(_)) | None => Ok(Err(already_awaited())),
        }
    })
}

/// Wraps `work` so that a panic in it becomes an error.
fn catching_panics(work: Work) -> Pin<Box<dyn Future<Output = Result<CallOutput>> + Send>> {
    AssertUnwindSafe(work)
        .catch_unwind()
        .map(|done| done.unwrap_or_else(|panic| Err(failure::panic_error(&*panic))))
        .boxed()
}

#[pymethods]
impl Call {
    /// Runs the call for at most a tenth of a second. Returns its output, or `None` if it has not ended; the caller
    /// then calls this again.
    fn wait(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        process::entry(py, |guard| {
            let runtime = guard.process().runtime(py).map_err(|error| failure::exception(py, &error))?;
            let stage = self.stage.lock().take();
            // The closure owns the reference to the runtime, so that it is dropped before `detach` may hang this
            // thread: `process::shut_down` waits until no other reference is left.
            match guard.detach(move || run_for_interval(&runtime, stage)) {
                Ok(Ok(output)) => output.into_python(py).map(Some),
                Ok(Err(error)) => Err(failure::exception(py, &error)),
                Err(task) => {
                    *self.stage.lock() = ProcessLocal::new(Stage::Awaited(task));
                    Ok(None)
                }
            }
        })
    }

    /// Starts the call in the background. When it has ended, a dispatcher thread calls `done(output, exception)`,
    /// unless the call was cancelled.
    fn start(&self, py: Python<'_>, done: Py<PyAny>) -> PyResult<()> {
        process::entry(py, |guard| {
            let process = guard.process();
            let begin = || {
                let runtime = process.runtime(py)?;
                // The thread limit of the process left no worker thread: tasks would run only while a thread is in
                // `wait`.
                if runtime.handle().runtime_flavor() == RuntimeFlavor::CurrentThread {
                    return Err(modelcache::runtime::no_thread(None));
                }
                process.start_completions()?;
                let Some(Stage::New(work)) = self.stage.lock().take() else {
                    return Err(Error::invalid("a call can be started only once, in the process that created it"));
                };
                Ok(runtime.spawn(async move {
                    let outcome = catching_panics(work).await;
                    process.queue_callback(done, outcome);
                }))
            };
            let task = begin().map_err(|error| failure::exception(py, &error))?;
            *self.stage.lock() = ProcessLocal::new(Stage::Started(task.abort_handle()));
            Ok(())
        })
    }

    /// Cancels the call. A fill that other callers wait for continues.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        process::entry(py, |guard| {
            match self.stage.lock().take() {
                Some(Stage::Started(task)) => task.abort(),
                Some(Stage::Awaited(task)) => {
                    task.abort();
                    // Wait until the future is dropped, so that its leases and locks are released when this returns.
                    if let Ok(runtime) = guard.process().runtime(py) {
                        let end = async { drop(tokio::time::timeout(CANCEL_TIMEOUT, task).await) };
                        guard.detach(move || runtime.block_on(end));
                    }
                }
                // Drop work that never ran. A call that has ended needs no action.
                Some(Stage::New(_)) | None => {}
            }
            Ok(())
        })
    }

    /// Returns the phase, the bytes done, the total bytes (0 if unknown), the bytes received from the remote and from
    /// origins, the number of requests that failed and were sent again, and the last of their errors, if no bytes have
    /// arrived since.
    fn snapshot(&self) -> Snapshot {
        snapshot(&self.handles.lock())
    }
}

/// The fields of [`Call::snapshot`].
pub(crate) type Snapshot = (&'static str, u64, u64, u64, u64, u64, Option<String>);

/// Adds up the bytes of several progress handles.
pub(crate) fn snapshot(handles: &[Progress]) -> Snapshot {
    let all: Vec<_> = handles.iter().map(Progress::snapshot).collect();
    // The handle added last belongs to the fill that started last.
    let phase = all.last().map_or("resolve", |one| one.phase.name());
    let sum = |of: fn(&modelcache::progress::Snapshot) -> u64| all.iter().map(of).sum();
    (
        phase,
        sum(|one| one.done_bytes),
        sum(|one| one.total_bytes),
        sum(|one| one.remote_bytes),
        sum(|one| one.origin_bytes),
        handles.iter().map(|handle| handle.retries().count).sum(),
        handles.iter().rev().find_map(|handle| handle.retries().last_error),
    )
}
