//! Whether a file is written through the page cache or past it (O_DIRECT).
//!
//! Through it, a reader on this node finds the file in memory: that is sooner than reading it from the disk. Past it,
//! nothing else is pushed out of memory, a pod's limit is left alone, and the bytes are on the disk at once.

use super::memory;
use crate::config::WriteMode;

/// Smaller files are always written through the page cache: there is nothing to win.
const DIRECT_BYTES_MIN: u64 = 64 << 20;

/// What is fetched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// To be read on this machine right after.
    #[default]
    Read,
    /// To be there, and durable, when it is wanted.
    Keep,
}

/// Whether a file of `file_bytes` goes past the page cache, when `download_bytes` are written in all.
///
/// One that is hashed in order does not, whatever was chosen: what comes early is read back from there.
pub(crate) fn goes_direct(
    mode: WriteMode,
    purpose: Purpose,
    file_bytes: u64,
    download_bytes: u64,
    in_order: bool,
) -> bool {
    if in_order || file_bytes < DIRECT_BYTES_MIN {
        return false;
    }
    match (mode, purpose) {
        (WriteMode::Buffered, _) => false,
        (WriteMode::Direct, _) | (WriteMode::Auto, Purpose::Keep) => true,
        (WriteMode::Auto, Purpose::Read) => memory::free_bytes().is_some_and(|free| download_bytes > free / 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_next_stays_in_memory_unless_it_does_not_fit() {
        let large = DIRECT_BYTES_MIN;
        let direct = |mode, purpose, download_bytes| goes_direct(mode, purpose, large, download_bytes, false);
        assert!(!direct(WriteMode::Auto, Purpose::Read, large));
        assert!(direct(WriteMode::Auto, Purpose::Read, u64::MAX), "more than any memory");
        assert!(direct(WriteMode::Auto, Purpose::Keep, large));
        assert!(
            !direct(WriteMode::Buffered, Purpose::Keep, u64::MAX) && direct(WriteMode::Direct, Purpose::Read, large)
        );
        assert!(!goes_direct(WriteMode::Direct, Purpose::Keep, large - 1, u64::MAX, false), "small");
        assert!(!goes_direct(WriteMode::Direct, Purpose::Keep, large, large, true), "read back");
    }
}
