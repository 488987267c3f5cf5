//! Per-process state: the Tokio runtime, the dispatcher threads and the queue of log records.
//!
//! Every call from Python passes through [`entry`]. It converts a panic into an exception and keeps threads away from
//! an interpreter that is shutting down (see [`Gate`]).
//!
//! Threads do not survive a fork, and a mutex that another thread held at the fork stays locked in the child for ever.
//! A forked child therefore creates its own [`Process`]. It neither uses nor drops objects of its parent, because
//! dropping them would release leases that the parent still holds.

use crate::call::CallOutput;
use crate::failure;
use crate::logs::{self, Record};
use modelcache::mutex::Mutex;
use modelcache::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, OnceLock};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Longest time that interpreter shutdown waits for calls to leave this module, and for a logging handler to return.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Poll interval of the waits at shutdown.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Longest time that interpreter shutdown waits for the threads of the runtime to finish and to close their files.
const RUNTIME_TIMEOUT: Duration = Duration::from_secs(1);
/// Capacity of the queue of log records. Further records are dropped.
const RECORDS_MAX: usize = 10_000;

/// The first process in the chain of forks. Each process links to its forked child, in the child's copy of the memory.
/// The chain is never freed. Without forks, it has one element.
static FIRST: OnceLock<Process> = OnceLock::new();
/// Number of forks between the first process and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Identifies a process. The fork count distinguishes a child from an ancestor that had the same PID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pid: u32,
    forks: u32,
}

impl ProcessId {
    /// Returns the identity of the calling process.
    pub(crate) fn here() -> Self {
        Self { pid: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }
}

/// The state of one process.
pub(crate) struct Process {
    id: ProcessId,
    runtime: Mutex<RuntimeState>,
    /// Reports finished calls to event loops.
    completions: OnceLock<Dispatcher>,
    /// Passes log records to `logging`. Separate from `completions`, because a logging handler may block on an event
    /// loop, which `completions` has to wake.
    logger: OnceLock<Dispatcher>,
    gate: Gate,
    records: Mutex<VecDeque<Record>>,
    /// The state of the forked child. Set only in the child's copy of the memory.
    child: OnceLock<Box<Process>>,
}

/// The runtime, from the first call until interpreter shutdown.
enum RuntimeState {
    NotStarted,
    Running(Arc<Runtime>),
    ShutDown,
}

/// Returns the state of this process and creates it on first use.
///
/// The caller holds the interpreter's lock, so that no fork happens during the call.
pub(crate) fn current(_: Python<'_>) -> &'static Process {
    let id = ProcessId::here();
    let mut process = FIRST.get_or_init(|| {
        // Not when the module is imported: the command line, which creates no `Process`, has a log of its own.
        logs::install();
        Process::new(id)
    });
    // The links before that of this process belong to its ancestors. The fork copied them, and they are only read.
    while process.id != id {
        process = process.child.get_or_init(|| Box::new(Process::new(id)));
    }
    process
}

/// Returns the state of this process if it was created. Does not need the interpreter's lock.
pub(crate) fn existing() -> Option<&'static Process> {
    let id = ProcessId::here();
    let mut process = FIRST.get()?;
    while process.id != id {
        process = process.child.get()?;
    }
    Some(process)
}

/// Marks this process as a forked child. Called right after the fork, on the child's only thread.
pub(crate) fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    // The fork copied the state of the random number generator. Without a new seed, parent and child would generate the
    // same "unique" names.
    let _ = rand::rng().reseed();
}

/// Runs `work`, the body of one call from Python. A panic in it becomes an exception.
pub(crate) fn entry<T>(py: Python<'_>, work: impl FnOnce(&EntryGuard<'_>) -> PyResult<T>) -> PyResult<T> {
    let process = current(py);
    // If the interpreter is shutting down, hang. Release its lock first, because the thread that shuts it down needs
    // it.
    if !process.gate.try_enter() {
        py.detach(hang);
    }
    let guard = EntryGuard { py, process };
    catch_unwind(AssertUnwindSafe(|| work(&guard)))
        .unwrap_or_else(|panic| Err(failure::exception(py, &failure::panic_error(&*panic))))
}

