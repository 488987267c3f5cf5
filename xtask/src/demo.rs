//! `cargo xtask demo`.

use anyhow::{Result, bail};
use clap::Args;

/// Not yet
#[derive(Debug, Args)]
pub(crate) struct Demo {}

impl Demo {
    pub(crate) fn run(&self) -> Result<()> {
        bail!("not yet")
    }
}
