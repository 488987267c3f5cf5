//! What lies at a place in a bucket or folder, whoever put it there: one object, or the objects below a prefix.
//!
//! Nothing here is trusted: keys that climb, or cannot be the path of a file, are left out and remembered by name. A
//! place with records of ours, or with published versions below it, is told apart and not listed to its end.
//!
//! Surprise: a prefix matches at `/` only, so `models/m` never finds `models/m2`. Where there is an object of exactly
//! that key, it is meant, and what lies below is not looked at, unless it is empty: tools leave such marks for folders.

use super::http_client::LeftOut;
use super::store::{self, Store};
use super::{MANIFEST, failure};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{FilePath, OWN_FOLDER};
use crate::limits;
use crate::manifest::{Manifest, ObjectIdentity, Shape};
use sha2::Digest as _;
use std::collections::{BTreeMap, HashSet};
use std::{fmt, io};

/// Keys that are left out and kept by name, for a message.
const OMITTED_SHOWN: usize = 8;

/// Where to look, below the store's prefix, without slashes at its ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// The key or the prefix.
    pub(crate) base: String,
    /// Only what lies below it is meant, no object of that key.
    pub(crate) folder: bool,
}

impl Address {
    /// The key of `path` below it.
    pub(super) fn below(&self, path: &str) -> String {
        if self.base.is_empty() { path.to_owned() } else { format!("{}/{path}", self.base) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.base, if self.folder { "/" } else { "" })
    }
}

/// What was found.
#[derive(Debug)]
pub(super) enum Look {
    /// Nothing, or nothing that may be seen.
    Nothing,
    /// Records of ours: a published version, or a write in progress.
    Ours,
    /// Versions that we published lie below it, the folder of one of them for instance.
    Above(String),
    /// Objects of somebody else.
    UnmanagedObjects(Listing),
}

/// Objects of somebody else, as they were when they were listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(super) address: Address,
    /// Whether it is the one object whose key is the place itself.
    pub(super) single: bool,
    pub(super) objects: BTreeMap<FilePath, ObjectIdentity>,
    /// Keys below the place that are no files of it.
    pub(super) left_out: Omitted,
}

/// Keys that are left out: how many, and the first of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Omitted {
    pub(super) count: usize,
    pub(super) first: Vec<String>,
}

impl Omitted {
    fn add(&mut self, key: String) {
        // A mark that tools leave for a folder.
        if key.ends_with('/') {
            return;
        }
        self.count += 1;
        if self.first.len() < OMITTED_SHOWN {
            self.first.push(key);
        }
    }
}

impl Listing {
    fn new(address: &Address) -> Self {
        Self { address: address.clone(), single: false, objects: BTreeMap::new(), left_out: Omitted::default() }
    }

    /// The key of `path`, below the store's prefix.
    pub(super) fn key_of(&self, path: &str) -> String {
        match self.address.base.rsplit_once('/') {
            _ if !self.single => self.address.below(path),
            Some((folder, _)) => format!("{folder}/{path}"),
            None => path.to_owned(),
        }
    }

    /// A text that changes when any object does: a version for what has none.
    pub(crate) fn digest(&self) -> Digest {
        let mut hasher = sha2::Sha256::new();
        hasher.update(format!("{}\n", if self.single { "object" } else { "prefix" }));
        for (path, ObjectIdentity { etag, object_bytes }) in &self.objects {
            // A path has no control characters, so the lines cannot be confused.
            hasher.update(format!("{path}\t{object_bytes}\t{}\n", etag.as_deref().unwrap_or_default()));
        }
        Digest::from_bytes(hasher.finalize().into())
    }

    /// An object is a file unless it cannot be one: odd names, and what is listed both as file and as folder.
    fn take(&mut self, store: &Store, path: &str, identity: ObjectIdentity) -> Result<()> {
        let usable = FilePath::new(path).ok().filter(|path| store.key(&self.key_of(path.as_str())).is_ok());
        match usable {
            Some(path) => drop(self.objects.insert(path, identity)),
            None => self.left_out.add(path.to_owned()),
        }
        self.check_size()
    }

    /// Keys that are left out count, too: a listing of nothing else must end as well.
    fn check_size(&self) -> Result<()> {
        match self.objects.len() + self.left_out.count > limits::FILES_MAX {
            true => {
                Err(Error::invalid(format!("more than {} objects below {:?}", limits::FILES_MAX, self.address.base)))
            }
            false => Ok(()),
        }
    }

