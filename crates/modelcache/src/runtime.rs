//! The async runtime, sized to the resource limits of the process.
//!
//! Batch systems and containers limit threads (`ulimit -u`, the control group's `pids.max`) and address space
//! (`ulimit -v`). [`start`] finds out how many threads can be started, and uses fewer if necessary. In the extreme case
//! the caller's thread runs all tasks, and one more thread does the disk work. If not even that is possible, the error
//! names the limit.
//!
//! A tokio runtime panics or hangs if a thread that it needs cannot be started. If a limit may be near, the threads are
//! therefore started and ended once before the runtime is built.

use crate::error::{Error, ErrorKind, Result};
use crate::mutex::Mutex;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use rustix::process::{Resource, getrlimit};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io, thread};
use tokio::runtime::{Builder, Runtime};

/// Maximum number of threads that run tasks. More threads do not help a process that waits for the network, and each
/// one costs start-up time.
const WORKERS_MAX: usize = 32;
/// A limit on the threads of a user is considered near if it is below this number of threads.
const USER_THREADS_AMPLE: u64 = 4096;
/// The limit of a control group is considered near if fewer than this number of threads are left.
const GROUP_THREADS_AMPLE: u64 = 256;
/// Maximum number of threads for disk work and hashing (tokio's default).
const BLOCKING_MAX: usize = 512;
/// Bytes of a file that are read at a time: a compromise between the number of system calls and memory.
const CHUNK_BYTES: u64 = 1 << 20;
/// Stack size of each thread, in bytes.
pub(crate) const STACK_BYTES: usize = 1 << 20;
/// Address space that must be free when the runtime starts, in bytes: for stacks, buffers, concurrent requests and a
/// small manifest.
const ADDRESS_SPACE_MIN: u64 = 96 << 20;
/// Address space that glibc reserves for the allocations of a thread, in bytes (`HEAP_MAX_SIZE`).
const ARENA_BYTES: u64 = 64 << 20;
/// Time after which an idle thread ends: practically never. If a limit is reached meanwhile, the thread could not be
/// started again.
const KEEP_ALIVE: Duration = Duration::from_secs(u32::MAX as u64);
/// Longest wait for the kernel to release the threads that [`startable_threads`] ended.
const THREAD_EXIT_MAX: Duration = Duration::from_millis(200);

/// Runs disk work or hashing on a blocking thread, not on the threads that run tasks.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(cause) => Err(Error::new(ErrorKind::Other, "background work ended unexpectedly").cause(cause)),
    }
}

/// Streams `range` of a file in chunks of at most [`CHUNK_BYTES`]. `read` fills a buffer from an offset, on a blocking
/// thread, and returns the number of bytes. The stream ends after the range, after 0 bytes, or after an error.
pub(crate) fn chunks(
    range: Range<u64>,
    read: impl Fn(&mut [u8], u64) -> Result<usize> + Send + 'static,
) -> BoxStream<'static, Result<Bytes>> {
    let chunks = stream::unfold(Some((read, range)), |reading| async {
        let (read, range) = reading.filter(|(_, range)| !range.is_empty())?;
        let chunk = blocking(move || {
            let mut buffer = vec![0; (range.end - range.start).min(CHUNK_BYTES) as usize];
            let got = read(&mut buffer, range.start)?;
            buffer.truncate(got);
            Ok((Bytes::from(buffer), (read, range.start + got as u64..range.end)))
        });
        match chunk.await {
            Ok((chunk, _)) if chunk.is_empty() => None,
            Ok((chunk, rest)) => Some((Ok(chunk), Some(rest))),
            Err(error) => Some((Err(error), None)),
        }
    });
    chunks.boxed()
}

/// Starts the runtime for a program that uses the cache. `has_arenas` is true if the allocator may reserve address
/// space for each thread, as glibc does unless `MALLOC_ARENA_MAX` is set.
///
/// # Errors
/// [`ErrorKind::Limits`] if no thread can be started, or if too little address space is left. The hint names the limit.
pub fn start(has_arenas: bool) -> Result<Runtime> {
    require_descriptors()?;
    let workers = thread::available_parallelism().map_or(2, usize::from).clamp(2, WORKERS_MAX);
    // The number of threads that fit into the free address space.
    let fitting = match address_space_left() {
        None => WORKERS_MAX + BLOCKING_MAX,
        Some(left) if left < ADDRESS_SPACE_MIN => return Err(too_little_memory(left)),
        Some(left) => threads_within(left, has_arenas),
    };
    // The workers, and one thread for disk work.
    let wanted = fitting.min(workers + 1);
    let (startable, refusal) = if is_limited() { startable_threads(wanted) } else { (wanted, None) };
    let built = match startable {
        0 => return Err(no_thread(refusal)),
        // The only further thread is for disk work. The caller's thread runs the tasks.
        1 => Builder::new_current_thread().max_blocking_threads(1).build_with_common_settings(),
        _ => {
            let blocking = (fitting - (startable - 1)).clamp(1, BLOCKING_MAX);
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(startable - 1).max_blocking_threads(blocking).build_with_common_settings()
        }
    };
    let runtime = built.map_err(|cause| no_thread(Some(cause)))?;
    // Start one blocking thread now; it never ends. If no other can be started later, disk work waits for this one.
    drop(runtime.spawn_blocking(|| ()));
    Ok(runtime)
}

/// Fails if this process cannot open six more file descriptors, as many as a runtime needs. `tokio` would panic instead
/// of returning an error if it could not open its socket pair.
fn require_descriptors() -> Result<()> {
    check_free_descriptors(3).map_err(|cause| {
        Error::new(ErrorKind::Limits, "the runtime cannot open its files")
            .hint("too many open files: raise the limit (ulimit -n)")
            .cause(cause)
    })
}

