//! `stats`: shows the state of the local directory, once or as a live view.

use super::get_arguments::message_with_hint;
use super::{Session, path_text, watch};
use crate::output::Lines;
use crate::{exit, human};
use clap::Args;
use modelcache::{Error, Result, cache, settings};
use std::time::Duration;

/// Shortest interval of `--watch`: a shorter one would keep the directory busy.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Longest interval of `--watch`.
const INTERVAL_MAX: Duration = Duration::from_secs(24 * 3600);

/// Show the disk budget, the space in use, and the free space
///
/// With `--watch`, it also shows the running downloads, their rates, and the leases of all processes that use the
/// directory. On a terminal the view is redrawn in place until Ctrl-C, which ends it with exit code 0. Elsewhere each
/// interval appends lines, or with `--json` one object.
#[derive(Debug, Args)]
pub(crate) struct Stats {
    /// Repeat every INTERVAL, for example 5, 500ms or 1min; without a value every second
    #[arg(long, value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "1s", value_parser = interval)]
    pub(crate) watch: Option<Duration>,
}

/// Parses the interval of `--watch`.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = settings::parse_duration(text).map_err(message_with_hint)?;
    if (INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
        return Ok(interval);
    }
    Err(message_with_hint(Error::invalid("not between 100ms and 1d")))
}

impl Stats {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        if let Some(interval) = self.watch {
            return watch::run(session, interval).await;
        }
        let output = session.output;
        let stats = session.existing_cache()?.stats().await?;
        if output.is_json() {
            output.print_json(&stats)?;
        } else {
            output.print(&lines(facts(&stats)))?;
        }
        Ok(exit::DONE)
    }
}

/// Returns a line for each name and value.
pub(super) fn lines(facts: impl IntoIterator<Item = (&'static str, String)>) -> Lines {
    facts.into_iter().fold(Lines::default(), |lines, (name, value)| lines.and(&format!("{name:<13} {value}")))
}

/// Returns names and values of the stats, in the order in which they are shown.
pub(super) fn facts(stats: &cache::Stats) -> [(&'static str, String); 11] {
    let share = match stats.budget_bytes {
        0 => String::new(),
        budget => format!(" ({:.0} %)", stats.used_bytes as f64 * 100.0 / budget as f64),
    };
    let lower = stats.lower_dir.as_ref().map_or_else(
        || "none".into(),
        |dir| format!("{} ({}, read-only)", path_text(dir), human::counted(stats.lower_artifacts, "artifact")),
    );
    [
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
    ]
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
        let text = lines(facts(&stats)).to_string();
        assert!(text.contains("lower         /baked (2 artifacts, read-only)\n"), "{text}");
        assert!(text.contains("used          1.4 GB of 14.0 GB (10 %)\n"), "{text}");
        assert!(text.ends_with("remote        none"), "{text}");
        stats.budget_bytes = 0;
        assert!(lines(facts(&stats)).to_string().contains("of 0 B\n"), "no share of nothing");
    }

    #[test]
    fn an_interval_is_between_a_tenth_of_a_second_and_a_day() {
        assert_eq!(interval("2"), Ok(Duration::from_secs(2)));
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        for refused in ["0", "-1", "0.01", "2d", "soon", "nan", ""] {
            assert!(interval(refused).is_err(), "{refused}");
        }
    }
}