    /// Leaves out objects whose path is a folder of others.
    fn settle(mut self) -> Self {
        let folders_of = |path: &FilePath| {
            let ends: Vec<_> = path.as_str().match_indices('/').map(|(at, _)| path.as_str()[..at].to_owned()).collect();
            ends
        };
        let folders: HashSet<String> = self.objects.keys().flat_map(folders_of).collect();
        self.objects.retain(|path, identity| {
            let is_folder = folders.contains(path.as_str());
            if is_folder && identity.object_bytes > 0 {
                self.left_out.add(path.to_string());
            }
            !is_folder
        });
        self
    }

    /// What the files are, given how many of them are real: see [`Shape`].
    pub(super) fn shape(&self, mut files: impl Iterator<Item = FilePath>) -> Shape {
        match (files.next(), files.next()) {
            (Some(only), None) if self.left_out.count == 0 && !only.as_str().contains('/') => Shape::File,
            _ => Shape::Tree,
        }
    }
}

/// Lists what lies at `address`.
///
/// # Errors
/// What keeps the store from answering. That listing is not permitted is no error: nothing can be seen then, and a
/// warning says which right is missing.
pub(super) async fn look(store: &Store, address: &Address) -> Result<Look> {
    let single = async {
        if address.folder || address.base.is_empty() || leads_out(store, address).await {
            return Ok(None);
        }
        store.head(&store.key(&address.base)?).await
    };
    let (single, below) = futures::future::join(single, below(store, address)).await;
    let (single, below) = (single?, below?);
    match single {
        _ if matches!(below, Look::Ours) => Ok(below),
        Some(identity) if identity.object_bytes > 0 || matches!(below, Look::Nothing) => {
            let name = address.base.rsplit('/').next().unwrap_or_default();
            let mut listing = Listing { single: true, ..Listing::new(address) };
            listing.take(store, name, identity)?;
            Ok(Look::UnmanagedObjects(listing))
        }
        _ => Ok(below),
    }
}

async fn below(store: &Store, address: &Address) -> Result<Look> {
    match store.folder() {
        Some(_) => below_folder(store, address).await,
        None => below_prefix(store, address).await,
    }
}

/// Whether a path below the place is a pointer of ours. Those belong to names, and say nothing of what lies there.
fn is_pointer(path: &str) -> bool {
    let own = format!("{OWN_FOLDER}/refs/");
    path.starts_with(&own) || path.contains(&format!("/{own}"))
}

/// Whether a path below the place belongs to us, and then what that makes of the place.
fn ours(address: &Address, path: &str) -> Option<Look> {
    if path == OWN_FOLDER || path.strip_prefix(OWN_FOLDER).is_some_and(|rest| rest.starts_with('/')) {
        return Some(Look::Ours);
    }
    let (above, _) = path.split_once(&format!("/{OWN_FOLDER}/"))?;
    Some(Look::Above(address.below(above)))
}

async fn below_prefix(store: &Store, address: &Address) -> Result<Look> {
    let mut listing = Listing::new(address);
    let base = match address.base.as_str() {
        "" => store.root(),
        base => Some(store.key(base)?),
    };
    let prefix = base.as_ref().map_or_else(String::new, |base| format!("{base}/"));
    let mut record = None;
    let permitted = store.pages(base.as_ref(), false, |page| {
        for object in page.objects {
            let path = object.location.as_ref().strip_prefix(&prefix).filter(|path| !is_pointer(path));
            let Some(path) = path else { continue };
            if let Some(ours) = ours(address, path) {
                record = Some(ours);
                return Ok(false);
            }
            listing.take(store, path, store::identity(&object))?;
        }
        let odd = page.extensions.get::<LeftOut>().map(|LeftOut(keys)| keys.as_slice()).unwrap_or_default();
        odd.iter().filter_map(|key| key.strip_prefix(&prefix)).for_each(|key| listing.left_out.add(key.to_owned()));
        listing.check_size().map(|()| true)
    });
    if !permitted.await? {
        store::warn_ambiguous(store.at());
        return Ok(Look::Nothing);
    }
    if let Some(record) = record {
        return Ok(record);
    }
    let listing = listing.settle();
    Ok(if listing.objects.is_empty() { Look::Nothing } else { Look::UnmanagedObjects(listing) })
}

/// Whether the place in a folder is a link to somewhere else: whoever may write to a shared folder could have files
/// read for them that they may not read.
async fn leads_out(store: &Store, address: &Address) -> bool {
    let Some(root) = store.folder().map(std::path::Path::to_owned) else { return false };
    let place = root.join(&address.base);
    let leads_out = move || match (root.canonicalize(), place.canonicalize()) {
        (Ok(root), Ok(place)) => !place.starts_with(root),
        _ => false,
    };
    tokio::task::spawn_blocking(leads_out).await.unwrap_or(true)
}

