//! `evict`: removes an artifact from the local disk and the remote.
//!
//! If no origin has a copy, or if tags point to the artifact, the user has to confirm, or to pass `--yes`. A dry run
//! determines this before anything is removed.

use super::Session;
use crate::output::Lines;
use crate::{exit, human};
use clap::{Args, ValueEnum};
use modelcache::cache::{EvictReport, EvictTier};
use modelcache::{Error, Reference, Result};
use std::io::{self, BufRead, IsTerminal};

/// Remove an artifact from the local disk and the remote
///
/// Asks for confirmation, or requires --yes, if no origin has a copy of the artifact, or if tags point to it. Those
/// tags are removed, too.
#[derive(Debug, Args)]
pub(crate) struct Evict {
    /// NAME@VERSION, or another reference
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
    /// Where to remove the artifact
    #[arg(long, value_enum, default_value_t = EvictTierArgument::All)]
    pub(crate) tier: EvictTierArgument,
    /// Print the copies and tags that would be removed, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask for confirmation
    #[arg(long, short)]
    pub(crate) yes: bool,
}

/// The tiers that `--tier` accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EvictTierArgument {
    /// The local disk and the remote
    All,
    /// The local directory only
    Disk,
    /// The remote only
    Remote,
}

impl From<EvictTierArgument> for EvictTier {
    fn from(tier: EvictTierArgument) -> Self {
        match tier {
            EvictTierArgument::All => Self::All,
            EvictTierArgument::Disk => Self::Disk,
            EvictTierArgument::Remote => Self::Remote,
        }
    }
}

impl Evict {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let output = session.output;
        let reference = Reference::parse(&self.reference)?;
        let cache = session.cache()?;
        let tier = self.tier.into();
        // A dry run finds the copies and the tags.
        let found = self.require_copy(cache.evict(&reference, tier, true).await?)?;
        if self.dry_run {
            if output.is_json() {
                output.print_json(&found)?;
            } else {
                let also = if found.tags.is_empty() { String::new() } else { format!(", and {}", tags(&found)) };
                output.print(&Lines::one(&format!("{}: would remove {}{also}", found.key, sizes_by_tier(&found))))?;
            }
            return Ok(exit::DONE);
        }
        if (self.may_remove_last_copy(&found) || !found.tags.is_empty()) && !self.yes {
            if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
                let alternative = if found.remote_bytes.is_some() && found.disk_bytes.is_some() {
                    ", or use --tier disk to keep the copy on the remote"
                } else {
                    ""
                };
                return Err(Error::invalid(consequences(&found))
                    .artifact(&found.key)
                    .hint(format!("add --yes to remove it{alternative}")));
            }
            output.ask(&format!("{}: {}. Continue? [y/N] ", found.key, consequences(&found)));
            if !answered_yes().await {
                output.message("nothing was removed");
                return Ok(exit::OTHER);
            }
        }
        let removed = self.require_copy(cache.evict(&reference, tier, false).await?)?;
        if output.is_json() {
            output.print_json(&removed)?;
        }
        output.message(&format!("{}: removed {}", removed.key, sizes_by_tier(&removed)));
        if !removed.tags.is_empty() {
            output.message(&format!("{}: also removed {}", removed.key, tags(&removed)));
        }
        Ok(exit::DONE)
    }

    /// Returns the report, or an error if no copy was found.
    fn require_copy(&self, report: EvictReport) -> Result<EvictReport> {
        if report.disk_bytes.is_some() || report.remote_bytes.is_some() {
            return Ok(report);
        }
        let message = match self.tier {
            EvictTierArgument::All => "neither on disk nor on the remote",
            EvictTierArgument::Disk => "not on disk",
            EvictTierArgument::Remote => "not on the remote",
        };
        let list = if self.tier == EvictTierArgument::Remote { "modelcache ls --remote" } else { "modelcache ls" };
        Err(Error::not_found(message).artifact(&report.key).hint(format!("`{list}` lists what is there")))
    }

    /// Returns true if the eviction may remove the last copy. `--tier disk` leaves the copy on the remote alone, so it
    /// never asks.
    fn may_remove_last_copy(&self, report: &EvictReport) -> bool {
        self.tier != EvictTierArgument::Disk && !report.origin_can_give_back
    }
}

