//! A local file or folder as an origin.
//!
//! Resolving lists all regular files once, with size, modification time and inode. The version is a hash over that
//! list, so it changes if the folder changes. After every read the file is compared with its entry in the list. The
//! manifest has no digests, because a folder stores none.
//!
//! Symbolic links are followed wherever they lead, because the cache of the Hub consists of them. Only a folder that
//! contains itself is rejected.

use super::{Origin, ResolvedSource, no_files};
use crate::digest::Digest;
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath, Version};
use crate::limits;
use crate::manifest::{FileDetails, FileEntry, FileIdentity, Manifest, Shape};
use crate::reference::{Reference, Scheme, Target, folder, folder_name};
use crate::runtime::{blocking, chunks};
use crate::source::{Body, Source};
use async_trait::async_trait;
use sha2::Digest as _;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use url::Url;

/// Nanoseconds in a second.
const NS_PER_S: i64 = 1_000_000_000;

/// The local filesystem.
#[derive(Debug)]
pub(super) struct Folders;

#[async_trait]
impl Origin for Folders {
    fn scheme(&self) -> &'static Scheme {
        &folder::SCHEME
    }

    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        let Target::Folder(path) = &reference.target else { return Ok(None) };
        resolve(path.as_str()).await
    }

    /// A folder must be resolved again to find out whether it still has that version.
    fn source(&self, _reference: &Reference, _key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        None
    }
}

/// Lists the file or folder at `path` and returns its key with a source bound to it; `None` if it does not exist.
pub(super) async fn resolve(path: &str) -> Result<Option<ResolvedSource>> {
    let path = path.to_owned();
    let Some(source) = blocking(move || FolderSource::list(&path)).await? else { return Ok(None) };
    Ok(Some(ResolvedSource { key: source.manifest.key.clone(), source: Arc::new(source) }))
}

/// The source for a file or folder as it was when listed.
#[derive(Debug)]
struct FolderSource {
    /// The folder, or the parent folder of a single file.
    base: PathBuf,
    manifest: Manifest,
    identities: BTreeMap<FilePath, FileIdentity>,
}

#[async_trait]
impl Source for FolderSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    fn endpoint(&self) -> Option<String> {
        // A local folder is not read over connections.
        None
    }

    fn store(&self) -> Option<String> {
        Url::from_file_path(&self.base).ok().map(String::from)
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        Ok(Some(self.manifest.clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.open(path, range).await.context(&self.manifest.key, Tier::Origin)
    }
}

impl FolderSource {
    /// Lists the file or folder at `path`. Returns `None` if it does not exist.
    fn list(path: &str) -> Result<Option<Self>> {
        let root = Path::new(path);
        let metadata = match root.metadata() {
            Ok(metadata) => metadata,
            // `NotADirectory`: a parent in the path is a file.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(unreadable(root, error)),
        };
        let mut walk = Walk::default();
        let (base, shape) = if metadata.is_dir() {
            walk.folder(root, "", &metadata)?;
            if walk.identities.is_empty() {
                let what = format!("{} holds no files", root.display());
                return Err(no_files(what).hint("check the path, and that the folder is mounted"));
            }
            (root, Shape::Tree)
        } else {
            let name = root.file_name().and_then(|name| name.to_str());
            walk.entry(root, name.unwrap_or_default(), &metadata)?;
            (root.parent().unwrap_or(root), Shape::File)
        };
        // The name is the path, the version a hash of the listing.
        let key = ArtifactKey::new(folder_name(path)?, version(shape, &walk)?);
        let mut manifest = Manifest::new(key, shape);
        let entry = |path: &FilePath, identity: &FileIdentity| {
            let executable = walk.executables.contains(path);
            FileEntry::with(identity.bytes, FileDetails { executable, ..FileDetails::default() })
        };
        manifest.files = walk.identities.iter().map(|(path, found)| (path.clone(), entry(path, found))).collect();
        manifest.check().map_err(|error| Error::invalid(error.message()))?;
        Ok(Some(Self { base: base.to_owned(), manifest, identities: walk.identities }))
    }

    /// Opens a file and streams `range` of it in chunks, each read on a blocking thread.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let Some(identity) = self.identities.get(path).copied() else {
            return Err(Error::not_found(format!("there is no file {path} in {}", self.base.display())));
        };
        if range.end < range.start || range.end > identity.bytes {
            return Err(Error::invalid(format!("{path} has no bytes {}..{}", range.start, range.end)));
        }
        let full = self.base.join(path.as_str());
        let file = blocking(move || OpenFolderFile::open(full, identity)).await?;
        Ok(Body { start: range.start, stream: chunks(range, move |buffer, at| file.read(buffer, at)) })
    }
}

