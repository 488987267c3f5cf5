//! Foreign trees: what another tool put where an artifact would lie, read as it is found.
//!
//! Digests come from what lies beside the files (`model.bin.sha256`, `SHA256SUMS` in the same folder or above), else
//! from the object's metadata, else from the store's own checksum; the nearest counts. Checksum files are not part of
//! the view. One that is of no use is named in a warning and counts as absent; a file without any is taken as it comes,
//! and known by its first digest on this disk.
//!
//! Every read is of the object that was listed: one that was replaced since fails as a conflict, and whoever planned
//! with the list makes a new one. Nothing here writes.

use super::Remote;
use super::listing::{self, Address, Listing, Look};
use super::store::{ReadBody, Store};
use crate::digest::{Digest, Provenance};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, FilePath};
use crate::limits;
use crate::manifest::{FileDetails, FileEntry, Held, Manifest, ObjectIdentity};
use crate::sidecar;
use crate::source::Body;
use futures::{StreamExt as _, TryStreamExt as _};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Checksum files read, or objects asked about, at a time.
const LOOKS_IN_FLIGHT: usize = 32;
/// Largest checksum file for one file, in bytes.
const SIDECAR_BYTES_MAX: u64 = 64 * 1024;
/// Names shown where there are many.
const NAMES_SHOWN: usize = 4;
/// The name of a checksum file for a whole folder.
const SUMS: &str = "SHA256SUMS";
/// The end of the name of a checksum file for one file.
const SIDECAR: &str = ".sha256";

/// A foreign tree with all that is stated of its files.
#[derive(Debug)]
pub(crate) struct UnmanagedObjects {
    listing: Arc<Listing>,
    pub(crate) manifest: Manifest,
    /// What states the digest of a file.
    stated_by: BTreeMap<FilePath, String>,
}

/// Digests by file, each with what states it.
type Statements = BTreeMap<FilePath, (Digest, String)>;

/// What one checksum file states.
#[derive(Debug, Default)]
struct StoredChecksums {
    /// Digests of files that are there.
    found: Vec<(FilePath, Digest)>,
    /// Files that it names and that are not there.
    absent: Vec<String>,
}

impl UnmanagedObjects {
    /// Reads what lies beside the files of `listing`, and warns of what is odd, once each.
    pub(super) async fn describe(store: &Store, key: &ArtifactKey, listing: Arc<Listing>) -> Result<Self> {
        let (files, sidecars) = split(&listing);
        let mut statements = Statements::new();
        let (mut useless, mut absent) = (Vec::new(), BTreeSet::new());
        for (sidecar, stated) in read_all(store, &listing, &sidecars, &files).await? {
            // Of one object alone the others were not listed.
            if !listing.single && sidecar.ends_with(SUMS) {
                absent.extend(stated.absent);
            }
            if stated.found.is_empty() {
                useless.push(sidecar);
                continue;
            }
            for (path, digest) in stated.found {
                let later = statements.insert(path.clone(), (digest, sidecar.clone()));
                if let Some((earlier, by)) = later.filter(|(earlier, _)| *earlier != digest) {
                    tracing::warn!(artifact = %key, %path, "{by} and {sidecar} state two digests ({earlier} and {digest}); {sidecar} counts");
                }
            }
        }
        useless.extend(ask(store, &listing, &files, &mut statements).await?);
        let mut manifest = Manifest::new(key.clone(), listing.shape(files.iter().cloned()));
        let mut stated_by = BTreeMap::new();
        for path in &files {
            let Some(identity) = listing.objects.get(path) else { continue };
            let held = Some(Held::Remote(identity.clone()));
            let mut entry = FileEntry::with(identity.object_bytes, FileDetails { held, ..FileDetails::default() });
            if let Some((digest, by)) = statements.remove(path) {
                (entry.sha256, entry.provenance) = (Some(digest), Some(Provenance::Sidecar));
                stated_by.insert(path.clone(), by);
            }
            manifest.files.insert(path.clone(), entry);
        }
        manifest.check()?;
        let unmanaged = Self { listing, manifest, stated_by };
        unmanaged.warn(&useless, &absent);
        Ok(unmanaged)
    }

