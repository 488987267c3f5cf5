//! `evict`: removes artifacts from the local disk and the remote.
//!
//! If the only copies would be removed, if tags point to an artifact, or if the remote would be touched although no
//! tier was named, the user has to confirm, or to pass `--yes`. A dry run determines this before anything is removed.

use super::Session;
use crate::output::Lines;
use crate::{exit, human};
use clap::{Args, ValueEnum};
use modelcache::cache::{EvictReport, EvictTier};
use modelcache::{Cache, Error, Reference, ReferencePattern, Result};
use std::collections::BTreeSet;
use std::io::{self, BufRead, IsTerminal};

/// Remove artifacts from the local disk and the remote
///
/// Asks for confirmation, or requires --yes, if the only copies of an artifact would be removed, if tags point to it,
/// or if it would be removed from the remote and --tier is not given. An eviction from the remote also removes the tags
/// that point to the artifact.
#[derive(Debug, Args)]
pub(crate) struct Evict {
    /// NAME@VERSION, another reference, or a pattern such as 'NAME@*' for references that `ls` lists
    #[arg(required = true, value_name = "REF")]
    pub(crate) references: Vec<String>,
    /// Where to remove the artifacts [default: all]
    #[arg(long, value_enum)]
    pub(crate) tier: Option<EvictTierArgument>,
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

/// An argument: a reference, or a pattern for references.
enum EvictTarget<'a> {
    Reference(Reference),
    Pattern(&'a str, ReferencePattern),
}

impl Evict {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let output = session.output;
        // Parse every argument before anything is removed.
        let targets: Vec<_> = self.references.iter().map(|text| parse(text)).collect::<Result<_>>()?;
        let cache = session.existing_cache()?;
        let tier = self.tier.map_or(EvictTier::All, Into::into);
        let references = self.expand(session, &cache, targets).await?;
        // A dry run finds the copies and the tags.
        let (mut found, mut code) = (Vec::new(), exit::DONE);
        for reference in references {
            match cache.evict(&reference, tier, true).await {
                Ok(report) => found.push((reference, report)),
                Err(error) => fail(session, &reference, &error, &mut code),
            }
        }
        if self.dry_run {
            for (_, report) in &found {
                if output.is_json() {
                    output.print_json(report)?;
                } else {
                    let also = if report.tags.is_empty() { String::new() } else { format!(", and {}", tags(report)) };
                    let line = format!("{}: would remove {}{also}", report.key, sizes_by_tier(report));
                    output.print(&Lines::one(&line))?;
                }
            }
            return Ok(code);
        }
        let to_confirm: Vec<&EvictReport> =
            found.iter().map(|(_, report)| report).filter(|report| self.needs_confirmation(report)).collect();
        if !to_confirm.is_empty() && !self.yes {
            let line = |report: &&EvictReport| format!("{}: {}", report.key, consequences(report));
            let lines = to_confirm.iter().map(line).collect::<Vec<_>>().join("; ");
            if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
                let alternative = match to_confirm.iter().any(|report| report.disk_bytes.is_some() && !report.only_copy)
                {
                    true => "; --tier disk removes it from this machine only",
                    false => "",
                };
                return Err(Error::invalid(lines).hint(format!("--yes removes it{alternative}")));
            }
            output.ask(&format!("{lines}. Continue? [y/N] "));
            if !answered_yes().await {
                output.message("nothing was removed");
                return Ok(exit::OTHER);
            }
        }
        for (reference, _) in &found {
            match cache.evict(reference, tier, false).await {
                Ok(removed) => {
                    if output.is_json() {
                        output.print_json(&removed)?;
                    }
                    output.message(&format!("{}: removed {}", removed.key, sizes_by_tier(&removed)));
                    if !removed.tags.is_empty() {
                        output.message(&format!("{}: also removed {}", removed.key, tags(&removed)));
                    }
                }
                Err(error) => fail(session, reference, &error, &mut code),
            }
        }
        Ok(code)
    }

    /// Replaces each pattern by the references that it matches on the selected tiers.
    async fn expand(
        &self,
        session: &Session<'_>,
        cache: &Cache,
        targets: Vec<EvictTarget<'_>>,
    ) -> Result<Vec<Reference>> {
        let mut listed = BTreeSet::new();
        if targets.iter().any(|target| matches!(target, EvictTarget::Pattern(..))) {
            if self.tier != Some(EvictTierArgument::Remote) {
                listed.extend(cache.list().await?.into_iter().map(|listed| listed.reference));
            }
            if self.tier != Some(EvictTierArgument::Disk) && session.config.remote.is_some() {
                listed.extend(cache.list_remote().await?.into_iter().map(|listed| listed.reference));
            }
        }
        let mut references = Vec::new();
        for target in targets {
            match target {
                EvictTarget::Reference(reference) => references.push(reference),
                EvictTarget::Pattern(text, pattern) => {
                    let matching: Vec<_> = listed.iter().filter(|listed| pattern.matches(listed)).collect();
                    if matching.is_empty() {
                        return Err(Error::not_found(format!("no artifact matches {text:?}"))
                            .hint("`modelcache ls` and `modelcache ls --remote` list what is there"));
                    }
                    for text in matching {
                        references.push(Reference::parse(text)?);
                    }
                }
            }
        }
        Ok(references)
    }

    /// Returns true if the user has to confirm this eviction.
    fn needs_confirmation(&self, report: &EvictReport) -> bool {
        match self.tier {
            None if report.remote.is_some() => true,
            Some(EvictTierArgument::Disk) => report.only_copy,
            _ => !report.tags.is_empty() || !report.can_be_fetched_again,
        }
    }
}

