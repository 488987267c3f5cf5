//! Options that `get`, `exec` and `prewarm` share: files, revision, allowed tiers, timeout.

use super::Session;
use crate::human;
use clap::Args;
use modelcache::cache::GetOptions;
use modelcache::{Error, Reference, Result, Selection, Tier, settings};
use std::future::Future;
use std::time::Duration;

/// Options for files, revision, tiers and timeout.
#[derive(Debug, Default, Args)]
pub(crate) struct GetArguments {
    /// Only files that match this pattern; may be repeated. `*` matches across folders
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// Leave out files that match this pattern; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Branch, tag or commit to use instead of the one in the reference
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Fail if the command takes longer than this, for example 90s or 10m
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    #[command(flatten)]
    pub(crate) tiers: TierArguments,
}

/// Options for the tiers that may be used.
#[derive(Debug, Default, Args)]
pub(crate) struct TierArguments {
    /// Resolve revisions and tags again, even if the cached answer is recent, and download NAME@VERSION again if the
    /// remote has other content under it now; fail if the server cannot be reached
    #[arg(long, conflicts_with_all = ["offline", "local_files_only"])]
    pub(crate) refresh: bool,
    /// Contact no origin: use the files on disk and remote, and the last known meaning of revisions
    #[arg(long)]
    pub(crate) offline: bool,
    /// Contact neither origin nor remote: use only the files on this machine
    #[arg(long)]
    pub(crate) local_files_only: bool,
}

impl TierArguments {
    /// Returns `options` with the tiers that these arguments allow, and with `refresh`.
    pub(crate) fn apply(&self, options: GetOptions) -> GetOptions {
        let max_tier = match (self.local_files_only, self.offline) {
            (true, _) => Tier::Disk,
            (false, true) => Tier::Remote,
            (false, false) => options.max_tier,
        };
        GetOptions { refresh: self.refresh, max_tier, ..options }
    }
}

/// Parses a duration argument.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    settings::parse_duration(text).map_err(message_with_hint)
}

/// Parses an age or a lifetime, in which a number needs a unit.
pub(super) fn lifetime(text: &str) -> Result<Duration, String> {
    settings::parse_lifetime(text).map_err(message_with_hint)
}

/// Returns an error and its hint as one line, for clap.
pub(super) fn message_with_hint(error: Error) -> String {
    match error.hint_text() {
        Some(hint) => format!("{}; {hint}", error.message()),
        None => error.message().to_owned(),
    }
}

impl GetArguments {
    /// Returns the options for [`Cache::get`](modelcache::Cache::get).
    pub(crate) fn options(&self) -> Result<GetOptions> {
        let selection = Selection::globs(&self.include, &self.exclude)?;
        Ok(self.tiers.apply(GetOptions { selection, ..GetOptions::default() }))
    }

    /// Parses `text` as a reference, at the revision of `--revision` if that is set.
    pub(crate) fn reference(&self, text: &str) -> Result<Reference> {
        let reference = Reference::parse(text)?;
        match &self.revision {
            Some(revision) => reference.at_revision(revision),
            None => Ok(reference),
        }
    }

    /// Parses every reference before anything is downloaded. Reports each one that cannot be parsed, and returns `None`
    /// if there is one.
    pub(crate) fn references(&self, session: &Session<'_>, texts: &[String]) -> Option<Vec<Reference>> {
        let first = texts.first().filter(|first| first.starts_with("hf://"));
        let explained = |text: &String, error: Error| match first {
            // `hf download` takes file names after the repository.
            Some(first) if !text.contains(['@', ':']) => Error::invalid(error.message()).hint(format!(
                "for a file of the repository write {first} --include {text}; another artifact is NAME@VERSION"
            )),
            _ => error,
        };
        let parse = |text: &String| {
            let parsed = self.reference(text).map_err(|error| explained(text, error));
            parsed.map_err(|error| session.report_failure(&error, Some(text))).ok()
        };
        let parsed: Vec<_> = texts.iter().map(parse).collect();
        parsed.into_iter().collect()
    }

    /// Runs `work`. Fails if it takes longer than `--timeout`.
    pub(crate) async fn with_timeout<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.timeout {
            None => work.await,
            Some(limit) => tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
                Err(Error::unavailable(format!("not done within {}", human::duration(limit)))
                    .hint("use a longer --timeout; run the same command again to resume the download"))
            }),
        }
    }
}
