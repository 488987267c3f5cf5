//! Signals: what is running is dropped, and the exit code tells which signal it was.
//!
//! A signal that was ignored when the program started stays ignored, as `nohup` and a shell's background jobs expect. A
//! handler, unlike an ignored signal, does not outlive an `exec`: the command of `exec` finds the defaults.

use crate::exit;
use std::future::Future;
use std::sync::OnceLock;
use tokio::signal::unix::{SignalKind, signal};

/// A signal that ends the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGHUP: the terminal or the connection is gone.
    HangUp,
    /// SIGINT: the keyboard.
    Interrupt,
    /// SIGTERM: an orchestrator.
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

/// The outcome of `work`, or the signal that came before it was done; `work` is dropped then.
pub(crate) async fn or_signal<T>(work: impl Future<Output = T>) -> Result<T, Signal> {
    fail_writes_beyond_the_file_size_limit();
    tokio::select! {
        outcome = work => Ok(outcome),
        signal = arrival(Signal::HangUp) => Err(signal),
        signal = arrival(Signal::Interrupt) => Err(signal),
        signal = arrival(Signal::Terminate) => Err(signal),
    }
}

/// Waits for a signal, for ever where it is ignored. Where signals cannot be listened to, their default action stays,
/// which ends the process as well.
async fn arrival(awaited: Signal) -> Signal {
    if is_ignored(awaited.kind()) {
        return std::future::pending().await;
    }
    match signal(awaited.kind()) {
        Ok(mut signals) => {
            signals.recv().await;
            awaited
        }
        Err(_) => std::future::pending().await,
    }
}

/// Makes a write beyond `ulimit -f` fail with EFBIG, which is told like a full disk, instead of ending the process: that
/// is what it does while there is any handler for SIGXFSZ.
fn fail_writes_beyond_the_file_size_limit() {
    let kind = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    if !is_ignored(kind) {
        // The handler stays when the listener is dropped.
        drop(signal(kind));
    }
}

/// Whether the process ignored a signal when this was first asked; `false` where `/proc` is not mounted.
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
    async fn a_signal_ends_the_wait_and_tells_which_it_was() {
        let send = async {
            // Listening starts with the first poll, which comes before this sleep ends.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let process = std::process::id().to_string();
            std::process::Command::new("kill").args(["-TERM", &process]).status().expect("kill")
        };
        let (outcome, sent) = tokio::join!(or_signal(std::future::pending::<()>()), send);
        assert!(sent.success());
        assert_eq!(outcome, Err(Signal::Terminate));
        let codes = [Signal::HangUp, Signal::Interrupt, Signal::Terminate].map(Signal::exit_code);
        assert_eq!(codes, [129, 130, 143]);
    }

    #[tokio::test]
    async fn work_that_is_done_is_not_disturbed() {
        assert_eq!(or_signal(async { 7 }).await, Ok(7));
    }

    #[test]
    fn rust_programs_ignore_sigpipe_and_nothing_else_from_the_start() {
        assert!(is_ignored(SignalKind::pipe()));
        assert!(!is_ignored(SignalKind::child()));
    }
}
