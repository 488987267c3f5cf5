//! `File`: the native object behind `modelcache.CachedFile`.
//!
//! Python waits here until a range of bytes is available, and reads it with the descriptor that it gets. The descriptor
//! stays open as long as this object lives, even after `close`, because another thread may be about to read from it.
//!
//! In a forked child, a file that was complete at the fork remains readable. A file that was not stays with its parent.

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

/// A file of an artifact, on disk or being downloaded.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct File {
    artifact: String,
    name: String,
    size: u64,
    /// Longest time of one wait, in seconds.
    timeout: Option<f64>,
    /// `None` once the file is closed. Locked only with the interpreter's lock held, so that no fork copies it locked.
    open: Mutex<Option<Arc<Owned<OpenFile>>>>,
    /// The descriptor, once Python got it.
    descriptor: OnceLock<Arc<std::fs::File>>,
    /// Set to true on close, which ends the waits of other threads.
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

    /// Returns the descriptor and keeps it open for the life of this object.
    fn retain(&self, file: &Arc<std::fs::File>) -> RawFd {
        self.descriptor.get_or_init(|| file.clone()).as_raw_fd()
    }

    /// Returns the descriptor if the bytes `start..stop` can be read without waiting.
    fn ready_fd(&self, start: u64, stop: u64) -> Result<Option<RawFd>> {
        let open = self.open()?;
        let file = match (open.get(), open.of_any_process()) {
            (Some(open), _) => open.try_wait(start..stop)?,
            // In a forked child. `is_whole` and `file` take no lock that a thread of the parent may have held.
            (None, Some(parents)) if parents.is_whole() => parents.file(),
            (None, _) => return Err(parent_downloads()),
        };
        Ok(file.map(|file| self.retain(file)))
    }

    /// Returns a call that runs `wait`. Closing the file ends it with an error.
    fn waiting<W>(&self, py: Python<'_>, wait: impl FnOnce(Arc<Owned<OpenFile>>) -> W) -> PyResult<Call>
    where
        W: Future<Output = Result<Answer>> + Send + 'static,
    {
        entry(py, || {
            let open = self.open()?;
            let (Some(file), Some(end)) = (open.get(), self.closed.get()) else { return Err(parent_downloads()) };
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
    /// The artifact as `name@version`.
    #[getter]
    fn artifact(&self) -> &str {
        &self.artifact
    }

    /// The path of the file within the artifact.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// The size in bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.size
    }

    /// True if the complete file is on disk and verified.
    #[getter]
    fn is_whole(&self, py: Python<'_>) -> PyResult<bool> {
        entry(py, || Ok(self.open()?.of_any_process().is_some_and(OpenFile::is_whole)))
    }

    /// The path on disk if the complete file is there and verified, otherwise `None`.
    #[getter]
    fn whole_path(&self, py: Python<'_>) -> PyResult<Option<OsString>> {
        entry(py, || {
            Ok(self.open()?.of_any_process().and_then(OpenFile::whole_path).map(|path| path.as_os_str().into()))
        })
    }

    /// Returns the descriptor for reading the bytes `start..stop`, or `None` if they have to be waited for.
    fn ready(&self, py: Python<'_>, start: u64, stop: u64) -> PyResult<Option<RawFd>> {
        entry(py, || self.ready_fd(start, stop))
    }

    /// Waits until the bytes `start..stop` can be read.
    fn wait(&self, py: Python<'_>, start: u64, stop: u64) -> PyResult<Call> {
        self.waiting(py, |open| async move {
            let file = open.get().ok_or_else(parent_downloads)?;
            file.wait(start..stop).await?;
            Ok(Answer::Json(json!(null)))
        })
    }

    /// Waits until the complete file is on disk, verified and leased. The answer is its path.
    fn whole(&self, py: Python<'_>) -> PyResult<Call> {
        self.waiting(py, |open| async move {
            let file = open.get().ok_or_else(parent_downloads)?;
            Ok(Answer::Path(file.whole().await?))
        })
    }

    /// Returns the progress of the download. The fields are those of `Call.snapshot`.
    fn snapshot(&self, py: Python<'_>) -> PyResult<(&'static str, u64, u64, u64, u64)> {
        entry(py, || {
            let open = self.open()?;
            let progress = open.of_any_process().map(|open| open.progress().clone()).unwrap_or_default();
            Ok(snapshot(&[progress]))
        })
    }

    /// Closes the file and ends waits for it in other threads. Closing it again has no effect.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        entry(py, || {
            drop(self.open.lock().unwrap_or_else(PoisonError::into_inner).take());
            // In a forked child there is nothing to wake: waits are refused there.
            if let Some(closed) = self.closed.get() {
                closed.send_replace(true);
            }
            Ok(())
        })
    }
}

/// Runs `work` as the body of a call from Python and converts its error to an exception.
fn entry<T>(py: Python<'_>, work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    process::entry(py, |_| work().map_err(|error| failure::exception(py, &error)))
}

fn closed() -> Error {
    Error::invalid("the file is closed").hint("open it again")
}

/// Returns the error for using, in a forked child, a file that its parent was still downloading at the fork.
fn parent_downloads() -> Error {
    Error::new(
        ErrorKind::Other,
        "this file was still being downloaded when the process was forked, and only the parent can read it",
    )
    .hint("open it again in this process, or fork after the download")
}
