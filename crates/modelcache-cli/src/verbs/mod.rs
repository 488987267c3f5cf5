//! The commands, one file each: arguments, call, and output.
//!
//! A command returns its exit code. It returns an error if it failed and has not printed the error itself.

pub(crate) mod backfill;
pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod evict;
pub(crate) mod exec;
pub(crate) mod get;
pub(crate) mod get_arguments;
pub(crate) mod help;
pub(crate) mod inspect;
pub(crate) mod into;
pub(crate) mod ls;
pub(crate) mod man;
pub(crate) mod pin;
pub(crate) mod prewarm;
pub(crate) mod prune;
pub(crate) mod put;
pub(crate) mod resolve;
pub(crate) mod serve;
pub(crate) mod stats;
pub(crate) mod storage_initializer;
pub(crate) mod tag;
pub(crate) mod verify;
pub(crate) mod watch;

use crate::arguments::Global;
use crate::output::Output;
use crate::{exit, metrics};
use clap::Subcommand;
use futures::future::{FutureExt as _, LocalBoxFuture, TryFutureExt as _, ready};
use modelcache::cache::Artifact;
use modelcache::config::Durable;
use modelcache::progress::Phase;
use modelcache::settings::ServeSettings;
use modelcache::{Cache, Config, Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The command to run.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Get(get::Get),
    Exec(exec::Exec),
    Prewarm(prewarm::Prewarm),
    Put(put::Put),
    Tag(tag::Tag),
    Resolve(resolve::Resolve),
    Backfill(backfill::Backfill),
    Evict(evict::Evict),
    Pin(pin::Pin),
    Unpin(pin::Unpin),
    Prune(prune::Prune),
    Ls(ls::Ls),
    Inspect(inspect::Inspect),
    Stats(stats::Stats),
    Verify(verify::Verify),
    Serve(serve::Serve),
    StorageInitializer(storage_initializer::StorageInitializer),
    Doctor(doctor::Doctor),
    Completions(completions::Completions),
    Man(man::Man),
    Help(help::Help),
}

/// The context in which a command runs.
pub(crate) struct Session<'a> {
    pub(crate) global: &'a Global,
    pub(crate) output: &'a Output,
    pub(crate) config: Config,
    /// The settings of the daemon.
    pub(crate) serve: ServeSettings,
    /// The file for the Prometheus metrics of this command, if one is configured.
    pub(crate) metrics_file: Option<PathBuf>,
    pub(crate) metrics: metrics::CommandMetrics,
    pub(crate) started: Instant,
}

impl Session<'_> {
    /// Records a completed get and prints its summary line.
    pub(crate) fn report_get(&self, artifact: &Artifact) {
        self.metrics.record_get(&artifact.report);
        self.output.message(&get::summary(&artifact.key, &artifact.report));
    }

    /// Records and prints a failure. `reference` names the reference that failed, if the command has several.
    pub(crate) fn report_failure(&self, error: &Error, reference: Option<&str>) {
        self.metrics.record_failure(error.kind());
        self.output.error(error, reference);
    }

    /// Writes the metrics file, if one is configured. `verb` is the command, `code` its exit code.
    pub(crate) async fn write_metrics(&self, verb: &'static str, code: u8) {
        let Some(path) = &self.metrics_file else { return };
        // Without a cache directory, only the metrics of the command are written.
        let stats = match self.config.dir.exists().then(|| self.cache()) {
            Some(Ok(cache)) => cache.stats().await.ok(),
            _ => None,
        };
        if let Err(error) = metrics::write(path, &self.metrics.text(verb, code, self.started.elapsed(), stats.as_ref()))
        {
            let message = "the metrics file cannot be written; check MODEL_CACHE_METRICS_FILE";
            tracing::warn!(path = %path.display(), %error, "{message}");
        }
    }

    /// Opens the cache for a command that syncs downloaded files to stable storage before it ends.
    pub(crate) fn cache(&self) -> Result<Cache> {
        let mut config = self.config.clone();
        config.durable = Durable::Wait;
        Cache::open(config)
    }

    /// Opens the cache for a command that only reads, or only removes. A missing directory counts as empty, and is not
    /// created.
    pub(crate) fn existing_cache(&self) -> Result<Cache> {
        let mut config = self.config.clone();
        (config.durable, config.create_dir) = (Durable::Wait, false);
        if !config.dir.exists() {
            self.output.message(&format!("there is no cache directory at {}", config.dir.display()));
        }
        Cache::open(config)
    }

    /// Returns the configuration of a command that ends or starts another program after a get. Files are synced later
    /// unless the user requires it at once, because a background sync would delay the end of the process.
    fn config_without_background_sync(&self) -> Config {
        let mut config = self.config.clone();
        if config.durable == Durable::Background {
            config.durable = Durable::Later;
        }
        config
    }
}

impl Verb {
    /// Runs a command that needs neither settings nor cache. Returns `None` for all other commands.
    pub(crate) fn run_without_settings(&self, output: &Output) -> Option<Result<()>> {
        match self {
            Self::Completions(verb) => Some(verb.run(output)),
            Self::Man(verb) => Some(verb.run(output)),
            Self::Help(verb) => Some(verb.run(output)),
            _ => None,
        }
    }

