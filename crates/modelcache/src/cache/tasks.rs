//! Tasks that go on behind their callers, and are waited for before the process ends.

use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::task::JoinHandle;

#[derive(Debug, Default)]
pub(super) struct Tasks(Mutex<Vec<JoinHandle<()>>>);

impl Tasks {
    pub(super) fn keep(&self, task: JoinHandle<()>) {
        let mut tasks = self.lock();
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    /// Waits for all that were kept until now.
    pub(super) async fn finish(&self) {
        let tasks = std::mem::take(&mut *self.lock());
        for task in tasks {
            if let Err(error) = task.await {
                tracing::debug!(%error, "work in the background was cut short; a later run goes on");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
