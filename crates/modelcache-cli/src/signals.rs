//! Signals: what is running is dropped, and the exit code tells which signal it was.

use crate::exit;
use std::future::Future;
use tokio::signal::unix::{SignalKind, signal};

/// A signal that ends the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGINT: the keyboard.
    Interrupt,
    /// SIGTERM: an orchestrator.
    Terminate,
}

impl Signal {
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => exit::INTERRUPTED,
            Self::Terminate => exit::TERMINATED,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Interrupt => "interrupted",
            Self::Terminate => "terminated",
        }
    }
}

/// The outcome of `work`, or the signal that came before it was done; `work` is dropped then.
pub(crate) async fn or_signal<T>(work: impl Future<Output = T>) -> Result<T, Signal> {
    tokio::select! {
        outcome = work => Ok(outcome),
        () = arrival(SignalKind::interrupt()) => Err(Signal::Interrupt),
        () = arrival(SignalKind::terminate()) => Err(Signal::Terminate),
    }
}

/// Where signals cannot be listened to, their default action stays, which ends the process as well.
async fn arrival(kind: SignalKind) {
    match signal(kind) {
        Ok(mut signals) => {
            signals.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
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
        assert_eq!((Signal::Terminate.exit_code(), Signal::Interrupt.exit_code()), (143, 130));
    }

    #[tokio::test]
    async fn work_that_is_done_is_not_disturbed() {
        assert_eq!(or_signal(async { 7 }).await, Ok(7));
    }
}
