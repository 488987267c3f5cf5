//! The log on standard error, as text or JSON, without disturbing the progress bar.
//!
//! Each line is redacted and made printable. A bare level applies to modelcache's own targets only. The libraries (HTTP
//! client, TLS, S3 client) log requests and addresses; they are silent unless the filter names them.

use crate::output::{ErrorLine, Output};
use crate::traces;
use modelcache::settings::{LogFormat, LogSettings};
use modelcache::{Error, ErrorKind, Result, printable, redact};
use std::io::{self, IsTerminal, Write};
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::{FilterExt as _, Targets, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::layer::{Filter, Layer, SubscriberExt};
use tracing_subscriber::{EnvFilter, Registry};

/// The prefix of modelcache's own log targets.
const OWN_TARGET: &str = "modelcache";

/// Starts logging and traces for the whole process. Unless a filter was set, only errors are logged with `--quiet`, and
/// only warnings on a terminal, where the summary lines say the rest.
pub(crate) fn start(settings: &LogSettings, output: &Output) -> Result<()> {
    let filter = match settings.source {
        None if output.is_quiet() => "error",
        None if io::stderr().is_terminal() => "warn",
        _ => settings.filter.as_str(),
    };
    // A bare level is the usual case and needs no `EnvFilter`, which is slow to build.
    let lines = line_layer(settings.format, output);
    let lines = match filter.parse::<LevelFilter>() {
        Ok(level) => with_filter(lines, Targets::new().with_target(OWN_TARGET, level)),
        Err(_) => {
            if let Some(word) = filter.split(',').map(str::trim).find(|word| is_misspelt_level(word)) {
                return Err(settings.bad_filter(format!("{word:?} is not a log level")));
            }
            let filter =
                EnvFilter::builder().parse(restrict_bare_levels(filter)).map_err(|why| settings.bad_filter(why))?;
            with_filter(lines, filter)
        }
    };
    let (traces, no_traces) = match traces::layer() {
        Ok(traces) => (traces, None),
        Err(error) => (None, Some(error)),
    };
    tracing::subscriber::set_global_default(Registry::default().with(lines).with(traces))
        .map_err(|cause| Error::new(ErrorKind::Other, "cannot start the log").cause(cause))?;
    if let Some(error) = no_traces {
        tracing::warn!(hint = error.hint_text(), "{error}");
    }
    Ok(())
}

/// Returns true for the spans of traces, which log lines do not show: those of modelcache at the level `debug`.
pub(crate) fn is_trace_span(data: &Metadata<'_>) -> bool {
    data.is_span() && *data.level() == Level::DEBUG && data.target().starts_with(OWN_TARGET)
}

/// Returns the filter with each bare level restricted to modelcache's own targets.
fn restrict_bare_levels(filter: &str) -> String {
    let word = |word: &str| match word.parse::<LevelFilter>() {
        Ok(level) => format!("{OWN_TARGET}={level}"),
        Err(_) => word.to_owned(),
    };
    filter.split(',').map(str::trim).map(word).collect::<Vec<_>>().join(",")
}

/// Returns true if a word of the filter is a misspelt level. `EnvFilter` would read it as a target, and would
/// silence all other targets.
fn is_misspelt_level(word: &str) -> bool {
    let is_directive = word.contains(['=', ':', '[']);
    !word.is_empty() && !is_directive && word.parse::<LevelFilter>().is_err()
}

/// The layer that writes log lines.
type LineLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Applies `filter` to the log lines only, not to the traces.
fn with_filter(lines: LineLayer, filter: impl Filter<Registry> + Send + Sync + 'static) -> LineLayer {
    lines.with_filter(filter.and(filter_fn(|data| !is_trace_span(data)))).boxed()
}

/// Returns the layer that writes events to standard error in `format`.
fn line_layer(format: LogFormat, output: &Output) -> LineLayer {
    let writer = Writer { line: output.error_line(), format };
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(output.has_colour());
    let field = debug_fn(|writer, field, value| {
        let text = format!("{value:?}");
        match field.name() {
            "message" => write!(writer, "{}", printable::line(&text)),
            name => write!(writer, "{name}={}", printable::line(&text)),
        }
    });
    match format {
        LogFormat::Text => layer.with_target(false).fmt_fields(field.delimited(" ")).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    }
}

/// Writes log lines to standard error. The progress bar is hidden during each write.
#[derive(Clone)]
struct Writer {
    line: ErrorLine,
    format: LogFormat,
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for Writer {
    /// Writes one whole line: the formatter calls this once per event.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let text = redact::text(text.trim_end_matches('\n'));
        let text = match self.format {
            // The field formatter has already made the fields printable. The only escape sequences in the line are the
            // colours of the log.
            LogFormat::Text => text,
            LogFormat::Json => printable::json(&text).into_owned().into(),
        };
        self.line.write_all(format!("{text}\n").as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.line.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_level_applies_to_modelcache_only() {
        for (filter, becomes) in [
            ("debug,hyper=trace", "modelcache=debug,hyper=trace"),
            ("info, modelcache=debug", "modelcache=info,modelcache=debug"),
            ("hyper=trace,off", "hyper=trace,modelcache=off"),
        ] {
            assert_eq!(restrict_bare_levels(filter), becomes);
        }
    }
}
