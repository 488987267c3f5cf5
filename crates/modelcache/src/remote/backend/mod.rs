//! Backends of the remote: an S3 bucket, or a local folder with the same layout.
//!
//! The protocols of the remote use [`Store`], which retries requests and translates errors. It uses a [`Backend`],
//! which [`open`] selects by the address of the remote.

mod failure;
mod folder;
mod location;
mod s3;

pub(super) use failure::{
    EndpointContext, condition_failed, condition_unsupported, from_io, ignores_range, is_ambiguous, refuses_write,
    translate,
};
pub(super) use location::RemoteLocation;
pub(super) use s3::Options;
pub use s3::{Policy, Role};
#[cfg(fuzzing)]
pub(crate) use s3::{fuzz_listing, fuzz_profile};

use super::store::Store;
use super::upload::Upload;
use crate::check::{Check, Clock};
use crate::config::RemoteConfig;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::ObjectIdentity;
use crate::transfer::Retry;
use async_trait::async_trait;
use bytes::Bytes;
use object_store::list::PaginatedListResult;
use object_store::multipart::PartId;
use object_store::path::Path;
use object_store::{ObjectStore, PutMode, PutOptions, PutResult};
use std::sync::Arc;
use std::time::SystemTime;

/// Sets up the backend of `location` without sending a request. Blocks while it reads AWS files and root certificates.
pub(super) fn open(
    config: &RemoteConfig,
    location: &RemoteLocation,
    options: &Options,
    retry: &Retry,
) -> Result<Arc<dyn Backend>> {
    Ok(match location {
        RemoteLocation::Folder(folder) => Arc::new(folder::FolderBackend::open(folder)?),
        RemoteLocation::Bucket { bucket, prefix } => {
            Arc::new(s3::S3Backend::open(config, bucket, prefix, options, retry)?)
        }
    })
}

/// The operations that differ between a bucket and a folder.
///
/// # Contract
/// - Nothing is retried here. Methods that return an `object_store` error leave its translation to the caller, which
///   calls [`explain`](Self::explain).
/// - Keys begin with [`prefix`](Self::prefix).
/// - Methods with a default body are optional.
#[async_trait]
pub(super) trait Backend: Send + Sync {
    /// Returns the client that reads, writes and deletes objects, requests their metadata, and supports conditional
    /// writes.
    fn objects(&self) -> &dyn ObjectStore;

    /// Returns the prefix of every key; empty, or without slashes at its ends.
    fn prefix(&self) -> &str;

    /// Returns the names of container, endpoint and region, for messages.
    fn endpoint_context(&self) -> &EndpointContext;

    /// Returns the reason if `key` cannot be the key of an object, or `None` if it can.
    fn unusable_key(&self, key: &Path) -> Option<String>;

    /// Writes a small object under the condition `mode`.
    async fn put(&self, key: &Path, bytes: Bytes, mode: PutMode) -> object_store::Result<PutResult> {
        let options = PutOptions { mode, ..PutOptions::default() };
        self.objects().put_opts(key, bytes.into(), options).await
    }

    /// Lists one page of the objects below `prefix`. With `one_level`, lists only objects and folders directly in it.
    async fn list_page(
        &self,
        prefix: Option<&Path>,
        one_level: bool,
        token: Option<String>,
    ) -> object_store::Result<PaginatedListResult>;

