//! `File`: the native object behind `modelcache.CachedFile`.
//!
//! The Python code waits until a range of bytes is available, gets a descriptor, and reads the range from it. The
//! descriptor stays open as long as this object exists, even after `close`, because another thread may be about to
//! read.
//!
//! In a forked child, a file that was complete at the fork remains readable. An incomplete file is readable only in the
//! parent.

use crate::cache::with_timeout;
use crate::call::{Call, CallOutput, Snapshot, snapshot};
use crate::failure;
use crate::process::{self, ProcessLocal};
use modelcache::cache::OpenFile;
use modelcache::mutex::Mutex;
use modelcache::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use serde_json::json;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};
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
    open: Mutex<Option<Arc<ProcessLocal<OpenFile>>>>,
    /// The file that Python reads from, once it got the descriptor.
    descriptor: OnceLock<Arc<std::fs::File>>,
    /// Set to true on close, which ends the waits of other threads.
    closed: ProcessLocal<watch::Sender<bool>>,
}

impl File {
    pub(crate) fn new(opened: OpenFile, timeout: Option<f64>) -> Self {
        Self {
            artifact: opened.key.to_string(),
            name: opened.path.to_string(),
            size: opened.size(),
            timeout,
            open: Mutex::new(Some(Arc::new(ProcessLocal::new(opened)))),
            descriptor: OnceLock::new(),
            closed: ProcessLocal::new(watch::Sender::default()),
        }
    }

    fn open(&self) -> Result<Arc<ProcessLocal<OpenFile>>> {
        let open = self.open.lock();
        open.clone().ok_or_else(closed)
    }

    /// Returns the descriptor, and keeps it open as long as this object exists.
    fn retain(&self, file: &Arc<std::fs::File>) -> RawFd {
        self.descriptor.get_or_init(|| file.clone()).as_raw_fd()
    }

    /// Returns the descriptor if the bytes `start..stop` can be read without waiting.
    fn ready_fd(&self, start: u64, stop: u64) -> Result<Option<RawFd>> {
        let open = self.open()?;
        let file = match (open.get(), open.of_any_process()) {
            (Some(open), _) => open.try_wait(start..stop)?,
            // In a forked child. `is_whole` and `file` take no lock that a thread of the parent may have held.
            (None, Some(inherited)) if inherited.is_whole() => inherited.file(),
            (None, _) => return Err(incomplete_at_fork()),
        };
        Ok(file.map(|file| self.retain(file)))
    }

    /// Returns a call that runs `wait`. Closing the file ends it with an error.
    fn wait_call<W>(&self, py: Python<'_>, wait: impl FnOnce(Arc<ProcessLocal<OpenFile>>) -> W) -> PyResult<Call>
    where
        W: Future<Output = Result<CallOutput>> + Send + 'static,
    {
        entry(py, || {
            let open = self.open()?;
            let (Some(file), Some(close_sender)) = (open.get(), self.closed.get()) else {
                return Err(incomplete_at_fork());
            };
            let (progress, mut closes) = (file.progress().clone(), close_sender.subscribe());
            let (work, timeout) = (wait(open.clone()), self.timeout);
            Ok(Call::new(py, progress, async move {
                tokio::select! {
                    biased;
                    _ = closes.wait_for(|is_closed| *is_closed) => Err(closed()),
                    outcome = with_timeout(timeout, work) => outcome,
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

    /// The path on disk if the complete file is on disk and verified, otherwise `None`.
    #[getter]
    fn whole_path(&self, py: Python<'_>) -> PyResult<Option<OsString>> {
        entry(py, || {
            Ok(self.open()?.of_any_process().and_then(OpenFile::whole_path).map(|path| path.as_os_str().into()))
        })
    }

    /// Returns the descriptor for reading the bytes `start..stop`, or `None` if they are not available yet.
    fn ready(&self, py: Python<'_>, start: u64, stop: u64) -> PyResult<Option<RawFd>> {
        entry(py, || self.ready_fd(start, stop))
    }

    /// Waits until the bytes `start..stop` can be read.
    fn wait(&self, py: Python<'_>, start: u64, stop: u64) -> PyResult<Call> {
        self.wait_call(py, |open| async move {
            let file = open.get().ok_or_else(incomplete_at_fork)?;
            file.wait(start..stop).await?;
            Ok(CallOutput::Json(json!(null)))
        })
    }

    /// Waits until the complete file is on disk, verified and leased. The output is its path.
    fn whole(&self, py: Python<'_>) -> PyResult<Call> {
        self.wait_call(py, |open| async move {
            let file = open.get().ok_or_else(incomplete_at_fork)?;
            Ok(CallOutput::Path(file.whole().await?))
        })
    }

    /// Returns the progress of the download. The fields are those of `Call.snapshot`.
    fn snapshot(&self, py: Python<'_>) -> PyResult<Snapshot> {
        entry(py, || {
            let open = self.open()?;
            let progress = open.of_any_process().map(|open| open.progress().clone()).unwrap_or_default();
            Ok(snapshot(&[progress]))
        })
    }

    /// Closes the file and ends waits for it in other threads. Closing it again has no effect.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        entry(py, || {
            drop(self.open.lock().take());
            // In a forked child no thread waits, because `wait_call` fails.
            if let Some(close_sender) = self.closed.get() {
                close_sender.send_replace(true);
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
fn incomplete_at_fork() -> Error {
    Error::new(
        ErrorKind::Other,
        "this file was still being downloaded when the process was forked, and only the parent can read it",
    )
    .hint("open it again in this process, or fork after the download")
}
