//! The test environment: the binary with a Hub stand-in, an S3 stand-in, and a temporary folder for home and cache
//! directories.
//!
//! Each run starts with a cleared environment. [`Outcome::new`] searches the output of every run for the secrets that
//! the tests use, so a test fails if one leaks.
#![allow(unreachable_pub)]

pub mod order;
pub mod tmux;

use modelcache_testkit::{Content, FaultProxy, Hub, S3, Shim};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::signal::unix::SignalKind;

pub const MIB: u64 = 1 << 20;
pub const BIN: &str = env!("CARGO_BIN_EXE_modelcache");
pub const BUCKET: &str = "models";
/// The token that private and gated repositories require.
pub const TOKEN: &str = "hf_canaryCanaryCanary";
/// Time limit of one run. A run that exceeds it fails the test.
const PATIENCE: Duration = Duration::from_secs(60);
/// Secrets of the tests. No run may print one of them.
const SECRETS: [&str; 11] = [
    TOKEN,
    "testkit/secret+key",
    "testkit%2Fsecret",
    "canary-secret",
    "canary-session",
    // `ann:canary-secret` in base64, as in `Authorization: Basic`.
    "YW5uOmNhbmFyeS1zZWNyZXQ",
    // The signature in a presigned URL.
    "canary-signature",
    "canary-token",
    "canary-password",
    "cmVhZGVyOm9jaS1jYW5hcnktcGFzc3dvcmQ",
    "bWU6bWxmbG93LWNhbmFyeS1wYXNzd29yZA",
];

/// A test environment: both stand-ins and a temporary folder. Runs of the binary are built with [`House::on`].
pub struct House {
    pub hub: Hub,
    pub s3: S3,
    folder: TempDir,
}

/// Makes child processes independent of the umask and the ignored signals that the test process has inherited. The
/// umask becomes 022, so that other users can read new files. Signals that this process ignores, because a shell
/// started it in the background or with `nohup`, get a handler, so that child processes start with the default action.
fn reset_inherited_state() {
    static RESET: Once = Once::new();
    RESET.call_once(|| {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _context = runtime.enter();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
        for kind in [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::terminate(), SignalKind::quit()] {
            if ignored >> (kind.as_raw_value() - 1) & 1 == 1 {
                // The handler stays installed after its listener is dropped.
                drop(tokio::signal::unix::signal(kind).unwrap());
            }
        }
    });
}

impl House {
    /// An environment with an empty bucket and without repositories.
    pub fn new() -> Self {
        reset_inherited_state();
        let folder = TempDir::new().unwrap();
        let s3 = S3::start_in(folder.path().join("s3"), 0).unwrap();
        s3.bucket(BUCKET).unwrap();
        Self { hub: Hub::start_on(0).unwrap(), s3, folder }
    }

