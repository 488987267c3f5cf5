//! The manifest: the list of **all** files of an artifact, whether this tier holds them or not.
//!
//! A manifest is monotone: an entry may gain a digest, a ladder or a holding, but never changes a size or digest.
//! Merging two manifests that contradict each other fails with [`ErrorKind::Conflict`]. On disk and on the remote, the
//! manifest is the commit point: it is published last, in an envelope with a format number and a checksum. Unknown
//! fields are preserved. The memory that reading needs is bounded: see `manifest/read.rs`.

mod files;
mod read;
mod unknown;

pub use files::{Files, Iter as FilesIter};
pub use unknown::UnknownFields;

use crate::digest::{Digest, GitOid, Provenance};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::Ladder;
use crate::limits;
use crate::option_name::call::FORCE;
use crate::selection::Selection;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::ops::{Deref, DerefMut};

/// The format number. A reader refuses a higher number. Minor releases never raise it.
pub const FORMAT: u32 = 1;

/// Whether an artifact is a single file or a tree of files. This determines the path of the leased artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// A single file; the path is that file.
    File,
    /// Any number of files; the path is the folder.
    Tree,
}

/// All files of an artifact, with their metadata.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Manifest {
    /// The artifact.
    #[serde(flatten)]
    pub key: ArtifactKey,
    /// A single file, or a tree.
    pub shape: Shape,
    /// All files by path.
    pub files: Files,
    /// Fields of other releases, preserved unchanged.
    #[serde(flatten)]
    pub extra: UnknownFields,
}

/// The metadata of one file: its size and [`FileDetails`]. The entry dereferences to the details.
///
/// The details are on the heap, so that a listing of a million files with nothing but sizes stays small.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FileEntry {
    /// The size of the file in bytes.
    pub size: u64,
    #[serde(flatten)]
    details: Option<Box<FileDetails>>,
    /// Fields of other releases, preserved unchanged.
    #[serde(flatten)]
    pub extra: UnknownFields,
}

/// The metadata of one file except its size.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct FileDetails {
    /// The SHA-256 of the bytes, once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// The source of `sha256`, or of `git_oid` while `sha256` is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provenance: Option<Provenance>,
    /// The git object id of the bytes. The Hub publishes it for small files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub git_oid: Option<GitOid>,
    /// The SHA-256 midstates at part boundaries, once the file was hashed in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ladder: Option<Ladder>,
    /// The file format, detected from the content; see [`Format::name`](crate::format::Format::name).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// The identity of the bytes on the tier that stores this manifest; `None` if the tier does not hold them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<HeldIdentity>,
    /// True if the remote has a checksum file `<path>.sha256`, which is not a file of the artifact.
    #[serde(skip_serializing_if = "is_false")]
    pub sidecar: bool,
    /// True if the file may be executed. Absent in manifests of older releases, and for origins that do not record it.
    #[serde(skip_serializing_if = "is_false")]
    pub executable: bool,
}

/// The identity by which a tier recognises, without reading them, the bytes that it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum HeldIdentity {
    /// A verified and published file on disk that may not be on stable storage yet.
    Unsynced(UnsyncedFile),
    /// A file on disk: its identity when its bytes were last hashed.
    Disk(FileIdentity),
    /// An object on the remote: its identity when it was written.
    Remote(ObjectIdentity),
}

/// The identity of a file on a filesystem. While it is unchanged, the bytes are considered unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Inode number.
    pub inode: u64,
    /// The size of the file in bytes.
    pub bytes: u64,
    /// Modification time in nanoseconds since the Unix epoch, by the clock of the filesystem.
    pub mtime_ns: i64,
}

/// A published file that may lose its bytes in a power cut. It is trusted in the boot in which it was marked. After a
/// reboot it is hashed in full before it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnsyncedFile {
    /// The identity of the file when its bytes were hashed.
    #[serde(flatten)]
    pub identity: FileIdentity,
    /// The boot and the mount whose page cache has the bytes; see `disk/unsynced.rs`. Older manifests
    /// have `unsynced_by` instead, the name of a process; such a file is hashed.
    #[serde(rename = "unsynced_mount", alias = "unsynced_by")]
    pub mount: String,
    /// The time of the mark: seconds since boot, including suspended time.
    #[serde(rename = "unsynced_boottime_s", default)]
    pub boottime_s: u64,
}

