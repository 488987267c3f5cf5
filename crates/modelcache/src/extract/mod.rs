//! Archives: reads tar archives (plain, or compressed by gzip, Zstandard, bzip2 or xz) and zip archives.
//!
//! An archive comes from outside, so nothing in it is trusted. Only regular files are extracted; folders follow from
//! the paths of the files. Links, devices, and names that are absolute or leave the folder are refused, with the name
//! of the entry. Of the mode only the executable bit is kept. Every limit is checked before it is exceeded.

mod tar;
mod zip;

use crate::error::{Error, Result};
use crate::format::Format;
use crate::human;
use crate::key::FilePath;
use crate::limits::{
    ARCHIVE_BYTES_ALWAYS_ALLOWED, ARCHIVE_DEPTH_MAX, ARCHIVE_ENTRIES_MAX, ARCHIVE_NAME_BYTES_MAX, ARCHIVE_RATIO_MAX,
    ARCHIVE_XZ_KIB_MAX, FILE_BYTES_MAX,
};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};

/// Buffer size for reading an archive, in bytes.
const READ_BYTES: usize = 256 * 1024;
/// Number of bytes at the beginning of decompressed content that show whether it is a tar archive.
const TAR_HEAD_BYTES: usize = 512;

/// Receives the files of an archive, in the order of the archive.
pub(crate) trait FileSink {
    /// Takes a file of `size` bytes, and reads its content to the end. A second file with the path of an earlier one
    /// replaces it.
    fn file(&mut self, path: FilePath, size: u64, executable: bool, content: &mut dyn Read) -> Result<()>;
}

/// An archive to extract: its format, size and name.
pub(crate) struct Archive<'a> {
    pub(crate) format: Format,
    /// Size in bytes.
    pub(crate) size: u64,
    /// The name, for messages.
    pub(crate) name: &'a str,
}

/// Returns true if a file of this format may be an archive that this module reads. A Zstandard, bzip2 or xz file is one
/// only if it contains a tar archive.
pub(crate) fn is_archive(format: Format) -> bool {
    matches!(format, Format::Tar | Format::TarGz | Format::Zstd | Format::Bzip2 | Format::Xz | Format::Zip)
}

/// Returns true if a file with this name is meant to be extracted, and not read as it is: it has the extension of an
/// archive, or none. Other formats of models are archives by content, for example `.nemo`, `.keras` and `.npz`.
pub(crate) fn is_named_as_archive(name: &str) -> bool {
    const ENDINGS: [&str; 10] =
        [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip"];
    let name = name.to_ascii_lowercase();
    ENDINGS.iter().any(|ending| name.ends_with(ending)) || !name.contains('.')
}

impl Archive<'_> {
    /// Extracts a tar archive from a stream, which is read to its end. Returns false if the decompressed content is
    /// not a tar archive.
    pub(crate) fn extract_stream(&self, stream: impl Read, into: &mut dyn FileSink) -> Result<bool> {
        let stream = io::BufReader::with_capacity(READ_BYTES, stream);
        let mut guard = CheckedEntries::new(self, into);
        let is_tar = match self.format {
            Format::Tar => tar::extract(stream, &mut guard)?,
            Format::TarGz => tar::extract(flate2::bufread::MultiGzDecoder::new(stream), &mut guard)?,
            Format::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(stream);
                tar::extract(decoder.map_err(|cause| self.damaged(&cause))?, &mut guard)?
            }
            Format::Bzip2 => tar::extract(bzip2::bufread::MultiBzDecoder::new(stream), &mut guard)?,
            Format::Xz => {
                tar::extract(lzma_rust2::XzReader::new_mem_limit(stream, true, ARCHIVE_XZ_KIB_MAX), &mut guard)?
            }
            format => return Err(Error::invalid(format!("{} is {format}, not a tar archive", self.name))),
        };
        if is_tar {
            guard.finish()?;
        }
        Ok(is_tar)
    }

    /// Extracts a zip archive from a complete file. Its list of files is at the end.
    pub(crate) fn extract_zip(&self, file: File, into: &mut dyn FileSink) -> Result<()> {
        let mut guard = CheckedEntries::new(self, into);
        zip::extract(file, &mut guard)?;
        guard.finish()
    }

    /// Returns the error for an archive that cannot be read to its end.
    fn damaged(&self, cause: &dyn std::fmt::Display) -> Error {
        Error::corrupt(format!("the archive {} is damaged or truncated: {cause}", self.name))
            .hint("make the archive again, and check it with `tar -tf` or `unzip -t`")
    }
}

