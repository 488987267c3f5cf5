//! The last known resolution of revisions and tags, remembered on this machine. If one is lost, it is looked up again.

use super::Disk;
use super::files;
use super::io_error::IoContext;
use super::modes;
use crate::error::Result;
use crate::key::{ArtifactName, Version};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The content of `refs/<name>/<revision>`.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    version: Version,
    /// Seconds since the Unix epoch, by this machine's clock.
    resolved_at_unix: u64,
}

/// The version that a revision resolved to, and the time since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RememberedRef {
    pub(crate) version: Version,
    pub(crate) age: Duration,
}

impl Disk {
    /// Returns the version that `revision` of `name` last resolved to; `None` if none is remembered here.
    pub(crate) fn remembered_ref(&self, name: &ArtifactName, revision: &str) -> Result<Option<RememberedRef>> {
        let bytes = files::read_small(&self.layout().reference(name, revision), 4096)?;
        let stored = bytes.and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).ok());
        Ok(stored.map(|stored| {
            let since_epoch = Duration::from_secs(stored.resolved_at_unix);
            let resolved_at = UNIX_EPOCH.checked_add(since_epoch).unwrap_or(UNIX_EPOCH);
            // If the clock was set back, a time in the future counts as old. It must not stay fresh for ever.
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
        let path = self.layout().reference(name, revision);
        if let Some(folder) = path.parent() {
            modes::make_dirs(&folder).at("make", &folder)?;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stored = Stored { version: version.clone(), resolved_at_unix: now.saturating_sub(age).as_secs() };
        files::replace_hint(&path, &serde_json::to_vec(&stored).unwrap_or_default(), &self.layout().stagings())
    }

    /// Forgets the version of `revision` of `name`, because the revision no longer exists.
    pub(crate) fn forget_ref(&self, name: &ArtifactName, revision: &str) -> Result<()> {
        self.ensure_writable()?;
        files::remove(&self.layout().reference(name, revision))
    }
}
