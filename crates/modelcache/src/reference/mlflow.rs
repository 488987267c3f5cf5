//! References to an MLflow model registry: `models:/name/version`, `models:/name@alias`, `models:/name/latest`.
//!
//! Read as MLflow's own client reads them: a name is taken as it stands, spaces, `%` and letters of any alphabet
//! included, and has neither `/` nor `:` in it; nothing is decoded. Which server is meant the reference does not say: the
//! configuration does, and [`MlflowModel::server`] is filled in from there before the reference is a key.

use super::{Reference, Target};
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::redact;
use std::fmt;

/// Stages that a version could be moved to before there were aliases.
const STAGES: [&str; 4] = ["Production", "Staging", "Archived", "None"];

/// A model in a registry, at a version.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MlflowModel {
    /// The server as it stands in keys: host, port and path; `None` until the configuration was asked.
    pub server: Option<String>,
    /// The registered model's name.
    pub name: String,
    /// Which of its versions.
    pub version: MlflowVersion,
}

/// How a version is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MlflowVersion {
    /// By its number, which never means another.
    Number(u64),
    /// By an alias.
    Alias(String),
    /// The highest number.
    Latest,
    /// The highest number in a stage.
    Stage(&'static str),
}

impl MlflowModel {
    /// The artifact's name, once the server is known: `mlflow/`, the server, the model.
    pub fn artifact_name(&self) -> Option<Result<ArtifactName>> {
        let server = self.server.as_ref()?;
        Some(ArtifactName::from_uri("mlflow", server.split('/').chain([self.name.as_str()])))
    }

    /// The key of version `number`, once the server is known.
    pub fn key_at(&self, number: u64) -> Option<Result<ArtifactKey>> {
        let name = self.artifact_name()?;
        Some(name.and_then(|name| Ok(ArtifactKey::new(name, Version::new(&number.to_string())?))))
    }

    /// The movable name, where the version is chosen by one. A colon keeps stages and aliases apart: no alias has one.
    pub fn revision(&self) -> Option<String> {
        match &self.version {
            MlflowVersion::Number(_) => None,
            MlflowVersion::Alias(alias) => Some(alias.clone()),
            MlflowVersion::Latest => Some("latest".into()),
            MlflowVersion::Stage(stage) => Some(format!("stage:{stage}")),
        }
    }
}

/// As it is typed.
impl fmt::Display for MlflowModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "models:/{}", self.name)?;
        match &self.version {
            MlflowVersion::Number(number) => write!(f, "/{number}"),
            MlflowVersion::Alias(alias) => write!(f, "@{alias}"),
            MlflowVersion::Latest => f.write_str("/latest"),
            MlflowVersion::Stage(stage) => write!(f, "/{stage}"),
        }
    }
}

/// What follows `models:`.
pub(super) fn parse(rest: &str) -> Result<Reference> {
    let refuse = |why: &str| {
        Error::invalid(format!("{}: {why}", redact::reference(&format!("models:{rest}"))))
            .hint("write models:/name/version, models:/name@alias or models:/name/latest")
    };
    if rest.starts_with("//") {
        return Err(refuse("the server is not part of it").hint(
            "write models:/name/version, and name the server in MLFLOW_TRACKING_URI; profiles of Databricks are not read",
        ));
    }
    let path = rest.strip_prefix('/').ok_or_else(|| refuse("there is no slash after the colon"))?;
    let (name, version) = match path.split_once('/') {
        Some((name, version)) => (name, numbered(version).or_else(|_| staged(version))),
        None => match path.rsplit_once('@') {
            Some((name, alias)) => (name, aliased(alias)),
            None if path.starts_with("m-") => return Err(refuse("a logged model has no version; register it first")),
            None => return Err(refuse("it names no version")),
        },
    };
    let version = version.map_err(refuse)?;
    if name.trim().is_empty() || name.contains(':') || name.chars().any(char::is_control) {
        return Err(refuse("no registered model can be called that"));
    }
    let model = MlflowModel { server: None, name: name.to_owned(), version };
    // What could never be a key is refused before any server is known.
    ArtifactName::from_uri("mlflow", ["server", name])?;
    Ok(Reference { target: Target::Mlflow(model), file: None, digest: None })
}

