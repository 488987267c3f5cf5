//! `get`: makes artifacts local and prints their paths.
//!
//! Standard output carries one path per reference, in the order of the arguments, and nothing else, so that
//! `$(modelcache get …)` works. If one reference fails, the others are still downloaded; but a reference that cannot be
//! parsed is refused before any download. The artifacts stay leased until the process ends.

use super::backfill::{finish_uploads, remote_bytes_text};
use super::get_arguments::GetArguments;
use super::into::IntoFolder;
use super::{Session, phase_list, reference_forms};
use crate::output::{Lines, WithReference, table};
use crate::{exit, human, progress};
use clap::Args;
use modelcache::cache::{Artifact, BytesByTier, Destination, GetAnswer, GetOptions, GetPlan, GetReport};
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Cache, Reference, Result, Tier};

/// Download artifacts that are not on disk yet, and print the local paths
///
/// Prints one path per reference, in the order of the arguments: the path of a single file, or of the folder of several
/// files. Files come from the nearest tier that has them: the local disk, the remote, or the origin. The nearer tiers
/// keep a copy. Every downloaded byte is verified.
#[derive(Debug, Args)]
pub(crate) struct Get {
    #[arg(required = true, value_name = "REF", help = reference_forms())]
    pub(crate) references: Vec<String>,
    #[command(flatten)]
    pub(crate) arguments: GetArguments,
    #[command(flatten)]
    pub(crate) into: IntoFolder,
    /// First read the files on disk in full and compare them with their digests; download damaged files again
    #[arg(long)]
    pub(crate) verify: bool,
    /// Only list the files and the tier that each would come from
    #[arg(long)]
    pub(crate) dry_run: bool,
}

impl Get {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let Some(references) = self.arguments.references(session, &self.references) else { return Ok(exit::USAGE) };
        let cache = Cache::open(session.config_without_background_sync())?;
        // The leases are released when the process ends.
        let (code, _leases) = self.arguments.with_timeout(self.get_all(session, &cache, &references)).await?;
        if !self.dry_run {
            finish_uploads(session, &cache).await;
        }
        Ok(code)
    }

    /// Gets every reference. The first failure determines the exit code.
    async fn get_all(
        &self,
        session: &Session<'_>,
        cache: &Cache,
        references: &[Reference],
    ) -> Result<(u8, Vec<Artifact>)> {
        let destination = self.into.destination(cache, self.references.len()).await?;
        // The links in the destination must not survive a crash that loses the files, so the files are synced first.
        let options = GetOptions {
            verify: self.verify,
            durable: destination.is_some(),
            destination: destination.clone(),
            ..self.arguments.options()?
        };
        let mut code = exit::DONE;
        let mut leased = Vec::new();
        for (text, reference) in self.references.iter().zip(references) {
            match self.get_one(session, cache, (text, reference), &options, destination.as_ref()).await {
                Ok(artifact) => leased.extend(artifact),
                Err(error) => {
                    session.report_failure(&error, Some(text));
                    if code == exit::DONE {
                        code = exit::code(error.kind());
                    }
                }
            }
        }
        Ok((code, leased))
    }

    /// Gets one reference and prints its path. Returns `None` for a dry run.
    async fn get_one(
        &self,
        session: &Session<'_>,
        cache: &Cache,
        (text, reference): (&str, &Reference),
        options: &GetOptions,
        destination: Option<&Destination>,
    ) -> Result<Option<Artifact>> {
        let output = session.output;
        if self.dry_run {
            let plan = cache.plan(reference, options).await?;
            if output.is_json() {
                output.print_json(&WithReference { reference: text, report: &plan })?;
            } else {
                output.print(&plan_text(&plan))?;
            }
            return Ok(None);
        }
        let progress = Progress::new();
        let artifact = progress::show(output, text, &progress, cache.get_with(reference, options, &progress)).await?;
        session.report_get(&artifact);
        let materialized = match destination {
            Some(destination) => Some(self.into.materialize(output, &artifact, destination).await?),
            None => None,
        };
        let path = materialized.as_ref().map_or(&artifact.path, |materialized| &materialized.path);
        if output.is_json() {
            let report = GetAnswer { path, into: materialized.as_ref(), ..artifact.answer() };
            output.print_json(&WithReference { reference: text, report })?;
        } else {
            output.print_path(path)?;
        }
        Ok(Some(artifact))
    }
}

