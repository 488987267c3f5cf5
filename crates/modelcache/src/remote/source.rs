//! [`Source`] implementation for one artifact on the remote.
//!
//! An object with another ETag than the manifest records is read, too, if it has the recorded size: copying a bucket
//! changes ETags but not bytes, and the caller checks digests.
//!
//! Without a manifest, the source reads [unmanaged objects](super::unmanaged). It fails if one was replaced since it
//! was listed.

use super::listed_reads::ListedReads;
use super::store::ReadBody;
use super::unmanaged::{self, UnmanagedObjects};
use super::{Folder, Remote};
use crate::error::{Context, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{Manifest, ObjectIdentity};
use crate::source::{Body, Source};
use async_trait::async_trait;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;

/// One artifact on the remote. The manifest is requested once and cached.
pub struct RemoteSource {
    remote: Remote,
    folder: Folder,
    contents: OnceCell<Option<RemoteContents>>,
    reads: ListedReads,
}

/// The content of the version folder.
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
        Self { remote, folder: Folder::new(&key), contents: OnceCell::new(), reads: ListedReads::default() }
    }

    /// Returns the content of the version folder, or `None` if it has none. The first call requests it.
    async fn contents(&self) -> Result<Option<&RemoteContents>> {
        let request = || async {
            let store = self.remote.store().await?;
            if let Some((manifest, _)) = self.folder.read_manifest(store).await? {
                if manifest.files.is_empty() {
                    // Only an older release published such a manifest, after a server had returned an empty list.
                    tracing::warn!(artifact = %self.folder.key, "the manifest on the remote lists no files; treating the artifact as absent");
                    return Ok(None);
                }
                return Ok(Some(RemoteContents::Published(Arc::new(manifest))));
            }
            match unmanaged::at_key(store, &self.folder.key).await? {
                Some(listing) => {
                    let unmanaged = UnmanagedObjects::from_listing(store, &self.folder.key, Arc::new(listing)).await?;
                    Ok(Some(RemoteContents::UnmanagedObjects(unmanaged)))
                }
                None => Ok(None),
            }
        };
        Ok(self.contents.get_or_try_init(request).await?.as_ref())
    }

    /// Returns true if the content was requested and consists of unmanaged objects.
    pub(crate) fn is_unmanaged(&self) -> bool {
        matches!(self.contents.get(), Some(Some(RemoteContents::UnmanagedObjects(_))))
    }

    /// Returns the identity of the object of `path` as recorded in the manifest.
    async fn recorded(&self, path: &FilePath) -> Result<ObjectIdentity> {
        let contents = self.contents().await?;
        let recorded = contents.and_then(|contents| contents.manifest().files.get(path)?.on_remote());
        recorded.cloned().ok_or_else(|| Error::not_found(format!("the remote has no object for {path}")))
    }

    /// Opens a byte range of a file.
    async fn body(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        if let Some(RemoteContents::UnmanagedObjects(unmanaged)) = self.contents().await? {
            return unmanaged.read(self.remote.store().await?, path, range, &self.reads).await;
        }
        let recorded = self.recorded(path).await?;
        let store = self.remote.store().await?;
        let object = self.folder.object(store, path)?;
        // Without `If-Match`: copying a bucket changes ETags but not bytes, and the manifest has the digest.
        let wanted = ObjectIdentity { etag: None, object_bytes: recorded.object_bytes };
        match store.read(&object, range, &wanted).await {
            Ok(ReadBody::Stream { start, stream, .. }) => Ok(Body { start, stream }),
            Ok(ReadBody::Changed) => Err(Error::corrupt(format!(
                "{path} has another size on the remote than the {} bytes that its manifest records",
                recorded.object_bytes
            ))
            .hint(super::REPAIR_HINT)),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::not_found(format!("{path} is listed in the manifest but missing: {error}"))
                    .hint(super::REPAIR_HINT))
            }
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl Source for RemoteSource {
    fn tier(&self) -> Tier {
        Tier::Remote
    }

    fn endpoint(&self) -> Option<String> {
        Some(self.remote.url().to_owned())
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        let contents = self.contents().await.context(&self.folder.key, Tier::Remote)?;
        Ok(contents.map(|contents| contents.manifest().clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.body(path, range).await.context(&self.folder.key, Tier::Remote)
    }

    fn saw_other_validators(&self) -> bool {
        self.reads.saw_other_etag()
    }

    fn digest_stated_by(&self, path: &FilePath) -> Option<String> {
        match self.contents.get() {
            Some(Some(RemoteContents::UnmanagedObjects(unmanaged))) => unmanaged.stated_by(path).map(str::to_owned),
            _ => None,
        }
    }
}
