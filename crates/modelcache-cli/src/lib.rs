//! The command line of modelcache: parse, gather settings, run one verb, translate its outcome.
//!
//! A library, so that tests and the documentation's generator can reach it; `main.rs` only calls [`run`]. Standard
//! output carries what was asked for and nothing else; all talk goes to standard error. What is slow to build (runtime,
//! log, cache) is built only for the verbs that need it.

pub mod docs;
pub mod exit;

mod arguments;
mod environment;
mod human;
mod logs;
mod metrics;
mod output;
mod progress;
mod signals;
mod small_memory;
mod verbs;

use arguments::Arguments;
use clap::Parser;
use modelcache::Result;
use output::Output;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use verbs::Session;

/// How long an interrupted command waits for its threads to put their files away.
const PUT_AWAY: Duration = Duration::from_secs(1);

/// How long a command that is over waits until the remote has taken back what had begun there in vain.
pub(crate) const TAKEN_BACK: Duration = Duration::from_secs(3);

/// Runs the command line `args` (the program's name first) and gives its exit code. Where address space is limited it
/// starts the program once more, with an allocator that takes less of it.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    std::panic::set_hook(Box::new(output::tell_panic));
    let args: Vec<OsString> = args.into_iter().collect();
    small_memory::restart_with_one_arena(&args);
    let code = match Arguments::try_parse_from(&args) {
        Ok(arguments) => {
            let output = Output::new(&arguments.global);
            execute(&arguments, &output).unwrap_or_else(|error| {
                output.error(&error, None);
                exit::code(error.kind())
            })
        }
        Err(refusal) => arguments::explain(refusal, &args),
    };
    ExitCode::from(code)
}

/// Runs the verb; an error that it has not shown itself comes back.
fn execute(arguments: &Arguments, output: &Output) -> Result<u8> {
    if let Some(answered) = arguments.verb.answer_at_once(output) {
        return answered.map(|()| exit::DONE);
    }
    if let verbs::Verb::Sync(sync) = &arguments.verb {
        return sync.run();
    }
    let started = Instant::now();
    if let verbs::Verb::Doctor(doctor) = &arguments.verb {
        return doctor.run(&arguments.global, output);
    }
    let settings = environment::gather(&arguments.global)?;
    logs::start(&settings.log, output)?;
    settings.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));

    let runtime = modelcache::runtime::start(!small_memory::has_one_arena())?;
    let session = Session {
        output,
        config: settings.config,
        metrics_file: settings.metrics_file,
        run: metrics::Run::default(),
        started,
    };
    let ended = runtime.block_on(signals::or_signal(arguments.verb.run(&session)));
    let code = match &ended {
        Ok(Ok(code)) => *code,
        Ok(Err(error)) => {
            session.run.failed(error.kind());
            exit::code(error.kind())
        }
        Err(signal) => signal.exit_code(),
    };
    runtime.block_on(session.write_metrics(arguments.verb.name(), code));
    runtime.block_on(modelcache::transfer::wait_for_cleanup(TAKEN_BACK));
    match ended {
        Ok(outcome) => {
            runtime.shutdown_background();
            outcome
        }
        Err(signal) => {
            output.interrupted(signal);
            runtime.shutdown_timeout(PUT_AWAY);
            Ok(signal.exit_code())
        }
    }
}
