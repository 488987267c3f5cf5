//! `put`: publishes a file or folder on the local disk and on the remote.

use super::backfill::{finish_uploads, remote_bytes_text};
use super::get_arguments::message_with_hint;
use super::{Session, absolute, phase_list, tag};
use crate::{human, progress};
use clap::{Args, ValueEnum};
use modelcache::cache::{PutOptions, PutReport, PutTier};
use modelcache::format::Format;
use modelcache::progress::Progress;
use modelcache::{ArtifactKey, Error, Reference, Result};
use std::path::{Path, PathBuf};

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
    /// Leave out files of the folder that match this pattern; may be repeated. `*` matches across folders
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Publish what symbolic links to places outside the folder point to, instead of refusing them
    #[arg(long)]
    pub(crate) follow_links: bool,
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
        let key = ArtifactKey::bare(&self.key).map_err(|error| self.explain_key(error))?;
        let path = absolute(self.local_path()?)?;
        let cache = session.cache()?;
        let (options, progress) = (self.options()?, Progress::new());
        let report =
            progress::show(output, &self.key, &progress, cache.put_with(&key, &path, &options, &progress)).await?;
        session.metrics.record_put(&report);
        if output.is_json() {
            output.print_json(&report)?;
        }
        output.message(&summary(&report));
        if !report.on_remote {
            output.message(&format!(
                "{}: kept on this disk only, and not evicted to make room; to share it, set MODEL_CACHE_REMOTE and run \
                 `modelcache backfill`",
                report.key
            ));
        }
        report.tag.iter().for_each(|tagged| output.message(&tag::summary(tagged)));
        finish_uploads(session, &cache).await;
        Ok(())
    }

    /// Returns the error for an invalid key. If key and path were swapped, this is an error that states the right
    /// order. Otherwise it is `error`.
    fn explain_key(&self, error: Error) -> Error {
        match self.path.to_str() {
            Some(path) if ArtifactKey::bare(path).is_ok() && Path::new(&self.key).exists() => {
                Error::invalid(format!("{:?} is a file or folder, and has no version", self.key))
                    .hint(format!("the name comes first: modelcache put {path} {}", self.key))
            }
            _ => error,
        }
    }

    /// Returns the path. Refuses standard input and URLs, which `put` does not read.
    fn local_path(&self) -> Result<&Path> {
        let refuse = |what: &str, hint: String| Err(Error::invalid(what).hint(hint));
        let key = &self.key;
        match self.path.to_str() {
            Some("-" | "/dev/stdin") => refuse(
                "put does not read standard input",
                format!("write it to a file first: cat > FILE && modelcache put {key} FILE"),
            ),
            Some(url) if url.contains("://") && !self.path.exists() => {
                let url = Reference::shown(url);
                refuse(
                    "put takes a local file or folder, not a URL",
                    format!(
                        "`modelcache get {url}` caches it under its own name; to publish it as {key}: modelcache put {key} \
                     \"$(modelcache get {url})\""
                    ),
                )
            }
            _ => Ok(&self.path),
        }
    }

    fn options(&self) -> Result<PutOptions> {
        Ok(PutOptions {
            force: self.force,
            tier: if self.tier == PutTierArgument::Remote { PutTier::Remote } else { PutTier::All },
            expect: self.expect,
            sidecars: self.sidecar,
            exclude: self.exclude.clone(),
            follow_links: self.follow_links,
            tag: self.tag.as_deref().map(tag::parse_tag).transpose()?,
        })
    }
}

fn summary(report: &PutReport) -> String {
    let files = human::counted(report.files, "file");
    let remote = match remote_bytes_text(report.uploaded_bytes, report.copied_bytes) {
        _ if !report.on_remote => "no remote".into(),
        // Without bytes, it is unknown whether the remote had the files.
        None if report.bytes == 0 => "on the remote".into(),
        None => "already on the remote".into(),
        Some(bytes) => bytes,
    };
    let phases = phase_list(&report.phases).map_or_else(String::new, |phases| format!("{phases}; "));
    format!(
        "{}: put {files}, {} in {} ({phases}{remote}), sha256 {}",
        report.key,
        human::bytes(report.bytes),
        human::duration(report.took),
        report.sha256
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::digest::Digest;
    use serde_json::json;
    use std::collections::BTreeMap;
    use std::time::Duration;

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
            took: Duration::from_secs(2),
            tag: None,
        };
        let digest = Digest::of(b"x");
        assert_eq!(summary(&report), format!("a@1: put 1 file, 5 B in 2.0 s (5 B to remote), sha256 {digest}"));
        report.uploaded_bytes = 0;
        assert!(summary(&report).contains("(already on the remote)"));
        report.on_remote = false;
        assert!(summary(&report).contains("(no remote)"));
        assert_eq!(json!(report)["sha256"], json!(digest.to_string()));
    }
}
