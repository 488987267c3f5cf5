//! Lookup of an address in a bucket or folder: a single object, or all objects below a prefix, written by any tool.
//!
//! Keys are not trusted: a key that is not a valid file path, such as `../x`, is skipped and reported. If the address
//! holds modelcache's own records, or published versions lie below the address, the lookup reports that and stops
//! listing.
//!
//! A prefix matches at `/` only: `models/m` never matches `models/m2`. An object with exactly the key of the address
//! takes precedence over objects below it, unless it is empty, because some tools create empty objects as folder
//! markers.

use super::MANIFEST;
use super::backend::{SkippedKeys, WalkedFiles};
use super::refs::is_ref;
use super::store::{self, Store};
use crate::digest::Digest;
use crate::error::{Error, Result, Tier};
use crate::key::{FilePath, OWN_FOLDER};
use crate::limits;
use crate::manifest::{Manifest, ObjectIdentity, Shape};
use crate::runtime::blocking;
use sha2::Digest as _;
use std::collections::{BTreeMap, HashSet};
use std::fmt;

/// Most skipped keys that are kept for a message.
const SKIPPED_SHOWN_MAX: usize = 8;

/// A key or prefix below the store's prefix, without slashes at its ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// The key or the prefix.
    pub(crate) base: String,
    /// True if the address means only the objects below `base`, not an object with that key.
    pub(crate) folder: bool,
}

impl Address {
    /// Returns the key of `path` below this address.
    pub(super) fn below(&self, path: &str) -> String {
        if self.base.is_empty() { path.to_owned() } else { format!("{}/{path}", self.base) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.base, if self.folder { "/" } else { "" })
    }
}

/// Result of a lookup.
#[derive(Debug)]
pub(super) enum AddressLookup {
    /// No object exists, or listing is not permitted.
    Nothing,
    /// Records of modelcache: a published version, or a publish in progress.
    OwnRecords,
    /// Published versions lie below the address. Contains the folder of one of them.
    AboveVersions(String),
    /// Objects of another tool.
    UnmanagedObjects(Listing),
}

/// A snapshot of the objects of another tool, taken when they were listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(super) address: Address,
    /// True if the listing is a single object, with the address itself as its key.
    pub(super) single: bool,
    pub(super) objects: BTreeMap<FilePath, ObjectIdentity>,
    /// Keys below the address that are not valid file paths.
    pub(super) skipped: SkippedSummary,
}

/// Number of skipped keys, and the first few of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SkippedSummary {
    pub(super) count: usize,
    pub(super) first: Vec<String>,
}

impl SkippedSummary {
    fn add(&mut self, key: String) {
        // Folder markers are expected and are not reported.
        if key.ends_with('/') {
            return;
        }
        self.count += 1;
        if self.first.len() < SKIPPED_SHOWN_MAX {
            self.first.push(key);
        }
    }
}

impl Listing {
    fn new(address: &Address) -> Self {
        Self { address: address.clone(), single: false, objects: BTreeMap::new(), skipped: SkippedSummary::default() }
    }

    /// Returns the key of the listed file `path`, below the store's prefix.
    pub(super) fn key_of(&self, path: &str) -> String {
        match self.address.base.rsplit_once('/') {
            _ if !self.single => self.address.below(path),
            Some((folder, _)) => format!("{folder}/{path}"),
            None => path.to_owned(),
        }
    }

    /// Returns a digest that changes when any object changes. It serves as the version of unversioned objects.
    pub(crate) fn digest(&self) -> Digest {
        let mut hasher = sha2::Sha256::new();
        hasher.update(format!("{}\n", if self.single { "object" } else { "prefix" }));
        for (path, ObjectIdentity { etag, object_bytes }) in &self.objects {
            // A path has no control characters, so tab and newline are unambiguous separators.
            hasher.update(format!("{path}\t{object_bytes}\t{}\n", etag.as_deref().unwrap_or_default()));
        }
        Digest::from_bytes(hasher.finalize().into())
    }

    /// Adds an object as a file, or its key as a skipped one if `path` is not a valid file path.
    fn add(&mut self, store: &Store, path: &str, identity: ObjectIdentity) -> Result<()> {
        let usable = FilePath::new(path).ok().filter(|path| store.key(&self.key_of(path.as_str())).is_ok());
        match usable {
            Some(path) => drop(self.objects.insert(path, identity)),
            None => self.skipped.add(path.to_owned()),
        }
        self.check_size()
    }

