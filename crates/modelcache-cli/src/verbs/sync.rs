//! What was fetched becomes durable after the command has answered: in a process of its own, which nobody waits for.
//!
//! `get` and `exec` leave what they published to a child. It is given the lock that says that somebody has the duty as
//! its standard input, so that there is no moment in which nobody holds it; it has a session of its own and no other
//! descriptor, so that neither a pipe nor a lock of the caller's stays open for its sake. Little is made durable at
//! once, and so is everything where a child cannot be started or may die with a container. If it is killed,
//! the next lend reads the files in full.

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

/// What is made durable at once: it costs no more than a process does.
const AT_ONCE_BYTES: u64 = 4 << 20;

/// Make durable what another process published
#[derive(Debug, Args)]
pub(crate) struct Sync {
    /// Start another process that does it, apart from whoever started this one
    #[arg(long)]
    apart: bool,
    /// The local directory
    folder: PathBuf,
    /// The name of the lock that is standard input
    writer: String,
}

impl Sync {
    /// Needs no settings: what is to be done is said by whoever started it.
    pub(crate) fn run(&self) -> Result<u8> {
        if self.apart {
            // Fails only where this is a session's first process already.
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

/// The configuration of a command that ends by [`leave`]ing its duties.
pub(super) fn later(config: &Config) -> Config {
    let durable = if config.durable == Durable::Wait { Durable::Wait } else { Durable::Later };
    Config { durable, ..config.clone() }
}

/// Leaves what is not durable yet to another process. `goes_on`: this process becomes another one and does not end.
pub(super) async fn leave(cache: &Cache, goes_on: bool) {
    let bytes = cache.undurable_bytes();
    if bytes == 0 {
        return;
    }
    if bytes > AT_ONCE_BYTES && (goes_on || outlives_its_parent()) {
        match hand_off(cache) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "no process to leave it to"),
        }
    }
    if let Err(error) = cache.make_durable().await {
        // Told already, and found again by the next get.
        tracing::debug!(%error, "not durable");
    }
}

/// Whether a process of this one's outlives whoever started it. In a container it ends with the first process there, which
/// may be about to end: an init container's shell.
fn outlives_its_parent() -> bool {
    /// The kernel's number for the namespace that it starts with (`PROC_PID_INIT_INO`).
    const FIRST: &str = "pid:[4026531836]";
    std::process::id() != 1 && std::fs::read_link("/proc/self/ns/pid").is_ok_and(|name| name.as_os_str() == FIRST)
}

/// Whether another process has taken it over.
fn hand_off(cache: &Cache) -> Result<bool> {
    let Some(SyncHandoff { dir, writer, lock }) = cache.hand_off()? else { return Ok(false) };
    let arguments = [std::ffi::OsStr::new("--apart"), dir.as_os_str(), writer.as_ref()];
    let mut child = start(&arguments, Stdio::from(lock))?;
    // It starts the one that stays, and ends at once: whatever this process becomes has no child that it does not know,
    // unless it is process 1, which all orphans are given to.
    let is_done = child.wait().map_err(not_started)?.success();
    if is_done {
        cache.handed_off();
    }
    Ok(is_done)
}

fn start(arguments: &[&std::ffi::OsStr], lock: Stdio) -> Result<std::process::Child> {
    // This very program, also where its file was replaced meanwhile.
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
    Error::new(ErrorKind::Other, "cannot start the process that makes files durable").cause(cause)
}

/// Lets no descriptor but the standard ones reach the next program: whoever waits for one to be closed has nothing to
/// do with what is done there.
#[allow(unsafe_code)]
fn close_on_exec() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
    for number in numbers.filter(|number| *number > 2) {
        // SAFETY: borrowed for one call that neither reads, writes nor closes. A number that is not open any more, such
        // as the listing's own, makes the call fail and nothing else.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        let _ = rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC);
    }
}