/// An open file and the identity that it must keep.
struct OpenFolderFile {
    file: File,
    path: PathBuf,
    identity: FileIdentity,
}

impl OpenFolderFile {
    fn open(path: PathBuf, identity: FileIdentity) -> Result<Self> {
        // Non-blocking: if a pipe has replaced the file, `open` must not wait for a writer.
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file =
            OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Error::not_found(format!("{} is gone", path.display())).hint(HINT_RUN_AGAIN),
                _ => unreadable(&path, error),
            })?;
        let opened = Self { file, path, identity };
        opened.check()?;
        Ok(opened)
    }

    /// Fills `buffer` from `offset`, and checks that the file is still the listed one. Returns the number of bytes.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        match self.file.read_exact_at(buffer, offset) {
            Ok(()) => {}
            // The file became shorter.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(self.changed()),
            Err(error) => return Err(unreadable(&self.path, error)),
        }
        // Check after reading, so that a change before or during the read is noticed.
        self.check()?;
        Ok(buffer.len())
    }

    /// Fails if the open file no longer has the listed identity.
    fn check(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|error| unreadable(&self.path, error))?;
        if now.is_file() && identity(&now) == self.identity { Ok(()) } else { Err(self.changed()) }
    }

    /// Returns the error for a file that no longer has the listed identity.
    fn changed(&self) -> Error {
        Error::corrupt(format!("{} changed while being read", self.path.display())).hint(HINT_RUN_AGAIN)
    }
}

/// Hint for a file that changed or vanished after it was listed.
const HINT_RUN_AGAIN: &str =
    "run the command again once no process writes to the folder; the changed folder is another version";

/// A recursive listing in progress.
#[derive(Default)]
struct Walk {
    identities: BTreeMap<FilePath, FileIdentity>,
    /// The files that their owner may execute.
    executables: BTreeSet<FilePath>,
    /// Device and inode of every folder on the path to the current one.
    ancestors: Vec<(u64, u64)>,
    folders: usize,
}

impl Walk {
    /// Adds all files below the folder at `full`. `relative` is its path within the artifact, `metadata` its metadata.
    fn folder(&mut self, full: &Path, relative: &str, metadata: &Metadata) -> Result<()> {
        let this = (metadata.dev(), metadata.ino());
        // A folder that is its own ancestor is in a loop of links. A folder that is linked twice is not.
        if self.ancestors.contains(&this) {
            return Err(Error::invalid(format!("{} leads back to a folder that contains it", full.display()))
                .hint("remove that link"));
        }
        self.folders += 1;
        if self.folders > limits::FILES_MAX {
            return Err(Error::invalid(format!("more than {} folders", limits::FILES_MAX)));
        }
        self.ancestors.push(this);
        for entry in full.read_dir().map_err(|error| unreadable(full, error))? {
            let full = entry.map_err(|error| unreadable(full, error))?.path();
            let Some(name) = full.file_name().and_then(|name| name.to_str()) else {
                return Err(Error::invalid(format!("{full:?} has a name that is not UTF-8")).hint("rename it"));
            };
            let relative = if relative.is_empty() { name.to_owned() } else { format!("{relative}/{name}") };
            let metadata = full.metadata().map_err(|error| match error.kind() {
                // A directory entry with a missing target is a dangling link.
                io::ErrorKind::NotFound => {
                    Error::invalid(format!("{} is a dangling symbolic link", full.display())).cause(error)
                }
                _ => unreadable(&full, error),
            })?;
            self.entry(&full, &relative, &metadata)?;
        }
        self.ancestors.pop();
        Ok(())
    }

