//! Signals: a signal drops the running command and determines the exit code (128 + signal number).
//!
//! A signal that was ignored when the program started stays ignored, as `nohup` and background jobs of a shell expect.
//! Handlers do not survive the system call `execve`, unlike ignored signals, so the program that `modelcache exec` runs
//! starts with the default actions.

use crate::exit;
use std::future::Future;
use std::sync::OnceLock;
use tokio::signal::unix::{SignalKind, signal};

/// A signal that ends the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGHUP: the terminal or the connection was closed.
    HangUp,
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM: sent by a supervisor such as systemd or Kubernetes.
    Terminate,
}

impl Signal {
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::HangUp => exit::HUNG_UP,
            Self::Interrupt => exit::INTERRUPTED,
            Self::Terminate => exit::TERMINATED,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HangUp => "hangup",
            Self::Interrupt => "interrupted",
            Self::Terminate => "terminated",
        }
    }

    fn kind(self) -> SignalKind {
        match self {
            Self::HangUp => SignalKind::hangup(),
            Self::Interrupt => SignalKind::interrupt(),
            Self::Terminate => SignalKind::terminate(),
        }
    }
}

/// Runs `work` and returns its outcome. Drops `work` and returns the signal if one arrives first.
pub(crate) async fn run_until_signal<T>(work: impl Future<Output = T>) -> Result<T, Signal> {
    fail_writes_beyond_the_file_size_limit();
    tokio::select! {
        outcome = work => Ok(outcome),
        signal = next() => Err(signal),
    }
}

/// Runs `work`, which waits for signals itself. Always returns `Ok`; the type is that of [`run_until_signal`].
pub(crate) async fn run_handling_signals<T>(work: impl Future<Output = T>) -> Result<T, Signal> {
    fail_writes_beyond_the_file_size_limit();
    Ok(work.await)
}

/// Waits for the next signal that ends a command.
pub(crate) async fn next() -> Signal {
    tokio::select! {
        signal = wait_for(Signal::HangUp) => signal,
        signal = wait_for(Signal::Interrupt) => signal,
        signal = wait_for(Signal::Terminate) => signal,
    }
}

/// Waits for a signal; never returns if the signal is ignored. If no handler can be installed, the default action
/// stays, which ends the process, too.
async fn wait_for(expected: Signal) -> Signal {
    if is_ignored(expected.kind()) || !can_register() {
        return std::future::pending().await;
    }
    match signal(expected.kind()) {
        Ok(mut signals) => {
            signals.recv().await;
            expected
        }
        Err(_) => std::future::pending().await,
    }
}

/// Listens for changes of the size of the terminal. Returns `None` if no handler can be installed.
pub(crate) fn resizes() -> Option<tokio::signal::unix::Signal> {
    can_register().then(|| signal(SignalKind::window_change()).ok()).flatten()
}

/// Returns true if enough descriptors are free for the first signal handler. Without them, `tokio` panics.
fn can_register() -> bool {
    static HAS_DESCRIPTORS: OnceLock<bool> = OnceLock::new();
    *HAS_DESCRIPTORS.get_or_init(|| modelcache::runtime::check_free_descriptors(2).is_ok())
}

/// Makes a write beyond `ulimit -f` fail with EFBIG, which is reported like a full disk. Without a handler for SIGXFSZ
/// such a write would end the process.
fn fail_writes_beyond_the_file_size_limit() {
    let kind = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    if !is_ignored(kind) && can_register() {
        // The handler stays when the listener is dropped.
        drop(signal(kind));
    }
}

/// Returns true if the process ignored the signal when this function was first called. Returns false if `/proc` is not
/// mounted.
fn is_ignored(kind: SignalKind) -> bool {
    static IGNORED: OnceLock<u64> = OnceLock::new();
    let mask = IGNORED.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
    });
    mask >> (kind.as_raw_value() - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_signal_ends_the_wait_and_is_returned() {
        let send = async {
            // The handlers are installed by the first poll of `run_until_signal`, long before this sleep ends.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let process = std::process::id().to_string();
            std::process::Command::new("kill").args(["-TERM", &process]).status().expect("kill")
        };
        let (outcome, sent) = tokio::join!(run_until_signal(std::future::pending::<()>()), send);
        assert!(sent.success());
        assert_eq!(outcome, Err(Signal::Terminate));
        let codes = [Signal::HangUp, Signal::Interrupt, Signal::Terminate].map(Signal::exit_code);
        assert_eq!(codes, [129, 130, 143]);
    }

    #[tokio::test]
    async fn finished_work_returns_its_outcome() {
        assert_eq!(run_until_signal(async { 7 }).await, Ok(7));
    }

    #[test]
    fn rust_programs_ignore_sigpipe_and_nothing_else_from_the_start() {
        assert!(is_ignored(SignalKind::pipe()));
        assert!(!is_ignored(SignalKind::child()));
    }
}
