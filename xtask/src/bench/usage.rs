//! What the programs that were run used.

use anyhow::{Context, Result, ensure};
use std::process::Command;
use std::time::Instant;

/// One run of a program.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) seconds: f64,
    /// On all cores, user and system, of the program and what it ran.
    pub(super) core_seconds: f64,
}

/// Runs `command` to its end and measures it. Nothing else may be a child of this process meanwhile.
pub(super) fn measure(command: &mut Command) -> Result<Run> {
    let (started, before) = (Instant::now(), children_core_seconds());
    let output = command.output().with_context(|| format!("cannot run {}", crate::repository::shown(command)))?;
    let run = Run { seconds: started.elapsed().as_secs_f64(), core_seconds: children_core_seconds() - before };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} ended with {}\n{said}", crate::repository::shown(command), output.status);
    Ok(run)
}

/// Core-seconds of all children that have ended, from `getrusage(2)`; the standard library does not tell them.
#[expect(unsafe_code, reason = "one call that fills one plain structure")]
fn children_core_seconds() -> f64 {
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    // SAFETY: `rusage` is made of integers, for which zeroes are a value, and the call writes into nothing else.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
