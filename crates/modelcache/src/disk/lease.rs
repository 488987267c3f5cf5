//! Keeps a lease through the `exec` system call: its descriptor stays open, and the kernel releases the lock when the
//! last copy of the descriptor is closed.

use super::LeasedArtifact;
use super::io_error::IoContext;
use crate::error::Result;
use rustix::io::FdFlags;

impl LeasedArtifact {
    /// Clears the close-on-exec flag of the lease's descriptor. Does nothing if there is no lease (a read-only
    /// directory without a lock file, or a lower directory).
    pub(crate) fn hold_through_exec(&self) -> Result<()> {
        match &self.lease {
            Some(lease) => {
                rustix::io::fcntl_setfd(lease.file(), FdFlags::empty()).at("keep the lease of", self.dir.path())
            }
            None => Ok(()),
        }
    }
}