/// The identity of an object in an object store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectIdentity {
    /// The entity tag, if the store has one.
    pub etag: Option<String>,
    /// The size of the object in bytes.
    pub object_bytes: u64,
}

/// The stored form of a manifest.
#[derive(Serialize)]
struct Envelope<'a> {
    format: u32,
    /// The SHA-256 of the exact bytes of `manifest`.
    sha256: Digest,
    manifest: &'a RawValue,
}

impl Manifest {
    /// Creates a manifest without files.
    pub fn new(key: ArtifactKey, shape: Shape) -> Self {
        Self { key, shape, files: Files::new(), extra: UnknownFields::default() }
    }

    /// Returns the selected files.
    pub fn selected<'a>(&'a self, selection: &'a Selection) -> impl Iterator<Item = (&'a FilePath, &'a FileEntry)> {
        self.files.iter().filter(|(path, _)| selection.matches(path))
    }

    /// Returns true if this tier holds all selected files. Returns false if no file is selected, unless the artifact
    /// has no files.
    pub fn holds(&self, selection: &Selection) -> bool {
        let mut selected = self.selected(selection).peekable();
        (selected.peek().is_some() || self.files.is_empty()) && selected.all(|(_, entry)| entry.held.is_some())
    }

    /// Returns the total size of all files.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|entry| entry.size).sum()
    }

    /// Returns the total size of the held files.
    pub fn held_bytes(&self) -> u64 {
        self.files.values().filter(|entry| entry.held.is_some()).map(|entry| entry.size).sum()
    }

    /// Returns the manifest without holdings, for use on another tier.
    pub fn without_holdings(mut self) -> Self {
        for details in self.files.values_mut().filter_map(|entry| entry.details.as_mut()) {
            (details.held, details.sidecar) = (None, false);
        }
        self
    }

    /// Merges the metadata of `other` into this manifest: digests, ladders, formats, but not holdings.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when the two list different files, sizes or digests; `self` is then unchanged.
    pub fn learn(&mut self, other: &Self) -> Result<()> {
        self.agrees_with(other)?;
        for (path, theirs) in &other.files {
            if let Some(ours) = self.files.get_mut(path) {
                ours.learn(theirs);
            }
        }
        Ok(())
    }

    /// Checks that `other` can describe the same artifact: equal files and sizes, and no contradicting digests. The
    /// error calls `self` the published content and `other` the present content.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] with the first difference.
    pub fn agrees_with(&self, other: &Self) -> Result<()> {
        let Some(difference) = self.difference(other) else { return Ok(()) };
        let conflict = Error::new(ErrorKind::Conflict, format!("already published with other content: {difference}"));
        Err(conflict.artifact(&self.key).hint(format!(
            "a version never changes: publish the new content under another version, or replace it with {FORCE}"
        )))
    }

    /// Logs a warning if files of `self`, the published content, stay executable although `other` has them as not
    /// executable.
    pub(crate) fn warn_kept_executable(&self, other: &Self) {
        let is_plain = |path: &FilePath| other.files.get(path).is_some_and(|entry| !entry.executable);
        let kept: Vec<_> = self.files.iter().filter(|(path, entry)| entry.executable && is_plain(path)).collect();
        if let Some((first, _)) = kept.first() {
            tracing::warn!(
                artifact = %self.key,
                files = kept.len(),
                %first,
                "files stay executable, as they were published; publish them under another version to change that"
            );
        }
    }

    /// Returns the first difference because of which `self`, the published content, and `other`, the present content,
    /// cannot be the same artifact; `None` if files and sizes are equal and no digests contradict each other.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.shape != other.shape {
            let name = |shape| if shape == Shape::File { "a single file" } else { "a folder" };
            return Some(format!("it was published as {}, and now is {}", name(self.shape), name(other.shape)));
        }
        for (path, old) in &self.files {
            let Some(new) = other.files.get(path) else {
                return Some(format!("{path} was published, and now is missing"));
            };
            if old.size != new.size {
                return Some(format!("{path} was published with {} bytes, and now has {}", old.size, new.size));
            }
            if let (Some(old), Some(new)) = (old.sha256, new.sha256)
                && old != new
            {
                let (old, new) = (old.short(), new.short());
                return Some(format!("{path} was published with sha256 {old}, and now has {new}"));
            }
            if let (Some(old), Some(new)) = (old.git_oid, new.git_oid)
                && old != new
            {
                return Some(format!("{path} was published with git object id {old}, and now has {new}"));
            }
        }
        let added = other.files.keys().find(|path| !self.files.contains_key(path));
        added.map(|path| format!("it was published without {path}"))
    }

    /// Returns the digest of the file list: the SHA-256 over `<sha256>  <path>\n` for every file, in byte order of the
    /// paths, as `sha256sum` prints them. Returns `None` until every digest is known.
    pub fn list_digest(&self) -> Option<Digest> {
        let mut text = String::new();
        for (path, entry) in &self.files {
            text.push_str(&format!("{}  {path}\n", entry.sha256?));
        }
        Some(Digest::of(text.as_bytes()))
    }

    /// Returns the digest that a reference can require: of the single file, or of the file list of a tree. Returns
    /// `None` until it is known.
    pub fn content_digest(&self) -> Option<Digest> {
        match self.shape {
            Shape::File => self.files.values().next().and_then(|entry| entry.sha256),
            Shape::Tree => self.list_digest(),
        }
    }

    /// Returns the stored form: the envelope with format number and checksum.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let encode = |cause: serde_json::Error| Error::new(ErrorKind::Other, "cannot write a manifest").cause(cause);
        let manifest = serde_json::value::to_raw_value(self).map_err(encode)?;
        let envelope = Envelope { format: FORMAT, sha256: Digest::of(manifest.get().as_bytes()), manifest: &manifest };
        let mut bytes = serde_json::to_vec(&envelope).map_err(encode)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Parses the stored form. Checks the checksum, the format number, the limits and the consistency.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > limits::MANIFEST_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "the manifest has {} bytes; at most {} are allowed",
                bytes.len(),
                limits::MANIFEST_BYTES_MAX
            )));
        }
        let manifest = read::parse_manifest(read::open_envelope(bytes)?)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Parses the member `manifest` of the stored form. Checks only types and limits.
    #[cfg(fuzzing)]
    pub(crate) fn from_member(text: &str) -> Result<Self> {
        read::prescan(text)?;
        read::parse_manifest(text)
    }

    /// Returns the memory that this manifest uses, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        let name = self.key.name.as_str().len() + self.key.version.as_str().len();
        size_of::<Self>() + name + self.files.memory_bytes() + self.extra.heap_bytes()
    }

    /// Checks the limits and the consistency of a manifest. Also used for lists of files that other tools wrote.
    pub fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::corrupt(message).artifact(&self.key));
        if self.files.len() > limits::FILES_MAX {
            return refuse(format!("it has {} files; at most {} are allowed", self.files.len(), limits::FILES_MAX));
        }
        if self.shape == Shape::File && self.files.len() != 1 {
            return refuse(format!("it is a single file, but its manifest lists {} files", self.files.len()));
        }
        // No folder may also be listed as a file. The paths are sorted, so the folders that a path shares with the
        // previous one are already checked.
        let mut folder_of_previous = None;
        for (path, entry) in &self.files {
            if entry.size > limits::FILE_BYTES_MAX {
                let (size, size_max) = (entry.size, limits::FILE_BYTES_MAX);
                return refuse(format!("{path} has {size} bytes; at most {size_max} are allowed"));
            }
            if entry.ladder.as_ref().is_some_and(|ladder| !ladder.fits(entry.size)) {
                return refuse(format!("{path} has a ladder of the wrong length"));
            }
            let mut folder = path.as_str();
            while let Some((parent, _)) = folder.rsplit_once('/') {
                if folder_of_previous == Some(parent) {
                    break;
                }
                if self.files.contains_key(&FilePath::new(parent)?) {
                    return refuse(format!("{parent} is listed both as a file and as a folder"));
                }
                folder = parent;
            }
            folder_of_previous = path.as_str().rsplit_once('/').map(|(parent, _)| parent);
        }
        Ok(())
    }
}

