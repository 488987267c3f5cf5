//! The change log: which artifacts' manifests were changed, in the order in which it happened, by any process.
//!
//! It lies beside the budget record, and the record says which log it is and how long. A name is written, and the record
//! with the new length, before the manifest is changed: whoever holds the budget and reads on from where it last read
//! learns of every change since, and of some that did not happen. Losing the log loses nothing: what is torn, cut off or
//! another log is answered with `None`, and the directory is read anew.

use super::modes;
use super::rooted::RootedPath;
use crate::digest::Digest;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes after which a new log is begun; everybody else then reads the directory anew, once in tens of thousands of
/// changes.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// Digits of the checksum that each line begins with.
const CHECK_DIGITS: usize = 8;

/// A place in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    /// Which log.
    log: u64,
    /// Its bytes up to here.
    bytes: u64,
}

impl Position {
    /// The start of a log that nobody has read.
    pub(super) fn fresh() -> Self {
        Self { log: rand::random(), bytes: 0 }
    }

    /// Writes that the manifest of `artifact`, its folder below `artifacts/`, is about to be changed; the position after.
    ///
    /// Where it cannot be written, as on a full disk that is being emptied, the log ends, and nothing else.
    pub(super) fn note(self, path: &RootedPath, artifact: &Path) -> Self {
        let Some(name) = artifact.to_str().filter(|name| !name.contains('\n')) else { return Self::fresh() };
        let at = if self.bytes < LOG_BYTES_MAX { self } else { Self::fresh() };
        let line = at.line(name);
        match modes::open_shared(path).and_then(|file| file.write_all_at(line.as_bytes(), at.bytes)) {
            Ok(()) => Self { bytes: at.bytes + line.len() as u64, ..at },
            Err(error) => {
                tracing::debug!(%error, "the change log cannot be written; a new one is begun");
                Self::fresh()
            }
        }
    }

    /// The artifacts noted from here to `end`; `None` if the log does not tell.
    pub(super) fn until(self, path: &RootedPath, end: Self) -> Option<Vec<PathBuf>> {
        let bytes =
            end.bytes.checked_sub(self.bytes).filter(|bytes| self.log == end.log && *bytes <= 2 * LOG_BYTES_MAX);
        let mut text = vec![0; usize::try_from(bytes?).ok()?];
        if !text.is_empty() {
            read_at(path, &mut text, self.bytes).ok()?;
        }
        let text = String::from_utf8(text).ok()?;
        let whole = text.is_empty() || text.ends_with('\n');
        let is_ours = |line: &str, name: &str| self.line(name).strip_suffix('\n') == Some(line);
        let named = |line: &str| line.get(CHECK_DIGITS + 1..).filter(|name| is_ours(line, name)).map(PathBuf::from);
        // A folder below `artifacts/` is two names: another user of a shared directory may have written something else.
        let is_artifact = |path: &PathBuf| {
            let mut names = path.components().map(|component| matches!(component, std::path::Component::Normal(_)));
            (names.next(), names.next(), names.next()) == (Some(true), Some(true), None)
        };
        let named = |line: &str| named(line).filter(is_artifact);
        text.lines().map(named).collect::<Option<Vec<_>>>().filter(|_| whole)
    }

    /// A line of this log; one of an older log has another checksum.
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
    fn whoever_reads_on_learns_what_was_noted_since() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("changes");
        let start = Position::fresh();
        let one = start.note(&path, Path::new("a/1"));
        let two = one.note(&path, Path::new("b b/2"));
        assert_eq!(start.until(&path, start), names(&[]));
        assert_eq!(start.until(&path, two), names(&["a/1", "b b/2"]));
        assert_eq!(one.until(&path, two), names(&["b b/2"]));
        assert_eq!(two.until(&path, one), None, "nobody reads backwards");
        assert_eq!(Position::fresh().until(&path, two), None, "another log");
        // Whoever died before it wrote the record is written over.
        let other = one.note(&path, Path::new("c/3"));
        assert_eq!(start.until(&path, other), names(&["a/1", "c/3"]));
    }

    #[test]
    fn a_log_that_was_cut_or_overwritten_says_so() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("changes");
        let start = Position::fresh();
        let end = start.note(&path, Path::new("a/1")).note(&path, Path::new("b/2"));
        let whole = fs::read(path.full()).expect("reads");
        for cut in 0..whole.len() {
            fs::write(path.full(), &whole[..cut]).expect("cuts");
            assert_eq!(start.until(&path, end), None, "cut to {cut} bytes");
            let mut garbled = whole.clone();
            garbled[cut] ^= 1;
            fs::write(path.full(), &garbled).expect("garbles");
            assert_eq!(start.until(&path, end), None, "byte {cut} flipped");
        }
        path.unlink().expect("removes");
        assert_eq!(start.until(&path, end), None);
        // The lines of an older log are none of a newer one's, wherever they lie.
        fs::write(path.full(), &whole).expect("writes");
        assert_eq!(Position { log: 7, ..start }.until(&path, Position { log: 7, ..end }), None);
    }

    #[test]
    fn a_log_that_is_long_or_cannot_be_written_ends() {
        let folder = tempfile::tempdir().expect("folder");
        let path = RootedPath::root(folder.path()).join("changes");
        let long = Position { bytes: LOG_BYTES_MAX, ..Position::fresh() };
        let next = long.note(&path, Path::new("a/1"));
        assert!(next.log != long.log && next.bytes < 100, "{next:?}");
        let start = Position::fresh();
        assert_ne!(
            start.note(&RootedPath::root(folder.path()).join("no folder/changes"), Path::new("a/1")).log,
            start.log
        );
        assert_ne!(start.note(&path, Path::new("a\n/1")).log, start.log);
    }
}
