//! Publishing: staged files become blobs and views, and a manifest says so, in that order.
//!
//! A reader sees the old manifest or the new one. Blobs are linked (never renamed) from staging, so that a crash between
//! the steps leaves garbage to sweep and never a manifest without bytes. What is recorded as held is the identity under
//! which the bytes were checked; a file that changed since is refused.

use super::budget::BudgetHold;
use super::fault::At;
use super::files::{self, allocated, identity};
use super::layout::ArtifactDir;
use super::lock::FileLock;
use super::staging::Staging;
use super::{Disk, Lent};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::part_size;
use crate::manifest::{FileEntry, FileIdentity, Held, Manifest};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait for a shared lease, which an eviction denies for moments.
const LEASE_WAIT_MAX: Duration = Duration::from_secs(30);

/// A file in staging whose bytes were checked.
#[derive(Debug, Clone)]
pub(crate) struct StagedFile {
    /// Its name in staging.
    pub(crate) name: String,
    /// What is now known of it; `sha256` is known.
    pub(crate) entry: FileEntry,
    /// The identity of the staged file when its bytes were checked.
    pub(crate) identity: FileIdentity,
}

impl Disk {
    /// Makes the checked files of a fill durable and visible, and lends the artifact.
    ///
    /// `listing` names all files of the artifact; `staged` are those that the fill brought. Blocks on disk work.
    pub(crate) fn publish(
        &self,
        staging: Staging,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
    ) -> Result<Lent> {
        let dir = self.layout().artifact(&listing.key);
        let lease = self.wait_for_lease(&dir)?;
        let blobs = self.publish_blobs(&staging, listing, staged)?;
        let manifest = self.publish_manifest(&dir, listing, staged, &blobs)?;
        drop(staging);
        Ok(Lent { manifest, dir, _lease: Some(lease) })
    }

