//! What a caller gives to be put: listed, then copied into staging and hashed in the same pass.
//!
//! The caller's files are only read, once. One that changes meanwhile is refused rather than published half-old.

use super::{RootedPath, StagedFile, StagedFileSpec, StagedWriter, files, identity};
use crate::digest::{Digest, Provenance};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Format, HEAD_BYTES};
use crate::key::FilePath;
use crate::ladder::{Ladder, LadderHasher, PartHasher, part_size};
use crate::limits;
use crate::manifest::{FileDetails, FileEntry, FileIdentity, Shape};
use crate::progress::Progress;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// A file to be put.
#[derive(Debug, Clone)]
pub(crate) struct InputFile {
    /// Its path in the artifact.
    pub(crate) path: FilePath,
    /// Where it lies.
    pub(crate) from: PathBuf,
    /// Bytes, when it was listed.
    pub(crate) size: u64,
}

/// A given file that is read once, from its beginning to its end: hashed, and copied if it is to be.
pub(crate) struct Copying {
    given: InputFile,
    source: File,
    before: FileIdentity,
    read: u64,
    into: Target,
}

/// What becomes of the bytes.
enum Target {
    Staging(Box<StagedWriter>, RootedPath),
    Nowhere(LadderHasher),
}

impl Copying {
    /// Opens the file, to be copied to `target`.
    pub(crate) fn open(given: &InputFile, target: Option<&RootedPath>) -> Result<Self> {
        let fault = |cause: std::io::Error| unreadable(&given.from, cause);
        let source = File::open(&given.from).map_err(fault)?;
        let before = identity(&source).map_err(fault)?;
        let part_size = part_size(given.size);
        let into = match target {
            Some(target) => {
                let path = target.clone();
                let draft =
                    StagedFileSpec { path, size: given.size, part_size, in_order: true, git: false, direct: false };
                Target::Staging(Box::new(StagedWriter::create(draft, None)?), target.clone())
            }
            None => Target::Nowhere(LadderHasher::new(part_size)),
        };
        Ok(Self { given: given.clone(), source, before, read: 0, into })
    }

    /// Reads the next bytes into all of `buffer`; `beside` hashes them, too.
    pub(crate) fn fill(&mut self, buffer: &mut [u8], mut beside: Option<&mut PartHasher>) -> Result<()> {
        for slice in buffer.chunks_mut(COPY_BYTES) {
            self.source.read_exact(slice).map_err(|cause| match cause.kind() {
                std::io::ErrorKind::UnexpectedEof => changed(&self.given),
                _ => unreadable(&self.given.from, cause),
            })?;
            match (&mut self.into, beside.as_deref_mut()) {
                (Target::Staging(writer, _), Some(beside)) => writer.append(self.read, slice, beside)?,
                (Target::Staging(writer, _), None) => writer.write(self.read, slice)?,
                (Target::Nowhere(hasher), Some(beside)) => hasher.update_beside(slice, beside),
                (Target::Nowhere(hasher), None) => hasher.update(slice),
            }
            self.read += slice.len() as u64;
        }
        Ok(())
    }

    /// What the file is, if that was all of it and nobody changed it meanwhile; and its copy's identity.
    pub(crate) fn finish(mut self) -> Result<(FileEntry, Option<FileIdentity>)> {
        let fault = |cause: std::io::Error| unreadable(&self.given.from, cause);
        let ended = self.read == self.given.size && self.source.read(&mut [0]).map_err(fault)? == 0;
        if !ended || self.before != identity(&self.source).map_err(fault)? {
            return Err(changed(&self.given));
        }
        let (sha256, ladder, format, copy) = match self.into {
            Target::Staging(writer, target) => {
                let hashed = writer.hashed();
                (hashed.sha256, hashed.ladder, format_named(target.open(false)), Some(writer.seal()?))
            }
            Target::Nowhere(hasher) => {
                let (sha256, ladder) = hasher.finish();
                (sha256, ladder, format_named(File::open(&self.given.from)), None)
            }
        };
        Ok((entry(self.given.size, sha256, ladder, format), copy))
    }
}

/// Copies one file into staging, hashing it; refuses one that changes meanwhile.
pub(crate) fn copy_input(given: &InputFile, target: &RootedPath, progress: &Progress) -> Result<StagedFile> {
    let mut copying = Copying::open(given, Some(target))?;
    let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(given.size).unwrap_or(COPY_BYTES))];
    let mut left = given.size;
    while left > 0 {
        let slice = buffer.len().min(usize::try_from(left).unwrap_or(buffer.len()));
        copying.fill(&mut buffer[..slice], None)?;
        left -= slice as u64;
        progress.done(slice as u64);
    }
    let (entry, copy) = copying.finish()?;
    let identity = copy.ok_or_else(|| Error::new(ErrorKind::Other, "nothing was copied"))?;
    Ok(StagedFile { name: String::new(), entry, identity })
}

