//! Leases that survive `exec`, for a process that replaces itself with another program.

use super::Artifact;
use crate::error::Result;

impl Artifact {
    /// Keeps the lease across the next `exec`: the new program holds it until it ends. Without this call, `exec`
    /// releases the lease. Every child process that is started after this call inherits the lease as well.
    pub fn hold_through_exec(&self) -> Result<()> {
        self.lease.hold_through_exec()
    }
}
