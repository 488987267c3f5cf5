//! Leases that outlive this program: the process becomes another one and goes on holding what it was lent.

use super::Artifact;
use crate::error::Result;

impl Artifact {
    /// Lets the lease survive the `exec` that comes next: whatever this process becomes holds the artifact until it
    /// ends. Without this, the lease falls at the `exec`. Any child started from here on inherits the lease, too.
    pub fn hold_through_exec(&self) -> Result<()> {
        self._lent.hold_through_exec()
    }
}
