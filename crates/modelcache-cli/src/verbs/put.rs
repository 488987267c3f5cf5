//! `put`: publishes a file or folder on disk and the remote.

use super::backfill::{finish, to_remote};
use super::choice::explained;
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
/// It goes to the local directory and, if there is one, to the remote. A version never changes: other content under
/// the same key is refused without --force.
#[derive(Debug, Args)]
pub(crate) struct Put {
    /// The key: a name of one to eight segments, and a version
    #[arg(value_name = "NAME@VERSION")]
    pub(crate) key: String,
    /// The file or folder
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,
    /// Replace what is there: other content under the same key, or a damaged copy
    #[arg(long)]
    pub(crate) force: bool,
    /// Then make this tag mean the version, as `modelcache tag` does
    #[arg(long, value_name = "TAG")]
    pub(crate) tag: Option<String>,
    /// Where to publish it; `remote` needs no room on this disk
    #[arg(long, value_enum, default_value_t = Where::All)]
    pub(crate) tier: Where,
    /// Refuse what is of another format, told by its content: tar.gz, tar, zstd, zip, safetensors, gguf, onnx, pickle or
    /// pytorch. In a folder at least one file, and every file whose name says so, has to be
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    pub(crate) expect: Option<Format>,
    /// Write FILE.sha256 beside every object on the remote, for readers who check with sha256sum
    #[arg(long)]
    pub(crate) sidecar: bool,
}

/// Where to publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Where {
    /// Disk and, if there is one, the remote
    All,
    /// The remote only
    Remote,
}

fn format(name: &str) -> Result<Format, String> {
    Format::parse(name).map_err(explained)
}

impl Put {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        let key = ArtifactKey::bare(&self.key)?;
        let path = absolute(&self.path)?;
        let cache = session.cache()?;
        let tag = self.tag.as_deref().map(tag::tag_of).transpose()?;
        if let Some(tag) = &tag {
            cache.check_tag(&key, tag).await.map_err(|error| error.artifact(&key))?;
        }
        let (options, progress, started) = (self.options(), Progress::new(), Instant::now());
        let report = progress::show(output, &self.key, &progress, cache.put(&key, &path, &options, &progress)).await?;
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
            tier: if self.tier == Where::Remote { PutTier::Remote } else { PutTier::All },
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
    fn the_summary_tells_what_went_where() {
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
