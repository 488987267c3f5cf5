//! `prewarm`: downloads a list of artifacts ahead of time.
//!
//! The whole list is planned first. It is refused if its artifacts do not fit on the disk together. Artifacts that are
//! already on disk are marked as just used; the others are downloaded, several at once. All artifacts are leased until
//! the end, so that the list does not evict its own artifacts.

use super::backfill::finish_uploads;
use super::get_arguments::GetArguments;
use super::{Session, reference_forms};
use crate::output::WithReference;
use crate::{exit, human, progress};
use clap::Args;
use futures::StreamExt;
use modelcache::cache::{Artifact, GetOptions, Purpose};
use modelcache::progress::Progress;
use modelcache::{Cache, Error, Reference, Result, Tier, redact};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Instant;
use tracing::Instrument as _;
use tracing::field::Empty;

/// The largest list file, in bytes. A larger one is refused.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// Download a list of artifacts ahead of time
///
/// The whole list is checked first: if it does not fit into the budget, nothing is downloaded. If one reference fails,
/// the others are still downloaded.
#[derive(Debug, Args)]
pub(crate) struct Prewarm {
    #[arg(required_unless_present = "file", value_name = "REF", help = reference_forms())]
    references: Vec<String>,
    /// Also the references in this file, one per line; lines that begin with # are comments; `-` is standard input
    #[arg(long, value_name = "LIST")]
    file: Option<PathBuf>,
    /// Number of artifacts to download at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    #[command(flatten)]
    arguments: GetArguments,
}

/// One reference of the list.
struct ListEntry {
    /// The reference as it was written.
    text: String,
    reference: Reference,
}

impl Prewarm {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let cache = session.cache()?;
        let code = self.arguments.with_timeout(self.get_all(session, &cache)).await?;
        finish_uploads(session, &cache).await;
        Ok(code)
    }

    /// Plans the whole list, then downloads it. Returns the exit code.
    async fn get_all(&self, session: &Session<'_>, cache: &Cache) -> Result<u8> {
        let options = GetOptions { purpose: Purpose::Keep, durable: true, ..self.arguments.options()? };
        let (output, started) = (session.output, Instant::now());
        let list = self.read_list().await?;
        let references: Vec<_> = list.iter().map(|entry| entry.reference.clone()).collect();
        let plan = cache.plan_prewarm(&references, &options).await?;
        output.message(&format!(
            "{}: {} in total, {} not on disk yet",
            human::counted(list.len(), "artifact"),
            human::bytes(plan.list_bytes),
            human::bytes(plan.missing_bytes)
        ));
        let mut tally = Tally::default();
        for (entry, planned) in list.iter().zip(&plan.artifacts) {
            if let Err(error) = planned {
                tally.failed(session, &entry.text, error);
            }
        }
        // Keep all artifacts leased until the end.
        let mut leased = Vec::new();
        let mut gets = pin!(plan.gets(self.jobs.into(), |index| get_one(session, cache, &list[index], &options)));
        while let Some((text, outcome)) = gets.next().await {
            match outcome {
                Ok(artifact) => {
                    tally.done(&artifact);
                    leased.push(artifact);
                }
                Err(error) => tally.failed(session, text, &error),
            }
        }
        output.message(&tally.text(&human::duration(started.elapsed())));
        Ok(tally.code)
    }

    /// Returns the references of the command line, followed by those of the list file.
    async fn read_list(&self) -> Result<Vec<ListEntry>> {
        let mut texts: Vec<(String, Option<usize>)> = self.references.iter().map(|text| (text.clone(), None)).collect();
        if let Some(file) = &self.file {
            texts.extend(references_in(&read(file).await?).map(|(line, text)| (text.to_owned(), Some(line))));
        }
        let parse = |(text, line): (String, Option<usize>)| match self.arguments.reference(&text) {
            Ok(reference) => Ok(ListEntry { text, reference }),
            Err(error) => Err(match (line, &self.file) {
                (Some(line), Some(file)) => {
                    let hint = error.hint_text().unwrap_or("write one reference per line").to_owned();
                    Error::invalid(format!("{} line {line}: {}", file.display(), error.message())).hint(hint)
                }
                _ => error,
            }),
        };
        texts.into_iter().map(parse).collect()
    }
}

