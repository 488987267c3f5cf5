//! A call: work that was asked for and waits to be waited for, by a thread or by an event loop.
//!
//! A thread that waits works itself: the call is polled on it, without the interpreter's lock, and every tenth of a
//! second signals are looked at and progress is told. Whoever stops waiting ends the call and no one else's: a fill goes
//! on as long as anybody in this process waits for it.

use crate::file::File;
use crate::lease::Lease;
use crate::process::{self, Owned};
use crate::{failure, logs};
use futures::FutureExt;
use modelcache::cache::{Artifact, OpenFile};
use modelcache::progress::Progress;
use modelcache::{Error, Result};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use serde_json::Value;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// Time between two looks at signals and progress.
const LOOK_EVERY: Duration = Duration::from_millis(100);

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
            Self::Path(path) => path.into_py_any(py),
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

    fn take_work(&self) -> Result<Work> {
        match self.stage().take() {
            Some(Stage::New(work)) => Ok(work),
            _ => Err(Error::invalid("a call is waited for once, in the process that made it")),
        }
    }

    /// Polls `work` to its end, looking at signals and telling `progress` in between.
    async fn drive(&self, work: Work, progress: Option<Py<PyAny>>) -> PyResult<Result<Answer>> {
        let mut work = guarded(work);
        let mut looks = interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                outcome = &mut work => return Ok(outcome),
                _ = looks.tick() => Python::attach(|py| self.look(py, progress.as_ref()))?,
            }
        }
    }

    fn look(&self, py: Python<'_>, progress: Option<&Py<PyAny>>) -> PyResult<()> {
        py.check_signals()?;
        logs::hand_over(py);
        progress.map_or(Ok(()), |progress| progress.call1(py, self.snapshot()).map(|_| ()))
    }
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
    /// Waits for the end. `progress` is called with a `snapshot` about ten times a second, on this thread; what it
    /// raises, and what a signal raises, ends the call.
    #[pyo3(signature = (progress = None))]
    fn wait(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        let started = self.take_work().and_then(|work| Ok((work, process::current(py).runtime(py)?)));
        let (work, runtime) = started.map_err(|error| failure::exception(py, &error))?;
        let outcome = py.detach(|| runtime.block_on(self.drive(work, progress)));
        logs::hand_over(py);
        match outcome? {
            Ok(answer) => answer.into_python(py),
            Err(error) => Err(failure::exception(py, &error)),
        }
    }

    /// Starts the work; `done(answer, exception)` is called with its end, on a thread of ours, unless it is cancelled.
    fn start(&self, py: Python<'_>, done: Py<PyAny>) -> PyResult<()> {
        let process = process::current(py);
        let started = self.take_work().and_then(|work| Ok((work, process.runtime(py)?)));
        let (work, runtime) = started.map_err(|error| failure::exception(py, &error))?;
        let task = runtime.spawn(async move {
            let outcome = guarded(work).await;
            process.deliver(done, outcome);
        });
        *self.stage() = Owned::new(Stage::Started(task.abort_handle()));
        Ok(())
    }

    /// Ends the call; a fill that others wait for goes on.
    fn cancel(&self) {
        if let Some(Stage::Started(task)) = self.stage().take() {
            task.abort();
        }
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
