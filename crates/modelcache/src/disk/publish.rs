//! Publishing: makes staged files visible, first as blobs, then as views, and last by the manifest (the commit point).
//!
//! A reader sees the old manifest or the new one. A crash between the steps leaves files that a sweep removes, never a
//! manifest that lists missing bytes. `held` records the identity under which the bytes were verified. A staged file
//! that changed after its verification is refused.
//!
//! Publishing does not wait for the disk: it marks the files as unsynced. The numbered steps are those under *Publish*
//! in `docs/disk-format.md`.

use super::acquire::was_withdrawn;
use super::budget::{BudgetGuard, allocated_for};
use super::files;
use super::io_error::IoContext;
use super::layout::ArtifactDir;
use super::link::{self, Link};
use super::lock::FileLock;
use super::modes;
use super::optional;
use super::rooted::{Metadata, RootedPath};
use super::staging::Staging;
use super::{Disk, LeasedArtifact};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::FilePath;
use crate::ladder::part_size;
use crate::manifest::{FileEntry, FileIdentity, HeldIdentity, Manifest};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// Mode bits: any user may execute the file.
const EXECUTE: u32 = 0o111;

/// A verified file in staging.
#[derive(Debug, Clone)]
pub(crate) struct StagedFile {
    /// The name of the file in staging.
    pub(crate) name: String,
    /// The entry for the manifest; `sha256` is set.
    pub(crate) entry: FileEntry,
    /// The identity of the staged file when its bytes were verified.
    pub(crate) identity: FileIdentity,
}

/// The input of the second critical section, which commits the manifest.
#[derive(Clone, Copy)]
struct Commit<'fill> {
    dir: &'fill ArtifactDir,
    listing: &'fill Manifest,
    staging: &'fill Staging,
    staged: &'fill BTreeMap<FilePath, StagedFile>,
    /// The identity of each blob; `None` if the file could not be linked into `blobs/`.
    blobs: &'fill BTreeMap<Digest, Option<FileIdentity>>,
}

impl Disk {
    /// Makes the verified files of a fill visible, and returns the leased artifact. The files are not durable yet; see
    /// [`sync_published`](Self::sync_published). Blocks on disk work.
    ///
    /// `listing` lists all files of the artifact, and `staged` the files that the fill staged.
    pub(crate) fn publish(
        &self,
        staging: Staging,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
    ) -> Result<LeasedArtifact> {
        let dir = self.layout().artifact(&listing.key);
        // Step 1: take the shared lease. It protects the files as soon as they are visible, and the caller keeps it.
        let lease = self.wait_for_lease(&dir)?;
        // Step 2: link the blobs, in the first critical section.
        let blobs = self.publish_blobs(&staging, listing, staged)?;
        let commit = Commit { dir: &dir, listing, staging: &staging, staged, blobs: &blobs };
        // Step 3: link the views and write the manifest, in the second critical section. Until then the staging folder
        // has links to the blobs, so that no eviction or sweep in between can remove them.
        let (manifest, link) = self.publish_manifest(&commit)?;
        self.count_repaired(staged.values().filter_map(|file| file.entry.sha256));
        // From here on the artifact can be synced.
        self.add_pending_sync(&listing.key);
        // Step 4: remove the staging folder. If this fails, the artifact is still published.
        if let Err(error) = staging.discard() {
            tracing::debug!(%error, "the staging folder cannot be removed; it stays until the next sweep");
        }
        // Step 5: remove each blob to which no view could be linked. This may fail, too: the next sweep finds them.
        if link.is_some_and(|link| link != Link::Hard)
            && let Err(error) = self.remove_unused_blobs(blobs.keys())
        {
            tracing::debug!(%error, "unused blobs stay until the next sweep");
        }
        Ok(LeasedArtifact { manifest: Arc::new(manifest), dir, link, is_lower: false, lease: Some(lease.into()) })
    }

