//! Start jitter: a random delay before the first request, so that machines that start together do not send their
//! requests together.
//!
//! All calls of a cache share one delay. A get of a local artifact is not delayed.

use super::Cache;
use crate::option_name::setting::START_JITTER;
use std::time::Duration;
use tokio::sync::OnceCell;

/// The cell is set once the delay of this cache is over.
#[derive(Debug, Default)]
pub(super) struct StartJitter(OnceCell<()>);

impl Cache {
    /// Waits for the end of the delay. Must be called before a get contacts the remote or an origin.
    pub(super) async fn wait_for_start_jitter(&self) {
        let jitter = self.0.config.start_jitter;
        let sleep = || async move {
            let wait = jitter.mul_f64(rand::random_range(0.0..=1.0));
            if wait > Duration::ZERO {
                tracing::info!(
                    wait_ms = wait.as_millis() as u64,
                    "waiting a random time before the first request ({START_JITTER})"
                );
                tokio::time::sleep(wait).await;
            }
        };
        self.0.start_jitter.0.get_or_init(sleep).await;
    }
}
