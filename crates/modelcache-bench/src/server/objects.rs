//! The objects of the server: files below a folder, and the sizes of discarded uploads.
//!
//! Small bodies become files. The ETag of a small object is a hash of its content. Of a large upload only the name and
//! the size are kept, so the ETag of a large object is a hash of these. The bench can then put a file of the same size
//! at the path of the object, by a hard link: the object gets the content of this file and keeps its ETag.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Largest body that is stored, in bytes: enough for the manifest of 10,000 files.
pub(super) const SMALL_BYTES_MAX: u64 = 4 << 20;

pub(super) struct Objects {
    folder: PathBuf,
    state: Mutex<State>,
}

/// Uploads and discarded objects. Locked during every write.
#[derive(Default)]
pub(super) struct State {
    /// Sizes and times of discarded objects, by bucket and key.
    discarded: BTreeMap<String, (u64, SystemTime)>,
    pub(super) uploads: HashMap<String, Upload>,
    uploads_begun: u64,
}

/// An unfinished multipart upload.
pub(super) struct Upload {
    pub(super) path: String,
    /// Sizes of the parts, by part number.
    pub(super) parts: BTreeMap<u64, u64>,
    pub(super) begun: SystemTime,
}

/// One object, with its content unless that was discarded.
pub(super) struct Object {
    pub(super) size: u64,
    pub(super) etag: String,
    pub(super) modified: SystemTime,
    /// `None` if the content was discarded.
    pub(super) file: Option<File>,
}

impl Objects {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder, state: Mutex::default() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the object at `path`, which is bucket and key.
    pub(super) fn find(&self, state: &State, path: &str) -> Option<Object> {
        match self.file(path).and_then(|file| File::open(file).ok()) {
            Some(file) => {
                let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
                let (size, modified) = (metadata.len(), metadata.modified().ok()?);
                let etag =
                    if size <= SMALL_BYTES_MAX { content_etag(&file)? } else { etag_of_name_and_size(path, size) };
                Some(Object { size, etag, modified, file: Some(file) })
            }
            None => {
                let (size, modified) = *state.discarded.get(path)?;
                Some(Object { size, etag: etag_of_name_and_size(path, size), modified, file: None })
            }
        }
    }

    /// Returns true if there is an object at `path`.
    pub(super) fn exists(&self, state: &State, path: &str) -> bool {
        self.find(state, path).is_some()
    }

    /// Stores a small body as a file and returns its ETag.
    pub(super) fn store(&self, state: &mut State, path: &str, body: &[u8]) -> io::Result<String> {
        let file = self.file(path).ok_or(io::ErrorKind::InvalidInput)?;
        std::fs::create_dir_all(file.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
        // Write and rename, so that no reader sees a part of the object.
        let mut temporary = tempfile::NamedTempFile::new_in(&self.folder)?;
        io::Write::write_all(&mut temporary, body)?;
        temporary.persist(&file)?;
        state.discarded.remove(path);
        Ok(etag(body))
    }

    /// Records the size of a discarded object and returns its ETag.
    pub(super) fn record_discarded(&self, state: &mut State, path: &str, size: u64) -> String {
        state.discarded.insert(path.to_owned(), (size, SystemTime::now()));
        etag_of_name_and_size(path, size)
    }

    pub(super) fn remove(&self, state: &mut State, path: &str) {
        state.discarded.remove(path);
        if let Some(file) = self.file(path) {
            // The file may not exist.
            let _ = std::fs::remove_file(file);
        }
    }

    /// Returns the keys in a bucket that begin with `prefix`, sorted.
    pub(super) fn list(&self, state: &State, bucket: &str, prefix: &str) -> BTreeSet<String> {
        let begin = format!("{bucket}/{prefix}");
        let strip = |path: &str| path[bucket.len() + 1..].to_owned();
        let discarded = state.discarded.keys().filter(|path| path.starts_with(&begin));
        let mut keys: BTreeSet<String> = discarded.map(|path| strip(path)).collect();
        // Start at the deepest folder that the prefix names completely.
        let start = begin.rfind('/').map_or("", |slash| &begin[..slash]);
        let mut folders = Vec::from_iter(self.file(start));
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Some(name) = path.strip_prefix(&self.folder).ok().and_then(Path::to_str)
                    && name.starts_with(&begin)
                {
                    keys.insert(strip(name));
                }
            }
        }
        keys
    }

    fn file(&self, path: &str) -> Option<PathBuf> {
        let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
        (plain && !path.ends_with('/')).then(|| self.folder.join(path))
    }
}

impl State {
    pub(super) fn begin_upload(&mut self, path: &str) -> String {
        self.uploads_begun += 1;
        let id = format!("upload-{}", self.uploads_begun);
        let upload = Upload { path: path.to_owned(), parts: BTreeMap::new(), begun: SystemTime::now() };
        self.uploads.insert(id.clone(), upload);
        id
    }
}

fn content_etag(file: &File) -> Option<String> {
    let mut content = Vec::new();
    file.take(SMALL_BYTES_MAX).read_to_end(&mut content).ok()?;
    Some(etag(&content))
}

/// Returns an ETag in the usual form, because clients may check it: 32 hex digits in quotes.
pub(super) fn etag(content: &[u8]) -> String {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, content).hash(&mut hasher);
        hasher.finish()
    };
    format!("\"{:016x}{:016x}\"", half(0), half(1))
}

fn etag_of_name_and_size(path: &str, size: u64) -> String {
    etag(format!("{path} {size}").as_bytes())
}
