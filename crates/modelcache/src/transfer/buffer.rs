//! Pool of page-aligned buffers for slices, shared by all fills. Its size is a share of the memory budget
//! (`engine.rs`).
//!
//! If there are many connections, the pool gives smaller buffers. If all bytes are in use, a task that needs a buffer
//! waits, and arriving bytes stay in the HTTP client and in the kernel. Deadlock cannot occur, because no task waits
//! for a second buffer while it holds a first one.

use crate::disk::{ALIGNMENT, WHOLE_BYTES_MAX};
use crate::mutex::Mutex;
use std::ops::Deref;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Largest size of a slice, the unit of I/O: the bytes that are received, hashed and written at a time.
pub(crate) const SLICE_BYTES: usize = 512 << 10;
/// Smallest size of a buffer. Smaller ones would cost too many system calls, and a small file must fit into each.
const SLICE_BYTES_MIN: usize = WHOLE_BYTES_MAX as usize;
/// Lower bound on the size of the pool in bytes, however little address space is left.
const POOL_BYTES_MIN: usize = 8 * SLICE_BYTES;

/// A pool of reusable buffers. Clones share one pool.
#[derive(Debug, Clone)]
pub(crate) struct BufferPool {
    /// The memory of free buffers that were used before.
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    /// One permit for each free [`SLICE_BYTES_MIN`] bytes.
    permits: Arc<Semaphore>,
    /// Bytes of all buffers, in use and free.
    bytes: usize,
}

/// A buffer for one slice; its memory starts at a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub(crate) struct Buffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Returns the permits to the pool on drop. `None` only if the semaphore were closed, which never happens.
    _permit: Option<OwnedSemaphorePermit>,
}

impl BufferPool {
    /// Creates a pool of `bytes`. If address space is limited, it takes at most a quarter of `address_space_left`
    /// (bytes).
    pub(crate) fn new(bytes: usize, address_space_left: Option<u64>) -> Self {
        let fitting = address_space_left.map_or(usize::MAX, |left| usize::try_from(left / 4).unwrap_or(usize::MAX));
        let bytes = bytes.min(fitting).max(POOL_BYTES_MIN) / SLICE_BYTES * SLICE_BYTES;
        Self { idle: Arc::default(), permits: Arc::new(Semaphore::new(bytes / SLICE_BYTES_MIN)), bytes }
    }

    /// Returns the size of the pool in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the largest slice size, in bytes, with which each of `connections` connections can have a buffer. It is
    /// at least [`SLICE_BYTES_MIN`], even if the pool is then too small for all.
    pub(crate) fn slice_bytes(&self, connections: usize) -> usize {
        let each = (self.bytes / connections.max(1)).clamp(SLICE_BYTES_MIN, SLICE_BYTES);
        1 << each.ilog2()
    }

    /// Returns an empty buffer for a slice of `slice_bytes`. Waits until there is room for it.
    pub(crate) async fn take(&self, slice_bytes: usize) -> Buffer {
        self.buffer(slice_bytes, self.permits.clone().acquire_many_owned(permits_for(slice_bytes)).await.ok())
    }

    /// Returns a second buffer, for use while the workers have the first one. Returns `None` if half of the pool is in
    /// use: the other half is reserved for first buffers.
    pub(crate) fn spare(&self, slice_bytes: usize) -> Option<Buffer> {
        if self.is_half_used() {
            return None;
        }
        let permit = self.permits.clone().try_acquire_many_owned(permits_for(slice_bytes)).ok()?;
        Some(self.buffer(slice_bytes, Some(permit)))
    }

    /// Returns true if half of the pool or more is in use, so that second buffers should be returned.
    pub(crate) fn is_half_used(&self) -> bool {
        self.permits.available_permits() * SLICE_BYTES_MIN <= self.bytes / 2
    }

