//! Unmanaged objects: objects of another tool at the keys that an artifact would have. They are read and never written.
//!
//! Digests come from checksum files (`model.bin.sha256`, `SHA256SUMS` in the same folder or above), else from the
//! object's metadata, else from the store's checksum. The checksum file nearest to a file takes precedence. Checksum
//! files are not part of the artifact. Unusable ones are reported in a warning and ignored. A file without a checksum
//! is trusted on first use: this disk records the digest of its first download.
//!
//! A read succeeds only if the object is still the one that was listed, by its ETag ([`ListedReads`]). Otherwise it
//! fails with a conflict, and the caller lists again.

use super::Remote;
use super::backend::StoredChecksums;
use super::listed_reads::{ListedReads, is_still_listed};
use super::listing::{self, Address, AddressLookup, Listing};
use super::store::{Store, etag_differs};
use crate::digest::{Digest, Provenance};
use crate::error::{Error, ErrorKind, Result};
use crate::human::first_few;
use crate::key::{ArtifactKey, FilePath};
use crate::limits;
use crate::manifest::{FileDetails, FileEntry, HeldIdentity, Manifest, ObjectIdentity};
use crate::option_name::call::TIER;
use crate::sidecar;
use crate::source::Body;
use futures::{StreamExt as _, TryStreamExt as _};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Concurrent reads of checksum files, and concurrent HEAD requests, of one artifact.
const SMALL_REQUESTS_IN_FLIGHT: usize = 32;
/// Largest checksum file for one file, in bytes.
const SIDECAR_BYTES_MAX: u64 = 64 * 1024;
/// Most names shown in a message.
const NAMES_SHOWN: usize = 4;
/// Name of a checksum file for a whole folder.
const SUMS: &str = "SHA256SUMS";
/// Suffix of the name of a checksum file for one file.
const SIDECAR: &str = ".sha256";

/// A listing of unmanaged objects as an artifact, with the digests found for its files.
#[derive(Debug)]
pub(crate) struct UnmanagedObjects {
    listing: Arc<Listing>,
    pub(crate) manifest: Manifest,
    /// The checksum file or header that contains the digest of a file.
    stated_by: BTreeMap<FilePath, String>,
}

/// The digest of each file, with the name of the checksum file or header that contains it.
type DigestsByFile = BTreeMap<FilePath, (Digest, String)>;

/// The content of one checksum file.
#[derive(Debug, Default)]
struct ChecksumFile {
    /// Digests of existing files.
    found: Vec<(FilePath, Digest)>,
    /// Files that the checksum file lists and that do not exist.
    absent: Vec<String>,
}

impl UnmanagedObjects {
    /// Reads the checksums of the files of `listing` and builds the manifest. Logs a warning for each kind of problem
    /// found.
    pub(super) async fn from_listing(store: &Store, key: &ArtifactKey, listing: Arc<Listing>) -> Result<Self> {
        let (files, checksum_paths) = split(&listing);
        let mut digests = DigestsByFile::new();
        let (mut unusable, mut absent) = (Vec::new(), BTreeSet::new());
        // Step 1: checksum files, from the lowest precedence to the highest. A later one overrides an earlier one.
        for (checksum_path, checksum_file) in read_checksum_files(store, &listing, &checksum_paths, &files).await? {
            // For a single object, the other files of the folder were not listed, so it is unknown whether they exist.
            if !listing.single && checksum_path.ends_with(SUMS) {
                absent.extend(checksum_file.absent);
            }
            if checksum_file.found.is_empty() {
                unusable.push(checksum_path);
                continue;
            }
            for (path, digest) in checksum_file.found {
                let overridden = digests.insert(path.clone(), (digest, checksum_path.clone()));
                if let Some((earlier, by)) = overridden.filter(|(earlier, _)| *earlier != digest) {
                    tracing::warn!(artifact = %key, %path, "{by} and {checksum_path} list different digests ({earlier} and {digest}); {checksum_path} takes precedence");
                }
            }
        }
        // Step 2: for the files without a digest, ask the store.
        unusable.extend(query_store_checksums(store, &listing, &files, &mut digests).await?);
        // Step 3: build the manifest. It records each file as held by the remote.
        let mut manifest = Manifest::new(key.clone(), listing.shape(files.iter().cloned()));
        let mut stated_by = BTreeMap::new();
        for path in &files {
            let Some(identity) = listing.objects.get(path) else { continue };
            let held = Some(HeldIdentity::Remote(identity.clone()));
            let mut entry = FileEntry::with(identity.object_bytes, FileDetails { held, ..FileDetails::default() });
            if let Some((digest, by)) = digests.remove(path) {
                (entry.sha256, entry.provenance) = (Some(digest), Some(Provenance::Sidecar));
                stated_by.insert(path.clone(), by);
            }
            manifest.files.insert(path.clone(), entry);
        }
        manifest.check()?;
        let unmanaged = Self { listing, manifest, stated_by };
        unmanaged.warn(&unusable, &absent);
        Ok(unmanaged)
    }

