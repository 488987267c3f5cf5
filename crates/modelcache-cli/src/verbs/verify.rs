//! `verify`: reads cached files and compares them with their digests; with `--repair`, restores damaged files.
//!
//! Prints one line or object per artifact as soon as the artifact was read. Its findings follow below that line.

use super::Session;
use super::get_arguments::message_with_hint;
use crate::output::{Lines, Output};
use crate::{exit, human, progress};
use clap::{Args, ValueEnum};
use modelcache::cache::{VerifyOptions, VerifyTarget, VerifyTier};
use modelcache::config::ByteBound;
use modelcache::finding::{BadPart, Finding, VerifyReport};
use modelcache::progress::Progress;
use modelcache::{Error, Reference, Result, Tier, settings};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Read cached files in full and compare them with their digests
///
/// Without a reference, verifies everything. Finds damage that a get does not look for: bytes that changed although
/// size and modification time did not. A damaged file on disk is never used again; the next get, or --repair, downloads
/// it from the next tier that has it. Exits with 5 if a damaged file was not repaired. A file that was published
/// without a checksum is compared with the digest of its first download.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// NAME@VERSION, or another reference; without one, all artifacts
    #[arg(value_name = "REF")]
    pub(crate) references: Vec<String>,
    /// Download damaged files on disk again, and replace damaged objects on the remote
    #[arg(long)]
    pub(crate) repair: bool,
    /// Where to verify
    #[arg(long, value_enum, default_value_t = VerifyTierArgument::Disk)]
    pub(crate) tier: VerifyTierArgument,
    /// Read at most this many bytes per second, for example 50MB
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub(crate) limit_rate: Option<u64>,
}

/// The tiers that `--tier` accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyTierArgument {
    /// The local directory
    Disk,
    /// The remote; downloads every object
    Remote,
    /// Both
    All,
}

impl From<VerifyTierArgument> for VerifyTier {
    fn from(tier: VerifyTierArgument) -> Self {
        match tier {
            VerifyTierArgument::Disk => Self::Disk,
            VerifyTierArgument::Remote => Self::Remote,
            VerifyTierArgument::All => Self::All,
        }
    }
}

/// Parses the argument of `--limit-rate`.
fn rate(text: &str) -> Result<u64, String> {
    match settings::parse_size(text).map_err(message_with_hint)? {
        ByteBound::Bytes(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("a rate is a number of bytes per second, for example 50MB".into()),
    }
}

/// The totals over all targets.
#[derive(Default)]
struct Totals {
    artifacts: usize,
    bytes: u64,
    bad_artifacts: usize,
    bad_files: usize,
    repaired: usize,
    /// The references that were found on at least one tier.
    found: BTreeSet<String>,
    /// The exit code of the first target that could not be verified.
    failed: Option<u8>,
}

impl Verify {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let output = session.output;
        let references = self.references.iter().map(|text| Reference::parse(text)).collect::<Result<Vec<_>>>()?;
        let options = VerifyOptions { tier: self.tier.into(), repair: self.repair, bytes_per_second: self.limit_rate };
        let started = Instant::now();
        let cache = if self.repair { session.cache()? } else { session.existing_cache()? };
        let verification = cache.verification(options);
        let targets = verification.targets(&references).await?;
        let mut totals = Totals::default();
        for target in &targets {
            let progress = Progress::new();
            let work = verification.verify(target, &progress);
            match progress::show(output, &target.reference, &progress, work).await {
                Ok(Some(verified)) => {
                    print_verified(output, &verified)?;
                    totals.add(&verified);
                }
                // The artifact was evicted after the list was made.
                Ok(None) if references.is_empty() => {}
                // With `--tier all`, one of the tiers is enough. The target on disk comes first, so only a miss on the
                // remote can be reported.
                Ok(None)
                    if self.tier == VerifyTierArgument::All
                        && (target.tier == Tier::Disk || totals.has_found(target)) => {}
                Ok(None) => totals.fail(output, &not_found(target, self.tier == VerifyTierArgument::All), target),
                Err(error) => totals.fail(output, &error, target),
            }
        }
        Ok(self.conclude(output, &totals, started.elapsed()))
    }

    /// Prints the summary and the error, if any, and returns the exit code.
    fn conclude(&self, output: &Output, totals: &Totals, took: Duration) -> u8 {
        output.message(&summary(totals, took));
        if totals.bad_files == 0 {
            return totals.failed.unwrap_or(exit::DONE);
        }
        let hint = match (self.repair, self.tier) {
            (true, _) => "see above why these files could not be repaired; publishing the artifact again replaces them",
            (false, VerifyTierArgument::Disk) => "add --repair to download the damaged files again now",
            (false, _) => "add --repair to replace the damaged copies",
        };
        let what = format!(
            "{} wrong in {}",
            human::counted(totals.bad_files, "file"),
            human::counted(totals.bad_artifacts, "artifact")
        );
        let error = Error::corrupt(what).hint(hint);
        if output.is_json() {
            // The JSON objects already have the findings.
            output.message(error.message());
        } else {
            output.error(&error, None);
        }
        exit::code(error.kind())
    }
}

impl Totals {
    /// Adds the outcome of one target.
    fn add(&mut self, verified: &VerifyReport) {
        let remaining = verified.findings.iter().filter(|finding| finding.remains()).count();
        self.artifacts += usize::from(verified.key.is_some());
        self.found.insert(verified.reference.clone());
        self.bytes += verified.bytes;
        self.bad_artifacts += usize::from(remaining > 0);
        self.bad_files += remaining;
        self.repaired += verified.findings.len() - remaining;
    }

    /// Returns true if the target's reference was found on an earlier tier.
    fn has_found(&self, target: &VerifyTarget) -> bool {
        self.found.contains(&target.reference)
    }