/// Fails if this number of socket pairs, with two descriptors each, cannot be opened now. Opens them and closes them
/// again.
///
/// # Errors
/// The error of the call that failed.
pub fn check_free_descriptors(pairs: usize) -> io::Result<()> {
    let opened: io::Result<Vec<_>> = (0..pairs).map(|_| UnixStream::pair()).collect();
    opened.map(drop)
}

/// Builds a runtime with the settings that both kinds of runtime share.
trait CommonSettings {
    fn build_with_common_settings(&mut self) -> io::Result<Runtime>;
}

impl CommonSettings for Builder {
    fn build_with_common_settings(&mut self) -> io::Result<Runtime> {
        self.thread_name("modelcache").thread_stack_size(STACK_BYTES).thread_keep_alive(KEEP_ALIVE).enable_all().build()
    }
}

/// Returns true if a limit on threads or address space may be near.
fn is_limited() -> bool {
    getrlimit(Resource::As).current.is_some()
        || getrlimit(Resource::Nproc).current.is_some_and(|limit| limit < USER_THREADS_AMPLE)
        || group_threads().is_some_and(|(_, left)| left < GROUP_THREADS_AMPLE)
}

/// Starts up to `wanted` threads that exist at the same time, and ends them. Returns their number, and the error if not
/// all could be started.
fn startable_threads(wanted: usize) -> (usize, Option<io::Error>) {
    let gate = Mutex::new(());
    let before = thread_count();
    let startable = thread::scope(|scope| {
        // The threads wait for this lock, so that all of them exist at the same time.
        let closed = gate.lock();
        let start = || {
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            thread.spawn_scoped(scope, || drop(gate.lock())).map(drop)
        };
        let mut refusal = None;
        let started = (0..wanted).take_while(|_| start().map_err(|error| refusal = Some(error)).is_ok()).count();
        drop(closed);
        (started, refusal)
    });
    // A joined thread counts against the limits until the kernel has released it.
    let end = Instant::now() + THREAD_EXIT_MAX;
    while thread_count() > before && Instant::now() < end {
        thread::sleep(Duration::from_micros(50));
    }
    startable
}

/// Returns the number of threads of this process; `None` if `/proc` is not mounted.
fn thread_count() -> Option<u64> {
    status_field("Threads:")
}

/// Returns a numeric field of `/proc/self/status`.
fn status_field(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().trim_end_matches(" kB").parse().ok()
}

/// Returns the free address space of this process in bytes; `None` if it is not limited.
pub(crate) fn address_space_left() -> Option<u64> {
    let limit = getrlimit(Resource::As).current?;
    Some(limit.saturating_sub(status_field("VmSize:").unwrap_or(0) << 10))
}

/// Returns the number of threads that fit into half of `left` bytes of address space. The other half is for buffers and
/// all other memory.
fn threads_within(left: u64, has_arenas: bool) -> usize {
    let each = STACK_BYTES as u64 + if has_arenas { ARENA_BYTES } else { 0 };
    // Two threads always fit: glibc reserves no arena if less than twice its size is free.
    usize::try_from(left / 2 / each).unwrap_or(usize::MAX).max(2)
}

fn too_little_memory(left: u64) -> Error {
    let limit = getrlimit(Resource::As).current.unwrap_or_default();
    let message = format!("the limit on address space ({} KiB) leaves only {} KiB", limit >> 10, left >> 10);
    Error::new(ErrorKind::Limits, message)
        .hint(format!("raise the limit by at least {} KiB (ulimit -v, RLIMIT_AS)", (ADDRESS_SPACE_MIN - left) >> 10))
}

/// Returns the error for a thread that cannot be started. The hint lists the limits in effect.
pub fn no_thread(refusal: Option<io::Error>) -> Error {
    let user = getrlimit(Resource::Nproc)
        .current
        .map(|limit| format!("this user may have {limit} processes and threads (ulimit -u, RLIMIT_NPROC)"));
    let group = group_threads().map(|(limit, _)| format!("the control group may have {limit} (pids.max)"));
    let space = getrlimit(Resource::As)
        .current
        .map(|limit| format!("this process may have {} KiB of address space (ulimit -v, RLIMIT_AS)", limit >> 10));
    let limits: Vec<String> = [user, group, space].into_iter().flatten().collect();
    let error = Error::new(ErrorKind::Limits, "no thread can be started")
        .hint(format!("raise the limit that is reached: {}", limits.join("; ")));
    match refusal {
        Some(cause) => error.cause(cause),
        None => error,
    }
}

/// Returns `pids.max` and the number of threads left, for the control group with the fewest threads left among those of
/// this process.
fn group_threads() -> Option<(u64, u64)> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let limit_of = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let root = match fields.next()? {
            // cgroup v2.
            "" => Path::new("/sys/fs/cgroup"),
            // cgroup v1.
            "pids" => Path::new("/sys/fs/cgroup/pids"),
            _ => return None,
        };
        let group = root.join(fields.next()?.trim_start_matches('/'));
        // The limit of every ancestor applies as well.
        let groups = group.ancestors().take_while(|folder| folder.starts_with(root));
        let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let limits = groups.filter_map(|folder| {
            let limit = number(folder.join("pids.max"))?;
            Some((limit, limit.saturating_sub(number(folder.join("pids.current"))?)))
        });
        limits.min_by_key(|(_, left)| *left)
    };
    groups.lines().filter_map(limit_of).min_by_key(|(_, left)| *left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_starts_after_its_threads_were_tried() {
        let (startable, refusal) = startable_threads(3);
        assert_eq!((startable, refusal.map(|error| error.kind())), (3, None));
        let runtime = start(true).expect("a runtime");
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