/// Reads one line from the terminal and returns true for yes. End of file counts as no.
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

/// Formats the bytes on each tier: `1.2 GB on disk, 5 B on remote`.
fn sizes_by_tier(report: &EvictReport) -> String {
    let places = [(report.disk_bytes, "disk"), (report.remote_bytes, "remote")];
    let bytes = places.into_iter().filter_map(|(bytes, place)| Some(format!("{} on {place}", human::bytes(bytes?))));
    bytes.collect::<Vec<_>>().join(", ")
}

/// Returns the consequences that the user has to confirm.
fn consequences(report: &EvictReport) -> String {
    let copies = format!("the only copies ({})", sizes_by_tier(report));
    match (report.tags.len(), report.origin_can_give_back) {
        (0, _) => format!("this would delete {copies}"),
        (_, true) => format!("this would delete {} on the remote", tags(report)),
        (_, false) => format!("this would delete {copies}, and {} on the remote", tags(report)),
    }
}

/// Formats the tags: `the tag prod`, `the tags prod, stable`.
fn tags(report: &EvictReport) -> String {
    format!("the tag{} {}", if report.tags.len() == 1 { "" } else { "s" }, report.tags.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::{ArtifactKey, ErrorKind};

    fn evict(tier: EvictTierArgument) -> Evict {
        Evict { reference: "a@1".into(), tier, dry_run: false, yes: false }
    }

    fn report(disk_bytes: Option<u64>, remote_bytes: Option<u64>, origin_can_give_back: bool) -> EvictReport {
        let key = ArtifactKey::bare("a@1").expect("key");
        EvictReport { key, dry_run: false, disk_bytes, remote_bytes, origin_can_give_back, tags: Vec::new() }
    }

    #[test]
    fn only_the_last_copies_need_confirmation() {
        assert!(evict(EvictTierArgument::All).may_remove_last_copy(&report(Some(1), Some(1), false)));
        assert!(
            evict(EvictTierArgument::All).may_remove_last_copy(&report(Some(1), None, false)),
            "the last copy may be on disk"
        );
        assert!(evict(EvictTierArgument::Remote).may_remove_last_copy(&report(None, Some(1), false)));
        assert!(!evict(EvictTierArgument::All).may_remove_last_copy(&report(Some(1), Some(1), true)));
        assert!(!evict(EvictTierArgument::Disk).may_remove_last_copy(&report(Some(1), None, false)));
    }

    #[test]
    fn tags_that_would_dangle_are_named() {
        let tagged = |names: &[&str], can_give_back| {
            let tags = names.iter().map(|name| (*name).to_owned()).collect();
            EvictReport { tags, ..report(None, Some(5), can_give_back) }
        };
        assert_eq!(consequences(&tagged(&[], false)), "this would delete the only copies (5 B on remote)");
        assert_eq!(consequences(&tagged(&["prod"], true)), "this would delete the tag prod on the remote");
        let both = consequences(&tagged(&["prod", "stable"], false));
        assert!(both.ends_with("the only copies (5 B on remote), and the tags prod, stable on the remote"), "{both}");
    }

    #[test]
    fn an_artifact_without_copies_is_not_found() {
        let error = evict(EvictTierArgument::Disk).require_copy(report(None, None, false)).expect_err("nothing");
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NotFound, "a@1: not on disk"));
        assert!(
            evict(EvictTierArgument::All).require_copy(report(None, Some(0), false)).is_ok(),
            "an artifact of 0 bytes exists"
        );
    }

    #[test]
    fn bytes_are_listed_by_tier() {
        assert_eq!(sizes_by_tier(&report(Some(1_200_000_000), Some(5), false)), "1.2 GB on disk, 5 B on remote");
        assert!(is_yes("Y\n") && is_yes(" yes ") && !is_yes("") && !is_yes("n"));
    }
}