    /// Fails if the listing has too many objects. Skipped keys count, so that a listing of invalid keys ends, too.
    fn check_size(&self) -> Result<()> {
        match self.objects.len() + self.skipped.count > limits::FILES_MAX {
            true => {
                Err(Error::invalid(format!("more than {} objects below {:?}", limits::FILES_MAX, self.address.base)))
            }
            false => Ok(()),
        }
    }

    /// Returns the result of the lookup that found this listing.
    fn into_lookup(self) -> AddressLookup {
        let listing = self.without_folders();
        if listing.objects.is_empty() { AddressLookup::Nothing } else { AddressLookup::UnmanagedObjects(listing) }
    }

    /// Removes each object that has other objects below its path, because a file system cannot hold both.
    fn without_folders(mut self) -> Self {
        let folders_of = |path: &FilePath| {
            let slashes = path.as_str().match_indices('/');
            slashes.map(|(end, _)| path.as_str()[..end].to_owned()).collect::<Vec<_>>()
        };
        let folders: HashSet<String> = self.objects.keys().flat_map(folders_of).collect();
        self.objects.retain(|path, identity| {
            let is_folder = folders.contains(path.as_str());
            // An empty object is a folder marker and is dropped silently.
            if is_folder && identity.object_bytes > 0 {
                self.skipped.add(path.to_string());
            }
            !is_folder
        });
        self
    }

    /// Returns the [`Shape`] of the artifact with these `files`, which exclude checksum files.
    pub(super) fn shape(&self, mut files: impl Iterator<Item = FilePath>) -> Shape {
        match (files.next(), files.next()) {
            (Some(only), None) if self.skipped.count == 0 && !only.as_str().contains('/') => Shape::File,
            _ => Shape::Tree,
        }
    }
}

/// Looks up the objects at `address`.
///
/// # Errors
/// Errors of the store. A missing permission to list is not an error: the result is [`AddressLookup::Nothing`], and a
/// warning names the permission.
pub(super) async fn look_up(store: &Store, address: &Address) -> Result<AddressLookup> {
    let single = async {
        if address.folder || address.base.is_empty() || store.backend().leads_outside(&address.base).await {
            return Ok(None);
        }
        store.head(&store.key(&address.base)?).await
    };
    // Both requests run concurrently, because most addresses need both responses.
    let (single, below) = futures::future::join(single, below(store, address)).await;
    let (single, below) = (single?, below?);
    match single {
        _ if matches!(below, AddressLookup::OwnRecords) => Ok(below),
        // A non-empty object with the key of the address takes precedence. An empty one counts only if no object lies
        // below the address.
        Some(identity) if identity.object_bytes > 0 || matches!(below, AddressLookup::Nothing) => {
            let name = address.base.rsplit('/').next().unwrap_or_default();
            let mut listing = Listing { single: true, ..Listing::new(address) };
            listing.add(store, name, identity)?;
            Ok(AddressLookup::UnmanagedObjects(listing))
        }
        _ => Ok(below),
    }
}

/// Looks up the objects below `address`.
async fn below(store: &Store, address: &Address) -> Result<AddressLookup> {
    match store.backend().walk(&address.base).await? {
        Some(walked) => below_folder(store, address, walked).await,
        None => below_prefix(store, address).await,
    }
}

/// Returns the result of the lookup if `path` below the address is a record of modelcache.
fn own_record(address: &Address, path: &str) -> Option<AddressLookup> {
    if path == OWN_FOLDER || path.strip_prefix(OWN_FOLDER).is_some_and(|rest| rest.starts_with('/')) {
        return Some(AddressLookup::OwnRecords);
    }
    let (version_folder, _) = path.split_once(&format!("/{OWN_FOLDER}/"))?;
    Some(AddressLookup::AboveVersions(address.below(version_folder)))
}