/// First step of interpreter shutdown: closes the gate. From now on only the calling thread may use this module. Every
/// other thread hangs when it calls the module or returns to it. Returns when no other thread is inside the module with
/// the interpreter's lock, or after [`LEAVE_TIMEOUT`].
pub(crate) fn begin_shutdown(py: Python<'_>) {
    let gate = &current(py).gate;
    gate.close();
    // Release the interpreter's lock, so that the threads inside can finish.
    py.detach(|| gate.wait_until_empty());
}

/// Last step of interpreter shutdown: stops the threads of this process. No runtime is started afterwards.
pub(crate) fn shut_down(py: Python<'_>) {
    let Some(process) = existing() else { return };
    // Replace the runtime first, so that a new call fails instead of starting a new runtime.
    let state = std::mem::replace(&mut *process.runtime.lock(), RuntimeState::ShutDown);
    py.detach(|| {
        if let RuntimeState::Running(runtime) = state
            && let Some(runtime) = into_sole_owner(runtime)
        {
            runtime.shutdown_timeout(RUNTIME_TIMEOUT);
        }
        // Stop the dispatchers after the runtime, because its last tasks still send messages to them.
        for dispatcher in [&process.completions, &process.logger] {
            dispatcher.get().map(Dispatcher::stop);
        }
    });
}

/// Waits until no call uses the runtime and returns it. Returns `None` after [`RUNTIME_TIMEOUT`]; the runtime is then
/// left running until the process exits. Waiting calls drop their reference before they hang, so the wait is short.
fn into_sole_owner(mut runtime: Arc<Runtime>) -> Option<Runtime> {
    let end = Instant::now() + RUNTIME_TIMEOUT;
    loop {
        match Arc::try_unwrap(runtime) {
            Ok(runtime) => return Some(runtime),
            Err(_) if Instant::now() > end => return None,
            Err(shared) => runtime = shared,
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Parks the calling thread for ever. Called when the interpreter is shutting down, because the thread must not take
/// the interpreter's lock again.
fn hang() {
    loop {
        thread::park();
    }
}

/// Guard of a call from Python: the gate counts the current thread, which holds the interpreter's lock.
pub(crate) struct EntryGuard<'py> {
    py: Python<'py>,
    process: &'static Process,
}

impl EntryGuard<'_> {
    /// Returns the state of this process.
    pub(crate) fn process(&self) -> &'static Process {
        self.process
    }

    /// Runs `work` without the interpreter's lock. Does not return if the interpreter begins to shut down meanwhile.
    pub(crate) fn detach<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let gate = &self.process.gate;
        let done = self.py.detach(|| {
            gate.leave();
            let done = AssertUnwindSafe(catch_unwind(AssertUnwindSafe(work)));
            // Ask the gate before PyO3 takes the interpreter's lock again.
            if !gate.try_enter() {
                hang();
            }
            done
        });
        // Continue the panic only here, where `entry` catches it and the gate has counted the thread again.
        done.0.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Drop for EntryGuard<'_> {
    fn drop(&mut self) {
        self.process.gate.leave();
    }
}

thread_local! {
    /// True on dispatcher threads. The gate ignores them: shutdown stops and joins them by itself.
    static IS_DISPATCHER: Cell<bool> = const { Cell::new(false) };
}

/// Counts the threads that are in this module with the interpreter's lock, or about to take it, and stops further ones
/// at interpreter shutdown.
///
/// CPython before 3.14 unwinds a thread that asks for the interpreter's lock during shutdown. A stack with Rust frames
/// cannot be unwound by foreign code (PyO3's guide; `PyEval_RestoreThread` in CPython's manual). Such threads hang here
/// instead, as they do in CPython since 3.14.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    /// Notified when the last thread leaves a closed gate.
    empty: Condvar,
}

