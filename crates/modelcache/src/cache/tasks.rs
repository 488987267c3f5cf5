//! Background tasks that continue after the call that started them, and must end before the process does.

use crate::mutex::Mutex;
use tokio::task::JoinHandle;

/// The background tasks of one kind.
#[derive(Debug, Default)]
pub(super) struct Tasks(Mutex<Vec<JoinHandle<()>>>);

impl Tasks {
    /// Adds a task that [`wait`](Self::wait) waits for.
    pub(super) fn add(&self, task: JoinHandle<()>) {
        let mut tasks = self.0.lock();
        // Drop the handles of finished tasks, so that the list stays short.
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    /// Waits for all tasks added so far.
    pub(super) async fn wait(&self) {
        let tasks = std::mem::take(&mut *self.0.lock());
        for task in tasks {
            if let Err(error) = task.await {
                tracing::debug!(%error, "a background task was cancelled or panicked; a later run continues its work");
            }
        }
    }
}
