//! The far tier: an object store, or a folder that stands for one.
//!
//! # Contract
//! - A reader sees one whole published version or none. The manifest is the commit point: written last, removed first.
//!   Whatever a killed writer leaves behind is invisible and named by its claim, so that the next writer sweeps it.
//! - One writer of a key at a time, by a claim. Where a store ignores conditional writes, two writers at once may cost a
//!   second upload or end in a conflict; a reader still never takes wrong bytes, because it checks digests.
//! - An absent artifact is `None`. A missing bucket, a wrong region or bad credentials never look like absence.
//! - [`Remote::open`] asks no network; clients and certificates are loaded at the first request.
//! - Nothing that prints (errors, logs, `Debug`) carries a key, a token or a signature.
//!
//! # Layout
//! Below the remote's prefix, plain objects that other tools can read:
//!
//! ```text
//! <name>/<version>/<path…>                     one object per held file
//! <name>/<version>/<path…>.sha256              its digest, where the publisher wanted that (`put --sidecar`)
//! <name>/<version>/.modelcache/claim           a writer at work
//! <name>/<version>/.modelcache/manifest.json   the commit point: all files, and what is held with ETag and size
//! <name>/.modelcache/refs/<revision>           what a tag or a revision means: see `refs.rs`
//! ```
//!
//! A version folder without any `.modelcache` is a foreign tree, put there by another tool: it is read as it is found
//! (`unmanaged.rs`), and never written to.

mod claim;
mod copy;
mod credentials;
mod dedup_source;
mod doctor;
mod evict;
mod failure;
mod http_client;
mod list;
mod listing;
mod multipart;
mod orphaned_uploads;
mod pending_publish;
mod policy;
mod prefix;
mod process;
mod profile;
mod publish;
mod raw_client;
mod refs;
mod settings;
mod source;
mod store;
mod streaming_upload;
mod unmanaged;
mod upload;
mod verify;

pub use crate::disk::LocalFile;
pub(crate) use doctor::examine;
pub(crate) use listing::Address;
pub(crate) use multipart::Multipart;
pub(crate) use pending_publish::PendingPublish;
pub use policy::{Policy, Role};
pub(crate) use prefix::PrefixSource;
pub use refs::{RefKind, RemoteRef};
pub use source::RemoteSource;
pub(crate) use streaming_upload::{Proven, StreamingUpload};
pub(crate) use unmanaged::{AddressContents, REMEDY, UnmanagedObjects, some, unstated};

#[cfg(fuzzing)]
pub(crate) use {
    claim::fuzz as fuzz_claim, http_client::fuzz as fuzz_listing, profile::fuzz as fuzz_profile, refs::fuzz as fuzz_ref,
};

use crate::config::RemoteConfig;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::finding::Verified;
use crate::key::{ArtifactKey, ArtifactName, FilePath, OWN_FOLDER, Version};
use crate::limits;
use crate::manifest::{Manifest, ObjectIdentity};
use crate::progress::Progress;
use crate::transfer::{RateLimiter, Retry};
use object_store::path::Path;
use settings::{Options, RemoteLocation};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use store::Store;
use tokio::sync::OnceCell;

/// The far tier. Clones share clients, credentials and what was learnt of the store.
#[derive(Clone)]
pub struct Remote(Arc<Inner>);

struct Inner {
    config: RemoteConfig,
    place: RemoteLocation,
    options: Options,
    retry: Retry,
    store: OnceCell<Arc<Store>>,
    conditions: AtomicU8,
    read_only: AtomicBool,
    /// Whether somebody was told that it refuses writes.
    refusal_told: AtomicBool,
    /// Of all uploads together.
    upload_memory: multipart::UploadMemory,
    /// Something was published since unfinished uploads were last looked for.
    has_published: AtomicBool,
}

/// The address only: the configuration may hold keys.
impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.0.config.url)
    }
}

