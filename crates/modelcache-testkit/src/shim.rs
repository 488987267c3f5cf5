//! LD_PRELOAD library that kills a program, or fails one of its calls, at the n-th call that changes a folder.
//!
//! The source, `shim/shim.c`, documents which calls it sees. It is compiled on first use, which needs a C compiler. A
//! [`ShimRun`] configures one run through the environment and reads afterwards which calls the program made.
//!
//! Call numbers are valid for one run only: threads interleave differently, so the n-th call of the next run may be
//! another one. [`ShimRun::calls`] returns the calls of the actual run, including the one that failed.

use crate::dice::Dice;
use anyhow::{Context as _, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use tempfile::TempDir;

const SOURCE: &str = include_str!("../shim/shim.c");

/// The compiled library and the logs of its runs. All files are removed when it is dropped.
#[derive(Debug)]
pub struct Shim {
    folder: TempDir,
    runs: AtomicU64,
}

/// One run of a program under the shim: the environment variables that inject faults, and the log of its calls.
#[derive(Debug, Clone)]
pub struct ShimRun {
    library: PathBuf,
    log: PathBuf,
    settings: Vec<(&'static str, String)>,
}

/// A counted call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Number of the call, from 1.
    pub number: u64,
    /// The function of the C library. `create` is any call that may create or truncate a file.
    pub name: String,
    /// The file or folder. For a call with two paths, the path that it creates.
    pub path: PathBuf,
}

/// Error number for a failing call, as Linux numbers them on all but a few old platforms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the manual page errno(3) describes them")]
pub enum Errno {
    EPERM = 1,
    EINTR = 4,
    EIO = 5,
    EINVAL = 22,
    EMFILE = 24,
    ENOSPC = 28,
    EROFS = 30,
    ENOSYS = 38,
    ENOTEMPTY = 39,
    EOPNOTSUPP = 95,
    EDQUOT = 122,
}

/// How `flock` behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flock {
    /// It always succeeds without locking.
    Lies,
    /// It always fails with ENOLCK.
    Refuses,
}

impl Shim {
    /// Compiles the library. Fails without a C compiler `cc` (Debian and Ubuntu: `apt-get install gcc`).
    pub fn build() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut compiler = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-x", "c", "-", "-o"])
            .arg(library(folder.path()))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("there is no C compiler; on Debian and Ubuntu: apt-get install gcc")?;
        compiler.stdin.take().context("no way to hand the source over")?.write_all(SOURCE.as_bytes())?;
        let output = compiler.wait_with_output()?;
        ensure!(output.status.success(), "the shim does not compile: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self { folder, runs: AtomicU64::new(0) })
    }

    /// Only counts the calls that change the folder `root`, an absolute path without symbolic links.
    pub fn count(&self, root: &Path) -> ShimRun {
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        let log = self.folder.path().join(format!("{run}.log"));
        let settings = vec![("SHIM_ROOT", root.display().to_string()), ("SHIM_LOG", log.display().to_string())];
        ShimRun { library: library(self.folder.path()), log, settings }
    }

    /// Kills the program before its `n`-th counted call.
    pub fn kill_at(&self, root: &Path, n: u64) -> ShimRun {
        self.count(root).with("SHIM_KILL_AT", n)
    }

    /// Makes the `n`-th counted call fail.
    pub fn fail_at(&self, root: &Path, n: u64, errno: Errno) -> ShimRun {
        self.count(root).with("SHIM_FAIL_AT", n).with("SHIM_ERRNO", errno as i32)
    }

    /// Changes the behaviour of `flock` on every path.
    pub fn flock(&self, root: &Path, how: Flock) -> ShimRun {
        let how = match how {
            Flock::Lies => "lies",
            Flock::Refuses => "refuses",
        };
        self.count(root).with("SHIM_FLOCK", how)
    }
}

impl ShimRun {
    /// Makes every later call fail, too.
    #[must_use]
    pub fn from_then_on(self) -> Self {
        self.with("SHIM_STICKY", 1)
    }

