//! Client for the REST API of MLflow: URLs, credentials, API calls, and errors for responses.

use crate::config::{Config, MlflowConfig, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, FilePath};
use crate::limits;
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::option_name::OptionName;
use crate::option_name::setting::{MLFLOW_REGISTRY_URI, MLFLOW_TRACKING_URI};
use crate::origin::authorization;
use crate::origin::http::{self, FinalResponse, Http, HttpErrorResponse, Request, Server};
use crate::printable;
use crate::reference::{MlflowModel, MlflowVersion};
use crate::transfer::Retry;
use reqwest::header::{HeaderMap, HeaderValue};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use url::Url;

/// Maximum number of folders of one model. Real models have a few.
const FOLDERS_MAX: usize = 10_000;
/// Maximum depth of folders in a model, so that the listing of a folder that contains itself ends.
const FOLDER_DEPTH_MAX: usize = 32;
/// Maximum number of `runs:/` and `models:/` URIs to follow from a version to its files.
const INDIRECTIONS_MAX: usize = 8;
/// The call that returns the artifact URI of a version.
const DOWNLOAD_URI: &str = "mlflow/model-versions/get-download-uri";
/// The call that lists and serves artifact files.
pub(super) const ARTIFACTS: &str = "mlflow-artifacts/artifacts";
/// Text in the error response of a server that was started without `--serve-artifacts`.
const PROXY_DISABLED_MARKER: &str = "--serve-artifacts";

/// A client for the configured tracking and registry servers.
#[derive(Debug)]
pub(crate) struct Mlflow {
    pub(super) config: MlflowConfig,
    pub(super) http: Http,
    pub(super) retry: Retry,
}

/// One of the two servers, with its credential.
#[derive(Clone)]
pub(super) struct MlflowServer {
    /// The URL without user, password, query and trailing slash.
    pub(super) url: Url,
    pub(super) authorization: Option<HeaderValue>,
}

/// Returns the name of a server in keys: host, path, and the port unless it is that of https. Different servers have
/// different names.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = match (url.scheme(), url.port()) {
        (_, Some(port)) => format!(":{port}"),
        ("http", None) => ":80".to_owned(),
        _ => String::new(),
    };
    format!("{host}{port}{}", url.path().trim_end_matches('/'))
}

impl Mlflow {
    /// Creates a client. Sends no request.
    pub(crate) fn new(config: &Config, retry: Retry) -> Self {
        Self { config: config.mlflow.clone(), http: Http::new(config, &retry), retry }
    }

    /// Returns the name of the registry in keys; `None` if no usable one is configured.
    pub(super) fn server(&self) -> Option<String> {
        Some(authority(&self.registry().ok()?.url))
    }

    /// Returns the registry server, by default the tracking server.
    pub(super) fn registry(&self) -> Result<MlflowServer> {
        match &self.config.registry_uri {
            Some(uri) => self.parse_server(uri, MLFLOW_REGISTRY_URI),
            None => self.tracking(),
        }
    }

    /// Returns the tracking server.
    pub(super) fn tracking(&self) -> Result<MlflowServer> {
        match &self.config.tracking_uri {
            Some(uri) => self.parse_server(uri, MLFLOW_TRACKING_URI),
            None => Err(Error::invalid("no MLflow server is configured")
                .hint(format!("set {MLFLOW_TRACKING_URI} to its address, for instance https://mlflow.example"))),
        }
    }

    /// Parses the URL of a server. A login in the URL takes precedence over configured credentials. Error messages name
    /// `setting`, not the URL, because the URL may contain a password.
    fn parse_server(&self, uri: &Secret, setting: OptionName) -> Result<MlflowServer> {
        let url =
            Url::parse(uri.expose()).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let mut url = url.ok_or_else(|| {
            Error::invalid(format!("{setting} is not an http or https URL")).hint(
                "set it to the address of an `mlflow server`, for instance https://mlflow.example; folders, databases \
                 and Databricks are not supported",
            )
        })?;
        let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let login_of_url = url.password().map(|password| (decode(url.username()), Secret::new(decode(password))));
        // As in the client of MLflow, a login takes precedence over a token.
        let authorization = match (login_of_url.as_ref().or(self.config.login.as_ref()), &self.config.token) {
            (Some((user, password)), _) => {
                Some(authorization::basic(user, password.expose(), "the password for MLflow")?)
            }
            (None, Some(token)) => Some(authorization::bearer(token.expose(), "MLFLOW_TRACKING_TOKEN")?),
            (None, None) => None,
        };
        // Remove the login from the URL, which appears in logs, and normalize the URL, which becomes part of keys.
        let cleared = url.set_username("").and_then(|()| url.set_password(None));
        cleared.map_err(|()| Error::invalid(format!("{setting} is not an http or https URL")))?;
        url.set_query(None);
        url.set_fragment(None);
        let path = url.path().trim_end_matches('/').to_owned();
        url.set_path(&path);
        Ok(MlflowServer { url, authorization })
    }

