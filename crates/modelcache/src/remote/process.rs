//! A process, named so that another one on the same machine can tell that it has ended.
//!
//! What is asked is the kernel, which knows all processes of a namespace: a claim whose writer was killed a moment ago
//! need not be waited out on the machine that it died on. Of any other machine, container or boot nothing is concluded.
//!
//! Surprise: a process that another one's number was given to counts as that one, still alive; that costs a wait.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    /// The kernel's name for its run since the machine started.
    boot: String,
    /// The namespace that `pid` is a number in.
    pid_namespace: String,
    pid: u32,
}

impl Process {
    /// This one; `None` where the kernel does not tell.
    pub(super) fn this() -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?.to_string_lossy().into_owned();
        Some(Self { boot, pid_namespace: namespace, pid: std::process::id() })
    }

    /// Whether it has ended, for certain.
    pub(super) fn has_ended(&self) -> bool {
        let is_here = |this: Self| this.boot == self.boot && this.pid_namespace == self.pid_namespace;
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        match pid.filter(|_| Self::this().is_some_and(is_here)) {
            Some(pid) => test_kill_process(pid) == Err(Errno::SRCH),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_told_on_its_own_machine_only() {
        let this = Process::this().expect("a kernel that tells");
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
