//! What `get`, `exec` and `prewarm` share: which files of which revision, and how long to try.

use crate::human;
use clap::Args;
use modelcache::cache::GetOptions;
use modelcache::{Error, Reference, Result, Selection, settings};
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
        Ok(GetOptions { selection: Selection::globs(&self.include, &self.exclude)?, ..GetOptions::default() })
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
