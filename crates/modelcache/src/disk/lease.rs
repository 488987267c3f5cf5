//! A lease that survives `exec`: its descriptor is no longer closed there. The kernel drops the lock with the last copy.

use super::LeasedArtifact;
use super::io_error::IoContext;
use crate::error::Result;
use rustix::io::FdFlags;

impl LeasedArtifact {
    /// Lets the lease's descriptor survive `exec`. There is none where the directory is read-only and has no lock file.
    pub(crate) fn hold_through_exec(&self) -> Result<()> {
        match &self._lease {
            Some(lease) => {
                rustix::io::fcntl_setfd(lease.file(), FdFlags::empty()).at("keep the lease of", self.dir.path())
            }
            None => Ok(()),
        }
    }
}
