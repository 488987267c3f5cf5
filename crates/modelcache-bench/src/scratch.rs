//! Folders for the data of a bench: one in memory, one on the measured disk. Both are removed when the bench ends.
//!
//! If the bench is interrupted, a thread that handles the signals kills the running programs and removes the folders.
//! If the bench is killed (SIGKILL), the next bench removes them.

use super::machine::memory_bytes;
use super::usage::kill_all;
use anyhow::{Context, Result};
use modelcache_testkit::Content;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use tokio::signal::unix::{SignalKind, signal};
use xtask::repository::target_folder;

/// The folders have this name, followed by the PID of the bench.
const NAME: &str = "modelcache-bench-";
const SHARED_MEMORY: &str = "/dev/shm";
/// Memory that stays free when data is placed in memory.
const SPARE_BYTES: u64 = 4 << 30;
/// Maximum number of attempts to remove a folder in which files are created at the same time.
const REMOVE_TRIES_MAX: u32 = 100;

pub(super) struct Scratch {
    /// For served data, in memory if there is room.
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

    /// Returns a new, empty folder on disk. First writes dirty pages back, which would compete with the next program.
    pub(super) fn empty_folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.disk.join(name);
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
pub(super) fn drop_from_page_cache(file: &Path) -> Result<()> {
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

    #[test]
    fn a_folder_is_removed_while_files_are_created_in_it() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("run");
        for round in 0..200 {
            fs::create_dir_all(&folder).expect("made");
            // An attempt fails only if a file was created meanwhile, so with fewer files than attempts the last one succeeds.
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
