//! Pinning: a lasting protection from eviction on this disk, with an optional expiry. Pinning downloads nothing.

use super::{Cache, PinReport};
use crate::disk::Pin;
use crate::error::{Context, Result, Tier};
use crate::reference::Reference;
use crate::transfer::blocking;

impl Cache {
    /// Pins an artifact that is on disk, and replaces the pin that it may have. A revision stands for the version that
    /// it last resolved to on this machine.
    ///
    /// # Errors
    /// `NotFound` if the artifact is not on disk.
    pub async fn pin(&self, reference: &Reference, pin: Pin) -> Result<PinReport> {
        let (key, _) = self.key_without_network(reference).await.map_err(|error| error.artifact(reference))?;
        let (disk, of, set) = (self.0.disk.clone(), key.clone(), pin.clone());
        blocking(move || disk.pin(&of, &set)).await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin: Some(pin) })
    }

    /// Removes the pin of an artifact. The report contains the removed pin, if there was one.
    ///
    /// # Errors
    /// `NotFound` if the artifact is not on disk.
    pub async fn unpin(&self, reference: &Reference) -> Result<PinReport> {
        let (key, _) = self.key_without_network(reference).await.map_err(|error| error.artifact(reference))?;
        let (disk, of) = (self.0.disk.clone(), key.clone());
        let pin = blocking(move || disk.unpin(&of)).await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin })
    }
}
