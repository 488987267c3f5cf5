//! What all fills of a process share: the limiter, the buffers, the workers.
//!
//! It lives as long as any cache that uses it. A forked child makes its own: requests and workers of its parent are not
//! there.

use super::buffer::BufferPool;
use super::limiter::Limiter;
use super::workers::Workers;
use crate::runtime::address_space_left;
use rustix::process::{Resource, getrlimit};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// See above.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) limiter: Limiter,
    pub(super) buffers: BufferPool,
    pub(super) workers: Workers,
}

/// The engine of this process, with the process's number.
static SHARED: Mutex<Option<(u32, Weak<Engine>)>> = Mutex::new(None);

impl Engine {
    /// The one of this process.
    pub(super) fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let process = std::process::id();
        let there = shared.as_ref().filter(|(owner, _)| *owner == process).and_then(|(_, engine)| engine.upgrade());
        there.unwrap_or_else(|| {
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
    fn everybody_in_a_process_has_the_same_engine() {
        let one = Engine::shared();
        assert!(Arc::ptr_eq(&one, &Engine::shared()));
    }
}
