//! Installs our Python package, built as it is shipped, beside the peers, so that one interpreter runs them all.

use super::peers::Peers;
use anyhow::{Context, Result};
use std::path::Path;
use xtask::python::pack;
use xtask::repository::{build_native, target_folder};
use xtask::venv::pip_install;

/// Installs the package with the native module `native`. Builds the module first if `native` is `None`.
pub(super) fn install(peers: &Peers, native: Option<&Path>) -> Result<()> {
    let native = match native {
        Some(native) => {
            native.canonicalize().with_context(|| format!("cannot find the native module {}", native.display()))?
        }
        None => build_native()?,
    };
    let wheel = pack(&peers.python(), &native, &target_folder()?.join("bench-wheel"))?;
    pip_install(peers.venv(), &["--force-reinstall", "--no-deps", &wheel.to_string_lossy()])
}
