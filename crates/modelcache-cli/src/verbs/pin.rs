//! `pin` and `unpin`: protect an artifact on this disk from eviction until it is unpinned.

use super::Session;
use super::get_arguments::lifetime;
use crate::environment;
use clap::Args;
use modelcache::cache::{self, PinReport};
use modelcache::{Reference, Result};
use serde::Serialize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Protect an artifact on disk from eviction
///
/// A pinned artifact is neither evicted for space nor pruned, and `evict` refuses it. A second pin replaces the first.
#[derive(Debug, Args)]
pub(crate) struct Pin {
    /// NAME@VERSION, or another reference; it must be on disk
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
    /// How long the pin lasts, for example 12h or 7d; without it, until `unpin`
    #[arg(long = "for", value_name = "DURATION", value_parser = lifetime)]
    pub(crate) lasting: Option<Duration>,
    /// The reason, which is shown when the pin prevents an eviction
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

/// Remove the pin of an artifact
#[derive(Debug, Args)]
pub(crate) struct Unpin {
    /// NAME@VERSION, or another reference
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
}

impl Pin {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let (output, reference) = (session.output, Reference::parse(&self.reference)?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let pin = cache::Pin {
            since_unix: Some(now.as_secs()),
            until_unix: self.lasting.map(|lasting| now.saturating_add(lasting).as_secs()),
            by: Some(environment::caller()),
            reason: self.reason.clone().filter(|reason| !reason.trim().is_empty()),
        };
        let report = session.existing_cache()?.pin(&reference, pin.clone()).await?;
        if output.is_json() {
            output.print_json(&report)?;
        }
        output.message(&format!("{}: {pin}", report.key));
        Ok(())
    }
}

impl Unpin {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let (output, reference) = (session.output, Reference::parse(&self.reference)?);
        let report = session.existing_cache()?.unpin(&reference).await?;
        if output.is_json() {
            output.print_json(&UnpinReport { report: &report, was_pinned: report.pin.is_some() })?;
        }
        output.message(&match report.pin {
            Some(pin) => format!("{}: unpinned; it was {pin}", report.key),
            None => format!("{}: was not pinned", report.key),
        });
        Ok(())
    }
}

/// A removed pin.
#[derive(Debug, Serialize)]
pub(crate) struct UnpinReport<'a> {
    #[serde(flatten)]
    pub(crate) report: &'a PinReport,
    /// True if there was a pin.
    pub(crate) was_pinned: bool,
}