/// A revision as `--revision` gives it: a version's number, `latest`, a stage, or an alias.
pub(super) fn version(text: &str) -> Result<MlflowVersion> {
    let known = numbered(text).or_else(|_| staged(text)).or_else(|_| aliased(text));
    known.map_err(|why| Error::invalid(format!("{text:?}: {why}")).hint("a version's number, latest or an alias"))
}

fn numbered(text: &str) -> Result<MlflowVersion, &'static str> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|number| digits && *number > 0);
    number.map(MlflowVersion::Number).ok_or("a version is a number")
}

fn staged(text: &str) -> Result<MlflowVersion, &'static str> {
    if text.eq_ignore_ascii_case("latest") {
        return Ok(MlflowVersion::Latest);
    }
    let stage = STAGES.into_iter().find(|stage| stage.eq_ignore_ascii_case(text));
    stage.map(MlflowVersion::Stage).ok_or("a version is a number or latest; an alias stands after an @")
}

/// What MLflow accepts as an alias: letters, digits, `_` and `-`; no version's number, and not `latest`.
fn aliased(text: &str) -> Result<MlflowVersion, &'static str> {
    let plain = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'));
    if !plain || text.eq_ignore_ascii_case("latest") {
        return Err("no alias can be called that");
    }
    Ok(MlflowVersion::Alias(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(text: &str) -> (String, MlflowVersion) {
        match Reference::parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).target {
            Target::Mlflow(model) => (model.name, model.version),
            other => panic!("{text} is {other:?}"),
        }
    }

    #[test]
    fn every_documented_form_parses_and_prints_as_it_was_typed() {
        use MlflowVersion::*;
        for (text, name, version) in [
            ("models:/fraud/3", "fraud", Number(3)),
            ("models:/fraud@prod", "fraud", Alias("prod".into())),
            ("models:/fraud/latest", "fraud", Latest),
            ("models:/fraud/Production", "fraud", Stage("Production")),
            ("models:/fraud détection 100%/12", "fraud détection 100%", Number(12)),
            ("models:/a.b@c@d-e_1", "a.b@c", Alias("d-e_1".into())),
            ("models:/%2e%2e/1", "%2e%2e", Number(1)),
        ] {
            assert_eq!(model(text), (name.to_owned(), version), "{text}");
            assert_eq!(Reference::parse(text).expect("parses").to_string(), text);
        }
        assert_eq!(model("models:/x/LATEST").1, Latest);
        assert_eq!(model("models:/x/staging").1, Stage("Staging"));
    }

    #[test]
    fn what_mlflow_would_not_understand_is_refused() {
        for bad in [
            "models:fraud/3",
            "models:/",
            "models:/fraud",
            "models:/m-0123456789abcdef",
            "models://fraud/3",
            "models:/fraud/",
            "models:/fraud/0",
            "models:/fraud/+3",
            "models:/fraud/v3",
            "models:/fraud/99999999999999999999",
            "models:/fraud/3/x",
            "models:/a:b/3",
            "models:/ /3",
            "models:/../3",
            "models:/./3",
            "models:/fraud@",
            "models:/fraud@latest",
            "models:/fraud@a b",
            "models:/fraud@a/b",
        ] {
            let error = Reference::parse(bad).expect_err(bad);
            assert!(error.hint_text().is_some_and(|hint| !hint.is_empty()), "{bad}: {error}");
        }
    }

    #[test]
    fn two_servers_never_share_a_key_and_none_is_no_key() {
        let at = |text: &str, server: Option<&str>| {
            let mut reference = Reference::parse(text).expect(text);
            if let Target::Mlflow(model) = &mut reference.target {
                model.server = server.map(str::to_owned);
            }
            reference
        };
        let key = |server| at("models:/m 1/3", Some(server)).exact_key().expect("exact").to_string();
        assert_eq!(key("a:5000"), "mlflow/a:5000/m 1@3");
        assert_eq!(key("a/team/b"), "mlflow/a/team/b/m 1@3");
        assert_eq!(at("models:/m/3", None).exact_key(), None);
        assert_eq!(at("models:/m@prod", None).pointer(), None);
        let pointer = at("models:/m@prod", Some("h")).pointer().expect("a pointer");
        assert_eq!((pointer.name.as_str(), pointer.revision.as_str()), ("mlflow/h/m", "prod"));
        let stage = at("models:/m/staging", Some("h")).pointer().expect("a pointer");
        assert_eq!(stage.revision, "stage:Staging");
    }
}
