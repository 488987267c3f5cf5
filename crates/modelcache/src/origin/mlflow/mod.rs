//! The MLflow model registry, through the REST API that `mlflow server` speaks.
//!
//! Aliases, stages and `latest` resolve to a version's number. A version's files lie where the server says: with the
//! server itself (`mlflow-artifacts:`), in a bucket, or in a folder of this machine. Credentials go to the two configured
//! servers only, tracking and registry.
//!
//! MLflow keeps no checksums: digests are those of the bytes that were first seen, and a warning says so.
//!
//! Surprise: what the server hands on is read in one stream, never by ranges, because a server that keeps its files in a
//! bucket fetches the whole file anew for each range. A range in the middle of a file is answered with the whole.

mod api;

pub(super) use api::Mlflow;

use super::http::{self, Request};
use super::{Resolved, folder, no_files};
use crate::config::RemoteConfig;
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::Manifest;
use crate::printable;
use crate::reference::{MlflowModel, MlflowVersion};
use crate::remote::PrefixSource;
use crate::source::{Body, Source};
use api::{ARTIFACTS, MlflowServer, authority};
use async_trait::async_trait;
use futures::stream::BoxStream;
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

/// The version that the reference means now, and a source bound to it.
pub(super) async fn resolve(mlflow: &Arc<Mlflow>, model: &MlflowModel) -> Result<Resolved> {
    let registry = mlflow.registry()?;
    let number = match model.version {
        MlflowVersion::Number(number) => number,
        _ => mlflow.version(&registry, model).await?,
    };
    let model = MlflowModel { server: Some(authority(&registry.url)), ..model.clone() };
    let key = model.key_at(number).unwrap_or_else(|| Err(Error::invalid("the server has no name")))?;
    Ok(Resolved { source: source(mlflow, &model.name, &key), key })
}

/// A source for `key`, which is a version of the model `name`.
pub(super) fn source(mlflow: &Arc<Mlflow>, name: &str, key: &ArtifactKey) -> Arc<dyn Source> {
    let (mlflow, name, key) = (mlflow.clone(), name.to_owned(), key.clone());
    Arc::new(MlflowSource { mlflow, name, key, found: OnceCell::new() })
}

/// A source for a key as it is listed (`mlflow/<server>/<model>@<number>`), if it is one of our registry's.
pub(super) fn listed_source(mlflow: &Arc<Mlflow>, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
    let (server, model) = key.name.as_str().strip_prefix("mlflow/")?.rsplit_once('/')?;
    let number = key.version.as_str().parse().ok()?;
    let name = percent_decode_str(model).decode_utf8().ok()?.into_owned();
    let model = MlflowModel { server: mlflow.server(), name, version: MlflowVersion::Number(number) };
    let ours = model.server.as_deref() == Some(server) && model.key_at(number)?.ok()? == *key;
    ours.then(|| source(mlflow, &model.name, key))
}

/// One version of a model.
struct MlflowSource {
    mlflow: Arc<Mlflow>,
    name: String,
    key: ArtifactKey,
    found: OnceCell<ModelFiles>,
}

/// Where its files are, and which.
struct ModelFiles {
    manifest: Manifest,
    bytes: FileLocation,
}

enum FileLocation {
    /// Below this path at the tracking server.
    Server(Box<MlflowServer>, String),
    /// Somewhere else.
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

    /// What is missing is an error: there is to say whether it is the version or its files.
    async fn manifest(&self) -> Result<Option<Manifest>> {
        let found = self.found().await.context(&self.key, Tier::Origin)?;
        Ok(Some(found.manifest.clone()))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        self.open(path, range).await.context(&self.key, Tier::Origin)
    }

    fn ignores_ranges(&self) -> bool {
        self.found.get().is_some_and(|found| matches!(found.bytes, FileLocation::Server(..)))
    }
}

impl MlflowSource {
    async fn found(&self) -> Result<&ModelFiles> {
        self.found.get_or_try_init(|| self.find()).await
    }

    async fn find(&self) -> Result<ModelFiles> {
        let uri = self.mlflow.files_of(&self.name, self.key.version.as_str()).await?;
        let found = self.look(&uri).await?;
        if found.manifest.files.is_empty() {
            return Err(self.no_files(&uri));
        }
        tracing::warn!(artifact = %self.key, "MLflow keeps no checksums; digests are those of the bytes as they come now");
        Ok(found)
    }

    fn no_files(&self, uri: &str) -> Error {
        no_files(format!("the model has no files at {uri:?}"))
            .hint("were they deleted, or logged to another place? register the model again where its files are")
    }

