//! The log: on standard error, as text or JSON, in step with the progress bar.

use crate::output::{ErrorLine, Output};
use modelcache::settings::{LogFormat, LogSettings};
use modelcache::{Error, ErrorKind, Result};
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Registry};

/// Starts logging for the whole process. `--quiet` leaves errors only, unless a filter was set.
pub(crate) fn start(settings: &LogSettings, output: &Output) -> Result<()> {
    let filter = if output.is_quiet() && settings.source.is_none() { "error" } else { settings.filter.as_str() };
    // A bare level is the usual case, and needs none of the machinery of a filter.
    let started = match filter.parse::<LevelFilter>() {
        Ok(level) => install(lines(settings.format, output), level),
        Err(_) => {
            if let Some(word) = filter.split(',').map(str::trim).find(|word| is_slip(word)) {
                return Err(settings.bad_filter(format!("{word:?} is no level")));
            }
            let filter = EnvFilter::builder().parse(filter).map_err(|why| settings.bad_filter(why))?;
            install(lines(settings.format, output), filter)
        }
    };
    started.map_err(|cause| Error::new(ErrorKind::Other, "cannot start the log").cause(cause))
}

/// A word that stands alone is meant as a level. As the name of a part, which it could be, it would silence all others.
fn is_slip(word: &str) -> bool {
    let is_part = word.contains(['=', ':', '[']);
    !word.is_empty() && !is_part && word.parse::<LevelFilter>().is_err()
}

type Lines = Box<dyn Layer<Registry> + Send + Sync>;

fn install(
    lines: Lines,
    filter: impl Layer<tracing_subscriber::layer::Layered<Lines, Registry>> + Send + Sync,
) -> Result<(), tracing::subscriber::SetGlobalDefaultError> {
    tracing::subscriber::set_global_default(Registry::default().with(lines).with(filter))
}

fn lines<S: Subscriber + for<'a> LookupSpan<'a>>(
    format: LogFormat,
    output: &Output,
) -> Box<dyn Layer<S> + Send + Sync> {
    let layer =
        tracing_subscriber::fmt::layer().with_writer(Writer(output.error_line())).with_ansi(output.has_colour());
    match format {
        LogFormat::Text => layer.with_target(false).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    }
}

/// Writes whole lines between two drawings of the progress bar.
struct Writer(ErrorLine);

impl<'a> MakeWriter<'a> for Writer {
    type Writer = ErrorLine;

    fn make_writer(&'a self) -> ErrorLine {
        self.0.clone()
    }
}
