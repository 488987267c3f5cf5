//! The MLflow model registry, through the REST API of `mlflow server`.
//!
//! Aliases, stages and `latest` resolve to a version number. The server states where the files of a version are: on the
//! server itself (`mlflow-artifacts:`), in a bucket, or in a folder. Credentials are sent only to the two configured
//! servers, tracking and registry. MLflow has no checksums, so digests are those of the first download.
//!
//! Files on the server are read in one stream, not by ranges, because a server with its files in a bucket downloads the
//! whole file for each range.

mod api;

use super::http::{self, Request};
use super::{Origin, ResolvedSource, folder, no_files};
use crate::config::RemoteConfig;
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::option_name::setting::{MLFLOW_LOCAL_ROOT, MLFLOW_REGISTRY_URI, MLFLOW_TRACKING_URI};
use crate::printable;
use crate::reference::{MlflowModel, MlflowVersion, Reference, Scheme, Target, is_bucket_name, mlflow};
use crate::remote::PrefixSource;
use crate::source::{Body, Source};
pub(super) use api::Mlflow;
use api::{ARTIFACTS, MlflowServer, authority};
use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _};
use percent_encoding::percent_decode_str;
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RANGE};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;
use url::Url;

#[async_trait]
impl Origin for Arc<Mlflow> {
    fn scheme(&self) -> &'static Scheme {
        &mlflow::SCHEME
    }

    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        let Target::Mlflow(model) = &reference.target else { return Ok(None) };
        let registry = self.registry()?;
        let number = match model.version {
            // A number needs no request.
            MlflowVersion::Number(number) => number,
            _ => self.version(&registry, model).await?,
        };
        let model = MlflowModel { server: Some(authority(&registry.url)), ..model.clone() };
        let key = model.key_at(number).unwrap_or_else(|| Err(Error::invalid("the server has no name")))?;
        Ok(Some(ResolvedSource { source: MlflowSource::for_key(self, &model.name, &key), key }))
    }

    fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let Target::Mlflow(model) = &reference.target else { return None };
        Some(MlflowSource::for_key(self, &model.name, key))
    }

    /// `modelcache ls` prints these keys as `mlflow/<server>/<model>@<number>`.
    fn listed_source(&self, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let (server, model) = key.name.as_str().strip_prefix("mlflow/")?.rsplit_once('/')?;
        let number = key.version.as_str().parse().ok()?;
        let name = percent_decode_str(model).decode_utf8().ok()?.into_owned();
        let model = MlflowModel { server: self.server(), name, version: MlflowVersion::Number(number) };
        // The key must be exactly the one that this client would give to the model.
        let is_same = model.server.as_deref() == Some(server) && model.key_at(number)?.ok()? == *key;
        is_same.then(|| MlflowSource::for_key(self, &model.name, key))
    }

    /// Adds the registry server to the reference, because it is part of the key.
    fn complete(&self, target: &mut Target) {
        if let Target::Mlflow(model) = target {
            model.server = self.server();
        }
    }
}

/// The source for one version of a model.
struct MlflowSource {
    mlflow: Arc<Mlflow>,
    name: String,
    key: ArtifactKey,
    found: OnceCell<ModelFiles>,
}

/// The files of a version and their location.
struct ModelFiles {
    manifest: Manifest,
    location: FileLocation,
}

/// The location of the files of a version.
enum FileLocation {
    /// Below this path on the tracking server.
    Server(Box<MlflowServer>, String),
    /// In a bucket or a folder, read through its own source.
    Elsewhere(Arc<dyn Source>),
}

impl fmt::Debug for MlflowSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MlflowSource").field("key", &self.key).finish_non_exhaustive()
    }
}

