//! A call: work that was asked for and waits to be waited for, by a thread or by an event loop.
//!
//! A thread that waits works itself: for the first tenth of a second the call is polled on it, without the interpreter's
//! lock. What takes longer goes on as a task of the runtime, while the thread goes back to Python ten times a second, for
//! signals, logs and progress: callbacks have no frame of Rust below them, and may make calls of their own. Whoever stops
//! waiting ends the call and no one else's: a fill goes on as long as anybody in this process waits for it.

use crate::file::File;
use crate::lease::Lease;
use crate::process::{self, Owned};
use crate::{failure, logs};
use futures::FutureExt;
use modelcache::cache::{Artifact, OpenFile};
use modelcache::progress::Progress;
use modelcache::{Error, ErrorKind, Result};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use serde_json::Value;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::{Runtime, RuntimeFlavor};
use tokio::task::{AbortHandle, JoinHandle};

/// Time after which a waiting thread goes back to Python.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a cancelled call is waited for.
const CANCELLED: Duration = Duration::from_secs(1);

type Work = Pin<Box<dyn Future<Output = Result<Answer>> + Send>>;

/// What a call gives.
pub(crate) enum Answer {
    /// A path that needs no hold.
    Path(PathBuf),
    /// An answer that takes effect when it is given, with the interpreter's lock held: what was lent is kept.
    Kept(Box<dyn FnOnce() + Send>, Box<Answer>),
    /// A path and its hold.
    Lent(Box<Artifact>),
    /// A file, and the seconds that a read of it may wait.
    Opened(Box<OpenFile>, Option<f64>),
    /// Anything else, as JSON.
    Json(Value),
}

impl Answer {
    fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self {
            Self::Path(path) => path.into_os_string().into_py_any(py),
            Self::Kept(keep, answer) => {
                keep();
                answer.into_python(py)
            }
            Self::Lent(artifact) => {
                let path = artifact.path.clone();
                Lease::new(*artifact, path).into_py_any(py)
            }
            Self::Opened(file, timeout) => File::new(*file, timeout).into_py_any(py),
            Self::Json(value) => value.to_string().into_py_any(py),
        }
    }

    /// Calls `done(answer, exception)`, one of which is `None`.
    pub(crate) fn tell(py: Python<'_>, done: &Bound<'_, PyAny>, outcome: Result<Self>) -> PyResult<()> {
        let answered = outcome.map_err(|error| failure::exception(py, &error));
        match answered.and_then(|answer| answer.into_python(py)) {
            Ok(answer) => done.call1((answer, py.None())),
            Err(error) => done.call1((py.None(), error)),
        }
        .map(|_| ())
    }
}

/// One or several progresses, shown as one.
pub(crate) type Shown = Arc<Mutex<Vec<Progress>>>;

/// Work that was asked for.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct Call {
    stage: Mutex<Owned<Stage>>,
    shown: Shown,
}

enum Stage {
    New(Work),
    /// A task, which a thread waits for.
    Awaited(JoinHandle<Result<Answer>>),
    /// A task that tells its end itself.
    Started(AbortHandle),
}

impl Call {
    /// A call that shows `progress`.
    pub(crate) fn new(
        py: Python<'_>,
        progress: Progress,
        work: impl Future<Output = Result<Answer>> + Send + 'static,
    ) -> Self {
        Self::showing(py, Arc::new(Mutex::new(vec![progress])), work)
    }

    /// A call that shows several progresses as one.
    pub(crate) fn showing(
        py: Python<'_>,
        shown: Shown,
        work: impl Future<Output = Result<Answer>> + Send + 'static,
    ) -> Self {
        logs::look_up_level(py);
        Self { stage: Mutex::new(Owned::new(Stage::New(Box::pin(work)))), shown }
    }

