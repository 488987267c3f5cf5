//! A fill that learns its files one by one, while an archive is extracted. Room for each file is reserved before it is
//! written. One thread writes the files and another one hashes them, so that the caller can decompress meanwhile.

use super::Disk;
use super::files;
use super::input::format_name;
use super::layout::staged_name;
use super::publish::StagedFile;
use super::rooted::RootedPath;
use super::staging::{Staging, space_to_stage};
use super::writer::{StagedFileSpec, StagedWriter};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::extract::FileSink;
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::{Ladder, LadderHasher, part_size};
use crate::manifest::{FileDetails, FileEntry, FileIdentity};
use crate::progress::Progress;
use crate::runtime::STACK_BYTES;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

/// Size of a buffer between reading and writing, in bytes.
const BUFFER_BYTES: usize = 512 * 1024;
/// Number of buffers that may be queued for each of the two threads.
const BUFFERS: usize = 8;
/// Room that is reserved at once for many small files, in bytes.
const RESERVATION_STEP: u64 = 16 << 20;

/// The files of a fill so far, in staging.
pub(crate) struct StreamedFill {
    staging: Option<Arc<Staging>>,
    key: ArtifactKey,
    progress: Progress,
    /// Bytes that the journal reserves.
    reserved: u64,
    /// Reserved bytes that no file has taken yet.
    room: u64,
    /// Returns true if nobody waits for the fill any more.
    is_cancelled: Box<dyn Fn() -> bool + Send>,
    to_writer: Option<SyncSender<Message>>,
    /// Buffers that the hashing thread has returned.
    free_buffers: Receiver<Vec<u8>>,
    writer: Option<JoinHandle<Result<BTreeMap<FilePath, StagedFile>>>>,
}

/// What the writer does next.
enum Message {
    Begin {
        path: FilePath,
        size: u64,
        executable: bool,
    },
    Write(Vec<u8>),
    /// The file is complete.
    End,
}

impl Disk {
    /// Begins a fill of `key` without any file yet. The fill fails at the next file or buffer after `is_cancelled`
    /// returns true.
    pub(crate) fn begin_streamed_fill(
        &self,
        key: &ArtifactKey,
        is_cancelled: Box<dyn Fn() -> bool + Send>,
        progress: &Progress,
    ) -> Result<StreamedFill> {
        let staging = Arc::new(self.begin_fill(key, &[])?);
        let (to_writer, messages) = sync_channel(BUFFERS);
        let (give_back, free_buffers) = sync_channel(BUFFERS);
        let folder = staging.clone();
        let writer = thread("extract-write").spawn(move || write_files(&folder, &messages, &give_back));
        let writer = writer.map_err(no_thread)?;
        Ok(StreamedFill {
            staging: Some(staging),
            key: key.clone(),
            progress: progress.clone(),
            reserved: 0,
            room: 0,
            is_cancelled,
            to_writer: Some(to_writer),
            free_buffers,
            writer: Some(writer),
        })
    }
}

impl FileSink for StreamedFill {
    fn file(&mut self, path: FilePath, size: u64, executable: bool, content: &mut dyn Read) -> Result<()> {
        self.reserve(size)?;
        self.send(Message::Begin { path, size, executable })?;
        let mut left = size;
        while left > 0 {
            let mut buffer = self.free_buffers.try_recv().unwrap_or_default();
            buffer.resize(usize::try_from(left).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES), 0);
            content
                .read_exact(&mut buffer)
                .map_err(|cause| Error::corrupt("the content of a file cannot be read").cause(cause))?;
            left -= buffer.len() as u64;
            self.progress.done(buffer.len() as u64);
            self.send(Message::Write(buffer))?;
        }
        self.send(Message::End)
    }
}