    /// Which files there are at `uri`, and how they are read.
    async fn look(&self, uri: &str) -> Result<ModelFiles> {
        if uri.starts_with('/') {
            return self.folder(uri, uri).await;
        }
        let (scheme, rest) = uri.split_once(':').unwrap_or((uri, ""));
        match scheme {
            "mlflow-artifacts" => {
                let tracking = self.mlflow.tracking()?;
                let root = root_at(&tracking.url, rest)?;
                let manifest = self.mlflow.list(&tracking, &self.key, &root).await?;
                Ok(ModelFiles { manifest, bytes: FileLocation::Server(Box::new(tracking), root) })
            }
            "s3" => self.elsewhere(Arc::new(self.bucket(uri, rest)?), uri).await,
            "file" => {
                let path = rest.strip_prefix("//").unwrap_or(rest);
                let path = path.strip_prefix("localhost").unwrap_or(path);
                self.folder(uri, &percent_decode_str(path).decode_utf8_lossy()).await
            }
            scheme => Err(Error::new(
                ErrorKind::Other,
                format!("the model's files are in a place of kind {scheme:?}, which is not read"),
            )
            .hint("run `mlflow server` with --serve-artifacts, or keep models in S3")),
        }
    }

    async fn elsewhere(&self, source: Arc<dyn Source>, uri: &str) -> Result<ModelFiles> {
        let manifest = source.manifest().await?.ok_or_else(|| self.no_files(uri))?;
        // What a folder's source knows of digests is about that folder, not a word of MLflow's.
        let manifest = Manifest { key: self.key.clone(), ..manifest };
        Ok(ModelFiles { manifest, bytes: FileLocation::Elsewhere(source) })
    }

    fn bucket(&self, uri: &str, rest: &str) -> Result<PrefixSource> {
        let (bucket, prefix) =
            rest.trim_start_matches('/').split_once('/').unwrap_or((rest.trim_start_matches('/'), ""));
        if bucket.is_empty() || prefix.trim_matches('/').is_empty() {
            return Err(Error::corrupt(format!("the model's files are at {uri:?}, which names no prefix of a bucket")));
        }
        let environment = self.mlflow.config.environment.clone();
        let endpoint = environment.get("MLFLOW_S3_ENDPOINT_URL").map(|url| ("endpoint".to_owned(), url.to_owned()));
        let options = BTreeMap::from_iter(endpoint);
        let config = RemoteConfig { url: format!("s3://{bucket}"), options, environment };
        Ok(PrefixSource::new(config, bucket, prefix, self.key.clone(), self.mlflow.retry.clone()))
    }

    async fn folder(&self, uri: &str, path: &str) -> Result<ModelFiles> {
        let path = self.local_folder(path)?;
        let resolved = folder::resolve(&path).await?.ok_or_else(|| self.no_files(uri))?;
        self.elsewhere(resolved.source, uri).await
    }

    /// A folder of the server's machine. A server must not have us read any file of this machine and publish it: only
    /// what lies below the folder that is configured for it, wherever links lead.
    fn local_folder(&self, path: &str) -> Result<String> {
        let root = self.mlflow.config.local_root.as_deref().and_then(|root| root.canonicalize().ok());
        let place = std::path::Path::new(path).canonicalize().ok();
        let is_below = root.zip(place).is_some_and(|(root, place)| place.starts_with(root));
        if !path.starts_with('/') || !is_below {
            return Err(Error::new(
                ErrorKind::Other,
                format!("the model's files are in the folder {path:?} of the server's machine"),
            )
            .hint(
                "run `mlflow server` with --serve-artifacts and log the model again, or keep models in S3; where the folder \
                 is on this machine, name it or one above it in MODEL_CACHE_MLFLOW_LOCAL_ROOT",
            ));
        }
        Ok(path.trim_end_matches('/').to_owned())
    }

    /// One attempt at the bytes.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let found = self.found().await?;
        let Some(entry) = found.manifest.files.get(path) else {
            return Err(Error::not_found(format!("there is no file {path} in the model")));
        };
        if let Some(body) = Body::unasked(path, &range, Some(entry.size))? {
            return Ok(body);
        }
        let (place, root) = match &found.bytes {
            FileLocation::Elsewhere(source) => return source.read(path, range).await,
            FileLocation::Server(place, root) => (place, root),
        };
        let url = place.below(&format!("api/2.0/{ARTIFACTS}/{}", http::segments(&format!("{root}/{path}"))));
        let asked =
            Asked { mlflow: self.mlflow.clone(), place: place.clone(), url, path: path.clone(), size: entry.size };
        // From the beginning, or on to the end as after a connection that broke; else the whole, which costs nothing
        // until somebody reads it.
        if range.start == 0 || range.end == entry.size {
            return asked.open(range).await;
        }
        let stream = futures::stream::once(async move { Ok(asked.open(0..range.end).await?.stream) });
        Ok(Body { start: 0, stream: stream.try_flatten().boxed() })
    }
}

/// A file at the server that is about to be asked for.
struct Asked {
    mlflow: Arc<Mlflow>,
    place: Box<MlflowServer>,
    url: Url,
    path: FilePath,
    size: u64,
}

