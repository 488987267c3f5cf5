//! Download engine: the limiter, buffers and workers that all fills of a process share.
//!
//! The engine lives as long as any cache that uses it. A forked child creates its own engine, because it does not
//! inherit the requests and worker threads of its parent.

use super::buffer::{Buffer, BufferPool};
use super::controller::CONCURRENCY_MIN;
use super::limiter::Limiter;
use super::workers::Workers;
use crate::disk::free_memory;
use crate::mutex::Mutex;
use crate::runtime::address_space_left;
use rustix::process::{Resource, getrlimit};
use std::sync::{Arc, Weak};

/// Lower bound on the memory that downloads may use, in bytes.
const MEMORY_MIN: usize = 128 << 20;
/// Upper bound on the memory that downloads may use, in bytes: enough for 512 connections.
const MEMORY_MAX: usize = 512 << 20;
/// Downloads may use the free memory divided by this number.
const MEMORY_DIVISOR: u64 = 64;
/// Share of that memory for slice buffers, as numerator and denominator.
const POOL_SHARE: (usize, usize) = (3, 16);
/// Share of that memory for connections, as numerator and denominator. The rest is a reserve.
const CONNECTIONS_SHARE: (usize, usize) = (10, 16);
/// Memory that the HTTP client needs for a connection whose bytes arrive faster than they are processed. Measured as
/// the growth of the peak RSS from 32 to 224 connections.
const CONNECTION_BYTES: usize = 640 << 10;
/// Descriptors to reserve for each request if each is for another file: eight, namely two connections (a redirect opens
/// a second one) and six for the file; and another eight, which the next file and an upload at the same time share.
const DESCRIPTORS_PER_REQUEST: u64 = 16;
/// Descriptors to reserve for [`FILES_MAX`] files, eight each. Each request needs two of the other descriptors, one for
/// each connection.
const DESCRIPTORS_FOR_FILES: u64 = 512;
/// Upper bound on the number of files that one fill downloads concurrently.
const FILES_MAX: usize = 64;

/// The resources that all fills of a process share.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) limiter: Limiter,
    pub(super) buffers: BufferPool,
    pub(super) workers: Workers,
    /// Maximum number of files that one fill downloads concurrently.
    pub(super) files_max: usize,
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
        let address_space_left = address_space_left();
        let memory = memory_budget(free_memory(), address_space_left);
        let buffers = BufferPool::new(memory * POOL_SHARE.0 / POOL_SHARE.1, address_space_left);
        let descriptors = getrlimit(Resource::Nofile).current;
        Self {
            limiter: Limiter::new(connections_max(memory, descriptors)),
            workers: Workers::new(cores, buffers.bytes() / 4),
            buffers,
            files_max: files_max(descriptors),
        }
    }

    /// Returns an empty buffer. Waits until there is room for it.
    pub(super) async fn buffer(&self) -> Buffer {
        self.buffers.take(self.slice_bytes()).await
    }

    /// Returns a second buffer; see [`BufferPool::spare`].
    pub(super) fn spare_buffer(&self) -> Option<Buffer> {
        self.buffers.spare(self.slice_bytes())
    }

    /// Returns the largest slice size, in bytes, with which each connection can have a buffer.
    fn slice_bytes(&self) -> usize {
        self.buffers.slice_bytes(self.limiter.limit())
    }
}

/// Returns the memory that downloads may use, in bytes. `free` is the free memory, if it is known, and
/// `address_space_left` the rest of the address space, if that is limited.
fn memory_budget(free: Option<u64>, address_space_left: Option<u64>) -> usize {
    let share = free.map_or(MEMORY_MIN, |free| usize::try_from(free / MEMORY_DIVISOR).unwrap_or(MEMORY_MAX));
    let fitting = address_space_left.map_or(usize::MAX, |left| usize::try_from(left / 2).unwrap_or(usize::MAX));
    share.clamp(MEMORY_MIN, MEMORY_MAX).min(fitting)
}

/// Returns the highest number of concurrent requests, for a budget of `memory` bytes and the process's limit on
/// descriptors, if it has one.
fn connections_max(memory: usize, descriptors: Option<u64>) -> usize {
    let by_memory = memory * CONNECTIONS_SHARE.0 / CONNECTIONS_SHARE.1 / CONNECTION_BYTES;
    // With few descriptors, assume that each request is for another file.
    let by_descriptors = descriptors.map_or(usize::MAX, |all| {
        let beyond = all.saturating_sub(DESCRIPTORS_FOR_FILES) / 2;
        usize::try_from(beyond.max(all / DESCRIPTORS_PER_REQUEST)).unwrap_or(usize::MAX)
    });
    by_memory.min(by_descriptors).max(CONCURRENCY_MIN)
}

/// Returns the highest number of files that one fill downloads concurrently.
fn files_max(descriptors: Option<u64>) -> usize {
    // Eight descriptors for each file: half of `DESCRIPTORS_PER_REQUEST`.
    let fitting = descriptors.map_or(FILES_MAX as u64, |all| 2 * all / DESCRIPTORS_PER_REQUEST);
    usize::try_from(fitting).unwrap_or(FILES_MAX).clamp(CONCURRENCY_MIN, FILES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_fills_of_a_process_share_one_engine() {
        let one = Engine::shared();
        assert!(Arc::ptr_eq(&one, &Engine::shared()));
    }

    #[test]
    fn connections_are_bounded_by_memory_and_descriptors() {
        assert_eq!(
            [None, Some(0), Some(1 << 30), Some(1 << 34)].map(|free| memory_budget(free, None)),
            [128 << 20, 128 << 20, 128 << 20, 256 << 20]
        );
        assert_eq!(memory_budget(Some(1 << 50), None), MEMORY_MAX);
        assert_eq!(memory_budget(None, Some(100 << 20)), 50 << 20);
        assert_eq!(connections_max(MEMORY_MIN, None), 128);
        assert_eq!(connections_max(MEMORY_MAX, Some(1 << 20)), 512);
        let limits = [Some(1024), Some(512), Some(128), Some(1), None];
        assert_eq!(limits.map(|limit| connections_max(MEMORY_MAX, limit)), [256, 32, 8, CONCURRENCY_MIN, 512]);
        assert_eq!(limits.map(files_max), [64, 64, 16, CONCURRENCY_MIN, 64]);
    }
}
