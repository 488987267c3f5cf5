//! `cargo xtask bench-read`: reads files once from start to end, like a model loader.

use anyhow::{Context, Result};
use clap::Args;
use rustix::fs::{Mode, OFlags};
use std::path::PathBuf;

/// Size of one read.
const BUFFER_BYTES: usize = 8 << 20;
/// Alignment of the buffer in bytes, as O_DIRECT requires it.
const ALIGN: usize = 4096;

/// Read files once
#[derive(Debug, Args)]
pub(crate) struct ReaderArguments {
    /// Bypass the page cache (O_DIRECT)
    #[arg(long)]
    direct: bool,
    files: Vec<PathBuf>,
}

impl ReaderArguments {
    pub(crate) fn run(&self) -> Result<()> {
        let mut memory = vec![0_u8; BUFFER_BYTES + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN);
        let buffer = &mut memory[start..start + BUFFER_BYTES];
        let flags = if self.direct { OFlags::RDONLY | OFlags::DIRECT } else { OFlags::RDONLY };
        for path in &self.files {
            let failure = || format!("cannot read {}", path.display());
            let file = rustix::fs::open(path, flags, Mode::empty()).with_context(failure)?;
            while rustix::io::read(&file, &mut *buffer).with_context(failure)? > 0 {}
        }
        Ok(())
    }
}