    fn warn(&self, useless: &[String], absent: &BTreeSet<String>) {
        let (artifact, left_out) = (&self.manifest.key, &self.listing.left_out);
        if left_out.count > 0 {
            tracing::warn!(%artifact, "{} objects cannot be files and are left out: {}", left_out.count, some(&left_out.first));
        }
        if !useless.is_empty() {
            tracing::warn!(%artifact, "no digest of any file here is stated by {}; taken as absent", some(useless));
        }
        if !absent.is_empty() {
            let absent: Vec<_> = absent.iter().collect();
            tracing::warn!(%artifact, "{} files that {SUMS} names are not there ({}): is it still being uploaded?", absent.len(), some(&absent));
        }
        let unknown = unstated(&self.manifest);
        if !unknown.is_empty() {
            let files = self.manifest.files.len();
            tracing::warn!(%artifact, "nobody states a checksum of {} of {files} files ({}), so that nothing can tell whether they are right; {REMEDY}", unknown.len(), some(&unknown));
        }
    }

    /// What states the digest of `path`.
    pub(crate) fn stated_by(&self, path: &FilePath) -> Option<&str> {
        self.stated_by.get(path).map(String::as_str)
    }

    pub(super) async fn read(&self, store: &Store, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.listing.read(store, path, range).await
    }
}

/// What lies at an address that somebody gave.
#[derive(Debug)]
pub(crate) enum AddressContents {
    /// A version that we published, with what is held of it.
    Published(Address, Manifest),
    /// Somebody else's files.
    UnmanagedObjects(Arc<Listing>),
}

impl AddressContents {
    /// A text that changes when the content does.
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
    /// What lies at `address`, or `None`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a place above versions that we published.
    pub(crate) async fn find(&self, address: &Address) -> Result<Option<AddressContents>> {
        let store = self.store().await?;
        match listing::look(store, address).await? {
            Look::Nothing => Ok(None),
            Look::UnmanagedObjects(listing) => Ok(Some(AddressContents::UnmanagedObjects(Arc::new(listing)))),
            Look::Above(version) => {
                Err(Error::invalid(format!("versions are published below it, {version:?} for one"))
                    .hint("name one of them"))
            }
            Look::Ours => {
                let Some(mut manifest) = listing::published(store, address).await? else { return Ok(None) };
                let files = manifest.files.len();
                manifest.files.retain(|_, entry| entry.held.is_some());
                if manifest.files.len() < files {
                    tracing::warn!(%address, "only {} of {files} files are held there", manifest.files.len());
                }
                Ok((!manifest.files.is_empty()).then(|| AddressContents::Published(address.clone(), manifest)))
            }
        }
    }

    /// Everything known of what was listed.
    pub(crate) async fn describe(&self, key: &ArtifactKey, listing: &Arc<Listing>) -> Result<UnmanagedObjects> {
        UnmanagedObjects::describe(self.store().await?, key, listing.clone()).await
    }

    /// Bytes of what was found.
    pub(crate) async fn read_found(&self, found: &AddressContents, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let store = self.store().await?;
        match found {
            AddressContents::UnmanagedObjects(listing) => listing.read(store, path, range).await,
            AddressContents::Published(address, manifest) => {
                let entry = manifest.files.get(path).ok_or_else(|| no_file(path))?;
                // Its digest is known: an object that was copied has another ETag, and the same bytes.
                let held = ObjectIdentity { etag: None, object_bytes: entry.size };
                read(store, &address.below(path.as_str()), path, &held, range).await
            }
        }
    }

    /// Whether another tool put something where the artifact `key` would lie.
    pub(crate) async fn has_unmanaged(&self, key: &ArtifactKey) -> Result<bool> {
        Ok(at_key(self.store().await?, key).await?.is_some())
    }

    /// Refuses what another tool put where the artifact `key` would lie: it is not ours to remove.
    pub(super) async fn refuse_unmanaged(&self, key: &ArtifactKey) -> Result<()> {
        let Some(listing) = at_key(self.store().await?, key).await? else { return Ok(()) };
        let what =
            format!("{:?} was put there by another tool, and is not modelcache's to remove", listing.address.base);
        Err(Error::new(ErrorKind::Conflict, what).hint(
            "remove it with that tool, for instance `aws s3 rm --recursive`; `--tier disk` removes the local copy only",
        ))
    }
}

/// The foreign tree where the artifact `key` would lie, once there is no manifest of ours. What came from a URI never
/// lies there by another tool's hand, and is not looked for.
pub(super) async fn at_key(store: &Store, key: &ArtifactKey) -> Result<Option<Listing>> {
    if key.name.scheme().is_some() {
        return Ok(None);
    }
    let address = Address { base: format!("{}/{}", key.name, key.version), folder: false };
    match listing::look(store, &address).await? {
        Look::UnmanagedObjects(listing) => Ok(Some(listing)),
        Look::Nothing | Look::Ours | Look::Above(_) => Ok(None),
    }
}

