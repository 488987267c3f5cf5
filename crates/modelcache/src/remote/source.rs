//! One artifact on the remote, as something to read from.
//!
//! Ranges are asked for under the ETag recorded when the object was written. An object that has another ETag and the
//! same size is read all the same: copying a bucket changes ETags and not bytes, and whoever reads checks.
//!
//! Where there is no manifest, another tool may have put the files there: then the source is a [foreign](super::foreign)
//! tree, and its objects are read only as they were listed.

use super::store::ReadBody;
use super::unmanaged::{self, UnmanagedObjects};
use super::{Folder, Remote};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{Manifest, ObjectIdentity};
use crate::source::{Body, Source};
use async_trait::async_trait;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;

/// One artifact on the remote. The manifest is asked for once and remembered.
pub struct RemoteSource {
    remote: Remote,
    folder: Folder,
    known: OnceCell<Option<RemoteContents>>,
    /// ETags that took the place of recorded ones.
    etags: Mutex<HashMap<FilePath, Option<String>>>,
}

/// What lies there.
enum RemoteContents {
    Published(Arc<Manifest>),
    UnmanagedObjects(UnmanagedObjects),
}

impl RemoteContents {
    fn manifest(&self) -> &Manifest {
        match self {
            Self::Published(manifest) => manifest,
            Self::UnmanagedObjects(unmanaged) => &unmanaged.manifest,
        }
    }
}

impl fmt::Debug for RemoteSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteSource({} at {})", self.folder.key, self.remote.url())
    }
}

impl RemoteSource {
    pub(super) fn new(remote: Remote, key: ArtifactKey) -> Self {
        Self { remote, folder: Folder::new(&key), known: OnceCell::new(), etags: Mutex::default() }
    }

    async fn known(&self) -> Result<Option<&RemoteContents>> {
        let ask = || async {
            let store = self.remote.store().await?;
            if let Some((manifest, _)) = self.folder.read_manifest(store).await? {
                if manifest.files.is_empty() {
                    // Nobody can publish that; a release that took a server's empty list for a repository could.
                    tracing::warn!(artifact = %self.folder.key, "the manifest on the remote lists no files; taken as absent");
                    return Ok(None);
                }
                return Ok(Some(RemoteContents::Published(Arc::new(manifest))));
            }
            match unmanaged::at_key(store, &self.folder.key).await? {
                Some(listing) => {
                    let unmanaged = UnmanagedObjects::describe(store, &self.folder.key, Arc::new(listing)).await?;
                    Ok(Some(RemoteContents::UnmanagedObjects(unmanaged)))
                }
                None => Ok(None),
            }
        };
        Ok(self.known.get_or_try_init(ask).await?.as_ref())
    }

    /// Whether what lies there, as far as it was asked for, is another tool's.
    pub(crate) fn is_unmanaged(&self) -> bool {
        matches!(self.known.get(), Some(Some(RemoteContents::UnmanagedObjects(_))))
    }

    /// The object of `path` as it was written.
    async fn recorded(&self, path: &FilePath) -> Result<ObjectIdentity> {
        let known = self.known().await?;
        let held = known.and_then(|known| known.manifest().files.get(path)?.on_remote());
        held.cloned().ok_or_else(|| Error::not_found(format!("{path} is not held by the remote")))
    }

    fn etag(&self, path: &FilePath, recorded: &ObjectIdentity) -> Option<String> {
        let etags = self.etags.lock().unwrap_or_else(PoisonError::into_inner);
        etags.get(path).cloned().unwrap_or_else(|| recorded.etag.clone())
    }

    /// Learns the new ETag of an object that differs from its record; other sizes are damage.
    async fn relearn(&self, path: &FilePath, recorded: &ObjectIdentity) -> Result<Option<String>> {
        let store = self.remote.store().await?;
        let Some(now) = store.head(&self.folder.object(store, path)?).await? else {
            return Err(Error::not_found(format!("{path} is listed there and gone")).hint(super::REPAIR));
        };
        if now.object_bytes != recorded.object_bytes {
            return Err(Error::corrupt(format!(
                "{path} has {} bytes on the remote; published with {}",
                now.object_bytes, recorded.object_bytes
            ))
            .hint(super::REPAIR));
        }
        tracing::debug!(artifact = %self.folder.key, %path, "the object has another ETag than recorded; its bytes will be checked");
        self.etags.lock().unwrap_or_else(PoisonError::into_inner).insert(path.clone(), now.etag.clone());
        Ok(now.etag)
    }

    async fn body(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        if let Some(RemoteContents::UnmanagedObjects(unmanaged)) = self.known().await? {
            return unmanaged.read(self.remote.store().await?, path, range).await;
        }
        let recorded = self.recorded(path).await?;
        let store = self.remote.store().await?;
        let object = self.folder.object(store, path)?;
        let wanted = |etag| ObjectIdentity { etag, object_bytes: recorded.object_bytes };
        let etag = self.etag(path, &recorded);
        let gone = |error: Error| match error.kind() {
            ErrorKind::NotFound => {
                Error::not_found(format!("{path} is listed there and gone: {error}")).hint(super::REPAIR)
            }
            _ => error,
        };
        let body = match store.read(&object, range.clone(), &wanted(etag)).await.map_err(gone)? {
            ReadBody::Changed => {
                let etag = self.relearn(path, &recorded).await?;
                store.read(&object, range, &wanted(etag)).await.map_err(gone)?
            }
            body => body,
        };
        match body {
            ReadBody::Stream { start, stream } => Ok(Body { start, stream }),
            ReadBody::Changed => Err(Error::unavailable(format!("{path} is being replaced on the remote"))),
        }
    }
}

#[async_trait]
impl Source for RemoteSource {
    fn tier(&self) -> Tier {
        Tier::Remote
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        let known = self.known().await.context(&self.folder.key, Tier::Remote)?;
        Ok(known.map(|known| known.manifest().clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.body(path, range).await.context(&self.folder.key, Tier::Remote)
    }

    fn stated_by(&self, path: &FilePath) -> Option<String> {
        match self.known.get() {
            Some(Some(RemoteContents::UnmanagedObjects(unmanaged))) => unmanaged.stated_by(path).map(str::to_owned),
            _ => None,
        }
    }
}