/// Walks a folder that stands for a bucket; links are followed within the remote's folder, and never in a circle.
async fn below_folder(store: &Store, address: &Address) -> Result<Look> {
    let Some(root) = store.folder() else { return Ok(Look::Nothing) };
    if leads_out(store, address).await {
        tracing::warn!(place = address.base, "a link leads out of the remote's folder; what it leads to is left out");
        return Ok(Look::Nothing);
    }
    let (root, folder) = (root.to_owned(), root.join(&address.base));
    let walked = tokio::task::spawn_blocking(move || walk(&root, &folder)).await;
    let cut_short = |cause| Error::new(ErrorKind::Other, "listing the remote was cut short").cause(cause);
    let (mut paths, left_out) = match walked.map_err(cut_short)? {
        Ok(walked) => walked,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Look::Nothing);
        }
        Err(error) => return Err(failure::from_io(&error, &format!("cannot list {:?}", address.base), store.at())),
    };
    paths.retain(|path| !is_pointer(path));
    if let Some(ours) = paths.iter().find_map(|path| ours(address, path)) {
        return Ok(ours);
    }
    let mut listing = Listing::new(address);
    left_out.into_iter().for_each(|path| listing.left_out.add(path));
    for path in paths {
        let identity = match store.key(&listing.key_of(&path)) {
            Ok(key) => store.head(&key).await?,
            Err(_) => Some(ObjectIdentity { etag: None, object_bytes: 0 }),
        };
        // Gone since.
        let Some(identity) = identity else { continue };
        listing.take(store, &path, identity)?;
    }
    let listing = listing.settle();
    Ok(if listing.objects.is_empty() { Look::Nothing } else { Look::UnmanagedObjects(listing) })
}

/// Paths of every file below `top`, and of what is none: names that are no text, pipes, links that lead out of `root`.
fn walk(root: &std::path::Path, top: &std::path::Path) -> io::Result<(Vec<String>, Vec<String>)> {
    let (mut paths, mut left_out) = (Vec::new(), Vec::new());
    let root = root.canonicalize()?;
    let mut folders = vec![(top.to_owned(), String::new(), Vec::new())];
    while let Some((folder, inside, mut above)) = folders.pop() {
        above.push(folder.canonicalize()?);
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                left_out.push(path.strip_prefix(top).unwrap_or(&path).to_string_lossy().into_owned());
                continue;
            };
            let inside = if inside.is_empty() { name.to_owned() } else { format!("{inside}/{name}") };
            // A link that leads nowhere is nothing.
            let (Ok(metadata), Ok(real)) = (path.metadata(), path.canonicalize()) else { continue };
            match () {
                () if !real.starts_with(&root) => left_out.push(inside),
                () if metadata.is_file() => paths.push(inside),
                () if !metadata.is_dir() => left_out.push(inside),
                () if !above.contains(&real) => folders.push((path, inside, above.clone())),
                () => {}
            }
        }
    }
    Ok((paths, left_out))
}

/// The manifest that we published at `address`, whatever key it has; `None` where there is none.
pub(super) async fn published(store: &Store, address: &Address) -> Result<Option<Manifest>> {
    let key = store.key(&address.below(&format!("{OWN_FOLDER}/{MANIFEST}")))?;
    let Some((bytes, _)) = store.get(&key, limits::MANIFEST_BYTES_MAX).await? else { return Ok(None) };
    let read = tokio::task::spawn_blocking(move || Manifest::from_bytes(&bytes)).await;
    let cut_short = |cause| Error::new(ErrorKind::Other, "reading a manifest was cut short").cause(cause);
    read.map_err(cut_short)?.map(Some).map_err(|error| error.tier(Tier::Remote))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_ours_are_told_from_names_that_look_alike() {
        let address = Address { base: "team/m".into(), folder: false };
        assert!(matches!(ours(&address, ".modelcache/claim"), Some(Look::Ours)));
        assert!(matches!(ours(&address, "3/.modelcache/manifest.json"), Some(Look::Above(base)) if base == "team/m/3"));
        assert!(ours(&address, "3/.modelcache-notes").is_none() && ours(&address, "a.modelcache/x").is_none());
        assert!(is_pointer(".modelcache/refs/prod") && is_pointer("m/.modelcache/refs/prod"));
        assert!(!is_pointer("3/.modelcache/manifest.json") && !is_pointer("refs/x"));
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
