//! The async runtime, sized to the limits that the process runs under.
//!
//! Batch systems and containers limit threads (`ulimit -u`, the control group's `pids.max`) and address space
//! (`ulimit -v`). [`start`] tries how many threads can be had and makes do with fewer: in the extreme, the caller's own
//! thread runs all tasks, and one more does the disk work. Where not even one can be had, or too little memory, the error
//! names the limit.
//!
//! A tokio runtime panics, or hangs, when a thread that it needs cannot be started. So where a limit is near, the threads
//! are tried before it is built. One blocking thread is started at once and kept: work that finds no thread then waits for
//! that one.

use crate::error::{Error, ErrorKind, Result};
use rustix::process::{Resource, getrlimit};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io, thread};
use tokio::runtime::{Builder, Runtime};

/// Most threads that run tasks: more do not help a process that waits for the network, and each costs start-up time.
const WORKERS_MAX: usize = 32;
/// A limit on the threads of a user that is not taken for near.
const USER_THREADS_FAR: u64 = 4096;
/// Threads left to a control group whose limit is not taken for near.
const GROUP_THREADS_FAR: u64 = 256;
/// Most threads for disk work and hashing (tokio's default).
const BLOCKING_MAX: usize = 512;
/// Stack of each thread.
const STACK_BYTES: usize = 1 << 20;
/// Address space that must be left when the runtime starts: stacks, buffers, requests on their way, a small manifest.
const ADDRESS_SPACE_MIN: u64 = 96 << 20;
/// Address space that glibc reserves for a thread's allocations (`HEAP_MAX_SIZE`).
const ARENA_BYTES: u64 = 64 << 20;
/// Idle threads stay: where the limit is reached meanwhile, another could not be started.
const KEEP_ALIVE: Duration = Duration::from_secs(u32::MAX as u64);
/// How long threads that were tried may take to be gone.
const GONE_WITHIN: Duration = Duration::from_millis(200);

/// Starts the runtime that a program drives the cache with. `has_arenas`: whether the allocator may reserve address space
/// for each thread, as glibc's does unless `MALLOC_ARENA_MAX` is set.
///
/// # Errors
/// [`ErrorKind::Limits`] where no thread can be started or too little address space is left; the hint names the limit.
pub fn start(has_arenas: bool) -> Result<Runtime> {
    let workers = thread::available_parallelism().map_or(2, usize::from).clamp(2, WORKERS_MAX);
    let fitting = match address_space_left() {
        None => WORKERS_MAX + BLOCKING_MAX,
        Some(left) if left < ADDRESS_SPACE_MIN => return Err(too_little_memory(left)),
        Some(left) => threads_within(left, has_arenas),
    };
    // One of them for disk work.
    let wanted = fitting.min(workers + 1);
    let (had, refusal) = if is_limited() { startable(wanted) } else { (wanted, None) };
    let built = match had {
        0 => return Err(no_thread(refusal)),
        1 => Builder::new_current_thread().max_blocking_threads(1).build_with_common_settings(),
        _ => {
            let blocking = (fitting - (had - 1)).clamp(1, BLOCKING_MAX);
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(had - 1).max_blocking_threads(blocking).build_with_common_settings()
        }
    };
    let runtime = built.map_err(|cause| no_thread(Some(cause)))?;
    drop(runtime.spawn_blocking(|| ()));
    Ok(runtime)
}

trait CommonSettings {
    fn build_with_common_settings(&mut self) -> io::Result<Runtime>;
}

impl CommonSettings for Builder {
    fn build_with_common_settings(&mut self) -> io::Result<Runtime> {
        self.thread_name("modelcache").thread_stack_size(STACK_BYTES).thread_keep_alive(KEEP_ALIVE).enable_all().build()
    }
}

/// Whether a limit on threads or address space may be near.
fn is_limited() -> bool {
    getrlimit(Resource::As).current.is_some()
        || getrlimit(Resource::Nproc).current.is_some_and(|most| most < USER_THREADS_FAR)
        || group_threads().is_some_and(|(_, left)| left < GROUP_THREADS_FAR)
}

