//! Pinning: an operator's lasting hold, with an optional end. A pin keeps an artifact on this disk; it fetches nothing.

use super::{Cache, PinReport};
use crate::disk::Pin;
use crate::error::{Context, Result, Tier};
use crate::reference::Reference;
use crate::transfer::blocking;

impl Cache {
    /// Pins an artifact that is on disk, in place of a pin it may have. A revision means what it last meant here.
    ///
    /// # Errors
    /// `NotFound` for what is not on disk.
    pub async fn pin(&self, reference: &Reference, pin: Pin) -> Result<PinReport> {
        let (key, _) = self.key_without_network(reference).await.map_err(|error| error.artifact(reference))?;
        let (disk, of, set) = (self.0.disk.clone(), key.clone(), pin.clone());
        blocking(move || disk.pin(&of, &set)).await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin: Some(pin) })
    }

    /// Takes a pin off; the report has the pin that was there, if one was.
    ///
    /// # Errors
    /// `NotFound` for what is not on disk.
    pub async fn unpin(&self, reference: &Reference) -> Result<PinReport> {
        let (key, _) = self.key_without_network(reference).await.map_err(|error| error.artifact(reference))?;
        let (disk, of) = (self.0.disk.clone(), key.clone());
        let pin = blocking(move || disk.unpin(&of)).await.context(&key, Tier::Disk)?;
        Ok(PinReport { key, pin })
    }
}
