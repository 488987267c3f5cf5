//! Counters of connections.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of connections. They only grow, except `open`.
#[derive(Debug, Default)]
pub struct ConnectionCounters {
    open: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    evicted: AtomicU64,
    handshake_failures: AtomicU64,
    head_timeouts: AtomicU64,
    idle_timeouts: AtomicU64,
    body_timeouts: AtomicU64,
    send_timeouts: AtomicU64,
    accept_errors: AtomicU64,
}

/// Defines a method that reads a counter, and one that adds 1 to it.
macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident $count:ident;)*) => {
        impl ConnectionCounters {
            $(
                $(#[$doc])*
                pub fn $field(&self) -> u64 {
                    self.$field.load(Ordering::Relaxed)
                }

                pub(super) fn $count(&self) {
                    self.$field.fetch_add(1, Ordering::Relaxed);
                }
            )*

            /// Returns all counters by name, except that of open connections.
            pub(crate) fn by_outcome(&self) -> BTreeMap<&'static str, u64> {
                BTreeMap::from([$((stringify!($field), self.$field()),)*])
            }
        }
    };
}

counters! {
    /// Returns the number of accepted connections.
    accepted count_accepted;
    /// Returns the number of connections that were refused because too many were open.
    refused count_refused;
    /// Returns the number of connections that were closed to make room for new ones.
    evicted count_evicted;
    /// Returns the number of TLS handshakes that failed or took too long.
    handshake_failures count_handshake_failure;
    /// Returns the number of connections that were closed because no request head was complete in time.
    head_timeouts count_head_timeout;
    /// Returns the number of kept-alive connections that were closed because no request followed.
    idle_timeouts count_idle_timeout;
    /// Returns the number of request bodies that arrived too slowly.
    body_timeouts count_body_timeout;
    /// Returns the number of connections that were closed because the client stopped reading.
    send_timeouts count_send_timeout;
    /// Returns the number of failures to accept a connection for lack of descriptors or memory.
    accept_errors count_accept_error;
}

impl ConnectionCounters {
    /// Returns the number of open connections.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn set_open(&self, open: usize) {
        self.open.store(open as u64, Ordering::Relaxed);
    }
}
