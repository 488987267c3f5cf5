//! Publishing: staged files become blobs and views, and a manifest says so, in that order.
//!
//! A reader sees the old manifest or the new one. Blobs are linked (never renamed) from staging, so that a crash between
//! the steps leaves garbage to sweep and never a manifest without bytes. What is recorded as held is the identity under
//! which the bytes were checked; a file that changed since is refused.
//!
//! Nothing of it waits for the disk: what is published bears this process's mark, which owes that it becomes durable.

use super::budget::{BudgetHold, allocated_for};
use super::files;
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::link::{self, Link};
use super::lock::FileLock;
use super::modes;
use super::rooted::{Metadata, RootedPath};
use super::staging::Staging;
use super::{Disk, LeasedArtifact};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::part_size;
use crate::manifest::{FileEntry, FileIdentity, Held, Manifest, UnsyncedFile};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::sync::Arc;
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

/// What is to be committed.
#[derive(Clone, Copy)]
struct Commit<'fill> {
    listing: &'fill Manifest,
    staging: &'fill Staging,
    staged: &'fill BTreeMap<FilePath, StagedFile>,
    /// Each blob's identity, where there is a blob.
    blobs: &'fill BTreeMap<Digest, Option<FileIdentity>>,
    /// Who makes it durable.
    writer: &'fill str,
}

