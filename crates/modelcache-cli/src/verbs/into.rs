//! `get --into`: what was got, in a folder of the caller's own.

use crate::output::Output;
use crate::progress;
use clap::{Args, ValueEnum};
use modelcache::cache::{Artifact, Destination, Link, LinkMode, Materialized};
use modelcache::progress::Progress;
use modelcache::{Cache, Error, Result};
use std::path::PathBuf;

/// Where to put what was got, and how.
#[derive(Debug, Default, Args)]
pub(crate) struct IntoFolder {
    /// Put the files into this folder, and print its path instead. It is replaced as a whole; one that holds anything
    /// that modelcache did not put there is refused
    #[arg(long, visible_alias = "local-dir", value_name = "DIR")]
    into: Option<PathBuf>,
    /// How files come into the folder
    #[arg(long, value_enum, requires = "into", value_name = "HOW", default_value_t = How::Auto)]
    link: How,
}

/// How files come into the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum How {
    /// A hard link where that is possible, else a reflink, else a copy
    #[default]
    Auto,
    /// The cached file under another name: no bytes, read-only, on the same filesystem
    Hard,
    /// A file of its own that shares blocks until it is changed, where the filesystem can
    Reflink,
    /// A pointer into the cache, which an eviction breaks
    Symlink,
    /// A file of its own, checked while it is copied
    Copy,
}

impl From<How> for LinkMode {
    fn from(how: How) -> Self {
        match how {
            How::Auto => Self::Auto,
            How::Hard => Self::Only(Link::Hard),
            How::Reflink => Self::Only(Link::Reflink),
            How::Symlink => Self::Only(Link::Symlink),
            How::Copy => Self::Only(Link::Copy),
        }
    }
}

impl IntoFolder {
    /// Looks at the folder before anything is fetched; `None` if none was asked for.
    pub(super) async fn destination(&self, cache: &Cache, references: usize) -> Result<Option<Destination>> {
        match &self.into {
            None => Ok(None),
            Some(_) if references > 1 => {
                Err(Error::invalid("--into takes one reference: each replaces the whole folder")
                    .hint("run the command once for each, with a folder each"))
            }
            Some(dir) => cache.destination(dir).await.map(Some),
        }
    }

    /// Puts the artifact there.
    pub(super) async fn put(
        &self,
        output: &Output,
        artifact: &Artifact,
        destination: &Destination,
    ) -> Result<Materialized> {
        let progress = Progress::new();
        let work = artifact.materialize(destination, self.link.into(), &progress);
        let made = progress::show(output, "into", &progress, work).await?;
        output.remark(&format!("{}: {}", made.dir.display(), told(&made)));
        if made.links.contains_key(&Link::Symlink) {
            output.remark(
                "the links point into the cache: evicting the artifact breaks them (`modelcache pin` keeps it)",
            );
        }
        Ok(made)
    }
}

/// `3 files hard-linked, 1 copied`
fn told(made: &Materialized) -> String {
    let word = |link: &Link| match link {
        Link::Hard => "hard-linked (read-only)",
        Link::Reflink => "reflinked",
        Link::Symlink => "symlinked",
        Link::Copy => "copied",
    };
    let mut parts: Vec<_> = made.links.iter().map(|(link, files)| format!("{files} {}", word(link))).collect();
    if let Some(first) = parts.first_mut() {
        *first = first.replacen(' ', if first.starts_with("1 ") { " file " } else { " files " }, 1);
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn which_way_files_came_is_told() {
        let made = |links| Materialized { dir: "/d".into(), path: "/d".into(), links };
        assert_eq!(
            told(&made(BTreeMap::from([(Link::Hard, 3), (Link::Copy, 1)]))),
            "3 files hard-linked (read-only), 1 copied"
        );
        assert_eq!(told(&made(BTreeMap::from([(Link::Copy, 1)]))), "1 file copied");
    }
}
