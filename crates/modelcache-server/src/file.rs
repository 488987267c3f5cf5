//! Responses with a file: conditional and range requests, and bytes while the file is still downloading.

use crate::app::{App, CorruptFile};
use crate::body::Opened;
use crate::header;
use crate::range::{Requested, requested};
use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::Response;
use futures::StreamExt as _;
use modelcache::cache::OpenOptions;
use modelcache::key::FilePath;
use modelcache::manifest::Manifest;
use modelcache::progress::Progress;
use modelcache::{Cache, Error, ErrorKind, Reference, Result, Tier};
use std::sync::Arc;
use std::time::Instant;

/// A file that a client requests.
pub(crate) struct FileRequest<'a> {
    pub(crate) app: &'a Arc<App>,
    /// The cache to open the file with: it has the Hub token of the client.
    pub(crate) cache: &'a Cache,
    /// The reference to exactly one version.
    pub(crate) reference: &'a Reference,
    pub(crate) manifest: &'a Manifest,
    pub(crate) path: &'a FilePath,
    pub(crate) method: &'a Method,
    pub(crate) headers: &'a HeaderMap,
    /// The entity tag with its quotes, if the file has one.
    pub(crate) etag: Option<String>,
    /// The farthest tier that may be contacted for the file.
    pub(crate) max_tier: Tier,
    /// True if a client that asks for the rest of a file starts over when it gets the whole file.
    pub(crate) rewinds: bool,
}

impl FileRequest<'_> {
    /// Returns the response without headers that are particular to the route.
    ///
    /// # Errors
    /// As for [`Cache::open_file`]; `NotFound` if the artifact has no such file; `Corrupt` if the file failed
    /// verification so often that it is not downloaded for now; `Conflict` if the client would append to wrong bytes.
    pub(crate) async fn respond(&self) -> Result<Response> {
        let Some(entry) = self.manifest.files.get(self.path) else {
            let error = Error::not_found(format!("there is no file {}", self.path)).artifact(&self.manifest.key);
            return Err(error.hint("GET /cache/artifacts/{name@version} lists the files of an artifact"));
        };
        let size = entry.size;
        let mut asked = requested(self.headers, size, self.etag.as_deref());
        let corrupt = self.app.corrupt_file(self.reference, self.path);
        // This client may have bytes that turned out to be wrong.
        if matches!(asked, Requested::Part { open_ended: true, .. }) && corrupt.is_some() {
            if !self.rewinds {
                return Err(self.wrong_beginning());
            }
            asked = Requested::Whole;
        }
        let (status, range) = match &asked {
            Requested::Whole => (StatusCode::OK, 0..size),
            Requested::Part { range, .. } => (StatusCode::PARTIAL_CONTENT, range.clone()),
            // State the length of the file. Otherwise axum would state the length of the empty body.
            Requested::NotModified => return Ok(self.response(StatusCode::NOT_MODIFIED, size, Body::empty())),
            Requested::Unsatisfiable => {
                let mut response = self.response(StatusCode::RANGE_NOT_SATISFIABLE, 0, Body::empty());
                response.headers_mut().insert(CONTENT_RANGE, header::value(&format!("bytes */{size}")));
                return Ok(response);
            }
        };
        let len = range.end - range.start;
        let body = match self.method == Method::HEAD || range.is_empty() {
            true => Body::empty(),
            false => {
                // Bytes up to the end of the file may be sent before they are verified, because the last of them is
                // sent only if the digest of the whole file holds. The bytes of a range that ends earlier must be
                // verified before they are sent.
                let unchecked = range.end == size;
                let started = Instant::now();
                let opened = match corrupt.filter(CorruptFile::is_refused) {
                    // The file is on disk if a later download succeeded, so only the disk is tried.
                    Some(corrupt) => {
                        self.open(unchecked, Tier::Disk).await.map_err(|_| self.refused_as_corrupt(corrupt))?
                    }
                    None => self.open(unchecked, self.max_tier).await?,
                };
                let (app, reference, path) = (self.app.clone(), self.reference.clone(), self.path.clone());
                let stream = opened.read(range.clone()).map(move |chunk| match chunk {
                    Ok(chunk) => {
                        app.http.count_sent(chunk.len());
                        Ok(chunk)
                    }
                    Err(error) => {
                        app.record_cut_body(&reference, &path, started, &error);
                        Err(error)
                    }
                });
                Body::from_stream(stream)
            }
        };
        let mut response = self.response(status, len, body);
        if status == StatusCode::PARTIAL_CONTENT {
            let (first, last) = (range.start, range.end - 1);
            response.headers_mut().insert(CONTENT_RANGE, header::value(&format!("bytes {first}-{last}/{size}")));
        }
        Ok(response)
    }

    /// Opens the file. A file for which the cache has no room is passed through.
    async fn open(&self, unchecked: bool, max_tier: Tier) -> Result<Opened> {
        // A reference to a single file names it already.
        let file = self.reference.file.is_none().then(|| self.path.clone());
        let options = OpenOptions { file, unchecked, max_tier, ..OpenOptions::default() };
        match self.cache.open_file(self.reference, &options, &Progress::new()).await {
            Ok(file) => Ok(Opened::Cached(Arc::new(file))),
            Err(error) if error.kind() == ErrorKind::Full => {
                tracing::warn!(reference = %self.reference, path = %self.path, %error, "passed through uncached");
                let file = self.cache.open_uncached(self.reference, &options).await?;
                self.cache.metrics().record_uncached(file.size());
                Ok(Opened::Uncached(file))
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the error for a client that would append the rest of the file to wrong bytes.
    fn wrong_beginning(&self) -> Error {
        let message = format!(
            "an earlier download of {} failed verification, and the part of it that this client has may be wrong; \
             discard it: hf download --force-download, or force_download=True in Python",
            self.path
        );
        // Clients do not repeat a request after a conflict, and show its message.
        Error::new(ErrorKind::Conflict, message).artifact(&self.manifest.key)
    }

    /// Returns the error for a file that is not downloaded for now.
    fn refused_as_corrupt(&self, corrupt: CorruptFile) -> Error {
        let message = format!(
            "{} downloads of {} failed verification: its server sends bytes that do not match their digest; it is \
             downloaded again after a minute",
            corrupt.failed_downloads, self.path
        );
        Error::new(ErrorKind::Corrupt, message).artifact(&self.manifest.key)
    }

    /// Returns a response with the headers that all routes have in common.
    fn response(&self, status: StatusCode, len: u64, body: Body) -> Response {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        // A browser must not run what a repository contains.
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
        if let Some(etag) = &self.etag {
            headers.insert(ETAG, header::value(etag));
        }
        headers.insert(CONTENT_LENGTH, len.into());
        response
    }
}