impl Disk {
    /// Makes the checked files of a fill visible, and lends the artifact. That they are durable is owed from then on, see
    /// [`sync_artifact`](Self::sync_artifact).
    ///
    /// `listing` names all files of the artifact; `staged` are those that the fill brought. Blocks on disk work.
    pub(crate) fn publish(
        &self,
        staging: Staging,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
    ) -> Result<LeasedArtifact> {
        let dir = self.layout().artifact(&listing.key);
        let lease = self.wait_for_lease(&dir)?;
        let duty = self.mark_dirty(&listing.key, staged.values().map(|file| file.entry.size).sum())?;
        let blobs = self.publish_blobs(&staging, listing, staged)?;
        let commit = Commit { listing, staging: &staging, staged, blobs: &blobs, writer: &duty.writer };
        let (manifest, link) = self.publish_manifest(&dir, &commit)?;
        drop(duty);
        if let Err(error) = staging.discard() {
            tracing::debug!(%error, "staging stays until the next sweep");
        }
        if link.is_some_and(|how| how != Link::Hard) {
            // A blob that no view could be linked to serves nobody.
            let mut hold = self.hold_budget()?;
            blobs.keys().try_for_each(|digest| hold.drop_if_unlinked(&self.layout().blob(digest)).map(|_| ()))?;
            hold.release()?;
        }
        Ok(LeasedArtifact { manifest: Arc::new(manifest), dir, link, is_lower: false, _lease: Some(lease.into()) })
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

    /// First budget hold: staged files become blobs. Returns each blob's identity; where a blob cannot be linked there is
    /// none, and the views will hold the bytes alone.
    fn publish_blobs(
        &self,
        staging: &Staging,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
    ) -> Result<BTreeMap<Digest, Option<FileIdentity>>> {
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
        Ok(blobs)
    }

    /// Second budget hold: views, then the manifest, which commits. Also tells how far the views had to go from links.
    fn publish_manifest(&self, dir: &ArtifactDir, commit: &Commit<'_>) -> Result<(Manifest, Option<Link>)> {
        let Commit { listing, staging, staged, blobs, writer } = *commit;
        let mut hold = self.hold_budget()?;
        modes::make_dirs(dir.path()).at("make", dir.path())?;
        if !dir.is_ours()? {
            return Err(Error::new(ErrorKind::Directory, format!("{} is a link, not a folder", dir.path()))
                .tier(Tier::Disk)
                .hint("remove that link: what it leads to is left alone"));
        }
        let mut manifest = self.merged_manifest(dir, listing)?;
        for (path, file) in staged {
            let entry = manifest.files.get_or_default(path);
            entry.learn(&file.entry);
            if entry.sha256 != file.entry.sha256 {
                return Err(Error::new(ErrorKind::Conflict, format!("{path} is published with other content"))
                    .artifact(&listing.key));
            }
        }
        hold.begin_change_of(dir)?;
        modes::make_dir(&dir.files()).at("make", &dir.files())?;
        let mut link = None;
        for (path, file) in staged {
            let blob = blobs.get(&digest_of(path, &file.entry)?).copied().flatten();
            let (placed, how) = hold.place_view(dir, path, file, blob, staging, &listing.key)?;
            link = link.max(Some(how));
            if let Some(entry) = manifest.files.get_mut(path) {
                // What was durable under this identity still is.
                if entry.on_disk() != Some(placed) {
                    entry.held = Some(Held::Unsynced(UnsyncedFile::new(placed, writer)));
                }
            }
        }
        self.touch_last_used(dir, true)?;
        files::replace_unsynced(&dir.manifest(), &manifest.to_bytes()?, &self.layout().stagings())?;
        hold.release()?;
        if let Some(how) = link.filter(|how| *how != Link::Hard) {
            tracing::info!(artifact = %listing.key, link = %how, "hard links to the blobs are refused; files have bytes of their own, which count by themselves");
        }
        Ok((manifest, link))
    }

    /// The manifest that is there, with what `listing` knows; refused where the two contradict each other.
    ///
    /// Where locks do not exclude, a manifest that is not there yet is created before any view is touched: of two writers
    /// with different content one finds the other's, and is refused.
    fn merged_manifest(&self, dir: &ArtifactDir, listing: &Manifest) -> Result<Manifest> {
        if let Some(mut present) = self.read_manifest(dir)? {
            present.learn(listing)?;
            return Ok(present);
        }
        let bare = listing.clone().without_holdings();
        let stagings = self.layout().stagings();
        if self.locks_are_honest() || files::create(&dir.manifest(), &bare.to_bytes()?, &stagings)? {
            return Ok(bare);
        }
        match self.read_manifest(dir)? {
            Some(mut present) => present.learn(listing).map(|()| present),
            None => Ok(bare),
        }
    }

    /// The identity of the blob of `digest`, if it is there and right: a manifest vouches for it, or its bytes were
    /// just hashed. A wrong one is quarantined.
    pub(crate) fn checked_blob(&self, hold: &mut BudgetHold<'_>, digest: &Digest) -> Result<Option<FileIdentity>> {
        let path = self.layout().blob(digest);
        let Some(metadata) = files::stat(&path)? else { return Ok(None) };
        let present = metadata.identity();
        if metadata.is_file() && hold.is_vouched(digest, present)? {
            return Ok(Some(present));
        }
        if metadata.is_file() && self.hash_unchanged(&path)? == Some((*digest, present)) {
            return Ok(Some(present));
        }
        hold.quarantine(&path, digest)?;
        Ok(None)
    }

    /// The identity of a link just made to bytes that are right under the identity `known`; `None` if they are not right
    /// any more. On an overlay, linking a file of the lower layer makes a copy of it, which is hashed.
    pub(crate) fn linked(
        &self,
        path: &RootedPath,
        digest: &Digest,
        known: FileIdentity,
    ) -> Result<Option<FileIdentity>> {
        match files::stat(path)?.map(|metadata| metadata.identity()) {
            Some(linked) if linked == known => Ok(Some(known)),
            Some(_) => Ok(self.hash_unchanged(path)?.filter(|(found, _)| found == digest).map(|(_, linked)| linked)),
            None => Ok(None),
        }
    }

    /// The digest of `path` and the identity it was hashed under; `None` if it is no file or changed meanwhile.
    pub(crate) fn hash_unchanged(&self, path: &RootedPath) -> Result<Option<(Digest, FileIdentity)>> {
        let Some(mut file) = files::absent(path.open(false)).at("open", path)? else {
            return Ok(None);
        };
        let before = Metadata::of(&file).at("look at", path)?;
        if !before.is_file() {
            return Ok(None);
        }
        let (digest, _) = files::hash(&mut file, path, part_size(before.len()))?;
        let after = Metadata::of(&file).at("look at", path)?.identity();
        Ok((after == before.identity()).then_some((digest, after)))
    }
}

impl BudgetHold<'_> {
    /// Whether a committed manifest records `identity` for `digest`, durably or by the word of a writer that lives. Of one
    /// that was changed since by a release that does not say so, the word still counts: an identity under which bytes were
    /// once found right stays right.
    pub(super) fn is_vouched(&mut self, digest: &Digest, identity: FileIdentity) -> Result<bool> {
        if self.found_right.contains(&(*digest, identity)) {
            return Ok(true);
        }
        let promised = {
            let index = self.index()?;
            if index.vouches(digest, identity) {
                return Ok(true);
            }
            index.promised(digest, identity)
        };
        let disk = self.disk();
        let mut writer_liveness = disk.writer_liveness();
        Ok(promised.iter().any(|writer| writer_liveness.has(writer)))
    }

    /// The identity of the file at `path`, if a committed manifest vouches for it as `digest`.
    pub(super) fn vouched_file(&mut self, path: &RootedPath, digest: &Digest) -> Result<Option<FileIdentity>> {
        let Some(metadata) = files::stat(path)?.filter(Metadata::is_file) else { return Ok(None) };
        let present = metadata.identity();
        Ok(self.is_vouched(digest, present)?.then_some(present))
    }

