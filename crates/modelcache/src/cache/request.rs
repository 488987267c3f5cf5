//! Request builders: a call of [`Cache`] that states only the options that differ from their defaults.
//!
//! A request does nothing until it is awaited. Front ends that already have the options use
//! [`get_with`](Cache::get_with) and [`put_with`](Cache::put_with).

use super::{Artifact, Cache, GetOptions, PutOptions, PutReport, PutTier};
use crate::error::{Error, Result, Tier};
use crate::format::Format;
use crate::key::ArtifactKey;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::selection::Selection;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::path::PathBuf;

impl Cache {
    /// Gets an artifact and leases it. Await the request to run it.
    ///
    /// ```no_run
    /// # async fn example(cache: modelcache::Cache) -> modelcache::Result<()> {
    /// let model = cache.get("hf://org/model@main").await?;
    /// let weights = cache.get("hf://org/model@main").include("*.safetensors").offline().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of [`get_with`](Self::get_with); [`Invalid`](crate::ErrorKind::Invalid) if the reference or a pattern
    /// cannot be parsed.
    pub fn get<R>(&self, reference: R) -> GetRequest
    where
        R: TryInto<Reference, Error = Error>,
    {
        GetRequest {
            cache: self.clone(),
            reference: reference.try_into(),
            options: GetOptions::default(),
            include: Vec::new(),
            exclude: Vec::new(),
            progress: Progress::new(),
        }
    }

    /// Publishes a file or folder under `key`. Await the request to run it.
    ///
    /// ```no_run
    /// # async fn example(cache: modelcache::Cache) -> modelcache::Result<()> {
    /// cache.put("fraud-detector@3", "./model").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of [`put_with`](Self::put_with); [`Invalid`](crate::ErrorKind::Invalid) if the key cannot be parsed.
    pub fn put<K>(&self, key: K, path: impl Into<PathBuf>) -> PutRequest
    where
        K: TryInto<ArtifactKey, Error = Error>,
    {
        PutRequest {
            cache: self.clone(),
            key: key.try_into(),
            path: path.into(),
            options: PutOptions::default(),
            progress: Progress::new(),
        }
    }
}

/// A [`Cache::get`] that was not awaited yet.
#[derive(Debug)]
#[must_use = "a request does nothing until it is awaited"]
pub struct GetRequest {
    cache: Cache,
    reference: Result<Reference>,
    options: GetOptions,
    include: Vec<String>,
    exclude: Vec<String>,
    progress: Progress,
}

impl GetRequest {
    /// Gets only files that match `pattern`, for example `*.safetensors`. May be called several times.
    pub fn include(mut self, pattern: impl Into<String>) -> Self {
        self.include.push(pattern.into());
        self
    }

    /// Leaves out files that match `pattern`, also if they match an included pattern. May be called several times.
    pub fn exclude(mut self, pattern: impl Into<String>) -> Self {
        self.exclude.push(pattern.into());
        self
    }

    /// Contacts no origin: the artifact comes from the local directory or the remote.
    pub fn offline(mut self) -> Self {
        self.options.max_tier = Tier::Remote;
        self
    }

    /// Uses the local directory only.
    pub fn local_files_only(mut self) -> Self {
        self.options.max_tier = Tier::Disk;
        self
    }

    /// Resolves a revision or tag again, even if the cached version is still fresh.
    pub fn refresh(mut self) -> Self {
        self.options.refresh = true;
        self
    }

    /// Reads the files that are on disk already in full, and compares them with their digests.
    pub fn verify(mut self) -> Self {
        self.options.verify = true;
        self
    }

    /// Waits until the files are on stable storage.
    pub fn durable(mut self) -> Self {
        self.options.durable = true;
        self
    }

    /// Reports the progress of the call to `progress`.
    pub fn progress(mut self, progress: &Progress) -> Self {
        self.progress = progress.clone();
        self
    }
}

impl IntoFuture for GetRequest {
    type Output = Result<Artifact>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let Self { cache, reference, mut options, include, exclude, progress } = self;
            options.selection = Selection::globs(&include, &exclude)?;
            cache.get_with(&reference?, &options, &progress).await
        }
        .boxed()
    }
}

/// A [`Cache::put`] that was not awaited yet.
#[derive(Debug)]
#[must_use = "a request does nothing until it is awaited"]
pub struct PutRequest {
    cache: Cache,
    key: Result<ArtifactKey>,
    path: PathBuf,
    options: PutOptions,
    progress: Progress,
}

impl PutRequest {
    /// Replaces other content under the same key.
    pub fn force(mut self) -> Self {
        self.options.force = true;
        self
    }

    /// Publishes on the remote only, and leaves the local directory as it is.
    pub fn remote_only(mut self) -> Self {
        self.options.tier = PutTier::Remote;
        self
    }

    /// Refuses files of any other format.
    pub fn expect(mut self, format: Format) -> Self {
        self.options.expect = Some(format);
        self
    }

    /// Writes `<file>.sha256` beside every object on the remote.
    pub fn sidecars(mut self) -> Self {
        self.options.sidecars = true;
        self
    }

    /// Reports the progress of the call to `progress`.
    pub fn progress(mut self, progress: &Progress) -> Self {
        self.progress = progress.clone();
        self
    }
}

impl IntoFuture for PutRequest {
    type Output = Result<PutReport>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move { self.cache.put_with(&self.key?, &self.path, &self.options, &self.progress).await }.boxed()
    }
}