    /// An environment with the repository `org/model`: a file of more than one part, small files, and a path with
    /// special characters. Returns its commit, too.
    pub fn with_model() -> (Self, String) {
        let house = Self::new();
        let commit = house.hub.repo("org/model").commit();
        let commit = model().into_iter().fold(commit, |commit, (path, content)| commit.file(path, content));
        let commit = commit.publish().unwrap();
        (house, commit)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file below the temporary folder and returns its path.
    pub fn write(&self, name: &str, content: impl Into<Content>) -> PathBuf {
        let path = self.path(name);
        content.into().write_to(&path).unwrap();
        path
    }

    /// Builds a run with the cache directory `dir`, the Hub, and S3 as remote.
    pub fn on(&self, dir: &str) -> Run {
        self.on_local(dir).envs(self.s3.env()).env("MODEL_CACHE_REMOTE", format!("s3://{BUCKET}/cache"))
    }

    /// Builds a run with the cache directory `dir`, the Hub, and no remote.
    pub fn on_local(&self, dir: &str) -> Run {
        let mut command = Command::new(BIN);
        command.env_clear().current_dir(self.folder.path()).stdin(Stdio::null());
        Run(command)
            .env("HOME", self.path("home"))
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .env("MODEL_CACHE_DIR", self.path(dir))
            .env("MODEL_CACHE_MAX_BYTES", "1GB")
            .env("MODEL_CACHE_MIN_FREE_BYTES", "0")
            // No process works in the directory after the command has ended. durability.rs tests the other setting.
            .env("MODEL_CACHE_DURABLE", "1")
            .env("MODEL_CACHE_RETRY_DEADLINE", "3s")
            .env("MODEL_CACHE_READ_TIMEOUT", "1s")
            .env("HF_ENDPOINT", self.hub.url())
    }

    /// Publishes `team/model@1`, a file of 9 MiB, on the remote. Builds a run with the cache directory `dir` and this
    /// remote behind a proxy, which lets through 3 MiB and then stalls.
    pub fn on_stalled_remote(&self, dir: &str) -> (FaultProxy, Run) {
        self.write("file", big());
        self.on("writer").run(["put", "team/model@1", "file", "--tier", "remote"]).ok();
        let proxy = FaultProxy::start_on(self.s3.endpoint(), 0).unwrap();
        proxy.let_through(3 * MIB);
        let run = self.on(dir).env("AWS_ENDPOINT_URL", proxy.url()).env("MODEL_CACHE_READ_TIMEOUT", "10m");
        (proxy, run)
    }

    /// Returns the staging folders of `dir`: fills in progress and interrupted fills.
    pub fn staging(&self, dir: &str) -> Vec<PathBuf> {
        entries(&self.path(dir).join("staging"))
    }

    /// Returns the number of parts that the journals below the staging folder of `dir` record as written.
    pub fn marked_parts(&self, dir: &str) -> u64 {
        // A journal has a header of 16 bytes and then one byte per part.
        let below = |folder: PathBuf| files_below(&folder).into_iter().map(move |path| folder.join(path));
        let journals =
            self.staging(dir).into_iter().flat_map(below).filter(|path| path.to_string_lossy().ends_with("parts"));
        journals.flat_map(|path| fs::read(path).unwrap().into_iter().skip(16)).filter(|mark| *mark == b'1').count()
            as u64
    }

    /// Returns the references that `ls` lists for `dir`.
    #[track_caller]
    pub fn listed(&self, dir: &str) -> Vec<String> {
        self.on_local(dir).run(["ls", "--json"]).objects().iter().map(|row| text(&row["reference"])).collect()
    }

    /// Makes an empty cache directory. Commands that only read make none.
    #[track_caller]
    pub fn make_cache(&self, dir: &str) {
        self.on_local(dir).run(["get", "none@1"]).failed(3, &["none@1"]);
    }

    /// Asserts that `dir` has no artifact, complete or partial, and no staging folder.
    #[track_caller]
    pub fn assert_no_artifact_or_staging(&self, dir: &str) {
        self.assert_no_artifact(dir);
        assert_eq!(self.staging(dir), Vec::<PathBuf>::new(), "staging folders are left");
    }

    /// Asserts that `dir` has no artifact, complete or partial. The staging folder of an interrupted fill may remain.
    #[track_caller]
    pub fn assert_no_artifact(&self, dir: &str) {
        assert_eq!(self.listed(dir), [""; 0]);
        assert_eq!(
            files_below(&self.path(dir).join("artifacts")),
            Vec::<PathBuf>::new(),
            "files of a partial artifact are left"
        );
    }

    /// Returns the keys of artifacts in the bucket. Refs are left out: a get writes them before it knows whether it
    /// will succeed.
    pub fn published_keys(&self) -> Vec<String> {
        self.s3.keys(BUCKET).into_iter().filter(|key| !key.contains("/.modelcache/refs/")).collect()
    }

    /// Expires all claims in the bucket now. The claim of a killed writer otherwise expires after a minute.
    pub fn end_claims(&self) {
        let bucket = self.s3.object_path(BUCKET, "cache");
        for path in files_below(&bucket).into_iter().filter(|path| path.ends_with(".modelcache/claim")) {
            let path = bucket.join(path);
            let mut claim: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            claim["expires_at"] = 0.into();
            fs::write(&path, claim.to_string()).unwrap();
        }
    }

    /// Returns the number and the bytes of the pending uploads of `dir`.
    #[track_caller]
    pub fn pending(&self, dir: &str) -> (u64, u64) {
        let stats = self.on_local(dir).run(["stats", "--json"]).object();
        (stats["pending_backfills"].as_u64().unwrap(), stats["pending_backfill_bytes"].as_u64().unwrap())
    }

    /// Returns the S3 key of a file of `artifact` (`name/version`).
    pub fn s3_key(&self, artifact: &str, path: &str) -> String {
        format!("cache/{artifact}/{path}")
    }
}

/// The files of `org/model`.
pub fn model() -> Vec<(&'static str, Content)> {
    vec![
        ("config.json", "{\"a\": 1}".into()),
        ("empty", "".into()),
        ("model.safetensors", big()),
        ("sub dir/fé+%.txt", "odd name".into()),
    ]
}

/// Content of more than one part.
pub fn big() -> Content {
    Content::generated(1, 9 * MIB + 4321)
}

pub fn model_bytes() -> u64 {
    model().iter().map(|(_, content)| content.len()).sum()
}

/// Asserts that `folder` holds exactly the files of `org/model`, byte for byte.
#[track_caller]
pub fn assert_model(folder: &Path) {
    let expected: Vec<PathBuf> = model().iter().map(|(path, _)| PathBuf::from(path)).collect();
    assert_eq!(files_below(folder), expected);
    for (path, content) in model() {
        assert_same(&folder.join(path), &content);
    }
}

#[track_caller]
pub fn assert_same(path: &Path, content: &Content) {
    let found = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let expected = content.to_vec().unwrap();
    assert!(found == expected, "{} differs: found {} bytes, expected {}", path.display(), found.len(), expected.len());
}

/// Returns the paths of all files below `folder`, relative to it and sorted. Empty if `folder` does not exist.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![folder.to_owned()], Vec::new());
    while let Some(next) = folders.pop() {
        // The type comes from the directory entry: a lookup of its path fails if the entry has just been removed.
        for entry in fs::read_dir(&next).into_iter().flatten().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                files.push(entry.path().strip_prefix(folder).unwrap().to_owned());
            }
        }
    }
    files.sort();
    files
}