    /// Links the staged file as the blob of `digest`, or finds a right one there. `None` where the link is refused.
    fn publish_blob(
        &mut self,
        staged: &RootedPath,
        digest: &Digest,
        checked: FileIdentity,
    ) -> Result<Option<FileIdentity>> {
        let metadata = staged.metadata().at("look at", staged)?;
        if metadata.identity() != checked {
            return Err(Error::corrupt("a staged file changed after it was checked")
                .tier(Tier::Disk)
                .hint("try again"));
        }
        let disk = self.disk();
        let blob = disk.layout().blob(digest);
        if let Some(folder) = blob.parent() {
            modes::make_dir(&folder).at("make", &folder)?;
        }
        loop {
            self.begin_change()?;
            match link::hard_link(staged, &blob) {
                Ok(true) => {
                    // A view that had no blob behind it has been counted.
                    if metadata.nlink() == 1 {
                        self.add(metadata.allocated());
                    }
                    return Ok(Some(checked));
                }
                Ok(false) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).at("link", &blob),
            }
            if files::stat(&blob)?.is_some_and(|metadata| metadata.identity() == checked) {
                return Ok(Some(checked));
            }
            if let Some(theirs) = disk.checked_blob(self, digest)? {
                // Theirs needs a link of ours: else it may be evicted, or replaced, before our view of it stands. Where
                // links are refused, the view becomes the staged file.
                let ours = staged.with_file_name(format!("{}.reused", staged.name()));
                return match link::hard_link(&blob, &ours).at("link", &ours)? {
                    true => disk.linked(&ours, digest, theirs),
                    false => Ok(None),
                };
            }
        }
    }

    /// Makes the view of a published file: a link to its blob; where that is refused the staged file itself; where that
    /// is refused, too, a clone or copy of it. The identity that the view then has, and how it was made.
    fn place_view(
        &mut self,
        dir: &ArtifactDir,
        path: &FilePath,
        file: &StagedFile,
        blob: Option<FileIdentity>,
        staging: &Staging,
        key: &ArtifactKey,
    ) -> Result<(FileIdentity, Link)> {
        let digest = digest_of(path, &file.entry)?;
        make_folders(&dir.files(), path)?;
        let (view, staged) = (dir.view(path), staging.file(&file.name));
        let own = if staging.is_reflink(&file.name) { Link::Reflink } else { Link::Copy };
        let changed = || Error::corrupt(format!("{path} changed while it was being published")).artifact(key);
        if let Some(known) = blob
            && self.link_view(&self.disk().layout().blob(&digest), dir, &view)?
        {
            let linked = view.metadata().at("look at", &view)?.identity();
            return if linked == known { Ok((linked, Link::Hard)) } else { Err(changed().tier(Tier::Disk)) };
        }
        let before = files::stat(&view)?.map(|metadata| metadata.ino());
        if self.link_view(&staged, dir, &view)? {
            let metadata = view.metadata().at("look at", &view)?;
            if metadata.identity() != file.identity {
                return Err(changed().tier(Tier::Disk));
            }
            // The first link beside the one in staging: from here on it counts here, not there.
            if metadata.nlink() == 2 && before != Some(metadata.ino()) {
                self.begin_change()?;
                self.add(metadata.allocated());
            }
            return Ok((file.identity, own));
        }
        self.make_space(allocated_for(file.entry.size), key)?;
        self.begin_change()?;
        let temporary = dir.path().join(format!("{}{}", files::TEMPORARY, files::random_name()));
        let (copied, how) = match link::reflink(&staged, &temporary, file.identity)? {
            Some(cloned) => (cloned, Link::Reflink),
            None => match link::copy(&staged, &temporary)? {
                (copied, identity) if copied == digest => (identity, Link::Copy),
                _ => return files::remove_file(&temporary).and(Err(changed().tier(Tier::Disk))),
            },
        };
        self.clear_view(&view)?;
        temporary.rename(&view).at("make", &view)?;
        self.add(files::stat(&view)?.map_or(0, |metadata| metadata.allocated()));
        Ok((copied, how))
    }

    /// Links `from` as `view`, replacing whatever is there; `false` where the link is refused.
    fn link_view(&mut self, from: &RootedPath, dir: &ArtifactDir, view: &RootedPath) -> Result<bool> {
        match link::hard_link(from, view) {
            // There before, or since a moment: where locks do not exclude, others place views, too.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => return linked.at("link", view),
        }
        let present = files::stat(view)?.map(|metadata| metadata.ino());
        if files::stat(from)?.is_some_and(|metadata| Some(metadata.ino()) == present) {
            return Ok(true);
        }
        for folder in [&self.disk().layout().stagings(), dir.path()] {
            let temporary = folder.join(format!("{}{}", files::TEMPORARY, files::random_name()));
            if !link::hard_link(from, &temporary).at("link", &temporary)? {
                continue;
            }
            self.clear_view(view)?;
            match temporary.rename(view) {
                Ok(()) => return Ok(true),
                Err(error) if link::is_refusal(&error) => files::remove_file(&temporary)?,
                Err(error) => return Err(error).at("link", view),
            }
        }
        Ok(false)
    }

    /// Prepares for replacing what lies at `view`: a folder goes, and bytes that counted by themselves are counted anew.
    fn clear_view(&mut self, view: &RootedPath) -> Result<()> {
        match files::stat(view)? {
            Some(metadata) if metadata.is_dir() => files::remove(view),
            Some(metadata) if metadata.nlink() == 1 => self.distrust(),
            _ => Ok(()),
        }
    }

    /// Takes a bad blob out of the way; it still counts. Where it cannot be moved, because quarantine is another mount,
    /// it goes.
    pub(crate) fn quarantine(&mut self, blob: &RootedPath, digest: &Digest) -> Result<()> {
        let grave = self.disk().layout().quarantine().join(format!("{digest}-{}", files::random_name()));
        tracing::warn!(%digest, "a cached file failed its check; it is in quarantine");
        match blob.rename(&grave) {
            Err(error) if link::is_refusal(&error) => {
                self.distrust()?;
                files::remove_file(blob)
            }
            renamed => files::absent(renamed).at("quarantine", blob).map(|_| ()),
        }
    }
}

