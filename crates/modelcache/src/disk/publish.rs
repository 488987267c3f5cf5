//! Publishing: makes staged files visible, first as blobs, then as views, and last by the manifest (the commit point).
//!
//! A reader sees the old manifest or the new one. A crash between the steps leaves files to sweep, never a manifest
//! without bytes. `held` records the identity under which the bytes were verified. A staged file that changed since is
//! refused.
//!
//! Publishing does not wait for the disk: it marks the files as unsynced by this process, which syncs them later. The
//! numbered steps are those under *Publish* in `docs/disk-format.md`.

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

/// Maximum wait for a shared lease. An eviction holds the exclusive lease for moments only.
const LEASE_WAIT_MAX: Duration = Duration::from_secs(30);

/// A verified file in staging.
#[derive(Debug, Clone)]
pub(crate) struct StagedFile {
    /// Its name in staging.
    pub(crate) name: String,
    /// The entry for the manifest; `sha256` is set.
    pub(crate) entry: FileEntry,
    /// The identity of the staged file when its bytes were verified.
    pub(crate) identity: FileIdentity,
}

/// The input of the second critical section, which commits the manifest.
#[derive(Clone, Copy)]
struct Commit<'fill> {
    listing: &'fill Manifest,
    staging: &'fill Staging,
    staged: &'fill BTreeMap<FilePath, StagedFile>,
    /// The identity of each blob; `None` if the file could not be linked into `blobs/`.
    blobs: &'fill BTreeMap<Digest, Option<FileIdentity>>,
    /// The name in `unsynced/` of the process that will sync the files.
    writer: &'fill str,
}

impl Disk {
    /// Makes the verified files of a fill visible, and returns the leased artifact. The files are not durable yet; see
    /// [`sync_artifact`](Self::sync_artifact).
    ///
    /// `listing` lists all files of the artifact, `staged` those that the fill downloaded. Blocks on disk work.
    pub(crate) fn publish(
        &self,
        staging: Staging,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
    ) -> Result<LeasedArtifact> {
        let dir = self.layout().artifact(&listing.key);
        // Step 1: take the shared lease. It protects the files as soon as they are visible, and the caller keeps it.
        let lease = self.wait_for_lease(&dir)?;
        // The lock in `unsynced/` must be held before a manifest names this process as the writer.
        let publication = self.mark_dirty(&listing.key, staged.values().map(|file| file.entry.size).sum())?;
        // Step 2: first critical section.
        let blobs = self.publish_blobs(&staging, listing, staged)?;
        let commit = Commit { listing, staging: &staging, staged, blobs: &blobs, writer: &publication.writer };
        // Step 3: second critical section. Staging keeps its links to the blobs until the manifest refers to them, so
        // that no eviction or sweep in between can remove them.
        let (manifest, link) = self.publish_manifest(&dir, &commit)?;
        // From here on the artifact can be synced.
        drop(publication);
        // Step 4: remove the staging folder. The artifact is published whether this succeeds or not.
        if let Err(error) = staging.discard() {
            tracing::debug!(%error, "staging stays until the next sweep");
        }
        if link.is_some_and(|how| how != Link::Hard) {
            // A blob to which no view could be linked is unused: remove it.
            let mut hold = self.hold_budget()?;
            blobs.keys().try_for_each(|digest| hold.drop_if_unlinked(&self.layout().blob(digest)).map(|_| ()))?;
            hold.release()?;
        }
        Ok(LeasedArtifact { manifest: Arc::new(manifest), dir, link, is_lower: false, _lease: Some(lease.into()) })
    }

