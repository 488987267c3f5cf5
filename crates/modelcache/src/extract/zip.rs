//! Reads zip archives: files stored or compressed by deflate.

use super::CheckedEntries;
use crate::error::Result;
use crate::limits::{ARCHIVE_ENTRIES_MAX, ARCHIVE_LIST_BYTES_MAX};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use zip::CompressionMethod;
use zip::read::ZipArchive;

/// Mode bits: the type of a file, and its value for regular files and for folders.
const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;
/// Mode bit: the owner may execute the file.
const EXECUTE: u32 = 0o100;
/// Size of the end-of-central-directory record without its comment, and the maximum size of the comment, in bytes.
const END_BYTES: usize = 22;
const COMMENT_BYTES_MAX: usize = 65_535;
/// Signature of a file header in the central directory, and its size without name, extra field and comment.
const HEADER: &[u8] = b"PK\x01\x02";
const HEADER_BYTES: usize = 46;
/// Signatures of the end-of-central-directory record, of the locator of the zip64 record before it, and of the zip64
/// record.
const END: &[u8] = b"PK\x05\x06";
const ZIP64_LOCATOR: &[u8] = b"PK\x06\x07";
const ZIP64_END: &[u8] = b"PK\x06\x06";
/// Sizes of the locator and of the fixed part of the zip64 record, in bytes.
const ZIP64_LOCATOR_BYTES: usize = 20;
const ZIP64_END_BYTES: usize = 56;

/// Extracts a zip archive.
pub(super) fn extract(file: File, guard: &mut CheckedEntries<'_>) -> Result<()> {
    check_central_directory(&file, guard)?;
    let mut archive = ZipArchive::new(file).map_err(|cause| guard.damaged(&cause))?;
    for index in 0..archive.len() {
        // First without the content, so that the reason for a refusal is found before it is decompressed.
        let entry = archive.by_index_raw(index).map_err(|cause| guard.damaged(&cause))?;
        let name = entry.name_raw().to_vec();
        let mode = entry.unix_mode();
        let kind = mode.map_or(0, |mode| mode & TYPE);
        let (encrypted, method) = (entry.encrypted(), entry.compression());
        drop(entry);
        guard.count_entry(&name)?;
        if name.contains(&b'\\') {
            return Err(guard.refusal_with_hint(
                &name,
                "its name has a backslash",
                "rename that file, and make the archive again",
            ));
        }
        if name.ends_with(b"/") || kind == FOLDER {
            guard.folder(&name)?;
            continue;
        }
        if !matches!(kind, 0 | REGULAR) {
            return Err(guard.refusal(&name, "it is a link or a device"));
        }
        if encrypted {
            return Err(guard.refusal(&name, "it is encrypted"));
        }
        if !matches!(method, CompressionMethod::Stored | CompressionMethod::Deflated) {
            return Err(guard.refusal(&name, "it is compressed by another method than deflate"));
        }
        let mut entry = archive.by_index(index).map_err(|cause| guard.damaged(&cause))?;
        let size = entry.size();
        guard.file(&name, size, mode.is_some_and(|mode| mode & EXECUTE != 0), &mut entry)?;
        // Read beyond the stated size: this checks the checksum, and that the content ends here.
        match entry.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(guard.refusal(&name, "it is larger than the archive states")),
            Err(cause) => return Err(guard.damaged(&cause)),
        }
    }
    Ok(())
}

/// The central directory: the list of files at the end of an archive.
struct CentralDirectory {
    files: u64,
    /// Offset in the archive of its end.
    end: u64,
    /// Size in bytes.
    bytes: u64,
}

/// Fails if the central directory is too large to be kept in memory, or if it has another number of files than the
/// archive states. A reader would leave out the files beyond that number.
fn check_central_directory(file: &File, guard: &CheckedEntries<'_>) -> Result<()> {
    let found = find_central_directory(file).map_err(|cause| guard.damaged(&cause))?;
    let Some(CentralDirectory { files, end, bytes }) = found.filter(|found| found.bytes <= found.end) else {
        return Err(guard.damaged(&"it has no central directory at its end"));
    };
    if files > ARCHIVE_ENTRIES_MAX as u64 || bytes > ARCHIVE_LIST_BYTES_MAX {
        return Err(guard.over_limit(&format!("its central directory has {files} files and {bytes} bytes")));
    }
    let mut headers = vec![0; usize::try_from(bytes).unwrap_or_default()];
    file.read_exact_at(&mut headers, end - bytes).map_err(|cause| guard.damaged(&cause))?;
    let (mut rest, mut counted) = (&headers[..], 0);
    while rest.starts_with(HEADER) {
        let lengths = [28, 30, 32].map(|offset| field(rest, offset, 2).unwrap_or(u64::from(u16::MAX)));
        let length = HEADER_BYTES + usize::try_from(lengths.iter().sum::<u64>()).unwrap_or_default();
        let Some(next) = rest.get(length..) else { break };
        (rest, counted) = (next, counted + 1);
    }
    match rest.is_empty() && counted == files {
        true => Ok(()),
        false => Err(guard.damaged(&format!("it states {files} files, and its central directory lists other ones"))),
    }
}

/// Returns the central directory that the records at the end of the archive state. Returns `None` if there is none, or
/// if the last record does not end with the file: another reader might use an earlier record.
fn find_central_directory(file: &File) -> io::Result<Option<CentralDirectory>> {
    let size = file.metadata()?.len();
    let tail_bytes = size.min((END_BYTES + COMMENT_BYTES_MAX + ZIP64_LOCATOR_BYTES) as u64);
    let mut tail = vec![0; usize::try_from(tail_bytes).unwrap_or_default()];
    file.read_exact_at(&mut tail, size - tail_bytes)?;
    let Some(at) = tail.windows(END.len()).rposition(|window| window == END) else { return Ok(None) };
    let record = &tail[at..];
    let (Some(files), Some(bytes), Some(comment)) = (field(record, 10, 2), field(record, 12, 4), field(record, 20, 2))
    else {
        return Ok(None);
    };
    if END_BYTES as u64 + comment != record.len() as u64 {
        return Ok(None);
    }
    let end = size - record.len() as u64;
    // If there is a zip64 record, a reader may use its values instead. The values of both records must agree. The
    // highest possible value in the first record means that only the zip64 record has the value.
    let locator = at.checked_sub(ZIP64_LOCATOR_BYTES).map(|start| &tail[start..at]);
    let Some(end64) = locator.filter(|locator| locator.starts_with(ZIP64_LOCATOR)).and_then(|it| field(it, 8, 8))
    else {
        return Ok(Some(CentralDirectory { files, end, bytes }));
    };
    let mut record = [0; ZIP64_END_BYTES];
    if end64 > size || file.read_exact_at(&mut record, end64).is_err() || !record.starts_with(ZIP64_END) {
        return Ok(None);
    }
    let (Some(files64), Some(bytes64)) = (field(&record, 32, 8), field(&record, 40, 8)) else { return Ok(None) };
    let agrees =
        (files == files64 || files == u64::from(u16::MAX)) && (bytes == bytes64 || bytes == u64::from(u32::MAX));
    Ok(agrees.then_some(CentralDirectory { files: files64, end: end64, bytes: bytes64 }))
}

/// Returns the little-endian number of `length` bytes at `offset`.
fn field(record: &[u8], offset: usize, length: usize) -> Option<u64> {
    let field = record.get(offset..offset + length)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}
