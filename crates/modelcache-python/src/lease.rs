//! `Lease`: the native object behind `modelcache.Lease`.

use crate::call;
use crate::process::{self, ProcessLocal};
use modelcache::Result;
use modelcache::cache::Artifact;
use modelcache::mutex::Mutex;
use pyo3::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;

/// A leased artifact. It cannot be evicted, and `path` stays valid, until `release` or until this object is freed.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct Lease {
    path: PathBuf,
    name: String,
    version: String,
    /// The report of the get, as JSON.
    report: String,
    /// Holds the lease. A forked child does not release it.
    artifact: Mutex<ProcessLocal<Artifact>>,
}

impl Lease {
    pub(crate) fn new(artifact: Artifact) -> Result<Self> {
        Ok(Self {
            path: artifact.path.clone(),
            name: artifact.key.name.to_string(),
            version: artifact.key.version.to_string(),
            report: call::json(&artifact.answer())?.to_string(),
            artifact: Mutex::new(ProcessLocal::new(artifact)),
        })
    }
}

#[pymethods]
impl Lease {
    /// The path of the file, or of the folder if the artifact is a tree.
    #[getter]
    fn path(&self) -> OsString {
        self.path.clone().into_os_string()
    }

    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    #[getter]
    fn version(&self) -> &str {
        &self.version
    }

    /// The report of the get, as `modelcache get --json` prints it.
    #[getter]
    fn report(&self) -> &str {
        &self.report
    }

    /// Releases the lease. Releasing it again has no effect.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        process::entry(py, |_| {
            drop(self.artifact.lock().take());
            Ok(())
        })
    }
}
