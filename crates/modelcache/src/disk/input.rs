//! The input files of a put: they are listed, and then hashed and copied into staging in one pass.
//!
//! The caller's files are read once and never changed. A file that changes while it is read is refused, so that no
//! mixture of old and new bytes is published.

use super::materialize::MARKER;
use super::{RootedPath, StagedFile, StagedFileSpec, StagedWriter, files, identity};
use crate::digest::{Digest, Provenance};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Format, HEAD_BYTES};
use crate::key::FilePath;
use crate::ladder::{Ladder, LadderHasher, PartHasher, part_size};
use crate::limits;
use crate::manifest::{FileDetails, FileEntry, FileIdentity, Shape};
use crate::option_name::call::{EXCLUDE, FOLLOW_LINKS};
use crate::progress::Progress;
use crate::selection::Selection;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Buffer size for copying, in bytes.
const COPY_BYTES: usize = 1 << 20;

/// An input file of a put.
#[derive(Debug, Clone)]
pub(crate) struct InputFile {
    /// The path of the file in the artifact.
    pub(crate) path: FilePath,
    /// The path of the file on the caller's filesystem.
    pub(crate) from: PathBuf,
    /// The size of the file in bytes when it was listed.
    pub(crate) size: u64,
    /// True if its owner may execute it.
    pub(crate) executable: bool,
}

/// Opens an input file. Its bytes are copied to `target`, if there is one. `progress` counts the hashed bytes.
pub(crate) fn open_input(
    input: &InputFile,
    target: Option<&RootedPath>,
    progress: &Progress,
) -> Result<(InputReader, InputHasher)> {
    let read_error = |cause: std::io::Error| unreadable(&input.from, cause);
    let file = File::open(&input.from).map_err(read_error)?;
    let before = identity(&file).map_err(read_error)?;
    let part_size = part_size(input.size);
    let target = match target {
        Some(target) => {
            let path = target.clone();
            let spec = StagedFileSpec { path, size: input.size, part_size, in_order: true, git: false, direct: false };
            Target::Staged(Box::new(StagedWriter::create(spec, None)?), target.clone())
        }
        None => Target::HashOnly(LadderHasher::new(part_size)),
    };
    let hasher = InputHasher { hashed_bytes: 0, target, progress: progress.clone() };
    Ok((InputReader { input: input.clone(), file, before }, hasher))
}

/// Reads an input file in order.
pub(crate) struct InputReader {
    input: InputFile,
    file: File,
    /// Identity of the file when it was opened.
    before: FileIdentity,
}

/// Hashes the bytes of an input file in order and, if there is a target, copies them.
pub(crate) struct InputHasher {
    hashed_bytes: u64,
    target: Target,
    progress: Progress,
}

/// What happens to the bytes that are read.
enum Target {
    /// They are hashed and written to a staged file.
    Staged(Box<StagedWriter>, RootedPath),
    /// They are only hashed.
    HashOnly(LadderHasher),
}

impl InputReader {
    /// Fills `buffer` with the next bytes.
    ///
    /// # Errors
    /// Fails if the file ends before `buffer` is full, because the file was truncated since it was listed.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact(buffer).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(&self.input),
            _ => unreadable(&self.input.from, cause),
        })
    }

    /// Returns the manifest entry of the file, and the identity of the copy, if there is one. `hasher` has hashed all
    /// bytes that were read.
    ///
    /// # Errors
    /// Fails unless exactly the listed size was read, or if the file has grown or was changed meanwhile.
    pub(crate) fn finish(mut self, hasher: InputHasher) -> Result<(FileEntry, Option<FileIdentity>)> {
        let read_error = |cause: std::io::Error| unreadable(&self.input.from, cause);
        // Try to read one more byte: the file may have grown.
        let ended = hasher.hashed_bytes == self.input.size && self.file.read(&mut [0]).map_err(read_error)? == 0;
        if !ended || self.before != identity(&self.file).map_err(read_error)? {
            return Err(changed(&self.input));
        }
        let (sha256, ladder, format, copy) = match hasher.target {
            Target::Staged(writer, path) => {
                let hashed = writer.hashed();
                (hashed.sha256, hashed.ladder, format_name(path.open(false)), Some(writer.seal()?))
            }
            Target::HashOnly(hasher) => {
                let (sha256, ladder) = hasher.finish();
                (sha256, ladder, format_name(File::open(&self.input.from)), None)
            }
        };
        Ok((entry(&self.input, sha256, ladder, format), copy))
    }
}

