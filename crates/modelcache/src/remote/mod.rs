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
//! <name>/<version>/.modelcache/claim           a writer at work
//! <name>/<version>/.modelcache/manifest.json   the commit point: all files, and what is held with ETag and size
//! ```

mod claim;
mod credentials;
mod evict;
mod failure;
mod list;
mod prefix;
mod profile;
mod publish;
mod settings;
mod source;
mod store;
mod upload;
mod wire;

pub(crate) use prefix::PrefixSource;
pub use source::RemoteSource;

use crate::config::RemoteConfig;
use crate::error::{Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath, OWN_FOLDER};
use crate::limits;
use crate::manifest::{Manifest, ObjectIdentity};
use crate::progress::Progress;
use crate::transfer::Retry;
use object_store::path::Path;
use settings::{Options, Place};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use store::Store;
use tokio::sync::OnceCell;

/// The far tier. Clones share clients, credentials and what was learnt of the store.
#[derive(Clone)]
pub struct Remote(Arc<Inner>);

struct Inner {
    config: RemoteConfig,
    place: Place,
    options: Options,
    retry: Retry,
    store: OnceCell<Arc<Store>>,
    conditions: AtomicU8,
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
}

/// What publishing did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Bytes sent; 0 if the remote held everything.
    pub uploaded_bytes: u64,
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
        let place = Place::parse(&config.url)?;
        let options = Options::parse(config)?;
        Ok(Self(Arc::new(Inner {
            config: config.clone(),
            place,
            options,
            retry,
            store: OnceCell::new(),
            conditions: AtomicU8::new(Conditions::Untried as u8),
        })))
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
        files: &BTreeMap<FilePath, PathBuf>,
        options: PublishOptions,
        progress: &Progress,
    ) -> Result<Published> {
        let named = |error: Error| error.artifact(&manifest.key).tier(Tier::Remote);
        publish::publish(self, manifest, files, options, progress).await.map_err(named)
    }

    /// Removes the artifact: its manifest, then the objects that it names. With `dry_run`, only tells.
    ///
    /// The answer is the number of bytes removed, or `None` if it was not there.
    pub async fn evict(&self, key: &ArtifactKey, dry_run: bool) -> Result<Option<u64>> {
        evict::evict(self, key, dry_run).await.map_err(|error| error.artifact(key).tier(Tier::Remote))
    }

    /// The manifest of every published artifact, by name and version. Damaged ones are left out with a warning.
    pub async fn list(&self) -> Result<Vec<Manifest>> {
        list::list(self).await.map_err(|error| error.tier(Tier::Remote))
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
