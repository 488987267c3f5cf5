//! Pinning: a lasting protection from eviction on this disk, with an optional expiry. Pinning downloads nothing.

use super::{Cache, PinReport};
use crate::disk::{Disk, Pin};
use crate::error::{Context, Result, Tier};
use crate::key::ArtifactKey;
use crate::reference::Reference;

impl Cache {
    /// Pins an artifact that is on disk, and replaces its pin if it has one. A revision stands for the version that it
    /// last resolved to on this machine. With an archive, the files that were extracted from it are pinned as well.
    ///
    /// # Errors
    /// `NotFound` if the artifact is not on disk.
    pub async fn pin(&self, reference: &Reference, pin: Pin) -> Result<PinReport> {
        let (key, _) = self.last_resolved_key(reference).await.map_err(|error| error.artifact(reference))?;
        let (owned_key, owned_pin) = (key.clone(), pin.clone());
        let pinned = self.on_disk(move |disk| {
            let keys = Self::with_extracted_on_disk(disk, &owned_key)?;
            keys.iter().try_for_each(|key| disk.pin(key, &owned_pin))
        });
        pinned.await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin: Some(pin) })
    }

    /// Removes the pin of an artifact. The report contains the removed pin, if there was one.
    ///
    /// # Errors
    /// `NotFound` if the artifact is not on disk.
    pub async fn unpin(&self, reference: &Reference) -> Result<PinReport> {
        let (key, _) = self.last_resolved_key(reference).await.map_err(|error| error.artifact(reference))?;
        let owned_key = key.clone();
        let unpinned = self.on_disk(move |disk| {
            let mut pin = None;
            for key in Self::with_extracted_on_disk(disk, &owned_key)? {
                pin = pin.or(disk.unpin(&key)?);
            }
            Ok(pin)
        });
        let pin = unpinned.await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin })
    }

    /// Returns `key`, and the keys of the files on disk that were extracted from it. An archive that was dropped after
    /// its extraction is omitted.
    fn with_extracted_on_disk(disk: &Disk, key: &ArtifactKey) -> Result<Vec<ArtifactKey>> {
        let mut keys = Vec::new();
        for (extracted, _) in Self::extracted_from(disk, key)? {
            if disk.manifest(&extracted)?.is_some() {
                keys.push(extracted);
            }
        }
        if keys.is_empty() || disk.manifest(key)?.is_some() {
            keys.push(key.clone());
        }
        Ok(keys)
    }
}