    /// Removes those of the blobs to which no view is linked.
    fn remove_unused_blobs<'a>(&self, mut digests: impl Iterator<Item = &'a Digest>) -> Result<()> {
        let mut guard = self.lock_budget()?;
        digests.try_for_each(|digest| guard.remove_if_last_link(&self.layout().blob(digest)).map(drop))?;
        guard.release()
    }

    /// Takes the shared lease of the artifact in `dir`.
    ///
    /// # Errors
    /// `Unavailable` if an eviction holds the lease exclusively for too long.
    pub(super) fn wait_for_lease(&self, dir: &ArtifactDir) -> Result<FileLock> {
        FileLock::wait_shared(&self.layout().lease_lock(dir))?.ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "the artifact's lease is locked by an eviction").tier(Tier::Disk)
        })
    }

    /// Links the staged files into `blobs/`, in the first critical section (under the budget lock).
    ///
    /// Returns the identity of each blob. It is `None` if the link was refused; then there will be views but no blob.
    fn publish_blobs(
        &self,
        staging: &Staging,
        listing: &Manifest,
        staged: &BTreeMap<FilePath, StagedFile>,
    ) -> Result<BTreeMap<Digest, Option<FileIdentity>>> {
        // A blob has one mode, and is not executable. An executable file has no blob. Files with equal content share
        // one blob. The map is sorted by digest, so that each folder in `blobs/` is opened only once.
        let mut distinct = BTreeMap::new();
        for (path, file) in staged.iter().filter(|(path, _)| !is_executable(listing, path)) {
            distinct.entry(digest_of(path, &file.entry)?).or_insert(file);
        }
        let mut guard = self.lock_budget()?;
        let (mut blobs, mut open_folder) = (BTreeMap::new(), self.layout().blobs());
        for (digest, file) in distinct {
            let blob = self.layout().blob(&digest);
            if let Some(folder) = blob.parent().filter(|folder| *folder != open_folder) {
                modes::make_dir(&folder).at("make", &folder)?;
                open_folder = folder.opened();
            }
            let blob = open_folder.join(blob.name());
            let published = guard.publish_blob(&staging.file(&file.name), &blob, &digest, file.identity);
            blobs.insert(digest, published.map_err(|error| error.artifact(&listing.key))?);
        }
        // All bytes are written, so no more room needs to be reserved.
        staging.end_reservation(&listing.key)?;
        guard.release()?;
        Ok(blobs)
    }

    /// Places the views and then writes the manifest, which is the commit, in the second critical section (under the
    /// budget lock).
    ///
    /// Returns the manifest, and how the views were linked; `None` if no file was staged. If the views differ, returns
    /// a reflink or copy rather than a hard link.
    fn publish_manifest(&self, commit: &Commit<'_>) -> Result<(Manifest, Option<Link>)> {
        let Commit { dir, listing, staged, .. } = *commit;
        let mut guard = self.lock_budget()?;
        modes::make_dirs(dir.path()).at("make", dir.path())?;
        if !dir.is_real_folder()? {
            return Err(Error::new(ErrorKind::Directory, format!("{} is a link, not a folder", dir.path()))
                .tier(Tier::Disk)
                .hint("remove that link; the folder it points to is not changed"));
        }
        // Read the manifest again and merge, because another process may have published since the fill began.
        let mut manifest = self.merged_manifest(dir, listing)?;
        // If another digest is published for a path, fail before any view is changed.
        for (path, file) in staged {
            let entry = manifest.files.get_or_default(path);
            entry.learn(&file.entry);
            if entry.sha256 != file.entry.sha256 {
                return Err(Error::new(ErrorKind::Conflict, format!("{path} is published with other content"))
                    .artifact(&listing.key));
            }
        }
        // Write the change log, then mark the budget record dirty, before the first change on disk.
        guard.begin_change_of(dir)?;
        modes::make_dir(&dir.files()).at("make", &dir.files())?;
        let (views, mount, mut link) = (dir.files().opened(), self.current_mount(), None);
        for (path, file) in staged {
            let executable = is_executable(&manifest, path);
            let (identity, view_link) = guard.place_view(commit, &views, path, executable, file)?;
            link = link.max(Some(view_link));
            if let Some(entry) = manifest.files.get_mut(path) {
                // Mark the file as unsynced, unless it is recorded as durable under the same identity. The mark is in
                // the manifest that the commit below renames, so no reader finds the file without it. A file shared
                // with another artifact is marked, too: that artifact may be evicted before it is synced.
                if entry.on_disk() != Some(identity) {
                    entry.held = Some(HeldIdentity::Unsynced(mount.mark(identity)));
                }
            }
        }
        guard.refresh_hub_links(dir, staged.keys());
        // Set the time of last use before the commit: without it, the artifact would be the first to be evicted.
        self.touch_last_used(dir, true)?;
        // Commit point. The new manifest is synced only if it replaces another one: a power cut may lose an artifact
        // that was just published for the first time, but not one that was there before.
        files::replace_unsynced(&dir.manifest(), &manifest.to_bytes()?, &self.layout().stagings())?;
        guard.release()?;
        if let Some(link) = link.filter(|link| *link != Link::Hard) {
            tracing::info!(artifact = %listing.key, %link, "hard links to the blobs are refused; the files are reflinks or copies, whose bytes count separately");
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
        // If locks do not exclude other processes, create a missing manifest here, before any view is changed. `create`
        // does not replace an existing file: of two writers with different content, the second finds the manifest of
        // the first and fails.
        if self.locks_are_honest() || files::create(&dir.manifest(), &bare.to_bytes()?, &stagings)? {
            return Ok(bare);
        }
        match self.read_manifest(dir)? {
            Some(mut present) => present.learn(listing).map(|()| present),
            None => Ok(bare),
        }
    }

    /// Returns the identity of the blob at `path` if it exists and has the bytes of `digest`: a manifest vouches for
    /// it, or this call has hashed it. A wrong blob is quarantined; then returns `None`.
    pub(crate) fn checked_blob(
        &self,
        guard: &mut BudgetGuard<'_>,
        path: &RootedPath,
        digest: &Digest,
    ) -> Result<Option<FileIdentity>> {
        let Some(metadata) = files::stat(path)? else { return Ok(None) };
        let present = metadata.identity();
        if metadata.is_file() && guard.is_vouched(digest, present)? {
            return Ok(Some(present));
        }
        // No manifest vouches for the blob, for instance because its last artifact was evicted: hash it.
        let is_candidate = metadata.is_file() && !was_withdrawn(&metadata);
        if is_candidate && self.hash_unchanged(path)? == Some((*digest, present)) {
            return Ok(Some(present));
        }
        guard.quarantine(path, digest)?;
        Ok(None)
    }

    /// Checks the new hard link at `path` to a file that had the right bytes under the identity `known`. Returns the
    /// identity of the link; `None` if the bytes are no longer right.
    pub(crate) fn check_link(
        &self,
        path: &RootedPath,
        digest: &Digest,
        known: FileIdentity,
    ) -> Result<Option<FileIdentity>> {
        match files::stat(path)?.map(|metadata| metadata.identity()) {
            Some(linked) if linked == known => Ok(Some(known)),
            // The file was changed. Or it is on an overlay, which copies a file of the lower layer when it is linked.
            // Hash it.
            Some(_) => Ok(self.hash_unchanged(path)?.filter(|(found, _)| found == digest).map(|(_, linked)| linked)),
            None => Ok(None),
        }
    }

    /// Hashes the file at `path`. Returns the digest and the identity of the file; `None` if it is not a regular file
    /// or changed while it was hashed.
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

impl BudgetGuard<'_> {
    /// Returns true if the file with `identity` is known to have `digest`. Either a committed manifest records the
    /// file, as durable or as unsynced in this boot. Or the file was hashed before this critical section began.
    pub(super) fn is_vouched(&mut self, digest: &Digest, identity: FileIdentity) -> Result<bool> {
        Ok(self.verified_before.contains(&(*digest, identity)) || self.index()?.vouches(digest, identity))
    }

    /// Links the staged file as `blob`, the blob of `digest`, or uses an existing blob with the right bytes. Returns
    /// the identity of the blob; `None` if the filesystem refuses the link.
    fn publish_blob(
        &mut self,
        staged: &RootedPath,
        blob: &RootedPath,
        digest: &Digest,
        verified: FileIdentity,
    ) -> Result<Option<FileIdentity>> {
        let metadata = staged.metadata().at("examine", staged)?;
        // The staged file must still be the one that was verified.
        if metadata.identity() != verified {
            return Err(Error::corrupt("a staged file changed after it was verified")
                .tier(Tier::Disk)
                .hint("try again"));
        }
        // An interrupted fill may have staged the file as an executable one.
        if metadata.mode() & EXECUTE != 0 && metadata.nlink() == 1 {
            staged.open(false).and_then(|file| optional::set_mode(&file, 0o444)).at("make read-only", staged)?;
        }
        let disk = self.disk();
        loop {
            self.begin_change()?;
            // Link the file and do not rename it, so that the staging folder has a link until the manifest is written.
            match link::hard_link(staged, blob) {
                Ok(true) => {
                    // If the staged file had another link, it was a view without a blob, whose bytes already count.
                    if metadata.nlink() == 1 {
                        self.add(metadata.allocated());
                    }
                    return Ok(Some(verified));
                }
                Ok(false) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).at("link", blob),
            }
            // The blob exists. The staged file may be a link to it, if the fill reused the blob.
            if files::stat(blob)?.is_some_and(|metadata| metadata.identity() == verified) {
                return Ok(Some(verified));
            }
            if let Some(existing) = disk.checked_blob(self, blob, digest)? {
                // Link the existing blob into the staging folder. Without that link, it might be evicted or replaced
                // before the view is linked to it. If the link is refused, the view becomes a link to the staged file
                // instead.
                let reused = staged.with_file_name(format!("{}.reused", staged.name()));
                return match link::hard_link(blob, &reused).at("link", &reused)? {
                    true => disk.check_link(&reused, digest, existing),
                    false => Ok(None),
                };
            }
            // The existing blob was wrong and is now in quarantine: try to link again.
        }
    }

    /// Places the view of a published file in the folder `views`. It is the first of these that is possible: a hard
    /// link to the blob, a hard link to the staged file, a reflink of the staged file, a copy of it. Returns the
    /// identity of the view, and how it shares its bytes.
    fn place_view(
        &mut self,
        commit: &Commit<'_>,
        views: &RootedPath,
        path: &FilePath,
        executable: bool,
        file: &StagedFile,
    ) -> Result<(FileIdentity, Link)> {
        let Commit { dir, listing: Manifest { key, .. }, staging, blobs, .. } = *commit;
        let digest = digest_of(path, &file.entry)?;
        let blob = blobs.get(&digest).copied().flatten();
        make_view_folders(views, path)?;
        let (view, staged) = (views.join(path.as_str()), staging.file(&file.name));
        // A view without a blob counts as a reflink or copy, even if it is a hard link to the staged file.
        let without_blob = if staging.is_reflink(&file.name) { Link::Reflink } else { Link::Copy };
        let changed = || Error::corrupt(format!("{path} changed while it was being published")).artifact(key);
        // First choice: a hard link to the blob. The linked file must have the identity that was verified.
        if let Some(known) = blob.filter(|_| !executable)
            && self.link_view(&self.disk().layout().blob(&digest), dir, &view)?
        {
            let linked = view.metadata().at("examine", &view)?.identity();
            return if linked == known { Ok((linked, Link::Hard)) } else { Err(changed().tier(Tier::Disk)) };
        }
        // Second choice: a hard link to the staged file.
        let before = files::stat(&view)?.map(|metadata| metadata.ino());
        let has_mode = !executable || make_executable(&staged).at("make executable", &staged)?;
        if has_mode && self.link_view(&staged, dir, &view)? {
            let metadata = view.metadata().at("examine", &view)?;
            if metadata.identity() != file.identity {
                return Err(changed().tier(Tier::Disk));
            }
            // This is the first view of the file, beside the link in staging. Its bytes no longer count as staging, but
            // as a view without a blob.
            if metadata.nlink() == 2 && before != Some(metadata.ino()) {
                self.begin_change()?;
                self.add(metadata.allocated());
            }
            // An executable file never has a blob, so its bytes count once, like those of a blob.
            return Ok((file.identity, if executable { Link::Hard } else { without_blob }));
        }
        // Last choice: a reflink or a copy, for which room must be made. It is written inside the critical section, so
        // its temporary file needs no lock.
        self.make_space(allocated_for(file.entry.size), key)?;
        self.begin_change()?;
        let temporary = dir.path().join(format!("{}{}", files::TEMPORARY_PREFIX, files::random_name()));
        let (identity, link) = match link::reflink(&staged, &temporary, file.identity)? {
            Some(cloned) => (cloned, Link::Reflink),
            None => match link::copy(&staged, &temporary)? {
                // The copy was hashed while it was written.
                (found, identity) if found == digest => (identity, Link::Copy),
                _ => return files::remove_file(&temporary).and(Err(changed().tier(Tier::Disk))),
            },
        };
        if executable {
            temporary
                .open(false)
                .and_then(|file| optional::set_mode(&file, 0o555))
                .at("make executable", &temporary)?;
        }
        self.prepare_replacement(&view)?;
        temporary.rename(&view).at("make", &view)?;
        self.add(files::stat(&view)?.map_or(0, |metadata| metadata.allocated()));
        Ok((identity, link))
    }

    /// Links `from` as `view`, replacing an existing entry. Returns false if the filesystem refuses the link.
    fn link_view(&mut self, from: &RootedPath, dir: &ArtifactDir, view: &RootedPath) -> Result<bool> {
        match link::hard_link(from, view) {
            // There is an older view. Or locks do not exclude other processes, and another process has placed the view.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => return linked.at("link", view),
        }
        let present = files::stat(view)?.map(|metadata| metadata.ino());
        if files::stat(from)?.is_some_and(|metadata| Some(metadata.ino()) == present) {
            return Ok(true);
        }
        // Replace the view atomically by a temporary link and a rename. If `staging/` is on another mount, create the
        // temporary link in the folder of the artifact.
        for folder in [&self.disk().layout().stagings(), dir.path()] {
            let temporary = folder.join(format!("{}{}", files::TEMPORARY_PREFIX, files::random_name()));
            if !link::hard_link(from, &temporary).at("link", &temporary)? {
                continue;
            }
            self.prepare_replacement(view)?;
            match temporary.rename(view) {
                Ok(()) => return Ok(true),
                Err(error) if link::is_refusal(&error) => files::remove_file(&temporary)?,
                Err(error) => return Err(error).at("link", view),
            }
        }
        Ok(false)
    }

    /// Prepares the replacement of the entry at `view` by a rename.
    fn prepare_replacement(&mut self, view: &RootedPath) -> Result<()> {
        match files::stat(view)? {
            // A rename cannot replace a folder by a file.
            Some(metadata) if metadata.is_dir() => files::remove(view),
            // It is unknown whether the total includes a view without a blob.
            Some(metadata) if metadata.nlink() == 1 => self.mark_total_unknown(),
            _ => Ok(()),
        }
    }

    /// Moves a wrong blob to `quarantine/`, where its bytes still count. Removes the blob if `quarantine/` is on
    /// another mount.
    pub(crate) fn quarantine(&mut self, blob: &RootedPath, digest: &Digest) -> Result<()> {
        let target = self.disk().layout().quarantine().join(format!("{digest}-{}", files::random_name()));
        tracing::warn!(%digest, "a cached file has wrong bytes and is moved to quarantine/");
        match blob.rename(&target) {
            // `quarantine/` is on another mount. Views may still be links to the blob, so it is unknown what is freed.
            Err(error) if link::is_refusal(&error) => {
                self.mark_total_unknown()?;
                files::remove_file(blob)
            }
            renamed => files::absent(renamed).at("quarantine", blob).map(|_| ()),
        }
    }
}

