//! Logs: what the library traces becomes records of Python's `logging`, below the logger `modelcache`.
//!
//! Nobody who logs waits for the interpreter: records stand in a queue until a call goes back to Python, which takes them
//! there, or a courier has them taken. A logging handler may make calls. How much
//! is recorded follows the level of that logger, looked up whenever a call is made.

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

/// Targets that are ours.
const OURS: &str = "modelcache";

/// Level, logger and text of a record, as Python counts levels.
pub(crate) type Record = (u8, String, String);

/// The lowest level that Python's logger wants; warnings until it was asked.
static LEVEL: AtomicU8 = AtomicU8::new(30);

/// Begins to record.
pub(crate) fn start() {
    // Somebody else's subscriber, in a build that has one, keeps its place.
    let _ = tracing::subscriber::set_global_default(Recorder);
}

/// Asks Python's logger how much it wants.
pub(crate) fn look_up_level(py: Python<'_>) {
    static LEVEL_OF_LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let level = LEVEL_OF_LOGGER.import(py, "modelcache._logging", "level").and_then(|level| level.call0());
    if let Ok(level) = level.and_then(|level| level.extract::<u8>()) {
        LEVEL.store(level, Ordering::Relaxed);
    }
}

/// Has Python take the records that wait; for a courier, which no call waits for.
pub(crate) fn hand_over(py: Python<'_>) {
    static HAND_OVER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if let Err(error) = HAND_OVER.import(py, "modelcache._logging", "hand_over").and_then(|hand_over| hand_over.call0())
    {
        error.write_unraisable(py, None);
    }
}

/// Level in Python's numbers; `logging` has none below debug.
fn number(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        Level::DEBUG => 10,
        Level::TRACE => 5,
    }
}

/// Records events, and knows no spans.
struct Recorder;

impl Subscriber for Recorder {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        let is_ours = metadata.is_event() && metadata.target().starts_with(OURS);
        if is_ours { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        number(metadata.level()) >= LEVEL.load(Ordering::Relaxed)
            && metadata.is_event()
            && metadata.target().starts_with(OURS)
    }

    fn event(&self, event: &Event<'_>) {
        let Some(process) = process::existing() else { return };
        let mut text = Text::default();
        event.record(&mut text);
        let metadata = event.metadata();
        // Handlers write records to terminals and files as they are.
        let text = printable::line(&(text.message + &text.fields)).into_owned();
        process.log((number(metadata.level()), metadata.target().replace("::", "."), text));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// `message field=value`, as the command line writes it.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a text cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
