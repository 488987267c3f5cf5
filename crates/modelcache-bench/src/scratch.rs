//! Folders for the data of a bench: one in memory, one on the measured disk. Both are removed when the bench ends.
//!
//! If the bench is interrupted, a thread that handles the signals kills the running programs and removes the folders.
//! If the bench is killed (SIGKILL), the next bench removes them.

use super::machine::memory_bytes;
use super::usage::kill_all;
use anyhow::{Context, Result, ensure};
use modelcache_testkit::Content;
use modelcache_testkit::folder::syncing;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use xtask::repository::target_folder;

/// The folders have this name, followed by the PID of the bench.
const NAME: &str = "modelcache-bench-";
const SHARED_MEMORY: &str = "/dev/shm";
/// Memory that stays free when data is placed in memory.
const SPARE_BYTES: u64 = 4 << 30;
/// Maximum number of attempts to remove a folder in which files are created at the same time.
const REMOVE_TRIES_MAX: u32 = 100;
/// Longest wait until the files of a `get` are durable.
const SYNC_WAIT_MAX: Duration = Duration::from_secs(120);
/// Time between two polls.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

pub(super) struct Scratch {
    /// For served data.
    pub(super) memory: PathBuf,
    /// For downloaded data.
    pub(super) disk: PathBuf,
    /// True if `memory` is in memory; otherwise it is on the disk.
    pub(super) in_memory: bool,
}

impl Scratch {
    /// Creates the folders, in memory if there is room for `bytes` of served data.
    pub(super) fn new(bytes: u64) -> Result<Self> {
        let target = target_folder()?;
        let name = format!("{NAME}{}", std::process::id());
        [Path::new(SHARED_MEMORY), &target].into_iter().for_each(remove_leftovers);
        let in_memory = room_in_memory() > bytes + SPARE_BYTES;
        let disk = target.join(&name);
        let memory = if in_memory { Path::new(SHARED_MEMORY).join(name) } else { disk.join("served") };
        for folder in [&disk, &memory] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let scratch = Self { memory, disk, in_memory };
        clean_up_when_interrupted([scratch.memory.clone(), scratch.disk.clone()])?;
        Ok(scratch)
    }

    /// Creates a file of `bytes` random bytes to be served.
    pub(super) fn data(&self, name: &str, seed: u64, bytes: u64) -> Result<PathBuf> {
        let path = self.memory.join(name);
        Content::generated(seed, bytes).write_to(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Returns a new, empty folder on disk. First waits for the background syncs of earlier programs and writes dirty
    /// pages back.
    pub(super) fn fresh(&self, name: &str) -> Result<PathBuf> {
        let folder = self.disk.join(name);
        wait_for_syncing(&self.disk)?;
        remove(&folder)?;
        rustix::fs::sync();
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = remove(&self.memory);
        let _ = remove(&self.disk);
    }
}

/// Waits until no background sync of our `get` runs below `folder`. It would compete with the next program.
fn wait_for_syncing(folder: &Path) -> Result<()> {
    let began = Instant::now();
    while !syncing(folder)?.is_empty() {
        ensure!(
            began.elapsed() < SYNC_WAIT_MAX,
            "the background sync below {} has not ended after {SYNC_WAIT_MAX:?}",
            folder.display()
        );
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// Removes a folder if it exists, including files that another process creates in it meanwhile.
pub(super) fn remove(folder: &Path) -> Result<()> {
    let mut tries = 0;
    loop {
        tries += 1;
        match fs::remove_dir_all(folder) {
            // A file was created after the folder was listed.
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && tries < REMOVE_TRIES_MAX => {}
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", folder.display()));
            }
            _ => return Ok(()),
        }
    }
}

/// Drops a file from the page cache. Syncs it first, because dirty pages are not dropped.
pub(super) fn drop_cached(file: &Path) -> Result<()> {
    let file = fs::File::open(file)?;
    file.sync_all()?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

fn clean_up_when_interrupted(folders: [PathBuf; 2]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::spawn(move || {
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            kill_all();
            folders.iter().for_each(|folder| drop(remove(folder)));
            std::process::exit(130);
        });
    });
    Ok(())
}

/// Removes the folders in `parent` of benches that no longer run.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(NAME)?.parse::<u32>().ok());
        if owner.is_some_and(|owner| !Path::new(&format!("/proc/{owner}")).exists()) {
            let _ = remove(&entry.path());
        }
    }
}

/// Returns the bytes that a folder in memory may take: the free space of [`SHARED_MEMORY`], or the available memory if
/// that is less.
fn room_in_memory() -> u64 {
    let Ok(filesystem) = rustix::fs::statvfs(SHARED_MEMORY) else { return 0 };
    (filesystem.f_bavail * filesystem.f_frsize).min(memory_bytes("MemAvailable"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn a_background_sync_is_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        // A script named `sync`, so that its command line looks like that of our background sync.
        fs::write(folder.path().join("sync"), "read line").expect("written");
        let mut command = Command::new("sh");
        command.arg0("modelcache").arg("sync").arg(folder.path().join("cache")).current_dir(&folder);
        let mut process = command.stdin(Stdio::piped()).spawn().expect("runs");
        let found = || syncing(folder.path()).expect("processes");
        // A process that has just started has no command line for a moment.
        let began = Instant::now();
        while found().is_empty() && began.elapsed() < SYNC_WAIT_MAX {
            thread::sleep(POLL_INTERVAL);
        }
        assert_eq!(found(), [process.id()]);
        assert!(syncing(&folder.path().join("other")).expect("processes").is_empty());
        let end = process.stdin.take();
        thread::scope(|scope| {
            scope.spawn(|| {
                drop(end);
                process.wait().expect("ends");
            });
            wait_for_syncing(folder.path()).expect("ends");
        });
        assert!(found().is_empty());
    }

    #[test]
    fn a_folder_is_removed_while_files_are_created_in_it() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("run");
        for round in 0..200 {
            fs::create_dir_all(&folder).expect("made");
            // Fewer files than attempts: each failed attempt met a file that was created meanwhile.
            let files: Vec<_> = (1..REMOVE_TRIES_MAX).map(|number| folder.join(number.to_string())).collect();
            let (began, beginning) = std::sync::mpsc::channel();
            let writer = std::thread::spawn(move || {
                files.iter().all(|file| fs::write(file, "").is_ok() && began.send(()).is_ok())
            });
            beginning.recv().expect("it writes");
            remove(&folder).unwrap_or_else(|error| panic!("round {round}: {error:#}"));
            writer.join().expect("no panic");
            assert!(!folder.exists(), "round {round}");
        }
    }
}