    /// Takes the shared lease of the artifact in `dir`.
    ///
    /// # Errors
    /// `Unavailable` if it stays locked exclusively for [`LEASE_WAIT_MAX`].
    pub(super) fn wait_for_lease(&self, dir: &ArtifactDir) -> Result<FileLock> {
        let path = self.layout().lease(dir);
        let started = Instant::now();
        loop {
            match FileLock::try_shared(&path)? {
                Some(lease) => return Ok(lease),
                None if started.elapsed() > LEASE_WAIT_MAX => {
                    return Err(Error::new(ErrorKind::Unavailable, "the artifact's lease is locked by an eviction")
                        .tier(Tier::Disk));
                }
                // Poll: no process blocks in `flock`.
                None => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// First critical section (the budget lock is held): links the staged files into `blobs/`.
    ///
    /// Returns the identity of each blob, or `None` if the link is refused. Then only the views will link the bytes.
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
            // Files with equal content share one blob.
            if let Entry::Vacant(vacant) = blobs.entry(digest) {
                let published = hold.publish_blob(&staging.file(&file.name), &digest, file.identity);
                vacant.insert(published.map_err(|error| error.artifact(&listing.key))?);
            }
        }
        // All bytes are written, so nothing more needs to be reserved.
        staging.end_reservation(&listing.key)?;
        hold.release()?;
        Ok(blobs)
    }

    /// Second critical section (the budget lock is held): places the views, then writes the manifest, which commits.
    ///
    /// Also returns the weakest kind of link among the views; `None` if there are none.
    fn publish_manifest(&self, dir: &ArtifactDir, commit: &Commit<'_>) -> Result<(Manifest, Option<Link>)> {
        let Commit { listing, staging, staged, blobs, writer } = *commit;
        let mut hold = self.hold_budget()?;
        modes::make_dirs(dir.path()).at("make", dir.path())?;
        if !dir.is_ours()? {
            return Err(Error::new(ErrorKind::Directory, format!("{} is a link, not a folder", dir.path()))
                .tier(Tier::Disk)
                .hint("remove that link; the folder it points to is not changed"));
        }
        // Read the manifest again and merge: another process may have published since the fill began.
        let mut manifest = self.merged_manifest(dir, listing)?;
        // Refuse another digest for a path before any view is touched.
        for (path, file) in staged {
            let entry = manifest.files.get_or_default(path);
            entry.learn(&file.entry);
            if entry.sha256 != file.entry.sha256 {
                return Err(Error::new(ErrorKind::Conflict, format!("{path} is published with other content"))
                    .artifact(&listing.key));
            }
        }
        // The record is marked dirty, and the change log names the artifact, before the first change on disk.
        hold.begin_change_of(dir)?;
        modes::make_dir(&dir.files()).at("make", &dir.files())?;
        let mut link = None;
        for (path, file) in staged {
            let blob = blobs.get(&digest_of(path, &file.entry)?).copied().flatten();
            let (placed, how) = hold.place_view(dir, path, file, blob, staging, &listing.key)?;
            link = link.max(Some(how));
            if let Some(entry) = manifest.files.get_mut(path) {
                // Mark the file as unsynced, unless it is recorded as durable under the same identity. A file that
                // another process has still to sync becomes this process's to sync as well.
                if entry.on_disk() != Some(placed) {
                    entry.held = Some(Held::Unsynced(UnsyncedFile::new(placed, writer)));
                }
            }
        }
        // Before the commit: an artifact without a time of last use would be the first to be evicted.
        self.touch_last_used(dir, true)?;
        // Commit point. The new manifest is synced only if it replaces another one: a power cut may lose an artifact
        // that was just published for the first time, but not one that was there before.
        files::replace_unsynced(&dir.manifest(), &manifest.to_bytes()?, &self.layout().stagings())?;
        hold.release()?;
        if let Some(how) = link.filter(|how| *how != Link::Hard) {
            tracing::info!(artifact = %listing.key, link = %how, "hard links to the blobs are refused; the files are reflinks or copies, whose bytes count separately");
        }
        Ok((manifest, link))
    }

    /// Returns the present manifest merged with `listing`. Refuses a listing that contradicts it.
    fn merged_manifest(&self, dir: &ArtifactDir, listing: &Manifest) -> Result<Manifest> {
        if let Some(mut present) = self.read_manifest(dir)? {
            present.learn(listing)?;
            return Ok(present);
        }
        let bare = listing.clone().without_holdings();
        let stagings = self.layout().stagings();
        // If locks do not exclude, a missing manifest is created, never replaced, before any view is touched. Of two
        // writers with different content, the second finds the manifest of the first, and is refused.
        if self.locks_are_honest() || files::create(&dir.manifest(), &bare.to_bytes()?, &stagings)? {
            return Ok(bare);
        }
        match self.read_manifest(dir)? {
            Some(mut present) => present.learn(listing).map(|()| present),
            None => Ok(bare),
        }
    }

    /// Returns the identity of the blob of `digest` if it exists and its bytes are right: a manifest vouches for it, or
    /// it was hashed by this call. Quarantines a wrong blob and returns `None`.
    pub(crate) fn checked_blob(&self, hold: &mut BudgetHold<'_>, digest: &Digest) -> Result<Option<FileIdentity>> {
        let path = self.layout().blob(digest);
        let Some(metadata) = files::stat(&path)? else { return Ok(None) };
        let present = metadata.identity();
        if metadata.is_file() && hold.is_vouched(digest, present)? {
            return Ok(Some(present));
        }
        // No manifest vouches for it, for instance because its last artifact was evicted or its writer died: hash it.
        if metadata.is_file() && self.hash_unchanged(&path)? == Some((*digest, present)) {
            return Ok(Some(present));
        }
        hold.quarantine(&path, digest)?;
        Ok(None)
    }

    /// Checks the new hard link at `path` to a file that had right bytes under the identity `known`. Returns the
    /// identity of the link; `None` if the bytes are not right any more.
    pub(crate) fn linked(
        &self,
        path: &RootedPath,
        digest: &Digest,
        known: FileIdentity,
    ) -> Result<Option<FileIdentity>> {
        match files::stat(path)?.map(|metadata| metadata.identity()) {
            Some(linked) if linked == known => Ok(Some(known)),
            // The file changed, or it is on an overlay, which copies a file of the lower layer when it is linked: hash.
            Some(_) => Ok(self.hash_unchanged(path)?.filter(|(found, _)| found == digest).map(|(_, linked)| linked)),
            None => Ok(None),
        }
    }

    /// Hashes the file at `path`. Returns the digest, and the identity that the file had before and after; `None` if it
    /// is not a regular file or changed meanwhile.
    pub(crate) fn hash_unchanged(&self, path: &RootedPath) -> Result<Option<(Digest, FileIdentity)>> {
        let Some(mut file) = files::absent(path.open(false)).at("open", path)? else {
            return Ok(None);
        };
        let before = Metadata::of(&file).at("examine", path)?;
        if !before.is_file() {
            return Ok(None);
        }
        let (digest, _) = files::hash(&mut file, path, part_size(before.len()))?;
        let after = Metadata::of(&file).at("examine", path)?.identity();
        Ok((after == before.identity()).then_some((digest, after)))
    }
}

impl BudgetHold<'_> {
    /// Returns true if the bytes of the file with `identity` are known to have `digest`: a committed manifest records
    /// it, durably or by a writer that lives, or it was hashed before this critical section began.
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
        // Only unsynced records are left: they count while one of their writers lives.
        let disk = self.disk();
        let mut writer_liveness = disk.writer_liveness();
        Ok(promised.iter().any(|writer| writer_liveness.has(writer)))
    }

    /// Returns the identity of the file at `path` if a committed manifest vouches that it has `digest`.
    pub(super) fn vouched_file(&mut self, path: &RootedPath, digest: &Digest) -> Result<Option<FileIdentity>> {
        let Some(metadata) = files::stat(path)?.filter(Metadata::is_file) else { return Ok(None) };
        let present = metadata.identity();
        Ok(self.is_vouched(digest, present)?.then_some(present))
    }

    /// Links the staged file as the blob of `digest`, or uses a right blob that exists already. Returns the identity of
    /// the blob; `None` if the filesystem refuses the link.
    fn publish_blob(
        &mut self,
        staged: &RootedPath,
        digest: &Digest,
        checked: FileIdentity,
    ) -> Result<Option<FileIdentity>> {
        let metadata = staged.metadata().at("examine", staged)?;
        // The staged file must still be the one that was verified.
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
            // Link, never rename: staging keeps its link until the manifest is written.
            match link::hard_link(staged, &blob) {
                Ok(true) => {
                    // With more links, the staged file is also a view without a blob. Its bytes are counted already.
                    if metadata.nlink() == 1 {
                        self.add(metadata.allocated());
                    }
                    return Ok(Some(checked));
                }
                Ok(false) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).at("link", &blob),
            }
            // The blob exists. The staged file may be a link to it, if the fill reused the blob.
            if files::stat(&blob)?.is_some_and(|metadata| metadata.identity() == checked) {
                return Ok(Some(checked));
            }
            if let Some(existing) = disk.checked_blob(self, digest)? {
                // A link from staging to the existing blob protects it: without that link it might be evicted or
                // replaced before the view is linked to it. If links are refused, the view becomes the staged file.
                let reused = staged.with_file_name(format!("{}.reused", staged.name()));
                return match link::hard_link(&blob, &reused).at("link", &reused)? {
                    true => disk.linked(&reused, digest, existing),
                    false => Ok(None),
                };
            }
            // The existing blob was wrong and is in quarantine now: try to link again.
        }
    }

    /// Places the view of a published file: a hard link to its blob, else one to the staged file, else a reflink or
    /// copy of the staged file. Returns the identity of the view and the kind of link.
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
        // First choice: a hard link to the blob. The linked file must have the identity that was verified.
        if let Some(known) = blob
            && self.link_view(&self.disk().layout().blob(&digest), dir, &view)?
        {
            let linked = view.metadata().at("examine", &view)?.identity();
            return if linked == known { Ok((linked, Link::Hard)) } else { Err(changed().tier(Tier::Disk)) };
        }
        // Second choice: a hard link to the staged file.
        let before = files::stat(&view)?.map(|metadata| metadata.ino());
        if self.link_view(&staged, dir, &view)? {
            let metadata = view.metadata().at("examine", &view)?;
            if metadata.identity() != file.identity {
                return Err(changed().tier(Tier::Disk));
            }
            // The first view of this file, beside its link in staging: the bytes no longer count as staging, but as a
            // view without a blob.
            if metadata.nlink() == 2 && before != Some(metadata.ino()) {
                self.begin_change()?;
                self.add(metadata.allocated());
            }
            return Ok((file.identity, own));
        }
        // Last choice: a reflink or a copy, which needs room of its own. It is written inside the critical section, so
        // its temporary file needs no lock.
        self.make_space(allocated_for(file.entry.size), key)?;
        self.begin_change()?;
        let temporary = dir.path().join(format!("{}{}", files::TEMPORARY, files::random_name()));
        let (copied, how) = match link::reflink(&staged, &temporary, file.identity)? {
            Some(cloned) => (cloned, Link::Reflink),
            None => match link::copy(&staged, &temporary)? {
                // The copy was hashed while it was written.
                (copied, identity) if copied == digest => (identity, Link::Copy),
                _ => return files::remove_file(&temporary).and(Err(changed().tier(Tier::Disk))),
            },
        };
        self.clear_view(&view)?;
        temporary.rename(&view).at("make", &view)?;
        self.add(files::stat(&view)?.map_or(0, |metadata| metadata.allocated()));
        Ok((copied, how))
    }

    /// Links `from` as `view`, replacing an existing entry. Returns false if the filesystem refuses the link.
    fn link_view(&mut self, from: &RootedPath, dir: &ArtifactDir, view: &RootedPath) -> Result<bool> {
        match link::hard_link(from, view) {
            // A view exists: from before, or placed by another process if locks do not exclude.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => return linked.at("link", view),
        }
        let present = files::stat(view)?.map(|metadata| metadata.ino());
        if files::stat(from)?.is_some_and(|metadata| Some(metadata.ino()) == present) {
            return Ok(true);
        }
        // Replace the view atomically, by a temporary link and a rename. If `staging/` is on another mount, the
        // temporary link is made in the artifact's folder.
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

    /// Prepares for the replacement of the entry at `view`.
    fn clear_view(&mut self, view: &RootedPath) -> Result<()> {
        match files::stat(view)? {
            // A rename cannot replace a folder by a file.
            Some(metadata) if metadata.is_dir() => files::remove(view),
            // A view without a blob: it is unknown whether its bytes were in the total, so they are counted again.
            Some(metadata) if metadata.nlink() == 1 => self.distrust(),
            _ => Ok(()),
        }
    }

    /// Moves a wrong blob to `quarantine/`, where it still counts. Removes it if `quarantine/` is on another mount.
    pub(crate) fn quarantine(&mut self, blob: &RootedPath, digest: &Digest) -> Result<()> {
        let target = self.disk().layout().quarantine().join(format!("{digest}-{}", files::random_name()));
        tracing::warn!(%digest, "a cached file failed verification and is moved to quarantine");
        match blob.rename(&target) {
            // The rename crosses a mount. Views may still link the file, so the bytes must be counted again.
            Err(error) if link::is_refusal(&error) => {
                self.distrust()?;
                files::remove_file(blob)
            }
            renamed => files::absent(renamed).at("quarantine", blob).map(|_| ()),
        }
    }
}

/// Creates the folders above the view of `path`. Removes a stale file in the place of a folder.
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

    /// Returns a fill of `key` that is ready to be published: one file, with equal content for every key.
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
    fn an_existing_blob_that_is_reused_survives_the_eviction_of_its_first_artifact() {
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
