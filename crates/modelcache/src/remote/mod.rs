//! The remote tier: an S3 bucket, or a local folder with the same layout.
//!
//! [`Remote`] documents the contract, and `Folder` the layout of the objects. The protocols are in `publish.rs`,
//! `claim.rs`, `evict.rs` and `refs.rs`; `unmanaged.rs` reads objects that another tool uploaded. All of them use
//! `store.rs`, which retries requests and translates errors. Below it, `backend/` accesses the bucket or the folder.

mod backend;
mod claim;
mod dedup_source;
mod doctor;
mod evict;
mod list;
mod listed_reads;
mod listing;
mod multipart;
mod orphaned_uploads;
mod pending_publish;
#[cfg(feature = "mlflow")]
mod prefix;
mod process;
mod publish;
mod refs;
mod source;
mod store;
mod streaming_upload;
mod unmanaged;
mod upload;
mod verify;

pub use crate::disk::LocalFile;
pub use backend::{Policy, Role};
pub(crate) use doctor::examine;
pub(crate) use list::RemoteListing;
pub(crate) use listed_reads::ListedReads;
pub(crate) use listing::Address;
pub(crate) use multipart::{Multipart, UploadHasher, UploadReader};
pub(crate) use pending_publish::PendingPublish;
#[cfg(feature = "mlflow")]
pub(crate) use prefix::PrefixSource;
pub use refs::{RefKind, RemoteRef};
pub use source::RemoteSource;
pub(crate) use streaming_upload::{StreamingUpload, VerifiedFiles};
pub(crate) use unmanaged::{ADD_CHECKSUMS_HINT, AddressContents, UnmanagedObjects, quoted_names, without_checksum};

#[cfg(fuzzing)]
pub(crate) use {
    backend::{fuzz_listing, fuzz_profile},
    claim::fuzz as fuzz_claim,
    refs::fuzz as fuzz_ref,
};

use crate::config::RemoteConfig;
use crate::error::{Error, Result, Tier};
use crate::finding::VerifyReport;
use crate::key::{ArtifactKey, ArtifactName, FilePath, OWN_FOLDER, Version};
use crate::limits;
use crate::manifest::{Manifest, ObjectIdentity};
use crate::metrics::Metrics;
use crate::option_name::call;
use crate::option_name::setting::REMOTE_MODE;
use crate::progress::Progress;
use crate::rate_limiter::RateLimiter;
use crate::runtime::blocking;
use crate::transfer::Retry;
use backend::{Options, RemoteLocation};
use object_store::path::Path;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use store::Store;
use tokio::sync::OnceCell;

/// The remote tier. Clones share clients, credentials and the detected capabilities of the store.
///
/// # Contract
/// - A reader sees one complete published version or none. The manifest is the commit point: it is written last and
///   removed first. Objects that a killed writer leaves behind are invisible to readers and are listed in its claim, so
///   that the next writer can remove them.
/// - A claim admits one writer per key at a time. On a store that ignores conditional writes, two concurrent writers
///   may upload twice or end in a conflict. Readers still never accept wrong bytes, because they check digests.
/// - An absent artifact is `None`. A missing bucket, a wrong region or bad credentials are errors, never absence.
/// - [`Remote::open`] sends no request. Clients and certificates are loaded at the first request.
/// - No error, log line or `Debug` output contains a secret key, a token or a signature.
#[derive(Clone)]
pub struct Remote(Arc<RemoteInner>);

struct RemoteInner {
    config: RemoteConfig,
    location: RemoteLocation,
    options: Options,
    retry: Retry,
    store: OnceCell<Arc<Store>>,
    /// A [`ConditionalWrites`] value, as its number.
    conditional_writes: AtomicU8,
    read_only: AtomicBool,
    /// True once the log contains the warning that the store refuses writes.
    refusal_reported: AtomicBool,
    /// The memory budget shared by all uploads.
    upload_memory: multipart::UploadMemory,
    /// True if a version was published since the last sweep of orphaned uploads.
    has_published: AtomicBool,
}

/// Prints the address only, because the configuration may contain secret keys.
impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.0.config.url)
    }
}

/// Options of a publish.
#[derive(Debug, Clone, Default)]
pub struct PublishOptions {
    /// Replaces other content under the same key instead of failing.
    pub force: bool,
    /// Files to upload even if size and ETag of their objects match, because a reader found wrong bytes.
    pub rewrite: BTreeSet<FilePath>,
    /// Writes `<file>.sha256` beside every object, for tools that do not read manifests.
    pub sidecars: bool,
}

/// Number of bytes that a publish transferred.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublishedBytes {
    /// Bytes uploaded; 0 if the remote held every file.
    pub uploaded_bytes: u64,
    /// Bytes that the server copied from other versions of the name.
    pub copied_bytes: u64,
}

