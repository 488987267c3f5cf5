//! What revisions and tags last resolved to on this machine. Losing one costs a question, nothing else.

use super::Disk;
use super::files;
use super::io_error::IoContext;
use super::modes;
use crate::error::Result;
use crate::key::{ArtifactName, Version};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    version: Version,
    /// Seconds since the Unix epoch, by this machine's clock.
    resolved_at_unix: u64,
}

/// A remembered answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RememberedRef {
    pub(crate) version: Version,
    pub(crate) age: Duration,
}

impl Disk {
    /// What `revision` of `name` last resolved to, if it ever did here.
    pub(crate) fn remembered_ref(&self, name: &ArtifactName, revision: &str) -> Result<Option<RememberedRef>> {
        let bytes = files::read_small(&self.layout().reference(name, revision), 4096)?;
        let stored = bytes.and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).ok());
        Ok(stored.map(|stored| {
            let since_epoch = Duration::from_secs(stored.resolved_at_unix);
            let resolved_at = UNIX_EPOCH.checked_add(since_epoch).unwrap_or(UNIX_EPOCH);
            // A clock that went back makes an answer old, not fresh for ever.
            let age = SystemTime::now().duration_since(resolved_at).unwrap_or(Duration::MAX);
            RememberedRef { version: stored.version, age }
        }))
    }

    /// Remembers what `revision` of `name` resolved to, `age` ago.
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

    /// Forgets what `revision` of `name` meant: it means nothing any more.
    pub(crate) fn forget_ref(&self, name: &ArtifactName, revision: &str) -> Result<()> {
        self.ensure_writable()?;
        files::remove(&self.layout().reference(name, revision))
    }
}
