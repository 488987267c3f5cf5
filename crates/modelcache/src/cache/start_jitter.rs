//! The start: a random wait before the first call, so that a fleet that starts at once does not ask at once.
//!
//! It is the same wait for everybody in the process, and nobody waits whose artifact is on disk.

use super::Cache;
use std::time::Duration;
use tokio::sync::OnceCell;

/// Whether the wait is over.
#[derive(Debug, Default)]
pub(super) struct StartJitter(OnceCell<()>);

impl Cache {
    /// To be called before the remote or an origin is asked anything for a get.
    pub(super) async fn before_first_call(&self) {
        let jitter = self.0.config.start_jitter;
        let wait = || async move {
            let wait = jitter.mul_f64(rand::random_range(0.0..=1.0));
            if wait > Duration::ZERO {
                tracing::info!(
                    wait_ms = wait.as_millis() as u64,
                    "waiting a random time before the first call (MODEL_CACHE_START_JITTER)"
                );
                tokio::time::sleep(wait).await;
            }
        };
        self.0.start.0.get_or_init(wait).await;
    }
}
