//! `cargo xtask docs`: writes the pages that are generated from tables and comments in the code.

mod json;

use crate::repository::root;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;

/// Write the generated pages below docs/
#[derive(Debug, Args)]
pub struct Docs {
    /// Only check that the pages are up to date
    #[arg(long)]
    pub(crate) check: bool,
}

impl Docs {
    /// Runs the task.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn run(&self) -> Result<()> {
        let mut stale = Vec::new();
        let mut pages = modelcache_cli::docs::pages();
        pages.push(("docs/json.md", json::page()?));
        pages.push(("docs/http.md", modelcache_server::openapi_page()));
        for (page, text) in pages {
            let path = root().join(page);
            if fs::read_to_string(&path).is_ok_and(|current| current == text) {
                println!("{page}: up to date");
            } else if self.check {
                println!("{page}: out of date");
                stale.push(page);
            } else {
                fs::create_dir_all(path.parent().context("a page lies in a folder")?)?;
                fs::write(&path, text).with_context(|| format!("cannot write {page}"))?;
                println!("{page}: written");
            }
        }
        if !stale.is_empty() {
            bail!("{} not up to date; run `cargo xtask docs`", stale.join(", "));
        }
        Ok(())
    }
}