impl Asked {
    async fn open(self, range: Range<u64>) -> Result<Body> {
        let mut headers = HeaderMap::new();
        if range.start > 0 {
            headers.insert(RANGE, http::range_header(&range)?);
        }
        let (place, http) = (&self.place, &self.mlflow.http);
        let authorization = place.authorization.as_ref();
        let answer = http.follow(self.url, Request { headers, home: &place.url, authorization, stay: false }).await?;
        let status = answer.response.status();
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            let error = self.mlflow.refused(answer).await;
            return Err(error.hint(format!("{} is listed; was it deleted meanwhile?", self.path)));
        }
        let start = http::body_start(status, answer.response.headers(), &range, Some(self.size))
            .map_err(|error| Error::new(error.kind(), format!("{}: {}", self.path, error.message())))?;
        let stream = http::body_stream(answer.response, &answer.url);
        // Cut only where the server was asked for more than is wanted. A body that goes on after the end of the file is not
        // that file, and whoever reads must see it.
        let stream = if range.end < self.size { up_to(stream, range.end - start) } else { stream };
        Ok(Body { start, stream })
    }
}

/// The first `bytes` of a stream.
fn up_to(stream: BoxStream<'static, Result<bytes::Bytes>>, bytes: u64) -> BoxStream<'static, Result<bytes::Bytes>> {
    let cut = stream.scan(bytes, |left, chunk| {
        let cut = match chunk {
            _ if *left == 0 => None,
            Err(error) => Some(Err(error)),
            Ok(mut chunk) => {
                chunk.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= chunk.len() as u64;
                Some(Ok(chunk))
            }
        };
        futures::future::ready(cut)
    });
    cut.boxed()
}

/// The path below which the server keeps a model, from what follows `mlflow-artifacts:`. Only ours may be meant.
fn root_at(tracking: &Url, rest: &str) -> Result<String> {
    let path = match rest.strip_prefix("//") {
        Some(rest) => {
            let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
            let named = Url::parse(&format!("{}://{host}/", tracking.scheme())).ok();
            let ours = named.is_some_and(|named| {
                named.host() == tracking.host() && (named.port().is_none() || named.port() == tracking.port())
            });
            if !host.is_empty() && !ours {
                return Err(Error::new(
                    ErrorKind::Other,
                    format!(
                        "the model's files are with another MLflow server, {:?}; not asked",
                        printable::quote(host)
                    ),
                )
                .hint("name that server in MLFLOW_TRACKING_URI, and the one of the registry in MLFLOW_REGISTRY_URI"));
            }
            path
        }
        None => rest,
    };
    let path = path.trim_matches('/');
    if path.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return Err(Error::corrupt(format!("the model's files are at {path:?}, which climbs or names nothing")));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MlflowConfig, RetryConfig};
    use crate::transfer::Retry;

    #[test]
    fn files_are_only_asked_of_our_own_server_and_never_above() {
        let tracking = Url::parse("http://h:5000/base").expect("url");
        let root = |rest: &str| root_at(&tracking, rest);
        assert_eq!(root("/1/run/artifacts/a b").expect("plain"), "1/run/artifacts/a b");
        assert_eq!(root("//h:5000/1/x/").expect("named"), "1/x");
        assert_eq!(root("//h/1/x").expect("without port"), "1/x");
        assert_eq!(root("///1/x").expect("no host"), "1/x");
        for bad in ["//other/1/x", "//h:5001/1/x", "//h@evil/1", "/../x", "/1/../../x", "/", "", "/a//b", "/a/./b"] {
            assert!(root(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn folders_are_read_only_below_the_one_that_is_named() {
        let root = tempfile::tempdir().expect("folder");
        let below = root.path().join("mlruns/1/a");
        std::fs::create_dir_all(&below).expect("folders");
        std::os::unix::fs::symlink("/usr", root.path().join("mlruns/out")).expect("link");
        let folder = |local_root: Option<&std::path::Path>, rest: &str| {
            let key = ArtifactKey::new("mlflow/h/m".parse().expect("name"), "1".parse().expect("version"));
            let local_root = local_root.map(std::path::Path::to_owned);
            let config = MlflowConfig { local_root, ..MlflowConfig::default() };
            let mlflow = Arc::new(Mlflow::new(config, Retry::new(RetryConfig::default())));
            MlflowSource { mlflow, name: "m".into(), key, found: OnceCell::new() }.local_folder(rest)
        };
        let inside = below.display().to_string();
        for good in [inside.clone(), format!("{inside}/")] {
            assert_eq!(folder(Some(root.path()), &good).expect("inside"), inside);
        }
        assert!(folder(None, &inside).is_err(), "nothing is named");
        let out = root.path().join("mlruns/out/bin").display().to_string();
        for bad in ["other/mlruns", "/usr/bin", &format!("{inside}/../../../.."), &out, ""] {
            assert!(folder(Some(root.path()), bad).is_err(), "{bad}");
        }
    }
}
