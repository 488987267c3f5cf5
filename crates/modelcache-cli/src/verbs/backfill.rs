//! `backfill`: completes the pending uploads of earlier runs.
//!
//! Artifacts are uploaded one after the other. Artifacts that another process is uploading are skipped. Commands that
//! get or put artifacts complete pending uploads, too, before they end: see [`finish_uploads`].

use super::Session;
use crate::output::{Lines, table};
use crate::{exit, human, progress};
use clap::Args;
use modelcache::cache::{BackfillReport, PendingBackfill};
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Cache, Result};
use serde::Serialize;

/// Upload artifacts that earlier runs left pending
///
/// An upload is pending if the artifact was downloaded from an origin with `--backfill later`, while the remote was
/// down, or by a run that was killed. Artifacts that were put while no remote was configured are uploaded, too. Uploads
/// to another remote than the configured one stay pending.
#[derive(Debug, Args)]
pub(crate) struct Backfill {
    /// Only list the artifacts that would be uploaded
    #[arg(long)]
    pub(crate) dry_run: bool,
}

impl Backfill {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let (output, cache) = (session.output, session.cache()?);
        if self.dry_run {
            let pending = cache.pending_backfills().await?;
            if output.is_json() {
                pending.iter().try_for_each(|pending| output.print_json(pending))?;
            } else {
                output.print(&listing(&pending))?;
            }
            return Ok(exit::DONE);
        }
        let progress = Progress::new();
        let report = progress::show(output, "backfill", &progress, cache.backfill_pending(&progress)).await?;
        for key in &report.done {
            if output.is_json() {
                output.print_json(&Outcome::new(key, "done"))?;
            }
        }
        for key in &report.busy {
            output.message(&format!("{key}: another process is uploading it"));
            if output.is_json() {
                output.print_json(&Outcome::new(key, "busy"))?;
            }
        }
        let mut code = exit::DONE;
        for (key, error) in report.dropped.iter().chain(&report.failed) {
            output.error(error, Some(&key.to_string()));
            if code == exit::DONE {
                code = exit::code(error.kind());
            }
        }
        output.message(&summary(&report, count_for_other_remotes(&cache, session).await?));
        Ok(code)
    }
}

/// Returns the number of pending uploads to other remotes.
async fn count_for_other_remotes(cache: &Cache, session: &Session<'_>) -> Result<usize> {
    let configured = session.config.remote.as_ref().map(|remote| remote.url.as_str());
    let pending = cache.pending_backfills().await?;
    let is_for_other = |pending: &&PendingBackfill| pending.remote.is_some() && pending.remote.as_deref() != configured;
    Ok(pending.iter().filter(is_for_other).count())
}

/// Ends a command that got or put artifacts: waits for its background uploads and, if the remote has answered,
/// completes the pending uploads of earlier runs.
pub(super) async fn finish_uploads(session: &Session<'_>, cache: &Cache) {
    let progress = Progress::new();
    let work = async { Ok(cache.finish_backfills(&progress).await) };
    let report = progress::show(session.output, "backfill", &progress, work).await;
    if let Ok(report) = report
        && !report.done.is_empty()
    {
        session.output.message(&format!("pending uploads of earlier runs: {}", summary(&report, 0)));
    }
}

/// Formats the summary line. `others` is the number of pending uploads to other remotes.
fn summary(report: &BackfillReport, others: usize) -> String {
    let counted = |number: usize| human::counted(number, "artifact");
    let attempted = report.done.len() + report.failed.len() + report.dropped.len() + report.busy.len();
    let mut text = match attempted {
        0 => "nothing to upload".to_owned(),
        _ => format!("{} complete on the remote", counted(report.done.len())),
    };
    text.push_str(
        &remote_bytes_text(report.uploaded_bytes, report.copied_bytes).map_or_else(String::new, |b| format!(", {b}")),
    );
    let rest = [
        (report.failed.len(), "still pending"),
        (report.dropped.len(), "dropped"),
        (report.busy.len(), "in progress elsewhere"),
    ];
    for (number, what) in rest.into_iter().filter(|(number, _)| *number > 0) {
        text.push_str(&format!(", {number} {what}"));
    }
    if others > 0 {
        text.push_str(&format!("; still pending for another remote: {}", counted(others)));
    }
    text
}

/// Formats the bytes that were written to the remote: `5.0 MB to remote, 1.2 GB copied within the remote`. Returns
/// `None` if there are none.
pub(super) fn remote_bytes_text(uploaded_bytes: u64, copied_bytes: u64) -> Option<String> {
    let parts = [(uploaded_bytes, "to remote"), (copied_bytes, "copied within the remote")];
    let parts = parts.into_iter().filter(|(bytes, _)| *bytes > 0);
    let parts: Vec<_> = parts.map(|(bytes, what)| format!("{} {what}", human::bytes(bytes))).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn listing(pending: &[PendingBackfill]) -> Lines {
    let row = |pending: &PendingBackfill| {
        let (size, files) = (human::bytes(pending.bytes), pending.files.to_string());
        let remote = pending.remote.clone().unwrap_or_else(|| "none (kept on this disk only)".into());
        vec![pending.key.to_string(), size, files, remote]
    };
    table(&["NAME@VERSION", "SIZE", "FILES", "REMOTE"], &[1, 2], pending.iter().map(row))
}

/// The outcome for one artifact.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome<'a> {
    #[serde(flatten)]
    key: &'a ArtifactKey,
    /// The reference to the artifact.
    reference: String,
    /// `done`, or `busy` if another process is uploading the artifact.
    outcome: &'static str,
}

impl<'a> Outcome<'a> {
    pub(crate) fn new(key: &'a ArtifactKey, outcome: &'static str) -> Self {
        Self { key, reference: key.to_string(), outcome }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::Error;

    #[test]
    fn the_summary_has_completed_and_pending_uploads() {
        let key = ArtifactKey::bare("a@1").expect("key");
        let mut report =
            BackfillReport { done: vec![key.clone()], uploaded_bytes: 5_000_000, ..BackfillReport::default() };
        assert_eq!(summary(&report, 0), "1 artifact complete on the remote, 5.0 MB to remote");
        report.copied_bytes = 7;
        report.failed.push((key.clone(), Error::unavailable("down")));
        report.busy.push(key);
        let expected = "1 artifact complete on the remote, 5.0 MB to remote, 7 B copied within the remote, \
                        1 still pending, 1 in progress elsewhere; still pending for another remote: 2 artifacts";
        assert_eq!(summary(&report, 2), expected);
        assert_eq!(summary(&BackfillReport::default(), 0), "nothing to upload");
        assert_eq!(remote_bytes_text(0, 0), None);
    }
}
