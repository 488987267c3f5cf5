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

use super::follow::{self, Answer, Reach, follow};
use super::http::{self, Http, Refusal, Server};
use super::{Resolved, folder, oci};
use crate::config::{MlflowConfig, RemoteConfig, Secret};
use crate::error::{Context as _, Error, ErrorKind, Result, Tier};
use crate::key::{ArtifactKey, FilePath};
use crate::limits;
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::reference::{MlflowModel, MlflowVersion};
use crate::remote::PrefixSource;
use crate::source::{Body, Source};
use crate::transfer::Retry;
use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderValue, RANGE};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::OnceCell;
use url::Url;

/// Most folders of one model that are listed. Real ones have a handful.
const FOLDERS_MAX: usize = 10_000;
/// Most `runs:/` and `models:/` on the way from a version to its files.
const INDIRECTIONS_MAX: usize = 8;

/// The configured servers, and how to ask them.
#[derive(Debug)]
pub(super) struct Mlflow {
    config: MlflowConfig,
    http: Http,
    retry: Retry,
}

/// One of the two servers.
#[derive(Clone)]
struct Place {
    /// Without user and password, without a slash at its end.
    url: Url,
    authorization: Option<HeaderValue>,
}

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
    let name = percent_encoding::percent_decode_str(model).decode_utf8().ok()?.into_owned();
    let model = MlflowModel { server: mlflow.server(), name, version: MlflowVersion::Number(number) };
    let ours = model.server.as_deref() == Some(server) && model.key_at(number)?.ok()? == *key;
    ours.then(|| source(mlflow, &model.name, key))
}

/// How a server stands in keys: host, port where it is not that of https, path. Two servers never share one.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = match (url.scheme(), url.port()) {
        (_, Some(port)) => format!(":{port}"),
        ("http", None) => ":80".to_owned(),
        _ => String::new(),
    };
    format!("{host}{port}{}", url.path().trim_end_matches('/'))
}

impl Mlflow {
    /// Servers that were not yet spoken to.
    pub(super) fn new(config: MlflowConfig, retry: Retry) -> Self {
        Self { config, http: Http::new(retry.read_timeout()), retry }
    }

    /// The registry as it stands in keys; `None` where there is none that can be asked.
    pub(super) fn server(&self) -> Option<String> {
        Some(authority(&self.registry().ok()?.url))
    }

    fn registry(&self) -> Result<Place> {
        match &self.config.registry_uri {
            Some(uri) => self.place(uri, "MLFLOW_REGISTRY_URI"),
            None => self.tracking(),
        }
    }

    fn tracking(&self) -> Result<Place> {
        match &self.config.tracking_uri {
            Some(uri) => self.place(uri, "MLFLOW_TRACKING_URI"),
            None => Err(Error::invalid("no MLflow server is configured")
                .hint("set MLFLOW_TRACKING_URI to its address, for instance https://mlflow.example")),
        }
    }

    /// The server at an address, which is not repeated: it may carry a password, and then it is what is shown.
    fn place(&self, uri: &Secret, variable: &str) -> Result<Place> {
        let url =
            Url::parse(uri.expose()).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let mut url = url.ok_or_else(|| {
            Error::invalid(format!("{variable} is no web address"))
                .hint("it must name an `mlflow server`, for instance https://mlflow.example; folders, databases and Databricks are not read")
        })?;
        let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let of_address = url.password().map(|password| (decoded(url.username()), Secret::new(decoded(password))));
        let authorization = match (of_address.as_ref().or(self.config.login.as_ref()), &self.config.token) {
            (Some((user, password)), _) => Some(follow::basic(user, password.expose())?),
            (None, Some(token)) => Some(follow::bearer(token.expose(), "MLFLOW_TRACKING_TOKEN")?),
            (None, None) => None,
        };
        let cleared = url.set_username("").and_then(|()| url.set_password(None));
        cleared.map_err(|()| Error::invalid(format!("{variable} is no web address")))?;
        url.set_query(None);
        url.set_fragment(None);
        let path = url.path().trim_end_matches('/').to_owned();
        url.set_path(&path);
        Ok(Place { url, authorization })
    }

    /// One answer of the API.
    async fn api<T: DeserializeOwned>(&self, place: &Place, path: &str, query: &[(&str, &str)]) -> Result<T> {
        let mut url = place.below(&format!("api/2.0/{path}"));
        url.query_pairs_mut().extend_pairs(query);
        self.retry.run(|| self.ask(place, url.clone())).await
    }