fn no_file(path: &FilePath) -> Error {
    Error::not_found(format!("there is no file {path}"))
}

impl Listing {
    async fn read(&self, store: &Store, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let listed = self.objects.get(path).ok_or_else(|| no_file(path))?;
        read(store, &self.key_of(path.as_str()), path, listed, range).await
    }
}

/// What to do about files without a checksum.
pub(crate) const REMEDY: &str = "state them: `sha256sum FILE > FILE.sha256` beside each, or one SHA256SUMS";

/// The files of which nobody states a digest.
pub(crate) fn unstated(manifest: &Manifest) -> Vec<&FilePath> {
    let stated = |entry: &FileEntry| {
        (entry.sha256.is_some() || entry.git_oid.is_some()) && entry.provenance != Some(Provenance::FirstSeen)
    };
    manifest.files.iter().filter(|(_, entry)| !stated(entry)).map(|(path, _)| path).collect()
}

/// A few of many names, for a message.
pub(crate) fn some(names: &[impl ToString]) -> String {
    let mut shown: Vec<String> = names.iter().take(NAMES_SHOWN).map(|name| format!("{:?}", name.to_string())).collect();
    if names.len() > NAMES_SHOWN {
        shown.push("…".into());
    }
    shown.join(", ")
}

/// The bytes of the object at `key`, if it still is the one that was listed.
async fn read(store: &Store, key: &str, path: &FilePath, listed: &ObjectIdentity, range: Range<u64>) -> Result<Body> {
    if range.end < range.start || range.end > listed.object_bytes {
        return Err(Error::invalid(format!("{path} has no bytes {}..{}", range.start, range.end)));
    }
    let changed = || {
        Error::new(ErrorKind::Conflict, format!("{path} was replaced or removed after it was listed"))
            .hint("run it again once nothing writes there")
    };
    match store.read(&store.key(key)?, range, listed).await {
        Ok(ReadBody::Stream { start, stream }) => Ok(Body { start, stream }),
        Ok(ReadBody::Changed) => Err(changed()),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(changed()),
        Err(error) => Err(error),
    }
}

/// Files, and the checksum files beside them. Where there is nothing else, checksum files are the files.
fn split(listing: &Listing) -> (BTreeSet<FilePath>, Vec<FilePath>) {
    let paths = || listing.objects.keys().cloned();
    let is_sidecar = |path: &FilePath| {
        let name = path.file_name();
        name == SUMS || (name.len() > SIDECAR.len() && name.ends_with(SIDECAR))
    };
    let files: BTreeSet<FilePath> = paths().filter(|path| !is_sidecar(path)).collect();
    match (listing.single, files.is_empty()) {
        // What lies beside the one object was not listed.
        (true, _) => (paths().collect(), Vec::new()),
        (false, true) => (paths().collect(), Vec::new()),
        (false, false) => (files, paths().filter(is_sidecar).collect()),
    }
}

/// The checksum files from the one that counts least to the one that counts most: those of folders from the top down,
/// then those of single files. With what they state of `files`: nothing where they are no texts of a sensible size.
async fn read_all(
    store: &Store,
    listing: &Listing,
    sidecars: &[FilePath],
    files: &BTreeSet<FilePath>,
) -> Result<Vec<(String, StoredChecksums)>> {
    let mut wanted: Vec<(String, bool)> = match (listing.single, listing.objects.keys().next()) {
        (true, Some(file)) => vec![(SUMS.to_owned(), false), (format!("{file}{SIDECAR}"), false)],
        _ => sidecars.iter().map(|path| (path.to_string(), true)).collect(),
    };
    let rank = |path: &str| (path.ends_with(SIDECAR), path.matches('/').count(), path.to_owned());
    wanted.sort_by_key(|(path, _)| rank(path));
    let reads = wanted.into_iter().map(|(path, listed)| async move {
        let bytes_max = if path.ends_with(SIDECAR) { SIDECAR_BYTES_MAX } else { limits::ANSWER_BYTES_MAX };
        let text = match store.get(&store.key(&listing.key_of(&path))?, bytes_max).await {
            Ok(Some((bytes, _))) => String::from_utf8(bytes.into()).ok(),
            Ok(None) if !listed => return Ok(None),
            Ok(None) => None,
            Err(error) if error.kind() == ErrorKind::Corrupt => None,
            Err(error) => return Err(error),
        };
        let found = text.map(|text| stated(&path, &text, files)).unwrap_or_default();
        Ok(Some((path, found)))
    });
    let reads = futures::stream::iter(reads.collect::<Vec<_>>()).buffered(LOOKS_IN_FLIGHT);
    reads.try_filter_map(|read| async { Ok(read) }).try_collect().await
}