    /// Logs a warning for each kind of problem found.
    fn warn(&self, unusable: &[String], absent: &BTreeSet<String>) {
        let (artifact, skipped) = (&self.manifest.key, &self.listing.skipped);
        if skipped.count > 0 {
            tracing::warn!(%artifact, "skipping {} objects whose keys are not valid file paths: {}", skipped.count, quoted_names(&skipped.first));
        }
        if !unusable.is_empty() {
            tracing::warn!(%artifact, "ignoring checksums without a usable digest: {}", quoted_names(unusable));
        }
        if !absent.is_empty() {
            let absent: Vec<_> = absent.iter().collect();
            tracing::warn!(%artifact, "{} files listed in {SUMS} do not exist ({}): the upload may be incomplete", absent.len(), quoted_names(&absent));
        }
        let unknown = without_checksum(&self.manifest);
        if !unknown.is_empty() {
            let files = self.manifest.files.len();
            tracing::warn!(%artifact, "no checksum available for {} of {files} files ({}), so their content cannot be verified; {ADD_CHECKSUMS_HINT}", unknown.len(), quoted_names(&unknown));
        }
    }

    /// Returns the name of the checksum file or header that contains the digest of `path`.
    pub(crate) fn stated_by(&self, path: &FilePath) -> Option<&str> {
        self.stated_by.get(path).map(String::as_str)
    }

    /// Returns true if the digest of `path` is known.
    pub(crate) fn has_digest(&self, path: &FilePath) -> bool {
        self.manifest.files.get(path).is_some_and(|entry| entry.sha256.is_some())
    }

    /// Reads a byte range of a file.
    pub(super) async fn read(
        &self,
        store: &Store,
        path: &FilePath,
        range: Range<u64>,
        reads: &ListedReads,
    ) -> Result<Body> {
        self.listing.read(store, path, range, reads, self.has_digest(path)).await
    }
}

/// The content of an address that a user passed, for instance in an `s3://` reference.
#[derive(Debug)]
pub(crate) enum AddressContents {
    /// A published version. The manifest contains only the files that are on the remote.
    Published(Address, Manifest),
    /// Files of another tool.
    UnmanagedObjects(Arc<Listing>),
}

impl AddressContents {
    /// Returns a digest that changes when the content changes.
    pub(crate) fn digest(&self) -> Digest {
        match self {
            Self::UnmanagedObjects(listing) => listing.digest(),
            Self::Published(_, manifest) => {
                let line = |(path, entry): (&FilePath, &FileEntry)| {
                    let sha256 = entry.sha256.map_or_else(String::new, |sha256| sha256.to_string());
                    format!("{path}\t{}\t{sha256}\n", entry.size)
                };
                Digest::of(manifest.files.iter().map(line).collect::<String>().as_bytes())
            }
        }
    }
}

impl Remote {
    /// Returns the content of `address`, or `None` if no object exists.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if published versions lie below the address.
    pub(crate) async fn find(&self, address: &Address) -> Result<Option<AddressContents>> {
        let store = self.store().await?;
        match listing::look_up(store, address).await? {
            AddressLookup::Nothing => Ok(None),
            AddressLookup::UnmanagedObjects(listing) => Ok(Some(AddressContents::UnmanagedObjects(Arc::new(listing)))),
            AddressLookup::AboveVersions(version) => {
                Err(Error::invalid(format!("versions are published below this address, for example {version:?}"))
                    .hint("use the address of one version"))
            }
            AddressLookup::OwnRecords => {
                let Some(mut manifest) = listing::published(store, address).await? else { return Ok(None) };
                let files = manifest.files.len();
                // A version may be published with a selection of its files.
                manifest.files.retain(|_, entry| entry.held.is_some());
                if manifest.files.len() < files {
                    tracing::warn!(%address, "only {} of {files} files are on the remote", manifest.files.len());
                }
                Ok((!manifest.files.is_empty()).then(|| AddressContents::Published(address.clone(), manifest)))
            }
        }
    }