    async fn ask<T: DeserializeOwned>(&self, place: &Place, url: Url) -> Result<T> {
        let (headers, authorization) = (HeaderMap::new(), place.authorization.as_ref());
        let answer = follow(&self.http, url, &headers, &place.url, authorization, Reach::Home).await?;
        if !answer.response.status().is_success() {
            return Err(self.refused(answer).await);
        }
        let body = http::body_up_to(answer.response, &answer.url, limits::ANSWER_BYTES_MAX).await?;
        serde_json::from_slice(&body).map_err(|cause| {
            Error::corrupt(format!("{} answers in another form than MLflow", Server(&place.url)))
                .cause(cause)
                .hint("check MLFLOW_TRACKING_URI: does `mlflow server` answer there?")
        })
    }

    /// What a refusal means: the one place where MLflow's statuses and codes become kinds.
    async fn refused(&self, answer: Answer) -> Error {
        #[derive(Deserialize)]
        struct Words {
            error_code: String,
            message: Option<String>,
        }
        let Answer { response, url, at_home } = answer;
        let mut refusal = Refusal::read(response, at_home).await;
        let words: Option<Words> = serde_json::from_slice(&refusal.body).ok();
        let code = words.as_ref().map(|words| words.error_code.as_str());
        if let Some(message) = words.as_ref().and_then(|words| words.message.as_deref()) {
            refusal.message = Some(self.without_secrets(http::one_line(message)));
        }
        let no_proxy = refusal.body.windows(NO_PROXY.len()).any(|window| window == NO_PROXY.as_bytes());
        let signed = self.config.token.is_some() || self.config.login.is_some();
        match (refusal.status.as_u16(), code) {
            (_, Some("RESOURCE_DOES_NOT_EXIST")) => {
                Error::not_found(refusal.message.clone().unwrap_or_else(|| "there is no such thing".into()))
            }
            (400, Some("INVALID_PARAMETER_VALUE")) => {
                Error::invalid(refusal.message.clone().unwrap_or_else(|| "the server refuses a value".into()))
            }
            (503, _) if no_proxy => {
                Error::unavailable(format!("{} does not hand on files", Server(&url))).transient(false).hint(
                    "run `mlflow server` with --serve-artifacts, or name the server that does in MLFLOW_TRACKING_URI",
                )
            }
            (401 | 403, _) if signed => refusal.error(&url).hint(
                "check MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: may they read this model?",
            ),
            (401 | 403, _) => refusal
                .error(&url)
                .hint("set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
            (404, None) => {
                refusal.error(&url).hint("check MLFLOW_TRACKING_URI: does `mlflow server` answer there?")
            }
            _ => refusal.error(&url),
        }
    }

    fn without_secrets(&self, text: String) -> String {
        let login = self.config.login.as_ref().map(|(_, password)| password);
        let secrets = self.config.token.iter().chain(login).map(Secret::expose).filter(|secret| !secret.is_empty());
        secrets.fold(text, |text, secret| text.replace(secret, "…"))
    }

    /// The number that an alias, a stage or `latest` means now.
    async fn version(&self, registry: &Place, model: &MlflowModel) -> Result<u64> {
        #[derive(Deserialize)]
        struct One {
            model_version: VersionInfo,
        }
        #[derive(Deserialize)]
        struct Several {
            #[serde(default)]
            model_versions: Vec<VersionInfo>,
        }
        let name = ("name", model.name.as_str());
        let place = || Server(&registry.url).to_string();
        let absent = |error: Error, what: String, hint: &str| match error.kind() {
            ErrorKind::NotFound | ErrorKind::Invalid => {
                Error::not_found(format!("there is no {what} at {}", place())).cause(error).hint(hint.to_owned())
            }
            _ => error,
        };
        let newest = |versions: Vec<VersionInfo>| versions.iter().filter_map(|info| info.version.parse().ok()).max();
        const LATEST: &str = "mlflow/registered-models/get-latest-versions";
        const CHECK: &str = "check the model's name and its versions in MLflow";
        match &model.version {
            MlflowVersion::Number(number) => Ok(*number),
            MlflowVersion::Alias(alias) => {
                let query = [name, ("alias", alias)];
                let answer: Result<One> = self.api(registry, "mlflow/registered-models/alias", &query).await;
                let hint = "check the model's name and its aliases in MLflow";
                let info =
                    answer.map_err(|error| absent(error, format!("alias {alias:?} of model {:?}", model.name), hint));
                let version = info?.model_version.version;
                version.parse().map_err(|_| Error::corrupt(format!("the alias {alias:?} leads to version {version:?}")))
            }
            MlflowVersion::Latest => {
                let answer: Result<Several> = self.api(registry, LATEST, &[name]).await;
                let versions = answer.map_err(|error| absent(error, format!("model {:?}", model.name), CHECK))?;
                newest(versions.model_versions)
                    .ok_or_else(|| Error::not_found(format!("the model {:?} has no versions", model.name)).hint(CHECK))
            }
            MlflowVersion::Stage(stage) => {
                let answer: Result<Several> = self.api(registry, LATEST, &[name, ("stages", stage)]).await;
                let versions = answer.map_err(|error| absent(error, format!("model {:?}", model.name), CHECK))?;
                newest(versions.model_versions).ok_or_else(|| {
                    Error::not_found(format!("no version of model {:?} is in stage {stage}", model.name))
                        .hint("check the stages of its versions in MLflow; aliases (models:/name@alias) have taken their place")
                })
            }
        }
    }

    /// Where the files of a version lie, after `runs:/` and `models:/` were followed.
    async fn files_of(&self, model: &str, version: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct One {
            model_version: VersionInfo,
        }
        #[derive(Deserialize)]
        struct Download {
            #[serde(default)]
            artifact_uri: String,
        }
        let registry = self.registry()?;
        let query = [("name", model), ("version", version)];
        let no_version = |error: Error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::Invalid => {
                let server = Server(&registry.url);
                Error::not_found(format!("there is no version {version} of model {model:?} at {server}"))
                    .cause(error)
                    .hint("check the model's name and its versions in MLflow; a deleted version does not come back")
            }
            _ => error,
        };
        let info: One = self.api(&registry, "mlflow/model-versions/get", &query).await.map_err(no_version)?;
        let status = info.model_version.status;
        if status.as_deref().is_some_and(|status| status != "READY") {
            let status = http::one_line(&status.unwrap_or_default());
            return Err(Error::not_found(format!(
                "version {version} of model {model:?} is not ready: its status is {status}"
            ))
            .hint("wait until MLflow shows it as ready; one whose registration failed has to be registered again"));
        }
        let download: Result<Download> = self.api(&registry, "mlflow/model-versions/get-download-uri", &query).await;
        let mut uri = download.map_err(no_version)?.artifact_uri;
        for _ in 0..INDIRECTIONS_MAX {
            uri = match uri.split_once(':') {
                Some(("runs", rest)) => self.files_of_run(rest).await?,
                Some(("models", rest)) => self.files_of_model(rest).await?,
                _ => return Ok(uri),
            };
        }
        Err(Error::corrupt(format!(
            "version {version} of model {model:?} leads from one place to the next without end"
        )))
    }