    /// Makes [`Shim::fail_at`] count only calls of the functions `call` (names separated by commas). Threads
    /// interleave, so a number among all calls could hit any function.
    #[must_use]
    pub fn of(self, call: &str) -> Self {
        self.with("SHIM_OF", call)
    }

    /// Also counts calls that open, list and read.
    #[must_use]
    pub fn with_reads(self) -> Self {
        self.with("SHIM_READS", 1)
    }

    /// Makes the program read its boot id from `file` instead of the kernel.
    #[must_use]
    pub fn in_boot(self, file: &Path) -> Self {
        self.with("SHIM_BOOT_ID", file.display())
    }

    /// Sets the clock that counts from the boot (`CLOCK_BOOTTIME`) ahead by `seconds` for the program.
    #[must_use]
    pub fn later(self, seconds: u32) -> Self {
        self.with("SHIM_AHEAD", seconds)
    }

    /// Makes every sync wait until the file `gate` exists.
    #[must_use]
    pub fn gated(self, gate: &Path) -> Self {
        self.with("SHIM_GATE", gate.display())
    }

    /// Records in `file` the changes that a power cut may lose. Several programs may share one ledger.
    #[must_use]
    pub fn with_ledger(self, file: &Path) -> Self {
        self.with("SHIM_LEDGER", file.display())
    }

    /// Environment variables that apply the settings to a program.
    pub fn envs(&self) -> impl Iterator<Item = (String, String)> {
        let preload = ("LD_PRELOAD", self.library.display().to_string());
        self.settings.iter().cloned().chain([preload]).map(|(name, value)| (name.to_owned(), value))
    }

    /// Returns the counted calls so far, in order, including the one that was killed or failed.
    pub fn calls(&self) -> Vec<Call> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let mut calls: Vec<Call> = log.lines().filter_map(Call::parse).collect();
        calls.sort_by_key(|call| call.number);
        calls
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.settings.push((name, value.to_string()));
        self
    }
}

impl Call {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(3, ' ');
        let number = fields.next()?.parse().ok()?;
        Some(Self { number, name: fields.next()?.to_owned(), path: fields.next()?.into() })
    }

    /// Returns the kind of the call: function and path, with random and hashed names replaced by `*`. Calls of one kind
    /// differ only in the file, or the slice of it.
    pub fn kind(&self, root: &Path) -> String {
        let place = self.path.strip_prefix(root).unwrap_or(&self.path).display().to_string();
        // Random names have 16 characters, hashes at least 32, and the folders of blobs two.
        let is_random = |word: &str| word.len() == 16 || word.len() >= 32 || word.len() == 2;
        let words = place.split_inclusive(['/', '-', '.']).map(|word| {
            let bare = word.trim_end_matches(['/', '-', '.']);
            if is_random(bare) { word.replace(bare, "*") } else { word.to_owned() }
        });
        format!("{} {}", self.name, words.collect::<String>())
    }
}

/// Returns the numbers of `want` calls, in order: one call of each kind first, then others at random. Returns all if
/// there are not more than `want`.
pub fn sample(calls: &[Call], root: &Path, dice: &mut Dice, want: usize) -> Vec<u64> {
    let mut all: Vec<u64> = calls.iter().map(|call| call.number).collect();
    let mut by_kind: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for call in calls {
        by_kind.entry(call.kind(root)).or_default().push(call.number);
    }
    let mut kinds: Vec<Vec<u64>> = by_kind.into_values().collect();
    dice.shuffle(&mut kinds);
    dice.shuffle(&mut all);
    // One call of each kind first, then calls at random.
    let one_of_each = kinds.iter().map(|numbers| *dice.pick(numbers)).collect::<Vec<_>>();
    let mut chosen = BTreeSet::new();
    for number in one_of_each.into_iter().chain(all) {
        if chosen.len() < want {
            chosen.insert(number);
        }
    }
    chosen.into_iter().collect()
}

