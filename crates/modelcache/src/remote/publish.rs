//! Publishing: missing files are uploaded under a claim, and the manifest is written last.
//!
//! The manifest is the commit point (step 5 below). A failure or a kill before it leaves the old state, and a claim
//! that lists the leftovers. After it, readers see the new state.
//!
//! A damaged manifest is replaced by the publish. A manifest in a newer format is an error.

use super::claim::{self, Claim, ListedFiles};
use super::dedup_source::{self, DedupSource};
use super::evict;
use super::multipart::Multipart;
use super::orphaned_uploads;
use super::pending_publish::{Opened, PendingPublish, abort_all};
use super::refs;
use super::store::{Condition, Store, Written};
use super::upload::{FILES_IN_FLIGHT, Upload, Uploader};
use super::{Conditions, Folder, MANIFEST, PublishOptions, Published, Remote};
use crate::digest::Digest;
use crate::disk::LocalFile;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{FilePath, OWN_FOLDER};
use crate::manifest::{Held, Manifest, ObjectIdentity};
use crate::progress::Progress;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Concurrent HEAD and DELETE requests.
pub(super) const LOOKS_IN_FLIGHT: usize = 16;
/// Attempts to merge the manifest while another writer replaces it.
const MERGES_MAX: usize = 5;

/// The arguments of one publish: the artifact, its local files and the target.
pub(super) struct PublishJob<'a> {
    pub(super) remote: &'a Remote,
    pub(super) store: &'a Arc<Store>,
    pub(super) folder: Folder,
    pub(super) manifest: &'a Manifest,
    pub(super) files: &'a BTreeMap<FilePath, LocalFile>,
    pub(super) force: bool,
    pub(super) rewrite: &'a BTreeSet<FilePath>,
    pub(super) sidecars: bool,
    pub(super) progress: &'a Progress,
}

/// The manifest on the remote, compared with the one to publish.
pub(super) enum RemoteManifest {
    /// There is none.
    Nothing,
    /// It cannot be parsed, or belongs to another artifact.
    Damaged,
    /// It describes the same content.
    Same(Manifest),
    /// It describes other content, which `force` replaces. Contains the difference as an error.
    Other(Manifest, Error),
}

/// Publishes `manifest` with the local `files`; see [`Remote::publish`].
pub(super) async fn publish(
    remote: &Remote,
    manifest: &Manifest,
    files: &BTreeMap<FilePath, LocalFile>,
    options: PublishOptions,
    pending: Option<PendingPublish>,
    progress: &Progress,
) -> Result<Published> {
    let store = remote.store().await?;
    let folder = Folder::new(&manifest.key);
    let PublishOptions { force, rewrite, sidecars } = options;
    let job = PublishJob { remote, store, folder, manifest, files, force, rewrite: &rewrite, sidecars, progress };
    let uploads = job.uploads()?;
    job.refuse_sidecar_clash()?;

    // Steps 1 to 3. A pending publish has done them already.
    let opened = match pending {
        Some(pending) => pending.open().await,
        None => job.open(&uploads).await?,
    };
    let Some(Opened { mut claim, checked, sent }) = opened else { return Ok(Published::default()) };
    // Steps 4 to 6.
    let done = job.under_claim(&mut claim, uploads, checked, sent).await;
    // Release the claim in every case. After a failure, abort the uploads that it lists first.
    let released = if done.is_ok() { claim.release().await } else { claim.abandon().await };
    match (done, released) {
        (Ok(published), closed) => {
            if let Err(error) = closed {
                tracing::warn!(artifact = %manifest.key, %error, "published, but the claim could not be removed; it expires by itself");
            }
            remote.0.has_published.store(true, Ordering::Relaxed);
            Ok(published)
        }
        (Err(error), _) => Err(error),
    }
}