    /// Copies an object within the backend on the condition that it is unchanged.
    async fn copy(&self, store: &Arc<Store>, copy: &CopyRequest<'_>) -> Result<CopyOutcome>;

    /// Returns the interface for multipart uploads. A backend without them implements [`put_file`](Self::put_file).
    fn uploads(&self) -> Option<&dyn MultipartUploads> {
        None
    }

    /// Writes a local file. The object appears complete and verified, or not at all. `staging` is a key below which
    /// temporary objects may be created.
    async fn put_file(&self, _upload: &Upload, _staging: &Path) -> Result<()> {
        Err(Error::new(ErrorKind::Other, "this remote uploads files in parts only"))
    }

    /// Removes the temporary objects of killed writers below `staging`. The caller must hold the claim.
    async fn sweep_unfinished(&self, _staging: &Path) {}

    /// Removes `folder` and the folders in it if they are empty, then up to `levels_above` empty folders above
    /// `folder`. The default does nothing, because a bucket has no folders.
    async fn remove_empty_folders(&self, _folder: &Path, _levels_above: usize) {}

    /// Returns the checksums that the backend stores for an object, or `None` if it has none.
    async fn stored_checksums(&self, _key: &Path) -> object_store::Result<Option<StoredChecksums>> {
        Ok(None)
    }

    /// Returns the files below `base`, a path below the prefix, if symbolic links have to be followed. Returns `None`
    /// if [`list_page`](Self::list_page) finds all objects.
    async fn walk(&self, _base: &str) -> Result<Option<WalkedFiles>> {
        Ok(None)
    }

    /// Returns true if `base`, a path below the prefix, leads outside the remote through a symbolic link.
    async fn leads_outside(&self, _base: &str) -> bool {
        false
    }

    /// Translates an error. `what_failed` is the failed operation.
    async fn explain(&self, error: object_store::Error, what_failed: &str) -> Error;

    /// Returns how to get the missing permission to write.
    fn write_permission_hint(&self, error: &Error) -> String;

    /// Returns the region that the server reported, if it differs from the region that requests are signed for.
    fn reported_region(&self) -> Option<String> {
        None
    }

    /// Adds the checks that `modelcache doctor` makes before it accesses any object. Returns false if no further check
    /// can succeed.
    async fn examine(&self, config: &RemoteConfig, clock: &Clock, checks: &mut Vec<Check>) -> Result<bool>;
}

/// Multipart uploads: parts are sent in any order, and the object appears when the upload is completed.
#[async_trait]
pub(super) trait MultipartUploads: Send + Sync {
    /// Begins an upload and returns its id.
    async fn create(&self, key: &Path) -> object_store::Result<String>;

    /// Returns true if requests sign the part's digest, so that the caller should compute it while reading.
    fn signs_digests(&self) -> bool;

    /// Uploads the part at `index` (from 0). `sha256` is its digest if the caller computed it.
    async fn put_part(
        &self,
        key: &Path,
        id: &str,
        index: usize,
        bytes: Bytes,
        sha256: Option<Digest>,
    ) -> object_store::Result<PartId>;

    /// Completes an upload. Returns the ETag of the object if the response contains it.
    async fn complete(&self, key: &Path, id: &str, parts: Vec<PartId>) -> object_store::Result<Option<String>>;

    /// Aborts an upload.
    async fn abort(&self, key: &Path, id: &str) -> object_store::Result<()>;

    /// Returns the unfinished uploads to keys with this `prefix`. Returns an empty list if they cannot be listed.
    async fn list(&self, prefix: &str) -> Vec<UnfinishedUpload>;
}

/// Source and target of a copy.
pub(super) struct CopyRequest<'a> {
    pub(super) from: &'a Path,
    /// The identity that the source must have.
    pub(super) recorded: &'a ObjectIdentity,
    pub(super) to: &'a Path,
    /// A key below which temporary objects may be created.
    pub(super) staging: &'a Path,
}

/// Result of a copy.
pub(super) enum CopyOutcome {
    /// The object was copied. Contains the ETag of the copy if the backend reported it.
    Done(Option<String>),
    /// The backend cannot copy objects, for instance because of an option of the remote.
    Unsupported,
}

/// An upload that was neither completed nor aborted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnfinishedUpload {
    pub(super) key: String,
    pub(super) id: String,
    pub(super) begun_at: Option<SystemTime>,
}

/// Paths of files, relative to the folder that was walked.
#[derive(Debug, Default)]
pub(super) struct WalkedFiles {
    pub(super) paths: Vec<String>,
    /// Entries that are not read: names that are not UTF-8, special files, and links to targets outside the remote.
    pub(super) skipped: Vec<String>,
}

/// Keys that the backend removed from a page of a listing, because `object_store` cannot represent them. Stored as an
/// extension of the page.
#[derive(Debug, Clone, Default)]
pub(super) struct SkippedKeys(pub(super) Vec<String>);

/// Checksums that the backend stores for an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StoredChecksums {
    /// The ETag of the object that the checksum belongs to.
    pub(super) etag: Option<String>,
    /// The digest and the header that contains it.
    pub(super) sha256: Option<(Digest, &'static str)>,
    /// The header that should contain a digest, if its value is invalid.
    pub(super) invalid_header: Option<&'static str>,
}
