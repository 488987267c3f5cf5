//! What one connection is doing: shared between its socket, its service and the table of connections.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use modelcache::mutex::Mutex;
use tokio::time::Instant;

use super::limits::ConnectionLimits;

/// The phase of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Connected; no byte of a request has arrived.
    Connected,
    /// Part of a request head has arrived.
    Head,
    /// A request is running: its body arrives, the handler runs, or the response is sent.
    Request,
    /// Kept alive between two requests.
    Idle,
}

/// Why a request body was not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum BodyFailure {
    /// Larger than [`ConnectionLimits::body_bytes`].
    TooLarge = 1,
    /// Slower than [`ConnectionLimits::body_rate_min`].
    TooSlow = 2,
}

/// The state of one connection.
#[derive(Debug)]
pub(super) struct Activity {
    /// The phase, and when it began.
    phase: Mutex<(Phase, Instant)>,
    /// When the connection began to wait until its client reads a response or sends a request body.
    pub(super) stalled_since: Mutex<Option<Instant>>,
    /// Whether the client may still be sending a request body that nobody reads.
    unread_body: AtomicBool,
    body_failure: AtomicU8,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            phase: Mutex::new((Phase::Connected, Instant::now())),
            stalled_since: Mutex::new(None),
            unread_body: AtomicBool::new(false),
            body_failure: AtomicU8::new(0),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase.lock().0
    }

    /// Restarts the time for the first request head, after the TLS handshake.
    pub(super) fn handshake_done(&self) {
        *self.phase.lock() = (Phase::Connected, Instant::now());
    }

    /// Records that bytes arrived.
    pub(super) fn received(&self) {
        let mut phase = self.phase.lock();
        match phase.0 {
            // The time for the first head runs from the connection.
            Phase::Connected => phase.0 = Phase::Head,
            Phase::Idle => *phase = (Phase::Head, Instant::now()),
            Phase::Head | Phase::Request => {}
        }
    }

    /// Records that a request head is complete.
    pub(super) fn request_started(&self) {
        *self.phase.lock() = (Phase::Request, Instant::now());
        self.unread_body.store(false, Ordering::Relaxed);
        self.body_failure.store(0, Ordering::Relaxed);
    }

    /// Records that the last byte of a response was handed to the connection.
    pub(super) fn response_ended(&self) {
        *self.phase.lock() = (Phase::Idle, Instant::now());
    }

    /// Returns when the connection is to be closed, unless its phase changes. `None` while a request runs.
    pub(super) fn deadline(&self, limits: &ConnectionLimits) -> Option<Instant> {
        let (phase, since) = *self.phase.lock();
        match phase {
            Phase::Connected | Phase::Head => Some(since + limits.head_timeout),
            Phase::Idle => Some(since + limits.idle_timeout),
            Phase::Request => None,
        }
    }

    /// Records whether the connection waits for its client. Keeps the time at which the wait began.
    pub(super) fn set_stalled(&self, stalled: bool) {
        let mut since = self.stalled_since.lock();
        if stalled {
            since.get_or_insert_with(Instant::now);
        } else {
            *since = None;
        }
    }

    /// Returns how long the connection has been waiting for its client.
    pub(super) fn stalled_for(&self) -> Option<Duration> {
        self.stalled_since.lock().map(|since| since.elapsed())
    }

    pub(super) fn set_unread_body(&self) {
        self.unread_body.store(true, Ordering::Relaxed);
    }

    /// Returns true if the client may still be sending, so that closing at once could discard the response.
    pub(super) fn has_unread_input(&self) -> bool {
        self.unread_body.load(Ordering::Relaxed) || self.phase() == Phase::Head
    }

    pub(super) fn set_body_failure(&self, failure: BodyFailure) {
        self.body_failure.store(failure as u8, Ordering::Relaxed);
    }

    pub(super) fn body_failure(&self) -> Option<BodyFailure> {
        match self.body_failure.load(Ordering::Relaxed) {
            1 => Some(BodyFailure::TooLarge),
            2 => Some(BodyFailure::TooSlow),
            _ => None,
        }
    }
}