/// Parses an argument. Wildcards make it a pattern; in the address of a web server, a question mark or a bracket does
/// not.
fn parse(text: &str) -> Result<EvictTarget<'_>> {
    let is_pattern = text.contains('*') || (text.contains(['?', '[']) && !text.starts_with("http"));
    Ok(if is_pattern {
        EvictTarget::Pattern(text, ReferencePattern::new(text)?)
    } else {
        EvictTarget::Reference(Reference::parse(text)?)
    })
}

/// Reports a failed eviction. The first one determines the exit code.
fn fail(session: &Session<'_>, reference: &Reference, error: &Error, code: &mut u8) {
    session.report_failure(error, Some(&reference.to_string()));
    if *code == exit::DONE {
        *code = exit::code(error.kind());
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

/// Formats the bytes on each tier: `1.2 GB on disk, 5 B on s3://models/prod`.
fn sizes_by_tier(report: &EvictReport) -> String {
    let places = [(report.disk_bytes, "disk"), (report.remote_bytes, report.remote.as_deref().unwrap_or("remote"))];
    let bytes = places.into_iter().filter_map(|(bytes, place)| Some(format!("{} on {place}", human::bytes(bytes?))));
    let shared = match report.shared_bytes {
        0 => String::new(),
        shared => format!(" ({} stay on disk: other artifacts or links use the same files)", human::bytes(shared)),
    };
    bytes.collect::<Vec<_>>().join(", ") + &shared
}

/// Returns the consequences that the user has to confirm.
fn consequences(report: &EvictReport) -> String {
    let copies = match report.can_be_fetched_again && !report.only_copy {
        true => sizes_by_tier(report),
        false => format!("the only copies ({})", sizes_by_tier(report)),
    };
    let removed = [copies, tags(report)].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>();
    format!("this would delete {}", removed.join(", and "))
}

/// Formats the tags: `the tag prod`, `the tags prod, stable`. Empty if there are none.
fn tags(report: &EvictReport) -> String {
    let plural = match report.tags.len() {
        0 => return String::new(),
        1 => "",
        _ => "s",
    };
    format!("the tag{plural} {}", report.tags.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::ArtifactKey;

    fn needs_confirmation(tier: Option<EvictTierArgument>, report: &EvictReport) -> bool {
        Evict { references: vec!["a@1".into()], tier, dry_run: false, yes: false }.needs_confirmation(report)
    }

    fn report(disk_bytes: Option<u64>, remote_bytes: Option<u64>, can_be_fetched_again: bool) -> EvictReport {
        let key = ArtifactKey::bare("a@1").expect("key");
        EvictReport {
            key,
            dry_run: true,
            disk_bytes,
            shared_bytes: 0,
            remote_bytes,
            remote: remote_bytes.map(|_| "s3://b/p".to_owned()),
            only_copy: false,
            can_be_fetched_again,
            tags: Vec::new(),
        }
    }

    #[test]
    fn the_remote_and_the_last_copies_need_confirmation() {
        use EvictTierArgument::{All, Disk, Remote};
        let only_copy = EvictReport { only_copy: true, ..report(Some(1), None, false) };
        for (tier, report, expected) in [
            (None, report(Some(1), Some(1), true), true),
            (None, report(Some(1), None, true), false),
            (None, report(Some(1), None, false), true),
            (Some(All), report(Some(1), Some(1), false), true),
            (Some(All), report(Some(1), Some(1), true), false),
            (Some(Remote), report(None, Some(1), false), true),
            (Some(Remote), report(None, Some(1), true), false),
            (Some(Disk), report(Some(1), None, false), false),
            (Some(Disk), only_copy, true),
        ] {
            assert_eq!(needs_confirmation(tier, &report), expected, "{tier:?} {report:?}");
        }
        let tagged = EvictReport { tags: vec!["prod".into()], ..report(None, Some(5), true) };
        assert!(needs_confirmation(Some(Remote), &tagged));
    }

    #[test]
    fn the_consequences_name_the_remote_and_the_tags() {
        let tagged = |names: &[&str], can_be_fetched_again| {
            let tags = names.iter().map(|name| (*name).to_owned()).collect();
            EvictReport { tags, ..report(Some(1_200_000_000), Some(5), can_be_fetched_again) }
        };
        let says = |report: EvictReport| consequences(&report);
        assert_eq!(says(tagged(&[], true)), "this would delete 1.2 GB on disk, 5 B on s3://b/p");
        assert_eq!(
            says(tagged(&["prod"], true)),
            "this would delete 1.2 GB on disk, 5 B on s3://b/p, and the tag prod"
        );
        let only = "this would delete the only copies (1.2 GB on disk, 5 B on s3://b/p), and the tags prod, stable";
        assert_eq!(says(tagged(&["prod", "stable"], false)), only);
        assert!(is_yes("Y\n") && is_yes(" yes ") && !is_yes("") && !is_yes("n"));
    }

    #[test]
    fn wildcards_make_a_pattern_unless_they_belong_to_a_web_address() {
        for (text, expected) in [("m@*", true), ("m@[12]", true), ("m@1", false), ("https://h/x?v=1", false)] {
            assert_eq!(matches!(parse(text), Ok(EvictTarget::Pattern(..))), expected, "{text}");
        }
    }
}