/// Checks the entries of one archive before they are extracted.
struct CheckedEntries<'a> {
    archive: &'a Archive<'a>,
    into: &'a mut dyn FileSink,
    /// The extracted bytes so far.
    bytes: u64,
    /// The number of entries so far, and the size of their names.
    entries: usize,
    name_bytes: usize,
    /// The paths of the files.
    paths: BTreeSet<FilePath>,
    /// The paths of the folders that are entries of their own.
    folders: BTreeSet<FilePath>,
}

impl<'a> CheckedEntries<'a> {
    fn new(archive: &'a Archive<'a>, into: &'a mut dyn FileSink) -> Self {
        Self { archive, into, bytes: 0, entries: 0, name_bytes: 0, paths: BTreeSet::new(), folders: BTreeSet::new() }
    }

    /// Extracts a regular file. Reads `size` bytes of `content`. Content that ends earlier is an error.
    fn file(&mut self, name: &[u8], size: u64, executable: bool, content: &mut dyn Read) -> Result<()> {
        let path = self.path(name)?.filter(|_| !name.ends_with(b"/.") && !name.ends_with(b"/"));
        let path = path.ok_or_else(|| self.refusal(name, "it is a file, and its name is that of a folder"))?;
        self.bytes = self.bytes.saturating_add(size);
        let allowed = self.bytes_max();
        if size > FILE_BYTES_MAX {
            return Err(self.over_limit(&format!("the file {} has {}", shown(name), human::bytes(size))));
        }
        if self.bytes > allowed {
            return Err(self.over_limit(&format!(
                "its files take more than {}, the larger of {} and {ARCHIVE_RATIO_MAX} times its own size ({})",
                human::bytes(allowed),
                human::bytes(ARCHIVE_BYTES_ALWAYS_ALLOWED),
                human::bytes(self.archive.size)
            )));
        }
        self.paths.insert(path.clone());
        let mut content = Content { content: content.take(size), left: size, ends_early: false, failure: None };
        let taken = self.into.file(path, size, executable, &mut content);
        match content {
            // A read error of the archive takes precedence over the error of the receiver.
            Content { failure: Some(cause), .. } => Err(self.unreadable(&cause)),
            Content { ends_early: true, .. } => Err(self.damaged(&format!("the file {} ends early", shown(name)))),
            _ => taken,
        }
    }

    /// Returns the path of an entry, without `.` segments; `None` for the folder itself.
    fn path(&self, name: &[u8]) -> Result<Option<FilePath>> {
        let rename = "rename that file, and make the archive again";
        let text =
            std::str::from_utf8(name).map_err(|_| self.refusal_with_hint(name, "its name is not UTF-8", rename))?;
        if text.starts_with('/') {
            return Err(self.refusal(name, "its name is an absolute path"));
        }
        let segments: Vec<&str> = text.split('/').filter(|segment| !matches!(*segment, "" | ".")).collect();
        if segments.contains(&"..") {
            return Err(self.refusal(name, "its name leads out of the folder"));
        }
        if segments.len() > ARCHIVE_DEPTH_MAX {
            return Err(self.over_limit(&format!("{} is more than {ARCHIVE_DEPTH_MAX} folders deep", shown(name))));
        }
        if segments.is_empty() {
            return Ok(None);
        }
        let refused = |error: Error| self.refusal_with_hint(name, error.message(), rename);
        FilePath::new(&segments.join("/")).map(Some).map_err(refused)
    }

    /// Checks the name of a folder. Folders are not extracted: they follow from the paths of the files.
    fn folder(&mut self, name: &[u8]) -> Result<()> {
        self.folders.extend(self.path(name)?);
        Ok(())
    }

    /// Checks the name of a folder in a tar archive, and the size in its header. Some programs skip the content of a
    /// folder, and others read it as further headers.
    fn tar_folder(&mut self, name: &[u8], size: u64) -> Result<()> {
        match size {
            0 => self.folder(name),
            _ => Err(self.refusal(name, "it is a folder, and its header states a size")),
        }
    }

