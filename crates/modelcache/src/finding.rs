//! What a check of stored bytes found: words that disk and remote share.

use crate::digest::Digest;
use crate::error::Tier;
use crate::key::{ArtifactKey, FilePath};
use crate::ladder::Ladder;
use serde::Serialize;
use std::fmt;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    /// The manifest cannot be read, or does not match its own checksum.
    DamagedManifest,
    /// A file that the manifest calls held is not there.
    Missing,
    /// It has another size.
    WrongSize,
    /// It has the right size and another digest.
    WrongBytes,
    /// Reading it fails.
    Unreadable,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DamagedManifest => "the manifest is damaged",
            Self::Missing => "missing",
            Self::WrongSize => "wrong size",
            Self::WrongBytes => "wrong bytes",
            Self::Unreadable => "cannot be read",
        })
    }
}

/// A part of a file whose bytes are wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct BadPart {
    /// Its number, from 0.
    pub index: u64,
    /// Offset of its first byte.
    pub start: u64,
    /// Offset behind its last byte.
    pub end: u64,
}

impl BadPart {
    /// Part `index` of a file of `size` bytes in parts of `part_size`.
    pub fn new(index: u64, part_size: u64, size: u64) -> Self {
        let start = index * part_size;
        Self { index, start, end: (start + part_size).min(size) }
    }

    /// The first part at which two ladders of a file of `size` bytes differ; the last one where none does.
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

/// One thing that is wrong with an artifact in one tier.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The file; `None` where it is the whole artifact, or a blob that no artifact names.
    pub path: Option<FilePath>,
    /// What is wrong.
    pub problem: Problem,
    /// The digest that it has to have.
    pub expected: Option<Digest>,
    /// The digest that it has, where it could be read.
    pub found: Option<Digest>,
    /// The parts that are wrong, where a ladder tells. On the remote, the first of them.
    pub bad_parts: Vec<BadPart>,
    /// More about it, for a person.
    pub detail: Option<String>,
    /// Whether the bad copy was taken out of service: it is not lent any more.
    pub withdrawn: bool,
    /// Where the right bytes were taken from, once it is repaired.
    pub repaired_from: Option<Tier>,
    /// Why it could not be repaired, or what to do about it.
    pub remedy: Option<String>,
}

impl Finding {
    /// `problem` with nothing more known.
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

    /// Whether it is still so.
    pub fn remains(&self) -> bool {
        self.repaired_from.is_none()
    }
}

/// What a check of one artifact in one tier came to.
#[derive(Debug, Clone, Serialize)]
pub struct Verified {
    /// Which artifact; `None` for what belongs to none that can be named.
    pub key: Option<ArtifactKey>,
    /// The reference that leads to it, or the place where it lies.
    pub reference: String,
    /// Where it was checked.
    pub tier: Tier,
    /// Files that were looked at.
    pub files: usize,
    /// Bytes that were read and compared. What several artifacts share is read once.
    pub bytes: u64,
    /// What is wrong; empty if nothing is.
    pub findings: Vec<Finding>,
}

impl Verified {
    /// Nothing looked at yet.
    pub fn new(key: Option<ArtifactKey>, reference: String, tier: Tier) -> Self {
        Self { key, reference, tier, files: 0, bytes: 0, findings: Vec::new() }
    }

    /// Whether nothing is wrong, or nothing any more.
    pub fn is_right(&self) -> bool {
        !self.findings.iter().any(Finding::remains)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ladder::LadderHasher;

    #[test]
    fn the_first_bad_part_is_where_two_ladders_part_ways() {
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
        assert_eq!(BadPart::first_between(&ladder(b"x"), &ladder(b"y"), 1), None, "one part needs no name");
    }
}
