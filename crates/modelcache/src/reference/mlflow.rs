//! References to an MLflow model registry: `models:/name/version`, `models:/name@alias`, `models:/name/latest`.
//!
//! Parsed as MLflow's own client does: a name may contain spaces, `%` and letters of any alphabet, but neither `/` nor
//! `:`. Nothing is percent-decoded. The reference does not name the server; [`MlflowModel::server`] is filled in from
//! the configuration before the reference can have a key.

use super::location::Location;
use super::{Pointer, Reference, Scheme, Target};
use crate::error::{Error, Result};
use crate::key::{ArtifactKey, ArtifactName, Version};
use crate::option_name::setting::MLFLOW_TRACKING_URI;
use crate::redact;
use std::fmt;

/// The scheme of MLflow.
pub(crate) static SCHEME: Scheme =
    Scheme { has_revisions: true, ..Scheme::built_in("models:", &["mlflow", "models"], "models:/NAME/VERSION", parse) };

/// The stages of model versions, which MLflow has deprecated in favour of aliases.
const STAGES: [&str; 4] = ["Production", "Staging", "Archived", "None"];

/// A model in a registry, at a version.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MlflowModel {
    /// The server as it appears in keys: host, port and path. `None` until it is filled in from the configuration.
    pub server: Option<String>,
    /// The registered model's name.
    pub name: String,
    /// The version.
    pub version: MlflowVersion,
}

/// The selector of a version.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MlflowVersion {
    /// A number, which always refers to the same version.
    Number(u64),
    /// An alias.
    Alias(String),
    /// The version with the highest number.
    Latest,
    /// The version with the highest number in a stage.
    Stage(&'static str),
}

impl MlflowModel {
    /// Returns the artifact name: `mlflow/`, the server, the model. Returns `None` until the server is known.
    pub fn artifact_name(&self) -> Option<Result<ArtifactName>> {
        let server = self.server.as_ref()?;
        Some(ArtifactName::from_uri("mlflow", server.split('/').chain([self.name.as_str()])))
    }

    /// Returns the key of version `number`. Returns `None` until the server is known.
    pub fn key_at(&self, number: u64) -> Option<Result<ArtifactKey>> {
        let name = self.artifact_name()?;
        Some(name.and_then(|name| Ok(ArtifactKey::new(name, Version::new(&number.to_string())?))))
    }

    /// Returns the movable name that selects the version, or `None` if the version is a number. Stages have the prefix
    /// `stage:`, which no alias can have.
    pub fn revision(&self) -> Option<String> {
        match &self.version {
            MlflowVersion::Number(_) => None,
            MlflowVersion::Alias(alias) => Some(alias.clone()),
            MlflowVersion::Latest => Some("latest".into()),
            MlflowVersion::Stage(stage) => Some(format!("stage:{stage}")),
        }
    }
}

impl Location for MlflowModel {
    fn scheme(&self) -> Option<&'static Scheme> {
        Some(&SCHEME)
    }

    fn exact_key(&self) -> Option<ArtifactKey> {
        match self.version {
            MlflowVersion::Number(number) => self.key_at(number)?.ok(),
            _ => None,
        }
    }

    fn pointer(&self) -> Option<Pointer> {
        let revision = self.revision()?;
        Some(Pointer { name: self.artifact_name()?.ok()?, revision })
    }

    fn at_revision(&self, revision: &str) -> Result<Option<Target>> {
        Ok(Some(Target::Mlflow(Self { version: parse_revision(revision)?, ..self.clone() })))
    }

    fn at_key(&self, key: &ArtifactKey) -> Target {
        match key.version.as_str().parse() {
            Ok(number) => Target::Mlflow(Self { version: MlflowVersion::Number(number), ..self.clone() }),
            Err(_) => Target::Bare(key.clone()),
        }
    }

    fn can_resolve_to(&self, version: &Version) -> bool {
        version.as_str().parse::<u64>().is_ok_and(|number| number.to_string() == version.as_str())
    }
}

/// Formats as a reference.
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

/// Parses the text after `models:`.
fn parse(_prefix: &str, rest: &str) -> Result<Reference> {
    let refuse = |why: &str| {
        Error::invalid(format!("{}: {why}", redact::reference(&format!("models:{rest}"))))
            .hint("write models:/name/version, models:/name@alias or models:/name/latest")
    };
    if rest.starts_with("//") {
        return Err(refuse("the server cannot be part of the reference").hint(format!(
            "write models:/name/version, and set {MLFLOW_TRACKING_URI} to the server; \
             Databricks profiles are not supported"
        )));
    }
    let path = rest.strip_prefix('/').ok_or_else(|| refuse("a slash is missing after the colon"))?;
    let (name, version) = match path.split_once('/') {
        Some((name, version)) => (name, parse_number(version).or_else(|_| parse_stage(version))),
        None => match path.rsplit_once('@') {
            Some((name, alias)) => (name, parse_alias(alias)),
            None if path.starts_with("m-") => return Err(refuse("a logged model has no version; register it first")),
            None => return Err(refuse("it names no version")),
        },
    };
    let version = version.map_err(refuse)?;
    if name.trim().is_empty() || name.contains(':') || name.chars().any(char::is_control) {
        return Err(refuse("not a valid name of a registered model"));
    }
    let model = MlflowModel { server: None, name: name.to_owned(), version };
    // Check that the name can be part of a key. The server in its key is not known yet.
    ArtifactName::from_uri("mlflow", ["server", name])?;
    Ok(Reference { target: Target::Mlflow(model), file: None, digest: None })
}

/// Parses the argument of `--revision`: a version number, `latest`, a stage, or an alias.
fn parse_revision(text: &str) -> Result<MlflowVersion> {
    let version = parse_number(text).or_else(|_| parse_stage(text)).or_else(|_| parse_alias(text));
    version.map_err(|why| Error::invalid(format!("{text:?}: {why}")).hint("use a version number, latest or an alias"))
}

/// Parses a version number.
fn parse_number(text: &str) -> Result<MlflowVersion, &'static str> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|number| digits && *number > 0);
    number.map(MlflowVersion::Number).ok_or("a version is a number")
}

/// Parses `latest` or the name of a stage, in upper or lower case.
fn parse_stage(text: &str) -> Result<MlflowVersion, &'static str> {
    if text.eq_ignore_ascii_case("latest") {
        return Ok(MlflowVersion::Latest);
    }
    let stage = STAGES.into_iter().find(|stage| stage.eq_ignore_ascii_case(text));
    stage.map(MlflowVersion::Stage).ok_or("a version is a number from 1, or latest; write an alias after an @")
}

/// Parses an alias. MLflow accepts letters, digits, `_` and `-`, except the word `latest`.
fn parse_alias(text: &str) -> Result<MlflowVersion, &'static str> {
    let is_valid = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'));
    if !is_valid || text.eq_ignore_ascii_case("latest") {
        return Err("not a valid alias");
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
    fn references_that_mlflow_refuses_are_refused() {
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
    fn two_servers_never_share_a_key_and_without_a_server_there_is_no_key() {
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
