//! `put`: publishes a file or folder on the local disk and on the remote.

use super::backfill::{finish, to_remote};
use super::choice::message_with_hint;
use super::{Session, absolute, extend, key_object, path_text, phase_list, seconds, tag};
use crate::{human, progress};
use clap::{Args, ValueEnum};
use modelcache::cache::{PutOptions, PutReport, PutTier};
use modelcache::format::Format;
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Result};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Publish a file or folder under a name and version
///
/// Copies it to the local cache and, if a remote is configured, uploads it. A published version never changes:
/// different content under the same name and version is refused, unless --force is given.
#[derive(Debug, Args)]
pub(crate) struct Put {
    /// The name, of one to eight segments separated by slashes, and the version
    #[arg(value_name = "NAME@VERSION")]
    pub(crate) key: String,
    /// The file or folder to publish
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,
    /// Replace different content under the same name and version, or a damaged copy
    #[arg(long)]
    pub(crate) force: bool,
    /// Then point this tag to the version, as `modelcache tag` does
    #[arg(long, value_name = "TAG")]
    pub(crate) tag: Option<String>,
    /// Where to publish; `remote` needs no space on this disk
    #[arg(long, value_enum, default_value_t = PutTierArgument::All)]
    pub(crate) tier: PutTierArgument,
    /// Refuse content of another format than this: tar.gz, tar, zstd, zip, safetensors, gguf, onnx, pickle or pytorch.
    /// The format is detected from the content. In a folder, at least one file must have the format, and so must every
    /// file whose name claims it
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    pub(crate) expect: Option<Format>,
    /// Also write FILE.sha256 for every file on the remote, for readers that verify with sha256sum
    #[arg(long)]
    pub(crate) sidecar: bool,
}

/// The tiers that `--tier` accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PutTierArgument {
    /// The local disk and, if one is configured, the remote
    All,
    /// The remote only
    Remote,
}

fn format(name: &str) -> Result<Format, String> {
    Format::parse(name).map_err(message_with_hint)
}

impl Put {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        let key = ArtifactKey::bare(&self.key)?;
        let path = absolute(&self.path)?;
        let cache = session.cache()?;
        let tag = self.tag.as_deref().map(tag::tag_of).transpose()?;
        // Check the tag first, so that an invalid tag does not leave a published version without it.
        if let Some(tag) = &tag {
            cache.check_tag(&key, tag).await.map_err(|error| error.artifact(&key))?;
        }
        let (options, progress, started) = (self.options(), Progress::new(), Instant::now());
        let report =
            progress::show(output, &self.key, &progress, cache.put_with(&key, &path, &options, &progress)).await?;
        let took = started.elapsed();
        session.run.put(&report);
        let tagged = match &tag {
            Some(tag) => Some(cache.tag(&key, tag).await?),
            None => None,
        };
        if output.is_json() {
            let tag = tagged.as_ref().map(|tagged| &tagged.tag);
            output.answer_json(&extend(report_object(&report, took), json!({"tag": tag})))?;
        }
        output.remark(&summary(&report, took));
        tagged.iter().for_each(|tagged| output.remark(&tag::summary(tagged)));
        finish(session, &cache).await;
        Ok(())
    }

    fn options(&self) -> PutOptions {
        PutOptions {
            force: self.force,
            tier: if self.tier == PutTierArgument::Remote { PutTier::Remote } else { PutTier::All },
            expect: self.expect,
            sidecars: self.sidecar,
        }
    }
}

fn report_object(report: &PutReport, took: Duration) -> Value {
    let about = json!({
        "path": report.path.as_deref().map(path_text),
        "files": report.files,
        "size": report.bytes,
        "sha256": report.sha256,
        "on_remote": report.on_remote,
        "uploaded_bytes": report.uploaded_bytes,
        "copied_bytes": report.copied_bytes,
        "seconds": seconds(&report.phases),
        "total_seconds": took.as_secs_f64(),
    });
    extend(key_object(&report.key), about)
}

fn summary(report: &PutReport, took: Duration) -> String {
    let files = if report.files == 1 { "1 file".into() } else { format!("{} files", report.files) };
    let remote = match to_remote(report.uploaded_bytes, report.copied_bytes) {
        _ if !report.on_remote => "no remote".into(),
        None => "already on the remote".into(),
        Some(bytes) => bytes,
    };
    let phases = phase_list(&report.phases).map_or_else(String::new, |phases| format!("{phases}; "));
    format!(
        "{}: put {files}, {} in {} ({phases}{remote}), sha256 {}",
        report.key,
        human::bytes(report.bytes),
        human::duration(took),
        report.sha256
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::digest::Digest;
    use std::collections::BTreeMap;

    #[test]
    fn the_summary_has_size_upload_and_digest() {
        let mut report = PutReport {
            key: ArtifactKey::bare("a@1").expect("key"),
            path: Some("/c/a".into()),
            files: 1,
            bytes: 5,
            uploaded_bytes: 5,
            copied_bytes: 0,
            on_remote: true,
            sha256: Digest::of(b"x"),
            phases: BTreeMap::new(),
        };
        let took = Duration::from_secs(2);
        let digest = Digest::of(b"x");
        assert_eq!(summary(&report, took), format!("a@1: put 1 file, 5 B in 2.0 s (5 B to remote), sha256 {digest}"));
        report.uploaded_bytes = 0;
        assert!(summary(&report, took).contains("(already on the remote)"));
        report.on_remote = false;
        assert!(summary(&report, took).contains("(no remote)"));
        assert_eq!(report_object(&report, took)["sha256"], json!(digest.to_string()));
    }
}
