//! Decides whether a file is written through the page cache or past it (O_DIRECT).
//!
//! A buffered write leaves the file in memory, where a reader on this node finds it faster than on disk. A direct write
//! evicts nothing else from memory, does not count against a pod's memory limit, and puts the bytes on disk at once.

use super::memory;
use crate::config::WriteMode;

/// Minimum size in bytes of a file that is written with O_DIRECT. Smaller files would gain nothing.
const DIRECT_BYTES_MIN: u64 = 64 << 20;

/// The purpose of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// The files are read on this machine right after the download.
    #[default]
    Read,
    /// The files are stored durably for later use.
    Keep,
}

/// Returns true if a file of `file_bytes` is to be written with O_DIRECT, in a download of `download_bytes` in total.
///
/// A file that is hashed in order is always buffered, because parts that arrive early are read back from the page
/// cache.
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
        // Buffered, unless the download would take more than half of the free memory.
        (WriteMode::Auto, Purpose::Read) => memory::free_bytes().is_some_and(|free| download_bytes > free / 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_to_be_read_is_buffered_unless_it_exceeds_free_memory() {
        let large = DIRECT_BYTES_MIN;
        let direct = |mode, purpose, download_bytes| goes_direct(mode, purpose, large, download_bytes, false);
        assert!(!direct(WriteMode::Auto, Purpose::Read, large));
        assert!(direct(WriteMode::Auto, Purpose::Read, u64::MAX), "the download exceeds any memory");
        assert!(direct(WriteMode::Auto, Purpose::Keep, large));
        assert!(
            !direct(WriteMode::Buffered, Purpose::Keep, u64::MAX) && direct(WriteMode::Direct, Purpose::Read, large)
        );
        assert!(!goes_direct(WriteMode::Direct, Purpose::Keep, large - 1, u64::MAX, false), "the file is small");
        assert!(!goes_direct(WriteMode::Direct, Purpose::Keep, large, large, true), "the file is hashed in order");
    }
}
