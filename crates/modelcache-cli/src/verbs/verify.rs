//! `verify`: reads what is kept and compares it with its digests; with `--repair`, mends it.
//!
//! One line or object per artifact as soon as it is read; what is wrong with it stands below its line.

use super::Session;
use super::choice::explained;
use crate::output::{Lines, Output};
use crate::{exit, human, progress};
use clap::{Args, ValueEnum};
use modelcache::cache::{VerifyOptions, VerifyTarget, VerifyTier};
use modelcache::config::ByteBound;
use modelcache::finding::{BadPart, Finding, Verified};
use modelcache::progress::Progress;
use modelcache::{Error, Reference, Result, Tier, settings};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Read what is kept in full and compare it with its digests
///
/// Without a reference, everything. This finds what a get does not look for: bytes that changed while size and time did
/// not. A bad copy on disk is never served again; the next get, or --repair, fetches it from the next place that has it.
/// Ends with 5 if anything is wrong and was not repaired. A digest that nobody stated is the one first seen.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// NAME@VERSION, or another reference; all if there is none
    #[arg(value_name = "REF")]
    pub(crate) references: Vec<String>,
    /// Fetch again what is wrong on disk; write anew what is wrong on the remote
    #[arg(long)]
    pub(crate) repair: bool,
    /// Where to look
    #[arg(long, value_enum, default_value_t = Where::Disk)]
    pub(crate) tier: Where,
    /// Read no more than this in a second, for instance 50MB
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub(crate) limit_rate: Option<u64>,
}

/// Where to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Where {
    /// The local directory
    Disk,
    /// The remote: every object is read
    Remote,
    /// Both
    All,
}

impl From<Where> for VerifyTier {
    fn from(place: Where) -> Self {
        match place {
            Where::Disk => Self::Disk,
            Where::Remote => Self::Remote,
            Where::All => Self::All,
        }
    }
}

fn rate(text: &str) -> Result<u64, String> {
    match settings::parse_size(text).map_err(explained)? {
        ByteBound::Bytes(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("a rate is a number of bytes per second, for instance 50MB".into()),
    }
}

/// What all targets came to.
#[derive(Default)]
struct Sums {
    artifacts: usize,
    bytes: u64,
    bad_artifacts: usize,
    bad_files: usize,
    repaired: usize,
    /// References to what was found somewhere.
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
        let verification = session.cache()?.verification(options);
        let targets = verification.targets(&references).await?;
        let mut sums = Sums::default();
        for target in &targets {
            let progress = Progress::new();
            let work = verification.verify(target, &progress);
            match progress::show(output, &target.reference, &progress, work).await {
                Ok(Some(verified)) => {
                    show(output, &verified)?;
                    sums.add(&verified);
                }
                // Evicted meanwhile.
                Ok(None) if references.is_empty() => {}
                // Asked for in both places: one is enough.
                Ok(None) if self.tier == Where::All && (target.tier == Tier::Disk || sums.knows(target)) => {}
                Ok(None) => sums.fail(output, &not_there(target, self.tier == Where::All), target),
                Err(error) => sums.fail(output, &error, target),
            }
        }
        Ok(self.conclude(output, &sums, started.elapsed()))
    }

    fn conclude(&self, output: &Output, sums: &Sums, took: Duration) -> u8 {
        output.remark(&summary(sums, took));
        if sums.bad_files == 0 {
            return sums.failed.unwrap_or(exit::DONE);
        }
        let hint = match (self.repair, self.tier) {
            (true, _) => "what could not be repaired stands above with its reason; putting the artifact again mends it",
            (false, Where::Disk) => "run the same command with --repair to fetch it again now",
            (false, _) => "run the same command with --repair to write it anew",
        };
        let what = format!(
            "{} wrong in {}",
            human::counted(sums.bad_files, "file"),
            human::counted(sums.bad_artifacts, "artifact")
        );
        let error = Error::corrupt(what).hint(hint);
        if output.is_json() {
            // Machines have it in the objects.
            output.remark(error.message());
        } else {
            output.error(&error, None);
        }
        exit::code(error.kind())
    }
}