impl FileEntry {
    /// Creates an entry with only a size.
    pub fn of(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// Creates an entry with details.
    pub fn with(size: u64, details: FileDetails) -> Self {
        let details = (details != FileDetails::NONE).then(|| Box::new(details));
        Self { details, ..Self::of(size) }
    }

    /// Copies the digests, the ladder, the format and the unknown fields that this entry lacks.
    pub fn learn(&mut self, other: &Self) {
        if let Some(theirs) = &other.details {
            self.details.get_or_insert_default().learn(theirs);
        }
        self.extra.learn(&other.extra);
    }

    /// Returns the heap memory that this entry uses, in bytes.
    fn heap_bytes(&self) -> usize {
        self.details.as_ref().map_or(0, |details| details.memory_bytes()) + self.extra.heap_bytes()
    }

    /// Returns the identity of a file on disk that is on stable storage. While it is unchanged, the bytes are
    /// considered unchanged.
    pub fn on_disk(&self) -> Option<FileIdentity> {
        match self.held {
            Some(HeldIdentity::Disk(identity)) => Some(identity),
            _ => None,
        }
    }

    /// Returns the record of a file on disk that may not be on stable storage yet.
    pub fn unsynced(&self) -> Option<&UnsyncedFile> {
        match &self.held {
            Some(HeldIdentity::Unsynced(file)) => Some(file),
            _ => None,
        }
    }

    /// Returns the recorded identity of a file on disk, synced or not. It identifies the file, and does not imply that
    /// its bytes are right.
    pub fn recorded_on_disk(&self) -> Option<FileIdentity> {
        self.on_disk().or_else(|| self.unsynced().map(|file| file.identity))
    }

    /// Returns the identity of an object on the remote.
    pub fn on_remote(&self) -> Option<&ObjectIdentity> {
        match &self.held {
            Some(HeldIdentity::Remote(identity)) => Some(identity),
            _ => None,
        }
    }
}

impl FileDetails {
    /// No details.
    const NONE: Self = Self {
        sha256: None,
        provenance: None,
        git_oid: None,
        ladder: None,
        format: None,
        held: None,
        sidecar: false,
        executable: false,
    };