    /// Adds the file or folder at `full`. `relative` is its path within the artifact, `metadata` its metadata.
    fn entry(&mut self, full: &Path, relative: &str, metadata: &Metadata) -> Result<()> {
        // The metadata of a link is that of its target, so the type is never a link.
        let kind = metadata.file_type();
        if kind.is_dir() {
            return self.folder(full, relative, metadata);
        }
        if !kind.is_file() {
            let what = match () {
                () if kind.is_fifo() => "a pipe",
                () if kind.is_socket() => "a socket",
                () => "a device",
            };
            return Err(Error::invalid(format!("{} is {what}; only files can be cached", full.display())));
        }
        let path = FilePath::new(relative).map_err(|error| {
            Error::invalid(format!("{} cannot be cached: {}", full.display(), error.message())).hint("rename it")
        })?;
        if self.identities.len() == limits::FILES_MAX {
            return Err(Error::invalid(format!("more than {} files", limits::FILES_MAX)));
        }
        if metadata.mode() & 0o100 != 0 {
            self.executables.insert(path.clone());
        }
        self.identities.insert(path, identity(metadata));
        Ok(())
    }
}

/// Returns the inode, size and modification time of a file.
fn identity(metadata: &Metadata) -> FileIdentity {
    let mtime_ns = metadata.mtime().saturating_mul(NS_PER_S).saturating_add(metadata.mtime_nsec());
    FileIdentity { inode: metadata.ino(), bytes: metadata.len(), mtime_ns }
}

/// Returns a hash over the list of files. A path has no control characters, so two lists cannot give the same text.
fn version(shape: Shape, walk: &Walk) -> Result<Version> {
    let mut hasher = sha2::Sha256::new();
    hasher.update(format!("{shape:?}\n"));
    for (path, FileIdentity { inode, bytes, mtime_ns }) in &walk.identities {
        // A change of the mode does not change the modification time.
        let executable = if walk.executables.contains(path) { "\tx" } else { "" };
        hasher.update(format!("{path}\t{bytes}\t{mtime_ns}\t{inode}{executable}\n"));
    }
    Version::new(&Digest::from_bytes(hasher.finalize().into()).to_string())
}

