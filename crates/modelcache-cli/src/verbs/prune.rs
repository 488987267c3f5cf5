//! `prune`: frees space in the local directory now, instead of when the next download needs it.

use super::Session;
use super::get_arguments::{lifetime, message_with_hint};
use crate::output::{Lines, table};
use crate::{exit, human};
use clap::Args;
use modelcache::cache::{KeepReason, Leftovers, PruneOptions, PruneReport};
use modelcache::config::ByteBound;
use modelcache::{Error, ErrorKind, Result, Tier, settings};
use std::time::{Duration, SystemTime};

/// Free disk space: remove leftovers and artifacts that are no longer used
///
/// Always removes the leftovers of interrupted downloads, blobs that belong to no artifact, and quarantined files.
/// Removes artifacts only with --older-than or --to, least recently used first. Artifacts in use and pinned artifacts
/// stay. Artifacts that were not uploaded to a remote stay, too, unless --only-copies is given. Nothing is removed from
/// the remote.
#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Remove artifacts that were not used for this long, for example 12h or 30d
    #[arg(long, value_name = "AGE", value_parser = lifetime)]
    pub(crate) older_than: Option<Duration>,
    /// Remove artifacts until at most SIZE is used, for example 100GB, or 50% of the filesystem
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) to: Option<ByteBound>,
    /// Also remove artifacts that no other tier has: put without a remote, or not uploaded yet
    #[arg(long)]
    pub(crate) only_copies: bool,
    /// List the artifacts and leftovers that would be removed, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

fn size(text: &str) -> Result<ByteBound, String> {
    settings::parse_size(text).map_err(message_with_hint)
}

impl Prune {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let output = session.output;
        let options = PruneOptions {
            older_than: self.older_than,
            to: self.to,
            only_copies: self.only_copies,
            dry_run: self.dry_run,
        };
        let report = session.existing_cache()?.prune(&options).await?;
        let text = report_text(&report, SystemTime::now());
        if output.is_json() {
            output.print_json(&report)?;
        } else if self.dry_run {
            output.print(&text)?;
        }
        if !self.dry_run {
            text.iter().for_each(|line| output.message(line));
        }
        if report.reached || self.dry_run {
            return Ok(exit::DONE);
        }
        let error = not_reached(&report);
        session.report_failure(&error, None);
        Ok(exit::code(error.kind()))
    }
}

/// Returns the error for a size that was not reached. The remaining artifacts were kept for the reasons in the report,
/// or are being downloaded.
fn not_reached(report: &PruneReport) -> Error {
    let (used, to) = (human::bytes(report.used_bytes), human::bytes(report.to_bytes.unwrap_or_default()));
    let reason = if report.kept.is_empty() { "; the rest is being downloaded" } else { "" };
    let hint = match report.kept.iter().any(|kept| kept.why == KeepReason::OnlyCopy) {
        true => "upload the only copies with `modelcache backfill`, or add --only-copies to remove them",
        false => "unpin the kept artifacts, or prune again when the processes that use them have ended",
    };
    Error::new(ErrorKind::Full, format!("{used} are still used, more than the requested {to}{reason}"))
        .tier(Tier::Disk)
        .hint(hint)
}

fn report_text(report: &PruneReport, now: SystemTime) -> Lines {
    let mut text = Lines::default();
    if !report.evicted.is_empty() {
        let rows = report.evicted.iter().map(|artifact| {
            let used = artifact.last_used.map_or_else(|| "unknown".into(), |then| human::ago(then, now));
            vec![artifact.reference.clone(), human::bytes(artifact.freed_bytes), used]
        });
        text += table(&["NAME@VERSION", "FREED", "LAST USED"], &[1], rows);
    }
    for kept in &report.kept {
        text.push(&format!("kept {}: it is {}", kept.reference, kept.why));
    }
    for entry in &report.set_aside {
        let verb = if report.dry_run { "would move" } else { "moved" };
        text.push(&format!(
            "{verb} to quarantine: {}, because a {} does not belong at this path",
            entry.path, entry.is
        ));
    }
    leftovers_text(&report.leftovers).iter().for_each(|line| text.push(line));
    let [freed, used] = [report.freed_bytes, report.used_bytes].map(human::bytes);
    text.push(&match report.dry_run {
        _ if report.freed_bytes == 0 && report.evicted.is_empty() => format!("nothing to remove; {used} used"),
        true => format!("would free {freed}, and leave {used} used"),
        false => format!("freed {freed}; {used} used"),
    });
    text
}

fn leftovers_text(leftovers: &Leftovers) -> Option<String> {
    let fills = human::counted(leftovers.fills, "interrupted download");
    let parts = [
        (fills.as_str(), leftovers.fill_bytes, leftovers.fills > 0),
        ("unfinished files", leftovers.temporary_bytes, leftovers.temporary_bytes > 0),
        ("unreferenced blobs", leftovers.blob_bytes, leftovers.blob_bytes > 0),
        ("quarantine", leftovers.quarantine_bytes, leftovers.quarantine_bytes > 0),
    ];
    let shown = parts.into_iter().filter(|(_, _, any)| *any);
    let shown: Vec<_> = shown.map(|(what, bytes, _)| format!("{what} {}", human::bytes(bytes))).collect();
    (!shown.is_empty()).then(|| format!("leftovers: {}", shown.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::cache::{KeptArtifact, PrunedArtifact};

    #[test]
    fn the_report_lists_removed_and_kept_artifacts() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(7260);
        let mut report = PruneReport {
            used_bytes: 5_000_000_000,
            freed_bytes: 1_201_000_000,
            leftovers: Leftovers { fills: 1, fill_bytes: 1_000_000, ..Leftovers::default() },
            evicted: vec![PrunedArtifact {
                reference: "a@1".into(),
                last_used: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(60)),
                freed_bytes: 1_200_000_000,
            }],
            kept: vec![KeptArtifact { reference: "b@1".into(), why: KeepReason::Leased(Vec::new()) }],
            ..PruneReport::default()
        };
        let expected = "\
NAME@VERSION   FREED  LAST USED
a@1           1.2 GB  2 hours ago
kept b@1: it is in use
leftovers: 1 interrupted download 1.0 MB
freed 1.2 GB; 5.0 GB used";
        assert_eq!(report_text(&report, now).to_string(), expected);
        assert_eq!(serde_json::json!(report)["kept"][0]["why"], "leased");
        report.to_bytes = Some(4_000_000_000);
        assert_eq!(exit::code(not_reached(&report).kind()), 6);
        assert_eq!(report_text(&PruneReport::default(), now).to_string(), "nothing to remove; 0 B used");
    }
}