/// How many of `wanted` threads can run at once, and why no more.
fn startable(wanted: usize) -> (usize, Option<io::Error>) {
    let gate = Mutex::new(());
    let before = thread_count();
    let tried = thread::scope(|scope| {
        let closed = gate.lock();
        let start = || {
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            thread.spawn_scoped(scope, || drop(gate.lock().unwrap_or_else(PoisonError::into_inner))).map(drop)
        };
        let mut refusal = None;
        let had = (0..wanted).take_while(|_| start().map_err(|error| refusal = Some(error)).is_ok()).count();
        drop(closed);
        (had, refusal)
    });
    // A thread that was joined counts against the limits until the kernel has released it.
    let end = Instant::now() + GONE_WITHIN;
    while thread_count() > before && Instant::now() < end {
        thread::sleep(Duration::from_micros(50));
    }
    tried
}

/// The threads of this process; `None` where `/proc` is not mounted.
fn thread_count() -> Option<u64> {
    status_field("Threads:")
}

/// A number of `/proc/self/status`.
fn status_field(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().trim_end_matches(" kB").parse().ok()
}

/// Address space that this process may still take; `None` without a limit.
pub(crate) fn address_space_left() -> Option<u64> {
    let limit = getrlimit(Resource::As).current?;
    Some(limit.saturating_sub(status_field("VmSize:").unwrap_or(0) << 10))
}

/// How many threads fit into `left` bytes of address space, which leaves half of it to everything else.
fn threads_within(left: u64, has_arenas: bool) -> usize {
    let each = STACK_BYTES as u64 + if has_arenas { ARENA_BYTES } else { 0 };
    // glibc takes no arena where less than twice its size is left: two threads always fit.
    usize::try_from(left / 2 / each).unwrap_or(usize::MAX).max(2)
}

fn too_little_memory(left: u64) -> Error {
    let limit = getrlimit(Resource::As).current.unwrap_or_default();
    let message = format!("the limit on address space ({} KiB) leaves only {} KiB", limit >> 10, left >> 10);
    Error::new(ErrorKind::Limits, message)
        .hint(format!("raise the limit by at least {} KiB (ulimit -v, RLIMIT_AS)", (ADDRESS_SPACE_MIN - left) >> 10))
}

/// The error for a thread that cannot be started: it names the limits.
pub fn no_thread(refusal: Option<io::Error>) -> Error {
    let user = getrlimit(Resource::Nproc)
        .current
        .map(|most| format!("this user may have {most} processes and threads (ulimit -u, RLIMIT_NPROC)"));
    let group = group_threads().map(|(most, _)| format!("the control group may have {most} (pids.max)"));
    let space = getrlimit(Resource::As)
        .current
        .map(|most| format!("this process may have {} KiB of address space (ulimit -v, RLIMIT_AS)", most >> 10));
    let limits: Vec<String> = [user, group, space].into_iter().flatten().collect();
    let error = Error::new(ErrorKind::Limits, "no thread can be started")
        .hint(format!("raise the limit that is reached: {}", limits.join("; ")));
    match refusal {
        Some(cause) => error.cause(cause),
        None => error,
    }
}

/// Of the control groups that this process is in, the one that may start fewest threads: its `pids.max`, and what is left
/// of it.
fn group_threads() -> Option<(u64, u64)> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let limit_of = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let root = match fields.next()? {
            "" => Path::new("/sys/fs/cgroup"),
            "pids" => Path::new("/sys/fs/cgroup/pids"),
            _ => return None,
        };
        let group = root.join(fields.next()?.trim_start_matches('/'));
        let groups = group.ancestors().take_while(|folder| folder.starts_with(root));
        let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let limits = groups.filter_map(|folder| {
            let most = number(folder.join("pids.max"))?;
            Some((most, most.saturating_sub(number(folder.join("pids.current"))?)))
        });
        limits.min_by_key(|(_, left)| *left)
    };
    groups.lines().filter_map(limit_of).min_by_key(|(_, left)| *left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_starts_and_the_threads_that_were_tried_are_gone() {
        let (had, refusal) = startable(3);
        assert_eq!((had, refusal.map(|error| error.kind())), (3, None));
        let runtime = start(true).expect("there are threads");
        let done = runtime.block_on(async { tokio::task::spawn_blocking(|| 7).await });
        assert_eq!(done.expect("runs"), 7);
    }

    #[test]
    fn fewer_threads_fit_into_less_address_space_and_two_always_do() {
        assert_eq!(threads_within(0, true), 2);
        assert!(threads_within(1 << 40, true) > threads_within(1 << 30, true));
        assert!(threads_within(1 << 30, false) > threads_within(1 << 30, true));
    }
}