impl PublishJob<'_> {
    /// Acquires the claim. Returns `None` if the remote holds every file and sidecar already.
    async fn open(&self, uploads: &BTreeMap<FilePath, Upload>) -> Result<Option<Opened>> {
        // Step 1: read the manifest. If every file is there and unchanged, no claim is needed.
        let there = self.read_manifest().await?;
        if let RemoteManifest::Same(there) = &there
            && self.missing_sidecars(Some(there)).is_empty()
            && self.missing_files(there, uploads).await?.is_empty()
        {
            return Ok(None);
        }
        // Step 2: before the first publish of a version, refuse a place that cannot be a version folder.
        let checked = matches!(there, RemoteManifest::Nothing) && self.refuse_place().await?;
        // Step 3: acquire the claim. If an expired one was taken over, abort the uploads of its writer.
        let claim = Claim::acquire(self.remote, &self.folder, self.files_to_claim(&there)).await?;
        orphaned_uploads::abort_abandoned(self.store, &self.folder, &claim).await;
        Ok(Some(Opened { claim, checked, sent: BTreeMap::new() }))
    }

    /// Refuses a place that cannot be a version folder. Returns true if it holds no unmanaged objects, or false if
    /// another writer is at work, so that this cannot be decided before the claim is held.
    pub(super) async fn refuse_place(&self) -> Result<bool> {
        self.refuse_nested().await?;
        self.refuse_below_unmanaged().await?;
        self.refuse_object().await?;
        match self.refuse_unmanaged_unclaimed().await {
            // Another writer published the same artifact since step 1: the objects are not unmanaged.
            Err(error)
                if error.kind() == ErrorKind::Conflict
                    && matches!(self.read_manifest().await?, RemoteManifest::Same(_)) =>
            {
                Ok(false)
            }
            checked => checked,
        }
    }

    /// Returns source, target and expected digest of each file.
    fn uploads(&self) -> Result<BTreeMap<FilePath, Upload>> {
        let one = |(path, file): (&FilePath, &LocalFile)| {
            let entry = self.manifest.files.get(path);
            let entry = entry.ok_or_else(|| Error::invalid(format!("{path} is not in the manifest")))?;
            let sha256 = entry.sha256.ok_or_else(|| Error::invalid(format!("the digest of {path} is not known")))?;
            let object = self.folder.object(self.store, path)?;
            let upload = Upload { path: path.clone(), object, file: file.clone(), size: entry.size, sha256 };
            Ok((path.clone(), upload))
        };
        self.files.iter().map(one).collect()
    }

    /// Reads the manifest and compares its content with the one to publish.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] for other content, unless `force` is set.
    pub(super) async fn read_manifest(&self) -> Result<RemoteManifest> {
        match self.folder.read_manifest(self.store).await {
            Ok(None) => Ok(RemoteManifest::Nothing),
            Ok(Some((there, _))) => Ok(match there.agrees_with(self.manifest) {
                Ok(()) => RemoteManifest::Same(there),
                Err(error) if self.force => RemoteManifest::Other(there, error),
                Err(error) => return Err(error),
            }),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(artifact = %self.folder.key, %error, "replacing a damaged manifest on the remote");
                Ok(RemoteManifest::Damaged)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the files that the claim has to list: all that this publish may write, and with `force` the old objects,
    /// which a kill may leave behind.
    pub(super) fn files_to_claim(&self, there: &RemoteManifest) -> ListedFiles {
        let mut listed: ListedFiles = self
            .files
            .keys()
            .map(|path| (path.clone(), self.manifest.files.get(path).and_then(|entry| entry.sha256)))
            .collect();
        if self.sidecars {
            listed.extend(self.files.keys().filter_map(|path| Some((sidecar_of(path).ok()?, None))));
        }
        if let RemoteManifest::Other(old, _) = there {
            listed.extend(evict::held(old));
        }
        listed
    }

    /// Returns the files to upload: not in the manifest `there`, missing on the remote, or different from their record.
    async fn missing_files(
        &self,
        there: &Manifest,
        uploads: &BTreeMap<FilePath, Upload>,
    ) -> Result<BTreeSet<FilePath>> {
        let looks = uploads.iter().map(|(path, upload)| async move {
            let recorded = there.files.get(path).and_then(|entry| entry.on_remote());
            let sound = match recorded.filter(|_| !self.rewrite.contains(path)) {
                Some(recorded) => self.store.head(&upload.object).await?.is_some_and(|now| same_object(recorded, &now)),
                None => false,
            };
            Ok((!sound).then(|| path.clone()))
        });
        futures::stream::iter(looks.collect::<Vec<_>>())
            .buffer_unordered(LOOKS_IN_FLIGHT)
            .try_filter_map(|path| async { Ok(path) })
            .try_collect()
            .await
    }

    /// Fails if the artifact has a file with the name of a sidecar to write.
    pub(super) fn refuse_sidecar_clash(&self) -> Result<()> {
        for path in self.files.keys().filter(|_| self.sidecars) {
            let sidecar = sidecar_of(path)?;
            if self.manifest.files.contains_key(&sidecar) {
                return Err(Error::invalid(format!("the artifact has a file {sidecar} of its own"))
                    .hint("remove the file, or publish without --sidecar"));
            }
        }
        Ok(())
    }

    /// Returns the files that need a sidecar: requested, and not recorded in the manifest `there`.
    fn missing_sidecars(&self, there: Option<&Manifest>) -> Vec<(FilePath, Digest)> {
        let has = |path: &FilePath| there.and_then(|there| there.files.get(path)).is_some_and(|entry| entry.sidecar);
        let missing = self.files.keys().filter(|path| self.sidecars && !has(path));
        missing.filter_map(|path| Some((path.clone(), self.manifest.files.get(path)?.sha256?))).collect()
    }

    /// Refuses a name inside another published version.
    async fn refuse_nested(&self) -> Result<()> {
        let name = self.folder.key.name.as_str();
        let ends = name.match_indices('/').map(|(at, _)| at).chain([name.len()]);
        let looks = ends.map(|end| async move {
            let ancestor = &name[..end];
            let key = self.store.key(&format!("{ancestor}/{OWN_FOLDER}/{MANIFEST}"))?;
            Ok(self.store.head(&key).await?.map(|_| ancestor.to_owned()))
        });
        let found: Vec<String> = futures::stream::iter(looks.collect::<Vec<_>>())
            .buffer_unordered(LOOKS_IN_FLIGHT)
            .try_filter_map(|found: Option<String>| async { Ok(found) })
            .try_collect()
            .await?;
        match found.first() {
            None => Ok(()),
            Some(ancestor) => Err(Error::new(
                ErrorKind::Conflict,
                format!("lies inside {ancestor:?}, which is a published version on the remote"),
            )
            .hint("choose another name or version")),
        }
    }

    /// Refuses a name below unmanaged objects that are readable as a version. With a published version below them, they
    /// would no longer be readable.
    async fn refuse_below_unmanaged(&self) -> Result<()> {
        let name = self.folder.key.name.as_str();
        let ends = name.match_indices('/').map(|(at, _)| at).chain([name.len()]);
        // Only an ancestor with a slash can be a name and a version.
        for ancestor in ends.map(|end| &name[..end]).filter(|ancestor| ancestor.contains('/')) {
            let key = self.store.key(ancestor)?;
            let found = match self.store.head(&key).await? {
                Some(_) => Some(ancestor.to_owned()),
                None => self.store.any_in(&key).await?,
            };
            if let Some(found) = found {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("lies below {ancestor:?} on the remote, where another tool put {found:?}"),
                )
                .hint("choose another name: the objects there could no longer be read as a version"));
            }
        }
        Ok(())
    }

    /// Refuses a version folder with the key of another tool's object, which is readable as that version.
    async fn refuse_object(&self) -> Result<()> {
        match self.store.head(&self.store.key(&self.folder.base)?).await? {
            None => Ok(()),
            Some(_) => Err(Error::new(
                ErrorKind::Conflict,
                format!("the remote holds an object {:?} that modelcache did not write", self.folder.base),
            )
            .hint("choose another name or version")),
        }
    }

    /// Refuses a folder with unmanaged objects before any write. Returns false while another writer holds a valid
    /// claim, because its objects cannot be distinguished from unmanaged ones.
    async fn refuse_unmanaged_unclaimed(&self) -> Result<bool> {
        match claim::read(self.store, &self.folder).await? {
            Some((record, _)) if !record.has_expired() => Ok(false),
            // The objects listed in an expired claim are leftovers of a killed writer.
            Some((record, _)) => self.refuse_unmanaged(&record.files).await.map(|()| true),
            None => self.refuse_unmanaged(&ListedFiles::new()).await.map(|()| true),
        }
    }

    /// Fails if the folder holds objects other than the `known` ones and our own records.
    async fn refuse_unmanaged(&self, known: &ListedFiles) -> Result<()> {
        let unmanaged = match self.objects().await? {
            Some(objects) => {
                objects.into_iter().find(|path| FilePath::new(path).map_or(true, |path| !known.contains_key(&path)))
            }
            None => self.any_target_exists(known).await?,
        };
        match unmanaged {
            None => Ok(()),
            Some(path) if path.ends_with(&format!("{OWN_FOLDER}/manifest.json")) => Err(Error::new(
                ErrorKind::Conflict,
                format!("other artifacts are published below it on the remote, for example {:?}", self.below(&path)),
            )
            .hint("choose another name or version: an artifact may not lie within another")),
            Some(path) => Err(Error::new(
                ErrorKind::Conflict,
                format!("the place on the remote holds objects that modelcache did not write, for example {path:?}"),
            )
            .hint(format!("remove the objects below {:?}, or choose another name or version", self.folder.base))),
        }
    }

    /// Returns the folder of the artifact that has its manifest at `path` below this folder.
    fn below(&self, path: &str) -> String {
        let inner = path.strip_suffix(&format!("/{OWN_FOLDER}/manifest.json")).unwrap_or(path);
        format!("{}/{inner}", self.folder.base)
    }

    /// Returns the paths of the objects in the version folder, except our own records and the refs of names below it.
    /// Returns `None` if listing is not permitted.
    async fn objects(&self) -> Result<Option<Vec<String>>> {
        let base = self.store.key(&self.folder.base)?;
        let Some(objects) = self.store.list(Some(&base)).await? else { return Ok(None) };
        let inside =
            objects.iter().filter_map(|meta| meta.location.as_ref().strip_prefix(base.as_ref())?.strip_prefix('/'));
        let own = format!("{OWN_FOLDER}/");
        Ok(Some(inside.filter(|path| !path.starts_with(&own) && !refs::is_ref(path)).map(str::to_owned).collect()))
    }

    /// Returns one of the objects that this publish would overwrite, if any exists. Used if listing is not permitted.
    async fn any_target_exists(&self, known: &ListedFiles) -> Result<Option<String>> {
        let looks = self.files.keys().filter(|path| !known.contains_key(*path)).map(|path| async move {
            let there = self.store.head(&self.folder.object(self.store, path)?).await?;
            Ok(there.map(|_| path.to_string()))
        });
        let looks = futures::stream::iter(looks.collect::<Vec<_>>()).buffer_unordered(LOOKS_IN_FLIGHT);
        let found: Vec<String> =
            looks.try_filter_map(|found: Option<String>| async { Ok(found) }).try_collect().await?;
        Ok(found.into_iter().next())
    }

    /// Uploads the missing files and writes the manifest. The caller holds the claim.
    async fn under_claim(
        &self,
        claim: &mut Claim,
        uploads: BTreeMap<FilePath, Upload>,
        checked: bool,
        uploaded: BTreeMap<FilePath, (Multipart, Digest)>,
    ) -> Result<Published> {
        // Remove the temporary objects of killed writers.
        let staging = self.folder.own(self.store, "")?;
        self.store.backend().sweep_unfinished(&staging).await;
        // Read the manifest again: the previous holder of the claim may have published.
        let base = match self.read_manifest().await? {
            RemoteManifest::Same(there) => Some(there),
            RemoteManifest::Other(old, why) => {
                tracing::info!(artifact = %self.folder.key, reason = why.message(), "replacing other content on the remote");
                // The old version disappears before the new one is written: readers never see a mixture of both.
                claim.set_leftovers();
                evict::remove(self.store, &self.folder, evict::held(&old)).await?;
                None
            }
            RemoteManifest::Damaged => None,
            RemoteManifest::Nothing => {
                // Not decidable before the claim was held.
                if !checked {
                    self.refuse_unmanaged(&claim.inherited).await?;
                }
                None
            }
        };
        let missing = match &base {
            Some(there) => self.missing_files(there, &uploads).await?,
            None => uploads.keys().cloned().collect(),
        };
        self.count_held(&uploads, &missing);
        // Step 4: upload the missing files, or let the server copy them from another version.
        let sent = self.send(claim, staging, uploads, &missing, uploaded).await?;
        let sidecars = self.write_sidecars(claim, base.as_ref()).await?;
        // Do not commit if another writer took the claim over: it may have removed our objects.
        claim.check()?;
        let bytes = |copied| {
            sent.values().filter(|sent| sent.is_copy == copied).map(|sent| sent.identity.object_bytes).sum::<u64>()
        };
        let done = Published { uploaded_bytes: bytes(false), copied_bytes: bytes(true) };
        // Step 5: the commit point.
        let published = self.write_manifest(sent, &sidecars).await?;
        // Step 6: remove the leftovers of an earlier writer that the manifest does not list.
        self.sweep(claim, &published).await;
        Ok(done)
    }

    /// Counts the files that need no upload as done.
    fn count_held(&self, uploads: &BTreeMap<FilePath, Upload>, missing: &BTreeSet<FilePath>) {
        let held = uploads.iter().filter(|(path, _)| !missing.contains(*path));
        self.progress.done(held.map(|(_, upload)| upload.size).sum());
    }

    /// Uploads, copies or completes the `missing` files concurrently. `uploaded` are the completely sent multipart
    /// uploads of a pending publish. Returns the new objects.
    async fn send(
        &self,
        claim: &mut Claim,
        staging: Path,
        uploads: BTreeMap<FilePath, Upload>,
        missing: &BTreeSet<FilePath>,
        mut uploaded: BTreeMap<FilePath, (Multipart, Digest)>,
    ) -> Result<BTreeMap<FilePath, SentObject>> {
        // An upload of a pending publish is usable if its file is missing and its digest is the one in the manifest.
        // The others are aborted.
        let is_usable = |path: &FilePath, sha256: &Digest| {
            missing.contains(path) && uploads.get(path).is_some_and(|upload| upload.sha256 == *sha256)
        };
        let unusable: Vec<_> = uploaded.extract_if(.., |path, (_, sha256)| !is_usable(path, sha256)).collect();
        abort_all(unusable.into_iter().map(|(_, (multipart, _))| multipart)).await;
        if missing.is_empty() {
            return Ok(BTreeMap::new());
        }
        let to_send: BTreeSet<_> = missing.iter().filter(|path| !uploaded.contains_key(*path)).cloned().collect();
        let dedup_sources = self.dedup_sources(&uploads, &to_send).await;
        let (memory, registry) = (self.remote.0.upload_memory.clone(), claim.upload_registry());
        let uploader = Uploader::new(self.store.clone(), staging.clone(), memory, registry, self.progress.clone());
        let (uploader, claim, dedup_sources, staging) = (&uploader, &*claim, &dedup_sources, &staging);
        let sends = uploads.into_iter().filter(|(path, _)| missing.contains(path));
        let sends = sends.map(|(path, upload)| (uploaded.remove(&path), path, upload));
        let sends = sends.map(|(uploaded, path, upload)| async move {
            claim.check()?;
            // Parts of a pending publish: only the completion is left. An object may exist from then on.
            if let Some((multipart, _)) = uploaded {
                let identity = multipart.complete(|| claim.set_leftovers()).await?;
                self.progress.done(upload.size);
                return Ok((path, SentObject { identity, is_copy: false }));
            }
            // Every way below creates an object that no manifest lists yet.
            claim.set_leftovers();
            // A file in `rewrite` is uploaded: copies of its bytes may be wrong, too.
            let dedup_source = dedup_sources.get(&upload.sha256).filter(|_| !self.rewrite.contains(&path));
            if let Some(dedup_source) = dedup_source
                && let Some(identity) =
                    dedup_source::try_copy(self.store, dedup_source, &path, &upload.object, staging).await
            {
                self.progress.done(upload.size);
                return Ok((path, SentObject { identity, is_copy: true }));
            }
            let identity = uploader.send(upload).await?;
            Ok((path, SentObject { identity, is_copy: false }))
        });
        futures::stream::iter(sends.collect::<Vec<_>>()).buffer_unordered(FILES_IN_FLIGHT).try_collect().await
    }

    /// Finds sources in other versions for the `missing` files.
    async fn dedup_sources(
        &self,
        uploads: &BTreeMap<FilePath, Upload>,
        missing: &BTreeSet<FilePath>,
    ) -> BTreeMap<Digest, DedupSource> {
        let wanted = uploads.iter().filter(|(path, upload)| {
            upload.size >= dedup_source::BYTES_MIN && missing.contains(*path) && !self.rewrite.contains(*path)
        });
        let wanted: BTreeSet<_> = wanted.map(|(_, upload)| (upload.sha256, upload.size)).collect();
        match wanted.is_empty() {
            true => BTreeMap::new(),
            false => dedup_source::find(self.store, &self.folder, &wanted.into_iter().collect::<Vec<_>>()).await,
        }
    }

    /// Writes the missing sidecars in the format of `sha256sum`. Returns the files that have a new sidecar.
    async fn write_sidecars(&self, claim: &mut Claim, base: Option<&Manifest>) -> Result<BTreeSet<FilePath>> {
        let missing = self.missing_sidecars(base);
        if !missing.is_empty() {
            claim.set_leftovers();
        }
        let writes = missing.into_iter().map(|(path, digest)| async move {
            let key = self.folder.object(self.store, &sidecar_of(&path)?)?;
            let line = format!("{digest}  {}\n", path.file_name());
            self.store.put(&key, Bytes::from(line), Condition::Always).await?;
            Ok(path)
        });
        let writes = futures::stream::iter(writes.collect::<Vec<_>>()).buffer_unordered(LOOKS_IN_FLIGHT);
        writes.try_collect().await
    }

    /// Merges the new objects into the manifest on the remote, replaces it, and returns the result.
    async fn write_manifest(
        &self,
        sent: BTreeMap<FilePath, SentObject>,
        sidecars: &BTreeSet<FilePath>,
    ) -> Result<Manifest> {
        let key = self.folder.manifest(self.store)?;
        // Optimistic concurrency: read, merge, write on the condition that the manifest is unchanged, or start over.
        for _ in 0..MERGES_MAX {
            let (mut merged, etag) = match self.folder.read_manifest(self.store).await {
                Ok(Some((there, identity))) => (there, Replaces::Object(identity.etag)),
                // No file is on the remote until this publish has uploaded it.
                Ok(None) => (self.manifest.clone().without_holdings(), Replaces::Nothing),
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    (self.manifest.clone().without_holdings(), Replaces::Object(None))
                }
                Err(error) => return Err(error),
            };
            merged.learn(self.manifest)?;
            for (path, sent) in &sent {
                if let Some(entry) = merged.files.get_mut(path) {
                    entry.held = Some(Held::Remote(sent.identity.clone()));
                }
            }
            for path in sidecars {
                if let Some(entry) = merged.files.get_mut(path) {
                    entry.sidecar = true;
                }
            }
            let bytes = Bytes::from(merged.to_bytes()?);
            if self.replace(&key, bytes, &etag).await? {
                return self.confirm(merged).await;
            }
        }
        Err(Error::unavailable("the manifest on the remote keeps changing").transient(false).hint("try again"))
    }

    /// Writes the manifest if the one that it replaces is unchanged. Returns false if another writer was faster.
    async fn replace(&self, key: &object_store::path::Path, bytes: Bytes, replaces: &Replaces) -> Result<bool> {
        let condition = match replaces {
            _ if self.remote.conditions() == Conditions::Ignored => Condition::Always,
            Replaces::Nothing => Condition::Absent,
            Replaces::Object(Some(etag)) => Condition::Matches(etag),
            Replaces::Object(None) => Condition::Always,
        };
        match self.store.put(key, bytes.clone(), condition).await? {
            Written::Done(_) => Ok(true),
            Written::Refused => Ok(false),
            Written::Unsupported => {
                self.store.put(key, bytes, Condition::Always).await?;
                Ok(true)
            }
        }
    }

    /// On a store that ignores conditional writes, another writer may have replaced the manifest. Its content must then
    /// agree with ours.
    async fn confirm(&self, written: Manifest) -> Result<Manifest> {
        if self.remote.conditions() != Conditions::Ignored {
            return Ok(written);
        }
        match self.folder.read_manifest(self.store).await? {
            Some((there, _)) => there.agrees_with(&written).map(|()| there),
            None => {
                Err(Error::new(ErrorKind::Conflict, "another writer removed the artifact while it was being published"))
            }
        }
    }

    /// Removes the leftovers of an earlier writer that the manifest does not list. An error does not fail the publish:
    /// the claim then stays and still lists the leftovers.
    async fn sweep(&self, claim: &mut Claim, published: &Manifest) {
        let published = evict::held(published);
        let holds = |path: &FilePath| published.contains_key(path);
        let leftovers: ListedFiles = claim
            .inherited
            .iter()
            .filter(|(path, _)| !holds(path))
            .map(|(path, digest)| (path.clone(), *digest))
            .collect();
        match evict::remove_objects(self.store, &self.folder, &leftovers).await {
            Ok(()) => claim.clear_leftovers(),
            Err(error) => {
                tracing::warn!(artifact = %self.folder.key, %error, "cannot remove the leftovers of an earlier writer on the remote")
            }
        }
    }
}

/// A new object.
struct SentObject {
    identity: ObjectIdentity,
    /// True if the server copied it from another version.
    is_copy: bool,
}

/// Returns the path of the sidecar (checksum file) of `path`.
pub(super) fn sidecar_of(path: &FilePath) -> Result<FilePath> {
    FilePath::new(&format!("{path}.sha256"))
        .map_err(|error| Error::invalid(format!("{path} can have no sidecar: {}", error.message())))
}

/// The object that a manifest replaces: none, or one with this ETag (`None` to overwrite a damaged manifest).
enum Replaces {
    Nothing,
    Object(Option<String>),
}

/// Returns true if an object is still the one that was `recorded`: same size, and same ETag if both are known.
pub(super) fn same_object(recorded: &ObjectIdentity, now: &ObjectIdentity) -> bool {
    let same_etag = match (&recorded.etag, &now.etag) {
        (Some(recorded), Some(now)) => recorded == now,
        _ => true,
    };
    recorded.object_bytes == now.object_bytes && same_etag
}
