//! `stats`: shows the state of the local directory.

use super::{Session, path_text};
use crate::human;
use crate::output::Lines;
use clap::Args;
use modelcache::{Result, cache};

/// Show the disk budget, the space in use, and the free space
#[derive(Debug, Args)]
pub(crate) struct Stats {}

impl Stats {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        let stats = session.existing_cache()?.stats().await?;
        if output.is_json() { output.print_json(&stats) } else { output.print(&stats_text(&stats)) }
    }
}

fn stats_text(stats: &cache::Stats) -> Lines {
    let share = match stats.budget_bytes {
        0 => String::new(),
        budget => format!(" ({:.0} %)", stats.used_bytes as f64 * 100.0 / budget as f64),
    };
    let lower = stats.lower_dir.as_ref().map_or_else(
        || "none".into(),
        |dir| format!("{} ({}, read-only)", path_text(dir), human::counted(stats.lower_artifacts, "artifact")),
    );
    let facts = [
        ("directory", path_text(&stats.dir)),
        ("lower", lower),
        ("artifacts", format!("{} ({})", stats.artifacts, human::counted(stats.files, "file"))),
        ("  in use", stats.leases.to_string()),
        ("  pinned", stats.pins.to_string()),
        ("used", format!("{} of {}{share}", human::bytes(stats.used_bytes), human::bytes(stats.budget_bytes))),
        ("  staging", staging(stats)),
        ("  quarantine", human::bytes(stats.quarantine_bytes)),
        (
            "free",
            format!(
                "{} on the filesystem; {} are always left free",
                human::bytes(stats.filesystem_free_bytes),
                human::bytes(stats.min_free_bytes)
            ),
        ),
        ("pending", pending(stats)),
        ("remote", stats.remote.clone().unwrap_or_else(|| "none".into())),
    ];
    facts.into_iter().fold(Lines::default(), |lines, (name, value)| lines.and(&format!("{name:<13} {value}")))
}

/// Returns the space of fills in words.
fn staging(stats: &cache::Stats) -> String {
    let staged = human::bytes(stats.staging_bytes);
    match stats.staging_bytes {
        0 => staged,
        _ => format!(
            "{staged} reserved; {} of interrupted downloads can be resumed",
            human::bytes(stats.resumable_bytes)
        ),
    }
}

/// Returns the pending uploads in words.
fn pending(stats: &cache::Stats) -> String {
    match stats.pending_backfills {
        0 => "no uploads".into(),
        artifacts => format!(
            "{} ({}) not yet on the remote; `modelcache backfill` uploads them",
            human::counted(artifacts, "artifact"),
            human::bytes(stats.pending_backfill_bytes)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_shown_with_the_share_used() {
        let mut stats = cache::Stats {
            dir: "/c".into(),
            lower_dir: Some("/baked".into()),
            lower_artifacts: 2,
            artifacts: 3,
            files: 12,
            leases: 1,
            pins: 0,
            budget_bytes: 14_000_000_000,
            used_bytes: 1_400_000_000,
            staging_bytes: 0,
            resumable_bytes: 0,
            quarantine_bytes: 0,
            filesystem_free_bytes: 100_000_000_000,
            min_free_bytes: 10_000_000_000,
            pending_backfills: 0,
            pending_backfill_bytes: 0,
            remote: None,
        };
        let text = stats_text(&stats).to_string();
        assert!(text.contains("lower         /baked (2 artifacts, read-only)\n"), "{text}");
        assert!(text.contains("used          1.4 GB of 14.0 GB (10 %)\n"), "{text}");
        assert!(text.ends_with("remote        none"), "{text}");
        stats.budget_bytes = 0;
        assert!(stats_text(&stats).to_string().contains("of 0 B\n"), "no share of nothing");
    }
}
