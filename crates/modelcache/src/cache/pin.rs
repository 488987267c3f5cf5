//! Pinning: a lasting protection from eviction on this disk, with an optional expiry. Pinning downloads nothing.

use super::{Cache, PinReport};
use crate::disk::Pin;
use crate::error::{Context, Result, Tier};
use crate::reference::Reference;

impl Cache {
    /// Pins an artifact that is on disk, and replaces its pin if it has one. A revision stands for the version that it
    /// last resolved to on this machine.
    ///
    /// # Errors
    /// `NotFound` if the artifact is not on disk.
    pub async fn pin(&self, reference: &Reference, pin: Pin) -> Result<PinReport> {
        let (key, _) = self.last_resolved_key(reference).await.map_err(|error| error.artifact(reference))?;
        let (owned_key, owned_pin) = (key.clone(), pin.clone());
        self.on_disk(move |disk| disk.pin(&owned_key, &owned_pin)).await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin: Some(pin) })
    }

    /// Removes the pin of an artifact. The report contains the removed pin, if there was one.
    ///
    /// # Errors
    /// `NotFound` if the artifact is not on disk.
    pub async fn unpin(&self, reference: &Reference) -> Result<PinReport> {
        let (key, _) = self.last_resolved_key(reference).await.map_err(|error| error.artifact(reference))?;
        let owned_key = key.clone();
        let pin = self.on_disk(move |disk| disk.unpin(&owned_key)).await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin })
    }
}
