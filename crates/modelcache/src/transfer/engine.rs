//! Download engine: the limiter, buffers and workers that all fills of a process share.
//!
//! The engine lives as long as any cache that uses it. A forked child creates its own engine, because it does not
//! inherit the requests and worker threads of its parent.

use super::buffer::BufferPool;
use super::limiter::Limiter;
use super::workers::Workers;
use crate::mutex::Mutex;
use crate::runtime::address_space_left;
use rustix::process::{Resource, getrlimit};
use std::sync::{Arc, Weak};

/// The resources that all fills of a process share.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) limiter: Limiter,
    pub(super) buffers: BufferPool,
    pub(super) workers: Workers,
}

/// The engine and the id of the process that created it.
static SHARED: Mutex<Option<(u32, Weak<Engine>)>> = Mutex::new(None);

impl Engine {
    /// Returns the engine of this process, creating it if there is none.
    pub(super) fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock();
        let process = std::process::id();
        // After a fork the id differs, and the inherited engine must not be used.
        let existing = shared.as_ref().filter(|(owner, _)| *owner == process).and_then(|(_, engine)| engine.upgrade());
        existing.unwrap_or_else(|| {
            let engine = Arc::new(Self::new());
            *shared = Some((process, Arc::downgrade(&engine)));
            engine
        })
    }

    fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            limiter: Limiter::new(getrlimit(Resource::Nofile).current),
            buffers: BufferPool::new(address_space_left()),
            workers: Workers::new(cores),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_fills_of_a_process_share_one_engine() {
        let one = Engine::shared();
        assert!(Arc::ptr_eq(&one, &Engine::shared()));
    }
}