/// Gets one reference and, if that succeeds, prints its report. Returns the reference with the outcome.
async fn get_one<'a>(
    session: &Session<'_>,
    cache: &Cache,
    entry: &'a ListEntry,
    options: &GetOptions,
) -> (&'a str, Result<Artifact>) {
    let output = session.output;
    let text = entry.text.as_str();
    let span =
        tracing::debug_span!("get", reference = %redact::reference(text), otel.status_code = Empty, exit_code = Empty);
    let progress = span.in_scope(Progress::new);
    let getting = cache.get_with(&entry.reference, options, &progress).instrument(span.clone());
    let got = progress::show(output, text, &progress, getting).await;
    crate::end_span(&span, exit::code_of(&got));
    let outcome = got.and_then(|artifact| {
        if output.is_json() {
            output.print_json(&WithReference { reference: text, report: artifact.answer() })?;
        }
        session.report_get(&artifact);
        Ok(artifact)
    });
    (text, outcome)
}

/// Returns the references of a list with their line numbers. A comment after a reference needs a space or a tab before
/// the `#`, because `#` in a reference introduces a digest.
fn references_in(list: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = |line: &str| [" #", "\t#"].iter().filter_map(|start| line.find(start)).min().unwrap_or(line.len());
    let lines = (1..).zip(list.lines()).map(move |(number, line)| (number, line[..end(line)].trim()));
    lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// Reads the list file; `-` is standard input.
async fn read(file: &Path) -> Result<String> {
    let refuse = |cause: io::Error| {
        Error::invalid(format!("cannot read the list {}", file.display()))
            .hint("--file names a text file with one reference per line, or - for standard input")
            .cause(cause)
    };
    let path = file.to_owned();
    let text = tokio::task::spawn_blocking(move || {
        let reader: Box<dyn Read> =
            if path == Path::new("-") { Box::new(io::stdin().lock()) } else { Box::new(std::fs::File::open(path)?) };
        read_text(reader)
    });
    text.await.map_err(|cause| refuse(cause.into()))?.map_err(refuse)
}

/// Reads a text of at most [`LIST_BYTES_MAX`] bytes. Fails for a larger one, and never returns only a part of it.
fn read_text(reader: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    reader.take(LIST_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIST_BYTES_MAX {
        let message = format!("it is larger than {LIST_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    String::from_utf8(bytes).map_err(|cause| io::Error::new(io::ErrorKind::InvalidData, cause))
}

/// Counts the outcomes of the list.
#[derive(Default)]
struct Tally {
    on_disk: usize,
    fetched: usize,
    fetched_bytes: u64,
    failed: usize,
    code: u8,
}

impl Tally {
    /// Counts a completed get.
    fn done(&mut self, artifact: &Artifact) {
        if artifact.report.from == Tier::Disk {
            self.on_disk += 1;
        } else {
            self.fetched += 1;
            self.fetched_bytes += artifact.report.bytes.remote + artifact.report.bytes.origin;
        }
    }

    /// Prints and counts a failure. The first failure determines the exit code.
    fn failed(&mut self, session: &Session<'_>, text: &str, error: &Error) {
        session.report_failure(error, Some(text));
        self.failed += 1;
        if self.code == exit::DONE {
            self.code = exit::code(error.kind());
        }
    }

    /// Formats the summary line.
    fn text(&self, took: &str) -> String {
        let failed = if self.failed > 0 { format!(", {} failed", self.failed) } else { String::new() };
        let bytes = human::bytes(self.fetched_bytes);
        format!(
            "{} downloaded ({bytes}), {} already on disk{failed}; {took}",
            human::counted(self.fetched, "artifact"),
            self.on_disk
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_comments_and_a_reference_may_demand_a_digest() {
        let list = "# models\n\na@1\n  b@1#sha256=00  # the good one\n#c@1\nd@1\t# x # y\r\n";
        assert_eq!(references_in(list).collect::<Vec<_>>(), [(3, "a@1"), (4, "b@1#sha256=00"), (6, "d@1")]);
    }

    #[test]
    fn a_list_that_is_too_large_is_refused_and_not_cut() {
        let read = |bytes| read_text(io::repeat(b'#').take(bytes)).map(|text| text.len() as u64);
        assert_eq!(read(LIST_BYTES_MAX).expect("reads"), LIST_BYTES_MAX);
        assert_eq!(read(LIST_BYTES_MAX + 1).expect_err("too large").kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn the_summary_is_one_line() {
        let tally = Tally { on_disk: 1, fetched: 2, fetched_bytes: 3_000_000, failed: 1, code: 3 };
        assert_eq!(tally.text("3.0 s"), "2 artifacts downloaded (3.0 MB), 1 already on disk, 1 failed; 3.0 s");
    }
}