    /// Counts an entry of any kind before it is examined. Entries are counted, not paths, which may be repeated.
    fn count_entry(&mut self, name: &[u8]) -> Result<()> {
        (self.entries, self.name_bytes) = (self.entries + 1, self.name_bytes + name.len());
        if self.entries > ARCHIVE_ENTRIES_MAX {
            return Err(self.over_limit(&format!("it has more than {ARCHIVE_ENTRIES_MAX} entries")));
        }
        if self.name_bytes > ARCHIVE_NAME_BYTES_MAX {
            return Err(
                self.over_limit(&format!("the names of its entries take more than {ARCHIVE_NAME_BYTES_MAX} bytes"))
            );
        }
        Ok(())
    }

    /// Returns the number of bytes that all files together may take.
    fn bytes_max(&self) -> u64 {
        ARCHIVE_BYTES_ALWAYS_ALLOWED.max(self.archive.size.saturating_mul(ARCHIVE_RATIO_MAX))
    }

    /// Checks, after the last entry, that the archive has files and that no path is both a file and a folder.
    fn finish(&self) -> Result<()> {
        if self.paths.is_empty() {
            return Err(Error::corrupt(format!("the archive {} has no files", self.archive.name))
                .hint("make the archive again, from a folder with files"));
        }
        // A path cannot be that of a file and that of a folder.
        if let Some(path) = self.paths.intersection(&self.folders).next() {
            return Err(self.refusal(path.as_str().as_bytes(), "it is a file and also a folder"));
        }
        for path in self.paths.iter().chain(&self.folders).map(FilePath::as_str) {
            let above = path.match_indices('/').map(|(at, _)| &path[..at]);
            if above.into_iter().any(|above| FilePath::new(above).is_ok_and(|above| self.paths.contains(&above))) {
                return Err(self.refusal(path.as_bytes(), "a folder above it is also a file"));
            }
        }
        Ok(())
    }

    /// Returns the error for an entry that is not extracted.
    fn refusal(&self, name: &[u8], reason: &str) -> Error {
        self.refusal_with_hint(
            name,
            reason,
            "make the archive again from inside the folder, with files in the place of links: `tar --dereference \
             --hard-dereference -czf model.tar.gz -C FOLDER .`",
        )
    }

    fn refusal_with_hint(&self, name: &[u8], reason: &str, hint: &str) -> Error {
        let (archive, name) = (self.archive.name, shown(name));
        Error::corrupt(format!("the archive {archive} is refused because of its entry {name}: {reason}")).hint(hint)
    }

    fn over_limit(&self, what: &str) -> Error {
        Error::corrupt(format!("the archive {} exceeds a limit: {what}", self.archive.name))
            .hint("if you trust the archive, extract it and publish the folder with `modelcache put`")
    }

    fn damaged(&self, cause: &dyn std::fmt::Display) -> Error {
        self.archive.damaged(cause)
    }

    /// Returns the error for a stream that cannot be read further: it has reached a limit, or it is damaged.
    fn unreadable(&self, cause: &io::Error) -> Error {
        match cause.kind() {
            io::ErrorKind::FileTooLarge => self.over_limit(&cause.to_string()),
            io::ErrorKind::OutOfMemory => {
                self.over_limit(&format!("its decompression needs more than {} MiB", ARCHIVE_XZ_KIB_MAX >> 10))
            }
            _ => self.damaged(cause),
        }
    }
}

/// The content of one file. Records what happened while it was read.
struct Content<R> {
    content: R,
    /// Bytes that are still to come.
    left: u64,
    /// True if the content ended while bytes were still to come.
    ends_early: bool,
    failure: Option<io::Error>,
}

impl<R: Read> Read for Content<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.content.read(buffer) {
            Ok(read) => {
                self.ends_early |= read == 0 && self.left > 0 && !buffer.is_empty();
                self.left -= read as u64;
                Ok(read)
            }
            Err(cause) => {
                let kind = cause.kind();
                if kind != io::ErrorKind::Interrupted {
                    self.failure = Some(cause);
                }
                Err(kind.into())
            }
        }
    }
}

/// Returns the name of an entry for messages.
fn shown(name: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(name))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]
mod tests;
