//! What is left to do when a caller is gone: uploads to abort, claims to give back.
//!
//! Whoever is dropped cannot wait; its last requests go on as tasks, which are counted here, so that a process that is
//! about to end can give them a moment. Nothing depends on it: what is not done is swept by the next writer.

use std::future::Future;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::sync::watch;

/// How many of them there are, in this process.
static LEFT: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// Counts as long as it lives, also where its task is dropped.
struct Counted;

impl Counted {
    fn new() -> Self {
        LEFT.send_modify(|left| *left += 1);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        LEFT.send_modify(|left| *left -= 1);
    }
}

/// Runs `work` after whoever asks for it is gone; not at all where there is no runtime any more.
pub(crate) fn spawn_cleanup(work: impl Future<Output = ()> + Send + 'static) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    let counted = Counted::new();
    runtime.spawn(async move {
        let _counted = counted;
        work.await;
    });
}

/// Waits until everything is put away that dropped calls of this process had begun, for at most `limit`.
pub async fn wait_for_cleanup(limit: Duration) {
    let mut left = LEFT.subscribe();
    let _ = tokio::time::timeout(limit, left.wait_for(|left| *left == 0)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_waits_for_what_was_left() {
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
