//! What belongs to one process: its runtime, its courier, its log. A forked child starts anew and leaves its parent's be.
//!
//! Threads do not survive a fork, and a lock that another thread held stays locked for ever. So nothing of a parent is
//! used in its child, nor dropped there: dropping would let go of leases that the parent still holds. Processes stand in
//! a chain, parent before child, and none is ever freed; a process that never forks has one link.

use crate::call::Answer;
use crate::logs::{self, Record};
use modelcache::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::{Handle, Runtime};

/// Most threads that run tasks, as on the command line.
const WORKERS_MAX: usize = 32;
/// How long the end of the interpreter waits for threads to put their files away.
const PUT_AWAY: Duration = Duration::from_secs(1);
/// Log records that wait for the interpreter; more are dropped.
const RECORDS_MAX: usize = 10_000;

static FIRST: OnceLock<Process> = OnceLock::new();
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Which process this is. The number of forks tells a child that got the number of a forebear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pid: u32,
    forks: u32,
}

impl ProcessId {
    /// This process.
    pub(crate) fn here() -> Self {
        Self { pid: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }
}

/// What one process has.
pub(crate) struct Process {
    id: ProcessId,
    runtime: Mutex<Threads>,
    courier: OnceLock<Courier>,
    records: Mutex<VecDeque<Record>>,
    /// The child that this process became.
    child: OnceLock<Box<Process>>,
}

enum Threads {
    None,
    Running(Runtime),
    ShutDown,
}

/// This process. Taking the interpreter's lock makes sure that no fork comes in between.
pub(crate) fn current(_: Python<'_>) -> &'static Process {
    let id = ProcessId::here();
    let mut process = FIRST.get_or_init(|| Process::new(id));
    while process.id != id {
        process = process.child.get_or_init(|| Box::new(Process::new(id)));
    }
    process
}

/// This process, if it has done anything yet; for threads that do not hold the interpreter's lock.
pub(crate) fn existing() -> Option<&'static Process> {
    let id = ProcessId::here();
    let mut process = FIRST.get()?;
    while process.id != id {
        process = process.child.get()?;
    }
    Some(process)
}

/// This process is a child that was forked just now; the calling thread is its only one.
pub(crate) fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    // The state of this thread's random numbers was copied: names that must differ would not.
    let _ = rand::rng().reseed();
}

/// Ends the threads of this process.
pub(crate) fn shut_down(py: Python<'_>) {
    let Some(process) = existing() else { return };
    let threads = std::mem::replace(&mut *process.threads(), Threads::ShutDown);
    py.detach(|| {
        if let Threads::Running(runtime) = threads {
            runtime.shutdown_timeout(PUT_AWAY);
        }
        if let Some(courier) = process.courier.get() {
            courier.stop();
        }
    });
    logs::hand_over(py);
}

impl Process {
    fn new(id: ProcessId) -> Self {
        let (runtime, records) = (Mutex::new(Threads::None), Mutex::default());
        Self { id, runtime, courier: OnceLock::new(), records, child: OnceLock::new() }
    }

    /// Where tasks run; started by the first call.
    pub(crate) fn runtime(&self, _: Python<'_>) -> Result<Handle> {
        let mut threads = self.threads();
        if let Threads::None = *threads {
            *threads = Threads::Running(start()?);
        }
        match &*threads {
            Threads::Running(runtime) => Ok(runtime.handle().clone()),
            _ => Err(Error::new(ErrorKind::Other, "the interpreter is ending; nothing can be started any more")),
        }
    }

    /// Has `done` called with what came of a call, by a thread that may hold the interpreter's lock.
    pub(crate) fn deliver(&self, done: Py<PyAny>, outcome: Result<Answer>) {
        self.courier().send(Errand::Tell(done, outcome));
    }

    /// Keeps a record until the interpreter's lock is held by somebody who hands it over.
    pub(crate) fn log(&self, record: Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() < RECORDS_MAX {
            records.push_back(record);
        }
        let is_first = records.len() == 1;
        drop(records);
        if is_first {
            self.courier().send(Errand::HandOverLogs);
        }
    }

    /// The records that wait.
    pub(crate) fn take_records(&self) -> VecDeque<Record> {
        std::mem::take(&mut *self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn courier(&self) -> &Courier {
        self.courier.get_or_init(Courier::start)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start() -> Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.clamp(2, WORKERS_MAX))
        .thread_name("modelcache")
        .enable_all()
        .build()
        .map_err(|cause| Error::new(ErrorKind::Other, "cannot start threads").cause(cause))
}

/// The one thread of ours that waits for the interpreter's lock, so that none that moves bytes ever does.
struct Courier {
    errands: Sender<Errand>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Errand {
    Tell(Py<PyAny>, Result<Answer>),
    HandOverLogs,
    Stop,
}

impl Courier {
    fn start() -> Self {
        let (errands, received) = mpsc::channel();
        let thread = std::thread::Builder::new().name("modelcache-courier".into()).spawn(move || run(&received));
        Self { errands, thread: Mutex::new(thread.ok()) }
    }

    fn send(&self, errand: Errand) {
        // Nobody receives it where no thread could be started, or at the end of the process.
        let _ = self.errands.send(errand);
    }

    fn stop(&self) {
        self.send(Errand::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.map(JoinHandle::join);
    }
}

fn run(received: &Receiver<Errand>) {
    while let Ok(errand) = received.recv() {
        // While the interpreter ends nobody gets its lock any more.
        let attached = match errand {
            Errand::Stop => None,
            Errand::HandOverLogs => Python::try_attach(logs::hand_over),
            Errand::Tell(done, outcome) => Python::try_attach(|py| {
                logs::hand_over(py);
                if let Err(error) = Answer::tell(py, done.bind(py), outcome) {
                    error.write_unraisable(py, Some(done.bind(py)));
                }
            }),
        };
        if attached.is_none() {
            return;
        }
    }
}

/// A value that its process drops; in a child it is left alone.
pub(crate) struct Owned<T> {
    owner: ProcessId,
    value: Option<T>,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { owner: ProcessId::here(), value: Some(value) }
    }

    /// The value, in the process that made it.
    pub(crate) fn get(&self) -> Option<&T> {
        self.value.as_ref().filter(|_| self.owner == ProcessId::here())
    }

    /// The value, even in a child: only to be read from.
    pub(crate) fn of_any_process(&self) -> Option<&T> {
        self.value.as_ref()
    }

    /// Takes the value, in the process that made it.
    pub(crate) fn take(&mut self) -> Option<T> {
        if self.owner == ProcessId::here() { self.value.take() } else { None }
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.owner != ProcessId::here() {
            std::mem::forget(self.value.take());
        }
    }
}
