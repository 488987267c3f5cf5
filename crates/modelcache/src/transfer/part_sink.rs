//! Notification channel for completed parts of a file that is being downloaded.

use crate::key::FilePath;
use std::ops::Range;
use tokio::sync::mpsc;

/// A part that is written and, if the file has a ladder, verified. It can be read from the staged file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CompletedPart {
    pub(crate) path: FilePath,
    /// Generation of the staged file. A file that is downloaded again has another one.
    pub(crate) generation: u64,
    /// Byte range of the part in the file.
    pub(crate) bytes: Range<u64>,
}

/// Sends notifications of completed parts, without ever waiting for the receiver.
///
/// A completed part is provisional: the file may still fail verification as a whole and be downloaded again, as
/// another generation.
#[derive(Debug, Clone)]
pub(crate) struct PartSink(mpsc::UnboundedSender<CompletedPart>);

impl PartSink {
    /// Creates a sink and the receiver of its notifications.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<CompletedPart>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Notifies the receiver, if it still exists, that `bytes` of the file at `path` are complete.
    pub(crate) fn notify(&self, path: &FilePath, generation: u64, bytes: Range<u64>) {
        let _ = self.0.send(CompletedPart { path: path.clone(), generation, bytes });
    }
}
