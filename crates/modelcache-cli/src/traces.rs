//! Traces: spans of commands, requests and their phases, sent by OTLP over HTTP to the collector that the standard
//! variables of OpenTelemetry name (`OTEL_EXPORTER_OTLP_ENDPOINT`).
//!
//! Log events are not sent, because only the log redacts credentials. Spans hold names, numbers, and the id and the
//! redacted path of a request, but no text that another server sent.

use crate::logs::is_trace_span;
use modelcache::{Error, Result, redact};
use opentelemetry::KeyValue;
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_TIMEOUT,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_HEADERS, OTEL_EXPORTER_OTLP_TRACES_TIMEOUT,
    SpanExporter, WithHttpConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{BatchConfig, BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, SpanData};
use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;

/// Timeout of a request to the collector: the default of the OTLP specification.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for which the end of the program waits for the last spans.
const FLUSH_WAIT: Duration = Duration::from_secs(3);

/// The warning for a collector that does not answer.
const NO_TRACES: &str = "cannot send traces to the collector of OTEL_EXPORTER_OTLP_ENDPOINT; they are lost until it \
                         answers (OTEL_SDK_DISABLED=true turns traces off)";

static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

/// Returns the layer that sends spans, or `None` if the environment names no collector. Panics inside a Tokio runtime,
/// because the blocking HTTP client of the exporter starts its own.
///
/// # Errors
/// `Invalid` if the collector cannot be used. Its variables may be meant for another program, so that this is no reason
/// to fail.
pub(crate) fn layer<S>() -> Result<Option<Box<dyn Layer<S> + Send + Sync>>>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    if !is_requested() {
        return Ok(None);
    }
    // The values of these headers are often API keys.
    for headers in [OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_TRACES_HEADERS].into_iter().filter_map(variable) {
        headers.split(',').filter_map(|header| header.split_once('=')).for_each(|(_, value)| redact::register(value));
    }
    let refused = |why: &str, hint| Error::invalid(format!("traces cannot be sent: {}", redact::text(why))).hint(hint);
    if let Some(protocol) = protocol().filter(|protocol| !protocol.eq_ignore_ascii_case("http/protobuf")) {
        let hint = "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, and the port for HTTP (4318)";
        return Err(refused(&format!("the protocol {protocol:?} is not built in"), hint));
    }
    let invalid = |why: &dyn std::error::Error| {
        let hint = "set OTEL_EXPORTER_OTLP_ENDPOINT to the address of the collector, such as http://127.0.0.1:4318";
        refused(&why.to_string(), hint)
    };
    let timeout = variable(OTEL_EXPORTER_OTLP_TRACES_TIMEOUT).or_else(|| variable(OTEL_EXPORTER_OTLP_TIMEOUT));
    let timeout = timeout.and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
    let client = reqwest::blocking::Client::builder()
        .timeout(timeout.unwrap_or(TIMEOUT))
        // The headers must not reach another host.
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|why| invalid(&why))?;
    let exporter = SpanExporter::builder().with_http().with_http_client(client).build().map_err(|why| invalid(&why))?;
    let exporter = WarningExporter { exporter, has_failed: AtomicBool::new(false) };
    let provider = SdkTracerProvider::builder()
        .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batch_config()).build())
        .with_resource(resource())
        .build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("modelcache"))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_context_activation(false);
    // Set once: the subscriber, too, is installed only once per process.
    let _ = PROVIDER.set(provider);
    Ok(Some(layer.with_filter(filter_fn(is_trace_span)).boxed()))
}

/// Ends `span`, although tasks in the background may still hold clones of it.
pub(crate) fn end(span: &Span) {
    span.context().span().end();
}

/// Sends the spans that have ended, waiting for at most [`FLUSH_WAIT`], and stops tracing.
pub(crate) fn finish() {
    if let Some(provider) = PROVIDER.get() {
        // The exporter has logged all other failures.
        if let Err(OTelSdkError::Timeout(_)) = provider.shutdown_with_timeout(FLUSH_WAIT) {
            tracing::warn!(wait = ?FLUSH_WAIT, "{NO_TRACES}");
        }
    }
}

/// Returns the limits of the queue of ended spans. The SDK takes values from the environment as they are, also those
/// that need all memory or a whole core.
fn batch_config() -> BatchConfig {
    let number = |name, default: u64, range: RangeInclusive<u64>| {
        let number = variable(name).and_then(|value| value.parse().ok()).unwrap_or(default);
        number.clamp(*range.start(), *range.end())
    };
    let queue = number("OTEL_BSP_MAX_QUEUE_SIZE", 2048, 1..=65_536) as usize;
    let batch = number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, 1..=65_536) as usize;
    let delay = Duration::from_millis(number("OTEL_BSP_SCHEDULE_DELAY", 5000, 50..=3_600_000));
    let builder = BatchConfigBuilder::default().with_max_queue_size(queue).with_scheduled_delay(delay);
    builder.with_max_export_batch_size(batch.min(queue)).build()
}

/// Returns true if the environment names a collector, and traces are not switched off.
fn is_requested() -> bool {
    let has_endpoint = [OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT]
        .into_iter()
        .any(|name| variable(name).is_some());
    let is_disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let is_otlp = |exporters: String| exporters.split(',').any(|exporter| exporter.trim() == "otlp");
    let has_other_exporter = variable("OTEL_TRACES_EXPORTER").is_some_and(|exporters| !is_otlp(exporters));
    has_endpoint && !is_disabled && !has_other_exporter
}

fn protocol() -> Option<String> {
    variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL").or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL"))
}

/// Returns the value of a variable. By the OpenTelemetry specification, an empty value counts as not set.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// Returns the description of this process. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` override the name.
fn resource() -> Resource {
    let detected = Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let has_name = variable("OTEL_SERVICE_NAME").is_some()
        || variable("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|attributes| attributes.contains("service.name="));
    if has_name { detected.build() } else { detected.with_service_name("modelcache").build() }
}

/// Exports spans, and logs a warning when the collector begins to fail.
#[derive(Debug)]
struct WarningExporter {
    exporter: SpanExporter,
    has_failed: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for WarningExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let had_failed = self.has_failed.swap(result.is_err(), Ordering::Relaxed);
        if let (Err(error), false) = (&result, had_failed) {
            tracing::warn!(%error, "{NO_TRACES}");
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> Result<(), OTelSdkError> {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::Context;
    use opentelemetry_sdk::trace::{Span as SdkSpan, SpanProcessor};
    use std::sync::{Arc, Mutex, MutexGuard};
    use tracing_subscriber::layer::SubscriberExt as _;

    /// Records the names of the spans that have ended.
    #[derive(Debug, Clone, Default)]
    struct Ended(Arc<Mutex<Vec<String>>>);

    impl Ended {
        fn names(&self) -> MutexGuard<'_, Vec<String>> {
            self.0.lock().expect("no thread panicked")
        }
    }

    impl SpanProcessor for Ended {
        fn on_start(&self, _: &mut SdkSpan, _: &Context) {}

        fn on_end(&self, span: SpanData) {
            self.names().push(span.name.into_owned());
        }

        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }

        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }

    #[test]
    fn a_span_that_is_held_elsewhere_ends_once_and_at_the_call() {
        let ended = Ended::default();
        let provider = SdkTracerProvider::builder().with_span_processor(ended.clone()).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
        let span = tracing::info_span!("command");
        let held = span.clone();
        drop(span.in_scope(|| tracing::info_span!("phase")));
        end(&span);
        assert_eq!(*ended.names(), ["phase", "command"]);
        drop((span, held));
        assert_eq!(ended.names().len(), 2);
    }
}