/// How to publish.
#[derive(Debug, Clone, Default)]
pub struct PublishOptions {
    /// Replace other content under the same key.
    pub force: bool,
    /// Files to be sent even if their objects look sound: a reader found their bytes wrong.
    pub rewrite: BTreeSet<FilePath>,
    /// Write `<file>.sha256` beside every object, for readers who know nothing of manifests.
    pub sidecars: bool,
}

/// What publishing did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Published {
    /// Bytes sent; 0 if the remote held everything.
    pub uploaded_bytes: u64,
    /// Bytes that the server copied from other versions of the name.
    pub copied_bytes: u64,
}

/// Whether the store keeps conditional writes, as far as it was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Conditions {
    Untried = 0,
    Kept = 1,
    Ignored = 2,
}

impl Remote {
    /// Checks address and options; asks no network. `retry` is shared with the whole process.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an address or an option that cannot be used.
    pub fn open(config: &RemoteConfig, retry: Retry) -> Result<Self> {
        let place = RemoteLocation::parse(&config.url)?;
        let options = Options::parse(config)?;
        Ok(Self(Arc::new(Inner {
            config: config.clone(),
            place,
            options,
            retry,
            store: OnceCell::new(),
            conditions: AtomicU8::new(Conditions::Untried as u8),
            read_only: AtomicBool::new(false),
            refusal_told: AtomicBool::new(false),
            upload_memory: multipart::UploadMemory::default(),
            has_published: AtomicBool::new(false),
        })))
    }

    /// From now on nothing is written there.
    #[must_use]
    pub fn read_only(self) -> Self {
        self.0.read_only.store(true, Ordering::Relaxed);
        self
    }

