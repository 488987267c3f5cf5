//! Publishing: what the remote lacks is sent under a claim, the manifest last.
//!
//! ```text
//! 1 look        the manifest there; all of it held and sound: done, without a claim
//! 2 refuse      a place inside another version, or with objects that are nobody's we know
//! 3 claim       then look again: the writer before may just have published
//! 4 send        what is not held, gone, or not as it was written; what another version has is copied there
//! 5 manifest    merged with the one there, replaced under its ETag
//! 6 sweep       what an earlier writer left and no manifest names
//! ```
//!
//! A failure or a kill before 5 leaves the old state, and a claim that names the leftovers; after it, the new state.
//!
//! Surprise: a damaged manifest does not stop a publish, it is what the publish repairs. One in a newer format does.

use super::claim::{self, Claim, Listed};
use super::dedup_source::{self, DedupSource};
use super::evict;
use super::multipart::Multipart;
use super::orphaned_uploads;
use super::pending_publish::{Opened, PendingPublish, abort_all};
use super::refs;
use super::store::{Condition, Store, Written};
use super::upload::{self, FILES_IN_FLIGHT, Upload, Uploader};
use super::{Conditions, Folder, MANIFEST, PublishOptions, Published, Remote};
use crate::digest::Digest;
use crate::disk::LocalFile;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{FilePath, OWN_FOLDER};
use crate::manifest::{Held, Manifest, ObjectIdentity};
use crate::progress::Progress;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Objects looked at, or removed, at a time.
pub(super) const LOOKS_IN_FLIGHT: usize = 16;
/// How often a manifest that somebody else replaced meanwhile is merged again.
const MERGES_MAX: usize = 5;

/// One call's job: the artifact, its files here, and where they go.
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

/// The manifest on the remote, as far as it can be used.
pub(super) enum RemoteManifest {
    Nothing,
    Damaged,
    Same(Manifest),
    Other(Manifest, Error),
}

pub(super) async fn publish(
    remote: &Remote,
    manifest: &Manifest,
    files: &BTreeMap<FilePath, LocalFile>,
    options: PublishOptions,
    begun: Option<PendingPublish>,
    progress: &Progress,
) -> Result<Published> {
    let store = remote.store().await?;
    let folder = Folder::new(&manifest.key);
    let PublishOptions { force, rewrite, sidecars } = options;
    let job = PublishJob { remote, store, folder, manifest, files, force, rewrite: &rewrite, sidecars, progress };
    let uploads = job.uploads()?;
    job.refuse_sidecar_clash()?;

    let opened = match begun {
        Some(begun) => begun.open().await,
        None => job.open(&uploads).await?,
    };
    let Some(Opened { mut claim, checked, sent }) = opened else { return Ok(Published::default()) };
    let done = job.under_claim(&mut claim, uploads, checked, sent).await;
    let given_back = if done.is_ok() { claim.close().await } else { claim.abandon().await };
    match (done, given_back) {
        (Ok(published), closed) => {
            if let Err(error) = closed {
                tracing::warn!(artifact = %manifest.key, %error, "published, but the claim could not be removed; it will end by itself");
            }
            remote.0.has_published.store(true, Ordering::Relaxed);
            Ok(published)
        }
        (Err(error), _) => Err(error),
    }
}

