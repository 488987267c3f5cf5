//! `get --into`: links or copies an artifact into a folder of the caller.

use crate::output::Output;
use crate::progress;
use clap::{Args, ValueEnum};
use modelcache::cache::{Artifact, Destination, Link, LinkMode, Materialized};
use modelcache::progress::Progress;
use modelcache::{Cache, Error, Result};
use std::path::PathBuf;

/// The destination of the files, and how they are linked or copied there.
#[derive(Debug, Default, Args)]
pub(crate) struct IntoFolder {
    /// Also put the files into this folder, and print its path instead. The folder is replaced as a whole; a mount
    /// point is filled file by file, the file `.modelcache.json` last. A folder with files that modelcache did not put
    /// there is refused
    #[arg(long, visible_alias = "local-dir", value_name = "DIR")]
    into: Option<PathBuf>,
    /// How to put the files into the folder
    #[arg(long, value_enum, requires = "into", value_name = "HOW", default_value_t = LinkArgument::Auto)]
    link: LinkArgument,
}

/// The kinds of links that `--link` accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum LinkArgument {
    /// A hard link if possible, otherwise a reflink, otherwise a copy
    #[default]
    Auto,
    /// A second name of the cached file: takes no space, is read-only, and needs the same filesystem
    Hard,
    /// A separate file that shares its blocks with the cached file until it is modified; needs a filesystem with
    /// reflinks
    Reflink,
    /// A symbolic link into the cache; it breaks when the artifact is evicted
    Symlink,
    /// A separate file, verified while it is copied
    Copy,
}

impl From<LinkArgument> for LinkMode {
    fn from(how: LinkArgument) -> Self {
        match how {
            LinkArgument::Auto => Self::Auto,
            LinkArgument::Hard => Self::Only(Link::Hard),
            LinkArgument::Reflink => Self::Only(Link::Reflink),
            LinkArgument::Symlink => Self::Only(Link::Symlink),
            LinkArgument::Copy => Self::Only(Link::Copy),
        }
    }
}

impl IntoFolder {
    /// Checks the destination folder before anything is downloaded. Returns `None` without `--into`.
    pub(super) async fn destination(&self, cache: &Cache, references: usize) -> Result<Option<Destination>> {
        match &self.into {
            None => Ok(None),
            Some(_) if references > 1 => {
                Err(Error::invalid("--into takes one reference: each replaces the whole folder")
                    .hint("run the command once per reference, each with a folder of its own"))
            }
            Some(dir) => cache.destination(dir, self.link.into()).await.map(Some),
        }
    }

    /// Links or copies the artifact into the destination and prints how.
    pub(super) async fn materialize(
        &self,
        output: &Output,
        artifact: &Artifact,
        destination: &Destination,
    ) -> Result<Materialized> {
        let progress = Progress::new();
        let work = artifact.materialize(destination, &progress);
        let materialized = progress::show(output, "into", &progress, work).await?;
        output.message(&format!("{}: {}", materialized.dir.display(), links_text(&materialized)));
        if materialized.links.contains_key(&Link::Symlink) {
            output.message(
                "the links point into the cache: evicting the artifact breaks them (`modelcache pin` keeps it)",
            );
        }
        Ok(materialized)
    }
}

/// Formats the number of files by kind of link: `3 files hard-linked (read-only), 1 copied`.
pub(super) fn links_text(materialized: &Materialized) -> String {
    let word = |link: &Link| match link {
        Link::Hard => "hard-linked (read-only)",
        Link::Reflink => "reflinked",
        Link::Symlink => "symlinked",
        Link::Copy => "copied",
    };
    let mut parts: Vec<_> = materialized.links.iter().map(|(link, files)| format!("{files} {}", word(link))).collect();
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
    fn files_are_counted_by_kind_of_link() {
        let made = |links| Materialized { dir: "/d".into(), path: "/d".into(), links };
        assert_eq!(
            links_text(&made(BTreeMap::from([(Link::Hard, 3), (Link::Copy, 1)]))),
            "3 files hard-linked (read-only), 1 copied"
        );
        assert_eq!(links_text(&made(BTreeMap::from([(Link::Copy, 1)]))), "1 file copied");
    }
}
