//! Reads zip archives: files stored or compressed by deflate.

use super::Guard;
use crate::error::Result;
use crate::limits::ARCHIVE_LIST_BYTES_MAX;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use zip::CompressionMethod;
use zip::read::ZipArchive;

/// Mode bits: the type of a file, and its value for regular files and for folders.
const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;
/// Mode bit: the owner may execute the file.
const EXECUTE: u32 = 0o100;
/// Maximum size of the record at the end of an archive, in bytes: 22 bytes and a comment.
const END_BYTES_MAX: u64 = 22 + 65_535;
/// Beginning of that record.
const END_MAGIC: &[u8] = b"PK\x05\x06";

/// Extracts a zip archive.
pub(super) fn extract(mut file: File, guard: &mut Guard<'_>) -> Result<()> {
    check_list(&mut file, guard)?;
    let mut archive = ZipArchive::new(file).map_err(|cause| guard.damaged(&cause))?;
    for index in 0..archive.len() {
        // First without the content, so that the reason for a refusal is found before it is decompressed.
        let entry = archive.by_index_raw(index).map_err(|cause| guard.damaged(&cause))?;
        let name = entry.name_raw().to_vec();
        let mode = entry.unix_mode();
        let kind = mode.map_or(0, |mode| mode & TYPE);
        let (encrypted, method) = (entry.encrypted(), entry.compression());
        drop(entry);
        if name.contains(&b'\\') {
            return Err(guard.refuse(&name, "its name has a backslash"));
        }
        if name.ends_with(b"/") || kind == FOLDER {
            guard.folder(&name)?;
            continue;
        }
        if !matches!(kind, 0 | REGULAR) {
            return Err(guard.refuse(&name, "it is a link or a device"));
        }
        if encrypted {
            return Err(guard.refuse(&name, "it is encrypted"));
        }
        if !matches!(method, CompressionMethod::Stored | CompressionMethod::Deflated) {
            return Err(guard.refuse(&name, "it is compressed by another method than deflate"));
        }
        let mut entry = archive.by_index(index).map_err(|cause| guard.damaged(&cause))?;
        let size = entry.size();
        guard.file(&name, size, mode.is_some_and(|mode| mode & EXECUTE != 0), &mut entry)?;
        // Read beyond the stated size: this checks the checksum, and that the content ends here.
        match entry.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(guard.refuse(&name, "it is larger than the archive states")),
            Err(cause) => return Err(guard.damaged(&cause)),
        }
    }
    Ok(())
}

/// Fails if the list of files is too large to be kept in memory.
fn check_list(file: &mut File, guard: &Guard<'_>) -> Result<()> {
    let read_end = |file: &mut File| {
        let size = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(size.saturating_sub(END_BYTES_MAX)))?;
        let mut end = Vec::new();
        file.read_to_end(&mut end)?;
        file.rewind()?;
        Ok::<_, std::io::Error>(end)
    };
    let end = read_end(file).map_err(|cause| guard.damaged(&cause))?;
    let Some(at) = end.windows(END_MAGIC.len()).rposition(|window| window == END_MAGIC) else {
        return Err(guard.damaged(&"it has no list of files at its end"));
    };
    let field = |offset: usize, bytes: usize| {
        let field = end.get(at + offset..at + offset + bytes)?;
        Some(field.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    // If the list is too long for these fields, they have their highest values.
    let (files, list_bytes) = (field(10, 2).unwrap_or(0), field(12, 4).unwrap_or(0));
    match files == u64::from(u16::MAX) || list_bytes > ARCHIVE_LIST_BYTES_MAX {
        true => Err(guard.over_limit("it is a zip archive with more than 65,534 files, or with very long names")),
        false => Ok(()),
    }
}