pub fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// Builder of one run of the binary.
pub struct Run(Command);

impl Run {
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    pub fn envs(mut self, pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        self.0.envs(pairs);
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.0.env_remove(name);
        self
    }

    /// Runs as the unprivileged user 65534 if the tests run as root, otherwise as the user of the tests.
    pub fn unprivileged(self) -> Self {
        if !is_root() {
            return self;
        }
        self.through(&["/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
    }

    /// Starts the binary through another program that executes it, such as `setpriv` or `prlimit`.
    pub fn through(self, words: &[&str]) -> Self {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(self.0.get_program()).args(self.0.get_args()).stdin(Stdio::null()).env_clear();
        command.envs(self.0.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(self.0.get_current_dir().unwrap());
        Self(command)
    }

    #[track_caller]
    pub fn run<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Outcome {
        self.0.args(args);
        let line = format!("{:?}", self.0.get_args().collect::<Vec<_>>());
        let started = Instant::now();
        let output = assert_cmd::Command::from_std(self.0).timeout(PATIENCE).output().unwrap();
        assert!(started.elapsed() < PATIENCE, "{line} hangs; it printed:\n{output:?}");
        Outcome::new(line, output)
    }

    /// Runs the shell commands `before` in a new mount namespace, then the binary. Root only.
    #[track_caller]
    pub fn run_after(self, before: &str, args: &[&str]) -> Outcome {
        self.script(&format!("{before}\nexec {BIN} \"$@\""), args)
    }

    /// Like [`Run::run_after`], and returns at once.
    #[track_caller]
    pub fn start_after(self, before: &str, args: &[&str]) -> Running {
        let script = format!("{before}\nexec {BIN} \"$@\"");
        let mut command = self.mount_script(&script, args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { line: script, child: command.spawn().unwrap() }
    }

    /// Runs a shell script in a new mount namespace, with the environment of this run. Root only.
    #[track_caller]
    pub fn script(self, script: &str, args: &[&str]) -> Outcome {
        let command = self.mount_script(script, args);
        Outcome::new(script.to_owned(), assert_cmd::Command::from_std(command).timeout(PATIENCE).output().unwrap())
    }

    /// Returns the command for a shell script in a new mount namespace.
    fn mount_script(self, script: &str, args: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/unshare");
        command.args(["-m", "/bin/sh", "-euc", script, "sh"]).args(args).stdin(Stdio::null()).env_clear();
        command.envs(self.0.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(self.0.get_current_dir().unwrap());
        command
    }

    /// Runs a shell script with the environment of this run.
    #[track_caller]
    pub fn shell(self, script: &str) -> Outcome {
        let mut command = Command::new("/bin/sh");
        command.args(["-euc", script]).stdin(Stdio::null()).env_clear();
        command.envs(self.0.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(self.0.get_current_dir().unwrap());
        Outcome::new(script.to_owned(), assert_cmd::Command::from_std(command).timeout(PATIENCE).output().unwrap())
    }

    /// Starts the binary and returns without waiting for its end.
    pub fn start<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Running {
        self.0.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { line: format!("{:?}", self.0.get_args().collect::<Vec<_>>()), child: self.0.spawn().unwrap() }
    }
}

/// A run in progress.
pub struct Running {
    line: String,
    child: std::process::Child,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process has executed `program`.
    #[track_caller]
    pub fn wait_until_it_is(&self, program: &str) {
        let name = || fs::read_to_string(format!("/proc/{}/comm", self.child.id())).unwrap_or_default();
        wait_until(&format!("{} becomes {program}", self.line), || name().trim_end() == program);
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for the first line on standard output and returns it.
    pub fn first_line(&mut self) -> String {
        let (stdout, mut line, mut byte) = (self.child.stdout.as_mut().unwrap(), Vec::new(), [0]);
        while stdout.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    /// Waits like [`Running::wait`], and also returns the peak resident memory in bytes. The kernel keeps the peak, so
    /// polling misses only growth in the last few milliseconds of the process.
    #[track_caller]
    pub fn wait_with_peak_memory(self) -> (Outcome, u64) {
        let status = PathBuf::from(format!("/proc/{}/status", self.child.id()));
        let (mut kib_max, end) = (0, Instant::now() + PATIENCE);
        // Between its end and the wait for it, a process has a status file without memory fields.
        while let Some(kib) = peak_kib(&fs::read_to_string(&status).unwrap()).filter(|_| Instant::now() < end) {
            kib_max = kib;
            std::thread::sleep(Duration::from_millis(1));
        }
        (self.wait(), kib_max * 1024)
    }

    /// Waits for the end of the process. Its output must fit into the pipe buffers.
    #[track_caller]
    pub fn wait(mut self) -> Outcome {
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                self.child.kill().unwrap();
                let output = self.output();
                panic!("{} hangs: {output:?}", self.line);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Outcome::new(std::mem::take(&mut self.line), self.output())
    }

    /// Returns the exit status and the output of the ended process.
    fn output(&mut self) -> Output {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let child = &mut self.child;
        let _ = child.stdout.take().map(|mut pipe| pipe.read_to_end(&mut stdout).unwrap());
        let _ = child.stderr.take().map(|mut pipe| pipe.read_to_end(&mut stderr).unwrap());
        Output { status: child.wait().unwrap(), stdout, stderr }
    }
}

impl Drop for Running {
    /// Ends a process that the test did not wait for, such as a daemon.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn peak_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB").unwrap().parse().unwrap())
}

/// Waits until `condition` holds.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Exit code and output of an ended run.
pub struct Outcome {
    line: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    #[track_caller]
    fn new(line: String, output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let outcome =
            Self { line, code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        for secret in SECRETS {
            assert!(!format!("{}{}", outcome.stdout, outcome.stderr).contains(secret), "{secret} leaks: {outcome}");
        }
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
        outcome
    }

    /// Asserts success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        // Only at the start of a line: a warning may quote a cause that contains `error:`.
        assert!(!self.stderr.lines().any(|line| line.starts_with("error:")), "{self}");
        self
    }

    /// Asserts success with exactly one existing path on standard output, and returns the path.
    #[track_caller]
    pub fn path(self) -> PathBuf {
        let outcome = self.ok();
        let path = outcome.stdout.strip_suffix('\n').unwrap_or_else(|| panic!("no path: {outcome}"));
        assert!(!path.contains('\n') && Path::new(path).is_absolute(), "not one path: {outcome}");
        assert!(Path::new(path).exists(), "the path does not exist: {outcome}");
        path.into()
    }

    /// Asserts success and that standard error contains every one of `parts`. Returns the path on standard output.
    #[track_caller]
    pub fn path_saying(self, parts: &[&str]) -> PathBuf {
        self.said(parts).path()
    }

    /// Asserts exit code `code`, empty standard output, and on standard error an error, a hint and all of `parts`.
    #[track_caller]
    pub fn failed(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        assert_eq!(self.stdout, "", "{self}");
        assert!(self.stderr.contains("error: ") && self.stderr.contains("hint: "), "no error, or no hint: {self}");
        self.said(parts)
    }

    /// Asserts that standard error contains every one of `parts`.
    #[track_caller]
    pub fn said(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not on standard error: {self}");
        }
        self
    }

    /// Asserts success with one JSON object per line on standard output, and returns the objects.
    #[track_caller]
    pub fn objects(self) -> Vec<Value> {
        let outcome = self.ok();
        outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{outcome}"))).collect()
    }

    /// Asserts success with exactly one JSON object on standard output, and returns the object.
    #[track_caller]
    pub fn object(self) -> Value {
        let shown = self.to_string();
        let mut objects = self.objects();
        assert_eq!(objects.len(), 1, "{shown}");
        objects.remove(0)
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { line, code, stdout, stderr } = self;
        write!(f, "{line} ended with {code:?}\n--- stdout\n{stdout}--- stderr\n{stderr}---")
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
}

/// Returns true if the tests may mount in a new namespace. Otherwise prints that the test is skipped.
#[allow(clippy::print_stderr)]
pub fn can_mount() -> bool {
    let mounts = Command::new("/usr/bin/unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    let can = mounts.is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("SKIPPED: mounting needs root and `unshare -m`");
    }
    can
}

/// Returns the Python environment with moto, safetensors and huggingface_hub, or prints `SKIPPED` if there is none.
pub fn venv() -> Option<PathBuf> {
    path_from_env("MODELCACHE_TEST_VENV", "Python environment (`cargo xtask test` makes one)")
}

/// Returns Debian's `docker-registry`, or prints `SKIPPED` if it is not there.
pub fn registry_program() -> Option<PathBuf> {
    path_from_env("MODELCACHE_TEST_REGISTRY", "docker-registry (`cargo xtask test` gets one)")
}

/// Returns the path in an environment variable, or prints `SKIPPED` if it is unset or empty.
#[allow(clippy::print_stderr)]
fn path_from_env(variable: &str, missing: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).filter(|name| !name.is_empty()).map(PathBuf::from);
    if named.is_none() {
        eprintln!("SKIPPED: {variable} names no {missing}");
    }
    named
}

/// Builds the fault shim. Without a C compiler it prints `SKIPPED`; in CI that is a failure.
#[allow(clippy::print_stderr)]
pub fn shim() -> Option<Shim> {
    Shim::build()
        .inspect_err(|error| {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{error:#}");
            eprintln!("SKIPPED: {error:#}");
        })
        .ok()
}
