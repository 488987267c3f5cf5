//! Pool of page-aligned buffers, shared by all fills: it bounds the memory of all downloads.
//!
//! The pool has [`BUFFERS_MAX`] buffers, or fewer if address space is limited. If all are in use, a task that needs a
//! buffer waits, and bytes that arrive stay in the kernel. Deadlock cannot occur, because no task waits for a second
//! buffer while it holds a first one.

use crate::disk::ALIGNMENT;
use crate::mutex::Mutex;
use std::ops::Deref;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Size of a slice, the unit of I/O: the bytes that are received, hashed and written at a time.
pub(crate) const SLICE_BYTES: usize = 512 << 10;
/// Maximum number of buffers in the pool: 24 MiB in total.
const BUFFERS_MAX: usize = 48;
/// Lower bound on the number of buffers, however little address space is left.
const BUFFERS_MIN: usize = 8;

/// A pool of reusable buffers. Clones share one pool.
#[derive(Debug, Clone)]
pub(crate) struct BufferPool {
    /// The memory of free buffers that were used before.
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    /// One permit for each free buffer.
    permits: Arc<Semaphore>,
    /// Number of buffers, in use and free.
    buffers: usize,
}

/// A buffer of [`SLICE_BYTES`]; its memory starts at a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub(crate) struct Buffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Returns the permit to the pool on drop. `None` only if the semaphore were closed, which never happens.
    _permit: Option<OwnedSemaphorePermit>,
}

impl BufferPool {
    /// Creates a pool. If address space is limited, the pool takes at most a quarter of `address_space_left` (bytes).
    pub(crate) fn new(address_space_left: Option<u64>) -> Self {
        let fitting = |left: u64| usize::try_from(left / 4 / SLICE_BYTES as u64).unwrap_or(BUFFERS_MAX);
        let buffers = address_space_left.map_or(BUFFERS_MAX, fitting).clamp(BUFFERS_MIN, BUFFERS_MAX);
        Self { idle: Arc::default(), permits: Arc::new(Semaphore::new(buffers)), buffers }
    }

    /// Returns an empty buffer. Waits until one is free.
    pub(crate) async fn take(&self) -> Buffer {
        self.buffer(self.permits.clone().acquire_owned().await.ok())
    }

    /// Returns a second buffer, for use while the workers have the first one, or `None` if half of the pool is in use:
    /// that half is reserved for first buffers.
    pub(crate) fn spare(&self) -> Option<Buffer> {
        if self.is_half_used() {
            return None;
        }
        Some(self.buffer(Some(self.permits.clone().try_acquire_owned().ok()?)))
    }

    /// Returns true if half of the pool or more is in use, so that second buffers should be returned.
    pub(crate) fn is_half_used(&self) -> bool {
        self.permits.available_permits() <= self.buffers / 2
    }

    /// Returns a buffer, reusing the memory of an earlier one if possible.
    fn buffer(&self, permit: Option<OwnedSemaphorePermit>) -> Buffer {
        let reused = self.idle.lock().pop();
        let storage = reused.unwrap_or_else(|| vec![0; SLICE_BYTES + ALIGNMENT]);
        // O_DIRECT needs aligned memory. The storage has `ALIGNMENT` spare bytes, so that an aligned start exists in
        // it.
        let start = storage.as_ptr().align_offset(ALIGNMENT);
        Buffer { storage, start, len: 0, idle: self.idle.clone(), _permit: permit }
    }
}

impl Buffer {
    /// Appends bytes until the buffer is full or holds `limit` bytes. Returns the number of bytes taken from `bytes`.
    pub(crate) fn fill(&mut self, bytes: &[u8], limit: usize) -> usize {
        let taken = bytes.len().min(limit.min(SLICE_BYTES) - self.len);
        let end = self.start + self.len;
        self.storage[end..end + taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }

    /// Returns a mutable slice of `len` bytes (at most [`SLICE_BYTES`]) to write into, replacing the previous content.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        self.len = len.min(SLICE_BYTES);
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

    #[test]
    fn buffers_are_aligned_bounded_and_reused() {
        let pool = BufferPool::new(None);
        for _ in 0..2 {
            let mut buffer = pool.spare().expect("there is one");
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(buffer.fill(&[7; 10], 4), 4);
            assert_eq!(buffer.fill(&vec![8; 2 * SLICE_BYTES], usize::MAX), SLICE_BYTES - 4);
            assert_eq!((&buffer[..4], buffer.len()), (&[7; 4][..], SLICE_BYTES));
        }
        assert_eq!(pool.idle.lock().len(), 1);
    }

    #[test]
    fn limited_address_space_makes_the_pool_smaller() {
        let buffers = |left| BufferPool::new(left).buffers;
        assert_eq!((buffers(Some(0)), buffers(Some(40 << 20)), buffers(Some(1 << 40))), (8, 20, 48));
    }

    #[tokio::test]
    async fn the_pool_never_has_more_than_its_maximum_of_buffers() {
        let pool = BufferPool::new(None);
        let mut all: Vec<_> = std::iter::from_fn(|| pool.spare()).take(2 * BUFFERS_MAX).collect();
        assert_eq!(all.len(), BUFFERS_MAX / 2, "the other half is for first buffers");
        for _ in 0..BUFFERS_MAX / 2 {
            all.push(pool.take().await);
        }
        let mut waits = Box::pin(pool.take());
        assert!(futures::poll!(&mut waits).is_pending());
        all.pop();
        waits.await;
    }
}