    /// A shared lease, within a bounded time.
    pub(super) fn wait_for_lease(&self, dir: &ArtifactDir) -> Result<FileLock> {
        let path = self.layout().lease(dir);
        let started = Instant::now();
        loop {
            match FileLock::try_shared(&path)? {
                Some(lease) => return Ok(lease),
                None if started.elapsed() > LEASE_WAIT_MAX => {
                    return Err(Error::new(ErrorKind::Unavailable, "somebody holds the artifact's lease alone")
                        .tier(Tier::Disk));
                }
                None => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// First budget hold: staged files become blobs. Returns each blob's identity.
    fn publish_blobs(
        &self,
        staging: &Staging,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
    ) -> Result<BTreeMap<Digest, FileIdentity>> {
        let mut hold = self.hold_budget()?;
        let mut blobs = BTreeMap::new();
        for (path, file) in staged {
            let digest = digest_of(path, &file.entry)?;
            if let Entry::Vacant(vacant) = blobs.entry(digest) {
                let published = hold.publish_blob(&staging.file(&file.name), &digest, file.identity);
                vacant.insert(published.map_err(|error| error.artifact(&listing.key))?);
            }
        }
        staging.end_reservation(&listing.key)?;
        hold.release()?;
        let folders: BTreeSet<PathBuf> =
            blobs.keys().filter_map(|digest| self.layout().blob(digest).parent().map(Path::to_owned)).collect();
        folders.iter().try_for_each(|folder| files::sync_dir(folder))?;
        files::sync_dir(&self.layout().blobs())?;
        Ok(blobs)
    }

    /// Second budget hold: views, then the manifest, which commits.
    fn publish_manifest(
        &self,
        dir: &ArtifactDir,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
        blobs: &BTreeMap<Digest, FileIdentity>,
    ) -> Result<Manifest> {
        let hold = self.hold_budget()?;
        let mut manifest = match self.read_manifest(dir)? {
            Some(mut present) => {
                present.learn(listing)?;
                present
            }
            None => listing.clone().without_holdings(),
        };
        for (path, file) in staged {
            let entry = manifest.files.entry(path.clone()).or_default();
            entry.learn(&file.entry);
            if entry.sha256 != file.entry.sha256 {
                return Err(Error::new(ErrorKind::Conflict, format!("{path} is published with other content"))
                    .artifact(&listing.key));
            }
        }
        fs::create_dir_all(dir.files()).at("make", &dir.files())?;
        for (path, file) in staged {
            let digest = digest_of(path, &file.entry)?;
            let expected = blobs.get(&digest).copied();
            let linked = self.link_view(&dir.files(), path, &self.layout().blob(&digest))?;
            if Some(linked) != expected {
                return Err(Error::corrupt(format!("{path} changed while it was being published"))
                    .artifact(&listing.key)
                    .tier(Tier::Disk));
            }
            if let Some(entry) = manifest.files.get_mut(path) {
                entry.held = Some(Held::Disk(linked));
            }
        }
        self.touch_last_used(dir, true)?;
        files::replace(&dir.manifest(), &manifest.to_bytes()?, &self.layout().stagings())?;
        for folder in dir.path().ancestors().skip(1).take(2) {
            files::sync_dir(folder)?;
        }
        hold.release()?;
        Ok(manifest)
    }

    /// Links the view of `path` to `blob`, replacing whatever was there; the identity it then has.
    fn link_view(&self, view_root: &Path, path: &FilePath, blob: &Path) -> Result<FileIdentity> {
        let view = view_root.join(path.as_str());
        make_folders(view_root, path)?;
        if let Err(error) = fs::hard_link(blob, &view) {
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(error).at("link", &view);
            }
            if files::stat(&view)?.is_some_and(|metadata| metadata.is_dir()) {
                files::remove_tree(&view)?;
            }
            let temporary = self.layout().stagings().join(format!("new-{}", files::random_name()));
            fs::hard_link(blob, &temporary).at("link", &temporary)?;
            fs::rename(&temporary, &view).at("link", &view)?;
            files::remove_file(&temporary)?; // renaming onto a link of the same file leaves both names
        }
        let metadata = fs::symlink_metadata(&view).at("look at", &view)?;
        Ok(identity(&metadata))
    }

    /// The identity of the blob of `digest`, if it is there and right: a manifest vouches for it, or its bytes were
    /// just hashed. A wrong one is quarantined.
    pub(crate) fn checked_blob(&self, hold: &mut BudgetHold<'_>, digest: &Digest) -> Result<Option<FileIdentity>> {
        let path = self.layout().blob(digest);
        let Some(metadata) = files::stat(&path)? else { return Ok(None) };
        let present = identity(&metadata);
        if metadata.is_file() && hold.vouched(digest, present)? {
            return Ok(Some(present));
        }
        if metadata.is_file() && self.hash_unchanged(&path)? == Some((*digest, present)) {
            return Ok(Some(present));
        }
        hold.quarantine(&path, digest)?;
        Ok(None)
    }

    /// The digest of `path` and the identity it was hashed under; `None` if it is no file or changed meanwhile.
    pub(crate) fn hash_unchanged(&self, path: &Path) -> Result<Option<(Digest, FileIdentity)>> {
        let Some(mut file) = files::absent(open_no_follow(path)).at("open", path)? else { return Ok(None) };
        let before = file.metadata().at("look at", path)?;
        if !before.is_file() {
            return Ok(None);
        }
        let (digest, _) = files::hash(&mut file, path, part_size(before.len()))?;
        let after = identity(&file.metadata().at("look at", path)?);
        Ok((after == identity(&before)).then_some((digest, after)))
    }
}

impl BudgetHold<'_> {
    /// Whether a committed manifest records `identity` for `digest`. The manifests are read once in a hold: an identity
    /// under which bytes were once found right stays right, even if its manifest is gone by now.
    fn vouched(&mut self, digest: &Digest, identity: FileIdentity) -> Result<bool> {
        if self.vouchers.is_none() {
            let manifests = self.disk().scan()?.into_iter().filter_map(|artifact| artifact.manifest);
            let entries = manifests.flat_map(|manifest| manifest.files.into_values());
            let mut vouchers: HashMap<Digest, Vec<FileIdentity>> = HashMap::new();
            for (digest, identity) in entries.filter_map(|entry| Some((entry.sha256?, entry.on_disk()?))) {
                vouchers.entry(digest).or_default().push(identity);
            }
            self.vouchers = Some(vouchers);
        }
        let identities = self.vouchers.as_ref().and_then(|vouchers| vouchers.get(digest));
        Ok(identities.is_some_and(|identities| identities.contains(&identity)))
    }

    /// Links the staged file as the blob of `digest`, or finds a right one there.
    fn publish_blob(&mut self, staged: &Path, digest: &Digest, checked: FileIdentity) -> Result<FileIdentity> {
        let metadata = fs::symlink_metadata(staged).at("look at", staged)?;
        if identity(&metadata) != checked {
            return Err(Error::corrupt("a staged file changed after it was checked")
                .tier(Tier::Disk)
                .hint("try again"));
        }
        let disk = self.disk();
        let blob = disk.layout().blob(digest);
        if let Some(folder) = blob.parent() {
            fs::create_dir_all(folder).at("make", folder)?;
        }
        loop {
            self.begin_change()?;
            match fs::hard_link(staged, &blob) {
                Ok(()) => {
                    self.add(allocated(&metadata));
                    return Ok(checked);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).at("link", &blob),
            }
            if files::stat(&blob)?.is_some_and(|metadata| identity(&metadata) == checked) {
                return Ok(checked);
            }
            if let Some(theirs) = disk.checked_blob(self, digest)? {
                return Ok(theirs);
            }
        }
    }

    /// Takes a bad blob out of the way; it still counts.
    pub(crate) fn quarantine(&mut self, blob: &Path, digest: &Digest) -> Result<()> {
        let grave = self.disk().layout().quarantine().join(format!("{digest}-{}", files::random_name()));
        tracing::warn!(%digest, "a cached file failed its check; it is in quarantine");
        files::absent(fs::rename(blob, &grave)).at("quarantine", blob).map(|_| ())
    }
}

/// Opens for reading, refusing a symbolic link in last place.
pub(crate) fn open_no_follow(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32).open(path)
}

/// Makes the folders above the view of `path`; a stale file in the place of a folder is removed.
fn make_folders(view_root: &Path, path: &FilePath) -> Result<()> {
    let mut folder = view_root.to_owned();
    let mut segments: Vec<&str> = path.as_str().split('/').collect();
    segments.pop();
    for segment in segments {
        folder.push(segment);
        match fs::create_dir(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if files::stat(&folder)?.is_some_and(|metadata| !metadata.is_dir()) {
                    files::remove_file(&folder)?;
                    fs::create_dir(&folder).at("make", &folder)?;
                }
            }
            Err(error) => return Err(error).at("make", &folder),
        }
    }
    Ok(())
}

fn digest_of(path: &FilePath, entry: &FileEntry) -> Result<Digest> {
    entry.sha256.ok_or_else(|| Error::new(ErrorKind::Other, format!("{path} is to be published without a digest")))
}
