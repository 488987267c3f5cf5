//! `tag`: points a movable name to a version. Tags are stored on the remote.

use super::Session;
use clap::Args;
use modelcache::cache::TagReport;
use modelcache::key::Version;
use modelcache::{ArtifactKey, Error, Result};

/// Point a tag to a version, for a rollout or a rollback
///
/// A get of NAME@TAG then returns that version, at the latest after MODEL_CACHE_REF_TTL. Tags are stored on the remote.
/// If several users move a tag at the same time, the last one wins.
#[derive(Debug, Args)]
pub(crate) struct Tag {
    /// The version, which must exist on the remote; with --remove, NAME@TAG
    #[arg(value_name = "NAME@VERSION")]
    pub(crate) key: String,
    /// The tag, for example prod
    #[arg(value_name = "TAG", required_unless_present = "remove", conflicts_with = "remove")]
    pub(crate) tag: Option<String>,
    /// Remove the tag NAME@TAG; the version stays
    #[arg(long)]
    pub(crate) remove: bool,
}

impl Tag {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        let (key, cache) = (ArtifactKey::bare(&self.key)?, session.cache()?);
        let report = match &self.tag {
            Some(tag) => cache.tag(&key, &parse_tag(tag)?).await?,
            None => cache.untag(&key).await?,
        };
        if output.is_json() {
            output.print_json(&report)?;
        }
        output.message(&summary(&report));
        Ok(())
    }
}

/// Parses a tag. Like a version, it has a single segment.
pub(super) fn parse_tag(text: &str) -> Result<Version> {
    Version::new(text).map_err(|_| {
        Error::invalid(format!("{text:?} cannot be a tag"))
            .hint("a tag is one word without / @ # ? \\, for example prod: modelcache tag NAME@VERSION prod")
    })
}

/// Formats the summary line of a change: the version that the tag points to, and the one before.
pub(super) fn summary(report: &TagReport) -> String {
    let TagReport { name, tag, from, to, .. } = report;
    match (from, to) {
        (None, Some(to)) => format!("{name}@{tag} now points to version {to} (new tag)"),
        (Some(from), Some(to)) if from == to => format!("{name}@{tag} already points to version {to}"),
        (Some(from), Some(to)) => format!("{name}@{tag} now points to version {to} (was {from})"),
        (Some(from), None) => format!("{name}@{tag}: tag removed (was {from})"),
        (None, None) => format!("{name}@{tag}: tag removed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_has_the_version_before_and_after() {
        let version = |text: &str| Version::new(text).expect("version");
        let report = |from: Option<&str>, to: Option<&str>| TagReport {
            name: "team/m".parse().expect("name"),
            tag: version("prod"),
            from: from.map(version),
            to: to.map(version),
            sha256: None,
        };
        assert_eq!(summary(&report(None, Some("3"))), "team/m@prod now points to version 3 (new tag)");
        assert_eq!(summary(&report(Some("3"), Some("4"))), "team/m@prod now points to version 4 (was 3)");
        assert_eq!(summary(&report(Some("4"), Some("4"))), "team/m@prod already points to version 4");
        assert_eq!(summary(&report(Some("4"), None)), "team/m@prod: tag removed (was 4)");
        assert_eq!(serde_json::json!(report(Some("3"), Some("4")))["from"], "3");
    }

    #[test]
    fn a_tag_is_one_word() {
        assert!(parse_tag("prod-2").is_ok());
        for bad in ["", "a/b", "m@prod", "..", ".modelcache"] {
            assert!(parse_tag(bad).is_err(), "{bad}");
        }
    }
}
