//! Syncs downloaded files to stable storage in a separate process, after the command has printed its result.
//!
//! `get` and `exec` hand the sync of their published files to a child process. The child inherits the writer lock as
//! its standard input, so that the lock is never released in between. It runs in a session of its own and inherits no
//! other descriptor, so that no pipe or lock of the caller stays open. A few megabytes are synced at once by the
//! command itself. So are all files if no child can be started, or if the child may be killed with the container. If
//! the child is killed, the next acquire of a lease hashes the files in full.

use crate::exit;
use clap::Args;
use modelcache::cache::SyncHandoff;
use modelcache::config::{Config, Durable};
use modelcache::{Cache, Error, ErrorKind, Result};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Up to this many bytes are synced at once, because that takes no longer than starting a process.
const SYNC_NOW_BYTES_MAX: u64 = 4 << 20;

/// Sync the files that another process published to stable storage
#[derive(Debug, Args)]
pub(crate) struct Sync {
    /// Do the sync in another process, in a session of its own
    #[arg(long)]
    apart: bool,
    /// The local directory
    folder: PathBuf,
    /// The name of the writer lock, which is open as standard input
    writer: String,
}

impl Sync {
    /// Runs the hidden command. It needs no settings, because the caller passes all arguments.
    pub(crate) fn run(&self) -> Result<u8> {
        if self.apart {
            // Fails only if this process already leads a session.
            let _ = rustix::process::setsid();
            close_on_exec();
            start(&[self.folder.as_os_str(), self.writer.as_ref()], Stdio::inherit())?;
            return Ok(exit::DONE);
        }
        let lock = io::stdin().as_fd().try_clone_to_owned().map_err(not_started)?;
        modelcache::cache::make_durable_for(&self.folder, &self.writer, File::from(lock))?;
        Ok(exit::DONE)
    }
}

/// Returns the configuration of a command that ends with [`sync_or_hand_off`].
pub(super) fn with_deferred_sync(config: &Config) -> Config {
    let durable = if config.durable == Durable::Wait { Durable::Wait } else { Durable::Later };
    let mut config = config.clone();
    config.durable = durable;
    config
}

/// Syncs the files that are not on stable storage yet, or hands the sync to another process. `execs` is true if this
/// process continues as the user's command, so that its container, if any, does not end now.
pub(super) async fn sync_or_hand_off(cache: &Cache, execs: bool) {
    let bytes = cache.undurable_bytes();
    if bytes == 0 {
        return;
    }
    if bytes > SYNC_NOW_BYTES_MAX && (execs || child_outlives_parent()) {
        match hand_off(cache) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "cannot hand the sync to another process"),
        }
    }
    if let Err(error) = cache.make_durable().await {
        // Already logged. The next get hashes the files.
        tracing::debug!(%error, "sync failed");
    }
}

/// Returns true if a child outlives the process that started this command. In a container, all processes are killed
/// when its first process ends, for example the shell of an init container.
fn child_outlives_parent() -> bool {
    /// The inode number of the initial PID namespace (`PROC_PID_INIT_INO` in the kernel).
    const INITIAL_NAMESPACE: &str = "pid:[4026531836]";
    std::process::id() != 1
        && std::fs::read_link("/proc/self/ns/pid").is_ok_and(|name| name.as_os_str() == INITIAL_NAMESPACE)
}

/// Hands the sync to another process. Returns true if that process has taken it over.
fn hand_off(cache: &Cache) -> Result<bool> {
    let Some(SyncHandoff { dir, writer, lock }) = cache.hand_off()? else { return Ok(false) };
    let arguments = [std::ffi::OsStr::new("--apart"), dir.as_os_str(), writer.as_ref()];
    let mut child = start(&arguments, Stdio::from(lock))?;
    // The child starts the process that syncs, and ends at once. A command that replaces this process by `exec`
    // therefore has no unexpected child, unless it is process 1, which inherits all orphans.
    let is_handed_off = child.wait().map_err(not_started)?.success();
    if is_handed_off {
        cache.handed_off();
    }
    Ok(is_handed_off)
}

/// Starts this program as the hidden `sync` command, with the writer lock as standard input.
fn start(arguments: &[&std::ffi::OsStr], lock: Stdio) -> Result<std::process::Child> {
    // `/proc/self/exe` is this program even if its file was replaced since.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("modelcache")
        .arg("sync")
        .args(arguments)
        .current_dir("/")
        .stdin(lock)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map_err(not_started)
}

fn not_started(cause: io::Error) -> Error {
    Error::new(ErrorKind::Other, "cannot start the process that syncs the files").cause(cause)
}

/// Marks all descriptors but the standard ones close-on-exec, so that the next program keeps no pipe or lock of the
/// caller open.
#[allow(unsafe_code)]
fn close_on_exec() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
    for number in numbers.filter(|number| *number > 2) {
        // SAFETY: the descriptor is borrowed for one call that neither reads, writes nor closes it. If the number is no
        // longer open, such as that of the directory listing, the call fails without an effect.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        let _ = rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC);
    }
}