impl StreamedFill {
    /// Reserves room for a file of `size` bytes.
    fn reserve(&mut self, size: u64) -> Result<()> {
        let needed = space_to_stage(size);
        if let Some(missing) = needed.checked_sub(self.room).filter(|missing| *missing > 0) {
            // Reserve a larger step, so that many small files share one critical section. If it does not fit, reserve
            // for this file only.
            let step = missing.max(RESERVATION_STEP);
            let staging = self.staging.as_ref().ok_or_else(thread_lost)?;
            let extended = match staging.try_extend_reservation(&self.key, step, self.reserved + step) {
                Err(error) if error.kind() == ErrorKind::Full => {
                    staging.extend_reservation(&self.key, missing, self.reserved + missing).map(|()| missing)
                }
                extended => extended.map(|()| step),
            }?;
            self.reserved += extended;
            self.room += extended;
        }
        self.room -= needed;
        Ok(())
    }

    fn send(&mut self, message: Message) -> Result<()> {
        if (self.is_cancelled)() {
            return Err(Error::new(ErrorKind::Other, "the get was cancelled"));
        }
        let sent = self.to_writer.as_ref().is_some_and(|to_writer| to_writer.send(message).is_ok());
        if sent {
            return Ok(());
        }
        // The writer has ended, with an error.
        self.written().and_then(|_| Err(thread_lost()))
    }

    /// Waits for the end of the writer, and returns the files that it wrote.
    fn written(&mut self) -> Result<BTreeMap<FilePath, StagedFile>> {
        self.to_writer = None;
        let writer = self.writer.take().ok_or_else(thread_lost)?;
        writer.join().map_err(|_| thread_lost())?
    }

    /// Returns the complete files and the staging folder, to be published.
    pub(crate) fn finish(mut self) -> Result<(Staging, BTreeMap<FilePath, StagedFile>)> {
        let mut files = self.written()?;
        let staging = self.staging.take().and_then(Arc::into_inner).ok_or_else(thread_lost)?;
        // Files with equal content share the first staged file. Executable files have no blob, so they share nothing.
        let mut firsts: HashMap<Digest, StagedFile> = HashMap::new();
        for file in files.values_mut().filter(|file| !file.entry.executable) {
            let Some(digest) = file.entry.sha256 else { continue };
            match firsts.entry(digest) {
                Entry::Vacant(vacant) => drop(vacant.insert(file.clone())),
                Entry::Occupied(first) => {
                    files::remove_file(&staging.file(&file.name))?;
                    (file.name, file.identity) = (first.get().name.clone(), first.get().identity);
                }
            }
        }
        Ok((staging, files))
    }
}

impl Drop for StreamedFill {
    fn drop(&mut self) {
        // The staging folder is removed with its last owner, so wait for the writer.
        let _ = self.written();
    }
}

fn thread_lost() -> Error {
    Error::new(ErrorKind::Other, "a thread that extracts the archive ended unexpectedly")
}

/// Writes files until the sender is dropped. A second thread hashes the written bytes.
fn write_files(
    staging: &Staging,
    messages: &Receiver<Message>,
    give_back: &SyncSender<Vec<u8>>,
) -> Result<BTreeMap<FilePath, StagedFile>> {
    std::thread::scope(|scope| {
        let (to_hasher, bytes) = sync_channel(BUFFERS);
        let hasher = thread("extract-hash").spawn_scoped(scope, move || hash_files(&bytes, give_back));
        let hasher = hasher.map_err(no_thread)?;
        let stored = store_files(staging, messages, &to_hasher);
        // The hashing thread ends when its sender is dropped.
        drop(to_hasher);
        let digests = hasher.join().map_err(|_| thread_lost())?;
        // The later of two files with one path replaces the earlier one.
        Ok(stored?.into_iter().zip(digests).map(|(file, digests)| file.with_digests(digests)).collect())
    })
}

/// A message to the hashing thread.
enum ToHash {
    /// A new file, with parts of this size.
    Begin(u64),
    Bytes(Vec<u8>),
    End,
}