/// Returns true if `manifest` lists `path` as executable.
fn is_executable(manifest: &Manifest, path: &FilePath) -> bool {
    manifest.files.get(path).is_some_and(|entry| entry.executable)
}

/// Makes a staged file executable. Returns false if it has other links, which must keep their mode.
fn make_executable(staged: &RootedPath) -> io::Result<bool> {
    let metadata = staged.metadata()?;
    if metadata.mode() & EXECUTE != 0 {
        return Ok(true);
    }
    if metadata.nlink() > 1 {
        return Ok(false);
    }
    optional::set_mode(&staged.open(false)?, 0o555).map(|()| true)
}

/// Creates the folders that lead to the view of `path`. A file at the path of such a folder is stale and is removed.
fn make_view_folders(view_root: &RootedPath, path: &FilePath) -> Result<()> {
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
        let input = InputFile { path: path.clone(), from: source.to_owned(), size: 7, executable: false };
        let wanted = [(path.clone(), FileEntry::of(7))];
        let staging = disk.begin_fill(&key, &wanted).expect("begins");
        let copied = copy_input(&input, &staging.file("copy"), &Progress::new()).expect("copies");
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
        let (max_bytes, min_free) = (ByteBound::Bytes(1 << 30), ByteBound::Bytes(0));
        let disk = Disk::open(&folder.path().join("cache"), max_bytes, min_free, Sharing::Off).expect("opens");

        let (staging, listing, files) = filled(&disk, "first@1", &source);
        drop(disk.publish(staging, &listing, &files).expect("publishes"));
        let (staging, listing, files) = filled(&disk, "second@1", &source);
        let blobs = disk.publish_blobs(&staging, &listing, &files).expect("finds the blob");
        disk.evict(&ArtifactKey::bare("first@1").expect("key")).expect("evicts");
        let dir = disk.layout().artifact(&listing.key);
        let commit = Commit { dir: &dir, listing: &listing, staging: &staging, staged: &files, blobs: &blobs };
        disk.publish_manifest(&commit).expect("the blob still exists");
    }
}
