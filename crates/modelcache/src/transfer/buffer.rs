//! One pool of page-aligned buffers for all fills: the bound on what a pour may hold in memory.
//!
//! There are [`BUFFERS_MAX`] of them and never more, and fewer where address space is limited: who needs one when all are
//! in use waits, while what comes waits in the kernel. Nobody waits for a second one while holding a first, so that waiting always ends.

use crate::disk::ALIGNMENT;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that are received, hashed and written at a time.
pub(crate) const SLICE_BYTES: usize = 512 << 10;
/// All there are: 24 MiB.
const BUFFERS_MAX: usize = 48;
/// As many as there are at least, however little address space is left.
const BUFFERS_MIN: usize = 8;

/// Buffers that were used before, to be used again.
#[derive(Debug, Clone)]
pub(crate) struct BufferPool {
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    left: Arc<Semaphore>,
    buffers: usize,
}

/// A buffer of [`SLICE_BYTES`] whose memory starts at a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub(crate) struct Buffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    /// `None` where the pool was closed, which it never is.
    _taken: Option<OwnedSemaphorePermit>,
}

impl BufferPool {
    /// A pool that takes at most a quarter of `address_space_left`, where that is limited.
    pub(crate) fn new(address_space_left: Option<u64>) -> Self {
        let fitting = |left: u64| usize::try_from(left / 4 / SLICE_BYTES as u64).unwrap_or(BUFFERS_MAX);
        let buffers = address_space_left.map_or(BUFFERS_MAX, fitting).clamp(BUFFERS_MIN, BUFFERS_MAX);
        Self { idle: Arc::default(), left: Arc::new(Semaphore::new(buffers)), buffers }
    }

    /// An empty buffer, as soon as there is one.
    pub(crate) async fn take(&self) -> Buffer {
        self.buffer(self.left.clone().acquire_owned().await.ok())
    }

    /// A second buffer for who has one with the workers, if so few are in use that nobody will miss it.
    pub(crate) fn spare(&self) -> Option<Buffer> {
        if self.is_tight() {
            return None;
        }
        Some(self.buffer(Some(self.left.clone().try_acquire_owned().ok()?)))
    }

    /// Whether second buffers should be given back.
    pub(crate) fn is_tight(&self) -> bool {
        self.left.available_permits() <= self.buffers / 2
    }

    fn buffer(&self, taken: Option<OwnedSemaphorePermit>) -> Buffer {
        let reused = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let storage = reused.unwrap_or_else(|| vec![0; SLICE_BYTES + ALIGNMENT]);
        let start = storage.as_ptr().align_offset(ALIGNMENT);
        Buffer { storage, start, len: 0, idle: self.idle.clone(), _taken: taken }
    }
}

impl Buffer {
    /// Takes as much of `bytes` as fits (and at most `limit` in all); how much that was.
    pub(crate) fn fill(&mut self, bytes: &[u8], limit: usize) -> usize {
        let take = bytes.len().min(limit.min(SLICE_BYTES) - self.len);
        let at = self.start + self.len;
        self.storage[at..at + take].copy_from_slice(&bytes[..take]);
        self.len += take;
        take
    }

    /// Room for `len` bytes (at most [`SLICE_BYTES`]), to be written into; what was there is forgotten.
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        self.len = len.min(SLICE_BYTES);
        &mut self.storage[self.start..self.start + self.len]
    }

    /// Forgets what it holds.
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
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(storage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_bounded_and_used_again() {
        let pool = BufferPool::new(None);
        for _ in 0..2 {
            let mut buffer = pool.spare().expect("there is one");
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(buffer.fill(&[7; 10], 4), 4);
            assert_eq!(buffer.fill(&vec![8; 2 * SLICE_BYTES], usize::MAX), SLICE_BYTES - 4);
            assert_eq!((&buffer[..4], buffer.len()), (&[7; 4][..], SLICE_BYTES));
        }
        assert_eq!(pool.idle.lock().expect("lock").len(), 1);
    }

    #[test]
    fn limited_address_space_makes_the_pool_smaller() {
        let buffers = |left| BufferPool::new(left).buffers;
        assert_eq!((buffers(Some(0)), buffers(Some(40 << 20)), buffers(Some(1 << 40))), (8, 20, 48));
    }

    #[tokio::test]
    async fn there_are_so_many_and_no_more() {
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
