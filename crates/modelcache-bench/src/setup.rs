//! Input of all rows: data folders, programs, sizes and number of rounds.

use super::peers::Peers;
use super::scratch::Scratch;
use super::server_process::ServerProcess;
use super::usage::{Usage, measure, run};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) const BUCKET: &str = "models";
/// The prefix of our remote in the bucket.
const PREFIX: &str = "bench";

pub(super) struct Setup {
    pub(super) scratch: Scratch,
    pub(super) peers: Peers,
    pub(super) program: PathBuf,
    pub(super) rounds: usize,
    pub(super) quick: bool,
    pub(super) sizes: Sizes,
}

/// Amounts of data. Sizes are in bytes. Pairs are a number of files and the size of each.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Size of the large file that most rows move.
    pub(super) file: u64,
    pub(super) large_files: (usize, u64),
    pub(super) medium_files: (usize, u64),
    pub(super) small_files: (usize, u64),
    /// Size of the sparse file.
    pub(super) sparse: u64,
    /// Size of all tensors of the safetensors file.
    pub(super) tensors: u64,
    /// Bytes that the daemon sends over all connections together.
    pub(super) daemon_bytes: u64,
    /// Number of calls in one Python process.
    pub(super) calls: usize,
}

impl Sizes {
    pub(super) const FULL: Self = Self {
        file: 4 << 30,
        large_files: (16, 256 << 20),
        medium_files: (10_000, 1 << 20),
        small_files: (2000, 4 << 10),
        sparse: 100_000_000_000,
        tensors: 2 << 30,
        daemon_bytes: 1 << 30,
        calls: 10_000,
    };
    pub(super) const QUICK: Self = Self {
        file: 256 << 20,
        large_files: (16, 16 << 20),
        medium_files: (20, 1 << 20),
        small_files: (200, 4 << 10),
        sparse: 4_000_000_000,
        tensors: 256 << 20,
        daemon_bytes: 64 << 20,
        calls: 1000,
    };
}

impl Setup {
    /// Returns the folder that the server serves.
    pub(super) fn served_folder(&self) -> PathBuf {
        self.scratch.memory.join("s3")
    }

    /// Returns a command for our program on the cache directory `dir`, with a clean environment.
    pub(super) fn modelcache(&self, dir: &Path) -> Command {
        let mut command = Command::new(&self.program);
        self.set_directory(command.env_clear(), dir);
        command
    }

    /// Like [`Setup::modelcache`], with our prefix on `server` as the remote.
    pub(super) fn with_remote(&self, dir: &Path, server: &ServerProcess) -> Command {
        let mut command = self.modelcache(dir);
        set_remote(&mut command, server);
        command
    }

    /// Returns a command for a script that uses our Python package on the cache directory `dir`.
    pub(super) fn python(&self, script: &str, dir: &Path) -> Command {
        let mut command = self.peers.script(script);
        self.set_directory(&mut command, dir);
        command
    }

    /// Like [`Setup::python`], with our prefix on `server` as the remote.
    pub(super) fn python_with_remote(&self, script: &str, dir: &Path, server: &ServerProcess) -> Command {
        let mut command = self.python(script, dir);
        set_remote(&mut command, server);
        command
    }

    fn set_directory(&self, command: &mut Command, dir: &Path) {
        command.env("HOME", &self.scratch.disk).env("MODEL_CACHE_DIR", dir).env("MODEL_CACHE_MIN_FREE_BYTES", "0");
    }

    /// Publishes a file or folder in memory as an artifact, with our own put. The server discards large files, so they
    /// are then linked into the served folder. The artifact must not have been published before.
    pub(super) fn publish(&self, server: &ServerProcess, name: &str, source: &Path) -> Result<Usage> {
        let dir = self.scratch.empty_folder("put")?;
        let mut put = self.with_remote(&dir, server);
        let usage = measure(put.args(["put", &format!("{name}@1"), "--tier", "remote"]).arg(source))?;
        super::scratch::remove(&dir)?;
        let version = self.served_folder().join(BUCKET).join(PREFIX).join(name).join("1");
        for file in files_of(source)? {
            let target = version.join(file.file_name().context("a file has a name")?);
            // The server has stored the small files.
            if !target.exists() {
                link(&file, &target)?;
            }
        }
        Ok(usage)
    }

    /// Links a file or folder in memory into the served folder, as objects below `prefix/` that the peers download.
    pub(super) fn link_for_peers(&self, prefix: &str, source: &Path) -> Result<()> {
        let folder = self.served_folder().join(BUCKET).join(prefix);
        for file in files_of(source)? {
            link(&file, &folder.join(file.file_name().context("a file has a name")?))?;
        }
        Ok(())
    }

    /// Runs our `get`. Returns its usage and the path that it printed.
    pub(super) fn get(&self, command: &mut Command, reference: &str) -> Result<(Usage, PathBuf)> {
        let (used, printed) = run(command.args(["get", reference, "--quiet"]))?;
        let path = printed.lines().next().context("get printed no path")?;
        Ok((used, path.into()))
    }
}

/// Sets our prefix on a server as the remote of a command.
fn set_remote(command: &mut Command, server: &ServerProcess) {
    command.envs(server.env()).env("MODEL_CACHE_REMOTE", format!("s3://{BUCKET}/{PREFIX}"));
}

fn link(file: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(target.parent().context("an object lies in a bucket")?)?;
    fs::hard_link(file, target).with_context(|| format!("cannot link {}", target.display()))
}

/// Returns `path` if it is a file, else the files in the folder, sorted.
pub(super) fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.is_file());
    files.sort();
    Ok(files)
}

/// Fails unless `path`, a file or folder, has exactly this many bytes, so that an incomplete copy does not count.
pub(super) fn check_size(path: &Path, wanted: u64) -> Result<()> {
    let sizes = files_of(path)?.iter().map(|file| Ok(file.metadata()?.len())).collect::<Result<Vec<u64>>>()?;
    let found: u64 = sizes.iter().sum();
    ensure!(found == wanted, "{} has {found} bytes, not {wanted}", path.display());
    Ok(())
}

/// Makes a file, or a folder and its files, durable with `sync FILE…`.
pub(super) fn sync(path: &Path) -> Result<Usage> {
    let mut command = Command::new("sync");
    command.args(files_of(path)?);
    if path.is_dir() {
        command.arg(path);
    }
    measure(&mut command)
}

/// Reads a file, or the files in a folder, once in large pieces, like a model loader.
pub(super) fn read(path: &Path, direct: bool) -> Result<Usage> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("bench-read").args(direct.then_some("--direct")).args(files_of(path)?);
    measure(&mut command)
}