fn library(folder: &Path) -> PathBuf {
    folder.join("shim.so")
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    /// Runs a shell script in an empty folder.
    fn run(arm: impl Fn(&Shim, &Path) -> ShimRun, script: &str) -> (std::process::Output, Vec<String>, TempDir) {
        let (shim, folder) = (Shim::build().unwrap(), tempfile::tempdir().unwrap());
        let root = folder.path().canonicalize().unwrap();
        let shim_run = arm(&shim, &root);
        let output =
            Command::new("/bin/sh").args(["-c", script]).current_dir(&root).envs(shim_run.envs()).output().unwrap();
        let names = shim_run.calls().into_iter().map(|call| call.name).collect();
        (output, names, folder)
    }

    #[test]
    fn calls_below_the_root_are_counted_and_no_others() {
        let (output, names, folder) = run(|shim, root| shim.count(root), "mkdir a; : > a/f; : > /dev/null; rm a/f");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(names, ["mkdir", "create", "unlinkat"]);
        assert!(folder.path().join("a").is_dir());
    }

    #[test]
    fn the_chosen_call_is_not_made_and_the_program_dies() {
        let (output, _, folder) = run(|shim, root| shim.kill_at(root, 2), "exec mkdir a b c");
        assert_eq!(output.status.signal(), Some(9));
        assert!(folder.path().join("a").exists() && !folder.path().join("b").exists());
    }

    #[test]
    fn the_chosen_call_fails_once_or_from_then_on() {
        let once = run(|shim, root| shim.fail_at(root, 2, Errno::ENOSPC), "exec mkdir a b c");
        assert!(String::from_utf8_lossy(&once.0.stderr).contains("No space left"), "{once:?}");
        assert!(!once.2.path().join("b").exists() && once.2.path().join("c").exists());
        let sticky = run(|shim, root| shim.fail_at(root, 2, Errno::EROFS).from_then_on(), "exec mkdir a b c");
        assert!(sticky.2.path().join("a").exists() && !sticky.2.path().join("c").exists());
        let of = run(|shim, root| shim.fail_at(root, 1, Errno::ENOSPC).of("mkdir"), "> f; exec mkdir a b");
        assert!(!of.2.path().join("a").exists() && of.2.path().join("b").exists(), "the first mkdir: {of:?}");
    }

    #[test]
    fn locks_lie_or_refuse() {
        let script = "exec 9> f; flock -n 9 && (exec 8> f; flock -n 8 && echo both)";
        let lies = run(|shim, root| shim.flock(root, Flock::Lies), script).0;
        assert_eq!(String::from_utf8_lossy(&lies.stdout), "both\n");
        assert_eq!(run(|shim, root| shim.count(root), script).0.stdout, b"", "true locks conflict");
        let refuses = run(|shim, root| shim.flock(root, Flock::Refuses), script).0;
        assert!(String::from_utf8_lossy(&refuses.stderr).contains("No locks available"), "{refuses:?}");
    }

    #[test]
    fn a_sample_has_every_kind_before_it_has_one_twice() {
        let call = |number| Call {
            number,
            name: if number % 10 == 0 { "rename" } else { "write" }.into(),
            path: "/r/a".into(),
        };
        let calls: Vec<Call> = (1..=100).map(call).collect();
        let take = |want| sample(&calls, Path::new("/r"), &mut Dice::new(5), want);
        assert_eq!(take(2).iter().filter(|number| *number % 10 == 0).count(), 1);
        assert_eq!(take(30).len(), 30);
        assert_eq!(take(usize::MAX), (1..=100).collect::<Vec<_>>());
    }

    #[test]
    fn kinds_leave_out_random_names() {
        let kind = |path: &str| {
            Call { number: 1, name: "link".into(), path: Path::new("/r").join(path) }.kind(Path::new("/r"))
        };
        assert_eq!(kind("staging/new-EkLKz9vgkvATkNyH"), "link staging/new-*");
        assert_eq!(kind("locks/773232abe9343f0e102f8248423fc6ce.fill"), "link locks/*.fill");
        assert_eq!(kind(&format!("blobs/8b/{}", "8b".repeat(32))), "link blobs/*/*");
    }
}