/// Looks up the objects below `address` by listing the store.
async fn below_prefix(store: &Store, address: &Address) -> Result<AddressLookup> {
    let mut listing = Listing::new(address);
    let base = match address.base.as_str() {
        "" => store.root(),
        base => Some(store.key(base)?),
    };
    let prefix = base.as_ref().map_or_else(String::new, |base| format!("{base}/"));
    let mut record = None;
    let permitted = store.for_each_page(base.as_ref(), false, |page| {
        for object in page.objects {
            // Refs belong to names and may lie below any address.
            let path = object.location.as_ref().strip_prefix(&prefix).filter(|path| !is_ref(path));
            let Some(path) = path else { continue };
            // One record of modelcache decides the lookup: stop listing.
            if let Some(found) = own_record(address, path) {
                record = Some(found);
                return Ok(false);
            }
            listing.add(store, path, store::identity(&object))?;
        }
        // Keys that the backend removed from the page.
        let removed = page.extensions.get::<SkippedKeys>().map(|SkippedKeys(keys)| keys.as_slice()).unwrap_or_default();
        removed.iter().filter_map(|key| key.strip_prefix(&prefix)).for_each(|key| listing.skipped.add(key.to_owned()));
        listing.check_size().map(|()| true)
    });
    if !permitted.await? {
        store::warn_ambiguous(store.endpoint_context(), None);
        return Ok(AddressLookup::Nothing);
    }
    if let Some(record) = record {
        return Ok(record);
    }
    Ok(listing.into_lookup())
}

/// Looks up the objects below `address` among the files that a walk of the folder found.
async fn below_folder(store: &Store, address: &Address, walked: WalkedFiles) -> Result<AddressLookup> {
    let WalkedFiles { mut paths, skipped } = walked;
    paths.retain(|path| !is_ref(path));
    if let Some(found) = paths.iter().find_map(|path| own_record(address, path)) {
        return Ok(found);
    }
    let mut listing = Listing::new(address);
    skipped.into_iter().for_each(|path| listing.skipped.add(path));
    for path in paths {
        let identity = match store.key(&listing.key_of(&path)) {
            Ok(key) => store.head(&key).await?,
            // Not a valid key: `add` records it as skipped, whatever its identity.
            Err(_) => Some(ObjectIdentity { etag: None, object_bytes: 0 }),
        };
        // The file was removed since the walk.
        let Some(identity) = identity else { continue };
        listing.add(store, &path, identity)?;
    }
    Ok(listing.into_lookup())
}

/// Returns the manifest published at `address`, or `None`. Does not compare the key in the manifest with the address.
pub(super) async fn published(store: &Store, address: &Address) -> Result<Option<Manifest>> {
    let key = store.key(&address.below(&format!("{OWN_FOLDER}/{MANIFEST}")))?;
    let Some((bytes, _)) = store.get(&key, limits::MANIFEST_BYTES_MAX).await? else { return Ok(None) };
    blocking(move || Manifest::from_bytes(&bytes)).await.map(Some).map_err(|error| error.tier(Tier::Remote))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_records_are_distinguished_from_similar_names() {
        let address = Address { base: "team/m".into(), folder: false };
        assert!(matches!(own_record(&address, ".modelcache/claim"), Some(AddressLookup::OwnRecords)));
        let above = own_record(&address, "3/.modelcache/manifest.json");
        assert!(matches!(above, Some(AddressLookup::AboveVersions(base)) if base == "team/m/3"));
        assert!(
            own_record(&address, "3/.modelcache-notes").is_none() && own_record(&address, "a.modelcache/x").is_none()
        );
        assert!(is_ref(".modelcache/refs/prod") && is_ref("m/.modelcache/refs/prod"));
        assert!(!is_ref("3/.modelcache/manifest.json") && !is_ref("refs/x"));
    }

    #[test]
    fn the_digest_changes_with_every_object() {
        let identity = |etag: &str, object_bytes| ObjectIdentity { etag: Some(etag.into()), object_bytes };
        let listing = |rows: &[(&str, ObjectIdentity)]| Listing {
            objects: rows.iter().map(|(path, row)| (FilePath::new(path).expect("path"), row.clone())).collect(),
            ..Listing::new(&Address { base: "p".into(), folder: false })
        };
        let one = listing(&[("a", identity("1", 1))]);
        let mut others = vec![
            listing(&[("a", identity("2", 1))]).digest(),
            listing(&[("a", identity("1", 2))]).digest(),
            listing(&[("b", identity("1", 1))]).digest(),
            listing(&[("a", identity("1", 1)), ("b", identity("1", 1))]).digest(),
            Listing { single: true, ..one.clone() }.digest(),
        ];
        assert_eq!(one.digest(), one.clone().digest());
        others.push(one.digest());
        others.sort();
        others.dedup();
        assert_eq!(others.len(), 6);
    }
}
