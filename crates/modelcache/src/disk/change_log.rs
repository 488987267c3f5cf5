//! The change log: an ordered list of the artifacts with changed manifests, written by all processes.
//!
//! The budget record names the current log and its length. Before a manifest is changed, a line is written, and then
//! the record with the new length. A process that holds the budget lock and reads on from its last position therefore
//! learns of every change since, and possibly of changes that did not happen.
//!
//! The log may be lost: reading one that is torn, truncated or replaced returns `None`, and the caller reads the whole
//! directory again.

use super::modes;
use super::rooted::RootedPath;
use crate::digest::Digest;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes after which a new log is started. Every other process then reads the directory again, which happens once in
/// tens of thousands of changes.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// Digits of the checksum at the start of each line.
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

    /// Appends a line: the manifest of `artifact` (its folder below `artifacts/`) is about to be changed. Returns the
    /// position after it.
    ///
    /// If the line cannot be written, for instance on a full disk, returns the start of a new log instead of an error.
    pub(super) fn append(self, path: &RootedPath, artifact: &Path) -> Self {
        // A name that does not fit into a line ends the log, too.
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

    /// Returns the artifacts logged between this position and `end`, or `None` if the log is damaged or another one.
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
        let whole = text.is_empty() || text.ends_with('\n');
        let is_ours = |line: &str, name: &str| self.line(name).strip_suffix('\n') == Some(line);
        let named = |line: &str| line.get(CHECK_DIGITS + 1..).filter(|name| is_ours(line, name)).map(PathBuf::from);
        // Accept only two plain path components: another user of a shared directory may have written `..` into the log.
        let is_artifact = |path: &PathBuf| {
            let mut names = path.components().map(|component| matches!(component, std::path::Component::Normal(_)));
            (names.next(), names.next(), names.next()) == (Some(true), Some(true), None)
        };
        let named = |line: &str| named(line).filter(is_artifact);
        text.lines().map(named).collect::<Option<Vec<_>>>().filter(|_| whole)
    }

    /// Returns a line of this log. Its checksum covers the log's number, so lines of an older log are not accepted.
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
    fn reading_on_returns_the_artifacts_logged_since() {
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
        // The line of a process that died before it wrote the record is overwritten.
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
