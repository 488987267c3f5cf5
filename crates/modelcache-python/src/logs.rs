//! Forwards the library's `tracing` events to Python's `logging`, to loggers below `modelcache`.
//!
//! Logging never waits for the interpreter's lock. Records are queued until the Python code of a call takes them, or a
//! dispatcher thread forwards them. A logging handler may use the cache. The level of the logger `modelcache`
//! determines which events are recorded. It is looked up whenever a call is made.

use crate::process;
use modelcache::printable;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU8, Ordering};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

/// Prefix of the targets that are recorded. Events of dependencies are dropped.
const TARGET_PREFIX: &str = "modelcache";

/// A log record: level in Python's numbers, name of the logger, text.
pub(crate) type Record = (u8, String, String);

/// The lowest level that is recorded, in Python's numbers: WARNING until the logger's level is first looked up.
static LEVEL: AtomicU8 = AtomicU8::new(30);

/// Installs the subscriber that records events.
pub(crate) fn install() {
    // Fails if a global subscriber is already set, for instance by a command that ran in this process. That one stays
    // in place.
    let _ = tracing::subscriber::set_global_default(Recorder);
}

/// Copies the effective level of Python's logger, so that a disabled event does not need the interpreter's lock.
pub(crate) fn look_up_level(py: Python<'_>) {
    static LEVEL_OF_LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let level = LEVEL_OF_LOGGER.import(py, "modelcache._logging", "level").and_then(|level| level.call0());
    // On failure, such as during interpreter shutdown, keep the last known level.
    if let Ok(level) = level.and_then(|level| level.extract::<u8>()) {
        LEVEL.store(level, Ordering::Relaxed);
    }
}

/// Makes Python take the queued records. Called on dispatcher threads; the Python code of a call takes them by itself.
pub(crate) fn forward_records(py: Python<'_>) {
    static FORWARD_RECORDS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if let Err(error) = FORWARD_RECORDS
        .import(py, "modelcache._logging", "forward_records")
        .and_then(|forward_records| forward_records.call0())
    {
        // A dispatcher has no caller to raise to.
        error.write_unraisable(py, None);
    }
}

/// Returns the level in Python's numbers. `logging` defines none below DEBUG (10), so TRACE is 5.
fn python_level(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        Level::DEBUG => 10,
        Level::TRACE => 5,
    }
}

/// A subscriber that queues events and ignores spans.
struct Recorder;

impl Subscriber for Recorder {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        let is_recorded = metadata.is_event() && metadata.target().starts_with(TARGET_PREFIX);
        // `sometimes`: `enabled` is called for every event, because the level may change later.
        if is_recorded { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        python_level(metadata.level()) >= LEVEL.load(Ordering::Relaxed)
            && metadata.is_event()
            && metadata.target().starts_with(TARGET_PREFIX)
    }

    fn event(&self, event: &Event<'_>) {
        let Some(process) = process::existing() else { return };
        let mut text = Text::default();
        event.record(&mut text);
        let metadata = event.metadata();
        // Escape control characters, because handlers write the text to terminals and files as it is.
        let text = printable::line(&(text.message + &text.fields)).into_owned();
        // Events of this crate go to the loggers below `modelcache`, like those of the library.
        let logger = metadata.target().replace("modelcache_native", "modelcache").replace("::", ".");
        process.log((python_level(metadata.level()), logger, text));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The text of an event as `message field=value`, the format of the command line.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a `String` cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
