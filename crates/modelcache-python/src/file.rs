//! An open file: Python waits here for its bytes, and reads them itself with the descriptor that it is given.
//!
//! The descriptor stays open as long as this object lives, also once it is closed: another thread may be about to read.
//! In a forked child a file that was whole goes on working; whether one is takes no lock to tell.

use crate::cache::in_time;
use crate::call::{Answer, Call, snapshot};
use crate::failure;
use crate::process::{self, Owned};
use modelcache::cache::OpenFile;
use modelcache::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use serde_json::json;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::sync::watch;

/// A file of an artifact, here or still coming.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct File {
    artifact: String,
    name: String,
    size: u64,
    /// Seconds that a wait may take.
    timeout: Option<f64>,
    /// `None` once it is closed. Locked by whoever holds the interpreter's lock, so no fork comes in between.
    open: Mutex<Option<Arc<Owned<OpenFile>>>>,
    descriptor: OnceLock<Arc<std::fs::File>>,
    closed: Owned<watch::Sender<bool>>,
}

impl File {
    pub(crate) fn new(opened: OpenFile, timeout: Option<f64>) -> Self {
        Self {
            artifact: opened.key.to_string(),
            name: opened.path.to_string(),
            size: opened.size(),
            timeout,
            open: Mutex::new(Some(Arc::new(Owned::new(opened)))),
            descriptor: OnceLock::new(),
            closed: Owned::new(watch::Sender::default()),
        }
    }

    fn open(&self) -> Result<Arc<Owned<OpenFile>>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(closed)
    }

    /// The descriptor, which is kept from now on.
    fn kept(&self, file: &Arc<std::fs::File>) -> RawFd {
        self.descriptor.get_or_init(|| file.clone()).as_raw_fd()
    }

    fn ready_fd(&self, start: u64, stop: u64) -> Result<Option<RawFd>> {
        let open = self.open()?;
        let file = match (open.get(), open.of_any_process()) {
            (Some(open), _) => open.try_wait(start..stop)?,
            (None, Some(parents)) if parents.is_whole() => parents.file(),
            (None, _) => return Err(left_behind()),
        };
        Ok(file.map(|file| self.kept(file)))
    }

    /// A call that waits for something of the file, until it is closed.
    fn waiting<W>(&self, py: Python<'_>, wait: impl FnOnce(Arc<Owned<OpenFile>>) -> W) -> PyResult<Call>
    where
        W: Future<Output = Result<Answer>> + Send + 'static,
    {
        entry(py, || {
            let open = self.open()?;
            let (Some(file), Some(end)) = (open.get(), self.closed.get()) else { return Err(left_behind()) };
            let (progress, mut ends) = (file.progress().clone(), end.subscribe());
            let (work, timeout) = (wait(open.clone()), self.timeout);
            Ok(Call::new(py, progress, async move {
                tokio::select! {
                    biased;
                    _ = ends.wait_for(|closed| *closed) => Err(closed()),
                    done = in_time(timeout, work) => done,
                }
            }))
        })
    }
}

#[pymethods]
impl File {
    /// The artifact, as `name@version`.
    #[getter]
    fn artifact(&self) -> &str {
        &self.artifact
    }

    /// Its path in the artifact.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// Bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.size
    }

    /// Whether all of it is here and proven.
    #[getter]
    fn is_whole(&self, py: Python<'_>) -> PyResult<bool> {
        entry(py, || Ok(self.open()?.of_any_process().is_some_and(OpenFile::is_whole)))
    }

    /// Where it lies, if all of it is here and proven.
    #[getter]
    fn whole_path(&self, py: Python<'_>) -> PyResult<Option<OsString>> {
        entry(py, || {
            Ok(self.open()?.of_any_process().and_then(OpenFile::whole_path).map(|path| path.as_os_str().into()))
        })
    }

    /// The descriptor to read these bytes from, if that takes no waiting.
    fn ready(&self, py: Python<'_>, start: u64, stop: u64) -> PyResult<Option<RawFd>> {
        entry(py, || self.ready_fd(start, stop))
    }

    /// Waits until these bytes are ready.
    fn wait(&self, py: Python<'_>, start: u64, stop: u64) -> PyResult<Call> {
        self.waiting(py, |open| async move {
            let file = open.get().ok_or_else(left_behind)?;
            file.wait(start..stop).await?;
            Ok(Answer::Json(json!(null)))
        })
    }

    /// Waits until all of it is here, proven and held; the answer is its path.
    fn whole(&self, py: Python<'_>) -> PyResult<Call> {
        self.waiting(py, |open| async move {
            let file = open.get().ok_or_else(left_behind)?;
            Ok(Answer::Path(file.whole().await?))
        })
    }

    /// As a call's.
    fn snapshot(&self, py: Python<'_>) -> PyResult<(&'static str, u64, u64, u64, u64)> {
        entry(py, || {
            let open = self.open()?;
            let progress = open.of_any_process().map(|open| open.progress().clone()).unwrap_or_default();
            Ok(snapshot(&[progress]))
        })
    }

    /// Lets go of it and ends what waits for it; again changes nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        entry(py, || {
            drop(self.open.lock().unwrap_or_else(PoisonError::into_inner).take());
            if let Some(closed) = self.closed.get() {
                closed.send_replace(true);
            }
            Ok(())
        })
    }
}

/// A call from Python that needs nothing but `work`.
fn entry<T>(py: Python<'_>, work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    process::entry(py, |_| work().map_err(|error| failure::exception(py, &error)))
}

fn closed() -> Error {
    Error::invalid("the file is closed").hint("open it again")
}

fn left_behind() -> Error {
    Error::new(
        ErrorKind::Other,
        "this file was still being filled when the process was forked, and its parent fills it",
    )
    .hint("open it again in this process, or fork when it is whole")
}
