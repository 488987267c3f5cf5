//! Who wants to know which parts of a file that is being filled are there already.

use crate::key::FilePath;
use std::ops::Range;
use tokio::sync::mpsc;

/// A part that is written and, where a ladder can tell, checked; it can be read where the file is staged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CompletedPart {
    pub(crate) path: FilePath,
    /// Of the staged file: one that is filled anew has another.
    pub(crate) generation: u64,
    /// Where it is in the file.
    pub(crate) bytes: Range<u64>,
}

/// Tells of parts, without ever waiting for whoever listens. What is told is early, not proven: the file may still turn
/// out wrong as a whole and be filled anew, as another generation.
#[derive(Debug, Clone)]
pub(crate) struct PartSink(mpsc::UnboundedSender<CompletedPart>);

impl PartSink {
    /// A sink, and where what it is told of comes out.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<CompletedPart>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    pub(crate) fn notify(&self, path: &FilePath, generation: u64, bytes: Range<u64>) {
        let _ = self.0.send(CompletedPart { path: path.clone(), generation, bytes });
    }
}