/// Formats the summary line of a get: source, duration by phase, bytes by tier.
pub(super) fn summary(key: &ArtifactKey, report: &GetReport) -> String {
    let took = human::duration(report.took);
    if report.from == Tier::Disk {
        return format!("{key}: on disk, {took}");
    }
    let received = human::bytes(report.bytes.remote + report.bytes.origin);
    let phases = phase_list(&report.phases).map_or_else(String::new, |phases| format!("{phases}; "));
    let backfilled = remote_bytes_text(report.backfilled_bytes, report.copied_bytes);
    let backfilled = backfilled.map_or_else(String::new, |bytes| format!("; {bytes}"));
    // Name the remote, too, if it supplied a part of the bytes.
    let from = match report.bytes.remote {
        1.. if report.from == Tier::Origin => "remote and origin".to_owned(),
        _ => report.from.to_string(),
    };
    format!("{key}: {received} from {from} in {took} ({phases}{}{backfilled})", by_tier(&report.bytes))
}

/// Formats the bytes of each tier: `disk 0 B, remote 1.2 GB, origin 0 B`.
fn by_tier(bytes: &BytesByTier) -> String {
    let [disk, remote, origin] = [bytes.disk, bytes.remote, bytes.origin].map(human::bytes);
    format!("disk {disk}, remote {remote}, origin {origin}")
}

/// Formats the plan of a dry run: the files, and the bytes of each tier.
fn plan_text(plan: &GetPlan) -> Lines {
    let rows =
        plan.files.iter().map(|file| vec![file.path.to_string(), human::bytes(file.size), file.from.to_string()]);
    let mut lines = Lines::one(&plan.key.to_string());
    lines += table(&["FILE", "SIZE", "FROM"], &[1], rows);
    lines.and(&format!("{}: {}", human::counted(plan.files.len(), "file"), by_tier(&plan.bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::cache::{Link, PlannedFile};
    use modelcache::key::FilePath;
    use modelcache::progress::Phase;
    use serde_json::json;
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::time::Duration;

    fn key() -> ArtifactKey {
        ArtifactKey::bare("team/model@3").expect("key")
    }

    fn report(from: Tier, took: Duration) -> GetReport {
        GetReport {
            from,
            bytes: BytesByTier { disk: 0, remote: 0, origin: 1_200_000_000 },
            backfilled_bytes: 0,
            copied_bytes: 0,
            files: 2,
            selected_bytes: 1_200_000_000,
            link: Some(Link::Copy),
            phases: BTreeMap::from([
                (Phase::Resolve, Duration::from_millis(100)),
                (Phase::Download, Duration::from_secs(3)),
                (Phase::Publish, Duration::from_millis(200)),
            ]),
            took,
        }
    }

    #[test]
    fn the_summary_has_tier_bytes_and_phases() {
        assert_eq!(
            summary(&key(), &report(Tier::Origin, Duration::from_millis(3400))),
            "team/model@3: 1.2 GB from origin in 3.4 s \
             (resolve 0.1 s, download 3.0 s, publish 0.2 s; disk 0 B, remote 0 B, origin 1.2 GB)"
        );
        let second = Duration::from_secs(1);
        let backfilled =
            GetReport { backfilled_bytes: 5_000_000, phases: BTreeMap::new(), ..report(Tier::Origin, second) };
        assert!(
            summary(&key(), &backfilled).ends_with("origin 1.2 GB; 5.0 MB to remote)"),
            "the summary has the upload"
        );
        let hit = report(Tier::Disk, Duration::from_micros(400));
        assert_eq!(summary(&key(), &hit), "team/model@3: on disk, 0.4 ms");
    }

    #[test]
    fn the_json_object_has_flat_fields() {
        let (key, report) = (key(), report(Tier::Origin, Duration::from_secs(4)));
        let answer = GetAnswer { key: &key, path: Path::new("/c/x"), hub: None, report: &report, into: None };
        let object = json!(WithReference { reference: "team/model@3", report: answer });
        assert_eq!(object["reference"], "team/model@3");
        assert_eq!((&object["name"], &object["version"]), (&json!("team/model"), &json!("3")));
        assert_eq!((&object["path"], &object["from"]), (&json!("/c/x"), &json!("origin")));
        assert_eq!(object["bytes"], json!({"disk": 0, "remote": 0, "origin": 1_200_000_000}));
        assert_eq!(object["link"], json!("copy"));
        assert_eq!(object["seconds"], json!({"resolve": 0.1, "download": 3.0, "publish": 0.2}));
    }

    #[test]
    fn a_plan_sums_bytes_by_tier() {
        let file = |path, size, from| PlannedFile { path: FilePath::new(path).expect("path"), size, from };
        let files = vec![file("a", 1, Tier::Disk), file("b", 2_000, Tier::Origin), file("c", 3_000, Tier::Origin)];
        let plan = GetPlan::new(key(), files);
        assert_eq!(json!(plan)["bytes"], json!({"disk": 1, "remote": 0, "origin": 5000}));
        let text = plan_text(&plan).to_string();
        assert!(text.starts_with("team/model@3\nFILE") && text.contains("b     2.0 kB  origin"), "{text}");
        assert!(text.ends_with("3 files: disk 1 B, remote 0 B, origin 5.0 kB"), "{text}");
    }
}
