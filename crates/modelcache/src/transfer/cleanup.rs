//! Cleanup tasks of cancelled calls: aborting multipart uploads, releasing claims.
//!
//! A `Drop` implementation cannot wait for a request, so it spawns a task. The tasks are counted here, so that a
//! process that is about to exit can wait for them briefly. Correctness does not depend on them: the next writer
//! removes what they leave behind.

use std::future::Future;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::sync::watch;

/// Number of unfinished cleanup tasks in this process.
static RUNNING: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// Counts a task as unfinished until this value is dropped. It is also dropped if the runtime drops the task.
struct TaskCount;

impl TaskCount {
    fn new() -> Self {
        RUNNING.send_modify(|running| *running += 1);
        Self
    }
}

impl Drop for TaskCount {
    fn drop(&mut self) {
        RUNNING.send_modify(|running| *running -= 1);
    }
}

/// Spawns `work` as a counted background task. Does nothing if no runtime is running.
pub(crate) fn spawn_cleanup(work: impl Future<Output = ()> + Send + 'static) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    let count = TaskCount::new();
    runtime.spawn(async move {
        let _count = count;
        work.await;
    });
}

/// Waits until all cleanup tasks of this process have finished, for at most `limit`.
pub async fn wait_for_cleanup(limit: Duration) {
    let mut running = RUNNING.subscribe();
    let _ = tokio::time::timeout(limit, running.wait_for(|running| *running == 0)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_waits_for_its_cleanup_tasks() {
        let (send, receive) = tokio::sync::oneshot::channel();
        spawn_cleanup(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let _ = send.send(7);
        });
        wait_for_cleanup(Duration::from_secs(60)).await;
        assert_eq!(receive.await, Ok(7));
        spawn_cleanup(std::future::pending());
        wait_for_cleanup(Duration::from_millis(10)).await;
    }
}