    /// Whether it is configured to be only read.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only.load(Ordering::Relaxed)
    }

    /// Why a write was refused, if one was.
    pub(crate) fn refusal(&self) -> Option<Error> {
        self.0.store.get()?.refusal().cloned()
    }

    /// Whether it refused a write for want of a right: then it is taken as read-only until this process ends.
    pub fn refuses_writes(&self) -> bool {
        self.refusal().is_some()
    }

    /// Whether anything may be written there, as far as is known.
    pub fn is_writable(&self) -> bool {
        !self.is_read_only() && !self.refuses_writes()
    }

    /// Whether this is the first time that its refusal is told.
    pub(crate) fn is_first_refusal(&self) -> bool {
        !self.0.refusal_told.swap(true, Ordering::Relaxed)
    }

    /// Refuses what would write to a remote that is configured to be only read.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], with `remedy` beside the setting.
    pub(crate) fn ensure_read_write(&self, remedy: &str) -> Result<()> {
        if !self.is_read_only() {
            return Ok(());
        }
        let message = format!("the remote {} is only read (MODEL_CACHE_REMOTE_MODE=ro)", self.url());
        Err(Error::invalid(message).tier(Tier::Remote).hint(format!("set it to rw, or {remedy}")))
    }

    /// The address as configured; it carries no secrets.
    pub fn url(&self) -> &str {
        &self.0.config.url
    }

    /// The artifact `key` as something to read from. Asks nothing yet.
    pub fn source(&self, key: &ArtifactKey) -> RemoteSource {
        RemoteSource::new(self.clone(), key.clone())
    }

    /// Makes the remote hold `files` (path in the artifact -> local file) of `manifest`'s artifact.
    ///
    /// What is held already is looked at and repaired where it is gone or differs; other files of the manifest stay as
    /// they are. Local files are hashed while they are sent.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the key holds other content (unless `force`), or the place holds foreign objects;
    /// [`ErrorKind::Corrupt`] where a local file does not match its digest; [`ErrorKind::Unavailable`] where another
    /// writer keeps its claim, or the store does not answer; [`ErrorKind::Unauthorized`].
    pub async fn publish(
        &self,
        manifest: &Manifest,
        files: &BTreeMap<FilePath, LocalFile>,
        options: PublishOptions,
        progress: &Progress,
    ) -> Result<Published> {
        let named = |error: Error| error.artifact(&manifest.key).tier(Tier::Remote);
        self.ensure_read_write("leave the remote out: --remote none").map_err(named)?;
        publish::publish(self, manifest, files, options, None, progress).await.map_err(named)
    }

    /// The same, going on with what had [begun](Self::begin).
    pub(crate) async fn publish_pending(
        &self,
        manifest: &Manifest,
        files: &BTreeMap<FilePath, LocalFile>,
        options: PublishOptions,
        begun: Option<PendingPublish>,
        progress: &Progress,
    ) -> Result<Published> {
        let named = |error: Error| error.artifact(&manifest.key).tier(Tier::Remote);
        self.ensure_read_write("leave the remote out: --remote none").map_err(named)?;
        publish::publish(self, manifest, files, options, begun, progress).await.map_err(named)
    }

    /// Aborts old unfinished uploads in version folders, if anything was published here since the last time. Failing is
    /// nobody's trouble.
    pub(crate) async fn sweep_uploads(&self) {
        if !self.0.has_published.swap(false, Ordering::Relaxed) {
            return;
        }
        match orphaned_uploads::sweep(self).await {
            Ok(0) => {}
            Ok(uploads) => tracing::info!(uploads, "aborted uploads that were left unfinished on the remote long ago"),
            Err(error) => tracing::debug!(%error, "unfinished uploads on the remote are left"),
        }
    }

    /// Removes the artifact: its manifest, then the objects that it names. With `dry_run`, only tells.
    ///
    /// The answer is the number of bytes removed, or `None` if it was not there.
    pub async fn evict(&self, key: &ArtifactKey, dry_run: bool) -> Result<Option<u64>> {
        self.ensure_read_write("remove it from this disk only: --tier disk").map_err(|error| error.artifact(key))?;
        evict::evict(self, key, dry_run).await.map_err(|error| error.artifact(key).tier(Tier::Remote))
    }

    /// The manifest of every published artifact, by name and version. Damaged ones are left out with a warning.
    pub async fn list(&self) -> Result<Vec<Manifest>> {
        list::list(self).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// The same, with every tag and the name it belongs to.
    pub async fn list_with_tags(&self) -> Result<(Vec<Manifest>, Vec<(ArtifactName, RemoteRef)>)> {
        list::list_with_tags(self).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// What the origin last said about `revision` of `name`, as far as the fleet remembers it.
    pub async fn answer(&self, name: &ArtifactName, revision: &str) -> Result<Option<RemoteRef>> {
        refs::answer(self, name, revision).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Lets the fleet know what the origin said, unless it knows something as new.
    pub async fn write_answer(&self, name: &ArtifactName, answer: &RemoteRef) -> Result<()> {
        refs::write_answer(self, name, answer).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// What the tag means, if there is such a tag.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for one that a newer release wrote in another format.
    pub async fn tag(&self, name: &ArtifactName, tag: &str) -> Result<Option<RemoteRef>> {
        refs::tag(self, name, tag).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Sets a tag; the answer is what it meant before. Whether its version exists is not asked.
    pub async fn set_tag(&self, name: &ArtifactName, tag: &RemoteRef) -> Result<Option<RemoteRef>> {
        refs::set_tag(self, name, tag).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Removes a tag, where given only while it means `only_to`; the answer is what it meant.
    pub async fn remove_tag(
        &self,
        name: &ArtifactName,
        tag: &str,
        only_to: Option<&Version>,
    ) -> Result<Option<RemoteRef>> {
        refs::remove_tag(self, name, tag, only_to).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// The refs of `name`, tags and origins' answers; `None` where listing is not permitted.
    pub async fn refs_of(&self, name: &ArtifactName) -> Result<Option<Vec<RemoteRef>>> {
        refs::refs_of(self, name).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Every artifact that has a manifest, readable or not, by name and version.
    pub(crate) async fn keys(&self) -> Result<Vec<ArtifactKey>> {
        list::keys(self).await.map_err(|error| error.tier(Tier::Remote))
    }

    /// Reads the objects that the manifest of `key` names, or those among them whose path `chosen` takes, and compares
    /// them with it; `None` if it is not published.
    pub(crate) async fn verify(
        &self,
        key: &ArtifactKey,
        chosen: &(dyn Fn(&FilePath) -> bool + Sync),
        rate_limiter: &RateLimiter,
        progress: &Progress,
    ) -> Result<Option<Verified>> {
        verify::verify(self, key, chosen, rate_limiter, progress)
            .await
            .map_err(|error| error.artifact(key).tier(Tier::Remote))
    }

    /// The region that the server says the bucket is in, where it refused ours.
    pub(crate) fn reported_region(&self) -> Option<String> {
        self.0.store.get()?.reported_region()
    }

    /// The store, opened at the first use.
    async fn store(&self) -> Result<&Arc<Store>> {
        self.0
            .store
            .get_or_try_init(|| async {
                let inner = self.0.clone();
                let open = move || Store::open(&inner.config, &inner.place, &inner.options, inner.retry.clone());
                let opened = tokio::task::spawn_blocking(open).await;
                let opened = opened
                    .map_err(|cause| Error::new(ErrorKind::Other, "opening the remote was cut short").cause(cause))?;
                opened.map(Arc::new)
            })
            .await
    }

    fn conditions(&self) -> Conditions {
        match self.0.conditions.load(Ordering::Relaxed) {
            1 => Conditions::Kept,
            2 => Conditions::Ignored,
            _ => Conditions::Untried,
        }
    }

    fn learn_conditions(&self, conditions: Conditions) {
        let before = self.0.conditions.swap(conditions as u8, Ordering::Relaxed);
        if conditions == Conditions::Ignored && before != conditions as u8 {
            tracing::warn!(
                remote = self.url(),
                "the remote ignores conditional writes; two writers of one artifact at once may conflict"
            );
        }
    }
}

/// The keys of one version folder.
#[derive(Debug, Clone)]
struct Folder {
    key: ArtifactKey,
    base: String,
}

impl Folder {
    fn new(key: &ArtifactKey) -> Self {
        Self { key: key.clone(), base: format!("{}/{}", key.name, key.version) }
    }

    fn object(&self, store: &Store, path: &FilePath) -> Result<Path> {
        store.key(&format!("{}/{path}", self.base))
    }

    fn own(&self, store: &Store, file: &str) -> Result<Path> {
        store.key(&format!("{}/{OWN_FOLDER}/{file}", self.base))
    }

    fn manifest(&self, store: &Store) -> Result<Path> {
        self.own(store, MANIFEST)
    }

    /// The stored manifest and its object, or `None`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it is damaged or another artifact's.
    async fn read_manifest(&self, store: &Store) -> Result<Option<(Manifest, ObjectIdentity)>> {
        let Some((bytes, identity)) = store.get(&self.manifest(store)?, limits::MANIFEST_BYTES_MAX).await? else {
            return Ok(None);
        };
        let manifest = tokio::task::spawn_blocking(move || Manifest::from_bytes(&bytes)).await;
        let manifest =
            manifest.map_err(|cause| Error::new(ErrorKind::Other, "reading a manifest was cut short").cause(cause))?;
        let manifest = manifest.map_err(|error| error.hint(REPAIR))?;
        if manifest.key != self.key {
            return Err(Error::corrupt(format!("the manifest is that of {}", manifest.key)).hint(REPAIR));
        }
        Ok(Some((manifest, identity)))
    }
}

/// Name of the commit point.
const MANIFEST: &str = "manifest.json";
/// What to do about a damaged manifest.
const REPAIR: &str = "publish the artifact again, or evict it from the remote";