/// Makes the folders above the view of `path`; a stale file in the place of a folder is removed.
fn make_folders(view_root: &RootedPath, path: &FilePath) -> Result<()> {
    let mut folder = view_root.clone();
    let mut segments: Vec<&str> = path.as_str().split('/').collect();
    segments.pop();
    for segment in segments {
        folder = folder.join(segment);
        match modes::make_new_dir(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if files::stat(&folder)?.is_some_and(|metadata| !metadata.is_dir()) {
                    files::remove_file(&folder)?;
                    modes::make_new_dir(&folder).at("make", &folder)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteBound, Sharing};
    use crate::disk::{InputFile, copy_input};
    use crate::key::ArtifactKey;
    use crate::manifest::Shape;
    use crate::progress::Progress;

    type Filled = (Staging, Manifest, BTreeMap<FilePath, StagedFile>);

    /// A fill of `key` that is ready to be published: one file, the same for every key.
    fn filled(disk: &Disk, key: &str, source: &std::path::Path) -> Filled {
        let (key, path) = (ArtifactKey::bare(key).expect("key"), FilePath::new("f").expect("path"));
        let given = InputFile { path: path.clone(), from: source.to_owned(), size: 7 };
        let wanted = [(path.clone(), FileEntry::of(7))];
        let staging = disk.begin_fill(&key, &wanted).expect("begins");
        let copied = copy_input(&given, &staging.file("copy"), &Progress::new()).expect("copies");
        let staged = StagedFile { name: "copy".into(), ..copied };
        let mut listing = Manifest::new(key, Shape::Tree);
        listing.files.insert(path.clone(), staged.entry.clone());
        (staging, listing, BTreeMap::from([(path, staged)]))
    }

    #[test]
    fn a_blob_that_was_found_there_outlives_the_artifact_it_came_from() {
        let folder = tempfile::tempdir().expect("folder");
        let source = folder.path().join("source");
        std::fs::write(&source, "content").expect("writes");
        let (most, least) = (ByteBound::Bytes(1 << 30), ByteBound::Bytes(0));
        let disk = Disk::open(&folder.path().join("cache"), most, least, Sharing::Off).expect("opens");

        let (staging, listing, files) = filled(&disk, "first@1", &source);
        drop(disk.publish(staging, &listing, &files).expect("publishes"));
        let (staging, listing, files) = filled(&disk, "second@1", &source);
        let blobs = disk.publish_blobs(&staging, &listing, &files).expect("finds the blob");
        disk.evict(&ArtifactKey::bare("first@1").expect("key")).expect("evicts");
        let dir = disk.layout().artifact(&listing.key);
        let commit = Commit { listing: &listing, staging: &staging, staged: &files, blobs: &blobs, writer: "nobody" };
        disk.publish_manifest(&dir, &commit).expect("the blob is still there");
    }
}
