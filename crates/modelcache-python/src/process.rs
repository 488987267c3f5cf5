//! What belongs to one process: its runtime, its couriers, its log. A forked child starts anew and leaves its parent's be.
//!
//! Every call from Python goes through [`entry`], which turns a panic into an exception and lets no thread be caught by the
//! end of the interpreter: CPython before 3.14 ends a thread that asks for the interpreter's lock then by unwinding it, and
//! a stack with frames of Rust cannot be unwound by others (PyO3's guide, `PyEval_RestoreThread` in CPython's manual). Once
//! [`begin_end`] was called, such threads hang instead, as they do since CPython 3.14.
//!
//! Threads do not survive a fork, and a lock that another thread held stays locked for ever. So nothing of a parent is
//! used in its child, nor dropped there: dropping would let go of leases that the parent still holds. Processes stand in
//! a chain, parent before child, and none is ever freed; a process that never forks has one link.

use crate::call::Answer;
use crate::failure;
use crate::logs::{self, Record};
use modelcache::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// How long the end of the interpreter waits for calls to leave this module, and for a logging handler to return.
const LEAVE: Duration = Duration::from_secs(5);
/// Time between two looks at whether they have.
const LOOK: Duration = Duration::from_millis(1);
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
    /// Tells event loops of what was done.
    teller: OnceLock<Courier>,
    /// Hands log records over; another than the teller, since a logging handler may wait for an event loop.
    logger: OnceLock<Courier>,
    gate: Gate,
    records: Mutex<VecDeque<Record>>,
    /// The child that this process became.
    child: OnceLock<Box<Process>>,
}

enum Threads {
    None,
    Running(Arc<Runtime>),
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

/// Runs one call from Python: `work`, with a panic as the exception that stands for a defect.
pub(crate) fn entry<T>(py: Python<'_>, work: impl FnOnce(&Inside<'_>) -> PyResult<T>) -> PyResult<T> {
    let process = current(py);
    if !process.gate.try_enter() {
        py.detach(hang);
    }
    let inside = Inside { py, process };
    catch_unwind(AssertUnwindSafe(|| work(&inside)))
        .unwrap_or_else(|panic| Err(failure::exception(py, &failure::of_panic(&*panic))))
}

/// From now on every thread but this one hangs when it calls, or comes back to, this module. Returns once none of the
/// others is in it with the interpreter's lock.
pub(crate) fn begin_end(py: Python<'_>) {
    let gate = &current(py).gate;
    gate.close();
    py.detach(|| gate.wait_until_empty());
}

/// Ends the threads of this process.
pub(crate) fn shut_down(py: Python<'_>) {
    let Some(process) = existing() else { return };
    let threads = std::mem::replace(&mut *process.threads(), Threads::ShutDown);
    py.detach(|| {
        if let Threads::Running(runtime) = threads
            && let Some(runtime) = sole(runtime)
        {
            runtime.shutdown_timeout(PUT_AWAY);
        }
        for courier in [&process.teller, &process.logger] {
            courier.get().map(Courier::stop);
        }
    });
}

/// The runtime, once no call waits in it any more: those that hang from now on leave it within a moment.
fn sole(mut runtime: Arc<Runtime>) -> Option<Runtime> {
    let end = Instant::now() + PUT_AWAY;
    loop {
        match Arc::try_unwrap(runtime) {
            Ok(runtime) => return Some(runtime),
            Err(_) if Instant::now() > end => return None,
            Err(shared) => runtime = shared,
        }
        thread::sleep(LOOK);
    }
}

/// The interpreter is ending: this thread must not take its lock any more.
fn hang() {
    loop {
        thread::park();
    }
}

/// A thread that is in a call from Python, and holds the interpreter's lock.
pub(crate) struct Inside<'py> {
    py: Python<'py>,
    process: &'static Process,
}

impl Inside<'_> {
    /// What belongs to this process.
    pub(crate) fn process(&self) -> &'static Process {
        self.process
    }

    /// Runs `work` without the interpreter's lock.
    pub(crate) fn detach<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let gate = &self.process.gate;
        let done = self.py.detach(|| {
            gate.leave();
            let done = AssertUnwindSafe(catch_unwind(AssertUnwindSafe(work)));
            if !gate.try_enter() {
                hang();
            }
            done
        });
        done.0.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.process.gate.leave();
    }
}

