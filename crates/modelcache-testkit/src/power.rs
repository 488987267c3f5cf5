//! Simulates a power cut: removes changes that were not synced from a folder.
//!
//! The [`ledger`](crate::ShimRun::with_ledger) of the programs that changed the folder records the files written since
//! their last sync and the names created since the last sync of their folder. Each such file may lose bytes at random:
//! a tail or a page becomes zeros while size and time stay, or the file is truncated. Each such name may disappear.
//! Synced files and names stay.
//!
//! A name that replaced another one stays: a filesystem would show the old file or the new one, never neither.

use crate::dice::Dice;
use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Effect of a power cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cut {
    /// Number of files that lost bytes.
    pub torn: usize,
    /// Number of names that disappeared.
    pub lost: usize,
}

/// The changes in a ledger that are not durable.
#[derive(Debug, Default)]
struct Undurable {
    /// Device and inode of each file.
    files: HashSet<(u64, u64)>,
    names: BTreeSet<PathBuf>,
}

impl Undurable {
    fn read(ledger: &Path) -> Self {
        let mut undurable = Self::default();
        let text = fs::read(ledger).unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines() {
            let (record, rest) = line.split_once(' ').unwrap_or((line, ""));
            let mut fields = rest.splitn(3, ' ');
            let mut number = || fields.next().and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
            match record {
                // "D device inode": written.
                "D" => drop(undurable.files.insert((number(), number()))),
                // "S device inode path": synced. A synced folder makes the names in it durable.
                "S" => {
                    undurable.files.remove(&(number(), number()));
                    let synced = fields.next().map(Path::new);
                    undurable.names.retain(|name| name.parent() != synced);
                }
                // "A": syncfs made everything durable.
                "A" => undurable = Self::default(),
                // "N path": created.
                "N" => drop(undurable.names.insert(rest.into())),
                // "R path": replaced, which leaves a file under the name in any case.
                _ => {}
            }
        }
        undurable
    }
}

/// Cuts the power. With `loses_names`, names that were not synced may disappear, too.
pub fn cut(root: &Path, ledger: &Path, loses_names: bool, dice: &mut Dice) -> io::Result<Cut> {
    let undurable = Undurable::read(ledger);
    let (mut cut, mut done) = (Cut::default(), HashSet::new());
    let mut files = Vec::new();
    list(root, &mut files)?;
    files.sort();
    for path in files {
        let metadata = fs::symlink_metadata(&path)?;
        let inode = (metadata.dev(), metadata.ino());
        if undurable.files.contains(&inode) && done.insert(inode) && tear(&path, &metadata, dice)? {
            cut.torn += 1;
        }
        if loses_names && undurable.names.contains(&path) && dice.percent(20) {
            fs::remove_file(&path)?;
            cut.lost += 1;
        }
    }
    Ok(cut)
}

/// Corrupts a file at random. Returns true if it lost bytes.
fn tear(path: &Path, metadata: &Metadata, dice: &mut Dice) -> io::Result<bool> {
    let size = metadata.len();
    let at = dice.below(size);
    if size == 0 || dice.percent(25) {
        return Ok(false);
    }
    fs::set_permissions(path, Permissions::from_mode(metadata.mode() | 0o200))?;
    let file = OpenOptions::new().write(true).open(path)?;
    match dice.below(4) {
        // A tail of zeros, a page of zeros, a truncated file, or an empty one.
        0 => zero(&file, at..size)?,
        1 => zero(&file, at / 4096 * 4096..(at / 4096 * 4096 + 4096).min(size))?,
        2 => file.set_len(at)?,
        _ => file.set_len(0)?,
    }
    // On a real disk the inode can be durable before the data is. So restore the time: it must not reveal the damage.
    file.set_times(FileTimes::new().set_modified(metadata.modified()?))?;
    file.set_permissions(metadata.permissions())?;
    Ok(true)
}

fn zero(file: &File, range: std::ops::Range<u64>) -> io::Result<()> {
    let zeros = vec![0; usize::try_from(range.end - range.start).unwrap_or_default()];
    file.write_all_at(&zeros, range.start)
}

fn list(folder: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    // The power may be cut before the folder exists.
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_dir() {
            list(&path, found)?;
        } else if metadata.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::Shim;
    use std::process::Command;

    #[test]
    fn synced_data_stays_and_unsynced_data_may_be_lost() {
        let (shim, folder) = (Shim::build().unwrap(), tempfile::tempdir().unwrap());
        let root = folder.path().join("root").canonicalize().unwrap_or_else(|_| folder.path().join("root"));
        fs::create_dir(&root).unwrap();
        let ledger = folder.path().join("ledger");
        let run = shim.count(&root).with_ledger(&ledger);
        let given = folder.path().join("given");
        fs::write(&given, vec![7; 9999]).unwrap();
        // Only the first copy is synced. The folder never is.
        let script = "cp --reflink=never ../given kept && sync --data kept && cp --reflink=never ../given risked";
        let ran = Command::new("/bin/sh").args(["-c", script]).current_dir(&root).envs(run.envs()).output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
        let read = |name: &str| fs::read(root.join(name)).unwrap_or_default();
        let (kept, risked) = (read("kept"), read("risked"));
        let times = |name: &str| fs::metadata(root.join(name)).map(|metadata| metadata.modified().unwrap()).ok();
        let before = times("risked");
        let mut dice = Dice::new(1);
        let torn = (0..100).map(|_| {
            fs::write(root.join("risked"), &risked).unwrap();
            File::open(root.join("risked")).unwrap().set_times(FileTimes::new().set_modified(before.unwrap())).unwrap();
            let cut = cut(&root, &ledger, false, &mut dice).unwrap();
            assert_eq!(read("kept"), kept);
            assert_eq!(times("risked"), before);
            assert!(cut.torn == 1 || read("risked") == risked);
            cut.torn
        });
        let torn: usize = torn.sum();
        assert!((50..100).contains(&torn), "{torn} of 100");
        let lost: usize = (0..100).map(|_| cut(&root, &ledger, true, &mut dice).unwrap().lost).sum();
        assert_eq!((lost, fs::read_dir(&root).unwrap().count()), (2, 0), "the folder was never synced");
    }
}