impl InputHasher {
    /// Hashes the next bytes, and copies them if there is a target. If there is a second hasher, `beside`, it hashes
    /// the same bytes in the same pass.
    pub(crate) fn update(&mut self, bytes: &[u8], mut beside: Option<&mut PartHasher>) -> Result<()> {
        for slice in bytes.chunks(COPY_BYTES) {
            match (&mut self.target, beside.as_deref_mut()) {
                (Target::Staged(writer, _), Some(beside)) => writer.append(self.hashed_bytes, slice, beside)?,
                (Target::Staged(writer, _), None) => writer.write(self.hashed_bytes, slice)?,
                (Target::HashOnly(hasher), Some(beside)) => hasher.update_both(slice, beside),
                (Target::HashOnly(hasher), None) => hasher.update(slice),
            }
            self.hashed_bytes += slice.len() as u64;
            self.progress.done(slice.len() as u64);
        }
        Ok(())
    }
}

/// Copies one file into staging and hashes it. Fails if the file changes meanwhile.
pub(crate) fn copy_input(input: &InputFile, target: &RootedPath, progress: &Progress) -> Result<StagedFile> {
    let (mut reader, mut hasher) = open_input(input, Some(target), progress)?;
    let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(input.size).unwrap_or(COPY_BYTES))];
    let mut left = input.size;
    while left > 0 {
        let slice = buffer.len().min(usize::try_from(left).unwrap_or(buffer.len()));
        reader.read(&mut buffer[..slice])?;
        hasher.update(&buffer[..slice], None)?;
        left -= slice as u64;
    }
    let (entry, copy) = reader.finish(hasher)?;
    let identity = copy.ok_or_else(|| Error::new(ErrorKind::Other, "nothing was copied"))?;
    Ok(StagedFile { name: String::new(), entry, identity })
}

/// Hashes one file without copying it. Fails if the file changes meanwhile.
pub(crate) fn hash_input(input: &InputFile, progress: &Progress) -> Result<FileEntry> {
    let read_error = |cause: std::io::Error| unreadable(&input.from, cause);
    let mut source = File::open(&input.from).map_err(read_error)?;
    let before = identity(&source).map_err(read_error)?;
    let format = format_name(File::open(&input.from));
    let (sha256, ladder) = files::hash(&mut source, &input.from, part_size(input.size))?;
    if before.bytes != input.size || before != identity(&source).map_err(read_error)? {
        return Err(changed(input));
    }
    progress.done(input.size);
    Ok(entry(input, sha256, ladder, format))
}

/// Returns the manifest entry of an input file.
fn entry(input: &InputFile, sha256: Digest, ladder: Ladder, format: Option<String>) -> FileEntry {
    let (sha256, provenance, ladder) = (Some(sha256), Some(Provenance::Put), Some(ladder));
    let executable = input.executable;
    FileEntry::with(
        input.size,
        FileDetails { sha256, provenance, ladder, format, executable, ..FileDetails::default() },
    )
}

/// Returns the format of a caller's file, detected from its first bytes.
pub(crate) fn format_of(path: &Path) -> Result<Format> {
    File::open(path).and_then(read_format).map_err(|cause| unreadable(path, cause))
}

fn read_format(file: File) -> std::io::Result<Format> {
    let size = file.metadata()?.len();
    let mut head = Vec::with_capacity(HEAD_BYTES.min(usize::try_from(size).unwrap_or(HEAD_BYTES)));
    file.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    Ok(Format::of(&head, size))
}

/// Returns the name of a file's format for its manifest, or `None` if it is unknown or the file cannot be read.
pub(crate) fn format_name(opened: std::io::Result<File>) -> Option<String> {
    match opened.and_then(read_format) {
        Ok(format) => format.name().map(str::to_owned),
        Err(error) => {
            tracing::debug!(%error, "the format of a file cannot be detected");
            None
        }
    }
}

fn changed(input: &InputFile) -> Error {
    Error::new(ErrorKind::Other, format!("{} changed while it was being read", input.from.display()))
        .hint("put it again when it is complete")
}