    /// Returns a buffer, reusing the memory of an earlier one if possible.
    fn buffer(&self, slice_bytes: usize, permit: Option<OwnedSemaphorePermit>) -> Buffer {
        // O_DIRECT needs aligned memory. The storage has `ALIGNMENT` spare bytes, so that an aligned start exists in
        // it.
        let storage_bytes = slice_bytes + ALIGNMENT;
        let reused = {
            let mut idle = self.idle.lock();
            // Release idle memory of another size. Kept beside new buffers, it would exceed the size of the pool.
            idle.retain(|storage| storage.len() == storage_bytes);
            idle.pop()
        };
        let storage = reused.unwrap_or_else(|| vec![0; storage_bytes]);
        let start = storage.as_ptr().align_offset(ALIGNMENT);
        Buffer { storage, start, len: 0, idle: self.idle.clone(), _permit: permit }
    }
}

/// Returns the number of permits that a buffer of `slice_bytes` needs.
fn permits_for(slice_bytes: usize) -> u32 {
    slice_bytes.div_ceil(SLICE_BYTES_MIN) as u32
}

impl Buffer {
    /// Returns the largest slice that fits, in bytes.
    pub(crate) fn capacity(&self) -> usize {
        self.storage.len() - ALIGNMENT
    }

    /// Appends bytes until the buffer is full or holds `limit` bytes. Returns the number of bytes taken from `bytes`.
    pub(crate) fn fill(&mut self, bytes: &[u8], limit: usize) -> usize {
        let taken = bytes.len().min(limit.min(self.capacity()) - self.len);
        let end = self.start + self.len;
        self.storage[end..end + taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }

    /// Returns a mutable slice of `len` bytes (at most [`capacity`](Self::capacity)) to write into, replacing the
    /// previous content.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        self.len = len.min(self.capacity());
        &mut self.storage[self.start..self.start + self.len]
    }

    /// Empties the buffer.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let storage = std::mem::take(&mut self.storage);
        self.idle.lock().push(storage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL_BYTES: usize = 24 << 20;

    #[test]
    fn buffers_are_aligned_bounded_and_reused() {
        let pool = BufferPool::new(POOL_BYTES, None);
        for size in [SLICE_BYTES, SLICE_BYTES, SLICE_BYTES_MIN] {
            let mut buffer = pool.spare(size).expect("there is one");
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(buffer.fill(&[7; 10], 4), 4);
            assert_eq!(buffer.fill(&vec![8; 2 * SLICE_BYTES], usize::MAX), size - 4);
            assert_eq!((&buffer[..4], buffer.len()), (&[7; 4][..], size));
        }
        assert_eq!(pool.idle.lock().len(), 1, "memory of another size is released");
    }

    #[test]
    fn limited_address_space_makes_the_pool_smaller() {
        let mib = |left| BufferPool::new(POOL_BYTES, left).bytes >> 20;
        assert_eq!((mib(Some(0)), mib(Some(40 << 20)), mib(Some(1 << 40))), (4, 10, 24));
    }

    #[test]
    fn many_connections_get_small_buffers() {
        let kib = |connections| BufferPool::new(POOL_BYTES, None).slice_bytes(connections) >> 10;
        assert_eq!([0, 16, 48, 49, 64, 192, 256, 10_000].map(kib), [512, 512, 512, 256, 256, 128, 64, 64]);
    }

    #[tokio::test]
    async fn the_pool_never_has_more_than_its_bytes() {
        let (pool, all_buffers) = (BufferPool::new(POOL_BYTES, None), POOL_BYTES / SLICE_BYTES);
        let mut all: Vec<_> = std::iter::from_fn(|| pool.spare(SLICE_BYTES)).take(2 * all_buffers).collect();
        assert_eq!(all.len(), all_buffers / 2, "the other half is for first buffers");
        for _ in 0..all_buffers / 2 {
            all.push(pool.take(SLICE_BYTES).await);
        }
        let mut waits = Box::pin(pool.take(SLICE_BYTES_MIN));
        assert!(futures::poll!(&mut waits).is_pending());
        all.pop();
        waits.await;
    }
}