    /// Copies the digests, the ladder and the format that these details lack.
    fn learn(&mut self, other: &Self) {
        if self.sha256.is_none() && other.sha256.is_some() {
            self.sha256 = other.sha256;
            self.provenance = other.provenance;
        }
        // If both have the same digest, keep the more trustworthy provenance.
        if self.sha256.is_some() && self.sha256 == other.sha256 {
            self.provenance = [self.provenance, other.provenance].into_iter().flatten().min();
        }
        self.provenance = self.provenance.or(other.provenance);
        self.git_oid = self.git_oid.or(other.git_oid);
        // A ladder belongs to one digest.
        if self.ladder.is_none() && self.sha256.is_some() && self.sha256 == other.sha256 {
            self.ladder.clone_from(&other.ladder);
        }
        if self.format.is_none() {
            self.format.clone_from(&other.format);
        }
        self.executable |= other.executable;
    }

    /// Returns the memory that these details use, in bytes.
    fn memory_bytes(&self) -> usize {
        let held = match &self.held {
            Some(HeldIdentity::Unsynced(file)) => file.mount.len(),
            Some(HeldIdentity::Remote(object)) => object.etag.as_ref().map_or(0, String::len),
            Some(HeldIdentity::Disk(_)) | None => 0,
        };
        let ladder = self.ladder.as_ref().map_or(0, Ladder::heap_bytes);
        size_of::<Self>() + held + ladder + self.format.as_ref().map_or(0, String::len)
    }
}

impl Deref for FileEntry {
    type Target = FileDetails;

