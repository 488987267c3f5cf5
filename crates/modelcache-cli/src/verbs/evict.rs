//! `evict`: removes an artifact from disk and the remote.
//!
//! Before bytes go that no origin can give back, a person is asked, or `--yes` must be given; so a first look decides.

use super::{Session, extend, key_object};
use crate::output::Lines;
use crate::{exit, human};
use clap::{Args, ValueEnum};
use modelcache::cache::{EvictReport, EvictTier};
use modelcache::{Error, Reference, Result};
use serde_json::{Value, json};
use std::io::{self, BufRead, IsTerminal};

/// Remove an artifact from disk and the remote
///
/// Asks, or needs --yes, before it removes what no origin can give back, or what tags point to. Those tags go with it.
#[derive(Debug, Args)]
pub(crate) struct Evict {
    /// NAME@VERSION, or another reference
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
    /// Where to remove it
    #[arg(long, value_enum, default_value_t = Where::All)]
    pub(crate) tier: Where,
    /// Only tell what would go
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

/// Where to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Where {
    /// Disk and remote
    All,
    /// The local directory only
    Disk,
    /// The remote only
    Remote,
}

impl From<Where> for EvictTier {
    fn from(tier: Where) -> Self {
        match tier {
            Where::All => Self::All,
            Where::Disk => Self::Disk,
            Where::Remote => Self::Remote,
        }
    }
}

impl Evict {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let output = session.output;
        let reference = Reference::parse(&self.reference)?;
        let cache = session.cache()?;
        let tier = self.tier.into();
        let found = self.found(cache.evict(&reference, tier, true).await?)?;
        if self.dry_run {
            if output.is_json() {
                output.answer_json(&report_object(&found, true))?;
            } else {
                let also = if found.tags.is_empty() { String::new() } else { format!(", and {}", tags(&found)) };
                output.answer(&Lines::one(&format!("{}: would remove {}{also}", found.key, what(&found))))?;
            }
            return Ok(exit::DONE);
        }
        if (self.is_for_good(&found) || !found.tags.is_empty()) && !self.yes {
            if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
                let keep = if found.remote_bytes.is_some() && found.disk_bytes.is_some() {
                    ", or --tier disk to keep what is on the remote"
                } else {
                    ""
                };
                return Err(Error::invalid(why_asked(&found))
                    .artifact(&found.key)
                    .hint(format!("add --yes to remove it all the same{keep}")));
            }
            output.ask(&format!("Remove {}: {}. Remove it? [y/N] ", found.key, why_asked(&found)));
            if !answered_yes().await {
                output.remark("nothing was removed");
                return Ok(exit::OTHER);
            }
        }
        let removed = self.found(cache.evict(&reference, tier, false).await?)?;
        if output.is_json() {
            output.answer_json(&report_object(&removed, false))?;
        }
        output.remark(&format!("{}: removed {}", removed.key, what(&removed)));
        if !removed.tags.is_empty() {
            output.remark(&format!("{}: removed, too, what pointed to it: {}", removed.key, tags(&removed)));
        }
        Ok(exit::DONE)
    }

    /// The report, unless there was nothing.
    fn found(&self, report: EvictReport) -> Result<EvictReport> {
        if report.disk_bytes.is_some() || report.remote_bytes.is_some() {
            return Ok(report);
        }
        let place = match self.tier {
            Where::All => "neither on disk nor on the remote",
            Where::Disk => "not on disk",
            Where::Remote => "not on the remote",
        };
        let list = if self.tier == Where::Remote { "modelcache ls --remote" } else { "modelcache ls" };
        Err(Error::not_found(place).artifact(&report.key).hint(format!("`{list}` lists what is there")))
    }

    /// With `--tier disk` a person has said that the remote's copy stays; otherwise the last copy may go.
    fn is_for_good(&self, report: &EvictReport) -> bool {
        self.tier != Where::Disk && !report.origin_can_give_back
    }
}

