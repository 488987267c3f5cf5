//! Publishing: missing files are uploaded under a claim, and the manifest is written last.
//!
//! The manifest is the commit point (step 5 below). After a failure or a kill before step 5, readers see the old state,
//! and the claim lists the leftovers. After step 5, readers see the new state.
//!
//! A publish replaces a damaged manifest. A manifest in a newer format is an error.

use super::claim::{self, Claim, ListedFiles};
use super::dedup_source::{self, DedupSource};
use super::evict;
use super::multipart::Multipart;
use super::orphaned_uploads;
use super::pending_publish::{ClaimedPublish, PendingPublish, abort_all};
use super::refs;
use super::store::{Condition, PutOutcome, Store};
use super::upload::{FILES_IN_FLIGHT, Upload, Uploader};
use super::{ConditionalWrites, Folder, MANIFEST, PublishOptions, PublishedBytes, Remote};
use crate::digest::Digest;
use crate::disk::LocalFile;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{FilePath, OWN_FOLDER};
use crate::manifest::{HeldIdentity, Manifest, ObjectIdentity};
use crate::option_name::call::SIDECAR;
use crate::progress::Progress;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Concurrent requests without large bodies: HEAD, DELETE, sidecars, and the start or abort of multipart uploads.
pub(super) const SMALL_REQUESTS_IN_FLIGHT: usize = 16;
/// Attempts to merge the manifest while other writers replace it.
const MERGE_ATTEMPTS_MAX: usize = 5;

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
    /// No manifest exists.
    Nothing,
    /// The manifest cannot be parsed, or belongs to another artifact.
    Damaged,
    /// The manifest describes the same content.
    Same(Manifest),
    /// The manifest describes other content, which `force` replaces. The error describes the difference.
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
) -> Result<PublishedBytes> {
    let store = remote.store().await?;
    let folder = Folder::new(&manifest.key);
    let PublishOptions { force, rewrite, sidecars } = options;
    let job = PublishJob { remote, store, folder, manifest, files, force, rewrite: &rewrite, sidecars, progress };
    let uploads = job.uploads()?;
    job.refuse_sidecar_clash()?;

    // Steps 1 to 3 are in `acquire_claim`. A pending publish has done them already.
    let claimed = match pending {
        Some(pending) => pending.into_claimed().await,
        None => job.acquire_claim(&uploads).await?,
    };
    let Some(ClaimedPublish { mut claim, no_unmanaged, sent }) = claimed else { return Ok(PublishedBytes::default()) };
    // Steps 4 to 6 are in `publish_under_claim`.
    let result = job.publish_under_claim(&mut claim, uploads, no_unmanaged, sent).await;
    // Release the claim in every case. After a failure, abort the uploads that it lists first.
    let released = if result.is_ok() { claim.release().await } else { claim.abandon().await };
    match (result, released) {
        (Ok(published), released) => {
            if let Err(error) = released {
                tracing::warn!(artifact = %manifest.key, %error, "published, but the claim could not be removed; it expires by itself");
            }
            remote.0.has_published.store(true, Ordering::Relaxed);
            Ok(published)
        }
        (Err(error), _) => Err(error),
    }
}