    fn deref(&self) -> &FileDetails {
        static NONE: FileDetails = FileDetails::NONE;
        self.details.as_deref().unwrap_or(&NONE)
    }
}

impl DerefMut for FileEntry {
    fn deref_mut(&mut self) -> &mut FileDetails {
        self.details.get_or_insert_default()
    }
}

impl PartialEq for FileEntry {
    fn eq(&self, other: &Self) -> bool {
        self.size == other.size && **self == **other && self.extra == other.extra
    }
}

fn is_false(flag: &bool) -> bool {
    !flag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ladder::LadderHasher;

    fn manifest(files: &[(&str, &[u8])]) -> Manifest {
        let mut manifest = Manifest::new(ArtifactKey::bare("team/model@1").expect("key"), Shape::Tree);
        for (path, content) in files {
            let mut hasher = LadderHasher::new(64);
            hasher.update(content);
            let (digest, ladder) = hasher.finish();
            let details = FileDetails {
                sha256: Some(digest),
                provenance: Some(Provenance::Put),
                ladder: Some(ladder),
                held: Some(HeldIdentity::Disk(FileIdentity { inode: 7, bytes: content.len() as u64, mtime_ns: -5 })),
                ..FileDetails::default()
            };
            manifest.files.insert(FilePath::new(path).expect("path"), FileEntry::with(content.len() as u64, details));
        }
        manifest
    }

    #[test]
    fn an_unsynced_file_round_trips() {
        let (mut before, path) = (manifest(&[("a", b"x")]), FilePath::new("a").expect("path"));
        let entry = before.files.get_mut(&path).expect("entry");
        let identity = entry.on_disk().expect("held");
        entry.held = Some(HeldIdentity::Unsynced(UnsyncedFile { identity, mount: "m".into(), boottime_s: 5 }));
        let bytes = before.to_bytes().expect("writes");
        let after = Manifest::from_bytes(&bytes).expect("reads");
        assert_eq!(after, before);
        let entry = &after.files[&path];
        assert_eq!((entry.on_disk(), entry.recorded_on_disk()), (None, Some(identity)));
        assert_eq!(entry.unsynced().map(|file| (file.mount.as_str(), file.boottime_s)), Some(("m", 5)));
    }

    #[test]
    fn a_mark_that_names_a_process_is_never_read_as_durable() {
        let text = r#"{"inode":7,"bytes":2,"mtime_ns":0,"unsynced_by":"0123456789abcdef-xyz"}"#;
        let read: UnsyncedFile = serde_json::from_str(text).expect("a mark");
        assert_eq!((read.mount.as_str(), read.boottime_s), ("0123456789abcdef-xyz", 0));
    }

    #[test]
    fn stored_form_round_trips_and_finds_every_flipped_byte() {
        let manifest = manifest(&[("a", &[1; 200]), ("b/c", b"x")]);
        let bytes = manifest.to_bytes().expect("writes");
        assert_eq!(Manifest::from_bytes(&bytes).expect("reads"), manifest);
        for at in 0..bytes.len() - 1 {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            match Manifest::from_bytes(&bad) {
                Err(_) => {}
                Ok(read) => assert_eq!(read, manifest, "byte {at} changed the manifest unnoticed"),
            }
        }
    }

    #[test]
    fn a_newer_format_is_refused_with_the_remedy() {
        let text = String::from_utf8(manifest(&[]).to_bytes().expect("writes"))
            .expect("text")
            .replace("\"format\":1", "\"format\":2");
        let error = Manifest::from_bytes(text.as_bytes()).expect_err("newer");
        assert_eq!(error.hint_text(), Some("update modelcache"));
    }

    #[test]
    fn the_first_format_is_kept_and_a_sidecar_is_not_merged() {
        let (mut ours, mut theirs) = (manifest(&[("a", b"1")]), manifest(&[("a", b"1")]));
        let entry = |manifest: &mut Manifest| manifest.files.values_mut().next().map(std::mem::take).expect("entry");
        let with = |manifest: &mut Manifest, format: Option<&str>, sidecar| {
            let mut entry = entry(manifest);
            (entry.format, entry.sidecar) = (format.map(str::to_owned), sidecar);
            manifest.files.insert(FilePath::new("a").expect("path"), entry);
        };
        with(&mut theirs, Some("gguf"), true);
        ours.learn(&theirs).expect("agrees");
        with(&mut theirs, Some("zip"), true);
        ours.learn(&theirs).expect("agrees");
        let known = entry(&mut ours);
        assert_eq!((known.format.as_deref(), known.sidecar), (Some("gguf"), false));
        assert!(!entry(&mut theirs.without_holdings()).sidecar);
    }

    #[test]
    fn fields_of_other_releases_survive() {
        let mut manifest = manifest(&[("a", b"1")]);
        let raw = |text: &str| RawValue::from_string(text.to_owned()).expect("JSON");
        manifest.extra.add("co\"lour", &raw(r#"{"red": [1.50, null]}"#));
        manifest.files.values_mut().for_each(|entry| entry.extra.add("mode", &raw("7")));
        let read = Manifest::from_bytes(&manifest.to_bytes().expect("writes")).expect("reads");
        assert_eq!(read, manifest);
        let text = String::from_utf8(read.to_bytes().expect("writes")).expect("text");
        assert!(text.contains(r#""co\"lour":{"red": [1.50, null]}"#) && text.contains(r#""mode":7"#), "{text}");
        let mut learnt = self::manifest(&[("a", b"1")]);
        learnt.learn(&read).expect("agrees");
        assert_eq!(learnt.files, read.files);
    }

    #[test]
    fn merging_adds_details_and_never_changes_any() {
        let full = manifest(&[("a", b"1"), ("b", b"22")]);
        let mut bare = full.clone().without_holdings();
        bare.files.values_mut().for_each(|entry| {
            entry.sha256 = None;
            entry.ladder = None;
            entry.provenance = None;
        });
        bare.learn(&full).expect("agrees");
        assert_eq!(bare, full.clone().without_holdings());

        let other = manifest(&[("a", b"1"), ("b", b"23")]);
        let before = bare.clone();
        assert_eq!(bare.learn(&other).expect_err("other content").kind(), ErrorKind::Conflict);
        assert_eq!(bare, before);
        assert!(bare.learn(&manifest(&[("a", b"1")])).is_err(), "another list of files");
    }

    #[test]
    fn a_partial_artifact_does_not_hold_all_files() {
        let mut manifest = manifest(&[("a.json", b"1"), ("b.bin", b"2")]);
        if let Some(entry) = manifest.files.values_mut().last() {
            entry.held = None;
        }
        assert!(manifest.holds(&Selection::globs(&["*.json"], &[]).expect("globs")));
        assert!(!manifest.holds(&Selection::all()));
        assert!(!manifest.holds(&Selection::globs(&["*.gguf"], &[]).expect("globs")), "an empty selection is not held");
    }

    #[test]
    fn a_path_is_a_file_or_a_folder_not_both() {
        assert_eq!(manifest(&[("a", b"1"), ("a/b", b"2")]).check().expect_err("both").kind(), ErrorKind::Corrupt);
        assert_eq!(
            manifest(&[("a", b"1"), ("a-b", b"3"), ("a/b", b"2")]).check().expect_err("both").kind(),
            ErrorKind::Corrupt
        );
        assert!(manifest(&[("a/b", b"1"), ("a/c", b"2"), ("b/a/c", b"2")]).check().is_ok());
    }

    #[test]
    fn the_list_digest_is_that_of_sha256sum() {
        let manifest = manifest(&[("a", b"1"), ("b", b"2")]);
        let text = format!("{}  a\n{}  b\n", Digest::of(b"1"), Digest::of(b"2"));
        assert_eq!(manifest.list_digest(), Some(Digest::of(text.as_bytes())));
    }
}
