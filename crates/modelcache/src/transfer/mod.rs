//! Transfer engine: downloads files from [sources](crate::source) into staging, verified part by part.
//!
//! `Downloader` is the entry point. `download.rs` runs the files of one fill, `part.rs` one run of parts (one request),
//! and `workers.rs` hashes and writes slices. `controller.rs`, `hedge.rs` and `order.rs` decide how many requests run,
//! which one gets a second connection, and in which order parts are requested; they do no I/O. `retry.rs` holds the only
//! retry policy, and `pauses.rs` the waits that servers ask for. `partial_file.rs` connects a download with the readers
//! of a file that is not complete yet.

mod buffer;
mod cleanup;
mod controller;
mod download;
mod engine;
mod hedge;
mod http_response;
mod limiter;
mod network_failure;
mod order;
mod paging;
mod part;
mod part_sink;
mod partial_file;
mod pauses;
mod retry;
#[cfg(test)]
mod simulation;
mod workers;

pub(crate) use cleanup::spawn_cleanup;
pub use cleanup::wait_for_cleanup;
pub(crate) use download::{DownloadFile, DownloadedFile, Downloader};
pub(crate) use http_response::{
    BodyError, BodyLimits, RETRY_AFTER_MAX, StallDetector, check_headers, content_range, is_html, read_body,
    retry_after,
};
pub(crate) use network_failure::{tls_error, with_lookup_deadline};
pub(crate) use paging::Paging;
pub(crate) use part_sink::{CompletedPart, PartSink};
pub(crate) use partial_file::{PartialFile, PartialFiles, PartialReader, ReadGate};
pub(crate) use pauses::Pauses;
pub use retry::{Attempts, Retry};
pub(crate) use retry::{recording_retries, within};

use std::time::Duration;

/// Time after which an idle connection is closed, so that the connections of a download do not stay open for long.
pub(crate) const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);