#[derive(Default)]
struct GateState {
    /// Number of threads inside.
    inside: usize,
    /// The thread that shuts the interpreter down. Set when the gate is closed; only this thread may enter afterwards.
    shutdown_thread: Option<ThreadId>,
}

impl Gate {
    /// Counts the calling thread and returns true, or returns false if the gate is closed to it.
    fn try_enter(&self) -> bool {
        if IS_DISPATCHER.get() {
            return true;
        }
        let mut state = self.state.lock();
        let may_enter = state.shutdown_thread.is_none_or(|shutdown_thread| shutdown_thread == thread::current().id());
        state.inside += usize::from(may_enter);
        may_enter
    }

    fn leave(&self) {
        if !IS_DISPATCHER.get() {
            let mut state = self.state.lock();
            state.inside -= 1;
            if state.inside == 0 && state.shutdown_thread.is_some() {
                self.empty.notify_all();
            }
        }
    }

    fn close(&self) {
        self.state.lock().shutdown_thread = Some(thread::current().id());
    }

    fn wait_until_empty(&self) {
        // After a timeout, shutdown continues although threads are inside.
        let _ = self.empty.wait_timeout_while(self.state.lock(), LEAVE_TIMEOUT, |state| state.inside > 0);
    }
}

impl Process {
    fn new(id: ProcessId) -> Self {
        let (runtime, records) = (Mutex::new(RuntimeState::NotStarted), Mutex::default());
        let (completions, logger, gate) = (OnceLock::new(), OnceLock::new(), Gate::default());
        Self { id, runtime, completions, logger, gate, records, child: OnceLock::new() }
    }

    /// Returns the Tokio runtime. The first call starts it; calls after [`shut_down`] fail.
    pub(crate) fn runtime(&self, _: Python<'_>) -> Result<Arc<Runtime>> {
        let mut state = self.runtime.lock();
        if let RuntimeState::NotStarted = *state {
            let has_arenas = std::env::var_os("MALLOC_ARENA_MAX").is_none();
            *state = RuntimeState::Running(Arc::new(modelcache::runtime::start(has_arenas)?));
            // Start this thread before other work exhausts the thread limit of the process. If it cannot be started,
            // only calls from event loops fail.
            let _ = dispatcher(&self.completions);
        }
        match &*state {
            RuntimeState::Running(runtime) => Ok(runtime.clone()),
            _ => Err(Error::new(ErrorKind::Other, "the Python interpreter is shutting down; no call can be started")),
        }
    }

    /// Starts the thread that [`queue_callback`](Self::queue_callback) needs. Fails if the system refuses another
    /// thread.
    pub(crate) fn start_completions(&self) -> Result<()> {
        dispatcher(&self.completions).map(|_| ())
    }

    /// Queues the callback `done` with the outcome of a call. A dispatcher thread takes the interpreter's lock and
    /// calls `done`, so that no thread of the runtime has to wait for that lock.
    pub(crate) fn queue_callback(&self, done: Py<PyAny>, outcome: Result<CallOutput>) {
        if let Some(completions) = self.completions.get() {
            completions.send(Message::CallFinished(done, outcome));
        }
    }

    /// Queues a log record until a thread with the interpreter's lock passes it to `logging`.
    pub(crate) fn log(&self, record: Record) {
        let mut records = self.records.lock();
        if records.len() < RECORDS_MAX {
            records.push_back(record);
        }
        // Only the first record has to wake the dispatcher, which then empties the whole queue.
        let is_first = records.len() == 1;
        drop(records);
        if is_first {
            // If the thread cannot be started, the next call from Python takes the records.
            let _ = dispatcher(&self.logger).map(|logger| logger.send(Message::LogRecords));
        }
    }

