//! `put`: publishes a file or folder on disk and the remote.

use super::{Session, absolute, extend, key_object, path_text, phase_list, seconds, tag};
use crate::{human, progress};
use clap::Args;
use modelcache::cache::{PutOptions, PutReport};
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
        let (options, progress, started) = (PutOptions { force: self.force }, Progress::new(), Instant::now());
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
        Ok(())
    }
}

fn report_object(report: &PutReport, took: Duration) -> Value {
    let about = json!({
        "path": path_text(&report.path),
        "files": report.files,
        "size": report.bytes,
        "sha256": report.sha256,
        "on_remote": report.on_remote,
        "uploaded_bytes": report.uploaded_bytes,
        "seconds": seconds(&report.phases),
        "total_seconds": took.as_secs_f64(),
    });
    extend(key_object(&report.key), about)
}

fn summary(report: &PutReport, took: Duration) -> String {
    let files = if report.files == 1 { "1 file".into() } else { format!("{} files", report.files) };
    let remote = match (report.on_remote, report.uploaded_bytes) {
        (false, _) => "no remote".into(),
        (true, 0) => "already on the remote".into(),
        (true, bytes) => format!("{} to remote", human::bytes(bytes)),
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
            path: "/c/a".into(),
            files: 1,
            bytes: 5,
            uploaded_bytes: 5,
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