/// Support of the store for conditional writes (`If-None-Match`, `If-Match`). The first claim of this process tests it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum ConditionalWrites {
    /// Not tested yet.
    Unknown = 0,
    Supported = 1,
    /// The store ignores or rejects the condition.
    Unsupported = 2,
}

impl Remote {
    /// Checks address and options without sending a request. `retry` is shared by the whole process.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an invalid address or option.
    pub fn open(config: &RemoteConfig, retry: Retry) -> Result<Self> {
        let location = RemoteLocation::parse(&config.url)?;
        let options = Options::parse(config)?;
        Ok(Self(Arc::new(RemoteInner {
            config: config.clone(),
            location,
            options,
            retry,
            store: OnceCell::new(),
            conditional_writes: AtomicU8::new(ConditionalWrites::Unknown as u8),
            read_only: AtomicBool::new(false),
            refusal_reported: AtomicBool::new(false),
            upload_memory: multipart::UploadMemory::default(),
            has_published: AtomicBool::new(false),
        })))
    }

    /// Makes the remote read-only for this process.
    #[must_use]
    pub fn read_only(self) -> Self {
        self.0.read_only.store(true, Ordering::Relaxed);
        self
    }

    /// Returns true if the remote is configured as read-only.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only.load(Ordering::Relaxed)
    }

    /// Returns the error of the first write that the store refused because of a missing permission.
    pub(crate) fn refusal(&self) -> Option<Error> {
        self.0.store.get()?.refusal().cloned()
    }

    /// Returns true if the store refused a write because of a missing permission. The remote then counts as read-only
    /// until this process ends.
    pub fn refuses_writes(&self) -> bool {
        self.refusal().is_some()
    }

    /// Returns true unless the remote is configured as read-only or refused a write.
    pub fn is_writable(&self) -> bool {
        !self.is_read_only() && !self.refuses_writes()
    }

    /// Notes that the refusal is reported. Returns true at the first call only, so that it is reported once.
    pub(crate) fn mark_refusal_reported(&self) -> bool {
        !self.0.refusal_reported.swap(true, Ordering::Relaxed)
    }

    /// Fails if the remote is configured as read-only.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`]; the hint names the setting and `remedy`.
    pub(crate) fn ensure_read_write(&self, remedy: impl FnOnce() -> String) -> Result<()> {
        if !self.is_read_only() {
            return Ok(());
        }
        let message = format!("the remote {} is read-only ({})", self.url(), REMOTE_MODE.set_to("ro"));
        Err(Error::invalid(message).tier(Tier::Remote).hint(format!("set it to rw, or {}", remedy())))
    }

    /// Returns the configured address, which contains no secrets.
    pub fn url(&self) -> &str {
        &self.0.config.url
    }

    /// Returns true if `store`, the result of [`Source::store`](crate::source::Source::store), is the bucket of this
    /// remote or lies in its folder.
    pub(crate) fn contains(&self, store: &str) -> bool {
        match (&self.0.location, RemoteLocation::parse(store)) {
            (RemoteLocation::Bucket { bucket: ours, .. }, Ok(RemoteLocation::Bucket { bucket, .. })) => *ours == bucket,
            (RemoteLocation::Folder(ours), Ok(RemoteLocation::Folder(folder))) => folder.starts_with(ours),
            _ => false,
        }
    }

    /// Returns a [`RemoteSource`] for the artifact `key`. Sends no request.
    pub fn source(&self, key: &ArtifactKey) -> RemoteSource {
        RemoteSource::new(self.clone(), key.clone())
    }

    /// Uploads `files` (path in the artifact -> local file) and publishes `manifest`.
    ///
    /// If the remote already has a manifest of the key, files are skipped whose objects exist as it records them. Files
    /// that `manifest` lists and `files` does not contain are left as they are on the remote. Local files are hashed
    /// while they are sent.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if the key has other content (unless `force`), or the folder holds unmanaged objects;
    /// [`ErrorKind::Corrupt`] if a local file does not match its digest; [`ErrorKind::Unavailable`] if another writer
    /// holds the claim for too long, or the store does not respond; [`ErrorKind::Unauthorized`] if a permission is
    /// missing.
    pub async fn publish(
        &self,
        manifest: &Manifest,
        files: &BTreeMap<FilePath, LocalFile>,
        options: PublishOptions,
        progress: &Progress,
    ) -> Result<PublishedBytes> {
        self.publish_pending(manifest, files, options, None, progress).await
    }

    /// Publishes as [`publish`](Self::publish) does. With `pending`, uses the claim and the uploads that
    /// [`begin`](Self::begin) created.
    pub(crate) async fn publish_pending(
        &self,
        manifest: &Manifest,
        files: &BTreeMap<FilePath, LocalFile>,
        options: PublishOptions,
        pending: Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<PublishedBytes> {
        let with_key = |error: Error| error.artifact(&manifest.key).tier(Tier::Remote);
        self.ensure_read_write(|| format!("leave the remote out: {}", call::REMOTE.set_to("none")))
            .map_err(with_key)?;
        publish::publish(self, manifest, files, options, pending, progress).await.map_err(with_key)
    }

    /// Aborts orphaned multipart uploads in version folders if this process published since the last sweep. Errors are
    /// logged and ignored.
    pub(crate) async fn sweep_uploads(&self) {
        if !self.0.has_published.swap(false, Ordering::Relaxed) {
            return;
        }
        match orphaned_uploads::sweep(self).await {
            Ok(0) => {}
            Ok(uploads) => tracing::info!(uploads, "aborted orphaned multipart uploads on the remote"),
            Err(error) => tracing::debug!(%error, "cannot sweep orphaned multipart uploads on the remote"),
        }
    }

    /// Removes the artifact: its manifest, then the objects that the manifest lists. With `dry_run`, removes nothing.
    ///
    /// Returns the number of bytes removed (or, with `dry_run`, to be removed), or `None` if the artifact is absent.
    pub async fn evict(&self, key: &ArtifactKey, dry_run: bool) -> Result<Option<u64>> {
        self.ensure_read_write(|| format!("remove it from this disk only: {}", call::TIER.set_to("disk")))
            .map_err(|error| error.artifact(key))?;
        evict::evict(self, key, dry_run).await.map_err(|error| error.artifact(key).tier(Tier::Remote))
    }

    /// Returns the manifest of every published artifact, ordered by name and version. Damaged manifests are skipped
    /// with a warning.
    pub async fn list(&self) -> Result<Vec<Manifest>> {
        list::list(self).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Returns, from one listing, the manifests as [`list`](Self::list) does, every tag with the name of its artifact,
    /// and what the listing skipped: artifacts under longer prefixes, and folders of other tools.
    pub(crate) async fn list_with_tags(&self) -> Result<RemoteListing> {
        list::list_with_tags(self).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Returns the version of `revision` that an origin last returned to any machine of the fleet, or `None` if the
    /// remote has no record of one.
    pub async fn origin_answer(&self, name: &ArtifactName, revision: &str) -> Result<Option<RemoteRef>> {
        refs::origin_answer(self, name, revision).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Records an origin's answer on the remote for the fleet, unless the remote has a newer one.
    pub async fn write_origin_answer(&self, name: &ArtifactName, answer: &RemoteRef) -> Result<()> {
        refs::write_origin_answer(self, name, answer).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Returns the tag, or `None` if it does not exist or is damaged.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if a newer release wrote the tag in a newer format.
    pub async fn tag(&self, name: &ArtifactName, tag: &str) -> Result<Option<RemoteRef>> {
        refs::tag(self, name, tag).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Sets a tag and returns its previous value. Does not check that the version exists.
    pub async fn set_tag(&self, name: &ArtifactName, tag: &RemoteRef) -> Result<Option<RemoteRef>> {
        refs::set_tag(self, name, tag).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Removes a tag and returns its value. With `only_to`, removes it only if it points to that version.
    pub async fn remove_tag(
        &self,
        name: &ArtifactName,
        tag: &str,
        only_to: Option<&Version>,
    ) -> Result<Option<RemoteRef>> {
        refs::remove_tag(self, name, tag, only_to).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Returns the refs of `name`: tags and origins' answers. Returns `None` if listing is not permitted.
    pub async fn refs_of(&self, name: &ArtifactName) -> Result<Option<Vec<RemoteRef>>> {
        refs::refs_of(self, name).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Returns the key of every artifact that has a manifest, valid or damaged, ordered by name and version.
    pub(crate) async fn keys(&self) -> Result<Vec<ArtifactKey>> {
        list::keys(self).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Reads the objects listed in the manifest of `key`, restricted to the paths that `is_selected` accepts, and
    /// compares them with the manifest. Returns `None` if the artifact is not published.
    pub(crate) async fn verify(
        &self,
        key: &ArtifactKey,
        is_selected: &(dyn Fn(&FilePath) -> bool + Sync),
        rate_limiter: &RateLimiter,
        progress: &Progress,
        metrics: &Metrics,
    ) -> Result<Option<VerifyReport>> {
        verify::verify(self, key, is_selected, rate_limiter, progress, metrics)
            .await
            .map_err(|error| error.artifact(key).tier(Tier::Remote))
    }

    /// Returns the bucket's region as reported by the server, if it differs from the region that requests are signed
    /// for.
    pub(crate) fn reported_region(&self) -> Option<String> {
        self.0.store.get()?.reported_region()
    }

    /// Returns the store. The first call opens it.
    async fn store(&self) -> Result<&Arc<Store>> {
        self.0
            .store
            .get_or_try_init(|| async {
                let inner = self.0.clone();
                // Opening reads AWS files and root certificates, so it runs on a blocking thread.
                let open = move || Store::open(&inner.config, &inner.location, &inner.options, inner.retry.clone());
                blocking(open).await.map(Arc::new)
            })
            .await
    }

    /// Returns what is known about the store's support for conditional writes.
    fn conditional_writes(&self) -> ConditionalWrites {
        match self.0.conditional_writes.load(Ordering::Relaxed) {
            1 => ConditionalWrites::Supported,
            2 => ConditionalWrites::Unsupported,
            _ => ConditionalWrites::Unknown,
        }
    }

    /// Records whether the store supports conditional writes. Warns once if it does not.
    fn set_conditional_writes(&self, support: ConditionalWrites) {
        let before = self.0.conditional_writes.swap(support as u8, Ordering::Relaxed);
        // The swap returns the previous value, so that only the first observation warns.
        if support == ConditionalWrites::Unsupported && before != support as u8 {
            tracing::warn!(
                remote = self.url(),
                "the remote ignores conditional writes; concurrent writers of one artifact may conflict"
            );
        }
    }
}

/// The object keys of one version folder. All of them are plain objects that other tools can read:
///
/// ```text
/// <name>/<version>/<path…>                     one object per file
/// <name>/<version>/<path…>.sha256              its digest, if the publisher asked for it (`put --sidecar`)
/// <name>/<version>/.modelcache/claim           the claim of the current writer
/// <name>/<version>/.modelcache/manifest.json   the commit point: all files, with ETag and size of the uploaded ones
/// <name>/.modelcache/refs/<revision>           a tag or an origin's answer: see `refs.rs`
/// ```
///
/// A version folder without `.modelcache` holds unmanaged objects, uploaded by another tool. They are read
/// (`unmanaged.rs`) and never written.
#[derive(Debug, Clone)]
struct Folder {
    key: ArtifactKey,
    base: String,
}

impl Folder {
    fn new(key: &ArtifactKey) -> Self {
        Self { key: key.clone(), base: format!("{}/{}", key.name, key.version) }
    }

    /// Returns the key of the object that holds the file `path`.
    fn object(&self, store: &Store, path: &FilePath) -> Result<Path> {
        store.key(&format!("{}/{path}", self.base))
    }

    /// Returns the key of a record of modelcache (manifest, claim) in this folder; with an empty `file`, the prefix of
    /// all.
    fn record_key(&self, store: &Store, file: &str) -> Result<Path> {
        store.key(&format!("{}/{OWN_FOLDER}/{file}", self.base))
    }

    fn manifest(&self, store: &Store) -> Result<Path> {
        self.record_key(store, MANIFEST)
    }

    /// Returns the published manifest and the identity of its object, or `None`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the manifest is damaged or belongs to another artifact.
    async fn read_manifest(&self, store: &Store) -> Result<Option<(Manifest, ObjectIdentity)>> {
        match self.read_any_manifest(store).await? {
            // A folder that was copied to another key contains the manifest of the original key.
            Some((manifest, _)) if manifest.key != self.key => Err(foreign_manifest(&manifest.key)),
            read => Ok(read),
        }
    }

    /// Reads the manifest in the folder, whatever key it belongs to. Otherwise as
    /// [`read_manifest`](Self::read_manifest).
    async fn read_any_manifest(&self, store: &Store) -> Result<Option<(Manifest, ObjectIdentity)>> {
        let Some((bytes, identity)) = store.get(&self.manifest(store)?, limits::MANIFEST_BYTES_MAX).await? else {
            return Ok(None);
        };
        // Parsing a manifest of many files takes long enough to block an async thread.
        let manifest = blocking(move || Manifest::from_bytes(&bytes)).await.map_err(|error| error.hint(REPAIR_HINT))?;
        Ok(Some((manifest, identity)))
    }
}

/// Returns the error for a manifest that belongs to another key than its place says.
fn foreign_manifest(key: &ArtifactKey) -> Error {
    Error::corrupt(format!("the manifest belongs to {key}")).hint(REPAIR_HINT)
}

/// Name of the claim object.
const CLAIM: &str = "claim";
/// Name of the manifest object, the commit point.
const MANIFEST: &str = "manifest.json";
/// Hint for a damaged manifest or object.
const REPAIR_HINT: &str = "publish the artifact again, or evict it from the remote";