thread_local! {
    /// Whether this is a courier, which is waited for before the interpreter ends.
    static IS_COURIER: Cell<bool> = const { Cell::new(false) };
}

/// Counts the threads that are in this module with the interpreter's lock, or about to take it.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    left: Condvar,
}

#[derive(Default)]
struct GateState {
    inside: usize,
    /// The thread that ends the interpreter.
    ending: Option<ThreadId>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the calling thread, unless it may not enter any more.
    fn try_enter(&self) -> bool {
        if IS_COURIER.get() {
            return true;
        }
        let mut state = self.lock();
        let may = state.ending.is_none_or(|ending| ending == thread::current().id());
        state.inside += usize::from(may);
        may
    }

    fn leave(&self) {
        if !IS_COURIER.get() {
            let mut state = self.lock();
            state.inside -= 1;
            if state.inside == 0 && state.ending.is_some() {
                self.left.notify_all();
            }
        }
    }

    fn close(&self) {
        self.lock().ending = Some(thread::current().id());
    }

    fn wait_until_empty(&self) {
        let _ = self.left.wait_timeout_while(self.lock(), LEAVE, |state| state.inside > 0);
    }
}

impl Process {
    fn new(id: ProcessId) -> Self {
        let (runtime, records) = (Mutex::new(Threads::None), Mutex::default());
        let (teller, logger, gate) = (OnceLock::new(), OnceLock::new(), Gate::default());
        Self { id, runtime, teller, logger, gate, records, child: OnceLock::new() }
    }

    /// Where tasks run; started by the first call.
    pub(crate) fn runtime(&self, _: Python<'_>) -> Result<Arc<Runtime>> {
        let mut threads = self.threads();
        if let Threads::None = *threads {
            let has_arenas = std::env::var_os("MALLOC_ARENA_MAX").is_none();
            *threads = Threads::Running(Arc::new(modelcache::runtime::start(has_arenas)?));
            // Before the work takes what threads there are. Without it event loops are refused, and all else works.
            let _ = courier(&self.teller);
        }
        match &*threads {
            Threads::Running(runtime) => Ok(runtime.clone()),
            _ => Err(Error::new(ErrorKind::Other, "the interpreter is ending; nothing can be started any more")),
        }
    }

    /// Starts the thread that [`deliver`](Self::deliver) needs.
    pub(crate) fn start_to_deliver(&self) -> Result<()> {
        courier(&self.teller).map(|_| ())
    }

    /// Has `done` called with what came of a call, by a thread that may hold the interpreter's lock.
    pub(crate) fn deliver(&self, done: Py<PyAny>, outcome: Result<Answer>) {
        if let Some(teller) = self.teller.get() {
            teller.send(Errand::Tell(done, outcome));
        }
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
            // Without it the next call takes the records.
            let _ = courier(&self.logger).map(|logger| logger.send(Errand::HandOverLogs));
        }
    }

    /// The records that wait.
    pub(crate) fn take_records(&self) -> VecDeque<Record> {
        std::mem::take(&mut *self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread of ours that waits for the interpreter's lock, so that none that moves bytes ever does.
struct Courier {
    errands: Sender<Errand>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Errand {
    Tell(Py<PyAny>, Result<Answer>),
    HandOverLogs,
    Stop,
}

/// The courier that is in `place`, or a new one, which is there from now on.
fn courier(place: &OnceLock<Courier>) -> Result<&Courier> {
    match place.get() {
        Some(courier) => Ok(courier),
        None => {
            let started = Courier::start().map_err(|cause| modelcache::runtime::no_thread(Some(cause)))?;
            Ok(place.get_or_init(|| started))
        }
    }
}

impl Courier {
    fn start() -> io::Result<Self> {
        let (errands, received) = mpsc::channel();
        let thread = thread::Builder::new().name("modelcache-courier".into()).spawn(move || run(&received))?;
        Ok(Self { errands, thread: Mutex::new(Some(thread)) })
    }

    fn send(&self, errand: Errand) {
        // Nobody receives it at the end of the process.
        let _ = self.errands.send(errand);
    }

    /// Has it end, and waits for that. One that a logging handler keeps for long is left alone.
    fn stop(&self) {
        self.send(Errand::Stop);
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let end = Instant::now() + LEAVE;
        while !thread.is_finished() && Instant::now() < end {
            thread::sleep(LOOK);
        }
    }
}

fn run(received: &Receiver<Errand>) {
    IS_COURIER.set(true);
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