#[async_trait]
impl Source for MlflowSource {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    /// A missing version is an error rather than `None`, because the message names the missing part.
    async fn manifest(&self) -> Result<Option<Manifest>> {
        let found = self.found().await.context(&self.key, Tier::Origin)?;
        Ok(Some(found.manifest.clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.open(path, range).await.context(&self.key, Tier::Origin)
    }

    fn ignores_ranges(&self) -> bool {
        self.found.get().is_some_and(|found| matches!(found.location, FileLocation::Server(..)))
    }

    fn store(&self) -> Option<String> {
        match &self.found.get()?.location {
            FileLocation::Elsewhere(source) => source.store(),
            FileLocation::Server(..) => None,
        }
    }
}

impl MlflowSource {
    /// Returns a source for `key`, which is a version of the model `name`.
    fn for_key(mlflow: &Arc<Mlflow>, name: &str, key: &ArtifactKey) -> Arc<dyn Source> {
        let (mlflow, name, key) = (mlflow.clone(), name.to_owned(), key.clone());
        Arc::new(Self { mlflow, name, key, found: OnceCell::new() })
    }

    /// Returns the files of the version, finding them at the first call.
    async fn found(&self) -> Result<&ModelFiles> {
        self.found.get_or_try_init(|| self.find()).await
    }

    /// Requests the artifact URI of the version and lists its files.
    async fn find(&self) -> Result<ModelFiles> {
        let uri = self.mlflow.artifact_uri(&self.name, self.key.version.as_str()).await?;
        let found = self.locate(&uri).await?;
        if found.manifest.files.is_empty() {
            return Err(self.no_files(&uri));
        }
        tracing::warn!(artifact = %self.key, "MLflow keeps no checksums; trusting the first download");
        Ok(found)
    }

    /// Returns the error for a version without files.
    fn no_files(&self, uri: &str) -> Error {
        no_files(format!("the model has no files at {uri:?}"))
            .hint("check whether the files were deleted or moved; if they were moved, register the model again")
    }

    /// Lists the files at `uri` and determines how to read them.
    async fn locate(&self, uri: &str) -> Result<ModelFiles> {
        // A bare path is a folder on the machine of the server, which may be this machine.
        if uri.starts_with('/') {
            return self.folder(uri, uri).await;
        }
        let (scheme, rest) = uri.split_once(':').unwrap_or((uri, ""));
        match scheme {
            "mlflow-artifacts" => {
                let tracking = self.mlflow.tracking()?;
                let root = artifact_root(&tracking.url, rest)?;
                let manifest = self.mlflow.list(&tracking, &self.key, &root).await?;
                Ok(ModelFiles { manifest, location: FileLocation::Server(Box::new(tracking), root) })
            }
            "s3" => self.use_source(Arc::new(self.bucket(uri, rest)?), uri).await,
            "file" => {
                let path = rest.strip_prefix("//").unwrap_or(rest);
                // `file:///path` and `file://localhost/path` are equivalent.
                let path = path.strip_prefix("localhost").unwrap_or(path);
                self.folder(uri, &percent_decode_str(path).decode_utf8_lossy()).await
            }
            scheme => Err(Error::new(
                ErrorKind::Other,
                format!("the model's files are at a URI with the scheme {scheme:?}, which is not supported"),
            )
            .hint("run `mlflow server` with --serve-artifacts, or keep models in S3")),
        }
    }

    /// Takes the list of files from the source of a bucket or folder.
    async fn use_source(&self, source: Arc<dyn Source>, uri: &str) -> Result<ModelFiles> {
        let manifest = source.manifest().await?.ok_or_else(|| self.no_files(uri))?;
        // The key of the source, for instance of a folder, is replaced by the key of the model version.
        let manifest = Manifest { key: self.key.clone(), ..manifest };
        Ok(ModelFiles { manifest, location: FileLocation::Elsewhere(source) })
    }

    /// Returns a source for the files below a prefix of a bucket. MLflow has its own variable for the S3 endpoint.
    fn bucket(&self, uri: &str, rest: &str) -> Result<PrefixSource> {
        let (bucket, prefix) =
            rest.trim_start_matches('/').split_once('/').unwrap_or((rest.trim_start_matches('/'), ""));
        if !is_bucket_name(bucket) || prefix.trim_matches('/').is_empty() {
            return Err(Error::corrupt(format!("the model's files are at {uri:?}, which is not a prefix of a bucket")));
        }
        let environment = self.mlflow.config.environment.clone();
        let endpoint = environment.get("MLFLOW_S3_ENDPOINT_URL").map(|url| ("endpoint".to_owned(), url.to_owned()));
        let options = BTreeMap::from_iter(endpoint);
        let config = RemoteConfig { url: format!("s3://{bucket}"), options, environment };
        Ok(PrefixSource::new(config, bucket, prefix, self.key.clone(), self.mlflow.retry.clone()))
    }

    /// Lists a folder of this machine.
    async fn folder(&self, uri: &str, path: &str) -> Result<ModelFiles> {
        let path = self.local_folder(path)?;
        let resolved = folder::resolve(&path).await?.ok_or_else(|| self.no_files(uri))?;
        self.use_source(resolved.source, uri).await
    }

    /// Returns the path of a folder, if it is below the folder configured for MLflow after links are resolved.
    /// Without this check, a server could make this process read and publish any file of this machine.
    fn local_folder(&self, path: &str) -> Result<String> {
        // Compare canonical paths, so that neither `..` nor a link leads outside.
        let root = self.mlflow.config.local_root.as_deref().and_then(|root| root.canonicalize().ok());
        let folder = std::path::Path::new(path).canonicalize().ok();
        let is_below = root.zip(folder).is_some_and(|(root, folder)| folder.starts_with(root));
        if !path.starts_with('/') || !is_below {
            return Err(Error::new(
                ErrorKind::Other,
                format!("the model's files are in the folder {path:?} on the machine of the MLflow server"),
            )
            .hint(format!(
                "run `mlflow server` with --serve-artifacts and log the model again, or keep models in S3; if the \
                 folder is on this machine, set {MLFLOW_LOCAL_ROOT} to that folder or to a parent of it"
            )));
        }
        Ok(path.trim_end_matches('/').to_owned())
    }

    /// Makes one attempt to read `range` of a file.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let found = self.found().await?;
        let Some(entry) = found.manifest.files.get(path) else {
            return Err(Error::not_found(format!("there is no file {path} in the model")));
        };
        if let Some(body) = Body::for_empty_range(path, &range, Some(entry.size))? {
            return Ok(body);
        }
        let (server, root) = match &found.location {
            FileLocation::Elsewhere(source) => return source.read(path, range).await,
            FileLocation::Server(server, root) => (server, root),
        };
        let url = server.url_for(&format!("api/2.0/{ARTIFACTS}/{}", http::encode_path(&format!("{root}/{path}"))));
        let request = FileRequest {
            mlflow: self.mlflow.clone(),
            server: server.clone(),
            url,
            path: path.clone(),
            size: entry.size,
        };
        // A range that starts at 0, or ends at the end of the file (a resumed stream), is requested now. For any other
        // range, the file is requested from its beginning, when the body is first polled.
        if range.start == 0 || range.end == entry.size {
            return request.open(range).await;
        }
        let stream = futures::stream::once(async move { Ok(request.open(0..range.end).await?.stream) });
        Ok(Body { start: 0, stream: stream.try_flatten().boxed() })
    }
}

/// A request for one file on the tracking server.
struct FileRequest {
    mlflow: Arc<Mlflow>,
    server: Box<MlflowServer>,
    url: Url,
    path: FilePath,
    size: u64,
}

impl FileRequest {
    /// Sends the request and returns the bytes from `range.start`, or from 0 if the server ignores ranges.
    async fn open(self, range: Range<u64>) -> Result<Body> {
        let mut headers = HeaderMap::new();
        // For a range from the beginning, no `Range` header is sent. The body is cut at the end of the range instead.
        if range.start > 0 {
            headers.insert(RANGE, http::range_header(&range)?);
        }
        let (server, http) = (&self.server, &self.mlflow.http);
        let authorization = server.authorization.as_ref();
        let fetched = http
            .follow(self.url, Request { headers, credential_url: &server.url, authorization, same_origin_only: false })
            .await?;
        let status = fetched.response.status();
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            let error = self.mlflow.error_of(fetched).await;
            return Err(error.hint(format!("{} was listed before, but may have been deleted since", self.path)));
        }
        let start = http::body_start(status, fetched.response.headers(), &range, Some(self.size))
            .map_err(|error| Error::new(error.kind(), format!("{}: {}", self.path, error.message())))?;
        let stream = http::body_stream(fetched.response, &fetched.url);
        // Cut the body only if more than the range was requested. A body longer than the file is another file, and the
        // reader must notice that.
        let stream = if range.end < self.size { http::first_bytes(stream, range.end - start) } else { stream };
        Ok(Body { start, stream })
    }
}

