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
