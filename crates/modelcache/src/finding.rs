//! The results of verifying stored files, for disk and remote alike.

use crate::digest::Digest;
use crate::error::Tier;
use crate::key::{ArtifactKey, ArtifactName, FilePath, Version};
use crate::ladder::Ladder;
use serde::Serialize;
use std::fmt;

/// A way in which stored bytes can fail verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    /// The manifest cannot be read, or does not match its own checksum.
    DamagedManifest,
    /// A file that the manifest lists as held does not exist.
    Missing,
    /// The file has another size.
    WrongSize,
    /// The file has the right size, but another digest.
    WrongBytes,
    /// The file cannot be read.
    Unreadable,
    /// Disk and remote have different content. The expected digest is the remote's, the found one that on disk.
    TiersDiffer,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DamagedManifest => "the manifest is damaged",
            Self::Missing => "missing",
            Self::WrongSize => "wrong size",
            Self::WrongBytes => "wrong bytes",
            Self::Unreadable => "cannot be read",
            Self::TiersDiffer => "this disk and the remote have different content",
        })
    }
}

/// A part of a file that has wrong bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct BadPart {
    /// The number of the part, starting at 0.
    pub index: u64,
    /// Offset of the first byte of the part.
    pub start: u64,
    /// Offset after the last byte of the part.
    pub end: u64,
}

impl BadPart {
    /// Returns part `index` of a file of `size` bytes with parts of `part_size` bytes.
    pub fn new(index: u64, part_size: u64, size: u64) -> Self {
        let start = index * part_size;
        Self { index, start, end: (start + part_size).min(size) }
    }

    /// Returns the first part at which two ladders of a file of `size` bytes differ. A ladder has no checkpoint after
    /// the last part, so that part is returned if no checkpoint differs. Returns `None` if the file has only one part,
    /// or if the part sizes differ.
    pub fn first_between(expected: &Ladder, found: &Ladder, size: u64) -> Option<Self> {
        let parts = size.div_ceil(expected.part_size().max(1));
        if parts < 2 || expected.part_size() != found.part_size() {
            return None;
        }
        let differs = |index: &u64| expected.after(*index) != found.after(*index);
        let index = (0..parts - 1).find(differs).unwrap_or(parts - 1);
        Some(Self::new(index, expected.part_size(), size))
    }
}

/// One problem of an artifact in one tier.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The path of the file in the artifact; `None` for the whole artifact, or for a blob that belongs to no artifact.
    pub path: Option<FilePath>,
    /// The problem.
    pub problem: Problem,
    /// The digest that the file should have, if it is known.
    pub expected: Option<Digest>,
    /// The digest that the file has, if it could be read.
    pub found: Option<Digest>,
    /// The parts with wrong bytes, if a ladder shows them. On the remote, only the first of them.
    pub bad_parts: Vec<BadPart>,
    /// Details for the user.
    pub detail: Option<String>,
    /// True if the bad file was withdrawn: it is no longer served.
    pub withdrawn: bool,
    /// The tier that supplied the right bytes; `None` if the problem is not repaired.
    pub repaired_from: Option<Tier>,
    /// The reason why the problem could not be repaired, or the next step for the user.
    pub remedy: Option<String>,
}

impl Finding {
    /// Returns a finding with `path` and `problem`, and no other details.
    pub fn new(path: Option<FilePath>, problem: Problem) -> Self {
        Self {
            path,
            problem,
            expected: None,
            found: None,
            bad_parts: Vec::new(),
            detail: None,
            withdrawn: false,
            repaired_from: None,
            remedy: None,
        }
    }

    /// Returns true if the problem is not repaired.
    pub fn remains(&self) -> bool {
        self.repaired_from.is_none()
    }
}

/// Result of the verification of one artifact in one tier.
#[derive(Debug, Clone, Serialize)]
#[serde(into = "VerifyReportJson")]
pub struct VerifyReport {
    /// The key of the artifact; `None` for files that belong to no known artifact.
    pub key: Option<ArtifactKey>,
    /// The reference of the artifact, or the path of files that belong to no known artifact.
    pub reference: String,
    /// The tier.
    pub tier: Tier,
    /// Number of files that were checked.
    pub files: usize,
    /// Bytes that were read and compared. A file that several artifacts share is read once.
    pub bytes: u64,
    /// The problems found.
    pub findings: Vec<Finding>,
}

impl VerifyReport {
    /// Returns a result with no files checked yet.
    pub fn new(key: Option<ArtifactKey>, reference: String, tier: Tier) -> Self {
        Self { key, reference, tier, files: 0, bytes: 0, findings: Vec::new() }
    }

    /// Returns true if no problem was found, or all were repaired.
    pub fn is_right(&self) -> bool {
        !self.findings.iter().any(Finding::remains)
    }
}

/// The serialized form of [`VerifyReport`].
#[derive(Serialize)]
struct VerifyReportJson {
    /// The name of the artifact; `None` if the data belongs to no known artifact.
    name: Option<ArtifactName>,
    /// The version of the artifact; `None` if the data belongs to no known artifact.
    version: Option<Version>,
    /// The reference of the artifact, or the path of data that belongs to no known artifact.
    reference: String,
    /// The tier that was verified.
    tier: Tier,
    /// True if no problem was found or all problems were repaired.
    ok: bool,
    /// Number of files verified.
    files: usize,
    /// Bytes read and compared. Content that several artifacts share is read once.
    bytes: u64,
    /// The problems.
    findings: Vec<Finding>,
}

impl From<VerifyReport> for VerifyReportJson {
    fn from(verified: VerifyReport) -> Self {
        let ok = verified.is_right();
        let (name, version) = verified.key.map(|key| (key.name, key.version)).unzip();
        let VerifyReport { reference, tier, files, bytes, findings, .. } = verified;
        Self { name, version, reference, tier, ok, files, bytes, findings }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ladder::LadderHasher;

    #[test]
    fn the_first_bad_part_is_the_first_at_which_two_ladders_differ() {
        let ladder = |content: &[u8]| {
            let mut hasher = LadderHasher::new(64);
            hasher.update(content);
            hasher.finish().1
        };
        let good = [7u8; 200];
        for (at, part) in [(0, 0), (63, 0), (64, 1), (191, 2), (192, 3)] {
            let mut bad = good;
            bad[at] ^= 1;
            let first = BadPart::first_between(&ladder(&good), &ladder(&bad), 200);
            assert_eq!(first, Some(BadPart::new(part, 64, 200)), "byte {at}");
        }
        assert_eq!(BadPart::new(3, 64, 200).end, 200);
        assert_eq!(
            BadPart::first_between(&ladder(b"x"), &ladder(b"y"), 1),
            None,
            "a file of one part has no separate bad part"
        );
    }
}
