//! One pool of page-aligned buffers for all fills: the bound on what a pour may hold in memory.

use crate::disk::ALIGNMENT;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are received, hashed and written at a time.
pub(crate) const SLICE_BYTES: usize = 1 << 20;

/// Buffers that were used before, to be used again.
#[derive(Debug, Clone, Default)]
pub(crate) struct BufferPool(Arc<Mutex<Vec<Vec<u8>>>>);

/// A buffer of [`SLICE_BYTES`] whose memory starts at a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub(crate) struct Buffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
    pool: BufferPool,
}

impl BufferPool {
    /// An empty buffer.
    pub(crate) fn take(&self) -> Buffer {
        let reused = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let storage = reused.unwrap_or_else(|| vec![0; SLICE_BYTES + ALIGNMENT]);
        let start = storage.as_ptr().align_offset(ALIGNMENT);
        Buffer { storage, start, len: 0, pool: self.clone() }
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
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(storage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_bounded_and_used_again() {
        let pool = BufferPool::default();
        for _ in 0..2 {
            let mut buffer = pool.take();
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(buffer.fill(&[7; 10], 4), 4);
            assert_eq!(buffer.fill(&vec![8; 2 * SLICE_BYTES], usize::MAX), SLICE_BYTES - 4);
            assert_eq!((&buffer[..4], buffer.len()), (&[7; 4][..], SLICE_BYTES));
        }
        assert_eq!(pool.0.lock().expect("lock").len(), 1);
    }
}