/// Returns the files at `path`, which is a file or a folder, without those that `excluded` excludes and without the
/// marker of a materialized folder. Symbolic links are followed; with `follow_links`, also those to targets outside the
/// folder.
///
/// # Errors
/// Fails if a link points to a folder above it or to nothing, or out of the folder without `follow_links`, or if an
/// entry is neither a file nor a folder.
pub(crate) fn list_input(path: &Path, excluded: &Selection, follow_links: bool) -> Result<(Shape, Vec<InputFile>)> {
    let metadata = fs::metadata(path).map_err(|cause| unreadable(path, cause))?;
    if metadata.is_file() {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| not_utf8(path))?;
        return Ok((
            Shape::File,
            vec![InputFile {
                path: FilePath::new(name).map_err(with_rename_hint)?,
                from: path.to_owned(),
                size: metadata.len(),
                executable: is_executable(&metadata),
            }],
        ));
    }
    if !metadata.is_dir() {
        return Err(neither_file_nor_folder(path).hint("put a file or a folder"));
    }
    let root = canonical(path)?;
    let boundary = (!follow_links).then_some(root.as_path());
    let ancestors = vec![root.clone()];
    let mut listing = FolderListing { boundary, excluded, ancestors, inputs: Vec::new(), empty_folders: Vec::new() };
    listing.add(path, "")?;
    let FolderListing { inputs, empty_folders, .. } = listing;
    if inputs.is_empty() {
        return Err(
            Error::invalid(format!("{} holds no files", path.display())).hint("an artifact has at least one file")
        );
    }
    if let Some(first) = empty_folders.first() {
        tracing::warn!(folders = empty_folders.len(), first = %first.display(), "empty folders are not kept: an artifact consists of files");
    }
    Ok((Shape::Tree, inputs))
}

/// Returns true if the owner of a file may execute it.
fn is_executable(metadata: &fs::Metadata) -> bool {
    metadata.mode() & 0o100 != 0
}

/// A listing of the files in a folder.
struct FolderListing<'a> {
    /// The real path of the folder out of which no link may lead; `None` if links may.
    boundary: Option<&'a Path>,
    excluded: &'a Selection,
    /// The real paths of the folder that is being listed and of the folders that lead to it.
    ancestors: Vec<PathBuf>,
    inputs: Vec<InputFile>,
    /// The folders without entries.
    empty_folders: Vec<PathBuf>,
}

impl FolderListing<'_> {
    /// Adds the files below `folder`, sorted by name. Their paths in the artifact start with `prefix`.
    fn add(&mut self, folder: &Path, prefix: &str) -> Result<()> {
        let mut entries: Vec<_> = fs::read_dir(folder)
            .and_then(|entries| entries.collect::<std::io::Result<_>>())
            .map_err(|cause| unreadable(folder, cause))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        if entries.is_empty() {
            self.empty_folders.push(folder.to_owned());
        }
        for entry in entries {
            let from = entry.path();
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| not_utf8(&from))?;
            let path = format!("{prefix}{name}");
            if path == MARKER || self.excluded.excludes(&path) {
                continue;
            }
            let metadata = fs::metadata(&from).map_err(|cause| match cause.kind() {
                std::io::ErrorKind::NotFound => {
                    Error::invalid(format!("the symbolic link {} points to nothing", from.display()))
                        .hint("remove that link")
                }
                _ => unreadable(&from, cause),
            })?;
            if metadata.is_dir() && self.excluded.excludes(&format!("{path}/")) {
                continue;
            }
            if let Some(boundary) = self.boundary
                && entry.file_type().map_err(|cause| unreadable(&from, cause))?.is_symlink()
            {
                let target = canonical(&from)?;
                if !target.starts_with(boundary) {
                    let (link, target) = (from.display(), target.display());
                    return Err(Error::invalid(format!("{link} is a symbolic link to {target}, outside the folder"))
                        .hint(format!("{FOLLOW_LINKS} publishes what such links point to; {EXCLUDE} leaves one out")));
                }
            }
            if metadata.is_dir() {
                // If a link points to a folder that is being listed, the listing would never end.
                let real = canonical(&from)?;
                if self.ancestors.contains(&real) {
                    return Err(Error::invalid(format!("{} links back to a folder above it", from.display()))
                        .hint("remove that link"));
                }
                self.ancestors.push(real);
                self.add(&from, &format!("{path}/"))?;
                self.ancestors.pop();
            } else if metadata.is_file() {
                self.inputs.push(InputFile {
                    path: FilePath::new(&path).map_err(with_rename_hint)?,
                    from,
                    size: metadata.len(),
                    executable: is_executable(&metadata),
                });
                if self.inputs.len() > limits::FILES_MAX {
                    return Err(Error::invalid(format!("more than {} files", limits::FILES_MAX)));
                }
            } else {
                return Err(neither_file_nor_folder(&from).hint("take it out of the folder"));
            }
        }
        Ok(())
    }
}

fn with_rename_hint(error: Error) -> Error {
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
            Error::new(ErrorKind::Unauthorized, format!("no permission to read {}", path.display()))
                .cause(cause)
                .hint("give the user that runs this command read access to it")
        }
        _ => Error::new(ErrorKind::Other, format!("cannot read {}", path.display())).cause(cause),
    }
}