    /// Removes and returns the queued log records.
    pub(crate) fn take_records(&self) -> VecDeque<Record> {
        std::mem::take(&mut *self.records.lock())
    }
}

/// A thread that calls into Python, so that the threads of the runtime do not have to wait for the interpreter's lock.
struct Dispatcher {
    messages: Sender<Message>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Message {
    /// A call from an event loop has finished: its callback and its outcome.
    CallFinished(Py<PyAny>, Result<CallOutput>),
    /// Log records are queued.
    LogRecords,
    Stop,
}

/// Returns the dispatcher in `slot` and starts it on first use.
fn dispatcher(slot: &OnceLock<Dispatcher>) -> Result<&Dispatcher> {
    match slot.get() {
        Some(dispatcher) => Ok(dispatcher),
        None => {
            let started = Dispatcher::start().map_err(|cause| modelcache::runtime::no_thread(Some(cause)))?;
            Ok(slot.get_or_init(|| started))
        }
    }
}

impl Dispatcher {
    fn start() -> io::Result<Self> {
        let (messages, receiver) = mpsc::channel();
        let thread = thread::Builder::new().name("modelcache-dispatcher".into()).spawn(move || run(&receiver))?;
        Ok(Self { messages, thread: Mutex::new(Some(thread)) })
    }

    fn send(&self, message: Message) {
        // Fails only after the thread has stopped, at interpreter shutdown.
        let _ = self.messages.send(message);
    }

    /// Stops the thread and waits for it. Gives up after [`LEAVE_TIMEOUT`], because a logging handler may block it.
    fn stop(&self) {
        self.send(Message::Stop);
        let Some(thread) = self.thread.lock().take() else { return };
        let end = Instant::now() + LEAVE_TIMEOUT;
        // `JoinHandle` has no join with a timeout.
        while !thread.is_finished() && Instant::now() < end {
            thread::sleep(POLL_INTERVAL);
        }
    }
}

fn run(receiver: &Receiver<Message>) {
    IS_DISPATCHER.set(true);
    while let Ok(message) = receiver.recv() {
        // `try_attach` returns `None` while the interpreter shuts down. The thread ends then, as it does on `Stop`.
        let attached = match message {
            Message::Stop => None,
            Message::LogRecords => Python::try_attach(logs::forward_records),
            // Log records are forwarded by the Python task that awaits this call. A logging handler must not block this
            // thread, because the handler may wait for an event loop that this thread has to wake.
            Message::CallFinished(done, outcome) => Python::try_attach(|py| {
                if let Err(error) = CallOutput::call_back(py, done.bind(py), outcome) {
                    error.write_unraisable(py, Some(done.bind(py)));
                }
            }),
        };
        if attached.is_none() {
            return;
        }
    }
}

/// A value that only the process that created it may use and drop. If a forked child drops its copy, the value is
/// leaked.
pub(crate) struct ProcessLocal<T> {
    owner: ProcessId,
    value: Option<T>,
}

impl<T> ProcessLocal<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { owner: ProcessId::here(), value: Some(value) }
    }

    /// Returns the value in the process that created it, `None` in any other.
    pub(crate) fn get(&self) -> Option<&T> {
        self.value.as_ref().filter(|_| self.owner == ProcessId::here())
    }

    /// Returns the value in any process. A forked child may only read it, and may take none of its locks that another
    /// thread of the parent could have held.
    pub(crate) fn of_any_process(&self) -> Option<&T> {
        self.value.as_ref()
    }

    /// Takes the value in the process that created it. Returns `None` in any other.
    pub(crate) fn take(&mut self) -> Option<T> {
        if self.owner == ProcessId::here() { self.value.take() } else { None }
    }
}

impl<T> Drop for ProcessLocal<T> {
    fn drop(&mut self) {
        if self.owner != ProcessId::here() {
            // Dropping the value would release locks that the parent still holds.
            std::mem::forget(self.value.take());
        }
    }
}