    /// Returns the exit code of a failure. Every failure of `storage-initializer` has exit code 1, as KServe requires.
    pub(crate) fn exit_code(&self, kind: ErrorKind) -> u8 {
        if let Self::StorageInitializer(_) = self { exit::OTHER } else { exit::code(kind) }
    }

    /// Returns true if the command waits for signals itself, and ends in its own way. Any other command is dropped when
    /// a signal arrives.
    pub(crate) fn handles_signals(&self) -> bool {
        match self {
            // The daemon lets running requests finish.
            Self::Serve(_) => true,
            Self::Stats(stats) => stats.watch.is_some(),
            _ => false,
        }
    }

    /// Returns the name of the command on the command line.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Get(_) => "get",
            Self::Exec(_) => "exec",
            Self::Prewarm(_) => "prewarm",
            Self::Put(_) => "put",
            Self::Evict(_) => "evict",
            Self::Pin(_) => "pin",
            Self::Unpin(_) => "unpin",
            Self::Prune(_) => "prune",
            Self::Ls(_) => "ls",
            Self::Inspect(_) => "inspect",
            Self::Stats(_) => "stats",
            Self::Backfill(_) => "backfill",
            Self::Tag(_) => "tag",
            Self::Resolve(_) => "resolve",
            Self::Verify(_) => "verify",
            Self::Serve(_) => "serve",
            Self::StorageInitializer(_) => "storage-initializer",
            Self::Doctor(_) => "doctor",
            Self::Completions(_) => "completions",
            Self::Man(_) => "man",
            Self::Help(_) => "help",
        }
    }

    /// Runs the command and returns its exit code. The future is on the heap and has the size that this command needs:
    /// a future for all commands would be copied several times, and touch a hundred pages of the stack.
    pub(crate) fn run<'a>(&'a self, session: &'a Session<'a>) -> LocalBoxFuture<'a, Result<u8>> {
        let done = |()| exit::DONE;
        match self {
            Self::Get(verb) => verb.run(session).boxed_local(),
            Self::Exec(verb) => verb.run(session).boxed_local(),
            Self::Prewarm(verb) => verb.run(session).boxed_local(),
            Self::Put(verb) => verb.run(session).map_ok(done).boxed_local(),
            Self::Tag(verb) => verb.run(session).map_ok(done).boxed_local(),
            Self::Resolve(verb) => verb.run(session).map_ok(done).boxed_local(),
            Self::Backfill(verb) => verb.run(session).boxed_local(),
            Self::Evict(verb) => verb.run(session).boxed_local(),
            Self::Pin(verb) => verb.run(session).map_ok(done).boxed_local(),
            Self::Unpin(verb) => verb.run(session).map_ok(done).boxed_local(),
            Self::Prune(verb) => verb.run(session).boxed_local(),
            Self::Ls(verb) => verb.run(session).map_ok(done).boxed_local(),
            Self::Inspect(verb) => verb.run(session).map_ok(done).boxed_local(),
            Self::Stats(verb) => verb.run(session).boxed_local(),
            Self::Verify(verb) => verb.run(session).boxed_local(),
            Self::Serve(verb) => verb.run(session).boxed_local(),
            Self::StorageInitializer(verb) => verb.run(session).map_ok(done).boxed_local(),
            // `execute` in `lib.rs` has already run these.
            Self::Completions(_) | Self::Man(_) | Self::Help(_) | Self::Doctor(_) => {
                ready(Ok(exit::DONE)).boxed_local()
            }
        }
    }
}

/// Returns the help text of a reference argument: all its forms. The forms of URIs come from the registry of origins.
fn reference_forms() -> String {
    format!("NAME@VERSION, NAME@TAG, {}", modelcache::reference::forms())
}

/// Formats the phases that took at least 0.05 s: `resolve 0.1 s, download 3.0 s`. Returns `None` if there are none.
fn phase_list(phases: &BTreeMap<Phase, Duration>) -> Option<String> {
    let shown = phases.iter().filter(|(_, spent)| spent.as_secs_f64() >= 0.05);
    let shown: Vec<_> = shown.map(|(phase, spent)| format!("{} {:.1} s", phase.name(), spent.as_secs_f64())).collect();
    (!shown.is_empty()).then(|| shown.join(", "))
}

/// Returns the path as text.
fn path_text(path: &Path) -> String {
    path.display().to_string()
}

/// Returns the path as an absolute path.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|cause| modelcache::Error::invalid(format!("{} is not a path", path.display())).cause(cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_listed_in_order_without_the_short_ones() {
        let phases = BTreeMap::from([
            (Phase::Download, Duration::from_secs(3)),
            (Phase::Resolve, Duration::from_millis(120)),
            (Phase::Acquire, Duration::from_millis(1)),
        ]);
        assert_eq!(phase_list(&phases).as_deref(), Some("resolve 0.1 s, download 3.0 s"));
        assert_eq!(phase_list(&BTreeMap::new()), None);
    }
}