    /// Prints the error of a target that could not be verified, and records its exit code if it is the first.
    fn fail(&mut self, output: &Output, error: &Error, target: &VerifyTarget) {
        output.error(error, Some(&target.reference));
        self.failed.get_or_insert(exit::code(error.kind()));
    }
}

/// Returns the error for a reference that was not found. `both` is true for `--tier all`.
fn not_found(target: &VerifyTarget, both: bool) -> Error {
    let (message, list) = match target.tier {
        Tier::Remote if both => ("neither on disk nor on the remote", "modelcache ls --remote"),
        Tier::Remote => ("not on the remote", "modelcache ls --remote"),
        _ => ("not on disk", "modelcache ls"),
    };
    Error::not_found(message).artifact(&target.reference).hint(format!("`{list}` lists what is there"))
}

/// Prints the outcome of one target.
fn print_verified(output: &Output, verified: &VerifyReport) -> Result<()> {
    if output.is_json() {
        return output.print_json(verified);
    }
    output.print(&text(verified))
}

fn text(verified: &VerifyReport) -> Lines {
    let word = match (verified.is_right(), verified.findings.is_empty()) {
        (true, true) => "ok",
        (true, false) => "repaired",
        (false, _) => "bad",
    };
    let read = format!("{}, {} read", human::counted(verified.files, "file"), human::bytes(verified.bytes));
    let mut lines = Lines::one(&format!("{word:<8}  {}  {}: {read}", verified.reference, verified.tier));
    for finding in &verified.findings {
        lines.push(&format!("  {}", finding_text(finding)));
        finding.remedy.iter().for_each(|remedy| lines.push(&format!("    {remedy}")));
    }
    lines
}

fn finding_text(finding: &Finding) -> String {
    let mut text = match &finding.path {
        Some(path) => format!("{path}: {}", finding.problem),
        None => finding.problem.to_string(),
    };
    if let Some(parts) = parts_text(&finding.bad_parts) {
        text.push_str(&format!(" in {parts}"));
    }
    text.extend(finding.detail.as_ref().map(|detail| format!(" ({detail})")));
    text.extend(finding.expected.map(|digest| format!("; expected sha256 {digest}")));
    text.extend(finding.found.map(|digest| format!(", found {digest}")));
    match finding.repaired_from {
        // A blob that no artifact uses counts as repaired once it is in quarantine.
        Some(_) if is_blob_without_artifact(finding) => text.push_str("; in quarantine"),
        Some(tier) => text.push_str(&format!("; repaired from {tier}")),
        None if finding.withdrawn => text.push_str("; withdrawn"),
        None => {}
    }
    text
}

/// Returns true if the finding is in a blob that no artifact holds: it names no file, but expects a digest.
fn is_blob_without_artifact(finding: &Finding) -> bool {
    finding.path.is_none() && finding.expected.is_some()
}

/// Formats the first bad part and the number of others: `part 3 (bytes 25165824-33554431) and 1 more`.
fn parts_text(parts: &[BadPart]) -> Option<String> {
    let first = parts.first()?;
    let more = if parts.len() > 1 { format!(" and {} more", parts.len() - 1) } else { String::new() };
    Some(format!("part {} (bytes {}-{}){more}", first.index, first.start, first.end.saturating_sub(1)))
}

fn summary(totals: &Totals, took: Duration) -> String {
    let seconds = took.as_secs_f64().max(0.001);
    let rate = human::rate(totals.bytes as f64 / seconds);
    let repaired = if totals.repaired > 0 { format!(", {} repaired", totals.repaired) } else { String::new() };
    format!(
        "verified {}, {} in {} ({rate}): {} wrong{repaired}",
        human::counted(totals.artifacts, "artifact"),
        human::bytes(totals.bytes),
        human::duration(took),
        human::counted(totals.bad_files, "file")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::ArtifactKey;
    use modelcache::digest::Digest;
    use modelcache::finding::Problem;
    use modelcache::key::FilePath;
    use serde_json::json;

    #[test]
    fn a_finding_names_the_file_the_part_and_both_digests() {
        let key = ArtifactKey::bare("team/model@3").expect("key");
        let mut verified = VerifyReport::new(Some(key.clone()), key.to_string(), Tier::Disk);
        (verified.files, verified.bytes) = (2, 1_200_000_000);
        assert_eq!(text(&verified).to_string(), "ok        team/model@3  disk: 2 files, 1.2 GB read");
        verified.findings.push(Finding {
            expected: Some(Digest::of(b"a")),
            found: Some(Digest::of(b"b")),
            bad_parts: vec![BadPart::new(1, 64, 200), BadPart::new(3, 64, 200)],
            withdrawn: true,
            remedy: Some("get it again".into()),
            ..Finding::new(Some(FilePath::new("w.bin").expect("path")), Problem::WrongBytes)
        });
        let shown = text(&verified).to_string();
        let expected = format!(
            "  w.bin: wrong bytes in part 1 (bytes 64-127) and 1 more; expected sha256 {}, found {}; \
             withdrawn\n    get it again",
            Digest::of(b"a"),
            Digest::of(b"b")
        );
        assert!(shown.ends_with(&expected), "{shown}");
        assert!(shown.starts_with("bad       team/model@3"), "{shown}");
        assert_eq!(json!(verified)["ok"], json!(false));
        verified.findings[0].repaired_from = Some(Tier::Origin);
        let shown = text(&verified).to_string();
        assert!(shown.starts_with("repaired  ") && shown.contains("; repaired from origin"), "{shown}");
    }

    #[test]
    fn a_rate_is_a_number_of_bytes() {
        assert_eq!(rate("50MB"), Ok(50_000_000));
        assert!(rate("50%").is_err() && rate("0").is_err() && rate("fast").is_err());
    }
}
