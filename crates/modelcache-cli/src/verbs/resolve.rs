//! `resolve`: prints the exact version that a reference resolves to. Downloads no file.
//!
//! Standard output carries one line, the reference, so that scripts can use `$(modelcache resolve …)`.

use super::get_arguments::TierArguments;
use super::{Session, reference_forms};
use crate::human;
use crate::output::WithReference;
use clap::Args;
use modelcache::cache::{GetOptions, ResolvedReference};
use modelcache::{Error, Reference, Result};
use std::time::Duration;

/// Print the exact version that a reference resolves to now
///
/// A branch or tag is replaced with the commit or version that it points to. Prints one line to standard output, and
/// the digest and the source of the answer to standard error.
#[derive(Debug, Args)]
pub(crate) struct Resolve {
    #[arg(value_name = "REF", help = reference_forms())]
    pub(crate) reference: String,
    /// Branch, tag or commit to use instead of the one in the reference
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Append `#sha256=DIGEST` to the printed reference: the digest of the file, or of the file list of a tree
    #[arg(long)]
    pub(crate) digest: bool,
    #[command(flatten)]
    pub(crate) tiers: TierArguments,
}

impl Resolve {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        let reference = Reference::parse(&self.reference)?;
        let reference = match &self.revision {
            Some(revision) => reference.at_revision(revision)?,
            None => reference,
        };
        // An answer of the origin is recorded in the cache directory, which is created for it. Without an origin, the
        // directory must exist.
        let records = !(self.tiers.offline || self.tiers.local_files_only || session.config.offline);
        let cache = if records { session.cache()? } else { session.existing_cache()? };
        let resolved = cache.resolve_reference(&reference, &self.tiers.apply(GetOptions::default())).await?;
        if output.is_json() {
            output.print_json(&WithReference { reference: &self.reference, report: &resolved })?;
        } else if self.digest {
            let reference = resolved.with_digest().ok_or_else(|| unknown_digest(&resolved))?;
            output.print_reference(&reference.to_string())?;
        } else {
            output.print_reference(&resolved.reference.to_string())?;
        }
        output.message(&summary(&self.reference, &resolved));
        Ok(())
    }
}

/// Returns the error for `--digest` if no tier has the digest of every file.
fn unknown_digest(resolved: &ResolvedReference) -> Error {
    Error::not_found("the digest is not known: neither disk nor remote has the digest of every file")
        .artifact(&resolved.key)
        .hint(format!("`modelcache get {}` downloads the files and computes their digests", resolved.reference))
}

/// Formats the summary line: the resolved reference, its digest, and the tier that resolved it.
fn summary(reference: &str, resolved: &ResolvedReference) -> String {
    let digest = resolved.sha256.map_or_else(|| "sha256 not known yet".to_owned(), |sha256| format!("sha256 {sha256}"));
    let from = match (resolved.from, resolved.age) {
        (Some(tier), Some(age)) if age <= Duration::from_secs(1) => format!(", answered by {tier}"),
        (Some(tier), Some(age)) => format!(", answered by {tier} {} ago", age_text(age)),
        (Some(tier), None) => format!(", on {tier}"),
        (None, _) => String::new(),
    };
    format!("{reference} resolves to {} ({digest}{from})", resolved.reference)
}

/// Formats the age of a recorded resolution.
fn age_text(age: Duration) -> String {
    if age == Duration::MAX { "an unknown time".into() } else { human::duration(age) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::digest::Digest;
    use modelcache::{ArtifactKey, Tier};
    use serde_json::json;

    #[test]
    fn the_summary_has_digest_tier_and_age() {
        let digest = Digest::of(b"x");
        let mut resolved = ResolvedReference {
            reference: Reference::parse("m@4").expect("reference"),
            key: ArtifactKey::bare("m@4").expect("key"),
            revision: Some("prod".into()),
            sha256: Some(digest),
            from: Some(Tier::Remote),
            age: Some(Duration::ZERO),
        };
        assert_eq!(
            summary("m@prod", &resolved),
            format!("m@prod resolves to m@4 (sha256 {digest}, answered by remote)")
        );
        let object = json!(resolved);
        assert_eq!(object["pinned_with_digest"], format!("m@4#sha256={digest}"));
        assert_eq!(
            (&object["revision"], &object["from"], &object["age_seconds"]),
            (&json!("prod"), &json!("remote"), &json!(0))
        );
        resolved = ResolvedReference {
            sha256: None,
            age: Some(Duration::from_secs(7200)),
            from: Some(Tier::Disk),
            ..resolved
        };
        assert_eq!(
            summary("m@prod", &resolved),
            "m@prod resolves to m@4 (sha256 not known yet, answered by disk 2 h 0 min ago)"
        );
        assert_eq!(resolved.with_digest(), None);
    }
}
