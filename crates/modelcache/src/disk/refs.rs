//! The version to which each revision or tag last resolved, remembered in this directory. If a record is lost, the
//! revision is resolved again.

use super::Disk;
use super::files;
use super::io_error::IoContext;
use super::modes;
use crate::error::Result;
use crate::key::{ArtifactName, Version, unescape};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The content of `refs/<name>/<revision>`.
#[derive(Debug, Serialize, Deserialize)]
struct StoredRef {
    version: Version,
    /// Seconds since the Unix epoch, by this machine's clock.
    resolved_at_unix: u64,
}

/// The version to which a revision resolved, and the time since then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RememberedRef {
    pub(crate) version: Version,
    pub(crate) age: Duration,
}

impl Disk {
    /// Returns the version to which `revision` of `name` last resolved; `None` if none is remembered.
    pub(crate) fn remembered_ref(&self, name: &ArtifactName, revision: &str) -> Result<Option<RememberedRef>> {
        let bytes = files::read_small(&self.layout().ref_file(name, revision), 4096)?;
        let stored = bytes.and_then(|bytes| serde_json::from_slice::<StoredRef>(&bytes).ok());
        Ok(stored.map(|stored| {
            let since_epoch = Duration::from_secs(stored.resolved_at_unix);
            let resolved_at = UNIX_EPOCH.checked_add(since_epoch).unwrap_or(UNIX_EPOCH);
            // If the clock was set back, the recorded time is in the future. It counts as old, so that it does not stay
            // fresh for ever.
            let age = SystemTime::now().duration_since(resolved_at).unwrap_or(Duration::MAX);
            RememberedRef { version: stored.version, age }
        }))
    }

    /// Remembers that `revision` of `name` resolved to `version`, `age` ago.
    pub(crate) fn remember_ref(
        &self,
        name: &ArtifactName,
        revision: &str,
        version: &Version,
        age: Duration,
    ) -> Result<()> {
        self.ensure_writable()?;
        let path = self.layout().ref_file(name, revision);
        if let Some(folder) = path.parent() {
            modes::make_dirs(&folder).at("make", &folder)?;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stored = StoredRef { version: version.clone(), resolved_at_unix: now.saturating_sub(age).as_secs() };
        files::replace_hint(&path, &serde_json::to_vec(&stored).unwrap_or_default(), &self.layout().stagings())
    }

    /// Returns the revisions of `name` that are remembered. A revision whose file name was shortened is left out.
    pub(crate) fn remembered_revisions(&self, name: &ArtifactName) -> Result<Vec<String>> {
        let paths = files::entries(&self.layout().refs_of(name))?;
        Ok(paths.iter().filter_map(|path| unescape(path.name())).collect())
    }

    /// Forgets the version of `revision` of `name`, because the revision no longer exists.
    pub(crate) fn forget_ref(&self, name: &ArtifactName, revision: &str) -> Result<()> {
        self.ensure_writable()?;
        files::remove(&self.layout().ref_file(name, revision))
    }
}