    /// `runs:/<run>/<path>`: below the folder of a run.
    async fn files_of_run(&self, rest: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct Answer {
            run: Run,
        }
        #[derive(Deserialize)]
        struct Run {
            info: Info,
        }
        #[derive(Deserialize)]
        struct Info {
            artifact_uri: String,
        }
        let (run, path) = rest.trim_start_matches('/').split_once('/').unwrap_or((rest.trim_start_matches('/'), ""));
        let answer: Answer =
            self.api(&self.tracking()?, "mlflow/runs/get", &[("run_id", run)]).await.map_err(|error| {
                error.hint(
                    "the run that the model was logged in is gone; restore it in MLflow, or register the model again",
                )
            })?;
        Ok(format!("{}/{path}", answer.run.info.artifact_uri.trim_end_matches('/')).trim_end_matches('/').to_owned())
    }

    /// `models:/<name>/<version>` and `models:/<id of a logged model>`.
    async fn files_of_model(&self, rest: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct Logged {
            model: Model,
        }
        #[derive(Deserialize)]
        struct Model {
            info: Info,
        }
        #[derive(Deserialize)]
        struct Info {
            artifact_uri: String,
        }
        #[derive(Deserialize)]
        struct Download {
            artifact_uri: String,
        }
        match rest.trim_start_matches('/').split_once('/') {
            Some((name, version)) => {
                let query = [("name", name), ("version", version)];
                let answer: Download =
                    self.api(&self.registry()?, "mlflow/model-versions/get-download-uri", &query).await?;
                Ok(answer.artifact_uri)
            }
            None => {
                let id = http::one_segment(rest.trim_start_matches('/'));
                let answer: Logged = self.api(&self.tracking()?, &format!("mlflow/logged-models/{id}"), &[]).await?;
                Ok(answer.model.info.artifact_uri)
            }
        }
    }

