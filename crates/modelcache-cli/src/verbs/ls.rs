//! `ls`: lists the artifacts on the local disk or on the remote.

use super::Session;
use crate::human;
use crate::output::{Lines, table};
use clap::{Args, ValueEnum};
use modelcache::cache::{ListedArtifact, RemoteSurvey};
use modelcache::{ReferencePattern, Result};
use std::cmp::Reverse;
use std::time::SystemTime;

/// Maximum number of folders that a message names.
const FOLDERS_SHOWN_MAX: usize = 3;

/// List the artifacts on the local disk, or on the remote
#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// Only references or names that match one of these patterns, for example org/model or 'team/*'
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
    /// The order: by name, largest first, or most recently used first
    #[arg(long, value_enum, default_value_t = SortArgument::Name)]
    sort: SortArgument,
    /// List the artifacts on the remote: the configured remote, or the one at URL
    // Shares its id with the global `--remote URL`, so that both definitions can coexist.
    #[arg(id = "remote", long = "remote", num_args = 0..=1, default_missing_value = "", value_name = "URL")]
    remote: Option<String>,
}

/// The orders that `--sort` accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortArgument {
    /// By name and version
    Name,
    /// By size, largest first
    Size,
    /// By time of last use, most recently used first
    Used,
}

impl Ls {
    /// Returns true if the artifacts on the remote are to be listed.
    pub(crate) fn of_remote(&self) -> bool {
        self.remote.is_some()
    }

    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        let patterns: Vec<_> = self.patterns.iter().map(|text| ReferencePattern::new(text)).collect::<Result<_>>()?;
        let mut listed = match (self.of_remote(), &session.config.remote) {
            (false, _) => session.existing_cache()?.list().await?,
            (true, Some(remote)) => {
                let survey = session.existing_cache()?.survey_remote().await?;
                notes(&survey, &remote.url).iter().for_each(|note| output.message(note));
                survey.artifacts
            }
            (true, None) => {
                return Err(modelcache::Error::invalid("no remote is configured")
                    .hint("set MODEL_CACHE_REMOTE, or write --remote s3://bucket/prefix"));
            }
        };
        listed.retain(|row| patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(&row.reference)));
        match self.sort {
            // The list is sorted by name.
            SortArgument::Name => {}
            SortArgument::Size => listed.sort_by_key(|row| Reverse(row.held_bytes)),
            SortArgument::Used => listed.sort_by_key(|row| Reverse(row.last_used)),
        }
        if output.is_json() {
            return listed.iter().try_for_each(|listed| output.print_json(listed));
        }
        output.print(&listing(&listed, self.of_remote(), SystemTime::now()))
    }
}

/// Returns what the remote at `url` has besides the listed artifacts.
fn notes(survey: &RemoteSurvey, url: &str) -> Vec<String> {
    let artifacts = |number: &usize| human::counted(*number, "artifact");
    let elsewhere = |(prefix, number): (&String, &usize)| {
        let longer = format!("{}/{prefix}", url.trim_end_matches('/'));
        format!("{} published under {longer}; to list them: modelcache ls --remote {longer}", artifacts(number))
    };
    let mut notes: Vec<String> = survey.longer_prefixes.iter().map(elsewhere).collect();
    let folders = &survey.unmanaged_folders;
    if !folders.is_empty() {
        let shown: Vec<&str> = folders.iter().map(String::as_str).take(FOLDERS_SHOWN_MAX).collect();
        let more = if folders.len() > shown.len() { ", …" } else { "" };
        notes.push(format!(
            "{} of other tools in {url} ({}{more}): modelcache get NAME@VERSION reads NAME/VERSION there",
            human::counted(folders.len(), "folder"),
            shown.join(", ")
        ));
    }
    notes
}

/// Formats the table and, below it, the total.
fn listing(listed: &[ListedArtifact], of_remote: bool, now: SystemTime) -> Lines {
    let row = |listed: &ListedArtifact| {
        let size = if listed.held_bytes == listed.bytes {
            human::bytes(listed.bytes)
        } else {
            format!("{} of {}", human::bytes(listed.held_bytes), human::bytes(listed.bytes))
        };
        let files = format!("{}/{}", listed.held_files, listed.files);
        let mut row = vec![listed.reference.clone(), size, files, formats(listed)];
        if of_remote {
            row.push(listed.tags.join(", "));
        } else {
            let used = listed.last_used.map_or_else(|| "unknown".into(), |then| human::ago(then, now));
            let used = if listed.leased { "in use".into() } else { used };
            row.push(if listed.pin.is_some() { format!("{used}, pinned") } else { used });
        }
        row
    };
    let header = ["NAME@VERSION", "SIZE", "FILES", "FORMAT", if of_remote { "TAGS" } else { "LAST USED" }];
    let total = listed.iter().map(|row| row.held_bytes).sum();
    let mut lines = Lines::default();
    if !listed.is_empty() {
        lines += table(&header, &[1, 2], listed.iter().map(row));
    }
    lines.and(&format!("{}, {}", human::counted(listed.len(), "artifact"), human::bytes(total)))
}

fn formats(listed: &ListedArtifact) -> String {
    let formats: Vec<_> = listed.formats.iter().map(String::as_str).collect();
    if formats.is_empty() { "-".into() } else { formats.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::ArtifactKey;
    use modelcache::manifest::Shape;
    use std::time::Duration;

    fn listed(name: &str, held_bytes: u64, leased: bool) -> ListedArtifact {
        ListedArtifact {
            key: ArtifactKey::bare(name).expect("key"),
            reference: name.into(),
            shape: Shape::Tree,
            held_files: 1,
            files: 2,
            held_bytes,
            bytes: 4_000_000_000,
            formats: if leased { ["gguf".to_owned(), "tar".into()].into() } else { Default::default() },
            last_used: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(60)),
            leased,
            pin: leased.then(Default::default),
            tags: vec!["prod".into()],
        }
    }

    #[test]
    fn notes_name_the_longer_prefix_and_the_folders_of_other_tools() {
        let mut survey = RemoteSurvey::default();
        assert_eq!(notes(&survey, "s3://b"), [""; 0]);
        survey.longer_prefixes.insert("mc".into(), 9);
        survey.unmanaged_folders.extend(["a", "b", "c", "d"].map(String::from));
        let expected = [
            "9 artifacts published under s3://b/mc; to list them: modelcache ls --remote s3://b/mc",
            "4 folders of other tools in s3://b/ (a, b, c, …): modelcache get NAME@VERSION reads NAME/VERSION there",
        ];
        assert_eq!(notes(&survey, "s3://b/"), expected);
    }

    #[test]
    fn a_partial_artifact_is_shown_as_partial() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(7260);
        let rows = [listed("team/model@3", 1_200_000_000, false), listed("a@1", 4_000_000_000, true)];
        let expected = "\
NAME@VERSION              SIZE  FILES  FORMAT     LAST USED
team/model@3  1.2 GB of 4.0 GB    1/2  -          2 hours ago
a@1                     4.0 GB    1/2  gguf, tar  in use, pinned
2 artifacts, 5.2 GB";
        assert_eq!(listing(&rows, false, now).to_string(), expected);
        let remote = listing(&rows, true, now).to_string();
        assert!(
            !remote.contains("LAST USED") && remote.contains("prod"),
            "the remote has tags and no time of last use"
        );
        assert_eq!(serde_json::json!(rows[0])["last_used"], "1970-01-01T00:01:00Z");
    }
}