    /// Calls the API, with retries, and parses the response.
    async fn api<T: DeserializeOwned>(&self, server: &MlflowServer, path: &str, query: &[(&str, &str)]) -> Result<T> {
        let mut url = server.url_for(&format!("api/2.0/{path}"));
        url.query_pairs_mut().extend_pairs(query);
        self.retry.run(|| self.request(server, url.clone())).await
    }

    /// Sends one API request and parses the response.
    async fn request<T: DeserializeOwned>(&self, server: &MlflowServer, url: Url) -> Result<T> {
        let authorization = server.authorization.as_ref();
        let request =
            Request { headers: HeaderMap::new(), credential_url: &server.url, authorization, same_origin_only: true };
        let fetched = self.http.follow(url, request).await?;
        if !fetched.response.status().is_success() {
            return Err(self.error_of(fetched).await);
        }
        let body = self.http.body(fetched.response, &fetched.url, limits::RESPONSE_BYTES_MAX).await?;
        serde_json::from_slice(&body).map_err(|cause| {
            Error::corrupt(format!("the response of {} is not in the format of MLflow", Server(&server.url)))
                .cause(cause)
                .hint(format!("check that {MLFLOW_TRACKING_URI} is the address of an `mlflow server`"))
        })
    }

    /// Converts an error response into an error with a remedy. All statuses and error codes of MLflow are mapped here.
    pub(super) async fn error_of(&self, fetched: FinalResponse) -> Error {
        #[derive(Deserialize)]
        struct ErrorBody {
            error_code: String,
            message: Option<String>,
        }
        let FinalResponse { response, url, is_same_origin, .. } = fetched;
        // The texts of a redirect target are not quoted.
        let mut response = HttpErrorResponse::read(&self.http, response, is_same_origin).await;
        let error_body: Option<ErrorBody> = serde_json::from_slice(&response.body).ok();
        let code = error_body.as_ref().map(|error_body| error_body.error_code.as_str());
        // Artifacts may be redirected to a signed URL of a bucket.
        if !is_same_origin {
            return response
                .error(&url)
                .hint("the URL that MLflow redirected to may have expired; check the clock of this machine");
        }
        if let Some(message) = error_body.as_ref().and_then(|error_body| error_body.message.as_deref()) {
            response.message = Some(printable::quote(message));
        }
        let is_proxy_disabled =
            response.body.windows(PROXY_DISABLED_MARKER.len()).any(|window| window == PROXY_DISABLED_MARKER.as_bytes());
        let has_credentials = self.config.token.is_some() || self.config.login.is_some();
        match (response.status.as_u16(), code) {
            (_, Some("RESOURCE_DOES_NOT_EXIST")) => {
                Error::not_found(response.message.clone().unwrap_or_else(|| "MLflow has no such object".into()))
            }
            (400, Some("INVALID_PARAMETER_VALUE")) => {
                Error::invalid(response.message.clone().unwrap_or_else(|| "the server rejects a parameter".into()))
            }
            // The server was started without `--serve-artifacts`; retrying does not help.
            (503, _) if is_proxy_disabled => {
                Error::unavailable(format!("{} does not serve artifacts", Server(&url))).transient(false).hint(format!(
                    "run `mlflow server` with --serve-artifacts, or set {MLFLOW_TRACKING_URI} to a server that serves \
                     artifacts"
                ))
            }
            (401 | 403, _) if has_credentials => response.error(&url).hint(
                "check that MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, are valid \
                 and may read this model",
            ),
            (401 | 403, _) => response
                .error(&url)
                .hint("set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
            // A 404 without an error code is not from MLflow.
            (404, None) => Error::unavailable(format!("{} answered 404 in another format than MLflow", Server(&url)))
                .transient(false)
                .hint(format!("check that {MLFLOW_TRACKING_URI} is the address of an `mlflow server`")),
            _ => response.error(&url),
        }
    }

    /// Returns the version number that an alias, a stage or `latest` points to now.
    pub(super) async fn version(&self, registry: &MlflowServer, model: &MlflowModel) -> Result<u64> {
        let (name, by_name) = (&model.name, [("name", model.name.as_str())]);
        const HINT: &str = "check the model's name and its versions in MLflow";
        match &model.version {
            MlflowVersion::Number(number) => Ok(*number),
            MlflowVersion::Alias(alias) => {
                let query = [by_name[0], ("alias", alias)];
                let response = self.api(registry, "mlflow/registered-models/alias", &query).await;
                let message = || format!("there is no alias {alias:?} of model {name:?} at {}", Server(&registry.url));
                let hint = "check the model's name and its aliases in MLflow";
                let VersionResponse { model_version } =
                    response.map_err(|error| as_not_found(error, message(), hint))?;
                let version = model_version.version;
                version.parse().map_err(|_| {
                    Error::corrupt(format!("the alias {alias:?} points to version {version:?}, which is not a number"))
                })
            }
            MlflowVersion::Latest => {
                let no_versions = || Error::not_found(format!("the model {name:?} has no versions")).hint(HINT);
                self.highest_version(registry, name, &by_name).await?.ok_or_else(no_versions)
            }
            MlflowVersion::Stage(stage) => {
                let no_version = || {
                    Error::not_found(format!("no version of model {name:?} is in stage {stage}")).hint(
                        "check the stages of its versions in MLflow; aliases (models:/name@alias) have replaced stages",
                    )
                };
                self.highest_version(registry, name, &[by_name[0], ("stages", stage)]).await?.ok_or_else(no_version)
            }
        }
    }

    /// Returns the highest version number that the query finds; `None` if it finds no versions. MLflow returns the
    /// newest version of each stage.
    async fn highest_version(
        &self,
        registry: &MlflowServer,
        name: &str,
        query: &[(&str, &str)],
    ) -> Result<Option<u64>> {
        #[derive(Deserialize)]
        struct VersionsResponse {
            #[serde(default)]
            model_versions: Vec<VersionInfo>,
        }
        let response = self.api(registry, "mlflow/registered-models/get-latest-versions", query).await;
        let message = || format!("there is no model {name:?} at {}", Server(&registry.url));
        let VersionsResponse { model_versions } =
            response.map_err(|error| as_not_found(error, message(), "check the model's name in MLflow"))?;
        Ok(model_versions.iter().filter_map(|info| info.version.parse().ok()).max())
    }

    /// Returns the URI of the files of a version, after following `runs:/` and `models:/` URIs.
    pub(super) async fn artifact_uri(&self, model: &str, version: &str) -> Result<String> {
        let registry = self.registry()?;
        let query = [("name", model), ("version", version)];
        let no_version = |error: Error| {
            let message = format!("there is no version {version} of model {model:?} at {}", Server(&registry.url));
            as_not_found(
                error,
                message,
                "check the model's name and its versions in MLflow; a deleted version does not come back",
            )
        };
        let info: Result<VersionResponse> = self.api(&registry, "mlflow/model-versions/get", &query).await;
        // A version that is not ready has incomplete files.
        let status = info.map_err(no_version)?.model_version.status;
        if let Some(status) = status.filter(|status| status != "READY") {
            let status = printable::quote(&status);
            return Err(Error::not_found(format!(
                "version {version} of model {model:?} is not ready: its status is {status}"
            ))
            .hint("wait until MLflow shows it as ready; if its registration failed, register the version again"));
        }
        let download: Result<DownloadUri> = self.api(&registry, DOWNLOAD_URI, &query).await;
        // The URI may refer to a run or a model, which may refer further.
        let mut uri = download.map_err(no_version)?.artifact_uri;
        for _ in 0..INDIRECTIONS_MAX {
            uri = match uri.split_once(':') {
                Some(("runs", rest)) => self.run_artifact_uri(rest).await?,
                Some(("models", rest)) => self.model_artifact_uri(rest).await?,
                _ => return Ok(uri),
            };
        }
        Err(Error::corrupt(format!(
            "the URI of version {version} of model {model:?} does not lead to files after {INDIRECTIONS_MAX} steps"
        )))
    }

    /// Resolves `runs:/<run>/<path>` to a URI below the artifact folder of the run.
    async fn run_artifact_uri(&self, rest: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct RunResponse {
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
        let response: RunResponse =
            self.api(&self.tracking()?, "mlflow/runs/get", &[("run_id", run)]).await.map_err(|error| {
                error.hint(
                    "the run that logged the model was deleted; restore the run in MLflow, or register the model again",
                )
            })?;
        Ok(format!("{}/{path}", response.run.info.artifact_uri.trim_end_matches('/')).trim_end_matches('/').to_owned())
    }

    /// Resolves `models:/<name>/<version>` and `models:/<id of a logged model>` to a URI.
    async fn model_artifact_uri(&self, rest: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct LoggedModelResponse {
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
        match rest.trim_start_matches('/').split_once('/') {
            // With a slash it is a version in the registry, without one the id of a logged model.
            Some((name, version)) => {
                let query = [("name", name), ("version", version)];
                let response: DownloadUri = self.api(&self.registry()?, DOWNLOAD_URI, &query).await?;
                Ok(response.artifact_uri)
            }
            None => {
                let id = http::encode_segment(rest.trim_start_matches('/'));
                let response: LoggedModelResponse =
                    self.api(&self.tracking()?, &format!("mlflow/logged-models/{id}"), &[]).await?;
                Ok(response.model.info.artifact_uri)
            }
        }
    }

    /// Lists the files below `root` on the server, folder by folder.
    pub(super) async fn list(&self, tracking: &MlflowServer, key: &ArtifactKey, root: &str) -> Result<Manifest> {
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
            /// Omitted by the server if it is 0.
            #[serde(default)]
            file_size: u64,
        }
        // The folders to list, `None` for the root. The traversal is depth-first.
        let mut manifest = Manifest::new(key.clone(), Shape::Tree);
        let (mut folders, mut folder_count) = (vec![None::<FilePath>], 0);
        while let Some(folder) = folders.pop() {
            let join_folder =
                |path: &str| folder.as_ref().map_or_else(|| path.to_owned(), |folder| format!("{folder}/{path}"));
            let folder_path = join_folder("");
            let folder_path = format!("{root}/{}", folder_path.trim_end_matches('/'));
            let query = [("path", folder_path.trim_end_matches('/'))];
            let listing: Listing = self.api(tracking, ARTIFACTS, &query).await?;
            for entry in listing.files {
                let refuse = |why: &str| {
                    Error::corrupt(format!("MLflow lists {:?}: {why}", entry.path))
                        .hint("nothing was downloaded: a model with an invalid entry is rejected as a whole")
                };
                // Paths come from the server: `FilePath` rejects those that leave the artifact.
                let path = FilePath::new(&join_folder(&entry.path)).map_err(|error| refuse(error.message()))?;
                if entry.is_dir {
                    folder_count += 1;
                    if path.as_str().matches('/').count() >= FOLDER_DEPTH_MAX {
                        return Err(refuse(&format!(
                            "more than {FOLDER_DEPTH_MAX} folders deep; a folder may contain itself"
                        )));
                    }
                    folders.push(Some(path));
                } else if manifest.files.insert(path, FileEntry::of(entry.file_size)).is_some() {
                    return Err(refuse("listed twice"));
                }
            }
            // Check after each folder, so that an endless listing stops.
            if folder_count > FOLDERS_MAX || manifest.files.len() > limits::FILES_MAX {
                return Err(Error::corrupt(format!(
                    "MLflow lists more than {FOLDERS_MAX} folders or {} files",
                    limits::FILES_MAX
                )));
            }
        }
        manifest.check()?;
        Ok(manifest)
    }
}

impl MlflowServer {
    /// Returns the URL of `path`, which is percent-encoded already, below the server.
    pub(super) fn url_for(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}/{path}", url.path().trim_end_matches('/')));
        url
    }
}

/// A version in a response of the registry.
#[derive(Deserialize)]
struct VersionInfo {
    version: String,
    status: Option<String>,
}

#[derive(Deserialize)]
struct VersionResponse {
    model_version: VersionInfo,
}

#[derive(Deserialize)]
struct DownloadUri {
    #[serde(default)]
    artifact_uri: String,
}

/// Converts `NotFound` and `Invalid` errors into `NotFound` with `message`. MLflow reports an unknown alias as an
/// invalid value.
fn as_not_found(error: Error, message: String, hint: &str) -> Error {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::Invalid => Error::not_found(message).cause(error).hint(hint),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RetryConfig;

    fn mlflow(tracking: Option<&str>, change: impl FnOnce(&mut MlflowConfig)) -> Mlflow {
        let mut config = Config::new("");
        config.mlflow.tracking_uri = tracking.map(Secret::new);
        change(&mut config.mlflow);
        Mlflow::new(&config, Retry::new(RetryConfig::default()))
    }

    #[test]
    fn different_servers_have_different_keys() {
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
    fn credentials_are_chosen_as_by_the_client_of_mlflow() {
        let shown = |uri: &str, change: fn(&mut MlflowConfig)| {
            let server = mlflow(Some(uri), change).tracking().expect("a server");
            assert!(!server.url.to_string().contains("canary"), "{}", server.url);
            server.authorization.map(|value| value.to_str().expect("text").to_owned())
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
    fn the_error_for_an_unusable_url_names_its_variable_and_not_the_url() {
        let error = mlflow(None, |_| ()).registry().map(|_| ()).expect_err("none");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("mlflow_tracking_uri")), "{error}");
        let error = mlflow(Some("postgres://u:canary@h"), |_| ()).registry().map(|_| ()).expect_err("not http");
        assert!(error.to_string().contains("mlflow_tracking_uri"), "{error}");
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
        let bad = mlflow(Some("https://h"), |config| config.token = Some(Secret::new("canary\nx")));
        let error = bad.registry().map(|_| ()).expect_err("a line end");
        assert!(!format!("{error:?}{bad:?}").contains("canary"), "{error:?}");
    }
}