    fn stage(&self) -> MutexGuard<'_, Owned<Stage>> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Works on a call for [`LOOK_EVERY`] at most: what came of it, or the task that it goes on in.
fn work_on(runtime: &Runtime, stage: Option<Stage>) -> std::result::Result<Result<Answer>, JoinHandle<Result<Answer>>> {
    let waited_for_before = || Error::invalid("a call is waited for once, in the process that made it");
    runtime.block_on(async {
        match stage {
            Some(Stage::New(work)) => {
                let mut work = guarded(work);
                tokio::select! {
                    biased;
                    outcome = &mut work => Ok(outcome),
                    () = tokio::time::sleep(LOOK_EVERY) => Err(tokio::spawn(work)),
                }
            }
            Some(Stage::Awaited(mut task)) => match tokio::time::timeout(LOOK_EVERY, &mut task).await {
                Ok(Ok(outcome)) => Ok(outcome),
                Ok(Err(cut_short)) => Ok(Err(Error::new(ErrorKind::Other, "the call was cut short").cause(cut_short))),
                Err(_) => Err(task),
            },
            Some(Stage::Started(_)) | None => Ok(Err(waited_for_before())),
        }
    })
}

/// `work`, whose panics are failures.
fn guarded(work: Work) -> Pin<Box<dyn Future<Output = Result<Answer>> + Send>> {
    AssertUnwindSafe(work)
        .catch_unwind()
        .map(|done| done.unwrap_or_else(|panic| Err(failure::of_panic(&*panic))))
        .boxed()
}

#[pymethods]
impl Call {
    /// Waits for the end, a tenth of a second at most. `None`: it has not come yet, and this is to be called again.
    fn wait(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        process::entry(py, |inside| {
            let runtime = inside.process().runtime(py).map_err(|error| failure::exception(py, &error))?;
            let stage = self.stage().take();
            // The runtime is let go of before this thread may hang: whoever ends it waits for that.
            match inside.detach(move || work_on(&runtime, stage)) {
                Ok(Ok(answer)) => answer.into_python(py).map(Some),
                Ok(Err(error)) => Err(failure::exception(py, &error)),
                Err(task) => {
                    *self.stage() = Owned::new(Stage::Awaited(task));
                    Ok(None)
                }
            }
        })
    }

    /// Starts the work; `done(answer, exception)` is called with its end, on a thread of ours, unless it is cancelled.
    fn start(&self, py: Python<'_>, done: Py<PyAny>) -> PyResult<()> {
        process::entry(py, |inside| {
            let process = inside.process();
            let begin = || {
                let runtime = process.runtime(py)?;
                // Without a thread that runs tasks they run only while somebody waits.
                if runtime.handle().runtime_flavor() == RuntimeFlavor::CurrentThread {
                    return Err(modelcache::runtime::no_thread(None));
                }
                process.start_to_deliver()?;
                let Some(Stage::New(work)) = self.stage().take() else {
                    return Err(Error::invalid("a call is started once, in the process that made it"));
                };
                Ok(runtime.spawn(async move {
                    let outcome = guarded(work).await;
                    process.deliver(done, outcome);
                }))
            };
            let task = begin().map_err(|error| failure::exception(py, &error))?;
            *self.stage() = Owned::new(Stage::Started(task.abort_handle()));
            Ok(())
        })
    }

    /// Ends the call; a fill that others wait for goes on.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        process::entry(py, |inside| {
            match self.stage().take() {
                Some(Stage::Started(task)) => task.abort(),
                Some(Stage::Awaited(task)) => {
                    task.abort();
                    if let Ok(runtime) = inside.process().runtime(py) {
                        let gone = async { drop(tokio::time::timeout(CANCELLED, task).await) };
                        inside.detach(move || runtime.block_on(gone));
                    }
                }
                Some(Stage::New(_)) | None => {}
            }
            Ok(())
        })
    }

    /// Phase, bytes done, bytes in all (0: not known), bytes received from the remote, bytes received from origins.
    fn snapshot(&self) -> (&'static str, u64, u64, u64, u64) {
        snapshot(&self.shown.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Several progresses as one.
pub(crate) fn snapshot(shown: &[Progress]) -> (&'static str, u64, u64, u64, u64) {
    let all: Vec<_> = shown.iter().map(Progress::snapshot).collect();
    let phase = all.last().map_or("resolve", |one| one.phase.name());
    let sum = |of: fn(&modelcache::progress::Snapshot) -> u64| all.iter().map(of).sum();
    (
        phase,
        sum(|one| one.done_bytes),
        sum(|one| one.total_bytes),
        sum(|one| one.remote_bytes),
        sum(|one| one.origin_bytes),
    )
}