    /// The files below `root`, as the server lists them, folder by folder.
    async fn list(&self, tracking: &Place, key: &ArtifactKey, root: &str) -> Result<Manifest> {
        #[derive(Deserialize)]
        struct Listing {
            #[serde(default)]
            files: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            path: String,
            #[serde(default)]
            is_dir: bool,
            /// Left out where it is 0.
            #[serde(default)]
            file_size: u64,
        }
        let mut manifest = Manifest::new(key.clone(), Shape::Tree);
        let (mut folders, mut seen) = (vec![None::<FilePath>], 0);
        while let Some(folder) = folders.pop() {
            let inside =
                |path: &str| folder.as_ref().map_or_else(|| path.to_owned(), |folder| format!("{folder}/{path}"));
            let asked = inside("");
            let asked = format!("{root}/{}", asked.trim_end_matches('/'));
            let query = [("path", asked.trim_end_matches('/'))];
            let listing: Listing = self.api(tracking, ARTIFACTS, &query).await?;
            for entry in listing.files {
                let refuse = |why: &str| {
                    Error::corrupt(format!("MLflow lists {:?}: {why}", entry.path))
                        .hint("nothing of this model was fetched; such a name is refused as a whole")
                };
                let path = FilePath::new(&inside(&entry.path)).map_err(|error| refuse(error.message()))?;
                if entry.is_dir {
                    seen += 1;
                    folders.push(Some(path));
                } else if manifest
                    .files
                    .insert(path, FileEntry { size: entry.file_size, ..Default::default() })
                    .is_some()
                {
                    return Err(refuse("listed twice"));
                }
            }
            if seen > FOLDERS_MAX || manifest.files.len() > limits::FILES_MAX {
                return Err(Error::corrupt("the list of files does not end"));
            }
        }
        manifest.check()?;
        Ok(manifest)
    }
}

/// Where the server hands on files.
const ARTIFACTS: &str = "mlflow-artifacts/artifacts";
/// What a server says that does not.
const NO_PROXY: &str = "--serve-artifacts";

impl Place {
    /// An address below the server; `path` is encoded already.
    fn below(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}/{path}", url.path().trim_end_matches('/')));
        url
    }
}

/// What the registry says of a version.
#[derive(Deserialize)]
struct VersionInfo {
    version: String,
    status: Option<String>,
}

/// One version of a model.
struct MlflowSource {
    mlflow: Arc<Mlflow>,
    name: String,
    key: ArtifactKey,
    found: OnceCell<Found>,
}

/// Where its files are, and which.
struct Found {
    manifest: Manifest,
    bytes: Whence,
}

enum Whence {
    /// Below this path at the tracking server.
    Server(Box<Place>, String),
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
}

impl MlflowSource {
    async fn found(&self) -> Result<&Found> {
        self.found.get_or_try_init(|| self.find()).await
    }

    async fn find(&self) -> Result<Found> {
        let uri = self.mlflow.files_of(&self.name, self.key.version.as_str()).await?;
        let found = self.look(&uri).await?;
        if found.manifest.files.is_empty() {
            return Err(self.no_files(&uri));
        }
        tracing::warn!(artifact = %self.key, "MLflow keeps no checksums; digests are those of the bytes as they come now");
        Ok(found)
    }

    fn no_files(&self, uri: &str) -> Error {
        Error::not_found(format!("the model has no files at {uri:?}"))
            .hint("were they deleted, or logged to another place? register the model again where its files are")
    }