/// Writes files, and sends their bytes to be hashed. Returns the files in the order in which they were completed.
fn store_files(
    staging: &Staging,
    messages: &Receiver<Message>,
    to_hasher: &SyncSender<ToHash>,
) -> Result<Vec<SealedFile>> {
    let hash = |bytes| to_hasher.send(bytes).map_err(|_| thread_lost());
    let mut files = Vec::new();
    let mut current: Option<FileInProgress> = None;
    for message in messages {
        match (message, current.as_mut()) {
            (Message::Begin { path, size, executable }, _) => {
                hash(ToHash::Begin(part_size(size)))?;
                current = Some(FileInProgress::create(staging, path, size, executable)?);
            }
            (Message::Write(buffer), Some(file)) => {
                file.writer.store(file.written, &buffer)?;
                file.written += buffer.len() as u64;
                hash(ToHash::Bytes(buffer))?;
            }
            (Message::End, Some(_)) => {
                hash(ToHash::End)?;
                files.extend(current.take().map(FileInProgress::seal).transpose()?);
            }
            (Message::Write(_) | Message::End, None) => return Err(thread_lost()),
        }
    }
    Ok(files)
}

/// Hashes one file after the other, until the sender is dropped. Returns their digests, in the order in which the files
/// were completed.
fn hash_files(messages: &Receiver<ToHash>, give_back: &SyncSender<Vec<u8>>) -> Vec<(Digest, Ladder)> {
    let mut current: Option<LadderHasher> = None;
    let mut digests = Vec::new();
    for message in messages {
        match message {
            ToHash::Begin(part_size) => current = Some(LadderHasher::new(part_size)),
            ToHash::Bytes(buffer) => {
                if let Some(hasher) = &mut current {
                    hasher.update(&buffer);
                }
                // The caller allocates a new buffer if this one is lost.
                let _ = give_back.try_send(buffer);
            }
            ToHash::End => digests.extend(current.take().map(LadderHasher::finish)),
        }
    }
    digests
}

/// A file that is being written.
struct FileInProgress {
    path: FilePath,
    name: String,
    target: RootedPath,
    size: u64,
    executable: bool,
    writer: StagedWriter,
    written: u64,
}

/// A complete file. Its digest comes from the hashing thread.
struct SealedFile {
    path: FilePath,
    name: String,
    size: u64,
    details: FileDetails,
    identity: FileIdentity,
}

impl FileInProgress {
    fn create(staging: &Staging, path: FilePath, size: u64, executable: bool) -> Result<Self> {
        let name = staged_name(&path, &FileEntry::of(size));
        let target = staging.file(&name);
        let spec = StagedFileSpec {
            path: target.clone(),
            size,
            part_size: part_size(size),
            // The hashing thread computes the digests, so the writer hashes nothing.
            in_order: false,
            git: false,
            direct: false,
        };
        let writer = StagedWriter::create(spec, Some(staging.owner()))?;
        Ok(Self { path, name, target, size, executable, writer, written: 0 })
    }

    fn seal(self) -> Result<SealedFile> {
        let format = format_name(self.target.open(false));
        let details = FileDetails { format, executable: self.executable, ..FileDetails::default() };
        let identity = self.writer.seal()?;
        Ok(SealedFile { path: self.path, name: self.name, size: self.size, details, identity })
    }
}

impl SealedFile {
    fn with_digests(self, (sha256, ladder): (Digest, Ladder)) -> (FilePath, StagedFile) {
        let details = FileDetails { sha256: Some(sha256), ladder: Some(ladder), ..self.details };
        let entry = FileEntry::with(self.size, details);
        (self.path, StagedFile { name: self.name, entry, identity: self.identity })
    }
}

/// Returns the builder of a thread that takes part in an extraction.
fn thread(name: &str) -> Builder {
    Builder::new().name(name.to_owned()).stack_size(STACK_BYTES)
}

fn no_thread(cause: io::Error) -> Error {
    Error::new(ErrorKind::Limits, "cannot start a thread").cause(cause)
}