/// What a checksum file states of `files`: those it names, from its own folder on; of the file that it is named after
/// also where it names it in another way, or not at all.
fn stated(sidecar: &str, text: &str, files: &BTreeSet<FilePath>) -> StoredChecksums {
    let folder = sidecar.rsplit_once('/').map_or_else(String::new, |(folder, _)| format!("{folder}/"));
    let own = sidecar.strip_suffix(SIDECAR).and_then(|own| files.get(&FilePath::new(own).ok()?));
    if let Some(own) = own {
        let found = sidecar::digest_of(text, own.file_name()).map(|digest| (own.clone(), digest));
        return StoredChecksums { found: found.into_iter().collect(), absent: Vec::new() };
    }
    let named = sidecar::lines(text)
        .filter_map(|line| Some((FilePath::new(&format!("{folder}{}", line.name?)).ok()?, line.digest)));
    let (found, absent): (Vec<_>, Vec<_>) = named.partition(|(path, _)| files.contains(path));
    // A checksum file may have been made where it already lay, or others did.
    let absent = absent.into_iter().map(|(path, _)| path.to_string());
    StoredChecksums { found, absent: absent.filter(|path| !path.ends_with(SIDECAR) && !path.ends_with(SUMS)).collect() }
}

/// Asks the store about the files of which no checksum file states a digest. The answer names what is of no use.
async fn ask(
    store: &Store,
    listing: &Listing,
    files: &BTreeSet<FilePath>,
    statements: &mut Statements,
) -> Result<Vec<String>> {
    if store.raw_client().is_none() {
        return Ok(Vec::new());
    }
    let unknown = files.iter().filter(|path| !statements.contains_key(*path));
    let asked = unknown.map(|path| async move {
        let stated = store.stated(&store.key(&listing.key_of(path.as_str()))?).await?;
        Ok::<_, Error>(stated.map(|stated| (path, stated)))
    });
    let answers: Vec<_> = futures::stream::iter(asked.collect::<Vec<_>>())
        .buffer_unordered(LOOKS_IN_FLIGHT)
        .try_filter_map(|answer| async { Ok(answer) })
        .try_collect()
        .await?;
    let mut useless = Vec::new();
    for (path, stated) in answers {
        // Of an object that took its place since, nothing is known: reading it will tell.
        let listed = listing.objects.get(path).and_then(|listed| listed.etag.as_deref());
        if super::store::is_another(listed.unwrap_or_default(), stated.etag.as_deref()) {
            continue;
        }
        useless.extend(stated.garbage.map(|header| format!("{header} of {path}")));
        if let Some((digest, header)) = stated.sha256 {
            statements.insert(path.clone(), (digest, header.to_owned()));
        }
    }
    Ok(useless)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> BTreeSet<FilePath> {
        paths.iter().map(|path| FilePath::new(path).expect("path")).collect()
    }

    fn said(sidecar: &str, text: &str, paths: &[&str]) -> Vec<String> {
        stated(sidecar, text, &files(paths)).found.into_iter().map(|(path, _)| path.to_string()).collect()
    }

    #[test]
    fn checksum_files_speak_of_files_of_their_own_folder() {
        let digest = Digest::of(b"x");
        let lines = format!("{digest}  a\n{digest} *sub/b\n{digest}  ../c\n{digest}  /d\n{digest}\n");
        assert_eq!(said("SHA256SUMS", &lines, &["a", "sub/b", "c", "d"]), ["a", "sub/b"]);
        assert_eq!(said("sub/SHA256SUMS", &lines, &["a", "sub/a", "sub/sub/b"]), ["sub/a", "sub/sub/b"]);
        assert_eq!(said("a.sha256", &digest.to_string(), &["a", "b"]), ["a"]);
        assert_eq!(said("a.sha256", &format!("{digest}  /build/out/a\n"), &["a", "b"]), ["a"]);
        assert_eq!(said("a.sha256", &format!("{digest}  b\n"), &["a", "b"]), [""; 0], "it is about another file");
        assert_eq!(said("model.sha256", &format!("{digest}  a\n"), &["a", "b"]), ["a"]);
        assert_eq!(said("a.sha256", "<html>", &["a"]), [""; 0]);
    }

    #[test]
    fn many_names_are_cut_short() {
        assert_eq!(some(&["a", "b"]), r#""a", "b""#);
        assert_eq!(some(&["a", "b", "c", "d", "e"]), r#""a", "b", "c", "d", …"#);
    }
}
