//! `cargo xtask bench`.

use anyhow::{Result, bail};
use clap::Args;

/// Not yet
#[derive(Debug, Args)]
pub(crate) struct Bench {}

impl Bench {
    pub(crate) fn run(&self) -> Result<()> {
        bail!("not yet")
    }
}