impl Sums {
    fn add(&mut self, verified: &Verified) {
        let remaining = verified.findings.iter().filter(|finding| finding.remains()).count();
        self.artifacts += usize::from(verified.key.is_some());
        self.found.insert(verified.reference.clone());
        self.bytes += verified.bytes;
        self.bad_artifacts += usize::from(remaining > 0);
        self.bad_files += remaining;
        self.repaired += verified.findings.len() - remaining;
    }

    fn knows(&self, target: &VerifyTarget) -> bool {
        self.found.contains(&target.reference)
    }

    fn fail(&mut self, output: &Output, error: &Error, target: &VerifyTarget) {
        output.error(error, Some(&target.reference));
        self.failed.get_or_insert(exit::code(error.kind()));
    }
}

fn not_there(target: &VerifyTarget, both: bool) -> Error {
    let (place, list) = match target.tier {
        Tier::Remote if both => ("neither on disk nor on the remote", "modelcache ls --remote"),
        Tier::Remote => ("not on the remote", "modelcache ls --remote"),
        _ => ("not on disk", "modelcache ls"),
    };
    Error::not_found(place).artifact(&target.reference).hint(format!("`{list}` lists what is there"))
}

fn show(output: &Output, verified: &Verified) -> Result<()> {
    if output.is_json() {
        return output.answer_json(&object(verified));
    }
    output.answer(&text(verified))
}

fn object(verified: &Verified) -> Value {
    let (name, version) = verified.key.as_ref().map(|key| (key.name.clone(), key.version.clone())).unzip();
    json!({
        "name": name,
        "version": version,
        "reference": verified.reference,
        "tier": verified.tier,
        "ok": verified.is_right(),
        "files": verified.files,
        "bytes": verified.bytes,
        "findings": verified.findings,
    })
}

fn text(verified: &Verified) -> Lines {
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
        Some(_) if finding.path.is_none() && finding.expected.is_some() => text.push_str("; in quarantine"),
        Some(tier) => text.push_str(&format!("; repaired from {tier}")),
        None if finding.withdrawn => text.push_str("; withdrawn"),
        None => {}
    }
    text
}

/// Parts by number and bytes: `part 3 (bytes 25165824-33554431)`; of many, the first.
fn parts_text(parts: &[BadPart]) -> Option<String> {
    let first = parts.first()?;
    let more = if parts.len() > 1 { format!(" and {} more", parts.len() - 1) } else { String::new() };
    Some(format!("part {} (bytes {}-{}){more}", first.index, first.start, first.end.saturating_sub(1)))
}

fn summary(sums: &Sums, took: Duration) -> String {
    let seconds = took.as_secs_f64().max(0.001);
    let rate = human::rate(sums.bytes as f64 / seconds);
    let repaired = if sums.repaired > 0 { format!(", {} repaired", sums.repaired) } else { String::new() };
    format!(
        "verified {}, {} in {} ({rate}): {} wrong{repaired}",
        human::counted(sums.artifacts, "artifact"),
        human::bytes(sums.bytes),
        human::duration(took),
        sums.bad_files
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::ArtifactKey;
    use modelcache::digest::Digest;
    use modelcache::finding::Problem;
    use modelcache::key::FilePath;

    #[test]
    fn a_finding_names_the_file_the_part_and_both_digests() {
        let key = ArtifactKey::bare("team/model@3").expect("key");
        let mut verified = Verified::new(Some(key.clone()), key.to_string(), Tier::Disk);
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
            "  w.bin: wrong bytes in part 1 (bytes 64-127) and 1 more; expected sha256 {}, found {}; withdrawn\n    get it again",
            Digest::of(b"a"),
            Digest::of(b"b")
        );
        assert!(shown.ends_with(&expected), "{shown}");
        assert!(shown.starts_with("bad       team/model@3"), "{shown}");
        assert_eq!(object(&verified)["ok"], json!(false));
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