    /// Reads the checksums of listed objects and returns them as an artifact.
    pub(crate) async fn describe(&self, key: &ArtifactKey, listing: &Arc<Listing>) -> Result<UnmanagedObjects> {
        UnmanagedObjects::from_listing(self.store().await?, key, listing.clone()).await
    }

    /// Reads a byte range of a file of `contents`, which [`find`](Self::find) returned. `has_digest`: the digest of the
    /// file is known.
    pub(crate) async fn read_found(
        &self,
        contents: &AddressContents,
        path: &FilePath,
        range: Range<u64>,
        reads: &ListedReads,
        has_digest: bool,
    ) -> Result<Body> {
        let store = self.store().await?;
        match contents {
            AddressContents::UnmanagedObjects(listing) => listing.read(store, path, range, reads, has_digest).await,
            AddressContents::Published(address, manifest) => {
                let entry = manifest.files.get(path).ok_or_else(|| no_file(path))?;
                // The manifest has the digest, and a copied object has another ETag but the same bytes.
                let held = ObjectIdentity { etag: None, object_bytes: entry.size };
                read(store, &address.below(path.as_str()), path, &held, range, reads, true).await
            }
        }
    }

    /// Returns true if the folder of the artifact `key` has objects of another tool.
    pub(crate) async fn has_unmanaged(&self, key: &ArtifactKey) -> Result<bool> {
        Ok(at_key(self.store().await?, key).await?.is_some())
    }

    /// Fails if the folder of the artifact `key` has objects of another tool. modelcache does not remove these.
    pub(super) async fn refuse_unmanaged(&self, key: &ArtifactKey) -> Result<()> {
        let Some(listing) = at_key(self.store().await?, key).await? else { return Ok(()) };
        let message = format!("{:?} was uploaded by another tool; modelcache does not remove it", listing.address.base);
        Err(Error::new(ErrorKind::Conflict, message).hint(format!(
            "remove it with that tool, for instance `aws s3 rm --recursive`; {} removes the local copy only",
            TIER.set_to("disk")
        )))
    }
}

/// Returns the unmanaged objects in the folder of the artifact `key`, or `None` if modelcache published it or no object
/// exists. Returns `None` for an artifact of an origin, because other tools do not use the layout of its key.
pub(super) async fn at_key(store: &Store, key: &ArtifactKey) -> Result<Option<Listing>> {
    if key.name.scheme().is_some() {
        return Ok(None);
    }
    let address = Address { base: format!("{}/{}", key.name, key.version), folder: false };
    match listing::look_up(store, &address).await? {
        AddressLookup::UnmanagedObjects(listing) => Ok(Some(listing)),
        AddressLookup::Nothing | AddressLookup::OwnRecords | AddressLookup::AboveVersions(_) => Ok(None),
    }
}

fn no_file(path: &FilePath) -> Error {
    Error::not_found(format!("the artifact has no file {path}"))
}

impl Listing {
    /// Reads a byte range of a listed file.
    async fn read(
        &self,
        store: &Store,
        path: &FilePath,
        range: Range<u64>,
        reads: &ListedReads,
        has_digest: bool,
    ) -> Result<Body> {
        let listed = self.objects.get(path).ok_or_else(|| no_file(path))?;
        read(store, &self.key_of(path.as_str()), path, listed, range, reads, has_digest).await
    }
}

/// Hint for files without a checksum.
pub(crate) const ADD_CHECKSUMS_HINT: &str =
    "add checksums: `sha256sum FILE > FILE.sha256` beside each file, or one SHA256SUMS";

/// Returns the files without a checksum. A digest of the first download (trust on first use) does not count.
pub(crate) fn without_checksum(manifest: &Manifest) -> Vec<&FilePath> {
    let has_checksum = |entry: &FileEntry| {
        (entry.sha256.is_some() || entry.git_oid.is_some()) && entry.provenance != Some(Provenance::FirstSeen)
    };
    manifest.files.iter().filter(|(_, entry)| !has_checksum(entry)).map(|(path, _)| path).collect()
}

/// Returns the first [`NAMES_SHOWN`] names, quoted and joined, for a message.
pub(crate) fn quoted_names(names: &[impl ToString]) -> String {
    first_few(names.iter().map(|name| format!("{:?}", name.to_string())), NAMES_SHOWN)
}