    /// Which files there are at `uri`, and how they are read.
    async fn look(&self, uri: &str) -> Result<Found> {
        let (scheme, rest) = uri.split_once(':').unwrap_or(("file", uri));
        match scheme {
            "mlflow-artifacts" => {
                let tracking = self.mlflow.tracking()?;
                let root = root_at(&tracking.url, rest)?;
                let manifest = self.mlflow.list(&tracking, &self.key, &root).await?;
                Ok(Found { manifest, bytes: Whence::Server(Box::new(tracking), root) })
            }
            "s3" => self.elsewhere(Arc::new(self.bucket(uri, rest)?), uri).await,
            "file" => {
                let path = self.local_folder(rest)?;
                let resolved = folder::resolve(&path).await?.ok_or_else(|| self.no_files(uri))?;
                self.elsewhere(resolved.source, uri).await
            }
            scheme => Err(Error::new(
                ErrorKind::Other,
                format!("the model's files are in a place of kind {scheme:?}, which is not read"),
            )
            .hint("run `mlflow server` with --serve-artifacts, or keep models in S3")),
        }
    }

    async fn elsewhere(&self, source: Arc<dyn Source>, uri: &str) -> Result<Found> {
        let manifest = source.manifest().await?.ok_or_else(|| self.no_files(uri))?;
        // What a folder's source knows of digests is about that folder, not a word of MLflow's.
        let manifest = Manifest { key: self.key.clone(), ..manifest };
        Ok(Found { manifest, bytes: Whence::Elsewhere(source) })
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

    /// A folder of the server's machine, which is ours only where the server is. A server elsewhere must not have us
    /// read files of this machine and publish them.
    fn local_folder(&self, rest: &str) -> Result<String> {
        let path = rest.strip_prefix("//").unwrap_or(rest);
        let path = path.strip_prefix("localhost").unwrap_or(path);
        let climbs = path.split('/').any(|segment| segment == "..");
        if !oci::is_this_machine(&self.mlflow.tracking()?.url) || !path.starts_with('/') || climbs {
            return Err(Error::new(
                ErrorKind::Other,
                format!("the model's files are in the folder {path:?} of the server's machine"),
            )
            .hint("run `mlflow server` with --serve-artifacts and log the model again, or keep models in S3"));
        }
        Ok(path.trim_end_matches('/').to_owned())
    }

    /// One attempt at the bytes.
    async fn open(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let found = self.found().await?;
        let Some(entry) = found.manifest.files.get(path) else {
            return Err(Error::not_found(format!("there is no file {path} in the model")));
        };
        if range.end < range.start || range.end > entry.size {
            return Err(Error::invalid(format!("{path} has no bytes {}..{}", range.start, range.end)));
        }
        if range.is_empty() {
            return Ok(Body { start: range.start, stream: futures::stream::empty().boxed() });
        }
        let (place, root) = match &found.bytes {
            Whence::Elsewhere(source) => return source.read(path, range).await,
            Whence::Server(place, root) => (place, root),
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
    place: Box<Place>,
    url: Url,
    path: FilePath,
    size: u64,
}

impl Asked {
    async fn open(self, range: Range<u64>) -> Result<Body> {
        let mut headers = HeaderMap::new();
        if range.start > 0 {
            let value = HeaderValue::from_str(&format!("bytes={}-{}", range.start, range.end - 1));
            headers.insert(RANGE, value.map_err(|cause| Error::invalid("no range can be asked for").cause(cause))?);
        }
        let (place, http) = (&self.place, &self.mlflow.http);
        let answer =
            follow(http, self.url, &headers, &place.url, place.authorization.as_ref(), Reach::Anywhere).await?;
        let status = answer.response.status();
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            let error = self.mlflow.refused(answer).await;
            return Err(error.hint(format!("{} is listed; was it deleted meanwhile?", self.path)));
        }
        let start = http::body_start(status, answer.response.headers(), &range, Some(self.size))
            .map_err(|error| Error::new(error.kind(), format!("{}: {}", self.path, error.message())))?;
        Ok(Body { start, stream: up_to(http::body_stream(answer.response, &answer.url), range.end - start) })
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
                    format!("the model's files are with another MLflow server, {:?}; not asked", http::one_line(host)),
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
    use crate::config::RetryConfig;

    fn mlflow(tracking: Option<&str>, change: impl FnOnce(&mut MlflowConfig)) -> Mlflow {
        let mut config = MlflowConfig { tracking_uri: tracking.map(Secret::new), ..MlflowConfig::default() };
        change(&mut config);
        Mlflow::new(config, Retry::new(RetryConfig::default()))
    }

    #[test]
    fn servers_that_differ_anywhere_differ_in_keys() {
        let server = |uri: &str| mlflow(Some(uri), |_| ()).server();
        assert_eq!(server("https://h").as_deref(), Some("h"));
        assert_eq!(server("https://h:443/").as_deref(), Some("h"));
        assert_eq!(server("http://h").as_deref(), Some("h:80"));
        assert_eq!(server("http://h:5000//").as_deref(), Some("h:5000"));
        assert_eq!(server("https://u:canary@h/team/mlflow/?x#y").as_deref(), Some("h/team/mlflow"));
        for none in ["databricks", "sqlite:///m.db", "./mlruns", "file:///mlruns", "https://"] {
            assert_eq!(server(none), None, "{none}");
        }
        let registry = mlflow(Some("https://t"), |config| config.registry_uri = Some(Secret::new("https://r")));
        assert_eq!(registry.server().as_deref(), Some("r"));
    }

    #[test]
    fn what_is_shown_to_the_servers_is_what_mlflows_client_shows() {
        let shown = |uri: &str, change: fn(&mut MlflowConfig)| {
            let place = mlflow(Some(uri), change).tracking().expect("a place");
            assert!(!place.url.to_string().contains("canary"), "{}", place.url);
            place.authorization.map(|value| value.to_str().expect("text").to_owned())
        };
        let token = |config: &mut MlflowConfig| config.token = Some(Secret::new("canary"));
        let both = |config: &mut MlflowConfig| {
            config.token = Some(Secret::new("canary"));
            config.login = Some(("me".into(), Secret::new("a:b")));
        };
        assert_eq!(shown("https://h", |_| ()), None);
        assert_eq!(shown("https://h", token).as_deref(), Some("Bearer canary"));
        assert_eq!(shown("https://h", both).as_deref(), Some("Basic bWU6YTpi"));
        assert_eq!(shown("https://me:can%61ry@h", both).as_deref(), Some("Basic bWU6Y2FuYXJ5"));
    }

    #[test]
    fn an_address_that_cannot_be_used_names_its_variable_and_nothing_of_itself() {
        let error = mlflow(None, |_| ()).registry().map(|_| ()).expect_err("none");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("MLFLOW_TRACKING_URI")), "{error}");
        let error = mlflow(Some("postgres://u:canary@h"), |_| ()).registry().map(|_| ()).expect_err("no web address");
        assert!(error.to_string().contains("MLFLOW_TRACKING_URI"), "{error}");
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
        let bad = mlflow(Some("https://h"), |config| config.token = Some(Secret::new("canary\nx")));
        let error = bad.registry().map(|_| ()).expect_err("a line end");
        assert!(!format!("{error:?}{bad:?}").contains("canary"), "{error:?}");
    }

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
    fn folders_are_read_only_where_the_server_is_on_this_machine() {
        let folder = |tracking: &str, rest: &str| {
            let key = ArtifactKey::new("mlflow/h/m".parse().expect("name"), "1".parse().expect("version"));
            let mlflow = Arc::new(mlflow(Some(tracking), |_| ()));
            MlflowSource { mlflow, name: "m".into(), key, found: OnceCell::new() }.local_folder(rest)
        };
        for good in ["/mlruns/1/a", "///mlruns/1/a", "//localhost/mlruns/1/a/"] {
            assert_eq!(folder("http://127.0.0.1:5000", good).expect(good), "/mlruns/1/a");
        }
        assert!(folder("https://mlflow.example", "/mlruns/1/a").is_err());
        assert!(folder("https://localhost.example", "/mlruns/1/a").is_err());
        for bad in ["//other/mlruns", "mlruns/1", "/mlruns/../../etc", ""] {
            assert!(folder("http://localhost", bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_stream_is_cut_at_the_byte() {
        let chunks = ["abc", "def", "ghi"].map(|chunk| Ok(bytes::Bytes::from_static(chunk.as_bytes())));
        for (bytes, want) in [(0, ""), (2, "ab"), (3, "abc"), (7, "abcdefg"), (99, "abcdefghi")] {
            let stream = futures::stream::iter(chunks.clone()).boxed();
            let got: Vec<_> = up_to(stream, bytes).map(|chunk| chunk.expect("bytes")).collect().await;
            assert_eq!(got.concat(), want.as_bytes());
        }
    }
}
