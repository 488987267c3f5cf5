//! Reads tar archives: those of GNU tar, of POSIX (pax) and the old formats.

use super::{CheckedEntries, TAR_HEAD_BYTES};
use crate::error::Result;
use crate::format::Format;
use crate::limits::{ARCHIVE_BYTES_ALWAYS_ALLOWED, ARCHIVE_HEADER_BYTES_MAX};
use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;
use tar::EntryType;

/// Mode bit: the owner may execute the file.
const EXECUTE: u32 = 0o100;

/// Extracts a tar archive. Reads `stream` to its end, so that a checksum at the end is checked. Returns false if the
/// stream is not a tar archive.
pub(super) fn extract(mut stream: impl Read, guard: &mut CheckedEntries<'_>) -> Result<bool> {
    let mut head = Vec::with_capacity(TAR_HEAD_BYTES);
    let read = stream.by_ref().take(TAR_HEAD_BYTES as u64).read_to_end(&mut head);
    read.map_err(|cause| guard.unreadable(&cause))?;
    if Format::of(&head, u64::MAX) != Format::Tar {
        return Ok(false);
    }
    let header_bytes = Rc::new(Cell::new(0));
    // Headers count as well, because an archive may repeat a header without end. All headers together may take as many
    // bytes as all files together.
    let left = guard.bytes_max().saturating_mul(2);
    let stream = io::Cursor::new(head).chain(stream);
    let mut stream = HeaderLimit { stream, left, header_bytes: header_bytes.clone() };
    let mut archive = tar::Archive::new(&mut stream);
    for entry in archive.entries().map_err(|cause| guard.unreadable(&cause))? {
        let mut entry = entry.map_err(|cause| guard.unreadable(&cause))?;
        header_bytes.set(0);
        let name = entry.path_bytes().into_owned();
        guard.count_entry(&name)?;
        let kind = entry.header().entry_type();
        // Sparse files in the pax format are described by GNU.sparse.* fields, which the crate `tar` does not read.
        let pax = entry.pax_extensions().map_err(|cause| guard.unreadable(&cause))?;
        let is_pax_sparse =
            pax.into_iter().flatten().flatten().any(|field| field.key_bytes().starts_with(b"GNU.sparse."));
        match kind {
            _ if is_pax_sparse => return Err(guard.refusal(&name, "it is a sparse file in the pax format")),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let executable = entry.header().mode().map_err(|cause| guard.unreadable(&cause))? & EXECUTE != 0;
                // Archives older than POSIX mark a folder by a trailing slash.
                if name.ends_with(b"/") {
                    guard.tar_folder(&name, entry.size())?;
                } else {
                    // Content may have any length.
                    header_bytes.set(u64::MAX);
                    let size = entry.size();
                    guard.file(&name, size, executable, &mut entry)?;
                    header_bytes.set(0);
                }
            }
            EntryType::Directory => guard.tar_folder(&name, entry.size())?,
            EntryType::XGlobalHeader => {}
            EntryType::Symlink => return Err(guard.refusal(&name, "it is a symbolic link")),
            EntryType::Link => return Err(guard.refusal(&name, "it is a hard link")),
            EntryType::Char | EntryType::Block => return Err(guard.refusal(&name, "it is a device")),
            EntryType::Fifo => return Err(guard.refusal(&name, "it is a pipe")),
            _ => return Err(guard.refusal(&name, "it is of an unknown type")),
        }
    }
    // After the last file follow blocks of zeros, and the checksum of the compression.
    header_bytes.set(u64::MAX);
    let rest = io::copy(&mut stream.take(ARCHIVE_BYTES_ALWAYS_ALLOWED), &mut io::sink())
        .map_err(|cause| guard.unreadable(&cause))?;
    match rest == ARCHIVE_BYTES_ALWAYS_ALLOWED {
        true => Err(guard.over_limit("more than 64 MiB follow the end of the tar archive")),
        false => Ok(true),
    }
}

/// Limits the bytes of all headers and contents together, and the bytes of the headers between two contents, because
/// long names and pax fields are kept in memory.
struct HeaderLimit<R> {
    stream: R,
    /// Bytes that may still be read, of headers and contents.
    left: u64,
    /// Bytes of headers since the last content; [`u64::MAX`] while content is read.
    header_bytes: Rc<Cell<u64>>,
}

impl<R: Read> Read for HeaderLimit<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            over_limit("its headers and files together take more than twice as many bytes as its files alone may take")
        })?;
        match self.header_bytes.get() {
            u64::MAX => {}
            so_far if so_far + read as u64 > ARCHIVE_HEADER_BYTES_MAX => {
                return Err(over_limit(&format!("a header has more than {ARCHIVE_HEADER_BYTES_MAX} bytes")));
            }
            so_far => self.header_bytes.set(so_far + read as u64),
        }
        Ok(read)
    }
}

/// Returns the error of a reader that has reached a limit, which [`CheckedEntries::unreadable`] recognizes.
fn over_limit(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, message)
}