/// Converts an I/O error of reading `path` into an error with a hint.
fn unreadable(path: &Path, error: io::Error) -> Error {
    let what = format!("cannot read {}", path.display());
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            Error::new(ErrorKind::Unauthorized, what).hint("give the user that runs this command read access to it")
        }
        _ => Error::new(ErrorKind::Other, what),
    }
    .cause(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::symlink;

    /// Creates a special file or a link at a path.
    type Make<'a> = &'a dyn Fn(&Path);

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("folder");
        for (path, content) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("parent")).expect("folders");
            std::fs::write(path, content).expect("file");
        }
        folder
    }

    async fn resolved(path: &Path) -> Result<Option<ResolvedSource>> {
        resolve(path.to_str().expect("UTF-8")).await
    }

    async fn key(path: &Path) -> ArtifactKey {
        resolved(path).await.expect("resolves").expect("is there").key
    }

    async fn read(source: &Arc<dyn Source>, path: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let mut body = source.read(&FilePath::new(path)?, range).await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = body.stream.next().await {
            bytes.extend_from_slice(&chunk?);
        }
        Ok(bytes)
    }

    #[tokio::test]
    async fn a_missing_path_is_absent() {
        let folder = folder(&[("a", b"1")]);
        assert!(resolved(&folder.path().join("b")).await.expect("no failure").is_none());
        assert!(resolved(&folder.path().join("a/b")).await.expect("no failure").is_none());
    }

    #[tokio::test]
    async fn the_version_changes_with_the_folder_and_only_then() {
        let folder = folder(&[("a", b"1"), ("d/b", b"2")]);
        let path = folder.path();
        let mut seen = vec![key(path).await];
        assert_eq!(key(path).await, seen[0], "nothing changed");
        assert_eq!(seen[0].name, folder_name(path.to_str().expect("UTF-8")).expect("name"));
        let mut changed = async |what: &str| {
            let key = key(path).await;
            assert!(!seen.contains(&key), "{what} went unnoticed");
            seen.push(key);
        };
        std::fs::write(path.join("c"), b"3").expect("new");
        changed("a new file").await;
        std::fs::rename(path.join("c"), path.join("c2")).expect("renamed");
        changed("another name").await;
        std::fs::write(path.join("a"), b"11").expect("longer");
        changed("another size").await;
        let times = std::fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        File::open(path.join("a")).and_then(|file| file.set_times(times)).expect("older");
        changed("another mtime").await;
        std::fs::write(path.join("other"), b"22").expect("other");
        File::open(path.join("other")).and_then(|file| file.set_times(times)).expect("as old");
        std::fs::rename(path.join("other"), path.join("a")).expect("replaced");
        changed("another inode").await;
        assert_ne!(key(&path.join("a")).await.version, key(path).await.version);
    }

    #[tokio::test]
    async fn special_files_and_broken_links_are_rejected_by_name() {
        let pipe = |path: &Path| {
            let mode = rustix::fs::Mode::RUSR;
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).expect("pipe");
        };
        let socket = |path: &Path| drop(std::os::unix::net::UnixListener::bind(path).expect("socket"));
        let link = |to: &'static str| move |path: &Path| symlink(to, path).expect("link");
        let (device, dangling, back) = (link("/dev/null"), link("no/such/file"), link(".."));
        let cases: [(&str, Make<'_>); 5] = [
            ("a pipe", &pipe),
            ("a socket", &socket),
            ("a device", &device),
            ("is a dangling symbolic link", &dangling),
            ("leads back", &back),
        ];
        for (what, make) in cases {
            let folder = folder(&[("d/a", b"1")]);
            make(&folder.path().join("d/odd"));
            let error = resolved(folder.path()).await.expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert!(error.message().contains("d/odd") && error.message().contains(what), "{what}: {error}");
        }
    }

    #[tokio::test]
    async fn names_that_an_artifact_must_not_have_are_rejected() {
        for name in [&b"\xff.bin"[..], b"a\\b", b"a\nb", b".modelcache"] {
            let folder = folder(&[("fine", b"1")]);
            std::fs::write(folder.path().join(std::ffi::OsStr::from_bytes(name)), b"1").expect("file");
            let error = resolved(folder.path()).await.expect_err("odd name");
            assert_eq!((error.kind(), error.hint_text()), (ErrorKind::Invalid, Some("rename it")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_file_that_changed_since_it_was_listed_is_not_read() {
        let folder = folder(&[("a", b"12345"), ("gone", b"1"), ("pipe", b"1")]);
        let source = resolved(folder.path()).await.expect("resolves").expect("is there").source;
        assert_eq!(read(&source, "a", 1..4).await.expect("unchanged"), b"234");
        std::fs::write(folder.path().join("a"), b"54321").expect("written");
        let error = read(&source, "a", 0..5).await.expect_err("another mtime");
        assert!(error.kind() == ErrorKind::Corrupt && !error.is_transient(), "{error}");
        assert!(error.message().contains("changed while being read") && error.hint_text().is_some(), "{error}");

        std::fs::remove_file(folder.path().join("gone")).expect("removed");
        assert_eq!(read(&source, "gone", 0..1).await.expect_err("gone").kind(), ErrorKind::NotFound);

        let pipe = folder.path().join("pipe");
        std::fs::remove_file(&pipe).expect("removed");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).expect("pipe");
        assert_eq!(read(&source, "pipe", 0..1).await.expect_err("a pipe now").kind(), ErrorKind::Corrupt);
    }

    #[tokio::test]
    async fn a_file_that_changes_during_a_read_fails_the_stream() {
        let content = vec![7; 3 << 20];
        let folder = folder(&[("a", &content)]);
        let source = resolved(folder.path()).await.expect("resolves").expect("is there").source;
        let mut body = source.read(&FilePath::new("a").expect("path"), 0..content.len() as u64).await.expect("opens");
        body.stream.next().await.expect("first").expect("first chunk");
        let file = OpenOptions::new().write(true).open(folder.path().join("a")).expect("opens");
        file.set_len((1 << 20) + 1).expect("cut");
        let error = body.stream.next().await.expect("second").expect_err("cut short");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(body.stream.next().await.is_none(), "an error ends the stream");
    }

    #[tokio::test]
    async fn folders_linked_twice_are_no_loop() {
        let folder = folder(&[("d/a", b"1")]);
        symlink("d", folder.path().join("e")).expect("link");
        let source = resolved(folder.path()).await.expect("resolves").expect("is there").source;
        let manifest = source.manifest().await.expect("listed").expect("is there");
        assert_eq!(manifest.files.keys().map(FilePath::as_str).collect::<Vec<_>>(), ["d/a", "e/a"]);
        assert_eq!(manifest.files.values().filter(|entry| entry.provenance.is_some()).count(), 0);
    }

    #[test]
    fn a_file_without_read_permission_is_unauthorized_and_named() {
        let error = unreadable(Path::new("/x/y"), io::ErrorKind::PermissionDenied.into());
        assert!(error.kind() == ErrorKind::Unauthorized && error.message().contains("/x/y"), "{error}");
    }
}
