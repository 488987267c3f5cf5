//! How the servers are asked: addresses, credentials, the few calls, and what a refusal means.

use crate::config::{MlflowConfig, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{ArtifactKey, FilePath};
use crate::limits;
use crate::manifest::{FileEntry, Manifest, Shape};
use crate::origin::authorization;
use crate::origin::http::{self, Answer, Http, Refusal, Request, Server};
use crate::printable;
use crate::reference::{MlflowModel, MlflowVersion};
use crate::transfer::Retry;
use reqwest::header::{HeaderMap, HeaderValue};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use url::Url;

/// Most folders of one model that are listed. Real ones have a handful.
const FOLDERS_MAX: usize = 10_000;
/// Deepest folder of a model. A folder that lists itself ends here.
const FOLDER_DEPTH_MAX: usize = 32;
/// Most `runs:/` and `models:/` on the way from a version to its files.
const INDIRECTIONS_MAX: usize = 8;
/// Where the files of a version are.
const DOWNLOAD_URI: &str = "mlflow/model-versions/get-download-uri";
/// Where the server hands on files.
pub(super) const ARTIFACTS: &str = "mlflow-artifacts/artifacts";
/// What a server says that does not.
const NO_PROXY: &str = "--serve-artifacts";

/// The configured servers, and how to ask them.
#[derive(Debug)]
pub(in crate::origin) struct Mlflow {
    pub(super) config: MlflowConfig,
    pub(super) http: Http,
    pub(super) retry: Retry,
}

/// One of the two servers.
#[derive(Clone)]
pub(super) struct MlflowServer {
    /// Without user and password, without a slash at its end.
    pub(super) url: Url,
    pub(super) authorization: Option<HeaderValue>,
}

/// How a server stands in keys: host, port where it is not that of https, path. Two servers never share one.
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
    /// Servers that were not yet spoken to.
    pub(in crate::origin) fn new(config: MlflowConfig, retry: Retry) -> Self {
        Self { config, http: Http::new(retry.read_timeout()), retry }
    }

    /// The registry as it stands in keys; `None` where there is none that can be asked.
    pub(in crate::origin) fn server(&self) -> Option<String> {
        Some(authority(&self.registry().ok()?.url))
    }

    pub(super) fn registry(&self) -> Result<MlflowServer> {
        match &self.config.registry_uri {
            Some(uri) => self.place(uri, "MLFLOW_REGISTRY_URI"),
            None => self.tracking(),
        }
    }

    pub(super) fn tracking(&self) -> Result<MlflowServer> {
        match &self.config.tracking_uri {
            Some(uri) => self.place(uri, "MLFLOW_TRACKING_URI"),
            None => Err(Error::invalid("no MLflow server is configured")
                .hint("set MLFLOW_TRACKING_URI to its address, for instance https://mlflow.example")),
        }
    }

    /// The server at an address, which is not repeated: it may carry a password, and then it is what is shown.
    fn place(&self, uri: &Secret, variable: &str) -> Result<MlflowServer> {
        let url =
            Url::parse(uri.expose()).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let mut url = url.ok_or_else(|| {
            Error::invalid(format!("{variable} is no web address"))
                .hint("it must name an `mlflow server`, for instance https://mlflow.example; folders, databases and Databricks are not read")
        })?;
        let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let of_address = url.password().map(|password| (decoded(url.username()), Secret::new(decoded(password))));
        let authorization = match (of_address.as_ref().or(self.config.login.as_ref()), &self.config.token) {
            (Some((user, password)), _) => {
                Some(authorization::basic(user, password.expose(), "the password for MLflow")?)
            }
            (None, Some(token)) => Some(authorization::bearer(token.expose(), "MLFLOW_TRACKING_TOKEN")?),
            (None, None) => None,
        };
        let cleared = url.set_username("").and_then(|()| url.set_password(None));
        cleared.map_err(|()| Error::invalid(format!("{variable} is no web address")))?;
        url.set_query(None);
        url.set_fragment(None);
        let path = url.path().trim_end_matches('/').to_owned();
        url.set_path(&path);
        Ok(MlflowServer { url, authorization })
    }

    /// One answer of the API.
    async fn api<T: DeserializeOwned>(&self, place: &MlflowServer, path: &str, query: &[(&str, &str)]) -> Result<T> {
        let mut url = place.below(&format!("api/2.0/{path}"));
        url.query_pairs_mut().extend_pairs(query);
        self.retry.run(|| self.ask(place, url.clone())).await
    }

    async fn ask<T: DeserializeOwned>(&self, place: &MlflowServer, url: Url) -> Result<T> {
        let authorization = place.authorization.as_ref();
        let ask = Request { headers: HeaderMap::new(), home: &place.url, authorization, stay: true };
        let answer = self.http.follow(url, ask).await?;
        if !answer.response.status().is_success() {
            return Err(self.refused(answer).await);
        }
        let body = self.http.body(answer.response, &answer.url, limits::ANSWER_BYTES_MAX).await?;
        serde_json::from_slice(&body).map_err(|cause| {
            Error::corrupt(format!("{} answers in another form than MLflow", Server(&place.url)))
                .cause(cause)
                .hint("check MLFLOW_TRACKING_URI: does `mlflow server` answer there?")
        })
    }

    /// What a refusal means: the one place where MLflow's statuses and codes become kinds.
    pub(super) async fn refused(&self, answer: Answer) -> Error {
        #[derive(Deserialize)]
        struct Words {
            error_code: String,
            message: Option<String>,
        }
        let Answer { response, url, at_home, .. } = answer;
        let mut refusal = Refusal::read(&self.http, response, at_home).await;
        let words: Option<Words> = serde_json::from_slice(&refusal.body).ok();
        let code = words.as_ref().map(|words| words.error_code.as_str());
        if !at_home {
            return refusal.error(&url).hint("MLflow redirected there: is the clock of this machine right?");
        }
        if let Some(message) = words.as_ref().and_then(|words| words.message.as_deref()) {
            refusal.message = Some(printable::quote(message));
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
            (404, None) => Error::unavailable(format!("{} answered 404, and not as MLflow does", Server(&url)))
                .transient(false)
                .hint("check MLFLOW_TRACKING_URI: does `mlflow server` answer there?"),
            _ => refusal.error(&url),
        }
    }

    /// The number that an alias, a stage or `latest` means now.
    pub(super) async fn version(&self, registry: &MlflowServer, model: &MlflowModel) -> Result<u64> {
        let (name, asked) = (&model.name, [("name", model.name.as_str())]);
        const CHECK: &str = "check the model's name and its versions in MLflow";
        match &model.version {
            MlflowVersion::Number(number) => Ok(*number),
            MlflowVersion::Alias(alias) => {
                let query = [asked[0], ("alias", alias)];
                let answer = self.api(registry, "mlflow/registered-models/alias", &query).await;
                let what = || format!("there is no alias {alias:?} of model {name:?} at {}", Server(&registry.url));
                let hint = "check the model's name and its aliases in MLflow";
                let One { model_version } = answer.map_err(|error| absent(error, what(), hint))?;
                let version = model_version.version;
                version.parse().map_err(|_| Error::corrupt(format!("the alias {alias:?} leads to version {version:?}")))
            }
            MlflowVersion::Latest => {
                let nothing = || Error::not_found(format!("the model {name:?} has no versions")).hint(CHECK);
                self.newest(registry, name, &asked).await?.ok_or_else(nothing)
            }
            MlflowVersion::Stage(stage) => {
                let nothing = || {
                    Error::not_found(format!("no version of model {name:?} is in stage {stage}")).hint(
                        "check the stages of its versions in MLflow; aliases (models:/name@alias) have taken their place",
                    )
                };
                self.newest(registry, name, &[asked[0], ("stages", stage)]).await?.ok_or_else(nothing)
            }
        }
    }

    /// The highest number among the newest versions of each stage; `None` where there is none.
    async fn newest(&self, registry: &MlflowServer, name: &str, query: &[(&str, &str)]) -> Result<Option<u64>> {
        #[derive(Deserialize)]
        struct Several {
            #[serde(default)]
            model_versions: Vec<VersionInfo>,
        }
        let answer = self.api(registry, "mlflow/registered-models/get-latest-versions", query).await;
        let what = || format!("there is no model {name:?} at {}", Server(&registry.url));
        let Several { model_versions } =
            answer.map_err(|error| absent(error, what(), "check the model's name in MLflow"))?;
        Ok(model_versions.iter().filter_map(|info| info.version.parse().ok()).max())
    }

    /// Where the files of a version lie, after `runs:/` and `models:/` were followed.
    pub(super) async fn files_of(&self, model: &str, version: &str) -> Result<String> {
        let registry = self.registry()?;
        let query = [("name", model), ("version", version)];
        let no_version = |error: Error| {
            let what = format!("there is no version {version} of model {model:?} at {}", Server(&registry.url));
            absent(
                error,
                what,
                "check the model's name and its versions in MLflow; a deleted version does not come back",
            )
        };
        let info: Result<One> = self.api(&registry, "mlflow/model-versions/get", &query).await;
        let status = info.map_err(no_version)?.model_version.status;
        if let Some(status) = status.filter(|status| status != "READY") {
            let status = printable::quote(&status);
            return Err(Error::not_found(format!(
                "version {version} of model {model:?} is not ready: its status is {status}"
            ))
            .hint("wait until MLflow shows it as ready; one whose registration failed has to be registered again"));
        }
        let download: Result<Download> = self.api(&registry, DOWNLOAD_URI, &query).await;
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
        match rest.trim_start_matches('/').split_once('/') {
            Some((name, version)) => {
                let query = [("name", name), ("version", version)];
                let answer: Download = self.api(&self.registry()?, DOWNLOAD_URI, &query).await?;
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
                    if path.as_str().matches('/').count() >= FOLDER_DEPTH_MAX {
                        return Err(refuse("more than 32 folders deep; does a folder list itself?"));
                    }
                    folders.push(Some(path));
                } else if manifest.files.insert(path, FileEntry::of(entry.file_size)).is_some() {
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

impl MlflowServer {
    /// An address below the server; `path` is encoded already.
    pub(super) fn below(&self, path: &str) -> Url {
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

#[derive(Deserialize)]
struct One {
    model_version: VersionInfo,
}

#[derive(Deserialize)]
struct Download {
    #[serde(default)]
    artifact_uri: String,
}

/// `error` as "there is no such thing", where that is what it is: MLflow refuses an alias that it does not know as an
/// invalid value.
fn absent(error: Error, what: String, hint: &str) -> Error {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::Invalid => Error::not_found(what).cause(error).hint(hint),
        _ => error,
    }
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
}