/// Returns the path of a model on the server, from the part of the URI after `mlflow-artifacts:`.
///
/// # Errors
/// `Other` if the URI names a server other than the configured one, `Corrupt` for an unsafe path.
fn artifact_root(tracking: &Url, rest: &str) -> Result<String> {
    let path = match rest.strip_prefix("//") {
        Some(rest) => {
            let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
            // A URI without a port names the configured server at any port.
            let named = Url::parse(&format!("{}://{host}/", tracking.scheme())).ok();
            let is_configured = named.is_some_and(|named| {
                named.host() == tracking.host() && (named.port().is_none() || named.port() == tracking.port())
            });
            if !host.is_empty() && !is_configured {
                return Err(Error::new(
                    ErrorKind::Other,
                    format!(
                        "the model's files are on another MLflow server, {:?}, which is not configured",
                        printable::quote(host)
                    ),
                )
                .hint(format!(
                    "set {MLFLOW_TRACKING_URI} to that server, and {MLFLOW_REGISTRY_URI} to the server of the registry"
                )));
            }
            path
        }
        None => rest,
    };
    let path = path.trim_matches('/');
    if path.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return Err(Error::corrupt(format!(
            "the model's files are at {path:?}, which is empty, or has an empty segment, `.` or `..`"
        )));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, RetryConfig};
    use crate::transfer::Retry;

    #[test]
    fn only_paths_on_the_configured_server_are_accepted() {
        let tracking = Url::parse("http://h:5000/base").expect("url");
        let root = |rest: &str| artifact_root(&tracking, rest);
        assert_eq!(root("/1/run/artifacts/a b").expect("plain"), "1/run/artifacts/a b");
        assert_eq!(root("//h:5000/1/x/").expect("named"), "1/x");
        assert_eq!(root("//h/1/x").expect("without port"), "1/x");
        assert_eq!(root("///1/x").expect("no host"), "1/x");
        for bad in ["//other/1/x", "//h:5001/1/x", "//h@evil/1", "/../x", "/1/../../x", "/", "", "/a//b", "/a/./b"] {
            assert!(root(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn folders_are_read_only_below_the_configured_root() {
        let root = tempfile::tempdir().expect("folder");
        let below = root.path().join("mlruns/1/a");
        std::fs::create_dir_all(&below).expect("folders");
        std::os::unix::fs::symlink("/usr", root.path().join("mlruns/out")).expect("link");
        let folder = |local_root: Option<&std::path::Path>, rest: &str| {
            let key = ArtifactKey::new("mlflow/h/m".parse().expect("name"), "1".parse().expect("version"));
            let local_root = local_root.map(std::path::Path::to_owned);
            let mut config = Config::new("");
            config.mlflow.local_root = local_root;
            let mlflow = Arc::new(Mlflow::new(&config, Retry::new(RetryConfig::default())));
            MlflowSource { mlflow, name: "m".into(), key, found: OnceCell::new() }.local_folder(rest)
        };
        let inside = below.display().to_string();
        for good in [inside.clone(), format!("{inside}/")] {
            assert_eq!(folder(Some(root.path()), &good).expect("inside"), inside);
        }
        assert!(folder(None, &inside).is_err(), "no root is configured");
        let out = root.path().join("mlruns/out/bin").display().to_string();
        for bad in ["other/mlruns", "/usr/bin", &format!("{inside}/../../../.."), &out, ""] {
            assert!(folder(Some(root.path()), bad).is_err(), "{bad}");
        }
    }
}
