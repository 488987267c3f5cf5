//! Runs programs to their end and measures their usage with `wait4(2)`, including the children they waited for.
//!
//! Servers and this process are not included. A program that does not end is killed after [`LIMIT`].
//!
//! Peak memory is that of the largest process. Until a child has executed its program, the kernel counts this process's
//! memory as the child's. No peak is therefore below that size, so this process must stay small.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use xtask::repository::shell_line;

/// Time after which a program is killed.
const LIMIT: Duration = Duration::from_secs(600);

/// Running programs, to be killed when the bench is interrupted.
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Time and memory that one run of a program used.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    pub(super) seconds: f64,
    /// User and system time on all cores, of the program and its children.
    pub(super) core_seconds: f64,
    /// Peak memory, without the page cache.
    pub(super) rss_bytes: u64,
}

impl Usage {
    /// Returns the usage of this run together with a server that worked for it.
    pub(super) fn with_server(self, server: Self) -> Self {
        Self {
            core_seconds: self.core_seconds + server.core_seconds,
            rss_bytes: self.rss_bytes.max(server.rss_bytes),
            ..self
        }
    }

    /// Returns the usage of this run followed by `next`.
    pub(super) fn then(self, next: Self) -> Self {
        Self {
            seconds: self.seconds + next.seconds,
            core_seconds: self.core_seconds + next.core_seconds,
            rss_bytes: self.rss_bytes.max(next.rss_bytes),
        }
    }
}

/// Runs `command` to its end. Returns its usage and its standard output.
pub(super) fn run(command: &mut Command) -> Result<(Usage, String)> {
    let (usage, status, output) = Running::start(command)?.wait()?;
    let [printed, errors] = output;
    let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    ensure!(status.success(), "`{}` ended with {status}: {last}", shell_line(command));
    Ok((usage, printed))
}

/// Runs `command` to its end and returns its usage.
pub(super) fn measure(command: &mut Command) -> Result<Usage> {
    Ok(run(command)?.0)
}

/// Figures that a script prints, by name, as one line of JSON.
pub(super) struct Figures(Value);

impl Figures {
    /// Runs a script to its end. Returns its usage and the figures that it printed.
    pub(super) fn run(script: &mut Command) -> Result<(Usage, Self)> {
        let (process, printed) = run(script)?;
        Ok((process, Self(serde_json::from_str(&printed).context("the script printed no figures")?)))
    }

    pub(super) fn get(&self, name: &str) -> Result<f64> {
        self.0[name].as_f64().with_context(|| format!("the script printed no {name}"))
    }
}

/// A program that was started.
pub(super) struct Running {
    started: Instant,
    pid: u32,
    /// Standard output and standard error.
    output: [File; 2],
    /// Stops the watchdog when it is dropped.
    _watchdog: Sender<()>,
}

impl Running {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        // Files instead of pipes, because pipes would have to be read while the program runs.
        let output = [tempfile::tempfile()?, tempfile::tempfile()?];
        command.stdin(Stdio::null()).stdout(output[0].try_clone()?).stderr(output[1].try_clone()?);
        let started = Instant::now();
        let pid = command.spawn().with_context(|| format!("cannot run {}", shell_line(command)))?.id();
        running().push(pid);
        let (watchdog, dropped) = channel();
        std::thread::spawn(move || {
            if dropped.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                signal(pid, libc::SIGKILL);
            }
        });
        Ok(Self { started, pid, output, _watchdog: watchdog })
    }

    /// Returns true if the program has not ended yet.
    pub(super) fn is_running(&self) -> bool {
        let state = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        state.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z'))
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends SIGTERM to the program.
    pub(super) fn terminate(&self) {
        signal(self.pid, libc::SIGTERM);
    }

    /// Sends SIGKILL to the program.
    pub(super) fn kill(&self) {
        signal(self.pid, libc::SIGKILL);
    }

    /// Waits for the program to end. Returns its usage, its exit status, its standard output and its standard error.
    pub(super) fn wait(mut self) -> Result<(Usage, ExitStatus, [String; 2])> {
        let (status, resources) = wait4(self.pid)?;
        let usage = Usage {
            seconds: self.started.elapsed().as_secs_f64(),
            core_seconds: core_seconds(&resources),
            rss_bytes: u64::try_from(resources.ru_maxrss).unwrap_or_default() * 1024,
        };
        running().retain(|pid| *pid != self.pid);
        let mut output = [String::new(), String::new()];
        for (file, text) in self.output.iter_mut().zip(&mut output) {
            file.rewind()?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        Ok((usage, status, output))
    }
}

/// Kills all running programs.
pub(super) fn kill_all() {
    running().iter().for_each(|pid| signal(*pid, libc::SIGKILL));
}

fn running() -> std::sync::MutexGuard<'static, Vec<u32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal(pid: u32, number: i32) {
    let (Some(pid), Some(signal)) = (
        i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw),
        rustix::process::Signal::from_named_raw(number),
    ) else {
        return;
    };
    // The program may have ended.
    let _ = rustix::process::kill_process(pid, signal);
}

/// Waits for a child and returns its usage, which the standard library does not report.
#[expect(unsafe_code, reason = "one call that fills two plain structures")]
fn wait4(pid: u32) -> Result<(ExitStatus, libc::rusage)> {
    let pid = libc::pid_t::try_from(pid)?;
    // SAFETY: `rusage` consists of integers, for which zero is a valid value, and the call writes only to `status` and
    // `usage`.
    let (ended, status, usage) = unsafe {
        let (mut status, mut usage) = (0, std::mem::zeroed::<libc::rusage>());
        let ended = libc::wait4(pid, &mut status, 0, &mut usage);
        (ended, status, usage)
    };
    if ended != pid {
        bail!("cannot wait for a program: {}", std::io::Error::last_os_error());
    }
    Ok((ExitStatus::from_raw(status), usage))
}

/// Returns the core-seconds of this process.
#[expect(unsafe_code, reason = "one call that fills one plain structure")]
pub(super) fn own_core_seconds() -> f64 {
    // SAFETY: as in `wait4`.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    core_seconds(&usage)
}

fn core_seconds(usage: &libc::rusage) -> f64 {
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_of_other_programs_is_not_counted() {
        let work = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo $i";
        let beside = std::thread::spawn(move || measure(Command::new("sh").args(["-c", work])));
        let idle = measure(Command::new("sleep").arg("0.2")).expect("sleep runs");
        let busy = beside.join().expect("no panic").expect("sh runs");
        assert!(idle.core_seconds < busy.core_seconds, "{idle:?} {busy:?}");
        assert!(idle.seconds >= 0.2 && idle.rss_bytes > 0);
    }

    #[test]
    fn a_failure_names_the_last_line_of_standard_error() {
        let error =
            measure(Command::new("sh").args(["-c", "echo so >&2; echo why >&2; exit 3"])).expect_err("it fails");
        assert!(error.to_string().ends_with("exit status: 3: why"), "{error}");
    }
}
