//! The command line of modelcache: parses arguments, gathers settings, runs one command and returns its exit code.
//!
//! This crate is a library so that the Python package, tests and the documentation generator can call it; `main.rs`
//! only calls [`run`].
//! Standard output carries the result and nothing else. Messages, logs and progress go to standard error. The runtime,
//! the log and the cache are slow to start, so only the commands that need them start them.

pub mod docs;
pub mod exit;

mod arguments;
mod environment;
mod human;
mod logs;
mod metrics;
mod output;
mod program;
mod progress;
mod rate;
mod screen;
mod signals;
mod small_memory;
mod taskbar;
#[cfg(feature = "otel")]
mod traces;
mod verbs;

/// Stand-in without the feature `otel`: sends nothing.
#[cfg(not(feature = "otel"))]
mod traces {
    use tracing_subscriber::layer::Identity;

    pub(crate) fn layer() -> modelcache::Result<Option<Identity>> {
        Ok(None)
    }

    pub(crate) fn end(_: &tracing::Span) {}

    pub(crate) fn finish() {}
}

use arguments::Arguments;
use modelcache::Result;
use output::Output;
use std::ffi::OsString;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};
use tracing::field::Empty;
use tracing::{Instrument as _, Span};
use verbs::Session;

/// Longest time for which an interrupted command waits for its threads to save partial files.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(1);

/// Longest time for which a finished command waits for the remote to remove claims and unfinished uploads.
pub(crate) const CLEANUP_WAIT: Duration = Duration::from_secs(3);

/// Runs the command line `args`, which begins with the program's name, and returns the exit code.
///
/// If the address space is limited (`ulimit -v`), the program replaces itself once, with a smaller allocator.
pub fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    std::panic::set_hook(Box::new(output::report_panic));
    modelcache::option_name::write_options_with(arguments::write_option);
    let args: Vec<OsString> = args.into_iter().collect();
    program::record(&args);
    prefer_aes_128();
    code_or_panic(|| run_command(&args))
}

/// Makes the TLS connections of this program prefer AES-128-GCM to AES-256-GCM, as those of Go and of browsers do: it
/// takes less processor time, and is as secure in practice. For the Python package, the program is its native module.
pub fn prefer_aes_128() {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // The sort is stable: the order of the other suites stays.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    // Has no effect if this process has already chosen a provider.
    let _ = provider.install_default();
}

/// Returns the exit code of `work`. The panic hook has reported a panic.
fn code_or_panic(work: impl FnOnce() -> u8) -> u8 {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or(exit::PANIC)
}

fn run_command(args: &[OsString]) -> u8 {
    small_memory::restart_with_one_arena(args);
    match arguments::parse(args) {
        Ok(arguments) => {
            let output = Output::new(&arguments.global);
            execute(&arguments, &output).unwrap_or_else(|error| {
                output.error(&error, None);
                arguments.verb.exit_code(error.kind())
            })
        }
        Err(error) => arguments::print_parse_error(error, args),
    }
}

/// Runs the command and returns its exit code. Returns an error if the command failed and has not printed the error
/// itself.
fn execute(arguments: &Arguments, output: &Output) -> Result<u8> {
    // Commands without settings, cache and runtime.
    if let Some(outcome) = arguments.verb.run_without_settings(output) {
        return outcome.map(|()| exit::DONE);
    }
    let started = Instant::now();
    // The doctor gathers its own settings: it has to run even if they are invalid.
    if let verbs::Verb::Doctor(doctor) = &arguments.verb {
        return doctor.run(&arguments.global, output);
    }
    let settings = environment::gather_with(&arguments.global, |environment| match &arguments.verb {
        verbs::Verb::StorageInitializer(verb) => verb.complete_environment(&arguments.global, environment),
        _ => Ok(()),
    })?;
    logs::start(&settings.log, output)?;
    settings.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));

    let runtime = modelcache::runtime::start(!small_memory::arenas_are_limited())?;
    let session = Session {
        global: &arguments.global,
        output,
        config: settings.config,
        serve: settings.serve,
        metrics_file: settings.metrics_file,
        metrics: metrics::CommandMetrics::default(),
        started,
    };
    let name = arguments.verb.name();
    let span = match &arguments.verb {
        // A request is a trace of its own. `exec` has a span that ends before the user's command starts.
        verbs::Verb::Serve(_) | verbs::Verb::Exec(_) => Span::none(),
        _ => command_span(name),
    };
    let run = arguments.verb.run(&session).instrument(span.clone());
    let ended = match arguments.verb.handles_signals() {
        true => runtime.block_on(signals::run_handling_signals(run)),
        false => runtime.block_on(signals::run_until_signal(run)),
    };
    let code = match &ended {
        Ok(Ok(code)) => *code,
        Ok(Err(error)) => {
            session.metrics.record_failure(error.kind());
            arguments.verb.exit_code(error.kind())
        }
        Err(signal) => signal.exit_code(),
    };
    end_span(&span, code);
    runtime.block_on(session.write_metrics(name, code));
    // Background tasks remove dropped uploads and claims from the remote.
    runtime.block_on(modelcache::transfer::wait_for_cleanup(CLEANUP_WAIT));
    let outcome = match ended {
        Ok(outcome) => {
            runtime.shutdown_background();
            outcome
        }
        Err(signal) => {
            output.report_signal(signal);
            runtime.shutdown_timeout(SHUTDOWN_WAIT);
            Ok(signal.exit_code())
        }
    };
    // This call comes last, because the spans of interrupted requests end when the runtime is shut down.
    traces::finish();
    outcome
}

/// Records the exit code of a command in its span, and ends the span.
pub(crate) fn end_span(span: &Span, code: u8) {
    span.record("exit_code", i64::from(code));
    if code != exit::DONE {
        span.record("otel.status_code", "ERROR");
    }
    traces::end(span);
}

/// Returns the span of a command, for traces.
pub(crate) fn command_span(name: &str) -> Span {
    tracing::debug_span!("command", otel.name = name, otel.status_code = Empty, exit_code = Empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_has_an_exit_code_of_its_own() {
        assert_eq!(code_or_panic(|| exit::DONE), exit::DONE);
        assert_eq!(code_or_panic(|| panic!("a defect")), 70);
    }
}
