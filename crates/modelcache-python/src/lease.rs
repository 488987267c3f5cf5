//! What a get lent: a path, and the hold on it.

use crate::answers;
use crate::process::{self, Owned};
use modelcache::cache::Artifact;
use pyo3::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// A lent artifact. The path stays valid until `release`, or until this object is gone.
#[pyclass(frozen, module = "modelcache._native")]
pub(crate) struct Lease {
    path: PathBuf,
    name: String,
    version: String,
    report: String,
    artifact: Mutex<Owned<Artifact>>,
}

impl Lease {
    pub(crate) fn new(artifact: Artifact, path: PathBuf) -> Self {
        Self {
            path,
            name: artifact.key.name.to_string(),
            version: artifact.key.version.to_string(),
            report: answers::got(&artifact).to_string(),
            artifact: Mutex::new(Owned::new(artifact)),
        }
    }
}

#[pymethods]
impl Lease {
    /// The file, or the folder of a tree.
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

    /// How it came here, as JSON.
    #[getter]
    fn report(&self) -> &str {
        &self.report
    }

    /// Lets go of it; again changes nothing.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        process::entry(py, |_| {
            drop(self.artifact.lock().unwrap_or_else(PoisonError::into_inner).take());
            Ok(())
        })
    }
}
