//! The HTTP daemon of modelcache.

mod listen;

pub use listen::{
    ConnectionCounters, ConnectionLimits, Listeners, Notifier, Scheme, ServeOptions, TlsFiles, serve, watchdog_time,
};
