//! Identity of a process, with which another process on the same machine can detect that the process has ended.
//!
//! A writer on the same machine then need not wait until the claim of a killed writer expires. A process of another
//! machine, container or boot is never taken for ended. If the kernel has reused the process id, the process counts as
//! alive, and the next writer waits until the claim expires.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

/// A process on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    /// The kernel's boot id, which changes at every boot.
    boot: String,
    /// The PID namespace of `pid`.
    pid_namespace: String,
    pid: u32,
}

impl Process {
    /// Returns the current process, or `None` if `/proc` is not readable.
    pub(super) fn current() -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?.to_string_lossy().into_owned();
        Some(Self { boot, pid_namespace: namespace, pid: std::process::id() })
    }

    /// Returns true if the process has certainly ended.
    pub(super) fn has_ended(&self) -> bool {
        // A process id is meaningful only in the same boot and PID namespace.
        let shares_pids = |current: Self| current.boot == self.boot && current.pid_namespace == self.pid_namespace;
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        match pid.filter(|_| Self::current().is_some_and(shares_pids)) {
            // `kill(pid, 0)` sends no signal; `ESRCH` means that there is no such process.
            Some(pid) => test_kill_process(pid) == Err(Errno::SRCH),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_detected_on_its_own_machine_only() {
        let this = Process::current().expect("/proc is readable");
        assert!(!this.has_ended());
        let mut child = std::process::Command::new("true").spawn().expect("starts");
        let other = Process { pid: child.id(), ..this };
        child.wait().expect("ends");
        assert!(other.has_ended());
        assert!(!Process { boot: "another".into(), ..other.clone() }.has_ended());
        assert!(!Process { pid_namespace: "pid:[1]".into(), ..other.clone() }.has_ended());
        assert!(!Process { pid: 0, ..other.clone() }.has_ended() && !Process { pid: u32::MAX, ..other }.has_ended());
    }
}