/// Reads one line from the terminal; its end is a no.
async fn answered_yes() -> bool {
    let line = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    matches!(line.await, Ok(Ok(line)) if is_yes(&line))
}

fn is_yes(line: &str) -> bool {
    matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

fn what(report: &EvictReport) -> String {
    let places = [(report.disk_bytes, "disk"), (report.remote_bytes, "remote")];
    let bytes = places.into_iter().filter_map(|(bytes, place)| Some(format!("{} on {place}", human::bytes(bytes?))));
    bytes.collect::<Vec<_>>().join(", ")
}

/// Why a person is asked first.
fn why_asked(report: &EvictReport) -> String {
    let lost = format!("nothing can give {} back", what(report));
    match (report.tags.len(), report.origin_can_give_back) {
        (0, _) => lost,
        (_, true) => format!("{} on the remote would go with it", tags(report)),
        (_, false) => format!("{lost}, and {} on the remote would go with it", tags(report)),
    }
}

/// `the tag prod`, `the tags prod, stable`.
fn tags(report: &EvictReport) -> String {
    format!("the tag{} {}", if report.tags.len() == 1 { "" } else { "s" }, report.tags.join(", "))
}

fn report_object(report: &EvictReport, dry_run: bool) -> Value {
    let about = json!({
        "disk_bytes": report.disk_bytes,
        "remote_bytes": report.remote_bytes,
        "origin_can_give_back": report.origin_can_give_back,
        "tags": report.tags,
        "dry_run": dry_run,
    });
    extend(key_object(&report.key), about)
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::{ArtifactKey, ErrorKind};

    fn evict(tier: Where) -> Evict {
        Evict { reference: "a@1".into(), tier, dry_run: false, yes: false }
    }

    fn report(disk_bytes: Option<u64>, remote_bytes: Option<u64>, origin_can_give_back: bool) -> EvictReport {
        let key = ArtifactKey::bare("a@1").expect("key");
        EvictReport { key, disk_bytes, remote_bytes, origin_can_give_back, tags: Vec::new() }
    }

    #[test]
    fn only_what_nothing_can_give_back_is_asked_about() {
        assert!(evict(Where::All).is_for_good(&report(Some(1), Some(1), false)));
        assert!(evict(Where::All).is_for_good(&report(Some(1), None, false)), "the last copy may be on disk");
        assert!(evict(Where::Remote).is_for_good(&report(None, Some(1), false)));
        assert!(!evict(Where::All).is_for_good(&report(Some(1), Some(1), true)));
        assert!(!evict(Where::Disk).is_for_good(&report(Some(1), None, false)));
    }

    #[test]
    fn tags_that_would_dangle_are_named() {
        let tagged = |names: &[&str], can_give_back| {
            let tags = names.iter().map(|name| (*name).to_owned()).collect();
            EvictReport { tags, ..report(None, Some(5), can_give_back) }
        };
        assert_eq!(why_asked(&tagged(&[], false)), "nothing can give 5 B on remote back");
        assert_eq!(why_asked(&tagged(&["prod"], true)), "the tag prod on the remote would go with it");
        let both = why_asked(&tagged(&["prod", "stable"], false));
        assert!(both.ends_with("back, and the tags prod, stable on the remote would go with it"), "{both}");
    }

    #[test]
    fn nothing_there_is_not_found() {
        let error = evict(Where::Disk).found(report(None, None, false)).expect_err("nothing");
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NotFound, "a@1: not on disk"));
        assert!(evict(Where::All).found(report(None, Some(0), false)).is_ok(), "an empty artifact is something");
    }

    #[test]
    fn bytes_are_named_by_place() {
        assert_eq!(what(&report(Some(1_200_000_000), Some(5), false)), "1.2 GB on disk, 5 B on remote");
        assert!(is_yes("Y\n") && is_yes(" yes ") && !is_yes("") && !is_yes("n"));
    }
}