impl PublishJob<'_> {
    /// Takes the claim, unless everything is there already.
    async fn open(&self, uploads: &BTreeMap<FilePath, Upload>) -> Result<Option<Opened>> {
        let there = self.look().await?;
        if let RemoteManifest::Same(there) = &there
            && self.sidecars_lacking(Some(there)).is_empty()
            && self.lacking(there, uploads).await?.is_empty()
        {
            return Ok(None);
        }
        let checked = matches!(there, RemoteManifest::Nothing) && self.refuse_place().await?;
        let claim = Claim::take(self.remote, &self.folder, self.claimed(&there)).await?;
        orphaned_uploads::abort_abandoned(self.store, &self.folder, &claim).await;
        Ok(Some(Opened { claim, checked, sent: BTreeMap::new() }))
    }

    /// Refuses a place that cannot be a version's. Whether it was seen to hold nobody else's objects.
    pub(super) async fn refuse_place(&self) -> Result<bool> {
        self.refuse_nested().await?;
        self.refuse_below_unmanaged().await?;
        self.refuse_object().await?;
        match self.refuse_unmanaged_unclaimed().await {
            // Somebody published the same since we looked: no stranger's objects.
            Err(error)
                if error.kind() == ErrorKind::Conflict && matches!(self.look().await?, RemoteManifest::Same(_)) =>
            {
                Ok(false)
            }
            checked => checked,
        }
    }

    /// What to send for each file.
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

    pub(super) async fn look(&self) -> Result<RemoteManifest> {
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

    /// What the claim has to name: everything we may write, and with `force` what we may leave of the old.
    pub(super) fn claimed(&self, there: &RemoteManifest) -> Listed {
        let mut listed: Listed = self
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

    /// The files that have to be sent: not held, gone, or not as they were written.
    async fn lacking(&self, there: &Manifest, uploads: &BTreeMap<FilePath, Upload>) -> Result<BTreeSet<FilePath>> {
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

    /// A file of the artifact may not have the name of a sidecar that is to be written.
    pub(super) fn refuse_sidecar_clash(&self) -> Result<()> {
        for path in self.files.keys().filter(|_| self.sidecars) {
            let sidecar = sidecar_of(path)?;
            if self.manifest.files.contains_key(&sidecar) {
                return Err(Error::invalid(format!("the artifact has a file {sidecar} of its own"))
                    .hint("take it out, or leave --sidecar away"));
            }
        }
        Ok(())
    }

    /// The files whose sidecars are wanted and not there.
    fn sidecars_lacking(&self, there: Option<&Manifest>) -> Vec<(FilePath, Digest)> {
        let has = |path: &FilePath| there.and_then(|there| there.files.get(path)).is_some_and(|entry| entry.sidecar);
        let lacking = self.files.keys().filter(|path| self.sidecars && !has(path));
        lacking.filter_map(|path| Some((path.clone(), self.manifest.files.get(path)?.sha256?))).collect()
    }

    /// A version lies in no other version.
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

    /// Nor does it lie in what another tool put there and is read as a version: with versions of ours below it, it would be
    /// one no more.
    async fn refuse_below_unmanaged(&self) -> Result<()> {
        let name = self.folder.key.name.as_str();
        let ends = name.match_indices('/').map(|(at, _)| at).chain([name.len()]);
        // What could be a name and a version.
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
                .hint("choose another name: what is there could not be read as a version any more"));
            }
        }
        Ok(())
    }

    /// A version's folder has not the name of another tool's object, which is read as that version.
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

    /// Refuses a place with foreign objects, before anything is written there. `false` while another writer is at work,
    /// whose objects would look foreign.
    async fn refuse_unmanaged_unclaimed(&self) -> Result<bool> {
        match claim::look(self.store, &self.folder).await? {
            Some((record, _)) if !record.has_ended() => Ok(false),
            Some((record, _)) => self.refuse_unmanaged(&record.files).await.map(|()| true),
            None => self.refuse_unmanaged(&Listed::new()).await.map(|()| true),
        }
    }

    /// Refuses objects that are not ours to replace: neither `known` nor our own records.
    async fn refuse_unmanaged(&self, known: &Listed) -> Result<()> {
        let unmanaged = match self.objects().await? {
            Some(objects) => {
                objects.into_iter().find(|path| FilePath::new(path).map_or(true, |path| !known.contains_key(&path)))
            }
            None => self.any_there(known).await?,
        };
        match unmanaged {
            None => Ok(()),
            Some(path) if path.ends_with(&format!("{OWN_FOLDER}/manifest.json")) => Err(Error::new(
                ErrorKind::Conflict,
                format!("other artifacts are published below it on the remote, {:?} for one", self.below(&path)),
            )
            .hint("choose another name or version: an artifact may not lie within another")),
            Some(path) => Err(Error::new(
                ErrorKind::Conflict,
                format!("the place on the remote holds objects that modelcache did not write, {path:?} for one"),
            )
            .hint(format!("remove what is below {:?}, or choose another name or version", self.folder.base))),
        }
    }

    /// The folder on the remote of an artifact whose manifest lies at `path` below this one.
    fn below(&self, path: &str) -> String {
        let inner = path.strip_suffix(&format!("/{OWN_FOLDER}/manifest.json")).unwrap_or(path);
        format!("{}/{inner}", self.folder.base)
    }

    /// Paths of the objects in the version folder, without our own records and the refs of names below it. `None` where listing is not permitted.
    async fn objects(&self) -> Result<Option<Vec<String>>> {
        let base = self.store.key(&self.folder.base)?;
        let Some(objects) = self.store.list(Some(&base)).await? else { return Ok(None) };
        let inside =
            objects.iter().filter_map(|meta| meta.location.as_ref().strip_prefix(base.as_ref())?.strip_prefix('/'));
        let own = format!("{OWN_FOLDER}/");
        Ok(Some(inside.filter(|path| !path.starts_with(&own) && !refs::is_ref(path)).map(str::to_owned).collect()))
    }

    /// Without the right to list: whether one of the objects that we would write is there.
    async fn any_there(&self, known: &Listed) -> Result<Option<String>> {
        let looks = self.files.keys().filter(|path| !known.contains_key(*path)).map(|path| async move {
            let there = self.store.head(&self.folder.object(self.store, path)?).await?;
            Ok(there.map(|_| path.to_string()))
        });
        let looks = futures::stream::iter(looks.collect::<Vec<_>>()).buffer_unordered(LOOKS_IN_FLIGHT);
        let found: Vec<String> =
            looks.try_filter_map(|found: Option<String>| async { Ok(found) }).try_collect().await?;
        Ok(found.into_iter().next())
    }

    async fn under_claim(
        &self,
        claim: &mut Claim,
        uploads: BTreeMap<FilePath, Upload>,
        checked: bool,
        begun: BTreeMap<FilePath, (Multipart, Digest)>,
    ) -> Result<Published> {
        let staging = self.store.file(&self.folder.own(self.store, "")?);
        if let Some(staging) = staging.clone() {
            let _ = tokio::task::spawn_blocking(move || upload::sweep_unfinished(&staging)).await;
        }
        // The writer that we waited for may just have published.
        let base = match self.look().await? {
            RemoteManifest::Same(there) => Some(there),
            RemoteManifest::Other(old, why) => {
                tracing::info!(artifact = %self.folder.key, reason = why.message(), "replacing other content on the remote");
                claim.touch();
                evict::remove(self.store, &self.folder, evict::held(&old)).await?;
                None
            }
            RemoteManifest::Damaged => None,
            RemoteManifest::Nothing => {
                if !checked {
                    self.refuse_unmanaged(&claim.inherited).await?;
                }
                None
            }
        };
        let lacking = match &base {
            Some(there) => self.lacking(there, &uploads).await?,
            None => uploads.keys().cloned().collect(),
        };
        self.count_held(&uploads, &lacking);
        let sent = self.send(claim, staging, uploads, &lacking, begun).await?;
        let sidecars = self.write_sidecars(claim, base.as_ref()).await?;
        claim.check()?;
        let bytes = |copied| {
            sent.values().filter(|sent| sent.is_copy == copied).map(|sent| sent.identity.object_bytes).sum::<u64>()
        };
        let done = Published { uploaded_bytes: bytes(false), copied_bytes: bytes(true) };
        let published = self.write_manifest(sent, &sidecars).await?;
        self.sweep(claim, &published).await;
        Ok(done)
    }

    /// Files that need no sending are done at once.
    fn count_held(&self, uploads: &BTreeMap<FilePath, Upload>, lacking: &BTreeSet<FilePath>) {
        let held = uploads.iter().filter(|(path, _)| !lacking.contains(*path));
        self.progress.done(held.map(|(_, upload)| upload.size).sum());
    }

    async fn send(
        &self,
        claim: &mut Claim,
        staging: Option<PathBuf>,
        uploads: BTreeMap<FilePath, Upload>,
        lacking: &BTreeSet<FilePath>,
        mut begun: BTreeMap<FilePath, (Multipart, Digest)>,
    ) -> Result<BTreeMap<FilePath, SentObject>> {
        // Of what was sent already only that counts which is lacking, and is what the manifest says.
        let counts = |path: &FilePath, sha256: &Digest| {
            lacking.contains(path) && uploads.get(path).is_some_and(|upload| upload.sha256 == *sha256)
        };
        let useless: Vec<_> = begun.extract_if(.., |path, (_, sha256)| !counts(path, sha256)).collect();
        abort_all(useless.into_iter().map(|(_, (multipart, _))| multipart)).await;
        if lacking.is_empty() {
            return Ok(BTreeMap::new());
        }
        let to_send: BTreeSet<_> = lacking.iter().filter(|path| !begun.contains_key(*path)).cloned().collect();
        let dedup_sources = self.dedup_sources(&uploads, &to_send).await;
        let (memory, notes) = (self.remote.0.upload_memory.clone(), claim.notes());
        let uploader = Uploader::new(self.store.clone(), staging.clone(), memory, notes, self.progress.clone());
        let (uploader, claim, dedup_sources, staging) = (&uploader, &*claim, &dedup_sources, &staging);
        let sends = uploads.into_iter().filter(|(path, _)| lacking.contains(path));
        let sends = sends.map(|(path, upload)| (begun.remove(&path), path, upload));
        let sends = sends.map(|(begun, path, upload)| async move {
            claim.check()?;
            if let Some((multipart, _)) = begun {
                let identity = multipart.complete(|| claim.touch()).await?;
                self.progress.done(upload.size);
                return Ok((path, SentObject { identity, is_copy: false }));
            }
            claim.touch();
            let dedup_source = dedup_sources.get(&upload.sha256).filter(|_| !self.rewrite.contains(&path));
            if let Some(dedup_source) = dedup_source
                && let Some(identity) =
                    dedup_source::copied(self.store, dedup_source, &path, &upload.object, staging.clone()).await
            {
                self.progress.done(upload.size);
                return Ok((path, SentObject { identity, is_copy: true }));
            }
            let identity = uploader.send(upload).await?;
            Ok((path, SentObject { identity, is_copy: false }))
        });
        futures::stream::iter(sends.collect::<Vec<_>>()).buffer_unordered(FILES_IN_FLIGHT).try_collect().await
    }

    /// Equal files that other versions have there.
    async fn dedup_sources(
        &self,
        uploads: &BTreeMap<FilePath, Upload>,
        lacking: &BTreeSet<FilePath>,
    ) -> BTreeMap<Digest, DedupSource> {
        let wanted = uploads.iter().filter(|(path, upload)| {
            upload.size >= dedup_source::BYTES_MIN && lacking.contains(*path) && !self.rewrite.contains(*path)
        });
        let wanted: BTreeSet<_> = wanted.map(|(_, upload)| (upload.sha256, upload.size)).collect();
        match wanted.is_empty() {
            true => BTreeMap::new(),
            false => dedup_source::find(self.store, &self.folder, &wanted.into_iter().collect::<Vec<_>>()).await,
        }
    }

    /// Writes the sidecars that are lacking, in the form of `sha256sum`. The answer is whose.
    async fn write_sidecars(&self, claim: &mut Claim, base: Option<&Manifest>) -> Result<BTreeSet<FilePath>> {
        let lacking = self.sidecars_lacking(base);
        if !lacking.is_empty() {
            claim.touch();
        }
        let writes = lacking.into_iter().map(|(path, digest)| async move {
            let key = self.folder.object(self.store, &sidecar_of(&path)?)?;
            let line = format!("{digest}  {}\n", path.file_name());
            self.store.put(&key, Bytes::from(line), Condition::Always).await?;
            Ok(path)
        });
        let writes = futures::stream::iter(writes.collect::<Vec<_>>()).buffer_unordered(LOOKS_IN_FLIGHT);
        writes.try_collect().await
    }

    /// Merges with the manifest there and replaces it. The answer is what was written.
    async fn write_manifest(
        &self,
        sent: BTreeMap<FilePath, SentObject>,
        sidecars: &BTreeSet<FilePath>,
    ) -> Result<Manifest> {
        let key = self.folder.manifest(self.store)?;
        for _ in 0..MERGES_MAX {
            let (mut merged, etag) = match self.folder.read_manifest(self.store).await {
                Ok(Some((there, identity))) => (there, Replaces::Object(identity.etag)),
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

    /// Where the store ignores conditions another writer may have published over us: then the two must agree.
    async fn confirm(&self, written: Manifest) -> Result<Manifest> {
        if self.remote.conditions() != Conditions::Ignored {
            return Ok(written);
        }
        match self.folder.read_manifest(self.store).await? {
            Some((there, _)) => there.agrees_with(&written).map(|()| there),
            None => Err(Error::new(ErrorKind::Conflict, "another writer removed the artifact while it was published")),
        }
    }

    /// Removes what an earlier writer left and the manifest does not hold. Failing is no failure of the publish: the
    /// claim then goes on naming it.
    async fn sweep(&self, claim: &mut Claim, published: &Manifest) {
        let published = evict::held(published);
        let holds = |path: &FilePath| published.contains_key(path);
        let leftovers: Listed = claim
            .inherited
            .iter()
            .filter(|(path, _)| !holds(path))
            .map(|(path, digest)| (path.clone(), *digest))
            .collect();
        match evict::remove_objects(self.store, &self.folder, &leftovers).await {
            Ok(()) => claim.settle(),
            Err(error) => {
                tracing::warn!(artifact = %self.folder.key, %error, "cannot remove what an earlier writer left on the remote")
            }
        }
    }
}

/// An object that was written.
struct SentObject {
    identity: ObjectIdentity,
    /// Whether the server had the bytes.
    is_copy: bool,
}

/// The path of the checksum file beside `path`.
pub(super) fn sidecar_of(path: &FilePath) -> Result<FilePath> {
    FilePath::new(&format!("{path}.sha256"))
        .map_err(|error| Error::invalid(format!("{path} can have no sidecar: {}", error.message())))
}

/// What a manifest is written over.
enum Replaces {
    Nothing,
    Object(Option<String>),
}

/// Whether an object is still the one that was written.
pub(super) fn same_object(recorded: &ObjectIdentity, now: &ObjectIdentity) -> bool {
    let same_etag = match (&recorded.etag, &now.etag) {
        (Some(recorded), Some(now)) => recorded == now,
        _ => true,
    };
    recorded.object_bytes == now.object_bytes && same_etag
}
