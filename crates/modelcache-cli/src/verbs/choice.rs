//! What `get`, `exec` and `prewarm` share: which files of which revision, how far to reach, and how long to try.

use crate::human;
use clap::Args;
use modelcache::cache::GetOptions;
use modelcache::{Error, Reference, Result, Selection, Tier, settings};
use std::future::Future;
use std::time::Duration;

/// Which files of which revision, and how long to try.
#[derive(Debug, Default, Args)]
pub(crate) struct Choice {
    /// Only files that match; may be repeated. `*` crosses folders
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// No files that match; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Branch, tag or commit, in place of the one in the reference
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Give up after this long, for instance 90s or 10m
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// Who is asked.
#[derive(Debug, Default, Args)]
pub(crate) struct Reach {
    /// Ask what a revision or tag means now, however fresh the last answer is; fail where that cannot be asked
    #[arg(long, conflicts_with_all = ["offline", "local_files_only"])]
    pub(crate) refresh: bool,
    /// Ask no origin: take what disk and remote have, and revisions as they were last known
    #[arg(long)]
    pub(crate) offline: bool,
    /// Ask neither origin nor remote: take what is on this machine
    #[arg(long)]
    pub(crate) local_files_only: bool,
}

impl Reach {
    pub(crate) fn apply(&self, options: GetOptions) -> GetOptions {
        let max_tier = match (self.local_files_only, self.offline) {
            (true, _) => Tier::Disk,
            (false, true) => Tier::Remote,
            (false, false) => options.max_tier,
        };
        GetOptions { refresh: self.refresh, max_tier, ..options }
    }
}

/// A duration as an argument.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    settings::parse_duration(text).map_err(explained)
}

/// A refusal with its remedy in one line, as clap shows it.
pub(super) fn explained(error: Error) -> String {
    match error.hint_text() {
        Some(hint) => format!("{}; {hint}", error.message()),
        None => error.message().to_owned(),
    }
}

impl Choice {
    pub(crate) fn options(&self) -> Result<GetOptions> {
        let selection = Selection::globs(&self.include, &self.exclude)?;
        Ok(self.reach.apply(GetOptions { selection, ..GetOptions::default() }))
    }

    /// The reference that `text` is, at the revision asked for.
    pub(crate) fn reference(&self, text: &str) -> Result<Reference> {
        let reference = Reference::parse(text)?;
        match &self.revision {
            Some(revision) => reference.at_revision(revision),
            None => Ok(reference),
        }
    }

    /// The outcome of `work`, unless it takes too long.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.timeout {
            None => work.await,
            Some(limit) => tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
                Err(Error::unavailable(format!("not done within {}", human::duration(limit)))
                    .hint("give it a longer --timeout; the same command starts again"))
            }),
        }
    }
}