impl PublishJob<'_> {
    /// Acquires the claim. Returns `None` if the remote has every file and sidecar already.
    async fn acquire_claim(&self, uploads: &BTreeMap<FilePath, Upload>) -> Result<Option<ClaimedPublish>> {
        // Step 1: read the manifest. If every object exists and is unchanged, no claim is needed.
        let current = self.read_manifest().await?;
        if let RemoteManifest::Same(current) = &current
            && self.missing_sidecars(Some(current)).is_empty()
            && self.missing_files(current, uploads).await?.is_empty()
        {
            return Ok(None);
        }
        // Step 2: before the first publish of a version, check that its folder can be a version folder.
        let no_unmanaged = matches!(current, RemoteManifest::Nothing) && self.check_version_folder().await?;
        // Step 3: acquire the claim. If an expired one was taken over, abort the uploads of its writer.
        let claim = Claim::acquire(self.remote, &self.folder, self.files_to_claim(&current)).await?;
        orphaned_uploads::abort_abandoned(self.store, &self.folder, &claim).await;
        Ok(Some(ClaimedPublish { claim, no_unmanaged, sent: BTreeMap::new() }))
    }

    /// Fails if the folder cannot be a version folder. Returns true if it has no unmanaged objects. Returns false if
    /// another writer is publishing, so that this can be decided only under the claim.
    pub(super) async fn check_version_folder(&self) -> Result<bool> {
        self.refuse_nested().await?;
        self.refuse_below_unmanaged().await?;
        self.refuse_object().await?;
        match self.refuse_unmanaged_before_claim().await {
            // Another writer published the same artifact since step 1: the objects are not unmanaged.
            Err(error)
                if error.kind() == ErrorKind::Conflict
                    && matches!(self.read_manifest().await?, RemoteManifest::Same(_)) =>
            {
                Ok(false)
            }
            result => result,
        }
    }

    /// Returns source, target and expected digest of each file.
    fn uploads(&self) -> Result<BTreeMap<FilePath, Upload>> {
        let upload_of = |(path, file): (&FilePath, &LocalFile)| {
            let entry = self.manifest.files.get(path);
            let entry = entry.ok_or_else(|| Error::invalid(format!("{path} is not in the manifest")))?;
            let sha256 = entry.sha256.ok_or_else(|| Error::invalid(format!("the digest of {path} is not known")))?;
            let object = self.folder.object(self.store, path)?;
            let upload = Upload { path: path.clone(), object, file: file.clone(), size: entry.size, sha256 };
            Ok((path.clone(), upload))
        };
        self.files.iter().map(upload_of).collect()
    }

    /// Reads the manifest and compares its content with the one to publish.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] for other content, unless `force` is set.
    pub(super) async fn read_manifest(&self) -> Result<RemoteManifest> {
        match self.folder.read_manifest(self.store).await {
            Ok(None) => Ok(RemoteManifest::Nothing),
            Ok(Some((current, _))) => Ok(match current.agrees_with(self.manifest) {
                Ok(()) => {
                    current.warn_kept_executable(self.manifest);
                    RemoteManifest::Same(current)
                }
                Err(error) if self.force => RemoteManifest::Other(current, error),
                Err(error) => return Err(error),
            }),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(artifact = %self.folder.key, %error, "replacing a damaged manifest on the remote");
                Ok(RemoteManifest::Damaged)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the files that the claim must list: all that this publish may write and, with `force`, the old objects.
    /// A killed publish may leave any of them behind.
    pub(super) fn files_to_claim(&self, current: &RemoteManifest) -> ListedFiles {
        let mut listed: ListedFiles = self
            .files
            .keys()
            .map(|path| (path.clone(), self.manifest.files.get(path).and_then(|entry| entry.sha256)))
            .collect();
        if self.sidecars {
            listed.extend(self.files.keys().filter_map(|path| Some((sidecar_of(path).ok()?, None))));
        }
        if let RemoteManifest::Other(old, _) = current {
            listed.extend(evict::objects_of(old));
        }
        listed
    }

    /// Returns the files to upload: not in the manifest `current`, missing on the remote, or different from their
    /// record.
    async fn missing_files(
        &self,
        current: &Manifest,
        uploads: &BTreeMap<FilePath, Upload>,
    ) -> Result<BTreeSet<FilePath>> {
        let checks = uploads.iter().map(|(path, upload)| async move {
            let recorded = current.files.get(path).and_then(|entry| entry.on_remote());
            let is_intact = match recorded.filter(|_| !self.rewrite.contains(path)) {
                Some(recorded) => {
                    self.store.head(&upload.object).await?.is_some_and(|found| same_object(recorded, &found))
                }
                None => false,
            };
            Ok((!is_intact).then(|| path.clone()))
        });
        futures::stream::iter(checks.collect::<Vec<_>>())
            .buffer_unordered(SMALL_REQUESTS_IN_FLIGHT)
            .try_filter_map(|path| async { Ok(path) })
            .try_collect()
            .await
    }

    /// Fails if the artifact has a file with the path of a sidecar to write.
    pub(super) fn refuse_sidecar_clash(&self) -> Result<()> {
        for path in self.files.keys().filter(|_| self.sidecars) {
            let sidecar = sidecar_of(path)?;
            if self.manifest.files.contains_key(&sidecar) {
                return Err(Error::invalid(format!(
                    "the artifact has a file {sidecar}, which is also the name of a checksum file to write"
                ))
                .hint(format!("remove the file, or publish without {SIDECAR}")));
            }
        }
        Ok(())
    }

    /// Returns the files that need a sidecar. Empty if no sidecars are requested or the manifest `current` records all.
    fn missing_sidecars(&self, current: Option<&Manifest>) -> Vec<(FilePath, Digest)> {
        let has =
            |path: &FilePath| current.and_then(|current| current.files.get(path)).is_some_and(|entry| entry.sidecar);
        let missing = self.files.keys().filter(|path| self.sidecars && !has(path));
        missing.filter_map(|path| Some((path.clone(), self.manifest.files.get(path)?.sha256?))).collect()
    }

    /// Fails if the name lies inside another published version.
    async fn refuse_nested(&self) -> Result<()> {
        let name = self.folder.key.name.as_str();
        let ends = name.match_indices('/').map(|(slash, _)| slash).chain([name.len()]);
        let checks = ends.map(|end| async move {
            let ancestor = &name[..end];
            let key = self.store.key(&format!("{ancestor}/{OWN_FOLDER}/{MANIFEST}"))?;
            Ok(self.store.head(&key).await?.map(|_| ancestor.to_owned()))
        });
        let found: Vec<String> = futures::stream::iter(checks.collect::<Vec<_>>())
            .buffer_unordered(SMALL_REQUESTS_IN_FLIGHT)
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

    /// Fails if the name lies below unmanaged objects that are readable as a version. A version published below them
    /// would make them unreadable.
    async fn refuse_below_unmanaged(&self) -> Result<()> {
        let name = self.folder.key.name.as_str();
        let ends = name.match_indices('/').map(|(slash, _)| slash).chain([name.len()]);
        // Only an ancestor with a slash can be a name and a version.
        for ancestor in ends.map(|end| &name[..end]).filter(|ancestor| ancestor.contains('/')) {
            let key = self.store.key(ancestor)?;
            let found = match self.store.head(&key).await? {
                Some(_) => Some(ancestor.to_owned()),
                None => self.store.first_nonempty_object(&key).await?,
            };
            if let Some(found) = found {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("lies below {ancestor:?} on the remote, where another tool put {found:?}"),
                )
                .hint(
                    "choose another name: with a version published below them, these objects could no longer be read",
                ));
            }
        }
        Ok(())
    }

    /// Fails if another tool's object has the key of the version folder. The object is readable as that version.
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

    /// Fails if the folder has unmanaged objects. Called before the claim is acquired. Returns false while another
    /// writer holds a valid claim, because its objects cannot be distinguished from unmanaged ones.
    async fn refuse_unmanaged_before_claim(&self) -> Result<bool> {
        match claim::read(self.store, &self.folder).await? {
            Some((record, _)) if !record.has_expired() => Ok(false),
            // The objects listed in an expired claim are leftovers of a killed writer.
            Some((record, _)) => self.refuse_unmanaged(&record.files).await.map(|()| true),
            None => self.refuse_unmanaged(&ListedFiles::new()).await.map(|()| true),
        }
    }

    /// Fails if the folder has objects other than the `known` ones and modelcache's own records.
    async fn refuse_unmanaged(&self, known: &ListedFiles) -> Result<()> {
        let unmanaged = match self.objects_in_folder().await? {
            Some(objects) => {
                objects.into_iter().find(|path| FilePath::new(path).map_or(true, |path| !known.contains_key(&path)))
            }
            None => self.any_target_exists(known).await?,
        };
        match unmanaged {
            None => Ok(()),
            Some(path) if path.ends_with(&format!("{OWN_FOLDER}/{MANIFEST}")) => Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "other artifacts are published below this artifact's folder on the remote, for example {:?}",
                    self.folder_of_manifest(&path)
                ),
            )
            .hint("choose another name or version: an artifact cannot lie within another")),
            Some(path) => Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "the artifact's folder on the remote has objects that modelcache did not write, for example \
                     {path:?}"
                ),
            )
            .hint(format!("remove the objects below {:?}, or choose another name or version", self.folder.base))),
        }
    }

    /// Returns the folder of the artifact that has its manifest at `path` below this folder.
    fn folder_of_manifest(&self, path: &str) -> String {
        let inner = path.strip_suffix(&format!("/{OWN_FOLDER}/{MANIFEST}")).unwrap_or(path);
        format!("{}/{inner}", self.folder.base)
    }

    /// Returns the paths of the objects in the version folder, except modelcache's own records and the refs of names
    /// below the folder. Returns `None` if listing is not permitted.
    async fn objects_in_folder(&self) -> Result<Option<Vec<String>>> {
        let base = self.store.key(&self.folder.base)?;
        let Some(objects) = self.store.list(Some(&base)).await? else { return Ok(None) };
        let inside =
            objects.iter().filter_map(|meta| meta.location.as_ref().strip_prefix(base.as_ref())?.strip_prefix('/'));
        let own = format!("{OWN_FOLDER}/");
        Ok(Some(inside.filter(|path| !path.starts_with(&own) && !refs::is_ref(path)).map(str::to_owned).collect()))
    }

    /// Returns the path of an object that this publish would overwrite, or `None` if none exists. Used if listing is
    /// not permitted.
    async fn any_target_exists(&self, known: &ListedFiles) -> Result<Option<String>> {
        let checks = self.files.keys().filter(|path| !known.contains_key(*path)).map(|path| async move {
            let existing = self.store.head(&self.folder.object(self.store, path)?).await?;
            Ok(existing.map(|_| path.to_string()))
        });
        let checks = futures::stream::iter(checks.collect::<Vec<_>>()).buffer_unordered(SMALL_REQUESTS_IN_FLIGHT);
        let found: Vec<String> =
            checks.try_filter_map(|found: Option<String>| async { Ok(found) }).try_collect().await?;
        Ok(found.into_iter().next())
    }

    /// Uploads the missing files and writes the manifest. The caller holds the claim. `uploaded` are the completely
    /// sent multipart uploads of a pending publish.
    async fn publish_under_claim(
        &self,
        claim: &mut Claim,
        uploads: BTreeMap<FilePath, Upload>,
        no_unmanaged: bool,
        uploaded: BTreeMap<FilePath, (Multipart, Digest)>,
    ) -> Result<PublishedBytes> {
        // Remove the temporary objects of killed writers.
        let staging = self.folder.record_key(self.store, "")?;
        self.store.backend().sweep_unfinished(&staging).await;
        // Read the manifest again: the previous holder of the claim may have published.
        let base = match self.read_manifest().await? {
            RemoteManifest::Same(current) => Some(current),
            RemoteManifest::Other(old, difference) => {
                tracing::info!(artifact = %self.folder.key, reason = difference.message(), "replacing other content on the remote");
                // Remove the old version before the new one is written, so that readers never see a mixture of both.
                claim.keep_record_on_release();
                evict::remove(self.store, &self.folder, evict::objects_of(&old)).await?;
                None
            }
            RemoteManifest::Damaged => None,
            RemoteManifest::Nothing => {
                // Step 2 was skipped or found another writer, so the folder is not checked yet.
                if !no_unmanaged {
                    self.refuse_unmanaged(&claim.taken_over_files).await?;
                }
                None
            }
        };
        let missing = match &base {
            Some(current) => self.missing_files(current, &uploads).await?,
            None => uploads.keys().cloned().collect(),
        };
        self.count_present(&uploads, &missing);
        // Step 4: upload the missing files, or let the server copy them from another version.
        let sent = self.send(claim, staging, uploads, &missing, uploaded).await?;
        let sidecars = self.write_sidecars(claim, base.as_ref()).await?;
        // Do not commit if another writer took the claim over: it may have removed our objects.
        claim.ensure_held()?;
        let bytes = |is_copy| {
            sent.values().filter(|sent| sent.is_copy == is_copy).map(|sent| sent.identity.object_bytes).sum::<u64>()
        };
        let published_bytes = PublishedBytes { uploaded_bytes: bytes(false), copied_bytes: bytes(true) };
        // Step 5: the commit point.
        let manifest = self.write_manifest(sent, &sidecars).await?;
        // Step 6: remove the leftovers of an earlier writer that the manifest does not list.
        self.sweep(claim, &manifest).await;
        Ok(published_bytes)
    }

    /// Adds the files that need no upload to the progress.
    fn count_present(&self, uploads: &BTreeMap<FilePath, Upload>, missing: &BTreeSet<FilePath>) {
        let present = uploads.iter().filter(|(path, _)| !missing.contains(*path));
        self.progress.done(present.map(|(_, upload)| upload.size).sum());
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
            claim.ensure_held()?;
            // A pending publish has uploaded the parts: only the completion is left. The object may exist from then on.
            if let Some((multipart, _)) = uploaded {
                let identity = multipart.complete(|| claim.keep_record_on_release()).await?;
                self.progress.done(upload.size);
                return Ok((path, SentObject { identity, is_copy: false }));
            }
            // The copy or the upload below creates an object that no manifest lists yet.
            claim.keep_record_on_release();
            // A file in `rewrite` is not copied, because the objects of other versions may be wrong, too.
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
            claim.keep_record_on_release();
        }
        let writes = missing.into_iter().map(|(path, digest)| async move {
            let key = self.folder.object(self.store, &sidecar_of(&path)?)?;
            let line = format!("{digest}  {}\n", path.file_name());
            self.store.put(&key, Bytes::from(line), Condition::Always).await?;
            Ok(path)
        });
        let writes = futures::stream::iter(writes.collect::<Vec<_>>()).buffer_unordered(SMALL_REQUESTS_IN_FLIGHT);
        writes.try_collect().await
    }

    /// Merges the new objects into the manifest on the remote, and returns the manifest that was written.
    async fn write_manifest(
        &self,
        sent: BTreeMap<FilePath, SentObject>,
        sidecars: &BTreeSet<FilePath>,
    ) -> Result<Manifest> {
        let key = self.folder.manifest(self.store)?;
        // Optimistic concurrency: read, merge, and write on the condition that the manifest is unchanged. Start over if
        // it has changed.
        for _ in 0..MERGE_ATTEMPTS_MAX {
            let (mut merged, etag) = match self.folder.read_manifest(self.store).await {
                Ok(Some((current, identity))) => (current, Replaces::Object(identity.etag)),
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
                    entry.held = Some(HeldIdentity::Remote(sent.identity.clone()));
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

    /// Writes the manifest on the condition that the object that it replaces is unchanged. Returns false if another
    /// writer was faster.
    async fn replace(&self, key: &Path, bytes: Bytes, replaces: &Replaces) -> Result<bool> {
        let condition = match replaces {
            _ if self.remote.conditional_writes() == ConditionalWrites::Unsupported => Condition::Always,
            Replaces::Nothing => Condition::Absent,
            Replaces::Object(Some(etag)) => Condition::Matches(etag),
            Replaces::Object(None) => Condition::Always,
        };
        match self.store.put(key, bytes.clone(), condition).await? {
            PutOutcome::Done(_) => Ok(true),
            PutOutcome::ConditionFailed => Ok(false),
            PutOutcome::ConditionUnsupported => {
                self.store.put(key, bytes, Condition::Always).await?;
                Ok(true)
            }
        }
    }

    /// On a store without conditional writes, reads the manifest back, because another writer may have replaced it.
    /// Fails if its content differs from `written`.
    async fn confirm(&self, written: Manifest) -> Result<Manifest> {
        if self.remote.conditional_writes() != ConditionalWrites::Unsupported {
            return Ok(written);
        }
        match self.folder.read_manifest(self.store).await? {
            Some((current, _)) => current.agrees_with(&written).map(|()| current),
            None => {
                Err(Error::new(ErrorKind::Conflict, "another writer removed the artifact while it was being published"))
            }
        }
    }

    /// Removes the leftovers of an earlier writer that the manifest does not list. After an error, the publish still
    /// succeeds, and the claim stays and lists the leftovers.
    async fn sweep(&self, claim: &mut Claim, published: &Manifest) {
        let published = evict::objects_of(published);
        let is_listed = |path: &FilePath| published.contains_key(path);
        let leftovers: ListedFiles = claim
            .taken_over_files
            .iter()
            .filter(|(path, _)| !is_listed(path))
            .map(|(path, digest)| (path.clone(), *digest))
            .collect();
        match evict::remove_objects(self.store, &self.folder, &leftovers).await {
            Ok(()) => claim.remove_record_on_release(),
            Err(error) => {
                tracing::warn!(artifact = %self.folder.key, %error, "cannot remove the leftovers of an earlier writer on the remote")
            }
        }
    }
}

/// An object that this publish uploaded or copied.
struct SentObject {
    identity: ObjectIdentity,
    /// True if the server copied it from another version.
    is_copy: bool,
}

/// Returns the path of the sidecar (checksum file) of `path`.
pub(super) fn sidecar_of(path: &FilePath) -> Result<FilePath> {
    FilePath::new(&format!("{path}.sha256")).map_err(|error| {
        Error::invalid(format!("the checksum file of {path} would have an invalid path: {}", error.message()))
    })
}

/// The object that a manifest replaces: none, or one with this ETag (`None` to overwrite a damaged manifest).
enum Replaces {
    Nothing,
    Object(Option<String>),
}

/// Returns true if `current` is still the `recorded` object: same size, and same ETag if both are known.
pub(super) fn same_object(recorded: &ObjectIdentity, current: &ObjectIdentity) -> bool {
    let same_etag = match (&recorded.etag, &current.etag) {
        (Some(recorded), Some(current)) => recorded == current,
        _ => true,
    };
    recorded.object_bytes == current.object_bytes && same_etag
}