/// Reads a range of the object at `key`.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the object was replaced or removed since it was `listed`.
async fn read(
    store: &Store,
    key: &str,
    path: &FilePath,
    listed: &ObjectIdentity,
    range: Range<u64>,
    reads: &ListedReads,
    has_digest: bool,
) -> Result<Body> {
    if range.end < range.start || range.end > listed.object_bytes {
        return Err(Error::invalid(format!("{path} has no bytes {}..{}", range.start, range.end)));
    }
    let changed = || {
        Error::new(ErrorKind::Conflict, format!("{path} was replaced or removed after it was listed"))
            .hint("run the command again when no tool changes these objects")
    };
    match reads.read(store, &store.key(key)?, range, listed, has_digest).await {
        Ok(body) => body.ok_or_else(changed),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(changed()),
        Err(error) => Err(error),
    }
}

/// Splits the listed paths into files and checksum files. If there are only checksum files, they are the files.
fn split(listing: &Listing) -> (BTreeSet<FilePath>, Vec<FilePath>) {
    let paths = || listing.objects.keys().cloned();
    let is_checksum_file = |path: &FilePath| {
        let name = path.file_name();
        name == SUMS || (name.len() > SIDECAR.len() && name.ends_with(SIDECAR))
    };
    let files: BTreeSet<FilePath> = paths().filter(|path| !is_checksum_file(path)).collect();
    match (listing.single, files.is_empty()) {
        // A single object: the other objects of its folder were not listed.
        (true, _) => (paths().collect(), Vec::new()),
        (false, true) => (paths().collect(), Vec::new()),
        (false, false) => (files, paths().filter(is_checksum_file).collect()),
    }
}

/// Reads the checksum files and returns each with its content, from the lowest precedence to the highest: those of
/// folders from the top down, then those of single files. A checksum file that is too large or not UTF-8 counts as
/// empty.
async fn read_checksum_files(
    store: &Store,
    listing: &Listing,
    checksum_paths: &[FilePath],
    files: &BTreeSet<FilePath>,
) -> Result<Vec<(String, ChecksumFile)>> {
    // Path and whether it was listed. The checksum files of a single object were not listed and may not exist.
    let mut wanted: Vec<(String, bool)> = match (listing.single, listing.objects.keys().next()) {
        (true, Some(file)) => vec![(SUMS.to_owned(), false), (format!("{file}{SIDECAR}"), false)],
        _ => checksum_paths.iter().map(|path| (path.to_string(), true)).collect(),
    };
    let precedence = |path: &str| (path.ends_with(SIDECAR), path.matches('/').count(), path.to_owned());
    wanted.sort_by_key(|(path, _)| precedence(path));
    let reads = wanted.into_iter().map(|(path, listed)| async move {
        let bytes_max = if path.ends_with(SIDECAR) { SIDECAR_BYTES_MAX } else { limits::RESPONSE_BYTES_MAX };
        let text = match store.get(&store.key(&listing.key_of(&path))?, bytes_max).await {
            Ok(Some((bytes, _))) => String::from_utf8(bytes.into()).ok(),
            Ok(None) if !listed => return Ok(None),
            Ok(None) => None,
            Err(error) if error.kind() == ErrorKind::Corrupt => None,
            Err(error) => return Err(error),
        };
        let found = text.map(|text| parse_checksum_file(&path, &text, files)).unwrap_or_default();
        Ok(Some((path, found)))
    });
    let reads = futures::stream::iter(reads.collect::<Vec<_>>()).buffered(SMALL_REQUESTS_IN_FLIGHT);
    reads.try_filter_map(|read| async { Ok(read) }).try_collect().await
}

/// Parses a checksum file. Its paths are relative to its own folder. A file such as `model.bin.sha256` may also list
/// `model.bin` under another path, or contain only the digest.
fn parse_checksum_file(checksum_path: &str, text: &str, files: &BTreeSet<FilePath>) -> ChecksumFile {
    let folder = checksum_path.rsplit_once('/').map_or_else(String::new, |(folder, _)| format!("{folder}/"));
    // The file that the checksum file is named after, if it exists.
    let target = checksum_path.strip_suffix(SIDECAR).and_then(|target| files.get(&FilePath::new(target).ok()?));
    if let Some(target) = target {
        let found = sidecar::digest_of(text, target.file_name()).map(|digest| (target.clone(), digest));
        return ChecksumFile { found: found.into_iter().collect(), absent: Vec::new() };
    }
    let listed = sidecar::lines(text)
        .filter_map(|line| Some((FilePath::new(&format!("{folder}{}", line.name?)).ok()?, line.digest)));
    let (found, absent): (Vec<_>, Vec<_>) = listed.partition(|(path, _)| files.contains(path));
    // `sha256sum *` lists checksum files, too. They are not files of the artifact and are not reported as absent.
    let absent = absent.into_iter().map(|(path, _)| path.to_string());
    ChecksumFile { found, absent: absent.filter(|path| !path.ends_with(SIDECAR) && !path.ends_with(SUMS)).collect() }
}

