//! The change log: an ordered list of the artifacts whose manifests were changed, written by all processes.
//!
//! The budget record names the current log and its length. Before a manifest is changed, a line is appended to the log,
//! and then the record is written with the new length. A process that holds the budget lock reads the lines after the
//! position up to which it has read before. It learns of every change since, and possibly of changes that did not
//! happen.
//!
//! The log may be lost. If it is torn, truncated or replaced, reading returns `None`, and the caller reads the whole
//! directory again.

use super::modes;
use super::rooted::RootedPath;
use crate::digest::Digest;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Size in bytes at which a new log is started. Every other process then reads the directory again, once in tens of
/// thousands of changes.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// Number of hexadecimal digits of the checksum at the start of each line.
const CHECK_DIGITS: usize = 8;

/// A position in a change log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    /// Random number that identifies the log.
    log: u64,
    /// Offset in bytes.
    bytes: u64,
}

impl Position {
    /// Returns the start of a new log, which no process has read yet.
    pub(super) fn fresh() -> Self {
        Self { log: rand::random(), bytes: 0 }
    }

    /// Appends the line of an artifact whose manifest is about to be changed, and returns the position after the line.
    /// `artifact` is its folder below `artifacts/`.
    ///
    /// If the line cannot be written, for instance on a full disk, returns the start of a new log instead of an error.
    pub(super) fn append(self, path: &RootedPath, artifact: &Path) -> Self {
        // A name that cannot be written as one line starts a new log as well.
        let Some(name) = artifact.to_str().filter(|name| !name.contains('\n')) else { return Self::fresh() };
        let at = if self.bytes < LOG_BYTES_MAX { self } else { Self::fresh() };
        let line = at.line(name);
        match modes::open_shared(path).and_then(|file| file.write_all_at(line.as_bytes(), at.bytes)) {
            Ok(()) => Self { bytes: at.bytes + line.len() as u64, ..at },
            Err(error) => {
                tracing::debug!(%error, "the change log cannot be written; starting a new one");
                Self::fresh()
            }
        }
    }

    /// Returns the artifacts logged between this position and `end`, or `None` if the log is damaged or has been
    /// replaced.
    pub(super) fn read_until(self, path: &RootedPath, end: Self) -> Option<Vec<PathBuf>> {
        // The bound limits memory if the record has a wrong length.
        let bytes =
            end.bytes.checked_sub(self.bytes).filter(|bytes| self.log == end.log && *bytes <= 2 * LOG_BYTES_MAX);
        let mut text = vec![0; usize::try_from(bytes?).ok()?];
        if !text.is_empty() {
            read_at(path, &mut text, self.bytes).ok()?;
        }
        let text = String::from_utf8(text).ok()?;
        // Each line must be complete and have its checksum, otherwise the log is torn.
        let is_complete = text.is_empty() || text.ends_with('\n');
        let is_intact = |line: &str, name: &str| self.line(name).strip_suffix('\n') == Some(line);
        let path_in = |line: &str| line.get(CHECK_DIGITS + 1..).filter(|name| is_intact(line, name)).map(PathBuf::from);
        // Accept only two normal path components: another user of a shared directory may have written `..` into the
        // log.
        let is_artifact_folder = |path: &PathBuf| {
            let mut names = path.components().map(|component| matches!(component, std::path::Component::Normal(_)));
            (names.next(), names.next(), names.next()) == (Some(true), Some(true), None)
        };
        let artifact_in = |line: &str| path_in(line).filter(is_artifact_folder);
        text.lines().map(artifact_in).collect::<Option<Vec<_>>>().filter(|_| is_complete)
    }

    /// Returns the line for `name`. The checksum covers the number of the log, so lines of an older log are not
    /// accepted.
    fn line(self, name: &str) -> String {
        let check = Digest::of(format!("{}/{name}", self.log).as_bytes()).to_string();
        format!("{} {name}\n", &check[..CHECK_DIGITS])
    }
}

fn read_at(path: &RootedPath, bytes: &mut [u8], from: u64) -> io::Result<()> {
    path.open(false)?.read_exact_at(bytes, from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn names(names: &[&str]) -> Option<Vec<PathBuf>> {
        Some(names.iter().map(PathBuf::from).collect())
    }

    #[test]
    fn reading_from_a_position_returns_the_artifacts_logged_since() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("changes");
        let start = Position::fresh();
        let one = start.append(&path, Path::new("a/1"));
        let two = one.append(&path, Path::new("b b/2"));
        assert_eq!(start.read_until(&path, start), names(&[]));
        assert_eq!(start.read_until(&path, two), names(&["a/1", "b b/2"]));
        assert_eq!(one.read_until(&path, two), names(&["b b/2"]));
        assert_eq!(two.read_until(&path, one), None, "the end is before the start");
        assert_eq!(Position::fresh().read_until(&path, two), None, "another log");
        // A process died after it appended the line of `b b/2` and before it wrote the record. The line is overwritten.
        let other = one.append(&path, Path::new("c/3"));
        assert_eq!(start.read_until(&path, other), names(&["a/1", "c/3"]));
    }

    #[test]
    fn a_truncated_or_overwritten_log_is_not_read() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("changes");
        let start = Position::fresh();
        let end = start.append(&path, Path::new("a/1")).append(&path, Path::new("b/2"));
        let whole = fs::read(path.full()).expect("reads");
        for cut in 0..whole.len() {
            fs::write(path.full(), &whole[..cut]).expect("cuts");
            assert_eq!(start.read_until(&path, end), None, "cut to {cut} bytes");
            let mut garbled = whole.clone();
            garbled[cut] ^= 1;
            fs::write(path.full(), &garbled).expect("garbles");
            assert_eq!(start.read_until(&path, end), None, "byte {cut} flipped");
        }
        path.unlink().expect("removes");
        assert_eq!(start.read_until(&path, end), None);
        // Lines of an older log are not accepted as lines of a newer one.
        fs::write(path.full(), &whole).expect("writes");
        assert_eq!(Position { log: 7, ..start }.read_until(&path, Position { log: 7, ..end }), None);
    }

    #[test]
    fn a_log_that_is_too_long_or_cannot_be_written_is_replaced() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("changes");
        let long = Position { bytes: LOG_BYTES_MAX, ..Position::fresh() };
        let next = long.append(&path, Path::new("a/1"));
        assert!(next.log != long.log && next.bytes < 100, "{next:?}");
        let start = Position::fresh();
        assert_ne!(
            start.append(&RootedPath::root(folder.path()).join("no folder/changes"), Path::new("a/1")).log,
            start.log
        );
        assert_ne!(start.append(&path, Path::new("a\n/1")).log, start.log);
    }
}
