//! `ls`: lists the artifacts on the local disk or on the remote.

use super::Session;
use crate::human;
use crate::output::{Lines, table};
use clap::Args;
use modelcache::Result;
use modelcache::cache::Listed;
use std::time::SystemTime;

/// List the artifacts on the local disk, or on the remote
#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// List the artifacts on the remote: the configured remote, or the one at URL
    // Shares its id with the global `--remote URL`, so that both definitions can coexist.
    #[arg(id = "remote", long = "remote", num_args = 0..=1, default_missing_value = "", value_name = "URL")]
    remote: Option<String>,
}

impl Ls {
    /// Returns true if the artifacts on the remote are to be listed.
    pub(crate) fn of_remote(&self) -> bool {
        self.remote.is_some()
    }

    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<()> {
        let output = session.output;
        if self.of_remote() && session.config.remote.is_none() {
            return Err(modelcache::Error::invalid("no remote is configured")
                .hint("set MODEL_CACHE_REMOTE, or write --remote s3://bucket/prefix"));
        }
        let cache = session.cache()?;
        let listed = if self.of_remote() { cache.list_remote().await? } else { cache.list().await? };
        if output.is_json() {
            return listed.iter().try_for_each(|listed| output.print_json(listed));
        }
        output.print(&listing(&listed, self.of_remote(), SystemTime::now()))
    }
}

fn listing(listed: &[Listed], of_remote: bool, now: SystemTime) -> Lines {
    let row = |listed: &Listed| {
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
    table(&header, &[1, 2], listed.iter().map(row))
}

fn formats(listed: &Listed) -> String {
    let formats: Vec<_> = listed.formats.iter().map(String::as_str).collect();
    if formats.is_empty() { "-".into() } else { formats.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::ArtifactKey;
    use modelcache::manifest::Shape;
    use std::time::Duration;

    fn listed(name: &str, held_bytes: u64, leased: bool) -> Listed {
        Listed {
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
    fn a_partial_artifact_is_shown_as_partial() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(7260);
        let rows = [listed("team/model@3", 1_200_000_000, false), listed("a@1", 4_000_000_000, true)];
        let expected = "\
NAME@VERSION              SIZE  FILES  FORMAT     LAST USED
team/model@3  1.2 GB of 4.0 GB    1/2  -          2 hours ago
a@1                     4.0 GB    1/2  gguf, tar  in use, pinned";
        assert_eq!(listing(&rows, false, now).to_string(), expected);
        let remote = listing(&rows, true, now).to_string();
        assert!(
            !remote.contains("LAST USED") && remote.contains("prod"),
            "the remote has tags and no time of last use"
        );
        assert_eq!(serde_json::json!(rows[0])["last_used"], "1970-01-01T00:01:00Z");
    }
}