/// Requests the store's checksums of the files that `digests` lacks, and adds them. Returns the names of headers with
/// invalid values.
async fn query_store_checksums(
    store: &Store,
    listing: &Listing,
    files: &BTreeSet<FilePath>,
    digests: &mut DigestsByFile,
) -> Result<Vec<String>> {
    let unknown = files.iter().filter(|path| !digests.contains_key(*path));
    let requests = unknown.map(|path| async move {
        let key = store.key(&listing.key_of(path.as_str()))?;
        let Some(stored) = store.stored_checksums(&key).await? else { return Ok(None) };
        // If the object was replaced since the listing, its checksum does not apply, and the read will fail. Another
        // ETag alone does not prove this, because some stores list another ETag than they send with the object. So list
        // the object again.
        if let Some(listed) = listing.objects.get(path)
            && has_other_etag(listed, &stored)
            && !is_still_listed(store, &key, listed).await?
        {
            return Ok(None);
        }
        Ok::<_, Error>(Some((path, stored)))
    });
    let checksums: Vec<_> = futures::stream::iter(requests.collect::<Vec<_>>())
        .buffer_unordered(SMALL_REQUESTS_IN_FLIGHT)
        .try_filter_map(|stored| async { Ok(stored) })
        .try_collect()
        .await?;
    let mut unusable = Vec::new();
    for (path, stored) in checksums {
        unusable.extend(stored.invalid_header.map(|header| format!("{header} of {path}")));
        if let Some((digest, header)) = stored.sha256 {
            digests.insert(path.clone(), (digest, header.to_owned()));
        }
    }
    Ok(unusable)
}

/// Returns true if `stored` has another ETag than the listed object. Returns false if either is unknown.
fn has_other_etag(listed: &ObjectIdentity, stored: &StoredChecksums) -> bool {
    listed.etag.as_deref().is_some_and(|etag| etag_differs(etag, stored.etag.as_deref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> BTreeSet<FilePath> {
        paths.iter().map(|path| FilePath::new(path).expect("path")).collect()
    }

    fn files_listed_in(sidecar: &str, text: &str, paths: &[&str]) -> Vec<String> {
        parse_checksum_file(sidecar, text, &files(paths)).found.into_iter().map(|(path, _)| path.to_string()).collect()
    }

    #[test]
    fn checksum_files_apply_to_files_of_their_own_folder() {
        let digest = Digest::of(b"x");
        let lines = format!("{digest}  a\n{digest} *sub/b\n{digest}  ../c\n{digest}  /d\n{digest}\n");
        assert_eq!(files_listed_in("SHA256SUMS", &lines, &["a", "sub/b", "c", "d"]), ["a", "sub/b"]);
        assert_eq!(files_listed_in("sub/SHA256SUMS", &lines, &["a", "sub/a", "sub/sub/b"]), ["sub/a", "sub/sub/b"]);
        assert_eq!(files_listed_in("a.sha256", &digest.to_string(), &["a", "b"]), ["a"]);
        assert_eq!(files_listed_in("a.sha256", &format!("{digest}  /build/out/a\n"), &["a", "b"]), ["a"]);
        assert_eq!(
            files_listed_in("a.sha256", &format!("{digest}  b\n"), &["a", "b"]),
            [""; 0],
            "it is about another file"
        );
        assert_eq!(files_listed_in("model.sha256", &format!("{digest}  a\n"), &["a", "b"]), ["a"]);
        assert_eq!(files_listed_in("a.sha256", "<html>", &["a"]), [""; 0]);
    }

    #[test]
    fn checksums_apply_unless_another_etag_was_listed() {
        let has_other_etag = |listed: Option<&str>, stored: Option<&str>| {
            let listed = ObjectIdentity { etag: listed.map(str::to_owned), object_bytes: 1 };
            let stored = StoredChecksums { etag: stored.map(str::to_owned), sha256: None, invalid_header: None };
            super::has_other_etag(&listed, &stored)
        };
        assert!(!has_other_etag(None, Some("\"a\"")), "the listing has no ETag");
        assert!(!has_other_etag(Some("a"), Some("\"a\"")) && !has_other_etag(Some("a"), None));
        assert!(has_other_etag(Some("a"), Some("b")));
    }

    #[test]
    fn long_lists_of_names_are_shortened() {
        assert_eq!(quoted_names(&["a", "b"]), r#""a", "b""#);
        assert_eq!(quoted_names(&["a", "b", "c", "d", "e"]), r#""a", "b", "c", "d", …"#);
    }
}