/// Hashes one file where it lies; refuses one that changes meanwhile.
pub(crate) fn hash_input(given: &InputFile, progress: &Progress) -> Result<FileEntry> {
    let fault = |cause: std::io::Error| unreadable(&given.from, cause);
    let mut source = File::open(&given.from).map_err(fault)?;
    let before = identity(&source).map_err(fault)?;
    let format = format_named(File::open(&given.from));
    let (sha256, ladder) = files::hash(&mut source, &given.from, part_size(given.size))?;
    if before.bytes != given.size || before != identity(&source).map_err(fault)? {
        return Err(changed(given));
    }
    progress.done(given.size);
    Ok(entry(given.size, sha256, ladder, format))
}

/// The entry of a file that is put.
fn entry(size: u64, sha256: Digest, ladder: Ladder, format: Option<String>) -> FileEntry {
    let (sha256, provenance, ladder) = (Some(sha256), Some(Provenance::Put), Some(ladder));
    FileEntry::with(size, FileDetails { sha256, provenance, ladder, format, ..FileDetails::default() })
}

/// The format of a file of the caller's, by its first bytes.
pub(crate) fn format_of(path: &Path) -> Result<Format> {
    File::open(path).and_then(read_format).map_err(|cause| unreadable(path, cause))
}

fn read_format(file: File) -> std::io::Result<Format> {
    let size = file.metadata()?.len();
    let mut head = Vec::with_capacity(HEAD_BYTES.min(usize::try_from(size).unwrap_or(HEAD_BYTES)));
    file.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    Ok(Format::of(&head, size))
}

/// The name of a file's format, for its manifest. That it cannot be told is no failure: nothing depends on it.
pub(crate) fn format_named(opened: std::io::Result<File>) -> Option<String> {
    match opened.and_then(read_format) {
        Ok(format) => format.name().map(str::to_owned),
        Err(error) => {
            tracing::debug!(%error, "the format is not told");
            None
        }
    }
}

fn changed(given: &InputFile) -> Error {
    Error::new(ErrorKind::Other, format!("{} changed while it was being read", given.from.display()))
        .hint("put it again when it is complete")
}

/// The files of a file or folder. Links are followed, loops refused; what is neither file nor folder is refused.
pub(crate) fn list_input(path: &Path) -> Result<(Shape, Vec<InputFile>)> {
    let metadata = fs::metadata(path).map_err(|cause| unreadable(path, cause))?;
    if metadata.is_file() {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| not_utf8(path))?;
        return Ok((
            Shape::File,
            vec![InputFile { path: FilePath::new(name).map_err(rename)?, from: path.to_owned(), size: metadata.len() }],
        ));
    }
    if !metadata.is_dir() {
        return Err(neither_file_nor_folder(path).hint("put a file or a folder"));
    }
    let mut given = Vec::new();
    list_folder(path, "", &mut vec![canonical(path)?], &mut given)?;
    if given.is_empty() {
        return Err(
            Error::invalid(format!("{} holds no files", path.display())).hint("an artifact has at least one file")
        );
    }
    Ok((Shape::Tree, given))
}

fn list_folder(folder: &Path, prefix: &str, above: &mut Vec<PathBuf>, given: &mut Vec<InputFile>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .and_then(|entries| entries.collect::<std::io::Result<_>>())
        .map_err(|cause| unreadable(folder, cause))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let from = entry.path();
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| not_utf8(&from))?;
        let metadata = fs::metadata(&from).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::NotFound => {
                Error::invalid(format!("the link {} leads nowhere", from.display())).hint("remove that link")
            }
            _ => unreadable(&from, cause),
        })?;
        let path = format!("{prefix}{name}");
        if metadata.is_dir() {
            let real = canonical(&from)?;
            if above.contains(&real) {
                return Err(Error::invalid(format!("{} links back to a folder above it", from.display()))
                    .hint("remove that link"));
            }
            above.push(real);
            list_folder(&from, &format!("{path}/"), above, given)?;
            above.pop();
        } else if metadata.is_file() {
            given.push(InputFile { path: FilePath::new(&path).map_err(rename)?, from, size: metadata.len() });
            if given.len() > limits::FILES_MAX {
                return Err(Error::invalid(format!("more than {} files", limits::FILES_MAX)));
            }
        } else {
            return Err(neither_file_nor_folder(&from).hint("take it out of the folder"));
        }
    }
    Ok(())
}

fn rename(error: Error) -> Error {
    error.hint("rename it, or take it out of the folder")
}

fn not_utf8(path: &Path) -> Error {
    Error::invalid(format!("the name of {} is not UTF-8", path.display())).hint("rename it")
}

fn neither_file_nor_folder(path: &Path) -> Error {
    Error::invalid(format!("{} is neither a file nor a folder", path.display()))
}

fn canonical(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|cause| unreadable(path, cause))
}

fn unreadable(path: &Path, cause: std::io::Error) -> Error {
    match cause.kind() {
        std::io::ErrorKind::NotFound => {
            Error::not_found(format!("there is no {}", path.display())).hint("check the path")
        }
        std::io::ErrorKind::PermissionDenied => {
            Error::new(ErrorKind::Unauthorized, format!("may not read {}", path.display()))
                .cause(cause)
                .hint("give the user that runs this the right to read it")
        }
        _ => Error::new(ErrorKind::Other, format!("cannot read {}", path.display())).cause(cause),
    }
}
